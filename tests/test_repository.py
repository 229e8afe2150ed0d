"""The repository itself: one list of requirements, honest notebooks, no traces of the machine that it was made on."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import regolite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
TEXT = {".cff", ".cfg", ".csv", ".ipynb", ".json", ".jsonl", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}


def versioned_files() -> list[Path]:
    """The files that git keeps or would keep."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git repository")
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by package: some packages have one version for each of several Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in CONSTRAINTS:
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def test_every_requirement_is_pinned_inside_its_range():
    for requirement in requirements():
        for pin in pins()[canonicalize_name(requirement.name)]:
            (exact,) = pin.specifier
            assert exact.operator == "==" and requirement.specifier.contains(exact.version), f"{pin} for {requirement}"


def test_constraints_hold_versions_only():
    for name, lines in pins().items():
        for pin in lines:
            assert pin.url is None and not pin.extras, f"{name}: an address or an extra"
            assert [s.operator for s in pin.specifier] == ["=="], f"{name}: not one exact version"
            assert "+" not in str(pin.specifier), f"{name}: a local version exists on one machine only"
    assert not [line for line in CONSTRAINTS if re.search(r"://|\bfile:|--(extra-)?index|--find-links", line)]


def test_one_version_applies_to_every_python_and_system():
    environments = [
        {"python_version": python[:4], "python_full_version": python, "sys_platform": system, "os_name": os_name}
        for python in ("3.10.13", "3.11.7", "3.12.1", "3.13.0", "3.14.0")
        for system, os_name in (("linux", "posix"), ("darwin", "posix"), ("win32", "nt"))
    ]
    for requirement in requirements():
        for environment in environments:
            lines = pins()[canonicalize_name(requirement.name)]
            active = [pin for pin in lines if pin.marker is None or pin.marker.evaluate(environment)]
            assert len(active) == 1, f"{requirement.name} on {environment}: {[str(pin) for pin in active]}"


def test_conda_environment_names_the_same_ranges():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    assert pip == ["-c constraints.txt", f"-e .[{extras}]"], "every range comes from pyproject.toml, through pip"
    (python,) = [SpecifierSet(entry[len("python") :]) for entry in listed if str(entry).startswith("python")]
    lower = [str(s) for s in python if s.operator == ">="]
    assert lower == [PROJECT["requires-python"]]


def test_there_are_notebooks_to_check():
    assert NOTEBOOKS, "the tests below would all be empty"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_valid_and_executed(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        assert cells
        # nbval compares nothing in a cell that was never executed: a stripped notebook would pass whole.
        assert not [cell.source for cell in cells if cell.execution_count is None]
        counts = [cell.execution_count for cell in cells]
        assert counts == sorted(counts), "executed out of order: run it from top to end"
        errors = [output.evalue for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert not errors

    def test_is_light(self, path: Path):
        assert path.stat().st_size < 1_500_000, "over 1.5 MB: fewer images, lower dpi"
        assert "widgets" not in json.loads(path.read_text("utf-8"))["metadata"], "drop the stored widget state"


def test_no_file_names_a_path_of_somebodys_machine():
    private = re.compile(r"(?<![\w.])(?:/(?:root|work|home/\w+|Users/\w+)|[A-Z]:\\+Users\\+\w+)[/\\]")
    found = []
    for path in versioned_files():
        if path.suffix in TEXT and path.stat().st_size < 3_000_000:
            text = path.read_text("utf-8", errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in private.finditer(text)]
    assert not found


def test_no_file_is_too_big_for_git():
    big = {str(path.relative_to(ROOT)): path.stat().st_size for path in versioned_files()}
    assert not {
        name: size for name, size in big.items() if size > 16 * 2**20
    }  # the most that a shipped checkpoint may have


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(f"book/docs/{p.name}" for p in (ROOT / "book/docs").glob("*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_links_between_files_resolve(name: str):
    page = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)|<img[^>]+src=\"([^\"]+)\"", page.read_text("utf-8"))
    targets = {a or b for a, b in links}
    local = {t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)}
    assert not [target for target in sorted(local) if not (page.parent / target).exists()]


def number_of_cases(name: str) -> int:
    """How many inputs ``test_FILE.py::TestClass::test_name`` has, 1 where it has no parameters."""
    file, *names = name.split("::")
    found = importlib.import_module(file.removesuffix(".py"))
    for one in names:
        found = getattr(found, one)
    marks = [mark for mark in getattr(found, "pytestmark", []) if mark.name == "parametrize"]
    return math.prod(len(mark.args[1]) for mark in marks)


def test_the_tables_of_tests_are_right():
    """Every test that tests/README.md names exists, and has as many cases as it says."""
    text = (ROOT / "tests" / "README.md").read_text("utf-8")
    total, tables = 0, re.split("^##+ ", text, flags=re.MULTILINE)
    for table in tables:
        cases = 0
        for row in re.findall(r"^\|.*::.*\|$", table, flags=re.MULTILINE):
            counted = sum(number_of_cases(name) for name in re.findall(r"`(test_\w+\.py::[\w:]+)`", row))
            if said := re.search(r"\| (\d+) \| `test_", row):
                assert int(said.group(1)) == counted, row
                cases += counted
        if said := re.match(r".*: (\d+) cases", table):
            assert int(said.group(1)) == cases, table.splitlines()[0]
            total += cases
    assert f"**{total} cases, 0 tracebacks, 0 silent.**" in text and total >= 150


def test_citation_names_the_paper_and_the_course():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= set(cff)
    assert cff["license"] == PROJECT["license"]
    (paper,) = cff["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Chen", "Zhang", "Tao"]
    assert (paper["year"], paper["type"]) == (2022, "conference-paper")


def test_the_version_has_one_place():
    """``regolite/__init__.py``; packaging reads it there, and what people read repeats it."""
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "regolite.__version__"}
    literal = f'__version__ = "{regolite.__version__}"'  # setuptools then needs no import, and so no PyTorch
    assert literal in (ROOT / "regolite" / "__init__.py").read_text("utf-8").splitlines()
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## "))
    assert regolite.__version__ == cff["version"]
    assert regolite.__version__ in newest, "CHANGELOG.md: the first heading names the version"


