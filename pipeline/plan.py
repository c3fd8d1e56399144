"""Which records make a batch, and the crop, flip and colour of each: a pure function of (seed, epoch, record id).

Nothing here keeps a state. A draw is the output number (record id, slot) of a SplitMix64 generator seeded by seed
and epoch (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014); numpy's own generators
are not used, because their streams may change from one version to the next.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from preprocess.errors import UserError

VIEWS = ("random", "center", "ten")
# A place is where a crop begins, as a share of the room there is, in units of 2**-PLACE_BITS. 30 bits are what DALI's
# integer constants allow, and with a room of 32 no offset is likelier than another by more than 1 in 30 million.
PLACE_BITS = 30
NEAR, MIDDLE, FAR = 0, 1 << (PLACE_BITS - 1), (1 << PLACE_BITS) - 1
# Corners and centre, then the same five mirrored (paper, section 4.1); (row, column).
TEN_PLACES = np.array([(NEAR, NEAR), (NEAR, FAR), (FAR, NEAR), (FAR, FAR), (MIDDLE, MIDDLE)] * 2, np.int64)
TEN_MIRRORS = np.repeat(np.array([0, 1], np.int32), 5)

# Slots of a record's draws in an epoch. The numbers decide every batch: add to them, never renumber.
SLOTS = 32
ORDER, ROW, COLUMN, MIRROR, COLOUR = 0, 1, 2, 3, 4  # COLOUR takes four
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class Views(NamedTuple):
    """How each record of a batch is looked at; V is 1, or 10 for ten views."""

    places: np.ndarray  # (V, N, 2) int64: row and column of the crop, see `offset`
    mirrors: np.ndarray  # (V, N) int32: 1 mirrors left to right
    colour: np.ndarray  # (N, 3) float64: standard normal draws, one for each eigenvector of the RGB covariance


@dataclass(frozen=True)
class Plan:
    """The batches of one rank, by position: the number of steps before it since the first epoch began.

    `views` "random" (training) shuffles and drops the remainder of an epoch; "center" and "ten" (evaluation) take
    each record once in stored order and pad the end, the same number of steps for each rank. Each global batch is
    cut into ranks, so at another world size with the same global batch the global order stays.
    """

    records: int
    batch_size: int
    views: str = "random"
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch size {self.batch_size} must be 1 or more, rank {self.rank} below {self.world_size}"
            )
        if self.steps == 0:
            raise UserError(
                f"{self.records} records do not fill one global batch of {self.global_batch}; "
                "lower the batch size (--batch-size)"
            )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def steps(self) -> int:
        """Steps in an epoch, the same for every rank."""
        whole = self.records // self.global_batch
        return whole if self.views == "random" else whole + (self.records % self.global_batch > 0)

    def ids(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Record ids (N,) int64 of the batch at `position`, and valid (N,) bool, False where it is padding."""
        epoch, step = divmod(position, self.steps)
        start = step * self.global_batch + self.rank * self.batch_size
        places = np.arange(start, start + self.batch_size)
        valid = places < self.records
        if self.views == "random":
            return epoch_order(self.seed, epoch, self.records)[places], valid
        return np.where(valid, places, 0), valid

    def look(self, position: int, ids: np.ndarray) -> Views:
        """The views of records `ids` in the epoch of `position`."""
        if self.views == "random":
            drawn = draws(self.seed, position // self.steps, ids, np.arange(ROW, COLOUR + 4))
            return Views(
                (drawn[None, :, :2] >> np.uint64(64 - PLACE_BITS)).astype(np.int64),
                (drawn[None, :, MIRROR - ROW] >> np.uint64(63)).astype(np.int32),
                normal(drawn[:, COLOUR - ROW :]),
            )
        if self.views == "center":
            places, mirrors = np.full((1, 2), MIDDLE, np.int64), np.zeros(1, np.int32)
        else:
            places, mirrors = TEN_PLACES, TEN_MIRRORS
        return Views(
            np.repeat(places[:, None], len(ids), 1), np.repeat(mirrors[:, None], len(ids), 1), np.zeros((len(ids), 3))
        )


def offset(place: np.ndarray, room: int | np.ndarray) -> np.ndarray:
    """Where a crop begins, in pixels, uniform over 0..room inclusive for uniform places; room = image - crop size."""
    return place * (room + 1) >> PLACE_BITS


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, records: int) -> np.ndarray:
    """The record ids (records,) int64 in the order of an epoch: a permutation, read-only.

    The last few are kept: the current epoch and the one that is prefetched, for two loaders.
    """
    # Sorted by hash. The id stands in the low bits of what is sorted, so no two are equal and any sort gives the same;
    # all of it takes 0.06 s for 1.28 million, with a stable argsort 0.27 s. 43 bits of the hash remain then.
    low = np.uint64((1 << (records - 1).bit_length()) - 1)
    hashed = draws(seed, epoch, np.arange(records), np.array([ORDER]))[:, 0]
    order = (np.sort((hashed & ~low) | np.arange(records, dtype=np.uint64)) & low).astype(np.int64)
    order.setflags(write=False)
    return order


def draws(seed: int, epoch: int, ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Uniform 64-bit draws (ids, slots) uint64."""
    key = mix(mix(np.array([seed & MASK], np.uint64)) + np.uint64(epoch + 1))
    counters = ids.astype(np.uint64)[:, None] * np.uint64(SLOTS) + slots.astype(np.uint64) + np.uint64(1)
    return mix(key + counters * np.uint64(GOLDEN))


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, Stafford's variant 13, over a uint64 array."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(drawn: np.ndarray) -> np.ndarray:
    """Three standard normal draws (N, 3) float64 from four uniform ones (N, 4) uint64 (Box and Muller 1958)."""
    # 53 bits, and half of one more so that the logarithm never sees a zero.
    uniform = ((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :2])), 2 * np.pi * uniform[:, 2:]
    return np.stack(
        (radius[:, 0] * np.cos(angle[:, 0]), radius[:, 0] * np.sin(angle[:, 0]), radius[:, 1] * np.cos(angle[:, 1])), 1
    )
