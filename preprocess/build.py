"""Builds a dataset: plans shards, has workers write them, merges what they report, writes the manifest last.

A shard's bytes depend on the plan alone, so any number of workers gives the same dataset. Each finished shard leaves its
index rows, sums and rejected images in OUT/.build; a build that is run again goes on with the shards that are missing there.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from preprocess.duplicates import MARK_DTYPE, find_duplicates
from preprocess.engine import ProcessRunner
from preprocess.errors import UserError
from preprocess.image import BadImage, ImageOptions, codec_versions, prepare_image
from preprocess.layouts.listing import Source, SourceImage, read_image
from preprocess.layouts.spool import unpack
from preprocess.manifest import NAME, STATISTICS, Manifest, Shard, Split, hash_file, training_split
from preprocess.records import (
    INDEX_DTYPE,
    NO_LABEL,
    Record,
    ShardWriter,
    crc32c,
    index_name,
    shard_name,
    write_atomically,
)
from preprocess.statistics import PixelSums

RECORDS_PER_SHARD = 4096  # 1,281,167 images give 313 shards of about 90 MB
# Small datasets are cut finer, so that all cores have work; never by the number of cores, which must not change the bytes.
SMALL_SHARDS, SMALL_SHARD_RECORDS = 32, 64
REJECTED = "rejected.jsonl"
DUPLICATES = "duplicates.jsonl"
STATE = ".build"
SPOOL = "spool"  # in STATE: images that had to be unpacked before they could be read one by one
REPORT_EVERY = 32  # images between two signs of life from a worker

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    root: Path
    out: Path
    name: str
    number: int
    images: list[SourceImage]
    classes: tuple[str, ...]
    options: ImageOptions
    statistics: bool

    def __str__(self) -> str:
        return self.name


def build_dataset(
    source: Source,
    out: Path,
    options: ImageOptions,
    seed: int,
    runner: ProcessRunner,
    max_rejected: float = 0.01,
    progress: Progress = lambda images, bytes_read, rejected: None,
    unpacking: Progress = lambda files, images, bytes_written: None,
) -> Manifest:
    """Packs all splits of `source` into `out`, going on where an earlier call stopped.

    `max_rejected` is the share of images that may be bad. `progress` is called with the images done, bytes read and images
    rejected since its last call; before that, where images have to be unpacked, `unpacking` with files, images and bytes
    unpacked. Raises UserError where `out` was begun with other options or other images, another build
    is at work in it, or too many images are bad.
    """
    settings = {**asdict(options), "seed": seed, "source": source.fingerprint(), **source.options}
    with _named(out), _locked(out):
        _refuse_other_settings(out, settings, codec_versions())
        manifest = _whole_manifest(out)
        if source.packed and manifest is not None and _has_all_shards(manifest):
            progress(source.num_images, 0, 0)
            shutil.rmtree(out / STATE)
            return manifest  # without unpacking all again
        source = unpack(source, out / STATE / SPOOL, runner, unpacking) if source.packed else source
        plan = {split: num_shards(len(images)) for split, images in source.splits.items()}
        pending = [
            (split, number)
            for split, shards in plan.items()
            for number in range(shards)
            if not _is_finished(out, shard_name(split, number, shards), manifest)
        ]
        tasks = (_task(source, out, options, seed, split, number, plan[split]) for split, number in pending)
        left = sum(len(_share(len(source.splits[split]), number, plan[split])) for split, number in pending)
        rejected = sum(entry["action"] == "rejected" for entry in _reports(out, plan, manifest))
        progress(source.num_images - left, 0, rejected)
        for rejected_now in runner.map(write_shard, tasks, progress):
            rejected += rejected_now
            if rejected > max_rejected * source.num_images:
                _write_reports(out, plan)
                raise UserError(
                    f"{rejected} of {source.num_images} images are bad, more than the {max_rejected:.2%} that --max-rejected "
                    f"allows; see {out / REJECTED}, mend them or raise the limit, and run the same command again"
                )
        if manifest is not None:
            _check_mended(manifest, pending)
        else:
            manifest = _finish(source, out, settings, plan)
        shutil.rmtree(out / STATE)
        return manifest


def num_shards(images: int) -> int:
    return max(-(-images // RECORDS_PER_SHARD), min(SMALL_SHARDS, -(-images // SMALL_SHARD_RECORDS)))


def write_shard(task: ShardTask, report: Progress) -> int:
    """Writes one shard, then its state file, which marks it finished; returns the number of images rejected."""
    sums = PixelSums(task.options.size)
    entries: list[dict[str, str]] = []
    marks = np.zeros(len(task.images), MARK_DTYPE)
    fresh = Counter()  # since the last report
    rejected = 0
    with ShardWriter(task.out / task.name, task.number) as writer:
        for number, image in enumerate(task.images, start=1):
            fresh["images"] += 1
            try:
                data = read_image(task.root, image)
                fresh["bytes"] += len(data)
                marks[number - 1] = crc32c(data), len(data)
                prepared = prepare_image(data, task.options)
            except BadImage as error:
                entries.append({"path": image.path, "action": "rejected", "reason": str(error)})
                fresh["rejected"] += 1
                rejected += 1
            else:
                height, width = prepared.pixels.shape[:2]
                name = task.classes[image.label] if image.label != NO_LABEL else ""
                writer.append(Record(prepared.jpeg, image.label, name, image.path, height, width))
                if prepared.converted:
                    entries.append({"path": image.path, "action": "converted", "reason": prepared.converted})
                if task.statistics:
                    sums.add(prepared.pixels)
            if number % REPORT_EVERY == 0 or number == len(task.images):
                report(fresh["images"], fresh["bytes"], fresh["rejected"])
                fresh.clear()
    shard = Shard(task.name, len(writer.rows), writer.bytes_written, writer.sha256)
    state = io.BytesIO()
    np.savez(
        state,
        rows=np.array(writer.rows, INDEX_DTYPE),
        marks=marks,
        report=np.array(json.dumps({"shard": asdict(shard), "entries": entries})),
        **sums.arrays(),
    )
    write_atomically(_state_path(task.out, task.name), state.getvalue())
    return rejected


def _share(images: int, number: int, shards: int) -> range:
    """The places, in the shuffled split, of the images of one shard."""
    return range(number * images // shards, (number + 1) * images // shards)


def _task(
    source: Source, out: Path, options: ImageOptions, seed: int, split: str, number: int, shards: int
) -> ShardTask:
    images = len(source.splits[split])
    order = _shuffled(images, seed)[_share(images, number, shards)]
    return ShardTask(
        source.root,
        out,
        shard_name(split, number, shards),
        number,
        source.images(split, order),
        source.classes,
        options,
        split == training_split(list(source.splits)),
    )


@functools.lru_cache(maxsize=1)
def _shuffled(images: int, seed: int) -> np.ndarray:
    """The global shuffle; RandomState, because NumPy promises that its stream never changes (NEP 19)."""
    return np.random.RandomState(seed).permutation(images)


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """Gives an error of the system that names no file, as that of a full disk, the name of the folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        error.filename = error.filename or str(out)
        raise


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds OUT/.build/lock, so that two builds never write into one dataset, and clears what a killed one left."""
    path = out / STATE / "lock"
    while True:
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{out}: another build is writing into it; wait until it is done, or choose another OUT"
                ) from None
            try:
                if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                    continue
            except FileNotFoundError:  # the build that held it has just finished and removed the folder
                continue
            _remove_temporaries(out)
            try:
                yield
            finally:
                _remove_temporaries(out)
            return


def _remove_temporaries(out: Path) -> None:
    for folder in (out, out / STATE, out / STATE / SPOOL):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _refuse_other_settings(out: Path, settings: dict, versions: dict[str, str]) -> None:
    """Compares with what `out` was begun with, recorded at the first call."""
    path = out / STATE / "settings.json"
    if (out / NAME).exists():
        manifest = Manifest.load(out)
        begun = {"settings": manifest.options, "versions": manifest.versions}
    elif path.exists():
        begun = json.loads(path.read_bytes())
    else:
        begun = {"settings": settings, "versions": versions}
    write_atomically(path, json.dumps(begun).encode())
    for name, value in settings.items():
        before = begun["settings"].get(name)
        if before != value and name == "source":
            raise UserError(
                f"{out}: begun with other images than those now listed; restore them, or choose another OUT"
            )
        if before != value:
            raise UserError(
                f"{out}: begun with {name} {before}, this call says {value}; give the same, or choose another OUT"
            )
    if begun["versions"] != versions:
        raise UserError(
            f"{out}: begun with {_listed(begun['versions'])}, this environment has {_listed(versions)}, which may store other "
            "bytes; install the former, or choose another OUT"
        )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _state_path(out: Path, shard: str) -> Path:
    return out / STATE / f"{shard}.npz"


def _is_finished(out: Path, shard: str, manifest: Manifest | None) -> bool:
    """Whether a shard, its index and (until there is a manifest) its state are all there."""
    present = (out / shard).exists() and (out / index_name(shard)).exists()
    return present and (manifest is not None or _state_path(out, shard).exists())


def _whole_manifest(out: Path) -> Manifest | None:
    """The manifest of a finished dataset, of which at most shards are missing; one without its index goes, to be made anew."""
    if not (out / NAME).exists():
        return None
    manifest = Manifest.load(out)
    if all((out / name).exists() for name in manifest.files if not name.endswith(".idx")):
        return manifest
    (out / NAME).unlink()
    return None


def _has_all_shards(manifest: Manifest) -> bool:
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return all(_is_finished(manifest.root, shard.name, manifest) for shard in shards)


def _check_mended(manifest: Manifest, pending: list[tuple[str, int]]) -> None:
    for split, number in pending:
        shard = manifest.splits[split].shards[number]
        if hash_file(manifest.root / shard.name) != shard.sha256:
            raise UserError(
                f"{manifest.root / shard.name}: written again, it differs from what the manifest says; the raw images have "
                "changed since, so build into another OUT"
            )


def _states(out: Path, splits: dict[str, int]) -> Iterator[tuple[str, dict]]:
    """(split, arrays of the state file) of each finished shard, in order."""
    for split, shards in splits.items():
        for number in range(shards):
            path = _state_path(out, shard_name(split, number, shards))
            if path.exists():
                with np.load(path) as arrays:
                    yield split, dict(arrays)


def _reports(out: Path, splits: dict[str, int], manifest: Manifest | None) -> Iterator[dict[str, str]]:
    """The images so far rejected, repaired or converted."""
    if manifest is not None:
        yield from map(json.loads, (out / REJECTED).read_text().splitlines())
        return
    for _, arrays in _states(out, splits):
        yield from json.loads(str(arrays["report"]))["entries"]


def _write_reports(out: Path, splits: dict[str, int]) -> Counter:
    """Writes rejected.jsonl; returns how often each action was taken."""
    actions: Counter = Counter()
    lines = []
    for entry in _reports(out, splits, None):
        actions[entry["action"]] += 1
        lines.append(json.dumps(entry) + "\n")
    write_atomically(out / REJECTED, "".join(lines).encode())
    return actions


def _finish(source: Source, out: Path, settings: dict, splits: dict[str, int]) -> Manifest:
    """Merges the state of all shards into the indexes, the statistics and, last, the manifest."""
    sums = PixelSums(settings["size"])
    shards: dict[str, list[Shard]] = {split: [] for split in splits}
    rows: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    marks: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    for split, arrays in _states(out, splits):
        shards[split].append(Shard(**json.loads(str(arrays["report"]))["shard"]))
        rows[split].append(arrays["rows"])
        marks[split].append(arrays["marks"])
        sums.merge(PixelSums.from_arrays(arrays))
    actions = _write_reports(out, splits)
    duplicates = _write_duplicates(source, out, settings["seed"], marks)
    files = [REJECTED, DUPLICATES, STATISTICS]
    found: dict[str, Split] = {}
    for split in splits:
        index = np.concatenate(rows[split])
        if not len(index):
            raise UserError(f"{out}: all images of split {split} are bad; see {out / REJECTED}")
        counts = np.bincount(index["label"][index["label"] != NO_LABEL], minlength=len(source.classes))
        found[split] = Split(tuple(shards[split]), tuple(counts.tolist()))
        _save(out / f"{split}.index.npy", np.save, index)
        files += [f"{split}.index.npy", *(index_name(shard.name) for shard in shards[split])]
    _save(out / STATISTICS, np.savez, **sums.statistics())
    manifest = Manifest(
        out,
        source.classes,
        found,
        settings,
        codec_versions(),
        dict(sorted(actions.items())),
        duplicates,
        {name: hash_file(out / name) for name in files},
        source.titles,
    )
    manifest.save()
    return manifest


def _write_duplicates(source: Source, out: Path, seed: int, marks: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """Writes duplicates.jsonl, a line for each group of images of the same bytes; returns how many there are of each kind."""
    in_order: dict[str, np.ndarray] = {}
    for split, parts in marks.items():
        shuffled = np.concatenate(parts)
        in_order[split] = np.empty_like(shuffled)
        in_order[split][_shuffled(len(shuffled), seed)] = shuffled
    counts: Counter = Counter()
    lines = []
    for group in find_duplicates(source, in_order):
        counts["groups"] += 1
        counts["images"] += len(group.images)
        counts["across splits"] += group.across_splits
        counts["across classes"] += group.across_classes
        entry = {"paths": [image.path for image in group.images], "splits": group.splits}
        lines.append(json.dumps({**entry, "labels": [image.label for image in group.images]}) + "\n")
    write_atomically(out / DUPLICATES, "".join(lines).encode())
    return {name: count for name, count in counts.items() if count}


def _save(path: Path, save: Callable, *arrays: np.ndarray, **named: np.ndarray) -> None:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    write_atomically(path, buffer.getvalue())
