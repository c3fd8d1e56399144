"""Crops that threads of the CPU send to a device, by streams and events: on a CPU the side stream is a thread."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from imagefeed.codec.decode import JOB
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.handover import DeviceMemory
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.plan import by_cores
from imagefeed.pipeline.streams import HostStreams
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal

IMAGE = 256 * 256 * 3
SLOW_S = 0.01  # of each copy: longer than a batch takes to decode


def batches(manifest, split="train", batch_size=8, epochs=2, lag_s=None, **options):
    """All batches of so many epochs; with `lag_s` they go through pinned memory and a side stream that is so slow."""
    with ImageLoader(manifest, split, batch_size, **options) as loader:
        if lag_s is not None:
            loader._open_streams = lambda: HostStreams(lag_s)
        return [batch for _ in range(epochs) for batch in loader]


OPTIONS = [
    {},
    {"dtype": "bfloat16", "std": "imagenet", "memory_format": "channels_last", "prefetch": 1},
    {"dtype": "uint8", "pca_jitter": 0.5},
    {"dtype": "uint8", "memory_format": "channels_last", "num_threads": 5},
    {"mean": "image", "std": "dataset", "dtype": "float16"},
    {"crops": 2, "crop_size": 64, "memory_format": "channels_last"},
    {"random_resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.1), "crop_size": 97},
    {"auto_augment": "trivial", "cutmix": 1.0, "crop_size": 64},
    {"cache": "host", "cache_bytes": 20 * IMAGE},
    {"cache": "host", "decoder": "dali", "cache_bytes": 20 * IMAGE, "mean": "image"},
    {"split": "val", "views": "ten", "epochs": 1, "memory_format": "channels_last"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_arrives_over_a_slow_side_stream_equals_what_a_cpu_keeps(tiny, options):
    found, wanted = batches(tiny, lag_s=SLOW_S, **options), batches(tiny, **options)
    assert equal(found, wanted)
    assert [one.images.stride() for one in found] == [other.images.stride() for other in wanted]


@pytest.mark.parametrize("options", [OPTIONS[n] for n in (0, 1, 2, 5, 10)], ids=str)
@pytest.mark.parametrize(("share", "lag_s"), [(0.5, SLOW_S), (0.5, None), (0.05, 0.0), (1.0, None)])
def test_both_decoders_together_equal_one(tiny, options, share, lag_s):
    """Also where one of them gets no record of a batch."""
    together = batches(tiny, lag_s=lag_s, decoder="both", native_share=share, **options)
    assert equal(together, batches(tiny, decoder="native", **options))


@pytest.mark.parametrize("options", [OPTIONS[n] for n in (0, 1, 5, 10)], ids=str)
@pytest.mark.parametrize("decoder", ["dali", "both"])
def test_dalis_bytes_normalized_afterwards_equal_what_a_cpu_keeps(tiny, options, decoder):
    with ImageLoader(tiny, **{"split": "train", "batch_size": 8, "decoder": decoder} | without_epochs(options)) as loader:
        loader._as_bytes, loader._decode_only = True, False
        found = list(loader)
    wanted = batches(tiny, decoder="native", **options | {"epochs": 1})
    assert equal(found, wanted)
    assert [one.images.stride() for one in found] == [other.images.stride() for other in wanted]


def without_epochs(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "epochs"}


def test_which_decoder_takes_a_record_is_decided_by_its_id():
    ids = np.arange(100_000)
    for share in (0.0, 0.3, 1.0):
        cores = by_cores(ids, share)
        assert abs(cores.mean() - share) < 0.005
        assert (by_cores(ids[::-7], share) == cores[::-7]).all()
    assert (by_cores(ids, 0.3) <= by_cores(ids, 0.6)).all()


def test_both_decoders_replace_damaged_records(tiny_copy):
    for record in range(3, 47, 6):
        flip_bit(tiny_copy, "train", record)
    found, wanted = (batches(tiny_copy, decoder=decoder, lag_s=0) for decoder in ("both", "native"))
    assert equal(found, wanted)


def test_a_run_with_both_goes_on_only_with_both_and_the_same_share(tiny):
    states = {}
    for name, options in {"native": {}, "both": {"native_share": 0.5}, "more": {"native_share": 0.75}}.items():
        decoder = "native" if name == "native" else "both"
        with ImageLoader(tiny, "train", 8, decoder=decoder, **options) as loader:
            next(iter(loader))
            states[name] = loader.state_dict(), loader.reopened()
    for (name, (state, _)), (other, (_, loader)) in itertools.product(states.items(), states.items()):
        with loader:
            if name == other:
                loader.load_state_dict(state)
                assert loader.position == 1
                continue
            with pytest.raises(UserError, match="saved state has (decoder|native_share) [^,]*, this run .*, or start a new run"):
                loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decoder": "both", "cache": "host"}, "decoder=both decodes every record each time; use decoder=native with cache=host"),
        ({"decoder": "native", "cache": "device"}, "decoder=native: DALI fills the cache on the device; use decoder=auto"),
    ],
)
def test_a_decoder_that_a_cache_excludes_is_refused(tiny, options, sentence):
    with pytest.raises(UserError, match=sentence):
        ImageLoader(tiny, "train", 8, **options)


def test_pinned_memory_is_written_again_only_after_its_copy():
    """The side stream is held up: the third batch must wait for the first one's copy, and says for how long."""
    options = GraphOptions(8, dtype="uint8", memory_format="channels_last", prefetch=1)
    held, streams = threading.Event(), HostStreams()
    memory = DeviceMemory(options, 2, streams)
    jobs = [np.zeros((2, 1), JOB) for _ in range(3)]
    first = memory.take(jobs[0])
    first.memory.memory.fill_(1)
    streams.queue(held.wait)
    handed, third = [], []
    threads = [
        threading.Thread(target=lambda: handed.append(memory.hand(first))),
        threading.Thread(target=lambda: third.append(memory.take(jobs[2]))),
    ]
    memory.take(jobs[1])
    try:
        threads[0].start()
        while not memory._free:  # until the first one's copy is queued
            time.sleep(0.001)
        threads[1].start()
        threads[1].join(0.05)
        assert not third
    finally:
        held.set()
        for thread in threads:
            thread.join()
    assert third[0].memory is first.memory and third[0].blocked_s >= 0.04
    assert (handed[0] == 1).all() and handed[0].shape == (2, 3, 8, 8)
    memory.close()


def test_a_crop_takes_150528_bytes_of_the_bus_and_its_mean():
    memory = DeviceMemory(GraphOptions(224), 64, HostStreams())
    copied, queue = [], memory.streams.queue
    memory.streams.queue = lambda work, after: copied.append(work()) or queue(lambda: None, after)
    memory.hand(memory.take(np.zeros((64, 1), JOB)))
    assert [len(tensor) for tensor in copied] == [64 * (3 * 224 * 224 + 12)]
    memory.close()


def test_a_copy_that_fails_is_an_error_of_the_batch():
    streams = HostStreams()
    event = streams.queue(lambda: torch.empty(2)[3])
    with pytest.raises(IndexError):
        streams.follow(event)
    streams.close()
