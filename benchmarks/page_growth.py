"""The section on growth: what was measured, and the same by arithmetic at sizes that nobody waits for."""

import statistics

from benchmarks import page_plots
from benchmarks.page_tables import Shown, number, table

EXTENDED = (1_281_167, 100_000_000)  # ImageNet, and what large collections of the web have
UNITS = {"seconds": "seconds", "peak_mb": "megabytes"}


def extend(records: list[int], values: list[float], size: int) -> float:
    """On the line through the two measured sizes next to `size`, or the two largest; level where it would fall."""
    if len(records) == 1:
        return values[0]
    right = next((at for at in range(1, len(records)) if records[at] >= size), len(records) - 1)
    rise = max(0.0, (values[right] - values[right - 1]) / (records[right] - records[right - 1]))
    return values[right] + rise * (size - records[right])


def show_growth(name: str, result: dict) -> Shown:
    rows, sizes = result["rows"], [row["records"] for row in result["rows"]]
    panels: dict[str, dict] = {}
    tables = []
    for field, unit in UNITS.items():
        lines, cells = panels.setdefault(unit, {}), []
        for step in rows[0]["steps"]:
            found = {row["records"]: statistics.median(row["steps"][step][field]) for row in rows if step in row["steps"]}
            records, values = list(found), list(found.values())
            beyond = {size: extend(records, values, size) for size in EXTENDED}
            lines[step] = (records, values, [(size, value) for size, value in beyond.items() if size > records[-1]])
            measured = [number(found[size]) if size in found else "" for size in sizes]
            cells.append([step, *measured, *(f"*{number(value)}*" for value in beyond.values())])
        header = [f"{row['records']:,}{' linked' if row.get('stretched') else ''}" for row in rows]
        tables += [*table([unit, *header, *(f"{size:,} by arithmetic" for size in EXTENDED)], cells), ""]
    linked = "Sizes with *linked* repeat the shards of the size before, too many to build here. " * any(
        row.get("stretched") for row in rows
    )
    about = (
        f"{result['images']:,} photos, repeated up to each size; batches of {result['batch_size']}; medians of "
        f"{result['rounds']} rounds, of `build` one. {linked}What is by arithmetic was not measured: it lies on the line through "
        "the two sizes next to it. *First batch* and *resume* include opening. Megabytes are the most that the process held for "
        "itself, PyTorch and DALI included, mapped files not; of `build` the most of the driver or a worker."
    )
    plot = page_plots.growth(panels)
    return Shown([about, "", *tables[:-1]], {"": ("Seconds and megabytes of each step by the number of records", plot)})
