"""The checkers of notebook 03: right answers pass, each typical mistake is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regolite.course import Mistake, find
from regolite.models.attention import MultiHeadAttention
from regolite.models.transformer import DecoderLayer, EncoderLayer, FeedForward
from regolite.types import Memory


def norm(x, weight, bias, dim=-1, unbiased=False, eps=1e-5):
    mean, variance = x.mean(dim, keepdim=True), x.var(dim, keepdim=True, unbiased=unbiased)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def pre_norm(layer, x, p, keys=True, values=False, first="attention_norm", second="ffn_norm"):
    n = getattr(layer, first)(x)
    x = x + layer.attention(n + p, n + p if keys else n, n + p if values else n)
    return x + layer.ffn(getattr(layer, second)(x))


def normed_sum(layer, x, p):
    x = layer.attention_norm(x)
    x = x + layer.attention(x + p, x + p, x)
    return x + layer.ffn(layer.ffn_norm(x))


def look(attention, queries, memory):
    return attention(queries, memory.tokens + memory.positions, memory.tokens, memory.mask)


class Encoding(nn.Module):
    """An encoder layer with the package's parts; subclasses make one mistake each."""

    def __init__(self, dim, attention, ffn_dim, dropout):
        super().__init__()
        self.attention, self.attention_norm = attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory, reference_points=None):
        x = memory.tokens
        x = self.attention_norm(x + self.dropout(self.seen(memory, reference_points)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))

    def seen(self, memory, reference_points):
        return self.attention.look(memory.tokens + memory.positions, memory, reference_points)


def encoder(forward=None, seen=None, init=None):
    """A class with another method in place of the right one."""

    class Changed(Encoding):
        if init is not None:

            def __init__(self, *arguments):
                super().__init__(*arguments)
                init(self)

    if forward is not None:
        Changed.forward = lambda self, memory, reference_points=None: forward(self, memory, reference_points)
    if seen is not None:
        Changed.seen = seen
    return Changed


def pre(self, memory, points):
    n = self.attention_norm(memory.tokens)
    x = memory.tokens + self.attention.look(n + memory.positions, replace(memory, tokens=n), points)
    return x + self.ffn(self.ffn_norm(x))


def no_sums(self, memory, points):
    return self.ffn_norm(self.ffn(self.attention_norm(self.seen(memory, points))))


def normed_branches(self, memory, points):
    x = memory.tokens + self.attention_norm(self.seen(memory, points))
    return x + self.ffn_norm(self.ffn(x))


def swapped(self, memory, points):
    x = self.ffn_norm(memory.tokens + self.seen(memory, points))
    return self.attention_norm(x + self.ffn(x))


def of_input(self, memory, points):
    x = self.attention_norm(memory.tokens + self.seen(memory, points))
    return self.ffn_norm(x + self.ffn(memory.tokens))


def for_good(self, memory, points):
    x = memory.tokens + memory.positions
    x = self.attention_norm(x + self.seen(memory, points))
    return self.ffn_norm(x + self.ffn(x))


def no_dropout(self, memory, points):
    x = self.attention_norm(memory.tokens + self.seen(memory, points))
    return self.ffn_norm(x + self.dropout(self.ffn(x)))


def always_dropped(self, memory, points):
    p = self.dropout.p
    x = self.attention_norm(memory.tokens + F.dropout(self.seen(memory, points), p))
    return self.ffn_norm(x + F.dropout(self.ffn(x), p))


def in_place(self, memory, points):
    x = memory.tokens
    x += self.seen(memory, points)
    x = self.attention_norm(x)
    return self.ffn_norm(x + self.ffn(x))


