"""Detectors of Hugging Face's transformers as base detectors of REGO.

:func:`adapt` wraps a model without changing it. The wrapper runs it on an :class:`~regolite.types.ImageBatch` and
returns a complete :class:`~regolite.types.DetectorOutput`::

    model = transformers.AutoModelForObjectDetection.from_pretrained("microsoft/conditional-detr-resnet-50")
    rego = regolite.Rego(regolite.interop.adapt(model), stages=3, frozen=True)

Families differ in three respects, listed in :data:`FAMILIES`:

- **predictions.** Their models return the predictions of the last decoder layer; the wrapper applies the heads to the
  states of the other layers too (equation 3). The last layer's predictions are bit for bit theirs.
- **features.** Of a single-scale model the features are the backbone's maps of stages 2 to 5 (appendix A.1), of which
  the model itself uses only the last; of a multi-scale model they are the projected pyramid. Forward hooks, registered
  for one forward pass, collect the outputs of the modules that compute these maps.
- **padding.** Most families mask padding in attention but not in convolutions, as the published models do, so that an
  image's boxes depend slightly on its batch. RT-DETR and its successors have no mask: they see padding as black pixels,
  and their boxes are relative to the padded batch. The wrapper makes them relative to the image; boxes on padding lie
  beyond 1. Vision transformers whose attention is split into windows (LW-DETR, RF-DETR) divide the whole batch among
  their windows, so that the wrapper pads it further.

The classes of an image-text detector (Grounding DINO) are words of a prompt. With a fixed prompt it is a detector of
these classes like any other; its text encoder runs in every forward pass::

    base = regolite.interop.adapt(model, classes=("cat", "traffic light"), tokenizer=processor.tokenizer)

Such a model predicts a logit for each token of "cat. traffic light.". The wrapper takes the mean probability of the
tokens of a class as its probability, as Grounding DINO (``demo/test_ap_on_coco.py``), MM Grounding DINO (mmdetection)
and GLIP do to evaluate AP. The post-processing of transformers has no classes: it scores a box by the maximum over all
tokens.

What transformers does in training only is left out: RT-DETR's noised queries, and the groups of queries of LW-DETR and
RF-DETR, of which the first one is used, as at inference. So are the reading order and the masks of PP-DocLayout.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError
from regolite.losses import LossConfig
from regolite.models.backbone import shrink
from regolite.models.baselines import COCO_CLASSES
from regolite.models.config import DetectorConfig, ModelConfig, register
from regolite.models.detector import Attention, Detector, ParameterGroup
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction
from regolite.utils.devices import constant
from regolite.utils.validation import shown, whole

HuggingFaceModel = Any
"""A ``transformers.PreTrainedModel``; transformers is optional and does not type the parts of its models."""

Tokenizer = Callable[[str], Mapping[str, Any]]
"""A tokenizer of transformers: from a text, ``input_ids`` among others."""


@dataclass(frozen=True)
class TransformersConfig(DetectorConfig):
    """A detector of Hugging Face's transformers that :func:`adapt` has wrapped.

    Attributes:
        model_type: its family by transformers' name: ``detr``, ``conditional_detr``, ...
        json: its complete configuration as written by transformers.
        tokens: of an image-text detector, the token ids of its prompt.
        token_labels: of each token the label of its class, or -1 between classes.
    """

    model_type: str
    json: str
    tokens: tuple[int, ...] = ()
    token_labels: tuple[int, ...] = ()


def adapt(
    model: HuggingFaceModel,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> TransformersDetector:
    """Wrap a detector of transformers as a base detector of REGO.

    Args:
        model: a ``...ForObjectDetection`` of a family in :data:`FAMILIES`. It is not copied: training the result trains
            the model.
        num_classes: number of classes. If the model has another number, it is copied and the class heads of the copy
            are re-initialized, with a warning: an initialization for fine-tuning.
        classes: of an image-text detector only, the names of the classes, which make its prompt. A checkpoint contains
            their tokens, so that it can be loaded without the tokenizer.
        tokenizer: of an image-text detector only, its tokenizer: ``processor.tokenizer``.

    Returns:
        The detector, with a ``model_config`` of the model's own classes, so that it can detect, be evaluated, trained,
        saved and loaded. Classes without names are called ``LABEL_0``, ..., as in transformers.

    Raises:
        UserError: the model is not a detector of transformers, or its family is not supported; or the classes cannot be
            a prompt of the model.
    """
    family = _family(model)
    if family.prompted:
        if classes is None or tokenizer is None or num_classes is not None:
            raise UserError(
                f"the classes of transformers' {model.config.model_type!r} are words of a prompt: give adapt(model, "
                "classes=('cat', 'traffic light'), tokenizer=processor.tokenizer), without num_classes"
            )
        return TransformersDetector(model, *_prompt(model, classes, tokenizer), classes)
    if classes is not None or tokenizer is not None:
        raise UserError(
            "classes and tokenizer make the prompt of an image-text detector, and transformers' "
            f"{model.config.model_type!r} has none: leave them out"
        )
    if num_classes is not None and num_classes != model.config.num_labels:
        model = _with_fresh_heads(model, num_classes, family)
    return TransformersDetector(model)


class TransformersDetector(Detector):
    """A detector of transformers as REGO's base detector.

    Args:
        model: the model of transformers.
        tokens: of an image-text detector, the token ids of its prompt.
        token_labels: of each token the label of its class, or -1 between classes.
        classes: of an image-text detector, the names of the classes.

    Its attributes are those of :class:`~regolite.models.detector.Detector`.

    Raises:
        UserError: as :func:`adapt`.
    """

    family: Family
    model: HuggingFaceModel
    tokens: Int[Tensor, "T"]
    positions: Int[Tensor, "K n"]
    absent: Bool[Tensor, "K n"]

    def __init__(
        self,
        model: HuggingFaceModel,
        tokens: Sequence[int] = (),
        token_labels: Sequence[int] = (),
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.family = family = _family(model)
        self.model, config = model, model.config
        if family.prompted:
            self._set_prompt(tokens, token_labels)
        else:
            classes = [str(config.id2label.get(label, label)) for label in range(config.num_labels)]
        self.dim = getattr(config, "d_model", None) or config.hidden_size
        self.heads = getattr(config, "decoder_attention_heads", None) or config.decoder_self_attention_heads
        self.scoring = family.scoring
        self.num_logits = len(self.positions) if family.prompted else len(classes) + (family.scoring == "softmax")
        self.projected = family.pyramid is not None
        self.has_unused_parameters = any(re.search(family.unused, name) for name, _ in model.named_parameters())
        self.feature_channels = [channels for _, channels in self._map_makers()]
        self.model_config = ModelConfig(
            f"transformers:{config.model_type}",
            TransformersConfig(
                config.model_type, json.dumps(config.to_dict(), sort_keys=True), tuple(tokens), tuple(token_labels)
            ),
            loss=LossConfig(label=1.0, label_cost=1.0) if family.scoring == "softmax" else LossConfig(),
            image_size=family.image_size,
            classes=tuple(classes),
            category_ids=_category_ids(classes),
        )

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect.

        Raises:
            UserError: the strides of the feature maps do not double from map to map.
        """
        family, images = self.family, self.padded(images)
        pixels = images.pixels
        if not family.normalized(self.model.config):
            mean, deviation = (
                constant(v, pixels.device, pixels.dtype)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
            )
            pixels = (pixels * deviation + mean).masked_fill(images.mask[:, None], 0.0)
        options: dict[str, Any] = {"output_hidden_states": True} if family.asks_states else {}
        if family.prompted:
            options["input_ids"] = self.tokens.expand(len(pixels), -1)
        with (
            _recorded_outputs([module for module, _ in self._map_makers()]) as outputs,
            _training_flags(family.training_flags(self.model.model)),
        ):
            out = self.model.model(pixels, pixel_mask=(~images.mask).long(), return_dict=True, **options)
        layers, proposals, references = family.read(self.model, out)
        if family.prompted:
            layers = [replace(p, logits=self._class_logits(p.logits)) for p in layers]
        if not family.masks_padding:
            layers = [Prediction(p.logits, _unpad(p.boxes, images)) for p in layers]
            references = None if references is None else _unpad(references, images)
        maps = _feature_maps(outputs, images, family.patch(self.model.config))
        return DetectorOutput(layers, out.last_hidden_state, maps, proposals, references=references)

    def _set_prompt(self, tokens: Sequence[int], token_labels: Sequence[int]) -> None:
        """Keep the tokens of the prompt, and the positions of those of each class.

        Raises:
            UserError: they are no prompt of this model.
        """
        config = self.model.config
        vocabulary = config.text_config.vocab_size
        longest = min(config.max_text_len, config.text_config.max_position_embeddings)
        if len(tokens) > longest:
            raise UserError(f"the prompt of the classes has {len(tokens)} tokens, and the model takes {longest}")
        if len(tokens) != len(token_labels) or not all(0 <= token < vocabulary for token in tokens):
            raise UserError(f"each token of a prompt has a label, and a number from 0 to {vocabulary - 1}")
        rows = [
            [position for position, other in enumerate(token_labels) if other == label]
            for label in range(max(token_labels, default=-1) + 1)
        ]
        if not rows or not all(rows):
            raise UserError("each class needs a token of the prompt")
        most = max(map(len, rows))
        buffers = {
            "tokens": list(tokens),
            "positions": [row + [0] * (most - len(row)) for row in rows],
            "absent": [[i >= len(row) for i in range(most)] for row in rows],
        }
        for name, values in buffers.items():  # the configuration has them, so that the weights need not
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def _class_logits(self, logits: Float[Tensor, "B Q _t"]) -> Float[Tensor, "B Q K"]:
        """The logit of the mean probability of the tokens of each class, from the logits of all tokens."""

        def log_sum(x: Tensor) -> Tensor:  # of probabilities; no precision is lost where they are nearly 0 or 1
            return F.logsigmoid(x).masked_fill(self.absent, -math.inf).logsumexp(-1)

        logits = logits[..., self.positions]  # [B, Q, K, tokens]
        return log_sum(logits) - log_sum(-logits)

    def padded(self, images: ImageBatch) -> ImageBatch:
        """The batch, padded further at the right and at the bottom where the model's windows need it."""
        height, width = images.mask.shape[1:]
        wanted = self.family.canvas(self.model.config, height, width)
        if wanted == (height, width):
            return images
        more = (0, wanted[1] - width, 0, wanted[0] - height)
        return replace(images, pixels=F.pad(images.pixels, more), mask=F.pad(images.mask, more, value=True))

    def parameter_group(self, name: str) -> ParameterGroup:
        """The group of a parameter; DEIMv2 calls a convolutional backbone by another name."""
        return "backbone" if "conv_encoder.model." in name else super().parameter_group(name)

    def transformer_layers(self) -> list[nn.Module]:
        """None: transformers checkpoints its layers itself (``model.gradient_checkpointing_enable()``)."""
        return []

    def named_attentions(self) -> Iterator[tuple[str, Attention]]:
        """The attentions of transformers' encoder and decoder layers; see :class:`Detector`.

        Raises:
            UserError: the model's attention implementation does not compute weights that can be intercepted.
        """
        how = self.model.config._attn_implementation
        if how not in (None, "eager", "sdpa"):
            raise UserError(
                f"the attention implementation {how!r} cannot be recorded; choose another one with "
                "model.set_attn_implementation('eager')"
            )
        encoder = decoder = 0
        for layer, among, cross in _attention_layers(self.model):
            if cross is None:
                yield f"encoder.{encoder}", (layer, among)
                encoder += 1
            else:
                yield f"decoder.{decoder}.self", (layer, among)
                yield f"decoder.{decoder}.cross", (layer, cross)
                decoder += 1

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Untie heads for which the state dict has different values, as transformers does when it loads a model.

        A new refined Deformable DETR has one class head for all decoder layers, a published one has one for each.
        """
        values = {
            name: state_dict.get(f"{prefix}model.{name}", parameter)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }

        _untie(self.model, lambda name, other: torch.equal(values[name], values[other]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _map_makers(self) -> list[tuple[nn.Module, int]]:
        """The modules whose outputs are the feature maps, finest first, and the channels of the maps."""
        base = self.model.model
        if self.family.pyramid is not None:
            makers = base.get_submodule(self.family.pyramid)
            return [(module, self.dim) for module in (makers if isinstance(makers, nn.ModuleList) else [makers])]
        encoder = getattr(base.backbone, "conv_encoder", base.backbone)
        network = getattr(encoder.model, "_backbone", encoder.model)
        if hasattr(network, "feature_info"):  # timm's; its first map has stride 2, which REGO does not use
            stages = [(info["module"], info["num_chs"]) for info in network.feature_info.info if info["reduction"] > 2]
            modules = dict(network.named_children())
            found = [(modules[name], channels) for name, channels in stages if name in modules]
        else:  # transformers' own: ResNet, ConvNeXt and others; the stem's channels come first
            blocks: Any = getattr(getattr(network, "encoder", None), "stages", ())
            found = list(zip(blocks, (network.num_features or [])[1:]))
        # The fallback is the maps that the backbone returns, often only the last one.
        return found or [(encoder, channels) for channels in encoder.intermediate_channel_sizes]


@register("transformers", TransformersConfig)
def from_config(config: TransformersConfig, num_classes: int) -> TransformersDetector:
    """The detector of a configuration, with random weights and without a download.

    Raises:
        UserError: transformers is not installed or has no such model, or a number in the configuration is too large.
    """
    transformers = _transformers()
    try:
        described = json.loads(config.json, object_hook=_offline)
        if not isinstance(described, dict):
            raise UserError(f"it is {shown(described)}, and no JSON object")
        _check_numbers(described, "it")
        text = described.get("text_config")
        if text is not None and not (isinstance(text, dict) and text.get("model_type") == "bert"):
            raise UserError("its text encoder is not BERT, whose tokens separate the classes of a prompt")
        if config.token_labels and max(config.token_labels) + 1 != num_classes:
            raise UserError(f"its prompt has {max(config.token_labels) + 1} classes, not {num_classes}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"the configuration of this {shown(config.model_type)} cannot be used: {error}") from error
    try:
        theirs = transformers.AutoConfig.for_model(config.model_type, **_without(described, "model_type"))
        if theirs.num_labels != num_classes:
            theirs.num_labels = num_classes
        family = FAMILIES.get(config.model_type)
        task = "ZeroShotObjectDetection" if family is not None and family.prompted else "ObjectDetection"
        model = getattr(transformers, f"AutoModelFor{task}").from_config(theirs)
        return TransformersDetector(model, config.tokens, config.token_labels)
    except UserError:
        raise
    except Exception as error:  # an unchecked configuration may raise anything in their code
        said = " ".join(str(error).split())  # theirs may have several lines
        raise UserError(
            f"transformers {transformers.__version__} can't build this {config.model_type} ({said}); install the "
            f"version that it was saved with ({described.get('transformers_version', 'unknown')})"
        ) from error


def _offline(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a configuration, changed so that no weights and no attention kernel are downloaded."""
    part = _without(part, "attn_implementation", "_attn_implementation")
    return part | {"use_pretrained_backbone": False} if "use_pretrained_backbone" in part else part


