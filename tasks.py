"""One word for everything that this repository does: ``python3 tasks.py demo`` (Windows: ``py tasks.py demo``).

It needs nothing but Python >= 3.10. The first run creates a virtual environment in ``.venv`` with the exact versions of
``constraints.txt``. Later runs use it, add the extras that their task needs, and renew it when ``pyproject.toml`` or
``constraints.txt`` changed. The Makefile calls this file, so ``make demo`` and ``python3 tasks.py demo`` are the same.
"""

# The file must still parse on old Pythons, so that they can be told what is wrong: no newer syntax here.
from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# The extras of pyproject.toml. A task needs all of them unless NEEDS lists fewer.
EXTRAS = ("book", "convert", "course", "export", "fast-eval", "tensorboard", "test", "transformers", "video")
NEEDS = {
    "demo": ("course",),
    "lab": ("convert", "course", "transformers"),  # what the chapters import
    "coco-study": (),
    "coco-table1": (),
    "lint": ("course", "test"),  # mypy reads the types of what the course imports
    "format": ("test",),
}

# On Linux the package index has PyTorch with CUDA libraries; here PyTorch publishes it without.
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"

EVERYDAY = ROOT / "regolite" / "weights" / "rego_deformable_detr_everyday.safetensors"

# What makes a run of minutes learn; the notebook's own parameters are a rehearsal of a few steps.
RECIPE = {
    "epochs": 2000,  # more than the minutes allow: time ends the run, and the schedule with it
    "limit_images": None,
    "image_size": None,
    "augment": "laptop_crop",
    "batch_size": 4,  # small batches: more steps in the same time
    "lr": 2e-4,
    "sampling_lr_mult": 1.0,  # a short run has no time for slow parts
    "schedule": "one_cycle",
    "warmup": 0.05,
    "evaluate_every": 0,
    "evaluate_start": True,
    "evaluate_train": False,
    "log_every": 10,
}


def step(number, text):
    """Say what happens next."""
    print(f"[{number}] {text}", flush=True)


def stop(message):
    """End with one clear message."""
    raise SystemExit(f"tasks.py: {message}")


