"""Checkers of notebook 11, the recurrent decoder: equation (4), the loop over the stages, Stage, Rego, other ratios."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regolite.boxes import enlarge, inverse_sigmoid, to_pixels
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data import batch_images
from regolite.models.glimpse import cut_glimpses
from regolite.models.presets import build
from regolite.models.rego import Rego, RegoConfig, Stage
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction


@exercise(
    "11.1",
    "Which function has boxes in [0, 1] as its output, and what is its inverse?",
    "Convert the boxes to logits, add, and convert back.",
    "(inverse_sigmoid(boxes) + change).sigmoid()",
)
def correct(answer: Callable[..., Any]) -> str:
    """``answer(boxes, change)``: equation (4) for boxes."""
    boxes, change = torch.rand(2, 6, 4) * 0.98 + 0.01, 3 * torch.randn(2, 6, 4)
    found = answer(boxes, change)
    same_shape("the corrected boxes", found, (2, 6, 4))
    wanted = (inverse_sigmoid(boxes) + change).sigmoid()
    mistakes = (
        (boxes, "the boxes are unchanged: the change is not used."),
        (
            boxes + change,
            "the change was added to the boxes directly, so boxes leave the image: add before the sigmoid.",
        ),
        (
            (boxes + change).clamp(0, 1),
            "a clamped sum stays in [0, 1], but has no gradient at both ends: use logits.",
        ),
        (
            (boxes + change).sigmoid(),
            "the sigmoid was applied to the box itself: without a change, 0.5 would become 0.62.",
        ),
        ((boxes + change.sigmoid()), "the change is a change of logits; its own sigmoid has no meaning."),
        (inverse_sigmoid(boxes) + change, "these are still logits: take their sigmoid at the end."),
    )
    for wrong, message in mistakes:
        if alike(found, wrong) and not alike(found, wanted):
            raise Mistake(message)
    close("the corrected boxes", found, wanted)
    edge = torch.tensor([0.0, 0.5, 1.0, 1.0])
    if not answer(edge, torch.zeros(4)).isfinite().all():
        raise Mistake("a box with a 0 or a 1 gives infinity: clamp with a small eps, as inverse_sigmoid does.")
    if not answer(torch.full((4,), 0.3), torch.zeros(4, requires_grad=True)).requires_grad:
        raise Mistake("the change has no gradient: the box head could not learn.")
    return "All four numbers stay in [0, 1], and a small box is corrected in small steps."


class _Recorder:
    """A stage that records its inputs and shifts every box by a known amount in each of its two layers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weight = torch.tensor(0.1, requires_grad=True)
        self.called = False
        self.boxes = self.hidden = torch.empty(0)

    def __call__(self, features: Any, sizes: Tensor, hidden: Tensor, boxes: Tensor) -> tuple[list[Prediction], Tensor]:
        self.called, self.boxes, self.hidden = True, boxes, hidden
        logits = hidden.sum(-1, keepdim=True)
        layers = [Prediction(logits, (inverse_sigmoid(boxes) + n * self.weight).sigmoid()) for n in (1, 2)]
        return layers, torch.cat([hidden, hidden[..., :3] + self.number], -1)


@exercise(
    "11.2",
    "Which prediction of a stage is O_box(i): that of its first or its last decoder layer?",
    "What does appendix A.1 say about gradients into the outputs of the previous stage?",
    "stage(features, sizes, hidden, boxes.detach()), and boxes = predictions[-1].boxes.",
)
def run_stages(answer: Callable[..., Any]) -> str:
    """``answer(stages, features, sizes, hidden, boxes)``: predictions by stage, and the last hidden states."""
    stages = [_Recorder(i) for i in (1, 2, 3)]
    start = torch.rand(1, 4, 4, requires_grad=True)
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    sizes = torch.tensor([[32, 32]])
    result = answer(stages, [], sizes, hidden, start)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Mistake("the loop should return a pair: the predictions of all stages, and the last hidden states.")
    found, last = result
    if not all(stage.called for stage in stages):
        raise Mistake("not every stage was called.")
    if not isinstance(found, list) or len(found) != 3 or any(len(layers) != 2 for layers in found):
        raise Mistake("the first returned value should be a list of each stage's predictions by layer.")
    for before, stage in zip(stages, stages[1:]):
        where = f"stage {stage.number} should get"
        first, final = (p.boxes for p in found[before.number - 1])
        if alike(stage.boxes, start):
            raise Mistake(f"{where} the boxes of stage {before.number}, but gets those of the base detector.")
        if alike(stage.boxes, first) and not alike(stage.boxes, final):
            raise Mistake(f"{where} O_box({before.number}), but gets other boxes of stage {before.number}.")
        close(f"the boxes of stage {stage.number}", stage.boxes, final.detach())
        same_shape(f"the hidden states that stage {stage.number} gets", stage.hidden, (1, 4, 3 * stage.number))
        if not stage.hidden.requires_grad:
            raise Mistake("the hidden states were detached between stages: the stages decide that, not the loop.")
    same_shape("the hidden states at the end", last, (1, 4, 12))
    for stage in stages:
        if stage.boxes.requires_grad:
            raise Mistake(
                f"the boxes that stage {stage.number} gets are not detached: its loss would change the previous boxes."
            )
    if not found[-1][-1].boxes.requires_grad:
        raise Mistake("the returned predictions are detached: they could not be trained.")
    return "Each stage starts from the previous stage's last prediction, without gradients into its boxes."


