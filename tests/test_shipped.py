"""What the repository ships: checkpoints that know what their card says."""

from __future__ import annotations

from pathlib import Path

import pytest

import regolite
from regolite.checkpoint import EVERYDAY
from regolite.data import CocoFolder, make_transform, open_data
from regolite.evaluation import with_shared_classes
from regolite.paper.experiments import PROTOCOL
from regolite.paper.statistics import read_results

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "data" / "checkpoints" / "rego_deformable_detr_tiny.safetensors"


@pytest.fixture(scope="module")
def model():
    return regolite.load(CHECKPOINT)


def test_knows_its_training_images_and_refines_them(model):
    config = model.model_config
    transform = make_transform(config.augment, config.image_size, train=False)
    images = CocoFolder(ROOT / "data" / "coco_tiny", "train", transform, limit=16)
    assert images.classes == config.classes and images.category_ids == config.category_ids
    figures = regolite.evaluate(model, images, progress=False)
    assert len(figures["stages"]) == 4
    assert figures["AP50"] >= 90
    assert figures["AP"] > figures["stages"][0]["AP"]


def test_finds_the_teddy_bears_of_the_readme(model):
    image = ROOT / "data" / "coco_tiny" / "images" / "000000000491.jpg"
    [found] = regolite.detect(model, image, threshold=0.5)
    assert [model.model_config.classes[label] for label in found.labels] == ["teddy bear"] * 4


class TestEveryday:
    @pytest.fixture(scope="class")
    def everyday(self):
        return regolite.load()

    def test_finds_objects_in_images_that_it_has_never_seen(self, everyday):
        config = everyday.model_config
        transform = make_transform(config.augment, config.image_size, train=False)
        some = open_data(f"{ROOT / 'data' / 'coco_tiny'}:every=6", "train+val", transform)  # notebook 00 has all 158
        unseen = with_shared_classes(some, config)
        assert len(unseen) == 53 and len(unseen.classes) == 20
        figures = regolite.evaluate(everyday, unseen, progress=False)
        last = figures["stages"][-1]
        assert last["AP50"] >= 30
        assert last["AP"] >= 20  # as the card says, the base detector is not worse on these images

    def test_is_what_its_preset_builds(self, everyday):
        config = everyday.model_config
        named = {"classes": config.classes, "category_ids": config.category_ids}
        assert config == regolite.configure("rego_deformable_detr_everyday", **named).without_pretrained()

    def test_fits_in_16_megabytes(self):
        assert EVERYDAY.stat().st_size <= 16 * 2**20


def test_the_other_one_knows_scenes():
    model = regolite.load(ROOT / "data" / "checkpoints" / "rego_deformable_detr_scenes.safetensors")
    config = model.model_config
    transform = make_transform(config.augment, config.image_size, train=False)
    scenes = open_data("scenes:1:val=24:context=0.5:max_objects=6", "val", transform)
    assert scenes.classes == config.classes
    figures = regolite.evaluate(model, scenes, progress=False)
    assert figures["AP50"] >= 80
    assert figures["AP"] > figures["stages"][0]["AP"]


def test_the_miniatures_are_those_of_the_experiments():
    """Half precision moves the AP a little; another model would move it a lot."""
    for arm, name in (("base", "deformable_detr_miniature"), ("rego", "rego_deformable_detr_miniature")):
        model = regolite.load(ROOT / "data" / "checkpoints" / f"{name}.safetensors")
        scenes = open_data(PROTOCOL["data"], "val")  # 200 images; there are 500 in the split test
        last = read_results(ROOT / "experiments" / "results", [arm])[arm][0]["curve"][-1]
        figures = regolite.evaluate(model, scenes, progress=False)
        assert [stage["AP"] for stage in figures["stages"]] == pytest.approx(last["AP"], abs=0.5)
