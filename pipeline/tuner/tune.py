"""Finds the settings of the loader that are fastest on this machine, in about a minute.

What is compared is the rate of the loader alone. Loader and training together would be what counts, but cannot tell settings
apart on a CPU: there a step takes seconds and 1 to 6 % of it waits for data, less than two measurements differ (docs/log.md).
Decoding costs as much processor time with any number of threads, so of settings that are equally fast the one with the fewest
threads is taken, which leaves the cores to training.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.cache import RGB, available_bytes
from imagefeed.pipeline.graph import HW_DECODER_LOAD, PREFETCH
from imagefeed.pipeline.loader import READ_AHEAD, ImageLoader, choose_device
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.windows import Bench, free_bytes, read_stretch, room_of
from imagefeed.pipeline.tuner.search import Round, Setting, choose, score, search

BATCH_SIZE = 128
PREFETCHES, READ_AHEADS, HW_LOADS = (1, 2, 3, 4, 6, 8), (0, 8, 32), (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
ENDING = 0.1  # of the time, to load the libraries and to close all that is open
RESERVED = 0.12  # of the time at most, for windows after the search
READ_SHARE = 0.05  # of the time at most, to bring records into memory before they are measured
WINDOWS = 120  # in the time; half of it goes into what each loader makes ahead before its window begins
FILL_SHARE = 0.06  # of the time, to fill a cache
FILL_STEPS = 8  # at least
TURNS = 3
ENOUGH = 3  # windows of each setting, on average
MEMORY_STEPS = 20  # that are read again and again
PAYS = 1.1  # times as fast a cache has to be
SLOW_STORAGE = 0.8  # of the rate from memory
DISTURBED = 0.1  # of the processors in the hands of other programs


@dataclass(frozen=True)
class Tuned:
    """What was found. `settings` are arguments of ImageLoader, those that were tuned; `rounds` all that was measured (search.py)
    from `start`, the loader's defaults; `notes` say what was found about the cache, storage and other programs."""

    settings: dict[str, object]
    chosen: Setting
    start: Setting
    axes: tuple[str, ...]
    rounds: list[Round]
    notes: tuple[str, ...]
    seconds: float
    cache_bytes: int  # that the cache of `settings` takes, 0 where there is none
    others: float  # the share of the processors that other programs had meanwhile

    @property
    def gain(self) -> float:
        """How many times as fast as the defaults, the cache left aside."""
        known = score(self.rounds)
        return math.exp(known[self.chosen] - known[self.start])


def tune(
    manifest: Manifest,
    split: str | None = None,
    batch_size: int | None = None,
    *,
    device: torch.device | str = "auto",
    crop_size: int = 224,
    seconds: float = 60,
    cold: bool | None = None,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
    **looks,
) -> Tuned:
    """Measures loaders of a split for at most `seconds`; `looks` are further arguments of ImageLoader.

    `batch_size` is 128 where none is given, or all of a smaller split. With `cold` each record is read from storage, as where the
    dataset is larger than memory; None finds out. Raises UserError as ImageLoader does.
    """
    begin_s, before = time.perf_counter(), machine.counters()
    device = choose_device(device)
    split = split or manifest.train_split
    batch_size = batch_size or min(BATCH_SIZE, manifest.split(split).records)
    if cold is None:
        cold = sum(shard.bytes for shard in manifest.split(split).shards) > machine.memory_bytes()[0]
    start = Setting(len(os.sched_getaffinity(0)), PREFETCH, READ_AHEAD, HW_DECODER_LOAD)
    axes = axes_of(start.num_threads, device, cold)
    tried: list[Setting] = []

    def spent() -> float:
        return (time.perf_counter() - begin_s) / seconds

    def reserved(windows: int) -> float:
        """The share of the time to be kept for so many windows, and for what else comes after the search."""
        each_s = (time.perf_counter() - first_s) / max(len(tried), 1)
        return min(windows * each_s / seconds, RESERVED) + FILL_SHARE + ENDING

    def open_loader(**options) -> ImageLoader:
        return ImageLoader(manifest, split, batch_size, crop_size=crop_size, device=device, **options, **looks)

    on_progress(0.0, "reading")
    with open_loader() as loader:
        stretch = len(loader) if cold else read_stretch(loader, begin_s + seconds * READ_SHARE)
    first_s = time.perf_counter()
    with Bench(open_loader, seconds / WINDOWS / 2, stretch, cold, room_of(device)) as bench:

        def measure(setting: Setting) -> float:
            tried.append(setting)
            on_progress(spent(), f"{len(tried)} windows of {len(set(tried))} settings")
            return bench.rate(setting)

        # What comes after the search takes as long as so many windows.
        later = (2 * TURNS + 2) * (1 + cold)
        rounds = search(axes, start, measure, lambda: spent() / (1 - reserved(later)))
        chosen = choose(rounds, start)
        settings: dict[str, object] = {name: getattr(chosen, name) for name in axes}
        notes = [] if len(tried) >= ENOUGH * len(set(tried)) else ["these are few windows; give more --seconds"]
        on_progress(spent(), "storage and caches")
        if cold:
            notes += judge_storage(bench, chosen, looks.get("shuffle", "global"))
        pays, words = try_caches(bench, manifest, split, batch_size, chosen, seconds, device, looks)
        needed = 0
        if pays:
            settings["cache"], needed = "host", decoded_bytes(manifest, split)
        notes += words
    others = machine.others_share(before, machine.counters())
    if others > DISTURBED:
        notes.append(f"other programs had {others:.0%} of the processors meanwhile; tune again when they are quiet")
    on_progress(1.0, "done")
    return Tuned(settings, chosen, start, tuple(axes), rounds, tuple(notes), time.perf_counter() - begin_s, needed, others)