def _fill(module: nn.Module) -> None:
    """Random weights for all layers, so that no head starts at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)


def _copy_weights(name: str, own: Any, reference: nn.Module, known: Mapping[str, str]) -> None:
    """Copy the reference's weights into the answer's module; names and shapes must be the same.

    Args:
        name: the class, for the message.
        own: the learner's module.
        reference: the package's module.
        known: for a part of a weight's name, what its absence or presence means.
    """
    if not isinstance(own, nn.Module):
        raise Mistake(f"{name} should be a class derived from nn.Module.")
    wanted, found = reference.state_dict(), own.state_dict()
    for key in [*(k for k in wanted if k not in found), *(k for k in found if k not in wanted)]:
        for part, message in known.items():
            if part in f"{key} {'missing' if key in wanted else 'extra'}":
                raise Mistake(message)
    if missing := [key for key in wanted if key not in found]:
        raise Mistake(f"{name} has no weight named {missing[0]}: use the names of the specification.")
    if extra := [key for key in found if key not in wanted]:
        raise Mistake(f"{name} has a weight {extra[0]} that the package's does not have.")
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            raise Mistake(f"{key} has shape {tuple(found[key].shape)}, but should have {tuple(value.shape)}.")
    own.load_state_dict(wanted)


class _World:
    """Feature maps of two images of different sizes in one batch, hidden states and boxes of five queries."""

    def __init__(self, number: int = 2, dim: int = 16) -> None:
        self.sizes = torch.tensor([[64, 96], [64, 64]])
        self.features = []
        for stride in (8, 16, 32):
            mask = torch.zeros(2, 64 // stride, 96 // stride, dtype=torch.bool)
            mask[1, :, 64 // stride :] = True
            tensor = torch.randn(2, dim, *mask.shape[1:]).masked_fill(mask[:, None], 0.0)
            self.features.append(FeatureMap(tensor, mask, stride))
        self.hidden = torch.randn(2, 5, number * dim)
        centers, sizes = torch.rand(2, 5, 2) * 0.6 + 0.2, torch.rand(2, 5, 2) * 0.4 + 0.1
        self.boxes = torch.cat([centers, sizes], -1)

    @property
    def inputs(self) -> tuple[list[FeatureMap], Tensor, Tensor, Tensor]:
        return self.features, self.sizes, self.hidden, self.boxes


def _stage_with(stage: Stage, world: _World, flaw: str) -> tuple[list[Prediction], Tensor]:
    """The outputs of a stage with a flaw; with an unknown name, those of the stage."""
    features, sizes, hidden, boxes = world.inputs
    alpha = {"no alpha": 1.0, "alpha is the number": 2.0, "alpha of the next": stage.config.ratios[2]}.get(flaw)
    larger = enlarge(boxes, stage.alpha if alpha is None else alpha)
    whole = sizes.amax(0).expand_as(sizes)
    regions = larger if flaw == "no pixels" else to_pixels(larger, whole if flaw == "padded size" else sizes)
    vectors = stage.glimpse(cut_glimpses(features, regions)).unflatten(0, boxes.shape[:2])
    known = stage.condense(hidden)
    known = known if flaw == "no condense_norm" else stage.condense_norm(known)
    asks, answers = (known, vectors) if flaw == "hidden states ask" else (vectors, known)
    if flaw == "glimpses alone":
        answers = vectors
    positions = answers if flaw == "positions" else torch.zeros_like(answers)
    translated = stage.decoder(asks, 0.0, Memory(answers, positions, None, []))
    predictions, logit = [], inverse_sigmoid(boxes)
    for h, fuse, norm in zip(translated, stage.fuse, stage.fuse_norms):
        h = translated[-1] if flaw == "last layer twice" else h
        fused = fuse(torch.cat([h, hidden] if flaw == "fuse order" else [hidden, h], -1))
        fused = fused if flaw == "no fuse_norm" else norm(fused)
        correction = stage.box_head(fused)
        new = (inverse_sigmoid(boxes) if flaw == "not summed" else logit) + correction
        new = correction if flaw == "no correction" else new
        predictions.append(Prediction(stage.class_head(fused), new.sigmoid()))
        if flaw == "direct":
            predictions[-1] = Prediction(predictions[-1].logits, boxes + correction)
        logit = new
    return predictions, torch.cat([hidden, translated[-1]], -1)


STAGE_FLAWS = {
    "no alpha": "the boxes are not enlarged before the glimpses are cut: R(O_box(i-1), alpha(i)), with self.alpha.",
    "alpha is the number": "alpha is not the number of the stage: it is config.ratios[number - 1].",
    "alpha of the next": "alpha is that of the next stage: numbers start at 1, indices of config.ratios at 0.",
    "no pixels": "the regions are in [0, 1] of the image, but cut_glimpses reads pixels: use to_pixels(boxes, sizes).",
    "padded size": "the regions are scaled by the padded size of the batch; boxes are relative to the unpadded image, "
    "whose size is in sizes.",
    "no condense_norm": "condense_norm is not applied to the keys and values.",
    "hidden states ask": "queries and memory are swapped: the glimpses V(i) attend to the hidden states H_dec(i-1).",
    "glimpses alone": "the glimpses attend to glimpses: the memory of equation (6) is the condensed H_dec(i-1).",
    "positions": "the keys have something added: this decoder has no position encoding, so memory.positions is 0.",
    "last layer twice": "every prediction reads the last decoder layer: layer n has its own H_g(i) and its own fuse.",
    "fuse order": "the halves of the concatenation are swapped: [H_dec(i-1), H_g(i)], so that trained weights fit.",
    "no fuse_norm": "the LayerNorm after fuse is not applied.",
    "not summed": "the second layer starts from the boxes of the previous stage: its correction is added to the box of "
    "the first layer.",
    "no correction": "the boxes are predicted without O_box(i-1): equation (4) adds a correction to its logits.",
    "direct": "the correction is added to the boxes themselves: add it to their logits, then take the sigmoid.",
}


@exercise(
    "11.3",
    "The section 'One stage by hand' has every line of forward; replace `stage.` by `self.`.",
    "__init__: RegoConfig has ratios, dropout, ffn_dim and decoder_layers. Build the layers in the order of the table.",
    "forward: regions, vectors, known, Memory(known, zeros, query_mask, []), self.decoder(vectors, 0.0, memory, "
    "query_mask); then for each layer cat, fuse, norm, heads; return predictions and cat([hidden, translated[-1]]).",
)
def build_stage(answer: Callable[..., Any]) -> str:
    """``answer(config, number, dim, heads, num_logits, scoring)``: the class :class:`regolite.models.rego.Stage`."""
    fields: dict[str, Any] = {"stages": 3, "alphas": (2.5, 1.5, 0.8), "ffn_dim": 32, "dropout": 0.0}
    config, world = RegoConfig(**fields), _World()
    reference = Stage(config, 2, 16, 4, 3, "sigmoid").eval()
    fresh = answer(config, 2, 16, 4, 3, "sigmoid")
    for number, ratio in enumerate(config.ratios, 1):
        alpha = getattr(answer(config, number, 16, 4, 3, "sigmoid"), "alpha", None)
        if alpha == config.ratios[-number] != ratio:
            raise Mistake("alpha is counted from the last stage: the first stage has the first entry of config.ratios.")
    _copy_weights("Stage", copy.deepcopy(fresh), reference, STAGE_WEIGHTS)
    _check_start(answer, fresh.eval(), config, world)

    _fill(reference)
    own = fresh
    own.load_state_dict(reference.state_dict())
    wanted, states = reference(*world.inputs)
    result = own(*world.inputs)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], list):
        raise Mistake("forward should return a pair: the list of predictions by decoder layer, and H_dec(i).")
    found, last = result
    if len(found) != len(wanted):
        raise Mistake(f"there should be a prediction of each of the {len(wanted)} decoder layers, not {len(found)}.")
    _compare_predictions(found, wanted, lambda flaw: _stage_with(reference, world, flaw)[0], STAGE_FLAWS)
    _check_states(last, states, world.hidden)

    single = RegoConfig(**fields, decoder_layers=1)
    if len(answer(single, 1, 16, 4, 3, "sigmoid")(*_World(1).inputs)[0]) != 1:
        raise Mistake("the number of decoder layers is config.decoder_layers, not always 2.")
    _check_query_mask(own, reference, world)
    _check_gradients(answer, reference, fields, world)
    dropping = answer(RegoConfig(**(fields | {"dropout": 0.5})), 2, 16, 4, 3, "sigmoid").train()
    first, second = (dropping(*world.inputs)[0][-1].logits for _ in range(2))
    if torch.equal(first, second):
        raise Mistake("config.dropout is not used: the layers of the decoder drop nothing in training.")
    return "One stage of REGO: it takes what it returns, so stages can be chained."


STAGE_WEIGHTS = {
    "condense.bias extra": "condense has no bias: the LayerNorm after it has one.",
    "decoder.norm": "the Decoder needs the LayerNorm between its layers and the heads: Decoder(layers, "
    "norm=nn.LayerNorm(dim)).",
    "fuse.weight": "fuse should be an nn.ModuleList with one linear layer for each decoder layer, not one for all.",
    "fuse.0.weight missing": "fuse should be an nn.ModuleList with one linear layer for each decoder layer; a plain "
    "list is neither trained nor saved.",
    "fuse.0.bias extra": "the fuse layers have no bias: the LayerNorm after them has one.",
    "fuse_norms.0": "fuse_norms should be an nn.ModuleList with one LayerNorm for each decoder layer.",
    "class_heads": "both decoder layers share one class_head (and one box_head).",
}


def _check_start(answer: Callable[..., Any], fresh: Any, config: RegoConfig, world: _World) -> None:
    """A new stage repeats the boxes of the previous one, and its scores start at the focal loss's prior."""
    predictions = fresh(*world.inputs)[0]
    if isinstance(predictions, list) and predictions and hasattr(predictions[-1], "boxes"):
        if not alike(predictions[-1].boxes, world.boxes) and not fresh.box_head[-1].weight.any():
            close("the boxes of a new stage", predictions[-1].boxes, world.boxes, but=STAGE_FLAWS["no correction"])
        if fresh.box_head[-1].weight.any():
            raise Mistake(
                "a new stage should repeat the boxes that it gets: box_head(dim, size=0.0) starts its last layer at 0."
            )
    prior = -math.log(99)
    if not alike(fresh.class_head.bias, torch.full((3,), prior)):
        raise Mistake("with sigmoid scoring all scores should start at 0.01: class_head(dim, num_logits, prior=0.01).")
    if alike(answer(config, 1, 16, 4, 3, "softmax").class_head.bias, torch.full((3,), prior)):
        raise Mistake("the prior is for sigmoid scoring alone: with softmax, prior=None.")


