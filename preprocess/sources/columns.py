"""Turns the values of further columns, as files spell them, into numbers, texts or lists of numbers."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from imagefeed.dataset.columns import LISTS, NUMBERS, TEXT, Column, file_names
from imagefeed.dataset.console import examples
from imagefeed.dataset.errors import UserError

# Numbers as tables spell them. With a leading zero, as in 007, it is a code, and stays a text.
NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
# Several in one cell: 3 17 4, or 3;17;4, or [3, 17, 4]. Not 3,17, which may be a number with a decimal comma.
SEPARATOR = re.compile(r"\s*[;|]\s*|\s+")
BRACKETS = re.compile(r"\[(.*)\]", re.DOTALL)
EXACT = 2**53  # whole numbers beyond are not exact in float64
LONGEST_NAME = 200  # bytes of a file name, of which file systems allow 255


def refuse_unknown(root: object, wanted: Iterable[str], there: Iterable[str]) -> None:
    """Raises UserError unless all `wanted` columns are there."""
    names = list(dict.fromkeys(there))
    if unknown := [name for name in wanted if name not in names]:
        listed = f"there are {examples(names, 20)}" if names else "there are none with a name"
        raise UserError(f"{root}: no column {unknown[0]!r}, as `columns` asks for; {listed}")


def make_columns(root: object, listed: dict[str, dict[str, Sequence]], notes: list[str]) -> dict[str, dict[str, Column]]:
    """The columns of each split, of which `listed` has the values by split and name. A column has one kind in all splits, which
    `notes` get."""
    made: dict[str, dict[str, Column]] = {split: {} for split in listed}
    for name in dict.fromkeys(name for columns in listed.values() for name in columns):
        if len(file_names("", name, TEXT)[-1].encode()) > LONGEST_NAME or not name:
            raise UserError(f"{root}: the name of column {name[:40]!r} is too long or empty for a file; rename the column")
        try:
            whole = make_column([value for columns in listed.values() for value in columns[name]])
        except UnicodeError:
            raise UserError(f"{root}: column {name} has text that is not UTF-8; convert the file to UTF-8") from None
        notes.append(f"column {name} is kept: {describe(whole)}")
        start = 0
        for split, columns in listed.items():
            end = start + len(columns[name])
            made[split][name] = whole.take(slice(start, end))
            start = end
    return made


def make_column(values: Sequence[Any]) -> Column:
    """Numbers are int64 if all are whole, as spelled, and none is missing, which is NaN; else float64. Lists of numbers that are
    all of one length are numbers too, a row each. All else is text: a missing one is empty, and other types are JSON."""
    found = given = [_plain(value) for value in values]
    if all(value is None or isinstance(value, str) for value in given):
        parsed = [_parse(value or "") for value in given]
        if any(value is not None for value in parsed) and not any(isinstance(value, str) for value in parsed):
            found = parsed
    known = [value for value in found if value is not None]
    if known and all(isinstance(value, (int, float)) for value in known) and _fits(known, len(known) < len(found)):
        return Column(NUMBERS, _numbers(found))
    several = known and not any(isinstance(value, str) for value in known)
    rows = [value if isinstance(value, list) else [] if value is None else [value] for value in found] if several else []
    flat = [value for row in rows for value in row]
    if any(isinstance(value, list) for value in known) and several and _fits(flat, None in flat):
        if len({len(row) for row in rows}) == 1 and flat:
            return Column(NUMBERS, _numbers(flat).reshape(len(rows), -1))
        return Column.of_pieces(LISTS, map(len, rows), _numbers(flat))
    texts = [_text(value).encode() for value in given]
    return Column.of_pieces(TEXT, map(len, texts), np.frombuffer(b"".join(texts), np.uint8))


def describe(column: Column) -> str:
    """A column in words: "whole numbers", "numbers, 3 missing", "text"."""
    if column.kind == TEXT:
        return "text"
    kind = "whole numbers" if column.values.dtype == np.int64 else "numbers"
    if column.kind == LISTS:
        return f"lists of {kind}"
    if column.values.ndim > 1:
        return f"{column.values.shape[1]} {kind} each"
    missing = int(np.isnan(column.values).sum()) if column.values.dtype != np.int64 else 0
    return kind + (f", {missing:,} missing" if missing else "")


def digest(columns: Iterable[Column]) -> str:
    """A hash of the values of a column in all splits."""
    found = hashlib.sha256()
    for column in columns:
        for array in column.arrays():
            found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """None for a missing value, an int, a float, a str, or a list of whatever it holds."""
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, (float, Decimal)):
        return float(value) if value == value else None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)


def _parse(text: str) -> Any:
    """The number or the list of numbers that a cell holds, None if it is empty or nan, else its text."""
    cell = text.strip()
    if cell.lower() in ("", "nan"):
        return None
    if NUMBER.fullmatch(cell):
        return _number(cell)
    brackets = BRACKETS.fullmatch(cell)
    inside = brackets[1].replace(",", " ").strip() if brackets else cell
    parts = SEPARATOR.split(inside) if inside else []
    return [_number(part) for part in parts] if all(map(NUMBER.fullmatch, parts)) else text


def holds_several(text: str) -> bool:
    """Whether a cell holds a list of numbers."""
    return isinstance(_parse(text), list)


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def _fits(values: list, missing: bool) -> bool:
    """Whether an array can hold the numbers exactly."""
    numbers = [value for value in values if value is not None]
    if not all(isinstance(value, (int, float)) for value in numbers):
        return False
    whole = not missing and all(isinstance(value, int) for value in numbers)
    return all(abs(value) < (1 << 63 if whole else EXACT) for value in numbers if isinstance(value, int))


def _numbers(values: list) -> np.ndarray:
    whole = all(isinstance(value, int) for value in values)
    return np.array([np.nan if value is None else value for value in values], np.int64 if whole else np.float64)


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
