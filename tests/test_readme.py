"""README and docs: the map leads to code and tests that exist, and made parts are up to date."""

import ast
import json
import re

import pytest

import cetrec
import data
import evaluate
import llama
import lora
from experiments import readme
from experiments.readme import names_of_tests, pages, with_parts
from experiments.reproduce import ABLATION
from support.options import Options, as_flag

MODULES = {module.__name__: module for module in (cetrec, data, evaluate, llama, lora)}
README = (readme.ROOT / "README.md").read_text(encoding="utf-8")
MAP = re.findall(r"^\| ((?:Eq\.|§|Table)[^|]*) \| [^|]* \| ([^|]*) \|$", README, re.MULTILINE)


def beginnings(place: str) -> list[str]:
    """How names of tests begin: "Eq. 3, 4" -> eq03, eq04; "§5.1.2" -> sec5_1_2; Table 1 -> table1.
    """
    if place.startswith("§"):
        return ["sec" + place[1:].replace(".", "_")]
    if place.startswith("Table"):
        return ["table" + place.split()[1]]
    return [f"eq{int(number):02}" for number in re.findall(r"\d+", place)]


def equation_tests() -> list[str]:
    source = (readme.ROOT / "tests" / "test_equations.py").read_text("utf-8")
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
            and node.name.startswith("test_")]


def test_the_map_has_all_equations():
    rows = [beginning for place, _ in MAP for beginning in beginnings(place)]
    assert len(MAP) >= 14 and {f"eq{n:02}" for n in range(1, 11)} < set(rows)


@pytest.mark.parametrize("place, code", MAP)
def test_every_row_of_the_map_leads_to_code_that_exists_and_to_tests(place, code):
    names = re.findall(r"`(\w+)\.(\w+)`", code)
    assert names and all(hasattr(MODULES[module], name) for module, name in names)
    for beginning in beginnings(place):
        assert any(name.startswith(f"test_{beginning}_") for name in equation_tests())


def test_every_test_of_an_equation_belongs_to_a_row():
    starts = tuple(f"test_{beginning}_" for place, _ in MAP for beginning in beginnings(place))
    assert all(name.startswith(starts) for name in equation_tests())


def test_names_of_tests_are_found_by_their_beginning():
    tests = "def test_eq01_a():\n    def test_eq01_b(): 0\ndef test_eq010(): 0"
    assert names_of_tests("eq01", tests) == ["test_eq01_a", "test_eq010"]


def test_readme_is_at_most_150_lines_of_100_columns():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_made_parts_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert with_parts(text) == text, "run python -m experiments.readme"
    assert text.count("<!-- made: ") == text.count("<!-- end -->") == len(
        readme.PART.findall(text))


def test_the_pages_have_the_parts_that_readers_look_for():
    made = {path.name: {match["name"] for match in readme.PART.finditer(path.read_text("utf-8"))}
            for path in pages()}
    assert made["README.md"] == {"first-run", "results"}
    assert made["flags.md"] == {"flags"}
    assert any(name.startswith("TABLE4") for name in made["results.md"])


def test_flags_have_their_defaults_and_choices():
    text = "\n".join(readme.flags())
    assert "| `--lambda-ct` | 0.1 | weight λ of L_CT in Eq. 10" in text
    assert "| 0.0001; 0.003 with the tiny base; 0.004 with the tiny base on synthetic |" in text
    assert "One of rope, rope-attention, sinpe, none." in text
    for name in Options.__dataclass_fields__:
        assert f"| `{as_flag(name)}" in text


def test_the_parts_of_a_page_are_made_anew_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    scores = [[0.25, 0.1]] * 4
    entry = {"section": "Table 4", "seed": 0, "protocol": "p", "effect": [],
             "validation_ta": 1.0, "worlds": {}, "rows": dict.fromkeys(
                 ["co-occurrence, whole history", *(f"10 beams on titles{more}" for more in (
                     "", " | change, reversed", " | change, shuffled"))], scores)}
    (tmp_path / "TABLE4-x.jsonl").write_text("".join(
        json.dumps({"row": row} | entry) + "\n" for row in ABLATION))
    for name, wanted in (
            ("results",
             "| HR@10 | x |\n|---|---|\n| w.o. Both | 0.250 |\n"),
            ("TABLE4-x", f"| w.o. Both | 10 beams on titles |{' 0.2500 |' * 4}"),
            ("FIGURE4-x", f"| w.o. Both | 10 beams on titles |{' +0.2 |' * 4}")):
        page = f"before\n<!-- made: {name} -->\nold\n<!-- end -->\nafter\n"
        anew = with_parts(page)
        assert wanted in anew and "old" not in anew and with_parts(anew) == anew
        assert anew.startswith(page[:page.index("old")])
        assert anew.endswith("\n<!-- end -->\nafter\n")
        empty = f"<!-- made: {name} -->\n<!-- end -->\nbetween\n"
        assert with_parts(2 * empty).count("\nbetween\n") == 2
    with pytest.raises(ValueError, match="there is no such part"):
        with_parts("<!-- made: nothing -->\n\n<!-- end -->")


def test_the_first_run_is_shortened_to_its_best_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "first-run.txt").write_text(
        "data synthetic | 1\nbase x\nstep 1/2\nstep 2/2\nepoch 1 | v\n9 test sequences, 3\nHR@5\n"
        "beams 1\n  reversed 2\n  change, reversed 3\n  shuffled 4\n  change, shuffled 5\n"
        "popularity 6\nco-occurrence, newest item 7\nco-occurrence, whole history 8\neffect 9\n"
        "written x\n")
    assert readme.first_run()[1:-1] == [
        "9 test sequences, 3", "HR@5", "beams 1", "  change, reversed 3", "popularity 6",
        "co-occurrence, newest item 7", "effect 9"]
