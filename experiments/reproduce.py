"""The paper's tables and figures, each by one command, and what else one would ask of the method.

    python -m experiments.reproduce TABLE4 --data ml-100k --seeds 0 1 2
    python -m experiments.reproduce WORLD --seeds 0 1 2 3 4
    python -m experiments.reproduce READINGS --recorded      the table of the kept records, at once
    python -m experiments.reproduce READINGS --verify        run its quick cells again, and compare
    python -m experiments.reproduce runs/ml-100k-rope-1      do a run of cetrec.py again; compare

TABLE4    what temporal embeddings and counterfactual tuning add (Table 4)
FIGURE4   by how much the metrics change when test histories are reversed (Fig. 4)
FIGURE5   one user's lists with and without temporal embeddings, also for the reversed history
LAMBDA    the weight λ of L_CT (Eq. 10)
PREMISE   whether a base barely notices the order, before it is tuned and after; with --model
READINGS  every other reading of the paper that docs/readings.md names
WORLD     synthetic worlds in which order counts, or time, and what the best recommenders reach

A cell is one run of cetrec.py or of experiments.readings with one seed; cells that are there are
not run again (experiments/cells.py). At the end TARGET-DATA.md and TARGET-DATA.jsonl are written
below --out: the tables, and the records that they are made of, which are what run.json of each cell
has for them. Records of that kind are kept in experiments/results.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import cetrec
from evaluate import FEWEST, METRICS
from experiments import figures, readings
from experiments.cells import Cells
from experiments.markup import head, md
from experiments.report import (LOSSES, Run, on_common, paired, read, read_log, read_record,
                                telling_user)
from support.checkpoints import find_checkpoint
from support.files import read_object, write_whole
from support.options import Options, Where, add_flags, as_flag, parse
from support.processes import rank
from support.runs import open_inputs
from support.terminal import Parser, exit_status

RESULTS = Path(__file__).parent / "results"
SHARED = {"data", "data_dir", "sample", "model", "chronological", "limit_train", "lr", "epochs",
          "batch_size", "max_steps", "lists", "eval_sequences", "device", "dtype", "micro_batch",
          "out"}
LOCAL = {"data_dir", "model", "device", "dtype", "micro_batch"}     # of one machine, not recorded
NAMING = ("data", "chronological", "limit_train", "model")      # what tells records apart
BEYOND = ("best, clock-aware", "best, order-aware", "best, order-blind",
          "co-occurrence, newest item", "co-occurrence, whole history", "popularity")
SHARES = (0, 0.05, 0.1, 0.25, 0.5, 1)
MISLED = "best, order-aware | reversed"
A_RUN = "wanted the folder of a run, as cetrec.py writes it"

# ----------------------------------------------------------------------------------------------
# What is run. A section is a table: its title, and the flags of each of its rows. The first row is
# the one that the others are compared with.

Section = tuple[str, dict[str, list[str]]]


def tuned(kind: str, lambda_ct: str, *more: str) -> list[str]:
    """Flags of a run with a temporal embedding."""
    return ["--temporal", kind, "--lambda-ct", lambda_ct, *more]


PLAIN = ["--temporal", "none"]
ABLATION = {"w.o. Both": PLAIN,
            "w.o. CT, SinPE": tuned("sinpe", "0"), "CETRec-SinPE": tuned("sinpe", "0.1"),
            "w.o. CT, RoPE": tuned("rope", "0"), "CETRec-RoPE": tuned("rope", "0.1")}
PREMISE = {"w.o. Both": PLAIN, "before tuning": [*PLAIN, "--lr", "0", "--max-steps", "1"],
           **{name: ABLATION[name] for name in ("w.o. CT, RoPE", "CETRec-RoPE")}}
STATED = tuned("rope", "0.1")
OTHER_READINGS = {
    "as stated": ["--reading", "stated", *STATED],
    "D1: k counts from the oldest": ["--reading", "chronological", *STATED],
    "D1: erased to the oldest": ["--reading", "erase-to-oldest", *STATED],
    "D2: inside attention": tuned("rope-attention", "0.1"),
    "D3: erased world is a given": ["--reading", "stopped", *STATED],
    "D3: probabilities": ["--reading", "probabilities", *STATED],
    "D7: best beam alone": [*STATED, "--ground-list", "single"],
    "D8: SinPE as it is": tuned("sinpe", "0.1"),
    "D8: SinPE, scale 0.1": tuned("sinpe", "0.1", "--sinpe-scale", "0.1"),
    "D8: SinPE, scale 0.01": tuned("sinpe", "0.1", "--sinpe-scale", "0.01"),
    "D10: length penalty 1": [*STATED, "--length-penalty", "1"],
    "D11: grounded by the tuned weights": [*STATED, "--ground-with", "tuned"],
    "D13: history kept": [*STATED, "--no-exclude-history"],
    "erased by permuting k": ["--reading", "permuted", *STATED],
    "text shuffled": ["--reading", "shuffled-text", *STATED],
    "text shuffled, k permuted": ["--reading", "shuffled-text-permuted", *STATED]}


def world_sections() -> Iterable[Section]:
    """Worlds by what counts in them: nothing but the set, order, or order and time."""
    def rows(kinds: Iterable[str], indices: Iterable[str], more: list[str]) -> dict:
        """w.o. Both, and each embedding by each index with and without L_CT."""
        found = {"w.o. Both": [*PLAIN, *more]}
        for kind in kinds:
            for index in indices:
                by = ["--index", index, *more]
                found |= {f"w.o. CT, {kind}, {index}": tuned(kind, "0", *by),
                          f"CETRec, {kind}, {index}": tuned(kind, "0.1", *by)}
        return found
    titles, both = ["--lists", "titles"], ("order", "time")
    everything = ("rope", "rope-attention", "sinpe")
    yield "Order and time count nothing (s = 0)", rows(
        ["rope"], both, [*titles, "--order-strength", "0"])
    yield "Order counts, time does not (s = 1, c = 0)", rows(["rope"], both, titles)
    for clock, kinds in (("0.5", ["rope"]), ("1", everything)):
        yield f"Time counts (s = 1, c = {clock})", rows(kinds, both, [*titles, "--clock", clock])
    yield "Time counts (s = 1, c = 1), 2,000 training sequences", rows(
        everything, both, [*titles, "--clock", "1", "--limit-train", "2000"])


TARGETS: dict[str, Callable[[], Iterable[Section]]] = {
    "TABLE4": lambda: [("Table 4", ABLATION)],
    "FIGURE4": lambda: [("Table 4", ABLATION)],         # the same runs, and the same records
    "FIGURE5": lambda: [("Figure 5", {"w.o. Both": PLAIN, "CETRec-RoPE": STATED})],
    "LAMBDA": lambda: [("λ", {f"λ = {x}": tuned("rope", x) for x in (
        "0", "0.01", "0.1", "0.5", "1", "10")})],
    "PREMISE": lambda: [("Premise", PREMISE)],
    "READINGS": lambda: [("Readings", OTHER_READINGS)],
    "WORLD": world_sections}


# ----------------------------------------------------------------------------------------------
# From cells to tables. A cell's record is run.json, less what no table needs

Records = dict[str, list[dict]]         # row of a section -> its record for each seed


def short(run: Run) -> dict:
    """What is kept of a run with its latest lists: for each list its four metrics, by how much they
    change where histories are reversed or shuffled, and the standard errors of all that."""
    record = read_object(run.folder / "run.json") | run.record
    shown = {row: scores for row, scores in record["rows"].items()
             if row in (*BEYOND, MISLED, *lists_of(record)) or " | change, " in row}
    rows = {row: [[round(x, 5) for x in scores[m]] for m in METRICS]
            for row, scores in shown.items()}
    return {"seed": record["options"]["seed"], "protocol": record["protocol"],
            "effect": [round(x, 4) for x in record.get("effect", [])],
            "validation_ta": round(min(record["tuning"]["validation_ta"]), 4),
            "seconds": round(record["tuning"]["seconds"], 1), "rows": rows,
            "worlds": worlds_by_share(run.folder / "worlds.json")}


def worlds_by_share(path: Path) -> dict[str, list[float]]:
    """What experiments.readings noted of the worlds, when each of SHARES of tuning was done: the
    mean over the twentieth before, or the first note."""
    if not path.is_file():
        return {}
    notes = read_object(path)["notes"]
    width, found = max(1, len(notes) // 20), {key: [] for key in notes[0]}
    for share in SHARES:
        last = max(1, round(share * len(notes)))
        for key, values in found.items():
            values.append(round(float(np.mean([
                note[key] for note in notes[max(0, last - width):last]])), 4))
    return found


def means(records: list[dict], row: str) -> np.ndarray:
    """The four metrics of a row for each seed.  -> (seeds, 4)"""
    return np.array([record["rows"][row] for record in records])[:, :, 0]


def rates(records: list[dict], row: str, order: str) -> np.ndarray:
    """The changes of the four metrics of a row for each seed, in per cent.  -> (seeds, 4)

    They are nan where fewer than ten hits tell them. Records of earlier versions do not know that,
    but where answers were drawn, HR@K counts the hits, and those of NDCG@K are the same.
    """
    found = means(records, f"{row} | change, {order}")
    for record, of_seed in zip(records, found):
        n = re.match(r"([\d,]+) test sequences(?!.* true distribution)", record["protocol"])
        if n:
            shares = np.repeat([mean for mean, _ in record["rows"][row][::2]], 2)
            of_seed[(int(n[1].replace(",", "")) * shares).round() < FEWEST] = math.nan
    return found


def spread(values, form: str = ".4f") -> str:
    """Mean ± standard deviation, where there are several; – where one of them is not known."""
    if np.isnan(values).any():
        return "–"
    sign = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{sign}"


def table(records: Records) -> list[str]:
    """What the lists of each row are worth, and where the best and the simplest stand."""
    lines = head("", "list", *METRICS, "NDCG@10 reversed, %", "shuffled, %", "effect, nats",
                 "validation L_TA")
    for name, of_seeds in records.items():
        effect = (spread([r["effect"][0] for r in of_seeds], "+.2f") if of_seeds[0]["effect"]
                  else "")
        loss = spread([r["validation_ta"] for r in of_seeds])
        for kind in lists_of(of_seeds[0]):
            change = [spread(rates(of_seeds, kind, order)[:, -1], "+.1f")
                      for order in ("reversed", "shuffled")]
            lines.append(md(name, kind, *map(spread, means(of_seeds, kind).T), *change, effect,
                            loss))
    of_seeds = next(iter(records.values()))
    for name in BEYOND:
        if name in of_seeds[0]["rows"]:
            reached, change = means(of_seeds, name), ""
            if name == "best, order-aware":
                few = any(math.isnan(record["rows"][name][-1][1]) for record in of_seeds)
                misled = math.nan if few else means(of_seeds, MISLED)
                change = spread(100 * (misled / reached - 1)[:, -1], "+.1f")
            lines.append(md(name, "", *map(spread, reached.T), change, "", "", ""))
    return lines


def worlds_table(records: Records) -> list[str]:
    """How much the erased world leaves open about the next token in the course of tuning, and at
    its end the factual world's entropy and the losses."""
    shown = {name: [r["worlds"] for r in of_seeds] for name, of_seeds in records.items()
             if of_seeds[0]["worlds"]}
    lines = head("entropy, nats", *(f"erased at {100 * share:g} %" for share in SHARES), "factual",
                 "L_TA", "L_CT") if shown else []
    for name, worlds in shown.items():
        cells = [spread(values, ".2f") for values in zip(*(w["erased"] for w in worlds))]
        cells += [spread([w[key][-1] for w in worlds], ".3f")
                  for key in ("factual", "loss_ta", "loss_ct")]
        lines.append(md(name, *cells))
    return lines


