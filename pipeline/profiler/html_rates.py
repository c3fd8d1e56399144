"""Plots of a profile's rates: training, the loader and both together, and each stage on the way."""

from imagefeed.pipeline.profiler import plots
from imagefeed.pipeline.profiler.findings import Profile, Samples, Stage
from imagefeed.pipeline.profiler.html_markup import Markup, duration, number, percent, section, sentence_case, table, tag
from imagefeed.pipeline.profiler.report import NO_COPY

RATES = {
    "training": "Training alone, on one batch again and again: the ceiling",
    "loader warm": "Loader alone, bytes from memory",
    "loader cold": "Loader alone, bytes from storage",
    "together": "Together: loader and training, as in a run",
}
STAGES = {
    "read": "Read",
    "checksum": "Checksum",
    "decode": "JPEG decode",
    "crop": "Crop, flip, normalize",
    "loading": "Loader, the rest",
    "hand-over": "Hand-over",
    "forward": "Forward",
    "backward": "Backward",
    "optimizer": "Optimizer",
    "step": "Step",
    "rest": "Rest of the loop",
}


def ceilings(profile: Profile) -> Markup:
    """Training, the loader and both together, with the lowest and highest window of each."""
    order = list(RATES)
    names = sorted(profile.rates, key=lambda name: order.index(name) if name in RATES else 0.5)
    ceiling = profile.rates["training"].median
    scale = plots.fit([rate for samples in profile.rates.values() for rate in (samples.low, samples.high)])
    items = []
    for name in names:
        samples = profile.rates[name]
        words = RATES.get(name, sentence_case(name))
        title = f"{words}: {spread(samples)} images/s"
        kind = "together" if name == "together" else "input" if name.startswith("loader") else "training"
        line = tag("p", words, tag("span", number(samples.median), class_="figure"), class_="line")
        items.append(tag("li", line, plots.bar(scale, samples, kind, title, reference=ceiling)))
    unit = "images/s, logarithmic" if scale.logarithmic else "images/s"
    rows = [
        [RATES.get(name, sentence_case(name)), *map(number, (each.median, each.low, each.high)), str(len(each.windows))]
        for name, each in ((name, profile.rates[name]) for name in names)
    ]
    together = profile.rates["together"].median
    words = (
        f"In training with this loader the run does {together / ceiling:.2f} of its ceiling (dashed). Thin lines go from "
        "the lowest to the highest window."
    )
    stalls = []
    if profile.prep_stall_s is not None:
        stalls.append(f"Preparation stall {duration(profile.prep_stall_s)} a step: the loader from memory against training.")
    if profile.fetch_stall_s is not None:
        stalls.append(f"Fetch stall {duration(profile.fetch_stall_s)} a step: from storage against from memory.")
    content = [tag("ul", *items, class_="bars"), plots.axis(scale, unit)]
    content += [tag("p", " ".join(stalls), class_="note")] if stalls else []
    content.append(table("Images per second", ["What", "Median", "Lowest", "Highest", "Windows"], rows))
    return section("ceilings", "Ceilings", words, *content, wide=True)


def waterfall(profile: Profile) -> Markup:
    """Each stage: its rate alone beside its limit and the run's rate, how busy it is in place, its queue, its times."""
    together = profile.rates["together"].median
    rates = [together]
    for stage in profile.stages:
        rates += [stage.alone.low, stage.alone.high] if stage.alone else []
        rates += [stage.limit] if stage.limit else []
    scale = plots.fit(rates, logarithmic=True)
    heads = [
        tag("span", head) for head in ("Stage", "Alone, images/s, logarithmic", "Busy", "Queue behind", "p50, p95, p99 of a step")
    ]
    items = [tag("li", *heads, class_="stage heads", aria_hidden="true")]
    items += [stage_line(stage, scale, together) for stage in profile.stages]
    ruler = tag("li", tag("span"), plots.axis(scale), class_="stage ruler", aria_hidden="true")
    columns = ["Stage", "Side", "Images/s alone", "Limit, images/s", "Of the limit", "Set by", "Busy", "Queue empty"]
    rows = [
        [
            STAGES.get(stage.name, stage.name),
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
    ]
    words = (
        "From the bytes to the update. Bars: what a stage does alone; the thick mark: what this machine could do at most; "
        "dashed: the rate of the run. Busy: its share of the time in place. Queue: in how many steps the queue behind a stage "
        "held something; it is empty where what follows takes faster."
    )
    listed = table("Stages", [*columns, "p50", "p95", "p99"], rows)
    return section("stages", "Stages", words, tag("ul", *items, ruler, class_="stages"), listed, wide=True)


def stage_line(stage: Stage, scale: plots.Scale, together: float) -> Markup:
    name = STAGES.get(stage.name, sentence_case(stage.name))
    if stage.alone:
        title = f"{name}: {spread(stage.alone)} images/s alone"
        rate = number(stage.alone.median)
        drawn = plots.bar(scale, stage.alone, stage.side, title, stage.limit, together)
    else:
        title, rate = f"{name}: not measured alone", ""
        drawn = plots.nothing(scale, title)
    notes = [tag("p", of_limit(stage), class_="note")] if stage.of_limit else []
    busy = plots.meter(stage.busy, stage.side, f"{name}: busy for {percent(stage.busy)} of the time")
    cells = [tag("div", busy, tag("p", narrow("busy "), percent(stage.busy), class_="note"), class_="busy")]
    if stage.queue_empty is not None:
        empty = stage.queue_empty
        queue = f"empty, {percent(empty)}" if empty >= 0.5 else f"full, {percent(1 - empty)}"
        filled = plots.meter(1 - stage.queue_empty, "filled", f"{name}: queue {queue} of the steps")
        cells.append(tag("div", filled, tag("p", narrow("queue "), queue, class_="note"), class_="queue"))
    quantiles = ", ".join(map(duration, (stage.p50_s, stage.p95_s, stage.p99_s)))
    return tag(
        "li",
        tag("p", tag("b", name), tag("span", rate, class_="figure"), class_="name"),
        tag("div", drawn, *notes, class_="rate"),
        *cells,
        tag("p", narrow("p50, p95, p99 "), quantiles, class_="quantiles"),
        class_="stage",
    )


def narrow(label: str) -> Markup:
    """What the head of a column says where there is room for columns."""
    return tag("span", label, class_="narrow")


def of_limit(stage: Stage) -> str:
    """One that is above its limit does less than the limit is about: it takes bytes from memory, or copies none."""
    share = f"{min(stage.of_limit, 1):.2f} of" if stage.of_limit < NO_COPY else "above"
    return f"{share} the limit, {stage.limit_name} {number(stage.limit)}"


def spread(samples: Samples) -> str:
    return f"{number(samples.median)} ({number(samples.low)} to {number(samples.high)})"
