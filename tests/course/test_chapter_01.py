"""Checkers of notebook 01: right answers pass, each well-known mistake is called by its name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regolite.course import Mistake, chapter_01, find
from regolite.models.attention import MultiHeadAttention


def said(number, answer):
    """What the checker holds against an answer."""
    torch.manual_seed(0)
    with pytest.raises((Mistake, RuntimeError)) as caught:
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


def gradient(weights, values, g):
    return weights * ((values - weights @ values) @ g)


def masked(scores, mask):
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(mask, lowest), -1).masked_fill(mask, 0.0)


class Attention(MultiHeadAttention):
    """The package's class, or one with a learner's mistake."""

    mistake = ""

    def forward(self, query, key, value, mask=None):
        return chapter_01._attention(self, query, key, value, mask, self.mistake)


def wrong(mistake):
    return type("Wrong", (Attention,), {"mistake": mistake})


def changed(**methods):
    return type("Changed", (MultiHeadAttention,), methods)


def plain(self, dim, heads, dropout=0.0):
    """A constructor without the initialization and the check."""
    nn.Module.__init__(self)
    self.heads, self.dropout = heads, dropout
    self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))


def zero_biases(self, dim, heads, dropout=0.0):
    plain(self, dim, heads, dropout)
    for layer in self.children():
        nn.init.zeros_(layer.bias)


def any_heads(self, dim, heads, dropout=0.0):
    zero_biases(self, dim, heads, dropout)
    for layer in self.children():
        nn.init.xavier_uniform_(layer.weight)


def any_heads_checked(self, dim, heads, dropout=0.0):
    if dim % heads:
        raise ValueError
    any_heads(self, dim, heads, dropout)


def renamed(self, dim, heads, dropout=0.0):
    MultiHeadAttention.__init__(self, dim, heads, dropout)
    self.output = self.out
    del self.out


def narrow(self, dim, heads, dropout=0.0):
    MultiHeadAttention.__init__(self, dim, heads, dropout)
    self.value = nn.Linear(dim, dim // heads)


def forgetful(self, dim, heads, dropout=0.0):
    MultiHeadAttention.__init__(self, dim, heads)


def no_bias(self, dim, heads, dropout=0.0):
    MultiHeadAttention.__init__(self, dim, heads, dropout)
    self.key = nn.Linear(dim, dim, bias=False)


def weigh(self, query, key, mask=None, drop=False, average=False, hide=True):
    scores = self._split(self.query(query)) @ self._split(self.key(key)).transpose(-2, -1) / (12 / 3) ** 0.5
    if mask is not None and hide:
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1)
    weights = F.dropout(weights, self.dropout, self.training) if drop else weights
    return weights.mean(1) if average else weights


def by_hand(self, query, key, value, mask=None):
    """forward without the fused kernel: NaN for images without keys."""
    weights = F.dropout(MultiHeadAttention.weights(self, query, key, mask), self.dropout, self.training)
    return self.out((weights @ self._split(self.value(value))).transpose(1, 2).flatten(2))


def survivor(self, query, key, value, mask=None):
    """forward without the fused kernel, and without NaN."""
    scores = (
        self._split(self.query(query)) @ self._split(self.key(key)).transpose(-2, -1) / self.query.out_features**0.5
    )
    hidden = torch.zeros(key.shape[:2], dtype=torch.bool) if mask is None else mask
    weights = masked(scores * self.heads**0.5, hidden[:, None, None].expand_as(scores))
    weights = F.dropout(weights, self.dropout, self.training)
    return self.out((weights @ self._split(self.value(value))).transpose(1, 2).flatten(2))


def nan_replaced(self, query, key, value, mask=None):
    scores = self._split(self.query(query)) @ self._split(self.key(key)).transpose(-2, -1) / 2
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).masked_fill(mask, float("-inf"))[:, None, None]
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    return self.out((weights @ self._split(self.value(value))).transpose(1, 2).flatten(2))


def drop_output(self, query, key, value, mask=None):
    kept, self.dropout = self.dropout, 0.0
    mixed = MultiHeadAttention.forward(self, query, key, value, mask)
    self.dropout = kept
    return F.dropout(mixed, kept, self.training)


def drop_values(self, query, key, value, mask=None):
    """forward with dropout on the projected values."""
    weights = MultiHeadAttention.weights(self, query, key, mask).nan_to_num()
    values = F.dropout(self._split(self.value(value)), self.dropout, self.training)
    return self.out((weights @ values).transpose(1, 2).flatten(2))


def drop_scores(self, query, key, value, mask=None):
    """forward with dropout before the softmax."""
    scores = self._split(self.query(query)) @ self._split(self.key(key)).transpose(-2, -1) / 2
    hidden = torch.zeros(key.shape[:2], dtype=torch.bool) if mask is None else mask
    weights = masked(F.dropout(scores, self.dropout, self.training), hidden[:, None, None].expand_as(scores))
    return self.out((weights @ self._split(self.value(value))).transpose(1, 2).flatten(2))


def mask_by_query(self, query, key, mask=None):
    scores = self._split(self.query(query)) @ self._split(self.key(key)).transpose(-2, -1) / 2
    return torch.softmax(scores if mask is None else scores.masked_fill(mask[:, None, :, None], float("-inf")), -1)


def drop_always(self, query, key, value, mask=None):
    allowed = None if mask is None else ~mask[:, None, None]
    q, k, v = (self._split(layer(x)) for layer, x in ((self.query, query), (self.key, key), (self.value, value)))
    mixed = F.scaled_dot_product_attention(q, k, v, allowed, dropout_p=self.dropout)
    return self.out(mixed.transpose(1, 2).flatten(2))


def drop_never(self, query, key, value, mask=None):
    kept, self.dropout = self.dropout, 0.0
    mixed = MultiHeadAttention.forward(self, query, key, value, mask)
    self.dropout = kept
    return mixed


def detached(self, query, key, value, mask=None):
    return MultiHeadAttention.forward(self, query.detach(), key, value, mask)


RIGHT = {"1.1": attend(), "1.2": gradient, "1.3": split, "1.4": masked, "1.5": MultiHeadAttention}


@pytest.mark.parametrize("number", RIGHT)
def test_right_answers_pass(number):
    torch.manual_seed(0)
    assert find(number).checker(RIGHT[number]).endswith(".")


def test_other_right_answers_pass():
    torch.manual_seed(0)
    find("1.1").checker(lambda q, k, v: torch.softmax((k * q).sum(1) * len(q) ** -0.5, -1) @ v)
    find("1.2").checker(lambda a, v, g: (torch.diag(a) - torch.outer(a, a)) @ (v @ g))
    find("1.3").checker(lambda x, heads: torch.stack(x.chunk(heads, dim=1)))
    find("1.5").checker(changed(__init__=any_heads_checked, forward=survivor))
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
    "gradient: of the weights": ("1.2", lambda a, v, g: v @ g, "of the weights"),
    "gradient: no competition": ("1.2", lambda a, v, g: a * (v @ g), "weighted mean"),
    "gradient: diagonal": ("1.2", lambda a, v, g: a * (1 - a) * (v @ g), "only the diagonal"),
    "gradient: plain mean": ("1.2", lambda a, v, g: a * ((v - v.mean(0)) @ g), "not their plain mean"),
    "gradient: sign": ("1.2", lambda a, v, g: -gradient(a, v, g), "sign is wrong"),
    "gradient: no weight": ("1.2", lambda a, v, g: (v - a @ v) @ g, "a_j is missing"),
    "gradient: squared": ("1.2", lambda a, v, g: a * gradient(a, v, g), "too many"),
    "gradient: shape": ("1.2", lambda a, v, g: a[:, None] * (v - a @ v) * g, "shape (5,)"),
    "split: stub": ("1.3", lambda x, m: x.reshape(m, len(x), -1), "splits the tokens"),
    "split: not exchanged": ("1.3", lambda x, m: x.unflatten(1, (m, -1)), "swap them"),
    "split: interleaved": ("1.3", lambda x, m: x.unflatten(1, (-1, m)).permute(2, 0, 1), "every third channel"),
    "split: view of the transpose": ("1.3", lambda x, m: x.T.reshape(m, len(x), -1), "should be"),
    "split: shape": ("1.3", lambda x, m: x.unflatten(1, (m, -1)).permute(1, 2, 0), "shape (3, 5, 4)"),
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
    "mask: one mask only": ("1.4", lambda s, m: masked(s, m) if s.ndim == 2 else masked(s, m[:, 0, 0]), "must match"),
    "module: an object": ("1.5", MultiHeadAttention(12, 3), "the class itself"),
    "module: name": ("1.5", changed(__init__=renamed), "self.out"),
    "module: narrow": ("1.5", changed(__init__=narrow), "`value.weight` should have shape (12, 12)"),
    "module: no bias": ("1.5", changed(__init__=no_bias), "`key.bias` should have shape"),
    "module: dropout not stored": ("1.5", changed(__init__=forgetful), "self.dropout"),
    "module: biases": ("1.5", changed(__init__=plain), "biases with zeros"),
    "module: weights": ("1.5", changed(__init__=zero_biases), "xavier"),
    "module: any heads": ("1.5", changed(__init__=any_heads), "ValueError"),
    "module: detached": ("1.5", changed(forward=detached), "no gradient"),
    "module: mean of the heads": ("1.5", changed(weights=lambda *a: weigh(*a, average=True)), "mean over the heads"),
    "module: weights drop": ("1.5", changed(weights=lambda *a: weigh(*a, drop=True)), "only `forward`"),
    "module: weights unmasked": ("1.5", changed(weights=lambda *a: weigh(*a, hide=False)), "with a mask"),
    "module: NaN": ("1.5", changed(forward=by_hand), "all hidden gives NaN"),
    "module: NaN in gradients": ("1.5", changed(forward=nan_replaced), "gradients with NaN"),
    "module: drops in evaluation": ("1.5", changed(forward=drop_always), "evaluation mode"),
    "module: never drops": ("1.5", changed(forward=drop_never), "does nothing in training"),
    "module: drops the output": ("1.5", changed(forward=drop_output), "belongs on the weights"),
    "module: drops the values": ("1.5", changed(forward=drop_values), "applied to the values"),
    "module: drops the scores": ("1.5", changed(forward=drop_scores), "after the softmax"),
    "module: mask by query": ("1.5", changed(weights=mask_by_query), "axes of length 1"),
    "module: look": ("1.5", changed(look=None), "`look`"),
    "module: look without positions": (
        "1.5",
        changed(look=lambda self, q, m, reference_points=None: self(q, m.tokens, m.tokens, m.mask)),
        "`look`",
    ),
    **{f"module: {name}": ("1.5", wrong(name), said[:40]) for name, said in chapter_01.MISTAKES.items()},
}


@pytest.mark.parametrize(("number", "answer", "message"), WRONG.values(), ids=list(WRONG))
def test_mistakes_are_named(number, answer, message):
    assert message in said(number, answer)
