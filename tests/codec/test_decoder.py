"""decoder.c against libjpeg-turbo, to the bit."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from imagefeed.codec import decoder, libjpeg
from imagefeed.codec.decode import JOB, Format, decode, decode_jobs
from tests.codec.corpus import corpus
from tests.conftest import jpeg, picture

needs_avx2 = pytest.mark.skipif(not decoder.AVAILABLE, reason="this CPU lacks AVX2, so libjpeg-turbo decodes all images")
DTYPES = ("float32", "bfloat16", "float16", "uint8")


def rgb(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data)


def make_jobs(jpegs: list[bytes], out: np.ndarray, **fields) -> np.ndarray:
    """A job for each JPEG, for its crop to `out` (N, ...); `fields` are those of JOB, by default of the whole image."""
    jobs = np.zeros(len(jpegs), JOB)
    jobs["data"] = [np.frombuffer(data, np.uint8).ctypes.data for data in jpegs]
    jobs["length"] = [len(data) for data in jpegs]
    jobs["out"] = out.ctypes.data + np.arange(len(jpegs)) * (out.nbytes // max(len(jpegs), 1))
    decoder.sizes(jobs)
    jobs["height"], jobs["width"] = jobs["image_height"], jobs["image_width"]
    for name, values in fields.items():
        jobs[name] = values
    return jobs


def expected(pixels: np.ndarray, job: np.void, form: Format) -> np.ndarray:
    """The crop of an image (height, width, 3), by NumPy; bfloat16 by torch, as uint16."""
    box = tuple(slice(job[start], job[start] + job[side]) for start, side in (("top", "height"), ("left", "width")))
    step = -1 if job["mirror"] else 1
    values = pixels[box][:, ::step]
    if form.dtype == "uint8":
        values = np.clip(values + np.floor(0.5 - job["mean"]), 0, 255).astype(np.uint8)
    else:
        means = job["mean"]
        if form.mean_image is not None:
            means = form.mean_image.transpose(1, 2, 0)[box][:, ::step] + means
        values = torch.from_numpy((values.astype(np.float32) - means) * form.scale).to(getattr(torch, form.dtype))
        values = values.view(torch.uint16 if values.element_size() == 2 else torch.float32).numpy()
    return values if form.channels_last else values.transpose(2, 0, 1)


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    return [jpeg(picture(seed)) for seed in range(5)]


@needs_avx2
@pytest.mark.parametrize("with_mean_image", [False, True], ids=["", "mean image"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [224, (101, 31)])
def test_crops_equal_those_of_libjpeg_turbo(records, size, dtype, channels_last, with_mean_image):
    """Crops that begin at each parity and end at each edge, mirrored and not; up to four of an image, some of which keep it."""
    rng = np.random.default_rng(0)
    height, width = np.broadcast_to(size, 2)
    image = rng.uniform(90, 130, (3, 256, 256)).astype(np.float32) if with_mean_image else None
    form = Format(dtype, channels_last, np.array([0.017, 1, 1 / 3], np.float32), image)
    corners = [(top, left) for top in (0, 1, 256 - height) for left in (0, 1, 256 - width)] + [(29, 17)]
    fields = np.array([(*corner, mirror) for corner in corners for mirror in (0, 1)]).T
    jpegs = [records[(n + 2) // 4 % len(records)] for n in range(fields.shape[1])]
    kept = np.zeros((len(jpegs), 256, 256, 3), np.uint8)
    stored = np.dtype(dtype if dtype != "bfloat16" else np.uint16)
    out = np.zeros((len(jpegs), *((height, width, 3) if channels_last else (3, height, width))), stored)
    means = np.where(np.arange(len(jpegs))[:, None] % 4, rng.uniform(-300, 300, (len(jpegs), 3)), 0)
    names = dict(zip(("top", "left", "mirror"), fields))
    jobs = make_jobs(jpegs, out, height=height, width=width, mean=means, **names)
    jobs["keep"][::7] = [room.ctypes.data for room in kept[::7]]
    decoder.decode(jobs, form.scale, image, dtype, channels_last, False, 0, len(jobs))
    assert jobs["done"].all()
    np.testing.assert_array_equal(kept[::7], [rgb(data) for data in jpegs[::7]])
    converted, pixels = np.zeros_like(out), [rgb(data) for data in jpegs]
    again = jobs.copy()
    again["data"], again["out"] = [array.ctypes.data for array in pixels], make_jobs(jpegs, converted)["out"]
    decoder.convert(again, form.scale, image, dtype, channels_last, False, 0, len(jobs))
    for n, job in enumerate(jobs):
        wanted = expected(pixels[n], job, form)
        np.testing.assert_array_equal(out.view(wanted.dtype)[n], wanted)
        np.testing.assert_array_equal(converted.view(wanted.dtype)[n], wanted)


@needs_avx2
def test_images_of_any_size_and_quality_equal_those_of_libjpeg_turbo():
    """Also 1 to 20 columns and lines, where edges meet; with tables of their own, and of more kinds than are kept."""
    rng = np.random.default_rng(1)
    shapes = [(side, other) for side in range(1, 21) for other in (1, 4, 5, 6, 16, 17, 33)]
    shapes += [(other, side) for side, other in shapes] + [(7, 5000), (5000, 7), (130, 70), (64, 64)]
    jpegs = []
    for n, shape in enumerate(shapes):
        noise = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        saved = io.BytesIO()
        Image.fromarray(noise).save(saved, "JPEG", quality=(90, 50, 1, 100)[n % 4], subsampling="4:2:0", optimize=n % 3 == 0)
        jpegs.append(saved.getvalue())
    images = decode(jpegs)
    for data, image in zip(jpegs, images):
        np.testing.assert_array_equal(image, rgb(data))
    out = np.zeros((len(jpegs), 130 * 70 * 3), np.uint8)
    small = [n for n, shape in enumerate(shapes) if shape[0] * shape[1] <= 130 * 70]
    jobs = make_jobs([jpegs[n] for n in small], out[: len(small)])
    decoder.decode(jobs, np.ones(3, np.float32), None, "uint8", True, True, 0, len(jobs))
    assert [jobs["done"][place] for place, n in enumerate(small)] == [shapes[n][1] >= 5 for n in small]


@needs_avx2
@pytest.mark.parametrize("name", ["4:2:0", "4:4:4", "gray"])
def test_samples_equal_those_of_libjpeg_turbo(name):
    """Odd sides, few columns, tables of their own."""
    rng = np.random.default_rng(2)
    for n, (height, width) in enumerate([(9, 5), (16, 16), (17, 33), (64, 40), (41, 130), (130, 23), (256, 300)]):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise[..., 0] if name == "gray" else noise)
        saved = io.BytesIO()
        picture.save(
            saved, "JPEG", quality=(90, 50, 1, 100)[n % 4], optimize=n % 2, subsampling="4:2:0" if name == "4:2:0" else 0
        )
        ((samples, *facts),) = decoder.samples([saved.getvalue()], 1000, False)
        assert facts == [height, width, {"4:2:0": 2, "4:4:4": 1, "gray": 0}[name]]
        rows, columns = -(-height // 16) * 16, -(-width // 16) * 16
        found = np.frombuffer(samples, np.uint8, 3 * rows * columns).reshape(3, rows, columns)
        if name == "4:4:4":
            image = Image.open(saved)
            image.draft("YCbCr", None)
            np.testing.assert_array_equal(found[:, :height, :width], np.asarray(image).transpose(2, 0, 1))
            continue
        # At its own size libjpeg.c leaves a picture's planes as they are.
        planes = libjpeg.rescale(saved.getvalue(), min(height, width), False, False, False)[2:]
        halves = (height + 1) // 2, (width + 1) // 2
        for plane, ours, (high, wide) in zip(planes, found[: 1 if name == "gray" else 3], [(height, width), halves, halves]):
            assert ours[:high, :wide].tobytes() == plane


@needs_avx2
def test_samples_of_the_center_square_and_of_small_images_only():
    data = saved(quality=95)
    assert decoder.samples([data, PLAIN], 40, True) == [None, None] and decoder.samples([], 40, True) == []
    (whole, *_), (other, *_) = decoder.samples([data, PLAIN], 41, False)
    ((middle, *facts),) = decoder.samples((memoryview(data),), 41, True)
    luma = slice(48 * 48)
    assert facts == [48, 40, 2] and middle[luma] == whole[luma] != other[luma]
    for wrong in ([data, "text"], 5, None):
        with pytest.raises(TypeError):
            decoder.samples(wrong, 41, False)


def changed(data: bytes, marker: int, place: int, value: int) -> bytes:
    """With another byte in the first segment of `marker`."""
    found = bytearray(data)
    found[data.index(bytes([0xFF, marker])) + 4 + place] = value
    return bytes(found)


def saved(**options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(9, 48, 40)).save(out, "JPEG", **({"quality": 90, "subsampling": "4:2:0"} | options))
    return out.getvalue()


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
PLAIN = saved()
IRREGULAR = {
    "4:4:4": saved(subsampling="4:4:4"),
    "4:2:2": saved(subsampling="4:2:2"),
    "progressive": saved(progressive=True),
    "restart markers": saved(restart_marker_blocks=4),
    "RGB by Adobe's marker": PLAIN[:2] + ADOBE + b"\x00" + PLAIN[20:],
    "fill bytes before the end": PLAIN[:-2] + b"\xff" + PLAIN[-2:],
    "no Huffman tables, for which libjpeg-turbo takes the standard ones": PLAIN.replace(b"\xff\xc4", b"\xff\xfe"),
    "coefficients beyond 8 bits": changed(saved(quality=100), 0xDB, 1, 255),
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_an_irregular_image_is_left_to_libjpeg_turbo(name):
    data = IRREGULAR[name]
    out = np.zeros((2, 48, 40, 3), np.uint8)
    jobs = make_jobs([data, PLAIN], out)
    decoder.decode(jobs, np.ones(3, np.float32), None, "uint8", True, True, 0, 2)
    assert jobs["done"].tolist() == [0, int(decoder.AVAILABLE)]
    assert decode_jobs(jobs, Format("uint8", True), 0, 2) == {}
    pixels = np.zeros((48, 40, 3), np.uint8)
    libjpeg.decode(data, pixels)
    np.testing.assert_array_equal(out, [pixels, rgb(PLAIN)])
    if name != "4:4:4":
        assert decoder.samples([data], 1000, False) == [None]


@pytest.mark.parametrize(
    "data",
    [
        PLAIN[:2] + ADOBE + b"\x01" + PLAIN[20:],
        PLAIN[:20] + b"\xff" + PLAIN[20:],
        PLAIN[:20] + b"\xff\xfe\x00\x06text" + PLAIN[20:],
        PLAIN + b"abc",
    ],
    ids=["YCbCr by Adobe's marker", "fill bytes", "a comment", "bytes behind the end"],
)
@needs_avx2
def test_other_headers_are_regular_too(data):
    out = np.zeros((1, 48, 40, 3), np.uint8)
    jobs = make_jobs([data], out)
    decoder.decode(jobs, np.ones(3, np.float32), None, "uint8", True, True, 0, 1)
    assert jobs["done"].all()
    np.testing.assert_array_equal(out[0], rgb(PLAIN))


HEADER_END = PLAIN.index(b"\xff\xda") + 14
# 4,094 gray MCUs by the standard tables: four blocks of luma, 00 1010 each, and two of chroma, 00 00.
WIDE = PLAIN[:HEADER_END] + 4094 * b"\x28\xa2\x8a\x00" + PLAIN[-2:]
WIDE = changed(changed(changed(WIDE, 0xC0, 2, 16), 0xC0, 3, 0xFF), 0xC0, 4, 0xDD)
DAMAGED = {
    "cut": (PLAIN[:-100], "Premature end of JPEG file"),
    "cut with an end": (PLAIN[:-100] + b"\xff\xd9", "Corrupt JPEG data: premature end of data segment"),
    "bytes after the data": (PLAIN[:-2] + bytes(30) + PLAIN[-2:], "Corrupt JPEG data: 25 extraneous bytes before marker 0xd9"),
    "a marker within": (PLAIN[:-100] + b"\xff\xd0" + PLAIN[-98:], "Corrupt JPEG data: premature end of data segment"),
    "no size": (PLAIN[:100], "Premature end of JPEG file"),
    "65,501 columns": (WIDE, "Maximum supported image dimension is 65500 pixels"),
    "a height of 0": (changed(PLAIN, 0xC0, 2, 0), "Empty JPEG image (DNL not supported)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_as_by_libjpeg_turbo(name):
    data, message = DAMAGED[name]
    assert decoder.samples([data], 1000, False) == [None]
    with pytest.raises(ValueError) as told:
        decode([PLAIN, data])
    assert str(told.value) == f"jpegs[1]: {message}"


def test_images_that_begin_at_one_address_are_told_apart_by_their_length():
    whole = memoryview(IRREGULAR["4:2:2"])
    with pytest.raises(ValueError, match=r"^jpegs\[1\]: Premature end of JPEG file$"):
        decode([whole, whole[:-100]])


def test_what_follows_a_crop_is_read_only_when_asked_for():
    data = jpeg(picture(3))
    data = data[: len(data) * 9 // 10] + b"\xff\xd9"
    out = np.zeros((1, 64, 64, 3), np.uint8)
    jobs = make_jobs([data], out, height=64, width=64)
    assert decode_jobs(jobs, Format("uint8", True), 0, 1) == {0: "Corrupt JPEG data: premature end of data segment"}
    if decoder.AVAILABLE:
        assert decode_jobs(jobs, Format("uint8", True), 0, 1, to_end=False) == {}
        np.testing.assert_array_equal(out[0], rgb(jpeg(picture(3)))[:64, :64])


@pytest.mark.parametrize(
    "change",
    [{"top": -1}, {"left": 33}, {"height": 0}, {"width": 257}, {"length": -1}, {"height": 2**31 - 1}, {"top": 2**31 - 1}],
    ids=str,
)
def test_crops_beyond_their_images_are_refused(records, change):
    jobs = make_jobs(records[:1], np.zeros((1, 256, 256, 3), np.uint8), **({"height": 224, "width": 224} | change))
    for call in (decoder.decode, decoder.convert):
        with pytest.raises(ValueError, match="do not lie in their images"):
            call(jobs, np.ones(3, np.float32), None, "uint8", True, True, 0, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones(2, np.float32), None, "uint8", True, True, 0, 1),
        (np.ones(3, np.float32), np.ones((3, 255, 256), np.float32), "float32", True, True, 0, 1),
        (np.ones(3, np.float32), None, "int8", True, True, 0, 1),
        (np.ones(3, np.float32), None, "uint8", True, True, 0, 2),
        (np.ones(3, np.float32), None, "uint8", True, True, -1, 1),
    ],
)
def test_arguments_that_do_not_fit_are_refused(records, arguments):
    jobs = make_jobs(records[:1], np.zeros((1, 256, 256, 3), np.uint8))
    with pytest.raises(ValueError, match="do not fit each other"):
        decoder.decode(jobs, *arguments)


def test_half_precision_rounds_as_torch_does():
    """With subnormals and infinities; by the code for this CPU and, the last seven values, by the plain one."""
    pixels = np.arange(255, dtype=np.uint8).reshape(1, 85, 3)
    for exponent in range(-40, 16):
        form = Format("float16", True, np.array([1.1, -1.37, 0.777], np.float32) * np.float32(2) ** exponent)
        for dtype in ("float16", "bfloat16"):
            out = np.zeros((1, 85, 3), np.uint16)
            jobs = make_jobs([b""], out[None], data=pixels.ctypes.data, image_height=1, image_width=85, height=1, width=85)
            decoder.convert(jobs, form.scale, None, dtype, True, False, 0, 1)
            wanted = expected(pixels, jobs[0], Format(dtype, True, form.scale))
            np.testing.assert_array_equal(out, wanted)


@needs_avx2
def test_damaged_images_are_taken_only_where_libjpeg_turbo_takes_them():
    """A few of those that `make fuzz` makes: flipped bits, other header bytes, cuts."""
    rng = np.random.default_rng(0)
    jpegs = corpus()
    damaged = []
    for number in range(1500):
        data = bytearray(jpegs[number % len(jpegs)])
        for place in rng.integers(0, len(data) if number % 2 else min(len(data), 623), 1 + number % 3):
            data[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(data[: rng.integers(len(data))] if number % 10 == 0 else data))
    taken = [data for data, samples in zip(damaged, decoder.samples(damaged, 1000, False)) if samples]
    assert 150 < len(taken) < 1000
    for data in taken:
        libjpeg.check(data)
    out = np.zeros((len(damaged), 80 * 80 * 3), np.uint8)
    jobs = make_jobs(damaged, out)
    jobs = jobs[(jobs["height"] > 0) & (jobs["width"] > 0) & (jobs["height"] * jobs["width"] <= 80 * 80)]
    decoder.decode(jobs, np.ones(3, np.float32), None, "uint8", True, True, 0, len(jobs))
    assert 150 < jobs["done"].sum() < 1000
    for job in jobs[jobs["done"] == 1]:
        number = int(job["out"] - out.ctypes.data) // out.shape[1]
        pixels = np.zeros((job["height"], job["width"], 3), np.uint8)
        libjpeg.decode(damaged[number], pixels)
        np.testing.assert_array_equal(out[number, : pixels.size].reshape(pixels.shape), pixels)


def test_decode_takes_crops_and_a_list_of_images_that_differ(records):
    small = saved()
    whole, other = decode([records[0], small], threads=2)
    np.testing.assert_array_equal(whole, rgb(records[0]))
    np.testing.assert_array_equal(other, rgb(small))
    center = decode([records[0], small], size=(20, 31))
    np.testing.assert_array_equal(center, [rgb(records[0])[118:138, 112:143], rgb(small)[14:34, 4:35]])
    placed = decode([small, small], 20, [(0, 20), (28, 1)], "float32", "NCHW")
    np.testing.assert_array_equal(placed, [rgb(small)[:20, 20:].transpose(2, 0, 1), rgb(small)[28:, 1:21].transpose(2, 0, 1)])
    assert placed.dtype == np.float32 and decode([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of uint8, float32, float16, not 'int8'"),
        ({"layout": "CHW"}, "layout must be one of NHWC, NCHW, not 'CHW'"),
        ({"crop": [(0, 0)]}, "`crop` says where crops begin, so `size` must say how large they are"),
        ({"size": 8, "crop": [(0.5, 0)]}, "`crop` must be whole numbers of shape (1, 2), not float64 of shape (1, 2)"),
        ({"size": 8, "crop": [(0, 0)] * 2}, "`crop` must be whole numbers of shape (1, 2), not int64 of shape (2, 2)"),
        ({"size": 8.5}, "`size` must be a whole number or two, (height, width), not 8.5"),
        ({"size": (8, 8, 8)}, "`size` must be a whole number or two, (height, width), not (8, 8, 8)"),
        ({"size": 48}, "jpegs[0] has 48 rows of 40 pixels: a crop of 48 by 48 at (0, -4) is outside"),
        ({"size": 0}, "jpegs[0] has 48 rows of 40 pixels: a crop of 0 by 0 at (24, 20) is outside"),
        ({"size": 8, "crop": [(41, 0)]}, "jpegs[0] has 48 rows of 40 pixels: a crop of 8 by 8 at (41, 0) is outside"),
    ],
)
def test_decode_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError) as told:
        decode([PLAIN], **arguments)
    assert str(told.value) == message
