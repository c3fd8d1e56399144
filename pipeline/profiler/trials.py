"""Short runs of loader and training together: as they are, and with one option of the loader changed."""

import functools
import inspect
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account, synchronize
from imagefeed.pipeline.profiler.causes import stalled
from imagefeed.pipeline.profiler.findings import Step
from imagefeed.pipeline.profiler.fixes import IN_MEMORY, Remedy
from imagefeed.pipeline.profiler.windows import Bench, read_stretch, room_of
from imagefeed.pipeline.tuner.search import Setting

ROUNDS = 3
MIN_STEPS = 3
STEADY = 0.05  # the two halves of a measurement differ by less
FEW_STALLS = 4  # fewer stalled steps do not show whether they come regularly
EVICTED_STEPS = 4  # at once
FILL_TIMES = 2  # windows' time of decoding to fill a cache that is tried
SWITCH_S = 1e-4  # of sys.setswitchinterval; the interpreter's own is 5e-3


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
    max_steps: float = math.inf,
) -> tuple[Step, ...]:
    """Steps for about `seconds`, but at least `min_steps`, after `warm_up` others, which are left out."""
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


def gain(before: tuple[Step, ...], after: tuple[Step, ...]) -> float:
    """0.3 for 30 % more images/s."""
    return statistics.fmean(step.seconds for step in before) / statistics.fmean(step.seconds for step in after) - 1


def median_s(steps: tuple[Step, ...]) -> float:
    return statistics.median(step.seconds for step in steps)


def affordable(most: int, least: int, seconds: float, step_s: float) -> int:
    """The number of steps that fit into `seconds`, within bounds."""
    return max(least, min(most, int(seconds / step_s)))


def steady(steps: tuple[Step, ...]) -> bool:
    """Whether both halves take as long, and stalled steps are none or enough to see whether they come regularly."""
    seconds = np.array([step.seconds for step in steps])
    halves = [np.median(half) for half in np.array_split(seconds, 2)]
    return abs(halves[0] - halves[1]) < STEADY * max(halves) and not 0 < np.count_nonzero(stalled(seconds)) < FEW_STALLS


def run_from(
    loader: ImageLoader, step: Callable, position: int, steps: int, seconds: float, changes: dict[str, object] | None = None
) -> tuple[tuple[Step, ...], int]:
    """At most `steps` steps from `position` on, each taken once: those after the warm-up, and the number of all."""
    with loader.reopened(position=position, **(changes or {})) as other:
        warm_up = min(other.options.prefetch + 1, steps // 2)  # batches made before anybody took them
        account = Account(other.device, other)
        taken = run(repeat(other), step, account, warm_up, seconds, max_steps=max(steps - warm_up, MIN_STEPS))
        return taken, len(taken) + warm_up


def gains(
    loader: ImageLoader, step: Callable, remedies: list[Remedy], position: int, steps: int, seconds: float
) -> dict[str, tuple[float, ...]]:
    """The gain of each option in each round, which has runs of about `seconds` without and with the option. Bytes come from
    memory, or for options about reading from the disk: then at most `steps` steps."""
    found: dict[str, list[float]] = {remedy.option: [] for remedy in remedies}
    others = [remedy for remedy in remedies if remedy.part != "read"]
    if others:
        from_memory(loader, step, others, position, seconds, found)

    reading = [remedy for remedy in remedies if remedy.part == "read"]
    for _ in range(ROUNDS if reading else 0):
        evict(loader, position, steps)
        before, count = run_from(loader, step, position, steps, seconds)
        for remedy in reading:
            if remedy is IN_MEMORY:  # where the run has just read them
                changed, _ = run_from(loader, step, position, count, seconds)
            else:
                evict(loader, position, steps)
                changed, _ = run_from(loader, step, position, steps, seconds, remedy.changes)
            found[remedy.option].append(gain(before, changed))
    return {option: tuple(values) for option, values in found.items()}


def from_memory(
    loader: ImageLoader, step: Callable, remedies: list[Remedy], position: int, seconds: float, found: dict[str, list[float]]
) -> None:
    """Appends each round's gains to `found`; loaders stay open from round to round, so that none is measured as it starts."""
    options = loader.options
    chosen = loader.arguments["decoder"], loader.arguments["native_share"]
    usual = Setting(options.num_threads, options.prefetch, loader.read_ahead, options.hw_decoder_load, *chosen)
    ways: list[tuple[str, Callable[[], float]]] = []
    with loader.reopened(position=position) as other:
        stretch = read_stretch(other, time.perf_counter() + seconds)

    train = functools.partial(step, on_phase=lambda phase: None)
    with Bench(loader.reopened, seconds, stretch, False, room_of(loader.device), train, position) as bench:
        rate = bench.rate(usual)
        for remedy in remedies:
            tuned = {name: value for name, value in remedy.changes.items() if name in Setting._fields}
            rest = {name: value for name, value in remedy.changes.items() if name not in tuned}
            kept = None
            if "cache" in rest:
                kept = min(stretch, int(FILL_TIMES * seconds * rate / loader.plan.batch_size) + MIN_STEPS)
                bench.fill(usual, kept, rest["cache"])
            measure = functools.partial(bench.rate, usual._replace(**tuned), kept, **rest)
            measure()  # a loader's first window is slower: its memory is new
            ways.append((remedy.option, measure))
        for number in range(ROUNDS):
            before = bench.rate(usual)
            for option, measure in ways[:: 1 if number % 2 else -1]:
                found[option].append(measure() / before - 1)


def evict(loader: ImageLoader, position: int, steps: int, seconds: float = math.inf) -> int:
    """Removes the records of these steps from the page cache, as many as there is time for, and returns the number of steps. No
    loader may have them open. A record takes 5 us, but 5 ms if another thread holds the interpreter's lock."""
    begin_s, done = time.perf_counter(), 0
    while done < steps and (done == 0 or time.perf_counter() - begin_s < seconds):
        count = min(EVICTED_STEPS, steps - done)
        machine.evict(loader.manifest, loader.reader.split, ids_of(loader, position + done, count))
        done += count
    return done


def ids_of(loader: ImageLoader, position: int, steps: int) -> np.ndarray:
    return np.concatenate([loader.plan.ids(position + n)[0] for n in range(steps)])


def lock_gains(loader: Iterable, step: Callable, device: torch.device, seconds: float) -> tuple[float, ...]:
    """The gain in each round if threads ask for the interpreter's lock SWITCH_S after another has taken it, not after 5 ms."""
    usual_s, batches, found = sys.getswitchinterval(), repeat(loader), []
    try:
        for _ in range(ROUNDS):
            runs = []
            for interval_s in (usual_s, SWITCH_S):
                sys.setswitchinterval(interval_s)
                runs.append(run(batches, step, Account(device, loader), 2, seconds))
            found.append(gain(*runs))
    finally:
        sys.setswitchinterval(usual_s)
    return tuple(found)
