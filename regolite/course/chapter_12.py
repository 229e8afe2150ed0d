"""Checkers of notebook 12: schedule, gradient clipping, accumulation, the training step, failed runs, resuming."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regolite.course import Mistake, close, exercise, same_shape
from regolite.data import Scenes, collate
from regolite.losses import SetLoss
from regolite.models.presets import build, configure
from regolite.types import ImageBatch, Target

Part = tuple[ImageBatch, list[Target]]
"""A part of a batch: images and their objects."""


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
    "12.3",
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


def train_step(
    model: nn.Module,
    set_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    factor: float = 1.0,
    max_norm: float = 0.1,
) -> dict[str, Any]:
    """One step of the optimizer, exercise 12.4.

    Args:
        model: the detector.
        set_loss: the loss, as :class:`regolite.losses.SetLoss`.
        optimizer: its parameter groups have ``base_lr``.
        parts: the batch in parts that are processed one after another.
        factor: of the learning rates.
        max_norm: maximum norm of the gradient.

    Returns:
        ``loss``, ``terms`` by name, ``lr`` of the last group, and ``gradient_norm`` before clipping, all as floats.

    Raises:
        FloatingPointError: a term of the loss is infinite or NaN; no weight has changed.
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    objects = float(sum(len(target) for _, targets in parts for target in targets))
    optimizer.zero_grad()
    total, sums = 0.0, Counter[str]()
    for images, targets in parts:
        loss, terms = set_loss(model(images), targets, objects)
        numbers = {name: term.item() for name, term in terms.items()}
        if bad := [name for name, number in numbers.items() if not math.isfinite(number)]:
            raise FloatingPointError(f"not finite: {', '.join(bad)}")
        loss.backward()
        total += loss.item()
        sums.update(numbers)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    lr = optimizer.param_groups[-1]["lr"]
    return {"loss": total, "terms": dict(sums), "lr": lr, "gradient_norm": norm.item()}


STEP_FLAWS = {
    "no factor": "the learning rate is not scaled: each group's lr is its base_lr times factor.",
    "factor squared": "the factor is applied to the current lr, so factors multiply from step to step: start from "
    "base_lr.",
    "first rate": "all groups have the same learning rate: each has a base_lr of its own.",
    "last rate": "all groups have the same learning rate: each has a base_lr of its own.",
    "own objects": "every part is divided by its own number of objects: count those of all parts first.",
    "mean of parts": "the mean of the parts' losses gives a part with few objects the same weight as one with many.",
    "divided": "the loss is divided by the number of parts; each part is already divided by the objects of the batch.",
    "last part": "only the last part has an effect: zero_grad belongs before the loop over the parts.",
    "first part": "only the first part has an effect: loop over all parts before the optimizer's step.",
    "old gradients": "gradients of earlier steps are included: call zero_grad at the beginning.",
    "no clipping": "the gradient is not clipped to max_norm, or only after the step, when it has no effect any more.",
    "fixed clipping": "the gradient is clipped to 0.1 whatever max_norm is.",
    "clipped parts": "the gradient is clipped after every part, so that every part counts the same: clip once.",
    "clipped tensors": "each tensor is clipped by its own norm, which changes the direction of the gradient.",
    "clipped values": "values are clipped individually, which changes the direction of the gradient.",
    "step per part": "the optimizer steps after every part: one step belongs to the whole batch.",
    "no step": "the weights are unchanged: call the optimizer's step.",
}


STEP_FACTOR = 0.6
"""Of the learning rates in the trial of a step: no factor of the number of parts."""


