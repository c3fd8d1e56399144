"""What people use to rescale a folder of images: a process pool of Pillow or OpenCV, FFCV's writer, img2dataset.

preprocess.py runs it as `PYTHON preprocess_peers.py WAY RAW OUT WORKERS`, in a Python of its own that has neither imagefeed nor
its harness; RAW is a folder of class folders, and all make 256x256 JPEGs of quality 90.
"""

import multiprocessing
import os
import sys
from pathlib import Path


def decode(path: str, out: str) -> None:
    import simplejpeg

    data = Path(path).read_bytes()
    if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")
    else:
        simplejpeg.decode_jpeg(data, "RGB", strict=False)


def square(width: int, height: int) -> tuple[float, float, float, float]:
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    return left, top, left + shorter, top + shorter


def pillow(path: str, out: str) -> None:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image = image.resize((256, 256), Image.Resampling.BICUBIC, box=square(*image.size))
    image.save(out, "JPEG", quality=90)


def opencv(path: str, out: str) -> None:
    import cv2

    cv2.setNumThreads(1)
    image = cv2.imread(path)
    left, top, right, bottom = map(int, square(*image.shape[1::-1]))
    image = cv2.resize(image[top:bottom, left:right], (256, 256), interpolation=cv2.INTER_AREA)
    cv2.imwrite(out, image, [cv2.IMWRITE_JPEG_QUALITY, 90])


class CenterSquares:
    """What FFCV's writer is given: the center square of each image, and a label."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple:
        from PIL import Image

        image = Image.open(self.paths[number]).convert("RGB")
        return image.crop(tuple(map(int, square(*image.size)))), 0


def ffcv(paths: list[str], out: str, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=256, jpeg_quality=90)
    writer = DatasetWriter(f"{out}/train.beton", {"image": image, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(CenterSquares(paths))


def img2dataset(paths: list[str], out: str, workers: int) -> None:
    from img2dataset import download

    Path(out, "list.txt").write_text("".join(f"file://{os.path.realpath(path)}\n" for path in paths))
    download(
        url_list=f"{out}/list.txt", output_folder=f"{out}/shards", output_format="webdataset", image_size=256,
        resize_mode="center_crop", encode_quality=90, processes_count=workers, thread_count=8, number_sample_per_shard=500,
        enable_wandb=False,
    )  # fmt: skip


def main() -> None:
    way, raw, out, workers = sys.argv[1:5]
    os.makedirs(out)
    paths = sorted(str(path) for path in Path(raw).glob("*/*"))
    if way in ("ffcv", "img2dataset"):
        globals()[way](paths, out, int(workers))
        return
    outs = [f"{out}/{number}.jpg" for number in range(len(paths))]
    with multiprocessing.Pool(int(workers)) as pool:
        pool.starmap(globals()[way], zip(paths, outs), chunksize=32)


if __name__ == "__main__":
    main()
