"""The checkers of notebook 09 accept right answers and name the usual mistakes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, find
from regolite.course.chapter_09 import _mix
from regolite.models.deformable_attention import DeformableAttention


def read(x, points, **how):
    how = {"align_corners": False, "padding_mode": "zeros"} | how
    return F.grid_sample(x[None, None], 2 * points[None, None] - 1, **how)[0, 0, 0]


def bilinear(x, points, **how):
    return torch.stack([read(channel, points, **how) for channel in x], 1)


def by_formula(x, points):
    height, width = x.shape[-2:]
    px, py = points[:, 0] * width - 0.5, points[:, 1] * height - 0.5
    gx = (1 - (torch.arange(width) - px[:, None]).abs()).clamp(min=0)
    gy = (1 - (torch.arange(height) - py[:, None]).abs()).clamp(min=0)
    return torch.einsum("nh,nw,chw->nc", gy, gx, x)


def rounded(x, points):
    return bilinear(x, points, mode="nearest")


def grow(x, points, by):
    """Read half a cell away."""
    return bilinear(x, points + by / torch.tensor([x.shape[-1], x.shape[-2]]))


def slope(x, points):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(read(x, points).sum(), points)[0]


def cells(x):
    return torch.tensor([x.shape[1], x.shape[0]])


def weigh(scores):
    return scores.flatten(-2).softmax(-1).view_as(scores)


def places(reference, offsets, shapes, unit=0.5, divide=True):
    reference = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        return reference + offsets / torch.tensor([(w, h) for h, w in shapes])[:, None]
    return reference[..., :2] + offsets / (offsets.shape[-2] if divide else 1) * reference[..., 2:] * unit


def places_by_head(reference, offsets, shapes):
    cells = torch.tensor([(w, h) for h, w in shapes])[:, None]
    return reference[:, :, :, None, None, :2] + offsets / cells


def correction(start, wanted):
    start = inverse_sigmoid(start)
    return inverse_sigmoid(wanted) - F.pad(start, (0, 4 - start.shape[-1]))


class Own(DeformableAttention):
    """The package's module, in which the subclasses below break one thing each."""

    how = {}  # noqa: RUF012 - arguments of grid_sample

    def values(self, memory):
        values = self.value(memory.tokens)
        return values if memory.mask is None else values.masked_fill(memory.mask[..., None], 0.0)

    def project(self, mixed):
        return self.out(mixed)

    def forward(self, queries, memory, reference_points):
        locations, weights = self.sampling(queries, memory.shapes, reference_points)
        values = self.values(memory).unflatten(2, (self.heads, -1))
        return self.project(_mix(values, memory.shapes, locations, weights, **self.how))


class PerLevel(Own):
    def sampling(self, queries, shapes, reference_points):
        locations, weights = super().sampling(queries, shapes, reference_points)
        scores = self.attention_weights(queries).view_as(weights)
        return locations, scores.softmax(-1)


class NoSoftmax(Own):
    def sampling(self, queries, shapes, reference_points):
        locations, weights = super().sampling(queries, shapes, reference_points)
        return locations, self.attention_weights(queries).view_as(weights)


class Swapped(Own):
    def sampling(self, queries, shapes, reference_points):
        return super().sampling(queries, [shape[::-1] for shape in shapes], reference_points)


class Reordered(Own):
    def sampling(self, queries, shapes, reference_points):
        offsets = self.sampling_offsets(queries).unflatten(2, (self.levels, self.heads, self.points, 2)).transpose(2, 3)
        return places(reference_points, offsets, shapes), super().sampling(queries, shapes, reference_points)[1]


class Frozen(Own):
    def sampling(self, queries, shapes, reference_points):
        locations, weights = super().sampling(queries, shapes, reference_points)
        return locations.detach(), weights


class ReadsPadding(Own):
    def values(self, memory):
        return self.value(memory.tokens)


class KeepsBias(Own):
    def values(self, memory):
        mask = torch.zeros(memory.tokens.shape[:2], dtype=torch.bool) if memory.mask is None else memory.mask
        return self.value(memory.tokens.masked_fill(mask[..., None], 0.0))


class NeedsMask(Own):
    def values(self, memory):
        return self.value(memory.tokens) * (0.0 if memory.mask is None else (~memory.mask)[..., None])


class AlignsCorners(Own):
    how = {"align_corners": True}  # noqa: RUF012


class ReadsBorder(Own):
    how = {"padding_mode": "border"}  # noqa: RUF012


class NotPermuted(Own):
    how = {"arrange": "no permute"}  # noqa: RUF012


class WidthFirst(Own):
    how = {"arrange": "width first"}  # noqa: RUF012


class LastLevel(Own):
    how = {"only": 2}  # noqa: RUF012


class NoOut(Own):
    def project(self, mixed):
        return mixed


class ScrambledHeads(Own):
    def project(self, mixed):
        return self.out(mixed.unflatten(2, (self.heads, -1)).transpose(2, 3).flatten(2))


class NoStar(Own):
    def _initialize(self):
        super()._initialize()
        nn.init.zeros_(self.sampling_offsets.bias)


class RandomOffsets(Own):
    def _initialize(self):
        super()._initialize()
        nn.init.normal_(self.sampling_offsets.weight)


class WithKeys(Own):
    def __init__(self, dim, heads, levels, points):
        super().__init__(dim, heads, levels, points)
        self.key = nn.Linear(dim, dim)


class OtherName(Own):
    def __init__(self, dim, heads, levels, points):
        super().__init__(dim, heads, levels, points)
        self.output = self.out
        del self.out


