"""Augmentation after the crop: TrivialAugment or RandAugment, random erasing, mixup, cutmix, and a transform of the user's own.

Draws belong to a place in the order of an epoch, so another world size with the same global batch gives the same images. Pairs of
places are mixed with each other: neighbors, or with `repeats` those that many places apart, which hold another record.
"""

import contextlib
import dataclasses
import inspect
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.pipeline import augment_kernels
from imagefeed.pipeline.cache import RGB
from imagefeed.pipeline.crops import GraphBatches, converted, in_threads
from imagefeed.pipeline.graph import GraphOptions
from imagefeed.pipeline.handover import MAX_ARRAYS
from imagefeed.pipeline.operations import BINS, KINDS, SIGNED, apply_operations, make_operations, mix, strengths
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.plan import CROP, PLACE_BITS, Plan, between, draws, offset, uniform
from imagefeed.pipeline.source import BufferPool, Colors, InputBatch, Source

# Streams of draws (plan.py).
OPERATIONS, ERASING, MIXING, TRANSFORM = 16, 17, 18, 19
RAND = (2, 9)  # operations of RandAugment and their strength, as in torchvision
# Of random erasing: area as a fraction of the crop, height over width (torchvision's), and attempts at a box that fits.
AREA, RATIO, ATTEMPTS = (0.02, 0.33), (0.3, 3.3), 10
MIX = np.dtype([("share", "<f4"), ("box", "<i4", (4,))])  # see augment_kernels.mix


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """Options of ImageLoader, and the draws that they need for the batch of a plan at a position, crops of `size`."""

    auto_augment: str = "none"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def used(self) -> bool:
        return self != AugmentOptions()

    @property
    def operates(self) -> bool:
        return self.auto_augment != "none"

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def before(self, options: GraphOptions, colors: Colors) -> tuple[GraphOptions, Colors]:
        """How to crop for them: operations take bytes, and pixels lose their mean afterwards."""
        dtype = "uint8" if self.operates or options.dtype == "uint8" else "float32"
        options = dataclasses.replace(options, dtype=dtype, memory_format="contiguous")
        if not self.operates:
            return options, colors
        no_colors = dataclasses.replace(colors, mean=np.zeros(3), pca_matrix=np.zeros((3, 3)))
        return dataclasses.replace(options, scale=(1.0, 1.0, 1.0)), no_colors

    def operations(self, plan: Plan, position: int, size: int) -> np.ndarray:
        """(N, K) of operations.OPERATION."""
        epoch, places = places_of(plan, position, plan.crops)
        wide = self.auto_augment == "trivial"
        numbers = [int(number) for number in self.auto_augment.split(":")[1:]]
        count, strength = (1, 0) if wide else numbers or RAND
        drawn = draws(plan.seed, epoch, places, np.arange(3 * count), OPERATIONS).reshape(len(places), count, 3)
        kinds = choice(drawn[..., 0], len(KINDS))
        chosen = strengths(wide, size)[kinds, choice(drawn[..., 1], BINS) if wide else strength]
        turned = SIGNED[kinds] & (drawn[..., 2] >> np.uint64(63) > 0)
        return make_operations(kinds, np.where(turned, -chosen, chosen), size)

    def erased(self, plan: Plan, position: int, size: int) -> np.ndarray:
        """(N, 4) int32: top, left, height and width of the box to erase; all 0 if none. As torchvision's RandomErasing."""
        epoch, places = places_of(plan, position, plan.crops)
        drawn = draws(plan.seed, epoch, places, np.arange(3 + 2 * ATTEMPTS), ERASING)
        tried = uniform(drawn[:, 3:])
        area = size * size * between(AREA, tried[:, ::2])
        aspect = np.exp(between([math.log(limit) for limit in RATIO], tried[:, 1::2]))
        sides = np.rint(np.sqrt(np.stack((area * aspect, area / aspect)))).astype(np.int64)  # (2, N, ATTEMPTS)
        fits = (sides < size).all(0)
        first = sides[:, np.arange(len(places)), fits.argmax(1)]
        corners = offset((drawn[:, 1:3].T >> np.uint64(64 - PLACE_BITS)).astype(np.int64), size - first)
        wanted = (uniform(drawn[:, 0]) <= self.random_erasing) & fits.any(1)
        return np.where(wanted, np.concatenate((corners, first)), 0).T.astype(np.int32, order="C")

    def mixed(self, plan: Plan, position: int, size: int) -> np.ndarray:
        """(N / 2,) MIX: `share` is that of each image in the mix of the pair. Mixup: Zhang, Cisse, Dauphin, Lopez-Paz 2018, arXiv
        1710.09412. Cutmix: Yun, Han, Oh, Chun, Choe, Yoo 2019, arXiv 1905.04899; boxes as torchvision's."""
        from scipy.special import betaincinv  # takes 0.1 s to load

        epoch, places = places_of(plan, position)
        drawn = draws(plan.seed, epoch, places[::2], np.arange(4), MIXING)
        cuts = drawn[:, 0] >> np.uint64(63) > 0 if self.mixup and self.cutmix else np.full(len(drawn), self.cutmix > 0)
        alpha = np.where(cuts, self.cutmix, self.mixup)
        share = betaincinv(alpha, alpha, uniform(drawn[:, 1]))
        half = (0.5 * np.sqrt(1 - share) * size).astype(np.int64)[:, None]
        middle = choice(drawn[:, 2:], size)
        begin, end = np.maximum(middle - half, 0), np.minimum(middle + half, size)
        made = np.zeros(len(drawn), MIX)
        made["box"] = np.where(cuts[:, None], np.concatenate((begin, end - begin), 1), 0)
        made["share"] = np.where(cuts, 1 - (end - begin).prod(1) / size**2, share)
        return made


