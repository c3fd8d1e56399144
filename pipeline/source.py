"""What is fed to the graph, batch by batch: the records' bytes and how each is looked at."""

import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pipeline.cache import DeviceCache, HostCache
from pipeline.dataset import DamagedRecord, ShardedDataset
from pipeline.plan import Plan, Views
from preprocess.errors import UserError

# A record that is damaged is replaced by the next one; so many in a row mean that the disk is gone, not a record.
MAX_DAMAGED_IN_A_ROW = 10
# Batches without a record to decode, after which the decoder is stopped; it starts again in 50 ms.
MAX_IDLE_STEPS = 256
log = logging.getLogger("imagefeed")


class Fed(NamedTuple):
    """What went into the graph for a batch; `inputs` are kept here because DALI does not copy them."""

    ids: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    damaged: np.ndarray  # record ids that were replaced
    inputs: list
    look: Views
    means: np.ndarray  # (N, 3) float32, with the colour offset
    missing: np.ndarray  # places in the batch of the records that are decoded, for want of them in the cache


class Source:
    """DALI's way to the data: each call of `batch` is the next batch from position `start` on; with a `cache`, the next that
    has anything to decode. `fed` holds what belongs to all that were passed. With `decode_only` the graph takes only JPEGs."""

    def __init__(
        self,
        plan: Plan,
        dataset: ShardedDataset,
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
        self._reader = ThreadPoolExecutor(1, "read-ahead") if read_ahead else None

    def restart(self, position: int) -> None:
        """Goes on from `position`, for a graph that begins anew."""
        self.fed.clear()
        self.position = position

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

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
        self._ask_ahead()
        position = self.position
        self.position += 1
        ids, valid = self.plan.ids(position)
        jpegs, whole, missing = self.read(ids)
        replaced = whole != ids
        damaged = ids[replaced & valid]
        if self.plan.views != "random":
            # In evaluation what takes the place of a damaged record must not count: it has a place of its own.
            valid = valid & ~replaced
        look = self.plan.look(position, whole)
        means = (self.mean - look.colour @ self.jitter.T).astype(np.float32)
        inputs = [jpegs, means]
        if self.boxes:
            sizes = np.array([jpeg_size(jpeg) for jpeg in jpegs])
            inputs.append(self.plan.boxes(position, whole, *sizes.T).astype(np.float32, order="C"))
        if self.color_jitter:
            inputs.append(self.plan.jitter(position, whole, self.color_jitter).astype(np.float32, order="C"))
        for places, mirrors in zip(look.places, look.mirrors, strict=True):
            inputs += [places, mirrors]
        labels = self.dataset.labels[whole].astype(np.int64)
        self.fed.append(Fed(whole, labels, valid, damaged, inputs, look, means, missing))
        self.spans.append(("read", start_s, time.perf_counter() - start_s))
        return self.fed[-1]

    def read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The JPEGs of records `ids` that no cache holds, the ids of those they are (a damaged one gives way to the next whole
        one), and their places in the batch."""
        jpegs, whole, missing = [], ids.copy(), []
        wanted = np.flatnonzero(~self._held(ids))
        if self._reader is None:  # nobody has asked for them ahead of time
            self.dataset.will_need(ids[wanted])
        for n in wanted.tolist():
            for attempt in range(MAX_DAMAGED_IN_A_ROW):
                try:
                    whole[n] = (ids[n] + attempt) % len(self.dataset)
                    if attempt and self._held(whole[n : n + 1])[0]:
                        break
                    jpegs.append(self.dataset.jpeg(int(whole[n])))
                    missing.append(n)
                    break
                except DamagedRecord as error:
                    if attempt == MAX_DAMAGED_IN_A_ROW - 1:
                        raise
                    log.warning("%s; the record after it takes its place", error)
        return jpegs, whole, np.array(missing, np.int64)

    def _ask_ahead(self) -> None:
        """Asks for the bytes of the batches up to `read_ahead` steps from here, from a thread of its own; of shuffle "blocks" for
        those of the next window, as they are stored."""
        if self._reader is None:
            return
        ids = self.plan.run_up(self.position, self.asked < 0)
        if ids is not None:
            self.asked = self.position
            self._ask(ids)
            return
        self.asked = max(self.asked, self.position)
        while self.asked < self.position + self.read_ahead:
            ids, valid = self.plan.ids(self.asked)
            self._ask(ids[valid])
            self.asked += 1

    def _ask(self, ids: np.ndarray) -> None:
        self._reader.submit(self.dataset.will_need, ids[~self._held(ids)])

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
