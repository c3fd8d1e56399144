"""Makes a small labeled raw tree of drawn pictures, to try everything on without a photograph at hand.

RAW/train/CLASS/*.JPEG and RAW/val/CLASS/*.JPEG have the sizes, shapes and oddities of ImageNet's files; RAW/sample.json
says with which options they were drawn. An image depends on the seed, its split, class and number alone, not on who
draws it or when.
"""

import contextlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import locked, write_atomically
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.sample import patterns, scenes, things
from imagefeed.preprocess.sample.canvas import Canvas, Ink, photograph

MARKER = "sample.json"
VERSION = 1  # of the drawings: another one gives other images for the same options
TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")  # as write_atomically names them
IMAGES_PER_TASK = 16

# In the order in which --classes takes them; with each, the hues (in turns) that it mostly has in the world, or None.
KINDS: dict[str, tuple[Callable[[Canvas], None], tuple[float, float] | None]] = {
    "balloon": (things.balloon, None),
    "brick-wall": (patterns.brick_wall, (-0.02, 0.09)),
    "butterfly": (things.butterfly, None),
    "chessboard": (patterns.chessboard, (0.04, 0.12)),
    "fish": (things.fish, (0.02, 0.16)),
    "flower": (things.flower, (0.72, 1.17)),
    "honeycomb": (patterns.honeycomb, (0.08, 0.15)),
    "mountain": (scenes.mountain, (0.54, 0.72)),
    "skyline": (scenes.skyline, (0.55, 0.8)),
    "zebra": (patterns.zebra, (0.04, 0.16)),
    "sailboat": (scenes.sailboat, None),
    "leopard": (patterns.leopard, (0.06, 0.13)),
    "forest": (scenes.forest, (0.2, 0.45)),
    "clock": (things.clock, None),
    "planet": (scenes.planet, None),
    "stained-glass": (patterns.stained_glass, None),
    "mushroom": (things.mushroom, (-0.04, 0.08)),
    "dartboard": (things.dartboard, (-0.03, 0.03)),
}
# Beyond the kinds, a class is a kind in one color: each hue (in turns of 1/12) in each tone (saturation, value).
HUES = {"red": 0, "blue": 8, "green": 4, "yellow": 2, "violet": 9, "cyan": 6}
HUES |= {"orange": 1, "pink": 11, "azure": 7, "lime": 3, "magenta": 10, "mint": 5}
TONES = {"": (0.9, 0.95), "pale-": (0.4, 1.0), "deep-": (1.0, 0.6), "dusty-": (0.45, 0.65), "dark-": (0.8, 0.4)}
PALETTES = {f"{tone}{hue}": Ink(HUES[hue] / 12, *TONES[tone]) for tone in TONES for hue in HUES}
MAX_CLASSES = len(KINDS) * len(PALETTES)

# What the odd files of every 50 are; in ImageNet 2 of 100 are grey, 2 smaller than 170 pixels, 2 larger than 900.
GREY, CMYK, TURNED, SMALL, LARGE = range(5)
ODD_EVERY = 50
# The pixels to store so that a viewer that heeds the EXIF orientation shows them upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class SampleClass(NamedTuple):
    """`ink` is None where the class has no color of its own."""

    name: str
    kind: str
    ink: Ink | None
    ordinal: int


class _Task(NamedTuple):
    out: Path
    split: str
    of: SampleClass
    numbers: list[int]
    seed: int


def draw_sample(out: Path, images: int, classes: int, seed: int, progress: Callable = lambda *_: None) -> int:
    """Draws the sample into `out`, five images in train for each one in val; returns how many it drew.

    Files that an earlier run with the same options finished stay as they are. `progress` is first called with
    (images found, 0, 0), then for each image drawn with (1, its bytes, 0). Raises UserError for options out of range,
    and where `out` holds anything else.
    """
    if not 2 <= classes <= MAX_CLASSES:
        raise UserError(f"{classes} classes: 2 to {MAX_CLASSES:,} can be drawn; choose --classes in that range")
    if images < 2 * classes:
        raise UserError(f"{images} images for {classes} classes: each needs 2; choose --images {2 * classes} or more")
    if seed < 0:
        raise UserError(f"the seed is {seed}; choose --seed 0 or more")
    files = {
        image_path(split, of, number): (split, of, number)
        for of in sample_classes(classes)
        for split, count in _counts(images, classes, of).items()
        for number in range(count)
    }
    with _only_one(out):
        _claim(out, {"images": images, "classes": classes, "seed": seed, "version": VERSION}, files)
        missing: dict[tuple[str, SampleClass], list[int]] = {}
        for path, (split, of, number) in files.items():
            if not (out / path).exists():
                missing.setdefault((split, of), []).append(number)
        tasks = [
            _Task(out, split, of, numbers[start : start + IMAGES_PER_TASK], seed)
            for (split, of), numbers in missing.items()
            for start in range(0, len(numbers), IMAGES_PER_TASK)
        ]
        drawn = sum(map(len, missing.values()))
        progress(len(files) - drawn, 0, 0)
        for _ in ProcessRunner().map(_draw_task, tasks, progress):
            pass
    return drawn


