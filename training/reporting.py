"""Shows how a training run goes: a bar, and metrics.jsonl.

A line of metrics.jsonl has `step`, `epoch` (a fraction within one), `loss/train` (the mean since the line before), `lr`,
`throughput/samples_per_sec`, `throughput/device/mfu` (a fraction, model/flops.py) and `time/data_wait_pct` (of the same
steps), `data/corrupt` (different records that were found corrupt since the start, on all ranks), and at the end of an epoch
`metrics/val/top1` and `top5` (accuracy in percent), `top1_error` and `top5_error`, `loss` and `records`. Each step appears
once. TensorBoard gets the same under the same names.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import write_atomically
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.accounting import mark, seconds_between
from imagefeed.training.parallel import Ranks

LINE_EVERY_S = 30  # where the output is no terminal
STUCK_STEPS = 500
STUCK_SHARE = 0.01  # of ln(classes)
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
    """Measures an interval of steps: images per second, the share of time in which the device waited for data, and MFU.

    `batch_size` is that of all ranks, `ideal_rate` the images a second at which MFU would be 1 (model/flops.py).

    On a GPU the wait is taken by events on its stream, from the end of one step's work to the moment when the next
    batch is there; the host's clock would also count the time for which the host waits for a busy GPU.
    """

    def __init__(self, device: torch.device, batch_size: int, ideal_rate: float):
        self.device = device
        self.batch_size = batch_size
        self.ideal_rate = ideal_rate
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
        return {
            "throughput/samples_per_sec": rate,
            "throughput/device/mfu": rate / self.ideal_rate,
            "time/data_wait_pct": 100 * waited / seconds,
        }


class CorruptRecords:
    """The different records that were found corrupt, by any loader of this run on any rank: in each epoch a rank has others,
    so that a sum of what each has found would count them again."""

    def __init__(self):
        self._ids: set[int] = set()
        self._seen = 0  # loader.corrupt
        self._sum = self._count = 0

    def note(self, loader: ImageLoader, batch: Batch) -> None:
        """To be given each batch of `loader`, as soon as it is there."""
        if loader.corrupt != self._seen:
            self._seen = loader.corrupt
            asked, valid = loader.plan.ids(loader.position - 1)
            self._ids.update(asked[(asked != batch.ids.numpy()) & valid].tolist())

    def count(self, ranks: Ranks) -> int:
        """Over all ranks, each of which has to ask."""
        total = ranks.sum(torch.tensor(len(self._ids))).item()
        if total != self._sum:
            self._sum, self._count = total, len(set().union(*ranks.gathered(sorted(self._ids))))
        return self._count


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
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), TextColumn("left"), speed_estimate_period=120)
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
        parts.append(f"validation error top-1 {line['metrics/val/top1_error']:.1f} %")
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
