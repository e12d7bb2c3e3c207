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

import cetrec
from cetrec import TemporalLlama, erase_order, temporal_aware_loss, world_logits
from data import NO_ITEM, Batch, Example, Tokenizer
from support.files import write_json
from support.options import Options, Where, add_flags, flag, parse
from support.terminal import Parser, exit_status

# ----------------------------------------------------------------------------------------------
# Another index (D1), and a text whose order says nothing


class Chronological(TemporalLlama):
    """k counts from the oldest item, which has 0, as §4.3 seems to have it."""

    def forward(self, tokens: Tensor, item_pos: Tensor, cache=None, wanted=None) -> Tensor:
        """As TemporalLlama, with item_pos counted from the newest item. In the erased world, where
        all items are at 0, they stay there."""
        return super().forward(tokens, from_the_oldest(item_pos), cache, wanted)


def from_the_oldest(item_pos: Tensor) -> Tensor:
    """k -> n - 1 - k in each row, n being its number of items.  (B, T) -> same"""
    newest_last = item_pos.amax(dim=1, keepdim=True) - item_pos
    return torch.where(item_pos == NO_ITEM, item_pos, newest_last)


class ShuffledText(Tokenizer):
    """Titles stand in the prompt in random order, so that k alone tells when they were taken."""

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples. A history is shuffled in the same way each time."""
        orders = [np.random.default_rng([len(h), *map(len, h)]).permutation(len(h))
                  for h in histories]
        told = ages if ages is not None else [None] * len(histories)
        steps = [np.arange(len(h))[::-1] if k is None else k for h, k in zip(histories, told)]
        return super().examples([[h[i] for i in order] for h, order in zip(histories, orders)],
                                targets, domain, [k[order] for k, order in zip(steps, orders)])


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
    other = keys.masked_fill(absent, 2).argsort(dim=1)                  # < n at all places < n
    return torch.where(item_pos == NO_ITEM, item_pos, other.gather(1, item_pos.clamp(min=0)))


def logits_difference(logits_f: Tensor, logits_cf: Tensor) -> Tensor:
    """f(x_t) - f(x_0), as cetrec.counterfactual_loss has it.  (M, V), (M, V) -> (M, V)"""
    return logits_f - logits_cf


def stopped(logits_f: Tensor, logits_cf: Tensor) -> Tensor:
    """The same, with gradients through the factual world only: the erased one is a given."""
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
    """One reading; the defaults are those of cetrec.py. Called like cetrec.cetrec_loss."""

    told: str
    llama: type[TemporalLlama] = TemporalLlama
    tokenizer: type[Tokenizer] = Tokenizer
    erase: Callable = erase_order
    effect: Callable = logits_difference
    notes: list[dict] = field(default_factory=list)

    def wrap(self, model: TemporalLlama, splits) -> TemporalLlama:
        """The model as this reading has it, round the same Llama."""
        own = model.tokenizer
        tokenizer = self.tokenizer(own.bpe, own.eos_ids, own.bos_id, own.pad_id)
        return self.llama(model.llama, model.kind, model.scale, tokenizer, model.index, model.base)

    def __call__(self, model: TemporalLlama, batch: Batch, lambda_ct: float) -> tuple:
        if lambda_ct == 0:
            return cetrec.cetrec_loss(model, batch, 0)
        logits_f, logits_cf = world_logits(model, batch, batch.item_pos, self.erase(batch.item_pos))
        loss_ta = temporal_aware_loss(logits_f, batch.targets)
        loss_ct = F.cross_entropy(self.effect(logits_f, logits_cf), batch.targets)
        with torch.no_grad():           # while tuning only: validation runs one world
            self.notes.append({"factual": entropy(logits_f), "erased": entropy(logits_cf),
                               "loss_ta": float(loss_ta), "loss_ct": float(loss_ct)})
        return loss_ta + lambda_ct * loss_ct, loss_ta, loss_ct


READINGS = {
    "stated": Reading("as cetrec.py has it"),
    "chronological": Reading("k counts from the oldest item (D1)", llama=Chronological),
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


@dataclass(frozen=True, kw_only=True)
class Which:
    """The flag that only this command has."""

    reading: str = flag("reading", "; ".join(f"{name}: {r.told}" for name, r in READINGS.items()),
                        "stated", choices=[*READINGS])


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="python -m experiments.readings",
                description="CETRec under another reading of the paper, measured as cetrec.py "
                "measures its own.")
    add_flags(ap, Which)
    add_flags(ap, Options, Where, only={f.name for f in (*fields(Options), *fields(Where))} - {
        "resume", "eval_only", "reproduce", "shard", "index"})
    given = parse(ap, argv)

    def work() -> None:
        """One run under the reading that was asked for."""
        name, out = given.pop("reading", "stated"), Path(given.pop("out", "runs"))
        options = Options.from_flags(given)
        reading = replace(READINGS[name], notes=[])
        if options.temporal == "none" or not options.lambda_ct:
            raise ValueError("readings differ in what they do with two worlds: give a --temporal "
                             "embedding and a --lambda-ct above 0")
        method = cetrec.Method("cetrec" if name == "stated" else name, reading.wrap, reading)
        folder = cetrec.run(options, out, method=method)
        write_json(folder / "worlds.json", {"notes": reading.notes})    # in order, for each part
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
