"""The figures: what is planted must be drawn where it is, in its color, and nothing may stay behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

import regolite
from regolite import plots
from regolite.data import Scenes
from regolite.evaluation import table_by_stage
from regolite.inference import detect_by_stage
from regolite.plots import text
from regolite.plots.detections import CLASS_COLORS, TRUTH_COLOR
from regolite.plots.text import as_is
from regolite.types import Detections

CLASSES = ("cat", "traffic light", "kite")


def found(*objects: tuple[float, int, tuple[float, ...], int]) -> Detections:
    """Detections from (score, label, box in pixels, query)."""
    scores, labels, boxes, queries = zip(*objects)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).float(), torch.tensor(queries))


def nothing() -> Detections:
    return Detections(
        torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    )


def is_color(pixels: np.ndarray, color: str, tolerance: int = 40) -> np.ndarray:
    """Where pixels have a color."""
    return (np.abs(pixels.astype(int) - 255 * np.array(to_rgb(color))) < tolerance).all(-1)


def evaluation(split: str, step: int, *aps: float | None) -> dict:
    stages = [
        {"stage": i, "AP": ap, "AP50": 50.0 + i, "AP75": None, "APs": 1.0, "APm": 2.0, "APl": 3.0}
        for i, ap in enumerate(aps)
    ]
    return {"kind": "evaluation", "split": split, "step": step, "epoch": 1, "images": 2, "stages": stages}


def training(step: int, **terms: float) -> dict:
    return {"kind": "train", "step": step, "epoch": 0, "lr": 1e-4 * step, "loss": 10.0 / step, "terms": terms}


METRICS = [
    training(1, **{"base.1/l1": 9.0, "base/l1": 1.0, "base/giou": 2.0, "stage1/l1": 0.5, "proposals/l1": 7.0}),
    training(2, **{"base.1/l1": 9.0, "base/l1": 0.5, "base/giou": 1.0, "stage1/l1": 0.25, "proposals/l1": 7.0}),
    evaluation("val", 1, 1.0, 2.0),
    evaluation("val", 2, 3.0, None),
    evaluation("train", 2, 30.0, 40.0),
]


# ----------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(200, 100), (29, 31), (641, 427), (1, 1)])
def test_the_drawn_image_has_the_size_of_the_image(size: tuple[int, int]):
    drawn = plots.draw_detections(Image.new("L", size, 30), nothing(), CLASSES)
    assert drawn.size == size and drawn.mode == "RGB"
    assert (np.asarray(drawn) == 30).all(), "without detections the pixels are the image's own"


def test_a_box_is_drawn_where_it_is_in_the_color_of_its_class():
    image = Image.new("RGB", (400, 300))
    drawn = np.asarray(plots.draw_detections(image, found((0.9, 1, (100, 120, 300, 220), 0)), CLASSES))
    color = is_color(drawn, CLASS_COLORS[1])
    for x, y in ((100, 170), (300, 170), (200, 220), (290, 120)):  # the middles of the sides, off the label
        assert color[y - 2 : y + 3, x - 2 : x + 3].any()
    assert (drawn[140:210, 120:290] == 0).all(), "the inside stays as it was"
    assert (drawn[240:] == 0).all() and (drawn[:, 320:] == 0).all(), "and so does the outside"
    assert (np.asarray(image) == 0).all(), "the image itself is not touched"


def label_area(drawn: Image.Image, color: str) -> int:
    return int(is_color(np.asarray(drawn), color).sum())


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (350, 5, 399, 40), (-50, 250, 20, 340), (390, 290, 400, 300)])
def test_a_label_stays_inside_the_image(box: tuple[float, ...]):
    image = Image.new("RGB", (400, 300))
    drawn = plots.draw_detections(image, found((0.9, 1, box, 0)), CLASSES)
    reference = plots.draw_detections(image, found((0.9, 1, (100, 100, 300, 250), 0)), CLASSES)
    without = plots.draw_detections(image, found((0.9, 1, (100, 100, 300, 250), 0)), ("", "", ""), scores=False)
    whole = label_area(reference, CLASS_COLORS[1]) - label_area(without, CLASS_COLORS[1])
    assert whole > 500
    assert label_area(drawn, CLASS_COLORS[1]) > 0.9 * whole


def test_labels_of_one_corner_do_not_hide_each_other():
    image, box = Image.new("RGB", (400, 300)), (100, 100, 300, 250)
    both = plots.draw_detections(image, found((0.9, 0, box, 0), (0.8, 1, box, 1)), CLASSES)
    for k, color in enumerate(CLASS_COLORS[:2]):
        alone = label_area(plots.draw_detections(image, found((0.9, k, box, k)), CLASSES), color)
        lines = label_area(plots.draw_detections(image, found((0.9, k, box, k)), ("", "", ""), scores=False), color)
        # A label may lie over a bit of the other box's line, and the second box lies wholly under the first.
        assert label_area(both, color) > 0.8 * (alone - lines) + (0.7 * lines if k == 0 else 0)


def boxes_of(ax: matplotlib.axes.Axes) -> list[tuple[str, str, tuple[float, ...]]]:
    """Color, line style and corners of the boxes on some axes."""
    patches = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return [
        (to_hex(p.get_edgecolor()).upper(), p.get_linestyle(), tuple(round(float(v), 3) for v in p.get_bbox().extents))
        for p in patches
    ]


def test_stages_stand_side_by_side_with_their_glimpses():
    image = Image.new("RGB", (400, 300))
    by_stage = [
        found((0.6, 0, (10, 10, 60, 60), 3), (0.2, 1, (100, 120, 140, 160), 7)),
        found((0.4, 1, (110, 120, 150, 170), 7)),
        found((0.9, 1, (112, 121, 151, 171), 7), (0.31, 2, (200, 10, 220, 30), 1), (0.29, 0, (0, 0, 9, 9), 2)),
    ]
    truth = found((1.0, 1, (113, 122, 150, 170), -1))
    figure = plots.draw_stages(image, by_stage, CLASSES, truth, alphas=(2.0, 1.0), threshold=0.3)
    base, first, second, true = figure.axes
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["Base detector", "Stage 1", "Stage 2", "Ground truth"]
    assert boxes_of(base) == [(plots.stage_color(0), "solid", (10, 10, 60, 60))]
    # Stage 1 looked at query 7's box of the base detector, twice as large; a score of 0.2 hides a box, not a glimpse.
    (color, style, region), *solid = boxes_of(first)
    assert (color, region) == (plots.stage_color(1), (80, 100, 160, 180)) and style != "solid"
    assert solid == [(plots.stage_color(1), "solid", (110, 120, 150, 170))]
    assert boxes_of(second)[0][2] == (110, 120, 150, 170)
    assert sorted(box for _, _, box in boxes_of(second)[1:]) == [(112, 121, 151, 171), (200, 10, 220, 30)]
    assert boxes_of(true) == [(TRUTH_COLOR, "solid", (113, 122, 150, 170))]
    labels = [text.get_text() for text in second.texts]
    assert "traffic light 0.90" in labels and "kite 0.31" in labels and not any("0.29" in label for label in labels)


def test_a_stage_that_found_nothing_says_so():
    figure = plots.draw_stages(
        Image.new("RGB", (50, 40)), [nothing(), found((0.1, 2, (0, 0, 9, 9), 0))], CLASSES, alphas=(1.0,)
    )
    said = [[text.get_text() for text in ax.texts if "nothing" in text.get_text()] for ax in figure.axes]
    assert said == [["nothing above 0.3"], ["nothing above 0.3 (best: kite 0.10)"]]
    assert not [box for ax in figure.axes for box in boxes_of(ax)]


def test_panels_wrap_into_rows():
    figure = plots.draw_stages(Image.new("RGB", (80, 40)), [nothing()] * 4, CLASSES, columns=2)
    (a, b, c, d) = (ax.get_position() for ax in figure.axes)
    assert a.y0 == b.y0 > c.y0 == d.y0 and a.x0 == c.x0 < b.x0 == d.x0


def test_truth_is_that_of_the_annotations():
    scenes = Scenes(3)
    truth = plots.ground_truth(scenes, 1)
    annotations = scenes.coco.imgToAnns[scenes.image_ids[1]]
    corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    torch.testing.assert_close(truth.boxes_xyxy, torch.tensor(corners).float())
    assert [scenes.category_ids[k] for k in truth.labels.tolist()] == [a["category_id"] for a in annotations]
    figure = plots.draw_ground_truth(scenes, [0, 1, 2], columns=2)
    assert [len(boxes_of(ax)) for ax in figure.axes] == [len(plots.ground_truth(scenes, i)) for i in range(3)]


# ------------------------------------------------------------------------------------------------------- curves


def lines_of(ax: matplotlib.axes.Axes) -> dict[str, list[list[float]]]:
    """The curves on some axes by color."""
    return {to_hex(line.get_color()).upper(): line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata())}


def test_curves_hold_the_metrics():
    total, by_decoder, rate, precision = plots.plot_curves(METRICS).axes
    assert list(lines_of(total).values()) == [[[1, 10.0], [2, 5.0]]]
    assert list(lines_of(rate).values()) == [[[1, 1e-4], [2, 2e-4]]]
    # Auxiliary layers and proposals are no stage's answer.
    assert lines_of(by_decoder) == {
        plots.stage_color(0): [[1, 3.0], [2, 1.5]],
        plots.stage_color(1): [[1, 0.5], [2, 0.25]],
    }
    drawn = [line for line in precision.lines if len(line.get_xdata())]
    assert [to_hex(line.get_color()).upper() for line in drawn] == [plots.stage_color(s) for s in (0, 1, 0, 1)]
    assert drawn[0].get_xydata().tolist() == [[1, 1.0], [2, 3.0]]
    assert drawn[1].get_ydata()[0] == 2.0 and math.isnan(drawn[1].get_ydata()[1])
    assert [line.get_ydata()[0] for line in drawn[2:]] == [30.0, 40.0]
    low, high = precision.get_ylim()
    assert low == 0 and high > 40


def test_curves_of_a_run_that_has_not_begun():
    for metrics in ([], METRICS[:1], METRICS[2:3]):
        assert len(plots.plot_curves(metrics).axes) == 4


def test_bars_hold_the_figures_of_each_stage():
    (ax,) = plots.plot_ap_by_stage(evaluation("val", 1, 20.0, 30.0), "two stages").axes
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert [row[:2] for row in heights] == [[20.0, 50.0], [30.0, 51.0]]
    assert all(math.isnan(row[2]) for row in heights), "what could not be measured is no zero"
    assert [to_hex(bars[0].get_facecolor()).upper() for bars in ax.containers] == [plots.stage_color(s) for s in (0, 1)]


def test_the_table_says_what_could_not_be_measured():
    head, base, stage = table_by_stage(evaluation("val", 1, 20.04, None)).splitlines()
    assert head.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert base.split() == ["base", "detector", "20.0", "50.0", "-", "1.0", "2.0", "3.0"]
    assert stage.split() == ["stage", "1", "-", "51.0", "-", "1.0", "2.0", "3.0"]


def test_stages_have_colors_of_their_own():
    assert len({plots.stage_color(stage) for stage in range(6)} | {TRUTH_COLOR}) == 7


# -------------------------------------------------------------------------------------------- files and models


def test_the_same_figure_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path):
    before = dict(matplotlib.rcParams)
    for name in ("first", "second"):
        plots.save_figure(plots.plot_curves(METRICS), tmp_path / f"{name}.png")
        by_stage = [found((0.6, 0, (10, 10, 60, 60), 3))]
        plots.save_figure(plots.draw_stages(Image.new("RGB", (80, 70)), by_stage, CLASSES), tmp_path / f"{name}_s.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert (tmp_path / "first_s.png").read_bytes() == (tmp_path / "second_s.png").read_bytes()
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()


@pytest.fixture
def model() -> torch.nn.Module:
    sizes = {
        "dim": 32,
        "heads": 4,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
        "detector.ffn_dim": 32,
        "queries": 6,
        "image_size": 64,
    }
    scenes = Scenes(1)
    return regolite.build(
        "rego_deformable_detr_scenes", rego={"ffn_dim": 32}, stages=2, classes=scenes.classes,
        category_ids=scenes.category_ids, **sizes,
    ).eval()  # fmt: skip


def test_each_stage_is_what_detection_with_so_many_stages_gives(model: torch.nn.Module):
    image = Scenes(1).image(0)
    by_stage = detect_by_stage(model, image, threshold=0.01)
    assert len(by_stage) == 3
    for stages, detections in enumerate(by_stage):
        [alone] = regolite.detect(model, image, threshold=0.01, stages=stages)
        assert len(detections) and (detections.scores >= 0.01).all()
        assert (detections.classes, detections.size) == (alone.classes, alone.size)
        for name in ("scores", "labels", "boxes_xyxy", "queries"):
            torch.testing.assert_close(getattr(detections, name), getattr(alone, name), rtol=0, atol=0)


def test_a_run_is_drawn_into_its_folder(model: torch.nn.Module, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS[:4]))
    datasets = {"val": Scenes(3, split="val"), "train": Scenes(2)}
    files = plots.draw_run(tmp_path, model, datasets, images=2)
    names = ["curves", "ap_val", "stages_val_1", "stages_val_2", "stages_train_1", "stages_train_2"]
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [f"figures/{name}.png" for name in names]
    for file in files:
        with Image.open(file) as image:
            assert np.asarray(image.convert("RGB")).std() > 1


# ------------------------------------------------------------------------------------------------- words of others


ODD = (
    "cost $5 & $6",
    "a_b^c $x",
    "<b>bold</b>",
    "$\\nosuch{$",
    "two\nlines",
    "כלב",
    "قطة",
    "_hidden",
    "%s {0}",
    "nul\0",
    "\udce9",
)


def text_of(name: str) -> str:
    """What is drawn: no control characters, and "?" for a lone surrogate, from a file name that is not UTF-8."""
    return name.replace("\udce9", "?").replace("\0", "\ufffd")


@pytest.mark.parametrize("name", ODD)
def test_names_are_drawn_as_they_are(name: str) -> None:
    """A pair of $ is no formula, and what would be a broken formula is no error."""
    objects = found((0.5, 0, (5, 5, 60, 60), 0))
    figure = plots.draw_stages(Image.new("RGB", (200, 100)), [objects, objects], (name,), alphas=(1.0,))
    figure.canvas.draw()
    texts = [text for ax in figure.axes for text in ax.texts if text.get_text() == f"{text_of(name)} 0.50"]
    assert len(texts) == 2 and not any(text.get_parse_math() for text in texts)
    assert plots.draw_detections(Image.new("RGB", (200, 100)), objects, (name,)).size == (200, 100)
    assert as_is()["fontfamily"][:1] == matplotlib.rcParams["font.family"][:1]


def test_a_name_of_two_lines_stays_in_the_image() -> None:
    black, whole = Image.new("RGB", (200, 120)), found((0.5, 0, (0, 0, 200, 120), 0))
    one, two = (label_area(plots.draw_detections(black, whole, (name,)), CLASS_COLORS[0]) for name in ("ab", "ab\nab"))
    assert two > 1.3 * one, "both lines are seen"


def test_chinese_is_asked_for_where_there_is_a_font(monkeypatch: pytest.MonkeyPatch) -> None:
    class Font:
        name = "Noto Sans CJK JP"

    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", [Font])
    text._further_fonts.cache_clear()
    assert as_is()["fontfamily"] == [*matplotlib.rcParams["font.family"], "Noto Sans CJK JP"]
    text._further_fonts.cache_clear()


def test_names_in_a_legend() -> None:
    figure, ax = plt.subplots()
    for name in ODD:
        ax.plot([0, 1], [0, 1], label=text.label_as_is(name))
    legend = figure.legend(*ax.get_legend_handles_labels())
    text.legend_as_is(legend)
    figure.canvas.draw()
    assert [text.get_text().strip("\u2060") for text in legend.get_texts()] == list(map(text_of, ODD))
    assert not any(text.get_parse_math() for text in legend.get_texts())
    plt.close(figure)
