"""Conditional DETR as its authors publish it (Atten4Vis/ConditionalDETR): recognizing and naming its weights.

As with DETR, dilation (DC5) and the number of heads come from the options that were saved beside the weights.
"""

from __future__ import annotations

from typing import Any

from regolite.interop import detr
from regolite.interop.keys import Pair
from regolite.interop.sizes import tensor
from regolite.models.conditional_detr import ConditionalDetrConfig
from regolite.models.config import ModelConfig
from regolite.utils.weight_files import Weights

TITLE = "Conditional DETR (Atten4Vis/ConditionalDETR: a ResNet, 256 channels)"
DECODER_LAYER = {
    "self_attention.query.": "sa_qcontent_proj.",
    "self_attention.query_position.": "sa_qpos_proj.",
    "self_attention.key.": "sa_kcontent_proj.",
    "self_attention.key_position.": "sa_kpos_proj.",
    "self_attention.value.": "sa_v_proj.",
    "self_attention.out.": "self_attn.out_proj.",
    "self_norm.": "norm1.",
    "cross_attention.query.": "ca_qcontent_proj.",
    "cross_attention.query_position.": "ca_qpos_proj.",  # the first layer's alone
    "cross_attention.query_spatial.": "ca_qpos_sine_proj.",
    "cross_attention.key.": "ca_kcontent_proj.",
    "cross_attention.key_position.": "ca_kpos_proj.",
    "cross_attention.value.": "ca_v_proj.",
    "cross_attention.out.": "cross_attn.out_proj.",
    "cross_norm.": "norm2.",
    "ffn.0.": "linear1.",
    "ffn.3.": "linear2.",
    "ffn_norm.": "norm3.",
}


def recognize(weights: Weights) -> bool:
    """Whether these weights are Conditional DETR's."""
    return any(key.startswith("transformer.decoder.layers.0.ca_qpos_sine_proj.") for key in weights.tensors)


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration."""
    queries, dim = tensor(weights, "query_embed.weight").shape
    fields = detr.common(weights) | {"queries": queries, "dim": dim}
    return "conditional_detr", len(tensor(weights, "class_embed.bias")), fields


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    return detr.options(config)


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model; it encodes reference points with 256 channels for any C."""
    d = config.detector
    if not isinstance(d, ConditionalDetrConfig) or config.rego is not None:
        return False
    return d.dim == 256 and d.backbone.startswith("res")


def pairs(config: ModelConfig) -> list[Pair]:
    """The table of names."""
    d = config.detector
    assert isinstance(d, ConditionalDetrConfig)
    theirs = "transformer.decoder."
    return [
        Pair("backbone.body.", "backbone.0.body."),
        Pair("input_projection.", "input_proj."),
        *detr.encoder(d.encoder_layers, "encoder.", "transformer.encoder."),
        *(
            Pair(f"decoder_layers.{i}.{here}", f"{theirs}layers.{i}.{there}")
            for i in range(d.decoder_layers)
            for here, there in DECODER_LAYER.items()
        ),
        Pair("decoder_norm.", f"{theirs}norm."),
        *(Pair(f"reference_head.{2 * i}.", f"{theirs}ref_point_head.layers.{i}.") for i in range(2)),
        *(Pair(f"spatial_scale.{2 * i}.", f"{theirs}query_scale.layers.{i}.") for i in range(2)),
        Pair("query_positions.", "query_embed."),
        Pair("class_head.", "class_embed."),
        *detr.mlp("box_head.", ["bbox_embed."]),
    ]
