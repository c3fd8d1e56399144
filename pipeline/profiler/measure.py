"""Measures what limits a run: loader and training together, each alone, and short trials of what might help."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from imagefeed.dataset.manifest import Manifest
from imagefeed.model.flops import Flops, count_flops
from imagefeed.model.nets import build_net
from imagefeed.model.step import choose_precision, keep_memory, train_step
from imagefeed.pipeline.loader import Batch, ImageLoader, choose_device
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account, Sampler, mark, seconds_between, synchronize
from imagefeed.pipeline.profiler.batches import bytes_of, enlarged, images_in
from imagefeed.pipeline.profiler.causes import (
    FIXED,
    IN_MEMORY,
    LARGER_BATCH,
    PARTS,
    diagnose,
    find_stalls,
    lock_held,
    remedies,
    table,
)
from imagefeed.pipeline.profiler.findings import Profile, Samples, Step, Tried
from imagefeed.pipeline.profiler.fixes import explain, find_fixes
from imagefeed.pipeline.profiler.isolation import facts_before, limits_of, loader_alone, stages_alone
from imagefeed.pipeline.profiler.limits import copy_rate, matrix_rate, memory_rate
from imagefeed.pipeline.profiler.machine import resident_share
from imagefeed.pipeline.profiler.stages import cut, settings_of, settings_of_any, stages_of, steady, waiting, windows
from imagefeed.pipeline.profiler.trials import ROUNDS, evict, gains, lock_gains, phased, repeat, run
from imagefeed.pipeline.profiler.windows import endless

__all__ = ["Profile", "mark", "profile", "profile_input", "seconds_between", "synchronize"]

BATCH_SIZE = 128
# How the time is shared out.
WARM_UP, TOGETHER, CEILING, LARGER, LOADER = 0.1, 0.3, 0.12, 0.06, 0.07
ALONE, LIMITS, TRIALS, TRYING = 0.1, 0.08, 0.25, 0.3
MIN_STEPS, CEILING_ROUNDS = 10, 3
FEW_STEPS = 3  # where a step takes so long that MIN_STEPS would take more than their share of the time
LONGER = 2  # times at most a measurement goes on that is not steady yet
LARGER_AT_MOST = 0.25  # of the time, for a batch of LARGER_BATCH times the size
# Trials are made of what could concern a part of this share of a step.
SUSPICIOUS = 0.03
WARM_UP_STEPS = 3  # beyond the batches that were made while nobody took them
# A parameter, of SGD with momentum in one pass: weight, gradient and momentum read, two of them written.
UPDATE_BYTES = 20


def profile(
    loader: Iterable,
    step: Callable,
    *,
    seconds: float = 30,
    device: torch.device | str | None = None,
    model: torch.nn.Module | None = None,
    precision: str = "float32",
    flops: Flops | None = None,
    attempt: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Profile:
    """What limits `for batch in loader: step(batch)`, of any loader that can be iterated again and again.

    `step` trains on a batch, for real: it is called a few hundred times or for about `seconds`. One that takes a keyword
    `on_phase` and hands it to model.step.train_step, or calls it as that does, has its phases told apart. Of an ImageLoader the
    stages are told apart, and other options tried. `model` is asked only for its parameters; by the `flops` of an image
    (model/flops.py) forward and backward are put beside matrix products in `precision`. `device` is where training happens: by
    default the ImageLoader's, else CUDA where there is one. With `attempt` the first fix that the profiler can apply is applied,
    and what it achieves measured.
    """
    begin_s = time.perf_counter()
    ours = isinstance(loader, ImageLoader)
    device = choose_device(device or (loader.device if ours else "auto"))
    call = phased(step)
    evidence = facts_before(loader) if ours else {}
    first = loader.position if ours else 0

    on_stage("loader and training together")
    opened = loader.reopened() if ours else loader
    sampler = Sampler()
    account = Account(device, opened, sampler)
    batches = repeat(opened)
    before = sampler.began
    run(batches, call, account, 0, 0, WARM_UP_STEPS)
    step_s = account.steps()[-1].seconds
    warm_up = affordable(opened.options.prefetch if ours else 2, 0, seconds * WARM_UP, step_s)
    least = affordable(MIN_STEPS, FEW_STEPS, seconds * TOGETHER, step_s)
    run(batches, call, account, warm_up, seconds * TOGETHER, least)
    warm_up += WARM_UP_STEPS
    for _ in range(LONGER):
        if steady(account.steps()[warm_up:]) or step_s * least > seconds * TOGETHER:
            break
        run(batches, call, account, 0, seconds * TOGETHER, least)
    steps = account.steps()[warm_up:]
    taken = account.count
    spent = machine.counters()
    evidence["read bytes a step"] = (spent.read_bytes - before.read_bytes) / taken
    evidence["refaults a step"] = (spent.refaults - before.refaults) / taken
    evidence["throttled"] = (spent.throttled_s - before.throttled_s) / (spent.when_s - before.when_s)
    series = {name: tuple(values) for name, values in sampler.series.items()}
    fixed = next(batches)
    batch_size = images_in(fixed, loader)
    rates = {"together": windows(steps, batch_size)}

    on_stage("training on one batch")
    alone, larger, series[FIXED] = ceilings(fixed, call, device, seconds, step_s)
    rates["training"] = windows(alone, batch_size)
    if larger:
        rates[f"training, {LARGER_BATCH} times the batch"] = windows(larger, LARGER_BATCH * batch_size)
        evidence["fixed share of a step"] = statistics.median(series[FIXED]) * rates["together"].median / batch_size
    if model is not None:
        evidence["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
    if flops is not None:
        evidence |= {f"FLOP an image, {name}": float(count) for name, count in flops._asdict().items()}

    describe = settings_of if ours else functools.partial(settings_of_any, batch_size=batch_size)
    settings = describe(loader, device, precision)
    stages: dict[str, Samples] = {}
    if ours:
        ids = np.concatenate([loader.plan.ids(n)[0] for n in range(first, first + min(taken, len(loader)))])
        del batches
        opened.close()
        position = first + taken
        on_stage("the loader alone, cold and warm")
        count = min(len(loader), max(int(2 * seconds * LOADER * 5000 / batch_size), 12))
        count = evicted = evict(loader, position, count, seconds * LOADER / 2)
        for name in ("cold", "warm"):  # the same steps: from the disk, and then from memory
            measured, taken_alone = loader_alone(loader, position, count, seconds * LOADER, cold=name == "cold")
            count = min(count, taken_alone)
            if measured:
                rates[f"loader {name}"] = measured
        on_stage("each stage alone")
        stages, facts, jpegs = stages_alone(loader, position, count, seconds * ALONE)
        settings["pixels an image"] = facts.pop("pixels an image")
        settings["decoded bytes"] = 3 * settings["pixels an image"] * settings["records"]
        evidence |= facts
        on_stage("what this machine can do")
        evidence |= limits_of(loader, jpegs, ids, precision, seconds * LIMITS)
        # What was put out on purpose, for the loader alone, does not count.
        kept = np.setdiff1d(ids, np.concatenate([loader.plan.ids(position + n)[0] for n in range(evicted)]))
        evidence["gone pages"] = 1 - resident_share(loader.manifest, settings["split"], kept) if len(kept) else 0.0
    else:
        on_stage("the loader alone")
        measured = run(repeat(loader), phased(lambda batch: None), Account(device), 2, seconds * LOADER * 2)
        rates["loader warm"] = windows(measured, batch_size)
        evidence["memory bytes/s"] = memory_rate(seconds * LIMITS / 4, device)
        evidence["matrix FLOP/s"] = matrix_rate(precision, seconds * LIMITS / 4, device)
        if device.type == "cuda":
            evidence["copy bytes/s"] = copy_rate(seconds * LIMITS / 4, device)
    evidence["seconds to copy a batch"] = 2 * bytes_of(fixed) / evidence.get("copy bytes/s", evidence["memory bytes/s"])
    if "parameters" in evidence:
        evidence["seconds to update, at least"] = UPDATE_BYTES * evidence["parameters"] / evidence["memory bytes/s"]

    parts = table(steps, ours, device.type == "cuda")
    share = dict(zip(PARTS, parts.sum(0) / parts.sum(), strict=True))
    if lock_held(series):  # then nothing else is worth a trial: all parts wait for it
        on_stage("what the interpreter's lock costs")
        with loader.reopened() if ours else contextlib.nullcontext(loader) as again:
            lock_s = seconds * TRIALS / 6
            series["gain of sys.setswitchinterval(1e-4)"] = lock_gains(again, call, device, batch_size, lock_s)
    elif ours:
        promising = [r for r in remedies(settings, evidence) if share[r.part] > SUSPICIOUS]
        if promising:
            on_stage("what would help: " + ", ".join(r.option for r in promising))
            each_s = seconds * TRIALS / (ROUNDS + 1) / (1 + len(promising))
            found = gains(loader, call, promising, position, count, each_s)
            series |= {f"gain of {option}": values for option, values in found.items()}

    found = Profile(
        settings,
        time.perf_counter() - begin_s,
        rates,
        waiting(steps),
        tuple(waiting(part) for part in cut(steps)),
        *stalls_of_loader(rates, batch_size),
        stages_of(steps, alone, stages, settings, evidence, batch_size),
        find_stalls(parts),
        steps,
        evidence,
        series,
    )
    found = dataclasses.replace(found, causes=explain(found, diagnose(found)))
    found = dataclasses.replace(found, fixes=find_fixes(found))
    if attempt:
        found = dataclasses.replace(found, tried=apply_first(found, loader, call, seconds * TRYING, on_stage))
    return dataclasses.replace(found, seconds=time.perf_counter() - begin_s)


def profile_input(
    manifest: Manifest,
    split: str | None = None,
    batch_size: int | None = None,
    *,
    device: torch.device | str = "auto",
    model: str = "alexnet",
    precision: str = "auto",
    crop_size: int = 224,
    seconds: float = 30,
    attempt: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    **reading,
) -> Profile:
    """What limits training `model` (model/nets.py) on a split, by `profile`; `reading` are further arguments of ImageLoader.

    `batch_size` is 128 where none is given, or all of the split where it has fewer records; `crop_size` is a crop's side in
    pixels, 64 or more. Raises UserError where the split has no labels, or its images do not fill a crop or a batch.
    """
    device = choose_device(device)
    split = split or manifest.train_split
    batch_size = batch_size or min(BATCH_SIZE, manifest.split(split).records)
    with ImageLoader(manifest, split, batch_size, crop_size=crop_size, device=device, **reading) as loader:
        if device.type == "cpu":
            keep_memory()
        precision = choose_precision(device) if precision == "auto" else precision
        net = build_net(model, len(manifest.classes), crop_size=crop_size).to(device, memory_format=torch.channels_last)
        # The learning rate is 0: only time counts.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)

        def step(batch: Batch, on_phase: Callable[[str], None] = lambda phase: None) -> None:
            train_step(net, batch.images, batch.labels, optimizer, precision, on_phase)

        options = {"device": device, "model": net, "precision": precision, "flops": count_flops(net, crop_size)}
        found = profile(loader, step, seconds=seconds, attempt=attempt, on_stage=on_stage, **options)
    return dataclasses.replace(found, settings=found.settings | {"model": model})


def affordable(most: int, least: int, seconds: float, step_s: float) -> int:
    """How many steps fit into `seconds`, within bounds."""
    return max(least, min(most, int(seconds / step_s)))


def ceilings(
    batch: object, call: Callable, device: torch.device, seconds: float, step_s: float
) -> tuple[tuple[Step, ...], tuple[Step, ...], tuple[float, ...]]:
    """Steps on one batch over and over, and on it LARGER_BATCH times over, in turns; none of these where it cannot be enlarged
    or would take too long. And for each round the seconds of a step that do not grow with the batch, stalls left aside. `step_s`
    is what a step takes."""
    room = machine.memory_bytes()[0] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    takes_long = 2 * LARGER_BATCH * step_s > LARGER_AT_MOST * seconds
    too_large = 16 * LARGER_BATCH * bytes_of(batch) > room
    larger = None if takes_long or too_large else enlarged(batch, LARGER_BATCH)
    alone: tuple[Step, ...] = ()
    many: tuple[Step, ...] = ()
    fixed = []
    rounds = affordable(CEILING_ROUNDS, 1, seconds * CEILING, 3 * step_s)
    for _ in range(rounds):
        mine = run(repeat([batch]), call, Account(device), 1, seconds * CEILING / rounds, 2)
        alone += mine
        if larger is not None:
            theirs = run(repeat([larger]), call, Account(device), 1, seconds * LARGER / rounds, 1)
            many += theirs
            one_s, all_s = (statistics.median(step.seconds for step in steps) for steps in (mine, theirs))
            fixed.append(max(LARGER_BATCH * one_s - all_s, 0.0) / (LARGER_BATCH - 1))
    return alone, many, tuple(fixed)


def stalls_of_loader(rates: dict[str, Samples], images: int) -> tuple[float | None, float | None]:
    """(prep, fetch) seconds a step."""
    if "loader warm" not in rates:
        return None, None
    training_s, warm_s = images / rates["training"].median, images / rates["loader warm"].median
    cold_s = images / rates["loader cold"].median if "loader cold" in rates else None
    return max(warm_s - training_s, 0.0), None if cold_s is None else max(cold_s - max(warm_s, training_s), 0.0)


def apply_first(
    found: Profile, loader: Iterable, call: Callable, seconds: float, on_stage: Callable[[str], None]
) -> Tried | None:
    """The first fix that the loader's options make, for as long as the first measurement took."""
    first = found.causes[0].name
    fix = next((fix for fix in found.fixes if fix.changes not in ({}, IN_MEMORY) and fix.cause == first), None)
    if fix is None or not isinstance(loader, ImageLoader):
        return None
    on_stage(f"with {fix.option}")
    with loader.reopened(**fix.changes) as other:
        batches = repeat(other)
        if fix.changes.get("cache", "none") != "none":  # the steps that it has decoded, over and over
            count = min(len(other), int(seconds * found.rates["loader warm"].median / other.plan.batch_size) + MIN_STEPS)
            batches = endless(other, other.position, count)
            for _ in range(count):
                next(batches)
        account = Account(other.device, other)
        steps = run(batches, call, account, WARM_UP_STEPS + other.options.prefetch, seconds, MIN_STEPS)
        achieved = windows(steps, other.plan.batch_size)
    return Tried(fix.option, found.rates["together"].median, fix.images_per_second, achieved)
