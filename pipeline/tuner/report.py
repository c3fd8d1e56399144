"""What tuning tried and found, as a table, sentences and a plot."""

import math
import sys
import time
from pathlib import Path

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file
from imagefeed.pipeline.tuner.saved import in_words
from imagefeed.pipeline.tuner.search import Setting, noise, score
from imagefeed.pipeline.tuner.tune import Tuned

LINE_EVERY_S = 10
PICTURES = (".png", ".svg", ".pdf")
ROWS = 30  # of a plot at most, the fastest
TAKEN, OTHERS, DEFAULTS = "#0072b2", "#999999", "#d55e00"  # Okabe and Ito's


class Watch:
    """A progress bar on a terminal, a line every so often elsewhere; both on stderr."""

    def __enter__(self) -> "Watch":
        self._bar, self._said_s = None, time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.percentage:>3.0f} %"), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, share: float, text: str) -> None:
        """`share` of the time is over."""
        now_s = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=share, description=text)
        elif now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            print(f"{min(share, 1):4.0%}  {text}", file=sys.stderr, flush=True)


def render_table(tuned: Tuned) -> str:
    """Each setting that was tried, fastest first: images a second at the machine's usual speed (search.py), its windows, and how
    many percent of the best it is."""
    from rich.console import Console
    from rich.table import Table

    known, windows = score(tuned.rounds), windows_of(tuned)
    table = Table()
    for name in (*("threads" if axis == "num_threads" else axis.replace("_", "-") for axis in tuned.axes), "images/s"):
        table.add_column(name, justify="right")
    for name in ("windows from - to", "windows", "of the best", ""):
        table.add_column(name, justify="right" if name else "left")
    order = sorted(known, key=known.__getitem__, reverse=True)
    for setting in order:
        rates = windows[setting]
        table.add_row(
            *(str(getattr(setting, axis)) for axis in tuned.axes),
            f"{math.exp(known[setting]):,.0f}",
            f"{min(rates):,.0f} - {max(rates):,.0f}",
            str(len(rates)),
            f"{math.exp(known[setting] - known[order[0]]):.1%}",
            mark(tuned, setting),
        )
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def mark(tuned: Tuned, setting: Setting) -> str:
    return ", ".join(word for word, which in (("taken", tuned.chosen), ("default", tuned.start)) if setting == which)


def render_words(tuned: Tuned) -> str:
    """What was found, a line for each thing."""
    each = noise(tuned.rounds)
    count = len(windows_of(tuned)[tuned.chosen])
    found = ", ".join(in_words(name, value) for name, value in tuned.settings.items() if name in tuned.axes)
    fast = f"{tuned.gain:.2f} times the defaults' rate" if tuned.chosen != tuned.start else "the defaults"
    taken = sum(map(len, tuned.rounds))
    lines = [
        f"{found}: {fast}; a window scatters by {each:.1%}, the median of {count} by {1.25 * each / math.sqrt(count):.1%}",
        *tuned.notes,
        f"{taken} windows of {len(windows_of(tuned))} settings in {tuned.seconds:.0f} s",
    ]
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raises UserError where no picture can be written, before a minute of measuring."""
    if path.suffix not in PICTURES:
        raise UserError(f"--picture {path}: give a name that ends in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another")


def draw(tuned: Tuned, path: Path) -> None:
    """A row for each setting, a point for each window, in the format that the name's ending says."""
    import matplotlib
    from matplotlib.figure import Figure

    known, windows = score(tuned.rounds), windows_of(tuned)
    order = sorted(known, key=known.__getitem__, reverse=True)[:ROWS][::-1]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 1.2 + 0.26 * len(order)), layout="constrained")
        axes = figure.subplots()
        labels = []
        for row, setting in enumerate(order):
            color = TAKEN if setting == tuned.chosen else DEFAULTS if setting == tuned.start else OTHERS
            rates = windows[setting]
            axes.plot(rates, [row] * len(rates), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.plot([math.exp(known[setting])], [row], "|", color=color, markersize=12, markeredgewidth=2.5)
            words = ", ".join(in_words(axis, getattr(setting, axis)) for axis in tuned.axes)
            marked = mark(tuned, setting)
            labels.append(f"{words} ({marked})" if marked else words)
        axes.set_yticks(range(len(order)), labels)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_xlim(left=0)
        axes.set_xlabel("images per second: points are single windows, bars what was found of all")
        axes.grid(axis="x", alpha=0.3)
        with atomic_file(path) as file:
            figure.savefig(file, dpi=150, format=path.suffix[1:])


def windows_of(tuned: Tuned) -> dict[Setting, list[float]]:
    """Images a second of each setting, in the order in which they were measured."""
    found: dict[Setting, list[float]] = {}
    for measured in tuned.rounds:
        for setting, rate in measured.items():
            found.setdefault(setting, []).append(rate)
    return found
