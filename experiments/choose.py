"""Ways to make lists, compared on a run's validation split, where choices are made.

    python -m experiments.choose runs/synthetic-rope-1 --ground-with base --length-penalty 1

Each flag is tried by itself, beside the lists as the run has them. The test split is not looked at.
Lists are those that the run's first kind names (--lists).
"""

import sys
from dataclasses import replace
from pathlib import Path

from cetrec import open_tuned
from evaluate import list_values, summarise
from experiments.report import paired
from support.counting import format_table
from support.options import OF_BEAMS, Options, add_flags, as_flag, parse
from support.terminal import Parser, exit_status
from support.trie import make_recommenders

TRIED = OF_BEAMS | {"exclude_history"}


def choose(folder: Path, flags: dict) -> None:
    """Print what lists on validation are worth, as the run makes them and with each flag tried."""
    tried = {key: flags.pop(key) for key in sorted(flags.keys() & TRIED)}
    inputs, model = open_tuned(folder, flags, "experiments.choose")
    options = replace(inputs.options, lists=inputs.options.lists[:1])
    options.check_use(tried)
    valid_set = inputs.splits[1].sample(options.eval_sequences, options.seed)
    numbers = range(len(valid_set))
    histories = [valid_set.history(i) for i in numbers]
    ages = [valid_set.ages(i) for i in numbers] if valid_set.index == "time" else None
    true_p = None if inputs.synthetic is None else inputs.synthetic.true_distribution(
        histories, [valid_set.days(i) for i in numbers])

    ways, values = {"as the run has it": options}, {}
    for key, value in tried.items():
        name = (as_flag(key if value else f"no_{key}") if type(value) is bool else
                f"{as_flag(key)} {value}")
        ways[name] = replace(options, **{key: value})
    for name, changed in ways.items():
        (recommend,) = make_recommenders(model, inputs.catalogue, changed).values()
        lists = recommend(histories, ages, progress=name)
        values[name] = list_values(lists.items, valid_set.items[valid_set.targets], true_p)

    print(f"{len(valid_set):,} validation sequences, lists: {options.lists[0]}")
    print(format_table({name: summarise(value) for name, value in values.items()}))
    first, *others = values
    for name in others:
        print(f"{name}, minus the first, with the 95 % interval of a paired bootstrap")
        for metric, gain, interval in paired(values[first], values[name]):
            print(f"  {metric:<8}{gain}  {interval}")


def main(argv: list[str] | None = None) -> int:
    """Parse and compare. Returns the exit status."""
    ap = Parser(prog="python -m experiments.choose", usage="RUN [flags]",
                description="Compare ways to make lists on a run's validation split.")
    ap.add_argument("run", metavar="RUN", help="folder of a run, as cetrec.py writes it")
    add_flags(ap, Options, only=TRIED | {"lists", "eval_sequences", "data_dir", "device", "model"})
    flags = parse(ap, argv)
    folder = Path(flags.pop("run"))
    return exit_status(lambda: choose(folder, flags))


if __name__ == "__main__":
    sys.exit(main())
