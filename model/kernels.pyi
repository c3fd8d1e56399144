# fmt: off
def lrn(
    x: int, grad: int, out: int, images: int, pixels: int, towers: int, width: int, nhwc: bool, bfloat16: bool, k: float,
    alpha: float, begin: int, end: int, /,
) -> None: ...
