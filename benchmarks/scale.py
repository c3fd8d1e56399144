"""How do time and memory of `build` grow with the number of images?

    python -m benchmarks.scale [--sizes 10000,100000,1280000] [--built 100000]     # writes benchmarks/results/scale.json

The images are links to a few small files in 1,000 classes. Listing and planning are measured at every size; the whole build
(to 32-pixel images, so that it is the bookkeeping that is measured) up to --built images. Memory is the largest resident size
of the driver; that of the workers is beside it.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click
import numpy as np
import simplejpeg

ROOT = Path(__file__).parent.parent
CLASSES = 1000
LISTING = """
import resource, sys, time
from pathlib import Path
from preprocess.build import _shard_names, _task
from preprocess.image import ImageOptions
from preprocess.sources import find_images
start = time.perf_counter()
source = find_images(Path(sys.argv[1]))
listed = time.perf_counter()
source.fingerprint()
shards = {split: _shard_names(split, len(images)) for split, images in source.splits.items()}
_task(source, Path("out"), ImageOptions(), 0, shards, "train", 0)
planned = time.perf_counter()
print(listed - start, planned - listed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def make_tree(root: Path, images: int) -> None:
    """`images` links to 100 small JPEGs, in 1,000 classes."""
    rng = np.random.default_rng(0)
    (root / "files").mkdir(parents=True)
    for number in range(100):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (root / "files" / f"{number}.JPEG").write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90))
    for label in range(CLASSES):
        folder = root / "raw" / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(images // CLASSES):
            os.link(root / "files" / f"{number % 100}.JPEG", folder / f"n{label:08d}_{number}.JPEG")


@click.command()
@click.option("--sizes", default="10000,100000,1280000", show_default=True)
@click.option("--built", default=100000, show_default=True, help="Largest number of images to build whole.")
def main(sizes: str, built: int) -> None:
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
            if images <= built:
                start_s = time.monotonic()
                build = ["-m", "preprocess", "build", str(work / "raw"), str(work / "out"), "--size", "32"]
                report = subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True, text=True)
                row["build_s"] = time.monotonic() - start_s
                row["images_per_second"] = images / row["build_s"]
                peak = re.search(r"peak memory ([\d,]+) MB", report.stdout)[1]
                row["peak_mb_of_driver_or_worker"] = float(peak.replace(",", ""))
            rows.append(row)
            print(json.dumps(row), flush=True)
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    result = {"date": date.today().isoformat(), "machine": machine, "rows": rows}
    (ROOT / "benchmarks" / "results" / "scale.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
