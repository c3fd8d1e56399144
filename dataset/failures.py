"""How stores fail: what an error of theirs is, whether to try again and when, and the sentence if that does not help."""

import concurrent.futures.thread  # noqa: F401  which registers with threading, as below
import logging
import math
import os
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from imagefeed.dataset.errors import AGAIN, UserError
from imagefeed.dataset.storage import Url

SAY_AFTER_S = 10
UNREACHED = ("connect", "dns", "timeout")
BUSY = ("503", "429")  # may say when to come again: Retry-After (RFC 9110, 10.2.3)
RETRIED = (*BUSY, "408", "500", "502", "504")
STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>\s*(\w+)\s*</Code>")
REGION = re.compile(r"<Region>\s*([\w-]+)\s*</Region>")
CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
REDIRECTED = "redirect without LOCATION"  # obstore's words for S3's 301
KIND = re.compile(r"kind: (\w+)")
# Machines of a cloud ask there for credentials, after everything else.
METADATA = ("/latest/api/token", "/latest/meta-data", "metadata.google.internal", "/metadata/identity", "://169.254.")
SEE = "docs/stores.md"
# Those of S3 and its like, and of Azure.
KEYS_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed")
log = logging.getLogger("imagefeed")
# Set before the system waits for the threads of pools. The main thread counts as alive until these have ended.
_ending = threading.Event()
threading._register_atexit(lambda: _ending.set())  # type: ignore[attr-defined]


def _after_fork() -> None:
    """A thread that was left behind may hold its lock."""
    global _ending
    _ending = threading.Event()


os.register_at_fork(after_in_child=_after_fork)


class StoreError(UserError):
    """A store that fails for good."""


class ObjectChanged(StoreError):
    """An object that has been replaced since it was first looked at."""


class Failure(NamedTuple):
    """`kind` is counted, `what` ends the sentence "the store ...", `remedy` says what to do."""

    kind: str
    what: str
    remedy: str = f"check the network and the store, then {AGAIN}"
    retried: bool = True


@dataclass(frozen=True)
class Policy:
    """When to give up. The first wait is `first_s`, each further one twice as long, up to `longest_s`, and by chance up to half
    shorter. It ends `limit_s` after the first of failures without a byte between them; `doubtful_s` after it if the store was
    never reached, as its address may be wrong, or fails in a way that is not known."""

    first_s: float = 0.1
    longest_s: float = 15
    limit_s: float = 180
    doubtful_s: float = 15
    silence_s: float = 20  # without a byte, a request has timed out

    @property
    def connect_s(self) -> float:
        """In which a connection must be there."""
        return min(5, self.silence_s)

    @classmethod
    def of_environment(cls) -> "Policy":
        """With the limits that IMAGEFEED_STORE_LIMIT and IMAGEFEED_STORE_TIMEOUT give, in seconds."""
        return cls(
            limit_s=_seconds("IMAGEFEED_STORE_LIMIT", cls.limit_s), silence_s=_seconds("IMAGEFEED_STORE_TIMEOUT", cls.silence_s)
        )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e6:
        raise UserError(f"{name} is {text!r}, which is no number of seconds above 0; correct it in the environment")
    return seconds


@dataclass
class StoreCounts:
    """What a store was asked for: `seconds` is the sum over requests, `waited_s` the time between tries, `retries` counts them
    by kind: a status such as "503", "timeout", "connect", "reset", "short", "whole", "credentials"."""

    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0
    in_flight: int = 0
    waited_s: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    reached: bool = False
    said: dict[str, float] = field(default_factory=dict)  # when, by sentence
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def begin(self) -> float:
        with self.lock:
            self.requests += 1
            self.in_flight += 1
        return time.perf_counter()

    def end(self, begun: float, size: int) -> None:
        with self.lock:
            self.in_flight -= 1
            self.bytes += size
            self.seconds += time.perf_counter() - begun

    def retry(self, kind: str, waited_s: float) -> None:
        with self.lock:
            self.retries[kind] += 1
            self.waited_s += waited_s

    def say(self, sentence: str, every_s: float = math.inf) -> None:
        """Logs a warning, at most once in `every_s`."""
        now = time.monotonic()
        with self.lock:
            if now - self.said.get(sentence, -math.inf) < every_s:
                return
            self.said[sentence] = now
        log.warning("%s", sentence)


