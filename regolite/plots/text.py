"""Words of others in figures: names of classes, files and runs are drawn as they are.

To matplotlib a pair of ``$`` holds a formula, a label that begins with ``_`` is no entry of a legend, and its own font
has neither Chinese nor Japanese nor Korean characters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from matplotlib import font_manager, rcParams
from matplotlib.legend import Legend

CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei",
    "SimHei", "Yu Gothic", "Malgun Gothic", "PingFang SC", "PingFang HK", "Hiragino Sans", "Apple SD Gothic Neo",
    "Arial Unicode MS",
)  # fmt: skip
"""Fonts with Chinese, Japanese or Korean characters, as systems have them."""


def as_is() -> dict[str, Any]:
    """Keyword arguments of ``Axes.text`` and the like for words of others."""
    return {"parse_math": False, "fontfamily": [*rcParams["font.family"], *_further_fonts()]}


def legend_as_is(legend: Legend) -> None:
    """Let a legend say its labels as they are."""
    for text in legend.get_texts():
        text.set(**as_is())


def label_as_is(name: str) -> str:
    """A name as a label: matplotlib leaves those out that begin with ``_``."""
    return f"\u2060{name}" if name.startswith("_") else name


@cache
def _further_fonts() -> tuple[str, ...]:
    """The fonts that are asked for what the first has not: of :data:`CJK` those that there are."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in CJK if name in there)
