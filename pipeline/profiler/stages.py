"""From the steps of a run to its stages: times in place, rates alone, and how near each is to what the machine can do."""

import statistics

import numpy as np

from imagefeed.pipeline.profiler.causes import PARTS, table
from imagefeed.pipeline.profiler.findings import STAGES, Evidence, Profile, Samples, Settings, Stage, Step
from imagefeed.pipeline.profiler.fixes import from_disk

LITTLE = 0.02  # of a step: a smaller rest of an ImageLoader's time is not shown
NOT_READY, NOT_READY_S = 0.05, 5e-4  # of a step, and seconds: who waits longer for a batch found the queue empty


def stages_of(profile: Profile, alone: tuple[Step, ...], measured: dict[str, Samples]) -> tuple[Stage, ...]:
    """Each stage alone (training from the steps `alone` on one batch, the input side as `measured`), in place, and its limit."""
    steps, settings, evidence = profile.steps, profile.settings, profile.evidence
    images = settings.batch_size
    parts = dict(zip(PARTS, table(steps, settings.ours, settings.cuda).T, strict=True))
    ceiling = dict(zip(PARTS, table(alone, False, settings.cuda).T, strict=True))
    total_s = sum(step.seconds for step in steps)
    rate = images * len(steps) / total_s
    limits = limits_by_stage(settings, evidence) if evidence.memory_bytes_per_s else {}
    found = []
    for name, (side, _) in STAGES.items():
        seconds = parts.get(name, np.zeros(len(steps)))
        rates = measured.get(name)
        if side == "training" and ceiling[name].sum() > 0:
            each = np.array_split(ceiling[name], min(5, len(alone)))
            rates = Samples(tuple(images / max(float(np.mean(part)), 1e-9) for part in each))
        if rates is None and seconds.sum() <= (LITTLE * total_s if settings.ours and name == "loading" else 0.0):
            continue
        p50_s, p95_s, p99_s = np.percentile(seconds, (50, 95, 99)).tolist()
        busy, empty = float(seconds.sum() / total_s), None
        if name in ("decode", "loading"):
            enough_s = max(NOT_READY * statistics.median(step.seconds for step in steps), NOT_READY_S)
            empty = float(np.mean(seconds > enough_s))
        by_graph = name == "crop" and not seconds.any()
        if rates and (name == "decode" or by_graph):  # its own threads are busy; the training thread only waits
            busy = min(rate / rates.median, 1.0)
        if rates and name == "checksum":  # a part of reading
            busy = rate / rates.median
            p50_s = p95_s = p99_s = images / rates.median
        limit, limit_name = limits.get(name, (None, ""))
        found.append(Stage(name, side, rates, p50_s, p95_s, p99_s, busy, empty, limit, limit_name))
    return tuple(found)


def limits_by_stage(settings: Settings, evidence: Evidence) -> dict[str, tuple[float, str]]:
    """The most images/s that the machine could do, and what sets the limit."""
    images = settings.batch_size
    found = {"copy": (images / evidence.copy_s, "copy bandwidth" if settings.cuda else "memory bandwidth")}
    if evidence.update_s:
        found["optimizer"] = (images / evidence.update_s, "memory bandwidth")
    for name, flop in (("forward", evidence.forward_flop), ("backward", evidence.backward_flop)):
        if flop:
            found[name] = (evidence.matrix_flop_per_s / flop, "matrix products")
    if evidence.record_bytes is None:  # another loader
        return found
    found["read"] = (evidence.memory_bytes_per_s / evidence.record_bytes, "memory bandwidth")
    if from_disk(settings, evidence) and evidence.disk_records_per_s:
        found["read"] = (evidence.disk_records_per_s, "disk")
    if not settings.cuda:
        found["decode"] = (evidence.decode_images_per_s * settings.cores, f"libjpeg-turbo, {settings.cores} cores")
        found["crop"] = (images / evidence.copy_s, "memory bandwidth")
    return found
