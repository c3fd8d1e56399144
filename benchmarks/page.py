"""Draws docs/benchmarks.md and its plots from the results alone.

    python -m benchmarks.page [--results benchmarks/results] [--out docs/benchmarks.md]

For each question the newest result of each machine is shown; if there is none, the question is "not measured yet".
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from benchmarks import page_plots
from benchmarks.harness import RESULTS, ROOT, slug

INTRODUCTION = """# Benchmarks

Drawn by `python -m benchmarks.page` from the files of `benchmarks/results/` alone; `make bench` measures again on the machine at
hand and redraws it. Rows of one table were measured in turns within one run; a figure is the median of the rounds, its ratio to
another the median of the ratios within a round, because a machine's speed drifts. Points in the plots are single rounds.
"""
PAGE = ROOT / "docs" / "benchmarks.md"
SHORT = 200  # characters of several values in one cell, at most
HEAD = ("date", "machine", "versions")  # in every result
EXTENDED = (1_281_167, 100_000_000)  # records: ImageNet's, and those of large collections of the web
GPU_MISSING = (
    "Not measured yet. A figure above whose machine names no GPU is of CPUs alone. Missing: decoding, crops and the cache on the "
    "GPU, training in mixed precision on one GPU and several, and what the profiler and the tuner say there."
)
OURS = ("build", "float", "uint8", "bfloat16", "imagefeed", "alexnet", "cold", "Dataset")  # how rows of imagefeed begin
# Scripts whose CPU results depend on the loader, and since when it has decoded by imagefeed's own decoder.
OF_THE_LOADER, NATIVE_SINCE = ("loader", "cold", "growth", "together", "profile_faults", "tune", "learning"), "2026-11-29"
DALI_LOADER = "of the earlier loader, which decoded by DALI"
Plots = dict[str, tuple[str, str]]  # by kind: caption, SVG


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


def is_rounds(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, float) for one in value)


def facts(result: dict, hidden: tuple[str, ...] = ()) -> list[str]:
    """Everything in a result: plain values in one table; rounds of rows, rows of figures, and lists of rows each in another."""
    plain: list[list[object]] = []
    tables: list[str] = []

    def add(name: str, header: list[str], rows: list[list[object]]) -> None:
        tables.extend(["", f"{name.replace('_', ' ')}:", "", *table([title.replace("_", " ") for title in header], rows)])

    def walk(name: str, value: object) -> None:
        rows = value
        if isinstance(value, dict) and value and all(map(is_rounds, value.values())):
            spread = {row: [number(statistics.median(rounds)), min(rounds), max(rounds)] for row, rounds in value.items()}
            add(name, ["", "median", "lowest", "highest"], [[row, *cells] for row, cells in spread.items()])
        elif isinstance(value, dict) and len(value) > 1 and all(isinstance(row, dict) for row in value.values()) and not any(
            isinstance(inner, dict) for row in value.values() for inner in row.values()
        ):  # fmt: skip
            walk(
                name, [{"": row} | {key: one for key, one in found.items() if not is_rounds(one)} for row, found in value.items()]
            )
        elif isinstance(value, dict) and (len(cell(value)) > SHORT or any(isinstance(inner, dict) for inner in value.values())):
            for key, inner in value.items():
                walk(f"{name}, {key}" if name else str(key), inner)
        elif isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            add(name, columns, [[row.get(column, "") for column in columns] for row in rows])
        else:
            plain.append([name if isinstance(value, list) else name.replace("_", " "), value])

    for key, value in result.items():
        if key not in (*HEAD, *hidden):
            walk(key, value)
    return ((table(["", ""], plain) if plain else []) + tables)[0 if plain else 1 :]


def show_facts(result: dict) -> tuple[list[str], Plots]:
    """Rates with their ratios first and as a plot, if there are any, then the rest."""
    rates, ratios, lines = result.get("images_per_second", {}), result.get("ratio", {}), []
    if rates:
        bases = list(dict.fromkeys(pair.partition(" / ")[0] for pair in ratios))
        header = ["", "images/s", "slowest - fastest round", *(f"{base} / this" for base in bases)]
        rows = [
            [name, number(statistics.median(values)), f"{number(min(values))} - {number(max(values))}"]
            + [f"{ratios[f'{base} / {name}']:.2f}" if base != name else "" for base in bases]
            for name, values in rates.items()
        ]
        lines = [*table(header, rows), ""]
    elif isinstance(result.get("rows"), dict):
        rates = {name: row["rounds"] for name, row in result["rows"].items() if "rounds" in row and not name.startswith("lrn")}
    elif "decoded" in result:
        rates = {name: [row["images_per_second"]] for name, row in result["decoded"].items()}
    # Cached rows decode nothing; beside them the others could not be told apart.
    drawn = {name: values for name, values in rates.items() if not name.endswith("cached")}
    ours = tuple(name for name in drawn if name.startswith(OURS))
    lines += facts(result, ("images_per_second", "median", "ratio"))
    if not drawn:
        return lines, {}
    return lines, {"rates": ("Images per second", page_plots.bars(drawn, ours, ("decode only", "warm"), "images per second"))}


def extend(records: list[int], values: list[float], size: int) -> float:
    """On the line through the two measured sizes next to `size`, or the two largest; level where it would fall."""
    if len(records) == 1:
        return values[0]
    right = next((at for at in range(1, len(records)) if records[at] >= size), len(records) - 1)
    rise = max(0.0, (values[right] - values[right - 1]) / (records[right] - records[right - 1]))
    return values[right] + rise * (size - records[right])


def show_growth(result: dict) -> tuple[list[str], Plots]:
    rows = result["rows"]
    panels: dict[str, dict] = {}
    tables = []
    for field, unit in {"seconds": "seconds", "peak_mb": "megabytes"}.items():
        lines, cells = panels.setdefault(unit, {}), []
        for step in rows[0]["steps"]:
            found = {row["records"]: statistics.median(row["steps"][step][field]) for row in rows if step in row["steps"]}
            records, values = list(found), list(found.values())
            beyond = {size: extend(records, values, size) for size in EXTENDED}
            lines[step] = (records, values, [(size, value) for size, value in beyond.items() if size > records[-1]])
            measured = [number(found[row["records"]]) if row["records"] in found else "" for row in rows]
            cells.append([step, *measured, *(f"*{number(value)}*" for value in beyond.values())])
        header = [f"{row['records']:,}{' linked' if row.get('stretched') else ''}" for row in rows]
        tables += ["", *table([unit, *header, *(f"{size:,} extrapolated" for size in EXTENDED)], cells)]
    about = (
        f"{result['images']:,} photos, repeated up to each size; batches of {result['batch_size']}; {result['rounds']} rounds, "
        "for `build` one. *Linked* sizes repeat the shards of the size before. Extrapolated ones lie on the line through the two "
        "next to them. *First batch* and *resume* include opening. Megabytes are what the process held, without mapped files."
    )
    return [about, *tables], {"": ("Seconds and megabytes of each step by the number of records", page_plots.growth(panels))}


def show_profile_faults(result: dict) -> tuple[list[str], Plots]:
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
        line += f" Fixes that were applied and gained what was predicted, within 10 %: {near} of {len(errors)}."
    return [line, "", *table(["fault", "right", "named", "images/s predicted and achieved by the fix"], rows)], {}


def show_learning(result: dict) -> tuple[list[str], Plots]:
    sides = {name: found for name, found in result.items() if isinstance(found, dict) and "seeds" in found}
    runs = [[run["top1_error"] for run in side["seeds"]] for side in sides.values()]
    names = list(dict.fromkeys(key for side in sides.values() for key in side if key != "seeds"))
    rows = [["seeds", *map(len, runs)]]
    rows += [[name.replace("_", " "), *(side.get(name, "") for side in sides.values())] for name in names]
    if max(map(len, runs), default=0) > 1:
        spread = [statistics.stdev(values) if len(values) > 1 else "" for values in runs]
        rows.append(["standard deviation of top1 error over the seeds", *spread])
        rows.append(["top1 error of each seed", *runs])
    about = f"{result['dataset']}; {cell(result['options'])}. Errors in %, of the center crop unless another view is named."
    notes = [result["note"]] if "note" in result else []
    notes += [f"{name.capitalize()}: {found}." for name, found in result.items() if name.startswith("equal")]
    curves = {name: [run["curve"] for run in side["seeds"]] for name, side in sides.items() if "curve" in side["seeds"][0]}
    plots = {"curves": ("Validation by epoch", page_plots.curves(curves))} if curves else {}
    return [about, "", *table(["", *sides], rows), *(["", " ".join(notes)] if notes else [])], plots


def show_remote(result: dict) -> tuple[list[str], Plots]:
    return show_facts({name: found for name, found in result.items() if name != "each"})


# By script: title, question, and how its results are shown. "train-cuda" is a result of train, as "train" is.
SECTIONS: dict[str, tuple[str, str, Callable[[dict], tuple[list[str], Plots]]]] = {
    "preprocess": ("Packing", "How fast does `build` turn raw photos into records, beside its peers?", show_facts),
    "upload": ("Stores", "What does a build to a URL cost, or one from tars at a URL?", show_facts),
    "scale": ("Many small files", "How does `build` grow with the number of images, decoding left aside?", show_facts),
    "kills": ("Killed builds", "Does a build that is killed end with the same bytes?", show_facts),
    "bitflips": ("Flipped bits", "Does `verify` find a bit that has flipped?", show_facts),
    "loader": ("Loader", "How many random crops per second come out of the same JPEGs, on the same cores?", show_facts),
    "loader_growth": ("Loader, as the work grows", "What do cores, batch size and image size cost?", show_facts),
    "augment": ("Augmentation", "How fast are RandAugment and mixup on one core, beside torchvision?", show_facts),
    "dataset": ("Single images", "How fast is `Dataset` in a DataLoader, on the same cores?", show_facts),
    "decoders": ("Decoders", "How many JPEGs does one core decode, beside Python's other decoders?", show_facts),
    "cold": ("Cold disk", "What does an epoch cost whose bytes are not in memory?", show_facts),
    "remote": ("Remote datasets", "What does a dataset in a store cost, beside a local one, the link and peers?", show_remote),
    "shuffle": ("Shuffle", "How well is an epoch shuffled?", show_facts),
    "growth": ("Growth", "How do time and memory grow with the number of records?", show_growth),
    "train": ("Training", "How fast is a training step on a fixed batch, beside plain PyTorch?", show_facts),
    "together": ("Together", "What is left of both rates when the loader feeds training?", show_facts),
    "profile_faults": ("Profile", "Does the profiler name the cause that was made?", show_profile_faults),
    "tune": ("Tune", "How near does `tune` come to an exhaustive sweep?", show_facts),
    "learning": ("Learning", "Does it learn as a plain PyTorch loop does?", show_learning),
    "ceilings": ("Ceilings", "What can the machine do at most?", show_facts),
    "against": ("Against another commit", "How fast is it beside the commit before a change?", show_facts),
    "gpu_bytes": (
        "Bytes of a step on a GPU",
        "What would a step move and launch? Counted without a GPU, not measured.",
        show_facts,
    ),
    "layers": ("Layers", "Which form of each layer of the paper's net is fastest?", show_facts),
    "gpu_first": ("Feed of a GPU", "How fast is the loader by each decoder, and by both?", show_facts),
    "bench": ("The last `make bench`", "What was run, and what was not?", show_facts),
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
    rates = found.get("gpu_first-cuda", {}).get("images a second", {})
    for decoder in ("dali", "native", "both") if rates else ():
        fastest = max((rate for name, rate in rates.items() if f"decoder {decoder}" in name), default=None)
        yield [f"loader, decoder {decoder}, batch 512, images/s", fastest, 60_000]
    best: dict[str, float] = {}
    for name, row in found.get("train-cuda", {}).get("rows", {}).items():
        net = name.partition(", ")[0]
        if name.endswith("bfloat16, batch 1024") and " lrn" not in name:
            best[net] = max(best.get(net, 0.0), row["images_per_second"])
    yield ["training, alexnet-owt, batch 1024, images/s", best.get("alexnet-owt"), 60_000]
    if {"alexnet", "alexnet-owt"} <= best.keys():
        yield ["training, alexnet / alexnet-owt", best["alexnet"] / best["alexnet-owt"], 0.85]
    for name, row in found.get("together-cuda", {}).get("rows", {}).items():
        share, goal = ("of synthetic", 0.98) if "cache" in name else ("of the smaller", 0.95)
        yield [f"together, {name}, {share}", row.get(share), goal]


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
            shown, plots = show(result)
            lines += [*shown, ""]
            for kind, (caption, svg) in plots.items():
                plot = "benchmarks/" + slug(" ".join((name, kind, result["machine"]))) + ".svg"
                files[plot] = svg
                lines += [f"![{caption}]({plot})", ""]
            options = {"cold-slow": " --disk 5000,160"}.get(name, " --device cuda" if name.endswith("-cuda") else "")
            command = f"`python -m benchmarks.{script}{options}`"
            loader = f"; {DALI_LOADER}" if script in OF_THE_LOADER and result["date"] < NATIVE_SINCE else ""
            lines += [f"*{command} on {result['machine']}, {result['date']}; {cell(result['versions'])}{loader}*", ""]
        if not found:
            lines += [f"`python -m benchmarks.{'all' if script == 'bench' else script}`: not measured yet.", ""]
    lines += ["## GPU", "", "And on a GPU? `make gpu-first` measures there what matters most.", "", *gpu_lines(results)]
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
@click.option("--out", type=click.Path(path_type=Path), default=PAGE, help="The page.")
def main(results: Path, out: Path) -> None:
    """Draw the page of all results."""
    files = render(load(results))
    write(files, out)
    print(f"{out}: {len(files) - 1} plots, {sum(map(len, files.values())) / 1e3:.0f} kB in all")


if __name__ == "__main__":
    main()
