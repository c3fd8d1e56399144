"""Writes numbers as people read them; a value and its unit stay on one line."""

NBSP = "\N{NO-BREAK SPACE}"


def number(value: float) -> str:
    """Three digits, four below ten thousand; commas between thousands, millions as M."""
    if abs(value) >= 999.5e6:
        return f"{value:.2e}"
    if abs(value) >= 999_500:
        return f"{number(value / 1e6)}{NBSP}M"
    if abs(value) >= 9_999.5:
        value = float(f"{value:.3g}")
    return plain(value, 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2 if abs(value) >= 0.095 else 4)


def plain(value: float, decimals: int) -> str:
    """Without trailing zeros: 5.0 is "5"."""
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def percent(share: float) -> str:
    """0.0123 is "1.2 %", 0.41 is "41 %"."""
    return f"{plain(100 * share, 1 if 0.0005 <= abs(share) < 0.0995 else 0)}{NBSP}%"


def signed(share: float) -> str:
    return ("+" if share >= 0 else "\N{MINUS SIGN}") + percent(abs(share))


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= 0.9995 * unit:
            return f"{number(seconds / unit)}{NBSP}{name}"
    return f"0{NBSP}s" if seconds == 0 else f"{number(seconds * 1e9)}{NBSP}ns"


def scaled(value: float, unit: str) -> str:
    """With a metric prefix: (2.2e7, "B") is "22 MB"."""
    times, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= pair[0]), (1, ""))
    return f"{number(value / times)}{NBSP}{prefix}{unit}"


def written(value: object, unit: str = "") -> str:
    """A value of any kind, in `unit`: "%" for shares, "s" for seconds, or what is printed behind it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(written(part, unit) for part in value)
    if not isinstance(value, int | float):
        return str(value)
    if unit in ("%", "s", "gain"):
        return {"%": percent, "s": duration, "gain": signed}[unit](value)
    if unit.startswith(("B", "FLOP")):
        return scaled(value, unit)
    return (f"{value:,.0f}" if value == round(value) else number(value)) + (NBSP + unit if unit else "")


def short(value: float) -> str:
    """For an axis: 20000 is "20k"."""
    times, unit = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= pair[0]), (1, ""))
    return f"{value / times:g}{unit}"
