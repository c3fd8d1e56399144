"""How fast is a training step on a fixed batch, beside the same net in plain PyTorch, other nets, and the chip's limits?

    python -m benchmarks.train [--batch-size 128] [--rounds 5]        # results under "train"
    python -m benchmarks.train --device cuda [--seconds 100]          # results under "train-cuda"

The rows; images per second, those of "lrn" being 96x55x55 and 256x27x27 activations:

    alexnet            the paper's net by train.py's step: channels-last, fused SGD, normalization in one pass
    ..., no lrn        the same without normalization; alexnet-owt has none either
    ..., NCHW          with contiguous images and weights; "SGD not fused"; "4 channels": a fourth of zeros beside RGB
    plain              the paper's net as people write it: nn.LocalResponseNorm for each tower, nn.Dropout, NCHW, SGD
    torchvision:NAME   its nets by train.py's step, if it is installed
    ..., compiled      by torch.compile; "graphed" with CUDA graphs (reduce-overhead)
    lrn                normalization of the outputs of conv1 and conv2 alone, forward and backward: ours, nn.LocalResponseNorm,
                       and the plain formula through torch.compile

On a CPU each row is a process of its own, because the allocator's settings (model.step.keep_memory) hold for a whole process;
they take turns, and bfloat16 is left out if the CPU only emulates it. On a GPU the rows follow each other, by batch size too, the
most important first, until the time is over. "to matrix products" is the MFU by the matrix products that the device really does;
the roofline is what they and the memory allow.
"""

import functools
import importlib.util
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as train.py

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import harness
from imagefeed.model import build_net
from imagefeed.model.flops import conv_backward_flops, count_flops
from imagefeed.model.lrn import formula, local_response_norm
from imagefeed.model.step import EMULATED, keep_memory, time_conv2, train_step
from imagefeed.pipeline.loader import choose_device
from imagefeed.pipeline.profiler.limits import matrix_rate, memory_rate

CLASSES = 1000
MODES = {"": None, "compiled": "default", "graphed": "reduce-overhead"}
WINDOW_S, MATRIX_S = 2.0, 0.5
NEEDS_S = {"": 6, "compiled": 25, "graphed": 25}  # on a GPU
UPDATE_BYTES = 20  # read and written per parameter by SGD with momentum in one pass
OURS, OWT, RESNET = "alexnet", "alexnet-owt", "torchvision:resnet50"


class Row(NamedTuple):
    what: str
    precision: str
    mode: str = ""
    batch: int | None = None  # None: the same for all rows

    @property
    def name(self) -> str:
        parts = [self.what, self.mode, self.precision, f"batch {self.batch}" if self.batch else ""]
        return ", ".join(part for part in parts if part)

    @property
    def net(self) -> str:
        return "alexnet" if self.what == "plain" else self.what.partition(", ")[0]


def cpu_rows() -> list[Row]:
    # On a CPU the compiler's kernels are slower (docs/log.md).
    nets = ["plain", OURS, f"{OURS}, no lrn", OWT, "torchvision:alexnet"]
    otherwise = [f"{OURS}, NCHW", f"{OURS}, SGD not fused", f"{OURS}, 4 channels"]
    single, half = (time_conv2(dtype, 1, 2) for dtype in (torch.float32, torch.bfloat16))
    precisions = ("float32", "bfloat16") if half < EMULATED * single else ("float32",)
    return [Row(what, precision) for what in (*nets, *otherwise, "lrn", "lrn plain", "lrn compiled") for precision in precisions]


