"""Parity with Hugging Face's transformers, which we did not write: outputs, matching, loss, gradients, the way back.

All weights are random, and none is zero. Batches hold images of three sizes, padded, one of them without objects.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import batch, small_resnet, unfold_norms
from torch import nn

from regolite.interop import from_transformers, to_transformers
from regolite.interop import transformers as module
from regolite.interop.keys import to_theirs
from regolite.losses import LossConfig, SetLoss
from regolite.matching import MatchingCosts, PaddedTargets, match
from regolite.models.presets import build, configure
from regolite.types import Target

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
timm = pytest.importorskip("timm", reason="the extra 'transformers' is not installed")

CLASSES = 5
BLOCKS = (1, 1, 1, 2)  # the second block of stage 5 shows its dilation
CLOSE = {"rtol": 0, "atol": 1e-4}
SIZES = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "num_queries": 7,
    "id2label": {i: f"thing {i}" for i in range(CLASSES)}, "label2id": {f"thing {i}": i for i in range(CLASSES)},
}  # fmt: skip
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 9}
VARIANTS = {
    "detr": ("Detr", {}, {"out_indices": [1, 2, 3, 4]}),
    "detr_dc5": ("Detr", {"dilation": True}, {"out_indices": [1, 2, 3, 4], "output_stride": 16}),
    "plain": ("DeformableDetr", {}, {"out_indices": [2, 3, 4]}),
    "refined": ("DeformableDetr", {"with_box_refine": True}, {"out_indices": [2, 3, 4]}),
    "two_stage": ("DeformableDetr", TWO_STAGE, {"out_indices": [2, 3, 4]}),
    "three_levels": ("DeformableDetr", {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2},
                     {"out_indices": [4]}),
    "single_scale": ("DeformableDetr", {"num_feature_levels": 1}, {"out_indices": [4]}),
    "single_scale_dc5": ("DeformableDetr", {"num_feature_levels": 1, "dilation": True},
                         {"out_indices": [4], "output_stride": 16}),
}  # fmt: skip
NO_DC5 = [name for name in VARIANTS if "dc5" not in name]


@pytest.fixture
def small(monkeypatch):
    """A ResNet-50 of few blocks, in torchvision, timm and transformers."""

    def resnet(pretrained=False, **options):
        block = timm.models.resnet.Bottleneck
        return timm.models.resnet._create_resnet("resnet50", pretrained, block=block, layers=BLOCKS, **options)

    small_resnet(monkeypatch, BLOCKS)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "resnet50", resnet)
    monkeypatch.setitem(module.DEPTHS, "resnet50", BLOCKS)


def theirs(variant, timm=True, sizes=SIZES, shaken=True, **changes):
    """A model of transformers with random weights."""
    family, settings, backbone = VARIANTS[variant]
    if timm:
        backbone = transformers.TimmBackboneConfig(backbone="resnet50", **backbone)
    else:
        backbone = transformers.ResNetConfig(depths=list(module.DEPTHS["resnet50"]), **backbone)
    config = getattr(transformers, f"{family}Config")
    config = config(**({"backbone_config": backbone} | sizes | settings | changes))
    model = getattr(transformers, f"{family}ForObjectDetection")(config)
    if settings.get("with_box_refine") and not settings.get("two_stage"):
        # A checkpoint has different class heads, and `from_pretrained` keeps them so.
        model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
    if shaken:  # the queries of DETR start alike, and with small weights stay so
        shake(model, gain=2.0 if family == "Detr" else 1.0)
    return model.eval()


@torch.no_grad()
def shake(model, gain=1.0):
    """Weights without zeros, of a size at which queries differ, and batch normalization that does something."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "backbone" in name:
            if weight.dim() == 1:
                positive = "var" in name or name.endswith("weight")
                weight.copy_(torch.rand_like(weight) * 0.5 + (0.7 if positive else -0.2))
        elif weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.2)
        else:
            weight.copy_(torch.randn_like(weight) * gain * weight[0].numel() ** -0.5)
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)
    return model


