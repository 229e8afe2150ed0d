"""The recorder: what it keeps is what the model computed, lies where it belongs, and nothing of it stays behind."""

import copy
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import small_models
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import DETECTORS, batch, with_stub
from torch import Tensor, nn

import regolite
from regolite import Rego, Trace, UserError, record
from regolite.boxes import to_pixels
from regolite.inference import detections_by_stage
from regolite.models.glimpse import choose_level, cut_glimpses
from regolite.models.presets import configure
from regolite.tracing.trace import Frame

MEAN_COLOR = (124, 116, 104)  # nearly zero once normalized, as padding is


def with_rego(name, **config):
    config = {"stages": 2, "ffn_dim": 48, "dropout": 0.0} | config
    return small_models.shake(Rego(DETECTORS[name](), **config)).eval()


MODELS = {
    **DETECTORS,
    **{f"rego_{name}": lambda name=name: with_rego(name) for name in DETECTORS},
    "detr_star_dc5": lambda: small_models.detr_star(dilated=True, backbone="resnet50"),
    "released": lambda: with_rego("refined", form="released"),
    "stage_encoder": lambda: with_rego("detr", encoder_layers=1),
    "smca_single_scale": lambda: small_models.smca(backbone_stages=(5,), coarser=False, multi_scale_layers=()),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def images():
    return batch((64, 96), (80, 60))


def predictions(output):
    parts = [*output.layers, *(p for stage in output.stages for p in stage), output.proposals]
    return [t for p in parts if p is not None for t in (p.logits, p.boxes)]


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(predictions(one), predictions(other), strict=True))


def state_of(model):
    """Everything that a recorder could leave on a model."""
    return {name: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
            for name, m in model.named_modules()}  # fmt: skip


def tensors_of(trace):
    return {(name, f.name): getattr(trace[name], f.name) for name in trace.names() for f in fields(trace[name])}


# What is recorded is what was computed.


@every_model
def test_recording_changes_nothing(name, images, monkeypatch):
    small_models.small_resnet(monkeypatch)
    model = MODELS[name]()
    with torch.inference_mode():
        wanted, before = model(images), state_of(model)
        with record(model) as trace:
            recorded = model(images)
        assert_same(wanted, recorded)
        assert_same(wanted, model(images))
    assert state_of(model) == before
    for kept in trace.names():
        for value in vars(trace[kept]).values():
            if isinstance(value, Tensor):
                assert not value.is_inference() and not value.requires_grad


