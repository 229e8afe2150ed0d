"""Setup of the course's notebooks, and display of figures."""

from __future__ import annotations

import io
import os
import platform

import torch
from IPython.display import Image as Shown
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from regolite import __version__
from regolite.course.progress import configure_progress

DPI = 96


def begin(seed: int = 0, use_mine: bool = True, record: bool = True) -> torch.device:
    """Print versions and hardware, and seed PyTorch.

    Args:
        seed: random seed.
        use_mine: use the modules that you have written in earlier chapters; the package's otherwise.
        record: save which exercises you solve, and the modules that you write.

    Returns:
        The device to compute on: the GPU if there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, regolite {__version__}; {where}; seed {seed}"
    )
    torch.manual_seed(seed)
    configure_progress(record, use_mine)
    return device


def show(figure: Figure | Image.Image, alt: str) -> None:
    """Show a figure below the cell, small enough to be stored in the notebook.

    It is stored as JPEG or PNG, whichever is smaller.

    Args:
        figure: the figure.
        alt: alternative text for screen readers, in a sentence or two.
    """
    if isinstance(figure, Figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
        figure = Image.open(buffer)
    image = figure.convert("RGB")
    drawing, photograph = io.BytesIO(), io.BytesIO()
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(drawing, "png", optimize=True)
    image.save(photograph, "jpeg", quality=82, subsampling=0)
    as_png = len(drawing.getvalue()) <= len(photograph.getvalue())
    data, kind = (drawing, "png") if as_png else (photograph, "jpeg")
    display(Shown(data.getvalue(), format=kind, alt=alt))
