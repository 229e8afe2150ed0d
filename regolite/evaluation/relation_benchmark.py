"""The decider benchmark: do a detector's relation maps explain its predictions?

Scenes have ground-truth relations (:mod:`regolite.data.scenes`), so a detector that was trained on them can be asked
three things about every group of query-to-query maps:

- **Pointing**: how often the highest weight of a ball's query goes to its decider
  (:mod:`regolite.evaluation.relations`).
- **Baselines.** Chance; the nearest object; and **shuffled weights**: the maps of the same architecture with the
  entries of every weight tensor permuted, for the same balls and queries. What remains is due to the architecture and
  to where objects stand, and not to what was learned (Adebayo et al., *Sanity Checks for Saliency Maps*, NeurIPS 2018).
- **Nearness matched**: pointing for balls whose decider is *not* the nearest object, so that "nearest" scores nothing.
  ``scenes:...:nearer=1`` draws such scenes.

Beside it stands the effect: the change of the ball's class when its decider is removed, swapped, or another object is
removed (:mod:`regolite.evaluation.removal`). A map explains if it points at what has the effect.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from regolite.data import DetectionDataset
from regolite.evaluation.relations import Case, figures_of, group, percent, relation_score


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model with the entries of every parameter permuted.

    Args:
        model: any model.
        seed: seed of the permutations.
    """
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            flat = parameter.flatten()
            order = torch.randperm(len(flat), generator=generator).to(flat.device)
            parameter.copy_(flat[order].view_as(parameter))
    return copied


def benchmark(
    model: nn.Module,
    dataset: DetectionDataset,
    cases: Sequence[Case],
    removed: dict[str, Any] | None = None,
    stages: int | None = None,
    batch_size: int = 8,
    samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The figures of the benchmark.

    Args:
        model: the detector.
        dataset: the data of the cases.
        cases: as returned by :func:`regolite.evaluation.relations.relation_score` for the model.
        removed: the result of :func:`regolite.evaluation.removal.removal`; None leaves the effects out.
        stages: number of REGO stages; all by default.
        batch_size: images per batch.
        samples: number of bootstrap samples for an interval.
        seed: seed of the bootstrap and of the shuffled weights.
        progress: show a progress bar.

    Returns:
        The number of ``cases``, and of those that are ``matched``: balls with a nearer object than the decider;
        ``chance`` and ``nearest`` for both; and ``rows``, for every group of maps: ``name``, ``stage``, ``pointing``,
        ``matched``, ``shuffled`` and ``shuffled_matched``, with ``decider_removed``, ``decider_swapped`` and
        ``other_removed``, the changes of the preference for the ball's class. Figures have ``mean``, ``low`` and
        ``high``, in [0, 1]; None without cases.
    """
    _, by_shuffled = relation_score(model, dataset, stages, batch_size, samples, seed, progress, shuffled(model, seed))
    far = [n for n, case in enumerate(cases) if float(case.hits(-case.gaps)) == 0]
    of_all, of_far = figures_of(cases, samples, seed), figures_of([cases[n] for n in far], samples, seed)
    chance = np.array([case.chance for case in cases])
    nearest = np.array([float(case.hits(-case.gaps)) for case in cases])
    effects = {stage["stage"]: stage["preference"] for stage in (removed or {"stages": []})["stages"]}
    rows = []
    for name in dict.fromkeys(map(group, cases[0].weights)):
        hits, random = (
            np.array([float(case.hits(case.heads(name).mean(0))) for case in some]) for some in (cases, by_shuffled)
        )
        stage = int(name.split(".")[1]) if name.startswith("stage.") else 0
        effect = effects.get(stage, {})
        rows.append(
            {
                "name": name,
                "stage": stage,
                "pointing": of_all(hits),
                "shuffled": of_all(random),
                "matched": of_far(hits[far]),
                "shuffled_matched": of_far(random[far]),
                **{key: effect.get(key) for key in ("decider_removed", "decider_swapped", "other_removed")},
            }
        )
    return {
        "cases": len(cases),
        "matched": len(far),
        "chance": of_all(chance),
        "nearest": of_all(nearest),
        "chance_matched": of_far(chance[far]),
        "rows": rows,
    }


def as_text(figures: dict[str, Any]) -> str:
    """Format the figures of :func:`benchmark` as a text table."""
    columns = {"pointing": "", "shuffled": "", "matched": "", "decider_removed": "+", "decider_swapped": "+"}
    columns = {key: sign for key, sign in columns.items() if not sign or figures["rows"][0][key] is not None}
    lines = [
        "The decider benchmark, in percent with 95 % intervals. Pointing: the highest weight goes to the decider;",
        "shuffled: the same with permuted weights; matched: balls with a nearer object than their decider.",
        *["On the right, the change of the preference for the ball's class."] * ("decider_removed" in columns),
        f"{figures['cases']} balls, {figures['matched']} matched. Chance {percent(figures['chance'])}, matched "
        f"{percent(figures['chance_matched'])}; the nearest object {percent(figures['nearest'])}, matched 0.",
        "",
        f"{'':24}" + "".join(f"{key.replace('_', ' '):>18}" for key in columns),
    ]
    for row in figures["rows"]:
        cells = "".join(f"{percent(row[key], sign):>18}" for key, sign in columns.items())
        lines.append(f"{row['name']:24}{cells}")
    return "\n".join(lines)
