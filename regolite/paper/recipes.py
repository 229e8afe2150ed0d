"""The paper's trainings by name: a preset and what :class:`RunConfig` needs to train it as section 5.1 says.

The paper says little: *the original settings of the released codes*, 118k images, 50 or 36 epochs. The rest was read
off the code that it builds on; where neither says a thing, a remark of the recipe says what was chosen and why.
``python -m regolite recipes`` lists all of them, with the commands, and ``train --recipe NAME`` takes one.
"""

from __future__ import annotations

import difflib
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from regolite.errors import UserError
from regolite.paper.estimates import TFLOPS, V100_HOURS, Estimate, estimate
from regolite.paper.table1 import PUBLISHED
from regolite.training.config import RunConfig
from regolite.utils.progress import track

_DROP_36 = (
    "The paper does not say where its 36-epoch runs drop the learning rate, and the released code's default, 40, comes "
    "after their end. 30 is the latest drop of Figure 3, and nearest to the four fifths at which 50 epochs drop it."
)
_FIGURE_3 = (
    "A curve of Figure 3, for REGO only (its drop at 30 is the recipe of 36 epochs without a suffix). The text prints "
    "no AP for it and does not say how long it ran: 36 epochs here."
)
_RETRAINED = (
    "The authors' README says 46.3, and 47.9 with two stages, after training again; for Deformable DETR's 43.8 its own "
    "authors' README says 44.5, and 46.9 with two stages, with a learning rate of 2e-4 and 32 images a step."
)
_RESIZES = (
    "Before they crop, the released code of REGO resizes to 400, 500, 600, 700 or 750 pixels; DETR's and Deformable "
    "DETR's, and the recipe here, to 400, 500 or 600."
)
_STAR = (
    "No code of DETR* was released. The settings are those of DETR's code, in which nothing but the backbone learns "
    "more slowly, with the drop at 40 of the 50-epoch recipes that the paper cites for it."
)
_DC5 = (
    "Expect more hours: by this estimate DETR-DC5 takes 6.3 GPU hours an epoch, and in Deformable DETR's README it "
    "takes 14.0. Dense attention over many tokens is slower than its multiply-adds say."
)
_CONDITIONAL = "The settings of Conditional DETR's released code. REGO on it is not in the paper."
_X101_36 = (
    "Section 5.2 does not say whether its 36 epochs with X101 are of the two-stage model; every X101 in Table 1 is."
)