def some_targets(counts=(3, 0, 2)):
    centers = torch.rand(sum(counts), 2) * 0.6 + 0.2
    boxes = torch.cat([centers, torch.rand(sum(counts), 2) * 0.3 + 0.05], 1).split(counts)
    labels = torch.randint(CLASSES, (sum(counts),)).split(counts)
    return [Target(label, box, i, (96, 96)) for i, (label, box) in enumerate(zip(labels, boxes))]


def in_their_form(targets):
    return [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]


def run_theirs(model, images, targets=None):
    """Logits and boxes of every decoder layer, the encoder's states, and the loss of all layers with its terms."""
    states = []
    hooks = [layer.register_forward_hook(lambda m, i, output: states.append(output)) for layer in _layers(model)]
    labels = None if targets is None else in_their_form(targets)
    detr = isinstance(model, transformers.DetrForObjectDetection)
    config = model.config
    config.auxiliary_loss = not detr and targets is not None
    output = model(images.pixels, pixel_mask=(~images.mask).long(), labels=labels)
    config.auxiliary_loss = False
    for hook in hooks:
        hook.remove()
    if detr:  # `auxiliary_loss=True` would change the outputs; so the heads read the layers' states here
        states = [model.model.decoder.layernorm(state) for state in states]
        logits = torch.stack([model.class_labels_classifier(state) for state in states])
        boxes = torch.stack([model.bbox_predictor(state).sigmoid() for state in states])
        torch.testing.assert_close(logits[-1], output.logits, rtol=0, atol=0)
        loss, terms = None, None
        if targets is not None:
            paying = copy.deepcopy(config)
            paying.auxiliary_loss = True
            loss, terms, _ = model.loss_function(logits[-1], labels, "cpu", boxes[-1], paying, logits, boxes)
    else:
        loss, terms = output.loss, output.loss_dict
        earlier = output.auxiliary_outputs or []
        logits = torch.stack([*(o["logits"] for o in earlier), output.logits])
        boxes = torch.stack([*(o["pred_boxes"] for o in earlier), output.pred_boxes])
    return SimpleNamespace(
        logits=logits, boxes=boxes, encoder=output.encoder_last_hidden_state, loss=loss, terms=terms, output=output
    )


def _layers(model):
    return model.model.decoder.layers


def run_ours(detector, images):
    seen = []
    hook = detector.encoder.register_forward_hook(lambda m, i, memory: seen.append(memory.tokens))
    output = detector(images)
    hook.remove()
    logits, boxes = (torch.stack([getattr(p, part) for p in output.layers]) for part in ("logits", "boxes"))
    return SimpleNamespace(logits=logits, boxes=boxes, encoder=seen[0], output=output)


def three_images():
    return batch((96, 128), (128, 80), (75, 101))


def agree(mine, other, **tolerance):
    for part in ("logits", "boxes", "encoder"):
        torch.testing.assert_close(getattr(mine, part), getattr(other, part), **tolerance)


def same_weights(model, other):
    mine, others = model.state_dict(), other.state_dict()
    assert list(mine) == list(others)
    assert all(torch.equal(mine[name], others[name]) for name in mine)


def same_configuration(config, other):
    mine, others = config.to_dict(), other.to_dict()
    for free in ("backbone_config", "num_queries") if config.to_dict().get("two_stage") else ("backbone_config",):
        mine.pop(free), others.pop(free)  # a two-stage model has no learned queries
    assert mine == others
    assert config.backbone_config.out_indices == other.backbone_config.out_indices


