"""FFCV's files. Those in the folder ffcv were written by the DatasetWriter of ffcv 1.0.2 with OpenCV: twelve smooth pictures, 48
pixels high and 60 to 71 wide, at quality 90, with the fields image, label (7, 30 and -1 in turns) and weight (n / 4)."""

import io
import lzma
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.beton import FIELD, HEADER
from imagefeed.preprocess.sources.detect import find_images
from imagefeed.preprocess.sources.listing import read_image

# The mean of each picture as it was given to the writer.
COLORS = (
    (140.4, 108.7, 141.8), (103.8, 136.4, 130.3), (110.3, 128.4, 110.9), (90.8, 109.3, 120.5), (145.0, 138.3, 132.6),
    (134.8, 110.6, 107.2), (92.7, 146.7, 121.5), (106.0, 145.1, 106.1), (103.7, 101.4, 158.9), (96.4, 141.7, 129.9),
    (136.7, 120.6, 126.1), (145.3, 120.2, 131.4),
)  # fmt: skip


def data(name: str) -> bytearray:
    return bytearray(lzma.decompress((Path(__file__).with_name("ffcv") / f"{name}.beton.xz").read_bytes()))


def test_images_labels_and_numbers_are_those_that_were_written(tmp_path):
    (tmp_path / "train_500_0.50_90.ffcv").write_bytes(data("train"))
    (tmp_path / "val.beton").write_bytes(data("val"))
    source = find_images(tmp_path, columns=("weight", "label"))
    assert (source.layout, source.classes) == ("FFCV", ("7", "30"))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 9, "val": 3}
    for name, first in {"train": 0, "val": 9}.items():
        for number, image in enumerate(source.images(name, np.arange(len(source.splits[name]))), first):
            with Image.open(io.BytesIO(read_image(source.root, image))) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (60 + number, 48))
                assert np.abs(np.asarray(picture).mean((0, 1)) - COLORS[number]).max() < 1
            assert image.label == (0, 1, -1)[number % 3]
    assert source.splits["val"].columns["weight"].values.tolist() == [2.25, 2.5, 2.75]
    assert source.splits["val"].columns["label"].values.tolist() == [7, 30, -1]
    assert source.images("val", np.array([0]))[0].path == "val.beton#000001"
    (tmp_path / "train_500_0.50_90.ffcv").rename(tmp_path / "mine.beton")
    assert find_images(tmp_path / "mine.beton", "train").num_images == 9


ROWS = HEADER.itemsize + 3 * FIELD.itemsize


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({ROWS: 1}, None, r"image 1 is stored as raw pixels; write the file with RGBImageField\(write_mode='jpg'\)"),
        ({0: 1}, None, "version 1 of FFCV's format, imagefeed reads 2; write it anew"),
        ({HEADER.itemsize: 3}, None, r"not readable as an FFCV file \(0 fields of images, 9 rows\)"),
        ({HEADER.itemsize: 9}, None, r"not readable as an FFCV file \(9\)"),
        ({ROWS + 5: 1}, None, "an image of unknown size"),
        ({}, ROWS + 50, "not readable as an FFCV file"),
        ({}, 10, "not readable as an FFCV file"),
        ({HEADER.itemsize + FIELD.itemsize: 0}, None, "no column of labels, only none; call it one of label, "),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(changes, length, message, tmp_path):
    content = data("train")
    for at, byte in changes.items():
        content[at] = byte
    (tmp_path / "train.beton").write_bytes(content[:length])
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_an_unknown_field_is_named(tmp_path):
    (tmp_path / "train.beton").write_bytes(data("train"))
    with pytest.raises(UserError, match="no column 'mass', as columns asks for; there are label, weight"):
        find_images(tmp_path, columns=("mass",))
