"""Data sets made of others: some classes of one, several in a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from regolite.data import Scenes, make_transform, open_data, repeat_rare
from regolite.errors import UserError
from regolite.evaluation import average_precision

TINY = Path(__file__).resolve().parent.parent / "data" / "coco_tiny"
SOME = ("dog", "person", "chair")


@pytest.fixture(scope="module")
def tiny():
    return open_data(TINY, "val", make_transform("none", 64))


class TestOfClasses:
    def test_keeps_the_objects_of_the_classes_and_all_images(self, tiny):
        some = tiny.of_classes(SOME)
        assert some.classes == SOME and some.image_ids == tiny.image_ids
        for i in range(len(tiny)):
            (pixels, whole), (same_pixels, part) = tiny[i], some[i]
            assert torch.equal(pixels, same_pixels)
            names = [tiny.classes[label] for label in whole.labels]
            kept = [n for n, name in enumerate(names) if name in SOME]
            assert [some.classes[label] for label in part.labels] == [names[n] for n in kept]
            assert torch.equal(part.boxes, whole.boxes[kept])

    def test_ground_truth_is_cocos_own_restricted_to_the_classes(self, tiny):
        some = tiny.of_classes(SOME)
        wanted = set(some.category_ids)
        annotations = [a for a in tiny.coco.dataset["annotations"] if a["category_id"] in wanted]
        assert some.coco.dataset["annotations"] == annotations
        assert {c["name"]: c["id"] for c in some.coco.dataset["categories"]} == dict(zip(SOME, some.category_ids))

    def test_detections_of_other_classes_count_for_nothing(self, tiny):
        some = tiny.of_classes(SOME)
        perfect = [
            {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
            for a in some.coco.dataset["annotations"]
        ]
        others = [
            {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for a in tiny.coco.dataset["annotations"]
            if a["category_id"] not in some.category_ids
        ]
        assert others
        assert average_precision(some.coco, perfect + others) == average_precision(some.coco, perfect)

    def test_an_unknown_class_names_the_nearest(self, tiny):
        with pytest.raises(UserError, match="'peson'.*did you mean 'person'"):
            tiny.of_classes(["dog", "peson"])

    def test_relations_follow_where_both_objects_stay(self):
        scenes = Scenes(5, context=1.0)
        assert sum(len(scenes.relations(i)) for i in range(5)) > 0
        same = scenes.of_classes(scenes.classes)
        assert [same.relations(i) for i in range(5)] == [scenes.relations(i) for i in range(5)]


class TestJoined:
    def test_train_and_val_are_all_images_of_the_folder(self):
        both = open_data(TINY, "train+val")
        parts = [open_data(TINY, split) for split in ("train", "val")]
        assert len(both) == 158
        assert both.image_ids == parts[0].image_ids + parts[1].image_ids
        for i, part in ((3, parts[0][3]), (130, parts[1][130 - len(parts[0])])):
            assert torch.equal(both[i][0], part[0]) and torch.equal(both[i][1].boxes, part[1].boxes)

    def test_annotations_are_numbered_apart(self):
        scenes = [open_data("scenes:6:val=6", split) for split in ("train", "val")]
        scenes[1].image_ids = [i + 100 for i in scenes[1].image_ids]
        from regolite.data.views import Joined

        joined = Joined(scenes)
        ids = np.concatenate([joined.objects(i).ids for i in range(12)])
        assert len(set(ids.tolist())) == len(ids) and ids.min() == 1
        assert [joined.relations(i) for i in range(12)] == [s.relations(i) for s in scenes for i in range(6)]

    def test_a_limit_counts_over_all(self):
        assert len(open_data(TINY, "train+val", limit=130)) == 130
        with pytest.raises(UserError, match="at least 1"):
            open_data(TINY, "train+val", limit=0)

    def test_an_image_that_is_in_both_is_refused(self):
        with pytest.raises(UserError, match="in two of the datasets"):
            open_data(TINY, "val+val")

    def test_other_classes_are_refused(self):
        from regolite.data.views import Joined

        val = open_data(TINY, "val")
        with pytest.raises(UserError, match="different classes"):
            Joined([val, open_data(TINY, "train").of_classes(SOME)])


class TestRepeatRare:
    def test_images_are_repeated_by_the_factor_of_their_rarest_class(self, tiny):
        images = {name: 0 for name in tiny.classes}
        for i in range(len(tiny)):
            for label in set(tiny.objects(i).labels[~tiny.objects(i).crowd].tolist()):
                images[tiny.classes[label]] += 1
        counts = np.mean([np.bincount(repeat_rare(tiny, 0.3, seed).indices) for seed in range(200)], axis=0)
        for i in range(len(tiny)):
            objects = tiny.objects(i)
            rarest = min((images[tiny.classes[n]] for n in objects.labels[~objects.crowd]), default=len(tiny))
            assert counts[i] == pytest.approx(max(1, (0.3 * len(tiny) / rarest) ** 0.5), abs=0.15)

    def test_every_image_stays_and_common_ones_stay_single(self, tiny):
        assert repeat_rare(tiny, 1e-6).indices == list(range(len(tiny)))
        assert set(repeat_rare(tiny, 1.0).indices) == set(range(len(tiny)))

    def test_copies_are_the_image(self, tiny):
        view = repeat_rare(tiny, 1.0)
        place = view.indices.index(5)
        assert view.indices[place + 1] == 5, "a rare one"
        for copy in (place, place + 1):
            assert torch.equal(view[copy][0], tiny[5][0]) and view.file_name(copy) == tiny.file_name(5)
