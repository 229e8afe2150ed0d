"""The main notebook: its parameters are those of a run, and a wrong one is never trained with."""

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

from regolite.errors import UserError
from regolite.training import RunConfig
from regolite.training.notebook_parameters import read_parameters
from regolite.utils.validation import fits

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "20_train_coco.ipynb"
CELLS = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
PARAMETERS = CELLS["parameters"].source

# Where the notebook as it stands is a rehearsal of half a minute, and RunConfig has the paper's recipe.
REHEARSAL = {
    "data", "output", "checkpoint", "epochs", "batch_size", "lr", "sampling_lr_mult", "schedule", "warmup", "augment",
    "limit_images", "evaluate_every", "evaluate_start", "log_every",
}  # fmt: skip


def execute(*sources: str) -> dict[str, object]:
    """The globals after running cells."""
    namespace: dict[str, object] = {"Optional": Optional}
    for source in sources:
        exec(compile(source, "a cell", "exec", dont_inherit=True), namespace)
    return namespace


def run(*sources: str) -> dict[str, object]:
    """Run cells and read the parameters in the last one, as the notebook does."""
    return read_parameters(["", *sources, CELLS["check"].source], execute(*sources))


def configured(*sources: str) -> RunConfig:
    with unchecked():
        return RunConfig.of(run(*sources))


def test_the_parameters_are_the_fields_of_a_run():
    values = run(PARAMETERS)
    assert list(values) == [f.name for f in fields(RunConfig)], "one field a line, in the order of RunConfig"
    assert CELLS["parameters"].metadata["tags"] == ["parameters"]
    defaults = configured(PARAMETERS)
    differ = {f.name for f in fields(RunConfig) if getattr(defaults, f.name) != f.default}
    assert differ <= REHEARSAL, "a default of RunConfig has changed"


def test_the_parameters_are_annotated_as_the_fields_are():
    cell = ModuleType("cell")
    vars(cell).update(execute(PARAMETERS))
    annotations = typing.get_type_hints(cell)
    samples = {str: "any", int: 1, float: 0.5, bool: True, type(None): None, list[str]: ("any",), list[int]: (1,)}
    hints = typing.get_type_hints(RunConfig)
    for name, hint in ((f.name, hints[f.name]) for f in fields(RunConfig)):
        kinds = typing.get_args(annotations[name]) if fits(None, hint) else (annotations[name],)
        words = [word for literal in (hint, *typing.get_args(hint)) for word in literal_words(literal)]
        for kind in kinds:
            sample = words[0] if words and kind is str else samples[kind]
            assert fits(sample, hint), f"{name}: {kind}, but RunConfig has {hint}"


def literal_words(hint: object) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def test_papermill_explains_every_parameter():
    told = papermill.inspect_notebook(str(NOTEBOOK))
    assert set(told) == {f.name for f in fields(RunConfig)}
    for name, about in told.items():
        assert about["inferred_type_name"] != "None" and len(about["help"]) > 10, name


@pytest.mark.parametrize(
    ("injected", "said"),
    [
        ("epohcs = 3", "unknown parameter 'epohcs'; did you mean 'epochs'?"),
        ("epochs = 3\nlearning_rate = 0.1", "unknown parameter 'learning_rate'"),
        ('epochs = "many"', "epochs='many' is not a whole number"),
        ("epochs = 2.5", "epochs=2.5 is not a whole number"),
        ("overrides = [1]", "overrides=(1,) is not a list of texts"),
        ('schedule = "steps"', "schedule='steps' is not one of 'step', 'one_cycle', 'constant'"),
        ("lr = -1", "lr=-1 must be greater than 0"),
        ("max_minutes = float('inf')", "max_minutes=inf is not a number or nothing"),
    ],
)
def test_a_wrong_parameter_is_one_clear_error(injected: str, said: str):
    with pytest.raises(UserError) as error:
        configured(PARAMETERS, "# Parameters\n" + injected)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_right_parameters_are_taken():
    injected = "# Parameters\nepochs = 3\ndrop_epochs = [1, 2]\nlimit_images = None\nlr = 1"
    config = configured(PARAMETERS, injected)
    assert (config.epochs, config.drop_epochs, config.limit_images, config.lr) == (3, (1, 2), None, 1)


def test_what_the_notebook_computes_is_no_parameter():
    later = "config = dict()\nfolder = str(1)"
    assert configured(PARAMETERS, later, "number = 3"), "cells after the first that computes are the notebook's own"
    # The parameters cell was changed and run again, after all the rest.
    assert run(PARAMETERS, later, "epochs: int = 7")["epochs"] == 7
    with pytest.raises(UserError, match="'epoch'; did you mean 'epochs'"):
        configured(PARAMETERS, later, "lr: float = 0.1\nepoch = 7")


def test_parameters_must_have_been_run():
    with pytest.raises(UserError, match="run the parameters cell first"):
        read_parameters(["", "import regolite", "((("], {})


def test_the_check_comes_right_after_the_parameters():
    code = [cell.id for cell in CELLS.values() if cell.cell_type == "code"]
    assert (
        code[code.index("parameters") + 1] == "check" and "read_parameters(cells, globals())" in CELLS["check"].source
    )


@pytest.mark.slow
def test_papermill_refuses_a_misspelt_parameter(tmp_path: Path):
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "done.ipynb"), "-p", "epohcs", "3"]
    command += ["--cwd", str(NOTEBOOK.parent), "--no-progress-bar"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "UserError: unknown parameter 'epohcs'; did you mean 'epochs'?"
    assert not (tmp_path / "runs").exists()


def test_the_demo_passes_parameters_that_exist(tasks: ModuleType):
    from papermill.cli import _resolve_type

    given = {name: _resolve_type(str(value)) for name, value in tasks.RECIPE.items()}
    config = RunConfig.of(run(PARAMETERS) | given)
    assert config.limit_images is None and config.image_size is None, "the demo is no rehearsal"
    rehearsal = {"data", "output", "checkpoint", "max_minutes"}  # these are the demo's own options
    left = {name for name in REHEARSAL - rehearsal if name not in tasks.RECIPE}
    assert not left, "the demo says all that the rehearsal changes"


def test_the_demo_says_what_it_has_learned(tasks: ModuleType, tmp_path: Path):
    def line(step: int, split: str, *aps: float | None) -> str:
        stages = [{"stage": i, "AP": ap, "AP50": None if ap is None else 2 * ap} for i, ap in enumerate(aps)]
        return json.dumps({"kind": "evaluation", "split": split, "step": step, "images": 32, "stages": stages})

    metrics = tmp_path / "metrics.jsonl"
    lines = [line(0, "val", 3.0, 4.0), '{"kind": "train"}', line(50, "val", 3.5, 4.5), line(90, "val", 5.0, None)]
    metrics.write_text("\n".join([*lines, line(90, "train", 50.0, 60.0)]))
    first, *table = tasks.learned(metrics).splitlines()
    assert "32 validation images" in first and "90 steps" in first
    assert [row.split() for row in table] == [
        ["base", "detector", "stage", "1"],
        ["before", "3.0", "(6.0)", "4.0", "(8.0)"],
        ["after", "5.0", "(10.0)", "-", "(-)"],
    ]
