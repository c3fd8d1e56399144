"""The images of Parquet files with a column of images and one of labels, as hubs of datasets ship them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import SPLIT_NAMES
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.listing import Source, SourceSplit, scan
from imagefeed.preprocess.sources.tables import sort_classes

IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "jpeg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "cls")
WORDNET_ID = re.compile(r"n\d{8}")
# train-00000-of-00294.parquet, train-00000-of-00294-0123456789abcdef.parquet
NUMBERED = re.compile(r"(.+?)-\d{3,}-of-\d{3,}(-[0-9a-f]+)?\.parquet")
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file; `values[label]` is what its column of labels holds for a class."""

    file: str
    split: str
    size: int  # bytes
    num_images: int
    image: str
    label: str | None
    values: tuple[int | str, ...]

    def read(self, root: Path) -> Iterator[tuple[str, int, bytes]]:
        """(FILE/PATH or FILE#ROW, label, bytes) of its rows; raises UserError where the file is damaged."""
        pyarrow, parquet = _import()
        label_of = {value: label for label, value in enumerate(self.values)}
        columns = [self.image] + ([self.label] if self.label else [])
        row = 0
        try:
            file = parquet.ParquetFile(root / self.file, buffer_size=1 << 20, pre_buffer=False)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                labels = batch.column(self.label).to_pylist() if self.label else [None] * len(batch)
                for image, value in zip(batch.column(self.image).to_pylist(), labels):
                    row += 1
                    image = image if isinstance(image, dict) else {"bytes": image}
                    path = (image.get("path") or "").replace("\0", "")
                    name = f"{self.file}/{path}" if path else f"{self.file}#{row:06d}"
                    yield name, self._label(value, label_of, root, row), image.get("bytes") or b""
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise _damaged(root / self.file, error) from None

    def _label(self, value: int | str | None, label_of: dict, root: Path, row: int) -> int:
        if _unknown(value):
            return NO_LABEL
        if value not in label_of:
            raise UserError(
                f"{root / self.file}: row {row} has label {value!r}, but there are {len(label_of)} classes; "
                "download the file again"
            )
        return label_of[value]


def parquet_files(root: Path) -> list[str]:
    """The Parquet files of `root`, of its folder data, or of its folders named as splits; relative to it."""
    entries = scan(root)
    found = _below(root, "")
    for folder in entries if not found else ():
        if folder.is_dir() and folder.name in ("data", *SPLIT_NAMES):
            found += _below(Path(folder.path), f"{folder.name}/")
    return found


def find_parquet(root: Path, split: str | None) -> Source:
    """Lists Parquet files, whose images are known only after unpacking.

    Labels are those of the files where these name the classes, so in WordNet order for ImageNet; sorted where the names are
    WordNet ids or there are no names.
    """
    root, names = (root.parent, [root.name]) if root.is_file() else (root, parquet_files(root))
    if not names:
        raise UserError(f"{root}: no .parquet files in it or its folder data; name their folder, or another --layout")
    _, parquet = _import()
    found = []
    for name in names:
        try:
            with parquet.ParquetFile(root / name) as file:
                found.append((name, file.schema_arrow, file.metadata.num_rows))
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise _damaged(root / name, error) from None
    schema = found[0][1]
    image = _image_column(schema, root / names[0])
    label, classes = _label_column(found, root)
    if classes:
        values: tuple = tuple(range(len(classes)))
        if all(map(WORDNET_ID.fullmatch, classes)):
            values = tuple(sorted(values, key=classes.__getitem__))
            classes = tuple(classes[value] for value in values)
    else:
        values = _distinct_labels(root, [name for name, schema, _ in found if label in schema.names], label)
        classes = tuple(map(str, values))
    packed = []
    for name, schema, rows in found:
        if image not in schema.names:
            raise UserError(f"{root / name}: no column {image}, which {names[0]} has; put other data into another folder")
        of_split = split or _split_of(root, name)
        of_file = label if label in schema.names else None
        packed.append(ParquetFile(name, of_split, (root / name).stat().st_size, rows, image, of_file, values))
    if not any(file.num_images for file in packed):
        raise UserError(f"{root / names[0]}: the table has no rows; download it again")
    nothing = SourceSplit([], np.empty(0, np.int32))
    return Source(root, "Parquet", classes, {file.split: nothing for file in packed if file.num_images}, packed=tuple(packed))


def _import():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow, which is not installed; run: pip install 'imagefeed[parquet]'") from None
    return pyarrow, parquet


def _below(folder: Path, prefix: str) -> list[str]:
    return [prefix + entry.name for entry in scan(folder) if entry.name.endswith(".parquet") and entry.is_file()]


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:120]}); download it again")


def _features(schema) -> dict[str, dict]:
    """What the hub says of the columns: {"label": {"_type": "ClassLabel", "names": [...]}, ...}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_column(schema, path: Path) -> str:
    import pyarrow.types as kinds

    def holds_bytes(kind) -> bool:
        if kinds.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return kinds.is_binary(kind) or kinds.is_large_binary(kind)

    found = [field.name for field in schema if holds_bytes(field.type)]
    found = [name for name in IMAGE_COLUMNS if name in found] or found
    if not found:
        raise UserError(f"{path}: no column of images (of bytes and path), only {', '.join(schema.names)[:80]}; name other files")
    return found[0]


def _label_column(found: list[tuple], root: Path) -> tuple[str, tuple[str, ...]]:
    """The column of labels, and the names of the classes, empty where the files do not say."""
    for name in LABEL_COLUMNS:
        for _, schema, _ in found:
            if name in schema.names:
                return name, tuple(map(str, _features(schema).get(name, {}).get("names") or ()))
    name, schema, _ = found[0]
    labels = [key for key, feature in _features(schema).items() if feature.get("_type") == "ClassLabel"]
    if len(labels) != 1:
        raise UserError(
            f"{root / name}: no column of labels, only {', '.join(schema.names)[:80]}; call it one of {', '.join(LABEL_COLUMNS)}"
        )
    return labels[0], tuple(map(str, _features(schema)[labels[0]].get("names") or ()))


def _distinct_labels(root: Path, names: list[str], label: str) -> tuple[int | str, ...]:
    """All labels that occur, in the order of their classes. Reads only that column."""
    pyarrow, parquet = _import()
    values: set = set()
    for name in names:
        try:
            values |= set(parquet.read_table(root / name, columns=[label], use_threads=False).column(label).unique().to_pylist())
        except (pyarrow.ArrowException, OSError, TypeError) as error:
            raise _damaged(root / name, error) from None
    values = {value for value in values if not _unknown(value)}
    if not all(isinstance(value, (int, str)) for value in values):
        raise UserError(f"{root / names[0]}: column {label} holds neither whole numbers nor names; name other files")
    by_name = {str(value): value for value in values}
    return tuple(by_name[name] for name in sort_classes(by_name))


def _unknown(value: object) -> bool:
    """Whether a label says that it is not known: none, no name, or a negative number, as hubs mark validation images."""
    return value is None or value == "" or (isinstance(value, int) and value < 0)


def _split_of(root: Path, name: str) -> str:
    folder, _, file = name.rpartition("/")
    if match := NUMBERED.fullmatch(file):
        return match[1]
    if folder in SPLIT_NAMES:
        return folder
    stem = file.removesuffix(".parquet")
    known = re.match(rf"({'|'.join(SPLIT_NAMES)})(?![A-Za-z])", stem)
    if known is None:
        raise UserError(f"{root / name}: does not say which split it is; say so, as in: --split train")
    return known[1]
