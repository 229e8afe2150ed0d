"""Anchor DETR: RCDA against plain loops, the whole against numbers of the authors' code, padding, queries, REGO."""

import math
import re
import zlib

import pytest
import torch
from small_models import CLASSES, anchor_detr, batch, random_images, shake, small_resnet, unchecked, with_stub
from torch import nn

from regolite import interop
from regolite.data import Scenes, batch_images, collate
from regolite.errors import UserError
from regolite.losses import LossConfig, SetLoss
from regolite.models.anchor_detr import AnchorDetr, AnchorDetrConfig, Grid, RowColumnAttention
from regolite.models.presets import build, configure
from regolite.models.rego import Rego

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
POINTS, PATTERNS = 4, 3


def anchor(**changes):
    return anchor_detr(**({"queries": POINTS * PATTERNS, "patterns": PATTERNS} | changes))


# Row-column decoupled attention

DIM, HEADS = 8, 2


def some_grid(height, width, inside):
    """Two images, of which the second is as large as ``inside`` says, with something on the padding too."""
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, inside[0] :], mask[1, :, inside[1] :] = True, True
    return Grid(torch.randn(2, height, width, DIM), torch.randn(2, width, DIM), torch.randn(2, height, DIM), mask)


def by_loops(attention, query_x, query_y, grid):
    """RCDA one number at a time: scores of columns and rows, softmax, and the weighted sum over all cells."""
    c, images = DIM // HEADS, []
    for b, cells in enumerate(grid.cells):
        inside = (~grid.mask[b, :, 0]).sum(), (~grid.mask[b, 0]).sum()
        height, width = inside if attention.mask_padding else cells.shape[:2]
        columns = [sum(cells[i, j] for i in range(height)) / height for j in range(inside[1])]
        rows = [sum(cells[i, j] for j in range(width)) / width for i in range(inside[0])]
        keys_x = [attention.key_x(column + grid.x[b, j]) for j, column in enumerate(columns)]
        keys_y = [attention.key_y(row + grid.y[b, i]) for i, row in enumerate(rows)]
        outputs = []
        for ask_x, ask_y in zip(attention.query_x(query_x[b]), attention.query_y(query_y[b])):
            heads = []
            for part in (slice(m * c, m * c + c) for m in range(HEADS)):
                of_columns = [math.exp(ask_x[part] @ key[part] / c**0.5) for key in keys_x]
                of_rows = [math.exp(ask_y[part] @ key[part] / c**0.5) for key in keys_y]
                mixed = torch.zeros(c)
                for i, row in enumerate(of_rows):
                    for j, column in enumerate(of_columns):
                        weight = column / sum(of_columns) * row / sum(of_rows)
                        mixed = mixed + weight * attention.value(cells[i, j])[part]
                heads.append(mixed)
            outputs.append(attention.out(torch.cat(heads)))
        images.append(torch.stack(outputs))
    return torch.stack(images)


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("height, width, inside", [(3, 5, (2, 4)), (5, 3, (4, 3)), (2, 2, (2, 1))])
@torch.no_grad()
def test_rcda_is_the_sum_over_all_cells(height, width, inside, mask_padding):
    attention = shake(RowColumnAttention(DIM, HEADS, mask_padding=mask_padding))
    grid, query_x, query_y = some_grid(height, width, inside), torch.randn(2, 4, DIM), torch.randn(2, 4, DIM)
    found = attention(query_x, query_y, grid)
    torch.testing.assert_close(found, by_loops(attention, query_x, query_y, grid), **CLOSE)
    for weights in attention.weights(query_x, query_y, grid):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 4))


@torch.no_grad()
def test_rcda_drops_weights_while_training_alone():
    attention, grid, query = (
        RowColumnAttention(DIM, HEADS, dropout=0.5),
        some_grid(3, 4, (3, 4)),
        torch.randn(2, 5, DIM),
    )
    assert not torch.equal(attention(query, query, grid), attention(query, query, grid))
    attention.eval()
    assert torch.equal(attention(query, query, grid), attention(query, query, grid))


# The authors' code


def numbers(name, *shape):
    """Numbers between -1 and 1 that are the same on every machine, without a generator of random numbers."""
    at = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 10007
    waves = (at * 12.9898).sin() * 43758.5453
    return (2 * (waves - waves.floor()) - 1).float().reshape(shape)


