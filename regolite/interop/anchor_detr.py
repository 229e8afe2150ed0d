"""Published Anchor DETR weights (megvii-research/AnchorDETR): how they are recognized and named.

DC5 and the number of heads cannot be inferred from a state dict. They are read from the options saved with it; the
defaults are no dilation (give ``dilated=True`` for DC5) and 8 heads. The authors' models with several feature levels or
with dense attention have other weights and are not supported.
"""

from __future__ import annotations

from typing import Any

from regolite.interop.detr import attention, mlp
from regolite.interop.keys import Pair
from regolite.interop.sizes import backbone, count, tensor
from regolite.models.anchor_detr import AnchorDetrConfig
from regolite.models.config import ModelConfig
from regolite.utils.weight_files import Weights

TITLE = "Anchor DETR of megvii-research/AnchorDETR"


def recognize(weights: Weights) -> bool:
    """Whether these weights are Anchor DETR's."""
    return any(key.startswith("transformer.adapt_pos1d.") for key in weights.tensors)


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration."""
    patterns, dim = tensor(weights, "transformer.pattern.weight").shape
    grid = weights.options.get("spatial_prior") == "grid"
    if grid:  # grid points are not stored; the authors round their number to a square
        points = round(weights.options.get("num_query_position", 300) ** 0.5) ** 2
    else:
        points = len(tensor(weights, "transformer.position.weight"))
    fields = {
        "backbone": backbone(weights, "backbone.body."),
        "dilated": weights.options.get("dilation", False),
        "heads": weights.options.get("nheads", 8),
        "dropout": weights.options.get("dropout", 0.0),
        "encoder_layers": count(weights, "transformer.encoder_layers."),
        "decoder_layers": count(weights, "transformer.decoder_layers."),
        "ffn_dim": len(tensor(weights, "transformer.encoder_layers.0.ffn.linear1.bias")),
        "dim": dim,
        "queries": patterns * points,
        "patterns": patterns,
        "anchors": "grid" if grid else "learned",
        "weights": None,
        "mask_padding": False,
    }
    return "anchor_detr", len(tensor(weights, "transformer.class_embed.0.bias")), fields


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    d = config.detector
    assert isinstance(d, AnchorDetrConfig)
    return {
        "backbone": d.backbone, "dilation": d.dilated, "enc_layers": d.encoder_layers, "dec_layers": d.decoder_layers,
        "dim_feedforward": d.ffn_dim, "hidden_dim": d.dim, "dropout": d.dropout, "nheads": d.heads,
        "num_query_position": d.queries // d.patterns, "num_query_pattern": d.patterns,
        "spatial_prior": {"learned": "learned", "grid": "grid"}[d.anchors],
        "num_feature_levels": 1, "attention_type": "RCDA",
    }  # fmt: skip


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model; its position encodings have 256 channels for any C."""
    d = config.detector
    return type(d) is AnchorDetrConfig and d.dim == 256 and config.rego is None


def pairs(config: ModelConfig) -> list[Pair]:
    """The table of names."""
    d = config.detector
    assert isinstance(d, AnchorDetrConfig)
    table = [
        Pair("backbone.body.", "backbone.body."),
        Pair("input_projection.", "input_proj.0.0."),
        Pair("input_norm.", "input_proj.0.1."),
        Pair("patterns.", "transformer.pattern."),
        Pair("points", "transformer.position.weight"),
        Pair("encode_one.", "transformer.adapt_pos1d."),
        Pair("encode_both.", "transformer.adapt_pos2d."),
    ]
    for i in range(d.encoder_layers):
        here, there = f"encoder_layers.{i}.", f"transformer.encoder_layers.{i}."
        table += row_column(f"{here}attention.", f"{there}self_attn.")
        table += [Pair(f"{here}attention_norm.", f"{there}norm1."), *feed_forward(here, f"{there}ffn.")]
    for i in range(d.decoder_layers):
        here, there = f"decoder_layers.{i}.", f"transformer.decoder_layers.{i}."
        table += attention(f"{here}self_attention.", f"{there}self_attn.")
        table += row_column(f"{here}cross_attention.", f"{there}cross_attn.")
        # Their numbering of norms begins with the cross-attention, which runs second.
        table += [Pair(f"{here}self_norm.", f"{there}norm2."), Pair(f"{here}cross_norm.", f"{there}norm1.")]
        table += feed_forward(here, f"{there}ffn.")
    # All layers share one pair of heads, which their state dict lists once for each layer.
    class_heads = tuple(f"transformer.class_embed.{i}." for i in range(d.decoder_layers))
    box_heads = [f"transformer.bbox_embed.{i}." for i in range(d.decoder_layers)]
    return [*table, Pair("class_head.", class_heads), *mlp("box_head.", box_heads)]


def row_column(ours: str, theirs: str) -> list[Pair]:
    """RCDA, whose five projections are stored in one tensor."""
    parts = ("query_x", "query_y", "key_x", "key_y", "value")
    stacked = [
        Pair(tuple(f"{ours}{part}.{kind}" for part in parts), f"{theirs}in_proj_{kind}") for kind in ("weight", "bias")
    ]
    return [*stacked, Pair(f"{ours}out.", f"{theirs}out_proj.")]


def feed_forward(ours: str, theirs: str) -> list[Pair]:
    """The feed-forward network of a layer and its norm, which their network contains."""
    names = (("ffn.0.", "linear1."), ("ffn.3.", "linear2."), ("ffn_norm.", "norm2."))
    return [Pair(f"{ours}{here}", f"{theirs}{there}") for here, there in names]
