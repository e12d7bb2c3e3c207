"""CFT, P5, E4SRec and LLaRA on the base and in the protocol of cetrec.py (Table 3).

    python -m experiments.llm_baselines --method cft --data ml-100k
    python -m experiments.llm_baselines --method llara --data ml-100k --model path/to/Llama-3

Each is one function at the end of this file, made of the same parts as `cetrec.new_run`. They
differ in how items are written into the prompt, in what is put round the base model, in the loss
and in the lists. (BIGRec, the fifth of Table 3's that tune an LLM, is `cetrec.py --temporal none`.)
docs/baselines.md says what the originals do otherwise.

                prompt             items in it       loss           lists
    BIGRec      titles             their tokens      Eq. 1          grounded beams, beams on titles
    CFT         titles             their tokens      + the effect   the same
    LLaRA       titles             tokens, and Z     Eq. 1          the same
    P5          numbers            their tokens      Eq. 1          beams on numbers
    E4SRec      a sentence         Z                 item softmax   all items scored

Z is the table of item embeddings of a SASRec, which is trained on demand. Where a prompt holds the
embedding of item i, its token is V + i, one that no tokenizer makes.

Shapes: B rows, T tokens, A tokens of the longest answer, C width, V vocabulary, N items,
M supervised tokens, d width of Z.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cetrec import TemporalLlama, answer_logits, cetrec_loss, tune_and_evaluate
from data import (DOMAINS, IGNORE, NO_ITEM, Batch, Catalogue, Example, Sequences, Tokenizer,
                  build_prompt, collate)
from evaluate import Lists, prompts_by_length, read_prompts
from experiments import id_baselines
from llama import KeysValues, Llama
from support import runs
from support.files import save_arrays
from support.options import OF_BEAMS, Options, Where, add_flags, as_flag, defaults, flag, parse
from support.processes import first_process_first
from support.runs import RunInputs
from support.terminal import Parser, exit_status
from support.trie import TitleBeams, make_recommenders

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


def token_weights(answers: Tensor, least: float = 0.25) -> Tensor:
    """w_t = 1 - (1 - β) (t - 1) / (m - 1) for the m tokens of each answer, from 1 down to β.

    The beginning of a title decides most. An answer of one token has the weight 1.
    (B, A) -> (M,)
    """
    answered = answers != IGNORE
    t, m = answered.cumsum(dim=1) - 1, answered.sum(dim=1, keepdim=True)
    return (1 - (1 - least) * t / (m - 1).clamp(min=1))[answered]


def weighted_cross_entropy(logits: Tensor, answers: Tensor, least: float = 0.25) -> Tensor:
    """Σ w CE / Σ w over all tokens of the answers.  (M, V), (B, A) -> ()"""
    weights = token_weights(answers, least)
    losses = F.cross_entropy(logits, answers[answers != IGNORE], reduction="none")
    return (weights * losses).sum() / weights.sum()


def cft_loss(model: TemporalLlama, batch: Batch, lambda_ct: float,
             prompt: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(L, L_n, L_c) with L = L_n + λ L_c, both cross-entropies being weighted means over tokens.

    L_n is Eq. 1. L_c takes f(x_h) - f(x_0) instead of f(x_h), where x_0 is `prompt`: the same
    instruction without any history and without the input's sentence. Gradients flow through both.
    CETRec keeps the history in x_0 and erases its order only.
    """
    logits_h = answer_logits(model, batch, batch.item_pos)
    loss_n = weighted_cross_entropy(logits_h, batch.answers)
    if lambda_ct == 0:
        return loss_n, loss_n, None
    without = answers_behind(prompt, batch)
    logits_0 = answer_logits(model, without, without.item_pos)
    loss_c = weighted_cross_entropy(logits_h - logits_0, batch.answers)
    return loss_n + lambda_ct * loss_c, loss_n, loss_c


def prompt_without_history(tokenizer: Tokenizer, domain: str) -> list[int]:
    """The tokens of x_0."""
    return tokenizer.bpe.encode(NO_HISTORY.format(**DOMAINS[domain])).ids


