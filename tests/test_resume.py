"""Resuming: the same run goes on, or one error names what differs; what may change is listed and logged."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from small_runs import SMALL

from regolite import RunConfig, UserError, train
from regolite.data import Scenes, open_data
from regolite.training import loop
from regolite.training.resume import MAY_CHANGE, OF_MODEL, fingerprint

CONFIG = RunConfig(
    model="rego_deformable_detr_scenes",
    overrides=SMALL,
    image_size=64,
    batch_size=2,
    epochs=2,
    lr=1e-3,
    schedule="constant",
    evaluate_every=0,
    log_every=1,
    device="cpu",
)


@pytest.fixture(autouse=True)
def without_images(monkeypatch):
    """Neither figures nor AP matter here."""
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
    monkeypatch.setattr(loop, "_evaluate", lambda *args: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Data of four images, and a run on them: two epochs of two steps."""
    place = tmp_path_factory.mktemp("finished")
    Scenes(4, size=64).write(place / "data")
    Scenes(2, size=64, split="val").write(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
        patch.setattr(loop, "_evaluate", lambda *args: None)
        train(replace(CONFIG, data=str(place / "data"), output=str(place / "run")))
    return place


@pytest.fixture
def config(finished, tmp_path):
    """Makes the configuration that resumes a copy of that run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)

    def make(**changes):
        # `data` is the original's, and not that of the copy
        return replace(
            CONFIG, **{"data": str(finished / "data"), "output": str(tmp_path / "run"), **changes}, resume=True
        )

    return make


def contents(folder):
    """All files of a run but its log, and their bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".log"}


def log(plan):
    return (Path(plan.output) / "train.log").read_text()


def edit(folder, change, split="train"):
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(plan):
    """The message of a refusal that has left the run as it was."""
    before = contents(plan.output)
    with pytest.raises(UserError) as error:
        train(plan)
    assert contents(plan.output) == before
    message = str(error.value)
    assert message.startswith(f"{plan.output} holds a run ") and "\n" not in message
    assert "give another output folder" in message
    return message


def override(old, new):
    return {"overrides": tuple(new if one == old else one for one in SMALL) + (() if old else (new,))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "(seed=0, now 1)"),
        ({"batch_size": 4}, "(batch_size=2, now 4)"),
        ({"epochs": 1}, "(epochs=2, now 1)"),
        ({"ema": 0.9}, "(ema=0.0, now 0.9)"),
        ({"optimizer": "sgd"}, "(optimizer='adamw', now 'sgd')"),
        ({"weight_decay": 0.0}, "(weight_decay=0.0001, now 0.0)"),
        ({"backbone_lr_mult": 1.0}, "(backbone_lr_mult=0.1, now 1.0)"),
        ({"sampling_lr_mult": 1.0}, "(sampling_lr_mult=0.1, now 1.0)"),
        ({"clip": 0.0}, "(clip=0.1, now 0.0)"),
        ({"schedule": "one_cycle"}, "(schedule='constant', now 'one_cycle')"),
        ({"drop_epochs": (1, 2)}, "(drop_epochs=[40], now [1, 2])"),
        ({"warmup": 0.1}, "(warmup=0.0, now 0.1)"),
        ({"copy_paste": 0.5}, "(copy_paste=0.0, now 0.5)"),
        ({"limit_images": 3}, "(limit_images=None, now 3, train annotations='4 images, "),
        ({"image_size": 96}, "(image_size=64, now 96)"),
        ({"augment": "none"}, "(augment='laptop', now 'none')"),
        ({"model": "deformable_detr_scenes", "overrides": SMALL[:6]}, "(model='rego_deformable_detr_scenes', now 'def"),
        (override("detector.dropout=0.1", "detector.dropout=0.0"), "(detector.dropout=0.1, now 0.0)"),
        (override("queries=8", "queries=9"), "(detector.queries=8, now 9)"),
        (override("stages=2", "stages=1"), "rego.stages=2, now 1"),
        (override("", "alphas=1.5,1.0"), "rego.alphas="),
        ({"seed": 1, "ema": 0.9}, "(ema=0.0, now 0.9, seed=0, now 1)"),
    ],
)  # fmt: skip
def test_another_configuration_is_refused_by_name(config, monkeypatch, changes, said):
    monkeypatch.setattr(loop, "resampled", lambda config, dataset: dataset)  # scenes have no outlines
    assert said in refused(config(**changes))


