"""How do time and memory of `build` grow with the number of images?

    python -m benchmarks.scale [--sizes 10000,100000,1280000]    # results under "scale"

The images are small files in 1,000 classes, no two the same, built to 32 pixels, so that bookkeeping is what is measured. Listing
and planning are measured alone too. Memory is the largest resident size of the driver or a worker.
"""

import json
import resource
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

from benchmarks import harness

CLASSES = 1000


def make_tree(root: Path, images: int) -> None:
    """`images` small JPEGs in 1,000 classes: 100 pictures, told apart by a comment."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        pictures.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90))
    for label in range(CLASSES):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(images // CLASSES):
            picture = pictures[number % 100]
            comment = b"\xff\xfe\x00\x0a" + f"{label:04d}{number:04d}".encode()
            (folder / f"n{label:08d}_{number}.JPEG").write_bytes(picture[:2] + comment + picture[2:])


def list_and_plan(raw: Path) -> dict[str, float]:
    """Seconds that build takes for it in this process."""
    from imagefeed.preprocess.sources.detect import find_images

    start_s = time.perf_counter()
    source = find_images(raw)
    listed_s = time.perf_counter()
    source.fingerprint()
    for images in source.splits.values():
        np.random.RandomState(0).permutation(len(images))  # the shuffle of the records
    planned_s = time.perf_counter()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"listing_s": listed_s - start_s, "planning_s": planned_s - listed_s, "listing_peak_mb": peak_mb}


@click.command()
@click.option("--sizes", default="10000,100000,1280000", show_default=True)
@click.option("--listed", type=harness.EXISTING, hidden=True)
def main(sizes: str, listed: Path | None) -> None:
    """Measure listing, planning and building at several sizes."""
    if listed:
        print(json.dumps(list_and_plan(listed)))
        return
    rows = []
    for images in map(int, sizes.split(",")):
        with harness.working_folder() as work:
            make_tree(work / "raw", images)
            row = {"images": images} | json.loads(harness.call("benchmarks.scale", "--listed", work / "raw"))
            used = harness.usage(harness.python("preprocess", "build", work / "raw", work / "out", "--size", 32))
            row |= {"build_s": used.wall_s, "images_per_second": images / used.wall_s}
            rows.append(row | {"peak_mb_of_driver_or_worker": used.peak_mb})
            print(json.dumps(rows[-1]), flush=True)
    harness.save("scale", {"rows": rows})


if __name__ == "__main__":
    main()
