"""Reads and writes raw.npz: the names, labels and checksums of a dataset's raw images, including rejected ones."""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from imagefeed.dataset.console import first_few, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file, naming
from imagefeed.dataset.manifest import NAME, Manifest
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.storage import Url, read_bytes
from imagefeed.preprocess.duplicates import MARK_DTYPE
from imagefeed.preprocess.sources.listing import Source

RAW = "raw.npz"


class RawSplit(NamedTuple):
    """The raw images of a split, in the order of the source. `text` holds their paths in UTF-8, joined by zero bytes; `lengths`
    are in characters, because paths in a table may contain zero bytes."""

    text: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    marks: np.ndarray  # MARK_DTYPE; zero if the image could not be read

    @property
    def paths(self) -> list[str]:
        text = self.text.tobytes().decode("utf-8", "surrogateescape")
        ends = np.cumsum(self.lengths.astype(np.int64) + 1).tolist()
        return [text[end - length - 1 : end - 1] for end, length in zip(ends, self.lengths.tolist())]


class PackedFile(NamedTuple):
    """An unpacked file. Its images come last in its split, after those of earlier packed files."""

    file: str
    split: str
    num_images: int


@dataclass(frozen=True)
class RawRecord:
    fingerprint: str  # of the source
    classes: tuple[str, ...]
    listing: dict[str, Any]  # the SourceOptions that list the same images
    packed: tuple[PackedFile, ...]
    splits: dict[str, RawSplit]
    columns: dict[str, str] = field(default_factory=dict)  # a hash of the values of each column

    @classmethod
    def of(cls, source: Source, fingerprint: str, listing: dict[str, Any]) -> "RawRecord":
        """The record of an unpacked source; its marks are filled in later."""
        splits = {}
        for name, split in source.splits.items():
            text = "\0".join(split.paths).encode("utf-8", "surrogateescape")
            lengths = np.fromiter(map(len, split.paths), np.uint32, len(split))
            splits[name] = RawSplit(np.frombuffer(text, np.uint8), lengths, split.labels, np.zeros(len(split), MARK_DTYPE))
        packed = tuple(PackedFile(*unpacked[:3]) for unpacked in source.unpacked)
        return cls(fingerprint, source.classes, listing, packed, splits, source.column_digests())

    def save(self, path: Path, deflate: bool = True) -> None:
        about = {name: value for name, value in vars(self).items() if name != "splits"} | {"splits": list(self.splits)}
        members = [("about", np.array(json.dumps(about, default=str)))]
        for name, split in self.splits.items():
            members += [(f"{name}.{column}", values) for column, values in split._asdict().items()]
        save_members(path, members, lambda name: deflate)

    @classmethod
    def load(cls, path: Path | Url) -> "RawRecord | None":
        """Returns None if the file is missing or damaged."""
        arrays = load_members(path)
        if "about" not in arrays:
            return None
        about = json.loads(str(arrays["about"]))
        splits = {name: RawSplit(*(arrays[f"{name}.{column}"] for column in RawSplit._fields)) for name in about["splits"]}
        packed = tuple(PackedFile(*packed) for packed in about["packed"])
        return cls(about["fingerprint"], tuple(about["classes"]), about["listing"], packed, splits, about.get("columns", {}))

    @classmethod
    def of_dataset(cls, manifest: Manifest) -> "RawRecord | None":
        """The record of a finished dataset; None if it has none, as those of imagefeed 0.1, or one of another dataset."""
        record = cls.load(manifest.root / RAW)
        return record if record is not None and record.fingerprint == manifest.options["source"] else None

    def lists_the_same(self, other: "RawRecord") -> bool:
        """Whether both list the same images with the same labels, in the same order."""
        mine, theirs = (
            [(name, *map(np.ndarray.tobytes, split[:3])) for name, split in each.splits.items()] for each in (self, other)
        )
        return self.classes == other.classes and mine == theirs

    @property
    def lengths(self) -> dict[str, int]:
        """The number of raw images of each split."""
        return {name: len(split.labels) for name, split in self.splits.items()}

    def own(self, split: str) -> int:
        """The number of images in a split that do not come from packed files."""
        return len(self.splits[split].labels) - sum(packed.num_images for packed in self.packed if packed.split == split)

    def places(self) -> Iterable[tuple[PackedFile, np.ndarray]]:
        """The packed files with the places of their images in their splits."""
        ends = {split: self.own(split) for split in self.splits}
        for packed in self.packed:
            start = ends[packed.split]
            ends[packed.split] = start + packed.num_images
            yield packed, np.arange(start, ends[packed.split])


