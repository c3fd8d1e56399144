"""Draws docs/benchmarks.md and its plots from the results alone.

    python -m benchmarks.page [--results benchmarks/results] [--out docs/benchmarks.md]

For each question the newest result of each machine is shown; if there is none, the question is "not measured yet".
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import page_plots
from benchmarks.harness import RESULTS, ROOT, slug

INTRODUCTION = """# Benchmarks

Drawn by `python -m benchmarks.page` from the files of `benchmarks/results/` alone; `make bench` measures again on the machine at
hand and redraws it. Rows of one table were measured in turns within one run; a figure is the median of the rounds, its ratio to
another the median of the ratios within a round, because a machine's speed drifts. Points in the plots are single rounds.
"""
HEAD = ("date", "machine", "versions")  # in every result
EXTENDED = (1_281_167, 100_000_000)  # records: ImageNet's, and those of large collections of the web
IMAGENET, EPOCHS = EXTENDED[0], 90
GPU_MISSING = (
    "Not measured yet. A figure above whose machine names no GPU is of CPUs alone. Missing: the loader that decodes on "
    "the GPU, the cache on the device, training in mixed precision on one GPU and several, and what `profile` and `tune` say there."
)


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
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return number(value) if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    """A Markdown table; columns of figures are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def facts(result: dict) -> list[str]:
    """Everything in a result: plain values in one table, each list of rows in another."""
    plain: list[list[object]] = []
    tables: list[tuple[str, list[dict]]] = []

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}, {key}" if name else str(key), inner)
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append((name, value))
        else:
            plain.append([name if isinstance(value, list) else name.replace("_", " "), value])

    walk("", {key: value for key, value in result.items() if key not in HEAD})
    lines = table(["", ""], plain) if plain else []
    for name, rows in tables:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(column, "") for column in columns] for row in rows]
        lines += ["", f"{name}:", "", *table([column.replace("_", " ") for column in columns], cells)]
    return lines


def show_facts(result: dict) -> Shown:
    return Shown(facts(result), {})


def show_rates(result: dict, bases: tuple[str, ...], title: str) -> Shown:
    """Interleaved rows of images per second, and the ratios of the `bases` to each."""
    rates, ratios = result["images_per_second"], result["ratio"]
    rows = []
    for name, values in rates.items():
        row = [name, number(result["median"][name]), f"{number(min(values))} - {number(max(values))}"]
        rows.append(row + [f"{ratios[f'{base} / {name}']:.2f}" if base != name else "" for base in bases])
    lines = table(["", "images/s", "slowest - fastest round", *(f"{base} / this" for base in bases)], rows)
    if result.get("left_out"):
        lines += ["", "Left out: " + "; ".join(f"{name} ({why})" for name, why in result["left_out"].items()) + "."]
    same: dict[str, list[str]] = {}
    for name, how in result.get("how", {}).items():
        same.setdefault(how, []).append(name)
    if same:
        lines += ["", "How each is run:", "", *(f"- *{', '.join(names)}*: {how}" for how, names in same.items())]
    if result.get("peers"):
        lines += ["", "Peers: " + ", ".join(f"{package} {version}" for package, version in result["peers"].items()) + "."]
    # Cached rows decode nothing; beside them the others could not be told apart.
    drawn = {name: values for name, values in rates.items() if not name.endswith("cached")}
    ours = tuple(name for name in rates if name.startswith(("build", "float", "uint8", "bfloat16")))
    return Shown(lines, {"rates": (title, page_plots.bars(drawn, ours, ("decode only",), "images per second"))})


def show_preprocess(result: dict) -> Shown:
    shown = show_rates(result, ("build",), "Images per second packed, by imagefeed and its peers")
    spent = [[what, number(us)] for what, us in result["microseconds_of_an_image"].items()]
    images = ", ".join(f"{name} {count:,}" for name, count in result["images"].items())
    lines = ["", f"Images in a round: {images}.", "", *table(["one image, step by step", "microseconds"], spent)]
    return Shown(shown.lines + lines, shown.plots)


def show_loader(result: dict) -> Shown:
    shown = show_rates(result, ("float32", "uint8"), "Images per second of the loader and its peers")
    settings = (
        f"{result['workers']} workers or threads each, batches of {result['batch_size']}, {result['images']:,} images a round, "
        f"{result['rounds']} rounds. The plot leaves out the cached rows, which decode nothing."
    )
    return Shown([settings, "", *shown.lines], shown.plots)