def lists_of(record: dict) -> list[str]:
    """The lists that a run made, by the names of their rows."""
    return [row.partition(" | ")[0] for row in record["rows"] if " | change, reversed" in row]


def changes(records: Records) -> list[str]:
    """Fig. 4: by how much each metric changes under reversal, in per cent."""
    lines = head("reversed, %", "list", *METRICS)
    for name, of_seeds in records.items():
        for kind in lists_of(of_seeds[0]):
            lines.append(md(name, kind, *(spread(values, "+.1f")
                                          for values in rates(of_seeds, kind, "reversed").T)))
    return lines


def compared(runs: dict[str, list[Run]]) -> list[str]:
    """Each row minus the first, list by list, on the same test sequences of all seeds together.

    The interval is that of other test sequences, for the models as they are: it does not hold what
    another seed of tuning would change.
    """
    (first, base), *others = runs.items()
    lines = head(f"minus {first}", "list", *METRICS)
    for name, of_seeds in others:
        for kind, row in of_seeds[0].kinds.items():
            pairs = [[run.arrays[f"values/{run.kinds[kind]}/original"] for run in on_common(pair)]
                     for pair in zip(base, of_seeds)]
            gains = paired(*(np.concatenate(values) for values in zip(*pairs)))
            lines.append(md(name, row, *(f"{gain} {interval}" for _, gain, interval in gains)))
    return lines