@pytest.mark.parametrize("variant, timm", [(v, True) for v in VARIANTS] + [(v, False) for v in NO_DC5])
def test_outputs_of_every_layer_are_theirs_and_weights_go_round(small, variant, timm):
    model = theirs(variant, timm)
    detector = from_transformers(model)
    images = three_images()
    with torch.no_grad():
        mine, other = run_ours(detector, images), run_theirs(model, images, some_targets())
    assert len(mine.logits) == 3 and mine.logits.std(2).mean() > 0.01  # layers and queries that say something
    agree(mine, other, **CLOSE)
    assert not detector.training and detector.model_config.classes == tuple(model.config.id2label.values())
    assert detector.model_config.category_ids == tuple(range(CLASSES))

    back = to_transformers(detector, timm=timm)
    same_weights(back, model)
    with torch.no_grad():
        agree(run_theirs(back, images, some_targets()), other, rtol=0, atol=0)
    same_configuration(back.config, model.config)
    same_weights(from_transformers(back), detector)
    assert from_transformers(back).model_config == detector.model_config


def test_proposals_are_theirs(small):
    model = theirs("two_stage")
    images = three_images()
    with torch.no_grad():
        proposals = from_transformers(model)(images).proposals
        other = model(images.pixels, pixel_mask=(~images.mask).long())
    torch.testing.assert_close(proposals.logits, other.enc_outputs_class, **CLOSE)
    torch.testing.assert_close(proposals.boxes, other.enc_outputs_coord_logits.sigmoid(), **CLOSE)


@pytest.mark.parametrize("variant", ["detr", "plain", "refined", "two_stage"])
def test_loss_and_matching_are_theirs(small, variant):
    """Term by term. Their loss knows no terms for proposals."""
    model = theirs(variant)
    detector = from_transformers(model)
    images, targets = three_images(), some_targets()
    with torch.no_grad():
        output, other = detector(images), run_theirs(model, images, targets)
    config = detector.model_config.loss
    assert config == LossConfig(label=1.0, label_cost=1.0)
    loss, terms = SetLoss(config, detector.scoring)(replace(output, proposals=None), targets)
    expected = {}
    for layer, suffix in (("base.1", "_0"), ("base.2", "_1"), ("base", "")):
        expected[f"{layer}/label"] = other.terms[f"loss_ce{suffix}"] * 1
        expected[f"{layer}/l1"] = other.terms[f"loss_bbox{suffix}"] * 5
        expected[f"{layer}/giou"] = other.terms[f"loss_giou{suffix}"] * 2
    assert set(terms) == set(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(loss, other.loss, rtol=1e-4, atol=1e-5)

    family = "Deformable" if variant != "detr" else ""
    losses = transformers.loss.loss_deformable_detr if family else transformers.loss.loss_for_object_detection
    matcher = getattr(losses, f"{family}DetrHungarianMatcher" if family else "HungarianMatcher")(1, 5, 2)
    matches = match(output.layers, PaddedTargets.of(targets), detector.scoring, MatchingCosts(1.0, 5.0, 2.0))
    found = set(zip(*(part.tolist() for part in vars(matches).values())))
    pairs = {
        (layer, image, query, target)
        for layer in range(3)
        for image, (queries, objects) in enumerate(
            matcher({"logits": other.logits[layer], "pred_boxes": other.boxes[layer]}, in_their_form(targets))
        )
        for query, target in zip(queries.tolist(), objects.tolist())
    }
    assert found == pairs and len(found) == 3 * 5


@pytest.mark.parametrize("variant", ["detr", "plain", "refined", "two_stage"])
def test_gradients_of_a_training_step_are_theirs(small, monkeypatch, variant):
    unfold_norms(monkeypatch)
    model = theirs(variant).train()
    model.model.unfreeze_backbone()
    detector = from_transformers(model).train()
    images, targets = three_images(), some_targets()
    run_theirs(model, images, targets).loss.backward()
    output = replace(detector(images), proposals=None)
    SetLoss(detector.model_config.loss, detector.scoring)(output, targets)[0].backward()

    other = {name: w.grad for name, w in model.named_parameters(remove_duplicate=False) if w.grad is not None}
    # The proposals' heads learn from terms that transformers has not.
    ours = {name: w.grad for name, w in detector.named_parameters() if w.grad is not None}
    frozen = [name for name, w in detector.named_parameters() if not w.requires_grad]
    assert frozen and all(".layer1." in name or ".conv1." in name for name in frozen)
    c = detector.model_config.detector
    mine = to_theirs(ours, module._backbone_pairs("resnet50", True) + module.FAMILIES[type(model).__name__].pairs(c))
    assert set(mine) == {name for name in other if ".layer1." not in name and ".model.conv1." not in name}
    largest = max(gradient.norm() for gradient in other.values())
    for name, gradient in mine.items():
        # The gradient of a key's bias is zero but for rounding: every weight of the softmax moves alike.
        assert (gradient - other[name]).norm() <= 1e-3 * other[name].norm() + 1e-6 * largest, name


@pytest.mark.parametrize("variant", ["refined", "two_stage", "plain"])
def test_a_refined_model_keeps_its_class_heads_through_their_files(small, variant, tmp_path):
    """A new model there has one class head under all numbers; what is made of ours has one for each, on disk too."""
    detector = from_transformers(theirs(variant))
    to_transformers(detector).save_pretrained(tmp_path)
    again = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path)
    same_weights(from_transformers(again), detector)
    heads = {head.weight.data_ptr() for head in again.class_embed}
    assert len(heads) == {"refined": 3, "two_stage": 4, "plain": 1}[variant]


