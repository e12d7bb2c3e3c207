"""experiments/: --recommend and --explain, runs compared, figures that show what they are given.

`python tests/test_experiments.py` writes explanation.txt anew: what --explain prints of a fixed
model. The tests after the golden one prove its numbers.
"""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TITLES

import cetrec
import evaluate
from cetrec import TemporalLlama, cetrec_loss, erase_order, load_adapter, main, twin_forward
from data import (IGNORE, NO_ITEM, SyntheticWorld, Tokenizer, collate, encode_example,
                  encode_examples, make_sequences, split_by_time)
from evaluate import METRICS, Decoding, Lists, Recommender, format_result
from experiments import figures
from experiments.look import explanation, resolve_titles, side_by_side
from experiments.report import Run, compare, paired_bootstrap, read_runs, write_report
from llama import load_llama

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("explanation.txt")
QUICK = ["--limit-train", "200", "--eval-sequences", "40", "--beams", "2", "--batch-size", "16"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are so small that a second thread costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread) -> Path:
    """A folder with a tiny base and four runs; its adapter has learned just enough for the worlds
    to differ.

    synthetic-rope-1 drew its figures if it could. "more" and "few" are its adapter, tested on 200
    and on 3 sequences instead of 40; "sets" is a run in a world where order means nothing.
    """
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cetrec.TINY_BASES, "synthetic", replace(
            cetrec.TINY_BASES["synthetic"], vocab_size=1_000, hidden_size=32, intermediate_size=64,
            max_sequences=1_024, batch_size=32, epochs=20, lr=3e-2, warmup=10))
        assert main([*QUICK, "--max-steps", "3", "--lr", "0.03", "--warmup", "0", "--out",
                     str(root)]) == 0
        patch.setattr(figures, "figures_available", lambda: False)
        for name, sequences in (("more", "200"), ("few", "3")):
            shutil.copytree(root / "synthetic-rope-1", root / name)
            assert main(["--eval-only", str(root / name), "--eval-sequences", sequences]) == 0
        assert main([*QUICK, "--order-strength", "0", "--model", str(next(root.glob("tiny-*"))),
                     "--max-steps", "1", "--lora-rank", "2", "--out", str(root)]) == 0
    (root / "synthetic-rope-2").rename(root / "sets")
    return root


@pytest.fixture(scope="module")
def run_folder(runs) -> Path:
    return runs / "synthetic-rope-1"


@pytest.fixture(scope="module")
def base(runs) -> Path:
    return next(runs.glob("tiny-*"))


