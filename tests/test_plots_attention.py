"""Figures of a trace: what was planted is drawn where it is, and the numbers are those of the trace."""

import numpy as np
import pytest
import small_models
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image
from test_recorder import planted, spot_image, with_rego

import regolite
from regolite import Trace, UserError, record
from regolite.data import Scenes, batch_images
from regolite.data.dataset import Objects
from regolite.evaluation.error_types import judge
from regolite.inference import to_detections
from regolite.models.deformable_attention import sample_and_mix
from regolite.models.presets import configure
from regolite.plots.attention import as_attention, attention_figure, sampling_figure
from regolite.plots.drawing import BLUE, TRUTH_COLOR, VERMILLION, stage_color
from regolite.plots.entropy import EntropyByEpoch, entropies, entropy_by_layer, entropy_figure
from regolite.plots.error_analysis import errors_figure, verdicts
from regolite.plots.stages import related, relations_figure, stages_figure
from regolite.tracing.trace import AttentionMap, Boxes, Frame, Glimpses, Sampling
from regolite.types import Prediction

FRAMES = {  # padded batch, size in it, original size; height before width
    "as it is": ((96, 128), (96, 128), (96, 128)),
    "padded": ((128, 160), (90, 140), (90, 140)),
    "made smaller": ((96, 128), (96, 128), (300, 400)),
    "high, made larger, padded": ((256, 192), (250, 130), (125, 65)),
    "squeezed": ((128, 128), (64, 128), (200, 300)),
}
every_frame = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)


def frame_of(padded, size, original):
    return Frame(padded, torch.tensor([size]), torch.tensor([original]))


def image_of(frame, index=0):
    height, width = frame.original[index].tolist()
    return Image.new("RGB", (width, height), (90, 120, 100))


