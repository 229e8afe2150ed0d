"""REGO on any detector of Hugging Face's transformers: what REGO asks of a base detector, read off their models.

:func:`adapt` wraps a model as it is. The wrapper runs it on an :class:`~regolite.types.ImageBatch` and gives a
full :class:`~regolite.types.DetectorOutput`::

    model = transformers.AutoModelForObjectDetection.from_pretrained("microsoft/conditional-detr-resnet-50")
    rego = regolite.Rego(regolite.interop.adapt(model), stages=3, frozen=True)

Families differ in three things, and :data:`FAMILIES` is the table of them:

- **predictions.** Their models answer with the last decoder layer alone; here the heads are applied to the states of
  the other layers too (equation 3). The last layer is their answer to the last bit.
- **features.** A model of one scale hands over the raw maps of its backbone's stages 2 to 5 (appendix A.1), though it
  reads the last of them alone; a multi-scale one the projected pyramid that its transformer reads. Hooks, set for the
  time of one forward pass, listen to the modules that make these maps.
- **padding.** Most hide it from their attention by a mask and let it into their convolutions, as the published models
  do, so that an image's boxes depend a little on its batch. RT-DETR has no mask: padding is black image to it, and
  its boxes are relative to the padded batch. They are put into the frame of the image here, where a box that was
  found on padding lies beyond 1.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError
from regolite.losses import LossConfig
from regolite.models.backbone import shrink
from regolite.models.baselines import COCO_CLASSES
from regolite.models.config import DetectorConfig, ModelConfig, register
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction
from regolite.utils.validation import shown, whole


@dataclass(frozen=True)
class TransformersConfig(DetectorConfig):
    """A detector of Hugging Face's transformers that :func:`adapt` has wrapped.

    Attributes:
        model_type: its family, as transformers calls it: ``detr``, ``conditional_detr``, ...
        json: its whole configuration, as transformers writes it.
    """

    model_type: str
    json: str


def adapt(model: nn.Module, num_classes: int | None = None) -> TransformersDetector:
    """Make a detector of transformers one that REGO can stand on.

    Args:
        model: a ``...ForObjectDetection`` of a family in :data:`FAMILIES`. It is used as it is, not copied: what trains
            the result trains it.
        num_classes: give it class heads for so many classes. Where it has another number, a copy is made whose class
            heads start anew, which is said in a warning, and whose other weights stay: a start for fine-tuning.

    Returns:
        The detector, with a ``model_config`` of the model's own classes, so that it can detect, be evaluated, trained,
        saved and loaded. Classes without names are called ``LABEL_0``, ..., as transformers calls them.

    Raises:
        UserError: when the model is no detector of transformers, or of a family that is not supported.
    """
    family = _family(model)
    if num_classes is not None and num_classes != model.config.num_labels:
        model = _with_fresh_heads(model, num_classes, family)
    return TransformersDetector(model)


class TransformersDetector(nn.Module):
    """A detector of transformers as REGO's base detector.

    Args:
        model: theirs.

    Attributes:
        dim: channels of the hidden states.
        heads: attention heads of the decoder.
        scoring: how logits become scores.
        num_logits: logits per query, K or K + 1.
        feature_channels: channels of the maps in :attr:`DetectorOutput.features`.
        projected: whether these maps are projections to ``dim`` channels, or the backbone's own.

    Raises:
        UserError: as :func:`adapt`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.family = family = _family(model)
        self.model, config = model, model.config
        self.dim, self.heads, self.scoring = config.hidden_size, config.decoder_attention_heads, family.scoring
        self.num_logits = config.num_labels + (family.scoring == "softmax")
        self.projected = family.pyramid is not None
        self.feature_channels = [channels for _, channels in self._map_makers()]
        classes = tuple(str(config.id2label.get(label, label)) for label in range(config.num_labels))
        self.model_config = ModelConfig(
            f"transformers:{config.model_type}",
            TransformersConfig(config.model_type, json.dumps(config.to_dict(), sort_keys=True)),
            loss=LossConfig(label=1.0) if family.scoring == "softmax" else LossConfig(),
            image_size=800 if family.masks_padding else 640,
            classes=classes,
            category_ids=_category_ids(classes),
        )

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect.

        Raises:
            UserError: when the strides of the feature maps do not double from map to map.
        """
        pixels = images.pixels
        if not self.family.normalized:
            mean, deviation = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
            pixels = (pixels * deviation + mean).masked_fill(images.mask[:, None], 0.0)
        options = {"output_hidden_states": True} if self.family.asks_states else {}
        with _listening([module for module, _ in self._map_makers()]) as heard:
            out = self.model.model(pixels, pixel_mask=(~images.mask).long(), return_dict=True, **options)
        layers, proposals = self.family.read(self.model, out)
        if not self.family.masks_padding:
            layers = [Prediction(p.logits, _unpad(p.boxes, images)) for p in layers]
        return DetectorOutput(layers, out.last_hidden_state, _feature_maps(heard, images), proposals)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Part tied heads for which the weights hold different values, as transformers does when it loads a model.

        A new refined Deformable DETR has one class head for all its decoder layers, a published one has one for each.
        """
        values = {
            name: state_dict.get(f"{prefix}model.{name}", parameter)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }

        def alike(name: str, other: str) -> bool:
            return torch.equal(values[name], values[other])

        _part(self.model, alike)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _map_makers(self) -> list[tuple[nn.Module, int]]:
        """The modules whose outputs are the feature maps, finest first, and the channels of these."""
        base = self.model.model
        if self.family.pyramid is not None:
            return [(module, self.dim) for module in getattr(base, self.family.pyramid)]
        encoder = getattr(base.backbone, "conv_encoder", base.backbone)
        network = getattr(encoder.model, "_backbone", encoder.model)
        if hasattr(network, "feature_info"):  # timm's; the first of its maps has stride 2, which REGO does not read
            stages = [(info["module"], info["num_chs"]) for info in network.feature_info.info if info["reduction"] > 2]
            modules = dict(network.named_children())
            found = [(modules[name], channels) for name, channels in stages if name in modules]
        else:  # transformers' own: ResNet, ConvNeXt and others; channels of the stem stand first
            stages = getattr(getattr(network, "encoder", None), "stages", ())
            found = list(zip(stages, (network.num_features or [])[1:]))
        # Of a backbone that hides its stages, the maps that it returns, often the last one alone.
        return found or [(encoder, channels) for channels in encoder.intermediate_channel_sizes]


