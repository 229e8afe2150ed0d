"""Scenes: the same by seed in any order, boxes that fit what is seen, and classes that only context tells."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from regolite.data import CocoFolder, Scenes, make_transform, open_data
from regolite.data.scenes import CLASSES, DECIDERS, SHAPES, TEXTURES, Scene, Thing
from regolite.errors import UserError

COUNT = 60


@pytest.fixture(scope="module")
def scenes():
    return Scenes(COUNT)


def same_item(one, other):
    return torch.equal(one[0], other[0]) and same_target(one[1], other[1])


def same_target(one, other):
    return (
        torch.equal(one.labels, other.labels)
        and torch.equal(one.boxes, other.boxes)
        and (one.image_id, one.size) == (other.image_id, other.size)
    )


def test_same_by_seed_and_index_alone(scenes):
    items = [scenes[i] for i in range(6)]
    other = Scenes(6)
    for i in (5, 0, 3, 3, 1):
        assert same_item(other[i], items[i])
    assert same_item(other[-1], items[5])
    with pytest.raises(IndexError):
        other[6]
    assert not same_item(Scenes(6, seed=1)[0], items[0])
    assert not same_item(Scenes(6, split="val")[0], items[0])
    assert len({item[0].sum().item() for item in items}) == 6


def test_items(scenes):
    assert len(scenes.classes) == len(SHAPES) * len(TEXTURES) + len(DECIDERS) == len(set(scenes.classes))
    assert scenes.category_ids == tuple(range(1, len(CLASSES) + 1))
    labels = set()
    for i in range(COUNT):
        pixels, target = scenes[i]
        assert pixels.shape == (3, 128, 128)
        assert target.size == (128, 128)
        assert 1 <= len(target) <= 8
        centers, sides = target.boxes.split(2, dim=1)
        assert (centers - sides / 2 >= 0).all()
        assert (centers + sides / 2 <= 1).all()
        assert (sides * 128 >= 4).all()
        labels |= set(target.labels.tolist())
    assert labels == set(range(len(CLASSES)))


def test_boxes_hold_what_is_seen(scenes):
    """Painting one thing in another color changes pixels inside its box alone, up to the box's edges."""
    for i in range(12):
        scene, objects = scenes.scene(i), scenes.objects(i)
        before = np.asarray(scene.draw()).astype(int)
        for k, thing in enumerate(scene.things):
            things = list(scene.things)
            things[k] = replace(thing, colors=tuple(tuple(255 - c for c in color) for color in thing.colors))
            after = np.asarray(Scene(scene.size, scene.noise, things).draw()).astype(int)
            rows, columns = np.nonzero(np.abs(after - before).max(2) > 50)
            x, y, w, h = objects.boxes[k]
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(drawn - [x, y, x + w, y + h]).max() <= 3
            assert objects.areas[k] <= w * h


def test_occlusion(scenes):
    """Things overlap, later in front, and of each at least its share is seen."""
    hidden = 0
    for i in range(COUNT):
        scene = scenes.scene(i)
        deciders = {thing.decider for thing in scene.things}
        for k, thing in enumerate(scene.things):
            window, cover = thing.stencil()
            seen = (scene.owner[window] == k).sum() / (cover >= 0.5).sum()
            assert seen >= (0.8 if k in deciders else 0.6)
            assert thing.shape != "ball" or seen == 1
            hidden += seen < 1
    assert hidden > COUNT / 4


