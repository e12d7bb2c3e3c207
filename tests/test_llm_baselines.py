"""experiments/llm_baselines.py: CFT, P5, E4SRec and LLaRA against plain statements of each."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TITLES, small_config, small_runs
from torch import nn

import cetrec
from cetrec import TemporalLlama, cetrec_loss, learning_rate, tuned_parameters
from data import (IGNORE, NO_ITEM, Batch, Catalogue, Interactions, Tokenizer, collate,
                  encode_sequences, make_sequences, split_by_time)
from evaluate import read_prompts
from experiments import llm_baselines
from experiments.llm_baselines import (P5, E4SRec, HybridTokenizer, ItemTokenizer, LlmItemScores,
                                       LLaRA, NumberTokenizer, cft_loss, item_loss, item_tokens,
                                       llara_loss, prompt_without_history, sequential_numbers,
                                       token_weights, weighted_cross_entropy)
from experiments.report import Run, compare
from llama import Llama
from lora import ALL_LINEAR, add_lora
from support.synthetic import SyntheticWorld
from support.tiny import SEEN, TinyBase, pretrain, tiny_tokenizer
from support.trie import TitleBeams


@pytest.fixture(scope="module")
def splits():
    """Sequences over TITLES: users who go round the catalogue, each from another item."""
    rows = [(user, (user + 3 * step) % len(TITLES), 100 * step + user)
            for user in range(30) for step in range(8)]
    users, items, times = (np.array(column) for column in zip(*rows))
    return split_by_time(make_sequences(Interactions(users, items, times, TITLES)))


@pytest.fixture(params=["our tokenizer", "llama 3's splitting"])
def own(request, tokenizer, llama3_tokenizer) -> Tokenizer:
    """The tokenizer of a base."""
    return tokenizer if request.param == "our tokenizer" else llama3_tokenizer


def small_llama(tokenizer) -> Llama:
    """A base with weights of some size."""
    torch.manual_seed(1)
    llama = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size()))
    for p in llama.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return llama.eval()


def small_table() -> torch.Tensor:
    """Embeddings of the titles."""
    return torch.randn(len(TITLES), 6, generator=torch.Generator().manual_seed(3))


def batch_of(tokenizer, sequences, *rows) -> Batch:
    """These sequences as one batch."""
    return collate(encode_sequences(tokenizer, sequences.select(list(rows))), tokenizer.pad_id)


def hidden_states(model, tokens: list[int]) -> torch.Tensor:
    """Hidden states of one row without padding, prefix or anything before it.  -> (T, C)"""
    row = torch.tensor([tokens])
    return model(row, torch.full_like(row, NO_ITEM))[0][0]


# ------------------------------------------------------------ CFT


@pytest.mark.parametrize("m, weights", [
    (4, [1, 0.75, 0.5, 0.25]), (5, [1, 0.8125, 0.625, 0.4375, 0.25]), (2, [1, 0.25]), (1, [1])])
def test_token_weights_fall_from_one_to_a_quarter_in_each_answer(m, weights):
    answers = torch.full((3, 5), IGNORE)
    answers[0, -m:], answers[2, -2:] = 5, 6             # an answer of m tokens, none, one of two
    assert token_weights(answers).tolist() == pytest.approx(weights + [1, 0.25])


@pytest.mark.parametrize("least, loss_n, loss_c", [(0.25, 0.30192, 0.81355),
                                                   (1.0, 0.39549, 1.20672)])
def test_cfts_losses_by_hand(least, loss_n, loss_c):
    """One answer of the tokens 0, 1, whose logits with the history are h and without it are o."""
    h, o = torch.tensor([[2.0, 0, 0], [0, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    answers = torch.tensor([[IGNORE, 0, 1]])
    assert weighted_cross_entropy(h, answers, least).item() == pytest.approx(loss_n, abs=2e-5)
    assert weighted_cross_entropy(h - o, answers, least).item() == pytest.approx(loss_c, abs=2e-5)


def test_cft_is_its_definition_on_plain_forwards_gradients_through_both(own, splits):
    """Both prompts written out here, every row a forward of its own."""
    rows, losses, model = (0, 20, 3), [], TemporalLlama(small_llama(own), "none")
    prompt = own.bpe.encode(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.  \n\n### Instruction:\nGiven a list of movies the user has watched "
        "before, please recommend a new movie that the user likes to the user.\n\n"
        "### Response:\n").ids
    losses.append(cft_loss(model, batch_of(own, splits[0], *rows), 0.1,
                           prompt_without_history(own, "movies")))
    sums = torch.zeros(3)
    for example in encode_sequences(own, splits[0].select(list(rows))):
        answer = [t for t in example.labels if t != IGNORE]
        m = len(answer)
        for t, y in enumerate(answer):
            w = 1 - t * 0.75 / (m - 1)
            f, o = (model.logits(hidden_states(model, before + answer[:t]))[-1]
                    for before in (example.tokens[:-m], prompt))
            sums = sums + w * torch.stack((-f.log_softmax(-1)[y], -(f - o).log_softmax(-1)[y],
                                           torch.ones(())))
    loss_n, loss_c = sums[0] / sums[2], sums[1] / sums[2]
    losses.append((loss_n + 0.1 * loss_c, loss_n, loss_c))
    for ours, expected in zip(*losses):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss[0], [*model.parameters()], retain_graph=True)
                 for loss in losses]
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def test_a_row_weighs_by_its_own_tokens_whatever_stands_beside_it(own, splits):
    rows, model = (0, 20, 3), TemporalLlama(small_llama(own), "none")
    prompt = prompt_without_history(own, "movies")
    together = cft_loss(model, batch_of(own, splits[0], *rows), 0.5, prompt)
    weights, losses = [], []
    for row in rows:
        alone = batch_of(own, splits[0], row)
        weights.append(token_weights(alone.answers).sum())
        losses.append(torch.stack(cft_loss(model, alone, 0.5, prompt)))
    mean = (torch.stack(weights)[:, None] * torch.stack(losses)).sum(0) / sum(weights)
    torch.testing.assert_close(torch.stack(together), mean, atol=1e-5, rtol=1e-5)


def test_without_lambda_cft_is_one_world_and_with_equal_weights_bigrec(own, splits):
    model, batch = TemporalLlama(small_llama(own), "none"), batch_of(own, splits[0], 0, 20, 3)
    loss, loss_n, loss_c = cft_loss(model, batch, 0.0, [])          # no second prompt is run
    assert loss is loss_n and loss_c is None
    logits = cetrec.answer_logits(model, batch, batch.item_pos)
    torch.testing.assert_close(weighted_cross_entropy(logits, batch.answers, least=1.0),
                               cetrec_loss(model, batch, 0.0)[0])


def test_cft_words_its_second_prompt_as_the_data_want_it(own):
    text = own.decode(prompt_without_history(own, "games"))
    assert "a list of video games the user has played before" in text and "### Input" not in text


# ------------------------------------------------------------ P5


@pytest.fixture
def numbered(own, splits) -> NumberTokenizer:
    """The tokenizer of P5."""
    return NumberTokenizer(**vars(own), numbers=sequential_numbers(splits[0]))


@pytest.fixture
def p5(numbered) -> P5:
    return P5(small_llama(numbered), numbered, seed=0).eval()


def test_numbers_are_given_as_training_meets_the_items_and_no_other_data_count(splits):
    numbers = sequential_numbers(splits[0])
    assert sorted(numbers) == sorted(TITLES)
    assert sorted(map(int, numbers.values())) == list(range(1001, 1001 + len(TITLES)))
    first = splits[0].select(slice(0, 1))
    titles = first.titles_of(first.history(0)) + [TITLES[first.target(0)]]
    assert [int(numbers[title]) for title in titles] == [1001 + i for i in range(len(titles))]
    few = sequential_numbers(first)
    assert [few[title] for title in titles] == [numbers[title] for title in titles]
    rest = [title for title in TITLES if title not in titles]
    assert [few[title] for title in rest] == [str(1001 + len(titles) + i) for i in range(len(rest))]


def test_a_prompt_of_p5_and_what_is_supervised(numbered):
    numbers = numbered.numbers
    (example,) = numbered.examples([["Ran", "Heat"]], ["Jumanji (1995)"], "movies")
    assert numbered.decode(example.tokens) == (
        "These movies were consumed in this order. What is the next item ?\n"
        f"item_{numbers['Ran']} , item_{numbers['Heat']}\n"
        f"Response: item_{numbers['Jumanji (1995)']}")
    answer = [t for t in example.labels if t != IGNORE]
    assert numbered.decode(answer) == f" item_{numbers['Jumanji (1995)']}"
    assert answer[-1] == numbered.eos_ids[0] and example.tokens[-len(answer):] == answer


def test_untrained_p5_still_gives_ten_items_in_the_order_of_their_likelihood(p5, numbered, splits):
    histories = [splits[2].history(0), splits[2].history(1)]
    lists = TitleBeams(p5, Catalogue(TITLES, "movies", numbered), beams=len(TITLES))(histories)
    for row, history in enumerate(histories):
        scores = []
        for example in numbered.examples([[TITLES[i] for i in history]] * len(TITLES), TITLES):
            log_p = p5.logits(hidden_states(p5, example.tokens)).log_softmax(-1)
            scores.append(sum(log_p[t - 1, label].item() for t, label in enumerate(example.labels)
                              if label != IGNORE))
        order = [i for i in np.argsort(-np.array(scores), kind="stable") if i not in history][:10]
        assert lists.items[row, :len(order)].tolist() == order


def test_p5_draws_the_rows_of_its_numbers_anew_and_learns_the_input_table(p5, numbered, splits):
    before = small_llama(numbered).embed_tokens.weight
    used = {t for n in numbered.numbers.values()
            for t in numbered.bpe.encode(f" item_{n}", add_special_tokens=False).ids}
    changed = (p5.llama.embed_tokens.weight != before).any(dim=1).nonzero()[:, 0].tolist()
    assert set(changed) == used
    add_lora(p5.llama)
    assert {name for name, p in p5.named_parameters() if p.requires_grad and "proj" not in name} \
        == {"A", "B"}
    batch = batch_of(numbered, splits[0], 0, 1)
    torch.testing.assert_close(p5(batch.tokens, batch.item_pos)[0],     # A is zero at first
                               p5.llama(p5.llama.embed(batch.tokens))[0])
    p5.A.data.normal_()
    torch.testing.assert_close(
        p5(batch.tokens, batch.item_pos)[0],
        p5.llama(p5.llama.embed_tokens.weight[batch.tokens] + 2.0 * p5.A[batch.tokens] @ p5.B)[0])


# ------------------------------------------------------------ LLaRA


@pytest.fixture
def hybrid(own) -> HybridTokenizer:
    """The tokenizer of LLaRA."""
    return HybridTokenizer(**vars(own), item_tokens=item_tokens(TITLES, small_llama(own)))


@pytest.fixture
def llara(hybrid) -> LLaRA:
    return LLaRA(small_llama(hybrid), small_table(), steps=100, seed=0).eval()


def test_every_title_of_a_history_is_followed_by_its_item_and_nothing_else_changes(hybrid, own):
    size = own.bpe.get_vocab_size()
    histories = [TITLES[:5], TITLES[3:13], [TITLES[2]]]
    for ours, theirs, history in zip(hybrid.examples(histories, TITLES[:3]),
                                     own.examples(histories, TITLES[:3]), histories):
        items = [t - size for t in ours.tokens if t >= size]
        assert items == [TITLES.index(title) for title in history]
        text = [i for i, t in enumerate(ours.tokens) if t < size]
        for part in ("tokens", "item_pos", "labels"):
            assert [getattr(ours, part)[i] for i in text] == getattr(theirs, part)
        for i, t in enumerate(ours.tokens):
            if t >= size:           # behind the last token of a title
                assert ours.item_pos[i - 1] != NO_ITEM and ours.item_pos[i] == NO_ITEM
                assert ours.labels[i] == IGNORE


def test_the_token_of_item_i_is_embedded_as_its_projected_row(llara, hybrid, splits):
    batch, size = batch_of(hybrid, splits[0], 0, 20), llara.llama.config.vocab_size
    x = torch.stack([torch.stack([
        llara.project(small_table()[token - size]) if token >= size else
        llara.llama.embed_tokens.weight[token] for token in row]) for row in batch.tokens.tolist()])
    assert (batch.tokens >= size).sum() >= 6
    torch.testing.assert_close(llara(batch.tokens, batch.item_pos)[0], llara.llama(x)[0])


def test_a_projection_to_the_placeholder_gives_the_text_only_states(llara, hybrid, splits):
    batch = batch_of(hybrid, splits[0], 0, 20)
    with_items, _ = llara(batch.tokens, batch.item_pos)
    llara.train().hybrid = False
    text_only, _ = llara(batch.tokens, batch.item_pos)
    assert not torch.allclose(with_items, text_only, atol=1e-3)
    llara.hybrid = True
    assert torch.equal(llara(batch.tokens, batch.item_pos)[0], with_items)
    llara.project[2].weight.data.zero_()
    llara.project[2].bias.data = llara.placeholder.clone()
    torch.testing.assert_close(llara(batch.tokens, batch.item_pos)[0], text_only)


def test_the_share_of_hybrid_steps_rises_from_none_to_all(llara):
    llara.steps, kinds = 2_000, []
    for _ in range(2_001):
        llara.begin_step()
        kinds.append(llara.hybrid)
    share = [np.mean(part) for part in np.array_split(kinds, 10)]
    assert not kinds[0] and share == pytest.approx([0.05 + 0.1 * i for i in range(10)], abs=0.1)
    assert kinds[-1]                        # after all steps the probability is 1


def test_all_parts_of_a_step_are_of_one_kind_and_validation_is_no_step(llara, hybrid, splits):
    add_lora(llara.llama)
    llara.train()
    part = batch_of(hybrid, splits[0], 0)
    kinds = []
    for step in range(1, 9):
        llara.step = 50 + step              # where both kinds are about as likely
        for _ in range(3):
            llara_loss(llara, part, 0.0)[0].backward()
            kinds.append(llara.hybrid)
            assert llara.step == 51 + step
        llara.zero_grad()
    assert kinds == [kind for kind in kinds[::3] for _ in range(3)] and len(set(kinds)) == 2
    llara.eval()
    llara_loss(llara, part, 0.0)
    assert llara.step == 51 + 8


def test_only_a_hybrid_step_teaches_the_projection_and_none_the_table(llara, hybrid, splits):
    add_lora(llara.llama)
    llara.train()
    batch = batch_of(hybrid, splits[0], 0, 20)
    for step, taught in ((0, False), (llara.steps, True)):
        llara.step = step
        llara.zero_grad()
        llara_loss(llara, batch, 0.0)[0].backward()
        assert (llara.project[0].weight.grad is not None) == taught
        assert not llara.z.requires_grad and llara.llama.embed_tokens.weight.grad is None
    assert {name.split(".")[0] for name, p in llara.named_parameters() if p.requires_grad} == {
        "llama", "project"}


def test_padding_and_batches_change_nothing(llara, hybrid, splits):
    together = llara_loss(llara, batch_of(hybrid, splits[0], 0, 20, 3), 0.0)[0]
    losses, counts = [], []
    for row in (0, 20, 3):
        alone = batch_of(hybrid, splits[0], row)
        losses.append(llara_loss(llara, alone, 0.0)[0])
        counts.append(alone.answers.numel())
    mean = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    torch.testing.assert_close(together, mean, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------ E4SRec


@pytest.fixture
def sentence(own) -> ItemTokenizer:
    """The tokenizer of E4SRec."""
    return ItemTokenizer(**vars(own), item_tokens=item_tokens(TITLES, small_llama(own)))


@pytest.fixture
def e4srec(sentence) -> E4SRec:
    return E4SRec(small_llama(sentence), small_table()).eval()


def test_a_sentence_the_items_and_the_marker(sentence):
    size = sentence.bpe.get_vocab_size()
    (example,) = sentence.examples([["Ran", "Heat"]], ["Jumanji (1995)"])
    at = [i for i, t in enumerate(example.tokens) if t >= size]
    assert [TITLES[example.tokens[i] - size] for i in at] == ["Ran", "Heat", "Jumanji (1995)"]
    text = sentence.decode(example.tokens[:at[0]])
    assert text.startswith("Below is an instruction") and text.endswith("movies before:")
    assert not any(title in text for title in TITLES)
    assert sentence.decode(example.tokens[at[1] + 1:at[2]]) == "\n \n\n### Response:\n"
    bos = sentence.bpe.encode("").ids[0]                # which the tokenizer itself adds
    assert bos not in example.tokens
    assert example.labels == [IGNORE] * (len(example.tokens) - 1) + [example.tokens[-1]]
    assert sentence.examples([["Ran", "Heat"]], [None])[0].tokens == example.tokens[:-1]


def test_what_e4srec_trains_and_that_scores_are_for_items(e4srec, sentence, splits):
    add_lora(e4srec.llama)
    names = {name for name, p in e4srec.named_parameters() if p.requires_grad}
    assert {name for name in names if not name.startswith("llama.")} == {
        "project.weight", "project.bias", "head.weight"}
    assert all(name.endswith((".A", ".B")) for name in names if name.startswith("llama."))
    rows = (0, 20)
    batch, by_hand = batch_of(sentence, splits[0], *rows), []
    loss, same, none = item_loss(e4srec, batch, 0.0)
    assert loss is same and none is None
    for row, example in zip(rows, encode_sequences(sentence, splits[0].select(list(rows)))):
        scores = e4srec.head.weight @ hidden_states(e4srec, example.tokens[:-1])[-1]
        assert scores.shape == (len(TITLES),)
        by_hand.append(-scores.log_softmax(-1)[splits[0].target(row)])
    torch.testing.assert_close(loss, sum(by_hand) / 2)
    e4srec.head.weight.data.mul_(1e-4)
    assert item_loss(e4srec, batch, 0.0)[0].item() == pytest.approx(math.log(len(TITLES)), abs=1e-2)


def test_e4srecs_scores_do_not_depend_on_the_batch_but_on_order_and_on_the_table(e4srec, sentence):
    histories = [[1, 2, 3, 4], [5, 6, 7], [4, 3, 2, 1]]

    def scores(*rows):
        prompts = [(e.tokens, e.item_pos) for e in sentence.examples(
            [[TITLES[i] for i in histories[row]] for row in rows], [None] * len(rows))]
        return read_prompts(e4srec, prompts)[0]
    together = scores(0, 1, 2)
    torch.testing.assert_close(scores(1), together[1:2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-4)
    lists = LlmItemScores(e4srec, Catalogue(TITLES, "movies", sentence))(histories)
    for row, history in enumerate(histories):
        order = np.argsort(-together[row].detach().numpy(), kind="stable")
        assert lists.items[row, :9].tolist() == [i for i in order if i not in history][:9]
        assert lists.items[row, 9] == (-1 if len(history) > 3 else
                                       [i for i in order if i not in history][9])
    e4srec.z[2] += 1.0
    assert not torch.allclose(scores(0, 1, 2)[0], together[0], atol=1e-4)
    torch.testing.assert_close(scores(1), together[1:2], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------ All four


@pytest.mark.parametrize("name, steps, lr", [
    ("cft", 100, 0.007), ("llara", 100, 0.01), ("p5", 160, 0.004), ("e4srec", 40, 0.007)])
def test_32_records_are_learned_by_heart(name, steps, lr, tmp_path):
    """HR@1 is 1 after tuning factors beside a frozen base that knows the titles only."""
    world = SyntheticWorld(items=30)
    numbers = [f"{before}item_{1001 + i}" for i in range(30) for before in (" , ", "")]
    tokenizer = tiny_tokenizer([*world.titles, *numbers, *["\nResponse:"] * 9], [SEEN] * 99,
                               "movies", 340)
    records = make_sequences(world.interactions(150))
    sets = [f"{np.sort(records.history(i))}" for i in range(len(records))]
    _, first = np.unique(sets, return_index=True)       # order alone would take long to learn
    records = records.select([i for i in np.sort(first) if len(records.history(i)) == 3][:32])
    assert len(records) == 32
    llama = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=64,
                               num_hidden_layers=1 + (name == "p5"), num_key_value_heads=4,
                               head_dim=16, intermediate_size=128, tie_word_embeddings=True))
    pretrain(llama, tokenizer, records, 0, TinyBase(batch_size=64, least_steps=40, lr=3e-3),
             tmp_path)
    llama.norm.weight.data *= 4             # so that few steps make probabilities near one
    items, z = item_tokens(world.titles, llama), torch.randn(30, 16)
    if name == "cft":
        model, prompt = TemporalLlama(llama, "none"), prompt_without_history(tokenizer, "movies")
    elif name == "llara":
        tokenizer = HybridTokenizer(**vars(tokenizer), item_tokens=items)
        model = LLaRA(llama, z, steps, 0)
    elif name == "p5":
        tokenizer = NumberTokenizer(**vars(tokenizer), numbers=sequential_numbers(records))
        model = P5(llama, tokenizer, 0)
    else:
        tokenizer = ItemTokenizer(**vars(tokenizer), item_tokens=items)
        model = E4SRec(llama, z)
    loss = {"cft": lambda *inputs: cft_loss(*inputs, 0.1, prompt),
            "llara": lambda *inputs: llara_loss(*inputs, 0.0),
            "p5": lambda *inputs: cetrec_loss(*inputs, 0.0),
            "e4srec": lambda *inputs: item_loss(*inputs, 0.0)}[name]
    add_lora(llama, 32, 64, 0.0, ALL_LINEAR)
    optimizer = torch.optim.AdamW(tuned_parameters(model), weight_decay=0.0)
    model.train()
    batch = batch_of(tokenizer, records, *range(32))
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, 10)
        loss(model, batch)[0].backward()
        nn.utils.clip_grad_norm_(tuned_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    catalogue = Catalogue(world.titles, "movies", tokenizer)
    recommend = (LlmItemScores if name == "e4srec" else TitleBeams)(model, catalogue)
    lists = recommend([records.history(i) for i in range(32)])
    assert lists.items[:, 0].tolist() == records.items[records.targets].tolist()


QUICK = ["--limit-train", "64", "--eval-sequences", "8", "--batch-size", "16", "--max-steps", "2"]


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """A few steps of each method, and of CETRec, in one small world."""
    root = tmp_path_factory.mktemp("llm")
    with small_runs():
        assert cetrec.main([*QUICK, "--out", str(root)]) == 0
        for name in ("cft", "llara", "p5", "e4srec"):
            assert llm_baselines.main(["--method", name, *QUICK, "--out", str(root)]) == 0
        yield root


def losses(folder: Path) -> list[dict]:
    """What a run logged, less the milliseconds."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "ms"} for line in lines]


