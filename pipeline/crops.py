"""From input batches to crops: DALI's graph makes them, or codec/ crops what DALI decodes or a cache holds.

Each way is a class with `next() -> (images, input batch)`, in the calling thread, and `close()`. Crops of whole images, on the
CPU or from a cache, equal the graph's own.
"""

import dataclasses
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from imagefeed.codec.decode import JOB, convert_jobs
from imagefeed.pipeline.cache import RGB, DeviceCache, HostCache
from imagefeed.pipeline.graph import GraphOptions, decode_pipeline, image_pipeline
from imagefeed.pipeline.handover import CropMemory, planar
from imagefeed.pipeline.pixels import normalized
from imagefeed.pipeline.plan import offset
from imagefeed.pipeline.source import InputBatch, Side, Source, graph_inputs
from imagefeed.pipeline.streams import Event, Streams

# Batches without a record to decode, after which the decoder is stopped; it restarts in 50 ms.
MAX_IDLE_STEPS = 256


class GraphBatches:
    """DALI decodes and crops."""

    def __init__(self, source: Source | Side, options: GraphOptions, device: torch.device, cropper: "Cropper | None" = None):
        self.source, self.options, self.device, self.cropper = source, options, device, cropper
        self._pipeline = None
        self._pending: deque[InputBatch] = deque()  # in the pipeline, or not yet handed out

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        images = torch.from_dlpack(self._run(image_pipeline).as_tensor())
        if self.options.memory_format == "channels_last":
            images = images.movedim(-1, -3)  # the shape of NCHW; the strides are PyTorch's channels_last
        return images.to(getattr(torch, self.options.dtype)), self._pending.popleft()

    def close(self) -> None:
        self._pipeline = None
        if self.cropper is not None:
            self.cropper.close()

    def _run(self, build: Callable):
        """DALI's next output. On a GPU it is ready in the order of `_stream`; the host does not wait for it."""
        if self._pipeline is None:
            self._pipeline = build(self._feed, self.source.plan.batch_size, self._graph_options())
        spans, start_s = self.source.spans, time.perf_counter()
        before = len(spans)
        (output,) = self._pipeline.run(self._stream())
        # DALI first requests a later batch, in this thread, and then waits for the current one.
        for _, read_s, seconds in spans[before:]:
            start_s = read_s + seconds
        spans.append(("decode", start_s, time.perf_counter() - start_s))
        return output

    def _stream(self) -> torch.cuda.Stream | None:
        """On which DALI's output is used."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _graph_options(self) -> GraphOptions:
        return self.options

    def _feed(self, _: int) -> list:
        self._pending.append(self.source.next())
        return self._pending[-1].inputs


class ByteBatches(GraphBatches):
    """DALI decodes and crops to bytes, a fourth of what it would write as float32, and they are normalized in one pass more. For
    plain crops, whose pixels are whole numbers."""

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        options = self.options
        crops = torch.from_dlpack(self._run(image_pipeline).as_tensor())  # (N, size, size, 3), or (N, views, ...)
        batch = self._pending.popleft()
        means = batch.means.swapaxes(0, 1).repeat(options.views // options.crops, 1).reshape(-1, RGB)
        scale = np.array(options.scale, np.float32)
        means, scale = (torch.from_numpy(values).to(self.device, non_blocking=True) for values in (means, scale))
        dtype, last = getattr(torch, options.dtype), options.memory_format == "channels_last"
        images = normalized(crops.flatten(0, -4), means, scale, dtype, last)
        return options.by_image(images), batch

    def _graph_options(self) -> GraphOptions:
        return dataclasses.replace(self.options, dtype="uint8", memory_format="channels_last", scale=(1.0, 1.0, 1.0))

    def _feed(self, _: int) -> list:
        jpegs, *_ = super()._feed(_)
        batch = self._pending.pop()
        others = graph_inputs(batch._replace(means=np.zeros_like(batch.means)))
        self._pending.append(batch._replace(inputs=[jpegs, *others]))  # DALI does not copy them
        return self._pending[-1].inputs


def graph_batches(source: Source | Side, options: GraphOptions, device: torch.device, as_bytes: bool) -> GraphBatches:
    """Batches that DALI decodes and crops; `as_bytes` normalizes them afterwards where that gives the same pixels."""
    fits = not (options.boxes or options.jitter or options.mean_image is not None or options.dtype == "uint8")
    return (ByteBatches if as_bytes and fits else GraphBatches)(source, options, device)


class DecodedBatches(GraphBatches):
    """DALI decodes and `cropper` crops. On a CPU, this takes a quarter of the time of DALI's crop_mirror_normalize (uint8: a
    tenth), with the same result (docs/log.md)."""

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        decoded = self._run(decode_pipeline)
        return self._cropped(self._pending.popleft(), decoded)

    def _feed(self, _: int) -> list:
        return super()._feed(_)[:1]

    def _cropped(self, batch: InputBatch, decoded) -> tuple[torch.Tensor, InputBatch]:
        start_s = time.perf_counter()
        images = self.cropper(batch, decoded)
        self.source.spans.append(("crop", start_s, time.perf_counter() - start_s))
        return images, batch


class CachedBatches(DecodedBatches):
    """The cache of `cropper` has the images; DALI decodes only what it lacks, and rests when it lacks nothing for a while."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._peeked: InputBatch | None = None  # the batch for which the pipeline is started
        self._decoded: deque = deque()  # for pending batches, in order

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        return self._cropped(*self._next())

    def _next(self) -> tuple[InputBatch, Any]:
        """The next batch, and DALI's images of its `missing`."""
        while not self._pending:
            if self._pipeline is None:
                batch = self.source.next()
                if not len(batch.missing):
                    self._pending.append(batch)
                    break
                self._peeked = batch
            self._decode()
        needed = len(self._pending[0].missing) > 0
        if needed and not self._decoded:
            self._decode()
        return self._pending.popleft(), self._decoded.popleft() if needed else None

    def _decode(self) -> None:
        try:
            self._decoded.append(self._run(decode_pipeline))
        except StopIteration:  # no batch for a long while had anything to decode, and the outputs are used up
            self._pipeline = None

    def _feed(self, _: int) -> list:
        for _ in range(MAX_IDLE_STEPS):
            batch, self._peeked = self._peeked or self.source.next(), None
            self._pending.append(batch)
            if len(batch.missing):
                return batch.inputs[:1]
        raise StopIteration


