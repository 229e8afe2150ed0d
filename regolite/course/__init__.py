"""Exercises that check themselves.

A notebook ends an exercise with ``check("1.2", softmax)``: notebook 01, exercise 2, and the learner's answer. The
checker says that it is solved, or what is wrong with it, as precisely as it can: the shape, the value, the gradient.
``hint("1.2")`` helps a little, and more each time it is called.

The checkers of notebook 01 are in ``chapter_01.py``, and so on; each is a function that gets the answer and raises
:class:`Mistake`, or returns a sentence that says what was gained::

    @exercise("1.2", "Divide by something before the softmax.", "By the square root of the number of channels.")
    def scaled(answer):
        same_shape("the weights", answer(q, k), (3, 5))
        close("the weights", answer(q, k), wanted)
        return "The variance of a product no longer grows with the channels."
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regolite.course.notebook import begin, show
from regolite.errors import UserError

__all__ = [
    "Exercise",
    "Mistake",
    "alike",
    "begin",
    "check",
    "close",
    "exercise",
    "find",
    "has_gradient",
    "hint",
    "same_shape",
    "show",
]

WIDTH = 110  # letters in a line: what a cell's output shows without breaking words


class Mistake(Exception):  # noqa: N818
    """What is wrong with an answer, in a sentence for the learner."""


@dataclass
class Exercise:
    """One exercise.

    Attributes:
        number: notebook and place in it, ``"1.2"``.
        checker: gets the answer; raises :class:`Mistake` or returns what to say to a right one.
        hints: from a nudge to nearly the answer.
        given: how many hints the learner has had.
    """

    number: str
    checker: Callable[..., str]
    hints: tuple[str, ...]
    given: int = field(default=0)


_EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, *hints: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register the function below as the checker of an exercise.

    Args:
        number: notebook and place in it, ``"1.2"``.
        hints: from a nudge to nearly the answer; at least one.
    """
    if not hints:
        raise ValueError(f"exercise {number} has no hint")

    def register(checker: Callable[..., str]) -> Callable[..., str]:
        _EXERCISES[number] = Exercise(number, checker, hints)
        return checker

    return register


def find(number: str) -> Exercise:
    """The exercise of a number.

    Raises:
        UserError: there is none.
    """
    chapter = number.split(".")[0]
    module = f"regolite.course.chapter_{chapter:0>2}"
    if chapter.isdecimal() and importlib.util.find_spec(module):
        importlib.import_module(module)
    if number not in _EXERCISES:
        known = ", ".join(n for n in _EXERCISES if n.split(".")[0] == chapter)
        raise UserError(f"there is no exercise {number!r}" + (f"; this notebook has {known}" if known else ""))
    return _EXERCISES[number]


def check(number: str, *answer: Any) -> None:
    """Say whether an answer is right, and if not, what is wrong with it.

    Args:
        number: notebook and place in it, ``"1.2"``.
        answer: what the exercise asks for: a function, a class, a number, a tensor.
    """
    asked = find(number)
    try:
        # What a checker draws at random must not change what the notebook draws after it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            gained = asked.checker(*answer)
    except Mistake as mistake:
        said = str(mistake)
    except NotImplementedError:
        said = "there is no answer yet."
    except Exception as error:  # whatever the learner's code raises is an answer to be explained, not a crash
        said = f"your code raised {type(error).__name__}: {error}{_where(error)}"
    else:
        print(textwrap.fill(f"Exercise {number}: solved. {gained}", WIDTH))
        return
    print(textwrap.fill(f"Exercise {number}: not yet. {said[0].upper()}{said[1:]}", WIDTH))
    print(f'If you are stuck: hint("{number}")')


def hint(number: str) -> None:
    """Print the next hint of an exercise; the last one again where there are no more."""
    asked = find(number)
    asked.given = min(asked.given + 1, len(asked.hints))
    print(textwrap.fill(f"Hint {asked.given} of {len(asked.hints)}: {asked.hints[asked.given - 1]}", WIDTH))


def same_shape(name: str, found: Any, wanted: Sequence[int]) -> None:
    """Raise a :class:`Mistake` where ``found`` is not a tensor of the wanted shape."""
    if not isinstance(found, Tensor):
        raise Mistake(f"{name} should be a tensor, and is {'nothing' if found is None else type(found).__name__}.")
    if tuple(found.shape) != tuple(wanted):
        raise Mistake(f"{name} should have shape {tuple(wanted)}, and has {tuple(found.shape)}.")


def close(name: str, found: Any, wanted: Tensor | float, tolerance: float = 1e-4, but: str = "") -> None:
    """Raise a :class:`Mistake` where values differ, naming the worst place.

    Args:
        name: what is compared, "the weights".
        found: the learner's tensor or number.
        wanted: the right one.
        tolerance: largest difference allowed.
        but: what to say in place of the numbers, where a checker knows the mistake.
    """
    wanted = torch.as_tensor(wanted).detach()
    if isinstance(found, (int, float)) and not wanted.ndim:
        found = torch.tensor(float(found))
    same_shape(name, found, wanted.shape)
    difference = (found.detach().double() - wanted.double()).abs().nan_to_num(nan=float("inf"))
    if wanted.numel() and float(difference.max()) > tolerance:
        place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), wanted.shape))
        at = f" at {list(place)}" if place else ""
        raise Mistake(but or f"{name} should be {float(wanted[place]):.4f}{at}, and is {float(found[place]):.4f}.")


def alike(found: Any, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether ``found`` has the shape and, within a tolerance, the values of ``wanted``; so a mistake is recognized."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    pair = (tensor.detach().double().cpu() for tensor in (found, wanted))
    return torch.allclose(*pair, rtol=tolerance, atol=tolerance)


def has_gradient(name: str, *inputs: Tensor) -> None:
    """Raise a :class:`Mistake` where no gradient reached the inputs, or one that is not a number."""
    for tensor in inputs:
        if tensor.grad is None or not tensor.grad.any():
            raise Mistake(f"no gradient flows back to {name}: something on the way is detached or not differentiable.")
        if not tensor.grad.isfinite().all():
            raise Mistake(f"the gradient that reaches {name} holds NaN or infinity.")


def _where(error: Exception) -> str:
    """The learner's own line that raised, the deepest that is neither a library's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and ("ipykernel" in f.filename or f.filename.startswith("<ipython"))]
    return f" (in the line `{own[-1].line}`)" if own else ""
