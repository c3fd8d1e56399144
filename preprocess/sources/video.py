"""Lists videos as packed files of frames."""

import os
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.decoding import BadImage
from imagefeed.preprocess.sources.cuts import UNREADABLE, find_repair
from imagefeed.preprocess.sources.frames import Failed, decode_frames
from imagefeed.preprocess.sources.listing import Root, Source, SourceSplit, read_through

SUFFIXES = {
    "3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "vob", "webm", "wmv"
}  # fmt: skip


@dataclass(frozen=True)
class Video:
    """A video file. Its images are the first frame of each 1/`frames_per_second` seconds."""

    file: str
    split: str
    label: int
    size: int  # bytes
    frames_per_second: float = field(repr=False)
    num_images: ClassVar[int] = 0

    def read(self, root: Root) -> Generator[tuple[str, int, bytes] | None, None, str]:
        """Yields (FILE#000001, label, PNG) of its frames; returns a note for the report.

        None takes back those that came before. Raises BadImage if it is damaged anywhere.
        """
        path = os.path.join(str(root), self.file)
        if not os.path.isfile(path):
            raise BadImage("cannot be read: not a regular file")
        try:
            return (yield from self._frames(path))
        except BadImage:
            read_through(path)  # to ffmpeg, a failed read is but one more kind of damage
            raise

    def _frames(self, path: str) -> Generator[tuple[str, int, bytes] | None, None, str]:
        repair, notes = None, []
        while True:
            try:
                for number, png in enumerate(decode_frames(path, self.frames_per_second, notes, repair), start=1):
                    yield f"{self.file}#{number:06d}", self.label, png
                return "; ".join(notes)
            except Failed:
                if repair is not None:
                    raise BadImage(UNREADABLE) from None
            repair = find_repair(path)
            yield None


def separate_videos(source: Source, frames_per_second: float) -> Source:
    """The source with its videos, recognized by their suffixes, moved from the lists of images to the packed files."""
    splits, videos = dict(source.splits), []
    for name, split in source.splits.items():
        found = [at for at, path in enumerate(split.paths) if path.rpartition(".")[2].lower() in SUFFIXES]
        if split.places is not None or not found:
            continue
        if split.columns:
            raise UserError(f"{source.root}: {split.paths[found[0]]} is a video, and `columns` is for images only; leave it out")
        for at in found:
            path = os.path.join(source.root, split.paths[at])
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            videos.append(Video(split.paths[at], name, int(split.labels[at]), size, frames_per_second))
        kept = np.delete(np.arange(len(split)), found)
        splits[name] = SourceSplit([split.paths[at] for at in kept], split.labels[kept])
    if not videos:
        return source  # datasets without videos do not depend on the frames per second
    options = {**source.options, "frames_per_second": frames_per_second}
    return replace(source, splits=splits, packed=tuple(videos), options=options)
