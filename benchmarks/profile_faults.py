"""Does the profiler name the cause? Each fault is made for real, and the cause that is named compared with it.

    python -m benchmarks.profile_faults RAW [--rounds 3] [--only NAME] [--seconds 30]    # results under "profile_faults"

RAW is a folder of raw images (1,000 ImageNet JPEGs, say); datasets of them are built in a temporary folder, or in --work and
kept. Every fault is a process of its own, which runs a training loop with the fault in it under the profiler: throttled disks
and limits of memory by control groups (version 1; as root), neighbours by processes that compute, a lock of the interpreter by a
thread that does. Where a fix can be applied it is, and what it achieved compared with what was predicted.
"""

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks import ROOT, save
from benchmarks.faults import FAULTS, suffer
from benchmarks.stretched import stretch
from imagefeed.pipeline.profiler.accounting import Account, Sampler
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.report import verdict

COPIES = 8  # of up to 1,000 images in the dataset that is repeated
TIMES = {"little": 3, "large": 12}  # 0.5 and 2.2 GB


def judge(name: str, work: Path, seconds: float) -> dict[str, object]:
    """Has a process of its own suffer the fault; what it named, and what the fix did."""
    fault = FAULTS[name]
    with contextlib.ExitStack() as stack:
        for _ in range(fault.neighbours):
            code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"  # not longer than this process
            busy = subprocess.Popen([sys.executable, "-c", code])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        command = [sys.executable, "-m", "benchmarks.profile_faults", "--suffer", name, "--work", work]
        done = subprocess.run([*command, "--seconds", str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"named": f"failed with {done.returncode}", "right": False}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"right": found["named"] == fault.cause} | found


def summary(found: Profile) -> dict[str, object]:
    tried = found.tried
    return {
        "named": found.causes[0].name,
        "confidence": found.causes[0].confidence,
        "claims": {cause.name: round(cause.share, 3) for cause in found.causes},
        "verdict": verdict(found),
        "fixes": {fix.option or fix.sentence: round(fix.gain, 3) for fix in found.fixes},
        "images_per_second": {name: round(samples.median, 1) for name, samples in found.rates.items()},
        "tried": tried
        and {"option": tried.option, "before": tried.before, "predicted": tried.predicted, "achieved": tried.achieved.median},
        "seconds": found.seconds,
    }


def build(raw: Path, work: Path) -> None:
    """The datasets: "large", so that no epoch ends while it is profiled and a disk never has read all of it; "little", more than
    memory is left for where that is the fault; "huge" of large images."""
    images = sorted(path for path in raw.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    for name, count, copies, options in (("once", 1000, COPIES, ()), ("huge", 600, 1, ("--crop-size", "1024"))):
        if (work / name / "dataset.json").exists():
            continue
        for path in images[:count]:
            folder = work / "raw" / name / "train" / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                (folder / f"{copy}-{path.name}").symlink_to(path.resolve())
        command = [sys.executable, "-m", "preprocess", "build", work / "raw" / name, work / name, *options]
        subprocess.run(command, cwd=ROOT, check=True)
    for name, times in TIMES.items():
        if not (work / name / "dataset.json").exists():
            shutil.rmtree(work / name, ignore_errors=True)
            stretch(work / "once", work / name, times)


@click.command()
@click.argument("raw", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="For which each is profiled, about.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)), help="Nothing is written then.")
@click.option("--work", type=click.Path(path_type=Path), help="Where datasets are built, and stay.")
@click.option("--suffer", "suffered", type=click.Choice(list(FAULTS)), hidden=True)
def main(raw: Path | None, rounds: int, seconds: float, only: tuple[str, ...], work: Path | None, suffered: str | None) -> None:
    """Make every fault, and see what the profiler names."""
    if suffered:
        print(json.dumps(summary(suffer(FAULTS[suffered], work, seconds))), flush=True)
        return
    with contextlib.ExitStack() as stack:
        work = (work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        if raw:
            build(raw, work)
        results: dict[str, list[dict]] = {name: [] for name in only or FAULTS}
        for number, name in itertools.product(range(rounds), results):
            result = judge(name, work, seconds)
            results[name].append(result)
            print(f"round {number}: {'right' if result['right'] else 'WRONG':<6}{name:<34}{result['named']:<20}", end="")
            print(f"{result.get('confidence', 0):5.0%}  {error_of(result)}  {result.get('seconds', 0):.0f} s", flush=True)
            if not result["right"]:
                print(json.dumps(result, indent=1), flush=True)
        outcomes = [result for rows in results.values() for result in rows]
        rights = sum(result["right"] for result in outcomes)
        errors = [abs(error) for error in map(prediction_error, outcomes) if error is not None]
        print(f"{rights} of {len(outcomes)} right")
        if errors:
            near = sum(error <= 0.1 for error in errors)
            print(f"predictions: {near} of {len(errors)} within 10 %, median {statistics.median(errors):.1%}")
        cost_us = overhead_us()
        print(f"train.py --profile: {cost_us:.1f} us a step, {cost_us / 1000:.2%} at 1,000 steps a second")
        if not only:
            result = {
                "seconds": seconds,
                "right": rights,
                "of": len(outcomes),
                "prediction_errors": errors,
                "overhead_us_a_step": cost_us,
                "faults": results,
            }
            save("profile_faults", result, "torch", "nvidia-dali-cuda130")


def overhead_us() -> float:
    """Microseconds of the processor that train.py --profile takes for a step: its marks, the loader's notes, the sampler."""

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


def prediction_error(result: dict) -> float | None:
    tried = result.get("tried")
    return tried["achieved"] / tried["predicted"] - 1 if tried else None


def error_of(result: dict) -> str:
    tried = result.get("tried")
    if not tried:
        return f"{'':<60}"
    rates = (tried[name] for name in ("before", "predicted", "achieved"))
    text = "{}: {:,.0f}, predicted {:,.0f}, achieved {:,.0f}".format(tried["option"][:24], *rates)
    return f"{text:<60}"


if __name__ == "__main__":
    main()
