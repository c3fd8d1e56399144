"""Part "rescale" of gpu.py: raw images to 256 pixels on the GPU, images a second, beside `build` on all cores."""

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from benchmarks import ROOT
from benchmarks.gpu_work import Part, cores, rate

SIDE = 256
COPIES = 4  # of the raw images for build, so that its start does not count much
QUALITY = 90


def measure(part: Part) -> None:
    raw = (part.folder / "raw").resolve()
    files = sorted(path for path in raw.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        part.note("raw images", "left out: there are none that are JPEG files")
        return
    batch_size = 16 if part.small else 128
    batches = [[np.fromfile(path, np.uint8) for path in files[at : at + batch_size]] for at in range(0, len(files), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size][:16]
    seconds = 0.3 if part.small else 3.0
    for name, threads in (("GPU" if part.cuda else "CPU", cores()),):
        pipeline = rescaler(part, batches, threads)
        part.note(f"decode and resize by DALI on the {name}", rate(pipeline.run, batch_size, seconds, part.device, 6))
    note_encoding(part, batches, seconds)
    part.note(f"build on {cores()} cores", build_rate(part, files))


def rescaler(part: Part, batches: list[list[np.ndarray]], threads: int) -> Pipeline:
    """Shorter side to SIDE, then the centre SIDE x SIDE."""
    endless = itertools.cycle(batches)
    device_id = part.device.index or 0 if part.cuda else None
    pipeline = Pipeline(len(batches[0]), threads, device_id, prefetch_queue_depth=2)
    with pipeline:
        jpegs = fn.external_source(lambda: next(endless), batch=True)
        images = fn.decoders.image(jpegs, device="mixed" if part.cuda else "cpu", output_type=types.RGB)
        images = fn.resize(images, resize_shorter=SIDE, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.crop(images, crop=(SIDE, SIDE)))
    return pipeline


def note_encoding(part: Part, batches: list[list[np.ndarray]], seconds: float) -> None:
    """DALI 2.4 has no JPEG encoder for GPUs; torchvision's encode_jpeg takes images on the GPU (nvJPEG)."""
    name = "decode, resize and encode"
    if not (importlib.util.find_spec("torchvision") and part.cuda):
        part.note(name, "left out: there is no encoder for the GPU without torchvision")
        return
    from torchvision.io import encode_jpeg

    pipeline = rescaler(part, batches, cores())

    def step() -> None:
        (images,) = pipeline.run()
        planes = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).contiguous()
        for jpeg in encode_jpeg(list(planes), quality=QUALITY):
            jpeg.cpu()

    part.note(name, rate(step, len(batches[0]), seconds, part.device))


def build_rate(part: Part, files: list) -> dict[str, float]:
    """All that build does, statistics, checksums and writing included, its start left out (that of an empty build is not)."""
    raw, out = part.folder / "raw-copies", part.folder / "rescaled"
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    for copy in range(1 if part.small else COPIES):
        for number, path in enumerate(files):
            place = raw / path.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{copy}-{number}-{path.name}").symlink_to(path)
    command = [sys.executable, "-m", "preprocess", "build", raw, out, "--split", "train"]
    start_s = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start_s
    told = re.search(r"([\d,]+) images/s", done.stdout)
    count = len(files) * (1 if part.small else COPIES)
    found = {"images_per_second": count / seconds, "seconds": seconds, "images": count}
    if told:
        found["images_per_second as it says"] = float(told[1].replace(",", ""))
    return found
