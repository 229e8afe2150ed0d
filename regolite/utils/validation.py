"""Typed and bounded configuration: the values of a dataclass are checked against its annotations and :data:`BOUNDS`.

Configurations come from people, and from files that anybody may have written. Every one of them is a :class:`Checked`,
so that a wrong value is refused before anything is made of it.
"""

from __future__ import annotations

import difflib
import math
import os
import reprlib
import types
import typing
from dataclasses import fields, replace
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np

from regolite.errors import UserError

T = TypeVar("T")

BOUNDS: dict[str, tuple[float, float]] = {
    "dim": (1, 4096), "heads": (1, 256), "ffn_dim": (1, 65_536), "encoder_layers": (0, 100), "decoder_layers": (1, 100),
    "queries": (1, 10_000), "patterns": (0, 100), "points": (1, 64), "levels": (1, 8), "stages": (0, 20),
    "num_classes": (1, 100_000), "image_size": (1, 10_000), "frozen_stages": (0, 5),
    "dropout": (0, 1), "norm_eps": (0, 1), "beta": (0, 1000), "alphas": (0, 100),
    "label": (0, 1e6), "l1": (0, 1e6), "giou": (0, 1e6), "no_object": (0, 1e6), "base_label": (0, 1e6),
    "proposals_per_object": (1, 1000), "lr": (-math.inf, 1000), "backbone_lr_mult": (0, 1000),
    "sampling_lr_mult": (0, 1000), "weight_decay": (0, 1000),
}  # fmt: skip
"""The least and the largest value of a field, or of each value in its list, in whichever configuration it is.

The largest ones are far beyond what anybody trains: they keep a file from asking for a million layers.
"""


class Checked:
    """A configuration whose values are converted and checked when it is made.

    numpy's numbers become Python's, lists and arrays become tuples, and paths become text.

    Raises:
        UserError: for a value of another type or beyond its bounds; the message names the field.
    """

    def __post_init__(self) -> None:
        """Convert, then check."""
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))  # most configurations are frozen
        check(self)


def plain(value: Any) -> Any:
    """A value as Python and JSON have it: no numpy numbers, tuples for lists and arrays, texts for paths."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def from_values(kind: type[T], values: dict[str, Any]) -> T:
    """A configuration from names and values, as a notebook's parameters are; lists are taken for tuples.

    Args:
        kind: its dataclass.
        values: the value of each field.

    Raises:
        UserError: for an unknown name (the message names the nearest right one).
    """
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(known))}"
            raise UserError(f"unknown parameter {name!r}; {hint}")
    return kind(**{name: plain(value) for name, value in values.items()})


def check(config: Any) -> None:
    """Check the type of every field of a configuration, and its bounds.

    Raises:
        UserError: for a value of another type or beyond its bounds; the message says what the field takes.
    """
    hints = _hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if not fits(value, hints[f.name]):
            help = f" ({f.metadata['help']})" if "help" in f.metadata else ""
            raise UserError(f"{f.name}={shown(value)} is not {describe(hints[f.name])}{help}")
        check_bounds(f.name, value)


def check_bounds(name: str, value: Any) -> None:
    """Check a value, or each value of a tuple, against :data:`BOUNDS`; None is within all of them.

    Raises:
        UserError: beyond them.
    """
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, (int, float)) and not low <= one <= high:
            least = "must not be negative" if low == 0 else f"must be at least {low:g}"
            raise UserError(f"{name}={shown(value)} {least if one < low else f'must be at most {high:g}'}")


def of_kind(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    """Check what kind of thing an argument is.

    Args:
        name: of the argument.
        value: the argument.
        kind: what it must be an instance of.
        words: what that is, and how to come by one.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}={shown(value)} is not {words}")


def whole(name: str, value: Any, low: int | None = None) -> int:
    """An argument that is a whole number, numpy's too, within the bounds of its name and at least ``low``.

    Raises:
        UserError: another value; the message names the argument.
    """
    value = plain(value)
    if not fits(value, int):
        raise UserError(f"{name}={shown(value)} is not a whole number")
    if low is not None and value < low:
        raise UserError(f"{name}={value} must be at least {low}")
    check_bounds(name, value)
    return value


def share(name: str, value: Any) -> float:
    """An argument that is a number from 0 to 1, as a score or a probability.

    Raises:
        UserError: another value; the message names the argument.
    """
    value = plain(value)
    if not fits(value, float) or not 0 <= value <= 1:
        raise UserError(f"{name}={shown(value)} must be a number from 0 to 1")
    return float(value)


def shown(value: Any) -> str:
    """A value in a message: one line, of a length that can be read."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def checked(config: T, changes: dict[str, Any]) -> T:
    """A configuration with some fields changed, and checked; one value may stand for a list of one.

    Raises:
        UserError: as :func:`check`, and when the fields do not fit each other.
    """
    hints = _hints(type(config))
    changes = {name: plain(value) for name, value in changes.items()}
    single = [n for n, v in changes.items() if typing.get_origin(hints[n]) is tuple and not isinstance(v, tuple)]
    changes = changes | {name: (changes[name],) for name in single}
    return replace(config, **changes)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; an int may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, arguments[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Checked):
        return f"a {hint.__name__}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return names[hint]
