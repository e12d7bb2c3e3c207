"""experiments/: explain, recommend, report, and figures that show what they are given.

`python tests/test_experiments.py` writes explanation.txt anew: what is explained of a fixed model.
The tests after the golden one prove its numbers.
"""

import base64
import datetime
import json
import math
import os
import re
import runpy
import shutil
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
from cetrec import TemporalLlama, cetrec_loss, erase_order, twin_forward
from data import (IGNORE, NO_ITEM, Catalogue, Tokenizer, collate, encode_example, make_sequences,
                  split_by_time)
from evaluate import METRICS, Lists
from experiments import explain, figures, recommend, report
from experiments.explain import explanation
from experiments.markup import as_html, as_text, h, scores, table
from experiments.report import (Run, agreement, compare, describe, differing, on_common, paired,
                                paired_bootstrap, read_runs)
from experiments.recommend import side_by_side
from llama import load_llama
from lora import load_lora
from support.counting import format_table
from support.checkpoints import read_tokenizer
from support.synthetic import SyntheticWorld
from support.tiny import TINY_BASES
from support.trie import ExactTitles

GOLDEN = Path(__file__).with_name("explanation.txt")
QUICK = ["--limit-train", "800", "--eval-sequences", "40", "--beams", "2", "--batch-size", "16"]


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    """A world of few users, so that data are at hand at once; and tensors so small that a second
    thread would cost time."""
    threads, draw = torch.get_num_threads(), SyntheticWorld.interactions
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticWorld, "interactions",
                      lambda world, users=1_000, seed=0: draw(world, users, seed))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_and_quick) -> Path:
    """A folder with a tiny base, which knows its titles, and four runs.

    "more" and "few" are the adapter of synthetic-rope-1, evaluated again on 60 and on 3 sequences
    instead of 40, "more" with every title scored; "few" has no other evaluation. "sets" is a run in
    a world where order means nothing.
    """
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_BASES, "synthetic", replace(
            TINY_BASES["synthetic"], pieces=1_000, hidden_size=32, intermediate_size=64,
            max_sequences=800, batch_size=16, epochs=20, lr=1e-2, warmup=10))
        assert cetrec.main([*QUICK, "--max-steps", "3", "--lr", "0.003", "--warmup", "0", "--out",
                            str(root)]) == 0
        for name, sequences, lists in (("more", "60", "exact,beams"), ("few", "3", "beams")):
            shutil.copytree(root / "synthetic-rope-1", root / name)
            assert cetrec.main(["--eval-only", str(root / name), "--eval-sequences", sequences,
                                "--lists", lists]) == 0
        for name in ("run.json", "evaluation.safetensors"):
            source = {"run.json": "eval.json"}.get(name, f"eval-{name}")
            (root / "few" / source).rename(root / "few" / name)
        assert cetrec.main([*QUICK, "--order-strength", "0", "--model",
                            str(next(root.glob("tiny-*"))), "--max-steps", "1", "--lora-rank", "2",
                            "--lists", "beams", "--out", str(root)]) == 0
    (root / "synthetic-rope-2").rename(root / "sets")
    return root


@pytest.fixture(scope="module")
def run_folder(runs) -> Path:
    return runs / "synthetic-rope-1"


@pytest.fixture(scope="module")
def base(runs) -> Path:
    return next(runs.glob("tiny-*"))


@pytest.fixture(scope="module")
def whole_test_set(small_and_quick):
    """The test split of the runs."""
    return split_by_time(make_sequences(SyntheticWorld().interactions()))[2]


@pytest.fixture(scope="module")
def test_set(whole_test_set):
    """The test sequences that synthetic-rope-1 was evaluated on."""
    return whole_test_set.sample(40, 0)


@pytest.fixture(scope="module")
def tuned(base, run_folder) -> tuple[TemporalLlama, Tokenizer]:
    """The model that the run tuned, and its tokenizer."""
    llama = load_llama(base)
    load_lora(llama, run_folder)
    return TemporalLlama(llama, "rope").eval(), read_tokenizer(base)


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
    hidden, _ = model(torch.tensor([example.tokens]), torch.tensor([item_pos]))
    logits = model.logits(hidden)[0]
    answer = [i for i, label in enumerate(example.labels) if label != IGNORE]
    return logits[[i - 1 for i in answer]].double(), [example.tokens[i] for i in answer]


def log_p_by_hand(logits: torch.Tensor, targets: list[int]) -> np.ndarray:
    return np.array([float(row[t] - row.exp().sum().log()) for row, t in zip(logits, targets)])


@torch.no_grad()
def title_p_by_hand(model, tokenizer, history: list[str], titles: list[str],
                    erased: bool) -> dict[str, float]:
    """Probability of every title after the history, each scored as prompt and answer.

    Pads stand behind the answers, where no token looks at them.
    """
    examples = tokenizer.examples([history] * len(titles), titles)
    T = max(len(e.tokens) for e in examples)
    tokens, k, labels = (
        torch.tensor([row + [fill] * (T - len(row)) for row in rows]) for fill, rows in (
            (0, [e.tokens for e in examples]), (NO_ITEM, [e.item_pos for e in examples]),
            (IGNORE, [e.labels for e in examples])))
    hidden, _ = model(tokens, torch.where(k > 0, 0, k) if erased else k)
    log_p, following = model.logits(hidden)[:, :-1].log_softmax(-1), labels[:, 1:]
    of_answer = log_p.gather(2, following.clamp(min=0)[..., None])[..., 0]
    return dict(zip(titles, (of_answer * (following != IGNORE)).sum(1).exp().tolist()))


ROW = re.compile(r"^ ?(\d+)  ([* ]) (.{34}) *(\S+) %   ([* ]) (.{34}) *(\S+) %$", re.M)


def printed_lists(text: str) -> list[dict[str, str]]:
    """Title -> per cent in the factual and in the erased world, as printed."""
    rows = ROW.findall(text)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [{row[at].strip(): row[at + 1] for row in rows} for at in (2, 5)]


def assert_best_titles(text: str, model, tokenizer, history: list[str], titles: list[str],
                       length: int):
    """Both printed lists are the best titles outside the history, with their probabilities."""
    for erased, printed in zip((False, True), printed_lists(text)):
        p = title_p_by_hand(model, tokenizer, history, titles, erased)
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
# The explanation of a fixed model

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
    recommender = ExactTitles(model, Catalogue(TITLES, "movies", tokenizer))
    lists = recommender([history]), recommender([history], [np.zeros(len(history))])
    one = encode_example(tokenizer, ["Ran"], "Heat", ages=np.array([0.0]))
    dated = encode_example(tokenizer, ["Ran", "Heat"], "Seven 7 Samurai (1954)",
                           ages=np.array([2.25, 0.5]))
    text += side_by_side(TITLES, *lists, 5, TITLES.index(ANSWER))
    assert_best_titles(text, model, tokenizer, HISTORY, TITLES, 5)
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
# explain and recommend as commands


def test_explain_shows_prompt_tokens_losses_and_five_titles_of_one_test_sequence(
        run_folder, tuned, test_set, capsys):
    assert explain.main([str(run_folder), "7"]) == 0
    text, (model, tokenizer) = capsys.readouterr().out, tuned
    history, answer = test_set.titles_of(test_set.history(7)), test_set.titles[test_set.target(7)]
    assert "test sequence 7 of the 40 of the evaluation\n" in text
    for k, title in enumerate(reversed(history)):
        assert f"⟨{title}⟩[k={k}, tokens " in text
    assert f'### Response:\n"{answer}"<|end of text|>\n' in text
    example = encode_example(tokenizer, history, answer)
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
    assert_best_titles(text, *tuned, history, test_set.titles, 5)
    assert explain.main([str(run_folder), "7", "--no-exclude-history"]) == 0
    kept, p = capsys.readouterr().out, title_p_by_hand(*tuned, history, test_set.titles, False)
    assert list(printed_lists(kept)[0]) == sorted(p, key=p.get, reverse=True)[:5]


