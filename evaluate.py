"""Ten titles for each history, and what they are worth (§5): beams, grounding, HR, NDCG, reversal.

This file knows a model only as something that maps (tokens, item_pos, cache) to hidden states and
hidden states to logits, and that carries its tokenizer as model.tokenizer. Read it after cetrec.py.
Beams that stay on the catalogue's titles, which the paper does not have, are in support/trie.py.

Shapes: B prompts, W beams, T tokens, C width, V vocabulary, N items of the catalogue, n histories.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import NO_ITEM, Sequences
from llama import KVCache
from lora import without_factors

CUTOFFS = (5, 10)           # K of HR@K and NDCG@K, §5.1.2
LENGTH = max(CUTOFFS)       # of a list of recommendations
Prompt = tuple[list[int], list[int] | list[float]]      # tokens and item_pos, of equal length
Scores = dict[str, tuple[float, float]]                 # metric -> (mean, standard error)

# ----------------------------------------------------------------------------------------------
# Five beams (§5.1.4)


def device_of(model) -> torch.device:
    """Where the parameters of a model are."""
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    return torch.device("cpu") if parameter is None else parameter.device


def pad(rows: Sequence[Sequence[int]], fill: int, device="cpu") -> Tensor:
    """Lists of unequal length as one right-padded (B, T) tensor."""
    T = max(map(len, rows))
    return torch.tensor([list(r) + [fill] * (T - len(r)) for r in rows], device=device)


def prefill(model, prompts: Sequence[Prompt]) -> tuple[KVCache, Tensor]:
    """Run each prompt once, and what all of them begin with once for all.

    Returns the cache, and the logits of the token after each prompt, (B, V).
    """
    device, cache, shared = device_of(model), KVCache(), 0
    if len(prompts) > 1:
        shared = len(os.path.commonprefix([list(zip(*prompt)) for prompt in prompts]))
        shared = min(shared, min(len(tokens) for tokens, _ in prompts) - 1)
    if shared:
        tokens, item_pos = (torch.tensor([part[:shared]], device=device) for part in prompts[0])
        model(tokens, item_pos, cache=cache)
    tokens, item_pos = (pad([prompt[i][shared:] for prompt in prompts], fill, device)
                        for i, fill in ((0, 0), (1, NO_ITEM)))
    lengths = torch.tensor([[len(tokens)] for tokens, _ in prompts], device=device)
    hidden = model(tokens, item_pos, cache=cache, wanted=lengths - shared - 1)
    if bool((lengths != cache.length).any()):
        cache.hidden = torch.arange(cache.length, device=device) >= lengths
    return cache, model.logits(hidden[:, 0])


def take(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each batch element in the given order.  (B, W, m), (B, k) -> (B, k, m)"""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


