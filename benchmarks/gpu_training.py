"""Part "training" of gpu.py: steps on a fixed batch, by net, batch size and compiler, beside what the chip can do."""

import functools
import importlib.util

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_work import Part, fixed_batch, net_and_step, rate
from imagefeed.model.flops import conv_backward_flops, count_flops
from imagefeed.model.nets import build_net

# Of the time that is left, those first that matter most.
EAGER, COMPILED, GRAPHED = None, "default", "reduce-overhead"
ROWS = (
    ("alexnet-owt", 1024, EAGER),
    ("alexnet", 1024, EAGER),
    ("alexnet-owt", 1024, COMPILED),
    ("alexnet", 1024, COMPILED),
    ("torchvision:alexnet", 1024, EAGER),
    ("alexnet-owt", 128, EAGER),
    ("alexnet", 128, EAGER),
    ("torchvision:resnet50", 256, EAGER),
    ("alexnet-owt", 256, EAGER),
    ("alexnet-owt", 512, EAGER),
    ("alexnet-owt", 2048, EAGER),
    ("alexnet", 256, EAGER),
    ("alexnet", 512, EAGER),
    ("alexnet", 2048, EAGER),
    ("alexnet", 1024, GRAPHED),
    ("alexnet-owt", 1024, GRAPHED),
    ("alexnet", 128, GRAPHED),
    ("alexnet-owt", 128, GRAPHED),
    ("torchvision:alexnet", 1024, COMPILED),
    ("torchvision:resnet50", 256, COMPILED),
)
SMALL_ROWS = (("alexnet-owt", 8, EAGER), ("alexnet", 8, EAGER), ("torchvision:resnet50", 4, EAGER))
MODES = {EAGER: "eager", COMPILED: "compiled", GRAPHED: "graphed"}
NEEDS_S = {EAGER: 6, COMPILED: 25, GRAPHED: 25}
CLASSES = 1000
UPDATE_BYTES = 20  # a parameter, of SGD with momentum in one pass


def measure(part: Part) -> None:
    ceilings = part.earlier("ceilings")
    matrix, memory = (ceilings.get(name) for name in ("matrix FLOP/s, bfloat16", "memory bytes/s, read and written"))
    for name, batch_size, mode in SMALL_ROWS if part.small else ROWS:
        row = f"{name}, batch {batch_size}, {MODES[mode]}"
        if name.startswith("torchvision") and not importlib.util.find_spec("torchvision"):
            part.note(row, "left out: torchvision is not installed")
            continue
        if not part.time_for(row, 1 if part.small else NEEDS_S[mode]):
            continue
        try:
            found = train(part, name, batch_size, mode)
        except Exception as error:  # out of memory, or the compiler's: the other rows go on
            part.note(row, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        flops, rate_found = flops_of(name, part.size), found["images_per_second"]
        if matrix:
            found["mfu"] = flops * rate_found / matrix
            found["roofline images/s"] = batch_size / least_seconds(name, batch_size, part.size, matrix, memory)
            found["of the roofline"] = rate_found / found["roofline images/s"]
        part.note(row, found)
        torch._dynamo.reset()
        if part.cuda:
            torch.cuda.empty_cache()


def train(part: Part, name: str, batch_size: int, mode: str | None) -> dict[str, float]:
    images, labels = fixed_batch(batch_size, CLASSES, part.device, part.size)
    _, step = net_and_step(name, CLASSES, part.device, mode, part.size)
    if part.cuda:
        torch.cuda.reset_peak_memory_stats()
    found = rate(lambda: step(images, labels), batch_size, 0.2 if part.small else 1.5, part.device, 2 if part.small else 12)
    if part.cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


@functools.cache
def flops_of(name: str, size: int) -> int:
    return sum(count_flops(build_net(name, CLASSES, crop_size=size), size))


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
            count = conv_backward_of(args, out) if packet == torch.ops.aten.convolution_backward else None
            flops = count if count is not None else flop_registry[packet](*args, **kwargs or {}, out_val=out)
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
            self.found.append((float(flops), 2.0 * sum(tensor.numel() for tensor in tensors)))
        return out


def conv_backward_of(args: tuple, out: tuple) -> int:
    grad, x, weight, *others = args
    return conv_backward_flops(grad.shape, x.shape, weight.shape, *others)


@functools.cache
def least_seconds(name: str, batch_size: int, size: int, matrix: float, memory: float) -> float:
    """Of a step: each product at the matrix rate or the memory's, whichever takes longer, and the update of the weights."""
    net = build_net(name, CLASSES, crop_size=size).to("meta", torch.float64).train()
    images = torch.empty(batch_size, 3, size, size, dtype=torch.float64, device="meta")
    with Products() as products:
        net(images).sum().backward()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return sum(max(f / matrix, b / memory) for f, b in products.found) + UPDATE_BYTES * parameters / memory
