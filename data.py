"""Interactions -> chronological sequences -> splits -> prompts with item spans -> batches.

This file implements §3.1 (the prompt and its answer) and §5.1.1 (sequences and splits). It needs
no other file of ours; read it after llama.py. Raw files and the paper's filters are in
support/datasets.py.

Shapes: N items of the catalogue, B rows of a batch, T tokens, M supervised tokens of a batch,
A the most supervised tokens that one of its rows has.
"""

import copy
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import tokenizers
import torch
from torch import Tensor

NO_ITEM = -1        # item_pos of tokens outside items: Eq. 6 gives them the embedding "null"
IGNORE = -100       # label of a position whose next token is not supervised


# ----------------------------------------------------------------------------------------------
# Sequences and splits (§5.1.1)


@dataclass(frozen=True)
class Interactions:
    """Who took which item when. The order of the rows is that of the file they were read from."""

    users: np.ndarray           # (rows,) int64
    items: np.ndarray           # (rows,) int64, an index into titles
    timestamps: np.ndarray      # (rows,) int64, seconds since 1970
    titles: list[str]           # (N,) unique
    domain: str = "movies"      # a key of DOMAINS: it chooses the words of the prompt
    checksums: dict[str, str] = field(default_factory=dict)     # file name -> SHA-256 of its text
    steps: tuple[str, ...] = () # what was done to the raw rows, each step with its counts
    dated: bool = True          # False: timestamps only say what came first


@dataclass(frozen=True)
class Sequences:
    """Histories with their answers, as windows into one array of items.

    Sequence i has the history items[starts[i]:targets[i]] and the answer items[targets[i]]. So a
    sequence costs two integers, however long its history is.
    """

    items: np.ndarray           # (rows,) sorted by user, then time, then place in the file
    times: np.ndarray           # (rows,) seconds, or only an order where dated is False
    starts: np.ndarray          # (len,) the first row of each history
    targets: np.ndarray         # (len,) the row of each answer
    titles: list[str]           # (N,) of all items
    domain: str
    dated: bool = True
    index: str = "order"        # what k of Eq. 6 counts: steps back ("order") or age ("time"), D15

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def timestamps(self) -> np.ndarray:
        """Times of the answers.  -> (len,)"""
        return self.times[self.targets]

    def history(self, i: int) -> np.ndarray:
        """Item ids of history i, oldest first."""
        return self.items[self.starts[i]:self.targets[i]]

    def target(self, i: int) -> int:
        """Item id of answer i."""
        return int(self.items[self.targets[i]])

    def ages(self, i: int) -> np.ndarray | None:
        """k of each history item by the clock: log2(1 + days before the answer), D15.

        None where k counts steps, which is the paper's way.
        """
        return None if self.index == "order" else np.log2(1 + self.days(i))

    def days(self, i: int) -> np.ndarray:
        """How many days before answer i each item of its history was taken."""
        return (self.times[self.targets[i]] - self.times[self.starts[i]:self.targets[i]]) / 86_400

    def words(self, items) -> list[str]:
        """Titles of the given item ids."""
        return [self.titles[item] for item in items]

    def seen(self) -> np.ndarray:
        """Which items occur in any history or answer.  -> (N,) bool"""
        seen = np.zeros(len(self.titles), dtype=bool)
        for start, target in zip(self.starts, self.targets):
            seen[self.items[start:target + 1]] = True
        return seen

    def select(self, indices) -> "Sequences":
        """The given sequences, in the given order."""
        return replace(self, starts=self.starts[indices], targets=self.targets[indices])

    def sample(self, n: int, seed: int) -> "Sequences":
        """n sequences drawn without replacement, in their old order; all of them if n is 0."""
        if not 0 < n < len(self):
            return self
        drawn = np.random.default_rng([seed, 4]).choice(len(self), n, replace=False)
        return self.select(np.sort(drawn))


def make_sequences(interactions: Interactions, min_history: int = 3, max_history: int = 10,
                   index: str = "order") -> Sequences:
    """Make one sequence of every interaction that has at least min_history before it (§5.1.1).

    Its history is the last max_history items of the same user. Interactions of equal time keep
    the order of the file. Raises ValueError if index is "time" and the data have no times.
    """
    if index == "time" and not interactions.dated:
        raise ValueError("index 'time' wants data with times; these only say which came first")
    order = np.lexsort((interactions.timestamps, interactions.users))   # a stable sort
    users = interactions.users[order]
    rows = np.arange(len(users))
    first = np.searchsorted(users, users)                   # the first row of each row's user
    targets = rows[rows - first >= min_history]
    return Sequences(interactions.items[order], interactions.timestamps[order],
                     np.maximum(first[targets], targets - max_history), targets,
                     interactions.titles, interactions.domain, interactions.dated, index)


