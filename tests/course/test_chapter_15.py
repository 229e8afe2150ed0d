"""Checkers of notebook 15: right answers pass, and each well-known mistake is named."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import regolite
from regolite.course import Mistake, find
from regolite.evaluation import complexity
from regolite.models.attention import MultiHeadAttention
from regolite.models.deformable_attention import DeformableAttention
from regolite.types import ImageBatch


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
        (lambda *sizes: 0, "is too few"),
        (lambda *sizes: 10**9, "is too many"),
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
        (lambda q, k, c: 7, "too few"),
        (lambda q, k, c: "much", "should be a number"),
    ],
)
def test_attention_cost_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.2", answer)


def test_crossing_solved():
    assert "1400 pixels" in solve("15.4", lambda dim, ffn: 2 * dim + ffn)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda dim, ffn: 0, "still cost less"),
        (lambda dim, ffn: 10**6, "still cost more"),
        (lambda dim, ffn: dim + ffn, "four linear layers, not two"),
        (lambda dim, ffn: 2 * dim + ffn / 2, "has two linear layers"),
        (lambda dim, ffn: 4 * dim + 2 * ffn, "there are two"),
        (lambda dim, ffn: 2 * dim, "feed-forward network is missing"),
        (lambda dim, ffn: dim + ffn / 2, "half of it"),
        (lambda dim, ffn: [2560], "should be a number"),
    ],
)
def test_crossing_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.4", answer)


def iou(a, b):
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def clamped(a, b):
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1).clamp(max=65504) for x in (a, b)]
    return (shared.clamp(max=65504).float() / (areas[0].float() + areas[1].float() - shared.clamp(max=65504))).half()


def test_half_iou_solved():
    assert "float32" in solve("15.5", lambda a, b: iou(a.float(), b.float()).half())


@pytest.mark.parametrize(
    "answer, message",
    [
        (iou, "NaN or infinite"),
        (lambda a, b: iou(a.float(), b.float()), "should be float16"),
        (clamped, "finite, but wrong"),
        (lambda a, b: iou(a.float(), b.float()).half().nan_to_num() * 0.99, "finite, but wrong"),
        (lambda a, b: torch.nan_to_num(iou(a, b), nan=1.0), "finite, but wrong"),
        (lambda a, b: iou(a.float(), b.float()).half()[:, None], r"shape \[N\]"),
    ],
)
def test_half_iou_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.5", answer)


def layer_cost(layer, inputs, output):
    return layer.weight.numel() * (output.numel() // layer.weight.shape[0])


def counting(
    layer=layer_cost,
    attention=lambda a, q, k: 2 * q.numel() * k.shape[1],
    reading=lambda a, output: output.numel() // 2 * (a.value.out_features // a.heads) * 5,
    skip=lambda module, model: False,
    remove=True,
    finally_=True,
):
    """A counter with chosen faults."""

    def count(model, *inputs):
        counts, handles = {"layers": 0, "attention": 0, "reading": 0}, []

        def hook(module, kind, cost):
            def see(module, inputs, output):
                counts[kind] += cost(module, inputs, output)

            handles.append(module.register_forward_hook(see))

        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not skip(module, model):
                hook(module, "layers", layer)
            elif isinstance(module, MultiHeadAttention):
                hook(module, "attention", lambda a, inputs, output: attention(a, inputs[0], inputs[1]))
            elif isinstance(module, DeformableAttention):
                hook(module.sampling_offsets, "reading", lambda _, inputs, output, a=module: reading(a, output))
        try:
            with torch.no_grad():
                model(*inputs)
        except RuntimeError:
            if finally_:
                [handle.remove() for handle in handles]
            raise
        if remove:
            [handle.remove() for handle in handles]
        return counts

    return count


def by_module(model, *inputs):
    """Each layer once, by its last call."""
    last = {}
    counts = counting(lambda layer, inputs, output: last.update({layer: layer_cost(layer, inputs, output)}) or 0)
    return counts(model, *inputs) | {"layers": sum(last.values())}


def with_unused(model, *inputs):
    counts = counting()(model, *inputs)
    unused = getattr(model, "unused", None)
    return counts | {"layers": counts["layers"] + (0 if unused is None else unused.weight.numel())}


def swallowing(model, *inputs):
    try:
        return counting()(model, *inputs)
    except RuntimeError:
        return {}


def test_counter_solved():
    assert "PyTorch's counter" in solve("15.3", counting())


def test_counter_equals_the_packages_and_pytorchs():
    with torch.device("meta"):
        model = regolite.build("deformable_detr_r50", 91, weights=None).eval().requires_grad_(False)
    pixels = torch.zeros(1, 3, 128, 160, device="meta")
    image = ImageBatch(pixels, torch.zeros_like(pixels[:, 0]).bool(), torch.tensor([[128, 160]], device="meta"))
    with FlopCounterMode(display=False) as theirs:
        ours = counting()(model, image)
    assert ours["layers"] + ours["attention"] == theirs.get_total_flops() // 2
    cost = complexity.count(model, 128, 160)
    assert ours == {kind: cost.kind(kind) for kind in ours}


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda model, *inputs: 0, "a dictionary with the keys"),
        (lambda *a: dict.fromkeys(("layers", "attention", "reading"), None), "should be a number"),
        (counting(lambda la, i, o: la.weight.numel()), "multiply them with the places"),
        (counting(lambda la, i, o: la.weight.numel() * o.numel()), "divided by its channels"),
        (
            counting(lambda la, i, o: sum(p.numel() for p in la.parameters()) * (o.numel() // la.weight.shape[0])),
            "biases are no multiply-adds",
        ),
        (counting(lambda la, i, o: layer_cost(la, i, o) // len(o)), "count all of them"),
        (counting(lambda la, i, o: 2 * layer_cost(la, i, o)), "once, not twice"),
        (
            counting(
                lambda la, i, o: la.weight.numel() * (i[0].numel() // (la.weight.shape[1] * getattr(la, "groups", 1)))
            ),
            "cells of its output, not of its input",
        ),
        (counting(lambda la, i, o: layer_cost(la, i, o) * getattr(la, "groups", 1)), "has fewer weights"),
        (by_module, "once for each call"),
        (with_unused, "never runs does not count"),
        (counting(attention=lambda a, q, k: 0), "two products are missing"),
        (counting(attention=lambda a, q, k: q.numel() * k.shape[1]), "there are two products"),
        (counting(attention=lambda a, q, k: 2 * q.numel() * k.shape[1] * a.heads), "heads cancels"),
        (counting(attention=lambda a, q, k: 2 * q.numel() * q.shape[1]), "use the number of keys"),
        (counting(skip=lambda layer, model: isinstance(model, MultiHeadAttention)), "hook them as well"),
        (counting(reading=lambda a, output: 0), "sampling is missing"),
        (counting(reading=lambda a, output: output.numel() * (a.value.out_features // a.heads) * 5), "half as many"),
        (counting(reading=lambda a, output: output.numel() // 2 * (a.value.out_features // a.heads) * 4), r"4 \+ 1"),
        (counting(reading=lambda a, output: output.numel() // 2 * a.value.out_features * 5), "channels of its head"),
        (
            counting(skip=lambda layer, model: layer is getattr(model, "sampling_offsets", None)),
            "sampling_offsets is a linear layer",
        ),
        (counting(remove=False), "some hooks stay"),
        (counting(finally_=False), "after an error"),
        (swallowing, "is swallowed"),
    ],
)
def test_counter_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("15.3", answer)