class NoLook(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        whole = Own(*sizes)
        self.sampling_offsets, self.attention_weights = whole.sampling_offsets, whole.attention_weights
        self.value, self.out, self.whole = whole.value, whole.out, [whole]

    def sampling(self, *inputs):
        return self.whole[0].sampling(*inputs)

    def forward(self, *inputs):
        return self.whole[0](*inputs)


RIGHT = [
    ("9.1", bilinear),
    ("9.1", by_formula),
    ("9.2", slope),
    ("9.3", weigh),
    ("9.4", places),
    ("9.5", DeformableAttention),
    ("9.5", Own),
    ("9.6", correction),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_the_right_answer_passes(number, answer):
    torch.manual_seed(0)
    assert find(number).checker(answer)


WRONG = [
    ("9.1", lambda x, p: bilinear(x, p, align_corners=True), "outer edges of the map"),
    ("9.1", lambda x, p: bilinear(x, p, padding_mode="border"), "read the border"),
    ("9.1", rounded, "nearest cells"),
    ("9.1", lambda x, p: bilinear(x, p.flip(1)), "x and y are swapped"),
    ("9.1", lambda x, p: grow(x, p, 0.5), "half a cell off: the center"),
    ("9.1", lambda x, p: grow(x, p, -0.5), "in the other direction"),
    ("9.1", lambda x, p: bilinear(x, p).T, "return"),
    ("9.1", lambda x, p: bilinear(x, p.detach()), "the points"),
    ("9.1", lambda x, p: bilinear(x, p).detach(), "no gradient can flow back"),
    ("9.2", lambda x, p: torch.zeros_like(p), "all slopes are zero"),
    ("9.2", lambda x, p: slope(x, p) / cells(x), "slopes per cell"),
    ("9.2", lambda x, p: slope(x, p) / cells(x) * cells(x).flip(0), "belongs to the width"),
    ("9.2", lambda x, p: slope(x, p).flip(1), "x and y are swapped"),
    ("9.2", lambda x, p: -slope(x, p), "wrong sign"),
    ("9.2", lambda x, p: slope(x, p) + 1, "should be"),
    ("9.3", lambda s: s.softmax(-1), "sum to 3, not to 1"),
    ("9.3", lambda s: s.softmax(-2), "is over the levels"),
    ("9.3", lambda s: s.softmax(2), "is over the heads"),
    ("9.3", lambda s: s.softmax(-1) / s.shape[-2], "same share"),
    ("9.3", lambda s: s.flatten(2).softmax(-1).view_as(s), "heads, levels and points"),
    ("9.3", lambda s: weigh(s).flatten(-2), "shape"),
    ("9.4", lambda r, o, s: r[:, :, None, :, None, :2] + o, "added as they are"),
    ("9.4", lambda r, o, s: places(r, 0 * o, s), "offsets are missing"),
    ("9.4", lambda r, o, s: places(r, o, [shape[::-1] for shape in s]), "belongs to the width"),
    ("9.4", lambda r, o, s: places(r, o, s[:1] * 3), "cells of the first one"),
    ("9.4", places_by_head, "was added to head"),
    ("9.4", lambda r, o, s: places(r[..., :2], o, s), "d = 4 they are measured by the box"),
    ("9.4", lambda r, o, s: places(r, o, s, unit=1.0), "twice too far"),
    ("9.4", lambda r, o, s: places(r, o, s, divide=False), "divide by K"),
    ("9.4", lambda r, o, s: places(r, o, s)[:, :, 0], "should have shape"),
    ("9.5", PerLevel, "sum to 3, not to 1"),
    ("9.5", NoSoftmax, "softmax is missing"),
    ("9.5", Swapped, "belongs to the width"),
    ("9.5", Reordered, "split by level, then head"),
    ("9.5", NotPermuted, "without a permutation"),
    ("9.5", WidthFirst, "height and width of the maps"),
    ("9.5", Frozen, "no gradient flows back to the reference points|no gradient flows back to sampling"),
    ("9.5", ReadsPadding, "padding is read"),
    ("9.5", KeepsBias, "after the projection"),
    ("9.5", NeedsMask, "without a mask"),
    ("9.5", AlignsCorners, "align_corners=True"),
    ("9.5", ReadsBorder, "read zero"),
    ("9.5", LastLevel, "sum over the levels"),
    ("9.5", NoOut, "output projection is missing"),
    ("9.5", ScrambledHeads, "not side by side"),
    ("9.5", NoStar, "should be the star"),
    ("9.5", RandomOffsets, "should start at zero"),
    ("9.5", WithKeys, "no keys"),
    ("9.5", OtherName, "no parameter 'out"),
    ("9.5", NoLook, "`look` is missing"),
    ("9.5", lambda *sizes: Own(*sizes), "the class itself"),
    ("9.6", lambda s, w: torch.zeros_like(w), "does not move the boxes"),
    ("9.6", lambda s, w: w - s, "added as logits"),
    ("9.6", lambda s, w: -correction(s, w), "sign"),
    ("9.6", lambda s, w: inverse_sigmoid(w), "adds it to the logit of the start"),
    ("9.6", lambda s, w: correction(F.pad(s, (0, 4 - s.shape[1])), w), "starts from the LOGIT 0"),
    ("9.6", lambda s, w: w.logit() - F.pad(s.logit(), (0, 4 - s.shape[1])), "infinite"),
]


@pytest.mark.parametrize(("number", "answer", "said"), WRONG, ids=[f"{n}-{said[:24]}" for n, _, said in WRONG])
def test_a_wrong_answer_hears_what_is_wrong(number, answer, said):
    torch.manual_seed(0)
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)
