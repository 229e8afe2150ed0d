"""Record what happens inside a detector while it runs; nothing here draws."""

from __future__ import annotations

from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace

__all__ = ["Trace", "record"]
