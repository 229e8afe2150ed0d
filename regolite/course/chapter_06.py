"""Checkers of notebook 06: the complete DETR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from regolite.boxes import to_xyxy
from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.losses import LossConfig
from regolite.losses import SetLoss as Reference
from regolite.matching import MatchingCosts, PaddedTargets, match
from regolite.models.detr import Detr, DetrConfig
from regolite.types import DetectorOutput, FeatureMap, Prediction, Target

OLD = ("person", "cat", "dog")
NEW = ("zebra", "dog", "cat", "bus")


@exercise(
    "6.1",
    "The softmax is over all columns, including 'no object': this gives an unmatched query a low score.",
    "Then cut off the last column; `max(-1)` gives the best of the rest with its index.",
    "`logits.softmax(-1)[:, :-1].max(-1)` has both: values and indices.",
)
def read(answer: Callable[..., Any]) -> str:
    """Scores and labels of queries from a softmax with "no object"."""
    logits = torch.randn(12, 6) * 2
    logits[:6, -1] += 6.0  # six queries with a high probability of "no object"
    given = answer(logits.clone())
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise Mistake("return two tensors, the scores and the labels.")
    scores, labels = given
    same_shape("the scores", scores, (12,))
    same_shape("the labels", labels, (12,))
    probabilities = logits.softmax(-1)
    wanted, wanted_labels = probabilities[:, :-1].max(-1)
    if not scores.any():
        raise Mistake("the scores are all 0: they do not depend on the logits yet.")
    if int(labels.max()) == 5:
        raise Mistake("a label is K, the column of 'no object', which is not a class.")
    alone, sigmoid = logits[:, :-1].softmax(-1).max(-1).values, logits[:, :-1].sigmoid().max(-1).values
    nothing = 1 - probabilities[:, -1]
    for mistaken, but in (
        (
            alone,
            "the softmax leaves out the column of 'no object', so that unmatched queries have high scores.",
        ),
        (sigmoid, "a sigmoid scores each class independently; these logits need a softmax."),
        (nothing, "that is the probability of any object at all; the score is that of the best class."),
        (logits[:, :-1].max(-1).values, "the scores are still logits, not probabilities."),
    ):
        if torch.allclose(scores.float(), mistaken, atol=1e-4):
            raise Mistake(but)
    close("the scores", scores, wanted)
    if not torch.equal(labels.long(), wanted_labels):
        raise Mistake("a label is not the best class of its query.")
    return "A query that predicts 'no object' has a low score and needs no extra filter."


@exercise(
    "6.2",
    "Let p be the probability of 'no object' and 1 - p that of all classes together. What is the loss of each query?",
    "(queries - objects) of them have the loss -w log p, and `objects` of them -log(1 - p) plus a constant.",
    "a/p = b/(1 - p) has the solution p = a/(a + b), with a = weight * (queries - objects) and b = objects.",
)
def settles(answer: Callable[..., Any]) -> str:
    """The optimal probability of "no object" of a network that cannot distinguish its queries."""
    for queries, objects, weight in ((160, 22, 0.1), (100, 7, 0.1), (100, 7, 1.0), (300, 40, 0.5), (20, 5, 0.0)):
        found = answer(queries, objects, weight)
        found = float(found) if isinstance(found, (int, float, Tensor)) else found
        if not isinstance(found, float):
            raise Mistake(f"the answer should be a number, but is {type(found).__name__}.")
        idle = weight * (queries - objects)
        wanted = idle / (idle + objects)
        if abs(found - wanted) < 1e-3:
            continue
        case = f"for {queries} queries, {objects} objects and weight {weight:g} the answer"
        for mistaken, but in (
            ((queries - objects) / queries, "that ignores the weight: it is the share of unmatched queries."),
            (objects / (idle + objects), "that is the probability of an object; 'no object' has the rest."),
            (idle / queries, "divide by the sum of the weights, not by the number of queries."),
            (
                weight * queries / (weight * queries + objects),
                "not all queries are unmatched: `objects` of them have an object.",
            ),
        ):
            if abs(found - mistaken) < 1e-3:
                raise Mistake(f"{case} is {found:.3f}: {but}")
        raise Mistake(f"{case} is {found:.3f}, and the loss is lower elsewhere: set its derivative by p to zero.")
    return "On COCO that is 0.57 with weight 0.1 and 0.93 with weight 1: almost no query would predict an object."


@exercise(
    "6.3",
    "The probability of the correct answer has its own logit: x where the target is 1, and -x where it is 0.",
    "log p_t is `F.logsigmoid` of that logit, p_t its sigmoid.",
    "signed = logits * (2 * truth - 1); alpha_t = alpha * truth + (1 - alpha) * (1 - truth).",
)
def focal(answer: Callable[..., Any]) -> str:
    """The focal loss, element by element."""
    logits = (torch.randn(3, 4, 5) * 2).requires_grad_()
    truth = (torch.rand(3, 4, 5) < 0.3).float()
    x, t = logits.detach(), truth
    wanted = sigmoid_focal_loss(x, t, alpha=0.25, gamma=2)
    found = answer(logits, truth)
    if isinstance(found, Tensor) and not found.ndim:
        raise Mistake("the loss is one number; return one for each element, neither summed nor averaged.")
    same_shape("the loss", found, (3, 4, 5))
    p = x.sigmoid()
    pt, alphas = torch.where(t == 1, p, 1 - p), torch.where(t == 1, 0.25, 0.75)
    for mistaken, but in (
        (-pt.log(), "this is the plain cross-entropy, without alpha_t and (1 - p_t)^gamma."),
        (-alphas * pt.log(), "(1 - p_t)^gamma is missing, the factor that down-weights easy examples."),
        (-((1 - pt) ** 2) * pt.log(), "alpha_t is missing."),
        (-(1 - alphas) * (1 - pt) ** 2 * pt.log(), "alpha_t is inverted: positives have alpha, negatives 1 - alpha."),
        (
            -alphas * pt**2 * pt.log(),
            "it is (1 - p_t)^gamma and not p_t^gamma: easy examples should have a small loss.",
        ),
        (-0.25 * (1 - pt) ** 2 * pt.log(), "alpha_t depends on the target: for negatives it is 1 - alpha."),
        (-wanted, "the sign is wrong: a loss is not negative."),
    ):
        if torch.allclose(found.detach(), mistaken, atol=1e-4):
            raise Mistake(but)
    close("the loss", found, wanted)
    found.sum().backward()
    has_gradient("the logits", logits)
    other = answer(x, truth, alpha=0.6, gamma=1.0)
    close("the loss with alpha=0.6, gamma=1", other, sigmoid_focal_loss(x, t, alpha=0.6, gamma=1))
    far = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    extreme = answer(far, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    if not extreme.isfinite().all():
        raise Mistake(
            "at a logit of 200 or -200 the loss is infinite or NaN: use F.logsigmoid, not the log of a sigmoid."
        )
    extreme.sum().backward()
    if far.grad is None or not far.grad.isfinite().all():
        raise Mistake("at a logit of 200 or -200 the gradient is NaN: use F.logsigmoid, not the log of a sigmoid.")
    close("the loss at 200 where the target is 0", extreme[0], 150.0, 1e-2)
    return "Equal to torchvision's, and finite even for extreme logits."


@exercise(
    "6.4",
    "What is the target class of a query without an object? Column 0 is a class like any other.",
    "`F.l1_loss` takes the mean over pairs and the four numbers. What should the sum be divided by?",
    "`generalized_box_iou_loss` takes corners; the boxes here are center, width and height.",
)
def image_loss(answer: Callable[..., Any]) -> str:
    """The three terms of one image's loss."""
    logits, boxes = torch.randn(7, 5), torch.rand(7, 4) * 0.3 + 0.3
    boxes.requires_grad_()
    labels, query, objects = torch.tensor([2, 0, 3]), torch.tensor([4, 1, 6]), 8
    wanted = torch.rand(3, 4) * 0.3 + 0.3
    given = answer(logits, boxes, labels, wanted, query, objects)
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise Mistake("return three terms: label, l1, giou.")
    for name, term in zip(("the label term", "the L1 term", "the GIoU term"), given):
        same_shape(name, term, ())
    label, l1, giou = given
    close("the label term", label, _label(logits, labels, query, 4), but=_label_mistake(logits, labels, query, label))
    pairs = boxes.detach()[query]
    apart = (pairs - wanted).abs()
    close("the L1 term", l1.detach(), apart.sum() / objects, but=_l1_mistake(apart, l1, objects))
    overlap = generalized_box_iou_loss(to_xyxy(pairs), to_xyxy(wanted))
    but = ""
    if alike(giou, generalized_box_iou_loss(pairs, wanted).sum() / objects, 1e-5):
        but = "the GIoU term uses cxcywh boxes as corners: convert them first."
    elif alike(giou, overlap.mean(), 1e-5):
        but = "the GIoU term is the mean over the image's pairs; divide the sum by `objects`, those of the batch."
    close("the GIoU term", giou.detach(), overlap.sum() / objects, but=but)
    (l1 + giou).backward()
    has_gradient("the boxes", boxes)
    return "'No object' has its own column, and every object of the batch has the same weight."


