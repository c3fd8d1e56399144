"""How many processors this process may use: by its affinity, and by the CPU quota of its control group."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores this process may use; in a container or batch job the machine has more. A quota is rounded up."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else min(cores, math.ceil(quota))


@functools.cache
def cpu_quota() -> float | None:
    """The processor time per second that the control groups of this process allow it, in cores; None without a limit."""
    return min((quota for _, quota in quotas()), default=None)


def quotas(groups: Path = GROUPS, of_process: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[Path, float]]:
    """The control groups of this process, and those around them, that have a CPU quota. Of version 2 (cpu.max) and 1
    (cpu.cfs_quota_us); in a container the path of its own group may not exist, because it sees that group as the root."""
    lines = ""
    with contextlib.suppress(OSError):
        lines = of_process.read_text()
    for line in lines.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = {groups / controllers, groups / "cpu"} if controllers else {groups}
        inside = path.strip("/").split("/") if path.strip("/") else []
        for root in sorted(roots):
            for depth in range(len(inside), -1, -1):
                folder = root.joinpath(*inside[:depth])
                with contextlib.suppress(OSError, ValueError):
                    yield folder, _quota(folder, bool(controllers))


def _quota(folder: Path, old: bool) -> float:
    """In cores; raises ValueError if there is no limit, OSError if there is no such group."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if old else ("cpu.max",)
    quota, period = " ".join((folder / name).read_text() for name in names).split()
    if int(quota) <= 0:  # -1, or "max", which is no number
        raise ValueError
    return int(quota) / int(period)
