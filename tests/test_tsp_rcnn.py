"""TSP-RCNN: a plain second implementation, proposal by proposal; restricted matching; what proposals know of others."""

import math

import pytest
import torch
from small_models import batch
from small_runs import ap_of_learned_images
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou, roi_align

import regolite
from regolite.data import open_data
from regolite.evaluation import evaluate
from regolite.models.baselines import Baseline, BaselineConfig
from regolite.models.presets import build
from regolite.models.tsp_rcnn import ProposalNetwork, TspHeads, class_loss, lowest, moved, read_regions

CLASSES, DIM, WIDTH, HEADS, SIDE = 3, 16, 32, 4, 256
SIZES = [(SIDE, SIDE), (192, 224)]


def heads():
    model = TspHeads(DIM, CLASSES + 1, heads=HEADS, layers=2, dropout=0.0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.2)
    nn.init.normal_(model.box_predictor["cls_score"].weight, std=0.5)
    return model


def maps(images=1):
    sides = [SIDE // 2**level for level in range(2, 8)]
    return {str(level): torch.randn(images, DIM, side, side) for level, side in enumerate(sides)}


def random_boxes(count, size=(SIDE, SIDE)):
    corner = torch.rand(count, 2) * 140
    boxes = torch.cat([corner, corner + 6 + torch.rand(count, 2) ** 2 * 180], 1)
    return boxes.minimum(torch.tensor([size[1], size[0]] * 2))


# A second implementation


def linear(x, layer):
    return layer.weight @ x + layer.bias


def normalized(x, norm):
    return (x - x.mean()) / torch.sqrt(x.var(correction=0) + norm.eps) * norm.weight + norm.bias


def embedding(box, size):
    """Sines and cosines of center, size and corners relative to the image, at WIDTH / 16 wavelengths each."""
    height, width = size
    x1, y1, x2, y2 = box.tolist()
    numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    numbers += [x1 / width, y1 / height, x2 / width, y2 / height]
    values = []
    for number in numbers:
        for pair in range(WIDTH // 16):
            angle = number * 2 * math.pi / 10000 ** (2 * pair / (WIDTH // 8))
            values += [math.sin(angle), math.cos(angle)]
    return torch.tensor(values)


def attended(tokens, positions, attention):
    """Each token's mean of the values, weighted head by head."""
    part = WIDTH // HEADS
    q = [linear(t + p, attention.query) for t, p in zip(tokens, positions)]
    k = [linear(t + p, attention.key) for t, p in zip(tokens, positions)]
    v = [linear(t, attention.value) for t in tokens]
    mixed = []
    for query in q:
        pieces = []
        for head in range(HEADS):
            own = slice(head * part, (head + 1) * part)
            weights = torch.stack([query[own] @ key[own] / math.sqrt(part) for key in k]).softmax(0)
            pieces.append(sum(weight * value[own] for weight, value in zip(weights, v)))
        mixed.append(linear(torch.cat(pieces), attention.out))
    return mixed


def plain(model, features, image, boxes, size):
    """Logits and steps of the proposals of one image."""
    encoder, tokens = model.box_head, []
    positions = [embedding(box, size) for box in boxes]
    for box, position in zip(boxes, positions):
        side = math.sqrt(((box[2] - box[0]) * (box[3] - box[1])).item())
        level = min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2
        level_map = features[str(level)][image : image + 1]
        region = roi_align(level_map, [box[None]], 7, 1 / 2 ** (level + 2), aligned=True).flatten()
        token = linear(region, encoder.project) + linear(position, encoder.project_positions)
        tokens.append(normalized(token, encoder.project_norm))
    for layer in encoder.encoder.layers:
        inputs = [normalized(token, layer.attention_norm) for token in tokens]
        tokens = [token + seen for token, seen in zip(tokens, attended(inputs, positions, layer.attention))]
        inputs = [normalized(token, layer.ffn_norm) for token in tokens]
        tokens = [token + linear(linear(x, layer.ffn[0]).relu(), layer.ffn[3]) for token, x in zip(tokens, inputs)]
    tokens = [normalized(token, encoder.encoder.norm) for token in tokens]
    box_layers = model.box_predictor["bbox_pred"]
    steps = [linear(linear(linear(t, box_layers[0]).relu(), box_layers[2]).relu(), box_layers[4]) for t in tokens]
    return torch.stack([linear(t, model.box_predictor["cls_score"]) for t in tokens]), torch.stack(steps)


def move(box, steps):
    """The box, moved by steps in units of a tenth and a fifth."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + w / 2 + steps[0] / 10 * w, y1 + h / 2 + steps[1] / 10 * h
    w, h = w * torch.exp(steps[2] / 5), h * torch.exp(steps[3] / 5)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def plain_losses(logits, steps, boxes, objects, labels):
    """Of proposals of several images: numbers of a proposal's image and object decide."""
    truth, box_loss = [], 0.0
    for image in range(len(boxes)):
        claims = {}
        for number, box in enumerate(boxes[image]):
            truth.append(0)
            overlaps = [box_iou(box[None], each[None]).item() for each in objects[image]]
            if not overlaps or max(overlaps) < 0.5:
                continue
            nearest = overlaps.index(max(overlaps))
            wanted, label = objects[image][nearest], labels[image][nearest]
            own = steps[image][number][4 * (label - 1) : 4 * label]
            reached = move(box, own)
            giou = 1 - generalized_box_iou(reached[None], wanted[None])[0, 0]
            (x1, y1, x2, y2), (u1, v1, u2, v2) = box.tolist(), wanted.tolist()
            dx, dy = ((u1 + u2) - (x1 + x2)) / 2 / (x2 - x1) * 10, ((v1 + v2) - (y1 + y2)) / 2 / (y2 - y1) * 10
            dw, dh = math.log((u2 - u1) / (x2 - x1)) * 5, math.log((v2 - v1) / (y2 - y1)) * 5
            box_loss = box_loss + (own - torch.tensor([dx, dy, dw, dh])).abs().sum() + 2 * giou
            cost = 2 * giou - logits[image][number].softmax(0)[label]
            if nearest not in claims or cost < claims[nearest][0]:
                claims[nearest] = (cost, len(truth) - 1, int(label))
        for _, index, label in claims.values():
            truth[index] = label
    every = torch.cat(logits)
    label_loss, total = 0.0, 0.0
    for row, label in zip(every, truth):
        right = row.softmax(0)[label]
        total += 1.0 if label else 0.1
        label_loss = label_loss - right.log() * (1.0 if label else 0.1 * 2 * (1 - right) ** 2)
    return {"loss_classifier": label_loss / total, "loss_box_reg": box_loss / len(every)}, truth


@torch.no_grad()
def test_a_plain_second_implementation_predicts_the_same():
    model, features = heads().eval(), maps(2)
    boxes = [random_boxes(9), random_boxes(5, SIZES[1])]
    logits, steps = model._predict(list(features.values())[:4], boxes, SIZES)
    for image, rows in enumerate((slice(0, 9), slice(9, 14))):
        wanted = plain(model, features, image, boxes[image], SIZES[image])
        for found, other in zip((logits[rows], steps[rows]), wanted):
            torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)
    assert logits.std() > 0.1 and steps.std() > 0.01


@torch.no_grad()
def test_a_plain_second_implementation_has_the_same_losses(monkeypatch):
    model, features = heads().train(), maps(2)
    objects, labels = [random_boxes(4), torch.zeros(0, 4)], [torch.tensor([1, 3, 2, 2]), torch.zeros(0).long()]
    near, sides = objects[0].repeat(3, 1), (objects[0][:, 2:] - objects[0][:, :2]).repeat(3, 2)
    boxes = [torch.cat([random_boxes(6), near + torch.randn(12, 4) * 0.06 * sides]).clamp(0, SIDE), random_boxes(4)]
    targets = [{"boxes": box, "labels": label} for box, label in zip(objects, labels)]
    used = []
    predict = model._predict

    def watched(levels, proposals, sizes):
        used.extend(proposals)
        return predict(levels, proposals, sizes)

    monkeypatch.setattr(model, "_predict", watched)
    found, losses = model(features, boxes, [(SIDE, SIDE)] * 2, targets)
    assert [0.7 * len(box) - 1 < len(kept) <= len(box) for box, kept in zip(boxes, used)] == [True, True]
    predicted = [plain(model, features, image, used[image], (SIDE, SIDE)) for image in range(2)]
    wanted, truth = plain_losses(*zip(*predicted), used, objects, labels)
    wanted_terms = {name: torch.as_tensor(value) for name, value in wanted.items()}
    assert found == [] and set(losses) == set(wanted_terms) and sorted(filter(None, truth)) == [1, 2, 2, 3]
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted_terms[name], rtol=1e-3, atol=1e-4)


# Restricted matching


def test_the_lowest_cost_of_each_object():
    cost, group = torch.tensor([3.0, 1.0, 1.0, 5.0, 4.0]), torch.tensor([0, 0, 0, 3, 3])
    assert sorted(lowest(cost, group, 5).tolist()) == [1, 4]
    assert lowest(cost[:0], group[:0], 2).tolist() == []


def test_only_overlapping_proposals_are_matched_and_objects_without_any_are_added():
    model = heads().train()
    target = {"boxes": torch.tensor([[20.0, 20.0, 120.0, 120.0]]), "labels": torch.tensor([2])}
    away, near = torch.tensor([[150.0, 150.0, 200.0, 220.0]]), torch.tensor([[25.0, 20.0, 120.0, 125.0]])
    for boxes, given in ((away.repeat(10, 1), False), (torch.cat([away.repeat(9, 1), near]), True)):
        kept = [model._select([boxes], [target]) for _ in range(20)]
        overlapping = []
        for [chosen], [matched] in kept:
            assert 7 <= len(chosen) <= 10
            assert ((box_iou(chosen, target["boxes"])[:, 0] >= 0.5) == (matched == 0)).all()
            overlapping += chosen[matched == 0]
        assert len(overlapping) > 10 and all(torch.equal(box, near[0]) == given for box in overlapping)
    noisy = moved(target["boxes"].repeat(200, 1))
    assert box_iou(noisy, target["boxes"]).min() > 0.5 and not torch.equal(noisy[0], noisy[1])


def test_background_that_is_sure_costs_next_to_nothing():
    logits, labels = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    p = logits.softmax(-1)
    terms = [-math.log(p[0, 0]) * 0.1 * 2 * 0.25, -math.log(p[1, 0]) * 0.1 * 2 * p[1, 1] ** 2, -math.log(p[2, 1])]
    torch.testing.assert_close(class_loss(logits, labels), torch.as_tensor(sum(terms)) / 1.2, rtol=1e-4, atol=1e-6)


# What proposals know of others


@torch.no_grad()
def test_proposals_in_another_order_have_the_same_predictions_in_that_order():
    model, features, boxes, order = heads().eval(), maps(), random_boxes(8), torch.randperm(8)
    levels = list(features.values())[:4]
    for one, other in zip(
        model._predict(levels, [boxes], SIZES[:1]), model._predict(levels, [boxes[order]], SIZES[:1])
    ):
        torch.testing.assert_close(one[order], other, rtol=1e-4, atol=1e-5)


def test_gradients():
    model, features = heads().train(), {name: level.requires_grad_() for name, level in maps().items()}
    levels = list(features.values())
    logits, _ = model._predict(levels[:4], [random_boxes(5)], SIZES[:1])
    (gradient,) = torch.autograd.grad(logits[0].sum(), model.box_head.project.bias, retain_graph=True)
    assert gradient.any()
    regions = torch.randn(1, 3, DIM, 7, 7, requires_grad=True)
    mask = torch.tensor([[False, False, True]])
    model.predict(regions, torch.rand(1, 3, 4), mask)[0][0, 0].sum().backward()
    assert regions.grad[0, 0].any() and regions.grad[0, 1].any() and not regions.grad[0, 2].any()
    model.zero_grad()
    objects = random_boxes(3)
    targets = [{"boxes": objects, "labels": torch.tensor([1, 2, 3])}]
    _, losses = model(features, [torch.cat([random_boxes(9), objects])], SIZES[:1], targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert levels[0].grad.any() and levels[4].grad is None


def test_an_image_without_proposals():
    levels = list(maps(2).values())[:4]
    assert read_regions([level[:1] for level in levels], [torch.zeros(0, 4)]).shape == (0, DIM, 7, 7)
    model = heads().train()
    logits, steps = model._predict(levels, [random_boxes(3), torch.zeros(0, 4)], SIZES)
    (logits.sum() + steps.sum()).backward()
    assert len(logits) == 3 and all(p.grad.isfinite().all() for p in model.parameters())


# The detector


@torch.no_grad()
def test_the_proposal_network_skips_the_finest_level():
    network = ProposalNetwork(32).eval()
    seen = []
    network.head.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs)))
    levels = {str(n): torch.randn(1, 32, side, side) for n, side in enumerate((64, 32, 16, 8, 4, 2))}
    images = type("Images", (), {"image_sizes": [(SIDE, SIDE)], "tensors": torch.zeros(1, 3, SIDE, SIDE)})()
    [boxes], losses = network(images, levels)
    [(inputs, (objects, steps))] = seen
    assert losses == {} and [level.shape[-1] for level in inputs] == [32, 16, 8, 4, 2]
    assert objects[0].shape[1] == 9 and steps[0].shape[1] == 36 and 0 < len(boxes) <= 700
    anchors = network.anchor_generator.cell_anchors[0]
    areas = sorted({round(math.sqrt((w * h).item())) for w, h in anchors[:, 2:] - anchors[:, :2]})
    assert areas[0] == 32 and 50 <= areas[-1] <= 52


