"""The page of explain in a real browser, from disk: what it shows is what the trace says, by mouse and by keyboard."""

import re
from pathlib import Path

import numpy as np
import pytest

import regolite
from regolite import Trace
from regolite.data.images import read_image
from regolite.explaining import page_of
from regolite.plots.selection import class_name, predictions
from regolite.plots.stages import related

PHOTO = Path(__file__).parents[2] / "data/coco_tiny/images/000000475546.jpg"  # eleven objects
THRESHOLD = 0.3
HOSTILE = '</script><img src=x onerror="alert(1)">&\n\u05e9\u05dc\u05d5\u05dd'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trace():
    model = regolite.load()
    with regolite.record(model, ["references", "decoder.*", "stage.*"]) as trace:
        regolite.detect(model, PHOTO)
    return trace


@pytest.fixture(scope="module")
def file(trace, tmp_path_factory):
    return page_of(read_image(PHOTO), trace, PHOTO.name).save(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def visit(browser, file):
    """Open the page, with options of the browser's context; at the end nothing may have failed or left this machine."""
    problems, asked, contexts = [], [], []

    def visit(path=file, **options):
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type != "info" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


def shown(page):
    """The boxes of the page by query, in pixels of the image."""
    width, height = read_image(PHOTO).size
    place = "n => [n.dataset.key, ...['left', 'top', 'right', 'bottom'].map(side => parseFloat(n.style[side]) / 100)]"
    found = page.eval_on_selector_all(".box", f"nodes => nodes.map({place})")
    return {int(q): (x * width, y * height, (1 - r) * width, (1 - b) * height) for q, x, y, r, b in found}


def drawn(page):
    return page.eval_on_selector("#canvas", "canvas => canvas.toDataURL()")


def settled(page):
    """The image once nothing moves any more."""
    before, now = None, drawn(page)
    while before != now:
        page.wait_for_timeout(150)
        before, now = now, drawn(page)
    return now


def weights(page):
    rows = page.locator("#related li").all_inner_texts()
    return [re.sub(r"\s+", " ", row).replace("\u2068", "").replace("\u2069", "") for row in rows]


def expected_weights(trace, query, stage, threshold):
    found = related(trace, query=query, stage=stage, threshold=threshold)
    labels = predictions(trace, max(stage - 1, 0)).best()[1].tolist()
    names = [class_name(trace, labels[q]) for q in found.queries[:4].tolist()]
    shares = [*found.weights[:4].tolist(), found.itself, found.nothing]
    return [*names, "itself", "no object"], shares


def check_weights(page, trace, query, stage, threshold=THRESHOLD):
    names, shares = expected_weights(trace, query, stage, threshold)
    rows = [row.rsplit(" ", 2) for row in weights(page)]
    assert [name for name, _, _ in rows] == names
    np.testing.assert_allclose([float(share) for _, share, _ in rows], 100 * np.array(shares), atol=0.51)


def test_the_slider_shows_the_boxes_of_each_stage(visit, trace):
    page = visit()
    width, height = read_image(PHOTO).size
    images = set()
    for stage in (3, 2, 1, 0):
        page.locator("#stage").fill(str(stage))
        scores, _ = predictions(trace, stage).best()
        boxes = predictions(trace, stage).boxes_xyxy().clamp(min=0)
        boxes = boxes.minimum(boxes.new_tensor([width, height, width, height]))
        found = shown(page)
        assert set(found) == set((scores >= THRESHOLD).nonzero()[:, 0].tolist())
        for query, box in found.items():
            np.testing.assert_allclose(box, boxes[query].tolist(), atol=0.5)
        assert page.locator("#stage").get_attribute("aria-valuetext") == (
            f"stage {stage}" if stage else "the base detector"
        )
        images.add(settled(page))
    assert len(images) == 4


def test_pointing_at_a_box_shows_its_points_glimpses_and_relations(visit, trace):
    page = visit()
    before = settled(page)
    frame = page.locator("#view").bounding_box()
    width = read_image(PHOTO).width
    left, top, right, bottom = min(shown(page).values())  # the one at the left
    scale = frame["width"] / width
    page.mouse.move(frame["x"] + scale * (left + right) / 2, frame["y"] + scale * (top + bottom) / 2)
    query = int(re.search(r"query (\d+)", page.locator("#query").inner_text()).group(1))
    assert settled(page) != before
    check_weights(page, trace, query, 3)
    assert page.locator(".glimpse").all_inner_texts() == [
        f"stage {n}\nα\u00a0=\u00a0{alpha}" for n, alpha in ((1, 2), (2, 1.5), (3, 1))
    ]
    page.locator(".glimpse").first.click()
    check_weights(page, trace, query, 1)
    assert "stride" in page.locator("#legend").inner_text()
    before = settled(page)
    page.locator("#head").select_option("3")
    assert settled(page) != before, "the points of one head"
    page.locator("#show-reads + span").click()
    page.locator("#stage").fill("0")
    check_weights(page, trace, query, 0)


def test_the_path_runs_from_the_reference_to_the_last_box(visit, trace):
    page = visit()
    page.locator("#list button").first.click()
    page.locator("#path").click()
    page.wait_for_function("document.querySelectorAll('.step.now')[0]?.innerText.includes('stage 3')")
    steps = [row.split("\n")[0] for row in page.locator("#steps li").all_inner_texts()]
    assert steps == ["reference", "base", "stage 1", "stage 2", "stage 3"]
    query = int(re.search(r"query (\d+)", page.locator("#query").inner_text()).group(1))
    x, y = trace["references"].points()[query].round().int().tolist()
    assert f"around ({x}, {y})" in page.locator("#steps li").first.inner_text()
    assert page.locator("#way").is_visible() and page.locator("#path").get_attribute("aria-pressed") == "true"
    frame = page.locator("#view").bounding_box()
    page.mouse.move(frame["x"] + 20, frame["y"] + 0.8 * frame["height"])  # over another box
    assert f"query {query} " in page.locator("#query").inner_text(), "the object stays"
    for hidden in ("#way", "#panel"):
        page.mouse.click(frame["x"] + 0.5 * frame["width"], frame["y"] + 3)  # beside all boxes
        assert page.locator(hidden).is_hidden()
    assert page.locator("#list li").count() == len(shown(page))


def test_a_tour_by_keyboard(visit):
    page = visit(reduced_motion="reduce")
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.className") == "box"
    first = page.evaluate(f"{focused}.dataset.key")
    page.keyboard.press("ArrowRight")
    second = page.evaluate(f"{focused}.dataset.key")
    assert second != first and f"query {second} " in page.locator("#query").inner_text()
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator("#way").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#way").is_hidden()
    page.keyboard.press("1")
    assert page.locator("#stage").input_value() == "1"
    assert page.evaluate(f"{focused}.dataset.key") == second, "the focus stays on the object"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("#stage").input_value() == "2"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"{focused}.id || {focused}.className"))
    controls = {"show-reads", "show-glimpse", "show-relations", "threshold", "previous", "next", "path", "glimpse"}
    assert controls | {"relations", "head", "level"} <= reached
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert "in stage 2" in page.locator("#caption").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (900, "dark")])
def test_no_screen_is_too_narrow(visit, width, scheme):
    page = visit(viewport={"width": width, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#list button").first.click()
    page.locator("#path").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(19, 20, 22)")


def test_words_of_others_are_text(visit, trace, tmp_path):
    classes = trace.classes
    trace.classes = (HOSTILE,) * len(classes)
    try:
        page = visit(page_of(read_image(PHOTO), trace, HOSTILE * 9, credit=HOSTILE).save(tmp_path / "page.html"))
    finally:
        trace.classes = classes
    words = " ".join(HOSTILE.split())
    assert page.locator("#name").inner_text().startswith(words)
    page.locator("#list button").first.click()
    assert page.locator("#object").inner_text().strip("\u2068\u2069") == words
    assert page.locator("img").count() == 1, "the photograph alone"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_a_trace_of_boxes_alone_is_shown(visit, trace, tmp_path):
    boxes = Trace({name: trace[name] for name in trace.names("*.boxes*")}, trace.frame, trace.classes)
    page = visit(page_of(read_image(PHOTO), boxes).save(tmp_path / "page.html"))
    page.locator("#list button").first.click()
    page.locator("#path").click()
    page.locator("#stage").fill("0")
    assert page.locator(".glimpse").count() == 0 and page.locator("#show-glimpse").is_hidden()
    assert page.locator("article:visible h3").all_inner_texts() == ["Predict", "Refine the box"]
