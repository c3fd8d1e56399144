"""Draws things before a background, each from a random generator alone, no two alike."""

import math
from itertools import pairwise

import numpy as np

from imagefeed.preprocess.sample.canvas import BLACK, WHITE, Canvas, Color, blend, hsv, ring, rotate


def balloon(c: Canvas) -> None:
    rng = c.rng
    c.sky()
    if rng.random() < 0.6:
        c.ground(c.outline(rng.uniform(0.8, 0.97), 0.06, 3), c.any_color((0.2, 0.6), (0.2, 0.6)))
    heights = np.linspace(-1, 1.35, 24)
    profile = np.where(heights < 0, np.sqrt(1 - np.minimum(heights, 0) ** 2), 0.2 + 0.8 * np.cos(heights / 1.35 * math.pi / 2))
    second = WHITE if rng.random() < 0.4 else c.shade(rng.uniform(0.5, 1.2), 1, rng.uniform(0.1, 0.9))
    for radius in sorted(c.unit * rng.uniform(0.09, 0.3, rng.integers(1, 4))):
        x, y = c.place(0.2)
        gores = rng.integers(6, 15)
        edges = np.sin(np.linspace(-0.5, 0.5, gores + 1) * math.pi)
        for at, (left, right) in enumerate(pairwise(edges)):
            sides = [np.stack([x + radius * profile * edge, y + radius * heights], 1) for edge in (left, right)]
            lit = 0.62 + 0.38 * math.cos(1.3 * (left + right) / 2 + 0.5)
            c.polygon(np.concatenate([sides[0], sides[1][::-1]]), blend(BLACK, second if at % 2 else c.shade(), lit))
        for side in (-0.16, 0.16):
            rope = np.array([(side, 1.35), (side * 0.8, 1.65)]) * radius + (x, y)
            c.line(rope, BLACK, radius / 40)
        basket = (x - 0.14 * radius, y + 1.63 * radius, x + 0.14 * radius, y + 1.85 * radius)
        c.draw.rectangle(basket, fill=hsv(0.08, 0.6, rng.uniform(0.3, 0.6)))


def butterfly(c: Canvas) -> None:
    rng = c.rng
    c.meadow()
    spots = hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.7, 1))
    border = blend(BLACK, c.shade(0.4), rng.uniform(0, 0.5))
    for _ in range(rng.integers(1, 3)):
        center, size, turn = c.place(0.32), c.unit * rng.uniform(0.22, 0.45), rng.normal(0, 0.6)
        fold = rng.uniform(0.6, 1)
        for x, y, rx, ry, tilt in ((0.46, 0.34, 0.4, 0.26, 0.8), (0.55, -0.32, 0.58, 0.31, -0.6)):
            for grow, color in ((1, border), (0.84, c.shade()), (0.5, c.shade(1.25, 0.7, 0.04))):
                for side in (-1, 1):
                    wing = ring(x, y, rx * grow, ry * grow, tilt) * (side * fold, 1)
                    c.polygon(rotate(wing, turn) * size + center, color)
            for angle in np.linspace(-1, 1.2, 5):
                for side in (-1, 1):
                    spot = rotate([(rx * 0.9 * math.cos(angle), ry * 0.9 * math.sin(angle))], tilt)
                    at = rotate((spot + np.array((x, y))) * (side * fold, 1), turn)[0] * size + center
                    c.disc(*at, size * 0.035, spots)
        c.polygon(rotate(ring(0, 0.02, 0.06, 0.42), turn) * size + center, BLACK)
        for side in (-1, 1):
            feeler = rotate([(0, -0.38), (side * 0.12, -0.62), (side * 0.26, -0.74)], turn)
            c.line(feeler * size + center, BLACK, size / 45)


