"""Options of a build: choices, ranges and defaults. Imports nothing heavy, so that --help answers at once."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagefeed.dataset.errors import ArgumentError

LAYOUTS = ("folders", "archives", "kaggle", "csv", "lists", "parquet", "ffcv")
FITS = ("crop", "short")
ENGINES = ("process", "ray")
FORMATS = ("folders", "webdataset", "parquet", "tfrecord")
CLASS_LEVELS = ("deepest", "top")
RANGES = {
    "size": (16, 4096),
    "quality": (1, 100),
    "seed": (0, 2**32 - 1),  # of numpy.random.RandomState
    "max_rejected": (0.0, 1.0),
    "validation_fraction": (0.0, 0.9),
    "workers": (1, math.inf),
}


def check_ranges(**values: float) -> None:
    """Raises ArgumentError for a value that is outside its range."""
    for name, value in values.items():
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ArgumentError(f"`{name}` is {value}; choose {low} {'or more' if high == math.inf else f'to {high}'}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"`{name}` is {value!r}; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored. The shorter side becomes `size` pixels; `fit` "crop" then keeps the center size x size (Krizhevsky
    et al. 2012, section 2), "short" the whole image. `quality` is libjpeg's, 1 to 100. `range` is that of samples with more than
    8 bits, and of floating-point numbers: the first becomes black, the second white; None is the whole range of their bits."""

    size: int = 256
    fit: str = "crop"
    quality: int = 90
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_ranges(size=self.size, quality=self.quality)
        check_choice("fit", self.fit, FITS)
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            low, high = self.range
            raise ArgumentError(f"`range` is {low:g},{high:g}; choose LOW,HIGH with LOW below HIGH, such as 0,4095")

    def identity(self) -> dict[str, Any]:
        """The options as the manifest has them; without a range, as before there was one."""
        return {name: list(value) if name == "range" else value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SourceOptions:
    """How to read a raw tree: the options of `build` (build.py) that say what its folders and files mean."""

    split: str | None = None
    train_split: str | None = None
    layout: str | None = None
    classes: str | Path | None = None
    class_level: str = "deepest"
    validation_fraction: float = 0.0
    seed: int = 0
    frames_per_second: float = 1.0
    columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_ranges(validation_fraction=self.validation_fraction)
        check_choice("class_level", self.class_level, CLASS_LEVELS)
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        if isinstance(self.columns, str) or not all(isinstance(name, str) for name in self.columns):
            raise ArgumentError(f"`columns` is {self.columns!r}; give a list of names of columns")
        if not 0 < self.frames_per_second < math.inf:
            raise ArgumentError(f"`frames_per_second` is {self.frames_per_second}; choose a number above 0")
        if self.validation_fraction and self.split is not None:
            raise ArgumentError("`validation_fraction` makes the splits train and val itself; leave out `split`")

    @property
    def one_split(self) -> bool:
        """Whether the options say that the raw tree is one split, whose folders are the classes."""
        return self.split is not None or self.validation_fraction > 0
