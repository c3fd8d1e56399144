"""Draws views of land, sea and sky, each from a random generator alone, no two alike."""

import math

import numpy as np

from imagefeed.preprocess.sample.canvas import BLACK, WHITE, Canvas, blend, hsv, rotate


def mountain(c: Canvas) -> None:
    rng = c.rng
    c.sky()
    if rng.random() < 0.5:
        x, y = c.place(0.1)
        c.disc(x, y * 0.4, c.unit * rng.uniform(0.03, 0.08), hsv(0.13, rng.uniform(0, 0.4), 1))
    haze = hsv(c.ink.hue, 0.15, rng.uniform(0.6, 0.9))
    middle = rng.uniform(0.45, 0.62)
    for at, far in enumerate((0.5, 0.2, 0)):
        ridge = c.outline(middle + 0.18 * at, (0.07, 0.06, 0.05)[at], rng.uniform(4, 9))
        summits = rng.integers(4, 12)
        zigzag = rng.uniform(0.3, 1, summits) * np.where(np.arange(summits) % 2, -1, 1) * (0.28, 0.15, 0.06)[at]
        steps = (np.arange(summits) + rng.uniform(-0.3, 0.3, summits)) / (summits - 1) * c.width
        ridge[:, 1] += np.interp(ridge[:, 0], steps, zigzag) * c.height
        c.ground(ridge, blend(c.shade(0.75 - 0.22 * at, 0.8), haze, far))
        if at < 2:
            below = ridge[:, 1] + (rng.uniform(0.03, 0.16) + rng.normal(0, 0.02, len(ridge))) * c.height
            low = np.maximum(ridge[:, 1], np.minimum(ridge[:, 1].min() + 0.25 * c.height, below))
            snow, lee = blend(WHITE, haze, far * 0.5), blend(WHITE, c.shade(0.6), 0.4)
            for left, right in zip(range(len(ridge) - 1), range(1, len(ridge))):
                slope = [ridge[left], ridge[right], (ridge[right, 0], low[right]), (ridge[left, 0], low[left])]
                c.polygon(slope, snow if ridge[left, 1] > ridge[right, 1] else lee)
    if rng.random() < 0.4:
        c.mirror(rng.uniform(0.82, 0.92), 1)


def skyline(c: Canvas) -> None:
    rng = c.rng
    glow = c.shade(rng.uniform(0.7, 1.5), rng.uniform(0.2, 0.9), rng.normal(0, 0.06))
    c.gradient(c.shade(rng.uniform(0.15, 1), rng.uniform(0.4, 1)), glow)
    for x, y in rng.random((rng.integers(0, 60), 2)):
        c.disc(x * c.width, y * c.height * 0.5, c.unit / 400, WHITE)
    if rng.random() < 0.5:
        x, y = c.place(0.15)
        c.disc(x, y * 0.4, c.unit * rng.uniform(0.03, 0.09), hsv(0.14, rng.uniform(0, 0.4), 0.98))
    horizon = c.height * rng.uniform(0.72, 0.98)
    lights = hsv(rng.uniform(0.08, 0.17), rng.uniform(0.1, 0.8), 1)
    for far in (0.5, 0):
        x = -rng.uniform(0, 0.1) * c.width
        tower = blend(hsv(c.ink.hue, rng.uniform(0.2, 0.6), rng.uniform(0.08, 0.5)), c.shade(0.6), far)
        while x < c.width:
            wide = c.unit * rng.uniform(0.07, 0.18)
            top = horizon - c.height * rng.uniform(0.12, 0.6 if far else 0.42)
            c.draw.rectangle((x, top, x + wide, c.height), fill=tower)
            if rng.random() < 0.3:
                c.polygon([(x, top), (x + wide, top), (x + wide / 2, top - wide * rng.uniform(0.3, 1.4))], tower)
            pane, lit = wide / rng.integers(4, 9), rng.uniform(0.2, 0.7)
            for row in range(int((horizon - top) / pane / 1.3)):
                for column in range(int(wide / pane)):
                    if rng.random() < lit:
                        left, high = x + (column + 0.25) * pane, top + (row + 0.4) * pane * 1.3
                        window = blend(tower, lights, rng.uniform(0.4, 1) * (1 - far * 0.6))
                        c.draw.rectangle((left, high, left + pane * 0.5, high + pane * 0.7), fill=window)
            x += wide * rng.uniform(1, 1.15)
    if horizon < c.height * 0.9:
        c.mirror(horizon / c.height, 0.6)


