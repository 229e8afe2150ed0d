"""What the environment says of a process: whether it is one of several, as torchrun and Slurm have started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def from_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process that ``srun`` has started must add to its environment to be one of several.

    Slurm counts the processes and tells each its number; PyTorch asks for the same under other names. Nothing is added
    where there is one task, where another launcher has spoken, and in a batch script outside of ``srun``.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if launched(environment) or tasks == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
    # The first node of "gpu[07-09,12].site,other" is "gpu07.site".
    [name, number, domain] = re.findall(r"^([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)[0]
    found = {
        "RANK": environment["SLURM_PROCID"],
        # With --gpus-per-task a process sees one GPU alone, and that is number 0.
        "LOCAL_RANK": str(int(environment["SLURM_LOCALID"]) % max(torch.cuda.device_count(), 1)),
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": re.findall(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", tasks))[0],
        "MASTER_ADDR": name + number + domain,
        # The same for all tasks of a step, and another one for the next step.
        "MASTER_PORT": str(20000 + (31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 20000),
    }
    return {name: environment.get(name, value) for name, value in found.items()}
