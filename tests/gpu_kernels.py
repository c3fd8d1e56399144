"""Compiles Triton kernels to machine code on a machine without a GPU."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CAPABILITIES = (80, 90)  # A100; H100 and H200


# Such as ld.global.L1::evict_last.v4.b32: two groups tell the values and the bits of each.
ACCESS = r"\b{}\.global(?:\.[a-zA-Z]\w*::\w+)*(?:\.v(\d))?\.[a-z](\d+)\b"


class Built(NamedTuple):
    """A kernel in machine code: registers of a thread, bytes of its stack (spills) and of shared memory; how many instructions
    load and store so many bytes of the GPU's memory at a time."""

    registers: int
    stack: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]


def widths(ptx: str, instruction: str) -> Counter[int]:
    """From PTX: in machine code, which takes half a second a kernel to disassemble, all kernels' widths were the same."""
    return Counter(int(count or 1) * int(bits) // 8 for count, bits in re.findall(ACCESS.format(instruction), ptx))


@functools.cache
def build(kernel, capability: int, types: tuple[tuple[str, str], ...], constants: tuple[tuple[str, object], ...]) -> Built:
    """Compiles a kernel for a GPU. `types` are those of its arguments: pointers and sizes are multiples of 16, as at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(types) | {name: "constexpr" for name, _ in constants}
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [name for name, kind in types if kind.startswith("*") or name in ("size", "count")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(registers, stack, made.metadata.shared, *(widths(made.asm["ptx"], name) for name in ("ld", "st")))
