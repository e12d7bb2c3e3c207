"""Recommend ten titles for each history, and measure them (§5): beams, grounding, HR, NDCG.

This file knows a model only as something that maps (tokens, item_pos, positions, mask, past, last)
to hidden states with keys and values, and hidden states to logits. Read it after cetrec.py.
Beams that stay on the catalogue's titles, which the paper does not have, are in support/trie.py.
D1 to D15 number what the paper leaves open; see docs/readings.md.

Shapes: B prompts, W beams, P tokens of the common prefix, T tokens after it, S = P + T, C width,
V vocabulary, N items of the catalogue, n histories.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import IGNORE, NO_ITEM, Catalogue, Example, Sequences, Tokenizer, align_right, collate
from llama import KeysValues, causal_mask, token_positions
from lora import without_factors

CUTOFFS = (5, 10)           # K of HR@K and NDCG@K, §5.1.2
LENGTH = max(CUTOFFS)       # of a list of recommendations
FEWEST = 10                 # hits that a standard error or a rate of change is computed from
Prompt = tuple[list[int], list[float]]      # tokens and item_pos, of equal length
Beam = tuple[float, int, list[int]]         # summed log p, the beam it continues, tokens so far
Scores = dict[str, tuple[float, float]]     # metric -> (mean, standard error)
Model = Any                 # a TemporalLlama, or a module with its forward and its logits

# ----------------------------------------------------------------------------------------------
# Five beams (§5.1.4)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are."""
    return next(model.parameters()).device


def check_scores(scores: Tensor) -> Tensor:
    """The same scores. Raises ValueError if one is not a number or +inf: no list is right then."""
    if not (scores < math.inf).all():
        raise ValueError("the model's scores are not finite: float16 or too high a rate lets them "
                         "overflow. Take --dtype bfloat16 or float32, or tune with a smaller --lr")
    return scores


def read_prompts(model: Model, prompts: Sequence[Prompt]
                 ) -> tuple[Tensor, list[KeysValues], Tensor]:
    """Run each prompt once, and what all of them begin with once for all.

    Returns the logits of the token after each prompt (B, V); the keys and values of S columns; and
    which of the columns hold a token of the prompt (B, S), because the others hold padding.
    """
    answer = 0          # a placeholder: the prompt's last column predicts it
    batch = collate([Example([*tokens, answer], [*item_pos, NO_ITEM],
                             [IGNORE] * len(tokens) + [answer]) for tokens, item_pos in prompts])
    batch = batch.to(device_of(model))
    P, T = len(batch.prefix), batch.tokens.shape[1]
    _, past = model(batch.prefix[None], torch.full_like(batch.prefix[None], NO_ITEM))
    mask = causal_mask(batch.padding, T, P)
    hidden, past = model(batch.tokens, batch.item_pos, token_positions(batch.padding, T, P), mask,
                         past, last=1)
    return check_scores(model.logits(hidden[:, 0])), past, mask[:, 0, -1]   # it sees its prompt


