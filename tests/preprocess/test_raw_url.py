"""RAW at a URL: the same listing and the same bytes as of a copy on a disk, for as few requests as possible."""

import copy
import json
import os
import tarfile
from dataclasses import asdict

import pytest

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.failures import ObjectChanged
from imagefeed.preprocess.options import ImageOptions, SourceOptions
from imagefeed.preprocess.packing import build_anywhere
from imagefeed.preprocess.renew import Notices
from imagefeed.preprocess.sources.detect import read_tree
from imagefeed.preprocess.sources.listing import read_image, stamp_of
from imagefeed.preprocess.sources.remote import RemotePath, open_raw
from imagefeed.preprocess.sources.tar import list_members
from imagefeed.preprocess.verify import verify
from tests import rawforms
from tests.preprocess.sources.test_beton import data
from tests.rawtree import Here, jpeg


def webdataset(root, images):
    for split, of_class in images.items():
        root.mkdir(parents=True, exist_ok=True)
        labels = {name: number for number, name in enumerate(of_class)}
        members: dict[str, bytes] = {}
        for name, (of, jpeg_bytes) in rawforms.flat(of_class).items():
            key = name.removesuffix(".JPEG")
            members |= {f"{key}.jpg": jpeg_bytes, f"{key}.json": json.dumps({"label": labels[of], "caption": f"a {of}"}).encode()}
        names = list(members)
        for number in range(2):
            part = names[number * len(names) // 4 * 2 : (number + 1) * len(names) // 4 * 2]
            (root / f"{split}-{number:06d}.tar").write_bytes(rawforms.make_tar({name: members[name] for name in part}))
    (root / "classes.txt").write_text("\n".join(rawforms.CLASSES))
    return root


def ffcv(root, images):
    root.mkdir()
    for split in images:
        (root / f"{split}.beton").write_bytes(data(split))
    return root


IMAGES = rawforms.make_images()
FORMS = {"ffcv": ffcv, "archives": rawforms.write_archives, "parquet": rawforms.write_parquet, "webdataset": webdataset}


def build(raw, out, told=None, runner=None, **more):
    notices = Notices(renewing=lambda paths, shards: None if told is None else told.append((paths, shards)))
    options = SourceOptions(**more)
    source, runner = read_tree(raw, options), runner or Here()
    return build_anywhere(source, out, None, ImageOptions(size=16), 0, runner, notices=notices, listing=asdict(options))


def files(folder, *left_out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name not in left_out}


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_gives_the_bytes_of_its_copy_on_a_disk(form, store_server, bucket, tmp_path):
    raw = FORMS[form](store_server.folder / bucket / "raw", copy.deepcopy(IMAGES))
    url = f"s3://{bucket}/raw"
    more = {"columns": ("caption",)} if form == "webdataset" else {}
    local, remote = (build(each, tmp_path / name, **more) for each, name in ((raw, "local"), (url, "remote")))
    assert local.num_records == (12 if form == "ffcv" else 32)
    # build.npz has the stamps of the raw files: sizes and times of one, sizes and ETags of the other.
    assert files(tmp_path / "remote", "build.npz") == files(tmp_path / "local", "build.npz")
    assert str(remote.decision) == str(local.decision)
    if form == "webdataset":
        assert verify(tmp_path / "remote", raw=url, workers=1) == []
    requests = store_server.counts["GET"]
    assert build(url, tmp_path / "remote", **more) == remote
    assert store_server.counts["GET"] - requests < 40, "it is complete, so only the listing is read"


def test_patterns_over_plain_http_give_the_same(store_server, bucket, tmp_path):
    raw = webdataset(store_server.folder / bucket / "raw", copy.deepcopy(IMAGES))
    (raw / "classes.txt").unlink()
    build(raw, tmp_path / "local")
    build(f"{store_server.url}/{bucket}/raw/{{train,val}}-{{000000..000001}}.tar", tmp_path / "remote")
    assert files(tmp_path / "remote", "build.npz") == files(tmp_path / "local", "build.npz")
    one = build(f"{store_server.url}/{bucket}/raw/train-000001.tar", tmp_path / "one")
    assert one.num_records == 10


def test_what_is_not_there_or_cannot_be_read_is_one_sentence(store_server, bucket):
    folder = store_server.folder / bucket / "raw"
    (folder / "train" / "ant").mkdir(parents=True)
    (folder / "train" / "ant" / "1.jpg").write_bytes(b"1")
    (folder / "train.csv").write_text("path,label\n")
    only = "of RAW at a URL, only .tar, .parquet and .beton files are read"
    for url, sentence in {
        f"s3://{bucket}/raw": f"{only}, and it holds none; put images into tars",
        f"s3://{bucket}/nothing": "no objects below it; check the URL",
        f"s3://{bucket}/nothing.tar": "no such object; check the URL",
        f"{store_server.url}/{bucket}/raw/train.csv": "a plain web server cannot be listed; give a .tar or .parquet file",
        f"{store_server.url}/{bucket}/raw/train-{{0..3}}.tar": "0.tar: no such object",
        f"{store_server.url}/{bucket}/raw/x.tar": "no such object",
    }.items():
        with pytest.raises(UserError, match=rf"(?s)^{url.partition('{')[0]}.*{sentence}"):
            read_tree(url, SourceOptions())
    (folder / "x.tar").write_bytes(rawforms.make_tar({"a/1.jpg": bytes(1000)}))
    with pytest.raises(UserError, match=f"{only}, not the layout folders"):
        read_tree(f"s3://{bucket}/raw", SourceOptions(layout="folders"))
    (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=rf"s3://{bucket}/raw/x.tar: truncated"):
        read_tree(f"s3://{bucket}/raw", SourceOptions(split="train"))


def list_tar(url, archive):
    """The requests, and the bytes of them, that a list of an archive's members takes."""
    from imagefeed.dataset.storage import store_of
    from imagefeed.preprocess.sources.listing import opened

    path = open_raw(url)
    counts = store_of(path.root).counts
    requests, size = counts.requests, counts.bytes
    with opened(path) as (read, end):
        members = list_members(read, 0, end, "x")
    with open(archive, "rb") as file:
        assert members == list_members(lambda size, at: os.pread(file.fileno(), size, at), 0, end, "x")
    return counts.requests - requests, counts.bytes - size, end


def test_listing_skips_what_is_large_and_reads_through_what_is_small(store_server, bucket):
    archive = store_server.folder / bucket / "x.tar"
    for size, images in ((3000, 2000), (100_000, 100), (2_000_000, 20)):
        with tarfile.open(archive, "w") as tar:
            for number in range(images):
                info = tarfile.TarInfo(f"a/{number}.jpg")
                info.size = size
                with open("/dev/zero", "rb") as zeros:
                    tar.addfile(info, zeros)
        requests, size_read, end = list_tar(f"s3://{bucket}/x.tar", archive)
        if size < 1 << 18:
            assert requests < 10 and size_read <= end
        else:
            assert requests <= images + 2 and size_read < 6000 * images


def test_an_archive_that_changes_in_mid_build_ends_it_by_name(store_server, bucket, tmp_path):
    raw = webdataset(store_server.folder / bucket / "raw", copy.deepcopy(IMAGES))
    (raw / "train-000001.tar").write_bytes((raw / "train-000001.tar").read_bytes())

    class Changed(Here):
        def map(self, function, tasks, progress):
            (raw / "train-000001.tar").write_bytes((raw / "train-000001.tar").read_bytes()[::-1])
            yield from super().map(function, tasks, progress)

    url = f"s3://{bucket}/raw"
    with pytest.raises(ObjectChanged, match=f"{url}/train-000001.tar: the object has been replaced since it was opened"):
        build(url, tmp_path / "out", runner=Changed())
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_parquet_file_that_changes_while_it_is_read_ends_the_build_by_name(store_server, bucket, tmp_path):
    raw = rawforms.write_parquet(store_server.folder / bucket / "raw", copy.deepcopy(IMAGES))
    source = read_tree(f"s3://{bucket}/raw", SourceOptions())
    path = raw / source.packed[0].file
    path.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"s3://{bucket}/raw/{source.packed[0].file}: the object has been replaced"):
        list(source.packed[0].read(source.root))


