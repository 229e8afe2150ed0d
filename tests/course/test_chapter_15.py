"""Checkers of notebook 15: right answers pass, and each well-known mistake is named."""

import pytest
import torch

from regolite.course import Mistake, find


def solve(number, *answer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return find(number).checker(*answer)


def decoder_layer(dim, ffn, heads, levels, points, bias=1, norms=3, per_norm=2, coordinates=2, linears=2, weights=1):
    looks = heads * levels * points

    def linear(inputs, outputs):
        return inputs * outputs + bias * outputs

    reads = (coordinates + weights) * linear(dim, looks)
    return (4 + linears) * linear(dim, dim) + reads + linear(dim, ffn) + linear(ffn, dim) + norms * per_norm * dim


def changed(**changes):
    return lambda *sizes: decoder_layer(*sizes, **changes)


def test_decoder_layer_solved():
    assert "heads, levels and points" in solve("15.1", decoder_layer)
    solve("15.1", lambda *sizes: torch.tensor(decoder_layer(*sizes)))


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda *sizes: 0, "1,020,544"),
        (lambda *sizes: None, "should be a number, but is None"),
        (changed(bias=0), "biases"),
        (changed(norms=0), "three LayerNorms are missing"),
        (changed(norms=1), "one after each branch"),
        (changed(per_norm=1), "a scale and a shift"),
        (changed(coordinates=1), "two coordinates"),
        (changed(coordinates=0), "offsets are missing"),
        (changed(coordinates=0, weights=0), "predict offsets and weights are missing"),
        (changed(linears=4), "no queries or keys to project"),
        (changed(linears=0), "has two projections too"),
    ],
)
def test_decoder_layer_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.1", answer)


def test_attention_cost_solved():
    assert "cancels" in solve("15.2", lambda q, k, c: 2 * (q + k) * c * c + 2 * q * k * c)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda q, k, c: 2 * q * k * c, "four linear layers are missing"),
        (lambda q, k, c: q * k * c, "two products"),
        (lambda q, k, c: 4 * (q + k) * c * c + 4 * q * k * c, "twice"),
        (lambda q, k, c: 4 * q * c * c + 2 * q * k * c, "are applied to the keys"),
        (lambda q, k, c: 4 * k * c * c + 2 * q * k * c, "are applied to the queries"),
        (lambda q, k, c: (q + 2 * k) * c * c + 2 * q * k * c, "output projection"),
        (lambda q, k, c: 7, "cost .* multiply-adds, not 7"),
        (lambda q, k, c: "much", "should be a number"),
    ],
)
def test_attention_cost_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.2", answer)


def test_crossing_solved():
    assert "2560" in solve("15.3", lambda dim, ffn: 2 * dim + ffn)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda dim, ffn: 0, "not equal at"),
        (lambda dim, ffn: 4 * dim + 2 * ffn, "there are two"),
        (lambda dim, ffn: 2 * dim, "feed-forward network is missing"),
        (lambda dim, ffn: dim + ffn / 2, "half of it"),
        (lambda dim, ffn: [2560], "should be a number"),
    ],
)
def test_crossing_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.3", answer)


def iou(a, b):
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def clamped(a, b):
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1).clamp(max=65504) for x in (a, b)]
    return (shared.clamp(max=65504).float() / (areas[0].float() + areas[1].float() - shared.clamp(max=65504))).half()


def test_half_iou_solved():
    assert "float32" in solve("15.4", lambda a, b: iou(a.float(), b.float()).half())


@pytest.mark.parametrize(
    "answer, message",
    [
        (iou, "NaN or infinite"),
        (lambda a, b: iou(a.float(), b.float()), "should be float16"),
        (clamped, "finite, but wrong"),
        (lambda a, b: iou(a.float(), b.float()).half()[:, None], r"shape \[N\]"),
    ],
)
def test_half_iou_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.4", answer)
