"""Does `verify` find each single bit that flips anywhere in a dataset, and name the right place?

    python -m benchmarks.bitflips DATASET [--flips 1000]     # results under "bitflips"

DATASET is copied first. A flip in a shard must be reported at its record, in DALI's index at its line, elsewhere at its file.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import click
import numpy as np

from benchmarks import harness
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import FOOTER
from imagefeed.preprocess.verify import verify


def problems(folder: Path) -> list[str]:
    try:
        return [problem.where for problem in verify(folder, workers=1)]
    except UserError as error:
        return [str(error)]


def record_ends(manifest: Manifest) -> dict[str, np.ndarray]:
    """Where each record ends, by shard."""
    ends = {}
    for split, content in manifest.splits.items():
        index = manifest.load_index(split)
        for number, shard in enumerate(content.shards):
            rows = index[index["shard"] == number]
            ends[shard.name] = rows["offset"].astype(np.int64) + rows["length"] + FOOTER.size
    return ends


@click.command()
@harness.DATASET
@click.option("--flips", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(dataset: Path, flips: int, seed: int) -> None:
    """Flip bits in a copy of DATASET, one at a time."""
    draw = random.Random(seed)
    counts: Counter = Counter()
    with harness.working_folder() as folder:
        copy = shutil.copytree(dataset, folder / "copy")
        ends = record_ends(Manifest.load(copy))
        files = sorted(path for path in copy.iterdir() if path.stat().st_size)
        for number in range(flips):
            # Every second flip is anywhere by size, which is mostly in shards; the others are spread over the kinds of file.
            kind = draw.choice(sorted({path.suffix for path in files})) if number % 2 else ""
            some = [path for path in files if path.suffix == kind] or files
            path = draw.choices(some, [1 if kind else path.stat().st_size for path in some])[0]
            data = bytearray(path.read_bytes())
            byte, bit = draw.randrange(len(data)), draw.randrange(8)
            data[byte] ^= 1 << bit
            path.write_bytes(data)
            found, expected = problems(copy), path.name
            if path.suffix == ".tfrecord":
                expected += f", record {np.searchsorted(ends[path.name], byte, 'right')} "
            elif path.suffix == ".idx":
                expected += f", record {bytes(data[:byte]).count(10)}"
            at_it = [where for where in found if where.startswith(expected) or (expected in where and path.suffix == ".json")]
            assert at_it, f"bit {bit} of byte {byte} of {path.name}: expected {expected!r}, found {found}"
            counts[path.suffix] += 1
            data[byte] ^= 1 << bit
            path.write_bytes(data)
        assert problems(copy) == []
    result = {"flips": flips, "found at the right place, by kind of file": dict(counts)}
    harness.save("bitflips", result)
    print(result)


if __name__ == "__main__":
    main()
