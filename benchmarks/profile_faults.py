"""Does the profiler name the cause? Each fault of faults.py is made for real, and the cause that is named compared with it.

    python -m benchmarks.profile_faults RAW [--rounds 3] [--only NAME] [--seconds 30]     # results under "profile_faults"
    python -m benchmarks.profile_faults RAW --device cuda --folder WORK                   # ... "profile_faults-cuda"

RAW is a folder of raw images (1,000 ImageNet JPEGs, say), of which datasets are built. On a CPU every fault is a process of its
own: disks and memory are limited by control groups (version 1; as root), neighbors compute in other processes, a thread holds the
interpreter's lock. Where the profiler can apply a fix, what it achieved is compared with what was predicted.
"""

import itertools
import json
import shutil
import statistics
import time
from pathlib import Path

import click
import torch

from benchmarks import harness
from benchmarks.data import repeat, stretch
from benchmarks.faults import CUDA_FAULTS, FAULTS, Fault, suffer
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.report import verdict

COPIES = 8  # of up to 1,000 images in the dataset that is stretched
# "large", so that no epoch ends while it is profiled and a disk never has read all of it; "little", more than memory is left for
# where that is the fault. 2.2 and 0.5 GB.
TIMES = {"large": 12, "little": 3}
NEARLY = 0.95  # of the rate of training alone: a run that reaches it is limited by training
NOT_INPUT = {"training", "small batch", "optimizer", "host-to-device copy", "periodic stall", "late stall", "rest of the loop"}


def summary(fault: Fault, found: Profile) -> dict[str, object]:
    """What was named, whether it is right, and what a fix achieved."""
    named, tried = found.causes[0].name, found.tried
    expected = fault.cause
    if not expected:
        nearly = found.rates["together"].median >= NEARLY * found.rates["training"].median
        expected = "training" if nearly else "input"
    return {
        "right": named == expected or (expected == "input" and named not in NOT_INPUT),
        "named": named,
        "expected": expected,
        "confidence": found.causes[0].confidence,
        "claims": {cause.name: round(cause.share, 3) for cause in found.causes},
        "verdict": verdict(found),
        "fixes": {fix.option or fix.sentence: round(fix.gain, 3) for fix in found.fixes},
        "images_per_second": {name: round(samples.median, 1) for name, samples in found.rates.items()},
        "tried": tried
        and {"option": tried.option, "before": tried.before, "predicted": tried.predicted, "achieved": tried.achieved.median},
        "seconds": found.seconds,
    }


def judge(name: str, work: Path, seconds: float, device: torch.device) -> dict[str, object]:
    """Suffers the fault; on a CPU in a process of its own, whose disk and memory can be limited."""
    try:
        if device.type == "cuda":
            return summary(CUDA_FAULTS[name], suffer(CUDA_FAULTS[name], work, seconds, device))
        options = ("--suffer", name, "--folder", work, "--seconds", seconds, "--device", "cpu")
        return json.loads(harness.call("benchmarks.profile_faults", *options).splitlines()[-1])
    except Exception as error:  # the other faults go on
        return {"named": f"failed: {type(error).__name__}: {str(error)[:150]}", "right": False}


def build(raw: Path, work: Path, name: str) -> None:
    """One of the datasets: "huge" of large images, "once" of copies, and those of TIMES, which repeat "once"."""
    if (work / name / "dataset.json").exists():
        return
    shutil.rmtree(work / name, ignore_errors=True)
    if name in TIMES:
        build(raw, work, "once")
        stretch(work / "once", work / name, TIMES[name])
        return
    count, copies, size = (600, 1, 1024) if name == "huge" else (1000, COPIES, 256)
    images = sorted(path.resolve() for path in raw.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))[:count]
    repeat(images, work / f"raw-{name}", copies * len(images), lambda image, target: target.symlink_to(image))
    harness.call("preprocess", "build", work / f"raw-{name}", work / name, "--size", size, "--split", "train")


def overhead_us() -> float:
    """Microseconds of CPU time that `train.py --profile` takes per step: its marks, the loader's notes, the sampler."""

    class Noted:
        spans = (("read", 0.0, 0.0), ("decode", 0.0, 0.0), ("crop", 0.0, 0.0))

    steps, found = 20_000, []
    for _ in range(5):
        account = Account(torch.device("cpu"), Noted(), Sampler(5, 0.5))
        batches = itertools.repeat(None)
        start_s = time.thread_time()
        for _ in range(steps):
            account.fetch(batches)
            for phase in ("forward", "backward", "optimizer", "end"):
                account.phase(phase)
        found.append((time.thread_time() - start_s) / steps * 1e6)
    return statistics.median(found)


@click.command()
@click.argument("raw", type=harness.EXISTING, required=False)
@harness.rounds_option(3)
@harness.seconds_option(30.0, "Time to profile each fault, about.")
@click.option("--only", multiple=True, type=click.Choice([*FAULTS, *CUDA_FAULTS]), help="Some faults only; nothing is saved.")
@harness.FOLDER
@harness.DEVICE
@click.option("--suffer", "suffered", type=click.Choice(list(FAULTS)), hidden=True)
def main(
    raw: Path | None, rounds: int, seconds: float, only: tuple[str, ...], folder: Path | None, device: str, suffered: str | None
) -> None:
    """Make every fault, and see what the profiler names."""
    device = choose_device(device)
    faults = CUDA_FAULTS if device.type == "cuda" else FAULTS
    with harness.working_folder(folder) as work:
        if suffered:
            print(json.dumps(summary(faults[suffered], suffer(faults[suffered], work, seconds, device))))
            return
        results: dict[str, list[dict]] = {name: [] for name in only or faults}
        for name in {faults[name].data for name in results} if raw else ():
            build(raw, work, name)
        cost_us = overhead_us()
        for number, name in itertools.product(range(rounds), results):
            found = judge(name, work, seconds, device)
            results[name].append(found)
            word = "right" if found["right"] else "WRONG"
            print(f"round {number + 1}: {word} {name}: {found['named']}, tried {found.get('tried')}", flush=True)
            outcomes = [row for rows in results.values() for row in rows]
            errors = [abs(tried["achieved"] / tried["predicted"] - 1) for row in outcomes if (tried := row.get("tried"))]
            result = {"seconds": seconds, "right": sum(row["right"] for row in outcomes), "of": len(outcomes)}
            result |= {"prediction_errors": errors, "overhead_us_a_step": cost_us, "faults": results}
            if not only:
                harness.save(harness.named("profile_faults", device), result, "torch", "nvidia-dali-cuda130")
    near = sum(error <= 0.1 for error in errors)
    print(f"{result['right']} of {result['of']} right; {near} of {len(errors)} predictions within 10 %; {cost_us:.1f} us a step")


if __name__ == "__main__":
    main()
