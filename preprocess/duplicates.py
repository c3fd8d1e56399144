"""Finds images that a raw tree holds more than once: first by checksum and size, then by their bytes."""

import hashlib
from collections.abc import Iterator

import numpy as np

from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.listing import Source, SourceImage, read_image

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
    for group in sorted(groups, key=lambda group: group[0]):
        by_bytes: dict[bytes, list[tuple[str, SourceImage]]] = {}
        for at in group:
            number = int(np.searchsorted(starts, at, "right")) - 1
            (image,) = source.images(names[number], np.array([at - starts[number]]))
            try:
                digest = hashlib.sha256(read_image(source.root, image)).digest()
            except BadImage:
                continue  # it has gone since it was packed
            by_bytes.setdefault(digest, []).append((names[number], image))
        yield from (same for same in by_bytes.values() if len(same) > 1)
