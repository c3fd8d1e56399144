"""Unpacks files whose images cannot be read in place, once, into plain files of bytes beside the dataset being built.

Reading single images at random from a Parquet file costs a whole row group each, and from a video all frames before it.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagefeed.dataset.files import atomic_file, write_atomically
from imagefeed.preprocess.engine import Runner
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.listing import OWN_FILE, PLACE_DTYPE, Packed, Source, SourceSplit

REPORT_EVERY = 32  # images between two signs of life from a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class _Task:
    root: Path
    packed: Packed
    path: Path

    def __str__(self) -> str:
        return self.packed.file


def unpack(source: Source, folder: Path, runner: Runner, progress: Progress = lambda *_: None) -> Source:
    """The same source with nothing packed: what was, is in `folder`, where finished files of an earlier call are used again.

    `progress` is called with files finished, images and bytes unpacked since its last call, all images in the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder.resolve() / _name(packed) for packed in source.packed]
    finished = {path for path in paths if _table(path).exists()}
    for path in finished:
        with np.load(_table(path)) as table:
            progress(1, len(table["sizes"]), 0)
    tasks = [_Task(source.root, packed, path) for packed, path in zip(source.packed, paths) if path not in finished]
    for _ in runner.map(_unpack_file, tasks, progress) if tasks else ():
        progress(1, 0, 0)
    splits = {
        name: _join(split, [(len(source.files) + at, path) for at, path in enumerate(paths) if source.packed[at].split == name])
        for name, split in source.splits.items()
    }
    return dataclasses.replace(source, splits=splits, files=(*source.files, *map(str, paths)), packed=())


def _name(packed: Packed) -> str:
    """Says what it was unpacked from and how, so that no other file's images are ever taken for them."""
    return hashlib.sha256(repr(dataclasses.astuple(packed)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _table(path: Path) -> Path:
    return path.with_name(f"{path.name}.npz")


def _unpack_file(task: _Task, report: Progress) -> None:
    """Writes the bytes of all images, then the table of them, whose presence says that both are whole."""
    names, labels, sizes, reason = [], [], [], ""
    reported = 0
    with atomic_file(task.path) as file:
        try:
            for name, label, data in task.packed.read(task.root):
                file.write(data)
                names.append(name)
                labels.append(label)
                sizes.append(len(data))
                if len(names) % REPORT_EVERY == 0:
                    report(0, REPORT_EVERY, sum(sizes[-REPORT_EVERY:]))
                    reported = len(names)
        except BadImage as error:  # none of its images then: how many came before the fault may depend on timing
            names, labels, sizes, reason = [task.packed.file], [task.packed.label], [0], str(error)
            file.seek(0)
            file.truncate()
    table = io.BytesIO()
    np.savez(
        table,
        names=np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8),
        labels=np.array(labels, np.int32),
        sizes=np.array(sizes, np.uint64),
        reason=np.array(json.dumps(reason)),
    )
    write_atomically(_table(task.path), table.getvalue())
    report(0, len(names) - min(reported, len(names)), sum(sizes[reported:]))


def _join(split: SourceSplit, unpacked: list[tuple[int, Path]]) -> SourceSplit:
    """The images of a split with those of its unpacked files after them; numbers are those of the files in the source."""
    paths, labels, reasons = list(split.paths), [split.labels], dict(split.reasons)
    own = np.zeros(len(split), PLACE_DTYPE)
    own["file"] = OWN_FILE
    places = [own if split.places is None else split.places]
    for number, path in unpacked:
        with np.load(_table(path)) as table:
            names = table["names"].tobytes().decode("utf-8", "surrogateescape")
            sizes, reason = table["sizes"], json.loads(str(table["reason"]))
            labels.append(table["labels"])
        if reason:
            reasons[len(paths)] = reason
        paths += names.split("\0") if len(sizes) else []
        rows = np.zeros(len(sizes), PLACE_DTYPE)
        rows["file"], rows["size"], rows["offset"] = number, sizes, np.cumsum(sizes) - sizes
        places.append(rows)
    return SourceSplit(paths, np.concatenate(labels), np.concatenate(places), reasons)
