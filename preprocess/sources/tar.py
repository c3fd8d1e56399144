"""Lists the members of tar archives from their headers alone, so that images are read in place and nothing is extracted.

Formats: POSIX.1-2001 ustar and pax, GNU tar (https://www.gnu.org/software/tar/manual/html_node/Standard.html), old V7.
The standard library's tarfile takes 37 us per member where this takes 5, takes a corrupt header for the end of the archive,
and can be made to loop, recurse or read gigabytes by hostile headers.
"""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

from imagefeed.dataset.errors import UserError

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_EXTENSION = 1 << 20  # bytes of an extended header; real ones hold a path
MAX_CONTENT = 1 << 16  # bytes of a member whose content is wanted
# One read takes a header, a block of data and the next header, so small files between images, such as the labels in
# WebDataset's shards, cost no reads of their own.
WINDOW = 4 * BLOCK
TAIL = 1 << 16  # tar itself pads an archive to 10,240 bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
REGULAR, NO_DATA = b"0\x007", b"123456"
HARD_LINK = b"1"
ODD_KINDS = {
    HARD_LINK: "a hard link to no earlier member",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
}

TRUNCATED = "{}: truncated, because its member at byte {} exceeds its end; download it again"

Read = Callable[[int, int], bytes]  # (size, offset), like os.pread after its handle


class Member(NamedTuple):
    name: str  # without leading slashes
    offset: int
    size: int
    odd: str = ""  # why its bytes are not its content: a link, a device, a sparse file, or a path that leaves the archive
    content: bytes = b""  # if it was asked for


def list_members(read: Read, start: int, end: int, archive: object, wanted: tuple[str, ...] = ()) -> list[Member]:
    """The members of the archive from byte `start` to `end`, without folders and hidden files.

    Reads the content of small members whose names end in one of `wanted`. A hard link has the place of the earlier member that
    it names. Raises UserError, which names `archive`, if it is compressed, corrupt or truncated.
    """
    members: list[Member] = []
    targets: dict[int, str] = {}  # of hard links, by position
    hidden = set()
    at = window_at = start
    window = b""
    extension: dict[str, str] = {}
    while at < end:
        inside = at - window_at
        if inside + BLOCK > len(window):
            window, window_at, inside = read(WINDOW if at + WINDOW < end else end - at, at), at, 0
        header = window[inside : inside + BLOCK]
        if len(header) < BLOCK:
            _refuse_compressed(header, archive)
            raise UserError(TRUNCATED.format(archive, at))
        if not header[0] and header == ZEROS:
            at = _behind_the_end(read, at, end)
            continue
        size = _check_header(header, at, start, archive)
        kind = header[156:157]
        data = at + BLOCK
        regular = kind in REGULAR
        if regular:
            size = int(extension["size"]) if "size" in extension else size
        elif kind in NO_DATA:
            size = 0
        elif kind == b"S":
            data = _after_sparse_map(read, header, data, end)
        at = data + -(-size // BLOCK) * BLOCK
        if data + size > end:
            raise UserError(TRUNCATED.format(archive, data))
        if kind in b"LKxX":
            if size > MAX_EXTENSION:
                raise UserError(f"{archive}: a header of {size} bytes at byte {data}, which no tar writes; download it again")
            extension |= _extension(kind, read(size, data))
        elif kind != b"g":  # a header for all members, not used here
            name = extension.get("path") or _name(header)
            odd = "" if regular else ODD_KINDS.get(kind, f"an entry of type {kind!r}")
            if kind == b"S" or (extension and any(key.startswith("GNU.sparse") for key in extension)):
                odd, name = "a sparse file", extension.get("GNU.sparse.name", name)
            target = _clean(extension.get("linkpath") or _text(header[157:257])) if kind == HARD_LINK else ""
            if extension:
                extension = {}
            if kind == b"5" or (regular and name.endswith("/")):
                continue
            if name.startswith(("/", "./")) or ".." in name:
                name = _clean(name)
                odd = "a path that leaves the archive" if ".." in name.split("/") else odd
            if not name:
                continue
            if target and odd == ODD_KINDS[HARD_LINK]:
                targets[len(members)] = target
            if name.rpartition("/")[2].startswith("."):
                hidden.add(len(members))
            content = b""
            if name.endswith(wanted) and size <= MAX_CONTENT and not odd:
                inside = data - window_at
                content = window[inside : inside + size] if inside + size <= len(window) else read(size, data)
            members.append(Member(name, data, size, odd, content))
    if start == end:
        raise UserError(f"{archive}: the archive is empty; download it again")
    if targets:
        _follow(members, targets)
    return [member for at, member in enumerate(members) if at not in hidden] if hidden else members


def _behind_the_end(read: Read, at: int, end: int) -> int:
    """Where a further archive begins behind the zeros that end one, as in `cat a.tar b.tar`; `end` if there is none."""
    while at < end and (tail := read(min(TAIL, end - at), at)):
        zeros = len(tail) - len(tail.lstrip(b"\0"))
        at += zeros // BLOCK * BLOCK if zeros < len(tail) else zeros
        if zeros < len(tail):
            return at if read(BLOCK, at)[257:262] == b"ustar" else end
    return end


def _follow(members: list[Member], targets: dict[int, str]) -> None:
    """Gives each hard link the place of the last earlier member with its target's name (POSIX, pax, typeflag 1)."""
    by_name: dict[str, Member] = {}
    for at, member in enumerate(members):
        if targets.get(at) in by_name:
            members[at] = member = by_name[targets[at]]._replace(name=member.name)
        by_name[member.name] = member


def _clean(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _check_header(header: bytes, at: int, start: int, archive: object) -> int:
    """Verifies the header's checksum, and returns the size of the member."""
    try:
        checksum = header[148:156]
        stored = _number(checksum)
        # The lower half of Adler-32 is 1 + the sum of all bytes, modulo 65521: 20 times as fast as sum().
        total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(checksum) & 0xFFFF) + 8 * ord(" ")
        # Some old tars summed signed bytes, in which a byte over 127 counts 256 less.
        if (total - stored) % 65521 == 0 or (total - 256 * sum(byte > 127 for byte in header) - stored) % 65521 == 0:
            return _number(header[124:136])
    except ValueError:
        pass
    if at == start:
        _refuse_compressed(header, archive)
        raise UserError(f"{archive}: not a tar archive; download it again, or remove it from the folder")
    raise UserError(f"{archive}: corrupt at byte {at}, where a member's header should be; download it again")


def _refuse_compressed(header: bytes, archive: object) -> None:
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
    name = _text(header[:100])
    return f"{_text(header[345:500])}/{name}" if header[345] and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """The fields that an extended header sets for the next member: GNU's is a name, pax's are lines "LENGTH KEY=VALUE"."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": _text(data)}
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
