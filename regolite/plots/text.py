"""User-provided text in figures: names of classes, files and runs are drawn literally.

By default matplotlib reads text between ``$`` as a formula, leaves labels that begin with ``_`` out of legends, and
uses a font without Chinese, Japanese and Korean characters.
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
"""Common system fonts with Chinese, Japanese or Korean characters."""


def as_is() -> dict[str, Any]:
    """Keyword arguments for matplotlib texts that are drawn literally."""
    return {"parse_math": False, "fontfamily": [*rcParams["font.family"], *_further_fonts()]}


def drawable(text: str) -> str:
    """Replace lone surrogates (in file names that are not UTF-8) by ``?``, control characters by U+FFFD.

    No font can draw either; line breaks stay.
    """
    controls = {code: "\ufffd" for code in range(32) if chr(code) != "\n"}
    return text.encode("utf-8", "replace").decode().translate(controls)


def legend_as_is(legend: Legend) -> None:
    """Draw the labels of a legend literally."""
    for text in legend.get_texts():
        text.set(**as_is())


def label_as_is(name: str) -> str:
    """A name as a legend label, also if it begins with ``_``."""
    name = drawable(name)
    return f"\u2060{name}" if name.startswith("_") else name


@cache
def _further_fonts() -> tuple[str, ...]:
    """The installed fonts of :data:`CJK`, as fallbacks."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in CJK if name in there)
