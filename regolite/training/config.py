"""The configuration of a run: every choice in one place, saved beside its results.

The command line, the papermill notebook and Python all make a :class:`RunConfig` and hand it to
:func:`regolite.train`; each field is an option of ``python -m regolite train`` and a parameter of the notebook.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from regolite.errors import UserError
from regolite.utils.validation import Checked, from_values


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig(Checked):
    """What to train, on what, and how. The defaults are those of Deformable DETR on COCO (its appendix A.4)."""

    data: str = _option("data/coco_tiny", "folder in COCO format, or scenes (see regolite.data.open_data)")
    model: str = _option("rego_deformable_detr_everyday", "name of a preset, see `regolite presets`")
    output: str = _option("runs/rego", "folder of the run")
    overrides: tuple[str, ...] = _option((), "changes of the preset, as in queries=50 rego.dropout=0")
    checkpoint: str | None = _option(None, "start from the weights of this file, a checkpoint or a published one")
    epochs: int = _option(50, "how often every image is seen")
    max_minutes: float | None = _option(None, "stop after this time; schedules then end with the time")
    max_cpu_minutes: float | None = _option(
        None, "stop after this much CPU time of the training process, evaluation excluded; schedules then end with it"
    )
    batch_size: int = _option(16, "images per step, over all processes")
    optimizer: Literal["adamw", "sgd"] = _option("adamw", "the optimizer: AdamW, or SGD with momentum 0.9")
    lr: float = _option(1e-4, "learning rate")
    backbone_lr_mult: float = _option(0.1, "factor of the learning rate for the backbone")
    sampling_lr_mult: float = _option(0.1, "factor of the learning rate for sampling offsets and reference points")
    weight_decay: float = _option(1e-4, "weight decay: decoupled in AdamW, a part of the gradient in SGD")
    clip: float = _option(0.1, "largest norm of the gradient; 0 for no clipping")
    schedule: Literal["step", "one_cycle", "constant"] = _option("step", "how the learning rate changes")
    drop_epochs: tuple[int, ...] = _option((40,), "epochs at which the step schedule divides by ten")
    warmup: float = _option(0.0, "part of the run in which the learning rate grows to its full value")
    ema: float = _option(0.0, "decay of the moving average of the weights; 0 for none")
    augment: Literal["detr", "laptop", "laptop_crop", "none"] | None = _option(
        None, "image recipe; the model's own by default"
    )
    image_size: int | None = _option(None, "size of the images; the model's own by default")
    copy_paste: float = _option(
        0.0, "probability of pasting objects of the training images, cut out along their masks, onto an image"
    )
    repeat_rare: float = _option(
        0.0, "repeat images of classes that are in fewer than this share of the images (repeat factor sampling)"
    )
    limit_images: int | None = _option(None, "use only the first N training images")
    on_broken: Literal["stop", "skip"] = _option(
        "stop", "what to do with an image that cannot be read: stop, or skip and count it"
    )
    evaluate_every: int = _option(1, "epochs between evaluations; 0 for one at the end")
    evaluate_start: bool = _option(
        False, "evaluate before the first step too: what the weights that the run starts from are worth"
    )
    patience: int = _option(
        0, "stop when the AP on the validation images has not grown in so many evaluations; 0 for never"
    )
    evaluate_train: bool = _option(False, "evaluate on the training images too, at the end")
    log_every: int = _option(20, "steps between two lines of metrics")
    checkpoint_minutes: float = _option(10.0, "minutes between checkpoints; one is written at the end in any case")
    keep_checkpoints: int = _option(2, "how many of the last checkpoints to keep; the best is kept in any case")
    seed: int = _option(0, "seed of weights, order and augmentation")
    workers: int = _option(0, "processes that prepare images; 0 prepares them in the training process")
    device: str = _option("auto", "auto, cpu, cuda or mps")
    precision: Literal["no", "bf16", "fp16"] = _option("no", "mixed precision; boxes, costs and losses stay in float32")
    processes: int = _option(1, "processes to start, one a GPU; 1 where torchrun or Slurm starts them")
    accumulate: int = _option(1, "parts in which a process does its share of a batch, for less memory")
    activation_checkpointing: bool = _option(
        False, "keep fewer activations and compute them again, for less memory and more time"
    )
    tensorboard: bool = _option(False, "write the metrics for TensorBoard too")
    resume: bool = _option(False, "go on with the run in the output folder, or start it where there is none")

    def __post_init__(self) -> None:
        """Check the values, one by one."""
        super().__post_init__()
        for name in ("epochs", "batch_size", "lr", "log_every", "keep_checkpoints", "processes", "accumulate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in (
            "backbone_lr_mult", "sampling_lr_mult", "weight_decay", "clip", "evaluate_every", "patience",
            "checkpoint_minutes", "workers",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("data", "model", "output"):
            value = getattr(self, name)
            # Notebook 20 replaces an empty output by a new folder; `train` asks for one.
            if "\0" in value or not (value.strip() or name == "output"):
                raise UserError(f"{name}={value!r} is empty or not a name: give {name}")
        if any(epoch < 0 for epoch in self.drop_epochs):
            raise UserError(f"drop_epochs={self.drop_epochs} must not be negative")
        if self.patience and not self.evaluate_every:
            raise UserError(f"patience={self.patience} counts evaluations: give evaluate_every, as in evaluate_every=1")
        if self.on_broken == "skip" and self.evaluate_train:
            raise UserError("on_broken='skip' leaves no whole set of training images: use evaluate_train=False")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be at least 0 and less than 2**32")
        for name in ("max_minutes", "max_cpu_minutes", "image_size", "limit_images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0, or left out")
        if not 0 <= self.copy_paste <= 1:
            raise UserError(f"copy_paste={self.copy_paste} is a probability: give a number from 0 to 1")
        if not 0 <= self.repeat_rare <= 1:
            raise UserError(f"repeat_rare={self.repeat_rare} is a share of the images: give a number from 0 to 1")
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")

    @staticmethod
    def of(values: dict[str, Any]) -> RunConfig:
        """A configuration from names and values, lists taken for tuples.

        Raises:
            UserError: for an unknown name (the message names the nearest right one) or a value of the wrong type.
        """
        return from_values(RunConfig, values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)
