"""Interactions -> chronological sequences -> splits -> prompts with item spans -> batches (§3.1,
§5.1.1).

    python data.py --data ml-100k       what a data set holds, and one prompt with its item spans

Also the synthetic world: a generator in the spirit of the paper's Figure 1 whose best possible
recommendation is known. Raw files, downloads and the paper's filters are in datasets.py.

Shapes: B batch, T tokens, N items of the catalogue, n history length; in a Batch M supervised
positions, A places of a row; in the synthetic world M sampled orders.
"""

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from datasets import (FORMATS, SAMPLE, TABLE_2, Interactions, check_preparation, load_interactions,
                      prepare)

NO_ITEM = -1        # item_pos of tokens outside items: "null" in Eq. 6
IGNORE = -100       # label of positions that are not supervised

# ----------------------------------------------------------------------------------------------
# Sequences and splits


@dataclass(frozen=True)
class Sequences:
    """Windows into one shared item array: history = items[start:target], answer = items[target].

    Nothing is copied or tokenised: three integers a sequence, however long the histories are.
    """

    items: np.ndarray           # (rows,) sorted by user, timestamp, file order
    times: np.ndarray           # (rows,) seconds, or places where dated is False
    starts: np.ndarray          # (len,) first history row
    targets: np.ndarray         # (len,) row of the answer
    titles: list[str]           # (N,) of all items
    domain: str
    dated: bool = True
    index: str = "order"        # what k of Eq. 6 is: steps back, or "time": the item's age

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def timestamps(self) -> np.ndarray:
        """Of the answers.  -> (len,)"""
        return self.times[self.targets]

    def history(self, i: int) -> np.ndarray:
        """Item ids, oldest first."""
        return self.items[self.starts[i]:self.targets[i]]

    def ages(self, i: int) -> np.ndarray | None:
        """k of each history item by the clock, log2(1 + days before the answer); None by order."""
        if self.index == "order":
            return None
        days = (self.times[self.targets[i]] - self.times[self.starts[i]:self.targets[i]]) / 86_400
        return np.log2(1 + days)

    def target(self, i: int) -> int:
        """Item id of the answer."""
        return int(self.items[self.targets[i]])

    def seen(self) -> np.ndarray:
        """Items that stand in a history or are an answer.  -> (N,) bool"""
        seen = np.zeros(len(self.titles), dtype=bool)
        for start, target in zip(self.starts, self.targets):
            seen[self.items[start:target + 1]] = True
        return seen

    def words(self, items) -> list[str]:
        """Titles of item ids."""
        return [self.titles[item] for item in items]

    def select(self, indices) -> "Sequences":
        """The given sequences, in that order."""
        return replace(self, starts=self.starts[indices], targets=self.targets[indices])


def make_sequences(interactions: Interactions, min_history: int = 3, max_history: int = 10,
                   index: str = "order") -> Sequences:
    """One sequence per interaction that has at least min_history before it (§5.1.1).

    Users are sorted by (timestamp, file order); the history is the last max_history items. Raises
    ValueError for index "time" where the data have no times.
    """
    if index == "time" and not interactions.dated:
        raise ValueError("index 'time' wants data with times; these only say which came first")
    order = np.lexsort((interactions.timestamps, interactions.users))   # ties keep file order
    users = interactions.users[order]
    rows = np.arange(len(users))
    first = np.searchsorted(users, users)                   # first row of the row's user
    targets = rows[rows - first >= min_history]
    return Sequences(interactions.items[order], interactions.timestamps[order],
                     np.maximum(first[targets], targets - max_history), targets,
                     interactions.titles, interactions.domain, interactions.dated, index)


