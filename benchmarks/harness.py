"""The harness of all benchmarks: machine, versions, result files, contestants measured in turns, common options.

Results go to benchmarks/results/MACHINE-DATE.json, one file per machine and day: {NAME: {"date", "machine", "versions", and the
script's own entries}}. BENCHMARK_RESULTS names another folder.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click

import benchmarks

BEGAN_S = benchmarks.BEGAN_S  # the budget of --seconds includes importing torch and DALI
ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", ROOT / "benchmarks" / "results"))
CLOSING_S = 10  # after which a worker that does not end is killed
WINDOWS = 5  # of `window_rates`

EXISTING = click.Path(path_type=Path, exists=True)
DATASET = click.argument("dataset", type=EXISTING)
RAW = click.argument("raw", type=EXISTING)
PEERS = click.option("--peers", default=sys.executable, help="Python interpreter that has the peers, as made by peers.py.")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
FOLDER = click.option("--folder", type=click.Path(path_type=Path), help="Where working files go and stay; default: temporary.")


def rounds_option(default: int) -> Callable:
    return click.option("--rounds", type=click.IntRange(1), default=default, show_default=True, help="Measurements of each row.")


def seconds_option(default: float, help: str) -> Callable:
    return click.option("--seconds", type=click.FloatRange(0), default=default, show_default=True, help=help)


def spent_s() -> float:
    return time.perf_counter() - BEGAN_S


def cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def machine() -> str:
    """The processor, the number of usable cores, and the GPUs. Family and model tell apart processors of the same name: AMD EPYC
    is 23, 1 for Zen 1 and 26, 2 for Zen 5."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return ", ".join([model, f"{cores()} cores", *(f"{gpus.count(gpu)} {gpu}" for gpu in sorted(set(gpus)))])


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(name: str, result: dict, *packages: str, folder: Path = RESULTS) -> Path:
    """Writes `result` as `name` into today's file of this machine, with the versions of Python and `packages`."""
    versions = {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
    head = {"date": date.today().isoformat(), "machine": machine(), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(head['machine'])}-{head['date']}.json"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two scripts may end at once
        results = json.loads(path.read_text()) if path.exists() else {}
        path.with_suffix(".tmp").write_text(json.dumps(results | {name: head | result}, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
    finally:
        os.close(lock)
    return path


def named(script: str, device) -> str:
    """The name of the script's result for this torch.device."""
    return script if device.type == "cpu" else f"{script}-{device.type}"


def tuned_settings(device) -> dict[str, object]:
    """The loader's settings that benchmarks.tune, or gpu_first, last found best on this machine; empty if neither has run."""
    for path in sorted(RESULTS.glob(f"{slug(machine())}-*.json"), reverse=True):
        results = json.loads(path.read_text())
        if found := results.get(named("tune", device)) or results.get(named("gpu_first", device)):
            return found.get("best_settings", {})
    return {}


class Notes(dict):
    """A result that is saved with each entry, so that nothing is lost when its script is stopped, and a time budget."""

    def __init__(self, name: str, *packages: str, seconds: float = math.inf):
        super().__init__()
        self.name, self.packages, self.seconds = name, packages, seconds

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        save(self.name, self, *self.packages)
        print(f"{self.name}: {key}: {value}", flush=True)

    @property
    def left_s(self) -> float:
        return self.seconds - spent_s()


def interleave(ways: dict[Hashable, Callable[[], float]], rounds: int) -> dict[Hashable, list[float]]:
    """Measures each way once per round, after a round that fills caches and does not count."""
    rates: dict[Hashable, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, measure in ways.items():
            rate = measure()
            if number:
                rates[name].append(rate)
            print(f"round {number} of {rounds}: {name} {rate:,.1f}", flush=True)
    return rates


def ratio(rates: dict, one: Hashable, other: Hashable) -> float:
    """The median of the ratios within a round, because the machine's speed drifts between rounds."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def compared(rates: dict[str, list[float]], bases: tuple[str, ...]) -> dict[str, dict]:
    """Rates with medians, and the ratios of the `bases` to all others; prints the latter."""
    pairs = [(base, name) for base in bases if base in rates for name in rates if name != base]
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {f"{base} / {name}": ratio(rates, base, name) for base, name in pairs}
    for name, value in (median | ratios).items():
        print(f"{name:<36}{value:>12,.2f}")
    return {"images_per_second": rates, "median": median, "ratio": ratios}


def window_rates(step: Callable, images: int, seconds: float, device, warm_up: int = 2) -> list[float]:
    """Images per second of `step` in each of WINDOWS windows. The host's clock serves a GPU too: both ends of a window wait."""
    import torch

    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    for _ in range(warm_up):
        step()
    rates = []
    for _ in range(WINDOWS):
        wait()
        steps, start_s = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start_s < seconds / WINDOWS:
            step()
            steps += 1
            if steps % 16 == 0:
                wait()  # or the host would run ahead for longer than the window
        wait()
        rates.append(steps * images / (time.perf_counter() - start_s))
    return rates


def window_rate(*arguments, **options) -> float:
    return statistics.median(window_rates(*arguments, **options))


class Usage(NamedTuple):
    """What a process took, its children included; `peak_mb` is that of the largest of them."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def call(module: str, *arguments: object) -> str:
    """Runs `python -m module` to its end and returns its output."""
    return subprocess.run(python(module, *arguments), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def usage(command: list, **options) -> Usage:
    """Runs a command with its output thrown away."""
    start_s = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), **{"cwd": ROOT, "stdout": subprocess.DEVNULL} | options)
    _, status, used = os.wait4(process.pid, 0)
    wall_s, process.returncode = time.perf_counter() - start_s, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))[:300]} ended with {process.returncode}")
    return Usage(wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3)


class Workers:
    """Contestants in processes of their own, which run `serve` and stand still (SIGSTOP) except while they are measured: what one
    would prepare in the meantime costs the others nothing."""

    def __init__(self):
        self.processes: dict[Hashable, subprocess.Popen] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        """Ends their inputs and waits: a DataLoader that is killed leaves the shared memory of its workers behind."""
        for process in self.processes.values():
            self._signal(process, signal.SIGCONT)
            try:
                process.communicate(timeout=CLOSING_S)
            except subprocess.TimeoutExpired:
                self._signal(process, signal.SIGKILL)
                process.communicate()

    def start(self, name: Hashable, command: list[str]) -> None:
        # A process group, but no session of its own: if this process is killed, the kernel then ends the stopped ones too.
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "process_group": 0}
        self.processes[name] = subprocess.Popen(command, cwd=ROOT, **options)

    def ready(self) -> dict[Hashable, dict]:
        """Waits until all are warm; returns what each says of itself, {"missing": why} if it cannot run."""
        told = {}
        for name, process in self.processes.items():
            line = process.stdout.readline()
            told[name] = json.loads(line) if line else {"missing": "it does not run here; its error is above"}
            self._signal(process, signal.SIGSTOP)
        return told

    def measure(self, name: Hashable, request: object) -> dict:
        process = self.processes[name]
        self._signal(process, signal.SIGCONT)
        process.stdin.write(f"{json.dumps(request)}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        self._signal(process, signal.SIGSTOP)
        if not line:
            raise click.ClickException(f"row {name} ended; its error is above")
        return json.loads(line)

    def _signal(self, process: subprocess.Popen, number: signal.Signals) -> None:
        if process.poll() is None:
            os.killpg(process.pid, number)


def serve(about: dict, measure: Callable[[object], dict]) -> None:
    """A worker's side: says what it is, then answers each line of its input with a measurement."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)


@contextlib.contextmanager
def working_folder(folder: Path | None = None) -> Iterator[Path]:
    """`folder`, made if missing, or a temporary one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
