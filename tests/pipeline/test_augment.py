"""Augmentation: each operation by the C code and by torch, and the loader's batches against both."""

import random

import numpy as np
import pytest
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.pipeline import augment_kernels
from imagefeed.pipeline.augment import AugmentOptions, seeded
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.operations import BINS, KINDS, SIGNED, apply_operations, make_operations, mix, strengths
from imagefeed.pipeline.plan import Plan
from tests.conftest import picture
from tests.pipeline.test_loader import equal, joined

SIZE = 33


def samples(size=SIZE) -> np.ndarray:
    """Pictures, noise, a plain one, and one of two close colors; (6, 3, size, size)."""
    noise = np.random.RandomState(0)
    drawn = [picture(n)[:size, :size].transpose(2, 0, 1) for n in range(3)]
    drawn += [noise.randint(0, 256, (3, size, size)), np.full((3, size, size), 7), noise.randint(100, 102, (3, size, size))]
    return np.stack(drawn).astype(np.uint8)


def by_kernel(images: np.ndarray, operations: np.ndarray) -> np.ndarray:
    count, _, size, _ = images.shape
    out = np.empty_like(images)
    plain = np.zeros((count, 3), np.float32), np.ones(3, np.float32)
    augment_kernels.augment(images, operations, size, *plain, out, True, 0, count)
    return out


@pytest.mark.parametrize("size", [SIZE, 2, 1])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_kernel_and_torch_agree_to_the_bit(kind, size):
    images = samples(size)
    for wide in (False, True):
        for strength in strengths(wide, size)[kind, [0, 1, 9, 16, 20, 30]]:
            for turned in {strength, -strength if SIGNED[kind] else strength}:
                operations = make_operations(np.full((len(images), 1), kind), np.full((len(images), 1), turned), size)
                by_torch = apply_operations(torch.from_numpy(images.copy()), operations).numpy()
                assert (by_kernel(images, operations) == by_torch).all(), turned


