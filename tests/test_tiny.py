"""support/tiny.py: the built-in base, its tokenizer and what it is trained on."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TITLES, small_config

from data import IGNORE, NO_ITEM, build_prompt, collate, encode_example
from llama import Llama, load_llama
from support import progress
from support.checkpoints import read_tokenizer
from support.tiny import (BOS, SEEN, TinyBase, supervise_titles, tiny_base, tiny_tokenizer,
                          title_loss, tokenizer_for)

RECIPE = TinyBase(pieces=300, hidden_size=16, intermediate_size=32, max_sequences=32,
                  batch_size=16)


def test_the_tiny_base_is_a_checkpoint_made_once_and_named_after_its_sources(tmp_path,
                                                                             world_splits):
    train_set, cpu = world_splits[0], torch.device("cpu")
    folder = tiny_base(tmp_path, [train_set], 0, cpu, RECIPE)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_base(tmp_path, [train_set], 0, cpu, RECIPE) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    others = [tiny_base(tmp_path, [train_set], 1, cpu, RECIPE),
              tiny_base(tmp_path, [train_set.select(slice(5, None))], 0, cpu, RECIPE),
              tiny_base(tmp_path, [train_set], 0, cpu, TinyBase(**(vars(RECIPE) | {"lr": 1e-3})))]
    assert len({folder, *others}) == 4
    tokenizer, llama = read_tokenizer(folder), load_llama(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert llama.config.vocab_size == tokenizer.bpe.get_vocab_size()
    for title in train_set.titles:
        assert tokenizer.decode(tokenizer.bpe.encode(f'"{title}"').ids) == f'"{title}"'
    again = load_llama(tiny_base(tmp_path / "elsewhere", [train_set], 0, cpu, RECIPE))
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), again.parameters()))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]


def test_a_base_whose_making_was_interrupted_goes_on_to_the_same_weights(tmp_path, world_splits,
                                                                         monkeypatch):
    recipe = replace(RECIPE, max_sequences=160)             # ten steps
    whole = tiny_base(tmp_path / "whole", world_splits, 0, torch.device("cpu"), recipe)
    log_step, logged = progress.log_step, []

    def stop_at_8(log, bar, done, *values):
        if done.step == 8:
            raise KeyboardInterrupt
        logged.append(done.step)
        return log_step(log, bar, done, *values)
    monkeypatch.setattr(progress, "log_step", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        tiny_base(tmp_path / "broken", world_splits, 0, torch.device("cpu"), recipe)
    folder = tmp_path / "broken" / whole.name
    assert not (folder / "config.json").exists() and logged == [*range(1, 8)]
    monkeypatch.setattr(progress, "log_step", lambda log, bar, done, *values: (
        logged.append(done.step), log_step(log, bar, done, *values))[1])
    assert tiny_base(tmp_path / "broken", world_splits, 0, torch.device("cpu"), recipe) == folder
    assert logged[7:] == [7, 8, 9, 10]          # the last checkpoint was that of step 6
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_two_processes_that_want_the_same_base_make_it_once(tmp_path):
    """The second waits for the first."""
    code = ("import sys, torch; sys.path.insert(0, '.'); from pathlib import Path\n"
            "from data import make_sequences, split_by_time\n"
            "from support.synthetic import SyntheticWorld\n"
            "from support.tiny import TinyBase, tiny_base\n"
            "splits = split_by_time(make_sequences(SyntheticWorld(items=40).interactions(120)))\n"
            "torch.set_num_threads(1)\n"
            "print(tiny_base(Path(sys.argv[1]), splits, 0, torch.device('cpu'), TinyBase(\n"
            "    pieces=300, hidden_size=16, intermediate_size=32, max_sequences=3200)))")
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
            for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    outs = sorted((out for out, _ in outputs), key=len)
    assert outs[0].splitlines()[-1] == outs[1].splitlines()[-1]
    assert sum("tiny base | step" in out for out in outs) == 1
    assert outs[0].startswith("waiting for another process that is at work on ")


def test_a_base_is_made_where_its_files_are_links_which_are_not_followed(tmp_path, world_splits):
    train_set, cpu = world_splits[0], torch.device("cpu")
    whole = tiny_base(tmp_path / "whole", [train_set], 0, cpu, RECIPE)
    folder, users = tmp_path / "linked" / whole.name, tmp_path / "users.txt"
    folder.mkdir(parents=True)
    users.write_text("a file of the user's")
    for name in ("log.jsonl", "model.safetensors", "tokenizer.json", "tokenizer.json.part"):
        (folder / name).symlink_to(users)
    assert tiny_base(tmp_path / "linked", [train_set], 0, cpu, RECIPE) == folder
    assert users.read_text() == "a file of the user's"
    for path in whole.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_the_context_is_checked_before_a_base_is_made(tmp_path, world_splits):
    """Of every split: here only the test split has the long title."""
    long = world_splits[2].titles.copy()
    test_set = world_splits[2].select([0])
    long[test_set.target(0)] = "la " * 2_000
    test_set = replace(test_set, titles=long)
    with pytest.raises(ValueError, match="more than the base's context of 1024"):
        tiny_base(tmp_path, (*world_splits[:2], test_set), 0, torch.device("cpu"), RECIPE)
    assert not list(tmp_path.iterdir())


def test_the_base_is_trained_on_shuffled_histories(tmp_path, world_splits, monkeypatch):
    """In every epoch anew."""
    drawn = []

    def one_batch(tokenizer, sequences, size, seed, shuffle_histories):
        drawn.append((seed, shuffle_histories))
        return [collate([encode_example(tokenizer, sequences.titles[:4], sequences.titles[4])])]
    monkeypatch.setattr("support.tiny.batches", one_batch)
    recipe = replace(RECIPE, epochs=2, least_steps=1, max_sequences=10_000)
    tiny_base(tmp_path, world_splits[:1], 5, torch.device("cpu"), recipe)
    assert drawn == [([5, 1, 0], True), ([5, 1, 1], True)]


def test_the_base_is_supervised_on_history_titles_and_the_answer(tokenizer):
    """All of their tokens but the first one of a history, which nothing could predict."""
    examples = [encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)]
    batch = collate(examples)
    answers, before = supervise_titles(batch).answers, batch.answers.clone()
    assert answers.shape == batch.tokens.shape and torch.equal(batch.answers, before)
    for example, row in zip(examples, answers.tolist()):
        P, n = len(batch.prefix), len(example.tokens)
        first = next(t for t, k in enumerate(example.item_pos) if k != NO_ITEM)
        following = [example.tokens[t] if t > first and example.item_pos[t] != NO_ITEM
                     else example.labels[t] for t in range(P + 1, n)]
        assert row == [IGNORE] * (len(row) - len(following)) + following
        supervised = sum(label != IGNORE for label in following)
        assert supervised == sum(k != NO_ITEM for k in example.item_pos) - 1 + sum(
            label != IGNORE for label in example.labels)


def test_the_loss_of_the_base_is_that_of_its_rows_token_by_token(tokenizer):
    """The supervised tokens, each predicted from those before it, and the first token of each
    history, predicted from itself."""
    examples = [encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)]
    llama, losses = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size())), []
    for p in llama.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for example in examples:
        log_p = llama.logits(llama(llama.embed(torch.tensor([example.tokens])))[0][0]).log_softmax(
            dim=-1)
        first = next(t for t, k in enumerate(example.item_pos) if k != NO_ITEM)
        for t, (token, k, label) in enumerate(zip(example.tokens, example.item_pos,
                                                  example.labels)):
            if label != IGNORE or (k != NO_ITEM and t > first):
                losses.append(-log_p[t - 1, token])
            if t == first:
                losses.append(-log_p[t, token])
    batch = supervise_titles(collate(examples, share_prefix=False))
    torch.testing.assert_close(title_loss(llama, batch), torch.stack(losses).mean())


@pytest.mark.parametrize("titles", [TITLES, ["Rocky", "Rocky 2", "Rocky 10", "Up 2 You"]])
def test_titles_decode_back_and_quotes_stand_alone(titles):
    tokenizer = tiny_tokenizer(titles, np.arange(len(titles)), "games", 540)
    prompt, spans = build_prompt(titles, "games")
    encoding = tokenizer.bpe.encode(prompt)
    assert tokenizer.decode(encoding.ids) == prompt and encoding.ids[0] == 0
    borders = {place for offsets in encoding.offsets for place in offsets}
    for (start, end), title in zip(spans, titles):
        if '"' not in title:
            assert start in borders and end in borders      # no token reaches over a title's quote
        answer = tokenizer.bpe.encode(f'"{title}"', add_special_tokens=False).ids
        assert tokenizer.bpe.decode(answer) == f'"{title}"'
        assert tokenizer.bpe.decode(answer[:1]) == '"'      # an answer begins at a token of its own


def test_a_title_seen_often_is_one_token_a_sequels_number_another_a_rare_title_is_spelled():
    titles, counts = ["The Long Goodbye", "The Long Goodbye 2", "Ran"], np.array([SEEN, SEEN, 1])
    chosen = tiny_tokenizer(titles, counts, "movies", 258)
    prompt = build_prompt(titles, "movies")[0]
    words = [chosen.bpe.decode([t], skip_special_tokens=False) for t in
             chosen.bpe.encode(prompt).ids]
    before, after = prompt.split('"The Long')[0], prompt.split('Ran"')[1]
    assert words == [BOS, before, '"', "The Long Goodbye", '", "',
                     "The Long Goodbye", " 2", '", "', "R", "a", "n", '"', after]


def test_titles_count_as_often_as_training_recommended_them(world_splits):
    train_set = world_splits[0].select(slice(0, 100))
    often = np.bincount(train_set.items[train_set.targets], minlength=len(train_set.titles))
    words = {word.replace("Ġ", " ") for word in tokenizer_for(train_set, 258).bpe.get_vocab()}
    frequent = {part for title, count in zip(train_set.titles, often) if count >= SEEN
              for part in re.fullmatch(r"(.*?)( \d+)?", title).groups() if part}
    rare = {title for title, count in zip(train_set.titles, often) if count < SEEN} - frequent
    assert len(frequent) > 3 and frequent <= words and rare and not rare & words
