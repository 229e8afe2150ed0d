"""Presets: the sizes of the published models to the last parameter, configurations as JSON, overrides and mistakes."""

import json
import re
from dataclasses import replace

import pytest
import torch
from small_models import CLASSES, batch, unchecked

from regolite.errors import UserError
from regolite.losses import LossConfig
from regolite.models.anchor_detr import AnchorDetr
from regolite.models.backbone import Backbone
from regolite.models.baselines import BaselineConfig
from regolite.models.conditional_detr import ConditionalDetr
from regolite.models.config import ModelConfig
from regolite.models.deformable_detr import DeformableDetr
from regolite.models.detr import Detr
from regolite.models.presets import build, configure, presets
from regolite.models.rego import Rego
from regolite.models.smca import Smca
from regolite.models.sparse_rcnn import SparseRcnn
from regolite.models.up_detr import PatchDetrConfig

# Counted in the authors' own code, with COCO's 91 columns.
PUBLISHED = {
    "detr_r50": 41_524_768,
    "detr_r101": 60_464_672,
    "detr_dc5_r50": 41_524_768,
    "deformable_detr_r50": 40_069_665,
    "deformable_detr_refined_r50": 40_849_660,
    "deformable_detr_two_stage_r50": 41_181_529,
    "deformable_detr_r101": 59_009_569,
    "rego_deformable_detr_r50": 51_470_654,
    "rego_deformable_detr_refined_r50": 52_250_649,
    "rego_deformable_detr_two_stage_r50": 52_582_518,
    "rego_deformable_detr_r101": 70_410_558,
}
TABLE_1 = {  # millions, as the paper prints them
    "detr_r50": 41,
    "deformable_detr_r50": 40,
    "deformable_detr_two_stage_r50": 40,
    "deformable_detr_two_stage_r101": 59,
    "rego_deformable_detr_r50": 54,
    "rego_deformable_detr_two_stage_r50": 54,
    "rego_deformable_detr_two_stage_r101": 73,
}


# What a name begins with, and what the full sizes of this family have: queries, feed-forward width, encoder layers.
FAMILIES = {
    "detr_star": (Detr, 300, 2048, 6),
    "detr": (Detr, 100, 2048, 6),
    "up_detr": (Detr, 100, 2048, 6),
    "deformable_detr": (DeformableDetr, 300, 1024, 6),
    "conditional_detr": (ConditionalDetr, 300, 2048, 6),
    "anchor_detr": (AnchorDetr, 900, 1024, 6),
    "smca_single_scale": (Smca, 300, 2048, 6),
    "smca": (Smca, 300, 1024, 5),
    "sparse_rcnn": (SparseRcnn, 300, 2048, 0),
    "efficient_detr": (DeformableDetr, 100, 2048, 3),
    "dino": (DeformableDetr, 900, 2048, 6),
}
TRANSFORMERS = [n for n in presets() if not isinstance(configure(n).detector, BaselineConfig | PatchDetrConfig)]


def family(name):
    return next(facts for start, facts in FAMILIES.items() if name.removeprefix("rego_").startswith(start))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def outline(name, num_classes=91, **overrides):
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build(name, num_classes, weights=None, **overrides)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    form = {"form": "released"} if name.startswith("rego_") else {}
    assert parameters(outline(name, **form)) == PUBLISHED[name]


def test_size_of_the_papers_form():
    assert parameters(outline("rego_deformable_detr_r50")) == 54_198_846


@pytest.mark.parametrize("name", TABLE_1)
def test_sizes_of_table_1(name):
    """The table prints the same size for plain and two-stage models, which differ by 1.1 million."""
    assert parameters(outline(name)) / 1e6 == pytest.approx(TABLE_1[name], abs=1.5)


def test_every_preset_builds():
    assert len(presets()) == len(set(presets())) >= 40
    for name in TRANSFORMERS:
        model = outline(name, 80)
        config = model.model_config
        assert config.preset == name
        assert isinstance(model, Rego) == name.startswith("rego_") == (config.rego is not None)
        base = model.detector if isinstance(model, Rego) else model
        assert type(base) is family(name)[0]
        assert base.backbone.body[0] is not None
        assert base.num_logits == 80 + (base.scoring == "softmax")
        assert f"rego_{name}" in presets() or name.removeprefix("rego_") in presets()


