"""The relation score: does attention point at the object that truly decides the class, and does that object matter?

The paper shows relations as images (its Figure 6): a glimpse asks the hidden states of all queries, and the most
related objects are drawn. Scenes know the truth: every ball is decided by one neighbor (:mod:`regolite.data.scenes`).
So there are numbers. **The relation score** of a map is how often, of all other objects, a ball's query gives the most
weight to the decider. These definitions make it one:

- **Which queries are an object's.** A query lies on the object that its box overlaps most, if by an IoU of at least
  0.5, and on nothing otherwise. The boxes are those of the last stage that runs, for the maps of all stages: queries
  keep their number from the first layer to the last, so that every map is asked about the same balls, queries and
  objects, and a difference between two maps is one of the maps. Neither true nor predicted classes are looked at.
- **Which query stands for the ball.** The highest-scoring of those on it: the one whose best class, whichever it is,
  scores highest.
- **The weight of an object** is the sum of the weights of all queries on it, since attention sums over them. The ball's
  own queries are left out, duplicates included, and so are those that lie on nothing.
- **Heads** are averaged (``score``), as are the layers in rows like ``stage.1.relations.*``. ``best_head`` is one head
  alone. The best of many is good by luck too, so it is chosen on one half of the images and scored on the other.
- **Which balls count.** Those with two or more other objects. Where no query lies on the ball or on its decider, there
  is nothing to ask: such balls are left out, and ``cases`` of ``balls`` tells how many remain. Other objects without a
  query cannot be chosen, so they do not count for chance either; two or more, the decider among them, must remain.
- **Chance** is 1 / (number of those objects), ball by ball. Where several objects have equally much, each is the most
  related for its share: attention that is the same everywhere, with one query an object, scores exactly chance.
- **Intervals** hold 95 % of the means of images drawn anew with replacement, since balls of one image are not
  independent.

Chance is a weak rival, so there are two more. ``nearest`` always chooses the nearest box: deciders stand beside their
balls. ``most_queries`` chooses the object with the most queries, as attention that is the same everywhere does.
And ``decoder.0.self`` of a detector with learned queries has seen no image yet: what it scores, it scores blindly.

**Attention is not explanation.** A map tells what is mixed, not what follows from it; and REGO's glimpses are enlarged,
so that a ball's own glimpse may show the decider, and no relation is needed. :mod:`regolite.evaluation.removal` asks
the model instead: it draws a scene again without an object, and measures what becomes of the ball's class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regolite.boxes import box_iou, to_xyxy
from regolite.data import DetectionDataset, collate
from regolite.errors import UserError
from regolite.evaluation.coco import category_ids_of, prepared
from regolite.inference import check_stages, run
from regolite.models.rego import Rego
from regolite.tracing.recorder import record
from regolite.tracing.trace import AttentionMap, Trace
from regolite.types import Target
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import whole

OVERLAP = 0.5
"""Least IoU of a query's box with the object that it lies on."""

BASE = "decoder.*.self"
WIDTHS = (14, 17, 17, 14)


@dataclass(frozen=True, eq=False)
class Case:
    """One ball that a model has found together with its decider, and what its query attends to.

    Attributes:
        image_id: COCO's id of the image.
        ball: which of the image's N objects is decided.
        decider: which one decides.
        candidates: the other objects that have a query; the decider is one of them.
        queries: how many queries lie on each object.
        gaps: free distance between the box of the ball and each object's, in pixels of the original image.
        weights: for each map of queries to queries by name, how much each head of the ball's query gives to the queries
            of each object. What is missing from 1 goes to queries that lie on nothing.
    """

    image_id: int
    ball: int
    decider: int
    candidates: Bool[Tensor, "N"]
    queries: Int[Tensor, "N"]
    gaps: Float[Tensor, "N"]
    weights: dict[str, Float[Tensor, "_M N"]]

    @property
    def chance(self) -> float:
        """How often a choice among the candidates at random is right."""
        return 1 / int(self.candidates.sum())

    def hits(self, values: Float[Tensor, "*n N"]) -> Float[np.ndarray, "*n"]:
        """1 where the decider has the most of all candidates, 0 where another has; 1/k where k share the most."""
        among = values.masked_fill(~self.candidates, float("-inf"))
        # Sums of equal weights may differ in the last digit.
        most = torch.isclose(among, among.amax(-1, keepdim=True), rtol=1e-5, atol=0.0)
        return (most[..., self.decider].float() / most.sum(-1)).numpy()

    def heads(self, pattern: str) -> Float[Tensor, "M N"]:
        """All heads of one map, or of all layers of a row like ``stage.1.relations.*``."""
        return torch.cat([weights for name, weights in self.weights.items() if pattern in (name, group(name))])


