"""data.py: windows, the split, prompts and spans, batches, the synthetic world, the report."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES

import data
from data import (IGNORE, NO_ITEM, Interactions, Tokenizer, batches, build_prompt, collate,
                  encode_example, make_sequences, show_prompt, split_by_time)
from support.synthetic import SyntheticWorld


def interactions(rows) -> Interactions:
    users, items, times = (np.array(column) for column in zip(*rows))
    return Interactions(users, items, times, [str(i) for i in range(items.max() + 1)])


def test_windows_by_hand():
    """User 9 out of order with a tie (file order decides), user 4 too short to give anything."""
    x = interactions([(9, 0, 50), (4, 1, 1), (9, 2, 10), (9, 3, 50), (4, 5, 2), (9, 6, 60), (4, 7,
                                                                                             3),
                      (9, 8, 70)])
    s = make_sequences(x, min_history=2, max_history=3)
    assert [(s.history(i).tolist(), s.target(i)) for i in range(len(s))] == [
        ([1, 5], 7), ([2, 0], 3), ([2, 0, 3], 6), ([0, 3, 6], 8)]
    assert s.timestamps.tolist() == [3, 50, 60, 70]
    assert len(make_sequences(x)) == 2


def test_histories_have_3_to_10_items_and_belong_to_one_user():
    world = SyntheticWorld()
    rng = np.random.default_rng(0)
    rows = [(u, int(rng.integers(300)), int(rng.integers(1000))) for u in range(30)
            for _ in range(rng.integers(1, 40))]
    x = interactions(rows)
    s = make_sequences(x)
    assert {len(s.history(i)) for i in range(len(s))} == set(range(3, 11))
    assert len(s) == sum(max(0, c - 3) for c in np.bincount(x.users))
    owner = np.sort(x.users)
    assert (owner[s.starts] == owner[s.targets]).all()
    assert len(world.titles) == len(set(world.titles)) == 300


def test_no_future_leaks_across_the_split():
    x = SyntheticWorld().interactions(300)
    train, valid, test = split_by_time(make_sequences(x))
    total = len(train) + len(valid) + len(test)
    assert len(train) == total * 8 // 10 and len(train) + len(valid) == total * 9 // 10
    assert train.timestamps.max() <= valid.timestamps.min()
    assert valid.timestamps.max() <= test.timestamps.min()
    assert train.timestamps.max() < test.timestamps.min()
    # every history item happened no later than its answer
    order = np.lexsort((x.timestamps, x.users))
    times = x.timestamps[order]
    for part in (train, valid, test):
        assert (times[part.targets - 1] <= part.timestamps).all()
    with pytest.raises(ValueError, match="9 sequences; wanted at least 10"):
        split_by_time(train.select(np.arange(9)))


PROMPT = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.\x20

### Instruction:
Given a list of video games the user has played before, please recommend a new video game that the \
user likes to the user.

### Input:
The user has played the following video games before:"A", "B, C"
\x20

### Response:
"""


def test_the_prompt_to_the_byte():
    text, spans = build_prompt(["A", "B, C"], "games")
    assert text == PROMPT and [text[a:b] for a, b in spans] == ["A", "B, C"]


def test_special_characters_of_format_strings_survive():
    text, spans = build_prompt(["{thing}", "100 % {0}"], "movies")
    assert [text[a:b] for a, b in spans] == ["{thing}", "100 % {0}"]


HISTORY = ['Say "Cheese", Amélie (2001)', "Heat", "1984 (1984)", "Heat (1995)", "Heat",
           "Alien³ (1992)", "Ocean's 11 (2001)"]


@pytest.mark.parametrize("which", ["tokenizer", "llama3_tokenizer"])
def test_spans_by_offsets_cover_each_title_and_nothing_else(which, request):
    """Quotes, commas, accents, digits and a repeated title; the items' tokens decode to the
    titles."""
    tokenizer = request.getfixturevalue(which)
    example = encode_example(tokenizer, HISTORY, "Ran")
    assert len(example.tokens) == len(example.item_pos) == len(example.labels)
    assert sorted(set(example.item_pos)) == [NO_ITEM, *range(len(HISTORY))]
    # newest first: k counts back from the newest (D1)
    for k, title in enumerate(reversed(HISTORY)):
        tokens = [t for t, pos in zip(example.tokens, example.item_pos) if pos == k]
        text = tokenizer.bpe.decode(tokens)
        assert title in text and len(text) <= len(title) + 5, (k, title, text)
    outside = [t for t, pos in zip(example.tokens, example.item_pos) if pos == NO_ITEM]
    assert not any(title in tokenizer.bpe.decode(outside) for title in HISTORY)
    places = [i for i, pos in enumerate(example.item_pos) if pos != NO_ITEM]
    assert [p for p, _ in itertools.groupby(example.item_pos[places[0]:places[-1] + 1])
            if p != NO_ITEM] == list(range(len(HISTORY) - 1, -1, -1))


