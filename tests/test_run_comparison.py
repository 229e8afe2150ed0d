"""Runs side by side: what is planted in their folders must come out, in tables, sentences and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from small_models import unchecked

import regolite
from regolite import RunConfig
from regolite.cli import main
from regolite.errors import UserError
from regolite.evaluation.run_comparison import Comparison, Run, as_text, differences, differences_as_text, rows, summary
from regolite.plots.run_comparison import plot_convergence, plot_losses, plot_stages, run_style
from regolite.training import train

STEPS = 4  # of an epoch
BASE = [(10.0,), (30.0,), (40.0,), (38.0,)]  # AP by epoch, of the base detector
REGO = [(9.0, 20.0), (30.0, 41.0), (35.0, 45.0)]  # and of a stage


def evaluation(step: int, epoch: int, values: Sequence[float | None], split: str = "val", seconds: float = 0.0) -> dict:
    stages = [{"stage": i, "AP": ap, "AP50": None if ap is None else 2 * ap} for i, ap in enumerate(values)]
    where = {"kind": "evaluation", "split": split, "step": step, "epoch": epoch, "seconds": seconds}
    return {**where, "images": 8, "AP": values[-1], "stages": stages}


def write_run(
    folder: Path, course: Sequence[Sequence[float | None]], hours: float, preset: str, **changes: Any
) -> Path:
    """A run of ``len(course)`` epochs, evaluated after each, a line of metrics at every second step."""
    folder.mkdir(parents=True)
    config = RunConfig(model=preset, output=str(folder), epochs=len(course) or 1, batch_size=8, **changes).to_dict()
    model = regolite.configure(preset).to_dict()
    (folder / "config.json").write_text(json.dumps({"run": config, "model": model}))
    lines = []
    for epoch, values in enumerate(course):
        for step in (epoch * STEPS + 2, epoch * STEPS + 4):
            terms = {"base/label": 8.0 / step, "base.1/label": 99.0, "base/l1": 1.0, "base/giou": 2.0}
            terms |= {f"stage{i}/label": 4.0 / step for i in range(1, len(values))}
            seconds = 3600 * hours * step / (STEPS * len(course))
            line = {"kind": "train", "step": step, "epoch": epoch, "seconds": seconds, "lr": 1e-4, "loss": 1.0}
            lines.append(line | {"terms": terms})
        lines.append(evaluation((epoch + 1) * STEPS, epoch + 1, values, seconds=seconds))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", BASE, 4.0, "deformable_detr_scenes", drop_epochs=(3,))


@pytest.fixture
def rego(tmp_path: Path) -> Path:
    return write_run(tmp_path / "rego", REGO, 4.5, "rego_deformable_detr_scenes", drop_epochs=(2,), lr=2e-4)


@pytest.fixture
def runs(base: Path, rego: Path) -> list[Run]:
    return Comparison((str(base), str(rego))).read()


def append(folder: Path, text: str) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)


class TestRead:
    def test_a_real_run(self, tmp_path: Path):
        config = RunConfig(
            data="scenes:5:val=2:size=64", model="rego_deformable_detr_scenes", output=str(tmp_path / "real"),
            overrides=("stages=1",), image_size=64, batch_size=2, epochs=2, log_every=2, device="cpu",
        )  # fmt: skip
        run = Run.read(train(config))
        model = regolite.load(run.folder / "model.safetensors")
        assert (run.label, run.preset, run.stages()) == ("real", "rego_deformable_detr_scenes", 1)
        assert run.parameters == sum(p.numel() for p in model.parameters())
        assert [(p.step, p.epochs, p.images) for p in run.points()] == [(3, 1, 5), (6, 2, 10)]
        assert 0 < run.points()[0].hours < run.hours and run.notes == ()
        assert run.losses("stage1", "giou")[0] == pytest.approx([2 / 3, 4 / 3, 2])
        assert rows([run])[0]["reaches"]["epochs_ratio"] == 1

    def test_points(self, base: Path):
        run = Run.read(base, "mine")
        assert run.label == "mine" and run.hours == 4
        assert run.curve("epochs") == ([1, 2, 3, 4], [10, 30, 40, 38])
        assert run.curve("hours", "AP50")[0] == [1, 2, 3, 4] and run.curve("hours", "AP50")[1][0] == 20
        assert run.curve("images")[0] == [32, 64, 96, 128]
        assert (run.best().value, run.best().epochs) == (40, 3)
        assert run.reaches(30.0).epochs == 2 and run.reaches(41.0) is None

    def test_an_epoch_that_has_not_ended_is_a_fraction(self, base: Path):
        append(base, json.dumps(evaluation(18, 4, [39.0], seconds=5 * 3600)) + "\n")
        run = Run.read(base)
        assert run.points()[-1].epochs == 4.5 and run.hours == 5
        short = write_run(base.parent / "short", [], 0.0, "detr_scenes")
        append(short, json.dumps(evaluation(2, 0, [1.0])) + "\n")
        assert Run.read(short).points()[0].epochs == 0, "of one epoch, how much is not known"

    def test_stages(self, rego: Path):
        run = Run.read(rego)
        assert run.curve("epochs")[1] == run.curve("epochs", stage=1)[1] == [20, 41, 45]
        assert run.curve("epochs", stage=0)[1] == [9, 30, 35]
        with pytest.raises(UserError, match="stage=2: the run 'rego' has stages 0 to 1"):
            run.points(stage=2)

    def test_what_could_not_be_measured_is_no_zero(self, base: Path):
        append(base, json.dumps(evaluation(20, 5, [None])) + "\n")
        run = Run.read(base)
        assert math.isnan(run.points()[-1].value) and run.best().value == 40
        json.loads(json.dumps(rows([run]), allow_nan=False))

    def test_drops(self, base: Path, rego: Path):
        assert Run.read(base).drops == (3,) and Run.read(rego).drops == (2,)
        other = write_run(base.parent / "constant", BASE, 1.0, "detr_scenes", schedule="constant", drop_epochs=(2,))
        assert Run.read(other).drops == ()
        later = write_run(base.parent / "later", BASE, 1.0, "detr_scenes", drop_epochs=(2, 40))
        assert Run.read(later).drops == (2,), "it has not come so far"

    def test_losses_are_of_the_last_layer_and_smoothed_backwards(self, base: Path):
        run = Run.read(base)
        epochs, values = run.losses("base", "label")
        assert epochs[:3] == [0.5, 1, 1.5] and values[:3] == pytest.approx([4, 2, 8 / 6])
        assert run.losses("base", "label", 2)[1][:3] == pytest.approx([4, 3, (2 + 8 / 6) / 2])
        assert run.losses("stage1", "label") == ([], [])

    @pytest.mark.parametrize("cut", ['{"kind": "tr', '{"kind": "train", "step": 3', "\0\0\0", "[" * 100_000])
    def test_a_last_line_that_is_cut_is_left_out_and_told(self, base: Path, cut: str):
        whole = Run.read(base)
        append(base, cut)
        run = Run.read(base)
        assert (run.training, run.evaluations) == (whole.training, whole.evaluations)
        assert run.notes == (f"{base / 'metrics.jsonl'}: the last line (line 13) is cut off and left out.",)
        assert run.notes[0] in summary(rows([run]))

    def test_a_damaged_line_within_is_an_error(self, base: Path):
        append(base, "{broken\n" + json.dumps(evaluation(20, 5, [1.0])) + "\n")
        with pytest.raises(UserError, match=r"line 13 of .*metrics.jsonl is damaged"):
            Run.read(base)

    def test_no_run(self, base: Path, tmp_path: Path):
        with pytest.raises(UserError, match="nowhere is not the folder of a run, it does not exist"):
            Run.read(tmp_path / "nowhere")
        with pytest.raises(UserError, match="it has no config.json"):
            Run.read(tmp_path)
        (base / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match="has not logged anything yet"):
            Run.read(base)
        (base / "config.json").write_text("[" * 100_000)
        with pytest.raises(UserError, match="config.json is damaged"):
            Run.read(base)
        (base / "config.json").write_text("{}")
        with pytest.raises(UserError, match="config.json is damaged"):
            Run.read(base)

    def test_no_evaluation(self, base: Path):
        with pytest.raises(UserError, match="'base' .* has no evaluation on the training images; let it train on"):
            Run.read(base).points(split="train")

    def test_a_model_of_another_version_has_no_number_of_parameters(self, base: Path):
        config = json.loads((base / "config.json").read_text())
        config["model"]["detector"]["wings"] = 2
        (base / "config.json").write_text(json.dumps(config))
        assert Run.read(base).parameters is None
        assert " - " in as_text(rows([Run.read(base)]))


class TestComparison:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"run": ["a"]}, "unknown parameter 'run'; did you mean 'runs'?"),
            ({"runs": "a"}, "runs='a' is not a list of texts"),
            ({"runs": []}, "runs is empty"),
            ({"runs": ["a"], "metric": "mAP"}, "metric='mAP' is not one of 'AP', 'AP50'"),
            ({"runs": ["a"], "stage": "last"}, "stage='last' is not a whole number or nothing"),
            ({"runs": ["a"], "smoothing": 0}, "smoothing=0 must be at least 1"),
            ({"runs": ["a", "b"], "labels": ["A"]}, "1 labels for 2 runs"),
            ({"runs": ["a/x", "b/x"]}, "two runs have the same name (x, x); give labels that differ"),
            ({"runs": ["a"], "base": "b"}, "base='b' is none of the runs; choose from a"),
        ],
    )
    def test_a_wrong_parameter_is_one_clear_error(self, values: dict, said: str):
        with unchecked(), pytest.raises(UserError) as error:
            Comparison.of(values).read()
        assert said in str(error.value) and "\n" not in str(error.value)

    def test_the_base_comes_first(self, base: Path, rego: Path):
        both = (str(base), str(rego))
        assert [run.label for run in Comparison(both).read()] == ["base", "rego"]
        assert [run.label for run in Comparison(both, ("A", "B"), "B").read()] == ["B", "A"]

    def test_every_run_must_have_what_is_compared(self, base: Path, rego: Path):
        with pytest.raises(UserError, match="'base' has only stage 0, the base detector"):
            Comparison((str(base), str(rego)), stage=1).read()


class TestTables:
    def test_rows(self, runs: list[Run]):
        one, two = rows(runs)
        assert one["best"] == {"value": 40, "step": 12, "epochs": 3, "hours": 3, "images": 96}
        assert one["last"]["value"] <= 40 and one["last"]["step"] > 12, "the best weights need not be the last"
        assert two["best"]["value"] == 45 and two["by_stage"] == [35, 45] and one["by_stage"] == [40]
        # REGO is at 41 after 2 epochs, which took 3 hours; the base detector was at its 40 after 3 epochs and 3 hours.
        assert two["reaches"]["epochs_ratio"] == pytest.approx(2 / 3)
        assert two["reaches"]["hours_ratio"] == pytest.approx(1)
        assert two["reaches"]["images_ratio"] == pytest.approx(2 / 3)
        assert rows(runs[::-1])[1]["reaches"] is None, "the base detector never is at 45"

    def test_text(self, runs: list[Run]):
        lines = as_text(rows(runs)).splitlines()
        model = ["rego", "rego_deformable_detr_scenes", f"{rows(runs)[1]['parameters'] / 1e6:.2f}"]
        assert lines[2].split() == [*model, "3", "8", "2e-04", "4.5", "45.0", "35.0", "45.0"]
        assert lines[3].startswith("last: AP of the last weights, as papers publish it; best: chosen by AP")
        assert lines[-1].split() == ["rego", "2", "67%", "3.0", "100%", "64", "67%"]
        assert "not reached, best 40.0" in as_text(rows(runs[::-1]))
        assert max(map(len, lines)) <= 120

    def test_summary_says_what_the_numbers_say(self, runs: list[Run]):
        assert summary(rows(runs)).splitlines() == [
            "base: best AP 40.0 after 3 of 4 epochs and 3.0 hours.",
            "rego: best AP 45.0 after 3 of 3 epochs, 5.0 more than base. It reaches 40.0 after 2 epochs: 33% fewer "
            "epochs, the same time.",
        ]
        assert summary(rows(runs[::-1])).endswith("5.0 less than rego. It does not reach rego's 45.0.")

    def test_runs_without_a_figure(self, tmp_path: Path):
        folder = write_run(tmp_path / "none", [(None,), (None,)], 1.0, "detr_scenes")
        table = rows([Run.read(folder, "a"), Run.read(folder, "b")])
        assert "not reached, best -" in as_text(table) and "b: best AP -" in summary(table)

    def test_differences(self, runs: list[Run]):
        assert differences(runs) == {
            "model": ["deformable_detr_scenes", "rego_deformable_detr_scenes"],
            "epochs": ["4", "3"],
            "lr": ["0.0001", "0.0002"],
            "drop_epochs": ["3", "2"],
            "model.rego": ["none", "stages=3"],
        }
        assert differences_as_text(runs).splitlines()[0].split() == ["base", "rego"]
        assert differences(runs[:1] * 2) == {} and "the same settings" in differences_as_text(runs[:1] * 2)

    def test_differences_within_the_model_and_of_another_version(self, rego: Path):
        stored = json.loads((rego / "config.json").read_text())
        stored["model"]["rego"]["stages"] = 2
        stored["run"]["wings"] = True
        other = rego.parent / "other"
        other.mkdir()
        (other / "config.json").write_text(json.dumps(stored))
        (other / "metrics.jsonl").write_bytes((rego / "metrics.jsonl").read_bytes())
        both = [Run.read(rego), Run.read(other)]
        assert differences(both) == {"wings": ["-", "yes"], "model.rego.stages": ["3", "2"]}


class TestFigures:
    def test_convergence(self, runs: list[Run]):
        by_epoch, by_hour, by_image = plot_convergence(runs).axes
        lines = {line.get_label(): line for line in by_hour.lines}
        assert lines["rego"].get_xydata().tolist() == [[1.5, 20], [3, 41], [4.5, 45]]
        assert list(lines["best of base: 40.0"].get_ydata()) == [40, 40]
        # Where the learning rate dropped: after epoch 3 of one run, after epoch 2 of the other.
        drops = [line.get_xydata().tolist() for line in by_epoch.lines if line.get_marker() == "v"]
        assert [point for point in drops if point] == [[[3, 40]], [[2, 41]]]
        assert by_image.get_xlim()[1] > 128 and by_epoch.get_ylim()[0] == 0

    def test_minutes_for_short_runs(self, tmp_path: Path):
        run = Run.read(write_run(tmp_path / "short", BASE, 0.5, "detr_scenes", schedule="constant"))
        [ax] = plot_convergence([run], axes=("hours",)).axes
        assert ax.get_xlabel() == "minutes" and ax.lines[0].get_xdata()[-1] == pytest.approx(30)
        assert not any(line.get_marker() == "v" for line in ax.lines)

    def test_stages(self, runs: list[Run]):
        first, second = plot_stages(runs).axes
        assert (len(first.lines), len(second.lines)) == (1, 2)
        assert second.lines[0].get_ydata().tolist() == [9, 30, 35] and second.lines[1].get_label() == "stage 1"
        assert first.get_ylim() == second.get_ylim() and len(plot_stages(runs * 2).axes) == 6

    def test_losses(self, runs: list[Run]):
        label, l1, _ = plot_losses(runs, smoothing=2).axes
        assert label.lines[0].get_ydata()[1] == pytest.approx(3), "the base detector alone: 4 and 2"
        assert label.lines[1].get_ydata()[1] == pytest.approx(1.5), "the last stage of REGO: 2 and 1"
        assert len(l1.lines[1].get_xdata()) == 0, "a run without that term has no line"
        assert plot_losses(runs, stage=0).axes[0].lines[1].get_ydata()[0] == 4

    def test_runs_can_be_told_apart_without_color(self):
        looks = [run_style(number) for number in range(140)]
        assert len({look["linestyle"] for look in looks[:4]}) == 4 and len({look["marker"] for look in looks[:5]}) == 5
        assert len({(look["linestyle"], look["marker"], to_hex(look["color"])) for look in looks}) == 140


class TestCommand:
    def test_table(self, base: Path, rego: Path, capsys):
        append(base, "{")
        assert main(["compare", str(base), str(rego), "--labels", "A", "B", "--base", "B"]) == 0
        said = capsys.readouterr()
        assert "best of B" in said.out and "A  not reached" in said.out and "model.rego" in said.out
        assert said.err.startswith("regolite: warning: ") and said.err.count("\n") == 1

    def test_json(self, base: Path, rego: Path, capsys):
        assert main(["compare", str(base), str(rego), "--metric", "AP50", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["runs"][1]["best"]["value"] == 90 and told["differences"]["epochs"] == ["4", "3"]

    def test_wrong_input_is_one_line(self, base: Path, tmp_path: Path, capsys):
        assert main(["compare", str(base), str(tmp_path / "no")]) == 2
        assert capsys.readouterr().err == (
            f"regolite: error: {tmp_path / 'no'} is not the folder of a run, it does not exist; "
            "give the output folder of a training\n"
        )
