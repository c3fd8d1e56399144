import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from imagefeed.pipeline.graph import GraphOptions, image_pipeline
from imagefeed.pipeline.plan import FAR, MIDDLE, NEAR, TEN_MIRRORS, TEN_PLACES, offset
from tests.conftest import crop, jpeg, picture, same

NO_MEAN = np.zeros(3, np.float32)


def run(jpegs, places, mirrors, device, means=NO_MEAN, crop_size=224):
    """The graph's output for one batch: places (V, N, 2), mirrors (V, N)."""
    inputs = [[np.frombuffer(data, np.uint8) for data in jpegs]]
    inputs.append(np.array(np.broadcast_to(means, (len(jpegs), 3)), np.float32, order="C"))
    for place, mirror in zip(places, mirrors, strict=True):
        inputs += [np.array(place, np.int64, order="C"), np.array(mirror, np.int32, order="C")]
    device_id = None if device == "cpu" else 0
    options = GraphOptions(crop_size, len(places), device_id=device_id, num_threads=2, prefetch=1)
    pipeline = image_pipeline(lambda i: inputs, len(jpegs), options)
    (images,) = pipeline.run()
    return torch.from_dlpack(images.as_tensor()).cpu().numpy()


def test_other_pictures_are_told_apart():
    """What the comparison of these tests notices, and what it lets pass: rounding, and chroma that is not interpolated."""
    right = crop(jpeg(picture(1)), 10, 20, 0)
    again = crop(jpeg(picture(1)), 10, 20, 0) + 0.4
    assert same(again, right)
    coarse = simplejpeg.decode_jpeg(jpeg(picture(1)), fastupsample=True)[10:234, 20:244].transpose(2, 0, 1)
    assert same(coarse, right) and np.abs(coarse - right).max() > 10
    stale, block = right.copy(), right.copy()
    stale[:, 200:] = crop(jpeg(picture(2)), 10, 20, 0)[:, 200:]
    block[:, 64:72, 96:104] = 128
    for wrong in (
        crop(jpeg(picture(2)), 10, 20, 0),
        crop(jpeg(picture(1)), 10, 20, 1),
        crop(jpeg(picture(1)), 11, 20, 0),
        crop(jpeg(picture(1)), 10, 19, 0),
        right[::-1],
        right.transpose(0, 2, 1),
        right + 1,
        stale,
        block,
    ):
        assert not same(wrong, right)


def test_every_offset_is_exact(device):
    """All 33 rows with all 33 columns in turn, each from the smallest and the largest place that means it."""
    data = jpeg(picture(5))
    rows = np.arange(33)
    columns = (rows * 7 + 3) % 33
    lowest = -(-(np.stack((rows, columns), 1) << 30) // 33)
    highest = -(-(np.stack((rows, columns), 1) + 1 << 30) // 33) - 1
    for places in (lowest, highest):
        assert offset(places[:, 0], 32).tolist() == rows.tolist()
        images = run([data] * 33, [places], [np.zeros(33)], device)
        assert all(same(images[n], crop(data, rows[n], columns[n], 0)) for n in range(33))


def test_crops_of_images_of_any_shape_begin_where_the_plan_says(device):
    shapes = [(256, 256), (256, 257), (700, 256), (256, 331), (224, 224), (225, 224), (301, 480)]
    jpegs = [jpeg(picture(seed, *shape)) for seed, shape in enumerate(shapes)]
    random = np.random.RandomState(0)
    for places in (random.randint(0, FAR, (7, 2)), np.full((7, 2), FAR), np.full((7, 2), MIDDLE), np.full((7, 2), NEAR)):
        mirrors = random.randint(0, 2, 7)
        images = run(jpegs, [places], [mirrors], device)
        for n, (height, width) in enumerate(shapes):
            row, column = offset(places[n, 0], height - 224), offset(places[n, 1], width - 224)
            assert same(images[n], crop(jpegs[n], row, column, mirrors[n])), shapes[n]


def test_each_record_has_its_own_mean(device):
    jpegs = [jpeg(picture(seed)) for seed in range(4)]
    means = np.random.RandomState(0).uniform(-50, 150, (4, 3))
    images = run(jpegs, [np.full((4, 2), MIDDLE)], [np.zeros(4)], device, means)
    assert images.dtype == np.float32
    for n in range(4):
        assert same(images[n], crop(jpegs[n], 16, 16, 0) - means[n][:, None, None])


def test_ten_views_come_from_one_picture_in_their_order(device):
    jpegs = [jpeg(picture(seed)) for seed in range(3)]
    places, mirrors = np.repeat(TEN_PLACES[:, None], 3, 1), np.repeat(TEN_MIRRORS[:, None], 3, 1)
    images = run(jpegs, places, mirrors, device)
    assert images.shape == (3, 10, 3, 224, 224)
    for n in range(3):
        for view, (row, column) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)] * 2):
            assert same(images[n, view], crop(jpegs[n], row, column, view >= 5))


def test_size_is_free(device):
    images = run([jpeg(picture(0))], [[[MIDDLE, FAR]]], [[1]], device, crop_size=64)
    assert same(images[0], crop(jpeg(picture(0)), 96, 192, 1, 64))


def test_exif_orientation_is_left_alone(device):
    """Records are stored upright; a foreign tag must not turn one and swap its crop."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(3)).save(buffer, "JPEG", quality=90, exif=exif)
    images = run([buffer.getvalue()], [[[NEAR, FAR]]], [[0]], device)
    assert same(images[0], crop(buffer.getvalue(), 0, 32, 0))


def test_bytes_that_are_no_jpeg_are_an_error(device):
    with pytest.raises(RuntimeError):
        run([jpeg(picture(0)), b"no picture at all"], [np.zeros((2, 2))], [np.zeros(2)], device)
