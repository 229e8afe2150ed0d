"""Cut the thumbnails of the table of the course out of the notebooks; ``make notebooks`` calls this.

A chapter's thumbnail is the figure of its cell with the tag ``thumbnail``.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 240, 135


def figure_of(notebook: Path) -> Image.Image | None:
    """The figure that stands for a notebook, or None where no cell has the tag."""
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if "thumbnail" in cell["metadata"].get("tags", []):
            for output in cell["outputs"]:
                for kind, data in output.get("data", {}).items():
                    if kind.startswith("image/"):
                        return Image.open(io.BytesIO(base64.b64decode("".join(data)))).convert("RGB")
    return None


def thumbnail(figure: Image.Image) -> Image.Image:
    """The whole figure in a white frame of one size for all chapters."""
    figure = figure.copy()
    figure.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    frame = Image.new("RGB", (WIDTH, HEIGHT), "white")
    frame.paste(figure, ((WIDTH - figure.width) // 2, (HEIGHT - figure.height) // 2))
    return frame


def main(notebooks: Sequence[str]) -> None:
    """Write ``thumbnails/NN.jpg`` beside each notebook that has one."""
    for path in map(Path, notebooks):
        figure = figure_of(path)
        if figure is not None:
            place = path.parent / "thumbnails" / f"{path.stem[:2]}.jpg"
            place.parent.mkdir(exist_ok=True)
            thumbnail(figure).save(place, quality=85)


if __name__ == "__main__":
    main(sys.argv[1:])
