"""Checkers of notebook 16: your own data."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pycocotools.coco import COCO
from torch import Tensor

from regolite.course import Mistake, close, exercise, same_shape


@exercise(
    "16.1",
    "The first number of a line is the class; the other four are center and size, relative to the image.",
    "x and width are multiplied by the image's width, y and height by its height.",
    "The corners are half the size away from the center: x - w / 2, y - h / 2, x + w / 2, y + h / 2.",
)
def read_line(answer: Callable[[str, int, int], tuple[int, Tensor]]) -> str:
    """A line of a YOLO file as class and corners in pixels."""
    for line, width, height, label, box in (
        ("3 0.5 0.25 0.2 0.1", 200, 400, 3, [80.0, 80.0, 120.0, 120.0]),
        ("0 0.11 0.9 0.2 0.15", 640, 480, 0, [6.4, 396.0, 134.4, 468.0]),
    ):
        found = answer(line, width, height)
        if not isinstance(found, tuple) or len(found) != 2:
            raise Mistake("return a pair: the class, and the four corners as a tensor.")
        if not isinstance(found[0], int):
            raise Mistake(f"the class should be an int, but is {type(found[0]).__name__}.")
        if found[0] != label:
            raise Mistake(f"the class of {line!r} is {label}, its first number, not {found[0]}.")
        wanted = torch.tensor(box)
        same_shape("the box", found[1], (4,))
        x0, y0, x1, y1 = box
        for wrong, problem in (
            (torch.tensor([float(n) for n in line.split()[1:]]), "still has the line's numbers, relative to the image"),
            (torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height]), "is still relative to the image"),
            (torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]), "is still center and size"),
            (torch.tensor([x0, y0, x1 - x0, y1 - y0]), "is COCO's corner and size"),
            (torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, 1.5 * x1 - 0.5 * x0, 1.5 * y1 - 0.5 * y0]),
             "begins at the center"),
            (torch.tensor([1.5 * x0 - 0.5 * x1, 1.5 * y0 - 0.5 * y1, 1.5 * x1 - 0.5 * x0, 1.5 * y1 - 0.5 * y0]),
             "is twice too large, with the whole size on either side of the center"),
            (wanted.round(), "is rounded to whole pixels"),
            (torch.tensor([x0 / width * height, y0 / height * width, x1 / width * height, y1 / height * width]),
             "has width and height of the image swapped"),
        ):  # fmt: skip
            if torch.allclose(found[1].float(), wrong, atol=1e-2) and not torch.allclose(wrong, wanted, atol=1e-2):
                raise Mistake(f"the box {problem}; it should be two corners in pixels.")
        close("the box", found[1].float(), wanted, 1e-2)
    return "This is all there is to the YOLO format."


@exercise(
    "16.2",
    "There are three errors: no width or height, corners in the wrong order, no overlap with the image.",
    "Clip the box to the image first (clamp). A wrong box then has no width or no height.",
    "wide = x1.clamp(0, width) - x0.clamp(0, width), the same for y; unusable is (wide <= 0) | (high <= 0).",
)
def unusable(answer: Callable[[Float[Tensor, "N 4"], int, int], Tensor]) -> str:
    """Invalid boxes, which no detector can learn from."""
    cases = [
        ([10.0, 10.0, 50.0, 40.0], False, "is valid"),
        ([85.0, 10.0, 95.0, 30.0], False, "is inside the image, unless width and height are swapped"),
        ([-20.0, 5.0, 30.0, 60.0], False, "extends beyond the edge, but is valid after clipping"),
        ([60.0, 20.0, 60.0, 50.0], True, "has no width"),
        ([40.0, 30.0, 20.0, 60.0], True, "has left and right in the wrong order"),
        ([60.0, 50.0, 20.0, 30.0], True, "has both corners in the wrong order; width times height is positive"),
        ([120.0, 10.0, 150.0, 30.0], True, "is right of the image"),
        ([10.0, 85.0, 30.0, 95.0], True, "is below the image"),
        ([-30.0, 10.0, -5.0, 40.0], True, "is left of the image"),
        ([10.0, -40.0, 30.0, 0.0], True, "is above the image and only touches its edge"),
        ([0.0, 0.0, 100.0, 80.0], False, "fills the image, which is valid"),
    ]
    boxes = torch.tensor([box for box, _, _ in cases])
    before = boxes.clone()
    found = answer(boxes, 100, 80)
    same_shape("the answer", found, (len(cases),))
    if found.dtype != torch.bool:
        raise Mistake(f"the answer should be a tensor of torch.bool, so that it can be an index, not {found.dtype}.")
    if not torch.equal(boxes, before):
        raise Mistake("your function changes the boxes that it is given: clamp returns a copy, clamp_ does not.")
    if bool((found == ~torch.tensor([bad for _, bad, _ in cases])).all()):
        raise Mistake("True and False are exchanged: True means that a box is unusable.")
    for n, (box, bad, why) in enumerate(cases):
        if bool(found[n]) != bad:
            raise Mistake(f"box {[int(v) for v in box]} in an image of 100 x 80 {why}.")
    empty = answer(torch.zeros(0, 4), 100, 80)
    same_shape("the answer for an image without boxes", empty, (0,))
    return "Such boxes are left out with a message: a single one can make GIoU divide 0 by 0."


@exercise(
    "16.3",
    "Choose groups at random, not images.",
    "groups = sorted({name.split('_')[0] for name in names}); shuffle them with random.Random(seed).",
    "Take groups one by one, always with all their images, and stop as soon as the share of the images is held out.",
)
def split_groups(answer: Callable[[Sequence[str], float, int], tuple[list[str], list[str]]]) -> str:
    """Hold out whole groups of images that belong together."""
    sizes = {"yard": 9, "barn": 4, "gate": 5, "road": 2}
    names = [f"{place}_{n:02}.jpg" for place, count in sizes.items() for n in range(count)]
    seen = set()
    state = random.getstate()
    for seed in range(6):
        train, held = answer(names, 0.25, seed)
        if sorted([*train, *held]) != sorted(names):
            raise Mistake("every image belongs to exactly one of the two lists.")
        places = Counter(n.split("_")[0] for n in held)
        both = {n.split("_")[0] for n in train} & set(places)
        if both:
            raise Mistake(
                f"images of the group {min(both)!r} are in both lists: nearly the same images are used for training "
                "and evaluation."
            )
        if not train or not held:
            raise Mistake("one of the lists is empty.")
        if len(held) < 0.25 * len(names):
            raise Mistake(f"only {len(held)} of {len(names)} images are held out; it should be at least a quarter.")
        if len(held) - max(places.values()) >= 0.25 * len(names):
            if len(train) - max(Counter(n.split("_")[0] for n in train).values()) < 0.25 * len(names) <= len(train):
                raise Mistake("the two lists are exchanged: first the training images, then those held out.")
            raise Mistake(
                f"{len(held)} of {len(names)} images are held out for a share of a quarter, and a whole group fewer "
                f"would do: stop as soon as the share is reached. Images held out are lost for training."
            )
        if (sorted(train), sorted(held)) != tuple(map(sorted, answer(names, 0.25, seed))):
            raise Mistake("the same seed gives a different split the second time: use random.Random(seed).")
        if sorted(held) != sorted(answer(names[::-1], 0.25, seed)[1]):
            raise Mistake(
                "the split depends on the order of the names, and folders are listed in another order on another "
                "machine: sort the groups before you shuffle them."
            )
        seen.add(tuple(sorted(held)))
    if len(seen) == 1:
        raise Mistake("every seed holds out the same groups: shuffle them with random.Random(seed).")
    if random.getstate() != state:
        raise Mistake(
            "your function changes the state of Python's global random generator, and with it all random numbers "
            "drawn later: use a generator of its own, random.Random(seed)."
        )
    many = [f"place{n:02}_{k}.jpg" for n in range(12) for k in range(2)]
    chosen = {tuple(sorted({n.split("_")[0] for n in answer(many, 0.25, seed)[1]})) for seed in range(40)}
    if len(chosen) <= 12:
        raise Mistake(
            f"40 seeds give only {len(chosen)} different choices of three among twelve groups: the seed shifts the "
            "list or picks a starting point, but does not shuffle. Groups next to each other stay together."
        )
    return "Held-out groups measure how the detector performs in places that it has not seen."


RECORDS: list[dict[str, Any]] = [
    {
        "photo": "yard_03.jpg", "width": 640, "height": 480,
        "marks": [
            {"name": "Rake", "left": 50.0, "top": 0.0, "wide": 25.0, "high": 10.0},
            {"name": "garden gnome", "left": 10.0, "top": 25.0, "wide": 30.0, "high": 50.0},
        ],
    },
    {"photo": "gate_11.jpg", "width": 200, "height": 400, "marks": []},
    {
        "photo": "barn_02.jpg", "width": 300, "height": 500,
        "marks": [
            {"name": "Garden gnome ", "left": 80.0, "top": 50.0, "wide": 40.0, "high": 20.0},  # over the right edge
            {"name": "rake", "left": 60.0, "top": 10.0, "wide": -20.0, "high": 10.0},  # negative width
            {"name": "rake", "left": 105.0, "top": 10.0, "wide": 10.0, "high": 10.0},  # outside
        ],
    },
    {
        "photo": "yard_04.jpg", "width": 400, "height": 300,
        "marks": [
            {"name": "rake", "left": 0.0, "top": 0.0, "wide": 0.0, "high": 50.0},  # no width
            {"name": " RAKE", "left": 25.0, "top": 50.0, "wide": 50.0, "high": 25.0},
            {"name": "garden gnome", "left": 50.0, "top": 50.0, "wide": -20.0, "high": -20.0},  # both reversed
        ],
    },
]  # fmt: skip
"""Records of a made-up labeling tool, with every flaw that exercise 16.4 asks to handle."""

ANNOTATIONS = [
    (1, 2, [320.0, 0.0, 160.0, 48.0]), (1, 1, [64.0, 120.0, 192.0, 240.0]), (3, 1, [240.0, 250.0, 60.0, 100.0]),
    (4, 2, [100.0, 150.0, 200.0, 75.0]),
]  # fmt: skip
"""Image id, category id and box of the annotations that the records should become."""


@exercise(
    "16.4",
    "Write the categories first: a dictionary from the cleaned name (strip, lower) to the id makes the rest short.",
    "In pixels, x0 = left / 100 * width and x1 = x0 + wide / 100 * width; clip both with min and max, then test "
    "x1 > x0, and the same for y. Exercise 16.2 is this test.",
    "Ids of annotations count over all images: len(annotations) + 1. Images are appended before their marks are read, "
    "so that an image without marks is kept.",
)
def to_coco(answer: Callable[[list[dict[str, Any]]], tuple[dict[str, Any], list[str]]]) -> str:
    """A converter from a made-up export to COCO's form."""
    given = copy.deepcopy(RECORDS)
    result = answer(given)
    if given != RECORDS:
        raise Mistake("your function changes the records that it is given.")
    if not isinstance(result, tuple) or len(result) != 2:
        raise Mistake("return a pair: COCO's dictionary, and the list of problems.")
    coco, problems = result
    if not isinstance(coco, dict) or set(coco) != {"images", "annotations", "categories"}:
        raise Mistake("COCO's dictionary has three keys: images, annotations and categories.")
    try:
        json.dumps(coco)
    except TypeError as error:
        raise Mistake(f"the dictionary cannot be written as JSON ({error}): use plain Python numbers.") from None
    _check_categories(coco["categories"])
    _check_images(coco["images"])
    _check_annotations(coco["annotations"])
    if not isinstance(problems, list) or len(problems) != 4:
        count = len(problems) if isinstance(problems, list) else 0
        raise Mistake(f"4 marks are unusable, but problems has {count} texts: leave nothing out silently.")
    if [sum(name in str(text) for text in problems) for name in ("barn_02.jpg", "yard_04.jpg")] != [2, 2]:
        raise Mistake("each text in problems should name the photo, so that somebody can correct the mark.")
    try:
        answer([*RECORDS, copy.deepcopy(RECORDS[0])])
    except ValueError as error:
        if "yard_03.jpg" not in str(error):
            raise Mistake("the ValueError for a photo that comes twice should name the photo.") from None
    else:
        raise Mistake(
            "yard_03.jpg comes twice and nothing is raised: the objects of either record would be background in the "
            "other."
        )
    dataset = COCO()
    dataset.dataset = coco
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        dataset.createIndex()
    if len(dataset.getAnnIds()) != len(ANNOTATIONS):
        raise Mistake("pycocotools finds another number of annotations than you have written.")
    return "pycocotools, this package and any other COCO tool read what you have written."


