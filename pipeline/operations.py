"""The operations of TrivialAugment and RandAugment, as torchvision.transforms.v2 has them: their strengths, and what they do to a
batch on a device; erasing and mixing there. On a CPU, augment_kernels.c does the same, to the bit.

TrivialAugment: Mueller and Hutter 2021, arXiv 2103.10158. RandAugment: Cubuk, Zoph, Shlens, Le 2020, arXiv 1909.13719.
"""

from collections.abc import Callable

import numpy as np
import torch

# The numbers are those of augment_kernels.c, and decide every batch.
KINDS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness",
    "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(1, 6)
WARPS = range(SHEAR_X, ROTATE + 1)
SIGNED = np.array([name in KINDS[SHEAR_X : KINDS.index("posterize")] for name in KINDS])  # a draw turns their strength around
BINS = 31  # strengths of each operation
OPERATION = np.dtype([("kind", "<i4"), ("value", "<f4"), ("matrix", "<f4", (2, 3))])


def strengths(wide: bool, size: int) -> np.ndarray:
    """(KINDS, BINS) float64: the strengths of TrivialAugment (`wide`) or RandAugment, from the weakest; crops of `size`."""
    shift, most_bits = (32.0, 6) if wide else (150 / 331 * size, 4)
    ends = {"shear": 0.99 if wide else 0.3, "translate": shift, "rotate": 135.0 if wide else 30.0}
    table = np.zeros((len(KINDS), BINS))
    for row, name in zip(table, KINDS, strict=True):
        if name == "posterize":
            row[:] = (8 - torch.arange(BINS) / ((BINS - 1) / most_bits)).round()
        elif name == "solarize":
            row[:] = torch.linspace(1, 0, BINS)
        elif name not in ("identity", "autocontrast", "equalize"):
            row[:] = torch.linspace(0, ends.get(name.partition("_")[0], 0.99 if wide else 0.9), BINS)
    return table


def make_operations(kinds: np.ndarray, strength: np.ndarray, size: int) -> np.ndarray:
    """OPERATIONs of kinds and strengths of one shape, for crops of `size`."""
    made = np.zeros(kinds.shape, OPERATION)
    made["kind"] = kinds
    solarize, posterize = KINDS.index("solarize"), KINDS.index("posterize")
    made["value"] = np.where(kinds == solarize, 255 * strength, np.where(kinds == posterize, strength, 1 + strength))
    # Pixel (x, y) comes from matrix @ (x, y, 1). Shears are around the upper left corner, rotations around the middle.
    matrix = np.zeros((*kinds.shape, 2, 3))
    matrix[..., [0, 1], [0, 1]] = 1
    for kind, axis in ((SHEAR_X, 0), (SHEAR_Y, 1)):
        factor = np.where(kinds == kind, strength, 0)
        matrix[..., axis, 1 - axis] += factor
        matrix[..., axis, 2] += factor / 2
    for kind, axis in ((TRANSLATE_X, 0), (TRANSLATE_Y, 1)):
        matrix[..., axis, 2] -= np.where(kinds == kind, np.trunc(strength), 0)
    angle, middle = np.radians(-strength), (size - 1) / 2
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack((cos, sin, middle * (1 - cos - sin), -sin, cos, middle * (1 - cos + sin)), -1).reshape(matrix.shape)
    made["matrix"] = np.where((kinds == ROTATE)[..., None, None], turn, matrix)
    return made


def apply_operations(images: torch.Tensor, operations: np.ndarray) -> torch.Tensor:
    """Applies OPERATIONs (N, K), one column after the other, to uint8 images (N, 3, size, size), in place."""
    for column in operations.T:
        kinds = column["kind"]
        warped = np.isin(kinds, WARPS)
        for kind in np.unique(np.where(warped, SHEAR_X, kinds)).tolist():
            if kind == 0:
                continue
            rows = np.flatnonzero(warped if kind == SHEAR_X else kinds == kind)
            index, values, matrices = (
                torch.from_numpy(array).to(images.device, non_blocking=True)
                for array in (rows, column["value"][rows], column["matrix"][rows])
            )
            chosen = images[index]
            images[index] = (
                warp(chosen, matrices) if kind == SHEAR_X else BY_VALUE[KINDS[kind]](chosen, values[:, None, None, None])
            )
    return images


