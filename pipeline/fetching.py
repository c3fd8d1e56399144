"""Has the blocks of a dataset in a store there when their turn comes, and forgets them afterwards."""

import functools
import logging
import threading
from collections.abc import Callable

import numpy as np

from imagefeed.dataset.blocks import Block
from imagefeed.dataset.reader import RecordReader
from imagefeed.dataset.remote import CLOSED
from imagefeed.pipeline.plan import BLOCK, Plan
from imagefeed.pipeline.schedule import MEMORY_BLOCKS, NEVER, Need, Schedule

log = logging.getLogger("imagefeed")
_said: set[tuple[str, str]] = set()
FRAME_BYTES = 512  # more than what stands between the JPEGs of two records, unless columns are kept
MAX_MAPPED = 20_000  # blocks of a cache; a process may have 65,530 maps (vm.max_map_count)
AHEAD = 2  # batches that a Source reads before they are requested
REQUESTS = 16  # at once for blocks; two fill a link of 200 MB/s at 30 ms a request, and a store gives 50 to 100 MB/s to each


def open_fetcher(plan: Plan, reader: RecordReader, cached: Callable, position: int, read_ahead: int) -> "Fetcher":
    """The fetcher of a loader, which skips records that are `cached` (N,) -> (N,), and those in files."""
    assert reader.remote is not None
    cache, room = reader.remote.cache, False
    if cache is not None and plan.records <= MAX_MAPPED * BLOCK:
        chosen = np.arange(len(reader)) if plan.selection is None else plan.selection.ids
        room = int(reader.lengths(chosen).sum(dtype=np.int64)) + FRAME_BYTES * len(chosen) <= cache.limit
    schedule = Schedule(plan, whole=cache is not None, all_blocks=room)
    say_what_it_costs(schedule, reader)
    return Fetcher(schedule, reader, lambda ids: cached(ids) | reader.are_local(ids), position, read_ahead)


def say_what_it_costs(schedule: Schedule, reader: RecordReader) -> None:
    """Warns, once for a dataset, of an order that asks the store for far more than it must."""
    plan, shards = schedule.plan, reader.remote
    assert shards is not None
    said = None
    if not schedule.in_blocks:
        said = (
            f"{shards.root}: shuffle global reads each record by a request of its own, {plan.records:,} an epoch; shuffle blocks "
            f"takes about {schedule.blocks:,}, in another order"
        )
    elif plan.shuffle == "blocks" and plan.views == "random" and plan.world_size > 1 and shards.cache is None:
        if schedule.blocks > MEMORY_BLOCKS:
            said = (
                f"{shards.root}: each of {plan.world_size} ranks fetches all blocks of an epoch; with cache_dir, those of a "
                "machine share them; with shuffle node-blocks, which is another order, machines have blocks of their own"
            )
    if said and (shards.digest, plan.shuffle) not in _said and plan.rank == 0:
        _said.add((shards.digest, plan.shuffle))
        log.warning("%s", said)


