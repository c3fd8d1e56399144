"""Compares a raw tree, image by image, with the images that a dataset was built from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.storage import Url
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.raw import RAW, RawRecord, class_name
from imagefeed.preprocess.sources.detect import read_tree
from imagefeed.preprocess.sources.listing import Source
from imagefeed.preprocess.stale import NumberedTask, read_marks, read_packed

CHANGED = "run build again to repack it"
MISSING = "restore it, or build into another OUT"
ADDED = "remove it, or build into another OUT"
MOVED = "build into another OUT"


def load_record(manifest: Manifest) -> RawRecord:
    record = RawRecord.of_dataset(manifest)
    if record is None:
        raise UserError(
            f"{manifest.root / RAW}: missing, damaged, or from another dataset, so the raw images cannot be compared; "
            "build them into another OUT"
        )
    return record


def compare_raw(
    record: RawRecord, raw: Path | Url | str, runner: Runner, report: Callable[[int], None]
) -> Iterator[tuple[str, str, str]]:
    """Yields the path of each image that differs, what is wrong with it, and what to do. Reads every image of `raw`, including
    rejected ones, and compares size and CRC-32C. `report` is called with the number of images compared since its last call."""
    source = read_tree(raw, SourceOptions(**record.listing))
    packed = _read_all_packed(source, runner, report)
    missing, added = [], []  # (path, split)
    for split, before in record.splits.items():
        own = source.splits[split] if split in source.splits else None
        paths, labels = ([*own.paths], [own.labels]) if own else ([], [])
        marks = [np.zeros(len(paths), MARK_DTYPE)]
        for names, labels_of, marks_of in packed.get(split, ()):
            paths += names
            labels.append(labels_of)
            marks.append(marks_of)
        now, labels_now = np.concatenate(marks), np.concatenate([*labels, np.empty(0, np.int32)])
        for at, found, _ in read_marks(source, split, np.arange(len(own.paths))) if own else ():
            now[at] = found
            report(len(at))
        places: dict[str, list[int]] = {}  # a table may list an image more than once
        for place, path in enumerate(paths):
            places.setdefault(path, []).append(place)
        for path, label, mark in zip(before.paths, before.labels.tolist(), before.marks):
            if not places.get(path):
                missing.append((path, split))
                continue
            place = places[path].pop(0)
            name, was = class_name(source.classes, int(labels_now[place])), class_name(record.classes, label)
            if now[place] != mark:
                yield path, "has changed since it was packed", CHANGED
            elif name != was:
                yield path, f"is in class {name or 'unknown'!r}, but was packed as {was or 'unknown'!r}", MISSING
        added += [(path, split) for path, left in places.items() for _ in left]
    moved_to, moved_from = dict(added), dict(missing)
    for path, split in missing:
        if path in moved_to:
            yield path, f"is in split {moved_to[path]} now, but was packed in {split}", MOVED
        else:
            yield path, "is missing", MISSING
    yield from ((path, "was added after the build", ADDED) for path, _ in added if path not in moved_from)
    if not missing and not added:
        columns = source.column_digests()
        for name in [name for name, digest in record.columns.items() if columns.get(name) != digest]:
            yield f"column {name}", "has changed since it was packed", CHANGED
    for split in source.splits.keys() - record.splits.keys():
        yield split, "is a split that was added after the build", ADDED


def _read_all_packed(
    source: Source, runner: Runner, report: Callable[[int], None]
) -> dict[str, list[tuple[list[str], np.ndarray, np.ndarray]]]:
    """Names, labels and marks of the images of the packed files of each split."""
    tasks = [NumberedTask(source.root, packed, number) for number, packed in enumerate(source.packed)]
    found: dict[str, list] = {}
    for number, *columns in sorted(runner.map(read_packed, tasks, report) if tasks else (), key=lambda one: one[0]):
        found.setdefault(source.packed[number].split, []).append(columns)
    return found
