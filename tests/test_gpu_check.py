"""What can be known of the GPU's path without a GPU: `make gpu-check`, at most 100 seconds of CPU time in all."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imagefeed.pipeline.graph import GraphOptions, image_pipeline

ROOT = Path(__file__).parent.parent
# What a machine with PyTorch and a copied DALI may lack.
ABSENT = ("ray", "ruff", "codespell_lib", "mypy", "imageio_ffmpeg", "ffmpeg", "obstore", "xdist", "ffcv", "lightning")
COLLECT = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
if code := pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]):
    sys.exit(code)
import benchmarks.gpu_first, benchmarks.ready
"""


def test_kernels_in_the_interpreter():
    """All in one process, which takes seconds to start; not in this one, as Triton's import decides whether it interprets."""
    pytest.importorskip("triton")
    files = sorted(ROOT.glob("tests/*/interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("views", [1, 10])
def test_all_graphs_for_a_gpu_stop_at_nothing_but_the_missing_device(views):
    """DALI checks an operator's arguments and where its inputs are when the graph is put together: 90 variants."""
    mean_image, problems = np.zeros((256, 256, 3), np.float32), []
    kinds = ({}, {"mean_image": mean_image}, {"boxes": True}, {"jitter": True}, {"boxes": True, "jitter": True})
    dtypes, formats = ("float32", "float16", "uint8"), ("contiguous", "channels_last")
    for dtype, memory_format, load, kind in itertools.product(dtypes, formats, (0.0, 0.65, 1.0), kinds):
        common = {"dtype": dtype, "memory_format": memory_format, "hw_decoder_load": load, "scale": (0.5, 0.5, 0.5)}
        options = GraphOptions(224, views, device_id=0, num_threads=2, **common, **kind)
        try:
            image_pipeline(lambda step: [], 8, options).build()
        except Exception as error:
            if "create a GPU DALI pipeline while CUDA is not available" not in str(error):
                problems.append((options, repr(error)[:200]))
        else:
            pytest.skip("there is a GPU")
    assert problems == []


def test_a_bare_machine_collects_the_tests_of_a_gpu_and_starts_the_measurements():
    command = ["make", "-n", "--no-print-directory", "gpu-test", "PYTHON_GPU=python3"]
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}  # under `make test`
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    files = listed.stdout.rpartition("-m gpu")[2].split()
    assert "tests/test_gpu.py" in files and all((ROOT / name).exists() for name in files)
    command = [sys.executable, "-c", COLLECT, ",".join(ABSENT), "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every_image" in done.stdout and " error" not in done.stdout
