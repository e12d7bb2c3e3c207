"""experiments/reproduce.py: tables by hand, cells run once, records and runs that are verified."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import small_runs

import cetrec
from evaluate import METRICS
from experiments import figures, markup, reproduce
from experiments.report import Run
from support.files import read_object, write_json

SMALL = ["--max-steps", "2", "--limit-train", "64", "--eval-sequences", "12", "--dtype", "float32"]


def record(seed: int, first: float, effect=()) -> dict:
    """A kept record whose metrics are first, first + 0.1, .. for the one list."""
    metrics = [[first + 0.1 * i, 0.01] for i in range(4)]
    return {"seed": seed, "protocol": "1,000 test sequences, 9 candidates", "effect": list(effect),
            "seconds": 1.0, "validation_ta": 0.5 + seed, "worlds": {}, "rows": {
                "beams": metrics, "popularity": [[0.01 * seed, 0.0]] * 4,
                **{f"beams | change, {order}": [[-10.0 * i - seed, 1.0] for i in range(4)]
                   for order in ("reversed", "shuffled")},
                "best, order-aware": [[0.5, 0.0]] * 4,
                "best, order-aware | reversed": [[0.4 - 0.1 * seed, 0.0]] * 4}}


def test_a_table_is_mean_and_deviation_over_seeds_by_hand():
    lines = reproduce.table({"A": [record(0, 0.1), record(1, 0.3)],
                             "B": [record(0, 0.5, [2.0, 1.0]), record(1, 0.5, [3.0, 1.0])]})
    assert lines[2] == ("| A | beams | 0.2000 ± 0.1414 | 0.3000 ± 0.1414 | 0.4000 ± 0.1414 | "
                        "0.5000 ± 0.1414 | -30.5 ± 0.7 | -30.5 ± 0.7 |  | 1.0000 ± 0.7071 |")
    assert "| -30.5 ± 0.7 | +2.50 ± 0.71 | 1.0000 ± 0.7071 |" in lines[3]
    assert lines[4].endswith("| 0.5000 ± 0.0000 | -30.0 ± 14.1 |  |  |  |")
    assert lines[5].startswith("| popularity |  | 0.0050 ± 0.0071 |") and len(lines) == 6
    assert {line.count("|") for line in lines} == {11}
    rates = reproduce.changes({"A": [record(0, 0.1), record(1, 0.3)]})
    assert rates[2] == "| A | beams | -0.5 ± 0.7 | -10.5 ± 0.7 | -20.5 ± 0.7 | -30.5 ± 0.7 |"
    one = reproduce.table({"A": [record(0, 0.1)]})              # one seed has no deviation
    assert one[2].startswith("| A | beams | 0.1000 | 0.2000 |")


def test_changes_from_fewer_than_ten_hits_are_dashes():
    """Nine hits of a thousand at 5, ten at 10; where lists are valued by the law, nobody counts."""
    few = record(0, 0.1)
    few["rows"]["beams"] = [[0.009, 0.003], [0.005, 0.002], [0.01, 0.003], [0.006, 0.002]]
    assert reproduce.changes({"A": [few]})[2] == "| A | beams | – | – | -20.0 | -30.0 |"
    assert "| -30.0 | -30.0 |" in reproduce.table({"A": [few]})[2]
    assert reproduce.changes({"A": [record(0, 0.1), few]})[2].startswith("| A | beams | – | – | ")
    few["protocol"] += ", scored by the true distribution"
    assert reproduce.changes({"A": [few]})[2].startswith("| A | beams | +0.0 | -10.0 |")
    few["rows"]["best, order-aware"] = [[0.5, math.nan]] * 4    # of fewer than ten sequences
    assert "| best, order-aware |  | 0.5000 | 0.5000 | 0.5000 | 0.5000 | – |" in "\n".join(
        reproduce.table({"A": [few]}))


def test_what_stands_in_a_cell_of_markdown_stays_in_it():
    assert markup.md("a|b", "<i>", "\x1b", 1) == "| a\\|b | &lt;i> | \\x1b | 1 |"


def test_worlds_are_in_the_table_where_they_were_noted(tmp_path):
    (tmp_path / "worlds.json").write_text(json.dumps({"notes": [
        {"factual": float(i), "erased": 5.0, "loss_ta": 1.0, "loss_ct": 2.0} for i in range(40)]}))
    worlds = reproduce.worlds_by_share(tmp_path / "worlds.json")
    assert worlds["factual"] == [0, 0.5, 2.5, 8.5, 18.5, 38.5]
    assert worlds["erased"] == [5] * 6
    assert reproduce.worlds_by_share(tmp_path / "none.json") == {}
    lines = reproduce.worlds_table({"A": [{"worlds": {}}], "B": [{"worlds": worlds}] * 2})
    assert lines[2:] == ["| B | " + "5.00 ± 0.00 | " * 6 + "38.500 ± 0.000 | 1.000 ± 0.000 | "
                         "2.000 ± 0.000 |"]
    assert not reproduce.worlds_table({"A": [{"worlds": {}}]})


@pytest.fixture(scope="module")
def small():
    """Runs are quick."""
    with small_runs() as patch:
        yield patch


@pytest.fixture(scope="module")
def tables(small, tmp_path_factory):
    """The folder with the tables of two rows and two seeds, which were all asked for twice."""
    out = tmp_path_factory.mktemp("reproduce")
    rows = {"w.o. Both": reproduce.PLAIN, "stated": ["--reading", "stopped", *reproduce.STATED]}
    for target in ("TABLE4", "FIGURE4", "FIGURE5", "READINGS"):
        small.setitem(reproduce.TARGETS, target, lambda: [("Title", rows)])
    small.setattr(reproduce, "RESULTS", out / "reproduce")
    flags = [*SMALL, "--seeds", "0", "1", "--out", str(out)]
    assert reproduce.main(["TABLE4", *flags]) == 0
    before = {p: p.stat().st_mtime_ns for p in (out / "reproduce").glob("*/run.json")}
    for target in ("TABLE4", "FIGURE4", "FIGURE5", "READINGS"):
        assert reproduce.main([target, *flags]) == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "reproduce").glob("*/run.json")} == before
    assert len(before) == 4
    return out / "reproduce"


def test_cells_are_run_once_and_tables_hold_what_they_found(tables):
    text = (tables / "TABLE4-synthetic-64.md").read_text()
    runs = {(json.loads(p.read_text())["method"], json.loads(p.read_text())["options"]["seed"]):
            Run.from_folder(p.parent) for p in tables.glob("*/run.json")}
    plain, other = ([runs[method, seed] for seed in (0, 1)] for method in ("cetrec", "stopped"))
    hits = [run.record["rows"]["10 beams on titles"]["HR@10"][0] for run in other]
    row = next(x for x in text.splitlines() if x.startswith("| stated | 10 beams"))
    assert f"{np.mean(hits):.4f} ± {np.std(hits, ddof=1):.4f}" in row
    gains = np.concatenate([b.arrays["values/10 beams on titles/original"]
                            - a.arrays["values/10 beams on titles/original"]
                            for a, b in zip(plain, other)])
    paired = [x for x in text.splitlines() if x.startswith("| stated | 10 beams")][1]
    for cell, gain in zip(paired.split(" | ")[2:], gains.mean(axis=0)):
        assert cell.startswith(f"{gain:+.4f} [")
    assert "12 test sequences" in text and "seeds 0, 1" in text
    rates = (tables / "FIGURE4-synthetic-64.md").read_text()
    assert "minus" not in rates and "| w.o. Both | 5 beams, grounded | " in rates


def test_kept_records_make_the_same_tables_and_name_no_folder(tables, capsys):
    for target in ("TABLE4", "FIGURE4"):        # which have the same records
        name = f"{target}-synthetic-64"
        (tables / "FIGURE4-synthetic-64.jsonl").unlink(missing_ok=True)
        assert reproduce.main([target, "--recorded", "--limit-train", "64",
                               "--out", str(tables.parent)]) == 0
        printed = capsys.readouterr().out
        assert printed == (tables / f"{name}.md").read_text()
    kept = (tables / "TABLE4-synthetic-64.jsonl").read_text()
    assert str(tables) not in kept and kept.count('"row"') == 4
    assert "float32" not in kept and '"limit_train": 64' in kept


def test_records_are_verified_by_running_again(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    lines = [json.loads(line) for line in (tables / "TABLE4-synthetic-64.jsonl")
             .read_text().splitlines()]
    for shift, status in (("", 0), ("0.01", 0), ("3.5", 2)):
        if shift:
            for x in (x for x in lines if "row" in x):
                mean, error = x["rows"]["popularity"][2]
                x["rows"]["popularity"][2] = [mean + float(shift) * max(error, 1e-4), error]
        (tmp_path / "TABLE4-synthetic-64.jsonl").write_text("".join(
            json.dumps(x) + "\n" for x in lines))
        assert reproduce.main(["TABLE4", "--verify", "2", "--limit-train", "64",
                               "--out", str(tmp_path)]) == status
        printed = "".join(capsys.readouterr())
        assert printed.count("| seed ") >= 2 and ("| the same" in printed) == (not shift)
        if shift:
            assert "standard errors away, of popularity" in printed
        assert ("not found again" in printed) == (status == 2)


def test_what_few_hits_do_not_tell_is_verified_by_the_least_error_it_can_have(tables, tmp_path,
                                                                              monkeypatch, capsys):
    """Of fewer than ten hits the standard error is more than the mean by the root of ten."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    lines = [json.loads(line) for line in (tables / "TABLE4-synthetic-64.jsonl")
             .read_text().splitlines()]
    for apart, status in ((0.9, 0), (4.0, 2)):
        for x in (x for x in lines if "row" in x):
            now = read_object(next(tables.glob("synthetic-none-1")) / "run.json")
            mean = now["rows"]["popularity"]["HR@5"][0]
            x["rows"]["popularity"] = [[mean / (1 - apart / math.sqrt(10)), math.nan],
                                       *x["rows"]["popularity"][1:]]
        (tmp_path / "TABLE4-synthetic-64.jsonl").write_text("".join(
            json.dumps(x) + "\n" for x in lines))
        assert reproduce.main(["TABLE4", "--verify", "1", "--limit-train", "64",
                               "--out", str(tmp_path)]) == status
        printed = "".join(capsys.readouterr())
        assert "standard errors away, of popularity" in printed and "nan" not in printed


