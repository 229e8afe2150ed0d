"""The recorder: intermediate results of a detector, without any code for it in the models.

::

    with regolite.record(model) as trace:
        regolite.detect(model, "image.jpg")
    trace["decoder.5.cross"].over_image(query=7)

Models compute attention with a fused kernel that does not return the weights. The recorder uses:

- a **function mode** of PyTorch, which intercepts calls of the kernel with queries, keys and mask while an attention
  module runs, and also computes the weights, in float32. The kernel's result is unchanged, so that outputs are the same
  bit for bit. In modules that compute a softmax themselves (Anchor DETR, some of transformers) it intercepts the
  softmax;
- **hooks**, which tell which module runs, and its inputs: memories, reference points, regions;
- sampling locations and weights of deformable attention are computed a second time, from its inputs.

Everything is removed at the end, also after an exception. Models that are not recorded run without overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, no_type_check
from weakref import WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regolite.errors import UserError, did_you_mean
from regolite.interop.adapter import TransformersDetector
from regolite.models.anchor_detr import Grid, RowColumnAttention
from regolite.models.backbone import shrink
from regolite.models.deformable_attention import DeformableAttention
from regolite.models.detector import Detector, Scoring, as_detector
from regolite.models.glimpse import choose_level
from regolite.models.rego import Stage
from regolite.models.smca import SmcaDecoderLayer
from regolite.tracing.trace import (
    AttentionMap,
    Boxes,
    Frame,
    Glimpses,
    Record,
    References,
    RowColumnMap,
    Sampling,
    Trace,
)
from regolite.tracing.weights import copied, dense_weights, their_sampling
from regolite.types import DetectorOutput, ImageBatch, Memory, Prediction
from regolite.utils.validation import of_kind

__all__ = ["Trace", "record"]

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)

_watched: WeakSet[nn.Module] = WeakSet()


@contextmanager
def record(model: nn.Module, names: str | Sequence[str] = "*") -> Iterator[Trace]:
    """Record intermediate results of a detector while it runs on one image or one batch.

    Outputs are bit for bit the same as without a record. Records are kept in float32 in CPU memory. The largest are the
    self-attention weights of an encoder: one number for each pair of cells, head and layer.

    Args:
        model: a detector of ours, with or without REGO, or a result of :func:`regolite.interop.adapt`.
        names: names to record, or patterns as ``"decoder.*.cross"``; everything by default.

    Yields:
        The trace, which is filled when the model has run; see :mod:`regolite.tracing.trace`.

    Raises:
        UserError: the model has no attention, is compiled or is already being recorded, its attention cannot be
            intercepted, a pattern matches no name of the model, or the model runs a second time.
    """
    of_kind("model", model, nn.Module, "a detector: regolite.load and regolite.build give one")
    recorder = _Recorder(model, [names] if isinstance(names, str) else list(names))
    if not _watched.isdisjoint(model.modules()):
        raise UserError("the model is already being recorded: close that record before the next one")
    with ExitStack() as stack:
        recorder.attach(stack)
        yield recorder.trace


@dataclass
class _Pass:
    """State of the current forward pass.

    Attributes:
        images: the input of the model.
        frame: their sizes.
        running: the name of the running attention, or None.
        seen: the weights that it has computed so far.
        memory: the memory or grid of the running layer, if it is one of ours.
        maps: for each dense attention, the weights and the memory of every call; SMCA has one call per level.
        levels: weights of the levels for each query of an SMCA layer, by the name of the attention.
        records: finished records.
    """

    images: ImageBatch
    frame: Frame
    running: str | None = None
    seen: list[Tensor] = field(default_factory=list)
    memory: Memory | Grid | None = None
    maps: dict[str, list[tuple[list[Tensor], Memory | Grid | None]]] = field(default_factory=dict)
    levels: dict[str, Float[Tensor, "B Q L"]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)


class _Recorder(TorchFunctionMode):
    """Records one model; it is also the function mode that intercepts kernels."""

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        super().__init__()
        if hasattr(model, "_orig_mod"):
            raise UserError("a compiled model cannot be recorded: record model._orig_mod, the model that was compiled")
        self.model, self.patterns, self.trace = model, patterns, Trace()
        self.now: _Pass | None = None  # no pass runs
        self.contract = as_detector(model)
        self.stages = [stage for stage in model.modules() if isinstance(stage, Stage)]
        self.attentions = dict(self.contract.named_attentions())
        if all(name.startswith("stage.") for name in self.attentions):
            raise UserError(f"a {type(model).__name__} has no attention to record; record a detection transformer")
        self.names = self._possible_names()
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.names):
                raise UserError(
                    f"names={pattern!r} matches no record of this model; {did_you_mean(pattern, self.names)}"
                )

    def wanted(self, name: str) -> bool:
        """Whether to record this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def _possible_names(self) -> list[str]:
        """All names that can be recorded of this model, in the order of computation."""
        encoder = [name for name in self.attentions if name.startswith("encoder.")]
        names = ["proposals", *encoder, "references"]
        for layer in range(self._decoder_layers):
            names += [f"decoder.{layer}.{part}" for part in ("self", "cross", "boxes")]
        for number, stage in enumerate(self.stages, start=1):
            names.append(f"stage.{number}.glimpses")
            names += [name for name in self.attentions if name.startswith(f"stage.{number}.")]
            names += [f"stage.{number}.boxes.{layer}" for layer in range(len(stage.decoder.layers))]
        return names

    @property
    def _decoder_layers(self) -> int:
        return sum(name.startswith("decoder.") and name.endswith(".self") for name in self.attentions)

    # Attaching.

    def attach(self, stack: ExitStack) -> None:
        """Register hooks and the function mode; closing the stack removes them."""

        def hook(module: nn.Module, function: Callable[..., None]) -> None:
            """Call ``function(arguments, output)`` after the module."""
            listen = module.register_forward_hook(lambda m, args, output: function(args, output))
            stack.callback(listen.remove)

        def before(module: nn.Module, function: Callable[..., None]) -> None:
            """Call ``function(*arguments)`` before it."""
            call = module.register_forward_pre_hook(lambda m, args, more: function(*args, **more), with_kwargs=True)
            stack.callback(call.remove)

        before(self.model, self._begin)
        hook(self.model, lambda args, output: self._finish(output))
        for name, (layer, attention) in self.attentions.items():
            if not self.wanted(name):
                continue
            if isinstance(attention, DeformableAttention):
                hook(attention, partial(self._see_sampling, name, attention))
            elif hasattr(attention, "sampling_offsets"):
                self._watch_their_sampling(name, attention, hook, before)
            else:
                before(layer, self._see_memory)
                before(attention, lambda *_, name=name, **__: self._enter(name))
                hook(attention, lambda *_, name=name: self._leave(name))
                if isinstance(layer, SmcaDecoderLayer) and layer.selection is not None and name.endswith(".cross"):
                    hook(layer.selection, lambda _, output, name=name: self._weigh_levels(name, output))
        for number, stage in enumerate(self.stages, start=1):
            if self.wanted(f"stage.{number}.glimpses"):
                before(
                    stage,
                    lambda *given, number=number, stage=stage, query_mask=None: self._see_glimpses(
                        number, stage, *given
                    ),
                )

        watched = {self.model, *(attention for _, attention in self.attentions.values())}
        _watched.update(watched)
        stack.callback(_watched.difference_update, watched)
        stack.enter_context(self)

    def _watch_their_sampling(self, name: str, attention: nn.Module, hook: Callable, before: Callable) -> None:
        """Deformable attention of transformers: from its inputs and the outputs of its two projections."""
        given: dict[str, Any] = {}
        before(attention, lambda *_, **more: given.update(more))
        hook(attention.sampling_offsets, lambda _, output: given.update(offsets=output))
        hook(attention.attention_weights, lambda _, output: given.update(weights=output))

        def finish(args: Any, output: Any) -> None:
            shapes, references = given["spatial_shapes_list"], given["reference_points"]
            references = references.expand(-1, -1, len(shapes), -1)  # RT-DETR has one for all levels
            read = their_sampling(attention, given["offsets"], given["weights"], references, shapes)
            self._keep_sampling(name, *read, references, shapes)
            given.clear()

        hook(attention, finish)

    # While the model runs.

    @no_type_check  # called for every operation of PyTorch, where the tests would check each call
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept the computation of a recorded attention; other calls are unchanged."""
        output = func(*args, **(kwargs or {}))
        if self.now is not None and self.now.running is not None:
            if func is F.scaled_dot_product_attention:
                self.now.seen.append(dense_weights(*args, **(kwargs or {})))
            elif func in SOFTMAX:
                self.now.seen.append(copied(output))
        return output

    def _begin(self, images: ImageBatch, *args: Any, **kwargs: Any) -> None:
        if self.trace.filled:
            raise UserError(
                "a record holds one forward pass, and the model runs a second time: use one record for each pass"
            )
        original = images.sizes if images.original_sizes is None else images.original_sizes
        images = self.contract.base_detector.padded(images)
        height, width = images.mask.shape[1:]
        frame = Frame((height, width), copied(images.sizes), copied(original))
        self.now = _Pass(images, frame)

    def _see_memory(self, *args: Any, **kwargs: Any) -> None:
        if self.now is not None:
            self.now.memory = next((x for x in (*args, *kwargs.values()) if isinstance(x, (Memory, Grid))), None)

    def _enter(self, name: str) -> None:
        if self.now is not None:
            self.now.running, self.now.seen = name, []

    def _leave(self, name: str) -> None:
        if self.now is not None:
            self.now.maps.setdefault(name, []).append((self.now.seen, self.now.memory))
            self.now.running = None

    def _weigh_levels(self, name: str, logits: Tensor) -> None:
        if self.now is not None:
            self.now.levels[name] = copied(logits.softmax(-1))

    def _see_sampling(self, name: str, attention: DeformableAttention, args: tuple[Any, ...], output: Tensor) -> None:
        queries, memory, references = args
        with torch.no_grad():
            locations, weights = attention.sampling(queries, memory.shapes, references)
        self._keep_sampling(name, locations, weights, references, memory.shapes)

    def _keep_sampling(
        self, name: str, locations: Tensor, weights: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> None:
        if self.now is not None:
            maps = tuple((int(h), int(w)) for h, w in shapes)
            self.now.records[name] = Sampling(
                copied(locations), copied(weights), copied(references), maps, self.now.frame
            )

    def _see_glimpses(
        self, number: int, stage: Stage, features: list, sizes: Tensor, hidden: Tensor, boxes: Tensor
    ) -> None:
        if self.now is not None:
            strides = tuple(f.stride for f in features)
            regions = stage.regions(boxes, sizes).float()
            level = choose_level(regions.nan_to_num(), strides)  # as cut_glimpses chooses
            glimpses = Glimpses(copied(regions), copied(level), strides, self.now.frame)
            self.now.records[f"stage.{number}.glimpses"] = glimpses

    def _finish(self, output: DetectorOutput) -> None:
        """Fill the trace, outside of inference mode."""
        now, self.now = self.now, None
        assert now is not None  # _begin has run
        with torch.inference_mode(False), torch.no_grad():
            self._fill(output, now)

    def _fill(self, output: DetectorOutput, now: _Pass) -> None:
        records = now.records
        for name in list(now.maps):
            records[name] = self._map(name, now.maps.pop(name), now)
        if output.references is not None and self.wanted("references"):
            records["references"] = References(copied(output.references), now.frame)

        layers, proposals = list(output.layers), output.proposals
        if proposals is not None:  # only the first logit is used: "object"
            records["proposals"] = self._boxes(Prediction(proposals.logits[..., :1], proposals.boxes), now, "sigmoid")
        elif len(layers) > self._decoder_layers:  # RT-DETR and its successors: the first is the encoder's selection
            records["proposals"] = self._boxes(layers[0], now)
            layers = layers[-self._decoder_layers :]
        for layer, prediction in enumerate(layers):
            records[f"decoder.{layer}.boxes"] = self._boxes(prediction, now)
        for number, stage in enumerate(output.stages, start=1):
            for layer, prediction in enumerate(stage):
                records[f"stage.{number}.boxes.{layer}"] = self._boxes(prediction, now)

        config = self.contract.model_config
        kept = {name: records[name] for name in self.names if name in records and self.wanted(name)}
        self.trace.fill(kept, now.frame, () if config is None else config.classes)

    def _boxes(self, prediction: Prediction, now: _Pass, scoring: Scoring | None = None) -> Boxes:
        scoring = self.contract.scoring if scoring is None else scoring
        return Boxes(copied(prediction.logits), copied(prediction.boxes), scoring, now.frame)

    def _map(self, name: str, calls: list[tuple[list[Tensor], Memory | Grid | None]], now: _Pass) -> Record:
        """The record of a dense attention, from all weights that its module computed."""
        attention = self.attentions[name][1]
        wanted = 2 if isinstance(attention, RowColumnAttention) else 1
        if any(len(seen) != wanted for seen, _ in calls):
            raise UserError(f"{name}: the attention weights of {type(attention).__name__} cannot be recorded")
        if isinstance(attention, RowColumnAttention):
            [((columns, rows), grid)] = calls
            assert isinstance(grid, Grid)  # the input of every layer of Anchor DETR
            height, width = grid.mask.shape[1:]
            return RowColumnMap(columns, rows, ((height, width),), copied(grid.mask.flatten(1)), now.frame)

        parts = [seen[0] for seen, _ in calls]
        parts = [p if p.dim() == 4 else p.unflatten(0, (now.images.pixels.shape[0], -1)) for p in parts]
        if name.startswith("stage.") or name.endswith(".self"):  # attention among queries
            return AttentionMap(parts[0], (), None, now.frame)
        if name.startswith("encoder.") and len(parts) > 1:  # SMCA: self-attention within each level
            memories = [memory for _, memory in calls if isinstance(memory, Memory)]
            masks = [memory.mask for memory in memories if memory.mask is not None]
            shapes = tuple(shape for memory in memories for shape in memory.shapes)
            weights = parts[0].new_zeros(*parts[0].shape[:2], *2 * [sum(p.shape[2] for p in parts)])
            start = 0
            for part in parts:
                end = start + part.shape[2]
                weights[:, :, start:end, start:end] = part
                start = end
            return AttentionMap(weights, shapes, copied(torch.cat(masks, 1)), now.frame)
        if name in now.levels:  # SMCA: attention to each level, and weights of the levels
            shares = now.levels[name][:, None, :, None].unbind(-1)
            parts = [torch.cat([part * share for part, share in zip(parts, shares)], -1)]
        shapes, mask = _cells(parts[0].shape[-1], calls[0][1], now, self.contract.base_detector)
        return AttentionMap(parts[0], shapes, mask, now.frame)


def _cells(
    count: int, memory: Memory | Grid | None, now: _Pass, detector: Detector
) -> tuple[tuple[tuple[int, int], ...], Tensor | None]:
    """The shapes of the maps that are attended to, and their padding mask."""
    if isinstance(memory, Memory):
        return tuple(memory.shapes), None if memory.mask is None else copied(memory.mask)
    # Models of transformers attend to one map and do not expose its shape: find the stride with this number of cells.
    stride, (height, width) = 1, now.frame.padded
    while (-(-height // stride)) * (-(-width // stride)) > count:
        stride *= 2
    shape = (-(-height // stride), -(-width // stride))
    if shape[0] * shape[1] != count:
        raise UserError(f"{count} keys form no map of a batch of {height} x {width} pixels: their cells are unknown")
    masked = isinstance(detector, TransformersDetector) and detector.family.masks_padding
    return (shape,), copied(shrink(now.images.mask, shape).flatten(1)) if masked else None