@register("transformers", TransformersConfig)
def from_config(config: TransformersConfig, num_classes: int) -> TransformersDetector:
    """The detector that a configuration describes, with random weights; nothing is downloaded.

    Raises:
        UserError: when transformers is not installed, or knows no such model, or a number in the configuration is
            beyond all reason.
    """
    transformers = _transformers()
    try:
        described = json.loads(config.json)
        if not isinstance(described, dict):
            raise UserError(f"it is {shown(described)}, and no JSON object")
        _check_numbers(described, "it")
    except (ValueError, RecursionError) as error:
        raise UserError(f"the configuration of this {shown(config.model_type)} cannot be used: {error}") from error
    try:
        for part in (described, described.get("backbone_config") or {}):
            if "use_pretrained_backbone" in part:
                part["use_pretrained_backbone"] = False
        theirs = transformers.AutoConfig.for_model(config.model_type, **_without(described, "model_type"))
        if theirs.num_labels != num_classes:
            theirs.num_labels = num_classes
        return TransformersDetector(transformers.AutoModelForObjectDetection.from_config(theirs))
    except Exception as error:  # whatever a configuration that nobody has checked makes of their code
        raise UserError(
            f"transformers {transformers.__version__} can't build this {config.model_type} ({error}); install the "
            f"version that it was saved with ({described.get('transformers_version', 'unknown')})"
        ) from error


def _check_numbers(value: Any, name: str) -> None:
    """Refuse a configuration that would make models without end: of many modules, or of huge ones.

    Raises:
        UserError: it has a number or a list that is too large.
    """
    most = 100 if re.search("layers|depth|levels|points|blocks|stages", name) else 100_000
    if isinstance(value, (int, float)) and not value <= most:
        raise UserError(f"{name}={shown(value)} must be at most {most}")
    parts = value.items() if isinstance(value, dict) else [(name, v) for v in value] if isinstance(value, list) else ()
    if len(parts) > 100_000:
        raise UserError(f"{name} has {len(parts)} parts")
    for part, content in parts:
        _check_numbers(content, part)


Read = Callable[[nn.Module, Any], tuple[list[Prediction], Prediction | None]]


