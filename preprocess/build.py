"""Builds a dataset: plans shards, has workers write those that are missing, and has them merged when all are there.

A shard's bytes depend on the plan alone, so any number of workers or machines gives the same dataset, interrupted or not.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file
from imagefeed.dataset.manifest import NAME, Manifest, Shard, training_split
from imagefeed.dataset.records import INDEX_DTYPE, NO_LABEL, Record, ShardWriter, crc32c, shard_name
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import ProcessRunner, RayRunner
from imagefeed.preprocess.finish import REJECTED, write_manifest, write_rejected
from imagefeed.preprocess.image import BadImage, ImageOptions, codec_versions, prepare_image
from imagefeed.preprocess.sources.listing import Source, SourceImage, read_image
from imagefeed.preprocess.sources.spool import unpack
from imagefeed.preprocess.state import SPOOL, STATE, ShardState, at_work, compare_settings, is_finished
from imagefeed.preprocess.statistics import PixelSums

RECORDS_PER_SHARD = 4096  # 1,281,167 images give 313 shards of about 90 MB
# Small datasets are cut finer, so that all cores have work; never by the number of cores, which must not change the bytes.
SMALL_SHARDS, SMALL_SHARD_RECORDS = 32, 64
REPORT_EVERY = 32  # images between two signs of life from a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    root: Path
    out: Path
    name: str
    number: int
    images: list[SourceImage]
    classes: tuple[str, ...]
    options: ImageOptions
    statistics: bool

    def __str__(self) -> str:
        return self.name


class Part(NamedTuple):
    """One of several jobs that share a build: `number` counts from 1 `of` so many."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}-{self.of}"


def build_dataset(
    source: Source,
    out: Path,
    options: ImageOptions,
    seed: int,
    runner: ProcessRunner | RayRunner,
    max_rejected: float = 0.01,
    progress: Progress = lambda images, bytes_read, rejected: None,
    unpacking: Progress = lambda files, images, bytes_written: None,
    part: Part | None = None,
) -> Manifest | None:
    """Packs all splits of `source` into `out`, going on where an earlier call stopped; with `part`, only that share of the
    shards, leaving the end to a call without, and returns None.

    `max_rejected` is the share of images that may be bad. `progress` is called with the images done, bytes read and images
    rejected since its last call; before that, where images have to be unpacked, `unpacking` with files, images and bytes
    unpacked. Raises UserError where `out` was begun with other options or other images, another build is at work in it,
    or too many images are bad.
    """
    settings = {**asdict(options), "seed": seed, "source": source.fingerprint(), **source.options}
    if source.root.is_dir() and out.resolve().is_relative_to(source.root.resolve()):
        raise UserError(f"{out}: lies in the folder of the raw images, {source.root}; choose an OUT outside of it")
    with at_work(out, str(part or "")):
        compare_settings(out, settings, codec_versions())
        manifest = _whole_manifest(out)
        sizes = _sizes(manifest) if manifest is not None else None
        if source.packed and sizes is not None and all(is_finished(out, shard, sizes) for shard in sizes):
            progress(source.num_images, 0, 0)
            return manifest  # without unpacking all again
        source = unpack(source, out / STATE / SPOOL, runner, unpacking) if source.packed else source
        shards = {split: _shard_names(split, len(images)) for split, images in source.splits.items()}
        plan = [(split, number) for split, names in shards.items() for number in range(len(names))]
        finished = {place: None for place in plan if is_finished(out, shards[place[0]][place[1]], sizes)}
        mine = plan[part.number - 1 :: part.of] if part else plan
        pending = [place for place in mine if place not in finished]
        rejected = _rejected(out, [shards[split][number] for split, number in finished], manifest)
        progress(sum(len(_share(source, shards, *place)) for place in finished), 0, rejected)
        tasks = (_task(source, out, options, seed, shards, *place) for place in pending)
        limit = max_rejected * source.num_images
        for rejected_now in runner.map(write_shard, tasks, progress):
            rejected += rejected_now
            if rejected > limit:
                break
        if manifest is None and rejected > limit:
            _give_up(out, [shards[split][number] for split, number in plan])
            raise UserError(
                f"{rejected} of {source.num_images} images are bad, more than the {max_rejected:.2%} that --max-rejected "
                f"allows; see {out / REJECTED}, mend them or raise the limit, and run the same command again"
            )
        if manifest is not None:
            _check_mended(manifest, pending)
        elif part is None:
            manifest = write_manifest(source, out, settings, shards, lambda split: _shuffled(len(source.splits[split]), seed))
        return manifest


