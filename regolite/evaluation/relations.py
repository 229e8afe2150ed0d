"""The relation score: how often attention points at the object that decides the class of another.

The paper shows relations qualitatively (Figure 6): a glimpse attends to the hidden states of all queries, and the most
related objects are drawn. Scenes provide ground-truth relations: the class of every ball is decided by one neighbor
(:mod:`regolite.data.scenes`). **The relation score** of an attention map is the fraction of balls whose query gives the
decider the highest weight of all other objects. Definitions:

- **Queries of an object.** A query is assigned to the object with the highest IoU if that IoU is at least 0.5,
  otherwise to none. The boxes of the last stage are used for the maps of all stages. Queries keep their index through
  all layers, so all maps are scored on the same balls, queries and objects. Classes, true or predicted, are not used.
- **Query of a ball.** The highest-scoring query of the ball, by its maximum class score.
- **Weight of an object.** The sum of the weights of all its queries, since attention sums over them. The ball's own
  queries, duplicates included, and queries without an object are left out.
- **Heads** are averaged (``score``), as are the layers in rows such as ``stage.1.relations.*``. ``best_head`` is a
  single head. To avoid selection bias, it is chosen on one half of the images and scored on the other.
- **Cases.** Balls with at least two other objects. Balls without a query, or whose decider has none, are left out:
  ``cases`` of ``balls`` remain. Other objects without a query are not candidates and do not count for chance. At least
  two candidates, including the decider, must remain.
- **Chance** is 1 / (number of candidates), per ball. Ties are shared equally: uniform attention with one query per
  object scores exactly chance.
- **Intervals** are 95 % bootstrap intervals over images, since balls of one image are not independent.

There are two stronger baselines than chance. ``nearest`` always chooses the nearest box, as deciders stand beside their
balls. ``most_queries`` chooses the object with the most queries, as uniform attention does. In addition,
``decoder.0.self`` of a detector with learned queries is independent of the image.

**Attention is not explanation.** A map shows what is mixed, not its effect on the prediction. REGO's glimpses are
enlarged, so a ball's own glimpse may show the decider, and no relation is needed. :mod:`regolite.evaluation.removal`
measures the effect instead: it renders a scene without an object, and compares the predicted class of the ball.
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
from regolite.models.detector import as_detector
from regolite.tracing.recorder import record
from regolite.tracing.trace import AttentionMap, Trace
from regolite.types import Target
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import whole

OVERLAP = 0.5
"""Least IoU of a query's box with its object."""

BASE = "decoder.*.self"
WIDTHS = (14, 17, 17, 14)


