"""DETR (Carion et al., 2020), DETR*, which adds 300 queries, reference points and the focal loss, and UP-DETR.

One feature map, an encoder with self-attention among its cells, a decoder in which object queries attend to the cells,
and heads that predict a class and a box for each query (equation 3).

A fine-tuned UP-DETR (Dai et al., CVPR 2021) is DETR with the pre-norm layers of DETR's code (``pre_norm``);
:mod:`regolite.models.up_detr` pre-trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.models.attention import MultiHeadAttention
from regolite.models.backbone import Backbone
from regolite.models.config import DetectorConfig, register
from regolite.models.detector import Detector
from regolite.models.positions import sine_positions
from regolite.models.transformer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    NormedEncoder,
    PreNormDecoderLayer,
    PreNormEncoderLayer,
    box_head,
    class_head,
    flatten,
    in_full_precision,
)
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction


@dataclass(frozen=True)
class DetrConfig(DetectorConfig):
    """Configuration of DETR.

    Attributes:
        backbone: name of the backbone, see :class:`~regolite.models.backbone.Backbone`.
        weights: the backbone's weights.
        dilated: DC5, stage 5 at stride 16.
        frozen_stages: stages of the backbone that are not trained.
        dim: channels C.
        heads: attention heads M.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        ffn_dim: width of the feed-forward networks.
        dropout: probability of dropping.
        queries: number of object queries N_d.
        mask_padding: hide padding from the backbone, so that an image's boxes do not depend on the batch. The
            published models do not hide it.
        reference_points: DETR*: each query predicts its box around a learned reference point.
        scoring: ``"softmax"`` over the classes and "no object" (DETR), or a ``"sigmoid"`` for each class (DETR*).
        pre_norm: normalize the inputs of the branches of a layer and the encoder's output, and not the sums (UP-DETR).
    """

    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    dilated: bool = False
    frozen_stages: int = 2
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.1
    queries: int = 100
    mask_padding: bool = True
    reference_points: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    pre_norm: bool = False


@register("detr", DetrConfig)
class Detr(Detector):
    """DETR.

    Args:
        config: its configuration.
        num_classes: number of classes K.

    Its attributes are those of :class:`~regolite.models.detector.Detector`; it returns the backbone's own maps.
    """

    projected = False

    def __init__(self, config: DetrConfig, num_classes: int) -> None:
        super().__init__()
        c = config
        self.dim, self.heads, self.scoring, self.dilated = c.dim, c.heads, c.scoring, c.dilated
        self.num_logits = num_classes + (c.scoring == "softmax")
        self.backbone = Backbone(
            c.backbone, (2, 3, 4, 5), c.weights, c.dilated, c.frozen_stages, mask_padding=c.mask_padding
        )
        self.feature_channels = self.backbone.channels
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], c.dim, 1)
        encoder_layer = PreNormEncoderLayer if c.pre_norm else EncoderLayer
        decoder_layer = PreNormDecoderLayer if c.pre_norm else DecoderLayer
        encoder_layers = [
            encoder_layer(c.dim, MultiHeadAttention(c.dim, c.heads, c.dropout), c.ffn_dim, c.dropout)
            for _ in range(c.encoder_layers)
        ]
        self.encoder = NormedEncoder(encoder_layers, c.dim) if c.pre_norm else Encoder(encoder_layers)
        self.decoder = Decoder(
            [
                decoder_layer(c.dim, c.heads, MultiHeadAttention(c.dim, c.heads, c.dropout), c.ffn_dim, c.dropout)
                for _ in range(c.decoder_layers)
            ],
            norm=nn.LayerNorm(c.dim),
        )
        self.query_positions = nn.Embedding(c.queries, c.dim)
        self.reference_points = nn.Linear(c.dim, 2) if c.reference_points else None
        self.class_head = class_head(c.dim, self.num_logits, prior=0.01 if c.scoring == "sigmoid" else None)
        self.box_head = box_head(c.dim, size=-2.0 if c.reference_points else None)

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect: H_dec = A(E_box, H_enc), then equation (3) on the hidden states of every layer."""
        maps = self.backbone(images)
        last, memory = maps[-1], self.encode(maps)

        positions = self.query_positions.weight.expand(images.pixels.shape[0], -1, -1)
        hidden = self.decoder(positions.new_zeros(positions.shape), positions, memory)
        predicted = [self._predict(h, positions) for h in hidden]

        if self.dilated:  # REGO reads the last map of a DC5 model at the normal stride (appendix A.1)
            maps[-1] = FeatureMap(last.tensor[:, :, ::2, ::2], last.mask[:, ::2, ::2], 2 * last.stride)
        return DetectorOutput([layer for layer, _ in predicted], hidden[-1], maps, references=predicted[-1][1])

    def encode(self, maps: list[FeatureMap]) -> Memory:
        """H_enc, from the backbone's last map."""
        last = maps[-1]
        projected = FeatureMap(self.input_projection(last.tensor), last.mask, last.stride)
        return self.encoder(flatten([projected], [sine_positions(last.mask, self.dim)]))

    def _predict(
        self, hidden: Float[Tensor, "B Q C"], positions: Float[Tensor, "B Q C"]
    ) -> tuple[Prediction, Float[Tensor, "B Q 2"] | None]:
        """The prediction of a layer, and the reference points around which its boxes lie (DETR*)."""
        boxes, center = in_full_precision(self.box_head, hidden), None
        if self.reference_points is not None:
            center = in_full_precision(self.reference_points, positions).sigmoid()
            boxes = boxes + F.pad(inverse_sigmoid(center), (0, 2))
        return Prediction(in_full_precision(self.class_head, hidden), boxes.sigmoid()), center
