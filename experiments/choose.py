"""Ways to make lists, compared on a run's validation split, where choices are made.

    python -m experiments.choose runs/synthetic-rope-1 --ground-with base --length-penalty 1

Each flag is tried by itself, beside the lists as the run has them. The test split is not looked at.
Lists are those that the run's first kind names (--lists).
"""

import sys
from dataclasses import replace
from pathlib import Path

from cetrec import open_model, title_lists
from evaluate import format_table, list_values, summarise
from experiments.report import paired_bootstrap
from support.options import OF_BEAMS, Options, add_flags, as_flag, parse
from support.runs import open_data, read_run
from support.terminal import Parser, exit_status

TRIED = OF_BEAMS | {"exclude_history"}


def choose(folder: Path, given: dict) -> None:
    """Print what lists on validation are worth, as the run makes them and with each flag given."""
    tried = {key: given.pop(key) for key in sorted(given.keys() & TRIED)}
    options, base = read_run(folder, given, "experiments.choose")
    options = replace(options, lists=options.lists[:1])
    options.check_use(tried)
    (train_set, valid_set, _), world, _ = open_data(options)
    model = open_model(options, base, folder, (train_set, valid_set))
    valid_set = valid_set.sample(options.eval_sequences, options.seed)
    histories = [valid_set.history(i) for i in range(len(valid_set))]
    ages = ([valid_set.ages(i) for i in range(len(valid_set))] if valid_set.index == "time"
            else None)
    law = None if world is None else world.law(
        histories, [valid_set.days(i) for i in range(len(valid_set))])
    values, ways = {}, {"as the run has it": options}
    for key, value in tried.items():
        told = (as_flag(key if value else f"no_{key}") if type(value) is bool else
                f"{as_flag(key)} {value}")
        ways[told] = replace(options, **{key: value})
    for told, changed in ways.items():
        recommend = next(iter(title_lists(model, valid_set, changed).values()))
        made = recommend(histories, ages, progress=told)
        values[told] = list_values(made.items, valid_set.items[valid_set.targets], law)
    first = next(iter(values.values()))
    print(f"{len(valid_set):,} validation sequences, lists: {options.lists[0]}")
    print(format_table({told: summarise(value) for told, value in values.items()}))
    for told, value in list(values.items())[1:]:
        gains = paired_bootstrap(first, value)
        print(f"{told}, minus the first, with the 95 % interval of a paired bootstrap")
        for metric, (gain, low, high) in gains.items():
            print(f"  {metric:<8}{gain:+.4f}  [{low:+.4f}, {high:+.4f}]")


def main(argv: list[str] | None = None) -> int:
    """Parse and compare. Returns the exit status."""
    ap = Parser(prog="python -m experiments.choose", usage="RUN [flags]",
                description="Compare ways to make lists on a run's validation split.")
    ap.add_argument("run", metavar="RUN", help="folder of a run, as cetrec.py writes it")
    add_flags(ap, Options, only=TRIED | {"lists", "eval_sequences", "data_dir", "device", "model"})
    given = parse(ap, argv)
    folder = Path(given.pop("run"))
    return exit_status(lambda: choose(folder, given))


if __name__ == "__main__":
    sys.exit(main())
