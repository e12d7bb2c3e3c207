"""data.py: windows, the split, prompts and spans, batches, epochs, tokenizer files."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TITLES

from data import (IGNORE, NO_ITEM, Batch, Catalogue, Example, Interactions, align_right, batches,
                  build_prompt, collate, common_prefix, encode_example, encode_sequences,
                  item_positions, make_sequences, split_by_time)
from support.checkpoints import check_context, read_tokenizer
from support.counting import items_seen
from support.runs import show_prompt
from support.tiny import BOS, EOS, SEEN, tiny_tokenizer


def interactions(rows) -> Interactions:
    users, items, times = (np.array(column) for column in zip(*rows))
    return Interactions(users, items, times, [str(i) for i in range(items.max() + 1)])


@pytest.fixture(scope="module")
def clocked() -> Interactions:
    """200 users with 1 to 39 interactions each; no two at the same time."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), rng.integers(1, 40, 200))
    return interactions(list(zip(rng.permutation(users), rng.integers(300, size=len(users)),
                                 100_000 * rng.permutation(len(users)))))


# ----------------------------------------------------------------------------------------------
# Sequences and splits


def test_windows_by_hand():
    """User 9 is out of order and has a tie, which the file's order decides; user 4 is short."""
    x = interactions([(9, 0, 50), (4, 1, 1), (9, 2, 10), (9, 3, 50), (4, 5, 2), (9, 6, 60),
                      (4, 7, 3), (9, 8, 70)])
    s = make_sequences(x, min_history=2, max_history=3)
    assert [(s.history(i).tolist(), s.target(i)) for i in range(len(s))] == [
        ([1, 5], 7), ([2, 0], 3), ([2, 0, 3], 6), ([0, 3, 6], 8)]
    assert s.timestamps.tolist() == [3, 50, 60, 70]
    assert len(make_sequences(x)) == 2
    assert items_seen(s.select([3, 0])).tolist() == [i in (0, 3, 6, 8, 1, 5, 7) for i in range(9)]
    assert s.titles_of(s.history(1)) == ["2", "0"]


def test_histories_have_3_to_10_items_and_belong_to_one_user(clocked):
    s = make_sequences(clocked)
    assert {len(s.history(i)) for i in range(len(s))} == set(range(3, 11))
    assert len(s) == sum(max(0, c - 3) for c in np.bincount(clocked.users))
    owner = np.sort(clocked.users)
    assert (owner[s.starts] == owner[s.targets]).all()


def test_no_future_leaks_across_the_split(clocked):
    sequences = make_sequences(clocked)
    train, valid, test = split_by_time(sequences)
    total = len(sequences)
    assert len(train) == total * 8 // 10 and len(train) + len(valid) == total * 9 // 10
    assert len(train) + len(valid) + len(test) == total
    assert train.timestamps.max() < valid.timestamps.min()
    assert valid.timestamps.max() < test.timestamps.min()
    for part in (train, valid, test):       # every history item happened before its answer
        assert all((part.times[a:b] < part.times[b]).all()
                   for a, b in zip(part.starts, part.targets))
    with pytest.raises(ValueError, match="9 sequences; wanted at least 10"):
        split_by_time(train.select(np.arange(9)))


