"""Videos that other readers read otherwise (docs/video.md): colors, rotation, edit lists and tracks."""

import io

import numpy as np
import pytest
from PIL import Image

from imagefeed.preprocess.sources.video import Video
from tables import video_inputs

# ITU-T H.273, table 4, of Y 120, Cb 90, Cr 190.
EXACT = {"flat": (220, 86, 44), "601": (220, 86, 44), "709": (232, 96, 41), "2020": (225, 88, 40), "mixed": (232, 96, 41)}
EXACT["full"] = (218, 98, 49)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    video_inputs.write_inputs(folder)
    return folder


def frames(folder, name):
    images = Video(name, "train", 0, 0, 25.0).read(folder)
    return [np.asarray(Image.open(io.BytesIO(image[2])).convert("RGB")) for image in images if image]


@pytest.mark.parametrize("name", EXACT)
def test_the_tagged_matrix_and_range_are_obeyed(name, videos):
    pixels = frames(videos, f"{name}.mp4")[0].reshape(-1, 3)
    assert np.abs(pixels.astype(int) - EXACT[name]).max() <= 1


def test_a_rotated_video_is_upright(videos):
    first = frames(videos, "rotated.mp4")[0]
    assert first.shape == (320, 240, 3) and first[20, 120, 0] > 125 > first[-20, 120, 0]


def test_a_mirrored_video_is_mirrored(videos):
    first = frames(videos, "mirrored.mp4")[0]
    assert first.shape == (240, 320, 3) and first[120, 20, 0] < 125 < first[120, -20, 0]


def test_the_containers_cropping_is_applied(videos):
    assert frames(videos, "cropped.mkv")[0].shape == (208, 288, 3)


def test_frames_before_an_edit_list_are_left_out(videos):
    assert [video_inputs.number(frame) for frame in frames(videos, "edited.mp4")] == list(range(25, 75))


def test_the_first_track_is_taken(videos):
    assert frames(videos, "tracks.mkv")[0].shape == (120, 160, 3)


@pytest.mark.parametrize("kind", video_inputs.SEEKS)
def test_every_frame_comes_in_its_order(kind, videos):
    assert [video_inputs.number(frame) for frame in frames(videos, f"seek.{kind}")] == list(range(250))
