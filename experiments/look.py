"""Looking at single cases: ten titles for a history, one test sequence explained token by token.

`python cetrec.py --recommend WHERE TITLE ...` and `--explain RUN N` are the commands.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cetrec import (DECODING, cetrec_loss, erase_order, fill_in, find_checkpoint, load_data,
                    make_splits, open_model, read_run, twin_forward)
from data import IGNORE, Example, Tokenizer, collate, encode_example, show_prompt
from evaluate import Lists, Recommender
from llama import HUB_NAME

LINE = "-" * 80
ARTICLE = re.compile(r"^(.*), (The|A|An|Le|La|Les|Der|Die|Das|Il|El)$")


def recommend(where: str, wanted: list[str], given: dict) -> None:
    """Print ten titles with their probabilities in both worlds, for a history of titles.

    where: a run; or an adapter, with the base and the data in `given`; or a base, with the data.
    """
    folder, adapter, given = Path(where), None, {"decode": "exact"} | given
    if (folder / "run.json").is_file():
        options, base = read_run(folder, given, "--recommend")
        (domain, titles), adapter = _catalogue(folder), folder
    else:
        if "data" not in given:
            raise ValueError(f"{where}: not a run, so name the catalogue with --data")
        if (folder / "adapter_config.json").is_file():
            if "model" not in given:
                raise ValueError(f"{where}: an adapter, so name its base with --model")
            adapter, given = folder, _settings(folder) | given
        elif "model" in given:
            raise ValueError(f"{where}: neither a run nor an adapter, so --model does not go with "
                             "it; give a base as WHERE")
        elif not (folder / "config.json").is_file() and (
                folder.exists() or not HUB_NAME.fullmatch(where)):
            raise FileNotFoundError(
                f"{folder / 'config.json'}: not found; wanted a run (run.json), an adapter "
                "(adapter_config.json), a base (config.json) or a name on the Hub")
        else:
            given["model"] = where
        known = DECODING | {"data", "data_dir", "domain", "sample", "chronological", "index",
                            "order_strength", "skip_bad_lines", "seed", "model", "temporal",
                            "sinpe_scale", "device", "dtype"}
        if extra := sorted(given.keys() - known):
            raise ValueError(f"--recommend tunes nothing; it does not go with --"
                             f"{extra[0].replace('_', '-')}")
        options = fill_in(given)
        base, (interactions, _) = find_checkpoint(options.model), load_data(options)
        domain, titles = interactions.domain, interactions.titles
    if options.index == "time":
        raise ValueError(f"{where}: its index is time, and titles without dates have none")
    if options.decode == "beams":
        raise ValueError("--recommend wants probabilities of titles, and --decode beams scores "
                         "free text; use exact or trie")
    history = resolve_titles(wanted, titles)
    model = open_model(options, base, adapter)
    recommender = Recommender(model, titles, domain, options.decoding())
    erased = np.zeros(len(history))             # every item at k = 0, as erase_order puts them
    print("history, oldest first: " + ", ".join(
        f"{titles[item]} [k={len(history) - 1 - i}]" for i, item in enumerate(history)))
    print(side_by_side(titles, recommender([history]), recommender([history], [erased])))


def explain(run_folder: Path, number: str, given: dict) -> None:
    """Print what both worlds make of one test sequence of a run, counted from 0."""
    options, base = read_run(run_folder, {"decode": "exact"} | given, "--explain")
    if options.decode == "beams":
        raise ValueError("--explain wants probabilities of titles, and --decode beams scores free "
                         "text; use exact or trie")
    interactions, _ = load_data(options)
    (_, _, test_set), _ = make_splits(interactions, options)
    if not number.isdecimal() or int(number) >= len(test_set):
        raise ValueError(f"--explain: test sequence {number!r}; wanted a number from 0 to "
                         f"{len(test_set) - 1}")
    i = int(number)
    history, ages, answer = test_set.history(i), test_set.ages(i), test_set.target(i)
    model = open_model(options, base, run_folder, (test_set,))
    example = encode_example(model.tokenizer, test_set.words(history), test_set.titles[answer],
                             test_set.domain, ages)
    batch = collate([example]).to(next(model.parameters()).device)
    with torch.no_grad():
        losses, worlds = cetrec_loss(model, batch, options.lambda_ct), twin_forward(model, batch)
    told = explanation(model.tokenizer, example, *worlds, options.lambda_ct, losses,
                       options.temporal != "none")
    print(f"test sequence {i} of {len(test_set):,}\n{told}")
    recommender = Recommender(model, test_set.titles, test_set.domain, options.decoding())
    factual, erased = (recommender([history], k) for k in (
        None if ages is None else [ages], [np.zeros(len(history))]))
    print(side_by_side(test_set.titles, factual, erased, 5, answer))


def explanation(tokenizer: Tokenizer, example: Example, logits_f: Tensor, logits_cf: Tensor,
                lambda_ct: float, losses, temporal: bool = True) -> str:
    """One prompt with its answer: what differs between the worlds, and each answer token's part in
    the losses (Eq. 8, 9), which are means over the M answer tokens.

    logits (M, V) of both worlds; losses (L, L_TA, L_CT or None) as cetrec_loss gives them;
    temporal: has the model an embedding that tells the worlds apart?
    """
    lines = ["the prompt and the answer, each item ⟨marked⟩ with its index k", LINE,
             show_prompt(tokenizer, example), LINE, "the worlds differ at"]
    item_pos = torch.as_tensor(example.item_pos)
    moved = (temporal & (item_pos != erase_order(item_pos))).tolist()
    first = 0
    for last, (here, k) in enumerate(zip(moved, example.item_pos), 1):
        if last == len(moved) or example.item_pos[last] != k:
            if here:
                text = tokenizer.bpe.decode(example.tokens[first:last])
                lines.append(f"  tokens {first}..{last - 1}: k = {k:.3g}, erased 0 | {text}")
            first = last
    if not any(moved):
        lines.append("  no token: " + ("every item is at k = 0 in both" if temporal else
                                       "without a temporal embedding they are one"))
    targets = torch.tensor([t for t, label in zip(example.tokens, example.labels)
                            if label != IGNORE], device=logits_f.device)
    M = len(targets)
    log_f, log_cf, log_effect = (
        -F.cross_entropy(logits, targets, reduction="none")
        for logits in (logits_f, logits_cf, logits_f - logits_cf))
    lines += ["", "the answer token by token, in nats; parts of a loss are -log p / "
              f"{M}, for L_CT with p = softmax(f(x_t) - f(x_0))",
              f"{'token':<28}{'log p(x_t)':>12}{'log p(x_0)':>12}{'effect':>12}"
              f"{'of L_TA':>12}{'of L_CT':>12}"]
    for token, f, cf, e in zip(targets.tolist(), *(x.tolist() for x in (log_f, log_cf,
                                                                        log_effect))):
        name = repr(tokenizer.bpe.decode([token], skip_special_tokens=False))
        lines.append(f"{name[:27]:<28}{f:>12.4f}{cf:>12.4f}{f - cf:>+12.4f}{-f / M:>12.4f}"
                     f"{-e / M:>12.4f}")
    f, cf, e = (float(x.sum()) for x in (log_f, log_cf, log_effect))
    loss, loss_ta, loss_ct = losses
    lines.append(f"{'sum':<28}{f:>12.4f}{cf:>12.4f}{f - cf:>+12.4f}{-f / M:>12.4f}{-e / M:>12.4f}")
    told = f"L = L_TA = {loss_ta:.4f}, as λ = 0"
    if loss_ct is not None:
        told = (f"L = L_TA + λ L_CT = {loss_ta:.4f} + {lambda_ct:g} x {loss_ct:.4f} = "
                f"{loss:.4f}")
    return "\n".join([*lines, told, ""])


def side_by_side(titles: Sequence[str], factual: Lists, erased: Lists, length: int = 10,
                 answer: int | None = None) -> str:
    """The first titles of both worlds' lists with their probabilities, the answer marked by *."""
    def cell(lists: Lists, rank: int) -> str:
        item = lists.items[0, rank] if rank < lists.items.shape[1] else -1
        if item < 0:
            return " " * 46
        title = titles[item] if len(titles[item]) <= 34 else titles[item][:33] + "…"
        percent = 100 * np.exp(lists.log_p[0, rank])
        return (f"{'*' if item == answer else ' '} {title:<34}"
                f"{percent:>8{'.3f' if percent >= 0.001 else '.0e'}} %")
    lines = [f"    {'factual world':<36}{'p(title)':>10}   {'erased world':<36}{'p(title)':>10}"]
    lines += [f"{rank + 1:>2}  {cell(factual, rank)}   {cell(erased, rank)}".rstrip()
              for rank in range(length)]
    if answer is not None:
        lines.append(f"* the answer: {titles[answer]}")
    return "\n".join(lines)


