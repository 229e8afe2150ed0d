"""What a reader solves is saved, and later chapters use it."""

from __future__ import annotations

import json

import nbclient
import nbformat
import pytest
import torch
from torch import nn

from regolite import course
from regolite.course import progress
from regolite.course.notebook import begin
from regolite.errors import UserError

REGISTER = """
import math
import torch
import torch.nn.functional as F
from torch import nn
from regolite.course import CENTRAL, begin, check, exercise, yours
begin(record={record})

CENTRAL.update({{"98.1": "torch.nn:Linear", "98.2": "torch.nn:Sequential"}})

@exercise("98.1", "It is a class with one weight.")
def linear(answer):
    assert answer(3, 4)(torch.ones(2, 3)).shape == (2, 4)
    return "Good."

@exercise("98.2", "It uses the layer of 98.1.")
def sequential(answer):
    assert answer()(torch.ones(2, 3)).shape == (2, 4)
    return "Good."
"""
HELPER = """
SCALE = 2.0

def doubled(x):
    return SCALE * x * math.sqrt(1.0)  # a comment that stays
"""
LINEAR = """
class Linear(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(b, a))

    def forward(self, x):
        return F.linear(doubled(x), self.weight)

check("98.1", Linear)
"""
SEQUENTIAL = """
class Sequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(3, 4)

    def forward(self, x):
        return self.layer(x)

check("98.2", Sequential)
"""


def run(monkeypatch, mine, *sources: str, record: bool = True) -> list[str]:
    """Run cells in a kernel of their own; what each prints."""
    monkeypatch.setenv("REGOLITE_MINE", str(mine))
    cells = [nbformat.v4.new_code_cell(source) for source in (REGISTER.format(record=record), *sources)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook).execute()
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("REGOLITE_MINE", str(tmp_path / "mine"))
    yield
    begin()


@pytest.mark.slow
def test_code_is_saved_with_what_it_needs_and_used_by_later_chapters(monkeypatch, tmp_path):
    said = run(monkeypatch, tmp_path, HELPER, LINEAR)[-1]
    assert "solved" in said and "exercise_98_1.py" in said
    stored = (tmp_path / "exercise_98_1.py").read_text()
    assert "SCALE = 2.0" in stored and "# a comment that stays" in stored and "check(" not in stored

    later = 'Linear = yours("98.1")\nprint(Linear(3, 4)(torch.ones(1, 3)).tolist())'
    *_, fetched, said = run(monkeypatch, tmp_path, later, SEQUENTIAL)
    assert "your Linear" in fetched and "[[6.0, 6.0, 6.0, 6.0]]" in fetched
    assert 'Linear = yours("98.1")' in (tmp_path / "exercise_98_2.py").read_text(), "the newest is used"
    assert list(json.loads((tmp_path / "progress.json").read_text())) == ["98.1", "98.2"]

    (tmp_path / "exercise_98_1.py").write_text("class Linear:\n    pass\n")
    [_, said] = run(monkeypatch, tmp_path, 'print(yours("98.1"))')
    assert "the package's Linear" in said and "no longer passes" in said and "torch.nn" in said


@pytest.mark.slow
def test_what_cannot_be_saved_is_said(monkeypatch, tmp_path):
    bound = LINEAR.replace("doubled(x)", "x * factors")
    said = run(monkeypatch, tmp_path, "factors = torch.ones(3)", bound)[-1]
    assert "solved" in said and "Not saved" in said and "`factors`" in said
    assert not list(tmp_path.glob("exercise_*"))
    said = run(monkeypatch, tmp_path / "none", HELPER, LINEAR, record=False)[-1]
    assert "solved" in said and "Saved" not in said and not (tmp_path / "none").exists()


@pytest.fixture
def central(monkeypatch):
    monkeypatch.setitem(course.CENTRAL, "98.1", "torch.nn:Linear")
    monkeypatch.setitem(course._EXERCISES, "98.1", course.Exercise("98.1", lambda answer: "", ("a hint",)))


def test_the_package_stands_in_for_what_is_not_solved(central, capsys):
    assert course.yours("98.1") is nn.Linear
    assert capsys.readouterr().out == "Exercise 98.1: the package's Linear\n"


def test_a_switch_leaves_own_code_out(central, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "exercise_98_1.py").write_text("class Linear:\n    own = True\n")
    assert course.yours("98.1").own
    begin(use_mine=False)
    assert course.yours("98.1") is nn.Linear


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no exercise '1.99'"):
        course.yours("1.99")
    with pytest.raises(UserError, match="not a central exercise"):
        course.yours("1.1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "progress.json").write_text("[1")
    with pytest.raises(UserError, match="is damaged"):
        progress.read_progress()


def test_nothing_is_recorded_outside_a_notebook(tmp_path):
    assert progress.record("1.1", 0, (torch.relu,), is_central=False) == ""
    assert not (tmp_path / "mine").exists()


def test_table_counts_by_chapter(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "progress.json").write_text(json.dumps({"2.1": {"day": "2026-01-01", "hints": 2}}))
    lines = progress.table({"1.1": False, "2.1": True, "10.1": True}).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["1", "0", "of", "1", "0"],
        ["2", "1", "of", "1", "2", "2.1", "saved"],
        ["10", "0", "of", "1", "0", "10.1", "-"],
    ]
    assert lines[4].startswith("1 of 3 exercises solved")
