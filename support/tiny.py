"""The embedded base: a small Llama that knows titles and what goes with what, but no order.

It is trained from scratch on the training split with every history shuffled. So whatever a model
tuned from it knows about order, it has learned in tuning. It is written as an ordinary checkpoint
folder, which any program that reads Llama checkpoints can read.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import NO_ITEM, Batch, Sequences, Tokenizer, batches, build_prompt
from llama import Llama, LlamaConfig, save_llama


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
        vocab_size=pieces, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=sorted(level.alphabet()), show_progress=False))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
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
    """The batch with every title token of the history supervised too, which is ten times the signal
    of the answer alone."""
    labels, in_title = batch.labels.clone(), batch.item_pos[:, 1:] != NO_ITEM
    labels[:, :-1][in_title] = batch.tokens[:, 1:][in_title]
    return replace(batch, labels=labels)


def tiny_base(root: Path, train_set: Sequences, seed: int, device: torch.device,
              recipe: TinyBase) -> Path:
    """The checkpoint folder of the embedded base, made on first use and kept below root.

    The folder's name is a digest of all that it was made from.
    """
    source = hashlib.sha256(json.dumps([asdict(recipe), train_set.domain, seed,
                                        train_set.titles]).encode())
    for array in (train_set.items, train_set.starts, train_set.targets):
        source.update(array.tobytes())
    folder = root / f"tiny-{source.hexdigest()[:12]}"
    if (folder / "config.json").is_file():                  # written last
        return folder
    torch.manual_seed(seed)
    tokenizer, heads = tokenizer_for(train_set, recipe.pieces), recipe.num_attention_heads
    llama = Llama(LlamaConfig(
        vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size, num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=recipe.hidden_size // heads,
        rope_theta=10_000.0, max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True)).to(device)
    pretrain(llama, tokenizer, train_set, seed, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.bpe.save(str(folder / "tokenizer.json"))
    for name, content in (
            ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1}),
            ("tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": False})):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_llama(llama, folder)
    return folder


def pretrain(llama: Llama, tokenizer: Tokenizer, train_set: Sequences, seed: int,
             recipe: TinyBase) -> None:
    """Next-token training on titles, histories shuffled: linear warm-up, then linear decay."""
    wanted = max(recipe.epochs * len(train_set), recipe.least_steps * recipe.batch_size)
    total = math.ceil(min(wanted, recipe.max_sequences) / recipe.batch_size)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=recipe.lr, betas=(0.9, 0.98),
                                  weight_decay=recipe.weight_decay, fused=True)
    warmup = min(recipe.warmup, max(1, total // 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(
        (done + 1) / warmup, (total - done) / max(1, total - warmup), 1.0))
    rng, device = np.random.default_rng([seed, 1]), llama.norm.weight.device
    llama.train()
    step, started = 0, time.perf_counter()
    with tqdm(total=total, desc="tiny base", unit="step", disable=None, leave=False) as bar:
        while step < total:
            for batch in batches(tokenizer, train_set, recipe.batch_size, rng, True):
                batch = supervise_titles(batch).to(device)
                hidden = llama(batch.tokens, wanted=batch.places)           # (B, A, C)
                logits = llama.logits(hidden.flatten(0, 1)[batch.supervised])
                loss = F.cross_entropy(logits, batch.targets)
                loss.backward()
                nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update()
                if step % max(1, total // 4) == 0 or step == 10:
                    left = (time.perf_counter() - started) / step * (total - step) / 60
                    bar.write(f"tiny base | step {step:>5}/{total} | loss {loss.item():.3f} per "
                              f"title token | {left:.1f} min left", file=sys.stdout)
                if step == total:
                    break