# ----------------------------------------------------------------------------------------------
# Figures, for which matplotlib is wanted


def drawing(target: str, runs: dict[str, list[Run]], records: Records):
    """The figure of a target, or None. Where it shows single runs, they are of the first seed."""
    if not figures.figures_available():
        print(figures.NO_MATPLOTLIB)
        return None
    first = [of_seeds[0] for of_seeds in runs.values()]
    if target == "FIGURE4":
        bars = {}
        for name, of_seeds in records.items():
            values = rates(of_seeds, first[0].lists[0], "reversed")
            error = values.std(axis=0, ddof=1) if len(values) > 1 else None
            bars[name] = values.mean(axis=0), error
        return figures.change_bars(bars)
    if target == "FIGURE5":
        plain, temporal = on_common(first)
        return figures.case_study([plain, temporal], telling_user(temporal, without=plain))
    if target == "LAMBDA":
        return figures.lambda_curve([run for of_seeds in runs.values() for run in of_seeds])
    if target == "READINGS":
        worlds = {name: read_object(run.folder / "worlds.json")["notes"]
                  for name, run in zip(runs, first) if (run.folder / "worlds.json").is_file()}
        return figures.entropy_curves(worlds, first[0].record["vocabulary"])
    return None


# ----------------------------------------------------------------------------------------------
# The cells, tables and records of a target