def test_a_run_is_the_same_whether_it_trains_the_table_of_items_or_finds_it(run_folders, tmp_path):
    """In the folder of all runs LLaRA trained the table, and E4SRec found it."""
    for name, out in (("llara", run_folders), ("e4srec", tmp_path)):
        assert llm_baselines.main(["--method", name, *QUICK, "--out", str(out)]) == 0
        again = max(out.glob(f"synthetic-{name}-*"))
        assert losses(again) == losses(run_folders / f"synthetic-{name}-1")
    assert len(list(run_folders.glob("sasrec-*/model.safetensors"))) == 1
    assert len(list(tmp_path.glob("sasrec-*/model.safetensors"))) == 1


def test_run_folders_of_all_methods_are_compared(run_folders):
    names = ("rope", "cft", "llara", "p5", "e4srec")
    runs = [Run.from_folder(run_folders / f"synthetic-{name}-1") for name in names]
    text = compare(runs)
    for setting in ("rope, λ = 0.1", "cft, λ = 0.1", "llara", "p5", "e4srec"):
        assert re.search(rf"^synthetic-\S+, {setting}  ", text, re.M)
    for name in ("10 beams on titles / 10 beams on numbers / all items scored",
                 "5 beams, grounded / all items scored"):
        assert f"\n{name}\n" in text


