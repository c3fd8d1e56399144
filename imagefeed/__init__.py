"""Packs images once, then feeds them to PyTorch as fast as the machine allows.

After `imagefeed build RAW /data/imagenet-256`, a training loop reads

    with ImageLoader("/data/imagenet-256", "train", batch_size=128) as loader:
        for images, labels in loader:
            ...
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagefeed.codec.decode import decode
    from imagefeed.dataset.errors import UserError
    from imagefeed.dataset.reader import Dataset
    from imagefeed.pipeline.batch import Batch, gather
    from imagefeed.pipeline.loader import ImageLoader
    from imagefeed.pipeline.profiler.measure import profile
    from imagefeed.preprocess.build import build
    from imagefeed.preprocess.convert import convert
    from imagefeed.preprocess.verify import verify

__version__ = "0.2.0"
__all__ = ["Batch", "Dataset", "ImageLoader", "UserError", "build", "convert", "decode", "gather", "profile", "verify"]

# Imported on first use: torch takes seconds to load, and most commands do without it.
_HOMES = {
    "Batch": "imagefeed.pipeline.batch",
    "Dataset": "imagefeed.dataset.reader",
    "ImageLoader": "imagefeed.pipeline.loader",
    "UserError": "imagefeed.dataset.errors",
    "build": "imagefeed.preprocess.build",
    "convert": "imagefeed.preprocess.convert",
    "decode": "imagefeed.codec.decode",
    "gather": "imagefeed.pipeline.batch",
    "profile": "imagefeed.pipeline.profiler.measure",
    "verify": "imagefeed.preprocess.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
