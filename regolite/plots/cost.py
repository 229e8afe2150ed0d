"""The figures of notebook 15: the cost of each part of a detector, as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from regolite.plots.drawing import BLUE, GRAY, INK, ORANGE, PURPLE, SKY, VERMILLION

PART_COLORS = {
    "backbone": GRAY,
    "pyramid": PURPLE,
    "encoder": BLUE,
    "decoder": SKY,
    "heads and queries": ORANGE,
    "REGO": VERMILLION,
}
"""The parts of a detector, in the order in which an image passes through them."""


def draw_parts(ax: Axes, rows: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Stacked bars: one row per model, one color per part, the sum at the end.

    Args:
        ax: where to draw.
        rows: the cost of each part, by model name; missing parts cost nothing.
        unit: unit of the sum.
    """
    longest = max(sum(parts.values()) for parts in rows.values())
    for row, parts in enumerate(rows.values()):
        start = 0.0
        for part, color in PART_COLORS.items():
            share = parts.get(part, 0.0)
            ax.barh(row, share, left=start, color=color, height=0.62, edgecolor="white", label=None if row else part)
            if share > 0.045 * longest:
                ink = INK if color in (ORANGE, SKY, PURPLE) else "white"
                ax.text(start + share / 2, row, f"{share:.1f}", ha="center", va="center", fontsize=8, color=ink)
            start += share
        ax.text(start, row, f" {start:.1f} {unit}", va="center", fontsize=9, fontweight="bold", color=INK)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9)
    ax.set_xlim(0, 1.12 * longest)
    ax.invert_yaxis()
    ax.grid(visible=False)
