#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, imageio-ffmpeg 0.8.1 (ffmpeg 9.0.2), numpy 2.4.6: cv2.VideoCapture manages color.
# Behavior: it maps the color primaries that a video is tagged with to those of BT.709. One and the same orange, stored
# in three files whose samples and matrix are equal, comes out as about (210, 89, 35) if tagged BT.709, (234, 97, 0) if
# tagged Display P3 and (255, 81, 0) if tagged BT.2020. ffmpeg gives (210, 89, 35) from all three.
# One would have guessed: VideoCapture ignores color tags, or at most obeys the matrix, as other readers do.
# Why it matters: phones tag their videos P3 or BT.2020. A net trained on frames from ffmpeg, PyAV or decord sees
# more saturated, clipped colors when OpenCV reads the same file in use. No option or message tells.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile opencv-python-headless==5.0.0.93 imageio-ffmpeg==0.8.1 numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess

import cv2
import imageio_ffmpeg
import numpy as np

ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
pixels, by_opencv, by_ffmpeg = set(), {}, {}
for primaries in ("bt709", "smpte432", "bt2020"):
    name = f"{primaries}.mp4"
    tags = f"setparams=color_primaries={primaries}:color_trc=bt709:colorspace=bt709"
    change = f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,{tags}"
    make = ["-f", "lavfi", "-i", "color=c=0xD65E27:s=320x240:r=5:d=1", "-vf", change, "-c:v", "libx264", "-qp", "0"]
    subprocess.run([*ffmpeg, *make, name], check=True)

    def read(form, name=name):
        out = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", form, "-"]
        return subprocess.run([*ffmpeg, "-i", name, *out], check=True, capture_output=True).stdout

    pixels.add(read("yuv420p"))
    by_ffmpeg[primaries] = np.frombuffer(read("rgb24"), np.uint8).reshape(240, 320, 3)[100, 100].astype(int)
    by_opencv[primaries] = cv2.VideoCapture(name).read()[1][100, 100, ::-1].astype(int)
    print(f"{primaries:8}  ffmpeg {by_ffmpeg[primaries]}  OpenCV {by_opencv[primaries]}")
print("samples in the three files are equal:", len(pixels) == 1)


def far(colors, primaries):
    return abs(colors[primaries] - by_ffmpeg["bt709"]).max()


same = [far(by_ffmpeg, "smpte432"), far(by_ffmpeg, "bt2020"), far(by_opencv, "bt709")]
if len(pixels) != 1 or max(same) > 2 or far(by_opencv, "smpte432") < 20 or far(by_opencv, "bt2020") < 30:
    raise SystemExit("changed: OpenCV alone no longer maps primaries")
PY
