"""CETRec: temporal embeddings, the erased world, the twin forward, the losses, the loop (§4).

Paper: "Enhancing Temporal Sensitivity of Large Language Model for Recommendation with
Counterfactual Tuning". This file follows §4 from top to bottom and ends with the command. Read
llama.py, lora.py and data.py before it, evaluate.py after it.

    python cetrec.py                                            the synthetic world, no download
    python cetrec.py --data ml-100k                             MovieLens 100K
    python cetrec.py --data movielens --model path/to/Llama-3   the paper's setting
    python cetrec.py --resume runs/movielens-rope-1             continue after an interruption
    python cetrec.py --eval-only runs/synthetic-rope-1          evaluate a finished run again

Shapes: B rows, T tokens, P tokens of the common prefix, C width, V vocabulary, M supervised tokens,
A tokens of the longest answer. D1 to D15 number what the paper leaves open; see docs/readings.md.
"""

if __name__ == "__main__":
    import support.start  # noqa: F401 (it must come before torch)

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import IGNORE, NO_ITEM, Batch, Sequences, Tokenizer, batches, collate, encode_sequences
from evaluate import Recommender, check_scores, device_of, mean_and_error
from llama import KeysValues, Llama, causal_mask, token_positions
from support import machine, processes, progress, runs
from support.counting import result_table
from support.options import TEMPORAL, Options, read_flags
from support.terminal import exit_status
from support.titles import TitleRecommender
from support.trie import ExactTitles, make_recommenders

# ----------------------------------------------------------------------------------------------
# §4.2 Temporal embeddings


def _angles(pos: Tensor, dim: int, base: float) -> Tensor:
    """k / base^(2t/dim) for t = 0, 1, ..  (..) -> (.., dim/2)"""
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=pos.device)
    return pos[..., None].float() * base ** (-pair / dim)


