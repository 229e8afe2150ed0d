"""The experiments: trained detectors, hyperparameters, and the paper's claims about them.

An **arm** is one way to train one detector; an **experiment** compares arms. Arms of several experiments are trained
once. All arms share one protocol, :data:`PROTOCOL`: the same synthetic scenes and, with the same seed, the same image
order, augmentation and initial weights of the base detector. The learning rate was tuned for the base detectors
(experiment ``learning_rate``) on the validation scenes, separately for DETR* and Deformable DETR; REGO uses its base
detector's. Results are measured on 500 test scenes that were not used for tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from regolite.errors import UserError, did_you_mean

PROTOCOL: dict[str, Any] = {
    "data": "scenes:512:val=200:size=96:max_objects=6",
    "epochs": 12,
    "drop_epochs": (10,),
    "batch_size": 4,
    "lr": 1e-3,
    "sampling_lr_mult": 1.0,
    "augment": "laptop",
    "image_size": 96,
    "evaluate_every": 0,
    "log_every": 128,
    "checkpoint_minutes": 2.0,
    "keep_checkpoints": 1,
    "device": "cpu",
}
"""Fields of :class:`regolite.RunConfig` that all arms share."""

SIZES = ("dim=64", "detector.ffn_dim=256", "queries=20")
"""Sizes of the base detectors: a quarter of the paper's channels, and queries for at most 6 objects."""

TEST = 500
"""Number of images in the split ``test``."""

SEEDS = (0, 1, 2)
MAIN_SEEDS = (0, 1, 2, 3, 4)
"""Default seeds of an arm, and seeds of the arms of the main comparison and of REGO's ablations."""


@dataclass(frozen=True)
class Arm:
    """One way to train one detector.

    Attributes:
        about: description in one line.
        model: name of the preset.
        overrides: overrides of the preset, in addition to :data:`SIZES`.
        recipe: changes to :data:`PROTOCOL`.
        seeds: seeds of its runs.
    """

    about: str
    model: str = "rego_deformable_detr_tiny"
    overrides: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS

    def settings(self) -> dict[str, Any]:
        """Fields of :class:`regolite.RunConfig`, except seed and folder."""
        narrow = ("rego.ffn_dim=256",) if self.model.startswith("rego_") else ()
        own = {"model": self.model, "overrides": (*SIZES, *narrow, *self.overrides)}
        return {**PROTOCOL, **own, **self.recipe}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a metric of an arm.

    Attributes:
        arm: name of the arm.
        stage: stage of REGO, 0 for the base detector inside it; the last by default.
        metric: ``AP``, ``AP50``, ``AP75``; ``balls`` and ``others``, the AP of the classes that a neighbor decides, and
            of the others; ``correct`` and ``precise``, correct detections, and those with an IoU of 0.9 or more, per
            100 objects; ``relation``, how often the most related object is the deciding neighbor of a ball.
    """

    arm: str
    stage: int = -1
    metric: str = "AP"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the two metrics whose difference tests it.

    Attributes:
        text: the claim in a sentence.
        source: where the paper makes it.
        ours: the side that is claimed to be better, or no different.
        theirs: the side that it is compared with.
        paper: the published difference in AP on COCO, if any.
        expects: ``more``: ours is higher; ``same``: they differ by less than the margin, as where the paper finds
            no effect; ``not less``: ours is not lower by the margin, as where the paper claims "at least as good".
        margin: smallest relevant difference, in points.
    """

    text: str
    source: str
    ours: Side
    theirs: Side
    paper: float | None = None
    expects: Literal["more", "same", "not less"] = "more"
    margin: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """A comparison of arms.

    Attributes:
        question: the question that it answers.
        arms: names of its arms.
        claims: the paper's claims and assumptions.
    """

    question: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...] = ()


_CURVE = {"evaluate_every": 2}
"""For arms with learning curves; the others are evaluated only at the end."""


