"""REGO: each stage against the paper's equations, where gradients flow, what the released form changes, padding."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CLASSES,
    DETECTORS,
    batch,
    deformable,
    detr,
    detr_star,
    random_images,
    refined,
    shake,
    small_resnet,
    two_stage,
    unchecked,
    with_stub,
)
from torch import nn
from torchvision.ops import MultiScaleRoIAlign

import regolite.models.rego
from regolite.boxes import to_pixels
from regolite.data import batch_images
from regolite.errors import UserError
from regolite.losses import LossConfig, SetLoss
from regolite.models.backbone import Backbone
from regolite.models.rego import Rego, RegoConfig
from regolite.types import Target

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def rego(detector, shaken=True, **fields):
    model = Rego(detector, **({"ffn_dim": 48, "dropout": 0.0, "stages": 3} | fields))
    if shaken:
        shake(model.stages)
        shake(model.projections)
        if model.contexts is not None:
            shake(model.contexts)
    return model.eval()


def same(one, other):
    return torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)


# A second implementation, of one image without padding


def attend(module, query, key_value):
    parts = (module.query, module.key, module.value)
    out, _ = F.multi_head_attention_forward(
        query,
        key_value,
        key_value,
        query.shape[-1],
        module.heads,
        torch.cat([p.weight for p in parts]),
        torch.cat([p.bias for p in parts]),
        None,
        None,
        False,
        0.0,
        module.out.weight,
        module.out.bias,
        training=False,
    )
    return out


def logit(x):
    x = x.clamp(1e-5, 1 - 1e-5)
    return torch.log(x / (1 - x))


def second_stages(model, output, height, width):
    """Algorithm 1 for the only image of a batch, by torchvision's pooler and PyTorch's attention."""
    released = model.config.form == "released"
    maps = OrderedDict()
    for number, (feature, project) in enumerate(zip(output.features, model.projections)):
        x = feature.tensor if model.detector.projected else F.conv2d(feature.tensor, project.weight, project.bias)
        if released:
            context = model.contexts[number]
            for inward, outward in zip(context.inward, context.outward):
                x = x + 0.1 * outward(F.relu(inward(F.relu(x))))
            x = F.group_norm(x, 32, context.norm.weight, context.norm.bias)
        maps[str(number)] = x
    pool = MultiScaleRoIAlign(list(maps), 7, 2)
    hidden, boxes, found = output.queries[0], output.layers[-1].boxes[0], []
    for stage in model.stages:
        x, y, w, h = boxes.unbind(-1)  # 1. RoIs
        w, h = w * stage.alpha, h * stage.alpha
        if released:
            w, h = w.clamp(max=1), h.clamp(max=1)
        corners = torch.stack(
            [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], -1
        )
        glimpses = pool(maps, [corners], [(height, width)])  # 2. glimpses
        head = stage.glimpse
        v = F.relu(head.window_norm(head.window(glimpses).flatten(1)))
        v = head.project_norm(head.project(v))
        known = stage.condense_norm(hidden @ stage.condense.weight.T)
        asks, answers = (v, known) if model.config.query == "glimpse" else (known, v)
        branch, state, by_layer = 0.5 if released else 1.0, asks, []
        for layer in stage.decoder.layers:  # 3. cross-attention
            state = layer.self_norm(state + branch * attend(layer.self_attention, state, state))
            state = layer.cross_norm(state + branch * attend(layer.cross_attention, state, answers))
            state = layer.ffn_norm(state + layer.ffn[3](F.relu(layer.ffn[0](state))))
            by_layer.append(stage.decoder.norm(state))
        change, layers = logit(boxes), []
        for translated, fuse, norm in zip(by_layer, stage.fuse, stage.fuse_norms):
            fused = norm(torch.cat([hidden, translated], -1) @ fuse.weight.T)  # 4. concatenation
            change = change + stage.box_head(fused)  # 5. predictions
            layers.append((stage.class_head(fused), change.sigmoid()))
        hidden, boxes = torch.cat([hidden, by_layer[-1]], -1), layers[-1][1]
        found.append(layers)
    return found


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("make", [detr, deformable])
@pytest.mark.parametrize("query", ["glimpse", "hidden"])
def test_the_stages_are_a_second_implementation(make, form, query):
    model = rego(make(), form=form, query=query)
    with torch.no_grad():
        output = model(batch((96, 64)))
        expected = second_stages(model, output, 96, 64)
    assert len(output.stages) == len(expected) == 3
    for stage, layers in zip(output.stages, expected):
        assert len(stage) == len(layers) == 2
        for prediction, (logits, boxes) in zip(stage, layers):
            torch.testing.assert_close(prediction.logits[0], logits, **CLOSE)
            torch.testing.assert_close(prediction.boxes[0], boxes, **CLOSE)
    assert output.final is output.stages[2][1]


def test_a_self_attention_over_the_hidden_states_can_come_first():
    model = rego(deformable(), encoder_layers=1)
    stage, seen = model.stages[0], {}
    stage.condense_norm.register_forward_hook(lambda m, i, o: seen.update(known=o))
    stage.decoder.register_forward_hook(lambda m, i, o: seen.update(memory=i[2]))
    with torch.no_grad():
        model(batch((64, 64)), stages=1)
        layer, x = stage.encoder.layers[0], seen["known"][0]
        x = layer.attention_norm(x + attend(layer.attention, x, x))
        x = layer.ffn_norm(x + layer.ffn(x))
    torch.testing.assert_close(seen["memory"].tokens[0], x, **CLOSE)
    assert len(rego(deformable()).stages[0].encoder.layers) == 0


# A plug-in


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
def test_rego_on_every_detector(make, form):
    model = rego(make(), form=form)
    assert (model.scoring, model.num_logits, model.dim) == (model.detector.scoring, model.detector.num_logits, 32)
    images = batch((64, 96), (96, 64))
    with torch.no_grad():
        output, base = model(images), model.detector(images)
    assert all(same(one, other) for one, other in zip(output.layers, base.layers))
    assert len(output.stages) == 3 and len(output.by_stage) == 4
    for layers in output.stages:
        for prediction in layers:
            assert prediction.logits.shape == (2, 7, model.num_logits)
            assert prediction.boxes.shape == (2, 7, 4)
            assert (prediction.boxes > 0).all() and (prediction.boxes < 1).all()
    assert not same(output.final, output.by_stage[0])


def test_rego_on_dc5(monkeypatch):
    small_resnet(monkeypatch)
    model = rego(detr_star(backbone="resnet50", dilated=True), stages=1)
    seen = {}
    model.stages[0].register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0]))
    with torch.no_grad():
        output = model(batch((64, 96)))
    assert [f.stride for f in seen["features"]] == [4, 8, 16, 32]
    assert {f.tensor.shape[1] for f in seen["features"]} == {32}
    assert output.final.boxes.isfinite().all()


def test_a_convolution_for_each_map_of_a_single_scale_detector():
    """Even for a map that happens to have C channels, as stage 2 of ResNet-50 has."""
    model = rego(detr())
    assert model.detector.feature_channels[0] == model.dim
    assert [type(p) for p in model.projections] == [nn.Conv2d] * 4
    assert [(p.in_channels, p.out_channels, p.kernel_size) for p in model.projections] == [
        (channels, 32, (1, 1)) for channels in (32, 64, 128, 128)
    ]
    assert [type(p) for p in rego(deformable()).projections] == [nn.Identity] * 3


@pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
def test_without_stages_it_is_the_base_detector_bit_for_bit(make):
    model, images = rego(make()), batch((64, 96), (96, 64))
    with torch.no_grad():
        off, base = model(images, stages=0), model.detector(images)
    assert off.stages == [] and same(off.final, base.final)
    assert all(same(one, other) for one, other in zip(off.layers, base.layers))
    assert torch.equal(off.queries, base.queries)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(off.features, base.features))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_fewer_stages_are_the_first_of_all(form):
    model, images = rego(refined(), form=form), batch((64, 96), (96, 64))
    with torch.no_grad():
        whole = model(images)
        for stages in (0, 1, 2, 3):
            part = model(images, stages)
            assert len(part.stages) == stages
            assert all(same(one, other) for one, other in zip(part.by_stage, whole.by_stage))
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"stages is {wrong}, and this model has 0 to 3"):
            model(images, wrong)


def test_every_stage_has_weights_of_its_own():
    model = rego(deformable(), shaken=False)
    owners = [{id(p) for p in stage.parameters()} for stage in model.stages]
    assert not (owners[0] & owners[1] or owners[1] & owners[2] or owners[0] & owners[2])
    for name, weight in model.stages[0].named_parameters():
        other = dict(model.stages[1].named_parameters())[name]
        if weight.dim() > 1 and weight.any():
            assert weight.shape != other.shape or not torch.equal(weight, other), name


def test_the_hidden_states_grow_by_c_each_stage():
    model = rego(deformable(), decoder_layers=3)
    assert [stage.condense.in_features for stage in model.stages] == [32, 64, 96]
    assert [[f.in_features for f in stage.fuse] for stage in model.stages] == [[64] * 3, [96] * 3, [128] * 3]
    widths = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: widths.append(output[1].shape[-1]))
    with torch.no_grad():
        output = model(batch((64, 64)))
    assert widths == [64, 96, 128]
    assert [len(layers) for layers in output.stages] == [3, 3, 3]


def test_at_the_start_the_stages_keep_the_boxes():
    detector = deformable()
    model, images = rego(detector, shaken=False), batch((64, 64))
    with torch.no_grad():
        output = model(images)
    for layers in output.stages:
        for prediction in layers:
            torch.testing.assert_close(prediction.boxes, output.layers[-1].boxes)
            assert prediction.logits.sigmoid().mean() < 0.05


# Ratios


def seen_regions(model, images, monkeypatch):
    """What is cut in each stage: corners in pixels, and the maps' masks."""
    cut, regions = regolite.models.rego.cut_glimpses, []

    def spy(features, boxes):
        regions.append((boxes.detach().clone(), [f.mask for f in features]))
        return cut(features, boxes)

    monkeypatch.setattr(regolite.models.rego, "cut_glimpses", spy)
    with torch.no_grad():
        output = model(images)
    return output, regions