class Attempts:
    """The tries of one request."""

    def __init__(self, url: Url, policy: Policy, counts: StoreCounts):
        self.url, self.policy, self.counts = url, policy, counts
        self.renewed, self.generation = False, 0  # of the credentials
        self.progressed()

    def progressed(self) -> None:
        """Bytes have come: the limits begin anew."""
        self.failed, self.since = 0, 0.0

    def wait(self, failure: Failure, asked_s: float | None = None) -> None:
        """Returns when to try again, `asked_s` from now if the store has said so; raises StoreError at the limit."""
        now = time.monotonic()
        self.failed += 1
        self.since = self.since if self.failed > 1 else now
        policy, counts = self.policy, self.counts
        doubtful = failure.kind == "other" or (failure.kind in UNREACHED and not counts.reached)
        limit_s = min(policy.doubtful_s, policy.limit_s) if doubtful else policy.limit_s
        wait_s = min(policy.longest_s, policy.first_s * 2 ** min(self.failed - 1, 30)) * random.uniform(0.5, 1)
        if asked_s is not None:
            wait_s = max(asked_s, wait_s if asked_s == 0 else 0)
        if failure.retried and now + wait_s - self.since <= limit_s:
            counts.retry(failure.kind, wait_s)
            if now + wait_s - self.since > SAY_AFTER_S:
                counts.say(f"{self.url.root}: the store {failure.what}; trying again for up to {limit_s:,.0f} s", SAY_AFTER_S)
            sleep(wait_s)
            return
        said = f", and asks to wait {asked_s:,.0f} s" if asked_s else ""
        times = f" ({self.failed} times in {now - self.since:.0f} s)" if self.failed > 1 else ""
        raise StoreError(f"{self.url}: the store {failure.what}{times}{said}; {failure.remedy}")


def sleep(seconds: float) -> None:
    """Sleeps, but not beyond the end of the program, which waits for threads that read ahead."""
    if _ending.wait(seconds):
        raise StoreError("the program has ended")


def has_ended() -> bool:
    """Whether the program only waits for its threads."""
    return _ending.is_set()


def failure_of(error: Exception) -> Failure:
    """What an exception of obstore is. Its text is all that there is: it has the status, the body and the cause."""
    text = str(error)
    status = match[1] if (match := STATUS.search(text)) else ""
    code = match[1] if (match := CODE.search(text)) else ""
    if any(part in text for part in METADATA):
        return Failure("credentials", "cannot be asked without credentials", f"set them in the environment ({SEE})", False)
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return Failure("bucket", "has no such bucket", "create it, or correct the URL or the endpoint", False)
    if status == "507" or "Quota" in code or "StorageFull" in code:
        what = f"has no room: it answers {status} {code}".rstrip()
        return Failure("full", what, f"free some, or raise the quota, then {AGAIN}", False)
    if code == "RequestTimeTooSkewed":
        return Failure("skewed", "says that this machine's clock is off by minutes", "set the clock (timedatectl)", False)
    if status in ("401", "403") or code == "ExpiredToken":
        return _denied(status, code)
    if status in RETRIED or code in ("RequestTimeout", "SlowDown"):
        return Failure(status, f"answers {status} {code}".rstrip())
    if REDIRECTED in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        region = match[1] if (match := REGION.search(text)) else "the bucket's"
        return Failure("region", "says that the bucket is in another region", f"set AWS_REGION to {region}", False)
    if status:
        return Failure(status, f"answers {status} {code}".rstrip(), "check the URL and the endpoint", False)
    return _unanswered(error, text)


def _denied(status: str, code: str) -> Failure:
    what = f"answers {status} {code}".rstrip()
    if code in KEYS_REFUSED:
        return Failure("credentials", f"{what}: it does not know these keys", "check the credentials in the environment", False)
    if "Expired" in code:
        return Failure("credentials", f"{what}: the credentials have expired", f"renew them, then {AGAIN}", False)
    remedy = "check the credentials and the URL: some stores say so of objects that do not exist, too"
    return Failure("credentials", f"{what}: access is denied", remedy, False)


def _unanswered(error: Exception, text: str) -> Failure:
    kinds = KIND.findall(text)
    if "BadScheme" in text:
        return Failure("tls", "has an endpoint without encryption", "begin the URL of the endpoint with http: or https:", False)
    if match := CERTIFICATE.search(text):
        remedy = "set SSL_CERT_FILE to a file with that of its authority, or check the endpoint"
        return Failure("tls", f"has no certificate that this machine trusts ({match[1]})", remedy, False)
    if "dns error" in text:
        return Failure("dns", "has a name that cannot be resolved", f"check the endpoint and the network, then {AGAIN}")
    if "Timeout" in kinds:
        return Failure("timeout", "does not answer in time")
    if "Connect" in kinds:
        return Failure("connect", "cannot be reached", f"check the endpoint and the network, then {AGAIN}")
    if {"Interrupted", "Request", "Body"} & set(kinds):
        return Failure("reset", "ends connections before the answer is complete")
    what = " ".join(text.partition("\n")[0].split())
    return Failure("other", f"fails ({type(error).__name__}: {what})")