def test_a_token_that_straddles_a_quote_belongs_to_the_item(llama3_tokenizer):
    """At a title's end `)",` and, overlapping by one character only, at its start ` "(`."""
    example = encode_example(llama3_tokenizer, [TITLES[0], TITLES[-1], TITLES[4]], None)
    pieces = [(llama3_tokenizer.bpe.decode([t]), k)
              for t, k in zip(example.tokens, example.item_pos)]
    assert (' "(', 1) in pieces and ')",' in {piece for piece, k in pieces if k == 2}, pieces


@pytest.mark.parametrize("which", ["tokenizer", "llama3_tokenizer"])
def test_answer_labels_and_one_builder_for_training_and_inference(which, request):
    tokenizer = request.getfixturevalue(which)
    trained = encode_example(tokenizer, HISTORY[:3], "Ran")
    asked = encode_example(tokenizer, HISTORY[:3], None)
    n = len(asked.tokens)
    assert trained.tokens[:n] == asked.tokens and trained.item_pos[:n] == asked.item_pos
    assert set(asked.labels) == {IGNORE} == set(trained.labels[:n])
    assert trained.labels[n:] == trained.tokens[n:] and trained.tokens[-1] == tokenizer.eos_ids[0]
    assert tokenizer.decode(trained.tokens[n:]) == '"Ran"'
    assert set(trained.item_pos[n:]) == {NO_ITEM}


def test_collate_shifts_labels_pads_right_and_finds_the_prefix(tokenizer):
    examples = [encode_example(tokenizer, HISTORY[:n], "Ran") for n in (2, 5)]
    batch = collate(examples)
    B, T = batch.tokens.shape
    assert (B, T) == (2, len(examples[1].tokens))
    for row, e in enumerate(examples):
        n = len(e.tokens)
        assert batch.tokens[row, :n].tolist() == e.tokens
        assert batch.labels[row, :n - 1].tolist() == e.labels[1:]
        assert (batch.labels[row, n - 1:] == IGNORE).all() and (batch.item_pos[row,
                                                                               n:] == NO_ITEM).all()
    first_item = min(e.item_pos.index(next(k for k in e.item_pos if k >= 0)) for e in examples)
    assert batch.prefix == first_item
    assert collate(examples[:1]).prefix == first_item


def test_a_batch_knows_where_its_targets_are(tokenizer):
    """Places of unequal numbers of labels: B·A places less the fillers are the M labels in order.
    """
    answers = ["Ran", "Up, Up and Away (2000)", "Heat"]
    batch = collate([encode_example(tokenizer, HISTORY[:n], answer)
                     for n, answer in zip((2, 5, 3), answers)])
    assert torch.equal(batch.targets, batch.labels[batch.labels != IGNORE])
    rows = torch.arange(3)[:, None].expand_as(batch.places).flatten()
    where = rows[batch.supervised], batch.places.flatten()[batch.supervised]
    assert torch.equal(torch.stack(where, 1), (batch.labels != IGNORE).nonzero())
    assert batch.places.shape[1] == int((batch.labels != IGNORE).sum(1).max())
    assert int(batch.places.min()) >= batch.prefix
    moved = batch.to("meta")
    assert moved.places.is_meta and moved.tokens.is_meta and moved.prefix == batch.prefix


def test_the_shown_prompt_marks_items_and_indices(tokenizer):
    shown = show_prompt(tokenizer, encode_example(tokenizer, ["Ran", "Heat"], "Jumanji (1995)"))
    for part in ("⟨Ran⟩[k=1, tokens", "⟨Heat⟩[k=0, tokens", '"Jumanji (1995)"'):
        assert part in shown


# ------------------------------------------------------------------ the clock, options, the report


def test_ages_by_hand():
    """log2(1 + days before the answer): 0, 1 and 7 days give 0, 1 and 3."""
    day = 86_400
    x = interactions([(1, 0, 0), (1, 1, 6 * day), (1, 2, 7 * day), (1, 3, 7 * day)])
    timed = make_sequences(x, index="time")
    assert timed.ages(0).tolist() == [3.0, 1.0, 0.0] and make_sequences(x).ages(0) is None
    assert timed.history(0).tolist() == make_sequences(x).history(0).tolist() == [0, 1, 2]


