"""Folders in the form of the Hugging Face Hub: complete, loadable by every way, and one clear error for what fails."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from small_models import batch, small, unchecked

import regolite
from regolite import UserError, from_pretrained, push_to_hub, save_pretrained
from regolite.cli import main
from regolite.loading import load, load_weights

METRICS = {
    "images": 158,
    "stages": [{"AP": 23.2, "AP50": 36.2, "AP75": 24.0, "APs": None, "APm": 10.0, "APl": 30.0}] * 3,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small(classes=("cat", "dog", "emu"), category_ids=(3, 4, 9))


@pytest.fixture
def folder(model, tmp_path):
    return save_pretrained(model, tmp_path / "model")


def same(one, other):
    images = batch((64, 64), (48, 40))
    with torch.no_grad():
        for mine, theirs in zip(one(images).by_stage, other(images).by_stage, strict=True):
            assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.boxes, theirs.boxes)


def test_a_folder_is_loaded_by_every_way(model, folder):
    again = from_pretrained(folder)
    assert again.model_config == model.model_config and not again.training
    same(model, again)
    same(model, load(folder))
    other = small(classes=("cat", "dog", "emu"), category_ids=(3, 4, 9))
    assert load_weights(other, folder) == []
    same(model, other)


def test_the_configuration_is_there_to_read(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    assert (stored["library_name"], stored["regolite_version"]) == ("regolite", regolite.__version__)
    assert stored["classes"] == ["cat", "dog", "emu"] and stored["rego"]["stages"] == 2


def test_the_card(model, folder, tmp_path):
    card = (folder / "README.md").read_text("utf-8")
    front = card.split("---")[1]
    assert "pipeline_tag: object-detection" in front and "license:" not in front
    assert "cat, dog, emu." in card and "with 2 stages of REGO" in card
    assert "Not measured." in card and "Of the weights: not stated." in card
    measured = save_pretrained(model, tmp_path / "measured", METRICS, license="Apache-2.0") / "README.md"
    card = measured.read_text("utf-8")
    assert "license: apache-2.0" in card.split("---")[1] and "on 158 images" in card and "36.2" in card


def test_the_command_line_takes_a_folder(folder, tmp_path, capsys):
    Image.new("RGB", (64, 48), "green").save(tmp_path / "photo.png")
    words = ["detect", "--checkpoint", str(folder), str(tmp_path / "photo.png"), "--output", str(tmp_path / "found")]
    assert main(words) == 0 and (tmp_path / "found" / "detections.json").exists()
    (folder / "model.safetensors").unlink()
    assert main(words) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_broken_folders(model, folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint at .*empty.model\.safetensors"):
        from_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="is a file: give a folder"):
        save_pretrained(model, folder / "config.json")
    with pytest.raises(UserError, match="carries the model's configuration"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_downloads(model, folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(model, from_pretrained("owner/name", revision="v1"))
    [(name, options)] = asked
    assert (name, options["revision"]) == ("owner/name", "v1")
    assert sorted(options["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]


def test_the_hub_cannot_be_reached(model, monkeypatch):
    def refuse(*args, **options):
        raise LocalEntryNotFoundError("Cannot find the file in the cache.\nMore lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(UserError, match=r"^can't get owner/name from the Hugging Face Hub: Cannot find .* cache\.$"):
        from_pretrained("owner/name")
    with pytest.raises(UserError, match=r"^can't upload owner/name to the Hugging Face Hub: Cannot find .* cache\.$"):
        push_to_hub(model, "owner/name")
    for name in ("nowhere", "a/b/c", "https://host/owner/name"):
        with pytest.raises(UserError, match="neither a folder nor the name of a repository, owner/name"):
            from_pretrained(name)
    with unchecked(), pytest.raises(UserError, match="name=3 is not a folder or the name of a repository"):
        from_pretrained(3)


def test_uploads(model, monkeypatch):
    calls = {}

    def upload(repo_id, folder_path):
        same(model, load(folder_path))
        calls["files"] = repo_id
        return f"https://hub.test/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: calls.update(repo=(name, options)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert push_to_hub(model, "owner/name", license="MIT", private=True) == "https://hub.test/owner/name"
    assert calls["repo"] == ("owner/name", {"private": True, "exist_ok": True}) and calls["files"] == "owner/name"