def their_weights(model):
    """Weights for the authors' code of this model, made from their names there."""
    weights = {}
    for name, tensor in interop.state_dict(model).items():
        n = numbers(re.sub(r"_embed\.\d+", "_embed", name), *tensor.shape)  # layers share their heads
        if "running_var" in name:
            n = 1 + n / 2
        elif name.endswith("position.weight"):
            n = (n + 1) / 2
        elif "pattern" in name:
            n = 1.7 * n
        elif n.ndim > 1:
            n = n * 2 / n[0].numel() ** 0.5
        else:
            n = n / 5 + name.endswith(("norm1.weight", "norm2.weight", "bn1.weight", "bn2.weight", "bn3.weight"))
        weights[name] = n
    return weights


def golden_model():
    model = build("anchor_detr_dc5_r50", 91, weights=None, encoder_layers=1, decoder_layers=2, queries=12)
    return interop.load({"model": their_weights(model), "args": {"dilation": True}})


def golden_images():
    return [2 * numbers("first", 3, 64, 150), 2 * numbers("second", 3, 101, 96)]


# Center, size and three logits, of queries 0, 5 and 10 of both images, after both decoder layers.
GOLDEN = [
    [
        [
            [0.94363, 0.02062, 0.42171, 0.40921, 0.47732, 0.7406, 0.62119],
            [0.23476, 0.61171, 0.52999, 0.44146, 0.8173, 0.04297, 0.5974],
            [0.32392, 0.54513, 0.4327, 0.46657, -0.04314, 0.63779, 0.48647],
        ],
        [
            [0.94498, 0.02081, 0.42367, 0.40384, 0.45101, 0.72347, 0.59125],
            [0.23967, 0.61632, 0.5394, 0.43594, 0.76631, 0.01513, 0.54608],
            [0.32595, 0.55161, 0.43116, 0.45931, -0.0856, 0.61795, 0.47993],
        ],
    ],
    [
        [
            [0.9813, 0.02692, 0.18821, 0.72909, -0.60468, 0.37062, 0.37925],
            [0.53962, 0.62272, 0.23987, 0.76171, -0.0988, 0.22068, 0.13163],
            [0.56714, 0.54466, 0.21474, 0.73503, -0.15587, 0.2668, 0.34008],
        ],
        [
            [0.98185, 0.02798, 0.18769, 0.72065, -0.60389, 0.32852, 0.38752],
            [0.54741, 0.63538, 0.2395, 0.754, -0.09569, 0.18272, 0.13346],
            [0.57411, 0.55558, 0.2141, 0.72779, -0.15862, 0.23429, 0.3619],
        ],
    ],
]


