"""Where datasets are: a Path, or a Url in an object store. The same code reads both."""

import hashlib
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import hash_file, naming, read_file, write_atomically

if TYPE_CHECKING:
    import numpy as np

    from imagefeed.dataset.objects import Store

HTTP = ("http", "https")
SCHEMES = ("s3", "gs", "az", "abfs", "abfss", *HTTP)
GIVEN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HASHED_AT_ONCE = 1 << 18  # what was read is still in the processor's cache
FLATTENED = re.compile(rf"({'|'.join(SCHEMES)}):/")  # what Path makes of a URL


class Url:
    """The address of an object, or of a folder of them: s3://, gs://, az:// (abfs://), http:// or https://.

    str(url) is what the user typed, without a slash at the end. It never holds credentials: UserError if one is in the text.
    """

    __slots__ = ("_text",)
    _text: str

    def __init__(self, text: str):
        scheme, colon, rest = text.partition("://")
        scheme = scheme.lower()
        host, _, path = rest.partition("/")
        if not colon or scheme not in SCHEMES or not host:
            raise UserError(f"{text}: not the URL of a store; give s3://BUCKET/NAME, gs://, az:// or http(s)://HOST/NAME")
        if "@" in host and (scheme in HTTP or ":" in host):
            raise UserError(f"{scheme}://{host.rpartition('@')[2]}: a URL must not hold a password; set it in the environment")
        if scheme in HTTP and ("?" in rest or "#" in rest):
            short = f"{scheme}://{re.split('[?#]', rest)[0]}"
            raise UserError(f"{short}: a URL must not hold a query (after ? or #); give credentials by the environment")
        path = path.rstrip("/")
        if any(part in ("", ".", "..") for part in path.split("/")[: None if path else 0]):
            raise UserError(f"{text}: a part of the path is empty or has only dots; give the URL without it")
        object.__setattr__(self, "_text", f"{scheme}://{host}" + (f"/{path}" if path else ""))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Url cannot be changed: {name}")

    @classmethod
    def literal(cls, text: str) -> "Url":
        """A Url of that text, unchecked."""
        url = cls.__new__(cls)
        object.__setattr__(url, "_text", text)
        return url

    def __reduce__(self) -> tuple:
        return Url.literal, (self._text,)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Url({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Url) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __lt__(self, other: "Url") -> bool:
        return self._text < other._text

    def __truediv__(self, name: str) -> "Url":
        """The Url of a file or folder of that name below this one."""
        return Url.literal(f"{self._text}/{quote(name) if self.scheme in HTTP else name}".rstrip("/"))

    @property
    def scheme(self) -> str:
        return self._text.partition("://")[0]

    @property
    def root(self) -> str:
        """The bucket or the server."""
        return "/".join(self._text.split("/", 3)[:3])

    @property
    def key(self) -> str:
        """The object's name in its bucket, or the path on the server; "" for the bucket itself."""
        key = self._text[len(self.root) + 1 :]
        return unquote(key) if self.scheme in HTTP else key

    @property
    def name(self) -> str:
        """The last part of the path; the bucket or the server if there is none."""
        return self._text.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "Url":
        return self if self._text == self.root else Url.literal(self._text.rpartition("/")[0])

    def absolute(self) -> "Url":
        return self

    def resolve(self) -> "Url":
        return self

    def is_relative_to(self, other: object) -> bool:
        return isinstance(other, Url) and f"{self}/".startswith(f"{other}/")


class ObjectVersion(NamedTuple):
    """What one content of an object has and another does not."""

    size: int
    etag: str | None  # of a web server without, when the object was changed last, as "modified TIME"; None if it tells neither


def place(given: "str | os.PathLike[str] | Url") -> Path | Url:
    """A Url for s3://, gs://, az://, abfs://, http:// and https://; a Path for anything else, file:// included."""
    if isinstance(given, Url):
        return given
    text = os.fspath(given)
    if not isinstance(given, str):
        if FLATTENED.match(text) and not os.path.lexists(text):
            raise UserError(f"{text}: a Path cannot hold a URL, as it drops a slash; give the URL as a string")
        return Path(text)
    if match := GIVEN.match(text):
        if match[1].lower() == "file":
            return Path(unquote(urlsplit(text).path))
        if match[1].lower() in SCHEMES or not os.path.lexists(text):
            return Url(text)
    return Path(text)


_stores: dict[str, "Store"] = {}
_lock = threading.Lock()
_forked = False  # with stores open
_lost: "list[Store]" = []  # kept, because to take them apart may wait for their threads


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    _forked = _forked or bool(_stores)
    _lost.extend(_stores.values())
    _stores.clear()


os.register_at_fork(after_in_child=_after_fork)


def store_of(url: Url) -> "Store":
    """The store of a bucket or server: one for each in this process, for any number of threads."""
    global _forked
    with _lock:
        if url.root not in _stores:
            try:
                if _forked:
                    from imagefeed.dataset.forks import import_anew

                    import_anew()
                    _forked = False
                from imagefeed.dataset.objects import Store
            except ImportError as error:
                if not (error.name or "").startswith("obstore"):
                    raise
                raise UserError(f"{url}: stores need obstore; install it with: pip install 'imagefeed[cloud]'") from None
            _stores[url.root] = Store(Url(url.root))
        return _stores[url.root]


def read_bytes(where: Path | Url) -> bytes:
    """The content of a file or an object; raises FileNotFoundError if there is none."""
    return store_of(where).get_whole(where).tobytes() if isinstance(where, Url) else read_file(where)


def read_hashed(where: Path | Url) -> "tuple[np.ndarray, str]":
    """The content of a file or an object, uint8 (bytes,), and its SHA-256, in hexadecimal; raises FileNotFoundError."""
    digest = hashlib.sha256()
    if isinstance(where, Url):
        return store_of(where).get_whole(where, digest.update), digest.hexdigest()
    import numpy as np  # as everywhere in this module, only where there is an array

    with naming(where), open(where, "rb", buffering=0) as file:
        whole, at = np.empty(os.fstat(file.fileno()).st_size, np.uint8), 0
        while size := file.readinto(whole.data[at : at + HASHED_AT_ONCE]):
            digest.update(whole.data[at : at + size])
            at += size
    return whole[:at], digest.hexdigest()


def hash_of(where: Path | Url) -> str:
    """The SHA-256 of a file or an object, in hexadecimal."""
    return read_hashed(where)[1] if isinstance(where, Url) else hash_file(where)


def write_bytes(where: Path | Url, data: bytes) -> None:
    """Writes a file or an object, whole or not at all."""
    if isinstance(where, Url):
        store_of(where).put(where, data)
    else:
        write_atomically(where, data)


def exists(where: Path | Url) -> bool:
    """Whether there is a file or an object of that name; a folder in a store is none."""
    if isinstance(where, Path):
        return where.exists()
    try:
        store_of(where).head(where)
    except FileNotFoundError:
        return False
    return True