def shown(path):
    """A path as short as it goes."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def works(code, seconds=None):
    """Whether the Python of .venv is there and runs ``code``, in at most so many seconds."""
    command = [str(VENV_PYTHON), "-c", code]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def has_nvidia_driver():
    """Whether this machine has a driver for NVIDIA GPUs."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def read_stamp(stamp):
    """What .venv was made from, its extras and its build of PyTorch; {} where there is no finished environment."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def environment(number, extras, build=None):
    """Create or renew .venv where it is missing, older than what it is made from, or lacks extras.

    ``build`` is the build of PyTorch, "cpu" or "gpu". None keeps the one in .venv; a new .venv follows the machine.
    """
    stamp = VENV / "regolite.stamp"
    had = read_stamp(stamp)
    # The folder's place counts too: `pip install -e` wrote it down.
    made_from = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")] + [str(ROOT).encode()]
    wanted = {
        "made_from": hashlib.sha256(b"\0".join(made_from)).hexdigest(),
        "extras": sorted(set(extras).union(had.get("extras", ())).intersection(EXTRAS)),
        "build": build or had.get("build") or ("gpu" if has_nvidia_driver() else "cpu"),
    }
    usable = works("import pip")
    if had == wanted and usable:
        return step(number, "the environment in .venv is ready")
    other_build = had.get("build", wanted["build"]) != wanted["build"]
    renewed = had.get("made_from") != wanted["made_from"]
    if not had or not usable:
        step(
            number, "creating the environment in .venv (about 2 minutes, 2 GB; 4 GB more with PyTorch's CUDA libraries)"
        )
    elif other_build:
        step(number, f"creating the environment in .venv again: PyTorch for {wanted['build'].upper()}s")
    elif renewed:
        step(number, "renewing the environment in .venv: pyproject.toml, constraints.txt or the folder's place changed")
    else:
        step(
            number,
            "adding to the environment in .venv: " + ", ".join(sorted(set(wanted["extras"]) - set(had["extras"]))),
        )
    if other_build or not usable:
        # pip would keep the other build: its version number is the same.
        clear = [] if works("pass") and not other_build else ["--clear"]
        if subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], stdout=subprocess.DEVNULL).returncode:
            shutil.rmtree(str(VENV), ignore_errors=True)
            stop(
                f"{sys.executable} could make no virtual environment. On Debian and Ubuntu: sudo apt install "
                "python3-venv. Or name another Python: make PYTHON=python3.12 ..."
            )
    index = []
    if wanted["build"] == "cpu" and sys.platform == "linux" and (other_build or renewed or not usable):
        # A probe, since pip would wait and try again for each package. The limit covers the look-up of the name too.
        if works(f"import urllib.request; urllib.request.urlopen({CPU_WHEELS + '/torch/'!r}, timeout=4)", seconds=6):
            index = ["--extra-index-url", CPU_WHEELS]
        else:
            print("      PyTorch's CPU wheels cannot be reached: PyTorch comes from the package index", flush=True)
    words = ["-c", "constraints.txt", "-e", f".[{','.join(wanted['extras'])}]" if wanted["extras"] else "."]
    install([*index, *words])
    if index and not works("import torchvision"):  # where one of the two came without CUDA and the other with it
        print("      PyTorch's CPU wheels do not fit each other: PyTorch comes from the package index", flush=True)
        install(["--force-reinstall", *words])
    # Every kernel would warn of connections that are not encrypted; they never leave this machine.
    config = VENV / "etc" / "ipython" / "ipython_kernel_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('c.IPKernelApp.log_level = "ERROR"\n')
    stamp.write_text(json.dumps(wanted), encoding="utf-8")


def install(words):
    """Run ``pip install WORDS`` in .venv; show what takes long, keep the rest in a log."""
    log = VENV / "install.log"
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    with log.open("w", encoding="utf-8") as file:
        pip = subprocess.Popen([*command, *words], cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for raw in pip.stdout:
            line = raw.decode("utf-8", "replace")
            file.write(line)
            download = re.search(r"Downloading (\S+) \((\d[\d.]* [MG]B)\)", line)
            if download:
                name = "-".join(download.group(1).split("/")[-1].split("-")[:2])
                print("      downloading", name, download.group(2), flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"      unpacking packages: {line.count(',') + 1}", flush=True)
    if pip.wait():
        errors = [line for line in log.read_text(encoding="utf-8").splitlines() if "ERROR" in line or "error:" in line]
        print("\n".join(errors[-12:]), file=sys.stderr)
        stop(f"pip could not install the packages (no network?); all it said is in {shown(log)}. Then run this again.")


def activate(args, number):
    """Choose the Python that the tools run in and what they inherit."""
    if args.no_venv:
        if importlib.util.find_spec("papermill") is None:
            stop(f"--no-venv: {sys.executable} lacks the packages; make them: conda env create -f environment.yml")
        step(number, f"using {sys.executable} as it is")
        python = Path(sys.executable)
    else:
        environment(number, NEEDS.get(args.task, EXTRAS), args.build)
        python = VENV_PYTHON
        os.environ["VIRTUAL_ENV"] = str(VENV)
    os.environ.update(
        PATH=str(python.parent) + os.pathsep + os.environ.get("PATH", ""),  # so that `!pip` in a notebook is this one
        JUPYTER_PREFER_ENV_PATH="1",  # or a kernel of the same name in the home folder would be taken
        # Notebooks import PyTorch before regolite, which sets these two; see regolite/__init__.py.
        GOMP_SPINCOUNT=os.environ.get("GOMP_SPINCOUNT", "1000"),
        KMP_BLOCKTIME=os.environ.get("KMP_BLOCKTIME", "1"),
        # glibc would give the memory of a large tensor back to the system when it is freed, and ask for it again at the
        # next layer: up to a third of the time of a forward pass. With these two it keeps the memory.
        MALLOC_MMAP_MAX_=os.environ.get("MALLOC_MMAP_MAX_", "0"),
        MALLOC_TRIM_THRESHOLD_=os.environ.get("MALLOC_TRIM_THRESHOLD_", str(2**32)),
        PYTHONUTF8="1",  # Windows' code pages cannot print a progress bar
        PYDEVD_DISABLE_FILE_VALIDATION="1",  # the debugger's warning in every notebook
    )
    return str(python)


def call(python, *words, stderr=None, **env):
    """Run ``python -m WORDS`` in the repository's root and give back its exit status."""
    command = [python, "-m"] + [str(word) for word in words]
    return subprocess.call(command, cwd=str(ROOT), stderr=stderr, env=dict(os.environ, **env))


