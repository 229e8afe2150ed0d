"""The checkers of notebook 08: right answers pass, each typical mistake is named."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from regolite.course import Mistake, find


def entropy(a):
    return torch.special.entr(a).sum(-1)


def heads_differ(a):
    return entropy(a.mean(1)) - entropy(a).mean(1)


def gap(p, n, S):
    return math.log(p / (1 - p) * (S - n) / n)


def ordered(matches):
    return matches.query[(matches.image * 1000 + matches.target).argsort()]


def share_changed(before, after):
    return (ordered(before) != ordered(after)).float().mean().item()


def suspicious(target, K):
    found, boxes, labels = set(), target.boxes, target.labels
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    if ((boxes < 0) | (boxes > 1)).any():
        found.add("pixels")
    elif ((low < -0.01) | (high > 1.01)).any():
        found.add("corners")
    if ((labels < 0) | (labels >= K)).any():
        found.add("labels")
    if (boxes[:, 2:] == 0).any():
        found.add("empty")
    return found


def sharpen(attention, factor, parts=("query.weight", "query.bias"), work=copy.deepcopy):
    copied = work(attention)
    with torch.no_grad():
        for name in parts:
            copied.get_parameter(name).mul_(factor)
    return copied


RIGHT = [
    ("8.1", heads_differ),
    ("8.2", gap),
    ("8.2", lambda p, n, S: torch.tensor(gap(p, n, S))),
    ("8.3", share_changed),
    ("8.4", suspicious),
    ("8.5", sharpen),
    ("8.5", lambda attention, factor: sharpen(attention, factor, ("key.weight", "key.bias"))),
]

WRONG = [
    ("8.1", lambda a: torch.zeros(len(a), a.shape[2]), "should be "),
    ("8.1", lambda a: entropy(a).mean(1), "mean of the heads' entropies"),
    ("8.1", lambda a: entropy(a.mean(1)), "entropy of the mean map"),
    ("8.1", lambda a: -heads_differ(a), "sign is wrong"),
    ("8.1", lambda a: entropy(a.mean(1)) - entropy(a).amin(1), "the sharpest head"),
    ("8.1", lambda a: entropy(a.mean(2)) - entropy(a).mean(2), "over the queries"),
    ("8.1", lambda a: entropy(a.mean(1)) - (-a * a.log()).sum(-1).mean(1), "exactly 0"),
    ("8.1", lambda a: entropy(a), "shape"),
    ("8.2", lambda p, n, S: 0.0, "their total is 0.0571"),
    ("8.2", lambda p, n, S: None, "should be a number"),
    ("8.2", lambda p, n, S: math.log(p / (1 - p) * S / n), "not S"),
    ("8.2", lambda p, n, S: math.log(p / (1 - p) * (S - n)), "for one token"),
    ("8.2", lambda p, n, S: p / (1 - p) * (S - n) / n, "logarithm"),
    ("8.2", lambda p, n, S: math.log(p / (1 - p)), "odds alone"),
    ("8.2", lambda p, n, S: -gap(p, n, S), "sign is wrong"),
    ("8.3", lambda b, a: 0.0, "but the answer is 0.00"),
    ("8.3", lambda b, a: 1 - share_changed(b, a), "kept their query"),
    ("8.3", lambda b, a: 7 * share_changed(b, a), "number of objects"),
    ("8.3", lambda b, a: (b.query != a.query).float().mean().item(), "sort the pairs"),
    ("8.3", lambda b, a: 1 / 7, "swap their queries"),
    ("8.4", lambda target, K: set(), "for boxes in pixels: 'pixels' is missing"),
    ("8.4", lambda target, K: [], "a set of words"),
    ("8.4", lambda target, K: suspicious(target, K) - {"corners"}, "'corners' is missing"),
    ("8.4", lambda target, K: suspicious(target, K + 1), "labels that start at 1: 'labels' is missing"),
    ("8.4", lambda target, K: suspicious(target, K) | {"empty"}, "'empty' does not apply"),
    ("8.5", lambda attention, factor: attention, "are unchanged"),
    ("8.5", lambda attention, factor: None, "should be a MultiHeadAttention"),
    ("8.5", lambda attention, factor: sharpen(attention, factor, work=lambda same: same), "original has changed"),
    ("8.5", lambda attention, factor: sharpen(attention, factor, ("query.weight",)), "not the bias"),
    (
        "8.5",
        lambda attention, factor: sharpen(sharpen(attention, factor), factor, ("key.weight", "key.bias")),
        "factor squared",
    ),
]


def ask(number, answer):
    torch.manual_seed(0)
    return find(number).checker(answer)


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=[n for n, _ in RIGHT])
def test_right_answers_pass(number, answer):
    assert ask(number, answer).endswith(".")


@pytest.mark.parametrize(("number", "answer", "said"), WRONG, ids=[f"{n}-{said}" for n, _, said in WRONG])
def test_mistakes_are_named(number, answer, said):
    with pytest.raises(Mistake, match=said):
        ask(number, answer)


def test_results_are_those_of_the_script():
    """The file that the notebook loads has every run, whole, and is small enough to be kept."""
    folder = Path(__file__).parents[2] / "notebooks" / "results"
    spec = importlib.util.spec_from_file_location("why_detr_is_slow", folder / "why_detr_is_slow.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.RESULTS.read_text("utf-8")
    assert len(text) < 200_000
    results = json.loads(text)
    assert list(results["runs"]) == list(script.RUNS) and results["scenes"] == script.SCENES
    for run in results["runs"].values():
        assert len(run["course"]) == script.EPOCHS + 1
        assert all(len(letters) == sum(results["targets"]) for letters in run["course"][-1]["queries"])
