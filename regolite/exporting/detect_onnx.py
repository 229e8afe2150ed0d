"""Detect objects with an exported file: ``python detect_onnx.py model.onnx photo.jpg [threshold]``.

Needs numpy, Pillow and onnxruntime only. The file's metadata holds its classes, its size and how logits become scores.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(file, photo, threshold=0.3):
    """Print the objects of a photograph with class, score and corners in pixels."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    classes, size = json.loads(about["classes"]), int(about["size"])

    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    sides = [max(1, size * side // max(image.size)) for side in image.size]
    small = image.resize(sides, Image.Resampling.BILINEAR)
    pixels = np.zeros((1, 3, size, size), np.float32)
    pixels[0, :, : small.height, : small.width] = np.asarray(small, np.float32).transpose(2, 0, 1) / 255
    logits, boxes = session.run(
        ["logits", "boxes"], {"pixels": pixels, "sizes": np.array([[small.height, small.width]])}
    )

    logits, boxes = logits[-1, 0], boxes[-1, 0]  # the last stage, the first image: [queries, classes], [queries, 4]
    if about["scoring"] == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores = (scores / scores.sum(1, keepdims=True))[:, :-1]  # the last one is "no object"
    for query, label in sorted(np.argwhere(scores >= threshold), key=lambda at: -scores[tuple(at)]):
        center, extent = boxes[query, :2] * image.size, boxes[query, 2:] * image.size
        corners = [f"{x:.0f}" for x in (*(center - extent / 2), *(center + extent / 2))]
        print(f"{classes[label]} {scores[query, label]:.2f} at {', '.join(corners)}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("python detect_onnx.py model.onnx photo.jpg [threshold]")
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
