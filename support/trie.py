"""Beyond the paper: the catalogue as one trie, beams that stay on it, every title scored.

Five grounded beams lose some of what a model knows, because several of them may name the same title
or one of the history. Beams that can only spell titles of the catalogue give ten different titles
each time, though a good title whose beginning looked unlikely is lost. Scoring every title is exact
and is what the other two are measured by. Both recommenders here are called like
evaluate.GroundedBeams.

Shapes: B prompts, W beams, T tokens, V vocabulary, N items of the catalogue.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data import IGNORE, NO_ITEM, Tokenizer
from evaluate import LENGTH, Lists, beam_search, prefill, prompts_by_length


class Trie:
    """The catalogue's answers, `"title"` and EOS, tokenised as they follow a prompt.

    Node 0 is the prompt's end, and every other node is a token behind its parent. The nodes stand
    in preorder, so a subtree is a slice. A leaf is EOS, and items of one title share it. The
    answers "a" "a b" "c" over letters, with . for EOS:

        node      0   1   2   3   4   5   6   7   8   9  10  11
        token         "   a   "   .       b   "   .   c   "   .     (5 is the space of "a b")
        parent        0   1   2   3   2   5   6   7   1   9  10
        end      12  12   9   5   5   9   9   9   9  12  12  12     one past the subtree

    Raises ValueError for a tokenizer that merges the prompt's end with an answer: its answers do
    not begin at a node that all of them share.
    """

    def __init__(self, tokenizer: Tokenizer, titles: Sequence[str], domain: str = "movies"):
        prompt = tokenizer.examples([[]], [None], domain)[0].tokens
        answers = []
        for start in range(0, len(titles), 10_000):
            part = titles[start:start + 10_000]
            for e in tokenizer.examples([[]] * len(part), part, domain):
                answers.append([t for t, label in zip(e.tokens, e.labels) if label != IGNORE])
                if e.tokens[:-len(answers[-1])] != prompt:
                    raise ValueError(
                        f"this tokenizer merges the prompt's end with the answer "
                        f"{titles[len(answers) - 1]!r}; a trie wants answers that begin at a token "
                        "of their own. Use another base or, where there is that choice, --lists "
                        "beams")

        # In sorted order, all that an answer does not share with the one before it is new, so
        # preorder comes by itself.
        token, parent, path, previous = [-1], [-1], [0], []
        self.leaf = np.zeros(len(titles), dtype=np.int64)                   # (N,) node of each item
        for item in sorted(range(len(titles)), key=answers.__getitem__):
            shared = len(os.path.commonprefix([previous, answers[item]]))
            del path[shared + 1:]
            for t in answers[item][shared:]:
                parent.append(path[-1])
                path.append(len(token))
                token.append(t)
            self.leaf[item], previous = path[-1], answers[item]

        # Children follow their parents, so one pass from the end gathers the sums of all subtrees.
        below = np.bincount(self.leaf, minlength=len(token)).tolist()
        size = [1] * len(token)
        for node in range(len(token) - 1, 0, -1):
            below[parent[node]] += below[node]
            size[parent[node]] += size[node]
        self.token, self.parent = np.array(token), np.array(parent)
        self.below = np.array(below)                                # items in each node's subtree
        self.end = np.arange(len(token)) + size                     # one past the subtree

        # Children of all nodes in one array: those of node n are kids[first[n]:first[n + 1]].
        self.kids = np.argsort(self.parent[1:], kind="stable") + 1  # by parent, then by token
        self.first = np.searchsorted(self.parent[self.kids], np.arange(len(token) + 1))
        self.keys = (self.parent[self.kids] << 32) + self.token[self.kids]      # ascending
        self.longest = max(map(len, answers))
        self.items: dict[tuple[int, ...], list[int]] = {}           # answer -> items of that title
        for item, answer in enumerate(answers):
            self.items.setdefault(tuple(answer), []).append(item)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of the given nodes, as two arrays: which of the given is the parent, child.
        """
        counts = self.first[nodes + 1] - self.first[nodes]
        rows = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        return rows, self.kids[self.first[nodes][rows] + within]

    def child(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The child that each token leads to. Where there is none the answer is some other node,
        which does no harm, because beams there are at -inf already."""
        at = np.searchsorted(self.keys, (nodes << 32) + tokens)
        return self.kids[at.clip(max=len(self.keys) - 1)]

    def closed(self, items: Sequence[int]) -> list[int]:
        """Nodes below which there is nothing but the given items, themselves included.

        A beam that entered one could only end in an item that shall not come out. The leaf of a
        title that another item has too stays open.
        """
        count = Counter()
        for node in self.leaf[list(set(items))].tolist():
            while node > 0:
                count[node] += 1
                node = int(self.parent[node])
        return [node for node, n in count.items() if n == self.below[node]]

    def subtrees(self, size: int):
        """The nodes that have children, `size` at a time, after the path that leads to the first.

        Yields (how many belong to the path, nodes (T,), which are ancestors of which (T, T)). In
        preorder the ancestors of a node are on that path or among the nodes since, so every node
        meets all of its ancestors, and work is linear in the number of nodes. Leaves need no
        forward, for nothing comes after EOS.
        """
        going = np.flatnonzero(self.end - np.arange(len(self.end)) > 1)[1:]
        for start in range(0, len(going), size):
            path, node = [], self.parent[going[start]]
            while node > 0:
                path.insert(0, node)
                node = self.parent[node]
            nodes = np.concatenate((np.array(path, dtype=np.int64), going[start:start + size]))
            ancestor = (nodes <= nodes[:, None]) & (nodes[:, None] < self.end[nodes])
            yield len(path), nodes, ancestor


@torch.inference_mode()
def catalogue_log_likelihood(model, prompts, trie: Trie, nodes_at_once: int = 128) -> Tensor:
    """log p(`"title"` EOS | prompt) of every item: exact all-ranking.  -> (B, N) float32

    This is one pass over the trie's nodes behind each prompt's cache, in pieces of bounded memory.
    A node sees the prompt and its ancestors only, so a beginning that many titles share is run once
    for all of them.
    """
    cache, logits = prefill(model, prompts)
    cache.read_only = True
    device, B = logits.device, len(prompts)
    log_p = torch.zeros(B, len(trie.token), device=device)          # of each node after its parent

    def fill(parents: np.ndarray, logits: Tensor) -> None:          # (T,), (B, T, V)
        rows, kids = (torch.from_numpy(x).to(device) for x in trie.children(parents))
        tokens = torch.from_numpy(trie.token).to(device)[kids]
        log_p[:, kids] = logits.log_softmax(dim=-1)[:, rows, tokens]

    fill(np.array([0]), logits[:, None])

    # Logits take 16 MB on CPUs, which is about what their caches hold, and 1 GB elsewhere.
    step = max(1, (2**22 if device.type == "cpu" else 2**28) // logits.numel())
    for path, nodes, ancestor in trie.subtrees(nodes_at_once):
        cache.tree = torch.from_numpy(ancestor).to(device)[None]
        tokens = torch.from_numpy(trie.token[nodes]).to(device).expand(B, -1)
        hidden = model(tokens, torch.full_like(tokens, NO_ITEM), cache=cache)
        for start in range(path, len(nodes), step):
            fill(nodes[start:start + step], model.logits(hidden[:, start:start + step]))

    # Sum down the tree, one level after another, so that a leaf holds the sum along its path.
    parent, level = torch.from_numpy(trie.parent).to(device), trie.children(np.array([0]))[1]
    while len(level := trie.children(level)[1]):
        at = torch.from_numpy(level).to(device)
        log_p[:, at] += log_p[:, parent[at]]
    return log_p[:, torch.from_numpy(trie.leaf).to(device)]


class Walk:
    """Where the beams of a search are on the trie. It bars tokens that lead off.

    evaluate.beam_search asks it for the log-probabilities that are left, and tells it where each
    beam went. exclude: for each prompt the items that shall not come out.
    """

    def __init__(self, trie: Trie, exclude: Sequence[Sequence[int]], beams: int):
        self.trie = trie
        self.closed = [trie.closed(items) for items in exclude]
        self.nodes = np.zeros((len(exclude), beams), dtype=np.int64)

    def restrict(self, log_p: Tensor, here: Sequence[int]) -> Tensor:
        """log_p (B, W, V) of the prompts `here`, -inf where a token leads to no open node.

        What is left is not renormalised: a beam's score stays the model's own log p of its title.
        """
        trie, W = self.trie, log_p.shape[1]
        rows, kids = trie.children(self.nodes[here].flatten())
        shut = [row * len(trie.token) + node for row, prompt in enumerate(here)
                for node in self.closed[prompt]]
        free = ~np.isin(rows // W * len(trie.token) + kids, shut)
        rows, tokens = (torch.from_numpy(x[free]).to(log_p.device)
                        for x in (rows, trie.token[kids]))
        out = torch.full_like(log_p, -math.inf)
        out[rows // W, rows % W, tokens] = log_p[rows // W, rows % W, tokens]
        return out

    def step(self, here: Sequence[int], parent: Tensor, token: Tensor) -> None:
        """Each beam (B, W) of the prompts `here` goes on from a parent beam by a token."""
        nodes = np.take_along_axis(self.nodes[here], parent.cpu().numpy(), 1)
        self.nodes[here] = self.trie.child(nodes, token.cpu().numpy())


class TitleBeams:
    """Ten beams on the catalogue's titles, ranked by log-probability. Called as GroundedBeams.

    There is no length penalty and no least length: a title's score is its log p, as in ExactTitles.
    """

    def __init__(self, model, titles: Sequence[str], domain: str, exclude_history: bool = True,
                 beams: int = LENGTH):
        self.model, self.titles, self.domain = model, titles, domain
        self.exclude_history, self.beams = exclude_history, beams
        self.trie = Trie(model.tokenizer, titles, domain)

    def __call__(self, histories: Sequence[Sequence[int]], ages=None,
                 progress: str = "beams on titles") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out = Lists.empty(len(histories))
        for chunk, prompts in prompts_by_length(self.model, self.titles, self.domain, histories,
                                                ages, 64, progress):
            gone = [set(histories[i]) if self.exclude_history else set() for i in chunk]
            answers, scores = beam_search(
                self.model, prompts, self.beams, self.trie.longest, 0, 0.0,
                self.model.tokenizer.eos_ids[:1], Walk(self.trie, gone, self.beams))
            for i, beams, score, barred in zip(chunk, answers, scores.tolist(), gone):
                ten = [(item, s) for tokens, s in zip(beams, score)
                       for item in self.trie.items[tuple(tokens)] if item not in barred][:LENGTH]
                if ten:
                    out.items[i, :len(ten)], out.log_p[i, :len(ten)] = zip(*ten)
        return out


class ExactTitles:
    """The ten most likely of all titles, each scored, ties by item id. Called as GroundedBeams."""

    def __init__(self, model, titles: Sequence[str], domain: str, exclude_history: bool = True):
        self.model, self.titles, self.domain = model, titles, domain
        self.exclude_history, self.trie = exclude_history, Trie(model.tokenizer, titles, domain)

    def __call__(self, histories: Sequence[Sequence[int]], ages=None,
                 progress: str = "all titles") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out = Lists.empty(len(histories))
        for chunk, prompts in prompts_by_length(self.model, self.titles, self.domain, histories,
                                                ages, 16, progress):
            scores = catalogue_log_likelihood(self.model, prompts, self.trie).cpu().numpy()
            for i, score in zip(chunk, scores):
                if self.exclude_history:
                    score[list(histories[i])] = -np.inf
                ten = np.argsort(-score, kind="stable")[:LENGTH]
                ten = ten[score[ten] > -np.inf]
                out.items[i, :len(ten)], out.log_p[i, :len(ten)] = ten, score[ten]
        return out
