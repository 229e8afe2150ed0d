"""Model complexity: parameters and multiply-adds per image, compared with Table 1 of the paper.

Models are built on the ``meta`` device, whose tensors have shapes but no data: nothing is allocated or computed. A
:class:`Counter` intercepts every PyTorch operator. It uses PyTorch's formulas for convolutions and matrix products, and
adds formulas for sampling features at points, which PyTorch's counter omits. Three kinds of operations are counted
separately, since published tables differ in what they include:

- **layers**: weights times activations (convolutions, linear layers);
- **attention**: products of two activations, equation (2): queries with keys, weights with values;
- **reading**: bilinear interpolation of features at points: deformable sampling, glimpses.

Elementwise operations such as softmax, normalization and additions are not counted, as usual.
"""

from __future__ import annotations

import platform
import textwrap
from collections import Counter as Numbers
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regolite.models.baselines import Baseline, BaselineConfig
from regolite.models.config import ModelConfig
from regolite.models.detector import as_detector
from regolite.models.presets import build, configure, presets
from regolite.types import ImageBatch
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import whole

IMAGE = (800, 1127)
"""Height and width of the image for which all full-size models are counted.

DETR's authors report 86 GFLOPs for DETR-R50, a mean over the first 100 validation images resized to a shorter side of
800 (facebookresearch/detr#110). At this size DETR-R50 has 86.0 G multiply-adds. The same size is used in all rows.
"""

CLASSES = 91
"""As in the published models: COCO's ids run to 90, and DETR counts from 0."""


@dataclass(frozen=True)
class Cost:
    """Complexity of a model.

    Attributes:
        parameters: number of parameters.
        parts: multiply-adds of each part of the model, by kind.
    """

    parameters: int
    parts: dict[str, dict[str, int]]

    def kind(self, kind: str) -> int:
        """Multiply-adds of one kind in all parts."""
        return sum(kinds.get(kind, 0) for kinds in self.parts.values())

    @property
    def multiply_adds(self) -> int:
        """Layers and attention."""
        return self.kind("layers") + self.kind("attention")

    @property
    def with_reading(self) -> int:
        """Layers, attention and reading."""
        return self.multiply_adds + self.kind("reading")

    @property
    def flops(self) -> int:
        """All operations, two per multiply-add."""
        return 2 * self.with_reading


def count(model: nn.Module, height: int, width: int, training: bool = False) -> Cost:
    """Count the parameters and operations of a model.

    Args:
        model: a detector, on any device; on ``meta`` nothing is allocated. A detector whose cost depends on its
            detections implements ``dense``, a forward pass of fixed cost
            (:meth:`regolite.models.baselines.Baseline.dense`).
        height: height of the image in pixels.
        width: its width.
        training: count the forward pass of a training step, in which the R-CNNs read fewer boxes and run no mask heads.

    Returns:
        The parameters, and the multiply-adds for one image. The parts are the children of the base detector, "rego"
        (everything that REGO adds) and "rest" (operations outside the parts).
    """
    height, width = whole("height", height, 1), whole("width", width, 1)
    device = next(model.parameters()).device
    pixels = torch.zeros(1, 3, height, width, device=device)
    image = ImageBatch(pixels, torch.zeros_like(pixels[:, 0]).bool(), torch.tensor([[height, width]], device=device))
    counter = Counter(model)
    with evaluating(model), torch.no_grad(), counter, counter.knowing_parts():
        model.dense(image, training) if isinstance(model, Baseline) else model(image)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, {part: dict(kinds) for part, kinds in counter.parts.items()})