def cuda_rows() -> list[Row]:
    def half(*rows: tuple) -> list[Row]:
        return [Row(what, "bfloat16", mode, batch) for what, mode, batch in rows]

    first = half((OWT, "", 1024), (OURS, "", 1024), (OWT, "compiled", 1024), (OURS, "compiled", 1024), ("plain", "", 1024))
    first += [Row("plain", "float32", "", 1024), Row(OURS, "float32", "", 1024)]
    first += half((f"{OURS}, no lrn", "", 1024), ("torchvision:alexnet", "", 1024), (OWT, "", 128), (OURS, "", 128))
    first += half((RESNET, "", 256), ("lrn", "", 128), ("lrn plain", "", 128), ("lrn compiled", "", 128))
    first += half(*((net, "", batch) for net in (OWT, OURS) for batch in (256, 512, 2048)))
    first += half(*((net, "graphed", batch) for batch in (1024, 128) for net in (OURS, OWT)))
    first += half(*((f"{OURS}, {how}", "", 1024) for how in ("NCHW", "SGD not fused", "4 channels")))
    return first + half(("torchvision:alexnet", "compiled", 1024), (RESNET, "compiled", 256))


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
        nn.LazyLinear(4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, CLASSES),
    )  # fmt: skip


def sgd(net: nn.Module, fused: bool = True) -> torch.optim.SGD:
    """The learning rate is 0: only time counts."""
    return torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=fused)


def fixed_batch(batch_size: int, classes: int, device: torch.device, crop_size: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch_size, 3, crop_size, crop_size, device=device) * 50
    return images, torch.randint(0, classes, (batch_size,), device=device)


def net_and_step(
    name: str,
    classes: int,
    device: torch.device,
    mode: str | None = None,
    crop_size: int = 224,
    precision: str = "",
    how: str = "",
) -> tuple[nn.Module, Callable[..., object]]:
    """A net, compiled if `mode` is given, and step(images, labels), which trains it as train.py does, or otherwise as `how` says.

    `precision` is bfloat16 on a GPU and float32 on a CPU unless given.
    """
    keep_memory()
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    layout = torch.contiguous_format if how == "NCHW" else torch.channels_last
    net = build_net(name, classes, crop_size=crop_size, lrn=how != "no lrn")
    if how == "4 channels":
        net.conv1 = nn.Conv2d(4, 96, 11, stride=4)
    net.to(device, memory_format=layout)
    if mode:
        net.compile(mode=mode)
    optimizer = sgd(net, fused=how != "SGD not fused")

    def step(images: torch.Tensor, labels: torch.Tensor, on_phase: Callable[[str], None] = lambda phase: None):
        return train_step(net, images, labels, optimizer, precision, on_phase, layout)

    return net, step


def make_step(row: Row, batch_size: int, device: torch.device, crop_size: int) -> Callable[[], object]:
    """What the row does again and again."""
    if row.what.startswith("lrn"):
        return lrn_step(row, batch_size, device)
    images, labels = fixed_batch(batch_size, CLASSES, device, crop_size)
    if row.what != "plain":
        how = row.what.partition(", ")[2]
        if how == "4 channels":
            images = F.pad(images, (0, 0, 0, 0, 0, 1))
        _, step = net_and_step(row.net, CLASSES, device, MODES[row.mode], crop_size, row.precision, how)
        return functools.partial(step, images, labels)
    net = plain_net().to(device)
    net(images[:2])
    optimizer = sgd(net, fused=False)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bfloat16"):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return step


def lrn_step(row: Row, batch_size: int, device: torch.device) -> Callable[[], object]:
    dtype, plain = getattr(torch, row.precision), row.what == "lrn plain"
    if plain:
        norm = TowersOfLrn()
    else:
        keep_memory()
        one_pass = torch.compile(formula) if row.what == "lrn compiled" else local_response_norm

        def norm(x: torch.Tensor) -> torch.Tensor:
            return one_pass(x, 2)

    layout = torch.contiguous_format if plain else torch.channels_last
    inputs = []
    for shape in ((96, 55, 55), (256, 27, 27)):
        x = torch.randn(batch_size, *shape, device=device, dtype=dtype).mul(100).contiguous(memory_format=layout)
        inputs.append((x.requires_grad_(), torch.randn_like(x)))

    def step() -> None:
        for x, grad in inputs:
            with torch.autocast(device.type, torch.bfloat16, enabled=plain and dtype == torch.bfloat16):
                y = norm(x)
            torch.autograd.grad(y, x, grad.to(y.dtype))

    return step


