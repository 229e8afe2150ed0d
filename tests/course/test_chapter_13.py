"""The checkers of notebook 13 accept right answers and name what is wrong with the others."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from regolite.course import Mistake, find
from regolite.evaluation.removal import without


def recorder(weights=lambda m, q, k, mask: m.weights(q, k, mask), detach=True, finally_=True, remove=True, output=None):
    """A recorder with chosen faults."""

    @contextmanager
    def watch(attention):
        seen = []

        def see(module, inputs, out):
            found = weights(module, inputs[0], inputs[1], inputs[3] if len(inputs) > 3 else None)
            seen.append(found.detach() if detach else found)
            return output

        handle = attention.register_forward_hook(see)
        try:
            yield seen
        except KeyError:
            if finally_:
                handle.remove()
            raise
        if remove:
            handle.remove()

    return watch


def split(module, *inputs):
    return [x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in inputs]


def scored(scale=lambda q, c: q.shape[-1] ** 0.5, dim=-1):
    def weights(module, query, key, mask):
        q, k = split(module, module.query(query), module.key(key))
        scores = q @ k.mT / scale(q, query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], float("-inf"))
        return scores.softmax(dim) if dim is not None else scores

    return weights


@contextmanager
def forgetful(attention):
    seen = [None]
    with recorder()(attention) as all_seen:
        yield seen
    seen[:] = all_seen[-1:]


@contextmanager
def hushed(attention):
    try:
        with recorder()(attention) as seen:
            yield seen
    except KeyError:
        pass


@contextmanager
def nothing_recorded(attention):
    yield None


def cell(x, y, level, original, sizes, shapes, strides):
    column, row = int(x * sizes[1] / original[1] / strides[level]), int(y * sizes[0] / original[0] / strides[level])
    return sum(h * w for h, w in shapes[:level]) + row * shapes[level][1] + column


def stretched(x, y, level, original, sizes, shapes, strides):
    rows, columns = shapes[level]
    start = sum(h * w for h, w in shapes[:level])
    return start + int(y / original[0] * rows) * columns + int(x / original[1] * columns)


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


def study(parts, measure, images, switch_off, samples=2000, seed=0, **faults):
    """An ablation harness with chosen faults."""
    before = measure()
    images = torch.as_tensor(images)
    found = {}
    for name, modules in parts.items():
        with ExitStack() as stack:
            for module in modules if not faults.get("first_only") else modules[:1]:
                stack.enter_context(switch_off(module))
            after = measure()
        change = (before - after) if faults.get("sign") else after - before
        if faults.get("unpaired"):
            draws = torch.randint(len(change), (2, samples, len(change)))
            means = after[draws[0]].mean(1) - before[draws[1]].mean(1)
        else:
            units = torch.arange(len(images)) if faults.get("balls") else images
            own = [(units == unit).nonzero()[:, 0] for unit in units.unique()]
            sums, counts = torch.stack([change[k].sum() for k in own]), torch.tensor([float(len(k)) for k in own])
            drawn = torch.randint(len(own), (samples, len(own)), generator=torch.Generator().manual_seed(seed))
            means = sums[drawn].sum(1) / counts[drawn].sum(1)
            if faults.get("image_means"):
                means = (sums / counts)[drawn].mean(1)
        mean = change.mean()
        if faults.get("by_image"):
            mean = torch.stack([change[images == image].mean() for image in images.unique()]).mean()
        ends = means.quantile(torch.tensor(faults.get("ends", [0.025, 0.975]))).tolist()
        found[name] = (float(mean), *ends)
    if not faults.get("trusting") and not torch.equal(measure(), before):
        raise RuntimeError("not restored")
    return found


def faulty(**faults):
    return lambda *arguments: study(*arguments, **faults)


def one_by_one(parts, measure, images, switch_off):
    """Modules of a part are switched off in turn, and their effects added."""
    found, before = {}, measure()
    for name, modules in parts.items():
        change = 0
        for module in modules:
            with switch_off(module):
                change = change + measure() - before
        found[name] = (float(change.mean()), float(change.mean()) - 0.1, float(change.mean()) + 0.1)
    if not torch.equal(measure(), before):
        raise RuntimeError("not restored")
    return found


def without_with(parts, measure, images, switch_off):
    for modules in parts.values():
        contexts = [switch_off(module) for module in modules]
        [context.__enter__() for context in contexts]
        measure()
        [context.__exit__(None, None, None) for context in contexts]
    return study(parts, measure, images, switch_off)


def piled_up(parts, measure, images, switch_off):
    with ExitStack() as stack:
        for modules in parts.values():
            [stack.enter_context(switch_off(module)) for module in modules]
            measure()
    return study(parts, measure, images, switch_off)


def overwrite(weights, owner, count):
    found = torch.zeros(count + 1)
    found[owner.where(owner >= 0, count)] = weights
    return found


RIGHT = {
    "13.1": [recorder(), recorder(scored())],
    "13.2": [cell],
    "13.3": [gather],
    "13.4": [needed],
    "13.5": [even, even_by_keys, zeroing("query.weight", "query.bias")],
    "13.6": [study],
}


@pytest.mark.parametrize(("number", "answer"), [(n, a) for n, right in RIGHT.items() for a in right])
def test_right(number, answer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("13.1", nothing_recorded, "should give a list"),
        ("13.1", forgetful, "three elements"),
        ("13.1", recorder(output=torch.zeros(2, 5, 32)), "a hook that returns a value"),
        ("13.1", recorder(lambda m, q, k, mask: m.weights(q, k)), "has no effect"),
        (
            "13.1",
            recorder(lambda m, q, k, mask: m.weights(q, k) * (1 if mask is None else ~mask[:, None, None])),
            "do not sum to 1",
        ),
        ("13.1", recorder(lambda m, q, k, mask: m.weights(q, k, None if mask is None else ~mask)), "mask is inverted"),
        ("13.1", recorder(lambda m, q, k, mask: m.weights(q, k, mask) + (0 if mask is None else 1e-9)), "small weight"),
        ("13.1", recorder(lambda m, q, k, mask: m.weights(q, k, mask).mean(1)), "heads are averaged"),
        ("13.1", recorder(scored(lambda q, c: 1.0)), "not divided by the square root"),
        ("13.1", recorder(scored(lambda q, c: c**0.5)), "not of C"),
        ("13.1", recorder(scored(dim=-2)), "runs over the queries"),
        ("13.1", recorder(scored(dim=None)), "softmax is missing"),
        ("13.1", recorder(lambda m, q, k, mask: m.weights(k, q)), "queries and keys are swapped"),
        ("13.1", recorder(detach=False), "detach them"),
        ("13.1", recorder(remove=False), "a call is still recorded"),
        ("13.1", recorder(finally_=False), "after an exception inside, the hook stays"),
        ("13.1", hushed, "suppresses"),
        ("13.2", stretched, "stretched"),
        ("13.2", lambda *a: cell(*a) - sum(h * w for h, w in a[5][: a[2]]), "relative to its level"),
        ("13.2", lambda *a: float(cell(*a)), "should be an int"),
        ("13.2", lambda x, y, level, original, sizes, *a: cell(x, y, level, original, original, *a), "resizing"),
        ("13.2", lambda x, y, *a: cell(y, x, *a), "wrong cell|swapped"),
        ("13.2", lambda *a: cell(*a) + 1, "wrong cell"),
        ("13.3", lambda w, o, n: torch.zeros(n).index_add_(0, o.clamp(min=0), w), "assigned to object 0"),
        ("13.3", lambda w, o, n: gather(w, o, n)[:-1], "comes last"),
        ("13.3", lambda w, o, n: gather(w, o, n).roll(1), "comes first here"),
        ("13.3", lambda w, o, n: gather(w, o, n) / gather(torch.ones(8), o, n).clamp(min=1), "take the sum"),
        ("13.3", overwrite, "add them up"),
        ("13.3", lambda w, o, n: gather(w.where(o >= 0, 0.0), o, n), "are dropped"),
        ("13.4", lambda ask, s, b: b, "the ball itself"),
        ("13.4", lambda ask, s, b: min(range(len(s.things)), key=lambda k: ask(without(s, k))), "the ball itself"),
        ("13.4", lambda ask, s, b: max(others_of(s, b), key=lambda k: ask(without(s, k))), "needed least"),
        ("13.4", lambda ask, s, b: others_of(s, b).index(needed(ask, s, b)), "index among the others|needed most"),
        ("13.4", lambda ask, s, b: s.things[b].decider, "may need another"),
        ("13.4", lambda ask, s, b: None, "an int"),
        ("13.5", nothing, "output is unchanged"),
        ("13.5", zeroing("query.weight"), "and bias"),
        ("13.5", zeroing("value.weight", "value.bias"), "values are 0"),
        ("13.5", zeroing("query.weight", "query.bias", back=False), "not restored"),
        ("13.5", zeroing("query.weight", "query.bias", finally_=False), "after an exception"),
        ("13.5", swallowing, "suppresses"),
        ("13.6", lambda *a: {}, "entry for each part"),
        ("13.6", lambda *a: {name: mean for name, (mean, *_) in study(*a).items()}, "three numbers"),
        ("13.6", faulty(sign=True), "sign is wrong"),
        ("13.6", faulty(first_only=True), "off together"),
        ("13.6", one_by_one, "one after another"),
        ("13.6", piled_up, "at the same time"),
        ("13.6", faulty(by_image=True), "every ball counts alike"),
        ("13.6", faulty(image_means=True), "resampled means are taken over images"),
        ("13.6", faulty(balls=True), "resample whole images"),
        ("13.6", faulty(unpaired=True), "paired differences"),
        ("13.6", faulty(ends=[0.05, 0.95]), "90 % interval"),
        ("13.6", faulty(ends=[0.975, 0.025]), "low comes first"),
        ("13.6", faulty(trusting=True), "did not notice"),
        ("13.6", without_with, "stay switched off"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
