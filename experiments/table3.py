"""Table 3: every system of the paper in one protocol, mean and standard deviation over seeds.

    python -m experiments.table3 --data ml-100k --seeds 0 1 2

A cell is a system with a seed, and is one run of cetrec.py, of experiments.llm_baselines or of
experiments.id_baselines. Cells are kept in cells.json below --out, and those that are there are not
run again. Before its cells, each system is trained with a third, once and three times its learning
rate, all alike short; the best rate by its own validation is the one it gets. The test split is not
looked at for that.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import cetrec
from evaluate import METRICS
from experiments import id_baselines, llm_baselines
from support.options import Options, Where, add_flags, as_flag, defaults, parse
from support.runs import check_writable, exit_status, write_json

ID, LLM = id_baselines.main, llm_baselines.main
SYSTEMS: dict[str, tuple[Callable, list[str]]] = {      # name -> command and its flags
    "GRU4Rec": (ID, ["--method", "gru4rec"]),
    "Caser": (ID, ["--method", "caser"]),
    "SASRec": (ID, ["--method", "sasrec"]),
    "GRU4Rec, cross-entropy": (ID, ["--method", "gru4rec", "--loss", "ce"]),
    "Caser, cross-entropy": (ID, ["--method", "caser", "--loss", "ce"]),
    "SASRec, cross-entropy": (ID, ["--method", "sasrec", "--loss", "ce"]),
    "P5": (LLM, ["--method", "p5"]),
    "BIGRec": (cetrec.main, ["--temporal", "none"]),
    "E4SRec": (LLM, ["--method", "e4srec"]),
    "LLaRA": (LLM, ["--method", "llara"]),
    "CFT": (LLM, ["--method", "cft"]),
    "CETRec-SinPE": (cetrec.main, ["--temporal", "sinpe"]),
    "CETRec-RoPE": (cetrec.main, ["--temporal", "rope"])}
SHARED = {"data", "data_dir", "sample", "model", "eval_sequences", "device", "out"}
TRIAL = {ID: ["--epochs", "5"], LLM: ["--max-steps", "100"], cetrec.main: ["--max-steps", "100"]}
FLOORS = ("popularity", "co-occurrence, newest item", "co-occurrence, whole history")


class Cells:
    """Runs below a folder, by the command line that made them."""

    def __init__(self, out: Path):
        self.out, self.index = out, out / "cells.json"
        self.folders = json.loads(self.index.read_text()) if self.index.is_file() else {}

    def record(self, command: Callable, flags: list[str]) -> dict:
        """run.json of a finished run, which is made now if it is not there. Raises ValueError for a
        run that failed, and KeyboardInterrupt for one that was interrupted."""
        line = " ".join([command.__module__, *flags])
        path = self.out / self.folders.get(line, "none") / "run.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        if "rows" in record:
            return record
        before = set(self.out.iterdir())
        status = command([*flags, "--out", str(self.out)])
        if status == 130:
            raise KeyboardInterrupt("the same command goes on with the next cell")
        if status:
            raise ValueError(f"this cell failed: {line}")
        folder, = (path for path in set(self.out.iterdir()) - before
                   if (path / "run.json").is_file())
        write_json(self.index, self.folders | {line: folder.name})
        self.folders[line] = folder.name
        return json.loads((folder / "run.json").read_text())


def flags_of(name: str, given: dict) -> list[str]:
    """A system's own flags, and those given that its command knows."""
    command, flags = SYSTEMS[name]
    return flags + [x for key, value in given.items() if command is not ID or key != "model"
                    for x in (as_flag(key), str(value))]


def best_rate(cells: Cells, name: str, given: dict) -> float:
    """The learning rate of three with which a system's validation is best after short training."""
    command, flags = SYSTEMS[name]
    rate = defaults(id_baselines.Recipe, flags[1])["lr"] if command is ID else (
        Options.from_flags({key: given[key] for key in given.keys() & {"data", "model"}}).lr)
    reached = {}
    for lr in (rate / 3, rate, 3 * rate):
        tuning = cells.record(command, [
            *flags_of(name, given | {"eval_sequences": 50, "seed": 0}), *TRIAL[command], "--lr",
            f"{lr:.2g}"])["tuning"]
        reached[lr] = (-max(tuning["validation_ndcg10"]) if command is ID else
                       min(tuning["validation_ta"]))
    return min(reached, key=reached.get)


def lines_of(name: str, records: list[dict], rate: float) -> list[str]:
    """Rows of the Markdown table: one for each list that a system makes."""
    lines = []
    minutes = np.mean([record["tuning"]["seconds"] for record in records]) / 60
    for row in (r for r in records[0]["rows"] if " | change, reversed" in r):
        made, cells = row.partition(" | ")[0], []
        for metric in METRICS:
            values = [record["rows"][made][metric][0] for record in records]
            cells.append(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
        change = [record["rows"][row]["NDCG@10"][0] for record in records]
        lines.append(f"| {name} | {made} | {' | '.join(cells)} | {np.mean(change):+.0f} % | "
                     f"{rate:.2g} | {minutes:.1f} |")
    return lines


def table(systems: list[str], seeds: list[int], given: dict, out: Path) -> list[str]:
    """Run what is not there, and give the table as lines of Markdown."""
    cells, started, done = Cells(out), time.perf_counter(), 0
    lines, records = [
        f"| system | list | {' | '.join(METRICS)} | NDCG@10 reversed | rate | minutes |",
        "|---|---|" + "---|" * (len(METRICS) + 3)], []
    for name in systems:
        rate, records = best_rate(cells, name, given), []
        for seed in seeds:
            records.append(cells.record(SYSTEMS[name][0], [
                *flags_of(name, given | {"seed": seed}), "--lr", f"{rate:.2g}"]))
            done += 1
            minutes = (time.perf_counter() - started) / 60
            left = len(systems) * len(seeds) - done
            print(f"cell {done}/{done + left} | {name}, seed {seed} | {minutes:.0f} min so far, "
                  f"about {minutes / done * left:.0f} left", flush=True)
        lines += lines_of(name, records, rate)
    for floor in FLOORS:
        means = [np.mean([record["rows"][floor][m][0] for record in records]) for m in METRICS]
        lines.append(f"| {floor} | | " + " | ".join(f"{x:.4f}" for x in means) + " | | | |")
    return [records[0]["protocol"] + f"; seeds {', '.join(map(str, seeds))}", "", *lines]


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print and write table3.md. Returns the exit status."""
    ap = argparse.ArgumentParser(
        prog="python -m experiments.table3", allow_abbrev=False,
        description="All systems of Table 3 on one data set, in one protocol.")
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                    help="one run for each (default: 0 1 2)")
    ap.add_argument("--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="NAME",
                    help=f"of these (default: all): {', '.join(SYSTEMS)}")
    add_flags(ap, Options, Where, only=SHARED)
    given = parse(ap, argv)

    def work() -> None:
        systems, seeds = given.pop("systems"), given.pop("seeds")
        out = Path(given.pop("out", "runs")) / "table3"
        check_writable(out)
        text = "\n".join(table(systems, seeds, given, out)) + "\n"
        (out / "table3.md").write_text(text, encoding="utf-8")
        print(f"{text}written {out / 'table3.md'}")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