def sample_classes(classes: int) -> list[SampleClass]:
    """The classes of a sample: the first kinds of any color, or where those are too few, kinds in one color each."""
    if classes <= len(KINDS):
        return [SampleClass(kind, kind, None, at) for at, kind in zip(range(classes), KINDS)]
    colored = ((f"{kind}-{palette}", kind, ink) for palette, ink in PALETTES.items() for kind in KINDS)
    return [SampleClass(*names, at) for at, names in zip(range(classes), colored)]


def image_path(split: str, of: SampleClass, number: int) -> str:
    return f"{split}/{of.name}/{of.name}_{number:05d}.JPEG"


def draw_image(split: str, of: SampleClass, number: int, seed: int) -> bytes:
    """The JPEG file of one image of the sample, a pure function of its arguments."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{of.name}".encode()), number])
    # 7 and 50 have no common factor: every class has its share of odd files, and so has every number.
    odd = (7 * number + of.ordinal) % ODD_EVERY
    width, height = _size(rng, odd)
    # Very small and very large images are drawn at a usual size, then rescaled.
    scale = min(max(max(width, height), 360), 640) / max(width, height)
    canvas = Canvas(rng, max(8, round(width * scale)), max(8, round(height * scale)), _ink(rng, of))
    KINDS[of.kind][0](canvas)
    image = photograph(canvas, width, height)
    exif = Image.Exif()
    if odd == GREY:
        image = image.convert("L")
    elif odd == CMYK:
        image = image.convert("CMYK")
    elif odd == TURNED:
        exif[ExifTags.Base.Orientation] = turn = int(rng.integers(2, 9))
        image = image.transpose(TURNS[turn])
    file = io.BytesIO()
    # 4:4:4, 4:2:2 and 4:2:0, in Pillow's numbering.
    subsampling = int(rng.choice(3, p=[0.35, 0.05, 0.6]))
    image.save(file, "JPEG", quality=int(rng.integers(75, 96)), subsampling=subsampling, exif=exif)
    return file.getvalue()


def _counts(images: int, classes: int, of: SampleClass) -> dict[str, int]:
    """Images of a class in each split, at least one in each."""
    total = images // classes + (of.ordinal < images % classes)
    val = max(1, round(total / 6))
    return {"train": total - val, "val": val}


def _size(rng: np.random.Generator, odd: int) -> tuple[int, int]:
    """Width and height in pixels, spread as in ImageNet: 468 x 401 on average, most with a side of 500."""
    shape = rng.choice([0.75, 0.666, 1, rng.uniform(0.6, 1)], p=[0.45, 0.33, 0.04, 0.18])
    if odd == SMALL:
        long = rng.uniform(70, 170)
    elif odd == LARGE:
        long = 900 * (2400 / 900) ** (rng.random() ** 2)
    else:
        long = rng.choice([500, rng.uniform(200, 500), 640, 800], p=[0.75, 0.14, 0.08, 0.03])
    sides = round(long), round(long * shape)
    return sides if rng.random() < 0.72 else sides[::-1]


def _ink(rng: np.random.Generator, of: SampleClass) -> Ink:
    if of.ink is not None:
        hue, saturation, value = of.ink
        return Ink(hue + rng.uniform(-0.025, 0.025), saturation * rng.uniform(0.9, 1.1), value * rng.uniform(0.9, 1.1))
    usual = KINDS[of.kind][1]
    hue = rng.uniform(*usual) if usual and rng.random() < 0.35 else rng.random()
    return Ink(hue, rng.uniform(0.4, 1), rng.uniform(0.5, 1))


def _draw_task(task: _Task, report: Callable) -> None:
    """Draws a few images of one class; runs in a worker."""
    folder = task.out / task.split / task.of.name
    folder.mkdir(parents=True, exist_ok=True)
    for number in task.numbers:
        data = draw_image(task.split, task.of, number, task.seed)
        write_atomically(task.out / image_path(task.split, task.of, number), data)
        report(1, len(data), 0)


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it while this one draws."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{error.filename}: a file is in the way; choose another folder for the sample") from None
    with locked(out, f"{out}: another run draws into it; wait until it is done, or choose another folder"):
        yield


def _claim(out: Path, options: dict[str, int], files: dict[str, tuple]) -> None:
    """Marks `out` as the sample with these options; raises UserError where it is another one or holds other things.

    What a killed run left half-written is removed.
    """
    marker = out / MARKER
    if marker.exists():
        try:
            found = json.loads(marker.read_bytes())
            other = [f"{key} {found[key]}, not {value}" for key, value in options.items() if found[key] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{marker}: not readable ({error!r}); choose another folder for the sample") from None
        if other:
            raise UserError(f"{out}: holds a sample with {' and '.join(other)}; ask for the same, or choose another folder")
    ours = {MARKER, *files} if marker.exists() else {MARKER}
    ours |= {str(folder) for path in ours for folder in Path(path).parents}
    left = []
    for folder, folders, names in os.walk(out):
        for path in (Path(folder, name).relative_to(out) for name in (*folders, *names)):
            temporary = TEMPORARY.fullmatch(path.name)
            if temporary and str(path.with_name(temporary[1])) in ours:
                left.append(out / path)
            elif str(path) not in ours:
                raise UserError(f"{out}: holds {path}, which is not of this sample; move it away, or choose another folder")
    for path in left:
        path.unlink()
    if not marker.exists():
        write_atomically(marker, (json.dumps(options) + "\n").encode())
