"""Shows how a training run goes: bar, metrics.jsonl, summary and curves.

A line of metrics.jsonl has `step`, `epoch` (a fraction within one), `loss/train` (the mean since the line before), `lr`,
`throughput/samples_per_sec` and `time/data_wait_pct` (of the same steps), `data/damaged` (records replaced so far), and
at the end of an epoch `metrics/val/top1_error`, `top5_error` (percent), `loss` and `records`. Each step appears once.
TensorBoard gets the same under the same names.
"""

import io
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from pipeline.profile import mark, seconds_between
from preprocess.errors import UserError
from preprocess.manifest import Manifest
from preprocess.records import write_atomically

LINE_EVERY_S = 30  # where the output is no terminal
STUCK_STEPS = 500
STUCK_SHARE = 0.01  # of ln(classes)
SUMMARY = {
    "net",
    "dataset",
    "classes",
    "step",
    "epochs",
    "seconds",
    "samples_per_sec",
    "data_wait_pct",
    "errors",
    "run_dir",
}
T = TypeVar("T")


class Metrics:
    """metrics.jsonl, opened to go on after `step`: what an interrupted run wrote beyond it is dropped.

    `complete` says that the line of `step` itself, if it has one, was already written when that step was saved.
    """

    def __init__(self, run_dir: Path, step: int, complete: bool, tensorboard: bool = False):
        self.path = run_dir / "metrics.jsonl"
        self._board = open_board(run_dir / "tensorboard", step + complete) if tensorboard else None
        self.kept = [line for line in read_metrics(run_dir) if line["step"] < step + complete]
        write_atomically(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.kept).encode())
        self._file = open(self.path, "a")

    def write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def open_board(folder: Path, step: int):
    """TensorBoard's writer; what an interrupted run wrote of `step` and beyond is not shown. Raises UserError without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; run: pip install 'imagefeed[tensorboard]'") from None
    return SummaryWriter(folder, purge_step=step)


class StuckLoss:
    """Notices, once, that training does not begin: a loss that stays at that of guessing, ln(classes).

    AlexNet is known for it: whole runs of Caffe's stood at 6.9 (its issues 401, 2085). It may pass by itself after some
    thousand steps. The first `after` steps do not count.
    """

    def __init__(self, classes: int, after: int):
        self.guessing = math.log(classes)
        self.after = after
        self._since: int | None = None
        self._noticed = False

    def notices(self, line: dict[str, float]) -> bool:
        """Whether this line of metrics.jsonl is the one that shows it; to be given all of them, in their order."""
        if abs(line["loss/train"] - self.guessing) > STUCK_SHARE * self.guessing or line["step"] < self.after:
            self._since = None
        elif self._since is None:
            self._since = line["step"]
        elif line["step"] - self._since >= STUCK_STEPS and not self._noticed:
            self._noticed = True
            return True
        return False

    def describe(self, line: dict[str, float]) -> str:
        return (
            f"warning: loss stuck at ln(classes): {line['loss/train']:.3f} for {line['step'] - self._since:,} steps, as by "
            f"guessing ({self.guessing:.3f}); if it does not fall within some thousand steps, begin again with a lower --bias, "
            "as 0.1, or a lower --lr, and another --run-dir"
        )


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, up to the first that is none: a crash may leave one cut, or with any bytes in it."""
    lines = []
    path = run_dir / "metrics.jsonl"
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if not (isinstance(line["step"], int) and all(map(math.isfinite, line.values()))):
                break
        except (ValueError, TypeError, KeyError, OverflowError):
            break
        lines.append(line)
    return lines


class Meter:
    """Measures an interval of steps: images per second, and the share of time in which the device waited for data.

    On a GPU the wait is taken by events on its stream, from the end of one step's work to the moment when the next
    batch is there; the host's clock would also count the time for which the host waits for a busy GPU.
    """

    def __init__(self, device: torch.device, batch_size: int):
        self.device = device
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waits: list[tuple] = []

    def fetch(self, batches: Iterator[T]) -> T:
        before = mark(self.device)
        batch = next(batches)
        self._waits.append((before, mark(self.device)))
        return batch

    def read(self) -> dict[str, float]:
        """Of the steps since `restart`, empty if there were none. On a GPU the caller has waited for the last of them."""
        if not self._waits:
            return {}
        seconds = time.perf_counter() - self._start
        waited = sum(seconds_between(*wait) for wait in self._waits)
        rate = len(self._waits) * self.batch_size / seconds
        return {"throughput/samples_per_sec": rate, "time/data_wait_pct": 100 * waited / seconds}


