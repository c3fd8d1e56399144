"""Console output: counts and durations in words, and a progress display."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO


def plural(count: int, singular: str, many: str = "") -> str:
    """A count with its noun: "1 shard", "1,281 shards"; `many` is the plural where an added s would be wrong."""
    return f"{count:,} {singular if count == 1 else many or singular + 's'}"


def first_few(names: Sequence[str]) -> str:
    """The first three of the names: "ant, bee, cat, ..."."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def examples(names: Iterable[str], shown: int = 3) -> str:
    """The first of the names, and how many more there are: "ant, bee, cat and 997 more"."""
    found = list(names)
    return ", ".join(found[:shown]) + (f" and {len(found) - shown:,} more" if len(found) > shown else "")


def duration(seconds: float) -> str:
    """A length of time in its two largest units: "2 h 5 min", "3 min 10 s", "8 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Progress:
    """Shows how far long work has come: a bar on a terminal, elsewhere a line every `every_s` seconds.

        with Progress(total=manifest.num_records, every_s=60) as progress:
            for done in work():
                progress.update(done, f"verified {plural(done, 'record')}")

    Both read " 42 %  verified 17 records, 3 min 10 s left". `total` and `done` are in any unit; `done` is what an earlier run
    finished, which does not count towards the time left. Output goes to `stream`, by default stderr. With `transient` the bar
    disappears at the end.
    """

    def __init__(
        self, total: float, done: float = 0, *, every_s: float = 30, stream: TextIO | None = None, transient: bool = False
    ):
        self._stream = stream or sys.stderr
        self._every_s = every_s
        self._bar = None
        self._shown_s = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.percentage:>3.0f} %"), BarColumn(20), TextColumn("{task.description}", markup=False))
            self._bar = Bar(
                *columns,
                console=Console(file=self._stream),
                transient=transient,
                # By default rich writes both to the bar's stream, even where the user sent one of them to a file.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._task = self._bar.add_task("")
        self.restart(total, done)

    def restart(self, total: float, done: float = 0) -> None:
        """Begins another phase, with a total and a time left of its own."""
        self.total = total
        self._first = done
        self._start_s = time.monotonic()

    def update(self, done: float, text: str) -> None:
        """Shows `done` of the total, and `text` beside it."""
        now_s = time.monotonic()
        if not self._bar and now_s - self._shown_s < self._every_s:
            return
        self._shown_s = now_s
        if self._first < done < self.total:
            text += f", {duration((now_s - self._start_s) * (self.total - done) / (done - self._first))} left"
        if self._bar:
            self._bar.update(self._task, total=self.total, completed=done, description=text)
        else:
            print(f"{100 * done / self.total if self.total else 100:3.0f} %  {text}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            self._shown_s = time.monotonic()
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
