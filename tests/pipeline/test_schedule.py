"""The schedule of blocks beside a walk over the plan's batches."""

import itertools

import numpy as np
import pytest

from imagefeed.pipeline.plan import BLOCK, PARTS, WINDOW, Plan
from imagefeed.pipeline.schedule import FEW_BLOCKS, MEMORY_BLOCKS, NEVER, Schedule
from imagefeed.pipeline.selection import Selection

RECORDS = 36_001
HALF = Selection(np.arange(0, 2 * RECORDS, 2), RECORDS)
DRAWN = Selection(np.arange(RECORDS), RECORDS, np.arange(RECORDS), np.arange(1, RECORDS + 1).astype(float))
PLANS = [
    Plan(RECORDS, 100, shuffle="blocks"),
    Plan(RECORDS, 300, shuffle="blocks", rank=1, world_size=2, selection=HALF),
    Plan(RECORDS, 64, shuffle="node-blocks", rank=2, world_size=4),
    Plan(RECORDS, 96, shuffle="node-blocks", selection=DRAWN),
    Plan(RECORDS, 100, shuffle="blocks", repeats=4),
    Plan(RECORDS, 128, shuffle="none", rank=3, world_size=4),
    Plan(RECORDS, 512, views="center", rank=1, world_size=2),
    Plan(20_000, 100, shuffle="global"),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.shuffle} {plan.views} {plan.world_size}")
@pytest.mark.parametrize("start", [37])
def test_each_batch_finds_its_records_in_the_blocks_it_needs(plan, start):
    """From any position on, over the end of an epoch; no block is needed longer than its records are taken, or twice at once."""
    schedule, end = Schedule(plan), plan.steps + 25
    needs = list(itertools.takewhile(lambda need: need.first < end, schedule.needs(start)))
    assert [need.first for need in needs] == sorted(need.first for need in needs)
    assert len({(need.epoch, need.block) for need in needs}) == len(needs)
    covered = {need: schedule.ids(need) for need in needs}
    first, last = dict.fromkeys(needs, end), dict.fromkeys(needs, -1)
    for position in range(start, end):
        ids, valid = plan.ids(position)
        wanted = np.unique(ids[valid])
        found = []
        for need in needs:
            if need.first <= position <= need.last and need.epoch == position // plan.steps:
                here = wanted[np.isin(wanted, covered[need])]
                found.append(here)
                if len(here):
                    first[need], last[need] = min(first[need], position), position
        assert np.array_equal(np.unique(np.concatenate([*found, wanted[:0]])), wanted)
    for need in needs:
        # A record drawn several times may be in two blocks, and be taken from either.
        exact = plan.selection is None or not plan.selection.weighted
        assert first[need] == need.first or need.first == start or not exact
        assert last[need] == need.last or need.last >= end or not exact


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.shuffle} {plan.views} {plan.world_size}")
def test_the_next_use_of_a_block_is_the_first_of_its_needs(plan):
    schedule = Schedule(plan)
    for position in (0, 40, plan.steps - 1, plan.steps):
        uses = schedule.next_uses(position)
        ends = position // plan.steps * plan.steps + 2 * plan.steps
        expected = np.full(len(uses), NEVER)
        for need in schedule.needs(position):
            if need.first >= ends:
                break
            expected[need.block] = min(expected[need.block], need.first)
        assert np.array_equal(uses, expected)


def test_a_batch_is_what_a_global_shuffle_of_many_records_needs():
    plan = Plan(RECORDS, 100, rank=1, world_size=2)
    schedule = Schedule(plan)
    assert not schedule.in_blocks and Schedule(plan, all_blocks=True).in_blocks
    for position, need in zip(range(5, 9), schedule.needs(5)):
        assert (need.first, need.last) == (position, position)
        assert schedule.ids(need).tolist() == sorted(plan.ids(position)[0].tolist())


def test_as_many_blocks_are_held_as_are_used_and_come_next():
    assert Schedule(Plan(10**6, 100, shuffle="blocks")).capacity == MEMORY_BLOCKS == 2 * WINDOW // BLOCK
    assert Schedule(Plan(10**6, 256, views="center")).capacity == FEW_BLOCKS
    assert Schedule(Plan(10**6, 256, shuffle="none")).capacity == FEW_BLOCKS
    assert Schedule(Plan(10_000, 256, shuffle="none")).capacity == 40
    one, four = (Schedule(Plan(10**6, 256 // nodes, shuffle="node-blocks", world_size=nodes)).capacity for nodes in (1, 4))
    assert 2 * PARTS <= one <= 2 * PARTS + 8 and FEW_BLOCKS <= four <= one // 4 + 8


def test_a_rank_has_its_stretch_of_a_block_unless_ranks_share():
    plan = Plan(4096, 64, views="center", rank=1, world_size=4)
    need = next(Schedule(plan).needs(0))
    assert (need.begin, need.end) == (64, 128)
    need = next(Schedule(plan, whole=True).needs(0))
    assert (need.begin, need.end) == (0, BLOCK)
