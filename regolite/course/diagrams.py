"""Diagrams of the course, DETR, deformable attention, REGO and one of its stages.

Names and colors are the same as in all other figures: image features are sky blue, the transformer blue, queries and
hidden states orange, glimpses purple, predictions vermillion, ground truth green.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from regolite.plots.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, stage_color


@dataclass
class Block:
    """A box of a diagram, in the diagram's units."""

    x: float
    y: float
    width: float
    height: float

    def side(self, name: str, along: float = 0.5) -> tuple[float, float]:
        """A point on a side (left, right, top or bottom), at a fraction ``along`` from its lower or left end."""
        return {
            "left": (self.x, self.y + along * self.height),
            "right": (self.x + self.width, self.y + along * self.height),
            "top": (self.x + along * self.width, self.y + self.height),
            "bottom": (self.x + along * self.width, self.y),
        }[name]


class Canvas:
    """A diagram under construction; one unit is an inch.

    Args:
        width: width of the figure.
        height: height of the figure.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure((width, height), dpi=100)
        self.ax: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set_xlim(0, width)
        self.ax.set_ylim(0, height)
        self.ax.axis("off")

    def block(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str,
        color: str,
        size: float = 9.0,
        bold: bool = True,
    ) -> Block:
        """A rounded box with text; (x, y) is its lower left corner."""
        shape = "round,pad=0,rounding_size=0.07"
        tint = tuple(1 - 0.2 * (1 - channel) for channel in to_rgb(color))
        self.ax.add_patch(
            FancyBboxPatch((x, y), width, height, shape, facecolor=tint, edgecolor=color, linewidth=1.6, zorder=2)
        )
        first, _, rest = text.partition("\n")
        middle = y + height / 2
        line = size * 1.35 / 72
        lines = 1 + (rest.count("\n") + 1 if rest else 0)
        top = middle + (lines - 1) * line / 2
        weight = "bold" if bold else "normal"
        centered: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 3}
        self.ax.text(x + width / 2, top, first, fontsize=size, fontweight=weight, **centered)
        for n, below in enumerate(rest.split("\n") if rest else [], 1):
            self.ax.text(x + width / 2, top - n * line, below, fontsize=size - 1, **centered)
        return Block(x, y, width, height)

    def text(self, x: float, y: float, text: str, color: str = INK, size: float = 8.0, **style: Any) -> None:
        """Text centered at a position; ``style`` overrides matplotlib's arguments."""
        self.ax.text(x, y, text, **{"fontsize": size, "color": color, "ha": "center", "va": "center", **style})

    def arrow(self, *points: tuple[float, float], color: str = GRAY, dashed: bool = False) -> None:
        """A line through points that ends in an arrow head."""
        style: dict[str, Any] = {
            "color": color,
            "linewidth": 1.4,
            "zorder": 1.5,
            "linestyle": (0, (3, 2)) if dashed else "-",
        }
        if len(points) > 2:
            self.ax.plot(*zip(*points[:-1]), solid_capstyle="butt", **style)
        head = FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, **style
        )
        self.ax.add_patch(head)

    def line(self, *points: tuple[float, float], color: str = GRAY, width: float = 1.4) -> None:
        """A line through points."""
        self.ax.plot(*zip(*points), color=color, linewidth=width, zorder=3)

    def dot(self, x: float, y: float, color: str, radius: float = 0.05) -> None:
        """A filled circle with a white outline."""
        self.ax.add_patch(Circle((x, y), radius, facecolor=color, edgecolor="white", linewidth=0.8, zorder=4))

    def sign(self, x: float, y: float, text: str) -> Block:
        """An operation: a circle with a sign in it."""
        self.ax.add_patch(Circle((x, y), 0.15, facecolor="white", edgecolor=GRAY, linewidth=1.4, zorder=3))
        self.text(x, y, text, size=11.0, zorder=4)
        return Block(x - 0.15, y - 0.15, 0.3, 0.3)

    def grid(self, x: float, y: float, width: float, rows: int, columns: int, color: str) -> Block:
        """A feature map: a grid of square cells with a given width."""
        cell = width / columns
        height = rows * cell
        tint = tuple(1 - 0.2 * (1 - channel) for channel in to_rgb(color))
        self.ax.add_patch(Rectangle((x, y), width, height, facecolor=tint, edgecolor=color, linewidth=1.4, zorder=2))
        lines: dict[str, Any] = {"color": color, "linewidth": 0.5, "zorder": 2.5}
        for n in range(1, columns):
            self.ax.plot([x + n * cell] * 2, [y, y + height], **lines)
        for n in range(1, rows):
            self.ax.plot([x, x + width], [y + n * cell] * 2, **lines)
        return Block(x, y, width, height)


