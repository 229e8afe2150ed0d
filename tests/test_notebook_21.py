"""The notebook of evaluation: its parameters, what it leaves, and that wrong input is one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Optional

import nbformat
import papermill
import pytest
from small_models import unchecked

import regolite
from regolite.checkpoint import save_model
from regolite.errors import UserError
from regolite.evaluation import EvaluationConfig
from regolite.evaluation.complexity import TABLE_1
from regolite.paper.table1 import COLUMNS, PUBLISHED, published_rows
from regolite.training.notebook_parameters import read_parameters
from regolite.utils.validation import fits

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "21_evaluate_coco.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
PARAMETERS = CELLS["parameters"].source
DATA = "scenes:3:val=2:size=64"


def execute(*sources: str) -> dict[str, object]:
    namespace: dict[str, object] = {"Optional": Optional}
    for source in sources:
        exec(compile(source, "a cell", "exec", dont_inherit=True), namespace)
    return namespace


def configured(*sources: str) -> EvaluationConfig:
    with unchecked():
        return EvaluationConfig.of(read_parameters(["", *sources, CELLS["check"].source], execute(*sources)))


def test_the_parameters_are_the_fields_of_an_evaluation():
    values = read_parameters(["", PARAMETERS], execute(PARAMETERS))
    assert list(values) == [f.name for f in fields(EvaluationConfig)], "one field a line, in the order of the fields"
    defaults = configured(PARAMETERS)
    differ = {f.name for f in fields(EvaluationConfig) if getattr(defaults, f.name) != f.default}
    assert differ == {"checkpoint", "data", "splits", "shared_classes", "output"}


def test_papermill_explains_every_parameter():
    told = papermill.inspect_notebook(str(NOTEBOOK))
    assert set(told) == {f.name for f in fields(EvaluationConfig)}
    for name, about in told.items():
        assert about["inferred_type_name"] != "None" and len(about["help"]) > 10, name
    cell = ModuleType("cell")
    vars(cell).update(execute(PARAMETERS))
    annotations = typing.get_type_hints(cell)
    hints = typing.get_type_hints(EvaluationConfig)
    for name, hint in ((f.name, hints[f.name]) for f in fields(EvaluationConfig)):
        optional = type(None) in typing.get_args(annotations[name])
        assert fits(None, hint) == optional, name


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ("treshold = 0.3", "unknown parameter 'treshold'; did you mean 'threshold'?"),
        ("checkpiont = 'a'", "did you mean 'checkpoint'?"),
        ("threshold = 1.5", "threshold=1.5 must be between 0 and 1"),
        ("splits = ['tset']", "splits=['tset'] must be some of test, train, train+val, val, each once"),
        ("splits = ['val', 'val']", "each once"),
        ("splits = []", "splits=[] must be"),
        ("splits = 'val'", "splits='val' is not a list of texts"),
        ("backend = 'coco'", "backend='coco' is not one of 'pycocotools', 'faster-coco-eval'"),
        ("batch_size = 0", "batch_size=0 must be greater than 0"),
        ("stages = -1", "stages=-1 must not be negative"),
        ("limit_images = 'all'", "limit_images='all' is not a whole number or nothing"),
    ],
)
def test_a_wrong_parameter_is_one_clear_error(injected: str, said: str):
    with pytest.raises(UserError) as error:
        configured(PARAMETERS, "# Parameters\n" + injected)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_backend_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        EvaluationConfig(backend="faster-coco-eval")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small REGO of two stages that has learned nothing."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    small = {
        "dim": 32,
        "heads": 2,
        "detector.ffn_dim": 16,
        "queries": 12,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
    }
    scenes = regolite.data.open_data(DATA)
    names = {"classes": scenes.classes, "category_ids": scenes.category_ids}
    stages = {"rego.ffn_dim": 16, "stages": 2, "image_size": 64}
    save_model(regolite.build("rego_deformable_detr_scenes", **small, **stages, **names), file)
    return file


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the notebook by papermill in a folder of its own."""
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(folder / "done.ipynb"), *words]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    command += ["--cwd", str(folder), "--no-progress-bar"]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_papermill_runs_it_with_other_parameters(checkpoint: Path, tmp_path: Path):
    words = ["-p", "checkpoint", str(checkpoint), "-p", "data", DATA, "-y", "splits: [val]", "-p", "output", "results"]
    words += ["-p", "save_detections", "True", "-p", "threshold", "0.0", "-p", "images", "1", "-p", "batch_size", "2"]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "results").iterdir()}
    images = {"columns.png", "categories.png", "precision.png", "overlaps.png", "errors.png", "false_positives.png"}
    assert images | {"figures.json", "detections_val.json"} <= written
    figures = json.loads((tmp_path / "results" / "figures.json").read_text("utf-8"))
    dataset = regolite.data.open_data(DATA, "val")
    measured = regolite.evaluate(regolite.load(checkpoint), dataset, batch_size=2, progress=False)
    assert figures["splits"] == {"val": measured}
    assert figures["looked_at"] == "val" and figures["image_size"] == 64
    assert len(figures["overlaps"]) == len(figures["errors"]) == 3
    assert sum(one["objects"] for one in figures["categories"]) == len(dataset.coco.dataset["annotations"])
    there = [one["AP"] for one in figures["categories"] if one["AP"][-1] is not None]
    assert sum(ap[-1] for ap in there) / len(there) == pytest.approx(measured["AP"], abs=1e-3)
    assert [row["AP"] for row in figures["published"]] == [44.8, 45.9, 44.9]
    results = json.loads((tmp_path / "results" / "detections_val.json").read_text("utf-8"))
    assert len(results) == 2 * 100 and set(results[0]) == {"image_id", "category_id", "bbox", "score"}


