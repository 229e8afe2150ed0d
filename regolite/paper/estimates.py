"""What a run on COCO will take, before anybody has paid for it: an estimate of GPU hours and of memory.

Nothing here is measured on a GPU. Both figures are counted on the device ``meta``, where tensors have shapes and no
numbers (:mod:`regolite.evaluation.complexity`):

- **GPU hours** are epochs times images times the work of one image, divided by what a GPU sustains. The backward
  pass works twice as much as the forward pass: one product for the gradient of the weights, one for that of the inputs.
- **Memory** is what belongs to weights, and every tensor that the backward pass will want to see again
  (notebook 15, *It does not fit into my GPU*), at the largest image: the mean one decides the hours, and the largest
  one whether a run ends with "out of memory".
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
from regolite.types import ImageBatch

IMAGES = 118_287
"""Images of COCO's train2017."""

MEAN_IMAGE = (637, 849)
"""Height and width of an image with as many pixels as DETR's recipe makes on average, from those of data/coco_tiny."""

LARGEST_IMAGE = (800, -(-1333 // STRIDE) * STRIDE)
"""The largest that the recipe makes, as it is padded."""

V100_HOURS = 6.5
"""GPU hours of an epoch of Deformable DETR-R50 as its authors print them, on V100 (their README, "Train Speed")."""

TFLOPS = 3.25
"""What a GPU sustains: 10^12 floating-point operations a second, two for each multiply-add.

By the count here the epoch of :data:`V100_HOURS` is 76 * 10^15 operations, so a V100 sustained this, 21 % of its peak
of 15.7 in float32. Padding, waiting for data, and what is no multiply-add are in it as far as they were in theirs.
"""


@dataclass(frozen=True)
class Estimate:
    """What a run takes, estimated.

    Attributes:
        gpu_hours: of all GPUs together, without evaluation.
        gigabytes: of one GPU (10^9 bytes), before workspaces and what fragmentation loses.
        image_tflop: 10^12 operations of one image, forward and backward. A GPU that trains on N images a second
            sustains N times as many, which is how to find the throughput of one's own.
    """

    gpu_hours: float
    gigabytes: float
    image_tflop: float


def estimate(preset: str, epochs: int, images_per_gpu: int, tflops: float = TFLOPS) -> Estimate:
    """Estimate a run on COCO in float32 with DETR's image recipe.

    Args:
        preset: name of the model.
        epochs: how often every image is seen.
        images_per_gpu: how many a GPU holds at a time.
        tflops: what a GPU sustains, see :data:`TFLOPS`.
    """
    flops, weights, kept = _costs(preset)
    return Estimate(
        gpu_hours=epochs * IMAGES * flops / (tflops * 1e12) / 3600,
        gigabytes=(weights + images_per_gpu * kept) / 1e9,
        image_tflop=flops / 1e12,
    )


@cache
def _costs(preset: str) -> tuple[int, int, int]:
    """Operations of the mean image forward and backward; bytes of the weights, and those kept of an image."""
    with torch.device("meta"):  # as it is trained: dropout on, the first stages of the backbone frozen
        model = build(configure(preset).without_pretrained()).train()
    weights = sum((16 if p.requires_grad else 4) * p.numel() for p in model.parameters())  # gradient, AdamW's two means
    return 3 * count(model, *MEAN_IMAGE).flops, weights, kept_bytes(model, *LARGEST_IMAGE)


def kept_bytes(model: nn.Module, height: int, width: int) -> int:
    """Bytes that the forward pass of one image keeps for the backward pass, without the weights.

    Args:
        model: a detector on the device ``meta``.
        height: height of the image in pixels.
        width: its width.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # kept alive, so that its number is not given to another

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
    """Attention as a GPU's fused kernels do it; on ``meta`` PyTorch writes it out, and would keep every map."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: its inputs, its output, and the logarithm of each softmax's sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, _ = query.shape
        mixed = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError("only shapes are asked here")