def sailboat(c: Canvas) -> None:
    rng = c.rng
    c.sky()
    horizon = c.height * rng.uniform(0.45, 0.75)
    hue = rng.choice([rng.uniform(0.45, 0.65), rng.random()], p=[0.8, 0.2])
    sea = hsv(hue, rng.uniform(0.2, 0.8), rng.uniform(0.4, 0.9))
    deep = hsv(hue, rng.uniform(0.5, 0.9), rng.uniform(0.1, 0.5))
    for share in np.linspace(0, 1, 24):
        top = horizon + (c.height - horizon) * share
        c.draw.rectangle((0, top, c.width, c.height), fill=blend(sea, deep, share))
        for x in rng.uniform(0, c.width, 6):
            wave = (x, top, x + c.unit * (0.01 + 0.08 * share), top + c.unit * (0.002 + 0.006 * share))
            c.draw.ellipse(wave, fill=blend(sea, WHITE, rng.uniform(0.1, 0.7)))
    hull, second = c.any_color((0.1, 0.9), (0.15, 0.9)), WHITE if rng.random() < 0.5 else c.shade(1.2, 0.5)
    for size in sorted(c.unit * rng.uniform(0.1, 0.34, rng.integers(1, 5))):
        near = (size / c.unit - 0.08) * rng.uniform(0.6, 2.4)
        x, y = rng.uniform(0.1, 0.9) * c.width, horizon + (c.height - horizon) * near
        flip, heel, belly = rng.choice([-1, 1]), rng.normal(0, 0.08), rng.uniform(0.05, 0.3)
        rise = np.linspace(0, 1, 12)
        bulge = np.sin(rise * math.pi) * belly
        main = np.stack([0.06 + 0.75 * (1 - rise) + bulge * 0.5, -0.25 - 1.7 * rise], 1)
        jib = np.stack([-0.02 - 0.8 * (1 - rise) - bulge * 0.4, -0.2 - 1.45 * rise], 1)
        shapes = (
            (np.array([(-0.02, 0.1), (0.03, 0.1), (0.03, -2.05), (-0.02, -2.05)]), BLACK),
            (np.concatenate([main, [(0.06, -0.25)]]), c.shade()),
            (np.concatenate([jib, [(-0.1, -0.2)]]), second),
            (np.array([(-0.95, -0.12), (1, -0.15), (0.72, 0.22), (-0.65, 0.22)]), hull),
        )
        for shape, color in shapes:
            c.polygon(rotate(shape * (flip, 1), heel) * size + (x, y), color)


def forest(c: Canvas) -> None:
    rng = c.rng
    c.sky()
    haze = hsv(c.ink.hue, 0.1, rng.uniform(0.55, 0.95))
    bark = hsv(rng.uniform(0.04, 0.1), 0.5, rng.uniform(0.15, 0.4))
    for far in (0.65, 0.35, 0):
        foot = rng.uniform(0.62, 0.78) + 0.25 * (1 - far)
        c.ground(c.outline(foot - 0.05, 0.04, 3), blend(c.shade(0.45, 0.7), haze, far))
        for x in np.sort(rng.uniform(-0.05, 1.05, rng.integers(6, 14))):
            high = c.unit * rng.uniform(0.35, 0.75) * (1.1 - far)
            tall = high * rng.uniform(0.22, 0.34)
            x, bottom = x * c.width, (foot + rng.normal(0, 0.02)) * c.height
            c.draw.rectangle((x - tall / 12, bottom - high * 0.2, x + tall / 12, bottom), fill=blend(bark, haze, far))
            needles = blend(c.shade(rng.uniform(0.4, 0.8)), haze, far)
            tiers = rng.integers(4, 8)
            for tier in range(tiers):
                low, half = bottom - high * (0.1 + 0.75 * tier / tiers), tall * (1 - 0.8 * tier / tiers)
                droop = [(x - half, low + half * 0.15), (x, low - half * 0.1), (x + half, low + half * 0.15)]
                tip = (x, low - high * 0.24)
                c.polygon([droop[0], droop[1], droop[2], tip], blend(needles, BLACK, 0.25))
                c.polygon([droop[0], droop[1], tip], needles)


def planet(c: Canvas) -> None:
    rng = c.rng
    c.draw.rectangle((0, 0, c.width, c.height), fill=hsv(rng.random(), 0.8, rng.uniform(0.02, 0.15)))
    for _ in range(2):
        c.lay(hsv(rng.random(), 0.8, rng.uniform(0.2, 0.8)), c.field(rng.uniform(1, 3)) * 0.5 - rng.uniform(0, 0.3))
    for x, y in rng.random((rng.integers(40, 220), 2)):
        c.disc(x * c.width, y * c.height, c.unit * abs(rng.normal(0, 0.0025)), blend(WHITE, c.any_color(), 0.3))
    for _ in range(rng.integers(0, 3)):
        c.ball(*c.place(0.05), c.unit * rng.uniform(0.015, 0.06), c.any_color())
    center, radius = c.place(0.3), c.unit * rng.uniform(0.14, 0.3)
    turn, squash = rng.uniform(-1, 1), rng.uniform(0.12, 0.4)
    rings = [(outer, c.shade(rng.uniform(0.5, 1.1), 0.5, rng.normal(0, 0.05))) for outer in np.arange(2.1, 1.35, -0.12)]

    def arc(start: float) -> None:
        """Half of the rings, as a row of thick lines."""
        angles = np.linspace(start, start + math.pi, 40)
        for outer, color in rings:
            half = np.stack([outer * np.cos(angles), outer * squash * np.sin(angles)], 1)
            c.line(rotate(half, turn) * radius + center, color, radius * 0.07)

    arc(math.pi)
    c.ball(*center, radius, c.shade(0.8))
    for at in np.linspace(-0.75, 0.75, rng.integers(3, 9)):
        half = math.sqrt(1 - at * at) * 0.97
        band = np.array([(-half, at), (0, at + squash * 0.25), (half, at)])
        color = c.shade(rng.uniform(0.5, 1.1), 0.8, rng.normal(0, 0.04))
        c.line(rotate(band, turn) * radius + center, color, radius * rng.uniform(0.03, 0.1))
    arc(0)
