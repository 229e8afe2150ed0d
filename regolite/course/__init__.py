"""Self-checking exercises.

A notebook ends an exercise with ``check("1.2", softmax)``: notebook 01, exercise 2, and the learner's answer. The
checker reports success or, as precisely as possible, the error: shape, value, gradient. ``hint("1.2")`` prints a hint,
and a stronger one each time it is called.

The checkers of notebook 01 are in ``chapter_01.py``, and so on. Each is a function of the answer that raises
:class:`Mistake` or returns a concluding sentence::

    @exercise("1.2", "Divide by something before the softmax.", "By the square root of the number of channels.")
    def scaled(answer):
        same_shape("the weights", answer(q, k), (3, 5))
        close("the weights", answer(q, k), wanted)
        return "The variance of a product no longer grows with the channels."
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regolite.course import progress
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
    "yours",
]

CENTRAL = {
    "1.5": "regolite.models.attention:MultiHeadAttention",
    "3.4": "regolite.models.transformer:EncoderLayer",
    "3.5": "regolite.models.transformer:DecoderLayer",
    "5.5": "regolite.matching:match",
    "6.5": "regolite.losses:SetLoss",
    "9.5": "regolite.models.deformable_attention:DeformableAttention",
    "10.5": "regolite.models.glimpse:cut_glimpses",
    "11.3": "regolite.models.rego:Stage",
    "11.4": "regolite.models.rego:Rego",
    "12.4": "regolite.course.chapter_12:train_step",
}
"""The central exercises, whose answers later chapters use: number, and module and name of the reference."""

WIDTH = 110  # characters per line of a cell's output


class Mistake(Exception):  # noqa: N818
    """An error in an answer, as a sentence for the learner."""


@dataclass
class Exercise:
    """One exercise.

    Attributes:
        number: number of notebook and exercise, ``"1.2"``.
        checker: checks the answer; raises :class:`Mistake` or returns a comment on a correct one.
        hints: hints, the weakest first.
        given: number of hints already printed.
    """

    number: str
    checker: Callable[..., str]
    hints: tuple[str, ...]
    given: int = field(default=0)

    @property
    def reference(self) -> str | None:
        """For a central exercise, the module and name of the package's implementation."""
        return CENTRAL.get(self.number)

    def run(self, *answer: Any) -> str:
        """Run the checker. Its random numbers do not change those that the notebook draws later.

        Returns:
            The checker's comment on a correct answer.

        Raises:
            Mistake: the answer is wrong.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.checker(*answer)


_EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, *hints: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register the decorated function as the checker of an exercise.

    Args:
        number: number of notebook and exercise, ``"1.2"``.
        hints: hints, the weakest first; at least one.
    """
    if not hints:
        raise ValueError(f"exercise {number} has no hint")

    def register(checker: Callable[..., str]) -> Callable[..., str]:
        _EXERCISES[number] = Exercise(number, checker, hints)
        return checker

    return register


def find(number: str) -> Exercise:
    """The exercise with a number.

    Raises:
        UserError: if there is none.
    """
    chapter = number.split(".")[0]
    module = f"regolite.course.chapter_{chapter:0>2}"
    if chapter.isdecimal() and importlib.util.find_spec(module):
        importlib.import_module(module)
    if number not in _EXERCISES:
        known = ", ".join(n for n in _EXERCISES if n.split(".")[0] == chapter)
        raise UserError(f"there is no exercise {number!r}" + (f"; this notebook has {known}" if known else ""))
    return _EXERCISES[number]


