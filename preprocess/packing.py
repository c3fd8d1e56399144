"""Packs images into shards: plans them, has workers write those that are missing, and completes the dataset at the end.

A shard's bytes depend on the plan alone, so any number of workers or machines gives the same dataset, interrupted or not.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, owned, owner
from imagefeed.dataset.manifest import NAME, Manifest, Shard
from imagefeed.dataset.records import INDEX_DTYPE, NO_LABEL, Record, ShardWriter, crc32c
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.finish import write_manifest, write_rejected
from imagefeed.preprocess.image import BadImage, prepare_image
from imagefeed.preprocess.options import ImageOptions
from imagefeed.preprocess.plan import PlannedShard, plan_shards
from imagefeed.preprocess.raw import RawRecord
from imagefeed.preprocess.renew import SILENT, Notices, compare_begun, forget_stale, reopen_if_stale
from imagefeed.preprocess.sources.listing import NO_STAMP, Source, SourceImage, read_stamped
from imagefeed.preprocess.sources.spool import unpack
from imagefeed.preprocess.state import (
    REJECTED,
    SPOOL,
    STATE,
    ShardState,
    at_work,
    compare_settings,
    compare_versions,
    filled_stamps,
    is_finished,
)
from imagefeed.preprocess.statistics import PixelSums

REPORT_EVERY = 32  # images between two signs of life from a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to write one shard."""

    root: Path
    out: Path
    name: str
    number: int
    images: list[SourceImage]
    classes: tuple[str, ...]
    options: ImageOptions
    statistics: bool
    owner: str = field(default_factory=owner)  # of temporary files, also on another machine

    def __str__(self) -> str:
        return self.name


def build_dataset(
    source: Source,
    out: Path,
    options: ImageOptions,
    seed: int,
    runner: Runner,
    max_rejected: float = 0.01,
    progress: Progress = lambda images, bytes_read, rejected: None,
    unpacking: Progress = lambda files, images, bytes_written: None,
    part: tuple[int, int] | None = None,
    listing: dict[str, Any] | None = None,
    notices: Notices = SILENT,
) -> Manifest | None:
    """Packs `source` into `out` (see `build`, build.py); with `part` only that share of the shards, and returns None.

    `progress` is called with the images packed, bytes read and images rejected since its last call, the first time for what
    earlier calls did. Before that, if images have to be unpacked, `unpacking` is called with files, images and bytes unpacked.
    `listing` holds the SourceOptions that `source` was read with, for `verify`.
    """
    settings = {**options.identity(), "seed": seed, "source": source.fingerprint(), **source.options}
    if source.root.is_dir() and out.resolve().is_relative_to(source.root.resolve()):
        raise UserError(f"{out}: lies in the folder of the raw images, {source.root}; choose an OUT outside of it")
    with at_work(out, part):
        begun = compare_settings(out, settings)
        manifest = _complete_manifest(out)
        reopened = manifest is not None and reopen_if_stale(manifest, source, settings, max_rejected, runner, part, notices)
        if reopened:
            manifest = None
        elif manifest is None:
            compare_versions(out, begun["versions"])
            compare_begun(out, source, settings, begun["settings"], part)
        sizes = {shard.name: shard.bytes for split in manifest.splits.values() for shard in split.shards} if manifest else None
        if source.packed and sizes is not None and all(is_finished(out, shard, sizes) for shard in sizes):
            progress(source.num_images, 0, 0)
            return manifest  # without unpacking everything again
        source = unpack(source, out / STATE / SPOOL, runner, unpacking) if source.packed else source
        plan = plan_shards({split: len(content) for split, content in source.splits.items()})
        record = RawRecord.of(source, settings["source"], listing or {})
        if manifest is None:
            forget_stale(out, source, record, settings, plan, part, not reopened, notices)
        finished = {shard for shard in plan if is_finished(out, shard.name, sizes)}
        mine = plan[part[0] - 1 :: part[1]] if part else plan
        pending = [shard for shard in mine if shard not in finished]
        if manifest is None:
            actions = sum((ShardState.load(out, shard.name).actions for shard in finished), Counter())
        else:
            actions = Counter(rejected=manifest.rejected.get("rejected", 0))
            if pending:
                compare_versions(out, begun["versions"], f"lacks {plural(len(pending), 'shard')}; it was ")
        progress(sum(shard.end - shard.start for shard in finished), 0, actions["rejected"])
        tasks = (shard_task(source, out, options, seed, shard) for shard in pending)
        limit = max_rejected * source.num_images
        for taken in runner.map(write_shard, tasks, progress) if pending else ():
            actions += taken
            if max(actions["rejected"], actions["suspicious"]) > limit:
                break
        if manifest is not None:
            _check_restored(manifest, pending)
        elif (rejected := actions["rejected"]) > limit:
            _give_up(out, plan)
            raise UserError(
                f"{rejected} of {source.num_images} images are bad, more than the {max_rejected:.2%} that `max_rejected` allows; "
                f"see {out / REJECTED}, fix them or raise the limit, and run the same command again"
            )
        elif (suspicious := actions["suspicious"]) > limit:
            _give_up(out, plan)
            raise UserError(
                f"{suspicious} of {source.num_images} images would be stored nearly black or white, more than the "
                f"{max_rejected:.2%} that `max_rejected` allows; see {out / REJECTED}, then set their `range` "
                "and choose another OUT, or raise the limit"
            )
        elif part is None:
            manifest = write_manifest(source, record, out, settings, plan)
        return manifest


