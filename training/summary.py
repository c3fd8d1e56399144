"""What a run came to: summary.json, and tables beside what others reached or guessing would."""

import hashlib
import json
import statistics
from pathlib import Path

import numpy as np

from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.training.curves import draw_curves
from imagefeed.training.recipes import Recipe
from imagefeed.training.reporting import duration, read_metrics

SUMMARY = {
    "net",
    "dataset",
    "classes",
    "step",
    "epochs",
    "seconds",
    "samples_per_sec",
    "samples_per_sec_p5",
    "data_wait_pct",
    "mfu",
    "errors",
    "published",
    "run_dir",
}
# The 1,000 classes of ILSVRC-2012, sorted, and the images of its validation set. Those of 2010 are others.
CLASSES_SHA256 = "385e0240499426c0"
VALIDATION = 50_000
# Errors on ILSVRC-2012's validation set, top-1 and top-5 in percent.
PUBLISHED = {
    "the paper, ten views": ("40.7", "18.2"),  # Krizhevsky, Sutskever, Hinton 2012, table 2: "1 CNN"
    # The paper has none for it. Caffe's bvlc_alexnet (42.9 / 19.8) and CaffeNet (42.6 / 19.6), by their readme.md; net 170
    # of cuda-convnet2 (42.3 / 19.6).
    "AlexNets of others, center crop": ("42.3-42.9", "19.6-19.8"),
}


def write_summary(run_dir: Path, recipe: Recipe, manifest: Manifest, progress: dict, ten: dict[str, float]) -> dict:
    """summary.json and curves.png of a run that is over; returns what is in the first. `ten` are its ten-view errors.

    `samples_per_sec`, `data_wait_pct` and `mfu` (a fraction) are medians over the lines of metrics.jsonl;
    `samples_per_sec_p5` is the rate that the slowest twentieth of them stays below. None where there is no such line.
    """
    lines = read_metrics(run_dir)
    rates = values(lines, "throughput/samples_per_sec")
    evaluated = [line for line in lines if "metrics/val/top1_error" in line]
    summary = {
        "net": recipe.model,
        "dataset": str(manifest.root),
        "classes": len(manifest.classes),
        "step": progress["step"],
        "epochs": progress["epochs"],
        "seconds": progress["seconds"],
        "samples_per_sec": median(rates),
        "samples_per_sec_p5": float(np.percentile(rates, 5)) if rates else None,
        "data_wait_pct": median(values(lines, "time/data_wait_pct")),
        "mfu": median(values(lines, "throughput/device/mfu")),
        "errors": {},
        "published": published(manifest, recipe.model, recipe.lrn, recipe.overlapping),
        "run_dir": str(run_dir),
    }
    if evaluated:
        names = ("top1_error", "top5_error", "loss", "records")
        summary["errors"] = {"center crop": {name: evaluated[-1][f"metrics/val/{name}"] for name in names}, "ten views": ten}
    title = f"{recipe.model} on {manifest.root.resolve().name}"
    draw_curves(run_dir / "curves.png", title, lines, len(manifest.classes))
    write_atomically(run_dir / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def values(lines: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def median(numbers: list[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def published(manifest: Manifest, model: str, lrn: bool, overlapping: bool) -> dict[str, tuple[str, str]]:
    """Errors that others reached with this net; empty unless it is the paper's and these are the images of 2012."""
    if manifest.eval_split is None or manifest.split(manifest.eval_split).records != VALIDATION:
        return {}
    classes = hashlib.sha256("\n".join(sorted(manifest.classes)).encode()).hexdigest()
    same = classes.startswith(CLASSES_SHA256) and model in ("alexnet", "alexnet-code") and lrn and overlapping
    return dict(PUBLISHED) if same else {}


def read_summary(run_dir: Path) -> dict | None:
    """What `write_summary` wrote, None where there is no such file or it is corrupt."""
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.keys() >= SUMMARY else None


def show_summary(summary: dict) -> None:
    """The closing tables, and as the last line what they come to."""
    print(f"{summary['net']} on {summary['dataset']} after {summary['epochs']} epochs")
    show_errors(summary["errors"], summary["classes"], summary["published"])
    if summary["samples_per_sec"]:
        rows = [
            ("images/s, median", f"{summary['samples_per_sec']:,.0f}"),
            ("images/s, slowest 5 %", f"{summary['samples_per_sec_p5']:,.0f}"),
            ("time waiting for data", f"{summary['data_wait_pct']:.1f} %"),
        ]
        if summary["mfu"] is not None:  # as in a run that an earlier version began
            rows.append(("arithmetic used (MFU)", f"{100 * summary['mfu']:.1f} %"))
        show_table(("speed", "logged intervals"), rows)
    print(f"run folder {summary['run_dir']}: metrics.jsonl, summary.json, curves.png and other pictures, checkpoints")
    epochs = summary["epochs"]
    result = f"{epochs} epoch{'s' * (epochs != 1)} in {duration(summary['seconds'])}"
    if summary["samples_per_sec"]:
        result += f", {summary['samples_per_sec']:,.0f} images/s, {summary['data_wait_pct']:.1f} % waiting for data"
    for views, found in summary["errors"].items():
        result += f", {views}: top-1 error {found['top1_error']:.1f} %, top-5 {found['top5_error']:.1f} %"
    print(result)


def show_errors(errors: dict[str, dict[str, float]], classes: int, others: dict[str, tuple[str, str]] | None = None) -> None:
    """A table of errors by views, beside those of `others` on the same images, and of guessing."""
    rows = [
        (f"{views}, {found['records']:,} images", *(f"{found[f'top{k}_error']:.2f} %" for k in (1, 5)))
        for views, found in errors.items()
    ]
    rows += [(name, *(f"{error} %" for error in found)) for name, found in (others or {}).items()]
    rows.append(("guessing", *(f"{100 - 100 * min(k, classes) / classes:.2f} %" for k in (1, 5))))
    show_table(("validation images", "top-1 error", "top-5 error"), rows)


def show_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