class Display:
    """A progress bar on a terminal, a line every 30 s elsewhere."""

    def __init__(self, total: float, done: float):
        self.total = total
        self.first = done
        self.start = self.shown = time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.percentage:>3.0f} %"), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Progress(
                *columns, TimeRemainingColumn(compact=True), TextColumn("left"), speed_estimate_period=120
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def show(self, done: float, text: str) -> None:
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif now - self.shown >= LINE_EVERY_S:
            self.shown = now
            left_s = (now - self.start) / max(done - self.first, 1e-9) * (self.total - done)
            left = f", {duration(left_s)} left" if done > self.first else ""
            print(f"{100 * done / self.total:3.0f} %  {text}{left}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line for good."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self.shown = time.monotonic()
            print(text, flush=True)

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()


def describe(line: dict[str, float], epochs: int) -> str:
    """A line of metrics.jsonl in words."""
    parts = [f"epoch {line['epoch']:.2f} of {epochs}", f"loss {line['loss/train']:.3f}"]
    if "metrics/val/top1_error" in line:
        parts.append(f"held-out error top-1 {line['metrics/val/top1_error']:.1f} %")
        parts.append(f"top-5 {line['metrics/val/top5_error']:.1f} %")
    parts.append(f"lr {line['lr']:g}")
    if "time/data_wait_pct" in line:
        parts.append(f"{line['throughput/samples_per_sec']:,.0f} img/s")
        parts.append(f"{line['time/data_wait_pct']:.0f} % waiting for data")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def write_summary(run_dir: Path, net: str, manifest: Manifest, progress: dict, ten: dict[str, float]) -> dict:
    """summary.json and curves.png of a run that is over; returns what is in the first. `ten` are its ten-view errors."""
    lines = read_metrics(run_dir)
    rates = [line["throughput/samples_per_sec"] for line in lines if "throughput/samples_per_sec" in line]
    waits = [line["time/data_wait_pct"] for line in lines if "time/data_wait_pct" in line]
    evaluated = [line for line in lines if "metrics/val/top1_error" in line]
    summary = {
        "net": net,
        "dataset": str(manifest.root),
        "classes": len(manifest.classes),
        "step": progress["step"],
        "epochs": progress["epochs"],
        "seconds": progress["seconds"],
        "samples_per_sec": statistics.median(rates) if rates else None,
        "data_wait_pct": statistics.median(waits) if waits else None,
        "errors": {},
        "run_dir": str(run_dir),
    }
    if evaluated:
        names = ("top1_error", "top5_error", "loss", "records")
        summary["errors"] = {
            "centre crop": {name: evaluated[-1][f"metrics/val/{name}"] for name in names},
            "ten views": ten,
        }
    draw_curves(run_dir / "curves.png", f"{net} on {manifest.root.resolve().name}", lines, len(manifest.classes))
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def read_summary(run_dir: Path) -> dict | None:
    """What `write_summary` wrote, None where there is no such file or it is damaged."""
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.keys() >= SUMMARY else None


def show_summary(summary: dict) -> None:
    """The closing table, and as the last line what it comes to."""
    show_errors(
        f"{summary['net']} on {summary['dataset']} after {summary['epochs']} epochs",
        summary["errors"],
        summary["classes"],
    )
    print(f"run folder {summary['run_dir']}: metrics.jsonl, curves.png, summary.json, checkpoints")
    result = f"{summary['epochs']} epochs in {duration(summary['seconds'])}"
    if summary["samples_per_sec"]:
        result += f", {summary['samples_per_sec']:,.0f} images/s, {summary['data_wait_pct']:.1f} % waiting for data"
    for views, found in summary["errors"].items():
        result += f", {views}: top-1 error {found['top1_error']:.1f} %, top-5 {found['top5_error']:.1f} %"
    print(result)


def show_errors(title: str, errors: dict[str, dict[str, float]], classes: int) -> None:
    """A table of errors by views, beside those of guessing."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name, justify in (("held-out images", "left"), ("top-1 error", "right"), ("top-5 error", "right")):
        table.add_column(name, justify=justify)
    for views, found in errors.items():
        table.add_row(f"{views}, {found['records']:,} images", *(f"{found[f'top{k}_error']:.2f} %" for k in (1, 5)))
    table.add_row("guessing", *(f"{100 - 100 * min(k, classes) / classes:.2f} %" for k in (1, 5)))
    print(title)
    Console().print(table)


def draw_curves(path: Path, title: str, lines: list[dict[str, float]], classes: int) -> None:
    """Loss and held-out error over epochs, as a PNG; a dashed line where the learning rate fell by more than half."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    loss, error = figure.subplots(1, 2)
    held_out = [line for line in lines if "metrics/val/loss" in line]
    epochs = [line["epoch"] for line in held_out]
    loss.plot([line["epoch"] for line in lines], [line["loss/train"] for line in lines], label="training, with dropout")
    if held_out:
        marker = "o" if len(held_out) < 50 else None
        loss.plot(
            epochs, [line["metrics/val/loss"] for line in held_out], marker=marker, ms=3, label="held out, centre crop"
        )
        for k in (1, 5):
            values = [line[f"metrics/val/top{k}_error"] for line in held_out]
            (drawn,) = error.plot(epochs, values, marker=marker, ms=3, label=f"top-{k}, {values[-1]:.1f} % at the end")
            guess = 100 - 100 * min(k, classes) / classes
            error.axhline(guess, color=drawn.get_color(), ls=":", lw=1, label=f"top-{k} by guessing, {guess:.1f} %")
    else:
        error.text(0.5, 0.5, "this dataset has no held-out split", ha="center", transform=error.transAxes)
    for axes, name, top in (
        (loss, "loss (cross-entropy, nats)", None),
        (error, "held-out error (%), centre crop", 100),
    ):
        for before, after in itertools.pairwise(lines):
            if after["lr"] < before["lr"] / 2:
                axes.axvline(before["epoch"], color="grey", ls="--", lw=0.8)
        axes.set(xlabel="epoch", ylabel=name, ylim=(0, top), title=name.split(" (")[0])
        axes.set_xlim(0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
