"""Training on a GPU that is not here: a step on tensors that say they are on ``cuda`` and hold nothing.

``FakeTensorMode`` computes shapes, types and devices alone. It refuses operators whose tensors are on different devices
and all that needs a value on the CPU (``item``, ``nonzero``, a mask as an index) and would wait for a GPU. Copies are
counted. PyTorch's autograd engine refuses fake tensors of a device that does not exist, so that the backward
pass walks the graph itself.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regolite
from regolite import build, losses
from regolite.losses import SetLoss
from regolite.matching import Matches, matching_cost
from regolite.models.config import config_of
from regolite.training.activation_checkpointing import checkpoint_activations
from regolite.training.config import RunConfig
from regolite.training.schedule import parameter_groups
from regolite.types import ImageBatch, Target
from regolite.utils.devices import constant

OBJECTS = (3, 5)
FAMILIES = (
    "detr", "detr_star", "up_detr", "conditional_detr", "anchor_detr", "smca", "deformable_detr",
    "deformable_detr_refined", "deformable_detr_two_stage", "sparse_rcnn", "efficient_detr", "dino",
)  # fmt: skip


class Copies(TorchDispatchMode):
    """Counts copies between devices by their direction, and notes the types in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.counts, self.products = Counter(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1 and operator.overloadpacket in (
            torch.ops.aten._to_copy, torch.ops.aten.copy_,
        ):  # fmt: skip
            waits = not (kwargs or {}).get("non_blocking", False)
            self.counts[f"to {tree_leaves(output)[0].device.type}{', waiting' * waits}"] += 1
        if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.products.add(output.dtype)
        return output


def backward(loss):
    """Backpropagate from a loss: PyTorch's nodes, called in topological order."""
    order, gradients, stack = [], {}, [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in gradients:
            gradients[node] = {}
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    with torch.no_grad():
        for node in reversed(order):
            given = gradients.pop(node)
            if not given:
                continue
            if hasattr(node, "variable"):  # a leaf
                leaf = node.variable
                leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
                continue
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            results = call(*(given.get(i) for i in range(len(node._input_metadata))))
            results = results if isinstance(results, (tuple, list)) else (results,)
            for (after, i), gradient in zip(node.next_functions, results):
                if after is None or gradient is None:
                    continue
                wanted = after._input_metadata[i]
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                assert gradient.device == wanted.device
                known = gradients[after]
                known[i] = gradient if i not in known else known[i] + gradient


@pytest.fixture
def fake_gpu(monkeypatch):
    """A mode in which tensors are fake, and may be on ``cuda``."""
    # Otherwise torch.autocast("cuda") switches itself off.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    # The pass of the engine to which recomputed activations belong: one, not a new one for each of them.
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)

    def pairs(predictions, targets, scoring, costs, names=None, sources=None):
        """As many pairs as there are objects, after the one copy of the matcher."""
        several = [torch.cat([getattr(p, part) for p in predictions], 1) for part in ("logits", "boxes")]
        matching_cost(type(predictions[0])(*several), targets, scoring, costs).cpu()
        count = len(predictions if sources is None else sources)
        rows = [[p, b, t, t] for p in range(count) for b, n in enumerate(targets.counts) for t in range(n)]
        return Matches(*constant(rows, targets.boxes.device).T)

    monkeypatch.setattr(losses, "match", pairs)
    with FakeTensorMode():
        yield


def make(name, size, **overrides):
    """A model, images of this size and their objects, all on the GPU."""
    with torch.device("cuda"):
        model = build(name, 91, weights=None, **overrides)
        pixels, mask = torch.empty(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool)
        images = ImageBatch(pixels, mask, torch.empty(2, 2, dtype=torch.long))
        objects = [Target(torch.zeros(n, dtype=torch.long), torch.rand(n, 4), i, size) for i, n in enumerate(OBJECTS)]
    return model, images, objects


def check_step(name, precision, recompute, size, **overrides):
    """Two steps of training: everything on the GPU, and no copy from it but that of the matcher."""
    model, images, targets = make(name, size, **overrides)
    if recompute:
        checkpoint_activations(model)
    groups = parameter_groups(model, RunConfig())
    optimizer = torch.optim.AdamW(groups, fused=True)
    set_loss = SetLoss(config_of(model).loss, model.scoring)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with Copies() as copies:
        with ExitStack() as stack:
            if precision != "no":
                stack.enter_context(torch.autocast("cuda", kind))
            output = model(images, targets=targets) if model.takes_targets else model(images)
        assert not any("waiting" in copy or "cpu" in copy for copy in copies.counts), copies.counts
        assert kind in copies.products, "autocast is off"
        loss, terms = set_loss(output, targets, 8.0, 2.0)
        assert {t.device.type for t in (loss, *terms.values())} == {"cuda"} and loss.dtype == torch.float32
        matched = 1 + (output.proposals is not None)
        assert copies.counts["to cpu, waiting"] == matched
        backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert {copy for copy in copies.counts if copy != "to cuda"} == {"to cpu, waiting"}
        assert copies.counts["to cpu, waiting"] == matched, "something else was waited for"
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for tensor in (*model.parameters(), *model.buffers(), *(p.grad for group in groups for p in group["params"])):
        assert tensor.device.type == "cuda"


def check_record(name, size, **overrides):
    model, images, _ = make(name, size, **overrides)
    with torch.no_grad(), regolite.record(model.eval()) as trace:
        model(images)
    assert len(trace) > 10


@pytest.mark.parametrize(
    ("name", "precision", "recompute"),
    [
        ("rego_deformable_detr_everyday", "bf16", True),
        ("rego_detr_scenes", "fp16", False),
        ("rego_smca_scenes", "no", True),
    ],
)
def test_a_step_at_laptop_size(fake_gpu, name, precision, recompute):
    check_step(name, precision, recompute, (128, 160))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), zip(FAMILIES, ("bf16", "fp16", "no") * 4))
def test_a_step_at_full_size(fake_gpu, name, precision):
    check_step(f"rego_{name}_r50", precision, recompute=precision == "bf16", size=(800, 1344))


@pytest.mark.parametrize("name", ["rego_detr_scenes", "rego_anchor_detr_scenes", "rego_deformable_detr_scenes"])
def test_a_record(fake_gpu, name):
    check_record(name, (128, 160))
