"""Decodes frames of a video with ffmpeg. A video that is damaged or ends early is rejected as a whole."""

import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any, NamedTuple

from imagefeed.dataset.console import plural
from imagefeed.preprocess.ffmpeg import ACCURATE
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.ffmpeg import Ffmpeg

# Compression level 1 takes 140 ms per 1920 x 1080 frame instead of 560, with files 5 % larger.
PNG: dict[str, Any] = {"fps_mode": "passthrough", "sws_flags": ACCURATE, "format": "image2pipe"}
PNG |= {"vcodec": "png", "compression_level": 1, "pred": "up", "pix_fmt": "rgb24"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Matroska, WebM, FLV and ASF round timestamps to whole milliseconds, so the distance of two frames may be 1 ms short.
ROUNDING_S = 0.0011
# Square pixels, by enlarging one side, as the HTML Standard prescribes for `video`. No format for cameras or discs goes beyond 4.
SQUARE = "scale=w='iw*clip(sar,1,4)':h='ih*clip(1/sar,1,4)'"
CURVES = {16: "PQ", 18: "HLG"}  # transfer characteristics of HDR, ITU-T H.273, table 3
STRICT = ("-xerror",)
LENIENT = ("-max_error_rate", "1")


class Failed(Exception):
    """ffmpeg has reported an error, so the frames that came so far must not be used."""


class Repair(NamedTuple):
    """How to decode a video that is not damaged, but has packets that cannot be decoded."""

    dropped: list[int]  # the positions of these packets in the video stream
    joints: int  # places where another recording begins
    cut: bool  # from a longer recording
    harmless: Counter  # messages of ffmpeg that are no sign of damage

    def notes(self) -> list[str]:
        notes = [f"{self.joints + 1} recordings joined in one file"] if self.joints else []
        if self.cut:
            lost = plural(len(self.dropped), "frame") if self.dropped else "no frame"
            notes.append(f"cut from a longer video; {lost} left out that cannot be decoded without those before the cut")
        return notes


def decode_frames(path: str, frames_per_second: float, notes: list[str], repair: Repair | None = None) -> Iterator[bytes]:
    """Yields the first frame of each 1/`frames_per_second` seconds, from the first frame on, as PNG.

    At the end, appends to `notes` what the report should say of the video. Raises Failed on any error, and BadImage if there is
    no frame.
    """
    # With a repair, messages alone tell damage, because the first error of any kind would end a strict ffmpeg.
    source = packet_filter(repair.dropped, keep=False) if repair else {}
    output = {"vf": f"{_selection(frames_per_second)},{SQUARE}", **PNG}
    curves: Counter = Counter()
    with Ffmpeg(path, source, output, *(LENIENT if repair else STRICT)) as run:
        while (png := _read_png(run.output)) is not None:
            curves[_curve(png)] += 1
            yield png
        code, errors, warnings = run.finish()
    # Truncated files of some formats give exit code 0, but a message. It is not part of the reason, because which one comes first
    # depends on timing, and reports must be reproducible.
    if code or Counter(errors) - (repair.harmless if repair else Counter()):
        raise Failed
    if sum("corrupt decoded frame" in line for line in warnings) > (repair.joints if repair else 0):
        raise Failed
    if not curves:
        raise BadImage("ffmpeg finds no frame in it")
    notes += repair.notes() if repair else []
    notes += [f"HDR, stored with its {curve} curve" for curve in sorted(curves) if curve]
    if any(_changes_size(line) for line in warnings):
        notes.append("its resolution changes; frames are scaled to that of the first")


def packet_filter(numbers: list[int], keep: bool) -> dict[str, str]:
    """Input options that keep, or else drop, the packets of the video stream with these numbers."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    inside = "+".join(rf"between(n\,{first}\,{last})" for first, last in ranges) or "0"
    return {"bsf:v": f"noise=drop={f'not({inside})' if keep else inside}"}


def _selection(frames_per_second: float) -> str:
    """The filter that selects frames: each takes a tick of 1/`frames_per_second` seconds, counted from the first frame on.

    Variable 0 is the next tick without a frame. A frame may come `slack` ticks before it, and a frame up to `slack` past the end
    of a tick still takes that one, so that rounding loses no frame where frames and ticks drift past each other. The filter
    `fps` would repeat frames to fill gaps: two frames with timestamps a day apart would become 86,400.
    """
    rate = exact_rate(frames_per_second)
    slack = min(ROUNDING_S * rate, 0.45)  # less than half a tick, else rates above 450 would take the frame before
    taken = f"st(0,max(ld(0),floor(ld(1)-{slack!r}))+1)"
    return f"select='if(gte(st(1,(t-start_t)*{rate!r}),ld(0)-{slack!r}),gt({taken},0),0)'"


def exact_rate(frames_per_second: float) -> float:
    """The exact rate: 29.97, 23.976, 59.94 and their simple fractions stand for 30000/1001 and so on.

    NTSC's rates are a millionth above those decimals, which would miss the first frame after 17 minutes.
    """
    nominal = Fraction(repr(float(frames_per_second))) / Fraction("0.999")
    return float(nominal * 1000 / 1001) if nominal.denominator <= 8 else frames_per_second


def _changes_size(message: str) -> bool:
    """Whether it is about a frame that is not of the size that the filters were made for."""
    return len(set(re.findall(r"\bw: ?(\d+) h: ?(\d+)", message))) > 1


def _curve(png: bytes) -> str:
    """The HDR curve that a PNG names in its cICP chunk; empty for others."""
    at = png.find(b"cICP", 0, 200)
    return CURVES.get(png[at + 5], "") if at >= 0 else ""


def _read_png(file: IO[bytes]) -> bytes | None:
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
