"""The stacked bars of notebook 15."""

import pytest
from matplotlib.figure import Figure

from regolite.plots.cost import PART_COLORS, draw_parts


def test_bars_add_up_and_say_their_sum():
    ax = Figure().subplots()
    draw_parts(ax, {"small": {"backbone": 1.0, "REGO": 0.5}, "large": {"encoder": 10.0, "REGO": 0.1}}, "G")
    assert len(ax.patches) == 2 * len(PART_COLORS)
    ends = [
        max(bar.get_x() + bar.get_width() for bar in ax.patches if round(bar.get_y() + 0.31) == row) for row in (0, 1)
    ]
    assert ends == pytest.approx([1.5, 10.1])
    said = [text.get_text() for text in ax.texts]
    assert " 1.5 G" in said and " 10.1 G" in said
    assert "10.0" in said and "0.1" not in said  # a sliver is too narrow for its number
    assert [label.get_text() for label in ax.get_yticklabels()] == ["small", "large"]
    assert ax.get_legend_handles_labels()[1] == list(PART_COLORS)
