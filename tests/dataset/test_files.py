"""Files are whole or absent, and a lock keeps other processes out."""

import errno
import hashlib
import os
import resource
import subprocess
import sys

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import TEMPORARY, atomic_file, check_append, hash_file, locked, owner, try_lock, write_atomically

HOLD = (
    "import sys; from pathlib import Path; from imagefeed.dataset.files import locked\n"
    "with locked(Path(sys.argv[1]), 'busy', shared=sys.argv[2] == 'shared'): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def hold():
    """Has another process hold a lock until it is told to end."""
    started = []

    def start(path, kind="alone"):
        process = subprocess.Popen([sys.executable, "-c", HOLD, path, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.communicate()


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "f", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "f", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_the_hash_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(256)) * 10_000)
    assert hash_file(tmp_path / "f") == hashlib.sha256(bytes(range(256)) * 10_000).hexdigest()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_keeps_another_process_out_until_it_ends(tmp_path, hold, kind):
    path = tmp_path if kind == "folder" else tmp_path / "new" / "lock"
    process = hold(path)
    with pytest.raises(UserError, match="^somebody is here$"), locked(path, "somebody is here"):
        pass
    process.kill()
    process.wait()
    with locked(path, "somebody is here"):
        pass


def test_a_shared_lock_has_any_number_of_holders_and_the_last_one_can_take_it_alone(tmp_path, hold):
    process = hold(tmp_path / "lock", "shared")
    with locked(tmp_path / "lock", "busy", shared=True) as handle:
        assert not try_lock(handle)
        process.kill()
        process.wait()
        assert try_lock(handle)


def test_a_lock_whose_file_its_last_holder_deleted_is_taken_anew(tmp_path):
    with locked(tmp_path / "lock", "busy"):
        (tmp_path / "lock").unlink()
        with locked(tmp_path / "lock", "busy"):
            with pytest.raises(UserError, match="busy"), locked(tmp_path / "lock", "busy"):
                pass


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    """As on two machines, or in containers whose processes all have the id 1."""
    with atomic_file(tmp_path / "f") as one:
        with atomic_file(tmp_path / "f") as other:
            names = {os.path.basename(file.name) for file in (one, other)}
            assert len(names) == 2 and all(TEMPORARY.fullmatch(name).groups() == ("f", owner()) for name in names)
            other.write(b"other")
        one.write(b"one")
    assert (tmp_path / "f").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="its file system has no file locks \\(function not implemented\\); mount it with them"):
        with locked(tmp_path / "lock", "busy"):
            pass


def test_a_file_system_that_does_not_append_is_one_sentence(tmp_path):
    """A limit of one byte for files, where a mount of an object store would refuse."""
    check_append(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}: its file system does not append to files \\(file too large\\)"):
            check_append(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]
