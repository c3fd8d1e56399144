import numpy as np
import pytest
import torch

from imagefeed.model.lrn import formula, local_response_norm


def literal(x: np.ndarray, towers: int = 1, alpha: float = 1e-4) -> np.ndarray:
    """Section 3.3 of the paper, one activation at a time: a / (2 + alpha * sum of a^2 over 5 channels)^.75."""
    result = np.empty_like(x)
    channels = x.shape[1]
    width = channels // towers
    for i in range(channels):
        first = i // width * width
        window = x[:, max(first, i - 2) : min(first + width, i + 3)]
        result[:, i] = x[:, i] / (2 + alpha * (window**2).sum(1)) ** 0.75
    return result


def pixels(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """As large as conv1's outputs on pixels of 0-255, so that the sum of squares outweighs the constant."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100).to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels, towers", [(12, 1), (12, 2), (12, 3), (2, 1), (4, 4)])
def test_is_the_papers_sum_within_each_tower(channels, towers, layout):
    x = pixels(3, channels, 4, 5).contiguous(memory_format=layout)
    y = local_response_norm(x, towers)
    np.testing.assert_allclose(y.numpy(), literal(x.numpy(), towers), rtol=1e-12)
    single = local_response_norm(x.float(), towers)
    np.testing.assert_allclose(single.numpy(), literal(x.numpy(), towers), rtol=1e-5)
    assert y.is_contiguous(memory_format=layout) and single.is_contiguous(memory_format=layout)


def test_alpha_is_on_the_sum_where_pytorch_averages():
    x = pixels(2, 16, 3, 3)
    torch.testing.assert_close(
        local_response_norm(x), torch.nn.functional.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
    )
    np.testing.assert_allclose(local_response_norm(x, alpha=2e-5).numpy(), literal(x.numpy(), alpha=2e-5), rtol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("towers", [1, 2])
def test_gradient_is_that_of_finite_differences(towers, layout):
    x = pixels(2, 8, 2, 3).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, towers, alpha=1e-3), x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lower_precision_only_rounds(dtype, tolerance, layout):
    """bfloat16 has 8 bits: one rounding of the result is half of 2^-7, so nothing may be lost on the way to it."""
    x = pixels(2, 10, 5, 5, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = local_response_norm(x, 2)
    y.backward(grad)
    expected = local_response_norm(exact, 2)
    expected.backward(grad.double())
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_another_layout_gives_the_same(dtype):
    x = pixels(2, 8, 3, 3, dtype=dtype).requires_grad_()
    grad = pixels(2, 8, 3, 3, dtype=dtype)
    (contiguous,) = torch.autograd.grad(local_response_norm(x, 2), x, grad)
    (strided,) = torch.autograd.grad(local_response_norm(x, 2), x, grad.contiguous(memory_format=torch.channels_last))
    assert torch.equal(contiguous, strided)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_view_with_gaps_is_taken_as_it_is(dtype, tolerance):
    x = pixels(2, 8, 3, 6, dtype=dtype)[..., ::2]
    np.testing.assert_allclose(local_response_norm(x, 2).numpy(), literal(x.numpy(), 2), rtol=tolerance)


def test_channels_that_cannot_be_split_into_equal_towers_are_refused():
    with pytest.raises(ValueError, match="7 channels cannot be split into 2 equal towers"):
        local_response_norm(torch.zeros(2, 7, 3, 3), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape, towers", [((3, 96, 11, 13), 2), ((1, 7, 9, 15), 1), ((2, 66, 1, 1), 3), ((0, 8, 2, 2), 2)])
def test_the_kernel_gives_what_the_formula_gives(shape, towers, layout, dtype):
    """Of tiles that are cut at 64 pixels, towers that fill no vector, and no images at all."""
    x = pixels(*shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = local_response_norm(x, towers)
    expected = formula(x, towers)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-6}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan(dtype):
    """A net that went wrong must not look as if it had not."""
    x = torch.ones(1, 6, 1, 1, dtype=dtype)
    x[0, 0] = float("nan")
    y = local_response_norm(x).flatten()
    assert y[:3].isnan().all() and y[3:].isfinite().all()
    x[0, 0] = float("inf")
    assert local_response_norm(x).flatten().tolist()[1:3] == [0, 0]


def test_threads_do_not_change_a_bit():
    x = pixels(3, 32, 9, 9, dtype=torch.float32).requires_grad_()
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        y = local_response_norm(x, 2)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_shapes_are_known_without_numbers():
    assert local_response_norm(torch.empty(2, 8, 3, 3, device="meta"), 2).shape == (2, 8, 3, 3)
