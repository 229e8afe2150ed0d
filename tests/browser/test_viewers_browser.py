"""The viewers in a real JupyterLab, in a real browser: every control, by mouse and by keyboard.

What the browser then shows is compared with a mirror: the same Explorer in this process, whose controls are set to the
same values. So every check asks both whether the control arrived and whether the image is the expected one.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import regolite
from regolite.viewers.canvas import shades_of
from regolite.viewers.explorer import Explorer

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "13_look_inside.ipynb"  # in which `Explorer(regolite.load(), ALBUM)` stands
*ALBUM, OWN, NAMED = (
    ROOT / f"data/coco_tiny/images/{number:012}.jpg" for number in (475546, 471, 529, 234748, 599, 418281)
)

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PLACES = (
    "chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, PLACES)), None)
WAIT = 30_000  # milliseconds: two slow cores may be shared

pytestmark = pytest.mark.slow


def missing():
    """What a browser test needs and is not there, in a word; nothing where all is there."""
    if CHROMIUM is None:
        return "no Chromium here: install chromium (Debian, Ubuntu) or Google Chrome to test the viewers in a browser"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "no playwright here: pip install playwright to test the viewers in a browser"
    return ""


# ------------------------------------------------------------------------------------------------ a JupyterLab to use


@contextmanager
def jupyterlab(folder):
    """A server of its own, which reads no settings of this computer's user; gives its address without the notebook."""
    names = ["CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"]
    places = {f"JUPYTER_{name}": folder / name.lower() for name in names}
    places |= {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces"}
    places["IPYTHONDIR"] = folder / "ipython"
    for place in places.values():
        place.mkdir()
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=T",
        f"--ServerApp.root_dir={folder / 'root'}",
    ]  # fmt: skip
    env = os.environ | {name: str(place) for name, place in places.items()} | {"PYTHONPATH": str(ROOT)}
    env.pop("JUPYTER_TOKEN", None)
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                if server.poll() is not None:
                    pytest.fail(f"JupyterLab ended at once:\n{log.read_text()[-2000:]}")
                try:
                    with urllib.request.urlopen(f"{address}/api?token=T", timeout=5):
                        break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    time.sleep(0.25)
            yield address
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    """A hand at a browser in which the notebook has run, and the mirror of what it should see."""
    if missing():
        # In continuous integration a browser test that is not run is a failure.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing())
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "root" / "notebooks"
    notebooks.mkdir(parents=True)
    shutil.copytree(ROOT / "data", folder / "root" / "data")
    shutil.copy(NOTEBOOK, notebooks)
    shutil.copytree(NOTEBOOK.parent / "results", notebooks / "results")
    mirror = Explorer(regolite.load(), ALBUM)
    with jupyterlab(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.set_default_timeout(WAIT)
        problems = []
        page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"{address}/lab/tree/notebooks/{NOTEBOOK.name}?reset&token=T")
        page.wait_for_selector(".jp-Toolbar-kernelName:has-text('Python 3')")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")  # idle alone comes too early
        page.keyboard.press("Control+B")  # more room: without the list of files
        page.click("text=Run")
        page.click("text=Run All Cells")
        yield Hand(page, mirror, notebooks, problems)
        browser.close()


# ---------------------------------------------------------------------------------------------------------- the hand

