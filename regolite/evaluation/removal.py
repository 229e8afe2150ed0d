"""What follows from an object: take it out of the scene, and see what the model then says of the ball beside it.

A map of attention tells what a query mixes, not what follows from it. Scenes can be drawn again, background and noise
the same: without one thing, or with a star as decider where a square was. No pixel in the ball's box has changed. So
what the model then says otherwise of the ball, it says because of that thing.

If the model decides a ball as it should, then

- without its decider it no longer knows (where another square or star is left, that one decides now);
- with the other decider it says the other class;
- without any other object it says the same, also without the one that is most related by the attention.

The last is the test of the maps. Removing objects gives a relation score of its own too: how often the one object whose
removal hurts most is the decider. That is what the model uses, and a map need not show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from regolite.inference import check_stages, run
from regolite.types import Prediction
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import whole

MEASURES = {"score": "score of the ball's class", "preference": "preference to the other kind of ball"}


def without(scene: Scene, k: int) -> Scene:
    """The scene without thing ``k``; all else of the image stays, the background included."""
    return Scene(scene.size, scene.noise, scene.things[:k] + scene.things[k + 1 :])


def swapped(scene: Scene, k: int) -> Scene:
    """The scene with thing ``k`` a star where it is a square, and the other way round: its balls change their class."""
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
    """Take objects out of scenes, one at a time, and measure what becomes of the classes of the balls.

    In each image drawn again, the query that speaks for the ball is found anew by the boxes of the last stage. The
    ball's ``score`` at a stage is that query's score of the ball's class; 0 where no query lies on the ball. Its
    ``preference`` is score / (score + score of the other kind of ball), 0.5 where both are 0: it tells a model that
    doubts the class from one that no longer sees a ball. "The ball's class" is that of the image as it was.

    Args:
        model: any detector.
        scenes: the set that the cases are of.
        cases: one or more, as :func:`regolite.evaluation.relations.relation_score` gives them.
        stages: how many REGO stages to run; all by default.
        samples: how many times the images are drawn anew for an interval.
        seed: of these draws.
        progress: show a progress bar.

    Returns:
        ``stages``: for each, number 0 being the base detector, ``score`` and ``preference``, each with figures of

        - ``before``: the mean;
        - ``decider_removed`` and ``decider_swapped``: the mean change by that;
        - ``other_removed``: by removing another candidate, the mean over all of them;
        - ``related_removed``: by removing the most related candidate, where that is *not* the decider. Most related by
          all layers and heads of the base decoder's self-attention (stage 0), or of the stage's relations;
        - ``unrelated_removed``: for the same balls, by removing a candidate that is neither. Only balls that have one
          count for these two, ``related_cases`` of them; None where there are none;
        - ``decider_first``: how often the candidate whose removal lowers it most is the decider.

    Raises:
        UserError: for data that cannot be drawn again.
    """
    if not isinstance(scenes, Scenes):
        raise UserError("images in files cannot be drawn again without an object; give scenes, as scenes:200")
    check_stages(model, stages)
    samples = whole("samples", samples, 1)
    known = category_ids_of(getattr(model, "model_config", None), scenes)
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
            # Objects have the numbers of the scene's things, since every thing can be seen and none is a crowd.
            variants = [scene, *(without(scene, k) for k in range(len(objects)))]
            variants += [swapped(scene, cases[n].decider) for n in numbers]
            batch = batch_images([transform(variant.draw()) for variant in variants], multiple=32)
            output = run(model, batch.to(device), stages)
            for number, n in enumerate(numbers):
                scores = _ball_scores(output.by_stage, model.scoring, objects, cases[n].ball, columns)
                if scene.things[cases[n].decider].shape != DECIDERS[0]:
                    scores = scores.flip(-1)
                its_own = [*range(1 + len(objects)), 1 + len(objects) + number]
                effects[n] = _effects(scores[its_own])
    in_order = [effects[n] for n in range(len(cases))]
    count = in_order[0]["score"].shape[1]
    return {"stages": [_of_stage(cases, in_order, stage, samples, seed) for stage in range(count)]}


def _ball_scores(
    by_stage: Sequence[Prediction], scoring: str, objects: Float[Tensor, "N 4"], ball: int, columns: Sequence[int]
) -> Float[Tensor, "V S 2"]:
    """The scores of both kinds of ball of the query that speaks for a ball, in V images and at S stages."""
    scores = [p.logits.sigmoid() if scoring == "sigmoid" else p.logits.softmax(-1)[..., :-1] for p in by_stage]
    result = torch.zeros(len(scores[-1]), len(scores), 2)
    for v, boxes in enumerate(to_xyxy(by_stage[-1].boxes)):
        query = int(stand_for(boxes, scores[-1][v], objects)[1][ball])
        if query >= 0:
            result[v] = torch.stack([s[v, query, list(columns)] for s in scores]).float().cpu()
    return result


def _effects(scores: Float[Tensor, "n S 2"]) -> dict[str, Float[Tensor, "n S"]]:
    """Both measures of one ball: as it was, then the changes by each removed object, then that by the swap.

    Args:
        scores: of the ball's class and of the other kind, in these images.
    """
    own, both = scores[..., 0], scores.sum(-1)
    measured = {"score": own, "preference": (own / both).where(both > 0, 0.5)}
    return {name: torch.cat([x[:1], x[1:] - x[0]]) for name, x in measured.items()}


def _of_stage(
    cases: Sequence[Case], effects: Sequence[dict[str, Float[Tensor, "_n S"]]], stage: int, samples: int, seed: int
) -> dict[str, Any]:
    """The figures of one stage."""
    related = [_most_related(case, f"stage.{stage}.relations.*" if stage else BASE) for case in cases]
    apart = [  # the balls with a most related object that is not the decider, and a third one
        n
        for n, case in enumerate(cases)
        if related[n] is not None and related[n] != case.decider and int(case.candidates.sum()) > 2
    ]
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
            "related_removed": figure_apart(_column(changes[n][1][related[n]] for n in apart)),
            "unrelated_removed": figure_apart(_column(_others(*changes[n], related[n]) for n in apart)),
            "decider_first": figure(_column(case.hits(-x) for case, x in changes)),
        }
    return result


def _most_related(case: Case, row: str) -> int | None:
    """The candidate to which all layers and heads of a row give the most weight; None where there are no such maps."""
    if all(group(name) != row for name in case.weights):
        return None
    return int(case.heads(row).mean(0).masked_fill(~case.candidates, float("-inf")).argmax())


def _others(case: Case, values: Float[Tensor, "N"], but: int | None = None) -> Float[Tensor, ""]:
    """The mean over the candidates that are neither the decider nor ``but``."""
    rest = case.candidates.clone()
    rest[[case.decider] if but is None else [case.decider, but]] = False
    return values[rest].mean()


def _column(values: Any) -> Float[np.ndarray, "n"]:
    return np.array([float(value) for value in values])


def as_text(figures: dict[str, Any]) -> str:
    """What :func:`removal` measured, as tables."""
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