def test_figures_are_drawn_where_there_is_something_to_draw(tables):
    pytest.importorskip("matplotlib")
    for target in ("FIGURE4", "FIGURE5", "READINGS"):
        assert (tables / f"{target}-synthetic-64.svg").stat().st_size > 5_000
    assert not (tables / "TABLE4-synthetic-64.svg").exists()
    assert figures.entropy_curves({}, 300) is None


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    assert reproduce.main(["WORLD", "--data", "ml-100k", "--out", str(tmp_path)]) == 2
    assert "WORLD is about synthetic worlds; drop --data" in capsys.readouterr().err
    assert reproduce.main(["TABLE4", "--recorded", "--data", "no-such", "--out",
                           str(tmp_path)]) == 2
    assert "TABLE4-no-such.jsonl: not found; there are records of" in capsys.readouterr().err
    assert reproduce.main(["TABLE4", "--seeds", "1", "2", "1"]) == 2
    assert "--seeds 1 2 1: each seed counts once" in capsys.readouterr().err
    for flags, message in (
            (["--recorded", "--seeds", "1"], "--recorded takes runs from the records; it does not "
             "go with --seeds"),
            (["--verify", "--max-steps", "1"], "it does not go with --max-steps"),
            (["--verify", "0"], "--verify 0: wanted a number of cells, from 1 on")):
        assert reproduce.main(["TABLE4", *flags]) == 2
        assert message in capsys.readouterr().err
    assert reproduce.main(["TABLE5"]) == 2
    assert "TABLE5: neither one of TABLE4, FIGURE4, " in capsys.readouterr().err