def test_operations_do_what_their_names_say():
    image = samples()[:1]

    def after(name: str, strength: float) -> np.ndarray:
        kind = np.full((1, 1), KINDS.index(name))
        return by_kernel(image, make_operations(kind, np.full((1, 1), strength), SIZE))

    shifted = np.zeros_like(image)
    shifted[..., 5:] = image[..., :-5]
    assert (after("translate_x", 5.9) == shifted).all()
    shifted = np.zeros_like(image)
    shifted[..., :-5, :] = image[..., 5:, :]
    assert (after("translate_y", -5.9) == shifted).all()
    assert (after("rotate", 90) == np.rot90(image, axes=(2, 3))).all()  # against the clock
    sheared = after("shear_x", 1.0)  # row y moves left by y + 1/2, rounded up
    assert all((sheared[..., y, : SIZE - y - 1] == image[..., y, y + 1 :]).all() for y in range(SIZE))
    assert (after("shear_y", 1.0) == after("shear_x", 1.0)).mean() < 0.9
    assert (after("brightness", -0.5) == image // 2).all()
    assert (after("posterize", 1) == image // 128 * 128).all()
    assert (after("solarize", 0.5) == np.where(image >= 127.5, 255 - image, image)).all()
    assert (np.ptp(after("color", -1.0), 1) == 0).all()
    assert np.ptp(after("contrast", -1.0)) == 0
    assert after("sharpness", 0.9).std() > image.std() > after("sharpness", -0.9).std()
    stretched = after("autocontrast", 0)
    assert (stretched.min((2, 3)) == 0).all() and (stretched.max((2, 3)) >= 254).all()  # torchvision rounds down
    counts = np.bincount(after("equalize", 0)[0, 0].ravel() // 64, minlength=4)
    assert counts.min() > 0.15 * SIZE * SIZE


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_mixing_agrees_to_the_bit_and_is_that_of_the_papers(dtype):
    images = samples().astype(dtype)
    mixes = AugmentOptions(mixup=0.0 if dtype == np.uint8 else 1.0, cutmix=1.0).mixed(Plan(6, 6), 0, SIZE)
    erased = AugmentOptions(random_erasing=0.7).erased(Plan(6, 6), 0, SIZE)
    mixes["box"][1] = mixes["share"][1] = 0  # only the last two: a box, and another way
    mixes["share"][1] = 0.25 if dtype == np.float32 else 1
    mixes["box"][2] = 3, 4, 20, 11
    wanted = images.copy()
    for image, (top, left, height, width) in zip(wanted, erased, strict=True):
        image[:, top : top + height, left : left + width] = 0
    before = wanted.copy()
    if dtype == np.float32:
        wanted[2], wanted[3] = before[2] * 0.25 + before[3] * 0.75, before[3] * 0.25 + before[2] * 0.75
    wanted[4, :, 3:23, 4:15], wanted[5, :, 3:23, 4:15] = before[5, :, 3:23, 4:15], before[4, :, 3:23, 4:15]
    by_torch = mix(torch.from_numpy(images.copy()), erased, mixes).numpy()
    augment_kernels.mix(images, SIZE, images.itemsize, erased, mixes, 1, 0, 3)
    assert (images == by_torch).all() and (images[2:] == wanted[2:]).all() and (before != samples()).any()


def test_pairs_may_lie_apart():
    images, none = np.random.RandomState(1).rand(12, 3, 8, 8).astype(np.float32), np.zeros((12, 4), np.int32)
    mixes = AugmentOptions(mixup=1.0, cutmix=1.0).mixed(Plan(12, 12), 0, 8)
    by_torch = mix(torch.from_numpy(images.copy()), none, mixes, 3).numpy()
    order = np.array([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])
    neighbors = images[order]
    augment_kernels.mix(neighbors, 8, 4, none, mixes, 1, 0, 6)
    augment_kernels.mix(images, 8, 4, none, mixes, 3, 0, 6)
    assert (images == by_torch).all() and (images[order] == neighbors).all()


def test_kernels_refuse_what_does_not_fit():
    images, none = samples().astype(np.float32), np.zeros((6, 4), np.int32)
    mixes = np.zeros(3, [("share", "<f4"), ("box", "<i4", (4,))])
    outside = none.copy()
    outside[5] = 0, 30, 2, 4
    for erased, pairs in ((outside, mixes), (none[:5], mixes), (none, mixes[:2])):
        with pytest.raises(ValueError, match="do not lie in their images"):
            augment_kernels.mix(images, SIZE, 4, erased, pairs, 1, 0, 3)
    with pytest.raises(ValueError, match="do not fit each other"):
        by_kernel(samples(), make_operations(np.zeros((5, 1), int), np.zeros((5, 1)), SIZE))


def test_draws_are_as_likely_as_they_should_be():
    plan, size = Plan(20_000, 20_000, seed=5), 224
    trivial = AugmentOptions("trivial").operations(plan, 0, size)
    assert trivial.shape == (20_000, 1)
    counts = np.bincount(trivial["kind"][:, 0], minlength=len(KINDS))
    assert abs(counts - 20_000 / len(KINDS)).max() < 5 * (20_000 / len(KINDS)) ** 0.5
    factors = trivial["value"][trivial["kind"] == KINDS.index("brightness")]
    assert len(np.unique(factors)) == 2 * BINS - 1 and abs(factors.mean() - 1) < 0.05
    rand = AugmentOptions("rand:3:30").operations(plan, 0, size)
    assert rand.shape == (20_000, 3) and set(np.unique(rand["value"][rand["kind"] == KINDS.index("posterize")])) == {4}
    assert not (AugmentOptions("rand").operations(plan, 0, size) == AugmentOptions("rand").operations(plan, 1, size)).all()
    boxes = AugmentOptions(random_erasing=0.25).erased(plan, 0, size)
    used = boxes[boxes[:, 2] > 0]
    assert abs(len(used) / 20_000 - 0.25) < 0.02 and abs(used[:, 2:].prod(1).mean() / size**2 - 0.17) < 0.02
    assert not AugmentOptions(random_erasing=0.0).erased(plan, 0, size).any()
    assert AugmentOptions(random_erasing=1.0).erased(plan, 0, size)[:, 2].astype(bool).mean() > 0.99
    for alpha in (0.1, 1.0, 4.0):  # a Beta distribution's variance
        share = AugmentOptions(mixup=alpha).mixed(plan, 0, size)["share"]
        assert abs(share.mean() - 0.5) < 0.02 and abs(share.var() * 4 * (2 * alpha + 1) - 1) < 0.1
    both = AugmentOptions(mixup=0.5, cutmix=1.0).mixed(plan, 0, size)
    assert abs(both["box"].any(1).mean() - 0.5) < 0.03
    cut = both[both["box"].any(1)]
    assert np.allclose(cut["share"], 1 - cut["box"][:, 2:].prod(1) / size**2)


def options(**changes) -> dict:
    return {"batch_size": 8, "crop_size": 48, "pca_jitter": 0.5, "seed": 3, "num_threads": 3} | changes


def second(manifest, **changes):
    """The second batch of a loader, and its plan."""
    with ImageLoader(manifest, "train", position=1, **options(**changes)) as loader:
        return next(iter(loader)), loader


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_augment": "trivial"},
        {"auto_augment": "rand", "cache": "host", "dtype": "uint8", "memory_format": "channels_last"},
        {"auto_augment": "rand:1:20", "cache": "device", "std": "imagenet", "dtype": "float16"},
        {"auto_augment": "trivial", "random_resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.1), "std": "dataset"},
    ],
    ids=str,
)
def test_the_loader_applies_operations_to_the_crop_and_then_subtracts_mean_and_jitter(tiny, device, changes):
    plain = {"auto_augment": "none", "dtype": "uint8", "memory_format": "contiguous", "pca_jitter": 0.0, "std": "none"}
    (crops, _), _ = second(tiny, device=device, **changes | plain)
    batch, loader = second(tiny, device=device, **changes)
    drawn = AugmentOptions(changes["auto_augment"]).operations(loader.plan, 1, 48)
    wanted = apply_operations(crops.cpu().clone(), drawn).float()
    colors = loader.plan.augmentation(1, batch.ids.numpy())
    means = torch.from_numpy(loader._asked[1].means(colors))[..., None, None]
    if changes.get("dtype") == "uint8":
        wanted = (wanted - means + 0.5).floor().clamp(0, 255).to(torch.uint8)
    else:
        wanted = ((wanted - means) * torch.tensor(loader._asked[0].scale)[:, None, None]).to(batch.images.dtype)
    assert torch.equal(batch.images.cpu(), wanted) and not torch.equal(wanted, crops.cpu().to(wanted.dtype))
    channels_last = changes.get("memory_format") == "channels_last"
    assert batch.images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.4, "mean": "image"},
        {"mixup": 1.0, "random_resized_crop": True},
        {"cutmix": 1.0, "dtype": "uint8"},
        {"random_erasing": 0.5, "cutmix": 1, "mixup": 1},
    ],
)
def test_the_loader_mixes_neighbors_and_their_labels(tiny, device, changes):
    plain = {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    (images, labels), _ = second(tiny, device=device, **changes | plain)
    batch, loader = second(tiny, device=device, **changes)
    drawn = AugmentOptions(**{name: float(changes.get(name, 0)) for name in plain})
    erased, mixes = drawn.erased(loader.plan, 1, 48), drawn.mixed(loader.plan, 1, 48)
    assert torch.equal(batch.images.cpu(), mix(images.cpu().clone(), erased, mixes))
    share = torch.from_numpy(mixes["share"].repeat(2))
    one_hot = torch.nn.functional.one_hot(labels.cpu(), 3).float()
    swapped = one_hot.view(4, 2, 3).flip(1).view(8, 3)
    assert torch.allclose(batch.labels.cpu(), share[:, None] * one_hot + (1 - share[:, None]) * swapped)
    assert batch.labels.dtype == torch.float32 and batch.labels.device.type == device


EVERYTHING = {"auto_augment": "rand", "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


def test_augmentation_is_the_same_at_another_world_size_and_after_a_resume(tiny):
    with ImageLoader(tiny, "train", **options(**EVERYTHING)) as loader:
        whole = list(loader)
        state = loader.state_dict() | {"position": 2}
    ranks = []
    for rank in range(2):
        with ImageLoader(tiny, "train", **options(batch_size=4, rank=rank, world_size=2, **EVERYTHING)) as loader:
            loader.load_state_dict(state)
            ranks.append(list(loader))
    assert equal([joined(*parts) for parts in zip(*ranks, strict=True)], whole[2:])


def test_a_record_that_comes_twice_is_mixed_with_another_one(tiny):
    changes = {"repeats": 2, "crops": 3, "seed": 1}
    (images, labels), _ = second(tiny, **changes)
    batch, loader = second(tiny, mixup=1.0, **changes)
    share = AugmentOptions(mixup=1.0).mixed(loader.plan, 1, 48)["share"]
    assert batch.ids.tolist()[::2] == batch.ids.tolist()[1::2]
    for pair, (one, other) in enumerate(((0, 2), (1, 3), (4, 6), (5, 7))):
        for first, rest in ((one, other), (other, one)):
            wanted = images[first] * share[pair] + images[rest] * (1 - share[pair])
            soft = torch.zeros(3).scatter_add_(0, labels[[first, rest]], torch.tensor([share[pair], 1 - share[pair]]))
            assert torch.allclose(batch.images[first], wanted, atol=1e-4) and torch.allclose(batch.labels[first], soft)


@pytest.mark.parametrize("transform", [lambda: None, lambda images, labels, more: images])
def test_a_transform_of_no_or_three_arguments_is_refused(tiny, transform):
    with pytest.raises(UserError, match="takes neither images nor images and labels"):
        ImageLoader(tiny, "train", 10, transform=transform)


def test_several_crops_of_a_record_are_augmented_each_by_draws_of_its_own(tiny):
    options = {"crop_size": 32, "auto_augment": "rand", "random_erasing": 0.5, "mixup": 1.0, "cutmix": 1.0}
    with ImageLoader(tiny, "train", 10, **options) as one, ImageLoader(tiny, "train", 10, crops=3, **options) as three:
        for single, several in zip(one, three, strict=True):
            assert several.images.shape == (10, 3, 3, 32, 32)
            assert torch.equal(several.images[:, 0], single.images) and torch.equal(several.labels, single.labels)
            assert not torch.equal(several.images[:, 1], several.images[:, 2])


def test_options_are_part_of_the_state_and_states_without_them_still_load(tiny):
    with ImageLoader(tiny, "train", **options()) as loader:
        state = loader.state_dict()
    old = state | {"identity": {k: v for k, v in state["identity"].items() if k not in (*EVERYTHING, "transform")}}
    loader.load_state_dict(old)
    for name, value in {**EVERYTHING, "transform": noisy}.items():
        with ImageLoader(tiny, "train", **options(**{name: value})) as other:
            with pytest.raises(
                UserError, match=f"saved state has {name} .*, this run {'<function noisy>' if callable(value) else value}"
            ):
                other.load_state_dict(old)
            other.load_state_dict(other.state_dict())


def noisy(images: torch.Tensor) -> torch.Tensor:
    return images + torch.randn_like(images) + random.random() + np.random.rand()


class Both(torch.nn.Module):
    def forward(self, *inputs):
        images, labels = inputs
        return images.flip(0), torch.nn.functional.one_hot(labels, 3)


def test_a_transform_is_seeded_by_the_plan_and_leaves_the_generators_alone(tiny, device):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with ImageLoader(tiny, "train", **options(transform=noisy, device=device)) as loader:
        batches = list(loader)
        resumed = loader.reopened(position=3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    with resumed:
        assert equal(list(resumed), batches[3:])
    (plain, _), _ = second(tiny, device=device)
    noise = batches[1].images - plain
    assert 0.9 < noise.std() < 1.1 and not torch.equal(noise, batches[2].images - plain)


@pytest.mark.parametrize("transform", [lambda images, labels: (images.flip(0), torch.nn.functional.one_hot(labels, 3)), Both()])
def test_a_transform_of_two_arguments_takes_labels_too(tiny, transform):
    (images, labels), _ = second(tiny)
    (flipped, soft), _ = second(tiny, transform=transform, keys=None)
    assert torch.equal(flipped, images.flip(0)) and torch.equal(soft.argmax(1), labels) and soft.shape == (8, 3)


def test_generators_are_restored_after_an_error():
    state = random.getstate()
    with pytest.raises(KeyError), seeded(2**64 - 1, torch.device("cpu")):
        raise KeyError
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (
            ValueError,
            {"auto_augment": "rand:2"},
            "auto_augment must be none, trivial, rand, or rand:N:M for N operations, 1 to 10",
        ),
        (ValueError, {"auto_augment": "rand:11:9"}, "auto_augment must be"),
        (ValueError, {"auto_augment": "rand:2:31"}, "auto_augment must be"),
        (ValueError, {"auto_augment": None}, "auto_augment must be"),
        (ValueError, {"random_erasing": 1.1}, "random_erasing must be a number from 0 to 1, not 1.1"),
        (ValueError, {"mixup": -1}, "mixup must be a number of at least 0"),
        (ValueError, {"cutmix": True}, "cutmix must be a number of at least 0"),
        (ValueError, {"transform": "flip"}, "transform must be a function of a batch's images"),
        (UserError, {"mixup": 0.2, "batch_size": 5}, "`mixup`: images are mixed in pairs; use an even `batch_size`, not 5"),
        (UserError, {"mixup": 0.2, "repeats": 2, "batch_size": 6}, "use a `batch_size` that 4 divides, not 6"),
        (UserError, {"cutmix": 1, "transform": len, "views": "center"}, "`cutmix` and `transform`: augmentation is for training"),
        (UserError, {"mixup": 0.2, "dtype": "uint8"}, "`mixup` makes fractions of pixels"),
        (UserError, {"auto_augment": "rand", "mean": "image"}, "`auto_augment` moves pixels, but not the mean image"),
    ],
    ids=str,
)
def test_refused(tiny, error, options, message):
    with pytest.raises(error) as raised:
        ImageLoader(tiny, "train", **{"batch_size": 4} | options)
    assert message.replace("`", "") in str(raised.value)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda images: None, "images; return a tensor of length 8"),
        (lambda images: images[:3], "images; return a tensor of length 8"),
        (lambda images, labels: images, "images and labels; return two tensors of length 8"),
    ],
)
def test_what_a_transform_must_return(tiny, transform, message):
    with pytest.raises(UserError, match=f"does not return the batch's {message}"):
        second(tiny, transform=transform)
