"""What a net is shown: how its pixels are prepared, and loaders of them."""

import dataclasses

import torch

from imagefeed.dataset.manifest import EVALUATION_NAMES, Manifest
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.training.parallel import Ranks


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The options of a loader that a net must be shown the same values of as in training."""

    crop_size: int
    mean: str | tuple[float, ...] = "channel"
    std: str | tuple[float, ...] = "none"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Opens loaders of a dataset for this rank.

    `reading` are the loader's options that decide only its cost, `split` is the split to evaluate on, if not the usual one.
    """

    manifest: Manifest
    device: torch.device
    reading: dict[str, object] = dataclasses.field(default_factory=dict)
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    split: str | None = None

    @property
    def train_split(self) -> str | None:
        """The split to train on; None if the dataset has only splits to evaluate on."""
        split = self.manifest.train_split
        return None if split.lower() in EVALUATION_NAMES else split

    @property
    def eval_split(self) -> str | None:
        """The split to evaluate on; None if only the training split has labels."""
        if self.split or self.train_split:
            return self.split or self.manifest.eval_split
        labeled = [name for name, split in self.manifest.splits.items() if any(split.counts)]
        usual = [name for word in EVALUATION_NAMES for name in labeled if name.lower() == word]
        return next(iter(usual), None)

    def open(self, split: str, batch_size: int, preprocessing: Preprocessing, **options) -> ImageLoader:
        options = {"rank": self.ranks.rank, "world_size": self.ranks.count, **vars(preprocessing), **self.reading, **options}
        return ImageLoader(self.manifest, split, batch_size, device=self.device, **options)

    def validation(self, views: str, batch_size: int, preprocessing: Preprocessing) -> ImageLoader:
        """Each record to evaluate on once, about `batch_size` crops at a time; no cache, which pays from the second epoch."""
        batch_size = max(1, batch_size // 10) if views == "ten" else batch_size
        return self.open(self.eval_split, batch_size, preprocessing, views=views, cache="none")