@dataclass(frozen=True)
class Recipe:
    """One training of the paper. The fields from ``model`` on that :class:`RunConfig` has too are what it decides.

    Attributes:
        name: preset and epochs, and the drop where there are several.
        published_ap: AP on val2017 as the paper prints it, in percent; None where it prints none.
        remarks: what the paper leaves open, and where others differ.
        model: name of the preset.
        epochs: as the paper prints them.
        drop_epochs: where the learning rate is divided by ten.
        batch_size: images per step. The paper does not say; the released code takes 1 a GPU and a learning rate that
            is half of Deformable DETR's, which goes with 32: hence 16, as Conditional DETR has (2 on each of 8 GPUs).
        lr: learning rate, default of the released code.
        backbone_lr_mult: factor of the backbone.
        sampling_lr_mult: factor of sampling offsets and reference points; 1 where the original code has no such factor.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        schedule: constant between the drops.
        warmup: none.
        ema: none.
        augment: DETR's recipe: flip, resize, crop.
        image_size: shorter side in evaluation; in training 480 to this.
    """

    name: str
    published_ap: float | None
    remarks: tuple[str, ...]
    model: str
    epochs: int
    drop_epochs: tuple[int, ...]
    batch_size: int = 16
    lr: float = 1e-4
    backbone_lr_mult: float = 0.1
    sampling_lr_mult: float = 0.1
    weight_decay: float = 1e-4
    clip: float = 0.1
    schedule: Literal["step"] = "step"
    warmup: float = 0.0
    ema: float = 0.0
    augment: Literal["detr"] = "detr"
    image_size: int = 800

    def settings(self) -> dict[str, Any]:
        """What it decides, as fields of :class:`RunConfig`: all images, to the end of the last epoch."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ABOUT}
        unlimited = {"limit_images": None, "max_minutes": None, "max_cpu_minutes": None}
        return (
            own
            | {"overrides": (), "checkpoint": None, "copy_paste": 0.0, "repeat_rare": 0.0, "patience": 0}
            | unlimited
        )

    def config(self, data: str, output: str, **own: Any) -> RunConfig:
        """The configuration of a run.

        Args:
            data: folder of COCO.
            output: folder of the run.
            **own: other fields, which go before those of the recipe.

        Raises:
            UserError: as :meth:`RunConfig.of`.
        """
        return RunConfig.of({**self.settings(), "data": data, "output": output, **own})

    def command(self, data: str = "COCO", processes: int = 8, workers: int = 4) -> str:
        """The command that trains it, and that goes on with it after an interruption.

        Args:
            data: folder of COCO.
            processes: how many to start, one a GPU.
            workers: how many prepare images for each.
        """
        words = ["python", "-m", "regolite", "train", "--recipe", self.name, "--data", data]
        words += ["--output", f"runs/{self.name}", "--processes", str(processes), "--workers", str(workers), "--resume"]
        return shlex.join(words)

    def estimate(self, processes: int = 8, tflops: float = TFLOPS) -> Estimate:
        """GPU hours and memory of a GPU, see :mod:`regolite.paper.estimates`.

        Args:
            processes: among how many GPUs a batch is divided.
            tflops: what one of them sustains.
        """
        return estimate(self.model, self.epochs, -(-self.batch_size // processes), tflops)


_ABOUT = ("name", "published_ap", "remarks")


def _recipes() -> dict[str, Recipe]:
    found = {}

    def pair(base: str, epochs: int, drop: int, *remarks: str, suffix: str = "", **changes: Any) -> None:
        """A base detector and REGO on it, trained alike."""
        for model in (base, f"rego_{base}"):
            name = f"{model}_{epochs}ep{suffix}"
            printed = () if suffix else PUBLISHED.get(model, ())  # Figure 3 has no numbers
            ap = next((row.figures["AP"] for row in printed if row.epochs == epochs), None)
            found[name] = Recipe(name, ap, remarks, model, epochs, (drop,), **changes)

    pair("detr_star_r50", 50, 40, _STAR, sampling_lr_mult=1.0)
    pair("detr_star_dc5_r50", 50, 40, _STAR, _DC5, sampling_lr_mult=1.0)
    pair("conditional_detr_r50", 50, 40, _CONDITIONAL, sampling_lr_mult=1.0)
    pair("deformable_detr_r50", 36, 30, _DROP_36, _RESIZES)
    for drop in (15, 20):
        pair("deformable_detr_r50", 36, drop, _FIGURE_3, _RESIZES, suffix=f"_drop{drop}")
    pair("deformable_detr_r50", 50, 40, _RETRAINED, _RESIZES)
    pair("deformable_detr_two_stage_r50", 50, 40, _RETRAINED, _RESIZES)
    pair("deformable_detr_two_stage_r101", 50, 40, _RESIZES)
    pair("deformable_detr_two_stage_x101", 36, 30, _X101_36, _DROP_36, _RESIZES)
    pair("deformable_detr_two_stage_x101", 50, 40, _RESIZES)
    return found


RECIPES = _recipes()
"""All recipes by name, in the order of Table 1."""


def recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UserError: for an unknown name; the message names the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown recipe {name!r}; {hint}`python -m regolite recipes` lists them")
    return RECIPES[name]


# ------------------------------------------------------------------------------------------------------- the table


def rows(
    chosen: Sequence[Recipe],
    data: str = "COCO",
    processes: int = 8,
    tflops: float = TFLOPS,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The paper's AP, estimates and command of some recipes.

    Args:
        chosen: which.
        data: folder of COCO.
        processes: how many to start, one a GPU.
        tflops: what a GPU sustains.
        progress: show how far the counting is.

    Raises:
        UserError: when ``processes`` or ``tflops`` is not greater than 0, or a batch has no image for each process.
    """
    for name, value in (("processes", processes), ("tflops", tflops)):
        if value <= 0:
            raise UserError(f"{name}={value} must be greater than 0")
    found = []
    for one in track(chosen, "counting", progress):
        if processes > one.batch_size:
            raise UserError(f"processes={processes} are too many: {one.name} has {one.batch_size} images a step")
        guess = one.estimate(processes, tflops)
        found.append(
            {
                "recipe": one.name,
                "published_ap": one.published_ap,
                "estimated_gpu_hours": _rounded(guess.gpu_hours),
                "estimated_gigabytes_a_gpu": _rounded(guess.gigabytes),
                "estimated_tflop_a_image": round(guess.image_tflop, 3),
                "command": one.command(data, processes),
                "remarks": list(one.remarks),
            }
        )
    return found