def test_only_the_neighbor_tells_a_balls_class(scenes):
    """Swap square and star: the pixels in the ball's box stay, its class changes."""
    swapped = 0
    for i in range(COUNT):
        scene, objects = scenes.scene(i), scenes.objects(i)
        image = np.asarray(scene.draw())
        for k, ball in enumerate(scene.things):
            if ball.decider is None:
                continue
            things = list(scene.things)
            decider = things[ball.decider]
            other_shape = DECIDERS[1 - DECIDERS.index(decider.shape)]
            things[ball.decider] = replace(decider, shape=other_shape)
            other = Scene(scene.size, scene.noise, things)
            x, y, w, h = objects.boxes[k].astype(int)
            inside = slice(y, y + h), slice(x, x + w)
            other_image = np.asarray(other.draw())
            assert np.array_equal(image[inside], other_image[inside])
            assert not np.array_equal(image, other_image)
            assert CLASSES[scene.label(k)] == f"ball of {decider.shape}"
            assert CLASSES[other.label(k)] == f"ball of {other_shape}"
            swapped += 1
    assert swapped > COUNT / 3


def test_nearer_objects_take_the_nearest_place_from_deciders():
    """And the nearest square or star still decides."""
    places = []
    for i in range(60):
        scene = (scenes := Scenes(60, size=96, max_objects=6, nearer=1)).scene(i)
        for ball in (thing for thing in scene.things if thing.decider is not None):
            gaps = [ball.gap(thing) if thing is not ball else np.inf for thing in scene.things]
            places.append(int(np.argmin(gaps)) == ball.decider)
            deciding = [k for k, thing in enumerate(scene.things) if thing.shape in DECIDERS]
            assert min(deciding, key=gaps.__getitem__) == ball.decider
    assert len(places) > 20 and np.mean(places) < 0.1
    assert len(scenes) == 60


def test_scale_changes_the_size_of_all_objects_and_1_is_the_default():
    def extent(**options):
        scenes = Scenes(30, size=128, context=0, **options)
        return np.median([np.sqrt(box[2] * box[3]) for i in range(30) for box in scenes.objects(i).boxes])

    assert extent(scale=0.5) == pytest.approx(0.5 * extent(), rel=0.1)
    one, two = Scenes(3, size=96), Scenes(3, size=96, scale=1.0, nearer=0.0)
    assert all(np.array_equal(np.asarray(one.image(i)), np.asarray(two.image(i))) for i in range(3))
    with pytest.raises(UserError, match=r"scenes with scale 3: give 0\.1 to 2"):
        Scenes(3, scale=3)


def test_decider_is_clearly_the_nearest(scenes):
    """By what is seen alone: the square or star whose visible pixels come nearest to the ball is its decider."""
    for i in range(COUNT):
        scene = scenes.scene(i)
        for ball in scene.things:
            if ball.decider is None:
                continue
            distances = {}
            for k, thing in enumerate(scene.things):
                if thing.shape in DECIDERS:
                    rows, columns = np.nonzero(scene.owner == k)
                    distances[k] = np.hypot(rows + 0.5 - ball.y, columns + 0.5 - ball.x).min() - ball.radius
            nearest, *others = sorted(distances, key=distances.get)
            assert nearest == ball.decider
            assert all(distances[k] > distances[nearest] + 2 for k in others)
            assert distances[nearest] < 0.2 * scene.size


def test_relations_in_target_order(scenes):
    found = 0
    for i in range(COUNT):
        target = scenes[i][1]
        pairs = dict(scenes.relations(i))
        for n, label in enumerate(target.labels.tolist()):
            name = scenes.classes[label]
            assert (n in pairs) == name.startswith("ball")
            if n in pairs:
                assert scenes.classes[target.labels[pairs[n]]].split()[-1] == name.split()[-1]
                found += 1
    assert found > COUNT / 3


def test_context_option():
    assert all(not Scenes(20, context=0).relations(i) for i in range(20))
    always = Scenes(20, context=1)
    assert np.mean([len(always.relations(i)) for i in range(20)]) > 1.3
    few = Scenes(20, max_objects=1)
    assert all(len(few[i][1]) == 1 for i in range(20))


