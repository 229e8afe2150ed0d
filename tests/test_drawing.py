"""What figures are drawn with, and the diagrams: planted things appear where they are, and texts fit."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from IPython.display import Image as Shown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from PIL import Image

from regolite.course import diagrams, notebook, show
from regolite.data import make_transform
from regolite.plots import draw_heat, draw_matrix, draw_points, draw_title, panels, to_image
from regolite.plots.drawing import BLUE, VERMILLION, draw_image

ROOT = Path(__file__).resolve().parent.parent
DIAGRAMS = ["course", "deformable_attention", "detr", "rego", "stage"]


def drawn(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def image_axes(width: int, height: int):
    """Axes on which an image's pixels are the figure's."""
    figure = Figure((width / 50, height / 50), dpi=50)
    return figure, figure.add_axes((0, 0, 1, 1))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 3), (1, 4)])
def test_heat_is_where_its_cell_is(row, column):
    figure, ax = image_axes(250, 150)
    heat = torch.zeros(3, 5)
    heat[row, column] = 0.7
    draw_heat(ax, Image.new("RGB", (250, 150), (128, 128, 128)), heat)
    colored = np.ptp(drawn(figure), axis=-1) > 60
    y, x = colored.nonzero()
    assert (y.min() // 50, y.max() // 50, x.min() // 50, x.max() // 50) == (row, row, column, column)
    assert colored.mean() == pytest.approx(1 / 15, rel=0.1)


def test_heat_keeps_to_the_cells_size_where_cells_reach_over_the_edge():
    figure, ax = image_axes(250, 150)
    heat = torch.zeros(2, 4)  # cells of 80 pixels: 320 x 160, more than the image
    heat[1, 3] = 1
    draw_heat(ax, Image.new("RGB", (250, 150)), heat, cell=80.0)
    y, x = (np.ptp(drawn(figure), axis=-1) > 60).nonzero()
    assert (y.min(), x.min()) == pytest.approx((80, 240), abs=1) and (y.max(), x.max()) == (149, 249)


def test_heat_has_its_full_color_at_the_peak_given():
    weak, strong = (image_axes(50, 50) for _ in range(2))
    for (_, ax), peak in ((weak, 2.0), (strong, 1.0)):
        draw_heat(ax, Image.new("RGB", (50, 50)), torch.ones(1, 1), peak=peak)
    wanted = 255 * np.array(to_rgb(VERMILLION))
    assert np.abs(drawn(strong[0])[25, 25] - wanted).max() < 25 < np.abs(drawn(weak[0])[25, 25] - wanted).max()


def test_points_are_where_they_are():
    figure, (ax,) = panels(0.5, 1)
    ax.set_xlim(0, 200)
    ax.set_ylim(100, 0)
    dots = draw_points(ax, torch.tensor([[150.0, 25.0], [20.0, 80.0]]), BLUE, torch.tensor([10.0, 40.0]))
    assert dots.get_offsets().tolist() == [[150, 25], [20, 80]] and dots.get_sizes().tolist() == [10, 40]


def test_matrix_says_its_numbers_and_frames_the_chosen():
    ax = Figure().subplots()
    draw_matrix(ax, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.25]]), ["a", "b"], ["x", "y", "z"], [(1, 2)])
    assert [text.get_text() for text in ax.texts] == ["1.00", "2.00", "3.00", "4.00", "5.00", "6.25"]
    (frame,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert (frame.get_x(), frame.get_y()) == (1.5, 0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_normalized_pixels_become_the_image_again():
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14)
    pixels = make_transform("none", None, train=False)(image)
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))


def test_shown_figures_say_what_they_show_and_are_stored_small(monkeypatch):
    kept: list[Shown] = []
    monkeypatch.setattr(notebook, "display", kept.append)
    plot = Figure((4, 3))
    plot.subplots().plot([1, 2, 3])
    show(plot, "A rising line.")
    show(Image.open(ROOT / "data/coco_tiny/images/000000000491.jpg"), "A photograph of a dog.")
    kinds = []
    for shown, alt in zip(kept, ("A rising line.", "A photograph of a dog.")):
        ((kind, data),), metadata = (
            part.items() if n == 0 else part for n, part in enumerate(shown._repr_mimebundle_())
        )
        raw = base64.b64decode(data) if isinstance(data, str) else data
        assert metadata[kind]["alt"] == alt
        kinds.append(Image.open(io.BytesIO(raw)).format)
    assert kinds == ["PNG", "JPEG"]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_texts_of_a_diagram_fit(name):
    figure = getattr(diagrams, f"diagram_{name}")()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (ax,) = figure.axes
    whole = figure.bbox
    texts = [(t.get_text(), t.get_window_extent()) for t in ax.findobj(Text) if t.get_text()]
    blocks = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert len(texts) > 10 and blocks
    for said, at in texts:
        assert whole.x0 <= at.x0 and at.x1 <= whole.x1 and whole.y0 <= at.y0 and at.y1 <= whole.y1, said
        for block in blocks:
            middle_inside = block.contains(*((at.p0 + at.p1) / 2))
            apart = at.x1 <= block.x0 or at.x0 >= block.x1 or at.y1 <= block.y0 or at.y0 >= block.y1
            assert apart or (middle_inside and at.x0 >= block.x0 and at.x1 <= block.x1), f"{said!r} runs over a block"
    for n, (said, at) in enumerate(texts):
        for other, there in texts[n + 1 :]:
            apart = at.x1 <= there.x0 or at.x0 >= there.x1 or at.y1 <= there.y0 + 1 or at.y0 >= there.y1 - 1
            assert apart, f"{said!r} and {other!r} overlap"


def test_every_diagram_is_tested():
    assert sorted(name for name in vars(diagrams) if name.startswith("diagram_")) == [f"diagram_{n}" for n in DIAGRAMS]


@pytest.mark.parametrize("size", [(4000, 8), (8, 4000)])
def test_a_line_of_pixels_is_drawn_in_a_panel_of_a_page(size):
    image = Image.new("RGB", size, "white")
    figure, (ax,) = panels(size[1] / size[0], 1)
    draw_image(ax, image)
    assert 0.3 < figure.get_figheight() < 30
    box = ax.get_window_extent()
    assert box.width / box.height == pytest.approx(size[0] / size[1], rel=0.05), "not stretched"


@pytest.mark.parametrize(("note", "size"), [("45 pixels off", 7), ("itself 49 %, no object 51 % (uniform 81 %)", 6.5)])
def test_a_note_leaves_room_for_its_title(note, size):
    figure, [ax] = panels(1.0, 1, width=3.0)
    draw_title(ax, "Base detector", note)
    title, written = (text for text in ax.texts if text.get_text())
    figure.canvas.draw()
    assert title.get_window_extent().x1 < written.get_window_extent().x0
    assert 5 <= written.get_fontsize() <= size


def test_the_diagram_of_the_course_has_every_notebook_in_order():
    texts = [text.get_text() for text in diagrams.diagram_course().axes[0].texts]
    numbers = [text[:2] for text in texts if text[:2].isdigit()]
    folder = Path(__file__).parents[1] / "notebooks"
    assert numbers == sorted(path.name[:2] for path in folder.glob("[0-9]*.ipynb"))
