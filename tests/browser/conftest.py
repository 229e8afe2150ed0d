"""What the tests in browsers share: Chromium, and REGO Explainer built once and served on this machine."""

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock


def lacks(reason):
    """Skip the test; in continuous integration a browser test that is not run is a failure."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


# Not for the session: the loop of playwright would run in the process of other tests.
@pytest.fixture(scope="module")
def browser():
    from test_viewers_browser import CHROMIUM, FLAGS, missing

    if missing():
        lacks(missing())
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *camera])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def explainer(tmp_path_factory):
    """The built folder; its two models are exported if they are not stored in build/, which takes a minute or two."""
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module)
    from book.explainer import build, runtime

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # one folder for all workers
    folder = root / "explainer"
    with FileLock(root / "explainer.lock"):
        try:
            runtime.write_runtime(folder / "runtime", build.BUILD / "npm")
        except SystemExit as reason:
            if "npm" not in str(reason):
                raise
            pytest.skip(str(reason))  # also in continuous integration: a registry may be out of reach for a while
        if not (folder / "manifest.json").exists():
            build.build(folder)
    return folder


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder quietly, with the headers that the server has at the time, and notes what it was asked for."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".mjs": "text/javascript"}

    def log_message(self, *args):
        """Nothing."""

    def end_headers(self):
        self.server.asked.append(self.path)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        super().end_headers()


@pytest.fixture(scope="session")
def server(explainer):
    """A static server like any other: `headers` are sent with every file, `asked` are the paths of all requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=explainer))
    server.headers, server.asked = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def headers(server):
    """The headers that the server sends with every file; none after the test."""
    yield server.headers
    server.headers.clear()
