"""Raw files -> chronological sequences -> splits -> prompts with item spans -> batches (§3.1,
§5.1.1).

Also the synthetic world: a generator in the spirit of the paper's Figure 1 whose best possible
recommendation is known. Imports nothing of ours. Downloads and the paper's filters are left out.

Shapes: B batch, T tokens, N items of the catalogue, n history length, M sampled orders.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

NO_ITEM = -1        # item_pos of tokens outside items: "null" in Eq. 6
IGNORE = -100       # label of positions that are not supervised

# ----------------------------------------------------------------------------------------------
# Raw interactions


@dataclass(frozen=True)
class Interactions:
    """Every raw row: who took which item when. Row order is the file's order."""

    users: np.ndarray           # (rows,) int64, the file's own numbers
    items: np.ndarray           # (rows,) int64, index into titles
    timestamps: np.ndarray      # (rows,) int64, seconds
    titles: list[str]           # unique, in the order of the item file
    domain: str = "movies"      # a key of DOMAINS: the words of the prompt
    checksums: dict[str, str] = field(default_factory=dict)     # file name -> sha256


@dataclass(frozen=True)
class Format:
    """How one data set lies on disk. separator "csv" means quoted CSV with a header line."""

    folder: str
    ratings: str
    titles: str
    separators: tuple[str, str]     # of the two files
    columns: tuple[int, int]        # fields a line, of the two files
    encoding: str
    address: str


FORMATS = {
    "movielens": Format("ml-1m", "ratings.dat", "movies.dat", ("::", "::"), (4, 3), "latin-1",
                        "https://files.grouplens.org/datasets/movielens/ml-1m.zip"),
    "ml-100k": Format("ml-100k", "u.data", "u.item", ("\t", "|"), (4, 24), "latin-1",
                      "https://files.grouplens.org/datasets/movielens/ml-100k.zip"),
    "ml-latest-small": Format(
        "ml-latest-small", "ratings.csv", "movies.csv", ("csv", "csv"), (4, 3), "utf-8",
        "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"),
}
FORMATS["ml-1m"] = FORMATS["movielens"]

TABLE_2 = {"movielens": {"sequences": 192_483, "items": 3_952, "interactions": 999_611}}
TABLE_2["ml-1m"] = TABLE_2["movielens"]


def _rows(path: Path, separator: str, columns: int, encoding: str, checksums: dict):
    """Yield (line number, fields) of a text file, plain or gzipped."""
    packed = path.with_name(path.name + ".gz")
    try:
        if not path.exists():
            path = packed
        raw = path.read_bytes()
        if path == packed:
            raw = gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}). Fetch it again") from None
    checksums[path.name] = hashlib.sha256(raw).hexdigest()
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#x} is not {encoding} text. "
                         f"Convert the file to {encoding}") from None
    if separator == "csv":
        reader = csv.reader(io.StringIO(text, newline=""))
        next(reader, None)
        rows = ((reader.line_num, fields) for fields in reader)
    else:
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        rows = enumerate((line.rstrip("\r").split(separator) for line in lines), start=1)
    empty = True
    for number, fields in rows:
        empty = False
        if len(fields) != columns:
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, expected {columns} "
                             f"separated by {',' if separator == 'csv' else separator!r}. "
                             "Repair or remove the line")
        yield number, fields
    if empty:
        raise ValueError(f"{path}: holds no rows. Fetch it again")


def load_interactions(name: str, data_dir: str | Path) -> Interactions:
    """Read a data set from data_dir/<its folder>; ratings themselves are not used, as in the paper.

    Raises FileNotFoundError (where it looked, what to download) or ValueError (file and line).
    """
    if name not in FORMATS:
        raise ValueError(f"unknown data set {name!r}; known: synthetic, {', '.join(FORMATS)}")
    form = FORMATS[name]
    folder = Path(data_dir) / form.folder
    for file in (form.ratings, form.titles):
        if not (folder / file).is_file() and not (folder / f"{file}.gz").is_file():
            raise FileNotFoundError(
                f"{folder / file}: not found (nor {file}.gz). Download {form.address}, unpack it "
                f"in {data_dir}, or pass --data-dir; --data synthetic needs nothing")
    checksums: dict[str, str] = {}
    row, path = (0, []), folder / form.titles       # where reading stands, for error messages
    try:
        index, titles = {}, []
        for row in _rows(path, form.separators[1], form.columns[1], form.encoding, checksums):
            item, title = int(row[1][0]), row[1][1].strip()
            if not title or "\n" in title:
                raise ValueError(f"title {row[1][1]!r} is empty or has a line break")
            if item in index:
                raise ValueError(f"item {item} is listed twice")
            index[item] = len(titles)
            titles.append(title)
        row, path = (0, []), folder / form.ratings
        users, items, timestamps = array("q"), array("q"), array("q")
        for row in _rows(path, form.separators[0], form.columns[0], form.encoding, checksums):
            user, item, _, timestamp = row[1]
            users.append(int(user))
            items.append(index[int(item)])
            timestamps.append(int(timestamp))
    except KeyError as error:
        raise ValueError(f"{path}, line {row[0]}: unknown item {error}, not in {form.titles}. "
                         "Repair or remove the line") from None
    except (ValueError, OverflowError, csv.Error) as error:
        if str(error).startswith(str(folder)):
            raise
        what = re.sub(r"invalid literal.*: ", "expected an integer, got ", str(error))
        raise ValueError(f"{path}, line {row[0]}: {what}. Repair or remove the line") from None
    columns = (np.asarray(column, dtype=np.int64) for column in (users, items, timestamps))
    return Interactions(*columns, unique_titles(titles), checksums=checksums)


