"""Runs ffmpeg on the video stream of a file."""

import re
import subprocess
import tempfile
from typing import Any

from imagefeed.preprocess.decoding import MAX_PIXELS, BadImage
from imagefeed.preprocess.ffmpeg import crash, ffmpeg_path, running, safe_input

# Only these demuxers: others read playlists, which make ffmpeg open further files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# By default a change of resolution starts the filters anew, and with them the selection of frames.
INPUT = safe_input(FORMATS, MAX_PIXELS) | {"err_detect": "explode", "reinit_filter": 0}
OUTPUT = {"map": "0:V:0", "loglevel": "repeat+level+warning"}  # the first video stream that is not a cover picture
LEVEL = re.compile(r"(?:\[[^]]*\] )*?\[(warning|error|fatal|panic)\]")


class Ffmpeg:
    """ffmpeg at work, a context manager: `output` is what it writes, `finish` waits for its end."""

    def __init__(self, path: str, source: dict[str, Any], output: dict[str, Any], *flags: str):
        import ffmpeg  # takes 50 ms, and only videos need it

        streams = ffmpeg.input(f"file:{path}", **INPUT, **source).output("pipe:", **OUTPUT, **output)
        command = streams.global_args(*flags, "-nostdin").compile(cmd=ffmpeg_path())
        self.messages = tempfile.TemporaryFile()  # a pipe could fill up and block ffmpeg
        with running(command[0]):
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.messages)
        assert self.process.stdout
        self.output = self.process.stdout

    def __enter__(self) -> "Ffmpeg":
        return self

    def __exit__(self, *_) -> None:
        self.output.close()
        self.process.kill()
        self.process.wait()
        self.messages.close()

    def finish(self) -> tuple[int, list[str], list[str]]:
        """Its exit code, errors and warnings, these without memory addresses.

        Raises UserError if it was killed from outside, and BadImage if it crashed.
        """
        code = self.process.wait()
        if reason := crash(code):
            raise BadImage(reason)
        self.messages.seek(0)
        errors: list[str] = []
        warnings: list[str] = []
        for line in self.messages.read().decode(errors="replace").splitlines():
            if level := LEVEL.match(line):
                (warnings if level[1] == "warning" else errors).append(re.sub("0x[0-9a-f]+", "", line))
        return code, errors, warnings