class Held:
    """A need's block, asked for or there."""

    def __init__(self, need: Need, block: Block, kept: bool):
        self.first, self.last, self.number, self.block = need.first, need.last, need.block, block
        self.kept = kept  # in a cache, before it was asked for
        self.arrived = False
        self.failure: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether nothing of it is under way."""
        return self.arrived or self.failure is not None


class Fetcher:
    """Fetches what `schedule` needs from `position` on, the first needed first: as many blocks as it may hold, or with shuffle
    "global" the records of `read_ahead` batches. One thread calls `advance`."""

    def __init__(self, schedule: Schedule, reader: RecordReader, cached: Callable, position: int, read_ahead: int):
        assert reader.remote is not None
        # A shuffle of all records needs every block at once: until they have come, records come by requests of their own.
        self.waits = not (schedule.at_random and schedule.in_blocks and schedule.blocks > MEMORY_BLOCKS)
        self.schedule, self.reader, self.shards, self.cached = schedule, reader, reader.remote, cached
        self.start, self.position, self.read_ahead = position, position, read_ahead
        self.capacity = schedule.capacity if schedule.in_blocks else read_ahead + 1
        self._names: dict[str, int] = {}  # of blocks, and their numbers
        self._uses = position, np.empty(0)
        self.shards.next_use = self.next_use
        self._needs = schedule.needs(position)
        self._next = next(self._needs)
        self._held: dict[tuple, Held] = {}
        self._requests = 0  # under way
        self._failure: BaseException | None = None  # of `_start` in a thread of the store
        self._closed = False
        self._changed = threading.Condition()

    def advance(self, position: int) -> None:
        """To be called before the batch at `position` is read. Returns when its blocks are there, or raises why one is not.

        At the first position it does not wait for blocks from the store: the records come sooner by requests of their own.
        """
        with self._changed:
            self.position = position
            self._start()
            waits = self.waits and (position != self.start or not self.schedule.in_blocks)
            while waiting := [
                held
                for held in self._held.values()
                if held.first <= position <= held.last and not held.arrived and (waits or held.kept)
            ]:
                for failure in (self._failure, *(held.failure for held in waiting)):
                    if failure is not None:
                        raise failure
                self._changed.wait()
                if self._closed:
                    raise RuntimeError(CLOSED)

    def stop(self) -> None:
        """Starts nothing more; an `advance` or a read that waits raises."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.shards.refuse_reads()

    def close(self) -> None:
        """Forgets all blocks, and has those under way given up. Nothing may be read meanwhile."""
        self.stop()
        with self._changed:
            for key in list(self._held):
                self._drop(key)
        self.shards.allow_reads()

    def _start(self) -> None:
        """Starts what there is room for."""
        while not self._closed and self._requests < (REQUESTS if self._next.block >= 0 else 4 * REQUESTS):
            need = self._next
            if need.first > self.position and not self._may_precede(need):
                return
            self._next = next(self._needs)
            ids = self.schedule.ids(need)
            ids = ids[~self.cached(ids)]
            if not len(ids):
                continue
            key = (*self._key(need), len(ids))
            if key in self._held:  # of the last epoch, or of this one's other end
                held = self._held[key]
                if held.last < self.position:
                    held.first = need.first
                held.last = max(held.last, need.last)
                continue
            self._make_room()
            block = Block(self.reader.rows(ids), self._name(need, ids), need.first)
            self._held[key] = held = Held(need, block, self.shards.keeps(block))
            self._requests += len(held.block.requests)
            self.shards.load(held.block, functools.partial(self._finish, held))

    def _may_precede(self, need: Need) -> bool:
        """Whether to fetch it before its turn."""
        plan = self.schedule.plan
        if not self.schedule.in_blocks:
            return need.first <= self.position + self.read_ahead
        # Another evaluation may be far away, or never come, although its first batches are read ahead.
        if plan.views != "random" and self.position >= self.start + plan.steps and self.position % plan.steps <= AHEAD:
            return False
        if need.epoch > self.position // plan.steps + (plan.views == "random"):
            return False
        return sum(held.last >= self.position for held in self._held.values()) < self.capacity

    def _key(self, need: Need) -> tuple:
        """The same for needs of the same records."""
        if need.block < 0:
            return (need.first,)
        selection = self.schedule.plan.selection
        return (need.begin, need.end) if selection is None or not selection.weighted else (need.begin, need.end, need.epoch)

    def _name(self, need: Need, ids: np.ndarray) -> str:
        """The name of its file in a cache, if there is one and another epoch will need the same records."""
        selection = self.schedule.plan.selection
        if self.shards.cache is None or need.block < 0 or (selection is not None and selection.weighted):
            return ""
        name = self.shards.name(ids)
        self._names[name] = need.block
        return name

    def next_use(self, name: str) -> int | None:
        """When the block of a cache is needed next; None if it is not of this run."""
        if self._uses[0] != self.position or not len(self._uses[1]):
            self._uses = self.position, self.schedule.next_uses(self.position)
        number = self._names.get(name)
        if number is None and self.schedule.plan.selection is None and name.startswith(f"{self.shards.digest[:16]}-"):
            number = int(name.split("-")[1]) // BLOCK  # kept by an earlier run, or fetched by another rank
        return int(self._uses[1][number]) if number is not None else None

    def _make_room(self) -> None:
        """Forgets blocks whose turn is over, those first that are needed last: small datasets are fetched once."""
        over = [key for key, held in self._held.items() if held.last < self.position and held.over]
        excess = len(self._held) + 1 - self.capacity
        if excess <= 0 or not over:
            return
        uses = self.schedule.next_uses(self.position) if self.schedule.in_blocks else np.empty(0)
        over.sort(key=lambda key: -uses[self._held[key].number] if self._held[key].number >= 0 else -NEVER)
        for key in over[:excess]:
            self._drop(key)

    def _drop(self, key: tuple) -> None:
        held = self._held.pop(key)
        if held.arrived:
            self.shards.drop(held.block)
        elif not held.over:
            self.shards.give_up(held.block)

    def _finish(self, held: Held, failure: Exception | None) -> None:
        """Called by a thread of the store."""
        with self._changed:
            self._requests -= len(held.block.requests)
            held.arrived, held.failure = failure is None, failure
            if self._closed and failure is None:
                self.shards.drop(held.block)
            try:
                if failure is None:
                    self._start()
            except BaseException as error:  # would be lost in this thread, and `advance` would wait for ever
                self._failure = error
            self._changed.notify_all()