def test_ratios_fall_to_one():
    assert RegoConfig().ratios == (3.0, 2.0, 1.0)
    assert RegoConfig(stages=1).ratios == (1.0,)
    assert RegoConfig(stages=4).ratios == (4.0, 3.0, 2.0, 1.0)
    assert RegoConfig(stages=2, alphas=(1.5, 1.0)).ratios == (1.5, 1.0)


def test_regions_are_the_previous_boxes_enlarged(monkeypatch):
    model = rego(deformable(), alphas=(2.5, 1.0, 0.5))
    images = batch((64, 96), (96, 50))
    output, regions = seen_regions(model, images, monkeypatch)
    assert len(regions) == 3
    for (corners, masks), before, alpha in zip(regions, output.by_stage, (2.5, 1.0, 0.5)):
        x, y, w, h = before.boxes.unbind(-1)
        for b, (height, width) in enumerate([(64, 96), (96, 50)]):
            expected = torch.stack([x[b] - alpha * w[b] / 2, y[b] - alpha * h[b] / 2], -1)
            torch.testing.assert_close(corners[b, :, :2], expected * torch.tensor([width, height]), **CLOSE)
            expected = torch.stack([x[b] + alpha * w[b] / 2, y[b] + alpha * h[b] / 2], -1)
            torch.testing.assert_close(corners[b, :, 2:], expected * torch.tensor([width, height]), **CLOSE)
        assert all(m.any() for m in masks)


