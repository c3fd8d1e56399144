"""Blocks of remote shards in memory, and the folder that keeps them."""

import os
import threading
import time

import numpy as np
import pytest

from imagefeed.dataset.blockcache import BlockCache
from imagefeed.dataset.blocks import GAP_BYTES, KEPT_GAP_BYTES, Block, Memory, Table, extents
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import INDEX_DTYPE

SHARD_BYTES = 1_500_000


def index_of(generator: np.random.Generator, shards: int = 3) -> np.ndarray:
    """Records with gaps of all sizes between them."""
    rows = []
    for shard in range(shards):
        at = 0
        while at < SHARD_BYTES - 50_000:
            at += int(generator.choice([200, 300, KEPT_GAP_BYTES + 1, GAP_BYTES + 1], p=[0.5, 0.3, 0.15, 0.05]))
            length = int(generator.integers(1, 30_000))
            if at + length > SHARD_BYTES:
                break
            rows.append((shard, at, length, 0, 0))
            at += length
    return np.array(rows, INDEX_DTYPE)


def test_extents_cover_each_record_and_no_larger_gap():
    generator = np.random.default_rng(0)
    index = index_of(generator)
    for _ in range(8):
        rows = index[generator.permutation(len(index))[: generator.integers(1, len(index))]]
        for gap in (KEPT_GAP_BYTES, GAP_BYTES):
            covered = np.zeros((3, SHARD_BYTES), bool)
            wanted = np.zeros((3, SHARD_BYTES), bool)
            for shard, begin, end in extents(rows, gap).tolist():
                covered[shard, begin:end] = True
            for shard, offset, length, _, _ in rows.tolist():
                wanted[shard, offset : offset + length] = True
            assert covered[wanted].all()
            for shard in range(3):
                edges = np.flatnonzero(np.diff(np.concatenate(([0], (covered & ~wanted)[shard].view(np.int8), [0]))))
                assert (edges[1::2] - edges[::2] <= gap).all()
    assert len(extents(index[:0], GAP_BYTES)) == 0


def test_records_are_found_in_the_memory_of_their_block():
    """Of several blocks that come and go; a record that none of them has is not found."""
    generator = np.random.default_rng(1)
    index, shards = index_of(generator), generator.integers(0, 256, (3, SHARD_BYTES)).astype(np.uint8)
    table, held = Table(), []
    for number in range(60):
        if held and generator.random() < 0.4:
            table.remove(held.pop(generator.integers(len(held))))
        else:
            start = generator.integers(len(index))
            taken = np.setdiff1d(np.arange(start, min(start + 40, len(index))), np.concatenate([b.ids for b in held] or [[]]))
            if not len(taken):
                continue
            block = Block(index[taken], f"{number}")
            block.ids = taken
            block.memory = np.zeros(block.size, np.uint8)
            assert [n for request in range(len(block.requests)) for n in block.pieces_of(request)] == list(
                range(len(block.pieces))
            )
            for request, (shard, begin, end) in enumerate(block.requests.tolist()):
                for piece in block.pieces_of(request):
                    of, first, last = block.pieces[piece].item()
                    assert of == shard and begin <= first < last <= end
                    block.part(block.memory, piece)[:] = shards[shard, first:last]
            table.add(block)
            held.append(block)
        found = table.find(index)
        there = np.isin(np.arange(len(index)), np.concatenate([b.ids for b in held] or [[]]))
        assert np.array_equal(found >= 0, there)
        for row, at in zip(index[there].tolist(), found[there].tolist(), strict=True):
            shard, offset, length, _, _ = row
            block = table.block(at)
            place = int(table.bases[at]) + offset - block.memory.ctypes.data
            assert np.array_equal(block.memory[place : place + length], shards[shard, offset : offset + length])


def test_memory_is_used_again():
    memory = Memory()
    first = memory.take(5_600_000)
    memory.give(first)
    assert memory.take(5_500_000) is first
    memory.give(first)
    assert len(memory.take(100_000)) == 1 << 20  # not a block's for so little


def keep(cache: BlockCache, name: str, size: int, first: int = 0, uses: dict | None = None) -> bool:
    """Has a block kept; whether it was."""
    memory = np.full(size, len(name), np.uint8)
    found = cache.fetch(name, memory, first, (uses or {}).get, lambda: None)
    assert found is None or (len(found) == size and (found == len(name)).all())
    return found is not None


