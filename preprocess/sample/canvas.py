"""A canvas and the primitives that every drawn picture is made of: colors, shapes, noise, backgrounds and a camera."""

import colorsys
import copy
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
Point = tuple[float, float]
Number = float | tuple[float, float]  # a number, or the range to draw it from
WHITE, BLACK = (250, 250, 245), (18, 16, 20)
SUPERSAMPLING = 2  # drawn at twice the size and averaged down, because ImageDraw has hard edges


class Ink(NamedTuple):
    """The main color of a picture: hue in turns, saturation and value from 0 to 1."""

    hue: float
    saturation: float
    value: float


def hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def blend(first: Color, second: Color, share: float) -> Color:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


def ring(x: float, y: float, rx: float, ry: float, turn: float = 0, points: int = 48) -> np.ndarray:
    """(points, 2): an ellipse of radii rx, ry around x, y, turned by `turn` radians."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return rotate(polar(angles, rx, ry), turn) + np.array((x, y))


def polar(angles: np.ndarray, rx: float = 1, ry: float = 1) -> np.ndarray:
    return np.stack([rx * np.cos(angles), ry * np.sin(angles)], 1)


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def rotate(points: ArrayLike, turn: float) -> np.ndarray:
    cos, sin = math.cos(turn), math.sin(turn)
    return np.asarray(points, float) @ ((cos, sin), (-sin, cos))


class Canvas:
    """An RGB image to draw on; `unit` is its shorter side in pixels, and `rng` decides everything that is not given."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, ink: Ink):
        self.rng = rng
        self.width, self.height = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.unit = min(self.width, self.height)
        self.ink = ink
        self.image = Image.new("RGB", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.image)
        self.frame = (0, 0), 1, 0, (1, 1), 0

    def at(self, center: Point, size: float = 1, turn: float = 0, stretch: Point = (1, 1), roll: float = 0) -> "Canvas":
        """The same picture in an object's own coordinates, which are rolled, stretched, turned, scaled and moved to `center`."""
        part = copy.copy(self)
        part.frame = center, size, turn, stretch, roll
        return part

    def seen(self, points: ArrayLike) -> np.ndarray:
        """Points of the frame, in pixels of the picture."""
        center, size, turn, stretch, roll = self.frame
        return rotate(rotate(points, roll) * stretch, turn) * size + center

    def polygon(self, points: ArrayLike, color: Color) -> None:
        self.draw.polygon(self.seen(points).ravel().tolist(), fill=color)

    def line(self, points: ArrayLike, color: Color, width: float) -> None:
        flat = self.seen(points).ravel().tolist()
        self.draw.line(flat, fill=color, width=max(1, round(width * self.frame[1])), joint="curve")

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        (x, y), radius = self.seen([(x, y)])[0], radius * self.frame[1]
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def fill(self, color: Color) -> None:
        self.image.paste(color, (0, 0, *self.image.size))

    def pick(self, number: Number) -> float:
        return self.rng.uniform(*number) if isinstance(number, tuple) else number

    def color(self, hue: Number = (0, 1), saturation: Number = (0.2, 0.9), value: Number = (0.3, 0.95)) -> Color:
        return hsv(self.pick(hue), self.pick(saturation), self.pick(value))

    def shade(self, value: Number = 1, saturation: Number = 1, turn: Number = 0) -> Color:
        """The ink with its value and saturation multiplied and its hue turned."""
        value, saturation = self.pick(value) * self.ink.value, self.pick(saturation) * self.ink.saturation
        return hsv(self.ink.hue + self.pick(turn), saturation, value)

    def place(self, margin: float = 0.2) -> Point:
        return self.rng.uniform(margin, 1 - margin) * self.width, self.rng.uniform(margin, 1 - margin) * self.height

    def shows(self, x: float, y: float, margin: float) -> bool:
        return -margin < x < self.width + margin and -margin < y < self.height + margin

    def field(self, cells: float, octaves: int = 4) -> np.ndarray:
        """(height / 4, width / 4): smooth noise, about -1 to 1, with `cells` bumps along the shorter side at its coarsest."""
        size = (self.width // 4, self.height // 4)
        total = np.zeros(size[::-1], np.float32)
        for octave in range(octaves):
            across = [max(2, round(cells * 2**octave * side / min(size))) for side in size]
            bumps = Image.fromarray(self.rng.random(across[::-1], np.float32) * 2 - 1)
            total += np.asarray(bumps.resize(size, Image.Resampling.BICUBIC)) / 2**octave
        return total

    def lay(self, color: Color, mask: np.ndarray) -> None:
        """Lays the color over the picture; `mask`, of any size, is its opacity from 0 to 1."""
        self.image.paste(color, (0, 0), self.stretched(np.clip(mask, 0, 1) * 255))

    def stretched(self, pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels.astype(np.uint8)).resize(self.image.size, Image.Resampling.BILINEAR)

    def gradient(self, top: Color, bottom: Color, bend: float = 1) -> None:
        share = np.linspace(0, 1, 64)[:, None, None] ** bend
        self.image.paste(self.stretched(np.asarray(top) * (1 - share) + np.asarray(bottom) * share))

    def surroundings(self, color: Color | None = None) -> None:
        """A background out of focus: blotches of two colors, with objects of any color in it."""
        rng = self.rng
        first = color or self.color()
        second = blend(first, self.color(), rng.uniform(0.3, 0.9))
        self.gradient(first, second, rng.uniform(0.5, 2))
        self.lay(self.color(), self.field(rng.uniform(1, 4)) * rng.uniform(0.2, 0.7))
        small = self.image.resize((self.width // 16, self.height // 16), Image.Resampling.BOX)
        draw = ImageDraw.Draw(small)
        for _ in range(rng.integers(0, 10)):
            x, y = rng.random() * small.width, rng.random() * small.height
            points = ring(x, y, *rng.uniform(2, 10, 2), rng.uniform(0, 3), rng.integers(3, 9))
            tint = blend(small.getpixel((int(x), int(y))), self.color(), rng.uniform(0.3, 0.9))
            draw.polygon(points.ravel().tolist(), fill=tint)
        small = small.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 2)))
        self.image.paste(small.resize(self.image.size, Image.Resampling.BICUBIC))

    def meadow(self) -> None:
        """Surroundings that are green more often than not."""
        green = self.color((0.14, 0.44), (0.2, 0.8), (0.2, 0.85))
        self.surroundings(green if self.rng.random() < 0.6 else None)

    def sky(self) -> None:
        """A sky of any weather and time of day, with or without clouds."""
        rng = self.rng
        hue = rng.choice([rng.uniform(0.52, 0.66), rng.uniform(-0.08, 0.12), rng.random()], p=[0.55, 0.25, 0.2])
        value = rng.uniform(0.45, 1)
        top = self.color(hue, (0.15, 0.8), value)
        bottom = hsv(hue + rng.normal(0, 0.06), rng.uniform(0.05, 0.45), value * rng.uniform(0.9, 1.3))
        self.gradient(top, bottom, rng.uniform(0.6, 1.6))
        if rng.random() < 0.7:
            cloud = self.color(hue, (0, 0.15), (0.7, 1))
            self.lay(cloud, (self.field(rng.uniform(1.5, 4)) + rng.uniform(-0.5, 0.3)) * rng.uniform(0.6, 1.5))

    def sun(self, margin: float, largest: float, hue: float, value: float) -> None:
        """In every second picture, a sun or moon in the upper part."""
        if self.rng.random() < 0.5:
            x, y = self.place(margin)
            self.disc(x, y * 0.4, self.unit * self.rng.uniform(0.03, largest), self.color(hue, (0, 0.4), value))

    def outline(self, height: float, roughness: float, cells: float) -> np.ndarray:
        """(65, 2): a rough line from left to right at about `height` (0 is the top, 1 the bottom), like hills or waves."""
        x = np.linspace(0, 1, 65)
        y = np.full(65, float(height))
        for octave in range(5):
            knots = max(2, round(cells * 2**octave)) + 1
            bumps = self.rng.uniform(-1, 1, knots) * roughness / 2 ** (1.1 * octave)
            y += np.interp(x, np.linspace(0, 1, knots), bumps)
        return np.stack([x * self.width, y * self.height], 1)

    def ground(self, outline: np.ndarray, color: Color) -> None:
        """Fills everything below the outline."""
        self.polygon(np.concatenate([outline, [(self.width, self.height), (0, self.height)]]), color)

    def mirror(self, shore: float, brightness: float) -> None:
        """Still water below `shore` (0 is the top, 1 the bottom) that reflects the picture above it."""
        line = round(shore * self.height)
        above = self.image.crop((0, 2 * line - self.height, self.width, line))
        below = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM).point(lambda value: round(value * brightness))
        self.image.paste(below, (0, line))


def photograph(canvas: Canvas, width: int, height: int) -> Image.Image:
    """The canvas at its final size as a camera sees it, with uneven light, a color cast, exposure and grain."""
    rng = canvas.rng
    resampling = Image.Resampling.BOX if width < canvas.width else Image.Resampling.BICUBIC
    image = canvas.image.resize((width, height), resampling)
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1)))
    turn, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.4)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    light = 1 + strength * (math.cos(turn) * x + math.sin(turn) * y) - rng.uniform(0, 0.2) * (x * x + y * y)
    light *= rng.uniform(0.55, 1.35)
    grain = rng.standard_normal((height, width), np.float32)
    grain *= rng.uniform(3, 13)
    grain += rng.uniform(-5, 30)
    bands = []
    # Band by band: numpy is three times as fast on planes as on interleaved pixels.
    for band, cast in zip(image.split(), rng.normal(1, 0.1, 3)):
        seen = np.asarray(band) * (light * np.float32(cast))
        seen += grain
        bands.append(Image.fromarray(np.clip(seen, 0, 255, out=seen).astype(np.uint8)))
    return Image.merge("RGB", bands)
