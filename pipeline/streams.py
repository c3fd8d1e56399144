"""Queues of work for a device, beside the host: a side stream of CUDA, or on a CPU a thread that keeps the same rules.

Work in a stream runs in order. What runs in different streams is ordered only by events: `queue` begins after some, and `follow`
holds up what the current stream gets next. On a CPU the current stream is the calling thread itself.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Event(Protocol):
    """A moment in a stream."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Lets the host wait for it; raises what the work before it raised."""


class CudaStreams:
    """A side stream of a GPU, beside the current stream of whoever calls."""

    def __init__(self, device: torch.device):
        self.device, self._side = device, torch.cuda.Stream(device)

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 (size,) in host memory that the GPU copies by itself."""
        with torch.cuda.device(self.device):  # a new thread would open the first GPU, whichever this process uses
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def queue(self, work: Callable[[], object], after: Iterable[Event] = ()) -> Event:
        """Queues work on the side stream; returns its end."""
        for event in after:
            self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            work()
        return self._side.record_event()

    def wait(self, event: Event) -> None:
        """Lets the calling thread wait for the event; any thread may."""
        with torch.cuda.device(self.device):
            event.synchronize()

    def follow(self, event: Event) -> None:
        """What the current stream gets from now on runs after the event; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> Event:
        """The end of what the current stream has got so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Waits for the side stream."""
        self._side.synchronize()


class _Done:
    """The event of work that the calling thread has finished."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Ended:
    """The event of work in the side thread."""

    def __init__(self, work: Future):
        self._work = work

    def query(self) -> bool:
        return self._work.done()

    def synchronize(self) -> None:
        self._work.result()


class HostStreams:
    """The same on a CPU: the side stream is a thread. `lag_s` holds up each piece of its work, as a slow bus does."""

    device = torch.device("cpu")

    def __init__(self, lag_s: float = 0.0):
        self.lag_s = lag_s
        self._side = ThreadPoolExecutor(1, "side-stream")

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def queue(self, work: Callable[[], object], after: Iterable[Event] = ()) -> Event:
        before = tuple(after)

        def run() -> None:
            for event in before:
                event.synchronize()
            time.sleep(self.lag_s)
            work()

        return _Ended(self._side.submit(run))

    def wait(self, event: Event) -> None:
        event.synchronize()

    follow = wait

    def mark(self) -> Event:
        return _Done()

    def close(self) -> None:
        self._side.shutdown()


Streams = CudaStreams | HostStreams


def open_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
