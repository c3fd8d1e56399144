"""Measures what limits a run: loader and training together, each alone, and short trials of options that might help."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from imagefeed.codec.cores import cpu_quota, usable_cores
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.remote import Traffic
from imagefeed.model.flops import Flops, count_flops
from imagefeed.model.nets import build_net
from imagefeed.model.step import can_compile, choose_precision, keep_memory, prepare_gpu, train_step
from imagefeed.pipeline.arguments import choose_device, trained_form
from imagefeed.pipeline.gpu import why_no_hardware_decoder
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler import limits, machine, trials
from imagefeed.pipeline.profiler.accounting import Account, Sampler, traffic_of
from imagefeed.pipeline.profiler.causes import PARTS, explain, find_stalls, lock_held, stages_of, table
from imagefeed.pipeline.profiler.findings import (
    LARGER,
    LARGER_BATCH,
    UNSET,
    Evidence,
    Profile,
    Samples,
    Settings,
    Step,
    Tried,
    rates_of,
)
from imagefeed.pipeline.profiler.fixes import SHORT_SWITCH, remedies
from imagefeed.pipeline.profiler.trials import affordable, ids_of, median_s, phased, repeat, run, run_from
from imagefeed.pipeline.profiler.windows import bytes_of, endless, enlarged, images_in

BATCH_SIZE = 128
# Shares of the time.
WARM_UP, TOGETHER, CEILING, ENLARGED, LOADER = 0.1, 0.3, 0.12, 0.06, 0.07
ALONE, LIMITS, TRIALS, TRYING = 0.1, 0.08, 0.25, 0.3
ENLARGED_AT_MOST = 0.25  # of the time, for the larger batch; it is left out if it would take more
MIN_STEPS, CEILING_ROUNDS = 10, 3
FEW_STEPS = 3  # if a step takes so long that MIN_STEPS would take more than their share of the time
WARM_UP_STEPS = 3  # besides the batches that were made before anybody took them
LONGEST = 3  # times its share of the time, at most, until a measurement is steady
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

    `str()` of the result is what `imagefeed profile` prints. `step` trains on a batch for real, a few hundred times or for about
    `seconds`; its phases are told apart if it takes a keyword `on_phase` and passes it to imagefeed.model.step.train_step. For an
    ImageLoader the stages are told apart too, and other options are tried; with `attempt` the first fix is then applied for
    longer. `device` is where training happens: by default the ImageLoader's, else CUDA if there is a GPU. The parameters of
    `model`, and the `flops` of an image (imagefeed.model.flops) with `precision`, tell how fast each phase could be.
    """
    measurement = Measurement(loader, step, device, precision, seconds, on_stage)
    measurement.together()
    measurement.ceilings()
    measurement.loader_alone()
    measurement.limits(model, flops)
    measurement.trials()
    return measurement.profile(attempt)


