"""Decoding, grounding, ranks, HR/NDCG, floors, tables, comparison of runs (§5.1.2, §5.1.4, Fig. 4).

    python evaluate.py runs/synthetic-rope-1 runs/synthetic-rope-2      compare finished runs

Knows a model only as something that maps (tokens, item_pos, cache) to hidden states and hidden
states to logits; never imports cetrec. Comparison and report of runs: experiments/report.py.

Shapes: B prompts, W beams, T tokens, C width, V vocabulary, N items of the catalogue.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import IGNORE, NO_ITEM, Sequences, Tokenizer, encode_examples, exit_status
from llama import KVCache
from lora import without_factors

CUTOFFS = (5, 10)
Scores = dict[str, tuple[float, float]]     # metric -> (mean, standard error)

# ----------------------------------------------------------------------------------------------
# Generation


def _device(model) -> torch.device:
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    return torch.device("cpu") if parameter is None else parameter.device


def _pad(rows: Sequence[Sequence[int]], fill: int, device) -> Tensor:
    """Right-pad lists to one (B, T) tensor."""
    T = max(map(len, rows))
    return torch.tensor([list(r) + [fill] * (T - len(r)) for r in rows], device=device)


def prefill(model, prompts, room: int) -> tuple[KVCache, Tensor]:
    """Run each prompt once, and what all of them begin with once for all.

    prompts: [(tokens, item_pos), ...] lists of numbers. -> cache of B rows with room for so many
    more slots, logits after each prompt (B, V)
    """
    device, cache = _device(model), KVCache()
    shared = 0
    if len(prompts) > 1:
        shared = len(os.path.commonprefix([list(zip(*pair)) for pair in prompts]))
        shared = min(shared, min(len(tokens) for tokens, _ in prompts) - 1)
    if shared:
        tokens, item_pos = (torch.tensor([part[:shared]], device=device) for part in prompts[0])
        model(tokens, item_pos, cache=cache)
    tokens, item_pos = (_pad([pair[i][shared:] for pair in prompts], fill, device)
                        for i, fill in ((0, 0), (1, NO_ITEM)))
    cache.reserve(tokens.shape[1] + room, len(prompts))
    lengths = torch.tensor([len(tokens) for tokens, _ in prompts], device=device)
    hidden = model(tokens, item_pos, cache=cache, wanted=lengths[:, None] - shared - 1)
    if bool((lengths != cache.length).any()):
        cache.hide_from(lengths)
    return cache, model.logits(hidden[:, 0])


@torch.inference_mode()
def beam_search(model, prompts, beams: int = 5, max_new_tokens: int = 128, min_new_tokens: int = 4,
                length_penalty: float = 1.0, eos_ids: Sequence[int] = (), trie: "Trie" = None,
                exclude: Sequence[Sequence[int]] | None = None) -> tuple[list, Tensor]:
    """Beam search without sampling, with the semantics of transformers 4.43 (§5.1.4, D10).

    prompts: [(tokens, item_pos), ...] lists of numbers. Returns, per prompt, `beams` token lists,
    best first, without the prompt but with EOS, and their scores (B, beams): summed log-probability
    over g^length_penalty, g counting the generated tokens with EOS. EOS is barred while fewer than
    min_new_tokens tokens exist; no renormalisation follows.

    With a trie, beams stay on its titles, less the items each prompt excludes; they end with EOS or
    are dropped. Where fewer than `beams` answers exist, lists are shorter and scores end in -inf.

    Each prompt is run once. Its beams are the branches of one tree that grows behind it, so they
    share its keys and values, and none is copied when beams change parents. Finished prompts leave.
    """
    if beams < 1 or max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts, {beams} beams, {max_new_tokens} new tokens: "
                         "wanted at least one of each")
    device, B, W = _device(model), len(prompts), beams
    eos = torch.tensor(sorted(set(eos_ids)), dtype=torch.long, device=device)
    cache, logits = prefill(model, prompts, W * min(16, max_new_tokens))
    V = logits.shape[-1]
    log_p = logits.log_softmax(dim=-1)[:, None].expand(B, W, V)
    sums = torch.tensor([0.0] + [-math.inf] * (W - 1), device=device).repeat(B, 1)      # (B, W)
    alive = torch.zeros(B, W, 0, dtype=torch.long, device=device)                   # (B, W, new)
    ancestors = torch.zeros(B, W, 0, dtype=torch.bool, device=device)       # (B, W, slots so far)
    nodes = np.zeros((B, W), dtype=np.int64)                                # of the trie
    closed = [trie.closed(items) for items in exclude] if trie and exclude else [()] * B
    kept, answers = torch.full_like(sums, -math.inf), alive     # the W best ended ones, best first
    prompt_of = torch.arange(B, device=device)              # which prompt each remaining row serves
    sequences, scores = [[] for _ in range(B)], torch.full((B, W), -math.inf)

    def keep(total: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The W best of what is kept and of (B, W) more; of equals the earlier. Pads are -1."""
        both = torch.cat((kept, total / tokens.shape[-1] ** length_penalty), dim=1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :W]
        longer = F.pad(answers, (0, tokens.shape[-1] - answers.shape[-1]), value=-1)
        return both.gather(1, order), _rows(torch.cat((longer, tokens), dim=1), order)

    for g in range(1, max_new_tokens + 1):
        if g <= min_new_tokens:
            log_p = log_p.index_fill(-1, eos, -math.inf)
        if trie:
            log_p = trie.restrict(log_p, nodes, [closed[prompt] for prompt in prompt_of.tolist()])
        candidates = max(2, 1 + len(eos)) * W
        total, flat = (sums[..., None] + log_p).flatten(1).topk(min(candidates, W * V), dim=-1)
        token, parent = flat % V, flat // V
        is_eos, best = torch.isin(token, eos), total[:, 0]
        tokens = torch.cat((_rows(alive, parent), token[..., None]), dim=-1)    # (B, 2 W, g)

        # what ended among the first W is kept; the W best that go on are the beams now
        kept, answers = keep(total[:, :W].masked_fill(~is_eos[:, :W], -math.inf), tokens[:, :W])
        going = (~is_eos).cumsum(dim=-1) - 1                                    # rank among those
        slots = torch.zeros(len(sums), W + 1, dtype=torch.long, device=device)
        slots.scatter_(1, torch.where(~is_eos & (going < W), going, W),
                       torch.arange(flat.shape[1], device=device).expand_as(flat))
        slots = slots[:, :W]
        sums, parent, token, alive = total.gather(1, slots), parent.gather(1, slots), token.gather(
            1, slots), _rows(tokens, slots)
        ancestors = torch.cat((_rows(ancestors, parent), torch.eye(
            W, dtype=torch.bool, device=device).expand(len(sums), W, W)), dim=-1)
        if trie:
            nodes = trie.child(np.take_along_axis(nodes, parent.cpu().numpy(), 1),
                               token.cpu().numpy())

        # a prompt is done when its worst kept answer beats what its best beam scores now
        stay = (best > -math.inf) & (kept[:, -1] < best / g ** length_penalty)
        last = g == max_new_tokens
        if last and trie is None:               # out of tokens: beams count as they stand
            kept, answers = keep(sums.masked_fill(~stay[:, None], -math.inf), alive)
        leave = torch.ones_like(stay) if last else ~stay
        if left := leave.nonzero()[:, 0].tolist():
            for prompt, values, rows in zip(*(x[left].tolist() for x in (prompt_of, kept,
                                                                         answers))):
                scores[prompt] = torch.tensor(values)
                sequences[prompt] = [[t for t in row if t >= 0]
                                     for row, value in zip(rows, values) if value > -math.inf]
            if len(left) == len(leave):
                break
            rows = stay.nonzero()[:, 0]
            sums, alive, ancestors, token, kept, answers, prompt_of = (
                x[rows] for x in (sums, alive, ancestors, token, kept, answers, prompt_of))
            nodes = nodes[rows.cpu().numpy()]
            cache.select(rows)
        cache.tree = ancestors
        if cache.room < W:
            cache.reserve(W * min(16, max_new_tokens - g))      # a copy every 16 tokens, not each
        hidden = model(token, torch.full_like(token, NO_ITEM), cache=cache)             # (B, W, C)
        log_p = model.logits(hidden).log_softmax(dim=-1)
    return sequences, scores


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each batch element in the given order.  (B, W, n), (B, m) -> (B, m, n)"""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------
# Beyond the paper: the catalogue as one trie, and the likelihood of every title


class Trie:
    """The catalogue's answers, `"title"` and EOS, tokenised as they follow a prompt.

    Node 0 is the prompt's end; the nodes stand in preorder, so a subtree is a slice; a leaf is
    EOS. Items of one title share a leaf. Raises ValueError for a tokenizer that merges the
    prompt's end with an answer.
    """

    def __init__(self, tokenizer: Tokenizer, titles: Sequence[str], domain: str = "movies"):
        prompt = encode_examples(tokenizer, [[]], [None], domain)[0].tokens
        answers = []
        for start in range(0, len(titles), 10_000):
            part = titles[start:start + 10_000]
            for e in encode_examples(tokenizer, [[]] * len(part), part, domain):
                answers.append([t for t, label in zip(e.tokens, e.labels) if label != IGNORE])
                if e.tokens[:-len(answers[-1])] != prompt:
                    raise ValueError(
                        f"this tokenizer merges the prompt's end with the answer "
                        f"{titles[len(answers) - 1]!r}; a trie wants answers that begin at a token "
                        "of their own. Use --decode beams")
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
        below = np.bincount(self.leaf, minlength=len(token)).tolist()
        size = [1] * len(token)
        for node in range(len(token) - 1, 0, -1):
            below[parent[node]] += below[node]
            size[parent[node]] += size[node]
        self.token, self.parent = np.array(token), np.array(parent)
        self.below = np.array(below)                                # items in each node's subtree
        self.end = np.arange(len(token)) + size                     # one past the subtree
        self.kids = np.argsort(self.parent[1:], kind="stable") + 1  # by parent, then by token
        self.first = np.searchsorted(self.parent[self.kids], np.arange(len(token) + 1))
        self.keys = (self.parent[self.kids] << 32) + self.token[self.kids]      # ascending
        self.longest = max(map(len, answers))
        self.items: dict[tuple[int, ...], list[int]] = {}           # answer -> items of that title
        for item, answer in enumerate(answers):
            self.items.setdefault(tuple(answer), []).append(item)

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of the given nodes: (which of the given is the parent, child), two lists."""
        counts = self.first[nodes + 1] - self.first[nodes]
        rows = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        return rows, self.kids[self.first[nodes][rows] + within]

    def child(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The child each token leads to; any node where there is none (such beams are at -inf)."""
        at = np.searchsorted(self.keys, (nodes << 32) + tokens)
        return self.kids[at.clip(max=len(self.keys) - 1)]

    def closed(self, items: Sequence[int]) -> list[int]:
        """Nodes below which there is nothing but the given items."""
        count = Counter()
        for node in self.leaf[list(set(items))].tolist():
            while node > 0:
                count[node] += 1
                node = int(self.parent[node])
        return [node for node, n in count.items() if n == self.below[node]]

    def restrict(self, log_p: Tensor, nodes: np.ndarray, closed) -> Tensor:
        """log_p (B, W, V) where a token leads from nodes (B, W) to an open child, -inf elsewhere.

        closed: for each row the nodes that are not open.
        """
        B, W, _ = log_p.shape
        rows, kids = self.children(nodes.flatten())
        shut = [row * len(self.token) + node for row, part in enumerate(closed) for node in part]
        free = ~np.isin(rows // W * len(self.token) + kids, shut)
        rows, tokens = (torch.from_numpy(x[free]).to(log_p.device)
                        for x in (rows, self.token[kids]))
        out = torch.full_like(log_p, -math.inf)
        out[rows // W, rows % W, tokens] = log_p[rows // W, rows % W, tokens]
        return out

    def subtrees(self, size: int):
        """The nodes that go on, `size` at a time, each time after the path that leads to the first.

        Yields (how many belong to the path, nodes (T,), which are ancestors of which (T, T)). So
        every node meets its ancestors, and work is linear in the number of nodes.
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

    One pass over the trie's nodes behind each prompt's cache, in pieces of bounded memory; a node
    sees the prompt and its ancestors only.
    """
    cache, logits = prefill(model, prompts, nodes_at_once + trie.longest)
    cache.read_only = True
    device, B = logits.device, len(prompts)
    log_p = torch.zeros(B, len(trie.token), device=device)          # of each node after its parent

    def fill(parents: np.ndarray, logits: Tensor) -> None:          # (T,), (B, T, V)
        rows, kids = (torch.from_numpy(x).to(device) for x in trie.children(parents))
        tokens = torch.from_numpy(trie.token).to(device)[kids]
        log_p[:, kids] = logits.log_softmax(dim=-1)[:, rows, tokens]

    fill(np.array([0]), logits[:, None])
    # logits of 16 MB on CPUs, which is about what their caches hold; of 1 GB elsewhere
    step = max(1, (2**22 if device.type == "cpu" else 2**28) // logits.numel())
    for path, nodes, ancestor in trie.subtrees(nodes_at_once):
        cache.tree = torch.from_numpy(ancestor).to(device)[None]
        tokens = torch.from_numpy(trie.token[nodes]).to(device).expand(B, -1)
        hidden = model(tokens, torch.full_like(tokens, NO_ITEM), cache=cache)
        for start in range(path, len(nodes), step):
            fill(nodes[start:start + step], model.logits(hidden[:, start:start + step]))
    parent, level = torch.from_numpy(trie.parent).to(device), trie.children(np.array([0]))[1]
    while len(level := trie.children(level)[1]):                    # sum down the tree
        at = torch.from_numpy(level).to(device)
        log_p[:, at] += log_p[:, parent[at]]
    return log_p[:, torch.from_numpy(trie.leaf).to(device)]


# ----------------------------------------------------------------------------------------------
# Grounding: text -> catalogue


def clean(text: str) -> str:
    """A generated answer or a title without outer spaces and quotes."""
    return text.strip().strip('"').strip()


@torch.inference_mode()
def embed_titles(model, tokenizer: Tokenizer, titles: Sequence[str], rows: int = 256) -> Tensor:
    """Hidden state of each title's last token after the final norm, float32.  -> (len(titles), C)

    Input is BOS (if the tokenizer adds one) and the bare title; no token belongs to a history item.
    An empty title is EOS.
    """
    device = _device(model)
    encodings = tokenizer.bpe.encode_batch([clean(title) for title in titles])
    ids = [e.ids or [tokenizer.eos_ids[0]] for e in encodings]
    table, order = [None] * len(ids), sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for chunk in (order[i:i + rows] for i in range(0, len(order), rows)):
        tokens = _pad([ids[i] for i in chunk], 0, device)
        hidden = model(tokens, torch.full_like(tokens, NO_ITEM)).float()
        last = torch.tensor([len(ids[i]) - 1 for i in chunk], device=device)
        for i, vector in zip(chunk, hidden[torch.arange(len(chunk), device=device), last]):
            table[i] = vector
    return torch.stack(table)


def nearest(queries: Tensor, table: Tensor, length: int | None = None) -> Tensor:
    """Items by Euclidean distance, nearest first, ties by item id.  (Q, C), (N, C) -> (Q, length)

    Differences are formed one by one: the expansion a² + b² - 2ab loses the digits that decide.
    Memory is bounded: at most 8 million distances at once.
    """
    rows, parts = max(1, 2**23 // len(table)), []
    for part in queries.float().split(rows):
        distances = torch.cdist(part, table.float(), compute_mode="donot_use_mm_for_euclid_dist")
        # the bits of a float >= 0, read as an integer, sort as it does; the item goes below them
        keys = (distances.view(torch.int32).long() << 32) + torch.arange(
            len(table), device=distances.device)
        parts.append(keys.topk(length or len(table), largest=False).values & 0xFFFFFFFF)
    return torch.cat(parts)


def ground(model, texts: Sequence[str], catalogue: Sequence[str]) -> Tensor:
    """Rank the catalogue by distance to each text, both embedded by the model as it is (D11).

    The model carries its tokenizer as model.tokenizer. -> (len(texts), N) item ids, nearest first
    """
    table = embed_titles(model, model.tokenizer, catalogue)
    return nearest(embed_titles(model, model.tokenizer, texts), table)


def merge_lists(lists, exclude=(), length: int = 10) -> list[int]:
    """Round-robin over beams by neighbour rank, first occurrence kept, history dropped (D7).

    lists: per beam item ids, nearest first. [[3,1,2,0], [3,2,1,0], [0,1,2,3]] -> [3, 0, 1, 2]
    """
    merged: list[int] = []
    seen = set(exclude)
    for rank in zip(*lists):
        for item in rank:
            if item not in seen:
                seen.add(item)
                merged.append(item)
                if len(merged) == length:
                    return merged
    return merged


# ----------------------------------------------------------------------------------------------
# Ten items for each history


@dataclass(frozen=True)
class Decoding:
    """How ten items come out of a model. beams is the paper's way (§5.1.4): free text, grounded in
    the catalogue. trie and exact go beyond it: beams on catalogue titles, and all of them scored.
    """

    decode: str = "beams"               # or "trie", "exact"
    beams: int = 5
    length_penalty: float = 1.0         # free beams only; the other two rank by log-probability
    exclude_history: bool = True
    ground_with: str = "tuned"          # or "base": titles embedded without the LoRA factors
    ground_list: str = "merged"         # or "single": the neighbours of the best beam alone

    def __post_init__(self):
        for name, known in (("decode", ("beams", "trie", "exact")),
                            ("ground_with", ("tuned", "base")),
                            ("ground_list", ("merged", "single"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of "
                                 f"{', '.join(known)}")
        if self.decode == "trie" and self.beams < max(CUTOFFS):
            raise ValueError(f"{self.beams} beams on the trie make lists of {self.beams}; wanted "
                             f"at least {max(CUTOFFS)}")

    def __str__(self):
        if self.decode == "exact":
            return "every title's log-likelihood"
        if self.decode == "trie":
            return f"{self.beams} beams on the catalogue's titles"
        return (f"{self.beams} beams, length penalty {self.length_penalty:g}, grounded with "
                f"{self.ground_with} weights, {self.ground_list} list")


@dataclass(frozen=True)
class Lists:
    """What was recommended, a row for each history."""

    items: np.ndarray           # (n, 10) item ids, best first; -1 where the catalogue is used up
    log_p: np.ndarray           # (n, 10) of the titles; nan from free beams, which score texts
    valid: np.ndarray           # (n, W) is the beam's text a title of the catalogue?


class Recommender:
    """Holds what depends on model and catalogue alone: title table, trie, texts grounded so far.

    The model carries its tokenizer as model.tokenizer; build a new recommender after tuning it.
    """

    def __init__(self, model, titles: Sequence[str], domain: str = "movies",
                 decoding: Decoding = Decoding()):
        self.model, self.titles, self.domain, self.decoding = model, titles, domain, decoding
        self.tokenizer: Tokenizer = model.tokenizer
        self.length = min(max(CUTOFFS), len(titles))
        if decoding.decode == "beams":
            answers = self.tokenizer.bpe.encode_batch([f'"{t}"' for t in titles],
                                                      add_special_tokens=False)
            sizes = [len(a.ids) for a in answers]
            self.shortest = min(4, min(sizes))  # D12: CFT's 4 would bar shorter titles
            self.longest = min(128, max(sizes) + 8)
            self.valid = {clean(title) for title in titles}
            self.reach = 0              # neighbours kept of each text
            self.grounded: dict[str, np.ndarray] = {}
            self.table = self._embed(titles)
        else:
            self.trie = Trie(self.tokenizer, titles, domain)

    def _embed(self, texts) -> Tensor:
        weights = nullcontext() if self.decoding.ground_with == "tuned" else without_factors(
            self.model)
        with weights:
            return embed_titles(self.model, self.tokenizer, texts)

    def __call__(self, histories: Sequence[Sequence[int]], ages=None, batch_size: int | None = None,
                 progress: str = "recommending") -> Lists:
        """Histories are item ids, oldest first; ages None for k by order, or k of each item by the
        clock, a list for each history. Prompts of similar length share a batch.
        """
        n = len(histories)
        batch_size = batch_size or (16 if self.decoding.decode == "exact" else 64)
        if self.decoding.decode == "beams":     # ten and the history's own: all one beam may give
            reach = self.length + max(map(len, histories), default=0)
            if reach > self.reach:
                self.reach, self.grounded = reach, {}
        examples = []
        for i in range(0, n, 10_000):
            given = [[self.titles[j] for j in history] for history in histories[i:i + 10_000]]
            examples += encode_examples(self.tokenizer, given, [None] * len(given), self.domain,
                                        ages and ages[i:i + 10_000])
        order = sorted(range(n), key=lambda i: len(examples[i].tokens))
        width = self.decoding.beams if self.decoding.decode == "beams" else 0
        out = Lists(np.full((n, self.length), -1), np.full((n, self.length), np.nan),
                    np.zeros((n, width), dtype=bool))
        work = {"beams": self._beams, "trie": self._trie, "exact": self._exact}[
            self.decoding.decode]
        with tqdm(total=n, desc=progress, unit="user", leave=False, disable=None) as bar:
            for chunk in (order[i:i + batch_size] for i in range(0, n, batch_size)):
                exclude = [list(histories[i]) if self.decoding.exclude_history else []
                           for i in chunk]
                prompts = [(examples[i].tokens, examples[i].item_pos) for i in chunk]
                work(out, chunk, prompts, exclude)
                bar.update(len(chunk))
        return out

    def _beams(self, out: Lists, chunk, prompts, exclude) -> None:
        answers, _ = beam_search(self.model, prompts, self.decoding.beams, self.longest,
                                 self.shortest, self.decoding.length_penalty,
                                 self.tokenizer.eos_ids)
        texts = [[clean(self.tokenizer.decode(a)) for a in beam] for beam in answers]
        if new := sorted({t for beam in texts for t in beam} - self.grounded.keys()):
            near = nearest(self._embed(new), self.table, min(len(self.titles), self.reach))
            self.grounded.update(zip(new, near.cpu().numpy()))
        for i, beam, gone in zip(chunk, texts, exclude):
            used = beam if self.decoding.ground_list == "merged" else beam[:1]
            ten = merge_lists([self.grounded[t].tolist() for t in used], gone, self.length)
            out.items[i, :len(ten)] = ten
            out.valid[i, :len(beam)] = [t in self.valid for t in beam]

    def _trie(self, out: Lists, chunk, prompts, exclude) -> None:
        answers, scores = beam_search(self.model, prompts, self.decoding.beams, self.trie.longest,
                                      0, 0.0, self.tokenizer.eos_ids[:1], self.trie, exclude)
        for i, beam, score, gone in zip(chunk, answers, scores.tolist(), exclude):
            ten = [(item, s) for tokens, s in zip(beam, score)
                   for item in self.trie.items[tuple(tokens)] if item not in gone][:self.length]
            if ten:
                out.items[i, :len(ten)], out.log_p[i, :len(ten)] = zip(*ten)

    def _exact(self, out: Lists, chunk, prompts, exclude) -> None:
        scores = catalogue_log_likelihood(self.model, prompts, self.trie).cpu().numpy()
        for i, score, gone in zip(chunk, scores, exclude):
            score[gone] = -np.inf
            ten = np.argsort(-score, kind="stable")[:self.length]
            ten = ten[score[ten] > -np.inf]
            out.items[i, :len(ten)], out.log_p[i, :len(ten)] = ten, score[ten]


# ----------------------------------------------------------------------------------------------
# Ranks and metrics


def list_ranks(lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """0-based place of each target in its list; beyond any cutoff if it is not there.  -> (B,)"""
    hit = lists == np.asarray(targets)[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), np.iinfo(np.int64).max)


def score_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """0-based rank of each target among all items, ties by item id.  (B, N), (B,) -> (B,)"""
    targets = np.asarray(targets)
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    tied_before = (scores == own) & (np.arange(scores.shape[1]) < targets[:, None])
    return ((scores > own) | tied_before).sum(axis=1)


def hit_ratio(ranks, k: int):
    """HR@k before averaging: 1 where the 0-based rank is below k (§5.1.2). Any shape."""
    return (np.asarray(ranks) < k).astype(float)


def ndcg(ranks, k: int):
    """NDCG@k before averaging: 1/log2(rank + 2) below k, else 0; one relevant item, so IDCG = 1."""
    ranks = np.asarray(ranks, dtype=float)
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


METRICS: dict[str, Callable] = {f"{name}@{k}": (lambda ranks, f=f, k=k: f(ranks, k))
                                for k in CUTOFFS for name, f in (("HR", hit_ratio), ("NDCG", ndcg))}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def summarise(ranks: np.ndarray) -> Scores:
    """Mean and standard error of every metric over test sequences."""
    summary = {}
    for name, metric in METRICS.items():
        summary[name] = mean_and_error(metric(ranks))
    return summary


def relative_change(before: np.ndarray, after: np.ndarray) -> Scores:
    """Change of each metric in per cent (Fig. 4) and its standard error, paired by sequence."""
    changes = {}
    for name, metric in METRICS.items():
        a, b = metric(before), metric(after)
        if a.mean() == 0 or len(a) < 2:
            changes[name] = (math.nan, math.nan)
            continue
        ratio = b.mean() / a.mean()             # delta method: the error of a ratio of means
        error = (b - ratio * a).std(ddof=1) / math.sqrt(len(a)) / a.mean()
        changes[name] = (100 * float(ratio - 1), 100 * float(error))
    return changes


# ----------------------------------------------------------------------------------------------
# Floors: what counting reaches, without a model


class CountingFloors:
    """Popularity and item-to-item co-occurrence, counted on training sequences only."""

    def __init__(self, train: Sequences, items: int):
        history = [train.history(i) for i in range(len(train))]
        targets = train.items[train.targets]
        self.popularity = np.bincount(targets, minlength=items).astype(float)
        pairs = np.concatenate(history).astype(np.int64) * items + np.repeat(
            targets, [len(h) for h in history])
        codes, counts = np.unique(pairs, return_counts=True)
        source, self.goal = np.divmod(codes, items)
        self.start = np.searchsorted(source, np.arange(items + 1))
        leaving = np.bincount(source, weights=counts, minlength=items)
        arriving = np.bincount(self.goal, weights=counts, minlength=items)
        self.similarity = counts / np.sqrt(leaving[source] * arriving[self.goal])

    def scores(self, histories, exclude_history: bool = True) -> dict[str, np.ndarray]:
        """(B, N) scores per floor: popularity; count(i, j) / √(count(i, ·) count(·, j)) for the
        newest item i; and the sum of that over the whole history."""
        floors = {name: np.zeros((len(histories), len(self.popularity))) for name in
                  ("popularity", "co-occurrence, newest item", "co-occurrence, whole history")}
        popularity, newest, whole = floors.values()
        popularity[:] = self.popularity
        for row, history in enumerate(histories):
            for item in history:
                part = slice(self.start[item], self.start[item + 1])
                whole[row, self.goal[part]] += self.similarity[part]
            part = slice(self.start[history[-1]], self.start[history[-1] + 1])
            newest[row, self.goal[part]] = self.similarity[part]
            if exclude_history:
                for scores in floors.values():
                    scores[row, list(history)] = -np.inf
        return floors

    def ranks(self, histories, targets, exclude_history: bool = True) -> dict[str, np.ndarray]:
        """0-based ranks of the targets per floor, in bounded memory."""
        parts = []
        for start in range(0, len(histories), 1_000):
            part = slice(start, start + 1_000)
            scores = self.scores(histories[part], exclude_history)
            parts.append({name: score_ranks(s, targets[part]) for name, s in scores.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def expected_metrics(ranking: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Exact expectation of every metric: items ranked by `ranking`, drawn from p, (B, N) each."""
    top = np.argsort(-ranking, axis=1, kind="stable")[:, :max(CUTOFFS)]
    mass = np.take_along_axis(p, top, axis=1)       # chance that the target stands at each rank
    places = np.arange(top.shape[1])
    return {name: float((mass * metric(places)).sum(axis=1).mean())
            for name, metric in METRICS.items()}


def oracle_metrics(world, histories, samples: int = 256) -> dict[str, Scores]:
    """What the best recommenders of a synthetic world reach on these histories, in expectation.

    "order-aware": rank by p(next | history); exact, error 0. "order-aware, reversed history": the
    same recommender misled. "order-blind": rank by p averaged over possible orders; of two
    independent estimates one ranks and the other values, and back. A ranking valued by its own
    estimate is too optimistic; the error given is half the gap, so the true value lies within it.
    """
    histories = [np.asarray(h) for h in histories]
    sizes = np.array([len(h) for h in histories])
    aware, misled, blind, other = np.zeros((4, len(histories), len(world.titles)))
    for n in np.unique(sizes):
        group = np.stack([h for h in histories if len(h) == n])
        aware[sizes == n] = world.next_distribution(group)
        misled[sizes == n] = world.next_distribution(group[:, ::-1])
        blind[sizes == n] = world.order_blind_distribution(group, samples, seed=1)
        other[sizes == n] = world.order_blind_distribution(group, samples, seed=2)
    one, two, own, own_two = (expected_metrics(*pair) for pair in (
        (blind, other), (other, blind), (blind, blind), (other, other)))
    order_blind = {}
    for name in METRICS:
        low, high = (one[name] + two[name]) / 2, (own[name] + own_two[name]) / 2
        order_blind[name] = ((low + high) / 2, abs(high - low) / 2)
    return {"order-aware": {m: (v, 0.0) for m, v in expected_metrics(aware, aware).items()},
            "order-aware, reversed history": {
                m: (v, 0.0) for m, v in expected_metrics(misled, aware).items()},
            "order-blind": order_blind}


# ----------------------------------------------------------------------------------------------
# One evaluation


def evaluate_order(model, train_set: Sequences, test_set: Sequences, world=None,
                   decoding: Decoding = Decoding(), answers: np.ndarray | None = None
                   ) -> tuple[dict, dict[str, np.ndarray]]:
    """Test histories as they are, reversed (Fig. 4) and shuffled, beside what counting and the
    oracle reach.

    answers (n, 2): log-likelihood of each answer in the factual and the erased world, if at hand.
    -> ({"protocol": a sentence, "rows" and "groups": {name: Scores}, "notes": sentences, ...}, for
    JSON; arrays by test sequence: targets, histories, ranks and lists)
    """
    titles, n = test_set.titles, len(test_set)
    histories = [test_set.history(i) for i in range(n)]
    targets = test_set.items[test_set.targets]
    ages = None                                 # of the slots, whatever item stands there
    if test_set.index == "time":
        ages = [test_set.ages(i) for i in range(n)]
    rng = np.random.default_rng(0)
    given = {"original": histories, "reversed": [h[::-1] for h in histories],
             "shuffled": [rng.permutation(h) for h in histories]}
    recommender = Recommender(model, titles, test_set.domain, decoding)
    lists = {name: recommender(order, ages, progress=f"{name} histories")
             for name, order in given.items()}
    ranks = {name: list_ranks(made.items, targets) for name, made in lists.items()}

    # model, floors, oracle
    rows = {f"{name} order": summarise(r) for name, r in ranks.items()}
    rows |= {f"change {how}": relative_change(ranks["original"], ranks[name])
             for how, name in (("under reversal", "reversed"), ("when shuffled", "shuffled"))}
    notes, kept = [], decoding.exclude_history
    if decoding.decode == "exact":
        for other in (Decoding("beams", 5, decoding.length_penalty, kept),
                      Decoding("trie", 10, exclude_history=kept)):
            made = Recommender(model, titles, test_set.domain, other)(
                histories, ages, progress=str(other)).items
            name = "5 grounded beams" if other.decode == "beams" else "10 beams on titles"
            rows[f"original order, {name}"] = summarise(list_ranks(made, targets))
            exact = lists["original"].items
            notes.append(f"{name} | {100 * agreement(exact, made):.1f} % of the exact top tens are "
                         f"found, {100 * (exact[:, 0] == made[:, 0]).mean():.1f} % of the first "
                         "items")
    floors = CountingFloors(train_set, len(titles))
    rows |= {name: summarise(r)
             for name, r in floors.ranks(histories, targets, kept).items()}
    if world is not None:
        best = oracle_metrics(world, histories)
        rows |= {f"best possible, {name}": values for name, values in best.items()}
        notes.append(_standing(rows["original order"], best["order-aware"], best["order-blind"]))

    # who is served well, and with what
    groups = {name: summarise(ranks["original"][members]) | {"sequences": int(members.sum())}
              for name, members in members_of_groups(train_set, test_set).items() if members.any()}
    made = lists["original"]
    if made.valid.size:
        notes.append(f"free text | {100 * made.valid.mean():.1f} % of all beams and "
                     f"{100 * made.valid[:, 0].mean():.1f} % of first beams are titles of the "
                     "catalogue")
    used = made.items[made.items >= 0]
    notes.append(f"recommended | {len(np.unique(used)):,} of {len(titles):,} items at least once "
                 f"({100 * len(np.unique(used)) / len(titles):.1f} %); on average an item that was "
                 f"the answer in training {floors.popularity[used].mean():.1f} times, test answers "
                 f"{floors.popularity[targets].mean():.1f} times")
    effect = {}
    if answers is not None:
        effect = {"log_p": mean_and_error(answers[:, 0] - answers[:, 1]),
                  "p": mean_and_error(np.exp(answers[:, 0]) - np.exp(answers[:, 1]))}
        (nats, nats_error), (p, p_error) = effect.values()
        notes.append(f"effect of order (Eq. 7) | log p(answer) {nats:+.4f} ± {nats_error:.4f} nats,"
                     f" p(answer) {p:+.5f} ± {p_error:.5f}, factual minus erased world")
    protocol = (f"test: {n:,} sequences, all-ranking of {len(titles):,} items, history "
                f"{'excluded' if kept else 'kept'}, {decoding}")
    arrays = {"sequence": test_set.targets, "target": targets,
              "history": _pad(histories, -1, "cpu").numpy()}
    arrays |= {f"ranks/{name}": r for name, r in ranks.items()}
    arrays |= {f"lists/{name}": made.items for name, made in lists.items()}
    digest = hashlib.sha256(json.dumps(titles).encode() + test_set.items.tobytes())
    return {"protocol": protocol, "n": n, "test_set": digest.hexdigest()[:16], "rows": rows,
            "groups": groups, "effect": effect, "notes": notes}, arrays


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the items of one's lists that are in the other's, whatever their place."""
    there = (one[:, :, None] == other[:, None, :]).any(axis=2)
    return float(there[one >= 0].mean())


def members_of_groups(train_set: Sequences, test_set: Sequences) -> dict[str, np.ndarray]:
    """Test sequences by length of history, and by what training saw.  name -> (n,) bool"""
    lengths = test_set.targets - test_set.starts
    known = train_set.seen()[test_set.items[test_set.targets]]
    groups = {f"history of {low}" + (f" to {high}" if high > low else ""):
              (low <= lengths) & (lengths <= high)
              for low, high in ((3, 3), (4, 6), (7, 9), (10, 10))}
    return groups | {"answer seen in training": known, "answer never seen in training": ~known}


def _standing(model: Scores, aware: Scores, blind: Scores) -> str:
    """Where the model stands between the best order-blind and the best order-aware recommender."""
    parts = []
    for name in METRICS:
        effect = aware[name][0] - blind[name][0]
        if effect <= max(1e-9, blind[name][1]):
            return ("order decides nothing here (Eq. 7): the best order-aware and the best "
                    "order-blind recommender coincide")
        parts.append(f"{name} {100 * (model[name][0] - blind[name][0]) / effect:+.0f} %")
    return f"on the way from best order-blind (0 %) to best order-aware (100 %): {', '.join(parts)}"


def format_result(result: dict) -> str:
    """What evaluate_order found, as printed: protocol, tables, notes."""
    rows = [(name, values, "%" if name.startswith("change") else "")
            for name, values in result["rows"].items()]
    groups = [(f"{name} ({values['sequences']:,})", values, "")
              for name, values in result["groups"].items()]
    return "\n".join([result["protocol"], format_table(rows), "original order, by group",
                      format_table(groups), *result["notes"]])


def format_table(rows: list[tuple[str, Scores, str]]) -> str:
    """Lines of a table: name, then every metric as mean ± standard error; unit "" or "%"."""
    width = max(len(name) for name, _, _ in rows)
    lines = [" " * width + "".join(f"{name:>18}" for name in METRICS)]
    for name, values, unit in rows:
        cells = ("no hit to lose" if math.isnan(values[m][0]) else
                 f"{values[m][0]:+.1f} ± {values[m][1]:.1f} %" if unit == "%" else
                 f"{values[m][0]:.4f} ± {values[m][1]:.4f}" for m in METRICS)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    """Compare finished runs: tables, figures, report.html. Returns the exit status."""
    ap = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False,
        description="Compare finished runs on the same test sequences; draw figures; write a "
        "report.html that opens without a network.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run folders, as cetrec.py writes them")
    ap.add_argument("--user", type=int, default=0, metavar="N", help="test sequence of the case "
                    "study (Fig. 5), counted from 0 in the first run (default: %(default)s)")
    ap.add_argument("--out", metavar="DIR", help="folder for figures and report.html (default: the "
                    "run's own; for several runs, comparison beside the first)")
    given = ap.parse_args(argv)

    def work() -> None:
        from experiments.report import compare, read_runs, write_report
        runs = read_runs(given.runs)
        print(compare(runs) if len(runs) > 1 else format_result(runs[0].result))
        folder = Path(given.out or (given.runs[0] if len(runs) == 1 else
                                    Path(given.runs[0]).resolve().parent / "comparison"))
        print(write_report(runs, folder, given.user))
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