class Counter(TorchDispatchMode):
    """Counts the multiply-adds of every operator within a ``with`` block.

    Args:
        model: the model; its weights distinguish layers from attention, and its children are the parts.

    Attributes:
        parts: multiply-adds of each part by kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.parts: defaultdict[str, Numbers[str]] = defaultdict(Numbers)
        self._weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._running = ["rest"]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count an operator."""
        packet = operator.overloadpacket
        run = SHORTCUTS[packet] if packet in SHORTCUTS and args[0].is_meta else operator
        result = run(*args, **(kwargs or {}))
        part = self._running[-1]
        if packet in READING:
            self.parts[part]["reading"] += READING[packet](result, *args)
        elif packet in PRODUCTS:
            # The kernel of a convolution may be a scaled copy, with a frozen norm folded in.
            has_weights = packet is aten.convolution or any(
                isinstance(a, Tensor) and _storage(a) in self._weights for a in args
            )
            flops = PRODUCTS[packet](*args, **(kwargs or {}), out_val=result)  # two per multiply-add
            self.parts[part]["layers" if has_weights else "attention"] += flops // 2
        return result

    @contextmanager
    def knowing_parts(self) -> Iterator[None]:
        """Register hooks that attribute each operator to the part in which it runs."""

        def enter(part: str) -> Callable[..., None]:
            return lambda *_: self._running.append(part)

        def leave(*_: Any) -> None:
            self._running.pop()

        hooks = []
        for name, module in self.model.named_modules():
            part = _part(self.model, name)
            if part:
                hooks += [module.register_forward_pre_hook(enter(part)), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _storage(tensor: Tensor) -> int:
    """Identity of the storage that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def _part(model: nn.Module, name: str) -> str:
    """The part of a module with this name; empty for the model itself."""
    if as_detector(model).num_stages and name and not name.startswith("detector"):
        return "rego"
    path = [step for step in name.split(".") if step not in ("detector", "net")]
    return path[0] if path else ""


def _sampled(result: Tensor, *_: Any) -> int:
    """``grid_sample``: each value interpolates four cells, and is multiplied by its attention weight afterwards."""
    return 5 * result.numel()


def _summed(result: Any, table: Tensor, index: Tensor, *_: Any) -> int:
    """``embedding_bag``, which extracts glimpses: every bin is a weighted sum of sixteen rows."""
    return index.numel() * table.shape[1]


def _aligned(result: Tensor, maps: Tensor, boxes: Tensor, scale: float, h: int, w: int, points: int, *_: Any) -> int:
    """``roi_align`` of torchvision: ``points`` squared points per bin, four cells each."""
    return 4 * max(points, 1) ** 2 * result.numel()


aten = torch.ops.aten
READING: dict[Any, Callable[..., int]] = {
    aten.grid_sampler_2d: _sampled,
    aten._embedding_bag: _summed,
    aten._embedding_bag_forward_only: _summed,
    torch.ops.torchvision.roi_align: _aligned,
}
"""Operators that sample features at points: multiply-adds as a function of result and arguments."""

PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}
"""PyTorch's FLOP formulas for convolutions, matrix products and fused attention."""

SHORTCUTS: dict[Any, Callable[..., Any]] = {
    aten.grid_sampler_2d: lambda x, grid, *_: x.new_empty(*x.shape[:2], *grid.shape[1:3]),
    aten.addmm: lambda bias, a, b: bias.new_empty(len(a), b.shape[1]),
    aten.native_layer_norm: lambda x, *_: (x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)),
    aten._safe_softmax: lambda x, *_: torch.empty_like(x),
    aten.clamp: lambda x, *_, **__: torch.empty_like(x),
    aten.relu: torch.empty_like,
}
"""Shape functions of frequent operators that are slow on ``meta``; they halve the time."""


# ---------------------------------------------------------------------------------------------------------- Table 1


@dataclass(frozen=True)
class Printed:
    """A row of the paper's Table 1.

    Attributes:
        gflops: GFLOPs.
        parameters: parameters in millions, or None if the paper omits them.
        remarks: what our count includes, or why it differs.
    """

    gflops: int
    parameters: int | None = None
    remarks: tuple[str, ...] = ()


