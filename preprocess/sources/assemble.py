"""Makes the images of a split of what a layout listed, and counts them."""

from collections.abc import Collection, Sequence

import numpy as np

from imagefeed.dataset.columns import Column
from imagefeed.dataset.decision import SplitDecision
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.options import SourceOptions
from imagefeed.preprocess.sources.columns import make_columns
from imagefeed.preprocess.sources.listing import OWN_FILE, PLACE_DTYPE, Listing, Packed, RawTree, SourceSplit


def join_listings(listings: list[Listing], label_of: dict[str, int]) -> SourceSplit:
    """The images of all listings of a split, one after the other."""
    labels, places = [], []
    paths: list[str] = []
    reasons: dict[int, str] = {}
    in_files = any(listing.places is not None for listing in listings)
    for listing in listings:
        reasons |= {len(paths) + at: reason for at, reason in listing.reasons.items()}
        paths = paths + listing.paths if paths else listing.paths
        lookup = np.array([*(label_of[name] for name in listing.names), NO_LABEL], np.int32)  # codes of -1 take the last
        labels.append(lookup[listing.codes])
        own = np.zeros(len(listing.paths), PLACE_DTYPE)
        own["file"] = OWN_FILE
        places.append(own if listing.places is None else listing.places)
    return SourceSplit(paths, np.concatenate(labels), np.concatenate(places) if in_files else None, reasons)


def join_columns(tree: RawTree, listings: dict[str, list[Listing]], wanted: Sequence[str]) -> dict[str, dict[str, Column]]:
    """The wanted columns of each split."""
    if any(name not in listing.columns for name in wanted for listing in tree.listings):
        raise UserError(
            f"{tree.root}: read as {tree.layout}, which has no columns; `columns` is for tables, Parquet files and WebDataset's "
            "shards, so give one of these as RAW"
        )
    listed: dict[str, dict[str, Sequence]] = {
        split: {name: [value for listing in those for value in listing.columns[name]] for name in wanted}
        for split, those in listings.items()
    }
    return make_columns(tree.root, listed, tree.notes)


def hold_out(tree: RawTree, whole: SourceSplit, options: SourceOptions) -> dict[str, SourceSplit]:
    """The same images as train and val: of each class, `validation_fraction` by chance, at least one and never all."""
    random = np.random.RandomState(options.seed)
    held = np.zeros(len(whole), bool)
    for label in np.unique(whole.labels):
        positions = np.flatnonzero(whole.labels == label)
        count = max(1, round(options.validation_fraction * len(positions)))
        held[random.permutation(positions)[: min(count, len(positions) - 1)]] = True
    if not held.any():
        raise UserError(f"{tree.root}: no class has two images, so none can be held out; leave out `validation_fraction`")
    tree.notes.append(f"val is a random sample of every class (seed {options.seed}); adding or removing images draws another")
    return {name: _take(whole, np.flatnonzero(kept)) for name, kept in (("train", ~held), ("val", held))}


def _take(split: SourceSplit, positions: np.ndarray) -> SourceSplit:
    reasons = {new: split.reasons[old] for new, old in enumerate(positions.tolist()) if old in split.reasons}
    places = None if split.places is None else split.places[positions]
    columns = {name: column.take(positions) for name, column in split.columns.items()}
    return SourceSplit([split.paths[at] for at in positions], split.labels[positions], places, reasons, columns=columns)


def describe_split(
    split: SourceSplit, packed: list[Packed], packed_unlabeled: int, packed_labels: Collection[int], role: str
) -> SplitDecision:
    counts = count_classes(split)
    in_packed = sum(file.num_images for file in packed)
    labeled = int(counts.sum()) + in_packed - packed_unlabeled
    return SplitDecision(role, len(split) + in_packed, labeled, len({*np.flatnonzero(counts).tolist(), *packed_labels}))


def count_classes(split: SourceSplit, classes: int = 0) -> np.ndarray:
    """The number of images of each class, for at least `classes` classes."""
    return np.bincount(split.labels + 1, minlength=classes + 1)[1:]  # without those of NO_LABEL, -1
