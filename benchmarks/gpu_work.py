"""What the parts of gpu.py have in common: where they are, how long they may take, and what they note as they go."""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import Batch, ImageLoader

WINDOWS = 5


@dataclass
class Part:
    """One part's run. `folder` holds the data (gpu_data.py) and, as NAME.json, what each part has noted: written with each note,
    so that what was measured stays when a part fails or is stopped."""

    name: str
    folder: Path
    device: torch.device
    small: bool
    seconds: float
    begin_s: float = field(default_factory=time.perf_counter)
    notes: dict[str, object] = field(default_factory=dict)

    def note(self, name: str, value: object) -> None:
        self.notes[name] = value
        path = self.folder / f"{self.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.notes))
        path.with_suffix(".tmp").replace(path)
        print(f"{self.name}: {name}: {short(value)}", flush=True)

    def earlier(self, part: str) -> dict:
        """What another part noted; nothing where it did not run."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / f"{part}.json").read_text())
        return {}

    @property
    def size(self) -> int:
        """Pixels of a crop."""
        return 64 if self.small else 224

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.begin_s)

    def time_for(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, that is noted."""
        if self.left_s >= seconds:
            return True
        self.note(name, f"left out: {self.left_s:.0f} s of {self.seconds:.0f} were left")
        return False

    def data(self) -> Manifest:
        return Manifest.load(self.folder / "large")


def short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(step: Callable[[], object], images: int, seconds: float, device: torch.device, warm_up: int = 2) -> dict[str, float]:
    """Images a second: median, lowest and highest of WINDOWS windows. The host's clock, which is right for a GPU because it is
    waited for at both ends of a window."""
    for _ in range(warm_up):
        step()
    rates = []
    for _ in range(WINDOWS):
        synchronize(device)
        steps, start_s = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start_s < seconds / WINDOWS:
            step()
            steps += 1
            if steps % 16 == 0:
                synchronize(device)  # or the host would run ahead for longer than the window
        synchronize(device)
        rates.append(steps * images / (time.perf_counter() - start_s))
    return {"images_per_second": statistics.median(rates), "low": min(rates), "high": max(rates)}


def repeated(loader: ImageLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def loader_rate(manifest: Manifest, batch_size: int, seconds: float, device: torch.device, **options) -> dict[str, float]:
    """Of the loader alone, from where no batch is left that was made while nobody took it."""
    with ImageLoader(manifest, manifest.train_split, batch_size, device=device, **options) as loader:
        batches = repeated(loader)
        return rate(lambda: next(batches), batch_size, seconds, device, loader.options.prefetch + 2)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def net_and_step(
    name: str, classes: int, device: torch.device, mode: str | None = None, size: int = 224
) -> tuple[torch.nn.Module, Callable[..., object]]:
    """A net, compiled by `mode` where it is given, and a step of its training in bfloat16 as train.py takes it,
    step(images, labels). The learning rate is 0, only time counts."""
    from imagefeed.model.nets import build_net
    from imagefeed.model.step import keep_memory, train_step

    keep_memory()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    net = build_net(name, classes, crop_size=size).to(device, memory_format=torch.channels_last)
    if mode:
        net.compile(mode=mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor, on_phase: Callable[[str], None] = lambda phase: None):
        return train_step(net, images, labels, optimizer, "bfloat16", on_phase)

    return net, step


def fixed_batch(batch_size: int, classes: int, device: torch.device, size: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch_size, 3, size, size, device=device) * 50
    return images, torch.randint(0, classes, (batch_size,), device=device)


def best(rows: dict[str, dict]) -> str:
    """The name of the row with the most images a second."""
    return max(rows, key=lambda name: rows[name]["images_per_second"])


def interleaved(ways: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, object]]:
    """Each way in turn, round by round: the median of the rounds, and all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        found[name].append(way()["images_per_second"])
    return {name: {"images_per_second": statistics.median(rates), "rounds": rates} for name, rates in found.items()}
