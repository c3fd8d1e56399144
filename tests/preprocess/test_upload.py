"""A build to a URL: the bytes of a local one, whatever interrupts it and however many machines take part."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

import imagefeed
from imagefeed.dataset.errors import ArgumentError, UserError
from imagefeed.dataset.storage import Url, place
from imagefeed.preprocess import packing, upload
from imagefeed.preprocess.cli import main
from imagefeed.preprocess.options import ImageOptions, SourceOptions
from imagefeed.preprocess.packing import build_anywhere
from imagefeed.preprocess.renew import Notices
from imagefeed.preprocess.sources.detect import read_tree
from imagefeed.preprocess.state import STATE
from imagefeed.preprocess.verify import verify
from tests.preprocess.test_stale import picture
from tests.rawtree import Here

ROOT = Path(__file__).parents[2]
SHARDS = {f"train-{number:05d}-of-00004.tfrecord" for number in range(4)} | {"val-00000-of-00001.tfrecord"}
SCRIPT = """
import sys
from pathlib import Path
from tests.preprocess.test_upload import build
build(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    raw = tmp_path_factory.mktemp("original") / "raw"
    for seed in range(240):
        path = raw / ("train" if seed < 220 else "val") / ("ant", "bee")[seed % 2] / f"{seed:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed) if seed != 7 else b"no picture")
    return raw


@pytest.fixture(scope="module")
def local(original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    build(original, out)
    return out


@pytest.fixture
def url(bucket) -> str:
    return f"s3://{bucket}/sets/one"


@pytest.fixture
def there(store_server, bucket) -> Path:
    """The folder of the objects at the URL."""
    return store_server.folder / bucket / "sets" / "one"


def build(raw, out, work=None, runner=None, told=None, **more):
    notices = Notices(renewing=lambda paths, shards: None if told is None else told.append((paths, shards)))
    source, more = read_tree(raw, SourceOptions()), {"notices": notices, "listing": asdict(SourceOptions()), **more}
    return build_anywhere(source, place(str(out)), work, ImageOptions(size=16), 0, runner or Here(), 0.05, **more)


class Only(Here):
    """Packs so many shards, and then is killed, as by Ctrl-C."""

    def __init__(self, shards: int):
        self.left = shards

    def map(self, function, tasks, progress):
        for task in tasks:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield function(task, progress)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(server, bucket) -> list[str]:
    """The names of the objects that were put, in order."""
    start = f"/{bucket}/sets/one/"
    return [each.path.removeprefix(start) for each in server.requests if each.method == "PUT" and each.path.startswith(start)]


def test_the_objects_are_the_files_of_a_local_build_and_the_manifest_comes_last(
    original, local, url, there, store_server, bucket, tmp_path
):
    most = 0

    class Watched(Here):
        def map(self, function, tasks, progress):
            nonlocal most
            for result in super().map(function, tasks, progress):
                yield result
                most = max(most, len([*tmp_path.rglob("*.tfrecord")]))

    manifest = build(original, url, tmp_path / "work", Watched())
    assert str(manifest.root) == url and manifest.num_records == 239
    assert files(there) == files(local)
    names = put(store_server, bucket)
    assert names[0] == f"{STATE}/settings.json" and names[-1] == "dataset.json" and len(names) == len(set(names))
    for shard in SHARDS:  # the state says that the others are there
        assert names.index(shard) < names.index(f"{STATE}/{shard}.npz") and shard.replace("tfrecord", "idx") in names
    assert not os.listdir(tmp_path / "work") and most <= upload.UPLOADS + upload.WAITING
    assert verify(url, workers=1) == []


def test_a_complete_dataset_is_left_alone(original, local, url, there, store_server, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = ["build", str(original), url, "--size", "16", "--max-rejected", "0.05", "--workers", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and files(there) == files(local)
    store_server.requests.clear()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and f"{url}: 239 records in 5 shards" in result.output and "complete already" in result.output
    assert not put(store_server, bucket)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "imagefeed-" in str(path)] == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "on another machine"])
def test_an_interrupted_build_goes_on_and_packs_no_shard_again(
    elsewhere, original, local, url, there, store_server, bucket, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        build(original, url, tmp_path / "work", Only(3))
    states = {path.name for path in (there / STATE).glob("*.npz")} - {"raw.npz"}
    assert not (there / "dataset.json").exists() and len(states) <= 3
    packed = []

    class Noted(Here):
        def map(self, function, tasks, progress):
            return ((packed.append(task.name), function(task, progress))[1] for task in tasks)

    if elsewhere:
        shutil.rmtree(tmp_path / "work")
    store_server.requests.clear()
    build(original, url, tmp_path / "work", Noted())
    assert len(packed) == 5 - (len(states) if elsewhere else 3)
    assert len([name for name in put(store_server, bucket) if name in SHARDS]) == 5 - len(states)
    assert files(there) == files(local)


@pytest.mark.parametrize("after", [2, 9, 19])
def test_a_killed_build_goes_on(after, original, local, url, there, store_server, bucket, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, original, url, tmp_path / "work"], cwd=ROOT)
    while process.poll() is None and len(put(store_server, bucket)) < after:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (there / "dataset.json").exists() or after == 19
    build(original, url, tmp_path / "work")
    assert files(there) == files(local)
    assert not os.listdir(tmp_path / "work")


def test_machines_build_parts_into_one_url(original, local, url, there, tmp_path):
    for number in (2, 1):
        assert build(original, url, tmp_path / f"{number}", part=(number, 2)) is None
        assert not os.listdir(tmp_path / f"{number}")
    packed = []
    build(original, url, tmp_path / "all", progress=lambda images, *_: packed.append(images))
    assert packed == [240] and files(there) == files(local)


def test_two_builds_at_once_agree_or_one_is_refused(original, url, tmp_path, local, there):
    class Meanwhile(Here):
        """Another machine builds all while this one packs its first shard."""

        def map(self, function, tasks, progress):
            for number, result in enumerate(super().map(function, tasks, progress)):
                if not number:
                    build(original, url, tmp_path / "other")
                yield result

    build(original, url, tmp_path / "work", Meanwhile())
    assert files(there) == files(local)

    sent = upload.Upload.settle

    def settle(self, *arguments):
        if not (there / STATE / "settings.json").exists():
            (there / STATE / "settings.json").write_text(json.dumps({"settings": {"size": 17}}))
        sent(self, *arguments)

    shutil.rmtree(there)
    (there / STATE).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=f"^{url}: another build began to write there"):
        patch.setattr(upload.Upload, "settle", settle)
        build(original, url, tmp_path / "work")


