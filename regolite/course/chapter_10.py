"""Checkers of notebook 10, glimpses: regions, RoIAlign, levels, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert

from regolite.boxes import enlarge, to_pixels, to_xyxy
from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.data import batch_images
from regolite.models.glimpse import choose_level
from regolite.models.glimpse import cut_glimpses as package_glimpses
from regolite.types import FeatureMap


def _boxes(*shape: int) -> Float[Tensor, "*n 4"]:
    """Boxes in [0, 1], ``cxcywh``, none of them square."""
    return torch.cat([0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)], -1)


def _compare(name: str, found: Tensor, wanted: Tensor, *mistakes: tuple[Tensor, str]) -> None:
    """Raise a Mistake if ``found`` is not ``wanted``, with the message of the known mistake or with the numbers."""
    if not alike(found, wanted, 1e-3):
        for wrong, message in mistakes:
            if alike(found, wrong, 1e-3):
                raise Mistake(message)
    close(name, found, wanted, 1e-3)


@exercise(
    "10.1",
    "Multiplying all four numbers by alpha moves the box away from the corner of the image. What must not change?",
    "The center stays: (x0 + x1) / 2. Half the new width is alpha times half the old one.",
    "With the mean of the two corners as `center` and half their difference as `half`, the corners are "
    "torch.cat([center - alpha * half, center + alpha * half], -1).",
)
def enlarge_corners(answer: Callable[..., Any]) -> str:
    """``answer(boxes_xyxy, alpha)``."""

    def wider(boxes_xyxy: Tensor, factor: float) -> Tensor:
        return box_convert(enlarge(box_convert(boxes_xyxy, "xyxy", "cxcywh"), factor), "cxcywh", "xyxy")

    for shape in ((1,), (3, 5)):
        boxes, alpha = 100 * to_xyxy(_boxes(*shape)), 3.0
        before = boxes.clone()
        found = answer(boxes, alpha)
        same_shape("the enlarged boxes", found, (*shape, 4))
        if not torch.equal(boxes, before):
            raise Mistake("your function changes its input boxes: create new ones.")
        wanted = wider(boxes, alpha)
        _compare(
            "the enlarged boxes",
            found,
            wanted,
            (boxes, "the boxes are unchanged."),
            (
                alpha * boxes,
                "you multiplied corners by alpha, which moves a box away from the origin: its center must not change.",
            ),
            (
                wider(boxes, alpha**0.5),
                "the area grew by alpha, not the sides: multiply width and height by alpha.",
            ),
            (
                wider(boxes, 2 * alpha),
                "the box grew by alpha on each side of the center, twice too much: half the width goes to each side.",
            ),
            (
                box_convert(wanted, "xyxy", "cxcywh"),
                "the result is center, width, height: convert it to corners.",
            ),
            (wanted.clamp(min=0), "the result is clipped at 0: regions may reach beyond the image."),
        )
    return "A region keeps the center of its box, whatever the format."


@exercise(
    "10.2",
    "Find the 14 points first: as in points_of, for N regions at once, [N, 14]. The size of a region is at least 1.",
    "A point counts if it is in [-1, extent]. Clamp the points to [0, extent - 1] after you have noted which count.",
    "The weights of all cells for all points: (1 - (cells - points[..., None]).abs()).clamp(min=0), [N, 14, extent]; "
    "a bin is the mean of two points: unflatten(1, (7, 2)).mean(2).",
)
def reading_matrix(answer: Callable[..., Any]) -> str:
    """``answer(begin, end, extent)``: the weights of the seven bins along one axis, for N regions."""
    inner = torch.tensor([[1.3, 15.2], [2.2, 5.1], [0.0, 11.5]])
    beyond = torch.tensor([[-4.0, 9.5], [-0.8, 3.0], [14.0, 19.5], [5.0, 23.0]])
    small = torch.tensor([[3.3, 3.4], [7.0, 7.0]])
    for name, edges in (("", inner), (" at the border", beyond), (" of small regions", small)):
        begin, end, extent = edges[:, 0].clone(), edges[:, 1].clone(), 16
        found = answer(begin, end, extent)
        same_shape("the matrices", found, (len(edges), 7, extent))
        if not found.any():
            raise Mistake("the matrix is all zero: no bin reads anything.")
        wanted = _matrix(begin, end, extent)
        _compare(
            f"the matrix{name}",
            found,
            wanted,
            (2 * wanted, "the rows sum to 2 instead of 1: a bin is the mean of its two points, not their sum."),
            (
                _matrix(begin - 0.5, end - 0.5, extent),
                "these are the weights of `aligned=True`: here 0 is the center of cell 0.",
            ),
            (_matrix(begin, end, extent, per_bin=1), "each bin has two points per axis, not one at its center."),
            (
                _matrix(begin, end, extent, border="zeros"),
                "a point up to one cell outside reads the border cell in full: clamp the points to [0, extent - 1].",
            ),
            (
                _matrix(begin, end, extent, border="repeat"),
                "a point more than one cell outside should read zero, but reads the border cell.",
            ),
            (
                _matrix(begin, end, extent, border="strict"),
                "points less than one cell outside read zero: they count from -1 to extent.",
            ),
            (
                _matrix(begin, end, extent, smallest=0.0),
                "a region smaller than one cell should be extended to one cell.",
            ),
            (
                _matrix(begin.clamp(0, extent), end.clamp(0, extent), extent),
                "the regions were clipped to the map: a region may reach beyond it, only its points are restricted.",
            ),
            (_matrix(begin, end, extent, nearest=True), "these are the nearest cells: interpolate between two cells."),
        )
    return "RoIAlign on one level is W_y X W_x^T: linear in the features and separable."


def _matrix(
    begin: Tensor,
    end: Tensor,
    extent: int,
    per_bin: int = 2,
    border: str = "",
    smallest: float = 1.0,
    nearest: bool = False,
) -> Float[Tensor, "N 7 extent"]:
    """The weights of the seven bins along one axis, with the options of usual mistakes."""
    step = (end - begin).clamp(min=smallest) / (7 * per_bin)
    points = begin[:, None] + step[:, None] * (torch.arange(7 * per_bin) + 0.5)
    low, high = (0.0, extent - 1.0) if border == "strict" else (-1.0, float(extent))
    counts = (points >= low) & (points <= high) | (border in ("repeat", "zeros"))
    if border != "zeros":
        points = points.clamp(0, extent - 1)
    if nearest:
        points = points.round()
    weights = (1 - (torch.arange(extent) - points[..., None]).abs()).clamp(min=0) * counts[..., None]
    return weights.unflatten(1, (7, per_bin)).mean(2)


@exercise(
    "10.3",
    "The side of a region is the square root of its area. Which level, as log2 of the stride, does the formula give?",
    "floor(4 + log2(side / 224)), clamped between log2 of the first and of the last stride, minus log2 of the first.",
    "A region without area has log2(0) = -inf, which the clamp turns into the finest level; .long() makes an integer.",
)
def level_choice(answer: Callable[..., Any]) -> str:
    """``answer(boxes_xyxy, strides)``: the index of the level of each box."""
    corner = torch.rand(2, 40, 2) * 60
    sizes = torch.cat([torch.rand(2, 20, 2) * 400 + 20, torch.rand(2, 20, 2) * 1200 + 100], 1)
    sizes[0, :3] = torch.tensor([[224.0, 224.0], [112.0, 112.0], [448.0, 448.0]])
    sizes[1, :2] = torch.tensor([[0.0, 50.0], [0.0, 0.0]])
    boxes = torch.cat([corner.round(), corner.round() + sizes], -1)
    for strides in ((8, 16, 32), (4, 8, 16, 32), (16, 32)):
        found = answer(boxes.clone(), strides)
        same_shape("the levels", found, (2, 40))
        if found.is_floating_point():
            raise Mistake("the levels should be integers, to be used as indices: end with .long().")
        wanted = choose_level(boxes, strides)
        first = strides[0].bit_length() - 1
        side = sizes.prod(-1).sqrt()
        exponent = 4 + torch.log2(side / 224)

        def limited(level: Tensor, first: int = first, count: int = len(strides)) -> Tensor:
            return (level - first).clamp(0, count - 1).nan_to_num().long()

        _compare(
            "the level",
            found.float(),
            wanted.float(),
            (wanted.float() + first, "this is log2 of the stride: return the index of the level, 0 for the finest."),
            (limited((exponent + 1e-6).round()).float(), "round down: a level holds sizes up to twice its smallest."),
            (limited((exponent - 1e-6).ceil()).float(), "round down, not up."),
            (
                limited((4 + torch.log2(sizes.prod(-1) / 224) + 1e-6).floor()).float(),
                "the formula takes the side, the square root of the area, not the area.",
            ),
            (
                limited((4 + torch.log(side / 224) + 1e-6).floor()).float(),
                "this is the natural logarithm: the levels double, so it is log2.",
            ),
            (
                limited((4 + torch.log2(sizes.amax(-1) / 224) + 1e-6).floor()).float(),
                "this is the longest side: take the square root of width times height.",
            ),
            (
                limited((4 + torch.log2(boxes[..., 2:].prod(-1).sqrt() / 224) + 1e-6).floor()).float(),
                "boxes are corners: width and height are differences of the two corners.",
            ),
        )
    return "Regions of 224 pixels and more belong to stride 16, of 448 and more to stride 32."


@exercise(
    "10.4",
    "A box of (0.5, 0.5, 1, 1) covers its whole image. Which corners should it have, for each image of the batch?",
    "The padded size is the same for all images; `images.sizes` has each one's own height and width.",
    "Each image has a row of images.sizes: to_pixels(enlarge(boxes, alpha), images.sizes).",
)
def regions_of(answer: Callable[..., Any]) -> str:
    """``answer(boxes, alpha, images)``: enlarged corners in pixels, in each image's own frame."""
    images = batch_images([torch.zeros(3, 96, 160), torch.zeros(3, 128, 64), torch.zeros(3, 50, 70)], multiple=32)
    boxes, alpha, sizes = _boxes(3, 4), 2.0, images.sizes
    found = answer(boxes, alpha, images)
    same_shape("the regions", found, (3, 4, 4))
    padded = sizes.new_tensor(images.mask.shape[1:]).expand_as(sizes)
    larger = enlarge(boxes, alpha)
    _compare(
        "the regions",
        found,
        to_pixels(larger, sizes),
        (
            to_pixels(larger, padded),
            "a box of the whole image, (0.5, 0.5, 1, 1) with alpha 1, does not give the corners of its own image.",
        ),
        (to_pixels(larger, sizes.flip(1)), "height and width are swapped."),
        (to_pixels(boxes, sizes), "the boxes are in the right frame, but not enlarged by alpha."),
        (to_pixels(larger, sizes[:1].expand(3, 2)), "all images were scaled by the size of the first one."),
        (to_xyxy(larger), "the corners are still in [0, 1]: multiply them by the images' sizes."),
    )
    return "An image's regions no longer depend on the images that share its batch."