class Beams:
    """The W answers of each prompt that go on, best first, as branches of a tree.

    Step g adds W nodes to the tree, one for each beam; ancestors says which nodes of all steps are
    on the way to a beam's newest one, itself included. KVCache draws it.
    """

    def __init__(self, B: int, W: int, device):
        self.sums = torch.tensor([0.0] + [-math.inf] * (W - 1), device=device).repeat(B, 1)
        self.parent = torch.arange(W, device=device).repeat(B, 1)               # (B, W)
        self.tokens = torch.zeros(B, W, 0, dtype=torch.long, device=device)     # (B, W, g)
        self.ancestors = torch.zeros(B, W, 0, dtype=torch.bool, device=device)  # (B, W, g W)

    def advance(self, log_p: Tensor, eos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go on by one token, log_p (B, W, V). Returns the best continuations of all beams, ended
        or not: their sums (B, m), tokens (B, m, g) and whether they end (B, m).

        m is so large that W of them do not end; the best W of these are the beams now.
        """
        B, W, V = log_p.shape
        several = max(2, 1 + len(eos)) * W
        best, words = log_p.topk(min(several, V))               # of each beam, (B, W, k)
        total, at = (self.sums[..., None] + best).flatten(1).topk(min(several, W * V))
        parent, token = at // best.shape[-1], words.flatten(1).gather(1, at)
        tokens = torch.cat((take(self.tokens, parent), token[..., None]), dim=-1)
        ends = torch.isin(token, eos)
        on = ends.int().argsort(dim=1, stable=True)[:, :W]
        self.sums = total.masked_fill(ends, -math.inf).gather(1, on)
        self.parent, self.tokens = parent.gather(1, on), take(tokens, on)
        itself = torch.eye(W, dtype=torch.bool, device=total.device).expand(B, W, W)
        self.ancestors = torch.cat((take(self.ancestors, self.parent), itself), dim=-1)
        return total, tokens, ends

    def select(self, rows: Tensor) -> None:
        """Keep the given prompts."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


class Ended:
    """The W best answers that each prompt has so far, best first.

    Their scores are (B, W), -inf where there are fewer; their tokens (B, W, g), padded with -1.
    """

    def __init__(self, B: int, W: int, device):
        self.scores = torch.full((B, W), -math.inf, device=device)
        self.tokens = torch.zeros(B, W, 0, dtype=torch.long, device=device)

    def add(self, scores: Tensor, tokens: Tensor) -> None:
        """Offer W more to each prompt. Among equals the earlier one stays in front."""
        both = torch.cat((self.scores, scores), dim=1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :scores.shape[1]]
        longer = F.pad(self.tokens, (0, tokens.shape[-1] - self.tokens.shape[-1]), value=-1)
        self.scores = both.gather(1, order)
        self.tokens = take(torch.cat((longer, tokens), dim=1), order)

    def answers(self, row: int) -> list[list[int]]:
        """Token lists of one prompt."""
        return [[t for t in tokens if t >= 0] for tokens, score in zip(
            self.tokens[row].tolist(), self.scores[row].tolist()) if score > -math.inf]


@torch.inference_mode()
def beam_search(model, prompts: Sequence[Prompt], beams: int = 5, max_new_tokens: int = 128,
                min_new_tokens: int = 4, length_penalty: float = 1.0, eos_ids: Sequence[int] = (),
                walk=None) -> tuple[list[list[list[int]]], Tensor]:
    """Beam search without sampling, as transformers 4.43 does it (§5.1.4, D10).

    Returns for each prompt `beams` token lists, best first, with their EOS, and the scores (B, W):
    summed log-probability / g^length_penalty, where g counts the generated tokens with EOS. EOS is
    barred while an answer has fewer than min_new_tokens; what is left is not renormalised.
    A `walk` (support/trie.py) keeps beams on the catalogue's titles.

    Each prompt is run once. Its beams share its keys and values, because they are branches of one
    tree behind it; a beam that changes its parent copies nothing, it only has other ancestors.
    Prompts that are done leave the batch.
    """
    if beams < 1 or max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts, {beams} beams, {max_new_tokens} new tokens: "
                         "wanted at least one of each")
    cache, logits = prefill(model, prompts)
    B, W, device = len(prompts), beams, logits.device
    eos = torch.tensor(sorted(set(eos_ids)), dtype=torch.long, device=device)
    log_p = logits.log_softmax(dim=-1)[:, None].expand(B, W, -1)
    alive, ended = Beams(B, W, device), Ended(B, W, device)
    here = list(range(B))                               # which prompt each row is for
    sequences, scores = [[] for _ in prompts], torch.full((B, W), -math.inf)
    for g in range(1, max_new_tokens + 1):
        if g <= min_new_tokens:
            log_p = log_p.index_fill(-1, eos, -math.inf)
        if walk:
            log_p = walk.restrict(log_p, here)
        total, tokens, ends = alive.advance(log_p, eos)
        score = total / g ** length_penalty
        ended.add(score.masked_fill(~ends, -math.inf)[:, :W], tokens[:, :W])

        # A prompt is done when nothing that goes on beats its worst kept answer as things stand.
        best = score[:, 0]
        done = (best == -math.inf) | (ended.scores[:, -1] >= best)
        if g == max_new_tokens and walk is None:        # out of tokens: beams count as they are
            ended.add((alive.sums / g ** length_penalty).masked_fill(done[:, None], -math.inf),
                      alive.tokens)
        done |= g == max_new_tokens
        for row in done.nonzero()[:, 0].tolist():
            scores[here[row]], sequences[here[row]] = ended.scores[row].cpu(), ended.answers(row)
        if done.all():
            break
        if walk:
            walk.step(here, alive.parent, alive.tokens[..., -1])
        if done.any():
            rows = (~done).nonzero()[:, 0]
            here = [here[row] for row in rows.tolist()]
            ended.scores, ended.tokens = ended.scores[rows], ended.tokens[rows]
            alive.select(rows)
            cache.select(rows)
        cache.tree, token = alive.ancestors, alive.tokens[..., -1]
        hidden = model(token, torch.full_like(token, NO_ITEM), cache=cache)         # (B, W, C)
        log_p = model.logits(hidden).log_softmax(dim=-1)
    return sequences, scores


