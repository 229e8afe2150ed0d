"""The bootstrap over images against evaluating every draw from scratch."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from regolite.data import Scenes
from regolite.evaluation import bootstrap, measure
from regolite.evaluation.bootstrap import interval


@pytest.fixture(scope="module")
def scenes():
    return Scenes(12, seed=5)


def detections(scenes, noise, seed):
    """The truth with moved boxes and some wrong classes."""
    generator = np.random.default_rng(seed)
    found = []
    for a in scenes.coco.dataset["annotations"]:
        category = a["category_id"] if generator.random() < 0.8 else generator.choice(scenes.category_ids)
        box = (np.array(a["bbox"]) + generator.normal(0, noise, 4)).tolist()
        found.append(
            {"image_id": a["image_id"], "category_id": int(category), "bbox": box, "score": generator.random()}
        )
    return found


@pytest.fixture(scope="module")
def by_stage(scenes):
    return [detections(scenes, noise, n) for n, noise in enumerate((4.0, 1.0))]


def test_every_draw_is_what_coco_gives_for_its_images(scenes, by_stage):
    draws = bootstrap(scenes.coco, by_stage, draws=3, seed=7, progress=False)
    generator = np.random.default_rng(7)
    for n in range(3):
        rows = generator.integers(len(scenes), size=len(scenes))
        for stage, results in enumerate(by_stage):
            coco, drawn = drawn_again(scenes, results, rows)
            expected = measure(coco, drawn)
            assert draws.ap[n, stage] == pytest.approx(expected.figures["AP"], abs=1e-3)
            assert draws.ap50[n, stage] == pytest.approx(expected.figures["AP50"], abs=1e-3)
            np.testing.assert_allclose(draws.precision[n, stage].mean(0), expected.by_category, atol=1e-6)


def drawn_again(scenes, results, rows):
    """Ground truth and detections of a draw, every image with an id of its own."""
    image_ids = sorted(scenes.image_ids)  # the order in which pycocotools keeps them
    dataset, found = {**scenes.coco.dataset, "images": [], "annotations": []}, []
    for new, row in enumerate(rows):
        old = image_ids[row]
        dataset["images"].append({**scenes.coco.imgs[old], "id": new + 1})
        for a in scenes.coco.imgToAnns[old]:
            dataset["annotations"].append({**a, "image_id": new + 1, "id": len(dataset["annotations"]) + 1})
        found += [{**d, "image_id": new + 1} for d in results if d["image_id"] == old]
    coco = copy.copy(scenes.coco)
    coco.dataset = dataset
    coco.createIndex()
    return coco, found


def test_the_interval_holds_the_figure_and_a_seed_repeats_it(scenes, by_stage):
    draws = bootstrap(scenes.coco, by_stage, draws=100, progress=False)
    for stage, results in enumerate(by_stage):
        low, high = interval(draws.ap[:, stage])
        assert low < measure(scenes.coco, results).figures["AP"] < high
    again = bootstrap(scenes.coco, by_stage, draws=100, progress=False)
    np.testing.assert_array_equal(draws.precision, again.precision)


def test_stages_share_their_draws(scenes, by_stage):
    draws = bootstrap(scenes.coco, [by_stage[0], by_stage[0]], draws=5, progress=False)
    np.testing.assert_array_equal(draws.ap[:, 0], draws.ap[:, 1])


def test_no_detections_are_no_precision(scenes):
    draws = bootstrap(scenes.coco, [[]], draws=2, progress=False)
    np.testing.assert_array_equal(draws.ap, 0)