def _label(logits: Tensor, labels: Tensor, query: Tensor, nothing: int, weighted: int | None = -1) -> Tensor:
    """The label term with a given column as "no object", and a given column with weight 0.1."""
    truth = torch.full((len(logits),), nothing)
    truth[query] = labels
    weight = torch.ones(logits.shape[1])
    if weighted is not None:
        weight[weighted] = 0.1
    return F.cross_entropy(logits, truth, weight)


def _label_mistake(logits: Tensor, labels: Tensor, query: Tensor, found: Tensor) -> str:
    zero = "queries without an object have class 0 as target; 'no object' is the last column, number K."
    for mistaken, but in (
        (_label(logits, labels, query, 0), zero),
        (_label(logits, labels, query, 0, 0), zero),
        (_label(logits, labels, query, 4, None), "'no object' weighs as much as an object in the label term."),
        (F.cross_entropy(logits[query], labels), "the label term leaves out the queries that have no object."),
    ):
        if alike(found, mistaken, 1e-5):
            return but
    return ""


def _l1_mistake(apart: Float[Tensor, "T 4"], found: Tensor, objects: int) -> str:
    for mistaken, but in (
        (
            apart.mean(),
            "the L1 term is a mean over pairs and numbers; sum, and divide by the batch's `objects`.",
        ),
        (apart.sum(-1).mean(), "the L1 term is divided by this image's objects, not by those of the batch."),
        (apart.mean() / objects, "the L1 term is a mean, divided by `objects` again; sum before you divide."),
        (apart.sum(), "the L1 term is not divided by `objects`."),
    ):
        if alike(found, mistaken, 1e-5):
            return but
    return ""


