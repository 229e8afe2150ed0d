"""The models of REGO Explainer in a real browser say what they say in Python, soon, and are fetched once."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import regolite
from regolite.data.images import read_image
from regolite.data.scenes import Scenes
from regolite.explaining.packing import arrays_of, ranked
from regolite.tracing.recorder import record

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from book.explainer import build  # noqa: E402
from book.explainer.browser_model import RECORDS  # noqa: E402
from book.explainer.serve import HEADERS  # noqa: E402

ROOT = Path(__file__).parents[2]
PHOTOS = [ROOT / f"data/coco_tiny/images/{number:012}.jpg" for number in (475546, 555705, 471, 234748)]
SCENES = Scenes(3, split="val", max_objects=6)
THRESHOLD = 0.3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(explainer):
    """The built folder, with the client of the model, which the page has inside, and a page without anything."""
    shutil.copy(ROOT / "book/explainer/model.js", explainer)
    (explainer / "blank.html").write_text("<!doctype html><link rel=icon href=data:,><title>Test</title>")
    return explainer


@pytest.fixture
def visit(browser, server, folder):
    """Open an empty page of the folder that has the model; the console stays empty."""
    problems, contexts = [], []

    def visit(context=None):
        if context is None:
            context = browser.new_context()
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(f"{server.address}blank.html")
        page.evaluate("""async () => {
          window.model = (await import("./model.js")).connect();
          window.told = [];
          window.photo = async (source) => {
            const image = new Image();
            image.src = source;
            await image.decode();
            return image;
          };
        }""")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


def load(page, name):
    return page.evaluate("(name) => model.load(name, (progress) => told.push(progress))", name)


def detect(page, name, media_type, content):
    """The header, the arrays and the image of a detection."""
    found = page.evaluate(
        """async ([name, source]) => {
          const { image, arrays, ...rest } = await model.detect(name, await photo(source), { name: "a photograph" });
          const plain = Object.entries(arrays).map(([key, { shape, values }]) => [key, shape, [...values]]);
          return { ...rest, plain, image: image.toDataURL("image/png") };
        }""",
        [name, f"data:{media_type};base64,{base64.b64encode(content).decode()}"],
    )
    arrays = {key: torch.tensor(values).reshape(shape) for key, shape, values in found.pop("plain")}
    return found, arrays


def image_of(header):
    """The image as the browser has decoded it, which is not to the last bit as Pillow does."""
    return Image.open(io.BytesIO(base64.b64decode(header["image"].split(",")[1]))).convert("RGB")


def expected(model, image):
    with record(model, RECORDS) as trace:
        regolite.detect(model, image)
    return arrays_of(trace, ranked(trace)), trace


def objects(arrays, row, size):
    """Label and box, in pixels, of the queries above the threshold, by the row of the predictions."""
    center, extent = (arrays["boxes"][row] * torch.tensor(size).repeat(2)).split(2, -1)
    corners = torch.cat([center - extent / 2, center + extent / 2], -1)
    kept = arrays["scores"][row] >= THRESHOLD
    return list(zip(arrays["labels"][row][kept].int().tolist(), corners[kept]))


def compare(found, wanted, size):
    """The largest difference of a box at the base and at each stage, in pixels; classes must be the same."""
    worst = 0.0
    for row in range(-4, 0):
        ours, theirs = objects(found, row, size), objects(wanted, row, size)
        assert sorted(label for label, _ in ours) == sorted(label for label, _ in theirs)
        for label, box in theirs:
            worst = max(worst, min((box - other).abs().max().item() for same, other in ours if same == label))
    return worst


def test_photographs(visit):
    page, model = visit(), regolite.load()
    loaded = load(page, "everyday")
    assert loaded["provider"] == "wasm"
    print(f"\neveryday: ready after {loaded['seconds']:.1f} s")
    for photo in PHOTOS:
        header, found = detect(page, "everyday", "image/jpeg", photo.read_bytes())
        assert (header["width"], header["height"]) == read_image(photo).size
        image = image_of(header)
        assert header["classes"] == list(model.model_config.classes)
        wanted, _ = expected(model, image)
        worst = compare(found, wanted, image.size)
        print(f"{photo.name}: {header['seconds']:.2f} s, boxes differ by at most {worst:.3f} pixels")
        assert worst < 0.05
        assert {name: found[name].shape for name in wanted} == {name: values.shape for name, values in wanted.items()}
        best = int(wanted["queries"][0])  # the numbers of one query, whose row does not depend on the others' order
        assert int(found["queries"][0]) == best
        for name in ("points", "weights", "origins"):
            assert (found[name][:, 0] - wanted[name][:, 0]).abs().max() < 1e-3, name
        assert (found["regions"][:, best] - wanted["regions"][:, best]).abs().max() < 1e-3


def test_scenes(visit, tmp_path):
    page, model = visit(), regolite.load(build.WEIGHTS["scenes"])
    print(f"\nscenes: ready after {load(page, 'scenes')['seconds']:.1f} s")
    for i in range(len(SCENES)):
        SCENES.image(i).save(tmp_path / "scene.png")
        header, found = detect(page, "scenes", "image/png", (tmp_path / "scene.png").read_bytes())
        wanted, _ = expected(model, SCENES.image(i))
        worst = compare(found, wanted, (128, 128))
        print(f"scene {i}: {header['seconds']:.2f} s, boxes differ by at most {worst:.3f} pixels")
        assert worst < 0.05
        for name in ("points", "weights", "regions", "relations"):
            assert (found[name] - wanted[name]).abs().max() < 1e-3, name


def test_files_are_fetched_once(visit, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [manifest["runtime"], *(about["file"] for about in manifest["models"].values())]
    page = visit()
    load(page, "scenes")
    told = page.evaluate("told")
    total = files[0]["bytes"] + manifest["models"]["scenes"]["file"]["bytes"]
    assert [told[0]["phase"], told[-2]["phase"], told[-1]["phase"]] == ["download", "prepare", "ready"]
    assert all(progress["total"] == total and progress["received"] <= total for progress in told)
    assert told[-1]["received"] == total and told[-1]["cached"] is False
    again = visit(page.context)
    asked = []
    again.context.on("request", lambda request: asked.append(request.url))  # a worker's requests too
    load(again, "scenes")
    assert again.evaluate("told.at(-1).cached") is True
    assert not [url for url in asked if ".gz?" in url]
    # A version that is no longer listed is deleted.
    stale = again.evaluate("""async () => {
      const cache = await caches.open("rego-explainer");
      await cache.put("models/scenes.onnx.gz?old", new Response("old"));
      return (await cache.keys()).length;
    }""")
    third = visit(page.context)
    load(third, "scenes")
    assert (
        stale == 3 and third.evaluate("caches.open('rego-explainer').then((c) => c.keys()).then((k) => k.length)") == 2
    )


def test_only_the_newest_image_waits(visit):
    page = visit()
    load(page, "scenes")
    outcomes = page.evaluate("""async () => {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = 128;
      canvas.getContext("2d").fillRect(0, 0, 128, 128);
      const calls = [1, 2, 3, 4].map((n) => model.detect("scenes", canvas, { name: `${n}` }));
      return (await Promise.allSettled(calls)).map(({ value, reason }) => value?.name ?? reason.name);
    }""")
    assert outcomes == ["1", "AbortError", "AbortError", "4"]


def test_errors_are_one_sentence(visit, server, browser, folder, tmp_path):
    page = visit()
    said = page.evaluate("model.detect('scenes', new Image()).catch((error) => error.message)")
    assert said == "The image is not loaded yet, or it is no image."
    page.context.route("**/models/scenes.onnx.gz?*", lambda route: route.fulfill(status=404))
    said = page.evaluate("model.load('scenes').catch((error) => error.message)")
    assert said == "models/scenes.onnx.gz is missing (404): build the page again."
    page.context.unroute("**/models/scenes.onnx.gz?*")
    assert load(page, "scenes")["provider"] == "wasm"  # the next call tries again
    assert page.evaluate("model.supported()") is None


def test_threads_are_used_where_the_server_allows(visit, headers):
    headers |= HEADERS
    page = visit()
    assert page.evaluate("crossOriginIsolated")
    print(f"\nthreads: ready after {load(page, 'everyday')['seconds']:.1f} s")
    for _ in range(2):
        header, found = detect(page, "everyday", "image/jpeg", PHOTOS[0].read_bytes())
    image = image_of(header)
    print(f"{header['seconds']:.2f} s")
    assert compare(found, expected(regolite.load(), image)[0], image.size) < 0.05
