"""Serves a page that is written again and again, on this machine only, at an address that nobody can guess."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from ..errors import AuditError

LOOPBACK = "127.0.0.1"
_WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="2"><title>No figures yet</title></head>
<body><main><h1>No figures yet</h1><p>The run writes its first ones some time after its first step. This page then shows them by itself.</p>
</main></body></html>"""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveServer:
    """A web server on the loopback interface with two things: the page at `address`, and beside it, as `version`, its number.

    Everything else is not found, also for who does not know the token in the address or comes by another host's name (DNS rebinding).

    Args:
        port: 0 takes any that is free.

    Attributes:
        address: of the page.

    Raises:
        AuditError: the port is not free.

    Example:

    ```python
    with LiveServer() as server:
        server.show(page, 1)
        print(server.address)
    ```
    """

    def __init__(self, port: int = 0) -> None:
        self._token = secrets.token_urlsafe(16)
        self._page, self._version = _WAITING.encode(), 0
        self._seen = 0.0
        self._delivered = 0
        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), _handler_of(self))
        except OSError as error:
            raise AuditError(
                f"The page cannot be served at port {port} ({error.strerror}); choose another --port, or omit it."
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.address = f"http://{LOOPBACK}:{self.port}/{self._token}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    def show(self, page: bytes, version: int) -> None:
        """From now on serve this page, under this number."""
        self._page, self._version = page, version

    def wait_for_reader(self, seconds: float) -> None:
        """Wait until an open page has fetched what is shown, `seconds` at most; not at all where none asked within that time."""
        end = time.monotonic() + seconds
        while self._seen > end - 2 * seconds and self._delivered < self._version and time.monotonic() < end:
            time.sleep(0.05)

    def answer(self, path: str, host: str) -> tuple[bytes, str] | None:
        """Content and type for a request; None where nothing is found."""
        if host not in (f"{LOOPBACK}:{self.port}", f"localhost:{self.port}"):
            return None
        token, _, name = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return None
        page, version = self._page, self._version
        if name == "":
            self._seen, self._delivered = time.monotonic(), version
            return page, "text/html; charset=utf-8"
        if name == "version":
            self._seen = time.monotonic()
            return str(version).encode(), "text/plain; charset=utf-8"
        return None

    def __enter__(self) -> LiveServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler_of(live: LiveServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "trl-sae-audit", ""

        def do_GET(self) -> None:
            found = live.answer(self.path.partition("?")[0], self.headers.get("Host", ""))
            content, kind = found or (b"Not found.", "text/plain; charset=utf-8")
            self.send_response(200 if found else 404)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not told of in the terminal."""

    return Handler