def test_floors_are_those_of_pyproject():
    printed = subprocess.run(
        [sys.executable, ".ci/floors.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    floors = [f"{r.name}=={s.version}" for r in requirements() for s in r.specifier if s.operator == ">="]
    assert printed.split() == floors and len(floors) == len(requirements()), "every requirement has a floor"


def test_a_package_page_has_no_relative_links():
    absolute = runpy.run_path(str(ROOT / ".ci" / "absolute_links.py"))["absolute"]
    text = (ROOT / "README.md").read_text("utf-8")
    page = absolute(text, "https://host.test/us/regolite", "v1")
    before, after = (re.findall(r"\]\(([^)\s]+)|<img[^>]+src=\"([^\"]+)\"", t) for t in (text, page))
    assert len(before) == len(after) and before != after
    for old, new in zip(map("".join, before), map("".join, after)):
        if re.match(r"[a-z]+:|#", old):
            assert new == old
        else:
            assert re.fullmatch(r"https://host\.test/us/regolite/(blob|raw)/v1/" + re.escape(old), new)
            assert ("/raw/" in new) == old.endswith((".png", ".jpg")), "a page shows images by their raw addresses"
    assert absolute(page, "https://elsewhere.test", "v2") == page


def test_containers_and_binder_install_what_the_lab_needs(tasks):
    needed = f".[{','.join(tasks.NEEDS['lab'])}]"
    for name, times in (("Dockerfile", 2), (".binder/requirements.txt", 1)):
        lines = (ROOT / name).read_text("utf-8").splitlines()
        found = re.findall(r"\.\[[\w,-]+\]", "\n".join(line for line in lines if not line.startswith("#")))
        assert found == [needed] * times, name


def test_ci_runs_what_a_person_runs():
    script = ROOT / ".ci" / "run"
    assert script.read_text("utf-8").rstrip().endswith("exec make test")
    if sys.platform != "win32":
        assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")


def test_tasks_refuse_wrong_input_in_one_line():
    for words, said in (
        (["demo", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["dance"], "invalid choice"),
    ):
        done = subprocess.run([sys.executable, "tasks.py", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("status", [0, 1])
def test_tests_leave_nothing_in_the_temporary_folder(tasks, monkeypatch, status):
    folders = []

    def call(python, *words, **env):
        folders.append(Path(env["TMPDIR"]))
        (folders[0] / "run").mkdir()
        return status

    monkeypatch.setattr(tasks, "call", call)
    with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit):
        tasks.pytest("python", "tests")
    assert len(folders) == 1 and not folders[0].exists()


def test_the_network_is_refused():
    for ask in (lambda: socket.create_connection(("192.0.2.1", 9), timeout=1), lambda: socket.getaddrinfo("a.test", 1)):
        with pytest.raises(pytest.fail.Exception, match="asked for the network"):
            ask()
