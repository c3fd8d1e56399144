"""Measurements, a script for each question; run as python -m benchmarks.NAME, because preprocess.py here is not the package.

What they find goes to benchmarks/results/MACHINE-DATE.json, one file for a machine and a day: {NAME: {"date", "machine",
"versions", and the script's own}}. BENCHMARK_RESULTS names another folder.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

# The standard library alone: the peers' Python imports this too.
ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", ROOT / "benchmarks" / "results"))


def machine() -> str:
    """The processor, the cores that may be used, and the GPUs where there are any.

    Family and model tell apart what bears one name: AMD EPYC is 23, 1 for Zen 1 and 26, 2 for Zen 5.
    """
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    counted = [f"{gpus.count(gpu)} {gpu}" for gpu in sorted(set(gpus))]
    return ", ".join([model, f"{len(os.sched_getaffinity(0))} cores", *counted])


def slug(text: str) -> str:
    """As part of a file's name: small letters, digits, and - for all else."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(name: str, result: dict, *packages: str, folder: Path = RESULTS) -> Path:
    """Puts `result` under `name` into today's file of this machine, with the versions of Python and `packages`."""
    versions = {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
    head = {"date": date.today().isoformat(), "machine": machine(), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(head['machine'])}-{head['date']}.json"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two scripts may end at once
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = head | result
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(path)
    finally:
        os.close(lock)
    return path
