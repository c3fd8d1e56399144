"""Runs every benchmark that this machine can run, one after the other, and draws the page of their results.

    python -m benchmarks.all [--raw RAW] [--peers PYTHON] [--quick] [--only NAME]...       # make bench
    python -m benchmarks.all --gpu [--seconds 570] [--data DATASET] [--cifar CIFAR]        # make gpu-bench

The images are up to 1,000 of RAW's training split, spread over its classes, in any form that build takes; without RAW drawn ones.
A script that fails or exceeds its limit is noted with the reason, and the next one runs. With --gpu the scripts share the time;
what one had measured before it was stopped is kept. Results go to benchmarks/results/ and docs/benchmarks.md; with --quick, which
checks that everything runs, to the work folder. `--gpu --device cpu --quick` rehearses the GPU's scripts.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import harness, page
from benchmarks.data import stretch
from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image

IMAGES = 1000
TIMES = {False: 96, True: 4}  # 1,000 records of 22 KB become 2 GB, which no cache holds by chance; with --quick, a few
GRACE_S = 5  # after its limit, until a script is killed


class Job(NamedTuple):
    """A script, its arguments, in which words in capitals stand for paths and values, and more arguments with --quick."""

    name: str
    arguments: str
    quick: str
    limit_s: int  # with --gpu, its share of the time
    needs_root: bool = False

    @property
    def script(self) -> str:
        return self.name.partition(" ")[0]


# The limits add up to three hours and three quarters.
JOBS = (
    Job("preprocess", "RAW --peers PEERS --rounds 3 --device cpu", "--rounds 1 --repeat 1", 1500),
    Job("scale", "--sizes 10000,100000", "--sizes 1000,2000", 300),
    Job("kills", "--kills 40", "--kills 4 --images 600", 600),
    Job("bitflips", "DATA", "--flips 20", 600),
    Job("loader", "DATA --peers PEERS --device cpu", "--rounds 1 --images 512", 1200),
    Job("loader_growth", "RAW --folder WORK", "--rounds 1", 900),
    Job("augment", "DATA", "--rounds 1", 300),
    Job("dataset", "DATA RAW", "--rounds 1", 300),
    Job("decoders", "DATA --raw RAW --peers PEERS", "--rounds 1 --images 64", 300),
    Job("cold", "DATA", "--rounds 1", 300),
    Job("cold slow", "DATA --rounds 3 --disk 5000,160", "--rounds 1", 300, needs_root=True),
    Job("shuffle", "", "--records 100000", 300),
    Job("growth", "RAW --folder WORK", "--sizes 500,1000 --stretch 10 --rounds 1", 1200),
    Job("train", "--device cpu", "--rounds 1 --batch-size 16 --only plain", 900),
    Job("ceilings", "DATA --device cpu", "--seconds 0.1 --batch-size 32", 120),
    Job("together", "DATA --device cpu --seconds 300", "--small", 400),
    Job("tune", "DATA --rounds 5 --device cpu", "--rounds 1 --tunings 1 --seconds 4", 1200),
    Job("profile_faults", "RAW --rounds 1 --device cpu", "--seconds 3 --only 'slow model'", 1200),
    Job("learning", "DRAWN --folder WORK --epochs 7 --device cpu", "--epochs 1", 900),
)
GPU_JOBS = (
    Job("ceilings", "LARGE --device DEVICE", "--seconds 0.1 --batch-size 32", 30),
    Job("tune", "LARGE --device DEVICE --batch-size 512 --rounds 1 --values 3 --tunings 1", "--values 1 --seconds 4", 150),
    Job("loader", "LARGE --device DEVICE --rounds 2 --images 20480", "--rounds 1 --images 128", 70),
    Job("train", "--device DEVICE --seconds SECONDS", "--rounds 1 --batch-size 8 --crop-size 64 --only owt", 100),
    Job("together", "LARGE --device DEVICE --seconds SECONDS", "--small", 60),
    Job("profile_faults", "--folder WORK --device DEVICE --rounds 1 --seconds 5", "--seconds 3 --only 'slow model'", 70),
    Job(
        "learning",
        "CIFAR --folder WORK --device DEVICE --size 72 --crop-size 64 --epochs 15 --seeds 3 --seconds SECONDS",
        "--epochs 1 --batch-size 16 --limit-batches 2 --seeds 1",
        110,
    ),
    Job("preprocess", "RAW --device DEVICE --rounds 1 --repeat 4", "--repeat 1", 20),
)


def lacks_root(job: Job) -> bool:
    return job.needs_root and not (os.geteuid() == 0 and os.access("/sys/fs/cgroup/blkio", os.W_OK))


def take_images(raw: Path, folder: Path) -> str:
    """Copies up to IMAGES of the training split of `raw` to FOLDER/CLASS; returns a description of them."""
    try:
        source = find_images(raw)
    except UserError:  # a folder of classes does not name its split
        source = find_images(raw, "train")
    split = source.statistics_split
    total = len(source.splits[split])
    if total == 0:
        raise click.ClickException(f"{raw}: holds images only in videos; give folders, archives, tables or Parquet files")
    count, taken = min(IMAGES, total), 0
    for number, image in enumerate(source.images(split, [at * total // count for at in range(count)])):
        with contextlib.suppress(BadImage):
            data = read_image(raw, image)
            place = folder / source.classes[image.label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:04d}-{Path(image.path).name}").write_bytes(data)
            taken += 1
    return f"{taken:,} of {total:,}, {len(list(folder.iterdir())):,} classes"


def prepare(needed: set[str], raw: Path | None, data: Path | None, work: Path, stretched: int) -> str:
    """Makes what is needed and missing of DRAWN, RAW, DATA (built of RAW) and LARGE (DATA, repeated); returns what they are."""
    told, about = work / "raw.txt", f"{raw.name}: " if raw else "drawn pictures: "
    large = "LARGE" in needed and not (work / "large" / "dataset.json").exists()
    images = "RAW" in needed or ((large or "DATA" in needed) and not data)
    if "DRAWN" in needed or (images and not raw):
        harness.call("preprocess", "sample", work / "drawn")
    if images and not (told.exists() and told.read_text().startswith(about)):
        for old in ("raw", "data", "large"):
            shutil.rmtree(work / old, ignore_errors=True)
        told.write_text(about + take_images(raw or work / "drawn", work / "raw"))
    if images and not data:
        harness.call("preprocess", "build", work / "raw", work / "data", "--split", "train")
    if large:
        shutil.rmtree(work / "large", ignore_errors=True)
        stretch(data or work / "data", work / "large", stretched)
    return (told.read_text() if told.exists() else "as found") + (f"; {data.name}" if data else "")


def run(job: Job, words: list[str], log: Path, results: Path, limit_s: float) -> str:
    """Runs a script to its end or its limit; returns why there is no result, or not all of it; else nothing."""
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": harness.ROOT}
    with open(log, "w") as output:
        command, results_at = harness.python(f"benchmarks.{job.script}", *words), {"BENCHMARK_RESULTS": str(results)}
        process = subprocess.Popen(command, stdout=output, env=os.environ | results_at, **options)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it took longer than {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return f"it ended with {process.returncode}: {lines[-1].strip()[:200] if lines else 'no output'}"
    return ""


def run_all(jobs: list[Job], quick: bool, values: dict[str, object], seconds: float | None, work: Path, results: Path) -> dict:
    """Runs the jobs; returns the seconds of each, and why some have no result. With `seconds` the limits are shares of them."""
    spent: dict[str, float] = {}
    not_run: dict[str, str] = {}
    end_s = time.monotonic() + (seconds or 0)
    for number, job in enumerate(jobs):
        limit_s = float(job.limit_s)
        if seconds:
            share = job.limit_s / sum(other.limit_s for other in jobs[number:])
            limit_s = max((end_s - time.monotonic() - GRACE_S) * share, 1.0)
        known = values | {"SECONDS": f"{limit_s:.0f}"}
        words = [str(known.get(word, word)) for word in shlex.split(f"{job.arguments} {job.quick if quick else ''}")]
        start_s = time.monotonic()
        why = "limiting a disk needs root and control groups of version 1" if lacks_root(job) else ""
        why = why or run(job, words, work / f"{job.name.replace(' ', '-')}.log", results, limit_s + GRACE_S)
        spent[job.name] = time.monotonic() - start_s
        print(f"{job.name}: {spent[job.name]:.0f} s{f', {why}' if why else ''}", flush=True)
        if why:
            not_run[job.name] = why
    return {"seconds": spent, "not_run": not_run}


@click.command()
@click.option("--gpu", is_flag=True, help="Run the GPU's scripts, within --seconds.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="Device of the GPU part.")
@harness.seconds_option(570.0, "Time for all scripts with --gpu.")
@click.option("--raw", type=harness.EXISTING, help="Raw images, in any form that build takes.")
@click.option("--data", type=harness.EXISTING, help="With --gpu: a dataset of 256-pixel images.")
@click.option("--cifar", type=harness.EXISTING, help="With --gpu: CIFAR-10 as JPEG files, a folder or a tar.")
@harness.PEERS
@click.option("--quick", is_flag=True, help="A little of each, to check that everything runs.")
@click.option(
    "--only", multiple=True, type=click.Choice(sorted({job.name for job in JOBS + GPU_JOBS})), help="Some scripts only."
)
@click.option("--work", type=click.Path(path_type=Path), default=harness.ROOT / "bench", help="Where data and logs go.")
def main(
    gpu: bool, device: str, seconds: float, raw: Path | None, data: Path | None, cifar: Path | None, peers: str, quick: bool,
    only: tuple[str, ...], work: Path,
) -> None:  # fmt: skip
    """Run the benchmarks, and draw the page."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running script ends too
    begin_s = time.monotonic()
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results, out = (work / "results", work / "benchmarks.md") if quick else (harness.RESULTS, page.PAGE)
    raw, data, cifar = (path and path.resolve() for path in (raw, data, cifar))
    jobs = [job for job in (GPU_JOBS if gpu else JOBS) if not only or job.name in only]
    needed = {word if word != "CIFAR" or cifar else "DRAWN" for job in jobs for word in job.arguments.split()}
    try:
        about = prepare(needed, raw, data, work, TIMES[quick])
    except UserError as error:
        raise click.ClickException(str(error)) from None
    values = {name.upper(): work / name for name in ("raw", "data", "large", "drawn")}
    values |= {"WORK": work, "CIFAR": cifar or work / "drawn", "PEERS": peers, "DEVICE": device}
    found = run_all(jobs, quick, values, seconds - (time.monotonic() - begin_s) if gpu else None, work, results)
    if not only:
        harness.save("bench-cuda" if gpu else "bench", {"raw": about, "quick": quick} | found, folder=results)
    loaded = page.load(results)
    page.write(page.render(loaded), out)
    print("\n".join(page.gpu_lines(loaded)) if gpu else "")
    print(f"{sum(found['seconds'].values()) / 60:.0f} min; results in {results}, page {out}")
    sys.exit(0 if gpu or all(lacks_root(job) for job in jobs if job.name in found["not_run"]) else 1)


if __name__ == "__main__":
    main()
