"""Other readings of the paper (D1, D3), and worlds that show what L_CT rewards.

    python -m experiments.readings --reading erase-to-oldest
    python -m experiments.readings --reading permuted --data ml-100k

What docs/readings.md names and cetrec.py has no flag for is here: another index of the items,
another erased world, another effect. All else, from the data to the table, is cetrec.py's. Tuning
also notes how much each world leaves open about the next token, in worlds.json of the run folder.

Shapes: B batch, T tokens, V vocabulary, M supervised tokens.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cetrec import (TemporalLlama, answer_logits, cetrec_loss, erase_order,
                    temporal_aware_loss, tune_and_evaluate)
from data import IGNORE, NO_ITEM, Batch, Example, Tokenizer
from llama import KeysValues
from support import runs
from support.files import write_json
from support.options import Options, Where, add_flags, flag, parse
from support.terminal import Parser, exit_status
from support.trie import make_recommenders

# ----------------------------------------------------------------------------------------------
# Another index (D1), and a text whose order says nothing


class Chronological(TemporalLlama):
    """k counts from the oldest item, which has 0, as §4.3 seems to have it."""

    def forward(self, tokens: Tensor, item_pos: Tensor, positions: Tensor | None = None,
                mask: Tensor | None = None, past: list[KeysValues] | None = None,
                last: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """As TemporalLlama, with item_pos counted from the newest item. In the erased world, where
        all items are at 0, they stay there."""
        return super().forward(tokens, from_the_oldest(item_pos), positions, mask, past, last)


def from_the_oldest(item_pos: Tensor) -> Tensor:
    """k -> n - 1 - k in each row, n being its number of items.  (B, T) -> same"""
    oldest = item_pos.amax(dim=1, keepdim=True)
    return torch.where(item_pos == NO_ITEM, item_pos, oldest - item_pos)


class ShuffledText(Tokenizer):
    """Titles stand in the prompt in random order, so that k alone tells when they were taken."""

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples. A history is shuffled in the same way each time."""
        orders = [np.random.default_rng([len(h), *map(len, h)]).permutation(len(h))
                  for h in histories]
        ks = [np.arange(len(h))[::-1] if age is None else age
              for h, age in zip(histories, ages or [None] * len(histories))]
        return super().examples([[h[i] for i in order] for h, order in zip(histories, orders)],
                                targets, domain, [k[order] for k, order in zip(ks, orders)])


# ----------------------------------------------------------------------------------------------
# Another erased world (D1), and another effect (D3)


def erase_to_oldest(item_pos: Tensor) -> Tensor:
    """Every item is where the oldest one of its history was.  (B, T) -> same"""
    return torch.where(item_pos == NO_ITEM, item_pos, item_pos.amax(dim=1, keepdim=True))


def permute(item_pos: Tensor) -> Tensor:
    """The items of a history trade their positions at random.  (B, T) integer -> same

    Unlike erase_order, this leaves no trace in k itself of which world it is.
    """
    n = item_pos.amax(dim=1, keepdim=True) + 1                          # items of each row
    keys = torch.rand(len(item_pos), max(1, int(n.max())), device=item_pos.device)
    absent = torch.arange(keys.shape[1], device=n.device) >= n
    other = keys.masked_fill(absent, 2).argsort(dim=1)          # its first n are all below n
    return torch.where(item_pos == NO_ITEM, item_pos, other.gather(1, item_pos.clamp(min=0)))


def logits_difference(logits_f: Tensor, logits_cf: Tensor) -> Tensor:
    """f(x_t) - f(x_0), as cetrec.counterfactual_loss has it.  (M, V), (M, V) -> (M, V)"""
    return logits_f - logits_cf


def stopped(logits_f: Tensor, logits_cf: Tensor) -> Tensor:
    """The same, with gradients through the factual world only: the erased one is a constant."""
    return logits_f - logits_cf.detach()


def probabilities_difference(logits_f: Tensor, logits_cf: Tensor) -> Tensor:
    """§4.4 to the letter: f is a distribution. Its differences lie between -1 and 1, and the
    cross-entropy takes them as logits, so L_CT never leaves the neighbourhood of ln V."""
    return logits_f.softmax(dim=-1) - logits_cf.softmax(dim=-1)


