"""Draws a small labeled raw tree, to try everything without downloading a photograph.

RAW/train/CLASS/*.JPEG and RAW/val/CLASS/*.JPEG have the sizes, shapes and oddities of ImageNet's files. RAW/sample.json
records the options. An image depends only on the seed and on its split, class and number.
"""

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import TEMPORARY, locked, write_atomically
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.sample import scenes, things
from imagefeed.preprocess.sample.canvas import Canvas, Ink, photograph

MARKER = "sample.json"
VERSION = 1  # of the drawings; a new version draws other images for the same options
IMAGES_PER_TASK = 16


class Kind(NamedTuple):
    draw: Callable[[Canvas, np.random.Generator], None]
    background: Callable[[Canvas], None] | None
    hues: tuple[float, float] | None  # the range of hues, in turns, that the object usually has in the world


# In the order in which --classes takes them.
KINDS = {
    "balloon": Kind(things.balloon, Canvas.sky, None),
    "brick-wall": Kind(scenes.brick_wall, None, (-0.02, 0.09)),
    "butterfly": Kind(things.butterfly, Canvas.meadow, None),
    "chessboard": Kind(scenes.chessboard, Canvas.surroundings, (0.04, 0.12)),
    "fish": Kind(things.fish, None, (0.02, 0.16)),
    "flower": Kind(things.flower, Canvas.meadow, (0.72, 1.17)),
    "honeycomb": Kind(scenes.honeycomb, None, (0.08, 0.15)),
    "mountain": Kind(scenes.mountain, Canvas.sky, (0.54, 0.72)),
    "skyline": Kind(scenes.skyline, None, (0.55, 0.8)),
    "zebra": Kind(scenes.zebra, None, (0.04, 0.16)),
    "sailboat": Kind(things.sailboat, Canvas.sky, None),
    "leopard": Kind(scenes.leopard, None, (0.06, 0.13)),
    "forest": Kind(scenes.forest, Canvas.sky, (0.2, 0.45)),
    "clock": Kind(things.clock, Canvas.surroundings, None),
    "planet": Kind(scenes.planet, None, None),
    "stained-glass": Kind(scenes.stained_glass, None, None),
    "mushroom": Kind(things.mushroom, Canvas.meadow, (-0.04, 0.08)),
    "dartboard": Kind(things.dartboard, Canvas.surroundings, (-0.03, 0.03)),
}
# With more classes than kinds, a class is a kind in one color: a hue, in turns of 1/12, in a tone of (saturation, value).
HUES = {"red": 0, "blue": 8, "green": 4, "yellow": 2, "violet": 9, "cyan": 6}
HUES |= {"orange": 1, "pink": 11, "azure": 7, "lime": 3, "magenta": 10, "mint": 5}
TONES = {"": (0.9, 0.95), "pale-": (0.4, 1.0), "deep-": (1.0, 0.6), "dusty-": (0.45, 0.65), "dark-": (0.8, 0.4)}
PALETTES = {f"{tone}{hue}": Ink(HUES[hue] / 12, *TONES[tone]) for tone in TONES for hue in HUES}
MAX_CLASSES = len(KINDS) * len(PALETTES)

# The odd files among every 50. In ImageNet 2 in 100 are gray, 2 are smaller than 170 pixels and 2 larger than 900.
GRAY, CMYK, TURNED, SMALL, LARGE = range(5)
ODD_EVERY = 50
# By EXIF orientation, the transposition to store so that a viewer shows the image upright.
FLIPS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(FLIPS, start=2)}


class SampleClass(NamedTuple):
    name: str
    kind: str
    ink: Ink | None  # None if the class has no color of its own
    ordinal: int


