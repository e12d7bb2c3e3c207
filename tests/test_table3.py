"""experiments/table3.py: cells are made once, rates come from validation."""

import json
import math

import numpy as np
import pytest
from conftest import small_runs

import cetrec
from evaluate import METRICS
from experiments import id_baselines, table3

SYSTEMS = {"SASRec": (id_baselines.main, ["--method", "sasrec", "--epochs", "2", "--width", "8"]),
           "BIGRec": (cetrec.main, ["--temporal", "none", "--max-steps", "2", "--batch-size", "16",
                                    "--limit-train", "64"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a table of two systems, which was asked for twice."""
    out = tmp_path_factory.mktemp("table")
    with small_runs() as patch:
        patch.setattr(table3, "SYSTEMS", {name: (command, own) for name, (command, own) in
                                          SYSTEMS.items()})
        flags = ["--seeds", "0", "1", "--systems", "SASRec", "BIGRec", "--eval-sequences", "6",
                 "--out", str(out)]
        assert table3.main(flags) == 0
        before = {path: path.stat().st_mtime_ns for path in (out / "table3").glob("*/run.json")}
        assert table3.main(flags) == 0                      # nothing is left to be run
        after = {path: path.stat().st_mtime_ns for path in (out / "table3").glob("*/run.json")}
        assert after == before and len(after) == 2 * (3 + 1)    # three rates, one more seed
    return out / "table3"


def test_the_table_holds_means_and_deviations_at_the_rate_that_validation_prefers(folder):
    lines = (folder / "table3.md").read_text().splitlines()
    assert lines[0].startswith("6 test sequences, 300 candidates") and lines[0].endswith("0, 1")
    runs = json.loads((folder / "cells.json").read_text())
    records = {line: json.loads((folder / run / "run.json").read_text())
               for line, run in runs.items()}
    for name, chosen in (("sasrec", lambda t: -max(t["validation_ndcg10"])),
                         ("none", lambda t: min(t["validation_ta"]))):
        first = {line: chosen(record["tuning"]) for line, record in records.items()
                 if f" {name} " in line and "--seed 0 " in line}
        assert len(first) == 3
        rate = min(first, key=first.get).split("--lr ")[1]
        cells = [record for line, record in records.items()
                 if f" {name} " in line and line.endswith(f"--lr {rate}")]
        kind = "all items scored" if name == "sasrec" else "5 beams, grounded"
        hits = [record["rows"][kind]["HR@5"][0] for record in cells]
        row = next(line for line in lines if f"| {kind} |" in line)
        assert len(cells) == 2
        assert f"| {np.mean(hits):.4f} ± {np.std(hits, ddof=1):.4f} |" in row
        assert f" | {rate} | " in row
    assert sum("| BIGRec |" in line for line in lines) == 2         # two lists
    popular = [record["rows"]["popularity"]["HR@10"][0] for line, record in records.items()
               if " none " in line and line.endswith(f"--lr {rate}")]
    (row,) = (line for line in lines if line.startswith("| popularity"))
    assert f"| {np.mean(popular):.4f} |" in row


def test_a_cell_that_fails_or_is_interrupted_ends_the_table_and_is_not_kept(tmp_path, monkeypatch,
                                                                            capsys):
    for status, message in ((2, "this cell failed"), (130, "continues with this cell")):
        monkeypatch.setattr(table3, "SYSTEMS", {"SASRec": (lambda flags, s=status: s, [])})
        monkeypatch.setattr(table3, "ID", table3.SYSTEMS["SASRec"][0])
        monkeypatch.setattr(table3, "best_rate", lambda cells, name, seed, flags: table3.record(
            cells, name, seed, 0.1, flags))
        assert table3.main(["--systems", "SASRec", "--out", str(tmp_path)]) == status
        assert message in capsys.readouterr().err
        assert not (tmp_path / "table3" / "cells.json").exists()


def test_a_change_from_few_hits_is_a_dash():
    metrics = {metric: [0.001, math.nan] for metric in METRICS}
    rows = {"beams": metrics, "beams | change, reversed": dict.fromkeys(METRICS, [math.nan] * 2)}
    (line,) = table3.lines_of("CFT", [{"tuning": {"seconds": 60}, "rows": rows}] * 2, 0.5)
    assert line == f"| CFT | beams |{' 0.0010 ± 0.0000 |' * 4} – % | 0.5 | 1.0 |  |  |"


def test_an_unknown_system_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        table3.main(["--systems", "BERT4Rec"])
    assert stop.value.code == 2 and "invalid choice: 'BERT4Rec'" in capsys.readouterr().err


def test_every_system_of_the_paper_has_a_command_that_knows_its_flags():
    assert len(table3.SYSTEMS) == 10 + 3                # the paper's, and three with another loss
    for command, own in table3.SYSTEMS.values():
        with pytest.raises(SystemExit) as stop:
            command([*own, "--help"])
        assert stop.value.code == 0
