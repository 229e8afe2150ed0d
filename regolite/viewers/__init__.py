"""Interactive viewers for notebooks: choose an image, click an object, and see what the detector does with it."""

from __future__ import annotations

from regolite.viewers.explorer import AttentionViewer, Explorer, RelationViewer, SamplingViewer, StageViewer

__all__ = ["AttentionViewer", "Explorer", "RelationViewer", "SamplingViewer", "StageViewer"]
