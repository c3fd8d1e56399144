"""Statistics against a plain float64 reference."""

import numpy as np
import pytest

from imagefeed.preprocess.image import Planes
from imagefeed.preprocess.statistics import PixelSums


def images(count, width=64, height=64, seed=0):
    rng = np.random.default_rng(seed)
    half = ((height + 1) // 2, (width + 1) // 2)
    return [
        Planes(*(rng.normal(center, 40, shape).clip(0, 255).astype(np.uint8) for center, shape in planes))
        for planes in [((140, (height, width)), (120, half), (133, half))] * count
    ]


def rgb(planes):
    """JFIF 1.02, section 7, each chroma sample for 2x2 pixels, in float64, then rounded and clipped; with libjpeg's constants,
    which are those of the standard in units of 2**-16."""
    y = planes.y.astype(np.float64)
    cb, cr = (plane.astype(np.float64).repeat(2, 0).repeat(2, 1)[: y.shape[0], : y.shape[1]] - 128 for plane in planes[1:])
    channels = y + 91881 / 65536 * cr, y - 22554 / 65536 * cb - 46802 / 65536 * cr, y + 116130 / 65536 * cb
    return np.floor(np.stack(channels, -1) + 0.5).clip(0, 255)


def summed(pictures, size=64):
    sums = PixelSums(size)
    for planes in pictures:
        sums.add(planes)
    return sums


@pytest.mark.parametrize("width", [64, 65, 100, 201, 5001])
def test_equals_a_float64_reference(width):
    """Odd widths, and one wider than what is summed at a time."""
    pictures = images(5, width)
    found = summed(pictures).statistics()
    pixels = [rgb(planes) for planes in pictures]
    flat = np.concatenate([image.reshape(-1, 3) for image in pixels])
    left = (width - 64) // 2
    np.testing.assert_allclose(found["channel_mean"], flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["channel_std"], flat.std(0), rtol=1e-9)
    np.testing.assert_allclose(found["covariance"], np.cov(flat.T, bias=True), rtol=1e-8)
    np.testing.assert_allclose(found["mean_image"], np.mean([image[:, left : left + 64] for image in pixels], 0), rtol=1e-12)
    assert (found["images"], found["pixels"]) == (5, 5 * 64 * width)


def test_extreme_pixels_are_summed_exactly():
    """All 255, where 32-bit sums of a row are at their largest."""
    white = Planes(np.full((256, 8192), 255, np.uint8), *[np.full((128, 4096), 128, np.uint8)] * 2)
    sums = summed([white] * 3, 256)
    assert (sums.products == 3 * 256 * 8192 * 255 * 255).all()
    assert (sums.channels == 3 * 256 * 8192 * 255).all()


def test_any_split_of_the_work_gives_the_same_bits():
    pictures = images(9)
    whole = summed(pictures).statistics()
    parts = PixelSums(64)
    for share in (pictures[6:], pictures[:1], pictures[1:6]):
        parts.merge(PixelSums.unpack(PixelSums.from_arrays(summed(share).arrays()).pack()))
    for name, value in parts.statistics().items():
        assert (value == whole[name]).all(), name


def test_eigenvectors_are_sorted_columns_with_a_fixed_sign():
    found = summed(images(4)).statistics()
    values, vectors = found["eigenvalues"], found["eigenvectors"]
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(found["covariance"] @ vectors, vectors * values, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()


def test_grey_images_give_no_negative_eigenvalue():
    gray = images(1)[0]
    gray = gray._replace(cb=np.full_like(gray.cb, 128), cr=np.full_like(gray.cr, 128))
    assert (summed([gray]).statistics()["eigenvalues"] >= 0).all()
