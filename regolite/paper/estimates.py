"""Estimates of the GPU hours and the GPU memory of a run on COCO.

Nothing is measured on a GPU. Both numbers are computed on the device ``meta``, whose tensors have shapes but no data
(:mod:`regolite.evaluation.complexity`):

- **GPU hours** are epochs times images times the operations of a mean-size image, divided by a GPU's sustained
  throughput. The backward pass takes twice the operations of the forward pass: one product for the gradient of the
  weights, one for that of the inputs.
- **Memory** is that of weights, gradients and optimizer, and of all tensors saved for the backward pass (notebook 15,
  *It does not fit into my GPU*) of the largest image, which decides whether a run ends with "out of memory".
- **Peak memory of a step** (:func:`step_gigabytes`) is found by a whole step, backward pass included, in which every
  tensor is counted from its creation to its release.

The boxes that FCOS and the R-CNNs train on depend on the image, so no estimate includes their RoIAlign and losses. Box
heads get as many boxes as in training (:meth:`regolite.models.baselines.Baseline.dense`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regolite.evaluation.complexity import count
from regolite.losses import SetLoss
from regolite.matching import Matches, PaddedTargets
from regolite.models.baselines import Baseline
from regolite.models.config import config_of
from regolite.models.detector import as_detector
from regolite.models.presets import build, configure
from regolite.training.batches import STRIDE
from regolite.training.setup import parse_overrides
from regolite.types import ImageBatch, Prediction, Target

IMAGES = 118_287
"""Number of images in COCO train2017."""

MEAN_IMAGE = (637, 849)
"""Height and width of an image with the mean pixel count of DETR's image recipe on data/coco_tiny."""

