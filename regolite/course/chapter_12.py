"""Checkers of notebook 12: schedule, gradient clipping, resuming, diagnosis, gradient accumulation."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regolite.course import Mistake, close, exercise, same_shape
from regolite.data import Scenes, collate
from regolite.losses import SetLoss
from regolite.models.presets import build, configure
from regolite.types import ImageBatch, Target


@exercise(
    "12.1",
    "Multiply two factors: one for the warm-up, one for the drops. Compute each separately.",
    "The warm-up is min(1, (step + 1) / warm) if warm is not 0: the first step counts as one.",
    "The drops: 0.1 to the power of the number of drops at or before this step.",
)
def warm_up_and_drop(answer: Callable[[int, int, tuple[int, ...]], float]) -> str:
    """``answer(step, warm, drops)`` is the factor of the learning rate."""
    value = answer(0, 10, ())
    if not isinstance(value, (int, float)):
        raise Mistake(f"the factor should be a number, but is a {type(value).__name__}.")
    if value == 0:
        raise Mistake("the first step has the factor 0 and no effect: count step 0 as one step of the warm-up.")
    close("the factor of step 0 in a warm-up of 10 steps", value, 0.1)
    for step in (3, 9):
        close(f"the factor of step {step} in a warm-up of 10 steps", answer(step, 10, ()), (step + 1) / 10)
    if answer(25, 10, ()) > 1:
        raise Mistake("the factor keeps growing after the warm-up: it should stay at 1.")
    close("the factor after the warm-up, before any drop", answer(25, 10, (40,)), 1.0)
    close("the factor without a warm-up (warm = 0)", answer(0, 0, (40,)), 1.0)
    late = "the rate drops one step late: it should be divided by ten at step 40 already."
    close("the factor at the drop", answer(40, 10, (40,)), 0.1, but=late if answer(41, 10, (40,)) < 0.5 else "")
    close("the factor before the drop", answer(39, 10, (40,)), 1.0)
    again = "the second drop has no effect: every passed drop divides by ten."
    close(
        "the factor after two drops",
        answer(70, 10, (40, 60)),
        0.01,
        but=again if answer(70, 10, (40, 60)) > 0.05 else "",
    )
    close("the factor of a drop within the warm-up", answer(4, 10, (2,)), 0.05)
    return "Deformable DETR's recipe is this with warm = 0 and one drop, after 40 of 50 epochs."


def _two_weights(scale: float = 1.0) -> list[nn.Parameter]:
    """Two parameters with :func:`_two_gradients`, and one without a gradient."""
    parameters = [nn.Parameter(torch.zeros(n)) for n in (4, 2, 3)]
    for parameter, gradient in zip(parameters, _two_gradients(scale)):
        parameter.grad = gradient
    return parameters


def _two_gradients(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gradients of norm 4 and 3 (times ``scale``), 5 together."""
    return scale * torch.tensor([2.0, -2.0, 2.0, 2.0]), scale * torch.tensor([0.0, 3.0])


@exercise(
    "12.2",
    "All gradients together are one long vector. What is its norm?",
    "The squares of all entries of all gradients, summed, and the square root of that.",
    "Multiply every gradient by min(1, largest / norm), in place (`parameter.grad.mul_`); skip those that are None.",
)
def clip(answer: Callable[[list[nn.Parameter], float], Tensor]) -> str:
    """``answer(parameters, largest)`` clips the gradients in place and returns their previous norm."""
    weights = _two_weights()
    norm = answer(weights, 0.5)
    first, second = weights[0].grad, weights[1].grad
    if first is None or second is None or weights[2].grad is not None:
        raise Mistake(
            "gradients were removed or created: a parameter without a gradient keeps None, the others are scaled."
        )
    if isinstance(norm, (int, float)):
        norm = torch.tensor(float(norm))
    if not isinstance(norm, Tensor):
        raise Mistake("return the norm of the gradient before clipping: it is the first value to check if a run fails.")
    if math.isclose(float(first.norm()), 0.5, rel_tol=1e-3) and math.isclose(float(second.norm()), 0.5, rel_tol=1e-3):
        raise Mistake(
            "each tensor was clipped by its own norm, which changes the direction; use one norm of all gradients."
        )
    if float(first.abs().max()) == 0.5 and float(second.abs().max()) == 0.5:
        raise Mistake(
            "the values were clipped individually, which changes the direction; scale the gradient as a whole."
        )
    long, short = _two_gradients()
    if torch.equal(first, long):
        raise Mistake("the gradients are unchanged: change `parameter.grad` itself, in place.")
    close("the first gradient, of an overall norm of 5 clipped to 0.5,", first, long * 0.1, 1e-4)
    close("the second gradient, of an overall norm of 5 clipped to 0.5,", second, short * 0.1, 1e-4)
    after = "the norm is that after clipping, which is not informative; return the norm before."
    close("the norm before clipping", norm, 5.0, 1e-4, but=after if abs(float(norm) - 0.5) < 1e-3 else "")
    weights = _two_weights(0.01)
    answer(weights, 0.5)
    longer = "a gradient below the limit was made longer: clipping only shortens."
    close("a gradient of norm 0.05 under a limit of 0.5", weights[1].grad, _two_gradients(0.01)[1], 1e-6, but=longer)
    return "The gradient keeps its direction; only its norm is limited. This is `torch.nn.utils.clip_grad_norm_`."


