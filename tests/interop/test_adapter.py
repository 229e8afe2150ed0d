"""REGO on detectors of transformers: the adapter says what the model says, and REGO trains on top of it."""

import copy
import functools
import json
import logging
import re
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_models import batch, check_contract, shake, unchecked
from small_models import detr as native_detr
from torch import nn

from regolite import Rego, RunConfig, UserError, build, detect, load, train
from regolite.boxes import to_xyxy
from regolite.checkpoint import save_model
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.interop import adapt
from regolite.interop.adapter import FAMILIES, from_config
from regolite.losses import SetLoss
from regolite.models.backbone import shrink
from regolite.training.schedule import parameter_groups
from regolite.types import Target

transformers = pytest.importorskip("transformers")

CLASSES, QUERIES, LAYERS, DIM = 5, 7, 3, 32
NETWORK = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SIZES = {
    "encoder_layers": 1, "decoder_layers": LAYERS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": QUERIES, "num_labels": CLASSES,
}  # fmt: skip
LAST, THREE = ["stage4"], ["stage2", "stage3", "stage4"]


def detr(config=transformers.DetrConfig, outputs=LAST, **changes):
    backbone = transformers.ResNetConfig(**NETWORK, out_features=outputs)
    return config(**(SIZES | {"d_model": DIM, "backbone_config": backbone} | changes))


def conditional_detr(**changes):
    return detr(transformers.ConditionalDetrConfig, **changes)


def table_transformer(**changes):
    return detr(transformers.TableTransformerConfig, **changes)


def dab_detr(**changes):
    backbone = transformers.ResNetConfig(**NETWORK, out_features=LAST)
    return transformers.DabDetrConfig(**(SIZES | {"hidden_size": DIM, "backbone_config": backbone} | changes))


def deformable_detr(**changes):
    return detr(transformers.DeformableDetrConfig, THREE, **changes)


def refined(**changes):
    return deformable_detr(with_box_refine=True, **changes)


def two_stage(**changes):
    return refined(two_stage=True, two_stage_num_proposals=QUERIES, **changes)


def rt_detr(config=transformers.RTDetrConfig, **changes):
    widths = {"encoder_hidden_dim": DIM, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [DIM] * 3}
    backbone = transformers.RTDetrResNetConfig(**NETWORK, out_features=THREE)
    return config(**(SIZES | widths | {"d_model": DIM, "backbone_config": backbone, "num_denoising": 4} | changes))


def rt_detr_v2(**changes):
    return rt_detr(transformers.RTDetrV2Config, **changes)


def d_fine(config=transformers.DFineConfig, **changes):
    """With another number of points on each level, as published."""
    network = {
        "embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4,
        "stage_in_channels": [8, 8, 16, 24], "stage_mid_channels": [8] * 4, "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4,
    }  # fmt: skip
    backbone = transformers.HGNetV2Config(**network, out_features=THREE)
    return rt_detr(config, **({"backbone_config": backbone, "decoder_n_points": [3, 6, 3]} | changes))


def deimv2(**changes):
    return d_fine(transformers.Deimv2Config, **changes)


def pp_doclayout_v2(**changes):
    """With thresholds that leave its queries in their order, and the smallest model of a reading order."""
    order = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "coordinate_size": 4, "shape_size": 2, "relative_attention_num_heads": 2,
    }  # fmt: skip
    layout = {"class_thresholds": [0.0] * CLASSES, "class_order": list(range(CLASSES)), "reading_order_config": order}
    return d_fine(transformers.PPDocLayoutV2Config, **({"decoder_n_points": 4} | layout | changes))


def pp_doclayout_v3(**changes):
    backbone = d_fine().backbone_config
    backbone.out_features = ["stage1", *THREE]
    more = {"decoder_n_points": 4, "backbone_config": backbone, "mask_feature_channels": [8, 8], "x4_feat_dim": 8}
    return d_fine(transformers.PPDocLayoutV3Config, **(more | changes))


GROUPED = {
    "d_model": DIM, "decoder_layers": LAYERS, "decoder_ffn_dim": 48, "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4, "num_queries": QUERIES, "num_labels": CLASSES, "group_detr": 3,
}  # fmt: skip
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [1, 2]}


def lw_detr(**changes):
    vit = transformers.LwDetrViTConfig(
        **VIT, image_size=256, pretrain_image_size=64, num_windows=4, window_block_indices=[0]
    )
    return transformers.LwDetrConfig(
        **(GROUPED | {"backbone_config": vit, "projector_scale_factors": [2.0, 1.0]} | changes)
    )


