"""The forms in which `convert` writes a dataset: folders, WebDataset's shards, Parquet files, TFRecord files.

Each form is a function of a Target that refuses what it cannot hold, and returns the function that writes a shard.
"""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagefeed.dataset.columns import LISTS, TEXT
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import NO_LABEL, Record, ShardWriter, encode_feature, shard_name
from imagefeed.preprocess.sources.columns import LONGEST_NAME
from imagefeed.preprocess.sources.suffixes import IMAGES, suffix

CLASSES = "classes.txt"
ROWS_AT_ONCE = 256  # 6 MB; readers of a Parquet file hold a row group
PARQUET_COLUMNS = ("image", "label")


class Sample(NamedTuple):
    record_id: int
    record: Record
    columns: dict[str, Any]


@dataclass
class Target:
    """A folder to write into, and the dataset; `unlabeled` says where images without a label are in a split."""

    folder: Path
    manifest: Manifest
    notes: list[str] = field(default_factory=list)
    unlabeled: str = ""

    def write_classes(self) -> None:
        (self.folder / CLASSES).write_text("".join(f"{name}\n" for name in self.manifest.classes), "utf-8")


WriteShard = Callable[[str, int, int, Iterator[Sample]], None]


def folders(target: Target) -> WriteShard:
    """SPLIT/CLASS/NAME.jpg, named like the raw image."""
    classes = target.manifest.classes
    for name in classes:
        parts = name.split("/")
        if any(part in ("", ".", "..") or part.startswith(".") for part in parts) or "\0" in name:
            raise UserError(f"{target.manifest.root}: class {name!r} cannot be the name of a folder; use another format")
        for depth in range(1, len(parts)):
            if (outer := "/".join(parts[:depth])) in classes:
                raise UserError(f"{target.manifest.root}: the folder of class {name} lies in that of {outer}; use another format")
    aside = next(name for name in ("unlabeled" + "_" * more for more in itertools.count()) if name not in classes)
    target.unlabeled = f"they are in {{split}}/{aside}, which is no class"
    if target.manifest.columns:
        target.notes.append(f"folders hold no columns, so {', '.join(target.manifest.columns)} are left out")
    if list(classes) != sorted(classes):
        target.notes.append(f"readers sort the classes by name; their label order is in {CLASSES}, for build --classes")
    target.write_classes()

    def write(split: str, number: int, shards: int, samples: Iterator[Sample]) -> None:
        for record_id, record, _ in samples:
            folder = target.folder / split / (aside if record.label == NO_LABEL else classes[record.label])
            folder.mkdir(parents=True, exist_ok=True)
            name = image_name(record)
            for more in itertools.chain([""], (f"-{record_id}" + "_" * times for times in itertools.count())):
                try:
                    with open(folder / f"{name}{more}.jpg", "xb") as file:
                        file.write(record.jpeg)
                    break
                except FileExistsError:  # two raw images of one name, from different folders
                    continue

    return write


def image_name(record: Record) -> str:
    """The name of the raw image without its folder and suffix, as a visible file's."""
    name = record.filename.rpartition("/")[2].replace("\0", "")
    if suffix(name) in IMAGES:
        name = name.rpartition(".")[0]
    return os.fsdecode(os.fsencode(name.lstrip("."))[:LONGEST_NAME]) or "image"


def webdataset(target: Target) -> WriteShard:
    """SPLIT-000000.tar of KEY.jpg, KEY.cls and KEY.json, as webdataset decodes them; the key is the record's number."""
    target.unlabeled = "their KEY.cls is -1"
    target.write_classes()

    def write(split: str, number: int, shards: int, samples: Iterator[Sample]) -> None:
        with tarfile.open(target.folder / f"{split}-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for record_id, record, columns in samples:
                about = {"filename": printable(record.filename), "class_name": record.class_name}
                about |= {name: plain(value) for name, value in columns.items()}
                text = json.dumps(about, ensure_ascii=False)
                for kind, data in (("jpg", record.jpeg), ("cls", str(record.label).encode()), ("json", text.encode())):
                    member = tarfile.TarInfo(f"{record_id:08d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    return write


def plain(value: Any) -> Any:
    """A column's value as JSON has it: null for a missing number."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if value != value else value


def printable(path: str) -> str:
    """The path with escapes for bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def parquet(target: Target) -> WriteShard:
    """data/SPLIT-00000-of-00001.parquet with the columns and the description that Hugging Face's datasets writes."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise UserError("Parquet files need pyarrow, which is not installed; run: pip install '.[parquet]'") from None
    manifest = target.manifest
    if taken := [name for name in PARQUET_COLUMNS if name in manifest.columns]:
        raise UserError(f"{manifest.root}: its column {taken[0]} has the name of Parquet's own; use another format")
    target.unlabeled = "their label is -1"
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image), ("label", pyarrow.int64())]
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"names": list(manifest.classes), "_type": "ClassLabel"}}
    for name, kind in manifest.columns.items():
        dtype, several = "string", False
        if kind != TEXT:
            values = manifest.load_column(next(iter(manifest.splits)), name).values
            dtype, several = ("int64" if values.dtype == np.int64 else "float64"), kind == LISTS or values.ndim > 1
        feature: dict[str, Any] = {"dtype": dtype, "_type": "Value"}
        arrow = {"string": pyarrow.string(), "int64": pyarrow.int64(), "float64": pyarrow.float64()}[dtype]
        features[name] = {"feature": feature, "_type": "Sequence"} if several else feature
        fields.append((name, pyarrow.list_(arrow) if several else arrow))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([pyarrow.field(*each) for each in fields], metadata)
    (target.folder / "data").mkdir()

    def write(split: str, number: int, shards: int, samples: Iterator[Sample]) -> None:
        path = target.folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        # JPEGs do not get smaller by compression.
        with ParquetWriter(path, schema, compression={"label": "zstd"}, use_dictionary=False) as file:
            while rows := list(itertools.islice(samples, ROWS_AT_ONCE)):
                columns = [
                    [{"bytes": record.jpeg, "path": printable(record.filename)} for _, record, _ in rows],
                    [record.label for _, record, _ in rows],
                    *([plain(row.columns[name]) for row in rows] for name in manifest.columns),
                ]
                arrays = [pyarrow.array(values, each.type) for values, each in zip(columns, schema)]
                file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

    return write


def tfrecord(target: Target) -> WriteShard:
    """The shards once more, each record with its columns as further features of the tf.train.Example."""
    manifest = target.manifest
    if not manifest.columns:
        raise UserError(
            f"{manifest.root}: its shards are TFRecord files of tf.train.Example already, with image/encoded, image/class/label "
            "and others, and it has no columns to add; read SPLIT-*.tfrecord as they are"
        )
    if taken := [name for name in manifest.columns if name.startswith("image/")]:
        raise UserError(f"{manifest.root}: its column {taken[0]} may have the name of a record's own; use another format")
    target.unlabeled = "their image/class/label is -1"
    *others, last = manifest.columns
    stored = (
        f"{', '.join(others)} and {last} are stored as features with these names" if others else f"{last} is stored as a feature"
    )
    target.notes.append(f"{stored}; fractions are rounded to float32")

    def write(split: str, number: int, shards: int, samples: Iterator[Sample]) -> None:
        with ShardWriter(target.folder / shard_name(split, number, shards), number) as shard:
            for _, record, columns in samples:
                shard.append(record, b"".join(encode_feature(name, value) for name, value in columns.items()))

    return write
