"""What keeps a GPU from being used, or from being used well, and what to do about it, in one sentence each."""

import ctypes
import functools
import logging
import re
from collections.abc import Callable

import torch

from imagefeed.dataset.errors import OUT_OF_MEMORY

log = logging.getLogger("imagefeed")
OLD_DRIVER = re.compile(r"driver version is insufficient|driver .{0,40}too old", re.IGNORECASE)
NO_DEVICE = re.compile(r"CUDA is not available|no CUDA-capable device", re.IGNORECASE)
VIDEO = "libnvcuvid.so.1"  # the driver's video decoder, through which nvJPEG reaches the hardware JPEG decoder


def why_unusable(cuda: str | None = torch.version.cuda, load: Callable = ctypes.CDLL) -> str:
    """Why PyTorch, built for version `cuda` ("13.0"), cannot use a GPU here, and what to do; to follow "device cuda: "."""
    if cuda is None:
        return "this PyTorch is built for CPUs; install one built for CUDA, or use `device=cpu`"
    try:
        driver, version = load("libcuda.so.1"), ctypes.c_int()
        failed = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "no NVIDIA driver (libcuda.so.1) is found; install it, start the container with --gpus all, or use `device=cpu`"
    major, minor = version.value // 1000, version.value % 1000 // 10
    if not failed and major < int(cuda.partition(".")[0]):
        return (
            f"the driver is too old: it supports CUDA {major}.{minor}, and this PyTorch is built for {cuda}; update the driver, "
            f"or install PyTorch for CUDA {major}"
        )
    return "the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use `device=cpu`"


def why_no_hardware_decoder(load: Callable = ctypes.CDLL) -> str:
    """Empty if the driver's library for the hardware JPEG decoder can be loaded. Without it DALI decodes all by CUDA, in
    silence; in containers it is often left out."""
    try:
        load(VIDEO)
    except OSError:
        return (
            f"{VIDEO} is not found, so the hardware JPEG decoder stays idle; start the container with "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or install the driver's libnvidia-decode"
        )
    return ""


@functools.cache
def warn_without_hardware_decoder() -> None:
    """Says so once in a process."""
    if why := why_no_hardware_decoder():
        log.warning("%s", why)


def trouble_of(reason: str, on_gpu: bool) -> str:
    """What is wrong and what to do if an error of DALI or of PyTorch is the machine's fault; empty if it is not."""
    if OUT_OF_MEMORY.search(reason):
        return out_of_memory(reason, on_gpu)
    if OLD_DRIVER.search(reason):
        return "the NVIDIA driver is too old for this DALI; update it, or install DALI for CUDA 12 (pip install '.[dali12]')"
    if NO_DEVICE.search(reason):
        return "DALI finds no usable GPU; check nvidia-smi, or use `device=cpu`"
    return ""


def out_of_memory(reason: str, on_gpu: bool) -> str:
    on_host = not on_gpu or re.search(r"DefaultCPUAllocator|\bhost\b|bad_alloc|pinned", reason)
    where = "memory" if on_host else "memory of the GPU"
    return f"out of {where}: lower `batch_size`, `prefetch` or `cache_bytes`, or end other programs that use it"
