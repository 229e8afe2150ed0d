"""The command line: what it prints and writes, and that wrong input is one line and exit code 2."""

from __future__ import annotations

import errno
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regolite
from regolite import RunConfig, UserError
from regolite.checkpoint import read_config, save_model
from regolite.cli import _fine_tune, main
from regolite.data import video

DATA = "scenes:4:val=2:size=64"
TINY = (
    "--set queries=20 dim=32 detector.ffn_dim=64 detector.encoder_layers=1 detector.decoder_layers=2 stages=2 "
    "rego.ffn_dim=64"
)
TRAIN = f"train --model rego_deformable_detr_scenes --image-size 64 --augment none {TINY}"
COLUMNS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that has learned something, so that figures are not all zero."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = "--epochs 24 --batch-size 4 --lr 3e-3 --backbone-lr-mult 1 --sampling-lr-mult 1 --evaluate-every 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *_: [])  # drawing takes longer than training here
        words = f"{TRAIN} --data {DATA} {options} --evaluate-train --schedule one_cycle --output {folder}"
        assert main(shlex.split(words)) == 0
    return folder


@pytest.fixture
def checkpoint(run: Path) -> list[str]:
    return ["--checkpoint", str(run / "model.safetensors")]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two whole images and a broken one between them."""
    paths = [tmp_path / "images" / name for name in ("wide.png", "broken.jpg", "tall.jpeg")]
    paths[0].parent.mkdir()
    scenes = regolite.data.open_data(DATA, "val")
    scenes.image(0).resize((96, 64)).save(paths[0])
    paths[1].write_bytes(b"no image")
    scenes.image(1).resize((64, 100)).save(paths[2])
    return paths


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> typing.Callable[[list[str] | str], str]:
    """Runs a command that must fail, and gives its one line."""

    def fail(words: list[str] | str) -> str:
        capsys.readouterr()
        assert main(shlex.split(words) if isinstance(words, str) else words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("regolite: error: ")
        return line.removeprefix("regolite: error: ")

    return fail


def trained_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str) -> RunConfig:
    """The configuration that a command hands to training."""
    (tmp_path / "metrics.jsonl").touch()
    seen = []
    monkeypatch.setattr(regolite, "train", lambda config: seen.append(config) or tmp_path)
    assert main(shlex.split(words)) == 0
    [config] = seen
    return config


def read(path: Path) -> typing.Any:
    return json.loads(path.read_text("utf-8"))


def evaluation(folder: Path, split: str) -> dict[str, typing.Any]:
    """The last evaluation in a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "evaluation" and line["split"] == split][-1]


