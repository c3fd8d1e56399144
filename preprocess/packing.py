"""Packs images into shards: plans them, has workers write those that are missing, and completes the dataset at the end.

A shard's bytes depend on the plan alone, so any number of workers or machines gives the same dataset, interrupted or not.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import locked, owned, owner
from imagefeed.dataset.manifest import NAME, Manifest, Shard
from imagefeed.dataset.records import INDEX_DTYPE, NO_LABEL, Record, ShardWriter, crc32c
from imagefeed.dataset.storage import Url
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.finish import write_manifest, write_rejected
from imagefeed.preprocess.image import BadImage, prepare_image
from imagefeed.preprocess.options import ImageOptions
from imagefeed.preprocess.plan import PlannedShard, plan_shards
from imagefeed.preprocess.raw import RawRecord
from imagefeed.preprocess.renew import SILENT, Notices, compare_begun, forget_stale, reopen_if_stale
from imagefeed.preprocess.sources.listing import NO_STAMP, Root, Source, SourceImage, read_images
from imagefeed.preprocess.sources.remote import RemotePath
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
from imagefeed.preprocess.upload import OnDisk, Upload, work_folder

REPORT_EVERY = 32  # images between two signs of life from a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to write one shard."""

    root: Root
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


def build_anywhere(source: Source, out: Path | Url, work_dir: str | Path | None, *arguments: Any, **more: Any) -> Manifest | None:
    """Like `build_dataset`; if `out` is a URL, builds in a work folder and sends the dataset there."""
    root = source.root.root if isinstance(source.root, RemotePath) else source.root
    same_kind = isinstance(out, Url) == isinstance(root, Url)
    if same_kind and source.root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out}: lies in the folder of the raw images, {root}; choose an OUT outside of it")
    if isinstance(out, Path):
        return build_dataset(source, out, *arguments, **more)
    work = work_folder(out, work_dir)
    try:
        manifest = build_dataset(source, work, *arguments, **more, url=Upload(out, work))
    except UserError as error:
        text = error.args[0]
        raise type(error)(f"{out}{text.removeprefix(str(work))}" if text.startswith(str(work)) else text) from error
    if manifest or not (work / STATE / SPOOL).exists():  # a part leaves for the next what was unpacked
        with contextlib.suppress(UserError), locked(work / STATE / "lock", "another part goes on"):
            shutil.rmtree(work, ignore_errors=True)
    return replace(manifest, root=out) if manifest else None


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
    url: OnDisk | None = None,
) -> Manifest | None:
    """Packs `source` into `out` (see `build`, build.py); with `part` only that share of the shards, and returns None.

    `progress` is called with the images packed, bytes read and images rejected since its last call, the first time for what
    earlier calls did. Before that, if images have to be unpacked, `unpacking` is called with files, images and bytes unpacked.
    `listing` holds the SourceOptions that `source` was read with, for `verify`. With `url`, the dataset is sent there.
    """
    settings = {**options.identity(), "seed": seed, "source": source.fingerprint(), **source.options}
    url = url or OnDisk()
    with at_work(out, part), contextlib.closing(url):
        url.begin()
        begun = compare_settings(out, settings)
        manifest = _complete_manifest(out)
        sizes = {shard.name: shard.bytes for split in manifest.splits.values() for shard in split.shards} if manifest else None
        if sizes is not None:
            url.look(sizes, sizes)
        reopened = manifest is not None and reopen_if_stale(manifest, source, settings, max_rejected, runner, part, notices)
        if reopened:
            manifest = sizes = None
        elif manifest is None:
            compare_versions(out, begun["versions"])
            compare_begun(out, source, settings, begun["settings"], part)
        if source.packed and sizes is not None and all(is_finished(out, shard, sizes) for shard in sizes):
            progress(source.num_images, 0, 0)
            url.finish(manifest)
            return manifest  # without unpacking everything again
        source = unpack(source, out / STATE / SPOOL, runner, unpacking) if source.packed else source
        plan = plan_shards({split: len(content) for split, content in source.splits.items()})
        mine = plan[part[0] - 1 :: part[1]] if part else plan
        record = RawRecord.of(source, settings["source"], listing or {})
        if manifest is None:
            if not reopened:
                url.look([shard.name for shard in mine], None)
            forget_stale(out, source, record, settings, plan, part, not reopened, notices)
            url.settle([shard.name for shard in mine], part is None)
        finished = {shard for shard in plan if is_finished(out, shard.name, sizes)}
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
        for shard, taken in runner.map(write_shard, tasks, progress) if pending else ():
            if manifest is not None:
                _check_restored(manifest, shard)
            url.add(shard.name)
            actions += taken
            if max(actions["rejected"], actions["suspicious"]) > limit and manifest is None:
                break
        url.wait(notices.sending)
        if manifest is None and max(actions["rejected"], actions["suspicious"]) > limit:
            _give_up(out, plan)
            url.settle([shard.name for shard in mine], part is None)
            raise _too_many_bad(out, actions, source.num_images, max_rejected)
        if manifest is None and part is None:
            manifest = write_manifest(source, record, out, settings, plan)
        if manifest is not None:
            url.finish(manifest)
        return manifest


def _too_many_bad(out: Path, actions: Counter, images: int, max_rejected: float) -> UserError:
    allowed = f"more than the {max_rejected:.2%} that `max_rejected` allows; see {out / REJECTED}"
    if (rejected := actions["rejected"]) > max_rejected * images:
        return UserError(
            f"{rejected} of {images} images are bad, {allowed}, fix them or raise the limit, and run the same command again"
        )
    return UserError(
        f"{actions['suspicious']} of {images} images would be stored nearly black or white, {allowed}, then set their `range` "
        "and choose another OUT, or raise the limit"
    )


def shard_task(source: Source, out: Path, options: ImageOptions, seed: int, shard: PlannedShard) -> ShardTask:
    images = source.images(shard.split, shard.places(len(source.splits[shard.split]), seed))
    statistics = shard.split == source.statistics_split
    return ShardTask(source.root, out, shard.name, shard.number, images, source.classes, options, statistics)


def write_shard(task: ShardTask, report: Progress) -> tuple[Shard, Counter]:
    """Writes one shard, then its state file, which marks it finished; returns it and how often each action was taken."""
    sums = PixelSums(task.options.size)
    entries: list[dict[str, str]] = []
    marks, stamps = np.zeros(len(task.images), MARK_DTYPE), filled_stamps(len(task.images), NO_STAMP)
    fresh: Counter = Counter()  # since the last report
    rejected: list[int] = []
    with owned(task.owner), ShardWriter(task.out / task.name, task.number) as writer:
        for number, (image, read) in enumerate(read_images(task.root, task.images), start=1):
            fresh["images"] += 1
            if image.note:
                entries.append({"path": image.path, "action": "noted", "reason": image.note})
            try:
                data, stamps[number - 1] = read()
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
    return shard, state.actions


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


def _check_restored(manifest: Manifest, restored: Shard) -> None:
    if all(restored not in split.shards for split in manifest.splits.values()):
        raise UserError(
            f"{manifest.root / restored.name}: rewritten, it differs from the manifest; the raw images have "
            "changed since the dataset was built, so build into another OUT"
        )
