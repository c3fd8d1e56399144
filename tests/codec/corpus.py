"""Writes tiny JPEGs for `make fuzz`: python -m tests.codec.corpus FOLDER."""

import sys
from pathlib import Path

import numpy as np
import simplejpeg

from tests.rawtree import smooth_image


def corpus() -> list[bytes]:
    """Regular JPEGs and a few others, of 5 to 80 pixels a side: smooth, noisy, of black and white blots, of all qualities.

    In each ten, two are gray and two 4:4:4, of which the decoder takes samples only; in twenty, one is 4:2:2.
    """
    rng = np.random.default_rng(0)
    jpegs = []
    for number in range(160):
        height, width = rng.integers(5, 81, 2)
        pixels = smooth_image(height, width, number)
        if number % 3 == 1:
            pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
        elif number % 3 == 2:
            pixels = np.ascontiguousarray(np.where(pixels > 127, 255, 0).astype(np.uint8))
        colors, subsampling = "RGB", "422" if number % 20 == 0 else "444" if number % 5 == 1 else "420"
        if number % 5 == 2:
            pixels, colors, subsampling = np.ascontiguousarray(pixels[..., :1]), "GRAY", "Gray"
        jpegs.append(simplejpeg.encode_jpeg(pixels, int(rng.choice([5, 30, 75, 90, 100])), colors, subsampling))
    return jpegs


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, jpeg in enumerate(corpus()):
        (folder / f"{number:03}.jpg").write_bytes(jpeg)
