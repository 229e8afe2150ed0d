"""Strict torch.export of every family of detectors; torch.compile of each, with REGO, as one graph."""

from pathlib import Path

import pytest
from forked import Forked
from small_models import DETECTORS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "families"),
    [
        ("strict_export", DETECTORS),
        ("ahead_of_time", [*DETECTORS, "two_stage"]),
        ("baseline", ["fcos"]),
    ],
)
def test_compiled_and_exported_models_give_the_same_numbers(check, families):
    program = Path(__file__).with_name("compiled.py")
    process = Forked(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')", check)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.split() == list(families)
