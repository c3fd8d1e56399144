"""The extension against plain NumPy: resampled planes to the bit, sums of pixels against libjpeg-turbo's own RGB."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from imagefeed.codec import libjpeg
from imagefeed.preprocess.image import Planes, decode_planes
from imagefeed.preprocess.statistics import PixelSums
from tests.rawtree import smooth_image

ONE = 1 << 14


def saved(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resampled(plane: np.ndarray, start: float, end: float, outputs: int) -> np.ndarray:
    """Rows of `plane` mixed to `outputs` rows: Pillow's bicubic with antialiasing, weights of 14 bits that sum to 1."""
    scale = (end - start) / outputs
    widened = max(scale, 1)
    out = np.empty((outputs, plane.shape[1]), np.uint8)
    for number in range(outputs):
        center = start + (number + 0.5) * scale
        first = max(int(max(center - 2 * widened + 0.5, 0)), 0)
        stop = int(min(center + 2 * widened + 0.5, len(plane)))
        weights = cubic((np.arange(first, stop) - center + 0.5) * (1 / widened))
        weights = np.floor(weights * (ONE / weights.sum()) + 0.5).astype(int)
        weights[weights.argmax()] += ONE - weights.sum()
        mixed = (weights[:, None] * plane[first:stop].astype(int)).sum(0)
        out[number] = ((mixed + ONE // 2) >> 14).clip(0, 255)
    return out


def rescaled(plane, left, top, wide, high, size):
    rows = resampled(plane, top, top + high, size)
    return resampled(np.ascontiguousarray(rows.T), left, left + wide, size).T


# Scales from 0.35 to 9: 8, 16, 24 and more weights for each output.
@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (256, 256), (90, 120), (511, 999), (257, 300), (4400, 3000)]
)
def test_luma_is_resampled_to_the_bit(height, width):
    rng = np.random.default_rng(height)
    noise = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    jpeg = saved(noise, quality=95)
    denominator = next(d for d in (8, 4, 2, 1) if d == 1 or -(-min(height, width) // d) >= 256)
    plane = simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=256, min_width=256, min_factor=2)[..., 0]
    assert plane.shape == (-(-height // denominator), -(-width // denominator))
    shorter = min(height, width)
    box = ((width - shorter) / 2, (height - shorter) / 2, shorter, shorter)
    expected = rescaled(plane, *(value / denominator for value in box), 256)
    found = decode_planes(jpeg, 256, crop=True)
    np.testing.assert_array_equal(found.y, expected)
    assert (found.cb == 128).all() and (found.cr == 128).all() and found.cb.shape == (128, 128)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (301, 333), (1100, 800)])
def test_chroma_lies_where_libjpeg_would_put_it(subsampling, height, width):
    """Against RGB decoded, rescaled by Pillow and converted: a shift of half a pixel would show."""
    image = Image.fromarray(smooth_image(height, width, 3))
    found = decode_planes(saved(image, quality=98, subsampling=subsampling), 256, crop=True)
    shorter = min(height, width)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    box = (left, top, left + shorter, top + shorter)
    rgb = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC, box=box)).astype(float)
    red, green, blue = np.moveaxis(rgb, 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = [128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402]
    chroma = [band.reshape(128, 2, 128, 2).mean((1, 3)) for band in chroma]
    for name, plane, band in zip(Planes._fields, found, (luma, *chroma)):
        difference = plane - band
        assert abs(difference.mean()) < 0.3 and np.abs(difference).mean() < 1, name
        if name == "y":
            continue
        shifted = np.abs(np.roll(plane.astype(float), 1, 1)[:, 2:-2] - band[:, 2:-2]).mean()
        assert np.abs(difference).mean() < shifted / 2, name


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(256, 341), (256, 342), (300, 256), (257, 256)])
def test_a_stored_image_is_taken_as_it_is(size, progressive):
    """Nothing is resampled where nothing has to be, odd sides and progressive files included."""
    image = Image.fromarray(smooth_image(*size, 5))
    jpeg = saved(image, quality=95, subsampling=2, progressive=progressive)
    found = decode_planes(jpeg, 256, crop=False)
    assert found.y.shape == size and found.cb.shape == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    np.testing.assert_array_equal(found.y, simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0])