def rf_detr(**changes):
    vit = transformers.RfDetrDinov2Config(**VIT, image_size=56, patch_size=14, num_windows=2)
    return transformers.RfDetrConfig(**(GROUPED | {"backbone_config": vit, "dropout": 0.0} | changes))


WORDS = dict(enumerate(("ant", "bee", "eater", "cat", "light", "##house", "eel"), start=1030))
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
NAMES = ("ant", "bee eater", "cat", "Lighthouse", "eel")
POSITIONS = ([1], [3, 4], [6], [8, 9], [11])
"""Of each class in the tokens of "[CLS] ant. bee eater. cat. light ##house. eel. [SEP]"."""


@functools.cache
def tokenizer():
    """With the numbers that BERT's special tokens have in transformers' code."""
    words = (SPECIAL | WORDS).get
    return transformers.BertTokenizer({words(i, f"[unused{i}]"): i for i in range(1037)})


def grounding_dino(config=transformers.GroundingDinoConfig, backbone=None, **changes):
    text = transformers.BertConfig(
        vocab_size=1037, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    backbone = backbone or transformers.ResNetConfig(**NETWORK, out_features=THREE)
    return config(**(SIZES | {"d_model": DIM, "backbone_config": backbone, "text_config": text} | changes))


def mm_grounding_dino(**changes):
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=["stage2", "stage3", "stage4"]
    )
    return grounding_dino(transformers.MMGroundingDinoConfig, swin, **changes)


PROMPTED = (grounding_dino, mm_grounding_dino)
WITH_GROUPS = (lw_detr, rf_detr)
FURTHER = r"\.enc_out[a-z_]*\.[12]\.|mask|order|pointer|swin\.layernorm"
"""Parameters of further groups of queries, of the pre-training of RF-DETR's backbone, of masks and reading orders; and
a norm of Swin's last output, which a backbone does not return."""
DISTRIBUTIONS = (d_fine, deimv2)
LAYOUT = (pp_doclayout_v2, pp_doclayout_v3)
RAW_PIXELS = (rt_detr, rt_detr_v2, *DISTRIBUTIONS, *LAYOUT)
MULTI_SCALE = (deformable_detr, refined, two_stage, *RAW_PIXELS, *WITH_GROUPS, *PROMPTED)
KINDS = (detr, conditional_detr, dab_detr, table_transformer, *MULTI_SCALE)
MORE_LAYERS = dict.fromkeys((*RAW_PIXELS, *WITH_GROUPS, *PROMPTED), 1) | dict.fromkeys(DISTRIBUTIONS, 2)
"""Predictions that are trained like those of the decoder layers and come before them."""
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(config):
    """A random model in evaluation mode whose every output depends on every input."""
    task = "ZeroShotObjectDetection" if is_prompted(config) else "ObjectDetection"
    return shake(getattr(transformers, f"AutoModelFor{task}").from_config(config)).eval()


def is_prompted(config):
    return config.model_type in ("grounding-dino", "mm-grounding-dino")


def adapted(model):
    """The detector; one with a prompt has that of NAMES."""
    return adapt(model, **({"classes": NAMES, "tokenizer": tokenizer()} if is_prompted(model.config) else {}))


def class_logits(logits):
    """Those of NAMES: the probability of a class is the mean probability of its tokens."""
    tokens = logits.double().sigmoid()
    return torch.stack([tokens[..., positions].mean(-1) for positions in POSITIONS], dim=-1).logit().float()


def ask(model, images, **more):
    """What transformers answers to a padded batch, prepared as its own image processors do."""
    pixels = images.pixels
    if model.config.model_type in [kind.__name__ for kind in RAW_PIXELS]:
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (pixels * deviation + mean).masked_fill(images.mask[:, None], 0.0)
    if is_prompted(model.config):
        tokens = tokenizer()([". ".join(NAMES).lower() + "."] * len(images), return_tensors="pt")
        more |= dict(tokens)
    return model(pixel_values=pixels, pixel_mask=(~images.mask).long(), **more)


def in_image(boxes, model, images):
    """Boxes of transformers, in the frame of the unpadded image."""
    if model.config.model_type not in [kind.__name__ for kind in RAW_PIXELS]:
        return boxes
    height, width = images.mask.shape[1:]
    frames = [torch.tensor([width / w, height / h, width / w, height / h]) for h, w in images.sizes.tolist()]
    return boxes * torch.stack(frames)[:, None]


def targets(count=2):
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.5]])
    return [Target(torch.tensor([1, 3]), boxes, image_id, (64, 64)) for image_id in range(count)]


@pytest.fixture
def images():
    return batch((64, 96), (80, 60))


# What it says.


