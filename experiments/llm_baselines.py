"""CFT, P5, E4SRec and LLaRA on the base and in the protocol of cetrec.py (Table 3).

    python -m experiments.llm_baselines --method cft --data ml-100k
    python -m experiments.llm_baselines --method llara --data ml-100k --model path/to/Llama-3

Each is a `cetrec.Method`: how items are written into the prompt, what is put round the base, which
loss is tuned, which lists are made. All else is the command's own code. (BIGRec, the fifth of
Table 3's that tune an LLM, is `cetrec.py --temporal none`.) What the originals do otherwise is in
docs/baselines.md.

                prompt             items in it       loss           lists
    BIGRec      titles             their tokens      Eq. 1          grounded beams, beams on titles
    CFT         titles             their tokens      + the effect   the same
    LLaRA       titles             tokens, and Z     Eq. 1          the same
    P5          numbers            their tokens      Eq. 1          beams on numbers
    E4SRec      a sentence         Z                 item softmax   all items scored

Z is the table of item embeddings of a SASRec, which is trained on demand. Where a prompt holds the
embedding of item i, its token is V + i, one that no tokenizer makes.

Shapes: B rows, T tokens, C width, V vocabulary, N items, M supervised tokens, d width of Z.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import cetrec
from cetrec import TemporalLlama, world_logits
from data import (DOMAINS, IGNORE, NO_ITEM, Batch, Example, Sequences, Tokenizer, build_prompt,
                  collate)
from evaluate import Lists, device_of, prefill, prompts_by_length
from experiments import id_baselines
from llama import KVCache
from support.files import save_arrays
from support.options import OF_BEAMS, Options, Where, add_flags, as_flag, defaults, flag, parse
from support.terminal import Parser, exit_status
from support.trie import TitleBeams

# ----------------------------------------------------------------------------------------------
# CFT: the effect of the history instead of the effect of its order

NO_HISTORY = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.\x20\x20

### Instruction:
Given a list of {things} the user has {verb} before, please recommend a new {thing} that the user \
likes to the user.

### Response:
"""


def token_weights(labels: Tensor, least: float = 0.25) -> Tensor:
    """w_t = 1 - (1 - β) (t - 1) / (m - 1) for the m tokens of each answer, from 1 down to β.

    The beginning of a title decides most. An answer of one token has the weight 1.
    (B, T) -> (M,)
    """
    there = labels != IGNORE
    t, m = there.cumsum(dim=1) - 1, there.sum(dim=1, keepdim=True)
    return (1 - (1 - least) * t / (m - 1).clamp(min=1))[there]