@pytest.mark.slow
def test_papermill_refuses_a_misspelt_parameter(tmp_path: Path):
    done = run(tmp_path, "-p", "treshold", "0.3", "-p", "output", "results")
    assert done.returncode == 1
    assert last_line(done) == "UserError: unknown parameter 'treshold'; did you mean 'threshold'?"
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_papermill_refuses_a_checkpoint_of_other_categories(checkpoint: Path, tmp_path: Path):
    words = ["-p", "checkpoint", str(checkpoint), "-p", "data", str(ROOT / "data" / "coco_tiny"), "-p", "output", "out"]
    done = run(tmp_path, *words, "-p", "shared_classes", "False")
    assert done.returncode == 1
    assert last_line(done).startswith("UserError: the data has categories that the model does not know")


class TestPublishedRows:
    def test_presets_exist_and_are_those_of_table_1(self):
        assert set(PUBLISHED) == set(TABLE_1) <= set(regolite.presets())

    def test_every_row_is_plausible(self):
        for rows in PUBLISHED.values():
            assert [row.epochs for row in rows] == sorted(row.epochs for row in rows)
            for row in rows:
                figures = row.figures
                assert tuple(figures) == COLUMNS
                assert figures["AP75"] < figures["AP50"] and figures["AP"] < figures["AP50"]
                if figures["APs"] is not None:
                    assert figures["APs"] < figures["APm"] < figures["APl"]

    @pytest.mark.parametrize(
        ("preset", "ap"),
        [
            ("rego_deformable_detr_r50", [44.8, 45.9, 44.9]),
            ("rego_deformable_detr_tiny", [44.8, 45.9, 44.9]),
            ("deformable_detr_scenes", [42.7, 43.8]),
            ("deformable_detr_two_stage_x101", [47.7]),
            ("rego_smca_r50", []),
        ],
    )
    def test_rows_of_a_preset(self, preset: str, ap: list[float]):
        assert [row.ap[0] for row in published_rows(preset)[1]] == ap

    def test_rego_gains_what_the_paper_says(self):
        gains = {
            base: PUBLISHED[f"rego_{base}"][n].ap[0] - rows[-1].ap[0]
            for base, rows in PUBLISHED.items()
            if f"rego_{base}" in PUBLISHED
            for n in [next(n for n, row in enumerate(PUBLISHED[f"rego_{base}"]) if row.epochs == rows[-1].epochs)]
        }
        assert {base: round(gain, 1) for base, gain in gains.items()} == {
            "detr_star_r50": 3.0, "detr_star_dc5_r50": 2.7, "deformable_detr_r50": 2.1,
            "deformable_detr_two_stage_r50": 1.2, "deformable_detr_two_stage_r101": 1.3,
            "deformable_detr_two_stage_x101": 1.4,
        }  # fmt: skip
