#!/usr/bin/env bash
# ffmpeg 9.0.2 (in imageio-ffmpeg 0.8.1), numpy 2.4.6: the filter fps=12 halves a film of 24 frames a second evenly
# only if the container keeps exact times.
# Behavior: from MP4 it takes frames 0, 2, 4, 6, 8, ...; from Matroska, of the same frames, 0, 2, 5, 6, 8, 11, 12, ...:
# a third of the steps are 1 frame and a third are 3. The number of pictures, 120 of 240, is the same and hides it.
# Matroska's times are whole milliseconds (0, 42, 83, 125, ...). At half the rate every odd frame lies halfway between
# two output times, so the filter's rounding is decided by that third of a millisecond. `framestep=2` is even in both.
# One would have guessed: an exact half of the rate takes every second frame, whatever the container.
# Why it matters: frames sampled from one clip as MKV and as MP4 are different pictures, and motion between
# neighbors jumps between one, two and three frames, which no count of pictures shows.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile imageio-ffmpeg==0.8.1 numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess

import imageio_ffmpeg
import numpy as np

ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
size = 64 * 64
raw = ["-f", "rawvideo", "-pix_fmt", "gray"]
film = np.repeat(np.arange(240, dtype=np.uint8), size).tobytes()  # frame n is all of gray level n
seen = {}
for name in ("film.mp4", "film.mkv"):
    store = ["-c:v", "libx264", "-qp", "0", "-pix_fmt", "gray", name]
    subprocess.run([*ffmpeg, *raw, "-s", "64x64", "-r", "24", "-i", "-", *store], input=film, check=True)
    for chosen in ("fps=12", "framestep=2"):
        out = subprocess.run([*ffmpeg, "-i", name, "-vf", chosen, *raw, "-"], check=True, capture_output=True).stdout
        frames = np.frombuffer(out, np.uint8)[::size].astype(int)
        steps = np.bincount(np.diff(frames), minlength=4)[1:]
        seen[name, chosen] = steps.tolist()
        print(f"{name} {chosen:11} {len(frames)} pictures: {frames[:12]}..., steps of 1, 2, 3 frames: {steps}")
even, uneven = [0, 119, 0], seen["film.mkv", "fps=12"]
others = [steps for key, steps in seen.items() if key != ("film.mkv", "fps=12")]
if others != [even] * 3 or min(uneven) < 30:
    raise SystemExit("changed: fps=12 no longer takes uneven frames from Matroska alone")
PY
