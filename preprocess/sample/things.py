"""Kinds of pictures that show an object before a background. The random generator decides everything, so no two are alike."""

import math
from itertools import pairwise, product

import numpy as np

from imagefeed.preprocess.sample.canvas import BLACK, WHITE, Canvas, blend, box, hsv, polar, ring, rotate

SIDES = (-1, 1)


def balloon(c: Canvas, rng: np.random.Generator) -> None:
    if rng.random() < 0.6:
        c.ground(c.outline(rng.uniform(0.8, 0.97), 0.06, 3), c.color((0, 1), (0.2, 0.6), (0.2, 0.6)))
    y = np.linspace(-1, 1.35, 24)
    profile = np.where(y < 0, np.sqrt(1 - np.minimum(y, 0) ** 2), 0.2 + 0.8 * np.cos(y / 1.35 * math.pi / 2))
    second = WHITE if rng.random() < 0.4 else c.shade((0.5, 1.2), 1, (0.1, 0.9))
    for radius in sorted(c.unit * rng.uniform(0.09, 0.3, rng.integers(1, 4))):
        part = c.at(c.place(0.2), radius)
        edges = np.sin(np.linspace(-0.5, 0.5, rng.integers(6, 15) + 1) * math.pi)
        for at, (left, right) in enumerate(pairwise(edges)):
            gore = np.concatenate([np.stack([profile * left, y], 1), np.stack([profile * right, y], 1)[::-1]])
            lit = 0.62 + 0.38 * math.cos(1.3 * (left + right) / 2 + 0.5)
            part.polygon(gore, blend(BLACK, second if at % 2 else c.shade(), lit))
        for side in (-0.16, 0.16):
            part.line([(side, 1.35), (side * 0.8, 1.65)], BLACK, 1 / 40)
        part.polygon(box(-0.14, 1.63, 0.14, 1.85), c.color(0.08, 0.6, (0.3, 0.6)))


def butterfly(c: Canvas, rng: np.random.Generator) -> None:
    spots = c.color((0, 1), (0, 0.8), (0.7, 1))
    border = blend(BLACK, c.shade(0.4), rng.uniform(0, 0.5))
    for _ in range(rng.integers(1, 3)):
        center, size, turn = c.place(0.32), c.unit * rng.uniform(0.22, 0.45), rng.normal(0, 0.6)
        fold = rng.uniform(0.6, 1)
        halves = [c.at(center, size, turn, (side * fold, 1)) for side in SIDES]
        for x, y, rx, ry, tilt in ((0.46, 0.34, 0.4, 0.26, 0.8), (0.55, -0.32, 0.58, 0.31, -0.6)):
            for grow, color in ((1, border), (0.84, c.shade()), (0.5, c.shade(1.25, 0.7, 0.04))):
                for half in halves:
                    half.polygon(ring(x, y, rx * grow, ry * grow, tilt), color)
            spread = rotate(polar(np.linspace(-1, 1.2, 5), rx * 0.9, ry * 0.9), tilt) + np.array((x, y))
            for spot, half in product(spread, halves):
                half.disc(*spot, 0.035, spots)
        c.at(center, size, turn).polygon(ring(0, 0.02, 0.06, 0.42), BLACK)
        for side in SIDES:
            c.at(center, size, turn, (side, 1)).line([(0, -0.38), (0.12, -0.62), (0.26, -0.74)], BLACK, 1 / 45)


