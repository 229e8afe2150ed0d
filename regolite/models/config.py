"""The configuration of a model: everything about it but its weights; and the registry of base detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from regolite.errors import UserError
from regolite.losses import LossConfig
from regolite.models.detector import Detector, as_detector
from regolite.models.rego import RegoConfig
from regolite.utils.validation import Checked, check_bounds, from_values, shown

D = TypeVar("D", bound=Callable[..., Detector])


class DetectorConfig(Checked):
    """The configuration of a base detector; each detector has a frozen dataclass of its own.

    Attributes:
        channel_multiple: what the number of channels ``dim`` must be a multiple of: sine embeddings of x and y need 4,
            group normalization 32.
        default_classes: names of the classes where nobody names any: those of published weights.
        default_category_ids: COCO's id of each of them.
    """

    channel_multiple: ClassVar[int] = 4
    default_classes: ClassVar[tuple[str, ...]] = ()
    default_category_ids: ClassVar[tuple[int, ...]] = ()

    def without_pretrained(self) -> DetectorConfig:
        """The same detector with a randomly initialized backbone."""
        return replace(self, weights=None) if "weights" in {f.name for f in fields(self)} else self


DETECTORS: dict[str, tuple[type[DetectorConfig], Callable[[Any, int], Detector]]] = {}
"""By name: the configuration of each base detector, and what builds it from that and a number of classes."""


def register(name: str, config: type[DetectorConfig]) -> Callable[[D], D]:
    """Register the class, or the function, below as a base detector: it is called with a configuration and K.

    Args:
        name: what checkpoints call it.
        config: the class of its configuration.
    """

    def add(detector: D) -> D:
        DETECTORS[name] = (config, detector)
        return detector

    return add


def registered(config: DetectorConfig) -> tuple[str, Callable[[Any, int], Detector]]:
    """The name of the base detector that a configuration describes, and what builds it."""
    return next((name, build) for name, (kind, build) in DETECTORS.items() if type(config) is kind)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Everything about a model but its weights.

    Attributes:
        preset: name of the preset that it was made from.
        detector: the base detector.
        rego: what stands on top of it, or None.
        loss: how it is trained.
        augment: name of the image recipe, see :func:`regolite.data.make_transform`.
        image_size: size of the images that the recipe makes.
        classes: names of the classes, in the order of the model's class ids.
        category_ids: COCO's id of each class.
    """

    preset: str
    detector: DetectorConfig
    rego: RegoConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    augment: Literal["detr", "laptop", "laptop_crop", "none"] = "detr"
    image_size: int = 800
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the values, and that every class has an id where classes have any."""
        super().__post_init__()
        check_bounds("num_classes", max(1, len(self.classes), len(self.category_ids)))
        if self.classes and self.category_ids and len(self.classes) != len(self.category_ids):
            raise UserError(f"{len(self.classes)} classes need as many category_ids, not {len(self.category_ids)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"kind": registered(self.detector)[0]}

    def without_pretrained(self) -> ModelConfig:
        """The same model with a random backbone: for loading a checkpoint, which brings all weights itself."""
        return replace(self, detector=self.detector.without_pretrained())

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`, for content of files that anybody may have written.

        Raises:
            UserError: a part is missing or unknown, or a value of a wrong type or beyond its bounds.
        """
        if str(stored.get("kind")) not in DETECTORS:
            raise UserError(f"kind={shown(stored.get('kind'))} is not one of {', '.join(DETECTORS)}")
        detector, _ = DETECTORS[str(stored["kind"])]
        kinds: dict[str, type[Checked]] = {"detector": detector, "rego": RegoConfig, "loss": LossConfig}
        stored = {name: value for name, value in stored.items() if name != "kind"}
        for part, kind in kinds.items():
            values = stored.get(part)
            if not isinstance(values, dict) and (part != "rego" or values is not None):
                raise UserError(f"{part}={shown(values)} is not a {kind.__name__}")
            stored[part] = from_values(kind, values) if values is not None else None
        if missing := {"preset"} - set(stored):
            raise UserError(f"{', '.join(missing)} is missing")
        return from_values(ModelConfig, stored)


def config_of(
    model: nn.Module, need: str = "a checkpoint carries the model's configuration: make the model with regolite.build"
) -> ModelConfig:
    """The configuration of a model made by :func:`regolite.build`.

    Args:
        model: the model.
        need: the message if it has none.

    Raises:
        UserError: the model carries no configuration, as one assembled by hand.
    """
    config = as_detector(model).model_config
    if config is None:
        raise UserError(need)
    return config


def class_head_names(names: Iterable[str]) -> list[str]:
    """Which of a model's weights have one row per class.

    They are those of class heads (the base detector's, its proposals' and the stages') and of noised queries.
    """
    return [key for key in names if {"class_head", "class_heads", "noised_queries"} & set(key.split("."))]
