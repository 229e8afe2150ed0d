"""Fast operations give what their readable references give, gradients included."""

import pytest
import torch

from regolite.ops import weighted_sums
from regolite.ops.weighted_sums import reference


def table(dtype=torch.float64, n=40, taps=16, rows=11, channels=5):
    """Rows of which some are read often and some never, indices and weights."""
    index = torch.randint(0, rows - 2, (n, taps))
    return torch.randn(rows, channels, dtype=dtype, requires_grad=True), index, torch.rand(n, taps, dtype=dtype)


def test_weighted_sums_are_those_of_the_reference():
    rows, index, weight = table()
    ours, expected = weighted_sums(rows, index, weight), reference(rows, index, weight)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    [gradient], [wanted] = (torch.autograd.grad(sums, rows, upstream) for sums in (ours, expected))
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(gradient[-2:], torch.zeros(2, 5, dtype=torch.float64)), "rows that nothing reads get no gradient"


def test_gradients_pass_gradcheck():
    rows, index, weight = table(n=6, taps=3)
    assert torch.autograd.gradcheck(lambda r: weighted_sums(r, index, weight), (rows,))


def test_a_gradient_in_another_memory_layout():
    rows, index, weight = table(torch.float32)
    upstream = torch.randn(5, len(index)).t()
    assert not upstream.is_contiguous()
    [gradient] = torch.autograd.grad(weighted_sums(rows, index, weight), rows, upstream)
    [wanted] = torch.autograd.grad(reference(rows, index, weight), rows, upstream)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_kept(dtype):
    rows, index, weight = table(dtype)
    assert weighted_sums(rows, index, weight).dtype == dtype