def resolve_titles(wanted: Sequence[str], titles: Sequence[str]) -> list[int]:
    """Item ids of titles typed by hand: case, year and the place of an article do not matter, nor
    do small slips. Says what it took for what.

    Raises ValueError that lists the candidates of an ambiguous or unknown title.
    """
    if not 1 <= len(wanted) <= 10:
        raise ValueError(f"{len(wanted)} titles; wanted 1 to 10, the newest last")
    whole: dict[str, set[int]] = {}     # a title as it stands wins over one less its year
    forms: dict[str, set[int]] = {}
    for item, title in enumerate(titles):
        whole.setdefault(title.casefold(), set()).add(item)
        bare = re.sub(r"\s*\(\d{4}\)$", "", title)
        year = title[len(bare):]
        turned = ARTICLE.sub(r"\2 \1", bare)
        for form in (title, bare, turned, turned + year, ARTICLE.sub(r"\1", bare)):
            forms.setdefault(form.casefold(), set()).add(item)
    history = []
    for text in wanted:
        key = text.strip().casefold()
        found = ({i for i in whole.get(key, ()) if titles[i] == text} or whole.get(key)
                 or forms.get(key, set()))
        if not found:
            near = difflib.get_close_matches(key, forms, n=50, cutoff=0.7)
            score = [difflib.SequenceMatcher(None, form, key).ratio() for form in near]
            # the best only, where it is clearly the best
            clear = [form for form, s in zip(near, score) if s >= score[0] - 0.05]
            found = set().union(*(forms[form] for form in clear))
            if not found:
                found = set().union(*(ids for form, ids in forms.items() if key in form))
        if not found:
            raise ValueError(f"{text!r}: no title like it among the {len(titles):,} of the "
                             "catalogue")
        if len(found) > 1:
            some = "; ".join(titles[item] for item in sorted(found)[:8])
            raise ValueError(f"{text!r}: which one? {some}{'; ...' if len(found) > 8 else ''}")
        history.append(next(iter(found)))
        if titles[history[-1]] != text:
            print(f"{text!r} taken for {titles[history[-1]]}")
    return history


def _catalogue(folder: Path) -> tuple[str, list[str]]:
    """(domain, titles) of a run's items."""
    path = folder / "catalogue.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; python cetrec.py --eval-only {folder} writes "
                                "it")
    try:
        catalogue = json.loads(path.read_text(encoding="utf-8"))
        return catalogue["domain"], catalogue["titles"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a run's catalogue ({error!r})") from None


def _settings(folder: Path) -> dict:
    """The flags that an adapter without a run was tuned with, as its temporal.json says."""
    path = folder / "temporal.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a tuned adapter of ours has it")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        scale = {"sinpe_scale": saved["scale"]} if saved["temporal"] == "sinpe" else {}
        return {"temporal": saved["temporal"], "index": saved["index"]} | scale
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an adapter ({error!r})") from None