def test_what_is_no_detector_is_named_with_what_it_lacks():
    with pytest.raises(UserError, match=r"can't stand on a Linear, which has no dim, heads, .*interop\.adapt"):
        Rego(nn.Linear(2, 2), stages=1)


def test_wrong_configurations():
    with pytest.raises(UserError, match="at least one stage, not 0"):
        RegoConfig(stages=0)
    with pytest.raises(UserError, match="3 stages need 3 alphas, not 2"):
        RegoConfig(alphas=(2.0, 1.0))
    with pytest.raises(UserError, match="unknown parameter 'stagess'; did you mean 'stages'"):
        Rego(deformable(), stagess=2)


def test_misspelt_choices():
    with unchecked(), pytest.raises(UserError, match="form='relased' is not one of 'paper', 'released'"):
        Rego(deformable(), form="relased")
    with unchecked(), pytest.raises(UserError, match="query='glimse' is not one of 'glimpse', 'hidden'"):
        Rego(deformable(), query="glimse")


def test_fields_or_a_configuration():
    config = RegoConfig(stages=2, ffn_dim=48)
    assert Rego(deformable(), stages=2, ffn_dim=48).config == Rego(deformable(), config).config == config


# What the released form changes


def test_released_regions_are_of_the_padded_batch_and_never_wider_than_it(monkeypatch):
    model = rego(deformable(), form="released")
    with torch.no_grad():
        model.detector.box_heads[0][-1].bias[2:] = 3.0  # large boxes, so that three times as large is more than all
    output, regions = seen_regions(model, batch((64, 96), (96, 50)), monkeypatch)
    for (corners, masks), before, alpha in zip(regions, output.by_stage, (3, 2, 1)):
        larger = torch.cat([before.boxes[..., :2], (before.boxes[..., 2:] * alpha).clamp(max=1)], -1)
        padded = torch.tensor([[96, 96], [96, 96]])
        torch.testing.assert_close(corners, to_pixels(larger, padded), **CLOSE)
        assert not any(m.any() for m in masks)  # padding counts as image
    first = regions[0][0]
    assert (first[..., 2:] - first[..., :2]).max() <= 96 + 1e-3
    assert first.min() < 0 and first.max() > 96  # corners are not clipped


