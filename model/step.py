"""One training step, as training runs it and as the profiler measures it."""

import contextlib
import ctypes
import importlib.util
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

EMULATED = 4  # a processor this many times slower in bfloat16 emulates it


def train_step(
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    precision: str,
    on_phase: Callable[[str], None] = lambda phase: None,
    layout: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """Runs forward, backward and update; returns the mean loss of the batch, still on the device.

    `layout` is the images' memory format and should be the weights'; any but channels-last is slower (docs/log.md). `on_phase` is
    called when "forward", "backward" and "optimizer" begin and at the "end"; on a GPU, when the host has queued them.
    """
    on_phase("forward")
    optimizer.zero_grad()
    loss = F.cross_entropy(forward(model, images, precision, layout), labels)
    on_phase("backward")
    loss.backward()
    on_phase("optimizer")
    optimizer.step()
    on_phase("end")
    return loss.detach()


def forward(
    model: torch.nn.Module, images: torch.Tensor, precision: str, layout: torch.memory_format = torch.channels_last
) -> torch.Tensor:
    """Returns (N, classes) float32 logits for (N, 3, height, width) images; `precision` is float32 or bfloat16."""
    images = images.contiguous(memory_format=layout)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model(images).float()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: on a GPU Triton, a C compiler and Python's headers, on a CPU a C++ compiler."""
    if device.type != "cuda":
        return any(shutil.which(name) for name in ("g++", "clang++", os.environ.get("CXX")) if name)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    has_triton = importlib.util.find_spec("triton") is not None
    return has_triton and headers.exists() and any(shutil.which(name) for name in ("gcc", "clang", os.environ.get("CC")) if name)


def choose_precision(device: torch.device) -> str:
    """Returns bfloat16 if it is faster. CPUs differ by a factor of two either way, so conv2 is timed on them.

    GPUs before Ampere emulate it, which PyTorch counts as support by default.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # One image first: processors that emulate bfloat16 take 300 times as long (AMD Zen 1: 27 s for 16 images).
    for images, times in ((1, 2), (16, 4)):
        single, half = (time_conv2(dtype, images, times) for dtype in (torch.float32, torch.bfloat16))
        if half > EMULATED * single:
            break
    return "bfloat16" if half < single else "float32"


def time_conv2(dtype: torch.dtype, images: int, times: int) -> float:
    """Returns the seconds of the fastest forward and backward pass of conv2."""
    layer = torch.nn.Conv2d(96, 256, 5, padding=2, groups=2).to(dtype, memory_format=torch.channels_last)
    x = torch.zeros(images, 96, 27, 27, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    fastest = math.inf
    for _ in range(times):
        start = time.perf_counter()
        layer(x).sum().backward()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def prepare_gpu() -> None:
    """Lets cuDNN time its kernels, and full layers take TF32 as convolutions do: PyTorch allows it to the latter alone."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")


def compiled(net: torch.nn.Module, mode: str, in_parts: bool = False) -> torch.nn.Module:
    """torch.compile; `in_parts` compiles convolutional and full layers each by itself, if the net has both apart.

    The gradients of what is compiled together all come at the end of its backward pass. In parts, those of the full layers, 96 %
    of the bytes, are sent to other ranks while the convolutional ones are computed.
    """
    return _InParts(net, mode) if in_parts and hasattr(net, "classify") else torch.compile(net, mode=mode)


class _InParts(torch.nn.Module):
    def __init__(self, net: torch.nn.Module, mode: str):
        super().__init__()
        self.net = net
        self.parts = [torch.compile(part, mode=mode) for part in (net.features, net.classify)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


def keep_memory() -> None:
    """Makes glibc keep the memory of freed tensors: by default it returns blocks of over 32 MB at once, and mapping them again
    page by page costs up to half of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD (mallopt(3))
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