_RCNN = "The box head reads 1000 proposals. RoIAlign, another 0.2 G, is in no column."
_MASK = "ResNeXt-101 64x4d, by the parameters. 53 G are the mask branch, for 100 boxes."
_CASCADE = (
    "ResNeXt-101 64x4d and three mask branches, by the parameters. Beyond Mask R-CNN the paper has 170 G, we 134: of "
    "each further head 14 G for boxes and 53 G for masks. What the other 36 G are is not known. The box heads read "
    "1000 proposals each, the mask heads 100 boxes. RoIAlign, another 0.6 G for the boxes, is in no column."
)
_TSP = "The encoder reads 700 proposals, as in the released code. RoIAlign is in no column."
_SPARSE_RCNN = (
    "Table 1 prints neither; 152 G and 106 M are what later papers print for Sparse R-CNN with 300 boxes. RoIAlign, "
    "another 0.4 G, is in the column with reading."
)
_EFFICIENT = (
    "Built from the text of Efficient DETR's paper; no code was published. Feed-forward networks of 2048 channels are "
    "our reading: with Deformable DETR's 1024 it has 33 M parameters and 126 G."
)
_ANCHOR = (
    "The authors have since corrected 151 to 172 (README, megvii-research/AnchorDETR#22): their first tool counted a "
    "linear layer on a map [h, w, C] for one of its rows only. They project the keys of all cells and then take the "
    "means of rows and columns; we take the means first, which is the same and saves 5.5 G."
)
_SMCA = "The multi-scale encoder is built from the text of SMCA's paper: the authors' code has another one."
_STAR = (
    "300 queries, reference points and focal loss make 41.6 M of DETR's 41.5. 44 is what the paper prints for "
    "Conditional DETR, which it cites for DETR* (43.4 by our count); but 88 GFLOPs are DETR's with 300 queries."
)
_REGO_STAR = (
    "REGO adds 11.9 G multiply-adds, 12.0 with reading; two each, 24.1 GFLOPs, the paper's 24, though the base "
    "detectors of the same table are counted with one. 6.9 G are 1 x 1 projections of four maps, which Deformable DETR "
    "does not need: with one each, the 7 between the paper's 24 and 17. Of parameters the paper adds 14 M to its 44, "
    "and we 15.1 M, the projections included, to 41.6."
)
_REGO = (
    "REGO adds 4.9 G multiply-adds, 5.1 with reading; two each, 10.2 GFLOPs. The paper adds 17 and does not say how it "
    "counts (zhechen/Deformable-DETR-REGO#3). Nothing that it describes costs 17. Tried: the released form, 6.1; "
    "context convolutions counted without their groups, 14.1; three glimpses a query, as a comment in the released "
    "code has it, 16.2; own projections of the backbone's three maps, 16.7 with two each, but 0.9 M parameters more."
)
_TWO_STAGE = (
    "Two stages add 1.1 M parameters, and 4.2 G since every cell is read as a proposal; the paper prints the plain "
    "model's figures."
)
_X101 = (
    "ResNeXt-101 32x8d, by the parameters (64x4d: 98.9 M). Beyond R50 the paper has 244 G for X101 and 67 G for R101; "
    "by our count 32x8d has 223 G, 64x4d 206 G, and R101 67 G. What the other 21 G are is not known."
)

TABLE_1 = {
    "fcos_r50": Printed(177, 32),
    "faster_rcnn_r50": Printed(180, 42, (_RCNN,)),
    "faster_rcnn_r101": Printed(246, 61, (_RCNN,)),
    "mask_rcnn_x101": Printed(457, 102, (_RCNN, _MASK)),
    "cascade_mask_rcnn_x101": Printed(627, 135, (_CASCADE,)),
    "tsp_rcnn_r50": Printed(188, None, (_TSP,)),
    "efficient_detr_r50": Printed(159, 35, (_EFFICIENT,)),
    "sparse_rcnn_r50": Printed(152, 106, (_SPARSE_RCNN,)),
    "detr_r50": Printed(86, 41),
    "up_detr_r50": Printed(86, 41),
    "detr_dc5_r50": Printed(187, 41),
    "conditional_detr_r50": Printed(90, 44),
    "anchor_detr_dc5_r50": Printed(151, None, (_ANCHOR,)),
    "smca_r50": Printed(152, 40, (_SMCA,)),
    "smca_r101": Printed(218, 58, (_SMCA,)),
    "detr_star_r50": Printed(88, 44, (_STAR,)),
    "detr_star_dc5_r50": Printed(189, 44, (_STAR,)),
    "rego_detr_star_r50": Printed(112, 58, (_REGO_STAR,)),
    "rego_detr_star_dc5_r50": Printed(213, 58, (_REGO_STAR,)),
    "deformable_detr_r50": Printed(173, 40),
    "rego_deformable_detr_r50": Printed(190, 54, (_REGO,)),
    "deformable_detr_two_stage_r50": Printed(173, 40, (_TWO_STAGE,)),
    "deformable_detr_two_stage_r101": Printed(240, 59, (_TWO_STAGE,)),
    "deformable_detr_two_stage_x101": Printed(417, 105, (_X101,)),
    "rego_deformable_detr_two_stage_r50": Printed(190, 54, (_TWO_STAGE, _REGO)),
    "rego_deformable_detr_two_stage_r101": Printed(257, 73, (_TWO_STAGE, _REGO)),
    "rego_deformable_detr_two_stage_x101": Printed(434, 119, (_X101, _REGO)),
}
"""Table 1 by preset. A number of parameters that it prints once for a model and its DC5 variant appears here twice; the
figures of Sparse R-CNN, which it leaves open, are those of other papers."""

