"""The checkers of notebook 14 accept right answers and name what is wrong with the others."""

import math

import numpy as np
import pytest
from scipy.stats import nct, norm, t

from regolite.course import Mistake, find


def half(values, q=0.975, freedom=None, ddof=1):
    n = len(values)
    return t.ppf(q, n - 1 if freedom is None else freedom) * np.std(values, ddof=ddof) / math.sqrt(n)


def around(mean, wide):
    return mean - wide, mean + wide


def paired(ours, theirs, wide=half):
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return around(np.mean(differences), wide(differences))


def welch(ours, theirs, q=0.975, freedom=None, factor=None, error=None, ddof=1):
    a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
    v_a, v_b = a.var(ddof=ddof) / len(a), b.var(ddof=ddof) / len(b)
    nu = (v_a + v_b) ** 2 / (v_a**2 / (len(a) - 1) + v_b**2 / (len(b) - 1))
    nu = nu if freedom is None else freedom(nu, len(a), len(b))
    wide = (t.ppf(q, nu) if factor is None else factor) * (math.sqrt(v_a + v_b) if error is None else error(a, b))
    return around(a.mean() - b.mean(), wide)


def pool(a, b):
    n, m = len(a), len(b)
    return math.sqrt((a.var(ddof=1) * (n - 1) + b.var(ddof=1) * (m - 1)) / (n + m - 2) * (1 / n + 1 / m))


def bootstrap(ours, theirs, ends=(0.025, 0.975), single=False, center=True, apart=False):
    rng = np.random.default_rng(0)
    differences = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    if apart:
        sides = [np.array(list(runs.values())) for runs in (ours, theirs)]
        means = [side[rng.integers(len(side), size=(4000, len(side)))].mean(1) for side in sides]
        means = means[0] - means[1]
    else:
        means = differences[rng.integers(len(differences), size=(4000, len(differences)))].mean(1)
    values = (differences if single else means) - (0 if center else differences.mean())
    return tuple(np.quantile(values, ends))


def three(ours, theirs, **parts):
    whole = {"paired": paired, "welch": welch, "bootstrap": bootstrap} | parts
    return {name: part(ours, theirs) for name, part in whole.items()}


def using(**parts):
    return lambda ours, theirs: three(ours, theirs, **parts)


def with_half(wide):
    return using(paired=lambda a, b: paired(a, b, wide))


def by_place(ours, theirs):
    differences = [a - b for a, b in zip(ours.values(), theirs.values())]
    return around(np.mean(differences), half(differences))


def added(ours, theirs):
    low, high = welch(ours, theirs)
    return around((low + high) / 2, half(list(ours.values())) + half(list(theirs.values())))


def common(runs, others):
    return {seed: value for seed, value in runs.items() if seed in others}


def seeds(spread, effect, power=0.8, level=0.975):
    for n in range(2, 10_000):
        critical, delta = t.ppf(level, n - 1), effect / spread * math.sqrt(n)
        if nct.sf(critical, n - 1, delta) + nct.cdf(-critical, n - 1, delta) >= power:
            return n


def seeds_by_interval(spread, effect, power=0.8):
    return next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread / n**0.5 < effect)