def test_sequences_are_counted_as_in_the_report_and_are_more_by_a_flag(run_folder, test_set,
                                                                       whole_test_set, capsys):
    """Without a number the first one is explained."""
    run = Run.from_folder(run_folder)
    for flags, sequences in (([], test_set), (["--eval-sequences", "0"], whole_test_set)):
        assert explain.main([str(run_folder), *flags]) == 0
        text = capsys.readouterr().out
        assert f"test sequence 0 of the {len(sequences)} of the evaluation\n" in text
        assert f"⟨{sequences.titles_of(sequences.history(0))[-1]}⟩[k=0, " in text
        assert f"* the answer: {sequences.titles[sequences.target(0)]}\n" in text
    assert run.titles[run.arrays["target"][0]] == test_set.titles[test_set.target(0)]


def test_a_run_by_the_clock_is_explained_with_its_ages(tmp_path, base, capsys, monkeypatch):
    mine, days = tmp_path / "mine", [t * t // 3 for t in range(9)]          # alike for all users
    mine.mkdir()
    (mine / "items.csv").write_text("item,title\n" + "".join(f"{i},Song {i}\n" for i in range(20)))
    (mine / "interactions.csv").write_text("user,item,timestamp\n" + "".join(
        f"u{u},{(3 * u + 7 * t) % 20},2020-01-{1 + day:02}\n"
        for u in range(12) for t, day in enumerate(days)))
    assert cetrec.main(["--data", str(mine), "--domain", "artists", "--index", "time", "--model",
                        str(base), "--lora-rank", "2", "--max-steps", "1", "--lists", "beams",
                        "--beams", "1", "--out", str(tmp_path)]) == 0
    given = []

    class Watched(ExactTitles):
        def __call__(self, histories, ages=None):
            given.append(ages[0].tolist())
            return super().__call__(histories, ages)
    monkeypatch.setattr(explain, "ExactTitles", Watched)
    capsys.readouterr()
    assert explain.main([str(tmp_path / "mine-rope-1"), "3"]) == 0
    text = capsys.readouterr().out
    shown = [float(k) for k in re.findall(r"⟨Song \d+⟩\[k=([\d.]+), tokens", text)]
    n = len(shown)
    ages = [math.log2(1 + days[n] - day) for day in days[:n]]
    assert n >= 3 and shown == pytest.approx(ages, rel=5e-3)
    factual, erased = given
    assert factual == pytest.approx(ages) and erased == [0.0] * n
    assert recommend.main([str(tmp_path / "mine-rope-1"), "Song 3"]) == 2
    assert "its index is time, and titles without dates have none" in error_line(capsys)


CANYON = "Dusty Canyon"


def test_recommend_gives_the_ten_best_titles_of_both_worlds(run_folder, tuned, test_set, capsys):
    history = ["Silent Orbit", "Dusty Canyon 2", CANYON]
    assert recommend.main([str(run_folder), *history[:2], "dusty canyn"]) == 0
    text = capsys.readouterr().out
    assert "'dusty canyn' taken for Dusty Canyon\n" in text and text.count("taken for") == 1
    assert ("history, oldest first: Silent Orbit [k=2], Dusty Canyon 2 [k=1], Dusty Canyon [k=0]\n"
            in text)
    assert len(ROW.findall(text)) == 10
    assert_best_titles(text, *tuned, history, test_set.titles, 10)
    factual, erased = printed_lists(text)
    assert any(factual[title] != erased.get(title) for title in factual)


def test_titles_may_stand_between_and_behind_flags(run_folder, capsys):
    assert recommend.main([str(run_folder), "--device", "cpu", CANYON, "--no-exclude-history",
                           "Silent Orbit"]) == 0
    text = capsys.readouterr().out
    assert "history, oldest first: Dusty Canyon [k=1], Silent Orbit [k=0]\n" in text
    assert recommend.main(["--no-exclude-history", "--device=cpu", str(run_folder), CANYON,
                           "Silent Orbit"]) == 0
    assert ROW.findall(capsys.readouterr().out) == ROW.findall(text)


def test_the_history_is_left_out_unless_it_shall_be_kept(run_folder, tuned, test_set, capsys):
    p = title_p_by_hand(*tuned, [CANYON], test_set.titles, False)
    best = max(p, key=p.get)                # so likely that it is also among the ten after itself
    assert recommend.main([str(run_folder), best]) == 0
    assert not any(best in printed for printed in printed_lists(capsys.readouterr().out))
    assert recommend.main([str(run_folder), best, "--no-exclude-history"]) == 0
    assert all(best in printed for printed in printed_lists(capsys.readouterr().out))


@pytest.mark.parametrize("command, arguments, message", [
    (explain, ["RUN", "40"], "test sequence 40; wanted a number from 0 to 39; --eval-sequences 0"),
    (explain, ["RUN", "-1"], "test sequence -1; wanted a number from 0 to 39"),
    (explain, ["BASE", "7"], "run.json: not found; experiments.explain wants the folder of a run"),
    (recommend, ["BASE", CANYON],
     "run.json: not found; a recommender wants the folder of a run"),
    (recommend, ["RUN", "Dusty"], "'Dusty': which one? Dusty Canyon; Dusty Canyon 2; "),
    (recommend, ["RUN", CANYON, "xyzzy"], "'xyzzy': no title like it among the 300"),
    (recommend, ["RUN", CANYON, "--model", "nowhere"], "nowhere: not found, but the run was tuned"),
])
def test_each_contradiction_is_one_line_and_status_2(run_folder, base, capsys, command, arguments,
                                                     message):
    folders = {"RUN": str(run_folder), "BASE": str(base)}
    assert command.main([folders.get(argument, argument) for argument in arguments]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("command, arguments, message", [
    (explain, [], "arguments are required: RUN"), (explain, ["x", "seven"], "invalid int value"),
    (explain, ["x", "7", "8"], "unrecognized arguments: 8"),
    (explain, ["x", "--lr", "1"], "unrecognized arguments: --lr"),
    (recommend, [], "arguments are required: RUN, TITLE"),
    (recommend, ["x", "--device", "cpu"], "arguments are required: TITLE"),
    (recommend, ["x", "Heat", "--data", "synthetic"], "unrecognized arguments: --data"),
    (report, [], "arguments are required: RUN"),
])
def test_a_wrong_command_line_is_told_with_the_right_one(capsys, command, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    error, = capsys.readouterr().err.splitlines()
    assert "; usage: python -m experiments." in error and message in error


@pytest.mark.parametrize("name, content, message", [
    ("run.json", "{", "run.json: not valid JSON"),
    ("temporal.json", None, "temporal.json: not found"),
    ("temporal.json", "{}", "temporal.json: not the settings of an adapter"),
    ("adapter_config.json", None, "run/adapter_config.json"),
])
def test_a_damaged_run_is_named_by_the_file(run_folder, base, tmp_path, capsys, name, content,
                                            message):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / base.name).symlink_to(base)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert recommend.main([str(folder), CANYON]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("command, argument", [(explain, "3"), (recommend, CANYON)])
def test_an_interrupt_while_looking_is_status_130_without_a_traceback(run_folder, capsys, command,
                                                                      argument, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr("support.trie.catalogue_log_likelihood", interrupted)
    assert command.main([str(run_folder), argument]) == 130
    assert capsys.readouterr().err == "interrupted; files already written are whole\n"


# ----------------------------------------------------------------------------------------------
# Differences of runs


def worth(ranks) -> np.ndarray:
    """What lists with the answer at these ranks are worth by each metric.  (n,) -> (n, 4)"""
    return np.stack([metric(ranks) for metric in METRICS.values()], axis=1)


def test_paired_differences_by_hand():
    found = paired_bootstrap(worth([0, 7, 20] * 10), worth([4, 3, 9] * 10))
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
    found = paired_bootstrap(worth(one), worth(other), 1_000)
    for name, (difference, low, high) in found.items():
        metric = METRICS[name]
        gains = metric(other) - metric(one)
        half = 1.96 * gains.std(ddof=1) / math.sqrt(600)
        unpaired = 1.96 * math.sqrt((metric(one).var() + metric(other).var()) / 600)
        assert difference == pytest.approx(metric(other).mean() - metric(one).mean(), abs=1e-12)
        assert (high - low) / 2 == pytest.approx(half, rel=0.15) and unpaired > 1.5 * half
        assert (high + low) / 2 == pytest.approx(difference, abs=0.15 * half)


def test_an_interval_from_fewer_than_ten_hits_is_a_dash():
    one, other = worth([0] * 4 + [99] * 996), worth([99] * 4 + [0] * 5 + [7] + [99] * 990)
    for name, (difference, low, high) in paired_bootstrap(one, other, 100).items():
        assert math.isnan(low) == math.isnan(high) == name.endswith("@5") and difference != 0
    assert [(name, interval == "–") for name, _, interval in paired(one, other)] == [
        (name, name.endswith("@5")) for name in METRICS]
    assert dict(zip(METRICS, paired(one, other)))["HR@5"][1] == "+0.0010"


def test_equal_runs_differ_by_nothing_and_the_bootstrap_is_seeded():
    rng = np.random.default_rng(6)
    one, other = (worth(ranks) for ranks in rng.integers(0, 15, (2, 100)))
    assert set(paired_bootstrap(one, one, 200).values()) == {(0.0, 0.0, 0.0)}
    assert paired_bootstrap(one, other, 200) == paired_bootstrap(one, other, 200)
    again = paired_bootstrap(one, other, 200, seed=1)
    assert again != paired_bootstrap(one, other, 200)
    assert [v[0] for v in again.values()] == [
        v[0] for v in paired_bootstrap(one, other, 200).values()]


def test_a_run_is_read_with_the_evaluation_of_most_sequences(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(str(runs / "more"))
    assert (run.name, run.source, run.others) == ("synthetic-rope-1", "run.json", {})
    assert (more.name, more.source, list(more.others)) == ("more", "eval.json", ["run.json"])
    for one, length in ((run, 40), (more, 60)):
        folder = runs / one.name
        assert one.record == json.loads((folder / one.source).read_text())
        assert {len(one.arrays[name]) for name in ("target", "history", "sequence")} == {length}
        for name in one.kinds.values():
            for order, row in (("original", name), ("reversed", f"{name} | reversed"),
                               ("shuffled", f"{name} | shuffled")):
                means = [one.record["rows"][row][metric][0] for metric in METRICS]
                assert one.arrays[f"values/{name}/{order}"].mean(axis=0) == pytest.approx(means)
    assert len(run.titles) == 300 and run.options["lambda_ct"] == 0.1
    assert [line["step"] for line in run.log] == [1, 2, 3, 3] and run.log == more.log


def change(path: Path, **changes) -> None:
    """Write these parts of a record anew; None takes one away."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in record.items() if x is not None}))


EARLY, LATE = "2020-01-01T00:00:00Z", "2099-12-31T23:59:59Z"


@pytest.mark.parametrize("own, again, source", [
    ({}, {}, "eval.json"),                                      # more sequences, and later
    ({}, {"evaluated": EARLY}, "run.json"),                     # of factors before tuning ended
    ({}, {"counts": {"test": 39}}, "run.json"),                 # fewer sequences, though later
    ({}, {"counts": {"test": 40}}, "eval.json"),                # as many, and later
    ({"evaluated": LATE}, {"evaluated": LATE}, "eval.json"),
    ({"rows": None, "evaluated": None}, {"evaluated": EARLY}, "eval.json"),     # half-tuned
    ({"evaluated": None}, {"evaluated": None}, "eval.json"),    # records of an earlier version
    ({"evaluated": None}, {"evaluated": None, "counts": {"test": 3}}, "run.json"),
    ({}, {"evaluated": None}, "run.json")])
def test_what_is_recorded_says_which_evaluation_counts(runs, tmp_path, own, again, source):
    """Not the times of the files, which are those of a copy."""
    for first, second in (("run.json", "eval.json"), ("eval.json", "run.json")):
        folder = shutil.copytree(runs / "more", tmp_path / first)
        change(folder / "run.json", **own)
        change(folder / "eval.json", **again)
        os.utime(folder / first, (1, 1))
        os.utime(folder / second, (2e9, 2e9))
        run = Run.from_folder(folder)
        assert run.source == source and len(run.others) == 1 - ("rows" in own)
        early = ("evaluated" in again and "evaluated" not in own)
        assert ("\nbefore the end of tuning: eval.json, " in describe(run)) == early
        assert run.record == json.loads((folder / source).read_text())


def test_of_evaluations_of_one_size_the_last_counts(runs, tmp_path):
    for later in ("eval-2", "eval"):
        folder = shutil.copytree(runs / "more", tmp_path / later)
        for name in ("eval-evaluation.safetensors", "eval.json"):
            shutil.copy(folder / name, folder / name.replace("eval", "eval-2", 1))
        change(folder / f"{later}.json", evaluated=LATE)
        assert Run.from_folder(folder).source == f"{later}.json"


def test_a_later_evaluation_of_few_sequences_replaces_no_other(runs, tmp_path, capsys):
    """In files: the second --eval-only leaves eval.json of the first as it is."""
    folder = shutil.copytree(runs / "more", tmp_path / "more")
    shutil.copytree(next(runs.glob("tiny-*")), tmp_path / next(runs.glob("tiny-*")).name)
    (folder / "eval-notes.json").write_text("of the user's own")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for number in (2, 3):
        assert cetrec.main(["--eval-only", str(folder), "--eval-sequences", "5"]) == 0
        assert json.loads((folder / f"eval-{number}.json").read_text())["protocol"].startswith("5 ")
        assert (folder / f"eval-{number}-evaluation.safetensors").is_file()
    assert {name: (folder / name).read_bytes() for name in before} == before
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    text, page = capsys.readouterr().out, Page(folder / "report.html")
    assert re.search(r"^eval.json, \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ: 60 test seq", text, re.M)
    others = re.findall(r"^another evaluation: (\S+), \S+: (\d+) test sequences", text, re.M)
    assert others[0] == ("run.json", "40")
    assert sorted(others[1:]) == [("eval-2.json", "5"), ("eval-3.json", "5")]
    assert re.findall(r"^another evaluation: (\S+),", "\n".join(page.text["h3"]), re.M) == [
        source for source, _ in others]
    own = json.loads((folder / "run.json").read_text())["rows"]["popularity"]["HR@5"][0]
    assert f"{own:.4f}" in " ".join(page.text["td"])        # its table is on the page


def test_kinds_of_lists_are_named_by_the_flag_whatever_their_rows_are_called(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    assert list(run.kinds) == ["beams", "titles"] and list(more.kinds) == ["exact", "beams"]
    wide = [run.arrays[f"valid/{run.kinds[kind]}/original"].shape[1] for kind in run.kinds]
    assert wide == [2, 0]                               # only free text may fail to be a title
    assert more.arrays[f"valid/{more.kinds['exact']}/original"].shape[1] == 0
    assert run.kinds["beams"] == more.kinds["beams"]
    again = replace(more, record=more.record | {"rows": dict(sorted(more.record["rows"].items()))})
    assert again.kinds == more.kinds                    # whatever the order of the rows
    scored = replace(run, arrays={"values/all items scored/original": np.zeros((3, 4))})
    assert scored.kinds == dict.fromkeys(["beams", "titles"], "all items scored")


ANEW = "python cetrec.py --eval-only"


@pytest.mark.parametrize("name, content, kind, advice", [
    ("run.json", None, FileNotFoundError, "wanted the folder of a run"),
    ("catalogue.json", None, FileNotFoundError, "copy it from"),
    ("evaluation.safetensors", None, FileNotFoundError, ANEW),
    ("eval.json", b"{", ValueError, ANEW),
    ("eval.json", b'{"rows": {}, "options": {}}', ValueError, ANEW),
    ("run.json", b"", ValueError, "damaged"), ("run.json", b"[]", ValueError, "damaged"),
    ("run.json", b'{"options": {}}', ValueError, "damaged"),
    ("run.json", b"\xff\xfe", ValueError, "damaged"),
    ("run.json", "no rows", ValueError, "not complete; python cetrec.py --resume"),
    ("catalogue.json", b'"titles"', ValueError, "copy it from"),
    ("catalogue.json", b"{}", ValueError, "copy it from"),
    ("catalogue.json", b'{"domain": "movies", "titles": {"Heat": 1}}', ValueError, "copy it from"),
    ("log.jsonl", b'{"step": 1}\n{"st', ValueError, "a report without curves"),
    ("log.jsonl", b"3\n", ValueError, "a report without curves"),
    ("evaluation.safetensors", b"not\nthis", ValueError, ANEW),
    ("evaluation.safetensors", "half", ValueError, ANEW),
    ("eval-2.json", b"[]", ValueError, "delete it, and python cetrec.py --eval-only"),
    ("log.jsonl", b'{"step": 1, "loss_ta": "x", "loss_ct": null}\n', ValueError, "other values"),
    ("log.jsonl", b'{"loss": 1.0}\n', ValueError, "'step' is missing"),
    ("log.jsonl", b'{"step": 1, "loss_ta": 1.0}\n', ValueError, "'loss_ct' is missing"),
])
def test_a_missing_or_damaged_file_of_a_run_is_named_in_one_line(run_folder, tmp_path, capsys, name,
                                                                 content, kind, advice):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    whole = (folder / name).read_bytes() if (folder / name).exists() else b""
    (folder / name).unlink(missing_ok=True)
    if content == "no rows":
        record = json.loads(whole)
        del record["rows"]
        content = json.dumps(record).encode()
    if content is not None:
        (folder / name).write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    with pytest.raises(kind) as error:
        Run.from_folder(folder)
    assert str(error.value).startswith(f"{folder / name}: ") and "\n" not in str(error.value)
    assert advice in str(error.value)
    assert report.main([str(folder)]) == 2
    assert f"{folder / name}: " in error_line(capsys)


def test_arrays_of_another_evaluation_are_refused(runs, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    shutil.copy(runs / "more" / "eval-evaluation.safetensors", folder / "evaluation.safetensors")
    with pytest.raises(ValueError, match="evaluation.safetensors: .*not of the same evaluation"):
        Run.from_folder(folder)


def test_a_catalogue_of_another_length_and_lists_without_options_or_rows_are_refused(run_folder,
                                                                                     tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    for options, gone in ({"lists": ["titles"]}, "nothing"), ({}, "10 beams on titles"), (
            {}, "2 beams, grounded | change, reversed"):
        change(folder / "run.json", options=record["options"] | options, rows={
            name: scores for name, scores in record["rows"].items() if name != gone})
        with pytest.raises(ValueError, match="run.json: damaged; its options or its rows are with"):
            Run.from_folder(folder)
    change(folder / "run.json", **record)
    catalogue = json.loads((folder / "catalogue.json").read_text())
    change(folder / "catalogue.json", titles=catalogue["titles"][1:])
    with pytest.raises(ValueError, match="evaluation.safetensors: .* the 299 items in catalogue"):
        Run.from_folder(folder)


SHOWN_ANYWAY = ["<script>x</script>", "<img src=x onerror=x>", 'x" onerror="x', "a\nb", "\x1b[2J|"]


@pytest.mark.parametrize("part", ["options", "rows", "counts", "method", "protocol"])
def test_what_a_record_holds_is_text_on_the_page(run_folder, tmp_path, capsys, monkeypatch, part):
    """Keys and values, of one run and of a comparison."""
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    record = json.loads((run_folder / "run.json").read_text())
    folders = [shutil.copytree(run_folder, tmp_path / name) for name in ("<b>a</b>", "c")]
    value = {"options": "<i>&", "rows": record["rows"]["popularity"]}.get(part, "<u>")
    change(folders[0] / "run.json", **{part: record[part] | dict.fromkeys(SHOWN_ANYWAY, value)
                                       if type(record[part]) is dict else " ".join(SHOWN_ANYWAY)})
    for number, arguments in enumerate((folders[:1], folders)):
        out = tmp_path / str(number)
        assert report.main([*map(str, arguments), "--out", str(out)]) == 0
        page = Page(out / "report.html")
        assert not {"script", "img", "i", "u", "b"} & page.tags.keys() and not page.links
        text = " ".join(x for texts in page.text.values() for x in texts)
        if number or part != "counts":        # which one run does not show
            assert "<script>x</script>" in text and "\\x1b[2J|" in text and "\x1b" not in text
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    ({"lambda_ct": "x"}, "--lambda-ct is 'x'; "), ({"temporal": "no"}, "--temporal is 'no'; "),
    ({"lambda_ct": math.inf}, "--lambda-ct is inf; "), ({"lists": ["best"]}, "--lists is 'best'; "),
    ({"eval_sequences": -1}, "--eval-sequences is -1; "), ({"seed": None}, "--seed is None; "),
    ({"index": 3}, "--index is 3; "), ("seed", "'seed' is missing"), (3, "options is 3; wanted")])
def test_options_are_refused_on_reading_as_on_the_command_line(run_folder, tmp_path, capsys,
                                                               options, message):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    known = json.loads((folder / "run.json").read_text())["options"]
    change(folder / "run.json", options=known | options if type(options) is dict else
           {key: x for key, x in known.items() if key != options} if options == "seed" else options)
    assert report.main([str(folder)]) == 2
    assert f"run.json: damaged, or of another version of this program ({message}" in error_line(
        capsys)


def test_options_of_another_version_do_not_hide_what_a_run_found(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    options = json.loads((folder / "run.json").read_text())["options"]
    del options["compile"]
    change(folder / "run.json", options=options | {"of_tomorrow": 1})
    assert Run.from_folder(folder).record["rows"] == Run.from_folder(run_folder).record["rows"]


def test_each_metric_has_its_name_and_two_numbers(run_folder, tmp_path, capsys):
    """What is refused on reading: names that are no metrics, scores that are no numbers."""
    record = json.loads((run_folder / "run.json").read_text())
    folder, good = shutil.copytree(run_folder, tmp_path / "run"), record["rows"]["popularity"]
    for bad in (good | {"<img src=x onerror=x>": [0.1, 0.1]}, good | {"HR@5": [0.1]}, [], None,
                good | {"HR@5": ["0.1", 0.1]}, good | {"HR@5": [1e300, 0.1]}, {"HR@5": [0, 0]},
                good | {"HR@5": [float("inf"), 0.1]}, good | {"HR@5": [True, 0.1]}):
        change(folder / "run.json", rows=record["rows"] | {"popularity": bad})
        assert report.main([str(folder)]) == 2
        assert "run.json: damaged, or of another version of this program (row 'popu" in error_line(
            capsys)


def test_a_run_without_a_log_is_read(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "log.jsonl").unlink()
    assert Run.from_folder(folder).log == []


def test_only_common_sequences_are_paired(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    common = sorted(set(run.arrays["sequence"].tolist()) & set(more.arrays["sequence"].tolist()))
    assert 0 < len(common) < 40
    ranks = {"synthetic-rope-1": np.arange(40) * 5 % 12, "more": np.arange(60) % 4}
    place = {r.name: r.arrays["sequence"].tolist() for r in (run, more)}
    run, more = (replace(r, arrays=r.arrays | {
        f"values/{r.kinds['beams']}/original": worth(ranks[r.name])}) for r in (run, more))
    text = compare([run, more])
    assert f"\ncompared on the same {len(common)} test sequences\n" in text
    assert "\nmore minus synthetic-rope-1, with the 95 % interval of a paired bootstrap\n" in text
    told = dict(zip(METRICS, map(float, re.search("^difference (.*)", text, re.M)[1].split())))
    for name, metric in METRICS.items():
        here, there = (metric(np.array([ranks[r.name][place[r.name].index(s)] for s in common]))
                       for r in (run, more))
        assert told[name] == pytest.approx(float(np.mean(there - here)), abs=6e-5)
    assert abs(told["HR@5"]) > 0.01
    lines = {line.split(",")[0]: line for line in text.split("\n\n")[2].splitlines()}
    for r in (run, more):                               # what each is worth on these sequences
        values = METRICS["HR@10"](np.array([ranks[r.name][place[r.name].index(s)] for s in common]))
        assert f" {values.mean():.4f} ± " in lines[r.name]
    one, other = on_common([run, more])
    assert one.arrays["sequence"].tolist() == other.arrays["sequence"].tolist() == common
    for order in report.ORDERS:
        rows = [place["more"].index(s) for s in common]
        key = f"lists/{more.kinds['beams']}/{order}"
        assert (other.arrays[key] == more.arrays[key][rows]).all()
    whole, twin = on_common([run, replace(run, name="twin")])
    for name in run.lists:                              # all sequences: what the run itself found
        for row in (name, f"{name} | change, reversed", f"{name} | change, shuffled"):
            for metric in METRICS if name != run.kinds["beams"] else ():
                assert whole.record["rows"][row][metric] == pytest.approx(
                    run.record["rows"][row][metric], nan_ok=True)


def test_each_kind_that_both_have_is_compared(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    parts = compare([run, more, replace(run, name="twin")]).split("\n\n")[2:]
    heads = [part.splitlines()[0].removesuffix(", with the 95 % interval of a paired bootstrap")
             for part in parts]
    assert heads == [run.kinds["beams"], f"more minus {run.name}", f"twin minus {run.name}",
                     run.kinds["titles"], f"twin minus {run.name}", more.kinds["exact"]]
    exact = replace(more, record=more.record | {"options": more.options | {"lists": ["exact"]}})
    with pytest.raises(ValueError, match="more has exact and synthetic-rope-1 has beams, titles: "):
        compare([run, exact])


def test_a_baseline_is_compared_with_every_list_and_with_another_baseline_once(run_folder):
    run = Run.from_folder(run_folder)

    def baseline(name: str) -> Run:
        arrays = {key.replace("10 beams on titles", "all items scored"): array
                  for key, array in run.arrays.items() if "grounded" not in key}
        return replace(run, name=name, arrays=arrays, record=run.record | {"method": "sasrec"})
    heads = [part.splitlines()[0] for part in compare([run, baseline("a")]).split("\n\n")[2::2]]
    assert heads == [f"{name} / all items scored" for name in run.lists]
    heads = [part.splitlines()[0] for part in compare([baseline("a"), baseline("b")]).split("\n\n")]
    assert heads[2::2] == ["all items scored"]


def test_a_comparison_names_evaluations_and_what_differs(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    first, second, common, _, none = compare([run, replace(run, name="twin")]).split("\n")[:5]
    done = f"run.json, {run.record['evaluated']}: {run.record['protocol']}"
    assert [first, second] == [f"{name} | {done}" for name in (run.name, "twin")]
    assert common == "compared on the same 40 test sequences"
    assert none == "options and data that differ: none"
    text = compare([run, replace(run, name="twin")])
    assert "synthetic-rope-1, rope, λ = 0.1 " in text and "twin, rope, λ = 0.1 " in text
    assert text.count("[+0.0000, +0.0000]") == 8                    # of two kinds of lists
    assert differing([run, more]) == {"eval_sequences": [40, 60],
                                      "lists": [["beams", "titles"], ["exact", "beams"]]}
    other = replace(run, record=run.record | {
        "method": "sasrec", "baseline": {"lr": 0.5, "width": 8}, "checksums": {"u.data": "ab"},
        "counts": run.record["counts"] | {"train": 3}, "settings": {"base": "0123"}})
    assert differing([run, other]) == {
        "method": ["cetrec", "sasrec"], "lr": [0.003, 0.5], "width": [None, 8],
        "counts: train": [800, 3], "checksums: u.data": [None, "ab"],
        "base": [run.record["settings"]["base"], "0123"]}
    assert re.search(r"^lr +0.003 +0.5$", compare([run, other]), re.M)
    cells = re.findall(r"<tr><th>counts: train</th><td>800</td><td>3</td></tr>",
                       as_html(report.comparison([run, other])))
    assert len(cells) == 1


def test_runs_of_other_data_or_without_common_sequences_are_refused(runs, run_folder, capsys):
    run, few = Run.from_folder(run_folder), Run.from_folder(runs / "few")
    with pytest.raises(ValueError, match="sets was tested on other data than synthetic-rope-1"):
        compare([run, Run.from_folder(runs / "sets")])
    target, history = run.arrays["target"].copy(), run.arrays["history"].copy()
    target[7] = (target[7] + 1) % 300                   # one answer is another one
    history[7, 0] = (history[7, 0] + 1) % 300
    for changed in (replace(run, arrays=run.arrays | {"target": target}),
                    replace(run, arrays=run.arrays | {"history": history}),
                    replace(run, titles=[*run.titles[1:], "Heat"])):
        with pytest.raises(ValueError, match="other data"):
            compare([run, replace(changed, name="changed")])
    assert not set(run.arrays["sequence"]) & set(few.arrays["sequence"])
    with pytest.raises(ValueError, match="synthetic-rope-1, few share no test sequence; .*"
                                         "--eval-sequences 0"):
        compare([run, few])
    assert report.main([str(run_folder), str(runs / "sets")]) == 2
    assert re.search(r"other data .* these differ in .*order_strength \(1.0 and 0.0\)",
                     error_line(capsys))


# ----------------------------------------------------------------------------------------------
# What is told of one run


def test_agreement_of_lists_by_hand():
    one, other = np.array([[1, 2, 3], [4, 5, -1]]), np.array([[3, 1, 9], [4, -1, -1]])
    assert agreement(one, other) == pytest.approx(3 / 5)


def numbers(text: str) -> Counter:
    """How often each number with decimals stands in a text."""
    return Counter(re.findall(r"\d+\.\d+", text))


def rows_of(text: str) -> dict[str, list[float]]:
    """The means of a table of metrics, by the name of their row."""
    return {line[:-68].strip(): [float(mean) for mean in re.findall(r"(\S+) ± ", line)]
            for line in text.splitlines()[1:] if " ± " in line}


def test_groups_are_a_partition_by_length_and_by_what_training_saw(runs):
    run = Run.from_folder(runs / "more")
    seen = run.arrays["seen"].copy()
    seen[run.arrays["target"][:25]] = False
    run = replace(run, arrays=run.arrays | {"seen": seen})
    groups = report.members_of_groups(run)
    lengths = np.array([sum(item >= 0 for item in row) for row in run.arrays["history"].tolist()])
    saw = np.array([seen[item] for item in run.arrays["target"].tolist()])
    wanted = {"history of 3": lengths == 3, "history of 4 to 6": (lengths >= 4) & (lengths <= 6),
              "history of 7 to 9": (lengths >= 7) & (lengths <= 9), "history of 10": lengths == 10,
              "answer seen": saw, "answer unseen": ~saw}
    assert groups.keys() == wanted.keys() and saw.any() and not saw.all()
    for name, members in wanted.items():
        assert (groups[name] == members).all(), name
    name = run.kinds["beams"]
    table = format_table(report.groups(run)).split(name)[1]
    told = rows_of(f"\n{name}{table}")
    assert told.pop(name) == pytest.approx(run.arrays[f"values/{name}/original"].mean(0), abs=6e-5)
    assert told.keys() == {f"{group} ({members.sum()})" for group, members in wanted.items()
                           if members.any()}
    for group, members in wanted.items():
        if members.any():
            mean = run.arrays[f"values/{name}/original"][members].mean(axis=0)
            assert told[f"{group} ({members.sum()})"] == pytest.approx(mean, abs=6e-5)


def made_up(run: Run) -> Run:
    """Four test sequences in a catalogue of ten items, with lists of three by two recommenders."""
    rows = {"all titles scored": {}, "5 beams, grounded": {}}
    lists = {"5 beams, grounded": [[1, 2, 3], [1, 2, 4], [5, 1, -1], [1, 2, 3]],
             "all titles scored": [[1, 3, 2], [2, 1, 6], [5, 1, 7], [1, 2, 8]]}
    valid = [[True, True], [True, False], [False, False], [True, True]]
    arrays = {"target": np.array([1, 2, 3, 3]), "popularity": np.arange(10.0) ** 2}
    for name, made in lists.items():
        arrays |= {f"lists/{name}/original": np.array(made),
                   f"values/{name}/original": np.zeros((4, 4)),
                   f"valid/{name}/original": np.array(valid)[:, :2 * ("5" in name)]}
    return replace(run, arrays=arrays, titles=[str(i) for i in range(10)], record={
        "rows": rows, "options": run.options | {"lists": ["beams", "exact"]}})


def test_the_table_of_what_is_recommended_by_hand(run_folder):
    """Popularity of item i is i². Five texts name 1, 2, 3, 4, 5 of 0 to 9; 5/8 of all texts and 3/4
    of the first ones are titles; 9 of the 12 exact items and 3 of the 4 first ones are found."""
    run = made_up(Run.from_folder(run_folder))
    _, head, rows, note = report.recommended(run)
    assert [head, *rows] == [
        ["", "coverage", "popularity", "titles", "first beams", "exact tens", "exact firsts"],
        ["5 beams, grounded", "50.0 %", f"{(4 * 1 + 3 * 4 + 2 * 9 + 16 + 25) / 11:.1f}", "62.5 %",
         "75.0 %", "75.0 %", "75.0 %"],
        ["all titles scored", "70.0 %", f"{(4 * 1 + 3 * 4 + 9 + 36 + 25 + 49 + 64) / 12:.1f}",
         *[""] * 4],
        ["test answers", "", f"{(1 + 4 + 9 + 9) / 4:.1f}", *[""] * 4]]
    assert [line.split(":")[0] for line in note.split("; ")] == list(report.COLUMNS)
    alone = replace(run, record=run.record | {"options": run.options | {"lists": ["exact"]}})
    assert report.recommended(alone)[1] == ["", "coverage", "popularity"]

def test_the_way_from_the_blind_to_the_aware_recommender_by_hand(run_folder):
    run = made_up(Run.from_folder(run_folder))

    def rows(blind: float, texts: float, aware: float) -> Run:
        return replace(run, record=run.record | {"rows": {
            name: dict.fromkeys(METRICS, (value, 0.01))
            for name, value in (("all titles scored", blind), ("5 beams, grounded", texts),
                                ("best, order-aware", aware), ("best, order-blind", blind))}})
    assert report.standing(rows(0.2, 0.25, 0.4))[1:] == (["", *METRICS], [
        ["5 beams, grounded", *["+25 %"] * 4], ["all titles scored", *["+0 %"] * 4]])
    assert report.standing(rows(0.2, 0.1, 0.4))[2][0] == ["5 beams, grounded", *["-50 %"] * 4]
    assert "order decides nothing here" in report.standing(rows(0.2, 0.25, 0.205))


def test_the_description_of_a_run_holds_its_table_and_fits_100_columns(runs, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    for one in (run, more):
        text = describe(one)
        assert format_table(one.record["rows"]) in text and one.record["protocol"] in text
        assert format_table(report.groups(one)) in text
        for part in (report.standing(one), report.recommended(one)):
            assert as_text([part]) in text
        assert f"\n{one.source}, {one.record['evaluated']}: {one.record['protocol']}\n" in text
        assert max(len(line) for line in text.splitlines() if "candidates" not in line) <= 100
        log_p = one.arrays["answers"]
        nats, p = (x[:, 0] - x[:, 1] for x in (log_p, np.exp(log_p)))
        assert f"log p {nats.mean():+.4f} ± {nats.std(ddof=1) / math.sqrt(len(nats)):.4f}" in text
        assert f"p {p.mean():+.5f} ± {p.std(ddof=1) / math.sqrt(len(p)):.5f}" in text
    real = {name: row for name, row in run.record["rows"].items() if "best" not in name}
    assert "on the way" not in describe(replace(run, record=run.record | {"rows": real}))
    few = describe(Run.from_folder(runs / "few"))
    assert "too few test sequences to say where the lists are" in few and "nan" not in few


# ----------------------------------------------------------------------------------------------
# report as a command


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
    assert report.main([str(run_folder), str(runs / "more"), "--user", "3"]) == 0
    return runs / "comparison"


def test_one_run_is_printed_and_reported_in_its_own_folder(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    folder = run_folder.with_name("copied")
    shutil.copytree(run_folder, folder)
    assert report.main([str(folder)]) == 0
    told = describe(Run.from_folder(folder))
    text = capsys.readouterr().out
    assert text.startswith(f"{told}\nreport {folder}/report.html")
    page = Page(folder / "report.html")
    assert page.text["h1"] == ["copied"] and "h2" not in page.text
    assert numbers(" ".join(page.text["td"] + page.text["p"] + page.text["th"])) >= numbers(told)
    assert "pre" not in page.tags
    for wanted in ("synthetic", "rope, λ = 0.1"):
        assert wanted in page.text["td"]
    now = datetime.datetime.now(datetime.UTC)
    assert any(f"run.json, {now.year}-" in heading for heading in page.text["h3"])
    options = dict(zip(page.text["code"], page.text["td"][5:]))
    assert options["lambda_ct"] == "0.1" and options["length_penalty"] == "0.0"


def test_several_runs_are_compared_in_a_folder_beside_the_first(runs, compared, run_folder):
    run, more = Run.from_folder(run_folder), Run.from_folder(runs / "more")
    page = Page(compared / "report.html")
    assert page.text["h1"] == ["synthetic-rope-1, more"]
    assert page.text["h2"] == ["comparison", "synthetic-rope-1", "more"]
    told = compare([run, more]) + describe(run) + describe(more)
    assert numbers(" ".join(page.text["td"] + page.text["p"] + page.text["th"])) >= numbers(told)


def test_out_and_user_choose_folder_and_case(run_folder, test_set, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "figures_available", lambda: True)
    for name in ("training_curves", "change_bars", "lambda_curve"):
        monkeypatch.setattr(figures, name, lambda runs: None)
    monkeypatch.setattr(figures, "temporal_picture", lambda options, titles: seen.append(titles))
    monkeypatch.setattr(figures, "case_study", lambda runs, user: seen.append(user))
    assert report.main([str(run_folder), "--user", "7", "--out", str(tmp_path / "a" / "b")]) == 0
    assert seen == [test_set.titles_of(test_set.history(7)), 7]
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["report.html"]
    assert f"report {tmp_path}/a/b/report.html | 0 figures beside it\n" in capsys.readouterr().out


@pytest.mark.parametrize("user", ["40", "-1"])
def test_a_user_out_of_range_is_one_line(run_folder, tmp_path, capsys, user):
    assert report.main([str(run_folder), "--user", user, "--out", str(tmp_path)]) == 2
    assert (f"--user is {user}; synthetic-rope-1 was tested on sequences 0 to 39"
            in error_line(capsys))
    assert not list(tmp_path.iterdir())


def test_a_report_can_be_written_without_matplotlib(runs, run_folder, tmp_path, capsys,
                                                    monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not figures.figures_available()
    monkeypatch.undo()
    monkeypatch.setattr(figures, "figures_available", lambda: False)
    assert report.main([str(run_folder), str(runs / "more"), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(compare([Run.from_folder(run_folder),
                                            Run.from_folder(runs / "more")]) + "\n")
    assert captured.out.endswith(f"report {tmp_path}/report.html | 0 figures beside it | no "
                                 "figures: they want matplotlib; pip install matplotlib\n")
    assert captured.err == "" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    page = Page(tmp_path / "report.html")
    assert page.text["h2"][0] == "comparison" and page.tags["img"] == 0
    assert page.text["p"][-1:] == ["no figures: they want matplotlib; pip install matplotlib"]


def test_every_figure_is_a_png_and_an_svg_beside_the_page(compared):
    names = {"training", "order-beams", "order-titles", "order-exact",
             "temporal-synthetic-rope-1", "case"}               # of one setting
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
    assert len(page.links) == page.tags["img"] == 6
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
    shown = "a <b>b</b> & c", "<i>", "<script>x</script>"
    part = as_html([scores("<i>x</i>", {"<u>1</u> &lt; 2": dict.fromkeys(METRICS, (1.0, 0.5))})])
    figures.write_page(tmp_path, shown[0], [(shown[1], part)], [], shown[2:])
    page = Page(tmp_path / "report.html")
    assert not {"b", "i", "u", "script"} & page.tags.keys()
    assert tuple("".join(page.text[tag]) for tag in ("h1", "h2", "p")) == shown
    assert page.text["title"] == [shown[0]] and "<u>1</u> &lt; 2" in "".join(page.text["th"])


def test_a_table_of_scores_has_dashes_for_what_few_hits_do_not_tell():
    nan, of_all = math.nan, dict.fromkeys(METRICS, (0.25, 0.125))
    made = as_html([scores("x", {
        "beams": of_all | {"HR@10": (0.001, nan)}, "popularity": of_all,
        "beams | change, reversed": of_all | {"HR@5": (-50.0, nan), "HR@10": (nan, nan)}})])
    assert "nan" not in made and "<h3>x</h3>" in made and "<th>popularity</th>" in made
    assert made.endswith('<p class="note">–: from fewer than ten hits</p>')
    assert "note" not in as_html([scores("x", {"beams": of_all})])
    assert re.search(r"<tr><th>beams</th><td>0.2500 ± 0.1250</td>.*<td>0.0010 ± +–</td>", made)
    assert '<th class="below">change, reversed</th><td>−50.0 ±   – %</td>' in made
    assert "<td>–</td>" in made


def test_a_cell_is_html_only_if_it_is_made_as_such():
    made = table(["", "<i>"], [["  <b>", h("<code>{}</code>", "<u>"), '"&']], "<s>")
    assert "<th>&lt;i&gt;</th>" in made and '<th class="below">&lt;b&gt;</th>' in made
    assert "<td><code>&lt;u&gt;</code></td><td>&quot;&amp;</td>" in made
    assert '<p class="note">&lt;s&gt;</p>' in made


@pytest.mark.parametrize("name, title", [("at$5_^$6", "Heat"), ("run", "A$AP_^ Ke$ha")])
def test_dollars_in_names_and_titles_are_dollars(run_folder, draw, name, title):
    run = replace(Run.from_folder(run_folder), name=name)
    for fig in (draw.temporal_picture(run.options, [title] * 3),
                draw.change_bars({title: (np.zeros(4), None)}),
                draw.training_curves([run]),
                draw.case_study([replace(run, titles=[title] * 300)], 0)):
        fig.set_layout_engine("none")           # which is slow
        fig.draw_without_rendering()            # raises where text is taken for a formula


def test_each_setting_has_its_temporal_picture(run_folder, draw):
    one, alike, other = read_runs([run_folder] * 3)
    assert len({one.name, alike.name, other.name}) == 3
    other = replace(other, record=other.record | {
        "options": other.options | {"temporal": "sinpe", "lambda_ct": 0.0}})
    drawn = [name for name, _, _ in report.drawings([one, alike, other], 0)]
    assert drawn == ["training", "order-beams", "order-titles", "lambda", f"temporal-{one.name}",
                     f"temporal-{other.name}", "case"]
    assert [name for name, _, _ in report.drawings([one], 0)] == [
        "training", "order-beams", "order-titles", "temporal", "case"]


def test_the_same_figures_are_the_same_bytes(run_folder, tmp_path, draw):
    for name in "ab":
        (tmp_path / name).mkdir()
        fig = draw.training_curves([Run.from_folder(run_folder)])
        draw.write_page(tmp_path / name, "once more", [], [("training", "Losses", fig)], [])
    for name in ("training.svg", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_titles_in_a_script_that_the_font_lacks_are_drawn_without_a_warning(run_folder, tmp_path,
                                                                            draw, recwarn):
    run = Run.from_folder(run_folder)
    run = replace(run, titles=[f"七人の侍 {i}" for i in range(len(run.titles))])
    drawn = [d for d in report.drawings([run], 0) if d[0] == "case"]
    draw.write_page(tmp_path, "titles", [], drawn, [])
    assert (tmp_path / "case.png").is_file() and not list(recwarn)


@pytest.mark.parametrize("name, arguments, message", [
    ("explain", ["nowhere", "7"], "nowhere/run.json: not found; experiments.explain wants the"),
    ("recommend", ["nowhere", CANYON], "nowhere/run.json: not found; a recommender wants"),
    ("report", ["nowhere"], "nowhere/run.json: not found; wanted the folder of a run"),
    ("look", ["--data", "netflix"], "unknown data set 'netflix'")])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_module_is_a_command_that_fails_without_a_traceback(capsys, monkeypatch, name, arguments,
                                                              message):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    assert error_line(capsys).startswith(f"error: {message}")


# ----------------------------------------------------------------------------------------------
# Figures show the data they are given


@pytest.fixture
def run(run_folder) -> Run:
    return Run.from_folder(run_folder)


def with_scores(run: Run, name: str, start: float, **options) -> Run:
    """The run with metrics that are all different, of an order and between orders."""
    rows = {f"{kind}{ending}": {metric: (start + 0.3 * n + 0.1 * i + 0.02 * j, 0.001 * (1 + i + j))
                                for j, metric in enumerate(METRICS)}
            for n, kind in enumerate(row for row in run.record["rows"] if row in run.lists)
            for i, ending in enumerate(("", " | reversed", " | shuffled"))}
    return replace(run, name=name, record=run.record | {"options": run.options | options,
                                                        "rows": rows})


def test_change_bars_are_as_long_as_the_changes(run, draw):
    from matplotlib.container import BarContainer
    run = replace(run, record=run.record | {"rows": run.record["rows"] | {
        f"{made} | change, {how}": {metric: (-10.0 * n - i - start, 0.5 + i)
                                    for i, metric in enumerate(METRICS)}
        for n, made in enumerate(run.kinds.values())
        for start, how in ((0.25, "reversed"), (0.75, "shuffled"))}})
    alone = report.change_rates([run], "titles")
    assert list(alone) == ["reversed", "shuffled"]
    two = report.change_rates([run, replace(run, name="b")], "beams")
    assert list(two) == [f"{run.name}, rope, λ = 0.1", "b, rope, λ = 0.1"]
    assert report.change_rates([run, run], "exact") == {}
    (ax,) = draw.change_bars({"few": (np.array([math.nan, -50, -40, math.nan]),
                                      np.array([math.nan, 9, math.nan, math.nan]))}).axes
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [
        ("–", (0, 0)), ("–", (3, 0))]                   # in the place of a bar
    for rates in (alone, two):
        (ax,) = draw.change_bars(rates).axes
        assert [label.get_text() for label in ax.get_xticklabels()] == list(METRICS)
        bars = [group for group in ax.containers if isinstance(group, BarContainer)]
        assert [group.get_label() for group in bars] == list(rates)
        for group, (mean, error) in zip(bars, rates.values(), strict=True):
            assert [bar.get_height() for bar in group] == mean.tolist()
            (segments,) = group.errorbar.lines[2]
            ends = [(segment[0, 1], segment[1, 1]) for segment in segments.get_segments()]
            assert np.array(ends) == pytest.approx(np.stack([mean - error, mean + error], axis=1))
    assert alone["shuffled"][0].tolist() == [-10.75, -11.75, -12.75, -13.75]
    assert two["b, rope, λ = 0.1"][0].tolist() == [-0.25, -1.25, -2.25, -3.25]


def test_the_default_user_is_one_whom_order_serves(run):
    name = run.lists[0]
    target = run.arrays["target"]
    hit, miss = (np.full((40, 10), -1) for _ in range(2))
    hit[:, 4] = target
    original, backward = miss.copy(), miss.copy()
    original[[3, 7, 9]], backward[3] = hit[[3, 7, 9]], hit[3]
    served = replace(run, arrays=run.arrays | {f"lists/{name}/original": original,
                                               f"lists/{name}/reversed": backward})
    assert report.telling_user(served) == 7                     # 3 is served by any order
    other = replace(served, arrays=served.arrays | {f"lists/{name}/original": np.where(
        np.arange(40)[:, None] == 7, hit, miss)})
    assert report.telling_user(served, other) == 9              # the other run finds 7, too
    assert report.telling_user(other, other) == 0               # nobody: the first


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
    (points,) = lines_of(ax, label="$L_{TA}$ (Eq. 9), validation")
    assert points.tolist() == [[3, log[3]["validation_ta"]]]
    (ax,) = draw.training_curves([replace(run, record=run.record | {"vocabulary": 1_234})]).axes
    (agree,) = lines_of(ax, label="ln V: the worlds agree")
    assert agree[:, 1] == pytest.approx(math.log(1_234))
    unknown = {key: value for key, value in run.record.items() if key != "vocabulary"}
    (ax,) = draw.training_curves([replace(run, record=unknown)]).axes
    assert not lines_of(ax, label="ln V: the worlds agree")


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


def test_the_lambda_curve_wants_two_lambdas_and_shows_each_run(runs, run, draw):
    one = with_scores(run, "a", 0.1, lambda_ct=0.5)
    assert draw.lambda_curve([one, replace(one, name="b")]) is None
    more = Run.from_folder(runs / "more")
    titles_only = replace(with_scores(more, "e", 0.6, lambda_ct=9.0, lists=["exact"]))
    shown = [one, with_scores(run, "b", 0.2, lambda_ct=0.0),
             with_scores(run, "c", 0.4, lambda_ct=0.5),
             with_scores(run, "d", 0.5, lambda_ct=0.5, temporal="sinpe"), titles_only]
    fig = draw.lambda_curve(shown)
    for ax, metric in zip(fig.axes, ("HR@5", "HR@10"), strict=True):
        high = {r.name: r.record["rows"][run.kinds["beams"]][metric] for r in shown[:4]}
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5"]
        curves = lines_of(ax, linestyle="-")
        assert curves[0] == pytest.approx(np.array([(0, high["b"][0]), (
            0.5, (high["a"][0] + high["c"][0]) / 2)]))
        assert curves[1].tolist() == [[0.5, high["d"][0]]]
        points = {mark: np.concatenate(lines_of(ax, marker=mark)).tolist() for mark in "os"}
        assert points == {"o": [[0.0, high["b"][0]], [0.5, high["a"][0]], [0.5, high["c"][0]]],
                          "s": [[0.5, high["d"][0]]]}
        errors = [segment[:, 1] for bar in ax.containers
                  for segment in bar.lines[2][0].get_segments()]
        assert np.array(errors) == pytest.approx(np.array([
            (high[name][0] - high[name][1], high[name][0] + high[name][1]) for name in "bacd"]))
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rope", "sinpe"]
        assert metric in ax.get_ylabel()


@pytest.mark.parametrize("kind, scale", [("rope", 1.0), ("rope-attention", 1.0), ("sinpe", 0.25),
                                         ("sinpe", 0.0)])
def test_the_temporal_picture_shows_sines_then_cosines_and_the_erased_rows_alike(draw, kind, scale):
    """Angles are k / 10,000^(2t/64) for k = 3, 2, 1, 0 from the top."""
    titles = ["Heat", "Ran", "Up", "Jaws"]
    options = {"temporal": kind, "index": "order", "sinpe_scale": scale}
    pictures = draw.temporal_picture(options, titles).axes[:2]
    angles = np.arange(3, -1, -1)[:, None] / 10_000 ** (np.arange(0, 64, 2) / 64)
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in pictures]
    assert images[0] == pytest.approx(
        scale * np.concatenate((np.sin(angles), np.cos(angles)), axis=1), abs=1e-6)
    assert (images[1] == [0] * 32 + [scale] * 32).all() and images[1].shape == images[0].shape
    assert [ax.get_title() for ax in pictures] == ["factual world", "erased world"]
    assert [label.get_text() for label in pictures[0].get_yticklabels()] == [
        "Heat  k = 3", "Ran  k = 2", "Up  k = 1", "Jaws  k = 0"]
    for other in ({"temporal": "none"}, {"index": "time"}):
        assert draw.temporal_picture(options | other, titles) is None


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_case_study_names_history_answer_and_twenty_titles(run, draw):
    user, name = 5, run.kinds["beams"]
    arrays = {key: array.copy() for key, array in run.arrays.items()}
    answer = int(arrays["target"][user])
    arrays[f"lists/{name}/original"][user, 3] = answer
    arrays[f"lists/{name}/reversed"][user, 9] = -1          # a catalogue used up
    above, below = draw.case_study([replace(run, arrays=arrays)], user).axes
    history = [run.titles[item] for item in arrays["history"][user] if item >= 0]
    n = len(history)
    assert texts(above) == ["history, oldest first", *(
        f"{title}  [k = {n - 1 - i}]" for i, title in enumerate(history)),
        f"▶ {run.titles[answer]}, the answer"]
    wanted = [f"synthetic-rope-1 | rope, λ = 0.1 | {name}"]
    for order in ("original", "reversed"):
        wanted.append(f"{order} history")
        for rank, item in enumerate(arrays[f"lists/{name}/{order}"][user].tolist()):
            if item >= 0:
                mark = " ◀" if item == answer else ""
                wanted += [str(rank + 1), f"{run.titles[item]}{mark}"]
    assert texts(below) == wanted and sum("◀" in text for text in texts(below)) >= 1
    bold = [text.get_text() for text in below.texts if text.get_weight() == "bold"]
    assert f"{run.titles[answer]} ◀" in bold


def test_the_case_study_follows_the_sequence_from_run_to_run(runs, run, draw):
    more, few = Run.from_folder(runs / "more"), Run.from_folder(runs / "few")
    name = run.kinds["beams"]
    more = replace(more, arrays=more.arrays | {     # lists as different as can be
        f"lists/{name}/{order}": (start + np.arange(60)[:, None] + 7 * np.arange(10)) % 300
        for order, start in (("original", 0), ("reversed", 100))})
    here, there = (r.arrays["sequence"].tolist() for r in (run, more))
    user = next(i for i, sequence in enumerate(here) if sequence in there
                and there.index(sequence) != i)
    panels = [texts(ax) for ax in draw.case_study([run, more, few], user).axes]
    second, third = (next(panel for panel in panels
                          if panel[:1] == [f"{one} | rope, λ = 0.1 | {name}"])
                     for one in ("more", "few"))
    place, answer = there.index(here[user]), int(run.arrays["target"][user])
    for order in ("original", "reversed"):
        for item in more.arrays[f"lists/{name}/{order}"][place].tolist():
            assert f"{run.titles[item]}{' ◀' if item == answer else ''}" in second
    assert third[1:] == ["not among this run's test sequences"]


def test_the_case_study_takes_other_lists_where_a_run_lacks_those_of_the_first(runs, run, draw):
    more = Run.from_folder(runs / "more")
    heads = [texts(ax)[0] for ax in draw.case_study([more, run], 0).axes[1:]]
    assert [head.rpartition(" | ")[2] for head in heads] == [more.kinds["exact"],
                                                             run.kinds["beams"]]


def test_the_case_study_has_no_steps_where_k_is_an_age(run, draw):
    dated = replace(run, record=run.record | {"options": run.options | {"index": "time"}})
    assert not any("[k" in text for text in texts(draw.case_study([dated], 0).axes[0]))


if __name__ == "__main__":
    os.environ["CETREC_WRITE_EXPLANATION"] = "1"
    sys.exit(pytest.main([__file__, "-q", "-k", "golden"]))
