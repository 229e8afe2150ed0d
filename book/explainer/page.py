"""The page of REGO Explainer: one HTML file with all scripts and the stored examples.

It opens from disk and then shows what is stored in it. Served over HTTP, it also loads the models (``build.py``). Its
figure, panel and equations are those of :func:`regolite.explain`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.ops import box_iou

import regolite
from regolite.data import read_image
from regolite.data.open import open_data
from regolite.data.scenes import Scene, Thing
from regolite.explaining import FOLDER as PARTS
from regolite.explaining import MODULES, composed, in_script, script_of
from regolite.explaining.packing import pack
from regolite.inference import detect
from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace
from regolite.utils.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
SCENES_MODEL = ROOT / "data" / "checkpoints" / "rego_deformable_detr_scenes.safetensors"
OWN_MODULES = (
    "model.js", "scene.js", "things.js", "examples.js", "live.js", "photos.js", "experiment.js", "scenes.js", "tour.js",
    "main.js",
)  # fmt: skip
"""The page's own scripts, each after those that it imports from."""

LICENSES = {4: "CC BY 2.0", 5: "CC BY-SA 2.0", 7: "no known copyright restrictions"}
"""By COCO's license id, as in ``data/coco_tiny/SOURCES.md``."""

THRESHOLD = 0.4
"""Least score of an object at first; lower ones are mostly second boxes on the same object."""
THUMBNAIL = (96, 64)

MOST = 25
"""Queries of an example with sampling points and relations: more than have a box at any useful threshold."""

QUALITY = 80
"""Of JPEG: the page has ten images, and is to load fast."""


@dataclass(frozen=True)
class Photo:
    """A photograph of ``data/coco_tiny``, on which neither detector was trained.

    Attributes:
        id: its id in COCO.
        name: a short title.
        alt: what it shows.
    """

    id: int
    name: str
    alt: str


PHOTOS = (
    Photo(555705, "Two cats", "Two cats lying side by side, one of them on a shoe"),
    Photo(234748, "By the car", "A person leaning on a post beside a car with an open trunk"),
    Photo(214753, "Riders on the beach", "Two riders on horses in front of the surf"),
    Photo(790, "Dinner table", "Four people around a wooden table, plants behind them"),
    Photo(475546, "At the bar", "People sitting along the counter of a bar"),
    Photo(173350, "Two dogs", "Two dogs on a wooden floor, one behind the other"),
)
"""Chosen because the stages change something in them; that says nothing about photographs in general."""

SCENES_DATA = "scenes:2000:val=300:context=0.5:max_objects=6"
SCENES = (42, 53, 22, 1)
"""Images of the validation split that the scenes detector was evaluated on, with balls whose decider matters. In the
last one the relations point at the decider too."""


def write_page(folder: str | os.PathLike[str], book: str | None = None, live: bool = True) -> Path:
    """Write ``index.html``.

    Args:
        folder: where to write it; created if missing.
        book: address of the folder with the book's chapters, such as ``../notebooks/``, which the page links to. By
            default ``$REGOLITE_BOOK/notebooks/``; without this variable the chapters are named and not linked.
        live: whether the models lie beside the page.

    Returns:
        The path of the page.
    """
    if book is None:
        place = os.environ.get("REGOLITE_BOOK", "").rstrip("/")
        book = f"{place}/notebooks/" if place else ""
    photos, scenes = photo_examples(book), scene_examples(book)
    modules = [PARTS / name for name in MODULES if name != "main.js"]
    parts = {
        "css": "\n".join((place / "page.css").read_text("utf-8") for place in (PARTS, HERE)),
        "js": script_of([*modules, *(HERE / name for name in OWN_MODULES)]),
        "photos": "".join(thumbnail(example) for example in photos),
        "scenes": "".join(thumbnail(example) for example in scenes),
        "examples": "\n".join(stored(example) for example in [*photos, *scenes]),
        "book": html.escape(book, quote=True),
        "link": f'<a id="book" href="{html.escape(book, quote=True)}../index.html">The book</a>' if book else "",
        "live": "yes" if live else "no",
    }
    path = Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, composed(HERE / "page.html", parts).encode())
    return path


def photo_examples(book: str) -> list[dict[str, Any]]:
    """The photographs with what the everyday detector made of them."""
    model = regolite.load()
    about = sources(ROOT / "data" / "coco_tiny")
    found = []
    for photo in PHOTOS:
        image = read_image(ROOT / "data" / "coco_tiny" / "images" / f"{photo.id:012}.jpg")
        texts = {"name": photo.name, "model": "everyday detector", "credit": about[photo.id], "book": book}
        found.append(
            {
                "id": f"photo-{photo.id}", "alt": photo.alt, "thumbnail": jpeg_of(fitted(image, *THUMBNAIL)),
                "image": address(jpeg_of(image)), **packed(traced(model, image), texts),
            }
        )  # fmt: skip
    return found


