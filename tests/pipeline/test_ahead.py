"""Crops of the cache on the device, one batch ahead on a side stream: on a CPU that stream is a thread."""

import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import imagefeed.pipeline.cache
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.source import BufferPool
from imagefeed.pipeline.streams import Ended, Event, HostStreams
from tests.conftest import replace_index
from tests.pipeline.test_loader import equal

IMAGE = 256 * 256 * 3 // 2  # bytes in the cache
LAG_S, LATE_S = 0.01, 0.2


class LateStreams(HostStreams):
    """Here the current stream lags behind the host as well, and memory is reused as soon as nothing refers to it, whatever the
    streams still do with it: as on a GPU."""

    def __init__(self, lag_s: float = 0.0, waits: tuple[str, ...] = ("queue", "follow")):
        super().__init__(lag_s)
        self.waits = waits
        self.current = ThreadPoolExecutor(1, "current-stream")
        self.memory, self.addresses, self.queued = BufferPool(), set[int](), list[Event]()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
        assert layout == torch.contiguous_format
        memory = self.memory.take(math.prod(shape) * dtype.itemsize)
        self.addresses.add(memory.ctypes.data)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def queue(self, work: Callable[[], object], after: tuple[Event, ...] = ()) -> Event:
        self.queued.append(super().queue(work, after if "queue" in self.waits else ()))
        return self.queued[-1]

    def follow(self, event: Event) -> None:
        if "follow" in self.waits:
            self.current.submit(event.synchronize)

    def mark(self) -> Event:
        return Ended(self.current.submit(lambda: None))


Opens = Callable[[], HostStreams] | None


def opened(manifest, open_streams: Opens, split="train", batch_size=8, **options) -> ImageLoader:
    loader = ImageLoader(manifest, split, batch_size, **{"cache": "device", "crop_size": 64} | options)
    loader._open_streams = open_streams
    return loader


def batches(manifest, open_streams: Opens, epochs: int = 3, **options) -> list:
    with opened(manifest, open_streams, **options) as loader:
        return [batch for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("capacity", [0, 9 * IMAGE, 50 * IMAGE], ids=["nothing", "some", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "memory_format": "channels_last", "mean": "image", "std": "dataset"},
        {"dtype": "uint8", "prefetch": 1, "crops": 2},
        {"split": "val", "views": "ten", "memory_format": "channels_last"},
        {"auto_augment": "trivial", "cutmix": 1.0},
    ],
    ids=str,
)
def test_what_a_side_stream_makes_ahead_equals_what_the_calling_thread_makes(tiny, options, capacity):
    options = options | {"cache_bytes": capacity}
    found, wanted = batches(tiny, lambda: HostStreams(LAG_S), **options), batches(tiny, None, **options)
    assert equal(found, wanted)
    assert [one.images.stride() for one in found] == [other.images.stride() for other in wanted]


def late_reads(manifest, streams: LateStreams, late: bool) -> list[np.ndarray]:
    """The images of two epochs, each batch read in the current stream, overwritten there, and let go of by the host at once.

    If `late`, a batch is read when the host has queued the one that gets its memory, and a while after that.
    """
    found, ended = [], threading.Event()

    def read(number: int, address: int, size: int) -> None:
        while late and len(streams.queued) < number + 4 and not ended.is_set():
            time.sleep(LAG_S / 10)
        until_s = time.monotonic() + LATE_S
        while late and not streams.queued[-1].query() and time.monotonic() < until_s:
            time.sleep(LAG_S / 10)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        found.append(memory.copy().view(np.float32))
        memory.fill(255)

    with opened(manifest, lambda: streams) as loader, streams.current:
        for epoch in range(2):
            for number, batch in enumerate(loader, 6 * epoch):
                streams.current.submit(read, number, batch.images.data_ptr(), batch.images.nbytes)
                if late:
                    streams.queued[-2].synchronize()  # work in a thread keeps memory that it refers to; a GPU's does not
                del batch
        ended.set()
    return found