def stand_for(
    boxes: Float[Tensor, "Q 4"], scores: Float[Tensor, "Q K"], objects: Float[Tensor, "N 4"]
) -> tuple[Int[Tensor, "Q"], Int[Tensor, "N"]]:
    """Which object each query lies on, and which query speaks for each object; see the top of this module.

    Args:
        boxes: of the queries, ``xyxy`` in any unit.
        scores: of every class.
        objects: boxes of the objects, ``xyxy`` in the same unit; at least one.

    Returns:
        For each query an object, or -1; for each object a query, or -1.
    """
    overlap, owner = box_iou(boxes, objects).max(1)
    owner = owner.where(overlap >= OVERLAP, -1)
    on = owner[:, None] == torch.arange(len(objects), device=owner.device)  # [Q, N]
    best = scores.amax(1)[:, None].where(on, -1.0).argmax(0)
    return owner, best.where(on.any(0), -1)


def relation_cases(trace: Trace, target: Target, relations: Sequence[tuple[int, int]], image: int = 0) -> list[Case]:
    """The balls of one image that count, with what their queries attend to.

    Args:
        trace: what was recorded: boxes, and maps of queries to queries.
        target: the objects of the image.
        relations: pairs (ball, decider) of objects, as ``dataset.relations(i)`` gives them.
        image: of the batch.
    """
    last = trace.by_stage[-1]
    objects = to_xyxy(target.boxes)
    owner, speaker = stand_for(to_xyxy(last.boxes[image]), last.scores[image], objects)
    lies_on = F.one_hot(owner + 1, len(objects) + 1)[:, 1:]  # [Q, N]
    maps = [name for name in trace.names() if isinstance(trace[name], AttentionMap) and not trace[name].shapes]
    cases = []
    for ball, decider in relations:
        candidates = speaker >= 0
        candidates[ball] = False
        if speaker[ball] < 0 or not candidates[decider] or candidates.sum() < 2:
            continue
        weights = {name: trace[name].weights[image, :, speaker[ball]] @ lies_on.float() for name in maps}
        gaps = _gaps(objects[ball], objects, target.size)
        cases.append(Case(target.image_id, ball, decider, candidates, lies_on.sum(0), gaps, weights))
    return cases