def _check_numbers(value: Any, name: str) -> None:
    """Reject a configuration of a model with too many or too large modules.

    Raises:
        UserError: a number or a list in it is too large.
    """
    most = 100 if re.search("layers|depth|levels|points|blocks|stages", name) else 100_000
    if isinstance(value, (int, float)) and not value <= most:
        raise UserError(f"{name}={shown(value)} must be at most {most}")
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list):
        parts = [(name, v) for v in value]
    if len(parts) > 100_000:
        raise UserError(f"{name} has {len(parts)} parts")
    for part, content in parts:
        _check_numbers(content, part)


ATTENTIONS = (
    ("self_attn", "encoder_attn"),  # most decoder layers
    ("self_attn", "cross_attn"),  # those of DAB-DETR, LW-DETR and RF-DETR
    ("self_attn", None),  # encoder layers
)
"""Names of the self- and cross-attention modules by which transformers' layers are recognized."""


def _attention_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module | None]]:
    """The layers of encoders and decoders with their attention modules, without those of backbones and of text."""
    for name, child in model.named_children():
        if name in ("backbone", "text_backbone", "text_enhancer_layer"):
            continue
        parts = dict(child.named_children())
        for among, cross in ATTENTIONS:
            if among in parts and (cross is None or cross in parts):
                yield child, _inner(parts, among), None if cross is None else _inner(parts, cross)
                break
        else:
            yield from _attention_layers(child)


