"""Asks a store once with a client of our own, which sees the header Retry-After; obstore hides it."""

import contextlib
import http.client
import time
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from imagefeed.dataset.failures import BUSY, Policy


class Answer(NamedTuple):
    busy: bool  # still
    told: bool
    seconds: float | None


UNKNOWN = Answer(False, False, None)


def retry_after(signed: str, policy: Policy) -> Answer:
    """Asks for the first byte of an object by a signed URL. A store that cannot be asked so, as behind a proxy, is UNKNOWN."""
    parts = urlsplit(signed)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return UNKNOWN
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with contextlib.suppress(OSError, http.client.HTTPException):
        with contextlib.closing(kind(parts.netloc, timeout=policy.connect_s)) as connection:
            connection.request("GET", signed[signed.index(parts.netloc) + len(parts.netloc) :], headers={"Range": "bytes=0-0"})
            response = connection.getresponse()
            if str(response.status) not in BUSY:
                return UNKNOWN
            seconds = seconds_of(response.getheader("Retry-After", ""))
            return Answer(True, seconds is not None, seconds)
    return UNKNOWN


def seconds_of(text: str) -> float | None:
    """The seconds that Retry-After asks to wait: a number, or a date (RFC 9110, 10.2.3); None if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None
