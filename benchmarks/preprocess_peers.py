"""What people write to rescale a folder of images: a process pool of Pillow or of OpenCV. Run by preprocess.py."""

import multiprocessing
import os
import sys
from pathlib import Path


def decode(path: str, out: str) -> None:
    import simplejpeg

    with open(path, "rb") as file:
        data = file.read()
    if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")
    else:
        simplejpeg.decode_jpeg(data, "RGB", strict=False)


def pillow(path: str, out: str) -> None:
    from PIL import Image

    image = Image.open(path).convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    image = image.resize((256, 256), Image.Resampling.BICUBIC, box=(left, top, left + shorter, top + shorter))
    image.save(out, "JPEG", quality=90)


def opencv(path: str, out: str) -> None:
    import cv2

    cv2.setNumThreads(1)
    image = cv2.imread(path)
    height, width = image.shape[:2]
    shorter = min(width, height)
    left, top = (width - shorter) // 2, (height - shorter) // 2
    image = cv2.resize(image[top : top + shorter, left : left + shorter], (256, 256), interpolation=cv2.INTER_AREA)
    cv2.imwrite(out, image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def main() -> None:
    way, raw, out, workers = sys.argv[1:5]
    if way == "pillow":
        import PIL

        assert "post" not in PIL.__version__, "this is Pillow-SIMD: give --peers a Python with plain Pillow"
    os.makedirs(out)
    paths = sorted(str(path) for path in Path(raw).glob("*/*"))
    outs = [f"{out}/{number}.jpg" for number in range(len(paths))]
    with multiprocessing.Pool(int(workers)) as pool:
        pool.starmap(globals()[way], zip(paths, outs), chunksize=32)


if __name__ == "__main__":
    main()
