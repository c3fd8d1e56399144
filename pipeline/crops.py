"""Crops of whole decoded images, where not the graph but a cache or the CPU's kernel makes them; the same numbers."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from imagefeed.pipeline import kernels
from imagefeed.pipeline.cache import RGB, DeviceCache, HostCache
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.plan import offset
from imagefeed.pipeline.source import Fed

# What kernels.crop takes for each crop.
JOB = np.dtype([("address", "<i8"), *((name, "<i4") for name in ("height", "width", "top", "left", "mirror", "unused"))])
MAX_ARRAYS = 4


class HostCropper:
    """Crops in host memory, by `kernels.crop` on several threads; images come from the decoder and from `cache`, if any.

    Memory of batches that nobody holds any more is taken again: fresh pages for 77 MB cost more than the crops.
    """

    def __init__(self, options: GraphOptions, uint8: bool, cache: HostCache | None):
        self.options, self.cache = options, cache
        self.scale = np.array(options.scale, np.float32)
        self.mean_image = planar(options.mean_image)
        self.dtype = np.uint8 if uint8 else np.float32
        self._pool = ThreadPoolExecutor(options.num_threads)
        self._arrays: list[np.ndarray] = []

    def close(self) -> None:
        self._pool.shutdown()
        self._arrays.clear()

    def __call__(self, fed: Fed, decoded) -> torch.Tensor:
        """(N * views, 3, crop_size, crop_size) float32 or uint8, on the CPU; `decoded` are DALI's images of the places `fed.missing`."""
        jobs = np.zeros(len(fed.ids), JOB)
        if self.cache is not None:
            held = np.ones(len(fed.ids), bool)
            held[fed.missing] = False
            ids = fed.ids[held]
            jobs["address"][held] = self.cache.addresses(ids)
            jobs["height"][held], jobs["width"][held] = self.cache.sizes[ids].T
        if decoded is not None:
            if self.options.device_id is not None:
                decoded = decoded.as_cpu()
            found = np.zeros(len(fed.missing), JOB)
            if decoded.is_dense_tensor():  # of one size, one after the other
                whole = decoded.as_tensor()
                count, height, width, _ = whole.shape()
                found["height"], found["width"] = height, width
                found["address"] = whole.data_ptr() + np.arange(count) * (height * width * RGB)
            else:  # 8 us for each
                for n, tensor in enumerate(decoded):
                    found[n] = (tensor.data_ptr(), *tensor.shape()[:2], 0, 0, 0, 0)
            jobs[fed.missing] = found
            if self.cache is not None:
                for record_id, job in zip(fed.ids[fed.missing].tolist(), found.tolist(), strict=True):
                    self.cache.put(record_id, *job[:3])
        jobs, means = look(fed, jobs, self.options)
        out = self._array((len(jobs), RGB, self.options.crop_size, self.options.crop_size))
        cuts = np.linspace(0, len(jobs), self.options.num_threads + 1).astype(int).tolist()
        fixed = (jobs, self.options.crop_size, means, self.scale, self.mean_image, out, self.dtype is np.uint8)
        for share in [self._pool.submit(kernels.crop, *fixed, *cut) for cut in itertools.pairwise(cuts)]:
            share.result()
        return torch.from_numpy(out)

    def _array(self, shape: tuple[int, ...]) -> np.ndarray:
        for array in self._arrays:
            # A tensor made of it, and any view of that, refers to it; here are the list, the loop and the call.
            if array.shape == shape and sys.getrefcount(array) == 3:
                return array
        array = np.empty(shape, self.dtype)
        self._arrays = [*self._arrays[-MAX_ARRAYS + 1 :], array]
        return array


class DeviceCropper:
    """Crops of the images that `cache` holds, on its device."""

    def __init__(self, options: GraphOptions, uint8: bool, cache: DeviceCache):
        self.options, self.uint8, self.cache = options, uint8, cache
        self.scale = np.array(options.scale, np.float32)
        mean_image = planar(options.mean_image)
        self.mean_image = None if mean_image is None else torch.from_numpy(mean_image).to(cache.planes.device)

    def close(self) -> None:
        self.mean_image = None

    def __call__(self, fed: Fed, decoded) -> torch.Tensor:
        """(N * views, 3, crop_size, crop_size) float32 or uint8, on the device; `decoded` are DALI's images of the places `fed.missing`."""
        jobs = np.zeros(len(fed.ids), JOB)
        jobs["address"], jobs["height"], jobs["width"] = self.cache.slots[fed.ids], self.cache.height, self.cache.width
        if decoded is not None:
            images = torch.from_dlpack(decoded.as_tensor())
            jobs["address"][fed.missing] = self.cache.put(fed.ids[fed.missing], images)
        jobs, means = look(fed, jobs, self.options)
        where = (jobs[name] for name in ("address", "top", "left", "mirror"))
        crops = self.cache.crops(*where, self.options.crop_size, means, self.scale, self.mean_image)
        return crops.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8) if self.uint8 else crops


def look(fed: Fed, jobs: np.ndarray, options: GraphOptions) -> tuple[np.ndarray, np.ndarray]:
    """One job for each view of each image (N * views,), with its crop and mirror, and the means (N * views, 3)."""
    jobs = jobs.repeat(options.views)
    places = fed.look.places.swapaxes(0, 1).reshape(-1, 2)
    jobs["top"] = offset(places[:, 0], jobs["height"] - options.crop_size)
    jobs["left"] = offset(places[:, 1], jobs["width"] - options.crop_size)
    jobs["mirror"] = fed.look.mirrors.swapaxes(0, 1).reshape(-1)
    return jobs, fed.means.repeat(options.views, 0)


def planar(mean_image: np.ndarray | None) -> np.ndarray | None:
    """(height, width, 3) to (3, height, width) float32."""
    return None if mean_image is None else np.ascontiguousarray(mean_image.transpose(2, 0, 1), np.float32)
