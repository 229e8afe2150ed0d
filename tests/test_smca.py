"""SMCA: the map G against loops, the whole against a slow second implementation and numbers of the authors' code."""

import math
import zlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batch, random_images, shake, small_resnet, smca, unchecked, with_stub
from torch import nn

from regolite import interop
from regolite.data import Scenes, batch_images, collate
from regolite.errors import UserError
from regolite.interop import smca as table
from regolite.interop.keys import from_theirs, to_theirs
from regolite.losses import LossConfig, SetLoss
from regolite.models.positions import sine_positions
from regolite.models.presets import build, configure
from regolite.models.rego import Rego
from regolite.models.smca import SmcaConfig, SmcaDecoderLayer, by_level, log_gaussian
from regolite.models.transformer import MLP, Decoder
from regolite.types import Memory

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def single_scale(**changes):
    return smca(backbone_stages=(5,), coarser=False, multi_scale_layers=(), **changes)


FORMS = pytest.mark.parametrize("make", [smca, single_scale])


# The map G


def test_g_is_a_gaussian_of_every_head():
    points, scales = torch.rand(2, 3, 4, 2) * 6 - 1, torch.rand(2, 3, 4, 2) * 3
    found = log_gaussian(points, scales, (4, 5)).exp().unflatten(-1, (4, 5))
    for b, q, m in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        (x, y), (scale_x, scale_y) = points[b, q, m].tolist(), scales[b, q, m].tolist()
        for row in range(4):
            for column in range(5):
                g = math.exp(-scale_x * (column - x) ** 2 - scale_y * (row - y) ** 2)
                assert found[b, m, q, row, column].item() == pytest.approx(g, rel=1e-4, abs=1e-7)


def test_g_peaks_at_its_point_and_is_symmetric_about_it():
    point, scale = torch.tensor([3.0, 2.0]).expand(1, 1, 1, 2), torch.tensor([0.1, 0.4]).expand(1, 1, 1, 2)
    g = log_gaussian(point, scale, (5, 7)).exp().view(5, 7)
    assert g[2, 3] == 1 == g.max() and (g == 1).sum() == 1
    assert torch.equal(g, g.flip(0)) and torch.equal(g, g.flip(1))
    assert g[2, 5] == g[3, 3]  # a fourth of the scale is twice the width
    between = log_gaussian(point + 0.5, scale, (5, 7)).view(5, 7)
    assert between.max() == between[2, 3] == between[3, 4] == between[2, 4]


def test_a_query_looks_where_its_points_are():
    """With equal keys the weights are G alone, so that sharp maps read off the cell at the point."""
    layer = shake(SmcaDecoderLayer(SmcaConfig(dim=16, heads=4, ffn_dim=16, dropout=0.0), [32]))
    tokens = torch.randn(1, 12, 16)
    memory = Memory(tokens, -tokens, torch.zeros(1, 12, dtype=torch.bool), [(3, 4)])
    seen = {}
    layer.cross_attention.out.register_forward_hook(lambda module, inputs, output: seen.update(mixed=inputs[0]))
    with torch.no_grad():
        layer.offsets.weight.zero_(), layer.offsets.bias.zero_()
        layer.scales.weight.zero_(), layer.scales.bias.fill_(100.0)
        centers = torch.tensor([[1.0, 2.0], [3.0, 0.0]])[None, :, None]
        layer(torch.randn(1, 2, 16), torch.randn(1, 2, 16), memory, centers)
        torch.testing.assert_close(seen["mixed"], layer.cross_attention.value(tokens[:, [2 * 4 + 1, 3]]), **CLOSE)


# A second implementation: one image, one head and one level at a time


def slow_attention(module, query, key, value, mask, bias=None):
    """Attention of one image, head by head; mask and bias by cell."""
    q, k, v = module.query(query), module.key(key), module.value(value)
    heads = []
    for m, part in enumerate(torch.arange(q.shape[-1]).chunk(module.heads)):
        scores = q[:, part] @ k[:, part].T / len(part) ** 0.5
        scores = scores if bias is None else scores + bias[m]
        heads.append(scores[:, ~mask].softmax(-1) @ v[~mask][:, part])
    return module.out(torch.cat(heads, -1))


def feed_forward(layer, x):
    return layer.ffn_norm(x + layer.ffn[3](F.relu(layer.ffn[0](x))))


