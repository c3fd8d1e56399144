#!/usr/bin/env bash
# ffmpeg 9.0.2 (imageio-ffmpeg 0.8.1), pillow 13.0.0, pillow-heif 1.8.1, numpy 2.4.6: odd-sized HEIC loses its last line.
# Behavior: a HEIC of 65x65 with halved chroma (4:2:0) comes out as 64x64, and one of 500x375 as 500x374. HEVC codes
# an even size and the file's clean aperture cuts it to the odd one; ffmpeg applies it, rounded down to whole chroma
# samples, also in RGB and with `-flags unaligned`. HEIC in 4:4:4 and AVIF or JPEG in 4:2:0 keep 65x65.
# One would have guessed: 65x65 as libheif gives, or 66x66 if the aperture were ignored; not less than the picture has.
# Why it matters: the last row and column are gone without a word, so the same photo has one size by ffmpeg and
# another by libheif, and boxes or masks of the photo's size no longer fit. 4:2:0 is what cameras and encoders write.
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


def see(name, size, options=(), **encoding):
    width, height = size
    ramp = np.add.outer(np.arange(height), np.arange(width)) % 256
    Image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], -1).astype(np.uint8)).save(name, quality=90, **encoding)
    out = ["-frames:v", "1", "-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "png", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *options, "-i", name, *out]
    got = Image.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)).size
    with Image.open(name) as whole:
        print(name, encoding, *options, "drawn", size, "by Pillow", whole.size, "by ffmpeg", got)
        return got, whole.size == size


halved = [see("a.heic", size, chroma="420") for size in ((65, 65), (500, 375))]
halved.append(see("a.heic", (65, 65), ("-flags", "unaligned"), chroma="420"))
full = see("b.heic", (65, 65), chroma="444")
others = [see("c.avif", (65, 65), subsampling="4:2:0"), see("d.jpg", (65, 65), subsampling="4:2:0")]
cut = [((64, 64), True), ((500, 374), True), ((64, 64), True)]
if halved != cut or [full, *others] != [((65, 65), True)] * 3:
    raise SystemExit("changed: ffmpeg's size of an odd picture")
PY
