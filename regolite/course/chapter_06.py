"""Checkers of notebook 06: the complete DETR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from regolite.boxes import to_xyxy
from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.models.detr import Detr, DetrConfig

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
        raise Mistake(f"{case} should be {wanted:.3f}, but is {found:.3f}.")
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
    close("the L1 term", l1, apart.sum() / objects, but=_l1_mistake(apart, l1, objects))
    overlap = generalized_box_iou_loss(to_xyxy(pairs), to_xyxy(wanted))
    but = ""
    if alike(giou, generalized_box_iou_loss(pairs, wanted).sum() / objects, 1e-5):
        but = "the GIoU term uses cxcywh boxes as corners: convert them first."
    elif alike(giou, overlap.mean(), 1e-5):
        but = "the GIoU term is the mean over the image's pairs; divide the sum by `objects`, those of the batch."
    close("the GIoU term", giou, overlap.sum() / objects, but=but)
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
