"""The most that this machine can do: its disk, its memory, libjpeg-turbo, matrix products, copies to a GPU."""

import contextlib
import math
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.profiler.accounting import mark, seconds_between, synchronize
from imagefeed.pipeline.profiler.machine import PAGE, pages_of

READERS = 16  # requests in flight; an NVMe disk takes more, a spinning one fewer
COPIED = {"cuda": 1 << 28, "cpu": 1 << 26}  # bytes: more than caches hold, and little enough where memory is short
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices: 2 ms of a GPU of 600 TFLOP/s, 10 ms of two cores
CPU = torch.device("cpu")


def fastest(work: Callable[[], object], seconds: float, device: torch.device = CPU) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, at least three; on a GPU by events."""
    best, begin_s, calls = math.inf, time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - begin_s < seconds:
        start = mark(device)
        work()
        end = mark(device)
        synchronize(device)
        best = min(best, seconds_between(start, end))
        calls += 1
    return best


def disk_rate(manifest: Manifest, split: str, ids: np.ndarray, seconds: float) -> tuple[float, float]:
    """(records/s, bytes/s) of the disk itself: records read past the page cache (O_DIRECT), READERS at a time; (0, 0) if the
    file system offers no such reads."""
    with contextlib.ExitStack() as stack:
        reads = []
        try:
            for path, _, ranges in pages_of(manifest, split, ids):
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
                stack.callback(os.close, file)
                reads += [(file, PAGE * begin, PAGE * (end - begin)) for begin, end in ranges]
            np.random.default_rng(0).shuffle(reads)
            longest = max(size for _, _, size in reads)
            start_s = time.perf_counter()

            def read(part: list) -> tuple[int, int]:
                done = 0, 0
                with mmap.mmap(-1, longest) as buffer:  # O_DIRECT wants whole pages
                    for file, begin, size in part:
                        if time.perf_counter() > start_s + seconds:
                            break
                        with memoryview(buffer)[:size] as view:
                            done = done[0] + 1, done[1] + os.preadv(file, [view], begin)
                return done

            with ThreadPoolExecutor(READERS) as pool:
                done = np.array(list(pool.map(read, (reads[n::READERS] for n in range(READERS)))))
        except OSError:
            return 0.0, 0.0
        return tuple((done.sum(0) / (time.perf_counter() - start_s)).tolist())


def memory_rate(seconds: float, device: torch.device) -> float:
    """Bytes/s read and written by all threads together, of arrays that no cache holds."""
    source = torch.ones(COPIED[device.type] // 4, dtype=torch.float32, device=device)
    into = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: into.copy_(source), seconds, device)


def copy_rate(seconds: float, device: torch.device) -> float:
    """Bytes/s from pinned host memory to a GPU."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, pin_memory=True)
    into = torch.empty_like(source, device=device)
    return source.nbytes / fastest(lambda: into.copy_(source, non_blocking=True), seconds, device)


def decode_rate(jpegs: list[np.ndarray], seconds: float) -> float:
    """Images/s of libjpeg-turbo alone on one core."""
    return len(jpegs) / fastest(lambda: [simplejpeg.decode_jpeg(data.data) for data in jpegs], seconds)


@torch.inference_mode()
def matrix_rate(precision: str, seconds: float, device: torch.device) -> float:
    """Floating-point operations per second that PyTorch gets from the device at its current clock; takes about `seconds`.

    That is the fastest of some square matrix products, and on a CPU, where they are faster by a sixth, of some convolutions of
    the paper's conv3; a data sheet promises more. With neighbors on the machine it is too low, and the MFU too high, beyond 1
    if they leave. `precision` is float32 or bfloat16.
    """
    dtype = getattr(torch, precision)
    own = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        # Zeros or ones cost a GPU less power, so that it would clock higher than it ever does in training.
        return torch.randn(*shape, generator=own, device=device).to(dtype)

    side, each_s = SIDE[device.type], seconds / (1 if device.type == "cuda" else 2)
    a, product = random(side, side), random(side, side)
    rate = 2 * side**3 / fastest(lambda: torch.mm(a, a, out=product), each_s, device)
    if device.type == "cpu":
        images, kernels = random(32, 256, 13, 13), random(384, 256, 3, 3)
        images, kernels = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, kernels))
        flops = 2 * 32 * 13**2 * kernels.numel()
        rate = max(rate, flops / fastest(lambda: F.conv2d(images, kernels, padding=1), each_s, device))
    return rate


def machine_facts(precision: str, seconds: float, device: torch.device) -> dict[str, float]:
    """The most that memory, matrix products and copies to a GPU can do."""
    found = {"memory_bytes_per_s": memory_rate(seconds, device)}
    found["matrix_flop_per_s"] = matrix_rate(precision, seconds, device)
    if device.type == "cuda":
        found["copy_bytes_per_s"] = copy_rate(seconds, device)
    return found