def module(python, *words, **env):
    """Run ``python -m WORDS`` in the repository's root; end with its exit status where it fails."""
    status = call(python, *words, **env)
    if status:
        # A negative status is the signal that ended the tool; shells say 128 + signal.
        raise SystemExit(status if status > 0 else 128 - status)


# --------------------------------------------------------------------------------------------------- the tasks


def demo(args, rest):
    """Teach the everyday detector 80 classes of COCO: the main job, notebooks/20_train_coco.ipynb from top to end."""
    data = Path(args.data or ROOT / "data" / "coco_tiny").resolve()
    run = Path(args.run or ROOT / "runs" / time.strftime("demo-%Y%m%d-%H%M%S")).resolve()
    if not data.is_dir():
        stop(f"--data {args.data}: no such folder; it should hold images/ and annotations/ (COCO format)")
    python = activate(args, "1/3")
    step("2/3", f"training for {args.minutes:g} minutes on {shown(data)}, then evaluating (Ctrl-C stops it)")
    run.mkdir(parents=True, exist_ok=True)
    executed = run / "20_train_coco.ipynb"
    words = ["-r", "data", data, "-r", "output", run, "-p", "max_minutes", args.minutes]
    # Another model starts from its backbone's weights. Data of others may have no masks to cut objects out along.
    words += ["-r", "model", args.model or EVERYDAY.stem]
    words += ["-p", "checkpoint", "None"] if args.model else ["-r", "checkpoint", EVERYDAY]
    for name, value in dict(RECIPE, copy_paste=0.0 if args.data else 0.5).items():
        words += ["-p", name, value]
    # The folder that Jupyter and the tests run the notebook in, so that it sees the same relative paths everywhere.
    words += ["--cwd", ROOT / "notebooks", *rest]
    # On the terminal: what the notebook prints, while it prints it.
    words += ["--stdout-file", "-", "--stderr-file", "-", "--no-progress-bar", "--log-level", "WARNING"]
    log = run / "papermill.log"
    with log.open("w", encoding="utf-8") as file:
        status = call(python, "papermill", ROOT / "notebooks" / "20_train_coco.ipynb", executed, *words, stderr=file)
    if status:
        stop(failure(executed, log))
    step("3/3", "done. What it left:")
    missing = False
    for what, pattern in (
        ("the executed notebook", "20_train_coco.ipynb"),
        ("the checkpoint (last)", "model.safetensors"),
        ("the checkpoint (best)", "best.safetensors"),
        ("the metrics", "metrics.jsonl"),
        ("the figures", "figures/*.png"),
        ("unseen, by stage", "figures/stages_val_*.png"),
    ):
        there = bool(list(run.glob(pattern)))
        missing |= not there
        print(f"      {what:22} {shown(run / pattern) if there else 'MISSING: ' + shown(run / pattern)}")
    if missing:
        stop("the notebook ran to its end but left less than it should")
    print(learned(run / "metrics.jsonl"))


