"""How exercises are checked, whatever they ask: what is said to right answers, wrong ones and broken ones."""

from __future__ import annotations

import linecache

import pytest
import torch

from regolite import course
from regolite.course import Mistake, check, close, exercise, find, has_gradient, hint, same_shape
from regolite.errors import UserError


@pytest.fixture(autouse=True)
def one_exercise(monkeypatch):
    monkeypatch.setattr(course, "_EXERCISES", {})

    @exercise("99.1", "Multiply.", "By two.")
    def doubled(answer):
        x = torch.rand(3)
        close("the result", answer(x), 2 * x)
        return "Twice as much."


def test_right_answer_is_told_what_it_gained(capsys):
    check("99.1", lambda x: x + x)
    assert capsys.readouterr().out == "Exercise 99.1: solved. Twice as much.\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: x, "The result should be "),
        (lambda x: torch.zeros(2), "The result should have shape (3,), but has (2,)."),
        (lambda x: None, "The result should be a tensor, but is None."),
        (lambda x: 7, "The result should be a tensor, but is int."),
        (lambda x: 2 * x * float("nan"), "but is nan."),
        (lambda: 1, "Your code raised TypeError: "),
    ],
)
def test_wrong_answer_is_told_what_is_wrong(answer, said, capsys):
    check("99.1", answer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Exercise 99.1: not yet. ") and said in lines[0]
    assert lines[1] == 'If you are stuck: hint("99.1")'


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("query_mask has no effect.", "not yet. query_mask has"),
        ("self.ffn is missing.", "not yet. self.ffn is"),
        ("look(a, b) is None.", "not yet. look(a, b)"),
        ("the mask is inverted.", "not yet. The mask"),
    ],
)
def test_names_from_code_keep_their_small_letters(problem, said, capsys):
    @exercise("99.2", "None.")
    def refused(answer):
        raise Mistake(problem)

    check("99.2", None)
    assert said in capsys.readouterr().out


def test_missing_answer_is_no_error(capsys):
    def later(x):
        raise NotImplementedError

    check("99.1", later)
    assert "not yet. There is no answer yet." in capsys.readouterr().out


def test_the_learners_own_line_is_named(capsys, monkeypatch):
    code = compile("def answer(x):\n    return x.sum(dim=5)\n", "<ipython-input-1>", "exec")

    linecache.cache["<ipython-input-1>"] = (
        1,
        None,
        ["def answer(x):\n", "    return x.sum(dim=5)\n"],
        "<ipython-input-1>",
    )
    names: dict = {}
    exec(code, names)
    check("99.1", names["answer"])
    assert "(in the line `return x.sum(dim=5)`)" in capsys.readouterr().out


def test_checking_draws_nothing_from_the_notebooks_generator():
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    check("99.1", lambda x: 2 * x)
    assert torch.equal(torch.rand(2), wanted)


def test_hints_come_one_by_one_and_the_last_stays(capsys):
    for _ in range(3):
        hint("99.1")
    assert capsys.readouterr().out.splitlines() == [
        "Hint 1 of 2: Multiply.",
        "Hint 2 of 2: By two.",
        "Hint 2 of 2: By two.",
    ]


@pytest.mark.parametrize("number", ["99.7", "77.1", "x.y", "", "98"])
def test_unknown_exercise_is_named(number):
    with pytest.raises(UserError, match=f"no exercise '{number}'"):
        find(number)
    with pytest.raises(UserError, match="this notebook has 99.1"):
        find("99.7")


def test_an_exercise_needs_a_hint():
    with pytest.raises(ValueError, match="99.2 has no hint"):
        exercise("99.2")


def test_tools_of_checkers():
    same_shape("it", torch.zeros(2, 3), (2, 3))
    close("it", 0.5, 0.50001)
    with pytest.raises(Mistake, match=r"it should be 2.0000 at \[1, 0\], but is 5.0000"):
        close("it", torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0], [2.0]]))
    with pytest.raises(Mistake, match="you forgot the half"):
        close("it", 1.0, 0.5, but="you forgot the half")
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    has_gradient("x", x)
    with pytest.raises(Mistake, match="no gradient flows back to y"):
        has_gradient("y", x, y)
    x.grad[0] = float("nan")
    with pytest.raises(Mistake, match="has NaN"):
        has_gradient("x", x)