def test_a_sample_is_seeded_in_order_and_everything_for_0(clocked):
    train = split_by_time(make_sequences(clocked))[0]
    number = {target: i for i, target in enumerate(train.targets)}
    drawn = [[number[target] for target in train.sample(500, seed).targets] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 500
    assert len(train) / 3 < np.mean(drawn[0]) < len(train) * 2 / 3      # not the first ones
    assert train.sample(0, 3) is train.sample(len(train), 3) is train


def test_ages_by_hand():
    """log2(1 + days before the answer): 0, 1 and 7 days give 0, 1 and 3."""
    day = 86_400
    x = interactions([(1, 0, 0), (1, 1, 6 * day), (1, 2, 7 * day), (1, 3, 7 * day)])
    timed = make_sequences(x, index="time")
    assert timed.ages(0).tolist() == [3.0, 1.0, 0.0] and make_sequences(x).ages(0) is None
    assert timed.history(0).tolist() == make_sequences(x).history(0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="'time' wants data with times"):
        make_sequences(replace(x, day=0), index="time")


# ----------------------------------------------------------------------------------------------
# The prompt, its items and its answer


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
    for k, title in enumerate(reversed(HISTORY)):           # k counts back from the newest (D1)
        tokens = [t for t, pos in zip(example.tokens, example.item_pos) if pos == k]
        text = tokenizer.bpe.decode(tokens)
        assert title in text and len(text) <= len(title) + 5, (k, title, text)
    outside = [t for t, pos in zip(example.tokens, example.item_pos) if pos == NO_ITEM]
    assert not any(title in tokenizer.bpe.decode(outside) for title in HISTORY)
    assert [k for k, _ in itertools.groupby(example.item_pos) if k != NO_ITEM] == list(
        range(len(HISTORY) - 1, -1, -1))        # one run of tokens each, oldest first


def test_item_positions_by_hand():
    """Titles at the characters 2 to 4 and 6 to 9. A token counts if it shares a character with one;
    tokens of no characters, as BOS, belong to none."""
    offsets = [(0, 0), (0, 2), (2, 3), (3, 5), (5, 6), (6, 8), (8, 9), (9, 11)]
    assert item_positions(offsets, [(2, 4), (6, 9)], [1, 0]) == [-1, -1, 1, 1, -1, 0, 0, -1]
    assert item_positions(offsets, [(2, 4)], [2.5]) == [-1, -1, 2.5, 2.5, -1, -1, -1, -1]
    assert item_positions([(0, 3), (3, 8)], [(2, 4), (6, 9)], [1, 0]) == [1, 1]


def test_a_token_that_straddles_a_quote_belongs_to_the_item(llama3_tokenizer):
    """At a title's end `)",` and, overlapping by one character only, at its start ` "(`."""
    example = encode_example(llama3_tokenizer, [TITLES[0], TITLES[-1], TITLES[4]], None)
    pieces = [(llama3_tokenizer.bpe.decode([t]), k)
              for t, k in zip(example.tokens, example.item_pos)]
    assert (' "(', 1) in pieces and ')",' in {piece for piece, k in pieces if k == 2}, pieces


def test_many_examples_are_the_same_as_one_at_a_time(llama3_tokenizer):
    histories, targets = [HISTORY, HISTORY[2:5], TITLES[:3]], ["Ran", None, "Heat"]
    ages = [None, np.array([2.0, 0.5, 0.5]), None]
    assert llama3_tokenizer.examples(histories, targets, "movies", ages) == [
        encode_example(llama3_tokenizer, *one, "movies", age)
        for *one, age in zip(histories, targets, ages)]
    with pytest.raises(ValueError, match="shorter"):
        llama3_tokenizer.examples(histories, targets[:2])


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


# ----------------------------------------------------------------------------------------------
# Batches and epochs


def test_rows_of_a_batch_end_together_by_hand():
    """Both begin with 1 2 3, of which the last is left to the rows, and have answers of two and of
    three tokens. Inputs are all tokens but the last."""
    examples = [Example([1, 2, 3, 10, 20, 30, 4], [-1, -1, -1, 0, -1, -1, -1],
                        [IGNORE] * 5 + [30, 4]),
                Example([1, 2, 3, 11, 12, 20, 31, 32, 4], [-1, -1, -1, 1, 0, -1, -1, -1, -1],
                        [IGNORE] * 6 + [31, 32, 4])]
    batch = collate(examples, pad_id=7)
    assert batch.prefix.tolist() == [1, 2] and batch.padding.tolist() == [2, 0]
    assert batch.tokens.tolist() == [[7, 7, 3, 10, 20, 30], [3, 11, 12, 20, 31, 32]]
    assert batch.item_pos.tolist() == [[-1, -1, -1, 0, -1, -1], [-1, 1, 0, -1, -1, -1]]
    assert batch.answers.tolist() == [[IGNORE, 30, 4], [31, 32, 4]]
    assert {x.dtype for x in vars(batch).values()} == {torch.int64}
    assert all(x.is_meta for x in vars(batch.to("meta")).values())


def test_rows_of_unequal_length_are_aligned_right():
    assert align_right([[1], [], [2, 3]], 9).tolist() == [[9, 1], [9, 9], [2, 3]]
    assert align_right([[0.5], [NO_ITEM, 2.0]], NO_ITEM).tolist() == [[-1, 0.5], [-1, 2]]


def test_the_common_prefix_leaves_a_token_of_each_row():
    """Also where one row begins another. Items, and answers, are never among it."""
    short, long, item, answer = (
        Example(tokens, item_pos, labels) for tokens, item_pos, labels in (
            ([5, 6], [-1, -1], [IGNORE] * 2), ([5, 6, 0, 0], [-1] * 4, [IGNORE] * 4),
            ([5, 6, 0, 0], [-1, -1, 0, -1], [IGNORE] * 4),
            ([5, 6, 0, 0], [-1] * 4, [IGNORE] * 3 + [0])))
    for rows, prefix in (([short, short], 1), ([short, long], 1), ([long, long], 3),
                         ([long, item], 1), ([item, item], 1), ([long, answer], 2),
                         ([answer, answer], 2), ([Example([9, 6], [-1] * 2, [IGNORE] * 2), short],
                                                 0)):
        assert common_prefix(rows) == prefix


def test_a_batch_holds_every_token_of_its_prompts_and_answers(tokenizer):
    """What all prompts say before the first history is the prefix, but for one token."""
    examples = [encode_example(tokenizer, HISTORY[:n], TITLES[n]) for n in (2, 5, 3)]
    batch = collate(examples)
    assert rows_of(batch, 0) == [(tuple(e.tokens), answer_of(e)) for e in examples]
    first_item = examples[0].item_pos.index(1)
    assert len(batch.prefix) == first_item - 1 > 0


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_parts_of_a_batch_are_its_rows_as_if_collated_by_themselves(tokenizer, rows):
    examples = [encode_example(tokenizer, HISTORY[:n], TITLES[n]) for n in (3, 6, 4, 1, 2)]
    for first in range(0, 5, rows):
        part = collate(examples).rows(slice(first, first + rows))
        alone = collate(examples[first:first + rows])
        for name, x in vars(part).items():
            assert torch.equal(x, getattr(alone, name)), name


def test_the_prompts_of_a_catalogue_have_no_answers(tokenizer):
    catalogue = Catalogue(TITLES, "games", tokenizer)
    by_clock = [np.array([4.0, 2.5, 0.0]), np.array([1.5])]
    for ages in (None, by_clock):
        assert catalogue.prompts([[0, 5, 3], [2]], ages) == [
            encode_example(tokenizer, titles, None, "games", ages and ages[i])
            for i, titles in enumerate(([TITLES[0], TITLES[5], TITLES[3]], [TITLES[2]]))]


def test_the_shown_prompt_marks_items_and_indices(tokenizer):
    shown = show_prompt(tokenizer, encode_example(tokenizer, ["Ran", "Heat"], "Jumanji (1995)"))
    for part in ("⟨Ran⟩[k=1, tokens", "⟨Heat⟩[k=0, tokens", '"Jumanji (1995)"'):
        assert part in shown


def test_k_counts_steps_where_no_ages_are_given(tokenizer):
    plain = encode_example(tokenizer, HISTORY, "Ran")
    timed = encode_example(tokenizer, HISTORY, "Ran", ages=np.arange(len(HISTORY))[::-1] * 1.5)
    assert [k * 1.5 if k != NO_ITEM else k for k in plain.item_pos] == timed.item_pos
    assert all(type(k) is int for k in plain.item_pos) and plain.tokens == timed.tokens
    assert "[k=0, tokens" in show_prompt(tokenizer, timed)
    assert "[k=1.5, tokens" in show_prompt(tokenizer, timed)


def test_the_longest_sequence_must_fit_the_context(tokenizer):
    """It is found among many; one token less than it has is too little."""
    x = interactions([(1, i, i) for i in range(20)])
    sequences = make_sequences(replace(x, titles=[
        *x.titles[:15], "a much longer title", *x.titles[16:]]))
    longest = max(len(encode_example(tokenizer, sequences.titles_of(sequences.history(i)),
                                     sequences.titles[sequences.target(i)]).tokens)
                  for i in range(len(sequences)))
    check_context(tokenizer, sequences, longest)
    with pytest.raises(ValueError, match=f"10 items, .* makes {longest} tokens"):
        check_context(tokenizer, sequences, longest - 1)


def test_a_title_longer_than_the_context_is_refused_shortly(tokenizer):
    x = interactions([(1, i, i) for i in range(20)])
    titles = [*x.titles[:-1], "very " * 5_000 + "long"]
    with pytest.raises(ValueError, match="more than the base's context of 512") as error:
        check_context(tokenizer, make_sequences(replace(x, titles=titles)), 512)
    assert len(str(error.value)) < 300


def answer_of(example: Example) -> tuple[int, ...]:
    """The tokens of an example's answer."""
    return tuple(label for label in example.labels if label != IGNORE)


def rows_of(batch: Batch, pad_id: int) -> list[tuple]:
    """(tokens, answer) of each row, without its padding."""
    rows, prefix = [], tuple(batch.prefix.tolist())
    for tokens, answer, padding in zip(batch.tokens.tolist(), batch.answers.tolist(),
                                       batch.padding.tolist()):
        answer = tuple(token for token in answer if token != IGNORE)
        assert set(tokens[:padding]) <= {pad_id}
        rows.append((prefix + tuple(tokens[padding:]) + answer[-1:], answer))
    return rows


def epoch(tokenizer, sequences, seed, shuffle=False) -> list[list[tuple]]:
    """rows_of all batches of eight."""
    return [rows_of(batch, tokenizer.pad_id) for batch in batches(
        tokenizer, sequences, 8, [seed], shuffle)]


def test_an_epoch_of_batches_holds_every_sequence_once_in_a_seeded_order(tokenizer, world_splits):
    train = world_splits[0]
    first, other = epoch(tokenizer, train, 0), epoch(tokenizer, train, 1)
    assert first == epoch(tokenizer, train, 0)
    drawn, others = (set(itertools.chain(*seeded[:32])) for seeded in (first, other))
    assert 20 < len(drawn - others) < 200               # 256 are drawn together, of all
    assert sorted(itertools.chain(*first)) == sorted(
        (tuple(e.tokens), answer_of(e)) for e in encode_sequences(tokenizer, train))


def test_batches_hold_rows_of_similar_length_and_come_in_random_order(tokenizer, world_splits):
    """Of the first 32, one ends where the next longer one begins."""
    widths = [sorted(len(tokens) for tokens, _ in rows)
              for rows in epoch(tokenizer, world_splits[0], 0)[:32]]
    assert widths != sorted(widths) and len(widths) == 32
    ends = [end for width in sorted(widths) for end in (width[0], width[-1])]
    assert ends == sorted(ends) and ends[0] < ends[-1]


def test_shuffled_histories_keep_their_items_and_answers(tokenizer, world_splits):
    """Title by title, in other orders; the answer stays."""
    def histories(shuffle):
        rows = []
        for tokens, answer in itertools.chain(*epoch(tokenizer, world_splits[0], 3, shuffle)):
            text = tokenizer.decode(list(tokens))
            titles = text.split('before:"')[1].split('"\n')[0].split('", "')
            rows.append((tokenizer.decode(list(answer)), titles))
        return rows
    plain, mixed = histories(False), histories(True)
    assert sorted((answer, sorted(titles)) for answer, titles in plain) == sorted(
        (answer, sorted(titles)) for answer, titles in mixed)
    assert sorted(plain) != sorted(mixed)
    known = {(answer, *titles) for answer, titles in plain}
    assert np.mean([(answer, *titles) in known for answer, titles in mixed]) < 0.2


@pytest.mark.parametrize("index", ["order", "time"])
def test_sequences_are_encoded_with_their_answers_and_ages(tokenizer, clocked, index):
    sequences = make_sequences(clocked, index=index).sample(20, 0)
    assert encode_sequences(tokenizer, sequences) == [
        encode_example(tokenizer, sequences.titles_of(sequences.history(i)),
                       sequences.titles[sequences.target(i)], ages=sequences.ages(i))
        for i in range(20)]


def test_batches_carry_the_ages_of_their_sequences(tokenizer, clocked):
    sequences = make_sequences(clocked, index="time").sample(150, 0)
    seen = set()
    for batch in batches(tokenizer, sequences, 16, [0]):
        assert batch.item_pos.dtype == torch.float32
        seen |= {round(float(k), 4) for k in batch.item_pos.unique() if k != NO_ITEM}
    ages = {round(float(np.float32(k)), 4) for i in range(len(sequences))
            for k in sequences.ages(i)}
    assert seen == ages and any(k % 1 for k in ages)


def test_shared_constants_do_not_collide_with_tokens():
    assert NO_ITEM == -1 and IGNORE == torch.nn.CrossEntropyLoss().ignore_index == -100


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
        "eos_token": EOS}
    folder = checkpoint_tokenizer(tmp_path, bpe, config=one)
    assert read_tokenizer(folder).eos_ids == (5,)
    checkpoint_tokenizer(tmp_path, bpe, generation_config=two)          # wins over config.json
    assert read_tokenizer(folder).eos_ids == (6, 7)
    checkpoint_tokenizer(tmp_path, bpe, tokenizer_config=three)         # trained on, stops at all
    assert read_tokenizer(folder).eos_ids == (1, 6, 7)
    assert read_tokenizer(folder).bos_id is None
    assert read_tokenizer(folder).pad_id == 1                    # EOS where there is none
    checkpoint_tokenizer(tmp_path, bpe, config={"bos_token_id": 8, "pad_token_id": 9},
                         generation_config={"pad_token_id": -1, "eos_token_id": 1},
                         tokenizer_config={"bos_token": {"content": BOS},
                                           "eos_token": {"content": EOS},
                                           "pad_token": "not in the vocabulary"})
    read = read_tokenizer(folder)
    assert (read.bos_id, read.eos_ids, read.pad_id) == (0, (1,), 1)
    checkpoint_tokenizer(tmp_path, bpe, generation_config={"pad_token_id": 9, "eos_token_id": 1})
    assert read_tokenizer(folder).pad_id == 9


