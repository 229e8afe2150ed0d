"""What a reader has solved and written: kept in the folder ``mine/``, and used by the following chapters.

An exercise that builds a central module of the course (:data:`regolite.course.CENTRAL`) saves the reader's code as a
Python module when its checker passes. Later chapters fetch it::

    MultiHeadAttention = yours("1.5")  # your class, or the package's if you skipped the exercise

``python -m regolite progress`` prints a table of what is solved.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from regolite.errors import UserError
from regolite.utils.files import write_atomic

PACKAGE = "regolite_mine"
"""Name of the package that the reader's modules appear to be in."""

_fetched: dict[int, str] = {}  # id of an object that `fetch` returned -> number of its exercise
_settings = {"record": True, "use_mine": True}


def configure_progress(record: bool, use_mine: bool) -> None:
    """Set whether this process saves what is solved, and whether :func:`fetch` returns the reader's code."""
    _settings.update(record=record, use_mine=use_mine)


def folder() -> Path:
    """The folder of the reader's code: ``REGOLITE_MINE``, or ``mine/`` beside the course's ``notebooks/``."""
    if named := os.environ.get("REGOLITE_MINE"):
        return Path(named)
    here = Path.cwd()
    return next((up / "mine" for up in (here, *here.parents) if (up / "notebooks").is_dir()), here / "mine")


# ------------------------------------------------------------------------------------------------------- progress


def read_progress() -> dict[str, dict[str, Any]]:
    """What is solved: by the exercise's number, the day and the number of hints that were read.

    Raises:
        UserError: the file is damaged.
    """
    path = folder() / "progress.json"
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text("utf-8"))
        return {str(number): {"day": str(e["day"]), "hints": int(e["hints"])} for number, e in stored.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, and run the cells of solved exercises again"
        ) from None


def record(number: str, hints: int, answers: Sequence[Any], is_central: bool) -> str:
    """Save that an exercise is solved, and the code of a central one.

    Nothing is saved outside a notebook, where there is no cell to take the code from.

    Args:
        number: the exercise, ``"1.5"``.
        hints: how many hints were read.
        answers: what was checked; a central exercise has one, a class or function defined in a cell.
        is_central: whether the code is saved.

    Returns:
        A sentence about what was saved, possibly empty.
    """
    cells = _cells()
    if not _settings["record"] or cells is None:
        return ""
    said = ""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        if is_central:
            path = folder() / f"{_module_name(number)}.py"
            write_atomic(path, _module_source(number, answers[0], cells).encode())
            said = f"Saved as {path.parent.name}/{path.name}: the following chapters use it."
        solved = read_progress() | {number: {"day": time.strftime("%Y-%m-%d"), "hints": hints}}
        text = json.dumps(dict(sorted(solved.items(), key=lambda e: sort_key(e[0]))), indent=1)
        write_atomic(folder() / "progress.json", text.encode())
    except (UserError, OSError) as error:
        return f"Not saved: {error}"
    return said


def sort_key(number: str) -> tuple[int, ...]:
    """What sorts the numbers of exercises: 2.1 comes before 10.1."""
    return tuple(int(part) for part in number.split("."))


def _module_name(number: str) -> str:
    return "exercise_{:02}_{}".format(*sort_key(number))


# ------------------------------------------------------------------------------------------------- the reader's code


def fetch(number: str, reference: str, check: Callable[[Any], object]) -> Any:
    """The reader's answer to a central exercise if it is saved and still passes, otherwise the package's.

    Args:
        number: the exercise, ``"1.5"``.
        reference: module and name of the package's implementation, ``"regolite.models.rego:Stage"``.
        check: the checker of the exercise: the saved code may have been edited.
    """
    module, _, name = reference.partition(":")
    answer, said = getattr(importlib.import_module(module), name), f"the package's {name}"
    path = folder() / f"{_module_name(number)}.py"
    if _settings["use_mine"] and path.is_file():
        where = f"{path.parent.name}/{path.name}"
        try:
            own = getattr(_load(path), name)
            check(own)
            answer, said = own, f"your {name}, from {where}"
        except Exception as error:  # whatever the reader's file raises, the chapter can go on
            said += f". {where} no longer passes its check and was left out: {error}"
    print(f"Exercise {number}: {said}")
    _fetched[id(answer)] = number
    return answer