def _flawed_step(
    model: nn.Module,
    set_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    factor: float,
    max_norm: float,
    flaw: str,
) -> None:
    """A training step with a flaw of :data:`STEP_FLAWS`."""
    for n, group in enumerate(optimizer.param_groups):
        base = optimizer.param_groups[{"first rate": 0, "last rate": -1}.get(flaw, n)]["base_lr"]
        scale = {"no factor": 1.0, "factor squared": factor**2}.get(flaw, factor)
        group["lr"] = base * scale
    objects: float | None = float(sum(len(target) for _, targets in parts for target in targets))
    parameters = list(model.parameters())
    if flaw != "old gradients":
        optimizer.zero_grad()
    for n, (images, targets) in enumerate(parts):
        if flaw == "last part":
            optimizer.zero_grad()
        loss, _ = set_loss(model(images), targets, None if flaw in ("own objects", "mean of parts") else objects)
        (loss / (len(parts) if flaw in ("mean of parts", "divided") else 1)).backward()
        if flaw == "clipped parts" or flaw == "step per part":
            nn.utils.clip_grad_norm_(parameters, max_norm)
        if flaw == "step per part" and n < len(parts) - 1:
            optimizer.step()
            optimizer.zero_grad()
        if flaw == "first part":
            break
    if flaw == "clipped tensors":
        for parameter in parameters:
            nn.utils.clip_grad_norm_([parameter], max_norm)
    elif flaw == "clipped values":
        nn.utils.clip_grad_value_(parameters, max_norm)
    elif flaw not in ("no clipping", "clipped parts"):
        nn.utils.clip_grad_norm_(parameters, 0.1 if flaw == "fixed clipping" else max_norm)
    if flaw != "no step":
        optimizer.step()


