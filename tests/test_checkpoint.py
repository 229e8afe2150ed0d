"""Checkpoints: the same outputs after loading, one clear error for every wrong file, and never half a file."""

import json
import os
import pickle
import re
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import batch, deformable, small, unchecked

from regolite.checkpoint import KEY, read_config, save_model
from regolite.errors import UserError
from regolite.loading import load, load_weights
from regolite.models.backbone import BUNDLED
from regolite.models.rego import Rego
from regolite.utils.files import write_atomic


@pytest.fixture
def saved(tmp_path):
    model = small(classes=("cat", "dog", "emu"), category_ids=(3, 4, 9))
    save_model(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "name, changes",
    [
        ("detr_scenes", {}),
        ("rego_detr_star_scenes", {"alphas": (1.5, 0.5)}),
        ("rego_deformable_detr_scenes", {"form": "released", "detach_hidden": True}),
        ("rego_deformable_detr_two_stage_scenes", {"levels": 4}),
    ],
)
def test_saved_and_loaded_models_give_the_same_outputs(tmp_path, name, changes):
    model = small(name, **changes)
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = load(tmp_path / "model.safetensors")
    assert type(again) is type(model) and not again.training
    assert again.model_config == model.model_config
    images = batch((64, 64), (96, 50))
    with torch.no_grad():
        one, other = model(images), again(images)
    assert len(one.by_stage) == len(other.by_stage)
    for mine, theirs in zip([*one.layers, *one.by_stage], [*other.layers, *other.by_stage]):
        assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.boxes, theirs.boxes)


def test_a_checkpoint_needs_no_weights_of_the_backbone(tmp_path, monkeypatch):
    """The file holds them all: it loads on a machine without network and without the bundled file."""
    model = small("detr_tiny", backbone="mobilenet_v2", weights="bundled")
    save_model(model, tmp_path / "model.safetensors")
    monkeypatch.setitem(BUNDLED, "bundled", tmp_path / "nowhere.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert read_config(tmp_path / "model.safetensors").detector.weights == "bundled"


def test_the_file_is_safetensors_and_says_what_it_is(saved):
    model, path = saved
    stored = load_file(path)
    assert stored.keys() == model.state_dict().keys()
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[KEY])
    assert (config["preset"], config["kind"]) == ("rego_deformable_detr_refined_scenes", "deformable_detr")
    assert config["classes"] == ["cat", "dog", "emu"] and config["rego"]["stages"] == 2
    assert read_config(path) == model.model_config