@torch.inference_mode()
def beam_search(model: Model, prompts: Sequence[Prompt], beams: int = 5, max_new_tokens: int = 128,
                min_new_tokens: int = 4, length_penalty: float = 1.0, eos_ids: Sequence[int] = (),
                prefix_allowed_tokens_fn: Callable[[int, list[int]], Sequence[int]] | None = None,
                ) -> tuple[list[list[list[int]]], Tensor]:
    """Beam search without sampling, with the scores and the stopping of transformers (D10).

    Returns for each prompt at most W = beams answers as token lists, best first, and their scores
    (B, W): the summed log-probability over g^length_penalty, where g counts the answer's tokens,
    EOS included. EOS is barred while an answer has fewer than min_new_tokens tokens.
    prefix_allowed_tokens_fn(b, answer) lists the tokens that may follow the beginning of an answer
    to prompt b.

    The W beams of a prompt share one row: each step adds W columns to it, and the mask lets a token
    look at its prompt and at its own beam's earlier tokens only. So keys and values are never
    copied from beam to beam.
    """
    logits, past, seen = read_prompts(model, prompts)
    (B, V), W, device = logits.shape, beams, logits.device
    log_p = logits.log_softmax(dim=-1)[:, None].expand(B, W, V)
    looks_at = seen[:, None].expand(B, W, -1)                                   # (B, W, S)
    dead: Beam = (-math.inf, 0, [0])        # fills unused beams; its token is never read
    alive: list[list[Beam]] = [[(0.0, 0, []), *[dead] * (W - 1)] for _ in range(B)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]         # score, tokens
    for g in range(1, max_new_tokens + 1):
        if g <= min_new_tokens:
            log_p = log_p.index_fill(-1, torch.tensor(eos_ids, device=device).long(), -math.inf)
        if prefix_allowed_tokens_fn is not None:
            log_p = keep_allowed(log_p, alive, prefix_allowed_tokens_fn)
        sums = torch.tensor([[total for total, _, _ in row] for row in alive], device=device)
        # Of that many continuations at least W do not end, and transformers takes as many.
        best = (sums[..., None] + log_p).flatten(1).topk(max(2, 1 + len(eos_ids)) * W)
        for b, (totals, indices) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            going = []
            for rank, (total, index) in enumerate(zip(totals, indices)):
                parent, token = divmod(index, V)
                answer = alive[b][parent][2] + [token]
                if token not in eos_ids:
                    going.append((total, parent, answer))
                elif rank < W:
                    ended[b].append((total / g ** length_penalty, answer))
            alive[b], ended[b] = going[:W], best_answers(ended[b], W)
            if len(ended[b]) == W and ended[b][-1][0] >= totals[0] / g ** length_penalty:
                alive[b] = [dead] * W       # done: no beam as it stands beats the worst of ended
            elif g == max_new_tokens:       # out of tokens: the beams count as they stand
                ended[b] = best_answers(ended[b] + [(total / g ** length_penalty, answer)
                                                    for total, _, answer in alive[b]], W)
        if g == max_new_tokens or all(row[0][0] == -math.inf for row in alive):
            break

        parents = torch.tensor([[parent for _, parent, _ in row] for row in alive], device=device)
        tokens = torch.tensor([[answer[-1] for *_, answer in row] for row in alive], device=device)
        itself = torch.eye(W, dtype=torch.bool, device=device).expand(B, W, W)
        inherited = looks_at.gather(1, parents[..., None].expand(-1, -1, looks_at.shape[-1]))
        looks_at = torch.cat((inherited, itself), dim=-1)                       # (B, W, S + g W)
        hidden, past = model(tokens, torch.full_like(tokens, NO_ITEM), looks_at.sum(dim=-1) - 1,
                             looks_at[:, None], past)
        log_p = check_scores(model.logits(hidden)).log_softmax(dim=-1)          # (B, W, V)
    scores = [[score for score, _ in row] + [-math.inf] * (W - len(row)) for row in ended]
    return [[answer for _, answer in row] for row in ended], torch.tensor(scores)


def best_answers(answers: list[tuple[float, list[int]]], beams: int) -> list:
    """The best finished answers, best first; of equal ones the earlier stays in front."""
    possible = [answer for answer in answers if answer[0] > -math.inf]
    return sorted(possible, key=lambda answer: -answer[0])[:beams]


def keep_allowed(log_p: Tensor, beams: Sequence[Sequence[Beam]],
                 allowed: Callable[[int, list[int]], Sequence[int]]) -> Tensor:
    """-inf for all tokens but those that may follow each beam of each prompt.  (B, W, V) -> same

    What is left is not renormalised: a score stays the model's own log p.
    """
    kept = [(b, w, token) for b, row in enumerate(beams)
            for w, (total, _, answer) in enumerate(row) if total > -math.inf
            for token in allowed(b, answer)]
    index = tuple(torch.tensor(kept, device=log_p.device).long().view(-1, 3).T)
    out = torch.full_like(log_p, -math.inf)
    out[index] = log_p[index]
    return out