def split_by_time(sequences: Sequences, ratios=(8, 1, 1)) -> tuple[Sequences, Sequences, Sequences]:
    """Cut at the 80 % and 90 % points of the target timestamps: nothing of the future in training.

    Raises ValueError for fewer than 10 sequences.
    """
    if len(sequences) < 10:
        raise ValueError(f"{len(sequences)} sequences; wanted at least 10 to split 8:1:1. A user "
                         "gives one for every interaction after the third")
    order = np.argsort(sequences.timestamps, kind="stable")
    a = len(order) * ratios[0] // sum(ratios)
    b = len(order) * (ratios[0] + ratios[1]) // sum(ratios)
    return tuple(sequences.select(part) for part in (order[:a], order[a:b], order[b:]))


# ----------------------------------------------------------------------------------------------
# Prompts

TEMPLATE = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.\x20

### Instruction:
Given a list of {things} the user has {verb} before, please recommend a new {thing} that the user \
likes to the user.

### Input:
The user has {verb} the following {things} before:{history}
\x20

### Response:
"""

DOMAINS = {     # words of Table 1 and of BIGRec; the music words are ours, no source has any
    "movies": {"things": "movies", "thing": "movie", "verb": "watched"},
    "games": {"things": "video games", "thing": "video game", "verb": "played"},
    "artists": {"things": "music artists", "thing": "music artist", "verb": "listened to"},
    "items": {"things": "items", "thing": "item", "verb": "chosen"},
}


def build_prompt(history_titles, domain: str = "movies") -> tuple[str, list[tuple[int, int]]]:
    """The one prompt of this project (Table 1), and each title's character span [start, end)."""
    before, after = TEMPLATE.split("{history}")
    words = DOMAINS[domain]
    text, spans = before.format(**words), []
    for title in history_titles:
        text += ', "' if spans else '"'
        spans.append((len(text), len(text) + len(title)))
        text += title + '"'
    return text + after, spans


