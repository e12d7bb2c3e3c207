"""Interactions -> chronological sequences -> splits -> prompts with item spans -> batches.

This file implements §3.1 (the prompt and its answer) and §5.1.1 (sequences and splits). It needs
no other file of ours; read it after llama.py. Raw files and the paper's filters are in
support/datasets.py. D1 to D15 number what the paper leaves open; see docs/readings.md.

Shapes: N items of the catalogue, B rows of a batch, P tokens of the common prefix, T tokens after
it, A tokens of the batch's longest answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tokenizers
import torch
from torch import Tensor

NO_ITEM = -1        # item_pos of tokens outside items: Eq. 6 gives them the embedding "null"
IGNORE = -100       # label of a token that is not part of the answer


# ----------------------------------------------------------------------------------------------
# Sequences and splits (§5.1.1)


@dataclass(frozen=True)
class Interactions:
    """Who interacted with which item, and when, in the order of the file."""

    users: np.ndarray           # (rows,) int64
    items: np.ndarray           # (rows,) int64, an index into titles
    timestamps: np.ndarray      # (rows,) int64 or float64, what the file says
    titles: list[str]           # (N,) unique
    domain: str = "movies"      # a key of DOMAINS: it chooses the words of the prompt
    checksums: dict[str, str] = field(default_factory=dict)     # file name -> SHA-256 of its text
    steps: tuple[str, ...] = () # what was done to the raw rows, each step with its counts
    day: float = 86_400         # of timestamps; 0: they only say what came first
    user_ids: Sequence[str] = ()    # the caller's own ids of users 0, 1, ..; (): their numbers
    item_ids: Sequence[str] = ()    # (N,) likewise


@dataclass(frozen=True)
class Sequences:
    """Histories with their answers, as windows into one array of items.

    Sequence i has the history items[starts[i]:targets[i]] and the answer items[targets[i]]. So a
    sequence costs two integers, however long its history is.
    """

    items: np.ndarray           # (rows,) sorted by user, then time, then place in the file
    times: np.ndarray           # (rows,) the timestamps
    starts: np.ndarray          # (len,) the first row of each history
    targets: np.ndarray         # (len,) the row of each answer
    titles: list[str]           # (N,) of all items
    domain: str
    day: float = 86_400         # of times; 0: they are only an order
    index: str = "order"        # what k of Eq. 6 counts: steps back ("order") or age ("time"), D15
    users: np.ndarray | None = None     # (rows,) whose row it is
    user_ids: Sequence[str] = ()        # as in Interactions
    item_ids: Sequence[str] = ()

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
        return (self.times[self.targets[i]] - self.times[self.starts[i]:self.targets[i]]) / self.day

    def titles_of(self, items: Iterable[int]) -> list[str]:
        """Titles of the given item ids."""
        return [self.titles[item] for item in items]

    def select(self, indices: np.ndarray | slice) -> "Sequences":
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
    if index == "time" and not interactions.day:
        raise ValueError("index 'time' wants data with times; these only say which came first")
    order = np.lexsort((interactions.timestamps, interactions.users))   # a stable sort
    users = interactions.users[order]
    rows = np.arange(len(users))
    first = np.searchsorted(users, users)                   # the first row of each row's user
    targets = rows[rows - first >= min_history]
    return Sequences(interactions.items[order], interactions.timestamps[order],
                     np.maximum(first[targets], targets - max_history), targets,
                     interactions.titles, interactions.domain, interactions.day, index, users,
                     interactions.user_ids, interactions.item_ids)


def split_by_time(sequences: Sequences, ratios: tuple[int, int, int] = (8, 1, 1)
                  ) -> tuple[Sequences, Sequences, Sequences]:
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
    return sequences.select(order[:a]), sequences.select(order[a:b]), sequences.select(order[b:])


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


def build_prompt(history_titles: Iterable[str],
                 domain: str = "movies") -> tuple[str, list[tuple[int, int]]]:
    """The prompt of Table 1, and where each title stands in it: character spans [start, end).

    Training, inference and every other use of a prompt call this one function: a prompt that
    differs by a single space between training and inference is another prompt to the model. The
    text is built title by title, so that each title's span is known.
    """
    before, after = TEMPLATE.split("{history}")
    words = DOMAINS[domain]
    text = before.format(**words)
    spans: list[tuple[int, int]] = []
    for title in history_titles:
        text += ', "' if spans else '"'
        spans.append((len(text), len(text) + len(title)))
        text += title + '"'
    return text + after, spans


# ----------------------------------------------------------------------------------------------
# Tokens, item positions, labels (§3.1)


@dataclass(frozen=True)
class Example:
    """One prompt, with its answer if it has one, as three lists of equal length."""

    tokens: list[int]       # BOS (where the tokenizer adds one), prompt, answer, EOS
    item_pos: list[float]   # k of the item that the token belongs to, or NO_ITEM
    labels: list[int]       # the token itself where it is part of the answer, else IGNORE


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its special ids. tokenizer.json decides whether a text begins with BOS.

    Some checkpoints end an answer with one of several tokens. Each of them ends a generated answer.
    """

    bpe: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]        # we train on the first
    bos_id: int | None = None
    pad_id: int = 0                 # fills the beginnings of rows, where no token looks at it

    def __post_init__(self) -> None:
        self.bpe.encode_special_tokens = True       # "</s>" in a title is ordinary text

    def decode(self, tokens: list[int]) -> str:
        """Token ids -> text without special tokens."""
        return self.bpe.decode(tokens, skip_special_tokens=True)

    def examples(self, histories: Sequence[Sequence[str]], targets: Sequence[str | None],
                 domain: str = "movies",
                 ages: Sequence[np.ndarray | None] | None = None) -> list[Example]:
        """Tokenise histories (titles, oldest first) with their targets (a title or None each).

        The answer y of Eq. 1 is the quoted title and EOS. Only its tokens have labels. Every token
        of an item gets the item's k (Eq. 6), which is the number of steps back from the newest item
        (D1), or else what `ages` says.
        """
        prompts = [build_prompt(history, domain) for history in histories]
        texts = [text if target is None else f'{text}"{target}"'
                 for (text, _), target in zip(prompts, targets, strict=True)]
        examples = []
        for encoding, (prompt, spans), target, age in zip(
                self.bpe.encode_batch(texts), prompts, targets, ages or [None] * len(texts)):
            ks = range(len(spans) - 1, -1, -1) if age is None else age.tolist()
            item_pos = item_positions(encoding.offsets, spans, ks)
            tokens, answer = encoding.ids, []
            if target is not None:
                first = sum(end <= len(prompt) for _, end in encoding.offsets)
                answer = tokens[first:] + [self.eos_ids[0]]
                tokens, item_pos = tokens + [self.eos_ids[0]], item_pos + [NO_ITEM]
            examples.append(Example(tokens, item_pos,
                                    [IGNORE] * (len(tokens) - len(answer)) + answer))
        return examples