def _inner(parts: dict[str, nn.Module], name: str) -> nn.Module:
    """The attention module of this name; DAB-DETR wraps each one in a module of the same name."""
    return dict(parts[name].named_children()).get(name, parts[name])


References = Float[Tensor, "B Q d"] | None
Read = Callable[[HuggingFaceModel, Any], tuple[list[Prediction], Prediction | None, References]]


@dataclass(frozen=True)
class Family:
    """How the wrapper uses a family of detectors.

    Attributes:
        read: from a model and its base model's output, the predictions of each layer, the proposals or None, and the
            queries' initial references or None.
        scoring: how logits become scores.
        pyramid: name of the modules whose outputs are the projected pyramid; None to use the backbone's maps.
        asks_states: whether the hidden states of all decoder layers must be requested.
        masks_padding: whether the model masks padding and predicts boxes relative to the image.
        normalized: from a configuration, whether the model takes pixels normalized by ImageNet's mean and deviation, or
            in [0, 1].
        image_size: shorter side of the images that it takes.
        canvas: from a configuration and the height and width of a batch, those to which it must be padded.
        patch: from a configuration, the side of the patches if a vision transformer's strides are no powers of two.
        unused: pattern of the names of parameters that get no gradient, because ours trains without what they do.
        training_flags: of a base model, modules whose flag ``training`` is set during its forward pass, in training and
            at inference alike.
        prompted: whether its classes are words of a prompt. The logits of ``read`` are then of the prompt's tokens.
    """

    read: Read
    scoring: Literal["softmax", "sigmoid"] = "sigmoid"
    pyramid: str | None = None
    asks_states: bool = False
    masks_padding: bool = True
    normalized: Callable[[Any], bool] = lambda config: True
    image_size: int = 800
    canvas: Callable[[Any, int, int], tuple[int, int]] = lambda config, height, width: (height, width)
    patch: Callable[[Any], int | None] = lambda config: None
    unused: str = r"denoising|\.swin\.layernorm\."
    training_flags: Callable[[HuggingFaceModel], dict[nn.Module, bool]] = lambda base: {}
    prompted: bool = False


