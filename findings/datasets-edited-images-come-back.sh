#!/usr/bin/env bash
# Hugging Face datasets 5.2.0, pillow 13.0.0, numpy 2.4.6: edits made in place to a picture from a file are lost.
# Behavior: if a PIL picture still knows its file's name, datasets stores that name and not the pixels. Image.thumbnail,
# draft, paste and ImageDraw change the picture in place and keep the name. So a `map` that shrinks every picture by
# thumbnail() gives back the full size, and one that paints a black box over part of it gives back what was under it.
# resize() makes a new picture without a name, and that one is stored.
# One would have guessed: the dataset holds what the function returned, as it does for arrays and for resize().
# Why it matters: faces or plates that were painted over are in the dataset after all, and one that was shrunk to fit
# is as large as before; no warning. Calling copy() on the picture first helps.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/python -m pip install -q --no-compile datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
HF_HOME="$dir/cache" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import datasets
import numpy as np
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
Image.new("RGB", (512, 384), (200, 150, 100)).save("photo.png")
photos = datasets.Dataset.from_dict({"image": ["photo.png"]}, features=datasets.Features({"image": datasets.Image()}))


def shrink(row):
    row["image"].thumbnail((64, 64))
    return row


def cover(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 511, 383), fill="black")
    return row


def copy(row):
    return cover({"image": row["image"].copy()})


def resize(row):
    return {"image": row["image"].resize((64, 48))}


seen = {}
for change in (shrink, resize, cover, copy):
    row = photos[0]
    returned, stored = change(row)["image"], photos.map(change)[0]["image"]
    values = [(*image.size, float(np.asarray(image).mean())) for image in (returned, stored)]
    seen[change.__name__] = values[0] == values[1]
    print("{:6} returned {}x{}, mean {:.0f}; stored {}x{}, mean {:.0f}".format(change.__name__, *values[0], *values[1]))
if seen != {"shrink": False, "resize": True, "cover": False, "copy": True}:
    raise SystemExit("changed: which edits are stored")
PY
