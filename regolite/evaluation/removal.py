"""Causal effect of objects: remove an object from a scene, and measure how the prediction for a ball changes.

An attention map shows what a query mixes, not its effect on the prediction. A scene can be rendered again with the same
background and noise, without one thing, or with the decider swapped between square and star. The pixels in the ball's
box stay the same, so a changed prediction for the ball is caused by that thing.

For a model that uses the true relation,

- without the decider the class is uncertain (if another square or star remains, the nearest one decides);
- with the swapped decider the class changes;
- without any other object the class stays the same, even without the most related one by attention.

The last is the test of the attention maps. Removal also gives a relation score: how often the object whose removal
reduces the score most is the decider. It shows what the model uses, which an attention map need not show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regolite.boxes import to_xyxy
from regolite.data import DetectionDataset, Scenes, batch_images
from regolite.data.scenes import CLASSES, DECIDERS, Scene
from regolite.data.transforms import to_pixels
from regolite.errors import UserError
from regolite.evaluation.coco import category_ids_of, prepared
from regolite.evaluation.relations import BASE, Case, figures_of, group, percent, stand_for
from regolite.inference import check_stages, run, scoring_of
from regolite.models.detector import as_detector
from regolite.types import Prediction
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import whole

MEASURES = {"score": "score of the ball's class", "preference": "preference to the other kind of ball"}


def without(scene: Scene, k: int) -> Scene:
    """The scene without thing ``k``; the background and all other things are unchanged."""
    return Scene(scene.size, scene.noise, scene.things[:k] + scene.things[k + 1 :])


def swapped(scene: Scene, k: int) -> Scene:
    """The scene with thing ``k`` swapped between square and star, which changes the class of its balls."""
    things = list(scene.things)
    things[k] = replace(things[k], shape=DECIDERS[1 - DECIDERS.index(things[k].shape)])
    return Scene(scene.size, scene.noise, things)


@torch.inference_mode()
def removal(
    model: nn.Module,
    scenes: DetectionDataset,
    cases: Sequence[Case],
    stages: int | None = None,
    samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Remove objects from scenes, one at a time, and measure the change of the balls' scores.

    In each rendered image, the query of the ball is selected again by the boxes of the last stage. The ball's ``score``
    at a stage is that query's score of the ball's original class, or 0 without a query. Its ``preference`` is score /
    (score + score of the other kind of ball), 0.5 if both are 0. It distinguishes an uncertain class from an undetected
    ball.

    Args:
        model: any detector.
        scenes: the dataset of the cases.
        cases: one or more, as returned by :func:`regolite.evaluation.relations.relation_score`.
        stages: number of REGO stages; all by default.
        samples: number of bootstrap samples for an interval.
        seed: seed of the bootstrap.
        progress: show a progress bar.

    Returns:
        ``stages``: for each, the base detector first, ``score`` and ``preference``, each with the figures

        - ``before``: the mean;
        - ``decider_removed`` and ``decider_swapped``: the mean change;
        - ``other_removed``: the change after removing another candidate, averaged over all of them;
        - ``related_removed``: the change after removing the most related candidate, if that is *not* the decider: by
          all layers and heads of the base decoder's self-attention (stage 0), or of the stage's relations;
        - ``unrelated_removed``: for the same balls, the change after removing a candidate that is neither. These two
          are restricted to the ``related_cases`` balls that have such a candidate; None if there are none;
        - ``decider_first``: how often the candidate whose removal reduces the value most is the decider.

    Raises:
        UserError: the data is not a :class:`~regolite.data.Scenes` dataset.
    """
    if not isinstance(scenes, Scenes):
        raise UserError("images in files cannot be drawn again without an object; give scenes, as scenes:200")
    check_stages(model, stages)
    samples = whole("samples", samples, 1)
    known = category_ids_of(as_detector(model).model_config, scenes)
    columns = [known.index(scenes.category_ids[CLASSES.index(f"ball of {shape}")]) for shape in DECIDERS]
    transform = prepared(model, scenes).transform or to_pixels()
    place = {image_id: i for i, image_id in enumerate(scenes.image_ids)}
    of_image: dict[int, list[int]] = defaultdict(list)
    for n, case in enumerate(cases):
        of_image[case.image_id].append(n)

    effects: dict[int, dict[str, Float[Tensor, "_n S"]]] = {}
    with evaluating(model) as device:
        for image_id in track(list(of_image), "removing objects", progress):
            i, numbers = place[image_id], of_image[image_id]
            scene = scenes.scene(i)
            objects = to_xyxy(scenes[i][1].boxes).to(device)
            # Objects have the indices of the scene's things, since every thing is visible and none is a crowd.
            variants = [scene, *(without(scene, k) for k in range(len(objects)))]
            variants += [swapped(scene, cases[n].decider) for n in numbers]
            batch = batch_images([transform(variant.draw()) for variant in variants], multiple=32)
            output = run(model, batch.to(device), stages)
            for number, n in enumerate(numbers):
                scores = _ball_scores(output.by_stage, scoring_of(model), objects, cases[n].ball, columns)
                if scene.things[cases[n].decider].shape != DECIDERS[0]:
                    scores = scores.flip(-1)
                variant = [*range(1 + len(objects)), 1 + len(objects) + number]  # with the swap of this ball's decider
                effects[n] = _effects(scores[variant])
    in_order = [effects[n] for n in range(len(cases))]
    count = in_order[0]["score"].shape[1]
    return {"stages": [_of_stage(cases, in_order, stage, samples, seed) for stage in range(count)]}


