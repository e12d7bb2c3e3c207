"""CETRec: temporal embeddings, two worlds, three losses, the loop, the command line (§4).

Paper: "Enhancing Temporal Sensitivity of Large Language Model for Recommendation with
Counterfactual Tuning". Read llama.py, lora.py and data.py before this file, evaluate.py after it.

    python cetrec.py                                            the synthetic world, no download
    python cetrec.py --data ml-100k --data-dir data             MovieLens 100K
    python cetrec.py --data movielens --model path/to/Llama-3   the paper's setting
    python cetrec.py --resume runs/movielens-rope-1             go on after an interruption
    python cetrec.py --eval-only runs/synthetic-rope-1          evaluate a finished run again
    python cetrec.py --explain runs/synthetic-rope-1 7          one test user in both worlds
    python cetrec.py --recommend runs/synthetic-rope-1 "Dusty Canyon" "Dusty Canyon 4"

Shapes: B batch, T tokens, C width, V vocabulary, M supervised positions, A places of a row.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm import tqdm

from data import (IGNORE, NO_ITEM, Batch, DataOptions, Sequences, Tokenizer, check_context, collate,
                  data_flags, data_options, encode_example, encode_examples, exit_status, load_data,
                  make_splits, show_prompt, tiny_tokenizer)
from datasets import FORMATS
from evaluate import Decoding, evaluate_order, format_result
from llama import KVCache, Llama, LlamaConfig, find_checkpoint, load_llama, save_llama
from lora import ALL_LINEAR, LoraConfig, add_lora, load_lora, lora_parameters, save_lora

# ----------------------------------------------------------------------------------------------
# Temporal embeddings (§4.2) and the counterfactual world (§4.3)


def sinusoidal(pos: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """p[2t] = sin(k / base^(2t/dim)), p[2t+1] = cos(same), k = pos.  Eq. 3.  (..) -> (.., dim)"""
    angles = _angles(pos, dim, base)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


def rotary(x: Tensor, pos: Tensor, base: float = 10_000.0) -> Tensor:
    """R_k x: the adjacent pair (2t, 2t+1) turns by k / base^(2t/dim), k = pos.  Eq. 4.

    (.., dim) and (..) -> (.., dim); dim even. Position 0 is the identity, bit for bit.
    """
    angles = _angles(pos, x.shape[-1], base)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _angles(pos: Tensor, dim: int, base: float) -> Tensor:
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=pos.device)
    return pos[..., None].float() * base ** (-pair / dim)


def erase_order(item_pos: Tensor) -> Tensor:
    """Put every item token at position 0 (D1); others stay NO_ITEM.  §4.3.  (B, T) -> (B, T)

    Positions are steps back or, by the clock, real numbers of at least 0.
    """
    return item_pos.clamp(max=0)


TEMPORAL = ("rope", "rope-attention", "sinpe", "none")


class TemporalLlama(nn.Module):
    """A Llama whose item tokens carry the position of their item on top of their own (Eq. 6).

    kind "rope": the token embedding of item k is rotated by R_k at the input (D2).
    "rope-attention":
    item tokens at t are rotated by R_(t+k) inside attention (Eq. 5). "sinpe": scale · p_k of Eq. 3
    is added to the token embedding (D8). "none": nothing, which is the plain Llama.
    """

    def __init__(self, llama: Llama, kind: str = "rope", scale: float = 1.0,
                 tokenizer: Tokenizer | None = None, index: str = "order"):
        super().__init__()
        if kind not in TEMPORAL:
            raise ValueError(f"temporal embedding {kind!r}; wanted one of {', '.join(TEMPORAL)}")
        self.llama, self.kind, self.scale = llama, kind, scale
        self.tokenizer, self.index = tokenizer, index

    def forward(self, tokens: Tensor, item_pos: Tensor, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.  (B, T), (B, T) -> (B, T, C)

        Of the places wanted (B, A) only, if given: -> (B, A, C).
        """
        tok_emb, positions = self.llama.embed(tokens), None
        k = item_pos.clamp(min=0)
        if self.kind == "rope":
            tok_emb = rotary(tok_emb, k)
        elif self.kind == "sinpe":
            temporal_emb = self.scale * sinusoidal(item_pos, tok_emb.shape[-1])
            tok_emb = tok_emb + (temporal_emb * (item_pos != NO_ITEM)[..., None]).to(tok_emb.dtype)
        elif self.kind == "rope-attention":
            positions = self.llama.positions(tokens.shape[1], cache, tokens.device) + k
        return self.llama(None, embeddings=tok_emb, positions=positions, cache=cache,
                          wanted=wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32"""
        return self.llama.logits(hidden)

    def fingerprint(self) -> dict:
        """What LoRA factors tuned in this model go with: temporal embedding and base."""
        scale = self.scale if self.kind == "sinpe" else 1.0
        return {"temporal": self.kind, "scale": scale, "index": self.index,
                "base": self.llama.fingerprint}


def twin_forward_clear(model: TemporalLlama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of both worlds at the supervised positions: same tokens, same weights, order erased.

    This is the definition; `twin_forward` is the same faster.  -> (M, V), (M, V) float32
    """
    supervised = batch.labels != IGNORE
    hidden_f = model(batch.tokens, batch.item_pos)                  # factual world, T = t
    hidden_cf = model(batch.tokens, erase_order(batch.item_pos))    # counterfactual, T = t*
    return tuple(model.logits(hidden[supervised]) for hidden in (hidden_f, hidden_cf))


def world_logits(model: TemporalLlama, batch: Batch, *worlds: Tensor) -> tuple[Tensor, ...]:
    """Logits at the supervised positions for each given item_pos (B, T).  -> (M, V) each, float32

    One pass for all worlds. What all rows have in common before the first item is run once; its
    keys and values carry gradients and serve every row of every world. The last block and the
    logits work where there is a target only.
    """
    prefix, cache = batch.prefix, KVCache()
    if prefix:
        model(batch.tokens[:1, :prefix], batch.item_pos[:1, :prefix], cache=cache)
    cache.read_only = True
    tokens, wanted = (x.repeat(len(worlds), 1) for x in (batch.tokens[:, prefix:],
                                                         batch.places - prefix))
    hidden = model(tokens, torch.cat(worlds)[:, prefix:], cache=cache, wanted=wanted)
    answers = torch.cat([world.flatten(0, 1)[batch.supervised]              # (B, A, C) -> (M, C)
                         for world in hidden.chunk(len(worlds))])
    return model.logits(answers).chunk(len(worlds))


def twin_forward(model: TemporalLlama, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits_f, logits_cf), factual and counterfactual world.  -> (M, V), (M, V) float32"""
    return world_logits(model, batch, batch.item_pos, erase_order(batch.item_pos))


# ----------------------------------------------------------------------------------------------
# Losses (§4.4). Targets (M,) are token ids; ce is the mean over supervised tokens


def temporal_aware_loss(logits_f: Tensor, targets: Tensor) -> Tensor:
    """L_TA = mean CE(f(x_t), y).  Eq. 9.  (M, V), (M,) -> scalar"""
    return F.cross_entropy(logits_f, targets)


def counterfactual_loss(logits_f: Tensor, logits_cf: Tensor, targets: Tensor) -> Tensor:
    """L_CT = mean CE(f(x_t) - f(x_0), y).  Eq. 8.  Gradients flow through both worlds.

    Where the worlds agree the effect is zero, the distribution uniform and the loss ln V.
    """
    effect = logits_f - logits_cf       # D3: difference of logits; §4.4 speaks of probabilities
    return F.cross_entropy(effect, targets)


def cetrec_loss(model: TemporalLlama, batch: Batch,
                lambda_ct: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L, L_TA, L_CT), L = L_TA + λ L_CT.  Eq. 10.  λ = 0 runs one world only: L_CT is None."""
    if lambda_ct == 0:
        loss_ta = temporal_aware_loss(*world_logits(model, batch, batch.item_pos), batch.targets)
        return loss_ta, loss_ta, None
    logits_f, logits_cf = twin_forward(model, batch)
    loss_ta = temporal_aware_loss(logits_f, batch.targets)
    loss_ct = counterfactual_loss(logits_f, logits_cf, batch.targets)
    return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


@torch.no_grad()
def answer_log_likelihood(model: TemporalLlama, sequences: Sequences,
                          batch_size: int = 64) -> np.ndarray:
    """log p of each answer with its EOS in the factual and the erased world; their difference is
    the effect of order on it, CE_T of Eq. 7.  -> (len(sequences), 2)
    """
    device, n = next(model.parameters()).device, len(sequences)
    examples = encode_examples(
        model.tokenizer, [sequences.words(sequences.history(i)) for i in range(n)],
        sequences.words(sequences.items[sequences.targets]), sequences.domain,
        [sequences.ages(i) for i in range(n)])
    order = sorted(range(n), key=lambda i: len(examples[i].tokens))
    out = np.zeros((n, 2))
    for chunk in tqdm([order[i:i + batch_size] for i in range(0, n, batch_size)],
                      desc="answers in both worlds", unit="batch", leave=False, disable=None):
        batch = collate([examples[i] for i in chunk], model.tokenizer.pad_id).to(device)
        rows = batch.supervised // batch.places.shape[1]
        for world, logits in enumerate(twin_forward(model, batch)):
            log_p = -F.cross_entropy(logits, batch.targets, reduction="none")
            total = torch.zeros(len(chunk), device=device).index_add_(0, rows, log_p)
            out[chunk, world] = total.cpu().numpy()
    return out


# ----------------------------------------------------------------------------------------------
# Adapters: peft's two files and temporal.json, which says what they were tuned for


def save_adapter(model: TemporalLlama, folder: Path, base: str | None = None) -> None:
    """Write factors and fingerprint; base is the name of the base, for peft."""
    save_lora(model, folder, base)
    write_json(folder / "temporal.json", model.fingerprint())


def load_adapter(model: TemporalLlama, folder: Path) -> None:
    """Add the folder's factors to the model they were tuned in.

    Raises FileNotFoundError or ValueError: files absent or damaged; another base or temporal
    embedding than this model's, both named. An adapter that peft made has none: see load_lora.
    """
    path = Path(folder) / "temporal.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a tuned adapter of ours has it")
    try:
        theirs, ours = json.loads(path.read_text(encoding="utf-8")), model.fingerprint()
        fields = [[f[key] for key in ours] for f in (theirs, ours)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an adapter ({error!r})") from None
    if fields[0] != fields[1]:
        tuned, here = (f"base {base}, temporal embedding {kind}, scale {scale}, index {index}"
                       for kind, scale, index, base in fields)
        raise ValueError(f"{path}: the adapter was tuned with {tuned}; this model has {here}. Give "
                         "it the base and the settings it was tuned with")
    load_lora(model, folder)


# ----------------------------------------------------------------------------------------------
# Batches, the loop


def batches(tokenizer: Tokenizer, sequences: Sequences, batch_size: int, rng: np.random.Generator,
            shuffle_histories: bool = False):
    """One epoch of batches in random order, tokenised as they are needed.

    32 batches are drawn together and sorted by length, so that rows of a batch are alike and little
    is padding; the order of the batches is random again. While they are worked on, a thread
    prepares the next 32.
    """
    order = rng.permutation(len(sequences))

    def prepare(start: int) -> list[Batch]:
        drawn = order[start:start + 32 * batch_size]
        histories = [sequences.history(i) for i in drawn]
        if shuffle_histories:
            histories = [rng.permutation(history) for history in histories]
        answers = sequences.words(sequences.items[sequences.targets[drawn]])
        examples = encode_examples(tokenizer, [sequences.words(history) for history in histories],
                                   answers, sequences.domain, [sequences.ages(i) for i in drawn])
        examples.sort(key=lambda example: len(example.tokens))
        groups = [examples[i:i + batch_size] for i in range(0, len(examples), batch_size)]
        return [collate(groups[g], tokenizer.pad_id) for g in rng.permutation(len(groups))]

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(prepare, 0)
        for start in range(0, len(order), 32 * batch_size):
            ready = waiting.result()
            waiting = thread.submit(prepare, start + 32 * batch_size)
            yield from ready


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then linear decay to zero (D5). step counts from 1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / max(1, total - warmup), 1.0)