def cft_loss(model: TemporalLlama, batch: Batch, lambda_ct: float,
             domain: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L, L_n, L_c) with L = L_n + λ L_c, both cross-entropies being weighted means over tokens.

    L_n is Eq. 1. L_c takes f(x_h) - f(x_0) instead of f(x_h), where x_0 is the same instruction
    without any history and without the input's sentence. Gradients flow through both. CETRec keeps
    the history in x_0 and erases its order only.
    """
    weights = token_weights(batch.labels)

    def mean_ce(logits: Tensor) -> Tensor:
        """Σ w CE / Σ w.  (M, V) -> ()"""
        ce = F.cross_entropy(logits, batch.targets, reduction="none")
        return (weights * ce).sum() / weights.sum()
    logits_h, = world_logits(model, batch, batch.item_pos)
    loss_n = mean_ce(logits_h)
    if lambda_ct == 0:
        return loss_n, loss_n, None
    without = answers_without_history(model.tokenizer, batch, domain).to(batch.tokens.device)
    logits_0, = world_logits(model, without, without.item_pos)
    loss_c = mean_ce(logits_h - logits_0)
    return loss_n + lambda_ct * loss_c, loss_n, loss_c


def answers_without_history(tokenizer: Tokenizer, batch: Batch, domain: str) -> Batch:
    """The same answers, row by row, behind the prompt that has no history."""
    prompt = tokenizer.bpe.encode(NO_HISTORY.format(**DOMAINS[domain])).ids
    answers = [[t for t in row if t != IGNORE] for row in batch.labels.tolist()]
    return collate([Example(prompt + answer, [NO_ITEM] * len(prompt + answer),
                            [IGNORE] * len(prompt) + answer) for answer in answers],
                   tokenizer.pad_id)


# ----------------------------------------------------------------------------------------------
# P5: items are numbers


@dataclass(frozen=True)
class NumberTokenizer(Tokenizer):
    """Writes prompts in which an item is `item_1001` and not its title.

    Numbers are given in the order in which training meets the items (sequential indexing), so items
    that are taken together share their first digits.
    """

    numbers: dict[str, str] = field(default_factory=dict)       # title -> its number's text

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples; the answer is ` item_n` and EOS, and no token carries a k."""
        made = []
        for history, target in zip(histories, targets, strict=True):
            items = " , ".join(f"item_{self.numbers[title]}" for title in history)
            prompt = self.bpe.encode(f"These {domain} were consumed in this order. What is the "
                                     f"next item ?\n{items}\nResponse:").ids
            answer = [] if target is None else self.bpe.encode(
                f" item_{self.numbers[target]}", add_special_tokens=False).ids + [self.eos_ids[0]]
            made.append(Example(prompt + answer, [NO_ITEM] * len(prompt + answer),
                                [IGNORE] * len(prompt) + answer))
        return made


def sequential_numbers(train_set: Sequences) -> dict[str, str]:
    """Title -> number from 1001 on, in the order of training windows by time; then all others."""
    met = dict.fromkeys(int(item) for start, target in zip(train_set.starts, train_set.targets)
                        for item in train_set.items[start:target + 1])
    order = [*met, *(item for item in range(len(train_set.titles)) if item not in met)]
    return {train_set.titles[item]: str(1001 + place) for place, item in enumerate(order)}


