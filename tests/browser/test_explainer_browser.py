"""REGO Explainer in real browsers, as visitors use it: stored examples at once, then live answers equal to torch's."""

import base64
import gzip
import re
import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_explaining_browser import check_weights, settled

import regolite
from regolite.data.images import read_image
from regolite.data.open import open_data
from regolite.data.scenes import Scene
from regolite.plots.selection import class_name, predictions

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from book.explainer.build import WEIGHTS  # noqa: E402
from book.explainer.page import PHOTOS, SCENES, THRESHOLD, studies, traced  # noqa: E402

IMAGES = Path(__file__).parents[2] / "data/coco_tiny/images"
OWN = (433998, 565248)  # two photographs that are not among the examples
SCENE = 42
NEAR = 0.5  # pixels
MOST = 25e6  # bytes that a visitor downloads, compressed
WAIT = 60_000  # milliseconds; two slow cores may be shared
FIRST, LATER = 15, {"photos": 3, "scenes": 1.5}  # seconds on two cores that are not shared; four times as long may pass
WINDOW = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"}
READY = "html[data-ready]"
MODEL_READY = "html[data-model=ready]"
BOXES = """[...document.querySelectorAll("#boxes .box")].map((box) => [
  box.getAttribute("aria-label"),
  ...["left", "top", "right", "bottom"].map((side) => parseFloat(box.style[side]) / 100),
])"""

# An event as of dropping or pasting a file.
PASTE = """async ([name, content, kind]) => {
  const blob = await (await fetch(`data:image/png;base64,${content}`)).blob();
  const files = new DataTransfer();
  files.items.add(new File([blob], name, { type: "image/png" }));
  const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
  const about = { dataTransfer: files, clipboardData: files, bubbles: true, cancelable: true };
  document.body.dispatchEvent(new Kind(kind, about));
}"""

pytestmark = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------- what torch says


@pytest.fixture(scope="module")
def models():
    return {name: regolite.load(weights) for name, weights in WEIGHTS.items()}


@pytest.fixture(scope="module")
def scene():
    return open_data("scenes:2000:val=300:context=0.5:max_objects=6", "val").scene(SCENE)


def changed(scene, k, **values):
    """The scene with another thing at place k, which may decide otherwise."""
    things = [replace(thing, **values) if n == k else thing for n, thing in enumerate(scene.things)]
    return Scene(scene.size, scene.noise, things)


def wanted(trace, stage, size):
    """Class and box, in pixels, of each object of a stage."""
    boxes = predictions(trace, stage)
    scores, labels = boxes.best()
    corners = boxes.boxes_xyxy().clamp(min=0).minimum(boxes.boxes.new_tensor([*size, *size]))
    found = (scores >= THRESHOLD).nonzero()[:, 0].tolist() or [int(scores.argmax())]  # the best one if none is good
    return [(class_name(trace, int(labels[q])), corners[q].tolist()) for q in found]


# --------------------------------------------------------------------------------------------------- what a page shows


def objects(rows, size):
    """The same of a page, from what BOXES finds."""
    width, height = size
    names = [re.fullmatch(r"(.+) \d\.\d\d, object \d+ of \d+", label)[1] for label, *_ in rows]
    return [
        (name, [x * width, y * height, (1 - r) * width, (1 - b) * height]) for name, (_, x, y, r, b) in zip(names, rows)
    ]


def distance(found, expected):
    """The largest difference of a side of a box, in pixels; the classes must be the same."""
    assert sorted(name for name, _ in found) == sorted(name for name, _ in expected)
    apart = [
        min(max(abs(a - b) for a, b in zip(box, other)) for same, other in found if same == name)
        for name, box in expected
    ]
    return max(apart, default=0.0)


def check_boxes(page, trace, size, stages=range(4)):
    """The page shows the boxes of every stage as torch has them; how far they are apart at most."""
    worst = 0.0
    for stage in stages:
        page.locator("#stage").fill(str(stage))
        worst = max(worst, distance(objects(page.evaluate(BOXES), size), wanted(trace, stage, size)))
    assert worst < NEAR
    return worst


