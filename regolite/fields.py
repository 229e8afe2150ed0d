"""Typed configuration: the values of a dataclass are checked against its annotations."""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from regolite.errors import UserError

T = TypeVar("T")


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
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check(config: Any) -> None:
    """Check the type of every field of a configuration.

    Raises:
        UserError: for a value of another type; the message says what the field takes.
    """
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if not fits(value, hints[f.name]):
            help = f" ({f.metadata['help']})" if "help" in f.metadata else ""
            raise UserError(f"{f.name}={value!r} is not {describe(hints[f.name])}{help}")


def checked(config: T, changes: dict[str, Any]) -> T:
    """A configuration with some fields changed, and checked; one value may stand for a list of one.

    Raises:
        UserError: as :func:`check`, and when the fields do not fit each other.
    """
    hints = typing.get_type_hints(type(config))
    single = [n for n, v in changes.items() if typing.get_origin(hints[n]) is tuple and not isinstance(v, tuple)]
    changes = changes | {name: (changes[name],) for name in single}
    try:
        changed = replace(config, **changes)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    check(changed)
    return changed


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
    if is_dataclass(hint):
        return f"a {hint.__name__}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return names[hint]
