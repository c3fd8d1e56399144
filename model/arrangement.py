"""Ways to compute the convolutional layers of one net: the same numbers, but for the order of sums, at another speed.

State dicts are the same in each. Which way is fastest depends on the GPU and its libraries, so `fastest` times them there, and
pipeline/tuner/saved.py keeps what it found.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from imagefeed.model import fused
from imagefeed.model.casts import cast_together
from imagefeed.model.lrn import local_response_norm

if TYPE_CHECKING:
    from imagefeed.model.alexnet import AlexNet

CELL = 4  # pixels on a side: conv1's stride
TIMED_IMAGES, WARM_UP, REPEATS = 128, 3, 5


class Arrangement(NamedTuple):
    """How a GPU computes a net; a CPU too, if one of the first two is set."""

    apart: bool = False  # each tower by convolutions of its own, because grouped ones may be slow in channels-last
    folded: bool = (
        False  # conv1 over cells of 4x4 pixels, 3x3 over 48 channels instead of 11x11 over 3, which fill no matrix unit
    )
    pooled: bool = True  # normalization and pool in one kernel


class FirstConv2d(nn.Conv2d):
    """conv1: 11x11, 4 apart, over RGB. With `folded`, computed over cells of 4x4 pixels."""

    folded = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_to(x, self.weight, self.bias)

    def apply_to(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As forward, by a part of the weights."""
        if not self.folded:
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        (down, across), (stride, _), (kernel, _) = self.padding, self.stride, self.kernel_size
        height, width = x.shape[2] + 2 * down, x.shape[3] + 2 * across
        y = F.conv2d(fold(F.pad(x, (across, across + -width % CELL, down, down + -height % CELL))), fold_weight(weight), bias)
        return y[:, :, : (height - kernel) // stride + 1, : (width - kernel) // stride + 1]


def fold(x: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) to (N, 48, H / 4, W / 4) in channels-last: the pixels of a cell, row by row."""
    images, channels, height, width = x.shape
    cells = x.view(images, channels, height // CELL, CELL, width // CELL, CELL).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(images, height // CELL, width // CELL, -1).permute(0, 3, 1, 2)


def fold_weight(weight: torch.Tensor) -> torch.Tensor:
    """(maps, 3, 11, 11) to (maps, 48, 3, 3), with a row and a column of zeros more, in the order of `fold`."""
    return fold(F.pad(weight, (0, -weight.shape[3] % CELL, 0, -weight.shape[2] % CELL)))


def convolutional(net: "AlexNet", x: torch.Tensor) -> torch.Tensor:
    """The maps (N, 256, H, W) that the paper's net gives its full layers, for padded pixels (N, 3, H, W)."""
    layers = net.conv1, net.conv2, net.conv3, net.conv4, net.conv5
    conv1, conv2, conv3, conv4, conv5 = zip(layers, cast_together([layer.weight for layer in layers], x), strict=True)
    towers = _block(net, *conv1, [x], normalized=True, pooled=True)
    towers = _block(net, *conv2, towers, normalized=True, pooled=True)
    towers = _block(net, *conv3, towers)
    towers = _block(net, *conv4, towers)
    towers = _block(net, *conv5, towers, pooled=True)
    x = _joined(towers)
    return x if net.conv6 is None else F.relu(net.conv6(x))


def _block(
    net: "AlexNet", layer: nn.Conv2d, weight: torch.Tensor, towers: list[torch.Tensor], normalized=False, pooled=False
) -> list[torch.Tensor]:
    """A layer with what follows it, of each tower if they are computed apart, else of one tensor."""
    if net.arrangement.apart:
        inputs = towers if layer.groups > 1 else [_joined(towers)] * net.towers
        parts = list(zip(inputs, weight.chunk(net.towers), layer.bias.chunk(net.towers), strict=True))
        groups, within = 1, 1
    else:
        parts, groups, within = [(_joined(towers), weight, layer.bias)], layer.groups, net.towers
    found = []
    for x, weight, bias in parts:
        alpha = net.alpha if normalized and net.lrn else None
        if fused.fits(x, len(weight) // within):
            y = _convolve(layer, x, weight, None, groups)
            found.append(_fused(net, layer, (y, bias, within, alpha, _relu_first(net, layer)), pooled))
            continue
        y = _convolve(layer, x, weight, bias, groups)
        y = F.relu(y) if _relu_first(net, layer) else y
        found.append(_after(net, layer, y if alpha is None else local_response_norm(y, within, alpha), pooled))
    return found


def _convolve(layer: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    if isinstance(layer, FirstConv2d):
        return layer.apply_to(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=groups)


# The code's order differs from the text's (alexnet.py): its conv1 has its ReLU last, and its conv2 has a second normalization.
def _relu_first(net: "AlexNet", layer: nn.Conv2d) -> bool:
    return not (net.as_coded and layer is net.conv1)


def _spatial(net: "AlexNet", layer: nn.Conv2d) -> bool:
    return net.as_coded and net.lrn and layer is net.conv2


def _fused(net: "AlexNet", layer: nn.Conv2d, settings: tuple, pooled: bool) -> torch.Tensor:
    """A convolution's output without its bias, by the operators of fused.py, whose arguments are `settings`."""
    if not (pooled and net.arrangement.pooled and net.window == 3) or _spatial(net, layer):
        return _after(net, layer, fused.norm(*settings), pooled)
    y = fused.norm_pool(*settings)[0]
    return y if _relu_first(net, layer) else F.relu(y)


def _after(net: "AlexNet", layer: nn.Conv2d, y: torch.Tensor, pooled: bool) -> torch.Tensor:
    y = net.spatial_norm(y) if _spatial(net, layer) else y
    y = net.pool(y) if pooled else y
    return y if _relu_first(net, layer) else F.relu(y)


def _joined(towers: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(towers, 1) if len(towers) > 1 else towers[0]


def arrange(net: nn.Module, arrangement: Arrangement) -> None:
    """Lets one of our nets compute in this way."""
    net.arrangement = arrangement
    for layer in net.modules():
        if isinstance(layer, FirstConv2d):
            layer.folded = arrangement.folded


def choices(net: nn.Module) -> list[Callable[[Arrangement], Arrangement]]:
    """What can be changed in a net's arrangement, the largest first."""
    changes: list[Callable[[Arrangement], Arrangement]] = []
    if getattr(net, "towers", 1) > 1:
        changes.append(lambda way: way._replace(apart=not way.apart))
    if any(isinstance(layer, FirstConv2d) for layer in net.modules()):
        changes.append(lambda way: way._replace(folded=not way.folded))
    if getattr(net, "lrn", False):
        changes.append(lambda way: way._replace(pooled=not way.pooled))
    return changes


def fastest(net: nn.Module, seconds: Callable[[Arrangement], float]) -> Arrangement:
    """The arrangement that takes the fewest seconds, changed one by one from the default; `seconds` measures one."""
    best = Arrangement()
    least = seconds(best) if (changes := choices(net)) else math.inf
    for change in changes:
        if (took := seconds(change(best))) < least:
            best, least = change(best), took
    return best


def seconds_on_gpu(net: nn.Module, arrangement: Arrangement, precision: str, crop_size: int) -> float:
    """Seconds of the fastest forward and backward pass over TIMED_IMAGES images, uncompiled; the net stays as it was."""
    device = next(net.parameters()).device
    images = torch.randn(TIMED_IMAGES, 3, crop_size, crop_size, device=device).contiguous(memory_format=torch.channels_last)
    before = net.arrangement
    arrange(net, arrangement)
    least = math.inf
    try:
        for number in range(WARM_UP + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                torch.autograd.grad(net(images).float().sum(), list(net.parameters()))
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                least = min(least, start.elapsed_time(end) / 1e3)
    finally:
        arrange(net, before)
    return least