def idle(page):
    """Wait until the model has answered what it was asked; an edit is sent with the next frame."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_selector("html:not([data-busy])")


def answered(page):
    """Wait for the answer to the last edit; the seconds that the model took."""
    idle(page)
    return seconds_of(page.locator("#answer").inner_text())


def seconds_of(said):
    match = re.fullmatch(r"Answer in (\d+\.\d) s, computed in this browser\.", said)
    assert match, said
    return float(match[1])


def wait_for_name(page, name):
    """Wait until the image of this name is shown."""
    page.wait_for_function("(name) => document.querySelector('#name').textContent === name", arg=name)


def upload(page, file):
    """Choose a photo and wait for the answer; the seconds that the model took."""
    with page.expect_file_chooser() as chooser:
        page.locator("#file").click()
    chooser.value.set_files(file)
    wait_for_name(page, file.name)
    return answered(page)


def tab_to(page, selector, key="Tab"):
    """Press Tab until an element has the focus."""
    for _ in range(80):
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press(key)
    pytest.fail(f"{key} does not lead to {selector}")


# --------------------------------------------------------------------------------------------------------- the visitor


def assert_local(urls):
    """No address is on another machine."""
    assert {urlsplit(url).scheme for url in urls} <= {"http", "file", "data", "blob"}
    assert {urlsplit(url).hostname for url in urls if urlsplit(url).scheme == "http"} <= {"127.0.0.1"}


@pytest.fixture(scope="module")
def noted():
    """What pages report, and what they ask for."""
    return [], []


@pytest.fixture(autouse=True)
def nothing_fails_and_nothing_leaves_this_machine(noted):
    yield
    problems, asked = ([*entries] for entries in noted)
    for entries in noted:
        entries.clear()
    assert not problems
    assert_local(asked)


@pytest.fixture(scope="module")
def visitor(browser, noted):
    """A new visitor, a context of the browser; options are playwright's."""
    problems, asked = noted

    @contextmanager
    def visitor(**options):
        context = browser.new_context(**(WINDOW | options))
        context.set_default_timeout(WAIT)
        context.on("weberror", lambda error: problems.append(str(error.error)))
        context.on("console", lambda message: problems.append(message.text))
        context.on("request", lambda request: asked.append(request.url))  # those of the worker too
        yield context
        context.close()

    return visitor


def opened(context, address):
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(READY)
    return page


@pytest.fixture
def stored(visitor, explainer):
    """Open the page from disk, where it has its stored examples."""
    with ExitStack() as visits:
        address = (explainer / "index.html").as_uri()
        yield lambda **options: opened(visits.enter_context(visitor(**options)), address)


@pytest.fixture(scope="module")
def returning(visitor):
    """A visitor whose browser keeps the models from page to page."""
    with visitor() as context:
        yield context


@pytest.fixture(scope="module")
def photos_page(returning, server, photo):
    page = opened(returning, server.address)
    upload(page, photo)
    return page


@pytest.fixture
def photos(photos_page):
    """A page with a photo of the visitor's own."""
    photos_page.locator(".thumb[data-example=own]").click()
    return photos_page


@pytest.fixture(scope="module")
def scenes_page(returning, server):
    page = opened(returning, f"{server.address}#scenes")
    page.wait_for_selector(MODEL_READY)
    return page


@pytest.fixture
def scenes(scenes_page):
    """A page with a drawn scene, as it is stored, and the model at hand."""
    scenes_page.locator(f".thumb[data-example=scene-{SCENE}]").click()
    return scenes_page


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return as_png(OWN[0], tmp_path_factory.mktemp("own"))


def as_png(number, folder):
    """A photograph of coco_tiny as a visitor's PNG."""
    file = folder / f"my photo {number}.png"
    read_image(IMAGES / f"{number:012}.jpg").save(file)
    return file


# ------------------------------------------------------------------------------------------------- stored, from disk


