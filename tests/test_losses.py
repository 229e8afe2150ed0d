"""The set loss, against a plain computation of it: layer by layer, image by image, with torchvision's losses."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from regolite.boxes import paired_giou
from regolite.losses import LossConfig, SetLoss
from regolite.types import DetectorOutput, FeatureMap, Prediction, Target

CLASSES = 4
SCORINGS = ("softmax", "sigmoid")


def boxes(*shape):
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.6 * torch.rand(*shape, 2)], -1)


def make_targets(*counts):
    return [Target(torch.randint(CLASSES, (n,)), boxes(n), i, (100, 100)) for i, n in enumerate(counts)]


def make_prediction(batch=3, queries=6, columns=CLASSES):
    logits, box = torch.randn(batch, queries, columns), boxes(batch, queries)
    return Prediction(logits.requires_grad_(), box.requires_grad_())


def make_output(scoring, layers=2, stages=(2, 2), batch=3, proposals=None):
    columns = CLASSES + (scoring == "softmax")
    return DetectorOutput(
        layers=[make_prediction(batch, columns=columns) for _ in range(layers)],
        queries=torch.randn(batch, 6, 8),
        features=[FeatureMap(torch.randn(batch, 8, 2, 2), torch.zeros(batch, 2, 2, dtype=torch.bool), 32)],
        proposals=proposals,
        stages=[[make_prediction(batch, columns=columns) for _ in range(n)] for n in stages],
    )


def leaves(output):
    predictions = [*output.layers, *(p for stage in output.stages for p in stage)]
    return [tensor for p in predictions for tensor in (p.logits, p.boxes)]


def one_layer(prediction, targets, scoring, config, count, matched=None):
    """Classification, L1 and GIoU terms of one prediction, as DETR's and Deformable DETR's papers define them.

    The pairs are those of another prediction, ``matched``, where there is one.
    """
    matched = matched or prediction

    def formatted(x):
        return box_convert(x, "cxcywh", config.l1_boxes)

    picked, label_sum, weight_sum, l1, giou = [], 0.0, 0.0, 0.0, 0.0
    for b, target in enumerate(targets):
        logits, box = matched.logits[b], matched.boxes[b]
        with torch.no_grad():
            if scoring == "softmax":
                label = -logits.softmax(-1)[:, target.labels]
            else:
                p, a, g = logits.sigmoid()[:, target.labels], config.focal_alpha, config.focal_gamma
                label = a * (1 - p) ** g * -torch.log(p) - (1 - a) * p**g * -torch.log(1 - p)
            distance = (formatted(box)[:, None] - formatted(target.boxes)[None]).abs().sum(-1)
            overlap = generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (box, target.boxes)))
            cost = config.label_cost * label + config.l1_cost * distance - config.giou_cost * overlap
        picked.append(linear_sum_assignment(cost.numpy()))
        box = prediction.boxes[b]
        for q, t in zip(*picked[-1]):
            l1 = l1 + (formatted(box[q]) - formatted(target.boxes[t])).abs().sum() / count
            pair = (box_convert(x[None], "cxcywh", "xyxy") for x in (box[q], target.boxes[t]))
            giou = giou + (1 - generalized_box_iou(*pair)[0, 0]) / count
    for (queries, chosen), logits, target in zip(picked, prediction.logits, targets):
        if scoring == "sigmoid":
            truth = torch.zeros_like(logits)
            for q, t in zip(queries, chosen):
                truth[q, target.labels[t]] = 1.0
            label_sum = label_sum + sigmoid_focal_loss(logits, truth, config.focal_alpha, config.focal_gamma, "sum")
            weight_sum = count
        else:
            truth = torch.full((len(logits),), CLASSES)
            truth[torch.as_tensor(queries)] = target.labels[torch.as_tensor(chosen)]
            weight = torch.ones(CLASSES + 1)
            weight[CLASSES] = config.no_object
            label_sum = label_sum + F.cross_entropy(logits, truth, weight, reduction="sum")
            weight_sum = weight_sum + weight[truth].sum()
    return {"label": config.label * label_sum / weight_sum, "l1": config.l1 * l1, "giou": config.giou * giou}


def names_of(output):
    named = {f"base.{i}": p for i, p in enumerate(output.layers[:-1], 1)} | {"base": output.layers[-1]}
    for s, stage in enumerate(output.stages, 1):
        named |= {f"stage{s}.{i}": p for i, p in enumerate(stage[:-1], 1)} | {f"stage{s}": stage[-1]}
    return named


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("counts", [(2, 5, 3), (0, 1, 6)])
@pytest.mark.parametrize(("stage_matching", "l1_boxes"), [("own", "cxcywh"), ("base", "cxcywh"), ("own", "xyxy")])
def test_terms_are_those_of_a_plain_computation(scoring, counts, stage_matching, l1_boxes):
    weights = {"label": 1.5, "l1": 4.0, "giou": 2.5, "no_object": 0.2}
    costs = {"label_cost": 0.5, "l1_cost": 3.0, "giou_cost": 1.5, "focal_alpha": 0.4, "focal_gamma": 1.5}
    config = LossConfig(**weights, **costs, stage_matching=stage_matching, l1_boxes=l1_boxes)
    output, targets = make_output(scoring), make_targets(*counts)
    loss, terms = SetLoss(config, scoring)(output, targets)
    inherited = output.layers[-1] if stage_matching == "base" else None
    wanted = {
        f"{name}/{part}": value
        for name, prediction in names_of(output).items()
        for part, value in one_layer(
            prediction, targets, scoring, config, sum(counts), inherited if name.startswith("stage") else None
        ).items()
    }
    assert set(terms) == set(wanted)
    assert {"base.1/label", "base/l1", "stage1.1/giou", "stage2/label"} < set(terms)
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(loss, sum(wanted.values()))

    gradients = torch.autograd.grad(loss, leaves(output))
    plain = torch.autograd.grad(sum(wanted.values()), leaves(output))
    for gradient, other in zip(gradients, plain):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_cross_entropy_is_pytorchs_weighted_mean():
    output, targets = make_output("softmax", layers=1, stages=()), make_targets(2, 0, 1)
    _, terms = SetLoss(LossConfig(label=1.0), "softmax")(output, targets)
    [prediction] = output.layers
    plain = one_layer(prediction, targets, "softmax", LossConfig(label=1.0), 3)
    torch.testing.assert_close(terms["base/label"], plain["label"])
    # By default "no object" weighs a tenth, and the mean is weighted: without objects it is the plain mean.
    _, terms = SetLoss(LossConfig(label=1.0), "softmax")(output, make_targets(0, 0, 0))
    nothing = torch.full((18,), CLASSES)
    torch.testing.assert_close(terms["base/label"], F.cross_entropy(prediction.logits.flatten(0, 1), nothing))


def test_stage_auxiliary_off_leaves_out_the_stages_first_layers():
    output, targets = make_output("sigmoid"), make_targets(1, 2, 3)
    _, every = SetLoss(LossConfig(), "sigmoid")(output, targets)
    loss, terms = SetLoss(LossConfig(stage_auxiliary=False), "sigmoid")(output, targets)
    assert set(every) - set(terms) == {f"stage{s}.1/{part}" for s in (1, 2) for part in ("label", "l1", "giou")}
    for name, value in terms.items():
        torch.testing.assert_close(value, every[name])
    loss.backward()
    assert output.stages[0][0].logits.grad is None
    assert output.layers[0].logits.grad is not None  # the base detector keeps its auxiliary losses


def test_base_label_is_a_factor_of_the_base_detectors_classes_alone():
    output, targets = make_output("sigmoid", proposals=make_prediction(3, 10)), make_targets(1, 2, 3)
    _, plain = SetLoss(LossConfig(), "sigmoid")(output, targets)
    _, scaled = SetLoss(LossConfig(base_label=0.8), "sigmoid")(output, targets)
    for name, value in plain.items():
        factor = 0.8 if name in ("base/label", "base.1/label", "proposals/label") else 1.0
        torch.testing.assert_close(scaled[name], factor * value)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_no_object_in_the_whole_batch(scoring):
    output = make_output(scoring, proposals=make_prediction(3, 10))
    loss, terms = SetLoss(LossConfig(), scoring)(output, make_targets(0, 0, 0))
    assert loss.isfinite() and loss > 0
    assert all(value == 0 for name, value in terms.items() if not name.endswith("/label"))
    loss.backward()
    for tensor in [*leaves(output), output.proposals.logits, output.proposals.boxes]:
        assert tensor.grad.isfinite().all()
    assert all(p.boxes.grad.abs().max() == 0 for p in names_of(output).values())
    assert all(p.logits.grad.abs().max() > 0 for p in names_of(output).values())


@pytest.mark.parametrize("scoring", SCORINGS)
def test_order_of_the_objects_does_not_matter(scoring):
    output, targets = make_output(scoring), make_targets(4, 1, 5)
    shuffled = []
    for target in targets:
        order = torch.randperm(len(target))
        shuffled.append(Target(target.labels[order], target.boxes[order], target.image_id, target.size))
    (loss, terms), (other, others) = (SetLoss(LossConfig(), scoring)(output, t) for t in (targets, shuffled))
    torch.testing.assert_close(loss, other)
    for name, value in terms.items():
        torch.testing.assert_close(value, others[name])


def test_proposals_know_one_class():
    proposals = make_prediction(3, 12)
    output, targets = make_output("sigmoid", proposals=proposals), make_targets(2, 4, 1)
    _, terms = SetLoss(LossConfig(), "sigmoid")(output, targets)
    objects = [Target(torch.zeros_like(t.labels), t.boxes, t.image_id, t.size) for t in targets]
    for part, value in one_layer(proposals, objects, "sigmoid", LossConfig(), 7).items():
        torch.testing.assert_close(terms[f"proposals/{part}"], value)
    assert "proposals/label" not in SetLoss(LossConfig(), "sigmoid")(make_output("sigmoid"), targets)[1]


def test_num_boxes_divides_box_and_focal_terms():
    output, targets = make_output("sigmoid"), make_targets(2, 4, 2)
    _, own = SetLoss(LossConfig(), "sigmoid")(output, targets)
    _, same = SetLoss(LossConfig(), "sigmoid")(output, targets, num_boxes=8.0)
    _, half = SetLoss(LossConfig(), "sigmoid")(output, targets, num_boxes=16.0)
    _, least = SetLoss(LossConfig(), "sigmoid")(output, targets, num_boxes=0.25)  # never less than one
    for name, value in own.items():
        torch.testing.assert_close(same[name], value)
        torch.testing.assert_close(half[name], value / 2)
        torch.testing.assert_close(least[name], value * 8)


def test_num_boxes_leaves_the_cross_entropy_alone():
    output, targets = make_output("softmax"), make_targets(2, 4, 2)
    (_, own), (_, half) = (SetLoss(LossConfig(), "softmax")(output, targets, n) for n in (None, 16.0))
    torch.testing.assert_close(half["stage1/label"], own["stage1/label"])
    torch.testing.assert_close(half["stage1/l1"], own["stage1/l1"] / 2)


def test_half_precision_predictions_give_a_full_precision_loss():
    output, targets = make_output("sigmoid", stages=()), make_targets(1, 2, 3)
    half = [Prediction(p.logits.detach().bfloat16(), p.boxes.detach().bfloat16()) for p in output.layers]
    rounded = [Prediction(p.logits.float(), p.boxes.float()) for p in half]
    losses = []
    for layers in (half, rounded):
        output.layers = layers
        losses.append(SetLoss(LossConfig(), "sigmoid")(output, targets)[0])
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses)


def test_a_perfect_prediction_costs_next_to_nothing():
    targets = make_targets(2, 2, 2)
    logits = torch.full((3, 2, CLASSES), -12.0)
    for b, target in enumerate(targets):
        logits[b, range(2), target.labels] = 12.0
    perfect = Prediction(logits, torch.stack([t.boxes for t in targets]))
    output = make_output("sigmoid", layers=1, stages=())
    output.layers = [perfect]
    assert SetLoss(LossConfig(), "sigmoid")(output, targets)[0] < 1e-4
    output.layers = [Prediction(-logits, perfect.boxes)]
    assert SetLoss(LossConfig(), "sigmoid")(output, targets)[0] > 1


def test_predictions_that_are_not_finite_are_named():
    output, targets = make_output("sigmoid"), make_targets(2, 4, 1)
    output.stages[1][0].boxes.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite: stage2.1/boxes"):
        SetLoss(LossConfig(), "sigmoid")(output, targets)


def test_giou_of_pairs_is_the_diagonal_of_torchvisions_matrix():
    corners = torch.rand(2, 50, 2, 2).sort(2).values.flatten(2)  # [2, 50, 4], xyxy
    torch.testing.assert_close(paired_giou(*corners), generalized_box_iou(*corners).diag())
    flat = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)  # two boxes without area
    paired_giou(flat, flat.detach()).sum().backward()
    assert flat.grad.isfinite().all()
