"""Conditional DETR: parity with transformers, which we did not write; the equation of its attention; padding."""

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batch, conditional_detr, random_images, shake, small_resnet, unfold_norms, with_stub
from torch import nn

from regolite import interop
from regolite.checkpoint import save_model
from regolite.data import batch_images
from regolite.errors import UserError
from regolite.interop.keys import to_theirs
from regolite.loading import load
from regolite.losses import SetLoss
from regolite.matching import MatchingCosts, PaddedTargets, match
from regolite.models.conditional_detr import ConditionalCrossAttention
from regolite.models.presets import build
from regolite.models.rego import Rego, RegoConfig
from regolite.types import Memory, Target

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PARAMETERS = {  # with COCO's 91 columns; r50 and r101, with and without DC5, counted in the authors' code too
    "conditional_detr_r50": 43_418_401,
    "conditional_detr_dc5_r50": 43_418_401,
    "conditional_detr_r101": 62_358_305,
    "rego_conditional_detr_r50": 58_531_646,
    "conditional_detr_tiny": 3_334_305,
    "conditional_detr_scenes": 2_098_417,
}
SMALL = {
    "weights": None, "dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 48, "queries": 7,
    "dropout": 0.0,
}  # fmt: skip


def some_targets(counts=(3, 2)):
    targets = []
    for i, count in enumerate(counts):
        boxes = torch.cat([torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.3 + 0.05], 1)
        targets.append(Target(torch.randint(CLASSES, (count,)), boxes, i, (96, 96)))
    return targets


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    with torch.device("meta"):
        model = build(name, 91, weights=None)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


# The module


def test_cross_attention_is_the_sum_of_a_content_and_a_spatial_product():
    """Softmax of (c_q . c_k + p_q . p_k) / sqrt(2 C'), head by head."""
    dim, heads = 16, 4
    attention = shake(ConditionalCrossAttention(dim, heads, 0.0, first=False))
    x, positions, spatial = torch.randn(3, 2, 5, dim)
    tokens, cells = torch.randn(2, 2, 6, dim)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    heads_out = []
    for head in range(heads):
        own = slice(4 * head, 4 * head + 4)
        content = attention.query(x)[..., own] @ attention.key(tokens)[..., own].mT
        place = attention.query_spatial(spatial)[..., own] @ attention.key_position(cells)[..., own].mT
        scores = ((content + place) / 8**0.5).masked_fill(mask[:, None], float("-inf"))
        heads_out.append(scores.softmax(-1) @ attention.value(tokens)[..., own])
    expected = attention.out(torch.cat(heads_out, -1))
    found = attention(x, positions, spatial, Memory(tokens, cells, mask, [(2, 3)]))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(found, attention(x, -positions, spatial, Memory(tokens, cells, mask, [(2, 3)])))


def test_heads_divide_channels():
    with pytest.raises(UserError, match="5 heads do not divide 32 channels"):
        build("conditional_detr_scenes", CLASSES, **(SMALL | {"heads": 5}))


def test_shapes_and_names():
    model = conditional_detr()
    assert (model.num_logits, model.dim, model.heads, model.scoring) == (CLASSES, 32, 4, "sigmoid")
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert output.stages == [] and output.proposals is None and len(output.layers) == 2
    assert output.queries.shape == (2, 7, 32)
    torch.testing.assert_close(model.class_head(output.queries), output.final.logits)
    for layer in output.layers:
        assert layer.logits.shape == (2, 7, CLASSES)
        assert layer.boxes.shape == (2, 7, 4)
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert [f.tensor.shape[1] for f in output.features] == model.feature_channels


def test_boxes_start_at_the_reference_points():
    model = build("conditional_detr_scenes", CLASSES, **SMALL).eval()
    with torch.no_grad():
        boxes = model(batch((64, 64))).final.boxes
        points = model.reference_head(model.query_positions.weight).sigmoid()
    torch.testing.assert_close(boxes, torch.cat([points, torch.full((7, 2), 0.5)], 1)[None])


