"""A disk that fails while images are read costs a sentence and no image."""

import errno
from pathlib import Path

import pytest

from imagefeed.preprocess.options import ImageOptions, SourceOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import read_tree
from tests import faultyfs, rawforms
from tests.rawtree import Here

FORMS = {
    # what writes the raw tree, a file of it, and bytes of that to fail: images, and for csv a table
    "folders": (rawforms.write_folders, "n03995372_2.JPEG", (4000, 6000)),
    "archives": (rawforms.write_archives, "ILSVRC2012_img_train.tar", (20_000, 21_000)),
    "csv": (rawforms.write_csv, "val.csv", (0, 1)),
    "parquet": (rawforms.write_parquet, "train-00001-of-00002.parquet", (20_000, 21_000)),
}


def build(raw: Path, out: Path) -> dict[str, bytes]:
    manifest = build_dataset(read_tree(raw, SourceOptions()), out, ImageOptions(size=64), 0, Here())
    assert not manifest.rejected
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def images():
    return rawforms.make_images()


@pytest.mark.parametrize("form", FORMS)
def test_short_reads_lose_nothing_and_failed_reads_end_a_build_that_goes_on_later(images, tmp_path, form):
    write, name, eio = FORMS[form]
    raw = write(tmp_path / "raw", images)
    with faultyfs.mounted(raw, tmp_path / "short", short=4096) as mount:
        whole = build(mount, tmp_path / "of short reads")
    with faultyfs.mounted(raw, tmp_path / "failing", eio={name: eio}) as mount, pytest.raises(OSError, match=name) as caught:
        build(mount, tmp_path / "out")
    assert caught.value.errno == errno.EIO
    assert build(raw, tmp_path / "out") == whole
