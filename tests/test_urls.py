"""Every command and function that reads a dataset takes its URL."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from imagefeed import Dataset, convert, verify
from imagefeed.cli import main
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import CorruptRecord, RecordReader
from imagefeed.dataset.storage import store_of
from tests.conftest import jpeg, picture
from tests.dataset.test_reader import flip_bit
from tests.preprocess.test_convert import built as with_columns  # noqa: F401


@pytest.fixture
def stored(store_server, bucket, tiny) -> Path:
    """The folder of a copy of `tiny` in the store."""
    return shutil.copytree(tiny.root, store_server.folder / bucket / "tiny")


def run(*arguments: object):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_dataset_is_read_by_its_url(store_server, url, tiny):
    train = Dataset(str(url), "train")
    assert [request.path.rpartition("/")[2] for request in store_server.requests] == ["dataset.json", "train.index.npy"]
    assert train.manifest.root == url and train.manifest.fingerprint == tiny.fingerprint
    assert all(train.jpeg(n).tobytes() == jpeg(picture(n)) for n in (0, 24, 25, 49))
    assert (train.filename(7), train.labels.tolist()) == ("7.jpg", Dataset(tiny, "train").labels.tolist())
    assert np.array_equal(np.asarray(train[3][0]), np.asarray(Dataset(tiny, "train")[3][0]))
    reader, here = RecordReader(train.manifest, "train"), RecordReader(tiny, "train")
    assert all(reader.record(n) == here.record(n) for n in (0, 25, 49))
    assert list(reader.records(range(25, 50))) == [here.record(n) for n in range(25, 50)]
    there, statistics = tiny.load_statistics(), train.manifest.load_statistics()
    assert all(np.array_equal(there[name], statistics[name]) for name in there)


def test_columns_are_read_from_a_store(with_columns, store_server, bucket):  # noqa: F811
    shutil.copytree(with_columns.root, store_server.folder / bucket / "data")
    here, there = Dataset(with_columns, "train"), Dataset(f"s3://{bucket}/data", "train")
    assert np.array_equal(here.column("weight"), there.column("weight"), equal_nan=True)
    assert list(here.column("caption")) == list(there.column("caption"))
    assert [list(tags) for tags in here.column("tags")] == [list(tags) for tags in there.column("tags")]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dataset.json", None, "no dataset.json, so this is no dataset or an incomplete one"),
        ("dataset.json", b"{", "dataset.json: not readable as JSON"),
        ("train.index.npy", None, "train.index.npy: the file is missing"),
        ("train.index.npy", b"1", "train.index.npy: its content is not what build wrote"),
        ("train-00000-of-00002.tfrecord", None, "train-00000-of-00002.tfrecord: the shard is missing"),
        ("train-00000-of-00002.tfrecord", b"1", "train-00000-of-00002.tfrecord: the shard has 1 bytes, the manifest says"),
    ],
)
def test_a_damaged_dataset_is_refused_as_on_a_disk(url, stored, name, change, message):
    (stored / name).unlink() if change is None else (stored / name).write_bytes(change)
    with pytest.raises(UserError, match=f"^{url}.*{message}"):
        Dataset(str(url), "train").jpeg(0)


def test_a_bad_record_is_fetched_once_more(store_server, s3, stored):
    dataset = Dataset(str(s3), "train")
    store_server.fail("bit")
    assert dataset.jpeg(7).tobytes() == jpeg(picture(7))
    flip_bit(Manifest.load(stored), "train", 30)
    with pytest.raises(CorruptRecord, match=f"^{s3}/train-00001-of-00002.tfrecord: record 30 of train .* fails its checksum"):
        dataset.jpeg(30)
    with pytest.raises(CorruptRecord, match="record 30"):
        raise next(
            record for record in RecordReader(dataset.manifest, "train").records(range(25, 50)) if not hasattr(record, "jpeg")
        )


def damage(folder: Path) -> None:
    """Several kinds at once."""
    manifest = Manifest.load(folder)
    flip_bit(manifest, "train", 30)
    (folder / "statistics.npz").write_bytes(b"")
    os.truncate(folder / "val-00000-of-00002.tfrecord", 10_000)
    (folder / "val-00001-of-00002.tfrecord").unlink()
    (folder / "val-00001-of-00002.idx").write_bytes(b"0 1\n")
    with open(folder / "train-00000-of-00002.tfrecord", "ab") as file:
        file.write(b"more")


def test_verify_finds_in_a_store_what_it_finds_on_a_disk(store_server, url, stored):
    store_server.latency_s = 0.01
    shards = sum(path.stat().st_size for path in stored.glob("*.tfrecord"))
    before = store_server.counts["bytes"]
    assert verify(url, workers=1) == []
    others = sum(path.stat().st_size for path in stored.iterdir() if path.suffix != ".tfrecord")
    assert shards < store_server.counts["bytes"] - before < shards + 3 * others  # each shard is read once
    damage(stored)
    for deep in (False, True):
        found = verify(str(url), deep=deep, workers=2)
        assert len(found) >= 6 and sorted(found) == sorted(verify(stored, deep=deep, workers=1))


def test_convert_writes_to_a_disk_only(s3, tmp_path):
    with pytest.raises(UserError, match=f"{s3}/x: convert writes to a disk; give a folder"):
        convert(s3, f"{s3}/x", format="folders")
    for command in (["convert", str(s3), f"{s3}/x", "--format", "folders"], ["sample", f"{s3}/x"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and f"{s3}/x is a URL; give a folder on a disk" in result.output


def test_convert_reads_a_store_once(store_server, s3, stored, tmp_path):
    flip_bit(Manifest.load(stored), "train", 30)
    before = store_server.counts["bytes"]
    there = convert(s3, tmp_path / "there", format="folders", split="train")
    shards = sum(path.stat().st_size for path in stored.glob("train*.tfrecord"))
    assert store_server.counts["bytes"] - before < shards * 1.1
    here = convert(stored, tmp_path / "here", format="folders", split="train")
    assert (there.records, there.corrupt) == (49, [here.corrupt[0].replace(str(stored), str(s3))])
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert len(files) > 49 and all(
        (tmp_path / "there" / path).read_bytes() == (tmp_path / "here" / path).read_bytes() for path in files
    )


def test_commands_take_urls(store_server, url, stored, tmp_path):
    for command in (
        ("inspect", "--json"),
        ("audit", "--batch-size", 8, "--shuffle", "global"),
        ("verify", "--deep", "--workers", 1),
        ("convert", tmp_path / "out", "--format", "webdataset", "--split", "val"),
    ):
        result = run(command[0], f"{url}/", *command[1:])
        assert result.exit_code == 0, result.output
        if command[0] == "inspect":
            here = run("inspect", stored, "--json").stdout.replace(str(stored), str(url))
            assert json.loads(result.stdout) == json.loads(here)
    assert result.stdout.startswith(f"{tmp_path}/out: 23 records as webdataset")
    result = run("inspect", url, "--picture", tmp_path / "sheet.png")
    assert result.exit_code == 0 and (tmp_path / "sheet.png").stat().st_size > 10_000
    assert store_of(url).counts.retries == {}


def test_a_training_reads_a_store(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = "--device cpu --precision float32 --crop-size 64 --batch-size 8 --threads 1 --epochs 1 --limit-batches 1".split()
    result = run("train", s3, *quick)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "tiny"
    assert json.loads((folder / "recipe.json").read_text())["dataset_path"] == str(s3)
    result = run("train", "--config", folder / "recipe.json", "--run-dir", tmp_path / "again", "--device", "cpu")
    assert result.exit_code == 0, result.output
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "s3://b//x"), 2, "a part of the path is empty"),
        (("verify", "ftp://h/x"), 2, "ftp://h/x: not the URL of a store"),
        (("inspect", "http://me:secret@h/x"), 2, "a URL must not hold a password"),
        (("verify", __file__), 2, "is a file"),
        (("inspect", "/nonexistent"), 1, "/nonexistent: there is no such folder; build a dataset there"),
    ],
)
def test_places_that_are_none_are_refused(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code and message in " ".join(result.stderr.split()) and "secret" not in result.output


FORKING = """
import sys, torch
from imagefeed import Dataset
class Jpegs(torch.utils.data.Dataset):
    def __init__(self, url): self.dataset = Dataset(url, "train"); self.dataset.jpeg(0)
    def __len__(self): return len(self.dataset)
    def __getitem__(self, n): return torch.from_numpy(self.dataset.jpeg(n).copy()).sum()
jpegs = Jpegs(sys.argv[1])
for context in ("fork", "spawn") if __name__ == "__main__" else ():
    loader = torch.utils.data.DataLoader(jpegs, 10, num_workers=2, multiprocessing_context=context)
    print(context, sum(int(batch.sum()) for batch in loader))
"""


def test_forked_workers_of_a_dataloader_read_a_store(s3, tmp_path):
    (tmp_path / "script.py").write_text(FORKING)
    command = [sys.executable, tmp_path / "script.py", str(s3)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    total = sum(int(np.frombuffer(jpeg(picture(n)), np.uint8).sum(dtype=np.int64)) for n in range(50))
    assert done.stdout.splitlines() == [f"fork {total}", f"spawn {total}"]