def test_dense_reaches_all_weights():
    images, called = batch((64, 96)).to("meta"), set()
    with torch.device("meta"):
        model = Baseline(BaselineConfig("tsp_rcnn", "resnet18", None), 4)
        for name, module in model.net.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.add(name))
        outputs = model.dense(images)
    missed = {name.rpartition(".")[0] for name, _ in model.net.named_parameters()} - called
    assert not missed and outputs["box"][0].shape == (1, 700, 5) and len(outputs["rpn"][0]) == 5


def test_evaluate_and_detect():
    model = build("tsp_rcnn_r50", weights=None, backbone="resnet18", image_size=96)
    data = open_data("data/coco_tiny", "val", limit=2)
    assert 0 <= evaluate(model, data, batch_size=2, progress=False)["AP"] < 5
    [found] = regolite.detect(model, data.image(0), threshold=0.0)
    assert len(found) == 100 and found.labels.max() < 90


@pytest.mark.slow
def test_it_learns_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    data = "scenes:2:val=1:size=96"
    sizes = {"backbone": "tiny", "weights": None, "frozen_stages": 0, "dim": 64}
    model = build("tsp_rcnn_tiny", len(open_data(data, "train").classes), **sizes)
    model.net.rpn._pre_nms_top_n = model.net.rpn._post_nms_top_n = {"training": 100, "testing": 100}
    assert ap_of_learned_images(model, tmp_path / "run", data, lr=1e-3, epochs=160) >= 90
