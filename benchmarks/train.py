"""How fast is a training step on a fixed batch, beside plain PyTorch, other nets, and the limits of the device?

    python -m benchmarks.train [--batch-size 128] [--device cuda] [--seconds 100]     # results under "train" or "train-cuda"

    alexnet            the paper's net by train.py's step: channels-last, fused SGD, normalization in one pass
    ..., no lrn        the same without normalization; alexnet-owt has none either
    ..., NCHW          with contiguous images and weights; "SGD not fused"; "4 channels": a fourth of zeros beside RGB
    plain              the paper's net as people write it: nn.LocalResponseNorm for each tower, nn.Dropout, NCHW, SGD
    torchvision:NAME   its nets by train.py's step, if it is installed
    ..., compiled      by torch.compile; "graphed" with CUDA graphs of the net (reduce-overhead), "one graph" with one of the step
    lrn                normalization of the outputs of conv1 and conv2 alone, forward and backward: ours, nn.LocalResponseNorm,
                       and the plain formula through torch.compile

On a CPU each row is a process, because the allocator's settings (model.step.keep_memory) hold for a whole process; they take
turns, without bfloat16 if it is only emulated. On a GPU the rows follow each other, the most important first, until time is up.
"to matrix products" is the MFU by the products that the device really does; the roofline is what they and the memory allow.
"""

import functools
import importlib.util
import json
import os
import resource
import statistics
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
from imagefeed.model.flops import conv_backward_flops, count_flops
from imagefeed.model.graphed import WARM_UP, GraphedStep, open_recorder
from imagefeed.model.lrn import formula, local_response_norm
from imagefeed.model.nets import build_net
from imagefeed.model.step import EMULATED, keep_memory, time_conv2, train_step
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.profiler.limits import matrix_rate, memory_rate

CLASSES = 1000
MODES = {"": None, "compiled": "default", "graphed": "reduce-overhead", "one graph": "graph"}
WINDOW_S, MATRIX_S = 2.0, 0.5
NEEDS_S, NEEDS_COMPILED_S = 6, 25  # for a row on a GPU
UPDATE_BYTES = 20  # read and written per parameter by SGD with momentum in one pass


class Row(NamedTuple):
    what: str
    precision: str = "bfloat16"
    mode: str = ""
    batch: int | None = None  # None: --batch-size

    @property
    def name(self) -> str:
        return ", ".join(filter(None, [self.what, self.mode, self.precision, f"batch {self.batch}" if self.batch else ""]))

    @property
    def net(self) -> str:
        return "alexnet" if self.what == "plain" else self.what.partition(", ")[0]


def rows_on(gpu: bool) -> list[Row]:
    otherwise = [f"alexnet, {how}" for how in ("no lrn", "NCHW", "SGD not fused", "4 channels")]
    lrns, nets = ["lrn", "lrn plain", "lrn compiled"], ["alexnet-owt", "alexnet"]
    if not gpu:  # where the compiler's kernels are slower (docs/log.md)
        single, half = (time_conv2(dtype, 1, 2) for dtype in (torch.float32, torch.bfloat16))
        precisions = ("float32", "bfloat16") if half < EMULATED * single else ("float32",)
        names = ["plain", *nets, "torchvision:alexnet", *otherwise, *lrns]
        rows = [Row(what, precision) for what in names for precision in precisions]
    else:
        rows = [Row(net, mode=mode, batch=1024) for net in nets for mode in ("", "compiled")]
        small = [Row(net, mode=mode, batch=128) for net in nets[::-1] for mode in ("compiled", "one graph", "graphed")]
        rows += [*small[:2], Row(otherwise[0], mode="compiled", batch=1024), *small[2:]]
        rows += [Row(what, precision, batch=1024) for what, precision in (("plain", "bfloat16"), ("plain", "float32"))]
        rows += [Row("alexnet", "float32", "compiled", 1024), Row("torchvision:alexnet", mode="compiled", batch=1024)]
        rows += [Row(what, batch=1024) for what in otherwise[1:]] + [Row(what, batch=128) for what in lrns]
        rows += [Row(net, mode="compiled", batch=batch) for net in nets for batch in (256, 512, 2048)]
    installed = importlib.util.find_spec("torchvision")
    return [row for row in rows if installed or not row.what.startswith("torchvision")]


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
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.LazyLinear(4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, CLASSES),
    )  # fmt: skip


