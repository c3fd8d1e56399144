"""The .npz files of a build."""

import io
import os
import zipfile

import numpy as np

from imagefeed.preprocess.raw import InOrder, load_members, save_members

NOISE = np.random.default_rng(0).integers(0, 256, 5000)
MEMBERS = {"names": np.frombuffer(b"a" * 5000, np.uint8), "noise": NOISE, "none": np.empty(0)}


def test_members_are_loaded_as_they_were_saved(tmp_path):
    save_members(tmp_path / "x.npz", MEMBERS.items(), lambda name: name != "noise")
    loaded = load_members(tmp_path / "x.npz")
    assert loaded.keys() == MEMBERS.keys() and all(np.array_equal(loaded[name], MEMBERS[name]) for name in MEMBERS)
    assert load_members(tmp_path / "x.npz", lambda name: name == "none").keys() == {"none"}


def test_a_zip_file_is_written_from_begin_to_end():
    """Into a pipe, which refuses to seek as mounts of object stores do: the bytes are those of a zip file in memory."""
    whole, (there, here) = io.BytesIO(), os.pipe()
    with open(there, "rb") as reader:
        with open(here, "wb") as writer:
            for file in (whole, in_order := InOrder(writer)):
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, array in MEMBERS.items():
                        archive.writestr(zipfile.ZipInfo(name), array.tobytes())
                        in_order.flush()
        assert reader.read() == whole.getvalue()
