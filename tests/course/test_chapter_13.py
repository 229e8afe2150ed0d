"""The checkers of notebook 13 accept right answers and name what is wrong with the others."""

from contextlib import contextmanager

import pytest
import torch

from regolite.course import Mistake, find
from regolite.evaluation.removal import without


def unmasked(module, query, key, mask=None):
    return module.weights(query, key)


def masked(module, query, key, mask=None):
    return module.weights(query, key, mask)


def cell(x, y, level, original, sizes, shapes, strides):
    column, row = int(x * sizes[1] / original[1] / strides[level]), int(y * sizes[0] / original[0] / strides[level])
    return sum(h * w for h, w in shapes[:level]) + row * shapes[level][1] + column


def stretched(x, y, level, original, sizes, shapes, strides):
    rows, columns = shapes[level]
    start = sum(h * w for h, w in shapes[:level])
    return start + int(y / original[0] * rows) * columns + int(x / original[1] * columns)


def entropy(weights):
    return torch.special.entr(weights).sum(-1)


def evenly(weights):
    return entropy(weights).exp(), entropy(weights.mean(0)).exp()


def gather(weights, owner, count):
    return torch.zeros(count + 1).index_add_(0, owner.where(owner >= 0, count), weights)


def needed(ask, scene, ball):
    others = [k for k in range(len(scene.things)) if k != ball]
    return min(others, key=lambda k: ask(without(scene, k)))


def others_of(scene, ball):
    return [k for k in range(len(scene.things)) if k != ball]


@contextmanager
def even(attention):
    kept = [p.detach().clone() for p in attention.query.parameters()]
    with torch.no_grad():
        [p.zero_() for p in attention.query.parameters()]
        try:
            yield
        finally:
            [p.copy_(old) for p, old in zip(attention.query.parameters(), kept)]


@contextmanager
def even_by_keys(attention):
    kept = {name: tensor.clone() for name, tensor in attention.key.state_dict().items()}
    with torch.no_grad():
        attention.key.weight.zero_()  # then all keys are the same, whatever the bias
        try:
            yield
        finally:
            attention.key.load_state_dict(kept)


def zeroing(*names, finally_=True, back=True):
    @contextmanager
    def context(attention):
        tensors = [attention.get_parameter(name).data for name in names]
        kept = [tensor.clone() for tensor in tensors]
        [tensor.zero_() for tensor in tensors]

        def restore():
            [tensor.copy_(old) for tensor, old in zip(tensors, kept)]

        try:
            yield
        except KeyError:
            if finally_:
                restore()
            raise
        else:
            if back:
                restore()

    return context


@contextmanager
def swallowing(attention):
    try:
        with even(attention):
            yield
    except KeyError:
        pass


@contextmanager
def nothing(attention):
    yield


RIGHT = {
    "13.1": [masked],
    "13.2": [cell],
    "13.3": [evenly],
    "13.4": [gather],
    "13.5": [needed],
    "13.6": [even, even_by_keys, zeroing("query.weight", "query.bias")],
}


@pytest.mark.parametrize(("number", "answer"), [(n, a) for n, right in RIGHT.items() for a in right])
def test_right(number, answer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("13.1", unmasked, "has no effect"),
        (
            "13.1",
            lambda m, q, k, mask: unmasked(m, q, k) if mask is None else unmasked(m, q, k) * ~mask[:, None, None],
            "do not sum to 1",
        ),
        ("13.1", lambda m, q, k, mask: m.weights(q, k, None if mask is None else ~mask), "the mask is inverted"),
        ("13.1", lambda m, q, k, mask: masked(m, q, k, mask) + 1e-9, "a small weight"),
        ("13.1", lambda m, q, k, mask: masked(m, q, k, mask).mean(1), "should have shape"),
        ("13.2", stretched, "stretched"),
        ("13.2", lambda *a: cell(*a) - sum(h * w for h, w in a[5][: a[2]]), "relative to its level"),
        ("13.2", lambda *a: float(cell(*a)), "should be an int"),
        ("13.2", lambda x, y, level, original, sizes, *a: cell(x, y, level, original, original, *a), "resizing"),
        ("13.3", lambda w: (entropy(w), entropy(w.mean(0))), "in nats"),
        ("13.3", lambda w: (-(w * w.log()).sum(-1).exp(), entropy(w.mean(0)).exp()), "NaN"),
        ("13.3", lambda w: (entropy(w).exp(), entropy(w).exp().mean()), "a mean over heads"),
        ("13.3", lambda w: (entropy(w) / torch.tensor(2.0).log(), entropy(w).mean()), "in bits"),
        ("13.3", lambda w: entropy(w).exp(), "a pair"),
        ("13.4", lambda w, o, n: torch.zeros(n).index_add_(0, o.clamp(min=0), w), "assigned to object 0"),
        ("13.4", lambda w, o, n: gather(w, o, n)[:-1], "comes last"),
        ("13.4", lambda w, o, n: gather(w, o, n).roll(1), "comes first here"),
        ("13.4", lambda w, o, n: gather(w, o, n) / gather(torch.ones(8), o, n).clamp(min=1), "take the sum"),
        ("13.5", lambda ask, s, b: b, "the ball itself"),
        ("13.5", lambda ask, s, b: min(range(len(s.things)), key=lambda k: ask(without(s, k))), "the ball itself"),
        ("13.5", lambda ask, s, b: max(others_of(s, b), key=lambda k: ask(without(s, k))), "needed least"),
        ("13.5", lambda ask, s, b: others_of(s, b).index(needed(ask, s, b)), "index among the others|needed most"),
        ("13.5", lambda ask, s, b: s.things[b].decider, "may need another"),
        ("13.5", lambda ask, s, b: None, "an int"),
        ("13.6", nothing, "output is unchanged"),
        ("13.6", zeroing("query.weight"), "and bias"),
        ("13.6", zeroing("value.weight", "value.bias"), "values are 0"),
        ("13.6", zeroing("query.weight", "query.bias", back=False), "not restored"),
        ("13.6", zeroing("query.weight", "query.bias", finally_=False), "after an exception"),
        ("13.6", swallowing, "suppresses"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
