"""The fused operators: their kernels in machine code; the operators compiled and exported."""

import pytest
import torch
import torch.nn.functional as F

from imagefeed.model import fused
from imagefeed.model.lrn import K, formula, shifted
from tests.gpu_kernels import CAPABILITIES, Built, build
from tests.model.test_lrn import pixels

pytest.importorskip("triton")
POINTERS = {"x": "*bf16", "bias": "*fp32", "y": "*bf16", "grad": "*bf16", "dx": "*bf16", "bias_sums": "*fp32", "places": "*u8"}
NUMBERS = ("pixels", "rounds", "columns", "height", "width", "pooled_height", "pooled_width", "blocks")
# Registers of a thread and bytes of shared memory, at most: 128 registers let 16 warps run on each multiprocessor.
BOUNDS = {"norm_forward": (40, 0), "norm_backward": (80, 1024), "pool_forward": (80, 0), "pool_backward": (128, 1024)}


def built_for_conv1(name: str, capability: int, k: float) -> Built:
    from imagefeed.model import fused_kernels

    kernel = getattr(fused_kernels, name)
    types = POINTERS | dict.fromkeys(NUMBERS, "i32") | {"alpha": "fp32"}
    constants = {"C": 96, "WIDTH": 48, "K": k, "RELU": True, "BIASED": True, "P": 32, "Q": 4, "ROWS": fused_kernels.ROWS}
    given = [{n: of[n] for n in kernel.arg_names if n in of} for of in (types, constants)]
    return build(kernel, capability, *(tuple(of.items()) for of in given))


@pytest.mark.parametrize("name, limits", [("norm_backward", (56, 1024)), ("pool_backward", (80, 1024))])
def test_without_normalization_nothing_beside_a_threads_channels_is_loaded(name, limits):
    built = built_for_conv1(name, 90, 0.0)
    assert built.registers <= limits[0] and built.shared <= limits[1] and built.stack == 0
    assert built.loads[16] >= 4 and built.loads[4] == built.loads[2] == 0  # as two neighbors would be


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BOUNDS)
def test_kernels_fit_the_device(name, capability):
    """For conv1 in bfloat16: no spills, 16 bytes at a time, and shared memory only for the sums of the bias's gradient."""
    built = built_for_conv1(name, capability, K)
    registers, shared = BOUNDS[name]
    assert built.registers <= registers and built.shared <= shared and built.stack == 0
    assert built.loads[16] >= 3 and built.loads[2] <= (18 if name == "pool_backward" else 0)
    assert built.stores[16] == (4 if name == "pool_backward" else 1)


def plainly(x, bias, towers: int, alpha: float | None, relu: bool, pooled: bool) -> torch.Tensor:
    a = x if bias is None else x + bias[:, None, None]
    a = F.relu(a) if relu else a
    y = a if alpha is None else formula(a, towers, alpha)
    return F.max_pool2d(y, 3, 2) if pooled else y


class Layer(torch.nn.Module):
    def __init__(self, pooled: bool, relu: bool = True, biased: bool = True, alpha: float | None = 1e-4):
        super().__init__()
        self.alpha = alpha
        self.bias = torch.nn.Parameter(torch.linspace(-60, 60, 16)) if biased else None
        self.pooled, self.relu = pooled, relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings = x * 2, self.bias, 2, self.alpha, self.relu
        return fused.norm_pool(*settings)[0] if self.pooled else fused.norm(*settings)


@pytest.mark.parametrize("pooled", [False, True], ids=["norm", "pool"])
@pytest.mark.parametrize("relu, biased, alpha", [(True, True, 1e-4), (False, False, 2e-5), (True, True, None)])
def test_on_a_cpu_and_compiled_the_operators_are_the_plain_operations(pooled, relu, biased, alpha):
    layer = Layer(pooled, relu, biased, alpha).double()
    x = pixels(2, 16, 7, 9).requires_grad_()
    given = [x, *layer.parameters()]
    wanted = plainly(x * 2, layer.bias, 2, alpha, relu, pooled)
    gradients = torch.autograd.grad(wanted.square().sum(), given)
    for net in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        found = net(x)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(torch.autograd.grad(found.square().sum(), given), gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["norm", "norm_pool"])
def test_the_operators_keep_pytorchs_rules(name):
    """Schema, fake tensors, autograd and dynamic shapes, by torch.library.opcheck."""
    for x in (pixels(2, 16, 5, 7), pixels(1, 8, 3, 3, dtype=torch.bfloat16)):
        given = x.contiguous(memory_format=torch.channels_last).requires_grad_(), torch.ones(x.shape[1]).requires_grad_()
        torch.library.opcheck(getattr(fused, name), (*given, 1, 1e-4, True))


def test_an_exported_program_keeps_the_operator():
    program = torch.export.export(Layer(True).eval(), (pixels(2, 16, 7, 9, dtype=torch.float32),))
    assert [node.target for node in program.graph.nodes].count(torch.ops.imagefeed.norm_pool.default) == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.13's compiler does that
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, towers", [(12, 2), (2, 1), (4, 4), (1, 1)])
def test_the_compilers_form_and_its_gradient_are_those_of_the_formula(channels, towers, dtype):
    x, grad = pixels(2, channels, 3, 4, dtype=dtype).requires_grad_(), pixels(2, channels, 3, 4, dtype=dtype)
    ways = [shifted]
    if channels in (1, 12):  # the narrowest towers and the widest; a compilation takes more than a second
        ways.append(torch.compile(shifted, backend="aot_eager", dynamic=False))
    wanted = formula(x, towers)
    for found in (way(x, towers, 1e-4) for way in ways):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (found, wanted)))
