"""support/synthetic.py: the true distribution by hand, the oracle against brute force."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from data import make_sequences
from evaluate import METRICS
from support.synthetic import GENRES, SyntheticWorld, oracle_rows


def brute_force_order_blind(world, history):
    """p(next | set): every order, weighted by the generator's own probability of producing it."""
    total, mass = 0.0, 0.0
    for order in itertools.permutations(history):
        p = world.popularity[order[0]]
        for t in range(1, len(order)):
            p *= world.next_distribution(np.array([order[:t]]))[0, order[t]]
        total, mass = total + p * world.next_distribution(np.array([order]))[0], mass + p
    return total / mass


def test_next_distribution_by_hand():
    """Two items in the history at s = 1, decay 1/2: weights 1/3 and 2/3, then masked,
    renormalised."""
    world = SyntheticWorld(items=20, strength=1.0)
    p = world.q[4] / 3 + world.q[9] * 2 / 3
    p[[4, 9]] = 0
    np.testing.assert_allclose(world.next_distribution(np.array([[4, 9]]))[0], p / p.sum())
    np.testing.assert_allclose(world.q.sum(axis=1), 1.0)


def test_the_weights_of_a_history_by_hand():
    """At s = 1/2 and decay 1/2, three items share one half evenly and the other as 1 : 2 : 4."""
    world = SyntheticWorld(items=20, strength=0.5)
    np.testing.assert_allclose(world.weights(3), [1 / 6 + 1 / 14, 1 / 6 + 2 / 14, 1 / 6 + 4 / 14])
    np.testing.assert_allclose(SyntheticWorld(20, strength=1.0, decay=0.1).weights(2),
                               [1 / 11, 10 / 11])


def test_what_goes_with_an_item_by_hand():
    """Titles tell franchise and genre, and 0.8 is the exponent of popularity."""
    world = SyntheticWorld(items=70)
    names = [title.rstrip("0123456789 ") for title in world.titles]
    genres = [next(genre for genre, (nouns, _) in GENRES.items() if name.split()[1] in nouns)
              for name in names]
    assert len(set(names)) > len(set(genres)) == 6 and len(set(world.titles)) == 70
    for i in (0, 33, 69):
        expected = [0.6 * (names[j] == names[i]) / names.count(names[i])
                    + 0.3 * (genres[j] == genres[i]) / genres.count(genres[i])
                    + 0.1 * world.popularity[j] for j in range(70)]
        np.testing.assert_allclose(world.q[i], expected)
    popular = np.sort(world.popularity)[::-1]
    np.testing.assert_allclose(popular / popular[0], 1 / np.arange(1, 71) ** 0.8)
    assert popular.sum() == pytest.approx(1) and (np.diff(world.popularity) > 0).any()


def test_a_large_world_has_different_titles_and_franchises_of_three_to_eight():
    world = SyntheticWorld(items=3_000)
    sizes = Counter(re.sub(r" \d$", "", title) for title in world.titles)
    assert len(set(world.titles)) == 3_000
    assert set(list(sizes.values())[:-1]) == {3, 4, 5, 6, 7, 8}     # the last one may be cut short


def test_order_blind_estimate_equals_brute_force_over_all_orders():
    world = SyntheticWorld(items=30, strength=1.0)
    for history in ([0, 1, 12, 5], [3, 9, 2, 7, 20]):
        exact = brute_force_order_blind(world, history)
        estimate = world.order_blind_distribution(np.array([history]), samples=40_000)[0]
        np.testing.assert_allclose(estimate, exact, atol=2e-3)
        assert np.abs(exact - world.next_distribution(np.array([history]))[0]).max() > 0.02


def test_without_order_strength_order_aware_and_order_blind_coincide():
    world = SyntheticWorld(items=40, strength=0.0)
    histories = np.array([[1, 5, 9, 30], [2, 3, 4, 5]])
    p = world.next_distribution(histories)
    np.testing.assert_allclose(world.order_blind_distribution(histories, samples=8), p, atol=1e-12)
    np.testing.assert_allclose(world.next_distribution(histories[:, ::-1]), p)


