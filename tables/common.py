"""Runs a page's measurements, each in an environment of its own with pinned versions, and compares them with the recorded ones.

A page is a module here, such as tables/images.py for docs/images.md. It has one Page, whose tables have rows (or columns), each
a function that returns its cells. This module and the pages run in those environments too, so both import only the standard
library at the top, and other packages where they are used.
"""

import contextlib
import datetime
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("IMAGEFEED_TABLES") or "~/.cache/imagefeed-tables").expanduser()
INPUTS = Path(os.environ.get("IMAGEFEED_TABLE_INPUTS", "."))  # in a measurement: what the page's `inputs` made
LIMIT_S = 600
IMAGEFEED = "imagefeed"  # as a requirement: the packages of the environment that runs this one, and imagefeed
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?|-?\.\d+(?:e-?\d+)?")
# Appended, because the checkout has folders with names as common as `model`, which must not hide a package.
LAUNCH = f"import runpy, sys; sys.path.append({str(ROOT)!r}); from tables import common; common.measure(*sys.argv[1:])"
QUIET = {
    **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true"},
    **{"PYTHONNOUSERSITE": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"},
    **{"TF_CPP_MIN_LOG_LEVEL": "3", "NO_ALBUMENTATIONS_UPDATE": "1"},
}


@dataclass
class Measurement:
    """A row or column of a table: `run` returns its cells, with `packages` installed."""

    label: str
    packages: list[str]
    run: Callable[[], list]
    limit_s: int = LIMIT_S


@dataclass
class Table:
    """Rows of cells under `heads`; with `rows`, each measurement is a column under its label, and `heads` is the corner alone.

    `tolerance` is the relative difference of a number that does not count as a change, for what no seed fixes.
    """

    name: str
    heads: list[str]
    rows: list[str] | None = None
    tolerance: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)

    def add(self, label: str, packages: list[str], limit_s: int = LIMIT_S):
        """Decorates a function that returns this row's cells, in the order of `heads` after the first, or of `rows`."""

        def register(run):
            self.measurements.append(Measurement(label, packages, run, limit_s))
            return run

        return register

    def render(self, cells: dict[str, list[str]]) -> str:
        """The Markdown table of the cells by label."""
        if self.rows is None:
            lines = [self.heads, *([label, *cells[label]] for label in cells)]
        else:
            lines = [[self.heads[0], *cells], *zip(self.rows, *cells.values(), strict=True)]
        shown = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([shown[0], "|" + "---|" * len(lines[0]), *shown[1:]])


@dataclass
class Page:
    """The tables of docs/`name`.md, with - for _ in the name. `inputs` writes the files that the measurements share into the
    folder INPUTS, with `packages` installed, and `plot` draws what they left there."""

    name: str
    packages: list[str] = field(default_factory=list)
    inputs: Callable[[], None] | None = None
    plot: Callable[[], None] | None = None
    tables: list[Table] = field(default_factory=list)

    def table(self, *arguments, **options) -> Table:
        self.tables.append(Table(*arguments, **options))
        return self.tables[-1]

    @property
    def document(self) -> Path:
        return ROOT / "docs" / f"{self.name.replace('_', '-')}.md"

    @property
    def results(self) -> Path:
        return ROOT / "tables" / "results" / f"{self.name}.json"

    def recorded(self) -> dict[str, dict[str, dict]]:
        """By table and label, what was recorded: cells, packages and date."""
        return json.loads(self.results.read_text()) if self.results.exists() else {}


def environment(packages: list[str]) -> Path:
    """The Python of an environment with these packages, made if it is not there. "imagefeed" stands for the packages of the
    environment that runs this, after its own ones. A line that begins with "--" holds options of pip too, and "--source PACKAGE"
    only unpacks a source distribution that can no longer be built."""
    lines = [line for line in packages if line != IMAGEFEED]
    wanted = "\n".join([sys.version, *packages])
    folder = CACHE / "environments" / hashlib.sha256(wanted.encode()).hexdigest()[:12]
    python, made = folder / "bin" / "python", folder / "made-of.txt"
    if not made.exists():
        venv.create(folder, clear=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("")
        if IMAGEFEED in packages:
            site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
            site.joinpath("imagefeed.pth").write_text(sysconfig.get_path("purelib") + "\n")
            # Only this spelling stands for a local build, without CUDA, too.
            constraints.write_text(f"torch==={metadata.version('torch')}\n")
        plain = [line for line in lines if not line.startswith("--")]
        for line in ([" ".join(plain)] if plain else []) + [line for line in lines if line.startswith("--")]:
            if line.startswith("--source "):
                unpack(python, line.split()[1])
                continue
            pip = [sys.executable, *"-m pip --python".split(), python, *"install -qq --no-compile -c".split(), constraints]
            subprocess.run([*pip, *line.split()], check=True, stdout=subprocess.DEVNULL)
        made.write_text(wanted)
    return python


def unpack(python: Path, package: str) -> None:
    """Puts the Python files of a source distribution where that Python imports from, without running its build."""
    site = Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))
    with tempfile.TemporaryDirectory() as folder:
        options = "--no-deps --no-build-isolation --no-binary :all: -d".split()
        pip = [sys.executable, *"-m pip --python".split(), python, "download", "-qq", *options, folder, package]
        subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).iterdir()
        shutil.unpack_archive(archive, folder, filter="data")
        shutil.copytree(
            next(Path(folder).glob("*/setup.py")).parent / package.partition("==")[0], site / package.partition("==")[0]
        )


