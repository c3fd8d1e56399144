"""What a GPU machine can do and how near to it imagefeed comes: all in one call, in under ten minutes.

    python -m benchmarks.gpu [--seconds 570] [--raw RAW] [--data DATASET] [--cifar CIFAR] [--folder DIR]     # results under "gpu"
    python -m benchmarks.gpu --device cpu --small                 # whether all of it runs, in some minutes; nothing is kept

The parts, each a process of its own, so that one that fails or hangs is named and the next one runs; one that is stopped keeps
what it has measured:

    ceilings   memory, copies, matrix products; the hardware decoder, the CUDA decoder, the CPU by threads; their pixels
    loader     the loader alone by hardware share, threads, batch, prefetch and type, beside decoding alone and DALI's own reader
    tune       what `pipeline tune` finds, beside the sweep
    training   steps on one batch: nets, batch sizes, eager, compiled, graphed; MFU, and the roofline of the matrix products
    together   loader and training, cold, warm, cached: shares of the smaller of the two, and of training on one batch
    verdicts   what the profiler names, of these and of faults that only a GPU has
    learning   CIFAR-10 from JPEG files by two recipes, beside a plain loop for as long
    rescale    raw images to 256 pixels on the GPU, beside `build` on all cores

RAW are raw images, drawn where none are given; DATASET one built of 256-pixel images, made from RAW where none is given, and then
repeated to several times any cache; CIFAR a folder or tar of SPLIT/CLASS/IMAGE. With --folder data and what was measured stay,
and a later call with --only adds to it. It asks for no package registry.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks import ROOT, save
from benchmarks.gpu_table import rows

# By how much of the time that is left each may take, beside those that follow.
SHARES = {
    "ceilings": 30,
    "loader": 105,
    "tune": 72,
    "training": 100,
    "together": 60,
    "verdicts": 70,
    "learning": 110,
    "rescale": 15,
}
GRACE_S = 5  # after which a part that has not ended is killed


def run(name: str, folder: Path, device: str, small: bool, seconds: float) -> str:
    """Runs a part; returns why it has no result, or not all of it; nothing where it has."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--folder", folder, "--device", device]
    command += ["--seconds", f"{seconds:.1f}", "--began", f"{time.time():.3f}"] + ["--small"] * small
    log = folder / f"{name}.log"
    with open(log, "w") as errors:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=errors, start_new_session=True)
        try:
            process.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds + GRACE_S:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
            process.wait()
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()] or ["no output"]
    return f"ended with {process.returncode}: {lines[-1][:300]}"


def run_part(name: str, folder: Path, device: str, small: bool, seconds: float, began: float) -> None:
    import torch

    from benchmarks import gpu_ceilings, gpu_learning, gpu_loader, gpu_rescale, gpu_together, gpu_training, gpu_verdicts
    from benchmarks.gpu_work import Part
    from imagefeed.pipeline.loader import choose_device

    parts = {
        "ceilings": gpu_ceilings.measure,
        "loader": gpu_loader.measure,
        "tune": gpu_loader.tune,
        "training": gpu_training.measure,
        "together": gpu_together.measure,
        "verdicts": gpu_verdicts.measure,
        "learning": gpu_learning.measure,
        "rescale": gpu_rescale.measure,
    }
    if small:
        torch.set_num_threads(1)
    begin_s = time.perf_counter() - (time.time() - began)  # its start, imports included, is part of its time
    parts[name](Part(name, folder, choose_device(device), small, seconds, begin_s))


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="A little of everything; nothing is kept.")
@click.option("--seconds", default=570.0, show_default=True, help="That all of it may take.")
@click.option("--only", multiple=True, type=click.Choice(list(SHARES)), help="Of the parts.")
@click.option("--raw", type=click.Path(path_type=Path, exists=True), help="Folders of raw images.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="A dataset of 256-pixel images.")
@click.option("--cifar", type=click.Path(path_type=Path, exists=True), help="CIFAR-10 as JPEG files, a folder or a tar.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where data and logs lie, and stay.")
@click.option("--part", type=click.Choice(list(SHARES)), hidden=True)
@click.option("--began", type=float, hidden=True)
def main(
    device: str,
    small: bool,
    seconds: float,
    only: tuple[str, ...],
    raw: Path | None,
    data: Path | None,
    cifar: Path | None,
    folder: Path | None,
    part: str | None,
    began: float | None,
) -> None:
    """Measure all of it, or some parts."""
    if part:
        run_part(part, folder, device, small, seconds, began)
        return
    end_s = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        folder = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        from benchmarks.gpu_data import prepare

        about = prepare(folder, raw and raw.resolve(), data and data.resolve(), small)
        print(f"data: {about}", flush=True)
        if cifar and not (folder / "cifar").exists():
            (folder / "cifar").symlink_to(cifar.resolve())
        failed: dict[str, str] = {}
        spent: dict[str, float] = {}
        names = [name for name in SHARES if not only or name in only]
        for number, name in enumerate(names):
            share = SHARES[name] / sum(SHARES[other] for other in names[number:])
            start_s = time.monotonic()
            why = run(name, folder, device, small, max((end_s - start_s - GRACE_S) * share, 1))
            spent[name] = time.monotonic() - start_s
            print(f"{name}: {spent[name]:.0f} s{f', {why}' if why else ''}", flush=True)
            if why:
                failed[name] = why
        found = {name: json.loads(path.read_text()) for name in SHARES if (path := folder / f"{name}.json").exists()}
        result = {"data": about, "seconds": spent, "failed": failed, "parts": found}
        place = {"folder": folder} if small or device == "cpu" else {}
        path = save("gpu-small" if place else "gpu", result, "torch", "nvidia-dali-cuda130", **place)
        table = list(rows(found))
        width = max(len(what) for what, _, _ in table)
        print(f"\n{'':<{width}}  figure")
        for what, figure, goal in table:
            print(f"{what:<{width}}  {figure}{f'    (goal {goal})' if goal else ''}")
        for name, why in failed.items():
            print(f"{name}: {why}")
        print(f"{path}: {sum(spent.values()):.0f} s in all")


if __name__ == "__main__":
    main()