def diagram_course() -> Figure:
    """The chapters and the order in which they build on each other."""
    rows = [
        ("The parts", SKY, ["00 start here", "01 attention", "02 images to tokens", "03 encoder, decoder"]),
        ("What is right?", GREEN, ["04 boxes, overlap", "05 matching", "06 DETR, whole", "07 measuring"]),
        ("Faster learning", BLUE, ["08 why DETR is slow", "09 deformable", "10 glimpses", "11 recurrent decoder"]),
        ("REGO at work", VERMILLION, ["12 train REGO", "13 look inside", "14 in miniature", "15 what it costs"]),
        ("Yours", PURPLE, ["16 your own data", "17 your own question", "18 DETR to today"]),
        ("At full size", ORANGE, ["20 train on COCO", "21 evaluate", "22 compare runs"]),
    ]
    height, gap, wide, left = 0.66, 0.24, 1.75, 1.75
    top = len(rows) * (height + gap)
    canvas = Canvas(10.0, top)
    for n, (name, color, chapters) in enumerate(rows):
        y = top - 0.1 - (n + 1) * height - n * gap
        canvas.text(0.1, y + height / 2, name, color=INK, size=11.0, ha="left", fontweight="bold")
        blocks = [
            canvas.block(left + k * (wide + 0.32), y, wide, height, text, color, bold=False)
            for k, text in enumerate(chapters)
        ]
        for before, after in zip(blocks, blocks[1:]):
            canvas.arrow(before.side("right"), after.side("left"))
        if n + 1 < len(rows):
            turn = y - gap / 2
            end, start = blocks[-1].side("bottom")[0], blocks[0].side("bottom")[0]
            canvas.arrow((end, y), (end, turn), (start, turn), (start, y - gap))
    return canvas.figure


