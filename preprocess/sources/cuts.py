"""Distinguishes videos that were cut or joined without re-encoding from damaged ones."""

import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming
from imagefeed.preprocess.ffmpeg import ffmpeg_path, version
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.ffmpeg import FORMATS, Ffmpeg
from imagefeed.preprocess.sources.frames import LENIENT, Failed, Repair, decode_frames, packet_filter

UNREADABLE = "a video that ffmpeg cannot read whole; ffmpeg -v error -i FILE -f null - says why"
KEY, CORRUPT = 1, 2  # AV_PKT_FLAG_* of ffmpeg's packet.h
DECODER = re.compile(rf"\[(?!(?:{FORMATS.replace(',', '|')})\b)\w+ @ ")  # how a decoder's message begins
PACKETS_AT_ONCE = 1 << 14  # 3 MB
FORGET = "mmco: unref short failure"  # H.264 is to forget a frame that it does not have
FAILED_PACKET = "Error submitting packet to decoder"


def find_repair(path: str) -> Repair:
    """How to decode a video that failed. Raises BadImage if it is damaged, UserError if ffmpeg is to blame.

    A stream that was cut without decoding it may begin with frames that need some from before the cut: those before the first
    keyframe, and those that follow the keyframe in the file but precede it in time (open groups of pictures). Their packets are
    dropped, and all that the decoder reports of the others is damage, but for one harmless kind in the first group.
    """
    check_ffmpeg()
    # Without -copyinkf, packets before the first keyframe would not be listed.
    with Ffmpeg(path, {}, {"c": "copy", "copyinkf": None, "format": "framecrc"}) as run:
        packets = [_Packet.parse(line) for line in run.output if line[:1] != b"#"]
        code, errors, warnings = run.finish()
    # Where recordings were joined, the demuxer takes the last packet before the joint for corrupt, or the one before that if the
    # parser lags behind. Corrupt packets elsewhere have lost data, as has one before a keyframe if nothing else tells a joint.
    corrupt = [at for at, packet in enumerate(packets) if packet.flags & CORRUPT]
    joints = {next((key for key in (at + 1, at + 2) if key < len(packets) and packets[key].flags & KEY), 0) for at in corrupt}
    # Nothing is decoded here, but ffmpeg tries the start of each stream, sound included, so decoders may complain.
    if code or 0 in joints or any(not DECODER.match(line) for line in errors):
        raise BadImage(UNREADABLE)
    # Where the clock simply goes on after a joint, frames may need some from before it, which are there. ffmpeg mends big jumps.
    jumps = sum("timestamp discontinuity" in line for line in warnings)
    if len(joints) > jumps and len(joints) > _table_jumps(path):
        raise BadImage(UNREADABLE)
    starts = [0, *(joint for joint in sorted(joints) if jumps or packets[joint].is_apart(packets[joint - 1]))]
    groups = [_first_group(packets, start) for start in starts]
    dropped = [at for group in groups for at in sorted(group.undecodable)]
    kept = [at for group in groups for at in range(group.key, group.end) if at not in group.undecodable]
    complaints = _complaints_about_cuts(path, kept, Counter(errors))
    if not (dropped or joints or errors or complaints):
        raise BadImage(UNREADABLE)
    return Repair(dropped, len(joints), bool(dropped or complaints), Counter(errors) + complaints)


def _table_jumps(path: str) -> int:
    """How often the counter of an MPEG transport stream's table of programs jumps (ISO/IEC 13818-1, section 2.4.3)."""
    for size, at in ((188, 0), (192, 4)):
        found = [np.empty((0, 4), np.uint8)]
        with naming(path), open(path, "rb") as file:
            while len(packets := file.read(size * PACKETS_AT_ONCE)) >= size:
                rows = np.frombuffer(packets, np.uint8, len(packets) // size * size).reshape(-1, size)
                found.append(rows[:, at : at + 4].copy())
        heads = np.concatenate(found)
        if (heads[:, 0] == 0x47).all():
            tables = heads[(heads[:, 1] & 0x1F == 0) & (heads[:, 2] == 0)]
            return int(np.count_nonzero(np.diff(tables[:, 3] & 15) & 15 != 1))
    return 0


class _Packet(NamedTuple):
    dts: int | None
    pts: int | None
    duration: int
    flags: int

    @classmethod
    def parse(cls, line: bytes) -> "_Packet":
        """From a line of ffmpeg's framecrc: stream, dts, pts, duration, size, checksum, and the flags if they are not KEY."""
        fields = line.decode().replace(" ", "").split(",")
        dts, pts, duration = (int(field) if re.fullmatch(r"-?\d{1,18}", field) else None for field in fields[1:4])
        flags = int(fields[6][2:], 16) if fields[6:] and fields[6].startswith("F=") else KEY
        return cls(dts, pts, duration or 0, flags)

    @property
    def shown(self) -> float:
        """When it is shown; some containers only say when it is decoded, or not even that."""
        return next((time for time in (self.pts, self.dts) if time is not None), math.nan)

    def is_apart(self, before: "_Packet") -> bool:
        return self.dts is None or before.dts is None or not 0 < self.dts - before.dts <= 2 * before.duration


class _Group(NamedTuple):
    key: int  # the position of the first keyframe's packet
    end: int  # that of the next one, or of the end
    undecodable: set[int]


def _first_group(packets: list[_Packet], start: int) -> _Group:
    """The first group of pictures from `start` on; undecodable are packets before its keyframe, or shown before it."""
    keys = (at for at in range(start, len(packets)) if packets[at].flags & KEY)
    key, end = next(keys, len(packets)), next(keys, len(packets))
    shown = [packet.shown for packet in packets[key:end]]
    early = {key + at for at, time in enumerate(shown) if time < shown[0]}
    return _Group(key, end, set(range(start, key)) | early)


def _complaints_about_cuts(path: str, kept: list[int], known: Counter) -> Counter:
    """What H.264's decoder says of the packets `kept`, if it is only about frames that were cut away; else nothing."""
    with Ffmpeg(path, packet_filter(kept, keep=True), {"format": "null"}, *LENIENT) as run:
        _, errors, _ = run.finish()
    news = Counter(errors) - known
    forget, failed = (sum(news[line] for line in news if text in line) for text in (FORGET, FAILED_PACKET))
    return news if forget == failed and forget + failed == news.total() else Counter()


def check_ffmpeg() -> None:
    """Raises UserError if ffmpeg cannot read even a video that it made itself, so the videos are not at fault."""
    if fault := _fault_of(ffmpeg_path()):
        raise UserError(f"{ffmpeg_path()}: {fault}; unset IMAGEIO_FFMPEG_EXE, and install imageio-ffmpeg 0.8 or newer")


@functools.cache
def _fault_of(program: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.avi"
        pixels = "-loglevel error -f rawvideo -pix_fmt rgb24 -video_size 16x16 -i pipe:".split()
        made = subprocess.run([program, *pixels, "-vcodec", "mjpeg", path], input=bytes(3 * 16 * 16), capture_output=True)
        try:
            frames = [] if made.returncode else list(decode_frames(path, 1.0, [], Repair([1], 0, True, Counter())))
        except (Failed, BadImage):
            frames = []
    return "" if frames else f"ffmpeg {version()} lacks options or formats that videos need"