@pytest.mark.parametrize("kind", ["ours", "Llama 3", "TinyLlama"])
def test_a_title_that_spells_a_special_token_is_text(tmp_path, llama3_tokenizer, kind):
    """In histories, in answers, in what is embedded for grounding, and again when it is decoded."""
    titles = ["<s>", "A</s>B", "</s>", BOS, EOS, f"A{EOS}B", "<|end_of_text|>"]
    bpe = {"ours": lambda: tiny_tokenizer(titles, np.full(7, SEEN), "movies", 300).bpe,
           "Llama 3": lambda: llama3_tokenizer.bpe, "TinyLlama": sentencepiece_like}[kind]()
    eos, bos = (EOS, BOS) if kind == "ours" else ("</s>", "<s>")
    tokenizer = read_tokenizer(checkpoint_tokenizer(
        tmp_path, bpe, tokenizer_config={"eos_token": eos, "bos_token": bos}, config={}))
    for title in titles:
        example = encode_example(tokenizer, [title, "Heat", title], title)
        special = [t for t in example.tokens if t in (tokenizer.bos_id, *tokenizer.eos_ids)]
        assert special == [tokenizer.bos_id, tokenizer.eos_ids[0]], title
        answer = [label for label in example.labels if label != IGNORE]
        if kind != "TinyLlama":         # which has no decoder here
            assert tokenizer.decode(answer) == f'"{title}"'
        assert not {*tokenizer.bpe.encode(title).ids[1:]} & {tokenizer.bos_id, *tokenizer.eos_ids}


