"""Finds the raw images that have changed since an earlier build into OUT, and discards their shards, to be written again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import index_name
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.plan import PlannedShard, plan_shards
from imagefeed.preprocess.raw import RAW, RawRecord, compare_listing, since
from imagefeed.preprocess.sources.listing import NO_STAMP, Source
from imagefeed.preprocess.stale import Checking, Finished, Known, find_changed
from imagefeed.preprocess.state import SHARD_FILE, STAMP_DTYPE, STATE, ShardState, compare_versions, is_finished, record_settings


class Notices(NamedTuple):
    """`checking` is called with the number of images read again since its last call, and the total to read. `renewing` is called
    with the paths of the changed images (none if only their order has changed) and the number of shards to rewrite. `sending` is
    called with the number of shards that are still to be sent, after the last is packed."""

    checking: Checking = lambda images, total: None
    renewing: Callable[[list[str], int], None] = lambda paths, shards: None
    sending: Callable[[int], None] = lambda shards: None


SILENT = Notices()


def reopen_if_stale(
    manifest: Manifest,
    source: Source,
    settings: dict,
    max_rejected: float,
    runner: Runner,
    part: tuple[int, int] | None,
    notices: Notices,
) -> bool:
    """Whether RAW has changed since the dataset was finished. If so, turns it into an unfinished build without the stale shards.

    Raises UserError if RAW lists other images, or too many can no longer be read. `source` is not unpacked.
    """
    out, begun = manifest.folder, manifest.options
    finished = Finished.load(manifest)
    if finished is None:
        _compare_source(out, None, source, settings, begun, part)
        return False
    in_order = _compare_source(out, finished.record, source, settings, begun, part)
    changed = finished.find_changed(source, runner, notices.checking) if in_order else None
    if changed is not None and not any(map(len, changed.values())) and begun["source"] == settings["source"]:
        finished.save_stamps()
        return False
    lengths = finished.record.lengths
    plan = plan_shards(lengths)
    stale = set(plan) if changed is None else _hit(plan, lengths, settings["seed"], changed)
    paths = _paths(finished.record, changed or {})
    need = f"{describe_changes(paths, len(stale))} and {plural(len(stale), 'shard')} must be rewritten, but it was "
    compare_versions(out, manifest.versions, need)
    if part:
        changes = f"{describe_changes(paths, len(stale))} since the build finished"
        raise UserError(f"{out}: {changes}; run build without `part` to rewrite the shards")
    lost = {split: at[finished.stamps[split][at]["size"] == NO_STAMP[0]] for split, at in (changed or {}).items()}
    rejected = sum(map(len, lost.values())) + manifest.rejected.get("rejected", 0)
    if any(map(len, lost.values())) and rejected > max_rejected * sum(lengths.values()):
        names = _paths(finished.record, lost)
        raise UserError(
            f"{out}: {plural(len(names), 'raw image')} can no longer be read ({first_few(names)}), more than `max_rejected` "
            "allows; restore them, or raise the limit; the dataset is unchanged"
        )
    notices.renewing(paths, len(stale))
    keep = [shard for shard in plan if shard not in stale]
    finished.reopen([(shard, shard.places(lengths[shard.split], settings["seed"])) for shard in keep], settings)
    return True


def compare_begun(out: Path, source: Source, settings: dict, begun: dict, part: tuple[int, int] | None) -> None:
    """Raises UserError if an unfinished build was started with other images than `source` lists. `source` is not unpacked."""
    record = RawRecord.load(out / STATE / RAW)
    if record is not None or part:  # without a record, nothing is packed yet
        _compare_source(out, record, source, settings, begun, part)


def forget_stale(
    out: Path,
    source: Source,
    record: RawRecord,
    settings: dict,
    plan: list[PlannedShard],
    part: tuple[int, int] | None,
    check: bool,
    notices: Notices,
) -> None:
    """Discards the finished shards of an unfinished build whose raw images have changed; without `check`, none have.

    `record` is that of `source`, which is unpacked.
    """
    path = out / STATE / RAW
    before = RawRecord.load(path)
    mine = plan[part[0] - 1 :: part[1]] if part else plan
    finished = [shard for shard in mine if is_finished(out, shard.name, None)]
    if before is not None and not before.lists_the_same(record):
        if part:
            raise UserError(f"{out}: RAW lists its images in another order than before; run build without `part` first")
        notices.renewing([], len(finished))
        for state in (out / STATE).glob("*.tfrecord.npz"):
            state.unlink()
    elif check and finished:
        _forget_changed(out, source, record, settings["seed"], finished, notices)
    if not part:
        _remove_others(out, plan)
    if before is None or before.fingerprint != record.fingerprint or not before.lists_the_same(record):
        record.save(path, deflate=False)
        record_settings(out, settings)


def _compare_source(
    out: Path, record: RawRecord | None, source: Source, settings: dict, begun: dict, part: tuple[int, int] | None
) -> bool:
    """Whether the source lists the build's images in their order. Raises UserError if it lists other images."""
    if begun["source"] == settings["source"]:
        return True
    if record is None or part:
        raise UserError(f"{out}: RAW has changed since {since(out)}; restore it, or choose another OUT")
    return compare_listing(out, record, source)


