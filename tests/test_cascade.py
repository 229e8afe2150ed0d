"""Cascade R-CNN's heads: a plain second implementation, box by box; what a head is trained on; where gradients end."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import batch
from small_runs import ap_of_learned_images
from torch import nn
from torchvision.ops import box_iou, roi_align

import regolite
from regolite.data import open_data
from regolite.evaluation import evaluate
from regolite.models.baselines import Baseline, BaselineConfig
from regolite.models.cascade import LOSS_WEIGHTS, THRESHOLDS, CascadeHeads
from regolite.models.presets import build, configure

CLASSES, DIM, SIDE = 3, 8, 256
UNITS = torch.tensor([[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]])


def heads():
    model = CascadeHeads(DIM, CLASSES + 1)
    for stage in model.stages:
        stage.score_thresh = 0.2
        nn.init.normal_(stage.box_predictor.cls_score.weight, std=0.3)
        nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.2)
    return model


def maps():
    return {str(level): torch.randn(1, DIM, SIDE // 2 ** (level + 2), SIDE // 2 ** (level + 2)) for level in range(4)}


def random_boxes(count):
    corner = torch.rand(count, 2) * 150
    return torch.cat([corner, corner + 6 + torch.rand(count, 2) ** 2 * 200], 1).clamp(max=SIDE)


# A second implementation


def read(features, box, stage):
    """The logits and steps of one box."""
    side = math.sqrt(((box[2] - box[0]) * (box[3] - box[1])).item())
    level = min(max(math.floor(4 + math.log2(side / 224 + 1e-9)), 2), 5) - 2
    region = roi_align(features[str(level)], [box[None]], 7, 1 / 2 ** (level + 2), sampling_ratio=2, aligned=False)
    x = F.relu(F.linear(region.flatten(), stage.box_head.fc6.weight, stage.box_head.fc6.bias))
    x = F.relu(F.linear(x, stage.box_head.fc7.weight, stage.box_head.fc7.bias))
    outputs = (stage.box_predictor.cls_score, stage.box_predictor.bbox_pred)
    return tuple(F.linear(x, layer.weight, layer.bias) for layer in outputs)


def move(box, steps, units):
    dx, dy, dw, dh = (steps / units).tolist()
    x1, y1, x2, y2 = box.tolist()
    w, h = x2 - x1, y2 - y1
    cx, cy, w, h = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h, w * math.exp(dw), h * math.exp(dh)
    return torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).clamp(0, SIDE)


def steps_to(box, wanted, units):
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box.tolist(), wanted.tolist()
    w, h = x2 - x1, y2 - y1
    dx, dy = ((u1 + u2) / 2 - (x1 + x2) / 2) / w, ((v1 + v2) / 2 - (y1 + y2) / 2) / h
    return torch.tensor([dx, dy, math.log((u2 - u1) / w), math.log((v2 - v1) / h)]) * units


def plain_detections(model, features, proposals, threshold):
    """Class, score and box of each detection, highest-scoring first."""
    found = []
    for box in proposals:
        scores = torch.zeros(CLASSES + 1)
        for stage, units in zip(model.stages, UNITS):
            logits, steps = read(features, box, stage)
            scores += logits.softmax(0) / 3
            box = move(box, steps, units)
        found += [(scores[label].item(), label, box) for label in range(1, CLASSES + 1) if scores[label] > threshold]
    kept = []
    for score, label, box in sorted(found, key=lambda each: -each[0]):
        others = [other for _, same, other in kept if same == label]
        if not any(box_iou(box[None], other[None]) > 0.5 for other in others):
            kept.append((score, label, box))
    return kept


def plain_losses(model, features, proposals, objects, labels):
    """The losses of each head if no box is left out by the sampling."""
    losses, boxes = {}, list(proposals)
    for number, (stage, units) in enumerate(zip(model.stages, UNITS), start=1):
        label_loss, box_loss, corrected = 0.0, 0.0, []
        candidates = [*((box, False) for box in boxes), *((box, True) for box in objects)]
        for box, is_object in candidates:
            logits, steps = read(features, box, stage)
            overlaps = box_iou(box[None], objects)[0]
            hit = overlaps.max() >= (0.5, 0.6, 0.7)[number - 1]
            label = labels[overlaps.argmax()] if hit else torch.tensor(0)
            label_loss = label_loss - logits.log_softmax(0)[label]
            if hit:
                away = (steps - steps_to(box, objects[overlaps.argmax()], units)).abs()
                box_loss = box_loss + torch.where(away < 1, away**2 / 2, away - 0.5).sum()
            if not is_object:
                corrected.append(move(box, steps, units))
        weight = (1.0, 0.5, 0.25)[number - 1] / len(candidates)
        losses |= {f"loss_classifier_{number}": weight * label_loss, f"loss_box_reg_{number}": weight * box_loss}
        boxes = corrected
    return losses


@torch.no_grad()
def test_a_plain_second_implementation_detects_the_same():
    model, features, proposals = heads().eval(), maps(), random_boxes(30)
    [found], losses = model(features, [proposals], [(SIDE, SIDE)])
    wanted = plain_detections(model, features, proposals, 0.2)
    assert losses == {} and 10 < len(wanted) == len(found["scores"]) < 90
    assert found["labels"].tolist() == [label for _, label, _ in wanted]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in wanted]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], torch.stack([box for _, _, box in wanted]), rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_a_plain_second_implementation_has_the_same_losses():
    model, features, objects, labels = heads().train(), maps(), random_boxes(4), torch.tensor([1, 3, 2, 2])
    near, sides = objects.repeat(3, 1), (objects[:, 2:] - objects[:, :2]).repeat(3, 2)
    proposals = torch.cat([random_boxes(20), near + torch.randn(12, 4) * 0.05 * sides]).clamp(0, SIDE)
    found, losses = model(features, [proposals], [(SIDE, SIDE)], [{"boxes": objects, "labels": labels}])
    wanted = plain_losses(model, features, proposals, objects, labels)
    assert found == [] and set(losses) == set(wanted) and len(losses) == 2 * len(THRESHOLDS)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, wanted[name], rtol=1e-3, atol=1e-5)
    assert losses["loss_box_reg_3"] > 0
    assert LOSS_WEIGHTS == (1.0, 0.5, 0.25)


# What the heads are trained on


def training_batch():
    targets = [{"boxes": random_boxes(3), "labels": torch.tensor([1, 2, 3])}, {"boxes": torch.zeros(0, 4)}]
    targets[1]["labels"] = torch.zeros(0, dtype=torch.long)
    features = {name: torch.cat([value, maps()[name]]) for name, value in maps().items()}
    return features, [random_boxes(25), random_boxes(10)], [(SIDE, SIDE), (SIDE, 200)], targets


def test_proposals_in_another_order_have_the_same_losses():
    model, (features, proposals, sizes, targets) = heads().train(), training_batch()
    shuffled = [boxes[torch.randperm(len(boxes))] for boxes in proposals]
    [one, other] = [model(features, boxes, sizes, targets)[1] for boxes in (proposals, shuffled)]
    for name, loss in one.items():
        torch.testing.assert_close(loss, other[name], rtol=1e-4, atol=1e-6)


def test_a_head_reads_the_corrected_boxes_and_objects_once(monkeypatch):
    model, (features, proposals, sizes, targets) = heads().train(), training_batch()
    given = []
    for stage in model.stages:
        chosen = stage.select_training_samples
        monkeypatch.setattr(
            stage, "select_training_samples", lambda boxes, t, chosen=chosen: (given.append(boxes), chosen(boxes, t))[1]
        )
    model(features, proposals, sizes, targets)
    assert [[len(boxes) for boxes in each] for each in given] == [[25, 10]] * 3
    for boxes in (given[1], given[2]):
        assert all(not each.requires_grad for each in boxes)
        assert boxes[1][:, 2].max() <= 200 and min(each.min() for each in boxes) >= 0  # within its image
    assert not torch.equal(given[0][0], given[1][0]) and not torch.equal(given[1][0], given[2][0])


def test_gradients_stay_in_their_head():
    model, batched = heads().train(), training_batch()
    losses = model(*batched)[1]
    (losses["loss_classifier_2"] + losses["loss_box_reg_2"]).backward(retain_graph=True)
    reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"1"}
    sum(losses.values()).backward()
    named = dict(model.named_parameters())
    assert all(p.grad.any() for p in named.values() if p.requires_grad)
    assert {name.split(".")[2] for name, p in named.items() if not p.requires_grad} == {"mask_head", "mask_predictor"}


# The detector


def small(**fields):
    return Baseline(BaselineConfig("cascade_mask_rcnn", "resnet18", None, **fields), 4)


def test_dense_runs_all_heads():
    images = batch((64, 96)).to("meta")
    with torch.device("meta"):
        model, called = small(), []
        for name, module in model.net.named_modules():
            if name.endswith(("box_predictor", "mask_predictor")):
                module.register_forward_hook(lambda *_, name=name: called.append(name))
        outputs = model.dense(images)
        assert len(called) == 6
        trained = model.dense(images, training=True)
    assert outputs["box_3"][0].shape == (1000, 5) and outputs["box_3"][1].shape == (1000, 4)
    assert outputs["mask_3"].shape == (100, 5, 28, 28)
    assert set(trained) == {"rpn", "box_1", "box_2", "box_3"} and trained["box_1"][0].shape == (512, 5)


def test_evaluate_and_detect():
    model = build("cascade_mask_rcnn_x101", weights=None, backbone="resnet18", image_size=96)
    for stage in model.net.roi_heads.stages:
        stage.score_thresh = 0.0
    data = open_data("data/coco_tiny", "val", limit=2)
    assert 0 <= evaluate(model, data, batch_size=2, progress=False)["AP"] < 5
    [found] = regolite.detect(model, data.image(0), threshold=0.0)
    assert len(found) == 100 and found.labels.max() < 90
    assert configure("cascade_mask_rcnn_tiny").detector.backbone == "mobilenet_v2"


@pytest.mark.slow
def test_it_learns_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    monkeypatch.setattr("regolite.models.cascade.HIDDEN", 128)  # at full width, most of the time goes to these layers
    data = "scenes:2:val=1:size=96"
    sizes = {"backbone": "tiny", "weights": None, "frozen_stages": 0, "dim": 64}
    model = build("cascade_mask_rcnn_tiny", len(open_data(data, "train").classes), **sizes)
    model.net.rpn._pre_nms_top_n = model.net.rpn._post_nms_top_n = {"training": 100, "testing": 100}
    for stage in model.net.roi_heads.stages:
        stage.fg_bg_sampler.batch_size_per_image = 64
    assert ap_of_learned_images(model, tmp_path / "run", data, lr=2e-3, epochs=120) >= 90
