"""onnxruntime-web, which runs the models in the browser: fetched by npm, and checked against a pinned hash."""

from __future__ import annotations

import base64
import gzip
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import onnxruntime
from filelock import FileLock

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the package, as npm's lock files state it."""

FILES = {
    "dist/ort.wasm.bundle.min.mjs": "ort.wasm.mjs",
    "dist/ort-wasm-simd-threaded.wasm": "ort.wasm.gz",
    "dist/ort.jspi.bundle.min.mjs": "ort.webgpu.mjs",
    "dist/ort-wasm-simd-threaded.jspi.wasm": "ort.webgpu.gz",
}
"""Files of the package that a page needs, and their names there; .gz is compressed, since not every server does it.

A visitor gets one of the two runtimes. That for WebGPU is the build that suspends WebAssembly (JSPI): the one for
browsers that cannot do this is 2.5 MB larger.
"""

PROVIDERS = ("wasm", "webgpu")
"""The runtimes, as onnxruntime-web names what executes a model in them."""

LICENSE = Path(onnxruntime.__file__).with_name("LICENSE")
"""Of the same project: MIT. The package for browsers states it, but does not contain the text."""


def write_runtime(folder: Path, store: Path) -> None:
    """Write the runtime and its license to a folder.

    Args:
        folder: for the files.
        store: where the package is kept for the next time.

    Raises:
        SystemExit: npm is missing or cannot fetch the package, or the package is another.
    """
    package = store / f"onnxruntime-web-{VERSION}.tgz"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / "lock"):  # tests in several processes fetch once
        if not package.exists():
            _fetch(store)
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if f"sha512-{found}" != INTEGRITY:
        package.unlink()
        raise SystemExit(f"{package.name} has another hash than the pinned one; it was deleted: try again")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for inside, name in FILES.items():
            content = archive.extractfile(f"package/{inside}").read()
            (folder / name).write_bytes(gzip.compress(content, 9, mtime=0) if name.endswith(".gz") else content)
    shutil.copy(LICENSE, folder / "LICENSE")


def _fetch(store: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is missing: install Node.js, which brings it; the page's runtime is fetched with it")
    done = subprocess.run([npm, "pack", f"onnxruntime-web@{VERSION}"], cwd=store, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "it gave no reason").splitlines()[0]
        raise SystemExit(f"npm could not fetch onnxruntime-web {VERSION}: {reason}")