def diagram_detr() -> Figure:
    """DETR: from the image to a set of predictions, and their matching with the ground truth."""
    canvas = Canvas(10.0, 3.5)
    y, height = 1.9, 0.9
    image = canvas.block(0.1, y, 0.95, height, "image\n3 x H x W", SKY)
    backbone = canvas.block(1.35, y, 1.05, height, "backbone\nX: C x h x w", SKY)
    tokens = canvas.block(2.7, y, 1.0, height, "tokens\n1 x 1 conv,\nflatten: S x C", SKY)
    encoder = canvas.block(4.0, y, 1.35, height, "encoder\nL layers of\nself-attention", BLUE)
    decoder = canvas.block(5.85, y, 1.45, height, "decoder\nL layers: self- and\ncross-attention", BLUE)
    heads = canvas.block(7.8, y, 0.85, height, "heads\nclass: linear\nbox: MLP", VERMILLION)
    for left, right in (
        (image, backbone),
        (backbone, tokens),
        (tokens, encoder),
        (encoder, decoder),
        (decoder, heads),
    ):
        canvas.arrow(left.side("right"), right.side("left"))
    canvas.text(5.6, y + height / 2 + 0.17, r"$H_{enc}$", size=10.0)
    canvas.text(7.55, y + height / 2 + 0.17, r"$H_{dec}$", size=10.0)
    positions = canvas.block(2.6, 3.05, 1.2, 0.36, "positions (sine)", SKY, size=8.0, bold=False)
    level = positions.side("right")[1]
    canvas.arrow(positions.side("right"), (4.675, level), encoder.side("top"))
    canvas.arrow((4.675, level), (6.1, level), (6.1, y + height))
    canvas.text(5.35, level + 0.12, "added in every layer", GRAY, 8.0)
    canvas.block(6.35, 3.05, 1.4, 0.36, "N object queries", ORANGE, size=8.0, bold=False)
    canvas.arrow((7.0, 3.05), (7.0, y + height))

    found = canvas.block(
        8.95, y, 0.95, height, "N predictions\n" + r"$O_{cls}$" + "\n" + r"$O_{box}$", VERMILLION, size=8.0
    )
    canvas.arrow(heads.side("right"), found.side("left"))
    matching = canvas.block(6.9, 0.35, 1.7, 0.8, "matching\ncheapest pairing,\nHungarian algorithm", GREEN)
    loss = canvas.block(4.2, 0.35, 1.9, 0.8, "set loss\nclass, L1, GIoU; the rest\nof the queries: no object", GREEN)
    truth = canvas.block(8.95, 0.35, 0.95, 0.8, "ground truth\nclasses\nand boxes", GREEN)
    canvas.arrow(truth.side("left"), matching.side("right"))
    canvas.arrow((9.42, y), (9.42, 1.5), (7.75, 1.5), matching.side("top"))
    canvas.arrow(matching.side("left"), loss.side("right"))
    canvas.text(3.1, 0.75, "gradients to\nevery layer", GRAY, 8.0)
    canvas.arrow((4.2, 0.75), (3.55, 0.75), dashed=True)
    return canvas.figure


def diagram_deformable_attention() -> Figure:
    """One query of deformable attention: sampling points, attention weights, output."""
    canvas = Canvas(10.0, 4.0)
    query = canvas.block(0.1, 1.55, 1.15, 0.7, "query " + r"$z_q$" + "\n1 x C", ORANGE)
    reference = canvas.block(0.1, 0.3, 1.4, 0.7, "reference point\n" + r"$\hat p_q$ in $[0, 1]^2$", ORANGE)
    offsets = canvas.block(2.0, 2.0, 1.75, 0.75, "sampling offsets\nlinear: M x L x K x 2", BLUE)
    weights = canvas.block(2.0, 0.95, 1.75, 0.75, "attention weights\nlinear, softmax: M x L x K", BLUE)
    canvas.arrow(query.side("right"), (1.6, 1.9), (1.6, 2.375), offsets.side("left"))
    canvas.arrow(query.side("right"), (1.6, 1.9), (1.6, 1.325), weights.side("left"))
    values = canvas.block(2.0, 3.15, 1.75, 0.6, "features " + r"$X^1 \ldots X^L$" + "\nlinear: values", SKY)

    # three levels, and the points of two heads on each
    levels = [(4.55, 2.45, 1.9, 6, 8), (4.9, 1.22, 1.25, 4, 5), (5.15, 0.3, 0.75, 2, 3)]
    around = {BLUE: ((-0.2, 0.16), (-0.32, 0.3), (-0.1, 0.34)), VERMILLION: ((0.22, 0.05), (0.36, -0.12), (0.25, -0.3))}
    for n, (x, y, wide, rows, columns) in enumerate(levels, 1):
        grid = canvas.grid(x, y, wide, rows, columns, SKY)
        canvas.text(x - 0.24, y + grid.height / 2, f"$X^{n}$", size=10.0)
        center = (x + 0.5 * wide, y + 0.5 * grid.height)
        for color, places in around.items():
            for dx, dy in places:
                canvas.line(center, (center[0] + dx * wide, center[1] + dy * grid.height), color=color, width=0.9)
                canvas.dot(center[0] + dx * wide, center[1] + dy * grid.height, color, 0.045)
        canvas.ax.plot(*center, marker="P", markersize=9, color=ORANGE, markeredgecolor="white", zorder=5)
    canvas.arrow(values.side("right"), (4.5, 3.45))
    canvas.arrow(offsets.side("right"), (4.5, 2.375), color=BLUE)
    canvas.arrow(reference.side("right", 0.25), (5.1, 0.475), color=ORANGE)
    canvas.text(5.5, 0.13, "one point for all levels, offsets for each", GRAY, 8.0)

    total = canvas.block(7.0, 1.5, 1.25, 0.9, "weighted sum\nover L x K points,\nhead by head", BLUE)
    canvas.arrow((6.5, 3.1), (6.75, 3.1), (6.75, 2.1), (7.0, 2.1))
    canvas.arrow((6.2, 1.72), (7.0, 1.72))
    canvas.arrow((5.95, 0.55), (6.75, 0.55), (6.75, 1.6), (7.0, 1.6))
    canvas.text(6.95, 3.38, "bilinear sampling\nat every point", INK, 8.0)
    canvas.arrow(weights.side("right"), (4.2, 1.325), (4.2, 0.98), (7.625, 0.98), total.side("bottom"), color=BLUE)
    out = canvas.block(8.6, 1.5, 1.25, 0.9, "output\nheads side by side,\nlinear: 1 x C", ORANGE)
    canvas.arrow(total.side("right"), out.side("left"))
    for n, (color, name) in enumerate(((BLUE, "points of head 1"), (VERMILLION, "points of head 2"))):
        canvas.dot(8.45, 0.5 - 0.25 * n, color)
        canvas.text(8.6, 0.5 - 0.25 * n, name, size=8.0, ha="left")
    return canvas.figure


