"""Checkers of notebook 15: what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regolite.course import Mistake, exercise
from regolite.models.attention import MultiHeadAttention
from regolite.models.deformable_attention import DeformableAttention
from regolite.models.transformer import DecoderLayer


def _number(name: str, found: Any) -> float:
    """The answer as a number; raise a Mistake if it is none."""
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, (int, float)):
        raise Mistake(f"{name} should be a number, but is {'None' if found is None else type(found).__name__}.")
    return float(found)


@exercise(
    "15.1",
    "Count the four parts one by one: attention, deformable attention, FFN, three norms.",
    "Include the biases: a linear layer from a to b has a * b + b parameters.",
    "Deformable attention: dim -> 2 M L K (offsets), dim -> M L K (weights), and dim -> dim twice (value, out).",
)
def decoder_layer(answer: Callable[[int, int, int, int, int], int]) -> str:
    """The number of parameters of a deformable decoder layer."""
    for dim, ffn, heads, levels, points in ((256, 1024, 8, 4, 4), (96, 200, 4, 3, 2), (64, 64, 2, 1, 5)):
        with torch.device("meta"):
            deformable = DeformableAttention(dim, heads, levels, points)
            layer = DecoderLayer(dim, heads, deformable, ffn, 0.0)
        wanted = sum(p.numel() for p in layer.parameters())
        found = _number("the number of parameters", answer(dim, ffn, heads, levels, points))
        biases = sum(p.numel() for name, p in layer.named_parameters() if name.endswith("bias") and "norm" not in name)
        reads = heads * levels * points * (dim + 1)
        for value, known in (
            (wanted - biases, "the biases of the linear layers are missing"),
            (wanted - 6 * dim, "the three LayerNorms are missing: a scale and a shift for each channel"),
            (wanted - 4 * dim, "there are three LayerNorms, one after each branch"),
            (wanted - 3 * dim, "a LayerNorm has a scale and a shift for each channel"),
            (wanted - reads, "an offset has two coordinates, x and y"),
            (wanted - reads * 2, "the offsets are missing, or counted together with the weights"),
            (wanted - reads * 3, "the layers that predict offsets and weights are missing"),
            (
                wanted + 2 * (dim * dim + dim),
                "deformable attention has no queries or keys to project, only value and out",
            ),
            (wanted - 2 * (dim * dim + dim), "deformable attention has two projections too: value and output"),
        ):
            if found == value:
                raise Mistake(f"{known}.")
        if found != wanted:
            raise Mistake(
                f"for dim={dim}, ffn={ffn}, heads={heads}, levels={levels}, points={points} "
                f"there are {wanted:,} parameters, not {found:,.0f}."
            )
    return "Only the layers that predict offsets and weights depend on heads, levels and points."


@exercise(
    "15.2",
    "Which of the four linear layers are applied to the queries, and which to the keys?",
    "query and out: queries * dim * dim each; key and value: keys * dim * dim each.",
    "2 * (queries + keys) * dim ** 2 + 2 * queries * keys * dim",
)
def attention_cost(answer: Callable[[int, int, int], int]) -> str:
    """Multiply-adds of dense attention, checked with PyTorch's own counter."""
    for queries, keys, dim in ((100, 850, 256), (7, 7, 64), (300, 40, 32)):
        with torch.device("meta"):
            attention, asked, seen = MultiHeadAttention(dim, 4), torch.zeros(1, queries, dim), torch.zeros(1, keys, dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention(asked, seen, seen)
        wanted = counter.get_total_flops() // 2
        found = _number("the cost", answer(queries, keys, dim))
        products, square = 2 * queries * keys * dim, dim * dim
        for value, known in (
            (2 * wanted, "that counts each multiply-add twice"),
            (products, "the four linear layers are missing"),
            (products // 2, "there are two products: queries with keys, and weights with values"),
            (products + 4 * queries * square, "key and value projections are applied to the keys, not to the queries"),
            (products + 4 * keys * square, "query and output projections are applied to the queries"),
            (products + (queries + 2 * keys) * square, "the output projection is missing"),
            (
                products * 4 + 2 * (queries + keys) * square,
                "every head has only dim / heads channels: the heads cancel",
            ),
        ):
            if found == value and found != wanted:
                raise Mistake(f"{known}.")
        if found != wanted:
            raise Mistake(
                f"{queries} queries, {keys} keys, {dim} channels cost {wanted:,} multiply-adds, not {found:,.0f}."
            )
    return "Each of M heads has C / M channels, so the number of heads cancels: more heads cost nothing."


@exercise(
    "15.3",
    "Set the two costs equal, and divide both sides by S and by C.",
    "The result is 2 S = 4 C + 2 F.",
    "So S is 2 * dim + ffn.",
)
def crossing(answer: Callable[[int, int], float]) -> str:
    """The number of tokens at which the products cost as much as the linear layers."""
    for dim, ffn in ((256, 2048), (128, 512), (64, 1000)):
        found, wanted = _number("the number of tokens", answer(dim, ffn)), 2 * dim + ffn
        for value, known in (
            (4 * dim + 2 * ffn, "that is for ONE of the two products; there are two"),
            (2 * dim, "the feed-forward network is missing"),
            (dim + ffn / 2, "that is half of it: there the products cost only half as much as the layers"),
        ):
            if found == value:
                raise Mistake(f"{known}.")
        if abs(found - wanted) > 0.5:
            layers, products = wanted * (4 * dim**2 + 2 * dim * ffn), 2 * wanted**2 * dim
            assert layers == products
            raise Mistake(f"for dim={dim} and ffn={ffn} the two costs are not equal at {found:g} tokens.")
    return "2560 tokens: a shorter side of about 1400 pixels at stride 32, and of 700 at stride 16, as in DC5 models."


@exercise(
    "15.4",
    "65504 is the largest number of float16. Which intermediate results are larger?",
    "The areas. Compute them in float32, a.float(), and convert the answer back at the end.",
    "a, b = a.float(), b.float() first; .half() at the return.",
)
def half_iou(answer: Callable[[Float[Tensor, "N 4"], Float[Tensor, "N 4"]], Float[Tensor, "N"]]) -> str:
    """IoU of float16 boxes in pixels, finite and correct."""
    corner = torch.rand(64, 2) * 300
    boxes = torch.cat([corner, corner + 20 + 900 * torch.rand(64, 2) ** 2], 1)
    other = boxes + 60 * (torch.rand(64, 4) - 0.5)
    a, b = boxes.half(), other.half()
    x, y = a.float(), b.float()
    shared = (torch.minimum(x[:, 2:], y[:, 2:]) - torch.maximum(x[:, :2], y[:, :2])).clamp(min=0).prod(1)
    wanted = shared / ((x[:, 2:] - x[:, :2]).prod(1) + (y[:, 2:] - y[:, :2]).prod(1) - shared)
    found = answer(a.clone(), b.clone())
    if not isinstance(found, Tensor) or found.shape != (64,):
        raise Mistake("the overlaps should be a tensor of shape [N].")
    if not found.isfinite().all():
        count = int((~found.isfinite()).sum())
        raise Mistake(
            f"{count} of 64 overlaps are NaN or infinite: areas above 65504 square pixels overflow in float16."
        )
    if found.dtype != torch.float16:
        raise Mistake(f"the answer should be float16, but is {str(found.dtype).removeprefix('torch.')}.")
    far = (found.float() - wanted).abs()
    if float(far[wanted == 1].max() if (wanted == 1).any() else 0) > 0.002 or float(far.max()) > 0.002:
        worst = int(far.argmax())
        raise Mistake(
            f"an overlap is {float(found[worst]):.3f} but should be {float(wanted[worst]):.3f}: finite, but wrong (was "
            "an intermediate area clamped or rounded?)."
        )
    return "The boxes fit into float16, but not their areas. Convert to float32 before products."