@each_kind
def test_it_satisfies_the_contract_of_detectors(kind, images):
    detector = adapted(make(kind()))
    output = check_contract(detector, CLASSES, images)
    assert (output.references is None) == (detector.model.config.model_type in ("detr", "table-transformer"))
    rego = Rego(detector, stages=2, ffn_dim=48).eval()
    check_contract(rego, CLASSES, images)
    assert rego.model_config.detector == detector.model_config.detector and rego.base_detector is detector
    assert detector.transformer_layers() == [] and len(rego.transformer_layers()) == 4  # of the stages


@each_kind
def test_last_layer_is_their_answer_bit_for_bit(kind, images):
    model = make(kind())
    with torch.no_grad():
        detector = adapted(model)
        theirs, ours = ask(model, detector.padded(images)), detector(images)
    if kind in PROMPTED:
        torch.testing.assert_close(ours.layers[-1].logits, class_logits(theirs.logits))
    else:
        assert torch.equal(ours.layers[-1].logits, theirs.logits)
    assert torch.equal(ours.layers[-1].boxes, in_image(theirs.pred_boxes, model, images))
    assert torch.equal(ours.queries, theirs.last_hidden_state)
    assert len(ours.layers) == LAYERS + MORE_LAYERS.get(kind, 0)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind not in (*DISTRIBUTIONS, *WITH_GROUPS, *LAYOUT)],
    ids=lambda kind: kind.__name__,
)
def test_layers_are_their_auxiliary_outputs(kind, images):
    model = make(kind(auxiliary_loss=True))
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets()]
    with torch.no_grad():
        theirs, ours = ask(model, images, labels=labels).auxiliary_outputs, adapted(model)(images).layers
    if kind in PROMPTED:  # the encoder's selection has a test of its own
        theirs, ours = [their | {"logits": class_logits(their["logits"])} for their in theirs], ours[1:]
    if kind in RAW_PIXELS:  # they put the encoder's choice behind the layers, and it comes before them
        theirs = [theirs[-1], *theirs[:-1]]
    assert len(theirs) == len(ours) - 1
    for their, our in zip(theirs, ours):
        torch.testing.assert_close(our.logits, their["logits"])
        torch.testing.assert_close(our.boxes, in_image(their["pred_boxes"], model, images))


@pytest.mark.parametrize("kind", [detr, conditional_detr, table_transformer, *DISTRIBUTIONS, *WITH_GROUPS])
def test_a_layer_is_what_a_shorter_decoder_answers(kind, images):
    """Without ``auxiliary_loss``, as models are published: transformers itself has no inner layers to show then."""
    model = make(kind())
    with torch.no_grad():
        detector = adapt(model)
        layers = detector(images).layers[-LAYERS:]
        for count in (1, 2):
            shorter = copy.deepcopy(model)
            shorter.model.decoder.layers = shorter.model.decoder.layers[:count]
            shorter.model.decoder.eval_idx = count - 1  # of D-FINE and DEIMv2
            theirs = ask(shorter, detector.padded(images))
            torch.testing.assert_close(layers[count - 1].logits, theirs.logits)
            torch.testing.assert_close(layers[count - 1].boxes, in_image(theirs.pred_boxes, model, images))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_training_predicts_as_transformers_does_in_training(kind, images):
    """The first box before its edges' distributions, then those of all layers."""
    model = make(kind()).train()
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets()]
    trained = make(kind(num_denoising=0)).train()
    trained.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        theirs = ask(trained, images, labels=labels)
        layers = adapt(model)(images).layers[1:]
    assert len(layers) == theirs.intermediate_logits.shape[1] == LAYERS + 1
    for i, layer in enumerate(layers):
        torch.testing.assert_close(layer.logits, theirs.intermediate_logits[:, i])
        torch.testing.assert_close(layer.boxes, in_image(theirs.intermediate_reference_points[:, i], model, images))


@pytest.mark.parametrize("kind", WITH_GROUPS)
def test_training_uses_the_first_group_of_queries(kind, images):
    """The other groups are training's alone, and would be matched with the same objects as one large group."""
    model = make(kind())
    detector = adapt(model)
    with torch.no_grad():
        wanted = detector(images).layers
        detector.train()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eval()  # statistics of the batch would differ
        layers = detector(images).layers
    assert model.model.training and all(layer.self_attn.training for layer in model.model.decoder.layers)
    for ours, inferred in zip(layers, wanted, strict=True):
        torch.testing.assert_close(ours.logits, inferred.logits)
        torch.testing.assert_close(ours.boxes, inferred.boxes)