def clock(c: Canvas, rng: np.random.Generator) -> None:
    center, radius = c.place(0.38), c.unit * rng.uniform(0.22, 0.46)
    squash, tilt = rng.uniform(0.75, 1), rng.uniform(0, math.pi)
    dial = blend(WHITE, c.color(), rng.uniform(0, 0.35))
    if rng.random() < 0.3:
        dial = c.color((0, 1), (0, 0.8), (0.1, 0.3))
    hands = BLACK if sum(dial) > 380 else WHITE
    part = c.at(center, radius, tilt, (1, squash), rng.normal(0, 0.15) - tilt)
    for size, color in ((1.02, c.shade(0.55)), (0.98, c.shade()), (0.84, dial)):
        part.polygon(ring(0, 0, size, size), color)
    small = rng.choice([4, 12, 60])
    for at in range(60):
        long = 0.16 if at % 15 == 0 else 0.11 if at % 5 == 0 and small > 4 else 0.05 if small == 60 else 0
        wide = 0.03 if at % 5 == 0 else 0.01
        part.polygon(rotate(box(0.8 - long, -wide, 0.8, wide), at * math.pi / 30), hands)
    hour = rng.uniform(0, 12)
    for turns, long, wide in ((hour / 12, 0.45, 0.05), (hour % 1, 0.7, 0.032)):
        part.polygon(rotate([(-0.12, wide), (long, wide / 2), (long, -wide / 2), (-0.12, -wide)], turns * 2 * math.pi), hands)
    part.polygon(rotate(box(-0.2, -0.01, 0.74, 0.01), rng.uniform(0, 6)), c.shade(0.9, 1.2))
    part.polygon(ring(0, 0, 0.06, 0.06), c.shade(0.7))


def dartboard(c: Canvas, rng: np.random.Generator) -> None:
    center, radius, squash = c.place(0.38), c.unit * rng.uniform(0.22, 0.5), rng.uniform(0.6, 1)
    part = c.at(center, radius, rng.uniform(0, math.pi), (1, squash), rng.uniform(0, 2 * math.pi))
    pale, dark = blend(WHITE, c.color(), rng.uniform(0, 0.4)), blend(BLACK, c.color(), rng.uniform(0, 0.3))
    narrow, broad = (c.shade(), c.shade(0.9, 1, (0.25, 0.75))), (pale, dark)
    sectors = rng.choice([10, 12, 16, 20])
    part.polygon(ring(0, 0, 1, 1), blend(BLACK, dark, 0.5))
    for (outer, colors), at in product(((0.82, narrow), (0.75, broad), (0.5, narrow), (0.43, broad)), range(sectors)):
        rim = polar(np.linspace(at, at + 1, 5) * 2 * math.pi / sectors) * outer
        part.polygon(np.concatenate([[(0, 0)], rim]), colors[at % 2])
    part.polygon(ring(0, 0, 0.13, 0.13), narrow[1])
    part.polygon(ring(0, 0, 0.06, 0.06), narrow[0])
    for _ in range(rng.integers(0, 4)):
        tip = rng.normal(0, 0.3, 2)
        dart, end = c.at(center, radius), tip + rng.normal((0.25, -0.3), 0.2)
        dart.line([tip, end], hsv(0.1, 0.1, 0.7), 1 / 30)
        dart.line([tip * 0.35 + end * 0.65, end], c.color((0, 1), (0.7, 1), (0.7, 1)), 1 / 11)


