"""Floors: what counting reaches without a model. A recommender below them has learned nothing."""

import numpy as np

from data import Sequences
from evaluate import LENGTH


class CountingFloors:
    """Popularity and item-to-item co-occurrence, counted on training sequences only."""

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
        """(B, N) scores per floor: popularity; count(i, j) / √(count(i, ·) count(·, j)) for the
        newest item i; and the sum of that over the whole history."""
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
