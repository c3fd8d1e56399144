import numpy as np

AVAILABLE: bool  # whether this CPU can decode; if not, `decode` leaves every job undone

def sizes(jobs: np.ndarray, /) -> None: ...
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