def show_cold(result: dict) -> Shown:
    rows = []
    for way, decoded in result["decoded"].items():
        pair = (decoded, result["read"][way])
        rows.append([way, *(text for row in pair for text in (number(row["images_per_second"]), f"{row['of_warm']:.2f}"))])
    lines = [f"Disk: {result.get('disk', 'as it is')}; {result['records']:,} records, {result['rounds']} rounds.", ""]
    header = ["", "decoded, images/s", "of warm", "only read, images/s", "of warm"]
    rates = {way: [row["images_per_second"]] for way, row in result["decoded"].items()}
    plot = page_plots.bars(rates, tuple(way for way in rates if way != "warm"), ("warm",), "images per second, decoded")
    return Shown(lines + table(header, rows), {"rates": ("Images per second from a cold page cache", plot)})


def show_shuffle(result: dict) -> Shown:
    lines = [f"{result['records']:,} records of {result['classes']:,} classes, means over {result['epochs']} epochs."]
    for batch, rows in result["global_batch"].items():
        measures = list(next(iter(rows.values())))
        cells = [[measure.replace("_", " "), *(number(row[measure]) for row in rows.values())] for measure in measures]
        lines += ["", *table([f"global batch {batch}", *rows], cells)]
    return Shown(lines, {})


def extend(records: list[int], values: list[float], size: int) -> float:
    """On the line through the two measured sizes next to `size`, or the two largest; level where it would fall."""
    if len(records) == 1:
        return values[0]
    right = next((at for at in range(1, len(records)) if records[at] >= size), len(records) - 1)
    rise = max(0.0, (values[right] - values[right - 1]) / (records[right] - records[right - 1]))
    return values[right] + rise * (size - records[right])


def show_growth(result: dict) -> Shown:
    rows, sizes = result["rows"], [row["records"] for row in result["rows"]]
    panels: dict[str, dict] = {}
    tables = []
    for field, unit in {"seconds": "seconds", "peak_mb": "megabytes"}.items():
        lines, cells = panels.setdefault(unit, {}), []
        for step in rows[0]["steps"]:
            found = {row["records"]: statistics.median(row["steps"][step][field]) for row in rows if step in row["steps"]}
            records, values = list(found), list(found.values())
            beyond = {size: extend(records, values, size) for size in EXTENDED}
            lines[step] = (records, values, [(size, value) for size, value in beyond.items() if size > records[-1]])
            measured = [number(found[size]) if size in found else "" for size in sizes]
            cells.append([step, *measured, *(f"*{number(value)}*" for value in beyond.values())])
        header = [f"{row['records']:,}{' linked' if row.get('stretched') else ''}" for row in rows]
        tables += ["", *table([unit, *header, *(f"{size:,} extrapolated" for size in EXTENDED)], cells)]
    linked = "Sizes marked *linked* repeat the shards of the size before, too many to build here. "
    about = (
        f"{result['images']:,} photos, repeated up to each size; batches of {result['batch_size']}; medians of "
        f"{result['rounds']} rounds, for `build` one. {linked if any(row.get('stretched') for row in rows) else ''}Extrapolated "
        "sizes were not measured: they lie on the line through the two sizes next to them. *First batch* and *resume* include "
        "opening. Megabytes are the most that the process held for itself, PyTorch and DALI included, without mapped files; for "
        "`build` the most of the driver or a worker."
    )
    plot = page_plots.growth(panels)
    return Shown([about, *tables], {"": ("Seconds and megabytes of each step by the number of records", plot)})


def show_train(result: dict) -> Shown:
    rows = result["rows"]
    ratios = list(dict.fromkeys(key for row in rows.values() for key in row if key.startswith(("to ", "of "))))
    cells = [
        [name, number(row["images_per_second"]), f"{row['peak_bytes'] / 1e6:,.0f}", *(row.get(ratio, "") for ratio in ratios)]
        for name, row in rows.items()
    ]
    lines = [f"Batches of {result['batch_size']}.", "", *table(["", "images/s", "peak MB", *ratios], cells)]
    if result.get("left_out"):
        lines += ["", *(f"- {name} was left out: {why}." for name, why in result["left_out"].items())]
    steps = {name: row["rounds"] for name, row in rows.items() if not name.startswith("lrn")}
    ours = tuple(name for name in steps if name.startswith("alexnet"))
    plot = page_plots.bars(steps, ours, (), "images per second")
    return Shown(lines, {"rates": ("Images per second of a training step on a fixed batch", plot)})


def show_profile_faults(result: dict) -> Shown:
    rows = []
    for fault, outcomes in result["faults"].items():
        named = Counter(outcome["named"] for outcome in outcomes)
        tried = [outcome["tried"] for outcome in outcomes if outcome.get("tried")]
        gains = ", ".join(f"{one['option']}: {one['predicted']:,.0f} and {one['achieved']:,.0f}" for one in tried)
        rows.append([fault, f"{sum(outcome['right'] for outcome in outcomes)} of {len(outcomes)}", ", ".join(named), gains])
    errors = [abs(error) for error in result["prediction_errors"]]
    line = f"{result['right']} of {result['of']} right, each profiled for about {result['seconds']:.0f} s."
    if errors:
        near = sum(error <= 0.1 for error in errors)
        line += f" Of the {len(errors)} fixes that were applied {near} gained what was predicted, within 10 %."
    return Shown([line, "", *table(["fault", "right", "named", "images/s predicted and achieved by the fix"], rows)], {})


