"""Measures what limits a run: loader and training together, each alone, and short trials of options that might help."""

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from imagefeed.dataset.manifest import Manifest
from imagefeed.model import build_net
from imagefeed.model.flops import Flops, count_flops
from imagefeed.model.step import choose_precision, keep_memory, train_step
from imagefeed.pipeline.loader import Batch, ImageLoader, choose_device
from imagefeed.pipeline.profiler import limits, machine
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.causes import PARTS, explain, find_stalls, lock_held, stalled, table
from imagefeed.pipeline.profiler.findings import (
    LARGER,
    LARGER_BATCH,
    Evidence,
    Profile,
    Samples,
    Series,
    Settings,
    Step,
    Tried,
    rates_of,
)
from imagefeed.pipeline.profiler.fixes import SHORT_SWITCH, remedies
from imagefeed.pipeline.profiler.isolation import facts_before, machine_facts, stages_alone
from imagefeed.pipeline.profiler.stages import stages_of
from imagefeed.pipeline.profiler.trials import ROUNDS, evict, gains, ids_of, lock_gains, phased, repeat, run, run_from
from imagefeed.pipeline.profiler.windows import bytes_of, endless, enlarged, images_in

BATCH_SIZE = 128
# Shares of the time.
WARM_UP, TOGETHER, CEILING, ENLARGED, LOADER = 0.1, 0.3, 0.12, 0.06, 0.07
ALONE, LIMITS, TRIALS, TRYING = 0.1, 0.08, 0.25, 0.3
ENLARGED_AT_MOST = 0.25  # of the time, for the larger batch; it is left out if it would take more
MIN_STEPS, CEILING_ROUNDS = 10, 3
FEW_STEPS = 3  # if a step takes so long that MIN_STEPS would take more than their share of the time
WARM_UP_STEPS = 3  # besides the batches that were made before anybody took them
LONGER = 2  # times at most that a measurement goes on if it is not steady yet
STEADY = 0.05  # the two halves of a measurement differ by less
FEW_STALLS = 4  # fewer stalled steps do not show whether they come regularly
SUSPICIOUS = 0.03  # of a step: an option is tried if its part takes more
UPDATE_BYTES = 20  # for a parameter of SGD with momentum in one pass: weight, gradient, momentum read, two of them written
MANY = 5000  # images/s that no loader on a CPU exceeds by much: how many steps its own measurement could take


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
    """Measures what limits `for batch in loader: step(batch)`, for any loader that can be iterated again and again.

        print(profile(loader, lambda batch: train_on(batch)))

    `str()` of the result is the text that `imagefeed profile` prints. `step` trains on a batch for real, a few hundred times or
    for about `seconds`. If it takes a keyword `on_phase` and passes it to model.step.train_step, or calls it as that does, its
    phases are told apart. For an ImageLoader the stages are told apart too, and other options are tried; with `attempt` the first
    fix is then applied for longer. `device` is where training happens: by default the ImageLoader's, else CUDA if there is a GPU.
    The parameters of `model`, and the `flops` of an image (model/flops.py) with `precision`, tell how fast each phase could be.
    """
    begin_s = time.perf_counter()
    ours = isinstance(loader, ImageLoader)
    device = choose_device(device or (loader.device if ours else "auto"))
    call = phased(step)
    facts = facts_before(loader) if ours else {}
    on_stage("loader and training together")
    together = measure_together(loader, call, device, seconds)
    facts |= together.facts
    batch_size = images_in(together.batch, loader)
    settings = settings_of(loader, device, precision, batch_size)
    rates = {"together": rates_of(together.steps, batch_size)}

    on_stage("training on one batch")
    step_s = statistics.median(step.seconds for step in together.steps)
    alone, larger, fixed_s = ceilings(together.batch, call, device, seconds, step_s)
    rates["training"] = rates_of(alone, batch_size)
    if larger:
        rates[LARGER] = rates_of(larger, LARGER_BATCH * batch_size)
        facts["fixed_share"] = statistics.median(fixed_s) * rates["together"].median / batch_size
    if flops is not None:
        facts |= {"forward_flop": float(flops.forward), "backward_flop": float(flops.backward)}

    stage_rates, count = {}, 0
    if ours:
        own = measure_loader(loader, together.taken, seconds, on_stage)
        rates, facts, stage_rates, count = rates | own.rates, facts | own.facts, own.stages, own.steps
        settings = replace(settings, pixels_per_image=facts.pop("pixels_per_image"))
    else:
        on_stage("the loader alone")
        taken = run(repeat(loader), phased(lambda batch: None), Account(device), 2, seconds * LOADER * 2)
        rates["loader warm"] = rates_of(taken, batch_size)
    on_stage("the limits of this machine")
    facts |= machine_facts(precision, seconds * LIMITS / 4, device)
    facts["copy_s"] = 2 * bytes_of(together.batch) / facts.get("copy_bytes_per_s", facts["memory_bytes_per_s"])
    if model is not None:
        facts["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
        facts["update_s"] = UPDATE_BYTES * facts["parameters"] / facts["memory_bytes_per_s"]

    series = replace(together.series, fixed_s=fixed_s)
    found = Profile(settings, 0.0, rates, together.steps, evidence=Evidence(**facts), series=series)
    tried = functools.partial(try_options, found, loader, call, device, together.taken, count)
    found = finish(found.replace(gains=tried(seconds * TRIALS, on_stage)), alone, stage_rates)
    if attempt:
        found = found.replace(tried=apply_first(found, loader, call, seconds * TRYING, on_stage))
    return found.replace(seconds=time.perf_counter() - begin_s)


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
    """Profiles training `model` (model/nets.py) on a split; `reading` are further arguments of ImageLoader.

    `batch_size` is 128 by default, or all of a smaller split; `crop_size` is the side of a crop in pixels, 64 or more. Raises
    UserError if the split has no labels, or if its images do not fill a crop or a batch.
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
    return found.replace(settings=replace(found.settings, model=model))


def profile_of_run(account: Account, loader: ImageLoader, precision: str, model: str | None = None) -> Profile | None:
    """Profiles a run that trains for real, from the steps in `account` that `loader` fed; None if there are none.

    Without ceilings, trials or limits it names a part of the step, and its cause if the run itself shows it (bytes from the disk,
    neighbors, the interpreter's lock, stalls). `imagefeed profile` measures the rest.
    """
    account.stop()
    steps = account.steps()
    if not steps:
        return None
    settings = replace(settings_of(loader, account.device, precision, loader.plan.batch_size), model=model)
    facts, series = facts_before(loader), Series()
    if account.sampler:
        read_bytes = machine.counters().read_bytes - account.sampler.began.read_bytes
        facts["read_bytes_per_step"] = read_bytes / account.count
        series = account.sampler.series
    rates = {"together": rates_of(steps, settings.batch_size)}
    seconds = sum(step.seconds for step in steps)
    return finish(Profile(settings, seconds, rates, steps, evidence=Evidence(**facts), series=series), (), {})


def finish(found: Profile, alone: tuple[Step, ...], stage_rates: dict[str, Samples]) -> Profile:
    """With the stages, stalls, causes and fixes that follow from what was measured."""
    parts = table(found.steps, found.settings.ours, found.settings.cuda)
    return explain(found.replace(stages=stages_of(found, alone, stage_rates), stalls=find_stalls(parts)))


def settings_of(loader: object, device: torch.device, precision: str, batch_size: int) -> Settings:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cores, workers = len(os.sched_getaffinity(0)), getattr(loader, "num_workers", None)
    found = Settings(name, precision, cores, batch_size, type(loader).__name__, workers)
    if not isinstance(loader, ImageLoader):
        return found
    options, given, split = loader.options, loader.arguments, loader.dataset.split
    as_given = ("cache", "read_ahead", "verify_checksums", "shuffle", "random_resized_crop", "color_jitter")
    return replace(
        found,
        threads=options.num_threads,
        prefetch=options.prefetch,
        hw_decoder_load=options.hw_decoder_load,
        crop_size=options.crop_size,
        split=split,
        root=str(loader.manifest.root),
        records=len(loader.dataset),
        record_bytes_per_step=float(loader.manifest.load_index(split)["length"].mean()) * batch_size,
        pixels_per_image=float(loader.manifest.options["size"] ** 2),
        **{name: given[name] for name in as_given},
    )


class Together(NamedTuple):
    steps: tuple[Step, ...]
    taken: int  # steps, with the warm-up
    batch: object
    facts: dict[str, float]
    series: Series


def measure_together(loader: Iterable, call: Callable, device: torch.device, seconds: float) -> Together:
    """Steps of loader and training; the loader stays where it is."""
    ours = isinstance(loader, ImageLoader)
    with loader.reopened() if ours else contextlib.nullcontext(loader) as opened:
        account = Account(device, opened, Sampler())
        batches = repeat(opened)
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
        before, after = account.sampler.began, machine.counters()
        facts = {
            "read_bytes_per_step": (after.read_bytes - before.read_bytes) / account.count,
            "refaults_per_step": (after.refaults - before.refaults) / account.count,
            "throttled_share": (after.throttled_s - before.throttled_s) / (after.when_s - before.when_s),
        }
        return Together(account.steps()[warm_up:], account.count, next(batches), facts, account.sampler.series)


def affordable(most: int, least: int, seconds: float, step_s: float) -> int:
    """The number of steps that fit into `seconds`, within bounds."""
    return max(least, min(most, int(seconds / step_s)))


def steady(steps: tuple[Step, ...]) -> bool:
    """Whether both halves take as long, and stalled steps are none or enough to see whether they come regularly."""
    seconds = np.array([step.seconds for step in steps])
    halves = [np.median(half) for half in np.array_split(seconds, 2)]
    return abs(halves[0] - halves[1]) < STEADY * max(halves) and not 0 < np.count_nonzero(stalled(seconds)) < FEW_STALLS


def ceilings(
    batch: object, call: Callable, device: torch.device, seconds: float, step_s: float
) -> tuple[tuple[Step, ...], tuple[Step, ...], tuple[float, ...]]:
    """Steps on one batch over and over and, in turns, on a batch LARGER_BATCH times as large: none if it cannot be made or would
    take too long. Also, for each round, the seconds of a step that do not grow with the batch. `step_s` is a step's time."""
    room = machine.memory_bytes()[0] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    takes_long = 2 * LARGER_BATCH * step_s > ENLARGED_AT_MOST * seconds
    too_large = 16 * LARGER_BATCH * bytes_of(batch) > room
    larger = None if takes_long or too_large else enlarged(batch, LARGER_BATCH)
    alone: tuple[Step, ...] = ()
    many: tuple[Step, ...] = ()
    fixed_s = []
    rounds = affordable(CEILING_ROUNDS, 1, seconds * CEILING, 3 * step_s)
    for _ in range(rounds):
        mine = run(repeat([batch]), call, Account(device), 1, seconds * CEILING / rounds, 2)
        alone += mine
        if larger is not None:
            theirs = run(repeat([larger]), call, Account(device), 1, seconds * ENLARGED / rounds, 1)
            many += theirs
            one_s, all_s = (statistics.median(step.seconds for step in steps) for steps in (mine, theirs))
            fixed_s.append(max(LARGER_BATCH * one_s - all_s, 0.0) / (LARGER_BATCH - 1))
    return alone, many, tuple(fixed_s)


class LoaderAlone(NamedTuple):
    rates: dict[str, Samples]
    facts: dict[str, float]
    stages: dict[str, Samples]
    steps: int  # measured cold


def measure_loader(loader: ImageLoader, taken: int, seconds: float, on_stage: Callable[[str], None]) -> LoaderAlone:
    """The loader alone, from where the first `taken` steps ended; its stages, disk and decoder."""
    position, split = loader.position + taken, loader.dataset.split
    on_stage("the loader alone, cold and warm")
    count = min(len(loader), max(int(2 * seconds * LOADER * MANY / loader.plan.batch_size), 12))
    count = evicted = evict(loader, position, count, seconds * LOADER / 2)
    rates = {}
    for name in ("loader cold", "loader warm"):  # the same steps, from the disk and then from memory
        enough = name == "loader warm" or count > loader.options.prefetch + 1
        steps, count = run_from(loader, phased(lambda batch: None), position, count, seconds * LOADER)
        if enough:
            rates[name] = rates_of(steps, loader.plan.batch_size)
    on_stage("each stage alone")
    stages, facts, jpegs = stages_alone(loader, position, count, seconds * ALONE)
    ids = ids_of(loader, loader.position, min(taken, len(loader)))
    records, size = limits.disk_rate(loader.manifest, split, ids, seconds * LIMITS / 4)
    facts |= {"disk_records_per_s": records, "disk_bytes_per_s": size}
    facts["decode_images_per_s"] = limits.decode_rate(jpegs[:32], seconds * LIMITS / 4)
    # Records that were evicted on purpose, for the loader alone, do not count.
    kept = np.setdiff1d(ids, ids_of(loader, position, evicted))
    facts["evicted_share"] = 1 - machine.resident_share(loader.manifest, split, kept) if len(kept) else 0.0
    return LoaderAlone(rates, facts, stages, count)


def try_options(
    found: Profile,
    loader: Iterable,
    call: Callable,
    device: torch.device,
    taken: int,
    count: int,
    seconds: float,
    on_stage: Callable[[str], None],
) -> dict[str, tuple[float, ...]]:
    """The gain of each option that might help, in each round."""
    if lock_held(found.series):  # then nothing else is worth a trial: all parts wait for it
        on_stage("what the interpreter's lock costs")
        with loader.reopened() if found.settings.ours else contextlib.nullcontext(loader) as again:
            return {SHORT_SWITCH: lock_gains(again, call, device, seconds / 6)}
    parts = table(found.steps, found.settings.ours, found.settings.cuda)
    share = dict(zip(PARTS, parts.sum(0) / parts.sum(), strict=True))
    promising = [remedy for remedy in remedies(found.settings, found.evidence) if share[remedy.part] > SUSPICIOUS]
    if not promising:
        return {}
    on_stage("what would help: " + ", ".join(remedy.option for remedy in promising))
    return gains(loader, call, promising, loader.position + taken, count, seconds / (ROUNDS + 1) / (1 + len(promising)))


def apply_first(
    found: Profile, loader: Iterable, call: Callable, seconds: float, on_stage: Callable[[str], None]
) -> Tried | None:
    """Applies the first fix, if options of the loader make it, for as long as the first measurement took."""
    fix = next((fix for fix in found.fixes if fix.changes and fix.cause == found.causes[0].name), None)
    if fix is None:
        return None
    on_stage(f"with {fix.option}")
    with loader.reopened(**fix.changes) as other:
        batches = repeat(other)
        if "cache" in fix.changes:  # the steps that it has decoded, over and over
            count = min(len(other), int(seconds * found.rates["loader warm"].median / other.plan.batch_size) + MIN_STEPS)
            batches = endless(other, other.position, count)
            for _ in range(count):
                next(batches)
        steps = run(batches, call, Account(other.device, other), WARM_UP_STEPS + other.options.prefetch, seconds, MIN_STEPS)
        achieved = rates_of(steps, other.plan.batch_size)
    return Tried(fix.option, found.rates["together"].median, fix.images_per_second, achieved)