def test_the_whole_gives_the_numbers_of_the_authors_code(monkeypatch):
    """GOLDEN was computed by megvii-research/AnchorDETR, from these weights and images, with ResNet's short form."""
    small_resnet(monkeypatch)
    with torch.no_grad():
        layers = golden_model()(batch_images(golden_images())).layers
    for number, layer in enumerate(layers):
        found = torch.cat([layer.boxes[:, ::5], layer.logits[:, ::5, :3]], -1)
        torch.testing.assert_close(found, torch.tensor(GOLDEN[number]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, parameters", [("r50", 37_038_711), ("dc5_r50", 37_038_711), ("r101", 55_978_615)])
def test_published_sizes(name, parameters):
    """Counted in the authors' code."""
    with torch.device("meta"):
        model = build(f"anchor_detr_{name}", 91, weights=None)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("anchors", ["learned", "grid"])
def test_weights_go_to_the_authors_code_and_come_back(tmp_path, anchors):
    model = build(
        "anchor_detr_scenes", 3, dim=256, heads=4, queries=18, patterns=2, anchors=anchors, mask_padding=False
    )
    shake(model).eval()
    interop.save(model, tmp_path / "model.pth")
    back = interop.load(tmp_path / "model.pth", form="anchor_detr")
    assert back.model_config.detector == model.model_config.detector
    assert torch.equal(back.points, model.points)
    images = batch((64, 96), (96, 64))
    with torch.no_grad():
        for one, other in zip(model(images).layers, back(images).layers):
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.logits, other.logits)


def test_their_state_dict_has_their_names():
    model = build("anchor_detr_scenes", 3, dim=256, queries=9, decoder_layers=2)
    weights = interop.state_dict(model)
    assert weights["transformer.encoder_layers.1.self_attn.in_proj_weight"].shape == (5 * 256, 256)
    assert weights["transformer.position.weight"].shape == (3, 2)
    assert torch.equal(weights["transformer.class_embed.0.weight"], weights["transformer.class_embed.1.weight"])


def test_other_models_of_the_authors_code_are_refused():
    weights = interop.state_dict(build("anchor_detr_scenes", 3, dim=256))
    name = "transformer.encoder_layers.0.self_attn.in_proj_weight"
    with pytest.raises(UserError, match=rf"misshaped \({name} is \(768, 256\) and should be \(1280, 256\)"):
        interop.load(weights | {name: weights[name][:768]})  # dense attention
    with pytest.raises(UserError, match=r"1 unknown \(transformer.level_embed.weight"):
        interop.load(weights | {"transformer.level_embed.weight": torch.zeros(3, 256)})
    for refused in (build("anchor_detr_scenes", 3), build("rego_anchor_detr_scenes", 3, dim=256)):
        with pytest.raises(UserError, match="can't run in published code"):
            interop.state_dict(refused)


# The whole detector


def test_shapes_and_names():
    model = anchor()
    assert (model.num_logits, model.dim, model.heads, model.scoring, model.projected) == (
        CLASSES,
        32,
        4,
        "sigmoid",
        False,
    )
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert output.stages == [] and output.proposals is None
    assert output.queries.shape == (2, 12, 32)
    assert [tuple(layer.logits.shape) for layer in output.layers] == [(2, 12, CLASSES)] * 2
    assert [tuple(layer.boxes.shape) for layer in output.layers] == [(2, 12, 4)] * 2
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert [f.tensor.shape[1] for f in output.features] == model.feature_channels == model.backbone.channels


def most_that_a_batch_moves(model, sizes):
    images = random_images(*sizes)
    with torch.no_grad():
        together = model(batch_images(images, 32))
        moved = 0.0
        for i, image in enumerate(images):
            alone = model(batch_images([image], 32))
            for one, many in zip(alone.layers, together.layers):
                moved = max(
                    moved, (one.logits[0] - many.logits[i]).abs().max(), (one.boxes[0] - many.boxes[i]).abs().max()
                )
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-3  # the pixels do matter
    return moved


@pytest.mark.parametrize("sizes", [[(64, 96), (128, 160)], [(50, 70), (96, 33), (128, 128)]])
def test_padding_does_not_move_a_images_boxes(sizes):
    assert most_that_a_batch_moves(with_stub(anchor()), sizes) < 1e-4


def test_padding_does_not_move_boxes_behind_a_real_backbone_but_does_in_the_published_form(monkeypatch):
    small_resnet(monkeypatch)
    changes = {"backbone": "resnet50", "dilated": True}
    assert most_that_a_batch_moves(anchor(**changes), [(64, 96), (128, 160)]) < 1e-4
    assert most_that_a_batch_moves(anchor(**changes, mask_padding=False), [(64, 96), (128, 160)]) > 1e-3


def test_queries_are_every_point_with_every_pattern():
    """Points in another order: the same objects with each pattern. Patterns in another order: blocks change places."""
    model, images = anchor(), batch((64, 64))
    points, patterns = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    with torch.no_grad():
        before = model(images).final
        model.points.copy_(model.points[points])
        model.patterns.weight.copy_(model.patterns.weight[patterns])
        after = model(images).final
    order = (patterns[:, None] * POINTS + points).flatten()
    torch.testing.assert_close(after.boxes, before.boxes[:, order], **CLOSE)
    torch.testing.assert_close(after.logits, before.logits[:, order], **CLOSE)
    assert not torch.allclose(after.boxes, before.boxes, atol=1e-3)


@pytest.mark.parametrize("anchors", ["learned", "grid"])
def test_boxes_start_at_the_anchor_points(anchors):
    model = anchor(anchors=anchors)
    nn.init.zeros_(model.box_head[-1].weight)
    nn.init.zeros_(model.box_head[-1].bias)
    with torch.no_grad():
        boxes = model(batch((64, 64))).final.boxes
    if anchors == "grid":
        corners = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
        assert model.points.tolist() == corners and "points" not in model.state_dict()
    centers = model.points.detach().clamp(1e-5, 1 - 1e-5).repeat(PATTERNS, 1)
    torch.testing.assert_close(boxes[0], torch.cat([centers, torch.full((12, 2), 0.5)], 1))


def test_dc5_detects_at_stride_16_and_glimpses_at_32(monkeypatch):
    small_resnet(monkeypatch)
    model, seen = anchor(backbone="resnet50", dilated=True), {}
    model.input_projection.register_forward_hook(lambda module, inputs, output: seen.update(map=inputs[0]))
    with torch.no_grad():
        output = model(batch((64, 96), (96, 64)))
    assert seen["map"].shape[-2:] == (6, 6)
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert torch.equal(output.features[-1].tensor, seen["map"][:, :, ::2, ::2])


# Training, and REGO


def untouched(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def total(predictions):
    return sum(p.logits.sum() + p.boxes.square().sum() for p in predictions)


def test_everything_is_trained():
    model = anchor().train()
    nn.init.uniform_(model.points)
    total(model(batch((64, 64))).layers).backward()
    assert untouched(model) == []


def test_rego_trains_points_and_patterns_but_not_the_heads_of_the_detector():
    model = shake(Rego(anchor(), stages=2, ffn_dim=48, dropout=0.0)).train()
    total(p for stage in model(batch((64, 64))).stages for p in stage).backward()
    assert {name.split(".")[0] for name in untouched(model.detector)} == {"class_head", "box_head"}
    assert untouched(model.stages) == []


def test_rego_refines_all_queries():
    model = build(
        "rego_anchor_detr_scenes", CLASSES, dim=32, detector={"ffn_dim": 32}, queries=12, rego={"ffn_dim": 32}
    )
    shake(model).eval()
    images = batch((64, 96), (96, 64))
    with torch.no_grad():
        output, base = model(images), model(images, stages=0)
    assert [tuple(p.boxes.shape) for p in output.by_stage] == [(2, 12, 4)] * 4
    assert torch.equal(output.layers[-1].boxes, base.final.boxes)
    assert (output.final.boxes - base.final.boxes).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["anchor_detr_scenes", "rego_anchor_detr_scenes"])
def test_training_lowers_the_loss(name):
    data = Scenes(2, size=64, max_objects=4)
    images, targets = collate([data[0], data[1]], 32)
    model = build(name, len(data.classes), dim=64, heads=4, queries=12, detector={"ffn_dim": 64})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss, losses = SetLoss(LossConfig(), model.scoring), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss(model(images), targets)[0])
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


# Mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"queries": 10}, "3 patterns do not divide 10 queries"),
        ({"patterns": 0}, "0 patterns do not divide 30 queries"),
        (
            {"queries": 36, "anchors": "grid"},
            "12 anchor points fill no square grid; choose queries=27 for 3 x 3 points",
        ),
        ({"heads": 7}, "7 heads do not divide 128 channels"),
        ({"anchors": "random"}, "anchors='random' is not one of 'learned', 'grid'"),
        ({"patern": 1}, "no field 'patern'; did you mean 'patterns'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(changes, message):
    with unchecked(), pytest.raises(UserError, match=message) as caught:
        build("anchor_detr_scenes", CLASSES, **changes)
    assert "\n" not in str(caught.value)


def test_presets_are_the_published_models():
    for tag, dilated in (("r50", False), ("dc5_r50", True)):
        d = configure(f"rego_anchor_detr_{tag}").detector
        assert (d.queries, d.patterns, d.anchors, d.dilated, d.ffn_dim) == (900, 3, "learned", dilated, 1024)


def test_initial_weights_are_the_authors():
    """One matrix [5C, C] for the projections of decoupled attention; PyTorch's own for outputs and feed-forward."""
    layer = AnchorDetr(AnchorDetrConfig(weights=None, backbone="tiny", decoder_layers=1), CLASSES).decoder_layers[0]
    cross = layer.cross_attention
    for weight in (cross.query_x, cross.query_y, cross.key_x, cross.key_y, cross.value):
        assert 0.999 / 16 < weight.weight.abs().max() <= 1 / 16  # sqrt(6 / 6C)
    for linear in (cross.out, layer.self_attention.out, layer.ffn[0]):
        assert 0.999 / 16 < linear.weight.abs().max() <= 1 / 16  # nn.Linear's 1 / sqrt(C)
    assert not layer.self_attention.out.bias.any() and not cross.out.bias.any()
