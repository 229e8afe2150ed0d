"""prepare-coco against a server that does everything wrong: it goes on, or refuses, and loses nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from local_server import serve
from PIL import Image

from regolite import RunConfig
from regolite.cli import main
from regolite.data import check_coco, open_data, prepare, prepare_coco
from regolite.errors import UserError
from regolite.training.setup import prepare_data

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "coco_tiny"
PATHS = {"annotations": "/annotations/annotations_trainval2017.zip"} | {
    s: f"/zips/{s}2017.zip" for s in ("val", "train")
}


# ------------------------------------------------------------------------------------------------- a server and a COCO


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prepare, "WAITS", (0,) * 4)
    with serve() as server:
        yield server


def zipped(files: dict[str, bytes] | list[tuple[Any, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, data in files.items() if isinstance(files, dict) else files:
            content.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def files() -> dict[str, dict[str, bytes]]:
    """What COCO's three archives hold: here 3 images of val and 5 of train, of coco_tiny."""
    held: dict[str, dict[str, bytes]] = {"annotations": {"annotations/captions_val2017.json": b"{}"}}
    for split, count in (("val", 3), ("train", 5)):
        content = json.loads((TINY / "annotations" / f"instances_{split}.json").read_bytes())
        with_objects = {a["image_id"] for a in content["annotations"]}
        content["images"] = [image for image in content["images"] if image["id"] in with_objects][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        held["annotations"][f"annotations/instances_{split}2017.json"] = json.dumps(content).encode()
        names = [image["file_name"] for image in content["images"]]
        held[split] = {f"{split}2017/": b""} | {
            f"{split}2017/{name}": (TINY / "images" / name).read_bytes() for name in names
        }
    return held


def publish(server: ThreadingHTTPServer, name: str, data: bytes, **changes: Any) -> prepare.Archive:
    """Put an archive on the server, and let prepare-coco take it for COCO's."""
    server.files[PATHS[name]] = data
    about = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "unpacked": len(data), **changes}
    prepare.ARCHIVES[name] = replace(prepare.ARCHIVES[name], **about)
    return prepare.ARCHIVES[name]


@pytest.fixture
def coco(server, files, monkeypatch) -> ThreadingHTTPServer:
    """A server with a small COCO."""
    for name in PATHS:
        monkeypatch.setitem(prepare.ARCHIVES, name, prepare.ARCHIVES[name])
        publish(server, name, zipped(files[name]))
    return server


