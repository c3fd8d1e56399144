"""Which records an epoch is made of: all, a subset, or as many of each as weights give."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagefeed.dataset.console import examples, plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.joined import JoinedManifest
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.plan import ORDER, WEIGHTED, draws, ranked, uniform

Subset = Sequence[int] | np.ndarray | Sequence[str] | str | os.PathLike
Weights = Sequence[float] | np.ndarray | Mapping[str, float] | str


@dataclass(frozen=True, eq=False)
class Selection:
    """`ids` (M,) int64, ascending, are the records that may come. An epoch has `records` of them: each once or, if `edges` are
    given, drawn by weight.

    Record `by_class[m]` is drawn edges[m] - edges[m - 1] times on average, the first edges[0] times; the last edge is `records`.
    """

    ids: np.ndarray
    records: int
    by_class: np.ndarray | None = None  # (M,) the ids by dataset and class
    edges: np.ndarray | None = None  # (M,) float64

    @property
    def weighted(self) -> bool:
        return self.edges is not None

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The records of an epoch (records,) int64, ascending."""
        return _drawn(self, seed, epoch) if self.weighted else self.ids

    def following(self, ids: np.ndarray) -> np.ndarray:
        """The next record after each of `ids` (N,), to replace it."""
        return self.ids[np.searchsorted(self.ids, ids, "right") % len(self.ids)]


@functools.lru_cache(maxsize=2)
def _drawn(selection: Selection, seed: int, epoch: int) -> np.ndarray:
    """The cache holds the current epoch and the next one, as that of `epoch_order` does.

    Stratified: the k-th of n draws is from the k-th n-th of the weights (Kitagawa 1996, appendix). So records, classes and
    datasets come as often as their weights say, to within two times, where independent draws would leave out a third of the
    records of equal weight.
    """
    assert selection.by_class is not None and selection.edges is not None
    places = np.arange(selection.records)
    drawn = uniform(draws(seed, epoch, places, np.array([ORDER]), WEIGHTED)[:, 0])
    numbers = np.searchsorted(selection.edges, places + drawn)
    return np.sort(selection.by_class[numbers])


def select(
    reader: RecordReader, manifest: Manifest, subset: np.ndarray | None, weights: "np.ndarray | str | None"
) -> Selection | None:
    """The records to choose, by `find_records` and `find_weights`; None if that is each once. Raises UserError if weights are 0
    where they must not be."""
    parts = manifest.parts if isinstance(manifest, JoinedManifest) else (manifest,)
    shares = manifest.shares if isinstance(manifest, JoinedManifest) else None
    if subset is None and weights is None and shares is None:
        return None
    ids = np.arange(len(reader)) if subset is None else subset
    if weights is None and shares is None:
        return Selection(ids, len(ids))
    groups, part_of = reader.labels[ids].astype(np.int64), np.zeros(len(ids), np.int64)
    if shares:
        records = [part.split(reader.split).records for part in parts]
        part_of = np.repeat(np.arange(len(parts)), records)[ids]
        groups += part_of * len(manifest.classes)
    if weights is None:
        each = np.ones(len(ids))
    elif isinstance(weights, str):  # balanced
        each = 1 / np.bincount(groups)[groups]
    else:
        each = weights[ids]
    each = each / (each.max(initial=0) or 1)  # so that sums of the largest and the smallest floats stay floats
    sums = np.array([each[part_of == part].sum() for part in range(len(parts) if shares else 1)])
    if not sums.all():
        where = f"{parts[int(np.argmin(sums))].root}: " if shares else ""
        raise UserError(f"{where}all `weights` of its records are 0, or `subset` leaves none; choose at least one of them")
    # Equal weights become 1, with exact sums; as fractions of an epoch they would let a few of a million records come twice.
    each *= (len(ids) * np.array(shares or (1.0,)) / sums)[part_of]
    order = ranked(groups.astype(np.uint64) << np.uint64(32))
    order = order[each[order] > 0]
    edges = np.cumsum(each[order])
    edges[-1] = len(ids)
    return Selection(ids[each > 0], len(ids), ids[order], edges)


def find_records(subset: object, reader: RecordReader, manifest: Manifest) -> np.ndarray | None:
    """The record ids (M,) int64, ascending, of a `subset` (ImageLoader); None if that is all.

    Raises UserError for ids and names that do not exist or are given twice, and if there are none.
    """
    if subset is None:
        return None
    ids = _read(Path(subset), reader, manifest) if isinstance(subset, str | os.PathLike) else _ids(subset, reader, manifest)
    records = len(reader)
    if not len(ids):
        raise UserError(f"{manifest.root}: `subset` has no record of split {reader.split}; choose at least one")
    ids = np.sort(ids)
    if ids[0] < 0 or ids[-1] >= records:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise UserError(
            f"{manifest.root}: `subset` has record {wrong}, but split {reader.split} has the records 0 to {records - 1:,}; leave "
            "it out"
        )
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise UserError(f"`subset` has record {ids[twice[0]]} more than once; give each record once, and use `weights` to repeat")
    return None if len(ids) == records else ids


def _ids(subset: object, reader: RecordReader, manifest: Manifest) -> np.ndarray:
    try:
        values = np.asarray(list(subset) if isinstance(subset, Collection) and not hasattr(subset, "__array__") else subset)
    except ValueError:  # lists of different lengths
        values = np.array(subset, object)
    if values.dtype.kind == "U" and values.ndim == 1:
        return _named(values.tolist(), reader, manifest)
    if isinstance(subset, bytes) or (values.size and (values.dtype.kind not in "iu" or values.ndim != 1)):
        raise UserError(
            f"`subset` holds {values.dtype} of shape {values.shape}, not record ids; give whole numbers in one row, names of "
            "classes or a file (of a mask, give numpy.flatnonzero(mask))"
        )
    return values.astype(np.int64)