@every_model
def test_weights_sum_to_one_and_padding_gets_none(name, images, monkeypatch):
    small_models.small_resnet(monkeypatch)
    model = MODELS[name]()
    with record(model) as trace, torch.no_grad():
        output = model(images)
    attentions = [kept for kept in trace.names() if hasattr(trace[kept], "weights")]
    layers = len(output.layers)
    base = layers if name.removeprefix("rego_") == "sparse_rcnn" else 2 + 2 * layers
    assert len(attentions) == base + sum(len(s) * 2 for s in output.stages) + (name == "stage_encoder") * 2
    for kept in attentions:
        found = trace[kept]
        sums = found.weights.sum((-2, -1) if kept in trace.names() and hasattr(found, "locations") else -1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert torch.isfinite(found.entropy()).all() and (found.entropy() >= -1e-6).all()
        if not hasattr(found, "locations"):
            cells = sum(h * w for h, w in found.shapes)
            assert cells == (found.weights.shape[-1] if found.shapes else 0)
            if found.mask is not None:
                assert found.mask.any()
                assert found.weights.masked_select(found.mask[:, None, None]).eq(0).all()


@every_model
def test_boxes_are_those_of_every_layer_and_stage(name, images, monkeypatch):
    small_models.small_resnet(monkeypatch)
    model = MODELS[name]()
    with record(model) as trace, torch.no_grad():
        output = model(images)
    for layer, prediction in enumerate(output.layers):
        assert torch.equal(trace[f"decoder.{layer}.boxes"].boxes, prediction.boxes)
    for number, stage in enumerate(output.stages, start=1):
        for layer, prediction in enumerate(stage):
            assert torch.equal(trace[f"stage.{number}.boxes.{layer}"].logits, prediction.logits)
    for found, prediction in zip(trace.by_stage, output.by_stage, strict=True):
        assert torch.equal(found.boxes, prediction.boxes)
        logits = prediction.logits
        scores = logits.sigmoid() if model.scoring == "sigmoid" else logits.softmax(-1)[..., :-1]
        assert torch.equal(found.scores, scores)
    assert ("proposals" in trace) == (output.proposals is not None)
    if output.proposals is not None:
        assert torch.equal(trace["proposals"].logits[..., 0], output.proposals.logits[..., 0])


def given_to(modules):
    """What modules are given, call by call."""
    heard = {module: [] for module in modules}
    hooks = [m.register_forward_pre_hook(lambda m, args: heard[m].append(args)) for m in modules]
    return heard, hooks


@pytest.mark.parametrize("name", ["detr", "refined", "stage_encoder"])
def test_maps_and_relations_equal_the_attention_written_out(name, images):
    model = Rego(MODELS[name](), stages=2, ffn_dim=48).eval() if name != "stage_encoder" else MODELS[name]()
    small_models.shake(model)
    detector = model.detector
    layers = detector.decoder_layers if name == "refined" else detector.decoder.layers
    modules = {f"decoder.{i}.self": layer.self_attention for i, layer in enumerate(layers)}
    if name != "refined":
        modules |= {f"decoder.{i}.cross": layer.cross_attention for i, layer in enumerate(layers)}
        modules |= {f"encoder.{i}": layer.attention for i, layer in enumerate(detector.encoder.layers)}
    for number, stage in enumerate(model.stages, start=1):
        for i, layer in enumerate(stage.decoder.layers):
            modules[f"stage.{number}.relations.{i}"] = layer.cross_attention
            modules[f"stage.{number}.decoder.{i}.self"] = layer.self_attention
        modules |= {f"stage.{number}.encoder.{i}": layer.attention for i, layer in enumerate(stage.encoder.layers)}
    heard, _ = given_to(modules.values())
    with record(model) as trace, torch.no_grad():
        model(images)
        for kept, module in modules.items():
            [(query, key, _, *mask)] = heard[module]
            wanted = module.weights(query, key, *mask)
            torch.testing.assert_close(trace[kept].weights, wanted, rtol=0, atol=1e-6)
    relations = trace["stage.2.relations.1"].weights
    assert relations.shape[-2:] == (7, 7) and not torch.allclose(relations[:, :, :1], relations)


def test_rows_and_columns_multiply_to_the_weights_of_cells(images):
    model = DETECTORS["anchor_detr"](patterns=7)
    layer = model.decoder_layers[1]
    heard, _ = given_to([layer.cross_attention])
    with record(model) as trace, torch.no_grad():
        model(images)
        columns, rows = layer.cross_attention.weights(*heard[layer.cross_attention][0])
    found = trace["decoder.1.cross"]
    assert torch.equal(found.columns, columns) and torch.equal(found.rows, rows)
    product = torch.einsum("bmqh,bmqw->bmqhw", rows, columns)
    torch.testing.assert_close(found.weights, product.flatten(3))
    torch.testing.assert_close(found.entropy(), torch.special.entr(product).sum((-2, -1)))
    torch.testing.assert_close(found.heat(2, head=1), product[0, 1, 2])
    torch.testing.assert_close(found.heat(2), product[0, :, 2].mean(0))


def test_weights_of_smca_mix_the_values_to_what_the_layer_adds(images):
    model = DETECTORS["smca"]()
    layer, seen = model.decoder.layers[1], []
    layer.dropout.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    heard, _ = given_to([layer])
    with record(model) as trace, torch.no_grad():
        model(images)
        memory = heard[layer][0][2]
        attention = layer.cross_attention
        values = attention._split(attention.value(memory.tokens))
        mixed = attention.out((trace["decoder.1.cross"].weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, seen[1], rtol=1e-4, atol=1e-5)
    assert trace["decoder.1.cross"].shapes == tuple(memory.shapes) and len(memory.shapes) == 3
    first, second = trace["encoder.0"].weights[0, 0], trace["encoder.1"].weights[0, 0]
    cells = memory.shapes[0][0] * memory.shapes[0][1]
    assert (first[:cells, cells:] == 0).all() and (first[cells:, :cells] == 0).all()  # every level by itself
    assert (second[:cells, cells:] > 0).any()


@pytest.mark.parametrize("name", ["deformable", "two_stage", "rego_refined"])
def test_sampling_points_are_those_that_were_read(name, images, monkeypatch):
    model, read = MODELS[name](), []
    original = regolite.models.deformable_attention.sample_and_mix

    def spy(values, shapes, locations, weights):
        read.append((shapes, locations, weights))
        return original(values, shapes, locations, weights)

    monkeypatch.setattr("regolite.models.deformable_attention.sample_and_mix", spy)
    with record(model) as trace, torch.inference_mode():
        model(images)
    names = ["encoder.0", "encoder.1", "decoder.0.cross", "decoder.1.cross"]
    for kept, (shapes, locations, weights) in zip(names, read, strict=True):
        found = trace[kept]
        assert torch.equal(found.locations, locations) and torch.equal(found.weights, weights)
        assert found.shapes == tuple(shapes)
    assert found.references.shape[-1] == (2 if name == "deformable" else 4)
    torch.testing.assert_close(found.level_weights().sum(-1), torch.ones(2, 7, 4))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_glimpses_are_those_that_were_cut_and_their_levels_too(form, images, monkeypatch):
    model, cut = with_rego("refined", form=form), []

    def spy(features, boxes):
        cut.append(([f.stride for f in features], boxes))
        return cut_glimpses(features, boxes)

    monkeypatch.setattr("regolite.models.rego.cut_glimpses", spy)
    with record(model) as trace, torch.no_grad():
        model(images)
    for number, (strides, boxes) in enumerate(cut, start=1):
        found = trace[f"stage.{number}.glimpses"]
        assert torch.equal(found.regions, boxes) and found.strides == tuple(strides)
        assert torch.equal(found.level, choose_level(boxes, strides))
    assert len(cut) == 2


def test_references_are_where_the_queries_start(images):
    for name in ("detr_star", "conditional_detr", "anchor_detr", "deformable", "smca", "two_stage"):
        model = DETECTORS[name]()
        for head in getattr(model, "box_heads", None) or [model.box_head]:  # boxes that stay where they start
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        with record(model) as trace, torch.no_grad():
            output = model(images)
        points = trace["references"].references[..., :2].clamp(0, 1)
        torch.testing.assert_close(points, output.layers[0].boxes[..., :2], rtol=0, atol=2e-5)
    model = DETECTORS["detr"]()
    with record(model) as trace, torch.no_grad():
        model(images)
    assert "references" not in trace


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_stages_that_are_switched_off_are_not_there(stages, images):
    model = with_rego("detr")
    with record(model) as trace, torch.no_grad():
        model(images, stages)
    assert {name.split(".")[1] for name in trace.names("stage.*")} == {str(i + 1) for i in range(stages)}
    assert len(trace.by_stage) == stages + 1


def test_16_bits_are_recorded_in_32(images):
    model = with_rego("refined")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = model(images)
        with record(model) as trace:
            assert_same(wanted, model(images))
    weights = trace["decoder.0.self"].weights
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7), rtol=0, atol=1e-6)


