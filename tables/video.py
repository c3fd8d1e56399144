"""docs/video.md: which colors, shapes and frames readers of videos give."""

import io
from pathlib import Path

from tables import video_frames
from tables.common import IMAGEFEED, INPUTS, Page
from tables.video_inputs import COLORS, SEEKS, SHAPES, ffmpeg, number, write_inputs

NUMPY = "numpy==2.4.6"
page = Page("video", ["imageio-ffmpeg==0.8.1", NUMPY], write_inputs)
page.tables.append(video_frames.frames)
colors = page.table("colors", ["Y, Cb, Cr of 120, 90, 190"], list(COLORS))
shapes = page.table("shapes", ["Video"], list(SHAPES))
seeking = page.table("seeking", ["Wrong frames of 40 read at random, of 250", *(kind.upper() for kind in SEEKS)])


def both(label, packages):
    """Decorates a function that makes a reader: of all frames of a file, as (height, width, 3) arrays."""

    def register(make):
        colors.add(label, packages)(lambda: colored(make()))
        shapes.add(label, packages)(lambda: shaped(make()))
        return make

    return register


def colored(read):
    cells = []
    for name, _ in COLORS.values():
        pixels = next(iter(read(INPUTS / f"{name}.mp4")))
        cells.append(", ".join(str(round(value)) for value in pixels[40:-40, 40:-40].reshape(-1, 3).mean(0)))
    return cells