def backward(model: TemporalLlama, batch: Batch, lambda_ct: float,
             rows: int = sys.maxsize) -> list[Tensor | None]:
    """Gradients of Eq. 10 for a batch, so many rows at a time: the sum over parts, each weighed by
    its share of the targets, is the whole's. Returns (L, L_TA, L_CT), detached.
    """
    device, parts = next(model.parameters()).device, []
    for part in batch.split(rows):
        share = len(part.targets) / len(batch.targets)
        losses = cetrec_loss(model, part.to(device), lambda_ct)
        (share * losses[0]).backward()
        parts.append([x if x is None else share * x.detach() for x in losses])
    return [None if x[0] is None else sum(x) for x in zip(*parts)]


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Clip the gradient's norm at 1, step at rate lr."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(model: TemporalLlama, sequences: Sequences, batch_size: int) -> float:
    """L_TA per supervised token over the given sequences, dropout off."""
    model.eval()
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in batches(model.tokenizer, sequences, batch_size, np.random.default_rng(0)):
        tokens = int((batch.labels != IGNORE).sum())
        total += float(cetrec_loss(model, batch.to(device), lambda_ct=0)[1]) * tokens
        count += tokens
    return total / count


def peak_memory(device: torch.device) -> float:
    """GB: peak allocated on a GPU, else the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024          # ru_maxrss: bytes on macOS, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, instead of giving it back to the system
    and asking for it again page by page. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)       # the largest value it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def train(model: TemporalLlama, train_set: Sequences, valid_set: Sequences, options: "Options",
          folder: Path) -> dict:
    """Tune the LoRA factors Φ by Eq. 10; the best epoch by validation L_TA stays in the model.

    Stops after one epoch without a better validation loss (D5). Writes log.jsonl, at each best
    epoch the adapter, and now and then a checkpoint into the folder; goes on from a checkpoint that
    is there, to the same factors as without a break. Returns the steps done and the validation
    losses.
    """
    rng, device = np.random.default_rng(options.seed), next(model.parameters()).device
    factors, best = lora_parameters(model), []
    optimizer = torch.optim.AdamW(factors, lr=options.lr, weight_decay=0.0)
    per_epoch = math.ceil(len(train_set) / options.batch_size)
    total = min(options.epochs * per_epoch, options.max_steps or math.inf)
    done = {"step": 0, "batch": 0, "losses": [], "seconds": 0.0, "waited": 0.0, "log": 0}
    if (folder / "checkpoint.safetensors").is_file():
        done, best = load_checkpoint(folder, optimizer, rng)
    step, losses, waited, pending = done["step"], done["losses"], done["waited"], []
    started = time.perf_counter() - done["seconds"]
    first = step            # of this sitting; speed counts from after it, as --compile warms up
    bar = tqdm(total=total, initial=step, desc="tuning", unit="step", disable=None, leave=False)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log, bar:
        log.truncate(done["log"])

        def save(batch: int, state: dict) -> None:
            log.flush()
            save_checkpoint(folder, optimizer, best, state, {
                "step": step, "batch": batch, "losses": losses, "waited": waited,
                "seconds": time.perf_counter() - started, "log": log.tell()})

        while step < total and (not losses or losses[-1] == min(losses)):
            model.train()
            begin, skip, done["batch"] = rng.bit_generator.state, done["batch"], 0
            epoch = batches(model.tokenizer, train_set, options.batch_size, rng)
            asked = since = saved = time.perf_counter()
            for number, batch in enumerate(itertools.islice(epoch, skip, None), start=skip + 1):
                # rate, both worlds, one loss; backward, clip, step
                step, waited = step + 1, waited + time.perf_counter() - asked
                lr = learning_rate(step, total, options.lr, options.warmup)
                pending.append((step, lr, *backward(model, batch, options.lambda_ct,
                                                    options.micro_batch or options.batch_size)))
                optimizer_step(optimizer, lr)

                # log, save; a GPU is waited for at printed steps only
                bar.update()
                now = time.perf_counter()
                if step == first + 1:
                    warm = now
                if step % max(1, total // 20) == 0 or step in (1, total) or now - saved > 300:
                    entry = write_steps(log, pending, since, folder)
                    since, pending = time.perf_counter(), []
                    left = None
                    if step > first + 1:
                        left = (since - warm) / (step - first - 1) * (total - step)
                    bar.write(log_line(entry, total, options.lambda_ct, peak_memory(device), left),
                              file=sys.stdout)
                    if step < total:
                        save(number, begin)
                        saved = time.perf_counter()
                if step == total:
                    break
                asked = time.perf_counter()

            # validate, save
            if pending:
                write_steps(log, pending, since, folder)
                pending = []
            losses.append(validation_loss(model, valid_set, options.batch_size))
            better = losses[-1] == min(losses)
            log.write(json.dumps({"step": step, "validation_ta": losses[-1]}) + "\n")
            bar.write(f"epoch {len(losses)} | validation ta {losses[-1]:.4f}"
                      f"{' | best so far, adapter saved' if better else ''}", file=sys.stdout)
            if better:
                save_adapter(model, folder, None if options.model == "tiny" else options.model)
                best = [p.detach().clone() for p in factors]
            save(0, rng.bit_generator.state)
    for p, value in zip(factors, best):
        p.data.copy_(value)
    model.eval()
    seconds = time.perf_counter() - started
    return {"steps": step, "validation_ta": losses, "seconds": seconds,
            "share_waiting_for_data": waited / seconds}


def save_checkpoint(folder: Path, optimizer: torch.optim.Optimizer, best: list[Tensor],
                    sampling: dict, done: dict) -> None:
    """Write checkpoint.safetensors, whole or not at all: factors, moments, the best epoch's
    factors, random states, what is done. sampling is the batches' random state when their epoch
    began.
    """
    tensors = {f"best/{i}": x for i, x in enumerate(best)} | {"random/cpu": torch.get_rng_state()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        kept = optimizer.state[p]
        tensors |= {f"factor/{i}": p.detach(), f"mean/{i}": kept["exp_avg"],
                    f"square/{i}": kept["exp_avg_sq"]}
    if (kind := p.device.type) != "cpu":
        tensors[f"random/{kind}"] = torch.get_device_module(kind).get_rng_state()
    path = folder / "checkpoint.safetensors"
    part = path.with_name(path.name + ".part")
    save_file({name: x.numpy(force=True) for name, x in tensors.items()}, part,
              {"sampling": json.dumps(sampling), "done": json.dumps(done)})
    os.replace(part, path)


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer,
                    rng: np.random.Generator) -> tuple[dict, list[Tensor]]:
    """Put everything where it was when the checkpoint was written. Returns what was done and the
    best epoch's factors. Raises ValueError for a damaged file or one of other factors.
    """
    path = folder / "checkpoint.safetensors"
    factors = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        done = json.loads(notes["done"])
        for i, p in enumerate(factors):
            p.data.copy_(tensors[f"factor/{i}"])
            optimizer.state[p] = {"step": torch.tensor(float(done["step"])),
                                  "exp_avg": tensors[f"mean/{i}"].to(p.device),
                                  "exp_avg_sq": tensors[f"square/{i}"].to(p.device)}
        for name, state in tensors.items():
            if name.startswith("random/"):
                kind = name.removeprefix("random/")
                module = torch if kind == "cpu" else torch.get_device_module(kind)
                module.set_rng_state(state)
        rng.bit_generator.state = json.loads(notes["sampling"])
        best = [tensors[f"best/{i}"].to(p.device) for i, p in enumerate(factors) if done["losses"]]
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or of other settings ({error}). Delete it to tune from "
                         "the first step") from None
    return done, best


def write_steps(log, pending: list[tuple], since: float, folder: Path) -> dict:
    """A line of log.jsonl for each (step, rate, L, L_TA, L_CT or None); ms is their mean, with the
    wait for data, since then. Returns the last. Raises ValueError for a loss that is not finite.
    """
    values = [[None if x is None else float(x) for x in losses] for _, _, *losses in pending]
    ms = 1000 * (time.perf_counter() - since) / len(pending)
    for (step, lr, *_), (loss, ta, ct) in zip(pending, values):
        entry = {"step": step, "loss": loss, "loss_ta": ta, "loss_ct": ct, "lr": lr, "ms": ms}
        log.write(json.dumps(entry) + "\n")
        if not math.isfinite(loss):
            raise ValueError(f"loss is {loss} at step {step}; try a smaller --lr or --lambda-ct. "
                             f"The best adapter, if any, is in {folder}")
    return entry


def log_line(entry: dict, total: int, lambda_ct: float, memory: float, left: float | None) -> str:
    """One step in fixed columns; loss per token, rate, ms a step, peak GB, minutes left if known.
    """
    ct = "" if entry["loss_ct"] is None else f" + {lambda_ct:g} x ct {entry['loss_ct']:.3f}"
    return (f"step {entry['step']:>5}/{total} | loss {entry['loss']:.3f} = ta "
            f"{entry['loss_ta']:.3f}{ct} | lr {entry['lr']:.1e} | {entry['ms']:.0f} ms | "
            f"{memory:.1f} GB | {'?' if left is None else f'{left / 60:.1f}'} min left")


# ----------------------------------------------------------------------------------------------
# The embedded base: a small Llama that knows titles and what goes with what, but no order


@dataclass(frozen=True)
class TinyBase:
    """How `--model tiny` is made; the numbers were chosen on validation splits."""

    vocab_size: int = 8192          # most titles are one token: five beams are then the top five
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.3
    epochs: int = 2
    max_sequences: int = 400_000    # the epochs end here on large data sets


TINY_BASES = {      # data sets that are not named here take TinyBase()
    "synthetic": TinyBase(vocab_size=768, hidden_size=64, intermediate_size=192, lr=3e-3,
                          weight_decay=0.1, epochs=6)}


def title_labels(batch: Batch) -> Batch:
    """Supervise every title token of the history too: ten times the signal of the answer alone."""
    labels, in_title = batch.labels.clone(), batch.item_pos[:, 1:] != NO_ITEM
    labels[:, :-1][in_title] = batch.tokens[:, 1:][in_title]
    return Batch(batch.tokens, batch.item_pos, labels, max(0, batch.prefix - 1))


def tiny_base(root: Path, train_set: Sequences, seed: int, device: torch.device,
              recipe: TinyBase) -> Path:
    """The checkpoint folder of the embedded base, made on first use and kept.

    Trained from scratch on the training split with every history shuffled: whatever order
    sensitivity shows up later was learned in tuning. The folder's name is a digest of all it was
    made from.
    """
    titles = train_set.titles
    source = hashlib.sha256(json.dumps([asdict(recipe), train_set.domain, seed, titles]).encode())
    for array in (train_set.items, train_set.starts, train_set.targets):
        source.update(array.tobytes())
    folder = root / f"tiny-{source.hexdigest()[:12]}"
    if (folder / "config.json").is_file():                  # written last
        return folder
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    counts = np.bincount(train_set.items[train_set.targets], minlength=len(titles))
    tokenizer = tiny_tokenizer(titles, counts, train_set.domain, recipe.vocab_size)
    heads = recipe.num_attention_heads
    llama = Llama(LlamaConfig(
        vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size, num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=recipe.hidden_size // heads,
        rope_theta=10_000.0, max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True))
    model = TemporalLlama(llama.to(device), "none", tokenizer=tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98),
                                  weight_decay=recipe.weight_decay)
    sequences = min(recipe.epochs * len(train_set), recipe.max_sequences)
    total, step, started = math.ceil(sequences / recipe.batch_size), 0, time.perf_counter()
    with tqdm(total=total, desc="tiny base", unit="step", disable=None, leave=False) as bar:
        while step < total:
            for batch in batches(tokenizer, train_set, recipe.batch_size, rng, True):
                step += 1
                loss, _, _ = backward(model, title_labels(batch), lambda_ct=0)
                optimizer_step(optimizer, learning_rate(step, total, recipe.lr, recipe.warmup))
                bar.update()
                if step % max(1, total // 10) == 0:
                    left = (time.perf_counter() - started) / step * (total - step) / 60
                    bar.write(f"tiny base step {step:>5}/{total} | loss {loss.item():.3f} per "
                              f"title token | {left:.1f} min left", file=sys.stdout)
                if step == total:
                    break
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": False})
    save_llama(llama, folder)
    return folder


def write_json(path: Path, value) -> None:
    """Write a JSON file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------
