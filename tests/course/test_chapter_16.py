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
    ],
)
def test_lines_of_yolo(answer, said):
    assert judge("16.1", line)
    refused("16.1", answer, said)


def unusable(boxes, width, height):
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1.clamp(0, width) - x0.clamp(0, width) <= 0) | (y1.clamp(0, height) - y0.clamp(0, height) <= 0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda b, w, h: torch.zeros(len(b), dtype=torch.bool), "has no width"),
        (lambda b, w, h: (b[:, 2:] <= b[:, :2]).any(1), "right of the image"),
        (lambda b, w, h: (b < 0).any(1), "extends beyond the edge"),
        (lambda b, w, h: torch.zeros(3), r"should have shape \(7,\)"),
    ],
)
def test_unusable_boxes(answer, said):
    assert judge("16.2", unusable)
    refused("16.2", answer, said)


def by_groups(names, share, seed):
    groups = sorted({name.split("_")[0] for name in names})
    random.Random(seed).shuffle(groups)
    held = []
    while len(held) < share * len(names):
        group = groups.pop()
        held += [name for name in names if name.split("_")[0] == group]
    return [name for name in names if name not in held], held


def by_images(names, share, seed):
    names = random.Random(seed).sample(names, len(names))
    cut = int(share * len(names))
    return names[cut:], names[:cut]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (by_images, "are in both lists"),
        (lambda names, share, seed: (names, []), "one of the lists is empty"),
        (lambda names, share, seed: (names, names[:5]), "exactly one"),
        (lambda names, share, seed: by_groups(names, share, 0), "every seed holds out the same"),
        (lambda names, share, seed: by_groups(names, 0.01, seed), "at least a quarter"),
    ],
)
def test_groups_are_held_out_whole(answer, said):
    assert judge("16.3", by_groups)
    refused("16.3", answer, said)
