"""The checkers of notebook 12 accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import nn

from regolite.course import CENTRAL, Mistake, find
from regolite.course.chapter_12 import _parts, train_step
from regolite.losses import LossConfig, SetLoss
from regolite.models.presets import build
from regolite.models.rego import Rego, RegoConfig

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


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
    assert message in says("12.6", saved, restored)


def diagnose(curves, rise=1.5, stuck=0.95, slow=0.75, ap=5.0, flaw=""):
    losses = list(curves["loss"].values())[: 1 if flaw == "base only" else None]
    few = 1 if flaw == "one step" else 3
    ratios = [sum(loss[-few:]) / sum(loss[:few]) for loss in losses]
    if flaw == "total":
        ratios = [sum(loss[-1] for loss in losses) / sum(loss[0] for loss in losses)]
    if any(max(loss) > (4.0 if flaw == "absolute" else rise * loss[0]) for loss in losses):
        return "learning rate too high"
    if max(ratios) > stuck and min(ratios) < 0.8:
        return "part not trained"
    if min(ratios) > slow:
        return "learning rate too low"
    return "wrong targets" if max(curves["AP"][-1][1:]) < ap else "healthy"


def sorting(curves):
    for loss in curves["loss"].values():
        loss.sort()
    return "healthy"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (diagnose, "hold for runs of other lengths"),
        (lambda curves: diagnose(curves, flaw="absolute"), "is called 'learning rate too high'"),
        (lambda curves: diagnose(curves, flaw="base only"), "It can be any of them"),
        (lambda curves: diagnose(curves, flaw="total"), "one keeps its loss while the others fall"),
        (lambda curves: diagnose(curves, rise=1.05), "A single noisy step means nothing"),
        (lambda curves: diagnose(curves, ap=-1.0), "what says the AP on its own training images"),
        (lambda curves: diagnose(curves, slow=2.0), "how far did they fall"),
        (lambda curves: "healthy", "every failed run"),
        (lambda curves: "flu", "not one of the five"),
        (lambda curves: None, "returns None"),
        (sorting, "changes the curves"),
    ],
)
def test_diagnosis(answer, message):
    assert message in says("12.5", answer)


def test_the_stored_runs_can_be_told_apart():
    import json

    stored = json.loads((NOTEBOOKS / "results" / "12_sick_runs.json").read_text("utf-8"))
    verdicts = {name: diagnose(stored[name]) for name in ("healthy", *"ABCD")}
    assert len(set(verdicts.values())) == 5 and verdicts["healthy"] == "healthy"


def step(model, set_loss, optimizer, parts, factor=1.0, max_norm=0.1, flaw=""):
    """The training step, each line of which can be wrong."""
    if flaw != "mode":
        model.train()
    for group in optimizer.param_groups:
        start = group["lr"] if flaw == "compound" else group["base_lr"]
        start = optimizer.param_groups[-1]["base_lr"] if flaw == "one rate" else start
        group["lr"] = start if flaw == "no factor" else start * factor
    objects = float(sum(len(target) for _, targets in parts for target in targets))
    if flaw != "old gradients":
        optimizer.zero_grad()
    total, sums, parameters = 0.0, {}, list(model.parameters())
    for number, (images, targets) in enumerate(parts):
        if flaw == "last part":
            optimizer.zero_grad()
        loss, terms = set_loss(model(images), targets, *([] if flaw in ("own", "mean") else [objects]))
        loss = loss / len(parts) if flaw in ("mean", "divided") else loss
        refused = (lambda term: term.isnan()) if flaw == "only NaN" else (lambda term: not term.isfinite())
        if bad := [name for name, term in terms.items() if refused(term)]:
            if flaw == "no name":
                raise FloatingPointError("the loss is not finite")
            if flaw != "no guard":
                raise FloatingPointError(", ".join(bad))
        loss.backward()
        if flaw == "clip parts":
            nn.utils.clip_grad_norm_(parameters, max_norm)
        if flaw == "step per part" and number < len(parts) - 1:
            nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            optimizer.zero_grad()
        total = loss if flaw == "tensor" else loss.item() if flaw == "last loss" else total + loss.item()
        for name, term in terms.items():
            sums[name] = term.item() if flaw == "last terms" else sums.get(name, 0.0) + term.item()
        if flaw == "first part":
            break
    limit = {"no clipping": math.inf, "fixed": 0.1, "late": math.inf}.get(flaw, max_norm)
    if flaw == "values":
        nn.utils.clip_grad_value_(parameters, max_norm)
    if flaw == "tensors":
        for parameter in parameters:
            nn.utils.clip_grad_norm_([parameter], max_norm)
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if flaw in ("values", "tensors") else limit)
    if flaw != "no step":
        optimizer.step()
    if flaw == "after":
        norm = min(norm, torch.tensor(max_norm))
    lr = optimizer.param_groups[0 if flaw == "first lr" else -1]["lr"]
    result = {"loss": total, "terms": sums, "lr": lr, "gradient_norm": norm.item()}
    return loss if flaw == "only the loss" else result


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("", "This step trains REGO"),
        ("mode", "evaluation mode"),
        ("compound", "factors multiply from step to step"),
        ("one rate", "same learning rate"),
        ("no factor", "learning rate is not scaled"),
        ("old gradients", "gradients of earlier steps"),
        ("last part", "only the last part"),
        ("first part", "only the first part"),
        ("own", "its own number of objects"),
        ("mean", "the same weight as one with many"),
        ("clip parts", "after every part, so that every part counts the same"),
        ("step per part", "one step belongs to the whole batch"),
        ("no clipping", "not clipped to max_norm"),
        ("fixed", "whatever max_norm is"),
        ("values", "individually"),
        ("tensors", "each tensor"),
        ("no step", "the weights are unchanged"),
        ("tensor", "keeps its graph"),
        ("last loss", "add up the losses of the parts"),
        ("last terms", "not the sum over the parts"),
        ("after", "the norm before clipping"),
        ("first lr", "that of the last group"),
        ("only the loss", "return a dictionary"),
        ("no guard", "all weights are NaN"),
        ("only NaN", "infinite values as well as NaN"),
        ("divided", "divided by the number of parts"),
        ("no name", "name the terms"),
    ],
)
def test_step(flaw, message):
    assert message in says("12.4", functools.partial(step, flaw=flaw))


def test_the_reference_step_passes():
    assert "This step trains REGO" in says("12.4", train_step)


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
    assert message in says("12.3", lambda *given: accumulate(*given, **changes))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda model, set_loss, parts: None, "nothing was computed"),
        (lambda model, set_loss, parts: model.zero_grad(), "call backward()"),
    ],
)
def test_accumulating_nothing(answer, message):
    assert message in says("12.3", answer)


# ------------------------------------------------------------------------------------- MyRego from the solutions


@functools.cache
def solution(number: str) -> Any:
    """The solution of a central exercise from its notebook; the package's implementation if there is none yet."""
    module, _, name = CENTRAL[number].partition(":")
    [path] = (NOTEBOOKS / "solutions").glob(f"{int(number.split('.')[0]):02}_*.ipynb")
    namespace: dict[str, Any] = {"__name__": "solutions"}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            _define(cell.source, namespace)
            if "exercise" in cell.metadata.get("tags", []) and f'check("{number}", {name})' in cell.source:
                return namespace[name]
    return getattr(importlib.import_module(module), name)