class AheadBatches(CachedBatches):
    """The same by a cache on the device, on a side stream, one batch ahead: a batch is queued there when the one before it is
    handed out, so its crops are made while that one is in use.

    A batch's memory belongs to the stream that will use it, and is as soon free for that stream's next batch as if it had made
    the crops itself. In turn, the side stream writes to it only after all that this stream has been given until then.
    """

    def __init__(self, source: Source, options: GraphOptions, device: torch.device, cropper: "DeviceCropper", streams: Streams):
        super().__init__(source, options, device)
        self.on_device, self.streams = cropper, streams
        self._ahead: Ahead | Exception | None = None

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        ahead, self._ahead = self._ahead or self._begin(), None
        if isinstance(ahead, Exception):
            raise ahead
        self.streams.follow(ahead.end)
        self.streams.hand(ahead.images)
        self._ahead = self._begin()
        return self.options.by_image(ahead.images), ahead.batch

    def _begin(self) -> "Ahead | Exception":
        """Queues the next batch. An error is returned: it belongs to that batch, not to the one that is handed out now."""
        try:
            batch, decoded = self._next()
            start_s, options = time.perf_counter(), self.options
            layout = torch.channels_last if options.memory_format == "channels_last" else torch.contiguous_format
            shape = len(batch.ids) * options.views, RGB, options.crop_size, options.crop_size
            images = self.streams.empty(shape, getattr(torch, options.dtype), layout)
            work = functools.partial(self.on_device, batch, decoded, images)
            ahead = Ahead(images, batch, self.streams.queue(work, [self.streams.mark()]))
            self.source.spans.append(("crop", start_s, time.perf_counter() - start_s))
            return ahead
        except Exception as error:
            return error

    def close(self) -> None:
        self.streams.close()  # first: the memory of `_ahead` belongs to another stream
        self._ahead = None
        super().close()
        self.on_device.close()

    def __del__(self) -> None:
        """Of a loader that was dropped without `close`."""
        self.streams.close()

    def _stream(self) -> torch.cuda.Stream | None:
        return self.streams.side


class Ahead(NamedTuple):
    """A batch that is queued on a side stream, and the end of the work on it there."""

    images: torch.Tensor  # (N * views, 3, crop_size, crop_size)
    batch: InputBatch
    end: Event


