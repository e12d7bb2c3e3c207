"""A world whose best recommendation is known: the default data, and an oracle for them.

This is the paper's Figure 1 made into a generator: the next item depends on the order of a history
by a stated distribution. So the value of every list of recommendations is known exactly, and so is
what the best order-aware recommender reaches. What the best order-blind one reaches is estimated
closely.

Shapes: B histories, n their length, N items, M sampled orders.
"""

import itertools

import numpy as np

from data import Interactions
from evaluate import LENGTH, Scores, list_values, summarise

GENRES = {
    "Western": ("Canyon Rider Saddle Prairie Stagecoach",
                "Dusty Lonesome Crooked Restless Scarlet"),
    "Space": ("Orbit Nebula Starship Comet Airlock", "Silent Frozen Distant Burning Hollow"),
    "Mystery": ("Cellar Alibi Lantern Cipher Footstep", "Missing Borrowed Midnight Velvet Locked"),
    "Romance": ("Summer Letter Bouquet Waltz Harbour", "Gentle Faithful Secret Golden Second"),
    "Horror": ("Attic Scream Marsh Puppet Whisper", "Pale Endless Buried Hungry Cursed"),
    "Comedy": ("Cousin Weekend Landlord Picnic Wedding", "Clumsy Reluctant Noisy Lucky Perfect"),
}