def test_gradients_are_those_of_a_model_that_is_not_recorded(images):
    model = with_rego("detr").train()

    def gradients():
        model.zero_grad()
        model(images).final.boxes.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients()
    with record(model):
        recorded = gradients()
    assert all(torch.equal(a, b) for a, b in zip(wanted, recorded, strict=True))


# Where it lies.


def planted(image_size, **changes):
    """A DETR each of whose queries looks at the reddest cell, and at nothing else."""
    model = with_stub(small_models.detr(encoder_layers=0, decoder_layers=1, **changes))
    attention = model.decoder.layers[0].cross_attention
    with torch.no_grad():
        model.backbone.mixes[-1].zero_()[0, 0] = 1000.0
        for part in (model.input_projection, attention.key, attention.query):
            part.weight.zero_()
            part.bias.zero_()
        model.input_projection.weight[0, 0] = 1.0
        attention.key.weight[:, 0] = 1.0
        attention.query.bias.fill_(1.0)
    model.model_config = configure("detr_tiny", image_size=image_size)
    return model


def spot_image(width, height, x, y, side):
    image = Image.new("RGB", (width, height), MEAN_COLOR)
    image.paste((255, 116, 104), (x - side // 2, y - side // 2, x + side // 2, y + side // 2))
    return image


@pytest.mark.parametrize(
    ("width", "height", "x", "y"),
    [
        (512, 300, 200, 150), (300, 512, 50, 470), (640, 201, 610, 180), (101, 77, 90, 70), (256, 256, 16, 240),
        (1000, 333, 420, 20), (90, 333, 80, 322),
    ],
)  # fmt: skip
def test_an_attention_to_a_spot_is_drawn_at_that_spot(width, height, x, y):
    """Images that are not square, made smaller or larger, and padded: at most half a cell beside it."""
    model = planted(256)
    scale = 256 / max(width, height)
    with record(model) as trace:
        regolite.detect(model, spot_image(width, height, x, y, max(2, round(8 / scale))))
    found = trace["decoder.0.cross"]
    assert found.frame.original.tolist() == [[height, width]]
    cell = 32 / scale
    for head in (None, 0, 3):
        heat = found.over_image(query=3, head=head)
        assert heat.shape == (height, width) and heat.max() > 0.999
        rows, columns = (heat == heat.max()).nonzero().float().add(0.5).unbind(1)
        assert abs(rows.mean() - y) <= cell / 2 + 1 and abs(columns.mean() - x) <= cell / 2 + 1
    number = int(found.of(3).argmax())
    assert number == found.cell_at(x, y)
    center_x, center_y = found.centers()[number].tolist()
    assert abs(center_x - x) <= cell / 2 + 1 and abs(center_y - y) <= cell / 2 + 1

    small = found.heat(3)  # drawn by imshow, between the corners that `extent` says
    row, column = divmod(int(small.argmax()), small.shape[1])
    left, right, bottom, top = found.extent()
    assert (column + 0.5) * (right - left) / small.shape[1] == pytest.approx(center_x, abs=0.01)
    assert (row + 0.5) * (bottom - top) / small.shape[0] == pytest.approx(center_y, abs=0.01)


def test_in_a_padded_batch_every_image_has_its_own_frame():
    model = planted(256)
    spots = [(110, 50, (64, 160)), (50, 110, (160, 64)), (20, 20, (50, 40))]
    several = []
    for x, y, size in spots:
        pixels = torch.zeros(3, *size)
        pixels[0, y - 4 : y + 4, x - 4 : x + 4] = 2.0
        several.append(pixels)
    images = regolite.data.batch_images(several, 32)
    with record(model) as trace, torch.no_grad():
        model(images)
    found = trace["decoder.0.cross"]
    for image, (x, y, (height, width)) in enumerate(spots):
        heat = found.over_image(0, image=image)
        assert heat.shape == (height, width)
        rows, columns = (heat == heat.max()).nonzero().float().add(0.5).unbind(1)
        assert abs(rows.mean() - y) <= 16 and abs(columns.mean() - x) <= 16
        assert found.cell_at(x, y, image=image) == found.of(0, image=image).argmax()


@pytest.mark.parametrize("size", [(128, 128), (64, 160), (100, 70), (33, 97)])
def test_cells_of_an_encoder_are_where_their_reference_points_are(size):
    model = small_models.deformable(levels=4)
    with record(model) as trace, torch.no_grad():
        model(batch(size, (96, 96)))
    found = trace["encoder.0"]
    assert found.strides == (8, 16, 32, 64)
    starts = torch.tensor([h * w for h, w in found.shapes]).cumsum(0).tolist()
    own = found.reference_points(0)  # of every cell, on every level
    first = 0
    for level, end in enumerate(starts):
        torch.testing.assert_close(own[first:end, level], found.centers(0)[first:end])
        first = end


def test_a_sampling_point_at_a_spot_is_drawn_there():
    model = small_models.deformable(levels=3)
    model.model_config = configure("deformable_detr_tiny", image_size=256)
    with torch.no_grad():
        model.reference_points.weight.zero_()
        model.reference_points.bias.copy_(torch.logit(torch.tensor([0.25, 0.75])))
        for layer in model.decoder_layers:
            layer.cross_attention.sampling_offsets.weight.zero_()
            layer.cross_attention.sampling_offsets.bias.zero_()
            offsets = layer.cross_attention.sampling_offsets.bias.view(4, 3, 2, 2)
            offsets[0, :, 0, 0] = 2.0  # two cells to the right: the first head's first point on each level
    with record(model) as trace:
        regolite.detect(model, Image.new("RGB", (512, 384)))  # the network's 256 x 192 is whole cells
    points = trace["decoder.0.cross"].points()
    spot = torch.tensor([128.0, 288.0])
    torch.testing.assert_close(points[:, 1:], spot.expand(7, 3, 3, 2, 2))
    torch.testing.assert_close(points[:, 0, :, 1], spot.expand(7, 3, 2))
    aside = points[:, 0, :, 0] - spot
    torch.testing.assert_close(aside, torch.tensor([[32.0, 0], [64, 0], [128, 0]]).expand(7, 3, 2), rtol=0, atol=1e-3)
    torch.testing.assert_close(trace["decoder.0.cross"].reference_points(), spot.expand(7, 3, 2))
    torch.testing.assert_close(trace["references"].points(), spot.expand(7, 2))


def test_boxes_and_glimpses_are_in_pixels_of_the_original_image():
    model = with_rego("refined")
    model.model_config = configure("deformable_detr_tiny", image_size=96)
    with record(model) as trace:
        [found] = regolite.detect(model, Image.new("RGB", (333, 100)), threshold=0.0)
    boxes = trace.by_stage[-1].boxes_xyxy()
    torch.testing.assert_close(boxes[found.queries], found.boxes_xyxy)
    scores, labels = trace.by_stage[-1].best()
    assert scores.max() == found.scores[0] and labels[found.queries[0]] == found.labels[0]

    glimpses = trace["stage.1.glimpses"]  # alpha(1) is 2
    middle = trace["decoder.1.boxes"].boxes_xyxy()
    corners = glimpses.boxes_xyxy()
    torch.testing.assert_close(corners[:, :2] + corners[:, 2:], middle[:, :2] + middle[:, 2:], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(
        corners[:, 2:] - corners[:, :2], 2 * (middle[:, 2:] - middle[:, :2]), rtol=1e-4, atol=1e-2
    )


def test_evaluation_tells_the_original_size_too(images):
    model, sizes = DETECTORS["detr"](), torch.tensor([[640, 960], [400, 300]])
    with record(model) as trace, torch.no_grad():
        detections_by_stage(model, images, sizes)
    assert torch.equal(trace.frame.original, sizes) and torch.equal(trace.frame.sizes, images.sizes)
    boxes = trace["decoder.1.boxes"]
    torch.testing.assert_close(boxes.boxes_xyxy(1), to_pixels(boxes.boxes, sizes)[1])
    with record(model) as trace, torch.no_grad():
        model(images)
    assert torch.equal(trace.frame.original, images.sizes)


def test_all_levels_together_keep_the_whole_weight(images):
    model = DETECTORS["smca"]()
    with record(model) as trace, torch.no_grad():
        model(batch((128, 192)))
    found = trace["decoder.0.cross"]
    finest = found.over_image(2).sum() / found.strides[0] ** 2
    assert finest == pytest.approx(1.0, abs=1e-4)
    one = found.over_image(2, level=1)
    assert one.max() == found.heat(2, level=1).max()


def test_strides_of_maps_that_do_not_end_with_the_image():
    frame = Frame((96, 70), torch.tensor([[96, 70]]), torch.tensor([[96, 70]]))
    assert frame.strides([(12, 9), (6, 5), (3, 3), (2, 2), (1, 1)]) == (8, 16, 32, 64, 128)


def test_a_point_outside_the_image_is_refused():
    model = planted(256)
    with record(model) as trace:
        regolite.detect(model, Image.new("RGB", (200, 100)))
    with pytest.raises(UserError, match="outside the image of 200 x 100"):
        trace["decoder.0.cross"].cell_at(200.0, 50.0)
    with pytest.raises(UserError, match="attention among queries"):
        trace["decoder.0.self"].heat(0)


# What stays, and what is refused.


def test_nothing_stays_after_an_exception(images):
    model = with_rego("two_stage")
    model(images)
    before = state_of(model)
    boom = model.stages[1].decoder.layers[0].cross_attention
    hook = boom.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), record(model) as trace:
        model(images)
    hook.remove()
    assert state_of(model) == before and trace.names() == []
    assert not torch.overrides._get_current_function_mode_stack()
    with record(model) as trace, torch.no_grad():
        model(images)
    assert "stage.2.relations.1" in trace


def test_a_pass_that_failed_may_be_run_again(images):
    model = with_rego("detr")
    with record(model) as trace, torch.no_grad():
        with pytest.raises(UserError):
            model(images, 9)
        model(images)
    with record(model) as wanted, torch.no_grad():
        model(images)
    assert torch.equal(trace["encoder.1"].weights, wanted["encoder.1"].weights)


def test_what_somebody_else_has_put_there_stays(images):
    model = DETECTORS["deformable"]()
    attention = model.encoder.layers[0].attention
    original = attention.sampling
    theirs = attention.sampling = lambda *args: original(*args)
    with record(model), torch.no_grad():
        model(images)
    assert attention.sampling is theirs


def test_one_record_at_a_time_and_one_pass_a_record(images):
    model = with_rego("detr")
    with record(model) as trace, torch.no_grad():
        for other in (model, model.detector):
            with pytest.raises(UserError, match="already being recorded"), record(other):
                pass
        model(images)
        with pytest.raises(UserError, match="second time"):
            model(images)
    assert len(trace.by_stage) == 3
    with record(model.detector) as base, torch.no_grad():
        model.detector(images)
    assert torch.equal(base["encoder.0"].weights, trace["encoder.0"].weights)
    other = copy.deepcopy(model)
    with record(model) as first, record(other) as second, torch.no_grad():  # two models, side by side
        model(images)
        other(images)
    assert torch.equal(first["encoder.0"].weights, second["encoder.0"].weights)


def test_only_what_is_asked_for_is_kept(images):
    model = with_rego("smca")
    with record(model, names=["stage.*.relations.*", "decoder.1.cross"]) as trace, torch.no_grad():
        model(images)
    assert trace.names() == ["decoder.1.cross", *(f"stage.{i}.relations.{j}" for i in (1, 2) for j in (0, 1))]
    with record(model, names="*.boxes*") as trace, torch.no_grad():
        model(images)
    assert trace.names() == [
        "decoder.0.boxes",
        "decoder.1.boxes",
        *(f"stage.{i}.boxes.{j}" for i in (1, 2) for j in (0, 1)),
    ]
    assert trace.names("decoder.*") == ["decoder.0.boxes", "decoder.1.boxes"]


def test_an_unknown_name_says_which_is_near(images):
    model = with_rego("detr")
    with record(model) as trace, torch.no_grad():
        with pytest.raises(UserError, match="nothing is recorded yet"):
            trace["decoder.0.cross"]
        model(images)
    with pytest.raises(UserError, match=r"no 'decoder.0.cros'; did you mean 'decoder.0.cross'\?"):
        trace["decoder.0.cros"]
    with (
        pytest.raises(UserError, match=r"names='stage.1.glimpse'.*did you mean 'stage.1.glimpses'\?"),
        record(model, names="stage.1.glimpse"),
    ):
        pass


def test_what_has_no_attention_is_refused():
    with pytest.raises(UserError, match="has no attention"), record(nn.Conv2d(3, 3, 1)):
        pass
    compiled = torch.compile(DETECTORS["detr"]())
    with pytest.raises(UserError, match="compiled"), record(compiled):
        pass


@pytest.mark.parametrize("name", ["rego_two_stage", "rego_smca", "anchor_detr"])
def test_saved_and_loaded_it_is_the_same(name, images, tmp_path):
    model = MODELS[name]()
    with record(model) as trace, torch.no_grad():
        detections_by_stage(model, images, torch.tensor([[640, 960], [400, 300]]))
    trace.classes = ("cat", "dog")
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.names() == trace.names() and again.classes == ("cat", "dog") and repr(again) == repr(trace)
    for (name, part), value in tensors_of(trace).items():
        other = getattr(again[name], part)
        assert type(again[name]) is type(trace[name])
        if isinstance(value, Tensor):
            assert torch.equal(other, value) and other.dtype == value.dtype
        elif part == "frame":
            assert other.padded == value.padded and torch.equal(other.original, value.original)
        else:
            assert other == value
    assert torch.equal(again.by_stage[-1].boxes_xyxy(1), trace.by_stage[-1].boxes_xyxy(1))


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match="no trace at"):
        Trace.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", trace=np.array([{"a": 1}], dtype=object))
    for name in ("text.npz", "other.npz", "pickled.npz"):
        with pytest.raises(UserError, match="holds no trace"):
            Trace.load(tmp_path / name)
    with pytest.raises(UserError, match="nothing is recorded yet"):
        Trace().save(tmp_path / "empty.npz")


def test_who_does_not_look_inside_does_not_wait_for_matplotlib():
    code = "import sys, regolite; assert 'matplotlib' not in sys.modules; regolite.record; regolite.Trace"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        regolite.recrod  # noqa: B018


def test_the_kernel_is_still_the_fused_one(monkeypatch, images):
    """While nobody records, and while somebody does."""
    calls = []
    kernel = F.scaled_dot_product_attention

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func is kernel)
            return func(*args, **(kwargs or {}))

    model = DETECTORS["detr"]()
    with Count(), torch.no_grad():
        model(images)
    free = sum(calls)
    calls.clear()
    with Count(), record(model), torch.no_grad():
        model(images)
    assert sum(calls) == free == 6


def test_a_trace_is_iterated_by_names():
    model = small_models.detr()
    with record(model) as trace, torch.no_grad():
        model(batch((64, 64)))
    assert list(trace) == [name for name in trace] == trace.names() and len(list(trace)) == len(trace) > 0
    assert {name: trace[name] for name in trace}.keys() == dict.fromkeys(trace).keys()
