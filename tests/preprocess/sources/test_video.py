"""Videos in a class's folder become frames, exactly and repeatably."""

import contextlib
import errno
import io
import json
import os
import re
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
from imagefeed.preprocess.sources.frames import exact_rate
from imagefeed.preprocess.sources.listing import read_image
from imagefeed.preprocess.sources.spool import unpack
from imagefeed.preprocess.sources.video import Video
from tests import faultyfs
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
    return read(path, frames_per_second)[0]


def read(path, frames_per_second=1000.0) -> tuple[list[bytes], str]:
    """The frames, and the note for the report."""
    video = Video(path.name, "train", 0, path.stat().st_size, frames_per_second)
    found: list[bytes] = []
    reader = video.read(path.parent)
    while True:
        try:
            image = next(reader)
        except StopIteration as end:
            return found, end.value
        if image is None:
            found.clear()
        else:
            found.append(image[2])


def grays(pngs: list[bytes]) -> list[int]:
    return [round(brightness(png) / 4) for png in pngs]


def ffmpeg(*arguments) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *map(str, arguments)], check=True)


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


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "flv", "ts"])
@pytest.mark.parametrize(
    ("rate", "given"), [("24", 24), ("30", 30), ("30000/1001", 29.97), ("30000/1001", 30000 / 1001), ("60000/1001", 59.94)]
)
def test_a_divisor_of_the_rate_gives_every_nth_frame(rate, given, suffix, tmp_path):
    """Containers round timestamps, and the first frame may come after the start of the file."""
    path = tmp_path / f"x.{suffix}"
    make_video(path, "-c:v", "flv" if suffix == "flv" else "mpeg4", "-output_ts_offset", "0.0137", frames=60, rate=rate)
    every = frames(path, 1000)
    assert len(every) == 60
    for divisor in (1, 2, 3, 24):
        assert frames(path, given / divisor) == every[::divisor], divisor


def test_a_rate_close_to_the_videos_own_gives_every_frame_after_hours(tmp_path):
    """29.97 is a millionth below 30000/1001; frames after 8 hours, in milliseconds."""
    path = tmp_path / "x.mkv"
    make_video(path, "-c:v", "ffv1", "-vf", "setpts=if(N\\,N+863136\\,0)", "-fps_mode", "passthrough", rate="30000/1001")
    assert [len(frames(path, rate)) for rate in (29.97, 30, 60)] == [50, 50, 50]


def test_rates_of_ntsc_are_meant_exactly():
    for short, exact in ((29.97, 30000 / 1001), (23.976, 24000 / 1001), (59.94, 60000 / 1001), (14.985, 15000 / 1001)):
        assert exact_rate(short) == exact
    for plain in (1.0, 25, 30, 29.98, 0.1, 12.5, 1 / 3, 29.97002997):
        assert exact_rate(plain) == plain


def test_a_change_of_resolution_adds_no_frames_and_is_noted(tmp_path):
    for name, size in (("a", "48x32"), ("b", "96x64")):
        make_video(tmp_path / f"{name}.mkv", "-c:v", "mjpeg", "-q:v", "1", "-vf", f"scale={size}", frames=25)
    (tmp_path / "list").write_text("".join(f"file {name}.mkv\n" for name in "abab"))
    ffmpeg("-f", "concat", "-i", tmp_path / "list", "-c", "copy", tmp_path / "x.mkv")
    found, note = read(tmp_path / "x.mkv", 1.0)
    assert grays(found) == [0, 10, 20, 5, 15, 0, 10, 20, 5, 15]
    assert note == "its resolution changes; frames are scaled to that of the first"


@pytest.mark.parametrize(("ratio", "size"), [("64/45", (68, 32)), ("8/9", (48, 36)), ("1/1", (48, 32)), ("0/1", (48, 32))])
def test_pixels_become_square(ratio, size, tmp_path):
    make_video(tmp_path / "x.mp4", "-c:v", "libx264", "-vf", f"setsar={ratio}", frames=1)
    assert Image.open(io.BytesIO(frames(tmp_path / "x.mp4")[0])).size == size


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG"), ("bt709", "")])
def test_hdr_is_noted(transfer, name, tmp_path):
    color = f"setparams=color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc"
    make_video(tmp_path / "x.mkv", "-vf", f"format=yuv420p10le,{color}", "-c:v", "ffv1", frames=2)
    assert read(tmp_path / "x.mkv")[1] == (f"HDR, stored with its {name} curve" if name else "")


OPEN_GROUPS = "-c:v libx264 -x264-params open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=2:b-adapt=0".split()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """50 frames in open groups of pictures of 10, as whole files."""
    folder = tmp_path_factory.mktemp("opened")
    for name, codec in (("x.ts", OPEN_GROUPS), ("x.mp4", OPEN_GROUPS), ("x.mpg", "-c:v mpeg2video -g 10 -bf 2 -q:v 1".split())):
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=2", "-pix_fmt", "yuv420p", *codec, folder / name)
    return folder