def _compare_predictions(
    found: list[Prediction],
    wanted: list[Prediction],
    flawed: Callable[[str], list[Prediction]],
    flaws: Mapping[str, str],
) -> None:
    """Compare predictions with the reference, and recognize known flaws in the last one that differs."""

    def same(one: Prediction, other: Prediction) -> bool:
        return alike(one.logits, other.logits, 1e-3) and alike(one.boxes, other.boxes, 1e-3)

    for layer, (own, other) in enumerate(zip(found, wanted), start=1):
        same_shape(f"the logits of layer {layer}", own.logits, other.logits.shape)
        same_shape(f"the boxes of layer {layer}", own.boxes, other.boxes.shape)
    if all(same(own, other) for own, other in zip(found, wanted)):
        return
    for flaw, message in flaws.items():
        if all(same(own, other) for own, other in zip(found, flawed(flaw))):
            raise Mistake(message)
    layer, (own, other) = next((n, p) for n, p in enumerate(zip(found, wanted), start=1) if not same(*p))
    what = "boxes" if alike(own.logits, other.logits, 1e-3) else "class logits"
    raise Mistake(
        f"with the package's weights, the {what} of layer {layer} differ from the package's. Compare your intermediate "
        "results with those of the section 'One stage by hand'."
    )


def _check_states(last: Any, wanted: Tensor, before: Tensor) -> None:
    """H_dec(i) is [H_dec(i-1), H_g(i)]."""
    dim = wanted.shape[-1] - before.shape[-1]
    if alike(last, wanted[..., -dim:], 1e-3):
        raise Mistake("H_dec(i) is H_g(i) alone: equation (5) concatenates H_dec(i-1) and H_g(i).")
    same_shape("H_dec(i)", last, wanted.shape)
    if alike(last, torch.cat([wanted[..., -dim:], before], -1), 1e-3):
        raise Mistake("the halves of H_dec(i) are swapped: H_dec(i-1) first, as trained weights expect.")
    close("H_dec(i)", last, wanted, 1e-3, but="H_dec(i) differs: it is H_dec(i-1) and H_g(i) of the last layer.")


