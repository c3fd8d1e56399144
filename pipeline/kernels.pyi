from numpy.typing import NDArray

def crop(
    jobs: NDArray,
    size: int,
    means: NDArray,
    scale: NDArray,
    mean_image: NDArray | None,
    out: NDArray,
    bytes: bool,
    begin: int,
    end: int,
) -> None: ...
