"""Published weights: the same model after the way there and back, the authors' names, and every wrong file in words."""

import argparse
import hashlib
import logging
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import batch, shake, unchecked

import regolite
from regolite import interop
from regolite.checkpoint import save_model
from regolite.errors import UserError
from regolite.loading import load_weights
from regolite.models.presets import build, configure

SMALL = {
    "backbone": "resnet50", "weights": None, "dim": 32, "heads": 4, "detector.encoder_layers": 1,
    "detector.decoder_layers": 2, "detector.ffn_dim": 48, "detector.dropout": 0.05, "queries": 7, "mask_padding": False,
}  # fmt: skip
SINGLE = {"levels": 1, "backbone_stages": (5,)}
REGO = {"dim": 256, "form": "released", "rego.ffn_dim": 48, "rego.dropout": 0.05}
MODELS = {
    "detr": ("detr_r50", {}),
    "detr_dc5": ("detr_dc5_r50", {}),
    "up_detr": ("up_detr_r50", {}),
    "single_scale": ("deformable_detr_r50", SINGLE),
    "single_scale_dc5": ("deformable_detr_r50", SINGLE | {"dilated": True}),
    "multi_scale": ("deformable_detr_r50", {"points": 2}),
    "refined": ("deformable_detr_refined_r50", {"levels": 3}),
    "two_stage": ("deformable_detr_two_stage_r50", {"dim": 256, "levels": 3}),
    "rego": ("rego_deformable_detr_r50", REGO),
    "rego_refined": ("rego_deformable_detr_refined_r50", REGO),
    "rego_two_stage": ("rego_deformable_detr_two_stage_r50", REGO),
}


@pytest.fixture(autouse=True)
def slim_resnet(monkeypatch):
    """Let ResNet-50 have one block a stage, and few channels inside of it."""
    block = torchvision.models.resnet.Bottleneck
    monkeypatch.setattr(
        torchvision.models, "resnet50", partial(torchvision.models.ResNet, block, [1, 1, 1, 1], width_per_group=4)
    )


def small(name, num_classes=91, **changes):
    preset, own = MODELS[name]
    return shake(build(preset, num_classes, **(SMALL | own | changes))).eval()