def fish(c: Canvas, rng: np.random.Generator) -> None:
    water = rng.choice([rng.uniform(0.4, 0.65), rng.random()])
    c.gradient(c.color(water, (0.1, 0.8), (0.5, 1)), c.color(water, (0.2, 1), (0.15, 0.8)))
    c.lay(hsv(water, 0.2, 1), (c.field(3) - 0.2) * 0.35)
    for _ in range(rng.integers(0, 12)):
        x, high, rise = rng.uniform(0, c.width), c.unit * rng.uniform(0.1, 0.5), np.linspace(0, 1, 16)
        sway = np.sin(rise * rng.uniform(4, 9) + rng.uniform(0, 6)) * c.unit * 0.025
        weed = np.stack([x + sway, c.height - rise * high], 1)
        c.line(weed, c.color((0, 1), (0.4, 0.9), (0.15, 0.6)), c.unit * rng.uniform(0.01, 0.03))
    band = WHITE if rng.random() < 0.5 else c.shade(0.5, 1, (0.1, 0.6))
    bands, deep, count = rng.integers(0, 5), rng.uniform(0.28, 0.6), rng.integers(1, 7)
    for _ in range(count):
        center, size, turn = c.place(0.2), c.unit * rng.uniform(0.12, 0.36) / (1 + count / 8), rng.normal(0, 0.25)
        part = c.at(center, size, turn, (rng.choice(SIDES), 1))
        part.polygon([(-0.8, 0), (-1.45, -0.5), (-1.25, 0), (-1.45, 0.5)], c.shade(0.75))
        part.polygon([(-0.4, -deep * 0.8), (-0.1, -deep * 1.6), (0.4, -deep * 0.8)], c.shade(0.7))
        part.polygon([(-0.3, deep * 0.8), (-0.25, deep * 1.45), (0.2, deep * 0.8)], c.shade(0.7))
        part.polygon(ring(0, 0, 1, deep), c.shade(0.85))
        part.polygon(ring(0, deep * 0.2, 0.85, deep * 0.7), c.shade(1.15, 0.75))
        for x in np.linspace(-0.55, 0.45, bands):
            left, right = (deep * math.sqrt(1 - edge**2) for edge in (x - 0.07, x + 0.07))
            part.polygon([(x - 0.07, -left), (x + 0.07, -right), (x + 0.07, right), (x - 0.07, left)], band)
        part.polygon([(0.05, 0.02), (-0.3, 0.16), (-0.12, -0.14)], c.shade(0.6))
        for radius, color in ((0.11, WHITE), (0.06, BLACK)):
            part.polygon(ring(0.66, -deep * 0.25, radius, radius), color)
    for _ in range(rng.integers(0, 15)):
        x, y = c.place(0.02)
        c.draw.ellipse((x, y, x + c.unit / 40, y + c.unit / 40), outline=hsv(water, 0.1, 1), width=2)


def flower(c: Canvas, rng: np.random.Generator) -> None:
    petals, slim = rng.integers(6, 18), rng.uniform(0.6, 1.3)
    heart = c.color((0.06, 0.16), (0.6, 1), (0.3, 0.95))
    count = rng.choice([1, 2, 3, 5, 8])
    for radius in sorted(c.unit * rng.uniform(0.2, 0.42, count) / count**0.35):
        x, y = c.place(0.22)
        foot = (x + rng.normal(0, 0.1) * c.unit, c.height + radius)
        bend = ((x + foot[0]) / 2 + radius * 0.2, (y + foot[1]) / 2)
        c.line([(x, y), bend, foot], c.color((0.22, 0.36), 0.7, 0.4), radius / 10)
        squash, turn, tilt = rng.uniform(0.6, 1), rng.uniform(0, 6), rng.uniform(0, 3)
        part = c.at((x, y), radius, tilt, (1, squash))
        for layer, petal in product((1, 0.78), range(petals)):
            angle = (petal + (layer < 1) / 2) * 2 * math.pi / petals + turn
            color = c.shade(rng.normal(1.05 if layer < 1 else 0.85, 0.05), rng.uniform(0.8, 1))
            part.polygon(rotate(ring(0.62 * layer, 0, 0.4 * layer, slim * 1.5 / petals, 0, 20), angle), color)
        part.polygon(ring(0, 0, 0.28, 0.28), heart)
        for spot in rng.normal(0, 0.1, (30, 2)):
            c.at((x, y), radius).disc(*spot, 0.022, blend(heart, BLACK, rng.uniform(0.1, 0.6)))