class _ByHand(TorchDispatchMode):
    """Refuses torchvision's RoIAlign."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "roi_align" in str(func):
            raise Mistake("torchvision's roi_align computes these glimpses: build them from your own matrices.")
        return func(*args, **(kwargs or {}))


@exercise(
    "10.5",
    "Two loops are fine: for level, feature in enumerate(features), for image in range(batch). Start with a tensor of "
    "zeros [B, Q, C, 7, 7] and write the glimpses of each level and image into it.",
    "The boxes of an image on a level: (levels[image] == level).nonzero()[:, 0]. Its cells: with inside = "
    "~feature.mask[image], inside[:, 0].sum() rows and inside[0].sum() columns.",
    "x0, y0, x1, y1 = (boxes[image, chosen] / feature.stride).unbind(-1); rows from y0, y1 and columns from x0, x1.",
    'half = torch.einsum("nyh,chw->ncyw", rows, own_cells), then torch.einsum("ncyw,nxw->ncyx", half, columns).',
)
def glimpses(answer: Callable[..., Any]) -> str:
    """``answer(features, boxes_xyxy)``: RoIAlign of every box on the level of its size."""
    features = _pyramid([(96, 160), (128, 64)])
    extent = torch.tensor([[160.0, 96.0], [64.0, 128.0]])[:, None]  # width and height of each image
    center = torch.rand(2, 12, 2) * extent
    sizes = torch.cat(
        [torch.rand(2, 6, 2) * 80 + 4, torch.rand(2, 3, 2) * 100 + 230, torch.rand(2, 3, 2) * 200 + 460], 1
    )
    boxes = torch.cat([center - sizes / 2, center + sizes / 2], -1)
    boxes[:, 0, 2:] = boxes[:, 0, :2] + 1.0  # smaller than a cell
    boxes = boxes.requires_grad_()
    with _ByHand():
        found = answer(features, boxes)
    if isinstance(found, Tensor) and tuple(found.shape) == (2, 12, 6, 7, 7):
        raise Mistake("images and queries should be one dimension, [B * Q, C, 7, 7]: flatten(0, 1).")
    same_shape("the glimpses", found, (24, 6, 7, 7))
    _compare_glimpses(found.detach(), features, boxes.detach())

    if not found.requires_grad:
        raise Mistake("no gradient reaches the features, but glimpses train the backbone.")
    found.square().sum().backward()
    if boxes.grad is not None and boxes.grad.any():
        raise Mistake("a gradient reaches the boxes: detach them first.")
    for feature in features:
        has_gradient(f"the features of stride {feature.stride}", feature.tensor)
        assert feature.tensor.grad is not None
        if feature.tensor.grad.masked_select(feature.mask[:, None]).any():
            raise Mistake(f"padding of stride {feature.stride} receives a gradient: it is no part of the image.")

    one = _pyramid([(64, 96)])[1:2]  # a single level
    boxes = 90 * to_xyxy(_boxes(1, 5))
    wanted = package_glimpses(one, boxes)
    close("the glimpses of a pyramid of one level", answer(one, boxes).detach(), wanted.detach(), 1e-3)
    return "They equal the package's, and torchvision's wherever there is no padding."


def _pyramid(sizes: list[tuple[int, int]]) -> list[FeatureMap]:
    """Random features of three levels for images of these sizes; their padding is not zero."""
    images = batch_images([torch.zeros(3, *size) for size in sizes], multiple=32)
    features = []
    for stride in (8, 16, 32):
        mask = images.mask[:, ::stride, ::stride]
        tensor = torch.randn(len(sizes), 6, *mask.shape[1:]).masked_fill(mask[:, None], 50.0)
        features.append(FeatureMap(tensor.requires_grad_(), mask, stride))
    return features


def _compare_glimpses(found: Tensor, features: list[FeatureMap], boxes: Tensor) -> None:
    """Raise a Mistake unless ``found`` are the package's glimpses."""
    wanted = package_glimpses(features, boxes).detach()
    batch, queries = boxes.shape[:2]

    def padded() -> Tensor:
        whole = [FeatureMap(f.tensor, torch.zeros_like(f.mask), f.stride) for f in features]
        return package_glimpses(whole, boxes).detach()

    def on(level: int) -> Tensor:
        return package_glimpses(features[level : level + 1], boxes).detach()

    def exact() -> Tensor:  # aligned=True
        shift = torch.tensor([f.stride for f in features])[choose_level(boxes, [f.stride for f in features])] / 2
        return _by_matrices(features, boxes, shift=shift)

    _compare(
        "the glimpse",
        found,
        wanted,
        (wanted.transpose(2, 3), "rows and columns of every glimpse are swapped: [N, C, y, x]."),
        (4 * wanted, "every bin is the sum of its four points: it should be their mean."),
        (
            wanted.unflatten(0, (batch, queries)).transpose(0, 1).flatten(0, 1),
            "the glimpses are ordered by query, then image: all queries of image 0 come first.",
        ),
        (padded(), "padding is read: the borders of a map are those of the box's own image, from its mask."),
        (on(0), "all glimpses are from the finest level: choose the level by the size of the box."),
        (on(len(features) - 1), "all glimpses are from the coarsest level: choose the level by the size of the box."),
        (exact(), "these are the glimpses of `aligned=True`: do not subtract half a cell."),
        (_by_matrices(features, boxes, first=True), "every image's glimpses are cut out of the first image."),
        (_by_matrices(features, boxes, extent=True), "the size of the first image was used for all: images differ."),
        (
            _by_matrices(features, boxes, smallest=0.0),
            "a region smaller than one cell should be extended to one cell.",
        ),
        (
            _by_matrices(features, boxes, border="repeat"),
            "points more than one cell outside of the image should read zero.",
        ),
        (
            _by_matrices(features, boxes, border="zeros"),
            "points up to one cell outside of the image should read the border cell.",
        ),
        (
            _by_matrices(features, boxes, pixels=True),
            "the boxes are in pixels: divide them by the stride of the level.",
        ),
        (
            _by_matrices(features, boxes, swap=True),
            "x and y of the boxes are swapped: W_y has rows, from y0 to y1.",
        ),
        (
            _by_matrices(features, boxes, edit=lambda edges, extent: edges.clamp(min=0).minimum(extent)),
            "the regions are clipped at the edges of the image: a region that reaches beyond it keeps its size.",
        ),
        (
            _by_matrices(features, boxes, edit=lambda edges, extent: edges.round()),
            "the edges are rounded to whole cells: RoIAlign rounds nothing.",
        ),
        (
            _by_matrices(features, boxes, only=0),
            "only boxes on the finest level have glimpses: the others are still zero.",
        ),
    )


