"""Boxes resized to crops, against torch; color jitter, against NumPy in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagefeed.codec import decoder
from imagefeed.codec.decode import Format, convert_jobs, decode_jobs
from tests.codec.test_decoder import DTYPES, IRREGULAR, expected, make_jobs, needs_avx2, rgb
from tests.conftest import jpeg, picture


def resized(pixels: np.ndarray, job: np.void) -> np.ndarray:
    """The box of an image (height, width, 3), resized by torch to uint8 (size, size, 3), and mirrored."""
    box = pixels[job["top"] : job["top"] + job["height"], job["left"] : job["left"] + job["width"]]
    image = torch.from_numpy(box.copy()).permute(2, 0, 1)[None]
    image = F.interpolate(image, (int(job["size"]),) * 2, mode="bilinear", antialias=True, align_corners=False)[0]
    return image.permute(1, 2, 0).numpy()[:, :: -1 if job["mirror"] else 1]


def draw_boxes(rng: np.random.Generator, heights: np.ndarray, widths: np.ndarray) -> dict[str, np.ndarray]:
    height, width = rng.integers(1, heights + 1), rng.integers(1, widths + 1)
    top, left = rng.integers(0, heights - height + 1), rng.integers(0, widths - width + 1)
    return {"top": top, "left": left, "height": height, "width": width, "mirror": rng.integers(0, 2, len(heights))}


@pytest.mark.parametrize("size", [1, 31, 32, 97, 224])
def test_boxes_of_noise_are_resized_as_torch_does(size):
    """To the bit, also to one pixel and from one, enlarged and reduced by more than a vector holds."""
    rng = np.random.default_rng(size)
    heights, widths = rng.integers(1, 600, (2, 40)) // rng.integers(1, 20, 40) + 1
    images = [rng.integers(0, 2, (*shape, 3), dtype=np.uint8) * 255 for shape in zip(heights, widths)]
    out = np.zeros((len(images), size, size, 3), np.uint8)
    fields = draw_boxes(rng, heights, widths) | {"data": [image.ctypes.data for image in images], "size": size}
    jobs = make_jobs([b""] * len(images), out, image_height=heights, image_width=widths, **fields)
    convert_jobs(jobs, Format("uint8", True), 0, len(jobs))
    for image, job, found in zip(images, jobs, out):
        np.testing.assert_array_equal(found, resized(image, job))


def recolored(crop: np.ndarray, colors: np.ndarray) -> np.ndarray:
    mean = crop.mean((0, 1), dtype=np.float64)
    return (crop @ colors[0].T.astype(np.float64) + colors[1].astype(np.float64) @ mean).clip(0, 255)


@needs_avx2
def test_resized_and_jittered_crops_are_normalized_like_plain_ones():
    """Of JPEGs and of their pixels; both kinds of change, one of them and none, in one call."""
    rng = np.random.default_rng(0)
    jpegs = [jpeg(picture(seed, 256, 200 + 40 * seed)) for seed in range(4)] * 4
    images, count, size = [rgb(data) for data in jpegs], len(jpegs), 97
    fields = draw_boxes(rng, *np.array([image.shape[:2] for image in images]).T)
    fields |= {"size": np.arange(count) // 4 % 2 * size, "recolor": np.arange(count) // 8}
    plain = {"top": 11, "left": 6, "height": size, "width": size}
    fields |= {name: np.where(fields["size"], fields[name], value) for name, value in plain.items()}
    fields["colors"] = rng.normal(0, 0.3, (count, 2, 3, 3)) + np.array([np.eye(3), np.zeros((3, 3))])
    crops = np.zeros((count, size, size, 3), np.uint8)
    jobs = make_jobs(jpegs, crops, **fields)
    decoder.decode(jobs, np.ones(3, np.float32), None, "uint8", True, False, 0, count)
    for image, job, found in zip(images, jobs, crops):
        box = image[11 : 11 + size, 6 : 6 + size][:, :: -1 if job["mirror"] else 1]
        crop = resized(image, job) if job["size"] else box
        difference = np.abs(found - (recolored(crop, job["colors"]) if job["recolor"] else crop))
        assert difference.max() <= (0.5001 if job["recolor"] else 0)
    whole = make_jobs(jpegs, crops, mean=rng.uniform(0, 99, (count, 3)), height=size, width=size)
    for dtype in DTYPES:
        for channels_last in (False, True):
            form = Format(dtype, channels_last, np.array([0.02, 1, 0.3], np.float32))
            out = np.zeros((2, *crops.shape), np.dtype(np.uint16 if dtype == "bfloat16" else dtype))
            jobs = make_jobs(jpegs, out[0], mean=whole["mean"], **fields)
            decoder.decode(jobs, form.scale, None, dtype, channels_last, False, 0, count)
            assert jobs["done"].all()
            jobs["data"], jobs["out"] = [image.ctypes.data for image in images], jobs["out"] + out[0].nbytes
            convert_jobs(jobs, form, 0, len(jobs))
            np.testing.assert_array_equal(*out)
            for crop, job, found in zip(crops, whole, out[0]):
                wanted = expected(crop, job, form)
                np.testing.assert_array_equal(found.view(wanted.dtype).reshape(wanted.shape), wanted)


def test_colors_of_any_size_are_clipped():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    factors = [1e30, -1e30, 3e9, 300, -1, 0.5, 0]
    out = np.zeros((len(factors), 1, 256, 3), np.uint8)
    colors = np.array(factors)[:, None, None, None] * np.array([np.eye(3), np.zeros((3, 3))])
    fields = {"data": pixels.ctypes.data, "image_height": 1, "image_width": 256, "height": 1, "width": 256}
    jobs = make_jobs([b""] * len(factors), out, **fields, recolor=1, colors=colors)
    convert_jobs(jobs, Format("uint8", True), 0, len(jobs))
    for factor, found in zip(factors, out):
        np.testing.assert_array_equal(found[0, :, 0], np.floor((np.arange(256) * factor).clip(0, 255) + 0.5))


@pytest.mark.parametrize("name", ["4:4:4", "progressive"])
def test_an_irregular_image_is_resized_and_jittered_too(name):
    """Also if the whole image is asked for as bytes."""
    pixels = rgb(IRREGULAR[name])
    colors = np.array([np.eye(3) * 0.5, np.eye(3) * 0.5])
    for size, recolor in ((31, 0), (0, 1), (31, 1)):
        out = np.zeros((1, size or 48, size or 40, 3), np.uint8)
        jobs = make_jobs([IRREGULAR[name]], out, size=size, recolor=recolor, colors=colors)
        assert decode_jobs(jobs, Format("uint8", True), 0, 1) == {}
        wanted = resized(pixels, jobs[0]) if size else pixels
        wanted = recolored(wanted, jobs["colors"][0]) if recolor else wanted
        assert np.abs(out[0] - wanted).max() <= 0.5001


def test_a_mean_image_does_not_fit_resized_crops():
    jobs = make_jobs([jpeg(picture(0))], np.zeros((1, 256, 256, 3), np.uint8), size=20)
    with pytest.raises(ValueError, match="do not fit each other"):
        decoder.decode(jobs, np.ones(3, np.float32), np.ones((3, 256, 256), np.float32), "float32", True, True, 0, 1)
