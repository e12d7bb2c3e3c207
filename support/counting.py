"""Counting baselines: what popularity and co-occurrence reach without a model.

They stand in the result table of every run and of every baseline, which is made here. A recommender
that is worse has learned nothing.
"""

import numpy as np

from data import Sequences
from evaluate import (LENGTH, METRICS, Recommender, Scores, evaluate_order, list_values,
                      summarise)
from support.processes import shared_out
from support.synthetic import SyntheticWorld, oracle_rows


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
        parts = []
        for start in range(0, len(histories), 1_000):           # which bounds the memory
            scores = self.scores(histories[start:start + 1_000], exclude_history)
            parts.append({name: np.argsort(-s, axis=1, kind="stable")[:, :LENGTH]
                          for name, s in scores.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def result_table(recommenders: dict[str, Recommender], train_set: Sequences, test_set: Sequences,
                 synthetic: SyntheticWorld | None, exclude_history: bool) -> tuple[dict, dict]:
    """The result table of a run, with a line on its protocol; and arrays by test sequence.

    Counting baselines are added. Where the data are synthetic, the true distribution of the next
    item is known: all lists are then valued by it, and the best possible ones are added.
    """
    histories = [test_set.history(i) for i in range(len(test_set))]
    true_p = None if synthetic is None else synthetic.true_distribution(
        histories, [test_set.days(i) for i in range(len(test_set))])
    rows, arrays = evaluate_order({name: shared_out(recommend)
                                   for name, recommend in recommenders.items()}, test_set, true_p)
    counting = CountingBaselines(train_set, len(test_set.titles))
    rows |= {name: summarise(list_values(items, arrays["target"], true_p))
             for name, items in counting.lists(histories, exclude_history).items()}
    valued = ""
    if synthetic is not None and true_p is not None:
        rows |= oracle_rows(synthetic, histories, true_p)
        valued = ", scored by the true distribution"
    protocol = (f"{len(test_set):,} test sequences, {len(test_set.titles):,} candidates, history "
                f"{'excluded' if exclude_history else 'kept'}{valued}")
    return ({"protocol": protocol, "rows": rows},
            arrays | {"popularity": counting.popularity, "seen": items_seen(train_set)})


def items_seen(sequences: Sequences) -> np.ndarray:
    """Which items occur in any history or answer.  -> (N,) bool"""
    seen = np.zeros(len(sequences.titles), dtype=bool)
    for start, target in zip(sequences.starts, sequences.targets):
        seen[sequences.items[start:target + 1]] = True
    return seen


def format_table(rows: dict[str, Scores]) -> str:
    """Name, then every metric as mean ± standard error. A name `a | b` is shown below a, as b."""
    names = {row: "  " + row.partition(" | ")[2] if " | " in row else row for row in rows}
    width = max(map(len, names.values()))
    lines = [" " * width + "".join(f"{metric:>17}" for metric in METRICS)]
    for row, values in rows.items():
        form = "{:+.1f} ± {:.1f} %" if "change" in row.partition(" | ")[2] else "{:.4f} ± {:.4f}"
        cells = [form.format(*values[metric]) for metric in METRICS]
        lines.append(f"{names[row]:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
