"""What docs/pca-jitter.md measures of a color jitter, and its plot.

Each library jitters one picture 2,000 times. Its covariance is that of ImageNet's pixels, as the authors' statistics have it, so
that libraries which compute it from the picture do what they would on ImageNet.
"""

import importlib.machinery
import importlib.util
import sys

from tables.common import INPUTS, ROOT

DRAWS = 2000
SHOWN = 7  # draws in the plot
PLOTTED = (
    *("the paper's text, 0-255", "the authors' code", "imagefeed", "MXNet", "MXNet gluon, after ToTensor", "torchreid"),
    *("ChainerCV", "0-1 constants, 8-bit image", "albumentations 1.4.14", "albumentations 2.0.8"),
)
# data_mean and color_pca of the authors' batches.meta file (cuda-convnet2, make-data/input_meta): standard deviations in gray
# levels, and axes in columns.
DEVIATIONS = (121.780, 37.094, 19.721)
AUTHORS_AXES = ((-0.5635, -0.7126, 0.4180), (-0.5762, -0.0235, -0.8170), (-0.5920, 0.7012, 0.3973))
# fb.resnet.torch, datasets/imagenet.lua: variances of pixels of 0-1, and axes in columns.
VARIANCES = (0.2175, 0.0188, 0.0045)
AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
SCALED = tuple(255 * value for value in VARIANCES)
NUMPY = "numpy==2.4.6"


def picture():
    """(64, 64, 3) float64 in blocks of eight colors: the mean plus or minus each of the authors' standard deviations."""
    import numpy as np

    signs = np.array([[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)])
    colors = 128 + signs * DEVIATIONS @ np.array(AUTHORS_AXES).T
    return np.repeat(np.repeat(colors.reshape(2, 4, 3), 32, 0), 16, 1)


def along(covariance):
    """(3,) deviations along the authors' axes."""
    import numpy as np

    axes = np.array(AUTHORS_AXES)
    return np.einsum("ij,ia,ja->a", covariance, axes, axes) ** 0.5


def cells(covariance, mean=(0, 0, 0), within=0.0, draws=DRAWS):
    """The cells of shifts of that covariance and mean, in gray levels, whose deviation within an image is `within`."""
    import numpy as np

    channels = np.diag(covariance) ** 0.5
    drift = "0"
    if (abs(np.array(mean)) > 3 * channels / draws**0.5 + 0.05).all():  # more than chance does to a mean
        drift = ", ".join(f"{value:.1f}" for value in mean)
    shown = []
    for values in (along(covariance), channels):
        shown.append(", ".join(f"{value:,.0f}" if channels[0] > 100 else f"{value:.1f}" for value in values))
    none = channels.max() < 0.05
    correlation = (
        "-" if none else f"{covariance[0, 1] / channels[0] / channels[1]:.2f}, {covariance[0, 2] / channels[0] / channels[2]:.2f}"
    )
    return [*shown, correlation, drift, f"{within:.1f}" if within > 0.05 else "0"]


def measured(jitter, dtype="float32", unit=1, plot=""):
    """The cells of a function that jitters a copy of the picture, whose white is 255 / `unit`, and a row `plot` of the plot."""
    import numpy as np

    def shift(pixels):
        image = (pixels.round() if dtype == "uint8" else pixels / unit).astype(dtype)
        return (jitter(image.copy()).astype(np.float64) - image) * unit

    np.random.seed(0)
    if plot:
        photo = np.load(INPUTS / "photo.npy").astype(np.float64)
        np.save(INPUTS / f"plot-{plot}.npy", [(photo + shift(photo)).clip(0, 255).round().astype(np.uint8) for _ in range(SHOWN)])
    shifts = [shift(picture()) for _ in range(DRAWS)]
    means = np.array([shift.mean((0, 1)) for shift in shifts])
    return cells(np.cov(means.T), means.mean(0), np.mean([shift.std((0, 1)) for shift in shifts]))


def source(package, path, **stand_ins):
    """Runs one source file of an installed package without the imports of the package itself, for which the modules stand in."""
    folder = importlib.machinery.PathFinder.find_spec(package).submodule_search_locations[0]
    for name, module in stand_ins.items():
        sys.modules[name.replace("__", ".")] = module
    name = ".".join([package, *path.removesuffix(".py").split("/")])
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_matrix(matrix, plot):
    """The cells of a (3, 3) matrix that turns normal draws into a shift."""
    import numpy as np

    photo, rng = np.load(INPUTS / "photo.npy").astype(np.float64), np.random.default_rng(0)
    shifts = rng.standard_normal((SHOWN, 1, 1, 3)) @ matrix.T
    np.save(INPUTS / f"plot-{plot}.npy", (photo + shifts).clip(0, 255).round().astype(np.uint8))
    return cells(matrix @ matrix.T)


def photograph():
    """A drawn photo that all rows of the plot start from."""
    import io

    import numpy as np
    from PIL import Image

    from imagefeed.preprocess.sample import tree

    (kind,) = [each for each in tree.sample_classes(10) if "mountain" in str(each)][:1]
    image = Image.open(io.BytesIO(tree.draw_image("train", kind, 3, 1))).convert("RGB")
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((88, 88), Image.Resampling.LANCZOS)
    flat = image.quantize(32, dither=Image.Dither.NONE).convert("RGB")  # few colors, so that the plot stays small
    np.save(INPUTS / "photo.npy", np.asarray(flat))


def draw():
    """docs/pca-jitter.png: a row for each library that left its draws."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if not all((INPUTS / f"plot-{name}.npy").exists() for name in PLOTTED):
        return  # not all were measured
    photo, step, left = Image.fromarray(np.load(INPUTS / "photo.npy")), 92, 190
    sheet = Image.new("RGB", (left + step * (SHOWN + 1), step * len(PLOTTED)), "gainsboro")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, name in enumerate(PLOTTED):
        pen.text((4, row * step + step // 2), name, "black", font, "lm")
        for column, pixels in enumerate([np.asarray(photo), *np.load(INPUTS / f"plot-{name}.npy")]):
            x, y = left + column * step, row * step + 2
            sheet.paste(Image.fromarray(pixels[:76]), (x, y))
            # Below each photo, what was added to it on average, four times as strong, on gray.
            shift = 4 * (pixels.astype(float) - np.asarray(photo)).mean((0, 1))
            sheet.paste(tuple((128 + shift).clip(0, 255).astype(int)), (x, y + 78, x + 88, y + 88))
    sheet.save(ROOT / "docs" / "pca-jitter.png", optimize=True)
