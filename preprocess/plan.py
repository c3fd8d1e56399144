"""Which images each shard takes: the plan on which alone its bytes depend."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.records import shard_name

RECORDS_PER_SHARD = 4096  # 1,281,167 images give 313 shards of about 90 MB
# Small datasets are cut finer, so that all cores have work; never by the number of cores, which must not change the bytes.
SMALL_SHARDS, SMALL_SHARD_RECORDS = 32, 64


class PlannedShard(NamedTuple):
    """A shard to write: it takes the images of the shuffled split from `start` to `end`."""

    split: str
    number: int
    name: str
    start: int
    end: int

    def places(self, images: int, seed: int) -> np.ndarray:
        """The places of its images in the source's list of its split, which has so many, in stored order."""
        return shuffled(images, seed)[self.start : self.end]


def num_shards(images: int) -> int:
    return max(-(-images // RECORDS_PER_SHARD), min(SMALL_SHARDS, -(-images // SMALL_SHARD_RECORDS)))


def plan_shards(lengths: Mapping[str, int]) -> list[PlannedShard]:
    """The shards of splits of so many images."""
    plan = []
    for split, images in lengths.items():
        count = num_shards(images)
        for number in range(count):
            share = number * images // count, (number + 1) * images // count
            plan.append(PlannedShard(split, number, shard_name(split, number, count), *share))
    return plan


@functools.lru_cache(maxsize=1)
def shuffled(images: int, seed: int) -> np.ndarray:
    """The global shuffle; RandomState, because NumPy promises that its stream never changes (NEP 19)."""
    return np.random.RandomState(seed).permutation(images)