def test_drawn_users_follow_the_true_distribution():
    world = SyntheticWorld(items=20, strength=0.7)
    x = world.interactions(20_000)
    items = x.items.reshape(-1)
    starts = np.flatnonzero(np.r_[True, np.diff(x.users) > 0])
    first = np.bincount(items[starts], minlength=20) / len(starts)
    np.testing.assert_allclose(first, world.popularity, atol=0.01)
    pair = (items[starts] == 3)
    second = np.bincount(items[starts + 1][pair], minlength=20) / pair.sum()
    np.testing.assert_allclose(second, world.next_distribution(np.array([[3]]))[0], atol=0.04)
    # How much likelier the fourth item is after the three before it than after these reversed, in
    # nats: the expected mean is Σ p (log p - log p'), and it would be negative the wrong way.
    history, fourth = items[starts[:, None] + np.arange(3)], items[starts + 3]
    p, reverse = (world.next_distribution(h).clip(min=1e-300) for h in (history, history[:, ::-1]))
    gain = np.log(p / reverse)
    drawn, expected = gain[np.arange(len(fourth)), fourth], (p * gain).sum(axis=1).mean()
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - expected) < 4 * error and expected > 10 * error
    days = np.diff(x.timestamps)[np.diff(x.users) == 0] / 86_400
    assert days.min() >= 0 and days.mean() == pytest.approx(1, rel=0.02)
    lengths = np.bincount(x.users)
    assert lengths.min() == 4 and lengths.max() == 11
    for u in (0, 17, 4242):         # nothing twice in a history
        own = items[x.users == u]
        assert len(set(own.tolist())) == len(own)


@pytest.mark.parametrize("arguments, message", [({"strength": 1.5}, "order strength is 1.5"),
                                                ({"items": 5}, "5 items")])
def test_impossible_worlds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticWorld(**arguments)
    with pytest.raises(ValueError, match="0 users; wanted at least 1"):
        SyntheticWorld().interactions(0)


def test_the_true_distribution_of_histories_of_unequal_length_is_that_of_each():
    world, histories = SyntheticWorld(items=30), [[0, 1, 2], [5, 9], [3, 4, 7], [8, 2, 1, 0]]
    for history, p in zip(histories, world.true_distribution(histories)):
        np.testing.assert_allclose(p, world.next_distribution(np.array([history]))[0])


def test_each_oracle_list_is_worth_the_true_probability_of_its_items():
    """One history: what each oracle ranks by is found here by the other functions and by brute
    force, and what its list is worth by adding up."""
    world, history = SyntheticWorld(items=40), [0, 1, 12]
    true_p = world.true_distribution([history])
    ranked_by = {"best, order-aware": true_p[0],
                 "best, order-aware | reversed": world.true_distribution([history[::-1]])[0],
                 "best, order-blind": brute_force_order_blind(world, history)}
    rows = oracle_rows(world, [history], true_p, samples=4_000)
    for name, p in ranked_by.items():
        best = true_p[0][sorted(range(40), key=lambda item, p=p: (-p[item], item))]
        assert rows[name]["HR@5"][0] == pytest.approx(best[:5].sum())
        assert rows[name]["NDCG@10"][0] == pytest.approx(sum(
            chance / math.log2(rank + 2) for rank, chance in enumerate(best[:10])))
    assert len({round(row["HR@5"][0], 6) for row in rows.values()}) == 3


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_the_oracle_bounds_are_ordered_and_meet_at_strength_0(strength):
    world = SyntheticWorld(items=60, strength=strength)
    sequences = make_sequences(world.interactions(60))
    histories = [sequences.history(i) for i in range(len(sequences))]
    rows = oracle_rows(world, histories, world.true_distribution(histories), samples=64)
    assert list(rows) == ["best, order-aware", "best, order-aware | reversed", "best, order-blind"]
    for name in METRICS:
        aware, blind, misled = (rows[f"best, {kind}"][name][0] for kind in (
            "order-aware", "order-blind", "order-aware | reversed"))
        if strength:
            assert aware > blind + 0.01 and aware > misled + 0.05
        else:
            assert aware == pytest.approx(blind, abs=1e-9) == pytest.approx(misled, abs=1e-9)


# ------------------------------------------------------------ With a clock


