"""The paper's trainings: what they decide, the commands that start them, and what they are estimated to take."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from forked import REGOLITE, Forked
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import regolite
from regolite.cli import main
from regolite.data import make_transform, open_data
from regolite.errors import UserError
from regolite.evaluation.complexity import TABLE_1, count
from regolite.losses import LossConfig
from regolite.models.config import ModelConfig
from regolite.models.presets import configure, presets
from regolite.paper.estimates import (
    IMAGES,
    LARGEST_IMAGE,
    MEAN_IMAGE,
    TFLOPS,
    V100_HOURS,
    estimate,
    kept_bytes,
    step_bytes,
    step_gigabytes,
)
from regolite.paper.estimates import _FusedAttention as FusedAttention
from regolite.paper.estimates import _Peak as Peak
from regolite.paper.recipes import RECIPES, as_text, assumptions, recipe, rows
from regolite.training import RunConfig
from regolite.training.schedule import FIRST, lr_factor, make_optimizer, parameter_groups
from regolite.training.setup import parse_overrides
from regolite.types import ImageBatch, Target

ROOT = Path(__file__).resolve().parent.parent
every_recipe = pytest.mark.parametrize("name", RECIPES)

# Table 1 of the paper and, for X101 in 36 epochs, section 5.2, without and with REGO; None where it prints nothing.
PRINTED = {
    "detr_star_r50_50ep": (39.3, 42.3),
    "detr_star_dc5_r50_50ep": (41.3, 44.0),
    "conditional_detr_r50_50ep": (40.9, None),
    "deformable_detr_r50_36ep": (42.7, 44.8),
    "deformable_detr_r50_36ep_drop15": (None, None),
    "deformable_detr_r50_36ep_drop20": (None, None),
    "deformable_detr_r50_50ep": (43.8, 45.9),
    "deformable_detr_r50_50ep_batch32": (None, None),
    "deformable_detr_r50_50ep_faithful": (None, None),
    "deformable_detr_two_stage_r50_50ep": (46.4, 47.6),
    "deformable_detr_two_stage_r50_50ep_batch32": (None, None),
    "deformable_detr_two_stage_r50_50ep_faithful": (None, None),
    "deformable_detr_two_stage_r101_50ep": (47.2, 48.5),
    "deformable_detr_two_stage_x101_36ep": (None, 48.1),
    "deformable_detr_two_stage_x101_50ep": (47.7, 49.1),
}
# Table 1 without REGO; the README of the released code; Table 2, section 5.3, Table 3.
ALONE = {
    "fcos_r50_36ep": 41.0,
    "faster_rcnn_r50_36ep": 40.2,
    "faster_rcnn_r101_36ep": 42.0,
    "mask_rcnn_x101_36ep": 44.5,
    "cascade_mask_rcnn_x101_36ep": 46.6,
    "tsp_rcnn_r50_96ep": 45.0,
    "efficient_detr_r50_36ep": 44.2,
    "up_detr_r50_300ep": 42.8,
    "sparse_rcnn_r50_36ep": 44.5,
    "detr_r50_500ep": 42.0,
    "detr_dc5_r50_500ep": 43.3,
    "anchor_detr_dc5_r50_50ep": 44.2,
    "smca_r50_50ep": 43.7,
    "smca_r101_50ep": 44.4,
    "rego_deformable_detr_r50_50ep_released": 46.3,
    "rego_deformable_detr_two_stage_r50_50ep_released": 47.9,
    "rego_deformable_detr_r50_50ep_1_stage": 45.1,
    "rego_deformable_detr_r50_50ep_2_stages": 45.6,
    "rego_deformable_detr_r50_50ep_4_stages": 45.9,
    "rego_deformable_detr_r50_50ep_alpha_1": 45.3,
    "rego_deformable_detr_r50_50ep_glimpses_1.5": 45.8,
    "rego_deformable_detr_r50_50ep_glimpses_2": 45.7,
}


def trained_with(words: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> RunConfig:
    """The configuration that a command hands to training."""
    (folder / "metrics.jsonl").touch()
    seen = []
    monkeypatch.setattr(regolite, "train", lambda config: seen.append(config) or folder)
    assert main(words) == 0
    [config] = seen
    return config


def outline(preset: str, **overrides: object) -> torch.nn.Module:
    with torch.device("meta"):
        return regolite.build(preset, **overrides | {"weights": None})


def held_bytes(model: torch.nn.Module, *inputs: object) -> int:
    """Bytes that autograd keeps for the backward pass of a forward pass with numbers, without the weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for storage in held.values())


