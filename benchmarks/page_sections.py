"""What docs/benchmarks.md shows of each script's results: Markdown lines and plots, functions of one result alone."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import page_plots
from benchmarks.page_gpu import show_gpu
from benchmarks.page_growth import show_growth
from benchmarks.page_profile import show_profile_faults, show_tune
from benchmarks.page_tables import Shown, facts, number, table

OURS = ("build", "build, one", "float32", "uint8", "float32, cached", "uint8, cached")
LIMIT = ("decode only",)


def show_rates(result: dict, compared: tuple[str, ...], title: str) -> Shown:
    """Interleaved rows of images per second, and how many times the rate of each the `compared` ones have."""
    rates, ratios = result["images_per_second"], result["ratio"]
    rows = []
    for name, values in rates.items():
        row = [name, number(result["median"][name]), f"{number(min(values))} - {number(max(values))}"]
        rows.append(row + [f"{ratios[f'{mine} / {name}']:.2f}" if mine != name else "" for mine in compared])
    lines = table(["", "images/s", "rounds from - to", *(f"{mine} is so many times" for mine in compared)], rows)
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
    return Shown(lines, {"rates": (title, page_plots.bars(drawn, OURS, LIMIT, "images per second"))})


def show_preprocess(name: str, result: dict) -> Shown:
    shown = show_rates(result, ("build",), "Images per second packed, by imagefeed and its peers")
    spent = [[what, number(us)] for what, us in result["microseconds_of_an_image"].items()]
    images = ", ".join(f"{name} {count:,}" for name, count in result["images"].items())
    lines = ["", f"Images in a round: {images}.", "", *table(["of one image, one step after the other", "microseconds"], spent)]
    return Shown(shown.lines + lines, shown.plots)


def show_loader(name: str, result: dict) -> Shown:
    shown = show_rates(result, ("float32", "uint8"), "Images per second of the loader and its peers")
    settings = (
        f"{result['workers']} workers or threads each, batches of {result['batch_size']}, {result['images']:,} images a round, "
        f"{result['rounds']} rounds. The plot leaves out the cached rows, which decode nothing."
    )
    return Shown([settings, "", *shown.lines], shown.plots)


def show_scale(name: str, result: dict) -> Shown:
    rows = [
        [
            f"{row['images']:,}",
            number(row["listing_s"]),
            number(row["planning_s"]),
            number(row["build_s"]),
            number(row["peak_mb_of_driver_or_worker"]),
        ]
        for row in result["rows"]
    ]
    return Shown(table(["small files", "listing, s", "planning, s", "build in all, s", "peak MB of driver or worker"], rows), {})


def show_cold(name: str, result: dict) -> Shown:
    rows = [
        [
            way,
            *(
                cell
                for kind in ("decoded", "read")
                for cell in (number(result[kind][way]["images_per_second"]), f"{result[kind][way]['of_warm']:.2f}")
            ),
        ]
        for way in result["decoded"]
    ]
    lines = [f"Disk: {result.get('disk', 'as it is')}; {result['records']:,} records, {result['rounds']} rounds.", ""]
    header = ["", "decoded, images/s", "of warm", "only read, images/s", "of warm"]
    rates = {way: [row["images_per_second"]] for way, row in result["decoded"].items()}
    plot = page_plots.bars(rates, tuple(way for way in rates if way != "warm"), ("warm",), "images per second, decoded")
    return Shown(lines + table(header, rows), {"rates": ("Images per second from a cold page cache", plot)})


def show_shuffle(name: str, result: dict) -> Shown:
    lines = [f"{result['records']:,} records of {result['classes']:,} classes, means over {result['epochs']} epochs.", ""]
    for batch, rows in result["global_batch"].items():
        columns = list(rows)
        measures = list(rows[columns[0]])
        cells = [[measure.replace("_", " "), *(number(rows[column][measure]) for column in columns)] for measure in measures]
        lines += [*table([f"global batch {batch}", *columns], cells), ""]
    return Shown(lines[:-1], {})


def show_learning(name: str, result: dict) -> Shown:
    ours, plain = result["imagefeed"], result["plain DataLoader"]
    seeds = len(ours["seeds"])
    rows = [[what.replace("_", " "), ours[what], plain.get(what, "")] for what in ours if what != "seeds"]
    if seeds > 1:
        spread = [statistics.stdev(run["top1_error"] for run in side["seeds"]) for side in (ours, plain)]
        rows.append(["standard deviation of top1 error over the seeds", *spread])
    options = ", ".join(f"{option} {value}" for option, value in result["options"].items())
    about = f"{result['dataset']}; {options}. Means of {seeds} seeds; errors in %, of the centre crop where no other is named."
    note = ["", result["note"]] if "note" in result else []
    return Shown([about, "", *table(["", "imagefeed", "plain DataLoader"], rows), *note], {})


def show_train(name: str, result: dict) -> Shown:
    rows = result["rows"]
    ratios = list(dict.fromkeys(key for row in rows.values() for key in row if key.startswith("to ")))
    cells = [
        [name, number(row["images_per_second"]), f"{row['peak_bytes'] / 1e6:,.0f}", *(row.get(ratio, "") for ratio in ratios)]
        for name, row in rows.items()
    ]
    lines = [f"Batches of {result['batch_size']}.", "", *table(["", "images/s", "peak MB", *ratios], cells)]
    steps = {name: row["rounds"] for name, row in rows.items() if not name.startswith("lrn")}
    ours = tuple(name for name in steps if name.startswith("alexnet"))
    plot = page_plots.bars(steps, ours, (), "images per second")
    return Shown(lines, {"rates": ("Images per second of a training step on a fixed batch", plot)})


def show_facts(name: str, result: dict) -> Shown:
    return Shown(facts(result), {})


def show_bench(name: str, result: dict) -> Shown:
    rows = [[script, number(seconds)] for script, seconds in result["seconds"].items()]
    lines = [
        f"Images: {result['raw']}.",
        "",
        *table(["script", "seconds"], [*rows, ["all", number(sum(result["seconds"].values()))]]),
    ]
    if result["not_run"]:
        lines += ["", *(f"- {script} was not run: {why}." for script, why in result["not_run"].items())]
    return Shown(lines, {})


class Shows(NamedTuple):
    script: str  # and its arguments
    show: Callable[[str, dict], Shown]


@dataclass(frozen=True)
class Section:
    """A question, and the results that answer it, by name; one that ends in * stands for all that begin so."""

    title: str
    question: str
    results: dict[str, Shows]

    def _key(self, name: str) -> str | None:
        return next((key for key in self.results if name == key or (key[-1] == "*" and name.startswith(key[:-1]))), None)

    def takes(self, name: str) -> bool:
        return self._key(name) is not None

    def script(self, name: str) -> str:
        return self.results[self._key(name)].script

    def show(self, name: str, result: dict) -> Shown:
        return self.results[self._key(name)].show(name, result)

    def missing(self, results: dict[str, list[dict]]) -> list[str]:
        absent = [key for key in self.results if not any(self._key(name) == key for name in results)]
        return [f"`python -m benchmarks.{self.results[key].script}`: not measured yet." for key in absent]


class GpuSection(Section):
    """As another; without a result it says what the whole page lacks."""

    def missing(self, results: dict[str, list[dict]]) -> list[str]:
        if any(self.takes(name) for name in results):
            return super().missing(results)
        return [
            "Not measured yet. A figure above whose machine names no GPU is of CPUs alone. What is missing: the loader with "
            "decoding on the GPU (nvJPEG, the hardware decoder and its share), crops and the cache on the device, the hand-over "
            "to PyTorch, training with mixed precision on one GPU and on several, and what the profiler and `tune` say there."
        ]


SECTIONS = (
    Section(
        "Packing",
        "How fast does `build` make records of raw photos, beside what people use for it, and what of many small files?",
        {"preprocess": Shows("preprocess", show_preprocess), "scale": Shows("scale", show_scale)},
    ),
    Section(
        "Killed builds and flipped bits",
        "Does a build that is killed end with the same bytes, and does `verify` find a bit that has flipped?",
        {"kills": Shows("kills", show_facts), "bitflips": Shows("bitflips", show_facts)},
    ),
    Section(
        "Loader",
        "How many batches of random crops of 224 pixels come out of the same 256-pixel JPEGs, on the same cores?",
        {"loader": Shows("loader", show_loader)},
    ),
    Section(
        "Cold disk",
        "What does an epoch cost whose bytes are not in memory?",
        {"cold": Shows("cold", show_cold), "cold-slow": Shows("cold --disk 5000,160", show_cold)},
    ),
    Section("Shuffle", "How well is an epoch shuffled?", {"shuffle": Shows("shuffle", show_shuffle)}),
    Section("Growth", "How do time and memory grow with the number of records?", {"growth": Shows("growth", show_growth)}),
    Section(
        "Training",
        "How fast is a training step on a fixed batch, beside plain PyTorch?",
        {"train": Shows("train", show_train), "train-cuda": Shows("train --device cuda", show_train)},
    ),
    Section(
        "Profile",
        "Does the profiler name the cause that was put in?",
        {"profile_faults": Shows("profile_faults", show_profile_faults)},
    ),
    Section(
        "Tune",
        "How near does `tune` come to an exhaustive sweep?",
        {"tune": Shows("tune", show_tune), "tune-cuda": Shows("tune --device cuda", show_tune)},
    ),
    Section("Learning", "Does it learn as a plain PyTorch loop does?", {"learning-*": Shows("learning", show_learning)}),
    GpuSection("GPU", "And on a GPU?", {"gpu": Shows("gpu", show_gpu)}),
    Section("The last `make bench`", "What was run, and what was not?", {"bench": Shows("all", show_bench)}),
)