# ----------------------------------------------------------------------------------------------
# Grounding: from generated text to the catalogue (§5.1.4, D11)


def clean(text: str) -> str:
    """A generated answer or a title without outer spaces and quotes."""
    return text.strip().strip('"').strip()


@torch.inference_mode()
def embed_titles(model: Model, titles: Sequence[str], tokenizer: Tokenizer,
                 rows: int = 64) -> Tensor:
    """Hidden state of each title's last token after the final norm, float32.  -> (len(titles), C)

    The input is BOS (where the tokenizer adds one) and the bare title. No token belongs to an item
    of a history, so there is no temporal embedding. An empty text counts as EOS.
    """
    encodings = tokenizer.bpe.encode_batch([clean(title) for title in titles])
    ids = [encoding.ids or [tokenizer.eos_ids[0]] for encoding in encodings]
    order, parts = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
    for chunk in (order[i:i + rows] for i in range(0, len(order), rows)):
        tokens = align_right([ids[i] for i in chunk], tokenizer.pad_id).to(device_of(model))
        padding = torch.tensor([tokens.shape[1] - len(ids[i]) for i in chunk], device=tokens.device)
        hidden, _ = model(tokens, torch.full_like(tokens, NO_ITEM),
                          token_positions(padding, tokens.shape[1]),
                          causal_mask(padding, tokens.shape[1]), last=1)
        parts.append(check_scores(hidden[:, 0].float()))
    return torch.cat(parts)[torch.tensor(order).argsort()]          # back in the given order


