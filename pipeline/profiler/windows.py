"""Measures loaders in turns, each in many short windows, alone or with a training step."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils import _pytree

from imagefeed.dataset.reader import CorruptRecord
from imagefeed.pipeline.cache import RGB, available_bytes
from imagefeed.pipeline.handover import MAX_ARRAYS
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import synchronize
from imagefeed.pipeline.tuner.search import Setting

MIN_STEPS = 3
WARM_UP_TIMES = 2  # a window's time, at most, to use up the batches that were made before anybody took them
IDLE_WAIT = 10  # windows, at most, until all batches ahead are made
IDLE, LOOK_S = 0.1, 0.01  # a process is idle if it uses less than this share of a processor for that long
STRETCH_BYTES = 1 << 30  # of records that are measured over and over if the dataset fits in memory


class Held(NamedTuple):
    loader: ImageLoader
    batches: Iterator[Batch]
    bytes: int


class Bench:
    """Measures loaders that stay open between their turns, as opening and closing takes longer than a window. If all would take
    more than `room_bytes` together, the least recently used are closed.

    All take the same `stretch` steps from `first` on over and over; with `apart` each goes its own way through an epoch, so that
    none finds in memory what another has read. `step` is called with every batch.
    """

    def __init__(
        self,
        open_loader: Callable[..., ImageLoader],
        window_s: float,
        stretch: int,
        apart: bool,
        room_bytes: int,
        step: Callable[[Batch], object] = lambda batch: None,
        first: int = 0,
    ):
        self.open_loader, self.window_s, self.step = open_loader, window_s, step
        self.first, self.stretch, self.apart, self.room_bytes = first, stretch, apart, room_bytes
        self._held: OrderedDict[tuple, Held] = OrderedDict()
        self._opened = 0

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_) -> None:
        while self._held:
            self._close_oldest()

    def rate(self, setting: Setting, stretch: int | None = None, **changes) -> float:
        """Images/s in a window of about `window_s`; with `stretch`, of at most that many steps, from `first` on."""
        loader, batches, _ = self._take(setting, stretch, changes)
        most = math.inf
        if stretch is not None:  # going back within the window would count
            loader.load_state_dict(loader.state_dict() | {"position": self.first})
            most = max(stretch - setting.prefetch - 1, MIN_STEPS)
        begin_s = time.perf_counter()
        for _ in range(setting.prefetch + 1):  # made before anybody took them
            self.step(next(batches))
            if time.perf_counter() - begin_s > WARM_UP_TIMES * self.window_s:
                break
        synchronize(loader.device)
        begin_s, steps, taken_s = time.perf_counter(), 0, 0.0
        while steps < MIN_STEPS or (taken_s < self.window_s and steps < most):
            self.step(next(batches))
            steps += 1
            taken_s = time.perf_counter() - begin_s
        synchronize(loader.device)
        rate = steps * loader.plan.batch_size / (time.perf_counter() - begin_s)
        settle(IDLE_WAIT * self.window_s)
        return rate

    def fill(self, setting: Setting, stretch: int, cache: str) -> None:
        """Takes `stretch` steps, so that the cache has their images."""
        _, batches, _ = self._take(setting, stretch, {"cache": cache})
        for _ in range(stretch):
            next(batches)
        settle(IDLE_WAIT * self.window_s)

    def _take(self, setting: Setting, stretch: int | None, changes: dict[str, object]) -> Held:
        name = (setting, stretch, *sorted(changes.items()))
        if name not in self._held:
            loader = self.open_loader(**setting._asdict(), **changes)
            image_bytes = loader.manifest.options["size"] ** 2 * RGB
            crop_bytes = loader.options.crop_size**2 * RGB * 4  # float32
            size = loader.plan.batch_size * ((setting.prefetch + 1) * image_bytes + MAX_ARRAYS * crop_bytes)
            while self._held and size + sum(held.bytes for held in self._held.values()) > self.room_bytes:
                self._close_oldest()
            # By the golden ratio, so that the loaders begin far apart however many there will be (Knuth, volume 3, section 6.4).
            apart = self.apart and stretch is None
            first = int(len(loader) * (self._opened * 0.618034 % 1)) if apart else self.first
            self._opened += 1
            self._held[name] = Held(loader, endless(loader, first, stretch or self.stretch), size)
        self._held.move_to_end(name)
        return self._held[name]

    def _close_oldest(self) -> None:
        _, (loader, _, _) = self._held.popitem(last=False)
        loader.close()


def settle(timeout_s: float) -> None:
    """Waits until no thread of this process computes any more, for at most `timeout_s`.

    A loader whose window is over goes on until its batches ahead are made, at the cost of the next one: on two cores the defaults
    measured 2,900 images/s after a loader of eight ahead, else 5,000.
    """
    begin_s = now_s = time.perf_counter()
    while now_s - begin_s < timeout_s:
        before_s, spent_s = now_s, time.process_time()
        time.sleep(LOOK_S)
        now_s = time.perf_counter()
        if time.process_time() - spent_s < IDLE * (now_s - before_s):
            return


def endless(loader: ImageLoader, first: int, steps: int) -> Iterator[Batch]:
    """`steps` steps from `first` on, over and over; all epochs if that is a whole one."""
    whole = steps >= len(loader)
    loader.load_state_dict(loader.state_dict() | {"position": first})
    while True:
        for batch in loader:
            yield batch
            if not whole and loader.position >= first + steps:
                loader.load_state_dict(loader.state_dict() | {"position": first})
                break


def read_stretch(loader: ImageLoader, deadline_s: float) -> int:
    """Reads the records of an epoch into memory, from the loader's position on, fewer if the time or STRETCH_BYTES run out.
    Returns the number of steps."""
    read_bytes = 0
    for step in range(len(loader)):
        ids, _ = loader.plan.ids(loader.position + step)
        loader.reader.will_need(ids)
        for record_id in ids.tolist():
            try:
                read_bytes += len(loader.reader[record_id])
            except CorruptRecord:
                continue  # the loaders count it and take the next one
        if step >= MIN_STEPS and (read_bytes > STRETCH_BYTES or time.perf_counter() > deadline_s):
            return step + 1
    return len(loader)


def room_of(device: torch.device) -> int:
    """Bytes that all open loaders may take together."""
    free = free_bytes() if device.type != "cuda" else min(free_bytes(), available_bytes(device))
    return free // 2


def free_bytes() -> int:
    """Host memory that a cache may have: half of what is free, and of what a control group allows."""
    return min(available_bytes(torch.device("cpu")), machine.memory_bytes()[0] // 2)


def images_in(batch: object, loader: object) -> int:
    """Images of a batch of any loader: the length of its first tensor, else what the loader says, else 1."""
    lengths = (len(leaf) for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return next(lengths, getattr(loader, "batch_size", None) or 1)


def bytes_of(batch: object) -> int:
    return sum(leaf.nbytes for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def enlarged(batch: object, times: int) -> object | None:
    """The batch `times` over; None if it holds anything but tensors of one length."""
    leaves, form = _pytree.tree_flatten(batch)
    if not all(isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == len(leaves[0]) for leaf in leaves) or not leaves:
        return None
    return _pytree.tree_unflatten([torch.cat([leaf] * times) for leaf in leaves], form)