def test_presets_are_what_their_names_say():
    for name in TRANSFORMERS:
        d = configure(name).detector
        for tag, backbone in (("r50", "resnet50"), ("r101", "resnet101"), ("x101", "resnext101_32x8d")):
            if name.endswith(tag):
                assert (d.backbone, d.weights, d.frozen_stages, d.dim, d.heads) == (backbone, "imagenet", 2, 256, 8)
                encoder_layers = getattr(d, "encoder_layers", 0)
                decoder_layers = 1 if "efficient" in name else 6
                assert (d.queries, d.ffn_dim, encoder_layers, d.decoder_layers) == (*family(name)[1:], decoder_layers)
                assert d.dropout == (0.0 if re.search("anchor|sparse|dino", name) else 0.1)
        assert getattr(d, "dilated", False) == ("dc5" in name)
        if "deformable" in name:
            two_stage = "two_stage" in name or "everyday" in name
            assert d.refine == ("refined" in name or two_stage)
            assert d.two_stage == two_stage
        if family(name)[0] is Detr:
            assert d.reference_points == ("star" in name)
        softmax = family(name) == FAMILIES["detr"]
        assert d.scoring == ("softmax" if softmax else "sigmoid")
        if "tiny" in name:
            assert (d.backbone, d.weights) == ("mobilenet_v2", "bundled")
        if "scenes" in name:
            assert (d.backbone, d.weights, d.frozen_stages) == ("tiny", None, 0)
        matching = "base" if "everyday" in name else "own"
        l1_boxes = "xyxy" if "sparse" in name else "cxcywh"
        assert configure(name).loss == replace(
            LossConfig(label=1.0, label_cost=1.0) if softmax else LossConfig(label=1.0 if "dino" in name else 2.0),
            stage_matching=matching,
            l1_boxes=l1_boxes,
        )


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n.endswith(("tiny", "scenes"))])
def test_laptop_presets_detect(name):
    model = build(name, CLASSES, weights=None, queries=6, dim=32, detector={"ffn_dim": 32}).eval()
    with torch.no_grad():
        output = model(batch((64, 64)))
    assert output.final.boxes.shape == (1, 6, 4)
    assert len(output.stages) == (3 if name.startswith("rego_") else 0)


def test_bundled_weights_are_in_the_tiny_presets():
    body = build("detr_tiny", CLASSES).backbone.body.state_dict()
    bundled = Backbone("mobilenet_v2", weights="bundled").body.state_dict()
    assert all(torch.equal(body[key], bundled[key]) for key in bundled)


# Configurations


@pytest.mark.parametrize("name", presets())
def test_configurations_survive_json(name):
    queries = {"queries": 11} if name in TRANSFORMERS else {}
    config = configure(name, **queries, classes=["cat", "dog"], category_ids=[3, 7])
    if config.rego is not None:
        config = replace(config, rego=replace(config.rego, stages=2, alphas=(2.0, 0.5)))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("preset", "overrides", "said"),
    [
        ("rego_detr_r50", {"dropout": 0.0}, "have a field 'dropout': write detector.dropout or rego.dropout"),
        ("rego_detr_r50", {"rego.droput": 0.0}, "has no field 'droput'; did you mean 'dropout'?"),
        ("rego_detr_r50", {"rego.queries": 5}, "has no field 'queries'"),
        ("rego_detr_r50", {"reog.dropout": 0.0}, "has no part 'reog'; did you mean 'rego'?"),
        ("detr_r50", {"rego.dropout": 0.0}, "has no part 'rego'"),
        ("detr_r50", {"rego": 3}, "has no field 'rego'"),
        ("detr_r50", {"rego_dropout": 0.0}, "has no field 'rego_dropout'"),
    ],
)  # fmt: skip
def test_overrides_are_never_guessed(preset, overrides, said):
    with pytest.raises(UserError) as caught:
        configure(preset, **overrides)
    assert said in str(caught.value)


def test_a_field_of_one_part_needs_no_prefix():
    assert configure("detr_r50", dropout=0.0) == configure("detr_r50", **{"detector.dropout": 0.0})
    assert configure("rego_detr_r50", rego={"stages": 2}) == configure("rego_detr_r50", stages=2)
    config = configure("rego_detr_r50", loss={"label_cost": 3.0, "focal_alpha": 0.5})
    assert (config.loss.label, config.loss.label_cost, config.loss.focal_alpha) == (1.0, 3.0, 0.5)


def test_overrides_go_where_the_field_is():
    config = configure(
        "rego_deformable_detr_r50",
        queries=50,  # the detector's
        image_size=640,  # the model's
        stages=2,  # REGO's
        alphas=[1.5, 1.0],  # a list is as good as a tuple
        no_object=0.2,  # the loss's
        detector={"ffn_dim": 512},  # both the detector and REGO have it
        classes=["a", "b"],
        **{"rego.dropout": 0.0},
    )
    assert (config.detector.queries, config.image_size, config.detector.ffn_dim) == (50, 640, 512)
    assert (config.rego.stages, config.rego.alphas, config.rego.ffn_dim, config.rego.dropout) == (
        2,
        (1.5, 1.0),
        2048,
        0,
    )
    assert config.loss.no_object == 0.2 and config.classes == ("a", "b")
    assert config.detector.dropout == 0.1
    assert configure("rego_deformable_detr_r50").detector.queries == 300  # the preset is as it was