def same(one, other):
    """Whether two models hold the same weights and say the same of a padded batch."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    images = batch((64, 96), (50, 64), multiple=1)
    with torch.no_grad():
        mine, theirs = one(images), other(images)
    pairs = [(mine.layers, theirs.layers), *zip(mine.stages, theirs.stages, strict=True)]
    for a, b in [pair for layers in pairs for pair in zip(*layers, strict=True)]:
        assert torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes)
    return True


# There and back


@pytest.mark.parametrize("name", MODELS)
def test_the_way_there_and_back(name, tmp_path):
    model, file = small(name), tmp_path / ("model.pth" if "re" in name else "model.safetensors")
    interop.save(model, file)
    again = interop.load(file)
    assert not again.training and same(model, again)
    one, other = model.model_config, again.model_config
    for part in ("preset", "detector", "rego", "loss", "augment", "image_size"):
        assert getattr(one, part) == getattr(other, part), part


@pytest.mark.parametrize("name", ["detr_dc5", "single_scale_dc5", "multi_scale", "two_stage"])
def test_a_bare_state_dict_needs_the_heads_and_dilation_alone(name):
    model = small(name)
    d = model.model_config.detector
    told = {"heads": d.heads, "dilated": d.dilated} | ({"queries": d.queries} if name.endswith("two_stage") else {})
    again = interop.load(interop.state_dict(model), **told)
    assert same(model, again)
    assert replace(again.model_config.detector, dropout=d.dropout) == d
    assert again.model_config.preset == model.model_config.preset


# Number of names, and a digest of all names and shapes, of the state dicts of the authors' own models.
THEIRS = {
    "detr_r50": (458, "01f0ab8e837e85ae"),
    "detr_r101": (713, "e7bf88cbb1e5dd97"),
    "detr_dc5_r50": (458, "01f0ab8e837e85ae"),
    "detr_dc5_r101": (713, "e7bf88cbb1e5dd97"),
    "single_scale": (549, "e07ea3984d1a9256"),
    "deformable_detr_r50": (561, "6c9d8c8328464e3f"),
    "deformable_detr_refined_r50": (597, "158c54dc580cea97"),
    "deformable_detr_two_stage_r50": (630, "0c958c56061c1909"),
    "deformable_detr_r101": (816, "1eb7ffa798b492db"),
    "rego_deformable_detr_r50": (830, "c4abf74896d85d21"),
    "rego_deformable_detr_refined_r50": (866, "bf56cf04336ff837"),
    "rego_deformable_detr_two_stage_r50": (899, "512915344bb1bb59"),
    "rego_deformable_detr_r101": (1085, "b033bd75494da755"),
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_names_and_shapes_are_the_authors_own(name, monkeypatch):
    monkeypatch.undo()  # ResNets of full depth
    preset, changes = ("deformable_detr_r50", SINGLE) if name == "single_scale" else (name, {})
    changes |= {"form": "released"} if name.startswith("rego_") else {}
    with torch.device("meta"):
        theirs = interop.state_dict(build(preset, 91, weights=None, **changes))
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in theirs.items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == THEIRS[name]


def test_their_lists_of_heads_hold_one_and_the_same():
    """Without refinement all layers share a pair of heads, which a state dict there lists for each of them."""
    theirs = interop.state_dict(small("rego"))
    for first, second in [
        ("class_embed.0.weight", "class_embed.1.weight"),
        ("bbox_embed.0.layers.2.bias", "bbox_embed.1.layers.2.bias"),
        ("rego_class_embed_1.0.weight", "rego_class_embed_1.1.weight"),
    ]:
        assert torch.equal(theirs[first], theirs[second])
        assert theirs[first].data_ptr() != theirs[second].data_ptr()  # safetensors refuses shared memory
    theirs["rego_class_embed_1.1.weight"] = theirs["rego_class_embed_1.1.weight"] + 1
    with pytest.raises(UserError, match=r"rego_class_embed_1\.1\.weight should be the same tensor"):
        interop.load(theirs, heads=4)


# What is recognized


def test_the_columns_are_cocos_ids():
    config = interop.load(interop.state_dict(small("detr")), heads=4).model_config
    assert len(config.classes) == 91 and config.category_ids == tuple(range(91))
    assert [config.classes[i] for i in (0, 1, 12, 17, 90)] == ["N/A", "person", "N/A", "cat", "toothbrush"]


def test_other_columns_have_numbers_or_given_names():
    theirs = interop.state_dict(small("refined", num_classes=3))
    config = interop.load(theirs, heads=4).model_config
    assert (config.classes, config.category_ids) == (("0", "1", "2"), (0, 1, 2))
    config = interop.load(theirs, heads=4, classes=("cat", "dog", "emu"), category_ids=(3, 4, 9)).model_config
    assert (config.classes, config.category_ids) == (("cat", "dog", "emu"), (3, 4, 9))


@pytest.mark.parametrize(
    "backbone, preset",
    [
        ("resnet50", "detr_r50"),
        ("resnet101", "detr_r101"),
        ("resnext101_32x8d", "detr_x101"),
        ("resnext101_64x4d", "detr_x101"),
    ],
)
def test_the_backbone_is_known_by_its_blocks(backbone, preset, monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        theirs = interop.state_dict(build("detr_r50", 91, **(SMALL | {"backbone": backbone})))
        config = interop.detr.describe(interop.Weights(theirs))[2]
    assert config["backbone"] == backbone
    assert interop._preset("detr", config) == preset


def test_what_is_given_wins_over_what_is_recognized():
    theirs = interop.state_dict(small("two_stage"))
    model = interop.load(theirs, heads=4, queries=5, image_size=320, base_label=0.5, dilated=True)
    config = model.model_config
    assert (config.detector.queries, config.image_size, config.loss.base_label) == (5, 320, 0.5)
    assert config.detector.dilated
    with pytest.raises(UserError, match="no field 'quieries'; did you mean 'queries'"):
        interop.load(theirs, quieries=5)


def training_checkpoint(model, **options):
    """What the authors' training scripts write."""
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 40)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return {
        "model": interop.state_dict(model), "optimizer": optimizer.state_dict(), "epoch": 49,
        "lr_scheduler": scheduler.state_dict(), "args": argparse.Namespace(lr_backbone_names=["backbone.0"], **options),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_training_checkpoints_bring_their_options(zipped, tmp_path):
    model = small("single_scale_dc5")
    checkpoint = training_checkpoint(model, nheads=4, dilation=True, dropout=0.05, num_queries=99)
    torch.save(checkpoint, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    again = interop.load(tmp_path / "checkpoint.pth")
    assert same(model, again)
    assert again.model_config.detector == model.model_config.detector  # 7 queries, whatever the options say


def test_options_that_are_none():
    theirs = {"model": interop.state_dict(small("detr")), "args": {"nheads": "many"}}
    with unchecked(), pytest.raises(UserError, match="heads='many' is not a whole number"):
        interop.load(theirs)
    assert interop.load(theirs | {"args": None}, heads=4).heads == 4


def test_a_saved_file_holds_the_options_of_their_scripts(tmp_path):
    interop.save(small("rego_two_stage"), tmp_path / "model.pth")
    stored = torch.load(tmp_path / "model.pth", weights_only=True)
    assert stored["args"] == {
        "backbone": "resnet50", "dilation": False, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 48,
        "hidden_dim": 256, "dropout": 0.05, "nheads": 4, "num_queries": 7, "num_feature_levels": 4, "enc_n_points": 4,
        "dec_n_points": 4, "with_box_refine": True, "two_stage": True, "use_rego": True,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_prefixes_and_counters_that_training_leaves_are_no_weights():
    model = small("detr")
    theirs = {f"module.{key}": value for key, value in interop.state_dict(model).items()}
    theirs |= {"module.backbone.0.body.bn1.num_batches_tracked": torch.tensor(1), "module.total_ops": torch.zeros(1)}
    assert same(model, interop.load(theirs, heads=4))


# Class heads


def test_pre_trained_weights_of_up_detr_start_a_training():
    """Their class head is of patches, and the layers of the pretext task have no place in a detector."""
    model = small("up_detr", num_classes=2)
    theirs = interop.state_dict(model) | {
        "patch2query.weight": torch.zeros(32, 16),
        "patch2query.bias": torch.zeros(32),
    }
    theirs |= {f"feature_align.layers.{i}.{kind}": torch.zeros(2) for i in range(2) for kind in ("weight", "bias")}
    again = interop.load(theirs, num_classes=4, heads=4)
    assert again.num_logits == 5 and again.model_config.preset == "up_detr_r50"
    mine, others = model.state_dict(), again.state_dict()
    assert mine.keys() == others.keys()
    assert {key for key in mine if not torch.equal(mine[key], others[key])} == {"class_head.weight", "class_head.bias"}


@pytest.mark.parametrize("name, count", [("detr", 1), ("multi_scale", 1), ("rego_two_stage", 6)])
def test_class_heads_of_another_number_are_new_and_said(name, count, caplog):
    model = small(name)
    theirs = interop.state_dict(model)
    with caplog.at_level(logging.WARNING, logger="regolite"):
        again = interop.load(theirs, num_classes=3, heads=4, queries=7)
    [line] = caplog.messages
    assert f"{count} class heads for 91 classes are replaced by new ones for 3: " in line
    mine, others = model.state_dict(), again.state_dict()
    fresh = {key for key in mine if not torch.equal(mine[key], others[key])}
    assert len(fresh) == 2 * count and all("class_head" in key for key in fresh)
    biases = [others[key] for key in fresh if key.endswith("bias")]
    if name == "detr":
        assert biases[0].shape == (4,)
    else:  # every class has the prior probability of 0.01
        assert all(bias.shape == (3,) and torch.allclose(bias.sigmoid(), torch.tensor(0.01)) for bias in biases)
    assert again.model_config.classes == ("0", "1", "2")


def test_class_heads_of_the_same_number_stay(caplog):
    model = small("refined", num_classes=3)
    assert same(model, interop.load(interop.state_dict(model), num_classes=3, heads=4))
    assert not caplog.messages


# Files that are wrong


class Spy:
    """An object whose unpickling would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(source, match, **fields):
    """The one sentence that a file is refused with."""
    with pytest.raises(UserError, match=match) as caught:
        interop.load(source, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("place", ["model", "args", "beside", "all"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code(place, zipped, tmp_path):
    spy, path = Spy(tmp_path / "trace"), tmp_path / "bad.pth"
    checkpoint = {"model": {"weight": torch.zeros(2)}, "args": argparse.Namespace()}
    wrong = {
        "model": checkpoint | {"model": {"weight": spy}},
        "args": checkpoint | {"args": argparse.Namespace(nheads=spy)},
        "beside": checkpoint | {"epoch": spy},
        "all": spy,
    }
    torch.save(wrong[place], path, _use_new_zipfile_serialization=zipped)
    said = refused(path, r"bad\.pth holds more than weights, and reading \S+\.open from it could run code")
    assert "save its state dict only" in said
    path.write_bytes(pickle.dumps(wrong[place]))
    refused(path, r"bad\.pth")
    assert not (tmp_path / "trace").exists()


def test_a_damaged_file(tmp_path):
    for name in ("whole.pth", "whole.safetensors"):
        interop.save(small("detr"), tmp_path / name)
    whole, other = ((tmp_path / name).read_bytes() for name in ("whole.pth", "whole.safetensors"))
    files = {
        "cut.pth": whole[: len(whole) // 2],
        "end.pth": whole[:-100],
        "text.pth": b"<html>404: not found</html>",
        "cut.safetensors": other[:-1000],
        "text.safetensors": b"<html>404: not found</html>",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, rf"{name} is (damaged or not a PyTorch|not a readable safetensors) file .* again")
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        refused(tmp_path / name, rf"{name} is empty; copy it again")
    refused(tmp_path / "nowhere.pth", r"no weights at .*nowhere\.pth; give a \.pth or \.safetensors file")
    refused(tmp_path, "no weights at")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"model": {"a": 1}}, {3: torch.zeros(1)}, torch.zeros(2)])
def test_a_file_without_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "list.pth")
    refused(tmp_path / "list.pth", r"list\.pth holds no state dict, .*; save model\.state_dict\(\)")


def test_weights_of_another_model(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    refused(tmp_path / "resnet.pth", r"resnet\.pth holds no published detector .* it is a ResNet: .*weights=FILE")
    save_file({"model.backbone.model.conv1.weight": torch.zeros(1)}, tmp_path / "hf.safetensors")
    refused(tmp_path / "hf.safetensors", r"hf\.safetensors holds no .* give it to regolite\.interop\.from_transfor")
    save_model(small("detr"), tmp_path / "ours.safetensors")
    refused(tmp_path / "ours.safetensors", r"a checkpoint of a run of regolite, which regolite\.load reads")
    refused({"stem.weight": torch.zeros(1)}, r"the state dict holds no published .* it begins with stem\.weight")


def test_weights_that_do_not_fit_are_named(tmp_path):
    theirs = interop.state_dict(small("detr"))
    del theirs["class_embed.weight"], theirs["backbone.0.body.conv1.weight"]
    theirs |= {"wings.weight": torch.zeros(2), "input_proj.bias": torch.zeros(9)}
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    said = refused(tmp_path / "theirs.pth", r"theirs\.pth does not fit the model: 2 missing", heads=4)
    for part in ("backbone.0.body.conv1.weight", "class_embed.weight", "1 unknown (wings.weight)"):
        assert part in said
    assert "1 misshaped (input_proj.bias is (9,) and should be (32,))" in said


@pytest.mark.parametrize(
    "name, key",
    [("detr", "query_embed.weight"), ("refined", "transformer.level_embed"), ("rego", "class_embed.0.bias")],
)
def test_a_weight_that_tells_the_size_is_missed_by_name(name, key):
    theirs = interop.state_dict(small(name))
    del theirs[key]
    refused(theirs, f"the state dict misses {key}; give the whole state dict")


def test_a_strange_backbone():
    theirs = interop.state_dict(small("detr"))
    theirs = {key.replace("body.layer", "body.stage"): value for key, value in theirs.items()}
    refused(theirs, "has a backbone that regolite lacks; it knows tiny, mobilenet_v2, resnet50")


def test_the_form_can_be_asked_for():
    theirs = interop.state_dict(small("refined"))
    assert interop.load(theirs, form="deformable_detr", heads=4) is not None
    refused(theirs, "has the form 'deformable_detr' and not 'rego'", form="rego")
    refused(theirs, "unknown form 'yolo'; choose one of .*detr, deformable_detr, rego", form="yolo")


# Models that published code does not have


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("detr_star_r50", {}),
        ("detr_scenes", {"backbone": "tiny"}),
        ("deformable_detr_r50", {"backbone_stages": (4, 5)}),
        ("deformable_detr_two_stage_r50", {}),  # 32 channels: proposals have 128 waves for each number of a box there
        ("rego_detr_r50", {"form": "released"}),
        ("rego_deformable_detr_r50", {"dim": 256}),  # the paper's form
        ("rego_deformable_detr_r50", REGO | {"stages": 2}),
        ("rego_deformable_detr_r50", REGO | {"alphas": (2.0, 2.0, 2.0)}),
        ("rego_deformable_detr_r50", REGO | {"rego.ffn_dim": 64}),
    ],
)
def test_the_way_back_of_models_that_are_not_there(preset, changes, tmp_path):
    with torch.device("meta"):
        model = build(preset, 3, **(SMALL | changes))
    with pytest.raises(UserError, match=f"{preset}, as configured, can't run in published code, which has "):
        interop.save(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


def test_the_way_back_needs_a_configuration_and_a_name(tmp_path):
    with torch.device("meta"):
        baseline = build("fcos_r50", weights=None)
    with pytest.raises(UserError, match="fcos_r50, as configured, can't run in published code$"):
        interop.state_dict(baseline)
    with pytest.raises(UserError, match=r"make the model with regolite\.build"):
        interop.state_dict(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"model\.onnx: give a name that ends in \.pth or \.safetensors"):
        interop.save(small("detr"), tmp_path / "model.onnx")


# In the rest of the package


def test_published_files_load_like_checkpoints(tmp_path):
    """`regolite detect` and `regolite evaluate` take them; save_model keeps them."""
    model = small("refined")
    interop.save(model, tmp_path / "theirs.pth")
    again = regolite.load(tmp_path / "theirs.pth")
    assert same(model, again)
    again.model_config = replace(again.model_config, image_size=64)
    [found] = regolite.detect(again, Image.new("RGB", (64, 48), "teal"), threshold=0.0, top_k=5)
    assert len(found) == 5 and found.labels.max() < len(again.model_config.classes)
    save_model(again, tmp_path / "ours.safetensors")
    assert same(model, regolite.load(tmp_path / "ours.safetensors"))


def test_training_starts_from_published_files(tmp_path):
    """`regolite train --checkpoint`: the classes are others, so the class heads start anew; the rest is theirs."""
    theirs = small("refined")
    interop.save(theirs, tmp_path / "theirs.safetensors")
    model = small("refined", num_classes=4)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_weights(model, tmp_path / "theirs.safetensors", new_classes=True)
    assert kept and all("class_head" in key for key in kept)
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key in kept else theirs.state_dict()[key]), key
    with pytest.raises(UserError, match="does not fit the model: .*another number of classes"):
        load_weights(model, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(small("multi_scale"), tmp_path / "theirs.safetensors", new_classes=True)


def test_the_files_hold_what_safetensors_can_share(tmp_path):
    """Nothing of a saved file depends on the model: its tensors are copies."""
    model = small("detr")
    interop.save(model, tmp_path / "model.safetensors")
    before = load_file(tmp_path / "model.safetensors")
    theirs = interop.state_dict(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert all(torch.equal(theirs[key], value) for key, value in before.items())


def test_the_released_form_is_what_a_preset_makes_of_it():
    config = configure("rego_deformable_detr_r50", form="released")
    assert interop.rego.holds(config) and not interop.rego.holds(configure("rego_deformable_detr_r50"))
