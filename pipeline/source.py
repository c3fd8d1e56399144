"""What is fed to the graph, batch by batch: the records' bytes and how each is looked at."""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.cache import DeviceCache, HostCache
from imagefeed.pipeline.plan import Plan, Views

# A record that is corrupt is replaced by the next one; so many in a row mean that the disk is gone, not a record.
MAX_CORRUPT_IN_A_ROW = 10
# Batches without a record to decode, after which the decoder is stopped; it starts again in 50 ms.
MAX_IDLE_STEPS = 256
AHEAD = 2  # batches that are read while nobody has asked for them
ALIGNED = 4096  # bytes
OUTSIZED = 8  # times what is needed, from which on memory is not kept: one long record makes a batch's so large
log = logging.getLogger("imagefeed")


class Fed(NamedTuple):
    """What went into the graph for a batch; `inputs` are kept here because DALI does not copy them. The first are the JPEGs, one
    array (M, longest) in which each is followed by zeros: of a list of arrays DALI takes 9 us for each (docs/log.md)."""

    ids: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    corrupt: np.ndarray  # record ids that were replaced
    inputs: list
    buffer: np.ndarray  # where the JPEGs lie
    look: Views
    means: np.ndarray  # (N, 3) float32, with the color offset
    missing: np.ndarray  # places in the batch of the records that are decoded, for want of them in the cache