def slow_image(model, images, number):
    """Logits and boxes of each layer for one image of a batch, from the figures of the paper."""
    c, maps, sd = model.config, model.backbone(images), model.state_dict()
    height, width = images.sizes[number].tolist()
    levels, masks, strides = [], [], []
    for i, stage in enumerate(c.backbone_stages):
        weight, bias = sd[f"projections.{i}.weight"], sd[f"projections.{i}.bias"]
        levels.append(F.conv2d(maps[stage - 2].tensor, weight, bias))
        masks.append(maps[stage - 2].mask)
        strides.append(2**stage)
    if c.coarser:
        i = len(c.backbone_stages)
        source = maps[c.backbone_stages[-1] - 2]
        weight, bias = sd[f"projections.{i}.weight"], sd[f"projections.{i}.bias"]
        levels.append(F.conv2d(source.tensor, weight, bias, stride=2, padding=1))
        masks.append(source.mask[:, 0::2, 0::2])
        strides.append(2 * strides[-1])
    wheres = [sine_positions(mask, c.dim)[number].flatten(1).T for mask in masks]
    if len(levels) > 1:
        wheres = [where + sd["level_positions"][i] for i, where in enumerate(wheres)]
    shapes = [tuple(level.shape[-2:]) for level in levels]
    tokens = [level[number].flatten(1).T for level in levels]
    masks = [mask[number].flatten() for mask in masks]

    for n, layer in enumerate(model.encoder.layers, start=1):

        def encode(x, where, mask, layer=layer):
            seen = slow_attention(layer.attention, x + where, x + where, x, mask)
            return feed_forward(layer, layer.attention_norm(x + seen))

        if n in c.multi_scale_layers:
            cells = [len(x) for x in tokens]
            tokens = encode(torch.cat(tokens), torch.cat(wheres), torch.cat(masks)).split(cells)
        else:
            tokens = [encode(*level) for level in zip(tokens, wheres, masks)]

    positions = model.query_positions.weight
    x, found = torch.zeros_like(positions), []
    for n, layer in enumerate(model.decoder.layers):
        asked = layer.prior_norm(x + positions)
        if n == 0:
            head = model.center_head
            center = head[4](F.relu(head[2](F.relu(head[0](asked)))))
        offsets = layer.offsets(asked).view(len(x), len(levels), c.heads, 2)
        scales = layer.scales(asked).view(len(x), len(levels), c.heads, 2)
        nobody = torch.zeros(len(x), dtype=torch.bool)
        x = layer.self_norm(x + slow_attention(layer.self_attention, x + positions, x + positions, x, nobody))
        seen = torch.zeros_like(x)
        for i, (stride, (h, w)) in enumerate(zip(strides, shapes)):
            beta = c.beta * 32 / stride
            log_g = torch.zeros(c.heads, len(x), h, w)
            for row in range(h):
                for column in range(w):
                    dx = column - center[:, 0].sigmoid() * width / stride - offsets[:, i, :, 0].T
                    dy = row - center[:, 1].sigmoid() * height / stride - offsets[:, i, :, 1].T
                    distance = (scales[:, i, :, 0].T * dx) ** 2 + (scales[:, i, :, 1].T * dy) ** 2 + 0 * dx
                    log_g[:, :, row, column] = -distance / beta
            keys = tokens[i] + wheres[i]
            level = slow_attention(layer.cross_attention, x + positions, keys, tokens[i], masks[i], log_g.flatten(2))
            alpha = layer.selection(asked).softmax(-1)[:, i : i + 1] if len(levels) > 1 else 1.0
            seen = seen + alpha * level
        x = feed_forward(layer, layer.cross_norm(x + seen))
        hidden = model.decoder.norm(x)
        box = model.box_head(hidden)
        found.append((model.class_head(hidden), torch.cat([box[:, :2] + center, box[:, 2:]], 1).sigmoid()))
    return found


@FORMS
@torch.no_grad()
def test_the_whole_is_a_second_implementation(make):
    model, images = make(encoder_layers=3), batch((64, 96), (128, 70))
    output = model(images)
    assert len(output.layers) == 2
    for number in range(2):
        for layer, (logits, boxes) in zip(output.layers, slow_image(model, images, number)):
            torch.testing.assert_close(layer.logits[number], logits, **CLOSE)
            torch.testing.assert_close(layer.boxes[number], boxes, **CLOSE)


@torch.no_grad()
def test_levels_meet_in_multi_scale_layers_alone():
    for layers, meet in (((), False), ((2,), True)):
        model = smca(multi_scale_layers=layers)
        memory = model._memory(model.backbone(batch((64, 96))))
        other = replace(memory, tokens=memory.tokens.clone())
        other.tokens[:, -1] += 1.0  # a cell of the coarsest level
        one, two = (by_level(model.encoder(m)) for m in (memory, other))
        assert torch.equal(one[0].tokens, two[0].tokens) == (not meet)
        assert not torch.equal(one[-1].tokens[:, :-1], two[-1].tokens[:, :-1])


