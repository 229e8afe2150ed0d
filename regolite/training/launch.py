"""Several processes: started from Python, by torchrun, or by Slurm.

All three do the same: every process runs :func:`regolite.train` with the same configuration, and finds in its
environment which of them it is and where the first one listens.

::

    regolite train ... --processes 4
    torchrun --nproc-per-node 4 -m regolite train ...
    srun --ntasks 8 --gpus-per-task 1 python -m regolite train ...
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from regolite.errors import UserError
from regolite.training.config import RunConfig
from regolite.utils.files import write_atomic
from regolite.utils.interrupts import RunStopped


def launch(config: RunConfig) -> Path:
    """Train in processes of their own on this machine, and show what the first one prints.

    They begin anew and share nothing with this one, so that a notebook may start them. When this one is killed, they
    save and end: nobody would see them go on, and write between the lines of whoever resumes the run.

    Args:
        config: what to train, in ``config.processes`` processes.

    Returns:
        The folder of the run.

    Raises:
        UserError: what a process raised. Where it is an error that nobody has foreseen, the message has its last line,
            and ``processes.log`` in the run's folder all that they wrote to stderr.
        RunStopped: when a signal asked this process to end, or them, or has killed one of them; what they had done is
            saved, or was at the last checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, result, errors = (Path(folder, name) for name in ("config.json", "result.json", "errors.txt"))
        told.write_text(json.dumps(config.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--log-dir", folder]
        command += [f"--nproc_per_node={config.processes}", "-m", "regolite.training.worker", str(told), str(result)]
        package = str(Path(__file__).parents[2])  # where it is imported from here, even if it is not installed
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.processes)))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        with (
            open(errors, "w", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            ) as running,
        ):
            try:
                for line in running.stdout or ():
                    print(line, end="", flush=True)
            except BaseException as error:  # Ctrl-C above all, which the terminal sends to this process alone
                running.terminate()
                for line in running.stdout or ():  # they save what they have, and end
                    print(line, end="", flush=True)
                running.wait()
                stopped = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
                if isinstance(error, RunStopped) and "stopped" in stopped:
                    raise RunStopped(stopped["stopped"], error.signum) from None
                raise
        # Not by the exit code: with gloo a process may abort after all is done, when the interpreter ends.
        outcome = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if "folder" in outcome:
            return Path(outcome["folder"])
        if "stopped" in outcome:
            raise RunStopped(outcome["stopped"], int(outcome["signum"]))
        if "error" in outcome:
            raise UserError(outcome["error"])
        _fail(config, errors.read_text(encoding="utf-8", errors="replace"))


def _fail(config: RunConfig, said: str) -> NoReturn:
    """Say in one line why the processes have ended, and keep what they wrote to stderr.

    Raises:
        RunStopped: one was killed: nothing is wrong with the run.
        UserError: something else has happened.
    """
    log = Path(config.output) / "processes.log"
    write_atomic(log, said.encode())
    killed = [
        name for name in re.findall(r"Signal \d+ \((\w+)\)", said) if name != "SIGTERM"
    ]  # torchrun's to the others
    if killed:
        last = max((path.stem for path in (log.parent / "checkpoints").glob("step_*.pt")), default="")
        kept = (
            f"the checkpoint of step {int(last[5:])} is kept in {log.parent}" if last else "there is no checkpoint yet"
        )
        raise RunStopped(f"one of {config.processes} processes was killed by {killed[0]}; {kept}", signal.SIGKILL)
    errors = re.findall(r"^(?:\[\w+\]: *)?(\w[\w.]*(?:Error|Exception|Interrupt)\b.*)$", said, re.MULTILINE)
    reason = errors[0] if errors else "for a reason that they do not tell"
    raise UserError(
        f"one of {config.processes} processes has failed: {reason}; all that they said is in {log}, and resume goes on "
        "once it is put right"
    )