def sources(folder: Path) -> dict[int, str]:
    """A line about each image of coco_tiny: its id, license and Flickr address."""
    found = {}
    for path in sorted((folder / "annotations").glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        for image in content["images"]:
            found[image["id"]] = f"COCO image {image['id']}, {LICENSES[image['license']]}, {image['flickr_url']}"
    return found


def scene_examples(book: str) -> list[dict[str, Any]]:
    """Drawn scenes with what the scenes detector made of them, and what each removal changes."""
    model = regolite.load(SCENES_MODEL)
    dataset = open_data(SCENES_DATA, "val")
    found = []
    for number, i in enumerate(SCENES, 1):
        scene = dataset.scene(i)
        image, trace = scene.draw(), traced(model, scene.draw())
        words = ", ".join(f"a {thing.texture} {thing.shape}".replace("  ", " ") for thing in scene.things)
        texts = {
            "name": f"Scene {number}",
            "model": "scenes detector",
            "credit": "not trained on; shown four times finer than the detector sees it",
            "book": book,
        }
        found.append(
            {
                "id": f"scene-{i}", "alt": words, "thumbnail": jpeg_of(fitted(image, 64, 64)),
                "scene": described(scene), "studies": studies(model, scene, trace),
                **packed(trace, texts),
            }
        )  # fmt: skip
    return found


def traced(model: nn.Module, image: Image.Image) -> Trace:
    """A recorded forward pass of all that the page shows."""
    with record(model, ["references", "decoder.*", "stage.*"]) as trace:
        detect(model, image, THRESHOLD)
    return trace


def packed(trace: Trace, texts: dict[str, str]) -> dict[str, Any]:
    """Header and numbers of an example."""
    header, numbers = pack(trace, most=MOST)
    header |= {"threshold": THRESHOLD, "classes": trace.classes, **texts}
    return {"header": header, "numbers": base64.b64encode(numbers).decode()}


def described(scene: Scene) -> dict[str, Any]:
    """A scene as ``scene.js`` draws it; the background as RGB bytes in Base64."""
    things = [{name: value for name, value in asdict(thing).items() if name != "decider"} for thing in scene.things]
    background = Scene(scene.size, scene.noise).draw().tobytes()
    return {"size": scene.size, "things": things, "background": base64.b64encode(background).decode()}


def studies(model: nn.Module, scene: Scene, trace: Trace) -> dict[int, dict[str, Any]]:
    """For each ball its score for its own class, by stage: as it is, and without each other thing."""
    found = {}
    for ball, thing in enumerate(scene.things):
        if thing.decider is None:
            continue
        label = scene.label(ball)
        after = {
            k: scores_of(traced(model, without(scene, k).draw()), scene, ball, label)
            for k in range(len(scene.things))
            if k != ball
        }
        found[ball] = {"before": scores_of(trace, scene, ball, label), "after": after}
    return found


def without(scene: Scene, k: int) -> Scene:
    """The scene without a thing, and without knowing what decides: it is only drawn."""
    things: list[Thing] = [replace(thing, decider=None) for n, thing in enumerate(scene.things) if n != k]
    return Scene(scene.size, scene.noise, things)


def scores_of(trace: Trace, scene: Scene, ball: int, label: int) -> list[float]:
    """The scores for a class, by stage, of the query that stands for a ball; zeros if none does."""
    thing = scene.things[ball]
    box = torch.tensor([[thing.x, thing.y, thing.x, thing.y]]) + thing.radius * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    last = trace.by_stage[-1]
    on = box_iou(last.boxes_xyxy(), box)[:, 0] >= 0.5
    if not on.any():
        return [0.0] * len(trace.by_stage)
    query = int(last.best()[0].where(on, torch.tensor(-1.0)).argmax())
    return [round(float(boxes.scores[0, query, label]), 4) for boxes in trace.by_stage]


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image, in a size of CSS pixels, for screens with two pixels to one of these."""
    return ImageOps.fit(image, (2 * width, 2 * height), Image.Resampling.LANCZOS)


def jpeg_of(image: Image.Image) -> bytes:
    """An image as JPEG."""
    content = io.BytesIO()
    image.save(content, "jpeg", quality=QUALITY)
    return content.getvalue()


def address(content: bytes) -> str:
    """A JPEG as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def thumbnail(example: dict[str, Any]) -> str:
    """The button of an example in the gallery."""
    content, alt = example.pop("thumbnail"), html.escape(example.pop("alt"), quote=True)
    name = html.escape(example["header"]["name"], quote=True)
    width, height = Image.open(io.BytesIO(content)).size
    image = f'<img src="{address(content)}" alt="{alt}" width="{width}" height="{height}">'
    return f'<button type="button" class="thumb" title="{name}" data-example="{example["id"]}">{image}</button>\n'


def stored(example: dict[str, Any]) -> str:
    """An example as an element of the page, which is parsed when it is chosen."""
    text = in_script(json.dumps(example, separators=(",", ":")))
    return f'<script type="application/json" class="example" id="{example["id"]}">{text}</script>'
