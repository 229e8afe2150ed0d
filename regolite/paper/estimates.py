"""Estimates of the GPU hours and the GPU memory of a run on COCO.

Nothing is measured on a GPU. Both numbers are computed on the device ``meta``, whose tensors have shapes but no data
(:mod:`regolite.evaluation.complexity`):

- **GPU hours** are epochs times images times the operations of a mean-size image, divided by a GPU's sustained
  throughput. The backward pass takes twice the operations of the forward pass: one product for the gradient of the
  weights, one for that of the inputs.
- **Memory** is that of weights, gradients and optimizer, and of all tensors saved for the backward pass (notebook 15,
  *It does not fit into my GPU*) of the largest image, which decides whether a run ends with "out of memory".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regolite.evaluation.complexity import count
from regolite.models.presets import build, configure
from regolite.training.batches import STRIDE
from regolite.training.setup import parse_overrides
from regolite.types import ImageBatch

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


def estimate(
    preset: str, epochs: int, images_per_gpu: int, tflops: float = TFLOPS, overrides: tuple[str, ...] = ()
) -> Estimate:
    """Estimate a run on COCO in float32 with DETR's image recipe.

    Args:
        preset: name of the model.
        epochs: number of epochs.
        images_per_gpu: batch size of one GPU.
        tflops: sustained throughput of a GPU, see :data:`TFLOPS`.
        overrides: changes of the preset, as in :attr:`RunConfig.overrides`.
    """
    flops, weights, kept = _costs(preset, overrides)
    return Estimate(
        gpu_hours=epochs * IMAGES * flops / (tflops * 1e12) / 3600,
        gigabytes=(weights + images_per_gpu * kept) / 1e9,
        image_tflop=flops / 1e12,
    )


@cache
def _costs(preset: str, overrides: tuple[str, ...] = ()) -> tuple[int, int, int]:
    """Operations of the mean image, forward and backward; bytes of weights and optimizer; bytes saved per image."""
    with torch.device("meta"):  # in training mode: dropout, frozen first stages of the backbone
        model = build(configure(preset, **parse_overrides(overrides)).without_pretrained()).train()
    weights = sum(
        (16 if p.requires_grad else 4) * p.numel() for p in model.parameters()
    )  # weight, gradient, two moments of AdamW
    return 3 * count(model, *MEAN_IMAGE).flops, weights, kept_bytes(model, *LARGEST_IMAGE)


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
        model(image)
    return sum(storage.nbytes() for storage in held.values())


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
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError("for shapes only: there is no backward pass")
