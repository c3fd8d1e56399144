"""What the replies of a store say: which version they are of, and whether they are what was asked for."""

import re
from typing import Any

from imagefeed.dataset.failures import ObjectChanged
from imagefeed.dataset.storage import ObjectVersion, Url

OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got \d+\.\.\d+")


class ShortAnswerError(Exception):
    """An answer that ended early, which obstore takes for complete."""


def version_of(meta: Any) -> ObjectVersion:
    etag, changed = meta["e_tag"], meta["last_modified"]
    if etag and not etag.endswith('"'):  # some stores leave out the quotes in lists
        etag = f'"{etag}"'
    if not etag and changed and changed.timestamp() > 0:  # obstore takes 1970 if it is not told
        etag = f"modified {changed}"
    return ObjectVersion(meta["size"], etag)


def options_of(begin: int, end: int | None, version: ObjectVersion | None, whole: bool) -> Any:
    """obstore's options of a GET."""
    options: dict[str, Any] = {}
    if (begin or end is not None) and not whole:
        options["range"] = {"offset": begin} if end is None else (begin, end)
    # A weak ETag, W/"...", never matches (RFC 9110, 13.1.1); `check_version` compares it.
    if version and version.etag and version.etag.startswith('"'):
        options["if_match"] = version.etag
    return options


def check_version(url: Url, wanted: ObjectVersion | None, found: ObjectVersion) -> ObjectVersion:
    """Servers may ignore If-Match. Raises ObjectChanged, and ShortAnswerError for another length of the same content."""
    if wanted is None or found == wanted:
        return found
    if found.etag and wanted.etag and found.etag != wanted.etag:
        raise replaced(url)
    if found.size != wanted.size:
        raise ShortAnswerError if found.etag and wanted.etag and found.etag.startswith('"') else replaced(url)
    return wanted


def replaced(url: Url) -> ObjectChanged:
    return ObjectChanged(f"{url}: the object has been replaced since it was opened; start anew, once nobody writes to it")


def is_not_partial(error: Exception) -> bool:
    """Whether the store answered with another range, as s3rver does to one of one byte, or 200: with the whole object."""
    text = str(error)
    return "NotPartial" in text or "RangeNotSupported" in text or OTHER_RANGE.search(text) is not None


def is_out_of_range(error: Exception) -> bool:
    """Whether the store said so, or answered a range of nothing, as s3rver does."""
    return "status code: 416" in str(error) or "but object was only 0 bytes long" in str(error)
