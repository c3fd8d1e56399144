"""The drawn sample: its contents, the same bytes each time, and what it refuses to overwrite."""

import fcntl
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sample import tree as sample

IMAGES, CLASSES, SEED = 200, 10, 3
OPTIONS = json.dumps({"images": 4, "classes": 2, "seed": 0, "version": sample.VERSION})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, list[tuple[int, int, int]]]:
    raw = tmp_path_factory.mktemp("sample") / "raw"
    calls = []
    assert sample.draw_sample(raw, IMAGES, CLASSES, SEED, lambda *values: calls.append(values)) == IMAGES
    return raw, calls


@pytest.fixture(scope="module")
def raw(drawn) -> Path:
    return drawn[0]


@pytest.fixture(scope="module")
def opened(raw) -> dict[str, Image.Image]:
    """Every image of the sample, decoded to the last row, by its path."""
    images = {}
    for path in sorted(raw.glob("*/*/*")):
        with Image.open(path) as image:
            image.load()
            images[str(path.relative_to(raw))] = image
    return images


def test_each_class_has_its_share_of_train_and_val(raw, opened):
    counts = Counter(tuple(path.split("/")[:2]) for path in opened)
    names = [of.name for of in sample.sample_classes(CLASSES)]
    assert counts == {("train", name): 17 for name in names} | {("val", name): 3 for name in names}
    assert sorted(os.listdir(raw)) == ["sample.json", "train", "val"]


def test_images_that_do_not_divide_evenly_are_all_drawn():
    counts = [sample._counts(1003, 10, of) for of in sample.sample_classes(10)]
    assert sum(sum(count.values()) for count in counts) == 1003
    assert {sum(count.values()) for count in counts} == {100, 101}


def test_every_file_is_a_jpeg(opened):
    assert {image.format for image in opened.values()} == {"JPEG"}


def test_sizes_are_distributed_as_in_imagenet(opened):
    sizes = np.array([image.size for image in opened.values()])
    assert np.abs(sizes.mean(0) / (470, 400) - 1).max() < 0.1
    assert 0.2 < (sizes[:, 1] > sizes[:, 0]).mean() < 0.4
    assert 0.6 < (sizes.max(1) == 500).mean() < 0.9
    assert sizes.max(1).min() < 170 and 900 < sizes.max() <= 2400


def test_a_few_files_are_gray_or_cmyk_or_turned(opened):
    """1 file in 50 of each class; about that many in a few small classes."""
    modes = Counter(image.mode for image in opened.values())
    turned = [image.getexif()[ExifTags.Base.Orientation] for image in opened.values() if image.getexif()]
    assert set(modes) == {"RGB", "L", "CMYK"} and set(turned) <= set(range(2, 9))
    assert all(IMAGES / 100 <= count <= IMAGES / 25 for count in (modes["L"], modes["CMYK"], len(turned)))


def test_a_viewer_that_applies_the_orientation_shows_the_image_upright():
    upright = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    for orientation, turn in sample.TURNS.items():
        stored = upright.transpose(turn)
        stored.getexif()[ExifTags.Base.Orientation] = orientation
        assert np.array_equal(ImageOps.exif_transpose(stored), upright)


def test_a_cmyk_file_shows_the_colors_that_were_drawn(opened):
    """The mean color of a CMYK file equals that of the same picture in RGB, not of its negative."""
    path = next(path for path, image in opened.items() if image.mode == "CMYK")
    split, name, file = path.split("/")
    of = next(of for of in sample.sample_classes(CLASSES) if of.name == name)
    number = int(file[-10:-5])
    plain = of._replace(ordinal=of.ordinal + 5)  # the same number, but none of the odd slots
    picture = Image.open(io.BytesIO(sample.draw_image(split, plain, number, SEED)))
    assert picture.mode == "RGB"
    assert np.allclose(np.mean(opened[path].convert("RGB"), (0, 1)), np.mean(picture, (0, 1)), atol=3)


def test_an_image_depends_only_on_seed_split_class_and_number(raw):
    """An image drawn alone equals the one that several workers wrote."""
    first = sample.sample_classes(CLASSES)[0]
    for of in sample.sample_classes(CLASSES)[::3]:
        for split, number in (("train", 0), ("train", 16), ("val", 2)):
            stored = (raw / sample.image_path(split, of, number)).read_bytes()
            assert sample.draw_image(split, of, number, SEED) == stored
    assert len({sample.draw_image(split, first, 1, seed) for split in ("train", "val") for seed in (3, 4)}) == 4


def test_no_image_is_drawn_twice(raw):
    assert len({path.read_bytes() for path in raw.glob("*/*/*")}) == IMAGES


def test_progress_counts_found_images_then_each_drawn_one(drawn):
    raw, calls = drawn
    assert calls[0] == (0, 0, 0)
    assert Counter(images for images, _, _ in calls[1:]) == {1: IMAGES}
    assert sum(size for _, size, _ in calls) == sum(path.stat().st_size for path in raw.glob("*/*/*"))


