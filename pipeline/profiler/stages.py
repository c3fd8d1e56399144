"""From the steps of a run to its stages: times in place, rates, and how near each is to what the machine can do."""

import itertools
import os
import statistics

import numpy as np
import torch

from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler.causes import FROM_DISK, PARTS, stalled, table
from imagefeed.pipeline.profiler.findings import STAGES, Samples, Stage, Step
from imagefeed.pipeline.profiler.trials import rate

WINDOWS = 10
STEADY = 0.05  # the two halves of a measurement differ by less
FEW_STALLS = 4
LITTLE = 0.02  # of a step: what is left over of the loader's time is not shown
NOT_READY, NOT_READY_S = 0.05, 5e-4  # of a step, and seconds: who waits longer for a batch found the queue empty


def stages_of(
    steps: tuple[Step, ...],
    alone: tuple[Step, ...],
    measured: dict[str, Samples],
    settings: dict,
    evidence: dict[str, float],
    images: int,
) -> tuple[Stage, ...]:
    """Each stage alone, in place, and beside its limit."""
    ours = "threads" in settings
    cuda = settings["device"] != "CPU"
    parts = dict(zip(PARTS, table(steps, ours, cuda).T, strict=True))
    ceiling = dict(zip(PARTS, table(alone, False, cuda).T, strict=True))
    total_s = sum(step.seconds for step in steps)
    limits = limits_by_stage(settings, evidence, images) if "memory bytes/s" in evidence else {}
    found = []
    for name, side in STAGES:
        seconds = parts.get(name, np.zeros(len(steps)))
        if side == "training" and name in ceiling and ceiling[name].sum() > 0:
            each = np.array_split(ceiling[name], min(5, len(ceiling[name])))
            rates = Samples(tuple(images / max(float(np.mean(part)), 1e-9) for part in each))
        else:
            rates = measured.get(name)
        if rates is None and seconds.sum() <= (LITTLE * total_s if ours and name == "loading" else 0.0):
            continue
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist()
        busy, empty = float(seconds.sum() / total_s), None
        if name in ("decode", "loading"):
            enough_s = max(NOT_READY * statistics.median(step.seconds for step in steps), NOT_READY_S)
            empty = float(np.mean(seconds > enough_s))
        by_graph = name == "crop" and not seconds.any()
        if (name == "decode" or by_graph) and rates:  # of its own threads; the training thread only waits
            busy = min(images * len(steps) / total_s / rates.median, 1.0)
        if name == "checksum" and rates:  # it is a part of reading
            busy = images * len(steps) / total_s / rates.median
            p50 = p95 = p99 = images / rates.median
        limit, limit_name = limits.get(name, (None, ""))
        found.append(Stage(name, side, rates, p50, p95, p99, busy, empty, limit, limit_name))
    return tuple(found)


def limits_by_stage(settings: dict, evidence: dict[str, float], images: int) -> dict[str, tuple[float, str]]:
    """Images a second that the machine could do at most, and what of it is the limit."""
    cuda, cores = settings["device"] != "CPU", settings["cores"]
    memory, copy_s = evidence["memory bytes/s"], evidence["seconds to copy a batch"]
    found = {"hand-over": (images / copy_s, "copy bandwidth" if cuda else "memory bandwidth")}
    if "seconds to update, at least" in evidence:
        found["optimizer"] = (images / evidence["seconds to update, at least"], "memory bandwidth")
    for name in ("forward", "backward"):
        if f"FLOP an image, {name}" in evidence:
            found[name] = (evidence["matrix FLOP/s"] / evidence[f"FLOP an image, {name}"], "matrix products")
    if "record bytes" not in evidence:
        return found
    found["read"] = (memory / evidence["record bytes"], "memory bandwidth")
    if evidence["read bytes a step"] > FROM_DISK * settings["record bytes a step"] and evidence["disk records/s"]:
        found["read"] = (evidence["disk records/s"], "disk")
    if not cuda:
        found["decode"] = (evidence["libjpeg-turbo images/s a core"] * cores, f"libjpeg-turbo, {cores} cores")
        found["crop"] = (images / copy_s, "memory bandwidth")
    return found


def cut(steps: tuple[Step, ...], count: int = WINDOWS) -> list[tuple[Step, ...]]:
    """Into `count` equal windows, or as many as there are steps."""
    edges = np.linspace(0, len(steps), min(count, len(steps)) + 1).astype(int).tolist()
    return [steps[begin:end] for begin, end in itertools.pairwise(edges)]


def windows(steps: tuple[Step, ...], images: int) -> Samples:
    return Samples(tuple(rate(window, images) for window in cut(steps)))


def steady(steps: tuple[Step, ...]) -> bool:
    """Whether both halves take as long, and no step or enough of them stand out to say whether they come regularly."""
    seconds = np.array([step.seconds for step in steps])
    halves = [np.median(half) for half in np.array_split(seconds, 2)]
    return abs(halves[0] - halves[1]) < STEADY * max(halves) and not 0 < np.count_nonzero(stalled(seconds)) < FEW_STALLS


def waiting(steps: tuple[Step, ...]) -> float:
    """The share of time that waits for data."""
    return sum(step.wait_s for step in steps) / sum(step.seconds for step in steps)


def settings_of(loader: ImageLoader, device: torch.device, precision: str) -> dict[str, object]:
    """What the run is made of; bytes as they are stored, and as they will be decoded."""
    options, given = loader.options, loader.arguments
    index = loader.manifest.load_index(loader.dataset.split)
    side = loader.manifest.options["size"]
    return settings_of_any(loader, device, precision, loader.plan.batch_size) | {
        "threads": options.num_threads,
        "prefetch": options.prefetch,
        "hw_decoder_load": options.hw_decoder_load,
        "crop_size": options.crop_size,
        "split": loader.dataset.split,
        "root": str(loader.manifest.root),
        "records": len(loader.dataset),
        "record bytes a step": float(index["length"].mean()) * loader.plan.batch_size,
        "pixels an image": float(side * side),
        "decoded bytes": 3.0 * side * side * len(loader.dataset),
        **{name: given[name] for name in ("cache", "read_ahead", "check", "shuffle", "random_resized_crop", "color_jitter")},
    }


def settings_of_any(loader: object, device: torch.device, precision: str, batch_size: int) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": precision,
        "cores": len(os.sched_getaffinity(0)),
        "batch_size": batch_size,
        "loader": type(loader).__name__,
    } | ({"workers": loader.num_workers} if hasattr(loader, "num_workers") else {})
