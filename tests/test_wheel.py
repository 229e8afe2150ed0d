"""The wheel works outside a checkout: it holds its weights, trains, detects and writes a viewer's page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

# One Python for all, since each imports PyTorch for seconds.
PROGRAM = """
import pathlib, runpy, sys
import regolite
from ipywidgets.embed import embed_minimal_html
from regolite.viewers import Explorer

assert pathlib.Path(regolite.__file__).is_relative_to(sys.argv[1]), regolite.__file__
train = "train --data scenes:4:val=1:size=64 --model rego_deformable_detr_scenes --image-size 64 --batch-size 2 "
train += "--epochs 1 --device cpu --output run --set queries=8 dim=32 detector.ffn_dim=32 "
train += "detector.encoder_layers=1 detector.decoder_layers=1 rego.ffn_dim=32"
for words in (train, "detect photo.png", "explain photo.png --html page.html"):
    sys.argv[1:] = words.split()
    try:
        runpy.run_module("regolite", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, words
embed_minimal_html("explorer.html", [Explorer(regolite.load(), "photo.png")], drop_defaults=False)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, made from a copy of the sources, has been installed."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    for name in listed.stdout.splitlines():
        if name.startswith(("regolite/", "pyproject.toml", "README.md", "LICENSE")):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*pip, "wheel", *offline, "-w", folder, folder / "source"], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def used(site: Path) -> tuple[Path, str]:
    """An empty folder in which the installed wheel, before everything else, has done its work; and what it said."""
    folder = site.parent / "used"
    folder.mkdir()
    Image.effect_noise((120, 90), 60).convert("RGB").save(folder / "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site)], cwd=folder, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_holds_the_package_alone(site: Path):
    [wheel] = site.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"regolite"}
    for name in (
        "py.typed", "weights/rego_deformable_detr_everyday.safetensors", "viewers/canvas.js",
        *(f"explaining/{path.name}" for path in (ROOT / "regolite" / "explaining").glob("*.[chj]*")),
    ):  # fmt: skip
        assert f"regolite/{name}" in names


def test_it_trains_two_steps(used: tuple[Path, str]):
    assert (used[0] / "run" / "model.safetensors").stat().st_size > 0


def test_it_detects_with_the_weights_that_it_brings(used: tuple[Path, str]):
    folder, said = used
    assert re.search(r"photo\.png: \d+ objects", said) and (folder / "found" / "photo.png").exists()


def test_it_explains_an_image(used: tuple[Path, str]):
    assert "createStore" in (used[0] / "page.html").read_text("utf-8"), "the page brings its scripts"


def test_it_writes_a_viewers_page(used: tuple[Path, str]):
    assert "rg-image" in (used[0] / "explorer.html").read_text("utf-8"), "the page brings the code of the canvas"
