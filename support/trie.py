"""Beyond the paper: the catalogue as one trie, beams that stay on it, every title scored.

Five grounded beams lose some of what a model knows, because several of them may name the same title
or one of the history. Beams that can only spell titles of the catalogue give ten different titles
each time, though a good title whose beginning looked unlikely is lost. Scoring every title is exact
and is what the other two are measured by. Both recommenders here are called like
evaluate.GroundedBeams.

Shapes: B prompts, W beams, T tokens, V vocabulary, N items of the catalogue.
"""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data import IGNORE, NO_ITEM, Catalogue
from evaluate import (LENGTH, GroundedBeams, Lists, Model, Prompt, Recommender, beam_search,
                      check_scores, prompts_by_length, read_prompts)
from support.options import Options


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

    def __init__(self, catalogue: Catalogue):
        titles, tokenizer, domain = catalogue.titles, catalogue.tokenizer, catalogue.domain
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
        self.child: list[dict[int, int]] = [{} for _ in token]      # of each node: token -> child
        for node in range(1, len(token)):
            self.child[parent[node]][token[node]] = node
        self.longest = max(map(len, answers))
        self.items: dict[tuple[int, ...], list[int]] = {}           # answer -> items of that title
        for item, answer in enumerate(answers):
            self.items.setdefault(tuple(answer), []).append(item)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of some nodes: (rows, children), children[i] being one of nodes[rows[i]]."""
        counts = self.first[nodes + 1] - self.first[nodes]
        rows = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        return rows, self.kids[self.first[nodes][rows] + within]

    def continuations(self, answer: Sequence[int], closed: set[int]) -> list[int]:
        """The tokens that may follow the beginning of an answer without entering a closed node."""
        node = 0
        for t in answer:
            node = self.child[node][t]
        return [t for t, child in self.child[node].items() if child not in closed]

    def closed(self, items: Sequence[int]) -> set[int]:
        """Nodes below which there is nothing but the given items, themselves included.

        A beam that entered one could only end in an item that shall not come out. The leaf of a
        title that another item has too stays open.
        """
        count = Counter()
        for node in self.leaf[list(set(items))].tolist():
            while node > 0:
                count[node] += 1
                node = int(self.parent[node])
        return {node for node, n in count.items() if n == self.below[node]}

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
def catalogue_log_likelihood(model: Model, prompts: Sequence[Prompt], trie: Trie,
                             nodes_at_once: int = 128) -> Tensor:
    """log p(`"title"` EOS | prompt) of every item: exact all-ranking.  -> (B, N) float32

    This is one pass over the trie's nodes behind each prompt, in pieces of bounded memory. A node
    looks at the prompt and its ancestors only, so a beginning that many titles share is run once
    for all of them.
    """
    logits, past, seen = read_prompts(model, prompts)
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
        T = len(nodes)
        tokens = torch.from_numpy(trie.token[nodes]).to(device).expand(B, -1)
        looks_at = torch.cat((seen[:, None].expand(-1, T, -1),
                              torch.from_numpy(ancestor).to(device).expand(B, -1, -1)), dim=-1)
        hidden, _ = model(tokens, torch.full_like(tokens, NO_ITEM), looks_at.sum(dim=-1) - 1,
                          looks_at[:, None], past)                  # mask (B, 1, T, S + T)
        for start in range(path, T, step):
            logits = check_scores(model.logits(hidden[:, start:start + step]))
            fill(nodes[start:start + step], logits)

    # Sum down the tree, one level after another, so that a leaf holds the sum along its path.
    parent, level = torch.from_numpy(trie.parent).to(device), trie.children(np.array([0]))[1]
    while len(level := trie.children(level)[1]):
        at = torch.from_numpy(level).to(device)
        log_p[:, at] += log_p[:, parent[at]]
    return log_p[:, torch.from_numpy(trie.leaf).to(device)]


class TitleBeams:
    """Ten beams on the catalogue's titles, ranked by log-probability. Called as GroundedBeams.

    There is no length penalty and no least length: a title's score is its log p, as in ExactTitles.
    """

    def __init__(self, model: Model, catalogue: Catalogue, exclude_history: bool = True,
                 beams: int = LENGTH):
        self.model, self.catalogue, self.exclude_history = model, catalogue, exclude_history
        self.beams, self.trie = beams, Trie(catalogue)

    def __call__(self, histories: Sequence[Sequence[int]], ages=None,
                 progress: str = "beams on titles") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out, trie = Lists.empty(len(histories)), self.trie
        for chunk, prompts in prompts_by_length(self.catalogue, histories, ages, 64, progress):
            barred = [set(histories[i]) if self.exclude_history else set() for i in chunk]
            closed = [trie.closed(items) for items in barred]

            def allowed(b: int, answer: list[int], closed: list[set[int]] = closed) -> list[int]:
                """Tokens on the way to a title that may still be recommended."""
                return trie.continuations(answer, closed[b])
            answers, scores = beam_search(
                self.model, prompts, self.beams, trie.longest, 0, 0.0,
                self.catalogue.tokenizer.eos_ids[:1], allowed)
            for i, beams, score, excluded in zip(chunk, answers, scores.tolist(), barred):
                ten = [(item, s) for tokens, s in zip(beams, score)
                       for item in trie.items[tuple(tokens)] if item not in excluded][:LENGTH]
                if ten:
                    out.items[i, :len(ten)], out.log_p[i, :len(ten)] = zip(*ten)
        return out


class ExactTitles:
    """The ten most likely of all titles, each scored, ties by item id. Called as GroundedBeams."""

    def __init__(self, model: Model, catalogue: Catalogue, exclude_history: bool = True):
        self.model, self.catalogue, self.exclude_history = model, catalogue, exclude_history
        self.trie = Trie(catalogue)

    def __call__(self, histories: Sequence[Sequence[int]], ages=None,
                 progress: str = "all titles") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out = Lists.empty(len(histories))
        for chunk, prompts in prompts_by_length(self.catalogue, histories, ages, 16, progress):
            scores = catalogue_log_likelihood(self.model, prompts, self.trie).cpu().numpy()
            for i, score in zip(chunk, scores):
                if self.exclude_history:
                    score[list(histories[i])] = -np.inf
                ten = np.argsort(-score, kind="stable")[:LENGTH]
                ten = ten[score[ten] > -np.inf]
                out.items[i, :len(ten)], out.log_p[i, :len(ten)] = ten, score[ten]
        return out


def make_recommenders(model: Model, catalogue: Catalogue,
                      options: Options) -> dict[str, Recommender]:
    """What --lists names, by the names in the result table; the paper's list comes last."""
    lists: dict[str, Recommender] = {}
    if "exact" in options.lists:
        lists["all titles scored"] = ExactTitles(model, catalogue, options.exclude_history)
    if "titles" in options.lists:
        lists["10 beams on titles"] = TitleBeams(model, catalogue, options.exclude_history)
    if "beams" in options.lists:
        lists[f"{options.beams} beams, grounded"] = GroundedBeams(model, catalogue,
                                                                  options.decoding())
    return lists
