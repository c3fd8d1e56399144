"""Which form of each layer of the paper's net is fastest on this device, forward and backward?

    python -m benchmarks.layers [--batch-size 1024] [--device cuda] [--seconds 40]     # results under "layers" or "layers-cuda"

conv2, conv4 and conv5 as grouped convolutions, channels-last and contiguous, and as a dense one for each tower; conv1 over pixels
and over cells of 4x4 (space-to-depth); normalization alone, by the plain formula and as the net does it. bfloat16 on a GPU.
"""

import functools
from collections.abc import Callable, Iterator

import click
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import harness
from imagefeed.model.fused import norm_pool
from imagefeed.model.lrn import ALPHA, formula, local_response_norm
from imagefeed.pipeline.arguments import choose_device

GROUPED = {"conv2": (96, 256, 27, 5), "conv4": (384, 384, 13, 3), "conv5": (384, 256, 13, 3)}
NORMALIZED = {"conv1": (96, 55), "conv2": (256, 27)}
LEAST_S = 3


def passes(layer: Callable, x: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of a layer, again and again."""
    x.requires_grad_()
    wanted = [x, *(layer.parameters() if isinstance(layer, nn.Module) else ())]
    grad = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def ways(batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Callable]]]:
    """Names, and what makes the passes of each."""

    def images(channels: int, size: int, layout=torch.channels_last) -> torch.Tensor:
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        return x.contiguous(memory_format=layout)

    def convolution(channels: int, maps: int, size: int, kernel: int, groups: int, layout, **options) -> Callable:
        layer = nn.Conv2d(channels, maps, kernel, groups=groups, **{"padding": kernel // 2} | options)
        return passes(layer.to(device, dtype, memory_format=layout), images(channels, size, layout))

    def towers(channels: int, maps: int, size: int, kernel: int) -> Callable:
        both = [convolution(channels // 2, maps // 2, size, kernel, groups=1, layout=torch.channels_last) for _ in range(2)]
        return lambda: [one() for one in both]

    for name, shape in GROUPED.items():
        for layout in (torch.channels_last, torch.contiguous_format):
            words = "channels-last" if layout is torch.channels_last else "contiguous"
            yield f"{name}, grouped, {words}", functools.partial(convolution, *shape, groups=2, layout=layout)
        yield f"{name}, dense for each tower", functools.partial(towers, *shape)
    last = {"groups": 1, "layout": torch.channels_last, "padding": 0}
    yield "conv1, pixels", functools.partial(convolution, 3, 96, 228, 11, stride=4, **last)
    yield "conv1, cells of 4x4", functools.partial(convolution, 48, 96, 57, 3, **last)
    for name, (channels, size) in NORMALIZED.items():
        for words, norm in (("formula", formula), ("as in the net", local_response_norm)):
            layer = functools.partial(norm, towers=2)
            yield f"normalization after {name}, {words}", lambda layer=layer, c=channels, s=size: passes(layer, images(c, s))
        both = functools.partial(norm_pool, bias=None, towers=2, alpha=ALPHA, relu=True)
        yield (
            f"normalization and pool after {name}, one kernel",
            lambda c=channels, s=size, f=both: passes(lambda x: f(x)[0], images(c, s)),
        )
        yield f"pool after {name}", lambda c=channels, s=size: passes(lambda x: F.max_pool2d(x, 3, 2), images(c, s))


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True)
@harness.DEVICE
@harness.seconds_option(40.0, "Budget; forms that do not fit are left out.")
@click.option("--window", "window_s", default=0.5, show_default=True, help="Seconds per form.")
def main(batch_size: int, device: str, seconds: float, window_s: float) -> None:
    """Time the forms of each layer."""
    device = choose_device(device)
    torch.backends.cudnn.benchmark = True
    notes = harness.Notes(harness.named("layers", device), "torch", seconds=seconds)
    found: dict[str, object] = {}
    for name, make in ways(batch_size, device, torch.bfloat16 if device.type == "cuda" else torch.float32):
        if notes.left_s < LEAST_S:
            found[name] = "no time was left"
        else:
            try:
                rate = harness.window_rate(make(), batch_size, window_s, device, 3)
                found[name] = round(1e3 * batch_size / rate, 3)
            except Exception as error:  # out of memory, say: the other forms go on
                found[name] = f"{type(error).__name__}: {str(error)[:150]}"
        notes["milliseconds"] = found


if __name__ == "__main__":
    main()
