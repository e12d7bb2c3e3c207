"""support/tiny.py: the embedded base, its tokenizer and what it is trained on."""

import re

import numpy as np
import pytest
import torch
from conftest import TITLES

from data import IGNORE, NO_ITEM, Tokenizer, build_prompt, collate, encode_example
from llama import load_llama
from support.tiny import (BOS, SEEN, TinyBase, tiny_base, tiny_tokenizer, supervise_titles,
                          tokenizer_for)

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
    tokenizer, llama = Tokenizer.from_folder(folder), load_llama(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert llama.config.vocab_size == tokenizer.bpe.get_vocab_size()
    for title in train_set.titles:
        assert tokenizer.decode(tokenizer.bpe.encode(f'"{title}"').ids) == f'"{title}"'
    again = load_llama(tiny_base(tmp_path / "elsewhere", [train_set], 0, cpu, RECIPE))
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), again.parameters()))


def test_the_base_is_trained_on_shuffled_histories(tmp_path, world_splits, monkeypatch):
    asked = []
    monkeypatch.setattr("support.tiny.batches", lambda tokenizer, sequences, size, rng, shuffle_histories:
                        asked.append(shuffle_histories) or iter([collate([encode_example(
                            tokenizer, sequences.titles[:4], sequences.titles[4])])]))
    tiny_base(tmp_path, world_splits[:1], 0, torch.device("cpu"), RECIPE)
    assert asked == [True, True]        # 32 sequences are two steps, each of them an epoch here


def test_the_base_is_supervised_on_history_titles_and_the_answer(tokenizer):
    batch = collate([encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)])
    labels = supervise_titles(batch).labels
    for row in range(3):
        for t in range(batch.tokens.shape[1] - 1):
            wanted = (batch.tokens[row, t + 1] if batch.item_pos[row, t + 1] != NO_ITEM else
                      batch.labels[row, t])
            assert labels[row, t] == wanted
    assert ((labels != IGNORE).sum() > 3 * (batch.labels != IGNORE).sum())
    assert (batch.labels == collate([encode_example(tokenizer, TITLES[:n], TITLES[-n])
                                     for n in (3, 6, 4)]).labels).all()        # not in place


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
    wanted = {part for title, count in zip(train_set.titles, often) if count >= SEEN
              for part in re.fullmatch(r"(.*?)( \d+)?", title).groups() if part}
    rare = {title for title, count in zip(train_set.titles, often) if count < SEEN} - wanted
    assert len(wanted) > 3 and wanted <= words and rare and not rare & words