class TestRecipes:
    def test_are_the_papers_with_its_ap(self):
        assert {name: RECIPES[name].published_ap for name in RECIPES} == ALONE | {
            f"{rego}{name}": ap for name, both in PRINTED.items() for rego, ap in zip(("", "rego_"), both)
        }

    def test_hold_every_row_of_table_1(self):
        assert set(TABLE_1) <= {name.rsplit("_", 1)[0] for name in RECIPES}

    def test_start_from_imagenet(self):
        """Two presets of torchvision have weights trained on COCO."""
        for name, one in RECIPES.items():
            assert configure(one.model, **parse_overrides(one.overrides)).detector.weights == "imagenet", name
        changed = {one.model for one in RECIPES.values() if "weights=imagenet" in one.overrides}
        assert changed == {"fcos_r50", "faster_rcnn_r50"}

    @pytest.mark.parametrize("name", [n for n, one in RECIPES.items() if one.overrides and not n.endswith("ep")])
    def test_overrides_change_the_model_and_nothing_else(self, name: str):
        """Every override names a field, and the settings beside them are those of the row that they vary."""
        one = recipe(name)
        plain = recipe(f"{one.model}_{one.epochs}ep")
        beside = {k: v for k, v in plain.settings().items() if k != "overrides"}
        assert one.settings() == beside | {"overrides": one.overrides}
        changed, own = (configure(one.model, **parse_overrides(r.overrides)) for r in (one, plain))
        assert changed != own and replace(changed, detector=own.detector, rego=own.rego, loss=own.loss) == own

    def test_forms_are_what_their_names_say(self):
        def model(name: str) -> ModelConfig:
            return configure(recipe(name).model, **parse_overrides(recipe(name).overrides))

        for name in ("rego_deformable_detr_r50_50ep", "rego_deformable_detr_two_stage_r50_50ep"):
            released, faithful, own = (model(name + suffix) for suffix in ("_released", "_faithful", ""))
            assert released.rego.form == "released" and faithful.rego == own.rego and own.rego.form == "paper"
            assert released.loss.base_matches == "last_stage" and faithful.loss == own.loss == LossConfig()
            assert (released.detector.mask_padding, faithful.detector.mask_padding) == (False, False)
            assert own.detector.mask_padding
        ratios = {
            name[len("rego_deformable_detr_r50_50ep_") :]: model(name).rego.ratios for name in ALONE if "50ep_" in name
        }
        assert ratios["1_stage"] == (1,) and ratios["2_stages"] == (2, 1) and ratios["4_stages"] == (4, 3, 2, 1)
        assert ratios["alpha_1"] == (1, 1, 1) and ratios["glimpses_2"] == (6, 4, 2)
        assert ratios["glimpses_1.5"] == (4.5, 3, 1.5)

    @every_recipe
    def test_make_a_run_and_its_model(self, name: str):
        one = recipe(name)
        config = one.config("COCO", "runs/r")
        assert (config.data, config.output, config.model) == ("COCO", "runs/r", one.model)
        assert {k: getattr(config, k) for k in one.settings()} == one.settings()
        assert one.model in presets() and name.startswith(f"{one.model}_{one.epochs}ep")
        overrides = parse_overrides(config.overrides)
        assert sum(p.numel() for p in outline(config.model, **overrides).parameters()) > 30e6

    def test_decide_all_that_changes_the_result(self):
        machine = {
            "data",
            "output",
            "workers",
            "device",
            "precision",
            "processes",
            "accumulate",
            "activation_checkpointing",
            "resume",
        }
        machine |= {"checkpoint_minutes", "keep_checkpoints", "on_broken"}
        watching = {"evaluate_every", "evaluate_start", "evaluate_train", "log_every", "tensorboard", "seed"}
        decided = set(recipe("deformable_detr_r50_50ep").settings())
        every = {f.name for f in fields(RunConfig)}
        assert decided == every - machine - watching, "a field came or went: is it the recipe's or the machine's?"

    @every_recipe
    def test_drop_inside_the_run_and_by_ten(self, name: str):
        config = recipe(name).config("COCO", "r")
        assert config.drop_epochs and all(0 < drop < config.epochs for drop in config.drop_epochs)
        factors = [lr_factor(config, epoch, epoch / config.epochs) for epoch in range(config.epochs)]
        wanted = [0.1 ** sum(epoch >= drop for drop in config.drop_epochs) for epoch in range(config.epochs)]
        wanted[0] = FIRST if config.warmup else 1.0
        assert factors == pytest.approx(wanted) and factors[-1] <= 0.1

    @pytest.mark.parametrize("name", PRINTED)
    def test_with_and_without_rego_differ_in_the_model_alone(self, name: str):
        base, rego = recipe(name), recipe(f"rego_{name}")
        assert rego.model == f"rego_{base.model}" and rego.remarks == base.remarks
        changed = {"name": rego.name, "model": rego.model, "published_ap": rego.published_ap}
        assert replace(base, **changed) == rego
        assert rego.settings() | {"model": base.model} == base.settings()
        one, other = configure(base.model), configure(rego.model)
        assert one.rego is None and other.rego is not None
        assert replace(other, preset=one.preset, rego=None) == one and rego.overrides == base.overrides

    def test_rates_are_those_of_the_original_codes(self):
        def rates(name: str) -> dict[str, float]:
            config = recipe(name).config("COCO", "r")
            return {g["name"]: round(g["lr"], 12) for g in parameter_groups(outline(config.model), config)}

        for name in ("deformable_detr_r50_50ep", "rego_deformable_detr_two_stage_r50_50ep"):
            assert rates(name) == {"backbone": 1e-5, "sampling": 1e-5, "rest": 1e-4}
            assert rates(f"{name}_batch32") == {"backbone": 2e-5, "sampling": 2e-5, "rest": 2e-4}
        # DETR's and Conditional DETR's codes slow nothing but the backbone: reference points learn like the rest.
        assert rates("sparse_rcnn_r50_36ep") == {"backbone": 2.5e-5, "rest": 2.5e-5}
        for name in ("detr_star_r50_50ep", "rego_detr_star_dc5_r50_50ep", "conditional_detr_r50_50ep", "smca_r50_50ep"):
            assert rates(name).pop("sampling", 1e-4) == 1e-4 and rates(name)["backbone"] == 1e-5

    def test_sgd_is_for_those_who_used_it(self):
        """Settings of detectron2, AdelaiDet and mmdetection; the warm-up there is a number of steps."""
        rates, steps = {}, {}
        for name, one in RECIPES.items():
            config = one.config("COCO", "r")
            if one.optimizer == "sgd":
                optimizer = make_optimizer(outline(one.model), config)
                assert isinstance(optimizer, torch.optim.SGD)
                rates[name] = {(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups}
                assert not config.clip and config.batch_size == 16
            if config.warmup:
                steps[name] = round(config.warmup * config.epochs * IMAGES / config.batch_size, -1)
        assert rates == {
            "fcos_r50_36ep": {(0.01, 0.9, 1e-4)},
            "faster_rcnn_r50_36ep": {(0.02, 0.9, 1e-4)},
            "faster_rcnn_r101_36ep": {(0.02, 0.9, 1e-4)},
            "mask_rcnn_x101_36ep": {(0.02, 0.9, 1e-4)},
            "cascade_mask_rcnn_x101_36ep": {(0.02, 0.9, 1e-4)},
        }
        by_mmdetection = {"mask_rcnn_x101_36ep", "cascade_mask_rcnn_x101_36ep"}
        assert steps == {name: 500 if name in by_mmdetection else 1000 for name in [*rates, "tsp_rcnn_r50_96ep"]}

    @every_recipe
    def test_images_are_the_presets_own(self, name: str):
        one, model = recipe(name), configure(recipe(name).model)
        assert isinstance(model, ModelConfig)
        assert (one.augment, one.image_size) == (model.augment, model.image_size) == ("detr", 800)

    def test_cannot_be_changed(self):
        with pytest.raises(FrozenInstanceError):
            recipe("deformable_detr_r50_50ep").lr = 1.0

    def test_take_other_fields_first(self):
        config = recipe("rego_deformable_detr_r50_36ep").config("d", "o", lr=2e-4, batch_size=32)
        assert (config.lr, config.batch_size, config.drop_epochs) == (2e-4, 32, (30,))
        with pytest.raises(UserError, match="unknown parameter 'epohcs'; did you mean 'epochs'"):
            recipe("rego_deformable_detr_r50_36ep").config("d", "o", epohcs=3)

    def test_unknown_ones_are_named(self):
        with pytest.raises(UserError, match="did you mean 'deformable_detr_r50_50ep'.*recipes` lists"):
            recipe("deformable_detr_r50_50")


class TestCommands:
    @every_recipe
    def test_give_the_run_of_the_recipe(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        program, option, package, *words = shlex.split(recipe(name).command("my data/coco", 4, workers=2))
        assert (program, option, package) == ("python", "-m", "regolite")
        own = {"processes": 4, "workers": 2, "resume": True}
        wanted = recipe(name).config("my data/coco", f"runs/{name}", **own)
        assert trained_with(words, monkeypatch, tmp_path) == wanted

    @pytest.mark.parametrize("order", ["{recipe} {own}", "{own} {recipe}"])
    def test_options_go_before_the_recipe(self, order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        own = "--epochs 2 --drop-epochs 1 --model deformable_detr_tiny --image-size 128"
        words = order.format(recipe="--recipe deformable_detr_r50_36ep", own=own)
        config = trained_with(f"train --data d --output o {words}".split(), monkeypatch, tmp_path)
        wanted = recipe("deformable_detr_r50_36ep").config(
            "d", "o", epochs=2, drop_epochs=(1,), model="deformable_detr_tiny", image_size=128
        )
        assert config == wanted

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("train --recipe deformable_detr_r50_50ep --output o", "required: --data "),
            ("train --data d --output o", "required: --model "),
            ("train --data d --output o --recipe deformable_detr_r50_5ep", "did you mean 'deformable_detr_r50_50ep'?"),
            ("recipes rego_deformable_r50_50ep", "did you mean 'rego_deformable_detr_r50_50ep'?"),
            ("recipes deformable_detr_r50_50ep --tflops 0", "tflops=0.0 must be greater than 0"),
            ("recipes deformable_detr_r50_50ep --processes 0", "'0' is not a whole number greater than 0"),
            ("recipes deformable_detr_r50_50ep --processes 17", "has 16 images per step"),
        ],
    )
    def test_wrong_input_is_one_line(self, words: str, said: str, capsys: pytest.CaptureFixture[str]):
        assert main(words.split()) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line

    def test_a_recipe_as_json_is_what_papermill_takes(self, capsys: pytest.CaptureFixture[str]):
        assert main(["recipes", "rego_detr_star_r50_50ep", "--json"]) == 0
        told = yaml.safe_load(capsys.readouterr().out)  # papermill's -f reads YAML, in which 1e-05 would be a text
        one = recipe("rego_detr_star_r50_50ep")
        assert RunConfig.of({**told, "data": "d", "output": "o"}) == one.config("d", "o")
        assert set(told) == set(one.settings())

    def test_a_rehearsal_leaves_nothing_in_the_notebook(self):
        """Whatever notebook 20 rehearses with is replaced by the recipe, or is no part of the result."""
        import nbformat

        cells = nbformat.read(ROOT / "notebooks" / "20_train_coco.ipynb", as_version=4).cells
        [source] = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        rehearsal: dict[str, object] = {}
        exec("from typing import Optional\n" + source, {}, rehearsal)
        rehearsal.pop("Optional")
        rehearsal.pop("__annotations__", None)
        one = recipe("rego_deformable_detr_r50_50ep")
        left = RunConfig.of({**rehearsal, **one.settings(), "data": "d", "output": "o"})
        wanted = asdict(one.config("d", "o"))
        differ = {name for name, value in asdict(left).items() if value != wanted[name]}
        assert differ <= {"evaluate_every", "evaluate_start", "evaluate_train", "log_every"}


class TestTable:
    def test_is_stable_text(self):
        found = [
            {
                "recipe": "a",
                "published_ap": 45.9,
                "estimated_gpu_hours": 340.0,
                "estimated_gigabytes_a_gpu": 14.0,
                "command": "python -m regolite train --recipe a",
                "remarks": ["first", "second"],
            },
            {
                "recipe": "b",
                "published_ap": None,
                "estimated_gpu_hours": 1200.0,
                "estimated_gigabytes_a_gpu": 2.6,
                "command": "python -m regolite train --recipe b",
                "remarks": ["second"],
            },
        ]
        assert as_text(found, ["Said."]).splitlines() == [
            "    AP   GPU hours    GB a GPU  notes       command",
            " paper   estimated   estimated",
            "  45.9        ~340         ~14  [1] [2]     python -m regolite train --recipe a",
            "     -       ~1200        ~2.6  [2]         python -m regolite train --recipe b",
            "",
            "Said.",
            "[1] first",
            "[2] second",
        ]

    def test_one_command_a_row(self, capsys: pytest.CaptureFixture[str]):
        assert main(["recipes", "deformable_detr_r50_50ep", "--data", "coco", "--processes", "4"]) == 0
        text = capsys.readouterr().out
        command = recipe("deformable_detr_r50_50ep").command("coco", 4)
        [row] = [line for line in text.splitlines() if command in line]
        assert re.fullmatch(r" +43\.8 +~\d+ +~\d+  \[1\] \[2\] +" + re.escape(command), row)
        assert "estimate" in text and "nothing was measured" in text
        assert main(["recipes", "deformable_detr_r50_50ep", "--data", "coco", "--processes", "4"]) == 0
        assert capsys.readouterr().out == text

    def test_as_json(self, capsys: pytest.CaptureFixture[str]):
        found = rows([recipe("deformable_detr_r50_36ep")])
        assert json.loads(json.dumps(found)) == found
        assert found[0]["estimated_gpu_hours"] == float(f"{found[0]['estimated_gpu_hours']:.2g}")

    def test_says_which_assumptions_are_whose(self):
        assert "3.25 TFLOP/s per GPU, the throughput of a V100" in " ".join(assumptions())
        given = " ".join(assumptions(4, 20.0))
        assert "20 TFLOP/s per GPU, as given" in given and "V100" not in given and "(4 GPUs)" in given

    def test_numbers_in_the_notes_are_those_of_the_code(self):
        """Sentences that hold numbers, beside what they are about."""
        said = " ".join(assumptions()) + " ".join(r for one in RECIPES.values() for r in one.remarks)
        for text in (f"{IMAGES:,} images", f"{MEAN_IMAGE[0]} x {MEAN_IMAGE[1]}", f"{V100_HOURS} GPU hours"):
            assert text in said
        assert f"{LARGEST_IMAGE[0]} x {LARGEST_IMAGE[1]} pixels" in said
        hours = {name: estimate(name, 1, 2).gpu_hours for name in ("detr_r50", "detr_dc5_r50")}
        assert f"DETR-R50 takes {hours['detr_r50']:.1f} GPU hours per epoch" in said
        assert f"{hours['detr_dc5_r50']:.1f} GPU hours per epoch for DETR-DC5" in said

    @pytest.mark.slow
    def test_whole(self):
        process = Forked(REGOLITE, "recipes", "--data", "coco")
        said, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        for one in RECIPES.values():
            assert said.count(one.command("coco") + "\n") == 1
        wide = [line for line in said.splitlines() if "--recipe" not in line and len(line) > 112]
        assert not wide


class TestEstimates:
    def test_calibration(self):
        """Deformable DETR's authors print 325 GPU hours for 50 epochs, and 340 for the two-stage model."""
        assert estimate("deformable_detr_r50", 50, 2).gpu_hours == pytest.approx(50 * V100_HOURS, rel=0.02)
        assert estimate("deformable_detr_two_stage_r50", 50, 2).gpu_hours == pytest.approx(340, rel=0.05)

    def test_hours_grow_with_what_they_must(self):
        base = estimate("deformable_detr_r50", 36, 2)
        assert estimate("deformable_detr_r50", 72, 2).gpu_hours == pytest.approx(2 * base.gpu_hours)
        assert estimate("deformable_detr_r50", 36, 2, 2 * TFLOPS).gpu_hours == pytest.approx(base.gpu_hours / 2)
        assert estimate("deformable_detr_r50", 36, 4).gpu_hours == base.gpu_hours
        two_stage = "deformable_detr_two_stage_r50"
        chain = ["detr_r50", "deformable_detr_r50", two_stage, f"rego_{two_stage}"]
        hours = [estimate(name, 36, 2).gpu_hours for name in chain]
        assert hours == sorted(hours) and len(set(hours)) == len(chain)
        assert base.image_tflop * IMAGES * 36 / TFLOPS / 3600 == pytest.approx(base.gpu_hours)

    def test_memory_grows_with_what_it_must(self):
        def gigabytes(name: str, images: int) -> float:
            return estimate(name, 50, images).gigabytes

        rego = "rego_deformable_detr_two_stage_r50"
        one, two, four = (gigabytes(rego, n) for n in (1, 2, 4))
        assert four - two == pytest.approx(2 * (two - one)) and two > one
        weights = 2 * one - two
        parameters = sum(p.numel() for p in outline(rego).parameters())
        assert 15 * parameters < 1e9 * weights < 16 * parameters  # the stem and the first stage are frozen
        assert gigabytes("detr_r50", 2) < gigabytes("deformable_detr_r50", 2) < two
        assert estimate(rego, 1, 2).gigabytes == two, "epochs cost no memory"

    def test_sgd_keeps_one_tensor_less_than_adamw(self):
        model = "faster_rcnn_r50"
        trained = sum(p.numel() for p in outline(model).parameters() if p.requires_grad)
        for gigabytes in (
            lambda o: estimate(model, 1, 2, optimizer=o).gigabytes,
            lambda o: step_gigabytes(model, (2,), (), o)[0],
        ):
            assert 1e9 * (gigabytes("adamw") - gigabytes("sgd")) == pytest.approx(4 * trained)
        assert recipe("faster_rcnn_r50_36ep").estimate().gigabytes == estimate(model, 36, 2, optimizer="sgd").gigabytes

    @pytest.mark.parametrize("name", ["mask_rcnn_x101", "cascade_mask_rcnn_x101"])
    def test_masks_that_are_not_trained_take_no_time(self, name: str):
        both = estimate(name, 1, 2).image_tflop, 3 * count(outline(name), *MEAN_IMAGE).flops / 1e12
        assert 0.5 * both[1] < both[0] < 0.9 * both[1]

    @pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_mask_rcnn"])
    def test_memory_of_a_baseline_is_that_of_its_training_but_roi_align_and_loss(self, kind: str):
        """With random weights hardly a proposal is suppressed, so that every head trains on 512 boxes."""
        size = (256, 320)
        image = ImageBatch(torch.rand(1, 3, *size), torch.zeros(1, *size).bool(), torch.tensor([size]))
        target = Target(torch.zeros(1, dtype=torch.long), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), 0, size)
        held = held_bytes(regolite.build(f"{kind}_tiny", weights=None).train(), image, [target])
        assert kept_bytes(outline(f"{kind}_tiny").train(), *size) == pytest.approx(held, rel=0.1)

    def test_a_batch_is_divided_among_processes(self):
        one = recipe("deformable_detr_r50_50ep")
        assert one.estimate(8) == estimate(one.model, 50, 2) and one.estimate(3) == estimate(one.model, 50, 6)
        assert one.estimate(16).gigabytes < one.estimate(8).gigabytes

    @pytest.mark.parametrize("name", ["rego_deformable_detr_tiny", "rego_detr_tiny"])
    def test_memory_is_what_a_real_forward_pass_keeps(self, name: str):
        """Counted on ``meta``, and held by PyTorch's autograd in a forward pass with numbers.

        The two differ in what embedding_bag keeps of a glimpse's indices; a GPU keeps what ``meta`` says.
        """
        height, width = 256, 320
        counted = kept_bytes(outline(name).train(), height, width)
        pixels = torch.zeros(1, 3, height, width)
        image = ImageBatch(pixels, torch.zeros(1, height, width).bool(), torch.tensor([[height, width]]))
        held = held_bytes(regolite.build(name, weights=None).train(), image)
        assert counted == pytest.approx(held, rel=0.05)

    @pytest.mark.parametrize(
        "name", ["rego_deformable_detr_tiny", "rego_smca_tiny", "rego_deformable_detr_everyday", "fcos_tiny"]
    )
    def test_a_step_needs_a_little_more_than_what_it_keeps(self, name: str):
        """At the peak it also holds the loss, and what the first gradients are made with."""
        model = outline(name).train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        one, two, three = (step_bytes(model, images, 256, 320) for images in (1, 2, 3))
        assert three - two == pytest.approx(two - one, rel=0.05), "grows by the image, nearly evenly"
        assert one > 16 * trained + kept_bytes(model, 256, 320)
        assert two - one < 1.5 * kept_bytes(model, 256, 320)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("name", ["detr_tiny", "rego_deformable_detr_tiny"])
    def test_the_peak_of_a_step_is_what_tensors_with_numbers_need(self, name: str):
        """The same counter on a CPU, where a step computes: the backward pass makes and releases the same tensors."""
        height, width = 128, 160
        peaks = []
        for device in ("meta", "cpu"):
            with torch.device(device):
                model = regolite.build(name, weights=None).train()
                pixels = torch.zeros(1, 3, height, width)
                image = ImageBatch(pixels, pixels[:, 0].bool(), torch.full((1, 2), 100))
            weights = list(model.parameters())
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            with Peak([*weights, *(w.grad for w in weights), *model.buffers()]) as peak, FusedAttention():
                output = model(image)
                sum(p.logits.sum() + p.boxes.sum() for p in (*output.layers, *output.by_stage)).backward()
            peaks.append(peak.most)
        assert peaks[0] == pytest.approx(peaks[1], rel=0.1)

    def test_memory_is_a_table(self, capsys: pytest.CaptureFixture[str]):
        assert main(["recipes", "detr_r50_500ep", "--memory"]) == 0
        title, row, *note = capsys.readouterr().out.splitlines()
        assert title.endswith("images a GPU")
        name, one, two, four = row.split()
        assert name == "detr_r50" and float(four) - float(two) == pytest.approx(2 * (float(two) - float(one)), abs=0.2)
        assert "Estimated, not measured" in " ".join(note)
        assert main(["recipes", "detr_r50_500ep", "--memory", "--json"]) == 0
        [found] = json.loads(capsys.readouterr().out)
        assert found["estimated_gigabytes_a_gpu"] == {"1": float(one), "2": float(two), "4": float(four)}

    @pytest.mark.parametrize("name", ["detr_r50", "rego_detr_star_r50"])
    def test_the_book_has_the_memory_of_every_model(self, name: str):
        text = (ROOT / "book" / "docs" / "full-coco.md").read_text("utf-8")
        rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)}
        assert set(rows) == {one.model for one in RECIPES.values()}
        assert [float(size) for size in rows[name]] == [round(size, 1) for size in step_gigabytes(name)]

    def test_fused_attention_keeps_no_map(self):
        """Four times the tokens: four times the memory, and not sixteen times."""
        small, large = (kept_bytes(outline("detr_tiny", dropout=0.1).train(), n, n) for n in (512, 1024))
        assert large < 4.5 * small

    def test_the_mean_image_is_what_the_recipe_makes(self):
        whole = make_transform("detr", 800, train=True)
        geometry = v2.Compose(whole.transforms[:-1])  # without the step from an image to pixels
        data, areas = open_data(ROOT / "data" / "coco_tiny", "train"), []
        torch.manual_seed(0)
        for i in [*range(len(data))] * 2:
            height, width = data.size(i)
            box = tv_tensors.BoundingBoxes([[0.0, 0.0, width, height]], format="XYXY", canvas_size=(height, width))
            made, _ = geometry(Image.new("L", (width, height)), {"boxes": box, "labels": torch.zeros(1).long()})
            areas.append(made.height * made.width)
        assert sum(areas) / len(areas) == pytest.approx(MEAN_IMAGE[0] * MEAN_IMAGE[1], rel=0.05)
        assert max(areas) <= LARGEST_IMAGE[0] * LARGEST_IMAGE[1]


def test_make_prints_the_same_command():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    [tasks] = re.findall(r"^TASKS = (.*)$", makefile, re.MULTILINE)
    assert "coco-table1" in tasks.split()
    done = subprocess.run(
        [sys.executable, "tasks.py", "coco-table1", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "estimates" in done.stdout
