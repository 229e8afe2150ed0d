"""Exercises of notebook 06: DETR, whole."""

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
    "The softmax runs over all columns, 'no object' too: that is what makes an idle query's score small.",
    "Only then the last column is cut off, and `max(-1)` gives the best of the rest with its number.",
    "`logits.softmax(-1)[:, :-1].max(-1)` has both: values and indices.",
)
def read(answer: Callable[..., Any]) -> str:
    """Scores and labels of queries that are scored by a softmax with "no object"."""
    logits = torch.randn(12, 6) * 2
    logits[:6, -1] += 6.0  # six queries that are nearly sure of "no object"
    given = answer(logits.clone())
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise Mistake("return two tensors, the scores and the labels.")
    scores, labels = given
    same_shape("the scores", scores, (12,))
    same_shape("the labels", labels, (12,))
    probabilities = logits.softmax(-1)
    wanted, wanted_labels = probabilities[:, :-1].max(-1)
    if not scores.any():
        raise Mistake("the scores are all 0: nothing of the logits is in them yet.")
    if int(labels.max()) == 5:
        raise Mistake("a label is K, the column of 'no object'; it is no class, and must not be chosen.")
    alone, sigmoid = logits[:, :-1].softmax(-1).max(-1).values, logits[:, :-1].sigmoid().max(-1).values
    nothing = 1 - probabilities[:, -1]
    for mistaken, but in (
        (
            alone,
            "the softmax was taken without the column of 'no object', so that an idle query scores high.",
        ),
        (sigmoid, "a sigmoid scores each class by itself; these logits compete in a softmax."),
        (nothing, "that is the probability of any object at all; the score is that of the best class."),
        (logits[:, :-1].max(-1).values, "the scores are logits still, and not probabilities."),
    ):
        if torch.allclose(scores.float(), mistaken, atol=1e-4):
            raise Mistake(but)
    close("the scores", scores, wanted)
    if not torch.equal(labels.long(), wanted_labels):
        raise Mistake("a label is not the best class of its query.")
    return "A query that says 'no object' has a low score by itself; nobody need throw it away."


@exercise(
    "6.2",
    "Let p be the probability of 'no object' and 1 - p that of all classes together. Which queries pay what?",
    "(queries - objects) of them pay -w log p, and `objects` of them pay -log(1 - p) and something constant.",
    "a/p = b/(1 - p) has the solution p = a/(a + b), with a = weight * (queries - objects) and b = objects.",
)
def settles(answer: Callable[..., Any]) -> str:
    """The probability of "no object" that a network settles at which cannot tell its queries apart."""
    for queries, objects, weight in ((160, 22, 0.1), (100, 7, 0.1), (100, 7, 1.0), (300, 40, 0.5), (20, 5, 0.0)):
        found = answer(queries, objects, weight)
        found = float(found) if isinstance(found, (int, float, Tensor)) else found
        if not isinstance(found, float):
            raise Mistake(f"return a number; this is {type(found).__name__}.")
        idle = weight * (queries - objects)
        wanted = idle / (idle + objects)
        if abs(found - wanted) < 1e-3:
            continue
        case = f"for {queries} queries, {objects} objects and weight {weight:g} the answer"
        for mistaken, but in (
            ((queries - objects) / queries, "that leaves the weight out: it is the share of idle queries."),
            (objects / (idle + objects), "that is the probability of an object; 'no object' has the rest."),
            (idle / queries, "the weighted part is compared with the weights' sum, not with the number of queries."),
            (weight * queries / (weight * queries + objects), "not all queries are idle: `objects` of them have one."),
        ):
            if abs(found - mistaken) < 1e-3:
                raise Mistake(f"{case} is {found:.3f}: {but}")
        raise Mistake(f"{case} should be {wanted:.3f}, and is {found:.3f}.")
    return "On COCO that is 0.57 with weight 0.1 and 0.93 with weight 1: hardly a query would dare to speak."