# ----------------------------------------------------------------------------------------------
# Grounding: from generated text to the catalogue (§5.1.4, D11)


def clean(text: str) -> str:
    """A generated answer or a title without outer spaces and quotes."""
    return text.strip().strip('"').strip()


@torch.inference_mode()
def embed_titles(model, titles: Sequence[str], rows: int = 256) -> Tensor:
    """Hidden state of each title's last token after the final norm, float32.  -> (len(titles), C)

    The input is BOS (where the tokenizer adds one) and the bare title. No token belongs to an item
    of a history. An empty text counts as EOS.
    """
    device, tokenizer = device_of(model), model.tokenizer
    encodings = tokenizer.bpe.encode_batch([clean(title) for title in titles])
    ids = [e.ids or [tokenizer.eos_ids[0]] for e in encodings]
    table, order = [None] * len(ids), sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for chunk in (order[i:i + rows] for i in range(0, len(order), rows)):
        tokens = pad([ids[i] for i in chunk], 0, device)
        last = torch.tensor([[len(ids[i]) - 1] for i in chunk], device=device)
        hidden = model(tokens, torch.full_like(tokens, NO_ITEM), wanted=last)
        for i, vector in zip(chunk, hidden[:, 0].float()):
            table[i] = vector
    return torch.stack(table)


