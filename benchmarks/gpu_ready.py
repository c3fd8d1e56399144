"""Says by name what this Python lacks for tests and benchmarks on a GPU, after building those extensions that it cannot load.

    python3 -m benchmarks.gpu_ready

For a machine without `make install`: one that has PyTorch, but no package registry. The extensions (setup.py) are for Python's
stable interface, so that files built elsewhere on x86-64 do as well; preprocess/codec's has to find there the libjpeg that it was
built with, libjpeg.so.62 of Debian, say: a copy in a folder of LD_LIBRARY_PATH.
"""

import importlib.util
import subprocess
import sys

from benchmarks import ROOT

NEEDED = ("torch", "nvidia.dali", "numpy", "PIL", "click", "simplejpeg", "google_crc32c", "pytest", "rich", "matplotlib")
# What only some rows and tests ask for.
WANTED = ("torchvision", "scipy")
EXTENSIONS = {
    "preprocess/codec": "a C compiler, and libjpeg-turbo's headers",
    "pipeline/kernels": "a C compiler",
    "model/kernels": "a C compiler",
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False


def why_not(extension: str) -> str:
    """Why the extension cannot be loaded; nothing where it can."""
    found = "it is not built"
    for path in ROOT.glob(f"{extension}*.so"):
        spec = importlib.util.spec_from_file_location(extension.rpartition("/")[2], path)
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except ImportError as error:
            found = str(error)
        else:
            return ""
    return found


def main() -> None:
    lacking = [f"{module} is not installed" for module in NEEDED if not installed(module)]
    if any(map(why_not, EXTENSIONS)):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if built.returncode:
            print(built.stdout + built.stderr, file=sys.stderr)
    for extension, needed in EXTENSIONS.items():
        why = why_not(extension)
        lacking += [f"{extension}: {why}; building it takes {needed}"] if why else []
    for module in WANTED:
        if not installed(module):
            print(f"{module} is not installed; what needs it is left out")
    if lacking:
        raise SystemExit("\n".join([f"{sys.executable} cannot run this:", *lacking]))
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"{sys.executable}: PyTorch {torch.__version__} finds no usable GPU here")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: ready")


if __name__ == "__main__":
    main()
