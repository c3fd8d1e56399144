"""Unpacks files whose images cannot be read in place, once, into plain files of bytes beside the dataset being built.

Reading single images in random order from a Parquet file costs a whole row group each, and from a video all frames before.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagefeed.dataset.files import atomic_file, owned, owner, write_atomically
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.sources.listing import OWN_FILE, PLACE_DTYPE, PackedTask, Source, SourceSplit, Unpacked, stamp_of

TABLE = ".npz"  # the suffix of the table that lies beside a file of bytes
REPORT_EVERY = 32  # images between two progress reports of a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class _Task(PackedTask):
    path: Path
    owner: str = field(default_factory=owner)  # of temporary files, also on another machine


def unpack(source: Source, folder: Path, runner: ProcessRunner, progress: Progress = lambda *_: None) -> Source:
    """The same source with nothing packed: the packed images are in `folder`, and files that an earlier call finished are kept.

    `progress` is called with the files finished, and the images and bytes unpacked, since its last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Names depend on the packed file, its stamp and how it is unpacked, so that images of another file are never reused.
    stamps = [stamp_of(source.root, packed.file) for packed in source.packed]
    keys = [repr((*dataclasses.astuple(packed), stamp)) for packed, stamp in zip(source.packed, stamps)]
    paths = [folder.resolve() / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] for key in keys]
    tasks = []
    for packed, path in zip(source.packed, paths):
        if path.with_suffix(TABLE).exists():
            with np.load(path.with_suffix(TABLE)) as table:
                progress(1, len(table["sizes"]), 0)
        else:
            tasks.append(_Task(source.root, packed, path))
    for _ in runner.map(_unpack_file, tasks, progress) if tasks else ():
        progress(1, 0, 0)
    splits = {
        name: _join(split, [(len(source.files) + at, path) for at, path in enumerate(paths) if source.packed[at].split == name])
        for name, split in source.splits.items()
    }
    unpacked = []
    for packed, stamp, path in zip(source.packed, stamps, paths):
        with np.load(path.with_suffix(TABLE)) as table:
            unpacked.append(Unpacked(packed.file, packed.split, len(table["sizes"]), stamp))
    files = (*source.files, *map(str, paths))
    return dataclasses.replace(source, splits=splits, files=files, packed=(), unpacked=tuple(unpacked))


def _unpack_file(task: _Task, report: Progress) -> None:
    """Writes the bytes of all images, then their table, whose existence says that both are complete."""
    rows: list[tuple[str, int, int]] = []  # name, label and size of each image
    reported = written = begin = 0
    with owned(task.owner), atomic_file(task.path) as file:

        def add(name: str, label: int, data: bytes) -> None:
            nonlocal reported, written
            written += file.write(data)
            rows.append((name, label, len(data)))
            if len(rows) - reported >= REPORT_EVERY:
                report(0, REPORT_EVERY, sum(size for _, _, size in rows[reported:]))
                reported = len(rows)

        def take_back() -> None:
            nonlocal begin
            rows.clear()
            begin = written  # not from 0 again: mounts of object stores cannot seek

        reason, note = task.read(add, take_back)
        if reason:
            rows.append((task.packed.file, task.packed.label, 0))
    names, labels, sizes = zip(*rows) if rows else ((), (), ())
    table = io.BytesIO()
    np.savez(
        table,
        names=np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),
        labels=np.array(labels, np.int32),
        sizes=np.array(sizes, np.uint64),
        begin=np.array(begin, np.uint64),
        reason=np.array(json.dumps(reason)),
        note=np.array(json.dumps(note)),
    )
    with owned(task.owner):
        if reason:
            write_atomically(task.path, b"")  # images that do not count would take the disk until the build ends
        write_atomically(task.path.with_suffix(TABLE), table.getvalue())
    report(0, len(rows) - reported, sum(sizes[reported:]))


def _join(split: SourceSplit, unpacked: list[tuple[int, Path]]) -> SourceSplit:
    """The split followed by the images of its unpacked files, each given with its number among the source's files."""
    paths, labels, reasons, notes = list(split.paths), [split.labels], dict(split.reasons), dict(split.notes)
    own = np.zeros(len(split), PLACE_DTYPE)
    own["file"] = OWN_FILE
    places = [own if split.places is None else split.places]
    for number, path in unpacked:
        with np.load(path.with_suffix(TABLE)) as table:
            names = table["names"].tobytes().decode("utf-8", "surrogateescape")
            sizes, reason, note = table["sizes"], json.loads(str(table["reason"])), json.loads(str(table["note"]))
            labels.append(table["labels"])
            begin = table["begin"] if "begin" in table.files else np.uint64(0)  # of an older program
        if reason:
            reasons[len(paths)] = reason
        if note:
            notes[len(paths)] = note
        paths += names.split("\0") if len(sizes) else []
        rows = np.zeros(len(sizes), PLACE_DTYPE)
        rows["file"], rows["size"], rows["offset"] = number, sizes, begin + np.cumsum(sizes) - sizes
        places.append(rows)
    return SourceSplit(paths, np.concatenate(labels), np.concatenate(places), reasons, notes, split.columns)
