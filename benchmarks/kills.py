"""Does a `build` that is killed at random moments, over and over, end with the same bytes as one that is not?

    python -m benchmarks.kills [--kills 100]     # results under "kills"

Of the kills 45 % hit the whole process group, as when a machine loses power; 45 % only the driver, whose workers must then end by
themselves; and 10 % a worker, which the driver must replace.
"""

import os
import random
import signal
import subprocess
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import repeat

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def a_worker_of(pid: int) -> int | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next((int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()), None)
    except (FileNotFoundError, ProcessLookupError):
        return None


def build_until_killed(command: list[str], kind: str, after_s: float) -> bool:
    """Runs a build; returns whether it was hit before its end."""
    process = subprocess.Popen(command, cwd=harness.ROOT, start_new_session=True, **QUIET)
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        if kind == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif pid := process.pid if kind == "driver" else a_worker_of(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return True


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--images", default=3000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, images: int, seed: int) -> None:
    """Kill builds of drawn images, linked until there are enough."""
    moments = random.Random(seed)
    done = {"group": 0, "driver": 0, "worker": 0}
    with harness.working_folder() as work:
        harness.call("preprocess", "sample", work / "few", "--images", 200)
        few = sorted((work / "few").glob("*/*/*.JPEG"))
        for split in ("train", "val"):
            paths = [path for path in few if path.parent.parent.name == split]
            repeat(paths, work / "raw" / split, images * len(paths) // len(few))
        build = harness.python("preprocess", "build", work / "raw")
        whole_s = harness.usage([*build, work / "whole"]).wall_s
        whole = contents(work / "whole")
        finished, out = 0, work / "killed-0"
        while sum(done.values()) < kills:
            kind = moments.choices(list(done), [45, 45, 10])[0]
            done[kind] += build_until_killed([*build, str(out)], kind, moments.uniform(0.2, 0.6 * whole_s))
            for path in out.glob("*.tfrecord"):
                assert path.read_bytes() == whole[path.name], f"{path.name} differs after {done}"
            if (out / "dataset.json").exists():
                assert contents(out) == whole, f"the dataset differs after {done}"
                finished += 1
                out = work / f"killed-{finished}"
        harness.usage([*build, out])
        assert contents(out) == whole
    outcome = "every shard under its final name and every dataset was the same bytes as without a kill"
    result = {"images": images, "kills": done, "datasets": finished + 1, "outcome": outcome}
    harness.save("kills", result)
    print(result)


if __name__ == "__main__":
    main()