def item_positions(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]],
                   ks: Iterable[float]) -> list[float]:
    """k of the item that each token belongs to, or NO_ITEM (Eq. 6).

    offsets and spans: the characters [start, end) of each token and of each title. A token that
    overlaps a title belongs to it, even where it reaches over a quote, as `)",` does. A title's
    token ids cannot be searched for, because a tokenizer may split it differently beside other
    characters.

        text       ...  before:"  Heat  ", "  Toy   Story  "\n  ...
        item_pos       -1  -1     1    -1    0     0     -1          k of the newest item is 0
    """
    item_pos: list[float] = [NO_ITEM] * len(offsets)
    t = 0
    for (start, end), k in zip(spans, ks):
        while t < len(offsets) and offsets[t][1] <= start:      # before the title
            t += 1
        while t < len(offsets) and offsets[t][0] < end:
            item_pos[t] = k
            t += 1
    return item_pos


def encode_example(tokenizer: Tokenizer, history_titles: Sequence[str], target_title: str | None,
                   domain: str = "movies", ages: np.ndarray | None = None) -> Example:
    """One prompt and its answer as tokens, item positions and labels; see Tokenizer.examples."""
    return tokenizer.examples([history_titles], [target_title], domain, [ages])[0]


@dataclass(frozen=True)
class Catalogue:
    """The items' titles, with the tokenizer and the domain that put them into prompts."""

    titles: Sequence[str]           # (N,)
    domain: str
    tokenizer: Tokenizer

    def prompts(self, histories: Sequence[Sequence[int]],
                ages: Sequence[np.ndarray] | None = None) -> list[Example]:
        """Histories of item ids, oldest first, without answers."""
        return self.tokenizer.examples([[self.titles[item] for item in history]
                                        for history in histories], [None] * len(histories),
                                       self.domain, ages)


