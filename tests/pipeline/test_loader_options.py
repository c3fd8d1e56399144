"""What the loader can be asked for besides the paper's way, each against plain NumPy or torch."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.plan import offset
from imagefeed.pipeline.source import jpeg_size
from tests.conftest import LUMA, crop, jpeg, picture, same
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal


def first(manifest, split="train", batch_size=8, **options):
    with ImageLoader(manifest, split, batch_size, **options) as loader:
        batch = next(iter(loader))
        return batch, loader.plan.look(0, batch.ids.numpy())


def plain(batch, look):
    """The crops of the batch's records as they are, 0-255."""
    return np.stack(
        [
            crop(jpeg(picture(record_id)), *offset(look.places[0, n], 32), look.mirrors[0, n])
            for n, record_id in enumerate(batch.ids.tolist())
        ]
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_dtype_and_layout(tiny, device, dtype, layout):
    batch, look = first(tiny, dtype=dtype, memory_format=layout, pca_jitter=0, device=device)
    mean = 0 if dtype == "uint8" else tiny.load_statistics()["channel_mean"][:, None, None]
    assert batch.images.dtype == getattr(torch, dtype)
    assert batch.images.shape == (8, 3, 224, 224)
    assert batch.images.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    for image, right in zip(batch.images.float().cpu(), plain(batch, look) - mean, strict=True):
        assert same(image, right)


def test_uint8_takes_the_color_offset_and_clips(tiny, device):
    batch, look = first(tiny, dtype="uint8", pca_jitter=0.5, device=device)
    statistics = tiny.load_statistics()
    axes = 0.5 * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]
    wanted = (plain(batch, look) + (look.color @ axes.T)[:, :, None, None]).clip(0, 255)
    assert all(same(image, right) for image, right in zip(batch.images.float().cpu(), wanted, strict=True))
    assert (batch.images == 255).any() and (batch.images == 0).any()


def test_mean_image_and_deviation(tiny, device):
    batch, look = first(tiny, mean="image", std="dataset", pca_jitter=0, device=device)
    statistics = tiny.load_statistics()
    places = offset(look.places[0], 32)
    for n, (row, column) in enumerate(places.tolist()):
        mean = statistics["mean_image"][row : row + 224, column : column + 224].transpose(2, 0, 1)
        mean = mean[:, :, ::-1] if look.mirrors[0, n] else mean
        wanted = (plain(batch, look)[n] - mean) / statistics["channel_std"][:, None, None]
        assert same(batch.images[n].cpu() * 50, wanted * 50)


def test_random_resized_crops(tiny, device):
    with ImageLoader(tiny, "train", 8, random_resized_crop=True, pca_jitter=0, crop_size=64, device=device) as loader:
        batch = next(iter(loader))
        look = loader.plan.look(0, batch.ids.numpy())
        boxes = loader.plan.boxes(0, batch.ids.numpy(), np.full(8, 256), np.full(8, 256))
    mean = tiny.load_statistics()["channel_mean"][:, None, None]
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        pixels = crop(jpeg(picture(int(batch.ids[n]))), 0, 0, 0, 256)[:, top : top + height, left : left + width]
        wanted = F.interpolate(
            torch.from_numpy(pixels[None].copy()), (64, 64), mode="bilinear", align_corners=False, antialias=True
        )[0].numpy()
        wanted = (wanted[:, :, ::-1] if look.mirrors[0, n] else wanted) - mean
        difference = batch.images[n].cpu().numpy() - wanted
        assert np.abs(np.tensordot(LUMA, difference, 1)).mean() < 1 and np.abs(difference).mean() < 5


def test_random_resized_crops_fit_images_of_any_shape(oblong):
    batch, _ = first(oblong, random_resized_crop=True, crop_size=64)
    assert batch.images.shape == (8, 3, 64, 64) and torch.isfinite(batch.images).all()


