"""Published SMCA weights (gaopengcuhk/SMCA-DETR): how they are recognized and named.

Only the single-scale model is supported. The published multi-scale model has a convolutional encoder, not the paper's;
its weights are recognized and rejected.
"""

from __future__ import annotations

from typing import Any

from regolite.errors import UserError
from regolite.interop.detr import attention, common, encoder, feed_forward, mlp
from regolite.interop.keys import Pair
from regolite.interop.sizes import tensor
from regolite.models.config import ModelConfig
from regolite.models.smca import SmcaConfig
from regolite.utils.weight_files import Weights

TITLE = "SMCA of gaopengcuhk/SMCA-DETR"
LAYER = "transformer.decoder.layers.0."


def recognize(weights: Weights) -> bool:
    """Whether these weights are SMCA's."""
    return f"{LAYER}point1.layers.0.weight" in weights.tensors


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration.

    Raises:
        UserError: for a model that regolite lacks.
    """
    if f"{LAYER}point4.weight" in weights.tensors:
        raise UserError(
            f"{weights.source} is a multi-scale SMCA with an encoder of convolutions, which regolite lacks; it has the "
            "authors' single-scale model"
        )
    queries, dim = tensor(weights, "query_embed.weight").shape
    heads = len(tensor(weights, f"{LAYER}point2.bias")) // 2
    if len(tensor(weights, f"{LAYER}point3.bias")) != 2 * heads:
        raise UserError(
            f"{weights.source} does not have two scales for each head; give a model of --dynamic_scale type3"
        )
    fields = common(weights) | {"queries": queries, "dim": dim, "heads": heads}
    if fields.pop("dilated", False):
        raise UserError(f"{weights.source} is a dilated (DC5) SMCA, which regolite lacks")
    if "smooth" in weights.options:
        fields["beta"] = float(weights.options["smooth"])
    return "smca_single_scale", len(tensor(weights, "class_embed.bias")), fields


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    d = config.detector
    assert isinstance(d, SmcaConfig)
    return {
        "backbone": d.backbone, "dilation": False, "enc_layers": d.encoder_layers, "dec_layers": d.decoder_layers,
        "dim_feedforward": d.ffn_dim, "hidden_dim": d.dim, "dropout": d.dropout, "nheads": d.heads,
        "num_queries": d.queries, "dynamic_scale": "type3", "smooth": d.beta,
    }  # fmt: skip


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model: one level, stage 5, with 256 channels and 8 heads."""
    d = config.detector
    if type(d) is not SmcaConfig or config.rego is not None:
        return False
    return (d.backbone_stages, d.coarser, d.dim, d.heads) == ((5,), False, 256, 8)


def pairs(config: ModelConfig) -> list[Pair]:
    """The table of names."""
    d = config.detector
    assert isinstance(d, SmcaConfig)
    table = [
        Pair("backbone.body.", "backbone.0.body."),
        Pair("projections.0.", "input_proj."),
        *encoder(d.encoder_layers, "encoder.", "transformer.encoder."),
        Pair("decoder.norm.", "transformer.decoder.norm."),
        *mlp("center_head.", [f"{LAYER}point1."]),
        Pair("query_positions.", "query_embed."),
        Pair("class_head.", "class_embed."),
        *mlp("box_head.", ["bbox_embed."]),
    ]
    for i in range(d.decoder_layers):
        table += layer(f"decoder.layers.{i}.", f"transformer.decoder.layers.{i}.")
    return table


def layer(ours: str, theirs: str) -> list[Pair]:
    """A decoder layer with the modules of its spatial prior."""
    names = {
        "self_norm": "norm1", "cross_norm": "norm2", "ffn_norm": "norm3", "prior_norm": "norm4",
        "offsets": "point2", "scales": "point3", "selection": "point4",
    }  # fmt: skip
    return [
        *attention(f"{ours}self_attention.", f"{theirs}self_attn."),
        *attention(f"{ours}cross_attention.", f"{theirs}multihead_attn."),
        *feed_forward(ours, theirs),
        *(Pair(f"{ours}{here}.", f"{theirs}{there}.") for here, there in names.items()),
    ]
