"""Runs every benchmark that this machine can run, one after the other, and draws the page of their results: `make bench`.

    python -m benchmarks.all [--raw RAW] [--peers PYTHON] [--quick] [--only NAME]... [--work bench]

The images are up to 1,000 of RAW's training split, spread over its classes, whatever form RAW has; without RAW drawn ones, which
learning always takes. A script that fails or takes longer than its limit is noted with the reason, and the next one runs. Results
go to benchmarks/results/ and docs/benchmarks.md; with --quick, which is to see whether all of it runs, to WORK.
"""

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

from benchmarks import RESULTS, ROOT, save
from benchmarks.page import load, render, write
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import training_split
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image

IMAGES = 1000


class Job(NamedTuple):
    """A script and its arguments, of which RAW, DATA (built of it), DRAWN, DRAWN_DATA, PEERS and WORK stand for paths."""

    name: str
    arguments: str
    quick: str
    limit_s: int
    needs: str = ""  # "root", "cuda"

    @property
    def script(self) -> str:
        return self.name.partition(" ")[0]


# The limits add up to three hours and a quarter.
JOBS = (
    Job("preprocess", "RAW --peers PEERS --rounds 3", "RAW --peers PEERS --rounds 1 --repeat 1", 1500),
    Job("scale", "--sizes 10000,100000", "--sizes 1000,2000", 300),
    Job("kills", "--kills 40", "--kills 4 --images 600", 600),
    Job("bitflips", "DATA", "DATA --flips 20", 600),
    Job("loader", "DATA --peers PEERS", "DATA --peers PEERS --rounds 1 --images 512", 1200),
    Job("cold", "DATA", "DATA --rounds 1", 300),
    Job("cold slow", "DATA --rounds 3 --disk 5000,160", "DATA --rounds 1 --disk 5000,160", 300, "root"),
    Job("shuffle", "", "--records 100000", 300),
    Job("growth", "RAW --folder WORK", "RAW --folder WORK --sizes 500,1000 --stretch 10 --rounds 1", 1200),
    Job("train", "", "--rounds 1 --batch-size 16 --only plain", 900),
    Job("train cuda", "--device cuda", "--device cuda --rounds 1", 600, "cuda"),
    Job("tune", "DATA --rounds 5", "DATA --rounds 1 --tunings 1 --seconds 4", 1200),
    Job("gpu", "--raw RAW", "--raw RAW --seconds 120", 700, "cuda"),
    Job("profile_faults", "RAW --rounds 1", "RAW --rounds 1 --seconds 3 --only 'slow model'", 1200),
    Job(
        "learning",
        "DRAWN DRAWN_DATA --run-dir WORK/run --epochs 7 --lr-milestones 6",
        "DRAWN DRAWN_DATA --run-dir WORK/run --epochs 1 --lr-milestones 1",
        900,
    ),
)


def lacking(need: str) -> str:
    """Why this machine cannot run what needs that; empty where it can."""
    if need == "root" and not (os.geteuid() == 0 and os.access("/sys/fs/cgroup/blkio", os.W_OK)):
        return "slowing a disk down needs root and control groups of version 1"
    if need == "cuda":
        import torch

        return "" if torch.cuda.is_available() else "there is no CUDA device"
    return ""