def test_order_is_as_before_where_no_ages_are_given(tokenizer):
    plain = encode_example(tokenizer, HISTORY, "Ran")
    timed = encode_example(tokenizer, HISTORY, "Ran", ages=np.arange(len(HISTORY))[::-1] * 1.5)
    assert [k * 1.5 if k != NO_ITEM else k for k in plain.item_pos] == timed.item_pos
    assert all(type(k) is int for k in plain.item_pos) and plain.tokens == timed.tokens
    assert "[k=0, tokens" in show_prompt(tokenizer, timed)
    assert "[k=1.5, tokens" in show_prompt(tokenizer, timed)


def test_a_title_longer_than_the_context_is_refused_shortly(tokenizer):
    x = interactions([(1, i, i) for i in range(20)])
    titles = [*x.titles[:-1], "very " * 5_000 + "long"]
    with pytest.raises(ValueError, match="more than the base's context of 512") as error:
        data.check_context(tokenizer, make_sequences(data.replace(x, titles=titles)), 512)
    assert len(str(error.value)) < 300


# ------------------------------------------------------------------ epochs of batches


@pytest.fixture(scope="module")
def world_data():
    world = SyntheticWorld(items=40)
    return split_by_time(make_sequences(world.interactions(120)))


def test_an_epoch_of_batches_holds_every_sequence_once_in_a_seeded_order(tokenizer, world_data):
    train_set, _, _ = world_data

    def answers(seed, shuffle=False):
        return [tuple(row[row != IGNORE].tolist()) for b in batches(
            tokenizer, train_set, 8, np.random.default_rng(seed), shuffle)
            for row in b.labels]
    first = answers(0)
    assert len(first) == len(train_set) and first == answers(0) and first != answers(1)
    assert sorted(first) == sorted(answers(1)) == sorted(answers(2, shuffle=True))


def test_shuffled_histories_keep_their_items(tokenizer, world_data):
    train_set, _, _ = world_data
    one = train_set.select(np.arange(20))
    plain, mixed = (next(iter(batches(tokenizer, one, 20, np.random.default_rng(3), s)))
                    for s in (False, True))
    assert not torch.equal(plain.tokens, mixed.tokens)
    rows = [sorted(b.tokens.sort().values.tolist()) for b in (plain, mixed)]
    assert rows[0] == rows[1]


def test_batches_carry_the_ages_of_their_sequences(tokenizer):
    sequences = make_sequences(SyntheticWorld(items=40).interactions(60), index="time")
    seen = set()
    for batch in batches(tokenizer, sequences, 16, np.random.default_rng(0)):
        seen |= {round(float(k), 4) for k in batch.item_pos.unique() if k != NO_ITEM}
    wanted = {round(float(np.float32(k)), 4) for i in range(len(sequences))
              for k in sequences.ages(i)}
    assert seen == wanted and any(k % 1 for k in wanted)


def test_a_sample_is_seeded_in_order_and_everything_for_0(world_data):
    train_set, _, _ = world_data
    drawn = train_set.sample(20, seed=3)
    places = [train_set.targets.tolist().index(t) for t in drawn.targets]
    assert places == sorted(places) and len(set(places)) == 20
    assert (train_set.sample(20, seed=3).targets == drawn.targets).all()
    assert (train_set.sample(20, seed=4).targets != drawn.targets).any()
    assert train_set.sample(0, seed=3) is train_set.sample(len(train_set), seed=3) is train_set


def test_shared_constants_do_not_collide_with_tokens():
    assert data.NO_ITEM == -1 and data.IGNORE == torch.nn.CrossEntropyLoss().ignore_index == -100
    assert len(set(TITLES)) == len(TITLES)


# ----------------------------------------------------------------------------------------------
# tokenizer.json and the files beside it


def checkpoint_tokenizer(folder, bpe, **files):
    """tokenizer.json and JSON files beside it; key generation_config -> generation_config.json."""
    bpe.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_special_ids_come_from_the_three_files_in_the_ecosystems_order(tmp_path, tokenizer):
    bpe, one, two, three = tokenizer.bpe, {"eos_token_id": 5}, {"eos_token_id": [6, 7]}, {
        "eos_token": "<|end_of_text|>"}
    folder = checkpoint_tokenizer(tmp_path, bpe, config=one)
    assert Tokenizer.from_folder(folder).eos_ids == (5,)
    checkpoint_tokenizer(tmp_path, bpe, generation_config=two)          # wins over config.json
    assert Tokenizer.from_folder(folder).eos_ids == (6, 7)
    checkpoint_tokenizer(tmp_path, bpe, tokenizer_config=three)         # trained on, stops at all
    assert Tokenizer.from_folder(folder).eos_ids == (1, 6, 7)
    assert Tokenizer.from_folder(folder).bos_id is None
    assert Tokenizer.from_folder(folder).pad_id == 1                    # EOS where there is none
    checkpoint_tokenizer(tmp_path, bpe, config={"bos_token_id": 8, "pad_token_id": 9},
                         generation_config={"pad_token_id": -1, "eos_token_id": 1},
                         tokenizer_config={"bos_token": {"content": "<|begin_of_text|>"},
                                           "eos_token": {"content": "<|end_of_text|>"},
                                           "pad_token": "not in the vocabulary"})
    read = Tokenizer.from_folder(folder)
    assert (read.bos_id, read.eos_ids, read.pad_id) == (0, (1,), 1)


