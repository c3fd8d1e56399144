"""Each stage of the loader alone, and the most that this machine can do: disk, memory, libjpeg-turbo, matrix products, copies."""

import contextlib
import itertools
import math
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from imagefeed.codec.decode import JOB, Format, decode_jobs, find_sizes
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import jpeg_size
from imagefeed.pipeline.cache import RGB, HostCache
from imagefeed.pipeline.crops import HostCropper
from imagefeed.pipeline.graph import decode_pipeline, image_pipeline
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.native import NativeBatches
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import mark, seconds_between, synchronize
from imagefeed.pipeline.profiler.findings import Samples
from imagefeed.pipeline.profiler.machine import PAGE, pages_of
from imagefeed.pipeline.source import InputBatch, Source

READERS = 16  # requests in flight; an NVMe disk takes more, a spinning one fewer
COPIED = {"cuda": 1 << 28, "cpu": 1 << 26}  # bytes: more than caches hold, and little enough where memory is short
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices: 2 ms of a GPU of 600 TFLOP/s, 10 ms of two cores
CPU = torch.device("cpu")
WINDOWS, MIN_WINDOWS = 6, 3
KEPT = 8  # batches whose bytes are kept in memory and decoded over and over
READ_STEPS = 64  # batches that are read over and over
PROBED = 1000  # records


def fastest(work: Callable[[], object], seconds: float, device: torch.device = CPU) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, at least three; on a GPU by events."""
    best, begin_s, calls = math.inf, time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - begin_s < seconds:
        start = mark(device)
        work()
        end = mark(device)
        synchronize(device)
        best = min(best, seconds_between(start, end))
        calls += 1
    return best


def disk_rate(manifest: Manifest, split: str, ids: np.ndarray, seconds: float) -> tuple[float, float]:
    """(records/s, bytes/s) of the disk itself: records read past the page cache (O_DIRECT), READERS at a time; (0, 0) if the
    file system offers no such reads."""
    with contextlib.ExitStack() as stack:
        reads = []
        try:
            for path, _, ranges in pages_of(manifest, split, ids):
                file = os.open(path, os.O_RDONLY | os.O_DIRECT)
                stack.callback(os.close, file)
                reads += [(file, PAGE * begin, PAGE * (end - begin)) for begin, end in ranges]
            if not reads:  # of a dataset in a store
                return 0.0, 0.0
            np.random.default_rng(0).shuffle(reads)
            longest = max(size for _, _, size in reads)
            start_s = time.perf_counter()

            def read(part: list) -> tuple[int, int]:
                done = 0, 0
                with mmap.mmap(-1, longest) as buffer:  # O_DIRECT wants whole pages
                    for file, begin, size in part:
                        if time.perf_counter() > start_s + seconds:
                            break
                        with memoryview(buffer)[:size] as view:
                            done = done[0] + 1, done[1] + os.preadv(file, [view], begin)
                return done

            with ThreadPoolExecutor(READERS) as pool:
                done = np.array(list(pool.map(read, (reads[n::READERS] for n in range(READERS)))))
        except OSError:
            return 0.0, 0.0
        return tuple((done.sum(0) / (time.perf_counter() - start_s)).tolist())


def memory_rate(seconds: float, device: torch.device) -> float:
    """Bytes/s read and written by all threads together, of arrays that no cache holds."""
    source = torch.ones(COPIED[device.type] // 4, dtype=torch.float32, device=device)
    into = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: into.copy_(source), seconds, device)


def copy_rate(seconds: float, device: torch.device) -> float:
    """Bytes/s from pinned host memory to a GPU."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, pin_memory=True)
    into = torch.empty_like(source, device=device)
    return source.nbytes / fastest(lambda: into.copy_(source, non_blocking=True), seconds, device)


def decode_rate(jpegs: list[np.ndarray], seconds: float) -> float:
    """Images/s of libjpeg-turbo alone on one core."""
    return len(jpegs) / fastest(lambda: [simplejpeg.decode_jpeg(data.data) for data in jpegs], seconds)


def native_rate(jpegs: list[np.ndarray], crop_size: int, to_end: bool, seconds: float) -> float:
    """Images/s of imagefeed's own decoder alone on one core: the bytes of center crops, `to_end` as decode_jobs."""
    jobs, out = np.zeros(len(jpegs), JOB), np.empty((crop_size, crop_size, RGB), np.uint8)
    jobs["data"], jobs["length"] = [data.ctypes.data for data in jpegs], [len(data) for data in jpegs]
    find_sizes(jobs)
    jobs["height"], jobs["width"], jobs["out"] = crop_size, crop_size, out.ctypes.data
    jobs["top"], jobs["left"] = (jobs["image_height"] - crop_size) // 2, (jobs["image_width"] - crop_size) // 2
    form = Format("uint8", channels_last=True)
    return len(jpegs) / fastest(lambda: decode_jobs(jobs, form, 0, len(jobs), to_end), seconds)


