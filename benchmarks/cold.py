"""What does an epoch cost when its bytes are not in memory, and what does reading ahead bring?

    python -m benchmarks.cold DATASET [--rounds 5] [--disk IOPS,MB/s]     # results under "cold[-slow]"

The files of DATASET are put out of the page cache (posix_fadvise DONTNEED) before each epoch that is to be cold. An epoch is
walked by the loader, images decoded; and by reading the records alone. Rows interleaved, medians, ratios within a round. --disk
slows the disk down to so many reads and megabytes a second, by the kernel's own throttle (control groups, version 1; as root).
"""

import gc
import os
import statistics
import time
from pathlib import Path

import click

from benchmarks import save
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


def evict(folder: Path) -> None:
    gc.collect()  # pages that are still mapped stay
    for path in folder.glob("*.tfrecord"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def slow_down(folder: Path, reads: int, megabytes: int) -> None:
    """Limits what this process reads from the disk that holds `folder`, until it ends."""
    group = Path("/sys/fs/cgroup/blkio/imagefeed-cold")
    group.mkdir(exist_ok=True)
    device = folder.stat().st_dev
    for limit, value in (("iops", reads), ("bps", megabytes * 10**6)):
        number = f"{os.major(device)}:{os.minor(device)} {value}"
        (group / f"blkio.throttle.read_{limit}_device").write_text(number)
    (group / "cgroup.procs").write_text(str(os.getpid()))


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--disk", help="Reads and megabytes a second, as 5000,160.")
def main(dataset: Path, rounds: int, batch_size: int, disk: str | None) -> None:
    """Walk epochs of DATASET, cold and warm."""
    manifest = Manifest.load(dataset)
    if disk:
        slow_down(dataset, *map(int, disk.split(",")))
    rates: dict[str, dict[str, list[float]]] = {way: {name: [] for name in ROWS} for way in ("decoded", "read")}
    for number in range(rounds + 1):
        for name, options in ROWS.items():
            for way, rows in rates.items():
                if name != "warm":
                    evict(dataset)
                with ImageLoader(manifest, manifest.train_split, batch_size, **options) as loader:
                    start_s = time.perf_counter()
                    if way == "decoded":
                        images = sum(len(batch.ids) for batch in loader)
                    else:
                        images = read(loader)
                    rate = images / (time.perf_counter() - start_s)
                if number:
                    rows[name].append(rate)
    result: dict[str, object] = {
        "disk": f"{disk} reads and MB/s" if disk else "as it is",
        "records": manifest.split(manifest.train_split).records,
        "rounds": rounds,
    }
    for way, rows in rates.items():
        result[way] = {
            name: {
                "images_per_second": statistics.median(values),
                "of_warm": statistics.median(a / b for a, b in zip(values, rows["warm"], strict=True)),
            }
            for name, values in rows.items()
        }
        for name, row in result[way].items():
            print(f"{way:<9}{name:<30}{row['images_per_second']:>10,.0f} images/s{row['of_warm']:>7.2f}")
    save("cold-slow" if disk else "cold", result, "nvidia-dali-cuda130", "numpy")


def read(loader: ImageLoader) -> int:
    """Reads an epoch's records as the loader does, checksums included, and decodes nothing."""
    source = loader.open_source()
    images = 0
    for _ in range(len(loader)):
        images += len(source.next().ids)
    source.close()
    return images


if __name__ == "__main__":
    main()
