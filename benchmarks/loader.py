"""How fast is the loader beside its peers and beside decoding alone?

    python -m benchmarks.loader DATASET [--peers PYTHON] [--device cpu|cuda]     # results under "loader" or "loader-cuda"

DATASET holds 256x256 images (1,000 ImageNet JPEGs, say). Each row of loader_peers.py makes batches of random crops, flipped at
random: decoding alone, which was the limit before imagefeed had a decoder of its own, this loader with exact order and checksums,
and its peers on the same JPEGs. On a CPU each has two workers or threads; "cost" is an image's time on all processors, the part
of it in the thread that takes the batches, and the memory of the row's processes. On a GPU only the rows that decode there run,
with all cores and the settings that tune.py found best, beside other batch sizes and DALI's defaults. Rows whose package is
missing are left out.
"""

import functools
import json
import statistics
import sys
import tarfile
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.loader_peers import CROP_SIZE, OURS, OURS_CUDA, ROWS, WARM_UP, WORKERS
from benchmarks.peers import why_missing
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader

TAR_FILES = 16
BASES = ("float32", "uint8")  # their ratios to all other rows are computed
BATCH_SIZES = {"cpu": 128, "cuda": 512}
DALI_DEFAULTS = {"prefetch": 2, "hw_decoder_load": 0.65}


def unpack(dataset: Path, work: Path) -> None:
    """Writes the train split's JPEGs as WORK/jpegs/LABEL/ID.jpg, and to WORK/tars in the form that WebDataset reads."""
    manifest = Manifest.load(dataset)
    records = RecordReader(manifest, manifest.train_split)
    (work / "tars").mkdir()
    tars = [tarfile.open(work / "tars" / f"{number:03d}.tar", "w") for number in range(TAR_FILES)]
    for record_id, label in enumerate(records.labels.tolist()):
        path = work / "jpegs" / str(label) / f"{record_id:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(records.jpeg(record_id))
        path.with_suffix(".cls").write_text(str(label))
        for file in (path, path.with_suffix(".cls")):
            tars[record_id % TAR_FILES].add(file, file.name)
    for tar in tars:
        tar.close()


def settings_of(name: str, common: dict, tuned: dict) -> dict[str, object]:
    """The batch size and the decoding options of a row."""
    if common["device"] == "cpu":
        return common | {"num_threads": WORKERS}
    _, _, batch_size = name.partition(", batch ")
    common = common | {"batch_size": int(batch_size or common["batch_size"]), "num_threads": harness.cores()} | DALI_DEFAULTS
    return common if "defaults" in name else common | {"prefetch": 4} | tuned


@click.command()
@harness.DATASET
@harness.rounds_option(7)
@harness.PEERS
@harness.DEVICE
@click.option("--images", default=4096, show_default=True, help="Images per row and round.")
@click.option("--batch-size", type=click.IntRange(1), show_default="128, on a GPU 512")
@click.option("--only", multiple=True, help="Rows that begin so; else all.")
@click.option("--crop-size", type=click.IntRange(1), default=CROP_SIZE, show_default=True)
def main(
    dataset: Path,
    rounds: int,
    peers: str,
    device: str,
    images: int,
    batch_size: int | None,
    only: tuple[str, ...],
    crop_size: int,
) -> None:
    """Time the loader and its peers on DATASET."""
    from imagefeed.pipeline.arguments import choose_device

    device = choose_device(device)
    common = {"batch_size": batch_size or BATCH_SIZES[device.type], "crop_size": crop_size, "device": device.type}
    tuned = harness.tuned_settings(device)
    left_out, ways, taken = {}, {}, {}
    with harness.working_folder() as work, harness.Workers() as workers:
        if device.type == "cpu":
            unpack(dataset, work)
        for name in filter(lambda name: name.startswith(only or ""), ROWS if device.type == "cpu" else OURS_CUDA):
            options = settings_of(name, common, tuned)
            interpreter = sys.executable if name in OURS or name in OURS_CUDA else peers
            command = harness.python("benchmarks.loader_peers", name, dataset.resolve(), work, json.dumps(options))
            workers.start(name, [interpreter, *command[1:]])
            taken[name] = []
            ways[name] = functools.partial(rate, workers, name, max(1, images // options["batch_size"]), taken[name])
        told = workers.ready()
        for name, about in told.items():
            if "missing" in about:
                left_out[name] = why_missing(peers, about["missing"])
                print(f"{name} is left out: {left_out[name]}", flush=True)
                del ways[name]
        rates = harness.interleave(ways, rounds)
    result = common | {"images": images, "warm_up_batches": WARM_UP, "rounds": rounds}
    result |= {"workers": WORKERS} if device.type == "cpu" else {"settings": tuned}
    result |= {"peers": {package: version for name in rates for package, version in told[name]["versions"].items()}}
    result |= {"left_out": left_out, "how": {name: told[name]["how"] for name in rates}}
    by_cpu = {name: [one["images"] / one["cpu_s"] for one in taken[name][1:]] for name in rates}
    bases = [base for base in BASES if base in rates]
    ratios = {name: {f"{base} / this by CPU time": harness.ratio(by_cpu, base, name) for base in bases} for name in rates}
    result |= harness.compared(rates, BASES) | {"cost": {name: costs(taken[name][1:]) | ratios[name] for name in rates}}
    harness.save(harness.named("loader", device), result, "numpy", "torch", "nvidia-dali-cuda130")


def rate(workers: harness.Workers, name: str, steps: int, taken: list[dict]) -> float:
    """Images per second; appends the measurement to `taken`."""
    measured = workers.measure(name, steps)
    taken.append(measured)
    return measured["images"] / measured["seconds"]


def costs(taken: list[dict]) -> dict[str, float]:
    """Medians over the measurements."""
    found = {
        f"{name}_us_per_image": statistics.median(1e6 * one[f"{name}_s"] / one["images"] for one in taken)
        for name in ("cpu", "caller")
    }
    return found | {"memory_mb": statistics.median(one["memory_mb"] for one in taken)}


if __name__ == "__main__":
    main()
