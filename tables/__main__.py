"""Measures the tables of docs/ again: `python -m tables [--save] [--only TEXT] [PAGE ...]`, or `make tables`."""

import shutil
import time
from pathlib import Path

import click

from tables import common

PAGES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\npage = Page(" in path.read_text())


@click.command()
@click.argument("pages", nargs=-1, type=click.Choice(PAGES))
@click.option("--save", is_flag=True, help="Record the cells in tables/results/ and in docs/.")
@click.option("--only", default="", help="Measure only the rows or columns whose name has this text.")
@click.option("--clean", is_flag=True, help=f"Remove the environments and inputs, {common.CACHE}, and end.")
def main(pages: tuple[str, ...], save: bool, only: str, clean: bool) -> None:
    """Measure the tables of PAGES (default: all), each library in an environment of its own, and show what has changed."""
    if clean:
        shutil.rmtree(common.CACHE, ignore_errors=True)
        return
    outcomes, started = {}, time.monotonic()
    for page in pages or PAGES:
        outcomes[page] = common.run_page(page, save, only)
    for page, (changes, failures) in outcomes.items():
        print(f"{page}: {changes} changed cells, {failures} failed measurements")
    print(f"{time.monotonic() - started:.0f} s")
    raise SystemExit(1 if any(changes or failures for changes, failures in outcomes.values()) else 0)


if __name__ == "__main__":
    main()