def show_tune(result: dict) -> Shown:
    rows = [["best of the sweep", result["best_of_sweep"], number(result["sweep_s"]), len(result["swept"]), 1.0]]
    rows += [["defaults", "", "", "", result["defaults_of_best"]]]
    for count, row in enumerate(result["tunings"], 1):
        rows.append([f"tuning {count}", row["chosen"], number(row["seconds"]), row["settings_tried"], row["of_best"]])
    near = sum(row["within_3_percent"] for row in result["tunings"])
    line = (
        f"{near} of {len(result['tunings'])} tunings came within 3 % of the best of {len(result['swept'])} settings. A window "
        f"scatters by {result['noise_of_a_window']:.1%}; {result['records']:,} records, batches of {result['batch_size']}."
    )
    return Shown([line, "", *table(["", "settings", "seconds", "settings tried", "of the best"], rows)], {})


def show_learning(result: dict) -> Shown:
    sides = {name: found for name, found in result.items() if isinstance(found, dict) and "seeds" in found}
    names = list(dict.fromkeys(key for side in sides.values() for key in side if key != "seeds"))
    rows = [[name.replace("_", " "), *(side.get(name, "") for side in sides.values())] for name in names]
    runs = [[run["top1_error"] for run in side["seeds"]] for side in sides.values()]
    seeds = min(map(len, runs), default=0)
    if seeds > 1:
        rows.append(["standard deviation of top1 error over the seeds", *map(statistics.stdev, runs)])
    options = ", ".join(f"{option} {value}" for option, value in result["options"].items())
    means = "One seed" if seeds == 1 else f"Means of {seeds} seeds"
    about = f"{result['dataset']}; {options}. {means}; errors in %, of the center crop unless another view is named."
    note = ["", result["note"]] if "note" in result else []
    return Shown([about, "", *table(["", *sides], rows), *note], {})


def show_together(result: dict) -> Shown:
    rows = []
    for name, row in result.items():
        if isinstance(row, dict) and "of synthetic" in row:
            both, alone = row["together"], row["loader"]["images_per_second"]
            cells = [both["images_per_second"], alone, row["of synthetic"], row["of the smaller"], f"{both['waiting']:.1%}"]
            hours = EPOCHS * IMAGENET / both["images_per_second"] / 3600
            rows.append([name, *cells, both["reading us an image"], f"*{number(hours)}*"])
        elif ": " in name:
            rows.append([name, row["images_per_second"] if isinstance(row, dict) else row, *[""] * 6])
    header = ["images/s", "loader alone", "of synthetic", "of the smaller", "waiting", "reading, us an image"]
    header.append(f"hours for {EPOCHS} epochs of ImageNet, computed")
    return Shown([f"Settings: {cell(result['settings'])}.", "", *table(["", *header], rows)], {})


def show_bench(result: dict) -> Shown:
    rows = [[script, number(seconds)] for script, seconds in result["seconds"].items()]
    rows.append(["all", number(sum(result["seconds"].values()))])
    lines = [f"Images: {result['raw']}.", "", *table(["script", "seconds"], rows)]
    if result["not_run"]:
        lines += ["", *(f"- {script} has no full result: {why}." for script, why in result["not_run"].items())]
    return Shown(lines, {})


# By script: title, question, and how its results are shown. "train-cuda" is a result of train, as "train" is.
SECTIONS: dict[str, tuple[str, str, Callable[[dict], Shown]]] = {
    "preprocess": ("Packing", "How fast does `build` turn raw photos into records, beside its peers?", show_preprocess),
    "scale": ("Many small files", "How does `build` grow with the number of images, decoding left aside?", show_facts),
    "kills": ("Killed builds", "Does a build that is killed end with the same bytes?", show_facts),
    "bitflips": ("Flipped bits", "Does `verify` find a bit that has flipped?", show_facts),
    "loader": ("Loader", "How many random crops per second come out of the same JPEGs, on the same cores?", show_loader),
    "cold": ("Cold disk", "What does an epoch cost whose bytes are not in memory?", show_cold),
    "shuffle": ("Shuffle", "How well is an epoch shuffled?", show_shuffle),
    "growth": ("Growth", "How do time and memory grow with the number of records?", show_growth),
    "train": ("Training", "How fast is a training step on a fixed batch, beside plain PyTorch?", show_train),
    "together": ("Together", "What is left of both rates when the loader feeds training?", show_together),
    "profile_faults": ("Profile", "Does the profiler name the cause that was made?", show_profile_faults),
    "tune": ("Tune", "How near does `tune` come to an exhaustive sweep?", show_tune),
    "learning": ("Learning", "Does it learn as a plain PyTorch loop does?", show_learning),
    "ceilings": ("Ceilings", "What can the machine do at most?", show_facts),
    "against": ("Against another commit", "How fast is it beside the commit before a change?", show_facts),
    "bench": ("The last `make bench`", "What was run, and what was not?", show_bench),
}


