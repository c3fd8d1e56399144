"""Short runs of loader and training together: as they are, and with one option of the loader changed."""

import contextlib
import inspect
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account, synchronize
from imagefeed.pipeline.profiler.causes import IN_MEMORY, Remedy
from imagefeed.pipeline.profiler.findings import Step
from imagefeed.pipeline.profiler.windows import Bench, read_stretch, room_of
from imagefeed.pipeline.tuner.search import Setting

ROUNDS = 3
MIN_STEPS = 3
PUT_OUT_STEPS = 4  # at once
FILL_TIMES = 2  # windows' time of decoding, for a cache to be tried
SWITCH_S = 1e-4  # of sys.setswitchinterval: the interpreter's own is 5e-3


def phased(step: Callable) -> Callable:
    """`step(batch, on_phase)` of a step that may or may not take `on_phase`."""
    if "on_phase" in inspect.signature(step).parameters:
        return lambda batch, on_phase: step(batch, on_phase=on_phase)
    return lambda batch, on_phase: step(batch)


def repeat(loader: Iterable) -> Iterator:
    while True:
        yield from loader


def run(
    batches: Iterator,
    step: Callable,
    account: Account,
    warm_up: int,
    seconds: float,
    min_steps: int = MIN_STEPS,
    max_steps: float = float("inf"),
) -> tuple[Step, ...]:
    """Steps for about `seconds`, but `min_steps` at least, after `warm_up` others, which are left out."""
    for number in itertools.count():
        if number == warm_up:
            synchronize(account.device)
            begin_s = time.perf_counter()
        enough = number >= warm_up + min_steps and time.perf_counter() - begin_s >= seconds
        if enough or number >= warm_up + max_steps:
            break
        step(account.fetch(batches), account.phase)
    account.stop()
    return account.steps()[warm_up:]


def rate(steps: tuple[Step, ...], images: int) -> float:
    return images * len(steps) / sum(step.seconds for step in steps)


def gains(
    loader: ImageLoader, step: Callable, remedies: list[Remedy], position: int, steps: int, seconds: float
) -> dict[str, tuple[float, ...]]:
    """Of each remedy, by its option: the gain in each round, 0.3 for 30 % more images a second.

    Runs of about `seconds` without and with it follow each other in every round. Bytes come from memory, unless the remedy is
    about reading: then from the disk, at most `steps` steps of them.
    """
    found: dict[str, list[float]] = {remedy.option: [] for remedy in remedies}
    reading = [remedy for remedy in remedies if remedy.part == "read"]
    others = [remedy for remedy in remedies if remedy.part != "read"]
    if others:
        from_memory(loader, step, others, position, seconds, found)
    for _ in range(ROUNDS if reading else 0):
        before, taken = from_disk(loader, step, position, steps, seconds, {})
        for remedy in reading:
            if remedy.changes == IN_MEMORY:  # what the run has just read
                changed, _ = from_disk(loader, step, position, taken, seconds, {}, put_out_first=False)
            else:
                changed, _ = from_disk(loader, step, position, steps, seconds, remedy.changes)
            found[remedy.option].append(changed / before - 1)
    return {option: tuple(values) for option, values in found.items()}


def from_memory(
    loader: ImageLoader, step: Callable, remedies: list[Remedy], position: int, seconds: float, found: dict[str, list[float]]
) -> None:
    """Appends each round's gains to `found`; loaders stay open from round to round, so that none is measured as it starts."""
    options = loader.options
    usual = Setting(options.num_threads, options.prefetch, loader.read_ahead, options.hw_decoder_load)
    ways: dict[str, tuple[Setting, int | None, dict[str, object]]] = {}
    with loader.reopened(position=position) as other:
        stretch = read_stretch(other, time.perf_counter() + seconds)

    def train(batch: object) -> None:
        step(batch, lambda phase: None)

    def open_loader(**changes) -> ImageLoader:
        return loader.reopened(**changes)

    with Bench(open_loader, seconds, stretch, False, room_of(loader.device), train, position) as bench:
        rate = bench.rate(usual)
        for remedy in remedies:
            tuned = {name: value for name, value in remedy.changes.items() if name in Setting._fields}
            rest = {name: value for name, value in remedy.changes.items() if name not in Setting._fields}
            kept = None
            if rest.get("cache", "none") != "none":
                kept = min(stretch, int(FILL_TIMES * seconds * rate / loader.plan.batch_size) + MIN_STEPS)
                bench.fill(usual, kept, rest["cache"])
            ways[remedy.option] = way = usual._replace(**tuned), kept, rest
            bench.rate(way[0], kept, **rest)  # the first window of a loader is slower: memory is new
        for number in range(ROUNDS):
            before = bench.rate(usual)
            for option, (setting, kept, rest) in list(ways.items())[:: 1 if number % 2 else -1]:
                found[option].append(bench.rate(setting, kept, **rest) / before - 1)


def from_disk(
    loader: ImageLoader,
    step: Callable,
    position: int,
    steps: int,
    seconds: float,
    changes: dict[str, object],
    put_out_first: bool = True,
) -> tuple[float, int]:
    """Images a second with `changes`, over at most `steps` steps from `position` on, each taken once, and how many there were;
    their bytes are put out of memory first."""
    if put_out_first:
        evict(loader, position, steps)
    with loader.reopened(position=position, **changes) as other:
        warm_up = min(other.options.prefetch + 1, steps // 2)
        account = Account(other.device, other)
        taken = run(repeat(other), step, account, warm_up, seconds, max_steps=max(steps - warm_up, MIN_STEPS))
        return rate(taken, other.plan.batch_size), len(taken) + warm_up


def evict(loader: ImageLoader, position: int, steps: int, seconds: float = math.inf) -> int:
    """Puts the records of these steps out of memory, as many as there is time for, and returns how many. No loader may hold them.

    A record takes 5 us, but 5 ms where another thread holds the interpreter's lock.
    """
    begin_s, done = time.perf_counter(), 0
    while done < steps and (done == 0 or time.perf_counter() - begin_s < seconds):
        part = range(position + done, position + min(done + PUT_OUT_STEPS, steps))
        ids = np.concatenate([loader.plan.ids(n)[0] for n in part])
        machine.evict(loader.manifest, loader.dataset.split, ids)
        done += len(part)
    return done


def lock_gains(loader: Iterable, step: Callable, device: torch.device, images: int, seconds: float) -> tuple[float, ...]:
    """The gain from asking for the interpreter's lock SWITCH_S after another thread took it, not 5 ms, in each round."""
    found = []
    usual_s = sys.getswitchinterval()
    batches = repeat(loader)
    for _ in range(ROUNDS):
        rates = []
        for interval_s in (usual_s, SWITCH_S):
            with switching(interval_s):
                rates.append(rate(run(batches, step, Account(device, loader), 2, seconds), images))
        found.append(rates[1] / rates[0] - 1)
    return tuple(found)


@contextlib.contextmanager
def switching(interval_s: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
