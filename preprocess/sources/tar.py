"""Lists the members of tar archives from their headers alone, so that images are read in place and nothing is extracted.

Formats: POSIX.1-2001 ustar and pax, GNU tar (https://www.gnu.org/software/tar/manual/html_node/Standard.html), old V7.
The standard library's tarfile takes 37 us per member where this takes 5, takes a corrupt header for the end of the archive,
and can be made to loop, recurse or read gigabytes by hostile headers.
"""

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from imagefeed.dataset.errors import UserError

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_EXTENSION = 1 << 20  # bytes of an extended header; real ones hold a path
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
REGULAR, NO_DATA = b"0\x007", b"123456"
ODD_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}

TRUNCATED = "{}: truncated, because its member at byte {} exceeds its end; download it again"

Read = Callable[[int, int], bytes]  # (size, offset), like os.pread after its handle


class Member(NamedTuple):
    name: str  # without leading slashes
    offset: int
    size: int
    odd: str = ""  # why its bytes are not its content: a link, a device, a sparse file, or a path that leaves the archive


def list_members(read: Read, start: int, end: int, archive: str | Path) -> list[Member]:
    """The members of the archive from byte `start` to `end`, without folders and hidden files.

    Raises UserError, which names `archive`, if it is compressed, corrupt or truncated.
    """
    members: list[Member] = []
    at = start
    extension: dict[str, str] = {}
    while at < end:
        header = read(BLOCK, at)
        if header[:1] == b"\0" and header == ZEROS:
            return members
        if len(header) < BLOCK or at + BLOCK > end:
            _refuse_compressed(header, archive)
            raise UserError(TRUNCATED.format(archive, at))
        size = _check_header(header, at, start, archive)
        kind = header[156:157]
        data = at + BLOCK
        if kind in REGULAR:
            size = int(extension.get("size", size))
        elif kind in NO_DATA:
            size = 0
        elif kind == b"S":
            data = _after_sparse_map(read, header, data, end)
        at = data + -(-size // BLOCK) * BLOCK
        if data + size > end:
            raise UserError(TRUNCATED.format(archive, data))
        if kind in b"LxX":
            if size > MAX_EXTENSION:
                raise UserError(f"{archive}: a header of {size} bytes at byte {data}, which no tar writes; download it again")
            extension |= _extension(kind, read(size, data))
        elif kind not in b"Kg":  # the target of a link, and a header for all members: not used here
            name = extension.get("path") or _name(header)
            odd = ODD_KINDS.get(kind) or ("" if kind in REGULAR else f"an entry of type {kind!r}")
            if kind == b"S" or (extension and any(key.startswith("GNU.sparse") for key in extension)):
                odd, name = "a sparse file", extension.get("GNU.sparse.name", name)
            extension = {}
            if kind == b"5" or (name.endswith("/") and kind in REGULAR):
                continue
            if name.startswith(("/", "./")) or ".." in name:
                parts = [part for part in name.split("/") if part not in ("", ".")]
                name = "/".join(parts)
                odd = odd or ("a path that leaves the archive" if ".." in parts else "")
            if name and not name.rpartition("/")[2].startswith("."):
                members.append(Member(name, data, size, odd))
    if at == start:
        raise UserError(f"{archive}: the archive is empty; download it again")
    return members


def _check_header(header: bytes, at: int, start: int, archive: str | Path) -> int:
    """Verifies the header's checksum, and returns the size of the member."""
    try:
        stored = _number(header[148:156])
        # The lower half of Adler-32 is 1 + the sum of all bytes, modulo 65521: 20 times as fast as sum().
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
        # Some old tars summed signed bytes, in which a byte over 127 counts 256 less.
        if (total - stored) % 65521 == 0 or (total - 256 * sum(byte > 127 for byte in header) - stored) % 65521 == 0:
            return _number(header[124:136])
    except ValueError:
        pass
    if at == start:
        _refuse_compressed(header, archive)
        raise UserError(f"{archive}: not a tar archive; download it again, or remove it from the folder")
    raise UserError(f"{archive}: corrupt at byte {at}, where a member's header should be; download it again")


def _refuse_compressed(header: bytes, archive: str | Path) -> None:
    for mark, name in COMPRESSED.items():
        if header.startswith(mark):
            raise UserError(f"{archive}: compressed ({name}), so its images cannot be read in place; decompress it first")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 if the first bit is set, as GNU tar writes sizes of 8 GiB and more."""
    number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)
    if number < 0:
        raise ValueError("a negative number")
    return number


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """The fields that an extended header sets for the next member: GNU's is a name, pax's are lines "LENGTH KEY=VALUE"."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found = {}
    while (match := re.match(rb"(\d{1,7}) ", data)) and match.end() <= int(match[1]) <= len(data):
        length = int(match[1])
        key, _, value = data[match.end() : length - 1].decode("utf-8", "surrogateescape").partition("=")
        found[key] = value
        data = data[length:]
    if not re.fullmatch(r"[0-9]{1,20}", found.get("size", "0")):
        del found["size"]
    return found


def _after_sparse_map(read: Read, header: bytes, at: int, end: int) -> int:
    """The start of a GNU sparse file's data, after the blocks of its map that follow the header."""
    more = header[482]
    while more and at < end:
        more = read(BLOCK, at)[504:505] not in (b"", b"\0")
        at += BLOCK
    return at