def test_records_are_named_by_target_data_and_base():
    assert [reproduce.name_of("TABLE4", flags) for flags in (
        {}, {"data": "a/ml-100k", "lr": 1.0}, {"model": "x/smollm2", "limit_train": 960},
        {"data": "lastfm", "chronological": True})] == [
        "TABLE4-synthetic", "TABLE4-ml-100k", "TABLE4-synthetic-960-smollm2",
        "TABLE4-lastfm-chronological"]
    assert reproduce.name_of("TABLE4", {"chronological": False, "limit_train": 0}) == (
        "TABLE4-synthetic")                 # flags that say what is so without them


def test_what_a_row_says_counts_more_than_the_flags():
    row = reproduce.PREMISE["before tuning"]
    assert reproduce.command_of(row, 1, {"lr": 0.5, "max_steps": 9, "chronological": True}) == (
        cetrec.main, [*row, "--chronological", "--seed", "1"])


@pytest.mark.parametrize("sections", reproduce.TARGETS.values(), ids=reproduce.TARGETS.keys())
def test_every_row_of_every_target_has_flags_that_its_command_takes(sections):
    sections = list(sections())
    lines = []
    for _, rows in sections:
        for row in rows.values():
            command, argv = reproduce.command_of(row, 3, {"data": "synthetic"})
            with pytest.raises(SystemExit) as stop:
                command([*argv, "--help"])
            assert stop.value.code == 0 and argv[-2:] == ["--seed", "3"]
            lines.append(" ".join(argv))
    assert len(set(lines)) == len(lines)                        # no cell is asked for twice
    assert len({title for title, _ in sections}) == len(sections)