STATE = """figure => {
  const numbers = (node, names) => names.map(name => Number(node.getAttribute(name)));
  const all = (selector) => [...figure.querySelectorAll(selector)];
  const heat = figure.querySelector('.rg-heat');
  const pixels = heat.hidden ? [] : [...heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data];
  return {
    boxes: all('.rg-box').map(box => numbers(box.firstChild, ['x', 'y', 'width', 'height'])),
    labels: all('.rg-box').map(box => box.getAttribute('aria-label')),
    colors: all('.rg-box .rg-line').map(line => line.getAttribute('stroke')),
    picked: all('.rg-box').findIndex(box => box.getAttribute('aria-pressed') === 'true'),
    tags: all('.rg-tag').map(tag => tag.textContent),
    points: all('.rg-points path').map(point => numbers(point, ['data-x', 'data-y', 'opacity'])),
    lines: all('.rg-lines line').map(line => numbers(line, ['x1', 'y1', 'x2', 'y2', 'stroke-width'])),
    heat: pixels.filter((_, n) => n % 4 === 3), shape: heat.hidden ? [0, 0] : [heat.height, heat.width],
    rendering: heat.style.imageRendering,
    caption: figure.querySelector('.rg-caption').textContent,
    legend: all('.rg-legend .rg-words').map(words => words.textContent),
    pointing: figure.querySelector('.rg-stage').classList.contains('rg-pointing'),
    natural: figure.querySelector('.rg-image').naturalWidth,
    label: figure.querySelector('.rg-image').getAttribute('aria-label'),
  };
}"""


def expected_of(canvas):
    """What the browser must show of a canvas."""

    def corners(box):
        edge = 0.003 * max(canvas.width, canvas.height)
        low, high = np.array([edge] * 4), np.array([canvas.width, canvas.height] * 2) - edge
        left, top, right, bottom = np.clip(box, low, high).tolist()
        return [left, top, right - left, bottom - top]

    shades = shades_of(canvas).astype(float) / 255 * 2
    alpha = np.where(shades < 1, 176 * shades, 176 + 64 * (shades - 1))
    return {
        "boxes": [corners(box["box"]) for box in canvas.boxes],
        "labels": [box["label"] for box in canvas.boxes],
        "colors": [box["color"] for box in canvas.boxes],
        "picked": canvas.picked,
        "tags": [box["tag"] for box in canvas.boxes if box.get("tag")],
        "points": [[point["x"], point["y"], point["opacity"]] for point in canvas.points],
        "lines": [[*line["ends"], line["width"]] for line in canvas.lines],
        "heat": alpha.flatten().tolist(),
        "shape": list(canvas.heat_shape),
        "caption": canvas.caption,
        "legend": [words for _, words in canvas.legend],
        "pointing": canvas.asks and canvas.pointing,
        "natural": Image.open(io.BytesIO(canvas.image)).width,
        "label": canvas.label,
    }


