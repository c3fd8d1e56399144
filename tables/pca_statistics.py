"""The tables of docs/pca-jitter.md about ImageNet's statistics and about libraries without the jitter.

RAW=FOLDER names photos of ImageNet; without it, their rows stay as recorded.
"""

import importlib.machinery
import os
import re
from pathlib import Path

from tables.common import IMAGEFEED, Table
from tables.pca_draws import DEVIATIONS, NUMPY, VARIANCES

RAW = os.environ.get("RAW")  # a folder of ImageNet's photos, for the rows that are about their statistics

constants = Table(
    "constants", ["Statistics of pixels of 0-1", "variance along axis 1, 2, 3", "share of fb.resnet.torch's", "error of sampling"]
)
deviations = Table("deviations", ["Standard deviations of pixels of 0-1", "R, G, B"])
without = Table("without", ["Library", "files searched", "files with such an augmentation"])


@constants.add("the authors', `color_pca`", [NUMPY])
def authors_variances():
    return shares([(value / 255) ** 2 for value in DEVIATIONS])


@constants.add("fb.resnet.torch's, and of all libraries above but the authors'", [NUMPY])
def published():
    return shares(VARIANCES)


def shares(variances, errors="-"):
    """The cells of (3,) variances, and of their standard errors."""
    return [
        ", ".join(f"{value:.4f}" for value in variances),
        ", ".join(f"{a / b:.3f}" for a, b in zip(variances, VARIANCES)),
        errors,
    ]


def photos(prepare):
    """The cells of the pixels of all of RAW's photos, each as `prepare` makes it."""
    import numpy as np
    from PIL import Image

    if not RAW:
        return []
    sums = []  # of each photo: the products of (R, G, B, 1) with itself
    for path in sorted(Path(RAW).rglob("*.JPEG")):
        pixels = np.asarray(prepare(Image.open(path).convert("RGB")), np.float64).reshape(-1, 3) / 255
        pixels = np.c_[pixels, np.ones(len(pixels))]
        sums.append(pixels.T @ pixels)

    def variances(photos):
        products = np.sum(photos, 0)
        mean = products[3, :3] / products[3, 3]
        return np.linalg.eigvalsh(products[:3, :3] / products[3, 3] - np.outer(mean, mean))[::-1]

    found, rng = variances(sums), np.random.default_rng(0)
    drawn = [variances([sums[n] for n in rng.integers(len(sums), size=len(sums))]) for _ in range(200)]  # a bootstrap
    return shares(found, ", ".join(f"{100 * error:.0f} %" for error in np.std(drawn, 0) / found))


def rescale(image, crop=0):
    """The shorter side 256, and the middle `crop` pixels."""
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], 2)
    left, top = ((side - crop) // 2 if crop else 0 for side in image.size)
    return image.crop((left, top, left + crop, top + crop)) if crop else image


@constants.add("1,000 photos of ImageNet as they are", [IMAGEFEED])
def native():
    return photos(lambda image: image)


@constants.add("the same, shorter side 256", [IMAGEFEED])
def rescaled():
    return photos(rescale)


@constants.add("the same, the middle 256 x 256 of that", [IMAGEFEED])
def cropped():
    return photos(lambda image: rescale(image, 256))


@constants.add("the same, by `imagefeed build`", [IMAGEFEED])
def built():
    import imagefeed

    if not RAW:
        return []
    statistics = imagefeed.build(RAW, "packed", split="train").load_statistics()
    return shares(statistics["eigenvalues"] / 255**2)


@deviations.add("as published: 0.229, 0.224, 0.225", [NUMPY])
def published_deviations():
    return ["0.229, 0.224, 0.225"]


def deviation(pooled):
    import numpy as np
    from PIL import Image

    if not RAW:
        return []
    crops = [np.asarray(rescale(Image.open(path).convert("RGB"), 224)) / 255 for path in sorted(Path(RAW).rglob("*.JPEG"))]
    found = np.concatenate(crops).std((0, 1)) if pooled else np.mean([crop.std((0, 1)) for crop in crops], 0)
    return [", ".join(f"{value:.3f}" for value in found)]


@deviations.add("1,000 photos, the middle 224 x 224: mean of each photo's own", [IMAGEFEED])
def own_deviations():
    return deviation(False)


@deviations.add("the same, of all pixels together", [IMAGEFEED])
def pooled_deviations():
    return deviation(True)


def searched(package):
    """How many Python files of an installed package there are, and how many hold the constants or the name of the jitter."""
    folder = Path(importlib.machinery.PathFinder.find_spec(package).submodule_search_locations[0])
    files = [path.read_text(errors="replace") for path in folder.rglob("*.py")]
    marks = re.compile(r"0?\.2175\b|fancy_?pca|pca_?(?:light|noise|jitter|color)|lighting_?(?:noise|jitter)", re.IGNORECASE)
    return [len(files), sum(bool(marks.search(text)) for text in files)]


for name, version in {"torchvision": "0.28.0", "timm": "1.0.31", "kornia": "0.9.0", "imgaug": "0.4.0", "keras": "3.15.1"}.items():
    without.add(f"{name} {version}", [f"--no-deps {name}=={version}"])(lambda name=name: searched(name))
