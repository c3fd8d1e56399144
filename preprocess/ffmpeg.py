"""Finds ffmpeg, and decodes with it the images that Pillow cannot decode, or not at their full bit depth."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from imagefeed.dataset.errors import UserError

# The formats to decode with ffmpeg, by signature, and the demuxers allowed for them. Other demuxers would render text files as a
# terminal, or follow playlists.
FORMATS = (
    (4, b"ftyp", "mov"),  # HEIC, AVIF: ISO base media
    (0, b"\xff\x0a", "jpegxl_pipe,jpegxl_anim"),
    (4, b"JXL ", "jpegxl_pipe,jpegxl_anim"),  # in a container
    (4, b"jP  ", "j2k_pipe"),  # JPEG 2000
    (0, b"\xff\x4f\xff\x51", "j2k_pipe"),  # its bare codestream
    (0, b"\xff\xd8\xff", "jpeg_pipe,jpegls_pipe"),  # kinds that libjpeg-turbo and Pillow lack (lossless, 12 bits)
    (0, b"RIFF", "webp_pipe"),  # if Pillow was built without it
    (0, b"II*\0", "tiff_pipe"),  # if it is compressed and Pillow was built without libtiff
    (0, b"MM\0*", "tiff_pipe"),
    (0, b"\x89PNG", "png_pipe"),  # Pillow reads color of 16 bits as 8
)
# Without these, RGB is up to a gray level too dark: green by 0.95 on average.
ACCURATE = "accurate_rnd+full_chroma_int+bitexact"
TIMEOUT_S = 300  # the largest photos take seconds, but ffmpeg has been seen to loop on damaged JPEG XL
# The prefix of ffmpeg's messages. Those of the command itself repeat what the decoders said.
SPEAKER = re.compile(r"\[(?P<name>[^\]@]*)( @ [^\]]*)?\] ")
REPEATING = ("in#", "out#", "st#", "vf#", "fc#", "dec:", "enc:", "Error opening input file", "Error opening output")


class FfmpegError(ValueError):
    """The message is ffmpeg's."""


def ffmpeg_path() -> str:
    """Raises UserError if there is no ffmpeg."""
    try:
        import imageio_ffmpeg  # takes 70 ms

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError(
            "videos and some images need ffmpeg; install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to the path of ffmpeg"
        ) from None


def version() -> str:
    """Such as "7.0.2-static"; "none" if there is no ffmpeg that can be run, for which only what needs it will fail."""
    try:
        return _version_of(ffmpeg_path())
    except UserError:
        return "none"


@functools.cache
def _version_of(program: str) -> str:
    with running(program):
        words = subprocess.run([program, "-version"], capture_output=True, text=True, errors="replace").stdout.split()
    return words[2] if words[2:] else "unknown"


