"""One of the processes that :func:`regolite.training.launch` has started: ``python -m regolite.training.worker``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from regolite.errors import UserError
from regolite.training.config import RunConfig
from regolite.training.loop import train
from regolite.utils.interrupts import RunStopped, end_with_starter


def _main(told: str, result: str) -> None:
    """One of the processes that :func:`launch` has started."""
    end_with_starter()

    def tell(**outcome: str) -> None:
        if "error" not in outcome and os.environ["RANK"] != "0":
            return
        new = Path(f"{result}.{os.environ['RANK']}")
        new.write_text(json.dumps(outcome), encoding="utf-8")
        os.replace(new, result)

    try:
        config = RunConfig.of(json.loads(Path(told).read_text(encoding="utf-8")))
        tell(folder=str(train(config)))
    except RunStopped as stopped:
        tell(stopped=stopped.what, signum=str(int(stopped.signum)))
        raise SystemExit(128 + stopped.signum) from None
    except UserError as error:
        tell(error=str(error))
        raise SystemExit(2) from None


if __name__ == "__main__":
    _main(*sys.argv[1:])