def brightest(figure, ax):
    """The middle of the most colored place on some axes, in the axes' own coordinates."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(int)
    height = pixels.shape[0]
    place = ax.get_window_extent()
    bottom, top, left, right = round(height - place.y0), round(height - place.y1), round(place.x0), round(place.x1)
    warm = (pixels[..., 0] - pixels[..., 2])[top + 3 : bottom, left:right]  # off the bar above
    assert warm.max() > 100
    rows, columns = (warm > 0.9 * warm.max()).nonzero()
    middle = (left + (columns.min() + columns.max() + 1) / 2, height - top - 3 - (rows.min() + rows.max() + 1) / 2)
    return ax.transData.inverted().transform(middle)


def boxes_at(frame, *boxes, scores=None, labels=None, classes=3):
    """Boxes, given ``xyxy`` in pixels of the original image."""
    corners = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4)
    height, width = frame.original[0].tolist()
    corners = corners / torch.tensor([width, height, width, height])
    relative = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)
    probabilities = torch.full((1, len(boxes), classes), 0.01)
    for query, (score, label) in enumerate(zip(scores or [0.9] * len(boxes), labels or [0] * len(boxes))):
        probabilities[0, query, label] = score
    return Boxes(torch.logit(probabilities), relative, "sigmoid", frame)


def rectangles(ax):
    return [
        (to_hex(p.get_edgecolor()).upper(), p.get_linestyle(), [round(float(v), 1) for v in p.get_bbox().extents])
        for p in ax.patches
    ]


def written(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


# Attention.


@pytest.mark.parametrize(
    ("width", "height", "x", "y"),
    [(512, 300, 200, 150), (300, 512, 50, 470), (640, 201, 610, 180), (101, 77, 90, 70), (90, 333, 80, 322)],
)
def test_attention_is_drawn_at_the_spot_that_a_detector_looks_at(width, height, x, y):
    model, scale = planted(256), 256 / max(width, height)
    image = spot_image(width, height, x, y, max(2, round(8 / scale)))
    with record(model) as trace:
        regolite.detect(model, image)
    for choice in ({}, {"head": 2}, {"layer": 0, "query": 5}):
        figure = attention_figure(image, trace, **choice)
        at = brightest(figure, figure.axes[0])
        assert np.abs(at - (x, y)).max() <= 16 / scale + 1


def test_figures_read_an_image_as_the_detector_did(tmp_path):
    upright = spot_image(200, 120, 150, 30, 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    [found] = regolite.detect(planted(256), upright)
    with record(model := planted(256)) as trace:
        regolite.detect(model, tmp_path / "phone.png")
    with Image.open(tmp_path / "phone.png") as opened:
        for image in (tmp_path / "phone.png", opened, np.asarray(upright)):
            figure = attention_figure(image, trace)
            assert np.abs(brightest(figure, figure.axes[0]) - (150, 30)).max() <= 14
            assert regolite.plots.draw_detections(image, found, ["a"] * 99).size == (200, 120)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_in_a_padded_batch_every_image_has_its_own_attention(index):
    model = planted(256)
    spots = [(110, 50, (64, 160)), (50, 110, (160, 64)), (20, 20, (50, 40))]
    images = []
    for x, y, size in spots:
        pixels = torch.zeros(3, *size)
        pixels[0, y - 4 : y + 4, x - 4 : x + 4] = 2.0
        images.append(pixels)
    with record(model) as trace, torch.no_grad():
        model(batch_images(images, 32))
    figure = attention_figure(image_of(trace.frame, index), trace, query=1, index=index)
    assert np.abs(brightest(figure, figure.axes[0]) - spots[index][:2]).max() <= 17


@every_frame
def test_attention_of_the_cell_under_a_point_is_drawn_where_it_goes(frame):
    frame = frame_of(*frame)
    shape = tuple(side // 16 for side in frame.padded)
    image = image_of(frame)
    weights = torch.zeros(1, 2, shape[0] * shape[1], shape[0] * shape[1])
    found = AttentionMap(weights, (shape,), None, frame)
    asks = (0.2 * image.width, 0.9 * image.height)
    target = found.cell_at(0.7 * image.width, 0.3 * image.height)
    weights[:, 1, found.cell_at(*asks), target] = 1.0  # the second head
    trace = Trace({"encoder.0": found}, frame)
    cell = 16 * max(frame.original[0] / frame.sizes[0])
    for head in (None, 1):
        figure = attention_figure(image, trace, point=asks, head=head)
        assert np.abs(brightest(figure, figure.axes[0]) - found.centers()[target].numpy()).max() <= cell / 4 + 1
    figure = attention_figure(image, trace, point=asks, head=[0, 1])
    assert np.asarray(figure.axes[0].images[1].get_array()).max() == 0 and len(figure.axes) == 2


def sampling_at(frame, *points, weights=None, levels=2):
    """Deformable attention of one query that reads these points, pixels of the image, by one head on each level."""
    shapes = tuple((-(-frame.padded[0] // s), -(-frame.padded[1] // s)) for s in (8, 16)[:levels])
    at = frame.to_network(torch.tensor(points, dtype=torch.float32))
    spans = torch.tensor([[s * w, s * h] for (h, w), s in zip(shapes, (8.0, 16.0))])
    locations = (at / spans[:, None])[None, None, None]
    share = torch.tensor(weights or [1.0] * len(points)) / (levels * sum(weights or [1.0] * len(points)))
    references = (at.mean(0) / spans)[None, None]
    return Sampling(locations, share.expand(1, 1, 1, levels, -1), references, shapes, frame)


@every_frame
def test_sampling_points_and_their_heat_are_drawn_where_they_are(frame):
    frame = frame_of(*frame)
    image = image_of(frame)
    points = [(0.7 * image.width, 0.3 * image.height), (0.71 * image.width, 0.31 * image.height)]
    found = sampling_at(frame, *points)
    box = [0.6 * image.width, 0.2 * image.height, 0.9 * image.width, 0.5 * image.height]
    trace = Trace({"decoder.0.cross": found, "decoder.0.boxes": boxes_at(frame, box)}, frame)
    figure = sampling_figure(image, trace)
    [markers] = figure.axes[0].collections
    np.testing.assert_allclose(np.sort(markers.get_offsets(), 0), np.sort(points * 2, 0), rtol=0, atol=0.01)
    cross = [line for line in figure.axes[0].lines if line.get_marker() == "+"][-1]
    np.testing.assert_allclose(np.concatenate(cross.get_data()), np.mean(points, 0), rtol=0, atol=0.01)
    assert (BLUE, "solid", [round(side, 1) for side in box]) in rectangles(figure.axes[0])

    figure = attention_figure(image, trace, level=0)
    cell = 8 * float((frame.original[0] / frame.sizes[0]).max())
    middle = figure.axes[0]
    heat = np.asarray(middle.images[1].get_array())
    rows, columns = np.indices(heat.shape) + 0.5
    at = (columns * heat).sum() / heat.sum(), (rows * heat).sum() / heat.sum()
    assert np.abs(at - np.mean(points, 0)).max() <= cell / 2


def test_markers_have_the_weights_and_places_of_the_trace():
    model = small_models.deformable(levels=3)
    model.model_config = configure("deformable_detr_tiny", image_size=96)
    image = Image.new("RGB", (333, 100))
    with record(model) as trace:
        regolite.detect(model, image)
    found = trace["decoder.1.cross"]
    for head, level in ((None, None), (2, None), (None, 1), (3, 0)):
        figure = sampling_figure(image, trace, query=4, head=head, level=level)
        [markers] = figure.axes[0].collections
        heads = range(4) if head is None else [head]
        levels = range(3) if level is None else [level]
        wanted = {
            tuple(round(v, 2) for v in (*found.points()[4, m, n, k].tolist(), float(found.weights[0, 4, m, n, k])))
            for m in heads for n in levels for k in range(2)
        }  # fmt: skip
        drawn = zip(markers.get_offsets().tolist(), markers.get_array().tolist())
        assert {tuple(round(v, 2) for v in (*place, weight)) for place, weight in drawn} == wanted
        assert markers.norm.vmax == pytest.approx(markers.get_array().max())
    figure = sampling_figure(image, trace, query=[1, 2], layer=[0, 1])
    assert sum(len(ax.collections) for ax in figure.axes) == 4


def test_weights_of_cells_mix_the_values_to_what_deformable_attention_reads():
    torch.manual_seed(3)
    shapes = [(5, 7), (3, 4)]
    frame = frame_of((40, 56), (40, 56), (40, 56))
    locations = torch.rand(1, 6, 2, 2, 4, 2) * 1.4 - 0.2  # some of them outside
    weights = torch.rand(1, 6, 2, 8).softmax(-1).unflatten(-1, (2, 4))
    values = torch.randn(1, 47, 2, 3)
    wanted = sample_and_mix(values, shapes, locations, weights)
    found = Sampling(locations, weights, torch.zeros(1, 6, 2, 2), tuple(shapes), frame)
    for query in range(6):
        cells = as_attention(found, query)
        mixed = torch.einsum("bmqs,bsmc->bqmc", cells.weights, values).flatten(2)
        torch.testing.assert_close(mixed[:, 0], wanted[:, query], rtol=1e-4, atol=1e-5)
        assert cells.weights.sum(-1).max() <= 1 + 1e-5


# Stages.


def test_the_path_shows_boxes_scores_and_what_every_stage_saw():
    model = with_rego("refined")
    model.model_config = configure("deformable_detr_tiny", image_size=96)
    image = Image.new("RGB", (333, 100))
    with record(model) as trace:
        regolite.detect(model, image)
    figure = stages_figure(image, trace, query=3)
    above, below = figure.axes[:3], figure.axes[3:]
    for stage in range(3):
        x0, y0, x1, y1 = trace.by_stage[stage].boxes_xyxy()[3].tolist()
        color, line, box = rectangles(above[stage])[-1]
        assert color == stage_color(stage) and line == "solid"
        assert box == pytest.approx([max(x0, 0), max(y0, 0), min(x1, 333), min(y1, 100)], abs=0.06)
        score, label = (values[3].item() for values in trace.by_stage[stage].best())
        assert f"class {label} {score:.2f}" in written(above[stage])
    for stage in (1, 2):
        glimpses = trace[f"stage.{stage}.glimpses"]
        x0, y0, x1, y1 = glimpses.boxes_xyxy()[3].tolist()
        np.testing.assert_allclose([*below[stage].get_xlim(), *below[stage].get_ylim()], [x0, x1, y1, y0], rtol=1e-5)
        seen = trace.by_stage[stage - 1].boxes_xyxy()[3].tolist()
        assert rectangles(below[stage])[1][2] == pytest.approx(seen, abs=0.06)
        assert f"from the map of stride {glimpses.strides[int(glimpses.level[0, 3])]}" in written(below[stage])
    label = int(trace.by_stage[-1].best()[1][3])
    drawn = below[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, [float(found.scores[0, 3, label]) for found in trace.by_stage], rtol=1e-5)


# Relations.


def planted_relations(frame):
    """Object A (query 0) asks B (2, and its double 3) most, then C (4); 1 is a double of A, and 5 stands for nothing.

    In numbers: A 0.1 + 0.05, B 0.2 + 0.25, C 0.3, nothing 0.1. So B is the most related, though no query has more
    weight than C's.
    """
    a, b, c = [10, 10, 60, 60], [100, 10, 160, 80], [20, 70, 80, 95]
    boxes = boxes_at(
        frame, a, [12, 10, 62, 60], b, [104, 12, 160, 80], c, [0, 0, 5, 5],
        scores=[0.9, 0.6, 0.8, 0.2, 0.7, 0.1], labels=[0, 0, 1, 2, 0, 1],
    )  # fmt: skip
    weights = torch.full((1, 2, 6, 6), 1 / 6)
    weights[0, :, 0] = torch.tensor([0.1, 0.05, 0.2, 0.25, 0.3, 0.1])
    weights[0, 1, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0])  # the second head asks the object itself alone
    glimpses = Glimpses(torch.zeros(1, 6, 4), torch.zeros(1, 6, dtype=torch.long), (8,), frame)
    records = {
        "decoder.0.boxes": boxes,
        "stage.1.glimpses": glimpses,
        "stage.1.relations.0": AttentionMap(weights, (), None, frame),
        "stage.1.boxes.0": boxes_at(frame, *[[0, 0, 9, 9]] * 6),
    }
    return Trace(records, frame, ("cat", "dog", "kite")), (a, b, c)


@every_frame
def test_relations_join_the_right_boxes_with_the_right_weights(frame):
    frame = frame_of(frame[0], frame[1], (100, 170))
    trace, (a, b, c) = planted_relations(frame)
    found = related(trace, query=0, head=0)
    assert found.queries.tolist() == [2, 4] and found.of.tolist() == [-1, -1, 0, 0, 1, -2]
    assert [*found.weights.tolist(), found.itself, found.nothing] == pytest.approx([0.45, 0.3, 0.15, 0.1])
    assert related(trace, query=0, head=1).itself == 1.0
    assert related(trace, query=0).weights.tolist() == pytest.approx([0.225, 0.15])

    figure = relations_figure(image_of(frame), trace, query=0, head=0)
    [ax] = figure.axes
    lines = [line for line in ax.lines if line.get_transform() == ax.transData]
    middles = [np.add(box[:2], box[2:]) / 2 for box in (a, b, c)]
    for line, to in zip(lines, middles[1:], strict=True):
        np.testing.assert_allclose(np.transpose(line.get_data()), [middles[0], to], atol=0.01)
    widths = [line.get_linewidth() - 0.8 for line in lines]
    assert widths[0] / widths[1] == pytest.approx(0.45 / 0.3)
    assert {"cat", "dog 45 %", "cat 30 %", "itself 15 %, no object 10 % (uniform 17 %)"} <= set(written(ax))
    assert [box for color, _, box in rectangles(ax) if color == stage_color(1)] == [a]

    only = relations_figure(image_of(frame), trace, query=0, head=0, top=1)
    assert "cat 30 %" not in written(only.axes[0])
    high = related(trace, query=4, threshold=0.85)
    assert high.queries.tolist() == [0]  # who asks is an object whatever its score; dog and kite are none


def test_the_self_attention_of_a_detector_without_rego_can_be_shown():
    model = small_models.deformable()
    model.model_config = configure("deformable_detr_tiny", image_size=96)
    image = Image.new("RGB", (120, 100))
    with record(model) as trace:
        regolite.detect(model, image)
    with pytest.raises(UserError, match="stage=0 shows the self-attention"):
        relations_figure(image, trace)
    relations_figure(image, trace, stage=0)
    found = related(trace, query=2, stage=0, layer=0)
    assert float(found.weights.sum()) + found.itself + found.nothing == pytest.approx(1, abs=1e-5)


# Errors.


def test_errors_are_those_of_evaluation():
    """Of detections near the truth, some in the wrong place, some of the wrong class, some twice."""
    scenes, random = Scenes(6, split="val", seed=1), np.random.default_rng(0)
    kinds = set()
    for i in range(len(scenes)):
        height, width = scenes.size(i)
        frame = frame_of((96, 128), (96, 96), (height, width))
        truth = scenes.objects(i)[np.arange(3 * len(scenes.objects(i))) % len(scenes.objects(i))]
        corners = np.hstack([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]])
        corners = corners + random.normal(0, 5, corners.shape)
        labels = [int(label) if random.random() < 0.7 else 0 for label in truth.labels]
        found = boxes_at(frame, *corners.tolist(), scores=random.random(len(truth)).tolist(), labels=labels,
                         classes=len(scenes.classes))  # fmt: skip
        trace = Trace({"decoder.0.boxes": found}, frame, scenes.classes)
        [detections] = to_detections(Prediction(found.logits, found.boxes), frame.original, "sigmoid")
        results = detections.to_coco(scenes.image_ids[i], scenes.category_ids)
        for threshold in (0.0, 0.3, 0.8):
            judged = judge(scenes.coco, results).above(threshold)
            wanted = judged.counts()
            wanted["missed"] = int((judged.truth.image_ids[judged.missed] == scenes.image_ids[i]).sum())
            assert verdicts(trace, scenes.objects(i), threshold=threshold).counts() == wanted
            kinds |= {kind for kind, count in wanted.items() if count}
    assert kinds >= {"correct", "class", "box", "duplicate", "background", "missed"}


def test_right_wrong_missed_and_crowds_have_their_own_look():
    frame = frame_of((96, 128), (96, 128), (192, 256))
    truth = Objects(
        np.arange(1, 5), np.array([0, 1, 2, 0]),
        np.array([[10.0, 10, 50, 50], [100, 10, 60, 60], [180, 100, 40, 40], [0, 120, 100, 60]]),
        np.full(4, 2000.0), np.array([False, False, False, True]), np.full(4, -1),
    )  # fmt: skip
    found = boxes_at(
        frame, [10, 10, 60, 60], [100, 10, 160, 70], [10, 130, 60, 170], [200, 10, 240, 40],
        scores=[0.9, 0.8, 0.7, 0.6], labels=[0, 0, 0, 2],
    )  # fmt: skip
    trace = Trace({"decoder.0.boxes": found}, frame, ("cat", "dog", "kite"))
    figure = errors_figure(image_of(frame), trace, truth)
    [ax] = figure.axes
    assert {"cat 0.90", "cat 0.80: class", "cat 0.70: in a crowd", "kite 0.60: background", "kite: missed"} <= set(
        written(ax)
    )
    assert "1 right, 2 wrong, 1 missed" in written(ax)
    looks = rectangles(ax)
    assert (BLUE, "solid", [10, 10, 60, 60]) in looks and (VERMILLION, "solid", [100, 10, 160, 70]) in looks
    [(_, line, box)] = [look for look in looks if look[0] == TRUTH_COLOR]
    assert line != "solid" and box == [180, 100, 220, 140]

    other = errors_figure(image_of(frame), trace, truth, base=trace, threshold=0.85)
    assert len(other.axes) == 2 and "1 right, 0 wrong, 2 missed" in written(other.axes[0])
    with pytest.raises(UserError, match="class 2, but the detector knows only 0 to 1"):
        verdicts(Trace({"decoder.0.boxes": boxes_at(frame, [0, 0, 9, 9], classes=2)}, frame), truth)


# Entropy.


def test_entropy_is_that_of_the_cells_on_the_image():
    frame = Frame((32, 64), torch.tensor([[32, 64], [32, 32]]), torch.tensor([[64, 128], [64, 64]]))
    weights = torch.zeros(2, 1, 2, 2)
    weights[0, 0] = 0.5  # log 2 twice
    weights[1, 0, :, 0] = 1.0  # zero, and a row of padding
    weights[1, 0, 1] = 0.5
    mask = torch.tensor([[False, False], [False, True]])
    trace = Trace({"encoder.0": AttentionMap(weights, ((1, 2),), mask, frame)}, frame)
    assert entropy_by_layer(trace)["encoder.0"] == pytest.approx(2 * np.log(2) / 3)


def test_entropies_by_epoch_are_watched_and_drawn():
    scenes = Scenes(2, split="val", seed=1)
    model = with_rego("detr").train()
    model.model_config = configure("detr_tiny", image_size=64)
    entropy = EntropyByEpoch(model, scenes, range(2))
    assert model.training
    with torch.no_grad():
        for layer in model.detector.decoder.layers:
            layer.cross_attention.query.weight.zero_()
            layer.cross_attention.query.bias.zero_()
    entropy({"kind": "train", "step": 1, "epoch": 0})
    entropy({"kind": "evaluation", "split": "val", "epoch": 3})
    assert list(entropy.by_epoch) == [0, 3]
    assert entropy.by_epoch[3]["decoder.1.cross"] == pytest.approx(np.log(4), abs=1e-4)  # evenly at 2 x 2 cells
    assert entropy.by_epoch[0]["decoder.1.cross"] < entropy.by_epoch[3]["decoder.1.cross"]

    figure = entropy_figure(entropy.by_epoch)
    titles = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert len(titles) == 5
    [first, second] = titles["Decoder cross-attention"].lines
    assert first.get_label() == "layer 0" and list(second.get_xdata()) == [0, 3]
    assert list(second.get_ydata()) == [entropy.by_epoch[epoch]["decoder.1.cross"] for epoch in (0, 3)]
    assert len(titles["REGO: attention to the previous stage"].lines) == 4
    only = entropies(model, scenes, [0], names="decoder.*.cross")
    assert list(only) == ["decoder.0.cross", "decoder.1.cross"]
    assert len(entropy_figure([only, only]).axes) == 2  # one panel, and its axis at the right
    for wrong in ({}, [only, {}]):
        with pytest.raises(UserError, match="entropies by epoch"):
            entropy_figure(wrong)
    with pytest.raises(UserError, match="no images"):
        entropies(model, scenes, [])


# What is refused.


def test_wrong_choices_get_a_clear_word():
    model = small_models.detr()
    model.model_config = configure("detr_tiny", image_size=64)
    image = Image.new("RGB", (120, 100))
    with record(model) as trace:
        regolite.detect(model, image)
    wrong = {
        "the image has 100 x 120 pixels, but image 0 of the trace has 120 x 100": lambda: attention_figure(
            Image.new("RGB", (100, 120)), trace
        ),
        "index is 1, but there are only 1": lambda: attention_figure(image, trace, index=1),
        "query is 7, but there are only 7": lambda: attention_figure(image, trace, query=7),
        "head is 4, but there are only 4": lambda: attention_figure(image, trace, head=4),
        "level is 1, but there are only 1": lambda: attention_figure(image, trace, level=1),
        "no 'decoder.9.cross'": lambda: attention_figure(image, trace, layer=9),
        "outside the image": lambda: attention_figure(image, trace, point=(130, 5)),
        "give either a query.* or a point": lambda: attention_figure(image, trace, query=1, point=(5, 5)),
        "dense and samples no points: attention_figure": lambda: sampling_figure(image, trace),
        "only a detector with REGO": lambda: stages_figure(image, trace),
        "no boxes of stage 2": lambda: errors_figure(image, trace, Scenes(1, split="val").objects(0), stage=2),
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=message):
            call()
    with record(model, "*.self") as trace:
        regolite.detect(model, image)
    with pytest.raises(UserError, match=r"no decoder.\*.cross: record it too"):
        attention_figure(image, trace, query=0)


@pytest.mark.parametrize("name", small_models.TRANSFORMERS)
def test_every_family_can_be_looked_at(name):
    model = with_rego(name)
    model.model_config = configure("detr_tiny", image_size=64)
    image = Image.new("RGB", (60, 140), (200, 30, 30))
    with record(model) as trace:
        regolite.detect(model, image)
    for figure in (
        attention_figure(image, trace, query=[0, 3], head=[0, 1]),
        attention_figure(image, trace, point=(30, 100), layer=0),
        stages_figure(image, trace),
        relations_figure(image, trace),
    ):
        FigureCanvasAgg(figure).draw()
