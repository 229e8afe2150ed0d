"""``python -m regolite``: the command line without installing anything."""

from __future__ import annotations

import sys

from regolite.cli import main

if __name__ == "__main__":
    sys.exit(main())