@contextlib.contextmanager
def as_convolutions(device: torch.device) -> Iterator[None]:
    """Lets a GPU multiply float32 matrices in TF32 if it convolves in it, as PyTorch does by default: the most that it can do."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def matrix_rate(precision: str, seconds: float, device: torch.device) -> float:
    """Floating-point operations per second that PyTorch gets from the device at its current clock; takes about `seconds`.

    That is the fastest of some square matrix products, and on a CPU, where they are faster by a sixth, of some convolutions of
    the paper's conv3; a data sheet promises more. With neighbors on the machine it is too low, and the MFU too high, beyond 1
    if they leave. `precision` is float32 or bfloat16.
    """
    dtype = getattr(torch, precision)
    own = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        # Zeros or ones cost a GPU less power, so that it would clock higher than it ever does in training.
        return torch.randn(*shape, generator=own, device=device).to(dtype)

    side, each_s = SIDE[device.type], seconds / (1 if device.type == "cuda" else 2)
    a, product = random(side, side), random(side, side)
    with as_convolutions(device):
        rate = 2 * side**3 / fastest(lambda: torch.mm(a, a, out=product), each_s, device)
    if device.type == "cpu":
        images, kernels = random(32, 256, 13, 13), random(384, 256, 3, 3)
        images, kernels = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (images, kernels))
        flops = 2 * 32 * 13**2 * kernels.numel()
        rate = max(rate, flops / fastest(lambda: F.conv2d(images, kernels, padding=1), each_s, device))
    return rate


def rate_of(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> Samples:
    """Images/s in each window but the first. The host's clock is right for a GPU too: it waits for it at both ends."""
    rates, begin_s = [], time.perf_counter()
    while len(rates) <= MIN_WINDOWS or (len(rates) <= WINDOWS and time.perf_counter() - begin_s < seconds):
        steps, start_s = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start_s < seconds / (1 + WINDOWS):
            step()
            steps += 1
        synchronize(device)
        rates.append(steps * images / (time.perf_counter() - start_s))
    return Samples(tuple(rates[1:]))


def stages_alone(
    loader: ImageLoader, position: int, steps: int, seconds: float
) -> tuple[dict[str, Samples], dict[str, float], list[np.ndarray]]:
    """Rates of "read", "checksum", "decode" and "crop" alone; facts about the records; some JPEGs. Takes about `seconds`.

    imagefeed's own decoder crops as it decodes, so "crop" is then of a loader with a cache only.
    """
    batch_size, each_s = loader.plan.batch_size, seconds / 4
    rates: dict[str, Samples] = {}
    with (
        loader.reopened(position=position, cache="none", read_ahead=0) as other,
        contextlib.closing(other.open_source()) as source,
    ):

        def read(place: int) -> None:
            source.recycle(source.prepare(place), None)

        steps, begin_s = min(steps, READ_STEPS), time.perf_counter()
        for number in range(steps):  # into memory, and mapped
            read(position + number)
            if time.perf_counter() - begin_s > each_s:
                break
        positions = itertools.cycle(range(position, position + number + 1))
        whole = rate_of(lambda: read(next(positions)), batch_size, each_s / 2, CPU)
        checked, other.reader.verify_checksums = other.reader.verify_checksums, False
        rates["read"] = rate_of(lambda: read(next(positions)), batch_size, each_s / 2, CPU)
        other.reader.verify_checksums = checked
        if checked:
            rates["checksum"] = without(rates["read"].median, whole.median)
        batches = [source.prepare(position + n) for n in range(min(steps, KEPT))]
        facts: dict[str, float] = {}
        if other.decoder != "dali":
            rates |= native_stages(other, source, batches, each_s, cached=loader.arguments["cache"] != "none")
            facts["cores_images_per_s"] = rates["decode"].median
        if other.decoder != "native":
            rates |= dali_stages(other, source, batches, each_s)
            facts["dali_images_per_s"] = rates["decode"].median
        if other.decoder == "both":  # each has its part of every batch
            share = other.arguments["native_share"]
            parts = facts["cores_images_per_s"] / max(share, 1e-9), facts["dali_images_per_s"] / max(1 - share, 1e-9)
            rates["decode"] = Samples((min(parts),))
        flat = [np.array(other.reader[record_id]) for batch in batches for record_id in batch.ids.tolist()]
    facts |= {
        "pixels_per_image": float(np.mean([np.prod(jpeg_size(jpeg)) for jpeg in flat[:PROBED]])),
        "record_bytes": float(np.mean([len(jpeg) for jpeg in flat])),
        "read_s": batch_size / whole.median,
    }
    return rates, facts, flat


