"""Serve a folder on this machine: ``python -m book.explainer.serve build/explainer``, until Ctrl-C.

Any static server does. This one also isolates the page from other sites, which lets the model use more than one thread.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript"}  # whatever this computer's registry says


class Handler(SimpleHTTPRequestHandler):
    """Files with the headers of an isolated page; only failures are reported."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

    def end_headers(self) -> None:
        """Add the headers that all files have."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Report nothing of a request that was answered."""


def server(folder: str, port: int = 0) -> ThreadingHTTPServer:
    """A server of a folder on the loopback interface; port 0 is any free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))


if __name__ == "__main__":
    with server(sys.argv[1]) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"      open http://127.0.0.1:{running.server_port}/ (Ctrl-C ends it)", flush=True)
        running.serve_forever()
