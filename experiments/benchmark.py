"""Tuning and five beams beside transformers + peft, on the same weights, in one process.

    python -m experiments.benchmark                                     this CPU, 10 minutes
    python -m experiments.benchmark tuning --shapes tiny                some of it
    python -m experiments.benchmark --device cuda --shapes 135m 1b 8b   one GPU, meant for 8 minutes

Every round has other prompts, mostly of widths that no round before it had, as real batches have.
The contenders take turns in each round, so that a busy machine slows all alike; a ratio is the
median of the rounds' ratios. The weights are random, which changes no time. transformers and peft
are wanted for their own rows only, and what cannot run here says "not measured".
"""

import contextlib
import importlib.util
import gc
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cetrec import TemporalLlama, Tuning, batch_gradient, erase_order, rotary, train
from data import IGNORE, NO_ITEM, Example, align_right, collate, make_sequences, split_by_time
from evaluate import beam_search
from llama import Llama, LlamaConfig
from lora import add_lora
from support import machine
from support.synthetic import SyntheticWorld
from support.terminal import Parser, exit_status
from support.tiny import tiny_tokenizer

# Width, layers, heads, key/value heads, inner width, vocabulary, tied; and how many sequences or
# prompts a round has on a CPU.
SHAPES = {
    "tiny": (128, 4, 4, 4, 384, 4_096, True, 32),
    "135m": (576, 30, 9, 3, 1_536, 49_152, True, 4),            # SmolLM2
    "1b": (2_048, 16, 32, 8, 8_192, 128_256, True, 2),          # Llama 3.2
    "8b": (4_096, 32, 32, 8, 14_336, 128_256, False, 1),        # Llama 3
}
TEMPLATE = 45       # tokens that all prompts begin with
NEW = 12            # tokens that a beam generates
WARM_UP = 2         # rounds that do not count
INSTALLED = all(map(importlib.util.find_spec, ("transformers", "peft")))
LAMBDA = 0.1


