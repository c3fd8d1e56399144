"""The table of docs/containers.md about tars of WebDataset's kind."""

import io
import tarfile
from pathlib import Path

from tables.common import IMAGEFEED, INPUTS, Table

NUMPY = "numpy==2.4.6"
WEBDATASET = ["webdataset==1.0.2", NUMPY]
DATASETS = ["datasets==5.2.0", NUMPY]
TARS = {"001.jpg is a hard link to 000.jpg": "link", "all .jpg before all .cls": "sorted", "two tars joined by cat": "joined"}
tars = Table("tars", ["Tar of 000 to 002, .jpg and .cls (joined: and 003 to 005)"], list(TARS))


def jpeg(n):
    """A JPEG of one gray level for each number."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (40 * n + 10,) * 3).save(stream, "JPEG")
    return stream.getvalue()


def write_tars():
    def add(tar, name, data, **fields):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in fields.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(data))

    def write(path, numbers, kinds=("jpg", "cls"), link=False):
        with tarfile.open(path, "w") as tar:
            for name in sorted((f"{n:03d}.{kind}" for n in numbers for kind in kinds), key=lambda name: name[:3]):
                add(tar, name, jpeg(int(name[:3])) if "jpg" in name else b"%d" % (int(name[:3]) % 2))

    with tarfile.open(INPUTS / "link-000.tar", "w") as tar:
        for n in range(3):
            if n == 1:
                add(tar, "001.jpg", b"", type=tarfile.LNKTYPE, linkname="000.jpg")
            else:
                add(tar, f"{n:03d}.jpg", jpeg(n))
            add(tar, f"{n:03d}.cls", b"%d" % (n % 2))
    with tarfile.open(INPUTS / "sorted-000.tar", "w") as tar:
        for name in [f"{n:03d}.{kind}" for kind in ("jpg", "cls") for n in range(3)]:
            add(tar, name, jpeg(int(name[:3])) if "jpg" in name else b"%d" % (int(name[:3]) % 2))
    write("a.tar", range(3))
    write("b.tar", range(3, 6))
    (INPUTS / "joined-000.tar").write_bytes(Path("a.tar").read_bytes() + Path("b.tar").read_bytes())


def told(read):
    """A cell for each tar: how many samples `read` gives, as (image bytes or none, label or none), and what they lack."""
    cells = []
    for name in TARS.values():
        try:
            samples = list(read(INPUTS / f"{name}-000.tar"))
        except Exception as error:
            cells.append(f"error: {type(error).__name__}")
            continue
        bare = {"no image": sum(not image for image, _ in samples), "no label": sum(label is None for _, label in samples)}
        lacking = [f"{count} with {what}" for what, count in bare.items() if count]
        cells.append(", ".join([f"{len(samples)} samples", *lacking]))
    return cells


@tars.add("webdataset 1.0.2", WEBDATASET)
def webdataset_tars():
    import webdataset

    def read(path):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            yield sample.get("jpg"), sample.get("cls")

    return told(read)


@tars.add("DALI 2.4.0", [IMAGEFEED])
def dali_tars():
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    def read(path):
        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def pipe():
            return tuple(
                fn.readers.webdataset(paths=[str(path)], ext=["jpg", "cls"], missing_component_behavior="empty", name="r")
            )

        made = pipe()
        made.build()
        for _ in range(made.epoch_size("r")):
            image, label = (np.array(each[0]).tobytes() for each in made.run())
            yield image, label or None

    return told(read)


@tars.add("datasets 5.2.0", [*DATASETS, "pillow==13.0.0"])
def datasets_tars():
    import datasets

    def read(path):
        for row in datasets.load_dataset("webdataset", data_files=str(path), split="train", streaming=True):
            yield row["jpg"], row["cls"]

    return told(read)


@tars.add("imagefeed", [IMAGEFEED])
def our_tars():
    import shutil

    import imagefeed

    def read(path):
        Path("raw").mkdir(exist_ok=True)
        shutil.copy(path, "raw/train-000000.tar")
        shutil.rmtree("out", ignore_errors=True)
        imagefeed.build("raw", "out", size=64, workers=1)
        yield from imagefeed.Dataset("out", "train")

    return told(read)