@pytest.fixture(scope="module")
def adapter(runs, run_folder) -> Path:
    """The run's adapter alone, without the record of the run."""
    folder = runs / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "temporal.json"):
        shutil.copy(run_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def test_set():
    """Of the runs."""
    return split_by_time(make_sequences(SyntheticWorld().interactions()))[2]


@pytest.fixture(scope="module")
def open_base(base):
    """() -> the base; (adapter folder) -> the tuned model."""
    def build(folder: Path | None = None) -> TemporalLlama:
        model = TemporalLlama(load_llama(base), "rope", tokenizer=Tokenizer.from_folder(base))
        if folder:
            load_adapter(model, folder)
        return model.eval()
    return build


def error_line(capsys) -> str:
    """What stands on stderr, which is one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


# ----------------------------------------------------------------------------------------------
# By hand: full forward passes, k written out, log-probabilities from logits


@torch.no_grad()
def logits_by_hand(model, example, erased: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Logits before each answer token (M, V) and the answer tokens."""
    item_pos = [0 if erased and k != NO_ITEM else k for k in example.item_pos]
    logits = model.logits(model(torch.tensor([example.tokens]), torch.tensor([item_pos])))[0]
    answer = [i for i, label in enumerate(example.labels) if label != IGNORE]
    return logits[[i - 1 for i in answer]].double(), [example.tokens[i] for i in answer]


def log_p_by_hand(logits: torch.Tensor, targets: list[int]) -> np.ndarray:
    return np.array([float(row[t] - row.exp().sum().log()) for row, t in zip(logits, targets)])


@torch.no_grad()
def title_p_by_hand(model, history: list[str], titles: list[str], erased: bool) -> dict[str, float]:
    """Probability of every title after the history, each scored as prompt and answer."""
    batch = collate(encode_examples(model.tokenizer, [history] * len(titles), titles))
    k = batch.item_pos
    log_p = model.logits(model(batch.tokens, torch.where(k > 0, 0, k) if erased else k)
                         ).log_softmax(-1)
    taken = log_p.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
    return dict(zip(titles, (taken * (batch.labels != IGNORE)).sum(1).exp().tolist()))


ROW = re.compile(r"^ ?(\d+)  ([* ]) (.{34}) *(\S+) %   ([* ]) (.{34}) *(\S+) %$", re.M)


def printed_lists(text: str) -> list[dict[str, str]]:
    """Title -> per cent in the factual and in the erased world, as printed."""
    rows = ROW.findall(text)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [{row[at].strip(): row[at + 1] for row in rows} for at in (2, 5)]


def assert_best_titles(text: str, model, history: list[str], titles: list[str], length: int):
    """Both printed lists are the best titles outside the history, with their probabilities."""
    for erased, printed in zip((False, True), printed_lists(text)):
        p = title_p_by_hand(model, history, titles, erased)
        best = sorted((p[title] for title in titles if title not in history), reverse=True)
        assert [p[title] for title in printed] == pytest.approx(best[:length], rel=1e-4)
        for title, percent in printed.items():      # three decimals or one digit, as 8e-10
            last_place = 1e-3 if "." in percent else 10.0 ** int(percent[-3:])
            assert float(percent) == pytest.approx(100 * p[title], rel=0, abs=0.501 * last_place)


def printed_tokens(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the token table, (M, 5), and its last line."""
    table = text.split("token    ")[1].splitlines()[1:]
    end = next(i for i, line in enumerate(table) if line.startswith("sum  "))
    rows = np.array([[float(cell) for cell in line[28:].split()] for line in table[:end + 1]])
    return rows[:-1], rows[-1]


# ----------------------------------------------------------------------------------------------
# --explain on a fixed model

LAMBDA, ANSWER = 0.5, "Alien³ (1992)"
HISTORY = ["1984 (1984)", 'Say "Cheese", Amélie (2001)', "Heat", "Ran"]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+|e-\d+)")


@pytest.fixture
def fixed(temporal, tokenizer):
    """A model of fixed weights, one prompt with its answer, what is printed of them."""
    model, example = temporal(), encode_example(tokenizer, HISTORY, ANSWER)
    batch = collate([example])
    with torch.no_grad():
        worlds, losses = twin_forward(model, batch), cetrec_loss(model, batch, LAMBDA)
    return model, example, worlds, losses, explanation(tokenizer, example, *worlds, LAMBDA, losses)


def test_the_explanation_of_a_fixed_model_is_the_golden_one(fixed, tokenizer):
    """Numbers may differ in the third decimal, where another CPU rounds otherwise."""
    model, _, _, _, text = fixed
    history = [TITLES.index(title) for title in HISTORY]
    recommender = Recommender(model, TITLES, "movies", Decoding("exact"))
    lists = recommender([history]), recommender([history], [np.zeros(len(history))])
    one = encode_example(tokenizer, ["Ran"], "Heat", ages=[0.0])
    dated = encode_example(tokenizer, ["Ran", "Heat"], "Seven 7 Samurai (1954)",
                           ages=[2.25, 0.5])
    text += side_by_side(TITLES, *lists, 5, TITLES.index(ANSWER))
    assert_best_titles(text, model, HISTORY, TITLES, 5)
    for example in (one, dated):
        batch = collate([example])
        with torch.no_grad():
            text += "\n\n" + explanation(tokenizer, example, *twin_forward(model, batch), 0.0,
                                         cetrec_loss(model, batch, 0.0))
    if "CETREC_WRITE_EXPLANATION" in os.environ:
        GOLDEN.write_text(text, encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8")
    skeletons = [NUMBER.sub(lambda number: "#" * len(number[0]), t) for t in (text, golden)]
    assert skeletons[0] == skeletons[1]
    numbers = [[float(number) for number in NUMBER.findall(t)] for t in (text, golden)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=2e-3)


def test_token_log_probabilities_are_those_of_plain_forward_passes(fixed):
    model, example, _, _, text = fixed
    rows, total = printed_tokens(text)
    for column, erased in ((0, False), (1, True)):
        by_hand = log_p_by_hand(*logits_by_hand(model, example, erased))
        assert rows[:, column] == pytest.approx(by_hand, abs=1e-4)
        assert total[column] == pytest.approx(by_hand.sum(), abs=1e-4)
    assert abs(rows[:, 2]).max() > 0.01                         # the worlds do differ
    assert rows[:, 2] == pytest.approx(rows[:, 0] - rows[:, 1], abs=2e-4)
    assert total[2] == pytest.approx(total[0] - total[1], abs=2e-4)


def test_parts_of_the_losses_sum_to_the_losses(fixed):
    model, example, _, losses, text = fixed
    rows, total = printed_tokens(text)
    (factual, targets), (erased, _) = (logits_by_hand(model, example, world)
                                       for world in (False, True))
    M = len(targets)
    assert rows[:, 3] == pytest.approx(-log_p_by_hand(factual, targets) / M, abs=1e-4)
    assert rows[:, 4] == pytest.approx(-log_p_by_hand(factual - erased, targets) / M, abs=1e-4)
    loss, loss_ta, loss_ct = map(float, losses)
    for parts, sum_of_parts, wanted in zip(rows[:, 3:].T, total[3:], (loss_ta, loss_ct)):
        assert parts.sum() == pytest.approx(wanted, abs=1e-3)
        assert sum_of_parts == pytest.approx(wanted, abs=1e-4)
    told = re.search(r"L = L_TA \+ λ L_CT = (\S+) \+ 0.5 x (\S+) = (\S+)\n", text)
    assert [float(x) for x in told.groups()] == pytest.approx([loss_ta, loss_ct, loss], abs=1e-4)
    assert loss == pytest.approx(loss_ta + LAMBDA * loss_ct, abs=1e-5)


def test_the_erased_world_is_erase_order_and_the_tokens_named_are_those_it_moves(fixed):
    model, example, worlds, _, text = fixed
    item_pos = torch.tensor(example.item_pos)
    erased = torch.tensor([0 if k != NO_ITEM else NO_ITEM for k in example.item_pos])
    assert torch.equal(erase_order(item_pos), erased)
    torch.testing.assert_close(worlds[1], logits_by_hand(model, example, True)[0].float(),
                               rtol=1e-4, atol=1e-4)
    named = re.findall(r"^  tokens (\d+)\.\.(\d+): k = (\d+), erased 0 \| (.*)$", text, re.M)
    ranges = {range(int(a), int(b) + 1): int(k) for a, b, k, _ in named}
    assert {t: k for tokens, k in ranges.items() for t in tokens} == {
        t: k for t, k in enumerate(example.item_pos) if k > 0}
    assert sorted(ranges.values()) == [1, 2, 3]
    for (_, _, _, shown), title in zip(named, HISTORY):
        assert title in shown


def test_side_by_side_marks_the_answer_cuts_long_titles_and_leaves_gaps():
    titles = ["Heat", "x" * 34, "y" * 35]

    def lists(items, log_p):
        return Lists(np.array([items]), np.array([log_p]), np.zeros((1, 0), dtype=bool))
    text = side_by_side(titles, lists([2, 0, 1], np.log([0.5, 0.25, 4e-6])),
                        lists([1, 0, -1], [math.log(0.125), math.log(1.2e-5), math.nan]), 4, 0)
    assert text.splitlines()[1:] == [
        f" 1    {'y' * 33}…  50.000 %     {'x' * 34}  12.500 %",
        f" 2  * Heat{' ' * 30}  25.000 %   * Heat{' ' * 30}   0.001 %",
        f" 3    {'x' * 34}   4e-04 %", " 4", "* the answer: Heat"]


# ----------------------------------------------------------------------------------------------
# --explain and --recommend from the command line


def test_explain_shows_prompt_tokens_losses_and_five_titles_of_one_test_sequence(
        run_folder, open_base, test_set, capsys):
    assert main(["--explain", str(run_folder), "7"]) == 0
    text, model = capsys.readouterr().out, open_base(run_folder)
    history, answer = test_set.words(test_set.history(7)), test_set.titles[test_set.target(7)]
    assert f"test sequence 7 of {len(test_set)}\n" in text
    for k, title in enumerate(reversed(history)):
        assert f"⟨{title}⟩[k={k}, tokens " in text
    assert f'### Response:\n"{answer}"<|end_of_text|>\n' in text
    example = encode_example(model.tokenizer, history, answer)
    (factual, targets), (erased, _) = (logits_by_hand(model, example, world)
                                       for world in (False, True))
    log_f, log_cf, log_effect = (log_p_by_hand(logits, targets)
                                 for logits in (factual, erased, factual - erased))
    M = len(targets)
    rows, _ = printed_tokens(text)
    assert rows == pytest.approx(np.stack((log_f, log_cf, log_f - log_cf, -log_f / M,
                                           -log_effect / M), axis=1), abs=2e-4)
    told = re.search(r"L = L_TA \+ λ L_CT = (\S+) \+ 0.1 x (\S+) = (\S+)\n", text)
    loss_ta, loss_ct = -log_f.mean(), -log_effect.mean()
    assert [float(x) for x in told.groups()] == pytest.approx(
        [loss_ta, loss_ct, loss_ta + 0.1 * loss_ct], abs=2e-4)
    assert len(ROW.findall(text)) == 5 and f"* the answer: {answer}\n" in text
    assert_best_titles(text, model, history, test_set.titles, 5)


def test_explain_without_a_number_takes_the_first_sequence(run_folder, test_set, capsys):
    assert main(["--explain", str(run_folder), "--decode", "trie"]) == 0
    text = capsys.readouterr().out
    assert "test sequence 0 of 892" in text
    assert f"⟨{test_set.words(test_set.history(0))[-1]}⟩[k=0, " in text


def test_recommend_gives_the_ten_best_titles_of_both_worlds(run_folder, open_base, test_set,
                                                             capsys):
    history = ["Silent Orbit", "Dusty Canyon 2", "Dusty Canyon"]
    assert main(["--recommend", str(run_folder), *history[:2], "dusty canyn"]) == 0
    text = capsys.readouterr().out
    assert "'dusty canyn' taken for Dusty Canyon\n" in text and text.count("taken for") == 1
    assert ("history, oldest first: Silent Orbit [k=2], Dusty Canyon 2 [k=1], Dusty Canyon [k=0]\n"
            in text)
    assert len(ROW.findall(text)) == 10
    assert_best_titles(text, open_base(run_folder), history, test_set.titles, 10)
    factual, erased = printed_lists(text)
    assert factual != erased


def test_an_adapter_without_its_run_recommends_as_the_run_does(run_folder, adapter, base, capsys):
    titles = ["Silent Orbit", "Dusty Canyon"]
    assert main(["--recommend", str(run_folder), *titles]) == 0
    assert main(["--recommend", str(adapter), *titles, "--model", str(base), "--data",
                 "synthetic"]) == 0
    rows = ROW.findall(capsys.readouterr().out)
    assert len(rows) == 20 and rows[:10] == rows[10:]


def test_a_base_recommends_untuned(base, open_base, test_set, capsys):
    titles = ["Silent Orbit", "Dusty Canyon 3"]
    assert main(["--recommend", str(base), *titles, "--data", "synthetic"]) == 0
    text = capsys.readouterr().out
    assert len(ROW.findall(text)) == 10
    assert_best_titles(text, open_base(), titles, test_set.titles, 10)


def test_the_history_is_left_out_unless_it_shall_be_kept(run_folder, open_base, test_set, capsys):
    model, titles = open_base(run_folder), test_set.titles
    p = title_p_by_hand(model, ["Dusty Canyon"], titles, False)
    best = max(p, key=p.get)                # so likely that it is also among the ten after itself
    assert main(["--recommend", str(run_folder), best]) == 0
    assert not any(best in printed for printed in printed_lists(capsys.readouterr().out))
    assert main(["--recommend", str(run_folder), best, "--no-exclude-history"]) == 0
    assert all(best in printed for printed in printed_lists(capsys.readouterr().out))


CANYON = "Dusty Canyon"


@pytest.mark.parametrize("arguments, message", [
    (["--explain", "RUN", "892"], "test sequence '892'; wanted a number from 0 to 891"),
    (["--explain", "RUN", "-1"], "test sequence '-1'; wanted a number from 0 to 891"),
    (["--explain", "RUN", "seven"], "test sequence 'seven'; wanted a number"),
    (["--explain", "RUN", "1.0"], "test sequence '1.0'; wanted a number"),
    (["--explain", "RUN", "7", "8"], "--explain takes RUN and N; got 1 more"),
    (["--explain", "BASE", "7"], "run.json: not found; --explain wants the folder of a run"),
    (["--explain", "ADAPTER"], "run.json: not found; --explain wants the folder of a run"),
    (["--explain", "RUN", "--lr", "1"], "does not go with --lr"),
    (["--explain", "RUN", "--decode", "beams"], "use exact or trie"),
    (["--explain", "RUN", "--beams", "3"], "--beams goes with --decode beams or trie"),
    (["--explain", "RUN", "--recommend", "RUN"], "--recommend and --explain: one at a time"),
    (["--recommend", "RUN"], "0 titles; wanted 1 to 10, the newest last"),
    (["--recommend", "RUN", *[CANYON] * 11], "11 titles; wanted 1 to 10"),
    (["--recommend", "RUN", "Dusty"], "'Dusty': which one? Dusty Canyon; Dusty Canyon 2; "),
    (["--recommend", "RUN", CANYON, "xyzzy"], "'xyzzy': no title like it among the 300"),
    (["--recommend", "RUN", CANYON, "--lr", "1"], "does not go with --lr"),
    (["--recommend", "RUN", CANYON, "--data", "synthetic"], "does not go with --data"),
    (["--recommend", "RUN", CANYON, "--decode", "beams"], "use exact or trie"),
    (["--recommend", "RUN", CANYON, "--decode", "trie", "--beams", "3"], "3 beams on the trie"),
    (["--recommend", "BASE", CANYON], "not a run, so name the catalogue with --data"),
    (["--recommend", "BASE", CANYON, "--data", "synthetic", "--model", "BASE"],
     "neither a run nor an adapter, so --model does not go with it"),
    (["--recommend", "BASE", CANYON, "--data", "synthetic", "--epochs", "2"],
     "--recommend tunes nothing; it does not go with --epochs"),
    (["--recommend", "BASE", CANYON, "--data", "synthetic", "--decode", "beams"],
     "use exact or trie"),
    (["--recommend", "BASE", CANYON, "--data", "synthetic", "--index", "time"],
     "its index is time, and titles without dates have none"),
    (["--recommend", "nowhere", CANYON, "--data", "synthetic"], "nowhere/config.json: not found"),
    (["--recommend", "ADAPTER", CANYON], "not a run, so name the catalogue with --data"),
    (["--recommend", "ADAPTER", CANYON, "--data", "synthetic"],
     "an adapter, so name its base with --model"),
    (["--recommend", "ADAPTER", CANYON, "--data", "synthetic", "--model", "BASE", "--temporal",
      "sinpe"], "the adapter was tuned with base"),
])
def test_each_contradiction_is_one_line_and_status_2(runs, run_folder, base, adapter, capsys,
                                                     arguments, message, monkeypatch):
    monkeypatch.chdir(runs)
    places = {"RUN": str(run_folder), "BASE": str(base), "ADAPTER": str(adapter)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("name, content, message", [
    ("catalogue.json", None, "catalogue.json: not found; python cetrec.py --eval-only"),
    ("catalogue.json", "[]", "catalogue.json: not a run's catalogue"),
    ("catalogue.json", '{"domain": "movies"}', "catalogue.json: not a run's catalogue"),
    ("run.json", "{", "run.json: not the record of a run"),
    ("adapter_config.json", None, "adapter_config.json: not found"),
])
def test_a_damaged_run_is_named_by_the_file(run_folder, base, tmp_path, capsys, name, content,
                                            message):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / base.name).symlink_to(base)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert main(["--recommend", str(folder), CANYON]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("content, message", [
    (None, "temporal.json: not found"), ("{}", "temporal.json: not the settings of an adapter"),
    ("[1]", "temporal.json: not the settings of an adapter")])
def test_an_adapter_says_how_it_was_tuned(adapter, base, tmp_path, capsys, content, message):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "temporal.json").unlink()
    if content:
        (folder / "temporal.json").write_text(content)
    assert main(["--recommend", str(folder), CANYON, "--model", str(base), "--data",
                 "synthetic"]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("arguments", [["--explain", "3"], ["--recommend", CANYON]])
def test_an_interrupt_while_looking_is_status_130_without_a_traceback(run_folder, capsys, arguments,
                                                                      monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr("experiments.look.Recommender", interrupted)
    flag, argument = arguments
    assert main([flag, str(run_folder), argument]) == 130
    assert capsys.readouterr().err == "interrupted; files already written are whole\n"


# ----------------------------------------------------------------------------------------------
# Titles typed by hand

CATALOGUE = ["Matrix, The (1999)", "Matrix Reloaded, The (2003)", "Heat (1995)", "Amélie (2001)",
             "American in Paris, An (1951)", "Postino, Il (1994)", "Toy Story (1995)",
             "Toy Story 2 (1999)", "Dusty Canyon", "Dusty Canyon 2", "Hamlet (1990)",
             "Hamlet (1996)", "Return of the Jedi (1983)"]


@pytest.mark.parametrize("typed, title", [
    ("Heat (1995)", "Heat (1995)"), ("heat (1995)", "Heat (1995)"), ("HEAT", "Heat (1995)"),
    (" heat ", "Heat (1995)"), ("The Matrix", "Matrix, The (1999)"),
    ("matrix, the", "Matrix, The (1999)"), ("the matrix reloaded", "Matrix Reloaded, The (2003)"),
    ("An American in Paris", "American in Paris, An (1951)"), ("il postino", "Postino, Il (1994)"),
    ("amelie", "Amélie (2001)"), ("toy stroy", "Toy Story (1995)"),
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


# ----------------------------------------------------------------------------------------------
# Differences of runs


def test_paired_differences_by_hand():
    found = paired_bootstrap(np.array([0, 7, 20]), np.array([4, 3, 9]))
    gains = {"HR@5": 1 / 3, "HR@10": 1 / 3,
             "NDCG@5": (1 / math.log2(6) + 1 / math.log2(5) - 1) / 3,
             "NDCG@10": (1 / math.log2(6) + 1 / math.log2(5) + 1 / math.log2(11)
                         - 1 - 1 / math.log2(9)) / 3}
    assert found.keys() == METRICS.keys() == gains.keys()
    for name, (difference, low, high) in found.items():
        assert difference == pytest.approx(gains[name], abs=1e-12)
        assert low <= difference <= high


def test_intervals_are_those_of_paired_differences():
    """Most sequences gain nothing, so intervals of unpaired means would be three times as wide."""
    rng = np.random.default_rng(5)
    one = rng.integers(0, 15, 600)
    other = np.where(rng.random(600) < 0.1, rng.integers(0, 15, 600), one)
    for name, (difference, low, high) in paired_bootstrap(one, other).items():
        metric = METRICS[name]
        gains = metric(other) - metric(one)
        half = 1.96 * gains.std(ddof=1) / math.sqrt(600)
        unpaired = 1.96 * math.sqrt((metric(one).var() + metric(other).var()) / 600)
        assert difference == pytest.approx(metric(other).mean() - metric(one).mean(), abs=1e-12)
        assert (high - low) / 2 == pytest.approx(half, rel=0.15) and unpaired > 1.5 * half
        assert (high + low) / 2 == pytest.approx(difference, abs=0.15 * half)


def test_equal_runs_differ_by_nothing_and_the_bootstrap_is_seeded():
    rng = np.random.default_rng(6)
    one, other = rng.integers(0, 15, (2, 100))
    assert set(paired_bootstrap(one, one).values()) == {(0.0, 0.0, 0.0)}
    assert paired_bootstrap(one, other) == paired_bootstrap(one, other)
    again = paired_bootstrap(one, other, seed=1)
    assert again != paired_bootstrap(one, other)
    assert [v[0] for v in again.values()] == [v[0] for v in paired_bootstrap(one, other).values()]


def test_a_run_is_read_with_its_latest_evaluation(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(str(runs / "more"))
    assert (run.name, more.name) == ("synthetic-rope-1", "more")
    assert (run.result["n"], more.result["n"]) == (40, 200)
    assert run.result == json.loads((run_folder / "run.json").read_text())["metrics"]
    assert more.result == json.loads((runs / "more" / "eval.json").read_text())["metrics"]
    assert len(run.titles) == 300 and run.options["lambda_ct"] == 0.1
    assert [line["step"] for line in run.log] == [1, 2, 3, 3] and run.log == more.log
    assert len(run.arrays["history"]) == 40 and more.arrays["target"].shape == (200,)
    for order in ("original", "reversed", "shuffled"):
        row = run.result["rows"][f"{order} order"]
        for name, metric in METRICS.items():
            assert metric(run.arrays[f"ranks/{order}"]).mean() == pytest.approx(row[name][0])


@pytest.mark.parametrize("name, content, kind", [
    ("run.json", None, FileNotFoundError), ("catalogue.json", None, FileNotFoundError),
    ("evaluation.safetensors", None, FileNotFoundError), ("eval.json", b"{", ValueError),
    ("run.json", b"", ValueError), ("run.json", b"[]", ValueError),
    ("run.json", b'{"options": {}}', ValueError), ("run.json", b"\xff\xfe", ValueError),
    ("catalogue.json", b'"titles"', ValueError), ("catalogue.json", b"{}", ValueError),
    ("log.jsonl", b'{"step": 1}\n{"st', ValueError),
    ("evaluation.safetensors", b"not\nthis", ValueError),
    ("evaluation.safetensors", "half", ValueError),
])
def test_a_missing_or_damaged_file_of_a_run_is_named_in_one_line(run_folder, tmp_path, capsys, name,
                                                                 content, kind):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    whole = (folder / name).read_bytes() if (folder / name).exists() else b""
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    with pytest.raises(kind) as error:
        Run.from_folder(folder)
    assert str(error.value).startswith(f"{folder / name}: ") and "\n" not in str(error.value)
    lost = name == "log.jsonl" or name == "run.json" and content in (b"", b"[]", b"\xff\xfe")
    assert ("tune again" if lost else "--eval-only") in str(error.value)
    assert evaluate.main([str(folder)]) == 2
    assert f"{folder / name}: " in error_line(capsys)


def test_arrays_of_another_evaluation_are_refused(runs, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    shutil.copy(runs / "more" / "evaluation.safetensors", folder)
    with pytest.raises(ValueError, match="evaluation.safetensors: .*not of the same evaluation"):
        Run.from_folder(folder)


def test_a_run_without_a_log_is_read(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "log.jsonl").unlink()
    assert Run.from_folder(folder).log == []


def test_only_common_sequences_are_paired(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    common = sorted(set(run.arrays["sequence"].tolist()) & set(more.arrays["sequence"].tolist()))
    assert 0 < len(common) < 40
    rank = {r.name: dict(zip(r.arrays["sequence"].tolist(), ranks)) for r, ranks in (
        (run, np.arange(40) * 5 % 12), (more, np.arange(200) % 4))}
    run, more = (replace(r, arrays=r.arrays | {"ranks/original": np.array(list(
        rank[r.name].values()))}) for r in (run, more))
    text = compare([run, more])
    assert (f"more minus synthetic-rope-1 on the same {len(common)} test sequences, with the 95 % "
            "interval") in text
    told = {name: float(value) for name, value in re.findall(r"^  (\S+) +([+-]\d\.\d+)  \[", text,
                                                              re.M)}
    for name, metric in METRICS.items():
        here, there = (np.array([rank[r.name][s] for s in common]) for r in (run, more))
        assert told[name] == pytest.approx(float(np.mean(metric(there) - metric(here))), abs=6e-5)
    assert abs(told["HR@5"]) > 0.01


def test_a_comparison_names_protocols_once_if_they_are_one(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    text = compare([run, replace(run, name="twin")])
    assert text.startswith(f"{run.result['protocol']}\n\n") and text.count("test: 40") == 1
    assert "synthetic-rope-1, rope, λ = 0.1 " in text and "twin, rope, λ = 0.1 " in text
    assert text.count("+0.0000  [+0.0000, +0.0000]") == 4
    assert compare([run, more]).startswith(
        f"synthetic-rope-1 | {run.result['protocol']}\nmore | {more.result['protocol']}\n\n")


def test_runs_of_other_data_or_without_common_sequences_are_refused(runs, run_folder, capsys):
    with pytest.raises(ValueError, match="sets was tested on other data than synthetic-rope-1"):
        compare([Run.from_folder(run_folder), Run.from_folder(runs / "sets")])
    run, few = Run.from_folder(run_folder), Run.from_folder(runs / "few")
    assert not set(run.arrays["sequence"]) & set(few.arrays["sequence"])
    with pytest.raises(ValueError, match="few shares no test sequence with synthetic-rope-1; .*"
                                         "--eval-sequences 0"):
        compare([run, few])
    assert evaluate.main([str(run_folder), str(runs / "sets")]) == 2
    assert "other data" in error_line(capsys)


# ----------------------------------------------------------------------------------------------
# python evaluate.py RUN [RUN ...]


class Page(HTMLParser):
    """Tags, sources, texts of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.text, self.inside = Counter(), [], {}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.links += [value for name, value in attributes if name in (
            "src", "href", "srcset", "data", "poster", "action", "background")]
        if tag not in ("meta", "img"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside:
            self.text.setdefault(self.inside[-1], []).append(data)


@pytest.fixture
def draw():
    """The drawing functions, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    return figures


@pytest.fixture(scope="module")
def compared(runs, run_folder):
    """A comparison of two runs by the command, in its default place."""
    pytest.importorskip("matplotlib")
    assert evaluate.main([str(run_folder), str(runs / "more"), "--user", "3"]) == 0
    return runs / "comparison"


def test_one_run_is_printed_and_reported_in_its_own_folder(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    folder = run_folder.with_name("copied")
    shutil.copytree(run_folder, folder)
    (folder / "report.html").unlink()
    assert evaluate.main([str(folder)]) == 0
    table = format_result(Run.from_folder(folder).result)
    text = capsys.readouterr().out
    assert text.startswith(f"{table}\n") and "original order " in table
    assert f"report {folder}/report.html" in text
    page = Page(folder / "report.html")
    assert page.text["h1"] == ["copied"] and "".join(page.text["pre"]) == table


def test_several_runs_are_compared_in_a_folder_beside_the_first(runs, compared, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    page = Page(compared / "report.html")
    assert page.text["h1"] == ["synthetic-rope-1, more"]
    assert page.text["h2"] == ["comparison", "synthetic-rope-1", "more"]
    assert page.text["pre"] == [compare([run, more]), format_result(run.result),
                                format_result(more.result)]


def test_out_and_user_choose_folder_and_case(runs, run_folder, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "figures_available", lambda: True)
    for name in ("training_curves", "order_bars", "lambda_curve", "temporal_picture"):
        monkeypatch.setattr(figures, name, lambda runs: None)
    monkeypatch.setattr(figures, "case_study", lambda runs, user: seen.append(user))
    assert evaluate.main([str(run_folder), "--user", "7", "--out", str(tmp_path / "a" / "b")]) == 0
    assert seen == [7] and [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["report.html"]
    assert f"report {tmp_path}/a/b/report.html | 0 figures beside it\n" in capsys.readouterr().out


@pytest.mark.parametrize("user", ["40", "-1"])
def test_a_user_out_of_range_is_one_line(run_folder, tmp_path, capsys, user, draw):
    assert evaluate.main([str(run_folder), "--user", user, "--out", str(tmp_path)]) == 2
    assert (f"--user is {user}; synthetic-rope-1 was tested on sequences 0 to 39"
            in error_line(capsys))
    assert not list(tmp_path.iterdir())


def test_a_report_can_be_written_without_matplotlib(runs, run_folder, tmp_path, capsys,
                                                    monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not figures.figures_available()
    monkeypatch.undo()
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    assert evaluate.main([str(run_folder), str(runs / "more"), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(compare([Run.from_folder(run_folder),
                                            Run.from_folder(runs / "more")]) + "\n")
    assert captured.out.endswith(f"report {tmp_path}/report.html | 0 figures beside it | no "
                                 "figures: they want matplotlib; pip install matplotlib\n")
    assert captured.err == "" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    page = Page(tmp_path / "report.html")
    assert page.tags["pre"] == 3 and page.tags["img"] == 0
    assert page.text["p"] == ["no figures: they want matplotlib; pip install matplotlib"]


def test_every_figure_is_a_png_and_an_svg_beside_the_page(compared):
    names = {"training", "order", "temporal-synthetic-rope-1", "temporal-more", "case"}
    assert {p.name for p in compared.iterdir()} == {"report.html"} | {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        assert (compared / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (compared / f"{name}.png").stat().st_size > 5_000
        assert len(list(ET.parse(compared / f"{name}.svg").getroot().iter())) > 50


def test_the_page_holds_its_figures_and_loads_nothing(compared):
    text = (compared / "report.html").read_text(encoding="utf-8")
    page = Page(compared / "report.html")
    assert not {"script", "link", "iframe", "object", "embed", "base"} & page.tags.keys()
    prefix = "data:image/svg+xml;base64,"
    assert len(page.links) == page.tags["img"] == 5
    assert all(link.startswith(prefix) for link in page.links)
    bare = re.sub(rf"{re.escape(prefix)}[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import", bare)
    drawings = [base64.b64decode(link.removeprefix(prefix)) for link in page.links]
    assert sorted(drawings) == sorted(p.read_bytes() for p in compared.glob("*.svg"))
    for drawing in drawings:
        for element in ET.fromstring(drawing).iter():
            for name, value in element.attrib.items():
                assert not name.endswith(("href", "src")) or value.startswith(("#", "data:"))
                assert "url(" not in value or "url(#" in value
    assert page.text["figcaption"][-1] == "Case study (Fig. 5): test sequence 3"


def test_the_page_shows_markup_as_text(tmp_path):
    shown = "a <b>b</b> & c", "<i>", "<u>1</u> &lt; 2", "<script>x</script>"
    figures.write_page(tmp_path, shown[0], [shown[1:3]], [], shown[3:])
    page = Page(tmp_path / "report.html")
    assert not {"b", "i", "u", "script"} & page.tags.keys()
    assert tuple("".join(page.text[tag]) for tag in ("h1", "h2", "pre", "p")) == shown
    assert page.text["title"] == [shown[0]]


@pytest.mark.parametrize("name, title", [("at$5_^$6", "Heat"), ("run", "A$AP_^ Ke$ha")])
def test_dollars_in_names_and_titles_are_dollars(run_folder, tmp_path, draw, name, title):
    run = Run.from_folder(run_folder)
    titles = [title] * len(run.result["history_titles"])
    write_report([replace(run, name=name, result=run.result | {"history_titles": titles})],
                 tmp_path)


def test_runs_of_one_name_each_have_their_picture(run_folder, tmp_path, draw):
    text = write_report(read_runs([run_folder, run_folder]), tmp_path)
    assert f"| {len(list(tmp_path.glob('*.svg')))} figures" in text


def test_the_same_figures_are_the_same_bytes(run_folder, tmp_path, draw):
    """The first were drawn when the run ended."""
    assert evaluate.main([str(run_folder), "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.glob("*.svg"))
    assert len(files) == 4
    for path in files:
        assert path.read_bytes() == (run_folder / path.name).read_bytes(), path.name
    assert (tmp_path / "report.html").read_bytes() == (run_folder / "report.html").read_bytes()


def test_the_command_itself_compares_and_fails_without_a_traceback(runs, run_folder, tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)],
                              capture_output=True, text=True, cwd=runs)
    done = command(run_folder, run_folder, "--out", tmp_path / "report")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("+0.0000  [+0.0000, +0.0000]") == 4
    assert (tmp_path / "report" / "report.html").is_file()
    done = command(run_folder, "nowhere")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere/run.json: not found; wanted the folder of a")


# ----------------------------------------------------------------------------------------------
# Figures show the data they are given


@pytest.fixture
def run(run_folder) -> Run:
    return Run.from_folder(run_folder)


def with_scores(run: Run, name: str, start: float, **options) -> Run:
    """The run with metrics that are all different, of an order and between orders."""
    rows = {f"{order} order": {metric: (start + 0.1 * i + 0.02 * j, 0.001 * (1 + i + j))
                               for j, metric in enumerate(METRICS)}
            for i, order in enumerate(("original", "reversed", "shuffled"))}
    return replace(run, name=name, options=run.options | options,
                   result=run.result | {"rows": rows})


def test_order_bars_are_as_high_as_the_metrics(run, draw):
    from matplotlib.container import BarContainer
    shown = [with_scores(run, "a", 0.1), with_scores(run, "b", 0.3, lambda_ct=2.0)]
    fig = draw.order_bars(shown)
    assert len(fig.axes) == 2
    for ax, one in zip(fig.axes, shown):
        assert one.name in ax.get_title() and f"λ = {one.options['lambda_ct']:g}" in ax.get_title()
        assert [label.get_text() for label in ax.get_xticklabels()] == list(METRICS)
        bars = [group for group in ax.containers if isinstance(group, BarContainer)]
        assert [group.get_label() for group in bars] == [
            "original order", "reversed order", "shuffled order"]
        for group in bars:
            wanted = one.result["rows"][group.get_label()].values()
            assert [bar.get_height() for bar in group] == [mean for mean, _ in wanted]
            (segments,) = group.errorbar.lines[2]
            ends = [(segment[0, 1], segment[1, 1]) for segment in segments.get_segments()]
            assert np.array(ends) == pytest.approx(np.array([(m - e, m + e) for m, e in wanted]))
        tops = [bar.get_height() for group in bars for bar in group]
        assert max(tops) < ax.get_ylim()[1]


def lines_of(ax, **wanted) -> list[np.ndarray]:
    """(n, 2) points of the lines with these properties."""
    return [np.asarray(line.get_xydata(), dtype=float) for line in ax.lines
            if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())]


def test_training_curves_are_the_log(run, run_folder, draw):
    """With three steps the smoothed line is the line itself."""
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    (ax,) = draw.training_curves([run]).axes
    for raw, smooth, key in zip(lines_of(ax, alpha=0.2), lines_of(ax, linewidth=1.8),
                                ("loss_ta", "loss_ct"), strict=True):
        assert raw.tolist() == [[line["step"], line[key]] for line in log[:3]]
        assert smooth == pytest.approx(raw)
    assert lines_of(ax, label="validation $L_{TA}$")[0].tolist() == [[3, log[3]["validation_ta"]]]
    (agree,) = lines_of(ax, label="ln V: the worlds agree")
    assert agree[:, 1] == pytest.approx(math.log(run.result["vocabulary"]))


def test_training_curves_are_smoothed_over_a_fiftieth(run, draw):
    values = (5 + np.random.default_rng(0).random(150)).tolist()
    log = [{"step": i + 1, "loss_ta": value, "loss_ct": None} for i, value in enumerate(values)]
    (ax,) = draw.training_curves([replace(run, log=log)]).axes
    (raw,), (smooth,) = lines_of(ax, alpha=0.2), lines_of(ax, linewidth=1.8)
    assert raw[:, 1].tolist() == values
    assert smooth == pytest.approx(np.array([(i + 3, sum(values[i:i + 3]) / 3)
                                             for i in range(148)]))
    assert not lines_of(ax, label="ln V: the worlds agree")         # λ = 0: there is no L_CT
    assert draw.training_curves([replace(run, log=[])]) is None


def test_the_lambda_curve_wants_two_lambdas_and_shows_each_run(run, draw):
    one = with_scores(run, "a", 0.1, lambda_ct=0.5)
    assert draw.lambda_curve([one, replace(one, name="b")]) is None
    shown = [one, with_scores(run, "b", 0.2, lambda_ct=0.0),
             with_scores(run, "c", 0.4, lambda_ct=0.5),
             with_scores(run, "d", 0.5, lambda_ct=0.5, temporal="sinpe")]
    fig = draw.lambda_curve(shown)
    for ax, metric in zip(fig.axes, ("HR@5", "HR@10"), strict=True):
        high = {r.name: r.result["rows"]["original order"][metric] for r in shown}
        curves = lines_of(ax, linestyle="-")
        assert curves[0] == pytest.approx(np.array([(0, high["b"][0]), (
            0.5, (high["a"][0] + high["c"][0]) / 2)]))
        assert curves[1].tolist() == [[0.5, high["d"][0]]]
        points = {mark: [tuple(p[0]) for p in lines_of(ax, marker=mark)] for mark in "os"}
        assert points == {"o": [(0.0, high["b"][0]), (0.5, high["a"][0]), (0.5, high["c"][0])],
                          "s": [(0.5, high["d"][0])]}
        errors = [bar.lines[2][0].get_segments()[0][:, 1] for bar in ax.containers]
        assert np.array(errors) == pytest.approx(np.array([
            (high[name][0] - high[name][1], high[name][0] + high[name][1]) for name in "bacd"]))
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rope", "sinpe"]
        assert metric in ax.get_ylabel()


def test_the_temporal_picture_shows_sines_then_cosines_and_the_erased_rows_alike(run, draw):
    pictures = draw.temporal_picture(run).axes[:2]
    k, width = run.arrays["temporal/k"], run.arrays["temporal/factual"].shape[1]
    assert k.tolist() == list(range(len(k) - 1, -1, -1)) and width == 32
    angles = k[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in pictures]
    assert images[0] == pytest.approx(np.concatenate((np.sin(angles), np.cos(angles)), axis=1),
                                      abs=1e-6)
    assert (images[1] == [0] * 16 + [1] * 16).all() and images[1].shape == images[0].shape
    for ax, image, name in zip(pictures, images, ("factual", "erased")):
        values = run.arrays[f"temporal/{name}"]
        assert ax.get_title() == f"{name} world"
        assert (image[:, :16] == values[:, 0::2]).all() and (image[:, 16:] == values[:, 1::2]).all()
    labels = [label.get_text() for label in pictures[0].get_yticklabels()]
    assert labels == [f"{title}  k = {x:g}" for title, x in zip(run.result["history_titles"], k)]
    plain = {name: array for name, array in run.arrays.items() if not name.startswith("temporal/")}
    assert draw.temporal_picture(replace(run, arrays=plain)) is None


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_case_study_names_history_answer_and_twenty_titles(run, draw):
    user, arrays = 5, {name: array.copy() for name, array in run.arrays.items()}
    answer = int(arrays["target"][user])
    arrays["lists/original"][user, 3] = answer
    arrays["lists/reversed"][user, 9] = -1                  # a catalogue used up
    left, right = draw.case_study([replace(run, arrays=arrays)], user).axes
    history = [run.titles[item] for item in arrays["history"][user] if item >= 0]
    n = len(history)
    assert texts(left) == ["history, oldest first", *(
        f"{title}  [k = {n - 1 - i}]" for i, title in enumerate(history)),
        f"▶ {run.titles[answer]}"]
    wanted = ["synthetic-rope-1 | rope, λ = 0.1"]
    for order in ("original", "reversed"):
        wanted.append(f"{order} history")
        for rank, item in enumerate(arrays[f"lists/{order}"][user].tolist()):
            if item >= 0:
                mark = " ◀" if item == answer else ""
                wanted += [str(rank + 1), f"{run.titles[item]}{mark}"]
    assert texts(right) == wanted and sum("◀" in text for text in texts(right)) >= 1
    bold = [text.get_text() for text in right.texts if text.get_weight() == "bold"]
    assert f"{run.titles[answer]} ◀" in bold


def test_the_case_study_follows_the_sequence_from_run_to_run(runs, run, draw):
    more, few = Run.from_folder(runs / "more"), Run.from_folder(runs / "few")
    more = replace(more, arrays=more.arrays | {     # lists as different as can be
        f"lists/{order}": (start + np.arange(200)[:, None] + 7 * np.arange(10)) % 300
        for order, start in (("original", 0), ("reversed", 100))})
    here, there = (r.arrays["sequence"].tolist() for r in (run, more))
    user = next(i for i, sequence in enumerate(here) if sequence in there)
    panels = [texts(ax) for ax in draw.case_study([run, more, few], user).axes]
    second, third = (next(panel for panel in panels if panel[:1] == [f"{name} | rope, λ = 0.1"])
                     for name in ("more", "few"))
    place, answer = there.index(here[user]), int(run.arrays["target"][user])
    assert place != user
    for order in ("original", "reversed"):
        for item in more.arrays[f"lists/{order}"][place].tolist():
            assert f"{run.titles[item]}{' ◀' if item == answer else ''}" in second
    assert third[1:] == ["not among this run's test sequences"]
    for wrong in (-1, 40):
        with pytest.raises(ValueError, match=f"--user is {wrong}; .* sequences 0 to 39"):
            write_report([run], runs / "nowhere", wrong)
    assert not (runs / "nowhere").exists()


def test_the_case_study_has_no_steps_where_k_is_an_age(run, draw):
    dated = replace(run, options=run.options | {"index": "time"})
    assert not any("[k" in text for text in texts(draw.case_study([dated], 0).axes[0]))


if __name__ == "__main__":
    os.environ["CETREC_WRITE_EXPLANATION"] = "1"
    sys.exit(pytest.main([__file__, "-q", "-k", "golden"]))