def test_dc5_detects_at_stride_16_and_glimpses_at_32(monkeypatch):
    small_resnet(monkeypatch)
    model = conditional_detr(backbone="resnet50", dilated=True)
    seen = {}
    model.input_projection.register_forward_hook(lambda module, inputs, output: seen.update(map=inputs[0]))
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert seen["map"].shape[-2:] == (6, 6)
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert torch.equal(output.features[-1].tensor, seen["map"][:, :, ::2, ::2])
    assert output.features[-1].mask.tolist() == [[[False] * 3] * 2 + [[True] * 3], [[False, False, True]] * 3]


@pytest.mark.parametrize("sizes", [[(64, 96), (128, 160)], [(50, 70), (96, 33), (128, 128)]])
def test_padding_does_not_move_a_images_boxes(sizes):
    model, images = with_stub(conditional_detr()), random_images(*sizes)
    with torch.no_grad():
        together = model(batch_images(images, 32))
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.layers, together.layers):
                torch.testing.assert_close(one.logits[0], many.logits[i], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(one.boxes[0], many.boxes[i], rtol=1e-4, atol=1e-4)
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-2  # the pixels do matter


@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_with_a_real_backbone(monkeypatch, mask_padding):
    small_resnet(monkeypatch)
    model, images = conditional_detr(backbone="resnet50", mask_padding=mask_padding), random_images((64, 70), (96, 128))
    with torch.no_grad():
        alone, together = model(batch_images(images[:1], 32)), model(batch_images(images, 32))
    moved = (alone.final.boxes[0] - together.final.boxes[0]).abs().max()
    assert moved < 1e-4 if mask_padding else moved > 1e-3


def test_queries_in_another_order_give_the_same_objects():
    model, images, order = conditional_detr(), batch((64, 64)), torch.randperm(7)
    with torch.no_grad():
        before = model(images)
        model.query_positions.weight.copy_(model.query_positions.weight[order])
        after = model(images)
    torch.testing.assert_close(after.final.boxes, before.final.boxes[:, order], **CLOSE)
    torch.testing.assert_close(after.final.logits, before.final.logits[:, order], **CLOSE)
    assert not torch.allclose(after.final.boxes, before.final.boxes, atol=1e-3)


def test_everything_is_trained():
    """All but the projections of contents in the first self-attention, since the contents are zero there."""
    model = conditional_detr().train()
    output = model(batch((64, 64)))
    sum(layer.logits.sum() + layer.boxes.square().sum() for layer in output.layers).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {f"decoder_layers.0.self_attention.{name}.weight" for name in ("query", "key", "value")}


@pytest.mark.parametrize("stages", [0, 2])
def test_it_learns_two_images(stages):
    model = build("conditional_detr_scenes", CLASSES, **SMALL)
    if stages:
        model = Rego(model, RegoConfig(stages=stages, ffn_dim=48, dropout=0.0))
    images, targets = batch((64, 64), (64, 96)), some_targets()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(30):
        loss, _ = SetLoss(model.model_config.loss, model.scoring)(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / (2 + 2 * stages))  # a layer
    assert losses[-1] < 0.7 * losses[0] and losses[-1] == pytest.approx(min(losses), rel=0.1)


def test_saved_and_loaded(tmp_path):
    model = shake(
        build("rego_conditional_detr_scenes", 3, **{f"detector.{k}": v for k, v in SMALL.items()}, rego={"ffn_dim": 48})
    ).eval()
    save_model(model, tmp_path / "model.safetensors")
    again, images = load(tmp_path / "model.safetensors"), batch((64, 64))
    assert again.model_config == model.model_config
    with torch.no_grad():
        assert torch.equal(again(images).final.boxes, model(images).final.boxes)


# The authors' names


def test_the_authors_state_dict_is_recognized_and_goes_back(monkeypatch):
    small_resnet(monkeypatch)
    sizes = SMALL | {"dim": 256, "heads": 8, "dropout": 0.1, "mask_padding": False}
    model = build("conditional_detr_r50", 91, **sizes)
    state = interop.state_dict(shake(model).eval())
    for name in (  # read off the authors' code, one of each kind
        "backbone.0.body.layer1.0.bn1.running_var", "input_proj.bias", "query_embed.weight", "class_embed.bias",
        "bbox_embed.layers.2.weight", "transformer.encoder.layers.0.self_attn.in_proj_weight",
        "transformer.encoder.layers.0.norm2.weight", "transformer.decoder.layers.0.ca_qpos_proj.weight",
        "transformer.decoder.layers.1.sa_qcontent_proj.bias", "transformer.decoder.layers.1.cross_attn.out_proj.bias",
        "transformer.decoder.query_scale.layers.1.weight", "transformer.decoder.ref_point_head.layers.1.bias",
        "transformer.decoder.norm.weight",
    ):  # fmt: skip
        assert name in state
    assert "transformer.decoder.layers.1.ca_qpos_proj.weight" not in state
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in model.state_dict().values())

    again = interop.load(state, form="conditional_detr")
    assert again.model_config.detector == model.model_config.detector
    images = batch((64, 96), (96, 64))
    with torch.no_grad():
        assert torch.equal(again(images).final.logits, model(images).final.logits)
    del state["transformer.decoder.query_scale.layers.1.bias"]
    with pytest.raises(UserError, match="missing.*query_scale.layers.1.bias"):
        interop.load(state)


