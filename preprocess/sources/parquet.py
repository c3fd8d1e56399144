"""Images in Parquet files with a column of images and a column of labels, as dataset hubs ship them."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.splits import SPLIT_NAMES
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.decide import sort_classes
from imagefeed.preprocess.sources.listing import Listing, RawTree, find_files, scan
from imagefeed.preprocess.sources.tables import pick_column

IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "cls")
WORDNET_ID = re.compile(r"n\d{8}")
# train-00000-of-00294.parquet, train-00000-of-00294-0123456789abcdef.parquet
NUMBERED = re.compile(r"(.+?)-\d{3,}-of-\d{3,}(-[0-9a-f]+)?\.parquet")
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file; `values[label]` is the value in its label column for a class, None if it has none for that."""

    file: str
    split: str
    size: int  # bytes
    num_images: int
    image: str
    label: str | None
    values: tuple[int | str | None, ...]

    def decided(self, split: str, labels: Sequence[int]) -> "ParquetFile":
        value_of = dict(zip(labels, self.values))
        return replace(self, split=split, values=tuple(value_of.get(label) for label in range(max(labels, default=-1) + 1)))

    def read(self, root: Path) -> Iterator[tuple[str, int, bytes]]:
        """(FILE/PATH or FILE#ROW, label, bytes) of its rows. Raises UserError if the file is corrupt."""
        label_of = {value: label for label, value in enumerate(self.values)}
        columns = list(filter(None, (self.image, self.label)))
        row = 0
        with _readable(root / self.file) as parquet:
            file = parquet.ParquetFile(root / self.file, buffer_size=1 << 20, pre_buffer=False)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                for image, value in zip(batch.column(self.image).to_pylist(), labels):
                    row += 1
                    image = image if isinstance(image, dict) else {"bytes": image}
                    path = (image.get("path") or "").replace("\0", "")
                    name = f"{self.file}/{path}" if path else f"{self.file}#{row:06d}"
                    label = NO_LABEL if _unknown(value) else label_of.get(value)
                    if label is None:
                        unknown = f"label {value!r}, but there are {len(label_of)} classes"
                        raise UserError(f"{root / self.file}: row {row} has {unknown}; download the file again")
                    yield name, label, image.get("bytes") or b""


class _Header(NamedTuple):
    file: str
    columns: list[str]
    image_columns: list[str]  # those that hold bytes
    features: dict[str, dict]  # the hub's own description, as in {"label": {"_type": "ClassLabel", "names": [...]}, ...}
    rows: int


def parquet_files(root: Path) -> list[str]:
    """The Parquet files of `root`, or else of its folder data and its folders named like splits; relative to it."""
    found = find_files(root, ".parquet")[1]
    for folder in scan(root) if not found else ():
        if folder.is_dir() and folder.name in ("data", *SPLIT_NAMES):
            found += [f"{folder.name}/{name}" for name in find_files(Path(folder.path), ".parquet")[1]]
    return found


def find_parquet(root: Path, options: SourceOptions) -> RawTree:
    """Lists Parquet files, whose images are known only after unpacking.

    Classes are in the order that the files give, or sorted if their names are WordNet ids or missing.
    """
    root, names = (root.parent, [root.name]) if root.is_file() else (root, parquet_files(root))
    if not names:
        raise UserError(f"{root}: no .parquet files in it or in its folder data; give their folder, or another --layout")
    headers = [_read_header(root, name) for name in names]
    first = headers[0]
    if not first.image_columns:
        columns = ", ".join(first.columns)[:80]
        raise UserError(f"{root / first.file}: no column of images (bytes and path), only {columns}; give other files")
    image = next((name for name in IMAGE_COLUMNS if name in first.image_columns), first.image_columns[0])
    label, classes = _label_column(headers, root)
    values: tuple[int | str, ...] = tuple(range(len(classes)))
    named = bool(classes)
    if not classes:
        values = _distinct_labels(root, [header.file for header in headers if label in header.columns], label)
        classes = tuple(map(str, values))
    elif all(map(WORDNET_ID.fullmatch, classes)):
        values = tuple(sorted(values, key=classes.__getitem__))
        classes = tuple(classes[value] for value in values)
    packed = []
    for file, columns, _, _, rows in headers:
        if image not in columns:
            raise UserError(f"{root / file}: no column {image}, which {first.file} has; move other data to another folder")
        size, of_file = (root / file).stat().st_size, label if label in columns else None
        split = "" if options.one_split else _split_of(root, file)
        packed.append(ParquetFile(file, split, size, rows, image, of_file, values))
    splits = dict.fromkeys(file.split for file in packed if file.num_images)
    if not splits:
        raise UserError(f"{root / first.file}: the table has no rows; download it again")
    listings = [
        Listing(split or None, [], classes, np.empty(0, np.int32), packed=tuple(file for file in packed if file.split == split))
        for split in splits
    ]
    return RawTree(root, "Parquet", listings, classes if named else ())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator:
    """The module pyarrow.parquet to read `path` with. Raises UserError if it is not installed, or the file is corrupt."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow, which is not installed; run: pip install '.[parquet]'") from None
    try:
        yield parquet
    except (ArrowException, ValueError, TypeError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:120]}); download it again") from None


def _read_header(root: Path, name: str) -> _Header:
    with _readable(root / name) as parquet, parquet.ParquetFile(root / name) as file:
        from pyarrow import types

        schema, rows = file.schema_arrow, file.metadata.num_rows
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        features = {}
    image_columns = []
    for field in schema:
        in_struct = types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if in_struct or types.is_binary(field.type) or types.is_large_binary(field.type):
            image_columns.append(field.name)
    return _Header(name, schema.names, image_columns, features, rows)


def _label_column(headers: list[_Header], root: Path) -> tuple[str, tuple[str, ...]]:
    """The column of labels, and the names of the classes if the files have them."""
    usual = ((name, header) for name in LABEL_COLUMNS for header in headers if name in header.columns)
    name, header = next(usual, ("", headers[0]))
    if not name:
        found = [name for name, feature in header.features.items() if feature.get("_type") == "ClassLabel"]
        name = found[0] if len(found) == 1 else pick_column(root / header.file, "labels", LABEL_COLUMNS, header.columns)
    return name, tuple(map(str, header.features.get(name, {}).get("names") or ()))


def _distinct_labels(root: Path, names: list[str], label: str) -> tuple[int | str, ...]:
    """All labels in use, in the order of their classes. Reads only that column."""
    values: set = set()
    for name in names:
        with _readable(root / name) as parquet:
            values |= set(parquet.read_table(root / name, columns=[label], use_threads=False).column(label).unique().to_pylist())
    values = {value for value in values if not _unknown(value)}
    if not all(isinstance(value, (int, str)) for value in values):
        raise UserError(f"{root / names[0]}: column {label} holds neither integers nor names; give other files")
    by_name = {str(value): value for value in values}
    return tuple(by_name[name] for name in sort_classes(by_name))


def _unknown(value: object) -> bool:
    """Whether a label is unknown: null, an empty name or a negative number, which hubs give validation images."""
    return value is None or value == "" or (isinstance(value, int) and value < 0)


def _split_of(root: Path, name: str) -> str:
    folder, _, file = name.rpartition("/")
    if match := NUMBERED.fullmatch(file):
        return match[1]
    if folder in SPLIT_NAMES:
        return folder
    known = re.match(rf"({'|'.join(SPLIT_NAMES)})(?![A-Za-z])", file.removesuffix(".parquet"))
    if known is None:
        raise UserError(f"{root / name}: does not name its split; name it, as in: --split train")
    return known[1]