def detached(self, memory, points):
    x = self.attention_norm(memory.tokens + self.dropout(self.seen(memory, points).detach()))
    return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Decoding(nn.Module):
    """A decoder layer; its class attributes make the mistakes."""

    order, residual, positions, cross_positions, scaled = "sxf", "sxf", "qk", True, "sx"
    uses_mask, uses_points, by_look, shared_norm, drops = True, True, True, False, True
    stale, inverted, attention_drops = False, False, True

    def __init__(self, dim, heads, cross_attention, ffn_dim, dropout, branch_scale=1.0):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads, dropout if self.attention_drops else 0.0)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention, self.cross_norm = cross_attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout, self.branch_scale = nn.Dropout(dropout), branch_scale

    def forward(self, queries, positions, memory, reference_points=None, query_mask=None):
        x = queries
        for part in self.order:
            norm = {"s": self.self_norm, "x": self.cross_norm, "f": self.ffn_norm}[part]
            if part == "s":
                q, k, v = (x + positions if role in self.positions else x for role in "qkv")
                mask = ~query_mask if self.inverted and query_mask is not None else query_mask
                branch = self.self_attention(q, k, v, mask if self.uses_mask else None)
            elif part == "x":
                asks = (queries if self.stale else x) + (positions if self.cross_positions else 0.0)
                branch = (
                    self.cross_attention.look(asks, memory, reference_points if self.uses_points else None)
                    if self.by_look
                    else look(self.cross_attention, asks, memory)
                )
            else:
                branch = self.ffn(x)
            branch = self.dropout(branch) if self.drops else branch
            branch = self.branch_scale * branch if part in self.scaled else branch
            x = (self.self_norm if self.shared_norm else norm)(x + branch if part in self.residual else branch)
        return x


def decoder(**mistakes):
    return type("Decoding", (Decoding,), mistakes)


def influence(answer, E):
    return torch.autograd.functional.jacobian(answer, E).square().sum((1, 3)).sqrt()


RIGHT = [
    ("3.1", norm),
    ("3.1", lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias)),
    ("3.2", pre_norm),
    ("3.3", look),
    ("3.3", lambda attention, queries, memory: attention.look(queries, memory)),
    ("3.4", EncoderLayer),
    ("3.4", Encoding),
    ("3.5", DecoderLayer),
    ("3.5", Decoding),
    ("3.6", influence),
]