def _check_query_mask(own: Any, reference: Stage, world: _World) -> None:
    """Padded queries must be invisible to the others, in self-attention and in cross-attention."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, -2:] = True
    wanted = reference(*world.inputs, query_mask=mask)[0][-1].logits[:, :3]
    found = own(*world.inputs, query_mask=mask)[0][-1].logits[:, :3]
    if not alike(found, wanted, 1e-4):
        raise Mistake(
            "query_mask is not respected: give it to the decoder (for the self-attention) and to Memory (as the mask "
            "of the keys)."
        )


def _check_gradients(answer: Callable[..., Any], reference: Stage, fields: dict[str, Any], world: _World) -> None:
    """The gradient of the predictions into H_dec(i-1): as keys and values, unless detach_hidden."""

    def gradient(stage: Any) -> Tensor:
        hidden = world.hidden.clone().requires_grad_()
        predictions, last = stage.eval()(world.features, world.sizes, hidden, world.boxes)
        if not last.requires_grad:
            raise Mistake("H_dec(i) is detached: the stage detaches hidden only where the heads read it.")
        kept = last[..., : hidden.shape[-1]].sum()
        (through,) = torch.autograd.grad(kept, hidden, retain_graph=True, allow_unused=True)
        if through is None or not through.any():
            raise Mistake("the half of H_dec(i) that is H_dec(i-1) is detached: return it with its gradient.")
        earlier = stage.fuse[0].weight
        (through,) = torch.autograd.grad(predictions[-1].boxes.sum(), earlier, retain_graph=True, allow_unused=True)
        if through is None or not through.any():
            raise Mistake("the box logits are detached between the layers of the stage: their corrections add up.")
        (predictions[-1].logits.sum() + predictions[-1].boxes.sum()).backward()
        return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad

    for detach in (False, True):
        config = RegoConfig(**fields, detach_hidden=detach)
        own, theirs = (make(config, 2, 16, 4, 3, "sigmoid") for make in (answer, Stage))
        for stage in (own, theirs):
            stage.load_state_dict(reference.state_dict())
        found, wanted = gradient(own), gradient(theirs)
        if not alike(found, wanted, 1e-3):
            if detach:
                raise Mistake("config.detach_hidden is ignored: with True, condense reads hidden.detach().")
            if not found.any():
                raise Mistake("no gradient reaches H_dec(i-1): condense reads it undetached unless detach_hidden.")
            raise Mistake("the heads send gradients into H_dec(i-1): concatenate hidden.detach(), then fuse.")


def _two_images(sizes: tuple[tuple[int, int], ...] = ((64, 96), (96, 64))) -> ImageBatch:
    return batch_images([torch.randn(3, *size) for size in sizes], multiple=32)


def _small_base(preset: str) -> nn.Module:
    """A small base detector."""
    small = {"dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 32, "queries": 6}
    return build(preset, num_classes=4, **small).eval()


def _rego_with(rego: Rego, images: ImageBatch, flaw: str) -> list[list[Prediction]]:
    """The predictions of all stages with a flaw in the loop."""
    output = rego.detector(images)
    features = [FeatureMap(p(f.tensor), f.mask, f.stride) for p, f in zip(rego.projections, output.features)]
    sizes = images.sizes
    if flaw == "padded size":
        sizes = sizes.new_tensor(images.mask.shape[1:]).expand_as(sizes)
    found, hidden, boxes = [], output.queries, output.layers[-1].boxes
    if flaw == "first base layer":
        boxes = output.layers[0].boxes
    for stage in rego.stages:
        predictions, hidden = stage(features, sizes, hidden, boxes.detach())
        found.append(predictions)
        if flaw != "base boxes":
            boxes = predictions[0 if flaw == "first layer" else -1].boxes
    return found


REGO_FLAWS = {
    "base boxes": "every stage starts from the boxes of the base detector: stage i corrects those of stage i - 1.",
    "first layer": "a stage gets the boxes of the first layer of the stage before: O_box(i) is the last layer's.",
    "first base layer": "stage 1 starts from the base detector's first layer: O_box(0) is layers[-1].boxes.",
    "padded size": "the stages get the padded size of the batch: each image's own size is in images.sizes.",
}

REGO_WEIGHTS = {
    "stages.0.glimpse.window.weight missing": "Rego has no weights of stages: keep them as self.stages, in an "
    "nn.ModuleList, since a plain list is neither trained nor saved.",
    "projections.0.weight missing": "a detector with projected=False returns its backbone's maps: each needs a 1x1 "
    "convolution to dim channels, in self.projections.",
    "projections.0.weight extra": "a detector with projected=True has maps of dim channels: nn.Identity() for each.",
    "detector.class_head": "keep the base detector as self.detector.",
}


@exercise(
    "11.4",
    "__init__ registers three things: the detector, a projection of each map, and the stages with numbers from 1.",
    "forward: output = self.detector(images); project its features; then the loop of exercise 11.2 over "
    "self.stages[:stages], which appends each stage's predictions to output.stages.",
    "Stage(config, number, detector.dim, detector.heads, detector.num_logits, detector.scoring); "
    "FeatureMap(project(f.tensor), f.mask, f.stride); stage(features, images.sizes, hidden, boxes.detach()).",
)
def build_rego(answer: Callable[..., Any]) -> str:
    """``answer(detector, config)``: the class :class:`regolite.models.rego.Rego`."""
    config, images = RegoConfig(stages=3, alphas=(3.0, 1.5, 1.0), ffn_dim=32, dropout=0.0), _two_images()
    for preset in ("deformable_detr_scenes", "detr_scenes"):
        detector = _small_base(preset)
        reference = Rego(detector, config).eval()
        _fill(reference.stages)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without inputs: stage 0
            own = answer(detector, config)
        if (
            isinstance(own, nn.Module)
            and own.state_dict().get("stages.0.condense.weight", torch.ones(1, 32)).numel() == 0
        ):
            raise Mistake("the numbers of the stages start at 1, not at 0.")
        _copy_weights("Rego", own, reference, REGO_WEIGHTS)
        for name in ("dim", "scoring", "num_logits"):
            if getattr(own, name, None) != getattr(detector, name):
                raise Mistake(f"Rego should have the detector's {name}: the loss and the evaluation read it.")
        if getattr(own, "config", None) != config:
            raise Mistake("keep the configuration as self.config.")
        own.eval()
        with torch.no_grad():
            wanted, found = reference(images), _run_rego(own, images)
            _compare_rego(found, wanted, functools.partial(_rego_with, reference, images))
            _check_stages_argument(own, reference, images)
        _check_detached(own, images)
    return "Your REGO stands on DETR and on Deformable DETR and gives the package's outputs."


def _run_rego(own: Any, images: ImageBatch, **given: Any) -> DetectorOutput:
    try:
        output = own(images, **given)
    except RuntimeError as error:
        if "shapes cannot be multiplied" in str(error):
            raise Mistake(
                "a stage gets hidden states of the wrong width: H_dec(i-1), which the stage before returned, has "
                "i * dim channels."
            ) from None
        raise
    if not isinstance(output, DetectorOutput):
        raise Mistake(
            "forward should return the detector's output, a DetectorOutput, with the stages' predictions in it."
        )
    return output


def _compare_rego(
    found: DetectorOutput, wanted: DetectorOutput, flawed: Callable[[str], list[list[Prediction]]]
) -> None:
    if not found.stages:
        raise Mistake("the output has no stages: append each stage's list of predictions to output.stages.")
    if not all(isinstance(stage, list) for stage in found.stages):
        raise Mistake("output.stages should hold one list of predictions for each stage: append, do not extend.")
    if len(found.stages) != len(wanted.stages):
        raise Mistake(f"there should be {len(wanted.stages)} stages in the output, not {len(found.stages)}.")
    if not alike(found.layers[-1].boxes, wanted.layers[-1].boxes):
        raise Mistake("the base detector's own predictions, output.layers, should stay as they are.")
    own, theirs = ([p for stage in output.stages for p in stage] for output in (found, wanted))
    _compare_predictions(own, theirs, lambda flaw: [p for stage in flawed(flaw) for p in stage], REGO_FLAWS)


def _check_stages_argument(own: Any, reference: Rego, images: ImageBatch) -> None:
    for stages in (0, 1):
        output = _run_rego(own, images, stages=stages)
        if len(output.stages) != stages:
            said = "stages=0 should switch REGO off" if stages == 0 else "stages=1 should run the first stage only"
            raise Mistake(f"{said}, but {len(output.stages)} stages ran. Beware: 0 is false, None means all.")
    if not torch.equal(_run_rego(own, images, stages=0).final.boxes, reference(images, stages=0).final.boxes):
        raise Mistake("with stages=0 the output should be the base detector's, bit for bit.")


def _check_detached(own: Any, images: ImageBatch) -> None:
    """No stage's loss reaches the boxes of the base detector or of the stage before."""
    own.zero_grad()
    output = own(images)
    if not output.final.boxes.requires_grad:
        raise Mistake("the predictions have no gradient: nothing could be trained. Is there a no_grad in forward?")
    output.final.boxes.sum().backward()
    heads = [p for name, p in own.named_parameters() if "box_head" in name and "stages.2." not in name]
    if any(p.grad is not None and p.grad.any() for p in heads):
        raise Mistake("the boxes are not detached: the loss of stage 3 changes the box heads before it.")
    if not any(p.grad is not None and p.grad.any() for p in own.stages[1].decoder.parameters()):
        raise Mistake("the hidden states are detached in the loop: the stages decide where gradients stop.")
    base = [p for name, p in own.detector.named_parameters() if "decoder" in name and "head" not in name]
    if not any(p.grad is not None and p.grad.any() for p in base):
        raise Mistake("H_dec(0) is detached: no stage trains the base decoder. The stages decide where gradients stop.")


