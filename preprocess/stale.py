"""Finds the raw images that have changed since they were packed: by the size and time of their files, then by their bytes.

Of a finished dataset, build.npz keeps what only this needs: the stamps of raw files, and what restores the state of each shard.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.files import hash_file, read_file
from imagefeed.dataset.manifest import NAME, Manifest
from imagefeed.dataset.records import crc32c
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.plan import PlannedShard
from imagefeed.preprocess.raw import RAW, RawRecord, load_members, save_members
from imagefeed.preprocess.sources.listing import NO_STAMP, OWN_FILE, PackedTask, Source, file_stamp, read_stamped, stamp_of
from imagefeed.preprocess.state import REJECTED, STATE, ShardState, filled_stamps, record_settings
from imagefeed.preprocess.statistics import PixelSums

BUILD = "build.npz"
UNKNOWN = -2, 0  # a stamp that differs from any other
# Threads hide the latency of disks and network file systems. In memory, a stat costs 5 us of CPU time, however many there are.
THREADS = 16
STATS_AT_ONCE, READS_AT_ONCE = 1024, 32  # of one thread

Checking = Callable[[int, int], None]


class Known(NamedTuple):
    """What is known about the images of a split: full columns of `marks` and `stamps`, valid at the places `at`."""

    at: np.ndarray
    marks: np.ndarray
    stamps: np.ndarray


def find_changed(source: Source, known: dict[str, Known], checking: Checking) -> dict[str, np.ndarray]:
    """Returns the places of the images whose bytes differ from their marks, by split. Updates the stamps.

    `checking` is called with the number of images read again since its last call, and the total to read.
    """
    suspects = {}
    for split, (at, _, stamps) in known.items():
        suspects[split] = at[_stamps_now(source, split, at) != stamps[at]]
    total = sum(map(len, suspects.values()))
    changed = {}
    for split, (_, marks, stamps) in known.items():
        changed[split] = [np.empty(0, np.int64)]
        for places, marks_now, stamps_now in read_marks(source, split, suspects[split]):
            readable, was_readable = (each["size"] != NO_STAMP[0] for each in (stamps_now, stamps[places]))
            changed[split].append(places[(marks_now != marks[places]) | (readable != was_readable)])
            stamps[places] = stamps_now
            checking(len(places), total)
    return {split: np.concatenate(places) for split, places in changed.items()}


def read_marks(source: Source, split: str, at: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Reads images of a split again. Yields the places `at` in batches, with their marks and stamps."""

    def read(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        marks, stamps = np.zeros(len(places), MARK_DTYPE), filled_stamps(len(places), NO_STAMP)
        for number, image in enumerate(source.images(split, places)):
            with contextlib.suppress(BadImage):
                data, stamps[number] = read_stamped(source.root, image)
                marks[number] = crc32c(data), len(data)
        return places, marks, stamps

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(read, _cut(at, READS_AT_ONCE))


def _stamps_now(source: Source, split: str, at: np.ndarray) -> np.ndarray:
    """The current stamps of the files that hold the images `at`; one stat per file."""
    content = source.splits[split]
    stamps = filled_stamps(len(at), NO_STAMP)
    numbers = np.full(len(at), OWN_FILE) if content.places is None else content.places["file"][at]
    for number in set(numbers[numbers != OWN_FILE].tolist()):
        stamps[numbers == number] = stamp_of(source.root, source.files[number])
    own = np.flatnonzero(numbers == OWN_FILE)

    folder = os.path.join(str(source.root), "")

    def stat(places: np.ndarray) -> np.ndarray:
        found: list[int] = []
        for place in at[places].tolist():
            path = content.paths[place]
            found += file_stamp(path if path[:1] == "/" else folder + path)
        return np.array(found, np.int64).reshape(-1, 2)

    with ThreadPoolExecutor(THREADS) as threads:
        for places, found in zip(cuts := _cut(own, STATS_AT_ONCE), threads.map(stat, cuts)):
            stamps["size"][places], stamps["mtime_ns"][places] = found.T
    return stamps


def _cut(at: np.ndarray, size: int) -> list[np.ndarray]:
    return [at[start : start + size] for start in range(0, len(at), size)]


@dataclass(frozen=True)
class NumberedTask(PackedTask):
    number: int


def read_packed(task: NumberedTask, report: Callable) -> tuple[int, list[str], np.ndarray, np.ndarray]:
    """For a worker: the number of a packed file, and the names, labels and marks of its images."""
    rows: list[tuple[str, int, tuple[int, int]]] = []

    def add(name: str, label: int, data: bytes) -> None:
        rows.append((name, label, (crc32c(data), len(data))))
        report(1)

    reason, _ = task.read(add, rows.clear)
    if reason:
        rows.append((task.packed.file, task.packed.label, (0, 0)))  # type: ignore[attr-defined]
    names, labels, marks = map(list, zip(*rows) if rows else ((), (), ()))
    return task.number, names, np.array(labels, np.int32), np.array(marks, MARK_DTYPE)


@dataclass(frozen=True)
class Finished:
    """A finished dataset, with its record of the raw images."""

    manifest: Manifest
    record: RawRecord
    stamps: dict[str, np.ndarray]

    @classmethod
    def load(cls, manifest: Manifest) -> "Finished | None":
        """Returns None if the dataset has no record of its raw images, as in imagefeed 0.1."""
        record = RawRecord.of_dataset(manifest)
        if record is None or [*record.splits] != [*manifest.splits]:
            return None
        found = load_members(manifest.folder / BUILD, lambda name: name.endswith(".stamps"))
        stamps = {}
        for name, split in record.splits.items():
            stamps[name] = found.get(f"{name}.stamps", np.empty(0))
            if len(stamps[name]) != len(split.labels):
                stamps[name] = filled_stamps(len(split.labels), UNKNOWN)
        return cls(manifest, record, stamps)

    def find_changed(self, source: Source, runner: Runner, checking: Checking) -> dict[str, np.ndarray] | None:
        """Like the function, for a source that is not unpacked. None if packed files now hold other images."""
        splits = self.record.splits
        known = {name: Known(np.arange(self.record.own(name)), splits[name].marks, self.stamps[name]) for name in splits}
        changed = find_changed(source, known, checking)
        tasks, ranges = [], [places for _, places in self.record.places()]
        for number, (packed, places) in enumerate(zip(source.packed, ranges)):
            now = stamp_of(source.root, packed.file)
            if not len(places) or now != self.stamps[packed.split][places[0]].item():
                tasks.append(NumberedTask(source.root, packed, number))
                self.stamps[packed.split][places] = now
        for number, names, labels, marks in runner.map(read_packed, tasks) if tasks else ():
            split, places = source.packed[number].split, ranges[number]
            before = splits[split]
            if names != [before.paths[place] for place in places] or labels.tolist() != before.labels[places].tolist():
                return None
            changed[split] = np.concatenate([changed[split], places[marks != before.marks[places]]])
        return changed

    def save_stamps(self) -> None:
        """Updates the stamps in build.npz if they differ; the other members stay."""
        members = load_members(self.manifest.folder / BUILD)
        stamps = {f"{split}.stamps": values for split, values in self.stamps.items()}
        if any(not np.array_equal(members.get(name, np.empty(0)), values) for name, values in stamps.items()):
            _save(self.manifest.folder, members | stamps)

    def reopen(self, keep: list[tuple[PlannedShard, np.ndarray]], settings: dict) -> None:
        """Turns the dataset into an unfinished build that has only the shards to keep, given with the places of their images."""
        out = self.manifest.folder
        for path in (out / STATE).glob("*.npz"):
            path.unlink()  # of an earlier attempt
        for state in self._states(keep):
            state.save(out)
        record_settings(out, settings)
        if keep:
            dataclasses.replace(self.record, fingerprint=settings["source"]).save(out / STATE / RAW, deflate=False)
        (out / NAME).unlink()

    def _states(self, keep: list[tuple[PlannedShard, np.ndarray]]) -> Iterator[ShardState]:
        manifest, members = self.manifest, load_members(self.manifest.folder / BUILD)
        if hash_file(manifest.folder / REJECTED) != manifest.files[REJECTED]:
            return
        lines = read_file(manifest.folder / REJECTED).splitlines()
        names = [shard.name for split in manifest.splits.values() for shard in split.shards]
        counts = members.get("entries", np.empty(0, np.int64))
        ends = dict(zip(names, np.cumsum(counts).tolist())) if len(counts) == len(names) else {}
        lengths = dict(zip(names, counts.tolist()))
        indexes = {split: manifest.load_index(split) for split in manifest.splits}
        for (split, number, *_), places in keep:
            shard, index = manifest.splits[split].shards[number], indexes[split]
            if shard.name not in members or shard.name not in ends:
                continue
            entries = [json.loads(line) for line in lines[ends[shard.name] - lengths[shard.name] : ends[shard.name]]]
            rows = np.array(index[np.searchsorted(index["shard"], number) : np.searchsorted(index["shard"], number, "right")])
            marks, stamps = self.record.splits[split].marks[places], self.stamps[split][places]
            rejected = np.flatnonzero(np.isin(places, members.get(f"{split}.rejected", np.empty(0, np.int64))))
            yield ShardState(shard, entries, rows, marks, stamps, PixelSums.unpack(members[shard.name]), rejected)


def save_build(
    out: Path, stamps: dict[str, np.ndarray], rejected: dict[str, np.ndarray], entries: list[int], sums: dict[str, np.ndarray]
) -> None:
    """Writes build.npz: stamps of the images of each split and the places of those rejected, and the number of lines in
    rejected.jsonl and sums of each shard."""
    of_splits = {f"{split}.stamps": values for split, values in stamps.items()}
    of_splits |= {f"{split}.rejected": values for split, values in rejected.items()}
    _save(out, {**of_splits, "entries": np.array(entries, np.int64), **sums})


def _save(out: Path, members: dict[str, np.ndarray]) -> None:
    save_members(out / BUILD, members.items(), lambda name: name.endswith(".stamps"))  # sums are compressed already
