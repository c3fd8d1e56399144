"""The results of a run: summary.json, curves.png, and tables beside what others reached or guessing would."""

import dataclasses
import hashlib
import io
import itertools
import json
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imagefeed.dataset.console import duration, plural
from imagefeed.dataset.files import write_atomically
from imagefeed.dataset.manifest import Manifest
from imagefeed.training.evaluation import TOP
from imagefeed.training.inputs import Inputs
from imagefeed.training.recipes import Recipe
from imagefeed.training.reporting import read_metrics
from imagefeed.training.resume import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The 1,000 classes of ILSVRC-2012, sorted, and the number of images in its validation set. Those of 2010 are others.
CLASSES_SHA256 = "385e0240499426c0"
VALIDATION = 50_000
# Errors on ILSVRC-2012's validation set, top-1 and top-5 in percent.
PUBLISHED = {
    "the paper, ten views": ("40.7", "18.2"),  # Krizhevsky, Sutskever, Hinton 2012, table 2: "1 CNN"
    # The paper gives none for it. Caffe's bvlc_alexnet (42.9 / 19.8) and CaffeNet (42.6 / 19.6), by their readme.md; net 170
    # of cuda-convnet2 (42.3 / 19.6).
    "AlexNets of others, center crop": ("42.3-42.9", "19.6-19.8"),
}


@dataclass(frozen=True)
class Summary:
    """What summary.json holds.

    `samples_per_sec`, `data_wait_pct` and `mfu` (a fraction) are medians over the lines of metrics.jsonl; `samples_per_sec_p5` is
    the rate that the slowest 5 % of them stay below. They are None if no line has them.
    """

    net: str
    dataset: str
    classes: int
    step: int
    epochs: int
    seconds: float
    samples_per_sec: float | None
    samples_per_sec_p5: float | None
    data_wait_pct: float | None
    mfu: float | None
    errors: dict[str, dict[str, float]]  # by views
    published: dict[str, tuple[str, str]]
    run_dir: str
    train_split: str = ""  # empty in a run of version 0.1
    eval_split: str | None = None


def write_summary(run_dir: Path, recipe: Recipe, inputs: Inputs, at: Progress, ten: dict[str, float]) -> Summary:
    """Writes summary.json and curves.png of a finished run; `ten` are its ten-view errors."""
    manifest = inputs.manifest
    lines = read_metrics(run_dir)
    rates, waits, mfus = (
        [line[name] for line in lines if name in line]
        for name in ("throughput/samples_per_sec", "time/data_wait_pct", "throughput/device/mfu")
    )
    errors = {}
    for line in lines:
        if "metrics/val/top1_error" in line:
            errors = {"center crop": {name: line[f"metrics/val/{name}"] for name in ten}, "ten views": ten}
    summary = Summary(
        net=recipe.model,
        dataset=str(manifest.root),
        classes=len(manifest.classes),
        step=at.step,
        epochs=at.epochs,
        seconds=at.seconds,
        samples_per_sec=statistics.median(rates) if rates else None,
        samples_per_sec_p5=float(np.percentile(rates, 5)) if rates else None,
        data_wait_pct=statistics.median(waits) if waits else None,
        mfu=statistics.median(mfus) if mfus else None,
        errors=errors,
        published=published(manifest, recipe, inputs.eval_split),
        run_dir=str(run_dir),
        train_split=inputs.train_split,
        eval_split=inputs.eval_split,
    )
    title = f"{recipe.model} on {manifest.root.resolve().name}"
    draw_curves(run_dir / "curves.png", title, lines, len(manifest.classes))
    write_atomically(run_dir / "summary.json", (json.dumps(dataclasses.asdict(summary), indent=1) + "\n").encode())
    return summary


def published(manifest: Manifest, recipe: Recipe, split: str | None) -> dict[str, tuple[str, str]]:
    """Errors that others reached with this net, if it is the paper's and the split is the validation set of 2012."""
    if split is None or manifest.split(split).records != VALIDATION:
        return {}
    classes = hashlib.sha256("\n".join(sorted(manifest.classes)).encode()).hexdigest()
    papers_net = recipe.model in ("alexnet", "alexnet-code") and recipe.lrn and recipe.overlapping
    return dict(PUBLISHED) if papers_net and classes.startswith(CLASSES_SHA256) else {}