def test_the_page_is_usable_from_disk(stored, models, scene):
    start = time.monotonic()
    page = stored()
    print(f"\nusable after {time.monotonic() - start:.1f} s")
    assert page.locator(".thumb:visible").count() == len(PHOTOS)
    for photo in PHOTOS:
        page.locator(f".thumb[data-example=photo-{photo.id}]").click()
        wait_for_name(page, photo.name)
        image = read_image(IMAGES / f"{photo.id:012}.jpg")
        check_boxes(page, traced(models["everyday"], image), image.size)
    page.locator("#tab-scenes").click()
    assert page.locator(".thumb:visible").count() == len(SCENES)
    page.locator(f".thumb[data-example=scene-{SCENE}]").click()
    assert page.locator("#things .thing").count() == len(scene.things)
    check_boxes(page, traced(models["scenes"], scene.draw()), (scene.size, scene.size))
    assert "not from disk" in page.locator("#model-said").inner_text()
    page.locator("#swap").click(force=True)  # playwright waits for what is aria-disabled
    assert page.locator("#answer").inner_text().startswith("Editing needs the model.")


def test_the_tour_by_keyboard_alone(stored):
    page = stored()
    tab_to(page, "#tour-start")
    page.keyboard.press("Enter")
    asked = set()
    for step in range(1, 8):
        page.wait_for_function(
            "(said) => document.querySelector('#tour-count').textContent === said", arg=f"Step {step} of 7"
        )
        page.wait_for_selector("#tour-question:focus")
        asked.add(page.locator("#tour-question").inner_text())
        before = settled(page)
        if step == 4:  # it asks for the slider
            tab_to(page, "#stage", "Shift+Tab")
            for _ in range(3):
                page.keyboard.press("ArrowRight")
            assert page.locator("#stage").input_value() == "3" and settled(page) != before
        tab_to(page, "#tour-reveal")
        page.keyboard.press("Enter")
        page.wait_for_selector("#tour-answer p")
        assert len(page.locator("#tour-answer p").first.inner_text()) > 80
        page.wait_for_selector("#tour-next:focus")
        page.keyboard.press("Enter")
    assert len(asked) == 7
    assert page.locator("#tour").is_hidden()
    page.wait_for_selector("#tour-start:focus")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tour-question:focus")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#tour-count').textContent.startsWith('Step 2')")
    page.keyboard.press("Escape")
    assert page.locator("#tour").is_hidden()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1400, "light"), (1400, "dark")])
def test_it_fits_every_screen_and_anyone_can_use_it(stored, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = stored(viewport={"width": width, "height": 740}, color_scheme=scheme)

    def check(when):
        assert page.evaluate("document.documentElement.scrollWidth") <= width, when
        found = axe.run(page)
        impacts = {violation["impact"] for violation in found.response["violations"]}
        assert not impacts & {"serious", "critical"}, f"{when}: {found.generate_report()}"

    check("photos")
    page.locator("#list button").first.click()
    page.locator("#path").click()
    check("the path of a box")
    page.locator("#tab-scenes").click()
    page.locator("#choices button").first.click()
    page.locator("#again").wait_for()
    check("an experiment")
    page.locator("#tour-start").click()
    page.wait_for_selector("#tour-question:focus")
    page.locator("#tour-reveal").click()
    check("the tour")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 64) == (scheme == "dark")


# ---------------------------------------------------------------------------------------------------- live, in Chromium


@pytest.mark.parametrize(("provider", "others"), [("wasm", (".webgpu.", ".check.")), ("webgpu", (".wasm.",))])
def test_a_visitor_downloads_little(explainer, provider, others):
    """All files but those of the runtime that a visitor does not get."""
    files = [path for path in explainer.rglob("*") if path.is_file() and not any(part in path.name for part in others)]
    assert {f"ort.{provider}.gz", f"ort.{provider}.mjs"} == {
        path.name for path in files if path.name.startswith("ort.")
    }
    size = sum(len(path.read_bytes() if path.suffix == ".gz" else gzip.compress(path.read_bytes())) for path in files)
    print(f"\n{provider}: {size / 1e6:.2f} MB in {len(files)} files")
    assert size <= MOST


