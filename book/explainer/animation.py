"""Record REGO Explainer for the README: ``python -m book.explainer.animation [FOLDER]`` writes ``book/explainer.webp``.

A real browser (Chromium, by Playwright) opens the built page, the model runs in it, and a script moves the mouse. The
animation is a sequence of screenshots.
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from book.explainer.build import BUILD
from book.explainer.serve import server

OUTPUT = Path(__file__).parents[1] / "explainer.webp"
WIDTH, HEIGHT = 1160, 800
SHOWN = 870
"""Width of the animation in pixels."""

CURSOR = """
const cursor = document.createElement("div");
cursor.style = `position: fixed; z-index: 99; width: 18px; height: 18px; margin: -9px; border-radius: 50%;
  background: rgb(0 0 0 / 0.35); border: 2px solid #fff; box-shadow: 0 0 3px #000; pointer-events: none`;
document.body.append(cursor);
addEventListener("pointermove", ({ clientX, clientY }) => {
  [cursor.style.left, cursor.style.top] = [`${clientX}px`, `${clientY}px`];
}, { capture: true });
"""
"""Screenshots have no mouse pointer."""


class Camera:
    """Frames of a page.

    Args:
        page: the page.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.durations: list[int] = []
        self.place = (WIDTH / 2, HEIGHT / 2)

    def take(self, milliseconds: int) -> None:
        """A frame that is shown for a while."""
        image = Image.open(io.BytesIO(self.page.screenshot(type="png")))
        self.frames.append(image.convert("RGB").resize((SHOWN, SHOWN * HEIGHT // WIDTH), Image.Resampling.LANCZOS))
        self.durations.append(milliseconds)

    def settle(self, milliseconds: int) -> None:
        """What the page draws until nothing moves, in four frames; then a pause."""
        for _ in range(4):
            self.take(90)
            self.page.wait_for_timeout(180)
        self.take(milliseconds)

    def move(self, x: float, y: float, frames: int = 4) -> None:
        """Move the mouse in a straight line."""
        (a, b), self.place = self.place, (x, y)
        for n in range(1, frames + 1):
            self.page.mouse.move(a + (x - a) * n / frames, b + (y - b) * n / frames)
            self.take(70)

    def click(self) -> None:
        """Press and release the button of the mouse."""
        self.page.mouse.down()
        self.page.mouse.up()


def middle(page: Page, selector: str) -> tuple[float, float]:
    """The middle of the first element on the screen."""
    box = page.locator(selector).first.bounding_box()
    assert box is not None, f"nothing on the page is {selector}"
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def play(page: Page, camera: Camera) -> None:
    """What the animation shows: stages and the path of a box in a photograph; in a scene, which neighbor decides."""
    camera.take(1200)
    page.locator("#view").evaluate("node => scrollBy(0, node.getBoundingClientRect().top - 16)")
    for stage in range(4):
        page.locator("#stage").fill(str(stage))
        camera.settle(500)
    camera.move(*middle(page, ".box"))
    camera.settle(1200)
    camera.click()
    page.wait_for_timeout(200)
    for _ in range(12):
        camera.take(110)
        page.wait_for_timeout(260)
    camera.take(1200)
    page.evaluate("scrollTo(0, 0)")
    camera.move(*middle(page, "#tab-scenes"))
    camera.click()
    page.wait_for_selector("html[data-model=ready]")
    page.locator("#view").evaluate("node => scrollBy(0, node.getBoundingClientRect().top - 16)")
    camera.settle(1200)
    camera.move(*middle(page, ".choice:has-text('star')"))
    camera.click()
    page.wait_for_function("!/^(Taking.*)?$/.test(document.getElementById('verdict').textContent)")
    camera.settle(3500)
    camera.move(*middle(page, ".thing[aria-label*='star']:not([aria-label^=ball])"))
    camera.click()
    camera.settle(300)
    page.evaluate("scrollTo(0, 0)")
    camera.move(*middle(page, "#swap"))
    camera.click()
    page.wait_for_timeout(500)
    page.wait_for_function("!document.documentElement.dataset.busy")
    camera.take(500)
    camera.move(*middle(page, ".thing[aria-label^=ball]"))
    camera.click()
    camera.settle(3000)


def main(folder: Path) -> None:
    """Play it in a browser, and write the frames as one WebP file."""
    with sync_playwright() as playwright, server(str(folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"http://127.0.0.1:{running.server_port}/")
        page.wait_for_selector("html[data-model=ready]", timeout=120_000)
        page.evaluate(CURSOR)
        camera = Camera(page)
        play(page, camera)
        browser.close()
        running.shutdown()
    first, *others = camera.frames
    first.save(OUTPUT, save_all=True, append_images=others, duration=camera.durations, loop=0, quality=60, method=4)
    print(f"{OUTPUT}: {len(camera.frames)} frames, {OUTPUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILD / "explainer")
