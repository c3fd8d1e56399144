"""Local response normalisation across channels, forward and backward, in plain tensor operations."""

import torch
from torch.autograd.function import once_differentiable

# Section 3.3 of the paper (model/alexnet.py): b_i = a_i / (K + ALPHA * sum over |j - i| <= 2 of a_j^2)^.75. Two
# constants are in the code's shape instead of a name: the window of N = 5 channels, and the power of .75, which is
# taken by square roots instead of pow.
K = 2.0
ALPHA = 1e-4
BETA = 0.75


def local_response_norm(x: torch.Tensor, towers: int = 1, alpha: float = ALPHA) -> torch.Tensor:
    """Divides each activation by (2 + alpha * the sum of squares over 5 channels)^.75, within each tower.

    `x` is (N, C, H, W), channels-last or contiguous, of any floating type; the result has its type and layout.
    Half-precision input is normalised in float32. C is a multiple of `towers`; each tower is a run of C / towers
    channels, and its neighbours beyond its ends count as zero. `alpha` is on the sum, as the paper writes it:
    PyTorch's LocalResponseNorm averages over the window, so there the same needs five times the alpha.
    """
    return _LocalResponseNorm.apply(x, towers, alpha)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, towers, alpha):
        x = x.contiguous(memory_format=_layout(x))
        ctx.save_for_backward(x)
        ctx.towers, ctx.alpha = towers, alpha
        result = torch.empty_like(x)
        for (a, out), dim in _pieces(x, result, towers=towers):
            a = _widened(a)
            inverse = _inverse(a, dim, alpha)
            out.copy_(inverse.mul_(inverse.sqrt()).mul_(a))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # With d_i = K + alpha * sum a_j^2, the gradient is g_i d_i^-.75 - 1.5 alpha a_i * sum g_j a_j d_j^-1.75, where
        # both sums go over the same window, because j is in the window of i when i is in that of j.
        (x,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(x))
        result = torch.empty_like(x)
        for (a, g, out), dim in _pieces(x, grad, result, towers=ctx.towers):
            a = _widened(a)
            inverse = _inverse(a, dim, ctx.alpha)
            own = inverse.sqrt().mul_(inverse).mul_(g)
            others = _window_sum(inverse.mul_(inverse).mul_(own).mul_(a), dim).mul_(a)
            out.copy_(own.add_(others, alpha=-2 * BETA * ctx.alpha))
        return result, None, None


def _layout(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _pieces(*tensors: torch.Tensor, towers: int):
    """Yields views of the tensors piece by piece, with the dimension in which a tower's channels lie.

    On the CPU a piece is one image, whose temporaries stay in the cache: a step of AlexNet is 3 to 4 times as fast as with
    the whole batch at once. On a GPU it is the whole batch.
    """
    n, c, h, w = tensors[0].shape
    if _layout(tensors[0]) == torch.channels_last:
        views, dim = [t.permute(0, 2, 3, 1).view(n, h * w, towers, c // towers) for t in tensors], 3
    else:
        views, dim = [t.view(n, towers, c // towers, h * w) for t in tensors], 2
    images = 1 if tensors[0].device.type == "cpu" else n
    for first in range(0, n, images):
        yield [view[first : first + images] for view in views], dim


def _widened(a: torch.Tensor) -> torch.Tensor:
    return a if a.dtype == torch.float64 else a.float()


def _inverse(a: torch.Tensor, dim: int, alpha: float) -> torch.Tensor:
    """(K + alpha * sum of squares)^-.5."""
    return _window_sum(a * a, dim).mul_(alpha).add_(K).rsqrt_()


def _window_sum(a: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over 5 neighbours along `dim`, with zeros beyond the ends, in three additions."""
    channels = a.shape[dim]
    a = torch.nn.functional.pad(a, (2, 2) if dim == 3 else (0, 0, 2, 2))
    pairs = a.narrow(dim, 0, channels + 3) + a.narrow(dim, 1, channels + 3)
    return (pairs.narrow(dim, 0, channels) + pairs.narrow(dim, 2, channels)).add_(a.narrow(dim, 4, channels))