def fixed_batch(batch_size: int, classes: int, device: torch.device, crop_size: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch_size, 3, crop_size, crop_size, device=device) * 50
    return images, torch.randint(0, classes, (batch_size,), device=device)


def step_of(
    net: nn.Module,
    device: torch.device,
    precision: str = "",
    layout=torch.channels_last,
    mode: str | None = None,
    fused: bool = True,
) -> Callable[..., object]:
    """step(images, labels), which trains the net as train.py does, in bfloat16 on a GPU and float32 on a CPU unless given. `mode`
    is the compiler's, for a GPU, or "graph". The learning rate is 0: only time counts."""
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    net.to(device, memory_format=layout)
    if mode and device.type == "cuda":
        net.compile(mode="default" if mode == "graph" else mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=fused)
    if mode == "graph":
        return GraphedStep(net, optimizer, precision, open_recorder(device))

    def step(images: torch.Tensor, labels: torch.Tensor, on_phase: Callable[[str], None] = lambda phase: None):
        return train_step(net, images, labels, optimizer, precision, on_phase, layout)

    return step


def make_step(row: Row, batch_size: int, device: torch.device, crop_size: int) -> Callable[[], object]:
    """What the row does again and again."""
    if row.what not in ("plain", "lrn plain"):
        keep_memory()
    if row.what.startswith("lrn"):
        return lrn_step(row, batch_size, device)
    images, labels = fixed_batch(batch_size, CLASSES, device, crop_size)
    how = row.what.partition(", ")[2]
    plain = row.what == "plain"
    if plain:
        net = plain_net().to(device)
        net(images[:2])  # the lazy layer gets its size
    else:
        net = build_net(row.net, CLASSES, crop_size=crop_size, lrn=how != "no lrn")
    if how == "4 channels":
        net.conv1, images = nn.Conv2d(4, 96, 11, stride=4), F.pad(images, (0, 0, 0, 0, 0, 1))
    layout = torch.contiguous_format if plain or how == "NCHW" else torch.channels_last
    step = step_of(net, device, row.precision, layout, MODES[row.mode], not plain and how != "SGD not fused")
    return functools.partial(step, images, labels)


def lrn_step(row: Row, batch_size: int, device: torch.device) -> Callable[[], object]:
    dtype, plain = getattr(torch, row.precision), row.what == "lrn plain"
    ours = torch.compile(formula) if row.what == "lrn compiled" else local_response_norm
    norm = TowersOfLrn() if plain else lambda x: ours(x, 2)
    inputs = []
    for shape in ((96, 55, 55), (256, 27, 27)):
        x = torch.randn(batch_size, *shape, device=device, dtype=dtype) * 100
        x = x.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)
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
        if packet in flop_registry:
            if packet == torch.ops.aten.convolution_backward:
                grad, x, weight, *others = args
                flops = conv_backward_flops(grad.shape, x.shape, weight.shape, *others)
            else:
                flops = flop_registry[packet](*args, **kwargs or {}, out_val=out)
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
    """Warms up; returns what measures images per second, in windows, and the peak of memory in bytes."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make_step(row, row.batch or batch_size, device, crop_size)
    harness.window_rates(step, row.batch or batch_size, 0, device, WARM_UP)

    def measure(_request: object) -> dict:
        rates = harness.window_rates(step, row.batch or batch_size, window_s, device, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"rates": rates, "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak}

    return measure


def bases_of(row: Row) -> dict[str, Row]:
    """The rows to which this one's rate is compared."""
    if row.what.startswith("lrn"):
        return {"to nn.LocalResponseNorm": row._replace(what="lrn plain")} if row.what == "lrn" else {}
    bases = {"to plain float32": row._replace(what="plain", precision="float32", mode="")}
    if row.what == "alexnet":
        bases["to the net without lrn"] = row._replace(what="alexnet, no lrn")
    elif ", " in row.what and "no lrn" not in row.what:
        bases["to alexnet"] = row._replace(what="alexnet")
    return bases


