"""Faults of a training, each made for real, for profile_faults.py: `suffer` profiles a training that has one."""

import contextlib
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.cold import evict, slow_down
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.model.step import train_step
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.measure import profile
from imagefeed.pipeline.profiler.windows import endless, read_stretch

CGROUPS = Path("/sys/fs/cgroup")
CALIBRATING_S = 2.0
READS_A_RECORD = 8  # at most: it is bytes that a slowed disk is short of


class Net(torch.nn.Module):
    """As cheap or dear as wanted: every `stride`-th pixel, hidden layers of `width` units."""

    def __init__(self, stride: int = 28, width: int = 64, layers: int = 1, classes: int = 1000):
        super().__init__()
        side = -(-224 // stride)
        hidden = [part for _ in range(layers - 1) for part in (torch.nn.Linear(width, width), torch.nn.ReLU())]
        first = (torch.nn.Flatten(), torch.nn.Linear(3 * side * side, width), torch.nn.ReLU())
        self.layers = torch.nn.Sequential(*first, *hidden, torch.nn.Linear(width, classes))
        self.stride = stride

    @classmethod
    def convolutions(cls, channels: int) -> "Net":
        """Much to compute for each image, few weights."""
        net = cls()
        net.stride = 7
        wide = (
            torch.nn.Conv2d(3, channels, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.Conv2d(channels, channels, 3),
            torch.nn.ReLU(),
        )
        net.layers = torch.nn.Sequential(
            *wide, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, 1000)
        )
        return net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=True)


class Training:
    """A training step on one thread, with room for a fault before it, after it and in its optimizer."""

    def __init__(self, net: Net, optimizer=sgd, before=lambda images: images, after=lambda: None):
        self.net, self.before, self.after = net, before, after
        self.optimizer = optimizer(net.parameters())

    def __call__(self, batch: Batch, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        stride = self.net.stride
        images = self.before(batch.images)[..., ::stride, ::stride]
        train_step(self.net, images, batch.labels, self.optimizer, "float32", on_phase)
        self.after()


def every(steps: int, work: Callable[[], None]) -> Callable[[], None]:
    count = itertools.count(1)
    return lambda: work() if next(count) % steps == 0 else None


def compute(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        sum(range(1000))


def held_lock() -> None:
    threading.Thread(target=lambda: [sum(range(1000)) for _ in itertools.count()], daemon=True).start()


def write_checkpoint(net: torch.nn.Module, folder: Path) -> Callable[[], None]:
    """What a large net's takes: 100 MB, to the disk."""
    ballast = torch.zeros(25_000_000)

    def write() -> None:
        with open(folder / "checkpoint.pt", "wb") as file:
            torch.save({"net": net.state_dict(), "ballast": ballast}, file)
            file.flush()
            os.fsync(file.fileno())

    return write


def to_bytes_and_back(images: torch.Tensor) -> torch.Tensor:
    """A hand-over as it is found: through lists of arrays, another type, another order of axes, and back."""
    arrays = [image.double().numpy().transpose(1, 2, 0).copy() for image in images]
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]).float().contiguous()


def slowly(net: Net, after_s: float, seconds: float) -> Callable[[], None]:
    """From `after_s` after the first step on, each takes `seconds` longer."""
    began: list[float] = []

    def work() -> None:
        began.append(time.perf_counter())
        if began[-1] - began[0] > after_s:
            compute(seconds)

    return work


LIGHT, MEDIUM, HEAVY = Net, lambda: Net.convolutions(16), lambda: Net.convolutions(96)
TRAININGS: dict[str, Callable[[Path], Training]] = {
    "light": lambda work: Training(LIGHT()),
    "medium": lambda work: Training(MEDIUM()),
    "heavy": lambda work: Training(HEAVY()),
    "layers": lambda work: Training(Net(28, 64, 100)),
    "adam": lambda work: Training(Net(14, 2048, 4), lambda parts: torch.optim.Adam(parts, lr=0.0, foreach=False)),
    "conversion": lambda work: Training(LIGHT(), before=to_bytes_and_back),
    "checkpoint": lambda work: Training(net := MEDIUM(), after=every(15, write_checkpoint(net, work))),
    "logging": lambda work: Training(MEDIUM(), after=every(10, lambda: compute(0.2))),
    "late": lambda work: Training(net := MEDIUM(), after=slowly(net, 5.0, 0.03)),
    "between": lambda work: Training(MEDIUM(), after=lambda: compute(0.03)),
}