class Source:
    """DALI's way to the data: each call of `batch` is the next batch from position `start` on; with a `cache`, the next that
    has anything to decode. `fed` holds what belongs to all that were passed. With `decode_only` the graph takes only JPEGs.

    DALI calls in the thread that trains. So batches are read by a thread of their own, AHEAD of them, and only handed over here.
    """

    def __init__(
        self,
        plan: Plan,
        dataset: RecordReader,
        mean: np.ndarray,
        jitter: np.ndarray,
        color_jitter: tuple[float, ...] | None = None,
        boxes: bool = False,
        cache: HostCache | DeviceCache | None = None,
        start: int = 0,
        read_ahead: int = 0,
        decode_only: bool = False,
    ):
        self.plan, self.dataset, self.cache = plan, dataset, cache
        self.mean, self.jitter, self.color_jitter, self.boxes = mean, jitter, color_jitter, boxes
        self.fed: deque[Fed] = deque()
        self.decode_only = decode_only
        self.position, self.asked = start, -1
        self.read_ahead = read_ahead
        # What the calling thread did for the batch at hand, as (name, start, seconds) by time.perf_counter; the loader clears it.
        self.spans: list[tuple[str, float, float]] = []
        self._reader = ThreadPoolExecutor(1, "reader")
        self._coming: deque[Future[Fed]] = deque()  # from `position` on
        self._asker = ThreadPoolExecutor(1, "read-ahead") if read_ahead else None  # waits where a disk's queue is full
        self._used: deque[tuple[np.ndarray, torch.cuda.Event | None]] = deque()
        self._spare: deque[np.ndarray] = deque()

    def restart(self, position: int) -> None:
        """Goes on from `position`, for a graph that begins anew."""
        self._drop()
        self.fed.clear()
        self.position = position

    def close(self) -> None:
        self._drop()
        self._reader.shutdown()
        if self._asker is not None:
            self._asker.shutdown(cancel_futures=True)

    def _drop(self) -> None:
        while self._coming:
            self._coming.popleft().cancel()

    def batch(self, _: int = 0) -> list:
        """What the graph takes: `image_pipeline`, or `decode_pipeline`."""
        for _ in range(MAX_IDLE_STEPS):
            fed = self.next()
            if len(fed.missing):
                return fed.inputs[:1] if self.decode_only else fed.inputs
        raise StopIteration

    def next(self) -> Fed:
        """The batch at `position`, appended to `fed`."""
        start_s = time.perf_counter()
        while len(self._coming) <= AHEAD:
            self._coming.append(self._reader.submit(self.prepare, self.position + len(self._coming)))
        self.fed.append(self._coming[0].result())
        self._coming.popleft()
        self.position += 1
        self.spans.append(("read", start_s, time.perf_counter() - start_s))
        return self.fed[-1]

    def recycle(self, fed: Fed, used: torch.cuda.Event | None) -> None:
        """Takes back the memory of a batch that is out of the graph; on a GPU, as soon as `used` has happened."""
        if len(fed.buffer):
            self._used.append((fed.buffer, used))
        # Events are asked here: in the reader's thread that would open the first GPU, whichever is this process's.
        while self._used and (self._used[0][1] is None or self._used[0][1].query()):
            self._spare.append(self._used.popleft()[0])

    def prepare(self, position: int) -> Fed:
        """The batch at `position`, all of it read."""
        self._ask_ahead(position)
        ids, valid = self.plan.ids(position)
        jpegs, whole, missing, buffer = self.read(ids)
        replaced = whole != ids
        corrupt = ids[replaced & valid]
        if self.plan.views != "random":
            # In evaluation what takes the place of a corrupt record must not count: it has a place of its own.
            valid = valid & ~replaced
        look = self.plan.look(position, whole)
        means = (self.mean - look.color @ self.jitter.T).astype(np.float32)
        inputs = [jpegs, means]
        if self.boxes:
            sizes = np.array([jpeg_size(jpeg) for jpeg in jpegs])
            inputs.append(self.plan.boxes(position, whole, *sizes.T).astype(np.float32, order="C"))
        if self.color_jitter:
            inputs.append(self.plan.jitter(position, whole, self.color_jitter).astype(np.float32, order="C"))
        for places, mirrors in zip(look.places, look.mirrors, strict=True):
            inputs += [places, mirrors]
        labels = self.dataset.labels[whole].astype(np.int64)
        return Fed(whole, labels, valid, corrupt, inputs, buffer, look, means, missing)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The JPEGs of records `ids` that no cache holds (M, longest), the ids of those they are (a corrupt one gives way to the
        next whole one), their places in the batch (M,), and the memory where they lie."""
        whole = ids.copy()
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            missing = np.flatnonzero(~self._held(whole))
            wanted = whole[missing]
            if self._asker is None:  # nobody has asked for them ahead of time
                self.dataset.will_need(wanted)
            stride = -(-self.dataset.longest(wanted) // ALIGNED) * ALIGNED
            buffer = self._memory(len(wanted) * stride)
            bad = self.dataset.gather(wanted, buffer, stride)
            if not bad.any():
                return buffer[: len(wanted) * stride].reshape(len(wanted), stride), whole, missing, buffer
            for record_id in wanted[bad].tolist():
                error = self.dataset.damage(record_id)
                log.warning("%s; the record after it takes its place", error)
            whole[missing[bad]] = (wanted[bad] + 1) % len(self.dataset)
        raise error

    def _memory(self, size: int) -> np.ndarray:
        """uint8 (size,) or more; that of an earlier batch where it is large enough, as new pages would cost more than reading."""
        while size and self._spare:
            buffer = self._spare.popleft()
            if size <= len(buffer) <= OUTSIZED * size:
                return buffer
        return np.empty(size, np.uint8)

    def _ask_ahead(self, position: int) -> None:
        """Asks for the bytes of the batches up to `read_ahead` steps from `position`, in a thread of its own; of shuffle "blocks"
        for those of the next window, as they are stored."""
        if self._asker is None:
            return
        ids = self.plan.prefetch_window(position, self.asked < 0)
        if ids is not None:
            self.asked = position
            self._ask(ids)
            return
        self.asked = max(self.asked, position)
        while self.asked < position + self.read_ahead:
            ids, valid = self.plan.ids(self.asked)
            self._ask(ids[valid])
            self.asked += 1

    def _ask(self, ids: np.ndarray) -> None:
        self._asker.submit(self.dataset.will_need, ids[~self._held(ids)])

    def _held(self, ids: np.ndarray) -> np.ndarray:
        """(N,) bool: which records a cache has, so that nothing has to be read of them."""
        return np.zeros(len(ids), bool) if self.cache is None else self.cache.holds(ids)


def jpeg_size(jpeg: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels, from the frame header of a baseline JPEG (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(jpeg):
        marker, length = int(jpeg[at + 1]), int(jpeg[at + 2]) << 8 | int(jpeg[at + 3])
        if marker == 0xC0:
            return int(jpeg[at + 5]) << 8 | int(jpeg[at + 6]), int(jpeg[at + 7]) << 8 | int(jpeg[at + 8])
        at += 2 + length
    raise UserError("a record's JPEG has no frame header; run python -m preprocess verify --deep on the dataset")