LARGEST_IMAGE = (800, -(-1333 // STRIDE) * STRIDE)
"""Height and width of the recipe's largest image, after padding."""

V100_HOURS = 6.5
"""Published GPU hours of an epoch of Deformable DETR-R50 on V100 (the authors' README, "Train Speed")."""

TFLOPS = 3.25
"""Sustained throughput of a GPU: 10^12 floating-point operations per second, two for each multiply-add.

The epoch of :data:`V100_HOURS` takes 76 * 10^15 operations, so a V100 sustained 3.25, 21 % of its float32 peak of 15.7.
This includes the padding, data loading and other operations of that run.
"""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run.

    Attributes:
        gpu_hours: hours of all GPUs together, without evaluation.
        gigabytes: memory of one GPU (10^9 bytes), without workspaces and fragmentation.
        image_tflop: 10^12 operations of one image, forward and backward. A GPU that trains on N images per second
            sustains N times this number, which is how to measure the throughput of your own GPU.
    """

    gpu_hours: float
    gigabytes: float
    image_tflop: float


MOMENTS = {"adamw": 2, "sgd": 1}
"""Tensors of the size of each trained parameter that an optimizer keeps: first and second moment, or momentum."""


def estimate(
    preset: str,
    epochs: int,
    images_per_gpu: int,
    tflops: float = TFLOPS,
    overrides: tuple[str, ...] = (),
    optimizer: str = "adamw",
) -> Estimate:
    """Estimate a run on COCO in float32 with DETR's image recipe.

    Args:
        preset: name of the model.
        epochs: number of epochs.
        images_per_gpu: batch size of one GPU.
        tflops: sustained throughput of a GPU, see :data:`TFLOPS`.
        overrides: changes of the preset, as in :attr:`RunConfig.overrides`.
        optimizer: as in :attr:`RunConfig.optimizer`.
    """
    flops, weights, kept = _costs(preset, overrides, optimizer)
    return Estimate(
        gpu_hours=epochs * IMAGES * flops / (tflops * 1e12) / 3600,
        gigabytes=(weights + images_per_gpu * kept) / 1e9,
        image_tflop=flops / 1e12,
    )


@cache
def _costs(preset: str, overrides: tuple[str, ...], optimizer: str) -> tuple[int, int, int]:
    """Operations of the mean image, forward and backward; bytes of weights and optimizer; bytes saved per image."""
    with torch.device("meta"):  # in training mode: dropout, frozen first stages of the backbone
        model = build(configure(preset, **parse_overrides(overrides)).without_pretrained()).train()
    tensors = 2 + MOMENTS[optimizer]  # weight, gradient, moments
    weights = sum(4 * (tensors if p.requires_grad else 1) * p.numel() for p in model.parameters())
    return 3 * count(model, *MEAN_IMAGE, training=True).flops, weights, kept_bytes(model, *LARGEST_IMAGE)


def kept_bytes(model: nn.Module, height: int, width: int) -> int:
    """Bytes that the forward pass of one image saves for the backward pass, without the weights.

    Args:
        model: a detector on the device ``meta``.
        height: height of the image in pixels.
        width: its width.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no pointer is reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    pixels = torch.zeros(1, 3, height, width, device="meta")
    image = ImageBatch(pixels, torch.zeros_like(pixels[:, 0]).bool(), torch.tensor([[height, width]], device="meta"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        model.dense(image, training=True) if isinstance(model, Baseline) else model(image)
    return sum(storage.nbytes() for storage in held.values())


def step_gigabytes(
    preset: str, images: tuple[int, ...] = (1, 2, 4), overrides: tuple[str, ...] = (), optimizer: str = "adamw"
) -> list[float]:
    """The peak memory of a training step on one GPU, in float32, in 10^9 bytes.

    The step is computed for one and for two images of :data:`LARGEST_IMAGE`; memory grows by nearly the same amount
    with every further image (computed for four, it is 1 % less than extrapolated). Not included: the workspaces of
    the kernels, fragmentation and the CUDA context.

    Args:
        preset: name of the model.
        images: batch sizes of the GPU.
        overrides: changes of the preset, as in :attr:`RunConfig.overrides`.
        optimizer: as in :attr:`RunConfig.optimizer`.
    """
    with torch.device("meta"):
        model = build(configure(preset, **parse_overrides(overrides)).without_pretrained()).train()
    one, two = (step_bytes(model, count, *LARGEST_IMAGE, optimizer) for count in (1, 2))
    return [(one + (count - 1) * (two - one)) / 1e9 for count in images]


OBJECTS = 20
"""Objects of an image in :func:`step_bytes`; COCO has 7 in the mean. Their number hardly matters."""


def step_bytes(model: nn.Module, images: int, height: int, width: int, optimizer: str = "adamw") -> int:
    """Bytes in use at the peak of a training step: weights, gradients, the optimizer's moments, all other tensors.

    Args:
        model: a detector on the device ``meta``.
        images: number of images.
        height: their height in pixels.
        width: their width.
        optimizer: as in :attr:`RunConfig.optimizer`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # as DDP keeps them from step to step
    held = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    held += sum((1 + MOMENTS[optimizer]) * p.numel() * p.element_size() for p in parameters)
    with torch.device("meta"):
        pixels = torch.zeros(images, 3, height, width)
        batch = ImageBatch(pixels, torch.zeros_like(pixels[:, 0]).bool(), torch.zeros(images, 2, dtype=torch.long))
        labels = torch.zeros(OBJECTS, dtype=torch.long)
        targets = [Target(labels, torch.zeros(OBJECTS, 4), i, (height, width)) for i in range(images)]
    own = (*parameters, *(p.grad for p in parameters), *model.parameters(), *model.buffers())
    with _Peak([tensor for tensor in own if tensor is not None]) as peak, _FusedAttention():
        _loss(model, batch, targets).backward()
    for parameter in parameters:
        parameter.grad = None
    return held + pixels.nbytes + peak.most


def _loss(model: nn.Module, batch: ImageBatch, targets: list[Target]) -> Tensor:
    """The loss of a step; the sum of the outputs for a baseline, whose loss selects boxes by their values."""
    if isinstance(model, Baseline):
        return torch.stack([output.sum() for output in tree_leaves(model.dense(batch, training=True))]).sum()
    output = model(batch, targets=targets) if as_detector(model).takes_targets else model(batch)
    loss, _ = _LossOfAnyPairs(config_of(model).loss, as_detector(model).scoring)(output, targets, 1.0, 1.0)
    return loss


class _LossOfAnyPairs(SetLoss):
    """The set loss with pairs that are not matched: ``meta`` has no costs to match by."""

    def _match(self, named: dict[str, Prediction], targets: PaddedTargets, scoring: str) -> Matches:
        return Matches(*torch.empty(4, len(named) * len(targets), dtype=torch.long, device="meta"))


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in the block, from creation to release.

    Args:
        own: tensors that are there already and not counted.

    Attributes:
        now: bytes in use.
        most: the largest number so far.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count the tensors that it makes."""
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return result

    def _release(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Replaces attention, which saves all attention maps on ``meta``, by the memory behavior of fused GPU kernels."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Saves what fused attention saves: its inputs, its output, and the log-sum-exp of each softmax."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, _ = query.shape
        mixed = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)  # memory layout of the kernels
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
