"""How do time and memory of `build` grow with the number of images?

    python -m benchmarks.scale [--sizes 10000,100000,1280000]    # results under "scale"

The images are small files in 1,000 classes, no two the same; they are built to 32 pixels, so that it is the bookkeeping that
is measured. Listing and planning are measured alone too. Memory is the largest resident size of the driver or a worker.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

from benchmarks import ROOT, save

CLASSES = 1000
LISTING = """
import resource, sys, time
from pathlib import Path
from imagefeed.preprocess.packing import plan_shards, shard_task
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.sources.detect import find_images
start = time.perf_counter()
source = find_images(Path(sys.argv[1]))
listed = time.perf_counter()
source.fingerprint()
shard_task(source, Path("out"), ImageOptions(), 0, plan_shards(source)[0])
planned = time.perf_counter()
print(listed - start, planned - listed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def make_tree(root: Path, images: int) -> None:
    """`images` small JPEGs in 1,000 classes: 100 pictures, told apart by a comment."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        pictures.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90))
    for label in range(CLASSES):
        folder = root / "raw" / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(images // CLASSES):
            picture = pictures[number % 100]
            comment = b"\xff\xfe\x00\x0a" + f"{label:04d}{number:04d}".encode()
            (folder / f"n{label:08d}_{number}.JPEG").write_bytes(picture[:2] + comment + picture[2:])


@click.command()
@click.option("--sizes", default="10000,100000,1280000", show_default=True)
def main(sizes: str) -> None:
    """Measure listing, planning and building at several sizes."""
    rows = []
    for images in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            make_tree(work, images)
            command = [sys.executable, "-c", LISTING, str(work / "raw")]
            found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            listing_s, planning_s, peak_mb = map(float, found.split())
            row = {"images": images, "listing_s": listing_s, "planning_s": planning_s, "listing_peak_mb": peak_mb}
            start_s = time.monotonic()
            build = [sys.executable, "-m", "preprocess", "build", work / "raw", work / "out", "--size", "32"]
            process = subprocess.Popen(list(map(str, build)), cwd=ROOT, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
            assert status == 0, f"build ended with {status}"
            row["build_s"] = time.monotonic() - start_s
            row["images_per_second"] = images / row["build_s"]
            row["peak_mb_of_driver_or_worker"] = usage.ru_maxrss / 1e3
            rows.append(row)
            print(json.dumps(row), flush=True)
    save("scale", {"rows": rows})


if __name__ == "__main__":
    main()
