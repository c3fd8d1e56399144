"""Where the steps of a run spend their time, noted while it runs."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import torch

from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.findings import Span, Step

T = TypeVar("T")
KEPT_STEPS, KEPT_SAMPLES, KEPT_EVENTS = 20_000, 2_000, 256  # of a long run the last ones: 10 MB


class Account:
    """Notes of each step when it waits for its batch, and when its phases begin.

        account = Account(device, loader)
        batch = account.fetch(batches)  # in place of next(batches)
        train_step(..., on_phase=account.phase)

    `account.steps()` are those that are over. On a CPU the host's clock tells (5 us a step); on a GPU events in the stream that
    trains, so that what is noted is the stream's time, and nothing waits: from the end of the last step's work to the moment
    the batch is there it stood still. A loop that names no phases has one, "step".
    """

    def __init__(self, device: torch.device, loader: object = None, sampler: "Sampler | None" = None):
        self.device, self.loader, self.sampler = device, loader, sampler
        self.count = 0
        self._now = time.perf_counter if device.type != "cuda" else functools.partial(mark, device)
        self._begin_s = time.perf_counter()
        self._marks: list[tuple] = []  # of the step that goes on: (what begins, moment)
        # Of those that are over, marks and spans; they are put into words when they are asked for, and those of a GPU, whose
        # events are dear, from time to time.
        self._noted: deque[tuple[list, tuple]] = deque(maxlen=KEPT_STEPS)
        self._steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._end_s = 0.0

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; with it a step begins, and the one before is over."""
        self.stop()
        if self.sampler:  # what it takes is no step's
            self.sampler.look()
        start = self._now()
        if self.count == 0 and self.device.type != "cuda":
            self._begin_s = start
        batch = next(batches)
        self._marks = [("wait", start), ("fetched", self._now())]
        self._spans = getattr(self.loader, "spans", ())
        self.count += 1
        return batch

    def phase(self, name: str) -> None:
        """ "forward", "backward", "optimizer" or "end" begins (model/step.py)."""
        self._marks.append((name, self._now()))

    def stop(self) -> None:
        """The step that goes on is over."""
        if self._marks:
            self._marks.append(("over", self._now()))
            self._noted.append((self._marks, self._spans))
            self._marks = []
            if self.device.type == "cuda" and len(self._noted) > KEPT_EVENTS:
                self._put_into_words()

    def steps(self) -> tuple[Step, ...]:
        """Those that are over; on a GPU it waits for them."""
        synchronize(self.device)
        self._put_into_words()
        return tuple(self._steps)

    def _put_into_words(self) -> None:
        while self._noted and happened(self._noted[0][0][-1][1]):
            marks, spans = self._noted.popleft()
            named = any(name == "forward" for name, _ in marks)
            times: dict[str, float] = {}
            for (name, start), (_, end) in itertools.pairwise(marks):
                name = {"fetched": "hand-over" if named else "step", "end": "rest"}.get(name, name)
                times[name] = times.get(name, 0.0) + seconds_between(start, end)
            noted = tuple(Span(name, start - self._begin_s, seconds) for name, start, seconds in spans)
            self._steps.append(Step(self._end_s, times.pop("wait"), times, noted))
            self._end_s += self._steps[-1].seconds


class Sampler:
    """Looks, every so often, at the processors and at the interpreter's lock: 2.5 ms and 0.1 ms."""

    def __init__(self, counters_every_s: float = 0.5, lock_every_s: float = 0.03):
        self.counters_every_s, self.lock_every_s = counters_every_s, lock_every_s
        self.series: dict[str, deque[float]] = {
            name: deque(maxlen=KEPT_SAMPLES) for name in ("others' CPU", "queued", "lock latency s")
        }
        self.began = self._before = machine.counters()
        self._lock_s = self.began.when_s

    def look(self) -> None:
        now_s = time.perf_counter()
        if now_s - self._lock_s > self.lock_every_s:
            self._lock_s = now_s
            self.series["lock latency s"].append(machine.lock_latency())
        if now_s - self._before.when_s > self.counters_every_s:
            after = machine.counters()
            self.series["others' CPU"].append(machine.others_share(self._before, after))
            self.series["queued"].append(machine.queued_share(self._before, after))
            self._before = after


def mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment: of the host's clock on a CPU, on a GPU of what has been put on its stream so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def happened(moment: float | torch.cuda.Event) -> bool:
    return isinstance(moment, float) or moment.query()


def seconds_between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Between two marks; on a GPU the caller has waited for the second."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