def fish(c: Canvas) -> None:
    rng = c.rng
    water = rng.choice([rng.uniform(0.4, 0.65), rng.random()])
    surface = hsv(water, rng.uniform(0.1, 0.8), rng.uniform(0.5, 1))
    c.gradient(surface, hsv(water, rng.uniform(0.2, 1), rng.uniform(0.15, 0.8)))
    c.lay(hsv(water, 0.2, 1), (c.field(3) - 0.2) * 0.35)
    for _ in range(rng.integers(0, 12)):
        x, high = rng.uniform(0, c.width), c.unit * rng.uniform(0.1, 0.5)
        rise = np.linspace(0, 1, 16)
        sway = np.sin(rise * rng.uniform(4, 9) + rng.uniform(0, 6)) * c.unit * 0.025
        weed = np.stack([x + sway, c.height - rise * high], 1)
        c.line(weed, c.any_color((0.4, 0.9), (0.15, 0.6)), c.unit * rng.uniform(0.01, 0.03))
    band = WHITE if rng.random() < 0.5 else c.shade(0.5, 1, rng.uniform(0.1, 0.6))
    bands, deep = rng.integers(0, 5), rng.uniform(0.28, 0.6)
    count = rng.integers(1, 7)
    for _ in range(count):
        center, size, turn = c.place(0.2), c.unit * rng.uniform(0.12, 0.36) / (1 + count / 8), rng.normal(0, 0.25)
        part = c.stamp(center, size, turn, rng.choice([-1, 1]))
        part([(-0.8, 0), (-1.45, -0.5), (-1.25, 0), (-1.45, 0.5)], c.shade(0.75))
        part([(-0.4, -deep * 0.8), (-0.1, -deep * 1.6), (0.4, -deep * 0.8)], c.shade(0.7))
        part([(-0.3, deep * 0.8), (-0.25, deep * 1.45), (0.2, deep * 0.8)], c.shade(0.7))
        part(ring(0, 0, 1, deep), c.shade(0.85))
        part(ring(0, deep * 0.2, 0.85, deep * 0.7), c.shade(1.15, 0.75))
        for x in np.linspace(-0.55, 0.45, bands):
            edge = np.array([x - 0.07, x + 0.07])
            half = deep * np.sqrt(1 - edge**2)
            part([(edge[0], -half[0]), (edge[1], -half[1]), (edge[1], half[1]), (edge[0], half[0])], band)
        part([(0.05, 0.02), (-0.3, 0.16), (-0.12, -0.14)], c.shade(0.6))
        for radius, color in ((0.11, WHITE), (0.06, BLACK)):
            part(ring(0.66, -deep * 0.25, radius, radius), color)
    for _ in range(rng.integers(0, 15)):
        x, y = c.place(0.02)
        c.draw.ellipse((x, y, x + c.unit / 40, y + c.unit / 40), outline=hsv(water, 0.1, 1), width=2)


def flower(c: Canvas) -> None:
    rng = c.rng
    c.meadow()
    petals, slim = rng.integers(6, 18), rng.uniform(0.6, 1.3)
    heart = hsv(rng.uniform(0.06, 0.16), rng.uniform(0.6, 1), rng.uniform(0.3, 0.95))
    count = rng.choice([1, 2, 3, 5, 8])
    for radius in sorted(c.unit * rng.uniform(0.2, 0.42, count) / count**0.35):
        x, y = c.place(0.22)
        foot = (x + rng.normal(0, 0.1) * c.unit, c.height + radius)
        stem = [(x, y), ((x + foot[0]) / 2 + radius * 0.2, (y + foot[1]) / 2), foot]
        c.line(stem, hsv(rng.uniform(0.22, 0.36), 0.7, 0.4), radius / 10)
        squash, turn, tilt = rng.uniform(0.6, 1), rng.uniform(0, 6), rng.uniform(0, 3)
        for layer in (1, 0.78):
            for angle in np.arange(petals) * 2 * math.pi / petals + turn + (layer < 1) * math.pi / petals:
                petal = rotate(ring(0.62 * layer, 0, 0.4 * layer, slim * 1.5 / petals, 0, 20), angle)
                color = c.shade(rng.normal(1.05 if layer < 1 else 0.85, 0.05), rng.uniform(0.8, 1))
                c.polygon(rotate(petal * (1, squash), tilt) * radius + (x, y), color)
        c.polygon(rotate(ring(0, 0, 0.28, 0.28) * (1, squash), tilt) * radius + (x, y), heart)
        for spot in rng.normal(0, 0.1, (30, 2)):
            c.disc(*(spot * radius + (x, y)), radius * 0.022, blend(heart, BLACK, rng.uniform(0.1, 0.6)))


def mushroom(c: Canvas) -> None:
    rng = c.rng
    c.meadow()
    moss = hsv(rng.uniform(0.08, 0.35), rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.5))
    c.ground(c.outline(rng.uniform(0.75, 0.9), 0.04, 4), moss)
    stem = hsv(rng.uniform(0.07, 0.16), rng.uniform(0.05, 0.3), rng.uniform(0.75, 0.98))
    high, flat, dots = rng.uniform(0.8, 1.8), rng.uniform(0.55, 1), rng.integers(6, 16)
    count = rng.choice([1, 2, 3, 5])
    for size in sorted(c.unit * rng.uniform(0.12, 0.3, count) / count**0.3):
        foot = rng.uniform(0.12, 0.88) * c.width, rng.uniform(0.82, 0.97) * c.height
        part = c.stamp(foot, size, rng.normal(0, 0.12))
        part([(-0.3, 0.05), (-0.2, -high), (0.2, -high), (0.3, 0.05)], stem)
        part([(0.08, 0.05), (0.05, -high), (0.2, -high), (0.3, 0.05)], blend(stem, BLACK, 0.25))
        part(ring(0, -high, 0.97, 0.2), blend(stem, c.shade(0.5), 0.4))
        upper = np.linspace(0, math.pi, 40)
        for grow, value in ((1, 0.8), (0.88, 1), (0.6, 1.08)):
            part(np.stack([np.cos(upper) * grow, -high - np.sin(upper) ** 0.8 * flat * grow + 0.02], 1), c.shade(value))
        for angle, out in zip(rng.uniform(0.2, math.pi - 0.2, dots), rng.uniform(0.2, 0.9, dots)):
            spot = (math.cos(angle) * out, -high - math.sin(angle) * out * flat * 0.9)
            part(ring(*spot, *[rng.uniform(0.05, 0.13)] * 2), WHITE)
    for x in rng.uniform(0, c.width, rng.integers(0, 90)):
        bottom, blade = c.height * rng.uniform(0.9, 1.02), c.unit * rng.uniform(0.04, 0.14)
        grass = [(x, bottom), (x + rng.normal(0, 0.3) * blade, bottom - blade)]
        c.line(grass, blend(moss, WHITE, rng.uniform(0, 0.4)), c.unit / 150)


