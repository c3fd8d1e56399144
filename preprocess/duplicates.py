"""Finds images that a raw tree holds more than once: first by checksum and size, then by their bytes."""

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np

from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.listing import Source, SourceImage, read_images

# What a worker notes of each raw image: cheap (10 us for 110 KB), and enough to leave few pairs to compare in full.
MARK_DTYPE = np.dtype([("crc32c", "<u4"), ("size", "<u4")])


def find_duplicates(source: Source, marks: dict[str, np.ndarray]) -> Iterator[list[tuple[str, SourceImage]]]:
    """Yields each group of images with the same bytes, with their splits, in the order of their first one.

    `marks[split]` has a MARK_DTYPE row for each image in the order of the source; size 0 if it could not be read.
    """
    keys = np.concatenate([rows["crc32c"].astype(np.uint64) << np.uint64(32) | rows["size"] for rows in marks.values()])
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    groups = [group for group in np.split(order, ends) if len(group) > 1 and keys[group[0]] & np.uint64(0xFFFFFFFF)]
    names = list(marks)
    starts = np.cumsum([0, *(len(rows) for rows in marks.values())])
    suspects = np.concatenate([*sorted(groups, key=lambda group: group[0]), np.empty(0, np.int64)])
    splits = np.searchsorted(starts, suspects, "right") - 1
    listed = (source.images(names[split], np.array([at - starts[split]]))[0] for at, split in zip(suspects, splits))
    read = zip(suspects, splits, read_images(source.root, listed))
    for _, group in itertools.groupby(read, lambda each: keys[each[0]]):
        by_bytes: dict[bytes, list[tuple[str, SourceImage]]] = {}
        for _, split, (image, read_it) in group:
            try:
                digest = hashlib.sha256(read_it()[0]).digest()
            except BadImage:
                continue  # it has gone since it was packed
            by_bytes.setdefault(digest, []).append((names[split], image))
        yield from (same for same in by_bytes.values() if len(same) > 1)
