"""Reads batches ahead in a thread: the records' bytes, and the crop, flip and colors of each."""

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from imagefeed.codec.decode import JOB, aligned, find_sizes
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.cache import DeviceCache, HostCache
from imagefeed.pipeline.fetching import AHEAD, open_fetcher
from imagefeed.pipeline.plan import Augmentation, Plan, by_cores

# The next record replaces a corrupt one; this many in a row mean that the disk is gone.
MAX_CORRUPT_IN_A_ROW = 10
ALIGNED = 4096  # bytes
OUTSIZED = 8  # times the size needed: larger memory is not reused, as one long record would keep every buffer large
log = logging.getLogger("imagefeed")


class InputBatch(NamedTuple):
    """A batch before decoding. `inputs` (graph.py) begin with one array of JPEGs (M, longest), each followed by zeros: DALI takes
    9 us for each array of a list (docs/log.md)."""

    ids: np.ndarray  # (N,) int64
    labels: np.ndarray
    valid: np.ndarray
    corrupt: np.ndarray  # record ids that were replaced
    inputs: list[np.ndarray]
    augmentation: Augmentation
    means: np.ndarray  # (crops, N, 3) float32, less the PCA jitter
    missing: np.ndarray  # (M,) places in the batch of the records to decode; the cache holds the others
    boxes: np.ndarray | None = None  # (crops, N, 4) int64, if random resized crops are asked for (`Plan.boxes`)
    maps: np.ndarray | None = None  # (crops, N, 2, 3, 3) float32, if color jitter is (`Plan.jitter`)
    parts: tuple["InputBatch", ...] = ()  # of it, which must live as long (both.py)


def graph_inputs(batch: InputBatch) -> list[np.ndarray]:
    """What image_pipeline (graph.py) asks for besides the JPEGs."""
    inputs: list[np.ndarray] = []
    views = len(batch.augmentation.places) // len(batch.means)
    for crop, mean in enumerate(batch.means):
        inputs.append(mean)
        if batch.boxes is not None:
            inputs.append(batch.boxes[crop].astype(np.float32, order="C"))
        if batch.maps is not None:
            inputs.append(batch.maps[crop])
        for view in range(crop * views, (crop + 1) * views):
            inputs += [batch.augmentation.places[view], batch.augmentation.mirrors[view]]
    return inputs


@dataclass(frozen=True)
class Colors:
    """`mean` (3,) is subtracted; `pca_matrix` (3, 3) turns normal draws into an RGB offset; `jitter` are strengths or None."""

    mean: np.ndarray
    pca_matrix: np.ndarray
    jitter: tuple[float, ...] | None = None

    def means(self, augmentation: Augmentation) -> np.ndarray:
        """(N, 3) float32 to subtract: the mean less the PCA jitter."""
        return (self.mean - augmentation.color @ self.pca_matrix.T).astype(np.float32)


class BufferPool:
    """Memory to use again once nothing refers to it: fresh pages for 77 MB cost more than the crops written to them."""

    def __init__(self, limit: int | None = None):
        self._free: deque[np.ndarray] = deque(maxlen=limit)

    def take(self, size: int) -> np.ndarray:
        """A uint8 array (size,); its memory returns to the pool when the array, its views and tensors made of them are gone."""
        while size and self._free:
            memory = self._free.pop()
            if size <= len(memory) <= OUTSIZED * size:
                break
        else:
            memory = aligned((size,), "uint8")
        lease = _Lease(memory[:size])
        weakref.finalize(lease, self._free.append, memory).atexit = False
        return np.asarray(lease)


