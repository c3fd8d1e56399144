"""A step of training, as train.py takes it and as the profiler measures it."""

import contextlib
import ctypes
import math
import os
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

EMULATED = 4  # times as slow in bfloat16: the processor has no instructions for it


def train_step(
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    precision: str,
    on_phase: Callable[[str], None] = lambda phase: None,
    layout: torch.memory_format = torch.channels_last,
) -> torch.Tensor:
    """Forward, backward and update; returns the mean loss of the batch, still on the device.

    `layout` is what images are put into, and should be the weights'; any but channels-last is slower (docs/log.md). `on_phase` is
    told when "forward", "backward" and "optimizer" begin, and of the "end"; on a GPU that is when the host has asked for them.
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
    """(N, classes) float32 logits of (N, 3, height, width) images; `precision` is float32 or bfloat16."""
    images = images.contiguous(memory_format=layout)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model(images).float()


def can_compile(device: torch.device) -> bool:
    """Whether there is a compiler that torch.compile needs on this device: of C on a GPU (Triton), of C++ on a CPU."""
    names = ("gcc", "clang", os.environ.get("CC")) if device.type == "cuda" else ("g++", "clang++", os.environ.get("CXX"))
    return any(shutil.which(name) for name in names if name)


def choose_precision(device: torch.device) -> str:
    """bfloat16 where it is the faster; on CPUs that differs by a factor of two either way, so conv2 is timed."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    # One image first: processors without such arithmetic take 300 times as long in it (AMD Zen 1: 27 s for what follows).
    for images, times in ((1, 2), (16, 4)):
        single, half = (time_conv2(dtype, images, times) for dtype in (torch.float32, torch.bfloat16))
        if half > EMULATED * single:
            break
    return "bfloat16" if half < single else "float32"


def time_conv2(dtype: torch.dtype, images: int, times: int) -> float:
    """Seconds of the fastest forward and backward pass of conv2."""
    layer = torch.nn.Conv2d(96, 256, 5, padding=2, groups=2).to(dtype, memory_format=torch.channels_last)
    x = torch.zeros(images, 96, 27, 27, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    fastest = math.inf
    for _ in range(times):
        start = time.perf_counter()
        layer(x).sum().backward()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def keep_memory() -> None:
    """Has glibc keep what large tensors on the CPU give back: taking it anew page by page costs up to half of a step.

    By default it returns blocks of over 32 MB at once. -3 is M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD (mallopt(3)).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)
