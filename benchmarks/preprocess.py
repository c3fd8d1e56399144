"""How fast is `build` beside its peers, all cores each, in turns on the same raw images; and where does an image's time go?

    python -m benchmarks.preprocess RAW [--peers PYTHON] [--device cuda]     # results under "preprocess" or "preprocess-cuda"

RAW is a folder of class folders (1,000 ImageNet images, say). `build` does everything: statistics, checksums, hashes, writing,
start and end. "decode only" is libjpeg-turbo to RGB with the pixels thrown away, the limit of everything that rescales RGB; the
peers of preprocess_peers.py make 256x256 JPEGs of quality 90 too, without statistics, checksums or order. On a GPU DALI decodes
and rescales, and torchvision encodes (nvJPEG), if it is installed. Peers that are not installed are left out.
"""

import functools
import importlib.util
import itertools
import shutil
import subprocess
import time
from pathlib import Path

import click
import numpy as np
import simplejpeg

from benchmarks import harness
from benchmarks.data import copy_images, repeat
from benchmarks.peers import left_out as not_installed
from imagefeed.codec import libjpeg
from imagefeed.dataset.records import Record, ShardWriter
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
GPU_BATCH_SIZE, GPU_BATCHES, GPU_S = 128, 16, 3.0


def put_commented(image: Path, target: Path) -> None:
    """A comment tells the copies apart: equal bytes would be examined again, as duplicates."""
    data = image.read_bytes()
    comment = b"\xff\xfe\x00\x03%c" % int(target.name.partition("-")[0]) if data[:2] == b"\xff\xd8" else b""
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
            if libjpeg.header(data)[2] == "other":
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
        code = f"import {package}; print(getattr({package}, '__version__', ''))"
        probe = subprocess.run([peers, "-c", code], capture_output=True, text=True)
        if probe.returncode:
            found[name] = reasons.get(package, f"{package} cannot be imported")
        elif package == "PIL" and "post" in probe.stdout:
            found[name] = "this is Pillow-SIMD"
    return found


def gpu_ways(paths: list[Path], device) -> dict:
    """Rescales on the GPU, the shorter side to SIDE and the center cut out. DALI 2.4 has no JPEG encoder for GPUs."""
    import torch
    from nvidia.dali import Pipeline, fn, types

    files = [np.fromfile(path, np.uint8) for path in paths if path.read_bytes()[:2] == b"\xff\xd8"]
    starts = range(0, len(files) - GPU_BATCH_SIZE + 1, GPU_BATCH_SIZE)[:GPU_BATCHES]
    batches = itertools.cycle([files[start : start + GPU_BATCH_SIZE] for start in starts])
    pipeline = Pipeline(GPU_BATCH_SIZE, harness.cores(), device.index or 0, prefetch_queue_depth=2)
    with pipeline:
        jpegs = fn.external_source(lambda: next(batches), batch=True)
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
    measure = functools.partial(harness.window_rate, images=GPU_BATCH_SIZE, seconds=GPU_S, device=device, warm_up=6)
    return {name: functools.partial(measure, step) for name, step in steps.items()}


@click.command()
@harness.RAW
@harness.rounds_option(5)
@click.option("--repeat", "copies", default=8, show_default=True, help="Copies of each image.")
@harness.PEERS
@harness.DEVICE
def main(raw: Path, rounds: int, copies: int, peers: str, device: str) -> None:
    """Time `build` and its peers on RAW."""
    from imagefeed.pipeline.arguments import choose_device

    device = choose_device(device)
    with harness.working_folder() as work:
        paths = copy_images(raw, work / "raw-1")
        # A rate is a rate, but start-up must not count for much: slow rows go over fewer images.
        counts = {False: copies * len(paths), True: max(1, copies // 4) * len(paths)}
        for count in set(counts.values()):
            repeat(paths, work / f"raw-{count}", count, put_commented)
        left_out = missing(peers)
        images = {name: counts[name in SLOW] for name in ("build", "build, one", *PEERS) if name not in left_out}

        def rate(name: str) -> float:
            tree, out = work / f"raw-{images[name]}", work / "out"
            shutil.rmtree(out, ignore_errors=True)
            if name in PEERS:
                command = [peers, SCRIPT, PEERS[name][0], tree, out, harness.cores()]
            else:
                workers = 1 if name == "build, one" else harness.cores()
                command = harness.python("preprocess", "build", tree, out, "--split", "train", "--workers", workers)
            return images[name] / harness.usage(command, stderr=subprocess.DEVNULL).wall_s

        ways = {name: functools.partial(rate, name) for name in images}
        if device.type == "cuda":
            ways = {name: ways[name] for name in ("build", "decode only") if name in ways} | gpu_ways(paths, device)
        result = {"images": images, "rounds": rounds, "left_out": left_out}
        result |= harness.compared(harness.interleave(ways, rounds), ("build",))
        result["microseconds_of_an_image"] = stages(paths, work)
    harness.save(harness.named("preprocess", device), result, "numpy", "simplejpeg")
    print(result["microseconds_of_an_image"])


if __name__ == "__main__":
    main()