def _drop(epoch: int) -> dict[str, Any]:
    """A schedule with a fifth of the epochs after the learning rate drop, as in 50 epochs with a drop at 40."""
    return {**_CURVE, "epochs": epoch * 5 // 4, "drop_epochs": (epoch,)}


_BASE = "deformable_detr_tiny"
_REFINED = "deformable_detr_refined_tiny"
_STAR = "detr_star_tiny"
_STAR_LR = {"lr": 3e-4}

ARMS: dict[str, Arm] = {
    "base": Arm("Deformable DETR", _BASE, recipe=_CURVE, seeds=MAIN_SEEDS),
    "rego": Arm("REGO on Deformable DETR, 3 stages", recipe=_CURVE, seeds=MAIN_SEEDS),
    "base_8_layers": Arm(
        "Deformable DETR, 5 more decoder layers", _BASE, ("detector.decoder_layers=8",), _CURVE, seeds=MAIN_SEEDS
    ),
    "base_5_layers": Arm("Deformable DETR, 2 more decoder layers", _BASE, ("detector.decoder_layers=5",), _CURVE),
    "base_longer": Arm("Deformable DETR, 17 epochs", _BASE, recipe=_drop(14)),
    "base_drop_4": Arm("Deformable DETR, drop at epoch 4", _BASE, recipe=_drop(4)),
    "base_drop_6": Arm("Deformable DETR, drop at epoch 6", _BASE, recipe=_drop(6)),
    "rego_drop_4": Arm("REGO, drop at epoch 4", recipe=_drop(4)),
    "rego_drop_6": Arm("REGO, drop at epoch 6", recipe=_drop(6)),
    "rego_1_stage": Arm("REGO, 1 stage", overrides=("stages=1",), seeds=MAIN_SEEDS),
    "rego_2_stages": Arm("REGO, 2 stages", overrides=("stages=2",), seeds=MAIN_SEEDS),
    "rego_4_stages": Arm("REGO, 4 stages", overrides=("stages=4",), seeds=MAIN_SEEDS),
    "rego_alpha_1": Arm("REGO, alpha 1, 1, 1", overrides=("alphas=1.0,1.0,1.0",), seeds=MAIN_SEEDS),
    "rego_scale_1.5": Arm("REGO, glimpses 1.5 times as large", overrides=("alphas=4.5,3.0,1.5",), seeds=MAIN_SEEDS),
    "rego_scale_2": Arm("REGO, glimpses twice as large", overrides=("alphas=6.0,4.0,2.0",), seeds=MAIN_SEEDS),
    "rego_hidden_asks": Arm("REGO, H_dec(i-1) as query", overrides=("query=hidden",), seeds=MAIN_SEEDS),
    "rego_encoder": Arm("REGO, with 2 encoder layers a stage", overrides=("rego.encoder_layers=2",), seeds=MAIN_SEEDS),
    "rego_detached": Arm("REGO, no gradient into H_dec(i-1)", overrides=("detach_hidden=True",), seeds=MAIN_SEEDS),
    "rego_no_auxiliary": Arm(
        "REGO, no auxiliary losses in stages", overrides=("stage_auxiliary=False",), seeds=MAIN_SEEDS
    ),
    "rego_released": Arm("REGO in the form of the released code", overrides=("form=released",), seeds=MAIN_SEEDS),
    "refined": Arm("Deformable DETR, refined", _REFINED),
    "rego_refined": Arm("REGO on Deformable DETR, refined", f"rego_{_REFINED}"),
    "base_lr_0.0005": Arm("Deformable DETR, learning rate 5e-4", _BASE, recipe={"lr": 5e-4}, seeds=(0, 1)),
    "base_lr_0.002": Arm("Deformable DETR, learning rate 2e-3", _BASE, recipe={"lr": 2e-3}, seeds=(0, 1)),
    "star_lr_0.0001": Arm("DETR*, learning rate 1e-4", _STAR, recipe={"lr": 1e-4}, seeds=(0, 1)),
    "star_lr_0.001": Arm("DETR*, learning rate 1e-3", _STAR, recipe={"lr": 1e-3}, seeds=(0, 1)),
    "star": Arm("DETR*", _STAR, recipe=_STAR_LR),
    "rego_star": Arm("REGO on DETR*", f"rego_{_STAR}", recipe=_STAR_LR),
}
"""All arms by name."""

EXPERIMENTS: dict[str, Experiment] = {
    "convergence": Experiment(
        "Does a detector learn faster with REGO, by epochs, by time and by cost? (Figure 3, Table 1)",
        ("base", "rego", "base_8_layers", "base_5_layers", "base_longer")
        + tuple(f"{arm}_drop_{epoch}" for arm in ("base", "rego") for epoch in (6, 4)),
        (
            Claim("REGO ends higher after the same epochs.", "Table 1", Side("rego"), Side("base"), 2.1),
            Claim(
                "REGO needs 40 % fewer epochs for what the base detector reaches at the end.",
                "Figure 3", Side("rego_drop_6"), Side("base"), None, "not less",
            ),
            Claim(
                "REGO is better than a decoder with five more layers.",
                "section 5.2, of backbones", Side("rego"), Side("base_8_layers"), None,
            ),
            Claim(
                "After the same training time REGO is better.", "abstract, of epochs",
                Side("rego"), Side("base_longer"), None,
            ),
        ),
    ),
    "inference": Experiment(
        "Does training with REGO also improve the base detector without REGO? (Table 4)",
        ("base", "rego"),
        (
            Claim(
                "Trained with REGO, the base detector alone is better.", "Table 4, A.2",
                Side("rego", 0), Side("base"), 1.1,
            ),
            Claim("REGO at inference adds to that.", "Table 4", Side("rego"), Side("rego", 0), 1.0),
        ),
    ),
    "histogram": Experiment(
        "Do later stages place boxes more precisely? (Figure 4)",
        ("base", "rego"),
        (
            Claim(
                "More correct detections have an IoU of 0.9 or more.", "Figure 4",
                Side("rego", metric="precise"), Side("base", metric="precise"),
            ),
            Claim(
                "The last stage has more of them than the first.", "Figure 4",
                Side("rego", metric="precise"), Side("rego", 1, "precise"),
            ),
            Claim(
                "The number of correct detections hardly differs from the base detector's.", "Figure 4",
                Side("rego", metric="correct"), Side("base", metric="correct"), None, "same", 3.0,
            ),
        ),
    ),
    "stages": Experiment(
        "How many stages, and do coarse-to-fine glimpses matter? (Table 2)",
        ("base", "rego_1_stage", "rego_2_stages", "rego", "rego_4_stages", "rego_alpha_1"),
        (
            Claim("One stage helps.", "Table 2", Side("rego_1_stage"), Side("base"), 1.3),
            Claim("A second stage helps more.", "Table 2", Side("rego_2_stages"), Side("rego_1_stage"), 0.5),
            Claim("A third stage helps more.", "Table 2", Side("rego"), Side("rego_2_stages"), 0.3),
            Claim("A fourth one hardly matters.", "Table 2", Side("rego_4_stages"), Side("rego"), 0.0, "same"),
            Claim(
                "Glimpses from coarse to fine beat alpha 1, 1, 1.", "section 5.3",
                Side("rego"), Side("rego_alpha_1"), 0.6,
            ),
        ),
    ),
    "scale": Experiment(
        "Does the size of the glimpses matter? (Table 3)",
        ("rego", "rego_scale_1.5", "rego_scale_2"),
        (
            Claim("1.5 times as large hardly matters.", "Table 3", Side("rego"), Side("rego_scale_1.5"), 0.1, "same"),
            Claim("Twice as large hardly matters.", "Table 3", Side("rego"), Side("rego_scale_2"), 0.2, "same"),
        ),
    ),
    "query": Experiment(
        "Which is the better query: the glimpse or the hidden states? (section 4.2)",
        ("rego", "rego_hidden_asks"),
        (Claim("The glimpse as query is better.", "section 4.2", Side("rego"), Side("rego_hidden_asks"), 0.5),),
    ),
    "encoder": Experiment(
        "Does self-attention in the glimpse decoder help? (section 4.3)",
        ("rego", "rego_encoder"),
        (
            Claim(
                "Encoder layers in the stages bring next to nothing.", "section 4.3",
                Side("rego_encoder"), Side("rego"), 0.1, "same",
            ),
        ),
    ),
    "detectors": Experiment(
        "Does REGO help other base detectors? (Table 1)",
        ("base", "rego", "refined", "rego_refined", "star", "rego_star"),
        (
            Claim("REGO helps refined Deformable DETR.", "Table 1", Side("rego_refined"), Side("refined"), 1.2),
            Claim("REGO helps DETR*.", "Table 1", Side("rego_star"), Side("star"), 3.0),
        ),
    ),
    "released": Experiment(
        "Does it matter where the released code departs from the paper? (A.1, section 4.3)",
        ("rego", "rego_no_auxiliary", "rego_released", "rego_detached"),
        (
            Claim(
                "Auxiliary losses in the stages, which the released code drops, help.", "section 4.3",
                Side("rego"), Side("rego_no_auxiliary"),
            ),
            Claim(
                "The released form is as good as the paper's.", "released code",
                Side("rego"), Side("rego_released"), None, "same",
            ),
            Claim(
                "Gradients into H_dec(i-1), which A.1 forbids and the released code allows, help.", "A.1",
                Side("rego"), Side("rego_detached"),
            ),
            Claim(
                "These gradients are what teaches the base detector.", "A.2",
                Side("rego", 0), Side("rego_detached", 0),
            ),
        ),
    ),
    "context": Experiment(
        "If a neighbor decides the class, do larger glimpses help, and do relations point at it? (A.3)",
        ("base", "rego", "rego_alpha_1", "rego_scale_1.5", "rego_scale_2"),
        (
            Claim(
                "REGO helps where a neighbor decides.", "section 4.2, of contexts",
                Side("rego", metric="balls"), Side("base", metric="balls"),
            ),
            Claim(
                "Glimpses that reach beyond the object help there.", "section 4.2, of contexts",
                Side("rego", metric="balls"), Side("rego_alpha_1", metric="balls"),
            ),
            Claim(
                "Twice as large ones help there still more.", "section 4.2, of contexts",
                Side("rego_scale_2", metric="balls"), Side("rego", metric="balls"),
            ),
            Claim(
                "The relations of the last stage point at the neighbor more often than chance.", "A.3",
                Side("rego", metric="relation"), Side("rego", metric="chance"), None, "more",
            ),
        ),
    ),
    "learning_rate": Experiment(
        "Which learning rate is best for the base detectors? Tuned on validation scenes, for all arms",
        ("base_lr_0.0005", "base", "base_lr_0.002", "star_lr_0.0001", "star", "star_lr_0.001"),
    ),
}  # fmt: skip
"""All experiments by name, in the order of the notebook."""


def experiment(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        UserError: for an unknown name; the message suggests the closest one.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"unknown experiment {name!r}; {did_you_mean(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
