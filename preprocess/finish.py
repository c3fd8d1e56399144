"""Completes a dataset: merges what its shards left into the indexes, the reports, the statistics and, last, the manifest."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, write_atomically
from imagefeed.dataset.manifest import STATISTICS, Manifest, Shard, Split
from imagefeed.dataset.records import NO_LABEL, index_name
from imagefeed.preprocess.duplicates import find_duplicates
from imagefeed.preprocess.plan import PlannedShard
from imagefeed.preprocess.raw import RAW, RawRecord
from imagefeed.preprocess.sources.listing import Source
from imagefeed.preprocess.stale import save_build
from imagefeed.preprocess.state import REJECTED, STAMP_DTYPE, ShardState, load_entries, save_arrays, versions
from imagefeed.preprocess.statistics import PixelSums

DUPLICATES = "duplicates.jsonl"


def write_manifest(source: Source, record: RawRecord, out: Path, settings: dict, plan: list[PlannedShard]) -> Manifest:
    """Writes all files that concern the whole dataset, whose shards must be finished. `record` is of the source, and gets its
    marks here."""
    sums = PixelSums(settings["size"])
    sums_of: dict[str, np.ndarray] = {}
    entries: list[int] = []
    stamps: dict[str, np.ndarray] = {}
    splits: dict[str, Split] = {}
    rejected: dict[str, np.ndarray] = {}
    columns: dict[str, str] = {}
    files = [REJECTED, DUPLICATES, STATISTICS]
    actions = write_rejected(out, (load_entries(out, shard.name) for shard in plan))
    for split, content in record.splits.items():
        finished: list[Shard] = []
        rows: list[np.ndarray] = []
        order, bad = [], []  # places of the raw images that are stored, in stored order, and of the others
        stamps[split] = np.empty(len(content.marks), STAMP_DTYPE)
        files.append(f"{split}.index.npy")
        for planned in plan:
            if planned.split != split:
                continue
            state = ShardState.load(out, planned.name)
            places = planned.places(len(content.marks), settings["seed"])
            content.marks[places], stamps[split][places] = state.marks, state.stamps
            order.append(np.delete(places, state.rejected))
            bad.append(places[state.rejected])
            finished.append(state.shard)
            rows.append(state.rows)
            entries.append(len(state.entries))
            sums_of[planned.name] = state.sums.pack()
            sums.merge(state.sums)
            files.append(index_name(planned.name))
        index = np.concatenate(rows)
        if not len(index):
            raise UserError(
                f"{out}: all images of split {split} are bad; see {out / REJECTED}, and if it is no split, move its folder out "
                "of the raw images and build into another OUT"
            )
        counts = np.bincount(index["label"][index["label"] != NO_LABEL], minlength=len(source.classes))
        splits[split] = Split(tuple(finished), tuple(counts.tolist()))
        save_arrays(out / f"{split}.index.npy", np.save, index)
        rejected[split] = np.concatenate(bad)
        for name, column in source.splits[split].columns.items():
            columns[name] = column.kind
            files += column.take(np.concatenate(order)).save(out, split, name)
    save_arrays(out / STATISTICS, np.savez, **sums.statistics())
    record.save(out / RAW)
    for (packed, places), unpacked in zip(record.places(), source.unpacked):
        stamps[packed.split][places] = unpacked.stamp  # those of the state are of files that are removed now
    save_build(out, stamps, rejected, entries, sums_of)
    manifest = Manifest(
        out,
        source.classes,
        splits,
        settings,
        versions(),
        dict(sorted(actions.items())),
        _write_duplicates(source, out, {split: content.marks for split, content in record.splits.items()}),
        {name: hash_file(out / name) for name in files},
        source.titles,
        decision=source.decision,
        columns=columns,
    )
    manifest.save()
    return manifest


def write_rejected(out: Path, entries_of_shards: Iterable[list[dict[str, str]]]) -> Counter:
    """Writes rejected.jsonl; returns how often each action was taken."""
    entries = [entry for entries in entries_of_shards for entry in entries]
    write_atomically(out / REJECTED, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    return Counter(entry["action"] for entry in entries)


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
