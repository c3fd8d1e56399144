"""How fast do Python's JPEG decoders decode on one core, beside imagefeed's?

    python -m benchmarks.decoders DATASET [--raw RAW]     # results under "decoders" and "decoders-raw"

Each decodes the same JPEGs from memory to an array of RGB, whole: records of DATASET, and with --raw the photos of a folder too.
"imagefeed, crops" does what the loader does instead: a random crop, flipped at random, normalized to float32. In turns, by CPU
time of the process, with one thread each. Decoders that cannot be imported are left out: with PYTHON of an environment made by
peers.py, there are more.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks import harness
from imagefeed.codec import decoder
from imagefeed.codec.decode import JOB, Format, aligned, decode, decode_jobs
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader

CHUNK = 32  # images that a decoder takes before it is another's turn
CROP_SIZE = 224
CROPS = "imagefeed, crops"
Decode = Callable[[Sequence[bytes]], object]


def each(decode_one: Callable[[bytes], object]) -> Decode:
    return lambda jpegs: [decode_one(jpeg) for jpeg in jpegs]


def crops() -> Decode:
    rng = np.random.default_rng(0)
    out = aligned((4 * CHUNK, 3, CROP_SIZE, CROP_SIZE), "float32")
    form = Format("float32", scale=np.full(3, 1 / 58, np.float32))
    place = [0]

    def run(jpegs: Sequence[bytes]) -> None:
        jobs = np.zeros(len(jpegs), JOB)
        buffers = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        jobs["data"], jobs["length"] = [buffer.ctypes.data for buffer in buffers], [len(jpeg) for jpeg in jpegs]
        decoder.sizes(jobs)
        jobs["height"] = jobs["width"] = CROP_SIZE
        jobs["top"], jobs["left"] = (rng.integers(0, jobs[side] - CROP_SIZE + 1) for side in ("image_height", "image_width"))
        jobs["mirror"], jobs["mean"] = rng.integers(0, 2, len(jpegs)), (123, 117, 104)
        place[0] = (place[0] + CHUNK) % len(out)
        jobs["out"] = out[place[0]].ctypes.data + np.arange(len(jpegs)) * out[0].nbytes
        decode_jobs(jobs, form, 0, len(jobs), to_end=False)

    return run


def ours() -> Decode:
    return lambda jpegs: decode(jpegs, threads=1)


def simplejpeg() -> Decode:
    import simplejpeg

    return each(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB"))


def pillow() -> Decode:
    import io

    from PIL import Image

    return each(lambda jpeg: np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))


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


ROWS = {
    "simplejpeg": simplejpeg,
    "imagefeed": ours,
    CROPS: crops,
    "Pillow": pillow,
    "OpenCV": opencv,
    "torchvision": torchvision,
    "kornia-rs": kornia,
    "imagecodecs": imagecodecs,
    "pyvips": pyvips,
    "TensorFlow": tensorflow,
}


def measure(ways: dict[str, Decode], jpegs: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time, in each round; the order of a chunk's decoders rotates."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1, rounds):
        spent_s = dict.fromkeys(names, 0.0)
        for chunk in range(len(jpegs) // CHUNK):
            turn = (number + chunk) % len(names)
            for name in names[turn:] + names[:turn]:
                start_s = time.process_time()
                ways[name](jpegs[chunk * CHUNK : (chunk + 1) * CHUNK])
                spent_s[name] += time.process_time() - start_s
        if number >= 0:
            for name in names:
                rates[name].append(len(jpegs) // CHUNK * CHUNK / spent_s[name])
    return rates


def usable(name: str, jpegs: list[bytes]) -> Decode | str:
    """The decoder, or why it is left out."""
    try:
        way = ROWS[name]()
        way(jpegs[:2])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return way


@click.command()
@harness.DATASET
@click.option("--raw", type=harness.EXISTING, help="A folder of photos, in class folders.")
@harness.rounds_option(7)
@click.option("--images", default=992, show_default=True, help="Images per row and round.")
def main(dataset: Path, raw: Path | None, rounds: int, images: int) -> None:
    """Measure decoders on the records of DATASET."""
    harness.machine()  # is asked for before this process has one core only
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    manifest = Manifest.load(dataset)
    records = RecordReader(manifest, manifest.train_split)
    sets = {"decoders": [bytes(records.jpeg(number)) for number in range(min(images, len(records)))]}
    if raw:
        sets["decoders-raw"] = [path.read_bytes() for path in sorted(raw.glob("*/*"))[:images]]
    for name, jpegs in sets.items():
        found = {row: usable(row, jpegs) for row in ROWS if name == "decoders" or row != CROPS}
        rates = measure({row: way for row, way in found.items() if not isinstance(way, str)}, jpegs, rounds)
        bytes_each = sum(map(len, jpegs)) // len(jpegs)
        result = {"images": len(jpegs), "bytes_per_image": bytes_each, "rounds": rounds, "cores": 1}
        result |= {"left_out": {row: way for row, way in found.items() if isinstance(way, str)}}
        harness.save(name, result | harness.compared(rates, ("imagefeed",)), "numpy", "simplejpeg")


if __name__ == "__main__":
    main()
