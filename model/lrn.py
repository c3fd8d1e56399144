"""Local response normalization across channels: by kernels.c on a CPU, by Triton or the compiler on a GPU."""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from imagefeed.model import kernels
from imagefeed.model.step import can_compile

# Section 3.3 of the paper: b_i = a_i / (K + ALPHA * sum over |j - i| <= 2 of a_j^2)^.75. The code's shape fixes the window of 5
# channels and the power of .75, which it takes by square roots.
K = 2.0
ALPHA = 1e-4
HALF = (torch.float16, torch.bfloat16)
VECTOR = 8  # channels that a thread of fused_kernels.py takes; its towers are a multiple

_pool = ThreadPoolExecutor(os.cpu_count(), "lrn")  # its threads start when they are first needed


def local_response_norm(x: torch.Tensor, towers: int = 1, alpha: float = ALPHA) -> torch.Tensor:
    """Divides each activation by (2 + alpha * the sum of squares over 5 channels)^.75, within each tower.

    `x` is (N, C, H, W), channels-last or contiguous, of any floating type; the result has its type and layout. Half precision is
    normalized in float32. Each tower is a run of C / towers channels; beyond its ends neighbors count as zero. `alpha` is on the
    sum, as in the paper: PyTorch's LocalResponseNorm averages over the window, so it needs five times the alpha.
    """
    if x.shape[1] % towers:
        raise ValueError(f"{x.shape[1]} channels cannot be split into {towers} equal towers")
    if x.is_cuda:
        from imagefeed.model import fused

        if fused.fits(x, x.shape[1] // towers):
            return fused.norm(x, None, towers, alpha, False)
        return (shifted if torch.compiler.is_compiling() else _compiled())(x, towers, alpha)
    if not torch.compiler.is_compiling():
        if x.is_cpu and type(x) in (torch.Tensor, torch.nn.Parameter) and x.dtype in (torch.float32, torch.bfloat16):
            return _ByKernel.apply(x, towers, alpha)
    return formula(x, towers, alpha)


def formula(x: torch.Tensor, towers: int = 1, alpha: float = ALPHA) -> torch.Tensor:
    """`local_response_norm` in plain tensor operations: for the compiler, exporters, and other types on a CPU.

    An exported net may be converted to float16, which ends at 65,504. The sum of the squares of a trained conv1 does not: 983,760
    was seen, and infinity there makes the strongest activations 0. So alpha is multiplied in before squaring.
    """
    if x.dtype in HALF:
        return formula(x.float(), towers, alpha).to(x.dtype)
    scaled = x * alpha**0.5
    squares = F.pad((scaled * scaled).unflatten(1, (towers, -1)), (0, 0, 0, 0, 2, 2))
    width = x.shape[1] // towers
    window = sum(squares.narrow(2, first, width) for first in range(5)).flatten(1, 2)
    inverse = (K + window).rsqrt()
    return x * (inverse * inverse.sqrt())


class Shifted(torch.autograd.Function):
    """`formula` for the compiler on a GPU, with the gradient written out: the compiler makes one kernel of each pass.

    The input is shifted and then squared, because padded squares would be stored; so would those that autograd keeps.
    """

    @staticmethod
    def forward(ctx, x, towers, alpha):
        ctx.save_for_backward(x)
        ctx.towers, ctx.alpha = towers, alpha
        u = x.unflatten(1, (towers, -1))
        inverse = _inverse(u, alpha)
        y = (_wide(u) * (inverse * inverse.sqrt())).flatten(1, 2)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # torch 2.11 compiles all gradients to 0 if `to` has nothing to do

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return gradient(ctx.saved_tensors[0], grad, ctx.towers, ctx.alpha), None, None


def shifted(x: torch.Tensor, towers: int, alpha: float) -> torch.Tensor:
    return Shifted.apply(x, towers, alpha)


def gradient(x: torch.Tensor, grad: torch.Tensor, towers: int, alpha: float) -> torch.Tensor:
    """The gradient of `formula` for `x`, in plain tensor operations, as in _ByKernel."""
    u, g = (values.unflatten(1, (towers, -1)) for values in (x, grad))
    inverse = _inverse(u, alpha)
    window = 0
    for by in range(-2, 3):
        # Shifted by other operations than in _inverse, or the compiler would store the forward pass's shifted inputs for these.
        near_u, near_g, near = (_pad(values, by) for values in (u, g, inverse))
        window += _wide(near_g) * _wide(near_u) * (near * near.sqrt() * (near * near))
    return (_wide(g) * (inverse * inverse.sqrt()) - 1.5 * alpha * _wide(u) * window).flatten(1, 2).to(x.dtype)


def _pad(a: torch.Tensor, by: int) -> torch.Tensor:
    """As _shift."""
    by = max(-a.shape[2], min(by, a.shape[2]))
    return F.pad(a, (0, 0, 0, 0, -by, by))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least; of shifted values, because the compiler would store what it widened before."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse(u: torch.Tensor, alpha: float) -> torch.Tensor:
    return (K + alpha * sum(_wide(_shift(u, by)).square() for by in range(-2, 3))).rsqrt()


def _shift(a: torch.Tensor, by: int) -> torch.Tensor:
    """The neighbors `by` channels further on in (N, towers, C / towers, H, W); zeros beyond a tower."""
    by = max(-a.shape[2], min(by, a.shape[2]))
    kept = a[:, :, by:] if by >= 0 else a[:, :, :by]
    return F.pad(kept, (0, 0, 0, 0, max(-by, 0), max(by, 0)))


@functools.cache
def _compiled():
    """Not with dynamic shapes, which the compiler would take from the second shape on: they move 3 times the bytes."""
    return torch.compile(shifted, dynamic=False) if can_compile(torch.device("cuda")) else shifted  # loads it, for seconds


class _ByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, towers, alpha):
        x = x.contiguous(memory_format=_layout(x))
        ctx.save_for_backward(x)
        ctx.towers, ctx.alpha = towers, alpha
        return _run(x, None, towers, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # With d_i = K + alpha * sum a_j^2, the gradient is g_i d_i^-.75 - 1.5 alpha a_i * sum g_j a_j d_j^-1.75. Both sums go
        # over the same window, because j is in the window of i when i is in that of j.
        (x,) = ctx.saved_tensors
        return _run(x, grad.contiguous(memory_format=_layout(x)), ctx.towers, ctx.alpha), None, None


def _run(x: torch.Tensor, grad: torch.Tensor | None, towers: int, alpha: float) -> torch.Tensor:
    """Normalizes x, or turns the gradient of the result into that of x, on as many threads as PyTorch uses."""
    out = torch.empty_like(x)
    images, channels, height, width = x.shape
    nhwc = _layout(x) == torch.channels_last
    units = images * (height * width if nhwc else towers)
    cuts = [units * n // torch.get_num_threads() for n in range(torch.get_num_threads() + 1)]
    addresses = x.data_ptr(), 0 if grad is None else grad.data_ptr(), out.data_ptr()
    shape = images, height * width, towers, channels // towers, nhwc, x.dtype == torch.bfloat16
    *others, mine = itertools.pairwise(cuts)
    shares = [_pool.submit(kernels.lrn, *addresses, *shape, K, alpha, *cut) for cut in others]
    kernels.lrn(*addresses, *shape, K, alpha, *mine)
    for share in shares:
        share.result()
    return out


def _layout(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
