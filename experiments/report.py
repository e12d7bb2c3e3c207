"""Finished runs: tables, paired differences, figures, and one page that holds them (Fig. 4, 5).

    python -m experiments.report runs/synthetic-rope-1                          one run
    python -m experiments.report runs/synthetic-rope-1 runs/synthetic-sinpe-1   a comparison

A list of ten is of one *kind*: beams, titles or exact, as the flag --lists calls them.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from evaluate import FEWEST, METRICS, mean_and_error, relative_change, summarise
from experiments import figures
from experiments.markup import Html, Part, as_html, as_text, h, scores, table
from support.counting import known
from support.files import read_object
from support.options import LARGEST, LISTS, Options, defaults
from support.runs import read_catalogue
from support.terminal import Parser, exit_status, visible

ORDERS = ("original", "reversed", "shuffled")           # of test histories
LOSSES = {"loss", "loss_ta", "loss_ct", "validation_ta"}
KINDS = {"beams, grounded": "beams", "beams on titles": "titles", "all titles scored": "exact"}
SHAPES = {"method": str, "options": dict, "counts": dict, "protocol": str, "arrays": str,
          "rows": dict, "evaluated": str, "vocabulary": int, "versions": dict, "settings": dict,
          "checksums": dict, "baseline": dict}          # of what is read in run.json
USED = ("data", "chronological", "model", "seed", "temporal", "lambda_ct", "index", "sinpe_scale",
        "lists", "eval_sequences")                      # of the options; others are shown as text

# ----------------------------------------------------------------------------------------------
# A run as its folder has it


@dataclass(frozen=True)
class Run:
    """A run with the evaluation that counts (see evaluations)."""

    name: str
    folder: Path
    source: str                     # of the record: run.json, eval.json, eval-2.json ...
    record: dict
    others: dict[str, dict]         # source -> record of every other evaluation
    log: list[dict]                 # a line for each step
    arrays: dict[str, np.ndarray]   # by test sequence
    titles: list[str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Run":
        """Raises FileNotFoundError or ValueError that name the file."""
        folder, log = Path(folder), []
        anew = f"python cetrec.py --eval-only {folder} evaluates it anew"
        others = evaluations(folder, anew)
        source = next(iter(others))
        record = others.pop(source)
        titles = read(folder / "catalogue.json", lambda path: read_catalogue(path.parent)[1],
                      "copy it from where the run was made")
        prefix = "" if source == "run.json" else f"{source.removesuffix('.json')}-"
        arrays = read(folder / f"{prefix}evaluation.safetensors",
                      lambda path: read_arrays(path, record["arrays"], len(titles)), anew)
        if (folder / "log.jsonl").is_file():
            log = read(folder / "log.jsonl", read_log,
                       "without the file there is a report without curves")
        run = cls(visible(folder.resolve().name), folder, source, record, others, log, arrays,
                  titles)
        for name in lists_in(arrays):
            rows = {name, f"{name} | change, reversed", f"{name} | change, shuffled"}
            if name not in run.lists or rows - record["rows"].keys():
                raise ValueError(f"{folder / source}: damaged; its options or its rows are without "
                                 f"the lists called {name}; {anew}")
        return run

    @property
    def options(self) -> dict:
        """The options of the run, with those of its evaluation."""
        return self.record["options"]

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of list, in the order of --lists -> the name that it has in rows and arrays.

        Baselines that score every item have one list only. It is compared with lists of all kinds.
        """
        found: dict[str, str] = {}
        for name in lists_in(self.arrays):
            kind = KINDS.get(name.lstrip("0123456789 "))
            found |= {kind: name} if kind else dict.fromkeys(LISTS, name)
        return {kind: found[kind] for kind in self.options["lists"] if kind in found}

    @property
    def lists(self) -> list[str]:
        """The names of all lists in rows and arrays."""
        return list(dict.fromkeys(self.kinds.values()))

    @property
    def setting(self) -> str:
        """What usually distinguishes runs."""
        method = self.record["method"]
        name = self.options["temporal"] if method == "cetrec" else visible(method)
        return f"{name}, λ = {self.options['lambda_ct']:g}" if method in ("cetrec", "cft") else name