@pytest.mark.parametrize("finished", [True, False])
def test_a_build_takes_up_what_has_changed_at_the_url(finished, store_server, bucket, tmp_path):
    images = copy.deepcopy(IMAGES)
    raw = webdataset(store_server.folder / bucket / "raw", images)
    url, out, told = f"s3://{bucket}/raw", tmp_path / "out", []
    if finished:
        build(url, out)
    else:

        class Ended(Here):
            def map(self, function, tasks, progress):
                return (function(next(tasks), progress) for _ in range(1))

        with pytest.raises(FileNotFoundError):  # the second shard is missing
            build(url, out, runner=Ended())
    path = raw / "train-000000.tar"
    path.write_bytes(path.read_bytes())  # another ETag, the same content
    if finished:
        assert build(url, out, told) and not told
    name = next(iter(images["train"]["n01440764"]))
    images["train"]["n01440764"][name] = jpeg(90, 120, 1000)
    webdataset(raw, images)
    manifest = build(url, out, told)
    assert manifest and told == [([f"train-000000.tar/{name.removesuffix('.JPEG')}.jpg"], 1)]
    build(raw, tmp_path / "local")
    assert files(out, "build.npz") == files(tmp_path / "local", "build.npz")


def test_stamps_tell_apart_sizes_and_etags_and_images_are_read_by_their_place(store_server, bucket):
    raw = webdataset(store_server.folder / bucket / "raw", copy.deepcopy(IMAGES))
    stamps = set()
    for _ in range(3):
        source = read_tree(f"s3://{bucket}/raw", SourceOptions())
        assert isinstance(source.root, RemotePath)
        stamps.add(stamp_of(source.root, "train-000000.tar"))
        (raw / "train-000000.tar").write_bytes((raw / "train-000000.tar").read_bytes())
    assert len(stamps) == 3 and len({size for size, _ in stamps}) == 1
    source = read_tree(f"s3://{bucket}/raw", SourceOptions())
    local = read_tree(raw, SourceOptions())
    for split in source.splits:
        order = range(len(source.splits[split]))[::-1]
        for ours, theirs in zip(source.images(split, list(order)), local.images(split, list(order))):
            assert read_image(source.root, ours) == read_image(local.root, theirs)