def example_of(prompt: list[int], answer: list[int]) -> Example:
    """Tokens of a prompt and of an answer, none of which carries a k."""
    return Example(prompt + answer, [NO_ITEM] * len(prompt + answer),
                   [IGNORE] * len(prompt) + answer)


def answers_behind(prompt: list[int], batch: Batch) -> Batch:
    """The answers of a batch, row by row, each behind the same prompt."""
    answers = [[t for t in row if t != IGNORE] for row in batch.answers.tolist()]
    return collate([example_of(prompt, answer) for answer in answers]).to(batch.tokens.device)


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
        examples = []
        for history, target in zip(histories, targets, strict=True):
            items = " , ".join(f"item_{self.numbers[title]}" for title in history)
            prompt = self.bpe.encode(f"These {domain} were consumed in this order. What is the "
                                     f"next item ?\n{items}\nResponse:").ids
            answer = [] if target is None else self.number_tokens(target) + [self.eos_ids[0]]
            examples.append(example_of(prompt, answer))
        return examples

    def number_tokens(self, title: str) -> list[int]:
        """The tokens of an item's number."""
        return self.bpe.encode(f" item_{self.numbers[title]}", add_special_tokens=False).ids


def sequential_numbers(train_set: Sequences) -> dict[str, str]:
    """Title -> number from 1001 on, in the order of training windows by time; then all others."""
    trained = dict.fromkeys(int(item) for start, target in zip(train_set.starts, train_set.targets)
                            for item in train_set.items[start:target + 1])
    order = [*trained, *(item for item in range(len(train_set.titles)) if item not in trained)]
    return {train_set.titles[item]: str(number) for number, item in enumerate(order, start=1001)}