def _read_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, None]:
    states = _decoder_states(model, out)
    boxes = (model.bbox_predictor(h).sigmoid() for h in states)
    return [Prediction(model.class_labels_classifier(h), b) for h, b in zip(states, boxes)], None, None


def _read_conditional_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, References]:
    """Each layer corrects the same learned reference point."""
    references = out.reference_points.transpose(0, 1)
    start = F.pad(inverse_sigmoid(references), (0, 2))
    states = _decoder_states(model, out)
    boxes = ((model.bbox_predictor(h) + start).sigmoid() for h in states)
    return [Prediction(model.class_labels_classifier(h), b) for h, b in zip(states, boxes)], None, references


def _read_dab_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, References]:
    """Each layer corrects the box of the previous layer."""
    states = out.intermediate_hidden_states  # [layers, B, Q, C]
    boxes = (model.bbox_predictor(states) + inverse_sigmoid(out.reference_points)).sigmoid()
    layers = [Prediction(model.class_embed(h), b) for h, b in zip(states, boxes)]
    return layers, None, out.reference_points[0]  # of the first layer


def _read_deformable_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], Prediction | None, References]:
    """Each layer corrects a reference: the learned point, or with refinement the previous box or a proposal."""
    layers = []
    references = [out.init_reference_points, *out.intermediate_reference_points.unbind(1)]
    for i, (h, reference) in enumerate(zip(out.intermediate_hidden_states.unbind(1), references)):
        start = inverse_sigmoid(reference)
        boxes = model.bbox_embed[i](h) + F.pad(start, (0, 4 - start.shape[-1]))
        layers.append(Prediction(model.class_embed[i](h), boxes.sigmoid()))
    if not model.config.two_stage:
        return layers, None, out.init_reference_points
    proposals = Prediction(out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid())
    return layers, proposals, out.init_reference_points