@pytest.mark.parametrize(("kind", "sides"), [(lw_detr, (96, 64)), (rf_detr, (112, 112)), (rt_detr, (96, 64))])
def test_a_batch_is_padded_to_the_windows_and_boxes_stay(kind, sides):
    """The same image in a batch that already has the size: no other boxes."""
    detector = adapt(make(kind()))
    image = batch((70, 60))
    padded = detector.padded(image)
    assert tuple(padded.mask.shape[1:]) == sides and padded.mask[0, 70:].all() and not padded.mask[0, :70, :60].any()
    with torch.no_grad():
        for ours, already in zip(detector(image).layers, detector(padded).layers):
            assert torch.equal(ours.boxes, already.boxes)


def test_proposals_are_the_encoders(images):
    model = make(two_stage())
    with torch.no_grad():
        theirs, ours = ask(model, images), adapt(model)(images).proposals
    assert torch.equal(ours.logits, theirs.enc_outputs_class)
    assert torch.equal(ours.boxes, theirs.enc_outputs_coord_logits.sigmoid())


@pytest.mark.parametrize("kind", PROMPTED)
def test_the_selected_proposals_come_first(kind, images):
    model = make(kind())
    with torch.no_grad():
        theirs, ours = ask(model, images), adapted(model)(images)
    first = ours.layers[0]
    assert torch.equal(first.boxes, theirs.encoder_pred_boxes) and torch.equal(ours.references, first.boxes)
    cells = (first.boxes[:, :, None] - theirs.enc_outputs_coord_logits.sigmoid()[:, None]).abs().sum(-1).argmin(-1)
    logits = torch.stack([logits[row] for logits, row in zip(theirs.enc_outputs_class, cells)])
    torch.testing.assert_close(first.logits, class_logits(logits))


def test_the_text_encoder_learns_as_slowly_as_the_backbone():
    detector = adapted(make(grounding_dino()))
    groups = {name: detector.parameter_group(name) for name, _ in detector.named_parameters()}
    assert {group for name, group in groups.items() if "text_backbone" in name} == {"backbone"}
    assert groups["model.model.text_projection.weight"] == "rest"


def test_certain_tokens_have_finite_class_logits():
    """Where a probability rounds to 0 or 1; of "bee eater", the mean of 1 and 0 is a half."""
    detector, logits = adapted(make(grounding_dino())), torch.zeros(1, 1, 14)
    logits[..., [1, 3, 4, 8, 9]] = torch.tensor([300.0, 300, -300, -300, -300])
    logits.requires_grad_(True)
    found = detector._class_logits(logits)
    torch.testing.assert_close(found[0, 0], torch.tensor([300.0, 0, 0, -300, 0]))
    found.sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[..., [0, 2, 13]] == 0).all()


def test_boxes_of_rt_detr_are_put_into_the_frame_of_the_image():
    """A box that covers the left half of a padded batch covers an image of that half's width wholly."""
    model = make(rt_detr())
    images = batch((64, 128), (64, 64))
    with torch.no_grad():
        theirs, ours = ask(model, images).pred_boxes, adapt(model)(images).layers[-1].boxes
    pixels = to_xyxy(theirs[1]) * torch.tensor([128.0, 64.0, 128.0, 64.0])
    torch.testing.assert_close(to_xyxy(ours[1]) * 64, pixels)
    torch.testing.assert_close(ours[0], theirs[0])


# The maps for the glimpses.


@each_kind
def test_maps_double_their_strides_and_carry_the_mask(kind, images):
    detector = adapted(make(kind()))
    with torch.no_grad():
        maps = detector(images).features
    first = 14 if kind is rf_detr else 8 if kind in MULTI_SCALE else 4
    assert [f.stride for f in maps] == [first * 2**i for i in range(len(maps))]
    assert [f.tensor.shape[1] for f in maps] == detector.feature_channels
    assert detector.projected is (kind in MULTI_SCALE)
    assert len(maps) == {rf_detr: 1, lw_detr: 2}.get(kind, 3 if kind in RAW_PIXELS else 4)
    for f in maps:
        assert torch.equal(f.mask, shrink(detector.padded(images).mask, tuple(f.tensor.shape[-2:])))
    assert maps[0].mask[1].any() and not maps[0].mask[1].all()


def test_maps_are_the_raw_ones_that_the_backbone_would_return(images):
    """Their model reads the last map alone, and the four stages are there all the same."""
    model = make(detr())
    open_backbone = copy.deepcopy(model.model.backbone.model)
    open_backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    with torch.no_grad():
        maps, theirs = adapt(model)(images).features, open_backbone(images.pixels).feature_maps
    assert len(maps) == 4
    assert all(torch.equal(ours.tensor, x) for ours, x in zip(maps, theirs))


