"""Plots as inline SVG, across in per cent and down in pixels: they fill phone and screen, and their text keeps its size."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from imagefeed.pipeline.profiler.findings import Samples
from imagefeed.pipeline.profiler.html_markup import Markup, duration, join, short, tag

BAR = 18  # pixels
TIMELINE = 220
SLICED = 10_000  # units down in a timeline's plot
# From which ratio of largest to smallest bars are on a logarithmic scale.
LOGARITHMIC = 12


@dataclass(frozen=True)
class Scale:
    """From values to shares of a plot's width, linear from 0 or logarithmic between powers of ten."""

    low: float
    high: float
    logarithmic: bool

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            place = (math.log10(max(value, self.low)) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        else:
            place = value / self.high
        return min(max(place, 0.0), 1.0)

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**n for n in decades]
        step = tick_step(self.high / 5)
        return [n * step for n in range(int(self.high / step + 1e-9) + 1)]


def fit(values: Sequence[float], logarithmic: bool | None = None) -> Scale:
    """A scale that holds all of `values`; None: logarithmic where they differ by more than LOGARITHMIC times."""
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


def across(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def drawing(height: int, title: str, *shapes: Markup, description: str = "") -> Markup:
    texts = [tag("title", title)] + ([tag("desc", description)] if description else [])
    return tag("svg", *texts, *shapes, role="img", width="100%", height=height)


def upright(share: float, top: float, bottom: float, kind: str) -> Markup:
    place = across(share)
    return tag("line", x1=place, x2=place, y1=top, y2=bottom, class_=kind)


def flat(begin: float, end: float, y: float, height: float, kind: str, title: str = "") -> Markup:
    inside = [tag("title", title)] if title else []
    return tag("rect", *inside, x=across(begin), y=y, width=across(max(end - begin, 0.0)), height=height, class_=kind)


def span(low: float, high: float, y: float) -> list[Markup]:
    """A line from lowest to highest, on a pale ground so that it is seen on a dark bar too."""
    x = {"x1": across(low), "x2": across(high), "y1": y, "y2": y}
    ends = [upright(end, y - 4 - more, y + 4 + more, kind) for kind, more in (("halo", 2), ("spread", 0)) for end in (low, high)]
    return [tag("line", **x, class_="halo"), *ends, tag("line", **x, class_="spread")]


def axis(scale: Scale, unit: str = "") -> Markup:
    """The row of numbers below bars; it says nothing that the bars' titles and the table do not."""
    shapes = []
    for tick in scale.ticks:
        place = scale(tick)
        anchor = "start" if place < 0.04 else "end" if place > 0.96 else "middle"
        shapes.append(tag("text", short(tick), x=across(place), y=12, text_anchor=anchor))
    if unit:
        shapes.append(tag("text", unit, x="100%", y=28, text_anchor="end"))
    return tag("svg", *shapes, width="100%", height=32 if unit else 16, class_="axis", aria_hidden="true")


def bar(
    scale: Scale, samples: Samples, kind: str, title: str, limit: float | None = None, reference: float | None = None
) -> Markup:
    """The median as a bar, lowest to highest window as a line over it, the limit as a mark, a reference as a dashed line."""
    height, middle = BAR + 8, (BAR + 8) / 2
    shapes = [upright(scale(tick), 0, height, "grid") for tick in scale.ticks]
    shapes.append(flat(0, scale(samples.median), 4, BAR, f"bar {kind}"))
    if reference is not None:
        shapes += [upright(scale(reference), 0, height, kind) for kind in ("halo", "reference")]
    shapes += span(scale(samples.low), scale(samples.high), middle)
    if limit is not None:
        shapes += [upright(scale(limit), 0, height, "halo"), upright(scale(limit), 1, height - 1, "limit")]
    return drawing(height, title, *shapes)


def nothing(scale: Scale, title: str) -> Markup:
    """In place of a bar that was not measured."""
    return drawing(BAR + 8, title, *(upright(scale(tick), 0, BAR + 8, "grid") for tick in scale.ticks))


def meter(share: float, kind: str, title: str) -> Markup:
    return drawing(8, title, flat(0, 1, 0, 8, "track"), flat(0, min(max(share, 0.0), 1.0), 0, 8, kind))


def gain(before: float, after: float, most: float, title: str) -> Markup:
    """What there is, and what comes on top, of `most`."""
    shapes = [flat(0, before / most, 0, 14, "before")]
    shapes.append(flat(before / most, after / most, 0, 14, "gained") if after > before else upright(after / most, 0, 14, "limit"))
    return drawing(14, title, flat(0, 1, 0, 14, "track"), *shapes)


def gauge(share: float, low: float, high: float, bounds: Sequence[float], title: str) -> Markup:
    """A share of time on its bands; on a scale of square roots, as the lower bands are narrow."""
    places = [0.0, *(math.sqrt(bound) for bound in bounds), 1.0]
    shapes = [flat(begin, end, 14, 12, f"band{n}") for n, (begin, end) in enumerate(itertools.pairwise(places))]
    shapes += span(math.sqrt(low), math.sqrt(high), 20)
    shapes += [upright(math.sqrt(share), 8, 32, kind) for kind in ("halo", "limit")]
    for value, place, anchor in zip((0, *bounds, 1), places, ("start", *["middle"] * len(bounds), "end"), strict=True):
        shapes.append(tag("text", f"{100 * value:.0f}\N{NO-BREAK SPACE}%", x=across(place), y=44, text_anchor=anchor))
    return drawing(48, title, *shapes)


def stack(parts: Sequence[tuple[str, float]], whole: float, title: str, height: int = 28) -> Markup:
    """(kind, seconds) side by side, of `whole` seconds."""
    shapes, begin = [], 0.0
    for kind, seconds in parts:
        shapes.append(flat(begin / whole, (begin + seconds) / whole, 0, height, f"piece {kind}"))
        begin += seconds
    return drawing(height, title, *shapes)


def sparkline(values: Sequence[float], title: str) -> Markup:
    """A series of samples, from 0 to its highest."""
    most = max(*values, 0.0) if len(values) > 1 else 0.0
    if most <= 0:
        return drawing(24, title, tag("line", x1=0, x2="100%", y1=22, y2=22, class_="grid"))
    points = " ".join(f"{n},{22 - 20 * max(value, 0.0) / most:.1f}" for n, value in enumerate(values))
    line = tag("polyline", points=points, class_="spark")
    # 24 pixels high; across it is stretched, which the line's width does not follow (vector-effect).
    box = {"viewBox": f"0 0 {len(values) - 1} 24", "preserveAspectRatio": "none"}
    return tag("svg", tag("title", title), line, role="img", width="100%", height=24, **box)


@dataclass(frozen=True)
class Column:
    """A step that stands for itself and its neighbors: (kind, seconds) from below, seconds of the slowest of them."""

    parts: Sequence[tuple[str, float]]
    slowest_s: float
    title: str
    marked: bool


def timeline(columns: Sequence[Column], most_s: float, title: str, description: str, from_column: int | None) -> Markup:
    """Columns of stacked parts, `most_s` high; what is higher is cut off. From `from_column` on it is shaded."""
    paths: dict[str, list[str]] = {}
    hovered = []
    for n, column in enumerate(columns):
        below = 0.0
        for kind, seconds in (*column.parts, ("slowest", max(column.slowest_s - sum(s for _, s in column.parts), 0.0))):
            bottom, top = (round(SLICED * (1 - min(edge / most_s, 1))) for edge in (below, below + seconds))
            if bottom > top:
                paths.setdefault(kind, []).append(f"M{n} {bottom}h1V{top}h-1z")
            below += seconds
        hovered.append(tag("rect", tag("title", column.title), x=n, y=0, width=1, height=SLICED))
    shapes = [tag("path", d="".join(path), class_=kind) for kind, path in paths.items()]
    box = {"viewBox": f"0 0 {len(columns)} {SLICED}", "preserveAspectRatio": "none"}
    plot = tag("svg", *shapes, tag("g", *hovered, class_="hovered"), x=0, y=12, width="100%", height=TIMELINE, **box)
    step_s = tick_step(most_s / 4)
    lines = [tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid") for _, y in heights(most_s, step_s)]
    rug = [upright((n + 0.5) / len(columns), 0, 9, "stalled") for n, column in enumerate(columns) if column.marked]
    shade = [] if from_column is None else [flat(from_column / len(columns), 1, 0, TIMELINE + 12, "late")]
    return drawing(TIMELINE + 13, title, *shade, *lines, plot, *rug, description=description)


def heights(most_s: float, step_s: float) -> list[tuple[float, float]]:
    """(seconds, pixels from above) of the lines."""
    return [(n * step_s, round(12 + TIMELINE * (1 - n * step_s / most_s), 1)) for n in range(int(most_s / step_s) + 1)]


def seconds_axis(most_s: float) -> Markup:
    """The numbers beside a timeline, in a column of 56 pixels."""
    texts = [
        tag("text", duration(seconds), x=50, y=min(y + 4, TIMELINE + 12), text_anchor="end")
        for seconds, y in heights(most_s, tick_step(most_s / 4))
    ]
    return tag("svg", *texts, width=56, height=TIMELINE + 18, class_="axis", aria_hidden="true")


def steps_axis(first: int, last: int) -> Markup:
    places = [(0, "start"), (0.5, "middle"), (1, "end")] if last - first > 1 else [(0, "start")]
    texts = [
        tag(
            "text",
            f"{'step ' if share == 0 else ''}{round(first + share * (last - first)):,}",
            x=across(share),
            y=13,
            text_anchor=anchor,
        )
        for share, anchor in places
    ]
    return tag("svg", join(*texts), width="100%", height=18, class_="axis", aria_hidden="true")