class Products(TorchDispatchMode):
    """Operations and bytes of each matrix product and convolution that runs under it, forward and backward: what no compiler can
    fuse away. Tensors are those of a net without content (meta), counted as 2 bytes an element."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[float, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        packet = func._overloadpacket
        if packet == torch.ops.aten.convolution_backward:
            grad, x, weight, *others = args
            flops = conv_backward_flops(grad.shape, x.shape, weight.shape, *others)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs or {}, out_val=out)
        else:
            return out
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
        self.found.append((float(flops), 2.0 * sum(tensor.numel() for tensor in tensors)))
        return out


@functools.cache
def least_seconds(name: str, batch_size: int, crop_size: int, matrix: float, memory: float) -> float:
    """The roofline of a step: each product by arithmetic or by memory, whichever takes longer, and the update."""
    net = build_net(name, CLASSES, crop_size=crop_size).to("meta", torch.float64).train()
    with Products() as products:
        net(torch.empty(batch_size, 3, crop_size, crop_size, dtype=torch.float64, device="meta")).sum().backward()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return sum(max(f / matrix, b / memory) for f, b in products.found) + UPDATE_BYTES * parameters / memory


def measure_row(row: Row, batch_size: int, device: torch.device, crop_size: int, window_s: float) -> Callable[[object], dict]:
    """Warms up; returns what measures rates, in images per second, and the peak of memory in bytes."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    step = make_step(row, batch_size, device, crop_size)
    harness.window_rates(step, batch_size, 0, device, 3)

    def measure(_request: object = None) -> dict:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rates = harness.window_rates(step, batch_size, window_s, device, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"rates": rates, "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak}

    return measure


class Measured:
    """Rates of all rows, round by round, beside those of the device."""

    def __init__(self, batch_size: int, device: torch.device, crop_size: int):
        self.batch_size, self.device, self.crop_size = batch_size, device, crop_size
        self.rows: dict[str, Row] = {}
        self.rates: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.able: dict[str, list[float]] = {}  # matrix FLOP/s by precision
        self.memory = memory_rate(MATRIX_S, device)

    def add(self, row: Row, rates: list[float], peak: int) -> None:
        self.rows[row.name] = row
        self.rates.setdefault(row.name, []).extend(rates)
        self.peaks[row.name] = peak

    def related(self, row: Row) -> dict[str, float]:
        """The row's rate as a share of others' and of what the device is able to do."""
        rates, found = self.rates[row.name], {}
        bases = {"to plain float32": row._replace(what="plain", precision="float32", mode="")}
        if row.what.startswith("lrn"):
            bases = {"to nn.LocalResponseNorm": row._replace(what="lrn plain")} if row.what == "lrn" else {}
        elif row.what == OURS:
            bases["to the net without lrn"] = row._replace(what=f"{OURS}, no lrn")
        elif ", " in row.what and row.what != f"{OURS}, no lrn":
            bases["to alexnet"] = row._replace(what=OURS)
        for name, base in bases.items():
            if base.name in self.rates:
                found[name] = round(harness.ratio(self.rates, row.name, base.name), 3)
        if not row.what.startswith("lrn"):
            able = self.able[row.precision]
            flops, batch = flops_of(row.net, self.crop_size), row.batch or self.batch_size
            found["to matrix products"] = round(statistics.median(flops * rate / most for rate, most in zip(rates, able)), 3)
            if row.what == row.net:
                least_s = least_seconds(row.net, batch, self.crop_size, statistics.median(able), self.memory)
                found["of the roofline"] = round(statistics.median(rates) * least_s / batch, 3)
        return found

    def save(self, left_out: dict[str, str]) -> dict[str, dict]:
        rows = {
            name: {"images_per_second": statistics.median(rates), "rounds": rates, "peak_bytes": self.peaks[name]}
            | self.related(self.rows[name])
            for name, rates in self.rates.items()
        }
        result = {"batch_size": self.batch_size, "matrix_flops_a_second": self.able, "rows": rows, "left_out": left_out}
        harness.save(harness.named("train", self.device), result, "torch")
        return rows


@functools.cache
def flops_of(net: str, crop_size: int) -> int:
    return sum(count_flops(build_net(net, CLASSES, crop_size=crop_size), crop_size))


def measure_on_cpu(rows: list[Row], rounds: int, measured: Measured, window_s: float) -> dict[str, str]:
    """Rows in turns, each in a process of its own; returns why some do not run."""
    left_out: dict[str, str] = {}
    with harness.working_folder() as work:
        options = ["--batch-size", measured.batch_size, "--crop-size", measured.crop_size, "--window", window_s]
        workers = {
            row: harness.Worker(harness.python("benchmarks.train", "--row", json.dumps(row), *options), work / f"{row.name}.txt")
            for row in rows
        }
        try:
            for row in rows:
                try:
                    workers[row].ready()
                except click.ClickException as error:
                    left_out[row.name] = error.message.strip().splitlines()[-1][:200]
                    workers.pop(row).close()
            for number in range(rounds):
                for precision in {row.precision for row in workers}:
                    rate = matrix_rate(precision, MATRIX_S, measured.device)
                    measured.able.setdefault(precision, []).append(rate)
                for row, worker in workers.items():
                    answer = worker.measure("go")
                    measured.add(row, [statistics.median(answer["rates"])], answer["peak"])
                    print(f"round {number + 1}: {row.name} {measured.rates[row.name][-1]:,.1f} images/s", flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    return left_out


def measure_on_gpu(rows: list[Row], measured: Measured, seconds: float, window_s: float) -> dict[str, str]:
    """Rows one after the other until the time is over; returns why some were left out."""
    budget = harness.Notes("train-cuda", seconds=seconds)
    left_out: dict[str, str] = {}
    for precision in ("bfloat16", "float32"):
        measured.able[precision] = [matrix_rate(precision, MATRIX_S, measured.device)] * harness.WINDOWS
    for row in rows:
        if budget.left_s < NEEDS_S[row.mode]:
            left_out[row.name] = f"{budget.left_s:.0f} s were left"
            continue
        try:
            answer = measure_row(row, row.batch or measured.batch_size, measured.device, measured.crop_size, window_s)()
        except Exception as error:  # out of memory, say, or the compiler: the other rows go on
            left_out[row.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            continue
        measured.add(row, answer["rates"], answer["peak"])
        measured.save(left_out)
        print(f"{row.name} {statistics.median(answer['rates']):,.0f} images/s", flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return left_out


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="On a CPU.")
@click.option("--crop-size", type=click.IntRange(64), default=224, show_default=True)
@harness.rounds_option(5)
@harness.DEVICE
@harness.seconds_option(100.0, "Time for all rows on a GPU.")
@click.option("--window", "window_s", default=WINDOW_S, show_default=True, help="Seconds per row and round.")
@click.option("--only", default="", help="Only rows whose names contain this; the bases of ratios come along.")
@click.option("--row", hidden=True)
def main(
    batch_size: int, crop_size: int, rounds: int, device: str, seconds: float, window_s: float, only: str, row: str | None
) -> None:
    """Measure a training step."""
    if row:
        harness.serve({}, measure_row(Row(*json.loads(row)), batch_size, torch.device("cpu"), crop_size, window_s))
        return
    chosen = choose_device(device)
    measured = Measured(batch_size, chosen, crop_size)
    rows = cpu_rows() if chosen.type == "cpu" else cuda_rows()
    if not importlib.util.find_spec("torchvision"):
        rows = [row for row in rows if not row.what.startswith("torchvision")]
    rows = [row for row in rows if only in row.name or row == Row("plain", "float32") or (row.what == OURS and not row.mode)]
    if chosen.type == "cpu":
        left_out = measure_on_cpu(rows, rounds, measured, window_s)
    else:
        left_out = measure_on_gpu(rows, measured, seconds, window_s)
    for name, found in measured.save(left_out).items():
        shares = ", ".join(f"{value:.2f} {key}" for key, value in found.items() if " " in key)
        print(f"{name:<36}{found['images_per_second']:>10,.1f} images/s  {found['peak_bytes'] / 1e6:>7,.0f} MB  {shares}")
    for name, why in left_out.items():
        print(f"{name} was left out: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
