"""Plots of a profile's steps: the mean and the slowest by their parts, and all of them one after the other."""

import itertools
import statistics
from collections.abc import Sequence

import numpy as np

from imagefeed.pipeline.profiler import plots
from imagefeed.pipeline.profiler.causes import stalled
from imagefeed.pipeline.profiler.findings import Profile, Stall, Step
from imagefeed.pipeline.profiler.html_markup import Markup, duration, percent, section, table, tag

PARTS = {
    "wait": "waiting for data",
    "hand-over": "hand-over",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "step": "step",
    "rest": "rest of the loop",
    "other": "other phases",
}
COLUMNS = 240  # of a timeline: about one a pixel on a phone
CUT = 5  # times the median: what is higher is cut off
LISTED = 12  # slowest steps in the table


def steps(profile: Profile) -> Markup:
    """The mean and the slowest step by their parts, and all of them one after the other."""
    taken = profile.steps
    totals = [step.seconds for step in taken]
    places = sorted(range(len(taken)), key=lambda n: -totals[n])
    parts = [parts_of(step) for step in taken]
    kinds = [kind for kind in PARTS if any(dict(step).get(kind) for step in parts)]
    mean = [(kind, statistics.fmean(dict(step).get(kind, 0.0) for step in parts)) for kind in kinds]
    mean_s = sum(seconds for _, seconds in mean)
    legend = [
        tag(
            "li",
            tag("span", class_=f"swatch {kind}"),
            PARTS[kind],
            " ",
            tag("b", duration(seconds)),
            f" {percent(seconds / mean_s)}",
        )
        for kind, seconds in mean
    ]
    slowest = [(kind, dict(parts[places[0]]).get(kind, 0.0)) for kind in kinds]
    content = [tag("ul", *legend, class_="legend")]
    for words, shown in (
        (f"The mean step, {duration(mean_s)}", mean),
        (f"The slowest, step {places[0]:,}, {duration(totals[places[0]])}", slowest),
    ):
        drawn = plots.stack(shown, sum(seconds for _, seconds in shown), f"{words}: {listed(shown)}")
        content.append(tag("figure", tag("figcaption", words), drawn))
    content.append(timeline(profile, parts, totals))
    rows = [
        [f"step {n:,}", duration(totals[n]), *(duration(dict(parts[n]).get(kind, 0.0)) for kind in kinds)]
        for n in places[:LISTED]
    ]
    rows.insert(0, ["mean of all", duration(mean_s), *(duration(seconds) for _, seconds in mean)])
    content.append(table("The mean and the slowest steps", ["Step", "Whole", *(PARTS[kind] for kind in kinds)], rows))
    words = f"{len(taken):,} steps of {profile.settings['batch_size']:,} images, loader and training together."
    return section("steps", "Steps", words, *content, wide=True)


def timeline(profile: Profile, parts: list[list[tuple[str, float]]], totals: list[float]) -> Markup:
    """Thinned to COLUMNS: each shows the median of some steps, pale above it the slowest, which is never left out."""
    count, usual_s = len(totals), statistics.median(totals)
    slow = stalled(np.array(totals)).tolist()
    columns = []
    edges = [n * count // min(count, COLUMNS) for n in range(min(count, COLUMNS) + 1)]
    for begin, end in itertools.pairwise(edges):
        ranked = sorted(range(begin, end), key=totals.__getitem__)
        middle, last = ranked[(len(ranked) - 1) // 2], ranked[-1]
        title = f"step {middle:,}: {duration(totals[middle])} ({listed(parts[middle])})"
        if last != middle:
            title += f"; slowest of {end - begin}, step {last:,}: {duration(totals[last])} ({listed(parts[last])})"
        columns.append(plots.Column(parts[middle], totals[last], title, any(slow[begin:end])))
    most_s = min(max(totals), CUT * usual_s) * 1.05
    notes = (
        [f"Marks on top: {sum(slow):,} stalled steps, far slower than the median of {duration(usual_s)}."] if any(slow) else []
    )
    if count > COLUMNS:
        notes.append(f"Each column is the median of {count / COLUMNS:.0f} steps or so, pale above it the slowest of them.")
    if max(totals) > most_s:
        notes.append(f"Cut off at {duration(most_s)}; the slowest took {duration(max(totals))}.")
    late = next((stall for stall in profile.stalls if stall.kind == "late"), None)
    begin = None if late is None else min(late.first_step * len(columns) // count, len(columns) - 1)
    notes += [stall_words(stall) for stall in profile.stalls]
    words = f"{count:,} steps, median {duration(usual_s)}, slowest {duration(max(totals))}"
    drawn = plots.timeline(columns, most_s, f"Timeline of {words}", " ".join(notes) or words, begin)
    plot = tag("div", drawn, plots.steps_axis(0, count - 1))
    caption = tag("figcaption", "One after the other")
    texts = [tag("p", " ".join(notes), class_="note")] if notes else []
    return tag("figure", caption, tag("div", plots.seconds_axis(most_s), plot, class_="timeline"), *texts)


def stall_words(stall: Stall) -> str:
    longer = f"{duration(stall.seconds)} longer ({PARTS.get(stall.stage, stall.stage)}), {percent(stall.share)} of the time."
    if stall.kind == "late":
        return f"Shaded: from step {stall.first_step:,} on a step is {longer}"
    return f"Every {stall.period:.0f} steps one is {longer}"


def parts_of(step: Step) -> list[tuple[str, float]]:
    """(kind, seconds) in the order of PARTS; phases of other names are one, "other"."""
    found = dict.fromkeys(PARTS, 0.0)
    found["wait"] = step.wait_s
    for name, seconds in step.phases.items():
        found[name if name in PARTS else "other"] += seconds
    return [(kind, seconds) for kind, seconds in found.items() if seconds > 0]


def listed(parts: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{PARTS[kind]} {duration(seconds)}" for kind, seconds in parts)
