#!/usr/bin/env bash
# ffmpeg 9.0.2 (imageio-ffmpeg 0.8.1), pillow 13.0.0, pillow-heif 1.8.1, numpy 2.4.6: TIFF and HEIC on standard input.
# Behavior: a TIFF is recognized ("tiff_pipe") but has no size, even with 908 bytes, and "Output file does not contain
# any stream" is the end. It decodes exactly if `-f tiff_pipe -frame_size N` names its number of bytes: without a parser
# for TIFF the reader does not know where the picture ends. A HEIC decodes while it is small, near 64 KiB at most; above
# that ffmpeg prints "partial file", writes no picture and ends with EXIT CODE 0. As `cache:pipe:0` it decodes.
# One would have guessed: `-f tiff_pipe` is enough, as png_pipe is for PNG, and HEIC decodes at any size (its index
# stands at the beginning), or at none, with an error code.
# Why it matters: who decodes bytes from an archive through a pipe loses photos by their size alone, and a check of the
# exit code passes all of them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile imageio-ffmpeg==0.8.1 pillow==13.0.0 pillow-heif==1.8.1 numpy==2.4.6
venv/bin/python - <<'PY'
import io
import subprocess

import imageio_ffmpeg
import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
draw = np.random.default_rng(0)


def see(form, side, *source):
    content = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(content, form)
    content = content.getvalue()
    source = [str(len(content)) if word == "N" else word for word in source]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    end = subprocess.run(command, input=content, capture_output=True)
    decoded = len(end.stdout) == side * side * 3
    print(f"{form} of {len(content)} bytes, {' '.join(source)}: exit code {end.returncode}, decoded: {decoded}")
    return decoded, end.returncode == 0


pipe = ("-i", "-")
no, yes, nothing_with_code_0 = (False, False), (True, True), (False, True)
tiff = [see("TIFF", side, *how) for side in (16, 64) for how in (pipe, ("-f", "tiff_pipe", *pipe))]
told = [see("TIFF", side, "-f", "tiff_pipe", "-frame_size", "N", *pipe) for side in (16, 64)]
png = see("PNG", 64, "-f", "png_pipe", *pipe)
heic = [see("HEIF", 120, *pipe), see("HEIF", 400, *pipe), see("HEIF", 400, "-i", "cache:pipe:0")]
if (tiff, told, png, heic) != ([no] * 4, [yes] * 2, yes, [yes, nothing_with_code_0, yes]):
    raise SystemExit("changed: what ffmpeg decodes from a pipe")
PY
