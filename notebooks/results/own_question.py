"""The worked example of notebook 17: are tighter glimpses better on drawn scenes?

``python notebooks/results/own_question.py`` trains two arms of REGO on small scenes, seed by seed, and writes
``paper.json`` and ``tighter.json`` to the folder ``own_question`` beside this file; ``prediction.json`` there was
written before the first run. A pilot of another base
detector follows. The eleven runs take about ten minutes of one CPU core. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from regolite.course.chapter_17 import TEST, reveal, small_arm
from regolite.paper import runner
from regolite.paper.experiments import Claim, Side
from regolite.paper.statistics import read_results

RESULTS = Path(__file__).with_suffix("")
RUNS = Path(__file__).resolve().parents[2] / "runs" / "own_question"

MODEL = "rego_deformable_detr_refined_tiny"
SEEDS = (0, 1, 2, 3, 4)
ARMS = {
    "paper": small_arm("REGO, alphas 3, 2, 1 (the paper's)", model=MODEL),
    "tighter": small_arm("REGO, alphas 2, 1.5, 1", "alphas=2.0,1.5,1.0", model=MODEL),
}
PILOT = small_arm("pilot: REGO on Deformable DETR without refinement")
"""Trained once, after the verdict: do stages gain anything in so short a run?"""

CLAIM = Claim(
    "On small drawn scenes, glimpses of 2, 1.5 and 1 boxes are better than the paper's 3, 2 and 1.",
    "notebook 14, which tried 1, 1, 1",
    ours=Side("tighter"),
    theirs=Side("paper"),
)


def main() -> None:
    """Do all missing runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    torch.set_num_threads(1)
    for seed in parser.parse_args().seeds:
        for name, arm in ARMS.items():
            found = runner.run(name, arm, seed, RUNS, TEST)
            runner.merge(name, arm.about, [found], RESULTS / f"{name}.json")
            print(name, seed, [stage["AP"] for stage in found["stages"]], flush=True)
    found = runner.run("pilot", PILOT, 0, RUNS, TEST)
    runner.merge("pilot", PILOT.about, [found], RESULTS / "pilot.json")
    print(reveal(CLAIM, read_results(RESULTS, list(ARMS)), RESULTS / "prediction.json"))


if __name__ == "__main__":
    main()
