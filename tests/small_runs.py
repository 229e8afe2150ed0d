"""A run of seconds, for the tests of what may end, hold or spoil one."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

from forked import Forked

from regolite import RunConfig, train

SMALL = (
    "dim=32", "heads=4", "detector.ffn_dim=32", "detector.encoder_layers=1", "detector.decoder_layers=1", "queries=8",
    "rego.ffn_dim=32", "stages=2", "detector.dropout=0.1", "rego.dropout=0.1",
)  # fmt: skip

# Six images in batches of two: three steps an epoch. Dropout and augmentation draw from the generators.
SMALL_RUN = RunConfig(
    data="scenes:6:val=1:size=64",
    model="rego_deformable_detr_scenes",
    overrides=(
        "dim=32", "heads=4", "queries=8",
        "detector.ffn_dim=32", "detector.encoder_layers=1", "detector.decoder_layers=1",
        "rego.ffn_dim=32", "stages=1", "detector.dropout=0.1", "rego.dropout=0.1",
    ),
    image_size=64,
    batch_size=2,
    evaluate_every=0,
    log_every=1,
    checkpoint_minutes=60.0,
    device="cpu",
)  # fmt: skip

WITHOUT_FIGURES = "from regolite.plots import run; run.draw_run = lambda *_: []\n"
"""The beginning of a program whose runs draw no figures, which take longer than they do."""

TRAIN = f"""{WITHOUT_FIGURES}
import json, sys, regolite
regolite.train(regolite.RunConfig.of(json.load(open(sys.argv[1]))))
"""


def torchrun(rank: str, port: str) -> dict[str, str]:
    """What torchrun tells one of two processes."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def fork_two(code: str, *words: str, told: Callable[[str, str], dict[str, str]] = torchrun) -> str:
    """Do the same in two processes that train together; both are forks, where torchrun would start Python three times.

    Args:
        code: what they do.
        words: its arguments.
        told: the environment of a process by its number and a free port.

    Returns:
        What they wrote to stderr. Their exit codes say nothing: gloo may abort when Python ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [Forked(code, *words, **told(rank, port)) for rank in "01"]
    return "".join(process.communicate(timeout=300)[1] for process in started)


def train_in_two(config: RunConfig) -> Path:
    """Train in two processes; returns the folder of the run."""
    folder = Path(config.output)
    plan = folder.with_name(f"{folder.name}.json")
    plan.write_text(json.dumps(config.to_dict()))
    errors = fork_two(TRAIN, str(plan))
    assert (folder / "model.safetensors").exists(), errors
    return folder


def ap_of_learned_images(model, folder, data, lr, epochs):
    """AP of a small R-CNN on two images that it has trained on."""
    config = RunConfig(
        data=data, output=str(folder), image_size=96, augment="none", batch_size=2, epochs=epochs, lr=lr, clip=1.0,
        schedule="one_cycle", backbone_lr_mult=1.0, evaluate_every=0, evaluate_train=True, log_every=20, device="cpu",
    )  # fmt: skip
    last = json.loads((train(config, model=model) / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["split"] == "train"
    return last["AP"]
