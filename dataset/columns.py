"""Further values of each record, such as weights, captions or several labels, in files of their own beside the index."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from imagefeed.dataset.files import write_atomically

NUMBERS, TEXT, LISTS = "numbers", "text", "lists"
KINDS = (NUMBERS, TEXT, LISTS)
NUMBER_TYPES = (np.dtype("<i8"), np.dtype("<f8"))


class Column(Sequence):
    """The values of a column, by number: `kind` is "numbers", "text" or "lists".

    Of numbers, `values` has all of them: int64 or float64 (records,), or (records, width) if each record has as many. Value n of
    the other kinds is `values[starts[n] : ends[n]]`: the UTF-8 of a text, or an array of numbers.
    """

    def __init__(self, kind: str, values: np.ndarray, starts: np.ndarray | None = None, ends: np.ndarray | None = None):
        self.kind, self.values, self.starts, self.ends = kind, values, starts, ends

    @classmethod
    def of_pieces(cls, kind: str, lengths: Iterable[int], values: np.ndarray) -> "Column":
        """The column whose values are consecutive pieces of `values`, of these lengths."""
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        return cls(kind, values, offsets[:-1], offsets[1:])

    @classmethod
    def joined(cls, parts: "Sequence[Column]") -> "Column":
        """The columns of several datasets one after the other, in memory; raises ValueError if they are of different shapes."""
        kind = parts[0].kind
        if len({(part.kind, part.values.shape[1:]) for part in parts}) > 1:
            raise ValueError("has values of different kinds or lengths")
        if kind == NUMBERS:
            return cls(kind, np.concatenate([part.values for part in parts]))
        values, offsets = zip(*(part.arrays() for part in parts), strict=True)
        return cls.of_pieces(kind, np.concatenate([*map(np.diff, offsets)]), np.concatenate(values))

    def __len__(self) -> int:
        return len(self.values if self.starts is None else self.starts)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return self.take(number)
        if self.starts is None or self.ends is None:
            return self.values[number]
        piece = self.values[self.starts[number] : self.ends[number]]
        return piece.tobytes().decode() if self.kind == TEXT else piece

    def take(self, ids: "np.ndarray | slice | range") -> "Column":
        """The column of some records; text and lists are not copied."""
        if isinstance(ids, range) and ids.step > 0:
            ids = slice(ids.start, ids.stop, ids.step)  # a view, not a copy
        if self.starts is None or self.ends is None:
            return Column(self.kind, self.values[ids])
        return Column(self.kind, self.values, self.starts[ids], self.ends[ids])

    def arrays(self) -> list[np.ndarray]:
        """The arrays as they are stored: the values, and, unless they are numbers, records + 1 offsets of their bounds."""
        if self.starts is None or self.ends is None:
            return [self.values]
        offsets = np.concatenate([[0], np.cumsum(self.ends - self.starts)]).astype(np.int64)
        if np.array_equal(self.starts[1:], self.ends[:-1]):
            first = int(self.starts[0]) if len(self) else 0
            return [self.values[first : first + int(offsets[-1])], offsets]
        pieces = [self.values[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist())]
        return [np.concatenate([self.values[:0], *pieces]), offsets]

    def save(self, root: Path, split: str, name: str) -> list[str]:
        """Writes the files of the column, and returns their names."""
        names = file_names(split, name, self.kind)
        for file, array in zip(names, self.arrays(), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, array)
            write_atomically(root / file, buffer.getvalue())
        return names

    @classmethod
    def of_arrays(cls, kind: str, records: int, values: np.ndarray, offsets: np.ndarray | None = None) -> "Column":
        """The inverse of `arrays`; raises ValueError unless they are a column of so many records."""
        types = (np.dtype(np.uint8),) if kind == TEXT else NUMBER_TYPES
        if values.dtype not in types or values.ndim not in ((1, 2) if kind == NUMBERS else (1,)):
            raise ValueError(f"holds {values.shape} of {values.dtype}")
        if offsets is None:
            if len(values) != records:
                raise ValueError(f"holds {len(values):,} records")
            return cls(kind, values)
        if offsets.dtype != np.int64 or offsets.shape != (records + 1,):
            raise ValueError(f"has {offsets.shape} offsets of {offsets.dtype}")
        if offsets[0] or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError("has offsets outside of its values")
        return cls(kind, values, offsets[:-1], offsets[1:])


def file_names(split: str, name: str, kind: str) -> list[str]:
    """The names of a column's files. Characters that no file name may have, and those that could make two alike, become %XX."""
    stem = f"{split}.column." + re.sub(r"[\x00-\x1f%./]", lambda match: f"%{ord(match[0]):02X}", name)
    return [f"{stem}.npy"] if kind == NUMBERS else [f"{stem}.npy", f"{stem}.offsets.npy"]
