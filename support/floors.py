"""Floors: what counting reaches without a model. A recommender below them has learned nothing.

They stand in the result table of every run and of every baseline, which is made here.
"""

from collections.abc import Callable

import numpy as np

from data import Sequences
from evaluate import LENGTH, evaluate_order, list_values, summarise
from support.processes import shared_out
from support.synthetic import SyntheticWorld, oracle_rows


class CountingFloors:
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
        """What each floor gives every item.  name -> (B, N)

        Popularity is how often an item was the answer. Co-occurrence is the cosine
        count(i, j) / √(count(i, ·) count(·, j)), which keeps popular items from winning everywhere.
        One floor takes it for the newest item i alone, the other sums it over the whole history.
        Only the newest-item floor sees anything of order.
        """
        floors = {name: np.zeros((len(histories), len(self.popularity))) for name in
                  ("popularity", "co-occurrence, newest item", "co-occurrence, whole history")}
        popularity, newest, whole = floors.values()
        popularity[:] = self.popularity
        for row, history in enumerate(histories):
            for item in history:
                part = slice(self.start[item], self.start[item + 1])
                whole[row, self.goal[part]] += self.similarity[part]
            part = slice(self.start[history[-1]], self.start[history[-1] + 1])
            newest[row, self.goal[part]] = self.similarity[part]
            if exclude_history:
                for scores in floors.values():
                    scores[row, list(history)] = -np.inf
        return floors

    def lists(self, histories, exclude_history: bool = True) -> dict[str, np.ndarray]:
        """Ten items of each floor for each history, ties by item id.  name -> (n, 10)"""
        parts = []
        for start in range(0, len(histories), 1_000):           # which bounds the memory
            scores = self.scores(histories[start:start + 1_000], exclude_history)
            parts.append({name: np.argsort(-s, axis=1, kind="stable")[:, :LENGTH]
                          for name, s in scores.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def result_table(recommenders: dict[str, Callable], train_set: Sequences, test_set: Sequences,
                 world: SyntheticWorld | None, exclude_history: bool) -> tuple[dict, dict]:
    """The result table of a run, with a line on its protocol; and arrays by test sequence.

    recommenders: see evaluate_order. Floors are added, and in a synthetic world, by whose law all
    lists are valued then, its oracles.
    """
    histories = [test_set.history(i) for i in range(len(test_set))]
    law = None if world is None else world.law(
        histories, [test_set.days(i) for i in range(len(test_set))])
    rows, arrays = evaluate_order({name: shared_out(recommend)
                                   for name, recommend in recommenders.items()}, test_set, law)
    floors = CountingFloors(train_set, len(test_set.titles))
    rows |= {name: summarise(list_values(items, arrays["target"], law))
             for name, items in floors.lists(histories, exclude_history).items()}
    valued = ""
    if world is not None:
        rows |= oracle_rows(world, histories, law)
        valued = ", lists valued by the law of the world"
    protocol = (f"{len(test_set):,} test sequences, {len(test_set.titles):,} candidates, history "
                f"{'excluded' if exclude_history else 'kept'}{valued}")
    return ({"protocol": protocol, "rows": rows},
            arrays | {"popularity": floors.popularity, "seen": train_set.seen()})
