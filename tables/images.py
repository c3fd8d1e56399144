"""docs/images.md: what libraries make of odd stills, how they resize, and how they decode JPEGs."""

import io
import json

from tables import image_inputs, image_pixels
from tables.common import IMAGEFEED, INPUTS, Page
from tables.image_inputs import HEIGHT, LEFT, RIGHT, WIDTH
from tables.image_pixels import FFMPEG, NUMPY, OPENCV, PILLOW, SIMPLEJPEG, TENSORFLOW, VIPS, dali_decode, ffmpeg_decode


def write_inputs():
    right = {}
    for number, (name, (data, colors)) in enumerate(image_inputs.stills().items()):
        extension = {b"\x89P": "png", b"II": "tif"}.get(data[:2], "jpg")
        file = f"{number:02d}.{extension}"
        (INPUTS / file).write_bytes(data)
        right[name] = [file, colors]
    (INPUTS / "stills.json").write_text(json.dumps(right))
    for name, data in image_inputs.turned().items():
        (INPUTS / f"turned.{TURNED[name]}").write_bytes(data)
    image_pixels.write_inputs()


page = Page("images", image_inputs.PACKAGES, write_inputs)
NAMES = [
    "JPEG 4:2:0",
    "JPEG, gray with factors 2x2",
    "JPEG, chroma finer than luma (1x1, 2x1, 2x1)",
    "JPEG, luma 3x1",
    "JPEG, luma 1x3",
    "JPEG 4:1:0 (4x2)",
    "JPEG, mixed (2x2, 1x2, 2x1)",
    "JPEG, JFIF and Adobe transform 0 (YCbCr by JFIF)",
    "JPEG, ids R, G, B without markers (RGB)",
    "JPEG, ids R, G, B with JFIF (YCbCr by JFIF)",
    "JPEG, CMYK with Adobe marker",
    "JPEG, CMYK without marker (inverted too)",
    "JPEG, 12 bits",
    "JPEG without Huffman tables",
    "PNG, gray, 16 bits (0xC8FF, 0x2800)",
    "PNG, RGB, 16 bits, tRNS for the left",
    "PNG, gray, 2 bits, tRNS for the left",
    "PNG, gray, 8 bits, tRNS for the left",
    "APNG with a default image outside the animation",
    "TIFF, gray, 16 bits, 0 is white",
    "TIFF, gray, 12 bits",
    "JPEG, lossless, color",
    "JPEG, lossless, gray",
]
TURNED = {
    "JPEG": "jpeg",
    "PNG": "png",
    "WebP": "webp",
    "TIFF": "tiff",
    "AVIF": "avif",
    "HEIC": "heic",
    "JPEG XL of a JPEG": "jxl",
}
stills = page.table("stills", ["Still"], NAMES)
turned = page.table("turned", ["Stored with orientation 6"], list(TURNED))


