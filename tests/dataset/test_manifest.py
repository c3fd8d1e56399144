"""What is wrong with a manifest, or with the files that it vouches for, is said in one sentence."""

import io
import json
import zipfile

import numpy as np
import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import STATISTICS, Manifest, _digest


def rewrite(manifest, change):
    """Changes dataset.json as a program would, digest included."""
    path = manifest.root / "dataset.json"
    data = json.loads(path.read_text())
    change(data)
    del data["sha256"]
    data["sha256"] = _digest(data)
    path.write_text(json.dumps(data))


def saved(save, *arrays, **named) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def zipped(name, data) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("splits"),
        lambda data: data.update(splits={}),
        lambda data: data.update(splits=[]),
        lambda data: data["splits"].update({"../up": data["splits"]["val"]}),
        lambda data: data["options"].pop("size"),
        lambda data: data["options"].update(size="256"),
        lambda data: data.update(options=None),
        lambda data: data["splits"]["val"].update(shards=[]),
        lambda data: data["splits"]["val"]["shards"][0].update(records="12"),
        lambda data: data["splits"]["val"]["shards"][0].update(bytes=-1),
        lambda data: data["splits"]["val"]["shards"][0].update(name="../val-00000-of-00002.tfrecord"),
        lambda data: data["splits"]["val"]["shards"][0].update(name=3),
        lambda data: data["splits"]["val"].update(counts=[23]),
        lambda data: data.update(classes=[1, 2, 3]),
        lambda data: data.update(titles=["one"]),
        lambda data: data.update(files={"train.index.npy": None}),
    ],
)
def test_content_that_no_build_writes_is_one_sentence(tiny_copy, change):
    rewrite(tiny_copy, change)
    with pytest.raises(UserError, match=r"dataset.json: a field is missing or of the wrong kind \(.*\); delete it and"):
        Manifest.load(tiny_copy.root)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}"])
def test_json_that_is_no_manifest_is_one_sentence(tiny_copy, text):
    (tiny_copy.root / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="a field is missing or of the wrong kind"):
        Manifest.load(tiny_copy.root)


def test_other_version_says_what_build_accepts(tiny_copy):
    rewrite(tiny_copy, lambda data: data.update(version=2))
    with pytest.raises(UserError, match="format version 2, this program reads 1; delete it and build again"):
        Manifest.load(tiny_copy.root)


def test_index_and_statistics_are_those_that_build_wrote(tiny_copy):
    index = tiny_copy.load_index("train").copy()
    index["label"] = (index["label"] + 1) % 3
    np.save(tiny_copy.index_path("train"), index)
    statistics = tiny_copy.load_statistics()
    np.savez(tiny_copy.root / STATISTICS, **statistics | {"channel_mean": np.zeros(3)})
    for name, load in (("train.index.npy", lambda: tiny_copy.load_index("train")), (STATISTICS, tiny_copy.load_statistics)):
        with pytest.raises(UserError, match=f"{name}: its content is not what build wrote; delete it and run build again"):
            load()
        (tiny_copy.root / name).unlink()
        with pytest.raises(UserError, match=f"{name}: the file is missing; run build again"):
            load()
    assert len(tiny_copy.load_index("val")) == 23


BROKEN_HEADER = b"\x93NUMPY\x01\x00\x76\x00{'descr': ((((, " + b" " * 200
UNREADABLE = {
    "nothing": b"",
    "text": b"not an array",
    "pickle": b"\x80\x04N.",
    "broken header": BROKEN_HEADER,
    "objects": saved(np.save, np.array([None, {}]), allow_pickle=True),
    "half a zip": saved(np.savez, a=np.zeros(3))[:100],
    "zip of other things": saved(np.savez, a=np.zeros(3)),
    "zip of a broken array": zipped("channel_mean.npy", BROKEN_HEADER),
    "other array": saved(np.save, np.zeros(3)),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_file_without_a_hash_is_one_sentence(tiny_copy, data):
    tiny_copy.files.clear()
    tiny_copy.index_path("train").write_bytes(data)
    (tiny_copy.root / STATISTICS).write_bytes(data)
    for load in (lambda: tiny_copy.load_index("train"), tiny_copy.load_statistics):
        with pytest.raises(UserError, match="delete it and run build again") as caught:
            load()
        assert "pickle" not in str(caught.value) and "\n" not in str(caught.value)
