"""The loader's options besides the paper's, each against plain NumPy or torch."""

import inspect
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.reader import Dataset, jpeg_size
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.options import IMAGENET_MEAN, IMAGENET_STD, OPTIONS
from imagefeed.pipeline.plan import offset
from tests.conftest import LUMA, crop, jpeg, picture, same
from tests.dataset.test_columns import store_columns
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal


def first(manifest, split="train", batch_size=8, **options):
    with ImageLoader(manifest, split, batch_size, **options) as loader:
        batch = next(iter(loader))
        return batch, loader.plan.augmentation(0, batch.ids.numpy())


def plain(batch, drawn):
    """The crops of the batch's records as they are, 0-255."""
    return np.stack(
        [
            crop(jpeg(picture(record_id)), *offset(drawn.places[0, n], 32), drawn.mirrors[0, n])
            for n, record_id in enumerate(batch.ids.tolist())
        ]
    )


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_dtype_and_memory_format(tiny, device, dtype, memory_format):
    batch, drawn = first(tiny, dtype=dtype, memory_format=memory_format, pca_jitter=0, device=device)
    mean = 0 if dtype == "uint8" else tiny.load_statistics()["channel_mean"][:, None, None]
    assert batch.images.dtype == getattr(torch, dtype)
    assert batch.images.shape == (8, 3, 224, 224)
    assert batch.images.is_contiguous(
        memory_format=torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    )
    for image, right in zip(batch.images.float().cpu(), plain(batch, drawn) - mean, strict=True):
        assert same(image, right)


def test_uint8_takes_the_color_offset_and_clips(tiny, device):
    batch, drawn = first(tiny, dtype="uint8", pca_jitter=0.5, device=device)
    statistics = tiny.load_statistics()
    axes = 0.5 * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]
    wanted = (plain(batch, drawn) + (drawn.color @ axes.T)[:, :, None, None]).clip(0, 255)
    assert all(same(image, right) for image, right in zip(batch.images.float().cpu(), wanted, strict=True))
    assert (batch.images == 255).any() and (batch.images == 0).any()


def test_mean_image_and_deviation(tiny, device):
    batch, drawn = first(tiny, mean="image", std="dataset", pca_jitter=0, device=device)
    statistics = tiny.load_statistics()
    places = offset(drawn.places[0], 32)
    for n, (row, column) in enumerate(places.tolist()):
        mean = statistics["mean_image"][row : row + 224, column : column + 224].transpose(2, 0, 1)
        mean = mean[:, :, ::-1] if drawn.mirrors[0, n] else mean
        wanted = (plain(batch, drawn)[n] - mean) / statistics["channel_std"][:, None, None]
        assert same(batch.images[n].cpu() * 50, wanted * 50)


def test_random_resized_crops(tiny, device):
    with ImageLoader(tiny, "train", 8, random_resized_crop=True, pca_jitter=0, crop_size=64, device=device) as loader:
        batch = next(iter(loader))
        drawn = loader.plan.augmentation(0, batch.ids.numpy())
        boxes = loader.plan.boxes(0, batch.ids.numpy(), np.full(8, 256), np.full(8, 256))
    mean = tiny.load_statistics()["channel_mean"][:, None, None]
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        pixels = crop(jpeg(picture(int(batch.ids[n]))), 0, 0, 0, 256)[:, top : top + height, left : left + width]
        wanted = F.interpolate(
            torch.from_numpy(pixels[None].copy()), (64, 64), mode="bilinear", align_corners=False, antialias=True
        )[0].numpy()
        wanted = (wanted[:, :, ::-1] if drawn.mirrors[0, n] else wanted) - mean
        difference = batch.images[n].cpu().numpy() - wanted
        assert np.abs(np.tensordot(LUMA, difference, 1)).mean() < 1 and np.abs(difference).mean() < 5


def test_random_resized_crops_fit_images_of_any_shape(oblong):
    batch, _ = first(oblong, random_resized_crop=True, crop_size=64)
    assert batch.images.shape == (8, 3, 64, 64) and torch.isfinite(batch.images).all()


def test_color_jitter(tiny, device):
    strengths = (0.4, 0.4, 0.4, 0.1)
    with ImageLoader(tiny, "train", 8, color_jitter=strengths, pca_jitter=0, device=device) as loader:
        batch = next(iter(loader))
        drawn = loader.plan.augmentation(0, batch.ids.numpy())
        maps = loader.plan.jitter(0, batch.ids.numpy(), strengths)
    mean = tiny.load_statistics()["channel_mean"][:, None, None]
    for pixels, (a, b), image in zip(plain(batch, drawn), maps, batch.images.cpu().numpy(), strict=True):
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
        with pytest.raises(UserError, match="3 corrupt records, more than the 2 that max_corrupt allows"):
            list(loader)


