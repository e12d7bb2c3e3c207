"""GRU4Rec, Caser and SASRec: item ids in, a score for every item out (Table 3).

    python -m experiments.id_baselines --method sasrec --data ml-100k
    python -m experiments.id_baselines --method gru4rec --data movielens --sample 1 --loss ce

The three differ in how a history becomes one vector, the *state*. A linear map of the state scores
all items. Architectures and settings are those of the code that the paper's group uses (DROS,
LLaRA); docs/baselines.md says where the original papers do otherwise. Data, split,
candidates, exclusion, test sequences and table are those of cetrec.py.

Shapes: B histories, L = 10 columns, n ≤ L items in a history, d width, N items of the catalogue.
"""

import copy
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Sequences
from evaluate import LENGTH, METRICS, Lists, list_values
from support import runs
from support.counting import result_table
from support.machine import choose_device
from support.options import (Options, Where, add_flags, check_values, defaults, flag,
                             parse)
from support.terminal import Parser, exit_status

L = 10                          # items of the longest history, as in data.make_sequences
SHARED = {"data", "data_dir", "domain", "sample", "chronological", "skip_bad_lines",
          "drop_untitled", "keep_repeats", "order_strength", "clock", "limit_train", "seed",
          "eval_sequences", "exclude_history", "device", "out"}

# ----------------------------------------------------------------------------------------------
# Three ways from a history to a state


class IdModel(nn.Module):
    """What the three share: a table of item embeddings below, a linear map to all items above.

    Row N of the lower table belongs to the pads that stand behind a history of fewer than L items.
    In the lineage the map has a table of its own. Where the two are *tied*, an item's score is the
    state times its embedding, so the embedding learns from answers, too.
    """

    def __init__(self, items: int, width: int, state: int):
        super().__init__()
        self.embedding = nn.Embedding(items + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.01)
        self.head = nn.Linear(state, items)

    def tie(self) -> None:
        """Use the lower table above, too. Only where the state is as wide as an embedding."""
        self.head.weight = None

    @property
    def table(self) -> Tensor:
        """What a state is multiplied with.  -> (N, width of the state)"""
        return self.embedding.weight[:-1] if self.head.weight is None else self.head.weight

    def score(self, state: Tensor) -> Tensor:
        """(B, width of the state) -> (B, N)"""
        return F.linear(state, self.table, self.head.bias)

    def scores(self, items: Tensor, lengths: Tensor) -> Tensor:
        """(B, L), (B,) -> (B, N)"""
        return self.score(self(items, lengths))


class GRU4Rec(IdModel):
    """A gated recurrent unit reads the items one by one; its last state scores.

        h_t = (1 - z) n + z h_(t-1),    n = tanh(W x_t + b + r (U h_(t-1) + b'))

    with gates r and z that are sigmoids of the same two inputs. Dropout, which the lineage does
    without, is on the embeddings. The original trains on whole sessions side by side, with the
    other answers of the batch as negatives.
    """

    def __init__(self, items: int, width: int = 64, length: int = L, dropout: float = 0.0):
        super().__init__(items, width, width)
        self.gru, self.dropout = nn.GRU(width, width, batch_first=True), dropout

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """The state after the newest item; pads come later and cannot reach it.  -> (B, d)"""
        embedded = F.dropout(self.embedding(items), self.dropout, self.training)
        states, _ = self.gru(embedded)
        return states[torch.arange(len(items), device=items.device), lengths - 1]


