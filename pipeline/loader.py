"""Batches for PyTorch, in an exactly known order, from a dataset on disk."""

import logging
import math
import operator
import os
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipeline.dataset import DamagedRecord, ShardedDataset
from pipeline.graph import image_pipeline
from pipeline.plan import Plan
from preprocess.errors import UserError
from preprocess.manifest import Manifest
from preprocess.records import NO_LABEL

STATE_VERSION = 1
# A record that is damaged is replaced by the next one; so many in a row mean that the disk is gone, not a record.
MAX_DAMAGED_IN_A_ROW = 10
log = logging.getLogger("imagefeed")


class Batch(NamedTuple):
    images: torch.Tensor  # float32 (N, 3, size, size), or (N, 10, 3, size, size); on the loader's device
    labels: torch.Tensor  # int64 (N,), on the same device
    ids: torch.Tensor  # int64 (N,), record ids, on the CPU
    valid: torch.Tensor  # bool (N,), on the loader's device; False marks padding


class ImageLoader:
    """Batches of a split; pixels are RGB 0-255 minus the train split's channel mean, as in the paper.

    `views` "random" is for training (random crop, flip and colour; shuffled, the remainder of an epoch dropped),
    "center" and "ten" for evaluation (each record once in stored order, padded and masked). `colour` is the standard
    deviation of the PCA jitter (`jitter_matrix`). `position` counts the steps handed out since the first epoch began;
    iterating goes on from it to the end of its epoch. A batch stays valid as long as the caller holds it.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        batch_size: int,
        *,
        views: str = "random",
        size: int = 224,
        colour: float = 0.1,
        mean: str = "channel",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        num_threads: int | None = None,
        prefetch: int = 2,
        position: int = 0,
    ):
        if mean != "channel":
            raise ValueError(f"mean must be 'channel', not {mean!r}")
        if size < 1:
            raise ValueError(f"size must be 1 pixel or more, not {size}")
        if not (math.isfinite(colour) and colour >= 0):
            raise ValueError(f"colour must be a number of 0 or more, not {colour}")
        if position < 0:
            raise ValueError(f"position must be 0 or more, not {position}")
        if prefetch < 1 or (num_threads is not None and num_threads < 1):
            raise ValueError(f"prefetch {prefetch} and num_threads {num_threads} must be 1 or more")
        if size > manifest.options["size"]:
            raise UserError(
                f"{manifest.root}: crops of {size} pixels do not fit its images of {manifest.options['size']}; "
                "ask for smaller crops (--size), or build a dataset of larger images"
            )
        self.device = choose_device(device)
        self.device_id = self.device.index if self.device.type == "cuda" else None  # as DALI counts
        self.position = position
        self.damaged = 0
        self.size = size
        self.prefetch = prefetch
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self.plan = Plan(manifest.split(split).records, batch_size, views, seed, rank, world_size)
        self.dataset = ShardedDataset(manifest, split)
        unknown = np.count_nonzero(self.dataset.labels == NO_LABEL)
        if views == "random" and unknown:
            raise UserError(
                f"{manifest.root}: {unknown:,} of the {len(self.dataset):,} records of split {split} have no label, so it "
                "cannot be learned from; choose a split with labels, or build a dataset that has one"
            )
        statistics = manifest.load_statistics()
        self._mean = statistics["channel_mean"].astype(np.float64)
        self._jitter = jitter_matrix(statistics, colour)
        # What decides the batches, apart from seed and position; ranks may be cut otherwise.
        self._options = {
            "dataset": manifest.fingerprint,
            "split": split,
            "global batch": self.plan.global_batch,
            "views": views,
            "size": size,
            "colour": colour,
            "mean": mean,
        }
        self._pipeline = self._source = None

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self.plan.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._next()
            self.position += 1
            yield batch
            if self.position % len(self) == 0:
                return

    def state_dict(self) -> dict[str, object]:
        """Plain values that `load_state_dict` takes to go on with the next batch that was not handed out."""
        return {
            "version": STATE_VERSION,
            "seed": self.plan.seed,
            "position": self.position,
            "fingerprint": dict(self._options),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Raises UserError where the state is none, or of other data or options; another number of ranks is fine."""
        mine = {"version": STATE_VERSION, "seed": self.plan.seed, **self._options}
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
        self.close()
        self.position = position

    def close(self) -> None:
        """Frees the pipeline, its threads and buffers, and the maps; iterating again would open them anew."""
        self._pipeline = None
        self._source = None
        self.dataset.close()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _next(self) -> Batch:
        if self._pipeline is None:
            self._source = Source(self.plan, self.dataset, self._mean, self._jitter, self.position)
            views = 10 if self.plan.views == "ten" else 1
            self._pipeline = image_pipeline(
                self._source.batch,
                self.plan.batch_size,
                self.size,
                views,
                self.device_id,
                self.num_threads,
                self.prefetch,
            )
        try:
            # On a GPU the batch is ready in the order of this stream; the host does not wait for it.
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            (images,) = self._pipeline.run(stream)
        except BaseException:
            # DALI's pipeline is dead after an error; the next attempt begins at the same position with a new one.
            self.close()
            raise
        fed = self._source.fed.popleft()
        self.damaged += fed.damaged
        labels, valid = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (fed.labels, fed.valid))
        return Batch(torch.from_dlpack(images.as_tensor()), labels, torch.from_numpy(fed.ids), valid)


