"""Each checker refuses at least five wrong answers: counted over a chapter's whole file of tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regolite.course import Mistake, every_exercise

WRONG_ANSWERS = 5

partial: set[Path] = set()
"""Files of which an option, such as -k or -m, leaves out tests."""


def pytest_deselected(items: list[pytest.Item]) -> None:
    partial.update(item.path for item in items)


def counting(checker: Callable[..., str], refused: dict) -> Callable[..., str]:
    """The checker, which also adds each wrong answer to ``refused``."""

    def check(*answer: Any) -> str:
        try:
            return checker(*answer)
        except Mistake:
            # By identity or, for data, by value. The answers are kept, because an identity is used again otherwise.
            refused[tuple(id(part) if callable(part) else repr(part) for part in answer)] = answer
            raise

    return check


@pytest.fixture(scope="module", autouse=True)
def enough_wrong_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail at the end of a chapter's file if a checker has refused too few different answers."""
    chapter = re.fullmatch(r"test_chapter_0?(\d+)", request.path.stem)
    found = {n: e for n, e in every_exercise().items() if chapter and n.split(".")[0] == chapter[1]}
    refused: dict[str, dict] = {number: {} for number in found}
    with pytest.MonkeyPatch.context() as patch:
        for number, exercise in found.items():
            patch.setattr(exercise, "checker", counting(exercise.checker, refused[number]))
        yield
    selected = request.path in partial or any("::" in argument for argument in request.config.args)
    if selected or request.session.testsfailed:
        return
    few = {number: len(answers) for number, answers in refused.items() if len(answers) < WRONG_ANSWERS}
    assert not few, f"wrong answers that the tests try, fewer than {WRONG_ANSWERS} for each exercise: {few}"
