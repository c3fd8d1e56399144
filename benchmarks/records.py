"""Records as the loader feeds them to a decoder."""

import numpy as np

from imagefeed.dataset.reader import RecordReader


def stacked(records: RecordReader, first: int, count: int) -> np.ndarray:
    """The JPEGs of `count` records from `first` on, uint8 (count, longest), each followed by zeros."""
    ids = np.arange(first, first + count)
    found = np.empty((count, records.longest(ids)), np.uint8)
    records.gather(ids, found, found.shape[1])
    return found
