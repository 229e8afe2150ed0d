"""The checkers of notebook 08: right answers pass, each typical mistake is named."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from regolite.course import Mistake, find
from regolite.course.chapter_08 import FAULTS, InstabilityMeter, index_vectors
from regolite.matching import PaddedTargets, match


def gap(p, n, S):
    return math.log(p / (1 - p) * (S - n) / n)


def score_gradient(weights, values, gradient):
    wish = gradient @ values.T
    return weights * (wish - (weights * wish).sum(-1, keepdim=True))


def by_jacobian(weights, values, gradient):
    jacobian = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None]
    return (jacobian @ (values @ gradient.T).T[..., None])[..., 0]


def vectors(matches, images, queries, nothing=-1):
    found = torch.full((images, queries), nothing)
    found[matches.image, matches.query] = matches.target
    return found


def by_object(matches, images, queries):
    found = torch.full((images, 3), -1)
    found[matches.image, matches.target] = matches.query
    return found


def of_any_image(matches, images, queries):
    found = torch.full((images, queries), -1)
    found[:, matches.query] = matches.target
    return found


def in_order(matches, images, queries):
    found = torch.full((images, queries), -1)
    found[matches.image, matches.query] = torch.arange(len(matches.query))
    return found


class Meter:
    """Written differently from the reference: a matrix of both epochs."""

    def __init__(self, scoring, costs):
        self.scoring, self.costs, self.before, self.now = scoring, costs, {}, {}

    def update(self, prediction, targets):
        pairs = match([prediction], PaddedTargets.of(targets), self.scoring, self.costs)
        for target, vector in zip(targets, vectors(pairs, len(targets), prediction.boxes.shape[1])):
            self.now[target.image_id] = vector

    def end_epoch(self):
        pairs = [(self.before[i], self.now[i]) for i in self.now if i in self.before]
        self.before, self.now = self.now, {}
        if not pairs:
            return None
        old, new = (torch.stack(side) for side in zip(*pairs))
        changed = old != new
        objects = max(1, int((new >= 0).sum()))
        moved = (changed & (new >= 0)).sum().item() / objects
        return {"images": len(pairs), "score": changed.sum().item() / len(pairs), "moved": moved}


class Zeros(Meter):
    def end_epoch(self):
        return super().end_epoch() or {"images": 0, "score": 0.0, "moved": 0.0}


class OnlyScore(Meter):
    def end_epoch(self):
        found = super().end_epoch()
        return found and found["score"]


class EveryLayer(Meter):
    def end_epoch(self):
        found = super().end_epoch()
        return found and found | {"score": 3 * found["score"]}


def with_fault(fault):
    return lambda scoring, costs: InstabilityMeter(scoring, costs, {fault})


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
    ("8.1", gap),
    ("8.1", lambda p, n, S: torch.tensor(gap(p, n, S))),
    ("8.2", score_gradient),
    ("8.2", by_jacobian),
    ("8.3", vectors),
    ("8.3", index_vectors),
    ("8.4", Meter),
    ("8.4", InstabilityMeter),
    ("8.5", suspicious),
    ("8.6", sharpen),
    ("8.6", lambda attention, factor: sharpen(attention, factor, ("key.weight", "key.bias"))),
]

WRONG = [
    ("8.1", lambda p, n, S: 0.0, "their total is 0.0571"),
    ("8.1", lambda p, n, S: None, "should be a number"),
    ("8.1", lambda p, n, S: math.log(p / (1 - p) * S / n), "not S"),
    ("8.1", lambda p, n, S: math.log(p / (1 - p) * (S - n)), "for one token"),
    ("8.1", lambda p, n, S: p / (1 - p) * (S - n) / n, "logarithm"),
    ("8.1", lambda p, n, S: math.log(p / (1 - p)), "odds alone"),
    ("8.1", lambda p, n, S: -gap(p, n, S), "sign is wrong"),
    ("8.2", lambda a, v, g: g @ v.T, "gradient at the weights"),
    ("8.2", lambda a, v, g: a * (g @ v.T), "subtract the mean"),
    ("8.2", lambda a, v, g: score_gradient(a, v, g) / a, "factor a_k"),
    ("8.2", lambda a, v, g: a * (g @ v.T - (g @ v.T).mean(-1, keepdim=True)), "weighted by the attention"),
    ("8.2", lambda a, v, g: a * (1 - a) * (g @ v.T), "only the diagonal"),
    ("8.2", lambda a, v, g: -score_gradient(a, v, g), "sign is wrong"),
    ("8.2", lambda a, v, g: a @ v * g, "one entry per channel"),
    ("8.2", lambda a, v, g: score_gradient(a, v, g).T, "should have shape"),
    ("8.3", lambda m, b, q: torch.zeros(b, q, dtype=torch.long), "yet one of its queries is matched"),
    ("8.3", lambda m, b, q: vectors(m, b, q, 0), "0 is the index of an object"),
    ("8.3", lambda m, b, q: vectors(m, b, q) >= 0, "not only whether it is"),
    ("8.3", lambda m, b, q: vectors(m, b, q) + 1, "no object as -1"),
    ("8.3", by_object, "one per query"),
    ("8.3", of_any_image, "index by matches.image"),
    ("8.3", in_order, "not with the index of their object"),
    ("8.3", lambda m, b, q: vectors(m, b, q).flip(1), "query by query"),
    *(("8.4", with_fault(fault), re.escape(said)) for fault, said in FAULTS.items()),
    ("8.4", Zeros, "so return None"),
    ("8.4", OnlyScore, "a dict of images"),
    ("8.4", EveryLayer, "score should be"),
    ("8.5", lambda target, K: set(), "for boxes in pixels: 'pixels' is missing"),
    ("8.5", lambda target, K: [], "a set of words"),
    ("8.5", lambda target, K: suspicious(target, K) - {"corners"}, "'corners' is missing"),
    ("8.5", lambda target, K: suspicious(target, K + 1), "labels that start at 1: 'labels' is missing"),
    ("8.5", lambda target, K: suspicious(target, K) | {"empty"}, "'empty' does not apply"),
    ("8.6", lambda attention, factor: attention, "are unchanged"),
    ("8.6", lambda attention, factor: None, "should be a MultiHeadAttention"),
    ("8.6", lambda attention, factor: sharpen(attention, factor, work=lambda same: same), "original has changed"),
    ("8.6", lambda attention, factor: sharpen(attention, factor, ("query.weight",)), "not the bias"),
    (
        "8.6",
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


def test_results_are_those_of_the_script(monkeypatch):
    """The file that the notebook loads has every run, whole, and is small enough to be kept."""
    folder = Path(__file__).parents[2] / "notebooks" / "results"
    spec = importlib.util.spec_from_file_location("why_detr_is_slow", folder / "why_detr_is_slow.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclass looks the module up
    spec.loader.exec_module(script)
    text = script.RESULTS.read_text("utf-8")
    assert len(text) < 250_000
    results = json.loads(text)
    assert list(results["runs"]) == list(script.RUNS) and results["scenes"] == script.SCENES
    for runs in results["runs"].values():
        assert [run["seed"] for run in runs] == list(script.SEEDS)
        for run in runs:
            assert len(run["course"]) == script.EPOCHS + 1
            assert all(len(line["queries"]) == sum(results["targets"]) for line in run["course"])
