"""Servers on this machine: a bucket with Neuronpedia's exports, and an endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Bucket:
    """A bucket whose listing has `page` keys a page.

    Attributes:
        files: by key. asked: (path, Range header) of every file that was asked for.
        cut: keys whose next answer breaks off after that many bytes. busy: how many requests are answered 503 first.
    """

    files: dict[str, bytes]
    page: int = 3
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    busy: int = 0

    def listing(self, prefix: str, token: str | None) -> bytes:
        keys = sorted(key for key in self.files if key.startswith(prefix))
        start = int(token or 0)
        shown = keys[start : start + self.page]
        more = start + self.page < len(keys)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.files[key])}</Size></Contents>"
            for key in shown
        )
        end = f"<NextContinuationToken>{start + self.page}</NextContinuationToken>" if more else ""
        name = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{name}"><IsTruncated>{str(more).lower()}</IsTruncated>{entries}{end}</ListBucketResult>'.encode()


@contextmanager
def serve_bucket(bucket: Bucket) -> Iterator[Bucket]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if bucket.busy:
                bucket.busy -= 1
                self.send_error(503)
                return
            parts = urlsplit(self.path)
            if "list-type" in parts.query:
                query = parse_qs(parts.query)
                _send(
                    self, 200, bucket.listing(query["prefix"][0], query.get("continuation-token", [None])[0])
                )
                return
            key, wanted = unquote(parts.path).lstrip("/"), self.headers["Range"]
            bucket.asked.append((key, wanted))
            content = bucket.files[key]
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            body = content[start:]
            if key in bucket.cut:
                body = body[: bucket.cut.pop(key)]
            _send(self, 206 if wanted else 200, body)

        def log_message(self, *args: Any) -> None:
            pass

    with _serving(Handler) as bucket.url:
        yield bucket


def export_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A batch of an export, gzipped JSON lines."""
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


@dataclass
class Endpoint:
    """An endpoint whose replies a function makes from the messages.

    Attributes:
        requests: bodies of all requests. keys: their Authorization headers. busy: how many are answered 429 first. most: the largest
            number that were open at once. thinks: tokens that it thinks before a reply, and replies nothing where it has no more.
    """

    reply: Callable[[list[dict[str, str]]], str]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    busy: int = 0
    refused: int = 0
    most: int = 0
    thinks: int = 0


@contextmanager
def serve_endpoint(endpoint: Endpoint) -> Iterator[Endpoint]:
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal open_now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                open_now += 1
                endpoint.most = max(endpoint.most, open_now)
                endpoint.keys.add(self.headers["Authorization"])
                busy = endpoint.busy > 0
                endpoint.busy -= busy
                if not busy:
                    endpoint.requests.append(body)
            time.sleep(0.003)  # so that requests meet
            if busy or endpoint.refused:
                status = 429 if busy else endpoint.refused
                _send(
                    self,
                    status,
                    json.dumps({"error": {"message": "not now"}}).encode(),
                    {"retry-after-ms": "1"},
                )
            else:
                assert self.path == "/v1/chat/completions"
                speaks = body["max_completion_tokens"] > endpoint.thinks
                content = endpoint.reply(body["messages"]) if speaks else ""
                message = {"role": "assistant", "content": content}
                choice = {
                    "index": 0,
                    "message": message,
                    "finish_reason": "stop" if speaks else "length",
                }
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                }
                _send(self, 200, json.dumps(answer).encode())
            with lock:
                open_now -= 1

        def log_message(self, *args: Any) -> None:
            pass

    with _serving(Handler) as address:
        endpoint.url = f"{address}/v1"
        yield endpoint


def _send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {
        "Content-Length": str(len(body)),
        "Content-Type": "application/json",
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
