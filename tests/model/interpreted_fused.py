"""Run by test_gpu_check.py in a process with TRITON_INTERPRET=1. Its casts to bfloat16 truncate; a GPU's round."""

import numpy as np
import pytest
import torch

from imagefeed.model import fused, fused_kernels
from imagefeed.model.fused import NHWC
from tests.model.test_lrn import literal

# The interpreter's time goes with the operations, hardly with their size: one program of one round where nothing else is tested.
fused_kernels.THREADS, fused_kernels.ROUNDS, fused_kernels.ROWS = 64, 1, 3


def activations(*shape: int) -> torch.Tensor:
    """As large as conv1's outputs on pixels of 0-255, so that the sum of squares outweighs the constant; some exactly 0."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 100
    return torch.where(x.abs() < 2, 0.0, x).contiguous(memory_format=NHWC)


def in_float64(x, bias, towers: int, relu: bool, pooled: bool, alpha: float | None = 1e-4):
    """Input, bias and result, by PyTorch's own operations, for autograd."""
    given = [None if value is None else value.double().requires_grad_() for value in (x, bias)]
    a = given[0] if bias is None else given[0] + given[1][:, None, None]
    a = a.relu() if relu else a
    if alpha is None:
        return *given, torch.nn.functional.max_pool2d(a, 3, 2) if pooled else a
    width = a.shape[1] // towers
    windows = (
        sum(tower[:, j : j + 1] ** 2 for j in range(max(0, i - 2), min(width, i + 3))) for tower in a.chunk(towers, 1)
        for i in range(width)
    )  # fmt: skip
    y = a / (2 + alpha * torch.cat(list(windows), 1)) ** 0.75
    return *given, torch.nn.functional.max_pool2d(y, 3, 2) if pooled else y


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.detach()).abs().max() / wanted.detach().abs().max()).item()


def test_the_reference_is_the_literal_formula():
    x = activations(1, 16, 2, 3)
    np.testing.assert_allclose(
        in_float64(x, None, 2, False, False)[2].detach().numpy(), literal(x.double().numpy(), 2), rtol=1e-12
    )


@pytest.mark.parametrize("pooled", [False, True], ids=["norm", "pool"])
@pytest.mark.parametrize(
    "threads, rounds, shape, towers, relu, biased, alpha",
    [
        (16, 2, (2, 16, 3, 11), 2, True, True, 1e-4),  # programs of 8 pixels, the last round of the last one beyond the end
        (64, 1, (1, 128, 3, 4), 2, True, True, 2e-5),  # two programs divide the channels, more than one vector a tower
        (64, 1, (1, 8, 11, 3), 1, True, False, 1e-4),  # five pooled rows for two programs of three
        (64, 1, (1, 16, 4, 3), 2, False, True, 1e-4),
        (64, 1, (2, 16, 5, 6), 2, True, True, None),
    ],
    ids=["programs", "channels", "rows", "linear", "plain"],
)
def test_both_passes_are_those_in_float64(monkeypatch, threads, rounds, shape, towers, relu, biased, alpha, pooled):
    monkeypatch.setattr(fused_kernels, "THREADS", threads)
    monkeypatch.setattr(fused_kernels, "ROUNDS", rounds)
    x, bias = activations(*shape), torch.linspace(-60, 60, shape[1]) if biased else None
    exact_x, exact_bias, wanted = in_float64(x, bias, towers, relu, pooled, alpha)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=NHWC)
    wanted.backward(grad.double())
    settings = bias, towers, alpha, relu
    if pooled:
        y, places = fused.launch_norm_pool(x, *settings)
        dx, of_bias = fused.launch_norm_pool_backward(grad, places, x, *settings)
    else:
        y = fused.launch_norm(x, *settings)
        dx, of_bias = fused.launch_norm_backward(grad, x, *settings)
    assert y.is_contiguous(memory_format=NHWC) and dx.is_contiguous(memory_format=NHWC)
    assert apart(y, wanted) < 5e-7 and apart(dx, exact_x.grad) < 1e-6
    assert apart(of_bias, exact_bias.grad) < 1e-6 if biased else of_bias.numel() == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_lower_precision_only_rounds(dtype, tolerance):
    x, bias = activations(1, 16, 3, 5).to(dtype), torch.linspace(-60, 60, 16)
    exact_x, _, wanted = in_float64(x, bias, 2, True, True)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).to(dtype).contiguous(memory_format=NHWC)
    wanted.backward(grad.double())
    y, places = fused.launch_norm_pool(x, bias, 2, 1e-4, True)
    dx, _ = fused.launch_norm_pool_backward(grad, places, x, bias, 2, 1e-4, True)
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=0)
    torch.testing.assert_close(dx.double(), exact_x.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinity times 0
def test_nan_stays_nan_and_infinity_normalizes_its_neighbors_to_zero():
    """A net that went wrong must not look as if it had not."""
    x = torch.ones(1, 16, 3, 3).contiguous(memory_format=NHWC)
    x[0, 0, 1, 1] = float("nan")
    y = fused.launch_norm(x, None, 2, 1e-4, True)[0, :, 1, 1]
    pooled = fused.launch_norm_pool(x, None, 2, 1e-4, True)[0].flatten()
    for found in (y, pooled):
        assert found[:3].isnan().all() and found[3:].isfinite().all()
    x[0, 0, 1, 1] = float("inf")
    assert fused.launch_norm(x, None, 2, 1e-4, True)[0, 1:3, 1, 1].tolist() == [0, 0]


def test_of_equal_values_the_first_gets_the_gradient():
    x = torch.full((1, 8, 3, 3), 5.0).contiguous(memory_format=NHWC)
    _, places = fused.launch_norm_pool(x, None, 1, 1e-4, True)
    assert places.flatten().tolist() == [0] * 8
    dx, _ = fused.launch_norm_pool_backward(torch.ones(1, 8, 1, 1), places, x, None, 1, 1e-4, True)
    assert (dx[:, :, 0, 0] != 0).all() and (dx.flatten(2)[:, :, 1:] == 0).all()
