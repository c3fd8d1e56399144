"""Batches for PyTorch, in an exactly known order, from a dataset on disk."""

import functools
import math
import operator
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.dataset.records import NO_LABEL
from imagefeed.pipeline.cache import DeviceCache, HostCache, available_bytes
from imagefeed.pipeline.crops import DeviceCropper, HostCropper
from imagefeed.pipeline.graph import DTYPES, HW_DECODER_LOAD, PREFETCH, GraphOptions, decode_pipeline, image_pipeline
from imagefeed.pipeline.plan import Plan, check_jitter
from imagefeed.pipeline.source import Fed, Source

STATE_VERSION = 2
MEMORY_FORMATS = ("contiguous", "channels_last")
MEANS = ("channel", "image")
CACHES = ("none", "host", "device")
MAX_CORRUPT = 100
READ_AHEAD = 8  # steps


class Batch(NamedTuple):
    images: torch.Tensor  # (N, 3, crop_size, crop_size), or (N, 10, 3, crop_size, crop_size); on the loader's device
    labels: torch.Tensor  # int64 (N,), on the same device
    ids: torch.Tensor  # int64 (N,), record ids, on the CPU
    valid: torch.Tensor  # bool (N,), on the loader's device; False marks padding


class ImageLoader:
    """Batches of a split; pixels are RGB 0-255 minus the train split's mean, as in the paper.

    What an epoch is:
      `views` "random" is for training (random crop, flip and color; shuffled, the remainder of an epoch dropped), "center" and
      "ten" for evaluation (each record once in stored order, padded and masked). `shuffle` is "global", "blocks" or "none"
      (docs/shuffle.md). `position` counts the steps handed out since the first epoch began; iterating goes on from it to the
      end of its epoch.
    What is done to an image:
      `pca_jitter` is the standard deviation of the PCA jitter (`jitter_matrix`), 0 none. `mean` "channel" or "image" (the paper's)
      is subtracted; with `deviation` the result is divided by the channels' deviation. `random_resized_crop` takes a random part of
      an image, rescaled (torchvision's RandomResizedCrop); `color_jitter` are the strengths of brightness, contrast,
      saturation and hue (its ColorJitter; `Plan.jitter`).
    What is handed out:
      `dtype` "float32", "float16", "bfloat16" or "uint8": the last is 0-255, no mean subtracted. `memory_format` "channels_last" is the same
      shape in PyTorch's channels-last strides. A batch stays valid as long as the caller holds it.
    What it costs:
      `verify_checksums` compares each record's checksum when it is read; corrupt ones are replaced by the next, and more than
      `max_corrupt` end the run. `read_ahead` is how many steps ahead the system is asked for their bytes. `cache` "host" or
      "device" keeps decoded images, up to `cache_bytes` (pipeline/cache.py).
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        batch_size: int,
        *,
        views: str = "random",
        shuffle: str = "global",
        crop_size: int = 224,
        pca_jitter: float = 0.1,
        mean: str = "channel",
        std: str = "none",
        random_resized_crop: bool = False,
        color_jitter: tuple[float, float, float, float] = (0, 0, 0, 0),
        dtype: str = "float32",
        memory_format: str = "contiguous",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        num_threads: int | None = None,
        prefetch: int = PREFETCH,
        hw_decoder_load: float = HW_DECODER_LOAD,
        verify_checksums: bool = True,
        max_corrupt: int = MAX_CORRUPT,
        read_ahead: int = READ_AHEAD,
        cache: str = "none",
        cache_bytes: int | None = None,
        position: int = 0,
    ):
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        for name, value, choices in (
            ("mean", mean, MEANS),
            ("dtype", dtype, (*DTYPES, "bfloat16")),
            ("memory_format", memory_format, MEMORY_FORMATS),
            ("cache", cache, CACHES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if crop_size < 1:
            raise ValueError(f"crop_size must be 1 pixel or more, not {crop_size}")
        if not (math.isfinite(pca_jitter) and pca_jitter >= 0):
            raise ValueError(f"pca_jitter must be a number of 0 or more, not {pca_jitter}")
        if position < 0 or max_corrupt < 0 or read_ahead < 0 or (cache_bytes or 0) < 0:
            raise ValueError("position, max_corrupt, read_ahead and cache_bytes must be 0 or more")
        if prefetch < 1 or (num_threads is not None and num_threads < 1):
            raise ValueError(f"prefetch {prefetch} and num_threads {num_threads} must be 1 or more")
        check_jitter(color_jitter)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load must be 0 to 1, not {hw_decoder_load}")
        training = views == "random"
        jitter = training and any(color_jitter)
        random_resized_crop = training and random_resized_crop
        if cache != "none" and (jitter or random_resized_crop):
            raise UserError(
                "cached images are cropped, mirrored and jittered by PCA only; use --cache none with --random-resized-crop or "
                "--color-jitter"
            )
        if mean == "image" and (manifest.options["fit"] != "crop" or random_resized_crop or jitter):
            raise UserError(
                f"{manifest.root}: the mean image fits whole images of one size and their own colors; use --mean channel with "
                "--random-resized-crop, --color-jitter or a dataset built with --fit short"
            )
        if crop_size > manifest.options["size"]:
            raise UserError(
                f"{manifest.root}: crops of {crop_size} pixels do not fit its images of {manifest.options['size']}; "
                "ask for smaller crops (--crop-size), or build a dataset of larger images"
            )
        self.manifest = manifest
        self._root = manifest.root
        self.device = choose_device(device)
        self.position = position
        self._corrupt: set[int] = set()
        self.max_corrupt = max_corrupt
        self.read_ahead = read_ahead
        self.dtype, self.memory_format = dtype, memory_format
        self.plan = Plan(manifest.split(split).records, batch_size, views, seed, rank, world_size, shuffle)
        self.dataset = RecordReader(manifest, split, verify_checksums)
        unknown = np.count_nonzero(self.dataset.labels == NO_LABEL)
        if training and unknown:
            raise UserError(
                f"{manifest.root}: {unknown:,} of the {len(self.dataset):,} records of split {split} have no label, so it "
                "cannot be learned from; choose a split with labels, or build a dataset that has one"
            )
        statistics = manifest.load_statistics()
        self._jitter = jitter_matrix(statistics, pca_jitter)
        self._color_jitter = tuple(color_jitter) if jitter else None
        # uint8 are the pixels themselves; else the mean goes, of the image where that is asked for, and the deviation.
        self._mean = np.zeros(3) if dtype == "uint8" or mean == "image" else statistics["channel_mean"].astype(np.float64)
        scale = 1 / statistics["channel_std"] if std == "dataset" and dtype != "uint8" else np.ones(3)
        self.options = GraphOptions(
            crop_size=crop_size,
            views=10 if views == "ten" else 1,
            dtype="float32" if dtype == "bfloat16" else dtype,
            memory_format=memory_format,
            scale=tuple(scale.tolist()),
            mean_image=statistics["mean_image"] if mean == "image" and dtype != "uint8" else None,
            boxes=random_resized_crop,
            jitter=jitter,
            device_id=self.device.index if self.device.type == "cuda" else None,  # as DALI counts
            num_threads=num_threads or len(os.sched_getaffinity(0)),
            prefetch=prefetch,
            hw_decoder_load=hw_decoder_load,
        )
        # What decides the batches, apart from seed and position; ranks may be cut otherwise.
        self._identity = {
            "dataset": manifest.fingerprint,
            "split": split,
            "pixels": "0-255" if dtype == "uint8" else "less their mean",
            "device cache": cache == "device",  # whose chroma is coarser
            "global batch": self.plan.global_batch,
            "views": views,
            "shuffle": shuffle,
            "crop_size": crop_size,
            "pca_jitter": pca_jitter,
            "mean": mean,
            "std": std,
            "random_resized_crop": random_resized_crop,
            "color_jitter": list(color_jitter) if jitter else None,
        }
        self._open_cache = functools.partial(open_cache, cache, cache_bytes, manifest, self.plan, self.device)
        self.cache = self._open_cache()
        # On a CPU the graph only decodes: kernels.c crops in a quarter of crop_mirror_normalize's time, and in uint8 in a
        # tenth, the same numbers (docs/log.md).
        by_kernel = self.device.type == "cpu" and not random_resized_crop and not jitter
        self._decode_only = self.cache is not None or by_kernel
        self._pipeline = self._source = self._cropper = None
        self._decoded: deque = deque()  # with a cache: what the graph gave for batches that are not yet handed out

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self.plan.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._next()
            self.position += 1
            last = self.position % len(self) == 0
            yield batch
            if last:
                return

    @property
    def corrupt(self) -> int:
        """How many records were found corrupt, and replaced each time."""
        return len(self._corrupt)

    def state_dict(self) -> dict[str, object]:
        """Plain values that `load_state_dict` takes to go on with the next batch that was not handed out."""
        return {"version": STATE_VERSION, "seed": self.plan.seed, "position": self.position, "fingerprint": dict(self._identity)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Raises UserError where the state is none, or of other data or options; another number of ranks is fine.

        Called inside a loop over the loader, it takes effect with that loop's next batch; with its last, in the next loop.
        """
        mine = {"version": STATE_VERSION, "seed": self.plan.seed, **self._identity}
        try:
            theirs = {"version": state["version"], "seed": state["seed"], **state["fingerprint"]}
            position = operator.index(state["position"])
        except (KeyError, TypeError) as error:
            raise UserError(f"the loader's saved state is not whole ({error!r}); start a new run") from None
        if position < 0:
            raise UserError(f"the loader's saved state has position {position}, below 0; start a new run")
        for name, value in mine.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"the loader's saved state has {name} {theirs.get(name)}, this run {value}; "
                    "use the same dataset and options as before, or start a new run"
                )
        self._stop()
        self.position = position

    def close(self) -> None:
        """Frees the pipeline, its threads and buffers, the maps and the cache; iterating again would open them anew."""
        self._stop()
        self.cache = None
        self.dataset.close()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def reopened(self, **changes) -> "ImageLoader":
        """Another loader of the same arguments but for `changes`, at this one's position unless they say otherwise."""
        return ImageLoader(**(self.arguments | {"position": self.position} | changes))

    @property
    def spans(self) -> tuple[tuple[str, float, float], ...]:
        """What the calling thread did for the last batch: ("read" | "decode" | "crop", start, seconds) by time.perf_counter.

        "decode" is the time for which it waited for the decoder, which works beside it; crops that the graph makes are in it.
        """
        return () if self._source is None else tuple(self._source.spans)

    def open_source(self) -> Source:
        """What is fed to the graph, from `position` on."""
        return Source(
            self.plan,
            self.dataset,
            self._mean,
            self._jitter,
            self._color_jitter,
            self.options.boxes,
            self.cache,
            self.position,
            self.read_ahead,
            self._decode_only,
        )

    def _stop(self) -> None:
        self._pipeline = None
        self._decoded.clear()
        if self._source is not None:
            self._source.close()
        self._source = None
        if self._cropper is not None:
            self._cropper.close()
        self._cropper = None

    def _next(self) -> Batch:
        try:
            if self._source is None:
                self.cache = self._open_cache() if self.cache is None else self.cache  # after a close
                self._source = self.open_source()
            self._source.spans.clear()
            images, fed = self._decoded_batch() if self._decode_only else self._graph_batch()
        except BaseException:
            # DALI's pipeline is dead after an error; the next attempt begins at the same position with a new one.
            self._stop()
            raise
        self._source.recycle(fed, used(self.device))
        self._corrupt.update(fed.corrupt.tolist())
        if self.corrupt > self.max_corrupt:
            self._stop()
            raise UserError(
                f"{self._root}: {self.corrupt:,} records are corrupt, more than the {self.max_corrupt:,} that "
                "--max-corrupt allows; run python -m preprocess verify on it"
            )
        labels, valid = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (fed.labels, fed.valid))
        return Batch(images, labels, torch.from_numpy(fed.ids), valid)

    def _run(self):
        # On a GPU the batch is ready in the order of this stream; the host does not wait for it.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        spans, start_s = self._source.spans, time.perf_counter()
        before = len(spans)
        try:
            (out,) = self._pipeline.run(stream)
        except RuntimeError as error:
            if "encountered:" not in str(error):  # not DALI's word of an operator
                raise
            what = str(error).rpartition("encountered:")[2].partition("Current pipeline")[0]
            raise UserError(
                f"{self._root}: a batch after step {self.position:,} of split {self.dataset.split} cannot be decoded (DALI: "
                f"{' '.join(what.split())[:200]}); run python -m preprocess verify --deep on it"
            ) from error
        # DALI first asks for the bytes of a later batch, in this thread, and then waits for the one whose turn it is.
        for _, read_s, seconds in spans[before:]:
            start_s = read_s + seconds
        spans.append(("decode", start_s, time.perf_counter() - start_s))
        return out

    def _graph_batch(self) -> tuple[torch.Tensor, Fed]:
        if self._pipeline is None:
            self._pipeline = image_pipeline(self._source.batch, self.plan.batch_size, self.options)
        images = torch.from_dlpack(self._run().as_tensor())
        if self.memory_format == "channels_last":
            images = images.movedim(-1, -3)  # the shape of NCHW; the strides are PyTorch's channels_last
        if self.dtype == "bfloat16":
            images = images.to(torch.bfloat16)
        return images, self._source.fed.popleft()

    def _decoded_batch(self) -> tuple[torch.Tensor, Fed]:
        """Images that a cache holds from there, the others decoded, all cropped in one go."""
        source = self._source
        while not source.fed:
            if self._pipeline is None and (self.cache is None or len(source.next().missing)):
                source.restart(self.position)
                self._pipeline = decode_pipeline(source.batch, self.plan.batch_size, self.options)
            if not source.fed:
                self._decode()
        fed = source.fed[0]
        if len(fed.missing) and not self._decoded:
            self._decode()
        decoded = self._decoded.popleft() if len(fed.missing) else None
        if self._cropper is None:
            kind = DeviceCropper if isinstance(self.cache, DeviceCache) else HostCropper
            self._cropper = kind(self.options, self.dtype == "uint8", self.cache)
        start_s = time.perf_counter()
        images = self._cropper(fed, decoded).to(self.device, non_blocking=True)
        source.fed.popleft()
        if self.options.views > 1:
            images = images.unflatten(0, (-1, self.options.views))
        if self.dtype != "float32" and images.dtype == torch.float32:
            images = images.to(getattr(torch, self.dtype))
        if self.memory_format == "channels_last":
            images = images.movedim(-3, -1).contiguous().movedim(-1, -3)
        source.spans.append(("crop", start_s, time.perf_counter() - start_s))
        return images, fed

    def _decode(self) -> None:
        try:
            self._decoded.append(self._run())
        except StopIteration:  # nothing to decode for a long while, and all that was has been handed out
            self._pipeline = None


