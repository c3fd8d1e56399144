"""A profile's steps in the Trace Event Format, for ui.perfetto.dev and chrome://tracing.

The format is Google's: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times are microseconds.
"""

import json
from collections.abc import Iterator

import numpy as np

from imagefeed.pipeline.profiler.causes import stalled
from imagefeed.pipeline.profiler.findings import Profile, Step
from imagefeed.pipeline.profiler.report import verdict

PROCESS, STEPS = 1, 1  # of the tracks; those of input stages follow STEPS
INPUT = ("read", "decode", "crop")


def render_trace(profile: Profile) -> str:
    """JSON: a track of the steps with their parts inside, one for each stage of the input side, and counters.

    Events are in the order of their beginning, an outer one before what it holds. Nanoseconds are whole, so that parts add up to
    their step. On a GPU the steps are of its stream and the input side of the host, whose clocks do not agree to the
    microsecond.
    """
    cuda = profile.settings.get("device", "CPU") != "CPU"
    begin_s = beginnings(profile.steps)
    tracks = ["GPU stream: steps" if cuda else "steps", *dict.fromkeys(tracks_of(profile.steps))]
    # Of the same moment the longer comes first: it holds the other.
    events = sorted(body(profile, begin_s, tracks), key=lambda event: (event["ts"], -event.get("dur", 0)))
    heads = [metadata("process_name", name="imagefeed: loader and training together")]
    heads += [metadata("thread_name", tid, name=name) for tid, name in enumerate(tracks, STEPS)]
    heads += [metadata("thread_sort_index", tid, sort_index=tid) for tid, _ in enumerate(tracks, STEPS)]
    about = {"verdict": verdict(profile)} | {name: str(value) for name, value in profile.settings.items()}
    trace = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": heads + events}
    return json.dumps(trace, separators=(",", ":")) + "\n"


def body(profile: Profile, begin_s: list[float], tracks: list[str]) -> Iterator[dict]:
    slow = stalled(np.array([step.seconds for step in profile.steps])) if profile.steps else []
    images, end = profile.settings["batch_size"], 0
    for number, (step, start_s) in enumerate(zip(profile.steps, begin_s, strict=True)):
        start = end = max(round(start_s * 1e9), end)
        parts = []
        for name, seconds in (("wait", step.wait_s), *step.phases.items()):
            begin, end = end, end + round(seconds * 1e9)
            if end > begin:
                parts.append(slice_of(name, begin, end, STEPS))
        yield slice_of(f"step {number}", start, end, STEPS, step=number, stalled=bool(slow[number]))
        yield from parts
        for span in step.spans:
            begin = round((start_s + span.start_s - step.start_s) * 1e9)
            tid = STEPS + tracks.index(track(span.name))
            yield slice_of(span.name, begin, begin + round(span.seconds * 1e9), tid, step=number)
        if step.seconds > 0:
            yield counter("rate", "images/s", start, images / step.seconds)
            yield counter("waiting for data", "ms", start, step.wait_s * 1e3)
    for stall in profile.stalls:
        words = f"{stall.kind} stall: {stall.seconds * 1e3:.3g} ms in {stall.stage}"
        when = round(begin_s[min(stall.first_step, len(begin_s) - 1)] * 1e9)
        yield {"ph": "i", "name": words, "ts": when / 1e3, "pid": PROCESS, "tid": STEPS, "s": "p"}


def beginnings(steps: tuple[Step, ...]) -> list[float]:
    """Seconds from the first step's beginning. One that would begin within the step before it, as that of a second
    measurement whose clock starts anew, follows it."""
    found: list[float] = []
    shift_s = -steps[0].start_s if steps else 0.0
    end_s = 0.0
    for step in steps:
        if step.start_s + shift_s < end_s - 1e-6:
            shift_s = end_s - step.start_s
        found.append(max(step.start_s + shift_s, end_s))
        end_s = found[-1] + step.seconds
    return found


def tracks_of(steps: tuple[Step, ...]) -> Iterator[str]:
    """Those of the input side, in the order of the way."""
    names = {span.name for step in steps for span in step.spans}
    return (track(name) for name in sorted(names, key=lambda name: (*INPUT, name).index(name)))


def track(stage: str) -> str:
    return f"input: {'waiting for decode' if stage == 'decode' else stage}"


def slice_of(name: str, begin: int, end: int, tid: int, **args: object) -> dict:
    """A complete event of whole nanoseconds."""
    event = {"ph": "X", "name": name, "cat": "step" if tid == STEPS else "input", "ts": begin / 1e3, "dur": (end - begin) / 1e3}
    return event | {"pid": PROCESS, "tid": tid} | ({"args": args} if args else {})


def counter(name: str, unit: str, begin: int, value: float) -> dict:
    """Viewers call its track by name and unit."""
    return {"ph": "C", "name": name, "ts": begin / 1e3, "pid": PROCESS, "args": {unit: round(value, 3)}}


def metadata(kind: str, tid: int = 0, **args: object) -> dict:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": tid, "args": args}
