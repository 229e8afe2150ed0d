"""Glimpses against torchvision's RoIAlign, with and without padding, and the small networks that read them."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from regolite.models.glimpse import FeatureContext, GlimpseHead, choose_level, cut_glimpses
from regolite.types import FeatureMap

STRIDES = (4, 8, 16, 32)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def pyramid(height, width, batch=2, channels=3, strides=STRIDES, extents=None):
    """Random maps; ``extents`` are the images' own heights and widths in pixels."""
    features = []
    for stride in strides:
        h, w = -(-height // stride), -(-width // stride)
        mask = torch.zeros(batch, h, w, dtype=torch.bool)
        for b, (own_height, own_width) in enumerate(extents or []):
            mask[b, -(-own_height // stride) :] = True
            mask[b, :, -(-own_width // stride) :] = True
        features.append(FeatureMap(torch.randn(batch, channels, h, w).masked_fill(mask[:, None], 0.0), mask, stride))
    return features


def random_boxes(batch, queries, height, width, overhang=0.5):
    """Corners of boxes of all sizes, many of which reach or lie beyond the image."""
    center = torch.rand(batch, queries, 2) * (1 + overhang) - overhang / 2
    side = torch.exp(torch.empty(batch, queries, 2).uniform_(-5, 0.7))
    boxes = torch.cat([center - side / 2, center + side / 2], -1)
    return boxes * torch.tensor([width, height, width, height])


def torchvisions(features, boxes):
    """The same glimpses by MultiScaleRoIAlign, whose levels are told the strides by the size of the image."""
    pool = MultiScaleRoIAlign([str(f.stride) for f in features], output_size=7, sampling_ratio=2)
    pool.scales = [1 / f.stride for f in features]
    low, high = (f.stride.bit_length() - 1 for f in (features[0], features[-1]))
    pool.map_levels = LevelMapper(low, high)
    maps = OrderedDict((str(f.stride), f.tensor) for f in features)
    return pool(maps, list(boxes), [(0, 0)] * len(boxes))


@pytest.mark.parametrize("strides", [STRIDES, (8, 16, 32), (8, 16, 32, 64), (16, 32), (32,)])
def test_levels_are_those_of_torchvision(strides):
    sides = torch.cat([torch.arange(0, 1000, 3.7), torch.tensor([112.0, 224, 448, 896, 111.99, 223.99, 447.99])])
    corner = torch.rand(len(sides), 2) * 100
    boxes = torch.cat([corner, corner + sides[:, None] * torch.tensor([1.0, 1.0])], 1)
    low, high = (s.bit_length() - 1 for s in (strides[0], strides[-1]))
    assert torch.equal(choose_level(boxes[None], strides)[0], LevelMapper(low, high)([boxes]))


def test_a_box_of_224_pixels_belongs_to_stride_16_and_each_doubling_one_level_up():
    boxes = torch.tensor([[0.0, 0, side, side] for side in (1, 112, 223, 224, 447, 448, 5000)])
    assert choose_level(boxes[None], STRIDES).tolist() == [[0, 1, 1, 2, 2, 3, 3]]
    assert choose_level(boxes[None], (8, 16, 32)).tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    upside_down = torch.tensor([[[50.0, 10, 10, 60], [10, 10, 10, 10]]])
    assert choose_level(upside_down, STRIDES).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "height, width, strides", [(128, 96, STRIDES), (640, 512, STRIDES), (200, 333, (8, 16, 32, 64))]
)
def test_values_and_gradients_are_those_of_torchvision(height, width, strides):
    features = pyramid(height, width, strides=strides)
    boxes = random_boxes(2, 40, height, width)
    if height == 640:
        assert set(choose_level(boxes, strides).flatten().tolist()) == set(range(len(strides)))
    other = [FeatureMap(f.tensor.clone().requires_grad_(), f.mask, f.stride) for f in features]
    for f in features:
        f.tensor.requires_grad_()
    glimpses, expected = cut_glimpses(features, boxes), torchvisions(other, boxes)
    assert glimpses.shape == (80, 3, 7, 7)
    torch.testing.assert_close(glimpses, expected, **CLOSE)
    direction = torch.randn_like(glimpses)
    (glimpses * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, theirs in zip(features, other):
        torch.testing.assert_close(mine.tensor.grad, theirs.tensor.grad, **CLOSE)


def test_aligned_glimpses_are_torchvisions_aligned_ones():
    """On one level, since torchvision's pooler is never aligned; boxes may be tiny or inverted."""
    [features] = pyramid(96, 128, strides=(8,))
    features.tensor.requires_grad_()
    boxes = torch.cat(
        [random_boxes(2, 30, 96, 128), torch.tensor([[10.0, 20, 11, 22], [60, 60, 40, 50]]).expand(2, -1, -1)], 1
    )
    other = features.tensor.detach().clone().requires_grad_()
    glimpses = cut_glimpses([features], boxes, aligned=True)
    expected = roi_align(other, list(boxes), 7, 1 / 8, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(glimpses, expected, **CLOSE)
    assert (glimpses - cut_glimpses([features], boxes)).abs().max() > 0.1
    direction = torch.randn_like(glimpses)
    (glimpses * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(features.tensor.grad, other.grad, **CLOSE)


@pytest.mark.parametrize("level", range(4))
def test_every_level_by_itself(level):
    """Boxes of one size, so that one level answers, against plain roi_align on it."""
    features = pyramid(960, 900)
    side = 224 * 2.0 ** (level - 2) * 1.2
    corner = torch.rand(2, 10, 2) * 600
    boxes = torch.cat([corner, corner + side], -1)
    map_ = features[level]
    expected = roi_align(map_.tensor, list(boxes), 7, 1 / map_.stride, sampling_ratio=2, aligned=False)
    torch.testing.assert_close(cut_glimpses(features, boxes), expected, **CLOSE)


def test_strange_boxes_are_torchvisions_too():
    features = pyramid(64, 64, batch=1)
    boxes = torch.tensor(
        [
            [10.0, 10, 10, 10],  # empty
            [10.0, 10, 10.3, 10.1],  # far smaller than a cell
            [-500.0, -500, -400, -400],  # far outside
            [-30.0, -30, 94, 94],  # larger than the image
            [60.0, 60, 80, 200],  # mostly outside
            [64.0, 0, 70, 64],  # just outside
            [-3.9, 10, -1, 20],  # less than a cell outside
            [0.0, 0, 64, 64],
            [-1e6, -1e6, 1e6, 1e6],
        ]
    )
    glimpses = cut_glimpses(features, boxes[None])
    torch.testing.assert_close(glimpses, torchvisions(features, boxes[None]), **CLOSE)
    assert (glimpses[2] == 0).all()


@pytest.mark.parametrize("alone", [0, 1])
def test_padding_changes_no_glimpse(alone):
    """The same boxes on the same maps, alone and in a batch with a larger image; padding holds rubbish."""
    extents = [(96, 128), (160, 64)]
    batch = pyramid(160, 128, extents=extents)
    height, width = extents[alone]
    mine = []
    for f in batch:
        f.tensor = torch.where(f.mask[:, None], torch.full_like(f.tensor, 1e3), f.tensor)
        h, w = height // f.stride, width // f.stride
        cut = f.tensor[alone : alone + 1, :, :h, :w]
        mine.append(FeatureMap(cut.contiguous(), f.mask[alone : alone + 1, :h, :w], f.stride))
    boxes = random_boxes(2, 50, height, width)
    together = cut_glimpses(batch, boxes).unflatten(0, (2, 50))[alone]
    torch.testing.assert_close(together, cut_glimpses(mine, boxes[alone : alone + 1]), **CLOSE)
    torch.testing.assert_close(together, torchvisions(mine, boxes[alone : alone + 1]), **CLOSE)


def test_padding_gets_no_gradient():
    features = pyramid(96, 96, extents=[(96, 64), (64, 96)])
    for f in features:
        f.tensor.requires_grad_()
    cut_glimpses(features, random_boxes(2, 30, 96, 96)).sum().backward()
    for f in features:
        assert (f.tensor.grad[f.mask[:, None].expand_as(f.tensor)] == 0).all()
    assert (features[0].tensor.grad != 0).any()


def test_no_gradient_reaches_the_boxes():
    boxes = random_boxes(2, 5, 64, 64).requires_grad_()
    features = pyramid(64, 64)
    features[0].tensor.requires_grad_()
    cut_glimpses(features, boxes).sum().backward()
    assert boxes.grad is None


def test_queries_keep_their_order_and_images_their_own_maps():
    features = pyramid(64, 64)
    boxes = random_boxes(2, 6, 64, 64, overhang=0)
    glimpses = cut_glimpses(features, boxes).unflatten(0, (2, 6))
    order = torch.randperm(6)
    torch.testing.assert_close(cut_glimpses(features, boxes[:, order]).unflatten(0, (2, 6)), glimpses[:, order])
    for f in features:
        f.tensor[1] = 0
    changed = cut_glimpses(features, boxes).unflatten(0, (2, 6))
    assert torch.equal(changed[0], glimpses[0]) and (changed[1] == 0).all() and (glimpses[1] != 0).any()


def test_a_glimpse_of_a_constant_map_is_constant_and_of_a_ramp_its_bins_centers():
    features = pyramid(64, 64, batch=1, channels=2, strides=(4,))
    features[0].tensor[0, 0] = 3.0
    features[0].tensor[0, 1] = torch.arange(16.0)  # x in cells
    glimpse = cut_glimpses(features, torch.tensor([[[8.0, 8, 36, 36]]]))[0]  # 7 x 7 cells: one bin each
    torch.testing.assert_close(glimpse[0], torch.full((7, 7), 3.0))
    torch.testing.assert_close(glimpse[1], (torch.arange(7.0) + 2.5).expand(7, 7))


# What reads the glimpses


@pytest.mark.parametrize("groups", [1, 4])
def test_the_head_is_a_convolution_then_a_linear_layer(groups):
    head = GlimpseHead(8, 12, groups)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    glimpses = torch.randn(5, 8, 7, 7)
    assert head.window.weight.shape == (12, 8 // groups, 7, 7)
    window = F.conv2d(glimpses, head.window.weight, head.window.bias, groups=groups)
    assert window.shape == (5, 12, 1, 1)
    hidden = F.relu(F.layer_norm(window.flatten(1), (12,), head.window_norm.weight, head.window_norm.bias))
    expected = F.linear(hidden, head.project.weight, head.project.bias)
    expected = F.layer_norm(expected, (12,), head.project_norm.weight, head.project_norm.bias)
    torch.testing.assert_close(head(glimpses), expected, rtol=1e-4, atol=1e-5)


def test_context_looks_around_but_trains_nothing_below_it():
    context = FeatureContext(32).eval()
    assert [c.dilation for c in context.inward] == [(3, 3), (7, 7), (11, 11)]
    assert {(c.groups, c.out_channels) for c in context.inward} == {(8, 64)}
    with torch.no_grad():
        for conv in context.outward:
            nn.init.normal_(conv.weight)
            nn.init.normal_(conv.bias)
    x = torch.randn(1, 32, 24, 24, requires_grad=True)
    out = context(x)
    # The context is a constant to the map: its gradient is that of the sum and the normalization alone.
    added = (x.detach() + 0).requires_grad_()
    y = added
    for inward, outward in zip(context.inward, context.outward):
        y = y + 0.1 * outward(inward(y.relu()).relu()).detach()
    expected = F.group_norm(y, 32, context.norm.weight, context.norm.bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, added.grad, rtol=1e-4, atol=1e-5)
    assert all(conv.weight.grad.abs().sum() > 0 for conv in [*context.inward, *context.outward])


def test_context_is_next_to_nothing_at_the_start():
    context = FeatureContext(32).eval()
    x = torch.randn(2, 32, 16, 16)
    torch.testing.assert_close(context(x), F.group_norm(x, 32), rtol=0, atol=0.02)
