"""How fast is `build` beside its peers? Both cores, interleaved, on the same raw images; and where an image's time goes.

    python -m benchmarks.preprocess RAW [--rounds 5] [--peers PYTHON]     # results under "preprocess"

RAW is a folder of class folders (1,000 ImageNet images, say). The rows:

    decode only   libjpeg-turbo by simplejpeg to RGB, pixels thrown away: what rescaling by way of RGB cannot get under
    build         python -m preprocess build with everything on: statistics, checksums, hashes, writing, start-up and end
    build, one    the same with one worker
    Pillow pool   a process pool of plain Pillow (not SIMD): decode, resize, crop, encode, write
    OpenCV pool   the same of OpenCV
    FFCV          its DatasetWriter, JPEG mode, at the same output size
    img2dataset   to WebDataset shards, from local files

All make 256x256 JPEGs of quality 90; the peers keep no statistics, checksums or order. Plain Pillow cannot live beside
Pillow-SIMD, so the peers run in a Python of their own: --peers names one, as peers.py makes it; those that are not there are
left out.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

from benchmarks import ROOT, save
from benchmarks.peers import left_out as not_installed
from imagefeed.dataset.records import Record, ShardWriter
from imagefeed.preprocess import codec
from imagefeed.preprocess.image import ImageOptions, decode_planes, prepare_image
from imagefeed.preprocess.statistics import PixelSums

PEERS = ROOT / "benchmarks" / "preprocess_peers.py"
# By the name that a row's package is imported under; the last two spend seconds before the first image.
PACKAGES = {"decode only": "simplejpeg", "Pillow pool": "PIL", "OpenCV pool": "cv2", "ffcv": "ffcv", "img2dataset": "img2dataset"}


def seconds_of(command: list) -> float:
    start_s = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start_s


def version_of(peers: str) -> str:
    """Of Pillow, in that Python."""
    return subprocess.check_output([peers, "-c", "import PIL; print(PIL.__version__)"], text=True)


def stages(paths: list[Path], work: Path) -> dict[str, float]:
    """Median microseconds an image of each step, one after the other in this process."""
    spent: dict[str, list[float]] = {}
    sums = PixelSums(256)

    def timed(name: str, function, *args):
        start_s = time.perf_counter()
        result = function(*args)
        spent.setdefault(name, []).append((time.perf_counter() - start_s) * 1e6)
        return result

    with ShardWriter(work / "stages.tfrecord", 0) as writer:
        for number, path in enumerate(paths):
            data = timed("read", path.read_bytes)
            if codec.header(data)[2] == "other":
                continue
            timed("(decode to RGB)", lambda data: simplejpeg.decode_jpeg(data, "RGB", strict=True), data)
            planes = timed("decode and rescale", decode_planes, data, 256, True)
            jpeg = timed("encode", lambda planes: simplejpeg.encode_jpeg_yuv_planes(*planes, 90), planes)
            timed("statistics", sums.add, planes)
            timed("record, checksums, hash, write", writer.append, Record(jpeg, 0, "n01440764", path.name, 256, 256))
            timed("(prepare_image)", prepare_image, data, ImageOptions())
            if number == 0:
                spent.clear()  # the first touches everything
    return {name: float(np.mean(values)) for name, values in spent.items()}


@click.command()
@click.argument("raw", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
@click.option("--repeat", default=8, show_default=True, help="Copies of each image.")
@click.option("--peers", default=sys.executable, help="Python with the peers.")
def main(raw: Path, rounds: int, repeat: int, peers: str) -> None:
    """Time `build` and its peers on RAW."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        paths = sorted(path for path in raw.resolve().glob("*/*") if path.is_file())
        # What is slower than the rest goes over fewer images; a rate is a rate, but start-up must not count for much.
        trees = {}
        many, few = repeat, max(1, repeat // 4)
        for times in {many, few}:
            trees[times] = work / f"raw-{times}"
            for path in paths:
                (trees[times] / path.parent.name).mkdir(parents=True, exist_ok=True)
                data = path.read_bytes()
                for copy in range(times):
                    # A comment tells the copies apart: the same bytes twice would be looked at again, as duplicates.
                    comment = b"\xff\xfe\x00\x03%c" % copy if data[:2] == b"\xff\xd8" else b""
                    unique = data[:2] + comment + data[2:]
                    (trees[times] / path.parent.name / f"{copy}-{path.name}").write_bytes(unique)
        build = [sys.executable, "-m", "preprocess", "build", trees[many], work / "out", "--split", "train", "--workers"]
        rows = {
            "decode only": (many, [peers, PEERS, "decode", trees[many], work / "out", cores]),
            "build": (many, [*build, cores]),
            "build, one": (many, [*build, 1]),
            "Pillow pool": (few, [peers, PEERS, "pillow", trees[few], work / "out", cores]),
            "OpenCV pool": (few, [peers, PEERS, "opencv", trees[few], work / "out", cores]),
        }
        rows |= {way: (many, [peers, PEERS, way, trees[many], work / "out", cores]) for way in ("ffcv", "img2dataset")}
        reasons = not_installed(peers)
        left_out = {}
        for row, package in PACKAGES.items():
            if subprocess.run([peers, "-c", f"import {package}"], capture_output=True).returncode:
                left_out[row] = reasons.get(package, f"{package} cannot be imported")
            elif package == "PIL" and "post" in version_of(peers):
                left_out[row] = "this is Pillow-SIMD"
        rows = {name: row for name, row in rows.items() if name not in left_out}
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(rounds + 1):
            for name, (times, command) in rows.items():
                shutil.rmtree(work / "out", ignore_errors=True)
                rate = len(paths) * times / seconds_of(command)
                if number:  # the first round fills the page cache
                    rates[name].append(rate)
                print(f"round {number}: {name} {rate:,.0f} images/s", flush=True)
        spent = stages(paths, work)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Ratios within a round, because the machine's speed drifts between rounds.
    ratios = {
        f"build / {name}": statistics.median(a / b for a, b in zip(rates["build"], rates[name], strict=True))
        for name in rows
        if name != "build"
    }
    result = {
        "images": {name: len(paths) * times for name, (times, _) in rows.items()},
        "rounds": rounds,
        "left_out": left_out,
        "images_per_second": rates,
        "median": medians,
        "ratio": ratios,
        "microseconds_of_an_image": spent,
    }
    save("preprocess", result, "numpy", "pillow-simd", "simplejpeg")
    for name, rate in medians.items():
        print(f"{name:<14}{rate:>8,.0f} images/s")
    for name, ratio in ratios.items():
        print(f"{name:<24}{ratio:.2f}")
    for name, us in spent.items():
        print(f"{name:<32}{us:>8,.0f} us")


if __name__ == "__main__":
    main()