def on_white(pixels):
    """(H, W, 3) uint8 of (H, W), (H, W, 1), 3 or 4 channels."""
    import numpy as np

    pixels = np.asarray(pixels)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:] / 255.0
        pixels = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def judged(decode, near=4, kinds=(".jpg", ".png", ".tif")):
    """A cell for each still: "right", the two colors that came, or "refused"; "-" for other kinds of files."""
    cells = []
    for file, colors in json.loads((INPUTS / "stills.json").read_text()).values():
        if not file.endswith(kinds):
            cells.append("-")
            continue
        try:
            pixels = on_white(decode(INPUTS / file))
        except Exception:
            cells.append("refused")
            continue
        came = [pixels[HEIGHT // 2, x].astype(int).tolist() for x in (12, WIDTH - 12)]
        off = max(abs(a - b) for got, wanted in zip(came, colors) for a, b in zip(got, wanted))
        shown = [
            str(color[0] if len(set(color)) == 1 else tuple(color)).replace("255", "white", color == [255] * 3) for color in came
        ]
        cells.append("right" if off <= near else " / ".join(shown) if shown[0] != shown[1] else shown[0])
    return cells


def standing(decode):
    """A cell for each format: "turned" or "as stored", or "refused"."""
    import numpy as np

    cells = []
    for file in TURNED.values():
        try:
            pixels = on_white(decode(INPUTS / f"turned.{file}")).astype(int)
        except Exception:
            cells.append("refused")
            continue
        top_is_left = np.abs(pixels[4, pixels.shape[1] // 2] - LEFT).max() < 16
        bottom_is_right = np.abs(pixels[-4, pixels.shape[1] // 2] - RIGHT).max() < 16
        upright = pixels.shape[0] == WIDTH and top_is_left and bottom_is_right
        cells.append("turned" if upright else "as stored" if pixels.shape[1] == WIDTH else "wrong")
    return cells


def both(label, packages, **options):
    """Decorates a function that makes a decoder, whose columns go into both tables of stills."""

    def register(make):
        stills.add(label, packages, **options)(lambda: judged(make()))
        turned.add(label, packages, **options)(lambda: standing(make()))
        return make

    return register


@both("Pillow 13.0.0", [PILLOW, "pillow-heif==1.8.1", "pillow-jxl-plugin==1.3.8", NUMPY])
def pillow():
    import numpy as np
    import pillow_heif
    import pillow_jxl  # noqa: F401
    from PIL import Image

    pillow_heif.register_heif_opener()

    def decode(path):
        image = Image.open(path)
        if image.mode == "I;16" and image.format == "TIFF":  # convert("RGB") would clip it at 255
            return (np.asarray(image) >> 8).astype(np.uint8)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")

    return decode


@turned.add("Pillow, exif_transpose", [PILLOW, "pillow-heif==1.8.1", "pillow-jxl-plugin==1.3.8", NUMPY])
def transposed():
    import pillow_heif
    import pillow_jxl  # noqa: F401
    from PIL import Image, ImageOps

    pillow_heif.register_heif_opener()
    return standing(lambda path: ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


@both("OpenCV 5.0.0.93", [OPENCV, NUMPY])
def opencv():
    import cv2

    def decode(path):
        """Colors as by default; alpha only where it is asked for."""
        if "tRNS" in names.get(path.name, ""):
            pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            pixels = (pixels >> 8).astype("uint8") if pixels.dtype != "uint8" else pixels
            return pixels[..., [2, 1, 0, 3]] if pixels.ndim == 3 and pixels.shape[2] == 4 else pixels
        return cv2.imread(str(path))[..., ::-1]

    names = {file: name for name, (file, _) in json.loads((INPUTS / "stills.json").read_text()).items()}
    return decode


@both("DALI 2.4.0", [IMAGEFEED])
def dali():
    return lambda path: dali_decode(path.read_bytes())


@both("TensorFlow 2.21.0", [TENSORFLOW, NUMPY])
def tensorflow():
    import tensorflow as tf

    def decode(path):
        data = path.read_bytes()
        if data[:4] == b"\x89PNG":
            return tf.io.decode_png(data, channels=4).numpy()
        return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()

    return decode


@both("pyvips 3.2.0", [VIPS, NUMPY])
def vips():
    import pyvips

    def decode(path):
        image = pyvips.Image.new_from_file(str(path)).colourspace("srgb")
        return (image.flatten(background=255) if image.hasalpha() else image).numpy()

    return decode


@both("ffmpeg 9.0.2", [FFMPEG, NUMPY])
def ffmpeg():
    return ffmpeg_decode


def packed(path):
    """The record that imagefeed makes of a file, as it is stored at quality 100; refused if it rejects the file."""
    import tempfile
    from pathlib import Path

    from PIL import Image

    import imagefeed

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw" / "train" / "one"
        raw.mkdir(parents=True)
        (raw / path.name).symlink_to(path)
        imagefeed.build(raw.parents[1], Path(folder) / "out", size=64, fit="short", quality=100, workers=1, max_rejected=1.0)
        jpeg = imagefeed.Dataset(Path(folder) / "out", "train").jpeg(0)
        return Image.open(io.BytesIO(jpeg.tobytes())).resize((96, 96)).convert("RGB")


@stills.add("simplejpeg 1.9.0", [SIMPLEJPEG, NUMPY])
def simplejpeg():
    """JPEGs only."""
    import simplejpeg

    return judged(lambda path: simplejpeg.decode_jpeg(path.read_bytes()), kinds=(".jpg",))


stills.add("imagefeed", [IMAGEFEED])(lambda: judged(packed, near=6))
turned.add("imagefeed", [IMAGEFEED])(lambda: standing(packed))
page.tables += [image_pixels.resizing, image_pixels.decoding]
