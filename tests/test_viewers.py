"""The viewers, without a browser: controls are set, and what the canvas is told to show is what the trace says."""

import io
import json
import re
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from test_recorder import planted, spot_image, with_rego

import regolite
from regolite import Trace, UserError, record
from regolite.data import Scenes
from regolite.data.images import BROWSER_SIDE, jpeg_of
from regolite.models.presets import configure
from regolite.plots.attention import as_attention
from regolite.plots.selection import predictions
from regolite.plots.stages import related
from regolite.tracing.trace import Sampling
from regolite.viewers import canvas
from regolite.viewers.base import ALL
from regolite.viewers.explorer import AttentionViewer, Explorer, RelationViewer, SamplingViewer, StageViewer
from regolite.viewers.gallery import KEPT, Gallery, Message

VIEWERS = (AttentionViewer, SamplingViewer, StageViewer, RelationViewer)


def prepared(model):
    """A model that says how to prepare images, as `detect` asks."""
    model.model_config = configure("detr_tiny", image_size=96, classes=("cat", "dog", "cup", "car", "kite"))
    return model


def image_of(width=90, height=70, seed=0):
    shades = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(shades)


@pytest.fixture(scope="module")
def deformable():
    torch.manual_seed(0)
    return prepared(with_rego("refined"))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return prepared(with_rego("detr"))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return prepared(small_models.detr())


def shown(viewer):
    """What the canvas is told to show."""
    names = ("boxes", "points", "lines", "heat", "heat_size", "caption", "picked", "clicked")
    return {name: getattr(viewer.canvas, name) for name in names}


def file_of(name, content):
    """What an upload widget hands over."""
    return {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content),
            "last_modified": datetime.now(timezone.utc)}  # fmt: skip


# What is shown is what the trace says.


def test_boxes_lie_where_the_last_stage_puts_them(deformable):
    viewer = AttentionViewer(deformable, [image_of()])
    trace = viewer.gallery.scene.trace
    found = predictions(trace, 2)
    scores, labels = found.best()
    viewer.threshold.value = scores.median().item()
    above = [q for q in scores.argsort(descending=True).tolist() if scores[q] >= viewer.threshold.value]
    assert [q for _, q in viewer.object.options] == above and len(above) < len(scores)
    np.testing.assert_allclose([b["box"] for b in viewer.canvas.boxes], found.boxes_xyxy()[above], atol=0.01)
    for box, q in zip(viewer.canvas.boxes, above):
        assert box["label"] == f"{q}: {trace.classes[labels[q]]} {scores[q]:.2f}"
    assert (viewer.canvas.width, viewer.canvas.height) == (90, 70)


def test_a_threshold_above_all_leaves_the_best_and_says_so(deformable):
    viewer = StageViewer(deformable, [image_of()])
    viewer.threshold.value = 1.0
    assert len(viewer.object.options) == 1
    assert viewer.message.text.startswith("No object has a score of 1.00 or more: showing the best")
    viewer.threshold.value = 0.0
    assert viewer.message.text == "" and len(viewer.object.options) == 7


@pytest.mark.parametrize("size", [(320, 240), (150, 290), (200, 200)])
def test_planted_attention_is_hot_at_its_spot(size):
    """A decoder that looks at the one red spot, in an image that is resized and padded: the hottest cell is there."""
    width, height = size
    x, y = int(0.7 * width), int(0.3 * height)
    viewer = AttentionViewer(planted(160), [spot_image(width, height, x, y, 24)])
    shades = canvas.shades_of(viewer.canvas)
    row, column = np.unravel_index(shades.argmax(), shades.shape)
    wide, high = (n / cells for n, cells in zip(viewer.canvas.heat_size, shades.shape[::-1]))
    assert abs((column + 0.5) * wide - x) <= wide / 2 + 12 and abs((row + 0.5) * high - y) <= high / 2 + 12
    assert (shades > 40).sum() <= 4, "it looks at nothing else"
    viewer.ask.value = "point"  # there is no encoder that could be asked
    assert viewer.settings["query"] is not None and not viewer.canvas.asks


