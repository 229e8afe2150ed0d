"""The checkers of notebook 14 accept right answers and name what is wrong with the others."""

import math

import numpy as np
import pytest
from scipy.stats import t

from regolite.course import Mistake, find


def half(values, q=0.975, freedom=None, ddof=1):
    n = len(values)
    return t.ppf(q, n - 1 if freedom is None else freedom) * np.std(values, ddof=ddof) / math.sqrt(n)


def around(mean, wide):
    return mean - wide, mean + wide


def paired(ours, theirs, wide=half):
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return around(np.mean(differences), wide(differences))


def unpaired(ours, theirs, q=0.975, factor=None, welch=False):
    a, b = list(ours.values()), list(theirs.values())
    error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    freedom = min(len(a), len(b)) - 1 if welch else len(a) + len(b) - 2
    return around(np.mean(a) - np.mean(b), (t.ppf(q, freedom) if factor is None else factor) * error)


def both(ours, theirs):
    return paired(ours, theirs), unpaired(ours, theirs)


def by_place(ours, theirs):
    differences = [a - b for a, b in zip(ours.values(), theirs.values())]
    return around(np.mean(differences), half(differences)), unpaired(ours, theirs)


def common(runs, others):
    return {seed: value for seed, value in runs.items() if seed in others}


def seeds(spread, effect, factor=None, whole=1.0):
    return next(n for n in range(2, 10_000) if whole * (factor or t.ppf(0.975, n - 1)) * spread / n**0.5 < effect)


def same(values, margin):
    low, high = around(np.mean(values), half(values))
    if -margin < low and high < margin:
        return "same"
    return "different" if low > margin or high < -margin else "undecided"


def holds_zero(values, margin):
    low, high = around(np.mean(values), half(values))
    return "same" if low < 0 < high else "different"


def by_mean(values, margin):
    return "same" if abs(np.mean(values)) < margin else "different"


def one_sided(values, margin):
    return "undecided" if same(values, margin) == "different" and np.mean(values) < 0 else same(values, margin)


def reach(curve, goal, between=True):
    for (x0, y0), (x, y) in zip([(0, 0), *curve], curve):
        if y >= goal:
            return x0 + (goal - y0) / (y - y0) * (x - x0) if between else x
    return math.inf


def faster(ours, theirs, our_seconds, their_seconds, between=True):
    ratio = reach(theirs, theirs[-1][1], between) / reach(ours, theirs[-1][1], between)
    return ratio, ratio * their_seconds / our_seconds


def audit(study, seeds=lambda a, b: set(a) != set(b) or len(set(a)) < 2):
    base, ours = study["base"], study["ours"]
    found = set()
    if study["tuned_on"] == study["reported_on"]:
        found.add("leak")
    if study["reported"] == "best":
        found.add("best")
    if base["epochs"] != ours["epochs"]:
        found.add("budget")
    if base["learning_rates_tried"] != ours["learning_rates_tried"]:
        found.add("tuning")
    if seeds(base["seeds"], ours["seeds"]):
        found.add("seeds")
    return found


@pytest.mark.parametrize(
    ("number", "answer"),
    [("14.1", both), ("14.2", seeds), ("14.3", same), ("14.4", faster), ("14.5", audit)],
)
def test_right(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("14.1", paired, "should be a pair|two intervals"),
        ("14.1", lambda a, b: ((0.0, 0.0), (0.0, 0.0)), r"is 1\.26 to 3\.01"),
        ("14.1", lambda a, b: (paired(a, b)[::-1], unpaired(a, b)), "low comes first"),
        ("14.1", lambda a, b: (paired(b, a), unpaired(a, b)), "sign is wrong"),
        ("14.1", by_place, "not by seed"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: 1.96 * np.std(d, ddof=1) / len(d) ** 0.5), 0), "1.96|be a pair"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: 1.96 * np.std(d, ddof=1) / len(d) ** 0.5), (0, 0)), "1.96"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: half(d, ddof=0)), (0, 0)), "ddof=1"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: half(d) * len(d) ** 0.5), (0, 0)), "for one difference"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: half(d, 0.95)), (0, 0)), "90 %"),
        ("14.1", lambda a, b: (paired(a, b, lambda d: half(d, freedom=len(d))), (0, 0)), "degrees of freedom"),
        ("14.1", lambda a, b: (paired(a, b), paired(a, b)), "the unpaired interval is"),
        ("14.1", lambda a, b: (paired(a, b), unpaired(a, b, factor=1.96)), "unpaired interval: 1.96"),
        ("14.1", lambda a, b: (paired(a, b), unpaired(a, b, welch=True)), "n_1 \\+ n_2 - 2"),
        (
            "14.1",
            lambda a, b: (paired(a, b), around(unpaired(a, b)[0] / 2 + unpaired(a, b)[1] / 2,
                                               half(list(a.values())) + half(list(b.values())))),
            "variances add",
        ),
        ("14.1", lambda a, b: (paired(a, b), unpaired(common(a, b), common(b, a))), "without a partner"),
        ("14.2", lambda s, e: float(seeds(s, e)), "an int"),
        ("14.2", lambda s, e: 1, "too few"),
        ("14.2", lambda s, e: seeds(s, e, 1.959964), "1.96"),
        ("14.2", lambda s, e: seeds(s, e, whole=2.0), "half the interval"),
        ("14.2", lambda s, e: seeds(s, e) + 1, "it takes"),
        ("14.3", holds_zero, "no difference found"),
        ("14.3", by_mean, "extends beyond the margin"),
        ("14.3", one_sided, "two sides"),
        ("14.3", lambda v, m: "equal", "one of same"),
        (
            "14.3",
            lambda v, m: "different" if np.mean(v) - half(v) > 0 or np.mean(v) + half(v) < 0 else same(v, m),
            "significant, but small",
        ),
        ("14.4", lambda *a: 1.0, "two numbers"),
        ("14.4", lambda *a: (faster(*a)[0],) * 2, "the two differ"),
        ("14.4", lambda o, t, a, b: faster(o, t, b, a), "divide by the ratio of costs"),
        ("14.4", lambda *a: tuple(1 / x if x else 0.0 for x in faster(*a)), "ratio is inverted"),
        ("14.4", lambda *a: faster(*a, between=False), "interpolate between two points"),
        (
            "14.4",
            lambda o, t, a, b: tuple(t[-1][0] / reach(o, t[-1][1]) * f for f in (1, b / a)),
            "reaches its last AP earlier",
        ),
        ("14.4", lambda o, t, a, b: faster(o, t, a, b) if faster(o, t, a, b)[0] else (1.0, 1.0), "never reaches"),
        ("14.4", lambda *a: (0.5, 0.5), "times as long"),
        ("14.5", lambda study: ["leak"], "a set of words"),
        ("14.5", lambda study: {"cheating"}, "not one of the words"),
        ("14.5", lambda study: set(), "study 2 you miss 'leak'"),
        ("14.5", lambda study: audit(study, lambda a, b: a != b), "in whatever order"),
        ("14.5", lambda study: audit(study, lambda a, b: set(a) != set(b)), "you miss 'seeds'"),
        ("14.5", lambda study: audit(study) | ({"leak"} if study["reported_on"] == "val" else set()), "'none'"),
    ],
)  # fmt: skip
def test_wrong(number, answer, said):
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)
