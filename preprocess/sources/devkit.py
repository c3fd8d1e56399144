"""Reads the development kit of ImageNet's challenges: which id is which WordNet class, and the labels of validation images.

Format: readme.txt in ILSVRC2012_devkit_t12.tar.gz and ILSVRC2010_devkit-1.0.tar.gz, sections "Synsets" and "Ground truth".
"""

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.tar import list_members

MAX_UNPACKED = 1 << 28  # the real kits hold less than 30 MB; a gzip bomb ends here
COMPRESSED_ELEMENT = 15  # miCOMPRESSED of MAT-file level 5
# Where the kit's data lie when it has been unpacked beside the archives.
FOLDERS = ("ILSVRC{year}_devkit*/data", "devkit-1.0/data", "ILSVRC{year}_devkit*/devkit*/data")


@dataclass(frozen=True)
class Devkit:
    """`wnids` by the kit's own ids, which are not in WordNet order; `titles` by WordNet id; `ids`, the labels of the
    validation images in the order of their numbers; `name` for messages."""

    name: str
    wnids: dict[int, str]
    titles: dict[str, str]
    ids: list[int]


def read_devkit(root: Path, year: str) -> Devkit | None:
    """The kit of a year in `root`, as its archive or unpacked; None where there is none. UserError where it is damaged."""
    truth_name = f"ILSVRC{year}_validation_ground_truth.txt"
    for path in filter(Path.is_file, sorted(root.glob(f"ILSVRC{year}_devkit*.tar.gz"))):
        members = _unpack(path)
        for name in ("meta.mat", truth_name):
            if name not in members:
                raise UserError(f"{path}: no data/{name} in it; download the kit again")
        return Devkit(path.name, *_read_synsets(members["meta.mat"], year, path), read_ids(members[truth_name], path))
    for pattern in FOLDERS:
        for folder in sorted(root.glob(pattern.format(year=year))):
            meta, truth = folder / "meta.mat", folder / truth_name
            if meta.is_file() and truth.is_file():
                return Devkit(
                    folder.parent.name, *_read_synsets(meta.read_bytes(), year, meta), read_ids(truth.read_bytes(), truth)
                )
    return None


def read_ids(data: bytes, path: Path) -> list[int]:
    """A ground truth file: one id a line."""
    try:
        return [int(line) for line in data.split()]
    except ValueError:
        raise UserError(f"{path}: its ground truth has a line that is no number; download it again") from None


def _unpack(path: Path) -> dict[str, bytes]:
    """The files of the kit's folder data, by name."""
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_UNPACKED + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); download it again") from None
    if len(content) > MAX_UNPACKED:
        raise UserError(f"{path}: unpacks to more than {MAX_UNPACKED} bytes, so it is no such kit; download it again")
    return {
        member.name.rpartition("/")[2]: content[member.offset : member.offset + member.size]
        for member in list_members(lambda size, at: content[at : at + size], 0, len(content), path)
        if not member.odd and member.name.split("/")[-2:-1] == ["data"]
    }


def _read_synsets(data: bytes, year: str, path: Path) -> tuple[dict[int, str], dict[str, str]]:
    """WordNet ids by the kit's ids, and what people call them; inner nodes of the hierarchy (ids over 1000) left out."""
    from scipy.io import loadmat  # loads for a fifth of a second; only these archives need it

    try:
        _refuse_bomb(data)
        synsets = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [synset for synset in synsets.reshape(-1) if int(synset["num_children"]) == 0]
        wnids = {int(synset[f"ILSVRC{year}_ID"]): str(synset["WNID"]) for synset in leaves}
        titles = {str(synset["WNID"]): str(synset["words"]) for synset in leaves}
    except Exception as error:  # a damaged file makes loadmat raise nearly anything
        raise UserError(f"{path}: meta.mat is not what it should be ({error}); download the kit again") from None
    if not wnids or len(titles) != len(leaves) or len(wnids) != len(leaves):
        raise UserError(f"{path}: meta.mat names a class twice, or none; download the kit again")
    return wnids, titles


def _refuse_bomb(data: bytes) -> None:
    """Raises ValueError where a MAT-file of level 5 unpacks to absurdly much: loadmat has no limit of its own."""
    at, left = 128, MAX_UNPACKED
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind == COMPRESSED_ELEMENT:
            left -= len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], left))
            if left <= 0:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
        at += 8 + size