def _rounded(number: float) -> float:
    """To two figures: an estimate has no more."""
    return float(f"{number:.2g}")


def assumptions(processes: int = 8, tflops: float = TFLOPS) -> list[str]:
    """What the estimates rest on, in sentences."""
    source = (
        f"which is what a V100 sustained in the {V100_HOURS} GPU hours that an epoch of Deformable DETR-R50 took its "
        "authors (their README); --tflops takes another GPU's. By the same reckoning DETR-R50 takes 3.1 GPU hours an "
        "epoch, and took its authors 3.7"
        if tflops == TFLOPS
        else "as given by --tflops"
    )
    return [
        "AP: as the paper prints it, on val2017; - where it prints none.",
        "Hours and GB are estimates; nothing was measured on a GPU.",
        "GPU hours (all GPUs together): epochs x 118,287 images x 3 (forward, and twice as much backward) x the "
        "operations of an image of 637 x 849 pixels, two for each multiply-add, which is the mean size that DETR's "
        f"recipe makes of the images in data/coco_tiny, at {tflops:g} TFLOP/s a GPU, {source}. "
        "Evaluation is left out.",
        f"GB a GPU: 16 bytes for each trained parameter (weight, gradient, AdamW's two means), and what the backward "
        f"pass keeps of a GPU's share of a batch ({processes} GPUs), each image 800 x 1344 pixels, the largest, in "
        "float32, attention as fused kernels do it. Workspaces and fragmentation come on top. "
        "--accumulate, --activation-checkpointing and --precision bf16 need less.",
        "All: AdamW, learning rate 1e-4, 1e-5 for the backbone, and for sampling offsets and reference points of "
        "Deformable DETR; weight decay 1e-4, gradients clipped at 0.1: defaults of the released codes. 16 images a "
        "step are inferred: the paper does not say, and the released code has 1 a GPU and half of Deformable DETR's "
        "learning rate, which goes with 32.",
    ]


def as_text(found: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The rows as a table for people, the commands last, and the notes below."""
    remarks = list(dict.fromkeys(remark for row in found for remark in row["remarks"]))  # each once
    line = "{:>6}{:>12}{:>12}  {:12}{}".format
    text = [line("AP", "GPU hours", "GB a GPU", "notes", "command"), line("paper", *["estimated"] * 2, "", "")]
    for row in found:
        ap, hours, size = (row[k] for k in ("published_ap", "estimated_gpu_hours", "estimated_gigabytes_a_gpu"))
        numbers = " ".join(f"[{remarks.index(remark) + 1}]" for remark in row["remarks"])
        text.append(line("-" if ap is None else f"{ap:.1f}", f"~{hours:g}", f"~{size:g}", numbers, row["command"]))
    below = [*notes, *(f"[{number}] {remark}" for number, remark in enumerate(remarks, 1))]
    below = [textwrap.fill(note, 112, subsequent_indent="    ", break_on_hyphens=False) for note in below]
    return "\n".join(one.rstrip() for one in [*text, "", *below])
