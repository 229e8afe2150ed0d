"""Checkers of notebook 16: your own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regolite.course import Mistake, close, exercise, same_shape


@exercise(
    "16.1",
    "The first number of a line is the class; the other four are center and size, relative to the image.",
    "x and width are multiplied by the image's width, y and height by its height.",
    "The corners are half the size away from the center: x - w / 2, y - h / 2, x + w / 2, y + h / 2.",
)
def read_line(answer: Callable[[str, int, int], tuple[int, Tensor]]) -> str:
    """A line of a YOLO file as class and corners in pixels."""
    for line, width, height, label, box in (
        ("3 0.5 0.25 0.2 0.1", 200, 400, 3, [80.0, 80.0, 120.0, 120.0]),
        ("0 0.1 0.9 0.2 0.2", 640, 480, 0, [0.0, 384.0, 128.0, 480.0]),
    ):
        found = answer(line, width, height)
        if not isinstance(found, tuple) or len(found) != 2:
            raise Mistake("return a pair: the class, and the four corners as a tensor.")
        if int(found[0]) != label:
            raise Mistake(f"the class of {line!r} is {label}, its first number, not {found[0]}.")
        wanted = torch.tensor(box)
        same_shape("the box", found[1], (4,))
        x0, y0, x1, y1 = box
        for wrong, problem in (
            (torch.tensor([float(n) for n in line.split()[1:]]), "still has the line's numbers, relative to the image"),
            (torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height]), "is still relative to the image"),
            (torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]), "is still center and size"),
            (torch.tensor([x0, y0, x1 - x0, y1 - y0]), "is COCO's corner and size"),
            (torch.tensor([x0 / width * height, y0 / height * width, x1 / width * height, y1 / height * width]),
             "has width and height of the image swapped"),
        ):  # fmt: skip
            if torch.allclose(found[1].float(), wrong, atol=1e-2):
                raise Mistake(f"the box {problem}; it should be two corners in pixels.")
        close("the box", found[1].float(), wanted, 1e-2)
    return "This is all there is to the YOLO format."


@exercise(
    "16.2",
    "There are three errors: no width or height, corners in the wrong order, no overlap with the image.",
    "Clip the box to the image first (clamp). A wrong box then has no width or no height.",
    "wide = x1.clamp(0, width) - x0.clamp(0, width), the same for y; unusable is (wide <= 0) | (high <= 0).",
)
def unusable(answer: Callable[[Float[Tensor, "N 4"], int, int], Tensor]) -> str:
    """Invalid boxes, which no detector can learn from."""
    boxes = torch.tensor(
        [
            [10.0, 10.0, 50.0, 40.0],  # fine
            [-20.0, 5.0, 30.0, 60.0],  # reaches over the left edge: fine once cut
            [60.0, 20.0, 60.0, 50.0],  # no width
            [40.0, 30.0, 20.0, 60.0],  # corners in the wrong order
            [120.0, 10.0, 150.0, 30.0],  # right of the image
            [10.0, 85.0, 30.0, 95.0],  # below the image
            [0.0, 0.0, 100.0, 80.0],  # the whole image
        ]
    )
    wanted = torch.tensor([False, False, True, True, True, True, False])
    why = {
        0: "is valid", 1: "extends beyond the edge, but is valid after clipping", 2: "has no width",
        3: "has its corners in the wrong order", 4: "is right of the image", 5: "is below the image",
        6: "fills the image, which is valid",
    }  # fmt: skip
    found = answer(boxes, 100, 80)
    same_shape("the answer", found, (7,))
    for n in range(7):
        if bool(found[n]) != bool(wanted[n]):
            raise Mistake(f"box {boxes[n].int().tolist()} in an image of 100 x 80 {why[n]}.")
    empty = answer(torch.zeros(0, 4), 100, 80)
    same_shape("the answer for an image without boxes", empty, (0,))
    return "Such boxes are left out with a message: a single one can make GIoU divide 0 by 0."


@exercise(
    "16.3",
    "Choose groups at random, not images.",
    "groups = sorted({name.split('_')[0] for name in names}); shuffle them with random.Random(seed).",
    "Take groups one by one until at least the share of the images is held out, always with all their images.",
)
def split_groups(answer: Callable[[Sequence[str], float, int], tuple[list[str], list[str]]]) -> str:
    """Hold out whole groups of images that belong together."""
    sizes = {"yard": 9, "barn": 4, "gate": 5, "road": 2}
    names = [f"{place}_{n:02}.jpg" for place, count in sizes.items() for n in range(count)]
    seen = set()
    for seed in range(6):
        train, held = answer(names, 0.25, seed)
        if sorted([*train, *held]) != sorted(names):
            raise Mistake("every image belongs to exactly one of the two lists.")
        both = {n.split("_")[0] for n in train} & {n.split("_")[0] for n in held}
        if both:
            raise Mistake(
                f"images of the group {min(both)!r} are in both lists: nearly the same images are used for training "
                "and evaluation."
            )
        if not train or not held:
            raise Mistake("one of the lists is empty.")
        if len(held) < 0.25 * len(names):
            raise Mistake(f"only {len(held)} of {len(names)} images are held out; it should be at least a quarter.")
        if (sorted(train), sorted(held)) != tuple(map(sorted, answer(names, 0.25, seed))):
            raise Mistake("the same seed gives a different split the second time: use random.Random(seed).")
        seen.add(tuple(sorted(held)))
    if len(seen) == 1:
        raise Mistake("every seed holds out the same groups: shuffle them with random.Random(seed).")
    return "Held-out groups measure how the detector performs in places that it has not seen."
