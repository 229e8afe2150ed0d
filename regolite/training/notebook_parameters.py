"""The parameters of a notebook, read so that a misspelt one cannot pass unseen.

papermill puts a cell with what it was told after the parameters cell. A name that the notebook does not know,
``epohcs = 3``, is nothing but one more variable there, and the notebook would train with its defaults.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from regolite.errors import UserError


def watch_cells() -> list[str]:
    """A list to which this notebook adds the source of every cell that is run from now on."""
    from IPython import get_ipython

    cells: list[str] = []
    # Not IPython's own history: nbval runs cells without it.
    get_ipython().events.register("pre_run_cell", lambda info: cells.append(info.raw_cell))
    return cells


def read_parameters(cells: Sequence[str], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """All names that the parameters cell set, and papermill's cell after it, with their values.

    The parameters cell is the last one that annotates a variable, as in ``epochs: int = 50``; what follows it counts as
    long as it does nothing but set names to literals, as papermill's cell does.

    Args:
        cells: sources of the cells that were run, in order, from :func:`watch_cells`.
        namespace: the notebook's ``globals()``.

    Raises:
        UserError: when no parameters cell was run.
    """
    parsed = [_parse(source) for source in cells]
    annotated = [n for n, cell in enumerate(parsed) if any(isinstance(line, ast.AnnAssign) for line in cell)]
    if not annotated:
        raise UserError("no parameters yet: run the parameters cell first")
    names = _assigned(parsed[annotated[-1]])
    for cell in parsed[annotated[-1] + 1 :]:
        if not all(isinstance(line, ast.Assign) and _is_literal(line.value) for line in cell):
            break
        names += _assigned(cell)
    return {name: namespace[name] for name in dict.fromkeys(names)}


def _parse(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell that was run and failed so
        return []


def _assigned(cell: Sequence[ast.stmt]) -> list[str]:
    """The names that a cell sets at its top level."""
    targets: list[ast.expr] = []
    for line in cell:
        targets += line.targets if isinstance(line, ast.Assign) else []
        targets += [line.target] if isinstance(line, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return isinstance(value, ast.Call) and ast.unparse(value.func) == "float"  # papermill's way to say infinity
    return True