def shard_task(source: Source, out: Path, options: ImageOptions, seed: int, shard: PlannedShard) -> ShardTask:
    images = source.images(shard.split, shard.places(len(source.splits[shard.split]), seed))
    statistics = shard.split == source.statistics_split
    return ShardTask(source.root, out, shard.name, shard.number, images, source.classes, options, statistics)


def write_shard(task: ShardTask, report: Progress) -> Counter:
    """Writes one shard, then its state file, which marks it finished; returns how often each action was taken."""
    sums = PixelSums(task.options.size)
    entries: list[dict[str, str]] = []
    marks, stamps = np.zeros(len(task.images), MARK_DTYPE), filled_stamps(len(task.images), NO_STAMP)
    fresh: Counter = Counter()  # since the last report
    rejected: list[int] = []
    with owned(task.owner), ShardWriter(task.out / task.name, task.number) as writer:
        for number, image in enumerate(task.images, start=1):
            fresh["images"] += 1
            if image.note:
                entries.append({"path": image.path, "action": "noted", "reason": image.note})
            try:
                data, stamps[number - 1] = read_stamped(task.root, image)
                fresh["bytes"] += len(data)
                marks[number - 1] = crc32c(data), len(data)
                prepared = prepare_image(data, task.options)
            except BadImage as error:
                entries.append({"path": image.path, "action": "rejected", "reason": str(error)})
                fresh["rejected"] += 1
                rejected.append(number - 1)
            else:
                height, width = prepared.planes.y.shape
                name = task.classes[image.label] if image.label != NO_LABEL else ""
                writer.append(Record(prepared.jpeg, image.label, name, image.path, height, width))
                if prepared.converted:
                    action = "suspicious" if prepared.suspicious else "converted"
                    entries.append({"path": image.path, "action": action, "reason": prepared.converted})
                if task.statistics:
                    sums.add(prepared.planes)
            if number % REPORT_EVERY == 0 or number == len(task.images):
                report(fresh["images"], fresh["bytes"], fresh["rejected"])
                fresh.clear()
    shard = Shard(task.name, len(writer.rows), writer.bytes_written, writer.sha256)
    rows = np.array(writer.rows, INDEX_DTYPE)
    state = ShardState(shard, entries, rows, marks, stamps, sums, np.array(rejected, np.int64))
    with owned(task.owner):
        state.save(task.out)
    return state.actions


def _complete_manifest(out: Path) -> Manifest | None:
    """The manifest of a dataset that lacks at most shards; one that lacks other files is removed, to be written again."""
    if not (out / NAME).exists():
        return None
    manifest = Manifest.load(out)
    missing = [name for name in manifest.files if not name.endswith(".idx") and not (out / name).exists()]
    if not missing:
        return manifest
    compare_versions(out, manifest.versions, f"lacks {first_few(missing)}; it was ")
    (out / NAME).unlink()
    return None


def _give_up(out: Path, plan: list[PlannedShard]) -> None:
    """Lists the bad images, and forgets the shards that lack them, so that fixed images are taken."""
    states = [ShardState.load(out, shard.name) for shard in plan if is_finished(out, shard.name, None)]
    write_rejected(out, (state.entries for state in states))
    for state in states:
        if state.actions["rejected"]:
            state.forget(out)


def _check_restored(manifest: Manifest, restored: list[PlannedShard]) -> None:
    for shard in restored:
        if hash_file(manifest.root / shard.name) != manifest.splits[shard.split].shards[shard.number].sha256:
            raise UserError(
                f"{manifest.root / shard.name}: rewritten, it differs from the manifest; the raw images have "
                "changed since the dataset was built, so build into another OUT"
            )
