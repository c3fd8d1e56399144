"""Does a `build` that is killed at random moments, over and over, end with the same bytes as one that is not?

    python -m benchmarks.kills [--kills 100]     # results under "kills"

Of the kills 45 % hit the whole process group, as when a machine loses power; 45 % only the driver, whose workers must then end by
themselves; and 10 % a worker, which the driver must replace.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import click

from benchmarks import harness
from benchmarks.data import repeat


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def workers_of(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def build_until_killed(command: list[str], kind: str, after_s: float) -> bool:
    """Runs a build; returns whether it was hit before its end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=harness.ROOT, start_new_session=True, **quiet)
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        if kind == "worker":
            for pid in workers_of(process.pid)[:1]:
                os.kill(pid, signal.SIGKILL)
        else:
            (os.killpg if kind == "group" else os.kill)(process.pid, signal.SIGKILL)
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

        def build(out: Path) -> list[str]:
            return harness.python("preprocess", "build", work / "raw", out)

        start_s = time.monotonic()
        harness.usage(build(work / "whole"))
        whole_s = time.monotonic() - start_s
        whole = contents(work / "whole")
        finished, out = 0, work / "killed-0"
        while sum(done.values()) < kills:
            kind = moments.choices(["group", "driver", "worker"], [45, 45, 10])[0]
            done[kind] += build_until_killed(build(out), kind, moments.uniform(0.2, 0.6 * whole_s))
            for path in out.glob("*.tfrecord"):
                assert path.read_bytes() == whole[path.name], f"{path.name} differs after {done}"
            if (out / "dataset.json").exists():
                assert contents(out) == whole, f"the dataset differs after {done}"
                finished += 1
                out = work / f"killed-{finished}"
        harness.usage(build(out))
        assert contents(out) == whole
    result = {"images": images, "kills": done, "datasets": finished + 1}
    result["outcome"] = "every shard under its final name and every dataset was the same bytes as without a kill"
    harness.save("kills", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
