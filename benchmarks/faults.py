"""Trainings that are slow for a known reason, each made for real, for profile_faults.py: `suffer` profiles one."""

import contextlib
import functools
import io
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.data import evict, slow_down
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.model.nets import build_net
from imagefeed.model.step import train_step
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.measure import profile
from imagefeed.pipeline.profiler.windows import endless, read_stretch

CGROUPS = Path("/sys/fs/cgroup")
CALIBRATING_S = 2.0
READS_A_RECORD = 8  # at most: a slowed disk is to be short of bytes, not of reads
CLASSES = 1000
RIVAL = """import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
while True:
    a @ a
    torch.cuda.synchronize()
"""


class Strided(nn.Sequential):
    """A net that looks at every `stride`-th pixel only."""

    def __init__(self, stride: int, *layers: nn.Module):
        super().__init__(*layers)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., :: self.stride, :: self.stride])


def dense(width: int = 64, layers: int = 1, stride: int = 28) -> nn.Module:
    """Hidden layers of `width` units: as cheap or expensive as wanted."""
    hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
    return Strided(stride, nn.Flatten(), nn.LazyLinear(width), nn.ReLU(), *hidden, nn.Linear(width, CLASSES))


def convolutions(channels: int = 16) -> nn.Module:
    """Much to compute for each image, few weights."""
    wide = (nn.Conv2d(3, channels, 5, padding=2), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.ReLU())
    return Strided(7, *wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Training:
    """A training step, with room for a fault before it, after it and in its optimizer."""

    def __init__(self, net: nn.Module, device: torch.device, adam=False, before=lambda images: images, after=lambda: None):
        self.net, self.before, self.after = net.to(device), before, after
        self.precision = "bfloat16" if device.type == "cuda" else "float32"
        net(torch.zeros(1, 3, 224, 224, device=device))  # lazy layers get their sizes
        slow, fast = torch.optim.Adam, functools.partial(torch.optim.SGD, momentum=0.9, fused=True)
        self.optimizer = slow(net.parameters(), 0.0, foreach=False) if adam else fast(net.parameters(), 0.0)

    def __call__(self, batch: Batch, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        train_step(self.net, self.before(batch.images), batch.labels, self.optimizer, self.precision, on_phase)
        self.after()


def every(steps: int, work: Callable[[], None]) -> Callable[[], None]:
    count = itertools.count(1)
    return lambda: work() if next(count) % steps == 0 else None


def compute(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        sum(range(1000))


def write_checkpoint(folder: Path) -> None:
    """As a large net's: 100 MB, to the disk."""
    with open(folder / "checkpoint.pt", "wb") as file:
        torch.save({"weights": torch.zeros(25_000_000)}, file)
        file.flush()
        os.fsync(file.fileno())


def to_arrays_and_back(images: torch.Tensor) -> torch.Tensor:
    """A slow copy to the device, as people write it: through lists of arrays, another type, another order of axes, and back."""
    arrays = [image.double().numpy().transpose(1, 2, 0).copy() for image in images]
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays]).float().contiguous()


def later(after_s: float, work: Callable[[], None]) -> Callable[[], None]:
    """Works in each step that is later than `after_s` after the first."""
    began: list[float] = []

    def step() -> None:
        began.append(time.perf_counter())
        if began[-1] - began[0] > after_s:
            work()

    return step


# Net, and what is added to its step.
TRAININGS: dict[str, Callable[[Path], tuple[nn.Module, dict]]] = {
    "light": lambda work: (dense(), {}),
    "medium": lambda work: (convolutions(), {}),
    "heavy": lambda work: (convolutions(96), {}),
    "layers": lambda work: (dense(layers=100), {}),
    "adam": lambda work: (dense(2048, 4, 14), {"adam": True}),
    "conversion": lambda work: (dense(), {"before": to_arrays_and_back}),
    "checkpoint": lambda work: (convolutions(), {"after": every(15, lambda: write_checkpoint(work))}),
    "logging": lambda work: (convolutions(), {"after": every(10, lambda: compute(0.2))}),
    "late": lambda work: (convolutions(), {"after": later(5.0, lambda: compute(0.03))}),
    "between": lambda work: (convolutions(), {"after": lambda: compute(0.03)}),
}


@dataclass(frozen=True)
class Fault:
    """A fault and what is done to make it."""

    cause: str  # that the profiler should name; empty: training or input, as the rates say
    training: str = "light"  # one of TRAININGS, or a net of model/nets.py
    options: dict[str, object] = field(default_factory=dict)  # of the loader
    data: str = "large"
    disk: float | None = None  # its speed, as a multiple of the rate at which training takes records from memory
    evicted: bool = False
    room: int | None = None  # megabytes of memory beyond the program's own
    neighbors: int = 0  # other processes that compute
    lock: bool = False
    plain: bool = False  # a DataLoader of PyTorch
    pageable: bool = False  # batches without pinned memory
    rival: bool = False  # another process computes on the GPU


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
    "busy neighbor": Fault("busy neighbor", "medium", neighbors=4),
    "slow model": Fault("training", "heavy", {"batch_size": 128}),
    "tiny batches": Fault("small batch", "layers", {"batch_size": 2}),
    "slow optimizer": Fault("optimizer", "adam"),
    "slow copy": Fault("host-to-device copy", "conversion"),
    "a checkpoint every 15 steps": Fault("periodic stall", "checkpoint"),
    "logging every 10 steps": Fault("periodic stall", "logging"),
    "a stall that begins late": Fault("late stall", "late"),
    "work between the steps": Fault("rest of the loop", "between"),
    "a slow DataLoader": Fault("loader", plain=True),
}
CACHED = {"cache": "device"}
CUDA_FAULTS = {
    "alexnet-owt as it is": Fault("", "alexnet-owt"),
    "cache device": Fault("", "alexnet-owt", CACHED),
    "a slow net": Fault("training", "alexnet-one-gpu", {"batch_size": 256}),
    "hardware decoder off": Fault("hardware decoder off", options={"hw_decoder_load": 0.0}),
    "one thread": Fault("decode threads", options={"num_threads": 1}),
    "launch-bound": Fault("small batch", "layers", CACHED | {"batch_size": 8, "subset": list(range(2048))}),
    "pageable copies": Fault("host-to-device copy", pageable=True),
    "a slow GPU": Fault("training", "alexnet-owt", CACHED, rival=True),
}


