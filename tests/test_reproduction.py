"""The book's reproduction study: its figures are those of the results, and change with them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jinja2
import pytest
from PIL import Image

from book import reproduction
from regolite.paper.statistics import judge_all, read_results

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    text = reproduction.render(folder)
    for name in re.findall(r"```\{image\} (\S+)", text):
        with Image.open(folder / name) as image:
            assert image.width > 700
    return text


def test_every_placeholder_is_filled(page: str) -> None:
    assert not re.search(r"\{%|\{\{ |\bnan\b", page)
    assert page.count(":alt: ") == page.count("```{image}") == 2


def test_verdicts_add_up_and_are_those_of_the_experiments(page: str) -> None:
    verdicts = [one for several in judge_all(read_results(RESULTS)).values() for one in several]
    table = rows(page[page.index("| claim | paper |") : page.index("**Table 1.**")].strip())
    assert len(table) == len(verdicts)
    assert [row[-1].removesuffix(", not tested") for row in table] == [one.word for one in verdicts]
    found = re.search(r"\*\*Results.\*\* (\d+) claims are reproduced, (\d+) are not, (\d+) are undecided", page)
    assert sum(map(int, found.groups())) == len(verdicts)
    assert int(found[1]) == sum(row[-1] == "reproduced" for row in table)


def test_other_results_make_another_page() -> None:
    found = read_results(RESULTS)
    worse = {arm: dict(runs) for arm, runs in copy.deepcopy(found).items()}
    for run in worse["rego"].values():
        for stage in run["stages"]:
            stage["AP"] = 5.0
    facts, others = (reproduction.facts(results, judge_all(results)) for results in (found, worse))
    assert others["ap"]("rego") == "5.0" != facts["ap"]("rego")
    assert others["reproduced"] < facts["reproduced"]
    assert others["difference"]("convergence", 0).endswith("not reproduced")


def test_newer_detectors_stand_in_the_table_as_soon_as_both_runs_are_there(tmp_path: Path) -> None:
    for arm, aps in {"dino": [30.0], "rego_dino": [31.0, 33.0, 35.0, 36.0]}.items():
        run = {"seed": 1, "steps": 5, "stages": [{"AP": ap} for ap in aps]}
        (tmp_path / f"{arm}.json").write_text(json.dumps({"arm": arm, "runs": [run]}))
    table, mean = reproduction._newer(tmp_path)
    assert rows(table) == [["the same with DINO's training", "cards", "1", "30.0", "31.0", "36.0", "+6.0"]]
    assert (mean("dino"), mean("rt_detr")) == ("+6.0", "not run")


def test_an_unknown_name_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "page.md"
    template.write_text("{{ nobody }}")
    monkeypatch.setattr(reproduction, "TEMPLATE", template)
    with pytest.raises(jinja2.UndefinedError, match="nobody"):
        reproduction.render(tmp_path)
