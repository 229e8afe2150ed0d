"""Record attention, sampling points, glimpses and boxes during a forward pass of a detector."""

from __future__ import annotations

from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace

__all__ = ["Trace", "record"]