def test_the_first_answer_comes_soon_and_the_model_is_fetched_once(visitor, server, photo, models):
    image = read_image(photo)
    trace = traced(models["everyday"], image)
    with visitor() as context:
        server.asked.clear()
        start = time.monotonic()
        page = opened(context, server.address)
        usable = time.monotonic() - start
        upload(page, photo)
        first = time.monotonic() - start
        worst = check_boxes(page, trace, image.size)
        assert any(".gz?" in path for path in server.asked)
        page.close()
        server.asked.clear()
        start = time.monotonic()
        page = opened(context, server.address)
        page.wait_for_selector(MODEL_READY)
        again = time.monotonic() - start
        assert not [path for path in server.asked if ".gz" in path]
    print(f"\nusable after {usable:.1f} s, first answer after {first:.1f} s, ready at the second visit {again:.1f} s")
    print(f"boxes differ from torch's by at most {worst:.4f} pixels")
    assert first < 4 * FIRST


def test_the_page_stays_in_place_while_the_model_loads(returning, server):
    page = returning.new_page()
    page.set_viewport_size({"width": 360, "height": 740})
    page.add_init_script("""
      window.tops = new Set();
      requestAnimationFrame(function look() {
        const view = document.querySelector("html[data-ready] #view");
        if (view) tops.add(view.getBoundingClientRect().top);
        requestAnimationFrame(look);
      });
    """)
    page.goto(server.address)
    page.wait_for_selector(MODEL_READY)
    idle(page)
    assert page.evaluate("tops.size") == 1
    page.close()


def test_photos_of_ones_own(photos, models, tmp_path):
    page, file = photos, as_png(OWN[1], tmp_path)
    seconds = upload(page, file)
    image = read_image(file)
    worst = check_boxes(page, traced(models["everyday"], image), image.size)
    print(f"\nlater answer in {seconds:.1f} s, boxes differ from torch's by at most {worst:.4f} pixels")
    assert seconds < 4 * LATER["photos"]
    broken = tmp_path / "words.txt"
    broken.write_text("no image")
    page.locator("#file-input").set_input_files(broken)
    page.wait_for_function("document.querySelector('#answer').textContent.includes('cannot read words.txt')")
    page.locator("#camera").click()
    page.wait_for_function("document.querySelector('#video').videoWidth > 0")
    page.locator("#webcam-take").click()
    wait_for_name(page, "Webcam")
    answered(page)
    assert page.evaluate("document.querySelector('#video').srcObject") is None
    content = base64.b64encode(as_png(OWN[0], tmp_path).read_bytes()).decode()
    page.evaluate(PASTE, ["dropped.png", content, "drop"])
    wait_for_name(page, "dropped.png")
    answered(page)
    page.evaluate(PASTE, ["pasted.png", content, "paste"])  # the photo that the fixture shows
    wait_for_name(page, "pasted.png")
    answered(page)


def test_pointing_at_a_box_of_a_live_answer(photos, photo, models):
    page, image = photos, read_image(photo)
    trace = traced(models["everyday"], image)
    check_boxes(page, trace, image.size, [3])
    before = settled(page)
    _, (left, top, right, bottom) = objects(page.evaluate(BOXES), image.size)[0]
    page.locator("#view").scroll_into_view_if_needed()
    frame = page.locator("#view").bounding_box()
    scale = frame["width"] / image.width
    place = (frame["x"] + scale * (left + right) / 2, frame["y"] + scale * (top + bottom) / 2)
    page.mouse.move(*place)
    query = int(re.search(r"query (\d+)", page.locator("#query").inner_text())[1])
    pointed = settled(page)
    assert pointed != before
    check_weights(page, trace, query, 3, THRESHOLD)
    assert page.locator(".glimpse").all_inner_texts() == [
        f"stage {n}\nα\u00a0=\u00a0{alpha}" for n, alpha in ((1, 2), (2, 1.5), (3, 1))
    ]
    page.mouse.click(*place)
    assert page.locator("#way").is_visible() and page.locator("#path").get_attribute("aria-pressed") == "true"
    assert settled(page) != pointed
    names = [row.split("\n")[0] for row in page.locator("#steps li").all_inner_texts()]
    assert names == ["reference", "base", "stage 1", "stage 2", "stage 3"]
    page.keyboard.press("Escape")
    assert page.locator("#way").is_hidden()