def clock(c: Canvas) -> None:
    rng = c.rng
    c.surroundings()
    x, y = c.place(0.38)
    radius, squash, tilt = c.unit * rng.uniform(0.22, 0.46), rng.uniform(0.75, 1), rng.uniform(0, math.pi)
    dial = blend(WHITE, c.any_color(), rng.uniform(0, 0.35))
    if rng.random() < 0.3:
        dial = c.any_color((0, 0.8), (0.1, 0.3))
    hands = BLACK if sum(dial) > 380 else WHITE
    roll = rng.normal(0, 0.15)

    def put(points: np.ndarray, color: Color) -> None:
        c.polygon(rotate(rotate(np.asarray(points, float), roll - tilt) * (1, squash), tilt) * radius + (x, y), color)

    put(ring(0, 0, 1.02, 1.02), c.shade(0.55))
    put(ring(0, 0, 0.98, 0.98), c.shade())
    put(ring(0, 0, 0.84, 0.84), dial)
    small = rng.choice([4, 12, 60])
    for at in range(60):
        long = 0.16 if at % 15 == 0 else 0.11 if at % 5 == 0 and small > 4 else 0.05 if small == 60 else 0
        wide = 0.03 if at % 5 == 0 else 0.01
        tick = np.array([(0.8, wide), (0.8 - long, wide), (0.8 - long, -wide), (0.8, -wide)])
        put(rotate(tick, at * math.pi / 30), hands)
    hour = rng.uniform(0, 12)
    for turns, long, wide in ((hour / 12, 0.45, 0.05), (hour % 1, 0.7, 0.032)):
        put(rotate([(-0.12, wide), (long, wide / 2), (long, -wide / 2), (-0.12, -wide)], turns * 2 * math.pi), hands)
    put(rotate([(-0.2, 0.01), (0.74, 0.01), (0.74, -0.01), (-0.2, -0.01)], rng.uniform(0, 6)), c.shade(0.9, 1.2))
    put(ring(0, 0, 0.06, 0.06), c.shade(0.7))


def dartboard(c: Canvas) -> None:
    rng = c.rng
    c.surroundings()
    x, y = c.place(0.38)
    radius, squash = c.unit * rng.uniform(0.22, 0.5), rng.uniform(0.6, 1)
    tilt, roll = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    pale, dark = blend(WHITE, c.any_color(), rng.uniform(0, 0.4)), blend(BLACK, c.any_color(), rng.uniform(0, 0.3))
    second = c.shade(0.9, 1, rng.uniform(0.25, 0.75))
    sectors = rng.choice([10, 12, 16, 20])

    def seen(points: np.ndarray) -> np.ndarray:
        return rotate(rotate(points, roll) * (1, squash), tilt) * radius + (x, y)

    c.polygon(seen(ring(0, 0, 1, 1)), blend(BLACK, dark, 0.5))
    narrow, broad = (c.shade(), second), (pale, dark)
    for outer, colors in ((0.82, narrow), (0.75, broad), (0.5, narrow), (0.43, broad)):
        for at in range(sectors):
            angles = np.linspace(at, at + 1, 5) * 2 * math.pi / sectors
            rim = np.stack([np.cos(angles), np.sin(angles)], 1) * outer
            c.polygon(seen(np.concatenate([[(0, 0)], rim])), colors[at % 2])
    c.polygon(seen(ring(0, 0, 0.13, 0.13)), second)
    c.polygon(seen(ring(0, 0, 0.06, 0.06)), c.shade())
    for _ in range(rng.integers(0, 4)):
        tip, flight = rng.normal(0, 0.3, 2), rng.normal((0.25, -0.3), 0.2)
        start, end = tip * radius + (x, y), (tip + flight) * radius + (x, y)
        c.line([start, end], hsv(0.1, 0.1, 0.7), radius / 30)
        c.line([start * 0.35 + end * 0.65, end], c.any_color((0.7, 1), (0.7, 1)), radius / 11)