def _read_rt_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, References]:
    """The model applies its heads itself.

    The first prediction is that of the encoder's selected proposals, with which the decoder starts. It has class logits
    like the decoder layers, and RT-DETR trains it like one of them. D-FINE and DEIMv2 add a second one, of the first
    decoder layer before its distributions of edges.
    """
    boxes = out.intermediate_reference_points.unbind(1)
    layers = [Prediction(c, b) for c, b in zip(out.intermediate_logits.unbind(1), boxes)]
    references = out.init_reference_points.sigmoid()  # logits there
    return [Prediction(out.enc_topk_logits, out.enc_topk_bboxes), *layers], None, references


def _read_lw_detr(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, References]:
    """Each layer corrects the same box, which is an encoder's proposal corrected by a learned offset.

    The first prediction is that of the proposals, as in RT-DETR.
    """
    references = out.init_reference_points
    centers, sizes = references.split(2, dim=-1)
    proposals = Prediction(model.model.enc_out_class_embed[0](out.enc_outputs_class), out.enc_outputs_coord_logits)
    layers = [proposals]
    for h in out.intermediate_hidden_states:
        shift, growth = model.bbox_embed(h).split(2, dim=-1)
        boxes = torch.cat((shift * sizes + centers, growth.exp() * sizes), dim=-1)
        layers.append(Prediction(model.class_embed(h), boxes))
    return layers, None, references