class TestTrain:
    @pytest.mark.parametrize("field", fields(RunConfig), ids=lambda field: field.name)
    def test_every_field_is_an_option(self, field, monkeypatch, tmp_path):
        required = {"data": "d", "model": "m", "output": "o"}
        hint = str(field.type)
        if hint == "bool":
            words, value = "", not field.default
        elif "Literal" in hint:
            value = words = re.findall(r'["\'](\w+)["\']', hint)[-1]
        elif hint.startswith("tuple"):
            words, value = ("a=1 b=2", ("a=1", "b=2")) if "str" in hint else ("3 5", (3, 5))
        elif "int" in hint:
            words, value = "7", 7
        elif "float" in hint:
            words, value = "0.25", 0.25
        else:
            value = words = "word"
        option = "--" + field.name.replace("_", "-")
        given = " ".join(f"--{k} {v}" for k, v in required.items() if k != field.name)
        config = trained_with(monkeypatch, tmp_path, f"train {given} {option} {words}")
        assert config == RunConfig.of({**required, field.name: value})
        assert value != field.default

    def test_what_is_not_given_keeps_its_default(self, monkeypatch, tmp_path):
        config = trained_with(monkeypatch, tmp_path, "train --data d --model m --output o")
        assert config == RunConfig(data="d", model="m", output="o")

    def test_flags_have_a_no_and_lists_add_up(self, monkeypatch, tmp_path):
        words = "train --data d --model m --output o --resume --no-resume --set a=1 --overrides b=2 c=3"
        config = trained_with(monkeypatch, tmp_path, words)
        assert not config.resume and config.overrides == ("a=1", "b=2", "c=3")

    def test_help_tells_each_field_and_its_default(self, capsys):
        with pytest.raises(SystemExit) as end:
            main(["train", "--help"])
        assert end.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for field in fields(RunConfig):
            assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"] in text
        assert "(default: 16)" in text and "(default: step)" in text

    def test_says_where_the_run_is_and_its_ap(self, run, capsys, monkeypatch):
        monkeypatch.setattr(regolite, "train", lambda config: run)
        assert main(["train", "--data", DATA, "--model", "m", "--output", str(run)]) == 0
        out = capsys.readouterr().out
        assert str(run) in out
        for split, count in (("val", 2), ("train", 4)):
            assert f"{count} images of {split}" in out
        for stage in evaluation(run, "train")["stages"]:
            assert f"{stage['AP']:.1f}" in out

    def test_resume_starts_or_goes_on(self, tmp_path, error):
        folder = tmp_path / "run"
        words = f"{TRAIN} --data scenes:2:val=1:size=64 --batch-size 1 --log-every 1 --output {folder}"

        def steps() -> list[int]:
            lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
            return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]

        assert main(shlex.split(f"{words} --epochs 1 --resume")) == 0
        assert steps() == [1, 2]
        assert "resume" in error(f"{words} --epochs 2")
        assert main(shlex.split(f"{words} --epochs 2 --resume")) == 0
        assert steps() == [1, 2, 3, 4]
        assert list((folder / "figures").glob("*.png"))

    def test_ctrl_c_tells_how_to_go_on(self, monkeypatch, capsys, tmp_path):
        def interrupted(config):
            raise KeyboardInterrupt

        monkeypatch.setattr(regolite, "train", interrupted)
        words = ["train", "--data", "my data", "--model", "m", "--output", "o", "--lr", "1e-3"]
        assert main(words) == 130
        [line] = capsys.readouterr().err.strip().splitlines()
        again = line.partition(": regolite ")[2]
        config = trained_with(monkeypatch, tmp_path, again)
        assert config == RunConfig(data="my data", model="m", output="o", lr=1e-3, resume=True)

    def test_the_command_that_others_recommend_fine_tunes_the_everyday_detector(self, monkeypatch, tmp_path):
        config = trained_with(monkeypatch, tmp_path, _fine_tune(Path("my data"), "mine"))
        assert config.data == "my data" and config.output == "runs/mine"
        assert read_config(config.checkpoint).preset == config.model == RunConfig().model


