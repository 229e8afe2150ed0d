"""The paper's training recipes by name: a preset and the fields of :class:`RunConfig` as in section 5.1.

The paper gives few settings: *the original settings of the released codes*, 118k images, 50 or 36 epochs. The others
follow the code that it builds on; where neither gives a setting, a remark of the recipe explains our choice.
``python -m regolite recipes`` lists all recipes with their commands; ``train --recipe NAME`` runs one.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from regolite.errors import UserError, did_you_mean
from regolite.paper.estimates import LARGEST_IMAGE, TFLOPS, V100_HOURS, Estimate, estimate, step_gigabytes
from regolite.paper.table1 import PUBLISHED
from regolite.training.config import RunConfig
from regolite.utils.progress import track

_DROP_36 = (
    "The paper does not say where its 36-epoch runs drop the learning rate, and the released code's default, 40, is "
    "after their end. 30 is the latest drop in Figure 3, and the closest to four fifths, as with 50 epochs."
)
_FIGURE_3 = (
    "A curve of Figure 3, for REGO only (the drop at 30 is the 36-epoch recipe without a suffix). The text gives no AP "
    "and no length for it: 36 epochs here."
)
_RETRAINED = (
    "The authors' README reports 46.3, and 47.9 with two stages, after retraining. For Deformable DETR, 43.8 in the "
    "paper, its own authors' README reports 44.5, and 46.9 with two stages, with a learning rate of 2e-4 and 32 images "
    "per step."
)
_RESIZES = (
    "Before cropping, the released code of REGO resizes to 400, 500, 600, 700 or 750 pixels; DETR's and Deformable "
    "DETR's code, and this recipe, to 400, 500 or 600."
)
_STAR = (
    "No code of DETR* was released. The settings are those of DETR's code, where only the backbone has a lower "
    "learning rate, with the drop at 40 of the 50-epoch recipes that the paper cites for it. The model is our reading: "
    "DETR with 300 queries, a reference point for each and the focal loss, 41.6 M parameters, where the paper prints "
    "44 M, the figure of Conditional DETR."
)
_DC5 = (
    "Expect more hours: this estimate gives 6.3 GPU hours per epoch for DETR-DC5, Deformable DETR's README 14.0. Dense "
    "attention over many tokens is slower than its multiply-adds suggest."
)
_DETR = (
    "The long schedule of DETR's paper: 64 images per step (16 GPUs with 4 each), 500 epochs, drop at 400. It gives no "
    "batch size of its own for DC5."
)
_ANCHOR = (
    "The settings of Anchor DETR's released code: 8 GPUs with 1 image each. The paper does not combine it with REGO."
)
_SMCA = (
    "SMCA's released code trains a single-scale model, with 8 GPUs and 2 images each; the multi-scale model of Table 1 "
    "is built from the text of its paper and trained with the same settings. The paper does not combine it with REGO."
)
_RELEASED = (
    "REGO as in the authors' code (`form=released`, book/docs/paper-and-released-code.md). AP: 46.3, and 47.9 with two "
    "stages, are the figures of their README after retraining, and this is the only form that is known to have given "
    "them; the paper has 45.9 and 47.6. The default of their code is 1 image per GPU; the number of GPUs is not given."
)
_FAITHFUL = (
    "As the authors' codes, the backbone and the normalization of the maps read padding (`mask_padding=False`); the "
    "recipe without a suffix hides it, so that the boxes of an image do not depend on its batch."
)
_BATCH_32 = (
    "32 images per step at a learning rate of 2e-4, as Deformable DETR's authors ran it. Others report these attempts "
    "to reproduce its 44.5 (fundamentalvision/Deformable-DETR#8 and #14, learning rate unchanged): 43.5 with 8 x 2 "
    "images, 44.1 with 16 x 2, 44.3 with 32 x 1, 43.5 with 16 x 4."
)
_TABLE_2 = (
    "Table 2 and section 5.3: number of stages, and alpha 1, 1, 1. The paper does not say how long: 50 epochs here."
)
_TABLE_3 = (
    "Table 3: glimpses 1.5 and 2 times as large. The text gives 6, 3, 2 as twice 3, 2, 1; taken here as 6, 4, 2. The "
    "paper does not say how long: 50 epochs here."
)
_CONDITIONAL = "The settings of Conditional DETR's released code. The paper does not combine it with REGO."
_UP_DETR = (
    "The settings of UP-DETR's released code for fine-tuning: 8 GPUs with 2 images each, 300 epochs, drop at 200, half "
    "the learning rate for the backbone. The paper's AP starts from a transformer that was pre-trained on ImageNet "
    "without labels: give as --checkpoint the authors' pre-trained file, or that of a run of up_detr_pretraining_r50. "
    "Their README reports 43.1, and 42.1 for DETR without pre-training, both on a backbone that was trained without "
    "labels too (SwAV)."
)
_SPARSE = (
    "The settings of Sparse R-CNN's released code: 16 images per step (8 GPUs with 2 each), 270,000 steps, drops after "
    "210,000 and 250,000 of them, gradients clipped at 1, one learning rate for everything. Its warm-up of 1,000 steps "
    "is left out. Its README reports 45.0 AP and a noise of 0.3. The paper does not combine it with REGO."
)
_EFFICIENT = (
    "No code of Efficient DETR was released. The settings are Deformable DETR's, and the drop is that of the other "
    "36-epoch recipes. The paper begins training with more proposals and ends with 100; here there are 100 throughout."
)
_DETECTRON2 = (
    "The settings of detectron2's 3x schedule, whose figures Table 1 has: SGD, 16 images per step (8 GPUs with 2 "
    "each), a learning rate of 0.02 for everything, 270,000 steps, drops after 210,000 and 250,000 of them, a warm-up "
    "of 1,000 steps, no clipping. Expect fewer hours and more memory: its model zoo gives 0.209 s per step on 8 V100s, "
    "125 GPU hours, and 3.0 GB per GPU with R50; 0.286 s, 172 GPU hours and 4.1 GB with R101."
)
_FCOS = (
    "FCOS's learning rate, 0.01, with detectron2's 3x schedule: SGD, 16 images per step (8 GPUs with 2 each), 270,000 "
    "steps, drops after 210,000 and 250,000 of them, a warm-up of 1,000 steps, no clipping. The README of its authors' "
    "AdelaiDet has the same AP, 41.0, after 24 epochs."
)
_MMDETECTION = (
    "The settings of mmdetection's 3x schedule, whose figures Table 1 has: SGD, 16 images per step (8 GPUs with 2 "
    "each), a learning rate of 0.02 for everything, drops at 27 and 33, a warm-up of 500 steps, no clipping. It trains "
    "the scale and the shift of batch normalization, which are frozen here."
)
_NO_MASKS = (
    "Masks are not trained here, since targets have none. In the paper of Mask R-CNN, training them adds 0.9 to the AP "
    "of boxes."
)
_TORCHVISION = (
    "The original code resizes the shorter side to 640 to 800 pixels and does not crop; here it is resized and cropped "
    "as in DETR. Network, losses and ImageNet weights are torchvision's, and the warm-up begins at 0.04 of the "
    "learning rate, not at 0.001."
)
_TSP = (
    "TSP-RCNN's released code has 16 images per step (4 GPUs with 4 each) and a warm-up of 1,000 steps. It trains the "
    "transformer with AdamW (learning rate 1e-4, gradients clipped at 0.01), everything else with SGD (0.02). Here "
    "AdamW trains everything, and the backbone has a tenth of the learning rate, as in DETR. The released script runs "
    "for 36 epochs with drops at 24 and 32, scaled here to 96. It resizes the shorter side to 640 to 800 pixels and "
    "does not crop; here it is resized and cropped as in DETR."
)
_X101_36 = (
    "Section 5.2 does not say whether its 36 epochs with X101 are for the two-stage model; every X101 in Table 1 is "
    "one."
)


@dataclass(frozen=True)
class Recipe:
    """One training of the paper. Its fields from ``model`` on are fields of :class:`RunConfig`.

    Attributes:
        name: preset and epochs, and what differs if there are several.
        published_ap: AP on val2017 in the paper, in percent; None if not given. For ``_released``, that of the authors'
            README.
        remarks: what the paper leaves open, and where other sources differ.
        model: name of the preset.
        epochs: number of epochs in the paper.
        drop_epochs: epochs at which the learning rate is divided by ten.
        batch_size: images per step, which the paper does not give. The released code uses 1 per GPU and half the
            learning rate of Deformable DETR, which uses 32: hence 16, as Conditional DETR (2 on each of 8 GPUs).
        overrides: changes of the preset.
        optimizer: AdamW, as in the codes of all DETRs, or SGD with momentum 0.9.
        lr: learning rate, default of the released code.
        backbone_lr_mult: learning rate multiplier of the backbone.
        sampling_lr_mult: learning rate multiplier of sampling offsets and reference points; 1 if the original code has
            none.
        weight_decay: weight decay.
        clip: maximum gradient norm; 0 for no clipping.
        schedule: constant between the drops.
        warmup: fraction of the run in which the learning rate grows to its full value.
        ema: no moving average.
        augment: DETR's recipe: flip, resize, crop.
        image_size: shorter side in evaluation; 480 to this in training.
    """

    name: str
    published_ap: float | None
    remarks: tuple[str, ...]
    model: str
    epochs: int
    drop_epochs: tuple[int, ...]
    batch_size: int = 16
    overrides: tuple[str, ...] = ()
    optimizer: Literal["adamw", "sgd"] = "adamw"
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
        """The fields of :class:`RunConfig` that it sets, including no limit of images or time."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ABOUT}
        unlimited = {"limit_images": None, "max_minutes": None, "max_cpu_minutes": None}
        off = {"checkpoint": None, "copy_paste": 0.0, "repeat_rare": 0.0, "patience": 0}
        return own | off | unlimited

    def config(self, data: str, output: str, **own: Any) -> RunConfig:
        """The configuration of a run.

        Args:
            data: folder of COCO.
            output: folder of the run.
            **own: other fields, which override those of the recipe.

        Raises:
            UserError: as :meth:`RunConfig.of`.
        """
        return RunConfig.of({**self.settings(), "data": data, "output": output, **own})

    def command(self, data: str = "COCO", processes: int = 8, workers: int = 4) -> str:
        """The command that trains it, and resumes it after an interruption.

        Args:
            data: folder of COCO.
            processes: number of processes, one per GPU.
            workers: data loading workers per process.
        """
        words = ["python", "-m", "regolite", "train", "--recipe", self.name, "--data", data]
        words += ["--output", f"runs/{self.name}", "--processes", str(processes), "--workers", str(workers), "--resume"]
        return shlex.join(words)

    def estimate(self, processes: int = 8, tflops: float = TFLOPS) -> Estimate:
        """GPU hours and memory per GPU, see :mod:`regolite.paper.estimates`.

        Args:
            processes: number of GPUs that share a batch.
            tflops: sustained throughput of one GPU.
        """
        share = -(-self.batch_size // processes)
        return estimate(self.model, self.epochs, share, tflops, self.overrides, self.optimizer)


_ABOUT = ("name", "published_ap", "remarks")


def _recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}

    def add(model: str, epochs: int, drop: int, *remarks: str, suffix: str = "", **changes: Any) -> None:
        """One training; its AP is the paper's unless it has a suffix, or one is given."""
        published = () if suffix else PUBLISHED.get(model, ())
        ap = next((row.figures["AP"] for row in published if row.epochs == epochs), None)
        fields = {"published_ap": ap, "drop_epochs": (drop,), **changes}
        name = f"{model}_{epochs}ep{suffix}"
        found[name] = Recipe(name=name, remarks=remarks, model=model, epochs=epochs, **fields)

    def pair(base: str, epochs: int, drop: int, *remarks: str, **changes: Any) -> None:
        """A base detector and REGO on it, with the same settings."""
        for model in (base, f"rego_{base}"):
            add(model, epochs, drop, *remarks, **changes)

    imagenet = ("weights=imagenet",)  # where the preset has weights trained on COCO
    sgd: dict[str, Any] = {"optimizer": "sgd", "backbone_lr_mult": 1.0, "sampling_lr_mult": 1.0, "clip": 0.0}
    detectron2 = sgd | {"lr": 0.02, "drop_epochs": (28, 34), "warmup": 0.00376}  # 1,000 steps
    mmdetection = sgd | {"lr": 0.02, "drop_epochs": (27, 33), "warmup": 0.00188}  # 500 steps
    add("fcos_r50", 36, 28, _FCOS, _TORCHVISION, **detectron2 | {"lr": 0.01, "overrides": imagenet})
    own_norm = (*imagenet, "norm_eps=1e-5")  # 0 belongs to the weights trained on COCO
    add("faster_rcnn_r50", 36, 28, _DETECTRON2, _TORCHVISION, **detectron2, overrides=own_norm)
    add("faster_rcnn_r101", 36, 28, _DETECTRON2, _TORCHVISION, **detectron2)
    add("mask_rcnn_x101", 36, 27, _MMDETECTION, _NO_MASKS, _TORCHVISION, **mmdetection)
    add("tsp_rcnn_r50", 96, 64, _TSP, drop_epochs=(64, 85), warmup=0.00141)  # 1,000 steps
    add("efficient_detr_r50", 36, 30, _EFFICIENT)
    add("cascade_mask_rcnn_x101", 36, 27, _MMDETECTION, _NO_MASKS, _TORCHVISION, **mmdetection)
    sparse: dict[str, Any] = {"drop_epochs": (28, 34), "lr": 2.5e-5, "backbone_lr_mult": 1.0, "clip": 1.0}
    add("sparse_rcnn_r50", 36, 28, _SPARSE, **sparse)
    for name in ("detr_r50", "detr_dc5_r50"):
        dc5 = (_DC5,) * (name == "detr_dc5_r50")
        add(name, 500, 400, _DETR, *dc5, batch_size=64, sampling_lr_mult=1.0)
    add("up_detr_r50", 300, 200, _UP_DETR, backbone_lr_mult=0.5, sampling_lr_mult=1.0)
    pair("detr_star_r50", 50, 40, _STAR, sampling_lr_mult=1.0)
    pair("detr_star_dc5_r50", 50, 40, _STAR, _DC5, sampling_lr_mult=1.0)
    pair("conditional_detr_r50", 50, 40, _CONDITIONAL, sampling_lr_mult=1.0)
    add("anchor_detr_dc5_r50", 50, 40, _ANCHOR, batch_size=8, sampling_lr_mult=1.0)
    for name in ("smca_r50", "smca_r101"):
        add(name, 50, 40, _SMCA, sampling_lr_mult=1.0)
    pair("deformable_detr_r50", 36, 30, _DROP_36, _RESIZES)
    for drop in (15, 20):
        pair("deformable_detr_r50", 36, drop, _FIGURE_3, _RESIZES, suffix=f"_drop{drop}")
    plain, two_stage = "deformable_detr_r50", "deformable_detr_two_stage_r50"
    for name in (plain, two_stage):
        pair(name, 50, 40, _RETRAINED, _RESIZES)
        pair(name, 50, 40, _BATCH_32, _RESIZES, suffix="_batch32", batch_size=32, lr=2e-4)
        pair(name, 50, 40, _FAITHFUL, _RESIZES, suffix="_faithful", overrides=("mask_padding=false",))
    for name, ap in ((plain, 46.3), (two_stage, 47.9)):
        released: dict[str, Any] = {"suffix": "_released", "published_ap": ap, "overrides": ("form=released",)}
        add(f"rego_{name}", 50, 40, _RELEASED, _RESIZES, **released)
    for suffix, ap, override, remark in (
        ("_1_stage", 45.1, "stages=1", _TABLE_2),
        ("_2_stages", 45.6, "stages=2", _TABLE_2),
        ("_4_stages", 45.9, "stages=4", _TABLE_2),
        ("_alpha_1", 45.3, "alphas=1.0,1.0,1.0", _TABLE_2),
        ("_glimpses_1.5", 45.8, "alphas=4.5,3.0,1.5", _TABLE_3),
        ("_glimpses_2", 45.7, "alphas=6.0,4.0,2.0", _TABLE_3),
    ):
        changed: dict[str, Any] = {"suffix": suffix, "published_ap": ap, "overrides": (override,)}
        add(f"rego_{plain}", 50, 40, remark, _RESIZES, **changed)
    pair("deformable_detr_two_stage_r101", 50, 40, _RESIZES)
    pair("deformable_detr_two_stage_x101", 36, 30, _X101_36, _DROP_36, _RESIZES)
    pair("deformable_detr_two_stage_x101", 50, 40, _RESIZES)
    return found