@dataclass(frozen=True)
class Fault:
    """`cause` is what the profiler should name; `options` are the loader's; `disk` is how many times as fast as training takes
    records from memory the disk may read them; `room` megabytes of memory beyond the program's own; `neighbours` other processes
    that compute."""

    cause: str
    training: str = "light"
    options: dict[str, object] = field(default_factory=dict)
    data: str = "large"
    disk: float | None = None
    evicted: bool = False
    room: int | None = None
    neighbours: int = 0
    lock: bool = False
    plain: bool = False  # a DataLoader of PyTorch's


FAULTS = {
    "none: training is the limit": Fault("training", "heavy"),
    "none: decode is the limit": Fault("decode", data="little"),
    "cold page cache": Fault("cold page cache", disk=0.5, evicted=True),
    "slow disk": Fault("slow disk", disk=0.3, evicted=True, room=1600),
    "memory pressure": Fault("memory pressure", options={"batch_size": 32}, data="little", disk=0.5, evicted=True, room=450),
    "one decode thread": Fault("decode threads", options={"num_threads": 1}),
    "huge JPEGs": Fault("image size", data="huge", options={"batch_size": 16}),
    "heavy augmentation": Fault("augmentation", options={"random_resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.1)}),
    "prefetch depth 1": Fault("prefetch", "medium", {"prefetch": 1}),
    "a hog of the interpreter's lock": Fault("interpreter lock", "medium", lock=True),
    "busy neighbour": Fault("busy neighbour", "medium", neighbours=4),
    "slow model": Fault("training", "heavy", {"batch_size": 128}),
    "tiny batches": Fault("small batch", "layers", {"batch_size": 2}),
    "slow optimizer": Fault("optimizer", "adam"),
    "slow hand-over": Fault("host-to-device copy", "conversion"),
    "a checkpoint every 15 steps": Fault("periodic stall", "checkpoint"),
    "logging every 10 steps": Fault("periodic stall", "logging"),
    "a stall that begins late": Fault("late stall", "late"),
    "work between the steps": Fault("rest of the loop", "between"),
    "a slow DataLoader": Fault("loader", plain=True),
}


class Plain(torch.utils.data.Dataset):
    """The same records for PyTorch's DataLoader, decoded by Pillow."""

    def __init__(self, manifest: Manifest):
        self.records = RecordReader(manifest, manifest.train_split)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        with Image.open(io.BytesIO(self.records.jpeg(number).tobytes())) as image:
            pixels = np.asarray(image.crop((16, 16, 240, 240)), np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.records.labels[number])


def suffer(fault: Fault, work: Path, seconds: float) -> Profile:
    """Profiles a training with the fault in it."""
    torch.set_num_threads(1)
    folder = work / fault.data
    manifest = Manifest.load(folder)
    train = TRAININGS[fault.training](work)
    if fault.plain:
        plain = torch.utils.data.DataLoader(Plain(manifest), 64, shuffle=True)

        def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            train(Batch(batch[0], batch[1], batch[1], batch[1]))

        return profile(plain, step, seconds=seconds)
    with ImageLoader(manifest, manifest.train_split, **{"batch_size": 64} | fault.options) as loader:
        if fault.disk:
            rate = rate_from_memory(loader, train)
            bytes_a_second = fault.disk * rate * loader.manifest.load_index("train")["length"].mean()
            slow_down(folder, READS_A_RECORD * int(fault.disk * rate), max(1, round(bytes_a_second / 1e6)))
        if fault.lock:
            threading.Thread(target=lambda: [sum(range(1000)) for _ in itertools.count()], daemon=True).start()
        if fault.room is not None:
            with little_memory(fault.room), loader.reopened() as rehearsed:
                for _, batch in zip(range(12), rehearsed, strict=False):
                    train(batch)
        if fault.evicted:
            evict(folder)
        return profile(loader, train, seconds=seconds, model=train.net, attempt=True)


def rate_from_memory(loader: ImageLoader, train: Training) -> float:
    """Images a second of the training without a fault, over the steps of about CALIBRATING_S."""
    with loader.reopened() as other:
        steps = read_stretch(other, time.perf_counter() + CALIBRATING_S)
        batches = endless(other, other.position, steps)
        for _ in range(other.options.prefetch + 1):
            train(next(batches))
        start_s, taken = time.perf_counter(), 0
        while time.perf_counter() - start_s < CALIBRATING_S:
            train(next(batches))
            taken += 1
        return taken * other.plan.batch_size / (time.perf_counter() - start_s)


@contextlib.contextmanager
def little_memory(room: int) -> Iterator[None]:
    """What the program takes in here it may have from then on, and `room` megabytes more, page cache included."""
    group = CGROUPS / "memory" / f"imagefeed-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    yield
    taken = int((group / "memory.stat").read_text().partition("total_rss ")[2].split()[0])
    (group / "memory.limit_in_bytes").write_text(str(taken + room * 10**6))
