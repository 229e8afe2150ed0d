"""Checkers of notebook 15: what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regolite.course import Mistake, exercise
from regolite.models.attention import MultiHeadAttention
from regolite.models.deformable_attention import DeformableAttention
from regolite.models.transformer import DecoderLayer
from regolite.types import Memory


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
                f"for dim={dim}, ffn={ffn}, heads={heads}, levels={levels}, points={points} {found:,.0f} is too "
                f"{'few' if found < wanted else 'many'}: count both attentions, FFN and norms one by one."
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
                f"for {queries} queries, {keys} keys and {dim} channels {found:,.0f} multiply-adds are too "
                f"{'few' if found < wanted else 'many'}: add four linear layers and two products."
            )
    return "Each of M heads has C / M channels, so the number of heads cancels: more heads cost nothing."


@exercise(
    "15.3",
    "For a layer: layer.weight.numel() * (output.numel() // layer.weight.shape[0]). Register one hook for each module "
    "of model.modules() that is a Linear, a Conv2d, a MultiHeadAttention or a DeformableAttention.",
    "Attention: 2 * query.numel() * key.shape[1], of the hook's inputs[0] and inputs[1]. Sampling: output.numel() // 2 "
    "points of sampling_offsets, each with value.out_features // heads channels and 5 multiply-adds.",
    "Collect the handles in a list; try: with torch.no_grad(): model(*inputs); finally: remove them all.",
)
def counter(answer: Callable[..., Any]) -> str:
    """``answer(model, *inputs)``: the multiply-adds of one call by kind, checked with PyTorch's own counter."""
    for name, model, inputs in _models():
        found = answer(model, *inputs)
        if not isinstance(found, dict) or set(found) != {"layers", "attention", "reading"}:
            raise Mistake("return a dictionary with the keys layers, attention and reading.")
        if any(module._forward_hooks for module in model.modules()):
            raise Mistake("some hooks stay on the model: remove them, or the next count is twice as large.")
        _check_counts(name, {kind: _number(kind, value) for kind, value in found.items()}, model, inputs)
    broken = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    try:
        answer(broken, torch.zeros(1, 4))
    except RuntimeError:
        pass
    else:
        raise Mistake("an error of the model is swallowed: let it pass.")
    if any(module._forward_hooks for module in broken.modules()):
        raise Mistake("after an error in the model the hooks stay: remove them in `finally`.")
    return "Weights times places, plus pairs of tokens: the same total as PyTorch's counter of operators, by half."


class _Repeated(nn.Module):
    """One linear layer that runs three times, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Float[Tensor, "B N 8"]) -> Float[Tensor, "B N 8"]:
        return self.used(self.used(self.used(x).relu()).relu())


def _models() -> list[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Small models and their inputs; the batch has two images."""
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
    )
    sampling = DeformableAttention(32, 4, 2, 3)
    tokens = torch.rand(2, 20, 32)
    memory = Memory(tokens, torch.zeros_like(tokens), torch.zeros(2, 20, dtype=torch.bool), [(4, 4), (2, 2)])
    return [
        ("a linear layer", nn.Sequential(nn.Linear(6, 10)), (torch.rand(2, 5, 6),)),
        ("two convolutions, one with stride 2 and one with groups", convolutions, (torch.rand(2, 3, 10, 14),)),
        ("a layer that runs three times beside one that never runs", _Repeated(), (torch.rand(2, 7, 8),)),
        (
            "a MultiHeadAttention",
            MultiHeadAttention(32, 4),
            (*(torch.rand(2, n, 32) for n in (5, 9)), torch.rand(2, 9, 32)),
        ),
        ("a DeformableAttention", sampling, (torch.rand(2, 6, 32), memory, torch.rand(2, 6, 2, 2))),
    ]


