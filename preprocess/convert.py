"""The command `convert` as a function: writes a dataset in the forms that other programs read."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import locked, sync_folder
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import CorruptRecord, RecordReader
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.storage import Url, place
from imagefeed.preprocess import formats
from imagefeed.preprocess.formats import Sample, Target
from imagefeed.preprocess.options import FORMATS, check_choice


class Converted(NamedTuple):
    """What `convert` wrote: the number of records, a sentence for each corrupt record left out, and notes for the user."""

    records: int
    corrupt: list[str]
    notes: list[str]


def convert(
    out: str | Path | Url,
    dest: str | Path,
    *,
    format: str,
    split: str | None = None,
    on_progress: Callable[[int, int], None] = lambda records, total: None,
    on_problem: Callable[[str], None] = lambda sentence: None,
) -> Converted:
    """Writes the records of the dataset `out`, a folder or a URL, into the new folder `dest`; the JPEGs stay byte for byte.

        from imagefeed import convert

        convert("/data/imagenet-256", "/data/imagenet-wds", format="webdataset")

    format: "folders" writes SPLIT/CLASS/NAME.jpg. "webdataset" writes SPLIT-000000.tar with KEY.jpg, KEY.cls (the label) and
        KEY.json (file name, class name, columns). Both write the class names to classes.txt, in label order. "parquet" writes
        data/SPLIT-00000-of-00001.parquet with columns image and label as Hugging Face's datasets has them, and the kept columns.
        "tfrecord" writes the shards once more, with the kept columns as further features; without columns it is refused,
        because the dataset's own shards are TFRecord files.
    split: only this split; by default all.
    on_progress: called with the number of records written so far, and of all.
    on_problem: called with a sentence for each corrupt record, which is left out.

    `dest` appears when it is complete. Raises UserError if it exists and is not empty, or the dataset does not fit the format.
    """
    check_choice("format", format, FORMATS)
    manifest = Manifest.load(out)
    if isinstance(where := place(dest), Url):
        raise UserError(f"{where}: convert writes to a disk; give a folder, and upload it by the tools of the store")
    dest = where.resolve()
    splits = [split] if split is not None else list(manifest.splits)
    total = sum(manifest.split(name).records for name in splits)
    if isinstance(manifest.root, Path) and dest.is_relative_to(manifest.root.resolve()):
        raise UserError(f"{dest}: lies in the dataset itself; choose a DEST outside of it")
    corrupt: list[str] = []
    unlabeled: Counter = Counter()
    done = 0

    def samples(reader: RecordReader, ids: range) -> Iterator[Sample]:
        nonlocal done
        columns = {name: manifest.load_column(reader.split, name) for name in manifest.columns}
        for record_id, record in zip(ids, reader.records(ids)):
            if isinstance(record, CorruptRecord):
                corrupt.append(str(record))
                on_problem(str(record))
                continue
            unlabeled[reader.split] += record.label == NO_LABEL
            yield Sample(record_id, record, {name: column[record_id] for name, column in columns.items()})
            done += 1
            on_progress(done, total)

    with _new_folder(dest) as folder:
        target = Target(folder, manifest)
        write = getattr(formats, format)(target)
        for name in splits:
            reader = RecordReader(manifest, name)
            shard_of = manifest.load_index(name)["shard"]
            for number in range(shards := len(manifest.split(name).shards)):
                ids = range(int(np.searchsorted(shard_of, number)), int(np.searchsorted(shard_of, number, "right")))
                write(name, number, shards, samples(reader, ids))
    notes = target.notes
    notes += [
        f"{plural(count, 'image')} of {name} without a label: {target.unlabeled.format(split=name)}"
        for name, count in unlabeled.items()
        if count
    ]
    return Converted(done, corrupt, notes)


@contextlib.contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """A folder to write, which is synced and takes the name `dest` at the end; an exception leaves nothing behind."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest}: exists and is not an empty folder; choose another DEST, or remove it")
    temporary = dest.with_name(f".{dest.name}.converting")
    temporary.mkdir(parents=True, exist_ok=True)
    with locked(temporary, f"{dest}: another convert is writing it; wait until it ends, or choose another DEST"):
        try:
            for path in temporary.iterdir():  # of a run that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield temporary
            os.sync()  # once, because syncing each of a million small files would take hours
            temporary.rename(dest)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_folder(dest.parent)
