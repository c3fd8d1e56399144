"""What the machine did meanwhile: processor time of others, bytes from the disk, pages in memory, the interpreter's lock."""

import contextlib
import ctypes
import gc
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagefeed.codec.cores import GROUPS, quotas
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.shards import LIBC, map_file
from imagefeed.dataset.storage import Url

PAGE = mmap.PAGESIZE
TICKS = os.sysconf("SC_CLK_TCK")
# Control groups of version 2 and 1: the file with the memory limit, and the usage that cannot be reclaimed.
MEMORY_LIMITS = (("memory.max", "anon "), ("memory.limit_in_bytes", "total_rss "))


@dataclass(frozen=True)
class Counters:
    """Totals since the machine or the process began; subtract two to see what happened in between."""

    when_s: float
    busy_s: float  # of the processors that this process may use, by all programs
    own_s: float  # of this process and its children
    queued_s: float  # that their threads could have run, but had no processor (schedstat)
    read_bytes: int  # that came from a disk for them
    refaults: int  # pages of files that were evicted and read again (whole machine)
    throttled_s: float  # that a control group held this process back, on all processors together


def counters() -> Counters:
    busy = 0
    allowed = os.sched_getaffinity(0)
    for line in Path("/proc/stat").read_text().splitlines():
        name, *times = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
            user, nice, system, _, _, irq, softirq, steal = map(int, times[:8])
            busy += user + nice + system + irq + softirq + steal
    own_s, queued_s, read_bytes = 0.0, 0.0, 0
    for process in family():
        with contextlib.suppress(OSError):  # it has just ended, or we may not read it
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own_s += (int(fields[11]) + int(fields[12])) / TICKS
            read_bytes += value_of(Path(f"/proc/{process}/io"), "read_bytes: ")
            for task in Path(f"/proc/{process}/task").iterdir():
                queued_s += int((task / "schedstat").read_text().split()[1]) / 1e9
    refaults, throttled_s = 0, 0.0
    for name in ("workingset_refault ", "workingset_refault_file "):  # of older and newer kernels
        with contextlib.suppress(OSError, IndexError):
            refaults = value_of(Path("/proc/vmstat"), name)
    for group in {group for group, _ in quotas()} | {GROUPS, GROUPS / "cpu"}:
        for name, unit in (("throttled_usec ", 1e6), ("throttled_time ", 1e9)):  # of versions 2 and 1
            with contextlib.suppress(OSError, IndexError):
                throttled_s = max(throttled_s, value_of(group / "cpu.stat", name) / unit)
    return Counters(time.perf_counter(), busy / TICKS, own_s, queued_s, read_bytes, refaults, throttled_s)


def value_of(path: Path, name: str) -> int:
    """The number behind `name` at the start of a line; raises IndexError if there is none."""
    return int(f"\n{path.read_text()}".partition(f"\n{name}")[2].split()[0])


def family() -> list[int]:
    """This process and all its descendants."""
    found = [os.getpid()]
    for process in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def others_share(before: Counters, after: Counters) -> float:
    """The share of the processors that other programs used, 0 to 1."""
    capacity_s = (after.when_s - before.when_s) * len(os.sched_getaffinity(0))
    used_s = after.busy_s - before.busy_s - (after.own_s - before.own_s)
    return min(max(used_s / capacity_s, 0.0), 1.0)


def throttled_share(before: Counters, after: Counters) -> float:
    """The share of the time in which this program's threads could have run, but a CPU quota held them back."""
    throttled_s, own_s = after.throttled_s - before.throttled_s, after.own_s - before.own_s
    return max(throttled_s, 0.0) / max(throttled_s + own_s, 1e-9)


def queued_share(before: Counters, after: Counters) -> float:
    """The share of the time in which this program's threads could have run, but had no processor."""
    queued_s, own_s = after.queued_s - before.queued_s, after.own_s - before.own_s
    return max(queued_s, 0.0) / max(queued_s + own_s, 1e-9)


def lock_latency() -> float:
    """Seconds until this thread has the interpreter's lock again after releasing it: 70 us if nobody wants it (the sleep itself),
    5 ms and more if another thread holds on to it (sys.getswitchinterval). Waiting for a processor is subtracted."""
    queued_s, start_s = thread_queued(), time.perf_counter()
    time.sleep(0)
    end_s = time.perf_counter()
    return max(end_s - start_s - (thread_queued() - queued_s), 0.0)


def thread_queued() -> float:
    """Seconds that this thread could have run, but had no processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def memory_bytes() -> tuple[int, int]:
    """(available, limit): what programs may still take, and the most that this one may have; page cache counts as available."""
    info = Path("/proc/meminfo")
    available, limit = (value_of(info, name) * 1024 for name in ("MemAvailable:", "MemTotal:"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = Path("/sys/fs/cgroup") / controllers / path.lstrip("/")
        for name, taken in MEMORY_LIMITS:
            with contextlib.suppress(OSError, ValueError, IndexError):
                allowed = int((folder / name).read_text())
                used = value_of(folder / "memory.stat", taken)
                limit, available = min(limit, allowed), min(available, allowed - used)
    return available, limit


def pages_of(manifest: Manifest, split: str, ids: np.ndarray) -> Iterator[tuple[Path, int, list[tuple[int, int]]]]:
    """For each shard with some of the records `ids`: path, bytes, and each record's first page and the one after its last; for
    none in a store."""
    rows = manifest.load_index(split)[np.unique(ids)]
    for shard in np.unique(rows["shard"]).tolist():
        file = manifest.split(split).shards[shard]
        mine = rows[rows["shard"] == shard]
        begins = mine["offset"].astype(np.int64)
        ends = -(-(begins + mine["length"]) // PAGE)
        path = manifest.place_of(file)
        if isinstance(path, Url):
            continue
        yield path, file.bytes, list(zip((begins // PAGE).tolist(), ends.tolist(), strict=True))


def resident_share(manifest: Manifest, split: str, ids: np.ndarray) -> float | None:
    """The share of the pages of records `ids` that are in memory (mincore(2), which calls pages of others' files resident); None
    if none of them is in a file."""
    pages = resident = 0
    for path, size, ranges in pages_of(manifest, split, ids):
        mapped = map_file(path, size)
        there = np.zeros(-(-size // PAGE), np.uint8)
        LIBC.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data))
        for begin, end in ranges:
            pages += end - begin
            resident += int(np.count_nonzero(there[begin:end] & 1))
    return resident / pages if pages else None


def evict(manifest: Manifest, split: str, ids: np.ndarray) -> None:
    """Removes the pages of records `ids` from the page cache; pages that a process has mapped and touched stay."""
    gc.collect()
    for path, _, ranges in pages_of(manifest, split, ids):
        with open(path, "rb") as file:
            for begin, end in ranges:
                os.posix_fadvise(file.fileno(), begin * PAGE, (end - begin) * PAGE, os.POSIX_FADV_DONTNEED)