def split_by_time(sequences: Sequences, ratios=(8, 1, 1)) -> tuple[Sequences, Sequences, Sequences]:
    """Split 8:1:1 by the time of the answer, so that training sees nothing of the future (§5.1.1).

    A split by user would let a model learn from what other users did later. Here no answer
    of the validation split is older than a training answer, and test answers come after both.
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
# The prompt (Table 1)

# The paper shows the two sentences of Table 1 only. The frame around them is the one of BIGRec and
# CFT, whose sentences they are. `\x20` is a space at the end of a line, which both have, too.
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

DOMAINS = {     # movies and games are worded as in BIGRec; no source has words for music
    "movies": {"things": "movies", "thing": "movie", "verb": "watched"},
    "games": {"things": "video games", "thing": "video game", "verb": "played"},
    "artists": {"things": "music artists", "thing": "music artist", "verb": "listened to"},
    "items": {"things": "items", "thing": "item", "verb": "chosen"},
}


def build_prompt(history_titles, domain: str = "movies") -> tuple[str, list[tuple[int, int]]]:
    """The prompt of Table 1, and where each title stands in it: character spans [start, end).

    Training, inference and every other use of a prompt call this one function: a prompt that
    differs by a single space between training and inference is another prompt to the model. Titles
    are joined by hand rather than by str.format, because they may hold braces.
    """
    before, after = TEMPLATE.split("{history}")
    words = DOMAINS[domain]
    text, spans = before.format(**words), []
    for title in history_titles:
        text += ', "' if spans else '"'
        spans.append((len(text), len(text) + len(title)))
        text += title + '"'
    return text + after, spans


# ----------------------------------------------------------------------------------------------
# Tokens, item positions, labels (§3.1)


@dataclass(frozen=True)
class Example:
    """One prompt with its answer, if it has one. The three lists are of equal length."""

    tokens: list[int]       # BOS (where the tokenizer adds one), prompt, answer, EOS
    item_pos: list[int] | list[float]   # k of the item that the token belongs to, or NO_ITEM
    labels: list[int]       # the token itself where it is part of the answer, else IGNORE


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, which also decides whether a text begins with BOS, and its special ids.

    Some checkpoints end an answer with one of several tokens. All of them end a generated answer.
    """

    bpe: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]        # each of them ends an answer; we train on the first
    bos_id: int | None = None
    pad_id: int = 0                 # fills the ends of rows, where no token looks at it

    def __post_init__(self):
        self.bpe.encode_special_tokens = True       # a title that says "</s>" ends no answer

    def decode(self, tokens: list[int]) -> str:
        """Token ids -> text without special tokens."""
        return self.bpe.decode(tokens, skip_special_tokens=True)

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """Turn histories (titles, oldest first) and targets (a title or None each) into tokens.

        The answer y of Eq. 1 is the quoted title and EOS; only its tokens have labels.

        Every token of an item gets the item's k (Eq. 6). k is the number of steps back from the
        newest item, which has k = 0 (D1: §4.2.1 counts so, §4.3 seems to count from the oldest), or
        what `ages` says. Which tokens an item has is decided by the tokenizer's character offsets:
        a token that overlaps the title belongs to the item, also where it reaches over a quote, as
        `)",` does. The title's token ids cannot decide that: they differ from place to place.

            text       ...  before:"  Heat  ", "  Toy   Story  "\\n  ...
            item_pos       -1  -1     1    -1    0     0     -1          k of the newest item is 0
        """
        texts, spans, starts = [], [], []
        for history, target in zip(histories, targets, strict=True):
            prompt, places = build_prompt(history, domain)
            starts.append(len(prompt))
            spans.append(np.array(places).reshape(-1, 2))
            texts.append(prompt if target is None else f'{prompt}"{target}"')
        examples = []
        for encoding, span, start, target, age in zip(
                self.bpe.encode_batch(texts), spans, starts, targets,
                ages if ages is not None else itertools.repeat(None)):
            begin, end = np.array(encoding.offsets).T
            item = np.searchsorted(span[:, 1], begin, side="right")     # the first to end later
            inside = item < len(span)
            inside[inside] = end[inside] > span[item[inside], 0]
            tokens = encoding.ids
            k = np.arange(len(span), -1, -1) - 1 if age is None else np.append(age, NO_ITEM)
            item_pos = np.where(inside, k[item], NO_ITEM).tolist()
            labels = np.where(end > start, tokens, IGNORE).tolist()
            if target is not None:
                eos = self.eos_ids[0]
                tokens, item_pos, labels = tokens + [eos], item_pos + [NO_ITEM], labels + [eos]
            examples.append(Example(tokens, item_pos, labels))
        return examples


