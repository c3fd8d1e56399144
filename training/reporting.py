"""What a training run reports: metrics.jsonl, and warnings.

A line of metrics.jsonl has `step`, `epoch` (with its fraction), `loss/train` (the mean since the line before), `lr`,
`throughput/samples_per_sec`, `throughput/device/mfu` (a fraction, model/flops.py) and `time/data_wait_pct` (of the same steps),
`time/elapsed_s` (seconds of training since the start, over all resumes), `timestamp` (Unix seconds), `data/corrupt` (different
records found corrupt since the start, on all ranks), of a dataset in a store `store/requests`, `bytes`, `retries`,
`ms_per_request` and `in_flight` (of the first rank, since the line before), and at the end of an epoch `metrics/val/top1` and
`top5` (accuracy in percent), `top1_error` and `top5_error`, `loss` and `records`; top-5 among more than five classes. Each step
appears once.
TensorBoard gets the same, and `--on-metrics` each line as a dictionary.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import check_append, write_atomically
from imagefeed.pipeline.profiler.accounting import mark, seconds_between

STUCK_STEPS = 500
STUCK_FRACTION = 0.01  # of ln(classes)
T = TypeVar("T")


class Metrics:
    """metrics.jsonl of a run that continues after `step`: drops what an interrupted run wrote beyond it.

    `complete` means that the line of `step` itself, if it has one, was already written when that step was saved.
    """

    def __init__(self, run_dir: Path, step: int, complete: bool, tensorboard: bool = False):
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run_dir / "tensorboard", purge_step=step + complete)
        check_append(run_dir)
        self.kept = [line for line in read_metrics(run_dir) if line["step"] < step + complete]
        path = run_dir / "metrics.jsonl"
        write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.kept).encode())
        self._file = open(path, "a")

    def write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in line.items():
                if name not in ("step", "timestamp"):
                    self._board.add_scalar(name, value, line["step"], walltime=line.get("timestamp"))

    def sync(self) -> None:
        """Puts all lines on disk, before a checkpoint says that they are written."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def check_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: TensorBoard is not installed; run: pip install '.[tensorboard]'")


def load_hook(name: str) -> Callable[[dict[str, float]], object]:
    """The function of that name, MODULE:FUNCTION, of a module in the current folder or where Python finds modules."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # where a command does not look, unlike `python -m`
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module raises
        raise UserError(f"--on-metrics {name}: cannot be imported ({error}); correct the name or the module") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UserError(f"--on-metrics {name}: not a function; give one that takes a line of metrics.jsonl")
    return found


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl up to the first malformed line: a crash may cut one, or leave any bytes in it."""
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


class StuckLoss:
    """Notices, once, that training does not start: the loss stays at that of guessing, ln(classes).

    AlexNet is known for it: whole runs of Caffe's stayed at 6.9 (its issues 401, 2085). It may end by itself after some thousand
    steps. The first `after` steps do not count.
    """

    def __init__(self, classes: int, after: int):
        self.guessing = math.log(classes)
        self.after = after
        self._since: int | None = None
        self._noticed = False

    def check(self, line: dict[str, float]) -> str:
        """Takes each line of metrics.jsonl, in order; returns a warning for the one that shows it, else ""."""
        loss, step = line["loss/train"], line["step"]
        if abs(loss - self.guessing) > STUCK_FRACTION * self.guessing or step < self.after:
            self._since = None
        elif self._since is None:
            self._since = step
        elif step - self._since >= STUCK_STEPS and not self._noticed:
            self._noticed = True
            return (
                f"warning: loss stuck at ln(classes): {loss:.3f} for {step - self._since:,} steps, as by guessing "
                f"({self.guessing:.3f}); if it does not fall within some thousand steps, start over with a lower --bias, such as "
                "0.1, or a lower --lr, and another --run-dir"
            )
        return ""


class Reading:
    """A number of a device, copied to the host when its current stream comes to this place; only `value` waits for that."""

    def __init__(self, number: torch.Tensor):
        self._host = torch.empty(number.shape, dtype=number.dtype, pin_memory=number.is_cuda)
        self._host.copy_(number, non_blocking=True)
        self._copied = torch.cuda.current_stream(number.device).record_event() if number.is_cuda else None

    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.item()


class Meter:
    """Measures an interval of steps: images per second, the fraction of time that the device waited for data, and MFU.

    `batch_size` is the global batch, `ideal_rate` the images per second at an MFU of 1 (model/flops.py). On a GPU, events on its
    stream measure the wait, from the end of one step's work until the next batch is there; the host's clock would also count the
    time for which the host waits for a busy GPU.
    """

    def __init__(self, device: torch.device, batch_size: int, ideal_rate: float):
        self.device, self.batch_size, self.ideal_rate = device, batch_size, ideal_rate
        self.restart()

    def restart(self) -> None:
        self._start = mark(self.device)
        self._waits: list[tuple] = []

    def fetch(self, batches: Iterator[T]) -> T:
        before = mark(self.device)
        batch = next(batches)
        self._waits.append((before, mark(self.device)))
        return batch

    def interval(self) -> Callable[[], dict[str, float]]:
        """Reads the values from `restart` until now, none if there were no steps; a GPU must have come to this moment."""
        start, end, waits = self._start, mark(self.device), tuple(self._waits)

        def read() -> dict[str, float]:
            if not waits:
                return {}
            seconds = seconds_between(start, end)
            waited = sum(seconds_between(*wait) for wait in waits)
            rate = len(waits) * self.batch_size / seconds
            return {
                "throughput/samples_per_sec": rate,
                "throughput/device/mfu": rate / self.ideal_rate,
                "time/data_wait_pct": 100 * waited / seconds,
            }

        return read


def describe(line: dict[str, float], epochs: int) -> str:
    """Puts a line of metrics.jsonl into words."""
    parts = [f"epoch {line['epoch']:.2f} of {epochs}", f"loss {line['loss/train']:.3f}"]
    if "metrics/val/top1_error" in line:
        parts.append(f"validation error top-1 {line['metrics/val/top1_error']:.1f} %")
    if "metrics/val/top5_error" in line:
        parts.append(f"top-5 {line['metrics/val/top5_error']:.1f} %")
    parts.append(f"lr {line['lr']:g}")
    if "time/data_wait_pct" in line:
        parts.append(f"{line['throughput/samples_per_sec']:,.0f} images/s, {line['time/data_wait_pct']:.0f} % waiting for data")
    return ", ".join(parts)
