"""Where errors come from: hand-made images in which every kind of error is known."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO

from regolite.evaluation import average_precision
from regolite.evaluation.error_types import KINDS, judge

CAT, DOG = 17, 18


def truth(*objects, crowds=(), images=(1, 2)):
    """Ground truth of (image, category, box)."""
    listed = [(*one, 0) for one in objects] + [(*one, 1) for one in crowds]
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "width": 400, "height": 400} for i in images],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (i, c, box, crowd) in enumerate(listed, 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def found(*detections):
    """Results of (image, category, box, score)."""
    return [{"image_id": i, "category_id": c, "bbox": box, "score": s} for i, c, box, s in detections]


def box(x, width=100, y=0):
    return [x, y, width, 100]


OBJECT = (1, CAT, box(0))  # one cat, 100 x 100 pixels


class TestKinds:
    @pytest.mark.parametrize(
        ("detection", "kind", "overlap"),
        [
            ((1, CAT, box(0)), "correct", 1.0),
            ((1, CAT, box(0, 200)), "correct", 0.5),  # the border belongs to the right ones
            ((1, CAT, box(0, 201)), "box", 100 / 201),
            ((1, CAT, box(0, 1000)), "box", 0.1),  # and so does this one
            ((1, CAT, box(0, 1001)), "background", 0.0),
            ((1, DOG, box(0, 200)), "class", 0.5),
            ((1, DOG, box(0, 201)), "both", 100 / 201),
            ((1, DOG, box(0, 1001)), "background", 0.0),
            ((1, CAT, box(300)), "background", 0.0),
            ((2, CAT, box(0)), "background", 0.0),  # an image without objects
        ],
    )
    def test_one_detection_of_one_cat(self, detection, kind, overlap):
        judged = judge(truth(OBJECT), found((*detection, 0.9)))
        assert judged.kinds.tolist() == [kind]
        assert judged.overlaps.tolist() == pytest.approx([overlap])
        assert judged.objects.tolist() == [0 if overlap else -1]
        counts = judged.counts()
        assert counts.pop("missed") == (kind not in ("correct", "box", "class"))
        assert counts == {name: int(name == kind) for name in ("correct", *KINDS[:-1])}

    def test_the_surer_one_takes_the_object(self):
        judged = judge(truth(OBJECT), found((*OBJECT, 0.3), (1, CAT, box(20), 0.8), (1, CAT, box(30), 0.5)))
        assert judged.scores.tolist() == [0.8, 0.5, 0.3]
        assert judged.kinds.tolist() == ["correct", "duplicate", "duplicate"]
        assert judged.overlaps[0] == pytest.approx(80 / 120) and judged.overlaps[2] == 1.0

    def test_a_detection_takes_the_nearest_free_object(self):
        objects = [(1, CAT, box(0)), (1, CAT, box(20))]
        judged = judge(truth(*objects), found((*objects[1], 0.9), (1, CAT, box(18), 0.8)))
        assert judged.kinds.tolist() == ["correct", "correct"] and judged.objects.tolist() == [1, 0]

    def test_the_first_reason_that_fits(self):
        """A loose box around its own class is that, though it lies well on an object of another class."""
        objects = [(1, CAT, box(0)), (1, DOG, box(60))]
        judged = judge(truth(*objects), found((1, CAT, box(60), 0.9)))
        assert judged.kinds.tolist() == ["box"] and judged.objects.tolist() == [0]
        twice = judge(truth(*objects[:1], (1, DOG, box(5))), found((*OBJECT, 0.9), (1, CAT, box(10), 0.8)))
        assert twice.kinds.tolist() == ["correct", "class"]

    def test_a_crowd_excuses_its_class_alone(self):
        coco = truth(OBJECT, crowds=[(1, CAT, box(0, 400)), (2, CAT, box(0, 400))])
        cats = [(*OBJECT, 0.9), (1, CAT, box(200, 50), 0.8), (1, CAT, box(10), 0.7), (2, CAT, box(0), 0.6)]
        judged = judge(coco, found(*cats, (2, DOG, box(0), 0.5)))
        assert judged.kinds.tolist() == ["correct", "ignored", "ignored", "ignored", "background"]
        assert judged.missed.tolist() == [] and len(judged.truth) == 1

    def test_categories_that_the_data_do_not_know_are_left_out(self):
        assert len(judge(truth(OBJECT), found((1, 99, box(0), 0.9)))) == 0

    def test_nothing_found(self):
        judged = judge(truth(OBJECT), [])
        assert judged.missed.tolist() == [0] and judged.counts()["missed"] == 1
        assert judged.ap50() == 0.0
        assert np.isnan(judged.costs()["missed"]), "without its only object there is nothing to measure"


def test_a_threshold_leaves_kinds_and_adds_missed_ones():
    results = found((*OBJECT, 0.4), (1, DOG, box(300), 0.8), (1, CAT, box(5), 0.2))
    judged = judge(truth(OBJECT), results)
    assert judged.counts() == {k: int(k in ("correct", "background", "duplicate")) for k in ("correct", *KINDS)}
    sure = judged.above(0.5)
    assert sure.counts() == {k: int(k in ("background", "missed")) for k in ("correct", *KINDS)}
    assert len(judged.above(0.4)) == 2, "the threshold itself is in"


class TestCosts:
    def test_each_kind_by_hand(self):
        """Two cats; the first is found, the second only loosely, below a false alarm."""
        objects = [OBJECT, (2, CAT, box(0))]
        results = found((*OBJECT, 0.9), (1, CAT, box(300), 0.8), (2, CAT, box(0, 250), 0.7))
        judged = judge(truth(*objects), results)
        assert judged.kinds.tolist() == ["correct", "background", "box"]
        half = 100 * 51 / 101  # precision 1 at the recalls 0, 0.01, ..., 0.5; the others are never reached
        assert judged.ap50() == pytest.approx(half)
        costs = judged.costs()
        assert costs["box"] == pytest.approx(100 * 50 / 101 * 2 / 3), "two right of three"
        assert costs["background"] == costs["missed"] == costs["class"] == 0.0

    def test_a_mended_class_goes_to_the_other_class(self):
        objects = [OBJECT, (2, DOG, box(0))]
        judged = judge(truth(*objects), found((*OBJECT, 0.9), (2, CAT, box(0), 0.95)))
        assert judged.kinds.tolist() == ["class", "correct"]
        assert judged.ap50() == pytest.approx((50 + 0) / 2)
        assert judged.ap50("class") == pytest.approx(100)

    def test_mending_makes_no_duplicates(self):
        results = found((1, CAT, box(0, 250), 0.9), (1, CAT, box(0, 260), 0.8), (1, CAT, box(300), 0.1))
        judged = judge(truth(OBJECT), results)
        assert judged.kinds.tolist() == ["box", "box", "background"]
        assert judged.ap50("box") == pytest.approx(100)
        taken = judge(truth(OBJECT), found((*OBJECT, 0.5), (1, CAT, box(0, 250), 0.9)))
        assert taken.ap50() == pytest.approx(50) and taken.ap50("box") == pytest.approx(100), "the loose one goes"

    def test_taking_away(self):
        results = found((*OBJECT, 0.5), (1, CAT, box(10), 0.4), (1, CAT, box(300), 0.9), (2, CAT, box(0), 0.95))
        judged = judge(truth(OBJECT, (2, DOG, box(150, 250))), results)
        assert judged.ap50() == pytest.approx(100 / 3 / 2)
        assert judged.ap50("background") == pytest.approx(50)
        assert judged.costs()["duplicate"] == 0.0, "it comes after the right one"
        assert judged.ap50("missed") == pytest.approx(100 / 3), "the mean over cats alone"


@pytest.mark.parametrize("seed", range(4))
def test_ap50_is_pycocotools_own(seed):
    """Random images: crowds, ties, duplicates and both classes."""
    random = np.random.default_rng(seed)

    def boxes(count):
        near = random.choice([0, 60, 120], (count, 2)) + random.integers(-25, 25, (count, 2))
        return np.hstack([near.clip(0), random.integers(60, 110, (count, 2))]).tolist()

    images = (5, 3, 9, 1)  # not in order
    objects = [(int(random.choice(images)), int(random.choice([CAT, DOG])), b) for b in boxes(24)]
    coco = truth(*objects[:20], crowds=objects[20:], images=images)
    results = [
        (int(random.choice(images)), int(random.choice([CAT, DOG])), b, round(float(random.random()), 1))
        for b in boxes(150)
    ]
    judged = judge(coco, found(*results))
    assert {"correct", "ignored", "box", "class", "both", "duplicate"} <= set(judged.kinds.tolist())
    assert judged.ap50() == pytest.approx(average_precision(coco, found(*results))["AP50"], abs=1e-3)
    assert min(judged.costs().values()) > -10