def shaped(read):
    """What there is of each of SHAPES."""
    cells = []
    for name in SHAPES.values():
        try:
            frames = [frame for frame in read(INPUTS / name)]
        except Exception as error:
            cells.append(f"error: {type(error).__name__}")
            continue
        height, width = (first := frames[0]).shape[:2]
        if name == "rotated.mp4":
            upright = height > width and first[20, width // 2, 0] > 125 > first[-20, width // 2, 0]
            stored = width > height and first[5, 40, 0] > 125 and first[-5, 40, 0] > 125
            cells.append("upright" if upright else "as stored" if stored else f"upright, but squashed into {width}x{height}")
        elif name == "mirrored.mp4":
            cells.append("mirrored" if first[height // 2, 40, 0] < 125 < first[height // 2, -40, 0] else "as stored")
        elif name == "edited.mp4":
            cells.append(f"{len(frames)} frames, {number(first)} to {number(frames[-1])}")
        elif name == "alpha.webm":
            left = first[height // 2, width // 4].astype(int)
            cells.append("white" if left.min() > 240 else "green" if left[1] > 150 > left[0] else str(tuple(left.tolist())))
        else:
            cells.append(f"{width}x{height}")
    return cells


def ffmpeg_reader():
    import numpy as np

    def read(path):
        data = ffmpeg("-i", path, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-")
        stream = io.BytesIO(data)
        while stream.readline() == b"P6\n":
            width, height = map(int, stream.readline().split())
            stream.readline()
            yield np.frombuffer(stream.read(width * height * 3), np.uint8).reshape(height, width, 3)

    return read


for shown, release in {"7.0.2": "0.6.0", "9.0.2": "0.8.1"}.items():
    both(f"ffmpeg {shown}", [f"imageio-ffmpeg=={release}", NUMPY])(ffmpeg_reader)


def opencv():
    import cv2

    def read(path):
        video = cv2.VideoCapture(str(path))
        while True:
            whole, pixels = video.read()
            if not whole:
                return
            yield pixels[..., ::-1]

    return read


OPENCV = {release: [f"opencv-python-headless=={release}", "numpy==2.2.6"] for release in ("4.12.0.88", "5.0.0.93")}
for release, packages in OPENCV.items():
    both(f"OpenCV {release}", packages)(opencv)


def av():
    import av

    def read(path):
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")

    return read


for release in ("15.1.0", "18.1.0"):
    both(f"PyAV {release}", [f"av=={release}", NUMPY])(av)
DECORD, MOVIEPY = ["eva-decord==0.6.1", NUMPY], ["moviepy==2.2.1", "imageio-ffmpeg==0.8.1", NUMPY]


@both("eva-decord 0.6.1", DECORD)
def decord():
    import decord

    def read(path):
        video = decord.VideoReader(str(path), ctx=decord.cpu(0))
        for n in range(len(video)):
            yield video[n].asnumpy()

    return read


@both("moviepy 2.2.1", MOVIEPY)
def moviepy():
    from moviepy import VideoFileClip

    def read(path):
        with VideoFileClip(str(path), audio=False) as clip:
            yield from (frame.copy() for frame in clip.iter_frames())

    return read


def extracted(path):
    """The frames as `build` takes them, before it rescales them."""
    import numpy as np
    from PIL import Image

    from imagefeed.preprocess.sources.video import Video

    for image in Video(path.name, "train", 0, 0, 25.0).read(path.parent):
        yield np.asarray(Image.open(io.BytesIO(image[2])).convert("RGB"))


def ours():
    import tempfile

    import numpy as np

    import imagefeed

    def read(path):
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "raw" / "train" / "one"
            raw.mkdir(parents=True)
            (raw / path.name).symlink_to(path)
            options = {"size": 120, "fit": "short", "quality": 100, "frames_per_second": 25, "workers": 1}
            imagefeed.build(raw.parents[1], Path(folder) / "out", **options)
            dataset = imagefeed.Dataset(Path(folder) / "out", "train")
            order = sorted(range(len(dataset)), key=dataset.filename)
            yield from (np.asarray(dataset[n][0]) for n in order)

    return read


colors.add("imagefeed", [IMAGEFEED])(lambda: colored(ours()))
shapes.add("imagefeed", [IMAGEFEED])(lambda: shaped(extracted))


def sought(read):
    """A cell for each container: how many of 40 frames come wrong from `read(path)`, which returns a function of the number."""
    import random

    cells, wanted = [], random.Random(0).sample(range(250), 40)
    for kind in SEEKS:
        frame, wrong = read(INPUTS / f"seek.{kind}"), 0
        for n in wanted:
            try:
                wrong += number(frame(n)) != n
            except Exception:
                wrong += 1
        cells.append(wrong)
    return cells


@seeking.add("OpenCV 5.0.0.93, CAP_PROP_POS_FRAMES", OPENCV["5.0.0.93"])
def opencv_seek():
    import cv2

    def read(path):
        video = cv2.VideoCapture(str(path))

        def frame(n):
            video.set(cv2.CAP_PROP_POS_FRAMES, n)
            return video.read()[1]

        return frame

    return sought(read)


def av_seek(onward, early_s=0):
    import av

    def read(path):
        container = av.open(str(path))
        stream = container.streams.video[0]

        def frame(n):
            at = (stream.start_time or 0) + round(n / 25 / stream.time_base)
            container.seek(max(at - round(early_s / stream.time_base), 0), stream=stream)
            for picture in container.decode(stream):
                if not onward or picture.pts >= at - round(0.02 / stream.time_base):
                    return picture.to_ndarray(format="rgb24")

        return frame

    return sought(read)


seeking.add("PyAV 18.1.0, seek, then the first frame", ["av==18.1.0", NUMPY])(lambda: av_seek(False))
seeking.add("PyAV 18.1.0, seek, then read on to the time", ["av==18.1.0", NUMPY])(lambda: av_seek(True))
seeking.add("PyAV 18.1.0, seek to 4 s earlier, then read on", ["av==18.1.0", NUMPY])(lambda: av_seek(True, 4))


@seeking.add("eva-decord 0.6.1, [n]", DECORD)
def decord_seek():
    import decord

    def read(path):
        video = decord.VideoReader(str(path), ctx=decord.cpu(0))
        return lambda n: video[n].asnumpy()

    return sought(read)


@seeking.add("moviepy 2.2.1, get_frame", MOVIEPY)
def moviepy_seek():
    from moviepy import VideoFileClip

    def read(path):
        clip = VideoFileClip(str(path), audio=False)
        return lambda n: clip.get_frame(n / 25 + 0.001)

    return sought(read)