@torch.inference_mode()
def relation_score(
    model: nn.Module,
    dataset: DetectionDataset,
    stages: int | None = None,
    batch_size: int = 8,
    samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Case]]:
    """Measure how often the most related object is the decider, for all maps of queries to queries.

    Args:
        model: a detector that can be recorded.
        dataset: scenes, or any data with ``decided_by``. Where it has no transform, images are prepared as the
            model's configuration says.
        stages: how many REGO stages to run; all by default.
        batch_size: images at a time.
        samples: how many times the images are drawn anew for an interval.
        seed: of these draws.
        progress: show a progress bar.

    Returns:
        The figures that :func:`summary` gives, with ``images`` and ``balls`` that were looked at; and the cases, for
        :func:`regolite.evaluation.removal.removal`.

    Raises:
        UserError: when no object of the data is decided by another, or the model finds none with its decider.
    """
    check_stages(model, stages)
    batch_size, samples = whole("batch_size", batch_size, 1), whole("samples", samples, 1)
    category_ids_of(getattr(model, "model_config", None), dataset)  # that the model knows what the data shows
    dataset = prepared(model, dataset)
    relations = {i: dataset.relations(i) for i in range(len(dataset))}
    relations = {i: pairs for i, pairs in relations.items() if pairs and _count(dataset, i) > 2}
    if not relations:
        raise UserError("no image has three objects and one of them decided by another; give scenes, as scenes:200")
    patterns = [BASE, "decoder.*.boxes"]
    if isinstance(model, Rego):
        patterns += ["stage.*.self", "stage.*.relations.*", "stage.*.boxes.*"]
    cases: list[Case] = []
    with evaluating(model) as device:
        for batch in track(torch.tensor(list(relations)).split(batch_size), "looking at relations", progress):
            images, targets = collate([dataset[i] for i in batch.tolist()], multiple=32)
            with record(model, patterns) as trace:
                run(model, images.to(device), stages)
            for image, (i, target) in enumerate(zip(batch.tolist(), targets)):
                cases += relation_cases(trace, target, relations[i], image)
    if not cases:
        raise UserError(
            "the model finds no ball together with its decider and one more object, so there are no relations to score;"
            " train it longer, or give more images"
        )
    looked_at = {"images": len(relations), "balls": sum(map(len, relations.values()))}
    return {**looked_at, **summary(cases, samples, seed)}, cases


