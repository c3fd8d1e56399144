"""How fast do Python's JPEG decoders decode on one core, beside imagefeed's?

    python -m benchmarks.decoders DATASET [--raw RAW] [--peers PYTHON]     # results under "decoders" and "decoders-raw"

Each decodes the same JPEGs from memory to an array of RGB, whole: records of DATASET, and with --raw the photos of a folder too.
"imagefeed, crops" does what the loader does instead: a random crop, flipped at random, normalized to float32. Each is a process
with one thread, all on the same core in turns, a few images at a time, by CPU time. Decoders that cannot be imported are left
out.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from benchmarks import harness
from benchmarks.peers import why_missing
from imagefeed.codec import decoder
from imagefeed.codec.decode import JOB, Format, aligned, decode, decode_jobs
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader

CHUNK = 32  # images that a decoder takes before it is another's turn
CROP_SIZE = 224
# A process that holds little else would give the memory of its images back to the system each time: a third of simplejpeg's time.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
CROPS = "imagefeed, crops"
Decode = Callable[[Sequence[bytes]], object]


def each(decode_one: Callable[[bytes], object]) -> Decode:
    return lambda jpegs: [decode_one(jpeg) for jpeg in jpegs]


def crops() -> Decode:
    rng = np.random.default_rng(0)
    out = aligned((4 * CHUNK, 3, CROP_SIZE, CROP_SIZE), "float32")
    form = Format("float32", scale=np.full(3, 1 / 58, np.float32))
    places = itertools.cycle(range(0, len(out), CHUNK))  # not in a cache: a loader fills new memory

    def run(jpegs: Sequence[bytes]) -> None:
        jobs = np.zeros(len(jpegs), JOB)
        buffers = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        jobs["data"], jobs["length"] = [buffer.ctypes.data for buffer in buffers], [len(jpeg) for jpeg in jpegs]
        decoder.sizes(jobs)
        jobs["height"] = jobs["width"] = CROP_SIZE
        jobs["top"], jobs["left"] = (rng.integers(0, jobs[side] - CROP_SIZE + 1) for side in ("image_height", "image_width"))
        jobs["mirror"], jobs["mean"] = rng.integers(0, 2, len(jpegs)), (123, 117, 104)
        jobs["out"] = out[next(places)].ctypes.data + np.arange(len(jpegs)) * out[0].nbytes
        decode_jobs(jobs, form, 0, len(jobs), to_end=False)

    return run


def ours() -> Decode:
    return lambda jpegs: decode(jpegs, threads=1)


def simplejpeg() -> Decode:
    import simplejpeg

    return each(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB"))


def pillow(simd: bool = False) -> Decode:
    import io

    import PIL
    from PIL import Image

    if simd != ("post" in PIL.__version__):
        raise ImportError(f"PIL is {'Pillow' if simd else 'Pillow-SIMD'} here; give --peers a Python with plain Pillow")
    return each(lambda jpeg: np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def pillow_simd() -> Decode:
    return pillow(simd=True)


def dali() -> Decode:
    from imagefeed.pipeline.graph import GraphOptions, decode_pipeline

    fed: list[list[np.ndarray]] = []
    graph = decode_pipeline(lambda i: fed[0], CHUNK, GraphOptions(1, num_threads=1, prefetch=1))

    def run(jpegs: Sequence[bytes]) -> None:
        # One array for all, as the loader hands them over; the decoder stops at the end of each image.
        batch = np.zeros((len(jpegs), max(map(len, jpegs))), np.uint8)
        for row, jpeg in zip(batch, jpegs, strict=True):
            row[: len(jpeg)] = np.frombuffer(jpeg, np.uint8)
        fed[:] = [[batch]]
        graph.run()

    return run


def opencv() -> Decode:
    import cv2

    cv2.setNumThreads(1)
    return each(lambda jpeg: cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB))


def torchvision() -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    return each(lambda jpeg: decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB))


def kornia() -> Decode:
    from kornia_rs.io import decode_image_jpeg

    return each(decode_image_jpeg)


def imagecodecs() -> Decode:
    import imagecodecs

    return each(lambda jpeg: imagecodecs.jpeg8_decode(jpeg, outcolorspace="RGB"))


def pyvips() -> Decode:
    import pyvips

    return each(lambda jpeg: pyvips.Image.jpegload_buffer(jpeg, access="sequential").numpy())


def tensorflow() -> Decode:
    import tensorflow as tf

    # Its default is the faster, less accurate transform; the others have libjpeg's default.
    return each(lambda jpeg: tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE").numpy())


# By name: the decoder and its package.
OURS = {
    "imagefeed": (ours, ""),
    CROPS: (crops, ""),
    "Pillow-SIMD": (pillow_simd, "pillow-simd"),
    "DALI": (dali, "nvidia-dali-cuda130"),
}
ROWS = OURS | {
    "simplejpeg": (simplejpeg, "simplejpeg"),
    "Pillow": (pillow, "pillow"),
    "OpenCV": (opencv, "opencv-python-headless"),
    "torchvision": (torchvision, "torchvision"),
    "kornia-rs": (kornia, "kornia-rs"),
    "imagecodecs": (imagecodecs, "imagecodecs"),
    "pyvips": (pyvips, "pyvips-binary"),
    "TensorFlow": (tensorflow, "tensorflow-cpu"),
}


def read(source: Path, images: int) -> list[bytes]:
    """JPEGs of a dataset or a folder, in whole chunks."""
    if (source / "dataset.json").exists():
        manifest = Manifest.load(source)
        records = RecordReader(manifest, manifest.train_split)
        jpegs = [bytes(records.jpeg(number)) for number in range(min(images, len(records)))]
    else:
        jpegs = [path.read_bytes() for path in sorted(source.glob("*/*"))[:images]]
    return jpegs[: len(jpegs) // CHUNK * CHUNK]


def serve(name: str, source: Path, images: int) -> None:
    """A worker: decodes the chunk of each request, and says how many CPU seconds it took."""
    jpegs, (make, package) = read(source, images), ROWS[name]
    try:
        decode = make()
        decode(jpegs[:CHUNK])
        versions = {package: metadata.version(package)} if package else {}
    except Exception as error:
        harness.serve({"missing": f"{type(error).__name__}: {error}"}, dict)
        return

    def measure(chunk: int) -> dict:
        start_s = time.process_time()
        decode(jpegs[chunk * CHUNK : (chunk + 1) * CHUNK])
        return {"cpu_s": time.process_time() - start_s}

    size = sum(map(len, jpegs)) // len(jpegs)
    harness.serve({"versions": versions, "chunks": len(jpegs) // CHUNK, "bytes_per_image": size}, measure)


def measure(workers: harness.Workers, names: list[str], chunks: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, in each round; the order of a chunk's decoders rotates."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        spent_s = dict.fromkeys(names, 0.0)
        for chunk in range(chunks):
            turn = (number + chunk) % len(names)
            for name in names[turn:] + names[:turn]:
                spent_s[name] += workers.measure(name, chunk)["cpu_s"]
        if number >= 0:
            for name in names:
                rates[name].append(chunks * CHUNK / spent_s[name])
    return rates


@click.command()
@harness.DATASET
@click.option("--raw", type=harness.EXISTING, help="A folder of photos, in class folders.")
@harness.rounds_option(7)
@harness.PEERS
@click.option("--images", default=992, show_default=True, help="Images per row and round.")
@click.option("--serve", "served", hidden=True)
def main(dataset: Path, raw: Path | None, rounds: int, peers: str, images: int, served: str | None) -> None:
    """Measure decoders on the records of DATASET."""
    if served:
        serve(served, dataset, images)
        return
    os.environ |= KEEP_MEMORY
    harness.machine()  # is asked for before this process has one core only
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for result_name, source in {"decoders": dataset, "decoders-raw": raw}.items():
        if source is None:
            continue
        with harness.Workers() as workers:
            for name in ROWS if source is dataset else (name for name in ROWS if name != CROPS):
                words = harness.python("benchmarks.decoders", source.resolve(), "--images", images, "--serve", name)
                workers.start(name, [sys.executable if name in OURS else peers, *words[1:]])
            told = workers.ready()
            missing = {name: why_missing(peers, about["missing"]) for name, about in told.items() if "missing" in about}
            found = {name: about for name, about in told.items() if name not in missing}
            first = next(iter(found.values()))
            rates = measure(workers, list(found), first["chunks"], rounds)
        result = {"images": first["chunks"] * CHUNK, "bytes_per_image": first["bytes_per_image"], "rounds": rounds, "cores": 1}
        result["peers"] = {package: version for one in found.values() for package, version in one["versions"].items()}
        result["left_out"] = missing
        harness.save(result_name, result | harness.compared(rates, ("imagefeed",)), "numpy")


if __name__ == "__main__":
    main()
