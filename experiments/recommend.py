"""Ten titles for a history of titles, with their probabilities in both worlds.

    python -m experiments.recommend runs/synthetic-rope-1 "Dusty Canyon" "Silent Orbit"

The titles are given oldest first. Every title of the catalogue is scored.
"""

import sys
from pathlib import Path

import numpy as np

from cetrec import open_tuned
from experiments.titles import resolve_titles, side_by_side
from support.options import Options, add_flags, parse
from support.terminal import Parser, exit_status
from support.trie import ExactTitles


def recommend(folder: Path, typed: list[str], flags: dict) -> None:
    """Print ten titles after the typed ones, with their probabilities in both worlds of a run."""
    inputs, model = open_tuned(folder, flags, "experiments.recommend")
    if inputs.options.index == "time":
        raise ValueError(f"{folder}: its index is time, and titles without dates have none")
    titles = inputs.catalogue.titles
    history = resolve_titles(typed, titles)
    recommender = ExactTitles(model, inputs.catalogue, inputs.options.exclude_history)
    print("history, oldest first: " + ", ".join(
        f"{titles[item]} [k={k}]" for item, k in zip(history, range(len(history) - 1, -1, -1))))
    erased = np.zeros(len(history))             # every item at k = 0, as erase_order puts them
    print(side_by_side(titles, recommender([history]), recommender([history], [erased])))


def main(argv: list[str] | None = None) -> int:
    """Parse and recommend. Returns the exit status."""
    ap = Parser(prog="python -m experiments.recommend", usage="RUN TITLE [TITLE ...] [flags]",
                description="Recommend ten titles after a history of titles, in both worlds. Flags "
                "that are not given are as in the run.")
    ap.add_argument("run", metavar="RUN", help="folder of a run, as cetrec.py writes it")
    ap.add_argument("titles", metavar="TITLE", nargs="+", help="1 to 10 titles, oldest first; "
                    "case, year and small slips do not matter")
    add_flags(ap, Options, only={"data_dir", "device", "dtype", "model", "exclude_history"})
    flags = parse(ap, argv)
    folder, titles = Path(flags.pop("run")), flags.pop("titles")
    return exit_status(lambda: recommend(folder, titles, flags))


if __name__ == "__main__":
    sys.exit(main())