def diagram_stage() -> Figure:
    """One stage of REGO, equations (4) to (7)."""
    canvas = Canvas(10.0, 4.1)
    boxes = canvas.block(0.1, 0.45, 1.35, 0.7, "boxes\n" + r"$O_{box}(i-1)$", VERMILLION)
    features = canvas.block(0.1, 3.1, 1.35, 0.7, "features\n" + r"$X$", SKY)
    canvas.block(0.1, 1.75, 1.35, 0.7, "hidden states\n" + r"$H_{dec}(i-1)$", ORANGE)
    enlarge = canvas.block(2.05, 2.0, 1.3, 0.7, "enlarge\n" + r"$R(\cdot, \alpha(i))$", PURPLE)
    extract = canvas.block(2.05, 3.1, 1.6, 0.7, "RoIAlign, " + r"$f_{ext}$" + "\n7 x 7, then a vector", PURPLE)
    canvas.arrow(features.side("right"), extract.side("left"))
    canvas.arrow((1.45, 0.95), (1.8, 0.95), (1.8, 2.35), enlarge.side("left"), dashed=True)
    canvas.arrow(enlarge.side("top"), (2.7, 3.1))
    canvas.text(2.78, 2.9, "RoIs (7)", GRAY, 8.0, ha="left")
    canvas.block(4.6, 2.75, 1.75, 1.05, "glimpse decoder\nself-attention, then\ncross-attention, (6)", BLUE)
    canvas.arrow(extract.side("right"), (4.6, 3.45))
    canvas.text(4.13, 3.62, r"$V(i)$", size=10.0)
    canvas.text(4.13, 3.27, "queries", GRAY, 8.0)
    canvas.arrow((1.45, 2.3), (1.62, 2.3), (1.62, 1.72), (3.95, 1.72), (3.95, 2.95), (4.6, 2.95))
    canvas.text(4.0, 2.5, "keys and\nvalues", GRAY, 8.0, ha="left")
    concatenate = canvas.block(6.95, 1.75, 1.15, 0.7, "concatenate\n(5)", ORANGE)
    canvas.arrow((6.35, 3.275), (7.525, 3.275), concatenate.side("top"))
    canvas.text(7.0, 3.45, r"$H_g(i)$", size=10.0)
    canvas.arrow((1.45, 1.9), (1.55, 1.9), (1.55, 1.48), (6.6, 1.48), (6.6, 2.1), concatenate.side("left"), dashed=True)
    canvas.arrow(concatenate.side("right"), (8.55, 2.1))
    after = canvas.block(8.55, 1.75, 1.35, 0.7, "hidden states\n" + r"$H_{dec}(i)$", ORANGE)
    classes = canvas.block(8.55, 3.1, 1.35, 0.7, "classes, linear\n" + r"$O_{cls}(i)$", VERMILLION)
    canvas.arrow(after.side("top"), classes.side("bottom"))
    new = canvas.block(8.55, 0.45, 1.35, 0.7, "boxes\n" + r"$O_{box}(i)$", VERMILLION)
    add = canvas.sign(7.0, 0.8, "+")
    canvas.arrow((8.9, 1.75), (8.9, 1.42), (7.0, 1.42), add.side("top"))
    canvas.text(7.95, 1.3, "correction, MLP", GRAY, 8.0)
    canvas.arrow(boxes.side("right"), add.side("left"), dashed=True)
    canvas.arrow(add.side("right"), new.side("left"))
    canvas.text(4.3, 0.95, r"$\sigma^{-1}$: added before the sigmoid, (4)", GRAY, 8.0)
    canvas.text(5.0, 0.14, "dashed: no gradient flows back", GRAY, 8.0)
    return canvas.figure


