"""Hashes of what the code stores, plans and feeds, by which test_golden.py tells whether any of it has changed.

The first 16 hexadecimal digits of SHA-256 each. All that is asked of the product is asked in the first part.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import imagefeed
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.plan import Plan, epoch_order, offset
from imagefeed.preprocess.image import codec_versions

# numpy draws with other functions on processors with AVX-512; they may differ in the last bit.
PLAIN = os.environ | {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"}
LATER = ("raw.npz", "build.npz")
SAMPLE = ("--images", "36", "--classes", "3", "--seed", "11")

# ---- All that the product is asked for


def draw(raw: Path) -> Path:
    subprocess.run([sys.executable, "-m", "preprocess", "sample", str(raw), *SAMPLE], check=True, env=PLAIN)
    return raw


def build(raw: Path, out: Path, **options) -> Path:
    imagefeed.build(raw, out, workers=1, **options)
    return out


def build_by_command(raw: Path, out: Path, *options: str) -> Path:
    subprocess.run([sys.executable, "-m", "preprocess", "build", str(raw), str(out), *options], check=True)
    return out


def open_loader(root: Path, arguments: dict) -> ImageLoader:
    return ImageLoader(Manifest.load(root), **{"num_threads": 2, "pad_last": True, **arguments})


def stored(root: Path, split: str) -> tuple[list[int], list[str]]:
    """The label and the hash of the JPEG of each record."""
    dataset = RecordReader(Manifest.load(root), split)
    return dataset.labels.tolist(), [short(dataset[number].tobytes()) for number in range(len(dataset))]


def versions() -> dict[str, str]:
    """Of what decides values besides our code: libraries, and the kind of processor."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    processor = {name.strip(): value.strip() for name, _, value in lines}
    kind = " ".join(processor.get(name, "") for name in ("vendor_id", "cpu family", "model"))
    libraries = {name: metadata.version(name) for name in ("numpy", "torch", "nvidia-dali-cuda130")}
    return {"processor": kind, **libraries, **codec_versions()}


# ---- What is recorded of it


def short(*data: bytes) -> str:
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]


def of_array(values: np.ndarray) -> str:
    return short(str((values.dtype.str, values.shape)).encode(), np.ascontiguousarray(values).tobytes())


def of_tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): short(path.read_bytes()) for path in sorted(root.rglob("*")) if path.is_file()}


def of_dataset(root: Path) -> dict:
    """All files but those that came later; and of those that hold versions or eigenvectors, the rest of their content.

    The manifest without the fields that are newer than the recorded hashes.
    """
    manifest = json.loads((root / "dataset.json").read_bytes())
    manifest.pop("decision", None)
    del manifest["versions"], manifest["sha256"], manifest["files"]["statistics.npz"]
    with np.load(root / "statistics.npz") as arrays:
        statistics = {name: of_array(arrays[name]) for name in arrays.files}
    content = short(json.dumps(manifest).encode())
    files = {name: digest for name, digest in of_tree(root).items() if name not in LATER}
    files["dataset.json"] = "present"  # it names the packer
    return {"files": files, "statistics": statistics, "manifest": content}


def of_batches(loader: ImageLoader, steps: int) -> dict[str, str]:
    """`order` of ids, labels and which are padding; `pixels` with their type, shape and strides."""
    order, pixels = [], []
    while steps:
        for batch in itertools.islice(loader, steps):
            steps -= 1
            order += [values.numpy().tobytes() for values in (batch.ids, batch.labels, batch.valid)]
            images = batch.images
            pixels.append(str((images.dtype, tuple(images.shape), images.stride())).encode())
            pixels.append(images.contiguous().view(torch.uint8).numpy().tobytes())
    return {"order": short(*order), "pixels": short(*pixels)}


def of_plan(arguments: dict, epoch: int, step: int) -> dict:
    plan = Plan(**arguments)
    position = epoch * plan.steps + step
    ids, valid = plan.ids(position)
    look, sizes = plan.augmentation(position, ids), (256 + ids % 100, 256 + ids % 77)
    boxes, jitter = plan.boxes(position, ids, *sizes), plan.jitter(position, ids, (0.4, 0.4, 0.4, 0.1))
    prefetch_window = plan.prefetch_window(position, step == 0)
    found = {"steps": plan.steps, "ids": ids[:4].tolist(), "color": [round(value, 6) for value in look.color[0].tolist()]}
    arrays = {"crops": offset(look.places, 32), "mirrors": look.mirrors, "boxes": boxes}
    arrays |= {"all ids": ids, "valid": valid, "colors": look.color.round(6) + 0, "jitter": jitter.round(6) + 0}
    return (
        found
        | {name: of_array(values) for name, values in arrays.items()}
        | {"prefetch window": None if prefetch_window is None else of_array(prefetch_window)}
    )


def of_order(arguments: list) -> str:
    """The record ids of a whole epoch."""
    return of_array(epoch_order(*arguments))


# ---- Raw trees that are made of the drawn sample


def write_plain(drawn: Path, root: Path) -> Path:
    """The sample without what is converted by way of RGB, whose last bit other processors may round otherwise."""
    shutil.copytree(drawn, root)
    for path in root.rglob("*.JPEG"):
        with Image.open(path) as image:
            mode = image.mode
        if mode == "CMYK":
            path.unlink()
    return root


def write_even(plain: Path, root: Path, size: int = 72) -> Path:
    """Images that have even sides when the shorter is `size`: of odd ones the encoder reads beyond the pixels."""
    shutil.copytree(plain, root)
    for path in root.rglob("*.JPEG"):
        with Image.open(path) as image:
            sides = image.size
        if any(int(side * size / min(sides) + 0.5) % 2 for side in sides):
            path.unlink()
    return root


def write_tables(plain: Path, root: Path) -> Path:
    """Tables of labels that are bare numbers, with images in two splits and classes, a damaged one, and unknown labels."""
    shutil.copytree(plain / "train", root / "pictures")
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*.JPEG"))
    (root / "pictures/cut.jpg").write_bytes((root / paths[0]).read_bytes()[:2000])
    rows = {"train": [(path, (100, 9, 7)[n % 3]) for n, path in enumerate(paths[:18])]}
    rows["val"] = [(path, 9) for path in [*paths[15:22], "pictures/cut.jpg"]]
    rows["test"] = [(path, "") for path in paths[22:]]
    for split, lines in rows.items():
        with open(root / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *lines])
    return root


def write_tar(plain: Path, root: Path) -> Path:
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted((plain / split).rglob("*.JPEG")):
                info = tarfile.TarInfo(str(path.relative_to(plain / split)))
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    return root


def write_raw(root: Path) -> Path:
    """The drawn sample, and the trees that are made of it, each in a folder of `root`."""
    plain = write_plain(draw(root / "drawn"), root / "plain")
    for write in (write_even, write_tables, write_tar):
        write(plain, root / write.__name__.removeprefix("write_"))
    return root
