"""Shards in object stores: blocks of records by ranged requests, many at once, and single records where no block is there."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from imagefeed.dataset import gather
from imagefeed.dataset.blockcache import BlockCache, NextUse
from imagefeed.dataset.blocks import Block, Memory, Table
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import has_ended
from imagefeed.dataset.records import INDEX_DTYPE, crc32c
from imagefeed.dataset.storage import ObjectVersion, Url, store_of

CLOSED = "the loader was closed"
THREADS = 64  # requests at once for single records, each of which takes a round trip for 22 KB


class Traffic(NamedTuple):
    """What stores have been asked for by this process: `seconds` is the sum over requests, `when_s` of time.perf_counter."""

    when_s: float
    requests: int
    bytes: int
    seconds: float
    retries: int

    def since(self, before: "Traffic") -> dict[str, float]:
        """What happened between two moments; a request's time and the number in flight are means over it."""
        when_s, requests, size, seconds, retries = (now - then for now, then in zip(self, before, strict=True))
        return {
            "requests": requests,
            "bytes": size,
            "retries": retries,
            "ms_per_request": 1e3 * seconds / max(requests, 1),
            "in_flight": seconds / max(when_s, 1e-9),
        }


class RemoteShards:
    """Shards in stores. Each is pinned to the version that the first look at it finds: its length must be the manifest's, and a
    shard that is replaced later raises UserError.

    Records come from blocks that `load` brought, and any others by requests of their own. Opening asks the store for nothing.
    `digest` stands for the content of all shards; with a `cache`, blocks that have names are kept there.
    """

    def __init__(self, places: list[Path | Url], sizes: list[int], digest: str, cache: BlockCache | None = None):
        self.places, self.sizes, self.digest, self.cache = places, sizes, digest, cache
        self.local = np.array([isinstance(place, Path) for place in places])  # these are left to others
        self.next_use: NextUse = lambda name: None
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._versions: dict[int, Future[ObjectVersion]] = {}
        self._table, self._memory = Table(), Memory()
        self._reads: dict[SimpleQueue[Exception | None], Block] = {}  # under way, by where their end is told
        self._refuses_reads = False
        self._lock = threading.Lock()  # of all above
        self._pool = ThreadPoolExecutor(THREADS, "store")

    @property
    def traffic(self) -> Traffic:
        """Of all stores that the shards are in, whoever asked them."""
        roots = {place.root: place for place in self.places if isinstance(place, Url)}
        counts = [store_of(url).counts for url in roots.values()]
        return Traffic(
            time.perf_counter(),
            sum(count.requests for count in counts),
            sum(count.bytes for count in counts),
            sum(count.seconds for count in counts),
            sum(count.retries.total() for count in counts),
        )

    def _notice_fork(self) -> None:
        """In a forked process, the threads did not come along, nor may their locks be trusted."""
        if self._process != os.getpid():
            self._open()

    @property
    def root(self) -> Url:
        """Where the first of them is."""
        return next(place for place in self.places if isinstance(place, Url)).parent

    def are_local(self, shards: np.ndarray) -> np.ndarray:
        """Whether shards (N,) are files."""
        return self.local[shards]

    def name(self, record_ids: np.ndarray) -> str:
        """The name in a cache for a block of records (N,), ascending; it begins with the digest and the first id."""
        first, count = int(record_ids[0]), len(record_ids)
        chosen = "" if record_ids[-1] - first + 1 == count else f"-{crc32c(record_ids.tobytes()):08x}"
        return f"{self.digest[:16]}-{first:010d}-{count}{chosen}"

    def keeps(self, block: Block) -> bool:
        """Whether the block is in the cache."""
        return self.cache is not None and block.name != "" and self.cache.has(block.name)

    def load(self, block: Block, done: Callable[[Exception | None], None]) -> None:
        """Has the block's bytes on their way, and calls `done` from another thread once they are there or cannot be had."""
        self._notice_fork()
        if self.cache is not None and block.name:
            self._pool.submit(self._load_kept, block, self.cache, done)
            return
        memory = self._take(block.size)

        def finish(failure: Exception | None) -> None:
            self._add(block, None if failure else memory, memory)
            done(failure)

        self._request(block, memory, finish)

    def _request(self, block: Block, memory: np.ndarray, done: Callable[[Exception | None], None]) -> None:
        """Makes a block's requests into `memory`, and calls `done` from another thread once all of them are over."""
        left, lock = len(block.requests), threading.Lock()
        failure: Exception | None = None

        def request(number: int) -> None:
            nonlocal left, failure
            error = None
            try:
                if failure is None:
                    self._fetch(block, number, memory)
            except Exception as raised:  # raised again where the block is needed
                error = raised
            with lock:
                left -= 1
                failure = failure or error
                over = left == 0
            if over:
                done(failure)

        for number in range(left):
            self._pool.submit(request, number)

    def _load_kept(self, block: Block, cache: BlockCache, done: Callable[[Exception | None], None]) -> None:
        """The same from the cache, or by way of it."""
        failure: Exception | None = None
        memory: np.ndarray | None = None
        try:
            found = cache.find(block.name, block.size)
            if found is None:
                memory = self._take(block.size)

                def fetch() -> None:
                    for number in range(len(block.requests)):
                        self._fetch(block, number, memory)

                found = cache.fetch(block.name, memory[: block.size], block.first, self.next_use, fetch)
            block.kept = found is not None
            self._add(block, memory if found is None else found, memory)
        except Exception as error:  # raised again where the block is needed
            failure = error
            self._add(block, None, memory)
        done(failure)

    def give_up(self, block: Block) -> None:
        """Ends the requests of a block that is under way, unless a cache will keep it for later."""
        block.given_up = self.cache is None or not block.name

    def drop(self, block: Block) -> None:
        """Forgets a block that was loaded."""
        with self._lock:
            self._table.remove(block)
            if block.memory is not None and not block.kept:
                self._memory.give(block.memory)
            block.memory = None

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            return self._memory.take(size)

    def _add(self, block: Block, memory: np.ndarray | None, taken: np.ndarray | None) -> None:
        """Has the block's records found in `memory`; `taken` is free unless it is the same."""
        with self._lock:
            block.memory = memory
            if memory is not None:
                self._table.add(block)
            if taken is not None and taken is not memory:
                self._memory.give(taken)

    def _fetch(self, block: Block, number: int, memory: np.ndarray) -> None:
        """The bytes of one of a block's requests."""

        def wanted() -> bool:
            return not block.given_up and not has_ended()

        shard, begin, end = block.requests[number].item()
        pieces, version = block.pieces_of(number), self._version(shard)
        url = self._url(shard)
        try:
            if len(pieces) == 1:
                store_of(url).get_into(url, begin, block.part(memory, pieces[0]), version, wanted)
                return
            data = np.frombuffer(store_of(url).get(url, begin, end, version, wanted), np.uint8)
        except FileNotFoundError:
            raise missing(url) from None
        for piece in pieces:
            _, first, last = block.pieces[piece].item()
            block.part(memory, piece)[:] = data[first - begin : last - begin]

    def _version(self, shard: int) -> ObjectVersion:
        """The shard's version; one thread asks, the others wait for it."""
        with self._lock:
            asking = shard not in self._versions
            if asking:
                self._versions[shard] = Future()
            found = self._versions[shard]
        if asking:
            try:
                found.set_result(self._look(shard))
            except BaseException as error:
                with self._lock:
                    del self._versions[shard]  # the next one asks again
                found.set_exception(error)
        return found.result()

    def _url(self, shard: int) -> Url:
        place = self.places[shard]
        assert isinstance(place, Url)
        return place

    def _look(self, shard: int) -> ObjectVersion:
        url, size = self._url(shard), self.sizes[shard]
        try:
            version = store_of(url).head(url)
        except FileNotFoundError:
            raise missing(url) from None
        if version.size != size:
            raise UserError(f"{url}: the shard has {version.size:,} bytes, the manifest says {size:,}; upload it again")
        return version

    def gather(self, rows: np.ndarray, out: np.ndarray, stride: int, checked: bool) -> np.ndarray:
        self._notice_fork()
        bad, moved, fetched = np.empty(len(rows), bool), rows.copy(), Table()
        while True:
            with self._lock:  # no block is dropped while it is copied from
                at = self._table.find(rows)
                absent = at < 0
                at[absent] = fetched.find(rows[absent]) + len(self._table.bases)
                absent &= at < len(self._table.bases)
                if not absent.any():
                    moved["shard"] = at
                    gather.gather(moved, np.concatenate((self._table.bases, fetched.bases)), out, stride, checked, bad)
                    self._forget(at[bad])
                    return bad
            fetched.add(self._load_now(rows[absent]))

    def _forget(self, pieces: np.ndarray) -> None:
        """Removes blocks from the cache whose files are damaged: the next epoch fetches them again."""
        for piece in pieces[pieces < len(self._table.bases)].tolist():
            block = self._table.block(piece)
            if block.kept and self.cache is not None:
                self.cache.remove(block.name)

    def _load_now(self, rows: np.ndarray) -> Block:
        """A block of any records, by requests of their own."""
        block = Block(rows)
        memory = np.empty(block.size, np.uint8)
        over: SimpleQueue[Exception | None] = SimpleQueue()
        with self._lock:
            if self._refuses_reads:
                raise RuntimeError(CLOSED)
            self._reads[over] = block
        try:
            self._request(block, memory, over.put)
            if (failure := over.get()) is not None:
                raise failure
        finally:
            with self._lock:
                del self._reads[over]
        block.memory = memory
        return block

    def refuse_reads(self) -> None:
        """Has reads that wait for a store raise RuntimeError, and those that begin before `allow_reads`: a store that is silent
        would hold up whoever waits for their thread until its limit."""
        with self._lock:
            self._refuses_reads = True
            for over, block in self._reads.items():
                block.given_up = True
                over.put(RuntimeError(CLOSED))

    def allow_reads(self) -> None:
        with self._lock:
            self._refuses_reads = False

    def view(self, shard: int, begin: int, end: int) -> np.ndarray:
        self._notice_fork()
        out, row = np.empty(end - begin, np.uint8), np.array([(shard, begin, end - begin, 0, 0)], INDEX_DTYPE)
        with self._lock:
            at = self._table.find(row)
            if at[0] >= 0:
                row["shard"] = at
                gather.gather(row, self._table.bases, out, len(out), False, np.empty(1, bool))
                return out
        return np.frombuffer(self.read(shard, begin, end)[0], np.uint8)

    def read(self, shard: int, begin: int, end: int) -> tuple[bytes, bool]:
        self._notice_fork()
        url = self._url(shard)
        try:
            return bytes(store_of(url).get(url, begin, end, self._version(shard))), False
        except FileNotFoundError:
            raise missing(url) from None

    def will_need(self, rows: np.ndarray) -> None:
        """Does nothing: what is needed when is for the caller to say, by `load` and `drop`."""

    def close(self) -> None:
        """Forgets all blocks, and ends the threads once their requests are over."""
        self.refuse_reads()  # of requests that are canceled, nothing would be heard
        pool, self._pool = self._pool, ThreadPoolExecutor(THREADS, "store")
        pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._table, self._memory = Table(), Memory()
        self.allow_reads()


def missing(url: Url) -> UserError:
    return UserError(f"{url}: the shard is missing; upload it again, or run build again to restore it")