def nearest(queries: Tensor, table: Tensor, length: int | None = None) -> Tensor:
    """Rows of the table by Euclidean distance, nearest first, ties by number.

    (Q, C), (N, C) -> (Q, length or N). Differences are formed one by one, because the usual
    expansion a² + b² - 2ab loses the digits that decide. Memory stays bounded.
    """
    parts = []
    for part in queries.float().split(max(1, 2**23 // len(table))):
        distances = torch.cdist(part, table.float(), compute_mode="donot_use_mm_for_euclid_dist")
        # The bits of a float of at least 0 sort like the float itself; the number goes below them.
        keys = (distances.view(torch.int32).long() << 32) + torch.arange(
            len(table), device=distances.device)
        parts.append(keys.topk(length or len(table), largest=False).values & 0xFFFFFFFF)
    return torch.cat(parts)


def ground(model, texts: Sequence[str], catalogue: Sequence[str], table: Tensor | None = None,
           length: int | None = None) -> Tensor:
    """Rank the catalogue by its distance to each text, both embedded by the model as it is.

    -> (len(texts), length or N) item ids, nearest first. table: the catalogue's embeddings, if they
    are at hand.
    """
    table = embed_titles(model, catalogue) if table is None else table
    return nearest(embed_titles(model, texts), table, length)


def merge_lists(lists, exclude=(), length: int = LENGTH) -> list[int]:
    """The beams' nearest titles in turn, then their second-nearest ones, and so on (D7).

    §5.1.4 has the second-nearest titles complete the Top-10. Of a title that comes again the first
    place counts; items of the history are left out.
    lists: item ids of each beam, nearest first. [[3,1,2,0], [3,2,1,0], [0,1,2,3]] -> [3, 0, 1, 2]
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
# Ten titles for each history


@dataclass(frozen=True)
class Decoding:
    """How the paper's lists are made, where it leaves that open."""

    beams: int = 5
    length_penalty: float = 1.0         # D10
    ground_with: str = "tuned"          # D11: or "base", titles embedded without the LoRA factors
    ground_list: str = "merged"         # D7: or "single", the neighbours of the best beam alone
    exclude_history: bool = True        # D13


@dataclass(frozen=True)
class Lists:
    """What was recommended, a row for each history."""

    items: np.ndarray           # (n, 10) item ids, best first; -1 where there are no more
    log_p: np.ndarray           # (n, 10) log-probability of each title; nan where it was not asked
    valid: np.ndarray           # (n, W) is the beam's text a title of the catalogue?

    @classmethod
    def empty(cls, n: int, beams: int = 0) -> "Lists":
        """Lists to be filled."""
        return cls(np.full((n, LENGTH), -1), np.full((n, LENGTH), np.nan),
                   np.zeros((n, beams), dtype=bool))


def prompts_by_length(model, titles: Sequence[str], domain: str, histories, ages, rows: int,
                      progress: str) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Which histories, and their prompts: so many at a time, those of similar length together.

    histories: item ids, oldest first. ages: None, or k of each item by the clock (D15).
    """
    with tqdm(total=len(histories), desc=progress, unit="user", leave=False, disable=None) as bar:
        for start in range(0, len(histories), 10_000):      # which bounds the memory
            part = histories[start:start + 10_000]
            examples = model.tokenizer.examples(
                [[titles[i] for i in history] for history in part], [None] * len(part), domain,
                ages and ages[start:start + 10_000])
            order = sorted(range(len(part)), key=lambda i: len(examples[i].tokens))
            for chunk in (order[i:i + rows] for i in range(0, len(part), rows)):
                yield ([start + i for i in chunk],
                       [(examples[i].tokens, examples[i].item_pos) for i in chunk])
                bar.update(len(chunk))


class GroundedBeams:
    """The paper's recommender (§5.1.4): five free texts, each grounded in the catalogue, merged.

    The catalogue is embedded at each call, by the model as it is then.
    """

    def __init__(self, model, titles: Sequence[str], domain: str, decoding: Decoding = Decoding()):
        self.model, self.titles, self.domain, self.decoding = model, titles, domain, decoding
        answers = model.tokenizer.bpe.encode_batch([f'"{t}"' for t in titles],
                                                   add_special_tokens=False)
        sizes = [len(a.ids) for a in answers]
        self.shortest = min(4, min(sizes))      # D12: CFT's 4 would bar shorter titles
        self.longest = min(128, max(sizes) + 8)
        self.names = {clean(title) for title in titles}

    def weights(self):
        """The context in which titles are embedded."""
        return without_factors(self.model) if self.decoding.ground_with == "base" else nullcontext()

    def __call__(self, histories: Sequence[Sequence[int]], ages=None,
                 progress: str = "five beams") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        how, out = self.decoding, Lists.empty(len(histories), self.decoding.beams)
        reach = min(len(self.titles), LENGTH + max(map(len, histories), default=0))
        grounded: dict[str, list[int]] = {}
        with self.weights():
            table = embed_titles(self.model, self.titles)
        for chunk, prompts in prompts_by_length(self.model, self.titles, self.domain, histories,
                                                ages, 64, progress):
            answers, _ = beam_search(self.model, prompts, how.beams, self.longest, self.shortest,
                                     how.length_penalty, self.model.tokenizer.eos_ids)
            texts = [[clean(self.model.tokenizer.decode(a)) for a in beam] for beam in answers]
            if new := sorted({t for beam in texts for t in beam} - grounded.keys()):
                with self.weights():
                    near = ground(self.model, new, self.titles, table, reach)
                grounded.update(zip(new, near.tolist()))
            for i, beam in zip(chunk, texts):
                used = beam if how.ground_list == "merged" else beam[:1]
                ten = merge_lists([grounded[t] for t in used],
                                  histories[i] if how.exclude_history else ())
                out.items[i, :len(ten)] = ten
                out.valid[i, :len(beam)] = [t in self.names for t in beam]
        return out


# ----------------------------------------------------------------------------------------------
# HR@K and NDCG@K (§5.1.2)


def hit_ratio(ranks, k: int):
    """HR@K of single cases (§5.1.2): 1 where the answer's 0-based rank is below k. Any shape."""
    return (np.asarray(ranks) < k).astype(float)


def ndcg(ranks, k: int):
    """NDCG@K of single cases (§5.1.2): 1 / log2(rank + 2) below k, else 0.

    The ideal DCG is 1, because one item counts.
    """
    ranks = np.asarray(ranks, dtype=float)
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


METRICS: dict[str, Callable] = {f"{name}@{k}": (lambda ranks, f=f, k=k: f(ranks, k))
                                for k in CUTOFFS for name, f in (("HR", hit_ratio), ("NDCG", ndcg))}


def list_values(items: np.ndarray, targets: np.ndarray, law: np.ndarray | None = None):
    """What each list is worth by each of METRICS.  (n, 10), (n,) -> (n, 4)

    A list is worth the metric at the rank of the answer, or 0 if the answer is not in it. Where the
    law that draws the answer is known, law (n, N) = p(answer), the expectation over answers is
    taken instead of the one that was drawn: it has the same mean and a much smaller error.
    """
    if law is None:
        chance = (items == np.asarray(targets)[:, None]).astype(float)
    else:
        chance = np.take_along_axis(law, items.clip(min=0), axis=1) * (items >= 0)
    places = np.arange(items.shape[1])
    return np.stack([chance @ metric(places) for metric in METRICS.values()], axis=1)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def summarise(values: np.ndarray) -> Scores:
    """Mean and standard error of every metric over test sequences.  (n, 4) -> Scores"""
    return {name: mean_and_error(column) for name, column in zip(METRICS, values.T)}


def relative_change(before: np.ndarray, after: np.ndarray) -> Scores:
    """Change of each metric in per cent (§5.4, Fig. 4) with its standard error, paired by sequence.

    (n, 4) twice. The error of a ratio of means is that of the delta method.
    """
    changes = {}
    for name, a, b in zip(METRICS, before.T, after.T):
        changes[name] = (math.nan, math.nan)
        if a.mean() > 0 and len(a) > 1:
            ratio = b.mean() / a.mean()
            error = (b - ratio * a).std(ddof=1) / math.sqrt(len(a)) / a.mean()
            changes[name] = (100 * float(ratio - 1), 100 * float(error))
    return changes


# ----------------------------------------------------------------------------------------------
# Does order count? (§5.4, Fig. 4)


def evaluate_order(recommenders: dict[str, Callable], test_set: Sequences,
                   law: np.ndarray | None = None) -> tuple[dict[str, Scores], dict]:
    """Recommend for the test histories as they are, reversed and shuffled (§5.4).

    recommenders: name -> (histories, ages, progress) -> Lists. All items of the catalogue are
    candidates (§5.1.2). law: see list_values. Returns the rows of a table, and arrays: what was
    recommended and what it was worth, by test sequence.
    """
    n = len(test_set)
    histories, targets = [test_set.history(i) for i in range(n)], test_set.items[test_set.targets]
    ages = [test_set.ages(i) for i in range(n)] if test_set.index == "time" else None
    rng = np.random.default_rng(0)
    orders = {"original": histories, "reversed": [h[::-1] for h in histories],
              "shuffled": [rng.permutation(h) for h in histories]}
    rows, arrays = {}, {"sequence": test_set.targets, "target": targets,
                        "history": pad(histories, -1).numpy()}
    for name, recommend in recommenders.items():
        for order, given in orders.items():
            made = recommend(given, ages, progress=f"{name}, {order}")
            values = list_values(made.items, targets, law)
            arrays |= {f"lists/{name}/{order}": made.items, f"values/{name}/{order}": values,
                       f"valid/{name}/{order}": made.valid}
            rows[name if order == "original" else f"{name} | {order}"] = summarise(values)
            if order != "original":
                rows[f"{name} | change, {order}"] = relative_change(
                    arrays[f"values/{name}/original"], values)
    return rows, arrays


def format_table(rows: dict[str, Scores]) -> str:
    """Name, then every metric as mean ± standard error. A name `a | b` is shown below a, as b."""
    names = {row: "  " + row.partition(" | ")[2] if " | " in row else row for row in rows}
    width = max(map(len, names.values()))
    lines = [" " * width + "".join(f"{metric:>17}" for metric in METRICS)]
    for row, values in rows.items():
        how = "{:+.1f} ± {:.1f} %" if "change" in row.partition(" | ")[2] else "{:.4f} ± {:.4f}"
        cells = [how.format(*values[metric]) for metric in METRICS]
        lines.append(f"{names[row]:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
