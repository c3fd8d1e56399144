"""Measurements, a script for each question; run as python -m benchmarks.NAME, because preprocess.py here is not the package."""

import json
import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> str:
    """The processor and the cores that may be used."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def save(name: str, result: dict, *packages: str) -> None:
    """Writes benchmarks/results/NAME.json, with date, machine, and the versions of Python and `packages`."""
    versions = {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
    head = {"date": date.today().isoformat(), "machine": machine(), "versions": versions}
    (RESULTS / f"{name}.json").write_text(json.dumps(head | result, indent=1) + "\n")
