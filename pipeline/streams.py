"""Queues of work for a device, beside the host: a side stream of CUDA, or on a CPU a thread that keeps the same rules.

Work in a stream runs in order. What runs in different streams is ordered only by events: `queue` begins after some, and `follow`
holds up what the current stream gets next. On a CPU the current stream is the calling thread itself.

Memory of a GPU belongs to the stream that was current when it was allocated. Once nothing refers to it, it may be given to that
stream's next work at once, and to no other stream.
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
        self.device, self.side = device, torch.cuda.Stream(device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
        """Memory of the device, of the current stream."""
        return torch.empty(shape, dtype=dtype, device=self.device, memory_format=layout)

    def hand(self, tensor: torch.Tensor) -> None:
        """The current stream uses this memory from now on. It nearly always belongs to that stream already: this costs nothing
        then; else it is reused, once freed, only after what the current stream has had by then."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 (size,) in host memory that the GPU copies by itself."""
        with torch.cuda.device(self.device):  # a new thread would open the first GPU, whichever this process uses
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def queue(self, work: Callable[[], object], after: Iterable[Event] = ()) -> Event:
        """Queues work on the side stream; returns its end."""
        for event in after:
            self.side.wait_event(event)
        with torch.cuda.stream(self.side):
            work()
        return self.side.record_event()

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
        self.side.synchronize()


class Done:
    """The event of work that the calling thread has finished."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Ended:
    """The event of work in the side thread."""

    def __init__(self, work: Future):
        self._work = work

    def query(self) -> bool:
        return self._work.done()

    def synchronize(self) -> None:
        self._work.result()


class HostStreams:
    """The same on a CPU: the side stream is a thread. `lag_s` holds up each piece of its work, as a slow bus does."""

    device, side = torch.device("cpu"), None

    def __init__(self, lag_s: float = 0.0):
        self.lag_s = lag_s
        self._thread = ThreadPoolExecutor(1, "side-stream")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=layout)

    def hand(self, tensor: torch.Tensor) -> None:
        """Nothing to do: what runs in a thread refers to its memory."""

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def queue(self, work: Callable[[], object], after: Iterable[Event] = ()) -> Event:
        before = tuple(after)

        def run() -> None:
            for event in before:
                event.synchronize()
            time.sleep(self.lag_s)
            work()

        return Ended(self._thread.submit(run))

    def wait(self, event: Event) -> None:
        event.synchronize()

    follow = wait

    def mark(self) -> Event:
        return Done()

    def close(self) -> None:
        self._thread.shutdown()


Streams = CudaStreams | HostStreams


def open_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