class Records(torch.utils.data.Dataset):
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


class Again:
    """A loader, or a list of batches, as the profiler takes those of others: of an ImageLoader it would open another, whose cache
    is empty."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self) -> Iterator:
        return iter(self.loader)


def suffer(fault: Fault, work: Path, seconds: float, device: torch.device) -> Profile:
    """Profiles a training with the fault in it."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    manifest = Manifest.load(work / fault.data)
    net, added = TRAININGS.get(fault.training, lambda work: (build_net(fault.training, CLASSES), {}))(work)
    train = Training(net, device, **added)
    common = {"seconds": seconds, "device": device, "model": net, "precision": train.precision}
    with contextlib.ExitStack() as stack:
        busy = [f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"] * fault.neighbors  # not longer than this
        for code in busy + [RIVAL] * (fault.rival and cuda):
            process = subprocess.Popen([sys.executable, "-c", code])
            stack.callback(process.wait)
            stack.callback(process.kill)

        def step(batch: tuple, on_phase: Callable[[str], None] = lambda phase: None) -> None:
            images, labels = (tensor.to(device, copy=cuda) for tensor in batch)
            train(Batch(images, labels, labels, labels), on_phase)

        if fault.plain:
            return profile(torch.utils.data.DataLoader(Records(manifest), 64, shuffle=True), step, seconds=seconds)
        if fault.pageable:
            batch = (torch.randn(512, 3, 224, 224), torch.zeros(512, dtype=torch.int64))
            return profile(Again([batch] * 100), step, **common)
        tuned = harness.tuned_settings(device) if cuda else {}
        options = {"batch_size": 512 if cuda else 64} | tuned | fault.options
        loader = stack.enter_context(ImageLoader(manifest, manifest.train_split, device=device, **options))
        if "cache" in options:
            for _ in loader:  # fills the cache
                pass
            return profile(Again(loader), train, **common)
        prepare(fault, loader, train)
        return profile(loader, train, **common, attempt=not cuda)


def prepare(fault: Fault, loader: ImageLoader, train: Training) -> None:
    """Makes the disk, the interpreter's lock and the memory what the fault wants."""
    folder = loader.manifest.root
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


def rate_from_memory(loader: ImageLoader, train: Training) -> float:
    """Images per second of the training without a fault, over the steps of about CALIBRATING_S."""
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
    """From then on the program may have what it takes in here and `room` megabytes more, page cache included."""
    group = CGROUPS / "memory" / f"imagefeed-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    yield
    taken = int((group / "memory.stat").read_text().partition("total_rss ")[2].split()[0])
    (group / "memory.limit_in_bytes").write_text(str(taken + room * 10**6))
