"""The figures of notebook 21, on scenes and detections that are made up."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from regolite.data import Scenes
from regolite.evaluation import KINDS, judge, measure
from regolite.plots import precision
from regolite.plots.drawing import TRUTH_COLOR, VERMILLION


@pytest.fixture(scope="module")
def dataset():
    return Scenes(4, size=64, split="val")


def found(dataset, shift=0.0, score=0.9, leave_out=()):
    """The truth, moved by a part of the width; without the objects of some images."""
    results = []
    for one in dataset.coco.dataset["annotations"]:
        x, y, w, h = one["bbox"]
        if one["image_id"] not in leave_out:
            box = {"bbox": [x + shift * w, y, w, h], "score": score}
            results.append({"image_id": one["image_id"], "category_id": one["category_id"], **box})
    return results


def titles(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts if text.get_text()]


def frames(figure, color):
    return [p.get_bbox() for ax in figure.axes for p in ax.patches if to_hex(p.get_edgecolor()) == color.lower()]


class TestCategories:
    ap = np.array([[10.0, 50.0, np.nan, 90.0, 0.0], [20.0, 40.0, np.nan, 95.0, 5.0]])
    names, objects = ("ape", "bee", "cow", "dog", "eel"), np.array([3, 1, 0, 7, 2])

    def said(self, count):
        figure = precision.plot_categories(self.names, self.ap, self.objects, count)
        return [
            [(label.get_text(), bar.get_width()) for label, bar in zip(ax.get_yticklabels(), ax.patches)]
            for ax in figure.axes
        ]

    def test_best_and_worst_without_those_that_have_no_object(self):
        assert self.said(1) == [[("dog (7)", 95.0)], [("eel (2)", 5.0)]]

    def test_no_category_twice(self):
        assert self.said(10) == [[("dog (7)", 95.0), ("bee (1)", 40.0)], [("ape (3)", 20.0), ("eel (2)", 5.0)]]

    def test_one_category_and_one_stage(self):
        figure = precision.plot_categories(["ape"], np.array([[7.0]]), np.array([1]))
        assert [len(ax.patches) for ax in figure.axes] == [1, 0]


def test_overlaps_are_counted_by_tenths(dataset):
    by_stage = [judge(dataset.coco, found(dataset, shift)) for shift in (0.2, 0.1, 0.0)]
    objects = len(by_stage[0].truth)
    wanted = [[0, objects, 0, 0, 0], [0, 0, 0, objects, 0], [0, 0, 0, 0, objects]]  # IoU 0.8 / 1.2, 0.9 / 1.1, 1
    assert [precision.overlap_histogram(one) for one in by_stage] == wanted
    heights = [bar.get_height() for bar in precision.plot_overlaps(by_stage).axes[0].patches]
    assert heights == sum(wanted, [])


def test_precision_by_stage(dataset):
    by_stage = [measure(dataset.coco, found(dataset, shift)) for shift in (0.2, 0.0)]
    loose, strict = precision.plot_precision(by_stage).axes
    assert [line.get_ydata().min() for line in loose.lines] == pytest.approx([100, 100])
    assert [line.get_ydata().max() for line in strict.lines] == pytest.approx([0, 100])


def test_errors_by_kind(dataset):
    by_stage = [judge(dataset.coco, found(dataset, 0.5)), judge(dataset.coco, found(dataset))]
    costs = [one.costs() for one in by_stage]
    counts, points = precision.plot_errors(by_stage, costs, 0.5).axes
    heights = [bar.get_height() for bar in counts.patches]
    assert heights[KINDS.index("box")] == by_stage[0].counts()["box"] > 0 and sum(heights[len(KINDS) :]) == 0
    assert points.patches[KINDS.index("box")].get_height() == costs[0]["box"] > 0


class TestImages:
    def test_the_highest_scoring_wrong_one_of_each_image_beside_its_object(self, dataset):
        judged = judge(dataset.coco, found(dataset, 0.5, 0.7) + found(dataset, 0.5, 0.9)[:1])
        figure = precision.draw_errors(dataset, judged, count=3)
        assert len(figure.axes) == 3
        said = titles(figure)
        assert said[0].endswith(" 0.90") and all(text.endswith("0.70") for text in said[2::2])
        assert len(frames(figure, VERMILLION)) == 3

    def test_the_box_lies_in_the_part_that_is_cut_out(self, dataset):
        [wrong] = [one for one in found(dataset, 0.5)[:1]]
        figure = precision.draw_errors(dataset, judge(dataset.coco, [wrong]))
        [red], [green] = frames(figure, VERMILLION), frames(figure, TRUTH_COLOR)
        width, height = wrong["bbox"][2:]
        assert green.width == pytest.approx(width) and green.height == pytest.approx(height)
        assert red.x0 - green.x0 == pytest.approx(width / 2) and red.y0 == pytest.approx(green.y0)
        image = figure.axes[0].images[0].get_array()
        assert 64 / 4 <= image.shape[1] <= 64 and red.x1 <= image.shape[1] and red.y1 <= image.shape[0]

    def test_what_was_missed_and_what_came_near(self, dataset):
        first, second, *_ = dataset.image_ids
        results = found(dataset, leave_out=(first, second)) + found(dataset, 0.0, 0.3, dataset.image_ids[1:])
        judged = judge(dataset.coco, results)
        figure = precision.draw_missed(dataset, judged, 0.5)
        said = titles(figure)
        assert len(figure.axes) == 2 and set(said[::2]) <= set(dataset.classes)
        assert sorted(said[1::2]) == ["correct with 0.30", "no detection"]
        assert len(frames(figure, TRUTH_COLOR)) == 2

    def test_nothing_wrong_and_nothing_missed(self, dataset):
        judged = judge(dataset.coco, found(dataset))
        assert precision.draw_errors(dataset, judged) is None
        assert precision.draw_missed(dataset, judged, 0.5) is None