# ----------------------------------------------------------------------------------------------
# Reading. Each file is checked here, once, and what the checks let pass everything below can show


def read(path: Path, parse: Callable, otherwise: str):
    """parse(path). Raises FileNotFoundError or ValueError that name the file and what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {otherwise}")
    try:
        return parse(path)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged, or of another version of this program "
                         f"({what.removeprefix(f'{path}: ')}); {otherwise}") from None


def is_number(x) -> bool:
    """Can it be shown as a number? nan can: it stands for what is not known."""
    return type(x) in (int, float) and not abs(x) > LARGEST


def read_record(path: Path) -> dict:
    """What run.json or eval.json holds; without "rows" if the run is not complete."""
    record = read_object(path)
    for key in ["method", "options", "counts"] + ["protocol", "arrays"] * ("rows" in record):
        record[key]
    for key in record.keys() & SHAPES.keys():
        if type(record[key]) is not SHAPES[key]:
            raise ValueError(f"{key} is {record[key]!r:.60}; wanted a value of type "
                             f"{SHAPES[key].__name__}")
    options = record["options"]
    Options.from_record(defaults(Options) | {name: options[name] for name in USED})
    if not is_number(record["counts"]["test"]) or record.get("vocabulary", 1) < 1:
        raise ValueError("its vocabulary or its test sequences are no number")
    for row, found in record.get("rows", {}).items():
        if type(found) is not dict or found.keys() != METRICS.keys() or not all(
                type(score) is list and len(score) == 2 and all(map(is_number, score))
                for score in found.values()):
            raise ValueError(f"row {row!r:.60} is {found!r:.60}; wanted mean and standard error of "
                             f"{', '.join(METRICS)}")
    return record


def read_arrays(path: Path, digest: str, items: int) -> dict[str, np.ndarray]:
    """The arrays that go with a record and a catalogue."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("not of the same evaluation as the record beside it")
    arrays = load(content)
    for key in ("sequence", "target", "history", "seen", "popularity", *(
            f"{what}/{name}/{order}" for what in ("lists", "values", "valid")
            for name in lists_in(arrays) for order in ORDERS)):
        arrays[key]
    if not lists_in(arrays) or len(arrays["popularity"]) != items:
        raise ValueError(f"not lists of the {items:,} items in catalogue.json")
    return arrays