def _define(source: str, namespace: dict[str, Any]) -> None:
    """Run the imports, definitions and constants of a cell; ``yours`` gives solutions."""
    for node in ast.parse(source).body:
        assigned = isinstance(node, ast.Assign) and (
            "yours(" in ast.unparse(node) or isinstance(node.value, ast.Constant)
        )
        if assigned or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            exec(compile(ast.Module([node], []), "<solution>", "exec"), namespace)
            namespace["yours"] = solution


def test_my_rego_of_the_solutions_has_the_loss_of_the_package():
    namespace: dict[str, Any] = {"__name__": "notebook", "yours": solution}
    for cell in nbformat.read(NOTEBOOKS / "12_train_rego.ipynb", as_version=4).cells:
        is_needed = "yours(" in cell.source or "class MyRego" in cell.source or cell.source.startswith("import")
        if cell.cell_type == "code" and is_needed and "exercise" not in cell.metadata.get("tags", []):
            _define(cell.source, namespace)
    torch.manual_seed(0)
    _, _, parts = _parts()
    images, targets = parts[1]
    small = {"dim": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 32, "queries": 12}
    detector = build("deformable_detr_scenes", num_classes=14, **small)
    package = Rego(detector, RegoConfig(ffn_dim=32, dropout=0.0)).train()
    with torch.no_grad():
        for parameter in package.stages.parameters():  # the heads of new stages start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    mine = namespace["MyRego"](detector, package.config).train()
    mine.load_state_dict(package.state_dict())
    assert isinstance(mine, solution("11.4")) and type(mine.stages[0]).__module__ == "solutions"

    results = []
    for model, loss_of in ((mine, namespace["SetLoss"]), (package, SetLoss)):
        model.zero_grad()
        loss, terms = loss_of(LossConfig(), "sigmoid")(model(images), targets)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        results.append((loss.item(), {name: term.item() for name, term in terms.items()}, norm.item()))
    (loss, terms, norm), (wanted, wanted_terms, wanted_norm) = results
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert terms == pytest.approx(wanted_terms, rel=1e-5, abs=1e-6)
    assert norm == pytest.approx(wanted_norm, rel=1e-3)

    optimizers = [torch.optim.AdamW([{"params": m.parameters(), "base_lr": 1e-4}], lr=1e-4) for m in (mine, package)]
    steps = [
        namespace["train_step"](mine, namespace["SetLoss"](LossConfig(), "sigmoid"), optimizers[0], parts),
        train_step(package, SetLoss(LossConfig(), "sigmoid"), optimizers[1], parts),
    ]
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], rel=1e-5)
