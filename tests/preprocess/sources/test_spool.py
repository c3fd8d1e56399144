"""Packed images are unpacked only once."""

import json

import pytest

from imagefeed.dataset.files import owner
from imagefeed.preprocess.engine import ProcessRunner
from imagefeed.preprocess.image import ImageOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import find_images
from tests import rawforms


def build(raw, out):
    return build_dataset(find_images(raw), out, ImageOptions(size=32), 0, ProcessRunner(2))


@pytest.fixture(scope="module")
def images():
    return rawforms.make_images()


def test_an_interrupted_build_resumes_without_unpacking_again(images, tmp_path):
    raw, out = rawforms.write_parquet(tmp_path / "raw", images), tmp_path / "out"
    build(raw, tmp_path / "whole")
    calls = []

    def stop(images, bytes_read, rejected):
        raise KeyboardInterrupt

    source = find_images(raw)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(source, out, ImageOptions(size=32), 0, ProcessRunner(2), progress=stop)
    spool = out / ".build" / "spool"
    assert len(list(spool.glob("*.npz"))) == 4
    before = {path: path.stat().st_mtime_ns for path in spool.iterdir()}
    (spool / f".left.{owner()}_all.0123abcd.tmp").write_bytes(b"by a worker that was killed")

    def note(files, images, bytes_written):
        calls.append((files, images, bytes_written))
        assert {path: path.stat().st_mtime_ns for path in spool.iterdir()} == before

    build_dataset(find_images(raw), out, ImageOptions(size=32), 0, ProcessRunner(2), unpacking=note)
    assert [sum(column) for column in zip(*calls)] == [4, 32, 0]
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    # A finished dataset is neither unpacked nor written again; a missing shard is rebuilt.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    build_dataset(find_images(raw), out, ImageOptions(size=32), 0, ProcessRunner(2), unpacking=note)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before and len(calls) == 4
    shard = next(out.glob("train-*.tfrecord"))
    content = shard.read_bytes()
    shard.unlink()
    build(raw, out)
    assert shard.read_bytes() == content and json.loads((out / "dataset.json").read_text())["version"] == 1