class LittleRun:
    """A minimal training for exercise 12.3: a network with dropout, AdamW, images in random order.

    All random numbers come from PyTorch's global generator, as in most training scripts.

    Attributes:
        model: the network.
        optimizer: AdamW.
        step: number of completed steps; the learning rate depends on it.
    """

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.step = 0

    def train(self, steps: int) -> list[float]:
        """Run some steps and return their losses."""
        losses = []
        points = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
        self.model.train()
        for _ in range(steps):
            self.optimizer.param_groups[0]["lr"] = 1e-2 * 0.8**self.step
            batch = points[torch.randperm(len(points))[:8]]
            loss = (self.model(batch) - batch[:, :2].sin()).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
        return losses


def _flat(value: Any) -> list[Tensor]:
    """All tensors in nested dictionaries and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _flat(part)]


@exercise(
    "12.3",
    "What does a step depend on? The weights, the optimizer's moments, the step number, and random numbers.",
    "state_dict() returns the tensors that training keeps changing: copy.deepcopy preserves the current values.",
    "torch.get_rng_state() and torch.set_rng_state(state) save and restore the generator. Restore it last.",
)
def go_on(state_of: Callable[[LittleRun], dict], restore: Callable[[LittleRun, dict], None]) -> str:
    """``state_of(run)`` gives the state with which ``restore(other_run, state)`` continues exactly like ``run``."""
    whole = LittleRun()
    whole.train(3)
    weights, moments = (copy.deepcopy(part.state_dict()) for part in (whole.model, whole.optimizer))
    generator = torch.get_rng_state()
    state = state_of(whole)
    if not isinstance(state, dict) or not state:
        raise Mistake("state_of should return a dictionary with everything needed to resume the run.")
    if not torch.equal(generator, torch.get_rng_state()):
        raise Mistake("saving draws random numbers, which changes the rest of the saved run.")
    before = copy.deepcopy(state)
    wanted = whole.train(3)
    if any(not torch.equal(a, b) for a, b in zip(_flat(before), _flat(state))):
        raise Mistake(
            "the state changed while the run continued: state_dict() returns the tensors themselves, not copies. A "
            "state that is written later, or kept in memory, must be a copy."
        )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        state = torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        raise Mistake(
            "the state cannot be loaded with weights_only=True: store tensors, numbers and text, not objects such as "
            "the model itself."
        ) from None
    other = LittleRun(seed=1)
    restore(other, state)
    found = torch.get_rng_state()
    if any(not torch.equal(weights[name], value) for name, value in other.model.state_dict().items()):
        raise Mistake("the weights of the restored run are not the saved ones.")
    if not other.optimizer.state_dict()["state"]:
        raise Mistake(
            "the optimizer starts again: AdamW's moments are lost, and its next steps are as large as the first ones."
        )
    if any(
        not torch.equal(a, b) for a, b in zip(_flat(moments["state"]), _flat(other.optimizer.state_dict()["state"]))
    ):
        raise Mistake("AdamW's moments are not the saved ones.")
    if other.step != 3:
        raise Mistake(f"the restored run is at step {other.step}, not 3: its learning rate is wrong.")
    if not torch.equal(generator, found):
        raise Mistake("the state of the random generator is not restored: the image order and dropout differ.")
    if other.train(3) != wanted:
        raise Mistake("the steps of the restored run differ from those of the original one.")
    return "The losses are identical to the last bit. A checkpoint must contain the complete state of a run."


CAUSES = {
    "A": "part of the model not handed to the optimizer",
    "B": "learning rate too high",
    "C": "boxes in the wrong format",
    "D": "learning rate too low",
}
STRANGERS = ("frozen backbone", "dropout left on in the evaluation")
CLUES = {
    "A": "compare the curves of its decoders: do all of them decrease?",
    "B": "look at the first ten steps of its loss.",
    "C": "its loss decreases, but look at the AP on its own training images.",
    "D": "everything changes in the right direction, but how far?",
}


@exercise(
    "12.4",
    "One panel is enough for each run: the one with the largest difference to the healthy run.",
    "A loss above the initial one comes from steps that are too large. Parameters without updates keep their loss.",
    "A run that learns wrong targets has a low loss and AP 0. One that hardly changes keeps the initial loss.",
)
def diagnose(answer: dict[str, str]) -> str:
    """``answer`` gives the cause of each failed run."""
    if not isinstance(answer, dict) or set(answer) != set(CAUSES):
        raise Mistake(f"answer with a dictionary that has a cause for each of {', '.join(CAUSES)}.")
    known = {*CAUSES.values(), *STRANGERS}
    unknown = [run for run, cause in answer.items() if cause not in known]
    if unknown and any(answer[run] for run in unknown):
        raise Mistake(f"the cause of run {unknown[0]} is not one of the six: copy it from the list.")
    if unknown:
        raise Mistake(f"run {unknown[0]} has no diagnosis yet.")
    wrong = [run for run in sorted(CAUSES) if answer[run] != CAUSES[run]]
    if wrong:
        raise Mistake(f"this is not the cause of run {wrong[0]}: {CLUES[wrong[0]]}")
    return "By the total loss alone, A and C would have looked healthy."


Part = tuple[ImageBatch, list[Target]]


def _parts() -> tuple[nn.Module, SetLoss, list[Part]]:
    """A very small REGO, and scenes in two parts with different numbers of objects."""
    scenes = Scenes(12, seed=3, size=64, max_objects=7)
    config = configure(
        "rego_deformable_detr_scenes", dim=32, heads=4, queries=12,
        detector={"ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}, rego={"ffn_dim": 32, "stages": 1},
    )  # fmt: skip
    model = build(config, num_classes=len(scenes.classes)).train()
    items = sorted((scenes[i] for i in range(len(scenes))), key=lambda item: len(item[1]))
    chosen = [items[0], items[-2], items[-1]]
    return model, SetLoss(config.loss, "sigmoid"), [collate(chosen[:1], 32), collate(chosen[1:], 32)]


def _gradient(model: nn.Module) -> Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in grads])


@exercise(
    "12.5",
    "backward() adds to existing gradients: call zero_grad once, before the first part.",
    "The set loss divides by the number of objects. What would this number be if all parts were one batch?",
    "objects = sum(len(t) for _, targets in parts for t in targets), handed to set_loss(output, targets, objects).",
)
def accumulate(answer: Callable[[nn.Module, SetLoss, list[Part]], Any]) -> str:
    """``answer(model, set_loss, parts)`` accumulates the gradient of all parts as of one batch."""
    torch.manual_seed(0)
    model, set_loss, parts = _parts()
    targets = [target for _, part in parts for target in part]
    whole = ImageBatch(*(torch.cat([getattr(images, n) for images, _ in parts]) for n in ("pixels", "mask", "sizes")))

    def gradient(*losses: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        for loss in losses:
            loss().backward()
        return _gradient(model).clone()

    wanted = gradient(lambda: set_loss(model(whole), targets)[0])
    alone = [lambda part=part: set_loss(model(part[0]), part[1])[0] for part in parts]
    known = {
        "every part was divided by its own number of objects before the sum: divide by the number of all objects.": (
            gradient(*alone)
        ),
        "the mean of the parts' losses gives a part with few objects the same weight as one with many: divide by the "
        "number of objects of all parts.": gradient(*alone) / len(parts),
        "the gradient is that of the last part only: call zero_grad only before the first part.": gradient(alone[-1]),
    }
    number = float(len(targets))
    counts = [float(sum(len(target) for target in part)) for _, part in parts]
    known["the number of images is not the number of objects: the set loss divides by objects."] = gradient(
        *[lambda part=part: set_loss(model(part[0]), part[1], number)[0] for part in parts]
    )
    for parameter in model.parameters():  # previous gradients must not be part of the answer
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    answer(model, set_loss, parts)
    found = _gradient(model)
    same_shape("the gradient", found, wanted.shape)
    if torch.equal(found, torch.ones_like(found)):
        raise Mistake("the gradients are unchanged: nothing was computed.")
    if not found.any():
        raise Mistake("there is no gradient: call backward() on the loss of every part.")

    def like(other: Tensor) -> bool:
        return bool((found - other).norm() < 1e-3 * other.norm())

    if like(wanted):
        return f"Parts of {counts[0]:g} and {counts[1]:g} objects give the gradient of one batch with {sum(counts):g}."
    for message, other in known.items():
        if like(other):
            raise Mistake(message)
    if like(wanted + 1):
        raise Mistake("the previous gradients are included: call zero_grad before the first part.")
    off = float((found - wanted).norm() / wanted.norm())
    raise Mistake(f"the gradient differs from that of one batch by {off:.0%} of its norm.")