def call(page: str, what: str, packages: list[str], inputs: Path, limit_s: int) -> list[str]:
    """The cells of the measurement `what` of the page, run with these packages; RuntimeError if it fails."""
    python = environment(packages)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        variables = (
            os.environ
            | QUIET
            | {"IMAGEFEED_TABLE_INPUTS": str(inputs), "HOME": folder, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        )
        command = [python, "-c", LAUNCH, page, what, str(answer)]
        with (
            open(Path(folder) / "log.txt", "w+") as log,
            subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True) as process,
        ):
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"did not end within {limit_s} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            if not answer.exists():
                log.seek(0)
                raise RuntimeError(log.read()[-3000:])
            cells = json.loads(answer.read_text())
            if not cells and what not in ("inputs", "plot"):  # it has said what is missing here
                log.seek(0)
                print(f"{page}: {what}: as recorded. {log.read().strip()}", file=sys.stderr)
        return cells


def measure(page: str, what: str, answer: str) -> None:
    """Runs one measurement, in its environment, and writes its cells to the file `answer`."""
    module = importlib.import_module(f"tables.{page}")
    if what in ("inputs", "plot"):
        getattr(module.page, what)()
        cells = []
    else:
        table, _, label = what.partition("/")
        run = {each.name: {job.label: job.run for job in each.measurements} for each in module.page.tables}[table][label]
        cells = [str(cell) for cell in run()]
    Path(answer).write_text(json.dumps(cells))


def same(old: str, new: str, tolerance: float) -> bool:
    """Whether both cells say the same, their numbers within the relative tolerance."""
    if old == new or not tolerance:
        return old == new
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (old, new)]
    close = len(numbers[0]) == len(numbers[1]) and all(abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in zip(*numbers))
    return close and NUMBER.sub("", old) == NUMBER.sub("", new)


def run_page(name: str, save: bool = False, only: str = "") -> tuple[int, int]:
    """Measures the page's tables and prints them, a changed cell as "was OLD, now NEW"; returns how many cells have changed, and
    how many rows or columns could not be measured.

    `only` picks the measurements whose label it is part of; the others are taken as recorded. `save` records what came, and
    writes the tables into the page, each where a line `<!-- table: NAME -->` stands.
    """
    page: Page = importlib.import_module(f"tables.{name}").page
    inputs = CACHE / "inputs" / name
    if not (only and (inputs / "whole").exists()):
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        if page.inputs:
            call(name, "inputs", page.packages, inputs, LIMIT_S)
        (inputs / "whole").touch()
    recorded, results, changes, failures = page.recorded(), {}, 0, 0
    for table in page.tables:
        old, shown, results[table.name] = recorded.get(table.name, {}), {}, {}
        for job in table.measurements:
            before, started = old.get(job.label), time.monotonic()
            if before and table.rows and len(before["cells"]) != len(table.rows):
                before = None  # it had other rows
            cells = before["cells"] if before else []
            if only in job.label:
                try:
                    # What needs something that is not here returns no cells.
                    cells = call(name, f"{table.name}/{job.label}", job.packages, inputs, job.limit_s) or cells
                    if cells and len(cells) != len(table.rows or table.heads[1:]):
                        raise RuntimeError(f"it has {len(cells)} cells")
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{name}: {job.label} failed: {error}", file=sys.stderr)
                    failures += 1
                print(f"{name}: {job.label}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
            if not cells:
                continue
            was = before["cells"] if before and len(before["cells"]) == len(cells) else cells
            differs = [not same(a, b, table.tolerance) for a, b in zip(was, cells)]
            changes += sum(differs)
            shown[job.label] = [f"was {a}, now {b}" if changed else b for a, b, changed in zip(was, cells, differs)]
            kept = before and before["cells"] == cells and before["packages"] == job.packages
            today = datetime.date.today().isoformat()
            results[table.name][job.label] = before if kept else {"cells": cells, "packages": job.packages, "date": today}
        print(f"\n{page.document.relative_to(ROOT)}, {table.name}\n\n{table.render(shown)}\n", flush=True)
    if save:
        page.results.parent.mkdir(exist_ok=True)
        page.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_tables(page, results)
        if page.plot:
            call(name, "plot", page.packages, inputs, LIMIT_S)
    return changes, failures


def write_tables(page: Page, results: dict) -> None:
    """Puts the recorded tables into the page."""
    if not page.document.exists():
        return
    text = page.document.read_text()
    for table in page.tables:
        shown = table.render({label: row["cells"] for label, row in results[table.name].items()})
        pattern = re.compile(rf"(<!-- table: {table.name} -->\n)(?:\|.*\n)*")
        text = pattern.sub(lambda found, shown=shown: f"{found[1]}{shown}\n", text)
    page.document.write_text(text)
