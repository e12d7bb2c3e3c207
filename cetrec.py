"""CETRec: temporal embeddings, two worlds, three losses, the loop, the command line (§4).

Paper: "Enhancing Temporal Sensitivity of Large Language Model for Recommendation with Counterfactual
Tuning". Read llama.py, lora.py and data.py before this file, evaluate.py after it.

    python cetrec.py                                            the synthetic world, nothing to download
    python cetrec.py --data ml-100k --data-dir data             MovieLens 100K
    python cetrec.py --data movielens --model path/to/Llama-3   the paper's setting
    python cetrec.py --eval-only runs/synthetic-rope-1          evaluate a finished run again

Shapes: B batch, T tokens, C width, V vocabulary, M supervised positions.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (DOMAINS, FORMATS, IGNORE, NO_ITEM, TABLE_2, Batch, Sequences, SyntheticWorld,
                  Tokenizer, build_prompt, collate, encode_examples, load_interactions,
                  make_sequences, show_prompt, split_by_time)
from evaluate import (CountingFloors, format_table, list_ranks, oracle_metrics, recommend,
                      relative_change, score_ranks, summarise)
from llama import KVCache, Llama, LlamaConfig, load_llama, save_llama
from lora import ALL_LINEAR, add_lora, load_lora, lora_parameters, save_lora

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
    """Put every item token at position 0 (D1); others stay NO_ITEM.  §4.3.  (B, T) -> (B, T)"""
    return item_pos.clamp(max=0)


TEMPORAL = ("rope", "rope-attention", "sinpe", "none")


class TemporalLlama(nn.Module):
    """A Llama whose item tokens carry the position of their item on top of their own (Eq. 6).

    kind "rope": the token embedding of item k is rotated by R_k at the input (D2). "rope-attention":
    item tokens at t are rotated by R_(t+k) inside attention (Eq. 5). "sinpe": scale · p_k of Eq. 3 is
    added to the token embedding (D8). "none": nothing, which is the plain Llama.
    """

    def __init__(self, llama: Llama, kind: str = "rope", scale: float = 1.0,
                 tokenizer: Tokenizer | None = None):
        super().__init__()
        if kind not in TEMPORAL:
            raise ValueError(f"temporal embedding {kind!r}; wanted one of {', '.join(TEMPORAL)}")
        self.llama, self.kind, self.scale, self.tokenizer = llama, kind, scale, tokenizer

    def forward(self, tokens: Tensor, item_pos: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm.  (B, T), (B, T) -> (B, T, C)"""
        tok_emb, positions = self.llama.embed(tokens), None
        k = item_pos.clamp(min=0)
        if self.kind == "rope":
            tok_emb = rotary(tok_emb, k)
        elif self.kind == "sinpe":
            temporal_emb = self.scale * sinusoidal(item_pos, tok_emb.shape[-1])
            tok_emb = tok_emb + (temporal_emb * (item_pos != NO_ITEM)[..., None]).to(tok_emb.dtype)
        elif self.kind == "rope-attention":
            positions = self.llama.positions(tokens.shape[1], cache, tokens.device) + k
        return self.llama(None, embeddings=tok_emb, positions=positions, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)"""
        return self.llama.logits(hidden)


def twin_forward_clear(model: TemporalLlama, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of both worlds at the supervised positions: same tokens, same weights, order erased.

    This is the definition; `twin_forward` is the same faster.  -> (M, V), (M, V) float32
    """
    supervised = batch.labels != IGNORE
    hidden_f = model(batch.tokens, batch.item_pos)                      # factual world, T = t
    hidden_cf = model(batch.tokens, erase_order(batch.item_pos))        # counterfactual world, T = t*
    return tuple(model.logits(hidden[supervised]).float() for hidden in (hidden_f, hidden_cf))


def world_logits(model: TemporalLlama, batch: Batch, *worlds: Tensor) -> tuple[Tensor, ...]:
    """Logits at the supervised positions for each given item_pos (B, T).  -> (M, V) each, float32

    One pass for all worlds. What all rows have in common before the first item is run once; its keys
    and values carry gradients and serve every row of every world.
    """
    prefix, cache = batch.prefix, KVCache()
    if prefix:
        model(batch.tokens[:1, :prefix], batch.item_pos[:1, :prefix], cache=cache)
    tokens = batch.tokens[:, prefix:].repeat(len(worlds), 1)
    hidden = model(tokens, torch.cat(worlds)[:, prefix:], cache=cache)
    supervised = batch.labels[:, prefix:] != IGNORE
    return tuple(model.logits(world[supervised]).float() for world in hidden.chunk(len(worlds)))


