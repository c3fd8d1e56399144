"""Statistics against a plain float64 reference."""

import numpy as np
import pytest

from preprocess.statistics import PixelSums


def images(count, width=64, height=64, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.uniform(-1, 1, (3, 3))
    return [(rng.normal(0, 50, (height, width, 3)) @ mixing + 120).clip(0, 255).astype(np.uint8) for _ in range(count)]


def summed(pixels, size=64):
    sums = PixelSums(size)
    for image in pixels:
        sums.add(image)
    return sums


@pytest.mark.parametrize("width", [64, 65, 100, 201])
def test_equals_a_float64_reference(width):
    """Widths that are no multiple of the block too."""
    pixels = images(5, width)
    found = summed(pixels).statistics()
    flat = np.concatenate([image.reshape(-1, 3) for image in pixels]).astype(np.float64)
    left = (width - 64) // 2
    np.testing.assert_allclose(found["channel_mean"], flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["channel_std"], flat.std(0), rtol=1e-9)
    np.testing.assert_allclose(found["covariance"], np.cov(flat.T, bias=True), rtol=1e-8)
    np.testing.assert_allclose(
        found["mean_image"], np.mean([image[:, left : left + 64] for image in pixels], 0), rtol=1e-12
    )
    assert (found["images"], found["pixels"]) == (5, 5 * 64 * width)


def test_extreme_pixels_are_summed_exactly():
    """All 255: the float32 sums inside a block are at their largest."""
    sums = summed([np.full((256, 256, 3), 255, np.uint8)] * 3, 256)
    assert (sums.products == 3 * 256 * 256 * 255 * 255).all()
    assert (sums.channels == 3 * 256 * 256 * 255).all()


def test_any_split_of_the_work_gives_the_same_bits():
    pixels = images(9)
    whole = summed(pixels).statistics()
    parts = PixelSums(64)
    for share in (pixels[6:], pixels[:1], pixels[1:6]):
        parts.merge(PixelSums.from_arrays(summed(share).arrays()))
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
    grey = np.repeat(images(2)[0][..., :1], 3, axis=2)
    assert (summed([grey]).statistics()["eigenvalues"] >= 0).all()