def _read_grounding_dino(model: HuggingFaceModel, out: Any) -> tuple[list[Prediction], None, References]:
    """Each layer corrects the box of the previous layer, and compares its queries with the tokens of the prompt.

    The first prediction is that of the encoder's selected proposals, which DINO trains like a decoder layer.
    """
    text, scores = out.encoder_last_hidden_state_text, out.enc_outputs_class
    selected = scores.amax(-1).topk(model.config.num_queries).indices[..., None]
    boxes = out.enc_outputs_coord_logits.take_along_dim(selected, 1).sigmoid()
    layers = [Prediction(scores.take_along_dim(selected, 1), boxes)]
    unmasked = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    references = [out.init_reference_points, *out.intermediate_reference_points.unbind(1)]
    for i, (h, reference) in enumerate(zip(out.intermediate_hidden_states.unbind(1), references)):
        boxes = (model.bbox_embed[i](h) + torch.special.logit(reference, eps=1e-5)).sigmoid()
        layers.append(Prediction(model.class_embed[i](h, text, unmasked), boxes))
    return layers, None, out.init_reference_points


def _first_group(base: HuggingFaceModel) -> dict[nn.Module, bool]:
    """LW-DETR's model and self-attention split queries into groups where they train."""
    return {base: False, **{layer.self_attn: False for layer in base.decoder.layers}}


def _windows(config: Any, height: int, width: int) -> tuple[int, int]:
    """LW-DETR splits the height and width of its grid of patches into the same number of windows."""
    vit = config.backbone_config
    return _ceil(height, vit.patch_size * vit.num_windows_side), _ceil(width, vit.patch_size * vit.num_windows_side)


def _square_windows(config: Any, height: int, width: int) -> tuple[int, int]:
    """RF-DETR takes square images; in transformers' code its windows are right for these only."""
    side = _ceil(max(height, width), config.backbone_config.patch_size * config.backbone_config.num_windows)
    return side, side


def _ceil(size: int, divisor: int) -> int:
    return math.ceil(size / divisor) * divisor


_DETR = Family(_read_detr, "softmax", asks_states=True)
_RT_DETR = Family(
    _read_rt_detr,
    pyramid="decoder_input_proj",
    masks_padding=False,
    normalized=lambda config: False,
    image_size=640,
    canvas=lambda config, height, width: (_ceil(height, 32), _ceil(width, 32)),
)
# Their decoders predict after each layer if they train, otherwise after the last one only.
_D_FINE = replace(_RT_DETR, training_flags=lambda base: {base.decoder: True})
_GROUNDING_DINO = Family(_read_grounding_dino, pyramid="input_proj_vision", prompted=True)
_LW_DETR = Family(
    _read_lw_detr,
    pyramid="backbone.projector.scale_layers",
    image_size=640,
    canvas=_windows,
    unused=r"\.enc_out\w*\.[1-9]|\.mask_token",
    training_flags=_first_group,
)