def test_the_authors_code_has_256_channels_alone():
    with pytest.raises(UserError, match="can't run in published code.*ConditionalDETR: a ResNet, 256 channels"):
        interop.state_dict(build("conditional_detr_r50", CLASSES, **SMALL))


# transformers


@pytest.fixture
def hugging(monkeypatch):
    """Makes a model of transformers with random weights, none of them zero, and ours with the same weights."""
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from regolite.interop import transformers as module

    def make(blocks, **settings):
        if blocks is not None:
            small_resnet(monkeypatch, blocks)
            monkeypatch.setitem(module.DEPTHS, "resnet50", blocks)
        depths = list(module.DEPTHS["resnet50"])
        backbone = transformers.ResNetConfig(depths=depths, out_features=["stage1", "stage2", "stage3", "stage4"])
        config = transformers.ConditionalDetrConfig(backbone_config=backbone, dropout=0.0, **settings)
        model = randomized(transformers.ConditionalDetrForObjectDetection(config))
        return model.eval(), module.from_transformers(model), module

    return make


@torch.no_grad()
def randomized(model):
    """Attention is made sharp, or the queries, which differ by where they look alone, would all say the same."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "backbone" in name and weight.dim() == 1:
            positive = "var" in name or name.endswith("weight")
            weight.copy_(torch.rand_like(weight) * 0.5 + (0.7 if positive else -0.2))
        elif weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.2)
        elif "backbone" not in name:
            sharp = 4.0 if any(part in name for part in (".q_", ".k_")) else 1.0
            weight.copy_(torch.randn_like(weight) * weight[0].numel() ** -0.5 * sharp)
    nn.init.normal_(model.model.query_position_embeddings.weight)
    return model


def run_theirs(model, images):
    """Logits and boxes of every decoder layer; their own option for that would change the outputs."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda m, i, output: states.append(output)) for layer in model.model.decoder.layers
    ]
    output = model(images.pixels, pixel_mask=(~images.mask).long())
    for hook in hooks:
        hook.remove()
    points = model.model.decoder.ref_point_head(model.model.query_position_embeddings.weight)
    predictions = []
    for state in states:
        hidden = model.model.decoder.layernorm(state)
        boxes = (model.bbox_predictor(hidden) + F.pad(points, (0, 2))).sigmoid()
        predictions.append({"logits": model.class_labels_classifier(hidden), "pred_boxes": boxes})
    torch.testing.assert_close(predictions[-1]["pred_boxes"], output.pred_boxes, rtol=0, atol=1e-5)
    assert torch.equal(predictions[-1]["logits"], output.logits)
    return predictions


