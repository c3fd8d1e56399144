"""The facts behind a verdict, for a page: how it was measured, what was sampled on the way, and what the machine can do."""

import statistics
from collections.abc import Callable

from imagefeed.pipeline.profiler import plots
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.html_markup import Markup, duration, join, number, percent, scaled, section, signed, table, tag

# Of evidence: what it is called, and how its number is read. Others are shown under their own name.
KNOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "resident before": ("Pages of the dataset in memory before", percent),
    "gone pages": ("Pages read now and gone again from memory", percent),
    "throttled": ("Time held back by a control group", percent),
    "dataset bytes": ("Dataset", lambda value: scaled(value, "B")),
    "memory available bytes": ("Memory available", lambda value: scaled(value, "B")),
    "memory limit bytes": ("Memory that the process may have", lambda value: scaled(value, "B")),
    "record bytes": ("A record", lambda value: scaled(value, "B")),
    "read bytes a step": ("Read from the disk in a step", lambda value: scaled(value, "B")),
    "refaults a step": ("Pages read again in a step", number),
    "disk records/s": ("Disk, records past the page cache", lambda value: f"{number(value)}/s"),
    "disk bytes/s": ("Disk, bytes past the page cache", lambda value: scaled(value, "B/s")),
    "memory bytes/s": ("Memory bandwidth", lambda value: scaled(value, "B/s")),
    "copy bytes/s": ("Copies to the GPU, pinned", lambda value: scaled(value, "B/s")),
    "matrix FLOP/s": ("Matrix products", lambda value: scaled(value, "FLOP/s")),
    "libjpeg-turbo images/s a core": ("libjpeg-turbo on one core", lambda value: f"{number(value)} images/s"),
    "parameters": ("Parameters of the net", lambda value: f"{value:,.0f}"),
    "seconds to read a batch from memory": ("To read a batch from memory", duration),
    "seconds to copy a batch": ("To copy a batch once", duration),
    "seconds to update, at least": ("To update the parameters, at least", duration),
}


def settings(profile: Profile) -> Markup:
    shown = [
        (label_of(name), scaled(value, "B") if "bytes" in name else written(value)) for name, value in profile.settings.items()
    ]
    return block("settings", "How it was measured", [*shown, ("Took", duration(profile.seconds))])


def machine(profile: Profile) -> Markup:
    shown = []
    for name, value in profile.evidence.items():
        label, read = KNOWN.get(name, (label_of(name), number))
        shown.append((label, read(value)))
    return block("machine", "The machine", shown)


def sampled(profile: Profile) -> Markup:
    """What was looked at again and again: the median, from lowest to highest, and how it went."""
    items, rows = [], []
    for name, values in profile.series.items():
        if not values:
            continue
        read = reading(name)
        middle, low, high = statistics.median(values), min(values), max(values)
        label = label_of(name.removesuffix(" s"))
        title = f"{label}: {len(values)} samples, median {read(middle)}, {read(low)} to {read(high)}"
        line = tag("p", label, tag("span", read(middle), class_="figure"), class_="line")
        if name.startswith("gain of "):  # a few trials, no course of time
            items.append(tag("li", line, tag("p", f"{read(low)} to {read(high)} in {len(values)} trials", class_="note")))
        else:
            items.append(tag("li", line, plots.sparkline(values, title)))
        rows.append([label, read(middle), read(low), read(high), str(len(values))])
    if not items:
        return join()
    words = "What was looked at while loader and training ran, from the first sample to the last, and trials; medians."
    listed = table("Samples", ["What", "Median", "Lowest", "Highest", "Samples"], rows)
    return section("series", "Meanwhile", words, tag("ul", *items, class_="series"), listed, wide=True)


def block(name: str, title: str, shown: list[tuple[str, str]]) -> Markup:
    pairs = [tag("div", tag("dt", label), tag("dd", value)) for label, value in shown]
    return section(name, title, "", tag("dl", *pairs, class_="facts"))


def reading(series: str) -> Callable[[float], str]:
    """How a number of a series is read, which its name tells."""
    return duration if series.endswith(" s") else signed if series.startswith("gain of ") else percent


def written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(map(written, value))
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value == round(value) else number(value)
    return str(value)


def label_of(name: str) -> str:
    return (name[:1].upper() + name[1:]).replace("_", " ")
