"""One test sequence of a run in both worlds: where they differ, and the losses token by token.

    python -m experiments.explain runs/synthetic-rope-1 7

It shows the prompt with the index k of each item, the tokens at which the worlds differ, the part
that each token of the answer has in L_TA and L_CT, and the first five titles of both worlds.

Shapes: M answer tokens, V vocabulary.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cetrec import cetrec_loss, erase_order, open_tuned, twin_forward
from data import IGNORE, Example, Tokenizer, collate, encode_sequences
from experiments.recommend import side_by_side
from support.options import Options, add_flags, parse
from support.runs import show_prompt
from support.terminal import Parser, exit_status
from support.trie import ExactTitles

LINE = "-" * 80


def moved_items(tokenizer: Tokenizer, example: Example, temporal: bool = True) -> list[str]:
    """A line for every item whose tokens are not alike in both worlds.

    temporal: has the model an embedding that tells the worlds apart?
    """
    item_pos = torch.as_tensor(example.item_pos)
    moved = (temporal & (item_pos != erase_order(item_pos))).tolist()
    lines, first = [], 0
    for last, (differs, k) in enumerate(zip(moved, example.item_pos), 1):
        if last == len(moved) or example.item_pos[last] != k:
            if differs:
                text = tokenizer.bpe.decode(example.tokens[first:last])
                lines.append(f"  tokens {first}..{last - 1}: k = {k:.3g}, erased 0 | {text}")
            first = last
    why = "every item is at k = 0 in both" if temporal else (
        "without a temporal embedding they are one")
    return lines or [f"  no token: {why}"]


def token_table(tokenizer: Tokenizer, targets: list[int], logits_f: Tensor,
                logits_cf: Tensor) -> list[str]:
    """The part of each answer token in the losses (Eq. 8, 9), which are means over the M tokens.

    targets: M token ids; logits: (M, V) of both worlds.
    """
    M, answer = len(targets), torch.tensor(targets, device=logits_f.device)
    log_f, log_cf, log_effect = (
        -F.cross_entropy(logits, answer, reduction="none")
        for logits in (logits_f, logits_cf, logits_f - logits_cf))

    def line(name: str, f: Tensor, cf: Tensor, effect: Tensor) -> str:
        return (f"{name:<28}{f:>12.4f}{cf:>12.4f}{f - cf:>+12.4f}{-f / M:>12.4f}"
                f"{-effect / M:>12.4f}")
    lines = [f"{'token':<28}{'log p(x_t)':>12}{'log p(x_0)':>12}{'effect':>12}"
             f"{'of L_TA':>12}{'of L_CT':>12}"]
    for token, *parts in zip(targets, log_f, log_cf, log_effect):
        name = repr(tokenizer.bpe.decode([token], skip_special_tokens=False))
        lines.append(line(name[:27], *parts))
    return [*lines, line("sum", log_f.sum(), log_cf.sum(), log_effect.sum())]


def explanation(tokenizer: Tokenizer, example: Example, logits_f: Tensor, logits_cf: Tensor,
                lambda_ct: float, losses, temporal: bool = True) -> str:
    """One prompt with its answer: what differs between the worlds, and what the losses are made of.

    logits (M, V) of both worlds; losses (L, L_TA, L_CT or None) as cetrec_loss gives them;
    temporal: has the model an embedding that tells the worlds apart?
    """
    targets = [t for t, label in zip(example.tokens, example.labels) if label != IGNORE]
    loss, loss_ta, loss_ct = losses
    total = f"L = L_TA = {loss_ta:.4f}, as λ = 0"
    if loss_ct is not None:
        total = f"L = L_TA + λ L_CT = {loss_ta:.4f} + {lambda_ct:g} x {loss_ct:.4f} = {loss:.4f}"
    return "\n".join([
        "the prompt and the answer, each item ⟨marked⟩ with its index k", LINE,
        show_prompt(tokenizer, example), LINE,
        "the worlds differ at", *moved_items(tokenizer, example, temporal), "",
        "the answer token by token, in nats; x_t is the factual world, x_0 the erased one",
        f"parts of a loss are -log p / {len(targets)}, for L_CT with p = softmax(f(x_t) - f(x_0))",
        *token_table(tokenizer, targets, logits_f, logits_cf), total, ""])


def explain(folder: Path, number: int, flags: dict) -> None:
    """Print what both worlds make of one test sequence of a run."""
    inputs, model = open_tuned(folder, flags, "experiments.explain")
    options, (_, _, test_set) = inputs.options, inputs.splits
    test_set = test_set.sample(options.eval_sequences, options.seed)
    if not 0 <= number < len(test_set):
        raise ValueError(f"test sequence {number}; wanted a number from 0 to {len(test_set) - 1}; "
                         "--eval-sequences 0 takes the whole test split")
    (example,) = encode_sequences(inputs.tokenizer, test_set.select(slice(number, number + 1)))
    batch = collate([example]).to(inputs.device)
    with torch.no_grad():
        losses, worlds = cetrec_loss(model, batch, options.lambda_ct), twin_forward(model, batch)
    print(f"test sequence {number} of the {len(test_set):,} of the evaluation")
    print(explanation(inputs.tokenizer, example, *worlds, options.lambda_ct, losses,
                      options.temporal != "none"))
    history, ages = test_set.history(number), test_set.ages(number)
    recommender = ExactTitles(model, inputs.catalogue, options.exclude_history)
    factual = recommender([history], None if ages is None else [ages])
    erased = recommender([history], [np.zeros(len(history))])
    print(side_by_side(test_set.titles, factual, erased, 5, test_set.target(number)))


def main(argv: list[str] | None = None) -> int:
    """Parse and explain. Returns the exit status."""
    ap = Parser(prog="python -m experiments.explain", usage="RUN [N] [flags]",
                description="Explain one test sequence of a run, token by token, in both worlds. "
                "Flags that are not given are as in the run.")
    ap.add_argument("run", metavar="RUN", help="folder of a run, as cetrec.py writes it")
    ap.add_argument("number", metavar="N", type=int, nargs="?", default=0,
                    help="test sequence, counted from 0 as in experiments.report (default: 0)")
    add_flags(ap, Options, only={"data", "data_dir", "device", "dtype", "model", "exclude_history",
                                 "eval_sequences"})
    flags = parse(ap, argv)
    folder, number = Path(flags.pop("run")), flags.pop("number")
    return exit_status(lambda: explain(folder, number, flags))


if __name__ == "__main__":
    sys.exit(main())
