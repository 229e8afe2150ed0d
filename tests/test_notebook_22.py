"""The notebook that compares runs: its parameters are those of a comparison, and it does with any runs."""

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
from test_run_comparison import BASE, REGO, append, write_run

from regolite.errors import UserError
from regolite.evaluation.run_comparison import Comparison
from regolite.training.notebook_parameters import read_parameters
from regolite.utils.validation import fits

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "22_compare_runs.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
PARAMETERS = CELLS["parameters"].source


def compared(injected: str = "") -> Comparison:
    """What the notebook compares when papermill puts these lines after its parameters."""
    namespace: dict[str, object] = {"Optional": Optional}
    sources = [PARAMETERS, "# Parameters\n" + injected, CELLS["check"].source]
    for source in sources[:2]:
        exec(compile(source, "a cell", "exec", dont_inherit=True), namespace)
    with unchecked():
        return Comparison.of(read_parameters(sources, namespace))


def test_the_parameters_are_the_fields_of_a_comparison():
    told = papermill.inspect_notebook(str(NOTEBOOK))
    assert list(told) == [f.name for f in fields(Comparison)], "one field a line, in the order of Comparison"
    assert all(about["inferred_type_name"] != "None" and len(about["help"]) > 10 for about in told.values())
    assert CELLS["parameters"].metadata["tags"] == ["parameters"]


def test_the_parameters_are_annotated_as_the_fields_are():
    cell = ModuleType("cell")
    vars(cell)["Optional"] = Optional
    exec(compile(PARAMETERS, "a cell", "exec", dont_inherit=True), vars(cell))
    samples = {str: "any", int: 1, type(None): None, list[str]: ("any",)}
    annotations, words = typing.get_type_hints(cell), {"metric": "AP75", "split": "train"}
    hints = typing.get_type_hints(Comparison)
    for name, hint in ((f.name, hints[f.name]) for f in fields(Comparison)):
        for kind in typing.get_args(annotations[name]) if fits(None, hint) else (annotations[name],):
            assert fits(words.get(name, samples[kind]), hint), f"{name}: {kind}, but Comparison has {hint}"


def test_the_check_comes_right_after_the_parameters():
    code = [cell.id for cell in CELLS.values() if cell.cell_type == "code"]
    assert (
        code[code.index("parameters") + 1] == "check" and "read_parameters(cells, globals())" in CELLS["check"].source
    )


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ('metrics = "AP50"', "unknown parameter 'metrics'; did you mean 'metric'?"),
        ('metric = "mAP"', "metric='mAP' is not one of 'AP', 'AP50'"),
        ('labels = ["one"]', "1 labels for 3 runs"),
        ("smoothing = 0", "smoothing=0 must be at least 1"),
        ("stage = 1.5", "stage=1.5 is not a whole number or nothing"),
    ],
)
def test_a_wrong_parameter_is_one_clear_error(injected: str, said: str):
    with pytest.raises(UserError) as error:
        compared(injected)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_runs_of_the_notebook_are_there_and_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    runs = compared().read()
    for run in runs:
        assert {path.name for path in run.folder.iterdir()} == {"config.json", "metrics.jsonl"}, "no weights"
        assert run.epochs == run.config["epochs"] and run.parameters and not run.notes
    base, rego, early = runs
    # The same seed: two runs of REGO are one until the first of them drops its learning rate.
    until = early.drops[0]
    assert rego.curve("epochs")[1][:until] == early.curve("epochs")[1][:until]
    assert rego.curve("epochs")[1][until] != early.curve("epochs")[1][until]
    assert base.config["seed"] == rego.config["seed"] and base.stages() == 0 and rego.stages() == 3


def test_a_run_that_is_not_there_is_one_clear_error():
    with pytest.raises(UserError) as error:
        compared('runs = ["nowhere"]\nlabels = []').read()
    said = "nowhere is not the folder of a run, it does not exist; give the output folder of a training"
    assert str(error.value) == said


def papermill_it(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "done.ipynb"), *words]
    command += ["--cwd", str(NOTEBOOK.parent), "--no-progress-bar"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.slow
def test_papermill_compares_other_runs(tmp_path: Path):
    one = write_run(tmp_path / "one", BASE, 4.0, "deformable_detr_scenes")
    two = write_run(tmp_path / "two", REGO, 4.5, "rego_deformable_detr_scenes")
    append(two, '{"kind": "tr')
    words = ["-y", f"runs: {json.dumps([str(one), str(two)])}", "-y", "labels: []", "-p", "metric", "AP50"]
    done = papermill_it(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    outputs = [o for c in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells for o in c.get("outputs", [])]
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "to reach AP50 80.0, the best of one" in said and "the last line (line 10) is cut off" in said
    assert "two: best AP50 90.0 after 3 of 3 epochs, 10.0 more than one." in said
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4


@pytest.mark.slow
def test_papermill_refuses_a_misspelt_parameter(tmp_path: Path):
    done = papermill_it(tmp_path, "-p", "metrics", "AP50")
    said = "UserError: unknown parameter 'metrics'; did you mean 'metric'?"
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == said
