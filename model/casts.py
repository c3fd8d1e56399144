"""The casts of weights that autocast makes, by one kernel for all of them instead of one each."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


def cast_together(tensors: Sequence[torch.Tensor], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Copies of the tensors in the type in which autocast computes on the device of `x`; uncompiled the tensors themselves.

    The compiler makes a foreach operation one kernel, as in compiled optimizers. Uncompiled, autocast casts as it always does.
    """
    return _Cast.apply(torch.get_autocast_dtype(x.device.type), *tensors) if applies(x) else tensors


def full_layers(layers: Sequence[nn.Linear], x: torch.Tensor) -> Sequence[Callable[[torch.Tensor], torch.Tensor]]:
    """The layers; compiled within autocast, functions that compute the same from weights and biases that are cast together."""
    if not applies(x):
        return layers
    cast = cast_together([parameter for layer in layers for parameter in (layer.weight, layer.bias)], x)
    return [functools.partial(F.linear, weight=weight, bias=bias) for weight, bias in zip(cast[::2], cast[1::2], strict=True)]


def applies(x: torch.Tensor) -> bool:
    """Whether weights are cast together for the input `x`: in a net that is compiled, within autocast."""
    return torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)


class _Cast(torch.autograd.Function):
    """torch._foreach_copy_ into another type, for which PyTorch has no derivative."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        # Not in place: with that, torch 2.11 compiles gradients of 0, without a word.
        return tuple(torch.ops.aten._foreach_copy([torch.empty_like(tensor, dtype=dtype) for tensor in tensors], tensors))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
