"""Sparse R-CNN: a plain second implementation, one query at a time; what a query reads; where gradients end."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, SIZES, batch, random_images, sparse_rcnn, with_stub
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, roi_align

import regolite
from regolite import RunConfig, record
from regolite.boxes import to_pixels
from regolite.checkpoint import save_model
from regolite.data import Scenes, batch_images
from regolite.losses import SetLoss
from regolite.models.glimpse import choose_level
from regolite.models.presets import build, configure
from regolite.models.sparse_rcnn import DynamicConvolution, FeaturePyramid, SparseRcnn, SparseRcnnConfig, corrected
from regolite.types import FeatureMap

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small(**changes):
    """As it is initialized, unlike those of small_models."""
    sizes = {name: value for name, value in SIZES.items() if name != "encoder_layers"}
    return SparseRcnn(SparseRcnnConfig(**(sizes | {"dynamic_dim": 8} | changes)), CLASSES).eval()


# A second implementation


def normalized(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)


def plain_attention(queries, attention):
    """Softmax of scaled products, head by head and query by query."""
    dim, heads = queries.shape[1], attention.heads
    q, k, v = (F.linear(queries, part.weight, part.bias) for part in (attention.query, attention.key, attention.value))
    rows = []
    for i in range(len(queries)):
        parts = []
        for part in range(heads):
            own = slice(part * dim // heads, (part + 1) * dim // heads)
            weights = torch.softmax(k[:, own] @ q[i, own] / math.sqrt(dim // heads), 0)
            parts.append(weights @ v[:, own])
        rows.append(F.linear(torch.cat(parts), attention.out.weight, attention.out.bias))
    return torch.stack(rows)


def plain_interaction(query, glimpse, interaction):
    """One query: its filters as two matrices, applied to each of the 49 bins of its glimpse."""
    dim = len(query)
    filters = F.linear(query, interaction.filters.weight, interaction.filters.bias)
    inward = filters[: len(filters) // 2].view(dim, -1)
    outward = filters[len(filters) // 2 :].view(-1, dim)
    bins = []
    for row in range(7):
        for column in range(7):
            x = F.relu(normalized(glimpse[:, row, column] @ inward, interaction.inward_norm))
            bins.append(F.relu(normalized(x @ outward, interaction.outward_norm)))
    read = F.linear(torch.cat(bins), interaction.project.weight, interaction.project.bias)
    return F.relu(normalized(read, interaction.project_norm))


def plain(model, features, height, width):
    """Logits and boxes (cxcywh) of each head for one image without padding."""
    queries, boxes = model.queries.weight, model.boxes.weight
    found = []
    for head in model.decoder_layers:
        cx, cy, w, h = boxes.T
        corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        corners = corners * torch.tensor([width, height, width, height])
        glimpses = []
        for box in corners:
            side = ((box[2] - box[0]) * (box[3] - box[1])).clamp(min=0).sqrt().item()
            level = min(max(math.floor(4 + math.log2(side / 224)) if side else 2, 2), 5) - 2
            f = features[level]
            glimpses.append(roi_align(f.tensor, [box[None]], 7, 1 / f.stride, sampling_ratio=2, aligned=True)[0])
        queries = normalized(queries + plain_attention(queries, head.self_attention), head.self_norm)
        read = torch.stack([plain_interaction(q, g, head.interaction) for q, g in zip(queries, glimpses)])
        queries = normalized(queries + read, head.interaction_norm)
        hidden = F.relu(F.linear(queries, head.ffn[0].weight, head.ffn[0].bias))
        queries = normalized(queries + F.linear(hidden, head.ffn[3].weight, head.ffn[3].bias), head.ffn_norm)
        towers = []
        for tower in (head.class_tower, head.box_tower):
            x = queries
            for n in range(0, len(tower), 3):
                x = F.relu(normalized(x @ tower[n].weight.T, tower[n + 1]))
            towers.append(x)
        logits = F.linear(towers[0], head.class_head.weight, head.class_head.bias)
        dx, dy, dw, dh = F.linear(towers[1], head.box_head.weight, head.box_head.bias).T
        moved = (cx + dx / 2 * w, cy + dy / 2 * h, w * torch.exp(dw), h * torch.exp(dh))
        boxes = torch.stack(moved, 1)
        found.append((logits, boxes))
    return found


@pytest.mark.parametrize("changes", [{}, {"decoder_layers": 1}, {"decoder_layers": 4, "class_layers": 0}])
@torch.no_grad()
def test_a_plain_second_implementation_gives_the_same(changes):
    model = sparse_rcnn(**changes)
    model.boxes.weight[:, 2:] = torch.tensor([0.02, 0.1, 0.3, 0.7, 1.0, 1.6, 0.5])[:, None]
    images = batch((256, 320))
    output = model(images)
    wanted = plain(model, output.features, 256, 320)
    assert len(output.layers) == len(wanted) == changes.get("decoder_layers", 2)
    for layer, (logits, boxes) in zip(output.layers, wanted):
        torch.testing.assert_close(layer.logits[0], logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.boxes[0], boxes, rtol=1e-3, atol=1e-4)
    levels = choose_level(to_pixels(output.references, images.sizes), [f.stride for f in output.features])
    assert len(set(levels.flatten().tolist())) >= 3
    assert (output.layers[-1].boxes - output.references).abs().max() > 0.05


@torch.no_grad()
def test_the_pyramid_is_torchvisions():
    channels = [8, 12, 16, 20]
    ours, theirs = FeaturePyramid(channels, 16, mask_padding=False), FeaturePyramidNetwork(channels, 16)
    for level in range(4):
        for own, other in ((ours.inward, theirs.inner_blocks), (ours.outward, theirs.layer_blocks)):
            nn.init.normal_(own[level].bias)
            other[level][0].load_state_dict(own[level].state_dict())
    maps = [torch.randn(2, c, 64 // 2**i, 96 // 2**i) for i, c in enumerate(channels)]
    features = [FeatureMap(m, torch.zeros(2, *m.shape[-2:], dtype=torch.bool), 4 * 2**i) for i, m in enumerate(maps)]
    wanted = theirs({str(i): m for i, m in enumerate(maps)})
    for level, other in zip(ours(features), wanted.values(), strict=True):
        torch.testing.assert_close(level.tensor, other, **CLOSE)


@torch.no_grad()
def test_padding_enters_the_pyramid_only_if_it_may():
    images = random_images((64, 64), (160, 96))
    for hides in (True, False):
        model = with_stub(sparse_rcnn(mask_padding=hides))
        together, alone = model(batch_images(images, 32)), model(batch_images(images[:1], 32))
        apart = (together.layers[-1].boxes[0] - alone.layers[-1].boxes[0]).abs().max()
        assert (apart < 1e-3) == hides


# What a query reads


@torch.no_grad()
def test_queries_in_another_order_give_the_same_in_that_order():
    model, images, order = sparse_rcnn(), batch((64, 96), (80, 60)), torch.randperm(7)
    before = model(images)
    model.queries.weight.copy_(model.queries.weight[order])
    model.boxes.weight.copy_(model.boxes.weight[order])
    for one, other in zip(model(images).layers, before.layers):
        torch.testing.assert_close(one.logits, other.logits[:, order], **CLOSE)
        torch.testing.assert_close(one.boxes, other.boxes[:, order], **CLOSE)


def test_a_query_reads_its_own_glimpse_alone():
    interaction = DynamicConvolution(16, 4)
    queries, glimpses = torch.randn(3, 16), torch.randn(3, 16, 7, 7, requires_grad=True)
    interaction(queries, glimpses)[1].sum().backward()
    assert glimpses.grad[1].any() and not glimpses.grad[0].any() and not glimpses.grad[2].any()
    with torch.no_grad():  # the same glimpse, read with other filters
        one, other = interaction(queries[:2], glimpses[:1].expand(2, -1, -1, -1))
    assert (one - other).abs().max() > 0.1


def test_filters_have_the_gradient_of_a_small_step():
    interaction = DynamicConvolution(16, 4).double()
    given = torch.randn(2, 16).double().requires_grad_(), torch.randn(2, 16, 7, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(interaction, given, fast_mode=True)


# Boxes


def test_boxes_move_in_units_of_their_sides():
    box = torch.tensor([0.5, 0.4, 0.2, 0.1])
    torch.testing.assert_close(corrected(box, torch.zeros(4)), box)
    steps = torch.tensor([1.0, -2.0, math.log(2), math.log(0.5)])
    torch.testing.assert_close(corrected(box, steps), torch.tensor([0.6, 0.3, 0.4, 0.05]))
    huge = corrected(box, torch.tensor([0.0, 0.0, 1000.0, 0.0]))
    torch.testing.assert_close(huge[2], torch.tensor(0.2 * 100_000 / 16))


@torch.no_grad()
def test_it_starts_from_the_whole_image_and_few_objects():
    model = small()
    output = model(batch((64, 96)))
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(output.references, whole.expand(1, 7, 4))
    for head in model.decoder_layers:
        torch.testing.assert_close(head.class_head.bias.sigmoid(), torch.full((CLASSES,), 0.01))


def reached(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_everything_is_trained():
    model = sparse_rcnn().train()
    with torch.no_grad():  # boxes of 13 to 770 pixels, so that every level is read
        model.boxes.weight[:, 2:] = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0])[:, None]
    sum(p.logits.sum() + p.boxes.square().sum() for p in model(batch((128, 128))).layers).backward()
    assert reached(model) == {name for name, p in model.named_parameters()}


def test_gradients_of_boxes_end_at_their_head():
    model = sparse_rcnn().train()
    model(batch((64, 96))).layers[-1].boxes.sum().backward()
    first, second = model.decoder_layers
    assert model.boxes.weight.grad is None and reached(model.queries)
    assert not reached(first.box_head) | reached(first.box_tower) | reached(first.class_head)
    assert reached(first.interaction) and reached(second.box_head)


# The whole


def test_size_is_the_authors():
    """Of the heads by their code; of the whole with 80 classes 106 M, as others print it."""
    with torch.device("meta"):
        model = build("sparse_rcnn_r50", 80, weights=None)
    assert sum(p.numel() for p in model.decoder_layers.parameters()) == 79_412_472
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 106
    assert configure("sparse_rcnn_r50").loss.l1_boxes == "xyxy"


def test_saved_loaded_and_recorded(tmp_path):
    model = build("sparse_rcnn_scenes", 3, dim=32, heads=4, queries=6, decoder_layers=2, ffn_dim=32).eval()
    save_model(model, tmp_path / "model.safetensors")
    again, image = regolite.load(tmp_path / "model.safetensors"), Scenes(1, size=64).image(0)
    assert again.model_config == model.model_config
    with record(again) as trace:
        [found] = regolite.detect(again, image, threshold=0.0)
    [wanted] = regolite.detect(model, image, threshold=0.0)
    assert torch.equal(found.scores, wanted.scores) and len(found) > 0
    assert trace.names() == ["references", *(f"decoder.{n}.{part}" for n in (0, 1) for part in ("self", "boxes"))]
    weights = trace["decoder.1.self"].weights
    assert weights.shape == (1, 4, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 6))


@pytest.mark.parametrize("stages", [0, 1])
def test_steps_lower_the_loss(stages):
    data = Scenes(2, seed=3, size=64)
    images, targets = regolite.data.collate([data[0], data[1]])
    sizes = {"dim": 32, "heads": 4, "queries": 8, "dynamic_dim": 8}
    rego = {"stages": stages, "rego": {"ffn_dim": 32}} if stages else {}
    name = "rego_sparse_rcnn_scenes" if stages else "sparse_rcnn_scenes"
    model = build(name, len(data.classes), **sizes, detector={"ffn_dim": 32, "decoder_layers": 2}, **rego).train()
    criterion, losses = model.criterion(model.model_config.loss), []
    assert isinstance(criterion, SetLoss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(25):
        loss, _ = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_it_learns_eight_images(tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    sizes = ("dim=64", "heads=4", "ffn_dim=128", "dynamic_dim=16", "decoder_layers=2", "queries=20")
    config = RunConfig(
        data="scenes:8:val=1:size=96", model="sparse_rcnn_scenes", overrides=sizes, image_size=96, augment="none",
        batch_size=8, epochs=200, lr=2e-3, clip=1.0, schedule="one_cycle", backbone_lr_mult=1.0, evaluate_every=0,
        evaluate_train=True, log_every=50, device="cpu", output=str(tmp_path),
    )  # fmt: skip
    lines = (regolite.train(config) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["split"] == "train" and last["AP"] >= 90
