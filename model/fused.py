"""Bias, ReLU, local response normalization and the overlapping pool as one operator, which torch.compile and torch.export keep.

On a GPU the Triton kernels of fused_kernels.py do the work. Elsewhere plain tensor operations do, so a program that was exported
on a GPU also runs on a CPU. For the backward pass the operators save the convolution's output; of a pool also where in each
window the largest value was.
"""

import importlib.util

import torch
import torch.nn.functional as F

from imagefeed.model.lrn import HALF, VECTOR, K, formula, gradient

HAS_TRITON = importlib.util.find_spec("triton") is not None
NHWC = torch.channels_last
Gradients = tuple[torch.Tensor, torch.Tensor]


def fits(x: torch.Tensor, width: int) -> bool:
    """Whether the kernels are for activations on this tensor's device, in towers of so many channels."""
    return HAS_TRITON and x.is_cuda and width % VECTOR == 0


def _by_kernel(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, *HALF)


@torch.library.custom_op("imagefeed::norm", mutates_args=())
def norm(x: torch.Tensor, bias: torch.Tensor | None, towers: int, alpha: float | None, relu: bool) -> torch.Tensor:
    """Normalizes `x` (N, C, H, W) plus `bias` (C,), with ReLU in between or not; an `alpha` of None leaves normalization out.

    The result is channels-last.
    """
    if not _by_kernel(x):
        return _nhwc(_plainly(x, bias, towers, alpha, relu).to(x.dtype))
    return launch_norm(_nhwc(x), bias, towers, alpha, relu)


@torch.library.custom_op("imagefeed::norm_backward", mutates_args=())
def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, towers: int, alpha: float | None, relu: bool
) -> Gradients:
    """The gradients of `norm` for `x`, channels-last, and for the bias, float32 (C,), which is empty without one."""
    if not _by_kernel(x):
        return _differentiated(grad, x, bias, towers, alpha, relu)
    return launch_norm_backward(_nhwc(grad), _nhwc(x), bias, towers, alpha, relu)