@pytest.mark.parametrize("model", ["dense", "deformable"])
@pytest.mark.parametrize("level", [ALL, 0, 1])
def test_heat_is_the_attention_over_the_image(model, level, request):
    """Cell by cell the same as the trace's own, which is pixel by pixel."""
    viewer = AttentionViewer(request.getfixturevalue(model), [image_of()])
    values = [value for _, value in viewer.level.options]
    if level not in values:
        assert model == "dense" and values == [0] and viewer.level.disabled
        return
    viewer.layer.value, viewer.head.value, viewer.level.value = 0, 2, level
    record_ = viewer.gallery.scene.trace["decoder.0.cross"]
    query = viewer.object.value
    if isinstance(record_, Sampling):
        record_, query = as_attention(record_, query), 0
    wanted = record_.over_image(query, 2, None if level == ALL else level)
    shades = torch.from_numpy(canvas.shades_of(viewer.canvas).copy()).float()
    width, height = viewer.canvas.heat_size
    rows = ((torch.arange(70) + 0.5) / height * shades.shape[0]).long().clamp(max=shades.shape[0] - 1)
    columns = ((torch.arange(90) + 0.5) / width * shades.shape[1]).long().clamp(max=shades.shape[1] - 1)
    peak = wanted.max().item()
    torch.testing.assert_close(shades[rows][:, columns] / 255 * peak, wanted, atol=0.003 * peak + 1e-9, rtol=0.0)


def test_a_click_asks_the_cell_under_it(dense):
    viewer = AttentionViewer(dense, [image_of()])
    asked = viewer.gallery.scene.trace["encoder.1"]
    viewer.canvas.clicked = [61.2, 33.9]
    assert viewer.settings["point"] == (61.5, 33.5) and viewer.settings["query"] is None
    assert viewer.canvas.pointing and viewer.canvas.picked == -1
    heat = asked.heat(asked.cell_at(61.5, 33.5))
    seen = torch.from_numpy(canvas.shades_of(viewer.canvas).copy()) / 255
    torch.testing.assert_close(seen, heat / heat.max(), atol=0.005, rtol=0.0)
    before = shown(viewer)
    viewer.x.value, viewer.y.value = 2, 3
    assert viewer.canvas.clicked == [2.5, 3.5] and shown(viewer) != before
    viewer.canvas.picked = 0  # and back to an object
    assert viewer.settings["point"] is None and viewer.settings["query"] == viewer.object.options[0][1]


def test_picking_a_box_is_choosing_its_object(deformable):
    viewer = RelationViewer(deformable, [image_of()])
    viewer.threshold.value = 0.0
    for index in (2, 0, 5):
        viewer.canvas.picked = index
        assert viewer.object.value == viewer.object.options[index][1]
    viewer.object.value = viewer.object.options[3][1]
    assert viewer.canvas.picked == 3


@pytest.mark.parametrize("point", [None, (20, 10)])
def test_sampling_points_are_those_of_the_trace(deformable, point):
    viewer = SamplingViewer(deformable, [image_of()])
    trace, query = viewer.gallery.scene.trace, viewer.object.value
    viewer.layer.value = 0
    if point:
        viewer.ask.value = "point"
        viewer.x.value, viewer.y.value = point
    record_ = trace["encoder.0" if point else "decoder.0.cross"]
    asked = record_.cell_at(20.5, 10.5) if point else query
    dots = [(p["x"], p["y"]) for p in viewer.canvas.points if p["shape"] == "dot"]
    wanted = record_.points()[asked].flatten(0, 2)
    np.testing.assert_allclose(sorted(dots), sorted(map(tuple, wanted.tolist())), atol=0.02)

    viewer.head.value, viewer.level.value = 1, 2
    dots = [p for p in viewer.canvas.points if p["shape"] == "dot"]
    wanted = torch.cat([record_.points()[asked, 1, 2], record_.weights[0, asked, 1, 2, :, None]], 1)
    wanted = sorted(wanted.tolist(), key=lambda row: row[2])
    np.testing.assert_allclose([(p["x"], p["y"]) for p in dots], [row[:2] for row in wanted], atol=0.01)
    weights = np.array([row[2] for row in wanted])
    areas = np.array([p["r"] for p in dots]) ** 2
    np.testing.assert_allclose(areas / areas[-1], np.maximum(weights / weights[-1], 0.02), atol=0.05)
    assert len({p["color"] for p in dots}) == 1


