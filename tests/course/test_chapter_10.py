"""The checkers of notebook 10 accept right answers and name what is wrong with the others."""

import pytest
import torch
from torchvision.ops import roi_align

from regolite.boxes import enlarge, to_pixels, to_xyxy
from regolite.course import Mistake, find
from regolite.models.glimpse import _taps, choose_level, cut_glimpses
from regolite.types import FeatureMap


def corners(boxes, alpha):
    low, high = boxes[..., :2], boxes[..., 2:]
    center, half = (low + high) / 2, (high - low) / 2
    return torch.cat([center - alpha * half, center + alpha * half], -1)


def grow_in_place(boxes, alpha):
    wanted = corners(boxes, alpha)
    boxes.copy_(wanted)
    return boxes


def regions(boxes, alpha, images):
    return to_pixels(enlarge(boxes, alpha), images.sizes)


def padded(boxes, alpha, images):
    height, width = images.mask.shape[1:]
    return to_xyxy(enlarge(boxes, alpha)) * torch.tensor([width, height, width, height])


def matrix(begin, end, extent, low=-1.0, high=0.0, smallest=1.0):
    step = (end - begin).clamp(min=smallest) / 14
    points = begin[:, None] + step[:, None] * (torch.arange(14) + 0.5)
    inside = (points >= low) & (points <= extent + high)
    points = points.clamp(0, extent - 1)
    weights = (1 - (torch.arange(extent) - points[..., None]).abs()).clamp(min=0) * inside[..., None]
    return weights.unflatten(1, (7, 2)).mean(2)


def by_taps(begin, end, extent):
    """By the package's taps: the four cells of each bin and their weights."""
    cell, weight = _taps(torch.stack([begin, end], 1)[None], torch.full((1, len(begin)), extent))
    return torch.zeros(len(begin), 7, extent).scatter_add_(2, cell[0], weight[0])


def overwrites(begin, end, extent):
    cell, weight = _taps(torch.stack([begin, end], 1)[None], torch.full((1, len(begin)), extent))
    return torch.zeros(len(begin), 7, extent).scatter_(2, cell[0], weight[0])


def clipped(begin, end, extent):
    return matrix(begin.clamp(0, extent), end.clamp(0, extent), extent)


def level(boxes, strides, of=lambda w, h: (w * h).sqrt(), log=torch.log2, turn=torch.floor, index=True):
    sides = boxes[..., 2:] - boxes[..., :2]
    first, last = (s.bit_length() - 1 for s in (strides[0], strides[-1]))
    found = turn(4 + log(of(sides[..., 0], sides[..., 1]) / 224)).clamp(first, last).long()
    return found - first if index else found


def cut(features, boxes, make=matrix, detach=True, whole=False, choose=level, aligned=False, edit=None):
    boxes = boxes.detach() if detach else boxes
    levels = choose(boxes.detach(), [f.stride for f in features])
    parts = boxes.new_zeros(*boxes.shape[:2], features[0].tensor.shape[1], 7, 7)
    for number, feature in enumerate(features):
        for image in range(len(boxes)):
            chosen = (levels[image] == number).nonzero()[:, 0]
            inside = ~feature.mask[image]
            height, width = feature.mask.shape[1:] if whole else (int(inside[:, 0].sum()), int(inside[0].sum()))
            cells = feature.tensor[image, :, :height, :width]
            edges = boxes[image, chosen] / feature.stride - 0.5 * aligned
            x0, y0, x1, y1 = (edit(edges, width, height) if edit else edges).unbind(-1)
            parts[image, chosen] = torch.einsum("nyh,nxw,chw->ncyx", make(y0, y1, height), make(x0, x1, width), cells)
    return parts.flatten(0, 1)


def clip(edges, width, height):
    return edges.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def by_torchvision(features, boxes):
    return roi_align(features[0].tensor, list(boxes), 7, 1 / 8, 2)


def finest(boxes, strides):
    return torch.zeros(boxes.shape[:2], dtype=torch.long)


def over_padding(features, boxes):
    """Padding is zero, but the borders are those of the padded map."""
    return cut(
        [FeatureMap(f.tensor.masked_fill(f.mask[:, None], 0.0), f.mask, f.stride) for f in features], boxes, whole=True
    )


def alphas(balls, deciders):
    return (2 * (deciders[:, :2] - balls[:, :2]).abs() / balls[:, 2:]).amax(1)


