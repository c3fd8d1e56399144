from collections.abc import Sequence

import numpy as np

AVAILABLE: bool  # whether this CPU can decode; if not, `decode` leaves every job undone

def sizes(jobs: np.ndarray, /) -> None: ...
def locate(jobs: np.ndarray, buffers: Sequence[bytes | memoryview], /) -> None: ...
def decode(
    jobs: np.ndarray,
    scale: np.ndarray,
    mean_image: np.ndarray | None,
    type: str,
    channels_last: bool,
    to_end: bool,
    begin: int,
    end: int,
    /,
) -> None: ...
def samples(jpegs: Sequence[bytes | memoryview], below: int, square: bool, /) -> list[tuple[bytes, int, int, int] | None]: ...
def convert(
    jobs: np.ndarray,
    scale: np.ndarray,
    mean_image: np.ndarray | None,
    type: str,
    channels_last: bool,
    to_end: bool,
    begin: int,
    end: int,
    /,
) -> None: ...