class _Trial:
    """A model and an optimizer for one attempt, always with the same initial weights."""

    def __init__(self, model: nn.Module, lr: float = 1.0) -> None:
        self.model = copy.deepcopy(model).eval()
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "rest": []}
        for name, parameter in self.model.named_parameters():
            groups["backbone" if "backbone." in name else "rest"].append(parameter)
            parameter.grad = torch.full_like(parameter, 0.5)
        rates = {"backbone": 0.1 * lr, "rest": lr}
        self.optimizer = torch.optim.SGD(
            [{"params": p, "lr": rates[n], "base_lr": rates[n], "name": n} for n, p in groups.items()], lr=lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 0.6 * group["base_lr"]  # as an earlier step has left it
        self.before = self.weights()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    @property
    def moved(self) -> Tensor:
        return self.weights() - self.before


def _like(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 1e-3 * other.norm())


@functools.cache
def _flawed_move(flaw: str, lr: float, max_norm: float) -> Tensor:
    """How a step with a flaw moves the weights in the trial of :func:`step`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, set_loss, parts = _parts()
    trial = _Trial(model, lr)
    _flawed_step(trial.model, set_loss, trial.optimizer, parts, STEP_FACTOR, max_norm, flaw)
    return trial.moved


def _name_flaw(moved: Tensor, lr: float, max_norm: float) -> None:
    """Raise the Mistake whose step moves the weights like the answer's."""
    if not moved.any():
        raise Mistake(STEP_FLAWS["no step"])
    for flaw, message in STEP_FLAWS.items():
        if _like(moved, _flawed_move(flaw, lr, max_norm)):
            raise Mistake(message)
    raise Mistake(
        "the weights do not move as they should. Compare with the five steps: rates, objects, backward of all parts, "
        "clipping, one step."
    )


@exercise(
    "12.4",
    "The order is: mode, learning rates, zero_grad, forward and backward of all parts, clip, step, numbers.",
    "The objects of all parts are counted before the first backward; set_loss takes the count as third argument.",
    "term.item() is a number without a graph. Test the numbers with math.isfinite before backward, and raise "
    "FloatingPointError with the names of the bad terms.",
)
def step(answer: Callable[..., Any]) -> str:
    """``answer(model, set_loss, optimizer, parts, factor, max_norm)``: the function :func:`train_step`."""
    torch.manual_seed(0)
    model, set_loss, parts = _parts()
    for lr, max_norm in ((1e-3, 1e9), (1.0, 0.03)):  # without and with clipping, which hides the gradient's scale
        arguments = (parts, STEP_FACTOR, max_norm)
        wanted, own = _Trial(model, lr), _Trial(model, lr)
        modes: list[bool] = []
        own.model.register_forward_pre_hook(lambda module, _, modes=modes: modes.append(module.training))
        metrics = train_step(wanted.model, set_loss, wanted.optimizer, *arguments)
        found = answer(own.model, set_loss, own.optimizer, *arguments)
        if not modes:
            raise Mistake("the model was not called.")
        if not all(modes):
            raise Mistake(
                "the model is in evaluation mode: call model.train(), since an evaluation may have come before."
            )
        if not _like(own.moved, wanted.moved):
            _name_flaw(own.moved, lr, max_norm)
    _check_metrics(found, metrics)
    _check_default(answer, model, set_loss, parts)
    _check_not_finite(answer, model, set_loss, parts)
    return "This step trains REGO: every run of this chapter goes through it."


def _check_metrics(found: Any, wanted: Mapping[str, Any]) -> None:
    """The returned numbers."""
    if not isinstance(found, dict) or set(found) != set(wanted):
        raise Mistake("return a dictionary with loss, terms, lr and gradient_norm.")
    if not isinstance(found["terms"], dict) or set(found["terms"]) != set(wanted["terms"]):
        raise Mistake("terms should be a dictionary with the names of the loss's terms.")
    numbers = {**found["terms"], **{name: found[name] for name in ("loss", "lr", "gradient_norm")}}
    if any(not isinstance(number, float) for number in numbers.values()):
        raise Mistake(
            "the numbers should be floats: a tensor that is kept in a log keeps its graph, and memory grows with every "
            "step. Use item()."
        )
    for name, number in {**wanted["terms"], **{n: wanted[n] for n in ("loss", "lr", "gradient_norm")}}.items():
        if not math.isclose(numbers[name], number, rel_tol=1e-3, abs_tol=1e-6):
            said = {
                "loss": "the loss is not that of the whole batch: add up the losses of the parts.",
                "lr": "lr is not that of the last group at this step.",
                "gradient_norm": "gradient_norm is not the norm before clipping: after it, a growing gradient is "
                "invisible.",
            }
            raise Mistake(said.get(name, f"the term {name} is not the sum over the parts."))


def _check_default(answer: Callable[..., Any], model: nn.Module, set_loss: SetLoss, parts: list[Part]) -> None:
    """Two more steps, with the defaults of factor and max_norm."""
    wanted, own = _Trial(model, 1e-3), _Trial(model, 1e-3)
    for _ in range(2):
        train_step(wanted.model, set_loss, wanted.optimizer, parts)
        answer(own.model, set_loss, own.optimizer, parts)
    if (own.moved - wanted.moved).norm() > 1e-2 * wanted.moved.norm():
        raise Mistake(
            "two steps with the defaults, factor=1.0 and max_norm=0.1, do not move the weights as they should."
        )


def _check_not_finite(answer: Callable[..., Any], model: nn.Module, set_loss: SetLoss, parts: list[Part]) -> None:
    """A term that is not finite must stop the run before it reaches the weights."""
    for value in (math.nan, math.inf):
        calls = 0

        def broken(*given: Any, value: float = value) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal calls
            calls += 1
            loss, terms = set_loss(*given)
            if calls % len(parts) == 0:
                terms = terms | {"stage1/giou": terms["stage1/giou"] * value}
                loss = loss * value
            return loss, terms

        trial = _Trial(model)
        try:
            answer(trial.model, broken, trial.optimizer, parts)
        except FloatingPointError as error:
            if "stage1/giou" not in str(error):
                raise Mistake("the error should name the terms of the loss that are not finite.") from None
            if trial.moved.any():
                raise Mistake("the weights had changed before the error was raised.") from None
            continue
        if value == math.inf:
            raise Mistake("an infinite term was trained on: the guard should refuse infinite values as well as NaN.")
        if not trial.weights().isfinite().all():
            raise Mistake("a loss of NaN was trained on, and now all weights are NaN: raise FloatingPointError before.")
        raise Mistake("a term that is not finite should raise FloatingPointError.")


VERDICTS = ("healthy", "learning rate too high", "learning rate too low", "part not trained", "wrong targets")


def _curves(
    verdict: str, steps: int, scale: float, parts: Sequence[str], generator: torch.Generator, stuck: int = 0
) -> dict[str, Any]:
    """Curves of a made-up run.

    Args:
        verdict: what is wrong with it, one of :data:`VERDICTS`.
        steps: number of steps.
        scale: of all losses: those of one task are not those of another.
        parts: names of its decoders.
        generator: of the noise.
        stuck: index of the decoder that is not trained.
    """
    progress = torch.linspace(0, 1, steps)
    falling = 1 - 0.9 * progress**0.7
    shape = {
        "learning rate too low": 1 - 0.09 * progress,
        "learning rate too high": 1 + 5 * (progress * 12).clamp(max=1) - 4.4 * progress,
        "wrong targets": 1.9 * (1 - 0.75 * progress**0.7),
    }.get(verdict, falling)
    loss, ap = {}, [[0] + [3.8] * len(parts)]
    for n, name in enumerate(parts):
        noise = 1 + 0.04 * torch.randn(steps, generator=generator)
        curve = scale * (1 + 0.05 * n) * shape * noise
        if verdict == "part not trained":
            curve = torch.full((steps,), scale * (1 + 0.05 * n)) if n == stuck else curve * 0.8 + 0.2 * scale
        loss[name] = curve.tolist()
    for step in (steps // 2, steps):
        done = step / steps
        best = {"healthy": 90 * done, "part not trained": 60 * done, "learning rate too low": 3.8 + 4 * done}
        row = [best.get(verdict, 0.4) - 0.3 * n for n in range(len(parts))]
        if verdict == "part not trained":
            row[stuck] = 3.8
        ap.append([step, *(max(0.0, value) for value in row)])
    norm = 35 * (1 + 0.2 * torch.randn(steps, generator=generator).abs()) * (20 if "high" in verdict else 1)
    return {"loss": loss, "norm": norm.tolist(), "AP": ap}


def _trials() -> list[tuple[str, str, dict[str, Any]]]:
    """Verdict, description and curves of several runs."""
    generator = torch.Generator().manual_seed(5)
    four, two = ("base", "stage1", "stage2", "stage3"), ("base", "stage1")
    trials = []
    for verdict in VERDICTS:
        for steps, scale, parts in ((30, 3.3, four), (120, 0.4, two), (60, 30.0, four)):
            curves = _curves(verdict, steps, scale, parts, generator)
            said = f"a run of {steps} steps, {len(parts)} decoders and initial losses of about {scale:g}"
            trials.append((verdict, said, curves))
    for stuck in (2, 3):
        curves = _curves("part not trained", 40, 3.0, four, generator, stuck)
        trials.append(("part not trained", f"a run whose {four[stuck]} keeps its loss", curves))
    bump = _curves("healthy", 40, 3.0, four, generator)
    for curve in bump["loss"].values():
        curve[1] *= 1.25
    trials.append(("healthy", "a run with one step whose loss is a quarter higher than its first", bump))
    return trials


@exercise(
    "12.5",
    "Losses have no absolute scale: divide a decoder's last losses by its first. Average a few steps against noise.",
    "Test in this order: does any loss rise far above its start; does one part stay while others fall; do all hardly "
    "fall; do they fall while AP stays near 0?",
    "ratio = mean of the last three losses / mean of the first three, by decoder. Too high: max(curve) > 1.5 * "
    "curve[0]. Part: some ratio > 0.95 and another < 0.8. Too low: all ratios > 0.75. Targets: "
    "the last AP of all stages < 5.",
)
def diagnose(answer: Callable[[dict[str, Any]], str]) -> str:
    """``answer(curves)`` names what is wrong with a run."""
    wrong: dict[str, tuple[str, str]] = {}
    for verdict, said, curves in _trials():
        before = copy.deepcopy(curves)
        found = answer(curves)
        if curves != before:
            raise Mistake("your function changes the curves that it is given.")
        if found is None:
            raise Mistake("your function returns None for some run: return one of the five verdicts in every case.")
        if found not in VERDICTS:
            raise Mistake(f"{found!r} is not one of the five verdicts.")
        if found != verdict:
            wrong.setdefault(verdict, (said, found))
    if not wrong:
        return "The rules hold for runs of other lengths, other losses and other numbers of stages."
    if set(wrong) == set(VERDICTS) - {"healthy"}:
        raise Mistake("every failed run gets the same verdict as a healthy one, or the wrong one: look at the curves.")
    for verdict in VERDICTS:
        if verdict in wrong:
            said, found = wrong[verdict]
            raise Mistake(f"{said} is called {found!r}. {SYMPTOMS[verdict]}")
    raise AssertionError("not reached")


SYMPTOMS = {
    "healthy": "Its losses fall to a tenth in all decoders and its AP rises. A single noisy step means nothing.",
    "learning rate too high": "Compare the highest loss with the first one of the same run, not with a fixed number.",
    "learning rate too low": "Compare where the losses end with where they began: how far did they fall, as a share?",
    "part not trained": "Compare the decoders: one keeps its loss while the others fall. It can be any of them.",
    "wrong targets": "Its losses fall, so they cannot tell: what says the AP on its own training images?",
}


class LittleRun:
    """A minimal training for exercise 12.6: a network with dropout, AdamW, images in random order.

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
    "12.6",
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
