#!/usr/bin/env bash
# moviepy 2.2.1 with imageio-ffmpeg 0.8.1 (ffmpeg 9.0.2) and 0.6.0 (ffmpeg 7.0.2): a video held upright is squashed.
# Behavior: moviepy finds a video's rotation in what ffmpeg prints, by the word "displaymatrix". ffmpeg 9 prints
# "Display Matrix". So moviepy believes that the rotation is 0 and asks for frames of the stored 320x240, while
# ffmpeg turns the picture by itself and then scales the upright 240x320 into that frame. A square of 100x100 comes out
# about 133x75. With ffmpeg 7 the same moviepy gives 240x320 and the square stays a square. Neither says a word.
# One would have guessed: right, or at worst lying on its side with its shape kept, as readers do that ignore rotation.
# Why it matters: imageio-ffmpeg is installed with moviepy at whichever version is newest, and phones store upright
# videos as rotated ones: all their frames are stretched by 16:9 squared, 3.2 times, yet look upright.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile moviepy==2.2.1 numpy==2.4.6
cat > see.py <<'PY'
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
from moviepy import VideoFileClip

ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
square = ["-vf", "drawbox=x=110:y=70:w=100:h=100:color=black:t=fill", "-pix_fmt", "yuv420p", "-c:v", "libx264"]
subprocess.run([*ffmpeg, "-f", "lavfi", "-i", "color=white:s=320x240:r=10:d=1", *square, "level.mp4"], check=True)
subprocess.run([*ffmpeg, "-display_rotation", "90", "-i", "level.mp4", "-c", "copy", "upright.mp4"], check=True)
seen = []
for name in ("level.mp4", "upright.mp4"):
    with VideoFileClip(name) as clip:
        frame = clip.get_frame(0.5)
    rows, columns = np.where(frame[..., 0] < 128)
    seen.append((frame.shape[1], frame.shape[0], int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1))
    print("ffmpeg {}: {} is {}x{}, the square is {}x{}".format(imageio_ffmpeg.get_ffmpeg_version()[:6], name, *seen[-1]))
level, upright = ((*shape[:2], *(round(side / 5) * 5 for side in shape[2:])) for shape in seen)
expected = {"squashed": (320, 240, 135, 75), "right": (240, 320, 100, 100)}[sys.argv[1]]
if level != (320, 240, 100, 100) or upright != expected:
    raise SystemExit(f"changed: the upright video is no longer {sys.argv[1]}")
PY
venv/bin/python -m pip install -q --no-compile imageio-ffmpeg==0.6.0
venv/bin/python see.py right
venv/bin/python -m pip install -q --no-compile imageio-ffmpeg==0.8.1
venv/bin/python see.py squashed
