"""Batches are read ahead of the thread that takes them, into memory of batches that are gone."""

import gc
import os
import threading

import numpy as np
import pytest
import torch

from imagefeed.dataset.reader import CorruptRecord
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.source import AHEAD, OUTSIZED, BufferPool


def place(batch) -> int:
    return batch.inputs[0].ctypes.data


@pytest.mark.parametrize("position", [0, 40])
def test_batches_read_ahead_are_those_read_on_request(tiny, position):
    with ImageLoader(tiny, "train", 8, position=position) as loader:
        source = loader.open_source()
        for number in range(position, position + 3):
            batch, wanted = source.next(), source.prepare(number)
            assert source.position == number + 1
            for name in ("ids", "labels", "valid", "means", "missing"):
                assert np.array_equal(getattr(batch, name), getattr(wanted, name))
            assert np.array_equal(batch.inputs[0], wanted.inputs[0])
        source.close()


def test_memory_is_reused_once_a_batch_is_gone_and_not_before(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        held = [source.next() for _ in range(6)]
        assert len({place(batch) for batch in held}) == 6
        gone = {place(batch) for batch in held[:3]}
        copies = [batch.inputs[0].copy() for batch in held[3:]]
        del held[:3]
        later = [source.next() for _ in range(AHEAD + 4)]
        assert {place(batch) for batch in later} & gone
        for batch, copy in zip(held, copies, strict=True):
            assert place(batch) not in {place(other) for other in later}
            assert np.array_equal(batch.inputs[0], copy)
        source.close()


class Event:
    """Like torch.cuda.Event, of a GPU's stream."""

    def __init__(self):
        self.happened = False
        self.asked_by: set[threading.Thread] = set()

    def query(self) -> bool:
        self.asked_by.add(threading.current_thread())
        return self.happened


def test_memory_that_a_gpu_still_reads_is_not_reused(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        batch, event = source.next(), Event()
        used = place(batch)
        source.recycle(batch, event)
        del batch
        others = [source.next() for _ in range(AHEAD + 4)]
        assert used not in {place(other) for other in others}
        event.happened = True
        source.recycle(others[0], event)
        later = [source.next() for _ in range(AHEAD + 4)]
        assert used in {place(other) for other in later}
        # In a thread of its own, the query would open the first GPU, whichever this process uses.
        assert event.asked_by == {threading.current_thread()}
        source.close()


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array,
        lambda array: array[10:20],
        lambda array: array.view(np.int32).reshape(5, -1)[1:],
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array.view(np.float32).reshape(25, 10)[3:])[:, 2],
        lambda array: torch.from_numpy(array)[5:].numpy()[::2],
        lambda array: memoryview(array)[3:],
        lambda array: torch.utils.dlpack.from_dlpack(torch.from_numpy(array)),
    ],
)
def test_memory_comes_back_when_the_last_view_of_it_is_gone(keep):
    pool = BufferPool(4)
    array = pool.take(1000)
    address = array.ctypes.data
    kept = keep(array)
    del array
    others = [pool.take(1000) for _ in range(3)]
    assert address not in {other.ctypes.data for other in others}
    del kept
    gc.collect()
    assert pool.take(1000).ctypes.data == address


def test_pool_keeps_as_much_as_its_limit_and_nothing_outsized():
    pool = BufferPool(2)
    arrays = [pool.take(1000) for _ in range(4)]
    places = {array.ctypes.data for array in arrays}
    del arrays
    again = [pool.take(900) for _ in range(2)]
    assert {array.ctypes.data for array in again} <= places
    smaller = pool.take(1000 // OUTSIZED - 1)
    del again, smaller
    assert len(pool.take(1000)) == 1000 and len(pool.take(0)) == 0
    large = pool.take(100 * OUTSIZED + 1)
    address = large.ctypes.data
    del large
    small = pool.take(100)
    assert small.ctypes.data != address and len(small) == 100


def test_dropped_batches_leave_their_memory_to_later_ones(tiny):
    """Crops of a batch that the caller dropped: as many addresses as batches are alive at a time, not as many as batches."""
    with ImageLoader(tiny, "train", 10, crop_size=200) as loader:
        seen, kept = set(), []
        for _ in range(3):
            for batch in loader:
                seen.add(batch.images.data_ptr())
                kept = [*kept[-1:], batch.images[3]]
    assert len(seen) <= loader.options.prefetch + 2


def test_a_failed_read_is_raised_and_a_new_source_continues(tiny, monkeypatch):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        with monkeypatch.context() as patched:
            patched.setattr(source.dataset, "gather", lambda *args: 1 / 0)
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    source.next()
        assert source.position == 0
        source.close()
        source = loader.open_source()
        assert np.array_equal(source.next().ids, loader.plan.ids(0)[0])
        source.close()


def test_a_disk_that_is_gone_ends_in_the_thread_that_takes_batches(tiny, monkeypatch):
    with ImageLoader(tiny, "train", 8) as loader:
        monkeypatch.setattr(loader.reader, "gather", lambda ids, out, stride: np.ones(len(ids), bool))  # as if each were corrupt
        with pytest.raises(CorruptRecord, match="fails its checksum"):
            next(iter(loader))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_a_shard_cut_or_unreadable_in_mid_epoch_costs_its_records_and_is_said(tiny_copy, tmp_path, caplog):
    """Both would be a bus error in a memory map."""
    shard = tiny_copy.split("train").shards[0]
    offsets = tiny_copy.load_index("train")["offset"]
    with ImageLoader(tiny_copy, "train", 8, shuffle="global") as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(tiny_copy.root / shard.name, int(offsets[22]))
        for _ in range(12):  # two epochs
            next(batches, None) or next(batches := iter(loader))
        assert {22, 23, 24} == loader.reader.reported
        assert "lies beyond the end of the shard, as the shard has changed since it was opened; delete" in caplog.text
        os.truncate(tiny_copy.root / shard.name, 0)
        with pytest.raises(CorruptRecord, match=f"{shard.name}: record .* lies beyond the end of the shard"):
            for _ in range(40):
                next(batches, None) or next(batches := iter(loader))
