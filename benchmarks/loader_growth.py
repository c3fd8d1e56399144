"""How does the loader's cost grow with cores, batch size and image size?

    python -m benchmarks.loader_growth RAW [--rounds 3] [--folder DIR]     # results under "loader_growth"

RAW is a folder of class folders of photos, built for each of SIZES and repeated to fill the largest batches; crops have seven
eighths of a record's side. Each row is "float32" of loader_peers.py and, in turns with it, DALI decoding alone; cores are taken
away by their affinity. The rates of more cores than there are come by arithmetic: an image's processor time, shared by all cores,
but not less than the part of it that one thread does for all images. Memory bandwidth is left aside.
"""

import functools
import json
import os
import statistics
import sys
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import stretch
from benchmarks.loader import costs, rate
from imagefeed.dataset.manifest import Manifest

SIZES = (128, 192, 256, 384, 512)  # pixels
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
COMPUTED_CORES = (16, 64)
USUAL = {"pixels": 256, "batch_size": 128}
IMAGES = 4096  # in a measurement of images of the usual size
MOST_BYTES = 4e9  # of the crops of a measurement


def cases(cores: int) -> list[dict[str, int]]:
    """One of cores, batch size and pixels changed at a time."""
    found = [USUAL | {"cores": count} for count in range(1, cores + 1)]
    found += [USUAL | {"cores": cores, "batch_size": size} for size in BATCH_SIZES]
    found += [USUAL | {"cores": cores, "pixels": size} for size in SIZES]
    return list({tuple(sorted(case.items())): case for case in found}.values())


def measure(case: dict[str, int], dataset: Path, work: Path, rounds: int) -> dict[str, object]:
    crop_size, cores = case["pixels"] * 7 // 8, case["cores"]
    options = {"batch_size": case["batch_size"], "crop_size": crop_size, "device": "cpu", "num_threads": cores}
    steps = max(2, min(IMAGES, int(MOST_BYTES / (12 * crop_size**2))) // case["batch_size"])
    taken: dict[str, list[dict]] = {"float32": [], "decode only": []}
    usable = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    with harness.Workers() as workers:
        for name in taken:
            words = harness.python("benchmarks.loader_peers", name, dataset, work, json.dumps(options))
            workers.start(name, ["taskset", "--cpu-list", usable, sys.executable, *words[1:]])
        workers.ready()
        ways = {name: functools.partial(rate, workers, name, steps, taken[name]) for name in taken}
        rates = harness.interleave(ways, rounds)
    by_cpu = {name: [one["images"] / one["cpu_s"] for one in rounds[1:]] for name, rounds in taken.items()}
    found = {"images_per_second": statistics.median(rates["float32"])}
    found |= {"of_decode_only": harness.ratio(rates, "float32", "decode only")}
    found |= {"of_decode_only_by_cpu_time": harness.ratio(by_cpu, "float32", "decode only")} | costs(taken["float32"][1:])
    return case | found | {"cpu_ns_per_pixel_of_the_crop": 1e3 * found["cpu_us_per_image"] / crop_size**2}


def computed(row: dict) -> list[dict[str, object]]:
    """The rates of more cores."""
    return [
        {"cores": cores, "images_per_second": 1e6 / max(row["cpu_us_per_image"] / cores, row["caller_us_per_image"])}
        for cores in COMPUTED_CORES
    ]


@click.command()
@harness.RAW
@harness.rounds_option(3)
@harness.FOLDER
def main(raw: Path, rounds: int, folder: Path | None) -> None:
    """Measure the loader on records of RAW of several sizes."""
    notes = harness.Notes("loader_growth", "numpy", "torch", "nvidia-dali-cuda130")
    rows: list[dict] = []
    with harness.working_folder(folder) as work:
        for case in cases(harness.cores()):
            once, dataset = (work / f"{name}-{case['pixels']}" for name in ("built", "repeated"))
            if not dataset.exists():
                harness.call("preprocess", "build", raw, once, "--size", case["pixels"], "--split", "train")
                records = Manifest.load(once).split("train").records
                stretch(once, dataset, -(-2 * BATCH_SIZES[-1] // records), linked=True)
            rows.append(measure(case, dataset, work, rounds))
            notes["rows"] = rows
    notes["by arithmetic"] = computed(next(row for row in rows if row["cores"] == harness.cores()))


if __name__ == "__main__":
    main()
