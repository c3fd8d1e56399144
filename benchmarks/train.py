"""How fast is a training step on a fixed batch, beside the same net in plain PyTorch and beside nets without normalisation?

    python -m benchmarks.train [--batch-size 128] [--rounds 5] [--device cuda]     # results under "train" or "train-cuda"

Each row is a process of its own, because the allocator's settings (model.step.keep_memory) hold for a whole process; the rows
take turns, one waits while another is measured. The rows:

    alexnet            the paper's net by train.py's step: channels-last, fused SGD, normalisation in one pass
    ..., no lrn        the same without normalisation; alexnet-owt has none either
    ..., NCHW          with contiguous images and weights; "SGD not fused"; "4 channels": a fourth of zeros beside RGB
    plain              the paper's net as people write it: nn.LocalResponseNorm for each tower, nn.Dropout, NCHW, SGD
    torchvision        its alexnet by train.py's step, where it is installed
    ..., compiled      by torch.compile; "graphed" with CUDA graphs (reduce-overhead)
    lrn                normalisation of conv1's and conv2's outputs alone, forward and backward: ours, nn.LocalResponseNorm, and
                       the plain formula through torch.compile

Images a second; of "lrn" too, each image being 96x55x55 and 256x27x27 activations. Between the rounds the main process measures
what the device does in matrix products. bfloat16 is left out on a CPU that only emulates it.
"""

import functools
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as train.py

import click
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import save
from imagefeed.model.flops import count_flops
from imagefeed.model.lrn import formula, local_response_norm
from imagefeed.model.nets import build_net
from imagefeed.model.step import EMULATED, keep_memory, time_conv2, train_step
from imagefeed.pipeline.profiler.limits import matrix_rate

NETS = {"alexnet": "alexnet", "alexnet, no lrn": "alexnet", "alexnet-owt": "alexnet-owt", "torchvision": "torchvision:alexnet"}
MODES = {"": None, ", compiled": "default", ", graphed": "reduce-overhead"}
OTHERWISE = ("alexnet, NCHW", "alexnet, SGD not fused", "alexnet, 4 channels")  # as train.py does not do it
LRNS = ("lrn", "lrn plain", "lrn compiled")
PRECISIONS = ("float32", "bfloat16")
BASE = "plain, float32"
WARM_UP, WINDOW_S, MATRIX_S = 3, 2.0, 0.5


def rows(device: str) -> list[str]:
    """Their names, ending in the precision."""
    nets = [net for net in NETS if net != "torchvision" or importlib.util.find_spec("torchvision")]
    modes = MODES if device == "cuda" else {"": None}  # on a CPU the compiler's kernels are the slower (docs/log.md)
    names = ["plain", *(net + mode for net in nets for mode in modes), *OTHERWISE, *LRNS]
    return [f"{name}, {precision}" for name, precision in itertools.product(names, precisions(device))]


def precisions(device: str) -> tuple[str, ...]:
    if device == "cuda":
        return PRECISIONS
    single, half = (time_conv2(dtype, 1, 2) for dtype in (torch.float32, torch.bfloat16))
    return PRECISIONS if half < EMULATED * single else PRECISIONS[:1]


class TowersOfLrn(nn.Module):
    """nn.LocalResponseNorm within each of two towers; it averages over the window, so alpha is five times the paper's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.norm(tower) for tower in x.chunk(2, 1)], 1)


def plain_net() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)), nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), TowersOfLrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), TowersOfLrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 1000),
    )  # fmt: skip


def make_step(name: str, batch_size: int, device: torch.device) -> Callable[[], object]:
    """What a row does again and again."""
    name, precision = name.rsplit(", ", 1)
    if name.startswith("lrn"):
        if name != "lrn plain":
            keep_memory()
        return lrn_step(name, getattr(torch, precision), batch_size, device)
    images = torch.randn(batch_size, 3, 224, 224, device=device) * 50
    labels = torch.randint(0, 1000, (batch_size,), device=device)
    if name == "plain":
        net = plain_net().to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()

        return step
    keep_memory()
    what, mode = next((name.removesuffix(end), mode) for end, mode in reversed(MODES.items()) if name.endswith(end))
    fused = what != "alexnet, SGD not fused"
    layout = torch.contiguous_format if what == "alexnet, NCHW" else torch.channels_last
    net = build_net(NETS[what.partition(", ")[0]], 1000, lrn="no lrn" not in what)
    if what == "alexnet, 4 channels":
        net.conv1 = nn.Conv2d(4, 96, 11, stride=4)
        images = F.pad(images, (0, 0, 0, 0, 0, 1))
    net.to(device, memory_format=layout)
    if mode:
        net.compile(mode=mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=fused)
    return lambda: train_step(net, images, labels, optimizer, precision, memory_format=layout)


def lrn_step(name: str, dtype: torch.dtype, batch_size: int, device: torch.device) -> Callable[[], object]:
    plain = TowersOfLrn()
    compiled = torch.compile(formula) if name == "lrn compiled" else None
    layout = torch.contiguous_format if name == "lrn plain" else torch.channels_last
    inputs = []
    for shape in ((96, 55, 55), (256, 27, 27)):
        x = torch.randn(batch_size, *shape, device=device, dtype=dtype).mul(100).contiguous(memory_format=layout)
        inputs.append((x.requires_grad_(), torch.randn_like(x)))

    def step() -> None:
        for x, grad in inputs:
            if name == "lrn plain":
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    y = plain(x)
            else:
                y = compiled(x, 2) if compiled else local_response_norm(x, 2)
            torch.autograd.grad(y, x, grad.to(y.dtype))

    return step


def serve(name: str, batch_size: int, device: torch.device) -> None:
    """Warms up, then for each line on stdin prints how many images a second a window of steps takes, and the peak of memory."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step = make_step(name, batch_size, device)
    for _ in range(WARM_UP):
        step()
    wait()
    print("ready", flush=True)
    for _ in sys.stdin:
        steps = 0
        start_s = time.perf_counter()
        while steps < 2 or time.perf_counter() - start_s < WINDOW_S:
            step()
            steps += 1
            if steps % 10 == 0:
                wait()  # or the host would run ahead of the GPU for longer than the window
        wait()
        rate = steps * batch_size / (time.perf_counter() - start_s)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps([rate, peak]), flush=True)


