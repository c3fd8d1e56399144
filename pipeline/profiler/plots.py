"""Scales and the timeline of the steps; page.html.j2 draws them as SVG, across in per cent and down in pixels, so that a plot
fills phone and screen and its text keeps its size."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagefeed.pipeline.profiler.causes import stalled
from imagefeed.pipeline.profiler.figures import duration, percent
from imagefeed.pipeline.profiler.findings import STAGES, Profile, Step

PHASES = {"wait": "data wait"} | {name: label.lower() for name, (side, label) in STAGES.items() if side == "training"}
PHASES["other"] = "other phases"
LOGARITHMIC = 12  # from this ratio of the largest to the smallest bar on
COLUMNS = 240  # of a timeline: about one a pixel on a phone
TIMELINE, ABOVE = 220, 12  # pixels of its plot, and of the marks above it
SLICED = 10_000  # units down in its plot
CUT = 5  # times the median: what is higher is cut off
LISTED = 12  # slowest steps in the table


@dataclass(frozen=True)
class Scale:
    """From values to shares of a plot's width, linear from 0 or logarithmic between powers of ten."""

    low: float
    high: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        place = value / self.high
        if self.logarithmic:
            place = math.log10(max(value, self.low) / self.low) / math.log10(self.high / self.low)
        return min(max(place, 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            return [10.0**n for n in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = tick_step(self.high / 5)
        return [n * step for n in range(int(self.high / step + 1e-9) + 1)]


def fit(values: Sequence[float], logarithmic: bool | None = None) -> Scale:
    """A scale that holds all of `values`; None: logarithmic if they differ by more than LOGARITHMIC times."""
    values = [value for value in values if value > 0] or [1.0]
    if logarithmic is None:
        logarithmic = max(values) > LOGARITHMIC * min(values)
    if not logarithmic:
        return Scale(0.0, 1.04 * max(values), False)
    low = math.floor(math.log10(min(values) / 3))
    return Scale(10.0**low, 10.0 ** max(math.ceil(math.log10(max(values) * 1.05)), low + 1), True)


def tick_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 ... (or 0.5 ...) that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def points(values: Sequence[float]) -> str:
    """Points of a line 24 pixels high, from 0 to the highest value; "" if there is nothing to draw."""
    most = max(values) if len(values) > 1 else 0.0
    return " ".join(f"{n},{22 - 20 * max(value, 0.0) / most:.1f}" for n, value in enumerate(values)) if most > 0 else ""


Parts = dict[str, float]  # seconds of a step, by PHASES


def parts_of(step: Step) -> Parts:
    """In the order of PHASES; phases of other names count as "other"."""
    found = dict.fromkeys(PHASES, 0.0) | {"wait": step.wait_s}
    for name, seconds in step.phases.items():
        found[name if name in PHASES else "other"] += seconds
    return {kind: seconds for kind, seconds in found.items() if seconds > 0}


def listed(parts: Parts) -> str:
    return ", ".join(f"{PHASES[kind]} {duration(seconds)}" for kind, seconds in parts.items())


def draw_steps(profile: Profile) -> dict[str, object]:
    """The mean step, the LISTED slowest as (number, seconds, parts), and the timeline."""
    parts = [parts_of(step) for step in profile.steps]
    totals = [step.seconds for step in profile.steps]
    kinds = [kind for kind in PHASES if any(kind in each for each in parts)]
    mean = {kind: statistics.fmean(each.get(kind, 0.0) for each in parts) for kind in kinds}
    slowest = sorted(zip(itertools.count(), totals, parts), key=lambda step: -step[1])[:LISTED]
    return {"mean": mean, "slowest": slowest, "timeline": draw_timeline(profile, parts, totals)}


def draw_timeline(profile: Profile, parts: list[Parts], totals: list[float]) -> dict[str, object]:
    """Columns, each for some neighboring steps: the parts of the median one, and above them, pale, the slowest one.

    `paths` are SVG paths by kind, in `box`; `marks` the places across of stalled steps, `shaded_from` that where a late stall
    begins; `lines` (label, pixels from above).
    """
    count, usual_s, slowest_s = len(totals), statistics.median(totals), max(totals)
    most_s = min(slowest_s, CUT * usual_s) * 1.05
    slow = stalled(np.array(totals)).tolist()
    width = min(count, COLUMNS)
    columns, marks = [], []
    paths: dict[str, str] = {}
    for n, (begin, end) in enumerate(itertools.pairwise(k * count // width for k in range(width + 1))):
        ranked = sorted(range(begin, end), key=totals.__getitem__)
        middle, last = ranked[(len(ranked) - 1) // 2], ranked[-1]
        title = f"step {middle:,}: {duration(totals[middle])} ({listed(parts[middle])})"
        if last != middle:
            title += f"; slowest of {end - begin}, step {last:,}: {duration(totals[last])} ({listed(parts[last])})"
        columns.append(title)
        if any(slow[begin:end]):
            marks.append((n + 0.5) / width)
        below = 0.0
        for kind, seconds in (*parts[middle].items(), ("slowest", totals[last] - totals[middle])):
            bottom, top = (round(SLICED * (1 - min(edge / most_s, 1))) for edge in (below, below + seconds))
            if bottom > top:
                paths[kind] = paths.get(kind, "") + f"M{n} {bottom}h1V{top}h-1z"
            below += seconds
    notes = [f"Marks on top: {sum(slow):,} stalled steps, far slower than the median of {duration(usual_s)}."] if marks else []
    if count > COLUMNS:
        notes.append(f"Each column is the median of about {count / COLUMNS:.0f} steps, with the slowest of them pale above it.")
    if slowest_s > most_s:
        notes.append(f"Cut off at {duration(most_s)}; the slowest took {duration(slowest_s)}.")
    shaded_from = None
    for stall in profile.stalls:
        where = PHASES.get(stall.stage, stall.stage)
        longer = f"{duration(stall.seconds)} longer ({where}), {percent(stall.share)} of the time."
        if stall.kind == "late":
            shaded_from = min(stall.first_step * width // count, width - 1) / width
            notes.append(f"Shaded: from step {stall.first_step:,} on, a step is {longer}")
        else:
            notes.append(f"Every {stall.period:.0f} steps, one is {longer}")
    tick_s = tick_step(most_s / 4)
    ticks = [n * tick_s for n in range(int(most_s / tick_s) + 1)]
    lines = [(duration(seconds), round(ABOVE + TIMELINE * (1 - seconds / most_s), 1)) for seconds in ticks]
    return {
        "title": f"{count:,} steps, median {duration(usual_s)}, slowest {duration(slowest_s)}",
        "notes": notes,
        "columns": columns,
        "box": f"0 0 {width} {SLICED}",
        "paths": paths,
        "marks": marks,
        "lines": lines,
        "shaded_from": shaded_from,
    }
