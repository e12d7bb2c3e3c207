"""experiments/choose.py: decodings are compared on validation, by what their lists are worth."""

import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import small_runs

import cetrec
from cetrec import TemporalLlama
from data import Catalogue
from evaluate import METRICS, GroundedBeams, list_values
from experiments import choose
from llama import load_llama
from lora import load_lora
from support.checkpoints import read_tokenizer
from support.runs import open_data, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of few steps."""
    out = tmp_path_factory.mktemp("choose")
    with small_runs():
        assert cetrec.main(["--max-steps", "4", "--batch-size", "16", "--limit-train", "64",
                            "--eval-sequences", "12", "--out", str(out)]) == 0
        yield out / "synthetic-rope-1"


def test_lists_are_made_for_validation_and_valued_by_hand(folder, capsys):
    assert choose.main([str(folder), "--ground-with", "tuned", "--no-exclude-history"]) == 0
    text = capsys.readouterr().out
    options, base = read_run(folder, {}, "test")
    (_, valid_set, test_set), world, _ = open_data(options)
    assert not set(valid_set.targets) & set(test_set.targets)
    llama = load_llama(base)
    load_lora(llama, folder)
    model = TemporalLlama(llama, "rope").eval()
    catalogue = Catalogue(valid_set.titles, "movies", read_tokenizer(base))
    valid_set = valid_set.sample(12, options.seed)
    histories = [valid_set.history(i) for i in range(12)]
    true_p, rows = world.true_distribution(histories), {}
    for name, change in (("as the run has it", {}),
                         ("--no-exclude-history", {"exclude_history": False}),
                         ("--ground-with tuned", {"ground_with": "tuned"})):
        lists = GroundedBeams(model, catalogue, replace(options.decoding(), **change))(histories)
        rows[name] = list_values(lists.items, np.zeros(12), true_p).mean(axis=0)
    assert "12 validation sequences, lists: beams" in text
    for name, values in rows.items():
        line = next(x for x in text.splitlines() if x.startswith(name))
        assert [float(x) for x in re.findall(r"(\S+) ± ", line)] == pytest.approx(values, abs=6e-5)
    gains = [float(x) for x in re.findall(r"^  \S+ +([-+]\d\.\d+)  \[", text, re.M)]
    expected = [*(rows["--no-exclude-history"] - rows["as the run has it"]),
                *(rows["--ground-with tuned"] - rows["as the run has it"])]
    assert gains == pytest.approx(expected, abs=6e-5) and len(gains) == 2 * len(METRICS)


def test_a_flag_that_would_change_nothing_is_refused(folder, capsys):
    assert choose.main([str(folder), "--lists", "titles,beams", "--ground-with", "tuned"]) == 2
    assert "--ground-with goes with --lists beams" in capsys.readouterr().err


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    assert choose.main([str(tmp_path / "none")]) == 2
    assert "experiments.choose wants the folder of a run" in capsys.readouterr().err