class Hand:
    """Operates the Explorer in the browser, and sees what it shows."""

    def __init__(self, page, mirror, folder, problems):
        self.page, self.mirror, self.folder, self.problems = page, mirror, folder, problems
        self.explorer = page.locator(".rg-viewer:has(.lm-TabBar)").first
        self.figure = self.explorer.locator(".rg-figure:visible")
        self.stage = self.explorer.locator(".rg-stage:visible")
        self.figure.wait_for(timeout=10 * WAIT)  # the chapter runs from its top
        self.explorer.scroll_into_view_if_needed()

    def control(self, label):
        """The control of the open tab, or of the gallery, that has this label: by its label alone."""
        return self.explorer.get_by_label(label, exact=True).locator("visible=true").first

    def slider(self, label):
        return self.explorer.locator(".widget-hslider:visible").filter(
            has=self.page.locator(f".widget-label:text-is('{label}')")
        )

    def settings(self):
        return json.loads(self.figure.get_attribute("data-settings") or "{}")

    def state(self):
        return self.figure.evaluate(STATE)

    def wait_for(self, holds, what):
        """Until something holds of the settings that the browser shows."""
        end = time.monotonic() + WAIT / 1000
        while not holds(self.settings()):
            if time.monotonic() > end:
                pytest.fail(f"{what}: the browser still shows {self.settings()}")
            self.page.wait_for_timeout(20)

    def open(self, title):
        self.explorer.locator(".lm-TabBar-tab").filter(has_text=title).click()
        self.viewer = self.mirror.viewers[title]
        self.wait_for(lambda shown: shown.get("viewer") == title.lower(), f"tab {title}")
        self.agree()

    def agree(self, what="the image"):
        """What is shown is what the mirror shows."""
        wanted = json.loads(self.viewer.canvas.settings)
        self.wait_for(lambda shown: shown == wanted, f"{what}: wanted {wanted}")
        self.page.wait_for_function("figure => figure.querySelector('.rg-image').complete",
                                    arg=self.figure.element_handle())  # fmt: skip
        seen, expected = self.state(), expected_of(self.viewer.canvas)
        assert seen["shape"] == expected["shape"], what
        for name, tolerance in {"boxes": 0.5, "points": 0.5, "lines": 0.5, "heat": 3.0}.items():
            assert len(seen[name]) == len(expected[name]), (what, name)
            np.testing.assert_allclose(seen[name], expected[name], atol=tolerance, err_msg=f"{what}: {name}")
        for name in expected.keys() - {"boxes", "points", "lines", "heat"}:
            assert seen[name] == expected[name], (what, name)
        return seen

    def change(self, what, act, set_mirror, alters=True):
        """Do something; the mirror follows what the control came to, and both must then show the same, and another."""
        before, shown = self.settings(), self.state()
        act()
        self.wait_for(lambda now: now != before, what)
        self.page.wait_for_timeout(150)  # a slider that is dragged says several values
        set_mirror(self.settings())
        after = self.agree(what)
        if alters:
            assert after != shown, f"{what}: the image is the same"
        return self.settings()

    def follow(self, control, name):
        """Set the mirror's control to what the browser says."""
        from regolite.viewers.base import ALL

        def follow(shown):
            control.value = ALL if shown[name] is None else shown[name]

        return follow

    # Kinds of controls, by mouse and by keyboard.

    def use_slider(self, label, control, name, fraction=0.0):
        target = self.slider(label).locator(".noUi-target")
        frame = target.bounding_box()
        x = max(1, min(frame["width"] - 1, fraction * frame["width"]))
        click = {"position": {"x": x, "y": frame["height"] / 2}}
        low, high = control.min, control.max
        shown = self.change(f"{label} by mouse", lambda: target.click(**click), self.follow(control, name))
        assert abs(shown[name] - (low + fraction * (high - low))) <= max(0.03 * (high - low), control.step / 2)
        handle = self.slider(label).locator(".noUi-handle")
        handle.focus()
        value, key, way = shown[name], *(("ArrowRight", 1) if fraction < 0.5 else ("ArrowLeft", -1))
        shown = self.change(f"{label} by keyboard", lambda: self.page.keyboard.press(key),
                            self.follow(control, name), alters=name != "threshold")  # fmt: skip
        assert shown[name] == pytest.approx(value + way * control.step)
        assert handle.evaluate("node => node === document.activeElement"), "the notebook took the key"

    def use_choice(self, label, control, name, value, option=None):
        """A drop-down: what is chosen in its list, which no page draws, and what the arrow keys come to."""
        index = [v for _, v in control.options].index(value) if option is None else option
        select = self.control(label)
        shown = self.change(f"{label} by mouse", lambda: select.select_option(index=index),
                            self.follow(control, name))  # fmt: skip
        assert shown[name] == value
        select.focus()
        key = "ArrowDown" if index == 0 else "ArrowUp"
        shown = self.change(f"{label} by keyboard", lambda: self.page.keyboard.press(key), self.follow(control, name))
        assert shown[name] != value
        assert select.evaluate("node => node === document.activeElement"), "the notebook took the key"

    def use_checkbox(self, label, control, name):
        box = self.control(label)
        before = control.value
        shown = self.change(f"{label} by mouse", box.click, self.follow(control, name))
        assert shown[name] is not before
        box.focus()
        shown = self.change(f"{label} by keyboard", lambda: self.page.keyboard.press("Space"),
                            self.follow(control, name))  # fmt: skip
        assert shown[name] is before

    def at(self, x, y):
        """A place of the image, as a click's."""
        frame, canvas = self.stage.bounding_box(), self.viewer.canvas
        return {"x": x / canvas.width * frame["width"], "y": y / canvas.height * frame["height"]}

    def use_boxes(self):
        """Hover, click, Tab, Enter, Space: on boxes of the image."""
        boxes, viewer = self.viewer.canvas.boxes, self.viewer
        count = sum(not box.get("fixed") for box in boxes)
        assert count > 1
        place, index = self.lonely(boxes)
        self.stage.hover(position=self.at(*place))
        tip = self.stage.locator(".rg-tip")
        assert tip.inner_text() == boxes[index]["label"]
        assert "rg-shown" in tip.get_attribute("class")
        queries = [query for _, query in viewer.object.options]
        other = next(n for n in range(count) if n != index)
        for what, n, act in (
            ("Enter on a box", other, lambda n: self.press_on_box(n, "Enter")),
            ("a click on a box", index, lambda n: self.stage.click(position=self.at(*place))),
            ("Space on a box", other, lambda n: self.press_on_box(n, "Space")),
        ):
            if viewer.object.value == queries[n] and self.settings()["query"] is not None:
                n = next(m for m in range(count) if m != n) if "box" in what and "click" not in what else n
            if viewer.object.value != queries[n] or self.settings()["query"] is None:
                shown = self.change(what, lambda n=n, act=act: act(n),
                                    lambda _, n=n: setattr(viewer.canvas, "picked", n))  # fmt: skip
                assert shown["query"] == queries[n]

    def press_on_box(self, n, key):
        """Tab to a box from the one before it, and press a key."""
        box = self.stage.locator(".rg-box[role=button]")
        if n:
            box.nth(n - 1).focus()
            self.page.keyboard.press("Tab")
        else:
            box.nth(0).focus()
        assert box.nth(n).evaluate("node => node === document.activeElement")
        assert "rg-shown" in self.stage.locator(".rg-tip").get_attribute("class")
        self.page.keyboard.press(key)
        self.page.wait_for_timeout(50)
        assert box.nth(n).evaluate("node => node === document.activeElement"), "the box lost the focus"

    def lonely(self, boxes):
        """The middle of the smallest box that is a button, and its index: no smaller one can be meant there."""

        def area(n):
            left, top, right, bottom = boxes[n]["box"]
            return (right - left) * (bottom - top)

        index = min((n for n, box in enumerate(boxes) if not box.get("fixed")), key=area)
        left, top, right, bottom = boxes[index]["box"]
        canvas = self.viewer.canvas
        x = (max(left, 0) + min(right, canvas.width)) / 2
        y = (max(top, 0) + min(bottom, canvas.height)) / 2
        return (x, y), index

    def use_point(self):
        """A point by mouse, by arrow keys on the image, by its numbers."""
        viewer, page = self.viewer, self.page
        shown = self.change("ask a point", lambda: self.control("Ask").select_option(index=1),
                            self.follow(viewer.ask, "ask"))  # fmt: skip
        assert shown["point"] is not None and shown["query"] is None
        width, height = viewer.canvas.width, viewer.canvas.height

        def follow(shown):
            viewer.canvas.clicked = [shown["point"][0], shown["point"][1]]

        wanted = (0.2 * width, 0.3 * height)
        shown = self.change("a click on the image", lambda: self.stage.click(position=self.at(*wanted)), follow)
        np.testing.assert_allclose(shown["point"], wanted, atol=2.0)
        point = self.stage.locator(".rg-point")
        point.focus()
        before = shown["point"]
        shown = self.change("Shift and arrow on the point", lambda: page.keyboard.press("Shift+ArrowRight"), follow)
        assert shown["point"][0] == pytest.approx(before[0] + max(width, height) / 10, abs=1.5)
        shown = self.change("arrow on the point", lambda: page.keyboard.press("ArrowDown"), follow, alters=False)
        assert shown["point"][1] > before[1]
        assert point.evaluate("node => node === document.activeElement"), "the notebook took the key"
        for label, axis, value in (("Point: x", 0, width // 2), ("y", 1, height // 2)):
            box = self.control(label)
            box.click()
            box.fill(str(value))
            shown = self.change(f"{label} typed", lambda: page.keyboard.press("Enter"), follow)
            assert shown["point"][axis] == value + 0.5
            shown = self.change(f"{label} by arrow", lambda: page.keyboard.press("ArrowUp"), follow, alters=False)
            assert shown["point"][axis] == value + 1.5
        select = self.control("Ask")
        select.focus()
        shown = self.change("Ask by keyboard", lambda: page.keyboard.press("ArrowUp"), self.follow(viewer.ask, "ask"))
        assert shown["point"] is None

    def use_save(self):
        """Another name, the button by mouse and by keyboard; the files hold the settings."""
        name = self.control("Save as")
        name.click()
        name.fill("mine.png")
        self.page.keyboard.press("Enter")
        button = self.explorer.get_by_role("button", name="Save PNG").locator("visible=true").first
        for act in (button.click, lambda: (button.focus(), self.page.keyboard.press("Enter"))):
            before = set(self.folder.glob("*.png"))
            act()
            end = time.monotonic() + WAIT / 1000
            while not (new := set(self.folder.glob("*.png")) - before) and time.monotonic() < end:
                self.page.wait_for_timeout(50)
            [file] = new
            self.explorer.get_by_text(f"Saved {file}", exact=True).locator("visible=true").wait_for()
            with Image.open(file) as image:
                assert json.loads(image.text["regolite"]) == self.settings()
                assert image.width > 300

    def shoot(self, name):
        """Keep a screenshot, where a folder for them is named."""
        if os.environ.get("REGOLITE_SCREENSHOTS"):
            self.page.mouse.move(5, 5)
            folder = Path(os.environ["REGOLITE_SCREENSHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            self.explorer.screenshot(path=folder / f"{name}.png")

    def check_quiet(self):
        """No error in the page or in any cell, nothing on stderr; nothing is wider than its place."""
        assert self.problems == []
        assert self.page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
        assert self.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert self.page.locator(".jp-Dialog").count() == 0
        wide = """node => [...node.querySelectorAll('*')].concat(node)
            .filter(n => n.offsetParent && n.scrollWidth > n.clientWidth + 1
                && ['auto', 'scroll'].includes(getComputedStyle(n).overflowX)).map(n => n.className)"""
        assert self.explorer.evaluate(wide) == []


# --------------------------------------------------------------------------------------------------------- the tests


def use_asking(hand, last):
    viewer = hand.viewer
    hand.use_slider("Least score", viewer.threshold, "threshold", 0.2)
    hand.use_boxes()
    objects = [query for _, query in viewer.object.options]
    hand.use_choice("Object", viewer.object, "query", next(q for q in objects if q != viewer.object.value))
    if viewer.layer.max:
        hand.use_slider("Layer", viewer.layer, "layer", 0.0)
    else:  # the everyday detector's decoder has one layer, so there is nothing to choose; its stages have two
        assert hand.slider("Layer").locator(".noUi-target").get_attribute("disabled") is not None
    hand.use_choice("Head", viewer.head, "head", 3)
    hand.use_choice("Level", viewer.level, "level", 1)
    last()
    hand.use_point()
    hand.use_save()


def test_attention(hand):
    hand.open("Attention")
    use_asking(hand, lambda: hand.use_checkbox("Smooth", hand.viewer.smooth, "smooth"))
    hand.shoot("attention")
    hand.check_quiet()


def test_sampling(hand):
    hand.open("Sampling")
    color = hand.viewer.color
    use_asking(hand, lambda: hand.use_choice("Color by", color, "color", "head", option=1))
    hand.shoot("sampling")
    hand.check_quiet()


def test_stages(hand):
    hand.open("Stages")
    viewer = hand.viewer
    hand.use_slider("Least score", viewer.threshold, "threshold", 0.2)
    hand.use_slider("Stage", viewer.stage, "stage", 0.0)
    hand.use_boxes()
    objects = [query for _, query in viewer.object.options]
    hand.use_choice("Object", viewer.object, "query", next(q for q in objects if q != viewer.object.value))
    hand.use_checkbox("Its glimpse", viewer.glimpse, "glimpse")
    hand.use_checkbox("Its path", viewer.path, "path")
    hand.use_save()
    hand.shoot("stages")
    hand.check_quiet()


def test_relations(hand):
    hand.open("Relations")
    viewer = hand.viewer
    hand.use_slider("Stage", viewer.stage, "stage", 0.0)
    hand.use_boxes()
    objects = [query for _, query in viewer.object.options]
    hand.use_choice("Object", viewer.object, "query", next(q for q in objects if q != viewer.object.value))
    hand.use_slider("Layer", viewer.layer, "layer", 1.0)
    hand.use_choice("Head", viewer.head, "head", 3)
    hand.use_slider("Related", viewer.top, "top", 0.0)
    hand.use_slider("Least score", viewer.threshold, "threshold", 0.75)
    hand.use_save()
    hand.shoot("relations")
    hand.check_quiet()


def test_images(hand):
    """The drop-down, a file, a path; what is no image gets one line."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    hand.open("Attention")
    gallery, page = hand.mirror.gallery, hand.page
    before = hand.settings()["image"]

    def chosen(act, follow, name):
        shown = hand.change(name, act, lambda _: follow())
        assert shown["image"] == name

    image = hand.control("Image")
    chosen(lambda: image.select_option(index=1), lambda: setattr(gallery.chooser, "value", 1), ALBUM[1].name)
    image.focus()
    chosen(lambda: page.keyboard.press("ArrowUp"), lambda: setattr(gallery.chooser, "value", 0), before)

    def upload(path, act):
        for _ in range(3):  # a viewer that still draws what came before can take the focus away
            try:
                with page.expect_file_chooser(timeout=WAIT / 3) as chooser:
                    act()
            except PlaywrightTimeout:
                continue
            return chooser.value.set_files(path)
        pytest.fail("the button does not open a file chooser")

    def press_enter():
        button.focus()
        page.keyboard.press("Enter")

    button = hand.explorer.get_by_role("button", name="Your image")
    content = {
        "name": OWN.name, "type": "image/jpeg", "size": OWN.stat().st_size, "content": memoryview(OWN.read_bytes()),
        "last_modified": datetime.now(timezone.utc),
    }  # fmt: skip
    chosen(lambda: upload(OWN, button.click), lambda: setattr(gallery.upload, "value", (content,)), OWN.name)
    text = hand.folder / "words.jpg"
    text.write_text("no image")
    upload(text, press_enter)
    hand.explorer.get_by_role("alert").filter(has_text="words.jpg can't be read as an image").wait_for()
    hand.shoot("no_image")

    path = hand.control("or its path")
    path.click()
    path.fill("nowhere.jpg")
    page.keyboard.press("Enter")
    hand.explorer.get_by_role("alert").filter(has_text="image nowhere.jpg does not exist").wait_for()
    path.fill(str(NAMED))
    chosen(lambda: page.keyboard.press("Enter"), lambda: setattr(gallery.path, "value", str(NAMED)), str(NAMED))
    for title in hand.mirror.viewers:  # all tabs show the new image
        hand.open(title)
    hand.check_quiet()


def test_tabs_by_keyboard(hand):
    """A tab has the focus; the arrow keys and Enter open another."""
    hand.open("Attention")
    tabs = hand.explorer.locator(".lm-TabBar-tab")
    tabs.nth(0).focus()
    hand.page.keyboard.press("ArrowRight")
    hand.page.keyboard.press("Enter")
    hand.wait_for(lambda shown: shown.get("viewer") == "sampling", "tab by keyboard")


def test_words_of_what_is_missing(monkeypatch):
    """Without a browser the tests are skipped with a word that says what to install."""
    monkeypatch.setattr(sys.modules[__name__], "CHROMIUM", None)
    assert "install chromium" in missing()