class TestEvaluate:
    @pytest.mark.parametrize("split", ["val", "train"])
    def test_gives_the_figures_of_the_run(self, split, run, checkpoint, tmp_path, capsys):
        file = tmp_path / "new" / "figures.json"
        assert main(["evaluate", *checkpoint, "--data", DATA, "--split", split, "--json", str(file)]) == 0
        figures, logged = read(file), evaluation(run, split)
        assert [stage["stage"] for stage in figures["stages"]] == [0, 1, 2]
        for name in COLUMNS:
            assert figures[name] == figures["stages"][-1][name] == logged[name]
        assert figures["stages"] == logged["stages"]
        assert figures["images"] == (2 if split == "val" else 4)
        assert figures["split"] == split and figures["image_size"] == 64
        rows = [line for line in capsys.readouterr().out.splitlines() if re.match("base|stage", line)]
        assert [row.split()[-6] for row in rows] == [f"{stage['AP']:.1f}" for stage in figures["stages"]]
        if split == "train":
            assert figures["AP"] > 0, "the run has learned nothing: the comparison would be empty"

    def test_without_stages_is_the_base_detector(self, run, checkpoint, tmp_path):
        file, logged = tmp_path / "figures.json", evaluation(run, "train")
        words = ["--split", "train", "--stages", "0", "--json", str(file)]
        assert main(["evaluate", *checkpoint, "--data", DATA, *words]) == 0
        assert read(file)["stages"] == logged["stages"][:1]
        assert read(file)["AP"] == logged["stages"][0]["AP"] != logged["AP"]

    def test_images_that_cannot_be_read_are_named_and_left_out(self, tmp_path, capsys):
        data = regolite.data.open_data("data/coco_tiny", "val")
        (tmp_path / "images").mkdir()
        for i in range(len(data)):
            shutil.copy(data.path(i), tmp_path / "images")
        shutil.copytree("data/coco_tiny/annotations", tmp_path / "annotations")
        broken = tmp_path / "images" / Path(data.path(3)).name
        broken.write_bytes(broken.read_bytes()[:200])
        sizes = {"dim": 32, "heads": 2, "ffn_dim": 16, "queries": 6, "encoder_layers": 1, "decoder_layers": 1}
        names = {"classes": data.classes, "category_ids": data.category_ids}
        model = regolite.build("deformable_detr_scenes", **sizes, **names, image_size=64)
        save_model(model, tmp_path / "m.safetensors")
        words = ["evaluate", "--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path)]
        assert main(words) == 2 and broken.name in capsys.readouterr().err
        file = tmp_path / "figures.json"
        assert main([*words, "--on-broken", "skip", "--json", str(file)]) == 0
        said = capsys.readouterr()
        assert "AP on 31 images" in said.out and "left out" in said.err and broken.name in said.err
        assert read(file)["images"] == 31 and len(read(file)["broken"]) == 1

    def test_saves_what_it_found(self, checkpoint, tmp_path, error):
        file = tmp_path / "new" / "found.json"
        assert main(["evaluate", *checkpoint, "--data", DATA, "--save-detections", str(file)]) == 0
        assert {one["image_id"] for one in read(file)} == set(regolite.data.open_data(DATA, "val").image_ids)
        words = ["--save-detections", str(tmp_path)]
        assert f"--save-detections {tmp_path} is a folder" in error(["evaluate", *checkpoint, "--data", DATA, *words])

    def test_both_backends_agree(self, checkpoint, tmp_path):
        pytest.importorskip("faster_coco_eval")
        figures = []
        for backend in ("pycocotools", "faster-coco-eval"):
            words = ["--split", "train", "--backend", backend, "--json", str(tmp_path / backend)]
            assert main(["evaluate", *checkpoint, "--data", DATA, *words]) == 0
            figures.append(read(tmp_path / backend)["stages"])
        assert figures[0] == figures[1]

    def test_size_and_number_of_images_can_be_chosen(self, checkpoint, tmp_path):
        words = ["--limit-images", "1", "--image-size", "96", "--batch-size", "1", "--json", str(tmp_path / "a.json")]
        assert main(["evaluate", *checkpoint, "--data", DATA, *words]) == 0
        figures = read(tmp_path / "a.json")
        assert (figures["images"], figures["image_size"]) == (1, 96)

    def test_other_categories_are_refused(self, checkpoint, error):
        line = error(["evaluate", *checkpoint, "--data", "data/coco_tiny"])
        assert "data/coco_tiny" in line and "categories" in line

    def test_a_model_may_know_more_than_the_data(self, checkpoint, tmp_path, capsys):
        regolite.data.Scenes(2, size=64, split="val").write(tmp_path)
        file = tmp_path / "annotations" / "instances_val.json"
        data = read(file)
        [gone] = [category for category in data["categories"] if category["id"] == 2]
        data["categories"].remove(gone)
        data["annotations"] = [one for one in data["annotations"] if one["category_id"] != 2]
        file.write_text(json.dumps(data), "utf-8")
        words = ["--data", str(tmp_path), "--batch-size", "2", "--json", str(tmp_path / "figures.json")]
        assert main(["evaluate", *checkpoint, *words]) == 0
        assert "warning" not in capsys.readouterr().err
        data["categories"].append({**gone, "id": 99})
        file.write_text(json.dumps(data), "utf-8")
        assert main(["evaluate", *checkpoint, *words]) == 2
        assert "other categories than" in capsys.readouterr().err

    def test_classes_that_both_know_are_measured_by_name(self, checkpoint, tmp_path, capsys, error):
        """Other ids and one more class in the data change nothing of the figures of the shared classes."""
        regolite.data.Scenes(2, size=64, split="val").write(tmp_path)
        words = ["--data", str(tmp_path), "--json", str(tmp_path / "figures.json")]
        assert main(["evaluate", *checkpoint, *words]) == 0
        before = read(tmp_path / "figures.json")
        file = tmp_path / "annotations" / "instances_val.json"
        data = read(file)
        for one in data["categories"]:
            one["id"] += 50
        for one in data["annotations"]:
            one["category_id"] += 50
        data["categories"].append({"id": 1, "name": "moon"})
        moon = {"id": 999, "image_id": data["images"][0]["id"], "category_id": 1, "bbox": [1, 1, 20, 20]}
        data["annotations"].append(moon)
        file.write_text(json.dumps(data), "utf-8")
        assert "--shared-classes" in error(["evaluate", *checkpoint, *words])
        assert main(["evaluate", *checkpoint, *words, "--shared-classes"]) == 0
        assert read(tmp_path / "figures.json")["stages"] == before["stages"]
        names = [one["name"] for one in data["categories"]]
        assert f"{len(names) - 1} classes that both know, of {len(names)}" in capsys.readouterr().out

    def test_no_class_in_common_is_told(self, checkpoint, error):
        line = error(["evaluate", *checkpoint, "--data", "data/coco_tiny", "--shared-classes"])
        assert "no class that the model knows" in line

    def test_says_how_sure_it_is(self, checkpoint, tmp_path, capsys):
        words = ["--split", "train", "--bootstrap", "20", "--json", str(tmp_path / "figures.json")]
        assert main(["evaluate", *checkpoint, "--data", DATA, *words]) == 0
        figures = read(tmp_path / "figures.json")
        for stage, (low, high) in zip(figures["stages"], figures["intervals"]["AP"], strict=True):
            assert low <= stage["AP"] <= high
        for one in figures["classes"]:
            assert one["AP50_interval"][0] <= one["AP50"] <= one["AP50_interval"][1]
        assert np.mean([one["AP50"] for one in figures["classes"]]) == pytest.approx(figures["AP50"], abs=1e-3)
        out = capsys.readouterr().out
        assert "last stage less base" in out and all(one["name"] in out for one in figures["classes"])

    def test_other_names_are_told(self, checkpoint, tmp_path, capsys):
        regolite.data.Scenes(1, size=64, split="val").write(tmp_path)
        file = tmp_path / "annotations" / "instances_val.json"
        words = ["evaluate", *checkpoint, "--data", str(tmp_path)]
        assert main(words) == 0 and "warning" not in capsys.readouterr().err
        file.write_text(file.read_text("utf-8").replace('"striped star"', '"sea star"'), "utf-8")
        assert main(words) == 0 and "other names" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--stages 3", "--stages 3: .* has 0 to 2"),
            ("--stages -1", "--stages -1"),
            ("--split all", "--split.*'all'.*val"),
            ("--batch-size 0", "--batch-size: '0' is not a whole number greater than 0"),
            ("--limit-images 1.5", "--limit-images: '1.5'"),
            ("--image-size 5", "size 5 is too small"),
            ("--json .", r"--json \. is a folder"),
            ("--json pyproject.toml/figures.json", "pyproject.toml.*exists"),
            ("--bacth-size 4", "no option --bacth-size, did you mean --batch-size?"),
        ],
    )
    def test_wrong_input_is_one_line(self, words, said, checkpoint, error):
        assert re.search(said, error(["evaluate", *checkpoint, "--data", DATA, *words.split()]))

    def test_no_checkpoint(self, tmp_path, error):
        assert "no checkpoint at" in error(f"evaluate --data {DATA} --checkpoint {tmp_path / 'none.safetensors'}")
        (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
        assert "bad.safetensors" in error(f"evaluate --data {DATA} --checkpoint {tmp_path / 'bad.safetensors'}")


class TestDetect:
    def test_without_a_checkpoint_it_is_the_everyday_detector(self, tmp_path):
        words = ["--threshold", "0.4", "--output", str(tmp_path / "found")]
        assert main(["detect", "data/coco_tiny/images/000000555705.jpg", *words]) == 0
        assert [one["label"] for one in read(tmp_path / "found" / "detections.json")] == ["cat", "cat"]

    def test_a_library_of_an_extra_that_is_missing_is_one_line(self, tmp_path):
        code = "import sys; sys.modules['matplotlib'] = None; import regolite.cli as c; sys.exit(c.main(sys.argv[1:]))"
        words = ["detect", "data/coco_tiny/images/000000555705.jpg", "--output", str(tmp_path / "found")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.endswith("matplotlib is not installed: pip install 'regolite[course]'\n")

    def test_writes_images_and_json(self, run, checkpoint, images, tmp_path, capsys):
        whole, output = [images[0], images[2]], tmp_path / "found"
        words = [*map(str, whole), "--output", str(output), "--threshold", "0.05"]
        assert main(["detect", *checkpoint, *words]) == 0
        out, records = capsys.readouterr().out, read(output / "detections.json")
        assert records
        assert {key for record in records for key in record} == {"file", "label", "category_id", "score", "box"}
        model = regolite.load(run / "model.safetensors")
        config = model.model_config
        for path, found in zip(whole, regolite.detect(model, whole, 0.05)):
            with Image.open(path) as before, Image.open(output / path.name) as after:
                assert before.size == after.size and before.format == after.format
            assert f"{path}: {len(found)} objects" in out
            own = [record for record in records if record["file"] == str(path)]
            assert [r["label"] for r in own] == [config.classes[k] for k in found.labels.tolist()]
            assert [r["category_id"] for r in own] == [config.category_ids[k] for k in found.labels.tolist()]
            assert [r["score"] for r in own] == pytest.approx(found.scores.tolist(), abs=1e-4)
            torch.testing.assert_close(torch.tensor([r["box"] for r in own]), found.boxes_xyxy, atol=0.01, rtol=0)

    def test_stages_and_threshold_are_heard(self, run, checkpoint, images, tmp_path):
        for stages in ("0", "2"):
            words = [str(images[0]), "--output", str(tmp_path / stages), "--threshold", "0.05", "--stages", stages]
            assert main(["detect", *checkpoint, *words]) == 0
        scores = [[r["score"] for r in read(tmp_path / stages / "detections.json")] for stages in ("0", "2")]
        assert scores[0] != scores[1] and min(scores[0]) >= 0.05
        assert main(["detect", *checkpoint, str(images[0]), "--output", str(tmp_path / "1"), "--threshold", "1"]) == 0
        assert read(tmp_path / "1" / "detections.json") == []

    def test_a_broken_image_does_not_stop_the_others(self, checkpoint, images, tmp_path, error):
        words = [*map(str, images), str(tmp_path / "none.png"), "--output", str(tmp_path / "found")]
        line = error(["detect", *checkpoint, *words, "--threshold", "0"])
        assert "2 of 4" in line and "broken.jpg" in line and "none.png" in line and "wide.png" not in line
        names = {path.name for path in (tmp_path / "found").iterdir()}
        assert names == {"wide.png", "tall.jpeg", "detections.json"}
        records = read(tmp_path / "found" / "detections.json")
        assert {record["file"] for record in records} == {str(images[0]), str(images[2])}

    def test_images_of_one_name_are_all_kept(self, checkpoint, images, tmp_path):
        other = tmp_path / "wide.PNG"
        other.write_bytes(images[0].read_bytes())
        third = tmp_path / "wide.bmp"
        Image.open(images[0]).save(third)
        output = tmp_path / "found"
        assert main(["detect", *checkpoint, str(images[0]), str(other), str(third), "--output", str(output)]) == 0
        assert {path.name for path in output.iterdir()} == {"wide.png", "wide_2.PNG", "wide_3.png", "detections.json"}

    def test_folders_and_patterns(self, checkpoint, images, tmp_path, capsys):
        images[1].unlink()
        (images[0].parent / "notes.txt").write_text("no image")
        for n, source in enumerate((images[0].parent, images[0].parent / "*", images[0].parent / "*.png")):
            output = tmp_path / str(n)
            assert main(["detect", *checkpoint, str(source), str(images[0]), "--output", str(output)]) == 0
            found = {path.name for path in output.iterdir()}
            assert found == {"wide.png", "detections.json"} | ({"tall.jpeg"} if n < 2 else set()), "each once"

    def test_what_was_found_is_written_after_every_image(self, checkpoint, images, tmp_path, monkeypatch):
        line, huge = tmp_path / "line.png", tmp_path / "huge.png"
        Image.new("RGB", (4000, 8)).save(line)
        Image.new("1", (3000, 3000)).save(huge)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        detect, seen = regolite.detect, []

        def watched(*given):
            file = tmp_path / "found" / "detections.json"
            seen.append({record["file"] for record in read(file)})
            if len(seen) == 3:
                raise KeyboardInterrupt
            if len(seen) == 2:
                raise RuntimeError("CUDA out of memory")
            return detect(*given)

        monkeypatch.setattr(regolite, "detect", watched)
        words = [*map(str, (images[0], huge, line, images[2])), "--output", str(tmp_path / "found")]
        assert main(["detect", *checkpoint, *words, "--threshold", "0"]) == 130
        assert seen == [set(), {str(images[0])}, {str(images[0])}]
        assert len(read(tmp_path / "found" / "detections.json")) > 1

    def test_one_image_that_is_too_large_or_a_line(self, checkpoint, images, tmp_path, monkeypatch, error):
        line, huge = tmp_path / "line.png", tmp_path / "huge.png"
        Image.new("RGB", (4000, 8)).save(line)
        Image.new("1", (3000, 3000)).save(huge)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        words = [*map(str, (huge, line, images[0])), "--output", str(tmp_path / "found"), "--threshold", "0"]
        said = error(["detect", *checkpoint, *words])
        assert "1 of 3 images failed" in said and "huge.png is larger than Pillow's limit" in said
        assert {one["file"] for one in read(tmp_path / "found" / "detections.json")} == {str(line), str(images[0])}
        with Image.open(tmp_path / "found" / "line.png") as drawn:
            assert drawn.size == (4000, 8)

    def test_a_photograph_held_sideways_is_drawn_upright(self, checkpoint, images, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(images[0]).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
        words = [str(images[0]), str(tmp_path / "phone.png"), "--output", str(tmp_path / "found"), "--threshold", "0"]
        assert main(["detect", *checkpoint, *words]) == 0
        records = read(tmp_path / "found" / "detections.json")
        upright, phone = (
            [{**one, "file": ""} for one in records if one["file"].endswith(name)] for name in ("wide.png", "phone.png")
        )
        assert upright == phone and len(phone) > 0
        with Image.open(tmp_path / "found" / "phone.png") as drawn:
            assert drawn.size == (96, 64) and drawn.getexif().get(0x0112, 1) == 1

    def test_of_an_animation_it_says_what_it_looks_at(self, checkpoint, tmp_path, capsys):
        Image.new("RGB", (40, 30)).save(
            tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]
        )
        assert main(["detect", *checkpoint, str(tmp_path / "a.gif"), "--output", str(tmp_path / "found")]) == 0
        said = capsys.readouterr().err
        assert said == f"regolite: warning: image {tmp_path / 'a.gif'} has 2 frames: only frame 1 is used\n"

    def test_a_video(self, checkpoint, images, tmp_path, capsys):
        with Image.open(images[0]) as first:
            frames = [first.convert("RGB"), first.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        with video.VideoWriter(tmp_path / "clip.mp4") as writer:
            for n, seconds in enumerate((0.0, 0.25, 1.0)):
                writer.add(video.Frame(frames[n % 2], seconds))
        words = [str(tmp_path / "cl?p.mp4"), str(images[0]), "--output", str(tmp_path / "found"), "--threshold", "0"]
        assert main(["detect", *checkpoint, *words]) == 0
        records = [one for one in read(tmp_path / "found" / "detections.json") if "frame" in one]
        assert {(one["file"], one["frame"], one["seconds"]) for one in records} == {
            (str(tmp_path / "clip.mp4"), n, seconds) for n, seconds in ((1, 0.0), (2, 0.25), (3, 1.0))
        }
        assert f"{len(records)} objects in 3 frames" in capsys.readouterr().out
        drawn = list(video.read_video(tmp_path / "found" / "clip.mp4"))
        assert [(frame.image.size, round(frame.seconds, 3)) for frame in drawn] == [
            ((96, 64), 0.0), ((96, 64), 0.25), ((96, 64), 1.0),
        ]  # fmt: skip

    def test_folders_and_patterns_of_videos(self, checkpoint, images, tmp_path):
        with Image.open(images[0]) as image, video.VideoWriter(tmp_path / "in.mp4") as writer:
            writer.add(video.Frame(image.convert("RGB"), 0.0))
        (tmp_path / "clips").mkdir()
        (tmp_path / "in.mp4").rename(tmp_path / "clips" / "b.mp4")
        for files in (["b.mp4"], ["a.png", "b.mp4"]):
            if "a.png" in files:
                shutil.copy(images[0], tmp_path / "clips" / "a.png")
            for number, words in enumerate(("clips", "clips/*")):
                output = tmp_path / f"found{len(files)}{number}"
                assert main(["detect", *checkpoint, str(tmp_path / words), "--output", str(output)]) == 0
                assert sorted(path.name for path in output.iterdir()) == sorted([*files, "detections.json"])

    def test_names_that_the_terminal_cannot_show(self, checkpoint, images, tmp_path, monkeypatch):
        path = shutil.copy(images[0], tmp_path / "図.png")
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["detect", *checkpoint, str(path), "--output", str(tmp_path / "found")]) == 0
        assert b"\\u56f3.png: " in out.buffer.getvalue()

    def test_a_broken_video(self, checkpoint, images, tmp_path, error):
        (tmp_path / "clip.mp4").write_bytes(b"no video")
        words = [str(tmp_path / "clip.mp4"), str(tmp_path / "none.mov"), str(images[0])]
        said = error(["detect", *checkpoint, *words, "--output", str(tmp_path / "found")])
        assert (
            "2 of 3" in said and "clip.mp4 cannot be read (Invalid data" in said and "none.mov does not exist" in said
        )

    def test_never_writes_over_a_image(self, checkpoint, images, error):
        before = images[0].read_bytes()
        line = error(["detect", *checkpoint, str(images[0]), "--output", str(images[0].parent)])
        assert "wide.png" in line and "--output" in line and images[0].read_bytes() == before

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--threshold 2", r"--threshold 2\.0 must be between 0 and 1"),
            ("--threshold nan", "--threshold: 'nan' is not a number"),
            ("https://example.org/a.jpg", "1 of 2 .*https://example.org/a.jpg is a URL: download it"),
            ("https://example.org/a.mp4", "1 of 2 .*https://example.org/a.mp4 is a URL: download it"),
            ("regolite", "1 of 2 .*folder regolite has no images"),
            ("*.nothing", r"1 of 2 .*no image matches \*.nothing"),
            ("--stages 9", "--stages 9"),
            ("--output pyproject.toml", "pyproject.toml.*exists"),
            ("--treshold 0.3", "did you mean --threshold?"),
        ],
    )
    def test_wrong_input_is_one_line(self, words, said, checkpoint, images, error, tmp_path):
        words = ["--output", str(tmp_path / "found"), str(images[0]), *words.split()]
        assert re.search(said, error(["detect", *checkpoint, *words]))


