"""Validated configuration: the values of a dataclass are checked against its annotations and :data:`BOUNDS`.

Configurations come from users and from untrusted files. Each is a :class:`Checked`, so that an invalid value is refused
before it is used.
"""

from __future__ import annotations

import math
import os
import reprlib
import types
import typing
from dataclasses import Field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from regolite.errors import UserError, did_you_mean

BOUNDS: dict[str, tuple[float, float]] = {
    "dim": (1, 4096), "heads": (1, 256), "ffn_dim": (1, 65_536), "encoder_layers": (0, 100), "decoder_layers": (1, 100),
    "queries": (1, 10_000), "patterns": (0, 100), "points": (1, 64), "levels": (1, 8), "stages": (0, 20),
    "num_classes": (1, 100_000), "image_size": (1, 10_000), "frozen_stages": (0, 5),
    "dynamic_dim": (1, 4096), "class_layers": (0, 100), "box_layers": (0, 100),
    "patches": (1, 1000), "patch_size": (32, 1000), "mask_ratio": (0, 1),
    "dropout": (0, 1), "norm_eps": (0, 1), "beta": (0, 1000), "alphas": (0, 100),
    "label": (0, 1e6), "l1": (0, 1e6), "giou": (0, 1e6), "no_object": (0, 1e6), "base_label": (0, 1e6),
    "label_cost": (0, 1e6), "l1_cost": (0, 1e6), "giou_cost": (0, 1e6), "focal_alpha": (0, 1), "focal_gamma": (0, 100),
    "proposals_per_object": (1, 1000), "lr": (-math.inf, 1000), "backbone_lr_mult": (0, 1000),
    "sampling_lr_mult": (0, 1000), "weight_decay": (0, 1000),
}  # fmt: skip
"""The least and the largest value of a field, or of each item of a list field, in any configuration.

The upper bounds are far beyond any useful model: they keep a file from requesting a million layers.
"""


class Checked:
    """Base class of dataclasses whose values are converted and checked on creation.

    NumPy scalars become Python numbers, lists and arrays become tuples, and paths become strings.

    Raises:
        UserError: a value has the wrong type or is out of bounds; the message names the field.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # subclasses are dataclasses

    def __post_init__(self) -> None:
        """Convert, then check."""
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))  # most configurations are frozen
        check(self)


T = TypeVar("T", bound=Checked)


def plain(value: Any) -> Any:
    """Convert a value to plain Python: numbers for NumPy scalars, tuples for lists and arrays, strings for paths."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def from_values(kind: type[T], values: dict[str, Any]) -> T:
    """Build a configuration from names and values, as a notebook's parameters; lists become tuples.

    Args:
        kind: its dataclass.
        values: the value of each field.

    Raises:
        UserError: an unknown name (the message suggests the closest match).
    """
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown parameter {name!r}; {did_you_mean(name, sorted(known))}")
    return kind(**{name: plain(value) for name, value in values.items()})


def check(config: Checked) -> None:
    """Check the type and the bounds of every field of a configuration.

    Raises:
        UserError: a value has the wrong type or is out of bounds; the message says what the field takes.
    """
    hints = _hints(config)
    for f in fields(config):
        value = getattr(config, f.name)
        if not fits(value, hints[f.name]):
            help = f" ({f.metadata['help']})" if "help" in f.metadata else ""
            raise UserError(f"{f.name}={shown(value)} is not {describe(hints[f.name])}{help}")
        check_bounds(f.name, value)


def check_bounds(name: str, value: Any) -> None:
    """Check a value, or each item of a tuple, against :data:`BOUNDS`; None always passes.

    Raises:
        UserError: the value is out of bounds.
    """
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, (int, float)) and not low <= one <= high:
            least = "must not be negative" if low == 0 else f"must be at least {low:g}"
            raise UserError(f"{name}={shown(value)} {least if one < low else f'must be at most {high:g}'}")


def of_kind(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    """Check the class of an argument.

    Args:
        name: name of the argument.
        value: the argument.
        kind: its class or classes.
        words: the class in words, and how to get an instance.

    Raises:
        UserError: the argument is an instance of another class.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}={shown(value)} is not {words}")


def whole(name: str, value: Any, low: int | None = None) -> int:
    """Check an integer argument (NumPy's too): within the bounds of its name and at least ``low``.

    Raises:
        UserError: any other value; the message names the argument.
    """
    value = plain(value)
    if not fits(value, int):
        raise UserError(f"{name}={shown(value)} is not a whole number")
    if low is not None and value < low:
        raise UserError(f"{name}={value} must be at least {low}")
    check_bounds(name, value)
    return value


def share(name: str, value: Any) -> float:
    """Check an argument that is a number from 0 to 1, as a score or a probability.

    Raises:
        UserError: any other value; the message names the argument.
    """
    value = plain(value)
    if not fits(value, float) or not 0 <= value <= 1:
        raise UserError(f"{name}={shown(value)} must be a number from 0 to 1")
    return float(value)


def shown(value: Any) -> str:
    """Abbreviate a value for a message."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _hints(config: Checked) -> dict[str, Any]:
    return _hints_of(type(config))  # type: ignore[arg-type]  # mypy does not know that classes are hashable


@cache
def _hints_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def checked(config: T, changes: dict[str, Any]) -> T:
    """Copy a configuration with some fields changed, and check it; a single value may stand for a list of one.

    Raises:
        UserError: as :func:`check`, or the fields are inconsistent.
    """
    hints = _hints(config)
    changes = {name: plain(value) for name, value in changes.items()}
    single = [n for n, v in changes.items() if typing.get_origin(hints[n]) is tuple and not isinstance(v, tuple)]
    changes = changes | {name: (changes[name],) for name in single}
    return replace(config, **changes)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; an int is accepted as a float."""
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
        plurals = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {plurals[arguments[0]]}"
    if isinstance(hint, type) and issubclass(hint, Checked):
        return f"a {hint.__name__}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return names[hint]