def test_points_are_colored_by_level_or_by_head(deformable):
    viewer = SamplingViewer(deformable, [image_of()])
    assert len(viewer.canvas.legend) == 3
    viewer.color.value = "head"
    assert [words for _, words in viewer.canvas.legend] == ["head 0", "head 1", "head 2", "head 3"]
    assert {p["color"] for p in viewer.canvas.points if p["shape"] == "dot"} == {c for c, _ in viewer.canvas.legend}


def test_stages_show_the_box_of_each_stage_and_its_glimpse(deformable):
    viewer = StageViewer(deformable, [image_of()])
    viewer.threshold.value = 0.0
    trace, query = viewer.gallery.scene.trace, viewer.object.value
    for stage in (2, 1, 0):
        viewer.stage.value = stage
        assert viewer.object.value == query, "an object stays chosen through the stages"
        places = [predictions(trace, n).boxes_xyxy()[query].tolist() for n in range(3)]
        boxes = viewer.canvas.boxes
        np.testing.assert_allclose(boxes[viewer.canvas.picked]["box"], places[stage], atol=0.01)
        path = [box["box"] for box in boxes if box.get("fixed") and not box.get("dashed")]
        np.testing.assert_allclose(np.array(path).reshape(-1, 4), np.array(places[:stage]).reshape(-1, 4), atol=0.01)
        dashed = [box["box"] for box in boxes if box.get("dashed")]
        if stage:
            wanted = trace[f"stage.{stage}.glimpses"].boxes_xyxy()[query].tolist()
            np.testing.assert_allclose(dashed, [wanted], atol=0.01)
        else:
            assert dashed == []
    viewer.stage.value, viewer.glimpse.value, viewer.path.value = 2, False, False
    assert not any(box.get("fixed") for box in viewer.canvas.boxes)


def test_an_object_that_a_stage_loses_stays_chosen(deformable):
    viewer = StageViewer(deformable, [image_of()])
    viewer.threshold.value = 1.0
    query = viewer.object.value
    weakest = predictions(viewer.gallery.scene.trace, 0).best()[0]
    viewer.stage.value = 0
    assert viewer.object.value == query
    assert len(viewer.object.options) == (1 if weakest.argmax() == query else 2)


@pytest.mark.parametrize(("stage", "layer", "head"), [(2, 1, None), (1, 0, 3), (0, 1, 0)])
def test_lines_go_to_the_most_related(deformable, stage, layer, head):
    viewer = RelationViewer(deformable, [image_of()])
    viewer.threshold.value, viewer.top.value = 0.0, 2
    viewer.stage.value, viewer.layer.value = stage, layer
    viewer.head.value = ALL if head is None else head
    trace, query = viewer.gallery.scene.trace, viewer.object.value
    found = related(trace, query=query, stage=stage, layer=layer, head=head, threshold=0.0)
    assert len(viewer.canvas.lines) == min(2, len(found.queries))
    at = {q: box for (_, q), box in zip(viewer.object.options, viewer.canvas.boxes)}
    for line, other, weight in zip(viewer.canvas.lines, found.queries.tolist(), found.weights.tolist()):
        left, top, right, bottom = at[other]["box"]
        assert left <= line["ends"][2] <= right and top <= line["ends"][3] <= bottom
        assert line["width"] == pytest.approx(1 + 16 * weight, abs=0.01)
        assert at[other]["tag"].endswith(f"{100 * weight:.0f} %")


# Controls.


