"""Notebook 11, the recurrent decoder: equations (4) to (6), the loop over the stages, relations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data import batch_images
from regolite.models.presets import build
from regolite.types import Prediction


@exercise(
    "11.1",
    "Which function has boxes in [0, 1] as its output, and what is its inverse?",
    "Go to the logits of the boxes, add there, and come back.",
    "(inverse_sigmoid(boxes) + change).sigmoid()",
)
def correct(answer: Callable[..., Any]) -> str:
    """``answer(boxes, change)``: equation (4) for boxes."""
    boxes, change = torch.rand(2, 6, 4) * 0.98 + 0.01, 3 * torch.randn(2, 6, 4)
    found = answer(boxes, change)
    same_shape("the corrected boxes", found, (2, 6, 4))
    wanted = (inverse_sigmoid(boxes) + change).sigmoid()
    mistakes = (
        (boxes, "the boxes come back as they were: the change is not used."),
        (
            boxes + change,
            "boxes and change were added as they are, so boxes leave the image: add before the sigmoid.",
        ),
        (
            (boxes + change).clamp(0, 1),
            "a clamped sum stays in [0, 1], but stops learning at both ends: use logits.",
        ),
        ((boxes + change).sigmoid(), "the sigmoid was taken of the box itself: with no change, 0.5 would become 0.62."),
        ((boxes + change.sigmoid()), "the change is a change of logits, and its sigmoid means nothing by itself."),
        (inverse_sigmoid(boxes) + change, "these are logits still: take their sigmoid at the end."),
    )
    for wrong, said in mistakes:
        if alike(found, wrong) and not alike(found, wanted):
            raise Mistake(said)
    close("the corrected boxes", found, wanted)
    edge = torch.tensor([0.0, 0.5, 1.0, 1.0])
    if not answer(edge, torch.zeros(4)).isfinite().all():
        raise Mistake(
            "a box with a 0 or a 1 gives infinity: keep away from both by a small eps, as inverse_sigmoid does."
        )
    if not answer(torch.full((4,), 0.3), torch.zeros(4, requires_grad=True)).requires_grad:
        raise Mistake("no gradient reaches the change: the box head would learn nothing.")
    return "All four numbers stay in [0, 1], and a small box is corrected in small steps."


class _Recorder:
    """A stage that notes what it is given, and moves every box by a known amount in each of its two layers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weight = torch.tensor(0.1, requires_grad=True)
        self.boxes: Tensor | None = None
        self.hidden: Tensor | None = None

    def __call__(self, features: Any, sizes: Tensor, hidden: Tensor, boxes: Tensor) -> tuple[list[Prediction], Tensor]:
        self.boxes, self.hidden = boxes, hidden
        logits = hidden.sum(-1, keepdim=True)
        layers = [Prediction(logits, (inverse_sigmoid(boxes) + n * self.weight).sigmoid()) for n in (1, 2)]
        return layers, torch.cat([hidden, hidden[..., :3] + self.number], -1)


