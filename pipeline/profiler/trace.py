"""A profile's steps in the Trace Event Format, for ui.perfetto.dev and chrome://tracing.

The format is Google's: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times are microseconds.
"""

import json
from collections.abc import Iterator

import numpy as np

from imagefeed.pipeline.profiler.causes import stalled
from imagefeed.pipeline.profiler.findings import STAGES, Profile, Step
from imagefeed.pipeline.profiler.report import verdict

PROCESS, STEPS = 1, 1  # the track of the steps; those of the input stages follow it


def render_trace(profile: Profile) -> str:
    """JSON: a track of the steps with their phases inside, one for each input stage, and counters.

    Times are whole nanoseconds, so that phases add up to their step. On a GPU the steps are times of its stream and the input
    stages of the host; the two clocks do not agree to the microsecond.
    """
    used = {span.name for step in profile.steps for span in step.spans}
    inputs = [name for name in STAGES if name in used]
    tracks = ["GPU stream: steps" if profile.settings.cuda else "steps"]
    tracks += [f"input: {'waiting for decode' if name == 'decode' else name}" for name in inputs]
    heads = [metadata("process_name", name="imagefeed: loader and training together")]
    for tid, name in enumerate(tracks, STEPS):
        heads += [metadata("thread_name", tid, name=name), metadata("thread_sort_index", tid, sort_index=tid)]
    # Of two that start together, the longer contains the other.
    events = sorted(body(profile, inputs), key=lambda event: (event["ts"], -event.get("dur", 0)))
    settings = {name: str(value) for name, value in vars(profile.settings).items() if value is not None}
    about = {"verdict": verdict(profile)} | settings
    trace = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": heads + events}
    return json.dumps(trace, separators=(",", ":")) + "\n"


def body(profile: Profile, inputs: list[str]) -> Iterator[dict]:
    slow = stalled(np.array([step.seconds for step in profile.steps]))
    starts_s, end = starts(profile.steps), 0
    for number, (step, start_s) in enumerate(zip(profile.steps, starts_s, strict=True)):
        start = end = max(round(start_s * 1e9), end)
        parts = []
        for name, seconds in (("wait", step.wait_s), *step.phases.items()):
            begin, end = end, end + round(seconds * 1e9)
            if end > begin:
                parts.append(event(name, begin, end, STEPS))
        yield event(f"step {number}", start, end, STEPS, step=number, stalled=bool(slow[number]))
        yield from parts
        for span in step.spans:
            begin = round((start_s + span.start_s - step.start_s) * 1e9)
            yield event(span.name, begin, begin + round(span.seconds * 1e9), STEPS + 1 + inputs.index(span.name), step=number)
        if step.seconds > 0:  # viewers name a counter's track by its name and unit
            rate = profile.settings.batch_size / step.seconds
            for name, unit, value in (("rate", "images/s", rate), ("data wait", "ms", 1e3 * step.wait_s)):
                yield {"ph": "C", "name": name, "ts": start / 1e3, "pid": PROCESS, "args": {unit: round(value, 3)}}
    for stall in profile.stalls:
        words = f"{stall.kind} stall: {stall.seconds * 1e3:.3g} ms in {stall.stage}"
        when = round(starts_s[min(stall.first_step, len(starts_s) - 1)] * 1e9)
        yield {"ph": "i", "name": words, "ts": when / 1e3, "pid": PROCESS, "tid": STEPS, "s": "p"}


def starts(steps: tuple[Step, ...]) -> list[float]:
    """Seconds since the first step's start. A step that would start before the one before it is over, because the clock of a
    second measurement starts anew, follows that one."""
    found: list[float] = []
    shift_s, end_s = -steps[0].start_s, 0.0
    for step in steps:
        if step.start_s + shift_s < end_s - 1e-6:
            shift_s = end_s - step.start_s
        found.append(max(step.start_s + shift_s, end_s))
        end_s = found[-1] + step.seconds
    return found


def event(name: str, begin: int, end: int, tid: int, **args: object) -> dict:
    """A complete event, from times in whole nanoseconds."""
    about = {"ph": "X", "name": name, "cat": "step" if tid == STEPS else "input", "pid": PROCESS, "tid": tid}
    return about | {"ts": begin / 1e3, "dur": (end - begin) / 1e3} | ({"args": args} if args else {})


def metadata(kind: str, tid: int = 0, **args: object) -> dict:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": tid, "args": args}