def mushroom(c: Canvas, rng: np.random.Generator) -> None:
    moss = c.color((0.08, 0.35), (0.3, 0.8), (0.15, 0.5))
    c.ground(c.outline(rng.uniform(0.75, 0.9), 0.04, 4), moss)
    stem = c.color((0.07, 0.16), (0.05, 0.3), (0.75, 0.98))
    high, flat, dots = rng.uniform(0.8, 1.8), rng.uniform(0.55, 1), rng.integers(6, 16)
    count = rng.choice([1, 2, 3, 5])
    for size in sorted(c.unit * rng.uniform(0.12, 0.3, count) / count**0.3):
        foot = rng.uniform(0.12, 0.88) * c.width, rng.uniform(0.82, 0.97) * c.height
        part = c.at(foot, size, rng.normal(0, 0.12))
        part.polygon([(-0.3, 0.05), (-0.2, -high), (0.2, -high), (0.3, 0.05)], stem)
        part.polygon([(0.08, 0.05), (0.05, -high), (0.2, -high), (0.3, 0.05)], blend(stem, BLACK, 0.25))
        part.polygon(ring(0, -high, 0.97, 0.2), blend(stem, c.shade(0.5), 0.4))
        upper = np.linspace(0, math.pi, 40)
        for grow, value in ((1, 0.8), (0.88, 1), (0.6, 1.08)):
            part.polygon(np.stack([np.cos(upper) * grow, -high - np.sin(upper) ** 0.8 * flat * grow + 0.02], 1), c.shade(value))
        for angle, out in zip(rng.uniform(0.2, math.pi - 0.2, dots), rng.uniform(0.2, 0.9, dots)):
            spot = (math.cos(angle) * out, -high - math.sin(angle) * out * flat * 0.9)
            part.polygon(ring(*spot, *[rng.uniform(0.05, 0.13)] * 2), WHITE)
    for x in rng.uniform(0, c.width, rng.integers(0, 90)):
        bottom, blade = c.height * rng.uniform(0.9, 1.02), c.unit * rng.uniform(0.04, 0.14)
        grass = [(x, bottom), (x + rng.normal(0, 0.3) * blade, bottom - blade)]
        c.line(grass, blend(moss, WHITE, rng.uniform(0, 0.4)), c.unit / 150)


def sailboat(c: Canvas, rng: np.random.Generator) -> None:
    horizon = c.height * rng.uniform(0.45, 0.75)
    hue = rng.choice([rng.uniform(0.45, 0.65), rng.random()], p=[0.8, 0.2])
    sea, deep = c.color(hue, (0.2, 0.8), (0.4, 0.9)), c.color(hue, (0.5, 0.9), (0.1, 0.5))
    for share in np.linspace(0, 1, 24):
        top = horizon + (c.height - horizon) * share
        c.polygon(box(0, top, c.width, c.height), blend(sea, deep, share))
        for x in rng.uniform(0, c.width, 6):
            wave = (x, top, x + c.unit * (0.01 + 0.08 * share), top + c.unit * (0.002 + 0.006 * share))
            c.draw.ellipse(wave, fill=blend(sea, WHITE, rng.uniform(0.1, 0.7)))
    hull, second = c.color((0, 1), (0.1, 0.9), (0.15, 0.9)), WHITE if rng.random() < 0.5 else c.shade(1.2, 0.5)
    for size in sorted(c.unit * rng.uniform(0.1, 0.34, rng.integers(1, 5))):
        near = (size / c.unit - 0.08) * rng.uniform(0.6, 2.4)
        foot = rng.uniform(0.1, 0.9) * c.width, horizon + (c.height - horizon) * near
        flip, heel, belly = rng.choice(SIDES), rng.normal(0, 0.08), rng.uniform(0.05, 0.3)
        part = c.at(foot, size, heel, (flip, 1))
        rise = np.linspace(0, 1, 12)
        bulge = np.sin(rise * math.pi) * belly
        main = np.stack([0.06 + 0.75 * (1 - rise) + bulge * 0.5, -0.25 - 1.7 * rise], 1)
        jib = np.stack([-0.02 - 0.8 * (1 - rise) - bulge * 0.4, -0.2 - 1.45 * rise], 1)
        part.polygon([(-0.02, 0.1), (0.03, 0.1), (0.03, -2.05), (-0.02, -2.05)], BLACK)
        part.polygon(np.concatenate([main, [(0.06, -0.25)]]), c.shade())
        part.polygon(np.concatenate([jib, [(-0.1, -0.2)]]), second)
        part.polygon([(-0.95, -0.12), (1, -0.15), (0.72, 0.22), (-0.65, 0.22)], hull)