def test_overrides_in_any_order():
    one = configure("rego_detr_tiny", stages=2, alphas=(2.0, 1.0))
    assert configure("rego_detr_tiny", alphas=(2.0, 1.0), stages=2) == one


def test_the_released_form_brings_what_belongs_to_it():
    config = configure("rego_deformable_detr_r50", form="released")
    assert (config.rego.form, config.rego.ffn_dim) == ("released", 1024)
    loss = config.loss
    assert (loss.stage_auxiliary, loss.base_label, loss.base_matches) == (False, 0.8, "last_stage")
    inheriting = configure("rego_deformable_detr_r50", form="released", stage_matching="base").loss
    assert (inheriting.stage_matching, inheriting.base_matches) == ("base", "own"), "pairs of each other"
    assert not config.detector.mask_padding and configure("rego_deformable_detr_r50").detector.mask_padding
    assert configure("rego_deformable_detr_tiny", form="released").rego.ffn_dim == 512
    kept = configure("rego_deformable_detr_r50", form="released", rego={"ffn_dim": 2048}, base_label=1.0)
    assert (kept.rego.ffn_dim, kept.loss.base_label) == (2048, 1.0)
    assert configure("rego_deformable_detr_r50", form="paper") == configure("rego_deformable_detr_r50")


def test_number_and_names_of_classes():
    model = build("detr_scenes", 3)
    assert model.num_logits == 4
    assert (model.model_config.classes, model.model_config.category_ids) == (("0", "1", "2"), (0, 1, 2))
    named = build("detr_scenes", classes=("cat", "dog"), category_ids=(17, 18))
    assert named.num_logits == 3
    assert (named.model_config.classes, named.model_config.category_ids) == (("cat", "dog"), (17, 18))
    assert build("detr_scenes").num_logits == 81
    with pytest.raises(UserError, match="num_classes=3, but the configuration names 2 classes"):
        build("detr_scenes", 3, classes=("cat", "dog"))


def test_a_configuration_builds_what_its_preset_does():
    config = configure("rego_detr_scenes", stages=1)
    one, other = build(config, 3), build("rego_detr_scenes", 3, stages=1)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert one.model_config == other.model_config


# Mistakes


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        (
            "rego_deformable_detr_r5",
            {},
            "unknown model 'rego_deformable_detr_r5'; did you mean 'rego_deformable_detr_r50",
        ),
        ("yolo", {}, "unknown model 'yolo'; choose from .*deformable_detr_r50"),
        ("detr_r50", {"quieries": 5}, "no field 'quieries'; did you mean 'queries'"),
        ("detr_r50", {"stages": 2}, "detr_r50 has no field 'stages'"),
        ("detr_r50", {"form": "released"}, "detr_r50 has no field 'form'"),
        ("rego_detr_r50", {"rego_queries": 5}, "no field 'rego_queries'"),
        ("detr_r50", {"points": 4}, "no field 'points'"),
        ("rego_detr_r50", {"alphas": (2.0, 1.0)}, "3 stages need 3 alphas, not 2"),
        ("rego_detr_r50", {"stages": 0}, "at least one stage"),
        ("rego_detr_scenes", {"heads": 7}, "7 heads do not divide 128 channels"),
        ("deformable_detr_tiny", {"levels": 2, "weights": None}, "2 levels cannot hold 3 stages"),
        ("deformable_detr_tiny", {"two_stage": True, "weights": None}, "two_stage needs refine"),
        ("detr_tiny", {"backbone": "resnet5"}, "unknown backbone 'resnet5'"),
        ("detr_tiny", {"dilated": True}, "no dilated"),
        ("detr_scenes", {"queries": 0}, "queries=0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(name, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        build(name, CLASSES, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"queries": "many"}, "queries='many' is not a whole number"),
        ({"detector.dropout": True}, "dropout=True is not a number"),
        ({"form": "relased"}, "'relased'"),
        ({"augment": "strong"}, "augment='strong' is not one of 'detr'"),
        ({"classes": (1, 2)}, r"classes=\(1, 2\) is not a list of texts"),
    ],
)
def test_values_of_a_wrong_type(overrides, message):
    with unchecked(), pytest.raises(UserError, match=message):
        configure("rego_deformable_detr_tiny", **overrides)
