"""Where threads of the CPU write crops, and how a batch of them becomes a tensor: in host memory, or on a device.

A memory has `form`, the codec's Format of its crops; `uploads`, whether they leave the host; `take(jobs)`, which any thread may
call and which gives each job the address of its crop; `hand(taken)`, in the thread that takes the batches; and `close()`.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from imagefeed.codec.decode import Format
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.pixels import RGB, normalized
from imagefeed.pipeline.source import BufferPool
from imagefeed.pipeline.streams import Event, Streams

MAX_ARRAYS = 4  # of free memory for crops
STAGES = 2  # batches in the device's memory before they are normalized: one is being copied while the other is read
ALIGNED = 64  # bytes


@dataclass
class Taken:
    """Memory for the crops of a batch. `blocked_s` is how long the thread that took it waited for it to be free."""

    jobs: np.ndarray  # JOB (N, views)
    memory: Any  # of HostMemory uint8 (bytes,), of DeviceMemory a Pinned
    means: np.ndarray | None = None  # (N * views, 3) float32, if the device is to subtract them
    blocked_s: float = 0.0


class HostMemory:
    """Crops stay in the host's memory, in the type and memory format of the options."""

    uploads = False

    def __init__(self, options: GraphOptions):
        self.options, self.form = options, crop_format(options)
        self._pool = BufferPool(MAX_ARRAYS)

    def take(self, jobs: np.ndarray) -> Taken:
        crop_bytes = RGB * self.options.crop_size**2 * getattr(torch, self.options.dtype).itemsize
        out = self._pool.take(jobs.size * crop_bytes)
        jobs["out"] = out.ctypes.data + crop_bytes * np.arange(jobs.size).reshape(jobs.shape)
        return Taken(jobs, out)

    def hand(self, taken: Taken) -> torch.Tensor:
        """(N, 3, crop_size, crop_size), or (N, views, ...), in the type and memory format of the options."""
        size, pixels = self.options.crop_size, torch.from_numpy(taken.memory).view(getattr(torch, self.options.dtype))
        last = self.options.memory_format == "channels_last"
        images = pixels.view(-1, size, size, RGB).movedim(-1, -3) if last else pixels.view(-1, RGB, size, size)
        return self.options.by_image(images)

    def close(self) -> None:
        pass


@dataclass
class Pinned:
    """Host memory that the device copies by itself, and the end of the last copy of it."""

    memory: torch.Tensor  # uint8
    copied: Event | None = None


@dataclass
class Staged:
    """Memory of the device for a copy, and the end of the last use of it."""

    memory: torch.Tensor  # uint8
    used: Event = field(repr=False)


class DeviceMemory:
    """Crops go to a device as bytes, a fourth of what float32 would take: into one of `options.prefetch` + 1 pinned buffers, from
    there on a side stream to the device, and are normalized in the current stream. Events order all that, so that the host waits
    only for a pinned buffer whose copy is not over yet.
    """

    uploads = True

    def __init__(self, options: GraphOptions, images: int, streams: Streams):
        self.options, self.streams = options, streams
        self.form = Format("uint8", channels_last=True)
        self._as_bytes = options.dtype == "uint8"
        self._crop_bytes = RGB * options.crop_size**2
        self._numbers = RGB * 4 if self._as_bytes else crop_numbers(options) * 4  # bytes beside a crop
        crops = images * options.views
        self._size = -(-crops * self._crop_bytes // ALIGNED) * ALIGNED + crops * self._numbers
        self._free = deque(Pinned(torch.empty(0)) for _ in range(options.prefetch + 1))
        self._stages: deque[Staged] = deque()
        device = streams.device
        self._scale = torch.tensor(options.scale, dtype=torch.float32, device=device)
        mean_image = planar(options.mean_image)
        self._mean_image = None if mean_image is None else torch.from_numpy(mean_image).to(device)
        self._lock = threading.Lock()

    def take(self, jobs: np.ndarray) -> Taken:
        start_s = time.perf_counter()
        with self._lock:
            pinned = self._free.popleft()
        if pinned.copied is None:
            pinned.memory = self.streams.pinned(self._size)
        else:
            self.streams.wait(pinned.copied)
        taken = Taken(jobs, pinned, blocked_s=0.0 if pinned.copied is None else time.perf_counter() - start_s)
        jobs["out"] = pinned.memory.data_ptr() + self._crop_bytes * np.arange(jobs.size).reshape(jobs.shape)
        if not self._as_bytes:
            taken.means = jobs["mean"].reshape(-1, RGB).copy()
            jobs["mean"] = 0
        return taken

    def hand(self, taken: Taken) -> torch.Tensor:
        """As HostMemory, on the device, in the order of the current stream."""
        count, pinned = taken.jobs.size, taken.memory
        crops_end = count * self._crop_bytes
        numbers_at = -(-crops_end // ALIGNED) * ALIGNED
        end = numbers_at + count * self._numbers
        if taken.means is not None:
            beside = self._beside(taken.jobs, taken.means)
            pinned.memory.numpy()[numbers_at:end].view(np.float32)[:] = beside.ravel()
        staged = self._stage()
        pinned.copied = self.streams.queue(
            lambda: staged.memory[:end].copy_(pinned.memory[:end], non_blocking=True), [staged.used]
        )
        with self._lock:
            self._free.append(pinned)
        self.streams.follow(pinned.copied)
        size = self.options.crop_size
        crops = staged.memory[:crops_end].view(count, size, size, RGB)
        numbers = None
        if taken.means is not None:
            numbers = staged.memory[numbers_at:end].view(torch.float32).view(beside.shape)
        images = self._normalized(crops, numbers)
        staged.used = self.streams.mark()
        return self.options.by_image(images)

    def close(self) -> None:
        """Waits for what is being copied from and into the memory that is given back."""
        self.streams.close()
        self._stages.clear()

    def _stage(self) -> Staged:
        if len(self._stages) < STAGES:
            memory = torch.empty(self._size, dtype=torch.uint8, device=self.streams.device)
            # Not before what the current stream still does with this memory, which others may have had before.
            self._stages.append(Staged(memory, self.streams.mark()))
        else:
            self._stages.rotate(-1)
        return self._stages[-1]

    def _beside(self, jobs: np.ndarray, means: np.ndarray) -> np.ndarray:
        """(crops, 3) float32: the mean of each crop; with a mean image (crops, 6): its top, left and mirror as well."""
        if self._mean_image is None:
            return means
        places = np.stack([jobs[name].ravel() for name in ("top", "left", "mirror")], 1)
        return np.concatenate((means, places.astype(np.float32)), 1)

    def _normalized(self, crops: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        options, last = self.options, self.options.memory_format == "channels_last"
        if numbers is None:
            pixels = crops.movedim(-1, -3)
            return pixels.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        means, places = numbers[:, :RGB], None
        if self._mean_image is not None:
            places = numbers[:, RGB:].to(torch.int64)
        return normalized(crops, means, self._scale, getattr(torch, options.dtype), last, self._mean_image, places)


CropMemory = HostMemory | DeviceMemory


def crop_numbers(options: GraphOptions) -> int:
    return 2 * RGB if options.mean_image is not None else RGB


def crop_format(options: GraphOptions) -> Format:
    scale = np.array(options.scale, np.float32)
    return Format(options.dtype, options.memory_format == "channels_last", scale, planar(options.mean_image))


def planar(mean_image: np.ndarray | None) -> np.ndarray | None:
    """(height, width, 3) to (3, height, width) float32."""
    return None if mean_image is None else np.ascontiguousarray(mean_image.transpose(2, 0, 1), np.float32)