@exercise(
    "11.5",
    "Each stage keeps its ratio: model.stages[i].alpha. What has to happen after the model has run?",
    "Save the old ratios, set the new ones, run the model, and restore the old ones in any case (`finally`).",
    "old = [s.alpha for s in model.stages]; try: set the new ones, run under no_grad; finally: set the old ones.",
)
def with_alphas(answer: Callable[..., Any]) -> str:
    """``answer(model, images, alphas)``: the output with other ratios, the model as before."""
    small = {
        "dim": 32,
        "heads": 4,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
        "detector.ffn_dim": 32,
        "queries": 6,
    }
    model = build("rego_deformable_detr_scenes", num_classes=4, rego={"ffn_dim": 32}, **small).eval()
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    images = batch_images([torch.randn(3, 64, 96)], multiple=32)

    def run(alphas: tuple[float, ...]) -> Tensor:
        for stage, alpha in zip(stages, alphas):
            stage.alpha = alpha
        with torch.no_grad():
            return torch.stack([p.logits for p in model(images).by_stage])

    trained, other = (3.0, 2.0, 1.0), (1.0, 4.0, 2.0)
    usual, backward, wanted = run(trained), run(other[::-1]), run(other)
    run(trained)
    output = answer(model, images, other)
    left = tuple(stage.alpha for stage in stages)
    if not hasattr(output, "by_stage"):
        raise Mistake("your function should return the model's output, a DetectorOutput.")
    found = torch.stack([p.logits for p in output.by_stage])
    same_shape("the logits of all stages", found, tuple(wanted.shape))
    if alike(found, usual):
        raise Mistake("the stages still use the ratios of the training: set stage.alpha of each.")
    if alike(found, backward):
        raise Mistake("the ratios are in the wrong order: alphas[0] belongs to stage 1.")
    close("the logits of all stages", found, wanted)
    if left != trained:
        raise Mistake(f"the model still has the ratios {left} afterwards: restore the old ones, {trained}.")
    if found.requires_grad:
        raise Mistake("the output requires gradients: run the model under torch.no_grad().")
    return "Now compare the results: the solutions do so on scenes."
