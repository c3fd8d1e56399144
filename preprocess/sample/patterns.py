"""Draws surfaces with a pattern, each from a random generator alone, no two alike."""

import math

import numpy as np
from PIL import Image

from imagefeed.preprocess.sample.canvas import BLACK, WHITE, Canvas, blend, hsv, ring, rotate


def brick_wall(c: Canvas) -> None:
    rng = c.rng
    mortar = hsv(rng.random(), rng.uniform(0, 0.2), rng.choice([rng.uniform(0.1, 0.3), rng.uniform(0.6, 0.95)]))
    c.draw.rectangle((0, 0, c.width, c.height), fill=mortar)
    high = c.unit / rng.uniform(5, 14)
    long = high * rng.uniform(1.8, 3.2)
    gap = high * rng.uniform(0.05, 0.13)
    turn, spread = rng.normal(0, 0.12), rng.uniform(0.05, 0.2)
    reach = math.hypot(c.width, c.height) / 2
    lay = c.stamp((c.width / 2, c.height / 2), 1, turn)
    for row in range(int(-reach // high), int(reach // high) + 1):
        shift = (row % 2 + rng.uniform(-0.1, 0.1)) * long / 2
        for column in range(int(-reach // long) - 1, int(reach // long) + 1):
            left, top = column * long + shift + gap, row * high + gap
            right, bottom = left + long - 2 * gap, top + high - 2 * gap
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            brick = c.shade(rng.normal(1, spread), rng.uniform(0.7, 1.1), rng.normal(0, 0.012))
            lay(corners, brick)
    c.lay(blend(mortar, BLACK, 0.5), c.field(4) * 0.4 - 0.1)


def chessboard(c: Canvas) -> None:
    rng = c.rng
    c.surroundings()
    cells = rng.integers(6, 11)
    turn, tilt = rng.uniform(0, math.pi), rng.uniform(0, 0.95)
    size, center = c.unit * rng.uniform(0.7, 1.35), np.array(c.place(0.4))

    def seen(points: np.ndarray) -> np.ndarray:
        """Board coordinates 0..cells to the canvas, the board lying on a tilted table."""
        flat = rotate(np.asarray(points) / cells - 0.5, turn)
        depth = 1 - flat[:, 1:] * math.sin(tilt) * 0.8
        return flat * (1, math.cos(tilt)) / depth * size + center

    pale = blend(WHITE, c.shade(1.2, 0.4), rng.uniform(0, 0.9))
    dark = c.shade(rng.uniform(0.25, 0.6))
    low, high = -0.5, cells + 0.5
    c.polygon(seen([(low, low), (high, low), (high, high), (low, high)]), blend(dark, BLACK, 0.4))
    for row in range(cells):
        for column in range(cells):
            square = [(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)]
            c.polygon(seen(square), dark if (row + column) % 2 else pale)
    for row, column in rng.integers(0, cells, (rng.integers(0, 9), 2)):
        color = WHITE if rng.random() < 0.5 else BLACK
        for lift in (0.12, 0.06, 0):
            piece = seen(ring(column + 0.5, row + 0.5, 0.36, 0.36)) - (0, (0.12 - lift) * size / cells * 1.5)
            c.polygon(piece, blend(color, (128, 110, 90), 0.15 + 3 * lift))


def honeycomb(c: Canvas) -> None:
    rng = c.rng
    c.draw.rectangle((0, 0, c.width, c.height), fill=c.shade(1.2, 0.6))
    radius, turn = c.unit / rng.uniform(7, 18), rng.uniform(0, math.pi)
    wall, deep = rng.uniform(0.72, 0.9), rng.uniform(0.35, 0.7)
    filled = c.field(2, 2)
    reach = int(math.hypot(c.width, c.height) / radius / 2) + 2
    for row in range(-int(reach / 1.5), int(reach / 1.5) + 1):
        for column in range(-int(reach / 1.7), int(reach / 1.7) + 1):
            cell = ((column + row % 2 / 2) * math.sqrt(3) * radius, row * 1.5 * radius)
            x, y = rotate([cell], turn)[0] + (c.width / 2, c.height / 2)
            if not (-radius < x < c.width + radius and -radius < y < c.height + radius):
                continue
            honey = filled[min(max(int(y / 4), 0), len(filled) - 1), min(max(int(x / 4), 0), filled.shape[1] - 1)] > 0.1
            value = rng.normal(1.05 if honey else deep, 0.07)
            corner = turn + math.pi / 6
            c.polygon(ring(x, y, radius * wall, radius * wall, corner, 6), c.shade(value * 0.75, 1, 0.01))
            inner, shift = radius * wall * 0.85, radius / 14
            c.polygon(ring(x + shift, y + shift, inner, inner, corner, 6), c.shade(value, rng.uniform(0.8, 1)))
            if honey:
                c.disc(x - radius * 0.25, y - radius * 0.25, radius * 0.13, c.shade(1.5, 0.3))


def zebra(c: Canvas) -> None:
    rng = c.rng
    dark, pale = blend(BLACK, c.shade(0.4), rng.uniform(0, 0.8)), blend(WHITE, c.shade(1.1, 0.7), rng.uniform(0, 0.8))
    c.draw.rectangle((0, 0, c.width, c.height), fill=pale)
    field = c.field(rng.uniform(0.8, 2), 3)
    high, wide = field.shape
    turn, stripes = rng.uniform(0, math.pi), rng.uniform(6, 16)
    y, x = np.arange(high)[:, None] / min(high, wide), np.arange(wide) / min(high, wide)
    wave = np.sin(2 * math.pi * stripes * (x * math.cos(turn) + y * math.sin(turn)) + field * rng.uniform(2, 7))
    c.lay(dark, (wave + rng.uniform(-0.35, 0.35) + 0.25 * c.field(20, 2)) * 3 + 0.5)
    c.lay(blend(dark, pale, 0.4), c.field(2) * 0.4 - 0.15)


def leopard(c: Canvas) -> None:
    rng = c.rng
    c.gradient(c.shade(rng.uniform(0.9, 1.1), 0.8), c.shade(rng.uniform(0.9, 1.2), rng.uniform(0.2, 0.7)))
    c.lay(c.shade(0.75), c.field(2) * 0.5)
    cell, turn, stretch = c.unit / rng.uniform(6, 13), rng.uniform(0, math.pi), rng.uniform(1, 1.4)
    dark = c.shade(rng.uniform(0.1, 0.3))
    reach = int(math.hypot(c.width, c.height) / cell / 2) + 2
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            spot = np.array([column * stretch + row % 2 / 2, row]) + rng.normal(0, 0.12, 2)
            x, y = rotate([spot], turn)[0] * cell + (c.width / 2, c.height / 2)
            if not (-cell < x < c.width + cell and -cell < y < c.height + cell):
                continue
            size = cell * rng.uniform(0.3, 0.46)
            blob = ring(0, 0, size * stretch, size, turn, 14) * rng.uniform(0.8, 1.15, (14, 1)) + (x, y)
            if rng.random() < 0.15:
                c.polygon((blob - (x, y)) * 0.6 + (x, y), dark)
                continue
            c.polygon((blob - (x, y)) * 0.7 + (x, y), c.shade(0.65))
            breaks = np.sort(rng.choice(14, rng.integers(2, 5), replace=False))
            for start, end in zip(breaks, [*breaks[1:], breaks[0] + 14]):
                c.line(blob[np.arange(start, max(end - 1, start + 1) + 1) % 14], dark, size * rng.uniform(0.25, 0.45))
    c.lay(c.shade(1.3, 0.4), c.field(40, 2) * 0.3)


def stained_glass(c: Canvas) -> None:
    rng = c.rng
    high, wide = c.height // 4, c.width // 4
    panes = rng.integers(15, 60)
    seeds = rng.random((panes, 2)) * (high, wide)
    y, x = np.arange(high, dtype=np.float32)[:, None], np.arange(wide, dtype=np.float32)
    owner = np.zeros((high, wide), np.intp)
    nearest = second = np.full((high, wide), np.inf, np.float32)
    for pane, (row, column) in enumerate(seeds.astype(np.float32)):
        distance = np.sqrt((y - row) ** 2 + (x - column) ** 2)
        owner[distance < nearest] = pane
        second = np.minimum(second, np.maximum(distance, nearest))
        nearest = np.minimum(nearest, distance)
    turns = np.where(rng.random(panes) < 0.55, rng.normal(0, 0.03, panes), rng.random(panes))
    values = rng.uniform(0.6, 1.2, panes)
    glass = np.array([c.shade(value, 1, turn) for value, turn in zip(values, turns)], np.uint8)
    c.image.paste(Image.fromarray(glass[owner]).resize(c.image.size, Image.Resampling.BILINEAR))
    c.lay(WHITE, c.field(rng.uniform(2, 6)) * 0.35)
    lead = rng.uniform(1.2, 4) * min(high, wide) / 130
    c.lay(BLACK, (lead - (second - nearest)) / 2 + 0.5)
