"""Every kind of image gets the answer it should: the fast way, a conversion, or a reason."""

import io
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from imagefeed.preprocess.image import BadImage, prepare_image
from imagefeed.preprocess.options import ImageOptions
from tests.rawtree import jpeg, smooth_image

CROP, SHORT = ImageOptions(), ImageOptions(fit="short")


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def picture(height=300, width=400, seed=1) -> Image.Image:
    return Image.fromarray(smooth_image(height, width, seed))


def reference(image: Image.Image) -> np.ndarray:
    """Shorter side to 256, then the center 256x256 (Krizhevsky et al. 2012, section 2), by plain Pillow in two steps."""
    scale = 256 / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 256) // 2, (resized.height - 256) // 2
    return np.asarray(resized.crop((left, top, left + 256, top + 256))).astype(int)


def decoded(prepared) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(prepared.jpeg)).convert("RGB")).astype(int)


def assert_alike(pixels, expected, mean=2.0):
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < mean


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (256, 256), (70, 90), (1200, 2000), (257, 999)])
def test_crop_is_the_centre_of_the_rescaled_image(height, width):
    image = picture(height, width)
    prepared = prepare_image(saved(image, "JPEG", quality=95), CROP)
    # Enlarged, a picture of 90 pixels is moved by a fraction of one where the reference rounds its size.
    assert_alike(decoded(prepared), reference(image), 3 if height < 256 else 2)
    assert prepared.converted == ""


@pytest.mark.parametrize(("height", "width", "stored"), [(375, 500, (256, 341)), (500, 375, (341, 256)), (90, 60, (384, 256))])
def test_short_keeps_the_whole_aspect(height, width, stored):
    prepared = prepare_image(jpeg(height, width, 1), SHORT)
    assert prepared.planes.y.shape == stored
    assert decoded(prepared).shape == (*stored, 3)


def test_what_is_stored_is_baseline_420_without_metadata():
    data = saved(picture(), "JPEG", quality=95, progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", comment=b"hello")
    stored = prepare_image(data, CROP).jpeg
    image = Image.open(io.BytesIO(stored))
    assert simplejpeg.decode_jpeg_header(stored)[2:] == ("YCbCr", "420")
    assert not image.info.get("progressive") and "exif" not in image.info and "comment" not in image.info
    assert b"\xff\xc0" in stored and b"\xff\xc2" not in stored  # SOF0, baseline


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, format):
    """The camera's way of storing an upright picture turned, undone."""
    upright = picture(300, 400)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_alike(decoded(prepare_image(saved(turned, format, exif=exif), CROP)), reference(upright))


def waves(height, width):
    """Fine waves of chroma, along both sides: what lies half a pixel off is told apart."""
    y, x = np.mgrid[:height, :width] + 0.5
    cb = 128 + 60 * np.sin(2 * np.pi * 12 * x / width)
    cr = 128 + 60 * np.sin(2 * np.pi * 9 * y / height)
    ycc = np.dstack([np.full_like(cb, 128), cb, cr]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(ycc, "YCbCr").convert("RGB")


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "fit"), [(256, "short"), (255, "crop")])
def test_chroma_lies_right_where_a_side_is_odd(size, fit, orientation, subsampling):
    upright = waves(750, 1000)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = ImageOptions(size, fit, 97)
    found = prepare_image(saved(turned, "JPEG", quality=97, subsampling=subsampling, exif=exif), options).planes
    wanted = prepare_image(saved(upright, "PNG"), options).planes
    assert found.y.shape == ((256, 341) if fit == "short" else (255, 255))
    for plane, right in zip(found, wanted):
        assert np.abs(plane.astype(float) - right).mean() < 1


def test_short_memory_is_no_damage():
    """A good image is not left out because there is no room to decode it: the run ends, and goes on later."""
    data = saved(Image.fromarray(smooth_image(3000, 3000, 1)), "JPEG", progressive=True, quality=30)
    code = (
        "import resource, sys; from imagefeed.preprocess.image import ImageOptions, prepare_image;"
        "data = sys.stdin.buffer.read();"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2); prepare_image(data, ImageOptions())"
    )
    process = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
    assert b"MemoryError" in process.stderr and process.returncode == 1


def grey16():
    return Image.fromarray((np.asarray(picture().convert("L")).astype(np.uint16) << 8) + 77)


def with_alpha():
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 200, 300))
    return image