# The authors' code


def numbers(name, *shape):
    """Numbers between -1 and 1 that are the same on every machine, without a generator of random numbers."""
    at = torch.arange(math.prod(shape), dtype=torch.float64) + zlib.crc32(name.encode()) % 10007
    waves = (at * 12.9898).sin() * 43758.5453
    return (2 * (waves - waves.floor()) - 1).float().reshape(shape)


def number_weights(shapes):
    """Weights of the authors' decoder, made from their names and shapes there."""
    weights = {}
    for name, shape in shapes.items():
        n = numbers(name, *shape)
        around_1 = name.endswith("point3.bias") or (len(shape) == 1 and name.endswith("weight"))
        weights[name] = n * 2 / shape[-1] ** 0.5 if len(shape) > 1 else n / 5 + around_1
    return weights


# Channels 0, 100 and 200 of queries 0 and 2 after each of two decoder layers: two images by the authors' single-scale
# code, one by their multi-scale code, which weighs the levels of all images of a batch as those of the first.
CENTERS = [[0.52919, -0.59204], [0.05758, -0.72459], [0.23726, -1.0796], [0.6299, 0.51614]]
GOLDEN = {
    "single scale": [
        [
            [[1.21111, 0.47198, 0.84337], [1.39461, 0.6411, 0.8222]],
            [[1.35427, -0.3456, 0.39044], [1.01002, -0.26946, 0.71605]],
        ],
        [
            [[0.51687, 1.07179, 1.86521], [0.89459, 1.0884, 1.47647]],
            [[-0.35554, 0.94052, 1.76275], [-0.6068, 1.20068, 2.23101]],
        ],
    ],
    "multi-scale": [
        [[[1.18105, 0.13017, 0.44284], [1.36051, 0.12326, 0.13222]]],
        [[[0.87551, 0.65351, 1.73933], [0.77093, 0.7521, 1.82082]]],
    ],
}


@pytest.mark.parametrize(
    "form, strides, shapes",
    [
        ("single scale", [32], [(2, 3)]),
        ("multi-scale", [16, 16, 32, 64], [(4, 6), (4, 6), (2, 3), (1, 2)]),  # their finest level comes in halved
    ],
)
@torch.no_grad()
def test_the_decoder_gives_the_numbers_of_the_authors_code(form, strides, shapes):
    decoder = Decoder([SmcaDecoderLayer(SmcaConfig(), strides) for _ in range(2)], nn.LayerNorm(256)).eval()
    model = nn.ModuleDict({"decoder": decoder, "center_head": MLP(256, 256, 2, 3)})
    pairs = table.pairs(configure("smca_single_scale_r50", decoder_layers=2))
    names = {name: tensor.shape for name, tensor in to_theirs(model.state_dict(), pairs).items()}
    model.load_state_dict(from_theirs(number_weights(names), pairs, model.state_dict(), "numbers"))

    count, cells = len(GOLDEN[form][0]), sum(h * w for h, w in shapes)
    mask = torch.zeros(count, cells, dtype=torch.bool)
    mask[1:, 3:] = mask[0, -1] = True
    memory = Memory(numbers("tokens", count, cells, 256), numbers("places", count, cells, 256), mask, shapes)
    queries = numbers("queries", 4, 256).expand(count, -1, -1)
    centers = model["center_head"](decoder.layers[0].prior_norm(queries))
    torch.testing.assert_close(centers[0], torch.tensor(CENTERS), rtol=0, atol=2e-5)
    pixels = centers.sigmoid() * torch.tensor([[70, 64], [96, 40]])[:count, None]
    cells, x, hidden = pixels[:, :, None] / torch.tensor(strides)[:, None], torch.zeros_like(queries), []
    for layer in decoder.layers:
        x = layer(x, queries, memory, cells)
        hidden.append(decoder.norm(x))
    found = torch.stack(hidden)[:, :, ::2, [0, 100, 200]]
    torch.testing.assert_close(found, torch.tensor(GOLDEN[form]), rtol=0, atol=5e-5)


