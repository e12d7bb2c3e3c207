"""Counting baselines: what popularity and co-occurrence reach without a model.

They stand in the result table of every run and of every baseline, which is made here. A recommender
that is worse has learned nothing.
"""

import math

import numpy as np

from data import Sequences
from evaluate import (LENGTH, METRICS, Recommender, Scores, evaluate_order, list_values,
                      summarise)
from support.processes import shared_out
from support.synthetic import SyntheticWorld, oracle_rows

LEGEND = "–: from fewer than ten hits"
AT_A_TIME = 2**22       # scores of each baseline that are in memory together, 32 MiB


class CountingBaselines:
    """Popularity and item-to-item co-occurrence, counted on training sequences only.

    count(i, j) is how often item j was the answer to a history that holds item i. Most pairs never
    occur, so only those that do are kept, sorted by i: the pairs of item i, and what they score,
    are goal and similarity from start[i] to start[i + 1].
    """

    def __init__(self, train: Sequences, items: int):
        history = [train.history(i) for i in range(len(train))]
        targets = train.items[train.targets]
        self.popularity = np.bincount(targets, minlength=items).astype(float)
        pairs = np.concatenate(history).astype(np.int64) * items + np.repeat(
            targets, [len(h) for h in history])
        codes, counts = np.unique(pairs, return_counts=True)
        source, self.goal = np.divmod(codes, items)
        self.start = np.searchsorted(source, np.arange(items + 1))
        leaving = np.bincount(source, weights=counts, minlength=items)
        arriving = np.bincount(self.goal, weights=counts, minlength=items)
        self.similarity = counts / np.sqrt(leaving[source] * arriving[self.goal])

    def scores(self, histories, exclude_history: bool = True) -> dict[str, np.ndarray]:
        """The scores of every item by each baseline.  name -> (B, N)

        Popularity is how often an item was the answer. Co-occurrence is the cosine
        count(i, j) / √(count(i, ·) count(·, j)), which keeps popular items from winning everywhere.
        One baseline takes it for the newest item i alone and so sees something of the order; the
        other sums it over the whole history.
        """
        found = {name: np.zeros((len(histories), len(self.popularity))) for name in
                  ("popularity", "co-occurrence, newest item", "co-occurrence, whole history")}
        popularity, newest, whole = found.values()
        popularity[:] = self.popularity
        for row, history in enumerate(histories):
            for item in history:
                part = slice(self.start[item], self.start[item + 1])
                whole[row, self.goal[part]] += self.similarity[part]
            part = slice(self.start[history[-1]], self.start[history[-1] + 1])
            newest[row, self.goal[part]] = self.similarity[part]
            if exclude_history:
                for scores in found.values():
                    scores[row, list(history)] = -np.inf
        return found

    def lists(self, histories, exclude_history: bool = True) -> dict[str, np.ndarray]:
        """Ten items by each baseline for each history, ties by item id.  name -> (n, 10)"""
        parts, rows = [], max(1, AT_A_TIME // len(self.popularity))
        for start in range(0, len(histories), rows):
            scores = self.scores(histories[start:start + rows], exclude_history)
            # Copied, because a slice would keep the whole order of all items.
            parts.append({name: np.argsort(-s, axis=1, kind="stable")[:, :LENGTH].copy()
                          for name, s in scores.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def result_table(recommenders: dict[str, Recommender],
                 splits: tuple[Sequences, Sequences, Sequences], synthetic: SyntheticWorld | None,
                 exclude_history: bool) -> tuple[dict, dict]:
    """The result table of a run, with a line on its protocol; and arrays by test sequence.

    "best" names the list with the highest NDCG@10 on the validation sequences. Counting baselines
    are added. Where the data are synthetic, the true distribution of the next item is known: all
    lists are then valued by it, and the best possible ones are added.
    """
    train_set, valid_set, test_set = splits
    recommenders = {name: shared_out(recommend) for name, recommend in recommenders.items()}
    histories = [test_set.history(i) for i in range(len(test_set))]
    true_p = None if synthetic is None else synthetic.true_distribution(
        histories, [test_set.days(i) for i in range(len(test_set))])
    rows, arrays = evaluate_order(recommenders, test_set, true_p)
    counting = CountingBaselines(train_set, len(test_set.titles))
    rows |= {name: summarise(list_values(items, arrays["target"], true_p))
             for name, items in counting.lists(histories, exclude_history).items()}
    valued = ""
    if synthetic is not None and true_p is not None:
        rows |= oracle_rows(synthetic, histories, true_p)
        valued = ", scored by the true distribution"
    protocol = (f"{len(test_set):,} test sequences, {len(test_set.titles):,} candidates, history "
                f"{'excluded' if exclude_history else 'kept'}{valued}")
    return ({"protocol": protocol, "rows": rows, "best": best_list(recommenders, valid_set)},
            arrays | {"popularity": counting.popularity, "seen": items_seen(train_set)})


def best_list(recommenders: dict[str, Recommender], valid_set: Sequences) -> str:
    """The recommender whose lists have the highest mean NDCG@10; of equal ones the first."""
    if len(recommenders) == 1:
        return next(iter(recommenders))
    numbers = range(len(valid_set))
    histories = [valid_set.history(i) for i in numbers]
    ages = [valid_set.ages(i) for i in numbers] if valid_set.index == "time" else None
    targets = valid_set.items[valid_set.targets]
    values = {name: list_values(recommend(histories, ages, f"{name}, validation").items, targets)
              for name, recommend in recommenders.items()}
    return max(values, key=lambda name: values[name][:, list(METRICS).index("NDCG@10")].mean())


def items_seen(sequences: Sequences) -> np.ndarray:
    """Which items occur in any history or answer.  -> (N,) bool"""
    seen = np.zeros(len(sequences.titles), dtype=bool)
    for start, target in zip(sequences.starts, sequences.targets):
        seen[sequences.items[start:target + 1]] = True
    return seen


def known(number: float, form: str) -> str:
    """A number in a format; – for one that too few hits tell (evaluate.FEWEST)."""
    return "–" if math.isnan(number) else format(number, form)


def score_rows(rows: dict[str, Scores]) -> list[list[str]]:
    """Name, then every metric as mean ± standard error. A name `a | b` is shown below a, as b."""
    lines = []
    for row, scores in rows.items():
        above, _, name = row.rpartition(" | ")
        form, width, unit = ("+.1f", 3, " %") if name.startswith("change, ") else (".4f", 6, "")
        cells = ["–" if math.isnan(mean) else
                 f"{mean:{form}} ± {known(error, form[-3:]):>{width}}{unit}"
                 for mean, error in (scores[metric] for metric in METRICS)]
        lines.append([f"  {name}" if above in rows else row, *cells])
    return lines


def format_table(rows: dict[str, Scores]) -> str:
    """The scores of some rows as text."""
    text = columns(["", *METRICS], score_rows(rows))
    return f"{text}\n{LEGEND}" if "–" in text else text


def columns(head: list[str], rows: list[list[str]]) -> str:
    """A table as text: the first column stands to the left, all others to the right."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines))
    return "\n".join((f"{name:<{first}}" + "".join(
        f"{cell:>{width + 2}}" for cell, width in zip(cells, others))).rstrip()
        for name, *cells in lines)