def names(folder) -> set[str]:
    return {path.name.removesuffix(".block") for path in folder.glob("*.block")}


def test_the_block_needed_last_goes_first(tmp_path):
    cache = BlockCache(tmp_path, 3000)
    uses = {"a": 10, "b": 30, "c": 20, "d": 5, "e": 40}
    for name in "abc":
        assert keep(cache, name, 1000, 0, uses)
    assert keep(cache, "d", 1000, 1, uses) and names(tmp_path) == {"a", "c", "d"}
    assert not keep(cache, "e", 1000, 25, uses)  # all others are needed sooner
    assert names(tmp_path) == {"a", "c", "d"} and not list(tmp_path.glob(".*.part"))
    assert not keep(cache, "f", 4000, 0, uses)


def test_blocks_of_other_runs_go_before_those_of_this_one(tmp_path):
    keep(BlockCache(tmp_path, 3000), "old", 1000)
    os.utime(tmp_path / "old.block", (1, 1))
    cache, uses = BlockCache(tmp_path, 3000), {"a": 100, "b": 200, "c": 300, "d": 400}
    keep(cache, "other", 1000)  # of another split that is used now
    keep(cache, "a", 1000, 0, uses)
    keep(cache, "b", 1000, 0, uses)
    assert names(tmp_path) == {"other", "a", "b"}
    keep(cache, "c", 1000, 0, uses)
    assert names(tmp_path) == {"other", "a", "c"}


def test_several_processes_stay_within_the_limit_together(tmp_path):
    """As many caches, in threads, with blocks of all sizes."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 900, 60).tolist()
    uses = {f"{n}": int(use) for n, use in enumerate(generator.permutation(60))}
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            total = 0
            for path in [*tmp_path.glob("*.block"), *tmp_path.glob(".*.part")]:
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    pass
            most[0] = max(most[0], total)

    def work(seed: int) -> None:
        cache = BlockCache(tmp_path, 10_000)
        for n in np.random.default_rng(seed).permutation(60).tolist():
            keep(cache, f"{n}", sizes[n], -1, uses)

    watching = threading.Thread(target=watch)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in (watching, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    over.set()
    watching.join()
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.block"))
    assert int((tmp_path / ".bytes").read_text()) == kept <= 10_000 and kept > 9000
    assert most[0] <= 10_000 + 900  # a file that was renamed between two looks counts twice here


def test_a_block_is_fetched_by_one_while_others_wait(tmp_path):
    fetched = []

    def fetch() -> None:
        fetched.append(1)
        time.sleep(0.1)

    def work() -> None:
        found = BlockCache(tmp_path, 10_000).fetch("a", np.ones(5000, np.uint8), 0, lambda name: None, fetch)
        assert found is not None and found.all()

    workers = [threading.Thread(target=work) for _ in range(5)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert fetched == [1]


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = BlockCache(tmp_path, 10_000)

    def fail() -> None:
        raise UserError("the store is gone")

    with pytest.raises(UserError, match="the store is gone"):
        cache.fetch("a", np.ones(5000, np.uint8), 0, lambda name: None, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".bytes"] and int((tmp_path / ".bytes").read_text()) == 0
    assert keep(cache, "a", 5000)


def test_what_a_killed_process_left_is_counted_and_removed(tmp_path):
    """Its part keeps its room until a cache is opened or the block is fetched again; a count that was lost is made again."""
    cache = BlockCache(tmp_path, 10_000)
    keep(cache, "a", 4000)
    (tmp_path / ".b.part").write_bytes(b"x" * 3000)
    (tmp_path / ".c.part").write_bytes(b"x" * 3000)
    (tmp_path / ".bytes").write_bytes(b"%-31d\n" % 10_000)
    assert keep(cache, "b", 3000) and names(tmp_path) == {"a", "b"}
    assert int((tmp_path / ".bytes").read_text()) == 10_000
    for damage in (lambda: (tmp_path / ".bytes").unlink(), lambda: (tmp_path / ".bytes").write_text("?")):
        damage()
        BlockCache(tmp_path, 10_000)
        assert int((tmp_path / ".bytes").read_text()) == 7000 and not list(tmp_path.glob(".*.part"))


def test_a_limit_is_half_of_what_is_free_by_default(tmp_path):
    status = os.statvfs(tmp_path)
    assert BlockCache(tmp_path).limit == pytest.approx(status.f_bavail * status.f_frsize / 2, rel=0.05)
