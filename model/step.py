"""One training step, as training runs it and as the profiler measures it."""

import contextlib
import ctypes
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable

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
    """Whether torch.compile finds the compiler it needs: C++ on a CPU, C on a GPU, where Triton also needs Python's headers."""
    on_gpu = device.type == "cuda"
    names = ("gcc", "clang", os.environ.get("CC")) if on_gpu else ("g++", "clang++", os.environ.get("CXX"))
    headers = not on_gpu or os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return headers and any(shutil.which(name) for name in names if name)


def choose_precision(device: torch.device) -> str:
    """Returns bfloat16 if it is faster. CPUs differ by a factor of two either way, so conv2 is timed on them."""
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


def keep_memory() -> None:
    """Makes glibc keep the memory of freed tensors: by default it returns blocks of over 32 MB at once, and mapping them again
    page by page costs up to half of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD (mallopt(3))
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
