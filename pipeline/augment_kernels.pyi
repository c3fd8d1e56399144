from numpy.typing import NDArray

def augment(
    images: NDArray,
    operations: NDArray,
    size: int,
    means: NDArray,
    scale: NDArray,
    out: NDArray,
    bytes: bool,
    begin: int,
    end: int,
) -> None: ...
def mix(images: NDArray, size: int, item: int, erased: NDArray, mixes: NDArray, apart: int, begin: int, end: int) -> None: ...
