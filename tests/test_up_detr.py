"""UP-DETR's pre-training: a plain second implementation, query by query; who attends to whom; what is kept of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from small_models import SIZES, batch, shake
from torchvision.ops import box_iou, generalized_box_iou, roi_align

import regolite
from regolite.checkpoint import save_model
from regolite.errors import UserError
from regolite.loading import load, load_weights
from regolite.models.presets import build
from regolite.models.up_detr import PatchDetr, PatchDetrConfig, grouped, random_boxes

CLASSES, PATCHES, QUERIES = 3, 2, 6
SMALL = SIZES | {"queries": QUERIES, "patches": PATCHES, "patch_size": 64}


def pretraining(**changes):
    return shake(PatchDetr(PatchDetrConfig(**(SMALL | {"mask_ratio": 0.0} | changes)), CLASSES)).train()


# A second implementation


def linear(x, layer):
    return F.linear(x, layer.weight, layer.bias)


def attended(asked, keys, values, attention, heads):
    """Each query's mean of the values of its keys; ``keys`` and ``values`` are lists, one of each query."""
    rows = []
    for query, own_keys, own_values in zip(asked, keys, values):
        q, k, v = linear(query, attention.query), linear(own_keys, attention.key), linear(own_values, attention.value)
        parts = []
        for part in range(heads):
            own = slice(part * len(q) // heads, (part + 1) * len(q) // heads)
            weights = (k[:, own] @ q[own] / math.sqrt(len(q) // heads)).softmax(0)
            parts.append(weights @ v[:, own])
        rows.append(linear(torch.cat(parts), attention.out))
    return torch.stack(rows)


def plain(model, images, number, boxes):
    """The terms of the loss of one image without padding, divided by no number of patches yet."""
    detr, pixels = model.detector, images.pixels[number : number + 1]
    height, width = images.sizes[number].tolist()
    vectors = []
    for box in boxes:
        patch = roi_align(pixels, [box[None]], 64, aligned=True)
        one = type(images)(patch, torch.zeros(1, 64, 64, dtype=torch.bool), torch.tensor([[64, 64]]))
        vectors.append(detr.backbone(one)[-1].tensor[0].flatten(1).mean(1))
    alone = type(images)(pixels, images.mask[number : number + 1], images.sizes[number : number + 1])
    memory = detr.encode(detr.backbone(alone))
    tokens, where = memory.tokens[0], memory.tokens[0] + memory.positions[0]
    each = QUERIES // PATCHES
    positions = torch.stack(
        [detr.query_positions.weight[q] + linear(vectors[q // each], model.patch_query) for q in range(QUERIES)]
    )
    wanted = torch.stack([torch.stack([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]]) for b in boxes])
    wanted = wanted / torch.tensor([width, height, width, height])
    state, terms = torch.zeros_like(positions), {}
    for layer_number, layer in enumerate(detr.decoder.layers, start=1):
        y = layer.self_norm(state)
        mates = [slice(q // each * each, q // each * each + each) for q in range(QUERIES)]
        asked = y + positions
        state = state + attended(asked, [asked[m] for m in mates], [y[m] for m in mates], layer.self_attention, 4)
        asked = layer.cross_norm(state) + positions
        state = state + attended(asked, [where] * QUERIES, [tokens] * QUERIES, layer.cross_attention, 4)
        state = state + layer.ffn(layer.ffn_norm(state))
        hidden = detr.decoder.norm(state)
        scores, found = linear(hidden, model.patch_head).log_softmax(-1), detr.box_head(hidden).sigmoid()
        corners = [torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in (found, wanted)]
        giou, l1 = generalized_box_iou(*corners), (found[:, None] - wanted[None]).abs().sum(-1)
        cost = -scores.exp()[:, :1] + 5 * l1 - 2 * giou
        pairs = list(zip(*linear_sum_assignment(cost.detach().numpy())))
        rebuilt = linear(linear(hidden, model.feature_head[0]).relu(), model.feature_head[2])
        matched = {q for q, _ in pairs}
        name = "" if layer_number == len(detr.decoder.layers) else f"_{layer_number}"
        label = sum(-scores[q, 0] if q in matched else -0.1 * scores[q, 1] for q in range(QUERIES))
        feature = 0.0
        for q, t in pairs:
            one, other = rebuilt[q] / rebuilt[q].norm(), vectors[t].detach() / vectors[t].norm()
            feature = feature + (one - other).square().sum()
        terms |= {
            f"label{name}": label,
            f"l1{name}": 5 * sum(l1[q, t] for q, t in pairs),
            f"giou{name}": 2 * sum(1 - giou[q, t] for q, t in pairs),
            f"feature{name}": feature,
        }
    return terms


def test_a_plain_second_implementation_has_the_same_loss():
    model, images = pretraining(), batch((64, 96), (64, 96))
    boxes = random_boxes(images, PATCHES)
    terms = model.loss(images, boxes)
    parts = [plain(model, images, number, boxes[number]) for number in range(2)]
    assert set(terms) == set(parts[0]) and len(terms) == 8
    weights = PATCHES + 0.1 * (QUERIES - PATCHES)  # of the queries of an image
    for name, term in terms.items():
        total = parts[0][name] + parts[1][name]
        expected = total / (2 * weights if name.startswith("label") else 2 * PATCHES)
        torch.testing.assert_close(term, expected, rtol=1e-3, atol=1e-4)


# Patches


def test_boxes_lie_in_their_images():
    images = batch((64, 96), (20, 10))
    boxes = random_boxes(images, 500)
    for each, (height, width) in zip(boxes, images.sizes.tolist()):
        sides = each[:, 2:] - each[:, :2]
        assert each.min() >= 0 and each[:, 2].max() <= width and each[:, 3].max() <= height
        assert sides[:, 0].min() >= min(8, width / 4) and sides[:, 1].min() >= min(8, height / 4)
        assert sides[:, 0].max() > 0.7 * width and sides[:, 0].min() < 0.3 * width
    assert box_iou(boxes[0][:50], boxes[0][50:100]).max() < 1


@torch.no_grad()
def test_the_vector_of_a_patch_is_that_of_its_pixels():
    model, images = pretraining(), batch((64, 96))
    whole = torch.tensor([[[0.0, 0.0, 64.0, 64.0], [32.0, 0.0, 96.0, 64.0]]])
    vectors = model.vectors(images, whole)
    for corner, vector in zip((0, 32), vectors[0]):
        pixels = images.pixels[:, :, :, corner : corner + 64]
        one = type(images)(pixels, images.mask[:, :, corner : corner + 64], torch.tensor([[64, 64]]))
        wanted = model.detector.backbone(one)[-1].tensor.mean((2, 3))[0]
        assert F.cosine_similarity(vector, wanted, 0) > 0.95  # but for resampling by half a pixel


# Queries


def test_groups():
    mask = grouped(6, 3, torch.device("cpu"))
    assert (~mask).int().tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 1, 1]] * 3


def test_queries_see_their_own_patch_alone():
    model, images = pretraining(), batch((64, 96))
    vectors = torch.randn(1, PATCHES, model.patch_query.in_features, requires_grad=True)
    hidden, _ = model.decode(images, vectors)
    hidden[-1][0, 0].sum().backward()
    assert vectors.grad[0, 0].any() and not vectors.grad[0, 1].any()


@torch.no_grad()
def test_patches_in_another_order_ask_other_groups():
    model, images = pretraining(), batch((64, 96))
    model.detector.query_positions.weight.zero_()
    vectors = torch.randn(1, PATCHES, model.patch_query.in_features)
    one, other = (model.decode(images, given)[0][-1] for given in (vectors, vectors.flip(1)))
    torch.testing.assert_close(one.roll(3, 1), other, rtol=1e-4, atol=1e-5)
    hidden_patches = pretraining(mask_ratio=1.0)
    one, other = (hidden_patches.decode(images, given)[0][-1] for given in (vectors, vectors.flip(1)))
    assert torch.equal(one, other)


def test_gradients_reach_all_but_the_backbone_and_the_class_head():
    model = pretraining(frozen_stages=5)
    terms = model(batch((64, 96)), targets=[])
    sum(terms.values()).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[1] for name in untouched} == {"backbone", "class_head"}


# What is kept


@pytest.mark.parametrize("preset", ["up_detr_scenes", "rego_up_detr_scenes"])
def test_the_detector_inside_starts_a_training(preset, tmp_path):
    sizes = {"dim": 32, "heads": 4, "detector": {"ffn_dim": 48}, "queries": 10}
    pretrained = build("up_detr_pretraining_scenes", 1, **sizes)
    shake(pretrained)
    save_model(pretrained, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in pretrained.state_dict().items())
    model = build(preset, 5, **sizes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_weights(model, tmp_path / "model.safetensors", new_classes=True, new_stages=True)
    inside = pretrained.detector.state_dict()
    base = model.detector if preset.startswith("rego") else model
    for key, value in base.state_dict().items():
        assert torch.equal(value, inside[key]) == ("class_head" not in key)
    prefix = "detector." if preset.startswith("rego") else ""
    assert {f"{prefix}class_head.weight", f"{prefix}class_head.bias"} <= set(kept)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in kept)
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(model, tmp_path / "model.safetensors")


def test_patches_that_do_not_divide_the_queries():
    with pytest.raises(UserError, match="7 patches do not divide 30 queries"):
        build("up_detr_pretraining_scenes", 3, patches=7)


def test_the_command_pretrains_and_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    sizes = ["dim=32", "heads=4", "detector.ffn_dim=32", "encoder_layers=1", "decoder_layers=1", "queries=10"]
    pretext = ["patch_size=32", *sizes]
    run = {"data": "scenes:4:val=1:size=64", "image_size": 64, "batch_size": 4, "epochs": 1, "device": "cpu"}
    first = regolite.train(
        regolite.RunConfig(
            model="up_detr_pretraining_scenes", output=str(tmp_path / "a"), overrides=tuple(pretext), **run
        )
    )
    weights = str(first / "model.safetensors")
    config = regolite.RunConfig(
        model="up_detr_scenes", output=str(tmp_path / "b"), overrides=tuple(sizes), checkpoint=weights, **run
    )
    assert load(regolite.train(config) / "model.safetensors").model_config.preset == "up_detr_scenes"
