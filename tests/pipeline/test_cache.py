"""Cached epochs against decoded ones: the same batches in the same order, whatever fits."""

import numpy as np
import pytest
import torch

import imagefeed.pipeline.cache
import imagefeed.pipeline.crops
from imagefeed.codec.decode import JOB
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.cache import DeviceCache
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.pixels import to_planes
from imagefeed.pipeline.source import AHEAD
from tests.conftest import same
from tests.dataset.test_reader import flip_bit
from tests.pipeline.test_loader import equal

IMAGE = 256 * 256 * 3
EVERYTHING = 50 * IMAGE


def epochs(manifest, count, split="train", batch_size=8, **options):
    """All batches of so many epochs; without a cache all of it by the graph, which on a CPU would not be used otherwise."""
    options = {"decoder": "auto" if "cache" in options else "dali"} | options
    with ImageLoader(manifest, split, batch_size, **options) as loader:
        loader._decode_only = loader.cache is not None
        return [batch for _ in range(count) for batch in loader], loader


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "uint8"},
        {"dtype": "float16", "memory_format": "channels_last"},
        {"mean": "image", "std": "dataset"},
        {"crop_size": 97},
        {"num_threads": 1, "prefetch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("capacity", [0, 7 * IMAGE + 5, EVERYTHING], ids=["nothing", "some", "all"])
def test_the_host_cache_gives_what_the_graph_gives(tiny, options, capacity):
    """Over three epochs, with a last batch that leaves two records out of each."""
    decoded, _ = epochs(tiny, 3, **options)
    cached, _ = epochs(tiny, 3, cache="host", cache_bytes=capacity, **options)
    for one, other in zip(decoded, cached, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert one.images.dtype == other.images.dtype and one.images.stride() == other.images.stride()
        # One step of rounding: halves of uint8, float16's at 128, and the order of mean and deviation.
        difference = (one.images.float() - other.images.float()).abs().max()
        assert difference <= {"uint8": 1, "float16": 0.125, None: 2e-5}[options.get("dtype")]


@pytest.mark.parametrize("capacity", [7 * IMAGE, EVERYTHING], ids=["some", "all"])
@pytest.mark.parametrize("views", ["center", "ten"])
def test_evaluation_by_the_host_cache(tiny, views, capacity):
    decoded, _ = epochs(tiny, 2, "val", views=views)
    cached, _ = epochs(tiny, 2, "val", views=views, cache="host", cache_bytes=capacity)
    assert equal(decoded, cached)


def test_images_of_any_shape_are_kept(oblong):
    decoded, _ = epochs(oblong, 3)
    cached, _ = epochs(oblong, 3, cache="host", cache_bytes=8 * IMAGE)
    assert equal(decoded, cached)


def test_what_fits_is_decoded_once(tiny, monkeypatch):
    read = []
    cached = ImageLoader(tiny, "train", 5, cache="host", cache_bytes=EVERYTHING, crop_size=32)
    gather = cached.reader.gather
    monkeypatch.setattr(cached.reader, "gather", lambda ids, *args: read.extend(ids.tolist()) or gather(ids, *args))
    with cached:
        for _ in range(4):
            list(cached)
        assert cached.cache.used_bytes == EVERYTHING
    # Batches that are read or decoded ahead of the end of the first epoch cannot yet know what it left in the cache.
    ahead = AHEAD + 1 + cached.options.prefetch
    assert len(read) <= 50 + ahead * 5 and sorted(set(read)) == list(range(50))


@pytest.mark.parametrize("cache", ["host", "device"])
@pytest.mark.parametrize("position", [3, 6, 13])
def test_resuming_with_a_cache_is_exact(tiny, cache, position):
    whole, _ = epochs(tiny, 3, cache=cache, cache_bytes=20 * IMAGE)
    with ImageLoader(tiny, "train", 8, cache=cache, cache_bytes=9 * IMAGE) as loader:
        list(loader)
        loader.load_state_dict(loader.state_dict() | {"position": position})
        rest = [batch for _ in range(3 - position // 6) for batch in loader]
    assert [batch.ids.tolist() for batch in whole[position:]] == [batch.ids.tolist() for batch in rest]
    if cache == "host":
        assert equal(whole[position:], rest)


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("cache", ["host", "device"])
def test_the_decoder_rests_and_comes_back(tiny, cache, left_out, prefetch, monkeypatch):
    """All records but one, or all, are held: epochs go by without anything to decode."""
    monkeypatch.setattr(imagefeed.pipeline.crops, "MAX_IDLE_STEPS", 3)
    with ImageLoader(tiny, "train", 5, crop_size=32, prefetch=prefetch) as loader:
        wanted = [batch for _ in range(6) for batch in loader]
    capacity = (50 - left_out) * (IMAGE if cache == "host" else IMAGE // 2)
    found, _ = epochs(tiny, 6, batch_size=5, crop_size=32, cache=cache, cache_bytes=capacity, prefetch=prefetch, decoder="dali")
    assert [batch.ids.tolist() for batch in found] == [batch.ids.tolist() for batch in wanted]
    if cache == "host":
        assert equal(found, wanted)


def test_closing_empties_the_cache_and_going_on_fills_it_again(tiny):
    with ImageLoader(tiny, "train", 5, crop_size=32, cache="device") as loader:
        first = next(iter(loader))
        loader.close()
        assert loader.cache is None
        loader.load_state_dict(loader.state_dict() | {"position": 0})
        assert equal([first], [next(iter(loader))]) and loader.cache.used_bytes


def test_a_state_of_other_pixels_is_refused(tiny):
    with ImageLoader(tiny, "train", 5, crop_size=32) as loader:
        for options in ({"cache": "device"}, {"dtype": "uint8"}):
            with ImageLoader(tiny, "train", 5, crop_size=32, **options) as other, pytest.raises(UserError, match="this run"):
                other.load_state_dict(loader.state_dict())


def test_a_damaged_record_costs_one_image_with_a_cache_too(tiny_copy):
    flip_bit(tiny_copy, "train", 20)
    decoded, one = epochs(tiny_copy, 4)
    cached, other = epochs(tiny_copy, 4, cache="host", cache_bytes=EVERYTHING)
    assert equal(decoded, cached)
    assert one.corrupt == other.corrupt > 0


@pytest.mark.parametrize("capacity", [0, 9 * IMAGE // 2, EVERYTHING], ids=["nothing", "some", "all"])
@pytest.mark.parametrize("options", [{}, {"dtype": "uint8", "memory_format": "channels_last"}, {"mean": "image"}], ids=str)
def test_the_device_cache_shows_the_same_pictures(tiny, device, options, capacity):
    decoded, _ = epochs(tiny, 2, device=device, **options)
    cached, _ = epochs(tiny, 2, device=device, cache="device", cache_bytes=capacity, **options)
    for one, other in zip(decoded, cached, strict=True):
        assert torch.equal(one.ids, other.ids) and one.images.dtype == other.images.dtype
        # Chroma is that of 2x2 pixels: what the decoder smoothed is not smooth again. Luma tells pictures apart.
        for a, b in zip(one.images.float().cpu(), other.images.float().cpu(), strict=True):
            assert same(luma(a), luma(b)) and (a - b).abs().mean() < 3


def luma(image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("c,cyx->yx", torch.tensor([0.299, 0.587, 0.114]), image)


def test_planes_of_images_without_fine_colors_lose_nothing(device):
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)).to(device)
    images = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    cache = DeviceCache(3, 16, 16, 3 * 384, 0, torch.device(device))
    assert to_planes(images).shape == (3, 384)
    slots = cache.put(np.arange(3), images)
    jobs, ones = np.zeros(3, JOB), torch.ones(3, device=device)
    jobs["data"] = slots
    crops = cache.crops(jobs, 16, ones)
    assert (crops.permute(0, 2, 3, 1) - images).abs().max() <= 1.5
    jobs["top"], jobs["left"], jobs["mirror"] = 4, 2, 1
    turned = cache.crops(jobs, 8, ones)
    assert torch.equal(turned, crops[:, :, 4:12, 2:10].flip(3))


def test_what_could_not_be_stored_is_not_held(monkeypatch):
    """Memory may run out on a GPU while a batch is taken in; whoever catches that goes on with what is whole."""
    cache = DeviceCache(3, 16, 16, 3 * 384, 3, torch.device("cpu"))
    images = torch.arange(2 * 16 * 16 * 3, dtype=torch.float32).reshape(2, 16, 16, 3).to(torch.uint8)
    with monkeypatch.context() as patched:
        patched.setattr(imagefeed.pipeline.cache, "store_planes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.put(np.array([0, 2]), images)
    assert not cache.holds(np.arange(3)).any() and cache.used_bytes == 0
    assert cache.put(np.array([2, 2]), images[:1].repeat(2, 1, 1, 1)).tolist() == [0, 0]
    assert cache.holds(np.arange(3)).tolist() == [False, False, True]
