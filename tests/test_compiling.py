"""Strict torch.export of every family of detectors; torch.compile of some, with REGO, as one graph."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_models import DETECTORS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "families"),
    [
        ("strict_export", DETECTORS),
        ("ahead_of_time", ["detr", "smca", "sparse_rcnn", "two_stage"]),
        ("baseline", ["fcos"]),
    ],
)
def test_compiled_and_exported_models_give_the_same_numbers(check, families):
    program = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, str(program), check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(families)
