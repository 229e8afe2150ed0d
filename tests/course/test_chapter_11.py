"""The checkers of notebook 11 accept right answers and name what is wrong with the others."""

import pytest
import torch

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, find


def correct(boxes, change):
    return (inverse_sigmoid(boxes) + change).sigmoid()


def infinite(boxes, change):
    return (torch.log(boxes / (1 - boxes)) + change + 0 * torch.log(boxes)).sigmoid()


def run_stages(stages, features, sizes, hidden, boxes, detach=True, layer=-1, cut=False, stuck=False, returned=None):
    found = []
    for stage in stages:
        given = boxes.detach() if detach else boxes
        predictions, hidden = stage(features, sizes, hidden.detach() if cut else hidden, given)
        found.append(predictions)
        boxes = boxes if stuck else predictions[layer].boxes
    return (found, hidden) if returned is None else returned


def loop(**changes):
    return lambda *inputs: run_stages(*inputs, **changes)


def width(number, dim, layers=2):
    return (number + layers * (number + 1)) * dim * dim


def most_related(weights, k):
    mean = weights.mean(0)
    mean.fill_diagonal_(float("-inf"))
    return mean.topk(k, dim=1).indices


def alter(weights, k):
    weights[:, range(9), range(9)] = -1
    return weights.mean(0).topk(k, dim=1).indices


def with_alphas(model, images, alphas, restore=True, backward=False, grad=False):
    trained = [stage.alpha for stage in model.stages]
    for stage, alpha in zip(model.stages, alphas[::-1] if backward else alphas):
        stage.alpha = alpha
    with torch.set_grad_enabled(grad):
        output = model(images)
    if restore:
        for stage, alpha in zip(model.stages, trained):
            stage.alpha = alpha
    return output


RIGHT = {"11.1": correct, "11.2": run_stages, "11.3": width, "11.4": most_related, "11.5": with_alphas}


@pytest.mark.parametrize(("number", "answer"), RIGHT.items(), ids=RIGHT)
def test_right(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        ("11.1", lambda b, c: b, "change is not used"),
        ("11.1", lambda b, c: b + c, "leave the image"),
        ("11.1", lambda b, c: (b + c).clamp(0, 1), "has no gradient at both ends"),
        ("11.1", lambda b, c: (b + c).sigmoid(), "0.5 would become 0.62"),
        ("11.1", lambda b, c: b + c.sigmoid(), "has no meaning"),
        ("11.1", lambda b, c: inverse_sigmoid(b) + c, "still logits"),
        ("11.1", lambda b, c: correct(b, c.detach()), "no gradient"),
        ("11.1", infinite, "infinity"),
        ("11.2", loop(layer=0), "gets those of its first"),
        ("11.2", loop(detach=False), "not detached"),
        ("11.2", loop(stuck=True), "those of the base detector"),
        ("11.2", loop(cut=True), "hidden states were detached"),
        ("11.2", loop(returned=([], None)), "list of each stage's predictions"),
        ("11.2", loop(returned=1), "a pair"),
        ("11.2", lambda stages, *inputs: run_stages(stages[:2], *inputs), "not every stage"),
        ("11.3", lambda n, d, k=2: d * d, "does not depend on the stage"),
        ("11.3", lambda n, d, k=2: n * d * d, "`fuse` layers"),
        ("11.3", lambda n, d, k=2: k * (n + 1) * d * d, "`condense`, which reads"),
        ("11.3", lambda n, d, k=2: (2 * n + 1) * d * d, "for every decoder layer"),
        ("11.3", lambda n, d, k=2: (n + k * n) * d * d, "reads H_dec"),
        ("11.3", lambda n, d, k=2: width(n, d, k) + (k + 1) * d, "no bias"),
        ("11.3", lambda n, d, k=2: 7, "not 7"),
        ("11.3", lambda n, d, k=2: None, "should be a number"),
        ("11.4", lambda w, k: torch.zeros(9, k, dtype=torch.long), "there is no answer yet"),
        ("11.4", lambda w, k: w.mean(0).topk(k, dim=1).indices, "related to itself"),
        ("11.4", lambda w, k: most_related(w.transpose(1, 2), k), "that attend to a query"),
        ("11.4", lambda w, k: most_related(w[:1], k), "only the first head"),
        ("11.4", lambda w, k: most_related(w.amax(0, keepdim=True), k), "maximum over the heads"),
        ("11.4", lambda w, k: most_related(w, k).flip(1), "largest weight first"),
        ("11.4", lambda w, k: most_related(w, k + 1), "should have shape"),
        ("11.4", alter, "changes its input weights"),
        ("11.5", lambda m, i, a: with_alphas(m, i, [s.alpha for s in m.stages]), "ratios of the training"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, backward=True), "wrong order"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, restore=False), "still has the ratios"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a, grad=True), "no_grad"),
        ("11.5", lambda m, i, a: with_alphas(m, i, a).final, "DetectorOutput"),
    ],
)
def test_wrong(number, answer, said):
    with torch.random.fork_rng(), pytest.raises(Mistake, match=said):
        torch.manual_seed(0)
        find(number).checker(answer)