def learned(metrics):
    """What a run has learned, as a text: AP of its validation images by stage, before the first step and at the end."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    before, *_, after = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"]
    stages = ["base detector", *(f"stage {i}" for i in range(1, len(after["stages"])))]
    text = f"AP (AP50) of {after['images']} validation images that it has never seen, after {after['step']} steps:\n"
    text += f"      {'':8}" + "".join(f"{stage:>16}" for stage in stages)
    for name, line in (("before", before), ("after", after)):
        rounded = [["-" if s[name] is None else f"{s[name]:.1f}" for name in ("AP", "AP50")] for s in line["stages"]]
        figures = [f"{ap} ({ap50})" for ap, ap50 in rounded]
        text += f"\n      {name:8}" + "".join(f"{figure:>16}" for figure in figures)
    return text


def failure(executed, log):
    """What went wrong in a notebook that papermill ran, in one line."""
    if executed.is_file():
        for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    return f"the run failed: {output['ename']}: {output['evalue']} ({shown(executed)} shows where)"
    said = log.read_text(encoding="utf-8").strip().splitlines() or ["stopped"]
    return f"the run ended early: {said[-1]} ({shown(log)} has the rest)"


def style(python, number):
    """The two checks of ruff."""
    step(number, "style: ruff check, ruff format --check")
    module(python, "ruff", "check", ".")
    module(python, "ruff", "format", "--check", ".")


@contextlib.contextmanager
def types(python):
    """Check types with mypy while something else runs; then show what it found, and fail if it found errors."""
    with tempfile.TemporaryFile() as output:
        mypy = subprocess.Popen([python, "-m", "mypy"], cwd=str(ROOT), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            status = mypy.wait()
            output.seek(0)
            print("mypy: " + output.read().decode("utf-8", "replace").strip(), flush=True)
    if status:
        raise SystemExit(status)


def pytest(python, *words):
    """Call pytest, and leave nothing in the temporary folder: runs, kernels and browsers write gigabytes there."""
    with tempfile.TemporaryDirectory(prefix="regolite-", ignore_cleanup_errors=True) as folder:
        # Two workers of one thread each: two cores are busy, and sums come out in the same order on every machine.
        # The files go to the workers in the order of tests/conftest.py, the long ones first.
        words = ["-n", 2, "--dist", "loadfile", "--no-loadscope-reorder", "-q", *words]
        path = os.pathsep.join([str(ROOT / "tests" / "without"), *filter(None, [os.environ.get("PYTHONPATH")])])
        module(python, "pytest", *words, OMP_NUM_THREADS="1", TMPDIR=folder, PYTHONPATH=path)


def test(args, rest):
    """Run all that CI runs: style, types, tests, and every notebook, its outputs compared with the stored ones."""
    python = activate(args, "1/3")
    style(python, "2/3")
    step("3/3", "tests, and the notebooks by nbval; types by mypy at the same time")
    words = ["tests", "notebooks", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=300"]
    with types(python):
        pytest(python, *words, "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", *rest)


def test_fast(args, rest):
    """Run a quick part of the tests: style, types, and the tests that take seconds; no notebooks."""
    python = activate(args, "1/3")
    style(python, "2/3")
    step("3/3", "the quick tests; types by mypy at the same time")
    with types(python):
        pytest(python, "tests", "-m", "not slow", *rest)


def notebooks(args, rest):
    """Run notebooks again (all, or those named) and store their outputs, as `test` will compare them."""
    found = [Path(name).resolve() for name in args.names] or sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))
    python = activate(args, "1/2")
    environment = dict(os.environ, OMP_NUM_THREADS="1", REGOLITE_MINE=os.devnull)  # nobody's own modules
    for notebook in found:
        step("2/2", f"running {shown(notebook)}")
        words = ["--ExecutePreprocessor.store_widget_state=False", "--ExecutePreprocessor.record_timing=False", *rest]
        command = [python, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level=WARN", *words]
        began = time.monotonic()
        run = subprocess.Popen([*command, str(notebook)], cwd=str(ROOT), env=environment)
        failed, kilobytes = finish(run)
        if failed:
            raise SystemExit(f"tasks.py: {shown(notebook)} did not run to its end; nothing was stored")
        write_time(notebook, time.monotonic() - began, kilobytes)
        module(python, "book.thumbnails", notebook)


def finish(run):
    """Wait for a process; its exit status, and the memory that it or a child took (Windows does not say)."""
    if not hasattr(os, "wait4"):
        return run.wait(), None
    _, run.returncode, usage = os.wait4(run.pid, 0)
    return run.returncode, usage.ru_maxrss


def write_time(notebook, seconds, kilobytes):
    """Write what a notebook took into its first cell, where it says `**Time.** ...`."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    took = f"{math.ceil(seconds / 5) * 5} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
    if kilobytes:  # macOS counts bytes
        took += f" and {kilobytes / (1 << 30 if sys.platform == 'darwin' else 1 << 20):.1f} GB of memory"
    first = content["cells"][0]
    text = "".join(first["source"])
    timed = re.sub(r"\*\*Time\.\*\* .*? on one CPU core", f"**Time.** {took} on one CPU core", text, flags=re.DOTALL)
    if timed == text and "**Time.**" not in text:
        return
    first["source"] = timed.splitlines(keepends=True)
    notebook.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"      {took}", flush=True)


def coco_table1(args, rest):
    """Print the command of every training of Table 1, with the paper's AP and estimates of GPU hours and memory."""
    python = activate(args, "1/2")
    step("2/2", "counting what each takes (half a minute)")
    module(python, "regolite", "recipes", *rest)