def test_only_shards_of_another_plan_are_removed(original, local, url, there, tmp_path):
    kept = {"old/train-00000-of-00004.tfrecord": b"1", "old/.build/x.npz": b"2", "notes.txt": b"3", "train-0.tfrecord": b"4"}
    for name, data in {**kept, "train-00000-of-00009.tfrecord": b"5", "train-00000-of-00009.idx": b"6"}.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(data)
    build(original, url, tmp_path / "work")
    assert files(there) == files(local) | kept


def test_other_options_are_refused_by_the_url(original, url, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(original, url, tmp_path / "one", Only(1))
    source = read_tree(original, SourceOptions())
    with pytest.raises(UserError, match=f"^{url}: begun with size 16, this call says 17; use the same, or choose another OUT"):
        build_anywhere(source, Url(url), tmp_path / "two", ImageOptions(size=17), 0, Here())


@pytest.mark.parametrize("finished", [True, False])
def test_changed_images_are_repacked(finished, original, url, there, store_server, bucket, tmp_path):
    raw, told = shutil.copytree(original, tmp_path / "raw"), []
    if finished:
        build(raw, url, tmp_path / "work")
    else:
        with pytest.raises(KeyboardInterrupt):
            build(raw, url, tmp_path / "work", Only(4))
    changed = raw / "train" / "ant" / "020.jpg"
    changed.write_bytes(picture(5000))
    build(raw, tmp_path / "local")
    [stale] = [path.name for path in (tmp_path / "local").glob("*.tfrecord") if b"ant/020.jpg" in path.read_bytes()]
    if finished:  # and killed once more
        with pytest.raises(KeyboardInterrupt):
            build(raw, url, tmp_path / "work", Only(0), told)
        assert told == [(["train/ant/020.jpg"], 1)] and not (there / "dataset.json").exists()
        assert not (there / STATE / f"{stale}.npz").exists() and len([*(there / STATE).glob("*.tfrecord.npz")]) == 4
    store_server.requests.clear()
    build(raw, url, tmp_path / "elsewhere", None, told)
    assert files(there) == files(tmp_path / "local")
    assert not finished or {name for name in put(store_server, bucket) if name in SHARDS} == {stale}


def test_a_manifest_that_was_changed_at_the_url_is_named(original, url, there, tmp_path):
    build(original, url, tmp_path / "work")
    (there / "dataset.json").write_text((there / "dataset.json").read_text().replace("ant", "bat"))
    with pytest.raises(
        UserError, match=f"^{url}/dataset.json: it was changed since the build wrote it; restore it, or delete it"
    ):
        build(original, url, tmp_path / "work")


@pytest.mark.parametrize("lost", ["train-00001-of-00004.tfrecord", "train-00001-of-00004.idx", "statistics.npz", "raw.npz"])
def test_a_lost_object_is_restored(lost, original, local, url, there, tmp_path):
    build(original, url, tmp_path / "work")
    (there / lost).unlink()
    build(original, url, tmp_path / "work")
    assert files(there).keys() | {"raw.npz"} == files(local).keys()
    assert lost == "raw.npz" or files(there) == files(local)


def test_a_shard_cut_short_at_the_url_is_written_again(original, local, url, there, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(original, url, tmp_path / "work", Only(4))
    shutil.rmtree(tmp_path / "work")
    for path in there.glob("*.tfrecord"):
        path.write_bytes(path.read_bytes()[:-1])
    build(original, url, tmp_path / "work")
    assert files(there) == files(local)


def test_too_many_bad_images_end_it_and_are_taken_once_they_are_mended(original, url, there, tmp_path):
    raw = shutil.copytree(original, tmp_path / "raw")
    bad = [raw / "train" / "bee" / f"{number:03d}.jpg" for number in range(11, 51, 2)]
    for path in bad:
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"of 240 images are bad, more than the 5.00% that max_rejected allows"):
        build(raw, url, tmp_path / "work")
    for number, path in enumerate(bad):
        path.write_bytes(picture(number))
    build(raw, url, tmp_path / "work")
    build(raw, tmp_path / "local")
    assert files(there) == files(tmp_path / "local")


@pytest.mark.parametrize("kind", ["503", "reset", "500"])
def test_a_put_that_fails_is_tried_again(kind, original, local, url, there, store_server, tmp_path):
    for name in ("tfrecord", "npz", "dataset.json"):
        store_server.fail(kind, method="PUT", name=name)
    build(original, url, tmp_path / "work")
    assert store_server.counts[f"fault {kind}"] == 3 and files(there) == files(local)


DENIED = "answers 403 Error: access is denied; check the credentials"
FULL = "has no room: it answers {}; free some, or raise the quota, then run the same command again"


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("403", "settings.json", DENIED),
        ("403", "04.tfrecord.npz", DENIED),
        ("quota", "tfrecord", FULL.format("403 QuotaExceeded")),
        ("507", "dataset.json", FULL.format("507 Error")),
    ],
)
def test_missing_rights_and_a_full_quota_are_one_sentence_and_nothing_is_lost(
    kind, name, sentence, original, local, url, there, store_server, tmp_path
):
    fault = store_server.fail(kind, method="PUT", name=name, times=1000)
    with pytest.raises(UserError, match=f"^{url}/.*{name}: the store {sentence}"):
        build(original, url, tmp_path / "work")
    assert not (there / "dataset.json").exists()
    fault.times = 0
    build(original, url, tmp_path / "work")
    assert files(there) == files(local)


def test_what_cannot_be_written_to_is_refused_first(original, url, store_server, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "write_shard", None)
    with pytest.raises(UserError, match="^s3://nowhere/x: the store has no such bucket; create it, or correct"):
        build(original, "s3://nowhere/x", tmp_path / "work")
    with pytest.raises(UserError, match="http://.*a plain web server cannot be listed; give an s3://"):
        build(original, f"{store_server.url}/x", tmp_path / "work")
    with pytest.raises(ArgumentError, match="engine ray packs a dataset for a URL in a folder that all nodes share"):
        imagefeed.build(original, url, engine="ray")
