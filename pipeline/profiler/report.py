"""Says in words what a profile found; the verdict comes first."""

import dataclasses
import json
from collections.abc import Iterator

from imagefeed.dataset.console import plural
from imagefeed.pipeline.profiler.causes import decoder_limits
from imagefeed.pipeline.profiler.findings import LARGER, Profile, Stage
from imagefeed.pipeline.profiler.fixes import WORTH_GAIN

RATES = {
    "training": "training on one batch, the ceiling",
    LARGER: LARGER,
    "loader warm": "loader alone, bytes from memory",
    "loader cold": "loader alone, bytes from storage",
    "together": "loader and training together",
}
ENOUGH_STEPS = 10
SHOWN = 0.02  # a smaller share of a step is not mentioned
NO_COPY = 1.5  # a stage this many times faster than its limit does not do what the limit is for
FULL, EMPTY = 0.1, 0.9  # of the steps found nothing in the queue


def verdict(profile: Profile) -> str:
    """What limits the run, in one sentence."""
    steps = len(profile.steps)
    if steps < ENOUGH_STEPS and "training" not in profile.rates:  # of a run as it is, the first steps are not usual ones
        few = f"{plural(steps, 'step')} {'is' if steps == 1 else 'are'} too few"
        return f"{few} to tell what limits the run; train for at least {ENOUGH_STEPS}."
    first = profile.causes[0]
    waits = f"{profile.band.capitalize()}: {profile.data_wait:.0%} of each step waits for data"
    return f"{waits}; the limit is {first.sentence} (confidence {first.confidence:.0%})."


def render_text(profile: Profile) -> str:
    """The verdict, the fixes, the rates, the stages, the causes, and how it was measured."""
    claims = [f"{cause.share:>5.0%} of a step: {cause.sentence}" for cause in profile.causes if cause.share >= SHOWN]
    parts = ([verdict(profile)], advice(profile), rates(profile), stages(profile), claims, [setting(profile)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def advice(profile: Profile) -> list[str]:
    """The fixes, ranked, with their predicted gains; what the first one achieved, if it was tried."""
    before = profile.rates["together"].median
    lines = []
    for number, fix in enumerate(profile.fixes, 1):
        option = f"{fix.option}: " if fix.option else ""
        lines.append(f"{number}. {option}{fix.gain:+.0%}, {before:,.0f} to {fix.images_per_second:,.0f} images/s. {fix.sentence}")
    if not lines:
        near = "training" in profile.rates and before >= (1 - WORTH_GAIN) * profile.rates["training"].median
        lines = [f"Nothing to gain: {'within 2 % of the ceiling' if near else 'no option would bring 2 %'}."]
    if tried := profile.tried:
        words = f"{tried.before:,.0f} images/s before, {tried.predicted:,.0f} predicted, {tried.achieved.median:,.0f} achieved"
        lines.append(f"Tried {tried.option}: {words} ({tried.achieved.low:,.0f} to {tried.achieved.high:,.0f}).")
    return lines


def rates(profile: Profile) -> Iterator[str]:
    yield f"{'images per second':<35}{'median':>10}   lowest to highest"
    for name, words in RATES.items():
        if name in profile.rates:
            found = profile.rates[name]
            yield f"{words:<35}{found.median:>10,.0f}   {found.low:,.0f} to {found.high:,.0f}"
    stalls = [(name, s) for name, s in zip(("prep", "fetch"), profile.stalls_s, strict=True) if s is not None]
    if stalls:
        yield ", ".join(f"{name} stall {1e3 * seconds:,.1f} ms a step" for name, seconds in stalls)


def stages(profile: Profile) -> Iterator[str]:
    head = f"{'stage':<11}{'alone, images/s':>16}{'busy':>6}  {'queue':<12}{'p50 ms':>9}{'p95':>9}{'p99':>9}"
    yield f"{head}   of what this machine can do"
    for stage in profile.stages:
        alone = f"{stage.alone.median:,.0f}" if stage.alone else ""
        times = "".join(f"{1e3 * seconds:>9,.2f}" for seconds in (stage.p50_s, stage.p95_s, stage.p99_s))
        share = stage.of_limit
        of_limit = f"{min(share, 1):.2f} of {stage.limit:,.0f}, {stage.limit_name}" if share and share < NO_COPY else ""
        if of_limit and stage.name == "decode":
            _, *others = decoder_limits(profile.settings, profile.evidence).items()
            of_limit += "".join(f"; {name} {rate:,.0f}" for name, rate in others)
        yield f"{stage.name:<11}{alone:>16}{stage.busy:>6.0%}  {queue(stage):<12}{times}   {of_limit}".rstrip()


def queue(stage: Stage) -> str:
    """What a step found in the queue behind a stage."""
    if stage.queue_empty is None:
        return ""
    return "full" if stage.queue_empty < FULL else "empty" if stage.queue_empty > EMPTY else f"empty {stage.queue_empty:.0%}"


def setting(profile: Profile) -> str:
    known = profile.settings
    words = [f"Measured on {known.device}", plural(known.cores, "core")]
    if known.ours:
        words += [f"{plural(known.threads, 'thread')} for the pipeline", f"prefetch {known.prefetch}"]
    words.append(f"batch size {known.batch_size}")
    if known.crop_size:
        words.append(f"crops of {known.crop_size} pixels")
    words.append(f"{known.model or 'training'} in {known.precision}")
    if known.records:
        words.append(f"{plural(known.records, 'record')} of {known.split}")
    return f"{', '.join(words)}; {profile.seconds:.0f} s."


def render_json(profile: Profile) -> str:
    """All that was measured, with the verdict; the steps as columns."""
    steps = profile.steps
    columns = {"start": [step.start_s for step in steps], "wait": [step.wait_s for step in steps]}
    for name in dict.fromkeys(span.name for step in steps for span in step.spans):
        columns[name] = [sum(span.seconds for span in step.spans if span.name == name) for step in steps]
    for name in dict.fromkeys(name for step in steps for name in step.phases):
        columns[name] = [step.phases.get(name, 0.0) for step in steps]
    words = {"verdict": verdict(profile), "limit": profile.causes[0].name, "band": profile.band}
    derived = {"data_wait": profile.data_wait, "data_wait_windows": profile.data_wait_windows}
    derived |= dict(zip(("prep_stall_s", "fetch_stall_s"), profile.stalls_s, strict=True))
    rounded = {"steps": {name: [round(seconds, 6) for seconds in column] for name, column in columns.items()}}
    return json.dumps(words | derived | dataclasses.asdict(profile) | rounded, indent=1)
