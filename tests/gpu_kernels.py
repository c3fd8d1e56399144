"""What tests do with Triton kernels on a machine without a GPU: run them in Triton's interpreter, and compile them."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

CAPABILITIES = (80, 90)  # A100; H100 and H200
ROOT = Path(__file__).parent.parent


def interpreted(module: str) -> None:
    """Runs the tests of a module in a process of its own: Triton decides at its import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / module]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout[-4000:] + done.stderr[-1000:])


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
            for program, *options in (("cuobjdump", "-res-usage"), ("nvdisasm",))
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Built(registers, stack, made.metadata.shared, code)