@pytest.mark.parametrize(("config", "dilated"), [(detr, False), (detr, True), (dab_detr, False)])
def test_maps_of_a_timm_backbone(config, dilated, images):
    """It returns the last map alone here; DC5 brings that back to the normal stride, as appendix A.1 has it."""
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet10t", out_indices=[4], use_pretrained_backbone=False, output_stride=16 if dilated else None
    )
    detector = adapt(make(config(backbone_config=backbone)))
    with torch.no_grad():
        maps = detector(images).features
    assert [(f.stride, f.tensor.shape[1]) for f in maps] == [(4, 64), (8, 128), (16, 256), (32, 512)]
    assert [f.tensor.shape[-1] for f in maps] == [96 // f.stride for f in maps]


def test_a_backbone_that_hides_its_stages_gives_its_last_map_to_rego(images):
    swin = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, out_features=["stage4"]
    )
    rego = Rego(adapt(make(detr(backbone_config=swin))), stages=2, ffn_dim=32).eval()
    output = rego(images)
    assert [f.stride for f in output.features] == [32]
    assert len(output.stages) == 2 and output.final.boxes.isfinite().all()


def test_maps_whose_strides_do_not_double_are_named(images):
    backbone = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, out_features=["stage1", "stage3"])
    model = make(deformable_detr(backbone_config=backbone, num_feature_levels=2))
    with pytest.raises(UserError, match=r"strides double, not \[4, 16\]: let the backbone return every stage"):
        adapt(model)(images)


def test_the_model_is_left_as_it_was(images):
    model = make(conditional_detr())
    before, state = sum(len(m._forward_hooks) for m in model.modules()), copy.deepcopy(model.state_dict())
    detector = adapt(model)
    assert detector.model is model
    detector(images)
    between = sum(len(m._forward_hooks) for m in model.modules())  # transformers sets some of its own, once
    detector(images)
    assert sum(len(m._forward_hooks) for m in model.modules()) == between
    assert before == 0 and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# REGO on top.


@each_kind
def test_rego_on_top_trains_stages_and_base(kind, images):
    model = make(kind())
    model.requires_grad_(True)  # transformers freezes its own ResNets wholly
    rego = shake(Rego(adapted(model), stages=2, ffn_dim=32)).train()
    loss, terms = SetLoss(rego.model_config.loss, rego.scoring)(rego(images), targets())
    loss.backward()
    assert {"base/giou", "base.1/label", "stage1/l1", "stage2/label"} <= set(terms)
    silent = {name for name, p in rego.named_parameters() if p.grad is None or not p.grad.any()}
    expected = {  # what has no say here: coarse maps, for small boxes; a first layer that looks at zeros; denoising
        name
        for name in silent
        if name.startswith("projections.")
        or ".decoder.layers.0.self_attn" in name
        or ".denoising_class_embed." in name
        or re.search(FURTHER, name)
        or (kind is dab_detr and ".encoder." in name)  # attention that is all on one cell
    }
    assert silent == expected and "projections.0.weight" not in silent


