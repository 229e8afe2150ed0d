"""regolite data: two small datasets from a server that drops connections, sends other files, or is not there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
import socket
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_server import serve
from PIL import Image

from regolite.cli import main
from regolite.data import check_coco, fetch, fetch_dataset, open_data, prepare
from regolite.errors import UserError

VOC = "<annotation><size><width>{w}</width><height>{h}</height></size>{objects}</annotation>"
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
OBJECT = f"<object><name>{{}}</name>{BOX}</object>"

CARDS = {  # path: split, size, objects: name and xyxy in pixels
    "train/IMG_1.JPG": ("train", (378, 504), [("king", 92, 183, 223, 348)]),
    "train/IMG_3.JPG": ("train", (378, 504), [("nine", 10, 20, 110, 220), ("ace", 100, 100, 101, 300)]),
    "train/cam_image2.jpg": ("train", (960, 540), [("ten", 96, 54, 960, 540)]),
    "train/IMG_2.JPG": ("val", (378, 504), [("jack", 0, 0, 378, 504)]),
    "test/cam_image1.jpg": ("test", (96, 54), [("queen", 1, 2, 30, 40)]),
}
FISH = {  # path: split, size, objects: label and cx cy w h as fractions
    "train/images/IMG_2274_jpeg_jpg.rf.2f319e94.jpg": ("train", (768, 1024), [(0, 0.5, 0.25, 0.5, 0.5)]),
    "train/images/IMG_8599_MOV-2_jpg.rf.65ed.jpg": ("train", (60, 40), []),
    "valid/images/IMG_2277_jpeg_jpg.rf.86c72d6.jpg": ("val", (60, 40), [(6, 0.0, 0.5, 0.5, 0.5)]),
    "test/images/IMG_2289_jpeg_jpg.rf.fe2a7a1.jpg": ("test", (60, 40), [(4, 0.5, 0.5, 0.1, 0.1)]),
}


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A smooth image that differs from seed to seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 3, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG")
    return encoded.getvalue()


def originals(name: str) -> dict[str, bytes]:
    """The files of a small dataset by their path in the source's folder, each image before its labels."""
    files = {}
    for seed, (path, (_, size, objects)) in enumerate((CARDS if name == "cards" else FISH).items()):
        files[path] = jpeg(size, seed)
        if name == "cards":
            text = VOC.format(w=size[0], h=size[1], objects="".join(OBJECT.format(*found) for found in objects))
            files[re.sub("jpg$", "xml", path, flags=re.IGNORECASE)] = text.encode()
        else:
            path = path.replace("/images/", "/labels/").removesuffix("jpg") + "txt"
            files[path] = "\n".join(" ".join(map(str, found)) for found in objects).encode()
    return files