RIGHT = {
    "10.1": [corners],
    "10.2": [matrix, by_taps],
    "10.3": [level, choose_level],
    "10.4": [regions],
    "10.5": [cut, cut_glimpses],
    "10.6": [alphas],
}


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
        ("10.2", lambda b, e, n: torch.zeros(len(b), 7, n), "is all zero"),
        ("10.2", lambda b, e, n: 2 * matrix(b, e, n), "sum to 2 instead of 1"),
        ("10.2", lambda b, e, n: matrix(b - 0.5, e - 0.5, n), "aligned=True"),
        ("10.2", lambda b, e, n: matrix(b, e, n, low=-99, high=99), "more than one cell outside"),
        ("10.2", lambda b, e, n: matrix(b, e, n, low=0, high=-1), "count from -1"),
        ("10.2", lambda b, e, n: matrix(b, e, n, smallest=0), "extended to one cell"),
        ("10.2", clipped, "were clipped"),
        ("10.2", overwrites, "the matrix should be"),
        ("10.2", lambda b, e, n: matrix(b, e, n).transpose(1, 2), "should have shape"),
        ("10.3", lambda b, s: level(b, s, index=False), "log2 of the stride"),
        ("10.3", lambda b, s: level(b, s, turn=torch.round), "round down: a level"),
        ("10.3", lambda b, s: level(b, s, turn=torch.ceil), "not up"),
        ("10.3", lambda b, s: level(b, s, of=lambda w, h: w * h), "not the area"),
        ("10.3", lambda b, s: level(b, s, log=torch.log), "natural logarithm"),
        ("10.3", lambda b, s: level(b, s, of=torch.maximum), "longest side"),
        ("10.3", lambda b, s: level(torch.cat([0 * b[..., :2], b[..., 2:]], -1), s), "boxes are corners"),
        ("10.3", lambda b, s: level(b, s).float(), "integers"),
        ("10.3", finest, "the level should be"),
        ("10.4", padded, "corners of its own image"),
        ("10.4", lambda b, a, i: to_pixels(enlarge(b, a), i.sizes.flip(1)), "swapped"),
        ("10.4", lambda b, a, i: to_pixels(b, i.sizes), "not enlarged"),
        ("10.4", lambda b, a, i: to_pixels(enlarge(b, a), i.sizes[:1].expand(3, 2)), "first one"),
        ("10.4", lambda b, a, i: to_xyxy(enlarge(b, a)), r"still in \[0, 1\]"),
        ("10.5", lambda f, b: cut(f, b, whole=True), "padding is read"),
        ("10.5", over_padding, "the glimpse should be"),
        ("10.5", lambda f, b: cut(f, b, detach=False), "detach them first"),
        ("10.5", lambda f, b: cut(f, b, choose=finest), "from the finest level"),
        ("10.5", lambda f, b: cut(f, b, aligned=True), "half a cell"),
        ("10.5", lambda f, b: cut(f, b).transpose(2, 3), "are swapped"),
        ("10.5", lambda f, b: 4 * cut(f, b), "sum of its four points"),
        ("10.5", lambda f, b: cut(f, b).unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1), "ordered by query"),
        ("10.5", lambda f, b: cut(f, b).unflatten(0, (2, -1)), "one dimension"),
        ("10.5", lambda f, b: cut(f, b).detach(), "train the backbone"),
        ("10.5", lambda f, b: cut(f, b, make=lambda *a: matrix(*a, low=-99, high=99)), "should read zero"),
        ("10.5", lambda f, b: cut(f, b, make=lambda *a: matrix(*a, smallest=0)), "extended to one cell"),
        ("10.5", lambda f, b: cut(f[:1], b), "from the finest level"),
        ("10.5", by_torchvision, "your own matrices"),
        ("10.5", lambda f, b: cut(f, b, edit=lambda e, w, h: e.round()), "rounded to whole cells"),
        ("10.5", lambda f, b: cut(f, b, edit=lambda e, w, h: e[:, [1, 0, 3, 2]]), "x and y of the boxes are swapped"),
        ("10.5", lambda f, b: cut(f, b, edit=clip), "clipped at the edges"),
        ("10.6", lambda b, d: torch.ones(len(b)), "every alpha is 1"),
        ("10.6", lambda b, d: alphas(b, d) / 2, "half the correct values"),
        ("10.6", lambda b, d: (2 * (d[:, :2] - b[:, :2]).abs() / b[:, 2:]).amin(1), "one axis is not enough"),
        ("10.6", lambda b, d: (2 * (d[:, :2] - b[:, :2]).abs() / d[:, 2:]).amax(1), "neighbor's size"),
        ("10.6", lambda b, d: (2 * (d[:, :2] - b[:, :2]) / b[:, 2:]).amax(1), "absolute value"),
        ("10.6", lambda b, d: 2 * (d[:, :2] - b[:, :2]).norm(dim=1) / b[:, 2], "not a circle"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