def test_coco_ground_truth(scenes):
    assert len(scenes.coco.imgs) == COUNT
    assert len(scenes.coco.anns) == sum(len(scenes.objects(i)) for i in range(COUNT))
    for annotation in scenes.coco.dataset["annotations"]:
        name = scenes.coco.cats[annotation["category_id"]]["name"]
        assert ("decided_by" in annotation) == name.startswith("ball")
        if "decided_by" in annotation:
            decider = scenes.coco.anns[annotation["decided_by"]]
            assert decider["image_id"] == annotation["image_id"]
            assert scenes.coco.cats[decider["category_id"]]["name"].split()[-1] == name.split()[-1]


def test_written_folder_is_the_same_data(tmp_path):
    for split, count in (("train", 8), ("val", 3)):
        Scenes(count, split=split, size=96).write(tmp_path)
    for split, count in (("train", 8), ("val", 3)):
        drawn, read = Scenes(count, split=split, size=96), CocoFolder(tmp_path, split)
        assert len(read) == count
        assert (read.classes, read.category_ids, read.image_ids) == (drawn.classes, drawn.category_ids, drawn.image_ids)
        for i in range(count):
            assert same_item(read[i], drawn[i])
            assert read.relations(i) == drawn.relations(i)
        assert read.coco.dataset == drawn.coco.dataset
    assert any(read.relations(i) for i in range(count))
    json.loads((tmp_path / "annotations" / "instances_val.json").read_text())


def test_transforms_apply(scenes):
    data = Scenes(3, transform=make_transform("laptop", 96, train=False))
    pixels, target = data[0]
    assert pixels.shape == (3, 96, 96)
    torch.testing.assert_close(target.boxes, scenes[0][1].boxes)


def test_scene_refuses_what_would_be_unclear():
    star = Thing("star", "striped", 40.0, 60.0, 20.0)
    scene = Scene(128, (0,), [star])
    ball = Thing("ball", "", 75.0, 60.0, 9.0, decider=0)
    assert scene.put(ball)
    assert not scene.put(Thing("square", "dotted", 100.0, 60.0, 10.0))  # about as near to the ball as the star
    assert not scene.put(Thing("cross", "dotted", 75.0, 72.0, 12.0))  # would cover the ball
    assert not scene.put(Thing("triangle", "dotted", 40.0, 60.0, 18.0))  # would hide the star
    assert scene.put(Thing("cross", "dotted", 100.0, 60.0, 10.0))
    assert scene.put(Thing("square", "dotted", 110.0, 110.0, 10.0))
    assert [thing.shape for thing in scene.things] == ["star", "ball", "cross", "square"]


def test_open_data():
    assert len(open_data("scenes")) == 2000
    assert len(open_data("scenes", "val")) == 200
    assert len(open_data("scenes:30:val=7", "val")) == 7
    assert len(open_data("scenes:30", limit=4)) == 4
    data = open_data("scenes:30:seed=3:size=96:max_objects=4:context=0", "val", make_transform("none"))
    assert (len(data), data.seed, data.side, data.max_objects, data.context) == (3, 3, 96, 4, 0.0)
    assert same_item(data[1], Scenes(9, seed=3, size=96, max_objects=4, context=0, split="val")[1])


@pytest.mark.parametrize(
    "text, words",
    [
        ("scenes:many", "'many' is not understood"),
        ("scenes:30:seeds=3", "'seeds=3' is not understood.*seed="),
        ("scenes:30:40", "'40' is not understood"),
        ("scenes:30:seed=x", "'seed=x' is not understood"),
        ("scenes:0", "number of images 0"),
        ("scenes:30:size=8", "size 8: give 64"),
        ("scenes:30:context=2", "context 2.0: give 0 to 1"),
        ("scenes:30:seed=-1", "seed -1"),
        ("scenes_of_life", "scenes_of_life does not exist"),
    ],
)
def test_errors(text, words):
    with pytest.raises(UserError, match=words):
        open_data(text)


def test_limit_is_checked():
    with pytest.raises(UserError, match="limit of 0"):
        open_data("scenes", limit=0)
