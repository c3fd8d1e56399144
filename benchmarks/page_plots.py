"""The plots of docs/benchmarks.md, as SVG text: dark on a white card, so that they can be read on a page of any colour."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# Okabe and Ito's colors, which the color-blind can tell apart.
OURS, PEERS, LIMIT = "#0072b2", "#e69f00", "#999999"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vP*"
STYLE = {
    "svg.hashsalt": "imagefeed",  # the same ids each time
    "svg.fonttype": "none",  # text stays text: small, and can be searched
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "#222222",
}


@contextmanager
def figure(width: float, height: float, columns: int = 1) -> Iterator[tuple]:
    """A figure of so many inches, its axes, and a list to which its SVG is appended at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        svg: list[str] = []
        yield drawn, drawn.subplots(1, columns, squeeze=False)[0], svg
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        # A trailing blank is nobody's to find in the repository.
        svg.append("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")


def bars(rounds: dict[str, list[float]], ours: tuple[str, ...], limit: tuple[str, ...], unit: str) -> str:
    """Horizontal bars of medians, from the top down, single rounds as points; `ours` and `limit` in colors of their own."""
    medians = [float(np.median(values)) for values in rounds.values()]
    with figure(7.5, 0.7 + 0.32 * len(rounds)) as (_, (axes,), svg):
        colors = [LIMIT if name in limit else OURS if name in ours else PEERS for name in rounds]
        axes.barh(range(len(rounds)), medians, color=colors, height=0.72)
        for at, values in enumerate(rounds.values()):
            axes.plot(values, [at] * len(values), "|", color="#222222", markersize=7, markeredgewidth=1)
        right = max(max(values) for values in rounds.values())
        for at, (median, values) in enumerate(zip(medians, rounds.values())):
            axes.text(max(values) + right * 0.015, at, f"{median:,.0f}", va="center", fontsize=9)
        axes.set_yticks(range(len(rounds)), rounds)
        axes.set_xlim(0, right * 1.12)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.invert_yaxis()
    return svg[0]


def growth(panels: dict[str, dict[str, tuple[list[int], list[float], list[tuple[int, float]]]]]) -> str:
    """Log-log lines of several panels, by the name of the axis: points as measured, then those extrapolated, open ones."""
    with figure(9.5, 4.8, len(panels)) as (drawn, all_axes, svg):
        for axes, (unit, lines) in zip(all_axes, panels.items()):
            for number, (name, (records, values, beyond)) in enumerate(lines.items()):
                style = {"color": LINES[number], "marker": MARKERS[number], "markersize": 5, "linewidth": 1.5}
                axes.plot(records, values, label=name, **style)
                if beyond:
                    x, y = zip((records[-1], values[-1]), *beyond)
                    axes.plot(x, y, linestyle=":", markerfacecolor="white", markevery=slice(1, None), **style)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("records")
            axes.set_ylabel(unit)
            axes.grid(True, color="#e5e5e5", linewidth=0.6)
            axes.set_axisbelow(True)
        handles, names = all_axes[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        drawn.suptitle("filled: measured; open, dotted: extrapolated", fontsize=9)
    return svg[0]


def curves(runs: dict[str, list[list[dict[str, float]]]]) -> str:
    """Loss and top-1 error by epoch: a thin line for each run, a thick one for the mean of a name's runs. All names but the first
    are dashed, so that equal ones can be told apart."""
    with figure(9.5, 4.0, 2) as (drawn, all_axes, svg):
        for axes, (key, unit) in zip(all_axes, {"loss": "validation loss", "top1_error": "top-1 error, %"}.items()):
            for number, (name, curves) in enumerate(runs.items()):
                values = np.array([[epoch[key] for epoch in curve] for curve in curves])
                epochs, style = np.arange(1, values.shape[1] + 1), {"color": LINES[number], "linestyle": "--" if number else "-"}
                axes.plot(epochs, values.T, linewidth=0.6, alpha=0.6, **style)
                axes.plot(epochs, values.mean(0), linewidth=2, label=name, **style)
            axes.set_xlabel("epoch")
            axes.set_ylabel(unit)
            axes.grid(True, color="#e5e5e5", linewidth=0.6)
        handles, names = all_axes[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return svg[0]