def _forget_changed(
    out: Path, source: Source, record: RawRecord, seed: int, finished: list[PlannedShard], notices: Notices
) -> None:
    lengths = record.lengths
    known = {
        split: Known(np.empty(0, np.int64), np.zeros(length, MARK_DTYPE), np.zeros(length, STAMP_DTYPE))
        for split, length in lengths.items()
    }
    for shard in finished:
        at, marks, stamps = known[shard.split]
        places, state = shard.places(lengths[shard.split], seed), ShardState.load(out, shard.name)
        marks[places], stamps[places] = state.marks, state.stamps
        known[shard.split] = Known(np.union1d(at, places), marks, stamps)
    before = {split: each.stamps.copy() for split, each in known.items()}
    changed = find_changed(source, known, notices.checking)
    stale = _hit(finished, lengths, seed, changed)
    if stale:
        notices.renewing(_paths(record, changed), len(stale))
    for shard in finished:
        places, stamps = shard.places(lengths[shard.split], seed), known[shard.split].stamps
        if shard in stale:
            ShardState.load(out, shard.name).forget(out)
        elif not np.array_equal(stamps[places], before[shard.split][places]):
            dataclasses.replace(ShardState.load(out, shard.name), stamps=stamps[places]).save(out)


def _hit(plan: list[PlannedShard], lengths: dict[str, int], seed: int, changed: dict[str, np.ndarray]) -> set[PlannedShard]:
    """The shards that hold changed images."""
    found = {split: np.isin(np.arange(length), changed[split]) for split, length in lengths.items()}
    return {shard for shard in plan if found[shard.split][shard.places(lengths[shard.split], seed)].any()}


def _paths(record: RawRecord, places: dict[str, np.ndarray]) -> list[str]:
    found = []
    for split, at in places.items():
        paths = record.splits[split].paths if len(at) else []
        found += [paths[place] for place in np.sort(at).tolist()]
    return found


def describe_changes(paths: list[str], stale_shards: int) -> str:
    if not paths and not stale_shards:
        return "columns or other details of RAW have changed, but no image"
    if not paths:
        return "RAW lists its images in another order"
    return f"{plural(len(paths), 'raw image')} {'has' if len(paths) == 1 else 'have'} changed ({first_few(paths)})"


def _remove_others(out: Path, plan: list[PlannedShard]) -> None:
    """Removes shards of an earlier plan for another number of images."""
    known = {name for shard in plan for name in (shard.name, index_name(shard.name))}
    for path in out.iterdir():
        if SHARD_FILE.fullmatch(path.name) and path.name not in known:
            path.unlink()
