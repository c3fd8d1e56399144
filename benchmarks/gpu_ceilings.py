"""Part "ceilings" of gpu.py: what the machine can do at most, and how far its decoders' pixels lie apart."""

import itertools

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from benchmarks.gpu_work import Part, cores, rate
from benchmarks.records import stacked
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.graph import HW_DECODER_LOAD, GraphOptions, decode_pipeline
from imagefeed.pipeline.profiler.limits import copy_rate, matrix_rate, memory_rate

BATCH_SIZE = 512
KEPT = 8  # batches, decoded over and over


def measure(part: Part) -> None:
    seconds = 0.1 if part.small else 0.5
    part.note("memory bytes/s, read and written", memory_rate(seconds, part.device))
    if part.cuda:
        part.note("copy bytes/s, pinned to device", copy_rate(seconds, part.device))
        pageable = torch.ones(1 << 26, dtype=torch.uint8)
        copies = rate(lambda: pageable.to(part.device), pageable.nbytes, seconds, part.device)
        part.note("copy bytes/s, pageable to device", copies["images_per_second"])
    for precision in ("bfloat16", "float32"):
        part.note(f"matrix FLOP/s, {precision}", matrix_rate(precision, seconds, part.device))
    jpegs = some_jpegs(part, 32 if part.small else BATCH_SIZE)
    if part.cuda:
        note_pixels(part, jpegs[0])
        for name, load in (("hardware decoder", 1.0), ("CUDA decoder", 0.0), ("both", HW_DECODER_LOAD)):
            part.note(f"decode images/s, {name}", decode_rate(part, jpegs, cores(), load, part.device.index or 0))
    threads = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores()]
    for count in threads:
        part.note(f"decode images/s, CPU, {count} threads", decode_rate(part, jpegs, count, 0.0, None))


def some_jpegs(part: Part, batch_size: int) -> list[np.ndarray]:
    """Batches of records in memory."""
    manifest = part.data()
    records = RecordReader(manifest, manifest.train_split)
    count = min(KEPT, len(records) // batch_size)
    return [stacked(records, batch * batch_size, batch_size) for batch in range(count)]


def decode_rate(part: Part, jpegs: list[np.ndarray], threads: int, load: float, device_id: int | None) -> float:
    options = GraphOptions(224, device_id=device_id, num_threads=threads, hw_decoder_load=load)
    endless = itertools.cycle(jpegs)
    pipeline = decode_pipeline(lambda i: [next(endless)], len(jpegs[0]), options)
    seconds = 0.2 if part.small else 2.0
    return rate(pipeline.run, len(jpegs[0]), seconds, part.device, options.prefetch + 2)["images_per_second"]


def note_pixels(part: Part, jpegs: np.ndarray) -> None:
    """Grey levels between the GPU's and the CPU's pixels, as it is and with chroma interpolated, and what the latter costs."""
    right = decoded(jpegs, None)
    for name, options in (("as it is", {}), ("chroma interpolated", {"jpeg_fancy_upsampling": True})):
        found = decoded(jpegs, part.device.index or 0, **options)
        apart = [np.abs(a.astype(np.float32) - b) for a, b in zip(found, right, strict=True)]
        luma = [np.abs((a.astype(np.float32) - b) @ (0.299, 0.587, 0.114)).mean() for a, b in zip(found, right, strict=True)]
        figures = {"mean": float(np.mean([d.mean() for d in apart])), "highest": float(max(d.max() for d in apart))}
        part.note(f"pixels from the CPU's, {name}", figures | {"luma, worst image's mean": float(max(luma))})


def decoded(jpegs: np.ndarray, device_id: int | None, **options) -> list[np.ndarray]:
    pipeline = Pipeline(len(jpegs), cores(), device_id, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(lambda: jpegs, batch=True)
        device = "cpu" if device_id is None else "mixed"
        pipeline.set_outputs(fn.decoders.image(data, device=device, output_type=types.RGB, **options))
    (images,) = pipeline.run()
    images = images if device_id is None else images.as_cpu()
    return [np.array(images[n]) for n in range(len(jpegs))]
