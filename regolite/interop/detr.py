"""Published DETR weights (facebookresearch/detr), and UP-DETR's (dddzg/up-detr): how they are recognized and named.

DC5 (dilation has no weights) and the number of heads cannot be inferred from a state dict. They are read from the
options saved with it; the defaults are the authors': no dilation and 8 heads. A LayerNorm after the encoder tells the
pre-norm layers with which UP-DETR was trained. Of its pre-trained weights, which are DETR's with a class head for
"patch" and "no patch", those of the pretext task alone are left out.
"""

from __future__ import annotations

from typing import Any

from regolite.interop.keys import Pair
from regolite.interop.sizes import backbone, count, tensor
from regolite.models.conditional_detr import ConditionalDetrConfig
from regolite.models.config import ModelConfig
from regolite.models.deformable_detr import DeformableDetrConfig
from regolite.models.detr import DetrConfig
from regolite.utils.weight_files import Weights

UNUSED = ("patch2query.", "feature_align.")  # what UP-DETR needs in pre-training alone
TITLE = "DETR (facebookresearch/detr: a ResNet, softmax scores, no reference points)"


def recognize(weights: Weights) -> bool:
    """Whether these weights are DETR's."""
    return any(key.startswith("transformer.decoder.layers.0.multihead_attn.") for key in weights.tensors)


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration."""
    queries, dim = tensor(weights, "query_embed.weight").shape
    pre_norm = "transformer.encoder.norm.weight" in weights.tensors
    fields = common(weights) | {"queries": queries, "dim": dim, "pre_norm": pre_norm}
    family = "up_detr" if pre_norm and fields["backbone"] == "resnet50" else "detr"
    return family, len(tensor(weights, "class_embed.bias")) - 1, fields


def common(weights: Weights) -> dict[str, Any]:
    """Fields that DETR and Deformable DETR share under the same names."""
    options = {"nheads": "heads", "dilation": "dilated", "dropout": "dropout"}
    return {
        "backbone": backbone(weights, "backbone.0.body."),
        "encoder_layers": count(weights, "transformer.encoder.layers."),
        "decoder_layers": count(weights, "transformer.decoder.layers."),
        "ffn_dim": len(tensor(weights, "transformer.encoder.layers.0.linear1.bias")),
        "weights": None,
        "mask_padding": False,
    } | {ours: weights.options[theirs] for theirs, ours in options.items() if theirs in weights.options}


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    d = config.detector
    assert isinstance(d, DetrConfig | ConditionalDetrConfig | DeformableDetrConfig)
    return {
        "backbone": d.backbone, "dilation": d.dilated, "enc_layers": d.encoder_layers, "dec_layers": d.decoder_layers,
        "dim_feedforward": d.ffn_dim, "hidden_dim": d.dim, "dropout": d.dropout, "nheads": d.heads,
        "num_queries": d.queries,
    } | ({"pre_norm": True} if isinstance(d, DetrConfig) and d.pre_norm else {})  # fmt: skip


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model."""
    d = config.detector
    if type(d) is not DetrConfig or config.rego is not None:
        return False
    return not d.reference_points and d.scoring == "softmax" and d.backbone.startswith("res")


def pairs(config: ModelConfig) -> list[Pair]:
    """The table of names."""
    d = config.detector
    assert isinstance(d, DetrConfig)
    return [
        Pair("backbone.body.", "backbone.0.body."),
        Pair("input_projection.", "input_proj."),
        Pair("encoder.norm.", "transformer.encoder.norm."),  # pre-norm alone
        *encoder(d.encoder_layers, "encoder.", "transformer.encoder."),
        *decoder(d.decoder_layers, "decoder.", "transformer.decoder."),
        Pair("query_positions.", "query_embed."),
        Pair("class_head.", "class_embed."),
        *mlp("box_head.", ["bbox_embed."]),
    ]


def encoder(layers: int, ours: str, theirs: str) -> list[Pair]:
    """An encoder with dense attention."""
    table = []
    for i in range(layers):
        here, there = f"{ours}layers.{i}.", f"{theirs}layers.{i}."
        table += attention(f"{here}attention.", f"{there}self_attn.")
        table += feed_forward(here, there)
        table += [Pair(f"{here}attention_norm.", f"{there}norm1."), Pair(f"{here}ffn_norm.", f"{there}norm2.")]
    return table


def decoder(layers: int, ours: str, theirs: str) -> list[Pair]:
    """A decoder with dense attention, and the norm before its heads."""
    table = [Pair(f"{ours}norm.", f"{theirs}norm.")]
    for i in range(layers):
        here, there = f"{ours}layers.{i}.", f"{theirs}layers.{i}."
        table += attention(f"{here}self_attention.", f"{there}self_attn.")
        table += attention(f"{here}cross_attention.", f"{there}multihead_attn.")
        table += feed_forward(here, there)
        norms = ("self_norm.", "cross_norm.", "ffn_norm.")
        table += [Pair(here + norm, f"{there}norm{n}.") for n, norm in enumerate(norms, start=1)]
    return table


def attention(ours: str, theirs: str) -> list[Pair]:
    """Multi-head attention; PyTorch's module stores the projections of query, key and value in one tensor."""
    stacked = [
        Pair(tuple(f"{ours}{part}.{kind}" for part in ("query", "key", "value")), f"{theirs}in_proj_{kind}")
        for kind in ("weight", "bias")
    ]
    return [*stacked, Pair(f"{ours}out.", f"{theirs}out_proj.")]


def feed_forward(ours: str, theirs: str) -> list[Pair]:
    """The feed-forward network of a layer."""
    return [Pair(f"{ours}ffn.0.", f"{theirs}linear1."), Pair(f"{ours}ffn.3.", f"{theirs}linear2.")]


def mlp(ours: str, theirs: list[str]) -> list[Pair]:
    """A box head, which may have several names in their state dict."""
    return [Pair(f"{ours}{2 * i}.", tuple(f"{name}layers.{i}." for name in theirs)) for i in range(3)]