CONVENTIONS = {
    "parameters": f"Every nn.Parameter, frozen ones too; frozen batch norm holds constants. {CLASSES} classes.",
    "multiply_adds": "Layers (convolutions, linear layers) and the products of attention; a multiply-add counts 1. The "
    "\"GFLOPs\" of DETR's paper and of most after it, and what the paper's column is compared with.",
    "with_reading": "The same and reading: 5 for each channel of a point of deformable sampling (four cells, and the "
    "attention weight), 16 for each channel of a bin of a glimpse (four points of four cells).",
    "flops": "Everything; a multiply-add counts 2.",
    "table_1": "As Table 1 prints it. Its convention is not stated.",
    "image": f"{IMAGE[0]} x {IMAGE[1]} pixels for all, at which DETR-R50 has the 86 G that its authors give as a "
    "mean over 100 validation images; laptop presets (tiny, scenes) at their own size.",
}
"""What each column counts, and for which image."""


def rows(models: Sequence[str] | None = None, progress: bool = False) -> list[dict[str, Any]]:
    """Count presets.

    Args:
        models: their names; all by default.
        progress: show a progress bar.

    Returns:
        For each preset its name, the size of the image, counts by kind, by :data:`CONVENTIONS` and by part, and the row
        of Table 1 with our difference from it in percent, or None.

    Raises:
        UserError: an unknown preset, before anything is counted.
    """
    configs, counted = [configure(name) for name in (presets() if models is None else models)], []
    for config in track(configs, "counting", progress):
        with torch.device("meta"):  # torchvision's networks have an additional background class
            model = build(config.without_pretrained(), CLASSES - isinstance(config.detector, BaselineConfig))
        counted.append(_row(config, count(model, *image(config))))
    return counted


def _row(config: ModelConfig, cost: Cost) -> dict[str, Any]:
    return {
        "model": config.preset,
        "image": list(image(config)),
        "parameters": cost.parameters,
        **{kind: cost.kind(kind) for kind in ("layers", "attention", "reading")},
        **{column: getattr(cost, column) for column in ("multiply_adds", "with_reading", "flops")},
        "parts": cost.parts,
        "table_1": _beside(cost, TABLE_1.get(config.preset)),
    }


def image(config: ModelConfig) -> tuple[int, int]:
    """Height and width of the image for which a model is counted: :data:`IMAGE`, or 4:3 for laptop presets."""
    return IMAGE if config.augment == "detr" else (config.image_size * 3 // 4, config.image_size)


def _beside(cost: Cost, printed: Printed | None) -> dict[str, Any] | None:
    if printed is None:
        return None
    return {
        "gflops": printed.gflops,
        "gflops_off": _percent(cost.multiply_adds / 1e9, printed.gflops),
        "parameters": printed.parameters,
        "parameters_off": _percent(cost.parameters / 1e6, printed.parameters) if printed.parameters else None,
        "remarks": list(printed.remarks),
    }


def _percent(ours: float, theirs: int) -> float:
    return round(100 * (ours / theirs - 1), 1) + 0.0  # no -0.0


def document(counted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``--json``: the rows, the conventions and the library versions."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version()}
    return {"image": list(IMAGE), "conventions": CONVENTIONS, "versions": versions, "rows": list(counted)}


def as_text(counted: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a text table with notes."""
    nothing: dict[str, Any] = {"remarks": []}
    nothing |= dict.fromkeys(("parameters", "parameters_off", "gflops", "gflops_off"))
    papers = [row["table_1"] or nothing for row in counted]
    remarks = list(dict.fromkeys(remark for paper in papers for remark in paper["remarks"]))  # each once
    line = f"{{:{max(len(row['model']) for row in counted)}}}" + "{:>9}{:>7}{:>8}" * 2 + "{:>9}{:>9}  {}"
    titles = ["model", "M params", "paper", "", "G mult-", "paper", "", "with", "2 each", "notes"]
    text = [line.format(*titles), line.format(*[""] * 4, "adds", *[""] * 2, "reading", "", "")]
    for row, paper in zip(counted, papers):
        cells = [row["model"]]
        for ours, theirs in ((row["parameters"] / 1e6, "parameters"), (row["multiply_adds"] / 1e9, "gflops")):
            off = paper[f"{theirs}_off"]
            cells += [f"{ours:.2f}", paper[theirs] or "", "" if off is None else f"{off:+.1f} %"]
        cells += [f"{row['with_reading'] / 1e9:.2f}", f"{row['flops'] / 1e9:.2f}"]
        text.append(line.format(*cells, " ".join(f"[{remarks.index(remark) + 1}]" for remark in paper["remarks"])))
    columns = ("M params", "G mult-adds", "with reading", "2 each", "paper", "image")
    notes = [f"{column}: {meaning}" for column, meaning in zip(columns, CONVENTIONS.values())]
    notes += [f"[{number}] {remark}" for number, remark in enumerate(remarks, 1)]
    notes = [textwrap.fill(note, 112, subsequent_indent="    ") for note in notes]
    return "\n".join(row.rstrip() for row in [*text, "", *notes])
