"""Options of a build: choices, ranges and defaults. Imports nothing heavy, so that --help answers at once."""

import math
from dataclasses import asdict, dataclass
from typing import Any

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