@functools.cache
def flops_of(net: str) -> int:
    return sum(count_flops(build_net(net, 1000), 224))


@click.command(context_settings={"show_default": True})
@click.option("--batch-size", type=click.IntRange(1), default=128)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--only", help="Rows whose names have this in them.", default="")
@click.option("--row", hidden=True)
def main(batch_size: int, rounds: int, device: str, only: str, row: str | None) -> None:
    """Measure a step of training, rows in turn."""
    if row:
        serve(row, batch_size, torch.device(device))
        return
    workers = {}
    rates: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for name in rows(device):
        if only not in name and name not in (BASE, *(f"alexnet, {precision}" for precision in PRECISIONS)):
            continue
        command = [sys.executable, "-m", "benchmarks.train", "--row", name, "--batch-size", str(batch_size)]
        worker = subprocess.Popen([*command, "--device", device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if worker.stdout.readline():
            workers[name] = worker
        else:
            print(f"{name}: it does not run here; its error is above", file=sys.stderr)
    able: dict[str, list[float]] = {}
    for number in range(rounds):
        for precision in {name.rpartition(", ")[2] for name in workers}:
            able.setdefault(precision, []).append(matrix_rate(precision, MATRIX_S, torch.device(device)))
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            rate, peaks[name] = json.loads(worker.stdout.readline())
            rates.setdefault(name, []).append(rate)
            print(f"round {number + 1}: {name} {rate:,.0f} images/s", file=sys.stderr)
    for worker in workers.values():
        worker.communicate()

    def ratio(name: str, base: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True)), 3)

    found = {}
    for name, measured in rates.items():
        found[name] = {"images_per_second": statistics.median(measured), "rounds": measured, "peak_bytes": peaks[name]}
        net, _, precision = name.rpartition(", ")
        if not name.startswith("lrn"):
            found[name]["to plain float32"] = ratio(name, BASE)
            flops = flops_of("alexnet" if net == "plain" else NETS[net.partition(", ")[0]])
            shares = [flops * rate / most for rate, most in zip(measured, able[precision], strict=True)]
            found[name]["to matrix products"] = round(statistics.median(shares), 3)
        elif name.startswith("lrn, ") and name.replace("lrn", "lrn plain") in rates:
            found[name]["to nn.LocalResponseNorm"] = ratio(name, name.replace("lrn", "lrn plain"))
        if name.replace("alexnet", "alexnet, no lrn") in rates and name.startswith("alexnet, "):
            found[name]["to the net without lrn"] = ratio(name, name.replace("alexnet", "alexnet, no lrn"))
        if net in OTHERWISE:
            found[name]["to alexnet"] = ratio(name, f"alexnet, {precision}")
    result = {"batch_size": batch_size, "matrix_flops_a_second": able, "rows": found}
    save("train" if device == "cpu" else "train-cuda", result, "torch")
    for name, row_found in found.items():
        extras = ", ".join(f"{value:.2f} {key}" for key, value in row_found.items() if " " in key)
        print(f"{name:<32}{row_found['images_per_second']:>10,.1f} images/s  {row_found['peak_bytes'] / 1e6:>7,.0f} MB  {extras}")


if __name__ == "__main__":
    main()
