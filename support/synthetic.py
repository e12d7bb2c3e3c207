"""A world whose best recommendation is known: the default data, and an oracle for them.

This is the paper's Figure 1 made into a generator: the next item depends on the order of a history
by a stated law. So the value of every list of recommendations is known exactly, and so is what the
best order-aware recommender reaches. What the best order-blind one reaches is estimated closely.

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
    """Users whose next item depends on order by a stated law; the generator is the oracle.

        p(next | history) ∝ Σ_k w_k q(next | item_k) for items not in the history,
        w_k = (1 - s)/n + s decay^k / Σ_j decay^j,      k steps back in a history of n ≤ 10
        q(. | i) = 0.6 uniform over i's franchise + 0.3 uniform over i's genre + 0.1 popularity

    Here s is the order strength. At s = 0 the history is a set, and the best order-aware and
    order-blind recommenders are the same. (If the 0.6 went to the *next* part of the franchise, a
    set would betray its order.) Users have 4 to 11 interactions, of which the last is predicted, so
    the history that a recommender sees is always the whole one. The first item follows popularity.
    """

    def __init__(self, items: int = 300, strength: float = 1.0, decay: float = 0.5, seed: int = 0):
        if not 0 <= strength <= 1:
            raise ValueError(f"order strength is {strength}; wanted a number from 0 to 1")
        if items < 20:
            raise ValueError(f"{items} items; a synthetic world wants at least 20")
        self.strength, self.decay = strength, decay
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

    def weights(self, n: int) -> np.ndarray:
        """w_k of the law for a history of n items, oldest first, with sum 1.  -> (n,)"""
        recency = self.decay ** np.arange(n - 1, -1, -1)
        return (1 - self.strength) / n + self.strength * recency / recency.sum()

    def law(self, histories) -> np.ndarray:
        """Exact p(next | history) for histories of any lengths, oldest first.  -> (n, N)"""
        p = np.zeros((len(histories), len(self.titles)))
        sizes = np.array([len(h) for h in histories])
        for n in np.unique(sizes):
            p[sizes == n] = self.next_distribution(np.stack([h for h in histories if len(h) == n]))
        return p

    def next_distribution(self, histories: np.ndarray) -> np.ndarray:
        """Exact p(next | history), histories oldest first.  (B, n) -> (B, N)"""
        p = np.einsum("n,bnj->bj", self.weights(histories.shape[1]), self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def order_blind_distribution(self, histories: np.ndarray, samples: int = 256,
                                 seed: int = 0) -> np.ndarray:
        """p(next | the set of the history's items): p averaged over the orders it could have had.

        This is the best prediction of a recommender that knows which items were chosen, but not
        when. Orders are drawn one item at a time in proportion to the generator's own probabilities
        among the set's remaining items. An order's weight is the product of what those
        probabilities summed to, so the weighted mean is a consistent estimate (importance
        sampling).  (B, n) -> (B, N)
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
            for t in range(n):
                if t == 0:
                    p = np.broadcast_to(start, (samples, n))
                else:
                    score = np.einsum("t,mtj->mj", self.weights(t), among[b][order[:, :t]])
                    p = score / (1 - (score * chosen).sum(axis=1, keepdims=True))
                cumulative = np.where(chosen, 0.0, p).cumsum(axis=1)
                log_weight += np.log(cumulative[:, -1])
                draw = rng.random((samples, 1)) * cumulative[:, -1:]
                order[:, t] = (cumulative <= draw).sum(axis=1).clip(max=n - 1)
                np.put_along_axis(chosen, order[:, t:t + 1], True, axis=1)

            # p(next | order) = Σ_k w_k q(next | item_k) / Z(order) is linear in w_k / Z(order), so
            # it suffices to average these n numbers over the orders.
            w = np.zeros((samples, n))
            np.put_along_axis(w, order, np.broadcast_to(self.weights(n), w.shape), axis=1)
            w /= 1 - (w @ among[b]).sum(axis=1, keepdims=True)
            share = np.exp(log_weight - log_weight.max())
            coefficients[b] = share @ w / share.sum()
        p = np.einsum("bn,bnj->bj", coefficients, self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def interactions(self, users: int = 6_000, seed: int = 0) -> Interactions:
        """Draw users, each item after the first from p.

        Users start at any time of a year, and their items are a day apart on average, so a split by
        time has users of all kinds on both sides.
        """
        if users < 1:
            raise ValueError(f"{users} users; wanted at least 1")
        rng = np.random.default_rng([seed, 3])
        lengths = rng.integers(4, 12, size=users)
        taken = np.zeros((users, 0), dtype=int)
        for t in range(11):
            p = self.next_distribution(taken) if t else np.tile(self.popularity, (users, 1))
            cumulative = p.cumsum(axis=1)
            draw = rng.random((users, 1)) * cumulative[:, -1:]
            taken = np.hstack((taken, (cumulative <= draw).sum(axis=1, keepdims=True)))
        times = rng.integers(0, 365 * 86_400, size=(users, 1)) + rng.exponential(
            86_400, size=taken.shape).cumsum(axis=1).astype(np.int64)
        real = np.arange(11) < lengths[:, None]
        owner = np.broadcast_to(np.arange(users)[:, None], real.shape)
        return Interactions(owner[real], taken[real], times[real], list(self.titles))


def top(p: np.ndarray) -> np.ndarray:
    """The ten items with the largest p, ties by item id.  (n, N) -> (n, 10)"""
    return np.argsort(-p, axis=1, kind="stable")[:, :LENGTH]


def oracle_rows(world: SyntheticWorld, histories, law: np.ndarray,
                samples: int = 256) -> dict[str, Scores]:
    """What the best recommenders reach on these histories; law (n, N) is p(next | history).

    "order-aware" ranks by the law itself, and no recommender has a larger mean. Its "reversed" row
    is the same recommender, misled by reversed histories. "order-blind" ranks by p averaged over
    the orders that the items could have had, which is estimated from sampled orders. What a model
    reaches above that row, beyond the errors, it owes to order.
    """
    histories = [np.asarray(h) for h in histories]
    sizes = np.array([len(h) for h in histories])
    misled, blind = np.zeros((2, *law.shape))
    for n in np.unique(sizes):
        group = np.stack([h for h in histories if len(h) == n])
        misled[sizes == n] = world.next_distribution(group[:, ::-1])
        blind[sizes == n] = world.order_blind_distribution(group, samples)
    return {name: summarise(list_values(top(p), np.zeros(len(p)), law)) for name, p in (
        ("best, order-aware", law), ("best, order-aware | reversed", misled),
        ("best, order-blind", blind))}