@pytest.mark.parametrize(("lag_s", "late"), [(3 * LAG_S, False), (0.0, True)], ids=["late crops", "late reads"])
def test_streams_that_lag_behind_the_host_give_the_same_batches_and_need_memory_for_one_more(tiny, lag_s, late):
    streams = LateStreams(lag_s)
    found = late_reads(tiny, streams, late)
    wanted = [batch.images.numpy().ravel() for batch in batches(tiny, None, epochs=2)]
    assert all(map(np.array_equal, found, wanted)) and len(found) == len(wanted) == 12
    if late:
        assert len(streams.addresses) == 3  # the loop itself keeps a batch until it has the next one


@pytest.mark.parametrize(("kept", "lag_s", "late"), [("queue", 3 * LAG_S, False), ("follow", 0.0, True)])
def test_a_missing_wait_between_the_streams_would_show(tiny, kept, lag_s, late):
    """If one of the two kinds of waits is left out, the test above fails."""
    found = late_reads(tiny, LateStreams(lag_s, (kept,)), late)
    wanted = [batch.images.numpy().ravel() for batch in batches(tiny, None, epochs=2)]
    assert not all(map(np.array_equal, found, wanted))


def test_the_next_batch_is_made_while_one_is_in_use(tiny):
    streams = LateStreams()
    with opened(tiny, lambda: streams) as loader, streams.current:
        loop = iter(loader)
        for number in range(1, 7):
            next(loop)
            assert loader.position == number and len(streams.queued) == number + 1
            streams.queued[-1].synchronize()  # without being asked for


@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_a_loop_that_breaks_goes_on_as_without_streams(tiny, stop):
    """After `break` the next loop begins the next epoch; a saved state goes on at its position."""
    found = []
    for open_streams in (None, HostStreams):
        with opened(tiny, open_streams) as loader:
            taken = []
            while len(taken) < stop:
                for batch in loader:
                    taken.append(batch)
                    if len(taken) == stop:
                        break
            state = loader.state_dict()
            taken += list(loader)
        with opened(tiny, open_streams) as loader:
            loader.load_state_dict(state)
            found.append((taken + list(loader), state))
    (wanted, state), (others, other_state) = found
    assert equal(others, wanted) and other_state == state


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_belongs_to_its_own_batch(tiny_copy, streamed):
    """Record 20 of stored order is in the third batch of 8: the second is handed out, and the third fails each time."""
    index = tiny_copy.load_index("train").copy()
    index[20]["length"] = 100
    replace_index(tiny_copy, "train", index)
    for _ in range(2):
        with opened(tiny_copy, HostStreams if streamed else None, shuffle="none") as loader:
            loader.reader.verify_checksums = False
            loop = iter(loader)
            assert [next(loop).ids.tolist() for _ in range(2)] == [list(range(8)), list(range(8, 16))]
            with pytest.raises(UserError, match="cannot be decoded"):
                next(loop)
            assert loader.position == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_after_crops_that_failed_the_same_batch_comes(tiny, monkeypatch, streamed):
    wanted = batches(tiny, None, epochs=1)
    made, crop = [], imagefeed.pipeline.cache.cropped

    def fail_once(*given) -> torch.Tensor:
        made.append(given)
        if len(made) == 3:
            raise FloatingPointError("as memory may run out")
        return crop(*given)

    monkeypatch.setattr(imagefeed.pipeline.cache, "cropped", fail_once)
    with opened(tiny, HostStreams if streamed else None) as loader:
        loop = iter(loader)
        found = [next(loop), next(loop)]
        with pytest.raises(FloatingPointError):
            next(loop)
        assert loader.position == 2
        assert equal([*found, *(loader.batch_at(position) for position in range(2, 6))], wanted)


def test_a_loader_that_is_dropped_in_a_loop_waits_for_the_side_stream(tiny):
    streams = HostStreams(LAG_S)
    loader = opened(tiny, lambda: streams)
    next(iter(loader))
    assert streams.queue(int)
    del loader
    gc.collect()
    with pytest.raises(RuntimeError, match="after shutdown"):
        streams.queue(int)
