"""Attention weights that fused kernels do not return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regolite.interop.adapter import HuggingFaceModel


def their_sampling(
    attention: HuggingFaceModel,
    offsets: Float[Tensor, "B Q _o"],
    weights: Float[Tensor, "B Q _w"],
    references: Float[Tensor, "B Q L d"],
    shapes: Sequence[tuple[int, int]],
) -> tuple[Float[Tensor, "B Q M L K 2"], Float[Tensor, "B Q M L K"]]:
    """Sampling locations and weights of deformable attention of transformers.

    Args:
        attention: the module of transformers.
        offsets: the output of its projection ``sampling_offsets``.
        weights: the output of its projection ``attention_weights``.
        references: its reference points.
        shapes: height and width of each level.
    """
    heads = attention.n_heads
    points = getattr(attention, "num_points_list", [attention.n_points] * len(shapes))  # by level in D-FINE
    weights = weights.unflatten(2, (heads, -1)).softmax(-1)
    offsets = offsets.unflatten(2, (heads, -1, 2))
    # Levels with fewer points get further points of weight 0 at the reference.
    weights = torch.stack([F.pad(w, (0, max(points) - w.shape[-1])) for w in weights.split(points, 3)], 3)
    offsets = torch.stack([F.pad(o, (0, 0, 0, max(points) - o.shape[-2])) for o in offsets.split(points, 3)], 3)
    center = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        offsets = offsets / offsets.new_tensor([(w, h) for h, w in shapes])[:, None]
    else:
        scale = getattr(attention, "offset_scale", 0.5)  # configurable in RT-DETRv2
        offsets = offsets / offsets.new_tensor(points)[:, None, None] * center[..., 2:] * scale
    return center[..., :2] + offsets, weights


@torch.no_grad()
def dense_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "B M Q S"]:
    """The attention weights of ``scaled_dot_product_attention``, with the same arguments."""
    with torch.inference_mode(False), torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-2, -1)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores.masked_fill_(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores += attn_mask
        return scores.softmax(-1).cpu()


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU, outside of autograd and inference mode."""
    with torch.inference_mode(False):
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", kind, copy=True)
