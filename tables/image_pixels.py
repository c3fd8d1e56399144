"""The tables of docs/images.md about resizing, and about the pixels that decoders make of an ordinary JPEG."""

import subprocess

from tables.common import IMAGEFEED, INPUTS, Table

NUMPY = "numpy==2.4.6"
PILLOW, OPENCV, TENSORFLOW = "pillow==13.0.0", "opencv-python-headless==5.0.0.93", "tensorflow-cpu==2.21.0"
VIPS, FFMPEG, SIMPLEJPEG = "pyvips[binary]==3.2.0", "imageio-ffmpeg==0.8.1", "simplejpeg==1.9.0"
FILTERS = ("bilinear", "bicubic", "lanczos")
SIZES = ((256, 192), (100, 75), (777, 601))
QUALITIES = (75, 90, 95, 100)
resizing = Table("resizing", ["Library", *(f"to {w}x{h}" for w, h in SIZES)])
decoding = Table("decoding", ["Library", *(f"quality {quality}" for quality in QUALITIES)])


def photo():
    """(480, 640, 3) uint8: a landscape of fractal noise, with edges, texture and saturated colors."""
    import numpy as np

    rng = np.random.default_rng(0)
    field = np.zeros((480, 640, 3))
    for step in (1, 2, 4, 8, 16, 32, 64):
        grid = rng.normal(0, step**0.8, (480 // step + 2, 640 // step + 2, 3)).cumsum(2) * (1, 0.6, 0.5)
        field += np.repeat(np.repeat(grid, step, 0), step, 1)[:480, :640]
    pixels = 120 + field * 1.6
    y, x = np.mgrid[:480, :640]
    pixels[(x - 160) ** 2 + (y - 160) ** 2 < 90**2] = (230, 60, 30)
    pixels[(abs(x - 450) < 80) & (y // 12 % 2 == 0) & (y > 200)] = (20, 60, 220)
    return pixels.clip(0, 255).round().astype(np.uint8)


def write_inputs():
    """What Pillow 13.0.0 makes of the photo, in all sizes and qualities."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(photo())
    np.save(INPUTS / "photo.npy", np.asarray(image))
    for size in SIZES:
        for name in FILTERS:
            np.save(INPUTS / f"{name}-{size[0]}.npy", np.asarray(image.resize(size, Image.Resampling[name.upper()])))
    for quality in QUALITIES:
        image.save(INPUTS / f"q{quality}.jpg", quality=quality, subsampling=2)
        np.save(INPUTS / f"q{quality}.npy", np.asarray(Image.open(INPUTS / f"q{quality}.jpg")))


def compared(make):
    """A cell for each quality: the largest and the mean difference to Pillow 13.0.0, of what `make` makes of the JPEG's bytes."""
    import numpy as np

    cells = []
    for quality in QUALITIES:
        made = np.asarray(make((INPUTS / f"q{quality}.jpg").read_bytes())).astype(int)
        off = np.abs(made - np.load(INPUTS / f"q{quality}.npy"))
        cells.append(f"{off.max()}, {off.mean():.2f}" if off.any() else "equal")
    return cells


def resized(name, make):
    """A cell for each size: the largest difference to Pillow 13.0.0 by the filter `name`, and the share of values that differ."""
    import numpy as np

    cells, image = [], np.load(INPUTS / "photo.npy")
    for size in SIZES:
        off = np.abs(np.asarray(make(image, *size)).astype(int) - np.load(INPUTS / f"{name}-{size[0]}.npy"))
        cells.append(f"{off.max()}, {100 * (off > 0).mean():.1f} %" if off.any() else "equal")
    return cells


def dali_decode(data, **options):
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipe():
        source = fn.external_source([[np.frombuffer(data, np.uint8)]], batch=True, cycle=True)
        return fn.decoders.image(source, device="cpu", **options)

    made = pipe()
    made.build()
    return np.array(made.run()[0][0])


def ffmpeg_decode(path, pixels="rgba", options=()):
    import imageio_ffmpeg
    import numpy as np

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, *options, "-frames:v", "1", "-pix_fmt", pixels]
    out = subprocess.run([*command, *"-c:v pam -f image2pipe -".split()], capture_output=True, check=True).stdout
    head, _, body = out.partition(b"ENDHDR\n")
    width, height, depth = (int(head.split(field)[1].split()[0]) for field in (b"WIDTH", b"HEIGHT", b"DEPTH"))
    return np.frombuffer(body, np.uint8).reshape(height, width, depth)


@resizing.add("Pillow 12.1.1, bilinear", ["pillow==12.1.1", NUMPY])
def pillow_older():
    return pillow_resize("bilinear")


def pillow_resize(name):
    from PIL import Image

    return resized(name, lambda image, *size: Image.fromarray(image).resize(size, Image.Resampling[name.upper()]))


for name in FILTERS:
    resizing.add(f"Pillow-SIMD 12.1.1.post0, {name}", [IMAGEFEED])(lambda name=name: pillow_resize(name))


def torch_resize(name, floating=False):
    import torch
    from torch.nn.functional import interpolate

    def make(image, width, height):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        pixels = pixels.float() if floating else pixels
        out = interpolate(pixels, size=(height, width), mode=name, antialias=True)
        return out.round().clamp(0, 255)[0].permute(1, 2, 0).numpy() if floating else out[0].permute(1, 2, 0).numpy()

    return resized(name, make)


for name in FILTERS:
    resizing.add(f"torch 2.13.0, uint8, antialias, {name}", [IMAGEFEED])(lambda name=name: torch_resize(name))
resizing.add("torch 2.13.0, float32, antialias, bilinear", [IMAGEFEED])(lambda: torch_resize("bilinear", True))


def dali_resize(name, antialias=True):
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}[name]

    def make(image, width, height):
        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def pipe():
            source = fn.external_source([[image]], batch=True, cycle=True, layout="HWC")
            return fn.resize(source, resize_x=width, resize_y=height, interp_type=kind, antialias=antialias)

        made = pipe()
        made.build()
        return np.array(made.run()[0][0])

    return resized(name, make)


for name in FILTERS:
    resizing.add(f"DALI 2.4.0, {name}", [IMAGEFEED])(lambda name=name: dali_resize(name))
resizing.add("DALI 2.4.0, antialias=False, bilinear", [IMAGEFEED])(lambda: dali_resize("bilinear", False))


def opencv_resize(name, kind):
    import cv2

    return resized(name, lambda image, *size: cv2.resize(image, size, interpolation=getattr(cv2, kind)))


KINDS = {"INTER_LINEAR": "bilinear", "INTER_CUBIC": "bicubic", "INTER_LANCZOS4": "lanczos", "INTER_AREA": "bilinear"}
for kind, name in KINDS.items():
    label = f"OpenCV 5.0.0.93, {kind}, to Pillow's {name}"
    resizing.add(label, [OPENCV, NUMPY])(lambda name=name, kind=kind: opencv_resize(name, kind))


def tensorflow_resize(antialias):
    import tensorflow as tf

    def make(image, width, height):
        return tf.image.resize(image, (height, width), antialias=antialias).numpy().round().clip(0, 255)

    return resized("bilinear", make)


for antialias in (True, False):
    label = f"TensorFlow 2.21.0, bilinear, antialias={antialias}"
    resizing.add(label, [TENSORFLOW, NUMPY])(lambda antialias=antialias: tensorflow_resize(antialias))


def tensorflow_jpeg(method):
    import tensorflow as tf

    return compared(lambda data: tf.io.decode_jpeg(data, dct_method=method).numpy())


for label, method in {"default": "", "INTEGER_FAST": "INTEGER_FAST", "INTEGER_ACCURATE": "INTEGER_ACCURATE"}.items():
    decoding.add(f"TensorFlow 2.21.0, dct_method {label}", [TENSORFLOW, NUMPY])(lambda method=method: tensorflow_jpeg(method))
DALI_OPTIONS = {
    "DALI 2.4.0, CPU": {}, "DALI 2.4.0, CPU, jpeg_fancy_upsampling=True": {"jpeg_fancy_upsampling": True},
    "DALI 2.4.0, CPU, use_fast_idct=True": {"use_fast_idct": True},
}  # fmt: skip
for label, options in DALI_OPTIONS.items():
    decoding.add(label, [IMAGEFEED])(lambda options=options: compared(lambda data: dali_decode(data, **options)))


@decoding.add("OpenCV 5.0.0.93", [OPENCV, NUMPY])
def opencv_jpeg():
    import cv2
    import numpy as np

    return compared(lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])


def simplejpeg(**options):
    import simplejpeg

    return compared(lambda data: simplejpeg.decode_jpeg(data, **options))


for label, options in {"": {}, ", fastdct=True": {"fastdct": True}, ", fastupsample=True": {"fastupsample": True}}.items():
    decoding.add(f"simplejpeg 1.9.0{label}", [SIMPLEJPEG, NUMPY])(lambda options=options: simplejpeg(**options))


def ffmpeg_jpeg(options):
    def make(data):
        with open("one.jpg", "wb") as file:
            file.write(data)
        return ffmpeg_decode("one.jpg", "rgb24", options)

    return compared(make)


for flags in ("", "accurate_rnd+full_chroma_int"):
    label, options = f"ffmpeg 9.0.2, sws_flags {flags or 'default'}", ("-sws_flags", flags) if flags else ()
    decoding.add(label, [FFMPEG, NUMPY])(lambda options=options: ffmpeg_jpeg(options))


@decoding.add("imagefeed, `decode`", [IMAGEFEED])
def ours_jpeg():
    import imagefeed

    return compared(lambda data: imagefeed.decode([data])[0])
