"""support/counting.py: counting against dense matrices, and the table that is printed."""

import math
import tracemalloc

import numpy as np
import pytest

from data import Interactions, make_sequences, split_by_time
from evaluate import METRICS, Lists
from support.counting import CountingBaselines, best_list, format_table, result_table
from support.synthetic import SyntheticWorld


def test_scores_equal_dense_counting():
    world = SyntheticWorld(items=25)
    train, _, test = split_by_time(make_sequences(world.interactions(80)))
    counts, popularity = np.zeros((25, 25)), np.zeros(25)
    for i in range(len(train)):
        counts[train.history(i), train.target(i)] += 1
        popularity[train.target(i)] += 1
    similarity = counts / np.sqrt(np.outer(counts.sum(1), counts.sum(0)).clip(min=1e-9))
    histories = [test.history(i) for i in range(len(test))]
    counting = CountingBaselines(train, 25)
    scores = counting.scores(histories, exclude_history=False)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(scores["popularity"][row], popularity)
        np.testing.assert_allclose(scores["co-occurrence, newest item"][row],
                                   similarity[history[-1]])
        np.testing.assert_allclose(scores["co-occurrence, whole history"][row],
                                   similarity[history].sum(0))
    for kept in (True, False):
        for name, lists in counting.lists(histories, exclude_history=not kept).items():
            for history, ten, score in zip(histories, lists, scores[name]):
                order = sorted(range(25), key=lambda item, s=score: (-s[item], item))
                assert ten.tolist() == [i for i in order if kept or i not in history][:10]


def test_scores_by_hand():
    """Two users saw a b c, and then d or e; a third saw c b a, and then d. Each item of a history
    counts once with its answer."""
    x = Interactions(np.repeat([0, 1, 2], 4), np.array([0, 1, 2, 3, 0, 1, 2, 4, 2, 1, 0, 3]),
                     np.arange(12), list("abcdefghijklm"))
    counting = CountingBaselines(make_sequences(x), 13)
    scores = counting.scores([[1, 0], [5]], exclude_history=False)
    assert scores["popularity"][0].tolist() == [0, 0, 0, 2, 1] + [0] * 8
    # Each of a, b, c meets d twice and e once; d is met 6 times, e 3 times, each of them 3 times.
    to_d, to_e = 2 / np.sqrt(3 * 6), 1 / np.sqrt(3 * 3)
    np.testing.assert_allclose(scores["co-occurrence, newest item"][0, [3, 4, 5]], [to_d, to_e, 0])
    np.testing.assert_allclose(scores["co-occurrence, whole history"][0, [3, 4, 5]],
                               [2 * to_d, 2 * to_e, 0])
    assert counting.lists([[1, 0], [3]])["co-occurrence, whole history"].tolist() == [
        [3, 4, 2, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]]


def test_many_histories_are_served_as_few(monkeypatch):
    monkeypatch.setattr("support.counting.AT_A_TIME", 25_000)
    train = make_sequences(SyntheticWorld(items=25).interactions(40))
    counting = CountingBaselines(train, 25)
    histories = [[i % 25, (i + 7) % 25] for i in range(1_005)]
    many, late = counting.lists(histories), counting.lists(histories[998:])
    for name, lists in many.items():
        assert lists.shape == (1_005, 10)
        np.testing.assert_array_equal(lists[998:], late[name])


def test_memory_is_bounded_whatever_the_number_of_histories(monkeypatch):
    """2,000 items: the scores of 400 histories by three baselines would be 19 MB, and so would the
    order of all items by these scores."""
    monkeypatch.setattr("support.counting.AT_A_TIME", 20_000)
    items = np.random.default_rng(0).integers(2_000, size=4_000)
    train = make_sequences(Interactions(np.arange(4_000) // 8, items, np.arange(4_000),
                                        list(map(str, range(2_000)))))
    counting, histories = CountingBaselines(train, 2_000), [[7, 8, 9]] * 400
    tracemalloc.start()
    try:
        lists = counting.lists(histories)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 and all(len(ten) == 400 for ten in lists.values())