class SyntheticWorld:
    """Users whose next item depends on order by a stated distribution; the generator is the oracle.

        p(next | history) ∝ Σ_k w_k q(next | item_k) for items not in the history,
        w_k = (1 - s)/n + s (1 - c) decay^k / Σ_j decay^j + s c a_k / Σ_j a_j,  a_k = 1 / (1 + d_k)
        q(. | i) = 0.6 uniform over i's franchise + 0.3 uniform over i's genre + 0.1 popularity

    for an item that was taken k steps, which is d_k days, before the next one, in a history of n ≤
    10. Here s is the order strength and c the clock strength. At s = 0 the history is a set, and
    the best order-aware and order-blind recommenders are the same. (If the 0.6 went to the *next*
    part of the franchise, a set would betray its order.) Users C and D of Figure 1 differ in order:
    c = 0. Users A and B took the same items in the same order, one of them long ago: at c = 1 the
    newest item of a sitting decides, and after months all items count nearly alike.

    Users have 4 to 11 interactions, of which the last is predicted, so the history that a
    recommender sees is always the whole one. The first item follows popularity. With a clock, gaps
    are heavy-tailed: six in ten are those within a sitting, an hour on average, and the others are
    breaks of 1 to 316 days, alike likely on a scale of orders of magnitude.
    """

    def __init__(self, items: int = 300, strength: float = 1.0, decay: float = 0.5, seed: int = 0,
                 clock: float = 0.0):
        if not 0 <= strength <= 1:
            raise ValueError(f"order strength is {strength}; wanted a number from 0 to 1")
        if not 0 <= clock <= 1:
            raise ValueError(f"clock strength is {clock}; wanted a number from 0 to 1")
        if items < 20:
            raise ValueError(f"{items} items; a synthetic world wants at least 20")
        self.strength, self.decay, self.clock = strength, decay, clock
        rng = np.random.default_rng([seed, 1])
        self.titles: list[str] = []
        genre, franchise = np.zeros(items, dtype=int), np.zeros(items, dtype=int)
        names = {g: [f"{a} {n}" for a in adjectives.split() for n in nouns.split()]
                 for g, (nouns, adjectives) in GENRES.items()}

        # Genres take turns in founding franchises of three to eight parts. When a genre has used
        # up its names, they come again with a place and a year.
        for used in itertools.count():
            g = used % len(GENRES)
            pool = names[list(GENRES)[g]]
            lap, place = divmod(used // len(GENRES), len(pool))
            name = pool[place] + (f" of {list(GENRES)[lap % len(GENRES)]} {1900 + lap}" if lap
                                  else "")
            for part in range(1, min(rng.integers(3, 9), items - len(self.titles)) + 1):
                genre[len(self.titles)], franchise[len(self.titles)] = g, used
                self.titles.append(name if part == 1 else f"{name} {part}")
            if len(self.titles) == items:
                break

        # Popularity falls with the rank as in Zipf's law; which item has which rank is chance.
        popularity = 1.0 / np.arange(1, items + 1) ** 0.8
        self.popularity = rng.permutation(popularity / popularity.sum())
        same_genre = genre[:, None] == genre[None, :]
        siblings = franchise[:, None] == franchise[None, :]
        self.q = sum(share * among / among.sum(axis=1, keepdims=True) for share, among in
                     ((0.6, siblings), (0.3, same_genre), (0.1, self.popularity[None, :])))

    def weights(self, n: int, days: np.ndarray | None = None) -> np.ndarray:
        """w_k for n items, oldest first, with sum 1.  -> (n,), or (B, n) with a clock

        days (B, n): how long before the next item each was taken; only a clock wants them.
        """
        recency = self.decay ** np.arange(n - 1, -1, -1)
        order = recency / recency.sum()
        if self.clock:
            age = 1 / (1 + days)
            order = (1 - self.clock) * order + self.clock * age / age.sum(axis=-1, keepdims=True)
        return (1 - self.strength) / n + self.strength * order

    def true_distribution(self, histories, days=None) -> np.ndarray:
        """Exact p(next | history) for histories of any lengths, oldest first.  -> (n, N)

        days: for each history what next_distribution wants; None without a clock.
        """
        p = np.zeros((len(histories), len(self.titles)))
        sizes = np.array([len(h) for h in histories])
        for n in np.unique(sizes):
            rows = np.flatnonzero(sizes == n)
            p[rows] = self.next_distribution(
                np.stack([histories[i] for i in rows]),
                np.stack([days[i] for i in rows]) if self.clock else None)
        return p

    def next_distribution(self, histories: np.ndarray,
                          days: np.ndarray | None = None) -> np.ndarray:
        """Exact p(next | history), histories oldest first.  (B, n) -> (B, N)

        days (B, n): see weights.
        """
        B, n = histories.shape
        w = np.broadcast_to(self.weights(n, days), (B, n))
        p = np.einsum("bn,bnj->bj", w, self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def order_blind_distribution(self, histories: np.ndarray, samples: int = 256,
                                 seed: int = 0, order_known: bool = False) -> np.ndarray:
        """p(next | the set of the history's items): p averaged over the orders it could have had.

        This is the best prediction of a recommender that knows which items were chosen, but not
        when. Orders are drawn one item at a time in proportion to the generator's own probabilities
        among the set's remaining items. An order's weight is the product of what those
        probabilities summed to, so the weighted mean is a consistent estimate (importance
        sampling). With a clock, gaps are drawn with each order.

        Where the order is known, gaps alone are drawn, and their weight is the probability of the
        known items in that order: the best prediction without a clock.  (B, n) -> (B, N)
        """
        rng = np.random.default_rng([seed, 2])
        B, n = histories.shape
        among = np.take_along_axis(self.q[histories], histories[:, None, :], axis=2)   # (B, n, n)
        coefficients = np.zeros((B, n))
        for b in range(B):
            start = self.popularity[histories[b]]
            log_weight = np.zeros(samples)
            order = np.zeros((samples, n), dtype=int)
            chosen = np.zeros((samples, n), dtype=bool)
            times = self.times(rng, (samples, n + 1)) / 86_400 if self.clock else None
            for t in range(n):
                if t == 0:
                    p = np.broadcast_to(start, (samples, n))
                else:
                    w = np.broadcast_to(self.weights(t, days_before(times, t)), (samples, t))
                    score = np.einsum("mt,mtj->mj", w, among[b][order[:, :t]])
                    p = score / (1 - (score * chosen).sum(axis=1, keepdims=True))
                possible = np.arange(n) == t if order_known else ~chosen
                cumulative = np.where(possible, p, 0.0).cumsum(axis=1)
                log_weight += np.log(cumulative[:, -1])
                draw = rng.random((samples, 1)) * cumulative[:, -1:]
                order[:, t] = (cumulative <= draw).sum(axis=1).clip(max=n - 1)
                np.put_along_axis(chosen, order[:, t:t + 1], True, axis=1)

            # p(next | order) = Σ_k w_k q(next | item_k) / Z(order) is linear in w_k / Z(order), so
            # it suffices to average these n numbers over the orders.
            w = np.zeros((samples, n))
            np.put_along_axis(w, order, np.broadcast_to(
                self.weights(n, days_before(times, n)), w.shape), axis=1)
            w /= 1 - (w @ among[b]).sum(axis=1, keepdims=True)
            share = np.exp(log_weight - log_weight.max())
            coefficients[b] = share @ w / share.sum()
        p = np.einsum("bn,bnj->bj", coefficients, self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def times(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """When users take their items in a world with a clock, from 0 on, seconds.  -> shape"""
        breaks = 86_400 * 10 ** rng.uniform(0, 2.5, size=shape)
        sitting = rng.exponential(3_600, size=shape)
        return np.where(rng.random(shape) < 0.6, sitting, breaks).cumsum(axis=1)

    def interactions(self, users: int = 6_000, seed: int = 0) -> Interactions:
        """Draw users, each item after the first from p.

        Users start at any time of a year, and without a clock their items are a day apart on
        average, so a split by time has users of all kinds on both sides.
        """
        if users < 1:
            raise ValueError(f"{users} users; wanted at least 1")
        rng = np.random.default_rng([seed, 3])
        lengths = rng.integers(4, 12, size=users)
        taken = np.zeros((users, 0), dtype=int)
        times = self.times(np.random.default_rng([seed, 6]), (users, 11)).astype(np.int64)
        for t in range(11):
            p = (self.next_distribution(taken, days_before(times / 86_400, t)) if t else
                 np.tile(self.popularity, (users, 1)))
            cumulative = p.cumsum(axis=1)
            draw = rng.random((users, 1)) * cumulative[:, -1:]
            taken = np.hstack((taken, (cumulative <= draw).sum(axis=1, keepdims=True)))
        starts = rng.integers(0, 365 * 86_400, size=(users, 1))
        if self.clock:
            times = starts + times
        else:
            times = starts + rng.exponential(86_400, size=taken.shape).cumsum(axis=1).astype(
                np.int64)
        real = np.arange(11) < lengths[:, None]
        owner = np.broadcast_to(np.arange(users)[:, None], real.shape)
        return Interactions(owner[real], taken[real], times[real], list(self.titles))


def days_before(times: np.ndarray | None, t: int) -> np.ndarray | None:
    """How long before event t each earlier one was.  (B, > t) -> (B, t), in the unit of times"""
    return None if times is None else times[:, t:t + 1] - times[:, :t]


def top(p: np.ndarray) -> np.ndarray:
    """The ten items with the largest p, ties by item id.  (n, N) -> (n, 10)"""
    return np.argsort(-p, axis=1, kind="stable")[:, :LENGTH]


def oracle_rows(world: SyntheticWorld, histories, true_p: np.ndarray,
                samples: int = 256) -> dict[str, Scores]:
    """What the best recommenders reach on these histories; true_p (n, N) is p(next | history).

    "order-aware" ranks by the distribution itself, and no recommender has a larger mean. Its
    "reversed" row is the same recommender, misled by reversed histories. "order-blind" ranks by p
    averaged over the orders that the items could have had, which is estimated from sampled orders.
    A model that scores higher than that row, beyond the errors, uses the order.

    In a world with a clock the distribution itself is "clock-aware", and "order-aware" is p
    averaged over the gaps that the items in their order could have had. A model that scores higher
    uses the clock.
    """
    histories = [np.asarray(h) for h in histories]
    sizes, ranked = np.array([len(h) for h in histories]), {}
    if world.clock:
        ranked["best, clock-aware"] = true_p
    kinds = ["best, order-aware", "best, order-aware | reversed", "best, order-blind"]
    ranked |= {name: np.zeros(true_p.shape) for name in kinds}
    for n in np.unique(sizes):
        rows = np.flatnonzero(sizes == n)
        group = np.stack([histories[i] for i in rows])
        for name, ordered in zip(kinds, (group, group[:, ::-1])):
            ranked[name][rows] = world.next_distribution(ordered) if not world.clock else (
                world.order_blind_distribution(ordered, samples, order_known=True))
        ranked[kinds[2]][rows] = world.order_blind_distribution(group, samples)
    return {name: summarise(list_values(top(p), np.zeros(len(p)), true_p))
            for name, p in ranked.items()}