def sinusoidal(pos: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """p_k of Eq. 3: p[2t] = sin(k / base^(2t/dim)), p[2t+1] = cos(same), with k = pos.

    (..) -> (.., dim). Positions are steps back or, by the clock, real numbers. The step from k to
    k + 1 is the same rotation for every k: fast for the first coordinates, slow for the last.
    """
    angles = _angles(pos, dim, base)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


def rotary(x: Tensor, pos: Tensor, base: float = 10_000.0) -> Tensor:
    """R_k x of Eq. 4: neighbours (x[2t], x[2t+1]) rotate by the angle k / base^(2t/dim), k = pos.

    (.., dim) and (..) -> (.., dim); dim is even. At position 0 nothing changes, bit for bit.
    """
    angles = _angles(pos, x.shape[-1], base)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class TemporalLlama(nn.Module):
    """§4.2: a Llama in which every token of an item also carries the item's temporal embedding.

    Eq. 6 adds p_k to all tokens of item k, and nothing to tokens outside items. The paper leaves
    open where the rotary variant is applied (D2), so there are these kinds:

    "rope"            the token embedding is rotated by R_k at the input, where Eq. 6 adds p_k
    "rope-attention"  queries and keys at token position t are rotated by R_(t+k), as in Eq. 5
    "sinpe"           scale · p_k of Eq. 3 is added to the token embedding (D8)
    "none"            the plain Llama, which is BIGRec among the baselines of §5.1.3
    """

    def __init__(self, llama: Llama, kind: str = "rope", scale: float = 1.0) -> None:
        super().__init__()
        if kind not in TEMPORAL:
            raise ValueError(f"temporal embedding {kind!r}; wanted one of {', '.join(TEMPORAL)}")
        self.llama, self.kind, self.scale = llama, kind, scale

    def forward(self, tokens: Tensor, item_pos: Tensor, positions: Tensor | None = None,
                mask: Tensor | None = None, past: list[KeysValues] | None = None,
                last: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """Hidden states (B, T or last, C), and all keys and values, as Llama.forward returns them.

        tokens (B, T), item_pos (B, T): k of the item that each token belongs to, or NO_ITEM.
        """
        x, item = self.llama.embed(tokens), item_pos != NO_ITEM
        k = torch.where(item, item_pos, 0)          # R_0 is the identity
        if self.kind == "rope":
            x = rotary(x, k)
        elif self.kind == "sinpe":
            temporal_emb = self.scale * sinusoidal(k, x.shape[-1])
            x = x + (temporal_emb * item[..., None]).to(x.dtype)
        elif self.kind == "rope-attention":
            if positions is None:
                P = past[0][0].shape[2] if past else 0
                positions = torch.arange(P, P + tokens.shape[1], device=tokens.device)
            positions = positions + k
        return self.llama(x, positions, mask, past, last)

    def logits(self, hidden: Tensor) -> Tensor:
        """f of §4.4.  (.., C) -> (.., V) float32"""
        return self.llama.logits(hidden)


# ----------------------------------------------------------------------------------------------
# §4.3 The counterfactual world, and the twin network


def erase_order(item_pos: Tensor) -> Tensor:
    """The counterfactual world: every item is at position 0, so its order is gone.  (B, T) -> same

    Tokens, items and weights stay as they are, and so does the order of the titles in the text:
    what is erased is the temporal embedding. §4.3 gives every item the p_0 of the first, earliest
    item, while §4.2.1 gives p_0 to the newest; we read it as the newest (D1). As R_0 is the
    identity, the erased world of a rotary embedding is the plain Llama.
    """
    return torch.where(item_pos == NO_ITEM, item_pos, 0)


def answer_logits(model: TemporalLlama, batch: Batch, item_pos: Tensor) -> Tensor:
    """Logits of the answers' tokens.

    item_pos (n B, T) places the items of the batch in n worlds, which are run side by side.
    -> (n M, V), world after world

    What all prompts begin with is run once, with gradients, and serves every row of every world.
    """
    worlds = len(item_pos) // len(batch.tokens)
    P, T, A = len(batch.prefix), batch.tokens.shape[1], batch.answers.shape[1]
    _, past = model(batch.prefix[None], torch.full_like(batch.prefix[None], NO_ITEM))
    padding = batch.padding.repeat(worlds)
    hidden, _ = model(batch.tokens.repeat(worlds, 1), item_pos, token_positions(padding, T, P),
                      causal_mask(padding, T, P), past, last=A)                 # (n B, A, C)
    answered = (batch.answers != IGNORE).repeat(worlds, 1)                      # (n B, A)
    return model.logits(hidden[answered])


def twin_forward(model: TemporalLlama, batch: Batch) -> tuple[Tensor, Tensor]:
    """(f(x_t), f(x_0)) of §4.3: one network and the same tokens in two worlds.  -> (M, V), (M, V)
    """
    worlds = torch.cat((batch.item_pos, erase_order(batch.item_pos)))           # T = t, and T = t*
    logits_f, logits_cf = answer_logits(model, batch, worlds).chunk(2)
    return logits_f, logits_cf


@torch.no_grad()
def answer_log_likelihood(model: TemporalLlama, tokenizer: Tokenizer, sequences: Sequences,
                          batch_size: int = 16) -> np.ndarray:
    """log p of each answer in the factual and in the erased world.  -> (len(sequences), 2)

    Their difference is what our report calls the effect of order: Eq. 7 with log p of the whole
    answer in the place of p. It is neither the difference of probabilities of Eq. 7 itself, nor the
    difference of logits inside Eq. 8.
    """
    device, out = device_of(model), np.zeros((len(sequences), 2))
    for start in tqdm(range(0, len(out), batch_size), desc="answers in both worlds", unit="batch",
                      leave=False, disable=None):
        part = sequences.select(slice(start, start + batch_size))
        batch = collate(encode_sequences(tokenizer, part), tokenizer.pad_id).to(device)
        answered = batch.answers != IGNORE
        for world, logits in enumerate(map(check_scores, twin_forward(model, batch))):
            log_p = torch.zeros(answered.shape, device=device)
            log_p[answered] = -F.cross_entropy(logits, batch.answers[answered], reduction="none")
            out[start:start + len(part), world] = log_p.sum(dim=1).cpu().numpy()
    return out


# ----------------------------------------------------------------------------------------------
# §4.4 Losses. Targets (M,) are the tokens of the answers y (Eq. 1). The paper sums over them; we
# take the mean


def temporal_aware_loss(logits_f: Tensor, targets: Tensor) -> Tensor:
    """L_TA = mean CE(f(x_t), y).  Eq. 9, which is Eq. 1 in the factual world."""
    return F.cross_entropy(logits_f, targets)


def counterfactual_loss(logits_f: Tensor, logits_cf: Tensor, targets: Tensor) -> Tensor:
    """L_CT = mean CE(f(x_t) - f(x_0), y).  Eq. 8. Gradients flow through both worlds.

    Eq. 7 is a difference of two probabilities, and §4.4 writes it as f(x_t) - f(x_0) with f a
    distribution. A difference of distributions sums to 0 and cannot enter a cross-entropy, so we
    take f here as logits, as CFT's code does (D3). Where the worlds agree, as with kind "none", the
    softmax of the difference is uniform: the loss is ln V, and its gradient is zero. L_CT is
    smallest wherever f(x_t) - f(x_0) = log p + constant. L_TA is smallest too only if f(x_0) gives
    every token the same probability; docs/rewards.md has the argument.
    """
    effect = logits_f - logits_cf
    return F.cross_entropy(effect, targets)


def cetrec_loss(model: TemporalLlama, batch: Batch,
                lambda_ct: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L, L_TA, L_CT) with L = L_TA + λ L_CT.  Eq. 10. With λ = 0 one world is run; L_CT is None.
    """
    targets = batch.answers[batch.answers != IGNORE]
    if lambda_ct == 0:
        loss_ta = temporal_aware_loss(answer_logits(model, batch, batch.item_pos), targets)
        return loss_ta, loss_ta, None
    logits_f, logits_cf = twin_forward(model, batch)
    loss_ta = temporal_aware_loss(logits_f, targets)
    loss_ct = counterfactual_loss(logits_f, logits_cf, targets)
    return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


Loss = Callable[[TemporalLlama, Batch, float], tuple[Tensor, Tensor, Tensor | None]]


# ----------------------------------------------------------------------------------------------
# Tuning (Eq. 2 and 10; the paper gives AdamW and 1e-4, the rest is open: D5)


@dataclass(frozen=True)
class Tuning:
    """What the loop needs to know; support/options.py says where each default comes from."""

    lambda_ct: float
    lr: float
    batch_size: int
    steps: int
    warmup: int
    seed: int = 0
    micro_batch: int = 0        # rows at a time; 0: as many as fit
    recompute: bool = False     # are blocks recomputed, or compiled? Then more rows fit
    compiled: bool = False


def tuned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors Φ (Eq. 2); baselines may add some. All else is frozen: see add_lora."""
    return [p for p in model.parameters() if p.requires_grad]


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then linear decay to zero (D5). step counts from 1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / max(1, total - warmup), 1.0)


def batch_gradient(model: TemporalLlama, batch: Batch, rows: int, lambda_ct: float,
                   loss: Loss = cetrec_loss) -> tuple[Tensor, int]:
    """Put the gradient of the batch's loss into the factors, working on so many rows at a time.

    The losses are means over targets. A part of the batch counts by its share of the targets, so
    the gradients of the parts add up to that of the whole batch. If a part does not fit the memory,
    all of it is done again with parts half as large. Raises MemoryError if not even one row fits.
    Returns L, L_TA and, where two worlds were run, L_CT; and the rows that did fit.
    """
    while True:
        total, part, losses = torch.zeros((), device=device_of(model)), batch, None   # no old graph
        model.zero_grad()
        try:
            for part, share in processes.my_parts(batch, rows):
                losses = loss(model, part.to(device_of(model)), lambda_ct)
                (share * losses[0]).backward()
                total = total + share * torch.stack([x.detach() for x in losses if x is not None])
            return total, rows
        except torch.OutOfMemoryError as error:
            rows = machine.fewer_rows(len(part.tokens), str(error))


@torch.no_grad()
def validation_loss(model: TemporalLlama, tokenizer: Tokenizer, sequences: Sequences,
                    batch_size: int, loss: Loss = cetrec_loss) -> float:
    """L_TA per supervised token over the given sequences, dropout off.

    L_CT is left out, because only the factual world is used to recommend (§4.4).
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)         # of losses, and of targets
    for batch in tqdm(processes.my_share(batches(tokenizer, sequences, batch_size, [0])),
                      desc="validation", unit="batch", leave=False, disable=None):
        targets = int((batch.answers != IGNORE).sum())
        loss_ta = float(check_scores(loss(model, batch.to(device_of(model)), 0)[1]))
        total += torch.tensor([loss_ta * targets, targets], dtype=torch.float64)
    processes.all_reduce_sum([total])
    return float(total[0] / total[1])


def train(model: TemporalLlama, train_set: Sequences, valid_set: Sequences, tokenizer: Tokenizer,
          tuning: Tuning, folder: Path, settings: dict, loss: Loss = cetrec_loss) -> dict:
    """Tune the factors Φ by Eq. 10. Those of the best epoch, by validation L_TA, stay in the model.

    The folder gets log.jsonl, the best adapter with the settings it goes with, and a checkpoint. If
    it holds a checkpoint, tuning continues from there, to the same factors if as many rows are
    worked on at a time. Returns steps, validation losses and seconds. Raises ValueError for a
    gradient or a loss that is not finite.
    """
    factors = tuned_parameters(model)
    optimizer = torch.optim.AdamW(factors, lr=tuning.lr, weight_decay=0.0)
    state = progress.load_checkpoint(folder, optimizer)
    per_epoch, worlds = math.ceil(len(train_set) / tuning.batch_size), 1 + (tuning.lambda_ct > 0)
    most = tuning.micro_batch or tuning.batch_size      # rows at a time
    with progress.begin(folder, state, tuning.steps) as bar:
        for epoch in range(len(state.validation), math.ceil(tuning.steps / per_epoch)):
            if epoch and state.validation[-1] > min(state.validation):
                break                                   # the last epoch was no better (D5)

            model.train()
            steps = range(epoch * per_epoch + 1, tuning.steps + 1)
            for step, batch in zip(steps, batches(tokenizer, train_set, tuning.batch_size,
                                                  [tuning.seed, epoch])):
                if step <= state.step:
                    continue                            # it was made before an interruption
                lr = learning_rate(step, tuning.steps, tuning.lr, tuning.warmup)
                processes.seed_dropout(tuning.seed, step)
                rows = most if tuning.micro_batch else min(most, machine.rows_that_fit(
                    model.llama, batch, worlds, tuning.recompute, tuning.compiled))
                total, fitted = batch_gradient(model, batch, rows, tuning.lambda_ct, loss)
                most = fitted if fitted < rows else most
                processes.all_reduce_sum([p.grad for p in factors if p.grad is not None] + [total])

                norm = nn.utils.clip_grad_norm_(factors, 1.0)
                if not norm.isfinite():
                    raise ValueError(progress.not_finite(step, float(norm), batch, tokenizer))
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()

                state.step = step
                if progress.log_step(folder, bar, state, total, tuning.lambda_ct, lr):
                    progress.save_checkpoint(folder, optimizer, state)

            state.validation.append(
                validation_loss(model, tokenizer, valid_set, tuning.batch_size, loss))
            if progress.log_validation(folder, bar, state):         # the best so far
                state.best = [p.detach().clone() for p in factors]
                runs.save_adapter(model, folder, settings)
            progress.save_checkpoint(folder, optimizer, state)

    for p, best in zip(factors, state.best):
        p.data.copy_(best)
    return {"steps": state.step, "validation_ta": state.validation,
            "seconds": state.total_seconds()}


# ----------------------------------------------------------------------------------------------
# The command


def evaluate(inputs: runs.RunInputs, model: TemporalLlama,
             recommenders: dict[str, Recommender]) -> tuple[dict, dict]:
    """The result table with the effect of order, and arrays by test sequence."""
    model.eval()
    options, (train_set, valid_set, test_set) = inputs.options, inputs.splits
    test_set = test_set.sample(options.eval_sequences, options.seed)
    splits = train_set, valid_set.sample(500, options.seed), test_set
    results, arrays = result_table(recommenders, splits, inputs.synthetic, options.exclude_history)
    if model.kind != "none":
        log_p = answer_log_likelihood(model, inputs.tokenizer, processes.my_sequences(test_set))
        arrays["answers"] = processes.together(log_p)
        results["effect"] = mean_and_error(arrays["answers"][:, 0] - arrays["answers"][:, 1])
    return results, arrays


def tune_and_evaluate(inputs: runs.RunInputs, model: TemporalLlama,
                      recommenders: dict[str, Recommender], folder: Path,
                      loss: Loss = cetrec_loss) -> None:
    """Tune the factors, evaluate what they recommend, write and print it.

    A run folder with a checkpoint continues from there. Baselines have another loss.
    """
    options, (train_set, valid_set, _) = inputs.options, inputs.splits
    train_set = options.repeat_if_small(train_set)
    steps, warmup = options.schedule(len(train_set))
    compiled = machine.compile_pays(options, inputs.device, steps)
    machine.wrap_blocks(model.llama, options.recompute, compiled)
    if options.shard:
        processes.shard(model, inputs.device)
    print(f"tuning {sum(p.numel() for p in tuned_parameters(model)):,} parameters | temporal "
          f"{options.temporal} | λ = {options.lambda_ct:g} | at most {steps:,} steps"
          f"{' (--max-steps)' * (steps == options.max_steps)}, {warmup} of them warm-up")
    tuning = Tuning(options.lambda_ct, options.lr, options.batch_size, steps, warmup, options.seed,
                    options.micro_batch, options.recompute, compiled)
    with runs.at_work(folder):
        found = train(model, train_set, valid_set.sample(1_000, options.seed), inputs.tokenizer,
                      tuning, folder, inputs.record["settings"], loss)
        results, arrays = evaluate(inputs, model, recommenders)
        runs.finish(folder, inputs.record | {"tuning": found} | results, arrays, inputs.splits[2])
    print(f"its tables and figures: python -m experiments.report {str(folder)!r}")


def tune(inputs: runs.RunInputs, out: Path, folder: Path | None = None) -> Path:
    """Tune by Eq. 10 and evaluate, in a new folder below `out`, or on in an interrupted run's."""
    model = TemporalLlama(inputs.llama, inputs.options.temporal, inputs.options.sinpe_scale)
    runs.add_factors(model.llama, inputs.options)
    recommenders = make_recommenders(model, inputs.catalogue, inputs.options)
    folder = folder or runs.start(out, inputs.options.temporal, inputs)
    tune_and_evaluate(inputs, model, recommenders, folder)
    return folder


def open_tuned(folder: Path, flags: dict, command: str) -> tuple[runs.RunInputs, TemporalLlama]:
    """What a run worked on, and its tuned model, for the command that is named in messages."""
    inputs = runs.reopen(folder, flags, command)
    return inputs, tuned_model(folder, inputs.options, inputs.llama, inputs.record["settings"])


def tuned_model(folder: Path, options: Options, llama: Llama, settings: dict) -> TemporalLlama:
    """The base with the adapter in a run's folder, checked to be the one for these settings."""
    model = TemporalLlama(llama, options.temporal, options.sinpe_scale)
    runs.load_adapter(model, folder, settings)
    return model.eval()


def load_recommender(folder: str | Path, **flags) -> TitleRecommender:
    """A finished run for a live user, without its data set: titles in, ten titles with log p out.

        recommender = load_recommender("runs/ml-100k-rope-1")
        recommender(["Heat", "Toy Story"])          # oldest first -> [(title, log p), ..]

    flags: device, dtype, model or exclude_history, as the command has them. On a GPU, settings of
    PyTorch's are made for the whole process (machine.choose_kernels). Raises FileNotFoundError or
    ValueError if base, adapter, embedding and catalogue do not go together.
    """
    options, llama, catalogue, settings = runs.open_base(Path(folder), flags, "a recommender")
    model = tuned_model(Path(folder), options, llama, settings)
    return TitleRecommender(ExactTitles(model, catalogue, options.exclude_history))


def evaluate_again(folder: Path, flags: dict) -> None:
    """Evaluate the adapter in a run folder again. The result is written beside the run's own."""
    inputs, model = open_tuned(folder, flags, "--eval-only")
    if inputs.options.shard:
        processes.shard(model, inputs.device)
    recommenders = make_recommenders(model, inputs.catalogue, inputs.options)
    results, arrays = evaluate(inputs, model, recommenders)
    runs.finish(folder, inputs.record | results, arrays, inputs.splits[2], "eval")


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    flags = read_flags(argv)

    def work() -> None:
        """A new run, one that continues, or one that is evaluated again."""
        if "resume" in flags:
            folder = Path(flags.pop("resume"))
            tune(runs.reopen(folder, flags, "--resume"), folder.parent, folder)
        elif "eval_only" in flags:
            evaluate_again(Path(flags.pop("eval_only")), flags)
        else:
            out = Path(flags.pop("out", "runs"))
            tune(runs.open_inputs(Options.from_flags(flags), out), out)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
