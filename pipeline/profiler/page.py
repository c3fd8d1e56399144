"""A profile as one HTML page that needs nothing else: no network, no script. page.html.j2 holds its markup and style."""

import dataclasses
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from imagefeed.pipeline.profiler import plots, report
from imagefeed.pipeline.profiler.figures import duration, number, percent, short, signed, written
from imagefeed.pipeline.profiler.findings import BANDS, MUCH_WAIT, SOME_WAIT, STAGES, Evidence, Profile, Samples, Settings, Stage


def render_html(profile: Profile) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, loader=loader
    )
    page.filters |= {each.__name__: each for each in (across, duration, number, percent, sentence, short, signed, written)}
    page.globals |= {each.__name__: each for each in (plots.listed, plots.points, spread)}
    page.globals |= {"STAGES": STAGES, "RATES": report.RATES, "PHASES": plots.PHASES, "TIMELINE": plots.TIMELINE}
    page.globals |= {"NO_COPY": report.NO_COPY, "bounds": (0, SOME_WAIT, MUCH_WAIT, 1)}
    steps = plots.draw_steps(profile)
    known = list(facts(profile.evidence))
    sampled = [fact for fact in known if isinstance(fact[1], tuple)]
    sampled += [(f"Gain of {option}", values, "gain") for option, values in profile.gains.items()]
    rates, tried, stages = profile.rates, profile.tried, profile.stages
    together = rates["together"].median
    reached = [tried.predicted, tried.achieved.median] if tried else []
    alone = [rate for stage in stages if stage.alone for rate in stage.alone.windows]
    return page.get_template("page.html.j2").render(
        profile=profile,
        band=BANDS.index(profile.band),
        verdict=report.verdict(profile),
        advice=report.advice(profile),
        step_s=statistics.median(step.seconds for step in profile.steps),
        most=max(together, *(fix.images_per_second for fix in profile.fixes), *reached, 0),
        rates_scale=plots.fit([rate for each in rates.values() for rate in each.windows]),
        stages_scale=plots.fit([together, *alone, *(stage.limit or 0 for stage in stages)], True),
        steps=steps,
        kinds=[*plots.PHASES, *"slowest input training together before gained band0 band1 band2".split()],
        sampled=sampled,
        tables={caption: (heads.split("|"), list(rows)) for caption, heads, rows in tables(profile, steps, sampled)},
        settings=[*facts(profile.settings), ("Took", profile.seconds, "s")],
        machine=[fact for fact in known if not isinstance(fact[1], tuple)],
    )


def tables(profile: Profile, steps: dict, sampled: list[tuple]) -> Iterator[tuple[str, str, Iterable[list]]]:
    """(caption, heads, rows) for the numbers of each plot."""
    fixes = ([fix.option or fix.sentence, fix.cause, signed(fix.gain), number(fix.images_per_second)] for fix in profile.fixes)
    yield "Fixes and their predicted gains", "Fix|Against|Predicted gain|Predicted images/s", fixes
    causes = ([sentence(each.name), percent(each.share), percent(each.confidence), each.sentence] for each in profile.causes)
    yield "Causes", "Cause|Share of the time|Confidence that it is the first|What", causes
    rates = [(sentence(label), profile.rates[name]) for name, label in report.RATES.items() if name in profile.rates]
    figures = ([label, *map(number, (each.median, each.low, each.high)), len(each.windows)] for label, each in rates)
    yield "Images per second", "What|Median|Lowest|Highest|Windows", figures
    heads = "Stage|Side|Images/s alone|Images/s at the limit|Of the limit|Set by|Busy|Queue empty|p50|p95|p99"
    yield "Stages", heads, map(stage_row, profile.stages)
    mean, kinds = steps["mean"], list(steps["mean"])
    all_steps = [("mean of all", sum(mean.values()), mean), *((f"step {n:,}", *rest) for n, *rest in steps["slowest"])]
    times = ([name, duration(s), *(duration(parts.get(kind, 0.0)) for kind in kinds)] for name, s, parts in all_steps)
    yield "The mean and the slowest steps", "|".join(["Step", "Whole", *(plots.PHASES[kind] for kind in kinds)]), times
    ranges = ([label, *(written(of(v), unit) for of in (statistics.median, min, max)), len(v)] for label, v, unit in sampled)
    yield "Samples", "What|Median|Lowest|Highest|Samples", ranges


def stage_row(stage: Stage) -> list[str]:
    alone = spread(stage.alone) if stage.alone else "not measured"
    limit = [number(stage.limit) if stage.limit else "", number(stage.of_limit) if stage.of_limit else "", stage.limit_name]
    empty = "" if stage.queue_empty is None else percent(stage.queue_empty)
    times = map(duration, (stage.p50_s, stage.p95_s, stage.p99_s))
    return [STAGES[stage.name][1], stage.side, alone, *limit, percent(stage.busy), empty, *times]


def facts(record: Settings | Evidence) -> Iterator[tuple[str, object, str]]:
    """(label, value, unit) of the fields that hold something."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value is not None and value != ():
            label = field.metadata.get("label") or sentence(field.name.replace("_", " "))
            yield label, value, field.metadata.get("unit") or ("B" if "bytes" in field.name else "")


def across(share: float) -> str:
    """A share of a plot's width."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def spread(samples: Samples) -> str:
    return f"{number(samples.median)} ({number(samples.low)} to {number(samples.high)})"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
