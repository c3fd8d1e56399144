"""Ends a build: merges what its shards left into the indexes, the reports, the statistics and, last, the manifest."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, write_atomically
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split
from imagefeed.dataset.records import NO_LABEL, index_name
from imagefeed.preprocess.duplicates import MARK_DTYPE, find_duplicates
from imagefeed.preprocess.image import codec_versions
from imagefeed.preprocess.sources.listing import Source
from imagefeed.preprocess.state import ShardState
from imagefeed.preprocess.statistics import PixelSums

REJECTED = "rejected.jsonl"
DUPLICATES = "duplicates.jsonl"


def write_manifest(
    source: Source, out: Path, settings: dict, shards: dict[str, list[str]], orders: Callable[[str], np.ndarray]
) -> Manifest:
    """Writes everything that is of the whole dataset. `shards[split]` are the names of its shards, all of them finished;
    `orders(split)` the places of its images in the source, in the order in which they were packed."""
    sums = PixelSums(settings["size"])
    marks: dict[str, np.ndarray] = {}
    found: dict[str, Split] = {}
    files = [REJECTED, DUPLICATES, STATISTICS]
    actions = write_rejected(out, (state for names in shards.values() for state in _load(out, names)))
    for split, names in shards.items():
        parts: list[Shard] = []
        rows: list[np.ndarray] = []
        marks[split] = np.zeros(len(source.splits[split]), MARK_DTYPE)
        order, at = orders(split), 0
        for state in _load(out, names):
            parts.append(state.shard)
            rows.append(state.rows)
            marks[split][order[at : at + len(state.marks)]] = state.marks
            at += len(state.marks)
            sums.merge(state.sums)
        index = np.concatenate(rows)
        if not len(index):
            raise UserError(f"{out}: all images of split {split} are bad; see {out / REJECTED}")
        counts = np.bincount(index["label"][index["label"] != NO_LABEL], minlength=len(source.classes))
        found[split] = Split(tuple(parts), tuple(counts.tolist()))
        _save(out / f"{split}.index.npy", np.save, index)
        files += [f"{split}.index.npy", *map(index_name, names)]
    _save(out / STATISTICS, np.savez, **sums.statistics())
    duplicates = _write_duplicates(source, out, marks)
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


def write_rejected(out: Path, states: Iterator[ShardState]) -> Counter:
    """Writes rejected.jsonl, the entries of `states`; returns how often each action was taken."""
    actions: Counter = Counter()
    lines = []
    for state in states:
        actions.update(entry["action"] for entry in state.entries)
        lines += [json.dumps(entry) + "\n" for entry in state.entries]
    write_atomically(out / REJECTED, "".join(lines).encode())
    return actions


def _load(out: Path, names: list[str]) -> Iterator[ShardState]:
    return (ShardState.load(out, name) for name in names)


def _write_duplicates(source: Source, out: Path, marks: dict[str, np.ndarray]) -> dict[str, int]:
    """Writes duplicates.jsonl, a line for each group of images of the same bytes; returns how many there are of each kind."""
    counts: Counter = Counter()
    lines = []
    for group in find_duplicates(source, marks):
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