@exercise(
    "6.5",
    "Let P = len(named). Stack the logits to [P, B, Q, K]: `at = (pairs.prediction, pairs.image, pairs.query)` then "
    "indexes the matched queries of all predictions at once.",
    "Class targets: a tensor filled with K, or zeros of the shape of the logits; write padded.labels[pairs.image, "
    "pairs.target] into it at `at`.",
    "torch.zeros(P).index_add(0, pairs.prediction, values) sums one value per pair by prediction.",
    "Weighted cross-entropy of each prediction: (entropy * weight).sum((1, 2)) / weight.sum((1, 2)), both [P, B, Q].",
)
def set_loss(answer: Callable[..., Any]) -> str:
    """The loss of a whole output: all layers, both kinds of scores."""
    for scoring in ("softmax", "sigmoid"):
        config = LossConfig(label=1.5, l1=3.5, giou=3.0, label_cost=0.5, l1_cost=4.0, giou_cost=3.0, no_object=0.2)
        _compare_losses(answer, config, scoring, *_output(scoring))
    output, targets = _output("softmax", stages=0)
    _compare_losses(answer, LossConfig(label=1.0, label_cost=1.0), "softmax", output, targets)
    output, targets = _output("sigmoid")
    _compare_losses(answer, LossConfig(), "sigmoid", output, targets, num_boxes=20.0)
    for scoring in ("softmax", "sigmoid"):
        output, targets = _output(scoring)
        none = [Target(t.labels[:0], t.boxes[:0], t.image_id, t.size) for t in targets]
        try:
            total, _ = answer(LossConfig(), scoring)(output, none)
        except Exception as error:  # the learner's error is explained
            raise Mistake(f"a batch without objects raises {type(error).__name__}: {error}") from error
        wanted, _ = Reference(LossConfig(), scoring)(output, none)
        if not total.isfinite():
            raise Mistake("the loss of a batch without objects is NaN or infinite: divide by at least 1.")
        close(f"with scoring={scoring!r}, the loss of a batch without objects", total.detach(), wanted)
        total.backward()
        has_gradient("the logits of a batch without objects", output.layers[0].logits)
    return "Every layer has its terms; they agree with the package's for both kinds of scores, and so do the gradients."


