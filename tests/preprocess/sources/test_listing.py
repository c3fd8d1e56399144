"""Reading an image never hangs or exhausts the memory, whatever is at its path."""

import errno
import os

import pytest

from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.listing import MAX_BYTES, SourceImage, read_image


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
        (lambda path: (path.touch(), os.truncate(path, MAX_BYTES + 1)), "bytes are more than"),
    ],
)
def test_anything_but_a_readable_file_is_a_bad_image(tmp_path, prepare, reason):
    """None of them blocks the worker or fills its memory."""
    prepare(tmp_path / "x")
    with pytest.raises(BadImage, match=reason):
        read_image(tmp_path, SourceImage("x", 0, "x"))


def test_a_path_that_the_system_refuses_is_a_bad_image(tmp_path):
    for file in ("x\0y", "x" * 5000):
        with pytest.raises(BadImage, match="cannot be read"):
            read_image(tmp_path, SourceImage("x", 0, file))


def test_a_failed_read_is_no_bad_image(tmp_path):
    """Of this process's memory, page 0 cannot be read."""
    (tmp_path / "x").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=f"{tmp_path}/x") as caught:
        read_image(tmp_path, SourceImage("x", 0, "x", 0, 100))
    assert caught.value.errno == errno.EIO


def test_short_reads_are_continued(tmp_path):
    """/proc gives at most some pages at a time, and says that its files have no bytes."""
    (tmp_path / "x").symlink_to("/proc/kallsyms")
    whole = (tmp_path / "x").read_bytes()
    assert len(whole) > 100_000
    assert read_image(tmp_path, SourceImage("x", 0, "x", 0, len(whole) + 1)) == whole
    assert read_image(tmp_path, SourceImage("x", 0, "x", 0, 90_000)) == whole[:90_000]
