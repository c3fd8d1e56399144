"""What can the machine do at most, and how far are the pixels of its JPEG decoders apart?

    python -m benchmarks.ceilings DATASET [--device cuda]     # results under "ceilings" or "ceilings-cuda"

Memory and copies in bytes/s, matrix products in FLOP/s, decoding alone by the hardware decoder, the CUDA decoder and 1 to 64
threads of the CPU in images/s; JPEGs are padded to one length, as the loader hands them over, and once are not.
"""

import itertools
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks import harness
from benchmarks.data import jpeg_batches
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.arguments import choose_device
from imagefeed.pipeline.gpu import why_no_hardware_decoder
from imagefeed.pipeline.graph import HW_DECODER_LOAD, GraphOptions, decode_pipeline
from imagefeed.pipeline.profiler.limits import copy_rate, matrix_rate, memory_rate, native_rate

KEPT = 8  # batches, decoded over and over


def decode_rate(jpegs: list, threads: int, seconds: float, device: torch.device, hw_load: float = 0.0) -> float:
    """Images/s; batches are arrays of padded JPEGs, as the loader has them, or lists of JPEGs of their own lengths."""
    graph = GraphOptions(224, device_id=0 if device.type == "cuda" else None, num_threads=threads, hw_decoder_load=hw_load)
    batches = itertools.cycle(jpegs)
    pipeline = decode_pipeline(lambda i: [next(batches)], len(jpegs[0]), graph)
    return harness.window_rate(pipeline.run, len(jpegs[0]), seconds, device, graph.prefetch + 2)


def length(row: np.ndarray) -> int:
    """The bytes of a JPEG that zeros follow."""
    return int(np.flatnonzero(row)[-1]) + 1


def decoded(jpegs: np.ndarray, device_id: int | None, **options) -> list[np.ndarray]:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(len(jpegs), harness.cores(), device_id, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(lambda: jpegs, batch=True)
        device = "cpu" if device_id is None else "mixed"
        pipeline.set_outputs(fn.decoders.image(data, device=device, output_type=types.RGB, **options))
    (images,) = pipeline.run()
    images = images if device_id is None else images.as_cpu()
    return [np.array(images[n], np.float32) for n in range(len(jpegs))]


def pixels_apart(jpegs: np.ndarray, **options) -> dict[str, float]:
    """Gray levels between the GPU's pixels and the CPU's."""
    apart = [found - right for found, right in zip(decoded(jpegs, 0, **options), decoded(jpegs, None), strict=True)]
    luma = [float(np.abs(image @ (0.299, 0.587, 0.114)).mean()) for image in apart]
    mean, highest = np.mean([np.abs(image).mean() for image in apart]), max(np.abs(image).max() for image in apart)
    return {"mean": float(mean), "highest": float(highest), "luma, worst image's mean": max(luma)}


@click.command()
@harness.DATASET
@harness.DEVICE
@harness.seconds_option(0.5, "Time for each rate of memory and arithmetic; decoding takes four times that.")
@click.option("--batch-size", default=512, show_default=True)
def main(dataset: Path, device: str, seconds: float, batch_size: int) -> None:
    """Measure the machine's limits; DATASET provides JPEGs."""
    device = choose_device(device)
    notes = harness.Notes(harness.named("ceilings", device), "torch", "nvidia-dali-cuda130")
    notes["memory bytes/s, read and written"] = memory_rate(seconds, device)
    for precision in ("bfloat16", "float32"):
        notes[f"matrix FLOP/s, {precision}"] = matrix_rate(precision, seconds, device)
    jpegs = jpeg_batches(Manifest.load(dataset), batch_size, KEPT)
    if device.type == "cuda":
        notes["copy bytes/s, pinned to device"] = copy_rate(seconds, device)
        pageable = torch.ones(1 << 26, dtype=torch.uint8)
        rate = harness.window_rate(lambda: pageable.to(device), pageable.nbytes, seconds, device)
        notes["copy bytes/s, pageable to device"] = rate
        notes["pixels from the CPU's, default"] = pixels_apart(jpegs[0])
        notes["pixels from the CPU's, chroma interpolated"] = pixels_apart(jpegs[0], jpeg_fancy_upsampling=True)
        loads = {"CUDA decoder": 0.0, "hardware decoder": 1.0, "both": HW_DECODER_LOAD}
        notes["hardware decoder"] = missing = why_no_hardware_decoder() or "there"
        for name, load in list(loads.items())[: 3 if missing == "there" else 1]:
            notes[f"decode images/s, {name}"] = decode_rate(jpegs, harness.cores(), 4 * seconds, device, load)
        exact = [[row[: length(row)] for row in batch] for batch in jpegs]
        notes["decode images/s, both, not padded"] = decode_rate(exact, harness.cores(), 4 * seconds, device, HW_DECODER_LOAD)
    rows = [row[: length(row)] for row in jpegs[0]]
    notes["decode images/s, imagefeed's decoder, one thread"] = native_rate(rows, 224, False, seconds)
    for threads in (1, 2, 4, 8, 16, 32, 64):
        if threads <= harness.cores() and device.type == "cpu":
            notes[f"decode images/s, CPU threads: {threads}"] = decode_rate(jpegs, threads, 4 * seconds, device)


if __name__ == "__main__":
    main()