def test_choosing_a_box_of_a_live_answer_by_keyboard(photos, photo, models):
    page = photos
    trace = traced(models["everyday"], read_image(photo))
    page.mouse.move(1, 1)
    page.locator("#boxes [tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    query = int(page.evaluate("document.activeElement.dataset.key"))
    assert f"query {query} " in page.locator("#query").inner_text()
    check_weights(page, trace, query, 3, THRESHOLD)
    page.keyboard.press("1")
    assert page.locator("#stage").input_value() == "1"
    check_weights(page, trace, query, 1, THRESHOLD)
    page.keyboard.press("Enter")
    assert page.locator("#way").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    tab_to(page, "#stage")
    page.keyboard.press("ArrowRight")
    assert page.locator("#stage").input_value() == "2"


def check_scene(page, models, scene):
    assert page.locator("#things .thing").count() == len(scene.things)
    worst = check_boxes(page, traced(models["scenes"], scene.draw()), (scene.size, scene.size))
    print(f"boxes differ from torch's by at most {worst:.4f} pixels")


def test_editing_a_scene_by_mouse(scenes, models, scene):
    page, size = scenes, scene.size
    k = next(k for k, thing in enumerate(scene.things) if thing.shape in ("square", "star"))
    frame = page.locator("#view").bounding_box()
    node = page.locator("#things .thing").nth(k).bounding_box()
    start = (node["x"] + node["width"] / 2, node["y"] + node["height"] / 2)
    shift = (30 if start[0] < frame["x"] + frame["width"] / 2 else -30, 18)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + shift[0], start[1] + shift[1], steps=6)
    page.mouse.up()
    print(f"\nlater answer in {answered(page):.1f} s")
    scale = size / page.locator("#view").evaluate("(view) => view.clientWidth")
    thing = scene.things[k]
    x, y = (
        min(max(value + scale * by, thing.radius), size - thing.radius) for value, by in zip((thing.x, thing.y), shift)
    )
    scene = changed(scene, k, x=x, y=y)
    check_scene(page, models, scene)
    page.locator("#swap").click()
    answered(page)
    scene = changed(scene, k, shape={"square": "star", "star": "square"}[thing.shape])
    check_scene(page, models, scene)
    page.locator("#remove").click()
    answered(page)
    check_scene(page, models, Scene(size, scene.noise, [*scene.things[:k], *scene.things[k + 1 :]]))
    page.get_by_role("button", name="Add a star").click()
    answered(page)
    assert page.locator("#things .thing").count() == len(scene.things)
    page.locator("#restore").click()
    assert page.locator("#answer").inner_text() == ""


