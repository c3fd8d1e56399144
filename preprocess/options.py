"""Options of a build: choices, ranges and defaults. Imports nothing heavy, so that --help answers at once."""

import math
from dataclasses import dataclass

from imagefeed.dataset.errors import ArgumentError

LAYOUTS = ("folders", "archives", "kaggle", "csv", "parquet")
FITS = ("crop", "short")
ENGINES = ("process", "ray")
RANGES = {
    "size": (16, 4096),
    "quality": (1, 100),
    "seed": (0, 2**32 - 1),  # of numpy.random.RandomState
    "max_rejected": (0.0, 1.0),
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
    et al. 2012, section 2), "short" the whole image. `quality` is libjpeg's, 1 to 100."""

    size: int = 256
    fit: str = "crop"
    quality: int = 90

    def __post_init__(self) -> None:
        check_ranges(size=self.size, quality=self.quality)
        check_choice("fit", self.fit, FITS)
