"""The paper's published average precision (Table 1) by preset: training on COCO train2017, evaluation on val2017.

Compare rows with the same number of epochs: DETR has 500, REGO 36 or 50. The parameters and GFLOPs of the same table
are in :data:`regolite.evaluation.complexity.TABLE_1`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The paper's columns; the last three are AP_S, AP_M and AP_L there."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper.

    Attributes:
        epochs: number of epochs.
        ap: values of :data:`COLUMNS` in percent; None if the paper gives none.
        where: table or section.
        note: the paper's remark on the row.
    """

    epochs: int
    ap: tuple[float | None, ...]
    where: str = "Table 1"
    note: str = ""

    @property
    def figures(self) -> dict[str, float | None]:
        """The values by column name."""
        return dict(zip(COLUMNS, self.ap, strict=True))


_REPRODUCED = "reproduced by the paper's authors with the released code"
_SPARSE = "45.0 in the authors' README and the final version of their paper"
_WITHOUT = "trained with REGO, run without it"

PUBLISHED: dict[str, tuple[PublishedRow, ...]] = {
    "fcos_r50": (PublishedRow(36, (41.0, 59.8, 44.1, 26.2, 44.6, 52.2)),),
    "faster_rcnn_r50": (PublishedRow(36, (40.2, 61.0, 43.8, 24.2, 43.5, 52.0)),),
    "faster_rcnn_r101": (PublishedRow(36, (42.0, 62.5, 45.9, 25.2, 45.6, 54.6)),),
    "mask_rcnn_x101": (PublishedRow(36, (44.5, 64.9, 48.7, 27.6, 48.3, 57.7)),),
    "tsp_rcnn_r50": (PublishedRow(96, (45.0, 64.5, 49.6, 29.7, 47.7, 58.0)),),
    "efficient_detr_r50": (PublishedRow(36, (44.2, 62.2, 48.0, 28.4, 47.5, 56.6)),),
    "cascade_mask_rcnn_x101": (PublishedRow(36, (46.6, 65.1, 50.6, 29.3, 50.5, 60.1)),),
    "sparse_rcnn_r50": (PublishedRow(36, (44.5, 63.4, 48.2, 26.9, 47.2, 59.5), note=_SPARSE),),
    "detr_r50": (PublishedRow(500, (42.0, 62.4, 44.2, 20.5, 45.8, 61.1)),),
    "up_detr_r50": (PublishedRow(300, (42.8, 63.0, 45.3, 20.8, 47.1, 61.7)),),
    "detr_dc5_r50": (PublishedRow(500, (43.3, 63.1, 45.9, 22.5, 47.3, 61.1)),),
    "conditional_detr_r50": (PublishedRow(50, (40.9, 61.8, 43.3, 20.8, 44.6, 59.2)),),
    "anchor_detr_dc5_r50": (PublishedRow(50, (44.2, 64.7, 47.5, 24.7, 48.2, 60.6)),),
    "smca_r50": (PublishedRow(50, (43.7, 63.6, 47.2, 24.2, 47.0, 60.4)),),
    "smca_r101": (PublishedRow(50, (44.4, 65.2, 48.0, 24.3, 48.5, 61.0)),),
    "detr_star_r50": (PublishedRow(50, (39.3, 60.3, 41.4, 18.5, 42.4, 57.5), note=_REPRODUCED),),
    "detr_star_dc5_r50": (PublishedRow(50, (41.3, 62.8, 43.6, 21.0, 44.5, 59.4), note=_REPRODUCED),),
    "rego_detr_star_r50": (PublishedRow(50, (42.3, 60.5, 46.2, 26.2, 44.8, 57.5)),),
    "rego_detr_star_dc5_r50": (PublishedRow(50, (44.0, 62.6, 47.8, 26.5, 45.2, 62.9)),),
    "deformable_detr_r50": (
        PublishedRow(36, (42.7, 61.4, 46.7, 25.9, 46.2, 56.6), note=_REPRODUCED),
        PublishedRow(50, (43.8, 62.6, 47.7, 26.4, 47.1, 58.0)),
    ),
    "rego_deformable_detr_r50": (
        PublishedRow(36, (44.8, 63.8, 48.7, 27.0, 48.0, 60.2)),
        PublishedRow(50, (45.9, 65.2, 49.7, 27.6, 48.9, 61.5)),
        PublishedRow(50, (44.9, 65.0, 48.7, 26.5, 48.4, 61.1), "Table 4", _WITHOUT),
    ),
    "deformable_detr_two_stage_r50": (PublishedRow(50, (46.4, 65.3, 50.6, 30.0, 49.8, 61.4), note=_REPRODUCED),),
    "deformable_detr_two_stage_r101": (PublishedRow(50, (47.2, 66.6, 51.1, 28.5, 50.9, 62.4), note=_REPRODUCED),),
    "deformable_detr_two_stage_x101": (PublishedRow(50, (47.7, 67.2, 51.4, 29.3, 51.2, 62.8), note=_REPRODUCED),),
    "rego_deformable_detr_two_stage_r50": (PublishedRow(50, (47.6, 66.8, 51.6, 29.6, 50.6, 62.3)),),
    "rego_deformable_detr_two_stage_r101": (PublishedRow(50, (48.5, 67.0, 52.4, 29.5, 52.0, 64.4)),),
    "rego_deformable_detr_two_stage_x101": (
        PublishedRow(36, (48.1, 67.4, 52.0, None, None, None), "section 5.2"),
        PublishedRow(50, (49.1, 67.5, 53.1, 30.0, 52.6, 65.0)),
    ),
}
"""The paper's rows by preset, fewest epochs first."""


def published_rows(preset: str) -> tuple[str, tuple[PublishedRow, ...]]:
    """The published rows of a preset.

    Args:
        preset: name of the preset, ``model.model_config.preset``.

    Returns:
        The preset of the rows, and the rows, if any. For laptop presets (``..._tiny``, ``..._scenes``) they are those
        of the full-size model with ResNet-50, trained on other data.
    """
    relative = re.sub("_(tiny|scenes)$", "_r50", preset)
    return relative, PUBLISHED.get(relative, ())
