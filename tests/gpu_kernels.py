"""Compiles Triton kernels to machine code on a machine without a GPU."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

CAPABILITIES = (80, 90)  # A100; H100 and H200


class Built(NamedTuple):
    """A kernel in machine code: registers of a thread, bytes of its stack (spills), bytes of shared memory, instructions."""

    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}\b(?!\.)", self.code))


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
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / program, *options, file.name], capture_output=True, text=True, check=True).stdout
            for program, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-ndf", "-novliw"))  # half the time
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(registers, stack, made.metadata.shared, code)