def test_a_result_table_has_counting_baselines_oracles_and_what_training_saw():
    world = SyntheticWorld(items=40)
    train, valid, test = split_by_time(make_sequences(world.interactions(60)))
    train, test = train.select(slice(0, 20)), test.select(slice(0, 8))
    asked = []

    def first_ten(histories, ages, progress):
        asked.append(progress)
        return Lists(np.tile(np.arange(10), (len(histories), 1)), np.zeros((8, 10)),
                     np.zeros((8, 0), dtype=bool))
    result, arrays = result_table({"ten": first_ten}, (train, valid, test), world, True)
    assert asked == ["ten, original", "ten, reversed", "ten, shuffled"]
    assert result["protocol"] == ("8 test sequences, 40 candidates, history excluded, scored by "
                                  "the true distribution")
    true_p = world.true_distribution([test.history(i) for i in range(8)])
    assert result["rows"]["ten"]["HR@5"][0] == pytest.approx(true_p[:, :5].sum(axis=1).mean())
    counting = CountingBaselines(train, 40).lists([test.history(i) for i in range(8)])
    for name, lists in counting.items():
        expected = np.take_along_axis(true_p, lists, axis=1).sum(axis=1).mean()
        assert result["rows"][name]["HR@10"][0] == pytest.approx(expected)
    assert "best, order-aware" in result["rows"]
    assert arrays["popularity"].tolist() == np.bincount(train.items[train.targets],
                                                        minlength=40).tolist()
    seen = {int(i) for s, e in zip(train.starts, train.targets) for i in train.items[s:e + 1]}
    assert set(np.flatnonzero(arrays["seen"])) == seen and len(seen) < 40
    drawn, _ = result_table({"ten": first_ten}, (train, valid, test), None, False)
    assert drawn["protocol"] == "8 test sequences, 40 candidates, history kept"
    hits = (test.items[test.targets] < 5).mean()
    assert drawn["rows"]["ten"]["HR@5"][0] == pytest.approx(hits)
    assert "best, order-aware" not in drawn["rows"]


def test_numbers_from_few_hits_are_dashes_in_their_columns():
    nan = math.nan
    rows = {"beams": dict.fromkeys(METRICS, (0.25, 0.125)) | {"HR@5": (0.001, nan)},
            "beams | change, reversed": dict.fromkeys(METRICS, (-33.25, 2.5)) | {
                "HR@5": (nan, nan), "NDCG@5": (-100.0, nan)}}
    head, scores, change, legend = format_table(rows).splitlines()
    assert legend == "–: from fewer than ten hits"
    assert scores.split() == ["beams", "0.0010", "±", "–", *["0.2500", "±", "0.1250"] * 3]
    assert change.split() == ["change,", "reversed", "–", "-100.0", "±", "–", "%",
                              *["-33.2", "±", "2.5", "%"] * 2]
    assert len({len(line) for line in (head, scores, change)}) == 1 and "nan" not in scores + change
    assert scores.index("±") < scores.index("–") == head.index("HR@5") + 3
    alone = format_table({"a run | of mine": rows["beams"]}).splitlines()[1]
    assert alone.startswith("a run | of mine  ")            # it stands below nothing


def test_the_best_list_is_that_with_the_highest_ndcg_10_on_validation():
    """Answers at the first rank are better than at the tenth. An only list is not asked."""
    world = SyntheticWorld(items=40)
    _, valid, _ = split_by_time(make_sequences(world.interactions(60)))
    valid = valid.select(slice(0, 5))
    answers = valid.items[valid.targets]

    def list_with(places):
        def recommend(histories, ages, progress):
            assert [list(h) for h in histories] == [list(valid.history(i)) for i in range(5)]
            lists = Lists.empty(5)
            lists.items[np.arange(5), places] = answers
            return lists
        return recommend
    tenth = list_with([9] * 5)
    assert best_list({"never": lambda *args: Lists.empty(5), "tenth": tenth}, valid) == "tenth"
    assert best_list({"tenth": tenth, "never": lambda *args: Lists.empty(5)}, valid) == "tenth"
    assert best_list({"tenth": tenth, "first": list_with([0] * 5)}, valid) == "first"
    assert best_list({"equal": tenth, "tenth": tenth}, valid) == "equal"
    assert best_list({"only": lambda *args: pytest.fail("asked")}, valid) == "only"
