"""Record files to normalised batches on the device, in an exactly known order."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch loads; train.py has the measurements

from pipeline.dataset import DamagedRecord, ShardedDataset
from pipeline.loader import Batch, ImageLoader, choose_device
from pipeline.plan import Plan

__all__ = ["Batch", "DamagedRecord", "ImageLoader", "Plan", "ShardedDataset", "choose_device"]
