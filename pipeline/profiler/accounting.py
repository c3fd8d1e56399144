"""Notes where the steps of a run spend their time, while it runs."""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.findings import Span, Step

if TYPE_CHECKING:
    from imagefeed.dataset.remote import Traffic

T = TypeVar("T")
KEPT_STEPS, KEPT_SAMPLES, KEPT_EVENTS = 20_000, 2_000, 256  # the last ones of a long run: 10 MB


class Account:
    """Notes when each step waits for its batch, and when its phases begin.

        account = Account(device, loader)
        batch = account.fetch(batches)  # instead of next(batches)
        train_step(..., on_phase=account.phase)

    On a CPU the host's clock tells the time (5 us a step). On a GPU it is events in the stream that trains, so nothing waits. A
    loop that names no phases has one, "step".
    """

    def __init__(self, device: torch.device, loader: object = None, sampler: "Sampler | None" = None):
        self.device, self.loader, self.sampler = device, loader, sampler
        self.count = 0
        self.traffic = traffic_of(loader)  # before the first step
        self._begin_s = time.perf_counter()
        self._marks: list[tuple] = []  # (what begins, moment) of the current step
        # Marks and spans of finished steps. They become Steps on demand, and on a GPU, where events are costly, now and then.
        self._noted: deque[tuple[list, tuple]] = deque(maxlen=KEPT_STEPS)
        self._steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._end_s = 0.0

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; it begins a step and ends the one before."""
        self.stop()
        if self.sampler:  # its time belongs to no step
            self.sampler.look()
        start = mark(self.device)
        if self.count == 0 and self.device.type != "cuda":
            self._begin_s = start
        batch = next(batches)
        self._marks = [("wait", start), ("fetched", mark(self.device))]
        self._spans = getattr(self.loader, "spans", ())
        self.count += 1
        return batch

    def phase(self, name: str) -> None:
        """ "forward", "backward", "optimizer" or "end" begins (model/step.py)."""
        self._marks.append((name, mark(self.device)))

    def stop(self) -> None:
        """Ends the current step."""
        if self._marks:
            self._noted.append(([*self._marks, ("over", mark(self.device))], self._spans))
            self._marks = []
            if self.device.type == "cuda" and len(self._noted) > KEPT_EVENTS:
                self._convert()

    def steps(self) -> tuple[Step, ...]:
        """The finished steps; on a GPU this waits for them."""
        synchronize(self.device)
        self._convert()
        return tuple(self._steps)

    def _convert(self) -> None:
        while self._noted and (self.device.type != "cuda" or self._noted[0][0][-1][1].query()):
            marks, spans = self._noted.popleft()
            first = "copy" if any(name == "forward" for name, _ in marks) else "step"
            times: dict[str, float] = {}
            for (name, start), (_, end) in itertools.pairwise(marks):
                name = {"fetched": first, "end": "rest"}.get(name, name)
                times[name] = times.get(name, 0.0) + seconds_between(start, end)
            noted = tuple(Span(name, start - self._begin_s, seconds) for name, start, seconds in spans)
            self._steps.append(Step(self._end_s, times.pop("wait"), times, noted))
            self._end_s += self._steps[-1].seconds


def traffic_of(loader: object) -> "Traffic | None":
    """What an ImageLoader's stores have been asked for."""
    return getattr(loader, "traffic", None)


class Sampler:
    """Looks at the processors and at the interpreter's lock every so often; a look takes 2.5 ms and 0.1 ms."""

    def __init__(self, counters_every_s: float = 0.5, lock_every_s: float = 0.03):
        self.counters_every_s, self.lock_every_s = counters_every_s, lock_every_s
        self.began = self._before = machine.counters()
        self._lock_s = self.began.when_s
        names = ("others_share", "queued_share", "lock_latency_s")  # of Evidence
        self._samples = {name: deque[float](maxlen=KEPT_SAMPLES) for name in names}

    def look(self) -> None:
        now_s = time.perf_counter()
        if now_s - self._lock_s > self.lock_every_s:
            self._lock_s = now_s
            self._samples["lock_latency_s"].append(machine.lock_latency())
        if now_s - self._before.when_s > self.counters_every_s:
            after = machine.counters()
            self._samples["others_share"].append(machine.others_share(self._before, after))
            self._samples["queued_share"].append(machine.queued_share(self._before, after))
            self._before = after

    @property
    def samples(self) -> dict[str, tuple[float, ...]]:
        return {name: tuple(values) for name, values in self._samples.items()}


def mark(device: torch.device) -> Any:
    """This moment: by the host's clock on a CPU, an event in the current stream on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Between two marks; on a GPU the caller has waited for the second."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
