"""The checkers of notebook 09 accept right answers and name the usual mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, find


def read(x, points, **how):
    how = {"align_corners": False, "padding_mode": "zeros"} | how
    return F.grid_sample(x[None, None], 2 * points[None, None] - 1, **how)[0, 0, 0]


def coverage(points, height, width, **how):
    return read(torch.ones(height, width), points, **how)


def slope(x, points):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(read(x, points).sum(), points)[0]


def cells(x):
    return torch.tensor([x.shape[1], x.shape[0]])


def weigh(scores):
    return scores.flatten(-2).softmax(-1).view_as(scores)


def to_photograph(locations, padded, resized, original):
    return locations * torch.tensor([padded[i] / resized[i] * original[i] for i in (1, 0)])


def correction(start, wanted):
    start = inverse_sigmoid(start)
    return inverse_sigmoid(wanted) - F.pad(start, (0, 4 - start.shape[-1]))


def fits(room, heads, points):
    return math.isqrt(room // (4 * heads)), room // (12 * heads * points)


RIGHT = {"9.1": coverage, "9.2": slope, "9.3": weigh, "9.4": to_photograph, "9.5": correction, "9.6": fits}


@pytest.mark.parametrize("number", RIGHT)
def test_the_right_answer_passes(number):
    assert find(number).checker(RIGHT[number])


WRONG = [
    ("9.1", lambda p, h, w: torch.ones(len(p)), "every point is fully covered"),
    ("9.1", lambda p, h, w: coverage(p, h, w, align_corners=True), "outer edges of the map"),
    ("9.1", lambda p, h, w: coverage(p, w, h), "height and width are swapped"),
    ("9.1", lambda p, h, w: coverage(p, h, w)[:, None], "shape"),
    ("9.1", lambda p, h, w: coverage(p, h, w) * 0.9, "should be"),
    ("9.2", lambda x, p: torch.zeros_like(p), "all slopes are zero"),
    ("9.2", lambda x, p: slope(x, p) / cells(x), "slopes per cell"),
    ("9.2", lambda x, p: slope(x, p) / cells(x) * cells(x).flip(0), "belongs to the width"),
    ("9.2", lambda x, p: slope(x, p).flip(1), "x and y are swapped"),
    ("9.2", lambda x, p: -slope(x, p), "wrong sign"),
    ("9.2", lambda x, p: slope(x, p) + 1, "should be"),
    ("9.3", lambda s: s.softmax(-1), "is over the points of a level"),
    ("9.3", lambda s: s.softmax(-2), "is over the levels"),
    ("9.3", lambda s: s.softmax(2), "is over the heads"),
    ("9.3", lambda s: s.softmax(-1) / s.shape[-2], "same share"),
    ("9.3", lambda s: s.flatten(2).softmax(-1).view_as(s), "heads, levels and points"),
    ("9.3", lambda s: weigh(s).flatten(-2), "shape"),
    ("9.4", lambda x, p, r, o: x * torch.tensor([o[1], o[0]]), "padding is ignored"),
    ("9.4", lambda x, p, r, o: x * torch.tensor([p[1], p[0]]), "pixels of the padded batch"),
    ("9.4", lambda x, p, r, o: x * torch.tensor([p[1], p[0]]) * 2.5, "2.5 is the scale"),
    ("9.4", lambda x, p, r, o: to_photograph(x, p[::-1], r[::-1], o[::-1]), "x belongs to the width"),
    ("9.4", lambda x, p, r, o: to_photograph(x, (256, 320), (250, 167), (640, 427)), "of another image"),
    ("9.5", lambda s, w: torch.zeros_like(w), "does not move the boxes"),
    ("9.5", lambda s, w: w - s, "added as logits"),
    ("9.5", lambda s, w: -correction(s, w), "sign"),
    ("9.5", lambda s, w: inverse_sigmoid(w), "adds it to the logit of the start"),
    ("9.5", lambda s, w: correction(F.pad(s, (0, 4 - s.shape[1])), w), "starts from the LOGIT 0"),
    ("9.5", lambda s, w: w.logit() - F.pad(s.logit(), (0, 4 - s.shape[1])), "infinite"),
    ("9.6", lambda room, m, p: (0, 0), "hold more"),
    ("9.6", lambda room, m, p: 5590, "two integers"),
    ("9.6", lambda room, m, p: ((room / 4 / m) ** 0.5, 1.5), "are integers"),
    ("9.6", lambda room, m, p: (room // (4 * m), fits(room, m, p)[1]), "square of the number of tokens"),
    ("9.6", lambda room, m, p: (math.isqrt(room // m), fits(room, m, p)[1]), "takes 4 bytes"),
    ("9.6", lambda room, m, p: (math.isqrt(room // 4), fits(room, m, p)[1]), "every head has its own weights"),
    ("9.6", lambda room, m, p: (fits(room, m, p)[0], room // (4 * m * p)), "two coordinates"),
    ("9.6", lambda room, m, p: (fits(room, m, p)[0], room // (3 * m * p)), "takes 4 bytes"),
    ("9.6", lambda room, m, p: (fits(room, m, p)[0], room // (12 * p)), "its own points"),
    ("9.6", lambda room, m, p: (fits(room, m, p)[0] + 1, fits(room, m, p)[1]), "dense attention take"),
    ("9.6", lambda room, m, p: (fits(room, m, p)[0], fits(room, m, p)[1] - 1), "room for one more"),
]


@pytest.mark.parametrize(("number", "answer", "said"), WRONG, ids=[f"{n}-{said[:20]}" for n, _, said in WRONG])
def test_a_wrong_answer_hears_what_is_wrong(number, answer, said):
    torch.manual_seed(0)
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)
