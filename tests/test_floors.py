"""support/floors.py: counting against dense matrices."""

import numpy as np

from data import make_sequences, split_by_time
from support.floors import CountingFloors
from support.synthetic import SyntheticWorld


def test_floors_equal_dense_counting():
    world = SyntheticWorld(items=25)
    train, _, test = split_by_time(make_sequences(world.interactions(80)))
    counts, popularity = np.zeros((25, 25)), np.zeros(25)
    for i in range(len(train)):
        counts[train.history(i), train.target(i)] += 1
        popularity[train.target(i)] += 1
    similarity = counts / np.sqrt(np.outer(counts.sum(1), counts.sum(0)).clip(min=1e-9))
    histories = [test.history(i) for i in range(len(test))]
    floors = CountingFloors(train, 25)
    scores = floors.scores(histories, exclude_history=False)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(scores["popularity"][row], popularity)
        np.testing.assert_allclose(scores["co-occurrence, newest item"][row],
                                   similarity[history[-1]])
        np.testing.assert_allclose(scores["co-occurrence, whole history"][row],
                                   similarity[history].sum(0))
    masked = floors.scores(histories)
    assert all(np.isneginf(masked[name][0][histories[0]]).all() for name in masked)
    for name, lists in floors.lists(histories).items():
        for ten, score in zip(lists, masked[name]):
            order = sorted(range(25), key=lambda item, s=score: (-s[item], item))
            assert ten.tolist() == order[:10]