FAMILIES = {
    "detr": _DETR,
    "table-transformer": _DETR,
    "conditional_detr": Family(_read_conditional_detr, asks_states=True),
    "dab-detr": Family(_read_dab_detr),
    "deformable_detr": Family(_read_deformable_detr, pyramid="input_proj"),
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": replace(_D_FINE, normalized=lambda config: config.backbone_config.model_type == "dinov3_vit"),
    "pp_doclayout_v2": replace(_RT_DETR, unused="denoising|reading_order"),
    "pp_doclayout_v3": replace(_RT_DETR, unused="denoising|order|mask|pointer"),
    "lw_detr": _LW_DETR,
    "rf_detr": replace(
        _LW_DETR,
        pyramid="backbone.projector",
        image_size=560,
        canvas=_square_windows,
        patch=lambda config: config.backbone_config.patch_size,
    ),
    "grounding-dino": _GROUNDING_DINO,
    "mm-grounding-dino": _GROUNDING_DINO,
}
"""The families of detectors that :func:`adapt` supports, by transformers' ``model_type``."""

UNSUPPORTED = {
    "yolos": "it has no decoder",
    "pp_doclayout_v4": "it predicts classes after its last layer only",
    "omdet-turbo": "its classes and its task are separate prompts",
}
"""Other detectors of transformers, and why they are not supported."""


def _decoder_states(model: HuggingFaceModel, out: Any) -> list[Float[Tensor, "B Q C"]]:
    """The decoder's hidden states after each layer, normalized for the heads.

    With ``auxiliary_loss`` in a configuration, transformers passes the *normalized* state of each layer to the next,
    which the published DETR does not do, so that outputs differ. Leave it off; here all layers are trained anyway.
    """
    inner = out.intermediate_hidden_states
    if inner is None:  # the first hidden state is the decoder's input; the last one is already normalized
        inner = [model.model.decoder.layernorm(h) for h in out.decoder_hidden_states[1:]]
    return [*inner[:-1], out.last_hidden_state]


@contextmanager
def _recorded_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect the outputs of modules, in the order in which they run, until the context ends."""
    outputs: list[Any] = []

    def append(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output)

    hooks = [module.register_forward_hook(append) for module in dict.fromkeys(modules)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _training_flags(flags: dict[nn.Module, bool]) -> Iterator[None]:
    """Set the flags ``training`` of these modules, but not of their children, until the context ends."""
    before = {module: module.training for module in flags}
    try:
        for module, flag in flags.items():
            module.training = flag
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _feature_maps(outputs: Sequence[Any], images: ImageBatch, patch: int | None = None) -> list[FeatureMap]:
    """Feature maps whose strides double from map to map, as glimpses need them.

    They are powers of two, except that of the only map of a vision transformer with another ``patch`` size.
    """
    height, width = images.mask.shape[1:]
    if len(outputs) == 1 and isinstance(outputs[0], (list, tuple)):  # a backbone: its maps, each with a mask
        outputs = [tensor for tensor, _ in outputs[0]]
    maps: list[FeatureMap] = []
    for x in outputs:
        stride = patch or 2 ** math.ceil(math.log2(max(height / x.shape[-2], width / x.shape[-1])))
        # The last stage of DC5 has the stride of the previous one: subsample it to the normal stride (appendix A.1).
        while maps and stride < 2 * maps[-1].stride:
            x, stride = x[:, :, ::2, ::2], 2 * stride
        maps.append(FeatureMap(x, shrink(images.mask, x.shape[-2:]), stride))
    strides = [f.stride for f in maps]
    if any(after != 2 * before for before, after in zip(strides, strides[1:])):
        raise UserError(f"glimpses need maps whose strides double, not {strides}: let the backbone return every stage")
    return maps


def _category_ids(classes: Sequence[str]) -> tuple[int, ...]:
    """COCO's id of each class: its index, as in the 91 classes of DETR, or for 80 classes the 80 ids that COCO uses."""
    used = [number for number, name in enumerate(COCO_CLASSES, start=1) if name != "N/A"]
    return tuple(used if len(classes) == len(used) and classes[0] == "person" else range(len(classes)))


def _unpad(boxes: Float[Tensor, "B Q 4"], images: ImageBatch) -> Float[Tensor, "B Q 4"]:
    """Convert boxes relative to the padded batch to boxes relative to the image."""
    padded = constant(images.mask.shape[1:], images.sizes.device)
    factors = (padded / images.sizes).flip(1)  # [B, 2]: width and height of the batch divided by those of the image
    return boxes * factors.repeat(1, 2)[:, None]


