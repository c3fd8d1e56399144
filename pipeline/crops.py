"""Crops of whole decoded images, by the CPU's kernel or from a cache; the graph's own crops are the same."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from imagefeed.pipeline import kernels
from imagefeed.pipeline.cache import RGB, DeviceCache, HostCache
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.plan import offset
from imagefeed.pipeline.source import BufferPool, InputBatch

# A crop for kernels.crop; `address` is of the whole image, or its slot in a device cache.
JOB = np.dtype([("address", "<i8"), *((name, "<i4") for name in ("height", "width", "top", "left", "mirror", "unused"))])
MAX_ARRAYS = 4  # of free memory for crops


class HostCropper:
    """Crops in host memory, by `kernels.crop` on several threads."""

    def __init__(self, options: GraphOptions, cache: HostCache | None = None):
        self.options, self.cache = options, cache
        self.scale = np.array(options.scale, np.float32)
        self.mean_image = planar(options.mean_image)
        self.dtype = np.dtype(np.uint8 if options.dtype == "uint8" else np.float32)
        self._threads = ThreadPoolExecutor(options.num_threads)
        self._pool = BufferPool(MAX_ARRAYS)

    def close(self) -> None:
        self._threads.shutdown()

    def __call__(self, batch: InputBatch, decoded) -> torch.Tensor:
        """(N * views, 3, crop_size, crop_size) float32 or uint8, on the CPU; `decoded` are DALI's images of `batch.missing`."""
        jobs = np.zeros(len(batch.ids), JOB)
        if self.cache is not None:
            held = np.ones(len(batch.ids), bool)
            held[batch.missing] = False
            ids = batch.ids[held]
            jobs["address"][held] = self.cache.addresses(ids)
            jobs["height"][held], jobs["width"][held] = self.cache.sizes[ids].T
        if decoded is not None:
            if self.options.device_id is not None:
                decoded = decoded.as_cpu()
            images = np.zeros(len(batch.missing), JOB)
            if decoded.is_dense_tensor():  # of one size, one after the other
                tensor = decoded.as_tensor()
                count, height, width, _ = tensor.shape()
                images["height"], images["width"] = height, width
                images["address"] = tensor.data_ptr() + np.arange(count) * (height * width * RGB)
            else:  # 8 us each
                for n, tensor in enumerate(decoded):
                    images[n] = (tensor.data_ptr(), *tensor.shape()[:2], 0, 0, 0, 0)
            jobs[batch.missing] = images
            if self.cache is not None:
                for record_id, image in zip(batch.ids[batch.missing].tolist(), images.tolist(), strict=True):
                    self.cache.put(record_id, *image[:3])
        jobs, means = crop_jobs(batch, jobs, self.options)
        shape = (len(jobs), RGB, self.options.crop_size, self.options.crop_size)
        out = self._pool.take(int(np.prod(shape)) * self.dtype.itemsize).view(self.dtype).reshape(shape)
        cuts = np.linspace(0, len(jobs), self.options.num_threads + 1).astype(int).tolist()
        fixed = (jobs, self.options.crop_size, means, self.scale, self.mean_image, out, self.dtype == np.uint8)
        for part in [self._threads.submit(kernels.crop, *fixed, *cut) for cut in itertools.pairwise(cuts)]:
            part.result()
        return torch.from_numpy(out)


class DeviceCropper:
    """Crops on the device of `cache`, of the images that it holds."""

    def __init__(self, options: GraphOptions, cache: DeviceCache):
        self.options, self.cache = options, cache
        self.scale = np.array(options.scale, np.float32)
        mean_image = planar(options.mean_image)
        self.mean_image = None if mean_image is None else torch.from_numpy(mean_image).to(cache.planes.device)

    def close(self) -> None:
        self.mean_image = None

    def __call__(self, batch: InputBatch, decoded) -> torch.Tensor:
        """As HostCropper, on the device."""
        jobs = np.zeros(len(batch.ids), JOB)
        jobs["address"], jobs["height"], jobs["width"] = self.cache.slots[batch.ids], self.cache.height, self.cache.width
        if decoded is not None:
            images = torch.from_dlpack(decoded.as_tensor())
            jobs["address"][batch.missing] = self.cache.put(batch.ids[batch.missing], images)
        jobs, means = crop_jobs(batch, jobs, self.options)
        crops = self.cache.crops(jobs, self.options.crop_size, means, self.scale, self.mean_image)
        return crops.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8) if self.options.dtype == "uint8" else crops


def crop_jobs(batch: InputBatch, images: np.ndarray, options: GraphOptions) -> tuple[np.ndarray, np.ndarray]:
    """A job (N * views,) for each view of the JOBs `images` (N,), and the means (N * views, 3)."""
    jobs = images.repeat(options.views)
    places = batch.augmentation.places.swapaxes(0, 1).reshape(-1, 2)
    jobs["top"] = offset(places[:, 0], jobs["height"] - options.crop_size)
    jobs["left"] = offset(places[:, 1], jobs["width"] - options.crop_size)
    jobs["mirror"] = batch.augmentation.mirrors.swapaxes(0, 1).reshape(-1)
    return jobs, batch.means.repeat(options.views, 0)


def planar(mean_image: np.ndarray | None) -> np.ndarray | None:
    """(height, width, 3) to (3, height, width) float32."""
    return None if mean_image is None else np.ascontiguousarray(mean_image.transpose(2, 0, 1), np.float32)
