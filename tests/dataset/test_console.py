"""Counts and times in words; progress as a bar on a terminal and as lines elsewhere."""

import io
import sys

import pytest

from imagefeed.dataset.console import Progress, duration, plural


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_counts_have_a_thousands_separator_and_their_plural():
    assert plural(1, "shard") == "1 shard"
    assert plural(0, "shard") == "0 shards"
    assert plural(1281, "shard") == "1,281 shards"
    assert plural(1, "class", "classes") == "1 class"
    assert plural(2, "class", "classes") == "2 classes"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_elsewhere_than_on_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress(200, done=100, every_s=60, stream=stream) as progress:
        progress.update(110, "too early")
        clock[0] += 60
        progress.update(120, "packed 120 images")
        progress.update(121, "too early again")
        progress.say("a line that stays")
        progress.restart(10)
        clock[0] += 61
        progress.update(10, "done")
    assert stream.getvalue() == " 60 %  packed 120 images, 4 min 0 s left\na line that stays\n100 %  done\n"


def test_progress_of_nothing_is_complete():
    stream = io.StringIO()
    with Progress(0, every_s=0, stream=stream) as progress:
        progress.update(0, "nothing")
    assert stream.getvalue() == "100 %  nothing\n"


def test_on_a_terminal_progress_is_a_bar_and_lines_stand_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        progress.update(1, "one [of] two")
        progress.say("a [line] that stays")
        progress.update(2, "[both]")
    shown = stream.getvalue()
    assert "a [line] that stays\n" in shown
    assert "100 %" in shown and "[both]" in shown


def test_a_bar_on_stderr_leaves_a_redirected_stdout_alone(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with Progress(2, stream=Terminal()) as progress:
        progress.update(1, "one")
        print("to stdout")
        print("to stderr", file=sys.stderr)
    assert capsys.readouterr() == ("to stdout\n", "to stderr\n")