def _check_counts(name: str, found: dict[str, float], model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise a Mistake if the counts of a model are wrong."""
    wanted, wrong = _expected(model, inputs)
    for kind, said in (("layers", wrong), ("attention", _attention_mistakes), ("reading", _reading_mistakes)):
        if found[kind] == wanted[kind]:
            continue
        known = said if isinstance(said, dict) else said(model, inputs, wanted)
        if found[kind] in known and found[kind] != wanted[kind]:
            raise Mistake(f"{name}: {known[int(found[kind])]}.")
        if found[kind] == 2 * wanted[kind]:
            raise Mistake(f"{name}: each multiply-add counts once, not twice.")
        raise Mistake(f"{name}: {kind} are too {'few' if found[kind] < wanted[kind] else 'many'}.")


def _expected(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], dict[int, str]]:
    """The counts of a model, and what common mistakes give for its layers."""
    calls: list[tuple[nn.Module, int, int]] = []  # layer, elements of its input and of its output

    def see(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((layer, given[0].numel(), output.numel()))

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()

    def total(count: Callable[[Any, int, int], int], among: list[tuple[nn.Module, int, int]] = calls) -> int:
        return sum(count(*call) for call in among)

    def cost(layer: Any, given: int, out: int) -> int:
        return layer.weight.numel() * (out // layer.weight.shape[0])

    once = list({id(call[0]): call for call in calls}.values())
    batch = len(inputs[0])
    wrong = {
        total(lambda la, i, o: sum(p.numel() for p in la.parameters()) * (o // la.weight.shape[0])): (
            "biases are no multiply-adds"
        ),
        total(lambda la, i, o: la.weight.numel()): "these are the weights: multiply them with the places",
        total(lambda la, i, o: la.weight.numel() * o): (
            "the places are the elements of the output divided by its channels, the length of the weight's first axis"
        ),
        total(lambda la, i, o: la.weight.numel() * (i // (la.weight.shape[1] * getattr(la, "groups", 1)))): (
            "the places of a convolution are the cells of its output, not of its input"
        ),
        total(lambda la, i, o: cost(la, i, o) * getattr(la, "groups", 1)): (
            "a grouped convolution has fewer weights: use weight.numel()"
        ),
        total(cost, once): "a layer counts once for each call",
        total(cost) // batch: "the batch has two images: count all of them",
        total(cost) + sum(la.weight.numel() for la in layers if la not in [c[0] for c in calls]): (
            "a layer that never runs does not count"
        ),
    }
    attention = reading = 0
    if isinstance(model, MultiHeadAttention):
        attention = 2 * inputs[0].numel() * inputs[1].shape[1]
    if isinstance(model, DeformableAttention):
        points = model.heads * model.levels * model.points
        reading = inputs[0].shape[0] * inputs[0].shape[1] * points * (model.value.out_features // model.heads) * 5
    wanted = {"layers": total(cost), "attention": attention, "reading": reading}
    if isinstance(model, MultiHeadAttention):
        wrong[2 * wanted["layers"]] = "the linear layers are counted twice, by their own hooks and by the attention's"
        wrong[0] = "the linear layers inside are modules too: hook them as well"
    if isinstance(model, DeformableAttention):
        wrong[wanted["layers"] - total(cost, [c for c in calls if c[0] is model.sampling_offsets])] = (
            "the layer sampling_offsets is a linear layer, too"
        )
    return wanted, {value: said for value, said in wrong.items() if value != wanted["layers"]}


def _attention_mistakes(model: nn.Module, inputs: tuple[Any, ...], wanted: dict[str, int]) -> dict[int, str]:
    products = wanted["attention"]
    known: dict[int, str] = {}
    if isinstance(model, MultiHeadAttention):
        known = {
            0: "its two products are missing: hook the attention itself",
            products // 2: "there are two products: queries with keys, and weights with values",
            products * model.heads: "each head has C / M channels: the number of heads cancels",
            products // inputs[0].shape[-1]: "each pair of tokens costs C multiply-adds",
            2
            * inputs[0].numel()
            * inputs[0].shape[1]: "pairs are queries times keys: use the number of keys, inputs[1]",
            products + wanted["layers"]: "its linear layers belong to layers, where they have hooks of their own",
        }
    return known


def _reading_mistakes(model: nn.Module, inputs: tuple[Any, ...], wanted: dict[str, int]) -> dict[int, str]:
    reading = wanted["reading"]
    known: dict[int, str] = {}
    if isinstance(model, DeformableAttention):
        known = {
            0: "its sampling is missing: hook sampling_offsets",
            2 * reading: "an offset has two numbers, x and y: half as many points",
            reading * 4 // 5: "after the interpolation of four neighbors each value is multiplied by its weight: 4 + 1",
            reading // 5: "each value is a weighted sum of four neighbors, multiplied by its attention weight: 4 + 1",
            reading * model.heads: "a point reads only the C / M channels of its head",
        }
    return known


@exercise(
    "15.4",
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
            (dim + ffn, "the attention has four linear layers, not two"),
            (2 * dim + ffn / 2, "the feed-forward network has two linear layers"),
        ):
            if found == value:
                raise Mistake(f"{known}.")
        if abs(found - wanted) > 0.5:
            raise Mistake(
                f"for dim={dim} and ffn={ffn} the products still cost {'less' if found < wanted else 'more'} than the "
                f"layers at {found:g} tokens: set the two costs equal and solve for S."
            )
    return "For DETR this takes a shorter side of about 1400 pixels at stride 32, and of 700 at stride 16, as in DC5."


@exercise(
    "15.5",
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
