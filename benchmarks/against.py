"""Is this checkout as fast as another one, such as the commit before a change?

    python -m benchmarks.against OTHER --what build --raw RAW [--rounds 7]
    python -m benchmarks.against OTHER --what loader|loader-uint8|... --dataset DATASET
    python -m benchmarks.against OTHER --what step|import

The loader makes float32 crops; with loader-uint8, -resized, -ten and -filling uint8 ones, RandomResizedCrops, ten views, and the
first epoch of cache="host", for which DATASET needs 40 batches (data.stretch). verify is `verify --deep`.
Each measurement is a process of its own, by turns in this checkout and in OTHER, which needs its extensions built; the .venv of
each is used if it has one. The ratio is by CPU time (user and system) of these processes and their children, which other programs
on the machine disturb less than wall time. A rate of 0.98 holds if the interval of the ratios reaches 0.98.
"""

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click

# The harness is imported in functions only: with OTHER's Python this file runs alone.
BATCH_SIZE, BATCHES = 128, 24
LOADERS: dict[str, dict[str, object]] = {  # arguments of ImageLoader
    "loader": {},
    "loader-uint8": {"dtype": "uint8"},
    "loader-resized": {"random_resized_crop": True},
    "loader-ten": {"views": "ten", "batch_size": 16},
    "loader-filling": {"cache": "host"},
}
WORKLOADS = ("build", "verify", *LOADERS, "step", "import")
STEP_BATCH_SIZE, STEPS = 32, 4


def module(name: str) -> ModuleType:
    """A module under its name of today, or under its name before packages were imported as imagefeed.*."""
    try:
        return importlib.import_module(f"imagefeed.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("imagefeed"):
            raise
        return importlib.import_module({"dataset.manifest": "preprocess.manifest"}.get(name, name))


def timed(work: Callable[[], object], times: int, images: int) -> dict[str, float]:
    """CPU and wall seconds per image of `work`, which takes so many images each time."""

    def clocks() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()

    cpu_s, wall_s = clocks()
    for _ in range(times):
        work()
    return {name: (end - start) / times / images for name, start, end in zip(("cpu", "wall"), (cpu_s, wall_s), clocks())}


def measure_loader(dataset: str, options: dict[str, object]) -> dict[str, float]:
    """The loader on the CPU, after the batches that it makes ahead; and the megabytes that the process holds for itself."""
    manifest, options = module("dataset.manifest").Manifest.load(Path(dataset)), {"batch_size": BATCH_SIZE} | options
    with module("pipeline.loader").ImageLoader(manifest, "train", **options) as loader:
        batches = (batch for _ in iter(int, 1) for batch in loader)
        for _ in range(loader.options.prefetch + 2):
            next(batches)
        found = timed(lambda: next(batches).images.flatten(1)[:, 0].sum().item(), BATCHES, options["batch_size"])
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return found | {"memory_mb": int(held.split()[1]) / 1e3}


def measure_step() -> dict[str, float]:
    """A training step of AlexNet in float32 on the CPU."""
    import torch

    module("model.step").keep_memory()
    torch.manual_seed(0)
    net = module("model.nets").build_net("alexnet", 1000).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    images, labels = torch.randn(STEP_BATCH_SIZE, 3, 224, 224) * 50, torch.randint(0, 1000, (STEP_BATCH_SIZE,))

    def step() -> None:
        module("model.step").train_step(net, images, labels, optimizer, "float32")

    timed(step, 2, STEP_BATCH_SIZE)
    return timed(step, STEPS, STEP_BATCH_SIZE)


def measure(checkout: Path, what: str, source: Path | None) -> dict[str, float]:
    """CPU and wall seconds of one process in the checkout, per image where the process measures itself."""
    from benchmarks.harness import usage

    own = checkout / ".venv" / "bin" / "python"
    interpreter = own if own.exists() else sys.executable
    options = {"env": os.environ | {"PYTHONPATH": str(checkout), "GOMP_SPINCOUNT": "3000"}}  # as train.py
    with tempfile.TemporaryDirectory() as work:
        if what in ("build", "verify"):
            words = [what, source, *([work, "--split", "train"] if what == "build" else ["--deep"])]
            used = usage([interpreter, "-m", "preprocess", *words], cwd=checkout, **options)
        elif what == "import":
            package = "imagefeed" if (checkout / "imagefeed").is_dir() else "pipeline"
            used = usage([interpreter, "-c", f"from {package} import ImageLoader"], cwd=work, **options)
        else:  # -P: the folder of this file has a preprocess.py, which is not the package
            command = list(map(str, [interpreter, "-P", __file__, "--side", what, source]))
            return json.loads(subprocess.run(command, cwd=work, stdout=subprocess.PIPE, check=True, text=True, **options).stdout)
    return {"cpu": used.cpu_s, "wall": used.wall_s}


@click.command()
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--what", type=click.Choice(WORKLOADS), required=True)
@click.option("--raw", type=click.Path(path_type=Path, exists=True), help="Folder of class folders, for build.")
@click.option("--dataset", type=click.Path(path_type=Path, exists=True), help="Built dataset, for the loader.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
def main(other: Path, what: str, raw: Path | None, dataset: Path | None, rounds: int) -> None:
    """Compare this checkout with OTHER."""
    from benchmarks.harness import ROOT, save

    if (what == "build" and not raw) or (what in ("verify", *LOADERS) and not dataset):
        raise click.UsageError(f"--what {what} needs {'--raw' if what == 'build' else '--dataset'}")
    source = raw if what == "build" else dataset
    sides, found = {"this": ROOT, "other": other.resolve()}, {"this": [], "other": []}
    for number in range(rounds + 1):  # the first round fills the page cache
        for name in sorted(sides, reverse=bool(number % 2)):
            one = measure(sides[name], what, source and source.resolve())
            found[name] += [one] if number else []
            print(f"round {number} of {rounds}: {name} cpu {one['cpu']:.4g} s, wall {one['wall']:.4g} s", flush=True)
    result = {"what": what, "rounds": rounds, "seconds": found}
    for clock in ("cpu", "wall") if "memory_mb" not in found["this"][0] else ("cpu", "wall", "memory_mb"):
        rates = [theirs[clock] / ours[clock] for ours, theirs in zip(found["this"], found["other"], strict=True)]
        median = statistics.median(rates)
        result[clock] = {"rate": median, "lowest": min(rates), "highest": max(rates), "time": 1 / median}
        interval = f"{median:.3f} (rounds {min(rates):.3f} to {max(rates):.3f}), so {1 / median:.3f} of its {clock}"
        print(f"{what}: the other's {clock} over this one's: {interval}")
    save(f"against-{what}", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        _, _, workload, path = sys.argv
        print(json.dumps(measure_step() if workload == "step" else measure_loader(path, LOADERS[workload])))
    else:
        main()
