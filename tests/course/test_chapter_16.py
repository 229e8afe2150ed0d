"""The checkers of notebook 16 take right answers and name what is wrong with others."""

from __future__ import annotations

import random

import pytest
import torch

from regolite.course import Mistake, find


def judge(number, answer):
    return find(number).checker(answer)


def refused(number, answer, said):
    with pytest.raises(Mistake, match=said):
        judge(number, answer)


def line(line, width, height, order=lambda x, y, w, h: [x - w / 2, y - h / 2, x + w / 2, y + h / 2]):
    label, x, y, w, h = line.split()
    return int(label), torch.tensor(order(float(x) * width, float(y) * height, float(w) * width, float(h) * height))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda *a: (0, torch.zeros(4)), "the class of '3 0.5"),
        (lambda *a: torch.zeros(4), "a pair"),
        (lambda *a: line(*a, order=lambda x, y, w, h: [x, y, w, h]), "still center and size"),
        (lambda *a: line(*a, order=lambda x, y, w, h: [x - w / 2, y - h / 2, w, h]), "COCO's corner"),
        (lambda text, w, h: line(text, 1, 1), "relative to the image"),
        (lambda text, w, h: line(text, h, w), "swapped"),
        (lambda *a: (line(*a)[0], line(*a)[1] + 3), "should be 80.0000"),
        (lambda *a: (a[0].split()[0], line(*a)[1]), "an int, but is str"),
        (lambda *a: (line(*a)[0], line(*a)[1].round()), "rounded"),
        (lambda *a: line(*a, order=lambda x, y, w, h: [x, y, x + w, y + h]), "begins at the center"),
        (lambda *a: line(*a, order=lambda x, y, w, h: [x - w, y - h, x + w, y + h]), "twice too large"),
    ],
)
def test_lines_of_yolo(answer, said):
    assert judge("16.1", line)
    refused("16.1", answer, said)


def unusable(boxes, width, height):
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1.clamp(0, width) - x0.clamp(0, width) <= 0) | (y1.clamp(0, height) - y0.clamp(0, height) <= 0)


def in_place(boxes, width, height):
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    return (boxes[:, 2:] <= boxes[:, :2]).any(1)


def outside_right_or_below(b, w, h):
    return (b[:, 2] <= b[:, 0]) | (b[:, 3] <= b[:, 1]) | (b[:, 0] >= w) | (b[:, 1] >= h)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda b, w, h: torch.zeros(len(b), dtype=torch.bool), "has no width"),
        (lambda b, w, h: (b[:, 2:] <= b[:, :2]).any(1), "right of the image"),
        (lambda b, w, h: (b < 0).any(1), "extends beyond the edge"),
        (lambda b, w, h: torch.zeros(3), r"should have shape \(11,\)"),
        (lambda b, w, h: (b[:, 2:] - b[:, :2]).prod(1) <= 0, "both corners in the wrong order"),
        (outside_right_or_below, "is left of the image"),
        (lambda b, w, h: unusable(b, h, w), "swapped"),
        (lambda b, w, h: ~unusable(b, w, h), "exchanged"),
        (lambda b, w, h: unusable(b, w, h).float(), "torch.bool"),
        (in_place, "changes the boxes"),
    ],
)
def test_unusable_boxes(answer, said):
    assert judge("16.2", unusable)
    refused("16.2", answer, said)


def place(name):
    return name.split("_")[0]


def hold(names, groups, share):
    """Hold out groups from the end of a list until the share is reached."""
    held = []
    groups = list(groups)
    while len(held) < share * len(names):
        group = groups.pop()
        held += [name for name in names if place(name) == group]
    return [name for name in names if name not in held], held


def by_groups(names, share, seed):
    groups = sorted({place(name) for name in names})
    random.Random(seed).shuffle(groups)
    return hold(names, groups, share)


def by_images(names, share, seed):
    names = random.Random(seed).sample(names, len(names))
    cut = int(share * len(names))
    return names[cut:], names[:cut]


def all_but_one(names, share, seed):
    kept = random.Random(seed).choice(sorted({place(name) for name in names}))
    return [n for n in names if place(n) == kept], [n for n in names if place(n) != kept]


def unshuffled(names, share, seed):
    return hold(names, sorted({place(name) for name in names}), share)


def rotated(names, share, seed):
    groups = sorted({place(name) for name in names})
    start = seed % len(groups)
    return hold(names, groups[start:] + groups[:start], share)


def in_order_of_names(names, share, seed):
    groups = list(dict.fromkeys(place(name) for name in names))
    random.Random(seed).shuffle(groups)
    return hold(names, groups, share)


def globally(names, share, seed):
    groups = sorted({place(name) for name in names})
    random.seed(seed)
    random.shuffle(groups)
    return hold(names, groups, share)


def unseeded(names, share, seed):
    groups = sorted({place(name) for name in names})
    random.SystemRandom().shuffle(groups)
    return hold(names, groups, share)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (by_images, "are in both lists"),
        (lambda names, share, seed: (names, []), "one of the lists is empty"),
        (lambda names, share, seed: (names, names[:5]), "exactly one"),
        (lambda names, share, seed: by_groups(names, share, 0), "every seed holds out the same"),
        (lambda names, share, seed: by_groups(names, 0.01, seed), "at least a quarter"),
        (lambda names, share, seed: by_groups(names, 0.8, seed), "a whole group fewer would do"),
        (all_but_one, "exchanged"),
        (lambda *a: by_groups(*a)[::-1], "exchanged"),
        (unshuffled, "every seed holds out the same"),
        (rotated, "does not shuffle"),
        (in_order_of_names, "order of the names"),
        (globally, "global random generator"),
        (unseeded, "second time|order of the names"),
    ],
)
def test_groups_are_held_out_whole(answer, said):
    assert judge("16.3", by_groups)
    refused("16.3", answer, said)


