"""What every test gets: one thread, fixed seeds, no window for images, no network."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order on every machine; the workers of pytest-xdist use the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["REGOLITE_MINE"] = os.devnull  # notebooks use the package's modules, not what somebody wrote in mine/

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import forked
import matplotlib
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
matplotlib.use("Agg")  # not by MPLBACKEND: the notebooks' kernels would inherit it and show no images

# Files that take from half a minute to two minutes. They are tested first, so that no worker is left with one of them
# at the end, while the other has nothing to do. The book of test_course and the browser tests of REGO Explainer, which
# need the same exported models, are apart.
LONG = (
    "test_experiments", "test_dry_run", "16_your_own_data", "test_viewers_browser", "12_train_rego", "test_course",
    "test_nothing_lost", "test_orphans", "06_detr", "test_shipped", "test_complexity", "test_explainer_browser",
    "test_explainer_engine", "test_recipes", "test_scale", "test_adapter", "test_chapter_12", "00_start_here",
    "11_recurrent_decoder", "18_from_detr_to_today", "20_train_coco", "21_evaluate_coco",
)  # fmt: skip

LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


def _refuse_network(event: str, args: tuple) -> None:
    """An audit hook: Python calls it before any connection or look-up, whichever library asks."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):  # a path is a local socket
        host = args[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and not host.startswith(LOOPBACK):
        pytest.fail(f"a test asked for the network: {event} {host!r}")  # no `except Exception` swallows this


sys.addaudithook(_refuse_network)
forked.fork_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator, so that a test gives the same numbers alone and among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def tasks() -> ModuleType:
    """The file beside the Makefile, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("tasks", Path(__file__).parents[1] / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