def test_the_same_weights_give_the_same_bytes(saved, tmp_path):
    model, path = saved
    save_model(model, tmp_path / "again.safetensors")
    save_model(load(path), tmp_path / "loaded.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert path.read_bytes() == (tmp_path / "loaded.safetensors").read_bytes()


def test_paths_may_be_text_and_folders_are_made(tmp_path):
    save_model(small(), str(tmp_path / "a" / "b" / "model.safetensors"))
    assert load(str(tmp_path / "a" / "b" / "model.safetensors")) is not None


# Wrong files


class Spy:
    """An object whose unpickling would leave a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_no_checkpoints(saved, tmp_path):
    _, path = saved
    files = tmp_path / "wrong"
    files.mkdir()
    whole = path.read_bytes()
    (files / "empty.safetensors").write_bytes(b"")
    (files / "text.safetensors").write_text("hello, this is no checkpoint at all")
    (files / "cut_header.safetensors").write_bytes(whole[:200])
    (files / "cut_weights.safetensors").write_bytes(whole[:-1000])
    (files / "longer.safetensors").write_bytes(whole + b"more")
    (files / "pickle.safetensors").write_bytes(pickle.dumps(Spy(tmp_path / "trace")))
    torch.save({"weight": torch.zeros(2)}, files / "torch.pth")
    (files / "folder.safetensors").mkdir()
    for wrong in [*sorted(files.iterdir()), files / "missing.safetensors"]:
        for read in (load, read_config):
            with pytest.raises(UserError) as caught:
                read(wrong)
            assert str(wrong) in str(caught.value) and "\n" not in str(caught.value), wrong.name
    assert not (tmp_path / "trace").exists()


def test_weights_of_others_are_sent_to_their_reader(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "theirs.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "tagged.safetensors", metadata={"format": "pt"})
    for name in ("theirs.safetensors", "tagged.safetensors"):
        with pytest.raises(UserError, match=f"{name} holds no published detector .* it begins with weight"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "stored",
    [
        "no json",
        "null",
        "[]",
        "{}",
        '{"kind": "yolo"}',
        '{"kind": "detr", "preset": "x", "detector": {"wings": 2}, "rego": null, "loss": {}}',
        '{"kind": "detr", "preset": "x", "detector": 3, "rego": null, "loss": {}}',
        '{"kind": "detr", "preset": "x", "detector": {}, "rego": {"stages": 0}, "loss": {}}',
    ],
)
def test_configurations_that_cannot_be_read(tmp_path, stored):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={KEY: stored})
    with pytest.raises(UserError, match=r"other\.safetensors was written by another version"):
        load(tmp_path / "other.safetensors")


def rewrite(path, change):
    """The same checkpoint with other weights."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata)


def test_weights_that_do_not_fit_are_named(saved):
    model, path = saved
    rewrite(path, lambda state: (state.pop("stages.0.class_head.bias"), state.update(wings=torch.zeros(2))))
    with pytest.raises(
        UserError, match=r"1 weights are missing \(stages\.0\.class_head\.bias\), 1 are unknown \(wings\)"
    ):
        load(path)


def test_shapes_that_do_not_fit_are_named(saved):
    model, path = saved
    rewrite(path, lambda state: state.update({"stages.0.class_head.bias": torch.zeros(9)}))
    with pytest.raises(UserError, match=r"stages\.0\.class_head\.bias is \(9,\) there and \(3,\) here"):
        load(path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # none of it was loaded


def test_another_model_is_refused(saved):
    _, path = saved
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(small("detr_scenes"), path)
    with pytest.raises(UserError, match="does not fit the model: .*another number of classes"):
        load_weights(small(num_classes=4), path)


def test_other_classes_keep_the_models_own_class_heads(saved):
    first, path = saved
    model = small(num_classes=4)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_weights(model, path, new_classes=True)
    assert kept and all("class_head" in key for key in kept)
    stored = first.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key in kept else stored[key]), key
    assert {key for key in own if own[key].shape != stored[key].shape} <= set(kept)
    same = small(classes=("cat", "dog", "emu"), category_ids=(3, 4, 9))
    assert load_weights(same, path, new_classes=True) == [], "the same classes are loaded whole"


@pytest.mark.parametrize(
    "name", ["rego_detr_scenes", "rego_deformable_detr_scenes", "deformable_detr_two_stage_scenes"]
)
def test_rows_of_classes_that_both_name_are_taken_over(name, tmp_path):
    """Columns are COCO's ids in one head and classes in another: rows move by their names."""
    first = small(name, classes=("cat", "N/A", "dog", "3"), num_classes=4)
    save_model(first, tmp_path / "model.safetensors")
    model = small(name, classes=("3", "dog", "emu", "cat", "N/A"), num_classes=5)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_weights(model, tmp_path / "model.safetensors", new_classes=True)
    stored, now = first.state_dict(), model.state_dict()
    heads = [key for key in own if "class_head" in key]
    assert kept == [key for key in heads if "proposals" not in key] and len(heads) >= 2
    for key in set(own) - set(heads):
        assert torch.equal(now[key], stored[key]), key
    for key in heads:
        if "proposals" in key:
            assert torch.equal(now[key][0], stored[key][0]), "the proposals' only class is 'object'"
            continue
        assert torch.equal(now[key][1], stored[key][2]) and torch.equal(now[key][3], stored[key][0]), key
        assert torch.equal(now[key][[0, 2, 4]], own[key][[0, 2, 4]]), key
        if len(own[key]) == 6:
            assert torch.equal(now[key][5], stored[key][4]), "no object"


def test_proposals_of_classes_and_noised_queries_are_taken_over_by_name(tmp_path):
    fast = {"token_queries": True, "denoising": True}
    first = small("deformable_detr_two_stage_scenes", classes=("cat", "dog"), num_classes=2, **fast)
    save_model(first, tmp_path / "model.safetensors")
    model = small("deformable_detr_two_stage_scenes", classes=("dog", "emu", "cat"), num_classes=3, **fast)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_weights(model, tmp_path / "model.safetensors", new_classes=True)
    stored, now = first.state_dict(), model.state_dict()
    rows = [key for key in own if own[key].shape != stored[key].shape]
    assert kept == rows and any("proposals" in key for key in rows) and any("noised" in key for key in rows)
    for key in rows:
        assert torch.equal(now[key][[0, 2]], stored[key][[1, 0]]) and torch.equal(now[key][1], own[key][1]), key


def test_a_base_detectors_checkpoint_lets_rego_start_anew(tmp_path):
    base, model = small("deformable_detr_scenes"), small("rego_deformable_detr_scenes")
    save_model(base, tmp_path / "base.safetensors")
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(model, tmp_path / "base.safetensors")
    kept = load_weights(model, tmp_path / "base.safetensors", new_stages=True)
    assert sorted(kept) == sorted(key for key in own if not key.startswith("detector."))
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items() if key in kept)
    images = batch((40, 64), (64, 48))
    with torch.no_grad():
        assert torch.equal(model.eval()(images, stages=0).final.boxes, base.eval()(images).final.boxes)
    with pytest.raises(UserError, match="does not fit the model"):  # a REGO's, for the base alone
        save_model(model, tmp_path / "rego.safetensors")
        load_weights(base, tmp_path / "rego.safetensors", new_stages=True)