# Command line

# The paper gives AdamW and 1e-4; the rest is BIGRec's and CFT's (D5, D10).
PUBLISHED = {"lr": 1e-4, "batch_size": 64, "epochs": 3, "warmup": 20, "lora_rank": 8,
             "lora_alpha": 16.0, "lora_dropout": 0.05, "lora_targets": ("q_proj", "v_proj"),
             "length_penalty": 1.0}
# A base this small needs a larger rate and more factors; chosen on validation splits.
TINY = PUBLISHED | {"lr": 3e-3, "batch_size": 128, "epochs": 1, "warmup": 50, "lora_rank": 16,
                    "lora_alpha": 32.0, "lora_targets": ALL_LINEAR, "length_penalty": 0.0}
TINY_SYNTHETIC = TINY | {"lr": 4e-3, "batch_size": 64, "epochs": 3}


def preset(model: str, data: str) -> dict:
    """Default settings of tuning and decoding for a base and a data set."""
    if model != "tiny":
        return PUBLISHED
    return TINY_SYNTHETIC if data == "synthetic" else TINY


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Everything a run depends on, as given or by default; written to run.json."""

    model: str
    temporal: str
    lambda_ct: float
    sinpe_scale: float
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: tuple[str, ...]
    lr: float
    batch_size: int
    epochs: int
    warmup: int
    max_steps: int
    micro_batch: int
    recompute: bool
    compile: bool
    decode: str
    beams: int
    length_penalty: float
    ground_with: str
    ground_list: str
    exclude_history: bool
    eval_sequences: int
    device: str
    dtype: str

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("lambda_ct", 0), ("sinpe_scale", 0), ("lr", 0), ("batch_size", 1),
                          ("epochs", 1), ("warmup", 0), ("max_steps", 0),
                          ("micro_batch", 0), ("beams", 1), ("length_penalty", 0),
                          ("eval_sequences", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; wanted a "
                                 f"finite number of at least {low}")
        LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)
        self.decoding()

    def decoding(self) -> Decoding:
        """The flags of the same names."""
        return Decoding(self.decode, self.beams, self.length_penalty, self.exclude_history,
                        self.ground_with, self.ground_list)


def parser() -> argparse.ArgumentParser:
    """Every flag with unit, equation and default; a flag not given is None until fill_in."""
    ap = argparse.ArgumentParser(
        prog="cetrec.py", allow_abbrev=False,
        description="CETRec: tune a Llama so that the order of a history counts, then measure it.")
    group = None

    def flag(name: str, text: str, default=None, **rest) -> None:
        if default is None:
            key = name[2:].replace("-", "_")
            default = f"{PUBLISHED[key]}"
            if TINY[key] != PUBLISHED[key]:
                default += f"; with the tiny base {TINY[key]}"
            if TINY_SYNTHETIC[key] != TINY[key]:
                default += f", on synthetic {TINY_SYNTHETIC[key]}"
        group.add_argument(name, help=f"{text} (default: {default})", **rest)

    group = ap.add_argument_group("data")
    data_flags(flag)

    group = ap.add_argument_group("model")
    flag("--model", "tiny: a small Llama trained here on shuffled histories; or a folder with "
         "config.json, safetensors and tokenizer.json; or a repository on the Hugging Face Hub, "
         "such as meta-llama/Llama-3.2-1B, fetched once", "tiny", metavar="tiny|FOLDER|HUB_NAME")
    flag("--temporal", "temporal embedding of item tokens: rope rotates their input embedding "
         "(Eq. 4, D2), rope-attention turns them by t + k inside attention (Eq. 5), sinpe is added "
         "(Eq. 3), none leaves BIGRec and forces --lambda-ct 0", "rope", choices=TEMPORAL)
    flag("--sinpe-scale", "factor on p_k of Eq. 3, with --temporal sinpe only (D8)",
         "1, as the paper writes it", type=float, metavar="X")
    flag("--lora-rank", "rank of the factors", type=int, metavar="R")
    flag("--lora-alpha", "the factors' product is scaled by α/R", type=float, metavar="α")
    flag("--lora-dropout", "probability of dropout on the factors' input", type=float, metavar="P")
    flag("--lora-targets", "comma-separated linear maps, or all-linear", "q_proj,v_proj; with the "
         "tiny base all-linear", metavar="NAMES")

    group = ap.add_argument_group("tuning")
    flag("--lambda-ct", "weight of L_CT, Eq. 10; 0 is the paper's w.o. CT. The paper tries 0.01, "
         "0.1, 0.5, 1 and 10 and names no winner", "0.1", type=float, metavar="λ")
    flag("--lr", "peak rate of AdamW; the paper: 1e-4", type=float)
    flag("--batch-size", "sequences a step", type=int, metavar="N")
    flag("--epochs", "at most; tuning stops after one without a better validation L_TA", type=int,
         metavar="N")
    flag("--warmup", "steps of linear warm-up, then linear decay", type=int, metavar="N")
    flag("--max-steps", "stop tuning after N steps; 0 = no limit", "0", type=int, metavar="N")
    flag("--micro-batch", "rows of a batch worked on at a time, with the same gradient in less "
         "memory; 0 = all", "0", type=int, metavar="N")
    flag("--compile", "let torch.compile make kernels for the blocks; the first steps take up to "
         "minutes, and CPUs want a C++ compiler", "no",
         action=argparse.BooleanOptionalAction)
    flag("--resume", "go on with the interrupted run in this folder from its last checkpoint; goes "
         "with --data-dir, --device, and --model where the base has moved", "a new run",
         metavar="RUN")
    flag("--recompute", "run each block again in the backward pass instead of keeping its "
         "activations: less memory, about 40 %% more time", "no",
         action=argparse.BooleanOptionalAction)

    group = ap.add_argument_group("evaluation")
    flag("--eval-sequences", "seeded sample of the test split; 0 = all", "1000", type=int,
         metavar="N")
    flag("--decode", "beams: free text, grounded in the catalogue (§5.1.4); beyond the paper, "
         "trie: beams on the catalogue's titles, ranked by log-probability; exact: the "
         "log-probability of every title", "beams; exact with --recommend and --explain",
         choices=["beams", "trie", "exact"])
    flag("--beams", "beams of generation, §5.1.4", "5; 10 with --decode trie", type=int,
         metavar="W")
    flag("--length-penalty", "a beam's score is its summed log-probability over its number of "
         "tokens to this power: 1 as in CFT favours long titles, 0 does not (D10)", type=float,
         metavar="P")
    flag("--ground-with", "weights that embed texts and titles: tuned, as CFT, or base, without "
         "the factors, as BIGRec (D11)", "tuned", choices=["tuned", "base"])
    flag("--ground-list", "merged: the beams' neighbours in turn, as CFT; single: those of the "
         "best beam, as BIGRec (D7)", "merged", choices=["merged", "single"])
    flag("--exclude-history", "leave items of the history out of the ranking, §5.1.2", "yes",
         action=argparse.BooleanOptionalAction)
    flag("--eval-only", "evaluate the adapter in this run folder again, on its own data and base; "
         "goes with the flags of this group, --data-dir, --device, --dtype, and --model where the "
         "base has moved", "tune first", metavar="RUN")

    group = ap.add_argument_group("look (instead of a run)")
    flag("--recommend", "ten titles with their probabilities in both worlds, for a history given "
         "oldest first; near matches will do. WHERE is a run; or an adapter, with --model and "
         "--data; or a base, with --data", "off", nargs="+", metavar=("WHERE", "TITLE"))
    flag("--explain", "test sequence N of a run, counted from 0: the prompt, the worlds token by "
         "token, both losses, the top five", "off, N 0", nargs="+", metavar=("RUN", "N"))

    group = ap.add_argument_group("run")
    flag("--device", "auto takes cuda, then mps, then cpu", "auto",
         choices=["auto", "cpu", "cuda", "mps"])
    flag("--dtype", "of the frozen weights; factors, logits and losses are float32. auto: on cuda "
         "bfloat16, or float16 where the card has no bfloat16; else float32. stored: as in the "
         "files", "auto", choices=["auto", "stored", "float32", "bfloat16", "float16"])
    flag("--out", "folder for run folders and tiny bases", "runs", metavar="DIR")
    return ap


DECODING = {"decode", "beams", "length_penalty", "ground_with", "ground_list", "exclude_history"}


def check_decoding(given: dict, decode: str) -> dict:
    """The flags given, with the number of beams that goes with --decode. Raises on contradictions.
    """
    for name in ("beams", "length_penalty", "ground_with", "ground_list"):
        takes = ("beams", "trie") if name == "beams" else ("beams",)
        if name in given and decode not in takes:
            raise ValueError(f"--{name.replace('_', '-')} goes with --decode {' or '.join(takes)}; "
                             f"with {decode} drop it")
    return {"beams": 10 if decode == "trie" else 5} | given


def fill_in(given: dict) -> Options:
    """Options from the flags given and the preset of the base. Raises on contradictions."""
    data = data_options(given)
    if "sinpe_scale" in given and given.get("temporal") != "sinpe":
        raise ValueError("--sinpe-scale goes with --temporal sinpe only; drop one or add the other")
    if "lora_targets" in given:
        names = given["lora_targets"]
        given["lora_targets"] = ALL_LINEAR if names == "all-linear" else tuple(names.split(","))
    if given.get("temporal") == "none":
        if given.get("lambda_ct"):
            print("--temporal none leaves one world only: λ is 0 in this run (w.o. Both = BIGRec)")
        given["lambda_ct"] = 0.0
    defaults = {"model": "tiny", "temporal": "rope", "lambda_ct": 0.1, "sinpe_scale": 1.0,
                "max_steps": 0, "micro_batch": 0, "recompute": False, "compile": False,
                "decode": "beams", "ground_with": "tuned", "ground_list": "merged",
                "exclude_history": True, "eval_sequences": 1_000, "device": "auto",
                "dtype": "auto"}
    given = check_decoding(given, given.get("decode", "beams"))
    return Options(**(data | defaults | preset(given.get("model", "tiny"), data["data"]) | given))


def read_run(run_folder: Path, given: dict, flag: str = "--eval-only") -> tuple[Options, Path]:
    """Options of a run, with the flags that may differ from it, and the folder of its base."""
    allowed = {"data_dir", "device", "model"}
    if flag != "--resume":
        allowed |= DECODING | {"eval_sequences", "dtype"}
    if extra := sorted(given.keys() - allowed):
        names = ", ".join("--" + name.replace("_", "-") for name in extra)
        raise ValueError(f"{flag} takes data, base and tuning from the run; it does not go with "
                         f"{names}")
    record = run_folder / "run.json"
    if not record.is_file():
        raise FileNotFoundError(f"{record}: not found; {flag} wants the folder of a run")
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
        tuned = saved["options"] | {"lora_targets": tuple(saved["options"]["lora_targets"])}
        base, model = Path(saved["base"]), tuned["model"]
        decode = tuned["decode"]
        ended = "metrics" in saved
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record}: not the record of a run of this version ({error!r})") from None
    if flag == "--resume" and ended:
        raise ValueError(f"{run_folder}: this run is complete; --eval-only evaluates it again")
    if given.get("decode", decode) != decode:           # what was given for the other way is void
        tuned |= {"beams": 5, "ground_with": "tuned", "ground_list": "merged"}
        given = check_decoding(given, given["decode"])
    else:
        check_decoding(given, decode)
    if "data_dir" in given and tuned["data"] not in FORMATS:
        raise ValueError("--data-dir goes with a public data set; this run's data are "
                         f"{tuned['data']}")
    base = run_folder.parent / base if model == "tiny" else base    # it lies beside its runs
    if "model" in given or not base.exists() and model != "tiny":
        base = find_checkpoint(given.get("model", model))
    try:
        return Options(**(tuned | given | {"model": model})), base
    except TypeError as error:
        raise ValueError(f"{record}: not the record of a run of this version ({error})") from None


def choose_device(options: Options) -> tuple[torch.device, torch.dtype | None]:
    """The device and the precision of the frozen weights; None keeps the stored one."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    kind = options.device
    if kind == "auto":
        kind = next(name for name, available in here.items() if available)
    if not here[kind]:
        raise ValueError(f"--device {kind}: this PyTorch sees no such device; use --device auto")
    name = options.dtype
    if name == "auto" and kind == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    elif name == "auto":
        name = "float32"
    return torch.device(kind), None if name == "stored" else getattr(torch, name)