def twin_forward(model: TemporalLlama, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits_f, logits_cf) of the factual and the counterfactual world.  -> (M, V), (M, V) float32"""
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
    """(L, L_TA, L_CT) with L = L_TA + λ L_CT.  Eq. 10.  λ = 0 runs one world only; L_CT is then None."""
    targets = batch.labels[batch.labels != IGNORE]
    if lambda_ct == 0:
        loss_ta = temporal_aware_loss(*world_logits(model, batch, batch.item_pos), targets)
        return loss_ta, loss_ta, None
    logits_f, logits_cf = twin_forward(model, batch)
    loss_ta = temporal_aware_loss(logits_f, targets)
    loss_ct = counterfactual_loss(logits_f, logits_cf, targets)
    return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


# ----------------------------------------------------------------------------------------------
# Batches, the loop


def batches(tokenizer: Tokenizer, sequences: Sequences, titles: list[str], domain: str, batch_size: int,
            rng: np.random.Generator, shuffle_histories: bool = False):
    """One epoch of batches in random order, tokenised as they are needed.

    32 batches are drawn together and sorted by length, so that rows of a batch are alike and little
    is padding; the order of the batches is random again.
    """
    order = rng.permutation(len(sequences))
    for start in range(0, len(order), 32 * batch_size):
        drawn = order[start:start + 32 * batch_size]
        histories = [sequences.history(i) for i in drawn]
        if shuffle_histories:
            histories = [rng.permutation(history) for history in histories]
        examples = encode_examples(tokenizer, [[titles[j] for j in history] for history in histories],
                                   [titles[sequences.target(i)] for i in drawn], domain)
        examples.sort(key=lambda example: len(example.tokens))
        groups = [examples[i:i + batch_size] for i in range(0, len(examples), batch_size)]
        for g in rng.permutation(len(groups)):
            yield collate(groups[g])


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then linear decay to zero (D5). step counts from 1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / max(1, total - warmup), 1.0)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """Backward, clip the gradient's norm at 1, step at rate lr."""
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(model: TemporalLlama, tokenizer: Tokenizer, sequences: Sequences, titles: list[str],
                    domain: str, batch_size: int) -> float:
    """L_TA per supervised token over the given sequences, dropout off."""
    model.eval()
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in batches(tokenizer, sequences, titles, domain, batch_size, np.random.default_rng(0)):
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