def _load(path: Path) -> ModuleType:
    """Import one of the reader's files."""
    name = f"{PACKAGE}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and jaxtyping look their module up
    spec.loader.exec_module(module)
    return module


def _cells() -> list[str] | None:
    """The cells that were run in this kernel, or None outside a notebook."""
    if "IPython" not in sys.modules:
        return None
    shell = sys.modules["IPython"].get_ipython()
    return None if shell is None else [str(cell) for cell in shell.user_ns.get("In", [])]


def _module_source(number: str, answer: Any, cells: Sequence[str]) -> str:
    """A Python module that defines ``answer`` on its own: its code, what it needs from other cells, and imports.

    Raises:
        UserError: the code uses a variable of the notebook that cannot be saved.
    """
    namespace: Mapping[str, Any] = sys.modules["__main__"].__dict__
    imports: set[str] = set()
    constants: list[str] = []
    definitions: dict[str, str] = {}
    todo = [answer.__name__]
    while todo:
        name = todo.pop(0)
        if name in definitions:
            continue
        source, uses = _definition(name, cells)
        definitions[name] = source
        for used in sorted(uses - set(definitions) - {name}):
            if used not in namespace:
                if not hasattr(builtins, used):
                    raise UserError(f"{name} uses `{used}`, which the notebook does not define")
                continue
            value = namespace[used]
            if id(value) in _fetched:
                imports.add("from regolite.course import yours")
                constants.append(f'{used} = yours("{_fetched[id(value)]}")')
            elif line := _import_line(used, value):
                imports.add(line)
            elif inspect.isclass(value) or inspect.isfunction(value):
                todo.append(used)
            elif isinstance(value, (bool, int, float, str, tuple, type(None))):
                constants.append(f"{used} = {value!r}")
            else:
                raise UserError(
                    f"{name} uses the notebook's variable `{used}`, which following chapters do not have: pass it as "
                    "an argument"
                )
    head = f'"""Exercise {number} of the course, solved on {time.strftime("%Y-%m-%d")}."""'
    first = "from __future__ import annotations"
    order = sorted(definitions, key=lambda n: n == answer.__name__)  # what it needs comes first
    parts = [head, first, "\n".join(sorted(imports)), "\n".join(dict.fromkeys(constants))]
    return "\n\n".join(filter(None, parts)) + "\n\n\n" + "\n\n\n".join(definitions[n] for n in order) + "\n"


def _definition(name: str, cells: Sequence[str]) -> tuple[str, set[str]]:
    """The latest definition of a class or function among the cells, and the global names that it uses."""
    for cell in reversed(cells):
        code = re.sub(r"^\s*[%!].*$", "", cell, flags=re.MULTILINE)  # IPython's own commands
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        for node in reversed(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
                own |= {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments) for a in _all_arguments(n)}
                own |= {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                return "\n".join(code.splitlines()[first - 1 : node.end_lineno]), {n.id for n in names} - own
    raise UserError(f"`{name}` is not defined in a cell of this notebook")


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    extra = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra]


def _import_line(name: str, value: Any) -> str | None:
    """The import statement that binds a library's object to a name, or None for the notebook's own objects."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
    module, attribute = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or module == "__main__" or module.startswith(PACKAGE) or not attribute:
        return None
    if getattr(sys.modules.get(module), attribute, None) is not value:
        return None
    return f"from {module} import {attribute}" + ("" if attribute == name else f" as {name}")


def table(numbers: Mapping[str, bool]) -> str:
    """A table of what is solved, by chapter.

    Args:
        numbers: all exercises; True for those that save a module.
    """
    solved, lines = read_progress(), [f"{'chapter':8} {'solved':>8}  {'hints':>5}  your modules"]
    chapters = sorted({number.split(".")[0] for number in numbers}, key=int)
    for chapter in chapters:
        own = [number for number in numbers if number.split(".")[0] == chapter]
        done = [number for number in own if number in solved]
        hints = sum(solved[number]["hints"] for number in done)
        central = [number for number in own if numbers[number]]
        names = ", ".join(f"{n} {'saved' if n in solved else '-'}" for n in central)
        lines.append(f"{chapter:>7}  {f'{len(done)} of {len(own)}':>8}  {hints:5}  {names}".rstrip())
    count = sum(number in solved for number in numbers)
    return "\n".join([*lines, f"{count} of {len(numbers)} exercises solved; code and progress lie in {folder()}"])
