"""Ten titles for a history of titles, with their probabilities in both worlds.

    python -m experiments.recommend runs/synthetic-rope-1 "Dusty Canyon" "Silent Orbit"

The titles are given oldest first. Every title of the catalogue is scored.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cetrec import load_recommender
from evaluate import Lists
from support.options import Options, add_flags, parse
from support.terminal import Parser, exit_status


def recommend(folder: Path, typed: list[str], flags: dict) -> None:
    """Print ten titles after the typed ones, with their probabilities in both worlds of a run."""
    recommender = load_recommender(folder, **flags)
    titles, history = recommender.exact.catalogue.titles, recommender.history(typed)
    print("history, oldest first: " + ", ".join(
        f"{titles[item]} [k={k}]" for item, k in zip(history, range(len(history) - 1, -1, -1))))
    if len(history) < len(typed):
        print(f"the newest {len(history)} of {len(typed)} titles count, as in tuning")
    erased = np.zeros(len(history))             # every item at k = 0, as erase_order puts them
    print(side_by_side(titles, recommender.exact([history]),
                       recommender.exact([history], [erased])))


def side_by_side(titles: Sequence[str], factual: Lists, erased: Lists, length: int = 10,
                 answer: int | None = None) -> str:
    """The first titles of one history's lists in both worlds, with their probabilities.

    The answer, where it is given, is marked by *.
    """
    def cell(lists: Lists, rank: int) -> str:
        """A title with its probability, or blanks where the list has ended."""
        item = lists.items[0, rank] if rank < lists.items.shape[1] else -1
        if item < 0:
            return " " * 46
        title = titles[item] if len(titles[item]) <= 34 else titles[item][:33] + "…"
        percent = 100 * np.exp(lists.log_p[0, rank])
        return (f"{'*' if item == answer else ' '} {title:<34}"
                f"{percent:>8{'.3f' if percent >= 0.001 else '.0e'}} %")
    lines = [f"    {'factual world':<36}{'p(title)':>10}   {'erased world':<36}{'p(title)':>10}"]
    lines += [f"{rank + 1:>2}  {cell(factual, rank)}   {cell(erased, rank)}".rstrip()
              for rank in range(length)]
    if answer is not None:
        lines.append(f"* the answer: {titles[answer]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Parse and recommend. Returns the exit status."""
    ap = Parser(prog="python -m experiments.recommend", usage="RUN TITLE [TITLE ...] [flags]",
                description="Recommend ten titles after a history of titles, in both worlds. Flags "
                "that are not given are as in the run.")
    ap.add_argument("run", metavar="RUN", help="folder of a run, as cetrec.py writes it")
    ap.add_argument("titles", metavar="TITLE", nargs="+", help="titles, oldest first; case, "
                    "accents, year and small slips do not matter")
    add_flags(ap, Options, only={"device", "dtype", "model", "exclude_history"})
    flags = parse(ap, argv)
    folder, titles = Path(flags.pop("run")), flags.pop("titles")
    return exit_status(lambda: recommend(folder, titles, flags))


if __name__ == "__main__":
    sys.exit(main())
