"""Interactive notebook viewers of a detector's attention, sampling points, stages and relations."""

from __future__ import annotations

from regolite.viewers.explorer import AttentionViewer, Explorer, RelationViewer, SamplingViewer, StageViewer

__all__ = ["AttentionViewer", "Explorer", "RelationViewer", "SamplingViewer", "StageViewer"]
