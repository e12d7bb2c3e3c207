"""support/titles.py and cetrec.load_recommender: a finished run for a live user."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import small_runs
from safetensors.numpy import load_file

import cetrec
from cetrec import load_recommender
from experiments import recommend
from lora import load_lora, merge_lora
from support.tiny import TINY_BASES
from support.titles import resolve_titles

CATALOGUE = ["Matrix, The (1999)", "Matrix Reloaded, The (2003)", "Heat (1995)", "Amélie (2001)",
             "American in Paris, An (1951)", "Postino, Il (1994)", "Toy Story (1995)",
             "Toy Story 2 (1999)", "Dusty Canyon", "Dusty Canyon 2", "Hamlet (1990)",
             "Hamlet (1996)", "Return of the Jedi (1983)"]


@pytest.mark.parametrize("typed, title", [
    ("Heat (1995)", "Heat (1995)"), ("heat (1995)", "Heat (1995)"), ("HEAT", "Heat (1995)"),
    (" heat ", "Heat (1995)"), ("The Matrix", "Matrix, The (1999)"),
    ("matrix, the", "Matrix, The (1999)"), ("the matrix reloaded", "Matrix Reloaded, The (2003)"),
    ("An American in Paris", "American in Paris, An (1951)"), ("il postino", "Postino, Il (1994)"),
    ("amelie", "Amélie (2001)"), ("AMELIE (2001)", "Amélie (2001)"),
    ("toy stroy", "Toy Story (1995)"),
    ("toy story", "Toy Story (1995)"), ("toy story 2", "Toy Story 2 (1999)"),
    ("Hamlet (1996)", "Hamlet (1996)"), ("dusty canyn", "Dusty Canyon"),
    ("dusty canyn 2", "Dusty Canyon 2"), ("jedi", "Return of the Jedi (1983)"),
])
def test_titles_typed_by_hand_find_their_item(typed, title, capsys):
    assert [CATALOGUE[item] for item in resolve_titles([typed], CATALOGUE)] == [title]
    said = capsys.readouterr().out
    assert said == ("" if typed == title else f"{typed!r} taken for {title}\n")


def test_titles_keep_their_order():
    assert resolve_titles(["heat", "the matrix", "dusty canyon 2"], CATALOGUE) == [2, 0, 9]


def test_a_title_may_repeat():
    assert resolve_titles(["Dusty Canyon", "Heat", "Dusty Canyon"], CATALOGUE) == [8, 2, 8]


def test_a_title_as_it_stands_is_never_ambiguous():
    assert resolve_titles(["Heat"], ["Heat (1995)", "Heat"]) == [1]
    assert resolve_titles(["HEAT"], ["Heat", "HEAT"]) == [1]


@pytest.mark.parametrize("typed, titles, found", [
    ("Star Wars", ["Star Maps (1997)", "Star Wars: Episode IV (1977)"], 1),
    ("Terminator 2", ["Terminator, The (1984)", "Terminator 2: Judgment Day (1991)"], 1),
    ("Godfather 2", ["Godfather, The (1972)", "Heat (1995)"], None),
    ("Alien 3", ["Alien (1979)"], None), ("Heat (1972)", ["Heat (1995)"], None)])
def test_whole_words_come_before_slips_and_a_number_is_no_slip(typed, titles, found):
    if found is None:
        with pytest.raises(ValueError, match="no title like it"):
            resolve_titles([typed], titles)
    else:
        assert resolve_titles([typed], titles) == [found]


def test_accents_do_not_matter_where_other_letters_do():
    """Without accents it is the title; with them, "Nandx" would be as near."""
    assert resolve_titles(["nandu"], ["Ñandú", "Nandx"]) == [0]


def test_an_article_in_front_goes_with_a_year():
    assert resolve_titles(["The Matrix (1999)"], CATALOGUE) == [0]


@pytest.mark.parametrize("typed, message", [
    ("hamlet", "'hamlet': which one? Hamlet (1990); Hamlet (1996)"),
    ("hamlt", "'hamlt': which one? Hamlet (1990); Hamlet (1996)"),
    ("canyon", "'canyon': which one? Dusty Canyon; Dusty Canyon 2"),
    ("e", "'e': which one? Matrix, The (1999); "), ("", "'': which one? "),
    ("qqqq", "'qqqq': no title like it among the 13 of the catalogue"),
])
def test_ambiguous_titles_are_listed_and_unknown_ones_named(typed, message):
    with pytest.raises(ValueError) as error:
        resolve_titles(["Heat", typed], CATALOGUE)
    assert str(error.value).startswith(message)
    assert str(error.value).count(";") <= 8


def test_eight_of_many_candidates_are_listed():
    with pytest.raises(ValueError, match=r"which one\? Book 0 of a life; .* 7 of a life; \.\.\.$"):
        resolve_titles(["life"], [f"Book {i} of a life" for i in range(12)])


# ------------------------------------------------------------ A finished run as a function


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs")
    with small_runs() as patch:
        patch.setitem(TINY_BASES, "synthetic", replace(
            TINY_BASES["synthetic"], pieces=768, num_hidden_layers=1))
        assert cetrec.main(["--limit-train", "64", "--eval-sequences", "5", "--max-steps", "2",
                            "--lists", "exact", "--out", str(out)]) == 0
    return out / "synthetic-rope-1"


def test_a_recommender_gives_the_titles_of_the_runs_own_evaluation(run, monkeypatch):
    """Its data are not read. Capitals do not matter."""
    arrays = load_file(run / "evaluation.safetensors")
    monkeypatch.setattr("support.runs.open_data", lambda options: pytest.fail("data were read"))
    recommender = load_recommender(run)
    titles = json.loads((run / "catalogue.json").read_text())["titles"]
    for history, ten in zip(arrays["history"], arrays["lists/all titles scored/original"]):
        typed = [titles[item].upper() for item in history if item >= 0]
        found = recommender(typed)
        assert [title for title, _ in found] == [titles[item] for item in ten]
        log_p = [p for _, p in found]
        assert log_p == sorted(log_p, reverse=True) and max(log_p) < 0


def test_the_newest_ten_titles_of_a_longer_history_count(run, capsys):
    recommender = load_recommender(str(run), device="cpu")
    titles = recommender.exact.catalogue.titles[:25]
    assert recommender(titles) == recommender(titles[-10:]) != recommender(titles[:10])
    with pytest.raises(ValueError, match="'Heat': wanted a list of titles"):
        recommender("Heat")
    with pytest.raises(ValueError, match="wanted a list of titles"):
        recommender([])
    assert recommend.main([str(run), *titles]) == 0
    printed = capsys.readouterr().out
    assert "the newest 10 of 25 titles count" in printed and f"{titles[15]} [k=9]" in printed


def swap_titles(run):
    path = run / "catalogue.json"
    catalogue = json.loads(path.read_text())
    catalogue["titles"][:2] = catalogue["titles"][1::-1]
    path.write_text(json.dumps(catalogue))


def change_options(run, **changes):
    record = json.loads((run / "run.json").read_text())
    record["options"] |= changes
    (run / "run.json").write_text(json.dumps(record))


def change_base(run):
    path = next(run.parent.glob("tiny-*")) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change, message", [
    (swap_titles, "the adapter was tuned with .* catalogue"),
    (change_base, "the adapter was tuned with .* base"),
    (lambda run: change_options(run, temporal="sinpe"), "temporal rope, .* has .* temporal sinpe"),
    (lambda run: change_options(run, index="time"), "its index is time"),
    (lambda run: (run / "temporal.json").unlink(), "temporal.json: not found"),
    (lambda run: (run / "catalogue.json").unlink(), "catalogue.json: not found"),
    (lambda run: (run / "run.json").unlink(), "a recommender wants the folder of a run")])
def test_what_does_not_go_together_is_refused(run, tmp_path, change, message):
    shutil.copytree(run.parent, tmp_path / "runs")
    mine = tmp_path / "runs" / run.name
    assert load_recommender(mine)(["Dusty Canyon"])
    change(mine)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_recommender(mine)


def test_an_adapter_of_the_plain_layout_is_the_runs(run):
    """The factors are those that lora.load_lora reads, and dropout is off."""
    model = load_recommender(run).exact.model
    assert not model.training
    tuned = {name: p.clone() for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
    for name in tuned:
        model.get_parameter(name).data.zero_()
    merge_lora(model)
    load_lora(model, run)
    assert tuned and all(torch.equal(model.get_parameter(name), p) for name, p in tuned.items())
