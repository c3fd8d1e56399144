"""How do time and memory grow with the number of records, from building to resuming?

    python -m benchmarks.growth RAW [--sizes 1000,10000,100000] [--stretch 10,100] [--rounds 3] [--folder DIR]

RAW is a folder of class folders; its images are repeated, as hard links, up to each size. `build` is timed once; its memory is
the largest resident size of the driver or a worker, and listing the copies as duplicates costs it some of its time. Then each of
STEPS runs in a process of its own: opening the loader, opening it and taking the first batch, the same from a saved position in
the middle of the first and of the tenth epoch, and a whole epoch. Memory is the most that the process holds for itself, without
mapped files: of those, shards and index, the system takes back what it needs.

--stretch repeats the shards of the largest dataset, again as hard links, with an index to match; on those everything but `build`
and an epoch is measured. Results go under "growth". The files in DIR take 25 KB per record.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import copy_images, repeat, stretch
from imagefeed.dataset.manifest import Manifest

RECORD_BYTES = 30_000  # stored at 256 pixels, with room to spare
BATCH_SIZE = 128


def open_loader(dataset: Path):
    from imagefeed.pipeline.loader import ImageLoader

    manifest = Manifest.load(dataset)
    return ImageLoader(manifest, manifest.train_split, BATCH_SIZE)


def opened(dataset: Path) -> Iterator[None]:
    yield
    with open_loader(dataset):
        yield


def resumed(dataset: Path, epochs: float) -> Iterator[None]:
    """Goes on after `epochs`, from the state of another loader."""
    with open_loader(dataset) as other:
        other.position = int(epochs * len(other))
        state = other.state_dict()
    yield
    with open_loader(dataset) as loader:
        loader.load_state_dict(state)
        next(iter(loader))
        yield


def whole_epoch(dataset: Path) -> Iterator[None]:
    yield
    with open_loader(dataset) as loader:
        for batch in loader:
            batch.images[:, 0, 0, 0].sum().item()
        yield


# Each stops twice: when everything is ready for the measurement, and when it is over, with the loader still open.
STEPS: dict[str, Callable[[Path], Iterator[None]]] = {
    "open": opened,
    "first batch": lambda dataset: resumed(dataset, 0),
    "resume in the middle": lambda dataset: resumed(dataset, 0.5),
    "resume in the tenth epoch": lambda dataset: resumed(dataset, 9.5),
    "an epoch": whole_epoch,
}


def memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def take_step(name: str, dataset: Path) -> dict[str, float]:
    """Seconds of a step in this process, its peak memory, and what the process held before."""
    import imagefeed.pipeline.loader  # noqa: F401 - importing it is no part of a step

    step = STEPS[name](dataset)
    next(step)
    before_mb = memory_mb("VmRSS") - memory_mb("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    start_s = time.perf_counter()
    next(step)
    seconds = time.perf_counter() - start_s
    peak_mb = memory_mb("VmHWM") - memory_mb("RssFile")
    step.close()
    return {"seconds": seconds, "peak_mb": peak_mb, "before_mb": before_mb}


def take(step: str, dataset: Path, rounds: int) -> dict[str, list[float]]:
    found = [json.loads(harness.call("benchmarks.growth", dataset, "--step", step)) for _ in range(rounds)]
    return {name: [row[name] for row in found] for name in found[0]}


def measured(records: int, stretched: bool, steps: dict[str, dict[str, list[float]]]) -> dict:
    """A row of the results, which it prints."""
    for step, values in steps.items():
        medians = ", ".join(f"{name} {statistics.median(rounds):,.3f}" for name, rounds in values.items())
        print(f"{records:,} records, {step}: {medians}", flush=True)
    return {"records": records, "stretched": stretched, "steps": steps}


def numbers(_context, _parameter, value: str) -> list[int]:
    return sorted(int(number) for number in value.split(",") if number)


@click.command()
@harness.RAW
@click.option("--sizes", default="1000,10000,100000", show_default=True, callback=numbers, help="Records.")
@click.option("--stretch", "stretches", default="10,100", show_default=True, callback=numbers, help="Times the largest size.")
@harness.rounds_option(3)
@harness.FOLDER
@click.option("--step", type=click.Choice(list(STEPS)), hidden=True)
def main(raw: Path, sizes: list[int], stretches: list[int], rounds: int, folder: Path | None, step: str | None) -> None:
    """Measure each step on datasets of several sizes, made of the images of RAW."""
    if step:
        print(json.dumps(take_step(step, raw)))
        return
    rows = []
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        work = Path(place)
        needed = sizes[-1] * RECORD_BYTES
        if shutil.disk_usage(work).free < needed:
            raise click.ClickException(f"{work}: needs {needed / 1e9:.1f} GB; give another --folder, or smaller --sizes")
        images = copy_images(raw, work / "images")
        for records in sizes:
            for old in ("raw", "out"):
                shutil.rmtree(work / old, ignore_errors=True)
            repeat(images, work / "raw", records)
            used = harness.usage(harness.python("preprocess", "build", work / "raw", work / "out", "--split", "train"))
            steps = {"build": {"seconds": [used.wall_s], "peak_mb": [used.peak_mb]}}
            rows.append(measured(records, False, steps | {name: take(name, work / "out", rounds) for name in STEPS}))
        for times in stretches:
            stretch(work / "out", work / "stretched", times, linked=True)
            steps = {name: take(name, work / "stretched", rounds) for name in STEPS if name != "an epoch"}
            rows.append(measured(sizes[-1] * times, True, steps))
            shutil.rmtree(work / "stretched")
    result = {"images": len(images), "rounds": rounds, "batch_size": BATCH_SIZE, "rows": rows}
    harness.save("growth", result, "numpy", "torch", "nvidia-dali-cuda130")


if __name__ == "__main__":
    main()