@pytest.mark.parametrize(
    ("views", "said"), [("random", "the next record replaces it"), ("center", "the evaluation leaves it out")]
)
def test_a_damaged_record_is_reported_once(tiny_copy, caplog, views, said):
    flip_bit(tiny_copy, "train", 3)
    with ImageLoader(tiny_copy, "train", 5, crop_size=32, views=views) as loader, caplog.at_level(logging.WARNING):
        for _ in range(3):
            list(loader)
    assert [said in record.message for record in caplog.records] == [True]


def test_a_dataset_of_another_split_is_refused(tiny):
    with pytest.raises(UserError, match="the Dataset is of split val, but split is train"):
        ImageLoader(Dataset(tiny, "val")[:4], "train", 2)
    with pytest.raises(UserError, match="the Dataset is of split val, but split is train"):
        ImageLoader([Dataset(tiny, "val"), tiny], "train", 2)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        (ValueError, {"crop_size": 0}, "crop_size must be a whole number of at least 1"),
        (ValueError, {"crop_size": -3}, "crop_size must be"),
        (ValueError, {"crop_size": 24.0}, "crop_size must be"),
        (ValueError, {"pca_jitter": float("nan")}, "pca_jitter must be a number of at least 0"),
        (ValueError, {"pca_jitter": -1}, "pca_jitter must be"),
        (ValueError, {"position": -1}, "position must be"),
        (ValueError, {"num_threads": 0}, "num_threads must be"),
        (ValueError, {"prefetch": 0}, "prefetch must be"),
        (ValueError, {"read_ahead": -1}, "read_ahead must be"),
        (ValueError, {"max_corrupt": -1}, "max_corrupt must be"),
        (ValueError, {"cache_bytes": -1}, "cache_bytes must be a number of bytes"),
        (ValueError, {"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, uint8, not 'float64'"),
        (ValueError, {"memory_format": "CHW"}, "memory_format must be one of"),
        (ValueError, {"cache": "disk"}, "cache must be one of"),
        (ValueError, {"mean": "none"}, "mean must be one of"),
        (ValueError, {"mean": (0.485, 0.456, 0.406)}, "mean must be .* in gray levels of 0 to 255"),
        (ValueError, {"std": (58, 57, 0)}, "std must be"),
        (ValueError, {"hw_decoder_load": 2}, "hw_decoder_load must be a number from 0 to 1, not 2"),
        (ValueError, {"shuffle": "some"}, "shuffle must be one of"),
        (ValueError, {"views": "five"}, "views must be one of"),
        (ValueError, {"color_jitter": (-1, 0, 0, 0)}, "color_jitter must be four numbers"),
        (ValueError, {"color_jitter": (0.1, 0.1), "views": "center"}, "color_jitter must be four numbers"),
        (ValueError, {"color_jitter": (0.1, 0.1, 0.1, None)}, "color_jitter must be four numbers"),
        (ValueError, {"color_jitter": 0.4}, "color_jitter must be four numbers"),
        (ValueError, {"mean": ("a", "b", "c")}, "mean must be"),
        (ValueError, {"mean": np.full(3, 120.0)}, "mean must be"),
        (ValueError, {"std": (None,) * 3}, "std must be"),
        (ValueError, {"views": np.array(["center", "ten"])}, "views must be one of"),
        (ValueError, {"cache_bytes": True}, "cache_bytes must be"),
        (ValueError, {"dataset": 5}, "dataset must be the folder or URL of a dataset, a Dataset, or several of them, not 5"),
        (ValueError, {"dataset": b"/data"}, "dataset must be the folder or URL of a dataset"),
        (UserError, {"split": ["train"]}, r"no split named \['train'\]; it has train, val"),
        (UserError, {"device": 5}, "device 5: images are decoded on cpu or cuda only"),
        (ValueError, {"rank": 2, "world_size": 2}, "rank must be below world_size 2, not 2"),
        (ValueError, {"seed": 2**64}, "seed must be a whole number of 64 bits"),
        (UserError, {"mean": "image", "random_resized_crop": True}, "the mean image fits images of one size"),
        (UserError, {"mean": "image", "color_jitter": (0.1, 0, 0, 0)}, "the mean image fits images of one size"),
        (UserError, {"cache": "host", "decoder": "dali", "color_jitter": (0.1, 0, 0, 0)}, "DALI makes only plain crops from a"),
        (UserError, {"cache": "device", "color_jitter": (0, 0, 0, 0.1)}, "DALI makes only plain crops from a cache"),
        (UserError, {"crop_size": 300}, "crops of 300 pixels do not fit its images of 256; lower crop_size"),
        (UserError, {"batch_size": 51}, "50 records do not fill one global batch of 51; lower batch_size to 50 or"),
        (UserError, {"cache": "host", "cache_bytes": 1 << 60}, "does not fit in memory; lower cache_bytes"),
    ],
    ids=str,
)
def test_refused(tiny, error, options, message):
    with pytest.raises(error, match=message):
        ImageLoader(**{"dataset": tiny, "split": "train", "batch_size": 4} | options)


