"""A run of seconds, for the tests of what may end, hold or spoil one."""

import json

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


def ap_of_learned_images(model, folder, data, lr, epochs):
    """AP of a small R-CNN on two images that it has trained on."""
    config = RunConfig(
        data=data, output=str(folder), image_size=96, augment="none", batch_size=2, epochs=epochs, lr=lr, clip=1.0,
        schedule="one_cycle", backbone_lr_mult=1.0, evaluate_every=0, evaluate_train=True, log_every=20, device="cpu",
    )  # fmt: skip
    last = json.loads((train(config, model=model) / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["split"] == "train"
    return last["AP"]
