"""Translation of weight names between two implementations of a model, in both directions.

A :class:`Pair` maps a prefix of our names to a prefix of theirs; the rest of a name (``weight``, ``bias``, or the names
inside a network) is the same. If one implementation stores in one tensor what the other stores in several, the pair
lists the several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regolite.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A prefix of our names and a prefix of theirs.

    Attributes:
        ours: our prefix; several if their one tensor is ours concatenated along ``dim``.
        theirs: their prefix; several if they store the same tensor under several names.
        dim: the dimension of the concatenation.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    dim: int = 0

    def names(self, wanted: Mapping[str, Tensor]) -> list[tuple[list[str], list[str]]]:
        """Our names and their names of each weight that this pair translates."""
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        rests = [key.removeprefix(ours[0]) for key in wanted if key.startswith(ours[0])]
        return [([o + rest for o in ours], [t + rest for t in theirs]) for rest in rests]


def from_theirs(
    theirs: Mapping[str, Tensor], pairs: Sequence[Pair], wanted: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Translate a state dict to our names.

    Args:
        theirs: weights by their names.
        pairs: the table.
        wanted: the state dict of our model, with the expected names and shapes.
        source: name of the weights in error messages.

    Raises:
        UserError: weights are missing, unknown, of another shape, or differ although they must be equal. The message
            has the number of each and the first names.
    """
    found: dict[str, Tensor] = {}
    missing, misshaped, used = [], [], set()
    for pair in pairs:
        for ours, names in pair.names(wanted):
            used.update(names)
            absent = [name for name in names if name not in theirs]
            if absent:
                missing += absent
                continue
            whole = theirs[names[0]]
            shape = list(wanted[ours[0]].shape)
            if len(ours) > 1:
                shape[pair.dim] = sum(wanted[name].shape[pair.dim] for name in ours)
            if list(whole.shape) != shape:
                misshaped.append(f"{names[0]} is {tuple(whole.shape)} and should be {tuple(shape)}")
                continue
            if not all(torch.equal(theirs[name], whole) for name in names[1:]):
                raise UserError(f"{source}: {', '.join(names)} should be the same tensor, but they differ")
            parts = whole.split([wanted[name].shape[pair.dim] for name in ours], pair.dim) if len(ours) > 1 else [whole]
            found.update(zip(ours, parts))
    unknown = [name for name in theirs if name not in used]
    kinds = [("missing", missing), ("unknown", unknown), ("misshaped", misshaped)]
    wrong = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
    if wrong:
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong)}")
    return {name: found[name].detach().clone() for name in wanted}


def to_theirs(ours: Mapping[str, Tensor], pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Translate our state dict to their names."""
    theirs: dict[str, Tensor] = {}
    for pair in pairs:
        for parts, names in pair.names(ours):
            whole = torch.cat([ours[name] for name in parts], pair.dim) if len(parts) > 1 else ours[parts[0]]
            theirs.update({name: whole.detach().clone() for name in names})
    return theirs


def _some(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