def command_of(row: list[str], seed: int, flags: dict) -> tuple[Callable, list[str]]:
    """The command of a cell, and all its arguments; those of its row count more than the flags."""
    command = readings.main if "--reading" in row else cetrec.main
    shared = [x for key, value in (flags | {"seed": seed}).items() if as_flag(key) not in row
              for x in ([as_flag(key)] if value is True else [as_flag(key), str(value)])]
    return command, [*row, *shared]


def reproduce(target: str, seeds: list[int], flags: dict, out: Path) -> list[str]:
    """Run what is not there; write tables, records and figures. Returns the tables as Markdown."""
    sections = list(TARGETS[target]())
    cells = Cells(out, sum(len(rows) for _, rows in sections) * len(seeds))
    kept, figure, stated = [], None, {key: flags[key] for key in flags.keys() - LOCAL}
    for title, rows in sections:
        runs = {name: [Run.from_folder(cells.folder(*command_of(row, seed, flags)))
                       for seed in seeds] for name, row in rows.items()}
        records = {name: list(map(short, of_seeds)) for name, of_seeds in runs.items()}
        kept += [{"section": title, "row": name, "given": stated} | record
                 for name, of_seeds in records.items() for record in of_seeds]
        kept += [{"section": title, "compared": line} for line in compared(runs)]
        figure = drawing(target, runs, records)
    name, lines = name_of(target, flags), markdown(target, kept)
    write_whole(out / f"{name}.jsonl", "".join(json.dumps(x) + "\n" for x in kept).encode())
    write_whole(out / f"{name}.md", ("\n".join(lines) + "\n").encode())
    if figure is not None:
        write_whole(out / f"{name}.svg", figures.image(figure, name, "svg"))
    return [*lines, "", f"written {out / name}.md, .jsonl{' and .svg' if figure else ''}"]


def name_of(target: str, flags: dict) -> str:
    """What a target's files are called."""
    flags = {"data": "synthetic"} | flags
    return "-".join([target, *(key if flags[key] is True else Path(str(flags[key])).name
                               for key in NAMING if flags.get(key))])