def _output(scoring: str, stages: int = 2) -> tuple[DetectorOutput, list[Target]]:
    """Random predictions of three images with 3, 0 and 2 objects."""
    columns = 4 if scoring == "sigmoid" else 5

    def boxes(*size: int) -> Tensor:
        return torch.cat([torch.rand(*size, 2) * 0.5 + 0.25, torch.rand(*size, 2) * 0.3 + 0.1], -1)

    def layer() -> Prediction:
        return Prediction((2 * torch.randn(3, 6, columns)).requires_grad_(), boxes(3, 6).requires_grad_())

    features = [FeatureMap(torch.zeros(3, 2, 1, 1), torch.zeros(3, 1, 1, dtype=torch.bool), 32)]
    stage_layers = [[layer(), layer()] for _ in range(stages)]
    output = DetectorOutput([layer() for _ in range(3)], torch.zeros(3, 6, 2), features, stages=stage_layers)
    targets = [Target(torch.randint(4, (n,)), boxes(n), image_id, (100, 100)) for image_id, n in enumerate((3, 0, 2))]
    return output, targets


def _compare_losses(
    answer: Callable[..., Any],
    config: LossConfig,
    scoring: str,
    output: DetectorOutput,
    targets: list[Target],
    num_boxes: float | None = None,
) -> None:
    """Raise a Mistake if total, terms or gradients differ from the package's."""
    options = {} if num_boxes is None else {"num_boxes": num_boxes}
    given = answer(config, scoring)(output, targets, **options)
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], dict):
        raise Mistake("return two things: the total, and a dict with the terms by name.")
    total, terms = given
    wanted_total, wanted = Reference(config, scoring)(output, targets, num_boxes)
    _check_names(set(terms), set(wanted))
    where = f"with scoring={scoring!r} and num_boxes={num_boxes:g} " if num_boxes else f"with scoring={scoring!r} "
    for part in ("label", "l1", "giou"):
        names = [name for name in wanted if name.endswith(f"/{part}")]
        for name in names:
            same_shape(f"the term {name!r}", terms[name], ())
        if all(alike(terms[name], wanted[name]) for name in names):
            continue
        for said, mistake in _LOSS_MISTAKES[part]:
            mistaken = _wrong_terms(config, scoring, output, targets, num_boxes, **mistake)
            if all(alike(terms[name], mistaken[name]) for name in names):
                raise Mistake(where + said)
        wrong = next(name for name in names if not alike(terms[name], wanted[name]))
        close(f"{where}the term {wrong!r}", terms[wrong].detach(), wanted[wrong])
    same_shape("the total", total, ())
    if alike(total, wanted_total / len(wanted)):
        raise Mistake("the total is the mean of the terms; it is their sum.")
    close("the total, the sum of all terms,", total.detach(), wanted_total, 1e-3)
    leaves = [leaf for layer in _layers(output) for leaf in (layer.logits, layer.boxes)]
    if not total.requires_grad:
        raise Mistake("the total has no gradient: an operation is detached or under torch.no_grad().")
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    if any(one is None for one in found):
        raise Mistake("no gradient flows back to logits or boxes: an operation is detached or not differentiable.")
    for one, other in zip(found, torch.autograd.grad(wanted_total, leaves)):
        close("the gradient", one, other, 1e-3)