def random_llama(shape: Sequence, device: str) -> Llama:
    """Frozen weights as they are initialised, bfloat16 on a GPU, else float32."""
    C, L, H, G, inner, V, tied = shape
    torch.manual_seed(0)
    with torch.device(device):
        llama = Llama(LlamaConfig(V, C, inner, L, H, G, C // H, 4_096, tie_word_embeddings=tied))
    return llama.to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_(False)


def twin_of(llama: Llama) -> Llama:
    """Another model with the same tensors, for blocks that are wrapped otherwise."""
    with torch.device("meta"):
        twin = Llama(llama.config)
    twin.load_state_dict(llama.state_dict(), assign=True)
    return twin.requires_grad_(False)


def draw_examples(config: LlamaConfig, n: int, seed: int) -> list[Example]:
    """Made-up prompts: a template, ten titles, a tail, an answer of 6 to 12 tokens.

    The mean length of a title goes from 7 to 13 tokens with the seed, so each batch has a width of
    its own.
    """
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        titles = [rng.integers(10, config.vocab_size, rng.integers(5, 10) + seed % 7).tolist()
                  for _ in range(10)]
        tokens, item_pos = list(range(10, 10 + TEMPLATE)), [NO_ITEM] * TEMPLATE
        for k, title in zip(range(9, -1, -1), titles):
            tokens, item_pos = tokens + title + [5], item_pos + [k] * len(title) + [NO_ITEM]
        answer = rng.integers(10, config.vocab_size, rng.integers(6, 13)).tolist()
        rest = list(range(60, 85)) + answer
        rows.append(Example(tokens + rest, item_pos + [NO_ITEM] * len(rest),
                            [IGNORE] * (len(tokens) + 25) + answer))
    return rows


def prompt_of(example: Example) -> list[int]:
    """Its tokens before the answer."""
    return [t for t, label in zip(example.tokens, example.labels) if label == IGNORE]


# ----------------------------------------------------------------------------------------------
# Contenders: each is a function from the examples of a round to what it returns for them


def update(optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradient and make a step, as both contenders do."""
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def ours_tuning(llama: Llama, compiled: bool = False) -> Callable:
    """A tuning step as cetrec.train makes it. -> loss"""
    machine.wrap_blocks(llama, compiled=compiled)
    model = TemporalLlama(llama, "rope").train()
    optimizer = torch.optim.AdamW(add_lora(llama), lr=1e-4)

    def step(examples: list[Example]) -> float:
        """One update."""
        machine.choose_kernels(llama.lm_head.weight.device, llama.lm_head.weight.dtype)
        batch = collate(examples)
        rows = machine.rows_that_fit(llama, batch, compiled=compiled)
        losses, _ = batch_gradient(model, batch, min(rows, len(examples)), LAMBDA)
        update(optimizer)
        return float(losses[0])
    return step


def published(llama: Llama):
    """transformers' model of the same tensors, with the settings its users have."""
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**asdict(llama.config), attn_implementation="sdpa")
    weights = {name if name.startswith("lm_head") else f"model.{name}": x
               for name, x in llama.state_dict().items()}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    with torch.device(llama.lm_head.weight.device):         # its frequencies are no weights
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


def defaults_of_pytorch() -> None:
    """What choose_kernels changes, as users of transformers have it."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")


def theirs_tuning(llama: Llama) -> Callable:
    """The step as users of transformers and peft write it. -> loss

    It has two forwards, all logits, rows padded on the left, and as many rows at a time as are
    fastest: of a batch's half, quarter and so on, those that fit are tried in the first rounds.
    """
    import peft
    model = peft.get_peft_model(published(llama), peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    embed = model.get_input_embeddings()

    def loss_of(examples: list[Example]) -> torch.Tensor:
        """The sum over targets, of one part of the batch."""
        tokens, mask, labels, item_pos = (
            align_right(rows, fill).to(embed.weight.device) for rows, fill in (
                ([e.tokens for e in examples], 0), ([[1] * len(e.tokens) for e in examples], 0),
                ([e.labels for e in examples], IGNORE), ([e.item_pos for e in examples], NO_ITEM)))
        factual, erased = (model(inputs_embeds=rotary(embed(tokens), k.clamp(min=0)),
                                 attention_mask=mask).logits[:, :-1].float().flatten(0, 1)
                           for k in (item_pos, erase_order(item_pos)))
        targets = labels[:, 1:].flatten()
        return (F.cross_entropy(factual, targets, reduction="sum")
                + LAMBDA * F.cross_entropy(factual - erased, targets, reduction="sum"))

    def step(examples: list[Example], rows: int) -> float:
        """One update."""
        defaults_of_pytorch()
        targets, total = sum(label != IGNORE for e in examples for label in e.labels), 0.0
        for start in range(0, len(examples), rows):
            loss = loss_of(examples[start:start + rows]) / targets
            loss.backward()
            total += loss.item()
        update(optimizer)
        return total
    return step


def fastest_rows(step: Callable, rounds: Sequence[list[Example]]) -> int:
    """How many rows at a time make this step fastest, or 0 if not even one fits.

    All rows are tried, then half of them and so on, until fewer are slower.
    """
    best, fastest, rows = 0, math.inf, len(rounds[0])
    while rows and (not best or rows == best // 2):
        try:
            seconds = min(clock(step, examples, rows)[0] for examples in rounds)
            best, fastest = (rows, seconds) if seconds < fastest else (best, fastest)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        rows //= 2
    return best


def ours_generation(llama: Llama) -> Callable:
    """Five beams for every prompt. -> sequences"""
    model = TemporalLlama(llama, "none").eval()

    def generate(examples: list[Example]) -> list:
        """Five answers for each prompt."""
        machine.choose_kernels(llama.lm_head.weight.device, llama.lm_head.weight.dtype)
        prompts = [(tokens, [NO_ITEM] * len(tokens)) for tokens in map(prompt_of, examples)]
        return beam_search(model, prompts, 5, NEW, length_penalty=1.0, eos_ids=[7])[0]
    return generate


def theirs_generation(llama: Llama) -> Callable:
    """The same by `generate`, rows padded on the left."""
    model = published(llama).eval()

    def generate(examples: list[Example]) -> list:
        """Five answers for each prompt."""
        defaults_of_pytorch()
        prompts = [prompt_of(e) for e in examples]
        tokens, mask = (align_right(rows, 0).to(model.device)
                        for rows in (prompts, [[1] * len(p) for p in prompts]))
        out = model.generate(tokens, attention_mask=mask, num_beams=5, num_return_sequences=5,
                             max_new_tokens=NEW, min_new_tokens=4, length_penalty=1.0,
                             do_sample=False, eos_token_id=7, pad_token_id=0)
        return out[:, tokens.shape[1]:].view(len(prompts), 5, -1).tolist()
    return generate


# ----------------------------------------------------------------------------------------------
# Races


@dataclass
class Timing:
    """Of one contender, by rounds: seconds, peak GB on a GPU, what it returned."""

    seconds: list[float] = field(default_factory=list)
    gigabytes: list[float] = field(default_factory=list)
    results: list = field(default_factory=list)


def clock(work: Callable, *arguments) -> tuple[float, object]:
    """Seconds that a piece of work takes, its kernels included, and what it returns."""
    started = time.perf_counter()
    result = work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def race(contenders: dict[str, Callable], rounds: Sequence[list[Example]]) -> dict[str, Timing]:
    """Let contenders take turns at the same examples."""
    times = {name: Timing() for name in contenders}
    for examples in rounds:
        for name, work in contenders.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds, result = clock(work, examples)
            times[name].seconds.append(seconds)
            times[name].results.append(result)
            if torch.cuda.is_available():
                times[name].gigabytes.append(torch.cuda.max_memory_allocated() / 1e9)
    return times


def ratio(slow: Timing, fast: Timing) -> float:
    """Median over rounds of how many times longer the slow one took, warm-up left out."""
    pairs = zip(slow.seconds[WARM_UP:], fast.seconds[WARM_UP:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def matrix_rate(device: str) -> float:
    """FLOP a second of one large matrix product, the best of ten."""
    n = 8_192 if device == "cuda" else 2_048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
    return max(2 * n ** 3 / clock(torch.mm, a, a)[0] for _ in range(10))


# ----------------------------------------------------------------------------------------------
# Sections: each prints its rows


def draw(name: str, options) -> tuple[Llama, list[list[Example]]]:
    """The weights of a shape, and the examples of each round."""
    gc.collect()                    # wrapped blocks of the shape before are circles
    torch.cuda.empty_cache()
    *shape, n = SHAPES[name]
    n = options.batch_size or (64 if options.device == "cuda" else n)
    llama = random_llama(shape, options.device)
    return llama, [draw_examples(llama.config, n, s) for s in range(WARM_UP + options.rounds)]


def row(name: str, *cells: str) -> None:
    """Print one line of the table."""
    print(f"  {name:<40} " + " | ".join(filter(None, cells)), flush=True)


def show(times: dict[str, Timing], n: int, what: str) -> None:
    """Print a race's rows; n: sequences or prompts in a round."""
    ours = min((timing for name, timing in times.items() if name.startswith("ours")),
               key=lambda timing: statistics.median(timing.seconds[WARM_UP:]))
    for name, timing in times.items():
        rate, peak = n / statistics.median(timing.seconds[WARM_UP:]), max(timing.gigabytes or [0])
        row(name, f"{rate:8.3g} {what}/s", f"{ratio(timing, ours):5.2f} x our best time",
            f"first {timing.seconds[0]:.1f} s", f"{peak:.1f} GB" if peak else "")
    if not INSTALLED:
        row("transformers + peft", "not measured: not installed")


def tuning(options) -> None:
    """The tuning step beside transformers + peft, and beside the machine."""
    for name in options.shapes:
        llama, rounds = draw(name, options)
        B, widths = len(rounds[0]), [max(len(e.tokens) for e in rows) for rows in rounds]
        print(f"tuning, {name} shape, batches of {B} with {min(widths)} to {max(widths)} tokens at "
              f"most, {TEMPLATE} in common, LoRA r = 8 on q_proj and v_proj, λ = {LAMBDA}, "
              f"{str(llama.lm_head.weight.dtype).removeprefix('torch.')} weights")
        tuned = {"ours": twin_of(llama)} | (
            {"ours, compiled": twin_of(llama)} if options.device == "cuda" else {})
        contenders = {who: ours_tuning(twin, who != "ours") for who, twin in tuned.items()}
        if INSTALLED:
            step = theirs_tuning(llama)
            if rows := fastest_rows(step, rounds[:2]):
                contenders[f"transformers + peft, {rows} rows at a time"] = (
                    lambda examples, step=step, rows=rows: step(examples, rows))
            else:
                row("transformers + peft", "not measured: not even one row fits")
        times = race(contenders, rounds)
        show(times, B, "sequences")
        with FlopCounterMode(display=False) as counter:
            contenders["ours"](rounds[-1])
        rate = matrix_rate(options.device)
        widest = collate(rounds[widths.index(max(widths))])
        for who, twin in tuned.items():
            share = counter.get_total_flops() / times[who].seconds[-1] / rate
            row(f"{who}: of a matrix product", f"{100 * share:.0f} % of {rate / 1e12:.2f} TFLOP/s")
            if options.device == "cuda":
                rows = min(B, machine.rows_that_fit(twin, widest, compiled=who != "ours"))
                each, shared = machine.backward_bytes(twin, widest, compiled=who != "ours")
                weights = sum(p.numel() * p.itemsize for p in llama.parameters())
                row(f"{who}: predicted peak", f"{(weights + shared + rows * each) / 1e9:.1f} GB, "
                    f"{rows} rows at a time")


def generation(options) -> None:
    """Five beams beside transformers' generate."""
    for name in options.shapes:
        llama, rounds = draw(name, options)
        n, lengths = len(rounds[0]), [len(prompt_of(e)) for rows in rounds for e in rows]
        print(f"generation, {name} shape, {n} prompts of {min(lengths)} to {max(lengths)} tokens, "
              f"{TEMPLATE} in common, 5 beams, {NEW} new tokens")
        contenders = {"ours": ours_generation(twin_of(llama))}
        if INSTALLED:
            contenders["transformers' generate"] = theirs_generation(llama)
        times = race(contenders, rounds)
        show(times, n, "prompts")
        ours, *others = (timing.results for timing in times.values())
        for theirs in others:
            same = [a == b[:len(a)] for x, y in zip(ours, theirs) for p, q in zip(x, y)
                    for a, b in zip(p, q)]
            row("sequences that agree", f"{100 * np.mean(same):.1f} %")


def loop(options) -> None:
    """The command's own loop: tokens from titles, steps, log, validation, checkpoint."""
    for name in options.shapes:
        llama, rounds = draw(name, options)
        B, steps, x = len(rounds[0]), len(rounds), SyntheticWorld().interactions()
        tokenizer = tiny_tokenizer(x.titles, np.zeros(len(x.titles)), x.domain, 300)
        train_set, valid_set, _ = split_by_time(make_sequences(x))
        model = TemporalLlama(llama, "rope")
        add_lora(llama)
        machine.choose_kernels(llama.lm_head.weight.device, llama.lm_head.weight.dtype)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            train(model, train_set, valid_set.sample(B, 0), tokenizer,
                  Tuning(LAMBDA, 1e-4, B, steps, 1), Path(folder), {})
            log = [json.loads(line) for line in Path(folder, "log.jsonl").open()]
        ms = [line["ms"] for line in log if "ms" in line][WARM_UP:]
        print(f"loop of the command, {name} shape, batches of {B} short synthetic sequences, eager")
        row("cetrec.train", f"{1000 * B / statistics.median(ms):8.1f} sequences/s",
            f"slowest step {max(ms):,.0f} ms, median {statistics.median(ms):,.0f} ms")


SECTIONS = {"tuning": tuning, "generation": generation, "loop": loop}


def main(argv: list[str] | None = None) -> int:
    """Run the sections."""
    ap = Parser(prog="python -m experiments.benchmark",
                usage="[SECTION ...] [flags]", description=__doc__,
                formatter_class=RawDescriptionHelpFormatter)
    ap.add_argument("sections", nargs="*", metavar="SECTION", default=list(SECTIONS),
                    help=f"of {', '.join(SECTIONS)} (default: all)")
    ap.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "135m"],
                    help="sizes of the Llama (default: tiny 135m)")
    ap.add_argument("--rounds", type=int, choices=range(1, 1_000), default=5, metavar="N",
                    help="each contender's (default: %(default)s)")
    ap.add_argument("--batch-size", type=int, help="sequences or prompts in a round (default: 64 "
                    "on a GPU, fewer of large shapes on a CPU)")
    ap.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                    help="cuda takes bfloat16 weights (default: %(default)s)")
    options = ap.parse_args(argv)

    def work() -> None:
        """Check what was asked for, then measure it."""
        if unknown := set(options.sections) - set(SECTIONS):
            raise ValueError(f"section {unknown.pop()!r}; wanted some of {', '.join(SECTIONS)}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no such device; not measured")
        card = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
        print(f"{card}, {torch.get_num_threads()} threads | torch {torch.__version__}")
        for name in options.sections:
            SECTIONS[name](options)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