@contextlib.contextmanager
def running(program: str) -> Iterator[None]:
    """Turns the error of a program that cannot be started into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{program}: cannot be run ({error.strerror}); install imageio-ffmpeg again") from None


def crash(code: int) -> str:
    """What to say of the file that ffmpeg crashed on; "" if it did not. Raises UserError if it was killed from outside."""
    if code == -signal.SIGKILL:  # says nothing about the file
        raise UserError("ffmpeg was killed, probably because memory ran out; free some, or use fewer `workers`")
    if code >= 0:
        return ""
    return f"ffmpeg {version()} crashes on it ({signal.Signals(-code).name}); another version of imageio-ffmpeg may read it"


def safe_input(formats: str, max_pixels: int) -> dict[str, Any]:
    """Input options: ffmpeg opens no other file, reads only `formats`, and uses one thread, as files are decoded in parallel."""
    return {"protocol_whitelist": "file", "format_whitelist": formats, "max_pixels": max_pixels, "threads": 1}


def demuxers(data: bytes) -> str:
    """The demuxers for an image, separated by commas; "" if ffmpeg should not decode it."""
    return next((names for at, mark, names in FORMATS if data[at : at + len(mark)] == mark), "")


def decode(data: bytes, max_pixels: int, streams: tuple[int, ...] = (), columns: int = 1) -> np.ndarray:
    """The pixels of a still, (height, width, channels) of uint8 or uint16: gray, gray and alpha, RGB, or RGBA; upright by Exif.

    With `streams`, decodes the coded pictures of a HEIF file with these ids, in rows of `columns`, without rotation or cropping.
    Raises FfmpegError.
    """
    import ffmpeg  # takes 50 ms, and is rarely needed

    formats = demuxers(data)
    given = safe_input(formats, max_pixels)
    if formats != "tiff_pipe":  # ffmpeg would refuse every TIFF tag that it does not use
        given["err_detect"] = "explode"
    # All frames of an animation are decoded. If ffmpeg stopped at the first, it would notice damage in the next only by chance.
    wanted: dict[str, Any] = {"format": "image2pipe", "vcodec": "pam", "loglevel": "error", "sws_flags": ACCURATE}
    wanted |= {"fps_mode": "passthrough"} if streams else {"fps_mode": "passthrough", "vf": "select='eq(n,0)'"}
    if streams:
        given |= {"noautorotate": None, "apply_cropping": "codec"}
        wanted["map"] = f"0:i:{streams[0]}"
    if len(streams) > 1:
        inputs = "".join(f"[0:i:{stream}]" for stream in streams)
        tiling = f"xstack=inputs={len(streams)}:grid={columns}x{len(streams) // columns}"
        wanted |= {"map": "[image]", "filter_complex": f"sws_flags={ACCURATE};{inputs}{tiling}[image]"}
    with _seekable(data) as file:
        command = ffmpeg.input(f"file:/dev/fd/{file.fileno()}", **given).output("pipe:", **wanted)
        command = command.global_args("-xerror", "-nostdin").compile(cmd=ffmpeg_path())
        try:
            descriptors = (file.fileno(),)
            with running(command[0]):
                done = subprocess.run(
                    command, capture_output=True, pass_fds=descriptors, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
                )
        except subprocess.TimeoutExpired:
            raise FfmpegError(f"it takes more than {TIMEOUT_S} seconds") from None
    words = crash(done.returncode) or _words(done.stderr.decode(errors="replace"))
    if done.returncode or words:
        raise FfmpegError(words or "it fails without a message")
    if not done.stdout:
        raise FfmpegError("it finds no picture")
    return _read_pam(done.stdout)


def _seekable(data: bytes) -> BinaryIO:
    """An unnamed file: ffmpeg cannot seek in a pipe, so it would find nothing in a HEIC of more than 64 KiB."""
    try:
        file = open(os.memfd_create("image"), "w+b")
    except (AttributeError, OSError):  # an old kernel, or a sandbox
        file = tempfile.TemporaryFile()
    file.write(data)
    file.flush()
    return file


def _words(messages: str) -> str:
    """ffmpeg's first message, without addresses and paths, so that reports are reproducible; "" if there is none."""
    lines = [line for line in messages.splitlines() if line.strip()]
    decoders = [line for line in lines if not any(part in line for part in REPEATING)]
    return SPEAKER.sub("", (decoders or lines or [""])[0]).split("/dev/fd/")[0].strip().rstrip(".")[:200]


def _read_pam(data: bytes) -> np.ndarray:
    """Netpbm's PAM: lines of names and values, then the samples, those of 16 bits with the high byte first."""
    head, _, samples = data.partition(b"ENDHDR\n")
    fields = dict(line.split(b" ", 1) for line in head.splitlines()[1:])
    shape = tuple(int(fields[name]) for name in (b"HEIGHT", b"WIDTH", b"DEPTH"))
    pixels = np.frombuffer(samples, np.uint8 if int(fields[b"MAXVAL"]) < 256 else ">u2")
    if pixels.size != np.prod(shape):
        raise FfmpegError("its picture ends early")
    return pixels.reshape(shape).astype(pixels.dtype.newbyteorder("="), copy=False)