def diagram_rego() -> Figure:
    """REGO: a base detector and three stages, each refining the predictions of the previous one."""
    canvas = Canvas(10.0, 3.7)
    features = canvas.block(0.1, 3.05, 9.8, 0.48, "features " + r"$X$" + " of the backbone or the encoder", SKY)
    base = canvas.block(0.1, 1.55, 1.75, 0.95, "base detector\nDETR or\nDeformable DETR", stage_color(0))
    canvas.arrow((0.97, features.y), base.side("top"))
    before = base
    for i, alpha in enumerate((3, 2, 1), 1):
        x = 0.1 + 2.65 * i
        stage = canvas.block(x, 1.55, 1.75, 0.95, f"stage {i}\nglimpses at " + rf"$\alpha = {alpha}$", stage_color(i))
        canvas.arrow((stage.side("top")[0], features.y), stage.side("top"), color=PURPLE)
        canvas.text(stage.side("top")[0] + 0.08, 2.77, f"$V({i})$", size=9.0, ha="left")
        canvas.arrow(before.side("right", 0.72), stage.side("left", 0.72), color=ORANGE)
        canvas.arrow(before.side("right", 0.28), stage.side("left", 0.28), color=VERMILLION, dashed=True)
        middle = (before.side("right")[0] + stage.x) / 2
        canvas.text(middle, 2.4, rf"$H_{{dec}}({i - 1})$", size=9.0)
        canvas.text(middle, 1.63, rf"$O_{{box}}({i - 1})$", size=9.0)
        before = stage
    for i in range(4):
        x = 0.1 + 2.65 * i + 0.875
        out = canvas.block(x - 0.875, 0.6, 1.75, 0.5, rf"$O({i})$: classes, boxes", VERMILLION, bold=False)
        canvas.arrow((x, 1.55), out.side("top"), color=VERMILLION)
        canvas.text(x, 0.42, "width of " + r"$H_{dec}$: " + ("C" if not i else f"{i + 1} C"), GRAY, 8.0)
    canvas.text(
        5.0,
        0.14,
        "every output is matched with the ground truth and has its own loss; the last one is the prediction; "
        "dashed: no gradient flows back",
        GRAY,
        8.0,
    )
    return canvas.figure
