"""The figures of notebook 14, on results that are made up: what is planted must be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from regolite.paper.experiments import Claim, Side
from regolite.paper.plots import _points, plot_arms, plot_claims, plot_learning, plot_overlaps, plot_relations
from regolite.paper.statistics import Estimate, judge
from regolite.plots.drawing import GRAY, GREEN, VERMILLION, stage_color


def run(*aps, seed=0, drop=3, relations=None):
    """A run of four epochs with an AP by stage, evaluated after every second; all objects found with IoU 0.9."""
    stages = [{"AP": ap, "balls": 2 * ap, "by_iou": [0, 0, 0, 50 - stage, 100 + stage]} for stage, ap in enumerate(aps)]
    return {
        "seed": seed,
        "config": {"drop_epochs": [drop], "batch_size": 4},
        "curve": [{"epoch": e, "step": 10 * e, "AP": [ap * e / 4 for ap in aps]} for e in (2, 4)],
        "stages": stages,
        "objects": 200,
        "relations": relations,
    }


@pytest.fixture
def results():
    """Two seeds of each arm."""
    asked = {"chance": 30.0, "nearest": 90.0, "stages": [20.0, 40.0]}
    return {
        "base": {0: run(10.0), 1: run(12.0, seed=1)},
        "rego": {
            0: run(11.0, 20.0, relations=asked),
            1: run(13.0, 24.0, seed=1, relations={**asked, "stages": [24.0, 50.0]}),
        },
    }


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts] + [
        label.get_text() for ax in figure.axes for label in ax.get_yticklabels()
    ]


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def lines(ax, **look):
    return [
        np.asarray(line.get_xydata())
        for line in ax.lines
        if all(getattr(line, f"get_{name}")() == value for name, value in look.items())
    ]


class TestLearning:
    groups = {"Deformable DETR": ["base", "base_drop"], "REGO": ["rego"]}
    costs = {"base": {"step": 0.6, "macs": 1e9}, "rego": {"step": 1.2, "macs": 2e9}}

    def test_mean_and_seeds_of_the_last_stage_by_epoch(self, results):
        [ax] = plot_learning(results, self.groups).axes
        assert [line.tolist() for line in lines(ax, linewidth=2.2)] == [
            [[2, 5.5], [4, 11.0]],
            [[2, 11.0], [4, 22.0]],
        ]
        assert [line[-1, 1] for line in lines(ax, linewidth=0.7)] == [10.0, 12.0, 20.0, 24.0]

    def test_base_detector_inside_is_dashed_and_the_drop_marked(self, results):
        figure = plot_learning(results, self.groups)
        [inside] = lines(figure.axes[0], linestyle="--")
        assert inside[:, 1].tolist() == [6.0, 12.0]
        assert [drop.tolist() for drop in lines(figure.axes[0], marker="v")] == [[[3.0, 8.25]], [[3.0, 16.5]]]
        assert legend(figure) == ["Deformable DETR", "REGO", "learning rate ÷ 10", "base detector inside REGO"]

    def test_against_time_and_cost(self, results):
        figure = plot_learning(results, self.groups, ("epochs", "minutes", "multiply-adds"), self.costs)
        ends = [[line[-1, 0] for line in lines(ax, linewidth=2.2)] for ax in figure.axes]
        np.testing.assert_allclose(ends, [[4, 4], [40 * 0.6 / 60, 40 * 1.2 / 60], [0.16, 0.32]])

    def test_without_costs_only_epochs(self, results):
        assert len(plot_learning(results, self.groups, ("epochs", "minutes")).axes) == 1

    def test_arms_without_cost_are_left_out_of_the_other_panels(self, results):
        figure = plot_learning(results, self.groups, ("epochs", "minutes"), {"base": self.costs["base"]})
        assert [len(lines(ax, linewidth=2.2)) for ax in figure.axes] == [2, 1]

    def test_nothing_there(self):
        assert len(plot_learning({}, self.groups).axes) == 1


class TestArms:
    def test_a_mark_a_seed_and_the_interval_of_the_mean(self, results):
        rows = {"base": Side("base"), "missing": Side("star"), "last stage": Side("rego"), "inside": Side("rego", 0)}
        figure = plot_arms(results, {"AP": rows})
        assert [text for text in texts(figure) if text] == ["11.0", "22.0", "12.0", "base", "last stage", "inside"]
        assert [line[:, 0].tolist() for line in lines(figure.axes[0], marker="o")] == [[10.0, 20.0, 11.0]]
        found = Estimate.of([10.0, 12.0])
        assert lines(figure.axes[0], linewidth=2.4)[0][:, 0].tolist() == [found.low, found.high]

    def test_panels_of_two_figures(self, results):
        panels = {title: {"base": Side("base", metric=metric)} for title, metric in (("AP", "AP"), ("balls", "balls"))}
        figure = plot_arms(results, panels)
        assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [["11.0"], ["22.0"]]

    def test_one_seed_has_no_interval(self, results):
        figure = plot_arms({"base": {3: run(9.0)}}, {"AP": {"base": Side("base")}})
        assert not lines(figure.axes[0], linewidth=2.4) and "seed 3" in legend(figure)

    def test_nothing_there(self):
        assert not lines(plot_arms({}, {"AP": {"base": Side("base")}}).axes[0])


class TestClaims:
    def claim(self, expects="more", paper=2.0, margin=1.0):
        return Claim("It is better.", "Table 9", Side("rego"), Side("base"), paper, expects, margin)

    def results(self, *differences):
        base = {seed: run(10.0, seed=seed) for seed in range(len(differences))}
        return {"base": base, "rego": {seed: run(10.0 + d, seed=seed) for seed, d in enumerate(differences)}}

    def drawn(self, *differences, **changes):
        verdict = judge(self.claim(**changes), self.results(*differences))
        return verdict, plot_claims({"stages": [verdict]}).axes[0]

    @pytest.mark.parametrize(
        ("differences", "word", "color"),
        [
            ((3.0, 3.1, 2.9), "reproduced (3)", GREEN),
            ((-3.0, -3.1, -2.9), "not reproduced (3)", VERMILLION),
            ((3.0, -3.0, 1.0), "undecided (3)", GRAY),
            ((3.0,), "undecided (1)", GRAY),
            ((), "no runs yet (0)", GRAY),
        ],
    )
    def test_word_and_color(self, differences, word, color):
        _, ax = self.drawn(*differences)
        [said] = [text for text in ax.texts if text.get_text() == word]
        assert to_hex(said.get_color()).upper() == color.upper()
        assert [text.get_text() for text in ax.texts][:2] == ["stages", "It is better."]

    def test_mean_interval_and_the_papers_figure(self):
        verdict, ax = self.drawn(3.0, 3.1, 2.9)
        [interval] = lines(ax, linewidth=2)
        np.testing.assert_allclose(interval[:, 0], [verdict.difference.low, verdict.difference.high])
        assert lines(ax, marker="d")[0][0, 0] == 2.0
        assert not lines(self.drawn(3.0, 3.1, 2.9, paper=None)[1], marker="d")

    @pytest.mark.parametrize(
        ("expects", "range_"), [("more", (0.0, math.inf)), ("same", (-1.5, 1.5)), ("not less", (-1.5, math.inf))]
    )
    def test_where_the_interval_must_lie_is_shaded(self, expects, range_):
        _, ax = self.drawn(3.0, 3.1, 2.9, expects=expects, margin=1.5)
        [shade] = ax.collections
        box = shade.get_paths()[0].get_extents()
        assert (box.x0, box.x1) == pytest.approx((range_[0], min(range_[1], ax.get_xlim()[1])))

    def test_wide_intervals_end_in_arrows(self):
        wide = self.results(3.0, 60.0, -50.0)
        narrow = self.results(3.0, 3.1, 2.9)
        verdicts = [judge(self.claim(), found) for found in (wide, narrow)]
        ax = plot_claims({"stages": verdicts}).axes[0]
        assert ax.get_xlim()[1] < 60 and len(lines(ax, marker=">")) == len(lines(ax, marker="<")) == 1

    @pytest.mark.parametrize(("differences", "scale"), [((3.0, 3.1, 2.9), "linear"), ((20.0, 21.0, 19.0), "symlog")])
    def test_large_differences_leave_room_for_small_ones(self, differences, scale):
        assert self.drawn(*differences)[1].get_xscale() == scale


def test_overlaps_per_hundred_objects(results):
    rows = {"alone": Side("base"), "missing": Side("star"), "inside": Side("rego", 0), "stage 1": Side("rego", 1)}
    ax = plot_overlaps(results, rows).axes[0]
    bars = [[bar.get_height() for bar in group] for group in ax.containers]
    assert bars == [[0, 0, 0, 25.0, 50.0], [0, 0, 0, 25.0, 50.0], [0, 0, 0, 24.5, 50.5]]
    colors = [to_hex(group[0].get_facecolor()).upper() for group in ax.containers]
    assert colors == [GRAY.upper(), stage_color(0).upper(), stage_color(1).upper()]


class TestRelations:
    def test_by_stage_with_rivals(self, results):
        figure = plot_relations(results, {"REGO": "rego", "none": "base", "missing": "star"})
        [ax] = figure.axes
        assert [bar.get_height() for bar in ax.patches] == [22.0, 45.0]
        assert [line[0, 1] for line in lines(ax, linestyle="-.") + lines(ax, linestyle=":")] == [90.0, 30.0]
        assert [line[:, 1].tolist() for line in lines(ax, marker="o")] == [[20.0, 40.0], [24.0, 50.0]]

    def test_nothing_there(self):
        assert not plot_relations({}, {"REGO": "rego"}).axes[0].patches


def test_what_was_not_measured_is_a_gap_in_the_line():
    run = {"curve": [{"epoch": 1, "step": 10, "AP": [None, 0.0]}, {"epoch": 2, "step": 20, "AP": [3.0, None]}]}
    np.testing.assert_array_equal(_points(run, 0)[1], [np.nan, 3.0])
    np.testing.assert_array_equal(_points(run, 1)[1], [0.0, np.nan])