def _read(path: Path, reader: RecordReader, manifest: Manifest) -> np.ndarray:
    """The records that a file names: .npy, or text with one of them a line."""
    try:
        if path.suffix == ".npy":
            return _ids(np.load(path, allow_pickle=False), reader, manifest)
        text = path.read_text("utf-8-sig", "surrogateescape")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: `subset` is no file; give an existing one, or names of classes as a list") from None
    except (ValueError, EOFError):
        raise UserError(f"{path}: `subset` is not readable as .npy; give an array of record ids") from None
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    names = [*lines.values()]
    numbers = all(map(str.isdecimal, names))
    if numbers and set(names) & set(manifest.classes):
        raise UserError(
            f"{path}: its lines may be record ids or names of classes, as both are numbers; give `subset` as .npy if they are "
            "ids, or names as a list"
        )
    return np.array(names, np.int64) if numbers else _named(names, reader, manifest, [f"{path}, line {n}: " for n in lines])


def _named(names: Sequence[str], reader: RecordReader, manifest: Manifest, lines: Sequence[str] = ()) -> np.ndarray:
    """The records of classes or, if no name is a class's, of raw files; `lines` say where in a file each name is."""
    wanted = set(names)
    if len(wanted) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        where = lines[len(names) - 1 - names[::-1].index(twice)] if lines else ""
        raise UserError(f"{where}`subset` has {twice} more than once; give each name once")
    labels = [label for label, name in enumerate(manifest.classes) if name in wanted]
    if labels:
        _refuse_unknown(names, manifest.classes, "a class", "classes", reader, manifest, lines)
        return np.flatnonzero(np.isin(reader.labels, labels))
    found: dict[str, int] = {}
    for record_id in range(len(reader)):
        path = reader.filename(record_id)
        while path not in wanted and "/" in path:
            path = path.partition("/")[2]
        if path in wanted:
            if path in found:
                both = f"records {found[path]} and {record_id}"
                raise UserError(
                    f"{manifest.root}: `subset` has {path}, which is the name of {both}; give more of its path, or ids"
                )
            found[path] = record_id
    _refuse_unknown(names, found, "a raw file", "raw files", reader, manifest, lines)
    return np.array(list(found.values()), np.int64)


def _refuse_unknown(
    names: Sequence[str],
    known: Collection[str],
    a_kind: str,
    kinds: str,
    reader: RecordReader,
    manifest: Manifest,
    lines: Sequence[str],
) -> None:
    """Raises UserError for those of the names that are not `known`: not `a_kind`, as the others are."""
    unknown = [at for at, name in enumerate(names) if name not in known]
    if not unknown:
        return
    one = len(unknown) == 1
    where = lines[unknown[0]] if lines else f"{manifest.root}: `subset` has "
    wrong = f"{where}{examples(names[at] for at in unknown)}{'' if lines else ', which'} {'is' if one else 'are'}"
    classes = f"the classes are {examples(manifest.classes)}"
    like = next((at for at, name in enumerate(names) if name in known), None)
    if like is None:
        neither = "neither a class nor a raw file" if one else "neither classes nor raw files"
        raise UserError(f"{wrong} {neither} of split {reader.split}; {classes}")
    example = f"{lines[like].rpartition(', ')[2].rstrip(': ')} ({names[like]})" if lines else names[like]
    remedy = f"classes ({classes})" if kinds == "classes" else f"{kinds} of split {reader.split}"
    raise UserError(f"{wrong} not {a_kind if one else kinds}, as {example} is; give only {remedy}")


def find_weights(weights: object, reader: RecordReader, manifest: Manifest, subset: np.ndarray | None) -> np.ndarray | str | None:
    """`weights` (ImageLoader) as a number for each record of the split, (records,) float64, or "balanced".

    Raises UserError if there are too few or too many, for unknown classes, and for numbers below 0 or not finite.
    """
    if weights is None or isinstance(weights, str):
        return weights
    if isinstance(weights, Mapping):
        unknown = [str(name) for name in weights if name not in manifest.classes]
        held = np.unique(reader.labels if subset is None else reader.labels[subset])
        missing = [manifest.classes[label] for label in held if label >= 0 and manifest.classes[label] not in weights]
        for names, problem in ((unknown, "names that are no class"), (missing, "no number for classes")):
            if names:
                raise UserError(f"{manifest.root}: `weights` has {problem}: {examples(names)}; give each class a number")
        # The last is for records without a label.
        numbers = _floats([*(weights.get(name, 0) for name in manifest.classes), 0])[reader.labels]
    else:
        numbers = _floats(weights)
        if numbers.shape != (len(reader),):
            raise UserError(
                f"{manifest.root}: `weights` has shape {numbers.shape}, but split {reader.split} has {len(reader):,} records; "
                "give one number for each, by record id"
            )
    usable = np.isfinite(numbers) & (numbers >= 0)
    if not usable.all():
        record_id = int(np.argmin(usable))
        raise UserError(f"`weights` has {numbers[record_id]} for record {record_id}; give finite numbers of 0 or more")
    return numbers


def _floats(numbers: object) -> np.ndarray:
    try:
        return np.array(numbers, np.float64)
    except (TypeError, ValueError):
        raise UserError("`weights` holds what is no number; give a number for each record or class") from None


def in_short(chosen: np.ndarray | str | None) -> str | None:
    """What `find_records` or `find_weights` returned, arrays by length and digest, to compare runs by."""
    if not isinstance(chosen, np.ndarray):
        return chosen
    return f"of {plural(len(chosen), 'record')} ({hashlib.sha256(chosen.tobytes()).hexdigest()[:16]})"