def markdown(target: str, kept: list[dict]) -> list[str]:
    """All tables of a target as lines of Markdown, with headings where it has several sections."""
    lines, titles = [], dict.fromkeys(entry["section"] for entry in kept)
    for title in titles:
        of_section = [entry for entry in kept if entry["section"] == title]
        records = rows_of(of_section)
        first = next(iter(records.values()))
        seeds = ", ".join(str(record["seed"]) for record in first)
        lines += ["", f"### {title}"] * (len(titles) > 1)
        lines += ["", f"{first[0]['protocol']}; seed{'s' * (len(first) > 1)} {seeds}", ""]
        if target == "FIGURE4":
            lines += changes(records)
        else:
            compared = [entry["compared"] for entry in of_section if "compared" in entry]
            lines += [*table(records), "", *compared]
            if worlds := worlds_table(records):
                lines += ["", *worlds]
    return lines[1:]


def rows_of(kept: list[dict]) -> Records:
    """The records of one section by the names of their rows."""
    records: Records = {}
    for entry in kept:
        if "row" in entry:
            records.setdefault(entry["row"], []).append(entry)
    return records


def record_file(folder: Path, name: str) -> Path:
    """The file of kept records of that name. Figure 4 has those of Table 4."""
    return folder / f"{name.replace('FIGURE4', 'TABLE4')}.jsonl"


def recorded(target: str, flags: dict) -> list[dict]:
    """The kept records of a target. Raises FileNotFoundError."""
    path = record_file(RESULTS, name_of(target, flags))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; there are records of "
                                f"{', '.join(sorted(p.stem for p in RESULTS.glob('*.jsonl')))}")
    return read_records(path)


