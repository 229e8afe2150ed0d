"""How Sphinx makes the book (``make book``); ``book/build.py`` prepares its sources."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from sphinx.application import Sphinx

project = "regolite"
author = "The regolite authors"
copyright = "The regolite authors, Apache License 2.0"
release = metadata.version("regolite")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
autodoc_typehints = "none"  # the docstrings say what arguments are; shapes stand in the source below
autodoc_preserve_defaults = True
autodoc_use_type_comments = False  # there are none, and the search for them reads every function's source
napoleon_use_ivar = True
exclude_patterns = ["course.md", "downloads"]  # a part of index.md; the notebooks as they are stored
suppress_warnings = [
    "myst.header",  # solutions have their exercises' headings at the level that these have in the chapters
    "toc.not_included",  # files that a chapter links to are pages without a place in the contents
]
nb_code_prompt_show, nb_code_prompt_hide = "Show code", "Hide code"  # of folded cells
nb_execution_mode = "off"  # the outputs are the stored ones, which `make test` compares
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Mathematics is set in the reader's browser by MathJax, from a copy that lies beside the pages: no network is needed.
mathjax_path = "tex-svg.js"
mathjax = next(file for file in metadata.files("sphinx-mathjax-offline") or [] if file.name == "tex-svg.js")

html_theme = "furo"
html_title = "regolite"
html_static_path = ["_static", str(mathjax.locate())]
html_css_files = ["book.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "xcode", "github-dark"


def setup(app: Sphinx) -> None:
    """Let the sidebar list the modules of the page's own room only: those of all rooms are 200 links on 200 pages."""
    app.connect("html-page-context", _collapse_sidebar, priority=400)  # before the theme draws it


def _collapse_sidebar(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if "toctree" in context:
        whole = context["toctree"]
        context["toctree"] = lambda **options: whole(**{**options, "collapse": True})