@dataclass(frozen=True)
class Family:
    """How detectors of one kind are read.

    Attributes:
        read: makes predictions by layer, and proposals or None, from a model and its base model's output.
        scoring: how logits become scores.
        pyramid: name of the modules whose outputs are the projected pyramid; None where the backbone's maps are read.
        asks_states: whether the hidden states of all decoder layers must be asked for.
        masks_padding: whether the model is told what padding is, and predicts in the frame of the image.
        normalized: whether it takes pixels normalized by ImageNet's mean and deviation, or in [0, 1].
    """

    read: Read
    scoring: Literal["softmax", "sigmoid"] = "sigmoid"
    pyramid: str | None = None
    asks_states: bool = False
    masks_padding: bool = True
    normalized: bool = True


def _read_detr(model: nn.Module, out: Any) -> tuple[list[Prediction], None]:
    states = _decoder_states(model, out)
    return [Prediction(model.class_labels_classifier(h), model.bbox_predictor(h).sigmoid()) for h in states], None


def _read_conditional_detr(model: nn.Module, out: Any) -> tuple[list[Prediction], None]:
    """Every layer corrects the same learned reference point."""
    start = F.pad(inverse_sigmoid(out.reference_points).transpose(0, 1), (0, 2))
    states = _decoder_states(model, out)
    boxes = ((model.bbox_predictor(h) + start).sigmoid() for h in states)
    return [Prediction(model.class_labels_classifier(h), b) for h, b in zip(states, boxes)], None


def _read_dab_detr(model: nn.Module, out: Any) -> tuple[list[Prediction], None]:
    """Every layer corrects the box that the layer before has left."""
    states = out.intermediate_hidden_states  # [layers, B, Q, C]
    boxes = (model.bbox_predictor(states) + inverse_sigmoid(out.reference_points)).sigmoid()
    return [Prediction(model.class_embed(h), b) for h, b in zip(states, boxes)], None


def _read_deformable_detr(model: nn.Module, out: Any) -> tuple[list[Prediction], Prediction | None]:
    """Every layer corrects a reference: the learned point, or, refined, the box of the layer before (or a proposal)."""
    layers = []
    references = [out.init_reference_points, *out.intermediate_reference_points.unbind(1)]
    for i, (h, reference) in enumerate(zip(out.intermediate_hidden_states.unbind(1), references)):
        start = inverse_sigmoid(reference)
        boxes = model.bbox_embed[i](h) + F.pad(start, (0, 4 - start.shape[-1]))
        layers.append(Prediction(model.class_embed[i](h), boxes.sigmoid()))
    if not model.config.two_stage:
        return layers, None
    return layers, Prediction(out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid())


def _read_rt_detr(model: nn.Module, out: Any) -> tuple[list[Prediction], None]:
    """The model has applied its heads itself.

    The encoder's choice, from which the decoder starts, stands before the decoder's layers: it names classes as they
    do, and RT-DETR trains it like one of them.
    """
    boxes = out.intermediate_reference_points.unbind(1)
    layers = [Prediction(c, b) for c, b in zip(out.intermediate_logits.unbind(1), boxes)]
    return [Prediction(out.enc_topk_logits, out.enc_topk_bboxes), *layers], None


_DETR = Family(_read_detr, "softmax", asks_states=True)
_RT_DETR = Family(_read_rt_detr, pyramid="decoder_input_proj", masks_padding=False, normalized=False)

FAMILIES = {
    "detr": _DETR,
    "table-transformer": _DETR,
    "conditional_detr": Family(_read_conditional_detr, asks_states=True),
    "dab-detr": Family(_read_dab_detr),
    "deformable_detr": Family(_read_deformable_detr, pyramid="input_proj"),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
}
"""The families of detectors that :func:`adapt` takes, by transformers' ``model_type``."""


def _decoder_states(model: nn.Module, out: Any) -> list[Float[Tensor, "B Q C"]]:
    """The decoder's hidden states after each layer, normalized as the heads read them.

    With ``auxiliary_loss`` in a configuration, transformers feeds each layer the *normalized* state of the one before,
    which the published DETR does not do: another model, with other answers. Leave it off; here all layers are trained
    in any case.
    """
    inner = out.intermediate_hidden_states
    if inner is None:  # their hidden states begin with the decoder's input, and the last of them is normalized already
        inner = [model.model.decoder.layernorm(h) for h in out.decoder_hidden_states[1:]]
    return [*inner[:-1], out.last_hidden_state]