def read_summary(run_dir: Path) -> Summary | None:
    """Reads summary.json; None if there is no such file or it is corrupt."""
    try:
        return Summary(**json.loads((run_dir / "summary.json").read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def show_summary(summary: Summary) -> None:
    """Prints the closing tables, and the result in one last line."""
    epochs = plural(summary.epochs, "epoch")
    validated = f"validated on {summary.eval_split}" if summary.eval_split else "without validation"
    splits = f", trained on split {summary.train_split}, {validated}" if summary.train_split else ""
    print(f"{summary.net} on {summary.dataset} after {epochs}{splits}")
    show_errors(summary.errors, summary.classes, summary.published)
    result = f"{epochs} in {duration(summary.seconds)}"
    if summary.samples_per_sec:
        rows = [
            ("images/s, median", f"{summary.samples_per_sec:,.0f}"),
            ("images/s, slowest 5 %", f"{summary.samples_per_sec_p5:,.0f}"),
            ("time waiting for data", f"{summary.data_wait_pct:.1f} %"),
        ]
        if summary.mfu is not None:  # None in a run that an early version started
            rows.append(("arithmetic used (MFU)", f"{100 * summary.mfu:.1f} %"))
        show_table(("speed", "logged intervals"), rows)
        result += f", {summary.samples_per_sec:,.0f} images/s, {summary.data_wait_pct:.1f} % waiting for data"
    for views, errors in summary.errors.items():
        result += f", {views}: top-1 error {errors['top1_error']:.1f} %"
        if summary.classes > TOP:
            result += f", top-5 {errors['top5_error']:.1f} %"
    print(f"run folder {summary.run_dir}: metrics.jsonl, summary.json, curves.png and other pictures, checkpoints")
    print(result)


def show_errors(
    errors: dict[str, dict[str, float]],
    classes: int,
    others: dict[str, tuple[str, str]] | None = None,
    images: str = "validation images",
) -> None:
    """Prints a table of errors by views, beside those of `others` on the same images, and of guessing."""
    ks = (1, TOP) if classes > TOP else (1,)
    rows = [
        (f"{views}, {plural(found['records'], 'image')}", *(f"{found[f'top{k}_error']:.2f} %" for k in ks))
        for views, found in errors.items()
    ]
    rows += [(name, *(f"{error} %" for error in found)) for name, found in (others or {}).items()]
    rows.append(("guessing", *(f"{guessing_error(k, classes):.2f} %" for k in ks)))
    show_table((images, *(f"top-{k} error" for k in ks)), rows)


def guessing_error(k: int, classes: int) -> float:
    return 100 - 100 * min(k, classes) / classes


def show_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def draw_curves(path: Path, title: str, lines: list[dict[str, float]], classes: int) -> None:
    """Draws loss and validation error over epochs; a dashed line where the learning rate fell by more than half."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    figure.suptitle(title, parse_math=False)
    loss, error = figure.subplots(1, 2)
    validation = [line for line in lines if "metrics/val/loss" in line]
    epochs = [line["epoch"] for line in validation]
    loss.plot([line["epoch"] for line in lines], [line["loss/train"] for line in lines], label="training, with dropout")
    if validation:
        style = {"marker": "o" if len(validation) < 50 else None, "ms": 3}
        loss.plot(epochs, [line["metrics/val/loss"] for line in validation], label="validation, center crop", **style)
        for k in (1, TOP) if classes > TOP else (1,):
            values = [line[f"metrics/val/top{k}_error"] for line in validation]
            (curve,) = error.plot(epochs, values, label=f"top-{k}, {values[-1]:.1f} % at the end", **style)
            guess = guessing_error(k, classes)
            error.axhline(guess, color=curve.get_color(), ls=":", lw=1, label=f"top-{k} by guessing, {guess:.1f} %")
    else:
        error.text(0.5, 0.5, "this dataset has no validation split", ha="center", transform=error.transAxes)
    for axes, name, top in ((loss, "loss (cross-entropy, nats)", None), (error, "validation error (%), center crop", 100)):
        for before, after in itertools.pairwise(lines):
            if after["lr"] < before["lr"] / 2:
                axes.axvline(before["epoch"], color="gray", ls="--", lw=0.8)
        axes.set(xlabel="epoch", ylabel=name, ylim=(0, top), title=name.split(" (")[0])
        axes.set_xlim(0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG. Class and dataset names may have characters that matplotlib's font lacks, which become boxes."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # A quarter of the time of the default of 6, for a tenth more bytes.
        figure.savefig(picture, format="png", pil_kwargs={"compress_level": 2})
    write_atomically(path, picture.getvalue())