def prefix(name: str) -> str:
    source = fetch.SOURCES[name]
    return f"/{source.repository}/{source.commit}/{source.folder}/"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A server with both datasets, small; they are listed in place of the real ones."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare, "WAITS", (0,) * 4)
    monkeypatch.setattr(fetch, "LISTS", tmp_path / "lists")
    (tmp_path / "lists").mkdir()
    with serve() as server:
        for name, images in (("cards", CARDS), ("aquarium", FISH)):
            files = originals(name)
            server.files |= {prefix(name) + path: data for path, data in files.items()}
            content, about = iter(files.items()), ("image", "image_bytes", "image_sha256")
            with open(tmp_path / "lists" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file)
                lines.writerow(["split", *about, "labels_bytes", "labels_sha256"])
                for path, labels in zip(content, content):
                    sums = [(len(data), hashlib.sha256(data).hexdigest()) for _, data in (path, labels)]
                    lines.writerow([images[path[0]][0], path[0], *sums[0], *sums[1]])
        yield server


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files arrive in the order of the list."""
    monkeypatch.setattr(fetch, "CONNECTIONS", 1)


def asked(server: ThreadingHTTPServer, name: str = "cards") -> list[str]:
    return [path.removeprefix(prefix(name)) for path, _ in server.requests]


def source(root: Path, name: str = "cards") -> Path:
    return root / "source" / fetch.SOURCES[name].folder


def on_disk(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def words(root: Path, server: ThreadingHTTPServer, name: str = "cards") -> list[str]:
    return ["data", name, "--root", str(root), "--mirror", server.url]


# -------------------------------------------------------------------------------------------------- the committed lists


@pytest.mark.parametrize(
    ("name", "splits", "size"),
    [
        ("cards", {"train": 248, "val": 48, "test": 67}, 38_481_765),
        ("aquarium", {"train": 448, "val": 127, "test": 63}, 69_866_894),
    ],
)
def test_the_lists_are_whole(name, splits, size):
    examples = fetch.list_examples(name)
    assert Counter(example.split for example in examples) == splits
    files = [file for example in examples for file in (example.image, example.labels)]
    assert len({file.path for file in files}) == len(files) == 2 * len(examples)
    assert all(re.fullmatch(r"(train|test|valid)(/images|/labels)?/[\w.-]+\.(JPG|jpg|xml|txt)", f.path) for f in files)
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in files)
    assert sum(file.size for file in files) == size
    names = [fetch._file_name(example.image.path) for example in examples]
    assert len({name.lower() for name in names}) == len(names)
    for split in splits:
        own = [name for name, example in zip(names, examples) if example.split == split]
        assert own == sorted(own)
    sources = fetch.SOURCES[name]
    assert re.fullmatch("[0-9a-f]{40}", sources.commit) and re.fullmatch(r"[\w-]+/[\w-]+", sources.repository)


# ------------------------------------------------------------------------------------------------------------ the whole


class TestWhole:
    def test_one_command_makes_what_training_reads(self, server, tmp_path, capsys):
        root = tmp_path / "new" / "cards"
        assert main(words(root, server)) == 0
        files = originals("cards")
        assert sorted(asked(server)) == sorted(files)
        assert {path.name for path in (root / "images").iterdir()} == {
            "IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg", "cam_image1.jpg", "cam_image2.jpg"}  # fmt: skip
        assert {path.relative_to(source(root)).as_posix() for path in source(root).rglob("*.*")} == set(files)
        assert not check_coco(root, fetch.SPLITS, read_images=True).wrong
        for split, count in (("train", 3), ("val", 1), ("test", 1)):
            data = open_data(root, split)
            assert len(data) == count and data[0][0].shape[0] == 3
        out = capsys.readouterr().out
        for said in ("train: 3 ", "test: 1 ", "github.com/Edje", "License: Apache-2.0", "Attribution: Evan Juras"):
            assert said in out
        assert f"train --data {root}" in out
        about = (root / "SOURCES.md").read_text("utf-8")
        for said in ("# cards\n", fetch.SOURCES["cards"].commit, "Apache-2.0", "Evan Juras", "480 pixels"):
            assert said in about

    def test_boxes_and_sizes(self, server, tmp_path):
        fetch_dataset("cards", tmp_path / "cards", server.url + "/")
        data = open_data(tmp_path / "cards", "train")
        assert data.classes == ("nine", "ten", "jack", "queen", "king", "ace")
        assert [data.file_name(i) for i in range(3)] == ["IMG_1.jpg", "IMG_3.jpg", "cam_image2.jpg"]
        assert [data.image(i).size for i in range(3)] == [(360, 480), (360, 480), (480, 270)]
        assert data.objects(0).labels.tolist() == [4]
        assert np.allclose(data.objects(0).boxes, [[87.62, 174.29, 124.76, 157.14]])  # times 360 / 378
        assert data.objects(1).labels.tolist() == [0], "the ace is less than a pixel wide"
        assert np.allclose(data.objects(2).boxes, [[48, 27, 432, 243]])
        small = open_data(tmp_path / "cards", "test")
        assert small.image(0).size == (96, 54), "no image is enlarged"
        assert np.allclose(small.objects(0).boxes, [[1, 2, 29, 38]])
        found = [json.loads(path.read_bytes()) for path in (tmp_path / "cards" / "annotations").iterdir()]
        for key, count in (("images", 5), ("annotations", 5)):
            assert sorted(record["id"] for content in found for record in content[key]) == list(range(1, count + 1))

    def test_images_show_what_the_originals_show(self, server, tmp_path):
        fetch_dataset("cards", tmp_path / "cards", server.url)
        for path, (_, size, _) in CARDS.items():
            converted = Image.open(tmp_path / "cards" / "images" / f"{Path(path).stem}.jpg")
            original = Image.open(io.BytesIO(server.files[prefix("cards") + path])).resize(converted.size)
            difference = np.abs(np.asarray(converted, float) - np.asarray(original, float)).mean()
            assert difference < 4, f"{path} {size}"

    def test_yolo_labels(self, server, tmp_path, capsys):
        root = tmp_path / "aquarium"
        assert main(words(root, server, "aquarium")) == 0
        assert "Attribution: Roboflow" in capsys.readouterr().out
        train, val = open_data(root, "train"), open_data(root, "val")
        assert [train.file_name(i) for i in range(2)] == ["IMG_2274.jpg", "IMG_8599_MOV-2.jpg"]
        assert train.classes[0] == "fish" and train.image(0).size == (384, 512)
        assert np.allclose(train.objects(0).boxes, [[96, 0, 192, 256]])
        assert len(train.objects(1)) == 0
        assert val.objects(0).labels.tolist() == [6]
        assert np.allclose(val.objects(0).boxes, [[0, 10, 15, 20]]), "clipped at the left edge"

    def test_the_default_folder(self, server, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["data", "cards", "--mirror", server.url]) == 0
        assert len(open_data("data/cards", "test")) == 1

    def test_again_nothing_is_asked_for(self, server, tmp_path):
        root = tmp_path / "cards"
        fetch_dataset("cards", root, server.url)
        before, _ = on_disk(root), server.requests.clear()
        (root / "images" / "IMG_1.jpg").write_bytes(b"damaged")
        (root / "images" / "IMG_2.jpg").unlink()
        fetch_dataset("cards", root, server.url)
        assert not server.requests and on_disk(root) == before

    def test_a_clone_does_as_well(self, server, tmp_path):
        for path, data in originals("cards").items():
            file = source(tmp_path / "cards") / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        fetch_dataset("cards", tmp_path / "cards", server.url)
        assert not server.requests and len(open_data(tmp_path / "cards", "val")) == 1

    def test_train_on_it_and_evaluate_on_test(self, server, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])  # drawing takes longer than training here
        root, run = tmp_path / "cards", tmp_path / "run"
        assert main(words(root, server)) == 0
        tiny = (
            "--set queries=20 dim=32 detector.ffn_dim=64 detector.encoder_layers=1 detector.decoder_layers=2 stages=1 "
            "rego.ffn_dim=64"
        )
        how = f"--model rego_deformable_detr_scenes --image-size 64 --augment none {tiny} --epochs 1 --batch-size 3"
        assert main(shlex.split(f"train --data {root} --output {run} {how}")) == 0
        capsys.readouterr()
        test = f"--split test --json {tmp_path / 'json'}"
        assert main(shlex.split(f"evaluate --checkpoint {run / 'model.safetensors'} --data {root} {test}")) == 0
        assert re.search(r"AP on 1 \w+ of test", capsys.readouterr().out)
        assert json.loads((tmp_path / "json").read_text())["split"] == "test"


# -------------------------------------------------------------------------------------------------------- interruptions


class TestResume:
    @pytest.mark.usefixtures("one_by_one")
    def test_connections_that_drop(self, server, tmp_path, capsys):
        whole = tmp_path / "whole"
        fetch_dataset("cards", whole, server.url)
        server.requests.clear()
        server.plan = [{"cut": 500}, {"cut": 700}, {}, {"cut": 99}, {"cut": 0}, {"cut": 0}]
        fetch_dataset("cards", tmp_path / "cards", server.url)
        ranges = [None, "bytes=500-", "bytes=1200-", None, "bytes=99-", "bytes=99-", "bytes=99-", None]
        assert [ranges for _, ranges in server.requests[:8]] == ranges
        assert not capsys.readouterr().out, "a retry that succeeds is nobody's business"
        assert on_disk(tmp_path / "cards") == on_disk(whole)

    def test_a_server_that_is_busy(self, server, tmp_path):
        server.plan = [{}, {"status": 429}, {"status": 503}]
        fetch_dataset("cards", tmp_path / "cards", server.url)
        assert len(server.requests) == 12

    @pytest.mark.usefixtures("one_by_one")
    def test_it_continues_where_it_stopped(self, server, tmp_path):
        root, files = tmp_path / "cards", list(originals("cards"))
        server.plan = [{}] * 4 + [{"cut": 300}]
        server.always = {"cut": 0}
        with pytest.raises(UserError, match=r"IMG_\w+.JPG|cam_image\d.jpg"):
            fetch_dataset("cards", root, server.url)
        assert not (root / "images").exists() and not (root / "annotations").exists()
        there = {path.relative_to(source(root)).as_posix() for path in source(root).rglob("*.*")}
        assert there >= set(files[:4]) | {f"{files[4]}.part"}
        server.plan, server.always, _ = [], {}, server.requests.clear()
        fetch_dataset("cards", root, server.url)
        assert asked(server) == files[4:] and server.requests[0][1] == "bytes=300-"
        assert not list(root.rglob("*.part")) and len(open_data(root, "train")) == 3

    @pytest.mark.parametrize("left", ["beginning", "garbage", "too long", "empty"])
    def test_parts_that_were_left(self, server, tmp_path, left):
        root, name = tmp_path / "cards", "train/IMG_1.JPG"
        data = originals("cards")[name]
        part = source(root) / f"{name}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(
            {"beginning": data[:900], "garbage": bytes(900), "too long": bytes(len(data) + 9), "empty": b""}[left]
        )
        fetch_dataset("cards", root, server.url)
        assert (source(root) / name).read_bytes() == data and not list(root.rglob("*.part"))
        ranges = [asked for path, asked in server.requests if path.endswith(name)]
        assert ranges == {"beginning": ["bytes=900-"], "garbage": ["bytes=900-", None]}.get(left, [None])

    def test_only_what_is_damaged_is_downloaded_again(self, server, tmp_path):
        root = tmp_path / "cards"
        fetch_dataset("cards", root, server.url)
        before, _ = on_disk(root), server.requests.clear()
        damaged = source(root) / "train" / "IMG_3.JPG"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        (source(root) / "test" / "cam_image1.xml").unlink()
        fetch_dataset("cards", root, server.url)
        assert sorted(asked(server)) == ["test/cam_image1.xml", "train/IMG_3.JPG"] and on_disk(root) == before

    def test_an_interrupted_conversion(self, server, tmp_path, monkeypatch):
        whole, root = tmp_path / "whole", tmp_path / "cards"
        fetch_dataset("cards", whole, server.url)
        server.requests.clear()

        def killed(path: Path, data: bytes) -> None:
            if path.name == "cam_image2.jpg":
                raise KeyboardInterrupt
            write(path, data)

        write = fetch.write_atomic
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fetch, "write_atomic", killed)
            fetch_dataset("cards", root, server.url)
        assert len(list((root / "images").iterdir())) == 2 and not (root / "annotations").exists()
        server.requests.clear()
        fetch_dataset("cards", root, server.url)
        assert not server.requests and on_disk(root) == on_disk(whole)

    def test_ctrl_c_says_how_to_go_on(self, server, tmp_path, monkeypatch, capsys):
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(prepare, "download", interrupted)
        assert main(words(tmp_path / "cards", server)) == 130
        assert f"same command: regolite data cards --root {tmp_path / 'cards'}" in capsys.readouterr().err

    @pytest.mark.usefixtures("one_by_one")
    def test_progress_and_time_left(self, server, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("regolite.utils.progress.EVERY", 0.0)
        fetch_dataset("cards", tmp_path / "cards", server.url)
        out = capsys.readouterr().out
        assert re.search(r"download cards +\d+ %, \d+ of 10 files, .* passed, .* left", out)
        assert re.search(r"convert cards +\d+ %, .* passed, .* left", out)


# -------------------------------------------------------------------------------------------------------- what is wrong


class TestErrors:
    def test_without_a_network(self, server, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(prepare.time, "sleep", lambda _: pytest.fail("it waits"))
        monkeypatch.setattr(prepare, "WAITS", (1,) * 8)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert main(["data", "cards", "--root", str(tmp_path / "cards"), "--mirror", url]) == 2
        out, error = capsys.readouterr()
        [line] = error.splitlines()
        assert re.search(r"IMG_1.JPG: no data arrived \(.*(refused|reset).*check the network", line)
        assert not out

    @pytest.mark.parametrize("position", [0, 1, -1])
    def test_a_file_that_the_server_does_not_have(self, server, tmp_path, position, capsys):
        name = list(originals("cards"))[position]
        del server.files[prefix("cards") + name]
        assert main(words(tmp_path / "cards", server)) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{name}: 404 Not Found; check --mirror" in line
        assert asked(server).count(name) == 1 and not (tmp_path / "cards" / "images").exists()

    @pytest.mark.parametrize("name", ["train/IMG_1.JPG", "train/IMG_2.xml"])
    def test_one_wrong_byte(self, server, tmp_path, name, capsys):
        right = server.files[prefix("cards") + name]
        server.files[prefix("cards") + name] = right[:50] + bytes([right[50] ^ 1]) + right[51:]
        assert main(words(tmp_path / "cards", server)) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert re.search(f"{name} has another SHA-256 than [0-9a-f]{{8}}.*give the same command again", line)
        assert not (tmp_path / "cards" / "images").exists()
        assert not (source(tmp_path / "cards") / name).exists()
        server.files[prefix("cards") + name] = right
        assert main(words(tmp_path / "cards", server)) == 0

    @pytest.mark.parametrize("change", ["shorter", "longer", "page"])
    def test_another_file(self, server, tmp_path, change):
        address = f"{prefix('cards')}train/IMG_3.JPG"
        right = server.files[address]
        server.files[address] = {"shorter": right[:-5], "longer": right + b"more", "page": b"<html>log in"}[change]
        with pytest.raises(UserError, match=f"IMG_3.JPG has .* bytes instead of {len(right)}, so it is another file"):
            fetch_dataset("cards", tmp_path / "cards", server.url)

    def test_a_folder_with_another_dataset(self, server, tmp_path, capsys):
        root = tmp_path / "mine"
        (root / "annotations").mkdir(parents=True)
        (root / "annotations" / "instances_train.json").write_text("precious")
        before = on_disk(root)
        assert main(words(root, server)) == 2
        assert "holds another dataset" in capsys.readouterr().err
        assert on_disk(root) == before and not server.requests
        fetch_dataset("cards", tmp_path / "cards", server.url)
        with pytest.raises(UserError, match="holds another dataset"):
            fetch_dataset("aquarium", tmp_path / "cards", server.url)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("data", "arguments are required: name"),
            ("data birds", "invalid choice: 'birds'"),
            ("data cards --mirror ftp://a.test", "--mirror ftp://a.test is not an address"),
            ("data cards --root {file}", "is a file: give a folder"),
            ("data cards --rot x", "did you mean --root?"),
        ],
    )
    def test_wrong_input_is_one_line(self, words, said, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        assert main(words.format(file=tmp_path / "file").split()) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line and [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_an_unknown_name(self, tmp_path):
        with pytest.raises(UserError, match="no dataset 'birds': give cards or aquarium"):
            fetch_dataset("birds", tmp_path / "new")
        assert not (tmp_path / "new").exists()