def test_truncation_and_padding_left_in_the_file_do_not_touch_prompts(tmp_path, tokenizer):
    whole = tokenizer.bpe.encode("Toy Story (1995) and Heat (1995)").ids
    bpe = tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())
    bpe.enable_truncation(3)
    bpe.enable_padding(length=64)
    folder = checkpoint_tokenizer(tmp_path, bpe, config={"eos_token_id": 1})
    assert Tokenizer.from_folder(folder).bpe.encode("Toy Story (1995) and Heat (1995)").ids == whole


@pytest.mark.parametrize("files, message", [
    ({"config": {"eos_token_id": 1, "vocab_size": 100}}, "the embedding has 100 rows"),
    ({"config": {"eos_token_id": 9_999, "vocab_size": 1_000}}, "token id 9999"),
    ({"config": {}}, "no EOS token"), ({"config": []}, "config.json: not a JSON object"),
    ({"config": {"eos_token_id": "1"}}, "no EOS token")])
def test_a_tokenizer_that_does_not_go_with_the_base_is_refused(tmp_path, tokenizer, files, message):
    folder = checkpoint_tokenizer(tmp_path, tokenizer.bpe, **files)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)


def test_a_tokenizer_may_be_as_large_as_the_embedding_but_no_larger(tmp_path, tokenizer):
    size = tokenizer.bpe.get_vocab_size()
    Tokenizer.from_folder(checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={
        "eos_token_id": 1, "vocab_size": size}))
    with pytest.raises(ValueError, match=f"token id {size - 1}, but the embedding has {size - 1}"):
        Tokenizer.from_folder(checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={
            "eos_token_id": 1, "vocab_size": size - 1}))


def test_damaged_tokenizer_files_are_one_clear_error(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: not found"):
        Tokenizer.from_folder(tmp_path)
    checkpoint_tokenizer(tmp_path, tokenizer.bpe)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2's and TinyLlama's: spaces become a letter, unknown characters bytes."""
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator([build_prompt(TITLES)[0]] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"] + [
            f"<0x{byte:02X}>" for byte in range(256)]))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return bpe


@pytest.mark.parametrize("kind", ["Llama 3", "SmolLM2", "TinyLlama", "ours"])
def test_prompts_have_the_ids_of_transformers_autotokenizer(tmp_path, tokenizer, llama3_tokenizer,
                                                            kind):
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    bpe = llama3_tokenizer.bpe
    if kind == "SmolLM2":               # no BOS before a prompt
        bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
        bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    elif kind == "TinyLlama":
        bpe, settings = sentencepiece_like(), settings | {"tokenizer_class": "LlamaTokenizer",
                                                          "add_bos_token": True, "legacy": False}
    elif kind == "ours":
        bpe, settings = tokenizer.bpe, settings | {"bos_token": "<|begin_of_text|>",
                                                   "eos_token": "<|end_of_text|>"}
    folder = checkpoint_tokenizer(tmp_path, bpe, tokenizer_config=settings, config={
        "model_type": "llama", "vocab_size": 1_000})
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.bos_id == theirs.bos_token_id and ours.eos_ids == (theirs.eos_token_id,)
    for history in (TITLES[:3], TITLES[3:], ["  spaces ", "naïve 映画 😀", "</s>"]):
        if kind == "TinyLlama" and "</s>" in history:
            history = history[:2]       # there transformers 5 departs from tokenizer.json, and 4
        prompt = build_prompt(history)[0]
        assert ours.bpe.encode(prompt).ids == theirs(prompt)["input_ids"]
        assert encode_example(ours, history, None).tokens == theirs(prompt)["input_ids"]
    first = encode_example(ours, TITLES[:1], None).tokens[0]
    assert (first == ours.bos_id) == (kind != "SmolLM2")