def to_coco(
    records,
    clean=lambda name: name.strip().lower(),
    first=1,
    clip=True,
    keep_bad=False,
    keep_empty=True,
    twice=True,
    box=lambda x0, y0, x1, y1, w, h: [x0, y0, x1 - x0, y1 - y0],
    area=lambda x0, y0, x1, y1: (x1 - x0) * (y1 - y0),
    order=sorted,
    restart=False,
    number=float,
    told=lambda photo: f"{photo}: a mark without area",
    swap=False,
    crowd=0,
):
    """A right converter, unless an option says otherwise."""
    names = order(dict.fromkeys(clean(mark["name"]) for record in records for mark in record["marks"]))
    ids = {name: n for n, name in enumerate(names, first)}
    images, annotations, problems, seen = [], [], [], set()
    for record in records:
        if twice and record["photo"] in seen:
            raise ValueError(f"{record['photo']} comes twice")
        seen.add(record["photo"])
        if not keep_empty and not record["marks"]:
            continue
        w, h = record["width"], record["height"]
        images.append({"id": len(images) + 1, "file_name": record["photo"], "width": w, "height": h})
        count = 0
        for mark in record["marks"]:
            pw, ph = (h, w) if swap else (w, h)
            x0, y0 = mark["left"] / 100 * pw, mark["top"] / 100 * ph
            x1, y1 = x0 + mark["wide"] / 100 * pw, y0 + mark["high"] / 100 * ph
            cx0, cx1, cy0, cy1 = max(x0, 0), min(x1, pw), max(y0, 0), min(y1, ph)
            if not keep_bad and (cx1 <= cx0 or cy1 <= cy0):
                problems.append(told(record["photo"]))
                continue
            if clip:
                x0, x1, y0, y1 = cx0, cx1, cy0, cy1
            count += 1
            annotations.append({
                "id": count if restart else len(annotations) + 1, "image_id": len(images),
                "category_id": ids[clean(mark["name"])], "bbox": [number(v) for v in box(x0, y0, x1, y1, w, h)],
                "area": float(area(x0, y0, x1, y1)), "iscrowd": crowd,
            })  # fmt: skip
    categories = [{"id": n, "name": name} for name, n in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, problems


def without(key):
    def answer(records):
        coco, problems = to_coco(records)
        for annotation in coco["annotations"]:
            del annotation[key]
        return coco, problems

    return answer


def changed(records):
    for record in records:
        for mark in record["marks"]:
            mark["name"] = mark["name"].strip().lower()
    return to_coco(records)


def moved(records):
    coco, problems = to_coco(records)
    for annotation in coco["annotations"]:
        annotation["image_id"] -= 1
    return coco, problems


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda r: to_coco(r)[0], "return a pair"),
        (lambda r: ({"images": []}, []), "three keys"),
        (lambda r: to_coco(r, number=torch.tensor), "plain Python numbers"),
        (lambda r: to_coco(r, clean=str), "capitals or spaces"),
        (lambda r: to_coco(r, clean=lambda name: name.strip().upper()), "lower case"),
        (lambda r: to_coco(r, order=list), "not sorted"),
        (lambda r: to_coco(r, first=0), "0 for the background"),
        (lambda r: to_coco(r, keep_empty=False), "gate_11.jpg is missing"),
        (lambda r: to_coco(r, restart=True), "same id"),
        (lambda r: to_coco(r, keep_bad=True), "both sizes negative"),
        (lambda r: to_coco([{**x, "marks": [m for m in x["marks"] if m["left"] + m["wide"] <= 100]} for x in r]),
         "usable after clipping"),
        (lambda r: to_coco(r, clip=False), "clip it"),
        (lambda r: to_coco(r, box=lambda x0, y0, x1, y1, w, h: [x0, y0, x1, y1]), "Pascal VOC"),
        (lambda r: to_coco(r, box=lambda x0, y0, x1, y1, w, h: [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]),
         "YOLO"),
        (lambda r: to_coco(r, box=lambda x0, y0, x1, y1, w, h:
                           [100 * x0 / w, 100 * y0 / h, 100 * (x1 - x0) / w, 100 * (y1 - y0) / h]), "percent"),
        (lambda r: to_coco(r, swap=True), "swapped"),
        (lambda r: to_coco(r, area=lambda x0, y0, x1, y1: x1 - x0), "the area of annotation 1"),
        (lambda r: to_coco(r, crowd=1), "iscrowd should be 0"),
        (without("iscrowd"), "no 'iscrowd'"),
        (without("area"), "no 'area'"),
        (moved, "counted from 1"),
        (changed, "changes the records"),
        (lambda r: (to_coco(r)[0], []), "leave nothing out silently"),
        (lambda r: to_coco(r, told=lambda photo: "a bad mark"), "name the photo"),
        (lambda r: to_coco(r, twice=False), "nothing is raised"),
    ],
)  # fmt: skip
def test_converter_to_coco(answer, said):
    assert judge("16.4", to_coco)
    refused("16.4", answer, said)
