"""Draws docs/benchmarks.md and its plots from the results alone.

    python -m benchmarks.page [--results benchmarks/results] [--out docs/benchmarks.md]

Of each question the newest result of each machine is shown; one that there is none of is "not measured yet".
"""

import json
from pathlib import Path

import click

from benchmarks import RESULTS, ROOT, slug
from benchmarks.page_sections import SECTIONS, Section, Shown

INTRODUCTION = """# Benchmarks

Drawn by `python -m benchmarks.page` from the files of `benchmarks/results/` alone; `make bench` measures again on the machine at
hand and draws it anew. Rows of one table were measured in turns within one run; a figure is the median of the rounds, its ratio
to another the median of the ratios within a round, because a machine's speed drifts. Points in the plots are single rounds.
"""


def load(folder: Path) -> dict[str, list[dict]]:
    """The newest result of each machine, by name of the script's result, machines in alphabetical order."""
    newest: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        for name, result in json.loads(path.read_text()).items():
            known = newest.setdefault(name, {}).get(result["machine"])
            if known is None or known["date"] <= result["date"]:
                newest[name][result["machine"]] = result
    return {name: [found for _, found in sorted(machines.items())] for name, machines in sorted(newest.items())}


def head(section: Section, name: str, result: dict) -> str:
    """Which script made a result, where, when and with what."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"*`python -m benchmarks.{section.script(name)}` on {result['machine']}, {result['date']}; {versions}*"


def render(results: dict[str, list[dict]]) -> dict[str, str]:
    """The page as files: "benchmarks.md", and its plots under "benchmarks/", by name."""
    files: dict[str, str] = {}
    lines = [INTRODUCTION]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", section.question, ""]
        found = [(name, result) for name in sorted(results) if section.takes(name) for result in results[name]]
        for name, result in found:
            shown: Shown = section.show(name, result)
            lines += [*shown.lines, ""]
            for kind, (caption, svg) in shown.plots.items():
                plot = "benchmarks/" + slug(" ".join((name, kind, result["machine"]))) + ".svg"
                files[plot] = svg
                lines += [f"![{caption}]({plot})", ""]
            lines += [head(section, name, result), ""]
        lines += [line for missing in section.missing(results) for line in (missing, "")]
    files["benchmarks.md"] = "\n".join(lines).rstrip() + "\n"
    return files


def write(files: dict[str, str], page: Path) -> None:
    """Writes the page, and its plots into the folder beside it that bears its name; plots of before are deleted."""
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