class P5(TemporalLlama):
    """A Llama whose embedding of the digits is learned anew, by factors beside the input table.

    What a base knows of numbers is no use here, so the rows of all tokens that occur in them are
    drawn anew, with the table's own spread. The factors give each token another row A B α/R.
    """

    def __init__(self, llama: Llama, tokenizer: NumberTokenizer, seed: int, rank: int = 8,
                 alpha: float = 16.0):
        super().__init__(llama, "none")
        table, rng = llama.embed_tokens.weight, torch.Generator().manual_seed(seed)
        used = sorted({t for title in tokenizer.numbers for t in tokenizer.number_tokens(title)})
        with torch.no_grad():
            table[used] = (table.float().std().cpu() * torch.randn(
                len(used), table.shape[1], generator=rng)).to(table)
        self.alpha_by_rank = alpha / rank
        self.A = nn.Parameter(torch.zeros(table.shape[0], rank, device=table.device))
        self.B = nn.Parameter(torch.randn(rank, table.shape[1], generator=rng).to(table.device))

    def forward(self, tokens: Tensor, item_pos: Tensor, positions: Tensor | None = None,
                mask: Tensor | None = None, past: list[KeysValues] | None = None,
                last: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """As TemporalLlama.forward."""
        x = self.llama.embed(tokens)
        x = x + (self.alpha_by_rank * self.A[tokens] @ self.B).to(x.dtype)
        return self.llama(x, positions, mask, past, last)


# ----------------------------------------------------------------------------------------------
# Items as embeddings: what E4SRec and LLaRA share


def item_table(inputs: RunInputs, out: Path) -> Tensor:
    """Z (N, d): the item embeddings of a SASRec with the settings of id_baselines.

    It is trained once and kept in a folder below out, whose name is a digest of what it was made
    from.
    """
    (train_set, valid_set, _), seed = inputs.splits, inputs.options.seed
    recipe = id_baselines.Recipe(**defaults(id_baselines.Recipe, "sasrec") | {"method": "sasrec"})
    source = hashlib.sha256(json.dumps([asdict(recipe), seed, train_set.titles]).encode())
    for part in (train_set, valid_set):
        for array in (part.items, part.starts, part.targets):
            source.update(array.tobytes())
    path = out / f"sasrec-{source.hexdigest()[:12]}" / "model.safetensors"
    with first_process_first():
        if not path.is_file():
            torch.manual_seed(seed)
            sasrec = id_baselines.SASRec(len(train_set.titles), recipe.width).to(inputs.device)
            found = id_baselines.fit(sasrec, train_set, valid_set.sample(1_000, seed), recipe, seed,
                                     log=lambda line: None)
            print(f"SASRec for item embeddings | {found['epochs']} epochs in "
                  f"{found['seconds']:.0f} s | validation NDCG@10 "
                  f"{max(found['validation_ndcg10']):.4f}")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_arrays({name: x.numpy(force=True) for name, x in sasrec.state_dict().items()},
                        path)
    return load_file(path, device=str(inputs.device))["embedding.weight"][:-1]  # without the pads


def item_tokens(titles: list[str], llama: Llama) -> dict[str, int]:
    """Title -> V + its item."""
    return {title: llama.config.vocab_size + item for item, title in enumerate(titles)}


class ItemLlama(TemporalLlama):
    """A Llama in which the token V + i is item i, given by a map of the frozen row Z[i]."""

    def __init__(self, llama: Llama, z: Tensor, project: nn.Module):
        super().__init__(llama, "none")
        self.register_buffer("z", z, persistent=False)
        self.project = project.to(z.device)

    def forward(self, tokens: Tensor, item_pos: Tensor, positions: Tensor | None = None,
                mask: Tensor | None = None, past: list[KeysValues] | None = None,
                last: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """As TemporalLlama.forward."""
        return self.llama(self.embed(tokens), positions, mask, past, last)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)"""
        item = tokens - self.llama.config.vocab_size
        x = self.llama.embed(tokens.where(item < 0, 0))
        rows = self.item_embeddings(item.clamp(min=0)).to(x.dtype)
        return torch.where((item < 0)[..., None], x, rows)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(..) -> (.., C)"""
        return self.project(self.z[items])


# ----------------------------------------------------------------------------------------------
# LLaRA: titles, each followed by its item's embedding


@dataclass(frozen=True)
class HybridTokenizer(Tokenizer):
    """Puts the token V + i behind the last token of each title in the history."""

    item_tokens: dict[str, int] = field(default_factory=dict)

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples."""
        return [self.with_items(example, history) for example, history in
                zip(super().examples(histories, targets, domain), histories)]

    def with_items(self, example: Example, history) -> Example:
        """The example with a token more for each title of its history."""
        k = example.item_pos
        ends = [t for t in range(len(k) - 1) if k[t] != NO_ITEM and k[t + 1] != k[t]]
        if len(ends) != len(history):
            raise ValueError(f"with this tokenizer {len(history)} titles of a history have tokens "
                             f"of their own for {len(ends)} only; use another --model")
        tokens, item_pos, labels = list(example.tokens), list(k), list(example.labels)
        for t, title in reversed(list(zip(ends, history))):     # so that earlier ends stay right
            tokens.insert(t + 1, self.item_tokens[title])
            item_pos.insert(t + 1, NO_ITEM)
            labels.insert(t + 1, IGNORE)
        return Example(tokens, item_pos, labels)


class LLaRA(ItemLlama):
    """Title tokens and P(Z[i]), with P a map of two layers; learned from text to both.

    A batch is either hybrid or text only, and then a fixed vector, which says nothing of the item,
    stands where the embedding would. The share of hybrid batches rises from 0 to 1 in the course of
    tuning. Outside of training all are hybrid.
    """

    def __init__(self, llama: Llama, z: Tensor, steps: int, seed: int):
        C, d = llama.config.hidden_size, z.shape[1]
        super().__init__(llama, z, nn.Sequential(nn.Linear(d, C), nn.GELU(), nn.Linear(C, C)))
        spread = llama.embed_tokens.weight.detach().float().std().item()
        self.register_buffer("placeholder", spread * torch.randn(
            C, generator=torch.Generator().manual_seed(seed)).to(z.device), persistent=False)
        self.hybrid, self.step, self.steps = False, 0, steps    # step: how many have begun
        self.rng = np.random.default_rng([seed, 9])

    def begin_step(self) -> None:
        """Decide of which kind a step is: hybrid with probability (steps before it) / steps."""
        self.hybrid = self.rng.random() < self.step / self.steps
        self.step += 1

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(..) -> (.., C)"""
        if self.training and not self.hybrid:
            return self.placeholder.expand(*items.shape, -1)
        return super().item_embeddings(items)


def llara_loss(model: LLaRA, batch: Batch, lambda_ct: float) -> tuple[Tensor, Tensor, None]:
    """(L, L, None) by Eq. 1.

    A step may come in parts, of which the first finds no gradients. So all parts, in all processes,
    are of one kind. In a text-only step the map P has no gradient and stays as it is.
    """
    if model.training and all(p.grad is None for p in model.parameters()):
        model.begin_step()
    return cetrec_loss(model, batch, 0.0)


# ----------------------------------------------------------------------------------------------
# E4SRec: a sentence, item embeddings, and a softmax over items


@dataclass(frozen=True)
class ItemTokenizer(Tokenizer):
    """The instruction's tokens, one token V + i for each item, the response marker's tokens.

    There is no BOS. The answer is one token V + i, too, which is not embedded but scored.
    """

    item_tokens: dict[str, int] = field(default_factory=dict)

    def examples(self, histories, targets, domain: str = "movies", ages=None) -> list[Example]:
        """As Tokenizer.examples; no token carries a k."""
        before, after = (self.bpe.encode(text, add_special_tokens=False).ids for text in (
            build_prompt([], domain)[0].split("\n \n\n### Response")[0],
            "\n \n\n### Response:\n"))
        return [example_of(before + [self.item_tokens[title] for title in history] + after,
                           [] if target is None else [self.item_tokens[target]])
                for history, target in zip(histories, targets, strict=True)]


class E4SRec(ItemLlama):
    """Items enter by a linear map of Z and are scored by a linear map of the last hidden state.

    The language model's own output map is not used, and no text is generated.
    """

    def __init__(self, llama: Llama, z: Tensor):
        C = llama.config.hidden_size
        super().__init__(llama, z, nn.Linear(z.shape[1], C))
        self.head = nn.Linear(C, len(z), bias=False).to(z.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(.., C) -> (.., N)"""
        return self.head(hidden.float())


def item_loss(model: E4SRec, batch: Batch, lambda_ct: float) -> tuple[Tensor, Tensor, None]:
    """Cross-entropy over the whole catalogue, one answer for each row."""
    scores = answer_logits(model, batch, batch.item_pos)                        # (B, N)
    loss = F.cross_entropy(scores, batch.answers[:, 0] - model.llama.config.vocab_size)
    return loss, loss, None


class LlmItemScores:
    """The ten items that E4SRec scores highest. Called like evaluate.GroundedBeams."""

    def __init__(self, model: E4SRec, catalogue: Catalogue, exclude_history: bool = True):
        self.model, self.catalogue, self.exclude_history = model, catalogue, exclude_history

    @torch.inference_mode()
    def __call__(self, histories, ages=None, progress: str = "items") -> Lists:
        """Item ids, oldest first, of each history -> ten items for each."""
        out = Lists.empty(len(histories))
        for chunk, prompts in prompts_by_length(self.catalogue, histories, None, 64, progress):
            scores = read_prompts(self.model, prompts)[0].numpy(force=True)
            out.items[chunk] = id_baselines.best_items(scores, [histories[i] for i in chunk],
                                                       self.exclude_history)
        return out


# ----------------------------------------------------------------------------------------------
# The four runs; `options` have no temporal embedding, and λ only for CFT


def cft(options: Options, out: Path) -> None:
    """Tune and evaluate CFT in a new folder below `out`."""
    inputs = open_as("cft", options, out)
    model = TemporalLlama(inputs.llama, "none")
    runs.add_factors(model.llama, options)
    lists = make_recommenders(model, inputs.catalogue, options)
    prompt = prompt_without_history(inputs.tokenizer, inputs.splits[0].domain)
    folder = runs.start(out, "cft", inputs)
    tune_and_evaluate(inputs, model, lists, folder, partial(cft_loss, prompt=prompt))


def llara(options: Options, out: Path) -> None:
    """Tune and evaluate LLaRA in a new folder below `out`."""
    inputs = open_as("llara", options, out)
    tokens = item_tokens(inputs.splits[0].titles, inputs.llama)
    inputs = replace(inputs, tokenizer=HybridTokenizer(**vars(inputs.tokenizer),
                                                       item_tokens=tokens))
    z = item_table(inputs, out)
    steps, _ = options.schedule(len(options.repeat_if_small(inputs.splits[0])))
    torch.manual_seed(options.seed)         # whether or not a SASRec had to be trained
    model = LLaRA(inputs.llama, z, steps, options.seed)
    runs.add_factors(model.llama, options)
    lists = make_recommenders(model, inputs.catalogue, options)
    folder = runs.start(out, "llara", inputs)
    tune_and_evaluate(inputs, model, lists, folder, llara_loss)


def p5(options: Options, out: Path) -> None:
    """Tune and evaluate P5 in a new folder below `out`."""
    inputs = open_as("p5", options, out)
    tokenizer = NumberTokenizer(**vars(inputs.tokenizer),
                                numbers=sequential_numbers(inputs.splits[0]))
    inputs = replace(inputs, tokenizer=tokenizer)
    model = P5(inputs.llama, tokenizer, options.seed)
    runs.add_factors(model.llama, options)
    lists = {"10 beams on numbers": TitleBeams(model, inputs.catalogue, options.exclude_history)}
    folder = runs.start(out, "p5", inputs)
    tune_and_evaluate(inputs, model, lists, folder)


def e4srec(options: Options, out: Path) -> None:
    """Tune and evaluate E4SRec in a new folder below `out`."""
    inputs = open_as("e4srec", options, out)
    tokens = item_tokens(inputs.splits[0].titles, inputs.llama)
    inputs = replace(inputs, tokenizer=ItemTokenizer(**vars(inputs.tokenizer), item_tokens=tokens))
    z = item_table(inputs, out)
    torch.manual_seed(options.seed)         # whether or not a SASRec had to be trained
    model = E4SRec(inputs.llama, z)
    runs.add_factors(model.llama, options)
    lists = {"all items scored": LlmItemScores(model, inputs.catalogue, options.exclude_history)}
    folder = runs.start(out, "e4srec", inputs)
    tune_and_evaluate(inputs, model, lists, folder, item_loss)


def open_as(method: str, options: Options, out: Path) -> RunInputs:
    """What a run of this method works on."""
    inputs = runs.open_inputs(options, out)
    inputs.record["method"] = method
    return inputs


METHODS = {"cft": cft, "llara": llara, "p5": p5, "e4srec": e4srec}

# ----------------------------------------------------------------------------------------------
# The command


OF_TITLES = OF_BEAMS | {"lists"}
FLAGS = {f.name for f in (*fields(Options), *fields(Where))} - {
    "temporal", "sinpe_scale", "index", "resume", "eval_only"}


@dataclass(frozen=True, kw_only=True)
class Which:
    """The flag that only this command has."""

    method: str = flag("baseline", "which baseline", "cft", choices=[*METHODS])


def main(argv: list[str] | None = None) -> int:
    """Parse and run. Returns the exit status."""
    ap = Parser(prog="python -m experiments.llm_baselines",
                description="Tune CFT, LLaRA, P5 or E4SRec and measure it as cetrec.py measures "
                "CETRec.")
    add_flags(ap, Which)
    add_flags(ap, Options, Where, only=FLAGS)
    flags = parse(ap, argv)

    def work() -> None:
        """One run of the method that was asked for."""
        name, out = flags.pop("method", "cft"), Path(flags.pop("out", "runs"))
        if name != "cft" and "lambda_ct" in flags:
            raise ValueError(f"--lambda-ct goes with --method cft; {name} has one loss")
        if name in ("p5", "e4srec") and (extra := sorted(flags.keys() & OF_TITLES)):
            raise ValueError(f"{as_flag(extra[0])} goes with methods that write titles; {name} has "
                             "lists of its own")
        options = Options.from_flags(flags)
        options = replace(options, temporal="none",
                          lists=("titles",) if name == "p5" else options.lists,
                          lambda_ct=options.lambda_ct if name == "cft" else 0.0)
        METHODS[name](options, out)
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