def test_color_jitter(tiny, device):
    strengths = (0.4, 0.4, 0.4, 0.1)
    with ImageLoader(tiny, "train", 8, color_jitter=strengths, pca_jitter=0, device=device) as loader:
        batch = next(iter(loader))
        look = loader.plan.look(0, batch.ids.numpy())
        maps = loader.plan.jitter(0, batch.ids.numpy(), strengths)
    mean = tiny.load_statistics()["channel_mean"][:, None, None]
    for pixels, (a, b), image in zip(plain(batch, look), maps, batch.images.cpu().numpy(), strict=True):
        wanted = np.einsum("ij,jyx->iyx", a, pixels) + (b @ pixels.mean((1, 2)))[:, None, None]
        assert same(image, wanted.clip(0, 255) - mean)


@pytest.mark.parametrize("shuffle", ["global", "blocks", "none"])
def test_shuffles_take_each_record_once(tiny, shuffle):
    with ImageLoader(tiny, "train", 5, shuffle=shuffle, crop_size=32) as loader:
        ids = torch.cat([batch.ids for batch in loader]).tolist()
    assert sorted(ids) == list(range(50))
    assert (ids == list(range(50))) == (shuffle == "none")


def test_neither_checking_nor_reading_ahead_changes_a_batch(tiny):
    def batches(**options):
        with ImageLoader(tiny, "train", 5, crop_size=32, **options) as loader:
            return list(loader)

    usual = batches()
    assert equal(usual, batches(verify_checksums=False))
    assert equal(usual, batches(read_ahead=0))
    assert equal(usual, batches(read_ahead=100))


def test_too_many_damaged_records_end_the_run(tiny_copy, caplog):
    for record_id in (3, 20, 41):
        flip_bit(tiny_copy, "train", record_id)
    with ImageLoader(tiny_copy, "train", 5, crop_size=32, max_corrupt=3) as loader, caplog.at_level(logging.WARNING):
        for _ in range(3):  # the same in each epoch
            list(loader)
        assert loader.corrupt == 3
    with ImageLoader(tiny_copy, "train", 5, crop_size=32, max_corrupt=2) as loader:
        with pytest.raises(UserError, match="3 records are corrupt, more than the 2 that --max-corrupt allows"):
            list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"memory_format": "CHW"}, "memory_format must be one of"),
        ({"cache": "disk"}, "cache must be one of"),
        ({"mean": "none"}, "mean must be one of"),
        ({"hw_decoder_load": 2}, "hw_decoder_load must be 0 to 1"),
        ({"read_ahead": -1}, "must be 0 or more"),
        ({"shuffle": "some"}, "shuffle must be one of"),
        ({"color_jitter": (-1, 0, 0, 0)}, "strengths|jitter"),
        ({"color_jitter": (0.1, 0.1), "views": "center"}, "strengths|jitter"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        ImageLoader(tiny, "train", 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "image", "random_resized_crop": True}, "the mean image fits whole images"),
        ({"mean": "image", "color_jitter": (0.1, 0, 0, 0)}, "the mean image fits whole images"),
        ({"cache": "host", "random_resized_crop": True}, "cached images are cropped"),
        ({"cache": "device", "color_jitter": (0, 0, 0, 0.1)}, "cached images are cropped"),
    ],
)
def test_options_that_cannot_be_together(tiny, options, message):
    with pytest.raises(UserError, match=message):
        ImageLoader(tiny, "train", 4, **options)


def test_images_of_different_sizes_have_no_mean_image_and_no_place_on_the_device(oblong):
    with pytest.raises(UserError, match="the mean image fits"):
        ImageLoader(oblong, "train", 4, mean="image")
    with pytest.raises(UserError, match="of different sizes"):
        ImageLoader(oblong, "train", 4, cache="device")


def test_a_jpegs_size_is_read_from_its_header():
    for shape in ((256, 256), (256, 341), (700, 256)):
        assert jpeg_size(np.frombuffer(jpeg(picture(1, *shape)), np.uint8)) == shape