def load(folder: Path) -> dict[str, list[dict]]:
    """The newest result of each machine, by name of the script's result, machines in alphabetical order."""
    newest: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        for name, result in json.loads(path.read_text()).items():
            known = newest.setdefault(name, {}).get(result["machine"])
            if known is None or known["date"] <= result["date"]:
                newest[name][result["machine"]] = result
    return {name: [found for _, found in sorted(machines.items())] for name, machines in sorted(newest.items())}


def goals(results: dict[str, list[dict]]) -> Iterator[list[object]]:
    """Figure and goal, on one H200 with 16 cores, of the newest GPU results."""
    found = {name: shown[-1] for name, shown in results.items()}
    ratios = found.get("loader-cuda", {}).get("ratio", {})
    for other, goal in (("decode only", 0.9), ("float32, DALI's defaults", 1.3), ("DALI, its defaults", 1.3)):
        yield [f"loader, float32 / {other}", ratios.get(f"float32 / {other}"), goal]
    for row in found.get("tune-cuda", {}).get("tunings", []):
        yield ["tuner, of the sweep's best", row["of_best"], 0.97]
        yield ["tuner, seconds", row["seconds"], 60]
    best: dict[str, float] = {}
    for name, row in found.get("train-cuda", {}).get("rows", {}).items():
        net = name.partition(", ")[0]
        if name.endswith("bfloat16, batch 1024") and " lrn" not in name:
            best[net] = max(best.get(net, 0.0), row["images_per_second"])
    yield ["training, alexnet-owt, batch 1024, images/s", best.get("alexnet-owt"), 60_000]
    if {"alexnet", "alexnet-owt"} <= best.keys():
        yield ["training, alexnet / alexnet-owt", best["alexnet"] / best["alexnet-owt"], 0.85]
    for name, row in found.get("together-cuda", {}).items():
        if isinstance(row, dict) and "of synthetic" in row:
            share, goal = ("of synthetic", 0.98) if "cache" in name else ("of the smaller", 0.95)
            yield [f"together, {name}, {share}", row[share], goal]


def gpu_lines(results: dict[str, list[dict]]) -> list[str]:
    """The table of goals."""
    if not any(name.endswith("-cuda") for name in results):
        return [GPU_MISSING]
    return table(["", "figure", "goal on an H200"], list(goals(results)))


def render(results: dict[str, list[dict]]) -> dict[str, str]:
    """The page as files: "benchmarks.md", and its plots under "benchmarks/", by name."""
    files: dict[str, str] = {}
    lines = [INTRODUCTION]
    for script, (title, question, show) in SECTIONS.items():
        lines += [f"## {title}", "", question, ""]
        found = [(name, result) for name in sorted(results) for result in results[name] if f"{name}-".startswith(f"{script}-")]
        for name, result in found:
            shown = show(result)
            lines += [*shown.lines, ""]
            for kind, (caption, svg) in shown.plots.items():
                plot = "benchmarks/" + slug(" ".join((name, kind, result["machine"]))) + ".svg"
                files[plot] = svg
                lines += [f"![{caption}]({plot})", ""]
            versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
            options = {"cold-slow": " --disk 5000,160"}.get(name, " --device cuda" if name.endswith("-cuda") else "")
            lines += [f"*`python -m benchmarks.{script}{options}` on {result['machine']}, {result['date']}; {versions}*", ""]
        if not found:
            lines += [f"`python -m benchmarks.{'all' if script == 'bench' else script}`: not measured yet.", ""]
    lines += ["## GPU", "", "And on a GPU? `make gpu-bench` runs these scripts with `--device cuda`.", "", *gpu_lines(results)]
    files["benchmarks.md"] = "\n".join(lines).rstrip() + "\n"
    return files


def write(files: dict[str, str], page: Path) -> None:
    """Writes the page, and its plots into the folder "benchmarks" beside it, whose old plots are deleted."""
    plots = page.parent / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for name, text in files.items():
        (page if name == "benchmarks.md" else page.parent / name).write_text(text)


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), default=RESULTS, help="Folder of the results.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "benchmarks.md", help="The page.")
def main(results: Path, out: Path) -> None:
    """Draw the page of all results."""
    files = render(load(results))
    write(files, out)
    print(f"{out}: {len(files) - 1} plots, {sum(map(len, files.values())) / 1e3:.0f} kB in all")


if __name__ == "__main__":
    main()