def lists_in(arrays: dict[str, np.ndarray]) -> list[str]:
    """The names of the lists that an evaluation made."""
    return [key.split("/")[1] for key in sorted(arrays)
            if key.startswith("values/") and key.endswith("/original")]


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl: of a step with its losses, or of an epoch with its validation."""
    lines = [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        keys = {"step"} | LOSSES & line.keys() | ({"loss_ct"} if "loss_ta" in line else set())
        if not all(is_number(line[key]) or line[key] is None and key == "loss_ct"      # for λ = 0
                   for key in sorted(keys)):
            raise ValueError(f"{line!r:.60} has other values than numbers")
    return lines


def evaluations(folder: Path, anew: str) -> dict[str, dict]:
    """The records of all evaluations of a run by their files, the one that counts first.

    That is the one of the most test sequences, and of equal ones the last. One from before the end
    of tuning is of factors that are no more; it counts only while the run is not complete. What is
    recorded decides: the times of files change when a folder is copied.
    """
    own = read(folder / "run.json", read_record,
               "wanted the folder of a run, as cetrec.py writes it")
    found = {path.name: read(path, read_record, f"delete it, and {anew}")
             for path in sorted(folder.iterdir()) if re.fullmatch(r"eval(-\d+)?\.json", path.name)
             } | {"run.json": own}

    def weight(source: str) -> tuple:
        """What counts more is greater."""
        record, at = found[source], found[source].get("evaluated", "")
        size = min(record["options"]["eval_sequences"] or math.inf, record["counts"]["test"])
        return at >= own.get("evaluated", ""), size, at
    ended = [source for source, record in found.items() if "rows" in record]
    if not ended:
        raise ValueError(f"{folder / 'run.json'}: this run is not complete; python cetrec.py "
                         f"--resume {folder} goes on with it")
    return {source: found[source] for source in sorted(ended, key=weight, reverse=True)}


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Runs under names of their own: folders called alike take their parent's name or a number."""
    runs = [Run.from_folder(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{visible(Path(folder).resolve().parent.name)}-{name}"
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


def recommended(run: Run) -> Part:
    """What is recommended, in columns that there is something in."""
    popularity = run.arrays["popularity"]
    lists = {name: run.arrays[f"lists/{name}/original"] for name in run.lists}
    exact, lines = lists.get(run.kinds.get("exact")), {}

    def share(part: np.ndarray | float) -> str:
        return f"{100 * np.mean(part):.1f} %"
    for name, tens in lists.items():
        used, valid = tens[tens >= 0], run.arrays[f"valid/{name}/original"]
        lines[name] = {"coverage": share(len(np.unique(used)) / len(run.titles)),
                       "popularity": f"{popularity[used].mean():.1f}"}
        if valid.size:
            lines[name] |= {"titles": share(valid), "first beams": share(valid[:, :1])}
        if exact is not None and tens is not exact:
            lines[name] |= {"exact tens": share(agreement(exact, tens)),
                            "exact firsts": share(exact[:, 0] == tens[:, 0])}
    lines["test answers"] = {"popularity": f"{popularity[run.arrays['target']].mean():.1f}"}
    head = [column for column in COLUMNS if any(column in cells for cells in lines.values())]
    rows = [[name, *(cells.get(column, "") for column in head)] for name, cells in lines.items()]
    return ("what is recommended", ["", *head], rows,
            "; ".join(f"{column}: {COLUMNS[column]}" for column in head))


def standing(run: Run) -> Part:
    """Where a run on the synthetic world is between the best recommender that is blind to order
    and the best that knows it."""
    rows = run.record["rows"]
    blind, aware = rows["best, order-blind"], rows["best, order-aware"]
    if any(math.isnan(blind[m][1]) for m in METRICS):
        return "too few test sequences to say where the lists are between the best recommenders"
    if any(aware[m][0] - blind[m][0] <= max(1e-9, blind[m][1]) for m in METRICS):
        return ("order decides nothing here: the best order-aware and the best order-blind "
                "recommender coincide")
    way = {name: [(rows[name][m][0] - blind[m][0]) / (aware[m][0] - blind[m][0]) for m in METRICS]
           for name in run.lists}
    return ("on the way from the best order-blind recommender (0 %) to the best order-aware one "
            "(100 %)", ["", *METRICS],
            [[name, *(f"{100 * x:+.0f} %" for x in shares)] for name, shares in way.items()])


def effect(answers: np.ndarray) -> str:
    """The effect of order on the answers, whose log p in both worlds is given."""
    (nats, error), (p, p_error) = (mean_and_error(part[:, 0] - part[:, 1])
                                   for part in (answers, np.exp(answers)))
    return (f"effect of order on the answer (Eq. 7): log p {nats:+.4f} ± {known(error, '.4f')} "
            f"nats, p {p:+.5f} ± {known(p_error, '.5f')}")


def evaluation(source: str, record: dict) -> str:
    """Which evaluation it is, and how it was done."""
    return f"{source}, {record.get('evaluated', 'at a time not recorded')}: {record['protocol']}"


def about(run: Run) -> list[Part]:
    """All that is known of one run's lists."""
    parts = [scores(evaluation(run.source, run.record), run.record["rows"])]
    if "answers" in run.arrays:             # where there is a temporal embedding
        parts.append(effect(run.arrays["answers"]))
    parts += [scores("by length of history, and by whether training saw the answer", groups(run)),
              recommended(run)]
    if {"best, order-aware", "best, order-blind"} <= run.record["rows"].keys():
        parts.append(standing(run))
    tuned = run.others.get("run.json", run.record).get("evaluated", "")
    for source, record in run.others.items():
        early = record.get("evaluated", "") < tuned
        parts.append(scores(f"{'before the end of tuning' if early else 'another evaluation'}: "
                            f"{evaluation(source, record)}", record["rows"]))
    return parts


def describe(run: Run) -> str:
    """The same as text."""
    return as_text([f"{run.name} | {run.setting}", *about(run)])


def shown(run: Run) -> Html:
    """The same as HTML, below what the run was: data, base, seed, options."""
    o, versions = run.options, run.record.get("versions", {})
    facts = [["data", o["data"]], ["base", run.record.get("base", o["model"])],
             ["method", run.setting], ["seed", o["seed"]],
             ["on", f"{versions.get('device', 'unknown')}, torch {versions.get('torch', '?')}"]]
    return h("{}\n<details><summary>all options</summary>{}</details>\n{}", table(["", ""], facts),
             table(["", ""], [[h("<code>{}</code>", name), value] for name, value in o.items()]),
             as_html(about(run)))


# ----------------------------------------------------------------------------------------------
# Several runs


def paired_bootstrap(one: np.ndarray, other: np.ndarray, resamples: int = 2_000,
                     seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """other - one for every metric, with the 95 % interval of resampled test sequences.

    one, other: what lists for the same sequences are worth, (n, 4) each.
    -> metric: (difference, low, high), where nan stands for an interval from fewer than ten hits
    """
    rng, n, gains = np.random.default_rng(seed), len(one), other - one
    means = np.stack([gains[rng.integers(0, n, n)].mean(axis=0) for _ in range(resamples)])
    few = np.count_nonzero(one + other, axis=0) < FEWEST
    low, high = np.where(few, math.nan, np.quantile(means, (0.025, 0.975), axis=0))
    return {name: (float(d), float(a), float(b))
            for name, d, a, b in zip(METRICS, gains.mean(axis=0), low, high)}


def paired(one: np.ndarray, other: np.ndarray) -> list[tuple[str, str, str]]:
    """The same as text: metric, difference, interval."""
    return [(metric, f"{gain:+.4f}", "–" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]")
            for metric, (gain, low, high) in paired_bootstrap(one, other).items()]


def on_common(runs: Sequence[Run]) -> list[Run]:
    """The runs with the test sequences that all of them have, in the same order, and with the
    scores of their lists on these.

    Raises ValueError if there are none, or if they are not the same in all.
    """
    first, common = runs[0], runs[0].arrays["sequence"]
    for run in runs:
        common = np.intersect1d(common, run.arrays["sequence"])
    rows = [np.intersect1d(run.arrays["sequence"], common, return_indices=True)[1] for run in runs]
    for run, of_run in zip(runs, rows):
        if run.titles != first.titles or cases(run, of_run) != cases(first, rows[0]):
            what = ", ".join(f"{name} ({one} and {other})"
                             for name, (one, other) in differing([first, run]).items())
            raise ValueError(f"{run.name} was tested on other data than {first.name}; wanted runs "
                             f"of one data set, prepared alike, but these differ in {what}")
    if not len(common):
        raise ValueError(f"{', '.join(run.name for run in runs)} share no test sequence; evaluate "
                         "them with --eval-sequences 0")
    return [select(run, of_run) for run, of_run in zip(runs, rows)]


def select(run: Run, rows: np.ndarray) -> Run:
    """The run with some of its test sequences, and the scores of its lists on these."""
    arrays = {key: array if key in ("popularity", "seen") else array[rows]
              for key, array in run.arrays.items()}
    scores = {}
    for name in run.lists:
        original, *changed = (arrays[f"values/{name}/{order}"] for order in ORDERS)
        scores[name] = summarise(original)
        for order, values in zip(ORDERS[1:], changed):
            scores[f"{name} | change, {order}"] = relative_change(original, values)
    return replace(run, arrays=arrays, record=run.record | {"rows": scores})


def cases(run: Run, rows: np.ndarray) -> list[list[int]]:
    """The history of each of these test sequences, without what pads it, and its answer."""
    return [[*history[history >= 0], answer] for history, answer in zip(
        run.arrays["history"][rows], run.arrays["target"][rows])]


def differing(runs: Sequence[Run]) -> dict[str, list]:
    """The options, data and bases that the runs do not have in common.  name -> value of each run
    """
    found = []
    for record in (run.record for run in runs):
        data = {f"{part}: {key}": value for part in ("counts", "checksums")
                for key, value in record.get(part, {}).items()}
        found.append({"method": record["method"], **record["options"], **record.get("baseline", {}),
                      **data, "base": record.get("settings", {}).get("base")})
    values = {name: [facts.get(name) for facts in found]
              for name in dict.fromkeys(name for facts in found for name in facts)}
    return {name: of_runs for name, of_runs in values.items()
            if any(value != of_runs[0] for value in of_runs)}


def of_one_kind(runs: Sequence[Run], kind: str) -> list[Part]:
    """What lists of one kind are worth in each run, and what reversal changes; and the differences
    to the first of these runs."""
    rows, parts = {}, []
    for run in runs:
        name, of_run = run.kinds[kind], run.record["rows"]
        rows[f"{run.name}, {run.setting}"] = of_run[name]
        rows[f"{run.name}, {run.setting} | change, reversed"] = of_run[f"{name} | change, reversed"]
    one, *others = (run.arrays[f"values/{run.kinds[kind]}/original"] for run in runs)
    for run, other in zip(runs[1:], others):
        head, gains, intervals = zip(("", "difference", "interval"), *paired(one, other))
        parts.append((f"{run.name} minus {runs[0].name}, with the 95 % interval of a paired "
                      "bootstrap", head, [gains, intervals]))
    return [scores(" / ".join(dict.fromkeys(run.kinds[kind] for run in runs)), rows), *parts]


def comparison(runs: Sequence[Run]) -> list[Part]:
    """How the runs were evaluated, what differs, and what the lists of each kind are worth on the
    same test sequences. Raises ValueError for runs that cannot be compared."""
    runs, parts = on_common(runs), {}
    first = runs[0]
    for run in runs:
        if not first.kinds.keys() & run.kinds.keys():
            raise ValueError(f"{run.name} has {', '.join(run.kinds)} and {first.name} has "
                             f"{', '.join(first.kinds)}: no lists of one kind; evaluate one of "
                             "them again with other --lists")
    for kind in dict.fromkeys(kind for run in runs for kind in run.kinds):
        have = [run for run in runs if kind in run.kinds]
        names = tuple(run.kinds[kind] for run in have)      # those of baselines alone come but once
        parts[names] = of_one_kind(have, kind)
    different = [[name, *values] for name, values in differing(runs).items()]
    return [*(f"{run.name} | {evaluation(run.source, run.record)}" for run in runs),
            f"compared on the same {len(first.arrays['target']):,} test sequences",
            ("options and data that differ" + ": none" * (not different),
             ["", *(run.name for run in runs)], different),
            *(part for of_kind in parts.values() for part in of_kind)]


def compare(runs: Sequence[Run]) -> str:
    """The same as text."""
    return as_text(comparison(runs))


# ----------------------------------------------------------------------------------------------
# The report


def telling_user(run: Run, without: Run | None = None) -> int:
    """The first test sequence whose answer the run lists as long as the history is in order, and
    another run of the same sequences, if given, does not list; else the first of all."""
    def lists_answer(of_run: Run, order: str) -> np.ndarray:
        tens = of_run.arrays[f"lists/{of_run.lists[0]}/{order}"]
        return (tens == of_run.arrays["target"][:, None]).any(axis=1)
    served = lists_answer(run, "original") & ~lists_answer(run, "reversed")
    if without is not None:
        served &= ~lists_answer(without, "original")
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
    common = on_common(runs)
    for kind in dict.fromkeys(kind for run in runs for kind in run.kinds):
        drawn.append((f"order-{kind}", "Change of the metrics when test histories are "
                      f"{'reversed' if len(runs) > 1 else 'reversed or shuffled'} (Fig. 4), lists: "
                      f"{kind}", figures.change_bars(change_rates(common, kind))))
    drawn.append(("lambda", "Hit ratio against λ", figures.lambda_curve(common)))
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
        parts.insert(0, ("comparison", as_html(comparison(runs))))
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