def _ball_scores(
    by_stage: Sequence[Prediction], scoring: str, objects: Float[Tensor, "N 4"], ball: int, columns: Sequence[int]
) -> Float[Tensor, "V S 2"]:
    """The scores of both ball classes for the query of a ball, in V images and at S stages."""
    scores = [p.logits.sigmoid() if scoring == "sigmoid" else p.logits.softmax(-1)[..., :-1] for p in by_stage]
    result = torch.zeros(len(scores[-1]), len(scores), 2)
    for v, boxes in enumerate(to_xyxy(by_stage[-1].boxes)):
        query = int(stand_for(boxes, scores[-1][v], objects)[1][ball])
        if query >= 0:
            result[v] = torch.stack([s[v, query, list(columns)] for s in scores]).float().cpu()
    return result


def _effects(scores: Float[Tensor, "n S 2"]) -> dict[str, Float[Tensor, "n S"]]:
    """Both measures of one ball: the original value, the change for each removed object, the change for the swap.

    Args:
        scores: scores of the ball's class and of the other ball class, in these images.
    """
    own, both = scores[..., 0], scores.sum(-1)
    measured = {"score": own, "preference": (own / both).where(both > 0, 0.5)}
    return {name: torch.cat([x[:1], x[1:] - x[0]]) for name, x in measured.items()}


def _of_stage(
    cases: Sequence[Case], effects: Sequence[dict[str, Float[Tensor, "_n S"]]], stage: int, samples: int, seed: int
) -> dict[str, Any]:
    """The figures of one stage."""
    related = [_most_related(case, f"stage.{stage}.relations.*" if stage else BASE) for case in cases]
    apart = {  # the balls whose most related object is not the decider, with a third candidate
        n: most
        for n, (case, most) in enumerate(zip(cases, related))
        if most is not None and most != case.decider and int(case.candidates.sum()) > 2
    }
    figure, figure_apart = (figures_of(some, samples, seed) for some in (cases, [cases[n] for n in apart]))
    result: dict[str, Any] = {"stage": stage, "related_cases": len(apart)}
    for name in MEASURES:
        values = [effect[name][:, stage] for effect in effects]
        changes = [(case, x[1:-1]) for case, x in zip(cases, values)]  # by removed object
        result[name] = {
            "before": figure(_column(x[0] for x in values)),
            "decider_removed": figure(_column(x[case.decider] for case, x in changes)),
            "decider_swapped": figure(_column(x[-1] for x in values)),
            "other_removed": figure(_column(_others(case, x) for case, x in changes)),
            "related_removed": figure_apart(_column(changes[n][1][most] for n, most in apart.items())),
            "unrelated_removed": figure_apart(_column(_others(*changes[n], most) for n, most in apart.items())),
            "decider_first": figure(_column(case.hits(-x) for case, x in changes)),
        }
    return result


def _most_related(case: Case, row: str) -> int | None:
    """The candidate with the highest weight over all layers and heads of a row; None without such maps."""
    if all(group(name) != row for name in case.weights):
        return None
    return int(case.heads(row).mean(0).masked_fill(~case.candidates, float("-inf")).argmax())


def _others(case: Case, values: Float[Tensor, "N"], but: int | None = None) -> Float[Tensor, ""]:
    """The mean over the candidates that are neither the decider nor ``but``."""
    rest = case.candidates.clone()
    rest[[case.decider] if but is None else [case.decider, but]] = False
    return values[rest].mean()


def _column(values: Iterable[SupportsFloat]) -> Float[np.ndarray, "n"]:
    return np.array([float(value) for value in values])


def as_text(figures: dict[str, Any]) -> str:
    """Format the figures of :func:`removal` as text tables."""
    labels = {
        "before": "as it is",
        "decider_removed": "decider removed",
        "decider_swapped": "decider swapped",
        "other_removed": "another object removed",
        "related_removed": "the most related removed (*)",
        "unrelated_removed": "one that is neither removed (*)",
        "decider_first": "decider's removal hurts most, times",
    }
    stages = figures["stages"]
    titles = "".join(f"{f'stage {s}' if s else 'base':>21}" for s in (stage["stage"] for stage in stages))
    lines = ["What becomes of a ball's class when its scene is drawn again: times 100, changes with a sign"]
    for measure, about in MEASURES.items():
        lines += ["", f"{about:36}{titles}"]
        for key, label in labels.items():
            sign = "" if key in ("before", "decider_first") else "+"
            lines.append(f"{label:36}" + "".join(f"{percent(stage[measure][key], sign, 1):>21}" for stage in stages))
    counts = ", ".join(str(stage["related_cases"]) for stage in stages)
    return "\n".join(
        [*lines, "", f"(*) balls whose most related object is not the decider, and that have a third: {counts}"]
    )
