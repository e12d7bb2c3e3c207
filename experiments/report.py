"""Finished runs: tables, paired differences, figures, and one page that holds them (Fig. 4, 5).

    python -m experiments.report runs/synthetic-rope-1                          one run
    python -m experiments.report runs/synthetic-rope-1 runs/synthetic-sinpe-1   a comparison

A list of ten is of one *kind*: beams, titles or exact, as the flag --lists calls them.
"""

import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from evaluate import METRICS, mean_and_error, summarise
from experiments import figures
from experiments.markup import e, score_table, table
from support.counting import format_table
from support.files import read_object
from support.options import LISTS
from support.runs import read_catalogue
from support.terminal import Parser, exit_status

# ----------------------------------------------------------------------------------------------
# A run as its folder has it


@dataclass(frozen=True)
class Run:
    """A run with its latest evaluation, which is its own or that of --eval-only."""

    name: str
    folder: Path
    source: str                     # run.json or eval.json
    record: dict                    # what is in it
    log: list[dict]                 # a line for each step
    arrays: dict[str, np.ndarray]   # by test sequence
    titles: list[str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Run":
        """Raises FileNotFoundError or ValueError that name the file."""
        folder, anew = Path(folder), f"python cetrec.py --eval-only {folder} evaluates it anew"
        own, later = folder / "run.json", folder / "eval.json"
        record = read(own, read_record, "wanted the folder of a run, as cetrec.py writes it")
        source, prefix = own, ""
        if later.is_file() and later.stat().st_mtime >= own.stat().st_mtime:
            record, source, prefix = read(later, read_record, anew), later, "eval-"
        if "rows" not in record:
            raise ValueError(f"{source}: this run is not complete; python cetrec.py --resume "
                             f"{folder} goes on with it")

        def arrays_of_record(path: Path) -> dict[str, np.ndarray]:
            if hashlib.sha256(path.read_bytes()).hexdigest() != record["arrays"]:
                raise ValueError(f"not of the same evaluation as {source.name} beside it")
            return load_file(path)
        arrays = read(folder / f"{prefix}evaluation.safetensors", arrays_of_record, anew)
        titles = read(folder / "catalogue.json", lambda path: read_catalogue(path.parent)[1], anew)
        log = []
        if (folder / "log.jsonl").is_file():
            log = read(folder / "log.jsonl", lambda path: [
                dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()],
                "without the file there is a report without curves")
        return cls(folder.resolve().name, folder, source.name, record, log, arrays, titles)

    @property
    def options(self) -> dict:
        """The options of the run, with those of its latest evaluation."""
        return self.record["options"]

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of list -> the name that it has in rows and arrays.

        Rows stand in the order of support.trie.recommenders, kinds in that of the flag. Baselines
        that score every item have one list only. It is compared with lists of all kinds.
        """
        kinds = [kind for kind in reversed(LISTS) if kind in self.options["lists"]]
        names = [name for name in self.record["rows"] if f"values/{name}/original" in self.arrays]
        named = dict(zip(kinds, names if len(names) > 1 else names * len(kinds)))
        return {kind: named[kind] for kind in self.options["lists"] if kind in named}

    @property
    def lists(self) -> list[str]:
        """The names of all lists in rows and arrays."""
        return list(dict.fromkeys(self.kinds.values()))

    @property
    def setting(self) -> str:
        """What usually distinguishes runs."""
        method = self.record["method"]
        name = self.options["temporal"] if method == "cetrec" else method
        return f"{name}, λ = {self.options['lambda_ct']:g}" if method in ("cetrec", "cft") else name


def read(path: Path, parse: Callable, otherwise: str):
    """parse(path). Raises FileNotFoundError or ValueError that name the file and what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {otherwise}")
    try:
        return parse(path)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged, or of another version of this program ({error!r}); "
                         f"{otherwise}") from None


