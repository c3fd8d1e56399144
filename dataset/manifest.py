"""The manifest, dataset.json: what a dataset holds and how it was made. Written last: its presence means it is whole."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, write_atomically
from imagefeed.dataset.records import INDEX_DTYPE

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
# The roles that split names usually have; a name outside them is reached by its own name.
TRAINING_NAMES = ("train", "training")
EVALUATION_NAMES = ("val", "validation", "valid", "test", "testing")
SPLIT_NAMES = TRAINING_NAMES + EVALUATION_NAMES


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


@dataclass(frozen=True)
class Manifest:
    """`options` are the build's options that decide the stored bytes, `versions` the libraries that wrote them,
    `rejected` the number of images by action (rejected, converted), `duplicates` the number of groups of images
    of the same bytes, of images in them, and of groups across splits or classes, `files` the SHA-256 of every file of the
    dataset that is no shard, `titles` what people call the classes, where the raw images came with it."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    options: dict[str, object]
    versions: dict[str, str]
    rejected: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    version: int = FORMAT_VERSION

    @classmethod
    def load(cls, root: str | Path) -> "Manifest":
        """Reads ROOT/dataset.json; a UserError says what is wrong with it and what to do."""
        root = Path(root)
        path = root / NAME
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder; build a dataset there with: python -m preprocess build RAW {root}")
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{root}: no {NAME}, so the dataset is not whole; finish it with: python -m preprocess build RAW {root}"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}); restore it, or delete it and build again") from None
        try:
            if data["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {data['version']}, this program reads {FORMAT_VERSION}; delete it and build again"
                )
            if data["sha256"] != _digest(data):
                raise UserError(f"{path}: it was changed since the build wrote it; restore it, or delete it and build again")
            splits = {
                name: Split(tuple(Shard(**shard) for shard in split["shards"]), tuple(split["counts"]))
                for name, split in data["splits"].items()
            }
            manifest = cls(
                root,
                tuple(data["classes"]),
                splits,
                data["options"],
                data["versions"],
                data["rejected"],
                data["duplicates"],
                data["files"],
                tuple(data.get("titles", ())),
                data["version"],
            )
            _check_fields(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: a field is missing or of the wrong kind ({error!r}); delete it and build again") from None
        return manifest

    def save(self) -> None:
        data = dataclasses.asdict(self)
        del data["root"]
        data["sha256"] = _digest(data)
        write_atomically(self.root / NAME, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())

    @property
    def fingerprint(self) -> str:
        """A hash of all that is stored: two datasets with the same one give the same batches."""
        digest = hashlib.sha256(json.dumps([self.classes, self.options]).encode())
        for name, split in sorted(self.splits.items()):
            for shard in split.shards:
                digest.update(f"{name} {shard.name} {shard.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def num_records(self) -> int:
        return sum(split.records for split in self.splits.values())

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise UserError(f"{self.root}: no split named {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def train_split(self) -> str:
        """The name of the split to learn from, and to take the statistics of."""
        return training_split(list(self.splits))

    @property
    def eval_split(self) -> str | None:
        """The name of the split to evaluate on, by its usual names, or None where no other than the training one has labels."""
        others = [name for name, split in self.splits.items() if name != self.train_split and any(split.counts)]
        return next((name for name in EVALUATION_NAMES if name in others), others[0] if others else None)

    def index_path(self, split: str) -> Path:
        return self.root / f"{split}.index.npy"

    def load_index(self, split: str) -> np.ndarray:
        """The (records,) array of INDEX_DTYPE of a split, memory-mapped; raises UserError where it is not what build wrote."""
        path = self.index_path(split)
        self._check_file(path)
        try:
            index = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception:  # a broken header lets numpy raise almost anything
            raise UserError(f"{path}: not readable as an index; delete it and run build again") from None
        if index.dtype != INDEX_DTYPE or index.shape != (self.split(split).records,):
            raise UserError(
                f"{path}: holds {index.shape} of {index.dtype}, the manifest says "
                f"{self.split(split).records} records; delete it and run build again"
            )
        return index

    def load_statistics(self) -> dict[str, np.ndarray]:
        """The arrays of statistics.npz (docs/format.md); raises UserError where it is not what build wrote."""
        path = self.root / STATISTICS
        self._check_file(path)
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                found = dict(arrays)
            size = self.options["size"]
            shapes = STATISTICS_SHAPES | {"mean_image": (size, size, 3)}
            wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
        except OSError:
            raise
        except Exception:  # zip and numpy raise almost anything on a file that is no such archive
            raise UserError(f"{path}: not readable as statistics; delete it and run build again") from None
        if wrong:
            raise UserError(f"{path}: {', '.join(wrong)} have another shape; delete it and run build again")
        return found

    def _check_file(self, path: Path) -> None:
        """Raises UserError where a file is missing, or is not the one that build wrote."""
        try:
            # 30 MB, the index of ImageNet: 26 ms.
            if path.name in self.files and hash_file(path) != self.files[path.name]:
                raise UserError(f"{path}: its content is not what build wrote; delete it and run build again")
            path.stat()
        except FileNotFoundError:
            raise UserError(f"{path}: the file is missing; run build again to restore it") from None


def _check_fields(manifest: Manifest) -> None:
    """Raises ValueError where a manifest says what no build writes."""
    for what, right in {
        "classes": _are(str, manifest.classes),
        "titles": _are(str, manifest.titles) and len(manifest.titles) in (0, len(manifest.classes)),
        "splits": len(manifest.splits) > 0 and all(map(_is_file_name, manifest.splits)),
        "options.size": type(manifest.options["size"]) is int and manifest.options["size"] > 0,
        "versions": _are(str, manifest.versions.values()),
        "rejected": _are(int, manifest.rejected.values()),
        "duplicates": _are(int, manifest.duplicates.values()),
        "files": all(map(_is_file_name, manifest.files)) and _are(str, manifest.files.values()),
    }.items():
        if not right:
            raise ValueError(what)
    for name, split in manifest.splits.items():
        numbers = [number for shard in split.shards for number in (shard.records, shard.bytes)]
        if not (_are(int, numbers) and min(numbers, default=0) >= 0 and split.records > 0):
            raise ValueError(f"splits.{name}: records and bytes")
        if not (all(_is_file_name(shard.name) for shard in split.shards) and _are(str, [s.sha256 for s in split.shards])):
            raise ValueError(f"splits.{name}: name and sha256")
        if not (_are(int, split.counts) and len(split.counts) == len(manifest.classes)):
            raise ValueError(f"splits.{name}: counts")


def _are(kind: type, values: Iterable) -> bool:
    return all(type(value) is kind for value in values)


def _is_file_name(name: object) -> bool:
    """Whether it is a name alone: with a path in it, it would lead out of the dataset."""
    return type(name) is str and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _digest(data: dict) -> str:
    """SHA-256 of the manifest's content without the digest itself."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def training_split(names: list[str]) -> str:
    """Of some splits' names, the one to learn from: train, training, or the first."""
    return next((name for name in TRAINING_NAMES if name in names), names[0])