def _fields(what: str, entries: Any, names: set[str]) -> None:
    """Raise a :class:`Mistake` unless entries are dictionaries with these keys at least."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Mistake(f"{what} should be a list of dictionaries.")
    for entry in entries:
        if missing := names - set(entry):
            raise Mistake(f"an entry of {what} has no {min(missing)!r}, and pycocotools raises KeyError without it.")


def _check_categories(categories: Any) -> None:
    _fields("categories", categories, {"id", "name"})
    names, ids = [entry["name"] for entry in categories], [entry["id"] for entry in categories]
    if len(names) > 2:
        raise Mistake(
            f"there are 2 classes, but your categories are {names}: spellings that differ in capitals or spaces are "
            "one class."
        )
    if set(names) != {"garden gnome", "rake"}:
        raise Mistake(f"your categories are {names}: names are in lower case, without spaces at their ends.")
    if names != sorted(names):
        raise Mistake("categories are not sorted by name: ids would depend on which photo comes first.")
    if ids != [1, 2]:
        raise Mistake(f"ids of categories should be 1, 2, ..., but are {ids}: many tools take 0 for the background.")


def _check_images(images: Any) -> None:
    _fields("images", images, {"id", "file_name", "width", "height"})
    if len(images) == len(RECORDS) - 1:
        raise Mistake("gate_11.jpg is missing: an image without marks belongs to the data, it shows background.")
    if [image["file_name"] for image in images] != [record["photo"] for record in RECORDS]:
        raise Mistake("images should have one entry per record, in the same order, with its photo as file_name.")
    if [image["id"] for image in images] != [1, 2, 3, 4]:
        raise Mistake("ids of images should be 1, 2, 3, ... in the order of the records.")
    for image, record in zip(images, RECORDS):
        if (image["width"], image["height"]) != (record["width"], record["height"]):
            raise Mistake(f"width and height of {record['photo']} are not those of its record.")


def _check_annotations(annotations: Any) -> None:
    _fields("annotations", annotations, {"id", "image_id", "category_id", "bbox", "area", "iscrowd"})
    ids = [entry["id"] for entry in annotations]
    if len(set(ids)) < len(ids):
        raise Mistake(
            "two annotations have the same id: ids count over all images, and pycocotools keeps only the last "
            "annotation of each id."
        )
    if len(annotations) > len(ANNOTATIONS):
        raise Mistake(
            f"there are {len(ANNOTATIONS)} usable marks, but {len(annotations)} annotations: a mark without area in "
            "its image, as with a width of 0 or less, is unusable. So is one with both sizes negative."
        )
    if len(annotations) < len(ANNOTATIONS):
        raise Mistake(
            f"there are {len(ANNOTATIONS)} usable marks, but {len(annotations)} annotations: a mark that extends "
            "beyond the edge is usable after clipping."
        )
    if ids != list(range(1, len(ids) + 1)):
        raise Mistake("ids of annotations should be 1, 2, 3, ... in the order of the marks.")
    sizes = [(record["width"], record["height"]) for record in RECORDS]
    for entry, (image_id, category_id, box) in zip(annotations, ANNOTATIONS):
        if entry["image_id"] != image_id:
            raise Mistake(
                f"annotation {entry['id']} has image_id {entry['image_id']}; it is the id of its image, counted from 1."
            )
        if entry["category_id"] != category_id:
            raise Mistake(f"annotation {entry['id']} has a wrong category_id; it is the id of its cleaned name.")
        _check_box(entry, box, *sizes[image_id - 1])


def _check_box(entry: dict[str, Any], box: list[float], width: int, height: int) -> None:
    x, y, w, h = box
    found = torch.tensor([float(v) for v in entry["bbox"]])
    same_shape("a bbox", found, (4,))
    relative = [x / width, y / height, w / width, h / height]
    for wrong, problem in (
        ([100 * part for part in relative], "is still in percent"),
        (relative, "is relative to the image"),
        ([x, y, x + w, y + h], "has two corners, as in Pascal VOC"),
        ([x + w / 2, y + h / 2, w, h], "has the center, as in YOLO"),
        ([x / width * height, y / height * width, w / width * height, h / height * width],
         "has width and height of the image swapped"),
    ):  # fmt: skip
        if torch.allclose(found, torch.tensor(wrong), atol=1e-2):
            raise Mistake(f"the bbox of annotation {entry['id']} {problem}; COCO has corner and size in pixels.")
    if float(found[0] + found[2]) > width + 1e-3 or float(found[1] + found[3]) > height + 1e-3:
        raise Mistake(f"the bbox of annotation {entry['id']} extends beyond its image: clip it.")
    close(f"the bbox of annotation {entry['id']}", found, torch.tensor(box), 1e-2)
    close(f"the area of annotation {entry['id']}, in pixels of the clipped box,", float(entry["area"]), w * h, 0.5)
    if entry["iscrowd"] != 0:
        raise Mistake("iscrowd should be 0: a crowd is ignored in training and evaluation.")
