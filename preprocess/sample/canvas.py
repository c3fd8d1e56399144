"""A canvas with what drawn scenes are made of: soft backgrounds, skies, rings, balls, and a camera that spoils them."""

import colorsys
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, int, int]
Range = tuple[float, float]
Point = tuple[float, float]
WHITE, BLACK = (250, 250, 245), (18, 16, 20)
# Drawn at twice the size and averaged down, because ImageDraw has hard edges.
SUPERSAMPLING = 2


class Ink(NamedTuple):
    """The color that a scene's main thing has: hue in turns, saturation and value from 0 to 1."""

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
    around = rotate(np.stack([rx * np.cos(angles), ry * np.sin(angles)], 1), turn)
    return around + np.array((x, y))


def rotate(points: np.ndarray, turn: float) -> np.ndarray:
    cos, sin = math.cos(turn), math.sin(turn)
    return np.asarray(points, float) @ ((cos, sin), (-sin, cos))


class Canvas:
    """An RGB image to draw on; `unit` is its shorter side in pixels, `rng` decides all that is not given."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, ink: Ink):
        self.rng = rng
        self.width, self.height = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.unit = min(self.width, self.height)
        self.ink = ink
        self.image = Image.new("RGB", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.image)

    def shade(self, value: float = 1, saturation: float = 1, turn: float = 0) -> Color:
        """The ink, lighter or darker, more or less saturated, its hue turned."""
        return hsv(self.ink.hue + turn, self.ink.saturation * saturation, self.ink.value * value)

    def any_color(self, saturation: Range = (0.2, 0.9), value: Range = (0.3, 0.95)) -> Color:
        return hsv(self.rng.random(), self.rng.uniform(*saturation), self.rng.uniform(*value))

    def place(self, margin: float = 0.2) -> Point:
        return self.rng.uniform(margin, 1 - margin) * self.width, self.rng.uniform(margin, 1 - margin) * self.height

    def polygon(self, points: np.ndarray, color: Color) -> None:
        self.draw.polygon(np.asarray(points, float).ravel().tolist(), fill=color)

    def stamp(self, center: Point, size: float, turn: float, flip: int = 1) -> Callable[[np.ndarray, Color], None]:
        """A polygon function in a thing's own coordinates: `size` long, turned, seen from its other side if `flip` is -1."""

        def part(points: np.ndarray, color: Color) -> None:
            self.polygon(rotate(np.asarray(points, float) * (flip, 1), turn) * size + center, color)

        return part

    def line(self, points: np.ndarray, color: Color, width: float) -> None:
        flat = np.asarray(points, float).ravel().tolist()
        self.draw.line(flat, fill=color, width=max(1, round(width)), joint="curve")

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def ball(self, x: float, y: float, radius: float, color: Color, steps: int = 10) -> None:
        """A disc lit from above on the left."""
        dark, light = blend(color, (0, 0, 0), 0.55), blend(color, (255, 255, 255), 0.75)
        for step in range(steps):
            share = step / (steps - 1)
            shade = blend(dark, color, share * 1.6) if share < 0.625 else blend(color, light, (share - 0.625) / 0.375)
            self.disc(x - 0.35 * radius * share, y - 0.35 * radius * share, radius * (1 - share**1.3 * 0.9), shade)

    def field(self, cells: float, octaves: int = 4) -> np.ndarray:
        """(height / 4, width / 4), about -1..1: smooth noise, `cells` bumps along the shorter side at its coarsest."""
        size = (self.width // 4, self.height // 4)
        total = np.zeros(size[::-1], np.float32)
        for octave in range(octaves):
            across = [max(2, round(cells * 2**octave * side / min(size))) for side in size]
            bumps = Image.fromarray(self.rng.random(across[::-1], np.float32) * 2 - 1)
            total += np.asarray(bumps.resize(size, Image.Resampling.BICUBIC)) / 2**octave
        return total

    def lay(self, color: Color, mask: np.ndarray) -> None:
        """Covers with the color where `mask`, of any size, is 1, and by parts where it is less."""
        coverage = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
        self.image.paste(color, (0, 0), coverage.resize(self.image.size, Image.Resampling.BILINEAR))

    def gradient(self, top: Color, bottom: Color, bend: float = 1) -> None:
        share = np.linspace(0, 1, 64)[:, None, None] ** bend
        column = np.asarray(top) * (1 - share) + np.asarray(bottom) * share
        column = Image.fromarray(column.astype(np.uint8)).resize(self.image.size, Image.Resampling.BILINEAR)
        self.image.paste(column)

    def surroundings(self, color: Color | None = None) -> None:
        """A background out of focus: blotches of two colors, with things of any color standing around."""
        rng = self.rng
        first = color or self.any_color()
        second = blend(first, self.any_color(), rng.uniform(0.3, 0.9))
        self.gradient(first, second, rng.uniform(0.5, 2))
        self.lay(self.any_color(), self.field(rng.uniform(1, 4)) * rng.uniform(0.2, 0.7))
        small = self.image.resize((self.width // 16, self.height // 16), Image.Resampling.BOX)
        draw = ImageDraw.Draw(small)
        for _ in range(rng.integers(0, 10)):
            x, y = rng.random() * small.width, rng.random() * small.height
            points = ring(x, y, *rng.uniform(2, 10, 2), rng.uniform(0, 3), rng.integers(3, 9))
            tint = blend(small.getpixel((int(x), int(y))), self.any_color(), rng.uniform(0.3, 0.9))
            draw.polygon(points.ravel().tolist(), fill=tint)
        small = small.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 2)))
        self.image.paste(small.resize(self.image.size, Image.Resampling.BICUBIC))

    def meadow(self) -> None:
        """Surroundings that are green more often than not."""
        rng = self.rng
        green = hsv(rng.uniform(0.14, 0.44), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.85))
        self.surroundings(green if rng.random() < 0.6 else None)

    def sky(self) -> None:
        """A sky of any weather and time of day, with or without clouds."""
        rng = self.rng
        hue = rng.choice([rng.uniform(0.52, 0.66), rng.uniform(-0.08, 0.12), rng.random()], p=[0.55, 0.25, 0.2])
        value = rng.uniform(0.45, 1)
        top = hsv(hue, rng.uniform(0.15, 0.8), value)
        bottom = hsv(hue + rng.normal(0, 0.06), rng.uniform(0.05, 0.45), value * rng.uniform(0.9, 1.3))
        self.gradient(top, bottom, rng.uniform(0.6, 1.6))
        if rng.random() < 0.7:
            cloud = hsv(hue, rng.uniform(0, 0.15), rng.uniform(0.7, 1))
            self.lay(cloud, (self.field(rng.uniform(1.5, 4)) + rng.uniform(-0.5, 0.3)) * rng.uniform(0.6, 1.5))

    def outline(self, height: float, roughness: float, cells: float) -> np.ndarray:
        """(65, 2): a line from left to right, about `height` (0 is the top, 1 the bottom), as of hills or waves."""
        x = np.linspace(0, 1, 65)
        y = np.full(65, float(height))
        for octave in range(5):
            knots = max(2, round(cells * 2**octave)) + 1
            bumps = self.rng.uniform(-1, 1, knots) * roughness / 2 ** (1.1 * octave)
            y += np.interp(x, np.linspace(0, 1, knots), bumps)
        return np.stack([x * self.width, y * self.height], 1)

    def ground(self, outline: np.ndarray, color: Color) -> None:
        """Fills all below the outline."""
        self.polygon(np.concatenate([outline, [(self.width, self.height), (0, self.height)]]), color)

    def mirror(self, shore: float, brightness: float) -> None:
        """Still water from `shore` (0 is the top, 1 the bottom) down, with what stands above it upside down in it."""
        line = round(shore * self.height)
        above = self.image.crop((0, 2 * line - self.height, self.width, line))
        below = above.transpose(Image.Transpose.FLIP_TOP_BOTTOM).point(lambda value: round(value * brightness))
        self.image.paste(below, (0, line))


def photograph(canvas: Canvas, width: int, height: int) -> Image.Image:
    """The canvas at its final size as a camera sees it: uneven light, color cast, exposure, grain."""
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
    # Band by band: numpy is three times as fast on planes as on pixels of three values.
    for band, cast in zip(image.split(), rng.normal(1, 0.1, 3)):
        seen = np.asarray(band) * (light * np.float32(cast))
        seen += grain
        bands.append(Image.fromarray(np.clip(seen, 0, 255, out=seen).astype(np.uint8)))
    return Image.merge("RGB", bands)
