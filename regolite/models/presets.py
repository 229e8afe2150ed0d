"""Named models: the rows of the paper's Table 1, and sizes for laptops.

A preset is a :class:`~regolite.models.config.ModelConfig`, which is all that :func:`build` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from regolite.errors import UserError, did_you_mean
from regolite.losses import LossConfig
from regolite.models.anchor_detr import AnchorDetrConfig
from regolite.models.baselines import BaselineConfig
from regolite.models.conditional_detr import ConditionalDetrConfig
from regolite.models.config import ModelConfig, registered
from regolite.models.deformable_detr import DeformableDetrConfig
from regolite.models.detector import Detector
from regolite.models.detr import DetrConfig
from regolite.models.rego import Rego, RegoConfig
from regolite.models.smca import SmcaConfig
from regolite.models.sparse_rcnn import SparseRcnnConfig
from regolite.models.up_detr import PatchDetrConfig
from regolite.utils.validation import checked, of_kind, whole

_DETR = DetrConfig()
_DETR_STAR = replace(_DETR, queries=300, reference_points=True, scoring="sigmoid")
_UP_DETR = replace(_DETR, pre_norm=True)
_DEFORMABLE = DeformableDetrConfig()
_REFINED = replace(_DEFORMABLE, refine=True)
_TWO_STAGE = replace(_REFINED, two_stage=True)
_DENSE_PRIOR: dict[str, Any] = {"encoder_layers": 3, "decoder_layers": 1, "token_queries": True, "shared_heads": True}
_EFFICIENT = replace(_TWO_STAGE, queries=100, ffn_dim=2048, **_DENSE_PRIOR)
_DINO: dict[str, Any] = {"mixed_queries": True, "look_forward_twice": True, "denoising": True}
_CONDITIONAL = ConditionalDetrConfig()
_ANCHOR = AnchorDetrConfig()
_SMCA = SmcaConfig()
_SMCA_SINGLE_SCALE = replace(
    _SMCA, backbone_stages=(5,), coarser=False, encoder_layers=6, multi_scale_layers=(), ffn_dim=2048
)
_SPARSE = SparseRcnnConfig()
_SOFTMAX_LOSS = LossConfig(label=1.0, label_cost=1.0)
_DINO_LOSS = LossConfig(label=1.0)
_CORNERS_LOSS = LossConfig(l1_boxes="xyxy")

# Laptop sizes: a small network that a CPU trains in minutes. `tiny` starts from the bundled ImageNet features, `scenes`
# from nothing.
_TINY: dict[str, Any] = {
    "backbone": "mobilenet_v2", "weights": "bundled", "frozen_stages": 2, "dim": 128,
    "encoder_layers": 2, "decoder_layers": 3, "ffn_dim": 512, "dropout": 0.0, "queries": 100,
}  # fmt: skip
_SCENES = _TINY | {"backbone": "tiny", "weights": None, "frozen_stages": 0, "queries": 30}
_TINY_REGO = RegoConfig(ffn_dim=512, dropout=0.0)


def _family(name: str, detector: Any, loss: LossConfig, rego: RegoConfig, **recipe: Any) -> dict[str, ModelConfig]:
    """A base detector and REGO on it."""
    return {
        name: ModelConfig(name, detector, None, loss, **recipe),
        f"rego_{name}": ModelConfig(f"rego_{name}", detector, rego, loss, **recipe),
    }


def _presets() -> dict[str, ModelConfig]:
    table: dict[str, ModelConfig] = {}
    focal, rego = LossConfig(), RegoConfig()
    for backbone, tag in (("resnet50", "r50"), ("resnet101", "r101"), ("resnext101_32x8d", "x101")):
        table |= _family(f"detr_{tag}", replace(_DETR, backbone=backbone), _SOFTMAX_LOSS, rego)
        table |= _family(f"detr_star_{tag}", replace(_DETR_STAR, backbone=backbone), focal, rego)
        if tag != "x101":
            dc5: dict[str, Any] = {"backbone": backbone, "dilated": True}
            table |= _family(f"detr_dc5_{tag}", replace(_DETR, **dc5), _SOFTMAX_LOSS, rego)
            table |= _family(f"detr_star_dc5_{tag}", replace(_DETR_STAR, **dc5), focal, rego)
            table |= _family(f"conditional_detr_{tag}", replace(_CONDITIONAL, backbone=backbone), focal, rego)
            table |= _family(f"conditional_detr_dc5_{tag}", replace(_CONDITIONAL, **dc5), focal, rego)
            table |= _family(f"anchor_detr_{tag}", replace(_ANCHOR, backbone=backbone), focal, rego)
            table |= _family(f"anchor_detr_dc5_{tag}", replace(_ANCHOR, **dc5), focal, rego)
            table |= _family(f"smca_{tag}", replace(_SMCA, backbone=backbone), focal, rego)
            single_scale = replace(_SMCA_SINGLE_SCALE, backbone=backbone)
            table |= _family(f"smca_single_scale_{tag}", single_scale, focal, rego)
        table |= _family(f"deformable_detr_{tag}", replace(_DEFORMABLE, backbone=backbone), focal, rego)
        table |= _family(f"deformable_detr_refined_{tag}", replace(_REFINED, backbone=backbone), focal, rego)
        table |= _family(f"deformable_detr_two_stage_{tag}", replace(_TWO_STAGE, backbone=backbone), focal, rego)
    table |= _family("up_detr_r50", _UP_DETR, _SOFTMAX_LOSS, rego)
    table["up_detr_pretraining_r50"] = ModelConfig("up_detr_pretraining_r50", PatchDetrConfig(), None, _SOFTMAX_LOSS)
    table |= _family("sparse_rcnn_r50", _SPARSE, _CORNERS_LOSS, rego)
    table |= _family("efficient_detr_r50", _EFFICIENT, focal, rego)
    table |= _family("dino_r50", replace(_TWO_STAGE, queries=900, ffn_dim=2048, dropout=0.0, **_DINO), _DINO_LOSS, rego)
    for tag, sizes, image_size in (("tiny", _TINY, 256), ("scenes", _SCENES, 128)):
        recipe: dict[str, Any] = {"augment": "laptop", "image_size": image_size}
        deformable = {**sizes, "levels": 3}
        table |= _family(f"detr_{tag}", replace(_DETR, **sizes), _SOFTMAX_LOSS, _TINY_REGO, **recipe)
        table |= _family(f"detr_star_{tag}", replace(_DETR_STAR, **sizes), focal, _TINY_REGO, **recipe)
        table |= _family(f"up_detr_{tag}", replace(_UP_DETR, **sizes), _SOFTMAX_LOSS, _TINY_REGO, **recipe)
        pretext = PatchDetrConfig(**sizes | {"frozen_stages": 5, "patch_size": image_size // 4})
        name = f"up_detr_pretraining_{tag}"
        table[name] = ModelConfig(name, pretext, None, _SOFTMAX_LOSS, **recipe)
        table |= _family(f"conditional_detr_{tag}", replace(_CONDITIONAL, **sizes), focal, _TINY_REGO, **recipe)
        anchored = {**sizes, "queries": 3 * (sizes["queries"] // 3)}  # points times 3 patterns
        table |= _family(f"anchor_detr_{tag}", replace(_ANCHOR, **anchored), focal, _TINY_REGO, **recipe)
        levels: dict[str, Any] = {"backbone_stages": (3, 4, 5), "coarser": False, "multi_scale_layers": (2,)}
        table |= _family(f"smca_{tag}", replace(_SMCA, **sizes, **levels), focal, _TINY_REGO, **recipe)
        sparse = {k: v for k, v in sizes.items() if k != "encoder_layers"} | {"dynamic_dim": 32}
        table |= _family(f"sparse_rcnn_{tag}", replace(_SPARSE, **sparse), _CORNERS_LOSS, _TINY_REGO, **recipe)
        table |= _family(f"deformable_detr_{tag}", replace(_DEFORMABLE, **deformable), focal, _TINY_REGO, **recipe)
        table |= _family(f"deformable_detr_refined_{tag}", replace(_REFINED, **deformable), focal, _TINY_REGO, **recipe)
        table |= _family(
            f"deformable_detr_two_stage_{tag}", replace(_TWO_STAGE, **deformable), focal, _TINY_REGO, **recipe
        )
        efficient = replace(_TWO_STAGE, **deformable | _DENSE_PRIOR)
        table |= _family(f"efficient_detr_{tag}", efficient, focal, _TINY_REGO, **recipe)
        table |= _family(f"dino_{tag}", replace(_TWO_STAGE, **deformable | _DINO), _DINO_LOSS, _TINY_REGO, **recipe)
    # The detector that is shipped. Query denoising and queries from tokens let it learn from few images. One decoder
    # layer is enough: further ones corrected next to nothing, and the stages of REGO are there to correct. Glimpses are
    # tighter than the paper's: in an image of 320 pixels, three times a box is often most of the image.
    learns_fast = {"weights": "bundled_coco", "token_queries": True, "denoising": True}
    everyday = replace(_TWO_STAGE, **_TINY | {"levels": 3, "decoder_layers": 1} | learns_fast)
    tighter, inherited = replace(_TINY_REGO, alphas=(2.0, 1.5, 1.0)), LossConfig(stage_matching="base")
    table |= _family("deformable_detr_everyday", everyday, inherited, tighter, augment="laptop", image_size=320)
    baselines: tuple[tuple[str, Any, str, str, float], ...] = (
        ("fcos_r50", "fcos", "resnet50", "coco", 1e-5),
        ("faster_rcnn_r50", "faster_rcnn", "resnet50", "coco", 0.0),
        ("faster_rcnn_r101", "faster_rcnn", "resnet101", "imagenet", 1e-5),
        ("mask_rcnn_x101", "mask_rcnn", "resnext101_64x4d", "imagenet", 1e-5),
        ("cascade_mask_rcnn_x101", "cascade_mask_rcnn", "resnext101_64x4d", "imagenet", 1e-5),
        ("tsp_rcnn_r50", "tsp_rcnn", "resnet50", "imagenet", 1e-5),
    )
    for name, kind, backbone, weights, norm_eps in baselines:
        table[name] = ModelConfig(name, BaselineConfig(kind, backbone, weights, norm_eps=norm_eps))
    for kind in ("fcos", "faster_rcnn", "cascade_mask_rcnn", "tsp_rcnn"):
        small: dict[str, Any] = {"kind": kind, "backbone": "mobilenet_v2", "weights": "bundled", "dim": 128}
        table[f"{kind}_tiny"] = ModelConfig(f"{kind}_tiny", BaselineConfig(**small), augment="laptop", image_size=256)
    return table


_TABLE = _presets()


def presets() -> tuple[str, ...]:
    """The names of all presets."""
    return tuple(_TABLE)


PARTS = ("detector", "rego", "loss")


def configure(preset: str, **overrides: Any) -> ModelConfig:
    """The configuration of a preset, with changes.

    Args:
        preset: one of :func:`presets`.
        **overrides: fields of the model or of its parts ``detector``, ``rego`` and ``loss``. A field that only one of
            them has is given by its name (``queries=50``). Otherwise name the part: ``rego={"ffn_dim": 1024}``, or
            ``rego.ffn_dim=1024`` as text on the command line. ``form="released"`` also sets what the released code
            does beside the module: feed-forward networks 1024 wide, padding not masked in the backbone, no auxiliary
            losses in the stages, the base detector's classification loss times 0.8, the base detector's last layer
            trained on the pairs of the last stage.

    Raises:
        UserError: for a preset or a field that does not exist (the message names the nearest one), or a field that
            several parts have.
    """
    of_kind("preset", preset, str, "the name of a preset")
    if preset not in _TABLE:
        raise UserError(
            f"unknown model {preset!r}; {did_you_mean(preset, _TABLE)} `python -m regolite presets` lists them"
        )
    config = _TABLE[preset]
    parts = {"": config} | {name: part for name in PARTS if (part := getattr(config, name)) is not None}
    changes: dict[str, dict[str, Any]] = {name: {} for name in parts}
    for part, name, value in _flat(overrides):
        changes[_owner(preset, parts, part, name)][name] = tuple(value) if isinstance(value, list) else value
    if config.rego is not None and changes["rego"].get("form") == "released":
        changes["rego"] = {"ffn_dim": min(1024, config.rego.ffn_dim)} | changes["rego"]
        changes["detector"] = {"mask_padding": False} | changes["detector"]
        inherits = changes["loss"].get("stage_matching", config.loss.stage_matching) == "base"
        loss: dict[str, Any] = {"base_matches": "own" if inherits else "last_stage"}
        changes["loss"] = loss | {"stage_auxiliary": False, "base_label": 0.8} | changes["loss"]
    config = checked(config, changes.pop(""))
    return replace(config, **{name: checked(parts[name], values) for name, values in changes.items()})


def _owner(preset: str, parts: Mapping[str, Any], part: str | None, field: str) -> str:
    """The part that an override changes: the one that it names, or the only one that has the field."""
    if part is not None and (not part or part not in parts):
        raise UserError(f"{preset} has no part {part!r}; {did_you_mean(part, filter(None, parts))}")
    searched = parts if part is None else [part]
    known = {name: set(_names(parts[name])) - ({*PARTS} if not name else set()) for name in searched}
    owners = [name for name, own in known.items() if field in own]
    if len(owners) > 1:
        choices = " or ".join(f"{name}.{field}" for name in owners)
        raise UserError(f"several parts of {preset} have a field {field!r}: write {choices}")
    if not owners:
        raise UserError(f"{preset} has no field {field!r}; {did_you_mean(field, sorted(set().union(*known.values())))}")
    return owners[0]


def _flat(overrides: dict[str, Any]) -> Iterator[tuple[str | None, str, Any]]:
    """Overrides as part (None if it was not named), field and value."""
    for name, value in overrides.items():
        if name in PARTS and isinstance(value, Mapping):
            yield from ((name, field, each) for field, each in value.items())
        elif "." in name:
            yield (*name.split(".", 1), value)
        else:
            yield None, name, value


def build(preset: str | ModelConfig, num_classes: int | None = None, **overrides: Any) -> Detector:
    """Build a model.

    Args:
        preset: the name of a preset, or a configuration.
        num_classes: number of classes K; by default the number of the configuration's ``classes``, or COCO's 80
            (baselines: the 90 of torchvision's weights, which are COCO's ids 1 to 90, by name).
        **overrides: changes of the preset, see :func:`configure`.

    Returns:
        The detector, with its configuration as ``model.model_config``; classes without names get their numbers.

    Raises:
        UserError: as :func:`configure`, when the configuration names another number of classes, and when the
            backbone's weights can't be had.
    """
    of_kind("preset", preset, (str, ModelConfig), "the name of a preset or a ModelConfig")
    config = configure(preset, **overrides) if isinstance(preset, str) else preset
    if num_classes is None and not config.classes and config.detector.default_classes:
        config = replace(  # a baseline's: 90, as torchvision counts, not 80
            config, classes=config.detector.default_classes, category_ids=config.detector.default_category_ids
        )
    num_classes = whole("num_classes", num_classes if num_classes is not None else len(config.classes) or 80)
    _check_dim(config)
    if len(config.classes) not in (0, num_classes):
        raise UserError(f"num_classes={num_classes}, but the configuration names {len(config.classes)} classes")
    numbers = tuple(range(num_classes))
    names, ids = config.classes or tuple(map(str, numbers)), config.category_ids or numbers
    config = replace(config, classes=names, category_ids=ids)
    _, detector = registered(config.detector)
    try:
        model = detector(config.detector, num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    model.model_config = replace(config, rego=None)
    return model if config.rego is None else Rego(model, config.rego)  # Rego adds itself to the configuration


def _check_dim(config: ModelConfig) -> None:
    """Refuse channels that cannot be divided as attention, sine embeddings and group normalization need."""
    dim, heads = getattr(config.detector, "dim", 0), getattr(config.detector, "heads", 1)
    if dim % heads:
        raise UserError(f"{heads} heads do not divide {dim} channels: give a dim that is a multiple of heads")
    multiple = 32 if config.rego is not None else config.detector.channel_multiple
    why = {4: "sines encode x and y", 32: "32 groups of channels are normalized"}[multiple]
    if dim % multiple:
        raise UserError(f"dim={dim} must be a multiple of {multiple}: {why}")


def _names(config: Any) -> list[str]:
    return [f.name for f in fields(config)]