class _Lease:
    """The base of arrays in a pool's memory. A view's base is the array that owns the memory, never the view it was made of, so a
    finalizer on an array would run while its views are in use; this object lives as long as any of them."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__


class Source:
    """Batches from position `position` on. A thread reads AHEAD of them, because DALI asks in the thread that trains.

    With a `share`, the JPEGs of the records that the cores decode (`by_cores`) follow the others: either part is one array.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: RecordReader,
        colors: Colors,
        boxes: bool = False,
        cache: HostCache | DeviceCache | None = None,
        position: int = 0,
        read_ahead: int = 0,
        share: float | None = None,
    ):
        self.plan, self.dataset, self.colors, self.boxes, self.cache = plan, dataset, colors, boxes, cache
        self.position, self.read_ahead, self.share = position, read_ahead, share
        # What the calling thread did for the current batch: (name, start, seconds) by time.perf_counter; the loader clears it.
        self.spans: list[tuple[str, float, float]] = []
        self._first = position
        self._prefetched = -1  # the position up to which the system was told what will be needed
        self._reader = ThreadPoolExecutor(1, "reader")
        self._coming: deque[Future[InputBatch]] = deque()  # from `position` on
        # In a thread of its own, because it blocks while a disk's queue is full.
        self._prefetcher = ThreadPoolExecutor(1, "read-ahead") if read_ahead and dataset.remote is None else None
        self._fetcher = None if dataset.remote is None else open_fetcher(plan, dataset, self._cached, position, read_ahead)
        self._pool = BufferPool()
        self._in_use: deque[tuple[InputBatch, torch.cuda.Event]] = deque()

    def close(self) -> None:
        if self._fetcher is not None:
            self._fetcher.stop()
        self._reader.shutdown(cancel_futures=True)
        if self._fetcher is not None:
            self._fetcher.close()
        if self._prefetcher is not None:
            self._prefetcher.shutdown(cancel_futures=True)

    def next(self) -> InputBatch:
        """The batch at `position`."""
        start_s = time.perf_counter()
        while len(self._coming) <= AHEAD:
            self._coming.append(self._reader.submit(self.prepare, self.position + len(self._coming)))
        batch = self._coming[0].result()
        self._coming.popleft()
        self.position += 1
        self.spans.append(("read", start_s, time.perf_counter() - start_s))
        return batch

    @property
    def waits(self) -> bool:
        """Whether the second batch is still on its way from a store: the first one came sooner."""
        return self._fetcher is not None and self.position == self._first + 1 and not self._coming[0].done()

    def recycle(self, batch: InputBatch, used: torch.cuda.Event | None) -> None:
        """Holds a decoded batch until `used` has happened on the GPU; without references, its memory is read into again."""
        if used is not None:
            self._in_use.append((batch, used))
        # Queried here: in the reader's thread, a query would open the first GPU, whichever this process uses.
        while self._in_use and self._in_use[0][1].query():
            self._in_use.popleft()

    def prepare(self, position: int) -> InputBatch:
        """Reads the batch at `position`."""
        if self._fetcher is not None:
            self._fetcher.advance(position)
        self._prefetch(position)
        planned, valid = self.plan.ids(position)
        jpegs, ids, missing = self.read(planned)
        replaced = ids != planned
        corrupt = planned[replaced & valid]
        if self.plan.views != "random":
            valid = valid & ~replaced  # evaluation counts each record once, and the replacement has a place of its own
        keys = self.plan.keys(position, ids)
        drawn = [self.plan.augmentation(position, each) for each in keys]
        means = np.stack(list(map(self.colors.means, drawn)))
        boxes = maps = None
        if self.boxes:
            sizes = self._sizes(jpegs, ids, missing)
            boxes = np.stack([self.plan.boxes(position, each, *sizes) for each in keys])
        if self.colors.jitter:
            maps = np.stack([self.plan.jitter(position, each, self.colors.jitter) for each in keys]).astype(np.float32)
        augmentation = drawn[0] if len(drawn) == 1 else Augmentation(*map(np.concatenate, zip(*drawn, strict=True)))
        labels = self.dataset.labels[ids].astype(np.int64)
        batch = InputBatch(ids, labels, valid, corrupt, [jpegs], augmentation, means, missing, boxes, maps)
        return batch._replace(inputs=[jpegs, *graph_inputs(batch)])

    def _sizes(self, jpegs: np.ndarray, ids: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Heights and widths (2, N) of the images; 0 for a JPEG that has none, which the decoder will report."""
        jobs, _ = jpeg_jobs(self.dataset, jpegs, ids[missing])
        sizes = np.zeros((len(ids), 2), np.int64) if self.cache is None else self.cache.sizes[ids].astype(np.int64)
        sizes[missing] = np.stack((jobs["image_height"], jobs["image_width"]), 1)
        return sizes.T

    def read(self, planned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """JPEGs (M, longest) of the planned records that no cache holds; the ids (N,) of all, a corrupt one replaced by the next
        intact one; and the places (M,) of the JPEGs in the batch."""
        ids = planned.copy()
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            missing = np.flatnonzero(~self._cached(ids))
            if self.share is not None:
                missing = missing[np.argsort(by_cores(ids[missing], self.share), kind="stable")]
            wanted = ids[missing]
            if self._prefetcher is None:
                self.dataset.will_need(wanted)
            stride = -(-self.dataset.longest(wanted) // ALIGNED) * ALIGNED
            buffer = self._pool.take(len(wanted) * stride)
            bad = self.dataset.gather(wanted, buffer, stride)
            if not bad.any():
                return buffer.reshape(len(wanted), stride), ids, missing
            for record_id in wanted[bad].tolist():
                error = self.dataset.damage(record_id)
                if record_id not in self.dataset.reported:
                    self.dataset.reported.add(record_id)
                    replaced = self.plan.views == "random"
                    log.warning("%s; %s", error, "the next record replaces it" if replaced else "the evaluation leaves it out")
            chosen = self.plan.selection
            ids[missing[bad]] = (wanted[bad] + 1) % len(self.dataset) if chosen is None else chosen.following(wanted[bad])
        raise error

    def _prefetch(self, position: int) -> None:
        """Tells the system which bytes the next `read_ahead` batches need; with shuffle "blocks", the next window."""
        if self._prefetcher is None:
            return
        window = self.plan.prefetch_window(position, self._prefetched < 0)
        if window is None:
            steps = range(max(self._prefetched, position), position + self.read_ahead)
            wanted = [ids[valid] for ids, valid in map(self.plan.ids, steps)]
            self._prefetched = position + self.read_ahead
        else:
            wanted = [window]
            self._prefetched = position
        for ids in wanted:
            self._prefetcher.submit(self.dataset.will_need, ids[~self._cached(ids)])

    def _cached(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(ids), bool) if self.cache is None else self.cache.holds(ids)


class Side:
    """A part of a source's batches, which `take` gives in turn: all that NativeBatches and GraphBatches ask of a source."""

    waits = False

    def __init__(self, source: Source, take: Callable[[], InputBatch]):
        self.plan, self.dataset, self.spans, self.next = source.plan, source.dataset, source.spans, take


def jpeg_jobs(dataset: RecordReader, jpegs: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """A JOB (M,) for each of the JPEGs (M, longest) of records (M,), with its bytes and its size; and why some have no size, by
    place."""
    jobs = np.zeros(len(ids), JOB)
    jobs["data"] = jpegs.ctypes.data + jpegs.shape[1] * np.arange(len(ids))
    jobs["length"] = dataset.lengths(ids)
    return jobs, find_sizes(jobs)
