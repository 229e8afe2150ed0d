"""Multi-head attention against PyTorch's own, and sine positions against the formula."""

import math

import pytest
import torch
from torch import nn

from regolite.models.attention import MultiHeadAttention
from regolite.models.positions import box_positions, sine_embedding, sine_positions
from regolite.types import Memory

DIM, HEADS = 24, 4


def torchs(ours):
    """PyTorch's attention with the same weights."""
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).to(ours.out.weight.dtype)
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([p.weight for p in parts]).detach().clone()
    theirs.in_proj_bias.data = torch.cat([p.bias for p in parts]).detach().clone()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.fixture
def attention():
    module = MultiHeadAttention(DIM, HEADS)
    for part in (module.query, module.key, module.value, module.out):
        nn.init.normal_(part.bias)
    return module.eval()


def inputs(batch=2, queries=5, keys=9):
    return torch.randn(batch, queries, DIM), torch.randn(batch, keys, DIM), torch.randn(batch, keys, DIM)


def padding(batch=2, keys=9):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    mask[0, 6:] = True
    mask[1, 1:3] = True
    return mask


@pytest.mark.parametrize("mask", [None, padding()], ids=["unmasked", "masked"])
def test_values_and_gradients_are_those_of_torch(attention, mask):
    theirs = torchs(attention)
    mine, other = ([x.requires_grad_() for x in xs] for xs in zip(*[(x, x.clone()) for x in inputs()]))
    out = attention(*mine, mask)
    expected, weights = theirs(*other, key_padding_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attention.weights(mine[0], mine[1], mask), weights)

    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for x, y in zip(mine, other):
        torch.testing.assert_close(x.grad, y.grad)
    parts = (attention.query, attention.key, attention.value)
    torch.testing.assert_close(torch.cat([p.weight.grad for p in parts]), theirs.in_proj_weight.grad)
    torch.testing.assert_close(attention.out.weight.grad, theirs.out_proj.weight.grad)


def test_equations_1_and_2_written_out(attention):
    """Head by head, query by query, with nothing but the formulas."""
    query, key, value = inputs(batch=1, queries=2, keys=3)
    q, k, v = (f(x)[0] for f, x in zip((attention.query, attention.key, attention.value), (query, key, value)))
    size = DIM // HEADS
    heads = []
    for m in range(HEADS):
        part = slice(m * size, (m + 1) * size)
        rows = []
        for i in range(2):
            scores = [math.exp((q[i, part] @ k[j, part]).item() / math.sqrt(size)) for j in range(3)]
            rows.append(sum(s / sum(scores) * v[j, part] for j, s in enumerate(scores)))
        heads.append(torch.stack(rows))
    torch.testing.assert_close(attention(query, key, value)[0], attention.out(torch.cat(heads, -1)))


def test_weights_are_distributions_and_make_the_output(attention):
    query, key, value = inputs()
    mask = padding()
    weights = attention.weights(query, key, mask)
    assert weights.shape == (2, HEADS, 5, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 5))
    assert (weights.transpose(1, 3)[mask] == 0).all()
    values = attention.value(value).unflatten(2, (HEADS, -1))
    mixed = torch.einsum("bmqs,bsmc->bqmc", weights, values).flatten(2)
    torch.testing.assert_close(attention(query, key, value, mask), attention.out(mixed))


def test_order_of_keys_does_not_matter_and_that_of_queries_is_kept(attention):
    query, key, value = inputs()
    out, mask = attention(query, key, value, padding()), padding()
    keys, queries = torch.randperm(9), torch.randperm(5)
    torch.testing.assert_close(attention(query, key[:, keys], value[:, keys], mask[:, keys]), out)
    torch.testing.assert_close(attention(query[:, queries], key, value, mask), out[:, queries])


def test_masked_keys_are_never_read(attention):
    query, key, value = inputs()
    mask = padding()
    out = attention(query, key, value, mask)
    torch.testing.assert_close(attention(query, key + 99 * mask[..., None], value - 99 * mask[..., None], mask), out)
    key.requires_grad_(), value.requires_grad_()
    attention(query, key, value, mask).sum().backward()
    assert (key.grad[mask] == 0).all() and (value.grad[mask] == 0).all()
    assert (value.grad[~mask] != 0).any()