@contextmanager
def _listening(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What modules put out in the meantime, in the order in which they run; the modules are left as they were."""
    heard: list[Any] = []

    def hear(module: nn.Module, inputs: Any, output: Any) -> None:
        heard.append(output)

    hooks = [module.register_forward_hook(hear) for module in dict.fromkeys(modules)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _feature_maps(heard: Sequence[Any], images: ImageBatch) -> list[FeatureMap]:
    """Maps as glimpses are cut from them: each stride a power of two and double the one before."""
    height, width = images.mask.shape[1:]
    if len(heard) == 1 and isinstance(heard[0], (list, tuple)):  # a whole backbone: its maps, each with a mask
        heard = [tensor for tensor, _ in heard[0]]
    maps: list[FeatureMap] = []
    for x in heard:
        stride = 2 ** math.ceil(math.log2(max(height / x.shape[-2], width / x.shape[-1])))
        # DC5, a last stage of the stride of the one before, is brought back to the normal stride (appendix A.1).
        while maps and stride < 2 * maps[-1].stride:
            x, stride = x[:, :, ::2, ::2], 2 * stride
        maps.append(FeatureMap(x, shrink(images.mask, tuple(x.shape[-2:])), stride))
    strides = [f.stride for f in maps]
    if any(after != 2 * before for before, after in zip(strides, strides[1:])):
        raise UserError(f"glimpses need maps whose strides double, not {strides}: let the backbone return every stage")
    return maps


def _category_ids(classes: Sequence[str]) -> tuple[int, ...]:
    """COCO's id of each class: its number, as the DETR family counts up to 90, or one of the 80 ids that COCO uses."""
    used = [number for number, name in enumerate(COCO_CLASSES, start=1) if name != "N/A"]
    return tuple(used if len(classes) == len(used) and classes[0] == "person" else range(len(classes)))


def _unpad(boxes: Float[Tensor, "B Q 4"], images: ImageBatch) -> Float[Tensor, "B Q 4"]:
    """Boxes relative to the padded batch, made relative to the image."""
    padded = images.sizes.new_tensor(images.mask.shape[1:])
    factors = (padded / images.sizes).flip(1)  # [B, 2]: width and height of the batch by those of the image
    return boxes * factors.repeat(1, 2)[:, None]


def _family(model: nn.Module) -> Family:
    """The family of a model, or one error that says what is taken."""
    transformers = _transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(f"adapt takes a detector of transformers, not a {type(model).__name__}")
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UserError(f"transformers' {kind!r} is not supported; choose one of {', '.join(FAMILIES)}")
    wanted = transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING[type(model.config)]
    if not isinstance(model, wanted):
        raise UserError(f"a {type(model).__name__} has no heads for detection: give a {wanted.__name__}")
    return FAMILIES[kind]


def _part(model: nn.Module, together: Callable[[str, str], bool]) -> None:
    """Where several names have one parameter, give one of its own to those that do not belong together."""
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    for parameter, names in tied.items():
        owned: dict[str, nn.Parameter] = {names[0]: parameter}
        for name in names[1:]:
            mate = next((other for other in owned if together(name, other)), None)
            if mate is None:
                mate, owned[name] = name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            place, _, last = name.rpartition(".")
            setattr(model.get_submodule(place), last, owned[mate])


def _with_fresh_heads(model: nn.Module, num_classes: int, family: Family) -> nn.Module:
    """A copy of the model for another number of classes: what depends on that number starts anew."""
    num_classes = whole("num_classes", num_classes)
    described = _without(model.config.to_dict(), "id2label", "label2id")
    config = TransformersConfig(model.config.model_type, json.dumps(described))
    detector = from_config(config, num_classes)
    fresh = detector.model.to(model.device, model.dtype).train(model.training)
    state, own = model.state_dict(), fresh.state_dict()
    anew = [key for key, value in own.items() if value.shape != state[key].shape]
    detector.load_state_dict({f"model.{key}": value for key, value in (state | {k: own[k] for k in anew}).items()})
    theirs = dict(model.named_parameters(remove_duplicate=False))
    _part(fresh, lambda name, other: theirs[name] is theirs[other])
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(theirs[name].requires_grad)
        if name in anew and name.endswith("bias") and family.scoring == "sigmoid":
            nn.init.constant_(parameter, -math.log(99))  # a probability of 0.01, from which the focal loss starts
    logging.getLogger("regolite").warning(
        "class heads for %d classes are replaced by new ones for %d: %s",
        *(model.config.num_labels, num_classes, ", ".join(anew)),
    )
    return fresh


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("Hugging Face's transformers is not installed: pip install 'regolite[transformers]'") from error
    return transformers