def coco_study(args, rest):
    """Train the paper's claims on full COCO, what decides most per GPU hour first; with --print only list the runs."""
    python = activate(args, "1/2")
    step("2/2", "counting what each run takes (half a minute)")
    module(python, "regolite", "coco-study", *rest)


def lab(args, rest):
    """Open JupyterLab on the course."""
    python = activate(args, "1/2")
    step("2/2", "opening JupyterLab on notebooks/ (Ctrl-C ends it)")
    module(python, "jupyterlab", f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks", *rest)


def book(args, rest):
    """Make the book: the executed course as a static site in build/book/html."""
    python = activate(args, "1/2")
    step("2/2", "making the book from the stored notebooks")
    if subprocess.call([python, str(ROOT / "book" / "build.py")], cwd=str(ROOT)):
        stop("the book could not be made; what Sphinx said stands above")
    print(f"      open {shown(ROOT / 'build' / 'book' / 'html' / 'index.html')}")


def explainer(args, rest):
    """Make REGO Explainer, a page in which the detectors run in the browser, and serve it on this machine."""
    python = activate(args, "1/3")
    folder = ROOT / "build" / "explainer"
    step("2/3", f"making the page and its models in {shown(folder)} (minutes the first time)")
    module(python, "book.explainer.build", folder, *rest)
    step("3/3", "serving it on this machine")
    module(python, "book.explainer.serve", folder)


def lint(args, rest):
    """Check style and types: ruff check, ruff format --check, mypy."""
    python = activate(args, "1/3")
    style(python, "2/3")
    step("3/3", "types: mypy (a minute or two the first time)")
    module(python, "mypy")


def format(args, rest):
    """Mend the style where ruff can: ruff check --fix, ruff format."""
    python = activate(args, "1/2")
    step("2/2", "ruff check --fix, ruff format")
    module(python, "ruff", "check", "--fix", ".")
    module(python, "ruff", "format", ".")


def main():
    """Read the command line and do the task."""
    if sys.version_info < (3, 10):  # noqa: UP036
        stop(f"this is Python {sys.version.split()[0]}; 3.10 or newer is needed: make PYTHON=python3.12, or py -3.12")
    parser = argparse.ArgumentParser(
        prog="tasks.py",
        description="The tasks of this repository. `make TASK` is the same as `python3 tasks.py TASK`.",
        epilog="Options that a task does not know go to its tool (papermill, pytest, JupyterLab): "
        'make test ARGS="-k boxes". With make, the options of demo are variables: make demo MINUTES=1 DATA=dir.',
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    parsers = {}
    for task in (demo, test, test_fast, coco_study, coco_table1, lab, notebooks, book, explainer, lint, format):
        name = task.__name__.replace("_", "-")
        parsers[name] = tasks.add_parser(name, help=task.__doc__, description=task.__doc__, allow_abbrev=False)
        parsers[name].add_argument(
            "--no-venv", action="store_true", help="use this Python as it is (conda), make no .venv"
        )
        build = parsers[name].add_mutually_exclusive_group()
        for one, when in (("cpu", "no NVIDIA driver"), ("gpu", "an NVIDIA driver")):
            build.add_argument(
                f"--{one}",
                dest="build",
                action="store_const",
                const=one,
                help=f"a new .venv on Linux gets PyTorch for {one.upper()}s (default where there is {when})",
            )
        parsers[name].set_defaults(do=task)
    parsers["demo"].add_argument("--minutes", type=float, default=5.0, help="minutes of training (default 5)")
    parsers["demo"].add_argument("--data", help="a COCO-format folder (default data/coco_tiny)")
    parsers["demo"].add_argument("--model", help="a preset, trained from its backbone (default: the everyday detector)")
    parsers["demo"].add_argument("--run", help="the folder to write (default runs/demo-DATE-TIME)")
    parsers["notebooks"].add_argument("names", nargs="*", metavar="NOTEBOOK", help="default: all")
    args, rest = parser.parse_known_args()
    # Ctrl-C reaches the tool too, and how it ends (JupyterLab asks first) is the tool's affair.
    signal.signal(signal.SIGINT, lambda *_: None)
    args.do(args, rest)


if __name__ == "__main__":
    main()