def _layers(output: DetectorOutput) -> list[Prediction]:
    return [*output.layers, *(layer for stage in output.stages for layer in stage)]


def _check_names(found: set[str], wanted: set[str]) -> None:
    """Raise a Mistake if terms are missing, or have other names."""
    if found == wanted:
        return
    if not any(name.startswith("stage") for name in found) and any(name.startswith("stage") for name in wanted):
        raise Mistake("the terms of REGO's stages are missing: name_predictions(output) has them.")
    if found and found < wanted and not any("." in name for name in found):
        raise Mistake("only last layers have a loss: the auxiliary losses of the other layers are missing.")
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    said = [f"{missing[0]!r} is missing"] if missing else []
    said += [f"{unknown[0]!r} is unknown"] if unknown else []
    raise Mistake(f"the names of the terms are wrong: {' and '.join(said)}. A name is 'layer/part'.")


_EVERY_TERM: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all layers have the pairs of the last one; match every layer.", {"all": "last"}),
    ("the matching does not have the weights of the config.", {"all": "costs"}),
    ("the matching has the weights of the loss; its own are label_cost, l1_cost, giou_cost.", {"all": "loss weights"}),
    ("N counts every object once for each prediction: it is the number of objects, not of pairs.", {"all": "pairs"}),
    ("N counts padding: `counts` of the padded targets has the true numbers of objects.", {"all": "padding"}),
    ("`num_boxes` is ignored.", {"all": "ignored"}),
)
"""Mistakes that show in each of the three terms."""

_LOSS_MISTAKES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "label": (
        ("the label term lacks its weight, config.label.", {"weights": LossConfig(label=1.0)}),
        ("queries without an object have class 0 as target.", {"label": "zero"}),
        ("'no object' weighs as much as an object: its weight is config.no_object.", {"label": "unweighted"}),
        ("the weight of 'no object' is a fixed 0.1; it is config.no_object.", {"no_object": 0.1}),
        (
            "the weighted entropies are divided by the number of queries; divide by the sum of the weights.",
            {"label": "mean"},
        ),
        ("the label term is divided by the number of boxes; divide by the sum of the weights.", {"label": "boxes"}),
        ("the label term leaves out the queries without an object.", {"label": "matched"}),
        ("the label term is computed for each image and averaged; normalize over the batch.", {"label": "images"}),
        ("the label term is a mean over all queries and classes; divide the sum by the number of boxes.",
         {"label": "focal mean"}),
        ("the label term is not divided by the number of boxes.", {"label": "undivided"}),
        ("the label term is the plain cross-entropy, not the focal loss.", {"label": "entropy"}),
        ("the label term has no alpha.", {"label": "alpha"}),
        *_EVERY_TERM,
    ),
    "l1": (
        ("the L1 term lacks its weight, config.l1.", {"weights": LossConfig(l1=1.0)}),
        ("the L1 term is a mean over the four numbers; sum them.", {"l1": "mean"}),
        ("the L1 term is not divided by the number of boxes.", {"box": "undivided"}),
        ("the L1 term is averaged within each image first; every object of the batch counts the same.",
         {"box": "images"}),
        ("the L1 term is divided by the number of queries; divide by the number of boxes.", {"box": "queries"}),
        ("the L1 term is divided by the number of images; divide by the number of boxes.", {"box": "batch"}),
        ("the L1 term compares corners; L1 is of cxcywh.", {"l1": "corners"}),
        *_EVERY_TERM,
    ),
    "giou": (
        ("the GIoU term lacks its weight, config.giou.", {"weights": LossConfig(giou=1.0)}),
        ("the GIoU term uses cxcywh boxes as corners: convert them first.", {"giou": "centers"}),
        ("the GIoU term is GIoU itself; the loss is 1 - GIoU.", {"giou": "itself"}),
        ("the GIoU term is -GIoU; the loss is 1 - GIoU.", {"giou": "minus"}),
        ("the GIoU term is not divided by the number of boxes.", {"box": "undivided"}),
        ("the GIoU term is averaged within each image first; every object of the batch counts the same.",
         {"box": "images"}),
        ("the GIoU term is divided by the number of queries; divide by the number of boxes.", {"box": "queries"}),
    ),
}  # fmt: skip


