"""Videos in a class's folder become frames, exactly and repeatably."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import BadImage, ImageOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image
from imagefeed.preprocess.sources.spool import unpack
from imagefeed.preprocess.sources.video import Video
from tests.rawtree import jpeg

ROOT = Path(__file__).parents[3]
FRAMES = 50  # at 10 a second


def make_video(path, *options, frames=FRAMES, rate=10) -> None:
    """A video whose frame n is gray of brightness 4 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.repeat((np.arange(frames, dtype=np.uint8) * 4)[:, None], 32 * 48 * 3, 1).tobytes()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x32", "-r", str(rate), "-i", "pipe:"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *options, str(path)]
    subprocess.run(command, input=pixels, check=True)


def brightness(png: bytes) -> float:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 32))
    return float(np.asarray(image).mean())


def frames(path, frames_per_second=1.0) -> list[bytes]:
    video = Video(path.name, "train", 0, path.stat().st_size, frames_per_second)
    return [png for _, _, png in video.read(path.parent)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.mkv", ["-c:v", "ffv1"]),
        ("x.mp4", ["-c:v", "libx264", "-qp", "0"]),
        ("x.mov", ["-c:v", "mpeg4", "-q:v", "1"]),
        ("x.avi", ["-c:v", "mjpeg", "-q:v", "1"]),
        ("x.webm", ["-c:v", "libvpx", "-b:v", "4M", "-deadline", "realtime"]),
    ],
)
def test_one_frame_is_extracted_per_second(name, options, tmp_path):
    make_video(tmp_path / name, *options)
    assert [round(brightness(png) / 4) for png in frames(tmp_path / name)] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.4, [0, 25]), (2.0, range(0, 50, 5)), (4.0, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]), (10.0, range(50)), (1000.0, range(50))],
)
def test_frames_per_second(rate, expected, tmp_path):
    """No frame is extracted twice, however high the rate."""
    make_video(tmp_path / "x.mkv", "-c:v", "ffv1")
    expected = list(expected)
    assert [round(brightness(png) / 4) for png in frames(tmp_path / "x.mkv", rate)][: len(expected)] == expected


def test_a_gap_between_timestamps_is_not_filled(tmp_path):
    """Two frames 20 hours apart; a constant-rate filter would write 72,000."""
    make_video(tmp_path / "x.mkv", "-c:v", "ffv1", "-vf", "setpts=N*72000/TB", "-fps_mode", "vfr", frames=2)
    assert len(frames(tmp_path / "x.mkv")) == 2


def test_a_single_frame_is_a_video(tmp_path):
    make_video(tmp_path / "x.mp4", "-c:v", "libx264", frames=1, rate=50)
    assert len(frames(tmp_path / "x.mp4")) == 1


def cut(path):
    make_video(path, "-c:v", "libx264", "-g", "5", "-movflags", "+faststart")
    os.truncate(path, path.stat().st_size - 10)


def damage(path):
    make_video(path, "-c:v", "mjpeg", "-q:v", "1")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(range(200)) * 2
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (cut, "cannot read whole"),
        (damage, "cannot read whole"),
        (lambda path: path.write_text("no video"), "cannot read whole"),
        (lambda path: path.write_bytes(b""), "cannot read whole"),
        (lambda path: path.write_bytes(jpeg(40, 50, 1)), "cannot read whole"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), "cannot read whole"),
        (lambda path: path.write_text(f"ffconcat version 1.0\nfile '{path.parent}/other.mkv'\n"), "cannot read whole"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_files_that_ffmpeg_cannot_read_are_bad_images(prepare, reason, tmp_path):
    make_video(tmp_path / "other.mkv", "-c:v", "ffv1")
    prepare(tmp_path / "x.mp4")
    with pytest.raises(BadImage, match=reason):
        frames(tmp_path / "x.mp4")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Class a: three images and a video; class b: two videos, one of them bad."""
    root = tmp_path_factory.mktemp("raw")
    make_video(root / "train" / "a" / "1.mkv", "-c:v", "ffv1")
    for number in range(3):
        (root / "train" / "a" / f"{number}.jpg").write_bytes(jpeg(40, 50, number))
    make_video(root / "train" / "b" / "images" / "2.MP4", "-c:v", "libx264")
    (root / "train" / "b" / "3.avi").write_text("no video")
    return root


def test_frames_are_listed_with_images_under_the_label_of_their_folder(raw, tmp_path):
    source = find_images(raw)
    assert (source.layout, source.num_images, len(source.packed)) == ("folders", 3, 3)
    found = unpack(source, tmp_path, ProcessRunner(2)).splits["train"]
    labels = dict(zip(found.paths, found.labels.tolist()))
    assert labels == (
        {f"train/a/{number}.jpg": 0 for number in range(3)}
        | {f"train/a/1.mkv#{number:06d}": 0 for number in range(1, 6)}
        | {f"train/b/images/2.MP4#{number:06d}": 1 for number in range(1, 6)}
        | {"train/b/3.avi": 1}
    )


def test_images_keep_their_own_files_and_frames_are_in_the_spool(raw, tmp_path):
    source = unpack(find_images(raw), tmp_path, ProcessRunner(1))
    images = source.images("train", np.array([0, 3, 4]))
    assert [image.path for image in images] == ["train/a/0.jpg", "train/a/1.mkv#000001", "train/a/1.mkv#000002"]
    assert read_image(raw, images[0]) == jpeg(40, 50, 0)
    assert [round(brightness(read_image(raw, image)) / 4) for image in images[1:]] == [0, 10]


def test_a_bad_video_is_reported_like_a_bad_image(raw, tmp_path):
    out = tmp_path / "out"
    manifest = build_dataset(find_images(raw), out, ImageOptions(size=16), 0, ProcessRunner(2), max_rejected=0.1)
    assert manifest.split("train").counts == (8, 5) and manifest.options["frames_per_second"] == 1.0
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    (bad,) = [line for line in rejected if line["action"] == "rejected"]
    assert bad["path"] == "train/b/3.avi" and bad["reason"].startswith("a video that ffmpeg cannot read whole")
    command = [sys.executable, "-m", "preprocess", "build", raw, out, "--size", "16", "--max-rejected", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{raw}: folders\n") and "train  train  3 + 3 videos        2  known" in done.stdout
    other = find_images(raw, frames_per_second=2)
    with pytest.raises(UserError, match="begun with frames_per_second 1.0, this call says 2"):
        build_dataset(other, out, ImageOptions(size=16), 0, ProcessRunner(2), max_rejected=0.1)


def test_any_number_of_workers_unpacks_the_same_bytes(raw, tmp_path):
    for workers in (1, 3):
        unpack(find_images(raw), tmp_path / str(workers), ProcessRunner(workers))
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "3"))
    assert one == three and len(one) == 6


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_an_invalid_rate_is_refused(raw, rate):
    with pytest.raises(UserError, match="choose a number above 0"):
        find_images(raw, frames_per_second=rate)
