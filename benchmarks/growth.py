"""How do time and memory grow with the number of records, from building to resuming?

    python -m benchmarks.growth RAW [--sizes 1000,10000,100000] [--stretch 10,100] [--rounds 3] [--folder DIR]

RAW is a folder of class folders; its images are repeated, as hard links, up to each size. `build` is timed once, its memory is
the largest resident size of the driver or a worker; that the copies are the same bytes, which it finds and lists, costs it some
of its time. Then each step of growth_steps.py, in a process of its own, over and over: opening the loader, opening it and taking
the first batch, the same from a saved position in the middle of the first and of the tenth epoch, an epoch with its opening.
Memory is what the process holds for itself at most, mapped files left out.

--stretch repeats the shards of the largest dataset so many times, again as hard links, with an index of so many records: all
but `build` and an epoch is measured on those too. Results go under "growth". Files lie in DIR while it runs: 25 KB a record.
"""

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

from benchmarks import ROOT, save
from benchmarks.growth_steps import BATCH_SIZE, STEPS
from benchmarks.stretched import stretch

RECORD_BYTES = 30_000  # stored at 256 pixels, with room to spare


def repeat(images: list[Path], folder: Path, records: int) -> None:
    """So many hard links to `images`, in their classes."""
    for number in range(records):
        image = images[number % len(images)]
        place = folder / image.parent.name
        place.mkdir(parents=True, exist_ok=True)
        os.link(image, place / f"{number // len(images)}-{image.name}")


def build(raw: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "preprocess", "build", raw, out, "--split", "train"]
    start_s = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"build ended with {process.returncode}")
    return {"seconds": [time.monotonic() - start_s], "peak_mb": [usage.ru_maxrss / 1e3]}


def take(step: str, dataset: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds and megabytes of each round of a step, and the megabytes that its process held before it."""
    command = [sys.executable, "-m", "benchmarks.growth_steps", step, str(dataset)]
    found = [json.loads(subprocess.check_output(command, cwd=ROOT)) for _ in range(rounds)]
    return {name: [row[name] for row in found] for name in found[0]}


def measured(records: int, stretched: bool, steps: dict[str, dict[str, list[float]]]) -> dict:
    """A row of the results, which it prints."""
    for step, values in steps.items():
        medians = ", ".join(f"{name} {statistics.median(rounds):,.3f}" for name, rounds in values.items())
        print(f"{records:,} records, {step}: {medians}", flush=True)
    return {"records": records, "stretched": stretched, "steps": steps}


def copy_images(raw: Path, folder: Path) -> list[Path]:
    """Links do not reach over file systems."""
    images = []
    for path in sorted(path for path in raw.resolve().glob("*/*") if path.is_file()):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        images.append(Path(shutil.copy(path, folder / path.parent.name)))
    return images


def numbers(_context, _parameter, value: str) -> list[int]:
    return sorted(int(number) for number in value.split(",") if number)


@click.command()
@click.argument("raw", type=click.Path(path_type=Path, exists=True))
@click.option("--sizes", default="1000,10000,100000", show_default=True, callback=numbers, help="Records.")
@click.option("--stretch", "stretches", default="10,100", show_default=True, callback=numbers, help="Of the largest size.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files lie meanwhile.")
def main(raw: Path, sizes: list[int], stretches: list[int], rounds: int, folder: Path | None) -> None:
    """Measure each step on datasets of several sizes, made of the images of RAW."""
    rows = []
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Path(place)
        needed = sizes[-1] * RECORD_BYTES
        if shutil.disk_usage(work).free < needed:
            raise click.ClickException(
                f"{place}: {needed / 1e9:.1f} GB are needed there; give another --folder, or smaller --sizes"
            )
        images = copy_images(raw, work / "images")
        for records in sizes:
            for old in (work / "raw", work / "out"):
                shutil.rmtree(old, ignore_errors=True)
            repeat(images, work / "raw", records)
            steps = {"build": build(work / "raw", work / "out")}
            rows.append(measured(records, False, steps | {step: take(step, work / "out", rounds) for step in STEPS}))
        for times in stretches:
            stretch(work / "out", work / "stretched", times, linked=True)
            steps = {step: take(step, work / "stretched", rounds) for step in STEPS if step != "an epoch"}
            rows.append(measured(sizes[-1] * times, True, steps))
            shutil.rmtree(work / "stretched")
    result = {"images": len(images), "rounds": rounds, "batch_size": BATCH_SIZE, "rows": rows}
    save("growth", result, "numpy", "torch", "nvidia-dali-cuda130")


if __name__ == "__main__":
    main()