@pytest.mark.parametrize("preset", ["detr_r50", "detr_dc5_r50", "deformable_detr_two_stage_r50"])
def test_detectors_of_ours_run_there(small, preset):
    c = {"dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 48, "queries": 6}
    c |= {"weights": None, "mask_padding": False}
    detector = shake(build(configure(preset, classes=["cat", "dog"], category_ids=[17, 18], **c))).eval()
    model = to_transformers(detector)
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.label2id == {"cat": 0, "dog": 1}
    assert model.config.class_cost == detector.model_config.loss.label and model.config.dropout == 0.1
    assert not model.training
    images = three_images()
    with torch.no_grad():
        mine, other = run_ours(detector, images), model(images.pixels, pixel_mask=(~images.mask).long())
    torch.testing.assert_close(mine.logits[-1], other.logits, **CLOSE)
    torch.testing.assert_close(mine.boxes[-1], other.pred_boxes, **CLOSE)
    again = from_transformers(model)
    same_weights(again, detector)
    assert again.model_config.detector == detector.model_config.detector
    assert again.model_config.loss == detector.model_config.loss


def test_a_detector_that_hides_padding_runs_there_for_a_image_alone(small, caplog):
    config = configure("deformable_detr_refined_r50", weights=None, dim=32, heads=4, queries=6, encoder_layers=1)
    detector = shake(build(config, num_classes=CLASSES)).eval()
    model = to_transformers(detector)
    assert "mask_padding=True" in caplog.text
    alone, padded = batch((75, 101), multiple=1), three_images()
    with torch.no_grad():
        torch.testing.assert_close(detector(alone).final.boxes, model(alone.pixels).pred_boxes, **CLOSE)
        other = model(padded.pixels, pixel_mask=(~padded.mask).long())
        assert (detector(padded).final.boxes - other.pred_boxes).abs().max() > 1e-3


def test_the_base_of_a_rego_runs_there(small):
    config = configure(
        "rego_detr_r50", weights=None, dim=32, heads=4, queries=6, mask_padding=False, detector={"encoder_layers": 1}
    )
    model = build(config, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"no REGO.*to_transformers\(detector\.detector\)"):
        to_transformers(model)
    same_weights(from_transformers(to_transformers(model.detector)), model.detector)


@pytest.mark.slow
@pytest.mark.parametrize("variant, parameters", [("detr", 41_524_768), ("two_stage", 41_181_529)])
def test_full_size(variant, parameters):
    labels = {"id2label": {i: str(i) for i in range(91)}}
    model = (
        theirs(variant, sizes=labels, two_stage_num_proposals=50) if variant != "detr" else theirs("detr", sizes=labels)
    )
    detector = from_transformers(model)
    assert sum(w.numel() for w in detector.parameters()) == parameters
    images = batch((128, 160), (160, 96))
    with torch.no_grad():
        mine, other = run_ours(detector, images), run_theirs(model, images, some_targets((2, 1)))
    agree(mine, other, **CLOSE)
    same_weights(to_transformers(detector), model)


REFUSED = [
    ("detr", {"auxiliary_loss": True}, "auxiliary_loss=True and must have False"),
    ("plain", {"position_embedding_type": "learned"}, "position_embedding_type='learned' and must have 'sine'"),
    ("detr", {"activation_function": "gelu"}, "activation_function='gelu'"),
    ("detr", {"encoder_ffn_dim": 40}, "decoder_ffn_dim=48, but must be 40"),
    ("plain", {"decoder_n_points": 2}, "decoder_n_points=2, but must be 4"),
]


@pytest.mark.parametrize("variant, changes, message", REFUSED)
def test_settings_without_a_counterpart_are_named(small, variant, changes, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(theirs(variant, **changes))


BACKBONES = [
    (lambda t: t.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4]), "'resnet18' of timm is not one"),
    (lambda t: t.TimmBackboneConfig(backbone="resnet50", output_stride=8, out_indices=[4]), "output_stride=8"),
    (lambda t: t.TimmBackboneConfig(backbone="resnet50", out_indices=[2, 3]), "reads stage3 of its backbone"),
    (lambda t: t.ResNetConfig(depths=[1, 1, 1, 1]), r"depths=\[1, 1, 1, 1\]"),
    (lambda t: t.ResNetConfig(depths=list(BLOCKS), downsample_in_bottleneck=True), "downsample_in_bottleneck=True"),
    (lambda t: t.ResNetConfig(depths=list(BLOCKS), embedding_size=32), "embedding_size=32"),
    (lambda t: t.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]), "backbone 'convnext' is not one"),
]


