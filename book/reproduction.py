"""The book's page "REGO in miniature: a reproduction study": its text with all figures computed from the results.

``book/reproduction.md`` is a Jinja template. What stands in double braces there is computed here from
``experiments/results`` and ``notebooks/results``, so that the page changes with them; only figures of the paper are
typed in. ``book/build.py`` calls :func:`render`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

import regolite
from regolite.paper import newer_study, real_study
from regolite.paper.experiments import ARMS, EXPERIMENTS, PROTOCOL, Side
from regolite.paper.plots import plot_claims, plot_learning
from regolite.paper.report import UNITS
from regolite.paper.statistics import Results, Verdict, estimate, judge_all, minutes, read_results

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "book" / "reproduction.md"


def render(folder: Path, results: Path = ROOT / "experiments" / "results") -> str:
    """The page's Markdown; its figures are drawn into a folder.

    Args:
        folder: where ``reproduction_curves.png`` and ``reproduction_claims.png`` go.
        results: folder of the stored results.

    Raises:
        jinja2.UndefinedError: the template names something that is not computed.
    """
    found = read_results(results)
    judged = judge_all(found)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    text = template.render(**facts(found, judged), **others(results))
    folder.mkdir(parents=True, exist_ok=True)
    curves = {ARMS[arm].about: (arm,) for arm in ("base", "base_8_layers", "rego")}
    plot_learning(found, curves).savefig(folder / "reproduction_curves.png", dpi=160)
    claims = plot_claims({name: verdicts for name, verdicts in judged.items() if verdicts})
    claims.savefig(folder / "reproduction_claims.png", dpi=130)
    return text


def facts(found: Results, judged: dict[str, list[Verdict]]) -> dict[str, Any]:
    """What the template says of the study on scenes."""
    verdicts = [verdict for several in judged.values() for verdict in several]
    counts = Counter(verdict.word for verdict in verdicts)
    published = [verdict for verdict in verdicts if verdict.covers_paper is not None]

    def ap(arm: str, stage: int = -1) -> str:
        mean = estimate(found, Side(arm, stage))
        return "-" if mean is None else f"{mean.mean:.1f}"

    def difference(experiment: str, number: int) -> str:
        """Difference, interval and verdict of a claim, in words."""
        verdict = judged[experiment][number]
        unit = UNITS.get(verdict.claim.ours.metric, "AP")
        return f"{verdict.difference} {unit}, {verdict.word}"

    cost = json.loads((ROOT / "experiments" / "results" / "cost.json").read_text("utf-8"))["arms"]
    return {
        "runs": sum(len(runs) for runs in found.values()),
        "arms": len(found),
        "hours": f"{minutes(found, list(ARMS)) / 60:.1f}",
        "claims": len(verdicts),
        "reproduced": counts["reproduced"],
        "refuted": counts["not reproduced"],
        "undecided": counts["undecided"],
        "published": len(published),
        "covered": sum(verdict.covers_paper is True for verdict in published),
        "epochs": PROTOCOL["epochs"],
        "ap": ap,
        "difference": difference,
        "step": f"{cost['rego']['relative']:.2f}",
        "claims_table": claims_table(judged),
    }


def claims_table(judged: dict[str, list[Verdict]]) -> str:
    """All claims with the paper's difference, ours, the number of seeds, p by Holm and the verdict."""
    rows = []
    for name in EXPERIMENTS:
        for verdict in judged.get(name, ()):
            claim, paper = verdict.claim, verdict.claim.paper
            unit = UNITS.get(claim.ours.metric, "")
            rows.append(
                (
                    f"{claim.text.rstrip('.')} ({claim.source})",
                    "" if paper is None else f"{paper:+.1f}",
                    f"{verdict.difference or 'no runs yet'} {unit}".strip(),
                    len(verdict.seeds),
                    "< 0.001" if verdict.adjusted < 0.001 else f"{verdict.adjusted:.2g}",
                    verdict.word + (", not tested" if verdict.note.startswith("not tested") else ""),
                )
            )
    return _table(("claim", "paper", "here", "seeds", "p", "verdict"), rows)


def others(results: Path) -> dict[str, Any]:
    """What the template says of the studies beside that on scenes, and of costs."""
    real = real_study.read(results / "real")
    done = sum(len(runs) for arms in real.values() for runs in arms.values())
    newer, means = _newer(results / "newer")
    rows = json.loads((ROOT / "notebooks" / "results" / "complexity.json").read_text("utf-8"))["rows"]
    parameters = {row["model"]: row["parameters"] / 1e6 for row in rows}
    return {
        "version": regolite.__version__,
        "real_done": done,
        "real_total": len(real_study.plan()),
        "real_table": _real_table(real) if done else "",
        "newer_table": newer,
        "newer_gain": means,
        "added_parameters": f"{parameters['rego_deformable_detr_r50'] - parameters['deformable_detr_r50']:.1f}",
    }


def _real_table(real: dict[str, Any]) -> str:
    rows = []
    for setting, verdicts in real_study.verdicts(real).items():
        rows += [
            (setting, verdict.claim.text.rstrip("."), str(verdict.difference), len(verdict.seeds), verdict.word)
            for verdict in verdicts
            if verdict.difference is not None
        ]
    return _table(("data", "claim", "here", "seeds", "verdict"), rows)


def _newer(results: Path) -> tuple[str, Callable[[str], str]]:
    """The table of the study of newer detectors, and the mean gain of REGO on one of them."""
    compared = newer_study.compare(results)
    rows = [
        (pair.about, pair.data, seed, *(f"{ap:.1f}" for ap in aps), f"{aps[2] - aps[0]:+.1f}")
        for name, pair in newer_study.PAIRS.items()
        for seed, aps in compared[name].items()
    ]

    def mean(name: str) -> str:
        gains = [rego - alone for alone, _, rego in compared[name].values()]
        return f"{sum(gains) / len(gains):+.1f}" if gains else "not run"

    return _table(("detector", "data", "seed", "alone", "inside REGO", "with REGO", "gain"), rows), mean


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