def num_shards(images: int) -> int:
    return max(-(-images // RECORDS_PER_SHARD), min(SMALL_SHARDS, -(-images // SMALL_SHARD_RECORDS)))


def write_shard(task: ShardTask, report: Progress) -> int:
    """Writes one shard, then its state file, which marks it finished; returns the number of images rejected."""
    sums = PixelSums(task.options.size)
    entries: list[dict[str, str]] = []
    marks = np.zeros(len(task.images), MARK_DTYPE)
    fresh = Counter()  # since the last report
    rejected = 0
    with ShardWriter(task.out / task.name, task.number) as writer:
        for number, image in enumerate(task.images, start=1):
            fresh["images"] += 1
            try:
                data = read_image(task.root, image)
                fresh["bytes"] += len(data)
                marks[number - 1] = crc32c(data), len(data)
                prepared = prepare_image(data, task.options)
            except BadImage as error:
                entries.append({"path": image.path, "action": "rejected", "reason": str(error)})
                fresh["rejected"] += 1
                rejected += 1
            else:
                height, width = prepared.planes.y.shape
                name = task.classes[image.label] if image.label != NO_LABEL else ""
                writer.append(Record(prepared.jpeg, image.label, name, image.path, height, width))
                if prepared.converted:
                    entries.append({"path": image.path, "action": "converted", "reason": prepared.converted})
                if task.statistics:
                    sums.add(prepared.planes)
            if number % REPORT_EVERY == 0 or number == len(task.images):
                report(fresh["images"], fresh["bytes"], fresh["rejected"])
                fresh.clear()
    shard = Shard(task.name, len(writer.rows), writer.bytes_written, writer.sha256)
    ShardState(shard, entries, np.array(writer.rows, INDEX_DTYPE), marks, sums).save(task.out)
    return rejected


def _shard_names(split: str, images: int) -> list[str]:
    count = num_shards(images)
    return [shard_name(split, number, count) for number in range(count)]


def _share(source: Source, shards: dict[str, list[str]], split: str, number: int) -> range:
    """The places, in the shuffled split, of the images of one shard."""
    images, count = len(source.splits[split]), len(shards[split])
    return range(number * images // count, (number + 1) * images // count)


def _task(
    source: Source, out: Path, options: ImageOptions, seed: int, shards: dict[str, list[str]], split: str, number: int
) -> ShardTask:
    order = _shuffled(len(source.splits[split]), seed)[_share(source, shards, split, number)]
    return ShardTask(
        source.root,
        out,
        shards[split][number],
        number,
        source.images(split, order),
        source.classes,
        options,
        split == training_split(list(source.splits)),
    )


@functools.lru_cache(maxsize=1)
def _shuffled(images: int, seed: int) -> np.ndarray:
    """The global shuffle; RandomState, because NumPy promises that its stream never changes (NEP 19)."""
    return np.random.RandomState(seed).permutation(images)


def _give_up(out: Path, names: list[str]) -> None:
    """Writes down which images are bad, and forgets the shards that lack them: mended images are then taken."""
    states = [ShardState.load(out, name) for name in names if is_finished(out, name, None)]
    write_rejected(out, iter(states))
    for state in states:
        if state.rejected:
            state.forget(out)


def _rejected(out: Path, finished: list[str], manifest: Manifest | None) -> int:
    if manifest is not None:
        return manifest.rejected.get("rejected", 0)
    return sum(ShardState.load(out, name).rejected for name in finished)


def _whole_manifest(out: Path) -> Manifest | None:
    """The manifest of a finished dataset, of which at most shards are missing; one without its index goes, to be made anew."""
    if not (out / NAME).exists():
        return None
    manifest = Manifest.load(out)
    if all((out / name).exists() for name in manifest.files if not name.endswith(".idx")):
        return manifest
    (out / NAME).unlink()
    return None


def _sizes(manifest: Manifest) -> dict[str, int]:
    return {shard.name: shard.bytes for split in manifest.splits.values() for shard in split.shards}


def _check_mended(manifest: Manifest, pending: list[tuple[str, int]]) -> None:
    for split, number in pending:
        shard = manifest.splits[split].shards[number]
        if hash_file(manifest.root / shard.name) != shard.sha256:
            raise UserError(
                f"{manifest.root / shard.name}: written again, it differs from what the manifest says; the raw images have "
                "changed since, so build into another OUT"
            )
