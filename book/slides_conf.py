"""How Sphinx makes the slides (``make book``); ``book/build.py`` prepares their sources."""

from __future__ import annotations

from importlib import metadata

project = "regolite"
author = "The regolite authors"
copyright = "The regolite authors, Apache License 2.0"

extensions = ["myst_parser", "sphinx_revealjs"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]

# As in the book: mathematics is set in the reader's browser from a copy that lies beside the slides.
mathjax_path = "tex-svg.js"
mathjax = next(file for file in metadata.files("sphinx-mathjax-offline") or [] if file.name == "tex-svg.js")

html_copy_source = False
revealjs_html_theme = "revealjs-simple"
revealjs_style_theme = "white"  # figures are drawn on white
revealjs_static_path = ["slides.css", str(mathjax.locate())]
revealjs_css_files = ["slides.css"]
revealjs_script_plugins = [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}]
revealjs_script_conf = {
    "width": 1280,
    "height": 720,
    "margin": 0,
    "center": False,
    "display": "flex",  # slides.css lets a figure take the height that the text leaves
    "pdfMaxPagesPerSlide": 1,
    "hash": True,  # the address names the slide: #/3
    "slideNumber": "c/t",
    "transition": "none",
}
