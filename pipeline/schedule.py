"""When each block of records is needed, and for how long: a pure function of the plan."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from imagefeed.pipeline.plan import BLOCK, WINDOW, Plan

# Blocks to hold, for orders that take a few blocks at a time: 180 MB, as much as 16 requests at once take twice.
FEW_BLOCKS = 32
MEMORY_BLOCKS = 2 * WINDOW // BLOCK  # 720 MB: a window that is used, and one that is fetched
NEVER = np.iinfo(np.int64).max


class Need(NamedTuple):
    """Records that a rank takes from position `first` to position `last`: those at the places `begin` to `end` of the stored
    order of `epoch`'s records; without a block, those of a batch."""

    first: int
    last: int
    epoch: int
    block: int = -1
    begin: int = 0
    end: int = 0


class Spans(NamedTuple):
    """Of each block (blocks,), for one rank and epoch: the first and last step that take records of it, and from which place to
    which; first is -1 if none does."""

    first: np.ndarray
    last: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Schedule:
    """The blocks that a plan's rank needs: BLOCK consecutive records in stored order, of those that an epoch has. A rank that
    needs less than three quarters of a block has only that stretch of it, unless they are to be `whole`, to be shared by ranks.

    With shuffle "global" a block is needed all through the epoch. Unless there is room for all of them (`all_blocks`, or they
    are as few as "blocks" holds), there are none, and a need is a batch.
    """

    def __init__(self, plan: Plan, whole: bool = False, all_blocks: bool = False):
        self.plan, self.whole = plan, whole
        self.blocks = -(-plan.records // BLOCK)
        self.at_random = plan.views == "random" and plan.shuffle == "global"
        self.in_blocks = not self.at_random or all_blocks or self.blocks <= MEMORY_BLOCKS
        self._spans = functools.lru_cache(maxsize=3)(self._find_spans)

    def spans(self, epoch: int) -> Spans:
        """Takes 50 ms for 1.28 million records, beside the order itself."""
        return self._spans(epoch)

    def _find_spans(self, epoch: int) -> Spans:
        plan, blocks = self.plan, self.blocks
        places = (np.arange(plan.steps)[:, None] * plan.global_batch + plan.places(0)).ravel()
        steps = np.repeat(np.arange(plan.steps), plan.batch_size)
        if plan.views != "random":
            steps, places = steps[places < plan.records], places[places < plan.records]
        stored = plan.stored(epoch, places)
        block = stored // BLOCK
        first, last, end = np.full(blocks, -1), np.full(blocks, -1), np.zeros(blocks, np.int64)
        begin = np.full(blocks, NEVER)
        # Of several values for a place, the last one assigned stays.
        last[block] = steps
        first[block[::-1]] = steps[::-1]
        np.minimum.at(begin, block, stored)
        np.maximum.at(end, block, stored + 1)
        return Spans(first, last, begin, end)

    @property
    def capacity(self) -> int:
        """How many blocks to hold: for training all of a small dataset, else twice as many as a step takes records of."""
        plan = self.plan
        if self.at_random or (plan.views == "random" and self.blocks <= MEMORY_BLOCKS):
            return self.blocks
        if plan.views != "random" or plan.shuffle == "none":
            return FEW_BLOCKS
        if plan.shuffle == "blocks":
            return MEMORY_BLOCKS
        spans = self.spans(0)
        used = np.flatnonzero(spans.first >= 0)
        at_once = int((spans.last[used] - spans.first[used] + 1).sum() / plan.steps) + 1
        return max(FEW_BLOCKS, 2 * at_once)

    def needs(self, position: int) -> Iterator[Need]:
        """All that is needed from a position on, without end, in the order in which it is needed first."""
        if not self.in_blocks:
            while True:
                yield Need(position, position, position // self.plan.steps)
                position += 1
        epoch, step = divmod(position, self.plan.steps)
        while True:
            spans, start = self.spans(epoch), epoch * self.plan.steps
            coming = np.flatnonzero((spans.first >= 0) & (spans.last >= step))
            for block in coming[np.argsort(spans.first[coming], kind="stable")].tolist():
                first, last, begin, end = (int(values[block]) for values in spans)
                if self.whole or 4 * (end - begin) >= 3 * BLOCK:
                    begin, end = block * BLOCK, min(block * BLOCK + BLOCK, self.plan.records)
                yield Need(start + max(first, step), start + last, epoch, block, begin, end)
            epoch, step = epoch + 1, 0

    def next_uses(self, position: int) -> np.ndarray:
        """The next position (blocks,) from `position` on at which each block is needed, in this epoch or the next; else NEVER."""
        epoch, step = divmod(position, self.plan.steps)
        found = np.full(len(self.spans(epoch).first), NEVER)
        for number in (epoch + 1, epoch):
            spans = self.spans(number)
            used = spans.first >= 0
            if number == epoch:
                used &= spans.last >= step
            found[used] = number * self.plan.steps + spans.first[used]
        return np.maximum(found, position)

    def ids(self, need: Need) -> np.ndarray:
        """The record ids (N,) of a need, ascending."""
        if need.block < 0:
            return np.unique(self.plan.ids(need.first)[0])
        return self.plan.selected(need.epoch, np.arange(need.begin, need.end))
