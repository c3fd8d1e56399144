"""What a loader's arguments stand for, and which of them do not go together or with the dataset."""

import re
from typing import Any

import numpy as np
import torch

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader
from imagefeed.dataset.records import NO_LABEL
from imagefeed.dataset.storage import Url
from imagefeed.pipeline.gpu import why_unusable
from imagefeed.pipeline.options import IMAGENET_MEAN, IMAGENET_STD


def check_labels(reader: RecordReader, manifest: Manifest, subset: np.ndarray | None = None) -> None:
    """Raises UserError unless every record has a label to train on."""
    labels = reader.labels if subset is None else reader.labels[subset]
    unknown = np.count_nonzero(labels == NO_LABEL)
    if unknown:
        raise UserError(
            f"{manifest.root}: {unknown:,} of the {len(labels):,} records of split {reader.split} have no label, so it "
            "cannot be trained on; choose a split with labels, or build a dataset that has one"
        )


def check_combination(
    manifest: Manifest, crop_size: int, mean: str | tuple, cache: str, changes_images: bool, decoder: str
) -> None:
    """Raises UserError for arguments that exclude each other or do not fit the dataset; `changes_images` marks resized crops and
    color jitter, `decoder` is the chosen one."""
    if changes_images and (cache == "device" or (cache == "host" and decoder != "native")):
        raise UserError(
            "DALI makes only plain crops from a cache; use `cache=none` with `random_resized_crop` or `color_jitter`, or "
            "`cache=host` without `decoder=dali`"
        )
    if mean == "image" and (manifest.options["fit"] != "crop" or changes_images):
        raise UserError(
            f"{manifest.root}: the mean image fits images of one size with unchanged colors; use `mean=channel` with "
            "`random_resized_crop`, `color_jitter` or a dataset built with --fit short"
        )
    if crop_size > manifest.options["size"]:
        raise UserError(
            f"{manifest.root}: crops of {crop_size} pixels do not fit its images of {manifest.options['size']}; "
            "lower `crop_size`, or build a dataset of larger images"
        )


def default_shuffle(manifest: Manifest) -> str:
    """A store gives 5.6 MB for a request as fast as 22 KB."""
    return "blocks" if isinstance(manifest.root, Url) else "global"


def choose_device(name: torch.device | str) -> torch.device:
    """The device of that name; "auto" is CUDA if PyTorch can use it, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:\d{1,2})?", str(name)):
        raise UserError(f"device {name}: images are decoded on cpu or cuda only; use one of them")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device cuda: {why_unusable()}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: the GPUs of this machine are cuda:0 to cuda:{torch.cuda.device_count() - 1}; use one")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def trained_form(device: torch.device, precision: str) -> dict[str, Any]:
    """Arguments of ImageLoader for the form in which a net on a GPU reads pixels, so that no step casts or transposes them."""
    return {"dtype": precision, "memory_format": "channels_last"} if device.type == "cuda" else {}


def choose_decoder(name: str, device: torch.device, cache: str) -> str:
    """The decoder of that name; "auto" is "native" on a CPU, and where a cache holds what the CPU decodes."""
    if cache == "device":
        if name in ("native", "both"):
            raise UserError(f"`decoder={name}`: DALI fills the cache on the device; use `decoder=auto` or another `cache`")
        return "dali"
    if name == "both" and cache != "none":
        raise UserError("`decoder=both` decodes every record each time; use `decoder=native` with `cache=host`, or `cache=none`")
    return ("dali" if device.type == "cuda" and cache == "none" else "native") if name == "auto" else name


def normalization(statistics: dict[str, np.ndarray], mean: str | tuple, std: str | tuple) -> tuple[np.ndarray, np.ndarray]:
    """What `mean` and `std` (ImageLoader) stand for: (3,) to subtract, and (3,) to multiply by. The mean image is subtracted
    separately."""
    means = {"channel": statistics["channel_mean"], "image": np.zeros(3), "imagenet": IMAGENET_MEAN}
    stds = {"none": np.ones(3), "dataset": statistics["channel_std"], "imagenet": IMAGENET_STD}
    subtracted, divisor = (table[value] if isinstance(value, str) else value for table, value in ((means, mean), (stds, std)))
    return np.asarray(subtracted, np.float64), 1 / np.asarray(divisor)


def pca_matrix(statistics: dict[str, np.ndarray], pca_jitter: float) -> np.ndarray:
    """The (3, 3) matrix that turns three standard normal draws into an RGB offset, in gray levels.

    Column i is pca_jitter * sqrt(eigenvalue i) * eigenvector i of the RGB covariance of the train split. The paper (section 4.1)
    writes eigenvalues; its code multiplies by standard deviations, and on pixels of 0-255 eigenvalues would shift colors by a
    thousand gray levels.
    """
    return pca_jitter * np.sqrt(statistics["eigenvalues"]) * statistics["eigenvectors"]
