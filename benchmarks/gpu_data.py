"""The data of gpu.py: raw images, a dataset of them, and that one repeated until no cache holds it by chance."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import ROOT
from preprocess.manifest import STATISTICS, Manifest, Split, hash_file
from preprocess.records import index_name, shard_name

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
    repeat(manifest, folder / "large", times)
    records = manifest.split(manifest.train_split).records
    return (
        f"{records:,} records of {raw.name}, {times} times: {Manifest.load(folder / 'large').split('train').records:,}"
    )


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def repeat(manifest: Manifest, out: Path, times: int) -> None:
    """A dataset of the train split of `manifest`, its shards copied so many times, so that each copy has pages of its own."""
    out.mkdir(parents=True)
    split = manifest.split(manifest.train_split)
    index = manifest.load_index(manifest.train_split)
    shards, rows = [], []
    for copy in range(times):
        for number, shard in enumerate(split.shards):
            name = shard_name("train", copy * len(split.shards) + number, times * len(split.shards))
            shutil.copyfile(manifest.root / shard.name, out / name)
            shutil.copyfile(manifest.root / index_name(shard.name), out / index_name(name))
            shards.append(dataclasses.replace(shard, name=name))
        mine = np.array(index)
        mine["shard"] += copy * len(split.shards)
        rows.append(mine)
    np.save(out / "train.index.npy", np.concatenate(rows))
    shutil.copyfile(manifest.root / STATISTICS, out / STATISTICS)
    counts = tuple(count * times for count in split.counts)
    files = {path.name: hash_file(path) for path in sorted(out.iterdir()) if path.suffix != ".tfrecord"}
    whole = {"train": Split(tuple(shards), counts)}
    Manifest(out, manifest.classes, whole, manifest.options, manifest.versions, files=files).save()
