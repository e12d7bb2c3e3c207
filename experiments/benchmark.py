"""Speed and memory beside other stacks and beside the machine's limit; nothing here is the method.

    python -m experiments.benchmark                             all that needs no data, 15 minutes
    python -m experiments.benchmark tuning generation           some of it
    python -m experiments.benchmark evaluation --run runs/ml-100k-rope-1 --data-dir data
    python -m experiments.benchmark tuning generation --device cuda --shapes 8b

Contenders work in processes of their own, which keep their model from round to round, and take
turns, one working while the others wait: a busy machine slows all alike. A time is the median over
rounds, a ratio the median of the rounds' ratios; memory is the peak of a process less what it held
before its model was made. What cannot run here says "not measured". transformers and peft are
wanted for their own rows only.
"""

import contextlib
import gzip
import importlib
import importlib.util
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import cetrec
import data
from cetrec import TemporalLlama, cetrec_loss, erase_order, open_tuned, rotary, tuned_parameters
from data import (IGNORE, NO_ITEM, Batch, Catalogue, Example, batches, collate, make_sequences,
                  split_by_time)
from evaluate import GroundedBeams, beam_search, nearest
from llama import Llama, LlamaConfig, causal_mask, save_llama, token_positions
from lora import LoraLinear, add_lora
from support.datasets import load_interactions, prepare
from support.files import write_json
from support.memory import peak_memory, rows_that_fit
from support.processes import my_parts
from support.runs import wrap_blocks
from support.synthetic import GENRES, SyntheticWorld
from support.terminal import Parser, exit_status
from support.tiny import TINY_BASES, tiny_tokenizer, tokenizer_for
from support.trie import Trie, catalogue_log_likelihood

SHAPES = {      # width, layers, heads, key/value heads, inner width, vocabulary, tied
    "tiny": (128, 4, 4, 4, 384, 4_096, True),
    "135m": (576, 30, 9, 3, 1_536, 49_152, True),
    "8b": (4_096, 32, 32, 8, 14_336, 128_256, False),
}
TEMPLATE = 45       # tokens that all prompts begin with
LIBRARIES = {"transformers": ("transformers.models.llama.modeling_llama", "transformers.generation",
                             "peft.tuners.lora")}


def shape(name: str, vocabulary: int | None = None) -> LlamaConfig:
    """The configuration of a named shape, perhaps with another vocabulary."""
    width, layers, heads, kv_heads, inner, words, tied = SHAPES[name]
    return LlamaConfig(vocabulary or words, width, inner, layers, heads, kv_heads, width // heads,
                       4_096, tie_word_embeddings=tied)


def examples(config: LlamaConfig, n: int, items: int = 10, seed: int = 0) -> list[Example]:
    """Made-up prompts: a template, titles of 7 to 13 tokens, a tail, an answer of 6 to 12."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(10, config.vocab_size) for _ in range(rng.randint(low, high))]
    begin, end, rows = words(TEMPLATE, TEMPLATE), words(25, 25), []
    for _ in range(n):
        tokens, item_pos = list(begin), [NO_ITEM] * TEMPLATE
        for k in range(items - 1, -1, -1):
            title = words(7, 13)
            tokens, item_pos = tokens + title + [5], item_pos + [k] * len(title) + [NO_ITEM]
        answer = words(6, 12)
        rows.append(Example(tokens + end + answer, item_pos + [NO_ITEM] * len(end + answer),
                            [IGNORE] * len(tokens + end) + answer))
    return rows


def random_llama(config: LlamaConfig, device: str, dtype: torch.dtype) -> Llama:
    """Weights as they are initialised, all frozen; made where they stay."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Llama(config)
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


# ----------------------------------------------------------------------------------------------
# Contenders: functions that make a model and return what a round does