def open_cache(
    kind: str, capacity_bytes: int | None, manifest: Manifest, plan: Plan, device: torch.device
) -> HostCache | DeviceCache | None:
    """An empty cache of a loader; raises UserError where there can be none."""
    if kind == "none":
        return None
    side = manifest.options["size"]
    device = device if kind == "device" else torch.device("cpu")
    if capacity_bytes is None:
        capacity_bytes = available_bytes(device)
        if manifest.options["fit"] == "crop":
            capacity_bytes = min(capacity_bytes, plan.records * side * side * 3)
    if kind == "host":
        return HostCache(plan.records, capacity_bytes)
    if manifest.options["fit"] != "crop":
        raise UserError(
            f"{manifest.root}: its images are of different sizes (--fit short); the cache on the device holds images of "
            "one size, so use --cache host or none"
        )
    return DeviceCache(plan.records, side, side, capacity_bytes, plan.batch_size, device)


def choose_device(name: torch.device | str) -> torch.device:
    """The device of that name; "auto" is CUDA where PyTorch can use it, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # a name that PyTorch does not know; its sentence lists all that it was ever built for
        raise UserError(f"device {name}: there is no such device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name}: images are decoded on cpu or cuda only; use one of them")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no usable GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0; use one of them")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def used(device: torch.device) -> torch.cuda.Event | None:
    """On a GPU: when all is done that its stream has to do by now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def jitter_matrix(statistics: dict[str, np.ndarray], pca_jitter: float) -> np.ndarray:
    """The (3, 3) matrix that turns three standard normal draws into an RGB offset, in gray levels.

    Column i is pca_jitter * sqrt(eigenvalue i) * eigenvector i of the RGB covariance of the train split. The paper
    (section 4.1) writes eigenvalues; its code multiplies by standard deviations, and on pixels of 0-255 eigenvalues
    would shift colors by a thousand gray levels.
    """
    return pca_jitter * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]
