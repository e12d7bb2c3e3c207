"""Table 3: every system of the paper in one protocol, mean and standard deviation over seeds.

    python -m experiments.table3 --data ml-100k --seeds 0 1 2

A cell is a system with a seed, and is one run of cetrec.py, of experiments.llm_baselines or of
experiments.id_baselines; cells that are there are not run again (experiments/cells.py). With the
first seed each system is trained at a third, at once and at three times its default learning rate.
The rate that is best on its own validation, where the test split is not looked at, is the one it
gets.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import cetrec
from evaluate import METRICS
from experiments import id_baselines, llm_baselines
from experiments.cells import Cells
from experiments.markup import head, md
from experiments.reproduce import spread
from support.counting import known
from support.files import read_object, write_whole
from support.options import Options, Where, add_flags, as_flag, defaults, parse
from support.terminal import Parser, exit_status

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
# HR@5 in the Table 3 of the paper, on MovieLens and on Steam, as far as it was at hand: of
# Llama-3-8B, on other data, by its own lists.
PAPER = {"Caser": ("0.0667", "0.0307"), "BIGRec": ("", "0.0778"), "CETRec-SinPE": ("", "0.0670")}
COUNTING = ("popularity", "co-occurrence, newest item", "co-occurrence, whole history")


def record(cells: Cells, name: str, seed: int, lr: float, flags: dict) -> dict:
    """run.json of a system's run."""
    command, own = SYSTEMS[name]
    argv = own + [x for key, value in (flags | {"seed": seed}).items()
                  if command is not ID or key != "model" for x in (as_flag(key), str(value))]
    return read_object(cells.folder(command, [*argv, "--lr", f"{lr:.2g}"]) / "run.json")


def best_rate(cells: Cells, name: str, seed: int, flags: dict) -> float:
    """Of the default learning rate, a third and three times as much, the best on validation: by
    NDCG@10 for the ID models, by the loss of the answers for the others."""
    command, own = SYSTEMS[name]
    chosen = {key: flags[key] for key in flags.keys() & {"data", "model"}}
    rate = (defaults(id_baselines.Recipe, own[1])["lr"] if command is ID else
            Options.from_flags(chosen).lr)
    errors = {}
    for lr in (rate, rate / 3, 3 * rate):
        tuning = record(cells, name, seed, lr, flags)["tuning"]
        errors[lr] = (-max(tuning["validation_ndcg10"]) if command is ID else
                      min(tuning["validation_ta"]))
    return min(errors, key=errors.get)


def lines_of(name: str, records: list[dict], rate: float) -> list[str]:
    """Rows of the Markdown table: one for each list that a system makes."""
    lines = []
    minutes = np.mean([record["tuning"]["seconds"] for record in records]) / 60
    for change in (row for row in records[0]["rows"] if " | change, reversed" in row):
        row = change.partition(" | ")[0]
        cells = [spread([record["rows"][row][metric][0] for record in records])
                 for metric in METRICS]
        reversed_by = np.mean([record["rows"][change]["NDCG@10"][0] for record in records])
        paper = PAPER.get(name, ("", "")) if row != "10 beams on titles" else ("", "")
        lines.append(md(name, row, *cells, f"{known(reversed_by, '+.0f')} %", f"{rate:.2g}",
                        f"{minutes:.1f}", *paper))
    return lines


def table(systems: list[str], seeds: list[int], flags: dict, out: Path) -> list[str]:
    """Run what is not there, and give the table as lines of Markdown."""
    cells = Cells(out, len(systems) * (3 + len(seeds)))
    lines = head("system", "list", *METRICS, "NDCG@10 reversed", "rate", "minutes",
                 "paper's HR@5, MovieLens", "paper's HR@5, Steam")
    for name in systems:
        rate = best_rate(cells, name, seeds[0], flags)
        records = [record(cells, name, seed, rate, flags) for seed in seeds]
        lines += lines_of(name, records, rate)
    for baseline in COUNTING:
        means = [np.mean([record["rows"][baseline][m][0] for record in records]) for m in METRICS]
        lines.append(md(baseline, "", *(f"{x:.4f}" for x in means), *[""] * 5))
    return [records[0]["protocol"] + f"; seeds {', '.join(map(str, seeds))}", "", *lines]


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print and write table3.md. Returns the exit status."""
    ap = Parser(prog="python -m experiments.table3",
                description="All systems of Table 3 on one data set, in one protocol.")
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                    help="one run for each (default: 0 1 2)")
    ap.add_argument("--systems", nargs="+", choices=[*SYSTEMS], default=[*SYSTEMS], metavar="NAME",
                    help=f"of these (default: all): {', '.join(SYSTEMS)}")
    add_flags(ap, Options, Where, only=SHARED)
    flags = parse(ap, argv)

    def work() -> None:
        """All cells, then the table."""
        systems, seeds = flags.pop("systems"), flags.pop("seeds")
        out = Path(flags.pop("out", "runs")) / "table3"
        text = "\n".join(table(systems, seeds, flags, out)) + "\n"
        write_whole(out / "table3.md", text.encode())
        print(f"{text}written {out / 'table3.md'}")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
