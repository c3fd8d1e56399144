"""Images in Parquet files with a column of images and a column of labels, as dataset hubs ship them."""

import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.splits import SPLIT_NAMES, split_role
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.columns import refuse_unknown
from imagefeed.preprocess.sources.decide import refuse_several_splits, sort_classes
from imagefeed.preprocess.sources.labels import name_labels
from imagefeed.preprocess.sources.listing import Listing, RawTree, Root, find_files, list_folder, stamp_of
from imagefeed.preprocess.sources.remote import THREADS, RemoteFile, RemotePath
from imagefeed.preprocess.sources.tables import pick_column

IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "cls")
WORDNET_ID = re.compile(r"n\d{8}")
# train-00000-of-00294.parquet, train-00000-of-00294-0123456789abcdef.parquet
NUMBERED = re.compile(r"(.+?)-\d{3,}-of-\d{3,}(-[0-9a-f]+)?\.parquet")
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file; `values[label]` is the value that its label column has for a class, None if that class does not occur."""

    file: str
    split: str
    size: int  # bytes
    num_images: int
    image: str
    label: str | None
    values: tuple[Hashable, ...]

    def decided(self, split: str, labels: Sequence[int]) -> "ParquetFile":
        value_of = dict(zip(labels, self.values))
        return replace(self, split=split, values=tuple(value_of.get(label) for label in range(max(labels, default=-1) + 1)))

    def read(self, root: Root) -> Iterator[tuple[str, int, bytes]]:
        """(FILE/PATH or FILE#ROW, label, bytes) of its rows. Raises UserError if the file is corrupt."""
        label_of = {value: label for label, value in enumerate(self.values)}
        columns = list(filter(None, (self.image, self.label)))
        row = 0
        with _readable(root / self.file) as parquet, contextlib.ExitStack() as stack:
            source = _source(root / self.file)
            file = stack.enter_context(parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False))
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                for image, value in zip(batch.column(self.image).to_pylist(), labels):
                    row += 1
                    image = image if isinstance(image, dict) else {"bytes": image}
                    path = (image.get("path") or "").replace("\0", "")
                    name = f"{self.file}/{path}" if path else f"{self.file}#{row:06d}"
                    label = NO_LABEL if _is_unknown(value) else label_of.get(value)
                    if label is None:
                        unknown = f"label {value!r}, but there are {len(label_of)} classes"
                        raise UserError(f"{root / self.file}: row {row} has {unknown}; download the file again")
                    yield name, label, image.get("bytes") or b""


class _Header(NamedTuple):
    file: str
    columns: list[str]
    image_columns: list[str]  # those that hold bytes
    nested: dict[str, str]  # types of the columns that hold lists or structs
    features: dict[str, dict]  # the hub's own description, as in {"label": {"_type": "ClassLabel", "names": [...]}, ...}
    rows: int


class _Labels(NamedTuple):
    """The values in a file's label column, by their text, and the number of rows with each."""

    values: dict[str, Hashable]
    rows: dict[str, int]


def parquet_files(root: Root) -> list[str]:
    """The Parquet files of `root`, or else of its folder data and its folders named like splits; relative to it."""
    found = find_files(root, ".parquet")[1]
    for folder in list_folder(root)[1] if not found else ():
        if folder == "data" or split_role(folder):
            found += [f"{folder}/{name}" for name in find_files(root / folder, ".parquet")[1]]
    return found


def find_parquet(root: Root, options: SourceOptions) -> RawTree:
    """Lists Parquet files, whose images are known only after unpacking.

    Classes are in the order that the files give, or sorted if their names are WordNet ids or missing.
    """
    root, names = (root.parent, [root.name]) if root.is_file() else (root, parquet_files(root))
    if not names:
        raise UserError(f"{root}: no .parquet files in it or in its folder data; give their folder, or another --layout")
    if options.one_split:
        refuse_several_splits(root, [_name_of_split(name) for name in names])
    with ThreadPoolExecutor(THREADS) as threads:
        headers = list(threads.map(functools.partial(_read_header, root), names))
    refuse_unknown(root, options.columns, (name for header in headers for name in header.columns))
    label, classes = _label_column(headers, root, options.columns)
    image = _image_column(headers, root, label)
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda header: _read_labels(root, header, label, bool(classes)), headers)
        labels = dict(zip([header.file for header in headers], found))
    if classes:
        values: dict[str, Hashable] = {name: value for value, name in enumerate(classes)}
        order = tuple(sorted(classes) if all(map(WORDNET_ID.fullmatch, classes)) else classes)
        of_number = {str(value): name for name, value in values.items()}  # others are refused when they are unpacked
        texts = {text for found in labels.values() for text in found.rows}
        class_of = {text: "" if text.startswith("-") else of_number.get(text.removesuffix(".0"), text) for text in texts}
    else:
        texts = {text for found in labels.values() for text in found.rows}
        if label and not any(texts):
            raise UserError(f"{root / headers[0].file}: column {label} is empty in every row; add labels, or remove the column")
        class_of = name_labels(texts, f"{root / headers[0].file}: column {label}")
        values = {class_of[text]: value for found in labels.values() for text, value in found.values.items()}
        order = ()
    splits: dict[str, list[_Header]] = {}
    for header in filter(lambda header: header.rows, headers):
        splits.setdefault("" if options.one_split else _split_of(root, header.file), []).append(header)
    listings = []
    for split, those in splits.items():
        names = order or sort_classes({class_of[text] for header in those for text in labels[header.file].values} - {""})
        packed = []
        for header in those:
            own = values | {class_of[text]: value for text, value in labels[header.file].values.items()}
            of_file = label if label in header.columns else None
            size, _ = stamp_of(root, header.file)
            packed.append(ParquetFile(header.file, split, size, header.rows, image, of_file, tuple(own[name] for name in names)))
        columns = _read_columns(root, those, options.columns)
        counts: Counter[str] = Counter()
        for header in those:
            for text, rows in labels[header.file].rows.items():
                counts[class_of[text]] += rows
        listings.append(
            Listing(
                split or None,
                [],
                names,
                np.empty(0, np.int32),
                packed=tuple(packed),
                packed_unlabeled=counts[""],
                packed_names=counts.keys() & set(names),
                columns=columns,
            )
        )
    return RawTree(root, "Parquet", listings, order)