def _family(model: HuggingFaceModel) -> Family:
    """The family of a model.

    Raises:
        UserError: the model is not a supported detector of transformers.
    """
    transformers = _transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(f"adapt takes a detector of transformers, not a {type(model).__name__}")
    kind = model.config.model_type
    if kind not in FAMILIES:
        reason = f", since {UNSUPPORTED[kind]}" if kind in UNSUPPORTED else ""
        raise UserError(f"transformers' {kind!r} is not supported{reason}; choose one of {', '.join(FAMILIES)}")
    task = "ZERO_SHOT_OBJECT_DETECTION" if FAMILIES[kind].prompted else "OBJECT_DETECTION"
    wanted = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")[type(model.config)]
    if not isinstance(model, wanted):
        raise UserError(f"a {type(model).__name__} has no heads for detection: give a {wanted.__name__}")
    return FAMILIES[kind]


def _prompt(model: HuggingFaceModel, classes: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of the prompt "cat. traffic light.", and of each the label of its class, or -1 between classes.

    The model itself separates phrases at these tokens: words of different classes do not attend to each other.

    Raises:
        UserError: the classes are not different names, a name is not one phrase, or the tokenizer is another model's.
    """
    if not callable(tokenizer) or hasattr(tokenizer, "image_processor"):
        raise UserError(f"tokenizer={shown(tokenizer)} is not the model's tokenizer: give processor.tokenizer")
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"classes={shown(classes)} is not a list of names, as ('cat', 'traffic light')")
    phrases = [name.strip().lower() for name in classes]  # as their processor prepares them
    if not phrases or len(set(phrases)) < len(phrases):
        raise UserError(f"classes={shown(classes)} must be one or more different names")
    delimiters = set(model.model.special_tokens.tolist())

    def tokenized(text: str) -> tuple[list[int], list[int]]:
        tokens = [int(token) for token in tokenizer(text)["input_ids"]]
        labels, label, inside = [], -1, False
        for token in tokens:
            label += not inside and token not in delimiters
            inside = token not in delimiters
            labels.append(label if inside else -1)
        return tokens, labels

    for name, phrase in zip(classes, phrases):
        if max(tokenized(f"{phrase}.")[1], default=-1) != 0:
            raise UserError(f"the class {shown(name)} is not one phrase of a prompt: give words without '.' and '?'")
    tokens, labels = tokenized(" ".join(f"{phrase}." for phrase in phrases))
    if max(labels) + 1 != len(phrases):
        raise UserError("the tokenizer does not separate the classes of a prompt: give the model's own")
    return tokens, labels


def _untie(model: nn.Module, together: Callable[[str, str], bool]) -> None:
    """Give names that share a parameter, but are not ``together``, parameters of their own."""
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


def _with_fresh_heads(model: HuggingFaceModel, num_classes: int, family: Family) -> HuggingFaceModel:
    """A copy of the model for another number of classes; parameters whose shape depends on it are re-initialized."""
    num_classes = whole("num_classes", num_classes)
    described = _without(model.config.to_dict(), "id2label", "label2id")
    config = TransformersConfig(model.config.model_type, json.dumps(described))
    detector = from_config(config, num_classes)
    fresh = detector.model.to(model.device, model.dtype).train(model.training)
    state, own = model.state_dict(), fresh.state_dict()
    reset = [key for key, value in own.items() if value.shape != state[key].shape]
    detector.load_state_dict({f"model.{key}": value for key, value in (state | {k: own[k] for k in reset}).items()})
    theirs = dict(model.named_parameters(remove_duplicate=False))
    _untie(fresh, lambda name, other: theirs[name] is theirs[other])
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(theirs[name].requires_grad)
        if name in reset and name.endswith("bias") and family.scoring == "sigmoid":
            nn.init.constant_(parameter, -math.log(99))  # an initial probability of 0.01, for the focal loss
    logging.getLogger("regolite").warning(
        "class heads for %d classes are replaced by new ones for %d: %s",
        *(model.config.num_labels, num_classes, ", ".join(reset)),
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