def test_sums_are_of_the_pixels_that_libjpeg_makes_of_the_planes():
    """All pairs of chroma, over luma from black to white, with clipping: RGB of libjpeg-turbo, each sample for 2x2 pixels."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1))
    jpeg = saved(image, quality=100, subsampling=2)
    rgb = simplejpeg.decode_jpeg(jpeg, "RGB", fastupsample=True).astype(np.int64)
    sums = PixelSums(512)
    sums.add(decode_planes(jpeg, 512, crop=True))
    np.testing.assert_array_equal(sums.image.transpose(1, 2, 0), rgb)
    np.testing.assert_array_equal(sums.channels, rgb.sum((0, 1)))
    flat = rgb.reshape(-1, 3)
    np.testing.assert_array_equal(sums.products, (flat.T @ flat)[np.triu_indices(3)])


def test_sums_refuse_planes_that_do_not_fit():
    planes = decode_planes(saved(Image.fromarray(smooth_image(64, 64, 1))), 64, crop=True)
    with pytest.raises(ValueError, match="do not match"):
        PixelSums(65).add(planes)
    with pytest.raises(ValueError, match="do not match"):
        PixelSums(64).add(planes._replace(cb=planes.cb[:-1]))


def test_other_colors_and_no_size_are_refused():
    image = Image.fromarray(smooth_image(30, 40, 1))
    with pytest.raises(ValueError, match="neither YCbCr nor gray"):
        libjpeg.rescale(saved(image.convert("CMYK")), 64, True, False, False)
    with pytest.raises(ValueError, match="size must be"):
        libjpeg.rescale(saved(image), 0, True, False, False)


def test_a_header_says_size_and_colors():
    image = Image.fromarray(smooth_image(30, 40, 1))
    assert libjpeg.header(saved(image)) == (40, 30, "YCbCr", False)
    assert libjpeg.header(saved(image.convert("L"))) == (40, 30, "gray", False)
    assert libjpeg.header(saved(image.convert("CMYK"))) == (40, 30, "other", False)
    assert libjpeg.header(saved(image, exif=Image.Exif())) == (40, 30, "YCbCr", True)
    with pytest.raises(ValueError):
        libjpeg.header(saved(image)[:100])


def test_a_picture_gone_over_without_end_is_refused():
    """A progressive JPEG of nothing but its first scan, many times."""
    jpeg = bytearray(saved(Image.fromarray(smooth_image(64, 64, 1)), progressive=True))
    scan = jpeg.index(b"\xff\xda")
    header = int.from_bytes(jpeg[scan + 2 : scan + 4])
    jpeg[scan + 1 + header] = 0  # all bits of the coefficients at once, so that the next scan may do the same
    once = bytes(jpeg[scan : jpeg.index(b"\xff\xc4", scan)])
    few, many = (bytes(jpeg[:scan]) + once * times + b"\xff\xd9" for times in (50, 200))
    assert libjpeg.rescale(few, 64, True, False, False)[:2] == (64, 64)
    with pytest.raises(ValueError, match="more than 100 scans"):
        libjpeg.rescale(many, 64, True, False, False)


def test_every_byte_may_be_wrong():
    """Whatever is changed in a file, it is decoded or refused; never more."""
    rng = np.random.default_rng(4)
    jpeg = bytearray(saved(Image.fromarray(smooth_image(90, 120, 1)), quality=90))
    refused = 0
    for _ in range(3000):
        corrupt = bytearray(jpeg)
        for at in rng.integers(0, len(jpeg), rng.integers(1, 4)):
            corrupt[at] = rng.integers(0, 256)
        try:
            if libjpeg.header(bytes(corrupt))[2] != "other":
                height, width, y, cb, _ = libjpeg.rescale(bytes(corrupt), 64, True, False, False)
                assert (height, width, len(y), len(cb)) == (64, 64, 64 * 64, 32 * 32)
        except ValueError:
            refused += 1
    assert 0 < refused < 3000