@contextlib.contextmanager
def _readable(path: Root) -> Iterator:
    """The module pyarrow.parquet to read `path` with. Raises UserError if it is not installed, or the file is corrupt."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow, which is not installed; run: pip install '.[parquet]'") from None
    try:
        with naming(path):
            yield parquet
    except (ArrowException, ValueError, TypeError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:120]}); download it again") from None


def _source(path: Root) -> Any:
    """What pyarrow reads a file from."""
    return RemoteFile(path) if isinstance(path, RemotePath) else path


def _read_header(root: Root, name: str) -> _Header:
    with _readable(root / name) as parquet, parquet.ParquetFile(_source(root / name)) as file:
        from pyarrow import types

        schema, metadata = file.schema_arrow, file.metadata
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        features = {}
    images = [field.name for field in schema if _holds_bytes(field.type)]
    nested = {field.name: str(field.type) for field in schema if types.is_nested(_stored(field.type))}
    return _Header(name, schema.names, images, nested, features, metadata.num_rows)


def _stored(kind: Any) -> Any:
    """The type in which a dictionary or an extension type stores its values."""
    from pyarrow import BaseExtensionType, types

    while types.is_dictionary(kind) or isinstance(kind, BaseExtensionType):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    return kind


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    kind = _stored(kind)
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _image_column(headers: list[_Header], root: Root, label: str) -> str:
    first = headers[0]
    images = [name for name in first.image_columns if name != label]
    if not images:
        columns = ", ".join(first.columns)[:80]
        raise UserError(f"{root / first.file}: no image column (bytes and path), only {columns}; give other files")
    image = next((name for name in IMAGE_COLUMNS if name in images), images[0])
    for header in headers:
        if image not in header.columns:
            raise UserError(f"{root / header.file}: no column {image}, unlike {first.file}; move other data to another folder")
    if not any(header.rows for header in headers):
        raise UserError(f"{root / first.file}: the table has no rows; download it again")
    return image


def _label_column(headers: list[_Header], root: Root, kept: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The column of labels, and the names of the classes if the files have them. There may be none if other columns are `kept`,
    or if it is one of them and holds lists."""
    usual = ((name, header) for name in LABEL_COLUMNS for header in headers if name in header.columns)
    name, header = next(usual, ("", headers[0]))
    if name in kept and name in header.nested:
        return "", ()
    if not name:
        found = [name for name, feature in header.features.items() if feature.get("_type") == "ClassLabel"]
        if kept and len(found) != 1:
            return "", ()
        name = found[0] if len(found) == 1 else pick_column(root / header.file, "labels", LABEL_COLUMNS, header.columns)
    return name, tuple(map(str, header.features.get(name, {}).get("names") or ()))


def _read_labels(root: Root, header: _Header, label: str, named: bool) -> _Labels:
    """The labels in use; reads only their column. Their values are not needed if the classes are `named`."""
    if label not in header.columns:
        return _Labels({}, {"": header.rows})
    if label in header.nested:
        problem = f"column {label} holds {header.nested[label]}"
        raise UserError(f"{root / header.file}: {problem}, not one integer or name in each row; give other files")
    with _readable(root / header.file) as parquet:
        from pyarrow import BaseExtensionType, chunked_array

        column = parquet.read_table(_source(root / header.file), columns=[label], use_threads=False).column(label)
        if isinstance(column.type, BaseExtensionType):
            column = chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        found = column.value_counts().to_pylist()
    labels = _Labels({}, {})
    for each in found:
        text = _text(each["values"])
        labels.rows[text] = labels.rows.get(text, 0) + each["counts"]
        if text and not named:
            labels.values[text] = each["values"]
    return labels


def _read_columns(root: Root, headers: list[_Header], names: Sequence[str]) -> dict[str, list]:
    """The values of the columns in all rows of the files, None in files that lack a column."""
    found: dict[str, list] = {name: [] for name in names}
    for header in headers if names else ():
        with _readable(root / header.file) as parquet:
            for name in names:
                if name in header.columns:
                    table = parquet.read_table(_source(root / header.file), columns=[name], use_threads=False)
                    found[name] += table.column(name).to_pylist()
                else:
                    found[name] += [None] * header.rows
    return found


def _text(value: Hashable) -> str:
    if value is None or value != value:
        return ""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _is_unknown(value: Any) -> bool:
    """Whether a label is unknown: null, NaN, an empty name or a negative number, which hubs give validation images."""
    return value is None or value != value or value in ("", b"") or (isinstance(value, (int, float, Decimal)) and value < 0)


def _split_of(root: Root, name: str) -> str:
    found = _name_of_split(name)
    if not found:
        raise UserError(f"{root / name}: its name tells no split; name the split, as in `split=train`")
    return found


def _name_of_split(name: str) -> str:
    folder, _, file = name.rpartition("/")
    if match := NUMBERED.fullmatch(file):
        return match[1]
    if split_role(folder):
        return folder
    known = re.match(rf"({'|'.join(SPLIT_NAMES)})(?![A-Za-z])", file)
    stem = file.removesuffix(".parquet")
    return known[1] if known else stem if split_role(stem) else ""