def nearest(queries: Tensor, table: Tensor, length: int | None = None) -> Tensor:
    """Rows of the table by Euclidean distance, nearest first, ties by number.

    (Q, C), (N, C) -> (Q, length or N). Differences are formed one by one, because the usual
    expansion a² + b² - 2ab loses the digits that decide. Memory stays bounded.
    """
    parts = []
    for part in queries.float().split(max(1, 2**23 // len(table))):
        distances = torch.cdist(part, table.float(), compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(distances.argsort(dim=1, stable=True)[:, :length].clone())
    return torch.cat(parts)


def ground(model: Model, texts: Sequence[str], catalogue: Catalogue,
           length: int | None = None) -> Tensor:
    """Rank the catalogue by its distance to each text, both embedded by the model as it is.

    -> (len(texts), length or N) item ids, nearest first
    """
    queries, table = (embed_titles(model, titles, catalogue.tokenizer)
                      for titles in (texts, catalogue.titles))
    return nearest(queries, table, length)


def merge_lists(lists: Iterable[Sequence[int]], exclude: Iterable[int] = (),
                length: int = LENGTH) -> list[int]:
    """The beams' nearest titles in turn, then their second-nearest ones, and so on (D7).

    §5.1.4 has the second-nearest titles complete the Top-10. Duplicates keep their first rank, and
    items of the history are left out.
    lists: item ids of each beam, nearest first. [[3,1,2,0], [3,2,1,0], [0,1,2,3]] -> [3, 0, 1, 2]
    """
    merged: list[int] = []
    seen = set(exclude)
    for rank in zip(*lists):
        for item in rank:
            if item not in seen and len(merged) < length:
                seen.add(item)
                merged.append(item)
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
    log_p: np.ndarray           # (n, 10) log-probability of each title; nan where it is not known
    valid: np.ndarray           # (n, W) is the beam's text a title of the catalogue?

    @classmethod
    def empty(cls, n: int, beams: int = 0) -> "Lists":
        """Lists to be filled."""
        return cls(np.full((n, LENGTH), -1), np.full((n, LENGTH), np.nan),
                   np.zeros((n, beams), dtype=bool))


Recommender = Callable[..., Lists]      # (histories, ages, progress) -> ten items for each history


def prompts_by_length(catalogue: Catalogue, histories: Sequence[Sequence[int]],
                      ages: Sequence[np.ndarray] | None, rows: int, progress: str
                      ) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Prompts in groups of similar length, to reduce padding, and the numbers of their histories.

    They are the prompts of the factual world: only this world recommends (§4.4).
    histories: item ids, oldest first. ages: None, or k of each item by the clock (D15).
    """
    order = sorted(range(len(histories)),
                   key=lambda i: sum(len(catalogue.titles[item]) for item in histories[i]))
    with tqdm(total=len(order), desc=progress, unit="user", leave=False, disable=None) as bar:
        for chunk in (order[i:i + rows] for i in range(0, len(order), rows)):
            examples = catalogue.prompts([histories[i] for i in chunk],
                                         [ages[i] for i in chunk] if ages else None)
            yield chunk, [(e.tokens, e.item_pos) for e in examples]
            bar.update(len(chunk))


class GroundedBeams:
    """The paper's recommender (§5.1.4): five free texts, each grounded in the catalogue, merged.

    The catalogue is embedded at each call, by the model as it is then.
    """

    def __init__(self, model: Model, catalogue: Catalogue, decoding: Decoding = Decoding()):
        self.model, self.catalogue, self.decoding = model, catalogue, decoding
        answers = catalogue.tokenizer.bpe.encode_batch([f'"{t}"' for t in catalogue.titles],
                                                       add_special_tokens=False)
        lengths = [len(answer.ids) for answer in answers]
        self.shortest = min(4, min(lengths))    # D12: CFT's 4 would bar shorter titles
        self.longest = min(128, max(lengths) + 8)

    def __call__(self, histories: Sequence[Sequence[int]],
                 ages: Sequence[np.ndarray] | None = None,
                 progress: str = "five beams") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        decoding, catalogue, model = self.decoding, self.catalogue, self.model
        out, beam_texts = Lists.empty(len(histories), decoding.beams), {}
        for chunk, prompts in prompts_by_length(catalogue, histories, ages, 64, progress):
            answers, _ = beam_search(model, prompts, decoding.beams, self.longest, self.shortest,
                                     decoding.length_penalty, catalogue.tokenizer.eos_ids)
            for i, beams in zip(chunk, answers):
                beam_texts[i] = [clean(catalogue.tokenizer.decode(answer)) for answer in beams]

        if not beam_texts:
            return out
        distinct = sorted({text for texts in beam_texts.values() for text in texts})
        # Enough neighbours for ten to be left without those of the history.
        length = min(len(catalogue.titles), LENGTH + max(map(len, histories)))
        with without_factors(model) if decoding.ground_with == "base" else nullcontext():
            near = dict(zip(distinct, ground(model, distinct, catalogue, length).tolist()))
        titles = {clean(title) for title in catalogue.titles}
        for i, texts in beam_texts.items():
            used = texts if decoding.ground_list == "merged" else texts[:1]
            ten = merge_lists([near[text] for text in used],
                              histories[i] if decoding.exclude_history else ())
            out.items[i, :len(ten)] = ten
            out.valid[i, :len(texts)] = [text in titles for text in texts]
        return out


# ----------------------------------------------------------------------------------------------
# HR@K and NDCG@K (§5.1.2)


def hit_ratio(ranks: npt.ArrayLike, k: int) -> np.ndarray:
    """HR@K of single cases (§5.1.2): 1 where the answer's 0-based rank is below k. Any shape."""
    return (np.asarray(ranks) < k).astype(float)


def ndcg(ranks: npt.ArrayLike, k: int) -> np.ndarray:
    """NDCG@K of single cases (§5.1.2): 1 / log2(rank + 2) below k, else 0.

    The ideal DCG is 1, because one item counts.
    """
    ranks = np.asarray(ranks, dtype=float)
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


METRICS: dict[str, Callable] = {f"{name}@{k}": (lambda ranks, f=f, k=k: f(ranks, k))
                                for k in CUTOFFS for name, f in (("HR", hit_ratio), ("NDCG", ndcg))}


def list_values(items: np.ndarray, targets: np.ndarray,
                true_p: np.ndarray | None = None) -> np.ndarray:
    """Every metric of METRICS for each list.  (n, 10), (n,) -> (n, 4)

    A list's value is the metric at the rank of the answer, or 0 if the answer is not in it. Where
    the true distribution of the answer is known, true_p (n, N), the value is the expectation over
    answers instead: it has the same mean and a much smaller error.
    """
    if true_p is None:
        p = (items == np.asarray(targets)[:, None]).astype(float)
    else:
        p = np.take_along_axis(true_p, items.clip(min=0), axis=1) * (items >= 0)
    return np.stack([p @ metric(np.arange(p.shape[1])) for metric in METRICS.values()], axis=1)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, which is nan where fewer than ten values are not 0.

    One hit in a thousand test sequences has a standard error by the formula, but it says nothing.
    """
    hits, n = np.count_nonzero(values), len(values)
    error = values.std(ddof=1) / math.sqrt(n) if hits >= FEWEST else math.nan
    return float(values.mean()), float(error)


def summarise(values: np.ndarray) -> Scores:
    """Mean and standard error of every metric over test sequences.  (n, 4) -> Scores"""
    return {name: mean_and_error(column) for name, column in zip(METRICS, values.T)}


def relative_change(before: np.ndarray, after: np.ndarray) -> Scores:
    """Change of each metric in per cent (§5.4, Fig. 4) with its standard error, paired by sequence.

    (n, 4) twice. The error of a ratio of means is that of the delta method. The change is nan where
    there were fewer than ten hits before, and its error where there are fewer before or after.
    """
    changes = dict.fromkeys(METRICS, (math.nan, math.nan))
    for name, a, b in zip(METRICS, before.T, after.T):
        if np.count_nonzero(a) >= FEWEST:
            ratio, few = b.mean() / a.mean(), np.count_nonzero(b) < FEWEST
            error = math.nan if few else (b - ratio * a).std(ddof=1) / math.sqrt(len(a)) / a.mean()
            changes[name] = (100 * float(ratio - 1), 100 * float(error))
    return changes


# ----------------------------------------------------------------------------------------------
# Does order count? (§5.4, Fig. 4)


def evaluate_order(recommenders: dict[str, Recommender], test_set: Sequences,
                   true_p: np.ndarray | None = None) -> tuple[dict[str, Scores], dict]:
    """Recommend for the test histories as they are, reversed and shuffled (§5.4).

    All items of the catalogue are candidates (§5.1.2). With index "time" the ages stay where they
    are: the first title read is always the oldest. true_p: see list_values. Returns the rows of a
    table, and arrays by test sequence: what was recommended, and its metrics.
    """
    n = len(test_set)
    histories, targets = [test_set.history(i) for i in range(n)], test_set.items[test_set.targets]
    ages = [test_set.ages(i) for i in range(n)] if test_set.index == "time" else None
    rng = np.random.default_rng(0)
    orders = {"original": histories, "reversed": [h[::-1] for h in histories],
              "shuffled": [rng.permutation(h) for h in histories]}
    longest = max(map(len, histories))
    rows: dict[str, Scores] = {}
    arrays = {"sequence": test_set.targets, "target": targets, "history": np.array(
        [[*history, *[-1] * (longest - len(history))] for history in histories])}
    for name, recommend in recommenders.items():
        for order, ordered in orders.items():
            lists = recommend(ordered, ages, progress=f"{name}, {order}")
            values = list_values(lists.items, targets, true_p)
            arrays |= {f"lists/{name}/{order}": lists.items, f"values/{name}/{order}": values,
                       f"log_p/{name}/{order}": lists.log_p, f"valid/{name}/{order}": lists.valid}
            rows[name if order == "original" else f"{name} | {order}"] = summarise(values)
            if order != "original":
                rows[f"{name} | change, {order}"] = relative_change(
                    arrays[f"values/{name}/original"], values)
    return rows, arrays