def read_record(path: Path) -> dict:
    """What run.json or eval.json holds. Raises KeyError for what a report cannot do without."""
    record = read_object(path)
    missing = {"lists", "temporal", "lambda_ct", "index", "sinpe_scale"} - record["options"].keys()
    missing |= {"method"} - record.keys()
    if "rows" in record:
        missing |= {"protocol", "arrays"} - record.keys()
    if missing:
        raise KeyError(min(missing))
    return record


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Runs under names of their own: folders called alike take their parent's name or a number."""
    runs = [Run.from_folder(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{Path(folder).resolve().parent.name}-{name}"
                 for folder, name in zip(folders, names)]
    for i, name in enumerate(names):
        if name in names[:i]:
            names[i] = f"{name}-{i + 1}"
    return [replace(run, name=name) for run, name in zip(runs, names)]


# ----------------------------------------------------------------------------------------------
# One run


def members_of_groups(run: Run) -> dict[str, np.ndarray]:
    """Test sequences by length of history, and by whether training saw the answer.

    name -> (n,) bool
    """
    lengths = (run.arrays["history"] >= 0).sum(axis=1)
    seen = run.arrays["seen"][run.arrays["target"]]
    groups = {f"history of {low}" + (f" to {high}" if high > low else ""):
              (low <= lengths) & (lengths <= high)
              for low, high in ((3, 3), (4, 6), (7, 9), (10, 10))}
    return groups | {"answer seen": seen, "answer unseen": ~seen}


def groups(run: Run) -> dict[str, dict]:
    """What each kind of list is worth for each group that has members, as rows of a table."""
    rows = {}
    for name in run.lists:
        values = run.arrays[f"values/{name}/original"]
        rows[name] = summarise(values)
        rows |= {f"{name} | {group} ({members.sum():,})": summarise(values[members])
                 for group, members in members_of_groups(run).items() if members.any()}
    return rows


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the items of one's lists that are in the other's, whatever their place."""
    there = (one[:, :, None] == other[:, None, :]).any(axis=2)
    return float(there[one >= 0].mean())


COLUMNS = {
    "coverage": "share of the catalogue that is recommended at least once",
    "popularity": "how often an item was the answer in training, on average over recommended items",
    "titles": "share of the beams whose free text is a title of the catalogue",
    "first beams": "the same, of the best beam of each history",
    "exact tens": "share of the items of the exact lists that are found",
    "exact firsts": "share of the first items of the exact lists that come first here too"}


def recommended(run: Run) -> tuple[list[str], dict[str, list[str]]]:
    """What is recommended: the columns that there is something in, and a line of cells for each
    kind of list and for the answers."""
    popularity, targets = run.arrays["popularity"], run.arrays["target"]
    lists = {name: run.arrays[f"lists/{name}/original"] for name in run.lists}
    exact = lists.get(run.kinds.get("exact"))
    lines = {}
    for name, tens in lists.items():
        used, valid = tens[tens >= 0], run.arrays[f"valid/{name}/original"]
        cells = [f"{100 * len(np.unique(used)) / len(run.titles):.1f} %",
                 f"{popularity[used].mean():.1f}"]
        cells += [f"{100 * part.mean():.1f} %" for part in (valid, valid[:, :1])
                  ] if valid.size else ["", ""]
        cells += [] if exact is None or tens is exact else [
            f"{100 * agreement(exact, tens):.1f} %",
            f"{100 * (exact[:, 0] == tens[:, 0]).mean():.1f} %"]
        lines[name] = cells
    lines["test answers"] = ["", f"{popularity[targets].mean():.1f}"]
    shown = [i for i in range(len(COLUMNS)) if any("".join(c[i:i + 1]) for c in lines.values())]
    return [list(COLUMNS)[i] for i in shown], {
        name: [(cells + [""] * len(COLUMNS))[i] for i in shown] for name, cells in lines.items()}


def lists_table(run: Run) -> str:
    """The same as text, with a legend."""
    names, lines = recommended(run)
    width = max(map(len, lines))
    rows = [f"{head:<{width}}" + "".join(f"{cell:>{len(name) + 2}}"
                                         for name, cell in zip(names, cells))
            for head, cells in ({"": names} | lines).items()]
    return "\n".join(line.rstrip() for line in rows) + "\n" + "\n".join(
        f"  {name}: {COLUMNS[name]}" for name in names)


def standing(run: Run) -> str:
    """Where a run on the synthetic world is between the best recommender that is blind to order
    and the best that knows it."""
    rows = run.record["rows"]
    blind, aware = rows["best, order-blind"], rows["best, order-aware"]
    if any(aware[m][0] - blind[m][0] <= max(1e-9, blind[m][1]) for m in METRICS):
        return ("order decides nothing here: the best order-aware and the best order-blind "
                "recommender coincide")
    lines = ["on the way from the best order-blind recommender (0 %) to the best order-aware one "
             "(100 %)"]
    for name in run.lists:
        way = {m: (rows[name][m][0] - blind[m][0]) / (aware[m][0] - blind[m][0]) for m in METRICS}
        lines.append(f"  {name}: " + ", ".join(f"{m} {100 * x:+.0f} %" for m, x in way.items()))
    return "\n".join(lines)


BY_GROUP = "by length of history, and by whether training saw the answer"


def effect(run: Run) -> str:
    """The effect of order on the answers, where there is a temporal embedding, else nothing."""
    answers = run.arrays.get("answers")
    if answers is None:
        return ""
    (nats, error), (p, p_error) = (mean_and_error(part[:, 0] - part[:, 1])
                                   for part in (answers, np.exp(answers)))
    return ("effect of order on the answer (Eq. 7), factual minus erased world\n"
            f"  log p {nats:+.4f} ± {error:.4f} nats, p {p:+.5f} ± {p_error:.5f}")


def describe(run: Run) -> str:
    """All that is known of one run, as text."""
    parts = [
        f"{run.name} | {run.setting} | evaluation in {run.source}\n{run.record['protocol']}\n"
        f"{format_table(run.record['rows'])}\n{effect(run)}".rstrip("\n"),
        f"{BY_GROUP}\n{format_table(groups(run))}",
        f"what is recommended\n{lists_table(run)}"]
    if "best, order-blind" in run.record["rows"]:
        parts.append(standing(run))
    return "\n\n".join(parts)


def shown(run: Run) -> str:
    """The same as HTML, below what the run was: data, base, seed, day, options."""
    o, versions = run.options, run.record.get("versions", {})
    day = datetime.datetime.fromtimestamp((run.folder / run.source).stat().st_mtime).date()
    facts = [["data", o["data"]], ["base", run.record.get("base", o["model"])],
             ["method", run.setting], ["seed", o["seed"]], ["evaluated", f"{day:%d %B %Y}"],
             ["on", f"{versions.get('device', 'unknown')}, torch {versions.get('torch', '?')}"]]
    names, lines = recommended(run)
    parts = [table(["", ""], [[name, e(value)] for name, value in facts]),
             "<details><summary>all options</summary>" + table(["", ""], [
                 [f"<code>{name}</code>", e(value)] for name, value in o.items()]) + "</details>",
             score_table(run.record["rows"], e(run.record["protocol"])),
             f"<p>{e(effect(run))}</p>" if effect(run) else "",
             f"<h3>{BY_GROUP}</h3>", score_table(groups(run)), "<h3>what is recommended</h3>",
             table(["", *names], [[e(name), *cells] for name, cells in lines.items()],
                   "; ".join(f"{name}: {COLUMNS[name]}" for name in names))]
    if "best, order-blind" in run.record["rows"]:
        parts += [f"<p>{e(line.strip())}</p>" for line in standing(run).splitlines()]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------
# Several runs


def paired_bootstrap(one: np.ndarray, other: np.ndarray, resamples: int = 2_000,
                     seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """other - one for every metric, with the 95 % interval of resampled test sequences.

    one, other: what lists for the same sequences are worth, (n, 4) each.
    -> metric: (difference, low, high)
    """
    rng, n, gains = np.random.default_rng(seed), len(one), other - one
    means = np.stack([gains[rng.integers(0, n, n)].mean(axis=0) for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return {name: (float(d), float(a), float(b))
            for name, d, a, b in zip(METRICS, gains.mean(axis=0), low, high)}


def cases(run: Run, rows: np.ndarray) -> np.ndarray:
    """The histories and answers of some test sequences, to be compared.  -> (len(rows), 11)"""
    history = run.arrays["history"][rows]           # padded to the longest of this evaluation
    padded = np.full((len(rows), 11), -1)
    padded[:, :history.shape[1]], padded[:, -1] = history, run.arrays["target"][rows]
    return padded


def common_sequences(first: Run, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Where the test sequences that both have are in the arrays of each.

    Raises ValueError if there are none, or if they are not the same in both.
    """
    _, of_first, of_run = np.intersect1d(first.arrays["sequence"], run.arrays["sequence"],
                                         return_indices=True)
    if first.titles != run.titles or not np.array_equal(cases(first, of_first),
                                                        cases(run, of_run)):
        raise ValueError(f"{run.name} was tested on other data than {first.name}; wanted runs of "
                         "one data set, prepared alike")
    if not len(of_run):
        raise ValueError(f"{run.name} shares no test sequence with {first.name}; evaluate both "
                         "with --eval-sequences 0")
    return of_first, of_run


def kind_rows(runs: Sequence[Run], kind: str) -> dict[str, dict]:
    """What lists of one kind are worth, and what reversal changes: two rows for each run."""
    rows = {}
    for run in runs:
        name, scores = run.kinds[kind], run.record["rows"]
        rows[f"{run.name}, {run.setting}"] = scores[name]
        rows[f"{run.name}, {run.setting} | change, reversed"] = scores[f"{name} | change, reversed"]
    return rows


def differences(first: Run, run: Run, kind: str) -> tuple[str, list[list[str]]]:
    """What lists of one kind are worth in a run, minus what they are worth in the first: a line on
    that, and for each metric its name, the difference and its interval."""
    of_first, of_run = common_sequences(first, run)
    one = first.arrays[f"values/{first.kinds[kind]}/original"][of_first]
    other = run.arrays[f"values/{run.kinds[kind]}/original"][of_run]
    return (f"{run.name} minus {first.name} on the same {len(one):,} test sequences, with the 95 "
            "% interval of a paired bootstrap"), [
            [name, f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
            for name, (difference, low, high) in paired_bootstrap(one, other).items()]


def comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError for runs that cannot be compared."""
    first, others = runs[0], runs[1:]
    for run in others:
        common_sequences(first, run)
        if not first.kinds.keys() & run.kinds.keys():
            raise ValueError(f"{run.name} has {', '.join(run.kinds)} and {first.name} has "
                             f"{', '.join(first.kinds)}: no lists of one kind; evaluate one of "
                             "them again with other --lists")


def protocols(runs: Sequence[Run]) -> list[str]:
    """How the runs were evaluated: one line if all alike."""
    lines = [run.record["protocol"] for run in runs]
    return lines[:1] if len(set(lines)) == 1 else [
        f"{run.name} | {line}" for run, line in zip(runs, lines)]


def compared(runs: Sequence[Run]) -> list[tuple[str, dict, list]]:
    """For each kind of list: the lists' names, the rows of a table, and the paired differences of
    the others to the first run. Raises ValueError for runs that cannot be compared."""
    comparable(runs)
    first, parts = runs[0], []
    for kind in dict.fromkeys(kind for run in runs for kind in run.kinds):
        have = [run for run in runs if kind in run.kinds]
        parts.append((" / ".join(dict.fromkeys(run.kinds[kind] for run in have)),
                      kind_rows(have, kind),
                      [differences(first, run, kind) for run in have[1:] if kind in first.kinds]))
    return parts


def compare(runs: Sequence[Run]) -> str:
    """What each run reached, and the differences to the first, for each kind of list, as text."""
    lines = protocols(runs)
    for names, rows, gaps in compared(runs):
        lines += ["", names, format_table(rows)]
        for heading, of_metrics in gaps:
            lines.append(heading)
            lines += [f"  {name:<8}{gap}  {interval}" for name, gap, interval in of_metrics]
    return "\n".join(lines)


def compared_shown(runs: Sequence[Run]) -> str:
    """The same as HTML."""
    parts = [f"<p>{e(line)}</p>" for line in protocols(runs)]
    for names, rows, gaps in compared(runs):
        parts += [f"<h3>{e(names)}</h3>", score_table(rows)]
        for heading, of_metrics in gaps:
            parts.append(table(["", *(name for name, _, _ in of_metrics)], [
                ["difference", *(gap for _, gap, _ in of_metrics)],
                ["interval", *(interval for _, _, interval in of_metrics)]], e(heading)))
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------
# The report


def telling_user(run: Run, without: Run | None = None) -> int:
    """The first test sequence whose answer the run lists as long as the history is in order, and
    another run, if given, does not list; else the first of all."""
    def lists_answer(of_run: Run, order: str) -> np.ndarray:
        tens = of_run.arrays[f"lists/{of_run.lists[0]}/{order}"]
        return (tens == of_run.arrays["target"][:, None]).any(axis=1)
    served = lists_answer(run, "original") & ~lists_answer(run, "reversed")
    if without is not None:
        of_run, of_other = common_sequences(run, without)
        missed = np.zeros(len(served), dtype=bool)
        missed[of_run] = ~lists_answer(without, "original")[of_other]
        served &= missed
    return int(np.argmax(served))


def change_rates(runs: Sequence[Run], kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fig. 4's bars for one kind of list: what reversal changes in each run; for a single run what
    reversal and shuffling change.  name -> (mean (4,), error (4,)), per cent"""
    def bars(run: Run, order: str) -> tuple[np.ndarray, np.ndarray]:
        scores = run.record["rows"][f"{run.kinds[kind]} | change, {order}"]
        mean, error = np.array([scores[metric] for metric in METRICS], dtype=float).T
        return mean, error
    if len(runs) == 1:
        return {order: bars(runs[0], order) for order in ("reversed", "shuffled")}
    return {f"{run.name}, {run.setting}": bars(run, "reversed") for run in runs
            if kind in run.kinds}


def drawings(runs: Sequence[Run], user: int) -> list[tuple[str, str, object]]:
    """(file name, caption, figure) of all figures that there is something to draw for."""
    drawn = [("training", "Losses while tuning", figures.training_curves(runs))]
    for kind in dict.fromkeys(kind for run in runs for kind in run.kinds):
        drawn.append((f"order-{kind}", "Change of the metrics when test histories are "
                      f"{'reversed' if len(runs) > 1 else 'reversed or shuffled'} (Fig. 4), lists: "
                      f"{kind}", figures.change_bars(change_rates(runs, kind))))
    drawn.append(("lambda", "Hit ratio against λ", figures.lambda_curve(runs)))
    history = [item for item in runs[0].arrays["history"][user].tolist() if item >= 0]
    different: dict[tuple, Run] = {}                # runs of one setting share a picture
    for run in runs:
        setting = run.options["temporal"], run.options["sinpe_scale"], run.options["index"]
        different.setdefault(setting, run)
    for run in different.values():
        drawn.append((f"temporal-{run.name}" if len(runs) > 1 else "temporal",
                      f"Temporal embedding of test sequence {user} in both worlds: "
                      f"{run.options['temporal']}",
                      figures.temporal_picture(run.options, [runs[0].titles[i] for i in history])))
    drawn.append(("case", f"Case study (Fig. 5): test sequence {user}",
                  figures.case_study(runs, user)))
    return [entry for entry in drawn if entry[2] is not None]


def write_report(runs: Sequence[Run], folder: Path, user: int | None = None) -> str:
    """Write figures and report.html of one run or several. Returns a line on what was written.

    user: the test sequence of the case study; None looks for one whom order serves.
    """
    n = len(runs[0].arrays["target"])
    if user is None:
        user = telling_user(runs[0])
    if not 0 <= user < n:
        raise ValueError(f"--user is {user}; {runs[0].name} was tested on sequences 0 to {n - 1}")
    parts = [(run.name, shown(run)) for run in runs]
    if len(runs) > 1:
        parts.insert(0, ("comparison", compared_shown(runs)))
    available = figures.figures_available()
    drawn = drawings(runs, user) if available else []
    notes = [] if available else [figures.NO_MATPLOTLIB]
    folder.mkdir(parents=True, exist_ok=True)
    heading = ", ".join(run.name for run in runs)
    path = figures.write_page(folder, heading, parts, drawn, notes)
    return f"report {path} | {len(drawn)} figures beside it" + "".join(f" | {n}" for n in notes)


def main(argv: list[str] | None = None) -> int:
    """Parse, print and write. Returns the exit status."""
    ap = Parser(prog="python -m experiments.report", usage="RUN [RUN ...] [flags]",
                description="Report on one run, or compare several on the test sequences that they "
                "share: tables, figures, and a report.html that opens without a network.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run folders, as cetrec.py writes them")
    ap.add_argument("--user", type=int, metavar="N", help="test sequence of the case study (Fig. "
                    "5), counted from 0 in the first run (default: the first whose answer is "
                    "listed, and is not when the history is reversed)")
    ap.add_argument("--out", metavar="DIR", help="folder for figures and report.html (default: the "
                    "run's own; for several runs, comparison beside the first)")
    flags = ap.parse_args(argv)

    def work() -> None:
        runs, first = read_runs(flags.runs), Path(flags.runs[0])
        print(compare(runs) if len(runs) > 1 else describe(runs[0]))
        beside = first if len(runs) == 1 else first.resolve().parent / "comparison"
        print(write_report(runs, Path(flags.out or beside), flags.user))
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