def places_of(plan: Plan, position: int, crops: int = 1) -> tuple[int, np.ndarray]:
    """The epoch, and the places (N,) in its order, of the batch at a position; or numbers (N * crops,) for each crop of it."""
    epoch, step = divmod(position, plan.steps)
    return epoch, (plan.places(step)[:, None] + CROP * np.arange(crops)).ravel()


def choice(drawn: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers below `count`, int64, equally likely, from uint64 draws."""
    return ((drawn >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


class AugmentedBatches:
    """The batches of `inner`, augmented, and as `options` want them; labels become float32 (N, classes) if images are mixed."""

    def __init__(
        self, inner: GraphBatches, source: Source, augment: AugmentOptions, options: GraphOptions, colors: Colors, classes: int
    ):
        self.inner, self.source, self.augment, self.options, self.colors = inner, source, augment, options, colors
        self.classes, self.position = classes, source.position
        self._threads = ThreadPoolExecutor(options.num_threads)
        self._pool = BufferPool(MAX_ARRAYS)

    def close(self) -> None:
        self.inner.close()
        self._threads.shutdown()

    def next(self) -> tuple[torch.Tensor, InputBatch]:
        images, batch = self.inner.next()
        start_s, augment, crops, repeats = time.perf_counter(), self.augment, self.options.crops, self.source.plan.repeats
        if crops > 1:
            images = images.flatten(0, 1)
        at = self.source.plan, self.position, self.options.crop_size
        if augment.operates:
            means = self.colors.means(batch.augmentation).reshape(crops, -1, RGB).swapaxes(0, 1).reshape(-1, RGB)
            images = self._operate(images, augment.operations(*at), means)
        mixes = augment.mixed(*at).repeat(crops) if augment.mixes else np.zeros(0, MIX)
        if augment.random_erasing or augment.mixes:
            erased = augment.erased(*at)
            if images.device.type == "cpu":
                fixed = images.numpy(), self.options.crop_size, images.itemsize, erased, mixes, repeats * crops
                in_threads(self._threads, self.options.num_threads, augment_kernels.mix, fixed, -(-len(images) // 2))
            else:
                images = mix(images, erased, mixes, repeats * crops)
        if augment.mixes:
            labels = soft_labels(batch.labels, mixes["share"][::crops], self.classes, images.device, repeats)
            batch = batch._replace(labels=labels)
        images = converted(images if crops == 1 else images.unflatten(0, (-1, crops)), self.options)
        self.position += 1
        self.source.spans.append(("crop", start_s, time.perf_counter() - start_s))
        return images, batch

    def _operate(self, images: torch.Tensor, operations: np.ndarray, means: np.ndarray) -> torch.Tensor:
        """Bytes to float32 or uint8, without their means."""
        scale, as_bytes = np.array(self.options.scale, np.float32), self.options.dtype == "uint8"
        if images.device.type == "cpu":
            dtype = np.dtype(np.uint8 if as_bytes else np.float32)
            out = self._pool.take(images.numel() * dtype.itemsize).view(dtype).reshape(images.shape)
            fixed = images.numpy(), operations, self.options.crop_size, means, scale, out, as_bytes
            in_threads(self._threads, self.options.num_threads, augment_kernels.augment, fixed, len(images))
            return torch.from_numpy(out)
        means, scale = (torch.from_numpy(values).to(images.device)[..., None, None] for values in (means, scale))
        pixels = apply_operations(images, operations) - means
        return pixels.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8) if as_bytes else pixels.mul_(scale)


def soft_labels(labels: np.ndarray, shares: np.ndarray, classes: int, device: torch.device, apart: int = 1) -> torch.Tensor:
    """(N, classes) float32 of labels (N,), each with its share (N / 2,) in the mix of a pair; the other label has the rest."""
    shares = shares.reshape(-1, 1, apart).repeat(2, 1).ravel()
    own, share = (torch.from_numpy(values).to(device)[:, None] for values in (labels, shares))
    soft = torch.zeros((len(own), classes), device=device).scatter_(1, own, share)
    return soft.scatter_add_(1, own.view(-1, 2, apart).flip(1).view(-1, 1), 1 - share)


def check_augmentation(arguments: dict[str, Any]) -> AugmentOptions:
    """The options among the loader's arguments; raises UserError if others do not go with them."""
    options = AugmentOptions(*(arguments[field.name] for field in dataclasses.fields(AugmentOptions)))
    used = [f"`{name}`" for name in (*vars(options), "transform") if arguments[name] != OPTIONS[name].default]
    names, batch_size, pair = " and ".join(used), arguments["batch_size"], 2 * arguments["repeats"]
    even = "an even `batch_size`" if pair == 2 else f"a `batch_size` that {pair} divides"
    transform = arguments["transform"]
    for wrong, message in (
        (
            transform is not None and not any(takes(transform, count) for count in (1, 2)),
            f"`transform` ({describe(transform)}) takes neither images nor images and labels; give a function of one or two "
            "arguments",
        ),
        (used and arguments["views"] != "random", f"{names}: augmentation is for training; leave it out, or use `views=random`"),
        (options.mixes and batch_size % pair, f"{names}: images are mixed in pairs; use {even}, not {batch_size}"),
        (options.mixup and arguments["dtype"] == "uint8", "`mixup` makes fractions of pixels; use another `dtype` than uint8"),
        (
            options.operates and arguments["mean"] == "image",
            "`auto_augment` moves pixels, but not the mean image; use `mean=channel`",
        ),
    ):
        if wrong:
            raise UserError(message)
    return options


def transformed(
    transform: Callable, images: torch.Tensor, labels: torch.Tensor, plan: Plan, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as `transform` returns them, called with generators that are seeded for the rank's batch at `position`.

    Raises UserError if it returns anything but tensors for the same images.
    """
    number = int(draws(plan.seed, position, np.array([plan.rank]), np.array([0]), TRANSFORM)[0, 0])
    with seeded(number, images.device):
        both = takes_labels(transform)
        result = transform(images, labels) if both else (transform(images), labels)
    if isinstance(result, tuple | list) and len(result) == 2:
        if all(isinstance(values, torch.Tensor) and values.ndim and len(values) == len(labels) for values in result):
            return result[0], result[1]
    what, wanted = ("images and labels", "two tensors") if both else ("images", "a tensor")
    raise UserError(
        f"`transform` ({describe(transform)}) does not return the batch's {what}; return {wanted} of length {len(labels)}"
    )


def takes(transform: Callable, count: int) -> bool:
    """Whether a callable can be called with so many arguments."""
    try:
        inspect.signature(transform).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # some written in C do not say
        pass
    return True


def takes_labels(transform: Callable) -> bool:
    """Whether a callable takes two arguments, or any number, as transforms of torchvision do."""
    try:
        parameters = inspect.signature(getattr(transform, "forward", transform)).parameters.values()
    except ValueError:  # some written in C
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def describe(transform: Callable | None) -> str | None:
    """For a run's identity: its repr, without addresses, which differ each time."""
    return None if transform is None else re.sub(" at 0x[0-9a-f]+", "", repr(transform))


@contextlib.contextmanager
def seeded(number: int, device: torch.device) -> Iterator[None]:
    """Seeds the generators of Python, numpy and torch, and restores them in the end."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        random.seed(number)
        np.random.seed(number >> 32)
        torch.default_generator.manual_seed(number)  # torch.manual_seed takes 100 us to look for devices
        if device.type == "cuda":
            torch.cuda.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
