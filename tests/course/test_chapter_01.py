"""Checkers of notebook 01: right answers pass, each well-known mistake is called by its name."""

import pytest
import torch

from regolite.course import Mistake, find


def said(number, answer):
    """What the checker holds against an answer."""
    torch.manual_seed(0)
    with pytest.raises(Mistake) as caught:
        find(number).checker(answer)
    return str(caught.value)


def attend(scale=lambda c, s: c**0.5, late=1.0):
    def answer(query, keys, values):
        return torch.softmax(keys @ query / scale(len(query), len(keys)), 0) / late @ values

    return answer


def naive(query, keys, values):
    exponentials = (keys @ query / len(query) ** 0.5).exp()
    return exponentials / exponentials.sum() @ values


def split(x, heads):
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def cells(weights):
    return torch.special.entr(weights).sum(-1).exp()


def masked(scores, mask):
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(mask, lowest), -1).masked_fill(mask, 0.0)


def size(height, width, stride, heads=8, batch=1, bytes_each=4):
    return (-(-height // stride) * -(-width // stride)) ** 2 * heads * batch * bytes_each


RIGHT = {"1.1": attend(), "1.2": split, "1.3": cells, "1.4": masked, "1.5": size}


@pytest.mark.parametrize("number", RIGHT)
def test_right_answers_pass(number):
    torch.manual_seed(0)
    assert find(number).checker(RIGHT[number]).endswith(".")


def test_other_right_answers_pass():
    torch.manual_seed(0)
    find("1.1").checker(lambda q, k, v: torch.softmax((k * q).sum(1) * len(q) ** -0.5, -1) @ v)
    find("1.2").checker(lambda x, heads: torch.stack(x.chunk(heads, dim=1)))
    find("1.3").checker(lambda a: (-(a * (a + 1e-12).log()).sum(-1)).exp())
    find("1.4").checker(lambda s, m: torch.nan_to_num(s.masked_fill(m, float("-inf")).softmax(-1)))


WRONG = {
    "one: stub": ("1.1", lambda q, k, v: v.mean(0), "plain mean"),
    "one: shape": ("1.1", lambda q, k, v: attend()(q, k, v)[None], "shape (4,)"),
    "one: no scale": ("1.1", attend(lambda c, s: 1.0), "not scaled"),
    "one: by c": ("1.1", attend(lambda c, s: c), "divided by c"),
    "one: by the keys": ("1.1", attend(lambda c, s: s**0.5), "number of keys"),
    "one: late": ("1.1", attend(lambda c, s: 1.0, late=6**0.5), "before the softmax"),
    "one: no softmax": ("1.1", lambda q, k, v: k @ q / len(q) ** 0.5 @ v, "softmax is missing"),
    "one: detached": ("1.1", lambda q, k, v: attend()(q.detach(), k, v), "no gradient"),
    "one: naive": ("1.1", naive, "overflow"),
    "split: stub": ("1.2", lambda x, m: x.reshape(m, len(x), -1), "splits the tokens"),
    "split: not exchanged": ("1.2", lambda x, m: x.unflatten(1, (m, -1)), "swap them"),
    "split: interleaved": ("1.2", lambda x, m: x.unflatten(1, (-1, m)).permute(2, 0, 1), "every third channel"),
    "cells: stub": ("1.3", lambda a: torch.zeros(a.shape[:-1]), "all 0"),
    "cells: entropy": ("1.3", lambda a: torch.special.entr(a).sum(-1), "entropy itself"),
    "cells: sign": ("1.3", lambda a: (a * a.log()).sum(-1).exp(), "sign"),
    "cells: base 2": ("1.3", lambda a: (-(a * a.log2()).sum(-1)).exp(), "base 2"),
    "cells: NaN": ("1.3", lambda a: (-(a * a.log()).sum(-1)).exp(), "gives NaN"),
    "cells: axis": ("1.3", lambda a: torch.special.entr(a).sum().exp(), "shape (2, 5)"),
    "mask: stub": ("1.4", lambda s, m: s.softmax(-1).masked_fill(m, 0.0), "no longer sum to 1"),
    "mask: unused": ("1.4", lambda s, m: s.softmax(-1), "not used"),
    "mask: inverted": ("1.4", lambda s, m: masked(s, ~m), "inverted"),
    "mask: NaN": ("1.4", lambda s, m: s.masked_fill(m, float("-inf")).softmax(-1), "softmax is 0 / 0"),
    "mask: uniform": ("1.4", lambda s, m: s.masked_fill(m, -1e9).softmax(-1), "they should be 0"),
    "mask: gradient": (
        "1.4",
        lambda s, m: torch.nan_to_num((s + torch.zeros_like(s).masked_fill(m, float("-inf"))).softmax(-1)),
        "gradient is NaN",
    ),
    "mask: detached": ("1.4", lambda s, m: masked(s.detach(), m) + 0 * s, "no gradient"),
    "bytes: stub": ("1.5", lambda h, w, s, *rest: (h // s) * (w // s), "too few"),
    "bytes: tokens": ("1.5", lambda h, w, s, *rest: -(-h // s) * -(-w // s), "every other"),
    "bytes: one head": ("1.5", lambda h, w, s, *rest: 850**2, "8, of 4 bytes"),
    "bytes: weights": ("1.5", lambda h, w, s, *rest: size(h, w, s, bytes_each=1), "4 bytes"),
    "bytes: floor": ("1.5", lambda h, w, s, *rest: 32 * ((h // s) * (w // s)) ** 2, "partly covered"),
    "bytes: a number": ("1.5", lambda *_: size(800, 1066, 32), "stride 16"),
    "bytes: no batch": ("1.5", lambda h, w, s, m=8, b=1, n=4: size(h, w, s, m, 1, n), "batch of 2"),
}


@pytest.mark.parametrize(("number", "answer", "message"), WRONG.values(), ids=list(WRONG))
def test_mistakes_are_named(number, answer, message):
    assert message in said(number, answer)
