"""The checkers of notebook 18 take right answers and name what is wrong with others."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert

from regolite.boxes import to_xyxy
from regolite.course import Mistake, chapter_18, find
from regolite.models.positions import sine_embedding


def judge(number, answer):
    return find(number).checker(answer)


def refused(number, answer, said):
    with pytest.raises(Mistake, match=said):
        judge(number, answer)


def products(box, rows, columns, dim):
    def along(at, cells):
        centers = (torch.arange(cells) + 0.5) / cells
        ours, theirs = (sine_embedding(2 * math.pi * x, dim, 20.0) for x in (at[None], centers))
        return (theirs * ours).sum(-1)

    return along(box[0], columns), along(box[1], rows)


def modulated(fx=lambda w, h, rw, rh: rw / w, fy=lambda w, h, rw, rh: rh / h, root=2.0, then=lambda s: s):
    def answer(box, size, rows, columns, dim):
        x, y = products(box, rows, columns, dim)
        all_four = (*box[2:], *size)
        return then(((x * fx(*all_four))[None] + (y * fy(*all_four))[:, None]) / (root * dim) ** 0.5)

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (modulated(lambda *a: 1.0, lambda *a: 1.0), "no effect"),
        (modulated(lambda w, h, rw, rh: w / rw, lambda w, h, rw, rh: h / rh), "upside down"),
        (modulated(lambda w, h, rw, rh: rh / h, lambda w, h, rw, rh: rw / w), "exchanged"),
        (modulated(lambda w, h, rw, rh: 1 / w, lambda w, h, rw, rh: 1 / h), "reference size is missing"),
        (modulated(root=1.0), "both together"),
        (modulated(then=lambda s: s.T), "rows and columns are exchanged"),
        (modulated(then=lambda s: s.flatten().softmax(0).view_as(s)), "softmax comes later"),
        (modulated(then=lambda s: s.flatten()), "should have shape"),
        (modulated(then=lambda s: s + 1), "temperature 20"),
    ],
)
def test_modulated_attention(answer, said):
    assert judge("18.1", modulated())
    assert judge("18.1", chapter_18.reference_scores)
    refused("18.1", answer, said)


def denoising(change=None, **settings):
    """The right answer, or one with an output replaced."""

    def answer(labels, boxes, counts, draws, num_queries):
        outputs = list(chapter_18.reference_denoising(labels, boxes, counts, draws, num_queries, **settings))
        if change is not None:
            place, value = change(labels, boxes, counts, draws, num_queries, outputs)
            outputs[place] = value
        return tuple(outputs)

    return answer


def noised(low=(0.0, 1.0), unit=0.5, order=(0, 1, 0, 1), clip=True, signed=True):
    """Boxes with noise of another kind."""

    def change(labels, boxes, counts, draws, num_queries, outputs):
        least = torch.tensor(low).repeat_interleave(labels.shape[1])[:, None]
        sides = boxes[..., 2:].repeat(1, 2, 1)[..., list(order)]
        sign = draws["sign"] if signed else 1
        moved = to_xyxy(boxes).repeat(1, 2, 1) + sign * (least + draws["amount"]) * 0.4 * unit * sides
        x0, y0, x1, y1 = (moved.clamp(0, 1) if clip else moved).unbind(-1)
        return 1, torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1).clamp(0.001, 0.999)

    return change


def centers_and_sizes(labels, boxes, counts, draws, num_queries, outputs):
    """Noise on center and size, not on the corners."""
    least = torch.tensor([0.0, 1.0]).repeat_interleave(labels.shape[1])[:, None]
    shift = draws["sign"] * (least + draws["amount"]) * 0.2 * boxes[..., 2:].repeat(1, 2, 2)
    return 1, (boxes.repeat(1, 2, 1) + shift).clamp(0.001, 0.999)


def flipped(noise):
    """Labels noised in another way."""
    return lambda labels, b, c, draws, q, o: (0, noise(labels, draws["flip"] < 0.2, draws["other"]))


def hidden(noised_sees=True, detector_sees=True, itself=False, inverted=False):
    def change(labels, boxes, counts, draws, num_queries, outputs):
        is_noised = torch.arange(2 * labels.shape[1] + num_queries) < 2 * labels.shape[1]
        mask = torch.zeros(len(is_noised), len(is_noised), dtype=torch.bool)
        mask |= (is_noised[:, None] & ~is_noised[None]) if noised_sees else False
        mask |= (~is_noised[:, None] & is_noised[None]) if detector_sees else False
        mask |= (is_noised[:, None] & is_noised[None]) if itself else False
        return 3, ~mask if inverted else mask

    return change


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda *a: a[0], "four tensors"),
        (denoising(label_noise=0.0), "no label is noised"),
        (denoising(label_noise=1.1), "all labels are random"),
        (denoising(flipped(lambda la, f, o: torch.where(f, la.repeat(1, 2), o))), "other way round"),
        (denoising(flipped(lambda la, f, o: torch.where(f, o, la.repeat_interleave(2, 1)))), "turns"),
        (denoising(noised(low=(0.0, 0.0))), "no more noise"),
        (denoising(noised(low=(1.0, 0.0))), "are exchanged"),
        (denoising(noised(unit=1.0)), "half the side"),
        (denoising(noised(order=(1, 0, 1, 0))), "share of the height"),
        (denoising(noised(signed=False)), "multiply by the sign"),
        (denoising(noised(clip=False)), "stick out of the image"),
        (denoising(centers_and_sizes), "not center and size"),
        (denoising(lambda la, b, c, d, q, o: (1, to_xyxy(o[1]))), "these are corners"),
        (denoising(lambda la, b, c, d, q, o: (1, b.repeat(1, 2, 1))), "no noise"),
        (denoising(lambda la, b, c, d, q, o: (2, ~o[2])), "inverted"),
        (denoising(lambda la, b, c, d, q, o: (2, o[2] | (torch.tensor(c) == 0)[:, None])), "no key left"),
        (denoising(lambda la, b, c, d, q, o: (2, o[2] & (torch.arange(6) < 3))), "negatives have padding too"),
        (denoising(hidden(detector_sees=False)), "copy the answer"),
        (denoising(hidden(noised_sees=False)), "do not see the detector's"),
        (denoising(hidden(itself=True)), "see each other here"),
        (denoising(hidden(inverted=True)), "inverted"),
        (denoising(lambda la, b, c, d, q, o: (3, o[3][:6, :6])), "should have shape"),
    ],
)  # fmt: skip
def test_denoising_queries(answer, said):
    assert judge("18.2", denoising()) and judge("18.2", lambda *a: list(denoising()(*a)))
    refused("18.2", answer, said)


def by_group(cost, groups, local=False, greedy=False):
    size = len(cost) // groups
    found = torch.empty(groups, cost.shape[1], dtype=torch.long)
    for group in range(groups):
        part = cost[group * size : (group + 1) * size]
        rows, columns = (part.argmin(0), range(cost.shape[1])) if greedy else linear_sum_assignment(part.numpy())
        found[group, torch.as_tensor(list(columns))] = torch.as_tensor(rows) + (0 if local else group * size)
    return found


def copies(cost, groups):
    """One matching for all queries, every object several times (H-DETR)."""
    _, rows = linear_sum_assignment(cost.repeat(1, groups).numpy().T)
    return torch.as_tensor(rows).view(groups, cost.shape[1])


def interleaved(cost, groups):
    """Groups of every G-th query."""
    rows = [torch.as_tensor(linear_sum_assignment(cost[g::groups].numpy().T)[1]) * groups + g for g in range(groups)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda c, g: by_group(c, g, local=True), "start again in every group"),
        (lambda c, g: by_group(c, g, greedy=True), "its best query, even one that is taken"),
        (lambda c, g: by_group(c, g).T, "transposed"),
        (copies, "crowd into the best group"),
        (interleaved, "group by group"),
        (lambda c, g: by_group(-c, g), "not the cheapest"),
        (lambda c, g: by_group(c, g)[:1], "should have shape"),
        (lambda c, g: by_group(c, g).flip(1) if c.shape[1] > 1 else by_group(c, g), "not the cheapest"),
    ],
)
def test_groups_match_by_themselves(answer, said):
    assert judge("18.3", by_group)
    refused("18.3", answer, said)


def edges(weights=lambda logits: logits.softmax(-1), sign=(-1.0, -1.0, 1.0, 1.0), half=0.5, order=(0, 1, 0, 1)):
    def answer(boxes, logits, values):
        offset = (weights(logits) * values).sum(-1)
        sides = boxes[:, 2:][:, list(order)]
        return boxes[:, :2].repeat(1, 2) + torch.tensor(sign) * (half + offset) * sides

    return answer


def likeliest(logits):
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()


def outward(boxes, logits, values):
    offset = (logits.softmax(-1) * values).sum(-1)
    return to_xyxy(boxes) + offset * boxes[:, 2:].repeat(1, 2)


def absolute(boxes, logits, values):
    offset = (logits.softmax(-1) * values).sum(-1)
    return to_xyxy(boxes) + torch.tensor([-1.0, -1.0, 1.0, 1.0]) * offset


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (edges(likeliest), "likeliest bin"),
        (edges(lambda logits: logits.sigmoid()), "softmax, not sigmoid"),
        (edges(lambda logits: logits.softmax(1)), "over the bins"),
        (outward, "the left one to the left"),
        (absolute, "in units of the box"),
        (edges(half=0.0), "from the edges of the box"),
        (edges(order=(1, 0, 1, 0)), "go with the width"),
        (lambda b, lo, v: edges()(b, lo, -v), "outward"),
        (lambda b, lo, v: edges()(b, lo.detach(), v), "no gradient"),
        (lambda b, lo, v: edges()(b, lo, v / 2), "the whole width"),
        (lambda b, lo, v: box_convert(edges()(b, lo, v), "xyxy", "cxcywh"), "return corners"),
    ],
)
def test_edges_from_distributions(answer, said):
    assert judge("18.4", edges())
    refused("18.4", answer, said)
