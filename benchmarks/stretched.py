"""A dataset made larger by repeating its shards."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from imagefeed.dataset.files import hash_file
from imagefeed.dataset.manifest import STATISTICS, Manifest, Split
from imagefeed.dataset.records import index_name, shard_name


def stretch(dataset: Path, out: Path, times: int, linked: bool = False) -> Manifest:
    """OUT becomes the train split of DATASET, each shard so many times: copies, each with pages of its own in memory, or
    `linked`, which takes no room on the disk."""
    manifest = Manifest.load(dataset)
    split = manifest.split("train")
    put = os.link if linked else shutil.copyfile
    out.mkdir(parents=True)
    shards = []
    for number in range(times * len(split.shards)):
        shard = split.shards[number % len(split.shards)]
        shards.append(replace(shard, name=shard_name("train", number, times * len(split.shards))))
        put(dataset / shard.name, out / shards[-1].name)
        put(dataset / index_name(shard.name), out / index_name(shards[-1].name))
    index = np.tile(manifest.load_index("train"), times)
    index["shard"] += np.repeat(np.arange(times, dtype=np.uint32) * len(split.shards), split.records)
    whole = {"train": Split(tuple(shards), tuple(count * times for count in split.counts))}
    stretched = replace(manifest, root=out, splits=whole)
    np.save(stretched.index_path("train"), index)
    shutil.copy(dataset / STATISTICS, out)
    files = {path.name: hash_file(path) for path in sorted(out.iterdir()) if path.suffix != ".tfrecord"}
    stretched = replace(stretched, files=files)
    stretched.save()
    return stretched