def test_rego_put_on_a_detector_by_hand(tmp_path):
    """On a detector of regolite.build it is saved and loaded as a whole; a stranger's configuration is unknown."""
    model = Rego(small("deformable_detr_scenes"), stages=1, ffn_dim=32).eval()
    save_model(model, tmp_path / "model.safetensors")
    again, images = load(tmp_path / "model.safetensors"), batch((64, 64))
    with torch.no_grad():
        assert torch.equal(again(images).final.boxes, model(images).final.boxes)

    stranger = Rego(deformable(), stages=1, ffn_dim=32)
    with pytest.raises(UserError, match=r"regolite\.build"):
        save_model(stranger, tmp_path / "stranger.safetensors")
    assert not (tmp_path / "stranger.safetensors").exists()


# Files that anybody may have written


def forge(path, change, target="forged.safetensors"):
    """The same checkpoint with another configuration."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[KEY])
    change(config)
    save_file(load_file(path), path.with_name(target), metadata={KEY: json.dumps(config)})
    return path.with_name(target)


def put(*place, value):
    """Set a value somewhere in a configuration."""

    def change(config):
        for name in place[:-1]:
            config = config[name]
        config[place[-1]] = value

    return change


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("detector", "encoder_layers"), 10**6, "encoder_layers=1000000 must be at most 100"),
        (("detector", "decoder_layers"), 10**6, "decoder_layers=1000000 must be at most 100"),
        (("detector", "queries"), 10**6, "queries=1000000 must be at most 10000"),
        (("detector", "points"), 10**6, "points=1000000 must be at most 64"),
        (("detector", "dim"), 2**40, "dim=1099511627776 must be at most 4096"),
        (("detector", "dim"), -32, "dim=-32 must be at least 1"),
        (("detector", "queries"), 5.5, "queries=5.5 is not a whole number"),
        (("detector", "queries"), [5], "queries=(5,) is not a whole number"),
        (("detector", "queries"), None, "queries=None is not a whole number"),
        (("detector", "dropout"), float("nan"), "dropout=nan is not a number"),
        (("detector", "backbone"), ["tiny"], "backbone=('tiny',) is not a text"),
        (("detector",), [], "detector=[] is not a DeformableDetrConfig"),
        (("detector", "wings"), 2, "unknown parameter 'wings'"),
        (("rego", "stages"), 10**6, "stages=1000000 must be at most 20"),
        (("rego", "alphas"), [1.0, -1.0], "alphas=(1.0, -1.0) must not be negative"),
        (("rego",), "yes", "rego='yes' is not a RegoConfig"),
        (("loss", "label"), "much", "label='much' is not a number"),
        (("loss",), None, "loss=None is not a LossConfig"),
        (("kind",), ["detr"], "kind=['detr'] is not one of "),
        (("preset",), {}, "preset={} is not a text"),
        (("image_size",), 10**9, "image_size=1000000000 must be at most 10000"),
        (("classes",), [["cat"], ["dog"], ["emu"]], "is not a list of texts"),
        (("classes",), {"cat": 1}, "classes={'cat': 1} is not a list of texts"),
        (("classes",), "cat", "classes='cat' is not a list of texts"),
        (("classes",), ["a"] * 200_000, "num_classes=200000 must be at most 100000"),
        (("category_ids",), ["3", "4", "9"], "is not a list of whole numbers"),
        (("category_ids",), [3, 4, 3], "must be unique and below 2**63"),
        (("category_ids",), [3, 4, 10**30], "must be unique and below 2**63"),
        (("category_ids",), [3, 4], "3 classes need as many category_ids, not 2"),
    ],
)
def test_a_forged_configuration_is_refused_by_the_name_of_its_field(saved, place, value, said):
    forged = forge(saved[1], put(*place, value=value))
    with unchecked():
        for read in (load, read_config):
            with pytest.raises(UserError) as caught:
                read(forged)
            message = str(caught.value)
            assert said in message and str(forged) in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("stored", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_without_end(tmp_path, stored):
    save_file({"weight": torch.zeros(2)}, tmp_path / "deep.safetensors", metadata={KEY: stored})
    with pytest.raises(UserError, match=r"deep\.safetensors was written by another version"):
        load(tmp_path / "deep.safetensors")


def test_shapes_are_compared_before_memory_is_taken(saved):
    """Every value is within its bounds, and the model would have 12 GB."""
    large = {"dim": 4096, "heads": 8, "ffn_dim": 65_536, "encoder_layers": 4, "queries": 10_000}
    forged = forge(saved[1], lambda config: config["detector"].update(large))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"does not fit the model: .* weights are missing"):
        load(forged)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 200 * 1024, "kilobytes"


def test_a_configuration_of_transformers_is_bounded(tmp_path):
    pytest.importorskip("transformers")
    for described, said in (
        ({"encoder_layers": 10**6}, "encoder_layers=1000000 must be at most 100"),
        ({"backbone_config": {"depths": [1, 10**9]}}, "depths=1000000000 must be at most 100"),
        ({"d_model": 10**9}, "d_model=1000000000 must be at most 100000"),
        ([], "no JSON object"),
        ("[" * 100_000, "cannot be used"),
        ({"backbone_config": 5}, "can't build this detr"),
    ):
        text = described if isinstance(described, str) else json.dumps(described)
        config = {
            "preset": "transformers:detr", "kind": "transformers", "rego": None, "loss": {}, "classes": ["a"],
            "detector": {"model_type": "detr", "json": text},
        }  # fmt: skip
        path = tmp_path / "theirs.safetensors"
        save_file({"weight": torch.zeros(2)}, path, metadata={KEY: json.dumps(config)})
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            load(path)
        assert "\n" not in str(caught.value)


# Whole or not at all


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(saved, tmp_path, monkeypatch, where):
    model, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        next(model.parameters()).add_(1)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]  # and nothing beside it
    save_model(model, path)
    assert path.read_bytes() != before


def test_write_atomic_replaces(tmp_path):
    write_atomic(tmp_path / "new" / "file", b"one")
    write_atomic(tmp_path / "new" / "file", b"two")
    assert (tmp_path / "new" / "file").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]