def _by_matrices(
    features: list[FeatureMap],
    boxes: Tensor,
    shift: Tensor | None = None,
    first: bool = False,
    extent: bool = False,
    pixels: bool = False,
    only: int | None = None,
    swap: bool = False,
    edit: Callable[[Tensor, Tensor], Tensor] = lambda edges, extent: edges,
    **how: Any,
) -> Tensor:
    """Glimpses as W_y X W_x^T, with the options of usual mistakes."""
    levels = choose_level(boxes, [f.stride for f in features])
    if shift is not None:
        boxes = boxes - shift[..., None]
    result = boxes.new_zeros(*boxes.shape[:2], features[0].tensor.shape[1], 7, 7)
    for level, feature in enumerate(features):
        for image in range(len(boxes)):
            chosen = (levels[image] == level).nonzero()[:, 0]
            inside = ~feature.mask[0 if extent or first else image]
            height, width = int(inside[:, 0].sum()), int(inside[0].sum())
            cells = feature.tensor[0 if first else image, :, :height, :width].detach()
            edges = boxes[image, chosen] / (1 if pixels else feature.stride)
            edges = edit(edges, torch.tensor([width, height, width, height]))
            x0, y0, x1, y1 = edges[:, [1, 0, 3, 2] if swap else [0, 1, 2, 3]].unbind(-1)
            rows, columns = _matrix(y0, y1, height, **how), _matrix(x0, x1, width, **how)
            if only in (None, level):
                result[image, chosen] = torch.einsum("nyh,nxw,chw->ncyx", rows, columns, cells)
    return result.flatten(0, 1)