def read_records(path: Path) -> list[dict]:
    """What a file of kept records holds: cells, and lines of comparison."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def verify(target: str, count: int, flags: dict, out: Path) -> list[str]:
    """Run the quickest cells of the kept records again. Raises ValueError where a metric is more
    than three standard errors away: another processor rounds otherwise, which tuning carries on."""
    rows = dict(TARGETS[target]())
    cells = [entry for entry in recorded(target, flags) if "row" in entry]
    cells = sorted(cells, key=lambda cell: cell["seconds"])[:count]
    runs, lines, far = Cells(out, len(cells)), [], 0.0
    for was in cells:
        command, argv = command_of(rows[was["section"]][was["row"]], was["seed"], was["given"] | {
            key: flags[key] for key in flags.keys() & LOCAL})
        now = short(Run.from_folder(runs.folder(command, argv)))
        gaps = {}
        for row, scores in was["rows"].items():
            (old, error), (new, _) = (np.array(x).T for x in (scores, now["rows"][row]))
            of_few = abs(old) / math.sqrt(FEWEST)           # from fewer hits it would be larger
            error = np.where(np.isnan(error), of_few, error).clip(min=1e-4)
            gaps[row] = float(np.nan_to_num(abs(new - old) / error).max())
        worst = max(gaps, key=gaps.get)
        far = max(far, gaps[worst])
        lines.append(f"{was['section']} | {was['row']} | seed {was['seed']} | " + (
            "the same" if not gaps[worst] else
            f"at most {gaps[worst]:.2f} standard errors away, of {worst}"))
    if far > 3:
        raise ValueError("\n".join(["the records were not found again", *lines]))
    return lines


# ----------------------------------------------------------------------------------------------
# One run, done again


def run_again(folder: Path, flags: dict) -> None:
    """Do a finished run of cetrec.py again in a new folder, and print where the two differ.

    A tiny base that is not below the new folder's parent is made again. Raises FileNotFoundError or
    ValueError, also where data or base are not what they were.
    """
    if extra := sorted(flags.keys() - {"data_dir", "device", "model", "out"}):
        raise ValueError(f"{folder}: a run is done again with its own data, base and tuning; that "
                         f"does not go with {', '.join(map(as_flag, extra))}")
    record, was = read(folder / "run.json", read_record, A_RUN), results(folder)
    here = {key: flags[key] for key in flags.keys() & {"data_dir", "device"}}
    if record["method"] != "cetrec":
        raise ValueError(f"{folder}: a run of {record['method']}; only those of cetrec.py are done "
                         "again")
    try:
        options = Options.from_record(record["options"], **{"shard": False} | here)
    except TypeError as error:
        raise ValueError(f"{folder / 'run.json'}: not the record of a run of this version "
                         f"({error})") from None
    options.check_use(here)
    out = Path(flags.get("out", folder.parent))
    source = find_checkpoint(flags["model"]) if "model" in flags else None
    again = cetrec.tune(open_inputs(options, out, source, same_as=folder), out)
    if not rank():
        print(f"{folder} and {again}, which does it again:", *differences(was, results(again)),
              sep="\n")


def results(folder: Path) -> dict[str, dict[tuple, float]]:
    """The losses and the metrics of a run, whose places (step, name) and (row, name) tell. Raises
    FileNotFoundError or ValueError if anything of it is missing."""
    rows = read(folder / "run.json", read_record, A_RUN).get("rows")
    if rows is None:
        raise ValueError(f"{folder}: this run is not complete; python cetrec.py --resume {folder} "
                         "continues it")
    log = read(folder / "log.jsonl", read_log, "its losses are compared, so copy it from where the "
               "run was made")
    return {"losses": {(line["step"], key): line[key] for line in log
                       for key in sorted(LOSSES) if line.get(key) is not None},
            "metrics": {(row, metric): mean for row, scores in rows.items()
                        for metric, (mean, _) in scores.items()}}


def differences(was: dict, now: dict) -> list[str]:
    """Where losses and metrics of two runs, as results has them, differ most: a line on each."""
    lines = []
    for name, one in was.items():
        other = now[name]
        gaps = {key: 0.0 if str(one.get(key)) == str(other.get(key)) else    # nan equals nan, too
                abs(one[key] - other[key]) if key in one.keys() & other.keys() else math.inf
                for key in one | other}
        worst = max(gaps, key=gaps.get)
        lines.append(f"  {len(gaps):,} {name} | " + (
            "all the same, to the last digit" if not gaps[worst] else f"the largest difference is "
            f"{gaps[worst]:.2g}, of {worst[1]} at {worst[0]}"))
    return lines


# ----------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print and write. Returns the exit status."""
    ap = Parser(prog="python -m experiments.reproduce", usage="TARGET|RUN [flags]",
                description="Make a table or a figure of the paper, or of this project's own; or "
                "do a run of cetrec.py again.")
    ap.add_argument("target", metavar="TARGET|RUN", help=f"one of {', '.join(TARGETS)}; or the "
                    "folder of a run, which is done again beside it, and compared; that goes with "
                    "--out, --device, --data-dir, and --model where its base has moved")
    ap.add_argument("--seeds", type=int, nargs="+", metavar="N",
                    help="one run of every cell for each (default: 0 1 2)")
    kept = ap.add_mutually_exclusive_group()
    kept.add_argument("--recorded", action="store_const", const=True,
                      help="print the tables of the kept records, and run nothing")
    kept.add_argument("--verify", type=int, nargs="?", const=3, metavar="N",
                      help="run the N quickest cells of the kept records again, and compare "
                      "(default: 3)")
    add_flags(ap, Options, Where, only=SHARED)
    flags = parse(ap, argv)

    def work() -> None:
        """What the flags ask for."""
        target = flags.pop("target")
        if (Path(target) / "run.json").is_file():
            run_again(Path(target), flags)
            return
        if target not in TARGETS:
            raise ValueError(f"{target}: neither one of {', '.join(TARGETS)} nor the folder of a "
                             "run")
        out = Path(flags.pop("out", "runs")) / "reproduce"
        recorded_only, count = flags.pop("recorded", False), flags.pop("verify", None)
        if recorded_only or count is not None:
            ours, more = ("--recorded", set()) if recorded_only else ("--verify", LOCAL)
            if extra := flags.keys() - NAMING - more:
                raise ValueError(f"{ours} takes runs from the records; it does not go with "
                                 f"{', '.join(map(as_flag, sorted(extra)))}")
        if count is not None and count < 1:
            raise ValueError(f"--verify {count}: wanted a number of cells, from 1 on")
        seeds = flags.pop("seeds", [0, 1, 2])
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"--seeds {' '.join(map(str, seeds))}: each seed counts once")
        if target == "WORLD" and flags.get("data", "synthetic") != "synthetic":
            raise ValueError("WORLD is about synthetic worlds; drop --data")
        if recorded_only:
            lines = markdown(target, recorded(target, flags))
        elif count is not None:
            lines = verify(target, count, flags, out)
        else:
            lines = reproduce(target, seeds, flags, out)
        print("\n".join(lines))
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