def warp(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Takes each pixel from the nearest one to where its matrix (2, 3) points; 0 outside."""
    size = images.shape[-1]
    along = torch.arange(size, dtype=torch.float32, device=images.device)
    scale_x, scale_y, shift = matrices[..., None, None].unbind(2)  # each (N, 2, 1, 1)
    columns, rows = (scale_x * along + (scale_y * along[:, None] + shift)).add_(0.5).floor_().unbind(1)
    inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    places = torch.where(inside, rows * size + columns, 0).long()  # exact up to a size of 4096
    found = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return found.view_as(images) * inside[:, None]


def cut_off(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.clamp_(0, 255).to(torch.uint8)


def gray(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.float().unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()[:, None]


def blend(images: torch.Tensor, others: torch.Tensor | float, ratios: torch.Tensor) -> torch.Tensor:
    return cut_off(images * ratios + others * (1 - ratios))


def contrast(images: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
    return blend(images, gray(images).double().mean((1, 2, 3), keepdim=True).float(), ratios)


def sharpness(images: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner).div_(13).round_()
    images = images.clone()
    images[:, :, 1:-1, 1:-1] = cut_off(inner + (blurred - inner) * (1 - ratios))
    return images


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(images.float() >= threshold, 255 - images, images)


def autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    low, high = (extreme((2, 3), keepdim=True).float() for extreme in (images.amin, images.amax))
    stretched = cut_off((images - low) / ((high - low) * (1 / 255)))
    return torch.where(low < high, stretched, images)


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """With Pillow's rounding."""
    flat = images.flatten(2).long()
    counts = torch.zeros((*flat.shape[:2], 256), dtype=torch.int64, device=images.device)
    sums = counts.scatter_add_(2, flat, torch.ones_like(flat)).cumsum(2)
    highest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - highest).div_(255, rounding_mode="floor")
    table = ((sums - counts + step // 2) // step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    return torch.where(step[..., None] > 0, table.gather(2, flat).view_as(images), images)


BY_VALUE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda images, ratios: cut_off(images * ratios),
    "color": lambda images, ratios: blend(images, gray(images), ratios),
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}


def mix(images: torch.Tensor, erased: np.ndarray, mixes: np.ndarray, apart: int = 1) -> torch.Tensor:
    """Erases and mixes, as augment_kernels.mix does, images (N, 3, size, size), which it may change."""
    images.masked_fill_(in_boxes(erased, images), 0)
    if not len(mixes):
        return images
    pairs = images.unflatten(0, (-1, 2, apart))
    others = pairs.flip(1)
    inside = in_boxes(mixes["box"], images).unflatten(0, (-1, 1, apart))
    if images.is_floating_point():
        share = np.where(mixes["box"].any(1), np.float32(1), mixes["share"])
        shares = torch.from_numpy(share).to(images.device)[:, None, None, None].unflatten(0, (-1, 1, apart))
        pairs = pairs * shares + others * (1 - shares)
    return torch.where(inside, others, pairs).flatten(0, 2)


def in_boxes(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(N, 1, size, size) bool: the pixels of each box (N, 4): top, left, height, width."""
    size, device = images.shape[-1], images.device
    top, left, height, width = torch.from_numpy(np.ascontiguousarray(boxes)).to(device)[:, None, :].unbind(2)
    along = torch.arange(size, device=device)
    rows, columns = ((along >= begin) & (along < begin + side) for begin, side in ((top, height), (left, width)))
    return (rows[:, :, None] & columns[:, None])[:, None]
