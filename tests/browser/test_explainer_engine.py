"""The models of REGO Explainer in a real browser say what they say in Python, soon, and are fetched once."""

import base64
import io
import json
import os
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

from test_viewers_browser import CHROMIUM, FLAGS  # noqa: E402

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

    def visit(context=None, backend=None):
        if context is None:
            context = browser.new_context()
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(f"{server.address}blank.html")
        page.evaluate(
            """async (backend) => {
          window.model = (await import("./model.js")).connect("./", backend);
          window.told = [];
          window.photo = async (source) => {
            const image = new Image();
            image.src = source;
            await image.decode();
            return image;
          };
        }""",
            backend,
        )
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
    files = [manifest["runtimes"]["wasm"], *(about["file"] for about in manifest["models"].values())]
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


# ------------------------------------------------------------------------------------------------------------- WebGPU

IN_SOFTWARE = [
    *(flag for flag in FLAGS if flag != "--disable-gpu"), "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
]  # fmt: skip
"""Of Chromium, for WebGPU without a GPU."""

SECONDS = {"scenes": 30, "everyday": 80}
"""Of CPU time that a model takes there until it is ready."""

COMPUTED_ON_CPU = """
import * as ort from "./ort.wasm.mjs";
export const { Tensor, env } = ort;
let runs = 0;
export const InferenceSession = {
  async create(model, options) {
    if (options.executionProviders[0] !== "webgpu") throw new Error("This is the runtime for WebGPU.");
    const session = await ort.InferenceSession.create(model, { ...options, executionProviders: ["wasm"] });
    return {
      async run(inputs) {
        const outputs = await session.run(inputs);
        const change = (name, f) => outputs[name].data.forEach((value, n, all) => (all[n] = f(value)));
        runs += 1;
        FAULT;
        return outputs;
      },
    };
  },
};
"""
"""In place of the runtime for WebGPU: it computes on the CPU, with a fault of a GPU."""


def with_gpu(page, folder, fault=""):
    """Let the page have a runtime for WebGPU that works here, but for a fault."""
    code, binary = COMPUTED_ON_CPU.replace("FAULT", fault), (folder / "runtime/ort.wasm.gz").read_bytes()
    page.context.route("**/ort.webgpu.mjs", lambda route: route.fulfill(body=code, content_type="text/javascript"))
    page.context.route("**/ort.webgpu.gz?*", lambda route: route.fulfill(body=binary))


def check_scene(page, tmp_path):
    """The page answers as PyTorch does; the header of the answer."""
    SCENES.image(0).save(tmp_path / "scene.png")
    header, found = detect(page, "scenes", "image/png", (tmp_path / "scene.png").read_bytes())
    wanted, _ = expected(regolite.load(build.WEIGHTS["scenes"]), SCENES.image(0))
    assert compare(found, wanted, (128, 128)) < 0.05
    return header


@pytest.fixture(scope="module")
def in_software(browser):
    browser = browser.browser_type.launch(executable_path=CHROMIUM, args=IN_SOFTWARE)
    yield browser
    browser.close()


@pytest.mark.parametrize("name", SECONDS)
def test_webgpu_answers_as_torch_does(visit, request, name):
    """A model is ready with WebGPU only after it has found the objects of an example as PyTorch has."""
    if not os.environ.get("REGOLITE_WEBGPU") and not (os.environ.get("CI") and name == "scenes"):
        pytest.skip(f"{SECONDS[name]} seconds of CPU time: set REGOLITE_WEBGPU=1 to run WebGPU in software")
    in_software = request.getfixturevalue("in_software")
    with in_software.new_context() as context:
        page = visit(context, "webgpu")
        if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no adapter for WebGPU, not even one in software")
        loaded = load(page, name)
        print(f"\n{name} with WebGPU in software: ready after {loaded['seconds']:.1f} s")
        assert (loaded["provider"], loaded["failure"]) == ("webgpu", None)


ADAPTER = "Object.defineProperty(navigator, 'gpu', { value: { requestAdapter: async () => (%s) } });"
GPU = ADAPTER % "{ info: { isFallbackAdapter: false } }"


@pytest.mark.parametrize(
    ("machine", "backend", "tried"),
    [
        ("Object.defineProperty(navigator, 'gpu', { value: undefined });", None, ["wasm"]),
        (ADAPTER % "null", None, ["wasm"]),
        (ADAPTER % "{ info: { isFallbackAdapter: true } }", None, ["wasm"]),
        (ADAPTER % "{ info: {}, isFallbackAdapter: true }", None, ["wasm"]),
        (GPU + "delete WebAssembly.Suspending;", None, ["wasm"]),
        (GPU, "wasm", ["wasm"]),
        (GPU, None, ["webgpu", "wasm"]),
    ],
)
def test_which_runtime_is_fetched(visit, server, folder, machine, backend, tried):
    page = visit(backend=backend)
    code = machine + (folder / "worker.js").read_text()
    page.context.route("**/worker.js", lambda route: route.fulfill(body=code, content_type="text/javascript"))
    page.context.route("**/models/*", lambda route: route.abort())
    server.asked.clear()
    said = page.evaluate("model.load('scenes').catch((error) => error.message)")
    assert said == "models/scenes.onnx.gz could not be fetched: the server does not answer."
    assert [path for path in server.asked if path.endswith(".mjs")] == [f"/runtime/ort.{name}.mjs" for name in tried]


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("change('boxes', (side) => side + 0.005)", "this GPU gives another answer than PyTorch."),  # 0.64 pixels
        ("throw new Error('the first run failed.')", "the first run failed."),
    ],
)
def test_webgpu_is_left_for_wasm_where_it_fails(visit, folder, fault, failure):
    page = visit(backend="webgpu")
    with_gpu(page, folder, fault)
    loaded = load(page, "scenes")
    assert (loaded["provider"], loaded["failure"]) == ("wasm", failure)


def test_webgpu_that_works_is_used_until_it_fails(visit, folder, tmp_path):
    page = visit(backend="webgpu")
    with_gpu(page, folder, "if (runs > 2) throw new Error('the GPU was reset.')")
    loaded = load(page, "scenes")
    for found in (loaded, check_scene(page, tmp_path)):
        assert (found["provider"], found["failure"]) == ("webgpu", None)
    header = check_scene(page, tmp_path)
    assert (header["provider"], header["failure"]) == ("wasm", "the GPU was reset.")
