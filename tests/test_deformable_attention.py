"""Multi-scale deformable attention against a loop over single samples, and by numerical gradients."""

import math

import pytest
import torch

from regolite.models.deformable_attention import DeformableAttention, sample_and_mix
from regolite.models.transformer import DecoderLayer
from regolite.types import Memory

SHAPES = [(5, 4), (3, 2)]
CELLS = 26
B, Q, M, L, K, C = 2, 3, 2, 2, 3, 4  # batch, queries, heads, levels, points, channels of a head


def read(image, x, y):
    """Bilinear interpolation at x, y in [0, 1]; whatever lies outside the image is zero."""
    height, width = image.shape[:2]
    column, row = x * width - 0.5, y * height - 0.5  # the center of the first cell is 0
    total = 0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def loop(values, shapes, locations, weights):
    """The sum of equation (3) of Deformable DETR, term by term."""
    out = torch.zeros(B, Q, M, values.shape[-1], dtype=values.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    image = values[b, start : start + height * width, m].view(height, width, -1)
                    start += height * width
                    for k in range(K):
                        x, y = locations[b, q, m, level, k].tolist()
                        out[b, q, m] += weights[b, q, m, level, k] * read(image, x, y)
    return out.flatten(2)


def some_inputs(dtype=torch.float64):
    values = torch.randn(B, CELLS, M, C, dtype=dtype)
    locations = torch.rand(B, Q, M, L, K, 2, dtype=dtype) * 1.6 - 0.3  # many of them outside
    weights = torch.randn(B, Q, M, L * K, dtype=dtype).softmax(-1).unflatten(-1, (L, K))
    return values, locations, weights


@pytest.fixture(params=[1, 2**18], ids=["a few maps at a time", "all at once"])
def cached(request, monkeypatch):
    monkeypatch.setattr("regolite.models.deformable_attention.CACHED", request.param)


@pytest.mark.usefixtures("cached")
def test_values_are_those_of_the_loop():
    values, locations, weights = some_inputs()
    torch.testing.assert_close(
        sample_and_mix(values, SHAPES, locations, weights), loop(values, SHAPES, locations, weights)
    )


@pytest.mark.usefixtures("cached")
def test_gradients_are_right():
    inputs = [x.requires_grad_() for x in some_inputs()]
    assert torch.autograd.gradcheck(lambda v, x, w: sample_and_mix(v, SHAPES, x, w), inputs)


def test_the_center_of_a_cell_reads_that_cell_and_a_place_far_outside_nothing():
    values = torch.arange(float(CELLS)).view(1, CELLS, 1, 1)
    weights = torch.ones(1, 1, 1, 1, 1)
    for row in range(5):
        for column in range(4):
            place = torch.tensor([(column + 0.5) / 4, (row + 0.5) / 5]).view(1, 1, 1, 1, 1, 2)
            assert sample_and_mix(values[:, :20], SHAPES[:1], place, weights).item() == pytest.approx(4 * row + column)
    ones = torch.ones(1, 20, 1, 1)
    for x, y, seen in [(-0.2, 0.5, 0), (0.5, 1.2, 0), (7, 7, 0), (0, 0.5, 0.5), (1, 1, 0.25)]:
        place = torch.tensor([x, y], dtype=torch.float32).view(1, 1, 1, 1, 1, 2)
        assert sample_and_mix(ones, SHAPES[:1], place, weights).item() == pytest.approx(seen, abs=1e-6)


DIM = 16


def shaken(heads=4, levels=2, points=3):
    module = DeformableAttention(DIM, heads, levels, points)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return module


def some_memory(mask=None):
    return Memory(torch.randn(2, CELLS, DIM), torch.randn(2, CELLS, DIM), mask, SHAPES)


def test_at_the_start_each_head_looks_in_its_own_direction():
    """Eight heads: the eight neighbors of the reference point, then the same directions two cells away, ..."""
    attention = DeformableAttention(DIM, 8, 2, 4)
    reference = torch.full((1, 1, 2, 2), 0.5)
    places, weights = attention.sampling(torch.randn(1, 1, DIM), SHAPES, reference)
    assert places.shape == (1, 1, 8, 2, 4, 2)
    torch.testing.assert_close(weights, torch.full((1, 1, 8, 2, 4), 1 / 8))
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for level, (height, width) in enumerate(SHAPES):
        cells = (places[0, 0, :, level] - 0.5) * torch.tensor([width, height])
        for head, (x, y) in enumerate(ring):
            for k in range(4):
                assert cells[head, k].tolist() == pytest.approx([x * (k + 1), y * (k + 1)], abs=1e-5)


def test_offsets_are_cells_from_a_point_and_half_sides_from_a_box():
    attention = shaken()
    query = torch.randn(2, 3, DIM)
    offsets = attention.sampling_offsets(query).view(2, 3, 4, 2, 3, 2)
    points = torch.rand(2, 3, 2, 2)
    around_points, weights = attention.sampling(query, SHAPES, points)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 3, 4))
    for level, (height, width) in enumerate(SHAPES):
        expected = points[:, :, None, level, None] + offsets[:, :, :, level] / torch.tensor([width, height])
        torch.testing.assert_close(around_points[:, :, :, level], expected)

    boxes = torch.cat([points, torch.rand(2, 3, 2, 2)], -1)
    around_boxes, same_weights = attention.sampling(query, SHAPES, boxes)
    torch.testing.assert_close(same_weights, weights)
    half = boxes[:, :, None, :, None, 2:] / 2
    torch.testing.assert_close(around_boxes, boxes[:, :, None, :, None, :2] + offsets / 3 * half)


