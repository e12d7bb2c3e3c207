"""Finished runs side by side: tables, paired differences, figures, one report.html (Fig. 4, 5).

`python evaluate.py RUN [RUN ...]` is the command; a run ends with the report of its own.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from evaluate import METRICS, format_result, format_table
from experiments import figures


@dataclass(frozen=True)
class Run:
    """A run folder as read: its latest evaluation, of the run itself or of --eval-only."""

    name: str
    options: dict
    log: list[dict]                 # a line a step
    result: dict                    # of evaluate_order
    arrays: dict[str, np.ndarray]   # of evaluate_order
    titles: list[str]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Run":
        """Raises FileNotFoundError or ValueError that name the file."""
        folder = path = Path(folder)
        anew = f"python cetrec.py --eval-only {folder} writes it anew"
        for name in ("run.json", "evaluation.safetensors", "catalogue.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: not found; wanted the folder of a "
                                        f"finished run. If tuning is done, {anew}")
        try:
            path = folder / ("eval.json" if (folder / "eval.json").is_file() else "run.json")
            record = json.loads(path.read_text(encoding="utf-8"))
            options, result = dict(record["options"]), dict(record["metrics"])
            for name in ("protocol", "rows", "groups", "notes", "vocabulary", "history_titles",
                         "test_set", "arrays"):
                result[name]
            path = folder / "catalogue.json"
            titles = json.loads(path.read_text(encoding="utf-8"))["titles"]
            log, path = [], folder / "log.jsonl"
            if path.is_file():
                log = [dict(json.loads(line))
                       for line in path.read_text(encoding="utf-8").splitlines()]
            path = folder / "evaluation.safetensors"
            if hashlib.sha256(path.read_bytes()).hexdigest() != result["arrays"]:
                raise ValueError("not of the same evaluation as the figures beside it")
            arrays = load_file(path)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            if path.name in ("run.json", "log.jsonl") and not isinstance(error, KeyError):
                anew = "tune again, or take the file from a backup"
            raise ValueError(f"{path}: damaged, or of another version of this program ({error!r}); "
                             f"{anew}") from None
        return cls(folder.resolve().name, options, log, result, arrays, titles)


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


def paired_bootstrap(one: np.ndarray, other: np.ndarray, resamples: int = 2_000,
                     seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """other - one for every metric, with the 95 % interval of resampled test sequences.

    one, other: ranks of the same sequences, (n,) each. -> metric: (difference, low, high)
    """
    rng, n = np.random.default_rng(seed), len(one)
    gains = np.stack([metric(other) - metric(one) for metric in METRICS.values()])
    means = np.stack([gains[:, rng.integers(0, n, n)].mean(axis=1) for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return {name: (float(d), float(a), float(b))
            for name, d, a, b in zip(METRICS, gains.mean(axis=1), low, high)}


def compare(runs: Sequence[Run]) -> str:
    """Tables of several runs: what each reached, and the differences to the first, paired.

    Raises ValueError for runs that share no test sequence.
    """
    first = runs[0]
    if len({run.result["protocol"] for run in runs}) == 1:
        lines = [first.result["protocol"]]
    else:
        lines = [f"{run.name} | {run.result['protocol']}" for run in runs]
    rows = []
    for run in runs:
        told = f"{run.name}, {run.options['temporal']}, λ = {run.options['lambda_ct']:g}"
        rows += [(told, run.result["rows"]["original order"], ""),
                 ("  change under reversal", run.result["rows"]["change under reversal"], "%")]
    lines += ["", format_table(rows)]
    for run in runs[1:]:
        if run.result["test_set"] != first.result["test_set"]:
            raise ValueError(f"{run.name} was tested on other data than {first.name}; wanted runs "
                             "of one data set, prepared alike")
        _, here, there = np.intersect1d(first.arrays["sequence"], run.arrays["sequence"],
                                        return_indices=True)
        if not len(here):
            raise ValueError(f"{run.name} shares no test sequence with {first.name}; evaluate both "
                             "with --eval-sequences 0")
        lines += ["", f"{run.name} minus {first.name} on the same {len(here):,} test sequences, "
                  "with the 95 % interval of a paired bootstrap"]
        for name, (difference, low, high) in paired_bootstrap(
                first.arrays["ranks/original"][here], run.arrays["ranks/original"][there]).items():
            lines.append(f"  {name:<8}{difference:+.4f}  [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def write_report(runs: Sequence[Run], folder: Path, user: int = 0) -> str:
    """Figures and report.html of one run or several into a folder.  -> a line on what was written
    """
    n = runs[0].result["n"]
    if not 0 <= user < n:
        raise ValueError(f"--user is {user}; {runs[0].name} was tested on sequences 0 to {n - 1}")
    tables = [(run.name, format_result(run.result)) for run in runs]
    if len(runs) > 1:
        tables.insert(0, ("comparison", compare(runs)))
    drawn, notes = [], []
    if figures.figures_available():
        drawn = [("training", "Losses while tuning", figures.training_curves(runs)),
                 ("order", "Test histories as they are, reversed and shuffled (Fig. 4)",
                  figures.order_bars(runs)),
                 ("lambda", "Hit ratio against λ", figures.lambda_curve(runs))]
        drawn += [(f"temporal-{run.name}" if len(runs) > 1 else "temporal",
                   f"Temporal embedding of one prompt in both worlds, {run.name}",
                   figures.temporal_picture(run)) for run in runs]
        drawn.append(("case", f"Case study (Fig. 5): test sequence {user}",
                      figures.case_study(runs, user)))
        drawn = [entry for entry in drawn if entry[2] is not None]
    else:
        notes.append(figures.NO_MATPLOTLIB)
    folder.mkdir(parents=True, exist_ok=True)
    heading = ", ".join(run.name for run in runs)
    path = figures.write_page(folder, heading, tables, drawn, notes)
    return f"report {path} | {len(drawn)} figures beside it" + "".join(f" | {n}" for n in notes)
