"""How fast is `build` beside its peers? Both cores, interleaved, on the same raw images.

    python -m benchmarks.preprocess RAW [--rounds 5] [--peers PYTHON]     # writes benchmarks/results/preprocess.json

RAW is a folder of class folders (1,000 ImageNet images, say). The rows:

    decode only   libjpeg-turbo by simplejpeg, pixels thrown away: nobody who decodes on a CPU gets under it
    build         python -m preprocess build with everything on: statistics, checksums, hashes, writing, start-up and end
    build, one    the same with one worker
    Pillow pool   a process pool of plain Pillow (not SIMD): decode, resize, crop, encode, write
    OpenCV pool   the same of OpenCV

The pools write 256x256 JPEGs of quality 90 into a folder; they keep no statistics, checksums or order. Plain Pillow cannot
live beside Pillow-SIMD, so they run in a Python of their own: --peers names one that has pillow, opencv-python-headless and
simplejpeg.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click

from preprocess.image import codec_versions

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "preprocess_peers.py"


def seconds_of(command: list) -> float:
    start_s = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start_s


@click.command()
@click.argument("raw", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
@click.option("--repeat", default=4, show_default=True, help="Times that each image is listed, by links.")
@click.option("--peers", default=sys.executable, help="Python with pillow, opencv-python-headless and simplejpeg.")
def main(raw: Path, rounds: int, repeat: int, peers: str) -> None:
    """Time `build` and its peers on RAW."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tree = work / "raw"
        paths = sorted(path for path in raw.resolve().glob("*/*") if path.is_file())
        for path in paths:
            (tree / path.parent.name).mkdir(parents=True, exist_ok=True)
            for copy in range(repeat):
                (tree / path.parent.name / f"{copy}-{path.name}").symlink_to(path)
        images = len(paths) * repeat
        build = [sys.executable, "-m", "preprocess", "build", tree, work / "out", "--split", "train", "--workers"]
        rows = {
            "decode only": [peers, PEERS, "decode", tree, work / "out", cores],
            "build": [*build, cores],
            "build, one": [*build, 1],
            "Pillow pool": [peers, PEERS, "pillow", tree, work / "out", cores],
            "OpenCV pool": [peers, PEERS, "opencv", tree, work / "out", cores],
        }
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(rounds + 1):
            for name, command in rows.items():
                shutil.rmtree(work / "out", ignore_errors=True)
                rate = images / seconds_of(command)
                if number:  # the first round fills the page cache
                    rates[name].append(rate)
                print(f"round {number}: {name} {rate:,.0f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Ratios within a round, because the machine's speed drifts between rounds.
    ratios = {
        f"build / {name}": statistics.median(a / b for a, b in zip(rates["build"], rates[name], strict=True))
        for name in rows
        if name != "build"
    }
    result = {
        "date": date.today().isoformat(),
        "machine": f"{cores} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), **codec_versions()},
        "images": images,
        "rounds": rounds,
        "images_per_second": rates,
        "median": medians,
        "ratio": ratios,
    }
    (ROOT / "benchmarks" / "results" / "preprocess.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, rate in medians.items():
        print(f"{name:<14}{rate:>8,.0f} images/s")
    for name, ratio in ratios.items():
        print(f"{name:<24}{ratio:.2f}")


if __name__ == "__main__":
    main()