THEIR_LAYER = {  # shapes for C = 32, 4 heads, 48 channels in the feed-forward network
    "self_attn.in_proj_weight": (96, 32), "self_attn.in_proj_bias": (96,),
    "self_attn.out_proj.weight": (32, 32), "self_attn.out_proj.bias": (32,),
    "multihead_attn.in_proj_weight": (96, 32), "multihead_attn.in_proj_bias": (96,),
    "multihead_attn.out_proj.weight": (32, 32), "multihead_attn.out_proj.bias": (32,),
    "linear1.weight": (48, 32), "linear1.bias": (48,), "linear2.weight": (32, 48), "linear2.bias": (32,),
    **{f"norm{n}.{kind}": (32,) for n in (1, 2, 3, 4) for kind in ("weight", "bias")},
    "point1.layers.0.weight": (32, 32), "point1.layers.0.bias": (32,),
    "point1.layers.1.weight": (32, 32), "point1.layers.1.bias": (32,),
    "point1.layers.2.weight": (2, 32), "point1.layers.2.bias": (2,),
    "point2.weight": (8, 32), "point2.bias": (8,), "point3.weight": (8, 32), "point3.bias": (8,),
}  # fmt: skip


def theirs(monkeypatch, **changes):
    """A small single-scale model, and its weights by the names of the authors' code."""
    small_resnet(monkeypatch)
    sizes = {"dim": 32, "heads": 4, "ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2, "queries": 7}
    model = build("smca_single_scale_r50", 92, weights=None, mask_padding=False, **(sizes | changes))
    shake(model).eval()
    return model, to_theirs(model.state_dict(), table.pairs(model.model_config))


@torch.no_grad()
def test_published_weights_load(monkeypatch):
    model, weights = theirs(monkeypatch, beta=6.0)
    prefix = "transformer.decoder.layers.0."
    named = {k.removeprefix(prefix): tuple(v.shape) for k, v in weights.items() if k.startswith(prefix)}
    assert named == THEIR_LAYER
    loaded, images = (
        interop.load({"model": weights, "args": {"smooth": 6, "dropout": 0.2}}),
        batch((64, 96), (96, 64)),
    )
    assert loaded.model_config.detector == replace(model.model_config.detector, dropout=0.2)
    assert (loaded.num_logits, loaded.model_config.classes[90:]) == (92, ("toothbrush", "N/A"))
    one, other = model(images).final, loaded(images).final
    assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert interop.load(weights, "smca", num_classes=3).num_logits == 3


def test_weights_of_another_smca_are_refused(monkeypatch):
    _, weights = theirs(monkeypatch)
    prefix = "transformer.decoder.layers.0."
    with pytest.raises(UserError, match="multi-scale SMCA with an encoder of convolutions"):
        interop.load(weights | {f"{prefix}point4.weight": torch.zeros(4, 32)})
    with pytest.raises(UserError, match="not have two scales for each head; give a model of --dynamic_scale type3"):
        interop.load(weights | {f"{prefix}point3.bias": torch.zeros(4)})
    with pytest.raises(UserError, match="dilated"):
        interop.load({"model": weights, "args": {"dilation": True}})
    del weights["transformer.decoder.layers.1.point2.bias"]
    with pytest.raises(UserError, match=r"1 missing \(transformer.decoder.layers.1.point2.bias\)"):
        interop.load(weights)


def test_the_way_back_is_for_what_the_authors_code_can_build():
    with torch.device("meta"):
        assert "input_proj.weight" in interop.state_dict(build("smca_single_scale_r50", 91, weights=None))
        for name, changes in (("smca_r50", {}), ("smca_single_scale_r50", {"heads": 4})):
            with pytest.raises(UserError, match=f"{name}, as configured, can't run in published code"):
                interop.state_dict(build(name, 91, weights=None, **changes))


def count(name, columns, trained=False):
    with torch.device("meta"):
        model = build(name, columns, weights=None)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def test_sizes():
    assert count("smca_single_scale_r50", 92) == 41_760_482  # counted in the authors' code
    assert count("smca_single_scale_r101", 92) == 60_700_386
    assert count("smca_r50", 91) == 39_752_051
    # Table 1 says 40 and 58 million; their code counts the weights that are trained.
    assert count("smca_r50", 91, trained=True) == 39_529_651
    assert count("smca_r101", 91, trained=True) == 58_469_555


# Behavior


@FORMS
@pytest.mark.parametrize("sizes", [[(64, 96), (128, 160)], [(50, 70), (96, 33), (128, 128)]])
@torch.no_grad()
def test_padding_does_not_move_a_images_boxes(make, sizes):
    model, images = with_stub(make()), random_images(*sizes)
    together = model(batch_images(images, 32))
    for i, image in enumerate(images):
        alone = model(batch_images([image], 32))
        for one, many in zip(alone.layers, together.layers):
            torch.testing.assert_close(one.logits[0], many.logits[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.boxes[0], many.boxes[i], rtol=1e-4, atol=1e-4)
    assert (together.final.boxes[0] - together.final.boxes[1]).abs().max() > 1e-3  # the pixels do matter


@torch.no_grad()
def test_the_backbone_hides_padding_too(monkeypatch):
    small_resnet(monkeypatch)
    images = random_images((64, 96), (128, 160))
    for mask_padding in (True, False):
        model = smca(backbone="resnet50", mask_padding=mask_padding)
        alone, together = model(batch_images(images[:1], 32)), model(batch_images(images, 32))
        assert torch.allclose(alone.final.boxes[0], together.final.boxes[0], atol=1e-4) == mask_padding


@FORMS
@torch.no_grad()
def test_queries_in_another_order_give_the_same_objects(make):
    model, images, order = make(), batch((64, 64)), torch.randperm(7)
    before = model(images)
    model.query_positions.weight.copy_(model.query_positions.weight[order])
    after = model(images)
    torch.testing.assert_close(after.final.boxes, before.final.boxes[:, order], **CLOSE)
    torch.testing.assert_close(after.final.logits, before.final.logits[:, order], **CLOSE)
    assert not torch.allclose(after.final.boxes, before.final.boxes, atol=1e-3)


@torch.no_grad()
def test_boxes_start_at_the_centers():
    model = smca()
    nn.init.zeros_(model.box_head[-1].weight)
    nn.init.zeros_(model.box_head[-1].bias)
    centers = model.center_head(model.decoder.layers[0].prior_norm(model.query_positions.weight)).sigmoid()
    for layer in model(batch((64, 64), (64, 96))).layers:
        torch.testing.assert_close(layer.boxes, torch.cat([centers, torch.full((7, 2), 0.5)], 1).expand(2, -1, -1))


@torch.no_grad()
def test_scales_start_at_one():
    layer = build("smca_scenes", 3).decoder.layers[0]
    assert torch.equal(layer.scales(torch.randn(5, 128)), torch.ones(5, 2 * 3 * 8))


@FORMS
def test_everything_is_trained(make):
    """All but one weight: the queries start at zero, so that the first self-attention has nothing to mix."""
    model = make().train()
    output = model(batch((64, 64)))
    sum(layer.logits.sum() + layer.boxes.square().sum() for layer in output.layers).backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == ["decoder.layers.0.self_attention.value.weight"]


def test_training_steps_lower_the_loss():
    data = Scenes(2, seed=3, size=64)
    images, targets = collate([data[0], data[1]])
    model = build(
        "rego_smca_scenes", len(data.classes), dim=32, heads=4, queries=10, stages=1, detector={"ffn_dim": 64}
    )
    loss = SetLoss(LossConfig(), model.scoring)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(25):
        total, terms = loss(model.train()(images), targets)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        base = sum(value.item() for name, value in terms.items() if name.startswith("base"))
        found.append((base, total.item() - base))
    assert found[-1][0] < 0.6 * found[0][0] and found[-1][1] < 0.6 * found[0][1]


@FORMS
def test_rego_stands_on_it(make):
    detector, images = make(), batch((64, 96), (96, 64))
    model = Rego(detector, stages=2, ffn_dim=48, dropout=0.0).eval()
    with torch.no_grad():
        output, base, alone = model(images), model(images, stages=0), detector(images)
    assert torch.equal(base.final.boxes, alone.final.boxes)
    assert [len(stage) for stage in output.stages] == [2, 2]
    assert output.final.boxes.shape == (2, 7, 4) and output.final.logits.shape == (2, 7, CLASSES)
    assert [f.stride for f in output.features] == [4, 8, 16, 32]
    assert [f.tensor.shape[1] for f in output.features] == detector.feature_channels
    model(images).final.logits.sum().backward()
    assert model.projections[0].weight.grad.any()  # small images have small boxes: glimpses from the finest map


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 7}, "7 heads do not divide 128 channels"),
        ({"backbone_stages": (4, 6)}, r"backbone_stages=\(4, 6\) must be some of 2 to 5, in this order"),
        ({"backbone_stages": (5, 4)}, "in this order"),
        ({"backbone_stages": ()}, "some of 2 to 5"),
        ({"multi_scale_layers": (3,)}, r"multi_scale_layers=\(3,\) must be some of 1 to 2"),
        ({"encoder_layers": 1}, r"multi_scale_layers=\(2,\) must be some of 1 to 1"),
        ({"beta": 0.0}, "beta=0.0 must be greater than 0"),
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"coarser": "yes"}, "coarser='yes'"),
        ({"levels": 3}, "smca_scenes has no field 'levels'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(changes, message):
    with unchecked(), pytest.raises(UserError, match=message) as caught:
        build("smca_scenes", CLASSES, **changes)
    assert "\n" not in str(caught.value)