@each_kind
def test_saved_and_loaded_it_answers_the_same(kind, images, tmp_path):
    config = kind()
    config.id2label = dict(enumerate(NAMES))
    rego = Rego(adapted(make(config)), stages=2, ffn_dim=32).eval()
    save_model(rego, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.model_config == rego.model_config
    assert loaded.model_config.classes == NAMES
    with torch.no_grad():
        for ours, again in zip(rego(images).by_stage, loaded(images).by_stage):
            assert torch.equal(ours.logits, again.logits) and torch.equal(ours.boxes, again.boxes)


def test_heads_that_differ_by_layer_are_loaded_as_such(images, tmp_path):
    """A new refined model ties the class heads of its layers; a published one, once loaded, does not."""
    model = make(refined())
    assert model.class_embed[0].weight is model.class_embed[1].weight
    for head in model.class_embed:
        head.weight, head.bias = nn.Parameter(torch.randn(CLASSES, DIM)), nn.Parameter(torch.randn(CLASSES))
    detector = adapt(model).eval()
    save_model(detector, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        for ours, again in zip(detector(images).layers, loaded(images).layers):
            assert torch.equal(ours.logits, again.logits) and torch.equal(ours.boxes, again.boxes)
    embeds = loaded.model.bbox_embed[1], loaded.model.model.decoder.bbox_embed[1]
    assert embeds[0].layers[0].weight is embeds[1].layers[0].weight  # these two stay one


def test_a_checkpoint_never_downloads_a_backbone():
    config = adapt(make(detr(backbone_config=None, backbone="resnet10t"))).model_config.detector
    described = json.loads(config.json)
    described["backbone_config"]["use_pretrained_backbone"] = True
    again = from_config(replace(config, json=json.dumps(described)), CLASSES)
    assert again.model.config.backbone_config.use_pretrained_backbone is False


def test_detects_in_a_image():
    model = Rego(adapt(make(conditional_detr())), stages=1, ffn_dim=32)
    model.model_config = replace(model.model_config, image_size=64)
    [found] = detect(model, Image.new("RGB", (100, 80)), threshold=0.0, top_k=5)
    assert len(found) == 5 and found.boxes_xyxy.isfinite().all()


def test_a_checkpoint_downloads_no_attention_kernel():
    config = adapt(make(detr())).model_config.detector
    described = json.loads(config.json) | {"attn_implementation": "someone/kernel"}
    again = from_config(replace(config, json=json.dumps(described)), CLASSES)
    assert again.model.config._attn_implementation == "sdpa"


def test_category_ids_are_cocos():
    assert adapt(make(detr(num_labels=91))).model_config.category_ids == tuple(range(91))
    names = {i: "person" if i == 0 else f"class {i}" for i in range(80)}
    ids = adapt(make(rt_detr(num_labels=80, id2label=names))).model_config.category_ids
    assert (ids[0], ids[11], ids[79], len(ids)) == (1, 13, 90, 80)  # COCO has no 12


# A frozen base.


@pytest.mark.parametrize("kind", [conditional_detr, two_stage, rt_detr])
def test_frozen_base_is_unchanged_bit_for_bit(kind, images):
    """RT-DETR has batch normalization that learns, the others dropout."""
    model = make(kind(dropout=0.3))
    rego = Rego(adapt(model), stages=2, ffn_dim=32, frozen=True).train()
    before = copy.deepcopy(rego.state_dict())
    with torch.no_grad():
        alone = adapt(copy.deepcopy(model).eval())(images).layers[-1]
    config = RunConfig(lr=1e-2, weight_decay=0.1)
    assert all("detector." not in name for name, p in rego.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(parameter_groups(rego, config), weight_decay=config.weight_decay)
    for _ in range(3):
        output = rego(images)
        torch.testing.assert_close(output.layers[-1].logits, alone.logits)  # no dropout, no statistics of the batch
        assert not output.queries.requires_grad and not any(f.tensor.requires_grad for f in output.features)
        loss, _ = SetLoss(rego.model_config.loss, rego.scoring)(output, targets())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = [key for key, value in rego.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and not [key for key in changed if key.startswith("detector.")]
    assert any("stages.1" in key for key in changed)


def test_frozen_survives_saving(tmp_path):
    rego = Rego(adapt(make(detr())), stages=1, ffn_dim=32, frozen=True)
    save_model(rego, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors").train()
    assert not loaded.detector.training and loaded.stages.training
    assert not any(p.requires_grad for p in loaded.detector.parameters())


@each_kind
def test_parameters_without_gradients_are_announced(kind, images):
    """Several processes would wait for them: embeddings of noised queries and groups that our training does not use."""
    detector = Rego(adapted(make(kind())), stages=1, ffn_dim=48).train()
    loss, _ = SetLoss(detector.base_detector.model_config.loss, detector.scoring)(detector(images), targets())
    loss.backward()
    unused = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    expected = kind in (*RAW_PIXELS, *WITH_GROUPS, mm_grounding_dino)
    assert bool(unused) == detector.has_unused_parameters == expected, unused
    assert all("denoising" in name or re.search(FURTHER, name) for name in unused)


# Other classes.


@pytest.mark.parametrize("kind", [detr, conditional_detr, dab_detr, two_stage, rt_detr])
def test_fresh_class_heads(kind, images, caplog):
    model = make(kind())
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, "regolite"):
        detector = adapt(model, num_classes=3)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"class heads for {CLASSES} classes are replaced by new ones for 3: ")
    assert detector.num_logits == 3 + (kind is detr) and len(detector.model_config.classes) == 3
    assert detector(images).layers[-1].logits.shape[-1] == detector.num_logits
    kept = [key for key, value in detector.model.state_dict().items() if value.shape == before[key].shape]
    assert len(kept) > 0.9 * len(before)
    assert all(torch.equal(detector.model.state_dict()[key], before[key]) for key in kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind is not detr:
        head = detector.model.state_dict()[next(k for k in before if "class" in k and k.endswith("bias"))]
        torch.testing.assert_close(head.sigmoid(), torch.full((3,), 0.01))


def test_fresh_class_heads_are_as_many_as_the_old_ones():
    """One for each layer in a published refined model, though transformers gives a new one a single head."""
    model = make(refined())
    for head in model.class_embed:
        head.weight, head.bias = nn.Parameter(torch.randn(CLASSES, DIM)), nn.Parameter(torch.randn(CLASSES))
    fresh = adapt(model, num_classes=3).model
    for part in ("weight", "bias"):
        assert len({id(getattr(head, part)) for head in fresh.class_embed}) == LAYERS
    assert fresh.bbox_embed[1].layers[0].weight is fresh.model.decoder.bbox_embed[1].layers[0].weight
    assert len({id(head.weight) for head in adapt(make(refined()), num_classes=3).model.class_embed}) == 1


def test_the_same_number_of_classes_keeps_the_model():
    model = make(detr())
    assert adapt(model, num_classes=CLASSES).model is model
    with pytest.raises(UserError, match="num_classes=0 must be at least 1"):
        adapt(model, num_classes=0)


# Training by the loop.


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])

    def make(name="run", **changes):
        return RunConfig(
            **{
                "data": "scenes:4:val=1:size=64", "output": str(tmp_path / name), "augment": "none", "image_size": 64,
                "batch_size": 2, "epochs": 3, "lr": 1e-3, "schedule": "one_cycle", "evaluate_every": 0, "log_every": 1,
                "device": "cpu", "ema": 0.5,
            }
            | changes
        )  # fmt: skip

    return make


def small_rego(**changes):
    torch.manual_seed(1)
    model = make(conditional_detr(num_labels=14, dropout=0.1))
    return Rego(adapt(model), **({"stages": 1, "ffn_dim": 32} | changes))


class Interrupted(Exception):
    """What stands for a power failure."""


def test_a_given_model_is_trained_saved_and_resumed(config):
    model = small_rego(frozen=True)
    before = copy.deepcopy(model.state_dict())
    whole = train(config("whole"), model=model)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and not [key for key in changed if key.startswith("detector.")]
    written = json.loads((whole / "config.json").read_text())
    assert written["run"]["model"] == "transformers:conditional_detr" and written["model"]["kind"] == "transformers"
    assert model.model_config.classes == load(whole / "model.safetensors").model_config.classes
    assert len(model.model_config.classes) == 14 and "LABEL_0" not in model.model_config.classes

    def fail(line):
        if line["step"] >= 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config("parts", checkpoint_minutes=0.0), watch=fail, model=small_rego(frozen=True))
    again = small_rego(frozen=True)
    train(config("parts", resume=True), model=again)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_given_model_that_does_not_fit_is_refused(config):
    with pytest.raises(UserError, match="the model has 5 classes and scenes:4.* has 14: make it with num_classes=14"):
        train(config(), model=adapt(make(detr())))
    with pytest.raises(UserError, match=r"overrides \(queries=5\) change a preset, and a model was given"):
        train(config(overrides=("queries=5",)), model=small_rego())
    with pytest.raises(UserError, match="a model to train must carry its configuration"):
        train(config(), model=native_detr())
    with pytest.raises(UserError, match=r"model=Linear.* is not a Detector"), unchecked():
        train(config(), model=nn.Linear(2, 2))


def test_a_native_model_can_be_given_too(config):
    model = build(
        "rego_detr_scenes",
        num_classes=14,
        dim=32,
        detector={"ffn_dim": 32},
        rego={"ffn_dim": 32},
        stages=1,
        frozen=True,
    )
    before, modes = copy.deepcopy(model.detector.state_dict()), [module.training for module in model.eval().modules()]
    train(config(epochs=1), model=model)
    assert [module.training for module in model.modules()] == modes, "it is given back in the mode that it had"
    assert all(torch.equal(value, before[key]) for key, value in model.detector.state_dict().items())
    assert model.model_config.classes[0] != "0"


@pytest.mark.slow
def test_rego_on_conditional_detr_overfits_four_images(config):
    torch.manual_seed(0)
    network = NETWORK | {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]}
    backbone = transformers.ResNetConfig(**network, out_features=LAST)
    sizes = {"d_model": 64, "num_queries": 20, "decoder_layers": 2, "num_labels": 91, "dropout": 0.0}
    model = transformers.AutoModelForObjectDetection.from_config(conditional_detr(backbone_config=backbone, **sizes))
    model.model.unfreeze_backbone()
    rego = Rego(adapt(model, num_classes=14), stages=3, ffn_dim=128, dropout=0.0)
    recipe = {
        "batch_size": 4,
        "epochs": 150,
        "lr": 3e-3,
        "backbone_lr_mult": 1.0,
        "log_every": 1,
        "evaluate_train": True,
    }
    folder = train(config(data="scenes:4:val=1:size=96", image_size=96, **recipe), model=rego)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    [figures] = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "train"]
    base, *stages = (stage["AP"] for stage in figures["stages"])
    assert losses[-1] < 0.15 * losses[0]
    assert stages[-1] > 70 and stages[-1] > base + 30


