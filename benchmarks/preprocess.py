"""How fast is `build` beside its peers, all cores each, in turns on the same raw images; and where does an image's time go?

    python -m benchmarks.preprocess RAW [--peers PYTHON] [--device cuda]     # results under "preprocess" or "preprocess-cuda"

RAW is a folder of class folders (1,000 ImageNet images, say). The rows:

    decode only   libjpeg-turbo by simplejpeg to RGB, pixels thrown away: the limit of everything that rescales RGB
    build         `imagefeed build` with everything on: statistics, checksums, hashes, writing, start and end
    build, one    the same with one worker
    Pillow pool   a process pool of plain Pillow (not SIMD): decode, resize, crop, encode, write
    OpenCV pool   the same with OpenCV
    ffcv          FFCV's DatasetWriter, JPEG mode, at the same output size
    img2dataset   to WebDataset shards, from local files
    DALI, GPU     only with a GPU: decode and rescale there by DALI; "encode" by torchvision too (nvJPEG), if it is installed

All make 256x256 JPEGs of quality 90; the peers keep no statistics, checksums or order. Peers that are not installed are left out.
"""

import functools
import importlib.util
import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

from benchmarks import harness
from benchmarks.data import copy_images, repeat
from benchmarks.peers import left_out as not_installed
from imagefeed.dataset.records import Record, ShardWriter
from imagefeed.preprocess import codec
from imagefeed.preprocess.image import ImageOptions, decode_planes, prepare_image
from imagefeed.preprocess.statistics import PixelSums

SCRIPT = harness.ROOT / "benchmarks" / "preprocess_peers.py"
# Row -> its name in preprocess_peers.py, and the package that it needs.
PEERS = {
    "decode only": ("decode", "simplejpeg"), "Pillow pool": ("pillow", "PIL"), "OpenCV pool": ("opencv", "cv2"),
    "ffcv": ("ffcv", "ffcv"), "img2dataset": ("img2dataset", "img2dataset"),
}  # fmt: skip
SLOW = ("Pillow pool", "OpenCV pool")  # go over a quarter of the images: they have little start-up to spread over many
SIDE, QUALITY = 256, 90
GPU_BATCH_SIZE, GPU_S = 128, 3.0


def put_commented(image: Path, target: Path) -> None:
    """A comment tells the copies apart: equal bytes would be examined again, as duplicates."""
    data = image.read_bytes()
    copy = int(target.name.partition("-")[0])
    comment = b"\xff\xfe\x00\x03%c" % copy if data[:2] == b"\xff\xd8" else b""
    target.write_bytes(data[:2] + comment + data[2:])


def stages(paths: list[Path], work: Path) -> dict[str, float]:
    """Mean microseconds per image of each step, one after the other in this process."""
    spent: dict[str, list[float]] = {}
    sums = PixelSums(SIDE)

    def timed(name: str, function, *args):
        start_s = time.perf_counter()
        result = function(*args)
        spent.setdefault(name, []).append((time.perf_counter() - start_s) * 1e6)
        return result

    with ShardWriter(work / "stages.tfrecord", 0) as writer:
        for number, path in enumerate(paths):
            data = timed("read", path.read_bytes)
            if codec.header(data)[2] == "other":
                continue
            timed("(decode to RGB)", lambda data: simplejpeg.decode_jpeg(data, "RGB", strict=True), data)
            planes = timed("decode and rescale", decode_planes, data, SIDE, True)
            jpeg = timed("encode", lambda planes: simplejpeg.encode_jpeg_yuv_planes(*planes, QUALITY), planes)
            timed("statistics", sums.add, planes)
            timed("record, checksums, hash, write", writer.append, Record(jpeg, 0, "n01440764", path.name, SIDE, SIDE))
            timed("(prepare_image)", prepare_image, data, ImageOptions())
            if number == 0:
                spent.clear()  # the first image touches everything
    return {name: float(np.mean(values)) for name, values in spent.items()}


