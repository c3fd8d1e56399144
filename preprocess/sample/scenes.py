"""Kinds of pictures that a pattern or a view fills. The random generator decides everything, so no two are alike."""

import math
from itertools import pairwise, product

import numpy as np
from numpy.typing import ArrayLike

from imagefeed.preprocess.sample.canvas import BLACK, WHITE, Canvas, Color, blend, box, hsv, polar, ring, rotate


def brick_wall(c: Canvas, rng: np.random.Generator) -> None:
    mortar = hsv(rng.random(), rng.uniform(0, 0.2), rng.choice([rng.uniform(0.1, 0.3), rng.uniform(0.6, 0.95)]))
    c.fill(mortar)
    high = c.unit / rng.uniform(5, 14)
    long, gap = high * rng.uniform(1.8, 3.2), high * rng.uniform(0.05, 0.13)
    part = c.at((c.width / 2, c.height / 2), turn=rng.normal(0, 0.12))
    spread, reach = rng.uniform(0.05, 0.2), math.hypot(c.width, c.height) / 2
    for row in range(int(-reach // high), int(reach // high) + 1):
        shift = (row % 2 + rng.uniform(-0.1, 0.1)) * long / 2
        for column in range(int(-reach // long) - 1, int(reach // long) + 1):
            left, top = column * long + shift, row * high
            color = c.shade(rng.normal(1, spread), rng.uniform(0.7, 1.1), rng.normal(0, 0.012))
            part.polygon(box(left + gap, top + gap, left + long - gap, top + high - gap), color)
    c.lay(blend(mortar, BLACK, 0.5), c.field(4) * 0.4 - 0.1)


def chessboard(c: Canvas, rng: np.random.Generator) -> None:
    cells = rng.integers(6, 11)
    turn, tilt = rng.uniform(0, math.pi), rng.uniform(0, 0.95)
    size, center = c.unit * rng.uniform(0.7, 1.35), np.array(c.place(0.4))

    def seen(points: ArrayLike) -> np.ndarray:
        """Board coordinates 0..cells on the canvas: the board lies on a tilted table."""
        flat = rotate(np.asarray(points) / cells - 0.5, turn)
        return flat * (1, math.cos(tilt)) / (1 - flat[:, 1:] * math.sin(tilt) * 0.8) * size + center

    pale = blend(WHITE, c.shade(1.2, 0.4), rng.uniform(0, 0.9))
    dark = c.shade((0.25, 0.6))
    c.polygon(seen(box(-0.5, -0.5, cells + 0.5, cells + 0.5)), blend(dark, BLACK, 0.4))
    for row, column in product(range(cells), repeat=2):
        c.polygon(seen(box(column, row, column + 1, row + 1)), dark if (row + column) % 2 else pale)
    for row, column in rng.integers(0, cells, (rng.integers(0, 9), 2)):
        color = WHITE if rng.random() < 0.5 else BLACK
        for lift in (0.12, 0.06, 0):
            piece = seen(ring(column + 0.5, row + 0.5, 0.36, 0.36)) - (0, (0.12 - lift) * size / cells * 1.5)
            c.polygon(piece, blend(color, (128, 110, 90), 0.15 + 3 * lift))


def forest(c: Canvas, rng: np.random.Generator) -> None:
    haze, bark = c.color(c.ink.hue, 0.1, (0.55, 0.95)), c.color((0.04, 0.1), 0.5, (0.15, 0.4))
    for far in (0.65, 0.35, 0):
        foot = rng.uniform(0.62, 0.78) + 0.25 * (1 - far)
        c.ground(c.outline(foot - 0.05, 0.04, 3), blend(c.shade(0.45, 0.7), haze, far))
        for x in np.sort(rng.uniform(-0.05, 1.05, rng.integers(6, 14))):
            high = c.unit * rng.uniform(0.35, 0.75) * (1.1 - far)
            tall = high * rng.uniform(0.22, 0.34)
            x, bottom = x * c.width, (foot + rng.normal(0, 0.02)) * c.height
            c.polygon(box(x - tall / 12, bottom - high * 0.2, x + tall / 12, bottom), blend(bark, haze, far))
            needles = blend(c.shade((0.4, 0.8)), haze, far)
            for share in (tiers := np.arange(rng.integers(4, 8))) / len(tiers):
                low, half = bottom - high * (0.1 + 0.75 * share), tall * (1 - 0.8 * share)
                left, middle, right = (x - half, low + half * 0.15), (x, low - half * 0.1), (x + half, low + half * 0.15)
                tip = (x, low - high * 0.24)
                c.polygon([left, middle, right, tip], blend(needles, BLACK, 0.25))
                c.polygon([left, middle, tip], needles)


def honeycomb(c: Canvas, rng: np.random.Generator) -> None:
    c.fill(c.shade(1.2, 0.6))
    radius, turn = c.unit / rng.uniform(7, 18), rng.uniform(0, math.pi)
    wall, deep = radius * rng.uniform(0.72, 0.9), rng.uniform(0.35, 0.7)
    filled, corner = c.field(2, 2), turn + math.pi / 6
    reach = int(math.hypot(c.width, c.height) / radius / 2) + 2
    rows, columns = int(reach / 1.5), int(reach / 1.7)
    for row, column in product(range(-rows, rows + 1), range(-columns, columns + 1)):
        cell = ((column + row % 2 / 2) * math.sqrt(3) * radius, row * 1.5 * radius)
        x, y = rotate([cell], turn)[0] + (c.width / 2, c.height / 2)
        if not c.shows(x, y, radius):
            continue
        honey = filled[tuple(np.clip((int(y / 4), int(x / 4)), 0, np.array(filled.shape) - 1))] > 0.1
        value = rng.normal(1.05 if honey else deep, 0.07)
        c.polygon(ring(x, y, wall, wall, corner, 6), c.shade(value * 0.75, 1, 0.01))
        inner, shift = wall * 0.85, radius / 14
        c.polygon(ring(x + shift, y + shift, inner, inner, corner, 6), c.shade(value, (0.8, 1)))
        if honey:
            c.disc(x - radius * 0.25, y - radius * 0.25, radius * 0.13, c.shade(1.5, 0.3))


def leopard(c: Canvas, rng: np.random.Generator) -> None:
    c.gradient(c.shade((0.9, 1.1), 0.8), c.shade((0.9, 1.2), (0.2, 0.7)))
    c.lay(c.shade(0.75), c.field(2) * 0.5)
    cell, turn, stretch = c.unit / rng.uniform(6, 13), rng.uniform(0, math.pi), rng.uniform(1, 1.4)
    dark = c.shade((0.1, 0.3))
    reach = int(math.hypot(c.width, c.height) / cell / 2) + 2
    for row, column in product(range(-reach, reach + 1), repeat=2):
        spot = np.array([column * stretch + row % 2 / 2, row]) + rng.normal(0, 0.12, 2)
        x, y = rotate([spot], turn)[0] * cell + (c.width / 2, c.height / 2)
        if not c.shows(x, y, cell):
            continue
        part, size = c.at((x, y)), cell * rng.uniform(0.3, 0.46)
        blob = ring(0, 0, size * stretch, size, turn, 14) * rng.uniform(0.8, 1.15, (14, 1))
        if rng.random() < 0.15:
            part.polygon(blob * 0.6, dark)
            continue
        part.polygon(blob * 0.7, c.shade(0.65))
        breaks = np.sort(rng.choice(14, rng.integers(2, 5), replace=False))
        for start, end in pairwise([*breaks, breaks[0] + 14]):
            part.line(blob[np.arange(start, max(end - 1, start + 1) + 1) % 14], dark, size * rng.uniform(0.25, 0.45))
    c.lay(c.shade(1.3, 0.4), c.field(40, 2) * 0.3)


def mountain(c: Canvas, rng: np.random.Generator) -> None:
    c.sun(0.1, 0.08, 0.13, 1)
    haze = c.color(c.ink.hue, 0.15, (0.6, 0.9))
    middle = rng.uniform(0.45, 0.62)
    for at, (far, roughness, zigzag) in enumerate(((0.5, 0.07, 0.28), (0.2, 0.06, 0.15), (0, 0.05, 0.06))):
        ridge = c.outline(middle + 0.18 * at, roughness, rng.uniform(4, 9))
        summits = np.arange(rng.integers(4, 12))
        peaks = rng.uniform(0.3, 1, len(summits)) * np.where(summits % 2, -1, 1) * zigzag
        steps = (summits + rng.uniform(-0.3, 0.3, len(summits))) / (len(summits) - 1) * c.width
        ridge[:, 1] += np.interp(ridge[:, 0], steps, peaks) * c.height
        c.ground(ridge, blend(c.shade(0.75 - 0.22 * at, 0.8), haze, far))
        if at == 2:
            continue
        below = ridge[:, 1] + (rng.uniform(0.03, 0.16) + rng.normal(0, 0.02, len(ridge))) * c.height
        low = np.maximum(ridge[:, 1], np.minimum(ridge[:, 1].min() + 0.25 * c.height, below))
        snow, lee = blend(WHITE, haze, far * 0.5), blend(WHITE, c.shade(0.6), 0.4)
        for (left, left_low), (right, right_low) in pairwise(zip(ridge, low)):
            slope = [left, right, (right[0], right_low), (left[0], left_low)]
            c.polygon(slope, snow if left[1] > right[1] else lee)
    if rng.random() < 0.4:
        c.mirror(rng.uniform(0.82, 0.92), 1)


def ball(c: Canvas, x: float, y: float, radius: float, color: Color) -> None:
    """A disc lit from the upper left."""
    dark, light = blend(color, (0, 0, 0), 0.55), blend(color, (255, 255, 255), 0.75)
    for share in np.arange(10) / 9:
        shade = blend(dark, color, share * 1.6) if share < 0.625 else blend(color, light, (share - 0.625) / 0.375)
        c.disc(x - 0.35 * radius * share, y - 0.35 * radius * share, radius * (1 - share**1.3 * 0.9), shade)


def planet(c: Canvas, rng: np.random.Generator) -> None:
    c.fill(c.color((0, 1), 0.8, (0.02, 0.15)))
    for _ in range(2):
        c.lay(c.color((0, 1), 0.8, (0.2, 0.8)), c.field(rng.uniform(1, 3)) * 0.5 - rng.uniform(0, 0.3))
    for x, y in rng.random((rng.integers(40, 220), 2)):
        c.disc(x * c.width, y * c.height, c.unit * abs(rng.normal(0, 0.0025)), blend(WHITE, c.color(), 0.3))
    for _ in range(rng.integers(0, 3)):
        ball(c, *c.place(0.05), c.unit * rng.uniform(0.015, 0.06), c.color())
    center, radius = c.place(0.3), c.unit * rng.uniform(0.14, 0.3)
    part, squash = c.at(center, radius, rng.uniform(-1, 1)), rng.uniform(0.12, 0.4)
    rings = [(outer, c.shade(rng.uniform(0.5, 1.1), 0.5, rng.normal(0, 0.05))) for outer in np.arange(2.1, 1.35, -0.12)]

    def half_rings(start: float) -> None:
        for outer, color in rings:
            part.line(polar(np.linspace(start, start + math.pi, 40), outer, outer * squash), color, 0.07)

    half_rings(math.pi)
    ball(c, *center, radius, c.shade(0.8))
    for y in np.linspace(-0.75, 0.75, rng.integers(3, 9)):
        half = math.sqrt(1 - y * y) * 0.97
        color = c.shade(rng.uniform(0.5, 1.1), 0.8, rng.normal(0, 0.04))
        part.line([(-half, y), (0, y + squash * 0.25), (half, y)], color, rng.uniform(0.03, 0.1))
    half_rings(0)


def skyline(c: Canvas, rng: np.random.Generator) -> None:
    glow = c.shade(rng.uniform(0.7, 1.5), rng.uniform(0.2, 0.9), rng.normal(0, 0.06))
    c.gradient(c.shade((0.15, 1), (0.4, 1)), glow)
    for x, y in rng.random((rng.integers(0, 60), 2)):
        c.disc(x * c.width, y * c.height * 0.5, c.unit / 400, WHITE)
    c.sun(0.15, 0.09, 0.14, 0.98)
    horizon = c.height * rng.uniform(0.72, 0.98)
    lights = c.color((0.08, 0.17), (0.1, 0.8), 1)
    for far in (0.5, 0):
        x = -rng.uniform(0, 0.1) * c.width
        tower = blend(c.color(c.ink.hue, (0.2, 0.6), (0.08, 0.5)), c.shade(0.6), far)
        while x < c.width:
            wide = c.unit * rng.uniform(0.07, 0.18)
            top = horizon - c.height * rng.uniform(0.12, 0.6 if far else 0.42)
            c.polygon(box(x, top, x + wide, c.height), tower)
            if rng.random() < 0.3:
                c.polygon([(x, top), (x + wide, top), (x + wide / 2, top - wide * rng.uniform(0.3, 1.4))], tower)
            pane, lit = wide / rng.integers(4, 9), rng.uniform(0.2, 0.7)
            for row, column in product(range(int((horizon - top) / pane / 1.3)), range(int(wide / pane))):
                if rng.random() < lit:
                    left, high = x + (column + 0.25) * pane, top + (row + 0.4) * pane * 1.3
                    window = blend(tower, lights, rng.uniform(0.4, 1) * (1 - far * 0.6))
                    c.polygon(box(left, high, left + pane * 0.5, high + pane * 0.7), window)
            x += wide * rng.uniform(1, 1.15)
    if horizon < c.height * 0.9:
        c.mirror(horizon / c.height, 0.6)


def stained_glass(c: Canvas, rng: np.random.Generator) -> None:
    high, wide = c.height // 4, c.width // 4
    panes = rng.integers(15, 60)
    seeds = (rng.random((panes, 2)) * (high, wide)).astype(np.float32)
    y, x = np.arange(high, dtype=np.float32)[:, None], np.arange(wide, dtype=np.float32)
    distances = np.stack([np.sqrt((y - row) ** 2 + (x - column) ** 2) for row, column in seeds])
    nearest, second = np.partition(distances, 1, axis=0)[:2]
    turns = np.where(rng.random(panes) < 0.55, rng.normal(0, 0.03, panes), rng.random(panes))
    glass = np.array([c.shade(value, 1, turn) for value, turn in zip(rng.uniform(0.6, 1.2, panes), turns)])
    c.image.paste(c.stretched(glass[distances.argmin(0)]))
    c.lay(WHITE, c.field(rng.uniform(2, 6)) * 0.35)
    lead = rng.uniform(1.2, 4) * min(high, wide) / 130
    c.lay(BLACK, (lead - (second - nearest)) / 2 + 0.5)


def zebra(c: Canvas, rng: np.random.Generator) -> None:
    dark, pale = blend(BLACK, c.shade(0.4), rng.uniform(0, 0.8)), blend(WHITE, c.shade(1.1, 0.7), rng.uniform(0, 0.8))
    c.fill(pale)
    field = c.field(rng.uniform(0.8, 2), 3)
    turn, stripes = rng.uniform(0, math.pi), rng.uniform(6, 16)
    y, x = (axis / min(field.shape) for axis in np.ogrid[: field.shape[0], : field.shape[1]])
    wave = np.sin(2 * math.pi * stripes * (x * math.cos(turn) + y * math.sin(turn)) + field * rng.uniform(2, 7))
    c.lay(dark, (wave + rng.uniform(-0.35, 0.35) + 0.25 * c.field(20, 2)) * 3 + 0.5)
    c.lay(blend(dark, pale, 0.4), c.field(2) * 0.4 - 0.15)