def _wrong_terms(
    config: LossConfig,
    scoring: str,
    output: DetectorOutput,
    targets: Sequence[Target],
    num_boxes: float | None,
    weights: LossConfig | None = None,
    no_object: float | None = None,
    label: str = "",
    l1: str = "",
    giou: str = "",
    box: str = "",
    **kind: str,
) -> dict[str, Tensor]:
    """The terms of a loss with a known mistake."""
    padded, every = PaddedTargets.of(targets), kind.get("all", "")
    count = float(len(padded)) if num_boxes is None or every == "ignored" else num_boxes
    costs = MatchingCosts(config.label_cost, config.l1_cost, config.giou_cost)
    costs = {"costs": MatchingCosts(), "loss weights": MatchingCosts(config.label, config.l1, config.giou)}.get(
        every, costs
    )
    named, terms, c = _named(output), {}, weights or config
    if every in ("pairs", "padding"):
        count = float(padded.labels.numel() if every == "padding" else len(padded) * len(named))
    for name, prediction in named.items():
        pairs = match([named["base"] if every == "last" else prediction], padded, scoring, costs)
        at, labels = (pairs.image, pairs.query), padded.labels[pairs.image, pairs.target]
        logits = prediction.logits.detach()
        if scoring == "softmax":
            w = config.no_object if no_object is None else no_object
            terms[f"{name}/label"] = c.label * _wrong_softmax(logits, at, labels, w, count, label)
        else:
            terms[f"{name}/label"] = c.label * _wrong_focal(logits, at, labels, count, label)
        found, wanted = prediction.boxes.detach()[at], padded.boxes[pairs.image, pairs.target]
        distance = (to_xyxy(found) - to_xyxy(wanted) if l1 == "corners" else found - wanted).abs()
        distance = distance.mean(-1) if l1 == "mean" else distance.sum(-1)
        corners = (found, wanted) if giou == "centers" else (to_xyxy(found), to_xyxy(wanted))
        overlap = generalized_box_iou_loss(*corners)
        overlap = {"itself": 1 - overlap, "minus": overlap - 1}.get(giou, overlap)
        for part, values in (("l1", distance), ("giou", overlap)):
            terms[f"{name}/{part}"] = getattr(c, part) * _normalized(values, pairs.image, count, prediction, box)
    return terms


def _named(output: DetectorOutput) -> dict[str, Prediction]:
    named: dict[str, Prediction] = {}
    for decoder, layers in [("base", output.layers), *((f"stage{i}", s) for i, s in enumerate(output.stages, 1))]:
        named |= {f"{decoder}.{i}": layer for i, layer in enumerate(layers[:-1], 1)} | {decoder: layers[-1]}
    return named


def _normalized(values: Tensor, image: Tensor, count: float, prediction: Prediction, how: str) -> Tensor:
    batch, queries = prediction.boxes.shape[:2]
    if how == "images":
        return torch.stack([values[image == b].mean() for b in image.unique()]).mean()
    return values.sum() / {"undivided": 1, "queries": batch * queries, "batch": batch}.get(how, count)


