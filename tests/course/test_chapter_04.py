"""The checkers of notebook 04 accept what is right and name what is wrong."""

import re

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss

from regolite.boxes import to_xyxy
from regolite.course import Mistake, find


def flip(boxes, column=0, negate=False):
    flipped = boxes.clone()
    flipped[:, column] = -boxes[:, column] if negate else 1 - boxes[:, column]
    return flipped


def in_place(boxes):
    boxes[:, 0] = 1 - boxes[:, 0]
    return boxes


def corners(boxes):
    return torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)


def iou_of_pairs(a, b, clamp_sides=True, clamp_area=False):
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    intersection = (sides.clamp(min=0) if clamp_sides else sides).prod(1)
    intersection = intersection.clamp(min=0) if clamp_area else intersection
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(1) for box in (a, b))
    return intersection / (area_a + area_b - intersection)


def giou_loss(boxes, wanted):
    return generalized_box_iou_loss(to_xyxy(boxes), to_xyxy(wanted), eps=0.0)


RIGHT = [
    ("4.1", flip),
    ("4.1", lambda boxes: torch.tensor([1.0, 0, 0, 0]) + boxes * torch.tensor([-1.0, 1, 1, 1])),
    ("4.2", iou_of_pairs),
    ("4.2", lambda a, b: box_iou(a, b).diagonal()),
    ("4.3", lambda t: (1 - t) / (1 + t)),
    ("4.3", lambda t: torch.tensor(2 / (1 + t) - 1)),
    ("4.4", giou_loss),
    ("4.4", lambda boxes, wanted: 1 - generalized_box_iou(to_xyxy(boxes), to_xyxy(wanted)).diagonal()),
    ("4.5", torch.tensor([0.3, 0.3, 0.2, 0.1])),
    ("4.5", torch.tensor([0.8, 0.7, 0.2, 0.3])),
]

WRONG = [
    ("4.1", lambda boxes: boxes, "the boxes are unchanged"),
    ("4.1", in_place, "the caller still needs them"),
    ("4.1", lambda boxes: flip(boxes, 1), "vertical flip"),
    ("4.1", lambda boxes: flip(boxes, 0, negate=True), "x became -x"),
    ("4.1", corners, "flips corners"),
    ("4.1", lambda boxes: flip(boxes) * torch.tensor([1.0, 1, -1, 1]), "widths changed"),
    ("4.1", lambda boxes: flip(boxes)[:, 0], r"should have shape \(6, 4\)"),
    ("4.1", lambda boxes: None, "is None"),
    ("4.2", lambda a, b: iou_of_pairs(a, b, clamp_sides=False), "side by side"),
    ("4.2", lambda a, b: iou_of_pairs(a, b, clamp_sides=False, clamp_area=True), "two negative sides"),
    ("4.2", box_iou, "matrix of all pairs"),
    ("4.2", lambda a, b: iou_of_pairs(a, b).detach().requires_grad_(), "no gradient"),
    ("4.2", lambda a, b: torch.zeros(4), "the IoU of boxes that overlap should be"),
    ("4.2", lambda a, b: iou_of_pairs(a, b, clamp_sides=False).clamp(min=0), "two negative sides"),
    ("4.2", lambda a, b: iou_of_pairs(a, b, clamp_sides=False).abs(), "side by side"),
    ("4.2", lambda a, b: None, "is None"),
    ("4.3", lambda t: 0.0, "can move before"),
    ("4.3", lambda t: 1 - t, "the union grows"),
    ("4.3", lambda t: (1 - t) / 2, "intersection 1 - s, union 1 [+] s"),
    ("4.3", lambda t: 1 / 3, "for t = 0.75 your answer is 0.3333, but with that shift the IoU is 0.50"),
    ("4.3", lambda t: None, "should be a number"),
    ("4.3", lambda t: (1 - t) / t, "with that shift the IoU is"),
    ("4.4", lambda boxes, wanted: torch.zeros(7), "the loss should be"),
    ("4.4", lambda boxes, wanted: 1 - giou_loss(boxes, wanted), "GIoU itself"),
    (
        "4.4",
        lambda boxes, wanted: 1 - iou_of_pairs(to_xyxy(boxes), to_xyxy(wanted)),
        "the term of the hull is missing",
    ),
    ("4.4", lambda boxes, wanted: 1 - generalized_box_iou(boxes, wanted).diagonal(), "overlap needs corners"),
    (
        "4.4",
        lambda boxes, wanted: 2 - 2 * iou_of_pairs(to_xyxy(boxes), to_xyxy(wanted)) - giou_loss(boxes, wanted),
        "wrong sign",
    ),
    (
        "4.4",
        lambda boxes, wanted: 1 - generalized_box_iou(to_xyxy(boxes), to_xyxy(wanted)),
        r"matrix of all pairs, \[7",
    ),
    ("4.4", lambda boxes, wanted: giou_loss(boxes, wanted).detach(), "no gradient flows back"),
    ("4.5", torch.tensor([0.9, 0.3, 0.2, 0.2]), "center's x still has a gradient"),
    ("4.5", torch.tensor([0.3, 0.9, 0.2, 0.2]), "center's y still has a gradient"),
    ("4.5", torch.tensor([0.5, 0.5, 0.2, 0.2]), "from the couch's"),
    ("4.5", torch.tensor([0.3, 0.3, 0.0, 0.2]), "width and a height above 0"),
    ("4.5", [0.3, 0.3, 0.2, 0.2], "should be a tensor"),
    ("4.5", torch.tensor([0.6, 0.5, 1.5, 1.5]), "beyond the image"),  # contains the couch
    ("4.5", torch.tensor([0.9, 0.5, 5.0, 5.0]), "beyond the image"),
    ("4.5", torch.tensor([-0.5, -0.5, 0.2, 0.2]), "beyond the image"),
    ("4.5", torch.tensor([float("nan"), 0.5, 0.2, 0.2]), "width and a height above 0"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(("number", "answer", "said"), WRONG)
def test_mistakes_are_named(number, answer, said):
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)


@pytest.mark.parametrize("answer", [answer for number, answer, _ in WRONG if number == "4.5"])
def test_no_right_answer_is_given_away(answer):
    """A wrong answer is not told the numbers of one that passes."""
    with pytest.raises(Mistake) as caught:
        find("4.5").checker(answer)
    told = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(caught.value))}
    for right in (torch.as_tensor(right) for number, right in RIGHT if number == "4.5"):
        assert not {round(number, 4) for number in right.flatten().tolist()} <= told