@pytest.mark.parametrize("backbone, message", BACKBONES)
def test_backbones_without_a_counterpart_are_named(small, backbone, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(theirs("detr", backbone_config=backbone(transformers), shaken=False))


def test_auxiliary_losses_there_make_another_model(small):
    """Why such a model is refused."""
    model, images = theirs("detr"), three_images()
    answers = []
    for model.config.auxiliary_loss in (False, True):
        with torch.no_grad():
            answers.append(model(images.pixels, pixel_mask=(~images.mask).long()).logits)
    assert (answers[0] - answers[1]).abs().max() > 1e-2


def test_heads_that_differ_where_layers_share_one_are_refused(small):
    model = theirs("plain", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="class_embed.0.weight.*should be the same tensor"):
        from_transformers(model)


def test_other_models_are_named():
    with pytest.raises(ValueError, match="DetrForObjectDetection and Deformable.*this is a Linear"):
        from_transformers(nn.Linear(2, 2))


SMALL = {"weights": None, "dim": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 1, "queries": 4}
NOT_THERE = [
    ("detr_star_r50", {}, {}, "reference_points=True is not supported by transformers"),
    ("detr_r50", {"scoring": "sigmoid"}, {}, "scoring='sigmoid' is not supported by transformers"),
    ("detr_tiny", {}, {}, "backbone 'mobilenet_v2' is not supported by transformers"),
    ("detr_dc5_r50", {}, {"timm": False}, "dilated=True is not supported by transformers' own ResNet"),
    ("detr_r50", {"label": 1.5}, {}, "label=1.5 of the loss is not supported by transformers"),
]


@pytest.mark.parametrize("preset, changes, options, message", NOT_THERE)
def test_detectors_that_transformers_has_not_are_refused(small, preset, changes, options, message):
    detector = build(configure(preset, **(SMALL | {"mask_padding": False} | changes)), num_classes=CLASSES)
    with pytest.raises(ValueError, match=message):
        to_transformers(detector, **options)


def test_a_detector_without_configuration_is_refused():
    with pytest.raises(ValueError, match="make the model with regolite.build"):
        to_transformers(nn.Linear(2, 2))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(module.importlib.sys.modules, "transformers", None)
    detector = build(configure("detr_r50", **(SMALL | {"mask_padding": False})), num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'regolite\[transformers\]'"):
        to_transformers(detector)
