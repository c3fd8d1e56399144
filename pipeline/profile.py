"""Measures what limits a run: each part alone, then the input pipeline and training together."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model import AlexNet
from model.step import choose_precision, keep_memory, train_step
from pipeline.graph import PREFETCH, decode_pipeline
from pipeline.loader import Batch, ImageLoader, choose_device
from pipeline.source import Source
from preprocess.manifest import Manifest

# A stage's rate is the median of its windows; one more before them is left out. Fewer where a step takes seconds.
WINDOWS, MIN_WINDOWS = 5, 3
BATCH_SIZE = 128
# How the time is shared out. A step of training takes seconds on a CPU, one of the others a tenth.
SHARES = {"reading": 0.1, "decoding": 0.15, "pipeline": 0.15, "training": 0.3, "both": 0.3}
# Shares of a step spent waiting for data, where xprof draws the lines.
SOME_WAIT, MUCH_WAIT = 0.05, 0.20
# Together slower than this share of training alone: loading takes something from training. Rates move by 10 %.
COMPETING = 0.9
# A pipeline this many times as fast as training is not the cause of a wait.
AMPLE = 1.25
# A stage no more than this many times as fast as the whole pipeline is what slows it.
CAUSE = 1.5


@dataclass(frozen=True)
class Profile:
    """What was measured. `rates[stage]` holds the images per second of each window, `data_wait` a share of time.

    Stages: reading (with checksums, one thread), decoding (from memory), pipeline (all of the loader), training
    (AlexNet on one batch over and over), both (training on what the loader gives).
    """

    device: str
    precision: str
    cores: int
    num_threads: int
    batch_size: int
    size: int
    split: str
    records: int
    rates: dict[str, tuple[float, ...]]
    data_wait: float

    def rate(self, stage: str) -> float:
        return statistics.median(self.rates[stage])

    @property
    def limit(self) -> str:
        """What holds the run back: training, reading, decoding, cropping, or competition for the machine."""
        if self.data_wait < SOME_WAIT:
            return "training" if self.rate("both") >= COMPETING * self.rate("training") else "competition"
        if self.rate("pipeline") > AMPLE * self.rate("training"):
            return "competition"
        stage = min(("reading", "decoding"), key=self.rate)
        return stage if self.rate(stage) < CAUSE * self.rate("pipeline") else "cropping"


def profile_input(
    manifest: Manifest,
    split: str | None = None,
    batch_size: int | None = None,
    num_threads: int | None = None,
    device: torch.device | str = "auto",
    seconds: float = 30,
    on_stage: Callable[[str], None] = lambda stage: None,
    size: int = 224,
) -> Profile:
    """Measures for about `seconds`, longer where a step takes long: every window is at least one step.

    `batch_size` is 128 where none is given, or all of the split where it has fewer records; `size` is a crop's side in
    pixels, 64 or more. `on_stage` is called with the name of each stage as it begins. Files are read as they are found, in
    the page cache or not. Raises UserError where the split has no labels, or its images do not fill a crop or a batch.
    """
    device = choose_device(device)
    split = split or manifest.train_split
    batch_size = batch_size or min(BATCH_SIZE, manifest.split(split).records)
    rates: dict[str, tuple[float, ...]] = {}

    def measure(stage: str, step: Callable[[], object]) -> None:
        on_stage(stage)
        rates[stage] = rates_of(step, batch_size, seconds * SHARES[stage], device)

    with open_loader(manifest, split, batch_size, size, device, num_threads) as loader:
        source = Source(loader.plan, loader.dataset, np.zeros(3), np.zeros((3, 3)))
        positions = itertools.count()
        measure("reading", lambda: source.read(loader.plan.ids(next(positions))[0]))
        # Some batches over and over: their bytes come from memory, whatever the storage.
        kept = [source.read(loader.plan.ids(n)[0])[0] for n in range(min(len(loader), 8))]
        decoder = decode_pipeline(lambda i: [kept[i % len(kept)]], batch_size, loader.options)
        measure("decoding", decoder.run)
        del decoder
        endless = repeat(loader)
        for _ in range(PREFETCH):  # these were made while nobody took them
            next(endless)
        measure("pipeline", lambda: next(endless))
        fixed = Batch(*(part.clone() for part in next(endless)))
    precision = choose_precision(device)
    train = training_step(len(manifest.classes), loader.options.size, device, precision)
    measure("training", lambda: train(fixed))
    with open_loader(manifest, split, batch_size, size, device, num_threads) as loader:
        wait = DataWait(repeat(loader), device)
        measure("both", lambda: train(next(wait)))
    return Profile(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        precision,
        len(os.sched_getaffinity(0)),
        loader.options.num_threads,
        batch_size,
        size,
        split,
        len(loader.dataset),
        rates,
        wait.share(),
    )


def open_loader(manifest, split, batch_size, size, device, num_threads) -> ImageLoader:
    return ImageLoader(
        manifest, split, batch_size, size=size, device=device, num_threads=num_threads, prefetch=PREFETCH
    )


def repeat(loader: ImageLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def rates_of(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> tuple[float, ...]:
    """Images per second in each window. The host's clock is right for a GPU too: it waits for it at both ends."""
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
    return tuple(rates[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(num_classes: int, size: int, device: torch.device, precision: str) -> Callable[[Batch], None]:
    """A step of AlexNet as train.py takes it. The learning rate is 0: only time counts."""
    if device.type == "cpu":
        keep_memory()
    net = AlexNet(num_classes, size=size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    return lambda batch: train_step(net, batch.images, batch.labels, optimizer, precision)


class DataWait:
    """Hands batches on, and measures the share of each step that was spent waiting for one.

    On a GPU it is the time its stream stood still: from the end of the last step's work to the moment the batch is
    there, by events in the stream. The host asks ahead of time, so its clock says nothing.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches = batches
        self.device = device
        self._marks: list[tuple] = []

    def __next__(self) -> Batch:
        before = mark(self.device)
        batch = next(self.batches)
        self._marks.append((before, mark(self.device)))
        return batch

    def share(self) -> float:
        """Of all steps but the first, which waits for the pipeline to start, and the last, which is still running."""
        synchronize(self.device)
        marks = self._marks[1:]
        return sum(seconds_between(*pair) for pair in marks[:-1]) / seconds_between(marks[0][0], marks[-1][0])


def mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment: of the host's clock on a CPU, on a GPU of what has been put on its stream so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Between two marks; on a GPU the caller has waited for the second."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
