"""REGO, the recurrent glimpse-based decoder (Chen, Zhang, Tao, CVPR 2022, section 4), on top of any detector.

Each of S stages looks again at what the stage before has found (Algorithm 1):

1. enlarge the boxes O_box(i-1) by alpha(i): the RoIs;
2. cut glimpses V(i) from the features (equation 7);
3. decode: V(i) asks, H_dec(i-1) answers, which gives H_g(i) (equation 6);
4. concatenate: H_dec(i) = [H_g(i), H_dec(i-1)] (equation 5);
5. predict: classes from H_dec(i), boxes as a correction of O_box(i-1) in the space before the sigmoid (equation 4).

Two forms exist. ``"paper"`` follows the text. ``"released"`` has the modules of the authors' code, so that weights
trained with it load and give the same outputs; the places where it parts from the paper are marked below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regolite.boxes import enlarge, inverse_sigmoid, to_pixels
from regolite.errors import UserError
from regolite.models.attention import MultiHeadAttention
from regolite.models.detector import (
    ATTRIBUTES,
    Attention,
    Detector,
    ParameterGroup,
    as_detector,
    named_attentions,
    transformer_layers,
)
from regolite.models.glimpse import FeatureContext, GlimpseHead, cut_glimpses
from regolite.models.transformer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    box_head,
    class_head,
    in_full_precision,
)
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction, Target
from regolite.utils.devices import constant
from regolite.utils.validation import Checked, from_values, shown


@dataclass(frozen=True)
class RegoConfig(Checked):
    """What a REGO is made of.

    Attributes:
        stages: number of stages S.
        alphas: enlarging ratio of each stage; empty for the paper's S, S - 1, ..., 1 (section 4.3).
        form: ``"paper"`` or ``"released"``.
        decoder_layers: layers of each stage's glimpse decoder.
        encoder_layers: self-attention layers over H_dec(i-1) before it is asked; the paper found that they bring next
            to nothing (section 4.3) and has none.
        ffn_dim: width of the feed-forward networks.
        dropout: probability of dropping.
        query: who asks in equation (6): the ``"glimpse"``, or the ``"hidden"`` states, 0.5 AP worse in section 4.2.
        detach_hidden: cut the gradient of H_dec(i-1) as key and value too. By the letter of section A.1 nothing flows
            into the outputs of the previous stage; the released code lets it flow here, which is how REGO teaches the
            base detector "for free" (A.2), and so do we by default.
        frozen: the base detector is neither trained nor in training mode (no dropout, no new statistics of batch
            normalization): REGO learns on top of a detector that stays bit for bit what it is.
    """

    stages: int = 3
    alphas: tuple[float, ...] = ()
    form: Literal["paper", "released"] = "paper"
    decoder_layers: int = 2
    encoder_layers: int = 0
    ffn_dim: int = 2048
    dropout: float = 0.1
    query: Literal["glimpse", "hidden"] = "glimpse"
    detach_hidden: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        super().__post_init__()
        if self.stages < 1:
            raise UserError(f"REGO needs at least one stage, not {self.stages}")
        if self.alphas and len(self.alphas) != self.stages:
            raise UserError(f"{self.stages} stages need {self.stages} alphas, not {len(self.alphas)}: {self.alphas}")
        if 0 in self.alphas:
            raise UserError(f"alphas={self.alphas} must be greater than 0: a glimpse needs an area")

    @property
    def ratios(self) -> tuple[float, ...]:
        """alpha(1), ..., alpha(S)."""
        return self.alphas or tuple(float(a) for a in range(self.stages, 0, -1))


class Rego(Detector):
    """A detector with REGO on top.

    Args:
        detector: the base detector: a :class:`~regolite.models.detector.Detector`, or any module with its attributes.
        config: what REGO is made of; fields can be given by name instead, as in ``Rego(detector, stages=3)``.

    Raises:
        UserError: when the detector lacks what REGO asks for.
    """

    def __init__(self, detector: nn.Module, config: RegoConfig | None = None, **fields: object) -> None:
        super().__init__()
        if config is not None and not isinstance(config, RegoConfig):
            raise UserError(f"config={shown(config)} is not a RegoConfig: give one, or its fields by name")
        self.config = config = config if config is not None else from_values(RegoConfig, fields)
        base = as_detector(detector)
        missing = [name for name in ATTRIBUTES if not hasattr(base, name)]
        if missing:
            raise UserError(
                f"REGO can't stand on a {type(detector).__name__}, which has no {', '.join(missing)}; a detector of "
                "transformers gets them from regolite.interop.adapt"
            )
        self.detector = detector
        self.dim, self.heads, self.scoring, self.num_logits = base.dim, base.heads, base.scoring, base.num_logits
        self.feature_channels, self.projected = base.feature_channels, base.projected
        self.denoises = base.denoises and not config.frozen
        self.has_unused_parameters = base.has_unused_parameters and not config.frozen
        if base.model_config is not None:  # a detector of regolite.build: together they can be saved and loaded
            self.model_config = replace(base.model_config, rego=config)
        # Single-scale detectors hand over the raw maps of their backbone: a 1x1 convolution each (appendix A.1).
        self.projections = nn.ModuleList(
            nn.Identity() if base.projected else nn.Conv2d(channels, self.dim, 1) for channels in base.feature_channels
        )
        released = config.form == "released"
        self.contexts = nn.ModuleList(FeatureContext(self.dim) for _ in self.projections) if released else None
        self.stages = nn.ModuleList(
            Stage(config, number, self.dim, self.heads, self.num_logits, self.scoring)
            for number in range(1, config.stages + 1)
        )
        if config.frozen:
            detector.requires_grad_(False).eval()

    @property
    def num_stages(self) -> int:
        """Number of stages S."""
        return len(self.stages)

    @property
    def base_detector(self) -> Detector:
        """The detector without REGO."""
        return as_detector(self.detector)

    def parameter_group(self, name: str) -> ParameterGroup:
        """As the base detector has it; REGO's own parameters learn at the full rate."""
        base = name.removeprefix("detector.")
        return self.base_detector.parameter_group(base) if base != name else "rest"

    def transformer_layers(self) -> list[nn.Module]:
        """The layers of the base detector, then those of the stages."""
        return [*self.base_detector.transformer_layers(), *transformer_layers(self.stages)]

    def named_attentions(self) -> Iterator[tuple[str, Attention]]:
        """The attentions of the base detector, then those of the stages; see :class:`Detector`.

        A stage's cross-attention relates glimpses to queries: it is called ``stage.1.relations.0``.
        """
        yield from self.base_detector.named_attentions()
        for number, stage in enumerate(self.stages, start=1):
            for name, attention in named_attentions(stage):
                if name.endswith(".cross"):
                    name = f"relations.{name.split('.')[1]}"
                yield f"stage.{number}.{name}", attention

    def train(self, mode: bool = True) -> Rego:
        """Training or evaluation mode; a frozen base detector stays in the latter."""
        super().train(mode)
        if self.config.frozen:
            self.detector.eval()
        return self

    def forward(
        self, images: ImageBatch, stages: int | None = None, targets: Sequence[Target] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: the images.
            stages: how many stages to run; 0 switches REGO off and leaves the base detector's output, bit for bit.
                All of them by default.
            targets: the ground truth, for a base detector that trains with denoising; then the stages do, too.

        Raises:
            UserError: when there are fewer stages than wanted.
        """
        wanted = len(self.stages) if stages is None else stages
        if not 0 <= wanted <= len(self.stages):
            raise UserError(f"stages is {wanted}, and this model has 0 to {len(self.stages)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            output = self.detector(images) if targets is None else self.detector(images, targets)
        if wanted == 0:
            return output

        features = [FeatureMap(p(f.tensor), f.mask, f.stride) for p, f in zip(self.projections, output.features)]
        sizes = images.sizes
        if self.contexts is not None:
            features = [FeatureMap(c(f.tensor), f.mask, f.stride) for c, f in zip(self.contexts, features)]
            # Released: RoIs are scaled by the padded size of the batch, and padding counts as image.
            features = [FeatureMap(f.tensor, torch.zeros_like(f.mask), f.stride) for f in features]
            sizes = constant(images.mask.shape[1:], sizes.device).expand_as(sizes)

        for part in filter(None, (output, output.denoising)):
            hidden, boxes = part.queries, part.layers[-1].boxes
            for stage in self.stages[:wanted]:
                predictions, hidden = stage(features, sizes, hidden, boxes.detach(), query_mask=part.query_mask)
                part.stages.append(predictions)
                boxes = predictions[-1].boxes
        return output


class Stage(nn.Module):
    """Stage i of REGO (Algorithm 1), with weights of its own.

    Args:
        config: what REGO is made of.
        number: i, from 1.
        dim: channels C.
        heads: attention heads.
        num_logits: logits per query.
        scoring: how logits become scores.
    """

    def __init__(self, config: RegoConfig, number: int, dim: int, heads: int, num_logits: int, scoring: str) -> None:
        super().__init__()
        self.config = config
        self.alpha = config.ratios[number - 1]
        self.glimpse = GlimpseHead(dim, dim)
        # H_dec(i-1) is i * C wide (equation 5) and comes back to C to be asked.
        self.condense, self.condense_norm = nn.Linear(number * dim, dim, bias=False), nn.LayerNorm(dim)

        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(dim, heads, config.dropout)

        self.encoder = Encoder(
            [EncoderLayer(dim, attention(), config.ffn_dim, config.dropout) for _ in range(config.encoder_layers)]
        )
        branch_scale = 0.5 if config.form == "released" else 1.0
        self.decoder = Decoder(
            [
                DecoderLayer(dim, heads, attention(), config.ffn_dim, config.dropout, branch_scale)
                for _ in range(config.decoder_layers)
            ],
            norm=nn.LayerNorm(dim),
        )
        # The heads read [H_dec(i-1), H_g(i)], (i + 1) * C wide, through a linear layer and a LayerNorm (section 4.3).
        fuse = [nn.Linear((number + 1) * dim, dim, bias=False) for _ in range(config.decoder_layers)]
        for layer in fuse:
            nn.init.xavier_normal_(layer.weight)
        self.fuse, self.fuse_norms = nn.ModuleList(fuse), nn.ModuleList(nn.LayerNorm(dim) for _ in fuse)
        self.class_head = class_head(dim, num_logits, prior=0.01 if scoring == "sigmoid" else None)
        self.box_head = box_head(dim, size=0.0)

    def forward(
        self,
        features: list[FeatureMap],
        sizes: Int[Tensor, "B 2"],
        hidden: Float[Tensor, "B Q iC"],
        boxes: Float[Tensor, "B Q 4"],
        query_mask: Bool[Tensor, "B Q"] | None = None,
    ) -> tuple[list[Prediction], Float[Tensor, "B Q i1C"]]:
        """Refine.

        Args:
            features: the maps X that glimpses are cut from.
            sizes: height and width of the images, in pixels of the network's input.
            hidden: H_dec(i-1).
            boxes: O_box(i-1), detached.
            query_mask: True on queries that are padding.

        Returns:
            Predictions by decoder layer, of which the last is O(i), and H_dec(i).
        """
        vectors = self.glimpse(cut_glimpses(features, self.regions(boxes, sizes)))
        vectors = vectors.unflatten(0, boxes.shape[:2])  # V(i)
        known = self.condense_norm(self.condense(hidden.detach() if self.config.detach_hidden else hidden))

        asks, answers = (vectors, known) if self.config.query == "glimpse" else (known, vectors)
        memory = self.encoder(Memory(answers, torch.zeros_like(answers), query_mask, []))
        translated = self.decoder(asks, 0.0, memory, query_mask)  # H_g(i), by layer

        predictions = []
        logit = inverse_sigmoid(boxes)
        for h, fuse, norm in zip(translated, self.fuse, self.fuse_norms):
            fused = norm(fuse(torch.cat([hidden.detach(), h], -1)))
            logit = logit + in_full_precision(self.box_head, fused)  # equation (4), summed up over the layers too
            predictions.append(Prediction(in_full_precision(self.class_head, fused), logit.sigmoid()))
        return predictions, torch.cat([hidden, translated[-1]], -1)

    def regions(self, boxes: Float[Tensor, "B Q 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B Q 4"]:
        """R of equation (7): the enlarged boxes, ``xyxy`` in pixels of the network's input."""
        larger = enlarge(boxes, self.alpha)
        if self.config.form == "released":
            larger = larger.clamp(max=1.0)
        return to_pixels(larger, sizes)