RECIPES = _recipes()
"""All recipes by name, in the order of Table 1; Tables 2 and 3 and other settings follow the row that they vary."""


def recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UserError: for an unknown name; the message suggests the closest one.
    """
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}; {did_you_mean(name, RECIPES)} `python -m regolite recipes` lists them"
        )
    return RECIPES[name]


# ------------------------------------------------------------------------------------------------------- the table


def rows(
    chosen: Sequence[Recipe],
    data: str = "COCO",
    processes: int = 8,
    tflops: float = TFLOPS,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """The paper's AP, the estimates and the command of each recipe.

    Args:
        chosen: the recipes.
        data: folder of COCO.
        processes: number of processes, one per GPU.
        tflops: sustained throughput of a GPU.
        progress: show a progress bar.

    Raises:
        UserError: if ``processes`` or ``tflops`` is not greater than 0, or a batch has fewer images than processes.
    """
    for name, value in (("processes", processes), ("tflops", tflops)):
        if value <= 0:
            raise UserError(f"{name}={value} must be greater than 0")
    found = []
    for one in track(chosen, "counting", progress):
        if processes > one.batch_size:
            raise UserError(f"processes={processes} are too many: {one.name} has {one.batch_size} images per step")
        cost = one.estimate(processes, tflops)
        found.append(
            {
                "recipe": one.name,
                "published_ap": one.published_ap,
                "estimated_gpu_hours": _rounded(cost.gpu_hours),
                "estimated_gigabytes_a_gpu": _rounded(cost.gigabytes),
                "estimated_tflop_a_image": round(cost.image_tflop, 3),
                "command": one.command(data, processes),
                "remarks": list(one.remarks),
            }
        )
    return found


IMAGES_PER_GPU = (1, 2, 4)
"""The batch sizes of one GPU in :func:`memory`."""


def memory(chosen: Sequence[Recipe], progress: bool = False) -> list[dict[str, Any]]:
    """The estimated peak memory of a training step of each model, in GB (10^9 bytes) by images per GPU.

    Args:
        chosen: recipes; those of one model make one row.
        progress: show a progress bar.
    """
    models = list(dict.fromkeys((one.model, one.overrides, one.optimizer) for one in chosen))
    return [
        {
            "model": " ".join([model, *overrides]),
            "estimated_gigabytes_a_gpu": {
                images: round(size, 1)
                for images, size in zip(IMAGES_PER_GPU, step_gigabytes(model, IMAGES_PER_GPU, overrides, optimizer))
            },
        }
        for model, overrides, optimizer in track(models, "counting", progress)
    ]


def memory_as_text(found: Sequence[dict[str, Any]]) -> str:
    """The result of :func:`memory` as a text table."""
    wide = max(len(row["model"]) for row in found)
    lines = [f"{'GB a GPU, estimated':{wide}}" + "".join(f"{count:>7}" for count in IMAGES_PER_GPU) + "  images a GPU"]
    for row in found:
        sizes = row["estimated_gigabytes_a_gpu"]
        lines.append(f"{row['model']:{wide}}" + "".join(f"{sizes[count]:>7.1f}" for count in IMAGES_PER_GPU))
    height, width = LARGEST_IMAGE
    note = (
        f"Estimated, not measured: the peak of a training step in float32, with images of {height} x {width} pixels, "
        "the recipe's largest: weights, gradients, the optimizer's moments, and every other tensor from its creation "
        "to its release, with fused attention; FCOS and the R-CNNs without RoIAlign and loss. Workspaces of kernels, "
        "fragmentation and the CUDA context add to this."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 112, subsequent_indent="    ")])


def _rounded(number: float) -> float:
    """A number with two significant digits."""
    return float(f"{number:.2g}")


def assumptions(processes: int = 8, tflops: float = TFLOPS) -> list[str]:
    """The assumptions of the estimates, as sentences."""
    source = (
        f"the throughput of a V100 in the {V100_HOURS} GPU hours per epoch of Deformable DETR-R50 in its authors' "
        "README; give another GPU's with --tflops. At this throughput DETR-R50 takes 3.1 GPU hours per epoch; its "
        "authors report 3.7"
        if tflops == TFLOPS
        else "as given by --tflops"
    )
    return [
        "AP: published value on val2017; - if the paper gives none.",
        "Hours and GB are estimates; nothing was measured on a GPU.",
        "GPU hours (all GPUs together): epochs x 118,287 images x 3 (forward pass, backward pass of twice the cost) x "
        "the operations, two per multiply-add, of an image of 637 x 849 pixels, the mean size of DETR's image recipe "
        f"on data/coco_tiny, at {tflops:g} TFLOP/s per GPU, {source}. Evaluation is not included.",
        "GB per GPU: 16 bytes for each trained parameter (weight, gradient, two moments of AdamW; 12 with the momentum "
        f"of SGD), and the tensors saved for the backward pass of a GPU's share of a batch ({processes} GPUs), with "
        "images of the largest size, 800 x 1344 pixels, in float32, with fused attention. Workspaces and fragmentation "
        "add to this. --accumulate, --activation-checkpointing and --precision bf16 reduce it.",
        "FCOS and the R-CNNs: without RoIAlign and the losses; box heads read 512 boxes (TSP-RCNN: 700), mask heads do "
        "not run.",
        "All: weight decay 1e-4. Unless a remark says otherwise: AdamW, learning rate 1e-4, 1e-5 for the backbone, and "
        "for sampling offsets and reference points of Deformable DETR (twice as much for _batch32); gradients clipped "
        "at 0.1: defaults of the released codes. Unless a remark gives a number, 16 images per step are inferred: the "
        "paper gives none, and the released code has 1 per GPU and half the learning rate of Deformable DETR, which "
        "uses 32.",
    ]


def as_text(found: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The rows as a text table, with the notes below."""
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