def ours_tuning(config, batch_size, device, dtype, without="", lambda_ct=0.1, items=10,
                batches_a_round=1, rows=0, compile_blocks=False) -> Callable:
    """One tuning step of ours, or one for each batch of a round. Returns the last step's loss.

    without: the idea that is left out. rows: worked on at a time, 0 as the command chooses.
    """
    leave_out(without)
    llama = random_llama(config, device, dtype)
    wrap_blocks(llama, SimpleNamespace(recompute=False, compile=compile_blocks))
    model = TemporalLlama(llama, "rope").train()
    optimizer = torch.optim.AdamW(add_lora(model), lr=1e-4)
    drawn = examples(config, batches_a_round * batch_size, items)
    if without != "rows of similar length together":
        drawn.sort(key=lambda example: len(example.tokens))
    chunks = [collate(drawn[i:i + batch_size]).to(device) for i in range(0, len(drawn), batch_size)]

    def work() -> float:
        for batch in chunks:
            fit = batch_size if without in ("few rows at a time", "all of them") else (
                rows or rows_that_fit(config, batch, torch.device(device)))
            loss = tuning_step(model, batch, optimizer, lambda_ct, fit)
        return float(loss)
    return work


def tuning_step(model: TemporalLlama, batch: Batch, optimizer: torch.optim.Optimizer,
                lambda_ct: float, rows: int) -> torch.Tensor:
    """What cetrec.train does with a batch, so many rows at a time.  -> (), the loss before it"""
    total = torch.zeros((), device=batch.tokens.device)
    for part, share in my_parts(batch, rows):
        loss = share * cetrec_loss(model, part, lambda_ct)[0]
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(tuned_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


IDEAS = ("logits at answers only", "last block at answers only", "common prefix once",
         "both worlds in one pass", "LoRA added in place", "few rows at a time",
         "rows of similar length together")


def leave_out(idea: str) -> None:
    """Put the straightforward way in the place of one idea, or of all, in this process.

    The last two of IDEAS are left out by ours_tuning itself.
    """
    def absent(name: str) -> bool:
        return idea in (name, "all of them")
    if absent("logits at answers only"):
        cetrec.answer_logits = partial(logits_of_all_columns, everywhere=True)
    elif absent("last block at answers only"):
        cetrec.answer_logits = logits_of_all_columns
    if absent("common prefix once"):
        data.common_prefix = lambda examples: 0
    if absent("both worlds in one pass"):
        cetrec.twin_forward = lambda model, batch: tuple(
            cetrec.answer_logits(model, batch, item_pos)
            for item_pos in (batch.item_pos, erase_order(batch.item_pos)))
    if absent("LoRA added in place"):
        LoraLinear.forward = lora_added_apart


def logits_of_all_columns(model, batch: Batch, item_pos, everywhere: bool = False) -> torch.Tensor:
    """cetrec.answer_logits with hidden states of all columns, and perhaps with their logits."""
    worlds, P = len(item_pos) // len(batch.tokens), len(batch.prefix)
    T, A = batch.tokens.shape[1], batch.answers.shape[1]
    _, past = model(batch.prefix[None], torch.full_like(batch.prefix[None], NO_ITEM))
    padding = batch.padding.repeat(worlds)
    hidden, _ = model(batch.tokens.repeat(worlds, 1), item_pos, token_positions(padding, T, P),
                      causal_mask(padding, T, P), past)
    answered = F.pad(batch.answers != IGNORE, (T - A, 0)).repeat(worlds, 1)         # (n B, T)
    return model.logits(hidden)[answered] if everywhere else model.logits(hidden[answered])


def lora_added_apart(linear: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """LoraLinear.forward with the product as a tensor of its own."""
    low = F.linear(F.dropout(x, linear.config.dropout, linear.training), linear.A.to(x.dtype))
    return F.linear(x, linear.weight) + linear.config.scale * F.linear(low, linear.B.to(x.dtype))


def theirs_tuning(config, batch_size, device, dtype) -> Callable:
    """The same step as users of transformers and peft write it: two forwards, all logits, rows
    padded on the left.
    """
    import peft
    drawn = examples(config, batch_size)
    model = peft.get_peft_model(published(config, device, dtype), peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM")).train()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    T = max(len(e.tokens) for e in drawn)
    tokens, mask, labels, item_pos = (torch.tensor(
        [[fill] * (T - len(e.tokens)) + list(part(e)) for e in drawn], device=device)
        for fill, part in ((0, lambda e: e.tokens), (0, lambda e: [1] * len(e.tokens)),
                           (IGNORE, lambda e: e.labels), (NO_ITEM, lambda e: e.item_pos)))
    embed, targets = model.get_input_embeddings(), labels[:, 1:].flatten()

    def ce(logits):
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets)

    def step() -> float:
        """Two forwards, one loss, one update."""
        factual, erased = (model(inputs_embeds=rotary(embed(tokens), k.clamp(min=0)),
                                 attention_mask=mask).logits
                           for k in (item_pos, erase_order(item_pos)))
        loss = ce(factual) + 0.1 * ce(factual.float() - erased.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def published(config, device, dtype):
    """transformers' model with the weights of random_llama, which each device draws otherwise."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_llama(random_llama(config, device, dtype), folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def ours_generation(config, prompts, new, device, dtype) -> Callable:
    """Five beams for every prompt. -> sequences"""
    model = TemporalLlama(random_llama(config, device, dtype), "none").eval()
    drawn = [(tokens, [NO_ITEM] * len(tokens)) for tokens in map(prompt, examples(config, prompts))]

    def generate() -> list:
        return beam_search(model, drawn, 5, new, length_penalty=1.0, eos_ids=[7])[0]
    return generate


def prompt(example: Example) -> list[int]:
    """Its tokens before the answer."""
    return [t for t, label in zip(example.tokens, example.labels) if label == IGNORE]


def theirs_generation(config, prompts, new, device, dtype) -> Callable:
    """The same by `generate`, rows padded on the left."""
    model = published(config, device, dtype).eval()
    drawn = [prompt(e) for e in examples(config, prompts)]
    T = max(map(len, drawn))
    tokens = torch.tensor([[0] * (T - len(p)) + p for p in drawn], device=device)
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in drawn], device=device)

    def generate() -> list:
        out = model.generate(tokens, attention_mask=mask, num_beams=5, num_return_sequences=5,
                             max_new_tokens=new, min_new_tokens=4, length_penalty=1.0,
                             do_sample=False, eos_token_id=7, pad_token_id=0)
        return out[:, T:].view(prompts, 5, -1).tolist()
    return generate


def made_up_titles(n: int) -> list[str]:
    """Franchises of eight parts with two or three words to their names."""
    words = [word for pair in GENRES.values() for text in pair for word in text.split()]
    titles = []
    for i in range(n):
        franchise, part = divmod(i, 8)
        first, second, third = (franchise // len(words) ** power % len(words) for power in range(3))
        titles.append(words[first] + " " + words[second] + (f" of {words[third]}" if third else "")
                      + (f" {part + 1}" if part else ""))
    return titles


def all_titles(titles: int, users: int, apart: bool) -> Callable:
    """log p of every title for some users, on the tiny shape. -> (users, titles)

    All are scored by one trie; or each apart, in a row of prompt and title without any idea of
    IDEAS, 32 rows at a time.
    """
    names = made_up_titles(titles)
    tokenizer = tiny_tokenizer(names, np.zeros(titles), "movies", 4_096)
    config = shape("tiny", tokenizer.bpe.get_vocab_size())
    model = TemporalLlama(random_llama(config, "cpu", torch.float32), "rope")
    prompts = [(prompt(e), e.item_pos[:len(prompt(e))]) for e in examples(config, users)]
    trie = Trie(Catalogue(names, "movies", tokenizer))
    if apart:
        leave_out("all of them")

    @torch.inference_mode()
    def rows() -> list:
        """Each title in a row of its own behind the prompt."""
        answers = sorted((answer, items) for answer, items in trie.items.items())
        scores = torch.zeros(users, titles)
        for user, (tokens, item_pos) in enumerate(prompts):
            for start in range(0, len(answers), 32):
                part = answers[start:start + 32]
                batch = collate([Example(tokens + list(a), item_pos + [NO_ITEM] * len(a),
                                         [IGNORE] * len(tokens) + list(a)) for a, _ in part])
                answered = batch.answers != IGNORE
                log_p = torch.zeros(answered.shape)
                log_p[answered] = -F.cross_entropy(
                    cetrec.answer_logits(model, batch, batch.item_pos), batch.answers[answered],
                    reduction="none")
                for value, (_, items) in zip(log_p.sum(dim=1), part):
                    scores[user, items] = value
        return scores.tolist()
    return rows if apart else lambda: catalogue_log_likelihood(model, prompts, trie).tolist()


def grounding(titles: int) -> Callable:
    """500 texts against a table of titles, width 128. -> nothing"""
    torch.manual_seed(0)
    table, texts = torch.randn(titles, 128), torch.randn(500, 128)

    def ground() -> None:
        nearest(texts, table, 20)
    return ground


def matrix_product(device, dtype, n=4_096) -> Callable:
    """n x n times n x n. -> FLOP"""
    a = torch.randn(n, n, device=device).to(dtype)

    def multiply() -> float:
        torch.mm(a, a)
        return 2.0 * n ** 3
    return multiply


def flop_count(config: LlamaConfig, batch: Batch) -> float:
    """FLOP of one twin tuning step as it runs.

    They are 4 for each frozen weight that a token passes (2 forward, 2 for the gradient of its
    input), and likewise for attention and logits. The prefix counts once, and the last block's
    queries, outputs and MLP in the columns of the answers only. LoRA's own are left out; they are
    under 2 %.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    H, G = config.num_attention_heads, config.num_key_value_heads
    (B, T), P, A = batch.tokens.shape, len(batch.prefix), batch.answers.shape[1]
    keys = 2 * C * G * D
    rest = 2 * C * H * D + 3 * C * config.intermediate_size
    tokens, tokens_of_last_block = 2 * B * T + P, 2 * B * A + P
    weights = L * tokens * keys + ((L - 1) * tokens + tokens_of_last_block) * rest
    seen = 2 * B * T * (P + T / 2)                          # pairs of query and key, causal
    attention = 2 * H * D * ((L - 1) * seen + 2 * B * A * (P + T))
    return 4 * (weights + attention + 2 * answer_tokens(batch) * C * config.vocab_size)


def answer_tokens(batch: Batch) -> int:
    """How many tokens are supervised."""
    return int((batch.answers != IGNORE).sum())


# ----------------------------------------------------------------------------------------------
# Races


@dataclass
class Timing:
    """Of one contender: seconds of each round, peak GB, what the first round returned and took."""

    seconds: list[float]
    gigabytes: float
    result: object
    first: float

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def worker(pipe, modules, contender, arguments) -> None:
    """A contender's process: make the model, then a round whenever asked."""
    device = torch.device(arguments.get("device", "cpu"))
    for module in modules:
        importlib.import_module(module)
    before = peak_memory(device)
    work = contender(**arguments)
    if device.type == "cuda":       # published() has had the weights there twice
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    first = work(), time.perf_counter() - started
    for _ in range(2):
        work()
    pipe.send(first)
    while pipe.recv():
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)
    pipe.send(peak_memory(device) - before)


def race(contenders: dict, rounds: int) -> dict[str, Timing]:
    """Let contenders {name: (function, arguments)} take turns, after three rounds of their own."""
    context, running = multiprocessing.get_context("spawn"), {}
    for name, (contender, arguments) in contenders.items():
        ours, its = context.Pipe()
        modules = LIBRARIES["transformers"] if contender in (theirs_tuning,
                                                            theirs_generation) else ()
        process = context.Process(target=worker, args=(its, modules, contender, arguments))
        process.start()
        its.close()
        running[name] = ours, process, Timing([], 0.0, *ours.recv())
    for _ in range(rounds):
        for pipe, _, timing in running.values():
            pipe.send(True)
            timing.seconds.append(pipe.recv())
    for pipe, process, timing in running.values():
        pipe.send(False)
        timing.gigabytes = pipe.recv()
        process.join()
    return {name: timing for name, (_, _, timing) in running.items()}


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over rounds of how many times longer the slow one took."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds))


# ----------------------------------------------------------------------------------------------
# Data preparation


def movielens(data_dir: str) -> str:
    """ML-1M from its text files to the split, the whole 5-core."""
    started = time.perf_counter()
    raw = load_interactions("movielens", data_dir)
    train_set, valid_set, test_set = split_by_time(make_sequences(prepare(raw, "movielens", 1.0)))
    seconds = time.perf_counter() - started
    sequences = len(train_set) + len(valid_set) + len(test_set)
    return f"{seconds:.1f} s for {len(raw.users):,} ratings, {sequences:,} sequences"


def steam(lines: int) -> str:
    """Reading and preparing a file of reviews as Steam's lie, made here, a third as many users."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "steam-mcauley"
        folder.mkdir()
        with gzip.open(folder / "steam_games.json.gz", "wt", compresslevel=1) as file:
            file.writelines(f"{{u'id': u'{g}', u'title': u'Game {g}'}}\n" for g in range(15_474))
        users = (lines // 3 * rng.random(lines) ** 3).astype(int)       # a few write a lot
        games = rng.integers(0, 15_474, lines)
        days = [str(np.datetime64("2010-10-15") + d) for d in rng.integers(0, 2_600, 5_000)]
        text = "Good game, and it\\'s fun to play with friends \\u2122. " * 3
        with gzip.open(folder / "steam_reviews.json.gz", "wt", compresslevel=1) as file:
            file.writelines(
                f"{{u'username': u'user {u}', u'hours': 0.1, u'product_id': u'{g}', u'page': 1, "
                f"u'date': u'{days[i % 5_000]}', u'text': u'{text}', u'early_access': False}}\n"
                for i, (u, g) in enumerate(zip(users, games)))
        started = time.perf_counter()
        raw = load_interactions("steam", root)
        read = time.perf_counter() - started
    prepare(raw, "steam")
    return f"{lines / read:,.0f} lines/s, streamed; {lines:,} made-up reviews"


def tokenisation() -> str:
    """Prompts and answers to padded batches of 64, tiny tokenizer, the synthetic world."""
    train_set, _, _ = split_by_time(make_sequences(SyntheticWorld().interactions()))
    tokenizer = tokenizer_for(train_set, TINY_BASES["synthetic"].pieces)
    started = time.perf_counter()
    done = sum(len(batch.tokens) for _ in range(4) for batch in
               batches(tokenizer, train_set, 64, [0]))
    return f"{done / (time.perf_counter() - started):,.0f} prompts/s, tiny tokenizer, batches of 64"


# ----------------------------------------------------------------------------------------------
# Sections: each prints its rows and returns what goes to benchmark.json


def have(*modules: str) -> bool:
    """Are optional packages installed?"""
    return all(importlib.util.find_spec(module) for module in modules)


def row(name: str, *cells: str) -> None:
    """Print one line of the table."""
    print(f"  {name:<44} " + " | ".join(cells), flush=True)


def timed(timing: Timing, weights: float | None = None) -> str:
    """Time and memory of a contender, and what of it goes beyond its weights, GB."""
    beyond = "" if weights is None else f", {timing.gigabytes - weights:.2f} beyond the weights"
    return f"{1000 * timing.median:9,.0f} ms | {timing.gigabytes:6.2f} GB{beyond}"


def weights_of(config: LlamaConfig, dtype: torch.dtype) -> float:
    """GB."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters()) * dtype.itemsize / 1e9


def tuning(options) -> dict:
    """The tuning step beside transformers + peft, beside one world, and beside the machine."""
    found = {}
    for name in options.shapes:
        config, B = shape(name), options.batch_size or {"tiny": 32, "135m": 4, "8b": 64}[name]
        batch = collate(sorted(examples(config, B), key=lambda e: len(e.tokens)))
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        common = {"config": config, "batch_size": B, "device": options.device}
        P = len(batch.prefix)
        print(f"tuning, {name} shape, {B} sequences of {P + batch.tokens.shape[1]} tokens at most, "
              f"{P} in common, {answer_tokens(batch)} targets, {dtype} weights, LoRA r = 8 on "
              "q_proj and v_proj")
        contenders = {"ours": (ours_tuning, common | {"dtype": dtype}),
                      "ours, all rows at a time": (ours_tuning, common | {"dtype": dtype,
                                                                          "rows": B}),
                      "ours, one world (λ = 0)": (ours_tuning, common | {
                          "dtype": dtype, "lambda_ct": 0}),
                      "limit": (matrix_product, {"device": options.device, "dtype": dtype})}
        stores = {"": dtype}
        if options.device == "cpu" and name != "tiny":
            stores[", bfloat16 weights"] = torch.bfloat16
        for what, stored in stores.items():
            if stored != dtype:
                contenders["ours" + what] = ours_tuning, common | {"dtype": stored}
            contenders[f"ours{what}, compiled"] = ours_tuning, common | {
                "dtype": stored, "compile_blocks": True}
        if have("transformers", "peft"):
            contenders["transformers + peft"] = (theirs_tuning, common | {"dtype": dtype})
        times = race(contenders, options.rounds)
        ours, limit = times["ours"], times.pop("limit")
        for who, timing in times.items():
            stored = torch.bfloat16 if "bfloat16" in who else dtype
            cells = [timed(timing, weights_of(config, stored)),
                     f"{ratio(timing, ours):5.2f} x ours"]
            if timing.result is not None:
                cells.append(f"loss {timing.result:.4f}")
            if "compiled" in who:
                cells.append(f"first step {timing.first:.0f} s")
            row(who, *cells)
        if "transformers + peft" not in times:
            row("transformers + peft", "not measured: not installed")
        found[name] = {who: [timing.median, timing.gigabytes, ratio(timing, ours)]
                       for who, timing in times.items()}
        for who in ("ours", "ours, compiled"):
            reached = flop_count(config, batch) / times[who].median
            most = limit.result / limit.median
            share = statistics.median(flop_count(config, batch) / a / (limit.result / b)
                                      for a, b in zip(times[who].seconds, limit.seconds))
            row(f"{who}: share of the matrix product", f"{reached / 1e9:,.0f} of {most / 1e9:,.0f} "
                f"GFLOP/s, {100 * share:.0f} %")
            found[name][f"{who}: share of limit"] = share
    return found


def ablation(options) -> dict:
    """Our step with one idea left out at a time."""
    name = options.shapes[0]
    config, B = shape(name), options.batch_size or {"tiny": 32, "135m": 4, "8b": 64}[name]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    print(f"ablation, {name} shape, batches of {B}, four batches a round: time and memory without "
          "each idea")
    common = {"config": config, "batch_size": B, "device": options.device, "dtype": dtype,
              "batches_a_round": 4}
    times = race({"ours": (ours_tuning, common)} | {
        idea: (ours_tuning, common | {"without": idea}) for idea in (*IDEAS, "all of them")},
        options.rounds)
    for idea, timing in times.items():
        row(idea if idea == "ours" else f"without {idea}", timed(timing),
            f"{ratio(timing, times['ours']):5.2f} x ours")
    return {idea: [timing.median, timing.gigabytes, ratio(timing, times["ours"])]
            for idea, timing in times.items()}


def generation(options) -> dict:
    """Five beams beside transformers' generate."""
    found, new = {}, 12
    for name in options.shapes:
        config, n = shape(name), options.batch_size or {"tiny": 64, "135m": 8, "8b": 256}[name]
        lengths = [len(prompt(e)) for e in examples(config, n)]
        print(f"generation, {name} shape, {n} prompts of {min(lengths)} to {max(lengths)} tokens, "
              f"{TEMPLATE} in common, 5 beams, {new} new tokens")
        common = {"config": config, "prompts": n, "new": new, "device": options.device,
                  "dtype": torch.float32 if options.device == "cpu" else torch.bfloat16}
        contenders = {"ours": (ours_generation, common)}
        if have("transformers"):
            contenders["transformers' generate"] = (theirs_generation, common)
        times = race(contenders, options.rounds)
        for who, timing in times.items():
            row(who, timed(timing, weights_of(config, common["dtype"])),
                f"{ratio(timing, times['ours']):5.2f} x ours")
        if len(times) == 2:
            ours, theirs = (t.result for t in times.values())
            same = np.mean([a == b[:len(a)] for x, y in zip(ours, theirs) for a, b in zip(x, y)])
            row("sequences that agree", f"{100 * same:.1f} %")
        else:
            row("transformers' generate", "not measured: not installed")
        found[name] = {who: [timing.median, timing.gigabytes, ratio(timing, times["ours"])]
                       for who, timing in times.items()}
    return found


def catalogue(options) -> dict:
    """Log-likelihoods of a whole catalogue, and grounding, by its size."""
    titles, users = 1_682, 2
    print(f"catalogue, tiny shape, log p of all {titles:,} titles for {users} users")
    times = race({"one trie": (all_titles, {"titles": titles, "users": users, "apart": False}),
                  "each title apart": (all_titles, {"titles": titles, "users": users,
                                                    "apart": True})}, options.rounds)
    for who, timing in times.items():
        row(who, timed(timing), f"{ratio(timing, times['one trie']):5.2f} x")
    gap = np.abs(np.array(times["one trie"].result) - np.array(times["each title apart"].result))
    row("largest difference", f"{gap.max():.1e} nats")
    found = {who: [t.median, t.gigabytes] for who, t in times.items()} | {"sizes": {}}
    print("by the number of titles: all of them for one user; 500 texts grounded")
    for n in (1_000, 10_000, 100_000):
        times = race({"trie": (all_titles, {"titles": n, "users": 1, "apart": False}),
                      "ground": (grounding, {"titles": n})}, max(1, options.rounds // 2))
        row(f"{n:,}", *(f"{who} {timed(t)}" for who, t in times.items()))
        found["sizes"][n] = {who: [t.median, t.gigabytes] for who, t in times.items()}
    return found


def scaling(options) -> dict:
    """Time of a tuning step by batch, history and vocabulary."""
    body = options.shapes[-1]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    base = {"config": shape(options.shapes[0]), "batch_size": 32, "device": options.device,
            "dtype": dtype}
    grids = {
        f"sequences in a batch, {options.shapes[0]} shape": {
            B: base | {"batch_size": B} for B in (8, 16, 32, 64)},
        f"items in a history, {options.shapes[0]} shape, batches of 32": {
            n: base | {"items": n} for n in (3, 5, 10, 20)},
        f"words in the vocabulary, {body} shape, batches of 4": {
            V: base | {"config": shape(body, V), "batch_size": 4}
            for V in (4_096, 32_000, 128_256)}}
    found = {}
    for what, grid in grids.items():
        print(f"a tuning step by {what}")
        times = race({str(x): (ours_tuning, arguments) for x, arguments in grid.items()},
                     options.rounds)
        first = next(iter(times.values()))
        for x, timing in times.items():
            row(f"{int(x):,}", timed(timing), f"{ratio(timing, first):5.2f} x the first")
        found[what] = {x: [timing.median, timing.gigabytes] for x, timing in times.items()}
        if "128256" in times:
            row("128,256 words cost, beside 32,000",
                f"{100 * (ratio(times['128256'], times['32000']) - 1):+.1f} % time")
    return found


def evaluation(options) -> dict:
    """1,000 test sequences of a finished run: five beams and grounding."""
    if not options.run:
        print("evaluation\n  not measured: name a finished run with --run")
        return {}
    flags = {} if options.data_dir == "data" else {"data_dir": options.data_dir}
    with contextlib.redirect_stdout(None):
        inputs, model = open_tuned(Path(options.run), flags, "--run")
    test_set = inputs.splits[2].sample(1_000, inputs.options.seed)
    decoding = inputs.options.decoding()
    numbers = range(len(test_set))
    ages = [test_set.ages(i) for i in numbers] if test_set.index == "time" else None
    started = time.perf_counter()
    recommend = GroundedBeams(model, inputs.catalogue, decoding)
    recommend([test_set.history(i) for i in numbers], ages)
    seconds = time.perf_counter() - started
    print(f"evaluation, {len(test_set):,} test sequences of {options.run}")
    row(str(decoding), f"{seconds:.1f} s | peak {peak_memory(torch.device('cpu')):.2f} GB")
    return {"seconds": seconds}


def preparation(options) -> dict:
    """Data preparation, each row in a process of its own."""
    print("data")
    work = [("ML-1M, text to split", movielens, options.data_dir),
            ("Steam, reading", steam, options.steam_lines),
            ("tokenising in the loop", tokenisation)]
    found = {}
    for name, function, *arguments in work:
        if function is movielens and not Path(options.data_dir, "ml-1m").is_dir():
            row(name, f"not measured: no ml-1m in {options.data_dir}")
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result, peak = pool.apply(measure, (function, *arguments))
        row(name, result, f"peak {peak:.2f} GB")
        found[name] = result
    return found


def measure(function, *arguments) -> tuple[str, float]:
    """(result, peak GB) of a function, run in this process."""
    return function(*arguments), peak_memory(torch.device("cpu"))


def draw(found: dict, folder: Path) -> None:
    """How time grows, a panel for each quantity, as PNG and SVG."""
    from matplotlib.figure import Figure
    grids = {what: {float(x): seconds for x, (seconds, _) in values.items()}
             for what, values in found.get("scaling", {}).items()}
    if sizes := found.get("catalogue", {}).get("sizes"):
        grids |= {f"titles, {who}": {float(n): values[key][0] for n, values in sizes.items()}
                  for key, who in (("trie", "all scored for one user"),
                                   ("ground", "500 texts grounded"))}
    if not grids:
        return
    fig = Figure(figsize=(4 * min(3, len(grids)), 3.2 * -(-len(grids) // 3)), layout="constrained")
    for n, (what, values) in enumerate(grids.items()):
        ax = fig.add_subplot(-(-len(grids) // 3), min(3, len(grids)), n + 1)
        ax.loglog(list(values), [1000 * s for s in values.values()], "o-", color="#1b3a5c")
        ax.set_xticks(list(values), [f"{x:,.0f}" for x in values], fontsize=8)
        ax.minorticks_off()
        ax.set_xlabel(what, fontsize=8)
        ax.set_ylabel("ms", fontsize=8)
        ax.set_ylim(bottom=min(values.values()) * 250, top=max(values.values()) * 4_000)
        ax.grid(color="0.9")
    for kind in ("png", "svg"):
        fig.savefig(folder / f"benchmark.{kind}", dpi=160)


SECTIONS = {"tuning": tuning, "ablation": ablation, "generation": generation,
            "catalogue": catalogue, "scaling": scaling, "evaluation": evaluation,
            "data": preparation}


def main(argv: list[str] | None = None) -> int:
    """Run the sections, print their tables, write benchmark.json and the figure."""
    ap = Parser(prog="python -m experiments.benchmark",
                usage="[SECTION ...] [flags]", description=__doc__,
                formatter_class=RawDescriptionHelpFormatter)
    ap.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS),
                    help=f"of {', '.join(SECTIONS)} (default: all)")
    ap.add_argument("--shapes", default="tiny,135m", help=f"of {', '.join(SHAPES)}, with commas "
                    "(default: %(default)s)")
    ap.add_argument("--rounds", type=int, default=5, help="each contender's (default: %(default)s)")
    ap.add_argument("--batch-size", type=int, help="sequences or prompts (default: by shape)")
    ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                    help="cuda takes bfloat16 weights (default: %(default)s)")
    ap.add_argument("--run", metavar="RUN", help="finished run to evaluate (default: none)")
    ap.add_argument("--data-dir", default="data", metavar="DIR",
                    help="folder with ml-1m/ as unpacked (default: %(default)s)")
    ap.add_argument("--steam-lines", type=int, default=200_000, metavar="N",
                    help="made-up reviews to stream; the real file has 7,793,069 (default: "
                    "%(default)s)")
    ap.add_argument("--out", default="runs/benchmark", metavar="DIR",
                    help="folder for benchmark.json and the figure (default: %(default)s)")
    options = ap.parse_args(argv)
    options.shapes = options.shapes.split(",")

    def work() -> None:
        """Check what was asked for, then measure it."""
        for names, known, what in ((options.sections, SECTIONS, "section"),
                                   (options.shapes, SHAPES, "shape")):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{what} {unknown[0]!r}; wanted some of {', '.join(known)}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no such device; not measured")
        card = torch.cuda.get_device_name() if options.device == "cuda" else ""
        print(f"machine | {card or platform.processor() or platform.machine()}, "
              f"{torch.get_num_threads()} threads | torch {torch.__version__}")
        folder, found = Path(options.out), {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.sections:
            found[name] = SECTIONS[name](options)
            write_json(folder / "benchmark.json", found)
        if have("matplotlib"):
            draw(found, folder)
        print(f"written {folder}/benchmark.json")
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