# What cannot be adapted.


def test_what_is_no_supported_detector_is_named():
    with pytest.raises(UserError, match="adapt takes a detector of transformers, not a Linear"):
        adapt(nn.Linear(2, 2))
    yolos = transformers.YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=[32, 32]
    )
    wanted = f"'yolos' is not supported, since it has no decoder; choose one of {', '.join(FAMILIES)}"
    with pytest.raises(UserError, match=wanted):
        adapt(transformers.YolosForObjectDetection(yolos))
    with pytest.raises(UserError, match="a DetrModel has no heads for detection: give a DetrForObjectDetection"):
        adapt(transformers.DetrModel(detr()))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {},
            r"words of a prompt: give adapt\(model, classes=\('cat', 'traffic light'\), tokenizer=processor.tokenizer",
        ),
        ({"classes": NAMES}, "words of a prompt: give adapt"),
        ({"tokenizer": None, "num_classes": 2}, "words of a prompt: give adapt"),
        ({"classes": NAMES, "tokenizer": "bert", "num_classes": 5}, "without num_classes"),
        ({"classes": "cat", "tokenizer": "bert"}, "classes='cat' is not a list of names"),
        ({"classes": ["cat", 3], "tokenizer": "bert"}, r"classes=\['cat', 3\] is not a list of names"),
        ({"classes": (), "tokenizer": "bert"}, r"classes=\(\) must be one or more different names"),
        ({"classes": ("cat", "Cat "), "tokenizer": "bert"}, "must be one or more different names"),
        ({"classes": ("cat", " "), "tokenizer": "bert"}, "the class ' ' is not one phrase of a prompt"),
        ({"classes": ("ant", "bee. eel"), "tokenizer": "bert"}, "the class 'bee. eel' is not one phrase"),
        ({"classes": NAMES, "tokenizer": "words"}, "the tokenizer does not separate the classes .* the model's own"),
        ({"classes": NAMES, "tokenizer": "a name"}, "tokenizer='bert-base-uncased' is not the model's tokenizer: give"),
        ({"classes": NAMES, "tokenizer": "processor"}, "is not the model's tokenizer: give processor.tokenizer"),
        ({"classes": ("ant " * 70, "eel"), "tokenizer": "bert"}, "has 75 tokens, and the model takes 64"),
    ],
)
def test_what_is_no_prompt_is_one_clear_error(given, said):
    known = {
        "bert": tokenizer(),
        "words": lambda text: {"input_ids": [5 for _ in text.split()]},
        "a name": "bert-base-uncased",
        "processor": transformers.ProcessorMixin(),
    }
    known["processor"].image_processor = None
    tokens = known.get(given.get("tokenizer"))
    with unchecked(), pytest.raises(UserError, match=said):
        adapt(make(grounding_dino()), **(given | {"tokenizer": tokens}))