class Caser(IdModel):
    """The embedded items are an image of L rows, over which filters are laid.

    A horizontal filter covers h rows in full width, slides down, and keeps its strongest answer: it
    finds a pattern of h neighbours anywhere. A vertical one is a weighted sum of the rows, so it
    knows where they are. (The original has an embedding of the user besides, which a split by time
    cannot have: it tests users that training never saw.)
    """

    def __init__(self, items: int, width: int = 64, length: int = L, dropout: float = 0.1):
        heights, filters = (2, 3, 4), 16
        super().__init__(items, width, filters * len(heights) + width)
        self.horizontal = nn.ModuleList(nn.Conv2d(1, filters, (h, width)) for h in heights)
        self.vertical, self.dropout = nn.Conv2d(1, 1, (length, 1)), dropout
        for conv in (*self.horizontal, self.vertical):
            nn.init.xavier_normal_(conv.weight)
            nn.init.constant_(conv.bias, 0.1)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Pads are rows of zeros; the filters' biases answer there too, as in the original.

        -> (B, 48 + d)
        """
        rows = self.embedding(items) * is_item(items, lengths)[..., None]
        image = rows[:, None]                                                   # (B, 1, L, d)
        strongest = [F.relu(conv(image)).amax(dim=(2, 3)) for conv in self.horizontal]
        parts = [*strongest, F.relu(self.vertical(image)).flatten(1)]
        return F.dropout(torch.cat(parts, dim=1), self.dropout, self.training)


class SASRec(IdModel):
    """One block of causal self-attention with one head; the newest item's column scores.

        X = E[items] + P,   Q = LN X,   U = softmax((Q Wq)(X Wk)ᵀ / √d) (X Wv) + Q
        F = LN U,           Z = LN(LN(F + W2 relu(W1 F)))

    As in the original code, keys and values are of the rows before the norm, the residual is the
    row after it, and there is no output map behind the attention. The original has two blocks, ties
    the tables (--tied) and trains at every item of a history; here the answer alone is trained.
    """

    def __init__(self, items: int, width: int = 64, length: int = L, dropout: float = 0.1):
        super().__init__(items, width, width)
        self.positions, self.dropout = nn.Embedding(length, width), dropout
        self.query, self.key, self.value, self.inner, self.outer = (
            nn.Linear(width, width) for _ in range(5))
        self.before, self.between, self.after, self.last = (nn.LayerNorm(width) for _ in range(4))

    def attention(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights A (B, L, L) and X and Q, both (B, L, d). Nobody looks at pads or ahead."""
        item = is_item(items, lengths)
        x = self._drop(self.embedding(items) + self.positions.weight) * item[..., None]
        q = self.before(x)
        column = torch.arange(items.shape[1], device=items.device)
        seen = item[:, None, :] & (column <= column[:, None])
        logits = self.query(q) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        # Rows of pads see the items before them. What they hold is never asked for.
        return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1), x, q

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """-> (B, d)"""
        weights, x, q = self.attention(items, lengths)
        u = self._drop(weights) @ self.value(x) + q
        newest = u[torch.arange(len(items), device=items.device), lengths - 1]
        f = self.between(newest)            # from here on every column is by itself
        return self.last(self.after(f + self._drop(self.outer(F.relu(self.inner(f))))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def is_item(items: Tensor, lengths: Tensor) -> Tensor:
    """Which columns hold items.  (B, L), (B,) -> (B, L) bool"""
    return torch.arange(items.shape[1], device=items.device) < lengths[:, None]


MODELS = {"gru4rec": GRU4Rec, "caser": Caser, "sasrec": SASRec}

# ----------------------------------------------------------------------------------------------
# Losses


def draw_negatives(targets: Tensor, items: int) -> Tensor:
    """For each answer another item, all alike likely.  (B,) -> (B,)"""
    other = torch.randint_like(targets, items - 1)
    return other + (other >= targets)


def id_loss(kind: str, model: IdModel, state: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over answers (B,), s being the score of the answer, s' that of a drawn negative.

    bce     ½ (-log σ(s) - log σ(-s'))      the lineage's default
    bpr     -log σ(s - s')
    ce      -log softmax(scores)            no negatives: the whole catalogue
    """
    if kind == "ce":
        return F.cross_entropy(model.score(state), targets)
    pair = torch.stack((targets, draw_negatives(targets, model.head.out_features)))
    s, other = (state * model.table[pair]).sum(-1) + model.head.bias[pair]          # (2, B)
    if kind == "bpr":
        return -F.logsigmoid(s - other).mean()
    return 0.5 * (F.softplus(-s) + F.softplus(other)).mean()


# ----------------------------------------------------------------------------------------------
# Training, and lists


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained and how. The numbers are those of DROS, except epochs and patience."""

    method: str = flag("baseline", "which model", "sasrec", choices=[*MODELS])
    loss: str = flag("baseline", "binary cross-entropy or pairwise ranking against one drawn "
                     "negative, or cross-entropy over the whole catalogue", "bce",
                     choices=["bce", "bpr", "ce"])
    tied: bool = flag("baseline", "score items with their own embeddings instead of a second "
                      "table; not for caser, whose state is wider", False)
    dropout: float = flag("baseline", "probability of dropout: in gru4rec on the embeddings, in "
                          "caser on the state, in sasrec on embeddings, attention and inner layer",
                          0.1, by_data={"gru4rec": 0.0}, low=0, high=0.99, metavar="P",
                          shown="0.1; for gru4rec 0")
    width: int = flag("baseline", "d of embeddings and states", 64, low=1, metavar="D")
    lr: float = flag("baseline", "rate of Adam, with an L2 penalty of 1e-6", 1e-3, low=0,
                     metavar="X")
    batch_size: int = flag("baseline", "sequences in a step", 256, low=1, metavar="N")
    epochs: int = flag("baseline", "times through the training split, at most", 100, low=1,
                       metavar="N")
    patience: int = flag("baseline", "stop after so many epochs without a better NDCG@10 on "
                         "validation", 10, low=1, metavar="N")

    def __post_init__(self):
        check_values(self)
        if self.tied and self.method == "caser":
            raise ValueError("--tied does not go with caser, whose state is wider than an "
                             "embedding; drop it")

    def model(self, items: int) -> IdModel:
        """The model, at its first values."""
        model = MODELS[self.method](items, self.width, dropout=self.dropout)
        if self.tied:
            model.tie()
        return model


def padded(histories, items: int) -> tuple[Tensor, Tensor]:
    """Histories of item ids as right-padded rows, and their lengths.  -> (B, L), (B,)"""
    rows = np.full((len(histories), L), items)
    for row, history in zip(rows, histories):
        row[:len(history)] = history
    return torch.from_numpy(rows), torch.tensor([len(h) for h in histories])


class ItemScores:
    """The ten items of highest score for each history, ties by item id. Called like
    evaluate.GroundedBeams."""

    def __init__(self, model: IdModel, exclude_history: bool = True):
        self.model, self.exclude_history = model, exclude_history

    @torch.inference_mode()
    def __call__(self, histories, ages=None, progress: str = "") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out, device = Lists.empty(len(histories)), self.model.head.bias.device
        for start in range(0, len(histories), 1_000):           # which bounds the memory
            part = histories[start:start + 1_000]
            scores = self.model.scores(*(x.to(device) for x in padded(
                part, self.model.head.out_features))).numpy(force=True)
            out.items[start:start + 1_000] = best_items(scores, part, self.exclude_history)
        return out


def best_items(scores: np.ndarray, histories, exclude_history: bool) -> np.ndarray:
    """The ten items of highest score, ties by item id; -1 where there are no more.

    (B, N) -> (B, 10). The scores of items that are excluded are overwritten.
    """
    if exclude_history:
        for row, history in zip(scores, histories):
            row[list(history)] = -np.inf
    ten = np.argsort(-scores, axis=1, kind="stable")[:, :LENGTH]
    ten[np.take_along_axis(scores, ten, axis=1) == -np.inf] = -1
    return np.pad(ten, ((0, 0), (0, LENGTH - ten.shape[1])), constant_values=-1)


def fit(model: IdModel, train_set: Sequences, valid_set: Sequences, recipe: Recipe, seed: int,
        log=print) -> dict:
    """Train; the best epoch by NDCG@10 on validation stays in the model.

    Returns what is to be recorded. Drawing depends on the seed only.
    """
    torch.manual_seed(seed)
    rng, device, N = np.random.default_rng(seed), model.head.bias.device, len(train_set.titles)
    items, lengths = (x.to(device) for x in padded(
        [train_set.history(i) for i in range(len(train_set))], N))
    answers = torch.from_numpy(train_set.items[train_set.targets]).to(device)
    histories = [valid_set.history(i) for i in range(len(valid_set))]
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=1e-6)
    started, best, weights, reached = time.perf_counter(), 0, None, []
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order, total = torch.from_numpy(rng.permutation(len(answers))).to(device), 0.0
        for rows in tqdm(order.split(recipe.batch_size), desc=f"epoch {epoch}", unit="step",
                         leave=False, disable=None):
            state = model(items[rows], lengths[rows])
            loss = id_loss(recipe.loss, model, state, answers[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        lists = ItemScores(model.eval())(histories)
        values = list_values(lists.items, valid_set.items[valid_set.targets]).mean(axis=0)
        reached.append(float(values[list(METRICS).index("NDCG@10")]))
        if weights is None or reached[-1] > reached[best]:
            best, weights = epoch - 1, copy.deepcopy(model.state_dict())
        seconds = time.perf_counter() - started
        if not np.isfinite(float(total)):
            raise ValueError(f"the loss of epoch {epoch} is {float(total)}; try a smaller --lr")
        log(f"epoch {epoch:>3} | loss {float(total) / len(answers):.4f} | validation NDCG@10 "
            f"{reached[-1]:.4f}{' best so far' if best == epoch - 1 else ''} | "
            f"{seconds / epoch:.1f} s an epoch")
        if epoch - 1 - best >= recipe.patience:
            break
    model.load_state_dict(weights)
    model.eval()
    return {"epochs": epoch, "best_epoch": best + 1, "validation_ndcg10": reached,
            "seconds": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------
# The command


def run(options: Options, recipe: Recipe, out: Path) -> None:
    """Train and evaluate one model; write its run folder."""
    runs.check_writable(out)
    device, _ = choose_device(options)
    (train_set, valid_set, test_set), synthetic, record = runs.open_data(options)
    torch.manual_seed(options.seed)
    model = recipe.model(len(train_set.titles)).to(device)
    print(f"{recipe.method} | {sum(p.numel() for p in model.parameters()):,} parameters | loss "
          f"{recipe.loss} | at most {recipe.epochs} epochs of {len(train_set):,} sequences")
    folder = runs.new_folder(out, f"{Path(options.data).resolve().name}-{recipe.method}")
    record |= {"method": recipe.method, "options": options.record(), "baseline": asdict(recipe),
               "versions": runs.versions(device)}
    runs.begin(folder, record, train_set)
    record["tuning"] = fit(model, train_set, valid_set.sample(1_000, options.seed), recipe,
                           options.seed)
    test_set = test_set.sample(options.eval_sequences, options.seed)
    lists = {"all items scored": ItemScores(model, options.exclude_history)}
    results, arrays = result_table(lists, (train_set, valid_set, test_set), synthetic,
                                   options.exclude_history)
    runs.finish(folder, record | results, arrays, test_set)


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="python -m experiments.id_baselines",
                description="Train GRU4Rec, Caser or SASRec and measure it as cetrec.py measures "
                "CETRec.")
    add_flags(ap, Recipe)
    add_flags(ap, Options, Where, only=SHARED)
    flags = parse(ap, argv)

    def work() -> None:
        """One run of the model that was asked for."""
        chosen = {f.name: flags.pop(f.name) for f in fields(Recipe) if f.name in flags}
        recipe = Recipe(**defaults(Recipe, chosen.get("method", "sasrec")) | chosen)
        out = Path(flags.pop("out", "runs"))
        run(Options.from_flags(flags | {"temporal": "none"}), recipe, out)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
