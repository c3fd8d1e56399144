"""Builds HTML in which all text is escaped, and writes numbers as people read them."""

from html import escape

VOID = {"meta", "link", "br"}  # elements that HTML does not close


class Markup(str):
    """Text that is HTML already; `tag` escapes all other."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Of attributes None leaves one out, `class_` is class, and `_` within a name is `-`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{given}>" + ("" if name in VOID else f"{join(*children)}</{name}>"))


def join(*children: object) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def table(caption: str, heads: list[str], rows: list[list[object]]) -> Markup:
    """A table to open below a plot; the first cell of a row is its heading. It scrolls by itself where a page is narrow."""
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inside = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    scrolled = tag("div", inside, class_="scroll", role="region", aria_label=caption, tabindex=0)
    return tag("details", tag("summary", "As a table"), scrolled)


def section(name: str, title: str, words: str, *content: object, wide: bool = False) -> Markup:
    heading = tag("h2", title, id=name)
    intro = [tag("p", words, class_="intro")] if words else []
    return tag("section", heading, *intro, *content, aria_labelledby=name, class_="wide" if wide else None)


def percent(share: float) -> str:
    """0.0123 is "1.2 %", 0.41 "41 %"; the space does not break."""
    decimals = 1 if 0.0005 <= abs(share) < 0.0995 else 0
    return f"{plain(100 * share, decimals)}\N{NO-BREAK SPACE}%"


def signed(share: float) -> str:
    return ("+" if share >= 0 else "\N{MINUS SIGN}") + percent(abs(share))


def number(value: float) -> str:
    """Three digits, four below ten thousand; thousands apart, millions as M."""
    if abs(value) >= 999.5e6:
        return f"{value:.2e}"
    if abs(value) >= 999_500:
        return f"{number(value / 1e6)}\N{NO-BREAK SPACE}M"
    if abs(value) >= 9_999.5:
        value = float(f"{value:.3g}")
    return plain(value, 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2 if abs(value) >= 0.095 else 4)


def plain(value: float, decimals: int) -> str:
    """Without zeros at its end: 5.0 is "5"."""
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def short(value: float) -> str:
    """For an axis: 20000 is "20k"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= 0.9995 * unit:
            return f"{number(seconds / unit)}\N{NO-BREAK SPACE}{name}"
    return "0\N{NO-BREAK SPACE}s" if seconds == 0 else f"{number(seconds * 1e9)}\N{NO-BREAK SPACE}ns"


def scaled(value: float, unit: str) -> str:
    """With a prefix of thousands: (2.2e7, "B") is "22.0 MB"."""
    for times, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= times:
            return f"{number(value / times)}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{number(value)}\N{NO-BREAK SPACE}{unit}"


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]
