"""What does a build to a URL, or from tars at a URL, cost beside one on a disk?

    python -m benchmarks.upload RAW [--images 4000] [--rounds 3]     # results under "upload"

RAW is a folder of class folders, whose images are repeated. The store is the tests' server, in a process of its own on the same
cores, which adds 30 ms to each request and whose link carries 200 MB/s. Each row is a whole command: list, pack and send.
"""

import json
import os
import shutil
import statistics
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import copy_images, repeat
from benchmarks.preprocess import put_commented

LATENCY_S, RATE = 0.03, 200e6
TAR_IMAGES = 500
# What is packed, and whether it is sent.
ROWS = {
    "build": ("raw", False),
    "to a URL": ("raw", True),
    "from tars": ("tars", False),
    "from tars at a URL": ("tars at URL", False),
}


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """A server of buckets in `folder`; yields its address."""
    command = [*harness.python("tests.dataset.store_server", folder), "--latency", str(LATENCY_S), "--rate", str(RATE)]
    process = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def write_tars(images: list[Path], folder: Path) -> None:
    """As CLASS/IMAGE, in the order of the names."""
    folder.mkdir(parents=True)
    for number in range(0, len(images), TAR_IMAGES):
        with tarfile.open(folder / f"train-{number // TAR_IMAGES:06d}.tar", "w") as tar:
            for path in images[number : number + TAR_IMAGES]:
                tar.add(path, f"{path.parent.name}/{path.name}")


@click.command()
@harness.RAW
@click.option("--images", default=4000, show_default=True, help="Images to pack, those of RAW repeated.")
@harness.rounds_option(3)
@harness.FOLDER
def main(raw: Path, images: int, rounds: int, folder: Path | None) -> None:
    """Build images of RAW here and there, in turns."""
    with harness.working_folder(folder) as work:
        repeat(copy_images(raw, work / "few"), work / "raw" / "train", images, put_commented)
        paths = sorted((work / "raw" / "train").glob("*/*"))
        write_tars(paths, work / "store" / "bucket" / "tars")
        size = sum(path.stat().st_size for path in paths)
        with store(work / "store") as address:
            environment = {
                "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            }  # fmt: skip
            places = {"raw": work / "raw", "tars": work / "store" / "bucket" / "tars", "tars at URL": "s3://bucket/tars"}
            cpu_s: dict[str, list[float]] = {name: [] for name in ROWS}

            def rate(name: str) -> float:
                source, remote = ROWS[name]
                out = work / "store" / "bucket" / "out" if remote else work / "out"
                given = ["s3://bucket/out", "--work-dir", work / "work"] if remote else [out]
                command = harness.python("preprocess", "build", places[source], *given)
                used = harness.usage(command, env=os.environ | environment)
                cpu_s[name].append(used.cpu_s)
                shutil.rmtree(out)
                return images / used.wall_s

            rates = harness.interleave({name: lambda name=name: rate(name) for name in ROWS}, rounds)
            counts = json.load(urllib.request.urlopen(f"{address}/.counts"))
        result = harness.compared(rates, ("build", "from tars"))
    about = {"images": images, "raw_bytes": size, "latency_s": LATENCY_S, "bytes_per_second": RATE, "rounds": rounds}
    about["cpu_seconds"] = {name: statistics.median(found[1:]) for name, found in cpu_s.items()}
    about["requests"] = {name: counts.get(name, 0) for name in ("GET", "PUT", "POST", "bytes")}
    print(about)
    harness.save("upload", {**about, **result}, "obstore", "numpy")


if __name__ == "__main__":
    main()