def test_truncation_and_padding_left_in_the_file_do_not_touch_prompts(tmp_path, tokenizer):
    whole = tokenizer.bpe.encode("Toy Story (1995) and Heat (1995)").ids
    bpe = tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())
    bpe.enable_truncation(3)
    bpe.enable_padding(length=64)
    folder = checkpoint_tokenizer(tmp_path, bpe, config={"eos_token_id": 1})
    assert read_tokenizer(folder).bpe.encode("Toy Story (1995) and Heat (1995)").ids == whole


@pytest.mark.parametrize("files, message", [
    ({"config": {"eos_token_id": 1, "vocab_size": 100}}, "the embedding has 100 rows"),
    ({"config": {"eos_token_id": 9_999, "vocab_size": 1_000}}, "token id 9999"),
    ({"config": {}}, "no EOS token"), ({"config": []}, "config.json: not a JSON object"),
    ({"config": {"eos_token_id": "1"}}, "no EOS token")])
def test_a_tokenizer_that_does_not_go_with_the_base_is_refused(tmp_path, tokenizer, files, message):
    folder = checkpoint_tokenizer(tmp_path, tokenizer.bpe, **files)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_a_tokenizer_may_be_as_large_as_the_embedding_but_no_larger(tmp_path, tokenizer):
    size = tokenizer.bpe.get_vocab_size()
    read_tokenizer(checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={
        "eos_token_id": 1, "vocab_size": size}))
    with pytest.raises(ValueError, match=f"token id {size - 1}, but the embedding has {size - 1}"):
        read_tokenizer(checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={
            "eos_token_id": 1, "vocab_size": size - 1}))