def _json_object(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, which also decides whether a text begins with BOS, and its special ids."""

    bpe: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]        # each ends an answer; eos_ids[0] is the one we train on
    bos_id: int | None = None
    pad_id: int = 0                 # fills rows; never seen, so any id does

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json and, in this order, the ids in the other files of a checkpoint.

        tokenizer_config.json names tokens; generation_config.json, or else config.json, gives ids.
        EOS is all of them together, as generation stops at any; pad is EOS where none is given.
        Raises FileNotFoundError or ValueError that name the file, also for ids that the base has no
        embedding for.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. A checkpoint folder holds config.json, "
                                    "model.safetensors and tokenizer.json")
        try:
            bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:      # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        bpe.no_truncation()             # settings of somebody's last call; they cut prompts short
        bpe.no_padding()
        names, generation, config = (
            _json_object(path.parent / name) for name in ("tokenizer_config.json",
                                                          "generation_config.json", "config.json"))
        ids = {"bos": [], "eos": [], "pad": []}
        for kind, found in ids.items():
            token = names.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and bpe.token_to_id(token) is not None:
                found.append(bpe.token_to_id(token))
            given = generation.get(f"{kind}_token_id")
            given = config.get(f"{kind}_token_id") if given is None else given
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, int) and value >= 0:       # older files say -1 for none
                    found.append(value)
        if not ids["eos"]:
            raise ValueError(f"{path.parent}: no EOS token in tokenizer_config.json, "
                             "generation_config.json or config.json; answers could never end")
        largest = max(*bpe.get_vocab(with_added_tokens=True).values(), *ids["eos"], *ids["bos"])
        if largest >= (rows := config.get("vocab_size", math.inf)):
            raise ValueError(f"{path}: holds token id {largest}, but the embedding has {rows} rows "
                             "(vocab_size in config.json). Is it the tokenizer of another model?")
        return cls(bpe, tuple(dict.fromkeys(ids["eos"])), next(iter(ids["bos"]), None),
                   (ids["pad"] + ids["eos"])[0])

    def decode(self, tokens: list[int]) -> str:
        """Token ids -> text, special tokens left out."""
        return self.bpe.decode(tokens, skip_special_tokens=True)


def tiny_tokenizer(titles: list[str], counts: np.ndarray, domain: str, size: int) -> Tokenizer:
    """Of the embedded base: byte-level BPE on the prompt and on titles as often as training saw.

    Words may merge across spaces, never across quotes: a popular title becomes one or two tokens,
    and `", "` stands alone, so that prompts are short and answers begin at a token of their own.
    A sequel's number at the end of a title stands alone too, so that parts share their name.
    """
    pre, level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre.Sequence([
        pre.Split(tokenizers.Regex(r'", "|"| \d+(?="|$)|(?:(?! \d+(?:"|$))[^"])+'), "isolated"),
        level(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    prompt, often = build_prompt(titles[:2], domain)[0], int(counts.max()) + 1
    corpus = [prompt] * often + [       # the prompt's own words come first
        f'"{title}"' for title, count in zip(titles, counts) for _ in range(int(count) + 1)]
    bpe.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=sorted(level.alphabet()), show_progress=False))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return Tokenizer(bpe, eos_ids=(1,), bos_id=0, pad_id=1)


@dataclass(frozen=True)
class Example:
    """One prompt, with its answer when there is one. Lists of equal length T."""

    tokens: list[int]       # BOS (if the tokenizer adds one), prompt, answer, EOS
    item_pos: list[int] | list[float]   # k of Eq. 6, of the token's item; NO_ITEM outside items
    labels: list[int]       # the token itself where it is part of the answer, else IGNORE


def encode_examples(tokenizer: Tokenizer, histories, targets, domain: str = "movies",
                    ages=None) -> list[Example]:
    """Tokenise many. histories: titles, oldest first; targets: a title each, None at inference.

    k of an item is its number of steps back from the newest, or what `ages` gives (a list of k for
    each history, or None for steps).

    Items and answer are found by the tokenizer's character offsets: a token belongs to an item if
    it overlaps its title, also when it straddles a quote. Token ids never decide: the same title
    has other ids at another place.
    """
    texts, spans, starts = [], [], []
    for history, target in zip(histories, targets, strict=True):
        prompt, places = build_prompt(history, domain)
        starts.append(len(prompt))
        spans.append(np.array(places).reshape(-1, 2))
        texts.append(prompt if target is None else f'{prompt}"{target}"')
    examples = []
    for encoding, span, start, target, age in zip(
            tokenizer.bpe.encode_batch(texts), spans, starts, targets,
            ages if ages is not None else itertools.repeat(None)):
        begin, end = np.array(encoding.offsets).T
        item = np.searchsorted(span[:, 1], begin, side="right")     # first title to end after it
        inside = item < len(span)
        inside[inside] = end[inside] > span[item[inside], 0]
        tokens = encoding.ids
        k = np.arange(len(span), -1, -1) - 1 if age is None else np.append(age, NO_ITEM)
        item_pos = np.where(inside, k[item], NO_ITEM).tolist()
        labels = np.where(end > start, tokens, IGNORE).tolist()
        if target is not None:
            eos = tokenizer.eos_ids[0]
            tokens, item_pos, labels = tokens + [eos], item_pos + [NO_ITEM], labels + [eos]
        examples.append(Example(tokens, item_pos, labels))
    return examples


def encode_example(tokenizer: Tokenizer, history_titles, target_title: str | None,
                   domain: str = "movies", ages=None) -> Example:
    """One prompt and its answer as tokens, item positions and labels (§3.1, Eq. 6)."""
    return encode_examples(tokenizer, [history_titles], [target_title], domain, [ages])[0]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: with causal attention no real position sees a pad.

    From the labels it derives where the M targets are, here rather than on a GPU, which would have
    to be waited for.
    """

    tokens: Tensor          # (B, T)
    item_pos: Tensor        # (B, T) integer or float32, NO_ITEM outside items and on pads
    labels: Tensor          # (B, T), already shifted: the token that comes next, or IGNORE
    prefix: int             # leading columns equal in all rows, before any item or label
    places: Tensor = field(init=False)      # (B, A) columns of each row's labels, then fillers
    supervised: Tensor = field(init=False)  # (M,) which of the B·A places are no fillers
    targets: Tensor = field(init=False)     # (M,) their labels

    def __post_init__(self):
        real = self.labels != IGNORE
        counts = real.sum(dim=1, keepdim=True)
        filled = torch.arange(max(1, int(counts.max())), device=counts.device) < counts
        places = (~real).int().argsort(dim=1, stable=True)[:, :filled.shape[1]]
        derived = {"places": places.clamp(min=self.prefix), "targets": self.labels[real],
                   "supervised": filled.flatten().nonzero()[:, 0]}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def split(self, rows: int) -> list["Batch"]:
        """Batches of at most so many rows, in order, each as wide as its own longest row."""
        if rows >= len(self.tokens):
            return [self]
        parts = []
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            width = int((self.labels[part] != IGNORE).any(dim=0).nonzero().max()) + 1
            parts.append(Batch(self.tokens[part, :width], self.item_pos[part, :width],
                               self.labels[part, :width], self.prefix))
        return parts

    def to(self, device) -> "Batch":
        """The same batch on another device; a GPU copies while it works."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                if torch.device(device).type == "cuda" and value.device.type == "cpu":
                    value = value.pin_memory()
                object.__setattr__(moved, name, value.to(device, non_blocking=True))
        return moved


def collate(examples: list[Example], pad_id: int = 0) -> Batch:
    """Pad to the longest example, shift the labels, find the common prefix."""
    shape = len(examples), max(len(e.tokens) for e in examples)
    tokens, item_pos, labels = (np.full(shape, fill) for fill in (pad_id, NO_ITEM, IGNORE))
    if any(isinstance(e.item_pos[0], float) for e in examples):
        item_pos = item_pos.astype(np.float32)          # ages are real numbers
    for row, e in enumerate(examples):
        n = len(e.tokens)
        tokens[row, :n], item_pos[row, :n], labels[row, :n - 1] = e.tokens, e.item_pos, e.labels[1:]
    same = ((tokens == tokens[0]) & (item_pos == NO_ITEM) & (labels == IGNORE)).all(axis=0)
    prefix = min(int(same.cumprod().sum()), min(len(e.tokens) for e in examples) - 1)
    return Batch(*(torch.from_numpy(x) for x in (tokens, item_pos, labels)), prefix)


def check_context(tokenizer: Tokenizer, sequences: Sequences, context: int) -> None:
    """Raise ValueError if the longest sequence does not fit a context of so many tokens."""
    width = np.array([len(e.ids) for e in tokenizer.bpe.encode_batch(sequences.titles)])
    total = np.concatenate(([0], width[sequences.items].cumsum()))
    i = int(np.argmax(total[sequences.targets + 1] - total[sequences.starts]))
    history = sequences.words(sequences.history(i))
    answer = sequences.titles[sequences.target(i)]
    tokens = len(encode_example(tokenizer, history, answer, sequences.domain).tokens)
    if tokens > context:
        raise ValueError(f"a history of {len(history)} items, {history[0][:60]!r} to "
                         f"{history[-1][:60]!r}, makes {tokens} tokens with its answer, more than "
                         f"the base's context of {context}. Use a base with a longer context, or "
                         "shorten the titles")


def show_prompt(tokenizer: Tokenizer, example: Example) -> str:
    """The prompt as text, each item as ⟨its tokens decoded⟩[k = index, tokens first..last]."""
    text, first = "", 0
    for k, group in itertools.groupby(example.item_pos):
        last = first + len(list(group))
        piece = tokenizer.bpe.decode(example.tokens[first:last], skip_special_tokens=False)
        text += piece if k == NO_ITEM else f"⟨{piece}⟩[k={k:.3g}, tokens {first}..{last - 1}]"
        first = last
    return text


# ----------------------------------------------------------------------------------------------
# The synthetic world: the next item depends on order in a known way, so the best is known too

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

    s is the order strength: at 0 the history is a set, and the best order-aware and order-blind
    recommenders are the same. (Were the 0.6 for the *next* part, a set would betray its order.)
    Users have 4 to 11 interactions, so a visible history is a whole one; the first item follows
    popularity.
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
        for used in itertools.count():      # franchises of three to eight parts, genre by genre
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
        popularity = 1.0 / np.arange(1, items + 1) ** 0.8
        self.popularity = rng.permutation(popularity / popularity.sum())
        same_genre = genre[:, None] == genre[None, :]
        siblings = franchise[:, None] == franchise[None, :]
        self.q = sum(share * among / among.sum(axis=1, keepdims=True) for share, among in
                     ((0.6, siblings), (0.3, same_genre), (0.1, self.popularity[None, :])))

    def weights(self, n: int) -> np.ndarray:
        """w_k for a history of n, oldest first. -> (n,)"""
        recency = self.decay ** np.arange(n - 1, -1, -1)
        return (1 - self.strength) / n + self.strength * recency / recency.sum()

    def next_distribution(self, histories: np.ndarray) -> np.ndarray:
        """Exact p(next | history), histories oldest first.  (B, n) -> (B, N)"""
        p = np.einsum("n,bnj->bj", self.weights(histories.shape[1]), self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def order_blind_distribution(self, histories: np.ndarray, samples: int = 256,
                                 seed: int = 0) -> np.ndarray:
        """p(next | the set of the history's items): p averaged over the orders it could have had.

        Orders are drawn one item at a time in proportion to the generator's own probabilities among
        the set's remaining items; an order's weight is the product of what those probabilities
        summed to, so the weighted mean is a consistent estimate.  (B, n) -> (B, N)
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
            # p(next | order) = Σ_k w_k q(next | item_k) / Z(order) is linear in w_k / Z: average it
            w = np.zeros((samples, n))
            np.put_along_axis(w, order, np.broadcast_to(self.weights(n), w.shape), axis=1)
            w /= 1 - (w @ among[b]).sum(axis=1, keepdims=True)
            share = np.exp(log_weight - log_weight.max())
            coefficients[b] = share @ w / share.sum()
        p = np.einsum("bn,bnj->bj", coefficients, self.q[histories])
        np.put_along_axis(p, histories, 0.0, axis=1)
        return p / p.sum(axis=1, keepdims=True)

    def interactions(self, users: int = 2_000, seed: int = 0) -> Interactions:
        """Draw users: first item, then next items from p; starts spread over a year, days apart."""
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


# ----------------------------------------------------------------------------------------------
# From a data set's name to splits; what it holds


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data and how prepared: the flags of the same names."""

    data: str
    data_dir: str
    domain: str | None
    sample: float
    chronological: bool
    index: str
    skip_bad_lines: bool
    order_strength: float
    limit_train: int
    seed: int

    def __post_init__(self):
        check_preparation(self.data, self.sample, self.chronological)
        if self.index == "time" and self.data == "lastfm" and not self.chronological:
            raise ValueError("--index time wants times, and lastfm as the field uses it has none; "
                             "add --chronological")
        for name in ("limit_train", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; wanted a "
                                 "whole number of at least 0")


def data_flags(flag: Callable) -> None:
    """The flags of DataOptions; flag(name, text, default in words, **rest of add_argument)."""
    flag("--data", "synthetic needs no download; movielens is MovieLens-1M; fetched if need be: "
         f"{', '.join(FORMATS)}; or a folder with interactions.csv (user,item,timestamp) and "
         "items.csv (item,title), or RecBole's NAME.inter and NAME.item", "synthetic",
         metavar="NAME|FOLDER")
    flag("--data-dir", "where the public data sets lie or are put, files plain or gzipped", "data",
         metavar="DIR")
    flag("--domain", "the prompt's words for an item", "movies, games or artists with the public "
         "data sets, items with a folder", choices=list(DOMAINS))
    flag("--sample", "share of the data: of the interactions, by drawing users; with steam of the "
         "users and of the games", "0.1 with movielens, 1/3 with steam, as the paper's text has it "
         "(D4); else 1", type=float, metavar="SHARE")
    flag("--chronological", "lastfm only: by date of tagging; the order the field uses is by "
         "artist number, not by time (D9)", "no", action=argparse.BooleanOptionalAction)
    flag("--index", "k of an item in Eq. 6: order, its steps back from the newest (D1); or time, "
         "log2(1 + days before the recommendation), a clock beyond the paper", "order",
         choices=["order", "time"])
    flag("--skip-bad-lines", "count and report malformed lines instead of stopping at the first",
         "no", action=argparse.BooleanOptionalAction)
    flag("--order-strength", "synthetic only: how much order decides the next item, from 0, a set "
         "of items, to 1, the newest first of all", "1", type=float, metavar="S")
    flag("--limit-train", "use the N latest training sequences only; 0 = all", "0", type=int,
         metavar="N")
    flag("--seed", "of world, samples, base and tuning", "0", type=int)


def data_options(given: dict) -> dict:
    """Values of the flags above, given or by default. Raises ValueError for contradictions."""
    data = given.get("data", "synthetic")
    for flag, wanted, here in (("order_strength", "--data synthetic", data == "synthetic"),
                               ("data_dir", "a public data set", data in FORMATS),
                               ("sample", "data that are not synthetic", data != "synthetic"),
                               ("domain", "data that are not synthetic", data != "synthetic")):
        if flag in given and not here:
            raise ValueError(f"--{flag.replace('_', '-')} goes with {wanted}; with --data {data} "
                             "drop it")
    defaults = {"data": data, "data_dir": "data", "domain": None, "sample": SAMPLE.get(data, 1.0),
                "chronological": False, "index": "order", "skip_bad_lines": False,
                "order_strength": 1.0, "limit_train": 0, "seed": 0}
    return {key: given.get(key, value) for key, value in defaults.items()}


def load_data(options: DataOptions) -> tuple[Interactions, "SyntheticWorld | None"]:
    """Interactions after the paper's preparation, each step printed; and the world if synthetic."""
    if options.data == "synthetic":
        world = SyntheticWorld(strength=options.order_strength, seed=options.seed)
        return world.interactions(seed=options.seed), world
    raw = load_interactions(options.data, options.data_dir, options.skip_bad_lines, options.domain)
    print(f"raw | {_counted(raw.counts())}")
    prepared = prepare(raw, options.data, options.sample, options.seed, options.chronological)
    for step in prepared.steps:
        print(f"step | {step}")
    return prepared, None


def make_splits(interactions: Interactions, options: DataOptions
                ) -> tuple[tuple[Sequences, Sequences, Sequences], dict]:
    """(train, valid, test) and a record of counts, steps and checksums; counts beside Table 2."""
    sequences = make_sequences(interactions, index=options.index)
    train_set, valid_set, test_set = split_by_time(sequences)
    if options.limit_train:
        train_set = train_set.select(slice(-options.limit_train, None))
    counts = interactions.counts() | {
        "items": len(interactions.titles), "sequences": len(sequences), "train": len(train_set),
        "valid": len(valid_set), "test": len(test_set)}
    print(f"data {options.data} | {_counted(counts)}")
    paper = TABLE_2.get(options.data, {})
    print(f"paper's Table 2 | {_counted(paper) or f'has no {options.data}'}")
    record = {"counts": counts, "steps": interactions.steps, "checksums": interactions.checksums}
    return (train_set, valid_set, test_set), record


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def histogram(values: np.ndarray) -> str:
    """A text histogram over 1, 2-3, 4-7, 8-15 ...: how many of the values, and a bar."""
    bins = np.bincount(np.log2(values).astype(int))
    lines = []
    for power, count in enumerate(bins):
        low, high = 2**power, 2 ** (power + 1) - 1
        name = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        lines.append(f"{name:>17} {count:>9,} {'#' * math.ceil(50 * count / bins.max())}")
    return "\n".join(lines)


def describe(interactions: Interactions, splits, tokenizer: Tokenizer) -> str:
    """What a reader should know of a data set before trusting a number, as text."""
    train_set, valid_set, test_set = splits
    users, items = (np.unique(ids, return_counts=True)[1] for ids in (interactions.users,
                                                                      interactions.items))

    def day(time) -> str:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d}" if train_set.dated else str(time)
    dates = [f"{name} {day(s.timestamps.min())} to {day(s.timestamps.max())}"
             for name, s in zip(("train", "valid", "test"), splits)]
    unseen = 100 * (1 - train_set.seen()[test_set.items[test_set.targets]].mean())
    moments = np.unique(np.stack((interactions.users, interactions.timestamps)), axis=1).shape[1]
    tied = 100 * (1 - moments / len(interactions.users))
    drawn = np.random.default_rng(0).choice(len(train_set), min(1_000, len(train_set)), False)
    examples = encode_examples(tokenizer, [train_set.words(train_set.history(i)) for i in drawn],
                               [None] * len(drawn), train_set.domain)
    lengths = np.array([len(e.tokens) for e in examples])
    first = encode_example(tokenizer, train_set.words(train_set.history(0)),
                           train_set.titles[train_set.target(0)], train_set.domain,
                           train_set.ages(0))
    return "\n".join([
        "", "users by their number of interactions", histogram(users),
        "", "items by their number of interactions", histogram(items),
        "", f"answers | {' | '.join(dates)}",
        f"ties | {tied:.1f} % of the rows have a time their user has had; there file order decides",
        f"test answers never seen in training | {unseen:.1f} %",
        f"tokens per prompt | median {np.median(lengths):.0f}, 95 % up to "
        f"{np.quantile(lengths, 0.95):.0f}, longest {lengths.max()} of {len(drawn):,} drawn",
        "", "a training prompt, each item ⟨marked⟩ with its index k", "-" * 80,
        show_prompt(tokenizer, first), "-" * 80])


def exit_status(work: Callable[[], None]) -> int:
    """Of a command: 0, or 2 after one line on what a user did wrong, or 130 when interrupted."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"interrupted; {str(stop) or 'files already written are whole'}", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """Show what a data set holds."""
    ap = argparse.ArgumentParser(prog="data.py", allow_abbrev=False,
                                 description="Show what a data set holds, and one prompt.")

    def flag(name: str, text: str, default: str, **rest) -> None:
        ap.add_argument(name, help=f"{text} (default: {default})", **rest)
    data_flags(flag)
    flag("--tokenizer", "of a checkpoint folder", "the tiny base's, made on the spot",
         metavar="FOLDER")
    given = {name: value for name, value in vars(ap.parse_args(argv)).items() if value is not None}
    folder = given.pop("tokenizer", None)

    def show() -> None:
        options = DataOptions(**data_options(given))
        interactions, _ = load_data(options)
        splits, _ = make_splits(interactions, options)
        train_set = splits[0]
        if folder:
            tokenizer = Tokenizer.from_folder(folder)
        else:
            counts = np.bincount(train_set.items[train_set.targets],
                                 minlength=len(train_set.titles))
            tokenizer = tiny_tokenizer(train_set.titles, counts, train_set.domain, 8192)
        print(describe(interactions, splits, tokenizer))
    return exit_status(show)


if __name__ == "__main__":
    sys.exit(main())
