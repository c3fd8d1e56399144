"""Reads the development kit of ImageNet's challenges: the WordNet class of each id, and the labels of validation images.

Format: readme.txt in ILSVRC2012_devkit_t12.tar.gz and ILSVRC2010_devkit-1.0.tar.gz, sections "Synsets" and "Ground truth".
"""

import gzip
import io
import struct
import zlib
from dataclasses import dataclass

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.listing import Root, read_raw
from imagefeed.preprocess.sources.tar import list_members

MAX_UNPACKED = 1 << 28  # stops gzip bombs; the real kits hold less than 30 MB
COMPRESSED_ELEMENT = 15  # miCOMPRESSED of MAT-file level 5
# The folder of the kit's data, if it has been unpacked beside the archives.
FOLDERS = ("ILSVRC{year}_devkit*/data", "devkit-1.0/data", "ILSVRC{year}_devkit*/devkit*/data")


@dataclass(frozen=True)
class Devkit:
    name: str
    wnids: dict[int, str]  # WordNet ids by the kit's own ids, which are not in WordNet order
    titles: dict[str, str]  # common names by WordNet id
    ids: list[int]  # labels of the validation images, in the order of their numbers


def read_devkit(root: Root, year: str) -> Devkit | None:
    """The kit of a year in `root`, packed or unpacked; None if there is none. Raises UserError if it is corrupt."""
    meta, truth = "meta.mat", f"ILSVRC{year}_validation_ground_truth.txt"
    for path in sorted((path for path in root.glob(f"ILSVRC{year}_devkit*.tar.gz") if path.is_file()), key=str):
        files = _unpack(path)
        if missing := [name for name in (meta, truth) if name not in files]:
            raise UserError(f"{path}: no data/{missing[0]} in it; download the kit again")
        return Devkit(path.name, *_read_synsets(files[meta], year, path), read_ids(files[truth], path))
    found: list[Root] = []
    for pattern in FOLDERS:
        found += sorted(root.glob(pattern.format(year=year)), key=str)
    for folder in found:
        if (folder / meta).is_file() and (folder / truth).is_file():
            synsets = _read_synsets(read_raw(folder / meta), year, folder / meta)
            return Devkit(folder.parent.name, *synsets, read_ids(read_raw(folder / truth), folder / truth))
    return None


def read_ids(data: bytes, path: Root) -> list[int]:
    """The ids in a ground truth file, one per line."""
    try:
        return [int(line) for line in data.split()]
    except ValueError:
        raise UserError(f"{path}: its ground truth has a line that is not a number; download it again") from None


def _unpack(path: Root) -> dict[str, bytes]:
    """The files in the kit's folder data, by name."""
    try:
        with gzip.open(io.BytesIO(read_raw(path))) as file:
            content = file.read(MAX_UNPACKED + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: corrupt ({error}); download it again") from None
    if len(content) > MAX_UNPACKED:
        raise UserError(f"{path}: not a development kit, because it unpacks to more than {MAX_UNPACKED} bytes; download it again")
    return {
        member.name.rpartition("/")[2]: content[member.offset : member.offset + member.size]
        for member in list_members(lambda size, at: content[at : at + size], 0, len(content), path)
        if not member.odd and member.name.split("/")[-2:-1] == ["data"]
    }


def _read_synsets(data: bytes, year: str, path: Root) -> tuple[dict[int, str], dict[str, str]]:
    """WordNet ids by the kit's ids, and common names by WordNet id, without inner nodes of the hierarchy (ids over 1000)."""
    from scipy.io import loadmat  # takes 0.2 s, and only these archives need it

    try:
        _refuse_bomb(data)
        synsets = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"]
        leaves = [synset for synset in synsets.reshape(-1) if int(synset["num_children"]) == 0]
        wnids = {int(synset[f"ILSVRC{year}_ID"]): str(synset["WNID"]) for synset in leaves}
        titles = {str(synset["WNID"]): str(synset["words"]) for synset in leaves}
    except Exception as error:  # loadmat raises nearly anything for a corrupt file
        raise UserError(f"{path}: meta.mat is corrupt ({error}); download the kit again") from None
    if not wnids or len(titles) != len(leaves) or len(wnids) != len(leaves):
        raise UserError(f"{path}: meta.mat has no classes or has one twice; download the kit again")
    return wnids, titles


def _refuse_bomb(data: bytes) -> None:
    """Raises ValueError if a MAT-file of level 5 unpacks to far too much, because loadmat itself has no limit."""
    at, left = 128, MAX_UNPACKED
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind == COMPRESSED_ELEMENT:
            left -= len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], left))
            if left <= 0:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
        at += 8 + size