@pytest.mark.parametrize(
    ("options", "message"), [({"mean": "image"}, "the mean image fits"), ({"cache": "device"}, "of different sizes")]
)
def test_refused_for_images_of_different_sizes(oblong, options, message):
    with pytest.raises(UserError, match=message):
        ImageLoader(oblong, "train", 4, **options)


def test_the_signature_is_that_of_the_options():
    parameters = dict(inspect.signature(ImageLoader).parameters)
    assert list(parameters)[:2] == ["dataset", "split"] and parameters["batch_size"].kind is not inspect.Parameter.KEYWORD_ONLY
    assert {name: parameter.default for name, parameter in list(parameters.items())[2:]} == {
        name: option.default for name, option in OPTIONS.items()
    }


def test_help_describes_every_argument():
    for name, option in OPTIONS.items():
        assert f"\n    {name}: {option.help[:10]}" in ImageLoader.__doc__
    assert "batch_size: Images in a batch, on each rank (a whole number of at least 1; default 128)." in ImageLoader.__doc__


@pytest.mark.parametrize("epoch", [-1, 1.0, "1", None])
def test_set_epoch_and_batch_at_take_whole_numbers(tiny, epoch):
    loader = ImageLoader(tiny, "train", 4)
    with pytest.raises(ValueError, match="epoch must be a whole number from 0 to"):
        loader.set_epoch(epoch)
    with pytest.raises(ValueError, match="position must be a whole number from 0 to"):
        loader.batch_at(epoch)


@pytest.mark.parametrize("mean", ["imagenet", (110, 100.5, 90)])
@pytest.mark.parametrize("std", ["imagenet", (50, 60.25, 70), "dataset"])
def test_normalization_by_imagenet_or_three_numbers(tiny, device, mean, std):
    batch, drawn = first(tiny, mean=mean, std=std, pca_jitter=0, device=device)
    subtracted = np.array(IMAGENET_MEAN if mean == "imagenet" else mean)
    named = {"imagenet": IMAGENET_STD, "dataset": tiny.load_statistics()["channel_std"]}
    divisor = np.array(named[std] if isinstance(std, str) else std)
    wanted = (plain(batch, drawn) - subtracted[:, None, None]) / divisor[:, None, None]
    assert all(same(image * 50, right * 50) for image, right in zip(batch.images.cpu(), wanted, strict=True))


def test_a_jpegs_size_is_read_from_its_header():
    for shape in ((256, 256), (256, 341), (700, 256)):
        assert jpeg_size(np.frombuffer(jpeg(picture(1, *shape)), np.uint8)) == shape


def test_a_batch_has_the_columns_of_its_records(tiny_copy):
    """Padding and replaced records included; after `.to`, pickling and a walk by pytree, too."""
    manifest = store_columns(tiny_copy)
    train, names = Dataset(manifest, "train"), ("weight", "box", "a.b/c %", "tags")
    weight, box, text, tags = map(train.column, names)
    flip_bit(manifest, "train", 30)
    options = {"crop_size": 64, "columns": names, "rank": 1, "world_size": 3}
    with ImageLoader(manifest, "train", 7, views="center", **options) as loader:
        seen = 0
        for batch in loader:
            for found in (batch, batch.to("cpu"), pickle.loads(pickle.dumps(batch)), tree_map(lambda leaf: leaf, batch)):
                ids = found.ids.tolist()
                assert torch.equal(found.columns["weight"], torch.tensor(weight[ids], dtype=torch.float32))
                assert torch.equal(found.columns["box"], torch.from_numpy(box[ids]))
                assert found.columns["a.b/c %"] == [text[n] for n in ids]
                assert [values.tolist() for values in found.columns["tags"]] == [tags[n].tolist() for n in ids]
            seen += len(ids)
        assert seen == 7 * len(loader)
    with ImageLoader(manifest, "val", 23, views="center", crop_size=64, keys=("image", "y"), columns=["weight"]) as loader:
        assert next(iter(loader)).keys() == {"image", "y", "weight"}
    with ImageLoader(manifest, "val", 23, views="center", crop_size=64) as loader:
        assert next(iter(loader)).columns == {}
    with pytest.raises(ValueError, match="keys and columns both name 'box'; choose another key"):
        ImageLoader(manifest, "val", 8, keys=("image", "box"), columns=["box"])
    with pytest.raises(ValueError, match="columns must be a list of different names of columns"):
        ImageLoader(manifest, "val", columns="box")
