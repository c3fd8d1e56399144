"""Several datasets as one: their records one after the other, under one list of class names."""

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imagefeed.dataset.columns import Column
from imagefeed.dataset.console import examples, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest, Shard, Split, color_statistics
from imagefeed.dataset.reader import Dataset
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.storage import Url, place

One = str | Path | Url | Manifest | Dataset


@dataclasses.dataclass(frozen=True)
class JoinedManifest(Manifest):
    """The manifest of `parts` as one dataset. A record's id is its id in its own part, plus the records of the parts before it.

    Classes and labels are those of the part with the most classes. `shares` are the parts' shares of an epoch's records; with
    None, each record comes once.
    """

    parts: tuple[Manifest, ...] = ()
    shares: tuple[float, ...] | None = None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([[part.fingerprint for part in self.parts], self.shares]).encode()).hexdigest()

    def split(self, name: str) -> Split:
        for part in self.parts:
            part.split(name)  # raises UserError for the one that has no such split
        return super().split(name)

    def place_of(self, shard: Shard) -> Path | Url:
        return place(shard.name)

    def load_index(self, split: str) -> np.ndarray:
        """The rows of all parts, (records,) of INDEX_DTYPE, in memory."""
        label_of, indexes, shards = {name: label for label, name in enumerate(self.classes)}, [], 0
        for part in self.parts:
            index = np.array(part.load_index(split))
            index["shard"] += shards
            known = index["label"] != NO_LABEL
            index["label"][known] = np.array([label_of[name] for name in part.classes], np.int32)[index["label"][known]]
            shards += len(part.split(split).shards)
            indexes.append(index)
        return np.concatenate(indexes)

    def load_column(self, split: str, name: str) -> Column:
        """The column of all parts, in memory; raises UserError if one has none of that name, or another kind."""
        try:
            return Column.joined([part.load_column(split, name) for part in self.parts])
        except ValueError as error:
            raise UserError(f"{self.root}: column {name} {error}; join datasets whose columns are alike") from None

    def load_statistics(self) -> dict[str, np.ndarray]:
        """As if one build had made all parts: over all pixels of their training splits, whatever the `shares`. There is no mean
        image for images of different sizes."""
        found = [part.load_statistics() for part in self.parts]
        images, pixels = (np.array([float(each[name]) for each in found]) for name in ("images", "pixels"))
        means = np.array([each["channel_mean"] for each in found])
        squares = np.array([each["covariance"] for each in found]) + means[:, :, None] * means[:, None]
        mean, square = (np.average(values, 0, pixels) for values in (means, squares))
        joined = color_statistics(mean, square - np.outer(mean, mean))
        if self.options["fit"] == "crop":
            joined["mean_image"] = sum(each["mean_image"] * part for each, part in zip(found, images / images.sum(), strict=True))
        return joined | {"images": np.array(int(images.sum())), "pixels": np.array(int(pixels.sum()))}


def open_datasets(dataset: One | list[One] | tuple[One, ...] | Mapping[One, float], split: str) -> Manifest:
    """The manifest of a dataset, or of several: a list of them, or a dictionary that gives each its share of an epoch's records.

    Raises UserError if a Dataset is of another split, their classes differ by name, or the shares do not add up to 1.
    """
    if not isinstance(dataset, list | tuple | Mapping):
        return _open(dataset, split)
    if not dataset:
        raise UserError("`dataset` is empty; give a folder that imagefeed build wrote, or several")
    for part in dataset:
        if isinstance(part, Dataset) and not part.is_whole:
            raise UserError(f"{part.manifest.root}: a part of a dataset cannot be joined with others; choose records by `subset`")
    shares = tuple(dataset.values()) if isinstance(dataset, Mapping) else None
    if shares is not None:
        usable = all(isinstance(share, numbers.Real) and 0 < share <= 1 for share in shares)
        if not usable or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise UserError(
                f"the shares of datasets are {', '.join(map(str, shares))}; give each its part of an epoch's records, as numbers "
                "above 0 that add up to 1"
            )
        shares = tuple(map(float, shares))
    parts = tuple(_open(part, split) for part in dataset)
    return parts[0] if len(parts) == 1 else join(parts, shares)


def _open(dataset: One, split: str) -> Manifest:
    if isinstance(dataset, Dataset) and dataset.split != split:
        raise UserError(f"{dataset.manifest.root}: the Dataset is of split {dataset.split}, but `split` is {split}")
    manifest = dataset.manifest if isinstance(dataset, Dataset) else dataset
    return manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)


def join(parts: Sequence[Manifest], shares: tuple[float, ...] | None = None) -> JoinedManifest:
    """Raises UserError unless the class names of one part contain those of each other."""
    largest = max(parts, key=lambda part: len(part.classes))
    for part in parts:
        foreign = [name for name in part.classes if name not in set(largest.classes)]
        if foreign:
            absent = [name for name in largest.classes if name not in set(part.classes)]
            raise UserError(
                f"{part.root}: its classes include {examples(foreign)}, which {largest.root} does not have ("
                f"{plural(len(absent), 'class', 'classes')} only there: {examples(absent)}); "
                "join datasets whose classes have the same names, or of which one has all classes of the others"
            )
    kinds = {(part.options["fit"], part.options["size"]) for part in parts}
    one_size = len(kinds) == 1 and parts[0].options["fit"] == "crop"
    return JoinedManifest(
        root=_joined_root(parts),
        classes=largest.classes,
        splits={name: _joined_split(parts, name, largest) for name in parts[0].splits if all(name in p.splits for p in parts)},
        options={"size": min(size for _, size in kinds), "fit": "crop" if one_size else "short"},
        versions={},
        titles=largest.titles,
        columns={name: kind for name, kind in parts[0].columns.items() if all(part.columns.get(name) == kind for part in parts)},
        parts=tuple(parts),
        shares=shares,
    )


def _joined_root(parts: Sequence[Manifest]) -> Path | Url:
    """What messages call them: a Url if one of them is."""
    names = " + ".join(str(part.root) for part in parts)
    return Url.literal(names) if any(isinstance(part.root, Url) for part in parts) else Path(names)


def _joined_split(parts: Sequence[Manifest], name: str, largest: Manifest) -> Split:
    """The shards of all parts, under absolute names."""
    counts = dict.fromkeys(largest.classes, 0)
    shards = []
    for part in parts:
        split = part.split(name)
        shards += [dataclasses.replace(shard, name=str(part.root.absolute() / shard.name)) for shard in split.shards]
        for class_name, count in zip(part.classes, split.counts, strict=True):
            counts[class_name] += count
    return Split(tuple(shards), tuple(counts.values()))