def brute_force_order_aware(world, history, samples=4_000):
    """p(next | order): the mean over gaps, weighted by the true probability of the items."""
    rng, total, mass = np.random.default_rng(9), 0.0, 0.0
    for _ in range(samples):
        gaps = [rng.exponential(1 / 24) if rng.random() < 0.6 else 10 ** rng.uniform(0, 2.5)
                for _ in range(len(history))]
        when = np.array([0, *np.cumsum(gaps)])
        p = 1.0
        for t in range(1, len(history)):
            p *= world.next_distribution(np.array([history[:t]]),
                                         (when[t] - when[:t])[None])[0, history[t]]
        total = total + p * world.next_distribution(np.array([history]),
                                                    (when[-1] - when[:-1])[None])[0]
        mass += p
    return total / mass


def test_the_clocks_weights_by_hand():
    """Taken 3, 1 and 0 days ago: 1/4, 1/2 and 1 in proportion, half of it by the clock."""
    days = np.array([[3.0, 1.0, 0.0]])
    np.testing.assert_allclose(SyntheticWorld(20, clock=1.0).weights(3, days),
                               [[1 / 7, 2 / 7, 4 / 7]])
    np.testing.assert_allclose(SyntheticWorld(20, strength=0.5, decay=0.1, clock=0.5).weights(
        3, days), [[1 / 6 + (x / 111 + y / 7) / 4 for x, y in ((1, 1), (10, 2), (100, 4))]])
    long_ago = SyntheticWorld(20, clock=1.0).weights(3, days + 10_000)
    np.testing.assert_allclose(long_ago, 1 / 3, atol=1e-3)      # users A and B of Figure 1


def test_users_are_drawn_by_their_own_gaps():
    """The answers' log-probability is the expected one, and less where gaps are misread."""
    world = SyntheticWorld(items=40, clock=1.0)
    s = make_sequences(world.interactions(4_000))
    histories, answers = [s.history(i) for i in range(len(s))], s.items[s.targets]
    days = [s.days(i) for i in range(len(s))]
    true_p = world.true_distribution(histories, days)
    log_p = np.log(true_p[np.arange(len(s)), answers])
    off = log_p - (true_p * np.log(true_p + (true_p == 0))).sum(axis=1)
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(len(s))
    for misread in (lambda d: 0 * d, lambda d: 10 * d, lambda d: d / 10):
        other = world.true_distribution(histories, [misread(d) for d in days])
        gain = log_p - np.log(other[np.arange(len(s)), answers])
        assert gain.mean() > 3 * gain.std() / math.sqrt(len(s))


def test_gaps_are_hours_and_months():
    gaps = np.diff(SyntheticWorld(20).times(np.random.default_rng(0), (20_000, 2)))[:, 0] / 86_400
    assert np.mean(gaps < 1) == pytest.approx(0.6, abs=0.02)
    assert gaps[gaps < 0.9].mean() == pytest.approx(1 / 24, rel=0.05)
    assert np.median(gaps[gaps > 1]) == pytest.approx(10 ** 1.25, rel=0.1)
    assert gaps.max() < 317


def test_the_order_aware_estimate_with_a_clock_equals_brute_force_over_gaps():
    world = SyntheticWorld(items=30, clock=1.0)
    for history in ([0, 1, 12, 5], [3, 9, 2]):
        exact = brute_force_order_aware(world, history)
        estimate = world.order_blind_distribution(np.array([history]), samples=20_000,
                                                  order_known=True)[0]
        np.testing.assert_allclose(estimate, exact, atol=4e-3)
        late = world.next_distribution(np.array([history]), np.full((1, len(history)), 99.0))[0]
        assert np.abs(exact - late).max() > 0.02


def test_three_oracles_stand_in_their_order_and_coincide_at_strength_0():
    for strength, clock in ((1.0, 1.0), (0.0, 1.0)):
        world = SyntheticWorld(items=60, strength=strength, clock=clock)
        s = make_sequences(world.interactions(500)).sample(200, 0)
        histories = [s.history(i) for i in range(len(s))]
        true_p = world.true_distribution(histories, [s.days(i) for i in range(len(s))])
        rows = oracle_rows(world, histories, true_p, samples=128)
        best = [rows[f"best, {kind}"]["HR@5"][0] for kind in (
            "clock-aware", "order-aware", "order-blind")]
        if strength:
            assert best[0] > best[1] + 0.01 and best[1] > best[2] + 0.01
        else:
            assert best == pytest.approx([best[0]] * 3, abs=1e-3)
    assert "best, clock-aware" not in oracle_rows(SyntheticWorld(60), histories[:3], true_p[:3])
