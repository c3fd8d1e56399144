"""The loader's own decoder against DALI's: the same batches, to the bit."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagefeed.codec.decode import JOB
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.pipeline.loader import Batch, ImageLoader
from tests.codec.test_resize import recolored, resized
from tests.conftest import jpeg, pack, picture
from tests.pipeline.test_loader import equal

IMAGE = 256 * 256 * 3


def both(manifest: Manifest, split: str, batch_size: int, epochs: int = 1, **options) -> tuple[list[Batch], list[Batch]]:
    """The batches of so many epochs by either decoder, of one type and with the same strides."""
    made = []
    for decoder in ("native", "dali"):
        with ImageLoader(manifest, split, batch_size, decoder=decoder, **options) as loader:
            made.append([batch for _ in range(epochs) for batch in loader])
            assert loader.decoder == decoder
    for one, other in zip(*made, strict=True):
        assert (one.images.dtype, one.images.stride()) == (other.images.dtype, other.images.stride())
    return made[0], made[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16", "std": "imagenet"},
        {"dtype": "float16", "memory_format": "channels_last", "std": "dataset", "crop_size": 97},
        {"dtype": "uint8", "pca_jitter": 0.5},
        {"dtype": "uint8", "memory_format": "channels_last", "crop_size": 256, "num_threads": 5, "prefetch": 1},
        {"mean": "image", "std": "dataset", "verify_checksums": False},
        {"auto_augment": "trivial", "random_erasing": 0.5, "cutmix": 1.0, "crop_size": 64},
    ],
    ids=str,
)
def test_training_batches_equal_those_of_dali(tiny, options):
    assert equal(*both(tiny, "train", 16, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_bytes": 9 * IMAGE + 5, "num_threads": 5},
        {"cache_bytes": 50 * IMAGE, "mean": "image"},
        {"cache_bytes": 50 * IMAGE, "weights": "balanced", "dtype": "uint8", "memory_format": "channels_last"},
        {"cache_bytes": 9 * IMAGE, "crops": 2, "repeats": 2, "crop_size": 64},
    ],
    ids=str,
)
def test_cached_epochs_equal_those_of_dali(tiny, options):
    """Records that come twice in a batch, or in two that are on their way, among them."""
    assert equal(*both(tiny, "train", 16, 3, cache="host", **options))


@pytest.mark.parametrize(
    ("views", "options"),
    [
        ("ten", {}),
        ("ten", {"cache": "host", "cache_bytes": 9 * IMAGE, "memory_format": "channels_last"}),
        ("center", {"pad_last": True}),
        ("random", {"crops": 3, "dtype": "bfloat16", "random_erasing": 0.5, "mixup": 0.2}),
    ],
)
def test_views_of_images_of_any_shape_equal_those_of_dali(oblong, views, options):
    split = "train" if views == "random" else "val"
    assert equal(*both(oblong, split, 6, 2, views=views, crop_size=200, **options))


def test_images_that_the_decoder_leaves_to_libjpeg_turbo_equal_those_of_dali(tmp_path):
    """An image with full chroma, a progressive and a gray one, among others."""
    jpegs = [jpeg(picture(n, 64, 64)) for n in range(6)]
    for n, (mode, options) in enumerate((("RGB", {"subsampling": "4:4:4"}), ("RGB", {"progressive": True}), ("L", {}))):
        buffer = io.BytesIO()
        Image.fromarray(picture(n, 64, 64)).convert(mode).save(buffer, "JPEG", **options)
        jpegs[2 * n] = buffer.getvalue()
    manifest = pack(tmp_path / "data", {"train": jpegs}, size=64)
    assert equal(*both(manifest, "train", 3, crop_size=48))


@pytest.mark.parametrize("views", [1, 2])
def test_boxes_and_color_maps_are_those_of_the_plan(oblong, views):
    """Decoded for each crop or once, from a cache that has room for all images, some or none."""
    options = {"random_resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.1), "crops": views, "repeats": 2, "crop_size": 64}
    with ImageLoader(oblong, "train", 5, dtype="uint8", pca_jitter=0, **options) as loader:
        batches, plan, dataset = list(loader), loader.plan, loader.dataset
    for position, batch in enumerate(batches):
        pixels = [np.asarray(dataset[record_id][0]) for record_id in batch.ids.tolist()]
        sizes = np.array([image.shape[:2] for image in pixels]).T
        for view, keys in enumerate(plan.keys(position, batch.ids.numpy())):
            jobs = np.zeros(len(keys), JOB)
            jobs["top"], jobs["left"], jobs["height"], jobs["width"] = plan.boxes(position, keys, *sizes).T
            jobs["mirror"], jobs["size"] = plan.augmentation(position, keys).mirrors[0], 64
            maps = plan.jitter(position, keys, options["color_jitter"])
            for image, job, colors, found in zip(pixels, jobs, maps, batch.images.view(5, views, 3, 64, 64)[:, view].numpy()):
                wanted = recolored(resized(image, job), colors)
                assert np.abs(found - wanted.transpose(2, 0, 1)).max() < 0.501
    for changes in ({"cache": "host", "cache_bytes": 5 * IMAGE}, {"cache": "host", "num_threads": 3}, {"prefetch": 1}):
        with ImageLoader(oblong, "train", 5, dtype="uint8", pca_jitter=0, **options | changes) as loader:
            assert equal(list(loader), batches)
            list(loader)  # the cache holds what it can
            loader.load_state_dict(loader.state_dict() | {"position": 0})
            assert equal(list(loader), batches)


def test_a_cpu_needs_no_dali(tiny):
    code = (
        "import sys\n"
        "sys.modules['nvidia'] = sys.modules['nvidia.dali'] = None  # importing either is an error\n"
        "import imagefeed\n"
        "everything = dict(random_resized_crop=True, color_jitter=(0.4, 0.4, 0.4, 0.1), auto_augment='trivial', mixup=0.2)\n"
        "for options in ({'cache': 'host'}, {'views': 'ten'}, everything):\n"
        "    with imagefeed.ImageLoader(sys.argv[1], 'train', 8, **options) as loader:\n"
        "        assert sum(len(batch.ids) for batch in loader) >= 48\n"
        "try:\n"
        "    list(imagefeed.ImageLoader(sys.argv[1], 'train', 8, decoder='dali'))\n"
        "except imagefeed.UserError as error:\n"
        "    assert 'DALI decodes the images, but cannot be imported' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code, tiny.root], check=True)


def test_what_is_held_by_the_cache_is_whole_after_a_stop(tiny):
    """Whatever was on its way when the loader was put elsewhere."""
    options = {"cache": "host", "cache_bytes": 50 * IMAGE, "crop_size": 64}
    with ImageLoader(tiny, "train", 5, **options, num_threads=3) as loader, ImageLoader(tiny, "train", 5, crop_size=64) as plain:
        for position in (0, 7, 2, 9, 4):
            loader.batch_at(position)
        wanted = list(plain)
        assert equal([loader.batch_at(position) for position in range(10)], wanted)
        assert equal([loader.batch_at(position) for position in range(10)], wanted)
        assert loader.cache.used_bytes == 50 * IMAGE


def test_dali_makes_what_the_decoder_does_not(tiny):
    with ImageLoader(tiny, "train", 8, cache="device") as loader:
        assert loader.decoder == "dali"
    with pytest.raises(UserError, match="decoder=native: DALI fills the cache on the device; use decoder=auto or another cache"):
        ImageLoader(tiny, "train", 8, decoder="native", cache="device")


@pytest.mark.parametrize(
    ("height", "options", "reason"),
    [(200, {}, "its side of 200 pixels is too small"), (300, {"mean": "image"}, "its size is not that of the mean image")],
)
def test_a_record_of_another_size_than_its_dataset_says_is_one_sentence(tmp_path, height, options, reason):
    jpegs = [jpeg(picture(n)) for n in range(4)]
    manifest = pack(tmp_path / "data", {"train": [*jpegs, jpeg(picture(4, height, 256))]})
    with ImageLoader(manifest, "train", 5, **options) as loader:
        with pytest.raises(UserError, match=rf"record 4 of split train cannot be decoded \({reason}"):
            next(iter(loader))