@torch.library.custom_op("imagefeed::norm_pool", mutates_args=())
def norm_pool(
    x: torch.Tensor, bias: torch.Tensor | None, towers: int, alpha: float | None, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of `norm` in windows of 3x3, 2 apart, and its place in each window, uint8 of 0 to 8; both channels-last."""
    if not _by_kernel(x):
        y, at = F.max_pool2d(_plainly(x, bias, towers, alpha, relu), 3, 2, return_indices=True)
        first = [2 * torch.arange(size, device=x.device) for size in y.shape[2:]]
        places = 3 * (at // x.shape[3] - first[0][:, None]) + at % x.shape[3] - first[1]
        return _nhwc(y.to(x.dtype)), _nhwc(places.to(torch.uint8))
    return launch_norm_pool(_nhwc(x), bias, towers, alpha, relu)


@torch.library.custom_op("imagefeed::norm_pool_backward", mutates_args=())
def norm_pool_backward(
    grad: torch.Tensor,
    places: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    towers: int,
    alpha: float | None,
    relu: bool,
) -> Gradients:
    """As `norm_backward`, of the largest; `places` are those of `norm_pool`."""
    if not _by_kernel(x):
        height, width = x.shape[2:]
        rows, columns = (2 * torch.arange(size, device=x.device) for size in grad.shape[2:])
        at = (rows[:, None] + places // 3) * width + columns + places % 3
        spread = grad.new_zeros(*x.shape[:2], height * width).scatter_add(2, at.flatten(2), grad.flatten(2)).view(x.shape)
        return _differentiated(spread, x, bias, towers, alpha, relu)
    return launch_norm_pool_backward(_nhwc(grad), _nhwc(places), _nhwc(x), bias, towers, alpha, relu)


@norm.register_fake
def _(x, bias, towers, alpha, relu):
    return torch.empty_like(x, memory_format=NHWC)


@norm_backward.register_fake
def _(grad, x, bias, towers, alpha, relu):
    return torch.empty_like(x, memory_format=NHWC), _no_sums(x) if bias is None else _no_sums(x).new_empty(x.shape[1])


@norm_pool.register_fake
def _(x, bias, towers, alpha, relu):
    shape = *x.shape[:2], *((size - 3) // 2 + 1 for size in x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=NHWC)
    return y, torch.empty_like(y, dtype=torch.uint8)


@norm_pool_backward.register_fake
def _(grad, places, x, bias, towers, alpha, relu):
    return torch.empty_like(x, memory_format=NHWC), _no_sums(x) if bias is None else _no_sums(x).new_empty(x.shape[1])


def _save(ctx, inputs, output) -> None:
    x, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, bias, *output[1:] if isinstance(output, tuple) else ())


def _backward(ctx, grad, *_):
    x, bias, *places = ctx.saved_tensors
    through = norm_pool_backward if places else norm_backward
    dx, of_bias = through(grad, *places, x, bias, *ctx.settings)
    return dx, None if bias is None else of_bias.to(bias.dtype), None, None, None


for operator in (norm, norm_pool):
    operator.register_autograd(_backward, setup_context=_save)


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=NHWC)


def _activations(x: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """In float32 at least, as in the kernels."""
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    a = a if bias is None else a + bias[:, None, None]
    return F.relu(a) if relu else a


def _plainly(x, bias, towers: int, alpha: float | None, relu: bool) -> torch.Tensor:
    a = _activations(x, bias, relu)
    return a if alpha is None else formula(a, towers, alpha)


def _differentiated(grad, x, bias, towers: int, alpha: float | None, relu: bool) -> Gradients:
    a = _activations(x, bias, relu)
    grad = grad.to(a.dtype)
    found = grad if alpha is None else gradient(a, grad, towers, alpha)
    found = torch.where(a == 0, 0, found) if relu else found
    return _nhwc(found.to(x.dtype)), _no_sums(x) if bias is None else found.sum((0, 2, 3))


def _no_sums(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def _shared(
    x: torch.Tensor, bias: torch.Tensor | None, towers: int, alpha: float | None, relu: bool
) -> tuple[dict[str, object], int]:
    """The kernels' arguments that all have in common, and the programs that divide a pixel's channels."""
    vectors = x.shape[1] // VECTOR
    q = min(vectors & -vectors, 8)
    sizes = {"C": x.shape[1], "WIDTH": x.shape[1] // towers, "P": kernels().THREADS // q, "Q": q}
    norm = {"K": 0.0 if alpha is None else K, "alpha": alpha or 0.0}
    return sizes | norm | {"RELU": relu, "BIASED": bias is not None}, vectors // q


def kernels():
    """Triton takes a second to load."""
    from imagefeed.model import fused_kernels

    return fused_kernels


def launch_norm(x, bias, towers: int, alpha: float | None, relu: bool) -> torch.Tensor:
    """`norm` by its kernel; `x` is channels-last."""
    y = torch.empty_like(x)
    if x.numel():
        shared, parts = _shared(x, bias, towers, alpha, relu)
        pixels = x.numel() // x.shape[1]
        with torch.cuda.device_of(x):
            kernels().norm_forward[-(-pixels // shared["P"]) * parts,](x, bias, y, pixels, **shared)
    return y


def launch_norm_backward(grad, x, bias, towers: int, alpha: float | None, relu: bool) -> Gradients:
    """`norm_backward` by its kernel; `grad` and `x` are channels-last."""
    pixels = x.numel() // x.shape[1]
    return _launch_backward("norm_backward", (grad,), x, bias, pixels, (pixels,), (towers, alpha, relu))


def launch_norm_pool(x, bias, towers: int, alpha: float | None, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_pool` by its kernel; `x` is channels-last."""
    images, channels, height, width = x.shape
    down, across = (height - 3) // 2 + 1, (width - 3) // 2 + 1
    y = torch.empty((images, channels, down, across), dtype=x.dtype, device=x.device, memory_format=NHWC)
    places = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        shared, parts = _shared(x, bias, towers, alpha, relu)
        columns, rows = images * across, kernels().ROWS
        grid = -(-columns // shared["P"]) * parts, -(-down // rows)
        with torch.cuda.device_of(x):
            sizes = columns, height, width, down, across
            kernels().pool_forward[grid](x, bias, y, places, *sizes, ROWS=rows, **shared)
    return y, places


def launch_norm_pool_backward(grad, places, x, bias, towers: int, alpha: float | None, relu: bool) -> Gradients:
    """`norm_pool_backward` by its kernel; all are channels-last."""
    images, _, height, width = x.shape
    blocks = images * ((height + 1) // 2) * ((width + 1) // 2)
    sizes = blocks, height, width, *grad.shape[2:]
    return _launch_backward("pool_backward", (grad, places), x, bias, blocks, sizes, (towers, alpha, relu))


def _launch_backward(name: str, given: tuple, x, bias, units: int, sizes: tuple[int, ...], settings: tuple) -> Gradients:
    """Runs a backward kernel, over so many pixels or blocks of them; its programs' sums for the bias are added in one order."""
    towers, alpha, relu = settings
    dx = torch.empty_like(x)
    shared, parts = _shared(x, bias, towers, alpha, relu)
    rounds = kernels().ROUNDS
    programs = -(-units // (shared["P"] * rounds))
    sums = x.new_empty((0 if bias is None else programs, x.shape[1]), dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(x):
            getattr(kernels(), name)[programs * parts,](x, bias, *given, dx, sums, *sizes, rounds=rounds, **shared)
    return dx, _no_sums(x) if bias is None else sums.sum(0)