@exercise(
    "6.3",
    "The probability of the right answer has a logit of its own: x where the truth is 1, and -x where it is 0.",
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
        (-pt.log(), "this is the plain cross-entropy: neither alpha_t nor (1 - p_t)^gamma is in it."),
        (-alphas * pt.log(), "(1 - p_t)^gamma is missing, the factor that lets easy answers go."),
        (-((1 - pt) ** 2) * pt.log(), "alpha_t is missing."),
        (-(1 - alphas) * (1 - pt) ** 2 * pt.log(), "alpha_t is the wrong way round: yes has alpha, no has 1 - alpha."),
        (-alphas * pt**2 * pt.log(), "it is (1 - p_t)^gamma and not p_t^gamma: the easy answers pay less."),
        (-0.25 * (1 - pt) ** 2 * pt.log(), "alpha_t depends on the truth: where the answer is no it is 1 - alpha."),
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
        raise Mistake("at a logit of 200 or -200 the loss is infinite or NaN: take F.logsigmoid, not log of a sigmoid.")
    extreme.sum().backward()
    if not far.grad.isfinite().all():
        raise Mistake("at a logit of 200 or -200 the gradient is NaN: take F.logsigmoid, not log of a sigmoid.")
    close("the loss at 200 where the truth is 0", extreme[0], 150.0, 1e-2)
    return "Equal to torchvision's, and finite however sure the network is."


@exercise(
    "6.4",
    "What is the true class of a query that has no object? Column 0 is a class like any other.",
    "`F.l1_loss` takes the mean, over pairs and over the four numbers. What should the sum be divided by?",
    "`generalized_box_iou_loss` wants corners; the boxes here are center, width and height.",
)
def image_loss(answer: Callable[..., Any]) -> str:
    """The three terms of one image's loss, whose usual mistakes are known."""
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
        but = "the GIoU term takes cxcywh boxes for corners: it measures the overlap of boxes that are not there."
    elif alike(giou, overlap.mean(), 1e-5):
        but = "the GIoU term is the mean over the image's pairs; divide the sum by `objects`, those of the batch."
    close("the GIoU term", giou, overlap.sum() / objects, but=but)
    (l1 + giou).backward()
    has_gradient("the boxes", boxes)
    return "Silence has its own column now, and every object of the batch counts alike."


def _label(logits: Tensor, labels: Tensor, query: Tensor, nothing: int, weighted: int | None = -1) -> Tensor:
    """The label term with a certain column as "no object", and a certain column weighing 0.1."""
    truth = torch.full((len(logits),), nothing)
    truth[query] = labels
    weight = torch.ones(logits.shape[1])
    if weighted is not None:
        weight[weighted] = 0.1
    return F.cross_entropy(logits, truth, weight)


def _label_mistake(logits: Tensor, labels: Tensor, query: Tensor, found: Tensor) -> str:
    zero = "queries without an object are taught class 0; 'no object' is the last column, number K."
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
        (apart.mean() / objects, "the L1 term is a mean, divided by `objects` once more; sum before you divide."),
        (apart.sum(), "the L1 term is not divided by `objects`."),
    ):
        if alike(found, mistaken, 1e-5):
            return but
    return ""


@exercise(
    "6.5",
    "Begin with the model's own head, `model.class_head.weight.detach().clone()`, and overwrite rows.",
    "`new_classes.index(name)` is a class's row in the model, `old_classes.index(name)` in `state`; -1 is the last.",
    "Put both mended tensors into a copy of `state` and load that with `strict=True`, which raises by itself.",
)
def adapt(answer: Callable[..., Any]) -> str:
    """Loading weights into a model with other classes, keeping what both know."""
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
            raise Mistake(f"{name} is not the checkpoint's: all but the class head is copied.")
    for case, bad in (
        ("lacks box_head.0.weight", _without(state)),
        ("has an unknown tensor", state | {"neck": state["box_head.0.bias"]}),
    ):
        try:
            answer(bad, OLD, _model(NEW), NEW)
        except (KeyError, RuntimeError, ValueError):
            continue
        raise Mistake(f"a state that {case} was loaded without a word; `strict=False` hides that.")
    return "The cat is still known, 'no object' too, and a wrong file is refused."


def _check_rows(state: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Raise where a row of the class head is not the right one."""
    for part in ("weight", "bias"):
        name = f"class_head.{part}"
        old, own, new = state[name], before[name], after[name]
        for row, cls in enumerate(NEW):
            if cls in OLD and torch.equal(new[row], old[OLD.index(cls)]):
                continue
            if row < len(OLD) and torch.equal(new[row], old[row]):
                raise Mistake(f"the row of {cls!r} in {name} was copied by its number, not by the class's name.")
            if cls in OLD:
                raise Mistake(f"the row of {cls!r} in {name} should come from the checkpoint: both know this class.")
            if torch.equal(new[row], old[-1]):
                raise Mistake(f"the row of {cls!r} in {name} is the checkpoint's 'no object': the last row moves.")
            if not torch.equal(new[row], own[row]):
                raise Mistake(f"the row of {cls!r} in {name} should stay as the model made it: the class is new.")
        if not torch.equal(new[-1], old[-1]):
            raise Mistake(f"the last row of {name} should be the checkpoint's last: both know 'no object'.")


def _model(classes: tuple[str, ...]) -> Detr:
    sizes = {"dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 16, "queries": 3}
    return Detr(DetrConfig(backbone="tiny", weights=None, frozen_stages=0, dropout=0.0, **sizes), len(classes))


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "box_head.0.weight"}