@pytest.mark.parametrize("kind", VIEWERS, ids=lambda kind: kind.title)
def test_every_control_has_a_label_and_changes_what_is_shown(kind, deformable):
    viewer = kind(deformable, [image_of()])
    viewer.threshold.value = 0.0
    for name, control in viewer.choices.items():
        for part in getattr(control, "children", [control]):
            assert part.description, name
            if part.disabled:
                assert name in ("point", "object")  # one of both is asked
                viewer.ask.value = name
            if name == "glimpse":
                viewer.stage.value = 1
            before = json.loads(viewer.canvas.settings), shown(viewer), viewer.canvas.smooth
            if hasattr(part, "options"):
                values = [o[1] if isinstance(o, tuple) else o for o in part.options]
                part.value = next(value for value in reversed(values) if value != part.value)
            elif isinstance(part.value, bool):
                part.value = not part.value
            else:
                part.value = part.min if part.value != part.min else part.max
            after = json.loads(viewer.canvas.settings), shown(viewer), viewer.canvas.smooth
            assert before[0] != after[0] and before[1:] != after[1:], name
        viewer.threshold.value = 0.0


def test_a_changed_control_computes_nothing(deformable, monkeypatch):
    viewer = AttentionViewer(deformable, [image_of()])
    monkeypatch.setattr("regolite.viewers.gallery.detect", lambda *_: pytest.fail("the model ran again"))
    viewer.layer.value, viewer.head.value, viewer.canvas.clicked = 0, 1, [3.0, 4.0]
    assert viewer.settings["head"] == 1


def test_choices_follow_the_detector(dense, plain):
    viewer = RelationViewer(plain, [image_of()])
    assert viewer.stage.disabled and viewer.stage.value == 0 and viewer.layer.max == 1
    assert RelationViewer(dense, [image_of()]).stage.max == 2


# Images.


