"""Conversion of DETR, Conditional DETR and Deformable DETR from and to Hugging Face's ``transformers``.

Two tables are used in both directions: one of configuration fields and one of weight names
(:class:`~regolite.interop.keys.Pair`). :data:`FAMILIES` has an entry for each family of detectors: its names, its
tables, and the settings that only one side has.

The outputs are the same; training in transformers differs from the authors'. In transformers 5.23

- ``auxiliary_loss=True`` changes the outputs of DETR and Conditional DETR: the decoder normalizes between its layers
  and the last one twice; such a model is rejected;
- the classification loss of Conditional and Deformable DETR has the weight 1 in any configuration (the authors' 2);
- two-stage Deformable DETR has no loss for the proposals, and the refined form trains one class head for all layers
  (the authors one for each);
- all stages of a ``timm`` backbone are trained and none of a ``ResNetConfig`` one; the authors train stages 3 to 5;
- dropout is also applied to the encoder's input.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from regolite.errors import UserError
from regolite.interop.adapter import HuggingFaceModel
from regolite.interop.keys import Pair, from_theirs, to_theirs
from regolite.losses import LossConfig
from regolite.models.conditional_detr import ConditionalDetrConfig
from regolite.models.config import ModelConfig, config_of
from regolite.models.deformable_detr import DeformableDetrConfig
from regolite.models.detector import Detector, as_detector
from regolite.models.detr import DetrConfig
from regolite.models.presets import build

# Blocks of each stage, which identify transformers' own ResNets.
DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
# Backbones with the same name here, in timm and in torchvision.
TIMM = ("resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d")

# Our field of a configuration and theirs. Several fields of theirs for one of ours must agree.
FIELDS = (
    ("dim", "d_model"),
    ("heads", "encoder_attention_heads"),
    ("heads", "decoder_attention_heads"),
    ("encoder_layers", "encoder_layers"),
    ("decoder_layers", "decoder_layers"),
    ("ffn_dim", "encoder_ffn_dim"),
    ("ffn_dim", "decoder_ffn_dim"),
    ("queries", "num_queries"),
)
DEFORMABLE_FIELDS = (
    *FIELDS,
    ("levels", "num_feature_levels"),
    ("points", "encoder_n_points"),
    ("points", "decoder_n_points"),
    ("refine", "with_box_refine"),
    ("two_stage", "two_stage"),
)
# Their classification loss has no weight of its own, except Conditional DETR's: we take that of their matching cost.
LOSS_FIELDS = (
    ("label", "class_cost"),
    ("label_cost", "class_cost"),
    ("l1_cost", "bbox_cost"),
    ("l1", "bbox_loss_coefficient"),
    ("giou_cost", "giou_cost"),
    ("giou", "giou_loss_coefficient"),
    ("no_object", "eos_coefficient"),
)
CONDITIONAL_LOSS_FIELDS = (("label", "cls_loss_coefficient"), *LOSS_FIELDS[1:-1])


@dataclass(frozen=True)
class Family:
    """Translation of one family of detectors.

    Attributes:
        config: our class of configuration.
        fields: our fields and theirs, except those of the backbone.
        pairs: the table of weight names, except the backbone's, for one of our configurations.
        ours: required values of our configuration, the only ones that transformers supports.
        theirs: required values of their configuration, and the reasons.
        loss: our weights of the loss and theirs.
    """

    config: type[DetrConfig | ConditionalDetrConfig | DeformableDetrConfig]
    fields: tuple[tuple[str, str], ...]
    pairs: Callable[[Any], list[Pair]]
    ours: dict[str, Any]
    theirs: dict[str, tuple[Any, str]]
    loss: tuple[tuple[str, str], ...] = LOSS_FIELDS


def from_transformers(model: HuggingFaceModel) -> Detector:
    """Convert a detector of transformers to one of ours.

    Its backbone must be a ResNet-50 or 101 (or timm's ResNeXt-101). Classes have the names in ``id2label`` and their
    indices as category ids; weights of the loss are converted. Dropout is ``dropout`` everywhere.

    Args:
        model: a ``...ForObjectDetection`` of DETR, Conditional DETR or Deformable DETR.

    Returns:
        The detector in evaluation mode, on the device of ``model``. Like ``model`` it does not hide padding from the
        backbone, and has the same outputs on the same padded batch.

    Raises:
        UserError: the model is of another class, or a setting has no counterpart here; the message names it.
    """
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)
    if name is None:
        raise UserError(f"from_transformers converts {' and '.join(FAMILIES)}, and this is a {type(model).__name__}")
    family, theirs = FAMILIES[name], model.config
    for setting, (value, reason) in family.theirs.items():
        if getattr(theirs, setting) != value:
            raise UserError(f"{name} has {setting}={getattr(theirs, setting)!r} and must have {value!r}: {reason}")
    fields = _read(theirs, family.fields)
    if fields.get("two_stage"):
        fields["queries"] = theirs.two_stage_num_proposals
    backbone, stages = _read_backbone(theirs.backbone_config)
    if family.config is DeformableDetrConfig:
        fields["backbone_stages"] = stages
    elif stages[-1] != 5:
        raise UserError(f"{name} reads stage{stages[-1] - 1} of its backbone, and regolite's reads the last, stage4")

    labels = range(theirs.num_labels)
    loss: dict[str, Any] = {ours: float(getattr(theirs, setting)) for ours, setting in family.loss}
    c = family.config(weights=None, mask_padding=False, dropout=float(theirs.dropout), **backbone, **fields)
    config = ModelConfig(
        preset=theirs.model_type,
        detector=c,
        loss=LossConfig(**loss),
        classes=tuple(theirs.id2label.get(label, str(label)) for label in labels),
        category_ids=tuple(labels),
    )
    detector = build(config)
    pairs = _backbone_pairs(c.backbone, _is_timm(theirs.backbone_config)) + family.pairs(c)
    detector.load_state_dict(from_theirs(model.state_dict(), pairs, detector.state_dict(), source=f"this {name}"))
    return detector.to(model.device).eval()


def to_transformers(detector: nn.Module, timm: bool = True) -> HuggingFaceModel:
    """Convert one of our detectors to one of transformers.

    Its labels are the classes in our order; COCO ids are lost, since labels there have no gaps.

    Args:
        detector: a DETR, Conditional or Deformable DETR made by :func:`regolite.build` or :func:`regolite.load`.
        timm: use timm's backbone, as the checkpoints published there do. transformers' own backbone does not need timm,
            but supports neither ResNeXt nor DC5.

    Returns:
        A ``...ForObjectDetection`` of the same family, on the CPU, in evaluation mode. It does not hide padding from
        the backbone: a detector with ``mask_padding`` has the same outputs there only for single images (a warning).

    Raises:
        UserError: the detector has parts that transformers lacks, as REGO, or transformers is not installed.
    """
    if as_detector(detector).num_stages:
        raise UserError("transformers has no REGO; convert the base detector alone: to_transformers(detector.detector)")
    need = "the model's configuration is converted too: make the model with regolite.build or load it"
    config = config_of(detector, need)
    c = config.detector
    if not isinstance(c, (DetrConfig, ConditionalDetrConfig, DeformableDetrConfig)):
        kind = type(detector).__name__
        raise UserError(f"to_transformers converts DETR, Conditional DETR and Deformable DETR, and this is a {kind}")
    name, family = next((name, family) for name, family in FAMILIES.items() if isinstance(c, family.config))
    for setting, value in family.ours.items():
        if getattr(c, setting) != value:
            raise UserError(
                f"{setting}={getattr(c, setting)!r} is not supported by transformers, which has only {value!r}"
            )
    if c.mask_padding:
        logging.getLogger("regolite").warning(
            "this detector hides padding (mask_padding=True) and transformers does not: there its outputs are the same "
            "for a single image, but not in a padded batch"
        )

    transformers = _package("transformers")
    settings = {theirs: getattr(c, ours) for ours, theirs in family.fields}
    settings |= {theirs: _weight(ours, getattr(config.loss, ours), theirs) for ours, theirs in family.loss}
    settings |= {f"{kind}dropout": c.dropout for kind in ("", "attention_", "activation_")}
    if settings.get("two_stage"):
        settings["two_stage_num_proposals"] = c.queries
    cls = getattr(transformers, name)
    model = cls(
        cls.config_class(
            backbone_config=_write_backbone(transformers, c, timm),
            dilation=c.dilated,
            id2label=dict(enumerate(config.classes)),
            label2id={label: number for number, label in enumerate(config.classes)},
            **settings,
        )
    )
    if settings.get("with_box_refine") and not settings["two_stage"]:
        # A new model there has one class head under every number.
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
    model.load_state_dict(to_theirs(detector.state_dict(), _backbone_pairs(c.backbone, timm) + family.pairs(c)))
    return model.eval()


def _package(name: str) -> Any:
    """Import an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed: pip install 'regolite[transformers]'") from error


def _read(theirs: Any, fields: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Our fields from their configuration."""
    read: dict[str, Any] = {}
    for ours, setting in fields:
        value = getattr(theirs, setting)
        if read.setdefault(ours, value) != value:
            raise UserError(f"{setting}={value}, but must be {read[ours]}: regolite has one {ours} for both")
    return read


def _weight(ours: str, value: float, theirs: str) -> float | int:
    """A weight of the loss; except for no-object, theirs are whole numbers."""
    if theirs == "eos_coefficient":
        return value
    if value != int(value):
        raise UserError(f"{ours}={value} of the loss is not supported by transformers: its {theirs} is a whole number")
    return int(value)


def _is_timm(theirs: Any) -> bool:
    return theirs.model_type == "timm_backbone"


def _read_backbone(theirs: Any) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Our fields of the backbone, and its stages, from their configuration."""
    dilated = False
    if _is_timm(theirs):
        name = theirs.backbone.split(".")[0]  # the name of the weights follows the dot
        if name not in TIMM:
            raise UserError(f"backbone {theirs.backbone!r} of timm is not one of regolite's; it has {', '.join(TIMM)}")
        if theirs.output_stride not in (None, 16, 32):
            raise UserError(f"output_stride={theirs.output_stride} of the backbone: regolite has 32, or 16 (DC5)")
        dilated = theirs.output_stride == 16
    elif theirs.model_type == "resnet":
        name = next((name for name, depths in DEPTHS.items() if depths == tuple(theirs.depths)), None)
        if name is None:
            raise UserError(f"depths={list(theirs.depths)} of the backbone: regolite has {DEPTHS}")
        usual = type(theirs)()
        for setting in (
            "layer_type", "embedding_size", "hidden_sizes", "hidden_act",
            "downsample_in_first_stage", "downsample_in_bottleneck",
        ):  # fmt: skip
            if getattr(theirs, setting) != getattr(usual, setting):
                raise UserError(f"{setting}={getattr(theirs, setting)!r} of the backbone makes it no {name}")
    else:
        raise UserError(
            f"backbone {theirs.model_type!r} is not one of regolite's; ResNets of timm and transformers are"
        )
    # Their index of the stem is 0, and indices may be negative; the papers call the first stage after the stem stage 2.
    return {"backbone": name, "dilated": dilated}, tuple(index % 5 + 1 for index in theirs.out_indices)


def _write_backbone(transformers: Any, c: Any, timm: bool) -> Any:
    """The configuration of their backbone from ours."""
    indices = [stage - 1 for stage in getattr(c, "backbone_stages", (2, 3, 4, 5))]
    if timm:
        if c.backbone not in TIMM:
            raise UserError(
                f"backbone {c.backbone!r} is not supported by transformers; choose one of {', '.join(TIMM)}"
            )
        _package("timm")
        stride = 16 if c.dilated else None
        return transformers.TimmBackboneConfig(backbone=c.backbone, out_indices=indices, output_stride=stride)
    if c.backbone not in DEPTHS or c.dilated:
        what = "dilated=True" if c.dilated else f"backbone {c.backbone!r}"
        raise UserError(f"{what} is not supported by transformers' own ResNet; use timm=True")
    return transformers.ResNetConfig(depths=list(DEPTHS[c.backbone]), out_features=[f"stage{i}" for i in indices])


def _backbone_pairs(name: str, timm: bool) -> list[Pair]:
    """The backbone: timm uses torchvision's names, as we do; transformers has its own."""
    ours, theirs = "backbone.body.", "model.backbone.model."
    if timm:
        return [Pair(ours, theirs)]

    def convolution(conv: str, norm: str, there: str) -> list[Pair]:
        return [
            Pair(f"{ours}{conv}.", f"{theirs}{there}.convolution."),
            Pair(f"{ours}{norm}.", f"{theirs}{there}.normalization."),
        ]

    pairs = convolution("conv1", "bn1", "embedder.embedder")
    for stage, depth in enumerate(DEPTHS[name]):
        for block in range(depth):
            here, there = f"layer{stage + 1}.{block}", f"encoder.stages.{stage}.layers.{block}"
            pairs += convolution(f"{here}.downsample.0", f"{here}.downsample.1", f"{there}.shortcut")
            for i in range(3):
                pairs += convolution(f"{here}.conv{i + 1}", f"{here}.bn{i + 1}", f"{there}.layer.{i}")
    return pairs


def linears(ours: str, theirs: str, names: dict[str, str]) -> list[Pair]:
    """Pairs of the layers of a module, by our names and theirs."""
    return [Pair(f"{ours}.{here}.", f"{theirs}.{there}.") for here, there in names.items()]


DENSE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
SPLIT = {
    "query": "q_content_proj", "query_position": "q_pos_proj", "key": "k_content_proj", "key_position": "k_pos_proj",
    "value": "v_proj", "out": "o_proj",
}  # fmt: skip
DEFORMABLE = {
    "sampling_offsets": "sampling_offsets", "attention_weights": "attention_weights",
    "value": "value_proj", "out": "output_proj",
}  # fmt: skip
FFN = {"ffn.0": "mlp.fc1", "ffn.3": "mlp.fc2", "ffn_norm": "final_layer_norm"}
MLP = {"0": "layers.0", "2": "layers.1", "4": "layers.2"}


def encoder_pairs(c: Any, attention: dict[str, str]) -> list[Pair]:
    """The encoder, with dense or deformable attention."""
    pairs = []
    for i in range(c.encoder_layers):
        ours, theirs = f"encoder.layers.{i}", f"model.encoder.layers.{i}"
        pairs += linears(f"{ours}.attention", f"{theirs}.self_attn", attention)
        pairs += linears(ours, theirs, {"attention_norm": "self_attn_layer_norm"} | FFN)
    return pairs


def decoder_pairs(c: Any, layers: str, attention: dict[str, str], among: dict[str, str] = DENSE) -> list[Pair]:
    """The decoder's layers, with the given names of cross-attention and self-attention."""
    pairs = []
    for i in range(c.decoder_layers):
        ours, theirs = f"{layers}.{i}", f"model.decoder.layers.{i}"
        pairs += linears(f"{ours}.self_attention", f"{theirs}.self_attn", among)
        pairs += linears(f"{ours}.cross_attention", f"{theirs}.encoder_attn", attention)
        norms = {"self_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm"}
        pairs += linears(ours, theirs, norms | FFN)
    return pairs


def detr_pairs(c: DetrConfig) -> list[Pair]:
    """DETR without its backbone."""
    return [
        Pair("input_projection.", "model.input_projection."),
        *encoder_pairs(c, DENSE),
        *decoder_pairs(c, "decoder.layers", DENSE),
        Pair("decoder.norm.", "model.decoder.layernorm."),
        Pair("query_positions.", "model.query_position_embeddings."),
        Pair("class_head.", "class_labels_classifier."),
        *linears("box_head", "bbox_predictor", MLP),
    ]


def conditional_pairs(c: ConditionalDetrConfig) -> list[Pair]:
    """Conditional DETR without its backbone."""
    return [
        Pair("input_projection.", "model.input_projection."),
        *encoder_pairs(c, DENSE),
        *decoder_pairs(c, "decoder_layers", SPLIT | {"query_spatial": "q_pos_sine_proj"}, SPLIT),
        Pair("decoder_norm.", "model.decoder.layernorm."),
        *linears("reference_head", "model.decoder.ref_point_head", MLP),
        *linears("spatial_scale", "model.decoder.query_scale", MLP),
        Pair("query_positions.", "model.query_position_embeddings."),
        Pair("class_head.", "class_labels_classifier."),
        *linears("box_head", "bbox_predictor", MLP),
    ]


def deformable_pairs(c: DeformableDetrConfig) -> list[Pair]:
    """Deformable DETR without its backbone.

    Their state dict names a head once for each layer, shared or not. Heads that the decoder uses have a second name
    there: the box heads if it refines boxes, and all heads if it is two-stage. The proposals' heads are the last.
    """
    pairs = [Pair("level_positions", "model.level_embed"), *encoder_pairs(c, DEFORMABLE)]
    for i in range(c.levels):
        pairs.append(Pair(f"pyramid.projections.{i}.", f"model.input_proj.{i}.0."))
        pairs.append(Pair(f"pyramid.norms.{i}.", f"model.input_proj.{i}.1."))
    pairs += decoder_pairs(c, "decoder_layers", DEFORMABLE)
    if c.two_stage:
        names = {"project": "enc_output", "project_norm": "enc_output_norm"}
        names |= {"to_query": "pos_trans", "to_query_norm": "pos_trans_norm"}
        pairs += linears("proposals", "model", names)
    else:
        pairs.append(Pair(("query_positions.", "queries."), "model.query_position_embeddings.", dim=1))
        pairs.append(Pair("reference_points.", "model.reference_points."))

    layers = tuple(range(c.decoder_layers))
    heads = {f"_heads.{i}.": (i,) for i in layers} if c.refine else {"_heads.0.": layers}
    for ours, numbers in heads.items():
        pairs += _head(f"class{ours}", f"box{ours}", numbers, c)
    if c.two_stage:
        pairs += _head("proposals.class_head.", "proposals.box_head.", (c.decoder_layers,), c)
    return pairs


def _head(class_head: str, box_head: str, numbers: tuple[int, ...], c: DeformableDetrConfig) -> list[Pair]:
    """A class head and a box head, with one or several numbers in their state dict."""

    def theirs(name: str, twice: bool, part: str = "") -> tuple[str, ...]:
        prefixes = ("", "model.decoder.") if twice else ("",)
        return tuple(f"{prefix}{name}.{i}.{part}" for prefix in prefixes for i in numbers)

    boxes = [Pair(f"{box_head}{ours}.", theirs("bbox_embed", c.refine, f"{there}.")) for ours, there in MLP.items()]
    return [Pair(class_head, theirs("class_embed", c.two_stage)), *boxes]


FIXED = {
    "activation_function": ("relu", "so have regolite's feed-forward networks"),
    "position_embedding_type": ("sine", "regolite's detectors learn no positions of cells"),
    "num_channels": (3, "regolite's images have three"),
}
NORMED_TWICE = "with it transformers' decoder normalizes between its layers; set it if the weights were not trained so"
FAMILIES = {
    "DetrForObjectDetection": Family(
        DetrConfig, FIELDS, detr_pairs,
        ours={"reference_points": False, "scoring": "softmax", "pre_norm": False},
        theirs=FIXED | {"auxiliary_loss": (False, NORMED_TWICE)},
    ),
    "ConditionalDetrForObjectDetection": Family(
        ConditionalDetrConfig, FIELDS, conditional_pairs, ours={},
        theirs=FIXED | {"auxiliary_loss": (False, NORMED_TWICE)}, loss=CONDITIONAL_LOSS_FIELDS,
    ),
    "DeformableDetrForObjectDetection": Family(
        DeformableDetrConfig, DEFORMABLE_FIELDS, deformable_pairs, ours={}, theirs=FIXED
    ),
}  # fmt: skip
