"""Seeds of independent random streams."""

from __future__ import annotations

import numpy as np

ORDER, AUGMENTATION, STEP = range(3)
"""The random streams of a training run: the order of images, their augmentation, and dropout and noise of a step."""


def derive_seed(seed: int, *key: int) -> int:
    """Derive the seed of one random stream from a run's seed, with :class:`numpy.random.SeedSequence`.

    The result depends on nothing but the arguments, so that a resumed run draws what the uninterrupted one would have.

    Args:
        seed: seed of the run, not negative.
        *key: the stream, and the place in it: ``AUGMENTATION, epoch, index``.

    Returns:
        A seed for :func:`torch.manual_seed`.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
