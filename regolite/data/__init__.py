"""Datasets in COCO format, synthetic scenes, transforms and padded batches."""

from __future__ import annotations

from regolite.data.coco import CocoFolder
from regolite.data.collate import batch_images, collate
from regolite.data.convert import Conversion, convert
from regolite.data.dataset import DetectionDataset
from regolite.data.fetch import fetch_dataset
from regolite.data.images import list_images, read_image
from regolite.data.open import open_data
from regolite.data.paste import CutOut, Pasted, cut_outs
from regolite.data.prepare import Report, check_coco, prepare_coco
from regolite.data.scenes import Scenes
from regolite.data.transforms import make_transform
from regolite.data.views import repeat_rare

__all__ = [
    "CocoFolder",
    "Conversion",
    "CutOut",
    "DetectionDataset",
    "Pasted",
    "Report",
    "Scenes",
    "batch_images",
    "check_coco",
    "collate",
    "convert",
    "cut_outs",
    "fetch_dataset",
    "list_images",
    "make_transform",
    "open_data",
    "prepare_coco",
    "read_image",
    "repeat_rare",
]
