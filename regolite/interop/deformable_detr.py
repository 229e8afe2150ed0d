"""Published Deformable DETR weights (fundamentalvision/Deformable-DETR): how they are recognized and named.

All variants use the same names: single scale, single scale DC5, multi-scale, refined and two-stage. Their state dict
lists the heads once for each decoder layer, even if all layers share one pair, and again inside the decoder if it
refines boxes: the same tensor under several names.

DC5, the number of heads and the number of proposals of a two-stage model cannot be inferred from a state dict. They are
read from the options saved with it; the defaults are the authors': no dilation, 8 and 300.
"""

from __future__ import annotations

from typing import Any

from regolite.interop import detr
from regolite.interop.detr import attention, feed_forward, mlp
from regolite.interop.keys import Pair
from regolite.interop.sizes import tensor
from regolite.models.config import ModelConfig
from regolite.models.deformable_detr import DeformableDetrConfig
from regolite.utils.weight_files import Weights

TITLE = (
    "Deformable DETR (fundamentalvision/Deformable-DETR: a ResNet, of which one level reads stage 5 and several read "
    "stages 3 to 5; two-stage with 256 channels)"
)


def recognize(weights: Weights) -> bool:
    """Whether these weights are Deformable DETR's."""
    deformable = any(key.startswith("transformer.encoder.layers.0.self_attn.sampling_") for key in weights.tensors)
    return deformable and not any(key.startswith("rego_") for key in weights.tensors)


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration."""
    fields = detr.common(weights)
    levels, dim = tensor(weights, "transformer.level_embed").shape
    refine = any(key.startswith("transformer.decoder.bbox_embed.") for key in weights.tensors)
    two_stage = any(key.startswith("transformer.enc_output.") for key in weights.tensors)
    offsets = tensor(weights, "transformer.encoder.layers.0.self_attn.sampling_offsets.bias")
    heads = fields.get("heads", 8)
    points = len(offsets) // (2 * heads * levels) if isinstance(heads, int) and heads > 0 else 1
    # Stages of the backbone are projected by 1x1 convolutions, coarser levels are computed by 3x3 convolutions.
    kernels = [tensor(weights, f"input_proj.{i}.0.weight").shape[-1] for i in range(levels)]
    fields |= {
        "levels": levels, "dim": dim, "points": points, "refine": refine, "two_stage": two_stage,
        "backbone_stages": (2, 3, 4, 5)[-kernels.count(1):],
        "queries": weights.options.get("num_queries", 300) if two_stage else len(tensor(weights, "query_embed.weight")),
    }  # fmt: skip
    family = "deformable_detr" + ("_two_stage" if two_stage else "_refined" if refine else "")
    return family, len(tensor(weights, "class_embed.0.bias")), fields


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    d = config.detector
    assert isinstance(d, DeformableDetrConfig)
    return detr.options(config) | {
        "num_feature_levels": d.levels, "enc_n_points": d.points, "dec_n_points": d.points,
        "with_box_refine": d.refine, "two_stage": d.two_stage,
    }  # fmt: skip


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model."""
    d = config.detector
    return (
        type(d) is DeformableDetrConfig
        and d.backbone.startswith("res")
        and d.backbone_stages == ((5,) if d.levels == 1 else (3, 4, 5))
        and (d.dim == 256 or not d.two_stage)
        and not d.shared_heads
        and config.rego is None
    )


def pairs(config: ModelConfig, ours: str = "") -> list[Pair]:
    """The table of names; ``ours`` is a prefix of our names, for a detector that is part of another model."""
    d = config.detector
    assert isinstance(d, DeformableDetrConfig)
    table = [
        Pair(f"{ours}backbone.body.", "backbone.0.body."),
        Pair(f"{ours}level_positions", "transformer.level_embed"),
    ]
    for level in range(d.levels):
        table.append(Pair(f"{ours}pyramid.projections.{level}.", f"input_proj.{level}.0."))
        table.append(Pair(f"{ours}pyramid.norms.{level}.", f"input_proj.{level}.1."))
    for i in range(d.encoder_layers):
        here, there = f"{ours}encoder.layers.{i}.", f"transformer.encoder.layers.{i}."
        table += deformable_attention(f"{here}attention.", f"{there}self_attn.")
        table += feed_forward(here, there)
        table += [Pair(f"{here}attention_norm.", f"{there}norm1."), Pair(f"{here}ffn_norm.", f"{there}norm2.")]
    for i in range(d.decoder_layers):
        here, there = f"{ours}decoder_layers.{i}.", f"transformer.decoder.layers.{i}."
        table += attention(f"{here}self_attention.", f"{there}self_attn.")
        table += deformable_attention(f"{here}cross_attention.", f"{there}cross_attn.")
        table += feed_forward(here, there)
        norms = ("cross_norm.", "self_norm.", "ffn_norm.")  # their numbering, which is not the order of execution
        table += [Pair(here + norm, f"{there}norm{n}.") for n, norm in enumerate(norms, start=1)]

    # Their lists of heads have one entry per layer. The decoder also has a list of box heads if it refines boxes, and
    # of class heads if it is two-stage; then the heads of the proposals are the last entries.
    class_lists = ["class_embed."] + ["transformer.decoder.class_embed."] * d.two_stage
    box_lists = ["bbox_embed."] + ["transformer.decoder.bbox_embed."] * d.refine
    layers = [str(i) for i in range(d.decoder_layers)]
    owners = {f"{ours}class_heads.{i}.": [i] for i in layers} if d.refine else {f"{ours}class_heads.0.": layers}
    if d.two_stage:
        owners[f"{ours}proposals.class_head."] = [str(d.decoder_layers)]
    for here, numbers in owners.items():
        table.append(Pair(here, tuple(f"{place}{i}." for place in class_lists for i in numbers)))
        box_head = here.replace("class_head", "box_head")
        table += mlp(box_head, [f"{place}{i}." for place in box_lists for i in numbers])

    if d.two_stage:
        parts = {"project": "enc_output", "to_query": "pos_trans"}
        for here, there in parts.items():
            table.append(Pair(f"{ours}proposals.{here}.", f"transformer.{there}."))
            table.append(Pair(f"{ours}proposals.{here}_norm.", f"transformer.{there}_norm."))
    else:
        table.append(Pair((f"{ours}query_positions.weight", f"{ours}queries.weight"), "query_embed.weight", dim=1))
        table.append(Pair(f"{ours}reference_points.", "transformer.reference_points."))
    return table


def deformable_attention(ours: str, theirs: str) -> list[Pair]:
    """Multi-scale deformable attention."""
    names = {
        "sampling_offsets.": "sampling_offsets.",
        "attention_weights.": "attention_weights.",
        "value.": "value_proj.",
        "out.": "output_proj.",
    }
    return [Pair(ours + here, theirs + there) for here, there in names.items()]