def take_images(raw: Path, folder: Path) -> str:
    """Copies up to IMAGES of the training split of `raw` to FOLDER/CLASS; returns what they are, in words."""
    try:
        source = find_images(raw)
    except UserError:  # a folder of classes does not name its split
        source = find_images(raw, "train")
    split = training_split(list(source.splits))
    count = min(IMAGES, len(source.splits[split]))
    if count == 0:
        raise click.ClickException(f"{raw}: it holds no images but in videos; give folders, archives, tables or Parquet files")
    images = source.images(split, [at * len(source.splits[split]) // count for at in range(count)])
    taken = 0
    for number, image in enumerate(images):
        try:
            data = read_image(raw, image)
        except BadImage:
            continue
        place = folder / source.classes[image.label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04d}-{Path(image.path).name}").write_bytes(data)
        taken += 1
    return f"{taken:,} of {len(source.splits[split]):,}, {len(list(folder.iterdir())):,} classes"


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def prepare(raw: Path | None, work: Path) -> str:
    """Makes WORK/drawn, WORK/raw and a dataset of each, where they are not there yet; returns what the images are."""
    call("preprocess", "sample", work / "drawn")
    call("preprocess", "build", work / "drawn", work / "drawn-data")
    told = work / "raw.txt"
    about = f"{raw.name}: " if raw else "drawn pictures: "
    if not (told.exists() and told.read_text().startswith(about)):
        for old in (work / "raw", work / "data"):
            shutil.rmtree(old, ignore_errors=True)
        told.write_text(about + take_images(raw or work / "drawn", work / "raw"))
    call("preprocess", "build", work / "raw", work / "data", "--split", "train")
    return told.read_text()


def run(job: Job, arguments: list[str], log: Path, results: Path) -> str:
    """Runs a script to its end or its limit; returns the reason why there is no result, or nothing."""
    command = [sys.executable, "-m", f"benchmarks.{job.script}", *arguments]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"BENCHMARK_RESULTS": str(results)},
        )
        try:
            process.wait(job.limit_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"it took longer than {job.limit_s} s"
            raise
    if process.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return f"it ended with {process.returncode}: {lines[-1].strip()[:200] if lines else 'no output'}"
    return ""


@click.command()
@click.option("--raw", type=click.Path(path_type=Path, exists=True), help="Raw images, in any form that build takes.")
@click.option("--peers", default=sys.executable, help="Python with the peers, as peers.py makes it.")
@click.option("--quick", is_flag=True, help="A round of each, to see whether all runs.")
@click.option("--only", multiple=True, type=click.Choice([job.name for job in JOBS]), help="Of the scripts.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "bench", help="Where data and logs lie.")
def main(raw: Path | None, peers: str, quick: bool, only: tuple[str, ...], work: Path) -> None:
    """Run the benchmarks, and draw the page."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the script at work ends too
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results, page = (work / "results", work / "benchmarks.md") if quick else (RESULTS, ROOT / "docs" / "benchmarks.md")
    places = {"RAW": "raw", "DATA": "data", "DRAWN": "drawn", "DRAWN_DATA": "drawn-data", "WORK": "."}
    try:
        about = prepare(raw.resolve() if raw else None, work)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    spent: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for job in JOBS:
        if only and job.name not in only:
            continue
        why = lacking(job.needs)
        shutil.rmtree(work / "run", ignore_errors=True)  # a run that is over would not be run again
        if not why:
            words = shlex.split(job.quick if quick else job.arguments)
            arguments = [peers if word == "PEERS" else str(work / places[word]) if word in places else word for word in words]
            arguments = [word.replace("WORK/", f"{work}/") if word.startswith("WORK/") else word for word in arguments]
            print(f"{job.name} ...", end=" ", flush=True)
            start_s = time.monotonic()
            why = run(job, arguments, work / f"{job.name.replace(' ', '-')}.log", results)
            spent[job.name] = time.monotonic() - start_s
            print(f"{spent[job.name]:.0f} s", end=" ")
        if why:
            left_out[job.name] = why
        print(f"{job.name}: not run, {why}" if why else "", flush=True)
    if not only:
        save("bench", {"raw": about, "quick": quick, "seconds": spent, "not_run": left_out}, folder=results)
    write(render(load(results)), page)
    print(f"{sum(spent.values()) / 60:.0f} min; results in {results}, page {page}")
    if left_out:
        raise SystemExit(0 if all(lacking(job.needs) for job in JOBS if job.name in left_out) else 1)


if __name__ == "__main__":
    main()
