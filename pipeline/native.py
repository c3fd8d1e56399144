"""From input batches to crops on a CPU, by the decoder of codec/: threads of its own work ahead, and no DALI is needed.

A crop is decoded, cut out, resized and normalized in one pass. Images that a cache is to hold, or that several views are cut
from, are decoded whole. Either way plain crops equal those of crops.py to the bit. Boxes are resized as torch does, not as DALI.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from imagefeed.codec.decode import JOB, PIECE, Format, convert_jobs, decode_jobs, find_sizes
from imagefeed.pipeline.cache import RGB, HostCache
from imagefeed.pipeline.crops import MAX_ARRAYS, crop_format, crop_jobs, crop_tensor, take_crops
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.source import BufferPool, InputBatch, Source

WHOLE = Format("uint8", channels_last=True)  # of images in a cache, and of those that several views are cut from
GROUP = 16  # whole images that a thread decodes before it crops them: 3 MB


class UndecodableError(Exception):
    """A record whose JPEG cannot be decoded, and why: mostly libjpeg-turbo's words."""

    def __init__(self, record_id: int, reason: str):
        super().__init__(f"record {record_id}: {reason}")
        self.record_id, self.reason = record_id, reason


class _Task(NamedTuple):
    """A batch on its way; it holds all memory that its jobs refer to."""

    batch: InputBatch
    missing: np.ndarray  # (N,) bool: to be decoded, not in the cache
    jobs: np.ndarray  # JOB (N, views)
    out: np.ndarray  # uint8 (bytes,)
    parts: list[Future[dict[int, str]]]  # why images cannot be decoded, by their places in the batch


class NativeBatches:
    """Keeps `options.prefetch` batches on their way, each shared by the threads."""

    def __init__(self, source: Source, options: GraphOptions, cache: HostCache | None = None):
        self.source, self.options, self.cache, self._form = source, options, cache, crop_format(options)
        self._threads = ThreadPoolExecutor(options.num_threads, "decoder")
        self._pool = BufferPool(MAX_ARRAYS)
        self._tasks: deque[_Task] = deque()

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        """Raises UndecodableError."""
        while len(self._tasks) < self.options.prefetch:
            self._tasks.append(self._start(self.source.next()))
        start_s = time.perf_counter()
        batch, missing, _, out, parts = self._tasks[0]
        for part in parts:
            for place, reason in part.result().items():
                raise UndecodableError(int(batch.ids[place]), reason)
        self._tasks.popleft()
        # The calling thread only waits: for the decoder, which crops as well, unless there was nothing to decode.
        self.source.spans.append(("decode" if missing.any() else "crop", start_s, time.perf_counter() - start_s))
        return crop_tensor(out, self.options), batch

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._tasks.clear()

    def _start(self, batch: InputBatch) -> _Task:
        count = len(batch.ids)
        missing = np.zeros(count, bool)
        missing[batch.missing] = True
        images, damaged = self._inputs(batch, missing)
        jobs = crop_jobs(batch, images, self.options)
        task = _Task(batch, missing, jobs, take_crops(self._pool, jobs, self.options), [])
        if damaged:
            task.parts.append(Future())
            task.parts[0].set_result(damaged)
            return task
        # A thread that has one image left decodes it alone, so there are no more pieces than keep all threads busy.
        pieces = max(count // PIECE, -(-self.options.num_threads // self.options.prefetch))
        cuts = np.linspace(0, count, min(pieces, self.options.num_threads, count) + 1).astype(int).tolist()
        task.parts.extend(self._threads.submit(self._decode, task, *cut) for cut in pairwise(cuts))
        return task

    def _inputs(self, batch: InputBatch, missing: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """A JOB (N,) with the bytes and the size of each image, JPEGs if `missing`, else pixels; and why some have none."""
        images, jpegs = np.zeros(len(batch.ids), JOB), np.zeros(len(batch.missing), JOB)
        data = batch.inputs[0]
        jpegs["data"] = data.ctypes.data + data.shape[1] * np.arange(len(jpegs))
        jpegs["length"] = self.source.dataset.lengths(batch.ids[batch.missing])
        damaged = {int(batch.missing[number]): reason for number, reason in find_sizes(jpegs).items()}
        images[batch.missing] = jpegs
        if self.cache is not None:
            self.cache.locate(images, batch.ids, np.flatnonzero(~missing))
        smallest = np.minimum(images["image_height"], images["image_width"])
        least = 1 if self.options.boxes else self.options.crop_size
        for place in np.flatnonzero((smallest < least) & (smallest > 0)).tolist():
            damaged[place] = f"its side of {smallest[place]} pixels is too small for a crop of {self.options.crop_size}"
        return images, damaged

    def _decode(self, task: _Task, begin: int, end: int) -> dict[int, str]:
        """Makes the crops of images `begin` to `end`; returns the damaged ones, as `_Task.parts`."""
        if self.cache is None and self.options.views == 1:
            return decode_jobs(task.jobs[:, 0], self._form, begin, end, self._to_end)
        if not task.missing[begin:end].any():
            views = self.options.views
            convert_jobs(task.jobs.reshape(-1), self._form, begin * views, end * views)
            return {}
        damaged: dict[int, str] = {}
        for first in range(begin, end, GROUP):
            damaged |= self._decode_whole(task, first, min(first + GROUP, end))
        return damaged

    @property
    def _to_end(self) -> bool:
        return not self.source.dataset.verify_checksums

    def _decode_whole(self, task: _Task, begin: int, end: int) -> dict[int, str]:
        """As `_decode`, by way of whole images; one of which the cache has no room for is cropped as it is decoded."""
        jobs, missing, ids = task.jobs[begin:end], task.missing[begin:end], task.batch.ids[begin:end].tolist()
        whole = jobs[:, 0].copy()
        whole["height"], whole["width"] = whole["image_height"], whole["image_width"]
        for name in ("top", "left", "mirror", "mean", "out", "size", "recolor"):
            whole[name] = 0
        if self.options.views > 1:
            sizes = np.where(missing, RGB * whole["height"].astype(np.int64) * whole["width"], 0)
            room = np.empty(sizes.sum(), np.uint8)
            whole["out"] = room.ctypes.data + np.cumsum(sizes) - sizes
        kept = []
        if self.cache is not None:
            for n in np.flatnonzero(missing).tolist():
                if address := self.cache.reserve(ids[n], int(whole["height"][n]), int(whole["width"][n])):
                    whole["out"][n] = address
                    kept.append(ids[n])
        first = missing & (whole["out"] != 0)
        at_once = missing & ~first
        damaged: dict[int, str] = {}
        for chosen, todo, form in ((first, whole, WHOLE), (at_once, jobs[:, 0], self._form)):
            places = np.flatnonzero(chosen)
            found = decode_jobs(todo[places], form, 0, len(places), self._to_end)
            damaged |= {begin + int(places[n]): reason for n, reason in found.items()}
        if damaged:  # this ends the run
            return damaged
        if self.cache is not None:
            self.cache.commit(kept)
        jobs["data"][first] = whole["out"][first, None]
        rest = jobs[~at_once].reshape(-1)
        convert_jobs(rest, self._form, 0, len(rest))
        return {}
