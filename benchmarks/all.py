"""Runs every benchmark that this machine can run, one after the other, and draws the page of their results.

    python -m benchmarks.all [--raw RAW] [--peers PYTHON] [--quick] [--only NAME]...       # make bench

The images are up to 1,000 of RAW's training split, spread over its classes, in any form that build takes; without RAW drawn ones.
A script that fails or exceeds its limit is noted with the reason, and the next one runs; what one had measured before it was
stopped is kept. Results go to benchmarks/results/ and docs/benchmarks.md; with --quick, which checks that everything runs, to the
work folder. On a GPU, see gpu_first.py.
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
from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image

IMAGES = 1000
GRACE_S = 5  # after its limit, until a script is killed


class Job(NamedTuple):
    """A script, its arguments, in which words in capitals stand for paths and values, and more arguments with --quick."""

    name: str
    arguments: str
    quick: str
    limit_s: int
    needs_root: bool = False

    @property
    def script(self) -> str:
        return self.name.partition(" ")[0]


# The limits add up to four hours.
JOBS = (
    Job("preprocess", "RAW --peers PEERS --rounds 3 --device cpu", "--rounds 1 --repeat 1", 1500),
    Job("upload", "RAW --rounds 3", "--rounds 1 --images 200", 900),
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
    Job("remote", "DATA --peers PEERS --rounds 3 --folder WORK", "--rounds 1 --records 1000 --only loader", 1200),
    Job("shuffle", "", "--records 100000", 300),
    Job("growth", "RAW --folder WORK", "--sizes 500,1000 --stretch 10 --rounds 1", 1200),
    Job("train", "--device cpu", "--rounds 1 --batch-size 16 --only plain", 900),
    Job("ceilings", "DATA --device cpu", "--seconds 0.1 --batch-size 32", 120),
    Job("together", "DATA --device cpu --seconds 300", "--small", 400),
    Job("tune", "DATA --rounds 5 --device cpu", "--rounds 1 --tunings 1 --seconds 4", 1200),
    Job("profile_faults", "RAW --rounds 1 --device cpu", "--seconds 3 --only 'slow model'", 1200),
    Job("learning", "DRAWN --folder WORK --epochs 7 --device cpu", "--epochs 1", 900),
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


def prepare(needed: set[str], raw: Path | None, work: Path) -> str:
    """Makes what is needed and missing of DRAWN, RAW, and DATA (built of RAW); returns what they are."""
    told, about = work / "raw.txt", f"{raw.name}: " if raw else "drawn pictures: "
    images = bool({"RAW", "DATA"} & needed)
    if "DRAWN" in needed or (images and not raw):
        harness.call("preprocess", "sample", work / "drawn")
    if images and not (told.exists() and told.read_text().startswith(about)):
        for old in ("raw", "data"):
            shutil.rmtree(work / old, ignore_errors=True)
        told.write_text(about + take_images(raw or work / "drawn", work / "raw"))
    if images:
        harness.call("preprocess", "build", work / "raw", work / "data", "--split", "train")
    return told.read_text() if told.exists() else "none"


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


def run_all(jobs: list[Job], quick: bool, values: dict[str, object], work: Path, results: Path) -> dict:
    """Runs the jobs; returns the seconds of each, and why some have no result."""
    spent: dict[str, float] = {}
    not_run: dict[str, str] = {}
    for job in jobs:
        words = [str(values.get(word, word)) for word in shlex.split(f"{job.arguments} {job.quick if quick else ''}")]
        start_s = time.monotonic()
        why = "limiting a disk needs root and control groups of version 1" if lacks_root(job) else ""
        why = why or run(job, words, work / f"{job.name.replace(' ', '-')}.log", results, job.limit_s + GRACE_S)
        spent[job.name] = time.monotonic() - start_s
        print(f"{job.name}: {spent[job.name]:.0f} s{f', {why}' if why else ''}", flush=True)
        if why:
            not_run[job.name] = why
    return {"seconds": spent, "not_run": not_run}


@click.command()
@click.option("--raw", type=harness.EXISTING, help="Raw images, in any form that build takes.")
@harness.PEERS
@click.option("--quick", is_flag=True, help="A little of each, to check that everything runs.")
@click.option("--only", multiple=True, type=click.Choice(sorted(job.name for job in JOBS)), help="Some scripts only.")
@click.option("--work", type=click.Path(path_type=Path), default=harness.ROOT / "bench", help="Where data and logs go.")
def main(raw: Path | None, peers: str, quick: bool, only: tuple[str, ...], work: Path) -> None:
    """Run the benchmarks, and draw the page."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running script ends too
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results, out = (work / "results", work / "benchmarks.md") if quick else (harness.RESULTS, page.PAGE)
    raw = raw and raw.resolve()
    jobs = [job for job in JOBS if not only or job.name in only]
    try:
        about = prepare({word for job in jobs for word in job.arguments.split()}, raw, work)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    values = {name.upper(): work / name for name in ("raw", "data", "drawn")} | {"WORK": work, "PEERS": peers}
    found = run_all(jobs, quick, values, work, results)
    if not only:
        harness.save("bench", {"raw": about, "quick": quick} | found, folder=results)
    page.write(page.render(page.load(results)), out)
    print(f"{sum(found['seconds'].values()) / 60:.0f} min; results in {results}, page {out}")
    sys.exit(0 if all(lacks_root(job) for job in jobs if job.name in found["not_run"]) else 1)


if __name__ == "__main__":
    main()
