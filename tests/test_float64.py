"""Models and losses in float64: against float32, and by numerical gradients."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from small_models import CLASSES, DETECTORS, batch, deformable, shake, two_stage

from regolite.losses import LossConfig, SetLoss
from regolite.models.rego import Rego
from regolite.types import Target


@pytest.fixture
def images():
    return batch((64, 96), (96, 70))


@pytest.fixture
def targets():
    boxes = torch.rand(5, 4) * 0.4 + 0.3
    labels = torch.arange(5) % CLASSES
    return [Target(labels[:2], boxes[:2], 0, (64, 96)), Target(labels[2:], boxes[2:], 1, (96, 70))]


def double(images):
    return replace(images, pixels=images.pixels.double())


def with_rego(detector, **fields):
    return shake(Rego(detector, ffn_dim=32, dropout=0.0, **fields)).eval()


def loss(model, output, targets):
    return SetLoss(LossConfig(), model.scoring)(output, targets)[0]


@pytest.mark.parametrize("name", DETECTORS)
def test_float64_gives_the_loss_and_gradients_of_float32(name, images, targets):
    model = with_rego(DETECTORS[name](), stages=2)
    results = []
    for same, batched in ((model, images), (deepcopy(model).double(), double(images))):
        output = same(batched)
        total = loss(same, output, targets)
        gradients = torch.autograd.grad(total, list(same.parameters()), allow_unused=True)
        results.append((total, output.final.logits, output.final.boxes, *(g for g in gradients if g is not None)))
    for single, precise in zip(*results, strict=True):
        assert single.dtype == torch.float32 and precise.dtype == torch.float64
        assert (single - precise).norm() <= 1e-3 * precise.norm() + 1e-5


def test_denoising_in_float64(images, targets):
    model = with_rego(two_stage(denoising=True), stages=1).double().train()
    total = loss(model, model(double(images), targets=targets), targets)
    total.backward()
    assert total.dtype == torch.float64
    assert model.detector.noised_queries.labels.weight.grad.abs().sum() > 0


def numerical(model, prefix, images, targets, **options):
    """Check the derivative of the loss in a random direction of the parameters whose names begin with ``prefix``."""
    chosen = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    assert chosen
    direction = {name: torch.randn_like(p) * 0.1 for name, p in chosen.items()}

    def along(step):
        moved = {name: p.detach() + step * direction[name] for name, p in chosen.items()}
        return loss(model, torch.func.functional_call(model, moved, (images,), options), targets)

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(along, step, rtol=1e-4)


@pytest.mark.parametrize("part", ["backbone", "pyramid", "encoder", "decoder_layers", ""])
def test_gradients_of_deformable_detr(part, images, targets):
    model = with_rego(deformable(), stages=1).double()
    assert numerical(model, f"detector.{part}", double(images), targets, stages=0)


@pytest.mark.parametrize("part", ["glimpse", "decoder", "fuse", ""])
def test_gradients_of_a_stage(part, images, targets):
    """Boxes and features before the stage are fixed: boxes are detached there, on purpose."""
    model = with_rego(deformable(), stages=1).double()
    assert numerical(model, f"stages.0.{part}", double(images), targets)
