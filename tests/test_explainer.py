"""REGO Explainer's engine: the model's outputs are a page's numbers, and its scripts do as the package does."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import unchecked
from test_explaining import unpacked

import regolite
from regolite.data.images import read_image
from regolite.data.scenes import CLASSES, DECIDERS, Scene, Scenes, Thing
from regolite.explaining.packing import pack
from regolite.exporting import square
from regolite.models.config import config_of
from regolite.tracing.recorder import record

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from book.explainer import build, runtime  # noqa: E402
from book.explainer.browser_model import RECORDS, BrowserModel  # noqa: E402

ROOT = Path(__file__).parents[1]
PHOTOS = [ROOT / f"data/coco_tiny/images/{number:012}.jpg" for number in (475546, 555705)]
SCRIPTS = ROOT / "book" / "explainer"
SCENES = Scenes(12, split="val", max_objects=8)


@pytest.fixture(scope="module")
def models():
    return {name: regolite.load(weights) for name, weights in build.WEIGHTS.items()}


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image"), [("everyday", PHOTOS[0]), ("everyday", PHOTOS[1]), ("scenes", 0)])
def test_the_outputs_are_the_numbers_of_a_page(models, name, image):
    model, image = models[name], SCENES.image(image) if name == "scenes" else read_image(image)
    with record(model, RECORDS) as trace:
        regolite.detect(model, image)
    header, content = pack(trace)
    pixels, size = square(image, build.SIZES[name])
    module = BrowserModel(model).eval()
    with torch.no_grad(), unchecked():
        found = module.outputs(pixels[None], size[None])
    assert all(output.dtype == torch.float32 for output in found.values())
    arrays = unpacked(header, content)
    scores, labels = found.pop("class_scores").max(-1)  # of the base and of each stage, not stored in pages
    assert torch.equal(scores, found["scores"][-len(scores) :]) and torch.equal(labels, found["labels"][-len(scores) :])
    assert set(found) == set(arrays)
    assert build.SIZES[name] == config_of(model).image_size
    for array, output in found.items():
        assert output.shape == arrays[array].shape
        # a step of the stored grid, and what other padding changes: nothing but the order of sums
        assert (output - arrays[array]).abs().max() < 2e-4, array


# ------------------------------------------------------------------------------------------------------- the scripts


def run_script(tmp_path, code, data):
    """What a module's code returns for JSON data, in Node.js."""
    node = shutil.which("node")
    if node is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Node.js here, in which the scripts are tested")
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "scripts" / "package.json").write_text('{"type": "module"}')
    (tmp_path / "data.json").write_text(json.dumps(data))
    program = f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        const data = JSON.parse(readFileSync({json.dumps(str(tmp_path / "data.json"))}));
        const run = async (data) => {{ {code} }};
        writeFileSync({json.dumps(str(tmp_path / "result.json"))}, JSON.stringify(await run(data)));
    """
    (tmp_path / "scripts" / "test.js").write_text(program)
    done = subprocess.run([node, "test.js"], cwd=tmp_path / "scripts", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "result.json").read_text())


def described(scene):
    """A scene as scene.js takes it."""
    background = np.asarray(Scene(scene.size, scene.noise).draw())
    return {
        "size": scene.size, "background": background.ravel().tolist(), "things": [asdict(t) for t in scene.things]
    }  # fmt: skip


def test_scenes_are_drawn_as_in_python(tmp_path):
    scenes = [SCENES.scene(i) for i in range(len(SCENES))]
    code = """
        const { drawScene, CLASSES } = await import("./scene.js");
        return [data.map((scene) => [...drawScene(scene).data]), CLASSES];
    """
    images, classes = run_script(tmp_path, code, [described(scene) for scene in scenes])
    assert classes == list(CLASSES)
    for scene, pixels in zip(scenes, images):
        found = np.array(pixels, dtype=int).reshape(scene.size, scene.size, 4)[..., :3]
        assert np.abs(found - np.asarray(scene.draw(), dtype=int)).max() <= 2


def test_scenes_say_what_they_say_in_python(tmp_path):
    code = """
        const { boxOf, deciderOf, fits, labelOf } = await import("./scene.js");
        return data.map((scene) => scene.things.map(({ x, y }, k) =>
          [labelOf(scene, k), deciderOf(scene, k), boxOf(scene, k), fits(scene, k, x, y)]));
    """
    found = run_script(tmp_path, code, [described(SCENES.scene(i)) for i in range(len(SCENES))])
    for i, things in enumerate(found):
        scene, objects = SCENES.scene(i), SCENES.objects(i)
        for k, (label, decider, box, fits) in enumerate(things):
            x, y, width, height = objects.boxes[k].tolist()
            assert (label, decider) == (scene.label(k), scene.things[k].decider)
            assert box == [x, y, x + width, y + height] and fits


def test_what_a_visitor_changes_stays_unambiguous(tmp_path):
    """Every added thing could be put there in Python, and a ball alone has no class."""
    code = """
        const { addThing, fits, labelOf, SHAPES } = await import("./scene.js");
        let seed = 1;
        const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
        const added = data.map((scene) => SHAPES.flatMap((shape) => addThing(scene, shape, "dotted", random) ?? []));
        const scene = data.find(({ things }) => things.some(({ shape }) => shape === "ball"));
        const alone = { ...scene, things: scene.things.filter(({ shape }) => shape === "ball").slice(0, 1) };
        const [{ x, y }] = alone.things;
        const empty = { ...scene, things: [] };
        return {
          added: added.map((scenes) => scenes.map(({ things }) => things.at(-1))),
          alone: labelOf(alone, 0), none: addThing(empty, "ball", "", random),
          outside: fits(alone, 0, 3, y), inside: fits(alone, 0, x, y),
        };
    """
    found = run_script(tmp_path, code, [described(SCENES.scene(i)) for i in range(len(SCENES))])
    assert (found["alone"], found["none"], found["outside"], found["inside"]) == (None, None, False, True)
    count = 0
    for i, added in enumerate(found["added"]):
        for new in added:
            scene = Scene(SCENES.scene(i).size, (0,), SCENES.scene(i).things)
            numbers = {name: float(new[name]) for name in ("x", "y", "radius", "angle", "period")}
            colors = tuple(tuple(map(float, color)) for color in new["colors"])
            thing = Thing(new["shape"], new["texture"], **numbers, colors=colors, phase=tuple(new["phase"]))
            if thing.shape == "ball":
                squares_and_stars = [k for k, other in enumerate(scene.things) if other.shape in DECIDERS]
                thing = replace(thing, decider=min(squares_and_stars, key=lambda k: thing.gap(scene.things[k])))
            assert scene.put(thing)
            count += 1
    assert count > 4 * len(SCENES)


@pytest.mark.parametrize("size", [(500, 375), (401, 640), (301, 640), (90, 70), (320, 320), (1000, 3)])
def test_images_are_resized_as_in_python(tmp_path, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    code = """
        const { resized } = await import("./resize.js");
        const { planes, rows, columns } = resized(data.pixels, data.width, data.height, 320);
        return { planes: [...planes], size: [rows, columns] };
    """
    pixels = np.asarray(image.convert("RGBA")).ravel().tolist()
    found = run_script(tmp_path, code, {"pixels": pixels, "width": size[0], "height": size[1]})
    expected, shape = square(image, 320)
    assert found["size"] == shape.tolist()
    difference = np.abs(np.array(found["planes"]).reshape(3, 320, 320) - expected.numpy()).max()
    assert difference < (1e-5 if size[1] <= 2 * size[0] else 1.01 / 255)


# --------------------------------------------------------------------------------------------------------- the folder


def test_the_manifest_describes_the_files(tmp_path, monkeypatch):
    import onnx

    def small_model(name, weights):
        graph = onnx.helper.make_graph([], name, [], [])
        proto = onnx.helper.make_model(graph)
        onnx.helper.set_model_props(proto, {"size": "64", "header": json.dumps({"layers": 1})})
        file = tmp_path / f"{name}.onnx"
        onnx.save(proto, file)
        return file

    def small_runtime(folder, store):
        folder.mkdir(parents=True)
        for provider in runtime.PROVIDERS:
            (folder / f"ort.{provider}.gz").write_bytes(provider.encode())

    monkeypatch.setattr(build, "_exported", small_model)
    monkeypatch.setattr(build, "write_runtime", small_runtime)
    monkeypatch.setattr(build, "write_page", lambda folder, book: None)
    folder = tmp_path / "page"
    build.build(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["models"]) == {"everyday", "scenes"} and manifest["onnxruntime-web"] == runtime.VERSION
    models = manifest["models"].values()
    files = [about["file"] for about in models] + [about["check"]["file"] for about in models]
    for entry in [*manifest["runtimes"].values(), *files]:
        content = (folder / entry["path"]).read_bytes()
        assert entry["bytes"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()
    model = manifest["models"]["scenes"]
    assert (model["size"], model["header"]) == (64, {"layers": 1})
    halves = gzip.decompress((folder / model["file"]["path"]).read_bytes())
    content = bytearray(len(halves))
    odd = (len(halves) + 1) // 2
    content[0::2], content[1::2] = halves[:odd], halves[odd:]
    assert onnx.load_from_string(bytes(content)).graph.name == "scenes"
    assert {path.name for path in folder.glob("*.js")} == set(build.FETCHED)


def test_another_package_or_no_npm_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="npm is missing: install Node.js"):
        runtime.write_runtime(tmp_path / "runtime", tmp_path / "npm")
    package = tmp_path / "npm" / f"onnxruntime-web-{runtime.VERSION}.tgz"
    package.parent.mkdir(exist_ok=True)
    package.write_bytes(b"another")
    with pytest.raises(SystemExit, match="has another hash than the pinned one"):
        runtime.write_runtime(tmp_path / "runtime", tmp_path / "npm")
    assert not package.exists() and not (tmp_path / "runtime").exists()