def summarize(row: Row, rates: dict[Row, list[float]], able: list[float], memory: float, batch: int, crop_size: int) -> dict:
    """The row's rates, and their share of other rows' and of what the device is able to do."""
    found = {"images_per_second": statistics.median(rates[row]), "rounds": rates[row]}
    found |= {name: round(harness.ratio(rates, row, base), 3) for name, base in bases_of(row).items() if base in rates}
    if not row.what.startswith("lrn"):
        flops = sum(count_flops(build_net(row.net, CLASSES, crop_size=crop_size), crop_size))
        found["to matrix products"] = round(statistics.median(flops * rate / most for rate, most in zip(rates[row], able)), 3)
        if row.what == row.net:
            least_s = least_seconds(row.net, batch, crop_size, statistics.median(able), memory)
            found["of the roofline"] = round(found["images_per_second"] * least_s / batch, 3)
    return found


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="On a CPU.")
@click.option("--crop-size", type=click.IntRange(64), default=224, show_default=True)
@harness.rounds_option(5)
@harness.DEVICE
@harness.seconds_option(100.0, "Time for all rows on a GPU.")
@click.option("--window", "window_s", default=WINDOW_S, show_default=True, help="Seconds per row and round.")
@click.option("--only", default="", help="Only rows whose names contain this; the bases of ratios come along.")
@click.option("--as-on-gpu", is_flag=True, help="On a CPU too: a GPU's rows, in this process, uncompiled, to see that they run.")
@click.option("--row", hidden=True)
def main(
    batch_size: int, crop_size: int, rounds: int, device: str, seconds: float, window_s: float, only: str, as_on_gpu: bool,
    row: str | None,
) -> None:  # fmt: skip
    """Measure a training step."""
    device = choose_device(device)
    common = (batch_size, device, crop_size, window_s)
    if row:
        harness.serve({}, measure_row(Row(*json.loads(row)), *common))
        return
    cuda = as_on_gpu or device.type == "cuda"
    rows = [row for row in rows_on(cuda) if only in row.name or (row.what in ("plain", "alexnet") and not row.mode)]
    if device.type == "cpu":
        single = {"precision": "float32"} if as_on_gpu else {}  # many processors emulate bfloat16
        rows = list(dict.fromkeys(row._replace(batch=None, **single) for row in rows))
    rates, peaks, able = {}, {}, {}
    notes = harness.Notes(harness.named("train", device), "torch", seconds=seconds if cuda else float("inf"))
    memory, left_out = memory_rate(MATRIX_S, device), {}

    def save_rows() -> None:
        notes.update({"batch_size": batch_size, "matrix_flops_a_second": able, "left_out": left_out})
        shares = {row: summarize(row, rates, able[row.precision], memory, row.batch or batch_size, crop_size) for row in rates}
        notes["rows"] = {row.name: share | {"peak_bytes": peaks[row]} for row, share in shares.items()}

    with harness.Workers() as workers:
        if not cuda:
            options = ["--batch-size", batch_size, "--crop-size", crop_size, "--window", window_s, "--device", "cpu"]
            for row in rows:
                workers.start(row, harness.python("benchmarks.train", "--row", json.dumps(row), *options))
            left_out |= {row.name: about["missing"] for row, about in workers.ready().items() if "missing" in about}
        for number in range(1 if cuda else rounds):
            for precision in {row.precision for row in rows}:
                rate = matrix_rate(precision, MATRIX_S, device)
                able.setdefault(precision, []).extend([rate] * (harness.WINDOWS if cuda else 1))
            for row in rows:
                if cuda and notes.left_s < (NEEDS_COMPILED_S if row.mode and device.type == "cuda" else NEEDS_S):
                    left_out[row.name] = f"{notes.left_s:.0f} s were left"
                if row.name in left_out:
                    continue
                try:
                    answer = measure_row(row, *common)(None) if cuda else workers.measure(row, "go")
                except Exception as error:  # out of memory, say, or the compiler: the other rows go on
                    left_out[row.name] = f"{type(error).__name__}: {str(error)[:150]}"
                    continue
                peaks[row] = answer["peak"]
                rates.setdefault(row, []).extend(answer["rates"] if cuda else [statistics.median(answer["rates"])])
                print(f"round {number + 1}: {row.name} {rates[row][-1]:,.1f} images/s", flush=True)
                if cuda:
                    save_rows()
            save_rows()


if __name__ == "__main__":
    main()
