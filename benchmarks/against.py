"""Is this checkout as fast as another one, such as the commit before a change?

    python -m benchmarks.against OTHER --what build --raw RAW [--rounds 7]
    python -m benchmarks.against OTHER --what loader|loader-uint8 --dataset DATASET
    python -m benchmarks.against OTHER --what step|import

Each measurement is a process of its own, by turns in this checkout and in OTHER, which needs extensions that are built; OTHER's
.venv is used if it has one. The ratio is by CPU time (user and system) of these processes and their children, which other
programs on the machine disturb less than wall time. A rate of 0.98 holds if the interval of the ratios reaches 0.98.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import click

# The harness is imported in main() only: with OTHER's Python this file runs alone.
WORKLOADS = ("build", "loader", "loader-uint8", "step", "import")
BATCH_SIZE, BATCHES = 128, 24
STEP_BATCH_SIZE, STEPS, STEP_WARM_UP = 32, 4, 2


def module(name: str) -> ModuleType:
    """A module under its name of today, or under the name that it had before packages were imported as imagefeed.*."""
    old = {"dataset.manifest": "preprocess.manifest"}
    try:
        return importlib.import_module(f"imagefeed.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("imagefeed"):
            raise
        return importlib.import_module(old.get(name, name))


def cpu_s() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure_loader(dataset: Path, dtype: str) -> dict[str, float]:
    """Seconds per image of the loader on the CPU, after the batches that it makes ahead."""
    manifest = module("dataset.manifest").Manifest.load(dataset)
    with module("pipeline.loader").ImageLoader(manifest, "train", BATCH_SIZE, dtype=dtype) as loader:
        batches = (batch for _ in iter(int, 1) for batch in loader)
        for _ in range(loader.options.prefetch + 2):
            next(batches)
        start_s, start_cpu_s = time.perf_counter(), cpu_s()
        for _ in range(BATCHES):
            next(batches).images[:, 0, 0, 0].sum().item()
        images = BATCHES * BATCH_SIZE
        return {"cpu": (cpu_s() - start_cpu_s) / images, "wall": (time.perf_counter() - start_s) / images}


def measure_step() -> dict[str, float]:
    """Seconds per image of a training step of AlexNet in float32 on the CPU."""
    import torch

    step = module("model.step")
    step.keep_memory()
    torch.manual_seed(0)
    net = module("model.nets").build_net("alexnet", 1000).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    images, labels = torch.randn(STEP_BATCH_SIZE, 3, 224, 224) * 50, torch.randint(0, 1000, (STEP_BATCH_SIZE,))
    for number in range(STEP_WARM_UP + STEPS):
        if number == STEP_WARM_UP:
            start_s, start_cpu_s = time.perf_counter(), cpu_s()
        step.train_step(net, images, labels, optimizer, "float32")
    count = STEPS * STEP_BATCH_SIZE
    return {"cpu": (cpu_s() - start_cpu_s) / count, "wall": (time.perf_counter() - start_s) / count}


def measure(checkout: Path, what: str, raw: Path | None, dataset: Path | None, work: Path) -> dict[str, float]:
    """CPU and wall seconds of one process in the checkout, per image where it is measured inside."""
    from benchmarks.harness import usage

    own = checkout / ".venv" / "bin" / "python"
    interpreter = own if own.exists() else sys.executable
    environment = os.environ | {"PYTHONPATH": str(checkout), "GOMP_SPINCOUNT": "3000"}  # as train.py
    if what == "build":
        shutil.rmtree(work / "out", ignore_errors=True)
        command = [interpreter, "-m", "preprocess", "build", raw, work / "out", "--split", "train"]
    elif what == "import":
        package = "imagefeed" if (checkout / "imagefeed").is_dir() else "pipeline"
        command = [interpreter, "-c", f"from {package} import ImageLoader"]
    else:
        # -P: the folder of this file has a preprocess.py, which is not the package.
        command = [interpreter, "-P", __file__, "--side", what, dataset or "-"]
        done = subprocess.run(list(map(str, command)), cwd=work, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout)
    used = usage(command, cwd=checkout if what == "build" else work, env=environment)
    return {"cpu": used.cpu_s, "wall": used.wall_s}


@click.command()
@click.argument("other", type=click.Path(path_type=Path, exists=True))
@click.option("--what", type=click.Choice(WORKLOADS), required=True)
@click.option("--raw", type=click.Path(path_type=Path, exists=True), help="Folder of class folders, for build.")
@click.option("--dataset", type=click.Path(path_type=Path, exists=True), help="Built dataset, for the loader.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
def main(other: Path, what: str, raw: Path | None, dataset: Path | None, rounds: int) -> None:
    """Compare this checkout with OTHER."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks.harness import ROOT, ratio, save

    if (what == "build" and not raw) or (what.startswith("loader") and not dataset):
        raise click.UsageError(f"--what {what} needs {'--raw' if what == 'build' else '--dataset'}")
    with tempfile.TemporaryDirectory() as work:
        sides = {
            name: functools.partial(
                measure, checkout.resolve(), what, raw and raw.resolve(), dataset and dataset.resolve(), Path(work)
            )
            for name, checkout in (("this", ROOT), ("other", other))
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(-1, rounds):  # the first round fills the page cache
            for name in sorted(sides, reverse=number % 2 == 0):
                one = sides[name]()
                if number >= 0:
                    found[name].append(one)
                print(
                    f"round {number + 1} of {rounds}: {name} " + ", ".join(f"{key} {value:.4g} s" for key, value in one.items())
                )
    result = {"what": what, "rounds": rounds, "seconds": found}
    for clock in ("cpu", "wall"):
        seconds = {name: [row[clock] for row in rows] for name, rows in found.items()}
        rates = [theirs / ours for ours, theirs in zip(seconds["this"], seconds["other"], strict=True)]
        result[clock] = {"rate": statistics.median(rates), "from": min(rates), "to": max(rates)}
        result[clock]["time"] = ratio(seconds, "this", "other")
        line = "{rate:.3f} of the other's rate (rounds {from:.3f} to {to:.3f}), {time:.3f} of its time".format(**result[clock])
        print(f"{what}, by {clock} time: {line}")
    save(f"against-{what}", result)


def side(what: str, dataset: str) -> dict[str, float]:
    with contextlib.redirect_stdout(sys.stderr):
        return measure_step() if what == "step" else measure_loader(Path(dataset), "uint8" if "uint8" in what else "float32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(side(*sys.argv[2:])))
    else:
        main()
