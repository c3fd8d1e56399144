"""Kills `build` at random moments, over and over, and checks that it ends with the same bytes as without.

    python -m benchmarks.kills [--kills 100]     # results under "kills"

Half of the kills hit the whole process group, as a machine that loses power does; half only the driver, whose workers must
then end by themselves, and one in ten a worker, which the driver must replace.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks import ROOT, save


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def workers_of(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--images", default=3000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, images: int, seed: int) -> None:
    """Kill builds of a drawn raw tree, linked to itself until there are enough images."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        python = [sys.executable, "-m", "preprocess"]
        subprocess.run([*python, "sample", work / "few", "--images", "200"], cwd=ROOT, check=True, capture_output=True)
        few = sorted((work / "few").glob("*/*/*.JPEG"))
        for number in range(images):
            path = few[number % len(few)]
            place = work / "raw" / path.relative_to(work / "few").parent
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.JPEG").symlink_to(path)
        build = [*python, "build", work / "raw"]
        start_s = time.monotonic()
        subprocess.run([*build, work / "whole"], cwd=ROOT, check=True, capture_output=True)
        whole_s = time.monotonic() - start_s
        whole = contents(work / "whole")
        done = {"group": 0, "driver": 0, "worker": 0}
        finished = 0
        out = work / "killed-0"
        while sum(done.values()) < kills:
            kind = moments.choices(["group", "driver", "worker"], [45, 45, 10])[0]
            process = subprocess.Popen(
                [*build, out], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(moments.uniform(0.2, 0.6 * whole_s))
            except subprocess.TimeoutExpired:
                done[kind] += 1
                if kind == "worker":
                    for pid in workers_of(process.pid)[:1]:
                        os.kill(pid, signal.SIGKILL)
                    process.wait()
                else:
                    (os.killpg if kind == "group" else os.kill)(process.pid, signal.SIGKILL)
                    process.wait()
            for path in out.glob("*.tfrecord"):
                assert path.read_bytes() == whole[path.name], f"{path.name} differs after {done}"
            if (out / "dataset.json").exists():
                assert contents(out) == whole, f"the dataset differs after {done}"
                finished += 1
                out = work / f"killed-{finished}"
            print(f"{sum(done.values())} kills, {finished} datasets finished", end="\r", flush=True)
        subprocess.run([*build, out], cwd=ROOT, check=True, capture_output=True)
        assert contents(out) == whole
        result = {"images": images, "kills": done, "datasets": finished + 1}
        result["outcome"] = "every shard under its final name and every dataset was the same bytes as without a kill"
    save("kills", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
