"""The checkers of notebook 12 accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

import copy

import pytest
import torch

from regolite.course import Mistake, find


def says(number, *answer):
    """What the checker says to an answer, right or wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return find(number).checker(*answer)
        except Mistake as mistake:
            return str(mistake)


def right_factor(step, warm, drops):
    return (min(1.0, (step + 1) / warm) if warm else 1.0) * 0.1 ** sum(step >= drop for drop in drops)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (right_factor, "warm = 0 and one drop"),
        (lambda step, warm, drops: torch.tensor(0.1), "should be a number, but is a Tensor"),
        (lambda step, warm, drops: min(1.0, step / max(warm, 1)), "the first step has the factor 0"),
        (lambda step, warm, drops: (step + 1) / max(warm, 1), "keeps growing"),
        (lambda step, warm, drops: min(1.0, (step + 1) / max(warm, 1)), "factor at the drop should be 0.1000"),
        (
            lambda step, warm, drops: min(1.0, (step + 1) / max(warm, 1)) * 0.1 ** sum(step > drop for drop in drops),
            "one step late",
        ),
        (
            lambda step, warm, drops: (
                min(1.0, (step + 1) / max(warm, 1)) * (0.1 if any(step >= drop for drop in drops) else 1.0)
            ),
            "the second drop has no effect",
        ),
    ],
)
def test_schedule(answer, message):
    assert message in says("12.1", answer)


def clip(parameters, largest, limit=1.0, returned="before", grads=None):
    grads = grads or [p.grad for p in parameters if p.grad is not None]
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    for grad in grads:
        grad.mul_(min(limit, largest / norm))
    return norm if returned == "before" else min(norm, torch.tensor(largest))


def clip_each(parameters, largest):
    for parameter in parameters:
        if parameter.grad is not None:
            clip([parameter], largest)
    return torch.tensor(5.0)


def clip_values(parameters, largest):
    torch.nn.utils.clip_grad_value_(parameters, largest)
    return torch.tensor(5.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (clip, "keeps its direction"),
        (torch.nn.utils.clip_grad_norm_, "keeps its direction"),
        (lambda parameters, largest: float(clip(parameters, largest)), "keeps its direction"),
        (clip_each, "by its own norm"),
        (clip_values, "individually"),
        (lambda parameters, largest: torch.tensor(5.0), "the gradients are unchanged"),
        (lambda parameters, largest: clip(parameters, largest) and None, "return the norm"),
        (lambda parameters, largest: clip(parameters, largest, returned="after"), "that after clipping"),
        (lambda parameters, largest: clip(parameters, largest, limit=1e9), "only shortens"),
        (lambda parameters, largest: [p.__setattr__("grad", None) for p in parameters], "removed or created"),
    ],
)
def test_clipping(answer, message):
    assert message in says("12.2", answer)


def state_of(run, leave_out=(), copied=True):
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "random": torch.get_rng_state(),
    }
    state = {name: value for name, value in state.items() if name not in leave_out}
    return copy.deepcopy(state) if copied else state


def restore(run, state):
    run.model.load_state_dict(state["model"])
    if "optimizer" in state:
        run.optimizer.load_state_dict(state["optimizer"])
    run.step = state.get("step", 0)
    if "random" in state:
        torch.set_rng_state(state["random"])


def drawing(run):
    torch.rand(1)
    return state_of(run)


@pytest.mark.parametrize(
    ("saved", "restored", "message"),
    [
        (state_of, restore, "to the last bit"),
        (lambda run: state_of(run, copied=False), restore, "not copies"),
        (lambda run: state_of(run, ["optimizer"]), restore, "AdamW's moments are lost"),
        (lambda run: state_of(run, ["step"]), restore, "at step 0, not 3"),
        (lambda run: state_of(run, ["random"]), restore, "random generator"),
        (state_of, lambda run, state: None, "weights of the restored run"),
        (lambda run: {"model": copy.deepcopy(run.model)}, restore, "weights_only=True"),
        (lambda run: None, restore, "should return a dictionary"),
        (drawing, restore, "saving draws"),
    ],
)
def test_going_on(saved, restored, message):
    assert message in says("12.3", saved, restored)


DIAGNOSIS = {
    "A": "part of the model not handed to the optimizer",
    "B": "learning rate too high",
    "C": "boxes in the wrong format",
    "D": "learning rate too low",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "would have looked healthy"),
        ({"A": "frozen backbone"}, "do all of them decrease?"),
        ({"B": "learning rate too low"}, "first ten steps"),
        ({"C": "learning rate too low"}, "AP on its own training images"),
        ({"D": "learning rate too high"}, "how far?"),
        ({"D": ""}, "no diagnosis yet"),
        ({"D": "flu"}, "not one of the six"),
        ({"E": "flu"}, "a cause for each of A, B, C, D"),
    ],
)
def test_diagnosis(changes, message):
    assert message in says("12.4", DIAGNOSIS | changes)


def accumulate(model, set_loss, parts, zero=True, divisor=None, each=False, mean=False):
    targets = [target for _, part in parts for target in part]
    objects = divisor or float(sum(len(target) for target in targets))
    if zero:
        model.zero_grad()
    for images, part in parts:
        if each:
            model.zero_grad()
        loss, _ = set_loss(model(images), part, None if mean is not False else objects)
        (loss / (mean or 1)).backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give the gradient of one batch"),
        ({"mean": None}, "before the sum"),
        ({"mean": 2}, "the same weight as one with many"),
        ({"each": True, "mean": None}, "the last part only"),
        ({"divisor": 3.0}, "number of images is not the number of objects"),
        ({"zero": False}, "the previous gradients are included"),
        ({"divisor": 7.7}, "differs from that of one batch by"),
    ],
)
def test_accumulating(changes, message):
    assert message in says("12.5", lambda *given: accumulate(*given, **changes))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda model, set_loss, parts: None, "nothing was computed"),
        (lambda model, set_loss, parts: model.zero_grad(), "call backward()"),
    ],
)
def test_accumulating_nothing(answer, message):
    assert message in says("12.5", answer)
