"""Markdown tables, and numbers as they are written in them."""

from typing import NamedTuple

HEAD = ("date", "machine", "versions")  # which every result has


class Shown(NamedTuple):
    lines: list[str]
    plots: dict[str, tuple[str, str]]  # by kind: caption, SVG


def number(value: float) -> str:
    """Three significant digits, all of those before the point."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    rounded = float(f"{value:.2e}")
    return f"{rounded:.{max(0, 2 - int(f'{rounded:e}'.rpartition('e')[2]))}f}"


def cell(value: object) -> str:
    """A number, true or false, or text, as it stands in a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    """A Markdown table; columns of figures stand to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def facts(result: dict) -> list[str]:
    """All that a result holds: plain values in one table, a list of rows in one each."""
    plain: list[list[object]] = []
    tables: list[tuple[str, list[dict]]] = []

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}, {key}" if name else str(key), inner)
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append((name, value))
        elif isinstance(value, list):
            plain.append([name, ", ".join(map(cell, value))])
        else:
            plain.append([name.replace("_", " "), value])

    walk("", {key: value for key, value in result.items() if key not in HEAD})
    lines = table(["", ""], plain) if plain else []
    for name, rows in tables:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_short(row.get(column, "")) for column in columns] for row in rows]
        lines += ["", f"{name}:", "", *table([column.replace("_", " ") for column in columns], cells)]
    return lines


def _short(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(inner)}" for key, inner in value.items())
    return ", ".join(map(cell, value)) if isinstance(value, list) else value
