"""Beams, grounding, ranks, HR/NDCG, floors and the result table (§5.1.2, §5.1.4, Fig. 4).

Knows a model only as something that maps (tokens, item_pos, cache) to hidden states and hidden
states to logits; never imports cetrec. Left out: tries, exact all-ranking, figures.

Shapes: B prompts, W beams, T tokens, C width, V vocabulary, N items of the catalogue.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import NO_ITEM, Sequences, Tokenizer, encode_examples
from llama import KVCache

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


@torch.no_grad()
def beam_search(model, prompts, beams: int = 5, max_new_tokens: int = 128, min_new_tokens: int = 4,
                length_penalty: float = 1.0, eos_ids: Sequence[int] = ()) -> tuple[list, Tensor]:
    """Beam search without sampling, with the semantics of transformers 4.43 (§5.1.4, D10).

    prompts: [(tokens, item_pos), ...] lists of numbers. Returns, per prompt, `beams` token lists,
    best first, without the prompt but with EOS, and their scores (B, beams): summed log-probability
    over g^length_penalty, g counting the generated tokens with EOS. EOS is barred while fewer than
    min_new_tokens tokens exist; no renormalisation follows. Each prompt is run once; finished
    prompts leave the batch.
    """
    if beams < 1 or max_new_tokens < 1 or not prompts:
        raise ValueError(f"{len(prompts)} prompts, {beams} beams, {max_new_tokens} new tokens: "
                         "wanted at least one of each")
    device = _device(model)
    B, W = len(prompts), beams
    eos = torch.tensor(sorted(set(eos_ids)), dtype=torch.long, device=device)
    lengths = torch.tensor([len(tokens) for tokens, _ in prompts], device=device)

    # prefill: one row a prompt, then W rows that share what it left in the cache
    cache = KVCache()
    tokens, item_pos = ([pair[i] for pair in prompts] for i in (0, 1))
    hidden = model(_pad(tokens, 0, device), _pad(item_pos, NO_ITEM, device), cache=cache)
    logits = model.logits(hidden[torch.arange(B, device=device), lengths - 1])          # (B, V)
    V = logits.shape[-1]
    if bool((lengths != lengths.max()).any()):
        cache.hide_from(lengths)
    cache.select(torch.arange(B, device=device).repeat_interleave(W))
    logits = logits.repeat_interleave(W, dim=0)
    sums = torch.tensor([0.0] + [-1e9] * (W - 1), device=device).repeat(B, 1)           # (B, W)
    alive = torch.zeros(B, W, 0, dtype=torch.long, device=device)                   # (B, W, new)
    prompt_of = list(range(B))              # which prompt each remaining group of W rows serves
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]

    def finish(prompt: int, total: float, tokens: list[int]) -> None:
        finished[prompt].append((total / len(tokens) ** length_penalty, tokens))
        finished[prompt].sort(key=lambda scored: -scored[0])    # stable: of equals the earlier
        del finished[prompt][W:]

    for g in range(1, max_new_tokens + 1):
        groups = len(prompt_of)
        log_p = logits.log_softmax(dim=-1).view(groups, W, V)
        if g <= min_new_tokens:
            log_p = log_p.index_fill(-1, eos, -math.inf)
        candidates = max(2, 1 + len(eos)) * W
        sums_after = (sums[..., None] + log_p).view(groups, -1)
        total, flat = sums_after.topk(min(candidates, W * V), dim=-1)
        token, parent = flat % V, flat // V
        is_eos = torch.isin(token, eos)

        # the W best that go on, in order; ended ones among the first W are kept as hypotheses
        going = (~is_eos).cumsum(dim=-1) - 1                                    # rank among those
        pick = torch.where(~is_eos & (going < W), going, W)
        slots = torch.zeros(groups, W + 1, dtype=torch.long, device=device)
        slots.scatter_(1, pick, torch.arange(flat.shape[1], device=device).expand_as(pick))
        slots = slots[:, :W]
        ended, totals, parents = is_eos[:, :W].tolist(), total.tolist(), parent.tolist()
        tokens = token.tolist()
        for row, prompt in enumerate(prompt_of):
            for rank in (r for r in range(min(W, flat.shape[1])) if ended[row][r]):
                if totals[row][rank] > -math.inf:
                    finish(prompt, totals[row][rank],
                           alive[row, parents[row][rank]].tolist() + [tokens[row][rank]])
        sums, parent = total.gather(1, slots), parent.gather(1, slots)
        alive = torch.cat((alive.gather(1, parent[..., None].expand(-1, -1, g - 1)),
                           token.gather(1, slots)[..., None]), dim=-1)

        # a prompt is done when its worst kept hypothesis beats what its best beam scores now
        stay = [row for row, prompt in enumerate(prompt_of) if len(finished[prompt]) < W or
                finished[prompt][-1][0] < totals[row][0] / g ** length_penalty]
        if not stay or g == max_new_tokens:
            break
        rows = torch.arange(groups, device=device)[:, None] * W + parent    # cache rows to follow
        if len(stay) < groups:
            kept = torch.tensor(stay, device=device)
            rows, sums, alive = rows[kept], sums[kept], alive[kept]
            prompt_of = [prompt_of[row] for row in stay]
        cache.select(rows.flatten())
        last = alive[..., -1].reshape(-1, 1)
        logits = model.logits(model(last, torch.full_like(last, NO_ITEM), cache=cache)[:, -1])

    for row in stay:                                    # out of tokens: beams count as they stand
        for total, tokens in zip(sums[row].tolist(), alive[row].tolist()):
            finish(prompt_of[row], total, tokens)
    return ([[tokens for _, tokens in scored] for scored in finished],
            torch.tensor([[score for score, _ in scored] for scored in finished]))


# ----------------------------------------------------------------------------------------------
# Grounding: text -> catalogue


def clean(text: str) -> str:
    """A generated answer or a title without outer spaces and quotes."""
    return text.strip().strip('"').strip()


@torch.no_grad()
def embed_titles(model, tokenizer: Tokenizer, titles: Sequence[str], rows: int = 256) -> Tensor:
    """Hidden state of each title's last token after the final norm, float32.  -> (len(titles), C)

    Input is BOS (if the tokenizer adds one) and the bare title; no token belongs to a history item.
    """
    device = _device(model)
    encodings = tokenizer.bpe.encode_batch([clean(title) for title in titles])
    ids = [e.ids or [tokenizer.eos_ids[0]] for e in encodings]
    table, order = [None] * len(ids), sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for chunk in (order[i:i + rows] for i in range(0, len(order), rows)):
        tokens = _pad([ids[i] for i in chunk], 0, device)
        hidden = model(tokens, torch.full_like(tokens, NO_ITEM)).float()
        for row, i in enumerate(chunk):
            table[i] = hidden[row, len(ids[i]) - 1]
    return torch.stack(table)


def nearest(queries: Tensor, table: Tensor) -> Tensor:
    """Items by Euclidean distance, nearest first, ties by item id.  (Q, C), (N, C) -> (Q, N)

    Differences are formed one by one: the expansion a² + b² - 2ab loses the digits that decide.
    """
    distances = torch.cdist(queries.float(), table.float(),
                            compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sort(dim=-1, stable=True).indices


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


def recommend(model, titles: Sequence[str], histories: Sequence[Sequence[int]],
              domain: str = "movies", beams: int = 5, exclude_history: bool = True,
              length_penalty: float = 1.0, min_new_tokens: int = 4, batch_size: int = 64,
              length: int = 10, progress: str = "recommending", ages=None) -> np.ndarray:
    """Ten items per history: beams, each grounded, merged (§5.1.4). -> (len(histories), length)

    Histories are item ids, oldest first; ages None for k by order, or k of each item by the clock,
    a list for each history. Prompts of similar length share a batch. The model
    carries its tokenizer as model.tokenizer.
    """
    tokenizer = model.tokenizer
    table = embed_titles(model, tokenizer, titles)
    lists = np.zeros((len(histories), min(length, len(titles))), dtype=np.int64)
    order = sorted(range(len(histories)), key=lambda i: len(histories[i]))
    longest = max(len(e.ids) for e in tokenizer.bpe.encode_batch(list(titles)))
    grounded: dict[str, np.ndarray] = {}
    with tqdm(total=len(order), desc=progress, unit="user", leave=False, disable=None) as bar:
        for chunk in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            given = [[titles[j] for j in histories[i]] for i in chunk]
            examples = encode_examples(tokenizer, given, [None] * len(chunk), domain,
                                       ages and [ages[i] for i in chunk])
            answers, _ = beam_search(model, [(e.tokens, e.item_pos) for e in examples], beams,
                                     max_new_tokens=min(128, longest + 8),
                                     min_new_tokens=min_new_tokens, length_penalty=length_penalty,
                                     eos_ids=tokenizer.eos_ids)
            texts = [[clean(tokenizer.decode(a)) for a in beam] for beam in answers]
            if new := sorted({t for beam in texts for t in beam} - grounded.keys()):
                near = nearest(embed_titles(model, tokenizer, new), table)[:, :500].cpu().numpy()
                grounded.update(zip(new, near))
            for i, beam in zip(chunk, texts):
                lists[i] = merge_lists([grounded[t].tolist() for t in beam],
                                       histories[i] if exclude_history else (), lists.shape[1])
            bar.update(len(chunk))
    return lists


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


def summarise(ranks: np.ndarray) -> Scores:
    """Mean and standard error of every metric over test sequences."""
    summary = {}
    for name, metric in METRICS.items():
        gains = metric(ranks)
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        summary[name] = (float(gains.mean()), float(error))
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


def evaluate_order(model, train_set: Sequences, test_set: Sequences, world=None, beams: int = 5,
                   length_penalty: float = 1.0, exclude_history: bool = True) -> dict:
    """Test histories as they are and reversed (Fig. 4), beside what counting and the oracle reach.

    -> {"protocol": a sentence, "rows": {name: Scores}, "notes": [sentences]}
    """
    tokenizer, titles = model.tokenizer, test_set.titles
    histories = [test_set.history(i) for i in range(len(test_set))]
    targets = test_set.items[test_set.targets]
    ages = [test_set.ages(i) for i in range(len(test_set))]     # of the slots, reversed or not
    answers = tokenizer.bpe.encode_batch([f'"{t}"' for t in titles], add_special_tokens=False)
    shortest = min(4, min(len(a.ids) for a in answers))     # D12: CFT's 4 would bar shorter titles
    ranks = {}
    for name, given in (("original", histories), ("reversed", [h[::-1] for h in histories])):
        lists = recommend(model, titles, given, test_set.domain, beams, exclude_history,
                          length_penalty, shortest, progress=f"{name} histories", ages=ages)
        ranks[name] = list_ranks(lists, targets)
    rows = {f"{name} order": summarise(r) for name, r in ranks.items()}
    rows["change under reversal"] = relative_change(ranks["original"], ranks["reversed"])
    floors = CountingFloors(train_set, len(titles)).ranks(histories, targets, exclude_history)
    rows |= {name: summarise(r) for name, r in floors.items()}
    notes = []
    if world is not None:
        best = oracle_metrics(world, histories)
        rows |= {f"best possible, {name}": values for name, values in best.items()}
        notes.append(_standing(rows["original order"], best["order-aware"], best["order-blind"]))
    protocol = (f"test: {len(histories):,} sequences, all {len(titles):,} items ranked, history "
                f"{'excluded' if exclude_history else 'kept'}, {beams} beams, "
                f"length penalty {length_penalty:g}")
    return {"protocol": protocol, "rows": rows, "notes": notes}


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
    """The printed table of evaluate_order."""
    rows = [(name, values, "%" if name.startswith("change") else "")
            for name, values in result["rows"].items()]
    return "\n".join([result["protocol"], format_table(rows), *result["notes"]])


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
