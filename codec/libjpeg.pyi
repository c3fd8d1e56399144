import numpy as np

LIBJPEG: str | int

def header(data: bytes | memoryview, /) -> tuple[int, int, str, bool]: ...
def check(data: bytes, /) -> None: ...
def decode(data: bytes | memoryview, out: np.ndarray, /) -> None: ...
def rescale(
    data: bytes, size: int, crop: bool, mirrored_x: bool, mirrored_y: bool, /
) -> tuple[int, int, bytes, bytes, bytes]: ...
def rescale_samples(
    samples: bytes, height: int, width: int, chroma: int, size: int, crop: bool, mirrored_x: bool, mirrored_y: bool, /
) -> tuple[int, int, bytes, bytes, bytes]: ...
def add(
    y: np.ndarray,
    cb: np.ndarray,
    cr: np.ndarray,
    height: int,
    width: int,
    image: np.ndarray,
    channels: np.ndarray,
    products: np.ndarray,
    /,
) -> None: ...
