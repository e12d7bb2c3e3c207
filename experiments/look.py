"""What a data set holds: look at it before you trust a number that was measured on it.

    python -m experiments.look --data ml-100k

It prints what every run prints of its data, which is the counts of each step and how often the
order of the file decides. Then it shows how many interactions users and items have, the dates of
the splits, how many test answers training never saw, how long prompts are, and one prompt.
"""

import math
import sys

import numpy as np

from data import Catalogue, Sequences, Tokenizer, encode_sequences
from support.checkpoints import read_tokenizer
from support.counting import items_seen
from support.datasets import day_of
from support.options import Options, add_flags, parse
from support.runs import open_data, show_prompt
from support.terminal import Parser, exit_status
from support.tiny import TINY_BASES, TinyBase, tokenizer_for

FLAGS = {"data", "data_dir", "domain", "sample", "chronological", "index", "skip_bad_lines",
         "drop_untitled", "keep_repeats",         "order_strength", "clock", "seed"}


def histogram(values: np.ndarray) -> str:
    """A text histogram over 1, 2-3, 4-7, 8-15, ...: how many of the values, and a bar.

    It begins with the bin of the smallest value.
    """
    powers = np.log2(values).astype(int)
    bins, lines = np.bincount(powers), []
    for power, count in list(enumerate(bins))[powers.min():]:
        low, high = 2**power, 2 ** (power + 1) - 1
        name = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        lines.append(f"{name:>17} {count:>9,} {'#' * math.ceil(50 * count / bins.max())}".rstrip())
    return "\n".join(lines)


def interactions_of_users(answers: np.ndarray) -> np.ndarray:
    """How many interactions each user has who has an answer.  -> (users,)

    answers: the rows of all answers. Rows are sorted by user, and the first three of a user have
    too little history to be answers. So a gap in the answers is where a user begins.
    """
    answers = np.sort(answers)
    first = np.flatnonzero(np.diff(answers, prepend=-2) > 1)
    return np.diff(first, append=len(answers)) + 3


def describe(splits: tuple[Sequences, Sequences, Sequences], users: int,
             tokenizer: Tokenizer) -> str:
    """What the splits of so many users hold, as text."""
    train_set, _, test_set = splits
    answers = np.concatenate([s.targets for s in splits])
    of_users, of_items = interactions_of_users(answers), np.bincount(train_set.items)
    dates = [f"{name} {day_of(s.timestamps.min(), s.day)}..{day_of(s.timestamps.max(), s.day)}"
             for name, s in zip(("train", "valid", "test"), splits)]
    unseen = 100 * (1 - items_seen(train_set)[test_set.items[test_set.targets]].mean())
    drawn = np.random.default_rng(0).choice(len(train_set), min(1_000, len(train_set)), False)
    prompts = Catalogue(train_set.titles, train_set.domain, tokenizer).prompts(
        [train_set.history(i) for i in drawn])
    lengths = np.array([len(example.tokens) for example in prompts])
    (first,) = encode_sequences(tokenizer, train_set.select(slice(0, 1)))
    fewer = users - len(of_users)
    return "\n".join([
        "", "users by their number of interactions"
        + (f"; {fewer:,} more have fewer than 4" if fewer else ""), histogram(of_users),
        "", "items by their number of interactions", histogram(of_items[of_items > 0]),
        "", f"answers | {' | '.join(dates)}",
        f"test answers never seen in training | {unseen:.1f} %",
        f"tokens of a prompt | median {np.median(lengths):.0f}, 95 % have up to "
        f"{np.quantile(lengths, 0.95):.0f}, longest {lengths.max()} of {len(drawn):,} drawn",
        "", "a training prompt, each item ⟨marked⟩ with its index k", "-" * 80,
        show_prompt(tokenizer, first), "-" * 80])


def look(flags: dict) -> None:
    """Read the data and print what they hold."""
    folder = flags.pop("tokenizer", None)
    options = Options.from_flags(flags)
    tokenizer = read_tokenizer(folder) if folder else None
    splits, _, record = open_data(options)
    if tokenizer is None:
        recipe = TINY_BASES.get(options.data, TinyBase())
        tokenizer = tokenizer_for(splits[0], recipe.pieces)
    print(describe(splits, record["counts"]["users"], tokenizer))


def main(argv: list[str] | None = None) -> int:
    """Parse and show. Returns the exit status."""
    ap = Parser(prog="python -m experiments.look",
                description="Show what a data set holds, and one prompt.")
    add_flags(ap, Options, only=FLAGS)
    ap.add_argument("--tokenizer", metavar="FOLDER", help="checkpoint folder whose tokenizer makes "
                    "the tokens (default: that of the tiny base, made on the spot)")
    flags = parse(ap, argv)
    return exit_status(lambda: look(flags))


if __name__ == "__main__":
    sys.exit(main())