def axes_of(cores: int, device: torch.device, cold: bool) -> dict[str, tuple]:
    """What each option is tried at. How far to read ahead matters only where records come from storage."""
    threads = {2**n for n in range(cores.bit_length()) if cores / 16 <= 2**n}
    axes: dict[str, tuple] = {"num_threads": tuple(sorted(threads | {-(-cores * 3 // 4), cores, -(-cores * 3 // 2)}))}
    if device.type == "cuda":
        axes["hw_decoder_load"] = HW_LOADS
    axes["prefetch"] = PREFETCHES
    if cold:
        axes["read_ahead"] = READ_AHEADS
    return axes


def judge_storage(bench: Bench, chosen: Setting, shuffle: str) -> list[str]:
    """What reading from storage costs. The shuffle is only advised: it decides in which order a net learns."""
    rates: dict[str, list[float]] = {"storage": [], "memory": []}
    bench.rate(chosen, MEMORY_STEPS)  # brings them into memory
    for _ in range(TURNS):
        rates["storage"].append(bench.rate(chosen))
        rates["memory"].append(bench.rate(chosen, MEMORY_STEPS))
    share = statistics.median(a / b for a, b in zip(rates["storage"], rates["memory"], strict=True))
    found = f"storage: records that are not in memory come at {min(share, 1):.0%} of the rate of those that are"
    if share >= SLOW_STORAGE or shuffle != "global":
        return [found]
    return [f"{found}; --shuffle blocks reads them as they are stored, but takes them in another order, so it is left to you"]


def try_caches(
    bench: Bench,
    manifest: Manifest,
    split: str,
    batch_size: int,
    chosen: Setting,
    seconds: float,
    device: torch.device,
    looks: dict[str, object],
) -> tuple[bool, list[str]]:
    """Whether the cache in host memory pays, and what was found in words. That on the device is only advised: its chroma is
    coarser, so it decides what a net learns."""
    if looks.get("random_resized_crop") or any(looks.get("color_jitter", ())):
        return False, ["cache none: it does not go with --random-resized-crop and --color-jitter"]
    needed, records = decoded_bytes(manifest, split), manifest.split(split).records
    if needed is None:
        return False, ["cache none: images of different sizes take nobody knows how much; try --cache host"]
    room = {"host": (needed, free_bytes())}
    if device.type == "cuda":
        room["device"] = (needed // 2, available_bytes(device))  # YCbCr 4:2:0
    pays, words = False, []
    for kind, (size, free) in room.items():
        if size > free:
            images = f"{records:,} images take {size / 1e9:,.1f} GB"
            words.append(f"cache {kind}: {images}, and {free / 1e9:,.1f} GB may be taken")
            continue
        ratio = cached_ratio(bench, chosen, kind, FILL_SHARE * seconds / batch_size)
        fast = f"all {records:,} images fit ({size / 1e9:,.1f} GB); epochs after the first {ratio:.1f} times as fast"
        if kind == "host":
            pays = ratio >= PAYS
            words.append(f"cache host: {fast}" + ("" if pays else ", so it is not worth its memory"))
        else:
            words.append(f"cache device: {fast}; it makes colors a little coarser, so it is left to you")
    return pays, words


def cached_ratio(bench: Bench, chosen: Setting, kind: str, fill: float) -> float:
    """How many times as fast images come from a cache. A few steps stand for all: it costs the same whichever they are; `fill`
    times the rate are as many as there is time for."""
    steps = min(max(int(fill * bench.rate(chosen)), FILL_STEPS), bench.stretch)
    bench.fill(chosen, steps, kind)
    ratios = []
    for _ in range(TURNS):
        plain = bench.rate(chosen)
        ratios.append(bench.rate(chosen, steps, cache=kind) / plain)
    return statistics.median(ratios)


def decoded_bytes(manifest: Manifest, split: str) -> int | None:
    """What the decoded images of a split take in memory; None where they are of different sizes (build --fit short)."""
    if manifest.options["fit"] != "crop":
        return None
    return manifest.split(split).records * manifest.options["size"] ** 2 * RGB