def missing(peers: str) -> dict[str, str]:
    """The rows whose package that Python lacks, and why."""
    found, reasons = {}, not_installed(peers)
    for name, (_, package) in PEERS.items():
        probe = subprocess.run([peers, "-c", f"import {package}; print({package}.__version__)"], capture_output=True, text=True)
        if probe.returncode and "AttributeError" not in probe.stderr:
            found[name] = reasons.get(package, f"{package} cannot be imported")
        elif package == "PIL" and "post" in probe.stdout:
            found[name] = "this is Pillow-SIMD"
    return found


def gpu_ways(paths: list[Path], device) -> dict:
    """Ways to rescale on the GPU, the shorter side to SIDE and the center cut out. DALI 2.4 has no JPEG encoder for GPUs."""
    import torch
    from nvidia.dali import Pipeline, fn, types

    files = [np.fromfile(path, np.uint8) for path in paths if path.read_bytes()[:2] == b"\xff\xd8"]
    batches = [files[at : at + GPU_BATCH_SIZE] for at in range(0, len(files) - GPU_BATCH_SIZE + 1, GPU_BATCH_SIZE)][:16]
    if not batches:
        return {}
    endless = itertools.cycle(batches)
    pipeline = Pipeline(GPU_BATCH_SIZE, harness.cores(), device.index or 0, prefetch_queue_depth=2)
    with pipeline:
        jpegs = fn.external_source(lambda: next(endless), batch=True)
        images = fn.decoders.image(jpegs, device="mixed", output_type=types.RGB)
        images = fn.resize(images, resize_shorter=SIDE, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.crop(images, crop=(SIDE, SIDE)))

    def encode() -> None:
        from torchvision.io import encode_jpeg

        (images,) = pipeline.run()
        planes = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).contiguous()
        for jpeg in encode_jpeg(list(planes), quality=QUALITY):
            jpeg.cpu()

    steps = {"DALI, GPU": pipeline.run} | ({"DALI, GPU, encode": encode} if importlib.util.find_spec("torchvision") else {})
    return {name: functools.partial(harness.window_rate, step, GPU_BATCH_SIZE, GPU_S, device, 6) for name, step in steps.items()}


@click.command()
@harness.RAW
@harness.rounds_option(5)
@click.option("--repeat", "copies", default=8, show_default=True, help="Copies of each image.")
@harness.PEERS
@harness.DEVICE
def main(raw: Path, rounds: int, copies: int, peers: str, device: str) -> None:
    """Time `build` and its peers on RAW."""
    with harness.working_folder() as work:
        paths = copy_images(raw, work / "raw-1")
        # A rate is a rate, but start-up must not count for much: slow rows go over fewer images.
        counts = {False: copies * len(paths), True: max(1, copies // 4) * len(paths)}
        for count in set(counts.values()):
            repeat(paths, work / f"raw-{count}", count, put_commented)
        out = work / "out"
        left_out = missing(peers)
        images = {name: counts[name in SLOW] for name in ("decode only", "build", "build, one", *PEERS) if name not in left_out}

        def rate(name: str) -> float:
            tree = work / f"raw-{images[name]}"
            shutil.rmtree(out, ignore_errors=True)
            command = [peers, SCRIPT, *PEERS[name][:1], tree, out, harness.cores()] if name in PEERS else None
            workers = 1 if name == "build, one" else harness.cores()
            build = harness.python("preprocess", "build", tree, out, "--split", "train", "--workers", workers)
            return images[name] / harness.usage(command or build, stderr=subprocess.DEVNULL).wall_s

        ways = {name: functools.partial(rate, name) for name in images}
        name = "preprocess"
        if device == "cuda":
            from imagefeed.pipeline.loader import choose_device

            name = "preprocess-cuda"
            ways = {name: ways[name] for name in ("build", "decode only") if name in ways} | gpu_ways(
                paths, choose_device(device)
            )
        result = {"images": images, "rounds": rounds, "left_out": left_out}
        result |= harness.compared(harness.interleave(ways, rounds), ("build",))
        result["microseconds_of_an_image"] = stages(paths, work)
    harness.save(name, result, "numpy", "simplejpeg")
    for name, us in result["microseconds_of_an_image"].items():
        print(f"{name:<36}{us:>10,.0f} us")


if __name__ == "__main__":
    sys.exit(main())