def encode_example(tokenizer: Tokenizer, history_titles, target_title: str | None,
                   domain: str = "movies", ages=None) -> Example:
    """One prompt and its answer as tokens, item positions and labels; see Tokenizer.examples."""
    return tokenizer.examples([history_titles], [target_title], domain, [ages])[0]


def show_prompt(tokenizer: Tokenizer, example: Example) -> str:
    """The prompt as text, with each item as ⟨its tokens⟩[k = its index, tokens first..last]."""
    text, first = "", 0
    for k, group in itertools.groupby(example.item_pos):
        last = first + len(list(group))
        piece = tokenizer.bpe.decode(example.tokens[first:last], skip_special_tokens=False)
        text += piece if k == NO_ITEM else f"⟨{piece}⟩[k={k:.3g}, tokens {first}..{last - 1}]"
        first = last
    return text


def show_sequence(tokenizer: Tokenizer, sequences: Sequences, i: int) -> str:
    """Sequence i with its answer, as show_prompt shows it."""
    return show_prompt(tokenizer, encode_example(
        tokenizer, sequences.words(sequences.history(i)), sequences.titles[sequences.target(i)],
        sequences.domain, sequences.ages(i)))


# ----------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Attention is causal, so no real token ever looks at a pad.

    Only the answers are supervised, so hidden states are wanted at a few places of each row only.
    `places` names them, as many for each row as the longest answer needs; rows with shorter answers
    repeat some other place, and `supervised` skips those fillers. With "." for IGNORE:

        labels (B, T)           places (B, A)     supervised (M,)      targets (M,)
        .  .  a  b  c           2  3  4           0  1  2              a  b  c
        .  d  e  .  .           1  2  0           3  4                 d  e

    supervised counts through places row by row, and the filler 0 is number 5. All of it is derived
    here, before a batch goes to a GPU, which would have to be waited for.
    """

    tokens: Tensor          # (B, T)
    item_pos: Tensor        # (B, T) integer (float32 by the clock); NO_ITEM outside items, on pads
    labels: Tensor          # (B, T) the token that comes next, or IGNORE
    prefix: int             # number of leading columns alike in all rows, before any item
    places: Tensor = field(init=False)      # (B, A)
    supervised: Tensor = field(init=False)  # (M,)
    targets: Tensor = field(init=False)     # (M,)

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
        parts = []
        for start in range(0, len(self.tokens), rows):
            part = slice(start, start + rows)
            width = int((self.labels[part] != IGNORE).any(dim=0).nonzero().max()) + 1
            parts.append(Batch(self.tokens[part, :width], self.item_pos[part, :width],
                               self.labels[part, :width], min(self.prefix, width - 1)))
        return parts

    def to(self, device) -> "Batch":
        """The same batch on another device. A GPU copies it while it works on something else."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                if torch.device(device).type == "cuda" and value.device.type == "cpu":
                    value = value.pin_memory()
                object.__setattr__(moved, name, value.to(device, non_blocking=True))
        return moved


def collate(examples: list[Example], pad_id: int = 0) -> Batch:
    """Pad to the longest example, shift the labels by one, find the common prefix.

    The hidden state at position t predicts token t + 1, so the label at t is what comes next. The
    prefix, which all prompts of a domain begin with, is run only once for a batch.
    """
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


def batches(tokenizer: Tokenizer, sequences: Sequences, batch_size: int, rng: np.random.Generator,
            shuffle_histories: bool = False) -> Iterator[Batch]:
    """One epoch of batches in random order, tokenised as they are needed.

    shuffle_histories puts the items of each history into random order; the embedded base is trained
    so (support/tiny.py).

    32 batches are drawn together and sorted by length, so that the rows of a batch are alike and
    little is padding; then the order of these batches is random again. A thread prepares the next
    32 meanwhile.
    """
    order = rng.permutation(len(sequences))

    def prepare(start: int) -> list[Batch]:
        """The 32 batches whose sequences stand in the order from start on."""
        drawn = order[start:start + 32 * batch_size]
        histories = [sequences.history(i) for i in drawn]
        if shuffle_histories:
            histories = [rng.permutation(history) for history in histories]
        answers = sequences.words(sequences.items[sequences.targets[drawn]])
        examples = tokenizer.examples([sequences.words(history) for history in histories], answers,
                                      sequences.domain, [sequences.ages(i) for i in drawn])
        examples.sort(key=lambda example: len(example.tokens))
        groups = [examples[i:i + batch_size] for i in range(0, len(examples), batch_size)]
        return [collate(groups[g], tokenizer.pad_id) for g in rng.permutation(len(groups))]

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(prepare, 0)
        for start in range(0, len(order), 32 * batch_size):
            ready = waiting.result()
            waiting = thread.submit(prepare, start + 32 * batch_size)
            yield from ready


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