@exercise(
    "10.6",
    "The neighbor's center is inside when it is no farther from the ball's than half the region's side, in x and y.",
    "In x that needs alpha >= 2 |dx| / w, in y alpha >= 2 |dy| / h. Both must hold.",
    "2 * (deciders[:, :2] - balls[:, :2]).abs() / balls[:, 2:], then the larger of the two: .amax(1).",
)
def smallest_alpha(answer: Callable[..., Any]) -> str:
    """``answer(balls, deciders)``: the smallest alpha whose region contains the decider's center."""
    balls, deciders = 128 * _boxes(50), 128 * _boxes(50)
    found = answer(balls, deciders)
    same_shape("alpha", found, (50,))
    away = deciders[:, :2] - balls[:, :2]
    ratio = 2 * away.abs() / balls[:, 2:]
    _compare(
        "alpha",
        found,
        ratio.amax(1),
        (torch.ones(50), "every alpha is 1: the function does not use the neighbors yet."),
        (ratio.amax(1) / 2, "these are half the correct values: a region extends only half its width to each side."),
        (ratio.amin(1), "one axis is not enough: the center must be inside in x and in y, so the larger alpha counts."),
        (
            (2 * away.abs() / deciders[:, 2:]).amax(1),
            "you divided by the neighbor's size; divide by the ball's, which is enlarged.",
        ),
        ((2 * away / balls[:, 2:]).amax(1), "take the absolute value of dx and dy: the neighbor may be on any side."),
        (
            2 * away.norm(dim=1) / balls[:, 2],
            "a region is a rectangle, not a circle: compare in x and in y, not the distance.",
        ),
    )
    return "The paper's largest alpha, 3, includes the neighbor's center for about three balls in ten."