def test_what_to_do_instead_is_said(config):
    assert "for less memory keep the batch size, and use accumulate or activation_checkpointing" in refused(
        config(batch_size=1)
    )
    assert "epochs may grow, but not shrink" in refused(config(epochs=1))
    weights = Path(config().output) / "model.safetensors"
    message = refused(config(seed=3))
    assert "accumulate" not in message
    assert message.endswith(f"(checkpoint={weights} starts a new run from these weights)")


def test_other_starting_weights_are_refused(config, finished):
    assert "checkpoint=None, now " in refused(config(checkpoint=str(finished / "run" / "model.safetensors")))


def test_the_average_is_neither_added_nor_dropped(config, tmp_path):
    """Once the untrained weights of a new average took the place of trained ones, and a lost one was not missed."""
    plan = config(output=str(tmp_path / "averaged"), ema=0.5)
    train(plan)
    assert "(ema=0.5, now 0.0)" in refused(replace(plan, ema=0.0))
    for folder, ema in (("averaged", 0.0), ("run", 0.5)):  # where it says nothing of its configuration, too
        forget(tmp_path / folder)
        (tmp_path / folder / "config.json").write_text("{")
        assert "go on with the ema that it was begun with" in refused(config(output=str(tmp_path / folder), ema=ema))


def test_fields_that_may_change_are_few():
    watching = {"log_every", "evaluate_every", "evaluate_start", "evaluate_train", "tensorboard"}
    watching |= {"checkpoint_minutes", "keep_checkpoints"}
    machine = {
        "device",
        "precision",
        "processes",
        "accumulate",
        "activation_checkpointing",
        "workers",
        "data",
        "output",
        "resume",
    }
    assert set(MAY_CHANGE) == watching | machine | {
        "on_broken",
        "patience",
        "lr",
        "epochs",
        "max_minutes",
        "max_cpu_minutes",
    }
    assert set(MAY_CHANGE) | set(OF_MODEL) < {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "activation_checkpointing": True, "workers": 1, "precision": "bf16", "device": "auto",
            "on_broken": "skip"},
        {
            "log_every": 7, "evaluate_every": 2, "evaluate_start": True, "evaluate_train": True, "tensorboard": True,
            "checkpoint_minutes": 3.0, "keep_checkpoints": 5,
        },
        {"max_minutes": 60.0, "max_cpu_minutes": 60.0},
    ],
)  # fmt: skip
def test_machine_and_watching_may_change(config, changes):
    weights = Path(config().output) / "model.safetensors"
    before = weights.read_bytes()
    train(config(**changes))
    assert weights.read_bytes() == before, "the run was finished"
    stored = json.loads((Path(config().output) / "config.json").read_text())["run"]
    for name, value in changes.items():
        assert f"changed since the run began: {name}={getattr(CONFIG, name)!r}, now {value!r}" in log(config())
        assert stored[name] == value


def test_without_changes_nothing_is_said(config):
    train(config())
    assert "changed since" not in log(config()) and "does not say" not in log(config())


def test_more_epochs_and_another_learning_rate_are_said(config):
    train(config(epochs=3, lr=2e-3))
    assert "epochs=2, now 3 (the schedule is recomputed for the new length of the run)" in log(config())
    assert "lr=0.001, now 0.002 (the new learning rate holds from here on)" in log(config())
    rates = [json.loads(line)["lr"] for line in (Path(config().output) / "metrics.jsonl").read_text().splitlines()]
    assert rates == [1e-3] * 4 + [2e-3] * 2


def test_the_order_of_overrides_does_not_matter(config):
    train(config(overrides=SMALL[::-1]))


# --------------------------------------------------------------------------------------------------------- the data


def test_data_may_move(config, tmp_path):
    train(config(data=str(tmp_path / "data")))
    assert f"now '{tmp_path / 'data'}' (the annotations are the same)" in log(config())


