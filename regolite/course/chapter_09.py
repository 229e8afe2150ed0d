"""Checkers of notebook 09: deformable attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.models.deformable_attention import DeformableAttention
from regolite.types import Memory


def _differs(found: Tensor, wanted: Tensor, tolerance: float = 1e-3) -> bool:
    return found.shape != wanted.shape or not torch.allclose(found.detach().float(), wanted, atol=tolerance)


def _read(
    x: Tensor, points: Tensor, align_corners: bool = False, padding: str = "zeros", mode: str = "bilinear"
) -> Tensor:
    """The values of one channel [h, w] at points [N, 2] in [0, 1], by ``grid_sample``."""
    grid = 2 * points[None, None] - 1
    return F.grid_sample(x[None, None], grid, mode, padding, align_corners)[0, 0, 0]


@exercise(
    "9.1",
    "Where does a point lie in cells, counted from the center of cell 0? p_x = x w - 1/2, p_y = y h - 1/2.",
    "gx = (1 - |j - p_x|), not below zero, for all columns j: a matrix [N, w]; gy likewise, [N, h].",
    'With both matrices, torch.einsum("nh,nw,chw->nc", gy, gx, x).',
)
def bilinear(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """``bilinear(x, points)``: the values of a map [C, h, w] at points [N, 2]."""
    height, width = 5, 9
    maps = torch.randn(3, height, width).requires_grad_()
    points = torch.cat([torch.tensor([[0.5, 0.5], [0.0, 0.5], [1.0, 1.0]]), torch.rand(60, 2) * 1.4 - 0.2])
    points = points.requires_grad_()
    found = answer(maps, points)
    if isinstance(found, Tensor) and tuple(found.shape) == (3, len(points)):
        raise Mistake("the values are [C, N]: return [N, C], one row for each point.")
    same_shape("the values", found, (len(points), 3))

    def everywhere(at: Tensor = points, source: Tensor = maps, **how: Any) -> Tensor:
        return torch.stack([_read(x, at, **how) for x in source.detach()], 1).detach()

    cells = torch.tensor([width, height])
    alternatives = {
        "0 and 1 are the outer edges of the map, not the centers of the outermost cells (align_corners=False).": (
            everywhere(align_corners=True)
        ),
        "points beyond the outermost centers read the border cell: cells outside the map count as zero.": everywhere(
            padding="border"
        ),
        "these are the values of the nearest cells: interpolate between the four around the point.": everywhere(
            mode="nearest"
        ),
        "x and y are swapped: the first coordinate of a point is x, along the width.": everywhere(points.flip(1)),
        "everything is half a cell off: the center of cell 0 is at x w = 1/2, so p_x = x w - 1/2.": everywhere(
            points + 0.5 / cells
        ),
        "everything is half a cell off, in the other direction: subtract 1/2 once.": everywhere(points - 0.5 / cells),
    }
    for message, wrong in alternatives.items():
        if alike(found, wrong, 1e-3):
            raise Mistake(message)
    close("the values", found.detach(), everywhere(), 1e-3)
    if not found.requires_grad:
        raise Mistake("no gradient can flow back: an operation is detached or not differentiable.")
    found.square().sum().backward()
    has_gradient("the map", maps)
    has_gradient("the points", points)
    return "It equals F.grid_sample with align_corners=False and zeros outside."


@exercise(
    "9.2",
    "Write down the value between four cells as a formula of p_x and p_y, and differentiate it by p_x.",
    "By p_x: right minus left, in the upper and in the lower row, interpolated by p_y.",
    "p_x = x w - 1/2, so the chain rule multiplies the first component by w, and the second by h.",
)
def slope(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """``slope(x, points)``: the gradient of bilinear interpolation with respect to the points."""
    height, width = 6, 9
    x = torch.randn(height, width)
    inner = torch.rand(40, 2) * 0.6 + 0.2
    points = inner.clone().requires_grad_()
    [wanted] = torch.autograd.grad(_read(x, points).sum(), points)
    found = answer(x.clone(), inner.clone())
    same_shape("the slopes", found, (40, 2))
    found = found.detach()
    cells = torch.tensor([width, height])
    if not found.any():
        raise Mistake("all slopes are zero, but a point between two different cells has a slope.")
    if not _differs(found, wanted / cells):
        raise Mistake(
            "these are slopes per cell: points are relative to the map, so the chain rule multiplies by both sizes."
        )
    if not _differs(found, wanted / cells * cells.flip(0)):
        raise Mistake("width and height are swapped: x, the first component, belongs to the width.")
    if not _differs(found.flip(1), wanted):
        raise Mistake("x and y are swapped: the first component is the slope along x, along a row.")
    if not _differs(-found, wanted):
        raise Mistake("every slope has the wrong sign: it is right minus left, and lower minus upper.")
    close("the slopes", found, wanted, 1e-3)
    return "Only the four nearest cells contribute to a point's gradient."


@exercise(
    "9.3",
    "Print weights.sum() over the last two axes for one query and one head. What should it be?",
    "Equation (3): the sum over l and k together is 1.",
    "flatten(-2), softmax, unflatten.",
)
def weigh(answer: Callable[[Tensor], Tensor]) -> str:
    """``weigh(scores)``: attention weights over levels and points together."""
    scores = torch.randn(2, 5, 4, 3, 6) * 2
    found = answer(scores.clone())
    same_shape("the weights", found, scores.shape)
    _compare_weights(found.detach(), scores)
    return "One softmax distributes the weight over levels and points."


def _compare_weights(found: Tensor, scores: Tensor) -> None:
    """Raise a Mistake unless ``found`` is the softmax of scores [B, Q, M, L, K] over levels and points together."""
    alternatives = {
        f"the weights of a head sum to {scores.shape[-2]}, not to 1 as in equation (3).": scores.softmax(-1),
        "the softmax is over the levels: it should be over levels and points together.": scores.softmax(-2),
        "the softmax is over the heads: the weights of each head should sum to 1.": scores.softmax(2),
        "the weights of a head sum to 1, but dividing by the number of levels gives every level the same share; with "
        "one softmax over levels and points the query can prefer a level.": scores.softmax(-1) / scores.shape[-2],
        "the softmax is over heads, levels and points: the weights of each head should sum to 1.": (
            scores.flatten(2).softmax(-1).view_as(scores)
        ),
        "the weights are the scores themselves: the softmax is missing.": scores,
        "the weights are sigmoids: they should sum to 1 over levels and points.": scores.sigmoid(),
    }
    for mistake, wrong in alternatives.items():
        if alike(found, wrong, 1e-5):
            raise Mistake(mistake)
    close("the weights", found, scores.flatten(-2).softmax(-1).view_as(scores), 1e-5)


@exercise(
    "9.4",
    "Give the reference the axes of the offsets: [B, Q, L, d] to [B, Q, 1, L, 1, d].",
    "For points, divide the offsets by (width, height) of each level: a tensor [L, 1, 2].",
    "For boxes, the offsets times reference[..., 2:] / (2 K), with K = offsets.shape[-2]; then add reference[..., :2].",
)
def sampling_locations(answer: Callable[..., Tensor]) -> str:
    """``sampling_locations(reference, offsets, shapes)``: where to read, in [0, 1] of each level."""
    shapes = [(6, 9), (3, 5), (2, 4)]
    offsets = torch.randn(2, 5, 3, 3, 4, 2)  # as many heads as levels: only the order of the axes tells them apart
    for d in (2, 4):
        reference = torch.rand(2, 5, 3, d) * 0.5 + 0.2
        found = answer(reference.clone(), offsets.clone(), shapes)
        same_shape(f"the locations around {'points' if d == 2 else 'boxes'}", found, offsets.shape)
        _compare_locations(found.detach(), reference, offsets, shapes)
    return "One formula serves the encoder's points and the decoder's boxes."


def _compare_locations(found: Tensor, reference: Tensor, offsets: Tensor, shapes: list[tuple[int, int]]) -> None:
    """Raise a Mistake unless ``found`` is where deformable attention reads."""
    points, around = offsets.shape[-2], reference[:, :, None, :, None]  # [B, Q, 1, L, 1, d]
    center = around[..., :2]
    cells = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype)[:, None]
    alternatives = {
        "the offsets are added as they are: they count cells of the level or steps of the box, but locations are in "
        "[0, 1].": center + offsets,
        "the offsets are missing: every location is the reference itself.": center + 0 * offsets,
    }
    if reference.shape[-1] == 2:
        name, wanted = "the locations around points", center + offsets / cells
        alternatives |= {
            "the offsets are divided by (height, width): x, the first, belongs to the width.": (
                center + offsets / cells.flip(-1)
            ),
            "all levels use the cells of the first one: an offset counts cells of the level that is read.": (
                center + offsets / cells[:1]
            ),
            "the locations are in cells of their level: they should be in [0, 1].": (center * cells + offsets),
        }
    else:
        name, half = "the locations around boxes", around[..., 2:] / 2
        wanted = center + offsets / points * half
        alternatives |= {
            "the offsets around a box count cells: for d = 4 they are measured by the box.": center + offsets / cells,
            "the star reaches twice too far: a step is half a side over K, 1 / (2K).": center
            + offsets / points * 2 * half,
            "a step is a whole half side: divide by K, so that the outermost point lies on the side.": (
                center + offsets * half
            ),
            "the step is too small: one factor of K, not two.": center + offsets / points**2 * half,
            "the star is centered on the upper left corner: the first two numbers of a box are its center.": (
                center - half + offsets / points * half
            ),
        }
    if reference.shape[2] == offsets.shape[2]:
        turned = reference[:, :, :, None, None]
        scale = 1 / cells if reference.shape[-1] == 2 else turned[..., 2:] / 2 / points
        alternatives["the reference of level l was added to head l: its axis is that of the levels."] = (
            turned[..., :2] + offsets * scale
        )
    for mistake, wrong in alternatives.items():
        if alike(found, wrong, 1e-4):
            raise Mistake(mistake)
    close(name, found, wanted, 1e-4)


@exercise(
    "9.5",
    "Write `sampling` first: it is 9.3 and 9.4 after two linear layers. unflatten(2, (heads, levels, points, 2)) "
    "splits the offsets; the weights are normalized over levels * points before they are split.",
    "Values: value(tokens), masked_fill(mask[..., None], 0), unflatten(2, (heads, -1)), then split along the tokens by "
    "the number of cells of each level.",
    "A level's values [B, h*w, M, c]: permute(0, 2, 3, 1).reshape(B * M, c, h, w). Its locations [B, Q, M, K, 2]: "
    "transpose(1, 2).flatten(0, 1), a grid [B * M, Q, K, 2] after 2 * x - 1. F.grid_sample gives [B * M, c, Q, K].",
    "Multiply the samples by the weights [B * M, 1, Q, K] and sum over K; add the levels. [B * M, c, Q] becomes "
    "[B, Q, C] by unflatten(0, (B, M)).flatten(1, 2).transpose(1, 2). Then out.",
)
def deformable_attention(answer: Any) -> str:
    """``DeformableAttention(dim, heads, levels, points)``."""
    if not (isinstance(answer, type) and issubclass(answer, nn.Module)):
        raise Mistake("give the class itself, a subclass of nn.Module.")
    dim, heads, shapes, points = 24, 4, [(5, 7), (3, 4), (2, 2)], 2
    theirs = DeformableAttention(dim, heads, len(shapes), points)
    mine: Any = answer(dim, heads, len(shapes), points)
    _check_parameters(mine, theirs)
    for parameter in theirs.parameters():  # nothing may hide behind zeros
        nn.init.normal_(parameter, std=0.4)
    mine.load_state_dict(theirs.state_dict())

    batch, asked, cells = 2, 6, sum(h * w for h, w in shapes)
    mask = torch.rand(batch, cells) < 0.25
    memory = Memory(torch.randn(batch, cells, dim), torch.randn(batch, cells, dim), mask, shapes)
    queries = torch.randn(batch, asked, dim)
    for d in (2, 4):
        reference = torch.rand(batch, asked, len(shapes), d)
        _check_sampling(mine, theirs, queries, shapes, reference)
        _check_output(mine, theirs, queries, memory, reference)
    memory.mask = None
    found = mine(queries, memory, reference)
    close("the output without a mask", found.detach(), theirs(queries, memory, reference))

    inputs = [tensor.clone().requires_grad_() for tensor in (queries, memory.tokens, reference)]
    memory.tokens = inputs[1]
    mine(inputs[0], memory, inputs[2]).square().sum().backward()
    for name, tensor in zip(("the queries", "the tokens", "the reference points"), inputs):
        has_gradient(name, tensor)
    for name, parameter in mine.named_parameters():
        has_gradient(name, parameter)
    if not hasattr(mine, "look"):
        raise Mistake("the method `look` is missing, by which the transformer layers call the module.")
    close(
        "the output of `look`", mine.look(inputs[0], memory, inputs[2]).detach(), theirs(inputs[0], memory, inputs[2])
    )
    return "It equals the package's module: the weights of a trained detector fit."


def _check_parameters(mine: nn.Module, theirs: DeformableAttention) -> None:
    """Names, shapes and initial values."""
    own, wanted = mine.state_dict(), theirs.state_dict()
    if missing := sorted(wanted.keys() - own.keys()):
        raise Mistake(f"the module has no parameter {missing[0]!r}: see the names in step 1.")
    if extra := sorted(own.keys() - wanted.keys()):
        raise Mistake(
            f"the parameter {extra[0]!r} is not needed: four linear layers are enough, and there are no keys."
        )
    for name, tensor in wanted.items():
        same_shape(f"the parameter {name}", own[name], tensor.shape)
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        if own[name].any():
            raise Mistake(f"{name} should start at zero: the query has no influence yet, and all weights are equal.")
    bias = own["sampling_offsets.bias"]
    layout = wanted["sampling_offsets.bias"].view(theirs.heads, theirs.levels, theirs.points, 2)
    if not bias.any():
        raise Mistake("the bias of the offsets is zero: all points start at the reference. It should be the star.")
    if alike(bias, layout.transpose(0, 1).flatten()):
        raise Mistake("the star is ordered by level, then head: offsets are ordered by head, level, point, (x, y).")
    if alike(bias, layout.transpose(1, 2).flatten()):
        raise Mistake("the star is ordered by point before level: offsets are ordered by head, level, point, (x, y).")
    if alike(bias, layout.flip(-1).flatten()):
        raise Mistake("x and y of the star are swapped: head 0 points to the right.")
    close("the initial bias of the offsets", bias, layout.flatten())


def _check_sampling(
    mine: Any, theirs: DeformableAttention, queries: Tensor, shapes: list[tuple[int, int]], reference: Tensor
) -> None:
    """Locations and weights."""
    found = mine.sampling(queries, shapes, reference)
    if not isinstance(found, tuple) or len(found) != 2:
        raise Mistake("`sampling` should return two tensors: locations and weights.")
    locations, weights = found
    axes = (*queries.shape[:2], theirs.heads, theirs.levels, theirs.points)
    same_shape("the locations", locations, (*axes, 2))
    same_shape("the weights", weights, axes)
    offsets = theirs.sampling_offsets(queries).detach()
    if reference.shape[-1] == 2:
        turned = offsets.unflatten(2, (theirs.levels, theirs.heads, theirs.points, 2)).transpose(2, 3)
        cells = torch.tensor([(w, h) for h, w in shapes])[:, None]
        if alike(locations, reference[:, :, None, :, None] + turned / cells):
            raise Mistake("the offsets are split by level, then head: their order is head, level, point, (x, y).")
    _compare_locations(locations.detach(), reference, offsets.view(*axes, 2), shapes)
    _compare_weights(weights.detach(), theirs.attention_weights(queries).detach().view(axes))


def _check_output(mine: Any, theirs: DeformableAttention, queries: Tensor, memory: Memory, reference: Tensor) -> None:
    """The output, against those of usual mistakes."""
    locations, weights = theirs.sampling(queries, memory.shapes, reference)
    assert memory.mask is not None
    hidden = memory.mask[..., None]

    def mixed(values: Tensor, at: Tensor = locations, project: bool = True, **how: Any) -> Tensor:
        result = _mix(values, memory.shapes, at, weights, **how)
        return theirs.out(result) if project else result

    right = theirs.value(memory.tokens).masked_fill(hidden, 0.0)
    split = right.unflatten(2, (theirs.heads, -1))
    wrong_order = right.unflatten(2, (-1, theirs.heads)).transpose(2, 3)  # channels before heads
    as_positions = (
        theirs.value(memory.tokens + memory.positions).masked_fill(hidden, 0.0).unflatten(2, (theirs.heads, -1))
    )
    before = theirs.value(memory.tokens.masked_fill(hidden, 0.0)).unflatten(2, (theirs.heads, -1))
    unmasked = theirs.value(memory.tokens).unflatten(2, (theirs.heads, -1))
    raw = memory.tokens.masked_fill(hidden, 0.0).unflatten(2, (theirs.heads, -1))
    alternatives = {
        "padding is read: values where memory.mask is True should be zero.": mixed(unmasked),
        "padding still has the bias of the value projection: set it to zero after the projection.": mixed(before),
        "the mask is inverted: it is True on padding.": mixed(unmasked.masked_fill(~hidden[..., None], 0.0)),
        "the output projection is missing.": mixed(split, project=False),
        "the value projection is missing.": mixed(raw),
        "positions were added to the values: only queries have positions.": mixed(as_positions),
        "the channels are split the wrong way: head 0 has the first C / M channels.": mixed(wrong_order),
        "grid_sample counts from -1 to 1: 2 * locations - 1.": mixed(split, (locations + 1) / 2),
        "x and y are swapped in the grid of grid_sample.": mixed(split, locations.flip(-1)),
        "grid_sample uses align_corners=True: 0 and 1 are the outer edges of the map.": mixed(
            split, align_corners=True
        ),
        "points outside the map read the border: they should read zero (padding_mode='zeros').": mixed(
            split, padding_mode="border"
        ),
        "only the last level reaches the output: sum over the levels.": theirs.out(
            _mix(split, memory.shapes, locations, weights, only=len(memory.shapes) - 1)
        ),
        "[B, h w, M, c] was reshaped to [B * M, c, h, w] without a permutation: the axes h w, M and c trade places.": (
            mixed(split, arrange="no permute")
        ),
        "height and width of the maps are swapped: memory.shapes has (height, width).": mixed(
            split, arrange="width first"
        ),
        "the heads are not side by side: the output [B, Q, C] has the channels of head 0 first.": theirs.out(
            _mix(split, memory.shapes, locations, weights).unflatten(2, (theirs.heads, -1)).transpose(2, 3).flatten(2)
        ),
    }
    found = mine(queries, memory, reference)
    same_shape("the output", found, queries.shape)
    wanted = theirs(queries, memory, reference)
    if not alike(found, wanted):
        for mistake, wrong in alternatives.items():
            if alike(found, wrong):
                raise Mistake(mistake)
    close("the output", found.detach(), wanted)


def _mix(
    values: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    only: int | None = None,
    arrange: str = "",
    **how: Any,
) -> Tensor:
    """Sample values [B, S, M, c] and sum them with the weights, by one ``grid_sample`` per level."""
    batch, _, heads, _ = values.shape
    mixed = torch.zeros(())
    for level, (value, shape) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes)):
        if only not in (None, level):
            continue
        maps = value.permute(0, 2, 3, 1).reshape(
            batch * heads, -1, *(shape[::-1] if arrange == "width first" else shape)
        )
        maps = value.reshape(maps.shape) if arrange == "no permute" else maps
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(maps, grid, **({"align_corners": False} | how))  # [B*M, c, Q, K]
        mixed = mixed + (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return mixed.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


@exercise(
    "9.6",
    "Solve the equation of the refinement for the correction.",
    "wanted = sigmoid(correction + logit(start)), so correction = logit(wanted) - logit(start).",
    "A point has two logits; those of the size are 0: F.pad(logits, (0, 2)). inverse_sigmoid keeps 0 and 1 finite.",
)
def correction(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """``correction(start, wanted)``: the required output of the box head."""
    start, wanted = torch.rand(30, 4) * 0.9 + 0.05, torch.rand(30, 4) * 0.9 + 0.05
    found = answer(start.clone(), wanted.clone())
    same_shape("the correction", found, (30, 4))
    if not found.any():
        raise Mistake("a correction of zero does not move the boxes.")
    if not _differs(found, wanted - start):
        raise Mistake("this is the difference of the boxes: they are added as logits, not as numbers in [0, 1].")
    right = inverse_sigmoid(wanted) - inverse_sigmoid(start)
    if not _differs(-found, right):
        raise Mistake("the sign is wrong: the correction leads from the start to the wanted box.")
    if not _differs(found, inverse_sigmoid(wanted)):
        raise Mistake("this is the logit of the wanted box: the layer adds it to the logit of the start.")
    close("the correction of boxes", found, right, 1e-3)

    found = answer(start[:, :2].clone(), wanted.clone())
    same_shape("the correction from reference points", found, (30, 4))
    sizes = inverse_sigmoid(wanted)[:, 2:]
    if not _differs(found[:, 2:], sizes - inverse_sigmoid(torch.tensor(1e-5)), 0.05):
        raise Mistake("for a point, the size starts from the LOGIT 0, which is 0.5, not from a size of 0.")
    close("the correction from reference points", found, torch.cat([right[:, :2], sizes], 1), 1e-3)

    edges = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    if not answer(edges, torch.full((1, 4), 0.5)).isfinite().all() or not answer(wanted[:1], edges).isfinite().all():
        raise Mistake("the correction is infinite where a coordinate is 0 or 1: clamp it before the logarithm.")
    return (
        "In logits every correction gives sizes in (0, 1), and small boxes need no smaller corrections than large ones."
    )
