"""The checkers of notebook 03: right answers pass, each typical mistake is named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, find
from regolite.types import Memory


def pre_norm(layer, x, p, keys=True, values=False, first="attention_norm", second="ffn_norm"):
    n = getattr(layer, first)(x)
    x = x + layer.attention(n + p, n + p if keys else n, n + p if values else n)
    return x + layer.ffn(getattr(layer, second)(x))


def normed_sum(layer, x, p):
    x = layer.attention_norm(x)
    x = x + layer.attention(x + p, x + p, x)
    return x + layer.ffn(layer.ffn_norm(x))


def count(C, F, attentions=2, linears=4, bias=1, norms=3):
    return attentions * linears * (C * C + bias * C) + 2 * C * F + bias * (F + C) + norms * 2 * C


def boxes_at(raw, reference):
    return (raw + F.pad(inverse_sigmoid(reference), (0, 2))).sigmoid()


def bias(p, K):
    return math.log(K) + math.log(p / (1 - p))


def influence(answer, E):
    return torch.autograd.functional.jacobian(answer, E).square().sum((1, 3)).sqrt()


RIGHT = [
    ("3.1", pre_norm),
    ("3.2", count),
    ("3.3", boxes_at),
    ("3.4", bias),
    ("3.4", lambda p, K: torch.tensor(bias(p, K))),
    ("3.5", influence),
]

WRONG = [
    ("3.1", lambda layer, x, p: x, "the tokens are unchanged"),
    ("3.1", lambda layer, x, p: layer(Memory(x, p, None, [])), "post-norm"),
    ("3.1", lambda layer, x, p: pre_norm(layer, x, p, values=True), "added to the values"),
    ("3.1", lambda layer, x, p: pre_norm(layer, x, p, keys=False), "keys have no positions"),
    ("3.1", lambda layer, x, p: pre_norm(layer, x, p, first="ffn_norm", second="attention_norm"), "are swapped"),
    ("3.1", normed_sum, "starts from the normalized"),
    ("3.1", lambda layer, x, p: pre_norm(layer, x, p)[:, :3], "shape"),
    ("3.2", lambda C, F: 0, "parameters, not 0"),
    ("3.2", lambda C, F: None, "should be a number"),
    ("3.2", lambda C, F: count(C, F, attentions=1), "one of the two attentions"),
    ("3.2", lambda C, F: count(C, F, linears=3), "four linear layers"),
    ("3.2", lambda C, F: count(C, F, bias=0), "biases of the linear layers"),
    ("3.2", lambda C, F: count(C, F, norms=0), "norms are missing"),
    ("3.2", lambda C, F: count(C, F, norms=2), "three norms"),
    ("3.2", lambda C, F: 264576, "with C = 24"),
    ("3.3", lambda raw, r: raw.sigmoid() - 0.5 + F.pad(r, (0, 2), value=0.5), "outside 0 to 1"),
    ("3.3", lambda raw, r: raw.sigmoid(), "nothing was added"),
    ("3.3", lambda raw, r: (raw + F.pad(r, (0, 2))).sigmoid(), "point itself"),
    ("3.3", lambda raw, r: (raw + inverse_sigmoid(F.pad(r, (0, 2)))).sigmoid(), "pad after"),
    ("3.3", lambda raw, r: raw + F.pad(inverse_sigmoid(r), (0, 2)), "sigmoid is missing"),
    ("3.4", lambda p, K: 0.0, "starts at 0.0123"),
    ("3.4", lambda p, K: math.log(p / (1 - p)), "bias of a sigmoid"),
    ("3.4", lambda p, K: -bias(p, K), "sign is wrong"),
    ("3.4", lambda p, K: bias(1 - p, K), "not that of an object"),
    ("3.4", lambda p, K: math.exp(bias(p, K)), "logarithm"),
    ("3.4", lambda p, K: bias(p, K + 1), "not K . 1"),
    ("3.5", lambda answer, E: torch.zeros(len(E), len(E)), "all zero"),
    ("3.5", lambda answer, E: influence(answer, E).T, "transposed"),
    ("3.5", lambda answer, E: influence(answer, E).square(), "root is missing"),
    ("3.5", lambda answer, E: torch.autograd.functional.jacobian(answer, E).sum((1, 3)), "cancel"),
    ("3.5", lambda answer, E: torch.autograd.functional.jacobian(answer, E).abs().sum((1, 3)), "absolute values"),
    ("3.5", lambda answer, E: influence(lambda e: answer(e).sum(1, keepdim=True), E), "before the derivative"),
]


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