def every_exercise() -> dict[str, Exercise]:
    """All exercises of the course by number, in order."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("chapter_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_EXERCISES.items(), key=lambda item: progress.sort_key(item[0])))


def yours(number: str) -> Any:
    """Your answer to a central exercise, or the package's implementation if you have not solved it.

    ``begin(use_mine=False)`` makes a whole notebook use the package's implementations.

    Args:
        number: number of notebook and exercise, ``"1.5"``.

    Returns:
        A class or function with the signature that the exercise specifies.

    Raises:
        UserError: if the exercise does not exist or is not a central one.
    """
    found = find(number)
    if found.reference is None:
        raise UserError(f"exercise {number} is not a central exercise: it saves no code for later chapters")
    return progress.fetch(number, found.reference, found.run)


def check(number: str, *answer: Any) -> None:
    """Check an answer and print the result.

    Args:
        number: number of notebook and exercise, ``"1.2"``.
        answer: the answer: a function, a class, a number, a tensor.
    """
    found = find(number)
    try:
        comment = found.run(*answer)
    except Mistake as mistake:
        problem = str(mistake)
    except NotImplementedError:
        problem = "there is no answer yet."
    except Exception as error:  # the learner's error is explained, not raised
        problem = f"your code raised {type(error).__name__}: {error}{_where(error)}"
    else:
        saved = progress.record(number, found.given, answer, found.reference is not None)
        print(textwrap.fill(f"Exercise {number}: solved. {comment} {saved}".rstrip(), WIDTH))
        return
    print(textwrap.fill(f"Exercise {number}: not yet. {_capitalized(problem)}", WIDTH))
    print(f'If you are stuck: hint("{number}")')


def _capitalized(sentence: str) -> str:
    """The sentence with a capital, unless it begins with a name from code, such as ``query_mask`` or ``look(x)``."""
    first = sentence.split(maxsplit=1)[0]
    is_code = re.search(r"_|[.(\[]\w", first)
    return sentence if is_code else sentence[0].upper() + sentence[1:]


def hint(number: str) -> None:
    """Print the next hint of an exercise, or the last one again."""
    found = find(number)
    found.given = min(found.given + 1, len(found.hints))
    print(textwrap.fill(f"Hint {found.given} of {len(found.hints)}: {found.hints[found.given - 1]}", WIDTH))


def same_shape(name: str, found: Any, wanted: Sequence[int]) -> None:
    """Raise a :class:`Mistake` if ``found`` is not a tensor of the expected shape."""
    if not isinstance(found, Tensor):
        raise Mistake(f"{name} should be a tensor, but is {'None' if found is None else type(found).__name__}.")
    if tuple(found.shape) != tuple(wanted):
        raise Mistake(f"{name} should have shape {tuple(wanted)}, but has {tuple(found.shape)}.")


def close(name: str, found: Any, wanted: Tensor | float, tolerance: float = 1e-4, but: str = "") -> None:
    """Raise a :class:`Mistake` at the largest difference, if values differ.

    Args:
        name: what is compared, such as "the weights".
        found: the learner's tensor or number.
        wanted: the correct one.
        tolerance: maximum difference.
        but: message of a known mistake, in place of the numbers.
    """
    wanted = torch.as_tensor(wanted).detach()
    if isinstance(found, (int, float)) and not wanted.ndim:
        found = torch.tensor(float(found))
    same_shape(name, found, wanted.shape)
    difference = (found.detach().double() - wanted.double()).abs().nan_to_num(nan=float("inf"))
    if wanted.numel() and float(difference.max()) > tolerance:
        place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), wanted.shape))
        at = f" at {list(place)}" if place else ""
        raise Mistake(
            but or f"{name} should be {float(wanted[place]):.4f}{at}, but is {float(found.detach()[place]):.4f}."
        )


def alike(found: Any, wanted: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether ``found`` has the shape and, within a tolerance, the values of ``wanted``; used to recognize mistakes."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


def has_gradient(name: str, *inputs: Tensor) -> None:
    """Raise a :class:`Mistake` if an input has no gradient, or one that is not finite."""
    for tensor in inputs:
        if tensor.grad is None or not tensor.grad.any():
            raise Mistake(f"no gradient flows back to {name}: an operation is detached or not differentiable.")
        if not tensor.grad.isfinite().all():
            raise Mistake(f"the gradient of {name} has NaN or infinite values.")


def _where(error: Exception) -> str:
    """The deepest line of the learner's code in the traceback, outside of libraries and this package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and ("ipykernel" in f.filename or f.filename.startswith("<ipython"))]
    return f" (in the line `{own[-1].line}`)" if own else ""