# ----------------------------------------------------------------------------------------------
# Eq. 10 with the choices of a reading


def entropy(logits: Tensor) -> float:
    """Mean entropy of the next token's distribution, nats.  (M, V) -> ()"""
    log_p = logits.log_softmax(dim=-1)
    return -float((log_p.exp() * log_p).sum(dim=-1).mean())


@dataclass(frozen=True)
class Reading:
    """One reading; the defaults are those of cetrec.py."""

    text: str
    model: type[TemporalLlama] = TemporalLlama
    tokenizer: type[Tokenizer] = Tokenizer
    erase: Callable[[Tensor], Tensor] = erase_order
    effect: Callable[[Tensor, Tensor], Tensor] = logits_difference
    notes: list[dict] = field(default_factory=list)

    def loss(self, model: TemporalLlama, batch: Batch,
             lambda_ct: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """As cetrec.cetrec_loss. Each call that runs two worlds adds a note of both."""
        if lambda_ct == 0:
            return cetrec_loss(model, batch, 0)
        targets = batch.answers[batch.answers != IGNORE]
        worlds = torch.cat((batch.item_pos, self.erase(batch.item_pos)))
        logits_f, logits_cf = answer_logits(model, batch, worlds).chunk(2)
        loss_ta = temporal_aware_loss(logits_f, targets)
        loss_ct = F.cross_entropy(self.effect(logits_f, logits_cf), targets)
        with torch.no_grad():
            self.notes.append({"factual": entropy(logits_f), "erased": entropy(logits_cf),
                               "loss_ta": float(loss_ta), "loss_ct": float(loss_ct)})
        return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


READINGS = {
    "stated": Reading("as cetrec.py has it"),
    "chronological": Reading("k counts from the oldest item (D1)", model=Chronological),
    "erase-to-oldest": Reading("the erased world puts every item where the oldest was (D1)",
                               erase=erase_to_oldest),
    "stopped": Reading("no gradients through the erased world (D3)", effect=stopped),
    "probabilities": Reading("the effect is a difference of probabilities (D3)",
                             effect=probabilities_difference),
    "permuted": Reading("the erased world permutes the positions", erase=permute),
    "shuffled-text": Reading("titles in random order, so that k alone tells the order",
                             tokenizer=ShuffledText),
    "shuffled-text-permuted": Reading("both of the two before", tokenizer=ShuffledText,
                                      erase=permute)}


def run(name: str, options: Options, out: Path) -> None:
    """Tune and evaluate under a reading, in a new folder below `out`."""
    reading = replace(READINGS[name], notes=[])
    inputs = runs.open_inputs(options, out)
    inputs.record["method"] = "cetrec" if name == "stated" else name
    inputs = replace(inputs, tokenizer=reading.tokenizer(**vars(inputs.tokenizer)))
    model = reading.model(inputs.llama, options.temporal, options.sinpe_scale)
    runs.add_factors(model.llama, options)
    lists = make_recommenders(model, inputs.catalogue, options)
    folder = runs.start(out, options.temporal if name == "stated" else name, inputs)
    tune_and_evaluate(inputs, model, lists, folder, reading.loss)
    write_json(folder / "worlds.json", {"notes": reading.notes})    # in order, for each part


@dataclass(frozen=True, kw_only=True)
class Which:
    """The flag that only this command has."""

    reading: str = flag("reading", "; ".join(f"{name}: {r.text}" for name, r in READINGS.items()),
                        "stated", choices=[*READINGS])


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="python -m experiments.readings",
                description="CETRec under another reading of the paper, measured as cetrec.py "
                "measures its own.")
    add_flags(ap, Which)
    add_flags(ap, Options, Where, only={f.name for f in (*fields(Options), *fields(Where))} - {
        "resume", "eval_only", "shard", "index"})
    flags = parse(ap, argv)

    def work() -> None:
        """One run under the reading that was asked for."""
        name, out = flags.pop("reading", "stated"), Path(flags.pop("out", "runs"))
        options = Options.from_flags(flags)
        if options.temporal == "none" or not options.lambda_ct:
            raise ValueError("readings differ in what they do with two worlds: give a --temporal "
                             "embedding and a --lambda-ct above 0")
        run(name, options, out)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
