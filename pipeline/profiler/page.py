"""A profile as one HTML page that needs nothing else: no network, no script."""

import statistics

from imagefeed.pipeline.profiler import html_facts as facts
from imagefeed.pipeline.profiler import plots
from imagefeed.pipeline.profiler.findings import BANDS, MUCH_WAIT, SOME_WAIT, Profile
from imagefeed.pipeline.profiler.html_markup import Markup, duration, number, percent, section, sentence_case, signed, table, tag
from imagefeed.pipeline.profiler.html_rates import ceilings, waterfall
from imagefeed.pipeline.profiler.html_steps import steps
from imagefeed.pipeline.profiler.html_style import STYLE
from imagefeed.pipeline.profiler.report import advice, verdict

# The page may load nothing, and says so to the browser.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_html(profile: Profile) -> str:
    """The page: verdict, fixes, causes, ceilings, stages, steps, and the machine."""
    sections = [top, fixes, causes, ceilings, waterfall, steps, facts.sampled, facts.settings, facts.machine]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{profile.band.capitalize()}: profile of imagefeed"),
        tag("style", Markup(STYLE)),
    )
    footer = tag("footer", tag("p", "imagefeed, python -m pipeline profile. docs/profiling.md says how to read this."))
    body = tag("body", tag("main", *(part(profile) for part in sections)), footer)
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def top(profile: Profile) -> Markup:
    """The verdict, how sure it is, the share of waiting on its bands, and the rates that count."""
    band = BANDS.index(profile.band)
    first, colon, rest = verdict(profile).partition(":")
    low, high = min(profile.data_wait_windows), max(profile.data_wait_windows)
    wait = f"{percent(profile.data_wait)} of the time waits for data"
    spread = f"{percent(low)} to {percent(high)} in its windows"
    gauge = plots.gauge(profile.data_wait, low, high, (SOME_WAIT, MUCH_WAIT), f"{wait}, {spread}")
    bands = f"Not input-bound below {percent(SOME_WAIT)}, partly below {percent(MUCH_WAIT)}, input-bound above."
    tiles = [
        (profile.rates["together"].median, "images/s in training with this loader"),
        (profile.rates["training"].median, "images/s of training alone, the ceiling"),
    ]
    if "loader warm" in profile.rates:
        tiles.append((profile.rates["loader warm"].median, "images/s of the loader alone"))
    shown = [(number(value), words) for value, words in tiles]
    shown.append((duration(statistics.median(step.seconds for step in profile.steps)), "a step, in the median"))
    where = f"of {profile.settings['root']}" if "root" in profile.settings else f"of a {profile.settings['loader']}"
    return tag(
        "header",
        tag("p", f"imagefeed profile {where}", class_="eyebrow"),
        tag("h1", tag("span", first, class_=f"word{band}"), colon, rest),
        confidence(profile),
        tag("figure", tag("figcaption", tag("b", wait), f"; {spread}"), gauge, tag("p", bands, class_="note")),
        tag("dl", *(tag("div", tag("dt", words), tag("dd", value)) for value, words in shown), class_="tiles"),
        class_=f"top top{band}",
    )


def confidence(profile: Profile) -> Markup:
    sure = profile.causes[0].confidence
    words = f"Confidence {percent(sure)}: so often the same cause comes first when the measurements are drawn anew."
    return tag("div", plots.meter(sure, "sure", words), tag("p", words, class_="note"), class_="confidence")


def fixes(profile: Profile) -> Markup:
    """Ranked, each with the rate that it is predicted to reach; and what the first achieved, where it was tried."""
    before = profile.rates["together"].median
    if not profile.fixes:
        of_ceiling = before / profile.rates["training"].median
        return section("fixes", "What to do", f"{advice(profile)[0]} The run does {of_ceiling:.2f} of its ceiling.")
    tried = profile.tried
    most = max(before, *(fix.images_per_second for fix in profile.fixes))
    if tried:
        most = max(most, tried.predicted, tried.achieved.median)
    items = []
    for fix in profile.fixes:
        words = f"{number(before)} images/s now, {number(fix.images_per_second)} predicted"
        line = tag(
            "p",
            tag("code", fix.option) if fix.option else tag("b", fix.sentence),
            tag("span", signed(fix.gain), class_="figure"),
            class_="line",
        )
        bar = plots.gain(before, fix.images_per_second, most, words)
        against = f"{fix.sentence} " if fix.option else ""
        items.append(tag("li", line, bar, tag("p", f"{against}Against: {fix.cause}. {words}.", class_="note")))
    rows = [[fix.option or fix.sentence, fix.cause, signed(fix.gain), number(fix.images_per_second)] for fix in profile.fixes]
    heads = ["Fix", "Against", "Predicted gain", "Predicted images/s"]
    words = "What removes the first cause, then by the gain predicted. Bars: the rate now, and on top what a fix adds."
    content = [tag("ol", *items, class_="ranked"), table("Fixes and their predicted gains", heads, rows)]
    if tried:
        content.insert(1, attempt(profile, most))
    return section("fixes", "What to do", words, *content)


def attempt(profile: Profile, most: float) -> Markup:
    tried = profile.tried
    achieved = tried.achieved.median
    lines = [
        ("Before", tried.before, ""),
        ("Predicted", tried.predicted, signed(tried.predicted / tried.before - 1)),
        ("Achieved", achieved, signed(achieved / tried.before - 1)),
    ]
    items = []
    for name, rate, change in lines:
        words = f"{number(rate)} images/s"
        head = tag("p", name, tag("span", f"{words} {change}".strip(), class_="figure"), class_="line")
        items.append(tag("li", head, plots.gain(min(tried.before, rate), rate, most, f"{name}: {words}")))
    return tag("div", tag("h3", "Tried: ", tag("code", tried.option)), tag("ul", *items, class_="ranked"), class_="tried")


def causes(profile: Profile) -> Markup:
    items = []
    for cause in profile.causes:
        words = f"{cause.name}: {percent(cause.share)} of the time"
        line = tag("p", tag("b", sentence_case(cause.name)), tag("span", percent(cause.share), class_="figure"), class_="line")
        note = f"{sentence_case(cause.sentence)}. Comes first with a confidence of {percent(cause.confidence)}."
        items.append(tag("li", line, plots.meter(cause.share, "lost", words), tag("p", note, class_="note")))
    rows = [
        [sentence_case(cause.name), percent(cause.share), percent(cause.confidence), cause.sentence] for cause in profile.causes
    ]
    heads = ["Cause", "Share of the time", "Confidence that it is the first", "What"]
    words = "The share of the time that would be gone without each; they can overlap."
    return section("causes", "What costs time", words, tag("ol", *items, class_="ranked"), table("Causes", heads, rows))