def test_editing_a_scene_by_keyboard(scenes, models, scene):
    page = scenes
    page.locator("#things [tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    k = int(page.evaluate("document.activeElement.dataset.key"))
    thing = scene.things[k]
    way, by = ("ArrowRight", 1) if thing.x < scene.size / 2 else ("ArrowLeft", -1)
    page.keyboard.press(f"Shift+{way}")
    page.keyboard.press(f"Shift+{way}")
    page.keyboard.press(f"Shift+Alt+{way}")
    seconds = answered(page)
    print(f"\nlater answer in {seconds:.1f} s")
    assert seconds < 4 * LATER["scenes"]
    check_scene(page, models, changed(scene, k, x=thing.x + 9 * by))
    page.locator("#things [tabindex='0']").focus()
    for left in range(len(scene.things) - 1, -1, -1):
        page.keyboard.press("Delete")
        page.wait_for_function("(count) => document.querySelectorAll('#things .thing').length === count", arg=left)
    answered(page)
    page.wait_for_selector("#tools button:focus")
    page.keyboard.press("Enter")  # adds a square
    answered(page)
    assert page.locator("#things .thing").count() == 1


def test_which_neighbor_decides_is_answered_live(scenes, models, scene):
    page, model = scenes, models["scenes"]
    ball = next(k for k, thing in enumerate(scene.things) if thing.shape == "ball")
    moved = next(k for k, thing in enumerate(scene.things) if thing.shape not in ("ball", "square", "star"))
    page.locator("#things .thing").nth(moved).focus()
    page.keyboard.press("Shift+ArrowUp")
    answered(page)
    scene = changed(scene, moved, y=max(scene.things[moved].y - 4, scene.things[moved].radius))
    page.locator("#choices button").first.click()
    page.locator("#again").wait_for()
    study = studies(model, scene, traced(model, scene.draw()))[ball]
    neighbors = [k for k in range(len(scene.things)) if k != ball]
    expected = [study["after"][k][3] - study["before"][3] for k in neighbors]
    rows = page.locator("#effects li")
    numbers = page.locator("#effects li > .number:nth-child(3)").all_inner_texts()
    found = [float(number.replace("−", "-").replace("±", "")) for number in numbers]
    print(f"\nwithout each neighbor {found}, by torch {[round(value, 3) for value in expected]}")
    assert len(found) == len(expected) and all(abs(a - b) < 0.011 for a, b in zip(found, expected))
    decides = min(range(len(expected)), key=expected.__getitem__)
    assert [n for n, row in enumerate(rows.all_inner_texts()) if "decides" in row] == [decides]
    assert page.locator("#things .thing").count() == len(scene.things)
    check_scene(page, models, scene)


def test_visitors_may_change_their_minds(scenes, photos, photo, models, scene):
    """What is asked and answered in between does not show up where it does not belong."""
    other = f".thumb[data-example=scene-{SCENES[1]}]"
    scenes.locator("#things .thing").first.focus()
    scenes.keyboard.press("Shift+ArrowUp")
    scenes.locator(other).click()
    wait_for_name(scenes, "Scene 2")
    before = scenes.evaluate(BOXES)
    idle(scenes)
    assert scenes.evaluate(BOXES) == before and scenes.locator("#answer").inner_text() == ""
    scenes.locator("#things .thing").first.focus()
    scenes.keyboard.press("Shift+ArrowUp")
    answered(scenes)
    scenes.locator("#choices button").last.click()  # an experiment that is not waited for
    scenes.wait_for_function("document.querySelector('#effects .number').textContent !== '…'")
    scenes.locator("#tab-photos").click()
    scenes.locator("#stage").fill("1")
    scenes.locator("#tab-scenes").click()
    wait_for_name(scenes, "Scene 2")
    assert scenes.evaluate(BOXES) == before
    # An experiment that waits for the answer to an edit, when the visitor leaves.
    busy = scenes.evaluate("""async () => {
      document.querySelector("#tools .sign").click();
      while (!document.documentElement.dataset.busy) await new Promise(requestAnimationFrame);
      document.querySelector("#choices button").click();
      document.querySelector("#tab-photos").click();
      return document.documentElement.dataset.busy;
    }""")
    assert busy
    idle(scenes)
    scenes.locator("#tab-scenes").click()
    wait_for_name(scenes, "Scene 2")
    # A photo that is answered while the visitor looks at a scene.
    with photos.expect_file_chooser() as chooser:
        photos.locator("#file").click()
    chooser.value.set_files(photo)
    photos.wait_for_selector("#waiting")
    photos.locator("#tab-scenes").click()
    idle(photos)
    assert photos.locator("#waiting").count() == 0 and photos.locator("#name").inner_text().startswith("Scene")
    photos.locator("#tab-photos").click()
    wait_for_name(photos, photo.name)
    image = read_image(photo)
    check_boxes(photos, traced(models["everyday"], image), image.size, [3])


def test_it_answers_offline_once_it_is_loaded(scenes, photos, tmp_path):
    context = scenes.context
    context.set_offline(True)
    try:
        scenes.locator("#things .thing").first.focus()
        scenes.keyboard.press("Shift+ArrowUp")
        answered(scenes)
        upload(photos, as_png(OWN[1], tmp_path))
        upload(photos, as_png(OWN[0], tmp_path))
    finally:
        context.set_offline(False)


@pytest.mark.parametrize("way", ["forbidden", "absent", "no model"])
def test_where_no_model_runs_that_is_said_and_examples_are_shown(visitor, explainer, server, headers, way):
    server.asked.clear()
    with visitor() as context:
        page = context.new_page()
        if way == "forbidden":
            headers["Content-Security-Policy"] = "script-src 'self' 'unsafe-inline'"
        elif way == "absent":
            page.add_init_script("delete globalThis.WebAssembly")
        else:
            content = (explainer / "index.html").read_text("utf-8").replace('data-live="yes"', 'data-live="no"')
            page.route(server.address, lambda route: route.fulfill(body=content, content_type="text/html"))
        page.goto(server.address)
        page.wait_for_selector(READY)
        said = page.locator("#model-said").inner_text()
        assert said == (
            "This copy of the page has its stored examples only: it was built without the model."
            if way == "no model"
            else "This browser or this page's server does not allow WebAssembly, in which the model runs."
        )
        page.locator("#file").click(force=True)  # playwright waits for what is aria-disabled
        assert page.locator("#answer").inner_text() == said
        page.locator(f".thumb[data-example=photo-{PHOTOS[-1].id}]").click()
        page.locator("#stage").fill("1")
        page.locator("#list button").first.click()
        assert page.locator(".glimpse").count() == 3
        page.locator("#tab-scenes").click()
        page.locator("#choices button").first.click()
        page.locator("#again").wait_for()
        assert not [path for path in server.asked if path.startswith("/worker")]


def test_the_page_says_what_the_model_runs_on(visitor, server):
    """This Chromium has no adapter for WebGPU, so that its runtime fails."""
    server.asked.clear()
    with visitor() as context:
        page = opened(context, f"{server.address}?backend=webgpu#scenes")
        page.wait_for_selector(MODEL_READY)
        said, failed = (page.locator(selector).inner_text() for selector in ("#model-said", "#model-failed"))
    assert re.fullmatch(r"Model: ready in your browser \(wasm, \d+\.\d s\)", said)
    assert failed.startswith("· WebGPU is not used: ")
    assert any("ort.webgpu.gz" in path for path in server.asked)


# ------------------------------------------------------------------------------------------------------------- Firefox


def test_firefox_answers_as_torch_does(server, photo, models, tmp_path):
    if shutil.which("firefox") is None:
        pytest.skip("no Firefox here: install firefox (firefox-esr in Debian) to test the page in it")
    from firefox import ARROW_LEFT, Firefox

    image = read_image(photo)
    trace = traced(models["everyday"], image)
    start = time.monotonic()
    firefox = Firefox(tmp_path)
    try:
        firefox.open(server.address)
        firefox.wait(f"document.querySelector('{READY}')")
        print(f"\nFirefox: usable after {time.monotonic() - start:.1f} s with its start")
        assert firefox.evaluate("document.querySelectorAll('#boxes .box').length") > 0
        firefox.choose("#file-input", photo)
        firefox.wait(f"document.querySelector('#name').textContent === {photo.name!r}")
        firefox.wait("!document.documentElement.dataset.busy")
        print(f"first answer after {time.monotonic() - start:.1f} s")
        seconds_of(firefox.evaluate("document.querySelector('#answer').textContent"))
        firefox.evaluate("document.querySelector('#stage').focus()")
        worst = 0.0
        for stage in (3, 2, 1, 0):
            assert firefox.evaluate("document.querySelector('#stage').value") == str(stage)
            found = objects(firefox.evaluate(BOXES), image.size)
            worst = max(worst, distance(found, wanted(trace, stage, image.size)))
            firefox.press(ARROW_LEFT)
        print(f"boxes differ from torch's by at most {worst:.4f} pixels")
        assert worst < NEAR
    finally:
        firefox.close()
    page = [event for event in firefox.events if event[1].get("context", firefox.context) == firefox.context]
    assert not [params for method, params in page if method == "log.entryAdded"]
    urls = [params["request"]["url"] for method, params in page if method == "network.beforeRequestSent"]
    assert any(".gz?" in url for url in urls)
    assert_local(urls)
