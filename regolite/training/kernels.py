"""Which of PyTorch's kernels train fastest on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def fastest_kernels(device: torch.device) -> Iterator[None]:
    """Compute with the fastest float32 kernels of a CPU inside the block; on other devices nothing changes.

    By default MKL multiplies float32 matrices, which took twice as long as oneDNN on the AMD CPU where this was
    measured. With the precision that PyTorch calls "medium", oneDNN does it. Despite the name it computes in float32
    as well, except where the CPU has units for bfloat16 matrices (Intel's AMX); there the default stays. Attention is
    computed as two matrix products, so that it benefits too.
    """
    if device.type != "cpu" or not _medium_is_float32():
        yield
        return
    with _matmul_precision("medium"), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _medium_is_float32() -> bool:
    """Whether "medium" multiplies in float32 on this CPU, found by trying: bfloat16 errs a thousand times as much."""
    factors = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    with _matmul_precision("medium"):
        product = factors[0] @ factors[1]
    return torch.allclose(product.double(), factors[0].double() @ factors[1].double(), rtol=1e-5)
