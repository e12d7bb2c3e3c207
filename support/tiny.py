"""The built-in base: a small Llama that knows titles and what goes with what, but no order.

It is trained from scratch on the training split with every history shuffled. So whatever a model
tuned from it knows about order, it has learned in tuning. It is written as an ordinary checkpoint
folder, which any program that reads Llama checkpoints can read.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, NO_ITEM, Batch, Sequences, Tokenizer, batches, build_prompt
from llama import Llama, LlamaConfig, causal_mask, save_llama, token_positions
from support import progress
from support.checkpoints import check_context
from support.files import locked, naming, write_json, write_whole
from support.processes import agreed, first_process_first


@dataclass(frozen=True)
class TinyBase:
    """How `--model tiny` is made. The numbers were chosen on validation splits."""

    pieces: int = 1024              # of the tokenizer, besides whole words
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.3
    epochs: float = 1.5
    least_steps: int = 300          # small data get more epochs
    max_sequences: int = 400_000    # training ends here on large data


TINY_BASES = {      # all other data sets take TinyBase()
    "synthetic": TinyBase(pieces=300, hidden_size=64, intermediate_size=192, lr=3e-3,
                          weight_decay=0.1, epochs=2)}

# Byte-level BPE writes a space as another character, so no title can be taken for one of these.
BOS, EOS = "<|begin of text|>", "<|end of text|>"
SEEN = 5        # a title of which training has seen fewer answers is spelled in pieces


def tiny_tokenizer(titles: list[str], counts: np.ndarray, domain: str, pieces: int) -> Tokenizer:
    """Byte-level BPE of so many pieces, trained on the titles, and whole words besides.

    A word reaches from quote to quote: it is a title, or `", "`, or the prompt's text before the
    first quote. (A sequel's number at the end of a title is a word of its own, so that the parts of
    a series share its name.) The prompt's words and those of titles that training saw SEEN times
    get a token each, which is taken before anything is merged, as in Llama 3's own tokenizer. So
    prompts are short, and the names of rare titles are spelled in pieces.
    """
    pre, level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre.Sequence([
        pre.Split(tokenizers.Regex(r'", "|"| \d+(?="|$)|(?:(?! \d+(?:"|$))[^"])+'), "isolated"),
        level(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(titles, tokenizers.trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=[BOS, EOS],
        initial_alphabet=sorted(level.alphabet()), show_progress=False))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, 0)])
    content = json.loads(bpe.to_str())
    vocabulary = content["model"]["vocab"]
    for text in (build_prompt(titles[:2], domain)[0],
                 *(f'"{title}"' for title, count in zip(titles, counts) if count >= SEEN)):
        for word, _ in bpe.pre_tokenizer.pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), eos_ids=(1,), bos_id=0,
                     pad_id=1)


def tokenizer_for(train_set: Sequences, pieces: int) -> Tokenizer:
    """tiny_tokenizer of a training split."""
    counts = np.bincount(train_set.items[train_set.targets], minlength=len(train_set.titles))
    return tiny_tokenizer(train_set.titles, counts, train_set.domain, pieces)


def supervise_titles(batch: Batch) -> Batch:
    """The batch with the title tokens of the history supervised too, which is ten times the signal
    of the answer alone. The first token of a history is not: nothing could predict it.
    answers (B, A) -> (B, T)"""
    T, item = batch.tokens.shape[1], batch.item_pos != NO_ITEM
    following = torch.cat((batch.tokens[:, 1:], batch.answers[:, -1:]), dim=1)
    supervised = item[:, 1:] & (item.cumsum(dim=1)[:, :-1] > 0)
    answers = F.pad(batch.answers, (T - batch.answers.shape[1], 0), value=IGNORE)
    return replace(batch, answers=torch.where(F.pad(supervised, (0, 1)), following, answers))


def tiny_base(root: Path, splits: tuple[Sequences, ...], seed: int, device: torch.device,
              recipe: TinyBase) -> Path:
    """The checkpoint folder of the built-in base, made of splits[0] on first use, kept below root.

    The folder's name is a digest of all that it was made from. Raises ValueError, before anything
    is made, if a prompt of any split exceeds the base's context.
    """
    train_set = splits[0]
    source = hashlib.sha256(json.dumps([asdict(recipe), train_set.domain, seed,
                                        train_set.titles]).encode())
    for array in (train_set.items, train_set.starts, train_set.targets):
        source.update(array.tobytes())
    folder = root / f"tiny-{source.hexdigest()[:12]}"
    if agreed((folder / "config.json").is_file()):          # written last
        return folder
    tokenizer = tokenizer_for(train_set, recipe.pieces)
    for part in splits:
        check_context(tokenizer, part, recipe.max_position_embeddings)
    with first_process_first():
        make(folder, tokenizer, train_set, seed, device, recipe)
    return folder


def make(folder: Path, tokenizer: Tokenizer, train_set: Sequences, seed: int,
         device: torch.device, recipe: TinyBase) -> None:
    """Train a base and write it, unless another run has done so in the meantime."""
    if (folder / "config.json").is_file():
        return
    heads = recipe.num_attention_heads
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        if not (folder / "config.json").is_file():          # else another process has made it
            torch.manual_seed(seed)
            llama = Llama(LlamaConfig(
                vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=recipe.hidden_size,
                intermediate_size=recipe.intermediate_size, num_attention_heads=heads,
                num_hidden_layers=recipe.num_hidden_layers, num_key_value_heads=heads,
                head_dim=recipe.hidden_size // heads, rope_theta=10_000.0,
                max_position_embeddings=recipe.max_position_embeddings,
                tie_word_embeddings=True)).to(device)
            pretrain(llama, tokenizer, train_set, seed, recipe, folder)
            write_base(llama, tokenizer, folder)


def write_base(llama: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a finished base as a checkpoint folder, config.json last, and clear away the rest."""
    write_whole(folder / "tokenizer.json", tokenizer.bpe.to_str(pretty=True).encode())
    for name, content in (
            ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1}),
            ("tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
                "clean_up_tokenization_spaces": False})):
        write_json(folder / name, content)
    with naming(folder / "model.safetensors"):
        save_llama(llama, folder)
    for name in ("log.jsonl", "checkpoint.safetensors", ".lock"):
        (folder / name).unlink(missing_ok=True)