class Kept:
    """Batches from memory, over and over, in place of a Source."""

    waits = False

    def __init__(self, source: Source, batches: list[InputBatch]):
        self.dataset, self.spans = source.dataset, deque[tuple[str, float, float]](maxlen=1)
        self.next = itertools.cycle(batches).__next__


def native_stages(
    loader: ImageLoader, source: Source, batches: list[InputBatch], seconds: float, cached: bool
) -> dict[str, Samples]:
    """Rates of "decode", which crops in the same pass, of "upload" to a GPU, and if `cached`, of "crop" alone, from decoded
    images."""

    def opened(kept: list[InputBatch], cache: HostCache | None = None) -> contextlib.AbstractContextManager[NativeBatches]:
        return contextlib.closing(NativeBatches(Kept(source, kept), loader.options, loader.open_memory(), cache))

    with opened(batches) as decoding:
        found = {"decode": rate_of(decoding.next, loader.plan.batch_size, seconds, loader.device)}
    if loader._open_streams is not None:
        found["upload"] = upload_rate(loader, seconds / 2)
    if not cached:
        return found
    cache = HostCache(len(loader.reader), RGB * sum(int(np.prod(jpeg_size(jpeg))) for jpeg in batches[0].inputs[0]))
    held = batches[0]._replace(inputs=[batches[0].inputs[0][:0]], missing=batches[0].missing[:0])
    with opened(batches[:1], cache) as filling:
        filling.next()
    with opened([held], cache) as cropping:
        return found | {"crop": rate_of(cropping.next, loader.plan.batch_size, seconds, loader.device)}


def upload_rate(loader: ImageLoader, seconds: float) -> Samples:
    """Images/s whose crops are copied to the device and normalized there, if there is nothing to decode."""
    with contextlib.closing(loader.open_memory()) as memory:
        jobs = np.zeros((loader.plan.batch_size, loader.options.views), JOB)
        return rate_of(lambda: memory.hand(memory.take(jobs)), len(jobs), seconds, loader.device)


def dali_stages(loader: ImageLoader, source: Source, batches: list[InputBatch], seconds: float) -> dict[str, Samples]:
    """Rates of "decode" and "crop" alone."""
    jpegs, batch_size = [batch.inputs[0] for batch in batches], loader.plan.batch_size
    decoder = decode_pipeline(lambda i: [jpegs[i % len(jpegs)]], batch_size, loader.options)
    decoding = rate_of(decoder.run, batch_size, seconds, loader.device)
    if loader._decode_only:
        decoded = decode_pipeline(lambda i: [jpegs[0]], batch_size, loader.options).run()[0]
        with contextlib.closing(HostCropper(loader.options, loader.open_memory())) as cropper:
            return {"decode": decoding, "crop": rate_of(lambda: cropper(batches[0], decoded), batch_size, seconds, CPU)}
    graph = image_pipeline(lambda i: batches[i % len(batches)].inputs, batch_size, loader.options)
    both = rate_of(graph.run, batch_size, seconds, loader.device).median
    return {"decode": decoding, "crop": without(decoding.median, both)}


def without(one: float, both: float) -> Samples:
    """The rate of what makes `both` slower than `one`, which is a part of it; 50 times `both` if it costs next to nothing."""
    return Samples((1 / max(1 / both - 1 / one, 0.02 / both),))


def facts_before(loader: ImageLoader) -> dict[str, float]:
    """What is known before a byte is read: how much of the split is in memory, and how much memory there is."""
    manifest, split = loader.manifest, loader.reader.split
    ids = np.random.default_rng(0).permutation(len(loader.reader))[:PROBED]
    available, limit = machine.memory_bytes()
    return {
        "resident_share": machine.resident_share(manifest, split, ids),
        "dataset_bytes": float(sum(shard.bytes for shard in manifest.split(split).shards)),
        "available_bytes": float(available),
        "limit_bytes": float(limit),
    }
