"""Makes PyTorch's compiler write its code for an H100 or H200 (sm_90) without a GPU, and counts what that code moves.

    with standing_in():
        passes = compiled(make_net, (1024, 3, 224, 224), torch.bfloat16)

Needs a CUDA build of PyTorch with Triton. Tensors are fake, no kernel runs. gpu_standins.c answers for CUDA's libraries; here are
the answers in Python: the device's properties, and a module that does nothing in place of the compiled one. Convolutions are
taken to be channels-last, as cuDNN computes them for channels-last inputs.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

SOURCE = Path(__file__).with_suffix(".c")
# NVIDIA H100 Tensor Core GPU Architecture, and the H200's data sheet: the same processor.
PROPERTIES = {
    "name": "sm_90", "major": 9, "minor": 0, "multi_processor_count": 132, "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536, "max_threads_per_block": 1024, "warp_size": 32, "total_memory": 80 << 30,
    "L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 232448, "shared_memory_per_block": 49152,
    "shared_memory_per_multiprocessor": 233472, "gcnArchName": "",
}  # fmt: skip
# A Triton kernel, a library's, an operator's: how it is called in the compiler's code.
LAUNCH = re.compile(r"(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(\w+\.\w+)\.\w+\(")
MORE = {"imagefeed.norm_pool_backward": 1, "imagefeed.norm_backward": 1}  # the sums for the bias


class Pass(NamedTuple):
    """A forward or backward pass: bytes moved, each operand of a kernel counted once, in all and by call; launches."""

    backward: bool
    bytes_moved: int
    by_call: list[tuple[str, int]]  # operators, or "triton" for the compiler's kernels, in order
    launches: int
    code: str


def start_with_standins(folder: Path) -> None:
    """Starts this program again with the stand-ins for CUDA's libraries, which it builds in `folder`, unless they are there."""
    if "GPU_STANDINS" in os.environ:
        return
    library = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    caches = {name: str(folder / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    own = {"GPU_STANDINS": "1", "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": ":".join(paths)} | caches
    os.execve(sys.executable, [*sys.orig_argv], os.environ | own)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Within it PyTorch compiles for the device of PROPERTIES."""
    import torch._dynamo.device_interface as interface
    import torch._functorch.config
    import torch._inductor.config
    import triton
    from torch._functorch._aot_autograd.schemas import AOTConfig
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    properties = types.SimpleNamespace(**PROPERTIES)

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_device_interface(self):
            return torch.cuda

    def answer(value):
        return lambda *_, **__: value

    made = AOTConfig.__init__

    def at_once(self, *arguments, **options):
        made(self, *arguments, **options)
        # There is no backward pass that would ask for it. From torch 2.13 on the class is frozen.
        object.__setattr__(self, "force_non_lazy_backward_lowering", True)

    cuda = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None, "is_initialized": False,
        "get_device_properties": properties, "get_device_capability": (9, 0), "get_device_name": properties.name,
        "synchronize": None, "mem_get_info": (70 << 30, 80 << 30), "is_bf16_supported": True, "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    dynamo = {
        "get_device_properties": properties, "get_compute_capability": 90, "is_available": True, "is_triton_capable": True,
        "raise_if_triton_unavailable": None, "current_device": 0, "device_count": 1,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        for name, value in dynamo.items():
            stack.enter_context(mock.patch.object(interface.CudaInterface, name, staticmethod(answer(value))))
        for name, value in {"get_device_properties": properties, "current_device": 0}.items():
            stack.enter_context(mock.patch.object(interface.CudaInterface.Worker, name, staticmethod(answer(value))))
        stack.enter_context(mock.patch.object(AOTConfig, "__init__", at_once))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", answer(None)))
        stack.enter_context(mock.patch.object(torch._C, "_select_conv_backend", answer(None)))
        layout = answer(torch.channels_last)
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", layout))
        for name in ("fuse_attention._sfdp_init", "pad_mm._pad_mm_init", "misc_patterns._misc_patterns_init"):
            stack.enter_context(mock.patch(f"torch._inductor.fx_passes.{name}", answer(None)))  # would run on the device
        settings = {"compile_threads": 1, "fx_graph_cache": False, "joint_graph_constant_folding": False}
        stack.enter_context(torch._inductor.config.patch(settings))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        triton.runtime.driver.set_active(Driver())
        yield


def compiled(
    make: Callable[[], torch.nn.Module], shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, object] | None = None
) -> list[Pass]:
    """Forward and backward pass of a net for images of a shape and type, in bfloat16 by autocast."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[Pass] = []

    def count(graph):
        code = graph.codegen()[0].value
        total, nodes, _ = graph.count_bytes()
        by_call: list[tuple[str, int]] = []
        for node, words in nodes:
            name = str(getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", "") or "triton")
            by_call.append((name, 4 * words))
        calls = [next(filter(None, call)) for call in LAUNCH.findall(code[code.rindex("def call(self, args)") :])]
        launches = len(calls) + sum(MORE.get(name, 0) for name in calls)
        found.append(Pass(bool(graph.is_backward), int(total), by_call, launches, code))
        return types.SimpleNamespace(call=lambda arguments: None)

    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name in ("normal_", "constant_", "kaiming_uniform_", "uniform_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", count))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        with torch.device("cuda:0"):
            net = make()
        for layer in net.modules():  # as .to(memory_format=torch.channels_last), which fake tensors do not follow
            if isinstance(layer, torch.nn.Conv2d):
                weight = torch.empty(layer.weight.shape, device="cuda:0").contiguous(memory_format=torch.channels_last)
                layer.weight = torch.nn.Parameter(weight)
        images = torch.empty(shape, dtype=dtype, device="cuda:0").contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16), contextlib.suppress(TypeError):  # the module's answer is None
            torch.compile(net.train(), options=options)(images)
    return found


def has_cuda_build() -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
    return torch.version.cuda is not None
