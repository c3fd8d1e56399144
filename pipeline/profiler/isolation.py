"""Each stage of the loader alone, with its bytes in memory, and what is known about the dataset and the machine."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch

from imagefeed.pipeline.crops import HostCropper
from imagefeed.pipeline.graph import decode_pipeline, image_pipeline
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import synchronize
from imagefeed.pipeline.profiler.findings import Samples
from imagefeed.pipeline.source import jpeg_size

WINDOWS, MIN_WINDOWS = 6, 3
KEPT = 8  # batches whose bytes are kept in memory and decoded over and over
READ_STEPS = 64  # batches that are read over and over
PROBED = 1000  # records
CPU = torch.device("cpu")


def rate_of(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> Samples:
    """Images/s in each window but the first. The host's clock is right for a GPU too: it waits for it at both ends."""
    rates: list[float] = []
    begin_s = time.perf_counter()
    while len(rates) <= MIN_WINDOWS or (len(rates) <= WINDOWS and time.perf_counter() - begin_s < seconds):
        steps = 0
        start_s = time.perf_counter()
        while steps == 0 or time.perf_counter() - start_s < seconds / (1 + WINDOWS):
            step()
            steps += 1
        synchronize(device)
        rates.append(steps * images / (time.perf_counter() - start_s))
    return Samples(tuple(rates[1:]))


def stages_alone(
    loader: ImageLoader, position: int, steps: int, seconds: float
) -> tuple[dict[str, Samples], dict[str, float], list[np.ndarray]]:
    """Rates of "read", "checksum", "decode" and "crop" alone; facts about the records; some JPEGs. Takes about `seconds`."""
    batch_size, each_s = loader.plan.batch_size, seconds / 4
    rates: dict[str, Samples] = {}
    with loader.reopened(position=position, cache="none", read_ahead=0) as other:
        source = other.open_source()
        steps = min(steps, READ_STEPS)
        begin_s = time.perf_counter()
        for number in range(steps):  # into memory, and mapped
            source.recycle(source.prepare(position + number), None)
            if time.perf_counter() - begin_s > each_s:
                break
        positions = itertools.cycle(range(position, position + number + 1))

        def read() -> None:
            source.recycle(source.prepare(next(positions)), None)

        whole = rate_of(read, batch_size, each_s / 2, CPU)
        checked, other.dataset.verify_checksums = other.dataset.verify_checksums, False
        rates["read"] = rate_of(read, batch_size, each_s / 2, CPU)
        other.dataset.verify_checksums = checked
        if checked:
            rates["checksum"] = without(rates["read"].median, whole.median)
        batches = [source.prepare(position + n) for n in range(min(steps, KEPT))]
        jpegs = [batch.inputs[0] for batch in batches]
        decoder = decode_pipeline(lambda i: [jpegs[i % len(jpegs)]], batch_size, other.options)
        rates["decode"] = rate_of(decoder.run, batch_size, each_s, loader.device)
        if other._decode_only:
            decoded = decode_pipeline(lambda i: [jpegs[0]], batch_size, other.options).run()[0]
            cropper = HostCropper(other.options)
            rates["crop"] = rate_of(lambda: cropper(batches[0], decoded), batch_size, each_s, CPU)
            cropper.close()
        else:
            graph = image_pipeline(lambda i: batches[i % len(batches)].inputs, batch_size, other.options)
            both = rate_of(graph.run, batch_size, each_s, loader.device).median
            rates["crop"] = without(rates["decode"].median, both)
        flat = [np.array(other.dataset[record_id]) for batch in batches for record_id in batch.ids.tolist()]
        source.close()
    facts = {
        "pixels_per_image": float(np.mean([np.prod(jpeg_size(jpeg)) for jpeg in flat[:PROBED]])),
        "record_bytes": float(np.mean([len(jpeg) for jpeg in flat])),
        "read_s": batch_size / whole.median,
    }
    return rates, facts, flat


def without(one: float, both: float) -> Samples:
    """The rate of what makes `both` slower than `one`, which is a part of it; 50 times `both` if it costs next to nothing."""
    return Samples((1 / max(1 / both - 1 / one, 0.02 / both),))


def facts_before(loader: ImageLoader) -> dict[str, float]:
    """What is known before a byte is read: how much of the split is in memory, and how much memory there is."""
    manifest, split = loader.manifest, loader.dataset.split
    ids = np.random.default_rng(0).permutation(len(loader.dataset))[:PROBED]
    available, limit = machine.memory_bytes()
    return {
        "resident_share": machine.resident_share(manifest, split, ids),
        "dataset_bytes": float(sum(shard.bytes for shard in manifest.split(split).shards)),
        "available_bytes": float(available),
        "limit_bytes": float(limit),
    }
