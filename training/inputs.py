"""What a net is shown: how its pixels are prepared, and loaders of them."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.pipeline.arguments import choose_decoder
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.selection import find_records
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

    `reading` are the loader's options that decide only its cost, `split` is the split to evaluate on, if not the usual one, and
    `subset` the record ids to train on, if not all.
    """

    manifest: Manifest
    device: torch.device
    reading: dict[str, object] = dataclasses.field(default_factory=dict)
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    split: str | None = None
    subset: np.ndarray | None = None

    @property
    def train_split(self) -> str:
        """The training split; raises UserError if there are only evaluation splits."""
        manifest = self.manifest
        if not manifest.trainable:
            raise UserError(
                f"{manifest.root}: no split to train on, only {', '.join(manifest.splits)}, which are only for --evaluate; build "
                f"the dataset with a training split, or with --train-split {manifest.train_split} to train on that one"
            )
        return manifest.train_split

    @property
    def decoder(self) -> str:
        decoder, cache = (self.reading.get(name, OPTIONS[name].default) for name in ("decoder", "cache"))
        return choose_decoder(decoder, self.device, cache)

    @property
    def train_records(self) -> int:
        return self.manifest.split(self.train_split).records if self.subset is None else len(self.subset)

    def choose(self, subset: Path | None) -> "Inputs":
        """Inputs that train on the records that a file names (`subset` of ImageLoader)."""
        if subset is None:
            return self
        chosen = find_records(subset, RecordReader(self.manifest, self.train_split), self.manifest)
        return dataclasses.replace(self, subset=chosen)

    @property
    def eval_split(self) -> str | None:
        """The split to evaluate on; None if only the training split has labels."""
        return self.split or self.manifest.eval_split

    def training(self, batch_size: int, preprocessing: Preprocessing, **options) -> ImageLoader:
        return self.open(self.train_split, batch_size, preprocessing, subset=self.subset, **options)

    def open(self, split: str, batch_size: int, preprocessing: Preprocessing, **options) -> ImageLoader:
        options = {"rank": self.ranks.rank, "world_size": self.ranks.count, **vars(preprocessing), **self.reading, **options}
        return ImageLoader(self.manifest, split, batch_size, device=self.device, **options)

    def validation(self, views: str, batch_size: int, preprocessing: Preprocessing, **options) -> ImageLoader:
        """Each record to evaluate on once, about `batch_size` crops at a time; no cache, which pays from the second epoch."""
        batch_size = max(1, batch_size // 10) if views == "ten" else batch_size
        return self.open(self.eval_split, batch_size, preprocessing, views=views, cache="none", pad_last=True, **options)
