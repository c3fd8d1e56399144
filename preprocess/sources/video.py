"""Turns video files into frames with ffmpeg."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from imagefeed.preprocess.decoding import MAX_PIXELS, BadImage
from imagefeed.preprocess.sources.listing import Source, SourceSplit

SUFFIXES = {
    "3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "vob", "webm", "wmv"
}  # fmt: skip
# Only these demuxers: others read playlists, which make ffmpeg open further files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# One thread each, because videos are unpacked in parallel.
INPUT = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": MAX_PIXELS}
INPUT |= {"err_detect": "explode", "threads": 1}
# 0:V:0 is the first video stream that is not a cover picture. Compression level 1 takes 140 ms per 1920 x 1080 frame instead of
# 560, with files 5 % larger.
OUTPUT = {"map": "0:V:0", "fps_mode": "passthrough", "sws_flags": "accurate_rnd+full_chroma_int+bitexact", "loglevel": "error"}
OUTPUT |= {"format": "image2pipe", "vcodec": "png", "compression_level": 1, "pred": "up", "pix_fmt": "rgb24"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Video:
    """A video file. Its images are the first frame of each 1/`frames_per_second` seconds."""

    file: str
    split: str
    label: int
    size: int  # bytes
    frames_per_second: float = field(repr=False)
    num_images: ClassVar[int] = 0

    def read(self, root: Path) -> Iterator[tuple[str, int, bytes]]:
        """(FILE#000001, label, PNG) of its frames. Raises BadImage if ffmpeg reports an error anywhere in it."""
        path = os.path.join(root, self.file)
        if not os.path.isfile(path):
            raise BadImage("cannot be read: not a regular file")
        for number, png in enumerate(_frames(path, self.frames_per_second), start=1):
            yield f"{self.file}#{number:06d}", self.label, png


def separate_videos(source: Source, frames_per_second: float) -> Source:
    """The source with its videos, recognized by their suffixes, moved from the lists of images to the packed files."""
    splits, videos = dict(source.splits), []
    for name, split in source.splits.items():
        found = [at for at, path in enumerate(split.paths) if path.rpartition(".")[2].lower() in SUFFIXES]
        if split.places is not None or not found:
            continue
        for at in found:
            path = os.path.join(source.root, split.paths[at])
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            videos.append(Video(split.paths[at], name, int(split.labels[at]), size, frames_per_second))
        kept = np.delete(np.arange(len(split)), found)
        splits[name] = SourceSplit([split.paths[at] for at in kept], split.labels[kept])
    if not videos:
        return source  # datasets without videos do not depend on the frames per second
    return replace(source, splits=splits, packed=tuple(videos), options={"frames_per_second": frames_per_second})


def _frames(path: str, frames_per_second: float) -> Iterator[bytes]:
    import ffmpeg  # takes 50 ms, and only videos need it
    import imageio_ffmpeg

    # The filter `fps` would repeat frames to fill gaps: two frames with timestamps a day apart would become 86,400.
    tick = f"floor(t*{frames_per_second!r})"
    last = f"floor(prev_selected_t*{frames_per_second!r})"
    select = f"select='isnan(prev_selected_t)+gt({tick},{last})'"
    frames = ffmpeg.input(f"file:{path}", **INPUT).output("pipe:", vf=select, **OUTPUT)
    command = frames.global_args("-xerror", "-nostdin").compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
    with tempfile.TemporaryFile() as messages:  # a pipe could fill up and block ffmpeg
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        count = 0
        try:
            while (png := _read_png(process.stdout)) is not None:
                count += 1
                yield png
            failed = process.wait()
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
        # Truncated files of some formats give exit code 0, but a message. The message is not part of the reason, because
        # which one comes first depends on timing, and reports must be reproducible.
        if failed or os.fstat(messages.fileno()).st_size > 0:
            raise BadImage("a video that ffmpeg cannot read whole; ffmpeg -v error -i FILE -f null - says why")
    if not count:
        raise BadImage("ffmpeg finds no frame in it")


def _read_png(file: BinaryIO) -> bytes | None:
    """The next picture of a stream of PNG files; None at its end, also if it ends inside a picture.

    PNG (ISO/IEC 15948), section 5: a signature, then chunks of length, type, data and checksum, the last of them IEND.
    """
    pieces = [file.read(len(PNG_SIGNATURE))]
    if pieces[0] != PNG_SIGNATURE:
        return None
    while len(head := file.read(8)) == 8:
        pieces += (head, file.read(int.from_bytes(head[:4], "big") + 4))
        if head[4:] == b"IEND":
            return b"".join(pieces)
    return None
