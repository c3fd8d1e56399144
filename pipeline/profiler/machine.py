"""What the machine did besides: processor time of others, bytes from the disk, pages in memory, the interpreter's lock."""

import contextlib
import ctypes
import gc
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import LIBC, map_file

PAGE = mmap.PAGESIZE
TICKS = os.sysconf("SC_CLK_TCK")
# Of control groups of version 2 and 1: where the limit of memory lies, and what of it cannot be given back.
MEMORY_LIMITS = (("memory.max", "anon "), ("memory.limit_in_bytes", "total_rss "))


@dataclass(frozen=True)
class Counters:
    """Since the machine or the process began; the difference of two is what happened in between."""

    when_s: float
    busy_s: float  # of all the processors that this process may use, all programs
    own_s: float  # of this process and its children
    queued_s: float  # for which their threads could have run, and had no processor (schedstat)
    read_bytes: int  # that came from a disk for them
    refaults: int  # pages of files that had been put out of memory, and were read again (whole machine)
    throttled_s: float  # for which a control group held this process back


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
        with contextlib.suppress(OSError):  # it has just ended, or its figures are not for us
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own_s += (int(fields[11]) + int(fields[12])) / TICKS
            read_bytes += int(Path(f"/proc/{process}/io").read_text().partition("\nread_bytes: ")[2].split()[0])
            for task in Path(f"/proc/{process}/task").iterdir():
                queued_s += int((task / "schedstat").read_text().split()[1]) / 1e9
    refaults = throttled = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith(("workingset_refault_file ", "workingset_refault ")):
                refaults = int(line.split()[1])
    for path, unit in (("/sys/fs/cgroup/cpu.stat", "throttled_usec"), ("/sys/fs/cgroup/cpu/cpu.stat", "throttled_time")):
        with contextlib.suppress(OSError, ValueError, IndexError):
            throttled = int(Path(path).read_text().partition(unit + " ")[2].split()[0])
            throttled /= 1e6 if unit == "throttled_usec" else 1e9
    return Counters(time.perf_counter(), busy / TICKS, own_s, queued_s, read_bytes, refaults, throttled)


def family() -> list[int]:
    """This process and all that descend from it."""
    found = [os.getpid()]
    for process in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def others_share(before: Counters, after: Counters) -> float:
    """The share of the processors that other programs had, 0 to 1."""
    capacity_s = (after.when_s - before.when_s) * len(os.sched_getaffinity(0))
    used_s = after.busy_s - before.busy_s - (after.own_s - before.own_s)
    return min(max(used_s / capacity_s, 0.0), 1.0)


def queued_share(before: Counters, after: Counters) -> float:
    """Of the time for which this program's threads could have run, the share in which they had no processor."""
    queued_s, own_s = after.queued_s - before.queued_s, after.own_s - before.own_s
    return max(queued_s, 0.0) / max(queued_s + own_s, 1e-9)


def lock_latency() -> float:
    """Seconds until this thread has the interpreter's lock again after letting it go: 70 us where nobody wants it (the sleep
    itself), 5 ms and more where a thread holds on to it (sys.getswitchinterval). Waiting for a processor is left out."""
    queued_s, start_s = thread_queued(), time.perf_counter()
    time.sleep(0)
    end_s = time.perf_counter()
    return max(end_s - start_s - (thread_queued() - queued_s), 0.0)


def thread_queued() -> float:
    """Seconds for which this thread could have run, and had no processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def memory_bytes() -> tuple[int, int]:
    """(available, limit): what programs may still take, and what this one may have at most; page cache counts as available."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available, limit = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / ("memory" if controllers == "memory" else "")
        if controllers not in ("", "memory"):
            continue
        for name, taken in MEMORY_LIMITS:
            with contextlib.suppress(OSError, ValueError, IndexError):
                folder = root / path.lstrip("/")
                allowed = int((folder / name).read_text())
                used = int(("\n" + (folder / "memory.stat").read_text()).partition("\n" + taken)[2].split()[0])
                limit, available = min(limit, allowed), min(available, allowed - used)
    return available, limit


def resident_share(manifest: Manifest, split: str, ids: np.ndarray) -> float:
    """The share of the pages of records `ids` that are in memory (mincore(2); where files of others are read, it says all)."""
    rows = manifest.load_index(split)[np.unique(ids)]
    pages = resident = 0
    for shard in np.unique(rows["shard"]).tolist():
        file = manifest.split(split).shards[shard]
        mapped = map_file(manifest.root / file.name, file.bytes)
        there = np.zeros(-(-file.bytes // PAGE), np.uint8)
        address = ctypes.c_void_p(mapped.ctypes.data)
        LIBC.mincore(address, ctypes.c_size_t(file.bytes), ctypes.c_void_p(there.ctypes.data))
        for begin, end in page_ranges(rows[rows["shard"] == shard]):
            pages += end - begin
            resident += int(np.count_nonzero(there[begin:end] & 1))
    return resident / max(pages, 1)


def evict(manifest: Manifest, split: str, ids: np.ndarray) -> None:
    """Puts the pages of records `ids` out of memory; those that a process has mapped and looked at stay."""
    gc.collect()
    rows = manifest.load_index(split)[np.unique(ids)]
    for shard in np.unique(rows["shard"]).tolist():
        with open(manifest.root / manifest.split(split).shards[shard].name, "rb") as file:
            for begin, end in page_ranges(rows[rows["shard"] == shard]):
                os.posix_fadvise(file.fileno(), begin * PAGE, (end - begin) * PAGE, os.POSIX_FADV_DONTNEED)


def page_ranges(rows: np.ndarray) -> list[tuple[int, int]]:
    """First page and the one after the last of each record."""
    begins = rows["offset"].astype(np.int64) // PAGE
    ends = -(-(rows["offset"].astype(np.int64) + rows["length"]) // PAGE)
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