@exercise(
    "11.2",
    "Which prediction of a stage is O_box(i): that of its first decoder layer, or that of its last?",
    "What did appendix A.1 say of gradients into the outputs of the previous stage?",
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
        raise Mistake("the loop should return two things: the predictions of all stages, and the last hidden states.")
    found, last = result
    if any(stage.boxes is None for stage in stages):
        raise Mistake("not every stage was called.")
    if not isinstance(found, list) or len(found) != 3 or any(len(layers) != 2 for layers in found):
        raise Mistake("the first thing returned should be a list of each stage's predictions by layer.")
    for before, stage in zip(stages, stages[1:]):
        where = f"stage {stage.number} should get"
        first, final = (p.boxes for p in found[before.number - 1])
        if alike(stage.boxes, start):
            raise Mistake(f"{where} the boxes of stage {before.number}, and gets those of the base detector.")
        if alike(stage.boxes, first) and not alike(stage.boxes, final):
            raise Mistake(f"{where} what stage {before.number} says in its last layer, and gets that of its first.")
        close(f"the boxes of stage {stage.number}", stage.boxes, final.detach())
        same_shape(f"the hidden states that stage {stage.number} gets", stage.hidden, (1, 4, 3 * stage.number))
        if not stage.hidden.requires_grad:
            raise Mistake("the hidden states were detached between stages: stages decide that, not the loop.")
    same_shape("the hidden states at the end", last, (1, 4, 12))
    for stage in stages:
        if stage.boxes.requires_grad:
            raise Mistake(
                f"the boxes that stage {stage.number} gets are not detached: its loss would move the boxes before it."
            )
    if not found[-1][-1].boxes.requires_grad:
        raise Mistake("the predictions that you return are detached: nothing could be learned from them.")
    return "Each stage starts from the last word of the one before, and leaves its boxes alone."


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
            raise Mistake(f"the answer should be a number, and is {type(found).__name__}.")
        square = dim * dim
        wanted = (number + layers * (number + 1)) * square
        mistakes = (
            (square, "this does not depend on the stage yet: condense alone reads number * dim channels."),
            (number * square, "that is `condense`; the `fuse` layers of the decoder layers are missing."),
            (layers * (number + 1) * square, "that is `fuse`; `condense`, by which H_dec(i-1) is asked, is missing."),
            ((2 * number + 1) * square, "there is a `fuse` for every decoder layer, not one."),
            ((number + layers * number) * square, "`fuse` reads H_dec(i-1) and H_g(i): (number + 1) * dim channels."),
            (wanted + (layers + 1) * dim, "these layers have no bias."),
        )
        if found != wanted:
            for wrong, said in mistakes:
                if found == wrong:
                    raise Mistake(said)
            raise Mistake(f"stage {number} with {dim} channels and {layers} layers: {wanted:,} weights, not {found:,}.")
    return "It grows linearly with the stage: 1.6 M weights in all three at the paper's size, of 54 M."


@exercise(
    "11.4",
    "Rows ask, columns are asked. Heads are one dimension too many: what is a fair way to get rid of it?",
    "A query listens to itself as well; it is no relation. Its weight is on the diagonal of the mean over the heads.",
    "mean = weights.mean(0); mean.fill_diagonal_(-1) on this new tensor; mean.topk(k, dim=1).indices",
)
def most_related(answer: Callable[..., Any]) -> str:
    """``answer(weights, k)``: for each query the k others that its glimpse listens to most."""
    heads, queries, k = 4, 9, 3
    weights = torch.softmax(2 * torch.randn(heads, queries, queries), -1)
    weights = (weights + torch.eye(queries)) / 2  # everybody listens to itself most
    before = weights.clone()
    found = answer(weights, k)
    same_shape("the indices", found, (queries, k))
    if not torch.equal(weights, before):
        raise Mistake("your function changes the weights that it was given: work on a copy.")

    def best(matrix: Tensor, largest: bool = True, others: bool = True) -> Tensor:
        blocked = float("-inf") if largest else float("inf")
        matrix = matrix.clone().fill_diagonal_(blocked) if others else matrix
        return matrix.topk(k, dim=1, largest=largest).indices

    mean = weights.mean(0)
    wanted = best(mean)
    mistakes = (
        (torch.zeros_like(wanted), "all indices are 0: nothing was looked for yet."),
        (best(mean, others=False), "each query names itself: leave the diagonal out."),
        (best(mean.T), "rows and columns have changed places: this says who asks a query, not whom it asks."),
        (best(mean, largest=False), "these are the queries that are asked least."),
        (best(weights[0]), "only the first head was heard: take the mean over all of them."),
        (best(weights.amax(0)), "the loudest head decided: take the mean over the heads."),
        (wanted.flip(1), "the right queries, weakest first: put the strongest first."),
    )
    for wrong, said in mistakes:
        if torch.equal(found, wrong) and not torch.equal(wrong, wanted):
            raise Mistake(said)
    if not torch.equal(found, wanted):
        row = int((found != wanted).any(1).nonzero()[0])
        raise Mistake(f"query {row} asks {wanted[row].tolist()} most, not {found[row].tolist()}.")
    return "This is what appendix A.3 draws: the objects that a glimpse listens to."


@exercise(
    "11.5",
    "Each stage keeps its ratio: model.stages[i].alpha. What has to happen after the model has run?",
    "Note the old ratios, set the new ones, run, and put the old ones back, whatever happens (`finally`).",
    "old = [s.alpha for s in model.stages]; try: set the new ones, run under no_grad; finally: set the old ones.",
)
def with_alphas(answer: Callable[..., Any]) -> str:
    """``answer(model, images, alphas)``: the output with other ratios, the model as before."""
    small = {"dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 32, "queries": 6}
    model = build("rego_deformable_detr_scenes", num_classes=4, rego_ffn_dim=32, **small).eval()
    images = batch_images([torch.randn(3, 64, 96)], multiple=32)

    def run(alphas: tuple[float, ...]) -> Tensor:
        for stage, alpha in zip(model.stages, alphas):
            stage.alpha = alpha
        with torch.no_grad():
            return torch.stack([p.logits for p in model(images).by_stage])

    trained, other = (3.0, 2.0, 1.0), (1.0, 4.0, 2.0)
    usual, backward, wanted = run(trained), run(other[::-1]), run(other)
    run(trained)
    output = answer(model, images, other)
    left = tuple(stage.alpha for stage in model.stages)
    if not hasattr(output, "by_stage"):
        raise Mistake("your function should return the model's output, a DetectorOutput.")
    found = torch.stack([p.logits for p in output.by_stage])
    same_shape("the logits of all stages", found, tuple(wanted.shape))
    if alike(found, usual):
        raise Mistake("the stages still look at the ratios that they were trained with: set stage.alpha of each.")
    if alike(found, backward):
        raise Mistake("the ratios are in the wrong order: alphas[0] is that of stage 1.")
    close("the logits of all stages", found, wanted)
    if left != trained:
        raise Mistake(f"the model was left with the ratios {left}: put the old ones back, {trained}.")
    if found.requires_grad:
        raise Mistake("the output carries gradients: run the model under torch.no_grad().")
    return "Now compare what they give: the solutions do it over scenes."
