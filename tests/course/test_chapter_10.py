"""The checkers of notebook 10 accept right answers and name what is wrong with the others."""

import pytest
import torch
from torchvision.ops import roi_align

from regolite.boxes import enlarge, to_pixels, to_xyxy
from regolite.course import Mistake, find
from regolite.models.glimpse import _taps


def corners(boxes, alpha):
    low, high = boxes[..., :2], boxes[..., 2:]
    center, half = (low + high) / 2, (high - low) / 2
    return torch.cat([center - alpha * half, center + alpha * half], -1)


def grow_in_place(boxes, alpha):
    wanted = corners(boxes, alpha)
    boxes.copy_(wanted)
    return boxes


def align(level, region, stride, aligned=True):
    return roi_align(level[None], [region[None]], 7, 1 / stride, 2, aligned)[0]


def regions(boxes, alpha, images):
    return to_pixels(enlarge(boxes, alpha), images.sizes)


def padded(boxes, alpha, images):
    height, width = images.mask.shape[1:]
    return to_xyxy(enlarge(boxes, alpha)) * torch.tensor([width, height, width, height])


def matrix(begin, end, extent, scatter="scatter_add_"):
    cell, weight = _taps(torch.tensor([[[begin, end]]]), torch.tensor([[extent]]))
    return getattr(torch.zeros(7, extent), scatter)(1, cell[0, 0], weight[0, 0])


def by_hand(begin, end, extent):
    """Independently of the package: points, then a triangle of weights around each."""
    step = (end - begin) / 14
    rows = []
    for b in range(7):
        row = torch.zeros(extent)
        for p in (2 * b, 2 * b + 1):
            x = begin + step * (p + 0.5)
            if -1 <= x <= extent:
                x = min(max(x, 0.0), extent - 1.0)
                row += (1 - (torch.arange(extent) - x).abs()).clamp(min=0) / 2
        rows.append(row)
    return torch.stack(rows)


def alphas(balls, deciders):
    return (2 * (deciders[:, :2] - balls[:, :2]).abs() / balls[:, 2:]).amax(1)


RIGHT = {"10.1": [corners], "10.2": [align], "10.3": [regions], "10.4": [matrix, by_hand], "10.5": [alphas]}


@pytest.mark.parametrize(("number", "answer"), [(n, a) for n, right in RIGHT.items() for a in right])
def test_right(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("10.1", lambda b, a: b * 1.0, "are unchanged"),
        ("10.1", lambda b, a: b * a, "center must not change"),
        ("10.1", lambda b, a: corners(b, a**0.5), "area grew"),
        ("10.1", lambda b, a: corners(b, 2 * a), "twice too much"),
        ("10.1", lambda b, a: corners(b, a).clamp(min=0), "clipped at 0"),
        ("10.1", grow_in_place, "changes its input boxes"),
        ("10.1", lambda b, a: corners(b, a)[0], "should have shape"),
        ("10.2", lambda m, r, s: align(m, r, s, aligned=False), "still `aligned=False`"),
        ("10.2", lambda m, r, s: align(m, r + s / 2, s, aligned=False), "wrong direction"),
        ("10.2", lambda m, r, s: align(m, r - 0.5, s, aligned=False), "half a pixel"),
        ("10.2", lambda m, r, s: align(m, r - s, s, aligned=False), "a whole cell"),
        ("10.3", padded, "padded size"),
        ("10.3", lambda b, a, i: to_pixels(enlarge(b, a), i.sizes.flip(1)), "swapped"),
        ("10.3", lambda b, a, i: to_pixels(b, i.sizes), "not enlarged"),
        ("10.3", lambda b, a, i: to_pixels(enlarge(b, a), i.sizes[:1].expand(3, 2)), "first one"),
        ("10.3", lambda b, a, i: to_xyxy(enlarge(b, a)), r"still in \[0, 1\]"),
        ("10.4", lambda b, e, n: torch.zeros(7, n), "is all zero"),
        ("10.4", lambda b, e, n: matrix(b, e, n, "scatter_"), "only one of their weights"),
        ("10.4", lambda b, e, n: 2 * matrix(b, e, n), "sum to 2 instead of 1"),
        ("10.4", lambda b, e, n: matrix(b, e, n).T, "should have shape"),
        ("10.5", lambda b, d: torch.ones(len(b)), "every alpha is 1"),
        ("10.5", lambda b, d: alphas(b, d) / 2, "half the correct values"),
        ("10.5", lambda b, d: (2 * (d[:, :2] - b[:, :2]).abs() / b[:, 2:]).amin(1), "one axis is not enough"),
        ("10.5", lambda b, d: (2 * (d[:, :2] - b[:, :2]).abs() / d[:, 2:]).amax(1), "neighbor's size"),
        ("10.5", lambda b, d: (2 * (d[:, :2] - b[:, :2]) / b[:, 2:]).amax(1), "absolute value"),
        ("10.5", lambda b, d: 2 * (d[:, :2] - b[:, :2]).norm(dim=1) / b[:, 2], "not a circle"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