def encode_sequences(tokenizer: Tokenizer, sequences: Sequences,
                     shuffle: np.random.Generator | None = None) -> list[Example]:
    """Sequences with their answers. With a generator, each history is put into random order."""
    histories = [sequences.history(i) for i in range(len(sequences))]
    if shuffle is not None:
        histories = [shuffle.permutation(history) for history in histories]
    return tokenizer.examples([sequences.titles_of(history) for history in histories],
                              sequences.titles_of(sequences.items[sequences.targets]),
                              sequences.domain, [sequences.ages(i) for i in range(len(sequences))])


# ----------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    """Rows that end together: padding stands in front, and no token looks at it.

    So the answers are the last columns of all rows. As the hidden state at a token predicts the
    next one, `tokens` are all tokens but the last, and the last A columns predict `answers`, the
    tokens of each answer. What all prompts begin with is kept once, as the prefix. With "." for a
    pad and for IGNORE:

        prefix (P,)      tokens (B, T)                               answers (B, A)
        BOS Below is…     .   .    "  Heat " … :\n  "   Toy  "        .    .    "    Toy  "  <eos>
                          "  Alien "  , … :\n  "  The  Ma  trix "     "   The   Ma   trix "  <eos>
    """

    prefix: Tensor          # (P,), no item among it
    tokens: Tensor          # (B, T)
    item_pos: Tensor        # (B, T) integer (float32 by the clock), NO_ITEM outside items
    padding: Tensor         # (B,) how many pads each row begins with
    answers: Tensor         # (B, A), IGNORE in front of shorter answers

    def rows(self, part: slice) -> "Batch":
        """Some of the rows, as wide as the longest of them."""
        unused = int(self.padding[part].min())
        shorter = int((self.answers[part] == IGNORE).sum(dim=1).min())
        return Batch(self.prefix, self.tokens[part, unused:], self.item_pos[part, unused:],
                     self.padding[part] - unused, self.answers[part, shorter:])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(x.to(device, non_blocking=True) for x in (
            self.prefix, self.tokens, self.item_pos, self.padding, self.answers)))


def common_prefix(examples: Sequence[Example]) -> int:
    """The number of tokens that all rows share before any item or answer, less one.

    The last shared token may predict the first token of an answer, so it stays in the rows.
    """
    rows = [zip(e.tokens, e.item_pos, e.labels) for e in examples]
    common = 0
    for column in zip(*rows):
        if len(set(column)) > 1 or column[0][1:] != (NO_ITEM, IGNORE):
            break
        common += 1
    return max(0, common - 1)


def align_right(rows: Sequence[Sequence[float]], fill: int) -> Tensor:
    """Lists of unequal length as one tensor, whose rows end together.  -> (B, longest)"""
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])


def collate(examples: Sequence[Example], pad_id: int = 0, share_prefix: bool = True) -> Batch:
    """Examples with answers as one batch. Without a shared prefix, rows hold whole prompts."""
    P = common_prefix(examples) if share_prefix else 0
    lengths = torch.tensor([len(e.tokens) for e in examples])
    return Batch(prefix=torch.tensor(examples[0].tokens[:P], dtype=torch.long),
                 tokens=align_right([e.tokens[P:-1] for e in examples], pad_id),
                 item_pos=align_right([e.item_pos[P:-1] for e in examples], NO_ITEM),
                 padding=lengths.max() - lengths,
                 answers=align_right([[label for label in e.labels if label != IGNORE]
                                      for e in examples], IGNORE))


def batches(tokenizer: Tokenizer, sequences: Sequences, batch_size: int, seed: Sequence[int],
            shuffle_histories: bool = False) -> Iterator[Batch]:
    """One epoch of batches in random order, which depends on the seed only.

    With shuffle_histories the items of each history are in random order, and rows hold whole
    prompts: so the built-in base model is trained, whose prefix is too short to be shared.

    32 batches are drawn together and sorted by length, to reduce padding; then their order is made
    random again.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sequences))
    for start in range(0, len(order), 32 * batch_size):
        drawn = sequences.select(order[start:start + 32 * batch_size])
        examples = encode_sequences(tokenizer, drawn, rng if shuffle_histories else None)
        examples.sort(key=lambda example: len(example.tokens))
        groups = [examples[i:i + batch_size] for i in range(0, len(examples), batch_size)]
        for g in rng.permutation(len(groups)):
            yield collate(groups[g], tokenizer.pad_id, share_prefix=not shuffle_histories)