@dataclass(frozen=True, eq=False)
class Case:
    """A ball that was detected together with its decider, and the attention of its query.

    Attributes:
        image_id: COCO's id of the image.
        ball: index of the ball among the N objects of the image.
        decider: index of its decider.
        candidates: the other objects with a query, including the decider.
        queries: number of queries of each object.
        gaps: distance between the boxes of the ball and of each object, in pixels of the original image.
        weights: for each query-to-query map by name, the attention of the ball's query to the queries of each object,
            by head. The remainder to 1 goes to queries without an object.
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
        """Probability that a random candidate is the decider."""
        return 1 / int(self.candidates.sum())

    def hits(self, values: Float[Tensor, "*n N"]) -> Float[np.ndarray, "*n"]:
        """1 if the decider has the highest value of all candidates, 1/k if k candidates tie with it, otherwise 0."""
        among = values.masked_fill(~self.candidates, float("-inf"))
        # Sums of equal weights may differ by rounding.
        most = torch.isclose(among, among.amax(-1, keepdim=True), rtol=1e-5, atol=0.0)
        return (most[..., self.decider].float() / most.sum(-1)).numpy()

    def heads(self, pattern: str) -> Float[Tensor, "M N"]:
        """All heads of one map, or of all layers of a row such as ``stage.1.relations.*``."""
        return torch.cat([weights for name, weights in self.weights.items() if pattern in (name, group(name))])


def stand_for(
    boxes: Float[Tensor, "Q 4"], scores: Float[Tensor, "Q K"], objects: Float[Tensor, "N 4"]
) -> tuple[Int[Tensor, "Q"], Int[Tensor, "N"]]:
    """Assign queries to objects, and select the query of each object; see the module docstring.

    Args:
        boxes: boxes of the queries, ``xyxy`` in any unit.
        scores: scores of all classes.
        objects: boxes of the objects, ``xyxy`` in the same unit; at least one.

    Returns:
        The object of each query, or -1; the query of each object, or -1.
    """
    overlap, owner = box_iou(boxes, objects).max(1)
    owner = owner.where(overlap >= OVERLAP, -1)
    on = owner[:, None] == torch.arange(len(objects), device=owner.device)  # [Q, N]
    best = scores.amax(1)[:, None].where(on, -1.0).argmax(0)
    return owner, best.where(on.any(0), -1)


def relation_cases(
    trace: Trace, target: Target, relations: Sequence[tuple[int, int]], image: int = 0, attention: Trace | None = None
) -> list[Case]:
    """The cases of one image.

    Args:
        trace: a recording with boxes and query-to-query maps.
        target: the objects of the image.
        relations: pairs (ball, decider) of objects, as returned by ``dataset.relations(i)``.
        image: index of the image in the batch.
        attention: a recording of the same images by another model, whose maps are scored in place of the trace's.
    """
    source = trace if attention is None else attention
    last = trace.by_stage[-1]
    objects = to_xyxy(target.boxes)
    owner, query = stand_for(to_xyxy(last.boxes[image]), last.scores[image], objects)
    assigned = F.one_hot(owner + 1, len(objects) + 1)[:, 1:]  # [Q, N]
    maps = {
        name: found.weights
        for name in source.names()
        if isinstance(found := source[name], AttentionMap) and not found.shapes
    }
    cases = []
    for ball, decider in relations:
        candidates = query >= 0
        candidates[ball] = False
        if query[ball] < 0 or not candidates[decider] or candidates.sum() < 2:
            continue
        weights = {name: found[image, :, query[ball]] @ assigned.float() for name, found in maps.items()}
        gaps = _gaps(objects[ball], objects, target.size)
        cases.append(Case(target.image_id, ball, decider, candidates, assigned.sum(0), gaps, weights))
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
    attention_of: nn.Module | None = None,
) -> tuple[dict[str, Any], list[Case]]:
    """Compute the relation scores of all query-to-query maps.

    Args:
        model: a detector that can be recorded.
        dataset: scenes, or any data with ``decided_by``. Without a transform, images are prepared as in the model's
            configuration.
        stages: number of REGO stages; all by default.
        batch_size: images per batch.
        samples: number of bootstrap samples for an interval.
        seed: seed of the bootstrap.
        progress: show a progress bar.
        attention_of: a model of the same architecture, whose maps are scored in place of the model's own; the model
            still assigns the queries to the objects.

    Returns:
        The figures of :func:`summary` with the number of ``images`` and ``balls``; and the cases, for
        :func:`regolite.evaluation.removal.removal`.

    Raises:
        UserError: the data has no relations, or the model detects no ball together with its decider.
    """
    check_stages(model, stages)
    batch_size, samples = whole("batch_size", batch_size, 1), whole("samples", samples, 1)
    category_ids_of(as_detector(model).model_config, dataset)  # raises if the model lacks categories of the data
    dataset = prepared(model, dataset)
    relations = {i: dataset.relations(i) for i in range(len(dataset))}
    relations = {i: pairs for i, pairs in relations.items() if pairs and _count(dataset, i) > 2}
    if not relations:
        raise UserError("no image has three objects and one of them decided by another; give scenes, as scenes:200")
    patterns = [BASE, "decoder.*.boxes"]
    if as_detector(model).num_stages:
        patterns += ["stage.*.self", "stage.*.relations.*", "stage.*.boxes.*"]
    cases: list[Case] = []
    with evaluating(model) as device:
        for batch in track(torch.tensor(list(relations)).split(batch_size), "looking at relations", progress):
            images, targets = collate([dataset[i] for i in batch.tolist()], multiple=32)
            with record(model, patterns) as trace:
                run(model, images.to(device), stages)
            attention = None
            if attention_of is not None:
                with evaluating(attention_of), record(attention_of, patterns) as attention:
                    run(attention_of, images.to(device), stages)
            for image, (i, target) in enumerate(zip(batch.tolist(), targets)):
                cases += relation_cases(trace, target, relations[i], image, attention)
    if not cases:
        raise UserError(
            "the model finds no ball together with its decider and one more object, so there are no relations to score;"
            " train it longer, or give more images"
        )
    looked_at = {"images": len(relations), "balls": sum(map(len, relations.values()))}
    return {**looked_at, **summary(cases, samples, seed)}, cases


def summary(cases: Sequence[Case], samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compute the relation score of every map from cases.

    Args:
        cases: one or more, all with the same maps.
        samples: number of bootstrap samples for an interval.
        seed: seed of the bootstrap.

    Returns:
        The number of ``cases``; ``chance``, ``nearest`` and ``most_queries``; and ``maps``, for each map and for the
        mean over layers: ``name``, ``stage``, ``score``, the differences from chance (``over_chance``) and from the
        base decoder's self-attention (``over_base``, None for the latter), ``best_head`` (None with one image), the
        score of each head (``heads``), and ``shares``: the attention to the decider, to other objects, to the ball
        itself and to queries without an object. Figures are dictionaries of ``mean``, ``low`` and ``high``, in [0, 1].
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
    """The mean and its 95 % bootstrap interval over images.

    Args:
        values: one or more.
        images: the image of each value; values of one image are resampled together.
        samples: number of bootstrap samples.
        seed: seed of the bootstrap.
    """
    _, place = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), samples)
    low, high = np.quantile(draws @ sums / (draws @ counts), (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def as_text(figures: dict[str, Any]) -> str:
    """Format the figures of :func:`relation_score` as a text table."""
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
    """Format mean and interval of a figure in percent."""
    if figure is None:
        return "-"
    mean, low, high = (format(100 * figure[name], f"{sign}.{digits}f") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def figures_of(
    cases: Sequence[Case], samples: int, seed: int
) -> Callable[[Float[np.ndarray, "n"]], dict[str, float] | None]:
    """A function that computes mean and interval of one value per case; None without cases."""
    images = np.array([case.image_id for case in cases], dtype=np.int64)
    return lambda values: interval(values, images, samples, seed) if len(values) else None


def group(name: str) -> str:
    """The row that averages a map over layers, such as ``stage.1.relations.*``."""
    return re.sub(r"(encoder|decoder|relations)\.\d+", r"\1.*", name)


def _count(dataset: DetectionDataset, i: int) -> int:
    """Number of objects in image ``i``."""
    return len(dataset.objects(i).targets(*dataset.size(i)))


def _stage(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("stage.") else 0


def _gaps(box: Float[Tensor, "4"], boxes: Float[Tensor, "N 4"], size: tuple[int, int]) -> Float[Tensor, "N"]:
    """Distance between a box and others, ``xyxy`` in [0, 1], in pixels of an image of this height and width."""
    apart = torch.maximum(box[:2] - boxes[:, 2:], boxes[:, :2] - box[2:]).clamp(min=0.0)
    return (apart * torch.tensor([float(size[1]), float(size[0])])).norm(dim=1)


def _best_head(hits: Float[np.ndarray, "n M"], images: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"] | None:
    """The hits of the best head, chosen for each half of the images on the other half (two-fold cross-validation)."""
    half = np.unique(images, return_inverse=True)[1] % 2
    if not half.any():
        return None
    return np.where(half == 1, hits[:, hits[half == 0].mean(0).argmax()], hits[:, hits[half == 1].mean(0).argmax()])


def _shares(cases: Sequence[Case], name: str) -> dict[str, float]:
    """The distribution of the attention, averaged over heads and balls."""
    by_object = [(case, case.heads(name).mean(0)) for case in cases]
    decider = float(np.mean([float(w[case.decider]) for case, w in by_object]))
    itself = float(np.mean([float(w[case.ball]) for case, w in by_object]))
    objects = float(np.mean([float(w.sum()) for _, w in by_object]))
    return {"decider": decider, "others": objects - decider - itself, "itself": itself, "nothing": 1 - objects}
