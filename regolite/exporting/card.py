"""The card of an exported file: what it detects, what it takes and gives, and its license."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from regolite.utils.files import write_atomic


def write_card(file: Path, about: Mapping[str, str]) -> Path:
    """Write ``NAME.md`` beside an ONNX file.

    Args:
        file: the file.
        about: its metadata, see :func:`regolite.export`.

    Returns:
        The card.
    """
    side, results, classes = about["size"], json.loads(about["results"]), json.loads(about["classes"])
    license = about.get("license")
    lines = [
        "---", *([f"license: {license.lower()}"] if license else []), "pipeline_tag: object-detection",
        "library_name: onnx", "---",
        "", f"# {file.stem}", "",
        f"An object detector ({about['model']}), exported by regolite. `python detect_onnx.py {file.name} photo.jpg`",
        "detects objects; it needs numpy, Pillow and onnxruntime only.", "",
        "| input | shape | meaning |",
        "| --- | --- | --- |",
        f"| `pixels` | [B, 3, {side}, {side}], float32 | {about['preprocessing']} |",
        "| `sizes` | [B, 2], int64 | height and width of each image before padding |", "",
        "| output | shape | meaning |",
        "| --- | --- | --- |",
        f"| `logits` | [{len(results)}, B, queries, columns], float32 | scores by {about['scoring']}; one result for "
        f"each of: {', '.join(results)} |",
        f"| `boxes` | [{len(results)}, B, queries, 4], float32 | {about['boxes']} |", "",
        f"The weights have {about['precision']} precision.", f"Their license: {license or 'not stated'}.",
        f"It finds {len(classes)} classes: {', '.join(classes)}.", "",
    ]  # fmt: skip
    card = file.with_suffix(".md")
    write_atomic(card, "\n".join(lines).encode())
    return card
