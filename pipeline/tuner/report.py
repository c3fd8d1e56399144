"""Settings that were tried, as text and as a plot."""

import math
from pathlib import Path
from typing import NamedTuple

from imagefeed.dataset.console import plural
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file
from imagefeed.pipeline.options import OPTIONS
from imagefeed.pipeline.tuner.saved import in_words
from imagefeed.pipeline.tuner.search import MEDIAN_ERROR, Setting, noise, score, without_drift
from imagefeed.pipeline.tuner.tune import Tuned

PICTURES = (".png", ".svg", ".pdf")
ROWS = 30  # of a plot at most, the fastest
COLORS = {"chosen": "#0072b2", "chosen, default": "#0072b2", "default": "#d55e00", "": "#999999"}  # Okabe and Ito's


class Tried(NamedTuple):
    setting: Setting
    rate: float  # images a second at the machine's usual speed (search.py)
    windows: list[float]  # likewise, of each window
    mark: str


def fastest_first(tuned: Tuned) -> list[Tried]:
    known, rounds = score(tuned.rounds), without_drift(tuned.rounds)
    marks = (("chosen", tuned.chosen), ("default", tuned.start))
    return [
        Tried(
            setting,
            math.exp(known[setting]),
            [found[setting] for found in rounds if setting in found],
            ", ".join(word for word, marked in marks if setting == marked),
        )
        for setting in sorted(known, key=known.get, reverse=True)
    ]


def render_text(tuned: Tuned) -> str:
    """A table of all settings, fastest first, and a line for each fact."""
    from rich.console import Console
    from rich.table import Table

    rows = fastest_first(tuned)
    table = Table()
    for name in (*(OPTIONS[axis].flag[2:] for axis in tuned.axes), "images/s", "windows from - to", "windows", "of the best"):
        table.add_column(name, justify="right")
    table.add_column("")
    for setting, rate, windows, mark in rows:
        values = (str(getattr(setting, axis)) for axis in tuned.axes)
        extent = f"{min(windows):,.0f} - {max(windows):,.0f}"
        table.add_row(*values, f"{rate:,.0f}", extent, str(len(windows)), f"{rate / rows[0].rate:.1%}", mark)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    settings = ", ".join(in_words(name, value) for name, value in tuned.settings.items() if name in tuned.axes)
    speed = f"{tuned.gain:.2f} times the defaults' rate" if tuned.chosen != tuned.start else "the defaults"
    each = noise(tuned.rounds)
    count = sum(tuned.chosen in found for found in tuned.rounds)
    error = MEDIAN_ERROR * each / math.sqrt(count)
    return "\n".join(
        (
            captured.get().rstrip("\n"),
            f"{settings}: {speed}; one window varies by ±{each:.1%}, the median of {plural(count, 'window')} by ±{error:.1%}",
            *tuned.notes,
            f"{plural(sum(map(len, tuned.rounds)), 'window')} of {plural(len(rows), 'setting')} in {tuned.seconds:.0f} s",
        )
    )


def check_format(path: Path) -> None:
    """Raises UserError for a plot that cannot be drawn, before a minute of measuring."""
    if path.suffix not in PICTURES:
        raise UserError(f"--picture {path}: choose a name that ends in {', '.join(PICTURES)}")


def draw(tuned: Tuned, path: Path) -> None:
    """A row for each setting and a point for each window, in the format of the name's ending."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = fastest_first(tuned)[:ROWS][::-1]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
        axes = figure.subplots()
        labels = []
        for row, (setting, rate, windows, mark) in enumerate(rows):
            color = COLORS[mark]
            axes.plot(windows, [row] * len(windows), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.plot([rate], [row], "|", color=color, markersize=12, markeredgewidth=2.5)
            words = ", ".join(in_words(axis, getattr(setting, axis)) for axis in tuned.axes)
            labels.append(f"{words} ({mark})" if mark else words)
        axes.set_yticks(range(len(rows)), labels)
        axes.set(
            ylim=(-0.7, len(rows) - 0.3), xlabel="images per second: points are windows, bars the estimates from all of them"
        )
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
        with atomic_file(path) as file:
            figure.savefig(file, dpi=150, format=path.suffix[1:])
