"""experiments/readme.py: the paper has code and tests in every place, and pages are up to date."""

import ast
import json

import pytest

from experiments import readme
from experiments.readme import PLACES, code_of_places, pages, places_in, names_of_tests, with_parts
from experiments.reproduce import ABLATION
from support.options import Options, as_flag


def test_places_of_the_paper_are_read_in_all_their_forms():
    assert places_in("Eq. 9, which is Eq. 1 in §4.4.") == {"Eq. 9", "Eq. 1", "§4.4"}
    assert places_in("Eqs. 3 to 5 and Eq. 7, 8 (§5.1.2, §4.2.1)") == {
        "Eq. 3", "Eq. 4", "Eq. 5", "Eq. 7", "Eq. 8", "§5.1.2", "§4.2"}
    assert places_in("Eq. 3 and 10; Table 1; D3, 1 to 2, Fig. 4, §3.2") == {
        "Eq. 3", "Eq. 10", "Table 1"}


def test_docstrings_lead_from_places_to_functions_classes_and_methods():
    source = '"""Eq. 1"""\ndef f():\n    """Eq. 2."""\nclass A:\n    """Eq. 2 to 3"""\n' \
             '    def g(self):\n        """§4.3"""\n'
    assert code_of_places({"m": source}) == {"Eq. 2": ["m.f", "m.A"], "Eq. 3": ["m.A"],
                                             "§4.3": ["m.A.g"]}
    tests = "def test_eq01_a():\n    def test_eq01_b(): 0\ndef test_eq010(): 0"
    assert names_of_tests("eq01", tests) == ["test_eq01_a", "test_eq010"]


def test_every_place_of_the_paper_has_a_function_and_a_test():
    wanted = {f"Eq. {n}" for n in range(1, 11)} | {
        "Table 1", "§4.2", "§4.3", "§4.4", "§5.1.1", "§5.1.2", "§5.1.3", "§5.1.4", "§5.4"}
    assert PLACES.keys() == wanted
    lines = readme.paper_map()
    assert len(lines) == 2 + len(wanted)
    (eq03,) = (line for line in lines if line.startswith("| Eq. 3 "))
    assert "`cetrec.sinusoidal`" in eq03 and "`test_eq03…`" in eq03


@pytest.mark.parametrize("place, beginning", [("Eq. 11", "eq01"), ("Eq. 1", "eq11")])
def test_a_place_without_code_or_test_is_found(monkeypatch, place, beginning):
    monkeypatch.setitem(PLACES, place, ("what", beginning))
    with pytest.raises(ValueError, match=f"{place} has no function, or no test"):
        readme.paper_map()


def test_all_names_of_tests_equations_belong_to_a_place():
    source = (readme.ROOT / "tests" / "test_equations.py").read_text("utf-8")
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
             and node.name.startswith("test_")]
    assert len(names) > 30
    for name in names:
        assert any(name.startswith(f"test_{beginning}") for _, beginning in PLACES.values()), name


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_made_parts_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert with_parts(text) == text, "run python -m experiments.readme"
    assert text.count("<!-- made: ") == text.count("<!-- end -->") == len(
        readme.PART.findall(text))


def test_the_pages_have_the_parts_that_readers_look_for():
    made = {path.name: {match["name"] for match in readme.PART.finditer(path.read_text("utf-8"))}
            for path in pages()}
    assert made["README.md"] == {"map", "first-run", "results"}
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
             f"| x, HR@10 |{' 0.250 |' * 6}\n| x, NDCG@10 reversed, % |{' +0 |' * 5}  |"),
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
    lines = readme.first_run()
    assert lines[1] == "data synthetic | 1" and lines[3:-1] == [
        "step 2/2", "epoch 1 | v", "9 test sequences, 3", "HR@5", "beams 1", "  change, reversed 3",
        "popularity 6", "co-occurrence, newest item 7", "effect 9"]
