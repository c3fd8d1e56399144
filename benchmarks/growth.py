"""How do time and memory grow with the number of records, from building to resuming?

    python -m benchmarks.growth RAW [--sizes 1000,10000,100000] [--stretch 10,100] [--rounds 3] [--folder DIR]

RAW is a folder of class folders; its images are repeated, as hard links, up to each size. `build` is timed once, of which listing
the copies as duplicates is a part; its memory is that of the driver or a worker. Each of STEPS runs in a process of its own; its
memory is the most that the process holds for itself, without mapped files: of those the system takes back what it needs.
--stretch repeats the shards of the largest dataset, as hard links too, without `build` and an epoch. Results go under "growth".
The files in DIR take 25 KB per record.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import copy_images, repeat, stretch
from imagefeed.dataset.manifest import Manifest

RECORD_BYTES = 30_000  # stored at 256 pixels, with room to spare
BATCH_SIZE = 128
# Name -> epochs after which the step resumes, and batches that it takes; None: without resuming, or all batches of an epoch.
STEPS: dict[str, tuple[float | None, int | None]] = {
    "open": (None, 0),
    "first batch": (0, 1),
    "resume in the middle": (0.5, 1),
    "resume in the tenth epoch": (9.5, 1),
    "an epoch": (None, None),
}


def stages(dataset: Path, epochs: float | None, batches: int | None) -> Iterator[None]:
    """A step that stops twice: when everything is ready for the measurement, and when it is over, with the loader still open."""
    from imagefeed.pipeline.loader import ImageLoader

    def open_loader() -> ImageLoader:
        manifest = Manifest.load(dataset)
        return ImageLoader(manifest, manifest.train_split, BATCH_SIZE)

    if epochs is not None:
        with open_loader() as other:
            other.position = int(epochs * len(other))
            state = other.state_dict()
    yield
    with open_loader() as loader:
        if epochs is not None:
            loader.load_state_dict(state)
        if batches != 0:
            for number, batch in enumerate(loader, 1):
                batch.images[:, 0, 0, 0].sum().item()
                if number == batches:
                    break
        yield


def memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def take_step(name: str, dataset: Path) -> dict[str, float]:
    """Seconds of a step in this process, its peak memory, and what the process held before."""
    step = stages(dataset, *STEPS[name])
    next(step)
    before_mb = memory_mb("VmRSS") - memory_mb("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    start_s = time.perf_counter()
    next(step)
    seconds = time.perf_counter() - start_s
    peak_mb = memory_mb("VmHWM") - memory_mb("RssFile")
    step.close()
    return {"seconds": seconds, "peak_mb": peak_mb, "before_mb": before_mb}


def take_steps(dataset: Path, names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    steps = {}
    for name in names:
        found = [json.loads(harness.call("benchmarks.growth", dataset, "--step", name)) for _ in range(rounds)]
        steps[name] = {figure: [row[figure] for row in found] for figure in found[0]}
        medians = ", ".join(f"{figure} {statistics.median(values):,.3f}" for figure, values in steps[name].items())
        print(f"{dataset.name}, {name}: {medians}", flush=True)
    return steps


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
        work, needed = Path(place), sizes[-1] * RECORD_BYTES
        if shutil.disk_usage(work).free < needed:
            raise click.ClickException(f"{work}: needs {needed / 1e9:.1f} GB; give another --folder, or smaller --sizes")
        images = copy_images(raw, work / "images")
        for records in sizes:
            tree, out = work / f"raw-{records}", work / str(records)
            repeat(images, tree, records)
            used = harness.usage(harness.python("preprocess", "build", tree, out, "--split", "train"))
            steps = {"build": {"seconds": [used.wall_s], "peak_mb": [used.peak_mb]}} | take_steps(out, list(STEPS), rounds)
            rows.append({"records": records, "stretched": False, "steps": steps})
            shutil.rmtree(tree)
        for times in stretches:
            larger = work / str(sizes[-1] * times)
            stretch(out, larger, times, linked=True)
            steps = take_steps(larger, [name for name in STEPS if name != "an epoch"], rounds)
            rows.append({"records": sizes[-1] * times, "stretched": True, "steps": steps})
            shutil.rmtree(larger)
    result = {"images": len(images), "rounds": rounds, "batch_size": BATCH_SIZE, "rows": rows}
    harness.save("growth", result, "numpy", "torch", "nvidia-dali-cuda130")


if __name__ == "__main__":
    main()
