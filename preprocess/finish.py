"""Completes a dataset: merges what its shards left into the indexes, the reports, the statistics and, last, the manifest."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, write_atomically
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split
from imagefeed.dataset.records import NO_LABEL, index_name
from imagefeed.preprocess.duplicates import MARK_DTYPE, find_duplicates
from imagefeed.preprocess.image import codec_versions
from imagefeed.preprocess.sources.listing import Source
from imagefeed.preprocess.state import ShardState, save_arrays
from imagefeed.preprocess.statistics import PixelSums

REJECTED = "rejected.jsonl"
DUPLICATES = "duplicates.jsonl"


def write_manifest(
    source: Source, out: Path, settings: dict, shards: dict[str, list[str]], order_of: Callable[[str], np.ndarray]
) -> Manifest:
    """Writes all files that concern the whole dataset. `shards[split]` names its shards, which must be finished;
    `order_of(split)` is the order in which its images, by their places in the source, were packed."""
    sums = PixelSums(settings["size"])
    marks: dict[str, np.ndarray] = {}
    splits: dict[str, Split] = {}
    files = [REJECTED, DUPLICATES, STATISTICS]
    actions = write_rejected(out, (state for names in shards.values() for state in _load(out, names)))
    for split, names in shards.items():
        finished: list[Shard] = []
        rows: list[np.ndarray] = []
        packed: list[np.ndarray] = []
        for state in _load(out, names):
            finished.append(state.shard)
            rows.append(state.rows)
            packed.append(state.marks)
            sums.merge(state.sums)
        marks[split] = np.zeros(len(source.splits[split]), MARK_DTYPE)
        marks[split][order_of(split)] = np.concatenate(packed)
        index = np.concatenate(rows)
        if not len(index):
            raise UserError(
                f"{out}: all images of split {split} are bad; see {out / REJECTED}, and if it is no split, move its folder out "
                "of the raw images and build into another OUT"
            )
        counts = np.bincount(index["label"][index["label"] != NO_LABEL], minlength=len(source.classes))
        splits[split] = Split(tuple(finished), tuple(counts.tolist()))
        save_arrays(out / f"{split}.index.npy", np.save, index)
        files += [f"{split}.index.npy", *map(index_name, names)]
    save_arrays(out / STATISTICS, np.savez, **sums.statistics())
    manifest = Manifest(
        out,
        source.classes,
        splits,
        settings,
        codec_versions(),
        dict(sorted(actions.items())),
        _write_duplicates(source, out, marks),
        {name: hash_file(out / name) for name in files},
        source.titles,
        decision=source.decision,
    )
    manifest.save()
    return manifest


def write_rejected(out: Path, states: Iterable[ShardState]) -> Counter:
    """Writes rejected.jsonl, the entries of `states`; returns how often each action was taken."""
    entries = [entry for state in states for entry in state.entries]
    write_atomically(out / REJECTED, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    return Counter(entry["action"] for entry in entries)


def _load(out: Path, names: list[str]) -> Iterator[ShardState]:
    return (ShardState.load(out, name) for name in names)


def _write_duplicates(source: Source, out: Path, marks: dict[str, np.ndarray]) -> dict[str, int]:
    """Writes duplicates.jsonl, a line for each group of images with the same bytes; returns how many there are of each kind."""
    counts: Counter = Counter()
    lines = []
    for group in find_duplicates(source, marks):
        splits, images = zip(*group)
        labels = [image.label for image in images]
        counts["groups"] += 1
        counts["images"] += len(images)
        counts["across splits"] += len(set(splits)) > 1
        counts["across classes"] += len(set(labels)) > 1
        lines.append(json.dumps({"paths": [image.path for image in images], "splits": splits, "labels": labels}) + "\n")
    write_atomically(out / DUPLICATES, "".join(lines).encode())
    return {name: count for name, count in counts.items() if count}