def train(model: TemporalLlama, tokenizer: Tokenizer, train_set: Sequences, valid_set: Sequences,
          titles: list[str], domain: str, options: "Options", folder: Path) -> dict:
    """Tune the LoRA factors Φ by Eq. 10; the best epoch by validation L_TA stays in the model.

    Stops after one epoch without a better validation loss (D5). Writes log.jsonl and, at each best
    epoch, the adapter into the folder. Returns the steps done and the validation losses.
    """
    rng, device = np.random.default_rng(options.seed), next(model.parameters()).device
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=options.lr, weight_decay=0.0)
    per_epoch = math.ceil(len(train_set) / options.batch_size)
    total = min(options.epochs * per_epoch, options.max_steps or math.inf)
    step, losses, started = 0, [], time.perf_counter()
    bar = tqdm(total=total, desc="tuning", unit="step", disable=None, leave=False)
    with open(folder / "log.jsonl", "w", encoding="utf-8") as log, bar:
        for epoch in range(options.epochs):
            model.train()
            for batch in batches(tokenizer, train_set, titles, domain, options.batch_size, rng):
                # rate, both worlds, one loss
                step, clock = step + 1, time.perf_counter()
                lr = learning_rate(step, total, options.lr, options.warmup)
                loss, loss_ta, loss_ct = cetrec_loss(model, batch.to(device), options.lambda_ct)

                # backward, clip, step
                optimizer_step(optimizer, loss, lr)

                # log
                values = {"step": step, "loss": loss.item(), "loss_ta": loss_ta.item(),
                          "loss_ct": None if loss_ct is None else loss_ct.item(), "lr": lr,
                          "ms": 1000 * (time.perf_counter() - clock)}
                log.write(json.dumps(values) + "\n")
                bar.update()
                if step % max(1, total // 20) == 0 or step in (1, total):
                    left = (time.perf_counter() - started) / step * (total - step)
                    ct = "" if loss_ct is None else f" + {options.lambda_ct:g} x ct {values['loss_ct']:.3f}"
                    bar.write(f"step {step:>5}/{total} | loss {values['loss']:.3f} = ta "
                              f"{values['loss_ta']:.3f}{ct} | lr {lr:.1e} | {values['ms']:.0f} ms | "
                              f"{peak_memory(device):.1f} GB | {left / 60:.1f} min left", file=sys.stdout)
                if not math.isfinite(values["loss"]):
                    raise ValueError(f"loss is {values['loss']} at step {step}; try a smaller --lr or "
                                     f"--lambda-ct. The last good adapter, if any, is in {folder}")
                if step == total:
                    break

            # validate, save
            losses.append(validation_loss(model, tokenizer, valid_set, titles, domain,
                                          options.batch_size))
            best = losses[-1] == min(losses)
            bar.write(f"epoch {epoch + 1}: validation ta {losses[-1]:.4f}"
                      f"{' (best so far, adapter saved)' if best else ''}", file=sys.stdout)
            if best:
                save_lora(model, folder)
                kept = [p.detach().clone() for p in lora_parameters(model)]
            elif len(losses) > 1:
                break
            if step == total:
                break
    for p, value in zip(lora_parameters(model), kept):
        p.data.copy_(value)
    model.eval()
    return {"steps": step, "validation_ta": losses, "seconds": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------
# The embedded base: a small Llama that knows titles and what goes with what, but no order


@dataclass(frozen=True)
class TinyBase:
    """How `--model tiny` is made; every number was chosen on ml-100k's validation split."""

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 100
    sequences: int = 3_200        # seen in all; an epoch more or less counts little beside this


def tiny_tokenizer(titles: list[str], counts: np.ndarray, domain: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the prompt and on titles as often as training saw them.

    Words may merge across spaces, never across quotes: a popular title becomes one or two tokens, and
    `", "` stands alone, so that prompts are short and answers begin at a token of their own.
    """
    quotes = tokenizers.Regex(r'", "|"|[^"]+')
    level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(quotes, "isolated"), level(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    often = int(counts.max()) + 1                           # the prompt's own words come first
    corpus = [build_prompt(titles[:2], domain)[0]] * often + [
        f'"{title}"' for title, count in zip(titles, counts) for _ in range(int(count) + 1)]
    bpe.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=sorted(level.alphabet()), show_progress=False))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return Tokenizer(bpe, (1,))


def title_labels(batch: Batch) -> Batch:
    """Supervise every title token of the history too: ten times the signal of the answer alone."""
    labels = batch.labels.clone()
    labels[:, :-1] = torch.where(batch.item_pos[:, 1:] != NO_ITEM, batch.tokens[:, 1:], labels[:, :-1])
    return Batch(batch.tokens, batch.item_pos, labels, max(0, batch.prefix - 1))


def tiny_base(root: Path, train_set: Sequences, titles: list[str], domain: str, seed: int,
              device: torch.device, recipe: TinyBase | None = None) -> Path:
    """The checkpoint folder of the embedded base, made on first use and kept.

    Trained from scratch on the training split with every history shuffled: whatever order sensitivity
    shows up later was learned in tuning. The folder's name is a digest of all it was made from.
    """
    recipe = recipe or TinyBase()
    source = hashlib.sha256(json.dumps([asdict(recipe), domain, seed, titles]).encode())
    source.update(train_set.starts.tobytes() + train_set.targets.tobytes() + train_set.items.tobytes())
    folder = root / f"tiny-{source.hexdigest()[:12]}"
    if (folder / "config.json").is_file():                  # written last
        return folder
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    counts = np.bincount(train_set.items[train_set.targets], minlength=len(titles))
    tokenizer = tiny_tokenizer(titles, counts, domain, recipe.vocab_size)
    llama = Llama(LlamaConfig(
        vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size, num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads, num_key_value_heads=recipe.num_attention_heads,
        head_dim=recipe.hidden_size // recipe.num_attention_heads, rope_theta=10_000.0,
        max_position_embeddings=recipe.max_position_embeddings, tie_word_embeddings=True)).to(device)
    model = TemporalLlama(llama, "none").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    total, step = math.ceil(recipe.sequences / recipe.batch_size), 0
    with tqdm(total=total, desc="tiny base", unit="step", disable=None, leave=False) as bar:
        while step < total:
            for batch in batches(tokenizer, train_set, titles, domain, recipe.batch_size, rng, True):
                step, batch = step + 1, title_labels(batch).to(device)
                loss = cetrec_loss(model, batch, lambda_ct=0)[0]
                optimizer_step(optimizer, loss, learning_rate(step, total, recipe.lr, recipe.warmup))
                bar.update()
                if step % max(1, total // 10) == 0:
                    bar.write(f"tiny base step {step:>5}/{total} | loss {loss.item():.3f} per title token",
                              file=sys.stdout)
                if step == total:
                    break
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    save_llama(llama, folder)
    return folder


def write_json(path: Path, value) -> None:
    """Write a JSON file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------
# Command line

# The paper gives AdamW and 1e-4; the rest is BIGRec's and CFT's (D5).
PUBLISHED = {"lr": 1e-4, "batch_size": 64, "epochs": 3, "warmup": 20, "lora_rank": 8, "lora_alpha": 16.0,
             "lora_dropout": 0.05, "lora_targets": ("q_proj", "v_proj")}
# A base this small needs a larger rate and more factors; chosen on ml-100k's validation split.
TINY = PUBLISHED | {"lr": 1e-3, "epochs": 1, "lora_rank": 16, "lora_alpha": 32.0,
                    "lora_targets": ALL_LINEAR}


@dataclass(frozen=True)
class Options:
    """Everything a run depends on, as given or by default; written to run.json."""

    data: str
    data_dir: str
    order_strength: float
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
    limit_train: int
    beams: int
    eval_sequences: int
    exclude_history: bool
    seed: int
    device: str
    dtype: str

    def __post_init__(self):
        for name, low in (("lambda_ct", 0), ("sinpe_scale", 0), ("lr", 0), ("batch_size", 1), ("epochs", 1),
                          ("warmup", 0), ("max_steps", 0), ("limit_train", 0), ("beams", 1),
                          ("eval_sequences", 0), ("seed", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; wanted a finite "
                                 f"number of at least {low}")


def parser() -> argparse.ArgumentParser:
    """Every flag with unit, equation and default. A flag not given is None until presets fill it in."""
    def both(key: str) -> str:
        return f"(default: {PUBLISHED[key]}; with the tiny base {TINY[key]})"

    ap = argparse.ArgumentParser(prog="cetrec.py", description="CETRec: tune a Llama so that the order "
                                 "of a history counts, then measure it.", allow_abbrev=False)
    group = ap.add_argument_group("data")
    group.add_argument("--data", choices=["synthetic", *FORMATS],
                       help="synthetic needs no download; movielens is MovieLens-1M (default: synthetic)")
    group.add_argument("--data-dir", metavar="DIR", help="folder that holds ml-1m/, ml-100k/ or "
                       "ml-latest-small/ as unpacked, files plain or gzipped (default: data)")
    group.add_argument("--order-strength", type=float, metavar="S", help="synthetic only: how much order "
                       "decides the next item, 0 a set of items, 1 mostly the newest (default: 1)")
    group.add_argument("--limit-train", type=int, metavar="N", help="use the N latest training sequences "
                       "only; 0 = all (default: 0)")
    group = ap.add_argument_group("model")
    group.add_argument("--model", metavar="tiny | FOLDER", help="tiny: a small Llama trained here on "
                       "shuffled histories; or a folder with config.json, safetensors, tokenizer.json "
                       "(default: tiny)")
    group.add_argument("--temporal", choices=TEMPORAL, help="temporal embedding of item tokens: rope "
                       "rotates the input embedding (Eq. 4, D2), rope-attention turns item tokens by t + k "
                       "in attention (Eq. 5), sinpe is added (Eq. 3), none is BIGRec and forces "
                       "--lambda-ct 0 (default: rope)")
    group.add_argument("--sinpe-scale", type=float, metavar="X", help="factor on p_k of Eq. 3, with "
                       "--temporal sinpe only (D8; default: 1, as the paper writes it)")
    group.add_argument("--lora-rank", type=int, metavar="R", help=f"rank of the factors {both('lora_rank')}")
    group.add_argument("--lora-alpha", type=float, metavar="α",
                       help=f"the factors' product is scaled by α/R {both('lora_alpha')}")
    group.add_argument("--lora-dropout", type=float, metavar="P",
                       help=f"dropout on the factors' input, a probability {both('lora_dropout')}")
    group.add_argument("--lora-targets", metavar="NAMES", help="comma-separated linear maps, or all-linear "
                       "(default: q_proj,v_proj; with the tiny base all-linear)")
    group = ap.add_argument_group("tuning")
    group.add_argument("--lambda-ct", type=float, metavar="λ", help="weight of L_CT, Eq. 10; 0 is the "
                       "paper's w.o. CT. The paper tries 0.01, 0.1, 0.5, 1, 10, names no winner "
                       "(default: 0.1)")
    group.add_argument("--lr", type=float, help=f"peak rate of AdamW {both('lr')}")
    group.add_argument("--batch-size", type=int, metavar="N", help=f"sequences a step {both('batch_size')}")
    group.add_argument("--epochs", type=int, metavar="N", help="at most; tuning stops after one without a "
                       f"better validation L_TA {both('epochs')}")
    group.add_argument("--warmup", type=int, metavar="N",
                       help=f"steps of linear warm-up, then linear decay {both('warmup')}")
    group.add_argument("--max-steps", type=int, metavar="N", help="stop tuning after N steps; 0 = no limit "
                       "(default: 0)")
    group = ap.add_argument_group("evaluation")
    group.add_argument("--eval-sequences", type=int, metavar="N", help="seeded sample of the test split; "
                       "0 = all (default: 1000)")
    group.add_argument("--beams", type=int, metavar="W", help="beams of generation, §5.1.4 (default: 5)")
    group.add_argument("--exclude-history", action=argparse.BooleanOptionalAction,
                       help="leave items of the history out of the ranking, as §5.1.2 says (default: yes)")
    group.add_argument("--eval-only", metavar="RUN", help="evaluate the adapter of a finished run's folder "
                       "again, on its data and base; goes with the flags of this group and --device")
    group = ap.add_argument_group("run")
    group.add_argument("--seed", type=int, help="of the world, base, tuning and samples (default: 0)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"],
                       help="auto takes cuda, then mps, then cpu (default: auto)")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the frozen "
                       "weights; factors, logits and losses are float32. auto: bfloat16 on cuda, else "
                       "float32 (default: auto)")
    group.add_argument("--out", metavar="DIR", help="folder for run folders and tiny bases (default: runs)")
    return ap


def fill_in(given: dict) -> Options:
    """Options from the flags that were given and the preset of the base. Raises on contradictions."""
    if given.get("sinpe_scale") is not None and given.get("temporal") != "sinpe":
        raise ValueError("--sinpe-scale goes with --temporal sinpe only; drop one or add the other")
    if given.get("order_strength") is not None and given.get("data", "synthetic") != "synthetic":
        raise ValueError(f"--order-strength goes with --data synthetic, not {given['data']}")
    if given.get("data_dir") is not None and given.get("data", "synthetic") == "synthetic":
        raise ValueError("--data-dir goes with a downloaded data set; add --data ml-100k or movielens")
    targets = given.get("lora_targets")
    if isinstance(targets, str):
        given["lora_targets"] = ALL_LINEAR if targets == "all-linear" else tuple(targets.split(","))
    if given.get("temporal") == "none":
        if given.get("lambda_ct"):
            print("--temporal none leaves one world only: λ is 0 in this run (w.o. Both = BIGRec)")
        given["lambda_ct"] = 0.0
    defaults = {"data": "synthetic", "data_dir": "data", "order_strength": 1.0, "model": "tiny",
                "temporal": "rope", "lambda_ct": 0.1, "sinpe_scale": 1.0, "max_steps": 0, "limit_train": 0,
                "beams": 5, "eval_sequences": 1_000, "exclude_history": True, "seed": 0, "device": "auto",
                "dtype": "auto"} | (TINY if given.get("model", "tiny") == "tiny" else PUBLISHED)
    return Options(**(defaults | given))


def choose_device(options: Options) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the frozen weights."""
    kind = options.device
    if kind == "auto":
        kind = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA GPU; use --device auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this PyTorch sees no Apple GPU; use --device auto")
    dtype = ("bfloat16" if kind == "cuda" else "float32") if options.dtype == "auto" else options.dtype
    return torch.device(kind), getattr(torch, dtype)


def new_folder(out: Path, name: str) -> Path:
    """out/name-1, or the next free number."""
    try:
        for number in range(1, 10_000):
            if not (folder := out / f"{name}-{number}").exists():
                folder.mkdir(parents=True)
                (folder / "log.jsonl").touch()
                return folder
    except OSError as error:
        raise ValueError(f"{out}: cannot write there ({error.strerror}); choose a folder with --out") from None
    raise ValueError(f"{out}: holds 9,999 runs of that name; choose a folder with --out")


@dataclass(frozen=True)
class Dataset:
    """One data set made ready: titles, splits, and the world when it is synthetic."""

    titles: list[str]
    domain: str
    splits: tuple[Sequences, Sequences, Sequences]
    world: SyntheticWorld | None
    checksums: dict[str, str]
    counts: dict


def load_data(options: Options) -> Dataset:
    """Interactions -> sequences -> splits, counted."""
    world = None
    if options.data == "synthetic":
        world = SyntheticWorld(strength=options.order_strength, seed=options.seed)
        interactions = world.interactions(seed=options.seed)
    else:
        interactions = load_interactions(options.data, options.data_dir)
    sequences = make_sequences(interactions)
    train_set, valid_set, test_set = split_by_time(sequences)
    if options.limit_train:
        train_set = train_set.select(slice(-options.limit_train, None))
    counts = {"interactions": len(interactions.users), "users": len(np.unique(interactions.users)),
              "items": len(interactions.titles), "sequences": len(sequences), "train": len(train_set),
              "valid": len(valid_set), "test": len(test_set)}
    return Dataset(interactions.titles, "movies", (train_set, valid_set, test_set), world,
                   interactions.checksums, counts)


def print_data(options: Options, data: Dataset) -> None:
    """Counts beside the paper's Table 2."""
    c = data.counts
    print(f"data {options.data} | {c['interactions']:,} interactions, {c['users']:,} users, {c['items']:,} "
          f"items | {c['sequences']:,} sequences = {c['train']:,} train + {c['valid']:,} valid + "
          f"{c['test']:,} test" + (" (--limit-train)" if options.limit_train else ""))
    paper = TABLE_2.get(options.data)
    print("paper's Table 2 | " + (", ".join(f"{n:,} {what}" for what, n in paper.items()) if paper else
                                  f"has no {options.data}"))


def check_context(tokenizer: Tokenizer, data: Dataset, context: int) -> None:
    """Refuse sequences that do not fit the base's context, before any work is done on them."""
    width = np.array([len(e.ids) for e in tokenizer.bpe.encode_batch(data.titles)])
    for part in data.splits:
        total = np.concatenate(([0], width[part.items].cumsum()))
        i = int(np.argmax(total[part.targets + 1] - total[part.starts]))
        history = [data.titles[j] for j in part.history(i)]
        example = encode_examples(tokenizer, [history], [data.titles[part.target(i)]], data.domain)[0]
        if len(example.tokens) > context:
            raise ValueError(f"a history of {len(history)} items makes {len(example.tokens)} tokens with its "
                             f"answer, more than the base's context of {context}, from {history[0]!r} to "
                             f"{history[-1]!r}. Use a base with a longer context")


def evaluate_model(model: TemporalLlama, data: Dataset, options: Options) -> dict:
    """Original and reversed test histories, floors and oracle. -> {row name: {metric: (mean, error)}}"""
    test_set = data.splits[2]
    if 0 < options.eval_sequences < len(test_set):
        rng = np.random.default_rng([options.seed, 4])
        test_set = test_set.select(np.sort(rng.choice(len(test_set), options.eval_sequences, replace=False)))
    histories = [test_set.history(i) for i in range(len(test_set))]
    targets = test_set.items[test_set.targets]
    tokenizer = model.tokenizer
    answers = tokenizer.bpe.encode_batch([f'"{t}"' for t in data.titles], add_special_tokens=False)
    shortest = min(4, min(len(a.ids) for a in answers))         # CFT's 4 would bar shorter titles (D11)
    ranks = {}
    for name, given in (("original", histories), ("reversed", [h[::-1] for h in histories])):
        lists = recommend(model, tokenizer, data.titles, given, data.domain, options.beams,
                          options.exclude_history, shortest, progress=f"{name} histories")
        ranks[name] = list_ranks(lists, targets)
    floors = CountingFloors(data.splits[0], len(data.titles)).ranks(
        histories, targets, options.exclude_history)
    rows = {f"{name} order": summarise(r) for name, r in ranks.items()}
    rows["change under reversal"] = relative_change(ranks["original"], ranks["reversed"])
    rows |= {name: summarise(r) for name, r in floors.items()}
    if data.world is not None:
        rows |= {f"best possible, {name}": values for name, values in oracle_metrics(
            data.world, histories).items()}
    protocol = (f"test: {len(histories):,} sequences, all {len(data.titles):,} items ranked, history "
                f"{'excluded' if options.exclude_history else 'kept'}, {options.beams} beams")
    return {"protocol": protocol, "rows": rows}


def run(options: Options, out: Path, evaluate_run: Path | None) -> None:
    """One run from data to table."""
    device, dtype = choose_device(options)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    print(f"device {device}{threads} | frozen weights {str(dtype).removeprefix('torch.')} | "
          f"torch {torch.__version__}")
    data = load_data(options)
    print_data(options, data)

    # base
    folder = evaluate_run or new_folder(out, f"{options.data}-{options.temporal}")
    source = Path(options.model)
    if options.model == "tiny":
        started = time.perf_counter()
        source = tiny_base(out, data.splits[0], data.titles, data.domain, options.seed, device)
        print(f"tiny base {source} | {time.perf_counter() - started:.0f} s")
    tokenizer = Tokenizer.from_folder(source)
    llama = load_llama(source, device, dtype)
    check_context(tokenizer, data, llama.config.max_position_embeddings)
    model = TemporalLlama(llama, options.temporal, options.sinpe_scale, tokenizer)
    torch.manual_seed(options.seed)
    if evaluate_run:
        load_lora(model, evaluate_run)
    else:
        add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets)
    trainable, total = (sum(p.numel() for p in ps) for ps in (lora_parameters(model), model.parameters()))
    print(f"parameters | {trainable:,} trainable of {total:,} ({100 * trainable / total:.1f} %) | "
          f"temporal {options.temporal} | λ = {options.lambda_ct:g}")
    train_set, valid_set, _ = data.splits
    example = encode_examples(tokenizer, [[data.titles[j] for j in train_set.history(0)]],
                              [data.titles[train_set.target(0)]], data.domain)[0]
    print(f"a training prompt, each item ⟨marked⟩ with its index k\n{'-' * 80}\n"
          f"{show_prompt(tokenizer, example)}\n{'-' * 80}")

    # tune
    record = {"options": asdict(options), "base": str(source), "counts": data.counts,
              "checksums": data.checksums, "versions": {
                  "python": platform.python_version(), "torch": torch.__version__,
                  "numpy": np.__version__, "tokenizers": tokenizers.__version__}}
    if not evaluate_run:
        write_json(folder / "run.json", record)
        rng = np.random.default_rng([options.seed, 5])
        sample = rng.permutation(len(valid_set))[:1_000]
        record["tuning"] = train(model, tokenizer, train_set, valid_set.select(sample), data.titles,
                                 data.domain, options, folder)

    # evaluate
    result = evaluate_model(model, data, options)
    record["metrics"] = result
    write_json(folder / ("eval.json" if evaluate_run else "run.json"), record)
    print(result["protocol"])
    print(format_table([(name, values, "%" if "change" in name else "")
                        for name, values in result["rows"].items()]))
    print(f"run folder {folder}")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, turn every error a user can cause into one line and status 2."""
    arguments = vars(parser().parse_args(argv))
    given = {name: value for name, value in arguments.items() if value is not None}
    out, evaluate_run = Path(given.pop("out", "runs")), given.pop("eval_only", None)
    try:
        if evaluate_run is not None:
            allowed = {"beams", "eval_sequences", "exclude_history", "device"}
            if extra := sorted(given.keys() - allowed):
                raise ValueError(f"--eval-only takes data, base and tuning from the run; it does not go with "
                                 f"--{', --'.join(name.replace('_', '-') for name in extra)}")
            record = Path(evaluate_run) / "run.json"
            if not record.is_file():
                raise FileNotFoundError(f"{record}: not found; --eval-only wants the folder of a finished run")
            try:
                saved = json.loads(record.read_text(encoding="utf-8"))["options"]
                options = Options(**(saved | {"lora_targets": tuple(saved["lora_targets"])} | given))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{record}: not the record of a run ({error})") from None
            evaluate_run = Path(evaluate_run)
        else:
            options = fill_in(given)
        run(options, out, evaluate_run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what the run folder holds is whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