@pytest.mark.parametrize(
    ("make", "format", "options", "expected", "converted"),
    [
        (lambda: picture().convert("L"), "JPEG", {}, lambda: picture().convert("L").convert("RGB"), ""),
        (lambda: picture().convert("CMYK"), "JPEG", {"quality": 95}, picture, "JPEG CMYK"),
        (lambda: picture().convert("CMYK"), "JPEG", {"subsampling": 2}, picture, "JPEG CMYK"),
        (picture, "JPEG", {"quality": 95, "keep_rgb": True}, picture, "JPEG RGB"),
        (picture, "PNG", {}, picture, "PNG RGB"),
        (picture, "BMP", {}, picture, "BMP RGB"),
        (picture, "WEBP", {"quality": 95}, picture, "WEBP RGB"),
        (lambda: picture().quantize(64), "GIF", {}, lambda: picture().quantize(64).convert("RGB"), "GIF P"),
        (grey16, "PNG", {}, lambda: picture().convert("L").convert("RGB"), "PNG I;16"),
        (lambda: bilevel().convert("1"), "PNG", {}, lambda: bilevel().convert("RGB"), "PNG 1"),
        (with_alpha, "PNG", {}, lambda: white_left_half(), "PNG RGBA on white"),
    ],
    ids=["gray", "cmyk", "cmyk 4:2:0", "rgb jpeg", "png", "bmp", "webp", "palette gif", "16 bits", "bilevel", "alpha"],
)
def test_other_kinds_become_rgb(make, format, options, expected, converted):
    prepared = prepare_image(saved(make(), format, **options), CROP)
    assert_alike(decoded(prepared), reference(expected()), 4)
    assert prepared.converted == converted


def bilevel():
    return picture().convert("L").point(lambda value: 255 if value > 127 else 0)


def white_left_half():
    image = picture()
    image.paste((255, 255, 255), (0, 0, 200, 300))
    return image


def test_what_pillow_lacks_goes_by_ffmpeg():
    """A lossless JPEG (process 14), made by ffmpeg: neither libjpeg-turbo's 8-bit decoder nor Pillow takes it."""
    import ffmpeg
    import imageio_ffmpeg

    data, _ = (
        ffmpeg.input("pipe:", format="image2pipe", vcodec="ppm")
        .output("pipe:", format="image2pipe", vcodec="jpegls", vframes=1, loglevel="error")
        .run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), input=saved(picture(), "PPM"), capture_stdout=True)
    )
    prepared = prepare_image(data, CROP)
    assert_alike(decoded(prepared), reference(picture()))
    assert prepared.converted.startswith("decoded by ffmpeg")


def damaged_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


def cut_between_scans() -> bytes:
    data = saved(picture(), "JPEG", progressive=True)
    tables = data.rindex(b"\xff\xc4")
    return data[:tables] + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am no image\n" * 100, "not an image that can be decoded"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not an image that can be decoded"),
        (jpeg(300, 400, 1)[:-2000], "damaged JPEG"),
        (jpeg(300, 400, 1)[:300], "damaged JPEG"),
        (jpeg(300, 400, 1).replace(b"\xff\xdb", b"\xff\x00"), "damaged JPEG: .* extraneous bytes"),
        (jpeg(300, 400, 1).replace(b"\xff\xc4", b"\xff\xf8"), "damaged JPEG: Unsupported marker type 0xf8"),
        (damaged_middle(jpeg(300, 400, 1)), "damaged JPEG"),
        (saved(picture().convert("CMYK"), "JPEG")[:-2000], "damaged JPEG"),
        (saved(picture(), "JPEG", keep_rgb=True)[:-2000], "damaged JPEG"),
        (saved(picture(), "PNG")[:-2000], "not an image that can be decoded"),
        (saved(Image.new("1", (20000, 20000)), "PNG"), "more than"),
        (saved(Image.new("L", (5000, 10)), "JPEG"), "times as long as wide"),
        (cut_between_scans(), "scans of it are missing"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "it has no primary image, as a video"),
    ],
    ids="empty text playlist truncated header quantizers codes corrupt cmyk rgb png bomb aspect scans heic".split(),
)
def test_bad_images_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        prepare_image(data, CROP)


def test_what_no_jpeg_can_hold_is_refused():
    data = saved(Image.new("RGB", (4000, 101)), "JPEG")
    for raw in (data, saved(Image.new("RGB", (4000, 101)), "PNG")):
        with pytest.raises(BadImage, match="4000x101 would become 67327x1700, and a JPEG has 65500 a side at most"):
            prepare_image(raw, ImageOptions(size=1700, fit="short"))


def test_the_same_image_gives_the_same_bytes():
    data = jpeg(300, 400, 5)
    assert prepare_image(data, CROP).jpeg == prepare_image(data, CROP).jpeg
    assert prepare_image(saved(with_alpha(), "PNG"), CROP).jpeg == prepare_image(saved(with_alpha(), "PNG"), CROP).jpeg