class Fed(NamedTuple):
    """What went into the graph for a batch; `inputs` are kept here because DALI does not copy them."""

    ids: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    damaged: int
    inputs: list


class Source:
    """DALI's way to the data: `batch(i)` is the batch at position `start` + i, whatever was asked before."""

    def __init__(self, plan: Plan, dataset: ShardedDataset, mean: np.ndarray, jitter: np.ndarray, start: int):
        self.plan = plan
        self.dataset = dataset
        self.mean = mean
        self.jitter = jitter
        self.start = start
        self.fed: deque[Fed] = deque()

    def batch(self, i: int) -> list:
        """What the graph takes (`image_pipeline`); also appended to `fed`, with what belongs to it."""
        position = self.start + i
        ids, valid = self.plan.ids(position)
        jpegs, whole = self.read(ids)
        replaced = whole != ids
        damaged = int((replaced & valid).sum())
        if self.plan.views != "random":
            # In evaluation what takes the place of a damaged record must not count: it has a place of its own.
            valid = valid & ~replaced
        look = self.plan.look(position, whole)
        inputs = [jpegs, (self.mean - look.colour @ self.jitter.T).astype(np.float32)]
        for places, mirrors in zip(look.places, look.mirrors, strict=True):
            inputs += [places, mirrors]
        labels = self.dataset.labels[whole].astype(np.int64)
        self.fed.append(Fed(whole, labels, valid, damaged, inputs))
        return inputs

    def read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The JPEGs of records `ids`, and the ids of those they are: a damaged one gives way to the next whole one."""
        jpegs, whole = [], ids.copy()
        for n, record_id in enumerate(ids.tolist()):
            for attempt in range(MAX_DAMAGED_IN_A_ROW):
                try:
                    whole[n] = (record_id + attempt) % len(self.dataset)
                    jpegs.append(self.dataset.jpeg(int(whole[n])))
                    break
                except DamagedRecord as error:
                    if attempt == MAX_DAMAGED_IN_A_ROW - 1:
                        raise
                    log.warning("%s; the record after it takes its place", error)
        return jpegs, whole


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
        raise UserError(
            f"device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0; use one of them"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def jitter_matrix(statistics: dict[str, np.ndarray], colour: float) -> np.ndarray:
    """The (3, 3) matrix that turns three standard normal draws into an RGB offset, in grey levels.

    Column i is colour * sqrt(eigenvalue i) * eigenvector i of the RGB covariance of the train split. The paper
    (section 4.1) writes eigenvalues; its code multiplies by standard deviations, and on pixels of 0-255 eigenvalues
    would shift colours by a thousand grey levels.
    """
    return colour * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]
