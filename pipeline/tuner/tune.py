"""Finds the loader settings that are fastest on this machine, in about a minute.

Compares the rate of the loader alone. Loader and training together would be the right measure, but cannot tell settings apart on
a CPU: a step takes seconds, and 1 to 6 % of it waits for data, less than two measurements differ (docs/log.md). Decoding costs as
much processor time with any number of threads; so of equally fast settings the one with the fewest leaves most to training.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from imagefeed.codec.cores import usable_cores
from imagefeed.dataset.console import plural
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.arguments import choose_decoder, choose_device
from imagefeed.pipeline.cache import RGB, available_bytes
from imagefeed.pipeline.graph import PREFETCH
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.windows import Bench, free_bytes, read_stretch, room_of
from imagefeed.pipeline.tuner.search import Round, Setting, choose, score, search

OF_DECODERS = ("decoder", "native_share", "hw_decoder_load")
DEFAULTS = Setting(*(OPTIONS[name].default for name in Setting._fields))
AXES = {
    "hw_decoder_load": (0.0, 0.25, 0.5, 0.65, 0.8, 1.0),
    "native_share": (0.25, 0.5, 0.75),
    "prefetch": (1, 2, 3, 4, 6, 8),
    "read_ahead": (0, 8, 32),
}
DECODERS = ("dali", "native", "both")  # for a GPU
# Fractions of the time:
ENDING = 0.1  # to load the libraries and to close everything
RESERVED = 0.12  # at most, for windows after the search
READ_SHARE = 0.05  # at most, to bring records into memory before they are measured
FILL_SHARE = 0.06  # to fill a cache
WINDOWS = 120  # in the time; half of it goes into the batches that each loader prepares before its window begins
FILL_STEPS = 8  # at least
TURNS = 3
ENOUGH = 3  # windows of each setting, on average
MEMORY_STEPS = 20  # that are read again and again
PAYS = 1.1  # times as fast that a cache must be
SLOW_STORAGE = 0.8  # of the rate from memory
DISTURBED = 0.1  # of the processors taken by other programs


@dataclass(frozen=True)
class Tuned:
    """`settings` are arguments of ImageLoader; `rounds` are all measurements (search.py) from `start`, the loader's defaults;
    `notes` are sentences on the cache, storage and other programs."""

    settings: dict[str, object]
    chosen: Setting
    start: Setting
    axes: tuple[str, ...]
    rounds: list[Round]
    notes: tuple[str, ...]
    seconds: float
    cache_bytes: int  # of the cache in `settings`, 0 without one
    others: float  # the fraction of the processors that other programs took

    @property
    def gain(self) -> float:
        """How many times as fast as the defaults, without the cache."""
        known = score(self.rounds)
        return math.exp(known[self.chosen] - known[self.start])


def tune(
    manifest: Manifest,
    split: str | None,
    batch_size: int,
    *,
    device: torch.device | str = "auto",
    seconds: float = 60,
    cold: bool | None = None,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
    **images,
) -> Tuned:
    """Measures loaders of a split, by default the training split, for at most `seconds`; `images` are arguments of ImageLoader.

    With `cold`, each record is read from storage, as if the dataset were larger than memory; None finds out. Raises UserError as
    ImageLoader does.
    """
    begin_s, before = time.perf_counter(), machine.counters()
    device = choose_device(device)
    split = split or manifest.train_split
    if cold is None:
        cold = manifest.split(split).bytes > machine.memory_bytes()[0]
    prefetch = PREFETCH[choose_decoder("auto", device, "none")]
    decoder = "dali" if device.type == "cuda" else "auto"
    start = DEFAULTS._replace(num_threads=usable_cores(), prefetch=prefetch, decoder=decoder)
    axes = axes_of(start.num_threads, device, cold)
    tried: list[Setting] = []

    def spent() -> float:
        return (time.perf_counter() - begin_s) / seconds

    def reserved() -> float:
        """The fraction of the time to keep for what follows the search."""
        windows = (2 * TURNS + 2) * (1 + cold)
        each_s = (time.perf_counter() - first_s) / max(len(tried), 1)
        return min(windows * each_s / seconds, RESERVED) + FILL_SHARE + ENDING

    def open_loader(**options) -> ImageLoader:
        return ImageLoader(manifest, split, batch_size, device=device, **options, **images)

    on_progress(0.0, "reading")
    with open_loader() as loader:
        stretch = len(loader) if cold else read_stretch(loader, begin_s + seconds * READ_SHARE)
    first_s = time.perf_counter()
    with Bench(open_loader, seconds / WINDOWS / 2, stretch, cold, room_of(device)) as bench:

        def measure(setting: Setting) -> float:
            tried.append(setting)
            on_progress(min(spent(), 1), f"{plural(len(tried), 'window')} of {plural(len(set(tried)), 'setting')}")
            return bench.rate(setting)

        rounds = search(axes, start, measure, lambda: spent() / (1 - reserved()))
        chosen = choose(rounds, start)
        settings: dict[str, object] = {name: getattr(chosen, name) for name in axes}
        notes = [] if len(tried) >= ENOUGH * len(set(tried)) else ["there were few windows; give more --seconds"]
        on_progress(min(spent(), 1), "storage and caches")
        if cold:
            notes.append(judge_storage(bench, chosen, images.get("shuffle", "global")))
        needed, remarks = try_caches(bench, chosen, FILL_SHARE * seconds, loader)
        if needed:  # and what the cores decode for it
            settings = {name: value for name, value in settings.items() if name not in OF_DECODERS} | {"cache": "host"}
        notes += remarks
    others = machine.others_share(before, machine.counters())
    if others > DISTURBED:
        notes.append(f"other programs took {others:.0%} of the processors; tune again when they are quiet")
    on_progress(1.0, "done")
    return Tuned(settings, chosen, start, tuple(axes), rounds, tuple(notes), time.perf_counter() - begin_s, needed, others)


def axes_of(cores: int, device: torch.device, cold: bool) -> dict[str, tuple]:
    """The values to try for each option. Read-ahead matters only if records come from storage."""
    threads = {2**n for n in range(cores.bit_length()) if cores / 16 <= 2**n} | {-(-cores * 3 // 4), cores, -(-cores * 3 // 2)}
    cuda = device.type == "cuda"
    left_out = {"hw_decoder_load": not cuda, "native_share": not cuda, "read_ahead": not cold}
    axes = {"decoder": DECODERS} if cuda else {}
    return axes | {"num_threads": tuple(sorted(threads))} | {name: axis for name, axis in AXES.items() if not left_out.get(name)}


def judge_storage(bench: Bench, chosen: Setting, shuffle: str) -> str:
    """What reading from storage costs. The shuffle decides in which order a net learns, so it is only recommended."""
    bench.rate(chosen, MEMORY_STEPS)  # brings them into memory
    rates = [(bench.rate(chosen), bench.rate(chosen, MEMORY_STEPS)) for _ in range(TURNS)]
    share = statistics.median(storage / memory for storage, memory in rates)
    found = f"storage: records that are not in memory come at {min(share, 1):.0%} of the rate of those that are"
    if share >= SLOW_STORAGE or shuffle != "global":
        return found
    return f"{found}; --shuffle blocks reads them in stored order, but changes the order of training, so it is left to you"


def try_caches(bench: Bench, chosen: Setting, fill_s: float, loader: ImageLoader) -> tuple[int, list[str]]:
    """The bytes of the cache in host memory if it pays, else 0, and sentences on both caches. The one on the device is only
    recommended: its chroma is coarser, so it changes what a net learns."""
    if loader.decoder == "dali" and (loader.options.boxes or loader.options.jitter):
        return 0, ["cache none: it does not go with --random-resized-crop and --color-jitter"]
    if loader.manifest.options["fit"] != "crop":
        return 0, ["cache none: image sizes vary, so the memory needed is unknown; try --cache host"]
    records = loader.plan.records
    needed = records * loader.manifest.options["size"] ** 2 * RGB
    kinds = [("host", needed, free_bytes())]
    if loader.device.type == "cuda":
        kinds.append(("device", needed // 2, available_bytes(loader.device)))  # YCbCr 4:2:0
    pays, notes = False, []
    for kind, size, free in kinds:
        if size > free:
            notes.append(f"cache {kind}: {records:,} images take {size / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB may be used")
            continue
        ratio = cached_ratio(bench, chosen, kind, fill_s / loader.plan.batch_size)
        remark = "; it makes colors a little coarser, so it is left to you"
        if kind == "host":
            pays = ratio >= PAYS
            remark = "" if pays else ", not worth its memory"
        fit = f"all {records:,} images fit ({size / 1e9:,.1f} GB)"
        notes.append(f"cache {kind}: {fit}; epochs after the first {ratio:.1f} times as fast{remark}")
    return needed if pays else 0, notes


def cached_ratio(bench: Bench, chosen: Setting, kind: str, fill: float) -> float:
    """How many times as fast images come from a cache. A few steps represent all, as any costs the same: `fill` times the rate,
    which is as many as there is time for."""
    steps = min(max(int(fill * bench.rate(chosen)), FILL_STEPS), bench.stretch)
    cached = chosen._replace(decoder="auto")
    bench.fill(cached, steps, kind)
    ratios = []
    for _ in range(TURNS):
        uncached = bench.rate(chosen)
        ratios.append(bench.rate(cached, steps, cache=kind) / uncached)
    return statistics.median(ratios)