def save_members(
    path: Path, members: Iterable[tuple[str, np.ndarray]], deflate: Callable[[str], bool] = lambda name: True
) -> None:
    """Writes an .npz file member by member. zlib's first level: the sixth takes four times as long for 10 % less."""
    with atomic_file(path) as file, zipfile.ZipFile(in_order := InOrder(file), "w") as archive:  # type: ignore[call-overload]
        for name, array in members:
            buffer = io.BytesIO()
            np.save(buffer, array)
            kind = zipfile.ZIP_DEFLATED if deflate(name) else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getbuffer(), kind, 1)  # ZipInfo: always the same date
            in_order.flush()


class InOrder:
    """A file as zipfile writes to it, which is written from begin to end: mounts of object stores refuse to seek. What came
    since the last `flush` is held in memory. zipfile goes back only within a member, to its header; 120 MB, the build.npz of
    ImageNet, are too much to hold."""

    def __init__(self, file: BinaryIO):
        self._file, self._written, self._held = file, 0, io.BytesIO()

    def tell(self) -> int:
        return self._written + self._held.tell()

    def seek(self, at: int) -> None:
        self._held.seek(at - self._written)

    def write(self, data: bytes) -> int:
        return self._held.write(data)

    def flush(self) -> None:
        self._written += self._file.write(self._held.getbuffer())
        self._held = io.BytesIO()


def load_members(path: Path | Url, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The members of an .npz file; none if it is missing or damaged."""
    try:
        data = read_bytes(path) if isinstance(path, Url) else b""
        with naming(str(path)), open(path, "rb") if isinstance(path, Path) else io.BytesIO(data) as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files if wanted(name)}
    except FileNotFoundError:
        return {}
    except (OSError, UserError):
        raise
    except Exception:  # numpy and zipfile raise almost anything on a broken header
        return {}


def compare_listing(out: Path, record: RawRecord, source: Source) -> bool:
    """Whether `source` lists the recorded images in the same order; its packed files need not be unpacked.

    Raises UserError if it lists other images, or other classes for them.
    """
    before = [
        (name, path, class_name(record.classes, label))
        for name, split in record.splits.items()
        for path, label in zip(split.paths[: record.own(name)], split.labels.tolist())
    ]
    now = [
        (name, path, class_name(source.classes, label))
        for name, split in source.splits.items()
        for path, label in zip(split.paths, split.labels.tolist())
    ]
    before += [(packed.split, packed.file, "") for packed in record.packed]
    now += [(packed.split, packed.file, "") for packed in source.packed]
    keys_before, keys_now = (Counter(row[:2] for row in rows) for rows in (before, now))
    added, removed = (Counter(path for _, path in keys.elements()) for keys in (keys_now - keys_before, keys_before - keys_now))
    moved = added & removed  # with `validation_fraction`, one new image is enough
    found = [
        f"{names.total():,} {'was' if names.total() == 1 else 'were'} {verb} ({first_few([*names.elements()])})"
        for verb, names in (("added", added - moved), ("removed", removed - moved), ("moved to another split", moved))
        if names
    ]
    if found:
        only_added = keys_now > keys_before
        remedy = "to add images, build all of RAW into another OUT" if only_added else "restore RAW, or choose another OUT"
        raise UserError(f"{out}: RAW has changed since {since(out)}: {', '.join(found)}; {remedy}")
    relabeled = [new[1] for old, new in zip(sorted(before), sorted(now)) if old != new]
    if relabeled or record.classes != source.classes:
        which = f"{plural(len(relabeled), 'image')} ({first_few(relabeled)})" if relabeled else "all images"
        raise UserError(f"{out}: labels in RAW have changed since {since(out)}: {which}; restore RAW, or choose another OUT")
    counts = {(packed.file, packed.split): packed.num_images for packed in record.packed}
    for packed in source.packed:
        if packed.num_images not in (0, counts[packed.file, packed.split]):
            raise UserError(
                f"{out}: {packed.file} had {counts[packed.file, packed.split]:,} images when {since(out)}, and has "
                f"{packed.num_images:,} now; restore it, or choose another OUT"
            )
    return before == now


def since(out: Path) -> str:
    """When the images of OUT were listed, in words."""
    return "this dataset was built" if (out / NAME).exists() else "this build started"


def class_name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if label != NO_LABEL else ""
