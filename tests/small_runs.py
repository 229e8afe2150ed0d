"""A run of seconds, for the tests of what may end, hold or spoil one."""

from regolite import RunConfig

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
