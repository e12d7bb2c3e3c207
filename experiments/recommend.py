"""Ten titles for a history of titles, with their probabilities in both worlds.

    python -m experiments.recommend runs/synthetic-rope-1 "Dusty Canyon" "Silent Orbit"
    python -m experiments.recommend path/to/adapter "Heat" --model path/to/base --data ml-100k
    python -m experiments.recommend path/to/base "Heat" --data ml-100k

The titles are given oldest first. Every title of the catalogue is scored.
"""

import sys
from pathlib import Path

import numpy as np

from cetrec import open_model
from experiments.titles import resolve_titles, side_by_side
from support.checkpoints import HUB_NAME, find_checkpoint
from support.files import read_object
from support.options import Options, add_flags, parse
from support.runs import open_data, read_catalogue, read_run
from support.terminal import Parser, exit_status
from support.trie import ExactTitles

FLAGS = {"data", "data_dir", "domain", "sample", "chronological", "skip_bad_lines",
         "order_strength", "clock", "seed", "model", "temporal", "sinpe_scale", "exclude_history",
         "device", "dtype"}


def tuned_with(folder: Path) -> dict:
    """The flags that an adapter without a run was tuned with, as its temporal.json says."""
    path = folder / "temporal.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a tuned adapter of ours has it")
    try:
        saved = read_object(path)
        scale = {"sinpe_scale": saved["scale"]} if saved["temporal"] == "sinpe" else {}
        return {"temporal": saved["temporal"], "index": saved["index"]} | scale
    except KeyError as error:
        raise ValueError(f"{path}: not the settings of an adapter ({error!r})") from None


def outside_a_run(where: str, given: dict) -> tuple[Options, Path | None]:
    """Options and adapter folder of an adapter, or options of a base.

    Raises FileNotFoundError or ValueError that say what else must be given.
    """
    folder = Path(where)
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file() and (
            folder.exists() or not HUB_NAME.fullmatch(where)):
        raise FileNotFoundError(
            f"{folder / 'config.json'}: not found; wanted a run (run.json), an adapter "
            "(adapter_config.json), a base (config.json) or a name on the Hub")
    if "data" not in given:
        raise ValueError(f"{where}: not a run, so name the catalogue with --data")
    if not adapter and "model" in given:
        raise ValueError(f"{where}: neither a run nor an adapter, so --model does not go with it; "
                         "give a base as WHERE")
    if adapter and given.get("model", "tiny") == "tiny":
        raise ValueError(f"{where}: an adapter, so name its base with --model, a folder or a name "
                         "on the Hub")
    if adapter:
        return Options.from_flags(tuned_with(folder) | given), folder
    return Options.from_flags(given | {"model": where}), None


def recommend(where: str, wanted: list[str], given: dict) -> None:
    """Print ten titles with their probabilities in both worlds.

    where: a run; or an adapter, with its base and the data in `given`; or a base, with the data.
    """
    of_run = (Path(where) / "run.json").is_file()
    if of_run:
        adapter = Path(where)
        options, base = read_run(adapter, given, "experiments.recommend")
    else:
        options, adapter = outside_a_run(where, given)
        base = find_checkpoint(options.model)
    if options.index == "time":
        raise ValueError(f"{where}: its index is time, and titles without dates have none")
    if of_run:
        domain, titles = read_catalogue(adapter)
    else:
        (train_set, _, _), _, _ = open_data(options)
        domain, titles = train_set.domain, train_set.titles
    history = resolve_titles(wanted, titles)
    model = open_model(options, base, adapter)
    recommender = ExactTitles(model, titles, domain, options.exclude_history)
    erased = np.zeros(len(history))             # every item at k = 0, as erase_order puts them
    print("history, oldest first: " + ", ".join(
        f"{titles[item]} [k={len(history) - 1 - i}]" for i, item in enumerate(history)))
    print(side_by_side(titles, recommender([history]), recommender([history], [erased])))


def main(argv: list[str] | None = None) -> int:
    """Parse and recommend. Returns the exit status."""
    ap = Parser(prog="python -m experiments.recommend",
                usage="WHERE TITLE [TITLE ...] [flags]",
                description="Recommend ten titles after a history of titles, in both worlds. A run "
                "knows its data and its base; for an adapter give --model and --data, for a base "
                "--data.")
    ap.add_argument("where", metavar="WHERE", help="folder of a run, of an adapter or of a base, "
                    "or a base's name on the Hugging Face Hub")
    ap.add_argument("titles", metavar="TITLE", nargs="+", help="1 to 10 titles, oldest first; "
                    "case, year and small slips do not matter")
    add_flags(ap, Options, only=FLAGS)
    given = parse(ap, argv)
    where, titles = given.pop("where"), given.pop("titles")
    return exit_status(lambda: recommend(where, titles, given))


if __name__ == "__main__":
    sys.exit(main())
