"""A small object store over HTTP: serves a folder as S3 and as plain HTTP does, and fails as it is told.

    with StoreServer(folder) as server:         # FOLDER/BUCKET/KEY; server.url is http://127.0.0.1:PORT
        os.environ.update(server.environment())  # what a client of S3 needs: s3://BUCKET/KEY
        server.fail("503", times=2, retry_after="1")

It speaks what clients of datasets need: HEAD, GET with Range and If-Match, PUT, multipart uploads, ListObjectsV2, DELETE. It does
not verify signatures. To have it in a process of its own, with 30 ms added to each request, over a link of 200 MB/s:

    python -m tests.dataset.store_server FOLDER --port 9000 --latency 0.03 --rate 200e6

GET /.counts returns what it has served, as JSON.
"""

import argparse
import dataclasses
import json
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 1 << 18  # bytes that go out at once over a limited link
STATUS = {status.value: status.phrase for status in HTTPStatus}
CODES = {
    "404": "NoSuchKey",
    "412": "PreconditionFailed",
    "503": "SlowDown",
    "expired": "ExpiredToken",
    "skewed": "RequestTimeTooSkewed",
    "region": "AuthorizationHeaderMalformed",
    "301": "PermanentRedirect",
    "quota": "QuotaExceeded",
}


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests of `method` ("*": of all) whose path ends with `name`, and, with `keys`, that are
    signed with the keys of that id.

    kind: a status such as "503"; "expired", "skewed", "quota" and "region" (with the codes of S3); "refused" (closed without an
    answer), "reset" (in the body, `after` so many bytes), "stall" (no byte follows for `seconds`; with `after` None no header
    either), "short" (as many bytes as `after`, though Content-Range names all), "whole" (200 to a range), "wide" (206 with all as
    the range), "bit" (one bit of the body is another).
    """

    kind: str
    times: int = 1
    method: str = "GET"
    name: str = ""
    after: int | None = 0
    seconds: float = 60
    retry_after: str | None = None
    keys: str = ""

    def hits(self, request: "Request") -> bool:
        signed = request.headers.get("authorization", "") + request.query.get("X-Amz-Credential", "")
        return (
            self.times > 0
            and self.method in (request.method, "*")
            and request.path.endswith(self.name)
            and (not self.keys or f"={self.keys}/" in f"={signed}")
        )


@dataclasses.dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    fault: Fault | None = None

    def faulty(self, kind: str) -> bool:
        return self.fault is not None and self.fault.kind == kind


class StoreServer:
    """Serves FOLDER until it is closed; `latency_s` is added to each request, `rate` limits all answers together (bytes/s). With
    `certificate`, a .pem file with its key too, it speaks https."""

    def __init__(
        self, folder: Path, port: int = 0, latency_s: float = 0, rate: float | None = None, certificate: Path | None = None
    ):
        self.folder, self.latency_s, self.rate = Path(folder), latency_s, rate
        self.counts: Counter[str] = Counter()  # by method, by status, "bytes", "connections", and "PUT /bucket/key"
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.open = True
        self.hidden: set[str] = set()  # headers that are left out
        self._uploads: dict[str, dict[int, bytes]] = {}
        self._lock, self._link_lock, self._link_free_at = threading.Lock(), threading.Lock(), 0.0
        self._connections: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self._tls and certificate:
            self._tls.load_cert_chain(certificate)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "StoreServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection."""
        self._stopped.set()
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def environment(self) -> dict[str, str]:
        """The environment of a client of S3."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def fail(self, kind: str, **options) -> Fault:
        fault = Fault(kind, **options)
        with self._lock:
            self.faults.append(fault)
        return fault

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self.open:
                connection.close()
                continue
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
                self.counts["connections"] += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            for request in requests_of(connection):
                with self._lock:
                    request.fault = self._fault_of(request)
                    self.counts[request.method] += 1
                    self.requests.append(dataclasses.replace(request, body=b""))
                if self.latency_s:
                    time.sleep(self.latency_s)
                if not self._answer(connection, request):
                    break
        except OSError:  # the client has left
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _fault_of(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.hits(request):
                fault.times -= 1
                self.counts[f"fault {fault.kind}"] += 1
                return fault
        return None

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """Returns whether the connection stays open."""
        fault = request.fault
        if fault and fault.kind == "refused":
            return False
        if fault and fault.kind == "stall" and fault.after is None:
            self._stopped.wait(fault.seconds)
            return False
        if fault and (fault.kind.isdigit() or fault.kind in ("expired", "skewed", "region", "quota")):
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            status = int(fault.kind) if fault.kind.isdigit() else 400 if fault.kind == "region" else 403
            self._send_error(connection, request, status, CODES.get(fault.kind, "Error"), headers)
            return True
        if request.path == "/.counts":
            self._send(connection, request, 200, {}, json.dumps(self.counts).encode())
            return True
        method: Callable[[socket.socket, Request], bool | None] = getattr(self, f"_{request.method.lower()}")
        return method(connection, request) is not False

    def _file(self, request: Request) -> Path:
        return self.folder / request.path.lstrip("/")

    def _get(self, connection: socket.socket, request: Request) -> bool:
        if "list-type" in request.query:
            if self._file(request).is_dir():
                self._send(connection, request, 200, {}, self._listing(request))
            else:
                self._send_error(connection, request, 404, "NoSuchBucket")
            return True
        try:
            if not (path := self._file(request)).is_file():
                raise FileNotFoundError
            file = open(path, "rb")
        except (FileNotFoundError, NotADirectoryError):
            self._send_error(connection, request, 404, CODES["404"])
            return True
        with file:
            status = os.fstat(file.fileno())
            size, etag = status.st_size, etag_of(status)
            headers = {"ETag": etag, "Last-Modified": formatdate(status.st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
            headers = {name: value for name, value in headers.items() if name not in self.hidden}
            if request.headers.get("if-match", etag) not in (etag, "*"):
                self._send_error(connection, request, 412, CODES["412"])
                return True
            begin, end, code = 0, size, 200
            if (wanted := request.headers.get("range")) and not request.faulty("whole"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = (
                    (int(first), min(size, int(last) + 1 if last else size)) if first else (max(0, size - int(last)), size)
                )
                if request.faulty("wide"):
                    begin, end = 0, size
                if begin >= end:
                    self._send_error(connection, request, 416, "InvalidRange")
                    return True
                code, headers["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{size}"
            return self._send_file(connection, request, code, headers, file.fileno(), begin, end)

    def _send_file(
        self, connection: socket.socket, request: Request, code: int, headers: dict, handle: int, begin: int, end: int
    ) -> bool:
        fault = request.fault
        sent_end = end
        if fault and fault.kind in ("reset", "stall", "short"):
            sent_end = min(end, begin + (fault.after or 0))
        length = (sent_end if request.faulty("short") else end) - begin
        self._send(connection, request, code, headers, None, length)
        if request.method == "HEAD":
            return True
        if request.faulty("bit"):
            data = bytearray(os.pread(handle, end - begin, begin))
            data[len(data) // 2] ^= 1
            connection.sendall(data)
            begin = sent_end
        while begin < sent_end:
            step = sent_end - begin if self.rate is None else min(PIECE, sent_end - begin)
            self._wait_for_link(step)
            if self._tls:
                connection.sendall(os.pread(handle, step, begin))
                sent = step
            else:
                sent = os.sendfile(connection.fileno(), handle, begin, step)
            begin += sent
            if not sent:
                return False
        if request.faulty("stall"):
            self._stopped.wait(fault.seconds if fault else 0)
            return False
        if request.faulty("reset"):
            time.sleep(0.05)  # what has been sent must be read before the reset, which discards it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        return True

    def _head(self, connection: socket.socket, request: Request) -> bool:
        return self._get(connection, request)

    def _put(self, connection: socket.socket, request: Request) -> bool:
        self._wait_for_link(len(request.body))
        if not (self.folder / request.path.split("/")[1]).is_dir():
            self._send_error(connection, request, 404, "NoSuchBucket")
            return True
        if request.headers.get("if-none-match") == "*" and self._file(request).exists():
            self._send_error(connection, request, 412, CODES["412"])
            return True
        if "uploadId" in request.query:
            upload = self._uploads.get(request.query["uploadId"])
            if upload is None:
                self._send_error(connection, request, 404, "NoSuchUpload")
                return True
            upload[int(request.query["partNumber"])] = request.body
            self._send(connection, request, 200, {"ETag": f'"part{request.query["partNumber"]}"'})
            return True
        etag = self._store(request, [request.body])
        self._send(connection, request, 200, {"ETag": etag})
        return True

    def _store(self, request: Request, pieces: list[bytes]) -> str:
        path = self._file(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.uploading")
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            etag = etag_of(os.fstat(file.fileno()))
        etag = etag_of(temporary.stat())
        temporary.replace(path)
        with self._lock:
            self.counts[f"PUT {request.path}"] += 1
        return etag

    def _post(self, connection: socket.socket, request: Request) -> bool:
        if "uploads" in request.query:
            name = secrets.token_hex(8)
            self._uploads[name] = {}
            self._send_xml(connection, request, "InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")
        elif "uploadId" in request.query:
            parts = self._uploads.pop(request.query["uploadId"], None)
            if parts is None:
                self._send_error(connection, request, 404, "NoSuchUpload")
                return True
            etag = self._store(request, [data for _, data in sorted(parts.items())])
            self._send_xml(connection, request, "CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")
        elif "delete" in request.query:
            keys = [unquote(part.partition("</Key>")[0]) for part in request.body.decode().split("<Key>")[1:]]
            for key in keys:
                (self._file(request) / key).unlink(missing_ok=True)
            done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            self._send_xml(connection, request, "DeleteResult", done)
        else:
            self._send_error(connection, request, 400, "InvalidRequest")
        return True

    def _delete(self, connection: socket.socket, request: Request) -> bool:
        if "uploadId" in request.query:
            self._uploads.pop(request.query["uploadId"], None)
        else:
            self._file(request).unlink(missing_ok=True)
        self._send(connection, request, 204, {})
        return True

    def _listing(self, request: Request) -> bytes:
        """All keys below a prefix, a thousand a page."""
        bucket, prefix = self._file(request), request.query.get("prefix", "")
        after = request.query.get("continuation-token", request.query.get("start-after", ""))
        keys = sorted(
            path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file() and path.suffix != ".uploading"
        )
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        more = len(keys) > 1000
        rows = []
        for key in keys[:1000]:
            status = (bucket / key).stat()
            changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{changed}</LastModified><ETag>{escape(etag_of(status))}</ETag>"
                f"<Size>{status.st_size}</Size></Contents>"
            )
        token = f"<NextContinuationToken>{escape(keys[999])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>x</Name><KeyCount>{len(rows)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{token}{''.join(rows)}</ListBucketResult>"
        ).encode()

    def _send_error(
        self, connection: socket.socket, request: Request, status: int, code: str, headers: dict[str, str] | None = None
    ) -> None:
        region = "<Region>eu-west-1</Region>" if code == CODES["region"] else ""
        body = f"<Error><Code>{code}</Code><Message>{STATUS[status]}</Message>{region}</Error>".encode()
        self._send(connection, request, status, headers or {}, body)

    def _send_xml(self, connection: socket.socket, request: Request, name: str, inner: str) -> None:
        self._send(connection, request, 200, {"Content-Type": "application/xml"}, f"<{name}>{inner}</{name}>".encode())

    def _send(
        self,
        connection: socket.socket,
        request: Request,
        status: int,
        headers: dict[str, str],
        body: bytes | None = b"",
        length: int = 0,
    ) -> None:
        """The header, and the body unless it is None: then `length` bytes of it follow from elsewhere."""
        if body is not None:
            length = len(body)
        lines = [f"HTTP/1.1 {status} {STATUS[status]}", *(f"{name}: {value}" for name, value in headers.items())]
        lines += [f"Content-Length: {length}", "", ""]
        with self._lock:
            self.counts[str(status)] += 1
            self.counts["bytes"] += 0 if request.method == "HEAD" else length
        connection.sendall("\r\n".join(lines).encode() + (b"" if request.method == "HEAD" else body or b""))

    def _wait_for_link(self, size: int) -> None:
        """Returns when the link, which all connections share, has carried `size` bytes more."""
        if self.rate is None:
            return
        with self._link_lock:
            now = time.monotonic()
            self._link_free_at = max(now, self._link_free_at) + size / self.rate
            wait_s = self._link_free_at - now
        if wait_s > 0:
            time.sleep(wait_s)


def etag_of(status: os.stat_result) -> str:
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


def requests_of(connection: socket.socket) -> Iterator[Request]:
    """The requests that arrive on a connection, one after the other."""
    buffer = b""
    while True:
        while (at := buffer.find(b"\r\n\r\n")) < 0:
            received = connection.recv(1 << 16)
            if not received:
                return
            buffer += received
        first, *lines = buffer[:at].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body, buffer = bytearray(buffer[at + 4 :]), b""
        if headers.get("expect") == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", 0))
        while len(body) < length:
            received = connection.recv(1 << 20)
            if not received:
                return
            body += received
        buffer = bytes(body[length:])
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        yield Request(method, unquote(parts.path), query, headers, bytes(body[:length]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves FOLDER/BUCKET/KEY as an object store.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0, help="seconds added to each request")
    parser.add_argument("--rate", type=float, help="bytes/s of all answers together")
    arguments = parser.parse_args()
    server = StoreServer(arguments.folder, arguments.port, arguments.latency, arguments.rate)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
