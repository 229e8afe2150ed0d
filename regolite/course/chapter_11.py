"""Checkers of notebook 11, the recurrent decoder: equations (4) to (6), the loop over the stages, relations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data import batch_images
from regolite.models.presets import build
from regolite.models.rego import Stage
from regolite.types import Prediction


@exercise(
    "11.1",
    "Which function has boxes in [0, 1] as its output, and what is its inverse?",
    "Convert the boxes to logits, add, and convert back.",
    "(inverse_sigmoid(boxes) + change).sigmoid()",
)
def correct(answer: Callable[..., Any]) -> str:
    """``answer(boxes, change)``: equation (4) for boxes."""
    boxes, change = torch.rand(2, 6, 4) * 0.98 + 0.01, 3 * torch.randn(2, 6, 4)
    found = answer(boxes, change)
    same_shape("the corrected boxes", found, (2, 6, 4))
    wanted = (inverse_sigmoid(boxes) + change).sigmoid()
    mistakes = (
        (boxes, "the boxes are unchanged: the change is not used."),
        (
            boxes + change,
            "the change was added to the boxes directly, so boxes leave the image: add before the sigmoid.",
        ),
        (
            (boxes + change).clamp(0, 1),
            "a clamped sum stays in [0, 1], but has no gradient at both ends: use logits.",
        ),
        (
            (boxes + change).sigmoid(),
            "the sigmoid was applied to the box itself: without a change, 0.5 would become 0.62.",
        ),
        ((boxes + change.sigmoid()), "the change is a change of logits; its own sigmoid has no meaning."),
        (inverse_sigmoid(boxes) + change, "these are still logits: take their sigmoid at the end."),
    )
    for wrong, message in mistakes:
        if alike(found, wrong) and not alike(found, wanted):
            raise Mistake(message)
    close("the corrected boxes", found, wanted)
    edge = torch.tensor([0.0, 0.5, 1.0, 1.0])
    if not answer(edge, torch.zeros(4)).isfinite().all():
        raise Mistake("a box with a 0 or a 1 gives infinity: clamp with a small eps, as inverse_sigmoid does.")
    if not answer(torch.full((4,), 0.3), torch.zeros(4, requires_grad=True)).requires_grad:
        raise Mistake("the change has no gradient: the box head could not learn.")
    return "All four numbers stay in [0, 1], and a small box is corrected in small steps."


class _Recorder:
    """A stage that records its inputs and shifts every box by a known amount in each of its two layers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weight = torch.tensor(0.1, requires_grad=True)
        self.called = False
        self.boxes = self.hidden = torch.empty(0)

    def __call__(self, features: Any, sizes: Tensor, hidden: Tensor, boxes: Tensor) -> tuple[list[Prediction], Tensor]:
        self.called, self.boxes, self.hidden = True, boxes, hidden
        logits = hidden.sum(-1, keepdim=True)
        layers = [Prediction(logits, (inverse_sigmoid(boxes) + n * self.weight).sigmoid()) for n in (1, 2)]
        return layers, torch.cat([hidden, hidden[..., :3] + self.number], -1)


@exercise(
    "11.2",
    "Which prediction of a stage is O_box(i): that of its first or its last decoder layer?",
    "What does appendix A.1 say about gradients into the outputs of the previous stage?",
    "stage(features, sizes, hidden, boxes.detach()), and boxes = predictions[-1].boxes.",
)
def run_stages(answer: Callable[..., Any]) -> str:
    """``answer(stages, features, sizes, hidden, boxes)``: predictions by stage, and the last hidden states."""
    stages = [_Recorder(i) for i in (1, 2, 3)]
    start = torch.rand(1, 4, 4, requires_grad=True)
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    sizes = torch.tensor([[32, 32]])
    result = answer(stages, [], sizes, hidden, start)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Mistake("the loop should return a pair: the predictions of all stages, and the last hidden states.")
    found, last = result
    if not all(stage.called for stage in stages):
        raise Mistake("not every stage was called.")
    if not isinstance(found, list) or len(found) != 3 or any(len(layers) != 2 for layers in found):
        raise Mistake("the first returned value should be a list of each stage's predictions by layer.")
    for before, stage in zip(stages, stages[1:]):
        where = f"stage {stage.number} should get"
        first, final = (p.boxes for p in found[before.number - 1])
        if alike(stage.boxes, start):
            raise Mistake(f"{where} the boxes of stage {before.number}, but gets those of the base detector.")
        if alike(stage.boxes, first) and not alike(stage.boxes, final):
            raise Mistake(f"{where} the boxes of the last layer of stage {before.number}, but gets those of its first.")
        close(f"the boxes of stage {stage.number}", stage.boxes, final.detach())
        same_shape(f"the hidden states that stage {stage.number} gets", stage.hidden, (1, 4, 3 * stage.number))
        if not stage.hidden.requires_grad:
            raise Mistake("the hidden states were detached between stages: the stages decide that, not the loop.")
    same_shape("the hidden states at the end", last, (1, 4, 12))
    for stage in stages:
        if stage.boxes.requires_grad:
            raise Mistake(
                f"the boxes that stage {stage.number} gets are not detached: its loss would change the previous boxes."
            )
    if not found[-1][-1].boxes.requires_grad:
        raise Mistake("the returned predictions are detached: they could not be trained.")
    return "Each stage starts from the previous stage's last prediction, without gradients into its boxes."


