"""What other programs ask a loader for: its dataset, its sampler and its batch sampler.

Some of them make a new `DataLoader` of these three, for instance to skip the batches before a checkpoint. It yields the loader's
own batches: the lists of record ids know their position, and the dataset returns the loader's batch for it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch.utils.data
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import Dataset
from imagefeed.pipeline.plan import Plan

if TYPE_CHECKING:
    from imagefeed.pipeline.loader import ImageLoader


class PlannedIds(list):
    """The record ids of the batch at `position`."""

    position: int


class PlanSampler(DistributedSampler):
    """The record ids of this rank's part of the current epoch, in order.

    A DistributedSampler, so that Lightning and Ray know that the loader is sharded already.
    """

    def __init__(self, loader: "ImageLoader"):
        self.loader = loader
        self.num_replicas, self.rank = loader.plan.world_size, loader.plan.rank
        self.shuffle, self.seed, self.drop_last = loader.plan.views == "random", loader.plan.seed, loader.drop_last

    @property
    def epoch(self) -> int:
        return self.loader.epoch

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(map(len, PlanBatchSampler(self.loader)))

    def __iter__(self) -> Iterator[int]:
        for ids in PlanBatchSampler(self.loader):
            yield from ids


class PlanBatchSampler(BatchSampler):
    """The record ids of each batch of the current epoch."""

    def __init__(self, loader: "ImageLoader", *arguments: object, **more: object):
        if arguments or more:  # a BatchSampler's: Lightning makes another one of this kind
            raise TypeError(
                "another program makes a DataLoader of its own from an ImageLoader; give it `iter(loader)` instead (Lightning "
                "does so to predict, and for `overfit_batches`)"
            )
        self.loader, self.batch_size, self.drop_last = loader, loader.batch_size, loader.drop_last

    @property
    def sampler(self) -> PlanSampler:
        return PlanSampler(self.loader)

    def set_epoch(self, epoch: int) -> None:  # Hugging Face's Trainer calls this one when it resumes inside an epoch
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.loader.next_epoch * len(self.loader)
        for position in range(first, first + len(self.loader)):
            ids, valid = self.loader.plan.ids(position)
            planned = PlannedIds(ids[valid].tolist())
            planned.position = position
            yield planned


class LoaderDataset(Dataset, torch.utils.data.Dataset):
    """The images and labels of a loader's split; a list of `PlannedIds` gives the loader's batch."""

    def __init__(self, loader: "ImageLoader"):
        super().__init__(loader.manifest, loader.split)
        self.loader = loader

    def __getitems__(self, ids: Sequence[int]) -> object:
        return self.loader.batch_at(ids.position) if isinstance(ids, PlannedIds) else [self[record_id] for record_id in ids]

    def __reduce__(self) -> tuple:
        return LoaderDataset, (self.loader,)


def collate(batch: object) -> object:
    """The loader's batch as it is; raises TypeError if another program made batches of its own from the loader's records."""
    if isinstance(batch, list):
        raise TypeError(
            "an ImageLoader's records were put into batches by another program; give `batch_size`, `rank` and `world_size` to "
            "the ImageLoader instead, or use its `dataset` with a DataLoader of your own"
        )
    return batch


class DataLoaderFace(DataLoader):
    """What other programs read of a DataLoader beside its batches. There are no workers: threads make the batches."""

    manifest: Manifest
    plan: Plan

    num_workers, pin_memory, timeout, prefetch_factor, persistent_workers, in_order = 0, False, 0, None, False, True
    worker_init_fn = generator = multiprocessing_context = None
    pin_memory_device = ""
    _iterator = None  # of worker processes; Composer looks
    collate_fn = staticmethod(collate)
    _is_accelerate_prepared = True  # ranks and device are the loader's own business

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def drop_last(self) -> bool:
        return self.plan.views == "random"

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The split's images and labels, one at a time, as they are stored."""
        return LoaderDataset(self)

    @property
    def sampler(self) -> PlanSampler:
        """The record ids of this rank's part of the epoch."""
        return PlanSampler(self)

    @property
    def batch_sampler(self) -> PlanBatchSampler:
        return PlanBatchSampler(self)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}