# ------------------------------------------------------------ One run, done again


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of two steps with its base beside it."""
    out = tmp_path_factory.mktemp("finished")
    assert cetrec.main([*SMALL, "--batch-size", "16", "--out", str(out)]) == 0
    return out / "synthetic-rope-1"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of that run and of its base, for tests that change it."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / finished.name


def change_record(folder: Path, **changes) -> None:
    """Write these parts of run.json anew; None takes one away."""
    record = read_object(folder / "run.json") | changes
    write_json(folder / "run.json", {key: x for key, x in record.items() if x is not None})


def test_a_run_is_done_again_beside_it_and_is_the_same_to_the_last_digit(copied, capsys):
    assert reproduce.main([str(copied)]) == 0
    text, again = capsys.readouterr().out, copied.parent / "synthetic-rope-2"
    assert "tiny base | step" not in text               # it lies there
    assert f"{copied} and {again}, which does it again:\n" in text
    assert re.search(r"\d+ losses \| all the same, to the last digit\n  \d+ metrics \| all the "
                     "same, to the last digit\n$", text)
    first, second = (read_object(run / "run.json") for run in (copied, again))
    for part in ("options", "settings", "rows", "effect", "counts", "base"):
        assert first[part] == second[part], part


def test_a_tiny_base_is_made_again_where_there_is_none(copied, tmp_path, capsys):
    assert reproduce.main([str(copied), "--out", str(tmp_path / "elsewhere")]) == 0
    text = capsys.readouterr().out
    assert "tiny base | step" in text and text.count("all the same, to the last digit") == 2
    assert (tmp_path / "elsewhere" / "synthetic-rope-1" / "run.json").is_file()


def test_a_base_that_has_moved_is_named_and_must_be_the_same(copied, tmp_path, capsys):
    (base,) = copied.parent.glob("tiny-*")
    moved = base.rename(tmp_path / "moved")
    assert reproduce.main([str(copied), "--model", str(moved)]) == 0
    text = capsys.readouterr().out
    assert "tiny base | step" not in text and text.count("all the same, to the last digit") == 2
    settings = read_object(copied / "run.json")["settings"]
    change_record(copied, settings=settings | {"base": "0123"})
    assert reproduce.main([str(copied), "--model", str(moved)]) == 2
    assert "settings of the run, {'base': '0123'}, is now {'base': " in capsys.readouterr().err


def test_other_data_are_refused_before_a_base_is_made(copied, tmp_path, capsys):
    counts = read_object(copied / "run.json")["counts"]
    change_record(copied, counts=counts | {"train": 65})
    assert reproduce.main([str(copied), "--out", str(tmp_path / "elsewhere")]) == 2
    assert "counts of the run, {'train': 65}, is now {'train': 64}" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("changes, message", [
    ({"rows": None}, "this run is not complete; python cetrec.py --resume "),
    ({"method": "p5"}, "a run of p5; only those of cetrec.py are done again"),
    ({"options": None}, "run.json: damaged, or of another version of this program ('options' is "
     "missing); "),
    ({"rows": {"popularity": {"HR@5": [1, 2]}}}, "row 'popularity' is {'HR@5': [1, 2]}; wanted ")])
def test_a_run_that_cannot_be_done_again_is_refused_in_one_line(copied, capsys, changes, message):
    change_record(copied, **changes)
    assert reproduce.main([str(copied)]) == 2
    refused_at_once(copied, capsys, message)


def refused_at_once(folder: Path, capsys, message: str) -> None:
    """One line, and nothing was begun."""
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert [p.name for p in folder.parent.glob("synthetic-*")] == [folder.name]


@pytest.mark.parametrize("content, message", [
    (None, "log.jsonl: not found; its losses are compared, so copy it"),
    ('{"step": 1, "loss": "x"}\n', "log.jsonl: damaged"), ('{"step": 1\n', "log.jsonl: damaged"),
    ('{"loss": 1.0}\n', "'step' is missing"),
    ('{"step": 1, "loss_ta": 1.0}\n', "'loss_ct' is missing"), ("3\n", "log.jsonl: damaged")])
def test_what_will_be_compared_is_read_before_the_work(copied, capsys, content, message):
    (copied / "log.jsonl").unlink()
    if content:
        (copied / "log.jsonl").write_text(content)
    assert reproduce.main([str(copied)]) == 2
    refused_at_once(copied, capsys, message)


@pytest.mark.parametrize("flags", [["--lr", "1"], ["--seeds", "1"], ["--verify"], ["--recorded"],
                                   ["--dtype", "bfloat16"], ["--lists", "exact"]])
def test_a_run_is_done_again_with_its_own_options(finished, capsys, flags):
    assert reproduce.main([str(finished), *flags]) == 2
    assert f"that does not go with {flags[0]}\n" in capsys.readouterr().err


def test_the_largest_differences_of_two_runs_by_hand():
    def results(losses: list[float], metric: float) -> dict:
        return {"losses": {(i, "loss"): x for i, x in enumerate(losses, start=1)},
                "metrics": {("popularity", "HR@5"): metric, ("popularity", "HR@10"): 0.5}}
    run, same = (results([3.0, 2.0, 1.5], math.nan) for _ in range(2))
    other, shorter = results([3.25, 1.5, 1.5], 0.25), results([3.0], 0.25)
    assert reproduce.differences(run, same) == ["  3 losses | all the same, to the last digit",
                                                "  2 metrics | all the same, to the last digit"]
    assert reproduce.differences(other, run)[0] == (
        "  3 losses | the largest difference is 0.5, of loss at 2")
    assert reproduce.differences(shorter, other) == [
        "  3 losses | the largest difference is inf, of loss at 2",
        "  2 metrics | all the same, to the last digit"]
    run["metrics"] = {("popularity", "HR@5"): 0.5, ("popularity", "HR@10"): 0.5}
    assert reproduce.differences(run, other)[1] == (
        "  2 metrics | the largest difference is 0.25, of HR@5 at popularity")


def test_the_results_of_a_run_are_all_its_losses_and_metrics(finished):
    found, record = reproduce.results(finished), read_object(finished / "run.json")
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert found["losses"][2, "loss_ct"] == log[1]["loss_ct"]
    assert len(found["losses"]) == 2 * 3 + 1 and (2, "validation_ta") in found["losses"]
    assert len(found["metrics"]) == len(record["rows"]) * len(METRICS)
    assert found["metrics"]["popularity", "HR@10"] == record["rows"]["popularity"]["HR@10"][0]