def test_the_first_points_of_a_box_span_it():
    """Head 0 looks to the right: its last point is the middle of the right side, whatever the level."""
    attention = DeformableAttention(DIM, 4, 2, 3)
    box = torch.tensor([0.4, 0.6, 0.2, 0.1]).expand(1, 1, 2, 4)
    places, _ = attention.sampling(torch.randn(1, 1, DIM), SHAPES, box)
    assert places[0, 0, 0, :, -1].flatten().tolist() == pytest.approx([0.5, 0.6] * 2)


@pytest.mark.parametrize("numbers", [2, 4])
def test_output_is_the_loop_between_two_projections(numbers):
    attention, memory = shaken(heads=M), some_memory()
    query, reference = torch.randn(B, Q, DIM), torch.rand(B, Q, L, numbers)
    values = attention.value(memory.tokens).view(B, CELLS, M, DIM // M)
    mixed = loop(values, SHAPES, *attention.sampling(query, SHAPES, reference))
    torch.testing.assert_close(attention(query, memory, reference), attention.out(mixed), rtol=1e-4, atol=1e-5)


def test_layers_call_the_module_so_that_its_hooks_run():
    attention, memory = shaken(), some_memory()
    query, reference = torch.randn(2, 3, DIM), torch.rand(2, 3, 2, 2)
    seen = []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    layer = DecoderLayer(DIM, 4, attention, 16, 0.0)
    layer(query, 0.0, memory, reference)
    [((_, given, points), output)] = seen
    assert given is memory and points is reference and output.shape == query.shape
    assert torch.equal(attention.look(query, memory, reference), attention(query, memory, reference))
    with pytest.raises(ValueError, match="needs reference points"):
        attention.look(query, memory)


def test_padding_is_read_as_zero():
    mask = torch.zeros(2, CELLS, dtype=torch.bool)
    mask[0, 12:20] = True
    memory, query, reference = some_memory(mask), torch.randn(2, 3, DIM), torch.rand(2, 3, 2, 2)
    attention = shaken()
    out = attention.look(query, memory, reference)
    dirty = Memory(memory.tokens + 99 * mask[..., None], memory.positions, mask, SHAPES)
    assert torch.equal(attention.look(query, dirty, reference), out)
    # zero by itself, the value's bias included: a map without these cells gives the same
    values = attention.value(memory.tokens).masked_fill(mask[..., None], 0).unflatten(2, (4, -1))
    mixed = sample_and_mix(values, SHAPES, *attention.sampling(query, SHAPES, reference))
    torch.testing.assert_close(out, attention.out(mixed))


def test_positions_are_not_mixed_in():
    """Deformable attention compares nothing with its keys, so it reads the tokens alone."""
    memory, query, reference = some_memory(), torch.randn(2, 3, DIM), torch.rand(2, 3, 2, 2)
    attention = shaken()
    moved = Memory(memory.tokens, memory.positions + 1, None, SHAPES)
    assert torch.equal(attention.look(query, memory, reference), attention.look(query, moved, reference))