@exercise(
    "11.3",
    "A linear layer without bias from n to m channels has n * m weights. Which layers depend on the number?",
    "condense goes from number * dim to dim; each of the `layers` fuse layers from (number + 1) * dim to dim.",
    "(number + layers * (number + 1)) * dim * dim",
)
def weights_of_width(answer: Callable[..., Any]) -> str:
    """``answer(number, dim, layers)``: weights of the layers that depend on the width of the hidden states."""
    for number, dim, layers in ((3, 256, 2), (1, 256, 2), (2, 128, 2), (4, 64, 3)):
        found = answer(number, dim, layers)
        if not isinstance(found, (int, float)):
            raise Mistake(f"the answer should be a number, but is {type(found).__name__}.")
        square = dim * dim
        wanted = (number + layers * (number + 1)) * square
        mistakes = (
            (square, "this does not depend on the stage yet: condense alone reads number * dim channels."),
            (number * square, "that is `condense`; the `fuse` layers of the decoder layers are missing."),
            (layers * (number + 1) * square, "that is `fuse`; `condense`, which reads H_dec(i-1), is missing."),
            ((2 * number + 1) * square, "there is a `fuse` layer for every decoder layer, not one in all."),
            ((number + layers * number) * square, "`fuse` reads H_dec(i-1) and H_g(i): (number + 1) * dim channels."),
            (wanted + (layers + 1) * dim, "these layers have no bias."),
        )
        if found != wanted:
            for wrong, message in mistakes:
                if found == wrong:
                    raise Mistake(message)
            raise Mistake(f"stage {number} with {dim} channels and {layers} layers: {wanted:,} weights, not {found:,}.")
    return "It grows linearly with the stage: 1.6 M weights in all three at the paper's size, of 54 M."


@exercise(
    "11.4",
    "Rows are the attending queries, columns the attended ones. How can you reduce the dimension of the heads?",
    "A query attends to itself too, which is no relation. This weight is on the diagonal of the mean over the heads.",
    "mean = weights.mean(0); mean.fill_diagonal_(-1) on this new tensor; mean.topk(k, dim=1).indices",
)
def most_related(answer: Callable[..., Any]) -> str:
    """``answer(weights, k)``: for each query the k others to which its glimpse attends most."""
    heads, queries, k = 4, 9, 3
    weights = torch.softmax(2 * torch.randn(heads, queries, queries), -1)
    weights = (weights + torch.eye(queries)) / 2  # every query attends most to itself
    before = weights.clone()
    found = answer(weights, k)
    same_shape("the indices", found, (queries, k))
    if not torch.equal(weights, before):
        raise Mistake("your function changes its input weights: work on a copy.")

    def best(matrix: Tensor, largest: bool = True, others: bool = True) -> Tensor:
        blocked = float("-inf") if largest else float("inf")
        matrix = matrix.clone().fill_diagonal_(blocked) if others else matrix
        return matrix.topk(k, dim=1, largest=largest).indices

    mean = weights.mean(0)
    wanted = best(mean)
    mistakes = (
        (torch.zeros_like(wanted), "all indices are 0: there is no answer yet."),
        (best(mean, others=False), "each query is related to itself: leave the diagonal out."),
        (best(mean.T), "rows and columns are swapped: these are the queries that attend to a query."),
        (best(mean, largest=False), "these are the queries with the smallest weights."),
        (best(weights[0]), "only the first head was used: take the mean over all heads."),
        (best(weights.amax(0)), "this is the maximum over the heads: take the mean."),
        (wanted.flip(1), "the right queries, but in ascending order: put the largest weight first."),
    )
    for wrong, message in mistakes:
        if torch.equal(found, wrong) and not torch.equal(wrong, wanted):
            raise Mistake(message)
    if not torch.equal(found, wanted):
        row = int((found != wanted).any(1).nonzero()[0])
        raise Mistake(f"query {row} attends most to {wanted[row].tolist()}, not to {found[row].tolist()}.")
    return "Appendix A.3 shows this: the objects to which a glimpse attends."


@exercise(
    "11.5",
    "Each stage keeps its ratio: model.stages[i].alpha. What has to happen after the model has run?",
    "Save the old ratios, set the new ones, run the model, and restore the old ones in any case (`finally`).",
    "old = [s.alpha for s in model.stages]; try: set the new ones, run under no_grad; finally: set the old ones.",
)
def with_alphas(answer: Callable[..., Any]) -> str:
    """``answer(model, images, alphas)``: the output with other ratios, the model as before."""
    small = {
        "dim": 32,
        "heads": 4,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
        "detector.ffn_dim": 32,
        "queries": 6,
    }
    model = build("rego_deformable_detr_scenes", num_classes=4, rego={"ffn_dim": 32}, **small).eval()
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    images = batch_images([torch.randn(3, 64, 96)], multiple=32)

    def run(alphas: tuple[float, ...]) -> Tensor:
        for stage, alpha in zip(stages, alphas):
            stage.alpha = alpha
        with torch.no_grad():
            return torch.stack([p.logits for p in model(images).by_stage])

    trained, other = (3.0, 2.0, 1.0), (1.0, 4.0, 2.0)
    usual, backward, wanted = run(trained), run(other[::-1]), run(other)
    run(trained)
    output = answer(model, images, other)
    left = tuple(stage.alpha for stage in stages)
    if not hasattr(output, "by_stage"):
        raise Mistake("your function should return the model's output, a DetectorOutput.")
    found = torch.stack([p.logits for p in output.by_stage])
    same_shape("the logits of all stages", found, tuple(wanted.shape))
    if alike(found, usual):
        raise Mistake("the stages still use the ratios of the training: set stage.alpha of each.")
    if alike(found, backward):
        raise Mistake("the ratios are in the wrong order: alphas[0] belongs to stage 1.")
    close("the logits of all stages", found, wanted)
    if left != trained:
        raise Mistake(f"the model still has the ratios {left} afterwards: restore the old ones, {trained}.")
    if found.requires_grad:
        raise Mistake("the output requires gradients: run the model under torch.no_grad().")
    return "Now compare the results: the solutions do so on scenes."