class P5(TemporalLlama):
    """A Llama whose embedding of the digits is learned anew, by factors beside the input table.

    What a base knows of numbers is no use here, so the rows of all tokens that occur in them are
    drawn anew, with the table's own spread. The factors give each token another row A B α/R.
    """

    def __init__(self, model: TemporalLlama, splits, seed: int, rank: int = 8, alpha: float = 16.0):
        numbers = sequential_numbers(splits[0])
        tokenizer = NumberTokenizer(**vars(model.tokenizer), numbers=numbers)
        super().__init__(model.llama, "none", tokenizer=tokenizer, base=model.base)
        table, drawn = self.llama.embed_tokens.weight, torch.Generator().manual_seed(seed)
        used = sorted({t for n in numbers.values()
                       for t in tokenizer.bpe.encode(f" item_{n}", add_special_tokens=False).ids})
        with torch.no_grad():
            table[used] = (table.float().std().cpu() * torch.randn(
                len(used), table.shape[1], generator=drawn)).to(table)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.zeros(table.shape[0], rank, device=table.device))
        self.B = nn.Parameter(torch.randn(rank, table.shape[1], generator=drawn).to(table.device))

    def forward(self, tokens: Tensor, item_pos: Tensor, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """As TemporalLlama.forward."""
        embedded = self.llama.embed(tokens)
        embedded = embedded + (self.scale * self.A[tokens] @ self.B).to(embedded.dtype)
        return self.llama(None, embeddings=embedded, cache=cache, wanted=wanted)


# ----------------------------------------------------------------------------------------------
# Items as embeddings: what E4SRec and LLaRA share


def item_table(out: Path, splits, options: Options, device: torch.device) -> Tensor:
    """Z (N, d): the item embeddings of a SASRec with the settings of id_baselines.

    It is trained once and kept in a folder below out, whose name is a digest of what it was made
    from.
    """
    train_set, valid_set, _ = splits
    recipe = id_baselines.Recipe(**defaults(id_baselines.Recipe, "sasrec") | {"method": "sasrec"})
    source = hashlib.sha256(json.dumps([asdict(recipe), options.seed, train_set.titles]).encode())
    for part in (train_set, valid_set):
        for array in (part.items, part.starts, part.targets):
            source.update(array.tobytes())
    path = out / f"sasrec-{source.hexdigest()[:12]}" / "model.safetensors"
    if not path.is_file():
        torch.manual_seed(options.seed)
        model = id_baselines.SASRec(len(train_set.titles), recipe.width).to(device)
        done = id_baselines.fit(model, train_set, valid_set.sample(1_000, options.seed), recipe,
                                options.seed, log=lambda line: None)
        print(f"SASRec for item embeddings | {done['epochs']} epochs in {done['seconds']:.0f} s | "
              f"validation NDCG@10 {max(done['validation_ndcg10']):.4f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays({name: x.numpy(force=True) for name, x in model.state_dict().items()}, path)
    return load_file(path, device=str(device))["embedding.weight"][:-1]         # without the pads


class ItemLlama(TemporalLlama):
    """A Llama in which the token V + i is item i, given by a map of the frozen row Z[i]."""

    def __init__(self, model: TemporalLlama, tokenizer: Tokenizer, z: Tensor, project: nn.Module):
        super().__init__(model.llama, "none", tokenizer=tokenizer, base=model.base)
        self.register_buffer("z", z, persistent=False)
        self.project = project.to(z.device)

    def forward(self, tokens: Tensor, item_pos: Tensor, cache: KVCache | None = None,
                wanted: Tensor | None = None) -> Tensor:
        """As TemporalLlama.forward."""
        item = tokens - self.llama.config.vocab_size
        embedded = self.llama.embed(tokens.where(item < 0, 0))
        rows = self.item_embeddings(item.clamp(min=0)).to(embedded.dtype)
        embedded = torch.where((item < 0)[..., None], embedded, rows)
        return self.llama(None, embeddings=embedded, cache=cache, wanted=wanted)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(..) -> (.., C)"""
        return self.project(self.z[items])


# ----------------------------------------------------------------------------------------------
# LLaRA: titles, each followed by its item's embedding


@dataclass(frozen=True)
class HybridTokenizer(Tokenizer):
    """Puts the token V + i behind the last token of each title in the history."""

    ids: dict[str, int] = field(default_factory=dict)           # title -> V + its item

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples."""
        made = super().examples(histories, targets, domain)
        return [self.with_items(example, history) for example, history in zip(made, histories)]

    def with_items(self, example: Example, history) -> Example:
        """The example with a token more for each title of its history."""
        k, titles = example.item_pos, iter(history)
        ends = [t for t in range(len(k) - 1) if k[t] != NO_ITEM and k[t + 1] != k[t]]
        if len(ends) != len(history):
            raise ValueError(f"with this tokenizer {len(history)} titles of a history have tokens "
                             f"of their own for {len(ends)} only; use another --model")
        out = Example(*(list(part) for part in (example.tokens, k, example.labels)))
        for shift, t in enumerate(ends, start=1):
            out.tokens.insert(t + shift, self.ids[next(titles)])
            out.item_pos.insert(t + shift, NO_ITEM)
            out.labels.insert(t + shift, IGNORE)
        return out


class LLaRA(ItemLlama):
    """Title tokens and P(Z[i]), with P a map of two layers; learned from text to both.

    A batch is either hybrid or text only, and then a fixed vector, which says nothing of the item,
    stands where the embedding would. The share of hybrid batches rises from 0 to 1 in the course of
    tuning.
    """

    def __init__(self, model: TemporalLlama, splits, z: Tensor, rows: int, seed: int):
        V, C, d = model.llama.config.vocab_size, model.llama.config.hidden_size, z.shape[1]
        ids = {title: V + item for item, title in enumerate(splits[0].titles)}
        tokenizer = HybridTokenizer(**vars(model.tokenizer), ids=ids)
        super().__init__(model, tokenizer, z, nn.Sequential(nn.Linear(d, C), nn.GELU(),
                                                            nn.Linear(C, C)))
        table = self.llama.embed_tokens.weight
        spread = table.detach().float().std().item()
        self.register_buffer("placeholder", spread * torch.randn(
            C, generator=torch.Generator().manual_seed(seed)).to(table.device), persistent=False)
        self.hybrid, self.rows, self.done = True, rows, 0       # rows: of all steps together
        self.rng = np.random.default_rng([seed, 9])

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(..) -> (.., C)"""
        return super().item_embeddings(items) if self.hybrid else self.placeholder.expand(
            *items.shape, -1)


def llara_loss(model: LLaRA, batch: Batch, lambda_ct: float) -> tuple[Tensor, Tensor, None]:
    """(L, L, None) by Eq. 1. In training a batch is hybrid with probability step / all steps.

    Steps are counted by rows, because a batch may come in parts. In a text-only batch the map P has
    no gradient and stays as it is.
    """
    if model.training:
        model.hybrid = model.rng.random() < model.done / model.rows
        model.done += len(batch.tokens)
    losses = cetrec.cetrec_loss(model, batch, 0.0)
    model.hybrid = True
    return losses


# ----------------------------------------------------------------------------------------------
# E4SRec: a sentence, item embeddings, and a softmax over items


@dataclass(frozen=True)
class ItemTokenizer(Tokenizer):
    """The instruction's tokens, one token V + i for each item, the response marker's tokens.

    There is no BOS. The answer is one token V + i, too, which is not embedded but scored.
    """

    ids: dict[str, int] = field(default_factory=dict)           # title -> V + its item

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples; no token carries a k."""
        before, after = (self.bpe.encode(text, add_special_tokens=False).ids for text in (
            build_prompt([], domain)[0].split("\n \n\n### Response")[0],
            "\n \n\n### Response:\n"))
        made = []
        for history, target in zip(histories, targets, strict=True):
            prompt = before + [self.ids[title] for title in history] + after
            answer = [] if target is None else [self.ids[target]]
            made.append(Example(prompt + answer, [NO_ITEM] * len(prompt + answer),
                                [IGNORE] * len(prompt) + answer))
        return made


class E4SRec(ItemLlama):
    """Items enter by a linear map of Z and are scored by a linear map of the last hidden state.

    The language model's own output map is not used, and no text is generated.
    """

    def __init__(self, model: TemporalLlama, splits, z: Tensor):
        V, C = model.llama.config.vocab_size, model.llama.config.hidden_size
        ids = {title: V + item for item, title in enumerate(splits[0].titles)}
        super().__init__(model, ItemTokenizer(**vars(model.tokenizer), ids=ids), z,
                         nn.Linear(z.shape[1], C))
        self.head = nn.Linear(C, len(z), bias=False).to(z.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(.., C) -> (.., N)"""
        return self.head(hidden.float())


def item_loss(model: E4SRec, batch: Batch, lambda_ct: float) -> tuple[Tensor, Tensor, None]:
    """Cross-entropy over the whole catalogue, one answer for each row."""
    scores, = world_logits(model, batch, batch.item_pos)
    loss = F.cross_entropy(scores, batch.targets - model.llama.config.vocab_size)
    return loss, loss, None


class LlmItemScores:
    """The ten items that E4SRec scores highest. Called like evaluate.GroundedBeams."""

    def __init__(self, model: E4SRec, test_set: Sequences, exclude_history: bool):
        self.model, self.test_set, self.exclude = model, test_set, exclude_history

    @torch.inference_mode()
    def __call__(self, histories, ages=None, progress: str = "items") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out = Lists.empty(len(histories))
        for chunk, prompts in prompts_by_length(self.model, self.test_set.titles,
                                                self.test_set.domain, histories, None, 64,
                                                progress):
            scores, ten = prefill(self.model, prompts)[1].numpy(force=True), out.items[chunk]
            id_baselines.best_of(scores, [histories[i] for i in chunk], self.exclude, ten)
            out.items[chunk] = ten
        return out


# ----------------------------------------------------------------------------------------------
# The command


OF_TITLES = OF_BEAMS | {"lists"}
FLAGS = {f.name for f in (*fields(Options), *fields(Where))} - {
    "temporal", "sinpe_scale", "index", "resume", "eval_only"}


def method_of(name: str, options: Options, out: Path) -> cetrec.Method:
    """What cetrec.run needs to know of a baseline."""
    def with_z(build: Callable) -> Callable:
        """(model, splits) -> the model with the item embeddings of a SASRec.

        Its own maps are drawn from the seed, whether or not a SASRec had to be trained before.
        """
        def wrap(model: TemporalLlama, splits) -> TemporalLlama:
            z = item_table(out, splits, options, device_of(model.llama))
            torch.manual_seed(options.seed)
            return build(model, splits, z)
        return wrap

    def llara(model: TemporalLlama, splits, z: Tensor) -> LLaRA:
        steps, _ = options.schedule(len(options.epoch(splits[0])))
        return LLaRA(model, splits, z, steps * options.batch_size, options.seed)

    def with_domain(model: TemporalLlama, splits) -> TemporalLlama:
        model.domain = splits[0].domain         # of the data: --domain is not always given
        return model

    def cft(model: TemporalLlama, batch: Batch, lambda_ct: float) -> tuple:
        return cft_loss(model, batch, lambda_ct, model.domain)

    def number_beams(model: P5, test_set: Sequences, options: Options) -> dict[str, Callable]:
        return {"10 beams on numbers": TitleBeams(model, test_set.titles, test_set.domain,
                                                  options.exclude_history)}

    def item_scores(model: E4SRec, test_set: Sequences, options: Options) -> dict[str, Callable]:
        return {"all items scored": LlmItemScores(model, test_set, options.exclude_history)}
    return {"cft": cetrec.Method("cft", with_domain, cft),
            "llara": cetrec.Method("llara", with_z(llara), llara_loss),
            "p5": cetrec.Method("p5", lambda model, splits: P5(model, splits, options.seed),
                                lists=number_beams),
            "e4srec": cetrec.Method("e4srec", with_z(E4SRec), item_loss, item_scores)}[name]


@dataclass(frozen=True, kw_only=True)
class Which:
    """The flag that only this command has."""

    method: str = flag("baseline", "which baseline", "cft", choices=["cft", "llara", "p5",
                                                                     "e4srec"])


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="python -m experiments.llm_baselines",
                description="Tune CFT, LLaRA, P5 or E4SRec and measure it as cetrec.py measures "
                "CETRec.")
    add_flags(ap, Which)
    add_flags(ap, Options, Where, only=FLAGS)
    given = parse(ap, argv)

    def work() -> None:
        """One run of the method that was asked for."""
        name, out = given.pop("method", "cft"), Path(given.pop("out", "runs"))
        if name != "cft" and given.keys() & {"lambda_ct"}:
            raise ValueError(f"--lambda-ct goes with --method cft; {name} has one loss")
        if name in ("p5", "e4srec") and (extra := sorted(given.keys() & OF_TITLES)):
            raise ValueError(f"{as_flag(extra[0])} goes with methods that write titles; {name} has "
                             "lists of its own")
        options = Options.from_flags(given)
        lists = ("titles",) if name == "p5" else options.lists
        options = replace(options, temporal="none", lists=lists,
                          lambda_ct=options.lambda_ct if name == "cft" else 0.0)
        cetrec.run(options, out, method=method_of(name, options, out))
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