def permute(content):
    first, second = content["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def test_permuted_class_names_are_refused(config, tmp_path):
    for split in ("train", "val"):
        edit(tmp_path / "data", permute, split)
    message = refused(config(data=str(tmp_path / "data")))
    assert "other categories" in message and "category 1='striped square', now 'dotted square'" in message


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what", ["box", "annotation", "category", "image name", "image size", "image id", "image"])
def test_changed_annotations_are_refused(config, tmp_path, split, what):
    def change(content):
        image, annotation = content["images"][-1], content["annotations"][-1]
        if what == "box":
            annotation["bbox"][2] -= 0.25
        elif what == "annotation":
            content["annotations"].pop()
        elif what == "category":
            annotation["category_id"] = annotation["category_id"] % 12 + 1
        elif what == "image name":
            shutil.copy(tmp_path / "data" / "images" / image["file_name"], tmp_path / "data" / "images" / "other.png")
            image["file_name"] = "other.png"
        elif what == "image size":
            image["width"] += 1
        else:
            for one in content["annotations"]:
                one["image_id"] += 100 * (one["image_id"] == image["id"])
            image["id"] += 100
            if what == "image":
                content["images"].pop()
                content["annotations"] = [one for one in content["annotations"] if one["image_id"] != image["id"]]

    edit(tmp_path / "data", change, split)
    message = refused(config(data=str(tmp_path / "data")))
    count = {"train": 4, "val": 2}[split]
    assert (
        f"{split} annotations='{count} images, " in message and f"now '{count - (what == 'image')} images, " in message
    )
    assert "data=" in message, "the folder is another one, too"


def test_a_fingerprint_is_that_of_annotations_alone(finished, tmp_path):
    drawn, stored = Scenes(4, size=64), open_data(finished / "data")
    assert fingerprint(drawn) == fingerprint(stored), "drawn or in files: the same images and objects"
    shutil.copytree(finished / "data", tmp_path / "data")

    def renumber(content):
        content["info"] = {"exported": "again"}
        for annotation in content["annotations"]:
            annotation["id"] += 1000
            annotation["segmentation"] = []

    edit(tmp_path / "data", renumber)
    assert fingerprint(open_data(tmp_path / "data")) == fingerprint(stored)
    assert fingerprint(stored)["objects"] == len(json.loads(
        (finished / "data" / "annotations" / "instances_train.json").read_text())["annotations"]
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- earlier and damaged runs


def forget(folder):
    """Make the checkpoints those of an earlier version, which kept no configuration."""
    for file in (folder / "checkpoints").glob("*.pt"):
        state = torch.load(file, weights_only=True)
        del state["config"]
        torch.save(state, file)


def test_checkpoints_of_earlier_versions_are_resumed_with_one_warning(config, capsys, tmp_path):
    forget(tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    del stored["run"]["max_cpu_minutes"]  # a field that came later
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert "(seed=0, now 1)" in refused(config(seed=1)), "config.json knows the configuration"
    capsys.readouterr()
    train(config())
    assert capsys.readouterr().out.count("does not say which annotations it was made with") == 1
    train(config())
    assert "does not say" not in capsys.readouterr().out, "the fingerprint is stored now"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"config": "x"}, "config='x', which no run has written"),
        ({"epoch": "x"}, "epoch='x', which no run has written"),
        ({"step": -3}, "step=-3, which no run has written"),
        ({"seconds": float("nan")}, "seconds=nan, which no run has written"),
        ({"images": None}, "images=None, which no run has written"),
        ({"best": None}, "best=None, which no run has written"),
        ({"evaluated": 5}, "evaluated=5, which no run has written"),
        ({"evaluated": {"val": "x"}}, "evaluated={'val': 'x'}, which no run has written"),
        ({"metrics": "many"}, "metrics='many', which no run has written"),
        ({"metrics": -5}, "metrics=-5, which no run has written"),
        ({"meter": [1]}, r"meter=[1], which no run has written"),
        ({"meter": {"x": 1}}, "holds a run of another model"),
        ({"optimizer": {}}, "holds a run of another model"),
        ({"model": {}}, "holds a run of another model"),
    ],
)
def test_a_forged_checkpoint_is_one_clear_error(config, tmp_path, values, said):
    for file in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        torch.save(torch.load(file, weights_only=True) | values, file)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(config())
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_that_is_no_mapping_is_damaged(config, tmp_path):
    for file in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        torch.save([1], file)
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        train(config())


def test_weights_whose_checkpoints_are_gone_are_not_trained_anew(config, tmp_path):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds trained weights, but no checkpoint to go on from: put .*checkpoints ba"):
        train(config())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_before_the_first_checkpoint_there_is_nothing_to_keep(config, tmp_path):
    plan = config(output=str(tmp_path / "new"))

    def fail(line):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(plan, fail)
    train(replace(plan, seed=5))
    steps = [json.loads(line)["step"] for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["run"]["seed"] == 5


def test_starting_weights_are_not_needed_to_go_on(config, finished, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(finished / "run" / "model.safetensors", start)
    plan = config(output=str(tmp_path / "tuned"), checkpoint=str(start))
    train(plan)
    start.unlink()
    train(replace(plan, epochs=3))
