"""Part "verdicts" of gpu.py: what the profiler names, of runs as they are and of faults that only a GPU has."""

import contextlib
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_work import Part, cores, fixed_batch, net_and_step
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.measure import profile
from imagefeed.pipeline.profiler.report import verdict

# All causes that lie before training; which of them it is, the other parts' figures say.
INPUT = {
    "decode", "decode threads", "hardware decoder off", "prefetch", "shared cores", "crop", "loader",
    "checksums and Python of reading", "cold page cache", "slow disk", "image size", "augmentation",
}  # fmt: skip
RIVAL = """import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
while True:
    a @ a
    torch.cuda.synchronize()
"""
NEARLY = 0.95  # of the training alone: where a run reaches this, training is what limits it


def measure(part: Part) -> None:
    swept = (part.earlier("loader").get("best") or {}).get("settings", {})
    settings = {name: value for name, value in swept.items() if name != "batch_size"} or {"num_threads": cores()}
    batch, usual = (16, "light") if part.small else (512, "alexnet-owt")
    cases: dict[str, tuple[set[str] | None, Callable[[float], Profile]]] = {
        "alexnet-owt as it is": (None, functools.partial(ours, part, usual, batch, settings)),
        "cache device": (None, functools.partial(ours, part, usual, batch, settings | {"cache": "device"})),
        "a slow net": ({"training"}, functools.partial(ours, part, slow_net(part), batch // 2, settings)),
        "hardware decoder off": (
            {"hardware decoder off"},
            functools.partial(ours, part, "light", batch, settings | {"hw_decoder_load": 0.0}),
        ),
        "one thread": ({"decode threads"}, functools.partial(ours, part, "light", batch, settings | {"num_threads": 1})),
        "launch-bound": ({"small batch"}, functools.partial(ours, part, "layers", 8, settings | {"cache": "device"})),
        "pageable copies": ({"host-to-device copy"}, functools.partial(pageable, part, batch)),
        "a slow GPU": ({"training"}, functools.partial(rivalled, part, usual, batch, settings)),
    }
    seconds = 2.0 if part.small else min(max(part.seconds / len(cases) / 1.6, 3.0), 10.0)
    right = judged = 0
    for name, (accepted, case) in cases.items():
        if not part.time_for(name, 2 * seconds):
            continue
        try:
            found = case(seconds)
        except Exception as error:
            part.note(name, f"failed: {type(error).__name__}: {str(error)[:150]}")
            continue
        named = found.causes[0].name
        reached = found.rates["together"].median / found.rates["training"].median
        expected = accepted or ({"training"} if reached >= NEARLY else INPUT)
        judged += 1
        right += named in expected
        row = {"named": named, "right": named in expected, "expected": sorted(expected) if accepted else "by the rates"}
        row |= {f"{key} images/s": samples.median for key, samples in found.rates.items()}
        part.note(name, row | {"data wait": found.data_wait, "verdict": verdict(found)})
    part.note("right", f"{right} of {judged}")


def slow_net(part: Part) -> str:
    if part.small:
        return "layers"
    return "torchvision:resnet50" if importlib.util.find_spec("torchvision") else "alexnet-one-gpu"


def step_of(part: Part, net: str, classes: int) -> tuple[torch.nn.Module, Callable]:
    """Of a net of model/nets.py, or "light": next to nothing to compute, or "layers": 300 of them, each next to nothing."""
    if net not in ("light", "layers"):
        return net_and_step(net, classes, part.device, size=part.size)
    torch.manual_seed(0)
    hidden = [layer for _ in range(300 if net == "layers" else 1) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    first = (torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 64))
    model = torch.nn.Sequential(*first, *hidden, torch.nn.Linear(64, classes)).to(part.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    from imagefeed.model.step import train_step

    def step(images, labels, on_phase=lambda phase: None):
        return train_step(model, images, labels, optimizer, "bfloat16", on_phase)

    return model, step


def ours(part: Part, net: str, batch_size: int, settings: dict, seconds: float) -> Profile:
    manifest = part.data()
    model, train = step_of(part, net, len(manifest.classes))

    def step(batch: Batch, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        train(batch.images, batch.labels, on_phase)

    with ImageLoader(manifest, "train", batch_size, crop_size=part.size, device=part.device, **settings) as loader:
        options = {"seconds": seconds, "device": part.device, "model": model, "precision": "bfloat16"}
        if settings.get("cache", "none") == "none":
            return profile(loader, step, **options)
        for _ in loader:  # fills the cache
            pass
        return profile(Filled(loader), step, **options)


class Filled:
    """A loader as the profiler takes any other: of its own it opens another, whose cache is empty."""

    def __init__(self, loader: ImageLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class Pageable:
    """Batches in memory that no GPU can read by itself, as a DataLoader without pin_memory gives them."""

    def __init__(self, batch_size: int, classes: int, size: int):
        self.batches = [fixed_batch(batch_size, classes, torch.device("cpu"), size) for _ in range(2)]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from self.batches * 50


def pageable(part: Part, batch_size: int, seconds: float) -> Profile:
    """Copied, and waited for, in every step."""
    model, train = step_of(part, "light", 1000)

    def step(batch: tuple, on_phase: Callable[[str], None] = lambda phase: None) -> None:
        train(*(tensor.to(part.device, copy=True) for tensor in batch), on_phase)

    return profile(
        Pageable(batch_size, 1000, part.size), step, seconds=seconds, device=part.device, model=model, precision="bfloat16"
    )


def rivalled(part: Part, net: str, batch_size: int, settings: dict, seconds: float) -> Profile:
    """Beside another process that keeps the GPU busy; on a CPU there is none, and nothing is slow."""
    with contextlib.ExitStack() as stack:
        if part.cuda:
            rival = subprocess.Popen([sys.executable, "-c", RIVAL])
            stack.callback(rival.wait)
            stack.callback(rival.kill)
        return ours(part, net, batch_size, settings | {"cache": "device"}, seconds)