class TestPresets:
    NAMES = ("deformable_detr_r50", "rego_detr_dc5_r50", "faster_rcnn_r50", "rego_deformable_detr_tiny")

    def test_table(self, monkeypatch, capsys):
        monkeypatch.setattr(regolite, "presets", lambda: self.NAMES)
        assert main(["presets"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert rows[0].split() == ["deformable_detr_r50", "40.07", "resnet50", "-", "800"]
        assert rows[1].split()[2:] == ["resnet50-dc5", "3", "800"]
        assert rows[2].split() == ["faster_rcnn_r50", "41.76", "resnet50", "-", "800"]
        assert len(rows) == 4 and {len(row) for row in rows} == {len(head)}

    def test_json(self, monkeypatch, capsys):
        monkeypatch.setattr(regolite, "presets", lambda: self.NAMES)
        assert main(["presets", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["name"] for row in rows] == list(self.NAMES)
        parameters = sum(p.numel() for p in regolite.build(self.NAMES[-1], weights=None).parameters())
        assert rows[-1] == {
            "name": self.NAMES[-1],
            "parameters": parameters,
            "backbone": "mobilenet_v2",
            "stages": 3,
            "image_size": 256,
        }


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("", "COMMAND"),
            ("trian", "'trian'.*train"),
            ("--verison", "no option --verison, did you mean --version?"),
            ("train", "required: --data, --model, --output"),
            ("train --dta d --model m --output o", "no option --dta, did you mean --data?"),
            ("train -epochs 3", "no option -epochs, did you mean --epochs?"),
            ("train --data d --model m --output o --epochs many", "--epochs: 'many' is not a whole number"),
            ("train --data d --model m --output o --lr inf", "--lr: 'inf' is not a number"),
            ("train --data d --model m --output o --lr -1", "lr=-1.0 must be greater than 0"),
            ("train --data d --model m --output o --schedule onecycle", "'onecycle'.*one_cycle"),
            ("train --data d --model rego_detr_tny --output o", "did you mean 'rego_detr_tiny'?"),
            ("train --data nowhere --model detr_tiny --output o", "nowhere does not exist"),
            ("train --data scenes --model detr_tiny --output o --set querys=5", "did you mean 'queries'?"),
            ("train --data scenes --model detr_tiny --output o --set queries=", "'queries=' has no value"),
            ("train --data scenes:4 --model detr_scenes --output pyproject.toml", "pyproject.toml is a file"),
            ("train --data scenes:4 --model detr_scenes --output pyproject.toml/o", "pyproject.toml/o: .*directory"),
            ("train --data scenes --model detr_tiny --output o extra", "extra"),
        ],
    )
    def test_wrong_input_is_one_line(self, words, said, error):
        assert re.search(said, error(words))
        assert not Path("o").exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("convert", "required: FOLDER, --output"),
            ("convert {t}/none --output o", "none is not a folder"),
            ("convert {t}/empty --output o", "empty holds no images"),
            ("convert data/coco_tiny --output {t}/full", "full exists already"),
            ("convert data/coco_tiny --output {t}/file", "file is a file: give a new folder"),
            ("convert data/coco_tiny --output o --val 1.5", r"val=1\.5 must lie between 0 and 1"),
            ("convert data/coco_tiny --output o --val half", "--val: 'half' is not a number"),
            ("convert data/coco_tiny --output o --seed x", "--seed: 'x' is not a whole number"),
            ("convert data/coco_tiny --output o --vall 0.2", "did you mean --val?"),
            ("compare", "required: RUN"),
            ("compare {t}/none", "none is not the folder of a run, it does not exist"),
            ("compare {t}/empty", "empty is not the folder of a run, it has no config.json"),
            ("compare {t}/torn", "config.json is damaged"),
            ("compare {t}/none --metric mAP", "invalid choice: 'mAP'"),
            ("presets --jsn", "did you mean --json?"),
            ("presets extra", "unrecognized arguments: extra"),
            ("relations --data scenes:2", "give either --checkpoint or --model"),
            ("relations --model {t}/empty --data scenes:2", "transformers can't load it"),
            ("relations {checkpoint} --data scenes:many", "'many' is not understood"),
            ("relations {checkpoint} --data scenes:2 --stages 9", "stages.* 9"),
            ("relations {checkpoint} --data scenes:2 --batch-size 0", "'0' is not a whole number greater than 0"),
            ("relations {checkpoint} --data scenes:2 --json {t}", "is a folder; give a file"),
            ("relations --checkpoint {t}/none --data scenes:2", "no checkpoint at .*none"),
            ("evaluate --checkpoint {t}/file --data scenes:2", "file is empty; copy it again"),
            ("evaluate --checkpoint pyproject.toml --data scenes:2", "pyproject.toml is damaged"),
            ("detect {t}/none.jpg --output o", "none.jpg does not exist"),
            ("explain a.jpg", "required: --html"),
            ("explain {t}/none.jpg --html {t}/a.html", "none.jpg does not exist"),
            ("explain a.jpg --html {t}", "--html .* is a folder; give a file"),
            ("explain a.jpg --html {t}/a.html --stages 9", "--stages 9.* has 0 to 3"),
            ("experiment stages --seeds x", "--seeds: 'x' is not a whole number"),
            ("experiment stages --results {t}/file", "file: .*; a part of the path is a file"),
        ],
    )
    def test_wrong_input_of_every_command_is_one_line(self, words, said, checkpoint, tmp_path, error):
        for name in ("full", "empty", "torn"):
            (tmp_path / name).mkdir()
        (tmp_path / "file").touch()
        (tmp_path / "full" / "mine.txt").touch()
        (tmp_path / "torn" / "config.json").write_text('{"run"')
        assert re.search(said, error(words.format(t=tmp_path, checkpoint=" ".join(checkpoint))))
        assert not Path("o").exists()

    @pytest.mark.parametrize(
        ("raised", "said"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "out: No space left on device; free some space"),
            (PermissionError(errno.EACCES, "Permission denied", "o"), "o: Permission denied; "),
            (MemoryError(), "out of memory; .*--batch-size"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "out of memory; .*--batch-size"),
            (UserError("one\n  two"), "one two$"),
        ],
    )
    def test_what_the_system_refuses_is_one_line(self, raised, said, monkeypatch, error):
        def fail(config):
            raise raised

        monkeypatch.setattr(regolite, "train", fail)
        assert re.match(said, error("train --data d --model m --output out"))

    def test_a_worker_of_the_loader_says_one_line_too(self, tmp_path, error):
        scenes = regolite.data.Scenes(2, size=64)
        scenes.write(tmp_path)
        annotations = tmp_path / "annotations"
        (annotations / "instances_val.json").write_bytes((annotations / "instances_train.json").read_bytes())
        broken = tmp_path / "images" / scenes.file_name(1)
        broken.write_bytes(b"no image")
        words = f"{TRAIN} --data {tmp_path} --workers 1 --batch-size 2 --epochs 1 --output {tmp_path / 'run'}"
        assert error(words).startswith(f"image {broken} cannot be read")

    def test_a_bug_is_not_hidden(self, monkeypatch):
        def fail(config):
            raise RuntimeError("shapes differ")

        monkeypatch.setattr(regolite, "train", fail)
        with pytest.raises(RuntimeError, match="shapes differ"):
            main(["train", "--data", "d", "--model", "m", "--output", "o"])

    def test_ctrl_c_elsewhere(self, monkeypatch, capsys):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(regolite, "presets", interrupted)
        assert main(["presets"]) == 130
        assert capsys.readouterr().err.strip() == "regolite: interrupted"


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("regolite", run_name="__main__")
    assert not end.value.code
    assert capsys.readouterr().out == f"regolite {regolite.__version__}\n"