NORM = [
    (lambda x, w, b: x, "the tokens are unchanged"),
    (lambda x, w, b: norm(x, w, b, dim=-2), "over the tokens"),
    (lambda x, w, b: (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * w + b, "whole tensor"),
    (lambda x, w, b: norm(x, w, b, unbiased=True), "C - 1"),
    (lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5) * w + b, "default of torch.std"),
    (lambda x, w, b: norm(x, 1.0, 0.0), "not used: weight and bias"),
    (lambda x, w, b: norm(x, w, 0.0), "not added"),
    (lambda x, w, b: norm(x, w, b, eps=0.0), "eps is missing"),
    (lambda x, w, b: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b, "RMSNorm"),
    (lambda x, w, b: norm(x, w, b)[0], "shape"),
    (lambda x, w, b: norm(x.detach(), w, b), "no gradient flows back to the tokens"),
]
PRE = [
    (lambda layer, x, p: x, "the tokens are unchanged"),
    (lambda layer, x, p: layer(Memory(x, p, None, [])), "post-norm"),
    (lambda layer, x, p: pre_norm(layer, x, p, values=True), "added to the values"),
    (lambda layer, x, p: pre_norm(layer, x, p, keys=False), "keys have no positions"),
    (lambda layer, x, p: pre_norm(layer, x, p, first="ffn_norm", second="attention_norm"), "are swapped"),
    (normed_sum, "starts from the normalized"),
    (lambda layer, x, p: pre_norm(layer, x, p)[:, :3], "shape"),
]
LOOK = [
    (lambda a, q, m: q, "the queries are unchanged"),
    (lambda a, q, m: a(q, m.tokens, m.tokens, m.mask), "keys have no positions"),
    (lambda a, q, m: a(q, m.tokens + m.positions, m.tokens + m.positions, m.mask), "values too"),
    (lambda a, q, m: a(q, m.tokens + m.positions, m.tokens), "not masked"),
    (lambda a, q, m: a(q, m.tokens + m.positions, m.tokens, ~m.mask), "inverted"),
    (lambda a, q, m: a(m.tokens + m.positions, q, q), "changed places"),
    (lambda a, q, m: q + look(a, q, m), "residual sum does not belong"),
    (lambda a, q, m: None, "is None"),
]
ENCODER = [
    (encoder(lambda self, memory, points: memory.tokens), "the tokens are unchanged"),
    (encoder(pre), "this is pre-norm"),
    (encoder(no_sums), "residual sums are missing"),
    (encoder(normed_branches), "branches are normalized"),
    (encoder(swapped), "are swapped"),
    (encoder(of_input), "reads the layer's input"),
    (encoder(for_good), "for good"),
    (encoder(in_place), "changed in place"),
    (encoder(lambda self, m, r: replace(m, tokens=Encoding.forward(self, m, r))), "returns a Memory"),
    (encoder(seen=lambda self, m, r: self.attention.look(m.tokens, m, r)), "queries have no positions"),
    (
        encoder(seen=lambda self, m, r: self.attention(*[m.tokens + m.positions] * 2, m.tokens)),
        "padding is not masked",
    ),
    (
        encoder(
            seen=lambda self, m, r: self.attention.look(
                m.tokens + m.positions, replace(m, tokens=m.tokens + m.positions), r
            )
        ),
        "positions twice",
    ),
    (encoder(seen=lambda self, m, r: self.attention.look(m.tokens + m.positions, m)), "reference_points"),
    (encoder(seen=lambda self, m, r: look(self.attention, m.tokens + m.positions, m)), "method `look`"),
    (encoder(no_dropout), "dropout=1"),
    (encoder(init=lambda self: setattr(self, "ffn", FeedForward(16, 32, 0.0))), "ffn is built without"),
    (encoder(always_dropped), "acts in evaluation"),
    (encoder(detached), "no gradient flows back"),
    (encoder(init=lambda self: setattr(self, "extra", nn.Linear(2, 2))), "does not need"),
    (encoder(init=lambda self: delattr(self, "ffn_norm")), "no parameters self.ffn_norm"),
    (encoder(init=lambda self: setattr(self, "ffn", FeedForward(16, 16, 0.0))), "should have shape"),
    (Encoding(16, MultiHeadAttention(16, 2), 32, 0.0), "should be the class"),
]
DECODER = [
    (decoder(forward=lambda self, h, e, m, r=None, k=None: h), "the queries are unchanged"),
    (decoder(order="xsf"), "cross-attention comes first"),
    (decoder(order="xf"), "among the queries is missing"),
    (decoder(order="sf"), "to the memory is missing"),
    (decoder(residual=""), "residual sums are missing"),
    (decoder(residual="sf"), "residual sum of the cross-attention"),
    (decoder(positions=""), "missing in the self-attention"),
    (decoder(positions="qkv"), "values of the self-attention"),
    (decoder(cross_positions=False), "missing in the cross-attention"),
    (decoder(positions="", cross_positions=False), "are not used"),
    (decoder(shared_norm=True), "one norm is used"),
    (decoder(uses_mask=False), "query_mask has no effect"),
    (decoder(inverted=True), "query_mask is inverted"),
    (decoder(stale=True), "asks with the layer's input"),
    (decoder(attention_drops=False), "self_attention is built without"),
    (decoder(uses_points=False), "reference_points"),
    (decoder(by_look=False), "method `look`"),
    (decoder(scaled=""), "branch_scale has no effect"),
    (decoder(scaled="sxf"), "feed-forward network too"),
    (decoder(drops=False), "dropout=1"),
    (DecoderLayer.forward, "should be the class"),
]
INFLUENCE = [
    (lambda answer, E: torch.zeros(len(E), len(E)), "all zero"),
    (lambda answer, E: influence(answer, E).T, "transposed"),
    (lambda answer, E: influence(answer, E).square(), "root is missing"),
    (lambda answer, E: torch.autograd.functional.jacobian(answer, E).sum((1, 3)), "cancel"),
    (lambda answer, E: torch.autograd.functional.jacobian(answer, E).abs().sum((1, 3)), "absolute values"),
    (lambda answer, E: influence(lambda e: answer(e).sum(1, keepdim=True), E), "before the derivative"),
]
BY_NUMBER = {"3.1": NORM, "3.2": PRE, "3.3": LOOK, "3.4": ENCODER, "3.5": DECODER, "3.6": INFLUENCE}
WRONG = [(number, answer, said) for number, wrong in BY_NUMBER.items() for answer, said in wrong]


def ask(number, answer):
    torch.manual_seed(0)
    return find(number).checker(answer)


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=[n for n, _ in RIGHT])
def test_right_answers_pass(number, answer):
    assert ask(number, answer).endswith(".")


@pytest.mark.parametrize(("number", "answer", "said"), WRONG, ids=[f"{n}-{said}" for n, _, said in WRONG])
def test_mistakes_are_named(number, answer, said):
    with pytest.raises(Mistake, match=said):
        ask(number, answer)
