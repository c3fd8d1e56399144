"""One step of growth.py in a process of its own, PYTHON -m benchmarks.growth_steps STEP DATASET, as seconds and megabytes."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import ImageLoader

BATCH_SIZE = 128


def loader(dataset: str) -> ImageLoader:
    manifest = Manifest.load(dataset)
    return ImageLoader(manifest, manifest.train_split, BATCH_SIZE)


def opened(dataset: str) -> Iterator[None]:
    yield
    with loader(dataset):
        yield


def resumed(dataset: str, epochs: float) -> Iterator[None]:
    """A run that goes on after so many epochs, from a state that another loader left."""
    with loader(dataset) as other:
        other.position = int(epochs * len(other))
        state = other.state_dict()
    yield
    with loader(dataset) as mine:
        mine.load_state_dict(state)
        next(iter(mine))
        yield


def epoch(dataset: str) -> Iterator[None]:
    yield
    with loader(dataset) as mine:
        for batch in mine:
            batch.images[:, 0, 0, 0].sum().item()
        yield


# Each stops twice: when all is ready for what is measured, and when that is done, with the loader still open.
STEPS: dict[str, Callable[[str], Iterator[None]]] = {
    "open": opened,
    "first batch": lambda dataset: resumed(dataset, 0),
    "resume in the middle": lambda dataset: resumed(dataset, 0.5),
    "resume in the tenth epoch": lambda dataset: resumed(dataset, 9.5),
    "an epoch": epoch,
}


def memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def main() -> None:
    name, dataset = sys.argv[1:3]
    step = STEPS[name](dataset)
    next(step)
    before_mb = memory_mb("VmRSS") - memory_mb("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    start_s = time.perf_counter()
    next(step)
    seconds = time.perf_counter() - start_s
    # Of what is mapped, shards and index, the system takes back what it needs: it is not counted.
    peak_mb = memory_mb("VmHWM") - memory_mb("RssFile")
    step.close()
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb, "before_mb": before_mb}))


if __name__ == "__main__":
    main()