def test_a_pad_id_outside_the_embedding_is_not_taken(tmp_path, tokenizer):
    size = tokenizer.bpe.get_vocab_size()
    folder = checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={
        "eos_token_id": 1, "vocab_size": size, "pad_token_id": size})
    assert read_tokenizer(folder).pad_id == 1


@pytest.mark.parametrize("single, ids, config, message", [
    ([BOS, "$A", EOS], {BOS: 0, EOS: 1}, {"eos_token_id": 1}, "it turns 'a' into .*'a', '<.end of"),
    (["$A", EOS], {EOS: 1}, {}, "nothing after it, where the answer goes; EOS is added to"),
    ([EOS], {EOS: 1}, {"eos_token_id": 1}, "it turns 'a' into "),
    (["$A", "<e>"], {"<e>": 99_999}, {"eos_token_id": 1}, "it turns 'a' into ..a., .<e>.*answers"),
    (["<s>", "$A"], {"<s>": 99_999}, {"eos_token_id": 1},
     "token id 99999 before every text .post_processor., but the embedding has 1000 rows")])
def test_what_a_post_processor_adds_stands_before_the_text_and_is_in_the_embedding(
        tmp_path, tokenizer, single, ids, config, message):
    """Also where no EOS is named: who is told to name one trains a second one."""
    bpe = tokenizers.Tokenizer.from_str(tokenizer.bpe.to_str())
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=list(ids.items()))
    folder = checkpoint_tokenizer(tmp_path, bpe, config=config | {"vocab_size": 1_000})
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        read_tokenizer(folder)