def test_released_has_contexts_and_halved_branches_and_the_paper_has_not():
    released, paper = rego(deformable(), form="released"), rego(deformable())
    assert len(released.contexts) == 3 and paper.contexts is None
    for model, scale in ((released, 0.5), (paper, 1.0)):
        assert {layer.branch_scale for stage in model.stages for layer in stage.decoder.layers} == {scale}
        assert {layer.branch_scale for layer in model.detector.decoder_layers} == {1.0}
    extra = {name.split(".")[0] for name in released.state_dict()} - {name.split(".")[0] for name in paper.state_dict()}
    assert extra == {"contexts"}


def test_glimpses_of_the_released_form_are_cut_from_features_with_context():
    model = rego(deformable(), form="released", stages=1)
    seen = {}
    model.stages[0].register_forward_hook(lambda module, inputs, output: seen.update(features=inputs[0]))
    with torch.no_grad():
        output = model(batch((64, 64)))
        for raw, cut, context in zip(output.features, seen["features"], model.contexts):
            torch.testing.assert_close(cut.tensor, context(raw.tensor))


# Gradients


def prediction_loss(predictions):
    return sum(p.logits.square().sum() + p.boxes.square().sum() for p in predictions)


def reached(module):
    """Names of the weights that a backward pass has reached; a gradient that is exactly zero is none."""
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def starting_with(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


HEADS = {
    deformable: ("detector.class_heads", "detector.box_heads"),  # its reference points say where attention looks
    refined: ("detector.class_heads", "detector.box_heads.1"),
    two_stage: ("detector.class_heads", "detector.box_heads.1", "detector.proposals.class_head"),
    detr: ("detector.class_head", "detector.box_head"),
    detr_star: ("detector.class_head", "detector.box_head", "detector.reference_points"),
}


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("make", HEADS)
def test_by_default_stages_teach_the_decoder_but_not_the_heads_of_the_base(make, form):
    model = rego(make(), form=form).train()
    output = model(batch((64, 96)))
    prediction_loss(p for layers in output.stages for p in layers).backward()
    got = reached(model)
    assert not got & starting_with(model, *HEADS[make])
    decoder = "detector.decoder.layers" if make in (detr, detr_star) else "detector.decoder_layers"
    untrained = starting_with(model, decoder) - got
    assert untrained <= {"detector.decoder.layers.0.self_attention.value.weight"}  # mixes zeros
    assert starting_with(model, "detector.encoder", "detector.backbone", "stages") <= got


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("make", HEADS)
def test_with_detach_hidden_stages_teach_the_features_alone(make, form):
    """The letter of appendix A.1."""
    model = rego(make(), form=form, detach_hidden=True).train()
    output = model(batch((64, 96)))
    prediction_loss(p for layers in output.stages for p in layers).backward()
    got = reached(model.detector)
    assert got and got <= starting_with(model.detector, "backbone.", "pyramid.")
    assert starting_with(model, "stages") <= reached(model)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("detach_hidden", [False, True])
def test_what_a_stage_teaches_the_stages_before(form, detach_hidden):
    model = rego(deformable(), form=form, detach_hidden=detach_hidden).train()
    output = model(batch((64, 96)))
    prediction_loss(output.stages[2]).backward()
    for stage in model.stages[:2]:
        got = reached(stage)
        assert not got & starting_with(stage, "class_head", "box_head", "fuse")
        if detach_hidden:
            assert got == set()
        else:
            assert starting_with(stage, "glimpse", "condense", "decoder") <= got
    assert reached(model.stages[2]) == {name for name, _ in model.stages[2].named_parameters()}


def test_boxes_are_corrections_of_constants():
    """A stage's boxes do not move with the boxes before: neither by the sum nor by where the glimpse is cut."""
    model = rego(deformable()).train()
    stage = model.stages[0]
    output = model.detector(batch((64, 96)))
    boxes, hidden = output.layers[-1].boxes, output.queries
    predictions, _ = stage(output.features, torch.tensor([[64, 96]]), hidden, boxes.detach())
    grads = torch.autograd.grad(predictions[-1].boxes.sum(), [boxes, hidden], allow_unused=True, retain_graph=True)
    assert grads[0] is None and grads[1].any()
    # Within a stage the layers' corrections add up, and the first is trained through the second.
    first, second = predictions
    (through,) = torch.autograd.grad(second.boxes.sum(), [stage.fuse[0].weight])
    assert through.any()


@pytest.mark.parametrize("form", ["paper", "released"])
def test_the_hidden_states_learn_as_key_and_value_but_not_in_the_concatenation(form):
    stage = rego(deformable(), form=form).train().stages[0]
    output = stage_inputs()
    hidden = output.queries.detach().requires_grad_()
    predictions, grown = stage(output.features, torch.tensor([[64, 96]]), hidden, output.layers[-1].boxes.detach())
    (through,) = torch.autograd.grad(prediction_loss(predictions), [hidden])
    assert through.any()
    nn.init.zeros_(stage.condense.weight)  # now nobody asks the hidden states
    predictions, grown = stage(output.features, torch.tensor([[64, 96]]), hidden, output.layers[-1].boxes.detach())
    (through,) = torch.autograd.grad(prediction_loss(predictions), [hidden], retain_graph=True)
    assert not through.any()
    # What is handed to the next stage is not detached, since there it is key and value again.
    (through,) = torch.autograd.grad(grown.sum(), [hidden])
    assert through.all()


def stage_inputs():
    with torch.no_grad():
        return deformable()(batch((64, 96)))


def test_the_base_loss_does_not_reach_the_stages():
    model = rego(deformable()).train()
    prediction_loss(model(batch((64, 96))).layers).backward()
    assert reached(model.stages) == set()


# Padding


@pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
@pytest.mark.parametrize("sizes", [[(64, 64), (160, 96)], [(50, 70), (33, 96), (100, 100)]], ids=str)
def test_padding_does_not_move_the_boxes_of_any_stage(make, sizes):
    levels = {"levels": 4} if make in (deformable, refined, two_stage) else {}
    model, images = rego(with_stub(make(**levels))), random_images(*sizes)
    with torch.no_grad():
        together = model(batch_images(images, 32))
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.by_stage, together.by_stage):
                torch.testing.assert_close(one.boxes[0], many.boxes[i], rtol=1e-3, atol=2e-4)
                torch.testing.assert_close(one.logits[0], many.logits[i], rtol=1e-3, atol=2e-3)
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-2