def pretrain(llama: Llama, tokenizer: Tokenizer, train_set: Sequences, seed: int,
             recipe: TinyBase, folder: Path) -> None:
    """Next-token training on titles, histories shuffled: linear warm-up, then linear decay.

    A checkpoint in the folder lets it continue after an interruption.
    """
    sequences = max(recipe.epochs * len(train_set), recipe.least_steps * recipe.batch_size)
    total = math.ceil(min(sequences, recipe.max_sequences) / recipe.batch_size)
    warmup, device = min(recipe.warmup, max(1, total // 2)), llama.norm.weight.device
    optimizer = torch.optim.AdamW(llama.parameters(), lr=recipe.lr, betas=(0.9, 0.98),
                                  weight_decay=recipe.weight_decay, fused=True)
    done = progress.load_checkpoint(folder, optimizer)
    per_epoch = math.ceil(len(train_set) / recipe.batch_size)
    llama.train()
    with progress.begin(folder, done, total, "tiny base") as bar:
        for epoch in range(done.step // per_epoch, math.ceil(total / per_epoch)):
            steps = range(epoch * per_epoch + 1, total + 1)
            for step, batch in zip(steps, batches(tokenizer, train_set, recipe.batch_size,
                                                  [seed, 1, epoch], shuffle_histories=True)):
                if step <= done.step:
                    continue                                # it was made before an interruption
                lr = recipe.lr * min(step / warmup, 1.0,
                                     (total - step + 1) / max(1, total - warmup))
                loss = title_loss(llama, supervise_titles(batch).to(device))
                loss.backward()
                norm = nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
                if not norm.isfinite():
                    raise ValueError(progress.not_finite(step, float(norm), batch, tokenizer))
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()

                done.step = step
                if progress.log_step(folder, bar, done, loss.detach().repeat(2), 0.0, lr,
                                     "tiny base | "):
                    progress.save_checkpoint(folder, optimizer, done)


def title_loss(llama: Llama, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens, and of each history's first token.

    Nothing before the first token of a history could predict it, so it is asked for at its own
    position. This teaches the model to copy, which it needs where the next title shares a word with
    an earlier one: on the synthetic world it lowers the validation loss of the answers from 0.919
    to 0.907 (seed 0). There is no temporal embedding.
    """
    T = batch.tokens.shape[1]
    hidden, _ = llama(llama.embed(batch.tokens), token_positions(batch.padding, T),
                      causal_mask(batch.padding, T))
    hidden, answers, tokens = hidden.flatten(0, 1), batch.answers.flatten(), batch.tokens.flatten()
    title = batch.item_pos != NO_ITEM
    supervised = (answers != IGNORE).nonzero()[:, 0]
    first = (title & (title.cumsum(dim=1) == 1)).flatten().nonzero()[:, 0]
    logits = llama.logits(hidden[torch.cat((supervised, first))])
    return F.cross_entropy(logits, torch.cat((answers[supervised], tokens[first])))
