"""Builds of several machines leave each other's files alone, also where file locks do not reach from one to another."""

import contextlib
import os
import shutil
import subprocess
import threading
import time

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess import state
from imagefeed.preprocess.options import ImageOptions, SourceOptions
from imagefeed.preprocess.packing import build_dataset
from imagefeed.preprocess.sources.detect import read_tree
from imagefeed.preprocess.state import STATE, at_work
from tests.rawtree import Here, jpeg

FOREIGN = ".train-00001-of-00002.tfrecord.node7_2-2.0123abcd.tmp"


@pytest.fixture(params=["bindfs", "sshfs"])
def mount(request, tmp_path):
    """Mounts a folder as another machine sees it, with locks of its own; the server of sshfs runs without ssh."""
    program = shutil.which(request.param)
    server = next(filter(os.path.exists, ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")), "")
    if not program or not os.path.exists("/dev/fuse") or (request.param == "sshfs" and not server):
        pytest.skip(f"{request.param} is not installed, or there is no FUSE")
    mounts = []

    def start(folder, name):
        at = tmp_path / name
        at.mkdir()
        options = [] if request.param == "bindfs" else ["-f", "-o", f"dir_cache=no,ssh_command=sh -c {server}"]
        source = str(folder) if request.param == "bindfs" else f"x:{folder}"
        mounts.append((at, subprocess.Popen([program, source, str(at), *options], stderr=subprocess.PIPE)))
        deadline_s = time.monotonic() + 10
        while not os.path.ismount(at):
            if time.monotonic() > deadline_s:
                pytest.skip(f"{request.param} does not mount here")
            time.sleep(0.02)
        return at

    yield start
    for at, process in mounts:
        subprocess.run(["fusermount3", "-uz", at], check=False)
        process.kill()
        process.communicate()


@contextlib.contextmanager
def growing(path):
    """Another machine writes into a file."""
    done = threading.Event()

    def write():
        while not done.wait(0.05):
            with open(path, "ab") as file:
                file.write(b"x")

    writer = threading.Thread(target=write)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()


def test_only_own_and_old_temporaries_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WATCH_S", 0.3)
    old, abandoned = tmp_path / f"{FOREIGN[:-4]}0.tmp".replace("abcd0", "abce"), tmp_path / ".dataset.json.4242.tmp"
    for path in (tmp_path / FOREIGN, old, abandoned):
        path.write_bytes(b"half")
    for path in (old, abandoned):
        os.utime(path, (time.time() - 7200,) * 2)
    for _ in range(2):
        with at_work(tmp_path, (1, 2)):
            state.write_atomically(tmp_path / STATE / "x", b"")
            own = tmp_path / f".y.{state.owner()}.01234567.tmp"
            assert own.name.endswith("_1-2.01234567.tmp")
            own.touch()  # by a worker that was killed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FOREIGN, STATE])
    with at_work(tmp_path):  # the other one does not grow, so it has no writer
        pass
    assert (tmp_path / FOREIGN).exists()


def test_a_build_whose_lock_does_not_hold_says_so(tmp_path, caplog):
    with growing(tmp_path / FOREIGN):
        with pytest.raises(UserError, match="another build on node7 is writing into it; .* file locks of this mount do"):
            with at_work(tmp_path):
                pass
        (tmp_path / "dataset.json").touch()
        with at_work(tmp_path, (1, 2)):
            pass
    assert "a build on node7 is writing into it too" in caplog.text
    assert (tmp_path / STATE).exists() and (tmp_path / FOREIGN).exists()


def test_parts_on_mounts_with_locks_of_their_own_finish_one_dataset(mount, tmp_path):
    for number in range(65):  # in two shards
        path = tmp_path / "raw" / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(20, 20, 0))
    source = read_tree(tmp_path / "raw", SourceOptions(split="train"))

    def build(out, part=None):
        return build_dataset(source, out, ImageOptions(size=16), 0, Here(), part=part)

    (tmp_path / "disk").mkdir()
    one, other = (mount(tmp_path / "disk", name) for name in ("one", "other"))
    with at_work(one / "out", (2, 2)):
        half = one / "out" / f".train-00001-of-00002.tfrecord.{state.owner()}.0123abcd.tmp"
        half.write_bytes(b"half")
        build(other / "out", (1, 2))
        assert half.exists()
    assert not half.exists()
    build(one / "out", (2, 2))
    assert build(other / "out").num_records == 65
    assert not [path for path in (tmp_path / "disk" / "out").iterdir() if path.name.startswith(".")]
