"""Turns video files into frames, by ffmpeg."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from imagefeed.preprocess.image import MAX_PIXELS, BadImage
from imagefeed.preprocess.sources.listing import SourceSplit

SUFFIXES = {
    "3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "vob", "webm", "wmv"
}  # fmt: skip
# By its demuxers, not by what the content claims: others read playlists, which are orders to open further files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Video:
    """A video file; its images are one frame for each 1/`frames_per_second` seconds, at most as many as it has."""

    file: str
    split: str
    label: int
    size: int  # bytes
    frames_per_second: float = field(repr=False)
    num_images: ClassVar[int] = 0

    def read(self, root: Path) -> Iterator[tuple[str, int, bytes]]:
        """(FILE#000001, label, PNG) of its frames; raises BadImage where ffmpeg finds fault with it anywhere."""
        if not os.path.isfile(os.path.join(root, self.file)):
            raise BadImage("cannot be read: not a regular file")
        for number, png in enumerate(_frames(os.path.join(root, self.file), self.frames_per_second), start=1):
            yield f"{self.file}#{number:06d}", self.label, png


def part_videos(
    root: Path, split: str, paths: list[str], labels: np.ndarray, frames_per_second: float
) -> tuple[SourceSplit, list[Video]]:
    """Parts a list of files into images and videos, by their suffixes."""
    found = [at for at, path in enumerate(paths) if path.rpartition(".")[2].lower() in SUFFIXES]
    if not found:
        return SourceSplit(paths, labels), []
    videos = []
    for at in found:
        path = os.path.join(root, paths[at])
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        videos.append(Video(paths[at], split, int(labels[at]), size, frames_per_second))
    kept = np.delete(np.arange(len(paths)), found)
    return SourceSplit([paths[at] for at in kept], labels[kept]), videos


def video_options(videos: list[Video], frames_per_second: float) -> dict[str, float]:
    """The option that decides what the videos give; none without videos, whose datasets do not depend on it."""
    return {"frames_per_second": frames_per_second} if videos else {}


def _frames(path: str, frames_per_second: float) -> Iterator[bytes]:
    import ffmpeg  # loads for 50 ms, and only videos need it
    import imageio_ffmpeg

    # Of each 1/fps seconds the first frame, as it is. The filter `fps` would repeat frames to fill gaps, and two frames that
    # claim to lie a day apart would become 86,400.
    tick = f"floor(t*{frames_per_second!r})"
    last = f"floor(prev_selected_t*{frames_per_second!r})"
    command = (
        ffmpeg.input(
            f"file:{path}",
            protocol_whitelist="file",
            format_whitelist=FORMATS,
            max_pixels=MAX_PIXELS,
            err_detect="explode",
            threads=1,  # videos are unpacked side by side
        )
        .output(
            "pipe:",
            map="0:V:0",  # the first video stream that is no cover picture
            vf=f"select='isnan(prev_selected_t)+gt({tick},{last})'",
            fps_mode="passthrough",
            format="image2pipe",
            vcodec="png",
            compression_level=1,  # 140 ms for 1920 x 1080 instead of 560, and files 5 % larger
            pred="up",
            pix_fmt="rgb24",
            sws_flags="accurate_rnd+full_chroma_int+bitexact",
            loglevel="error",
        )
        .global_args("-xerror", "-nostdin")
        .compile(cmd=imageio_ffmpeg.get_ffmpeg_exe())
    )
    with tempfile.TemporaryFile() as complaints:  # a pipe for it could fill up and stop ffmpeg
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
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
        # Some containers that end early give exit code 0. Which complaint comes first is a matter of timing, so it is no
        # part of the reason: reports are to be repeatable.
        complained = os.fstat(complaints.fileno()).st_size > 0
    if failed or complained:
        raise BadImage("a video that ffmpeg cannot read whole; ffmpeg -v error -i FILE -f null - says why")
    if not count:
        raise BadImage("ffmpeg finds no frame in it")


def _read_png(file: BinaryIO) -> bytes | None:
    """One of the pictures that follow each other in a stream; None at its end, or where it ends inside a picture.

    PNG (ISO/IEC 15948), section 5: a signature, then chunks of length, type, data and checksum up to IEND.
    """
    pieces = [file.read(len(PNG_SIGNATURE))]
    if pieces[0] != PNG_SIGNATURE:
        return None
    while len(head := file.read(8)) == 8:
        pieces += (head, file.read(int.from_bytes(head[:4], "big") + 4))
        if head[4:] == b"IEND":
            return b"".join(pieces)
    return None
