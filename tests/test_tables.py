"""The tables of docs/ on other libraries are those that tables/ recorded. What the libraries do, `make tables` measures."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tables import common
from tables.__main__ import PAGES

ROOT = Path(__file__).parents[1]
TINY = '''
"""A page."""
from tables.common import Page

page = Page("tiny")
table = page.table("sums", ["What", "sum", "text"])


@table.add("one and one", [])
def two():
    return [1 + 1, "two"]


by_library = page.table("libraries", ["Input"], ["a", "b"])
for name in ("first", "second"):
    by_library.add(name, [])(lambda name=name: [len(name), name[0]])


@by_library.add("broken", [])
def broken():
    raise ValueError("it is broken")
'''


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_what_was_recorded(name):
    page = importlib.import_module(f"tables.{name}").page
    text, recorded = page.document.read_text(), page.recorded()
    assert page.tables and set(recorded) == {table.name for table in page.tables}
    for table in page.tables:
        rows = recorded[table.name]
        assert list(rows) == [job.label for job in table.measurements]
        assert [row["packages"] for row in rows.values()] == [job.packages for job in table.measurements]
        shown = table.render({label: row["cells"] for label, row in rows.items()})
        assert f"<!-- table: {table.name} -->\n{shown}\n" in text


def test_pages_and_scripts_are_short():
    for name in PAGES:
        assert len(importlib.import_module(f"tables.{name}").page.document.read_text().splitlines()) <= 150
    for path in (ROOT / "tables").glob("*.py"):
        assert path.name == "common.py" or len(path.read_text().splitlines()) <= 250, path


def run(folder, *options):
    variables = os.environ | {"IMAGEFEED_TABLES": str(folder / "cache"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-m", "tables", *options], cwd=folder, env=variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_changed_cell_and_a_failed_library_are_shown(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("__init__.py", "__main__.py", "common.py"):
        shutil.copy(ROOT / "tables" / name, tmp_path / "tables")
    (tmp_path / "tables" / "tiny.py").write_text(TINY)
    document = tmp_path / "docs" / "tiny.md"
    document.write_text("# Tiny\n\n<!-- table: sums -->\n| old |\n\n<!-- table: libraries -->\n\nThe end.\n")
    code, shown, errors = run(tmp_path, "--save")
    assert code == 1 and "ValueError: it is broken" in errors  # and the others are measured all the same
    assert "tiny: 0 changed cells, 1 failed measurements" in shown
    assert document.read_text() == (
        "# Tiny\n\n<!-- table: sums -->\n| What | sum | text |\n|---|---|---|\n| one and one | 2 | two |\n\n"
        "<!-- table: libraries -->\n| Input | first | second |\n|---|---|---|\n| a | 5 | 6 |\n| b | f | s |\n\nThe end.\n"
    )
    script = tmp_path / "tables" / "tiny.py"
    script.write_text(script.read_text().replace("1 + 1", "1 + 2").split("\n\n@by_library")[0])
    code, shown, _ = run(tmp_path, "tiny")
    assert code == 1 and "| one and one | was 2, now 3 | two |" in shown and "tiny: 1 changed cells, 0 failed" in shown
    assert "| 2 |" in document.read_text()
    assert run(tmp_path, "tiny", "--save")[0] == 1
    assert run(tmp_path, "tiny")[0] == 0 and "| 3 |" in document.read_text()
    assert run(tmp_path, "--clean")[0] == 0 and not (tmp_path / "cache").exists()


def test_numbers_within_the_tolerance_are_the_same():
    assert common.same("1,020 ms", "1,000 ms", 0.05) and not common.same("1,020 ms", "1,000 ms", 0.01)
    assert not common.same("1,020 ms", "1,020 us", 0.5) and not common.same("2", "3", 0)
    assert not common.same("1 of 2", "1 of 2 of 3", 0.5)
