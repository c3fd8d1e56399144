"""Stretches of remote shards in memory: which bytes a set of records takes, and where each record is found again."""

import numpy as np

EXTENT = np.dtype([("shard", "<i8"), ("begin", "<i8"), ("end", "<i8")])  # bytes of a shard
# A request for two records also takes the bytes between them, if that costs less than another request: with 16 at once of 30 ms
# each over 200 MB/s, one takes as long as 375 KB.
GAP_BYTES = 1 << 18
KEPT_GAP_BYTES = 1 << 12  # larger gaps do not stay in memory; what stands between the JPEGs of two records has 200 bytes
ROUND_BYTES = 1 << 20  # of the memory for a block, so that blocks of about the same length take turns in it


def extents(rows: np.ndarray, gap_bytes: int) -> np.ndarray:
    """The stretches (M,) of EXTENT that hold the JPEGs of `rows` (N,) of an index, over gaps of up to `gap_bytes`; ascending."""
    begins, ends = rows["offset"].astype(np.int64), rows["offset"].astype(np.int64) + rows["length"]
    shards = rows["shard"].astype(np.int64)
    order = np.lexsort((begins, shards))
    shards, begins, ends = shards[order], begins[order], ends[order]
    first = np.ones(len(rows), bool)
    first[1:] = (shards[1:] != shards[:-1]) | (begins[1:] - ends[:-1] > gap_bytes)
    starts = np.flatnonzero(first)
    found = np.empty(len(starts), EXTENT)
    found["shard"], found["begin"] = shards[starts], begins[starts]
    found["end"] = np.maximum.reduceat(ends, starts) if len(starts) else ends
    return found


class Block:
    """The bytes of some records: `pieces` of shards, one after the other in memory or in a file, and `requests` for them.

    `name` is that of a file of a cache, "" if it is not to be kept; `first` says when it is needed.
    """

    def __init__(self, rows: np.ndarray, name: str = "", first: int = 0):
        self.name, self.first = name, first
        self.pieces = extents(rows, KEPT_GAP_BYTES)
        self.requests = extents(rows, GAP_BYTES)
        lengths = self.pieces["end"] - self.pieces["begin"]
        self.size = int(lengths.sum())
        self.places = np.cumsum(lengths) - lengths  # of the pieces, in its memory
        self.memory: np.ndarray | None = None  # uint8 (size,) or more, once it is there
        self.given_up = False
        self.kept = False  # whether the memory is a map of a file of the cache
        # The pieces of each request are consecutive.
        self._cuts = np.append(np.searchsorted(_keys(self.pieces, "begin"), _keys(self.requests, "begin")), len(self.pieces))

    def pieces_of(self, request: int) -> range:
        return range(self._cuts[request], self._cuts[request + 1])

    def part(self, memory: np.ndarray, piece: int) -> np.ndarray:
        """The memory of a piece."""
        _, begin, end = self.pieces[piece].item()
        return memory[self.places[piece] : self.places[piece] + end - begin]


def _keys(extents: np.ndarray, field: str) -> np.ndarray:
    """Ascending by shard and byte: shards have less than 2**40 bytes."""
    return (extents["shard"] << 40) + extents[field]


class Table:
    """Where records are found in the memory of blocks."""

    def __init__(self):
        self._begins = np.empty(0, np.int64)  # ascending, of pieces, by `_keys`
        self._ends = np.empty(0, np.int64)
        self._bases = np.empty(0, np.int64)  # what to add to an offset in the shard for an address
        self._blocks: list[Block] = []

    def add(self, block: Block) -> None:
        """Adds a block whose memory is filled."""
        assert block.memory is not None
        begins = _keys(block.pieces, "begin")
        at = np.searchsorted(self._begins, begins)
        self._begins = np.insert(self._begins, at, begins)
        self._ends = np.insert(self._ends, at, _keys(block.pieces, "end"))
        self._bases = np.insert(self._bases, at, block.memory.ctypes.data + block.places - block.pieces["begin"])
        for number, place in enumerate(at.tolist()):
            self._blocks.insert(place + number, block)

    def remove(self, block: Block) -> None:
        kept = np.array([other is not block for other in self._blocks], bool)
        self._begins, self._ends, self._bases = self._begins[kept], self._ends[kept], self._bases[kept]
        self._blocks = [other for other in self._blocks if other is not block]

    def find(self, rows: np.ndarray) -> np.ndarray:
        """The numbers (N,) of the pieces that hold the JPEGs of `rows`; -1 if none does."""
        begins = (rows["shard"].astype(np.int64) << 40) + rows["offset"].astype(np.int64)
        at = np.searchsorted(self._begins, begins, "right") - 1
        if not len(self._ends):
            return at
        return np.where((at >= 0) & (begins + rows["length"] <= self._ends[at]), at, -1)

    @property
    def bases(self) -> np.ndarray:
        """For each piece (pieces,), the address of byte 0 of its shard, were all of it in memory."""
        return self._bases

    def block(self, piece: int) -> Block:
        return self._blocks[piece]


class Memory:
    """Memory for blocks, used again: fresh pages for a block take as long as a tenth of receiving it."""

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 (at least size,)."""
        for number, memory in enumerate(self._free):
            if size <= len(memory) <= 2 * size + ROUND_BYTES:
                return self._free.pop(number)
        self._free.clear()  # of another size
        return np.empty(-(-size // ROUND_BYTES) * ROUND_BYTES, np.uint8)

    def give(self, memory: np.ndarray) -> None:
        """Memory that nothing points to any more."""
        self._free.append(memory)