def test_the_released_form_lets_padding_in():
    model, images = rego(with_stub(deformable()), form="released"), random_images((64, 64), (160, 96))
    with torch.no_grad():
        together, alone = model(batch_images(images, 32)), model(batch_images(images[:1], 32))
    torch.testing.assert_close(alone.by_stage[0].boxes[0], together.by_stage[0].boxes[0], **CLOSE)
    assert (alone.final.boxes[0] - together.final.boxes[0]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [detr, deformable, two_stage])
def test_padding_does_not_move_boxes_with_a_real_backbone(make):
    model = rego(make(backbone="mobilenet_v2", weights="bundled"))
    bundled = Backbone("mobilenet_v2", weights="bundled")
    model.detector.backbone.load_state_dict(bundled.state_dict())  # as they were before they were shaken
    images = random_images((128, 90), (100, 160))
    with torch.no_grad():
        together = model(batch_images(images, 32))
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.by_stage, together.by_stage):
                torch.testing.assert_close(one.boxes[0], many.boxes[i], rtol=1e-3, atol=2e-4)
                torch.testing.assert_close(one.logits[0], many.logits[i], rtol=1e-3, atol=2e-3)


def test_classes_of_the_stages_are_those_of_the_detector():
    assert rego(detr()).stages[0].class_head.out_features == CLASSES + 1
    assert rego(detr_star()).stages[0].class_head.out_features == CLASSES
    assert rego(detr()).stages[0].class_head.bias.abs().max() < 2
    prior = Rego(deformable(), ffn_dim=48).stages[0].class_head.bias.sigmoid()
    torch.testing.assert_close(prior, torch.full((CLASSES,), 0.01))


@pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
def test_a_frozen_base_is_neither_trained_nor_in_training_mode(make):
    detector, images = make(dropout=0.5), batch((64, 96), (80, 60))
    with torch.no_grad():
        alone = detector(images)
    model = rego(detector, frozen=True).train()
    assert model.stages.training and not any(module.training for module in model.detector.modules())
    output = model(images)
    torch.testing.assert_close(output.layers[-1].boxes, alone.layers[-1].boxes, **CLOSE)  # no dropout
    assert not output.queries.requires_grad and not output.layers[0].logits.requires_grad  # and no graph

    targets = [Target(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), i, (64, 96)) for i in range(2)]
    loss, _ = SetLoss(LossConfig(), model.scoring)(output, targets)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.detector.parameters())
    assert model.stages[0].box_head[-1].weight.grad.any()


def test_a_base_is_not_frozen_unless_asked():
    model = rego(detr()).train()
    assert model.detector.training and all(p.requires_grad for p in model.detector.class_head.parameters())
