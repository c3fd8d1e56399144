"""The data of gpu.py: raw images, a dataset of them, and that one repeated until no cache holds it by chance."""

import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.stretched import stretch
from imagefeed.dataset.manifest import Manifest

TIMES, TIMES_SMALL = 96, 4  # 1,000 records of 22 KB become 2 GB


def prepare(folder: Path, raw: Path | None, data: Path | None, small: bool) -> str:
    """Makes FOLDER/raw, FOLDER/data and FOLDER/large, unless they are there; returns what they are."""
    if (folder / "large" / "dataset.json").exists():
        return "as it was found"
    if raw is None:
        raw = folder / "raw"
        call("preprocess", "sample", raw, "--images", 256 if small else 1000)
    elif not (folder / "raw").exists():
        (folder / "raw").symlink_to(raw)
    if data is None:
        data = folder / "data"
        split = () if (raw / "train").is_dir() else ("--split", "train")
        call("preprocess", "build", raw, data, *split)
    elif not (folder / "data").exists():
        (folder / "data").symlink_to(data)
    manifest = Manifest.load(data)
    times = TIMES_SMALL if small else TIMES
    large = stretch(data, folder / "large", times)
    records = manifest.split("train").records
    return f"{records:,} records of {raw.name}, {times} times: {large.split('train').records:,}"


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