def check_writable(out: Path) -> None:
    """Raise ValueError if nothing can be written below `out`, before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        raise ValueError(f"{out}: cannot write there ({error.strerror}); choose another folder "
                         "with --out") from None


def new_folder(out: Path, name: str) -> Path:
    """out/name-1, or the next number that is free."""
    number = 1
    while (folder := out / f"{name}-{number}").exists():
        number += 1
    folder.mkdir()
    return folder


def open_model(options: Options, source: Path, adapter: Path | None = None,
               fits: tuple[Sequences, ...] = ()) -> TemporalLlama:
    """The base and, if given, its adapter, for evaluation; says what it read.

    Raises ValueError, before weights are read, if a prompt of `fits` is longer than the context.
    """
    device, dtype = choose_device(options)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    print(f"device {device}{threads} | frozen weights "
          f"{'as stored' if dtype is None else str(dtype).removeprefix('torch.')} | "
          f"torch {torch.__version__}")
    config, tokenizer = LlamaConfig.from_folder(source), Tokenizer.from_folder(source)
    for part in fits:
        check_context(tokenizer, part, config.max_position_embeddings)
    started = time.perf_counter()
    llama = load_llama(source, device, dtype)
    llama.recompute = options.recompute
    if options.compile:
        llama.compile_blocks()
    first = tokenizer.bpe.encode("The").ids[0]
    bos = f"begin with BOS {first}" if first == tokenizer.bos_id else "have no BOS"
    print(f"base {source} | fingerprint {llama.fingerprint} | {config.vocab_size:,} tokens, "
          f"prompts {bos} | read in {time.perf_counter() - started:.1f} s")
    model = TemporalLlama(llama, options.temporal, options.sinpe_scale, tokenizer, options.index)
    if adapter:
        load_adapter(model, adapter)
    return model.eval()


def run(options: Options, out: Path, folder: Path | None = None, base: Path | None = None,
        tune: bool = True) -> None:
    """One run from data to report. With the folder of a run and its base: go on with that run, or
    evaluate its adapter only.
    """
    check_writable(folder or out)
    device, _ = choose_device(options)
    interactions, world = load_data(options)
    (train_set, valid_set, test_set), record = make_splits(interactions, options)

    # base and adapter
    if base is None and options.model == "tiny":
        base = tiny_base(out, train_set, options.seed, device,
                         TINY_BASES.get(options.data, TinyBase()))
    source = base or find_checkpoint(options.model)
    model = open_model(options, source, None if tune else folder, (train_set, valid_set, test_set))
    torch.manual_seed(options.seed)
    if tune:
        add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout,
                 options.lora_targets)
    trainable = sum(p.numel() for p in lora_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    print(f"parameters | {trainable:,} trainable of {total:,} ({100 * trainable / total:.1f} %) | "
          f"temporal {options.temporal} | λ = {options.lambda_ct:g}")
    example = encode_example(model.tokenizer, train_set.words(train_set.history(0)),
                             train_set.titles[train_set.target(0)], train_set.domain,
                             train_set.ages(0))
    print(f"a training prompt, each item ⟨marked⟩ with its index k\n{'-' * 80}\n"
          f"{show_prompt(model.tokenizer, example)}\n{'-' * 80}")

    # tune
    name = source.name if options.model == "tiny" else str(source)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "tokenizers": tokenizers.__version__}
    record |= {"options": asdict(options), "base": name, "fingerprint": model.fingerprint(),
               "versions": versions}
    if folder is None:
        data_name = Path(options.data).resolve().name   # of a folder: without where it lies
        folder = new_folder(out, f"{data_name}-{options.temporal}")
        write_json(folder / "run.json", record)
    elif tune:
        check_same(folder, record)
    try:
        if tune:
            record["tuning"] = train(model, train_set, sample(valid_set, 1_000, options.seed),
                                     options, folder)
        test_set = sample(test_set, options.eval_sequences, options.seed)
        record["metrics"] = evaluate(model, train_set, test_set, world, options, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with --resume {folder}" if tune else "") from None
    write_json(folder / ("run.json" if tune else "eval.json"), record)
    if tune:
        (folder / "checkpoint.safetensors").unlink()
    print(format_result(record["metrics"]))
    from experiments.report import Run, write_report
    print(write_report([Run.from_folder(folder)], folder))


def evaluate(model: TemporalLlama, train_set: Sequences, test_set: Sequences, world,
             options: Options, folder: Path) -> dict:
    """Measure the tuned model; ranks, lists and pictures go to files in the folder. -> metrics"""
    worlds = None if options.temporal == "none" else answer_log_likelihood(model, test_set)
    metrics, arrays = evaluate_order(model, train_set, test_set, world, options.decoding(), worlds)
    history = test_set.history(0)
    arrays |= temporal_picture(model, test_set.ages(0), len(history))
    write_json(folder / "catalogue.json", {"domain": test_set.domain, "titles": test_set.titles})
    return metrics | {"vocabulary": model.llama.config.vocab_size,
                      "history_titles": test_set.words(history),
                      "arrays": save_arrays(arrays, folder / "evaluation.safetensors")}


def check_same(folder: Path, record: dict) -> None:
    """Raise ValueError if data or base are not what they were when the run in the folder began."""
    saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    here = json.loads(json.dumps(record))
    for key in saved.keys() - {"options", "base", "versions"}:
        was, now = saved[key], here.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):     # what differs, only
            was, now = ({k: v for k, v in one.items() if v != other.get(k)}
                        for one, other in ((was, now), (now, was)))
        raise ValueError(f"{folder}: {key} of the run, {was}, is now {now}; the run can go on with "
                         "the data and the base it began with only")


def temporal_picture(model: TemporalLlama, ages, items: int) -> dict[str, np.ndarray]:
    """What distinguishes the worlds, for the items of one history, oldest first: p_k of Eq. 3 with
    its scale, or cos and sin of the angles R_k of Eq. 4 turns by, laid out alike.
    """
    if model.kind == "none":
        return {}
    k = torch.arange(items - 1, -1, -1) if ages is None else torch.as_tensor(ages)
    llama = model.llama.config
    width = llama.head_dim if model.kind == "rope-attention" else llama.hidden_size
    scale = model.scale if model.kind == "sinpe" else 1.0
    worlds = {"factual": k, "erased": erase_order(k)}
    return {"temporal/k": k.float().numpy()} | {
        f"temporal/{name}": (scale * sinusoidal(pos, width)).float().numpy()
        for name, pos in worlds.items()}


def save_arrays(arrays: dict[str, np.ndarray], path: Path) -> str:
    """Write a safetensors file that is either whole or not there. Returns its SHA-256."""
    part = path.with_name(path.name + ".part")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)
    os.replace(part, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sample(sequences: Sequences, n: int, seed: int) -> Sequences:
    """n sequences drawn without replacement, in their order; all of them for n = 0."""
    if not 0 < n < len(sequences):
        return sequences
    drawn = np.random.default_rng([seed, 4]).choice(len(sequences), n, replace=False)
    return sequences.select(np.sort(drawn))


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    given = {name: value for name, value in vars(parser().parse_args(argv)).items()
             if value is not None}

    def work() -> None:
        keep_freed_memory()
        modes = [m for m in ("resume", "eval_only", "recommend", "explain") if m in given]
        if len(modes) > 1:
            raise ValueError(f"{' and '.join('--' + m.replace('_', '-') for m in modes)}: one at a "
                             "time")
        if "recommend" in given:
            from experiments.look import recommend
            where, *titles = given.pop("recommend")
            recommend(where, titles, given)
        elif "explain" in given:
            from experiments.look import explain
            folder, *number = given.pop("explain")
            if len(number) > 1:
                raise ValueError(f"--explain takes RUN and N; got {len(number) - 1} more")
            explain(Path(folder), *(number or ["0"]), given)
        elif "eval_only" in given:
            folder = Path(given.pop("eval_only"))
            options, base = read_run(folder, given)
            run(options, folder.parent, folder, base, tune=False)
        elif "resume" in given:
            folder = Path(given.pop("resume"))
            options, base = read_run(folder, given, "--resume")
            run(options, folder.parent, folder, base)
        else:
            out = Path(given.pop("out", "runs"))
            run(fill_in(given), out)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