def test_the_mean_color_does_not_give_the_class_away(opened):
    colors = {path: np.mean(image.convert("RGB").resize((8, 8)), (0, 1)) for path, image in opened.items()}
    names = sorted({path.split("/")[1] for path in colors})
    centers = [np.mean([c for path, c in colors.items() if path.startswith(f"train/{name}/")], 0) for name in names]
    nearest = {path: names[np.linalg.norm(color - centers, axis=1).argmin()] for path, color in colors.items()}
    assert np.mean([path.split("/")[1] == name for path, name in nearest.items()]) < 0.4


def test_a_second_call_draws_only_the_missing_images(tmp_path):
    raw = tmp_path / "raw"
    assert sample.draw_sample(raw, 12, 3, 0) == 12
    before = {path: path.stat().st_mtime_ns for path in raw.glob("*/*/*")}
    gone = min(before)
    data = gone.read_bytes()
    gone.unlink()
    half = gone.with_name(f".{gone.name}.4242.tmp")
    half.write_bytes(data[:100])
    calls = []
    assert sample.draw_sample(raw, 12, 3, 0, lambda *values: calls.append(values)) == 1
    assert calls == [(11, 0, 0), (1, len(data), 0)]
    assert gone.read_bytes() == data and not half.exists()
    assert all(path.stat().st_mtime_ns == then for path, then in before.items() if path != gone)
    assert sample.draw_sample(raw, 12, 3, 0) == 0


def test_a_sample_with_other_options_is_refused_with_both_values(raw):
    with pytest.raises(UserError, match="holds a sample with images 200, not 100 and seed 3, not 4; ask for the same"):
        sample.draw_sample(raw, 100, CLASSES, 4)


@pytest.mark.parametrize(
    ("content", "foreign", "message"),
    [
        (None, "holiday.jpg", "holds holiday.jpg, which is not part of this sample; move it away, or choose another folder"),
        (OPTIONS, "train/zebra", "holds train/zebra, which is not part of this sample"),
        (OPTIONS, "train/balloon/mine.JPEG", "holds train/balloon/mine.JPEG, which is not part of this sample"),
        (OPTIONS, ".balloon.1.tmp", "holds .balloon.1.tmp, which is not part of this sample"),
        ("", None, "sample.json: not readable .*; choose another folder"),
        ("[]", None, "sample.json: not readable .*; choose another folder"),
        ("{}", None, "sample.json: not readable .*; choose another folder"),
        ('{"images": 4}', None, "sample.json: not readable .*; choose another folder"),
    ],
)
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, content, foreign, message):
    if content is not None:
        (tmp_path / "sample.json").write_text(content)
    if foreign:
        (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / foreign).write_bytes(b"a photograph")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        sample.draw_sample(tmp_path, 4, 2, 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "raw"):
        with pytest.raises(UserError, match="a file is in the way"):
            sample.draw_sample(path, 4, 2, 0)


def test_two_runs_do_not_draw_into_the_same_folder(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is drawing into it"):
        sample.draw_sample(tmp_path, 4, 2, 0)
    os.close(handle)


@pytest.mark.parametrize(
    ("images", "classes", "seed", "message"),
    [
        (100, 1, 0, "a sample has 2 to 1,080 classes, not 1; choose --classes in that range"),
        (10**6, 1081, 0, "a sample has 2 to 1,080 classes, not 1081"),
        (19, 10, 0, "19 images are too few for 10 classes; choose --images 20 or more"),
        (-1, 10, 0, "-1 images are too few for 10 classes"),
        (20, 10, -1, "the seed is -1; choose --seed 0 or more"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_created(tmp_path, images, classes, seed, message):
    with pytest.raises(UserError, match=message):
        sample.draw_sample(tmp_path / "raw", images, classes, seed)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("kind", sample.KINDS)
def test_pictures_of_one_kind_differ(kind):
    of = sample.SampleClass(kind, kind, None, 0)
    pictures = [Image.open(io.BytesIO(sample.draw_image("train", of, number, 0))).convert("L") for number in (1, 2)]
    small = [np.asarray(picture.resize((16, 16)), float) for picture in pictures]
    assert np.abs(small[0] - small[1]).mean() > 5
    assert min(pixels.std() for pixels in small) > 3


def test_with_more_classes_than_kinds_a_class_is_a_kind_in_one_color():
    classes = sample.sample_classes(sample.MAX_CLASSES)
    assert len({of.name for of in classes}) == len({(of.kind, of.ink) for of in classes}) == sample.MAX_CLASSES >= 1000
    assert [of.name for of in sample.sample_classes(19)][:2] == ["balloon-red", "brick-wall-red"]
    assert all(of.ink is None for of in sample.sample_classes(len(sample.KINDS)))


@pytest.mark.parametrize(("color", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_a_class_in_one_color_keeps_it(color, channel):
    """A red wall stays more red than green or blue in any light."""
    wall = next(of for of in sample.sample_classes(1000) if of.name == f"brick-wall-{color}")
    for number in range(20, 26):
        picture = Image.open(io.BytesIO(sample.draw_image("train", wall, number, 0)))
        assert np.mean(picture, (0, 1)).argmax() == channel