def test_folders_photographs_held_sideways_and_files_that_are_not_there(plain, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image_of().save(tmp_path / "b.png", exif=exif)
    image_of(50, 60).save(tmp_path / "a.png")
    with Image.open(tmp_path / "b.png") as opened:
        gallery = Gallery(plain, [tmp_path, opened, tmp_path / "none.png"])
        assert [source.name for source in gallery.sources.values()] == ["a.png", "b.png", "b.png", "none.png"]
        sizes = []
        for number in range(3):
            gallery.chooser.value = number
            sizes.append(gallery.scene.image.size)
            assert gallery.scene.trace.frame.original.tolist() == [list(sizes[-1][::-1])]
    assert sizes == [(50, 60), (70, 90), (70, 90)], "upright"
    gallery.chooser.value = 3
    assert "none.png does not exist" in gallery.message.text


def test_images_of_every_kind(plain, tmp_path):
    image_of().save(tmp_path / "file.png")
    scenes = Scenes(2, size=96)
    gallery = Gallery(plain, [tmp_path / "file.png", image_of(50, 60), scenes])
    assert len(gallery.sources) == 4
    sizes = []
    for number in gallery.sources:
        gallery.chooser.value = number
        sizes.append(gallery.scene.image.size)
    assert sizes == [(90, 70), (50, 60), (96, 96), (96, 96)]
    assert Gallery(plain, image_of()).scene.image.size == (90, 70)
    assert len(Gallery(plain, scenes).sources) == 2


def test_traces_of_few_images_are_kept(plain):
    gallery = Gallery(plain, [image_of(seed=seed) for seed in range(KEPT + 2)])
    first = gallery.scene
    for number in range(KEPT):
        gallery.chooser.value = number
    gallery.chooser.value = 0
    assert gallery.scene is first, "computed twice"
    for number in range(1, KEPT + 2):
        gallery.chooser.value = number
    assert len(gallery.kept) == KEPT
    gallery.chooser.value = 0
    assert gallery.scene is not first and len(gallery.kept) == KEPT


def test_own_images(plain, tmp_path):
    explorer = Explorer(plain, [image_of()])
    gallery = explorer.gallery
    buffer = io.BytesIO()
    image_of(40, 30).save(buffer, "png")
    for number in range(KEPT + 2):
        gallery.upload.value = (file_of(f"own{number}.png", buffer.getvalue()),)
        assert gallery.scene.name == f"own{number}.png" and gallery.scene.image.size == (40, 30)
        assert gallery.upload.value == (), "the file is kept twice"
    assert [label for label, _ in gallery.chooser.options][1:] == [f"own{n}.png" for n in range(2, KEPT + 2)]
    image_of(20, 20).save(tmp_path / "named.png")
    gallery.path.value = str(tmp_path / "named.png")
    assert gallery.scene.image.size == (20, 20)
    assert all(viewer.canvas.width == 20 for viewer in explorer.viewers.values())


def test_what_is_no_image_gets_one_line(plain, tmp_path, capfd):
    gallery = Gallery(plain, [image_of()])
    before = gallery.scene
    gallery.upload.value = (file_of("<b>.png", b"no image"),)
    assert gallery.message.text == "<b>.png can't be read as an image: choose a JPEG or PNG file"
    assert "<b>" not in gallery.message.value and 'role="alert"' in gallery.message.value
    (tmp_path / "words.jpg").write_text("words")
    for path in (tmp_path / "words.jpg", tmp_path / "missing.jpg"):
        gallery.path.value = str(path)
        assert str(path) in gallery.message.text and "\n" not in gallery.message.text
    assert gallery.scene is before
    gallery.chooser.value = None if None in dict(gallery.chooser.options).values() else 0
    assert capfd.readouterr() == ("", "")


def test_a_broken_image_of_the_list_gets_one_line(plain, tmp_path):
    viewer = AttentionViewer(plain, [tmp_path / "gone.jpg", image_of()])
    assert "gone.jpg does not exist" in viewer.gallery.message.text
    with pytest.raises(UserError, match="no image yet"):
        viewer.figure()
    viewer.gallery.chooser.value = 1
    assert viewer.gallery.message.text == "" and viewer.canvas.boxes


def test_no_image_yet(plain):
    explorer = Explorer(plain)
    assert "file of your own" in explorer.gallery.message.text
    viewer = explorer.viewers["Attention"]
    assert viewer.button.disabled and viewer.canvas.label == "no image yet"
    viewer.gallery.upload.value = (file_of("a.png", _png(image_of())),)
    assert not viewer.button.disabled and viewer.canvas.boxes


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_progress_is_said_while_a_image_is_computed(plain, monkeypatch):
    gallery = Gallery(plain, [image_of(), image_of(seed=1)])
    said = []
    monkeypatch.setattr(
        "regolite.viewers.gallery.detect", lambda *given: said.append(gallery.message.text) or regolite.detect(*given)
    )
    gallery.chooser.value = 1
    assert said == ["computing image 2 ..."] and gallery.message.text == ""


def test_a_trace_alone_is_enough(deformable, tmp_path):
    image = image_of()
    with record(deformable) as trace:
        regolite.detect(deformable, image)
    trace.save(tmp_path / "trace.npz")
    alone = Explorer(None, [image, image_of(seed=1)], Trace.load(tmp_path / "trace.npz"))
    live = Explorer(deformable, [image])
    for title in live.viewers:
        assert shown(alone.viewers[title]) == shown(live.viewers[title])
    alone.gallery.chooser.value = 1
    assert "can't be computed without a model" in alone.gallery.message.text
    with pytest.raises(UserError, match="give it as the first of images"):
        Explorer(None, trace=trace)
    assert "the image has 10 x 10" in Explorer(None, [image_of(10, 10)], trace).gallery.message.text


# What does not suit.


def test_tabs_are_those_that_suit(deformable, dense, plain):
    def titles(model):
        return list(Explorer(model, [image_of()]).tabs.titles)

    assert titles(deformable) == ["Attention", "Sampling", "Stages", "Relations"]
    assert titles(dense) == ["Attention", "Stages", "Relations"]
    assert titles(plain) == ["Attention", "Relations"]


@pytest.mark.parametrize(("kind", "words"), [(StageViewer, "no stages"), (SamplingViewer, "samples no points")])
def test_a_model_that_lacks_it_gets_one_line(kind, words, plain, capfd):
    viewer = kind(plain, [image_of()])
    assert words in viewer.message.text and "\n" not in viewer.message.text
    assert viewer.button.disabled and viewer.object.disabled
    with pytest.raises(UserError, match=words):
        viewer.figure()
    viewer.button.click()
    assert words in viewer.saved.text
    assert capfd.readouterr() == ("", "")


def test_a_model_that_can_not_be_recorded_gets_one_line():
    model = torch.nn.Linear(2, 2)
    assert "no attention to record" in Gallery(model, [image_of()]).message.text


# Saved images.


@pytest.mark.parametrize("kind", VIEWERS, ids=lambda kind: kind.title)
def test_saved_png_holds_its_settings(kind, deformable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    viewer = kind(deformable, [image_of()])
    viewer.button.click()
    file = tmp_path / f"{kind.title.lower()}.png"
    assert viewer.saved.text == f"Saved {file}"
    with Image.open(file) as image:
        settings = json.loads(image.text["regolite"])
    assert settings == json.loads(json.dumps(viewer.settings))
    assert settings["viewer"] == kind.title.lower() and settings["query"] == viewer.object.value

    # The settings are enough to come back to the same image.
    other = kind(deformable, [image_of()])
    other.threshold.value = 1.0
    for name, control in other.choices.items():
        name = "query" if name == "object" else name
        if name != "point":
            value = settings[name]
            control.value = ALL if value is None and name in ("head", "level") else value
    assert shown(other) == shown(viewer)
    again = other.save("again.png")
    assert again.read_bytes() == file.read_bytes()
    assert other.save("again.jpg") == Path("again_2.png"), "a file is never written over"


def test_a_figure_of_a_point(dense, tmp_path):
    viewer = AttentionViewer(dense, [image_of()])
    viewer.canvas.clicked = [20.0, 30.0]
    with Image.open(viewer.save(tmp_path / "point.png")) as image:
        assert json.loads(image.text["regolite"])["point"] == [20.5, 30.5]


def test_a_place_that_can_not_be_written_gets_one_line(plain, tmp_path):
    viewer = AttentionViewer(plain, [image_of()])
    viewer.file.value = str(tmp_path / "no" / "folder.png")
    viewer.button.click()
    assert "can't be written" in viewer.saved.text


# The browser's half, as far as it can be read.


def test_the_canvas_can_be_used_by_keyboard_and_heard():
    code, look = canvas.ImageCanvas._esm, canvas.ImageCanvas._css
    for word in ('role: "img"', "aria-label", "aria-pressed", "tabindex", '"Enter"', "ArrowLeft", 'role: "status"',
                 'role: thing.fixed ? "img" : "button"', "data-lm-suppress-shortcuts"):  # fmt: skip
        assert word in code, word
    assert "prefers-reduced-motion" in look and ":focus-visible" in look and "--jp-ui-font-color1" in look
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", code + look), "nothing is fetched"


def test_heat_is_colored_as_in_the_figures():
    from matplotlib.colors import to_rgba

    from regolite.plots.drawing import HEAT

    stops = re.search(r"const HEAT = (\[\[.*?\]\]);", canvas.ImageCanvas._esm).group(1)
    for place, stop in zip((0.0, 0.5, 1.0), json.loads(stops), strict=True):
        np.testing.assert_allclose(np.array(stop) / 255, to_rgba(HEAT(place)), atol=0.01)


def test_large_images_are_sent_small():
    jpeg = jpeg_of(Image.new("RGB", (4000, 1000)))
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.size == (BROWSER_SIDE, BROWSER_SIDE // 4)


def test_words_of_others_are_text_in_the_browser():
    """Names of classes and files may hold what HTML and MathJax would read."""
    assert "innerHTML" not in canvas.ImageCanvas._esm and "insertAdjacentHTML" not in canvas.ImageCanvas._esm
    message = Message()
    message.say('<img src=x onerror="alert(1)"> & $5')
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; $5" in message.value and "<img" not in message.value