def test_a_detector_with_classes_takes_no_prompt():
    with pytest.raises(UserError, match="'detr' has none: leave them out"):
        adapt(make(detr()), classes=NAMES, tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        ({"tokens": (), "token_labels": ()}, "each class needs a token"),
        ({"token_labels": (-1,) * 14}, "its prompt has 0 classes, not 5"),
        ({"token_labels": (0, 1, 2, 4, *(-1,) * 10)}, "each class needs a token"),
        ({"token_labels": (0, 1, 2, 3, 4)}, "each token of a prompt has a label"),
        ({"tokens": (101, 1037, *(-1,) * 12)}, "a number from 0 to 1036"),
        ({"tokens": (101,) * 65}, "has 65 tokens, and the model takes 64"),
        ({"token_labels": (10**9, *(-1,) * 13)}, "its prompt has 1000000001 classes, not 5"),
        ({"text": "roberta"}, "its text encoder is not BERT"),
    ],
)
def test_a_forged_prompt_is_one_clear_error(forged, said):
    config = adapted(make(grounding_dino())).model_config
    if "text" in forged:
        described = json.loads(config.detector.json)
        described["text_config"]["model_type"] = forged["text"]
        forged = {"json": json.dumps(described)}
    with pytest.raises(UserError, match=said):
        build(replace(config, detector=replace(config.detector, **forged)))


def test_without_transformers_there_is_one_error(monkeypatch):
    config = adapt(make(detr())).model_config
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'regolite\[transformers\]'"):
        build(config)
    with pytest.raises(UserError, match=r"pip install 'regolite\[transformers\]'"):
        adapt(nn.Linear(2, 2))


def test_a_configuration_that_transformers_does_not_know_is_named():
    config = adapt(make(detr())).model_config
    strange = replace(config, detector=replace(config.detector, model_type="detr_of_tomorrow"))
    with unchecked(), pytest.raises(UserError, match="can't build this detr_of_tomorrow .* install the version"):
        build(strange)
