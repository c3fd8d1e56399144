"""Batches are read ahead of the thread that takes them, into memory of those that are done."""

import threading

import numpy as np
import pytest

from imagefeed.dataset.reader import CorruptRecord
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.source import AHEAD, OUTSIZED


def test_what_is_read_ahead_is_what_is_read_when_asked(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        for position in (0, 1, 2, 40, 41, 7):
            if position in (40, 7):
                source.restart(position)
            fed, wanted = source.next(), source.prepare(position)
            assert source.position == position + 1
            for name in ("ids", "labels", "valid", "means", "missing"):
                assert np.array_equal(getattr(fed, name), getattr(wanted, name))
            assert np.array_equal(fed.inputs[0], wanted.inputs[0])
        source.close()


def test_memory_is_taken_again_when_a_batch_is_out_and_not_before(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        held = [source.next() for _ in range(6)]
        places = {fed.buffer.ctypes.data for fed in held}
        assert len(places) == 6
        copies = [fed.inputs[0].copy() for fed in held]
        for fed in held[:3]:
            source.recycle(fed, None)
        later = [source.next() for _ in range(AHEAD + 4)]
        assert {fed.buffer.ctypes.data for fed in later} & {fed.buffer.ctypes.data for fed in held[:3]}
        for fed, copy in zip(held[3:], copies[3:], strict=True):
            assert fed.buffer.ctypes.data not in {other.buffer.ctypes.data for other in later}
            assert np.array_equal(fed.inputs[0], copy)
        source.close()


class Event:
    """Of a GPU's stream, as torch.cuda.Event is."""

    def __init__(self):
        self.happened = False
        self.asked_by: set[threading.Thread] = set()

    def query(self) -> bool:
        self.asked_by.add(threading.current_thread())
        return self.happened


def test_memory_that_a_gpu_still_reads_is_not_taken(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        fed, event = source.next(), Event()
        source.recycle(fed, event)
        others = [source.next() for _ in range(AHEAD + 4)]
        assert fed.buffer.ctypes.data not in {other.buffer.ctypes.data for other in others}
        event.happened = True
        source.recycle(others[0], event)
        later = [source.next() for _ in range(AHEAD + 4)]
        places = {other.buffer.ctypes.data for other in later}
        assert {fed.buffer.ctypes.data, others[0].buffer.ctypes.data} <= places
        # In a thread of its own the question would open the first GPU, whichever this process has.
        assert event.asked_by == {threading.current_thread()}
        source.close()


def test_memory_that_one_long_record_made_large_is_not_kept(tiny):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        fed = source.prepare(0)
        source.recycle(fed._replace(buffer=np.empty(OUTSIZED * len(fed.buffer) + 4096 * 8, np.uint8)), None)
        assert len(source.prepare(0).buffer) == len(fed.buffer)
        source.close()


def test_after_a_failed_read_the_same_batch_comes(tiny, monkeypatch):
    with ImageLoader(tiny, "train", 8) as loader:
        source = loader.open_source()
        gather = source.dataset.gather
        monkeypatch.setattr(source.dataset, "gather", lambda *args: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                source.next()
        monkeypatch.setattr(source.dataset, "gather", gather)
        source.restart(source.position)
        assert np.array_equal(source.next().ids, loader.plan.ids(0)[0])
        source.close()


def test_a_disk_that_is_gone_ends_in_the_thread_that_takes_batches(tiny, monkeypatch):
    with ImageLoader(tiny, "train", 8) as loader:
        monkeypatch.setattr(loader.dataset, "gather", lambda ids, out, stride: np.ones(len(ids), bool))  # as if each were corrupt
        with pytest.raises(CorruptRecord, match="fails its checksum"):
            next(iter(loader))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