class HostCropper:
    """Crops on several threads of the CPU, into `memory`."""

    def __init__(self, options: GraphOptions, memory: CropMemory, cache: HostCache | None = None):
        self.options, self.memory, self.cache = options, memory, cache
        self._threads = ThreadPoolExecutor(options.num_threads)

    def close(self) -> None:
        self._threads.shutdown()
        self.memory.close()

    def __call__(self, batch: InputBatch, decoded) -> torch.Tensor:
        """Crops as `memory` hands them out; `decoded` are DALI's images of `batch.missing`."""
        images = np.zeros(len(batch.ids), JOB)
        if self.cache is not None:
            self.cache.locate(images, batch.ids, np.delete(np.arange(len(batch.ids)), batch.missing))
        if decoded is not None:
            images[batch.missing] = self._decoded(decoded)
            if self.cache is not None:
                for record_id, place in zip(batch.ids[batch.missing].tolist(), batch.missing.tolist(), strict=True):
                    self.cache.put(record_id, *images[["data", "image_height", "image_width"]][place].tolist())
        jobs = crop_jobs(batch, images, self.options)
        taken = self.memory.take(jobs)
        in_threads(self._threads, self.options.num_threads, convert_jobs, (jobs.reshape(-1), self.memory.form), jobs.size)
        return self.memory.hand(taken)

    def _decoded(self, decoded) -> np.ndarray:
        """DALI's images as JOB (M,)."""
        if self.options.device_id is not None:
            torch.cuda.current_stream(self.options.device_id).synchronize()  # in whose order the images are ready
            decoded = decoded.as_cpu()
        images = np.zeros(len(decoded), JOB)
        if decoded.is_dense_tensor():  # of one size, one after the other
            tensor = decoded.as_tensor()
            count, height, width, _ = tensor.shape()
            images["image_height"], images["image_width"] = height, width
            images["data"] = tensor.data_ptr() + np.arange(count) * (height * width * RGB)
        else:  # 8 us each
            for image, tensor in zip(images, decoded, strict=True):
                image["data"], (image["image_height"], image["image_width"], _) = tensor.data_ptr(), tensor.shape()
        return images


class DeviceCropper:
    """Crops on the device of `cache`, of the images that it holds."""

    def __init__(self, options: GraphOptions, cache: DeviceCache):
        self.options, self.cache = options, cache
        self.scale = torch.tensor(options.scale, dtype=torch.float32, device=cache.planes.device)
        mean_image = planar(options.mean_image)
        self.mean_image = None if mean_image is None else torch.from_numpy(mean_image).to(cache.planes.device)

    def close(self) -> None:
        self.mean_image = None

    def __call__(self, batch: InputBatch, decoded, out: torch.Tensor | None = None) -> torch.Tensor:
        """As HostCropper, on the device; in `out` (N * views, 3, crop_size, crop_size) if given."""
        images = np.zeros(len(batch.ids), JOB)
        images["data"] = self.cache.slots[batch.ids]
        images["image_height"], images["image_width"] = self.cache.height, self.cache.width
        if decoded is not None:
            tensor = torch.from_dlpack(decoded.as_tensor())
            images["data"][batch.missing] = self.cache.put(batch.ids[batch.missing], tensor)
        jobs = crop_jobs(batch, images, self.options).reshape(-1)
        dtype, last = getattr(torch, self.options.dtype), self.options.memory_format == "channels_last"
        crops = self.cache.crops(jobs, self.options.crop_size, self.scale, dtype, last, self.mean_image, out)
        return self.options.by_image(crops)


Cropper = HostCropper | DeviceCropper


def in_threads(threads: ThreadPoolExecutor, number: int, function: Callable, fixed: tuple, count: int) -> None:
    """Calls function(*fixed, begin, end) for so many equal parts of `count`, and waits."""
    cuts = np.linspace(0, count, number + 1).astype(int).tolist()
    for part in [threads.submit(function, *fixed, *cut) for cut in itertools.pairwise(cuts)]:
        part.result()


def converted(images: torch.Tensor, options: GraphOptions) -> torch.Tensor:
    """(..., 3, size, size) in the type and memory format of the options."""
    images = images.to(getattr(torch, options.dtype))
    return images.movedim(-3, -1).contiguous().movedim(-1, -3) if options.memory_format == "channels_last" else images


def crop_jobs(batch: InputBatch, images: np.ndarray, options: GraphOptions) -> np.ndarray:
    """A JOB (N, views) for each crop, of `images`, a JOB (N,) that says where each image is and how large."""
    jobs = images[:, None].repeat(options.views, 1)
    if batch.boxes is None:
        places = batch.augmentation.places.swapaxes(0, 1)
        jobs["top"] = offset(places[..., 0], jobs["image_height"] - options.crop_size)
        jobs["left"] = offset(places[..., 1], jobs["image_width"] - options.crop_size)
        jobs["height"] = jobs["width"] = options.crop_size
    else:
        for name, values in zip(("top", "left", "height", "width"), batch.boxes.T, strict=True):
            jobs[name] = values
        jobs["size"] = options.crop_size
    if batch.maps is not None:
        jobs["recolor"], jobs["colors"] = 1, batch.maps.swapaxes(0, 1)
    jobs["mirror"] = batch.augmentation.mirrors.T
    jobs["mean"] = batch.means.swapaxes(0, 1).repeat(options.views // options.crops, 1)
    return jobs
