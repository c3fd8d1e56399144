"""docs/pca-jitter.md: AlexNet's color jitter, as libraries do it."""

import types

from tables import pca_statistics
from tables.common import IMAGEFEED, INPUTS, Page
from tables.pca_draws import (
    AUTHORS_AXES,
    AXES,
    DEVIATIONS,
    DRAWS,
    NUMPY,
    SCALED,
    SHOWN,
    VARIANCES,
    by_matrix,
    cells,
    draw,
    measured,
    photograph,
    picture,
    source,
)

page = Page("pca_jitter", [IMAGEFEED], photograph, draw)
table = page.table("libraries", ["Library", "axis 1, 2, 3", "R, G, B", "R-G, R-B", "mean", "within"])


@table.add("the paper's text on pixels of 0-255: 0.1 x eigenvalues (computed)", [NUMPY])
def literal():
    import numpy as np

    return by_matrix(0.1 * np.array(AUTHORS_AXES) * np.square(DEVIATIONS), "the paper's text, 0-255")


@table.add("the authors' code: 0.1 x standard deviations (computed)", [NUMPY])
def authors():
    import numpy as np

    return by_matrix(0.1 * np.array(AUTHORS_AXES) * DEVIATIONS, "the authors' code")


def loader(dtype):
    """The cells of ImageLoader on a dataset whose images are the picture's colors."""
    import numpy as np
    from PIL import Image

    import imagefeed

    for number, color in enumerate(picture()[::32, ::16].reshape(8, 3).round().astype(np.uint8)):
        folder = INPUTS / "raw" / "train" / f"color{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(color, (64, 64, 1))).save(folder / f"{number}.png")
    imagefeed.build(INPUTS / "raw", INPUTS / "packed", size=64, workers=1)
    means, within = [], []
    options = {"crop_size": 32, "batch_size": 8, "dtype": dtype}
    with (
        imagefeed.ImageLoader(INPUTS / "packed", "train", **options) as jittering,
        imagefeed.ImageLoader(INPUTS / "packed", "train", pca_jitter=0, **options) as plain,
    ):
        for _ in range(DRAWS // 8):
            for jittered, other in zip(jittering, plain):
                shift = jittered.images.double().numpy() - other.images.double().numpy()
                means.extend(shift.mean((2, 3)))
                within.append(shift.std((2, 3)).mean())
    photo = np.load(INPUTS / "photo.npy") + np.array(means)[:SHOWN, None, None]
    np.save(INPUTS / "plot-imagefeed.npy", photo.clip(0, 255).round().astype(np.uint8))
    return cells(np.cov(np.array(means).T), np.mean(means, 0), np.mean(within))


for dtype in ("float32", "uint8"):
    table.add(f"imagefeed, `ImageLoader(pca_jitter=0.1)`, {dtype}", [IMAGEFEED])(lambda dtype=dtype: loader(dtype))


TORCH = [IMAGEFEED]  # whose PyTorch is used


@table.add("ClassyVision 0.7.0, `LightingTransform`, 0-1", [*TORCH, "--no-deps classy-vision==0.7.0"])
def classy():
    import torch

    torch.manual_seed(0)
    registry = types.ModuleType("classy_vision.dataset.transforms")
    registry.register_transform = lambda name: lambda of: of
    parent = types.ModuleType("classy_vision.dataset.transforms.classy_transform")
    parent.ClassyTransform = object
    stand_ins = {"classy_vision__dataset__transforms": registry, "classy_vision__dataset__transforms__classy_transform": parent}
    lighting = source("classy_vision", "dataset/transforms/lighting_transform.py", **stand_ins).LightingTransform()
    return measured(lambda image: lighting(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy(), unit=255)


MXNET = ["mxnet==1.9.1", "numpy==1.23.5"]


@table.add("MXNet 1.9.1, `CreateAugmenter(pca_noise=0.1)`", MXNET)
def mxnet_augmenter():
    import mxnet

    mxnet.random.seed(0)
    (augment,) = [each for each in mxnet.image.CreateAugmenter((3, 64, 64), pca_noise=0.1) if "Lighting" in type(each).__name__]
    return measured(lambda image: augment(mxnet.nd.array(image)).asnumpy(), plot="MXNet")


def gluon(dtype, unit):
    import mxnet

    mxnet.random.seed(0)
    lighting = mxnet.gluon.data.vision.transforms.RandomLighting(0.1)
    return measured(
        lambda image: lighting(mxnet.nd.array(image, dtype=dtype)).asnumpy(),
        dtype,
        unit,
        "MXNet gluon, after ToTensor" if unit > 1 else "",
    )


for label, dtype, unit in (("float32 of 0-255", "float32", 1), ("uint8", "uint8", 1), ("after `ToTensor` (0-1)", "float32", 255)):
    table.add(f"MXNet 1.9.1, gluon `RandomLighting(0.1)`, {label}", MXNET)(lambda dtype=dtype, unit=unit: gluon(dtype, unit))


@table.add("GluonCV 0.10.5, `random_pca_lighting(alphastd=0.1)`, 0-255", [*MXNET, "--no-deps gluoncv==0.10.5.post0"])
def gluoncv():
    import mxnet

    lighting = source("gluoncv", "data/transforms/image.py").random_pca_lighting
    return measured(lambda image: lighting(mxnet.nd.array(image), 0.1).asnumpy())


@table.add(
    "mmcv-lite 2.2.0, `adjust_lighting`, mmpretrain 1.2.0's constants",
    ["mmcv-lite==2.2.0", "numpy==1.26.4", "opencv-python-headless==4.11.0.86"],
)
def mmcv_lighting():
    import mmcv
    import numpy as np

    variances, axes = np.array([55.4625, 4.7940, 1.1475]), np.array(AXES)
    return measured(lambda image: mmcv.adjust_lighting(image, variances, axes, alphastd=0.1, to_rgb=False))


TENSORPACK = ["tensorpack==0.11", NUMPY, "opencv-python-headless==5.0.0.93"]


def tensorpack(dtype):
    from tensorpack.dataflow import imgaug

    lighting = imgaug.Lighting(0.1, SCALED, AXES)
    lighting.reset_state()
    import numpy as np

    lighting.rng = np.random.RandomState(0)
    return measured(lighting.augment, dtype)


for dtype in ("float32", "uint8"):
    table.add(f"tensorpack 0.11, `Lighting`, constants x 255, {dtype}", TENSORPACK)(lambda dtype=dtype: tensorpack(dtype))


@table.add("pycls 0.1.1, `lighting`, of BGR images of 0-1", ["--no-deps pycls==0.1.1", NUMPY, "opencv-python-headless==5.0.0.93"])
def pycls():
    import numpy as np

    lighting = source("pycls", "datasets/transforms.py").lighting
    variances, axes = np.array([VARIANCES]), np.array(AXES)
    return measured(
        lambda image: lighting(image.transpose(2, 0, 1)[::-1], 0.1, variances, axes)[::-1].transpose(1, 2, 0), unit=255
    )


@table.add("SlowFast 1.0, `lighting_jitter`, of BGR frames of 0-1", [*TORCH, "--no-deps slowfast==1.0"])
def slowfast():
    import torch

    jitter = source("slowfast", "datasets/transform.py").lighting_jitter

    def one(image):
        frames = torch.from_numpy(image).permute(2, 0, 1).flip(0)[None]
        return jitter(frames, 0.1, VARIANCES, AXES)[0].flip(0).permute(1, 2, 0).numpy()

    return measured(one, unit=255)


@table.add("torchreid 0.2.5, `ColorAugmentation(p=1)`, 0-1", [*TORCH, "--no-deps torchreid==0.2.5"])
def torchreid():
    import torch

    torch.manual_seed(0)
    transforms = types.ModuleType("torchvision.transforms")
    transforms.__getattr__ = lambda name: None
    package = types.ModuleType("torchvision")
    package.transforms = transforms
    names = {"torchvision": package, "torchvision__transforms": transforms}
    augment = source("torchreid", "reid/data/transforms.py", **names).ColorAugmentation(p=1)
    return measured(
        lambda image: augment(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy(), unit=255, plot="torchreid"
    )


@table.add(
    "ChainerCV 0.13.1, `pca_lighting(sigma=25.5)`", [NUMPY, "setuptools==80.9.0 cython==3.1.2", "--source chainercv==0.13.1"]
)
def chainercv():
    lighting = source("chainercv", "transforms/image/pca_lighting.py").pca_lighting
    return measured(lambda image: lighting(image.transpose(2, 0, 1), 25.5).transpose(1, 2, 0), plot="ChainerCV")


def to_picture(image):
    """A jitter of 0-1 that is added to an 8-bit picture of 0-255, and cast back, as in many copies of `imagenet_pca`."""
    import numpy as np

    shift = np.array(AXES) @ (np.array(VARIANCES) * np.random.normal(0, 0.1, 3))
    return (image + shift).astype(np.uint8)


@table.add("constants of 0-1 added to an 8-bit image, cast back to uint8 (read in slimmable_networks; computed)", [NUMPY])
def cast():
    return measured(to_picture, "uint8", plot="0-1 constants, 8-bit image")


def fancy(plot):
    import random

    import albumentations

    random.seed(0)  # what 1.4.14 draws by
    seed = {} if plot.endswith("1.4.14") else {"seed": 0}
    transform = albumentations.Compose([albumentations.FancyPCA(alpha=0.1, p=1)], **seed)
    return measured(lambda image: transform(image=image)["image"], "uint8", plot=plot)


OPENCV = "opencv-python-headless==4.11.0.86"
for name, packages in {
    "albumentations 1.4.14": ["albumentations==1.4.14", "albucore==0.0.13", "numpy==1.26.4", OPENCV],
    "albumentations 2.0.8": ["albumentations==2.0.8", NUMPY, OPENCV],
    "albumentationsx 2.5.1": [*TORCH, "albumentationsx==2.5.1", OPENCV],
}.items():
    table.add(f"{name}, `FancyPCA(alpha=0.1)`, uint8", packages)(lambda name=name: fancy(name))


page.tables += [pca_statistics.constants, pca_statistics.deviations, pca_statistics.without]
