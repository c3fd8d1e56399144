"""Short runs of loader and training together: as they are, and with one option of the loader changed."""

import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from pipeline import machine
from pipeline.accounting import Account, synchronize
from pipeline.diagnosis import IN_MEMORY, Remedy
from pipeline.findings import Step
from pipeline.loader import ImageLoader

ROUNDS = 3
MIN_STEPS = 3
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
    """Steps for about `seconds` after `warm_up` others, which are left out."""
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


def short_run(
    loader: ImageLoader,
    step: Callable,
    position: int,
    steps: int,
    seconds: float,
    changes: dict[str, object],
    cold: bool = False,
) -> tuple[float, int]:
    """Images a second with `changes`, over at most `steps` steps from `position` on, and how many were taken; `cold` puts their
    bytes out of memory first. With a cache it is the second time that they are taken."""
    if cold:
        put_out(loader, position, steps)
    with loader.reopened(position=position, **changes) as other:
        warm_up = min(other.options.prefetch + 1, steps // 2)
        if changes.get("cache", "none") != "none":
            fill(other, steps)
        account = Account(other.device, other)
        taken = run(repeat(other), step, account, warm_up, seconds, max_steps=max(steps - warm_up, MIN_STEPS))
        return rate(taken, other.plan.batch_size), len(taken) + warm_up


def fill(loader: ImageLoader, steps: int) -> None:
    """Takes some steps so that the cache holds their images, and goes back to where it was."""
    position = loader.position
    for _ in zip(range(steps), repeat(loader), strict=False):
        pass
    loader.load_state_dict(loader.state_dict() | {"position": position})


def put_out(loader: ImageLoader, position: int, steps: int) -> None:
    """Puts the records of these steps out of memory. No loader may hold them."""
    ids = np.concatenate([loader.plan.ids(n)[0] for n in range(position, position + steps)])
    machine.put_out(loader.manifest, loader.dataset.split, ids)


def gains(
    loader: ImageLoader,
    step: Callable,
    remedies: list[Remedy],
    position: int,
    steps: int,
    seconds: float,
) -> dict[str, tuple[float, ...]]:
    """Of each remedy, by its option: the gain in each round, 0.3 for 30 % more images a second. Runs without and with it follow
    each other in every round; bytes come from memory unless the remedy is about reading."""
    found: dict[str, list[float]] = {remedy.option: [] for remedy in remedies}
    for _ in range(ROUNDS):
        base: dict[bool, float] = {}
        for remedy in remedies:
            cold = remedy.part == "read"
            if cold not in base:
                base[cold], taken = short_run(loader, step, position, steps, seconds, {}, cold)
            if remedy.changes == IN_MEMORY:  # of what the cold run has just read
                changed, _ = short_run(loader, step, position, taken, seconds, {})
            else:
                changed, _ = short_run(loader, step, position, steps, seconds, remedy.changes, cold)
            found[remedy.option].append(changed / base[cold] - 1)
    return {option: tuple(values) for option, values in found.items()}


def lock_gains(
    loader: Iterable, step: Callable, device: torch.device, images: int, seconds: float
) -> tuple[float, ...]:
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
