"""The contract of a detector: what REGO, training, evaluation, checkpoints and records ask of a model.

A detector is a subclass of :class:`Detector` that sets six attributes and returns a
:class:`~regolite.types.DetectorOutput`. Everything else has a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from regolite.losses import LossConfig, OwnLoss, SetLoss
from regolite.types import ImageBatch

if TYPE_CHECKING:  # a ModelConfig contains the configuration of REGO, which stands on a Detector
    from regolite.models.config import ModelConfig

Scoring = Literal["softmax", "sigmoid"]
"""How logits become scores: softmax over the classes and "no object", or a sigmoid for each class."""

Attention = tuple[nn.Module, nn.Module]
"""A transformer layer and an attention module in it."""

ParameterGroup = Literal["backbone", "sampling", "rest"]
"""A group of parameters with its own learning-rate multiplier."""

ATTRIBUTES = ("dim", "heads", "num_logits", "scoring", "feature_channels", "projected")
"""What a base detector of REGO must have."""


class Detector(nn.Module):
    """The base class of all detectors.

    ``forward`` takes an :class:`~regolite.types.ImageBatch` and returns a :class:`~regolite.types.DetectorOutput`; if
    the detector ``denoises`` or has a loss of its own, it also takes the list of :class:`~regolite.types.Target` as
    ``targets``.

    The transformer layers are recognized by the names of their attention modules: ``self_attention`` and
    ``cross_attention`` in a decoder layer, ``attention`` in an encoder layer. Such layers are recorded and
    checkpointed; a detector with other names overrides :meth:`named_attentions` and :meth:`transformer_layers`.

    The baselines (:mod:`regolite.models.baselines`) have no queries: they return final detections, compute their own
    loss, and have neither ``dim`` nor the other attributes that REGO needs.

    Attributes:
        dim: channels C of the queries' hidden states.
        heads: attention heads M; divides ``dim``.
        num_logits: logits per query: K classes, and with softmax scoring one more for "no object".
        scoring: how logits become scores, ``"softmax"`` or ``"sigmoid"``.
        feature_channels: channels of each map in :attr:`DetectorOutput.features`, finest map first.
        projected: whether these maps are projections to C channels, or the backbone's own, which REGO projects.
        denoises: whether ``forward`` also trains on noised ground truth, for which training passes ``targets``.
        has_own_loss: whether ``forward``, given ``targets``, returns the terms of a loss of its own by name, each
            normalized by these images, and not an output for :class:`~regolite.losses.SetLoss`.
        has_unused_parameters: whether some trainable parameters get no gradient in training. Several processes then
            search for them after every forward pass; otherwise they would wait for these gradients.
        model_config: the complete configuration, which :func:`regolite.build` sets; None if assembled by hand. Image
            preparation, training and checkpoints need it (:func:`regolite.models.config.config_of`).
    """

    dim: int
    heads: int
    num_logits: int
    scoring: Scoring
    feature_channels: list[int]
    projected: bool
    denoises: bool = False
    has_own_loss: bool = False
    has_unused_parameters: bool = False
    model_config: ModelConfig | None = None

    @property
    def num_stages(self) -> int:
        """Number of REGO stages; with any, ``forward`` takes the number of stages to run as ``stages``."""
        return 0

    @property
    def base_detector(self) -> Detector:
        """The detector without REGO."""
        return self

    @property
    def takes_targets(self) -> bool:
        """Whether training passes ``targets`` to ``forward``."""
        return self.denoises or self.has_own_loss

    def criterion(self, config: LossConfig) -> SetLoss | OwnLoss:
        """The loss of what ``forward`` returns in training.

        Args:
            config: weights of the set loss; a loss of its own has none.
        """
        return OwnLoss() if self.has_own_loss else SetLoss(config, self.scoring)

    def parameter_group(self, name: str) -> ParameterGroup:
        """The group of a parameter, which has its own learning-rate multiplier.

        By default, ``backbone`` holds the parameters of modules of this name, and ``sampling`` those of
        ``sampling_offsets`` and ``reference_points``. Both learn more slowly than the rest (Deformable DETR).

        Args:
            name: name of the parameter as in ``named_parameters``.
        """
        if "backbone." in name:
            return "backbone"
        return "sampling" if "sampling_offsets." in name or "reference_points." in name else "rest"

    def padded(self, images: ImageBatch) -> ImageBatch:
        """The batch as a detector pads it further; its attention has the coordinates of this batch. Unchanged here."""
        return images

    def transformer_layers(self) -> list[nn.Module]:
        """The layers whose activations training can checkpoint, those of REGO's stages included."""
        return transformer_layers(self)

    def named_attentions(self) -> Iterator[tuple[str, Attention]]:
        """The attention modules that a record can trace, with their layers, in the order of computation.

        Names are ``encoder.0``, ``decoder.0.self``, ``decoder.0.cross``, ...; those of REGO's stages are
        ``stage.1.encoder.0``, ``stage.1.decoder.0.self``, ``stage.1.relations.0``, ...
        """
        return named_attentions(self)


def as_detector(model: nn.Module) -> Detector:
    """The attributes of a model by the contract, to read.

    Args:
        model: a :class:`Detector`, also if compiled; or a plain module with some of its attributes. Call the model
            itself: the result need not be the same object.

    Returns:
        The detector; for a plain module a view with the attributes that it has, and the defaults.
    """
    original = getattr(model, "_orig_mod", model)  # torch.compile
    return original if isinstance(original, Detector) else _View(model)


class _View(Detector):
    """A plain module with the attributes of a detector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in (*ATTRIBUTES, "denoises", "has_own_loss", "has_unused_parameters", "model_config"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self.model = model

    def transformer_layers(self) -> list[nn.Module]:
        return transformer_layers(self.model)

    def named_attentions(self) -> Iterator[tuple[str, Attention]]:
        return named_attentions(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The encoder and decoder layers of a model, recognized by their attention modules; none of its backbone."""
    layers = []
    for name, child in model.named_children():
        if name == "backbone":
            continue
        parts = {part for part, _ in child.named_children()}
        if "attention" in parts or {"self_attention", "cross_attention"} <= parts:
            layers.append(child)
        else:
            layers += transformer_layers(child)
    return layers


def named_attentions(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    """The attention modules of the encoder and decoder layers of a model, as :meth:`Detector.named_attentions`."""
    encoder = decoder = 0
    for layer in transformer_layers(model):
        parts = dict(layer.named_children())
        if "attention" in parts:
            yield f"encoder.{encoder}", (layer, parts["attention"])
            encoder += 1
        else:
            yield f"decoder.{decoder}.self", (layer, parts["self_attention"])
            yield f"decoder.{decoder}.cross", (layer, parts["cross_attention"])
            decoder += 1
