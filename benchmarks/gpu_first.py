"""What a GPU machine shows in ten minutes: each part in a process of its own, the most telling first, until time is up.

    make gpu-first PYTHON_GPU=python3 SECONDS_GIVEN=520                 # results in $OUT, a table last
    python -m benchmarks.gpu_first --device cpu --small --seconds 300   # a rehearsal without a GPU

CARRIED names a folder with a packed dataset of 256-pixel images; without one, some are drawn. Each part saves what it has found
in $OUT as it goes, so nothing is lost when time or the machine ends; their outputs follow each other in $OUT/parts.log, because
few files may come back from a machine. Parts are forked from a process that has loaded PyTorch and DALI but never touches the
GPU: loading them again would take a minute of the ten.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("BENCHMARK_RESULTS", os.environ.get("OUT") or "bench/gpu-first")  # before the harness is loaded
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as train.py

import click
import pytest
import torch

import train as training
from benchmarks import harness, page
from benchmarks.data import stretch
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.gpu import why_no_hardware_decoder
from imagefeed.pipeline.graph import import_dali
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler.windows import Bench, room_of
from imagefeed.pipeline.tuner.search import Setting

OUT = harness.RESULTS.resolve()
GRACE_S = 6  # kept for the table, and until a part that was stopped is gone
LEAST_S = 5  # a part is not begun with less
LARGE_BYTES = 1_500_000_000  # of the repeated dataset: more than any cache, and little beside the machine's memory
LOADS = (0.0, 0.65, 1.0)  # of the hardware decoder
TESTS = [f"tests/{name}.py" for name in ("test_gpu", "pipeline/test_cache", "pipeline/test_loader_options")]
LOG = "parts.log"
SHOWN = 30  # lines of figures in the last table, at most


class Setup(NamedTuple):
    device: str
    small: bool
    data: Path
    large: Path
    work: Path


class Part(NamedTuple):
    name: str
    limit_s: float
    run: Callable[[Setup], None]


def ready(setup: Setup) -> None:
    """Versions, and one batch by each decoder, compared with the CPU's pixels; DALI says what it does with each JPEG."""
    os.environ["DALI_NVIMGCODEC_LOG_LEVEL"] = "3"
    device = choose_device(setup.device)
    notes = harness.Notes("gpu-ready", "torch", "numpy")
    notes["CUDA of PyTorch"], notes["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
    notes["DALI"], notes["hardware decoder"] = import_dali().__version__, why_no_hardware_decoder() or "there"
    options = {"batch_size": 8 if setup.small else 64, "dtype": "uint8", "pca_jitter": 0}
    with ImageLoader(setup.data, "train", **options) as loader:
        right = next(iter(loader)).images.float()
    ways = [("dali", {"decoder": "dali", "hw_decoder_load": load}) for load in LOADS]
    for decoder, changes in [*ways, ("native", {"decoder": "native"}), ("both", {"decoder": "both"})]:
        with ImageLoader(setup.data, "train", device=device, **options | changes) as loader:
            found = next(iter(loader)).images.float().cpu()
        name = f"gray levels from the CPU's, {decoder} {changes.get('hw_decoder_load', '')}".rstrip()
        notes[name] = {"mean": (found - right).abs().mean().item(), "worst image": image_apart(found, right)}


def image_apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return (found - right).abs().mean((1, 2, 3)).max().item()


class Outcomes:
    """A plugin of pytest that keeps what came of each test."""

    def __init__(self, notes: harness.Notes):
        self.notes, self.found = notes, {"passed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.notes[f"FAILED {name}"] = str(report.longrepr).strip().splitlines()[-1][:200]
        elif report.when == "call" or report.skipped:
            self.found[report.outcome] += 1
            self.notes["tests"] = dict(self.found)


def tests(words: str, setup: Setup) -> None:
    """Tests of what a GPU must do as the CPU does, by words in their names."""
    notes = harness.Notes(f"gpu-tests-{words.split()[0].replace('_', '-')}", "torch")
    which = "gpu" if setup.device == "cuda" else "not gpu"
    options = ["-q", "-p", "no:cacheprovider", "-m", which, "-k", words, "--maxfail", "20"]
    pytest.main([*options, *TESTS], plugins=[Outcomes(notes)])


def script(module: str, words: str, small: str, setup: Setup, seconds: float) -> None:
    """A benchmark's own command line."""
    known = {"LARGE": setup.large, "DATA": setup.data, "DEVICE": setup.device, "SECONDS": f"{seconds - LEAST_S:.0f}"}
    arguments = [str(known.get(word, word)) for word in f"{words} {small if setup.small else ''}".split()]
    importlib.import_module(f"benchmarks.{module}").main.main(arguments, standalone_mode=False)


def feed(setup: Setup) -> None:
    """The loader alone by each decoder, and the fastest settings, which the next parts take."""
    device, cores, small = choose_device(setup.device), harness.cores(), setup.small
    manifest = Manifest.load(setup.large)
    batch_size, window_s = (16, 0.2) if small else (512, 1.0)
    notes = harness.Notes(harness.named("gpu_first", device), "torch")
    dali = [Setting(threads, 4, 8, load, "dali") for threads in (cores, max(cores // 4, 1)) for load in (*LOADS, 0.85)]
    ours = [Setting(cores, 2, 8, 0.65, "native"), *(Setting(cores, 3, 8, 0.65, "both", share) for share in (0.3, 0.5, 0.7))]
    ways = [(setting, way) for setting in (*ours, *dali[: 2 if small else None]) for way in WAYS]
    opened = functools.partial(ImageLoader, manifest, "train", batch_size, device=device)
    rates: dict[str, float] = {}
    best: dict[str, tuple[float, Setting]] = {}
    with Bench(opened, window_s, len(RecordReader(manifest, "train")) // batch_size, False, room_of(device)) as bench:
        for setting, way in sorted(ways, key=lambda pair: list(WAYS).index(pair[1])):
            name = f"{way}: {', '.join(f'{key} {value}' for key, value in asked(setting).items())}"
            try:
                rates[name] = bench.rate(setting, **WAYS[way])
            except Exception as error:  # the other ways go on
                notes[f"left out: {name}"] = f"{type(error).__name__}: {str(error)[:150]}"
                continue
            best[way] = max(best.get(way, (0.0, setting)), (rates[name], setting))
            notes["images a second"] = rates
            notes["best_settings"] = asked(best[next(iter(WAYS))][1])


WAYS = {  # of handing over a batch
    "bfloat16, channels-last": {"dtype": "bfloat16", "memory_format": "channels_last"},
    "uint8, channels-last": {"dtype": "uint8", "memory_format": "channels_last"},
}


def asked(setting: Setting) -> dict[str, object]:
    """The options that a setting's decoder looks at."""
    left_out = {"native": {"hw_decoder_load", "native_share"}, "dali": {"native_share"}}.get(setting.decoder, set())
    return {name: value for name, value in setting._asdict().items() if name not in left_out}


def run(setup: Setup) -> None:
    """train.py for some hundred "train", ended and resumed."""
    count, batch = (3, "8") if setup.small else (150, "1024")
    words = ["--device", setup.device, "--batch-size", batch, "--limit-batches", str(count), "--schedule", "1", "--lr", "0.001"]
    words += ["--crop-size", "64", "--no-lrn"] if setup.small else []
    notes = harness.Notes("gpu-run", "torch")
    for epochs in (1, 2):
        start_s = time.perf_counter()
        arguments = [setup.large, "--run-dir", setup.work / "run", "--epochs", epochs, "--profile", *words]
        training.main.main(list(map(str, arguments)), standalone_mode=False)
        notes[f"epoch {epochs} of {count} steps"] = f"{time.perf_counter() - start_s:.0f} s"
        lines = (setup.work / "run" / "metrics.jsonl").read_text().splitlines()
        notes[f"last metrics of epoch {epochs}"] = lines[-1][:400]


def parts_of(small: bool) -> list[Part]:
    """In their order. The first tests compile nothing; what compiles comes when the figures are there."""
    exact = "every_image or late_consumer or of_the_cores or going_on or host_cache_shows or dtype_and"
    compiled = "normalization or float64 or compiled or jitter or cache or trains_and_goes_on or profile_says or graph"
    if small:
        exact, compiled = "going_on or of_the_cores", "jitter"
    called = [
        ("ceilings", 40, "ceilings", "LARGE --device DEVICE --seconds 0.3", "--seconds 0.05 --batch-size 16"),
        ("layers", 40, "layers", "--device DEVICE --seconds SECONDS", "--batch-size 4 --window 0.01"),
        (
            "training",
            120,
            "train",
            "--device DEVICE --seconds SECONDS",
            "--as-on-gpu --batch-size 4 --crop-size 64 --window 0.1 --seconds 40 --only graph",
        ),
        ("together", 75, "together", "LARGE --device DEVICE --seconds SECONDS", "--small"),
    ]
    scripts = {
        name: Part(name, limit_s, functools.partial(script, module, words, quick, seconds=limit_s))
        for name, limit_s, module, words, quick in called
    }
    return [
        Part("ready", 40, ready),
        Part("tests", 75, functools.partial(tests, exact)),
        *(scripts[name] for name in ("ceilings", "layers", "training")),
        Part("feed", 50, feed),
        scripts["together"],
        Part("compiled-tests", 100, functools.partial(tests, compiled)),
        Part("run", 60, run),
    ]


def in_child(part: Part, setup: Setup) -> None:
    """Runs a part, its output in a file; ends the process."""
    os.setpgrp()  # in the same session, with which a machine ends what was left behind
    log = os.open(OUT / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"== {part.name}\n".encode())
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    harness.BEGAN_S = time.perf_counter()
    code = 1
    try:
        part.run(setup)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(code)


def left_s(seconds: float) -> float:
    """Of the seconds for all parts, in which PyTorch and DALI are loaded too."""
    return seconds - GRACE_S - harness.spent_s()


def stopped_in(part: Part, setup: Setup, left_s: float, fresh: bool = False) -> str:
    """Runs a part within its limit and the time left, in a fork or a `fresh` Python; returns why it failed, or nothing."""
    if left_s <= LEAST_S:
        return "no time was left"
    limit_s, log = min(part.limit_s, left_s), OUT / LOG
    log.touch()
    begin = log.stat().st_size
    process = multiprocessing.get_context("spawn" if fresh else "fork").Process(target=in_child, args=(part, setup))
    process.start()
    try:
        process.join(limit_s)
        if process.is_alive():
            return f"stopped after {limit_s:.0f} s"
    finally:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    if process.exitcode == 0:
        return ""
    lines = [line.strip() for line in log.read_bytes()[begin:].decode(errors="replace").splitlines()[1:] if line.strip()]
    return f"ended with {process.exitcode}: {lines[-1][:110] if lines else 'no output'}"


def dataset_in(carried: Path | None, work: Path, small: bool) -> Path:
    """The carried dataset, or one of drawn pictures."""
    for path in sorted(carried.rglob("dataset.json")) if carried else ():
        return path.parent
    if not (work / "data" / "dataset.json").exists():
        harness.call("preprocess", "sample", work / "raw", "--images", 100 if small else 500)
        harness.call("preprocess", "build", work / "raw", work / "data")
    return work / "data"


def figures(results: dict[str, list[dict]]) -> Iterator[str]:
    """The goals, and what each part says in a line."""
    for figure, value, goal in page.goals(results):
        if value is not None:
            yield f"{figure:<58}{page.cell(value):>12}   goal {page.cell(goal)}"
    for name, found in results.items():
        failed = [key for key in found[-1] if key.startswith("FAILED")]
        if name.startswith("gpu-tests"):
            yield f"{name}: {page.cell(found[-1].get('tests'))}{', FAILED: ' if failed else ''}{len(failed) or ''}"
            yield from (f"  {key[:110]}" for key in failed[:5])


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@harness.seconds_option(520.0, "Time for all parts.")
@click.option("--carried", type=harness.EXISTING, help="Folder with a packed dataset, at any depth; without one it is drawn.")
@click.option("--small", is_flag=True, help="A little of each part, to check that all run.")
@click.option("--only", multiple=True, help="Some parts only.")
@click.option(
    "--fresh", is_flag=True, help="Start a new Python for each part, as is done once the first one has failed in a fork."
)
@click.option("--work", type=click.Path(path_type=Path), help="Where data goes.  [default: work, beside $OUT]")
def main(
    device: str, seconds: float, carried: Path | None, small: bool, only: tuple[str, ...], fresh: bool, work: Path | None
) -> None:
    """Run all parts on a GPU within a given time."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part ends too
    work = (work or OUT.parent / "work").resolve()
    for folder in (OUT, work):
        folder.mkdir(parents=True, exist_ok=True)
    import_dali()
    data = dataset_in(carried, work, small)
    if not (work / "large" / "dataset.json").exists():
        size = Manifest.load(data).split("train").bytes
        stretch(data, work / "large", 2 if small else max(1, LARGE_BYTES // size))
    setup = Setup(device, small, data, work / "large", work)
    notes = harness.Notes("gpu-parts", "torch")
    outcomes: dict[str, str] = {"prepared": f"{harness.spent_s():.0f} s"}
    for part in parts_of(small):
        if only and part.name not in only:
            continue
        begin_s = time.monotonic()
        why = stopped_in(part, setup, left_s(seconds), fresh)
        if why and part.name == "ready" and not fresh:  # perhaps a library has touched the GPU before
            fresh, why = True, stopped_in(part, setup, left_s(seconds), True)
        outcomes[part.name] = f"{time.monotonic() - begin_s:.0f} s{f', {why}' if why else ''}"
        notes["parts"] = outcomes
    lines = [f"{name:<16}{outcome}" for name, outcome in outcomes.items()] + list(figures(page.load(OUT)))[:SHOWN]
    print("\n".join(line[:128] for line in lines[:40]))
    sys.exit(0 if all("," not in outcome for outcome in outcomes.values()) else 1)


if __name__ == "__main__":
    main()