def on_disk(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expected(files: dict[str, dict[str, bytes]], *splits: str) -> dict[str, bytes]:
    found = {f"annotations/instances_{s}2017.json" for s in splits}
    whole = {name: data for archive in files.values() for name, data in archive.items() if not name.endswith("/")}
    return {n: data for n, data in whole.items() if n in found or n.split("/")[0].removesuffix("2017") in splits}


# ---------------------------------------------------------------------------------------------------------- the whole


class TestWhole:
    def test_one_command_makes_what_training_reads(self, coco, files, tmp_path, capsys):
        root = tmp_path / "new" / "coco"
        words = ["prepare-coco", "--root", str(root), "--mirror", coco.url + "/", "--read-images"]
        assert main(words) == 0
        assert on_disk(root) == expected(files, "val", "train")  # no zip files, no captions
        assert coco.requests == [(PATHS[name], None) for name in ("annotations", "val", "train")]
        for split, count in (("val", 3), ("train", 5)):
            data = open_data(root, split)
            assert len(data) == count and data[0][0].shape[0] == 3
        out = capsys.readouterr().out
        assert "val: not all of COCO 2017, which has 5000 images here" in out
        assert "val: 3 images" in out and "nothing is wrong" in out and f"train --data {root}" in out
        assert main(words) == 0
        assert len(coco.requests) == 3, "it is all there: nothing to ask for"

    def test_one_split_alone(self, coco, files, tmp_path):
        words = ["prepare-coco", "--root", str(tmp_path), "--mirror", coco.url, "--splits"]
        assert main([*words, "val"]) == 0
        assert on_disk(tmp_path) == expected(files, "val")
        assert main([*words, "train", "val"]) == 0
        assert on_disk(tmp_path) == expected(files, "val", "train")
        assert [path for path, _ in coco.requests] == [PATHS[n] for n in ("annotations", "val", "annotations", "train")]

    def test_zips_can_be_kept(self, coco, files, tmp_path):
        prepare_coco(tmp_path, mirror=coco.url, keep_zips=True)
        zips = {path.rpartition("/")[2]: data for path, data in coco.files.items()}
        assert on_disk(tmp_path) == expected(files, "val", "train") | zips

    def test_zips_that_are_there_are_used_and_never_deleted(self, coco, files, tmp_path):
        own = tmp_path / "val2017.zip"
        own.write_bytes(coco.files[PATHS["val"]])
        prepare_coco(tmp_path, ["val"], coco.url)
        assert coco.requests == [(PATHS["annotations"], None)]
        assert on_disk(tmp_path) == expected(files, "val") | {own.name: own.read_bytes()}

    def test_a_missing_or_empty_image_is_fetched_again(self, coco, files, tmp_path):
        prepare_coco(tmp_path, ["val"], coco.url)
        first, second, third = sorted((tmp_path / "val2017").iterdir())
        first.unlink()
        second.write_bytes(b"")
        kept = third.stat().st_ino
        prepare_coco(tmp_path, ["val"], coco.url)
        assert on_disk(tmp_path) == expected(files, "val") and third.stat().st_ino == kept
        assert coco.requests[2:] == [(PATHS["val"], None)]

    def test_a_image_that_no_archive_has_ends_in_the_report(self, coco, files, tmp_path, capsys):
        content = json.loads(files["annotations"]["annotations/instances_val2017.json"])
        content["images"].append({"id": 9, "file_name": "000000000009.jpg", "width": 9, "height": 9})
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
        words = ["prepare-coco", "--root", str(tmp_path), "--mirror", coco.url, "--splits", "val"]
        assert main(words) == 1
        assert coco.requests == [(PATHS["val"], None)]
        assert "! val: missing image (1): 000000000009.jpg" in capsys.readouterr().out

    def test_ctrl_c_says_how_to_go_on(self, coco, tmp_path, monkeypatch, capsys):
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(prepare, "download", interrupted)
        assert main(["prepare-coco", "--root", str(tmp_path), "--mirror", coco.url]) == 130
        assert f"go on by the same command: regolite prepare-coco --root {tmp_path}" in capsys.readouterr().err

    def test_a_split_that_coco_does_not_have(self, tmp_path):
        with pytest.raises(UserError, match="COCO has no split 'test': give train or val"):
            prepare_coco(tmp_path / "new", ["val", "test"])
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--mirror ftp://a.test", "--mirror ftp://a.test is not an address"),
            ("--mirror http://", "is not an address"),
            ("--splits test", "invalid choice: 'test'"),
            ("--root {file}", "is a file: give a folder"),
            ("--check --root {file}/none", "does not exist"),
            ("--check --root {deep}", "instances_train.json is nested too deeply"),
            ("--json {folder}", "is a folder; give a file"),
        ],
    )
    def test_wrong_input_is_one_line(self, words, said, tmp_path, capsys):
        (tmp_path / "file").touch()
        (tmp_path / "deep" / "annotations").mkdir(parents=True)
        (tmp_path / "deep" / "annotations" / "instances_train.json").write_text(10**5 * "[")
        words = words.format(file=tmp_path / "file", folder=tmp_path, deep=tmp_path / "deep").split()
        assert main(["prepare-coco", "--root", str(tmp_path / "new"), *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line


# -------------------------------------------------------------------------------------------------------- downloading


@pytest.fixture
def fetch(server, tmp_path):
    """Download ``data``; returns the file, and what Ranges were asked for."""
    data = b"PK" + os.urandom(300_000)
    server.files["/file.zip"] = data

    def run(*plan: dict[str, Any], have: int | bytes = 0, **always: Any) -> list[str | None]:
        server.plan, server.always = list(plan), always
        part = tmp_path / "file.zip.part"
        part.write_bytes(have if isinstance(have, bytes) else data[:have])
        del server.requests[:]
        prepare.download(server.url + "/file.zip", part, len(data))
        assert part.read_bytes() == data
        return [asked for _, asked in server.requests]

    run.part, run.data = tmp_path / "file.zip.part", data
    return run


class TestDownload:
    def test_connections_that_drop(self, fetch, capsys):
        asked = fetch({"cut": 1000}, {"cut": 70_000}, {"cut": 0}, {"cut": 5})
        assert asked == [None, "bytes=1000-", "bytes=71000-", "bytes=71000-", "bytes=71005-"]
        assert "file.zip.part: the connection was closed at 24 %; going on in 0 s" in capsys.readouterr().out

    def test_a_connection_that_is_reset(self, fetch):
        asked = fetch({"cut": 50_000, "stall": 0.1, "reset": True}, {"reset": True, "cut": 0})
        assert len(asked) == 3 and asked[0] is None

    def test_it_goes_on_from_what_is_there(self, fetch):
        assert fetch(have=123_456) == ["bytes=123456-"]
        assert fetch(have=len(fetch.data)) == []

    def test_a_server_that_ignores_range(self, fetch):
        assert fetch(have=777, no_range=True) == ["bytes=777-"]
        # It drops before, in and behind what we have: only the last brings anything, and nothing is written twice.
        plan = [{"no_range": True, "cut": cut} for cut in (10, 777, 5000)]
        assert fetch(*plan, have=777) == ["bytes=777-"] * 3 + ["bytes=5000-"]

    def test_a_server_that_gets_nowhere(self, fetch):
        with pytest.raises(UserError, match="4 attempts in a row brought nothing .*777 bytes of 300.0 kB are kept in"):
            fetch(have=777, no_range=True, cut=777)
        assert fetch.part.read_bytes() == fetch.data[:777]

    def test_attempts_that_bring_something_are_not_counted(self, fetch):
        assert len(fetch(*[{"cut": 100}] * 10)) == 11

    def test_a_server_that_is_not_there(self, server, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/file.zip"
        with pytest.raises(UserError, match="4 attempts in a row .*(refused|reset)"):
            prepare.download(url, tmp_path / "file.zip.part", 5)

    @pytest.mark.parametrize("length", [5, 300_001, 10**12])
    def test_another_length_is_another_file(self, fetch, server, length):
        with pytest.raises(UserError, match=f"has {length} bytes instead of 300002, so it is another file"):
            fetch(length=length)
        assert fetch.part.read_bytes() == b"" and len(server.requests) == 1

    def test_another_length_in_a_range(self, fetch, server):
        with pytest.raises(UserError, match="has 99 bytes instead of 300002"):
            fetch(have=777, total=99)
        assert fetch.part.read_bytes() == fetch.data[:777] and len(server.requests) == 1

    def test_a_file_that_is_shorter(self, fetch, server):
        server.files["/file.zip"] = fetch.data[:1000]
        with pytest.raises(UserError, match="ends before byte 1000 of 300002"):
            fetch({"length": None})
        assert fetch.part.read_bytes() == fetch.data[:1000]

    def test_more_bytes_than_there_must_be(self, fetch):
        assert fetch({"length": None, "body": fetch.data + b"more"}) == [None]

    def test_another_part_than_asked_for(self, fetch):
        assert fetch({"start": 5}, have=777) == ["bytes=777-"] * 2

    def test_a_page_to_log_in(self, fetch, server):
        with pytest.raises(UserError, match="not a zip file, perhaps a login page"):
            fetch(body=b"<html>" + bytes(400_000), length=None)
        assert fetch.part.read_bytes() == b"" and len(server.requests) == 1

    @pytest.mark.parametrize("status", [403, 404, 410])
    def test_what_is_not_there_is_asked_for_once(self, fetch, server, status):
        with pytest.raises(UserError, match=rf"/file\.zip: {status} .*check --mirror"):
            fetch(have=777, status=status)
        assert len(server.requests) == 1 and fetch.part.read_bytes() == fetch.data[:777]

    def test_a_server_that_is_busy(self, fetch, server):
        assert len(fetch({"status": 503}, {"status": 429}, {"status": 500})) == 4
        with pytest.raises(UserError, match="4 attempts in a row brought nothing .503 "):
            fetch(status=503)
        assert len(server.requests) == 4

    def test_a_slow_start(self, fetch):
        assert fetch({"sleep": 0.5}) == [None]

    def test_a_server_that_falls_silent(self, fetch, monkeypatch):
        monkeypatch.setattr(prepare, "TIMEOUT", 0.3)
        assert fetch({"cut": 4321, "stall": 30}, {"sleep": 0.8}) == [None, "bytes=4321-", "bytes=4321-"]

    def test_progress_and_time_left(self, fetch, monkeypatch, capsys):
        monkeypatch.setattr("regolite.utils.progress.EVERY", 0.0)
        fetch({"cut": 100_000, "stall": 0.3}, {"cut": 50_000, "stall": 0.3})
        assert re.search(r"download file\.zip +\d+ %, .* kB of 300\.0 kB, .*/s, .* left", capsys.readouterr().out)

    def test_kill_9_loses_nothing(self, fetch, server):
        server.plan = [{"cut": 200_000, "stall": 60}]
        script = "import sys; from regolite.data.prepare import Path, download; "
        script += "download(sys.argv[1], Path(sys.argv[2]), 300_002)"
        child = Forked(script, server.url + "/file.zip", str(fetch.part))
        try:
            until = time.monotonic() + 60
            while not (fetch.part.exists() and fetch.part.stat().st_size == 200_000):
                assert time.monotonic() < until and child.poll() is None
                time.sleep(0.05)
        finally:
            child.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            child.wait()
        assert fetch(have=fetch.part.read_bytes()) == ["bytes=200000-"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
    def test_a_full_disk(self, server, tmp_path):
        server.files["/file.zip"] = b"PK" + bytes(100)
        (tmp_path / "file.zip.part").symlink_to("/dev/full")
        with pytest.raises(UserError, match="file.zip.part: No space left .*is kept: free some space"):
            prepare.download(server.url + "/file.zip", tmp_path / "file.zip.part", 102)
        assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------------- sums and room on disk


class TestSums:
    def test_one_wrong_byte(self, coco, files, tmp_path):
        right = coco.files[PATHS["val"]]
        coco.files[PATHS["val"]] = right[:5000] + bytes([right[5000] ^ 1]) + right[5001:]
        with pytest.raises(UserError, match="another SHA-256 .* it is now val2017.zip.damaged"):
            prepare_coco(tmp_path, ["val"], coco.url)
        assert not (tmp_path / "val2017").exists() and not (tmp_path / "val2017.zip.part").exists()
        assert (tmp_path / "val2017.zip.damaged").read_bytes() == coco.files[PATHS["val"]]
        coco.files[PATHS["val"]] = right
        prepare_coco(tmp_path, ["val"], coco.url)
        assert expected(files, "val").items() <= on_disk(tmp_path).items()
        assert coco.requests[1:] == [(PATHS["val"], None)] * 2

    def test_a_part_that_is_too_long(self, coco, tmp_path):
        (tmp_path / "annotations_trainval2017.zip.part").write_bytes(bytes(10**6))
        with pytest.raises(UserError, match="has 1000000 bytes, not .*annotations_trainval2017.zip.damaged"):
            prepare_coco(tmp_path, ["val"], coco.url)
        prepare_coco(tmp_path, ["val"], coco.url)

    @pytest.mark.parametrize("change", ["shorter", "other"])
    def test_somebodys_wrong_zip_is_left_alone(self, coco, tmp_path, change):
        right = coco.files[PATHS["annotations"]]
        own = tmp_path / "annotations_trainval2017.zip"
        own.write_bytes(right[:-9] if change == "shorter" else right[:-9] + bytes(9))
        before = on_disk(tmp_path)
        wrong = "annotations_trainval2017.zip has .*: delete it, or rename it to .*zip.part"
        with pytest.raises(UserError, match=wrong):
            prepare_coco(tmp_path, mirror=coco.url)
        assert on_disk(tmp_path) == before and not coco.requests
        if change == "shorter":  # what the message says
            own.rename(tmp_path / (own.name + ".part"))
            prepare_coco(tmp_path, mirror=coco.url)
            assert coco.requests[0] == (PATHS["annotations"], f"bytes={len(right) - 9}-")


class TestRoom:
    @pytest.fixture
    def free(self, monkeypatch):
        """Sets what is free on the disk."""

        def give(count: int) -> None:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(count, 0, count))

        return give

    def test_nothing_is_begun_without_room(self, coco, tmp_path, free, capsys):
        free(50_000)
        assert main(["prepare-coco", "--root", str(tmp_path), "--mirror", coco.url]) == 2
        error = capsys.readouterr().err
        assert "are needed" in error and "50.0 kB are free" in error and "--splits val" in error
        assert not coco.requests and not on_disk(tmp_path)

    def test_room_is_reckoned_with_zips_going(self, coco, tmp_path, free):
        sizes = {name: archive.size for name, archive in prepare.ARCHIVES.items()}
        most = sizes["annotations"] + sizes["val"] + 2 * sizes["train"]
        free(most - 1)
        with pytest.raises(UserError, match="are needed for annotations.*val2017.zip, train2017.zip"):
            prepare_coco(tmp_path, mirror=coco.url)
        free(most)
        with pytest.raises(UserError, match="are needed"):
            prepare_coco(tmp_path, mirror=coco.url, keep_zips=True)
        assert not coco.requests
        prepare_coco(tmp_path, mirror=coco.url)

    def test_what_is_there_needs_no_room(self, coco, tmp_path, free):
        (tmp_path / "val2017.zip.part").write_bytes(coco.files[PATHS["val"]][:-100])
        (tmp_path / "annotations_trainval2017.zip").write_bytes(coco.files[PATHS["annotations"]])
        most = prepare.ARCHIVES["annotations"].unpacked + 100 + prepare.ARCHIVES["val"].unpacked
        free(most - 1)
        with pytest.raises(UserError, match="are needed"):
            prepare_coco(tmp_path, ["val"], coco.url)
        assert not coco.requests
        free(most)
        prepare_coco(tmp_path, ["val"], coco.url)


# ---------------------------------------------------------------------------------------------------------- unpacking


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


def device(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFIFO | 0o666) << 16
    return member


GOOD = ("val2017/000000000001.jpg", b"good")


class TestUnpack:
    @pytest.mark.parametrize(
        ("evil", "said"),
        [
            ("../evil.jpg", "a name that COCO's does not have"),
            ("val2017/../../evil.jpg", "a name"),
            ("val2017/../000000000002.jpg", "a name"),
            ("/evil.jpg", "a name"),
            ("//evil/000000000002.jpg", "a name"),
            ("C:/evil.jpg", "a name"),
            ("..\\evil.jpg", "a name"),
            ("val2017\\000000000002.jpg", "a name"),
            ("val2017/evil.sh", "a name"),
            ("val2017/000000000002.jpg/", "a name"),
            ("val2017/000000000002.jpg\n", "a name"),
            ("train2017/000000000002.jpg", "a name"),
            ("annotations/instances_val2017.json", "a name"),
            (link("val2017/000000000002.jpg"), "a link"),
            (link("val2017/"), "a name"),
            (device("val2017/000000000002.jpg"), "no plain file"),
            ("val2017/000000000001.jpg", "there twice"),
        ],
        ids=lambda value: getattr(value, "filename", value).replace("/", "|"),
    )
    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_refuses_what_is_not_coco(self, coco, tmp_path, evil, said):
        root = tmp_path / "deep" / "coco"
        publish(coco, "val", zipped([GOOD, (evil, b"/etc/passwd")]))  # with the right sum, as if COCO's own were evil
        with pytest.raises(UserError, match=f"{re.escape(said)}.*: nothing of it was unpacked"):
            prepare_coco(root, ["val"], coco.url)
        there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
        assert there == {"deep/coco/annotations/instances_val2017.json", "deep/coco/val2017.zip.part"}

    @pytest.mark.parametrize("cut", [10, 5000, -30])
    def test_a_truncated_zip(self, coco, tmp_path, cut, capsys):
        publish(coco, "val", coco.files[PATHS["val"]][:cut])
        words = ["prepare-coco", "--root", str(tmp_path), "--mirror", coco.url, "--splits", "val"]
        assert main(words) == 2
        assert re.search(r"val2017\.zip\.part cannot be unpacked .*delete it", capsys.readouterr().err)
        assert not (tmp_path / "val2017").exists()

    def test_a_damaged_image_in_a_zip(self, coco, files, tmp_path):
        whole = coco.files[PATHS["val"]]
        *_, last = files["val"].items()
        at = whole.index(last[1]) + 100
        publish(coco, "val", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=f"cannot be unpacked .*CRC.*{last[0]}"):
            prepare_coco(tmp_path, ["val"], coco.url)
        left = {name: data for name, data in expected(files, "val").items() if name != last[0]}
        zip_file = {"val2017.zip.part": coco.files[PATHS["val"]]}
        assert on_disk(tmp_path) == left | zip_file  # nothing half-written

    def test_it_goes_on_where_it_stopped(self, coco, files, tmp_path, monkeypatch, capsys):
        def killed(content: Any, member: Any, target: Path) -> None:
            if len(list(target.parent.iterdir())) == 1:
                target.with_name(f".{target.name}.part").write_bytes(b"half")
                raise KeyboardInterrupt
            extract(content, member, target)

        extract = prepare._extract
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare, "_extract", killed)
            prepare_coco(tmp_path, ["val"], coco.url)
        [first] = (tmp_path / "val2017").glob("[!.]*")
        kept = first.stat()
        _, _, second, third = files["val"]
        (tmp_path / second).write_bytes(bytes(len(files["val"][second])))  # the right size, and yet damaged
        assert not (tmp_path / third).exists()
        prepare_coco(tmp_path, ["val"], coco.url)
        assert on_disk(tmp_path) == expected(files, "val")
        assert (first.stat().st_ino, first.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
        assert len(coco.requests) == 2, "the zip file was whole already"
        assert "1 files in" in capsys.readouterr().out

    def test_a_link_in_the_folder_is_not_followed(self, coco, files, tmp_path):
        name = list(files["val"])[1]
        precious = tmp_path / "precious"
        precious.write_bytes(files["val"][name])  # the same bytes: only a link to look at
        (tmp_path / "root" / "val2017").mkdir(parents=True)
        (tmp_path / "root" / name).symlink_to(precious)
        before = precious.stat().st_mtime_ns
        prepare_coco(tmp_path / "root", ["val"], coco.url)
        assert not (tmp_path / "root" / name).is_symlink() and precious.stat().st_mtime_ns == before


# ----------------------------------------------------------------------------------------------------------- checking


@pytest.fixture
def folder(files, tmp_path) -> Path:
    """A small COCO, unpacked."""
    root = tmp_path / "coco"
    for name, data in expected(files, "val", "train").items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def change(root: Path, what) -> dict[str, Any]:
    """Let ``what`` change the annotations of val."""
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_bytes())
    what(content)
    file.write_text(json.dumps(content))
    return content


def of(index: int, records: str, **values: Any):
    return lambda content: content[records][index].update(values)


def without(index: int, records: str, key: str):
    return lambda content: content[records][index].pop(key)


def twice(records: str):
    return lambda content: content[records].append(dict(content[records][0]))


class TestCheck:
    def test_a_whole_folder_has_nothing_wrong(self, folder):
        report = check_coco(folder, read_images=True)
        assert not report.wrong and not report.notes
        assert report.counts["val"] == {"images": 3, "objects": report.counts["val"]["objects"], "categories": 80}

    @pytest.mark.parametrize(
        ("damage", "kinds"),
        [
            (of(0, "images", file_name="none.jpg"), ["missing image"]),
            (of(0, "images", width="640"), ["image without a size"]),
            (without(0, "images", "file_name"), ["image without a file name", "annotation of an unknown image"]),
            (without(0, "images", "id"), ["image without an id", "annotation of an unknown image"]),
            (twice("images"), ["image id given twice", "image listed twice"]),
            (twice("categories"), ["category id given twice"]),
            (without(0, "categories", "name"), ["category without a name"]),
            (twice("annotations"), ["annotation id given twice"]),
            (of(0, "annotations", id="7"), ["annotation without an id"]),
            (of(0, "annotations", image_id=4), ["annotation of an unknown image"]),
            (of(0, "annotations", category_id=12), ["unknown category"]),
            (of(0, "annotations", category_id=[1]), ["unknown category"]),
            (of(0, "annotations", area="big"), ["area is no number"]),
            (of(0, "annotations", bbox=[1, 2, 3]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=[1, 2, -3, 4]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=[1, 2, float("nan"), 4]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=None, segmentation=[]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=5), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=["1", "2", "3", "4"]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=[True, 2, 3, 4]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=[1, 2, 1e300, 4]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", bbox=[1, 2, 10**400, 4]), ["box is not [x, y, width, height]"]),
            (of(0, "annotations", area=float("nan")), ["area is no number"]),
            (of(0, "annotations", area=True), ["area is no number"]),
            (of(0, "annotations", area=-1), ["area is no number"]),
            (of(0, "annotations", iscrowd=7), ["iscrowd is no number"]),
            (of(0, "annotations", iscrowd=True), ["iscrowd is no number"]),
            (of(0, "annotations", id=2**64), ["annotation without an id"]),
            (of(0, "images", id=True), ["image without an id", "annotation of an unknown image"]),
            (of(0, "images", id=1.0), ["image without an id", "annotation of an unknown image"]),
            (of(0, "images", height=0), ["image without a size"]),
            (of(0, "images", file_name=5), ["image without a file name", "annotation of an unknown image"]),
            (of(0, "categories", name=True), ["category without a name"]),
            (of(0, "categories", name="car"), ["category name given twice"]),
            (of(0, "annotations", bbox=[9999, 2, 3, 4]), ["box outside its image"]),
            (of(0, "annotations", bbox=[-9, 2, 9, 4]), ["box outside its image"]),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_what_is_wrong_is_what_the_loader_refuses(self, folder, damage, kinds):
        content = change(folder, damage)
        report = check_coco(folder)
        assert sorted({finding["kind"] for finding in report.wrong}) == sorted(kinds)
        assert {finding["split"] for finding in report.wrong} == {"val"}
        with pytest.raises(UserError):
            open_data(folder, "val")
        open_data(folder, "train")
        if kinds[0].startswith(("box", "unknown")):
            [finding], first = report.wrong, content["annotations"][0]
            assert (finding["annotation_id"], finding["image_id"]) == (first["id"], first["image_id"])
            names = {image["id"]: image["file_name"] for image in content["images"]}
            assert finding["file"] == names[first["image_id"]]

    def test_categories_that_differ_between_splits(self, folder):
        def swap(content):
            first, second = content["categories"][:2]
            first["name"], second["name"] = second["name"], first["name"]

        change(folder, swap)
        said = [(f["split"], f["kind"], f["said"]) for f in check_coco(folder).wrong]
        kind = "category differs between splits"
        assert said == [
            ("val", kind, "1 is person in train and bicycle in val"),
            ("val", kind, "2 is bicycle in train and person in val"),
        ]

    def test_images_are_looked_for_where_training_does(self, folder):
        change(folder, lambda content: [i.update(file_name="val2017\\" + i["file_name"]) for i in content["images"]])
        report = check_coco(folder, read_images=True)
        assert not report.wrong and not report.notes
        open_data(folder, "val")[0]

    @pytest.mark.parametrize(
        ("oddity", "kind"),
        [
            (of(0, "annotations", bbox=[10, 20, 0, 30]), "box without area"),
            (of(0, "annotations", bbox=[0, 0, 9999, 20]), "box over the edge"),
            (of(0, "annotations", area=0), "object with an area of 0"),
            (lambda content: content["images"].pop(), "image not listed"),
            (lambda content: content["annotations"].__delitem__(slice(1, None)), "image without objects"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_training_copes_with_is_only_noted(self, folder, oddity, kind, capsys):
        def both(content):
            oddity(content)
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]

        change(folder, both)
        assert main(["prepare-coco", "--check", "--root", str(folder)]) == 0
        assert f"- val: {kind} (" in capsys.readouterr().out
        open_data(folder, "val")[0]

    def test_no_annotation_at_all_is_wrong(self, folder):
        change(folder, lambda content: content["annotations"].clear())
        [found] = check_coco(folder).wrong
        assert (found["split"], found["kind"]) == ("val", "no annotations")
        with pytest.raises(UserError, match="instances_val2017.json: .* without a single annotation"):
            prepare_data(RunConfig(data=str(folder), model="deformable_detr_scenes", output="unused"), None)

    def test_a_pixel_over_the_edge_is_rounding(self, folder):
        content = change(folder, lambda content: None)
        size = {image["id"]: image["width"] for image in content["images"]}[content["annotations"][0]["image_id"]]
        change(folder, of(0, "annotations", bbox=[size - 10, 5, 10.9, 5]))
        assert not check_coco(folder).notes

    def test_a_sample_of_the_images_is_opened_or_all_on_demand(self, folder, monkeypatch):
        cut, other, empty = sorted((folder / "val2017").iterdir())
        cut.write_bytes(cut.read_bytes()[:3000])
        Image.new("RGB", (32, 16)).save(other)
        empty.write_bytes(b"")
        of_small = check_coco(folder).wrong
        for module in ("regolite.data.prepare", "regolite.data.coco"):
            monkeypatch.setattr(f"{module}.PROBED", 1)
        sampled, whole = check_coco(folder), check_coco(folder, read_images=True, workers=2)
        assert {f["file"] for f in sampled.wrong} < {f["file"] for f in whole.wrong}
        assert "- val: 1 image files opened; --read-images opens all" in str(sampled) and not whole.opened
        assert of_small == whole.wrong
        found = {(f["kind"], f["file"]) for f in whole.wrong}
        assert found == {
            ("unreadable image", cut.name),
            ("image of another size", other.name),
            ("empty image", empty.name),
            ("unreadable image", empty.name),
        }

    def test_short_on_the_terminal_and_whole_in_json(self, folder, tmp_path, capsys):
        names = sorted(path.name for path in (folder / "train2017").iterdir())
        for name in names[1:]:
            (folder / "train2017" / name).unlink()
        change(folder, of(0, "annotations", bbox=[9999, 2, 3, 4]))
        file = tmp_path / "new" / "report.json"
        assert main(["prepare-coco", "--check", "--root", str(folder), "--json", str(file)]) == 1
        out, err = capsys.readouterr()
        listed = [i["file_name"] for i in json.loads(
            (folder / "annotations" / "instances_train2017.json").read_bytes())["images"]]  # fmt: skip
        missing = [name for name in listed if name != names[0]]
        assert f"! train: missing image (4): {', '.join(missing[:3])}, ..." in out
        assert "bbox [9999, 2, 3, 4] in " in out and missing[3] not in out
        assert err == f"regolite: 5 things are wrong in {folder}; all are in {file}\n"
        report = json.loads(file.read_text())
        assert [f["file"] for f in report["wrong"] if f["kind"] == "missing image"] == missing
        assert report["counts"]["train"]["images"] == 5 and report["root"] == str(folder)

    def test_other_folders_can_be_checked_too(self, capsys):
        assert main(["prepare-coco", "--check", "--root", str(TINY)]) == 0
        assert "train: 126 images" in capsys.readouterr().out

    def test_nothing_is_downloaded_to_check(self, coco, tmp_path, capsys):
        assert main(["prepare-coco", "--check", "--root", str(tmp_path), "--mirror", coco.url]) == 2
        assert not coco.requests and "no annotations of split 'train'" in capsys.readouterr().err
