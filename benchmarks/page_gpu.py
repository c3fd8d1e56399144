"""The section on GPUs: the table of gpu.py, and what its rates mean for all of ImageNet."""

from benchmarks.gpu_table import rows
from benchmarks.page_tables import Shown, number, table

IMAGENET, EPOCHS = 1_281_167, 90


def show_gpu(name: str, result: dict) -> Shown:
    parts = result["parts"]
    lines = [f"Data: {result['data']}.", "", *table(["", "figure", "goal on an H200"], [list(row) for row in rows(parts)])]
    found = {
        run: row["together"]["images_per_second"]
        for run, row in parts.get("together", {}).items()
        if isinstance(row, dict) and "together" in row
    }
    if found:
        cells = [[run, *(f"*{number(epochs * IMAGENET / rate / 60)}*" for epochs in (1, EPOCHS))] for run, rate in found.items()]
        lines += ["", "Of all of ImageNet, by arithmetic from the rates above:", ""]
        lines += table(["", "minutes for an epoch", f"minutes for {EPOCHS}"], cells)
    if result["failed"]:
        lines += ["", *(f"- {part}: {why}." for part, why in result["failed"].items())]
    return Shown(lines, {})
