"""Says in words what a profile found; the verdict comes first."""

import json

from imagefeed.pipeline.profiler.findings import Profile, Stage
from imagefeed.pipeline.profiler.fixes import WORTH, plural

RATES = {
    "training": "training on one batch",
    "loader cold": "loader alone, cold",
    "loader warm": "loader alone, warm",
    "together": "both together",
}
SHOWN = 0.02  # a smaller share of a step is not mentioned
NO_COPY = 1.5  # a stage that is so much faster than its limit does not do what the limit is for
FULL, EMPTY = 0.1, 0.9  # of the steps that found nothing in the queue


def verdict(profile: Profile) -> str:
    """What limits the run, in one sentence."""
    first = profile.causes[0]
    waits = f"{profile.band.capitalize()}: {profile.data_wait:.0%} of each step waits for data"
    return f"{waits}; the limit is {first.sentence} (confidence {first.confidence:.0%})."


def render_text(profile: Profile) -> str:
    """The verdict, what to do, the rates, the stages on their way, and where the measurement was made."""
    parts = [[verdict(profile)], advice(profile), rates(profile), stages(profile), claims(profile), [setting(profile)]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def advice(profile: Profile) -> list[str]:
    """The fixes, ranked, with their predicted gains; what the first one achieved, if it was tried."""
    before = profile.rates["together"].median
    lines = []
    for number, fix in enumerate(profile.fixes, 1):
        option = f"{fix.option}: " if fix.option else ""
        lines.append(f"{number}. {option}{fix.gain:+.0%}, {before:,.0f} to {fix.images_per_second:,.0f} images/s. {fix.sentence}")
    if not lines:
        near = "training" in profile.rates and before >= (1 - WORTH) * profile.rates["training"].median
        lines = [f"Nothing to gain: {'within 2 % of the ceiling' if near else 'no option would bring 2 %'}."]
    tried = profile.tried
    if tried:
        lines.append(
            f"Tried {tried.option}: {tried.before:,.0f} images/s before, {tried.predicted:,.0f} predicted, "
            f"{tried.achieved.median:,.0f} achieved ({tried.achieved.low:,.0f} to {tried.achieved.high:,.0f})."
        )
    return lines


def rates(profile: Profile) -> list[str]:
    lines = [f"{'images per second':<26}{'median':>10}   lowest to highest"]
    for name, words in {**RATES, **{name: name for name in profile.rates if name not in RATES}}.items():
        if name in profile.rates:
            found = profile.rates[name]
            lines.append(f"{words:<26}{found.median:>10,.0f}   {found.low:,.0f} to {found.high:,.0f}")
    stalls = (("prep", profile.prep_stall_s), ("fetch", profile.fetch_stall_s))
    words = [f"{name} stall {1e3 * seconds:,.1f} ms a step" for name, seconds in stalls if seconds is not None]
    return lines + [", ".join(words)] * bool(words)


def stages(profile: Profile) -> list[str]:
    head = f"{'stage':<11}{'alone, images/s':>16}{'busy':>6}  {'queue':<12}{'p50 ms':>9}{'p95':>9}{'p99':>9}"
    lines = [f"{head}   of what this machine can do"]
    for stage in profile.stages:
        alone = f"{stage.alone.median:,.0f}" if stage.alone else ""
        times = "".join(f"{1e3 * seconds:>9,.2f}" for seconds in (stage.p50_s, stage.p95_s, stage.p99_s))
        share = stage.of_limit
        of_limit = f"{min(share, 1):.2f} of {stage.limit:,.0f}, {stage.limit_name}" if share and share < NO_COPY else ""
        lines.append(f"{stage.name:<11}{alone:>16}{stage.busy:>6.0%}  {queue(stage):<12}{times}   {of_limit}".rstrip())
    return lines


def queue(stage: Stage) -> str:
    """Of the batches behind a stage: what a step found."""
    if stage.queue_empty is None:
        return ""
    return "full" if stage.queue_empty < FULL else "empty" if stage.queue_empty > EMPTY else f"empty {stage.queue_empty:.0%}"


def claims(profile: Profile) -> list[str]:
    shown = [cause for cause in profile.causes if cause.share >= SHOWN]
    return [f"{cause.share:>5.0%} of a step: {cause.sentence}" for cause in shown]


def setting(profile: Profile) -> str:
    known = profile.settings
    words = [f"Measured on {known['device']}", plural(known["cores"], "core")]
    if "threads" in known:
        words += [f"{plural(known['threads'], 'thread')} for the pipeline", f"{known['prefetch']} batches ahead"]
    words.append(f"batch {known['batch_size']}")
    if "crop_size" in known:
        words.append(f"crops of {known['crop_size']} pixels")
    words.append(f"{known.get('model', 'training')} in {known['precision']}")
    if "records" in known:
        words.append(f"{known['records']:,} records of {known['split']}")
    return f"{', '.join(words)}; {profile.seconds:.0f} s."


def render_json(profile: Profile) -> str:
    """All that was measured, with the verdict; the steps as columns."""
    steps = profile.steps
    columns: dict[str, list[float]] = {
        "start": [round(step.start_s, 6) for step in steps],
        "wait": [round(step.wait_s, 6) for step in steps],
    }
    for name in dict.fromkeys(span.name for step in steps for span in step.spans):
        columns[name] = [round(sum(span.seconds for span in step.spans if span.name == name), 6) for step in steps]
    for name in dict.fromkeys(name for step in steps for name in step.phases):
        columns[name] = [round(step.phases.get(name, 0.0), 6) for step in steps]
    found = profile.as_dict() | {"steps": columns}
    words = {"verdict": verdict(profile), "limit": profile.causes[0].name, "band": profile.band}
    return json.dumps(words | found, indent=1)
