"""What ``tasks.py`` puts into ``.venv``: the extras of the task, and the build of PyTorch that fits the machine."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent


class Machine:
    """A machine on which ``tasks.py`` creates environments: whether there is a driver, and the CPU wheels in reach."""

    def __init__(self, tasks: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.driver, self.reachable, self.fits = False, True, True
        self.pip: list[list[str]] = []
        self.venvs: list[list[str]] = []
        self.probes = 0
        self.tasks = tasks
        self.python = folder / "python"
        monkeypatch.setattr(tasks, "VENV", folder)
        monkeypatch.setattr(tasks, "works", self.works)
        monkeypatch.setattr(tasks, "install", self.pip.append)
        monkeypatch.setattr(tasks, "has_nvidia_driver", lambda: self.driver)
        monkeypatch.setattr(tasks.subprocess, "run", self.run)
        monkeypatch.setattr(tasks.sys, "platform", "linux")

    def works(self, code: str, seconds: float | None = None) -> bool:
        if "urlopen" in code:
            assert seconds <= 10, "a machine without a network must not wait"
            self.probes += 1
            return self.reachable
        return self.fits if "torchvision" in code else self.python.exists()

    def run(self, command, **_):
        assert command[1:3] == ["-m", "venv"]
        self.venvs.append(command[3:-1])
        self.python.touch()
        return type("Done", (), {"returncode": 0})

    def extras(self, task: str, build: str | None = None) -> str | None:
        """What pip installs of this repository for a task, None where nothing is missing."""
        before = len(self.pip)
        self.tasks.environment("1/3", self.tasks.NEEDS.get(task, self.tasks.EXTRAS), build)
        return self.pip[-1][-1] if len(self.pip) > before else None


@pytest.fixture
def machine(tasks, tmp_path, monkeypatch):
    return Machine(tasks, tmp_path, monkeypatch)


def test_extras_are_those_of_pyproject(tasks):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert list(tasks.EXTRAS) == sorted(project["optional-dependencies"])
    assert {extra for needs in tasks.NEEDS.values() for extra in needs} <= set(tasks.EXTRAS)


def test_the_demo_installs_what_the_demo_needs(machine):
    assert machine.extras("demo") == ".[course]"
    assert machine.extras("demo") is None


def test_the_tests_add_the_rest_and_no_task_removes_it(machine):
    machine.extras("demo")
    everything = f".[{','.join(machine.tasks.EXTRAS)}]"
    assert machine.extras("test") == everything
    assert machine.extras("demo") is None and machine.extras("lab") is None
    assert machine.venvs == [["--clear"]], "extras are added to the environment that is there"


def test_a_new_pyproject_renews_all_extras(machine, monkeypatch, tmp_path_factory):
    machine.extras("lab")
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("new")
    monkeypatch.setattr(machine.tasks, "ROOT", folder)
    assert machine.extras("demo") == ".[convert,course,transformers]"


@pytest.mark.parametrize("content", ["", "64d5ede723f2", "17", '{"build": "cpu"}'])
def test_a_stamp_of_another_form_is_no_stamp(machine, content):
    machine.extras("test")
    (machine.tasks.VENV / "regolite.stamp").write_text(content)
    assert machine.extras("demo") == ".[course]"


@pytest.mark.parametrize(
    ("driver", "build", "cpu"),
    [(False, None, True), (True, None, False), (True, "cpu", True), (False, "gpu", False)],
)
def test_pytorch_fits_the_machine_or_the_option(machine, driver, build, cpu):
    machine.driver = driver
    machine.extras("demo", build)
    assert (machine.tasks.CPU_WHEELS in machine.pip[0]) == cpu


def test_cpu_wheels_out_of_reach_are_one_line_and_no_failure(machine, capsys):
    machine.reachable = False
    assert machine.extras("demo") == ".[course]"
    assert machine.tasks.CPU_WHEELS not in machine.pip[0] and machine.probes == 1
    assert capsys.readouterr().out.count("CPU wheels cannot be reached") == 1
    machine.extras("demo")
    machine.extras("test")
    assert machine.probes == 1, "PyTorch is there: nothing to ask for"


def test_cpu_wheels_that_do_not_fit_each_other_are_replaced(machine, capsys):
    machine.fits = False
    assert machine.extras("demo") == ".[course]"
    first, second = machine.pip
    assert machine.tasks.CPU_WHEELS in first and machine.tasks.CPU_WHEELS not in second
    assert "--force-reinstall" in second and "do not fit each other" in capsys.readouterr().out


def test_other_systems_have_one_build(machine, monkeypatch):
    monkeypatch.setattr(machine.tasks.sys, "platform", "darwin")
    assert machine.extras("demo") == ".[course]" and machine.probes == 0


def test_the_other_build_is_a_new_environment(machine):
    machine.extras("test", "cpu")
    assert machine.extras("demo", "gpu") == f".[{','.join(machine.tasks.EXTRAS)}]"
    assert machine.venvs == [["--clear"], ["--clear"]] and machine.tasks.CPU_WHEELS not in machine.pip[1]
    assert machine.extras("demo") is None, "without an option the environment stays as it is"
    assert json.loads((machine.tasks.VENV / "regolite.stamp").read_text())["build"] == "gpu"


def test_options_exclude_each_other(tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tasks.py", "demo", "--cpu", "--gpu"])
    with pytest.raises(SystemExit):
        tasks.main()
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1])
def test_types_are_checked_beside_the_tests(tasks, monkeypatch, capsys, status):
    start, commands = tasks.subprocess.Popen, []

    def popen(command, **more):
        commands.append(command)
        return start([sys.executable, "-c", f"print('what it found'); raise SystemExit({status})"], **more)

    monkeypatch.setattr(tasks.subprocess, "Popen", popen)
    with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit), tasks.types("python"):
        print("the tests")
    assert commands == [["python", "-m", "mypy"]]
    assert capsys.readouterr().out.splitlines() == ["the tests", "mypy: what it found"]
