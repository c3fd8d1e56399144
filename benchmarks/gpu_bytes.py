"""How many bytes does a training step move on a GPU, and how many kernels does it launch? Counted, not measured.

    make gpu-bytes PYTHON_GPU=python3

By the compiler's own count of the code that it writes for sm_90, here without a GPU: each array that a kernel reads or writes
once, so what a cache cannot hold is not in it. Needs a CUDA build of PyTorch. Loss, optimizer and loader are not counted.
"""

import tempfile
from pathlib import Path
from unittest import mock

import click
import torch

from benchmarks import harness
from benchmarks.gpu_standins import Pass, compiled, has_cuda_build, standing_in, start_with_standins
from imagefeed.model import fused
from imagefeed.model.arrangement import Arrangement, arrange
from imagefeed.model.nets import build_net

# Elements of conv1's and conv2's outputs, which are normalized.
NORMALIZED = 96 * 55 * 55 + 256 * 27 * 27
BARE = "without normalization, by the compiler"
COMBINED = "small kernels combined"  # an option of the compiler, which joins the casts of weights
ROWS: dict[str, tuple[str, dict, Arrangement, bool]] = {  # net, its options, arrangement, whether by our kernels
    "alexnet": ("alexnet", {}, Arrangement(), True),
    BARE: ("alexnet", {"lrn": False}, Arrangement(), False),
    "without normalization": ("alexnet", {"lrn": False}, Arrangement(), True),
    "normalization and pool apart": ("alexnet", {}, Arrangement(pooled=False), True),
    "normalization by the compiler": ("alexnet", {}, Arrangement(), False),
    "towers apart": ("alexnet", {}, Arrangement(apart=True), True),
    "conv1 over cells": ("alexnet", {}, Arrangement(folded=True), True),
    COMBINED: ("alexnet", {}, Arrangement(), True),
    "alexnet-owt": ("alexnet-owt", {}, Arrangement(), True),
}


def count(row: str, batch_size: int) -> list[Pass]:
    name, options, arrangement, by_kernel = ROWS[row]

    def make() -> torch.nn.Module:
        net = build_net(name, 1000, **options)
        arrange(net, arrangement)
        return net

    with mock.patch.object(fused, "HAS_TRITON", by_kernel), standing_in():
        settings = {"combo_kernels": True, "combo_kernels_pointwise_only": True} if row == COMBINED else None
        return compiled(make, (batch_size, 3, 224, 224), torch.bfloat16, settings)


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--only", default="", help="Only rows whose names contain this.")
@click.option("--save/--no-save", default=True, show_default=True, help="Save the counts in benchmarks/results.")
def main(batch_size: int, only: str, save: bool) -> None:
    """Count the bytes and launches of a training step."""
    if not has_cuda_build():
        raise click.ClickException(
            "this PyTorch is built for CPUs; give a Python with a CUDA build: make gpu-bytes PYTHON_GPU=..."
        )
    with tempfile.TemporaryDirectory() as folder:
        start_with_standins(Path(folder))
    found: dict[str, dict[str, object]] = {}
    for row in [row for row in ROWS if only in row]:
        forward, backward = sorted(count(row, batch_size), key=lambda part: part.backward)
        calls = 4 if ROWS[row][2].apart else 2  # of conv1 and conv2, the first forward and the last backward
        ours = [[moved for name, moved in part.by_call if "imagefeed" in name] for part in (forward, backward)]
        of_both = sum(ours[0][:calls]), sum(ours[1][-calls:])
        found[row] = {
            "forward_bytes": forward.bytes_moved,
            "backward_bytes": backward.bytes_moved,
            "launches": forward.launches + backward.launches,
        } | ({"bytes_an_element": [round(n / batch_size / NORMALIZED, 2) for n in of_both]} if any(of_both) else {})
        print(f"{row}: {found[row]}", flush=True)
    bare = found.get(BARE)
    for row, counts in found.items():
        if bare and ROWS[row][0] == "alexnet":
            moved, least = (one["forward_bytes"] + one["backward_bytes"] for one in (counts, bare))
            counts[f"to the net {BARE}"] = round(moved / least, 3)
    if save:
        harness.save("gpu_bytes", {"batch_size": batch_size, "precision": "bfloat16", "rows": found}, "torch", "triton")


if __name__ == "__main__":
    main()