def test_an_interruption_while_a_tokenizer_is_read_is_none_of_its_faults(tmp_path, tokenizer,
                                                                         monkeypatch):
    checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={"eos_token_id": 1})

    class Slow:
        @staticmethod
        def from_buffer(content):
            raise KeyboardInterrupt
    monkeypatch.setattr("support.checkpoints.tokenizers.Tokenizer", Slow)
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(tmp_path)


def test_a_tokenizer_that_does_not_know_letters_is_refused(tmp_path):
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.add_special_tokens(["<e>"])
    with pytest.raises(ValueError, match=r"tokenizer.json: it turns 'a' into \[\]"):
        read_tokenizer(checkpoint_tokenizer(tmp_path, bpe, config={"eos_token_id": 0}))


def test_a_folder_may_have_a_name_that_is_no_text(tmp_path, tokenizer):
    """Linux allows any bytes, and in a locale without Unicode every é is such a byte."""
    folder = tmp_path / "\udcff"
    folder.mkdir()
    checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={"eos_token_id": 1})
    for path in tmp_path.glob("*.json"):
        path.rename(folder / path.name)
    assert read_tokenizer(folder).eos_ids == (1,)


def test_damaged_tokenizer_files_are_one_clear_error(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: not found"):
        read_tokenizer(tmp_path)
    checkpoint_tokenizer(tmp_path, tokenizer.bpe)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not valid JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_over_which_the_library_would_end_the_process_is_refused(tmp_path, tokenizer):
    checkpoint_tokenizer(tmp_path, tokenizer.bpe, config={"eos_token_id": 1})
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "x"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json: words with a prefix or suffix"):
        read_tokenizer(tmp_path)


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
        bpe, settings = tokenizer.bpe, settings | {"bos_token": BOS, "eos_token": EOS}
    folder = checkpoint_tokenizer(tmp_path, bpe, tokenizer_config=settings, config={
        "model_type": "llama", "vocab_size": 1_000})
    ours, theirs = read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.bos_id == theirs.bos_token_id and ours.eos_ids == (theirs.eos_token_id,)
    for history in (TITLES[:3], TITLES[3:], ["  spaces ", "naïve 映画 😀", "</s>"]):
        if kind == "TinyLlama" and "</s>" in history:
            history = history[:2]       # there transformers 5 departs from tokenizer.json, and 4
        prompt = build_prompt(history)[0]
        ids = theirs(prompt, split_special_tokens=True)["input_ids"]        # "</s>" is a title here
        assert ours.bpe.encode(prompt).ids == ids
        assert encode_example(ours, history, None).tokens == ids
    first = encode_example(ours, TITLES[:1], None).tokens[0]
    assert (first == ours.bos_id) == (kind != "SmolLM2")