def summary(cases: Sequence[Case], samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The relation score of every map, from cases.

    Args:
        cases: one or more, all with the same maps.
        samples: how many times the images are drawn anew for an interval.
        seed: of these draws.

    Returns:
        The number of ``cases``; ``chance``, ``nearest`` and ``most_queries``; and ``maps``, for each map and for all
        layers of a kind together: ``name``, ``stage``, ``score``, what it has over chance (``over_chance``) and over
        all layers of the base decoder's self-attention (``over_base``, None for those), ``best_head`` (None with one
        image), the score of each head by itself, and ``shares``: where the attention goes, to the decider, to other
        objects, to the ball itself and to queries that lie on nothing. Figures are dictionaries of ``mean``, ``low``
        and ``high``, in [0, 1].
    """
    figure = figures_of(cases, samples, seed)
    chance = np.array([case.chance for case in cases])
    layers: dict[str, list[str]] = {}
    for name in cases[0].weights:
        layers.setdefault(group(name), []).append(name)
    names = [name for row, own in layers.items() for name in (row, *own)]
    hits = {name: np.array([float(case.hits(case.heads(name).mean(0))) for case in cases]) for name in names}
    maps = []
    for name in names:
        by_head = np.array([case.hits(case.heads(name)) for case in cases])
        best = _best_head(by_head, np.array([case.image_id for case in cases]))
        maps.append(
            {
                "name": name,
                "stage": _stage(name),
                "score": figure(hits[name]),
                "over_chance": figure(hits[name] - chance),
                "over_base": figure(hits[name] - hits[BASE]) if BASE in hits and _stage(name) else None,
                "best_head": None if best is None else figure(best),
                "heads": by_head.mean(0).tolist(),
                "shares": _shares(cases, name),
            }
        )
    return {
        "cases": len(cases),
        "chance": figure(chance),
        "nearest": figure(np.array([float(case.hits(-case.gaps)) for case in cases])),
        "most_queries": figure(np.array([float(case.hits(case.queries.float())) for case in cases])),
        "maps": maps,
    }


def interval(
    values: Float[np.ndarray, "n"], images: Int[np.ndarray, "n"], samples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """The mean, and within which bounds 95 % of the means lie when the images are drawn anew with replacement.

    Args:
        values: one or more.
        images: the image that each value is of; values of one image are drawn together.
        samples: how many times they are drawn.
        seed: of the draws.
    """
    _, place = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), samples)
    low, high = np.quantile(draws @ sums / (draws @ counts), (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def as_text(figures: dict[str, Any]) -> str:
    """What :func:`relation_score` measured, as a table."""
    titles = "".join(
        f"{title:>{width}}" for title, width in zip(("score", "over chance", "over base", "best head"), WIDTHS)
    )
    shares = "".join(f"{name:>8}" for name in figures["maps"][0]["shares"])
    lines = [
        "How often the most related object is the one that decides the class, in percent, with 95 % intervals;",
        "and to whose queries the attention goes, in percent.",
        f"{figures['cases']} of {figures['balls']} balls with two or more other objects, in {figures['images']} "
        "images:\nthose where a query lies on the ball, one on its decider, and one on another object.",
        "",
        f"{'':26}{titles}{shares}",
    ]
    rivals = (("chance", "chance"), ("the nearest object", "nearest"), ("the one with most queries", "most_queries"))
    lines += [f"{label:26}{percent(figures[name]):>{WIDTHS[0]}}" for label, name in rivals]
    for row in figures["maps"]:
        name = row["name"] if row["name"] == group(row["name"]) else f"  {row['name']}"
        keys = (("score", ""), ("over_chance", "+"), ("over_base", "+"), ("best_head", ""))
        columns = "".join(f"{percent(row[key], sign):>{width}}" for (key, sign), width in zip(keys, WIDTHS))
        shares = "".join(f"{100 * share:8.0f}" for share in row["shares"].values())
        lines.append(f"{name:26}{columns}{shares}")
    return "\n".join(line.rstrip() for line in lines)


def percent(figure: dict[str, float] | None, sign: str = "", digits: int = 0) -> str:
    """Mean and interval of a figure, times 100."""
    if figure is None:
        return "-"
    mean, low, high = (format(100 * figure[name], f"{sign}.{digits}f") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def figures_of(
    cases: Sequence[Case], samples: int, seed: int
) -> Callable[[Float[np.ndarray, "n"]], dict[str, float] | None]:
    """What makes a figure, mean and interval, of one value a case; None where there are no cases."""
    images = np.array([case.image_id for case in cases], dtype=np.int64)
    return lambda values: interval(values, images, samples, seed) if len(values) else None


def group(name: str) -> str:
    """The row of all layers that a map belongs to: ``stage.1.relations.*``."""
    return re.sub(r"(encoder|decoder|relations)\.\d+", r"\1.*", name)


def _count(dataset: DetectionDataset, i: int) -> int:
    """How many objects image ``i`` shows."""
    return len(dataset.objects(i).targets(*dataset.size(i)))


def _stage(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("stage.") else 0


def _gaps(box: Float[Tensor, "4"], boxes: Float[Tensor, "N 4"], size: tuple[int, int]) -> Float[Tensor, "N"]:
    """Free distance between a box and others, ``xyxy`` in [0, 1], in pixels of an image of this height and width."""
    apart = torch.maximum(box[:2] - boxes[:, 2:], boxes[:, :2] - box[2:]).clamp(min=0.0)
    return (apart * torch.tensor([float(size[1]), float(size[0])])).norm(dim=1)


def _best_head(hits: Float[np.ndarray, "n M"], images: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"] | None:
    """The hits of one head, which for each half of the images is the one that was best in the other half."""
    half = np.unique(images, return_inverse=True)[1] % 2
    if not half.any():
        return None
    return np.where(half == 1, hits[:, hits[half == 0].mean(0).argmax()], hits[:, hits[half == 1].mean(0).argmax()])


def _shares(cases: Sequence[Case], name: str) -> dict[str, float]:
    """Where the attention goes, the mean over heads and balls."""
    by_object = [(case, case.heads(name).mean(0)) for case in cases]
    decider = float(np.mean([float(w[case.decider]) for case, w in by_object]))
    itself = float(np.mean([float(w[case.ball]) for case, w in by_object]))
    objects = float(np.mean([float(w.sum()) for _, w in by_object]))
    return {"decider": decider, "others": objects - decider - itself, "itself": itself, "nothing": 1 - objects}
