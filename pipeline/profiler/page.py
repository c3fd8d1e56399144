"""A profile as one HTML page that needs nothing else: no network, no script. page.html.j2 holds its markup and style."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from imagefeed.pipeline.profiler import plots, report
from imagefeed.pipeline.profiler.figures import duration, number, percent, short, signed, written
from imagefeed.pipeline.profiler.findings import BANDS, MUCH_WAIT, SOME_WAIT, STAGES, Profile, Samples


def render_html(profile: Profile) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, loader=loader
    )
    page.filters |= {each.__name__: each for each in (across, duration, number, percent, sentence, short, signed, written)}
    page.globals |= {each.__name__: each for each in (plots.listed, plots.sparkline, spread)}
    page.globals |= {"STAGES": STAGES, "RATES": report.RATES, "PHASES": plots.PHASES, "TIMELINE": plots.TIMELINE}
    page.globals |= {"NO_COPY": report.NO_COPY, "bounds": (0, SOME_WAIT, MUCH_WAIT, 1)}
    steps = plots.draw_steps(profile)
    sampled = [*facts(profile.series), *((f"Gain of {option}", values, "gain") for option, values in profile.gains.items())]
    rates, tried = profile.rates, profile.tried
    together = rates["together"].median
    tiles = [(number(together), "images/s in training with this loader")]
    tiles.append((number(rates["training"].median), "images/s of training alone, the ceiling"))
    if "loader warm" in rates:
        tiles.append((number(rates["loader warm"].median), "images/s of the loader alone"))
    tiles.append((duration(statistics.median(step.seconds for step in profile.steps)), "a step, in the median"))
    stalls = (
        ("Preparation stall {} a step: the loader from memory against training.", profile.prep_stall_s),
        ("Fetch stall {} a step: from storage against from memory.", profile.fetch_stall_s),
    )
    alone = [stage.alone for stage in profile.stages if stage.alone]
    return page.get_template("page.html.j2").render(
        profile=profile,
        band=BANDS.index(profile.band),
        verdict=report.verdict(profile),
        advice=report.advice(profile),
        tiles=tiles,
        most=max(
            [together, *(fix.images_per_second for fix in profile.fixes)]
            + ([tried.predicted, tried.achieved.median] if tried else [])
        ),
        stalls=" ".join(words.format(duration(seconds)) for words, seconds in stalls if seconds is not None),
        rates_scale=plots.fit([rate for each in rates.values() for rate in each.windows]),
        stages_scale=plots.fit(
            [together, *(rate for each in alone for rate in each.windows), *(stage.limit or 0 for stage in profile.stages)], True
        ),
        steps=steps,
        kinds=[*plots.PHASES, *"slowest input training together before gained band0 band1 band2".split()],
        sampled=sampled,
        tables=tables(profile, steps, sampled),
        settings=[*facts(profile.settings), ("Took", profile.seconds, "s")],
        machine=list(facts(profile.evidence)),
    )


def tables(profile: Profile, steps: plots.Steps, sampled: list[tuple]) -> dict[str, tuple[list[str], list[list[object]]]]:
    """(heads, rows) by caption: the numbers of all plots."""
    rates = [(sentence(label), profile.rates[name]) for name, label in report.RATES.items() if name in profile.rates]
    slowest = [("mean of all", sum(steps.mean.values()), steps.mean)]
    slowest += [(f"step {n:,}", seconds, parts) for n, seconds, parts in steps.slowest]
    return {
        "Fixes and their predicted gains": (
            ["Fix", "Against", "Predicted gain", "Predicted images/s"],
            [[fix.option or fix.sentence, fix.cause, signed(fix.gain), number(fix.images_per_second)] for fix in profile.fixes],
        ),
        "Causes": (
            ["Cause", "Share of the time", "Confidence that it is the first", "What"],
            [[sentence(each.name), percent(each.share), percent(each.confidence), each.sentence] for each in profile.causes],
        ),
        "Images per second": (
            ["What", "Median", "Lowest", "Highest", "Windows"],
            [[label, *map(number, (each.median, each.low, each.high)), len(each.windows)] for label, each in rates],
        ),
        "Stages": (
            "Stage,Side,Images/s alone,Images/s at the limit,Of the limit,Set by,Busy,Queue empty,p50,p95,p99".split(","),
            [
                [
                    STAGES[stage.name][1],
                    stage.side,
                    spread(stage.alone) if stage.alone else "not measured",
                    number(stage.limit) if stage.limit else "",
                    number(stage.of_limit) if stage.of_limit else "",
                    stage.limit_name,
                    percent(stage.busy),
                    "" if stage.queue_empty is None else percent(stage.queue_empty),
                    *map(duration, (stage.p50_s, stage.p95_s, stage.p99_s)),
                ]
                for stage in profile.stages
            ],
        ),
        "The mean and the slowest steps": (
            ["Step", "Whole", *(plots.PHASES[kind] for kind in steps.mean)],
            [[name, duration(s), *(duration(parts.get(kind, 0.0)) for kind in steps.mean)] for name, s, parts in slowest],
        ),
        "Samples": (
            ["What", "Median", "Lowest", "Highest", "Samples"],
            [
                [label, *(written(of(values), unit) for of in (statistics.median, min, max)), len(values)]
                for label, values, unit in sampled
            ],
        ),
    }


def facts(record: object) -> Iterator[tuple[str, object, str]]:
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
