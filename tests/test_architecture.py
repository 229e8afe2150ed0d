"""The import graph of the package: rooms in layers, where every import looks down, and no cycle of modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "regolite"

LAYERS = (
    {"errors"},
    {"utils"},
    {"types", "boxes", "ops"},
    {"matching"},
    {"denoising"},
    {"losses"},
    {"models"},
    {"data"},
    {"interop"},
    {"checkpoint"},
    {"loading"},
    {"inference"},
    {"tracing"},
    {"evaluation", "explaining", "exporting"},
    {"hub", "plots"},
    {"viewers", "training"},
    {"paper"},
    {"course"},
    {"cli"},
    {"__main__"},
)
"""From the bottom to the top; a room imports from layers below its own."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """The file or folder at the root of the package that holds a module."""
    return module.split(".")[1]


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of the package that a statement imports."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "regolite":
        for name in node.names:
            full = f"{node.module}.{name.name}"
            yield full if full in MODULES else node.module
    elif isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name.split(".")[0] == "regolite")


def imports(module: str) -> set[str]:
    """All modules of the package that a module imports, wherever in its code; not for type checkers alone."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    return {target for node in ast.walk(tree) for target in imported(node)} - {module, "regolite"}


INSIDE = [module for module in MODULES if module != "regolite"]  # the package itself imports on first use


def test_every_room_has_a_layer():
    assert {room(module) for module in INSIDE} == set(LEVEL)


@pytest.mark.parametrize("module", INSIDE)
def test_imports_look_down(module: str):
    for target in imports(module):
        same = room(target) == room(module)
        assert same or LEVEL[room(target)] < LEVEL[room(module)], f"{module} imports {target}, which is above it"


def test_no_cycle_of_modules():
    TopologicalSorter({module: imports(module) for module in INSIDE}).prepare()  # raises CycleError, which names it


@pytest.mark.parametrize("module", [module for module in INSIDE if room(module) != "cli"])
def test_no_import_hides_in_a_function(module: str):
    """The command line imports what each command needs; a training that draws no figure needs no matplotlib."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            hidden = {target for node in ast.walk(function) for target in imported(node)}
            allowed = {"regolite.plots.run"} if module == "regolite.training.loop" else set()
            assert hidden <= allowed, f"{module}, line {function.lineno}"
