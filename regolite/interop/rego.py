"""Published REGO weights (zhechen/Deformable-DETR-REGO): how they are recognized and named.

The published model is a Deformable DETR with three stages, a :class:`~regolite.models.rego.Rego` of form ``released``
here. The two layers of a stage's decoder share one class head and one box head, which their state dict lists once for
each layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from regolite.interop import deformable_detr
from regolite.interop.detr import decoder, mlp
from regolite.interop.keys import Pair
from regolite.interop.sizes import count, tensor
from regolite.models.config import ModelConfig
from regolite.models.deformable_detr import DeformableDetrConfig
from regolite.models.rego import RegoConfig
from regolite.utils.weight_files import Weights

TITLE = (
    "REGO (zhechen/Deformable-DETR-REGO: form 'released' on a Deformable DETR with 256 channels, stages with alphas "
    "3, 2, 1 and two decoder layers each, one width of all feed-forward networks)"
)


def recognize(weights: Weights) -> bool:
    """Whether these weights are REGO's."""
    return any(key.startswith("rego_") for key in weights.tensors)


def describe(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """The family of its preset, its number of classes, and the fields of its configuration."""
    family, classes, fields = deformable_detr.describe(weights)
    stages = len({key.split(".")[0] for key in weights.tensors if key.startswith("rego_class_embed_")})
    fields |= {
        "form": "released",
        "stages": stages,
        "rego.decoder_layers": count(weights, "glimpse_transformer_0.decoder.layers."),
        "rego.ffn_dim": len(tensor(weights, "glimpse_transformer_0.decoder.layers.0.linear1.bias")),
    }
    if "dropout" in fields:
        fields["rego.dropout"] = fields["dropout"]
    for name in {f.name for f in dataclasses.fields(RegoConfig)} & set(fields) - {"form", "stages"}:
        fields[f"detector.{name}"] = fields.pop(name)  # REGO has a field of the same name
    return f"rego_{family}", classes, fields


def options(config: ModelConfig) -> dict[str, Any]:
    """Options with which the authors' training script builds this model."""
    return deformable_detr.options(config) | {"use_rego": True}


def holds(config: ModelConfig) -> bool:
    """Whether the authors' code can build this model; most of its settings are hard-coded."""
    r, d = config.rego, config.detector
    return (
        r is not None
        and isinstance(d, DeformableDetrConfig)
        and (r.form, r.ratios, r.decoder_layers, r.encoder_layers, r.query) == ("released", (3, 2, 1), 2, 0, "glimpse")
        and r.ffn_dim == d.ffn_dim
        and d.dim == 256
        and deformable_detr.holds(ModelConfig(config.preset, d))
    )


def pairs(config: ModelConfig) -> list[Pair]:
    """The table of names."""
    r, d = config.rego, config.detector
    assert r is not None and isinstance(d, DeformableDetrConfig)
    table = deformable_detr.pairs(config, "detector.")
    for level in range(d.levels):
        for i in range(3):
            table.append(Pair(f"contexts.{level}.inward.{i}.", f"ctx_inconvs.{3 * level + i}."))
            table.append(Pair(f"contexts.{level}.outward.{i}.", f"ctx_outconvs.{3 * level + i}."))
        table.append(Pair(f"contexts.{level}.norm.", f"ctx_gns.{level}."))
    layers = range(r.decoder_layers)
    for s in range(r.stages):
        here = f"stages.{s}."
        table += [
            Pair(f"{here}glimpse.window.", f"rcnn_net_{s}.0."),
            Pair(f"{here}glimpse.window_norm.", f"rcnn_net_{s}.2."),
            Pair(f"{here}glimpse.project.", f"rcnn_net_{s}.4."),
            Pair(f"{here}glimpse.project_norm.", f"rcnn_net_{s}.5."),
            Pair(f"{here}condense.", f"rego_hs_linear_{s}."),
            Pair(f"{here}condense_norm.", f"rego_hs_linear_norm_{s}."),
            *decoder(r.decoder_layers, f"{here}decoder.", f"glimpse_transformer_{s}.decoder."),
            Pair(f"{here}fuse.", f"rego_hs_fuser_{s}."),
            Pair(f"{here}fuse_norms.", f"layer_norms_{s}."),
            Pair(f"{here}class_head.", tuple(f"rego_class_embed_{s}.{i}." for i in layers)),
            *mlp(f"{here}box_head.", [f"rego_bbox_embed_{s}.{i}." for i in layers]),
        ]
    return table
