"""Decoded images, kept from the first epoch on, so that later epochs only crop.

Both caches hold whole images by record id and never evict one; images that do not fit are decoded again each time.
"""

import ctypes
import threading
from pathlib import Path

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.pixels import RGB, cropped, store_planes
from imagefeed.pipeline.plan import Plan


def available_bytes(device: torch.device) -> int:
    """Memory that a cache may use by default: half of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 // 2


def open_cache(
    kind: str, capacity_bytes: int | None, manifest: Manifest, records: int, plan: Plan, device: torch.device
) -> "HostCache | DeviceCache | None":
    """An empty cache for a loader of a split of so many records; raises UserError if it cannot be."""
    if kind == "none":
        return None
    one_size, side = manifest.options["fit"] == "crop", manifest.options["size"]
    device = device if kind == "device" else torch.device("cpu")
    if capacity_bytes is None:
        capacity_bytes = available_bytes(device)
        if one_size:
            capacity_bytes = min(capacity_bytes, plan.records * side * side * RGB)
    if kind == "host":
        return HostCache(records, capacity_bytes)
    if not one_size:
        raise UserError(
            f"{manifest.root}: its images are of different sizes (--fit short), and the cache on the device holds images of one "
            "size; use `cache=host` or `cache=none`"
        )
    return DeviceCache(records, side, side, capacity_bytes, plan.batch_size, device)


class HostCache:
    """Decoded images as RGB in host memory: 196,608 bytes for 256x256, 252 GB for ImageNet; pages are allocated as it fills.

    Several threads may fill it.
    """

    def __init__(self, records: int, capacity_bytes: int):
        try:
            self._bytes = np.empty(max(capacity_bytes, 1), np.uint8)
        except MemoryError:
            raise UserError(f"a cache of {capacity_bytes / 1e9:,.1f} GB does not fit in memory; lower `cache_bytes`") from None
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._full = False
        self.offsets = np.full(records, -1, np.int64)
        self.sizes = np.zeros((records, 2), np.int32)  # height, width
        self._reserved: dict[int, int] = {}  # offsets of images that are being written, by record id
        self._lock = threading.Lock()

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """(N,) bool, for record ids."""
        return self.offsets[ids] >= 0

    def put(self, record_id: int, address: int, height: int, width: int) -> None:
        """Copies an image, uint8 (height, width, 3) at `address`, if there is room."""
        if to := self.reserve(record_id, height, width):
            ctypes.memmove(to, address, height * width * RGB)
            self.commit([record_id])

    def reserve(self, record_id: int, height: int, width: int) -> int:
        """The address to write an image to, uint8 (height, width, 3), before `commit`; 0 if there is no room, or if the image is
        held or being written already."""
        with self._lock:
            if self.offsets[record_id] >= 0 or record_id in self._reserved:
                return 0
            size = height * width * RGB
            self._full |= self.used_bytes + size > self.capacity_bytes
            if self._full:
                return 0
            # In this order, an interrupt between two lines loses room but no image.
            offset, self.used_bytes = self.used_bytes, self.used_bytes + size
            self.sizes[record_id] = height, width
            self._reserved[record_id] = offset
            return self._bytes.ctypes.data + offset

    def commit(self, record_ids: list[int]) -> None:
        """To be called when the images are written."""
        for record_id in record_ids:
            self.offsets[record_id] = self._reserved.pop(record_id)

    def forget_threads(self) -> None:
        """To be called in a forked process: images that the parent's threads were writing may be reserved again."""
        self._reserved, self._lock = {}, threading.Lock()

    def locate(self, images: np.ndarray, ids: np.ndarray, held: np.ndarray) -> None:
        """Sets address and size of the images that it holds, at the places `held` (M,) of JOBs (N,) for record ids (N,)."""
        images["data"][held] = self._bytes.ctypes.data + self.offsets[ids[held]]
        images["image_height"][held], images["image_width"][held] = self.sizes[ids[held]].T


class DeviceCache:
    """Decoded images as YCbCr 4:2:0 on the loader's device: 98,304 bytes for 256x256, 126 GB for ImageNet.

    Chroma is the mean of 2x2 pixels, and is repeated for them, so an image differs from the decoder's where the decoder smooths
    chroma. All images have one size, with even sides. `scratch` is room for the images of a batch that are not kept.
    """

    def __init__(self, records: int, height: int, width: int, capacity_bytes: int, scratch: int, device: torch.device):
        if height % 2 or width % 2:
            raise UserError(f"the cache on the device needs even sides, not images of {width}x{height}; use `cache=none`")
        self.height, self.width = height, width
        self.bytes_each = height * width * 3 // 2
        self.capacity = min(records, capacity_bytes // self.bytes_each)
        self.used = 0
        self.slots = np.full(records, -1, np.int64)
        try:
            self.planes = torch.empty((self.capacity + scratch, self.bytes_each), dtype=torch.uint8, device=device)
        except RuntimeError:
            size = f"{capacity_bytes / 1e9:,.1f} GB"
            raise UserError(f"a cache of {size} does not fit in the memory of {device}; lower `cache_bytes`") from None

    @property
    def used_bytes(self) -> int:
        return self.used * self.bytes_each

    def holds(self, ids: np.ndarray) -> np.ndarray:
        return self.slots[ids] >= 0

    def put(self, ids: np.ndarray, images: torch.Tensor) -> np.ndarray:
        """Stores images, uint8 (N, height, width, 3) on the device, and returns their slots (N,), valid until the next call;
        images for which there is room stay."""
        slots = self.slots[ids]
        used, scratch = self.used, self.capacity
        kept: dict[int, int] = {}
        for n in np.flatnonzero(slots < 0).tolist():
            record_id = int(ids[n])
            if record_id in kept:  # twice in this batch
                slots[n] = kept[record_id]
            elif used < self.capacity:
                slots[n] = kept[record_id] = used
                used += 1
            else:
                slots[n] = scratch
                scratch += 1
        store_planes(images, self._sent(slots), self.planes)
        # Only now: if the line above fails, such as for lack of memory, the cache must not claim the images.
        self.used = used
        self.slots[list(kept)] = list(kept.values())
        return slots

    def crops(
        self,
        jobs: np.ndarray,
        size: int,
        scale: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        mean_image: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, 3, size, size) on the device, in `out` if given.

        jobs: JOB (N,) of codec.decode, `data` being the slot. On the device, scale: (3,); mean_image: (3, height, width).
        """
        numbers = self._sent(np.stack([jobs[name].astype(np.int64) for name in ("data", "top", "left", "mirror")]))
        means, shape = self._sent(np.ascontiguousarray(jobs["mean"])), (self.height, self.width)
        return cropped(self.planes, numbers, shape, size, means, scale, dtype, channels_last, mean_image, out)

    def _sent(self, values: np.ndarray) -> torch.Tensor:
        """On the device, in the order of the current stream. From pinned memory, because a copy of other memory may keep the host
        waiting until the stream comes to it."""
        tensor = torch.from_numpy(values)
        with torch.cuda.device_of(self.planes):
            return (tensor.pin_memory() if self.planes.is_cuda else tensor).to(self.planes.device, non_blocking=True)
