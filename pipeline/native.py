"""From input batches to crops by the decoder of codec/: threads of its own work ahead, and no DALI is needed. For a GPU they
write bytes, which it copies and normalizes (handover.py).

Crops are decoded, cut out, resized and normalized in one pass over the JPEG: all views of an image, and the whole image if a
cache is to hold it. Plain crops equal those of crops.py to the bit. Boxes are resized as torch does, not as DALI.
"""

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from imagefeed.codec.decode import JOB, PIECE, convert_jobs, decode_jobs
from imagefeed.pipeline.cache import HostCache
from imagefeed.pipeline.crops import crop_jobs
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.handover import CropMemory, Taken
from imagefeed.pipeline.source import InputBatch, Side, Source, jpeg_jobs


class UndecodableError(Exception):
    """A record whose JPEG cannot be decoded, and why: mostly libjpeg-turbo's words."""

    def __init__(self, record_id: int, reason: str):
        super().__init__(f"record {record_id}: {reason}")
        self.record_id, self.reason = record_id, reason


@dataclass
class _Task:
    """A batch on its way; it holds all memory that its jobs refer to."""

    batch: InputBatch
    missing: np.ndarray  # (N,) bool: to be decoded, not in the cache
    jobs: np.ndarray  # JOB (N, views)
    parts: list[Future[dict[int, str]]] = field(default_factory=list)  # why images cannot be decoded, by place in the batch
    taken: Taken | None = None  # see `NativeBatches._take`
    lock: threading.Lock = field(default_factory=threading.Lock)


class NativeBatches:
    """Keeps `options.prefetch` batches on their way: all threads work on one, and then on the next."""

    def __init__(self, source: Source | Side, options: GraphOptions, memory: CropMemory, cache: HostCache | None = None):
        self.source, self.options, self.memory, self.cache = source, options, memory, cache
        self._threads = ThreadPoolExecutor(options.num_threads, "decoder")
        self._tasks: deque[_Task] = deque()

    def start(self) -> None:
        """Lets the threads begin as many batches as they may work ahead, but keeps nobody waiting for the first one."""
        while len(self._tasks) < self.options.prefetch and not (self._tasks and self.source.waits):
            self._tasks.append(self._start(self.source.next()))

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        """Raises UndecodableError."""
        self.start()
        start_s = time.perf_counter()
        task = self._tasks[0]
        for part in task.parts:
            for place, reason in part.result().items():
                raise UndecodableError(int(task.batch.ids[place]), reason)
        self._tasks.popleft()
        # The calling thread only waits: for memory that was still being copied to the device, and for the decoder, which crops as
        # well, unless there was nothing to decode.
        taken, waited_s = self._take(task), time.perf_counter() - start_s
        blocked_s = min(taken.blocked_s, waited_s)
        spans = [("decode" if task.missing.any() else "crop", start_s + blocked_s, waited_s - blocked_s)]
        images, handed_s = self.memory.hand(taken), time.perf_counter() - start_s - waited_s
        if self.memory.uploads:
            spans += [("upload", start_s, blocked_s), ("upload", start_s + waited_s, handed_s)]
        self.source.spans.extend(spans)
        return images, task.batch

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._tasks.clear()
        self.memory.close()

    def _start(self, batch: InputBatch) -> _Task:
        count = len(batch.ids)
        missing = np.zeros(count, bool)
        missing[batch.missing] = True
        images, damaged = self._inputs(batch, missing)
        task = _Task(batch, missing, crop_jobs(batch, images, self.options))
        if damaged:
            task.parts.append(Future())
            task.parts[0].set_result(damaged)
            return task
        # A thread that has one image left decodes it alone, so there are no more pieces than keep all threads busy.
        pieces = max(-(-count // PIECE), -(-self.options.num_threads // self.options.prefetch))
        cuts = np.linspace(0, count, min(pieces, count) + 1).astype(int).tolist()
        task.parts.extend(self._threads.submit(self._decode, task, *cut) for cut in pairwise(cuts))
        return task

    def _inputs(self, batch: InputBatch, missing: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """A JOB (N,) with the bytes and the size of each image, JPEGs if `missing`, else pixels; and why some have none."""
        images = np.zeros(len(batch.ids), JOB)
        images[batch.missing], sizeless = jpeg_jobs(self.source.dataset, batch.inputs[0], batch.ids[batch.missing])
        damaged = {int(batch.missing[number]): reason for number, reason in sizeless.items()}
        if self.cache is not None:
            self.cache.locate(images, batch.ids, np.flatnonzero(~missing))
        smallest = np.minimum(images["image_height"], images["image_width"])
        least = 1 if self.options.boxes else self.options.crop_size
        for place in np.flatnonzero((smallest < least) & (smallest > 0)).tolist():
            damaged[place] = f"its side of {smallest[place]} pixels is too small for a crop of {self.options.crop_size}"
        if self.options.mean_image is not None:
            height, width, _ = self.options.mean_image.shape
            unlike = (images["image_height"] != height) | (images["image_width"] != width)
            damaged = {place: "its size is not that of the mean image" for place in np.flatnonzero(unlike).tolist()} | damaged
        return images, damaged

    def _decode(self, task: _Task, begin: int, end: int) -> dict[int, str]:
        """Makes the crops of images `begin` to `end`; returns the damaged ones, as `_Task.parts`."""
        self._take(task)
        views, missing = self.options.views, task.missing[begin:end]
        held = task.jobs[begin:end][~missing].reshape(-1)
        convert_jobs(held, self.memory.form, 0, len(held))
        places = begin + np.flatnonzero(missing)
        jobs = task.jobs[places]
        kept = [] if self.cache is None else reserve(self.cache, task.batch.ids[places].tolist(), jobs[:, 0])
        to_end = not self.source.dataset.verify_checksums
        found = decode_jobs(jobs.reshape(-1), self.memory.form, 0, jobs.size, to_end)
        damaged = {int(places[number // views]): reason for number, reason in found.items()}
        if self.cache is not None:
            undecodable = {int(task.batch.ids[place]) for place in damaged}
            self.cache.commit([record_id for record_id in kept if record_id not in undecodable])
        return damaged

    def _take(self, task: _Task) -> Taken:
        """Memory for the crops, from the time on when a thread begins the batch: 77 MB for 128 float32 crops of 224 pixels."""
        with task.lock:
            if task.taken is None:
                task.taken = self.memory.take(task.jobs)
            return task.taken


def reserve(cache: HostCache, ids: list[int], jobs: np.ndarray) -> list[int]:
    """Lets a job of each record write the whole image to the cache; returns the records for which there is room."""
    for record_id, job in zip(ids, jobs, strict=True):
        job["keep"] = cache.reserve(record_id, int(job["image_height"]), int(job["image_width"]))
    return [record_id for record_id, job in zip(ids, jobs, strict=True) if job["keep"]]