class Measurement:
    """The phases of a profile, in order; `rates`, `facts` (Evidence), `stages` and `gains` collect what they find."""

    def __init__(self, loader: Any, step: Callable, device: Any, precision: str, seconds: float, on_stage: Callable):
        self.begin_s = time.perf_counter()
        self.loader, self.call, self.seconds, self.on_stage = loader, phased(step), seconds, on_stage
        self.ours, self.precision = isinstance(loader, ImageLoader), precision
        self.device = choose_device(device or (loader.device if self.ours else "auto"))
        self.facts: dict[str, Any] = limits.facts_before(loader) if self.ours else {}
        self.rates: dict[str, Samples] = {}
        self.stages: dict[str, Samples] = {}
        self.gains: dict[str, tuple[float, ...]] = {}
        self.alone: tuple[Step, ...] = ()  # of training on one batch

    def reopened(self) -> contextlib.AbstractContextManager:
        """The loader, for a loop of its own: an ImageLoader stays where it is."""
        return self.loader.reopened() if self.ours else contextlib.nullcontext(self.loader)

    def together(self) -> None:
        self.on_stage("loader and training together")
        most_s = self.seconds * TOGETHER
        with self.reopened() as opened:
            sampler, traffic = Sampler(), traffic_of(opened)
            account = Account(self.device, opened, sampler)
            batches = repeat(opened)
            run(batches, self.call, account, 0, 0, WARM_UP_STEPS)
            step_s = account.steps()[-1].seconds
            warm_up = affordable(opened.options.prefetch if self.ours else 2, 0, self.seconds * WARM_UP, step_s)
            run(batches, self.call, account, 0, 0, warm_up)
            least = affordable(MIN_STEPS, FEW_STEPS, most_s, step_s)
            for _ in range(LONGEST):
                run(batches, self.call, account, 0, most_s, least)
                self.steps = account.steps()[WARM_UP_STEPS + warm_up :]
                if trials.steady(self.steps) or step_s * least > most_s:
                    break
            self.taken = account.count
            before, after = sampler.began, machine.counters()
            self.facts["read_bytes_per_step"] = (after.read_bytes - before.read_bytes) / self.taken
            self.facts["refaults_per_step"] = (after.refaults - before.refaults) / self.taken
            self.facts["throttled_share"] = machine.throttled_share(before, after)
            self.facts["cpu_quota"] = cpu_quota()
            self.facts |= sampler.samples | store_facts(traffic, traffic_of(opened), self.taken)
            self.batch = next(batches)
        self.settings = settings_of(self.loader, self.device, self.precision, images_in(self.batch, self.loader))
        self.rates["together"] = rates_of(self.steps, self.settings.batch_size)

    def ceilings(self) -> None:
        """Training on one batch over and over and, in turns, on one LARGER_BATCH times as large if there is time and memory."""
        self.on_stage("training on one batch")
        device, batch_size = self.device, self.settings.batch_size
        room = machine.memory_bytes()[0] if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        step_s = median_s(self.steps)
        takes_long = 2 * LARGER_BATCH * step_s > ENLARGED_AT_MOST * self.seconds
        too_large = 16 * LARGER_BATCH * bytes_of(self.batch) > room
        larger = None if takes_long or too_large else enlarged(self.batch, LARGER_BATCH)
        many: tuple[Step, ...] = ()
        fixed_s = []  # seconds of a step that do not grow with the batch
        rounds = affordable(CEILING_ROUNDS, 1, self.seconds * CEILING, 3 * step_s)
        for _ in range(rounds):
            one = run(repeat([self.batch]), self.call, Account(device), 1, self.seconds * CEILING / rounds, 2)
            self.alone += one
            if larger is not None:
                try:
                    other = run(repeat([larger]), self.call, Account(device), 1, self.seconds * ENLARGED / rounds, 1)
                except torch.OutOfMemoryError:  # of a GPU
                    larger = None
                    continue
                many += other
                fixed_s.append(max(LARGER_BATCH * median_s(one) - median_s(other), 0.0) / (LARGER_BATCH - 1))
        self.rates["training"] = rates_of(self.alone, batch_size)
        if many:
            self.rates[LARGER] = rates_of(many, LARGER_BATCH * batch_size)
            self.facts["fixed_s"] = tuple(fixed_s)
            self.facts["fixed_share"] = statistics.median(fixed_s) * self.rates["together"].median / batch_size

    def loader_alone(self) -> None:
        """The loader without training; an ImageLoader cold and warm, with its stages and the disk."""
        nothing, batch_size = phased(lambda batch: None), self.settings.batch_size
        if not self.ours:
            self.on_stage("the loader alone")
            steps = run(repeat(self.loader), nothing, Account(self.device), 2, self.seconds * LOADER * 2)
            self.rates["loader warm"] = rates_of(steps, batch_size)
            return
        self.on_stage("the loader alone, cold and warm")
        loader, each_s = self.loader, self.seconds * LOADER
        self.position = loader.position + self.taken
        wanted = min(len(loader), max(int(2 * each_s * MANY / batch_size), 12))
        self.count = evicted = trials.evict(loader, self.position, wanted, each_s / 2)
        for name in ("loader cold", "loader warm"):  # the same steps, from the disk and then from memory
            enough = name == "loader warm" or self.count > loader.options.prefetch + 1
            steps, self.count = run_from(loader, nothing, self.position, self.count, each_s)
            if enough:
                self.rates[name] = rates_of(steps, batch_size)
        self.on_stage("each stage alone")
        self.stages, facts, jpegs = limits.stages_alone(loader, self.position, self.count, self.seconds * ALONE)
        self.settings = replace(self.settings, pixels_per_image=facts.pop("pixels_per_image"))
        ids = ids_of(loader, loader.position, min(self.taken, len(loader)))
        limit_s = self.seconds * LIMITS / 4
        split = loader.manifest, self.settings.split
        facts["disk_records_per_s"], facts["disk_bytes_per_s"] = limits.disk_rate(*split, ids, limit_s)
        facts["decode_images_per_s"] = limits.decode_rate(jpegs[:32], limit_s)
        if loader.device.type == "cpu":
            crop_size, to_end = loader.options.crop_size, not loader.reader.verify_checksums
            facts["native_images_per_s"] = limits.native_rate(jpegs[:32], crop_size, to_end, limit_s)
        # Records that were evicted on purpose do not count.
        kept = np.setdiff1d(ids, ids_of(loader, self.position, evicted))
        resident = machine.resident_share(*split, kept) if len(kept) else None
        facts["evicted_share"] = 0.0 if resident is None else 1 - resident
        self.facts |= facts

    def limits(self, model: torch.nn.Module | None, flops: Flops | None) -> None:
        self.on_stage("the limits of this machine")
        facts, each_s = self.facts, self.seconds * LIMITS / 4
        facts["memory_bytes_per_s"] = copy_rate = limits.memory_rate(each_s, self.device)
        facts["matrix_flop_per_s"] = limits.matrix_rate(self.precision, each_s, self.device)
        if self.device.type == "cuda":
            facts["copy_bytes_per_s"] = copy_rate = limits.copy_rate(each_s, self.device)
        facts["copy_s"] = 2 * bytes_of(self.batch) / copy_rate
        if model is not None:
            facts["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
            facts["update_s"] = UPDATE_BYTES * facts["parameters"] / facts["memory_bytes_per_s"]
        if flops is not None:
            facts |= {"forward_flop": float(flops.forward), "backward_flop": float(flops.backward)}

    def trials(self) -> None:
        """The gains of the options that might help."""
        seconds = self.seconds * TRIALS
        evidence = Evidence(**self.facts)
        if lock_held(evidence):  # then nothing else is worth a trial: all parts wait for it
            self.on_stage("what the interpreter's lock costs")
            with self.reopened() as again:
                self.gains = {SHORT_SWITCH: trials.lock_gains(again, self.call, self.device, seconds / 6)}
            return
        parts = table(self.steps, self.settings.unnoted)
        share = dict(zip(PARTS, parts.sum(0) / parts.sum(), strict=True))
        promising = [r for r in remedies(self.settings, evidence) if share[r.part] > SUSPICIOUS]
        if promising:
            self.on_stage("what would help: " + ", ".join(remedy.option for remedy in promising))
            each_s = seconds / (trials.ROUNDS + 1) / (1 + len(promising))
            self.gains = trials.gains(self.loader, self.call, promising, self.position, self.count, each_s)

    def profile(self, attempt: bool) -> Profile:
        found = Profile(self.settings, 0.0, self.rates, self.steps, evidence=Evidence(**self.facts), gains=self.gains)
        found = finish(found, self.alone, self.stages)
        if attempt:
            found = replace(found, tried=self.apply_first(found))
        return replace(found, seconds=time.perf_counter() - self.begin_s)

    def apply_first(self, found: Profile) -> Tried | None:
        """Applies the first fix, if options of the loader make it, for as long as the first measurement took."""
        fix = next((fix for fix in found.fixes if fix.changes and fix.cause == found.causes[0].name), None)
        if fix is None:
            return None
        self.on_stage(f"with {fix.option}")
        seconds = self.seconds * TRYING
        with self.loader.reopened(**fix.changes) as other:
            batches = repeat(other)
            if "cache" in fix.changes:  # the steps that it has decoded, over and over
                count = min(len(other), int(seconds * found.rates["loader warm"].median / other.plan.batch_size) + MIN_STEPS)
                batches = endless(other, other.position, count)
                for _ in range(count):
                    next(batches)
            account = Account(other.device, other)
            steps = run(batches, self.call, account, WARM_UP_STEPS + other.options.prefetch, seconds, MIN_STEPS)
        return Tried(fix.option, found.rates["together"].median, fix.images_per_second, rates_of(steps, other.plan.batch_size))


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
    if device.type == "cpu":
        keep_memory()
    else:
        prepare_gpu()
    precision = choose_precision(device) if precision == "auto" else precision
    form = trained_form(device, precision)
    with ImageLoader(manifest, split, batch_size, crop_size=crop_size, device=device, **form, **reading) as loader:
        net = build_net(model, len(manifest.classes), crop_size=crop_size).to(device, memory_format=torch.channels_last)
        compiled = device.type == "cuda" and can_compile(device)  # as training does
        if compiled:
            net.compile(dynamic=False)
        # The learning rate is 0: only time counts.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)

        def step(batch: Batch, on_phase: Callable[[str], None] = lambda phase: None) -> None:
            train_step(net, batch.images, batch.labels, optimizer, precision, on_phase)

        if compiled:
            on_stage("nothing yet: the net is being compiled, for half a minute or more")
            images = torch.zeros(batch_size, 3, crop_size, crop_size, device=device, dtype=getattr(torch, precision))
            images = images.contiguous(memory_format=torch.channels_last)
            step(Batch((images, torch.zeros(batch_size, dtype=torch.int64, device=device))))
        options = {"device": device, "model": net, "precision": precision, "flops": count_flops(net, crop_size)}
        found = profile(loader, step, seconds=seconds, attempt=attempt, on_stage=on_stage, **options)
    return replace(found, settings=replace(found.settings, model=model))


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
    facts: dict[str, Any] = limits.facts_before(loader)
    if account.sampler:
        facts["read_bytes_per_step"] = (machine.counters().read_bytes - account.sampler.began.read_bytes) / account.count
        facts |= account.sampler.samples
    facts |= store_facts(account.traffic, traffic_of(loader), account.count)
    rates = {"together": rates_of(steps, settings.batch_size)}
    seconds = sum(step.seconds for step in steps)
    return finish(Profile(settings, seconds, rates, steps, evidence=Evidence(**facts)), (), {})


def store_facts(before: Traffic | None, after: Traffic | None, steps: int) -> dict[str, Any]:
    """Facts about the store of a dataset, between two moments `steps` apart; none if it is in files, or all was there."""
    if before is None or after is None or after.requests == before.requests:
        return {}
    found = after.since(before)
    return {
        "store_requests_per_step": found["requests"] / max(steps, 1),
        "store_request_s": found["ms_per_request"] / 1e3,
        "store_in_flight": found["in_flight"],
        "store_bytes_per_s": found["bytes"] / (after.when_s - before.when_s),
        "store_retries": float(found["retries"]),
    }


def finish(found: Profile, alone: tuple[Step, ...], stage_rates: dict[str, Samples]) -> Profile:
    """With the stages, stalls, causes and fixes that follow from what was measured."""
    parts = table(found.steps, found.settings.unnoted)
    return explain(replace(found, stages=stages_of(found, alone, stage_rates), stalls=find_stalls(parts)))


def settings_of(loader: object, device: torch.device, precision: str, batch_size: int) -> Settings:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cores, workers = usable_cores(), getattr(loader, "num_workers", None)
    found = Settings(name, precision, cores, batch_size, type(loader).__name__, workers)
    if not isinstance(loader, ImageLoader):
        return found
    manifest, split = loader.manifest, loader.reader.split
    given = {field.name for field in fields(Settings)} & loader.arguments.keys() - {"device", "batch_size", "decoder", "prefetch"}
    return replace(
        found,
        threads=loader.options.num_threads,
        prefetch=loader.options.prefetch,
        decoder=loader.decoder,
        root=str(manifest.root),
        records=len(loader.reader),
        record_bytes_per_step=float(manifest.load_index(split)["length"].mean()) * batch_size,
        pixels_per_image=float(manifest.options["size"] ** 2),
        hardware_decoder=not why_no_hardware_decoder() if device.type == "cuda" else UNSET,
        **{name: loader.arguments[name] for name in given},
    )
