"""The kernels that training chooses on a CPU."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regolite.training import kernels
from regolite.training.kernels import fastest_kernels

CPU = torch.device("cpu")


@pytest.fixture
def factors():
    return torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))


def test_products_stay_as_precise_as_float32(factors):
    exact = factors[0].double() @ factors[1].double()
    with fastest_kernels(CPU):
        error = (factors[0] @ factors[1] - exact).abs().max() / exact.abs().max()
    in_16_bits = (factors[0].bfloat16() @ factors[1].bfloat16() - exact).abs().max() / exact.abs().max()
    assert error < 2e-6 < 1e-4 < in_16_bits


def test_attention_gives_the_same(factors):
    q, k, v = factors[0].reshape(3, 10, 300, 10)
    mask = torch.rand(10, 300, 300) < 0.7
    with fastest_kernels(CPU):
        ours = scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v, mask))


def test_settings_of_the_caller_come_back_after_errors_too():
    with pytest.raises(RuntimeError, match="out"), fastest_kernels(CPU):
        raise RuntimeError("out")
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_cpu_that_would_round_to_16_bits_keeps_its_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_medium_is_float32", lambda: False)
    with fastest_kernels(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.flash_sdp_enabled()


def test_a_product_in_16_bits_is_recognized(monkeypatch):
    true_product = torch.Tensor.__matmul__

    def rounded(a, b):
        return (
            true_product(a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype))
            if a.dtype == torch.float32
            else true_product(a, b)
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not kernels._medium_is_float32.__wrapped__()


def test_other_devices_are_left_alone():
    with fastest_kernels(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
