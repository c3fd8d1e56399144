"""Raw trees, datasets and disks as the benchmarks need them: repeated, cold or slow."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split, hash_file
from imagefeed.dataset.reader import RecordReader
from imagefeed.dataset.records import INDEX_DTYPE, ShardWriter, index_name, shard_name


def repeat(images: list[Path], folder: Path, count: int, put: Callable[[Path, Path], object] = os.link) -> None:
    """Makes `count` images of the given ones, as FOLDER/CLASS/COPY-NAME."""
    for number in range(count):
        image = images[number % len(images)]
        target = folder / image.parent.name / f"{number // len(images)}-{image.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        put(image, target)


def copy_images(raw: Path, folder: Path) -> list[Path]:
    """Copies RAW/CLASS/IMAGE, because hard links do not cross file systems."""
    images = sorted(path for path in raw.resolve().glob("*/*") if path.is_file())
    repeat(images, folder, len(images), shutil.copy)
    return sorted(folder.glob("*/*"))


def stretch(dataset: Path, out: Path, times: int, linked: bool = False) -> Manifest:
    """Repeats the train split's shards `times` times in `out`: as copies, which the page cache holds separately, or as hard
    links, which take no space."""
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


def repack(dataset: Path, out: Path, records: int, a_shard: int = 4096) -> Manifest:
    """A dataset of so many records in `out`: those of the train split, again and again, in shards of ImageNet's size."""
    manifest = Manifest.load(dataset)
    reader = RecordReader(manifest, "train")
    out.mkdir(parents=True)
    shards, rows, count = [], [], -(-records // a_shard)
    for number in range(count):
        with ShardWriter(out / shard_name("train", number, count), number) as writer:
            for n in range(number * a_shard, min((number + 1) * a_shard, records)):
                writer.append(reader.record(n % len(reader)))
        rows += writer.rows
        shards.append(Shard(writer.path.name, len(writer.rows), writer.bytes_written, writer.sha256))
    index = np.array(rows, INDEX_DTYPE)
    counts = np.bincount(index["label"], minlength=len(manifest.classes)).tolist()
    packed = replace(manifest, root=out, splits={"train": Split(tuple(shards), tuple(counts))})
    np.save(packed.index_path("train"), index)
    shutil.copy(dataset / STATISTICS, out)
    packed = replace(packed, files={name: hash_file(out / name) for name in ("train.index.npy", STATISTICS)})
    packed.save()
    return packed


def jpeg_batches(manifest: Manifest, batch_size: int, limit: int) -> list[np.ndarray]:
    """Up to `limit` batches of the train split's JPEGs in memory, as the loader hands them to a decoder: uint8 (batch, longest),
    padded with zeros."""
    records = RecordReader(manifest, manifest.train_split)
    batches = []
    for start in range(0, len(records) - batch_size + 1, batch_size)[:limit]:
        ids = np.arange(start, start + batch_size)
        batches.append(np.empty((batch_size, records.longest(ids)), np.uint8))
        records.gather(ids, batches[-1], batches[-1].shape[1])
    return batches


def endless(loader) -> Iterator:
    while True:
        yield from loader


def evict(dataset: Path) -> None:
    """Drops the dataset's shards from the page cache."""
    gc.collect()  # pages that are still mapped would stay
    for path in dataset.glob("*.tfrecord"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def slow_down(folder: Path, reads: int, megabytes: int) -> None:
    """Limits what this process reads per second from the disk of `folder`, by control groups of version 1 (as root)."""
    group = Path("/sys/fs/cgroup/blkio/imagefeed-cold")
    group.mkdir(exist_ok=True)
    device = folder.stat().st_dev
    for limit, value in (("iops", reads), ("bps", megabytes * 10**6)):
        number = f"{os.major(device)}:{os.minor(device)} {value}"
        (group / f"blkio.throttle.read_{limit}_device").write_text(number)
    (group / "cgroup.procs").write_text(str(os.getpid()))