@pytest.mark.parametrize("name, own_loss", [("cft", cft_loss), ("llara", llara_loss),
                                            ("p5", cetrec_loss), ("e4srec", item_loss)])
def test_each_method_is_tuned_by_its_own_loss(run_folders, monkeypatch, name, own_loss):
    losses = []
    monkeypatch.setattr(llm_baselines, "tune_and_evaluate",
                        lambda inputs, model, lists, folder, loss=cetrec_loss: losses.append(loss))
    assert llm_baselines.main(["--method", name, *QUICK, "--out", str(run_folders)]) == 0
    assert [getattr(loss, "func", loss) for loss in losses] == [own_loss]


def test_other_commands_do_not_take_a_baselines_run_for_one_of_cetrecs(run_folders, capsys):
    for flag in ("--eval-only", "--resume"):
        assert cetrec.main([flag, str(run_folders / "synthetic-p5-1")]) == 2
        assert "a run of the baseline p5" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--method", "p5", "--lambda-ct", "1"], "--lambda-ct goes with --method cft"),
    (["--method", "e4srec", "--beams", "3"], "--beams goes with methods that write titles"),
    (["--method", "p5", "--lists", "titles"], "--lists goes with methods that write titles"),
    (["--lora-rank", "0"], "rank")])
def test_flags_that_go_with_another_method_end_in_one_line(flags, message, capsys, tmp_path):
    assert llm_baselines.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    (["--method", "bigrec"], "invalid choice: 'bigrec'"),       # it is cetrec.py --temporal none
    (["--temporal", "rope"], "unrecognized arguments: --temporal rope"),
    (["--resume", "x"], "unrecognized arguments: --resume x"),
    (["--reproduce", "x"], "unrecognized arguments: --reproduce x")])
def test_what_this_command_does_not_know_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        llm_baselines.main(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