def test_look_adds_positions_to_keys_but_not_to_values(attention):
    query, tokens, positions = inputs()
    memory = Memory(tokens, positions, padding(), [(3, 3)])
    torch.testing.assert_close(attention.look(query, memory), attention(query, tokens + positions, tokens, padding()))


def test_dropout_only_while_training():
    attention = MultiHeadAttention(DIM, HEADS, dropout=0.5)
    xs = inputs()
    assert not torch.allclose(attention(*xs), attention(*xs))
    attention.eval()
    assert torch.equal(attention(*xs), attention(*xs))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="5 heads do not divide 24 channels"):
        MultiHeadAttention(24, 5)


# Positions


def one_cell(row, column, height, width, dim, shift):
    """The encoding of one cell, number by number."""
    code = []
    for place, count in ((row, height), (column, width)):
        angle = 2 * math.pi * (place + 1 - shift) / (count + 1e-6)
        for channel in range(dim // 2):
            wave = angle / 10000 ** (2 * (channel // 2) / (dim // 2))
            code.append(math.sin(wave) if channel % 2 == 0 else math.cos(wave))
    return torch.tensor(code)


@pytest.mark.parametrize("center, shift", [(False, 0.0), (True, 0.5)])
def test_sine_positions_are_the_formula(center, shift):
    found = sine_positions(torch.zeros(1, 3, 5, dtype=torch.bool), 16, center)
    assert found.shape == (1, 16, 3, 5)
    for row in range(3):
        for column in range(5):
            torch.testing.assert_close(found[0, :, row, column], one_cell(row, column, 3, 5, 16, shift))


@pytest.mark.parametrize("center", [False, True])
def test_padding_moves_no_position(center):
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[0, :3, :5] = mask[1] = False
    padded = sine_positions(mask, 16, center)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1, :, :3, :5], sine_positions(mask[:1, :3, :5], 16, center))
    torch.testing.assert_close(padded[1:], sine_positions(mask[1:], 16, center))


def test_every_cell_has_a_position_of_its_own():
    codes = sine_positions(torch.zeros(1, 12, 12, dtype=torch.bool), 32).flatten(2)[0].T
    distance = torch.cdist(codes, codes) + 99 * torch.eye(144)
    assert distance.min() > 0.1


def test_waves_interleave_sine_and_cosine():
    wave = sine_embedding(torch.tensor([0.0, 1.0]), 4)
    expected = torch.tensor([[0, 1, 0, 1], [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]])
    torch.testing.assert_close(wave, expected)


def test_box_positions_encode_the_four_numbers_one_after_another():
    boxes = torch.rand(2, 3, 4)
    code = box_positions(boxes, 8)
    assert code.shape == (2, 3, 32)
    for number in range(4):
        torch.testing.assert_close(
            code[..., 8 * number : 8 * (number + 1)], sine_embedding(boxes[..., number] * 2 * math.pi, 8)
        )


def test_initial_weights_are_those_of_pytorchs_module():
    """Queries, keys and values share one matrix [3C, C] there, whose bound is smaller than that of three."""
    ours, theirs = MultiHeadAttention(256, 8), torch.nn.MultiheadAttention(256, 8)
    bound = (6 / (4 * 256)) ** 0.5
    assert round(bound, 4) == 0.0765
    packed = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
    for weight in (packed, *packed.chunk(3), theirs.in_proj_weight):
        assert 0.999 * bound < weight.abs().max() <= bound
        torch.testing.assert_close(weight.std(), torch.tensor(bound / 3**0.5), rtol=0.01, atol=0)
    assert 0.999 * (6 / 512) ** 0.5 < ours.out.weight.abs().max() <= (6 / 512) ** 0.5, "DETR re-initializes the output"
    assert not any(layer.bias.any() for layer in (ours.query, ours.key, ours.value, ours.out))
