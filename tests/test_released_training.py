"""The released form of REGO trains as the authors' code does: its loss and gradients, by a second implementation.

The criterion below is written from facts about that code: which losses it weights, by how much, and whose pairs each
prediction is trained on. It goes prediction by prediction and image by image, and shares no code with the package.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from small_models import batch, shake

from regolite import build
from regolite.errors import UserError
from regolite.losses import LossConfig, SetLoss
from regolite.models.config import config_of
from regolite.types import Target

SIZES = {
    "dim": 32, "heads": 4, "detector.ffn_dim": 48, "rego.ffn_dim": 48, "detector.encoder_layers": 1,
    "detector.decoder_layers": 3, "queries": 9, "detector.dropout": 0.0, "rego.dropout": 0.0,
}  # fmt: skip
CLASSES = 4


def corners(boxes):
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], -1)


def giou(one, other):
    """GIoU of pairs of boxes, ``cxcywh``, number by number."""
    a, b = corners(one), corners(other)
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - inside
    return inside / union - (hull - union) / hull


def pairs(prediction, targets):
    """The queries and objects that the Hungarian algorithm matches in each image: 2 class + 5 L1 - 2 GIoU."""
    found = []
    for logits, boxes, target in zip(prediction.logits.detach(), prediction.boxes.detach(), targets):
        x, wanted = logits[:, target.labels], target.boxes.to(boxes.dtype)
        p = x.sigmoid()
        label = 0.25 * (1 - p) ** 2 * F.softplus(-x) - 0.75 * p**2 * F.softplus(x)
        distance = (boxes[:, None] - wanted).abs().sum(-1)
        cost = 2 * label + 5 * distance - 2 * giou(boxes[:, None].expand(-1, len(wanted), -1), wanted[None])
        found.append(linear_sum_assignment(cost.numpy()))
    return found


def loss_of(prediction, matched, targets, label_weight):
    """Focal loss over all classes, L1 and GIoU of the pairs, divided by the objects of the batch."""
    objects = max(1, sum(len(t) for t in targets))
    total = 0.0
    for logits, boxes, (queries, chosen), target in zip(prediction.logits, prediction.boxes, matched, targets):
        truth = torch.zeros_like(logits)
        for q, t in zip(queries, chosen):
            truth[q, target.labels[t]] = 1.0
            wanted = target.boxes[t].to(boxes.dtype)
            total = total + (5 * (boxes[q] - wanted).abs().sum() + 2 * (1 - giou(boxes[q], wanted))) / objects
        p = logits.sigmoid()
        focal = truth * 0.25 * (1 - p) ** 2 * F.softplus(-logits) + (1 - truth) * 0.75 * p**2 * F.softplus(logits)
        total = total + label_weight * focal.sum() / objects
    return total


def released_loss(output, targets):
    """The loss of the authors' training script with REGO on."""
    stages = [stage[-1] for stage in output.stages]  # the first layers' losses are computed and dropped
    by_stage = [pairs(stage, targets) for stage in stages]
    total = sum(loss_of(stage, matched, targets, 2.0) for stage, matched in zip(stages, by_stage))
    # The variable of the base detector's pairs is overwritten stage by stage: its last layer gets those of stage 3.
    total = total + loss_of(output.layers[-1], by_stage[-1], targets, 2.0 * 0.8)
    for layer in output.layers[:-1]:
        total = total + loss_of(layer, pairs(layer, targets), targets, 2.0 * 0.8)
    if output.proposals is not None:
        objects = [Target(torch.zeros_like(t.labels), t.boxes, t.image_id, t.size) for t in targets]
        total = total + loss_of(output.proposals, pairs(output.proposals, objects), objects, 2.0 * 0.8)
    return total


def make_targets(*counts):
    return [
        Target(
            torch.randint(CLASSES, (n,)), torch.cat([torch.rand(n, 2), 0.05 + 0.5 * torch.rand(n, 2)], -1), i, (9, 9)
        )
        for i, n in enumerate(counts)
    ]


@pytest.mark.parametrize("preset", ["deformable_detr", "deformable_detr_two_stage"])
@pytest.mark.parametrize("counts", [(3, 5), (0, 7)])
def test_loss_and_gradients_are_those_of_the_released_code(preset, counts):
    model = shake(build(f"rego_{preset}_scenes", CLASSES, form="released", **SIZES)).double().eval()
    images, targets = batch((64, 96), (96, 64)), make_targets(*counts)
    images.pixels = images.pixels.double()
    weights = list(model.parameters())

    config = config_of(model).loss
    loss, _ = SetLoss(config, model.scoring)(model(images), targets)
    ours = torch.autograd.grad(loss, weights, allow_unused=True)
    wanted = released_loss(output := model(images), targets)
    theirs = torch.autograd.grad(wanted, weights, retain_graph=True, allow_unused=True)
    assert math.isclose(float(loss.detach()), float(wanted.detach()), rel_tol=1e-6)
    for (name, _), gradient, other in zip(model.named_parameters(), ours, theirs):
        assert gradient is not None and other is not None, f"{name} is not trained"
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")

    own, last = (
        [list(zip(*one)) for one in pairs(prediction, targets)]
        for prediction in (output.layers[-1], output.stages[-1][-1])
    )
    assert own != last, "whose pairs the last layer has makes no difference here"
    otherwise = SetLoss(LossConfig(stage_auxiliary=False, base_label=0.8), model.scoring)(output, targets)[0]
    assert not math.isclose(float(otherwise.detach()), float(wanted.detach()), rel_tol=1e-4)


def test_pairs_of_the_last_stage_need_stages():
    model = shake(build("rego_deformable_detr_scenes", CLASSES, form="released", **SIZES))
    images, targets = batch((64, 64)), make_targets(3)
    with torch.no_grad():
        output = model(images, stages=0)
    losses = [
        SetLoss(LossConfig(base_matches=name), model.scoring)(output, targets)[0] for name in ("own", "last_stage")
    ]
    assert torch.equal(*losses)


def test_pairs_are_not_those_of_each_other():
    with pytest.raises(UserError, match="take their pairs from each other: change one of them to 'own'"):
        LossConfig(stage_matching="base", base_matches="last_stage")