def parity(model, detector, images):
    with torch.no_grad():
        output, theirs = detector(images), run_theirs(model, images)
    assert len(output.layers) == len(theirs)
    for mine, other in zip(output.layers, theirs):
        torch.testing.assert_close(mine.logits, other["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.boxes, other["pred_boxes"], rtol=0, atol=1e-4)
    assert output.final.logits.std(1).mean() > 1e-3  # the queries differ by far more than is allowed above


TINY = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 7, "num_labels": CLASSES,
}  # fmt: skip


def test_outputs_are_transformers_and_weights_go_round(hugging):
    model, detector, module = hugging((1, 1, 1, 1), **TINY)
    parity(model, detector, batch((96, 128), (128, 80), (75, 101)))
    back = module.to_transformers(detector, timm=False)
    mine, theirs = back.state_dict(), model.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert back.config.to_dict() == model.config.to_dict() | {"id2label": back.config.id2label}


def test_matching_loss_and_gradients_are_transformers(hugging, monkeypatch):
    """Of all layers, with the authors' weights; transformers itself weighs classification by 1 and not by 2."""
    unfold_norms(monkeypatch)
    model, detector, module = hugging((1, 1, 1, 1), **TINY)
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    for name, weight in model.named_parameters():  # transformers freezes its own ResNets whole
        weight.requires_grad_("embedder" not in name and "stages.0" not in name)
    images, targets = batch((96, 128), (128, 80)), some_targets()
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
    output, theirs = detector(images), run_theirs(model, images)

    matcher = DeformableDetrHungarianMatcher(2, 5, 2)
    pairs = {
        (layer, image, query, target)
        for layer, prediction in enumerate(theirs)
        for image, (queries, objects) in enumerate(matcher(prediction, labels))
        for query, target in zip(queries.tolist(), objects.tolist())
    }
    matches = match(output.layers, PaddedTargets.of(targets), "sigmoid", MatchingCosts())
    assert set(zip(*(part.tolist() for part in vars(matches).values()))) == pairs and len(pairs) == 3 * 5

    criterion = DeformableDetrImageLoss(matcher, CLASSES, 0.25, ["labels", "boxes"])
    total, terms = SetLoss(detector.model_config.loss, "sigmoid")(output, targets)
    expected = 0.0
    for name, prediction in zip(("base.1", "base.2", "base"), theirs):
        found = criterion(prediction, labels)
        for term, (other, weight) in {"label": ("ce", 2), "l1": ("bbox", 5), "giou": ("giou", 2)}.items():
            torch.testing.assert_close(terms[f"{name}/{term}"], weight * found[f"loss_{other}"], rtol=1e-4, atol=1e-5)
            expected = expected + weight * found[f"loss_{other}"]

    total.backward()
    expected.backward()
    table = module._backbone_pairs("resnet50", False) + module.conditional_pairs(detector.model_config.detector)
    mine = to_theirs({name: w.grad for name, w in detector.named_parameters() if w.grad is not None}, table)
    other = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    assert set(mine) == set(other)
    largest = max(gradient.norm() for gradient in other.values())
    for (
        name,
        gradient,
    ) in mine.items():  # a key's bias has no gradient but rounding: all weights of a softmax move alike
        assert (gradient - other[name]).norm() <= 1e-3 * other[name].norm() + 1e-6 * largest, name


def test_a_model_that_normalizes_between_its_layers_is_refused(hugging):
    with pytest.raises(UserError, match="auxiliary_loss=True and must have False"):
        hugging((1, 1, 1, 1), **TINY, auxiliary_loss=True)


@pytest.mark.slow
def test_full_size_is_transformers(hugging):
    model, detector, _ = hugging(None, num_labels=91)
    assert sum(w.numel() for w in detector.parameters()) == PARAMETERS["conditional_detr_r50"]
    parity(model, detector, batch((128, 160), (160, 96)))
