"""The manifest, dataset.json: what a dataset holds and how it was made. Written last: if it exists, the dataset is complete."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from imagefeed.dataset.columns import KINDS, Column, file_names
from imagefeed.dataset.decision import Decision
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, naming
from imagefeed.dataset.records import INDEX_DTYPE
from imagefeed.dataset.splits import TEST, VAL, evaluation_split, split_role, statistics_split, training_split
from imagefeed.dataset.storage import Url, place, read_bytes, read_hashed, write_bytes

T = TypeVar("T")
NAME = "dataset.json"
FORMAT_VERSION = 1
STATISTICS = "statistics.npz"
STATISTICS_SHAPES = {
    "channel_mean": (3,),
    "channel_std": (3,),
    "covariance": (3, 3),
    "eigenvalues": (3,),
    "eigenvectors": (3, 3),
    "images": (),
    "pixels": (),
}


@dataclass(frozen=True)
class Shard:
    name: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """`counts[label]` is the number of records of a class."""

    shards: tuple[Shard, ...]
    counts: tuple[int, ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """A hash of the content of all shards."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """`options` are the build's options that decide the stored bytes, `versions` the libraries that wrote them,
    `rejected` counts images by action (rejected, converted), `duplicates` counts groups of images with the same bytes, the
    images in them, and groups across splits or classes, `files` has the SHA-256 of every file that is not a shard,
    `titles` the classes' common names, if the raw images came with them, and `decision` how the raw tree was read; datasets
    of older versions have none. `columns` has the kind of each further column: numbers, text or lists."""

    root: Path | Url
    classes: tuple[str, ...]
    splits: dict[str, Split]
    options: dict[str, Any]
    versions: dict[str, str]
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    version: int = FORMAT_VERSION
    decision: Decision | None = None
    columns: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, root: str | Path | Url) -> "Manifest":
        """Reads ROOT/dataset.json; a UserError says what is wrong with it and what to do."""
        if not isinstance(root, str | os.PathLike | Url):
            raise ValueError(
                f"dataset must be the folder or URL of a dataset, a Dataset, or several of them, not {root!r}; of a Subset, give "
                "its indices as `subset`"
            )
        root = place(root)
        path = root / NAME
        if isinstance(root, Path) and not root.is_dir():
            raise UserError(f"{root}: there is no such folder; build a dataset there with: imagefeed build RAW {root}")
        try:
            data = json.loads(read_bytes(path))
        except FileNotFoundError:
            raise UserError(
                f"{root}: no {NAME}, so this is no dataset or an incomplete one; make or finish it with: imagefeed build RAW OUT"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); restore it, or delete it and build again") from None
        try:
            if data["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {data['version']}, this program reads {FORMAT_VERSION}; delete it and build again"
                )
            if data.pop("sha256") != _digest(data):
                raise UserError(f"{path}: it was changed since the build wrote it; restore it, or delete it and build again")
            data["splits"] = {
                name: Split(tuple(Shard(**shard) for shard in split["shards"]), tuple(split["counts"]))
                for name, split in data["splits"].items()
            }
            data |= {"root": root, "classes": tuple(data["classes"]), "titles": tuple(data.get("titles", ()))}
            data["decision"] = Decision.from_json(data["decision"]) if data.get("decision") else None
            data.setdefault("columns", {})
            manifest = cls(**{each.name: data[each.name] for each in dataclasses.fields(cls)})
            _check_fields(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: a field is missing or of the wrong kind ({error!r}); delete it and build again") from None
        return manifest

    def save(self) -> None:
        data = dataclasses.asdict(self)
        del data["root"]
        if not self.columns:
            del data["columns"]
        data["sha256"] = _digest(data)
        write_bytes(self.root / NAME, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())

    @property
    def fingerprint(self) -> str:
        """A hash of everything stored: datasets with the same fingerprint give the same batches."""
        digest = hashlib.sha256(json.dumps([self.classes, self.options]).encode())
        for name, split in sorted(self.splits.items()):
            for shard in split.shards:
                digest.update(f"{name} {shard.name} {shard.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def num_records(self) -> int:
        return sum(split.records for split in self.splits.values())

    def split(self, name: str) -> Split:
        if not isinstance(name, str) or name not in self.splits:
            raise UserError(f"{self.root}: no split named {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def trainable(self) -> bool:
        """Whether a split is there to train on: not one for evaluation alone, unless `build --train-split` named it."""
        return self.decision.train_split is not None if self.decision else split_role(self.train_split) not in (VAL, TEST)

    @property
    def train_split(self) -> str:
        """The split to train on; of a dataset without one, its first, which can be measured on."""
        named = self.decision.train_split if self.decision else training_split(list(self.splits))
        return named or next(iter(self.splits))

    @property
    def statistics_split(self) -> str:
        """The split of the statistics: the training split, except in datasets of older versions."""
        return self.train_split if self.decision else statistics_split(list(self.splits))

    @property
    def eval_split(self) -> str | None:
        """The split to evaluate on, by its usual names; None if only the training split has labels."""
        trained = self.train_split if self.trainable else None
        others = [name for name, split in self.splits.items() if name != trained and any(split.counts)]
        return evaluation_split(others) or next(iter(others), None)

    @property
    def folder(self) -> Path:
        """The folder of a dataset that is being built."""
        assert isinstance(self.root, Path)
        return self.root

    def place_of(self, shard: Shard) -> Path | Url:
        """Where a shard is."""
        return self.root / shard.name

    def index_path(self, split: str) -> Path | Url:
        return self.root / f"{split}.index.npy"

    def load_index(self, split: str) -> np.ndarray:
        """The (records,) array of INDEX_DTYPE of a split, read-only; raises UserError unless it is what build wrote."""
        path, records = self.index_path(split), self.split(split).records
        # In memory, as a page of a map that cannot be read later would end the process.
        index = self._read(path, _array_in)
        if index.dtype != INDEX_DTYPE or index.shape != (records,):
            raise UserError(
                f"{path}: holds {index.shape} of {index.dtype}, the manifest says {records:,}; delete it and run build again"
            )
        return index

    def load_column(self, split: str, name: str) -> Column:
        """A further column of a split, memory-mapped; raises UserError unless it is what build wrote, or if there is none."""
        if name not in self.columns:
            listed = f"it has {', '.join(self.columns)}" if self.columns else "none was kept with build --columns"
            raise UserError(f"{self.root}: no column {name!r}; {listed}")
        paths = [self.root / file for file in file_names(split, name, self.columns[name])]
        arrays = [np.asarray(self._map(path)) for path in paths]
        for array in arrays:
            array.setflags(write=False)
        try:
            return Column.of_arrays(self.columns[name], self.split(split).records, *arrays)
        except ValueError as error:
            raise UserError(f"{paths[-1]}: {error}, the manifest says another; delete it and run build again") from None

    def load_statistics(self) -> dict[str, np.ndarray]:
        """The arrays of statistics.npz (docs/format.md); raises UserError unless they are what build wrote."""
        path, size = self.root / STATISTICS, self.options["size"]

        def read(content: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
            with np.load(io.BytesIO(content.data)) as arrays:
                found = dict(arrays)
            shapes = STATISTICS_SHAPES | {"mean_image": (size, size, 3)}
            return found, [name for name, shape in shapes.items() if found[name].shape != shape]

        found, wrong = self._read(path, read)
        if wrong:
            raise UserError(f"{path}: {', '.join(wrong)} have another shape; delete it and run build again")
        return found

    def _read(self, path: Path | Url, read: Callable[[np.ndarray], T]) -> T:
        """What `read` returns of the content of a file or an object, uint8 (bytes,); raises UserError if it is missing,
        unreadable, or not the one that build wrote."""
        with self._checked(path):
            content, digest = read_hashed(path)  # 30 MB, the index of ImageNet: 33 ms
            self._check_digest(path, digest)
            return read(content)

    def _map(self, path: Path | Url) -> np.ndarray:
        """The array in an .npy file, mapped into memory, or in an object; raises UserError as `_read` does."""
        if isinstance(path, Url):
            return self._read(path, _array_in)
        with self._checked(path):
            self._check_digest(path, hash_file(path))
            with naming(path):
                return np.load(path, "c")  # a private map, which a FUSE mount with direct_io allows

    def _check_digest(self, path: Path | Url, digest: str) -> None:
        if self.files.get(path.name, digest) != digest:
            raise UserError(f"{path}: its content is not what build wrote; delete it and run build again")

    @contextlib.contextmanager
    def _checked(self, path: Path | Url) -> Iterator[None]:
        """Turns what goes wrong in reading a file into a UserError."""
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{path}: the file is missing; run build again to restore it") from None
        except (UserError, OSError):
            raise
        except Exception:  # numpy and zipfile raise almost anything on a broken header
            raise UserError(f"{path}: not readable; delete it and run build again") from None


def _array_in(data: np.ndarray) -> np.ndarray:
    """The array in the content of an .npy file, uint8 (bytes,), without a copy; read-only."""
    head = io.BytesIO(data[:65536].tobytes())
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read_header[np.lib.format.read_magic(head)](head)
    array = data[head.tell() :].view(dtype).reshape(shape)
    array.setflags(write=False)
    return array


def color_statistics(mean: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of statistics.npz that follow from the mean and the covariance of the channels; eigenvectors are columns.

    An eigenvector's sign is arbitrary: its largest component is made positive.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    return {
        "channel_mean": mean,
        "channel_std": np.sqrt(covariance.diagonal()),
        "covariance": covariance,
        "eigenvalues": values,
        "eigenvectors": vectors,
    }


def _check_fields(manifest: Manifest) -> None:
    """Raises ValueError if a manifest says what no build writes."""
    splits = manifest.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    for field_name, right in {
        "classes": _are(str, manifest.classes),
        "titles": _are(str, manifest.titles) and len(manifest.titles) in (0, len(manifest.classes)),
        "splits": len(splits) > 0 and all(map(_is_file_name, manifest.splits)),
        "options.size": type(manifest.options["size"]) is int and manifest.options["size"] > 0,
        "versions": _are(str, manifest.versions.values()),
        "rejected": _are(int, manifest.rejected.values()),
        "duplicates": _are(int, manifest.duplicates.values()),
        "columns": _are(str, manifest.columns) and all(kind in KINDS for kind in manifest.columns.values()),
        "files": all(map(_is_file_name, manifest.files)) and _are(str, manifest.files.values()),
        "shards' names": all(_is_file_name(shard.name) for shard in shards) and _are(str, [shard.sha256 for shard in shards]),
        "shards' sizes": all(_are(int, sizes := (shard.records, shard.bytes)) and min(sizes) >= 0 for shard in shards),
        "records": all(split.records > 0 for split in splits),
        "counts": all(_are(int, split.counts) and len(split.counts) == len(manifest.classes) for split in splits),
    }.items():
        if not right:
            raise ValueError(field_name)


def _are(kind: type, values: Iterable) -> bool:
    return all(type(value) is kind for value in values)


def _is_file_name(name: object) -> bool:
    """Whether it is a name alone: a path in it could lead out of the dataset."""
    return type(name) is str and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _digest(data: dict) -> str:
    """The SHA-256 of the manifest's content, which must not include the digest itself."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
