"""An HTTP server on this machine that can be told to fail."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """A server that many clients can connect to at once."""

    request_queue_size = 64


@contextlib.contextmanager
def serve() -> Iterator[ThreadingHTTPServer]:
    """A server of ``files``, by path; ``requests`` are the paths and Ranges that were asked for."""
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.plan, server.always = {}, [], [], {}
    server.stop, server.url = threading.Event(), f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *_: None  # of connections that break, as they should
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Serves files with Range; ``server.plan`` says what to do wrong, one entry a request, then ``server.always``."""

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        how = server.plan.pop(0) if server.plan else server.always
        time.sleep(how.get("sleep", 0))
        if self.path not in server.files or "status" in how:
            return self.send_error(how.get("status", 404))
        data = server.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and not how.get("no_range") else 0
        if start and start >= len(data):
            return self.send_error(416)
        start = how.get("start", start)
        body = how.get("body", data[start:])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{how.get('total', len(data))}")
        if how.get("length", 0) is not None:
            self.send_header("Content-Length", str(how.get("length", len(body))))
        self.end_headers()
        self.wfile.write(body[: how.get("cut")])
        self.wfile.flush()
        server.stop.wait(how.get("stall", 0))
        if how.get("reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_: Any) -> None:
        pass
