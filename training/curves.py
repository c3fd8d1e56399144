"""Draws the curves of a run."""

import io
import itertools
import warnings
from pathlib import Path

from imagefeed.dataset.files import write_atomically


def draw_curves(path: Path, title: str, lines: list[dict[str, float]], classes: int) -> None:
    """Loss and validation error over epochs, as a PNG; a dashed line where the learning rate fell by more than half."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    figure.suptitle(title, parse_math=False)
    loss, error = figure.subplots(1, 2)
    validation = [line for line in lines if "metrics/val/loss" in line]
    epochs = [line["epoch"] for line in validation]
    loss.plot([line["epoch"] for line in lines], [line["loss/train"] for line in lines], label="training, with dropout")
    if validation:
        marker = "o" if len(validation) < 50 else None
        loss.plot(epochs, [line["metrics/val/loss"] for line in validation], marker=marker, ms=3, label="held out, center crop")
        for k in (1, 5):
            values = [line[f"metrics/val/top{k}_error"] for line in validation]
            (drawn,) = error.plot(epochs, values, marker=marker, ms=3, label=f"top-{k}, {values[-1]:.1f} % at the end")
            guess = 100 - 100 * min(k, classes) / classes
            error.axhline(guess, color=drawn.get_color(), ls=":", lw=1, label=f"top-{k} by guessing, {guess:.1f} %")
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


def save_figure(figure, path: Path) -> None:
    """Writes a matplotlib Figure as a PNG. Names of classes and datasets may have characters that its font lacks: they come
    out as boxes."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # A quarter of the time of the default of 6, for a tenth more bytes.
        figure.savefig(picture, format="png", pil_kwargs={"compress_level": 2})
    write_atomically(path, picture.getvalue())