def seeds_by_normal(spread, effect, power=0.8):
    return math.ceil(((norm.ppf(0.975) + norm.ppf(power)) * spread / effect) ** 2)


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
    [("14.1", three), ("14.2", seeds), ("14.3", same), ("14.4", faster), ("14.5", audit)],
)
def test_right(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("14.1", paired, "a dictionary with the keys"),
        ("14.1", lambda a, b: dict.fromkeys(("paired", "welch", "bootstrap"), (0.0, 0.0)), "should be centered"),
        ("14.1", lambda a, b: dict.fromkeys(("paired", "welch", "bootstrap"), 0.0), "should be a pair"),
        ("14.1", using(paired=lambda a, b: paired(a, b)[::-1]), "low comes first"),
        ("14.1", using(paired=lambda a, b: paired(b, a)), "sign is wrong"),
        ("14.1", using(paired=by_place), "not by seed"),
        ("14.1", with_half(lambda d: 1.96 * np.std(d, ddof=1) / len(d) ** 0.5), "1.96"),
        ("14.1", with_half(lambda d: half(d, ddof=0)), "ddof=1"),
        ("14.1", with_half(lambda d: half(d) * len(d) ** 0.5), "for one difference"),
        ("14.1", with_half(lambda d: half(d, 0.95)), "90 %"),
        ("14.1", with_half(lambda d: half(d, freedom=len(d))), "degrees of freedom"),
        ("14.1", with_half(lambda d: 2 * half(d)), "the wrong width"),
        ("14.1", using(welch=paired), "Welch's interval"),
        ("14.1", using(welch=lambda a, b: welch(a, b, factor=1.96)), "Welch's interval: 1.96"),
        ("14.1", using(welch=lambda a, b: welch(a, b, freedom=lambda nu, n, m: n + m - 2)), "belong to a pooled"),
        (
            "14.1",
            using(welch=lambda a, b: welch(a, b, freedom=lambda nu, n, m: n + m - 2, error=pool)),
            "belong to a pooled|assumes that both arms vary alike",
        ),
        ("14.1", using(welch=lambda a, b: welch(a, b, freedom=lambda nu, n, m: min(n, m) - 1)), "a cautious bound"),
        ("14.1", using(welch=lambda a, b: welch(a, b, freedom=lambda nu, n, m: int(nu))), "do not round"),
        ("14.1", using(welch=lambda a, b: welch(a, b, ddof=0)), "ddof=1"),
        ("14.1", using(welch=added), "variances add"),
        ("14.1", using(welch=lambda a, b: welch(common(a, b), common(b, a))), "without a partner"),
        ("14.1", using(bootstrap=lambda a, b: bootstrap(a, b, (0.05, 0.95))), "90 % interval"),
        ("14.1", using(bootstrap=lambda a, b: bootstrap(a, b, single=True)), r"take \*means\*"),
        ("14.1", using(bootstrap=lambda a, b: bootstrap(a, b, center=False)), "centered at 0"),
        ("14.1", using(bootstrap=lambda a, b: bootstrap(a, b, apart=True)), "resampled apart"),
        ("14.1", using(bootstrap=paired), "is Student's"),
        ("14.1", using(bootstrap=lambda a, b: (-1.0, 1.0)), "with replacement"),
        ("14.2", lambda s, e, p: float(seeds(s, e, p)), "an int"),
        ("14.2", lambda s, e, p: 1, "too few"),
        ("14.2", lambda s, e, p: 3, "half of such studies|too few|known standard deviation"),
        ("14.2", seeds_by_interval, "half of such studies"),
        ("14.2", seeds_by_normal, "known standard deviation"),
        ("14.2", lambda s, e, p: seeds(s, e / 2**0.5, p), "two separate groups"),
        ("14.2", lambda s, e, p: seeds(s, e, p, 0.95), "one-sided"),
        ("14.2", lambda s, e, p: seeds(s, e), "ignores the power"),
        ("14.2", lambda s, e, p: seeds(s, e, p) + 1, "one too many"),
        ("14.2", lambda s, e, p: 1000, "too many"),
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
        ("14.4", lambda *a: (0.5, 0.5), "the first x at which"),
        ("14.5", lambda study: ["leak"], "a set of words"),
        ("14.5", lambda study: {"cheating"}, "not one of the words"),
        ("14.5", lambda study: set(), "you miss 'leak'"),
        ("14.5", lambda study: audit(study, lambda a, b: a != b), "in whatever order"),
        ("14.5", lambda study: audit(study, lambda a, b: set(a) != set(b)), "you miss 'seeds'"),
        ("14.5", lambda study: audit(study) | ({"leak"} if study["reported_on"] == "val" else set()), "'none'"),
    ],
)  # fmt: skip
def test_wrong(number, answer, said):
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)