def _wrong_softmax(
    logits: Tensor, at: tuple[Tensor, Tensor], labels: Tensor, no_object: float, count: float, how: str
) -> Tensor:
    nothing = logits.shape[-1] - 1
    truth = torch.full(logits.shape[:2], 0 if how == "zero" else nothing)
    truth[at] = labels
    idle = torch.ones_like(truth, dtype=torch.bool)
    idle[at] = False
    weight = torch.where(idle, 1.0 if how == "unweighted" else 0.0 if how == "matched" else no_object, 1.0)
    entropy = weight * F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
    if how == "images":
        return (entropy.sum(1) / weight.sum(1)).mean()
    return entropy.sum() / {"mean": truth.numel(), "boxes": count}.get(how, float(weight.sum()))


def _wrong_focal(logits: Tensor, at: tuple[Tensor, Tensor], labels: Tensor, count: float, how: str) -> Tensor:
    truth = torch.zeros_like(logits)
    positives = (*at, labels)
    truth[positives] = 1.0
    loss = sigmoid_focal_loss(logits, truth, alpha=-1.0 if how == "alpha" else 0.25, gamma=2)
    if how == "entropy":
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if how == "matched":
        loss = loss[at]
    return loss.sum() / {"focal mean": truth.numel(), "mean": truth[..., 0].numel(), "undivided": 1}.get(how, count)


@exercise(
    "6.6",
    "Begin with the model's own head, `model.class_head.weight.detach().clone()`, and overwrite rows.",
    "`new_classes.index(name)` is a class's row in the model, `old_classes.index(name)` in `state`; -1 is the last.",
    "Put both new tensors into a copy of `state` and load it with `strict=True`, which raises an error itself.",
)
def adapt(answer: Callable[..., Any]) -> str:
    """Loading weights into a model with other classes, keeping the rows of common classes."""
    state = {name: value + 1.0 for name, value in _model(OLD).state_dict().items()}
    model = _model(NEW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer(dict(state), OLD, model, NEW)
    after = model.state_dict()
    for part in ("weight", "bias"):
        same_shape(f"class_head.{part} of the model", after[f"class_head.{part}"], before[f"class_head.{part}"].shape)
    _check_rows(state, before, after)
    for name in sorted(set(state) - {"class_head.weight", "class_head.bias"}):
        if not torch.equal(after[name], state[name]):
            raise Mistake(f"{name} is not the checkpoint's: copy everything except the class head.")
    for case, bad in (
        ("lacks box_head.0.weight", _without(state)),
        ("has an unknown tensor", state | {"neck": state["box_head.0.bias"]}),
    ):
        try:
            answer(bad, OLD, _model(NEW), NEW)
        except (KeyError, RuntimeError, ValueError):
            continue
        raise Mistake(f"a state that {case} was loaded without an error; `strict=False` hides that.")
    return "The rows of 'cat' and 'no object' are kept, and a wrong file is rejected."


def _check_rows(state: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Raise a Mistake if a row of the class head is wrong."""
    for part in ("weight", "bias"):
        name = f"class_head.{part}"
        old, own, new = state[name], before[name], after[name]
        for row, cls in enumerate(NEW):
            if cls in OLD and torch.equal(new[row], old[OLD.index(cls)]):
                continue
            if row < len(OLD) and torch.equal(new[row], old[row]):
                raise Mistake(f"the row of {cls!r} in {name} was copied by its number, not by the class's name.")
            if cls in OLD:
                raise Mistake(f"the row of {cls!r} in {name} should come from the checkpoint: both have this class.")
            if torch.equal(new[row], old[-1]):
                raise Mistake(f"the row of {cls!r} in {name} is the checkpoint's 'no object': the last row moves.")
            if not torch.equal(new[row], own[row]):
                raise Mistake(f"the row of {cls!r} in {name} should keep its initial value: the class is new.")
        if not torch.equal(new[-1], old[-1]):
            raise Mistake(f"the last row of {name} should be the checkpoint's last: both have 'no object'.")


def _model(classes: tuple[str, ...]) -> Detr:
    config = DetrConfig(
        backbone="tiny", weights=None, frozen_stages=0, dropout=0.0, dim=16, heads=2, encoder_layers=1,
        decoder_layers=1, ffn_dim=16, queries=3,
    )  # fmt: skip
    return Detr(config, len(classes))


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "box_head.0.weight"}