def drop_packets(source, target):
    data = source.read_bytes()
    target.write_bytes(data[len(data) // 3 // 188 * 188 :])


def drop_bytes(source, target):
    data = source.read_bytes()
    target.write_bytes(data[len(data) // 3 :])


def copy_from_the_middle(source, target):
    ffmpeg("-ss", "0.9", "-i", source, "-c", "copy", target)


CUTS = [("x.ts", drop_packets, "ts"), ("x.mpg", drop_bytes, "mpg"), ("x.mp4", copy_from_the_middle, "mp4")]
CUTS += [("x.mp4", copy_from_the_middle, "mkv")]


@pytest.mark.parametrize(("name", "cut_out", "suffix"), CUTS)
def test_streams_cut_without_decoding_keep_the_frames_that_can_be_decoded(name, cut_out, suffix, opened, tmp_path):
    whole, path = frames(opened / name, 1000), tmp_path / f"cut.{suffix}"
    cut_out(opened / name, path)
    found, note = read(path)
    assert 20 <= len(found) < 50 and found == whole[-len(found) :]
    assert re.fullmatch(
        r"cut from a longer video; \w+ frames? left out that cannot be decoded without those before the cut", note
    )
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) * 2 // 3 : len(damaged) * 2 // 3 + 300] = bytes(range(150)) * 2
    path.write_bytes(damaged)
    with pytest.raises(BadImage, match="cannot read whole"):
        frames(path)
    path.write_bytes(damaged[: len(damaged) // 2])
    if suffix in ("ts", "mp4"):  # for the others, the frames before simply are the video
        with pytest.raises(BadImage, match="cannot read whole"):
            frames(path)


def join_with_itself(source, target):
    data = source.read_bytes()
    other = bytearray(data)
    for at in range(3, len(data), 188):  # packet counters, which may go on by chance
        other[at] = other[at] & 0xF0 | (other[at] + 5) & 0xF
    target.write_bytes(data + other)


def test_recordings_joined_in_one_file_are_read_and_noted(opened, tmp_path):
    data = (opened / "x.ts").read_bytes()
    join_with_itself(opened / "x.ts", tmp_path / "x.ts")
    found, note = read(tmp_path / "x.ts")
    assert found == frames(opened / "x.ts", 1000) * 2 and note == "2 recordings joined in one file"
    for at in range(len(data) // 3 // 188 * 188, len(data), 188 * 19):  # a lost packet is no joint
        (tmp_path / "x.ts").write_bytes(data[:at] + data[at + 188 :])
        with contextlib.suppress(BadImage):
            assert "joined" not in read(tmp_path / "x.ts")[1]


def test_a_note_is_reported_once_and_frames_of_a_failed_try_are_taken_back(opened, tmp_path):
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    copy_from_the_middle(opened / "x.mp4", tmp_path / "raw" / "train" / "a" / "x.mp4")
    out = tmp_path / "out"
    manifest = build_dataset(
        find_images(tmp_path / "raw", frames_per_second=25.0), out, ImageOptions(size=16), 0, ProcessRunner(1)
    )
    noted = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines() if '"noted"' in line]
    assert [line["path"] for line in noted] == ["train/a/x.mp4#000001"] and "left out" in noted[0]["reason"]
    assert manifest.num_records == len(frames(tmp_path / "raw" / "train" / "a" / "x.mp4", 25)) > 20
    assert manifest.rejected == {"converted": manifest.num_records, "noted": 1}


def test_frames_of_a_second_try_are_read_past_those_of_the_first(opened, tmp_path):
    """They lie behind them: a file in the spool is written from begin to end."""
    (tmp_path / "raw" / "train" / "a").mkdir(parents=True)
    path = tmp_path / "raw" / "train" / "a" / "x.ts"
    join_with_itself(opened / "x.ts", path)
    source = unpack(find_images(path.parents[2], frames_per_second=25.0), tmp_path / "spool", ProcessRunner(1))
    images = [read_image(path.parents[2], image) for image in source.images("train", np.arange(len(source.splits["train"])))]
    assert images == frames(path, 25) and len(images) == 100
    (spooled,) = (file for file in (tmp_path / "spool").iterdir() if not file.suffix)
    assert spooled.stat().st_size > sum(map(len, images))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (
            "echo 'Unrecognized option' >&2; exit 1",
            UserError,
            "lacks options or formats that videos need; unset IMAGEIO_FFMPEG_EXE",
        ),
        ("kill -9 $$", UserError, "ffmpeg was killed, probably because memory ran out"),
        ("kill -11 $$", BadImage, r"crashes on it \(SIGSEGV\); another version of imageio-ffmpeg may read it"),
    ],
)
def test_a_video_is_not_blamed_for_an_ffmpeg_that_does_not_work(script, error, message, tmp_path, monkeypatch):
    make_video(tmp_path / "x.mp4", "-c:v", "libx264", frames=2)
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(error, match=message):
        frames(tmp_path / "x.mp4")


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
    assert done.stdout.startswith(f"{raw}: read as folders\n") and "train  train  3 + 3 videos        2  known" in done.stdout
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


def test_a_failed_read_is_not_taken_for_a_damaged_video(tmp_path):
    make_video(tmp_path / "raw" / "x.mp4")
    size = (tmp_path / "raw" / "x.mp4").stat().st_size
    with faultyfs.mounted(tmp_path / "raw", tmp_path / "m", direct=True, eio={"x.mp4": (size // 2, size // 2 + 1)}) as mount:
        with pytest.raises(OSError, match="x.mp4") as caught:
            frames(mount / "x.mp4")
        assert caught.value.errno == errno.EIO
