"""CETRec: temporal embeddings, the erased world, the twin forward, the losses, the loop (§4).

Paper: "Enhancing Temporal Sensitivity of Large Language Model for Recommendation with
Counterfactual Tuning". This file follows §4 from top to bottom and ends with the command. Read
llama.py, lora.py and data.py before it, evaluate.py after it.

    python cetrec.py                                            the synthetic world, no download
    python cetrec.py --data ml-100k                             MovieLens 100K
    python cetrec.py --data movielens --model path/to/Llama-3   the paper's setting
    python cetrec.py --resume runs/movielens-rope-1             go on after an interruption
    python cetrec.py --eval-only runs/synthetic-rope-1          evaluate a finished run again

Shapes: B batch, T tokens, C width, V vocabulary, M supervised tokens, A places of a row.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import support.start  # noqa: F401 (it settles what must be settled before torch is loaded)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (NO_ITEM, Batch, Sequences, Tokenizer, batches, check_context, collate,
                  show_sequence)
from evaluate import GroundedBeams, device_of, mean_and_error
from llama import Block, KVCache, Llama, LlamaConfig, load_llama, rotate
from lora import add_lora
from support.checkpoints import find_checkpoint, fingerprint, read_tokenizer
from support.files import write_json
from support.floors import result_table
from support.journal import Journal
from support.options import TEMPORAL, Options, Where, add_flags, as_flag, parse
from support.processes import add_up, in_shares, my_parts, my_share, shard
from support.runs import (check_same, check_writable, choose_device, differences, finish,
                          load_adapter, new_folder, open_data, read_run, rows_that_fit,
                          save_adapter, versions)
from support.terminal import Parser, exit_status
from support.tiny import TINY_BASES, TinyBase, tiny_base
from support.trie import ExactTitles, TitleBeams

# ----------------------------------------------------------------------------------------------
# §4.2 Temporal embeddings


def sinusoidal(pos: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """p_k of Eq. 3: p[2t] = sin(k / base^(2t/dim)), p[2t+1] = cos(same), with k = pos.

    (..) -> (.., dim). Positions are steps back or, by the clock, real numbers. Each pair of
    dimensions is a hand of a clock, from a fast one (t = 0, a radian a step) to one that hardly
    moves; the step from k to k + 1 is the same rotation for every k.
    """
    angles = _angles(pos, dim, base)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


def rotary(x: Tensor, pos: Tensor, base: float = 10_000.0) -> Tensor:
    """R_k x of Eq. 4: the adjacent pair (x[2t], x[2t+1]) turns by k / base^(2t/dim), with k = pos.

    (.., dim) and (..) -> (.., dim); dim is even. `llama.rotate` turns split halves instead of
    adjacent pairs (see there), so the even coordinates are put into the first half and back again.
    At position 0 nothing changes, bit for bit.
    """
    angles = _angles(pos, x.shape[-1], base)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = rotate(halves, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _angles(pos: Tensor, dim: int, base: float) -> Tensor:
    """k / base^(2t/dim) for t = 0, 1, ..  (..) -> (.., dim/2)"""
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=pos.device)
    return pos[..., None].float() * base ** (-pair / dim)


class TemporalLlama(nn.Module):
    """§4.2: a Llama whose item tokens carry the k of their item on top of their place (Eq. 6).

    All tokens of an item carry the same k; tokens outside items carry none. What that does depends
    on kind, because the paper leaves open where its rotary variant turns (D2):

    "rope"            the token embedding is turned by R_k at the input, where Eq. 6 adds p_k
    "rope-attention"  queries and keys at token position t are turned by R_(t+k), as Eq. 5 has it
    "sinpe"           scale · p_k of Eq. 3 is added to the token embedding (D8)
    "none"            nothing is done: the plain Llama, and BIGRec among the baselines of §5.1.3
    """

    def __init__(self, llama: Llama, kind: str = "rope", scale: float = 1.0,
                 tokenizer: Tokenizer | None = None, index: str = "order", base: str = ""):
        super().__init__()
        if kind not in TEMPORAL:
            raise ValueError(f"temporal embedding {kind!r}; wanted one of {', '.join(TEMPORAL)}")
        self.llama, self.kind, self.scale = llama, kind, scale
        self.tokenizer, self.index, self.base = tokenizer, index, base

    def forward(self, tokens: Tensor, item_pos: Tensor, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.  (B, T), (B, T) -> (B, T, C)

        If places wanted (B, A) are given: -> (B, A, C).
        """
        tok_emb, positions = self.llama.embed(tokens), None
        k = item_pos.clamp(min=0)                   # outside items too, where it changes nothing
        if self.kind == "rope":
            tok_emb = rotary(tok_emb, k)
        elif self.kind == "sinpe":
            temporal_emb = self.scale * sinusoidal(k, tok_emb.shape[-1])
            tok_emb = tok_emb + (temporal_emb * (item_pos != NO_ITEM)[..., None]).to(tok_emb.dtype)
        elif self.kind == "rope-attention":
            positions = (cache or KVCache()).positions(tokens.shape[1], tokens.device) + k
        return self.llama(None, embeddings=tok_emb, positions=positions, cache=cache,
                          wanted=wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """f of §4.4.  (.., C) -> (.., V) float32"""
        return self.llama.logits(hidden)

    def settings(self) -> dict:
        """What LoRA factors that were tuned in this model go with."""
        scale = self.scale if self.kind == "sinpe" else 1.0
        return {"temporal": self.kind, "scale": scale, "index": self.index, "base": self.base}


# ----------------------------------------------------------------------------------------------
# §4.3 The counterfactual world, and the twin network


def erase_order(item_pos: Tensor) -> Tensor:
    """The counterfactual world: every item is at position 0, so its order is gone.  (B, T) -> same

    Tokens, items and weights stay as they are, also the order of the titles in the text: what is
    erased is the temporal embedding's knowledge of it. §4.3 gives every item p_0, "the earliest
    time", where §4.2.1 gives p_0 to the newest item; we read it as the newest (D1). With a rotary
    embedding R_0 is the identity, so the erased world is then the plain Llama.
    """
    return item_pos.clamp(max=0)                    # NO_ITEM stays NO_ITEM


def world_logits(model: TemporalLlama, batch: Batch, *worlds: Tensor) -> tuple[Tensor, ...]:
    """Logits at the supervised positions for each given item_pos (B, T).  -> (M, V) each

    All worlds are rows of one pass. What all rows have in common before the first item is run once,
    and its keys and values, with their gradients, serve every row of every world. The last block
    and the logits work only where there is a target.
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
    """(f(x_t), f(x_0)) of §4.3: one network, same tokens, two worlds.  -> (M, V), (M, V)"""
    factual, counterfactual = batch.item_pos, erase_order(batch.item_pos)   # T = t and T = t*
    return world_logits(model, batch, factual, counterfactual)


# ----------------------------------------------------------------------------------------------
# §4.4 Losses. Targets (M,) are the tokens of the answers y (Eq. 1); means are over all of them


def temporal_aware_loss(logits_f: Tensor, targets: Tensor) -> Tensor:
    """L_TA = mean CE(f(x_t), y).  Eq. 9, which is Eq. 1 in the factual world."""
    return F.cross_entropy(logits_f, targets)


def counterfactual_loss(logits_f: Tensor, logits_cf: Tensor, targets: Tensor) -> Tensor:
    """L_CT = mean CE(f(x_t) - f(x_0), y).  Eq. 8. Gradients flow through both worlds.

    The difference is the causal effect of order on the prediction, CE_T of Eq. 7. §4.4 calls f a
    distribution, but a difference of distributions sums to 0; we take logits, as CFT does (D3).
    Where the worlds agree, the effect is zero, its softmax uniform, and the loss ln V with no
    gradient: L_CT begins to work once L_TA has given the temporal embedding an influence. What it
    rewards in the end is an erased world that predicts nothing; docs/rewards.md has the argument.
    """
    effect = logits_f - logits_cf
    return F.cross_entropy(effect, targets)


def cetrec_loss(model: TemporalLlama, batch: Batch,
                lambda_ct: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L, L_TA, L_CT) with L = L_TA + λ L_CT.  Eq. 10. With λ = 0 one world is run; L_CT is None.
    """
    if lambda_ct == 0:
        logits_f, = world_logits(model, batch, batch.item_pos)
        loss_ta = temporal_aware_loss(logits_f, batch.targets)
        return loss_ta, loss_ta, None
    logits_f, logits_cf = twin_forward(model, batch)
    loss_ta = temporal_aware_loss(logits_f, batch.targets)
    loss_ct = counterfactual_loss(logits_f, logits_cf, batch.targets)
    return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


@torch.no_grad()
def answer_log_likelihood(model: TemporalLlama, sequences: Sequences,
                          batch_size: int = 64) -> np.ndarray:
    """log p of each answer in the factual and in the erased world.  -> (len(sequences), 2)

    Their difference is the effect of order on the answer, Eq. 7.
    """
    device, out = device_of(model), np.zeros((len(sequences), 2))
    for start in tqdm(range(0, len(out), batch_size), desc="answers in both worlds", unit="batch",
                      leave=False, disable=None):
        rows = range(start, min(start + batch_size, len(out)))
        batch = collate(model.tokenizer.examples(
            [sequences.words(sequences.history(i)) for i in rows],
            [sequences.titles[sequences.target(i)] for i in rows], sequences.domain,
            [sequences.ages(i) for i in rows]), model.tokenizer.pad_id).to(device)
        owner = batch.supervised // batch.places.shape[1]           # the row of each target
        for world, logits in enumerate(twin_forward(model, batch)):
            log_p = -F.cross_entropy(logits, batch.targets, reduction="none")
            total = torch.zeros(len(rows), device=device).index_add_(0, owner, log_p)
            out[start:start + len(rows), world] = total.cpu().numpy()
    return out


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


def tuned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors Φ (Eq. 2); baselines may add some. All else is frozen: see add_lora."""
    return [p for p in model.parameters() if p.requires_grad]


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then linear decay to zero (D5). step counts from 1."""
    return peak * min(step / max(1, warmup), (total - step + 1) / max(1, total - warmup), 1.0)


def backward(model: TemporalLlama, batch: Batch, lambda_ct: float, rows: int,
             loss: Callable = cetrec_loss) -> list[Tensor | None]:
    """The gradient of Eq. 10 for a batch, so many rows at a time. Returns (L, L_TA, L_CT).

    The losses are means over targets. So a part of the batch counts by its share of the targets,
    and the parts' gradients add up to that of the whole. Where several processes run, each has its
    own parts, and the sums over all of them, which every process gets, are formed here.
    """
    device, parts = device_of(model), []
    for part, share in my_parts(batch, rows):
        losses = loss(model, part.to(device), lambda_ct)
        (share * losses[0]).backward()
        parts.append([x if x is None else share * x.detach() for x in losses])
    losses = [None if x[0] is None else sum(x) for x in zip(*parts)]
    gradients = [p.grad for p in tuned_parameters(model)]
    add_up([x for x in gradients + losses if x is not None])
    return losses


def tuning_step(model: TemporalLlama, batch: Batch, optimizer: torch.optim.Optimizer, lr: float,
                lambda_ct: float, rows: int, loss: Callable = cetrec_loss) -> list[Tensor | None]:
    """One step: two worlds, one loss, its gradient, clipped at norm 1, an update of the factors.

    Only the factors Φ are in the optimizer (Eq. 2). Returns (L, L_TA, L_CT or None). Raises
    FloatingPointError, before the update, for a gradient that is not finite.
    """
    losses = backward(model, batch, lambda_ct, rows, loss)
    for group in optimizer.param_groups:
        group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient's norm is {norm}, the loss {losses[0]}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


@torch.no_grad()
def validation_loss(model: TemporalLlama, sequences: Sequences, batch_size: int,
                    loss: Callable = cetrec_loss) -> float:
    """L_TA per supervised token over the given sequences, dropout off.

    L_CT is left out, because only the factual world is used to recommend (§4.4).
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)         # of losses, and of targets
    for batch in tqdm(my_share(batches(model.tokenizer, sequences, batch_size,
                                       np.random.default_rng(0))),
                      desc="validation", unit="batch", leave=False, disable=None):
        loss_ta, targets = loss(model, batch.to(device_of(model)), 0)[1], len(batch.targets)
        total += torch.tensor([float(loss_ta) * targets, targets])
    add_up([total])
    return float(total[0] / total[1])


def train(model: TemporalLlama, train_set: Sequences, valid_set: Sequences, how: Tuning,
          folder: Path, base: str | None = None, loss: Callable = cetrec_loss) -> dict:
    """Tune the LoRA factors Φ by Eq. 10; the best epoch by validation L_TA stays in the model.

    Stops after one epoch that is no better (D5). The journal keeps log.jsonl and checkpoints in the
    folder, and goes on from a checkpoint that is there. base: the base's name for the adapter.
    Returns the steps done and the validation losses.
    """
    rng = np.random.default_rng(how.seed)
    optimizer = torch.optim.AdamW(tuned_parameters(model), lr=how.lr, weight_decay=0.0)
    worlds, recompute = 1 if how.lambda_ct == 0 else 2, model.llama.run_block is RECOMPUTE
    with Journal(folder, optimizer, rng, how.steps, how.lambda_ct, model.tokenizer) as journal:
        while journal.goes_on():
            model.train()
            for batch in journal.epoch(partial(batches, model.tokenizer, train_set, how.batch_size,
                                               rng)):
                lr = learning_rate(journal.step + 1, how.steps, how.lr, how.warmup)
                rows = how.micro_batch or rows_that_fit(model.llama.config, batch,
                                                        device_of(model), worlds, recompute)
                losses = tuning_step(model, batch, optimizer, lr, how.lambda_ct, rows, loss)
                journal.note(lr, losses)
            loss_ta = validation_loss(model, valid_set, how.batch_size, loss)
            journal.validated(loss_ta, save=partial(save_adapter, model, folder, base))
        journal.restore_best()
        model.eval()
        return journal.record()


# ----------------------------------------------------------------------------------------------
# The command

RECOMPUTE = partial(checkpoint, use_reentrant=False)


def title_lists(model: TemporalLlama, test_set: Sequences, options: Options) -> dict[str, Callable]:
    """The recommenders that --lists names, by the names that they have in the result table."""
    kept = options.exclude_history
    makers = {"beams": (f"{options.beams} beams, grounded", GroundedBeams, options.decoding()),
              "titles": ("10 beams on titles", TitleBeams, kept),
              "exact": ("all titles scored", ExactTitles, kept)}
    return {name: make(model, test_set.titles, test_set.domain, how)
            for name, make, how in (makers[kind] for kind in options.lists)}


@dataclass(frozen=True)
class Method:
    """What may differ between methods that tune one base in one protocol (§5.1.3).

    These defaults are CETRec. experiments/llm_baselines.py has four others.
    """

    name: str = "cetrec"
    wrap: Callable = lambda model, splits: model    # puts what it adds round the base
    loss: Callable = cetrec_loss
    lists: Callable = title_lists


def open_model(options: Options, source: Path, adapter: Path | None = None,
               splits: tuple[Sequences, ...] = (), method: Method = Method()) -> TemporalLlama:
    """The base and, if given, its adapter; prints what it read.

    Raises ValueError, before weights are read, if a prompt of the splits exceeds the context.
    """
    device, dtype = choose_device(options)
    config, tokenizer = LlamaConfig.from_folder(source), read_tokenizer(source)
    for part in splits:
        check_context(tokenizer, part, config.max_position_embeddings)
    started = time.perf_counter()
    llama = load_llama(source, "cpu" if options.shard else device, dtype)
    digest = fingerprint(source)
    if options.recompute:
        llama.run_block = RECOMPUTE
    if options.compile:             # one set of kernels for all blocks and all batch shapes
        llama.run_block = torch.compile(Block.__call__, dynamic=True)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"base {source} | digest {digest} | {config.vocab_size:,} tokens | read in "
          f"{time.perf_counter() - started:.1f} s | on {device}{threads}, "
          f"{'as stored' if dtype is None else str(dtype).removeprefix('torch.')}")
    model = method.wrap(TemporalLlama(llama, options.temporal, options.sinpe_scale, tokenizer,
                                      options.index, digest), splits)
    if adapter:
        load_adapter(model, adapter)
    return model.eval()


def run(options: Options, out: Path, folder: Path | None = None, base: Path | None = None,
        tune: bool = True, method: Method = Method(), like: Path | None = None) -> Path:
    """One run from data to results. Returns its folder.

    With the folder of a run and its base: go on with that run, or evaluate its adapter only. With
    like: a new run, refused unless data and base are those of the run in that folder.
    """
    check_writable(folder or out)
    device, _ = choose_device(options)
    splits, world, record = open_data(options)
    train_set, valid_set, test_set = splits
    if same := folder or like:          # the data are compared now, the base when it is read
        check_same(same, record)
    if base is None and options.model == "tiny":
        base = tiny_base(out, splits, options.seed, device,
                         TINY_BASES.get(options.data, TinyBase()))
    source = base or find_checkpoint(options.model)
    model = open_model(options, source, None if tune else folder, splits, method)
    torch.manual_seed(options.seed)
    if tune:
        add_lora(model.llama, options.lora_rank, options.lora_alpha, options.lora_dropout,
                 options.lora_targets)
        print("a training prompt, each item ⟨marked⟩ with its index k\n"
              f"{show_sequence(model.tokenizer, train_set, 0)}")
    test_set = test_set.sample(options.eval_sequences, options.seed)
    recommenders = method.lists(model, test_set, options)       # which may refuse the tokenizer
    if options.shard:
        shard(model, device)
    record |= {"method": method.name, "options": options.record(), "settings": model.settings(),
               "base": source.name if options.model == "tiny" else str(source),
               "vocabulary": model.llama.config.vocab_size, "versions": versions(device)}
    if same:
        check_same(same, record)
    if folder is None:
        name = options.temporal if method.name == "cetrec" else method.name
        folder = new_folder(out, f"{Path(options.data).resolve().name}-{name}")
        write_json(folder / "run.json", record)
    try:
        if tune:
            epoch = options.epoch(train_set)
            steps, warmup = options.schedule(len(epoch))
            tuned = sum(p.numel() for p in tuned_parameters(model))
            print(f"tuning {tuned:,} parameters | temporal {options.temporal} | λ = "
                  f"{options.lambda_ct:g} | at most {steps:,} steps, {warmup} of them warm-up")
            how = Tuning(options.lambda_ct, options.lr, options.batch_size, steps, warmup,
                         options.seed, options.micro_batch)
            record["tuning"] = train(model, epoch, valid_set.sample(1_000, options.seed), how,
                                     folder, None if options.model == "tiny" else options.model,
                                     method.loss)
        result, arrays = result_table(recommenders, train_set, test_set, world,
                                      options.exclude_history)
        if model.kind != "none":
            answers = arrays["answers"] = in_shares(partial(answer_log_likelihood, model), test_set)
            result["effect"] = mean_and_error(answers[:, 0] - answers[:, 1])
    except KeyboardInterrupt:
        again = f"go on with --resume {folder}" if tune and method.name == "cetrec" else ""
        raise KeyboardInterrupt(again) from None
    finish(folder, record | result, arrays, test_set, tune)
    return folder


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="cetrec.py",
                description="CETRec: tune a Llama so that the order of a history counts, then "
                "measure it.",
                epilog="docs/readings.md explains D1 to D15, what the paper leaves open.")
    add_flags(ap, Options, Where)
    given = parse(ap, argv)
    old = {what: Path(given.pop(what)) for what in ("resume", "eval_only", "reproduce")
           if what in given}

    def work() -> None:
        """A new run, or one that goes on, or one that is evaluated or done again."""
        if len(old) > 1:
            raise ValueError(f"{' and '.join(map(as_flag, old))}: one at a time")
        if not old:
            run(out=Path(given.pop("out", "runs")), options=Options.from_flags(given))
        for what, folder in old.items():
            options, base = read_run(folder, given, as_flag(what))
            if what == "reproduce":
                again = run(options, Path(given.get("out", folder.parent)), base=base, like=folder)
                print(differences(folder, again))
            else:
                run(options, folder.parent, folder, base, tune=what == "resume")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
