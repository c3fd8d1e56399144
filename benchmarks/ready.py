"""Names what this Python lacks for tests and benchmarks on a GPU, after building the extensions that it cannot load.

For a machine without `make install`, one that has PyTorch but no package registry: python3 -m benchmarks.ready. The extensions
use Python's stable interface, so that files built elsewhere on x86-64 work too; but codec/libjpeg needs the libjpeg that it
was built with, such as Debian's libjpeg.so.62: a copy in a folder of LD_LIBRARY_PATH is enough.
"""

import subprocess
import sys

from benchmarks.harness import ROOT

NEEDED = "torch nvidia.dali numpy PIL click simplejpeg google_crc32c pytest rich jinja2 matplotlib".split()
WANTED = ("torchvision", "scipy")  # only some rows and tests
# With what building them takes.
EXTENSIONS = {
    f"imagefeed.{name}": "a C compiler"
    for name in ("codec.decoder", "dataset.gather", "pipeline.augment_kernels", "model.kernels")
}
EXTENSIONS["imagefeed.codec.libjpeg"] = "a C compiler, and libjpeg-turbo's headers"


def why_not(module: str) -> str:
    """Why the module cannot be imported; empty if it can. Asks another process: a failed import cannot be tried again."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def main() -> None:
    lacking = [f"{module}: {why}" for module in NEEDED if (why := why_not(module))]
    if not lacking and any(map(why_not, EXTENSIONS)):
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, stdout=sys.stderr)
        lacking = [f"{name}: {why}; building it takes {EXTENSIONS[name]}" for name in EXTENSIONS if (why := why_not(name))]
    for module in WANTED:
        if why_not(module):
            print(f"{module} is not installed; what needs it is left out")
    if lacking:
        raise SystemExit("\n".join([f"{sys.executable} cannot run this:", *lacking]))
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"{sys.executable}: PyTorch {torch.__version__} finds no usable GPU here")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: ready")


if __name__ == "__main__":
    main()
