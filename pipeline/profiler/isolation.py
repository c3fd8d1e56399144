"""Each stage of the loader alone, from memory, beside what this machine could do at most."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch

from imagefeed.pipeline.crops import HostCropper
from imagefeed.pipeline.graph import decode_pipeline, image_pipeline
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import limits, machine
from imagefeed.pipeline.profiler.accounting import synchronize
from imagefeed.pipeline.profiler.findings import Samples
from imagefeed.pipeline.profiler.trials import repeat
from imagefeed.pipeline.source import jpeg_size

WINDOWS, MIN_WINDOWS = 6, 3
KEPT = 8  # batches whose bytes are kept in memory and decoded over and over
PROBED = 1000  # records


def rates_of(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> Samples:
    """Images a second in each window but the first. The host's clock is right for a GPU too: it waits for it at both ends."""
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


def loader_alone(loader: ImageLoader, position: int, steps: int, seconds: float, cold: bool) -> tuple[Samples | None, int]:
    """Images a second of the whole loader from `position` on, and how many steps were taken.

    Cold, where their bytes have been put out of memory, each of at most `steps` steps is taken once, and the rate is None where
    they are too few. Warm, further epochs make up for what a small split lacks.
    """
    times = []
    with loader.reopened(position=position) as other:
        warm_up = other.options.prefetch + 1  # made while nobody took them
        batches = repeat(other)
        begin_s = time.perf_counter()
        for number in range(steps if cold else max(steps, warm_up + MIN_WINDOWS)):
            next(batches)
            if number + 1 >= warm_up:
                synchronize(other.device)
                times.append(time.perf_counter())
            if len(times) > MIN_WINDOWS and times[-1] - begin_s > seconds:
                break
    every = max((len(times) - 1) // WINDOWS, 1)
    rates = tuple(every * loader.plan.batch_size / (b - a) for a, b in itertools.pairwise(times[::every]))
    return Samples(rates) if rates else None, number + 1


def stages_alone(
    loader: ImageLoader, position: int, steps: int, seconds: float
) -> tuple[dict[str, Samples], dict[str, float], list[np.ndarray]]:
    """Rates of "read", "checksum", "decode" and "crop" alone; facts of the records; some JPEGs. Takes about `seconds`."""
    batch_size, cpu = loader.plan.batch_size, torch.device("cpu")
    rates: dict[str, Samples] = {}
    each_s = seconds / 4
    with loader.reopened(position=position, cache="none", read_ahead=0) as other:
        source = other.open_source()
        steps = min(steps, 64)
        begin_s = time.perf_counter()
        for number in range(steps):  # into memory, and mapped
            source.recycle(source.prepare(position + number), None)
            if time.perf_counter() - begin_s > each_s:
                break
        positions = itertools.cycle(range(position, position + number + 1))

        def read() -> None:
            source.recycle(source.prepare(next(positions)), None)

        whole = rates_of(read, batch_size, each_s / 2, cpu)
        checked, other.dataset.verify_checksums = other.dataset.verify_checksums, False
        rates["read"] = rates_of(read, batch_size, each_s / 2, cpu)
        other.dataset.verify_checksums = checked
        # Some batches over and over: their bytes come from memory, whatever the storage.
        feds = [source.prepare(position + n) for n in range(min(steps, KEPT))]
        jpegs = [fed.inputs[0] for fed in feds]
        flat = [np.array(other.dataset.jpeg(record_id)) for fed in feds for record_id in fed.ids.tolist()]
        if checked:
            rates["checksum"] = without(rates["read"].median, whole.median)
        decoder = decode_pipeline(lambda i: [jpegs[i % len(jpegs)]], batch_size, other.options)
        rates["decode"] = rates_of(decoder.run, batch_size, each_s, loader.device)
        if other._decode_only:
            decoded = decode_pipeline(lambda i: [jpegs[0]], batch_size, other.options).run()[0]
            cropper = HostCropper(other.options)
            rates["crop"] = rates_of(lambda: cropper(feds[0], decoded), batch_size, each_s, cpu)
            cropper.close()
        else:
            fed = [[batch, *fed.inputs[1:]] for batch, fed in zip(jpegs, feds, strict=True)]
            graph = image_pipeline(lambda i: fed[i % len(fed)], batch_size, other.options)
            both = rates_of(graph.run, batch_size, each_s, loader.device).median
            rates["crop"] = without(rates["decode"].median, both)
        source.close()
    sizes = np.array([jpeg_size(jpeg) for jpeg in flat[:PROBED]])
    facts = {
        "pixels an image": float(sizes.prod(1).mean()),
        "record bytes": float(np.mean([len(jpeg) for jpeg in flat])),
        "seconds to read a batch from memory": batch_size / whole.median,
    }
    return rates, facts, flat


def without(one: float, both: float) -> Samples:
    """The rate of what makes `both` slower than `one`, which is in it; where it costs next to nothing, 50 times that."""
    return Samples((1 / max(1 / both - 1 / one, 0.02 / both),))


def limits_of(loader: ImageLoader, jpegs: list[np.ndarray], ids: np.ndarray, precision: str, seconds: float) -> dict[str, float]:
    """What the machine can do: of the disk, memory, libjpeg-turbo, matrix products, and copies to a GPU."""
    records, size = limits.disk_rate(loader.manifest, loader.dataset.split, ids, seconds / 4)
    found = {"disk records/s": records, "disk bytes/s": size}
    found["memory bytes/s"] = limits.memory_rate(seconds / 4, loader.device)
    found["libjpeg-turbo images/s a core"] = limits.decode_rate(jpegs[:64], seconds / 4)
    found["matrix FLOP/s"] = limits.matrix_rate(precision, seconds / 4, loader.device)
    if loader.device.type == "cuda":
        found["copy bytes/s"] = limits.copy_rate(seconds / 4, loader.device)
    return found


def facts_before(loader: ImageLoader) -> dict[str, float]:
    """What is known before a byte is read: how much of the split is in memory, and how much memory there is."""
    manifest, split = loader.manifest, loader.dataset.split
    ids = np.random.default_rng(0).permutation(len(loader.dataset))[:PROBED]
    available, limit = machine.memory_bytes()
    return {
        "resident before": machine.resident_share(manifest, split, ids),
        "dataset bytes": float(sum(shard.bytes for shard in manifest.split(split).shards)),
        "memory available bytes": float(available),
        "memory limit bytes": float(limit),
    }
