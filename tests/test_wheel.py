"""The wheel works outside a checkout: it holds its weights, trains, detects and writes a viewer's page."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

VIEWER = """
import pathlib, regolite
from ipywidgets.embed import embed_minimal_html
from regolite.viewers import Explorer
assert pathlib.Path(regolite.__file__).is_relative_to("SITE"), regolite.__file__
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


@pytest.fixture
def run(site: Path, tmp_path: Path):
    """Run Python in an empty folder with the installed wheel before everything else."""
    Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / "photo.png")

    def python(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return python


def test_it_holds_the_package_alone(site: Path):
    [wheel] = site.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"regolite"}
    for name in (
        "py.typed", "weights/rego_deformable_detr_everyday.safetensors", "viewers/canvas.js",
        *(f"explaining/{path.name}" for path in (ROOT / "regolite" / "explaining").glob("*.[chj]*")),
    ):  # fmt: skip
        assert f"regolite/{name}" in names


def test_it_trains_two_steps(run, tmp_path: Path):
    run(
        "-m", "regolite", "train", "--data", "scenes:4:val=1:size=64", "--model", "rego_deformable_detr_scenes",
        "--set", "queries=8", "dim=32", "detector.ffn_dim=32",
        "detector.encoder_layers=1", "detector.decoder_layers=1", "rego.ffn_dim=32",
        "--image-size", "64", "--batch-size", "2", "--epochs", "1", "--device", "cpu", "--output", "run",
    )  # fmt: skip
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 0


def test_it_detects_with_the_weights_that_it_brings(run, tmp_path: Path):
    assert "photo.png" in run("-m", "regolite", "detect", "photo.png")
    assert (tmp_path / "found" / "photo.png").exists()


def test_it_explains_an_image(run, tmp_path: Path):
    run("-m", "regolite", "explain", "photo.png", "--html", "page.html")
    assert "createStore" in (tmp_path / "page.html").read_text("utf-8"), "the page brings its scripts"


def test_it_writes_a_viewers_page(run, site: Path, tmp_path: Path):
    run("-c", VIEWER.replace("SITE", str(site)))
    assert "rg-image" in (tmp_path / "explorer.html").read_text("utf-8"), "the page brings the code of the canvas"
