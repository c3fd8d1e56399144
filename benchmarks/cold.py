"""What does an epoch cost when its bytes are not in memory, and what does reading ahead gain?

    python -m benchmarks.cold DATASET [--rounds 5] [--disk READS,MB]     # results under "cold" or "cold-slow"

DATASET is evicted from the page cache before each cold epoch. The loader walks an epoch and decodes it; then it only reads the
records. --disk limits the disk's reads and megabytes per second by the kernel's throttle (control groups, version 1; as root).
"""

import functools
import statistics
import time
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import evict, slow_down
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader

ROWS = {
    "warm": {},
    "cold": {},
    "cold, without reading ahead": {"read_ahead": 0},
    "cold, 32 steps ahead": {"read_ahead": 32},
    "cold, blocks": {"shuffle": "blocks"},
    "cold, stored order": {"shuffle": "none"},
}


def rate(manifest: Manifest, row: str, what: str, batch_size: int) -> float:
    """Images per second over an epoch, decoded, or only read as the loader does, checksums included."""
    if row != "warm":
        evict(manifest.root)
    with ImageLoader(manifest, manifest.train_split, batch_size, **ROWS[row]) as loader:
        start_s, images = time.perf_counter(), 0
        if what == "decoded":
            images = sum(len(batch.ids) for batch in loader)
        else:
            source = loader.open_source()
            for _ in range(len(loader)):
                images += len(source.next().ids)
            source.close()
        return images / (time.perf_counter() - start_s)


@click.command()
@harness.DATASET
@harness.rounds_option(5)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--disk", metavar="READS,MB", help="Reads and megabytes per second, such as 5000,160.")
def main(dataset: Path, rounds: int, batch_size: int, disk: str | None) -> None:
    """Walk epochs of DATASET, cold and warm."""
    manifest = Manifest.load(dataset)
    if disk:
        slow_down(dataset, *map(int, disk.split(",")))
    records = manifest.split(manifest.train_split).records
    result = {"disk": f"{disk} reads and MB/s" if disk else "as it is", "records": records, "rounds": rounds}
    pairs = [(row, what) for row in ROWS for what in ("decoded", "read")]
    rates = harness.interleave({pair: functools.partial(rate, manifest, *pair, batch_size) for pair in pairs}, rounds)
    for row, what in pairs:
        shown = {"images_per_second": statistics.median(rates[row, what])}
        shown["of_warm"] = harness.ratio(rates, (row, what), ("warm", what))
        result.setdefault(what, {})[row] = shown
        print(f"{what}, {row}: {shown}")
    harness.save("cold-slow" if disk else "cold", result, "nvidia-dali-cuda130", "numpy")


if __name__ == "__main__":
    main()