def unique_titles(titles: list[str]) -> list[str]:
    """Give the second, third ... item of one title the suffix " [2]", " [3]" ..."""
    taken, seen, unique = set(titles), Counter(), []
    for title in titles:
        seen[title] += 1
        new, count = title, seen[title]
        while count > 1 and (new == title or new in taken):
            new, count = f"{title} [{count}]", count + 1
        taken.add(new)
        unique.append(new)
    return unique


# ----------------------------------------------------------------------------------------------
# Sequences and splits


@dataclass(frozen=True)
class Sequences:
    """Windows into one shared item array: history = items[start:target], answer = items[target].

    Nothing is copied or tokenised: three integers a sequence, however long the histories are.
    """

    items: np.ndarray           # (rows,) sorted by user, timestamp, file order
    starts: np.ndarray          # (len,) first history row
    targets: np.ndarray         # (len,) row of the answer
    timestamps: np.ndarray      # (len,) of the answer
    titles: list[str]           # (N,) of all items
    domain: str

    def __len__(self) -> int:
        return len(self.targets)

    def history(self, i: int) -> np.ndarray:
        """Item ids, oldest first."""
        return self.items[self.starts[i]:self.targets[i]]

    def target(self, i: int) -> int:
        """Item id of the answer."""
        return int(self.items[self.targets[i]])

    def words(self, items) -> list[str]:
        """Titles of item ids."""
        return [self.titles[item] for item in items]

    def select(self, indices) -> "Sequences":
        """The given sequences, in that order."""
        return replace(self, starts=self.starts[indices], targets=self.targets[indices],
                       timestamps=self.timestamps[indices])


def make_sequences(interactions: Interactions, min_history: int = 3,
                   max_history: int = 10) -> Sequences:
    """One sequence per interaction that has at least min_history before it (§5.1.1).

    Users are sorted by (timestamp, file order); the history is the last max_history items.
    """
    order = np.lexsort((interactions.timestamps, interactions.users))   # ties keep file order
    users = interactions.users[order]
    rows = np.arange(len(users))
    first = np.searchsorted(users, users)                   # first row of the row's user
    targets = rows[rows - first >= min_history]
    return Sequences(interactions.items[order], np.maximum(first[targets], targets - max_history),
                     targets, interactions.timestamps[order][targets], interactions.titles,
                     interactions.domain)


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


@dataclass(frozen=True)
class Example:
    """One prompt, with its answer when there is one. Lists of equal length T."""

    tokens: list[int]       # BOS (if the tokenizer adds one), prompt, answer, EOS
    item_pos: list[int]     # steps back from the newest item, k of Eq. 6; NO_ITEM outside items
    labels: list[int]       # the token itself where it is part of the answer, else IGNORE


def encode_examples(tokenizer: Tokenizer, histories, targets,
                    domain: str = "movies") -> list[Example]:
    """Tokenise many. histories: titles, oldest first; targets: a title each, None at inference.

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
    for encoding, span, start, target in zip(tokenizer.bpe.encode_batch(texts), spans, starts,
                                             targets):
        begin, end = np.array(encoding.offsets).T
        item = np.searchsorted(span[:, 1], begin, side="right")     # first title to end after it
        inside = item < len(span)
        inside[inside] = end[inside] > span[item[inside], 0]
        tokens = encoding.ids
        item_pos = np.where(inside, len(span) - 1 - item, NO_ITEM).tolist()
        labels = np.where(end > start, tokens, IGNORE).tolist()
        if target is not None:
            eos = tokenizer.eos_ids[0]
            tokens, item_pos, labels = tokens + [eos], item_pos + [NO_ITEM], labels + [eos]
        examples.append(Example(tokens, item_pos, labels))
    return examples


def encode_example(tokenizer: Tokenizer, history_titles, target_title: str | None,
                   domain: str = "movies") -> Example:
    """One prompt and its answer as tokens, item positions and labels (§3.1, Eq. 6)."""
    return encode_examples(tokenizer, [history_titles], [target_title], domain)[0]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: with causal attention no real position sees a pad."""

    tokens: Tensor          # (B, T)
    item_pos: Tensor        # (B, T), NO_ITEM outside items and on pads
    labels: Tensor          # (B, T), already shifted: the token that comes next, or IGNORE
    prefix: int             # leading columns equal in all rows, before any item or label

    def to(self, device) -> "Batch":
        """The same batch on another device."""
        return Batch(*(x.to(device, non_blocking=True) for x in (self.tokens, self.item_pos,
                                                                 self.labels)),
                     self.prefix)


def collate(examples: list[Example], pad_id: int = 0) -> Batch:
    """Pad to the longest example, shift the labels, find the common prefix."""
    shape = len(examples), max(len(e.tokens) for e in examples)
    tokens, item_pos, labels = (np.full(shape, fill) for fill in (pad_id, NO_ITEM, IGNORE))
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
        raise ValueError(f"a history of {len(history)} items, {history[0]!r} to {history[-1]!r}, "
                         f"makes {tokens} tokens with its answer, more than the base's context of "
                         f"{context}. Use a base with a longer context")


def show_prompt(tokenizer: Tokenizer, example: Example) -> str:
    """The prompt as text, each item as ⟨its tokens decoded⟩[k = index, tokens first..last]."""
    text, first = "", 0
    for k, group in itertools.groupby(example.item_pos):
        last = first + len(list(group))
        piece = tokenizer.bpe.decode(example.tokens[first:last], skip_special_tokens=False)
        text += piece if k == NO_ITEM else f"⟨{piece}⟩[k={k}, tokens {first}..{last - 1}]"
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