def draw_sample(out: Path, images: int, classes: int, seed: int, progress: Callable = lambda *_: None) -> int:
    """Draws the sample into `out`, five images in train for each one in val, and returns how many it drew.

    Keeps the files that an earlier run with the same options finished. Calls `progress` first with (images found, 0, 0),
    then for each drawn image with (1, its bytes, 0).
    """
    if not 2 <= classes <= MAX_CLASSES:
        raise UserError(f"a sample has 2 to {MAX_CLASSES:,} classes, not {classes}; choose --classes in that range")
    if images < 2 * classes:
        raise UserError(f"{images} images are too few for {classes} classes; choose --images {2 * classes} or more")
    if seed < 0:
        raise UserError(f"the seed is {seed}; choose --seed 0 or more")
    files = {
        image_path(split, of, number): (split, of, number)
        for of in sample_classes(classes)
        for split, count in _counts(images, classes, of).items()
        for number in range(count)
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{error.filename}: a file is in the way; choose another folder for the sample") from None
    with locked(out, f"{out}: another run is drawing into it; wait until it is done, or choose another folder"):
        _claim(out, {"images": images, "classes": classes, "seed": seed, "version": VERSION}, files)
        missing = [image for path, image in files.items() if not (out / path).exists()]
        tasks = [(out, seed, missing[start : start + IMAGES_PER_TASK]) for start in range(0, len(missing), IMAGES_PER_TASK)]
        progress(len(files) - len(missing), 0, 0)
        for _ in ProcessRunner().map(_draw_task, tasks, progress):
            pass
    return len(missing)


def sample_classes(classes: int) -> list[SampleClass]:
    """The first `classes` kinds in any color; if there are more classes than kinds, kinds in one color each."""
    found = [(kind, kind, None) for kind in KINDS]
    if classes > len(KINDS):
        found = [(f"{kind}-{palette}", kind, ink) for palette, ink in PALETTES.items() for kind in KINDS]
    return [SampleClass(*fields, at) for at, fields in enumerate(found[:classes])]


def image_path(split: str, of: SampleClass, number: int) -> str:
    return f"{split}/{of.name}/{of.name}_{number:05d}.JPEG"


def draw_image(split: str, of: SampleClass, number: int, seed: int) -> bytes:
    """The JPEG file of one image, a pure function of the arguments."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{of.name}".encode()), number])
    # 7 and 50 have no common factor, so odd files are spread evenly over classes and numbers.
    odd = (7 * number + of.ordinal) % ODD_EVERY
    width, height = _size(rng, odd)
    # Very small and very large images are drawn at a usual size, then rescaled.
    scale = min(max(max(width, height), 360), 640) / max(width, height)
    kind = KINDS[of.kind]
    canvas = Canvas(rng, max(8, round(width * scale)), max(8, round(height * scale)), _ink(rng, of.ink, kind.hues))
    if kind.background:
        kind.background(canvas)
    kind.draw(canvas, rng)
    image = photograph(canvas, width, height)
    exif = Image.Exif()
    if odd in (GRAY, CMYK):
        image = image.convert("L" if odd == GRAY else "CMYK")
    elif odd == TURNED:
        exif[ExifTags.Base.Orientation] = turn = int(rng.integers(2, 9))
        image = image.transpose(TURNS[turn])
    file = io.BytesIO()
    subsampling = int(rng.choice(3, p=[0.35, 0.05, 0.6]))  # 4:4:4, 4:2:2, 4:2:0 in Pillow's numbering
    image.save(file, "JPEG", quality=int(rng.integers(75, 96)), subsampling=subsampling, exif=exif)
    return file.getvalue()


def _counts(images: int, classes: int, of: SampleClass) -> dict[str, int]:
    """The images of a class in each split, at least one in each."""
    total = images // classes + (of.ordinal < images % classes)
    val = max(1, round(total / 6))
    return {"train": total - val, "val": val}


def _size(rng: np.random.Generator, odd: int) -> tuple[int, int]:
    """Width and height in pixels, distributed as in ImageNet: 468 x 401 on average, most with a side of 500."""
    shape = rng.choice([0.75, 0.666, 1, rng.uniform(0.6, 1)], p=[0.45, 0.33, 0.04, 0.18])
    if odd == SMALL:
        long = rng.uniform(70, 170)
    elif odd == LARGE:
        long = 900 * (2400 / 900) ** (rng.random() ** 2)
    else:
        long = rng.choice([500, rng.uniform(200, 500), 640, 800], p=[0.75, 0.14, 0.08, 0.03])
    sides = round(long), round(long * shape)
    return sides if rng.random() < 0.72 else sides[::-1]


def _ink(rng: np.random.Generator, ink: Ink | None, hues: tuple[float, float] | None) -> Ink:
    """The main color of one picture: near the ink of its class, or any color, more often one of the usual hues."""
    if ink:
        return Ink(ink.hue + rng.uniform(-0.025, 0.025), *(part * rng.uniform(0.9, 1.1) for part in ink[1:]))
    hue = rng.uniform(*hues) if hues and rng.random() < 0.35 else rng.random()
    return Ink(hue, rng.uniform(0.4, 1), rng.uniform(0.5, 1))


def _draw_task(task: tuple[Path, int, list[tuple]], report: Callable) -> None:
    out, seed, images = task
    for image in images:
        path, data = out / image_path(*image), draw_image(*image, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        report(1, len(data), 0)


def _claim(out: Path, options: dict[str, int], files: dict[str, tuple]) -> None:
    """Marks `out` as the sample with these options, unless it holds other files, and removes files left half-written."""
    marker, ours = out / MARKER, {MARKER}
    if marker.exists():
        try:
            found = json.loads(marker.read_bytes())
            other = [f"{key} {found[key]}, not {value}" for key, value in options.items() if found[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{marker}: not readable ({error!r}); choose another folder for the sample") from None
        if other:
            raise UserError(f"{out}: holds a sample with {' and '.join(other)}; ask for the same, or choose another folder")
        ours |= {*files, *(str(folder) for path in files for folder in Path(path).parents)}
    half_written = []
    for path in (path.relative_to(out) for path in out.rglob("*")):
        temporary = TEMPORARY.fullmatch(path.name)
        if temporary and str(path.with_name(temporary[1])) in ours:
            half_written.append(out / path)
        elif str(path) not in ours:
            raise UserError(f"{out}: holds {path}, which is not part of this sample; move it away, or choose another folder")
    for path in half_written:
        path.unlink()
    if not marker.exists():
        write_atomically(marker, (json.dumps(options) + "\n").encode())
