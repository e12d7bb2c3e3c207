"""experiments/llm_baselines.py: CFT, P5, E4SRec and LLaRA against plain statements of each."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TITLES, small_config

import cetrec
from cetrec import TemporalLlama, cetrec_loss
from data import IGNORE, Batch, Interactions, collate, make_sequences, split_by_time
from evaluate import prefill
from experiments import llm_baselines
from experiments.llm_baselines import (P5, E4SRec, LlmItemScores, LLaRA, cft_loss, item_loss,
                                       llara_loss, method_of, sequential_numbers, token_weights)
from experiments.report import Run, compare
from llama import Llama
from lora import ALL_LINEAR, add_lora
from support.options import Options, defaults
from support.runs import load_adapter, save_adapter
from support.synthetic import SyntheticWorld
from support.tiny import SEEN, TinyBase, pretrain, tiny_tokenizer
from support.trie import TitleBeams

@pytest.fixture(scope="module")
def splits():
    """Sequences over TITLES: users who go round the catalogue, each from another place."""
    rows = [(user, (user + 3 * step) % len(TITLES), 100 * step + user)
            for user in range(30) for step in range(8)]
    users, items, times = (np.array(column) for column in zip(*rows))
    return split_by_time(make_sequences(Interactions(users, items, times, TITLES)))


@pytest.fixture(params=["our tokenizer", "llama 3's splitting"])
def plain(request, tokenizer, llama3_tokenizer) -> TemporalLlama:
    """A small Llama with weights of some size, and no temporal embedding."""
    return a_plain(tokenizer if request.param == "our tokenizer" else llama3_tokenizer)


def a_plain(tokenizer) -> TemporalLlama:
    torch.manual_seed(1)
    llama = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size()))
    for p in llama.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return TemporalLlama(llama, "none", tokenizer=tokenizer).eval()


def a_table() -> torch.Tensor:
    return torch.randn(len(TITLES), 6, generator=torch.Generator().manual_seed(3))


def batch_of(model, sequences, *rows) -> Batch:
    return collate(model.tokenizer.examples(
        [sequences.words(sequences.history(i)) for i in rows],
        [sequences.titles[sequences.target(i)] for i in rows], sequences.domain),
        model.tokenizer.pad_id)


# ------------------------------------------------------------ CFT


@pytest.mark.parametrize("m, wanted", [
    (4, [1, 0.75, 0.5, 0.25]), (5, [1, 0.8125, 0.625, 0.4375, 0.25]), (2, [1, 0.25]), (1, [1])])
def test_token_weights_fall_from_one_to_a_quarter_in_each_answer(m, wanted):
    labels = torch.full((3, 7), IGNORE)
    labels[0, 2:2 + m], labels[2, 1:3] = 5, 6           # an answer of m tokens, none, one of two
    assert token_weights(labels).tolist() == pytest.approx(wanted + [1, 0.25])


def two_token_answer(monkeypatch, *worlds):
    """A batch with one answer of the tokens 0, 1; logits of the worlds come in this order."""
    labels = torch.tensor([[IGNORE, 0, 1]])
    batch = Batch(torch.zeros_like(labels), torch.full_like(labels, -1), labels, 0)
    given = iter(worlds)
    monkeypatch.setattr(llm_baselines, "world_logits", lambda *_: (next(given),))
    monkeypatch.setattr(llm_baselines, "answers_without_history", lambda *_: batch)
    return batch


@pytest.mark.parametrize("least, wanted", [(0.25, (0.38328, 0.30192, 0.81355)),
                                           (1.0, (0.51617, 0.39549, 1.20672))])
def test_cfts_losses_by_hand(monkeypatch, least, wanted):
    f, c = torch.tensor([[2.0, 0, 0], [0, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    batch = two_token_answer(monkeypatch, f, c)
    monkeypatch.setattr(token_weights, "__defaults__", (least,))
    model = type("Model", (), {"tokenizer": None})()
    assert [x.item() for x in cft_loss(model, batch, 0.1, "movies")] == pytest.approx(
        wanted, abs=2e-5)


def test_where_the_history_has_no_effect_cfts_second_loss_is_ln_v_without_a_gradient(monkeypatch):
    f = torch.randn(2, 3, requires_grad=True)
    batch = two_token_answer(monkeypatch, f, f)
    model = type("Model", (), {"tokenizer": None})()
    loss_c = cft_loss(model, batch, 0.1, "movies")[2]
    loss_c.backward()
    assert loss_c.item() == pytest.approx(math.log(3)) and f.grad.abs().max() == 0


def test_cft_is_its_definition_on_plain_forwards_gradients_through_both(plain, splits):
    """Both prompts written out here, every row a forward of its own."""
    rows, losses = (0, 20, 3), []
    batch = batch_of(plain, splits[0], *rows)
    losses.append(cft_loss(plain, batch, 0.1, "movies"))
    sums, bpe = torch.zeros(3), plain.tokenizer.bpe
    prompt = bpe.encode(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.  \n\n### Instruction:\nGiven a list of movies the user has watched "
        "before, please recommend a new movie that the user likes to the user.\n\n"
        "### Response:\n").ids
    for example in plain.tokenizer.examples(
            [splits[0].words(splits[0].history(i)) for i in rows],
            [TITLES[splits[0].target(i)] for i in rows]):
        answer = [t for t in example.labels if t != IGNORE]
        m = len(answer)
        for t, y in enumerate(answer):
            w = 1 - t * 0.75 / (m - 1)
            f, c = (plain.logits(plain(tokens, torch.full_like(tokens, -1)))[0, -1] for tokens in (
                torch.tensor([example.tokens[:len(example.tokens) - m + t]]),
                torch.tensor([prompt + answer[:t]])))
            sums = sums + w * torch.stack((-f.log_softmax(-1)[y], -(f - c).log_softmax(-1)[y],
                                           torch.ones(())))
    loss_n, loss_c = sums[0] / sums[2], sums[1] / sums[2]
    losses.append((loss_n + 0.1 * loss_c, loss_n, loss_c))
    for ours, wanted in zip(*losses):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss[0], [*plain.parameters()], retain_graph=True)
                 for loss in losses]
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


def test_a_row_weighs_by_its_own_tokens_whatever_stands_beside_it(plain, splits):
    rows = (0, 20, 3)
    together = cft_loss(plain, batch_of(plain, splits[0], *rows), 0.5, "movies")
    weights, losses = [], []
    for row in rows:
        alone = batch_of(plain, splits[0], row)
        weights.append(token_weights(alone.labels).sum())
        losses.append(torch.stack(cft_loss(plain, alone, 0.5, "movies")))
    mean = (torch.stack(weights)[:, None] * torch.stack(losses)).sum(0) / sum(weights)
    torch.testing.assert_close(torch.stack(together), mean, atol=1e-5, rtol=1e-5)


def test_without_lambda_and_weights_cft_is_bigrec(plain, splits, monkeypatch):
    monkeypatch.setattr(token_weights, "__defaults__", (1.0,))
    batch = batch_of(plain, splits[0], 0, 20, 3)
    loss, loss_n, none = cft_loss(plain, batch, 0.0, "movies")
    assert none is None and loss is loss_n
    torch.testing.assert_close(loss, cetrec_loss(plain, batch, 0.0)[0])


def test_cft_words_its_second_prompt_as_the_data_want_it(plain, splits, monkeypatch):
    asked = []
    monkeypatch.setattr(llm_baselines, "cft_loss", lambda *given: asked.append(given[3]))
    method = method_of("cft", Options.from_flags({"data": "steam"}), None)
    games = [replace(part, domain="games") for part in splits]
    method.loss(method.wrap(plain, games), None, 0.1)
    assert asked == ["games"]


# ------------------------------------------------------------ P5


@pytest.fixture
def p5(plain, splits) -> P5:
    return P5(plain, splits, seed=0).eval()


def test_numbers_are_given_as_training_meets_the_items_and_no_other_data_count(splits):
    numbers = sequential_numbers(splits[0])
    assert sorted(numbers) == sorted(TITLES)
    assert sorted(map(int, numbers.values())) == list(range(1001, 1001 + len(TITLES)))
    first = splits[0].select(slice(0, 1))
    words = first.words(first.history(0)) + [TITLES[first.target(0)]]
    assert [int(numbers[title]) for title in words] == [1001 + i for i in range(len(words))]
    few = sequential_numbers(first)
    assert [few[title] for title in words] == [numbers[title] for title in words]
    rest = [title for title in TITLES if title not in words]
    assert [few[title] for title in rest] == [str(1001 + len(words) + i) for i in range(len(rest))]


def test_a_prompt_of_p5_and_what_is_supervised(p5, splits):
    numbers = p5.tokenizer.numbers
    example, = p5.tokenizer.examples([["Ran", "Heat"]], ["Jumanji (1995)"], "movies")
    text = p5.tokenizer.decode(example.tokens)
    assert text == ("These movies were consumed in this order. What is the next item ?\n"
                    f"item_{numbers['Ran']} , item_{numbers['Heat']}\n"
                    f"Response: item_{numbers['Jumanji (1995)']}")
    answer = [t for t in example.labels if t != IGNORE]
    assert p5.tokenizer.decode(answer) == f" item_{numbers['Jumanji (1995)']}"
    assert answer[-1] == p5.tokenizer.eos_ids[0] and example.tokens[-len(answer):] == answer


def test_untrained_p5_still_gives_ten_items_in_the_order_of_their_likelihood(p5, splits):
    histories = [splits[2].history(0), splits[2].history(1)]
    made = TitleBeams(p5, TITLES, "movies", beams=len(TITLES))(histories)
    for row, history in enumerate(histories):
        words = [TITLES[i] for i in history]
        scores = []
        for title in TITLES:
            batch = collate(p5.tokenizer.examples([words], [title]))
            logits = p5.logits(p5(batch.tokens, batch.item_pos))[0]
            there = batch.labels[0] != IGNORE
            scores.append(logits[there].log_softmax(-1).gather(
                1, batch.labels[0][there][:, None]).sum().item())
        order = [i for i in np.argsort(-np.array(scores), kind="stable") if i not in history][:10]
        assert made.items[row, :len(order)].tolist() == order


def test_p5_draws_the_rows_of_its_numbers_anew_and_learns_the_input_table(tokenizer, splits):
    before = a_plain(tokenizer)
    table = before.llama.embed_tokens.weight.detach().clone()
    p5 = P5(a_plain(tokenizer), splits, seed=0)
    used = {t for n in p5.tokenizer.numbers.values()
            for t in tokenizer.bpe.encode(f" item_{n}", add_special_tokens=False).ids}
    changed = (p5.llama.embed_tokens.weight != table).any(dim=1).nonzero()[:, 0].tolist()
    assert set(changed) == used
    add_lora(p5.llama)
    assert {name for name, p in p5.named_parameters() if p.requires_grad and "proj" not in name} \
        == {"A", "B"}
    batch = batch_of(p5, splits[0], 0, 1)
    as_it_is = p5(batch.tokens, batch.item_pos)
    torch.testing.assert_close(as_it_is, p5.llama(batch.tokens))        # A is zero at first
    p5.A.data.normal_()
    torch.testing.assert_close(
        p5(batch.tokens, batch.item_pos),
        p5.llama(None, embeddings=p5.llama.embed_tokens.weight[batch.tokens]
                 + 2.0 * p5.A[batch.tokens] @ p5.B))


# ------------------------------------------------------------ LLaRA


@pytest.fixture
def llara(plain, splits) -> LLaRA:
    return LLaRA(plain, splits, a_table(), rows=1_000, seed=0).eval()


def test_every_title_of_a_history_is_followed_by_its_item_and_nothing_else_changes(llara, plain,
                                                                                    splits):
    size = llara.llama.config.vocab_size
    histories = [TITLES[:5], TITLES[3:13], [TITLES[2]]]
    with_items = llara.tokenizer.examples(histories, TITLES[:3])
    without = plain.tokenizer.examples(histories, TITLES[:3])
    for ours, theirs, history in zip(with_items, without, histories):
        items = [t - size for t in ours.tokens if t >= size]
        assert items == [TITLES.index(title) for title in history]
        kept = [i for i, t in enumerate(ours.tokens) if t < size]
        for part in ("tokens", "item_pos", "labels"):
            assert [getattr(ours, part)[i] for i in kept] == getattr(theirs, part)
        for i, t in enumerate(ours.tokens):
            if t >= size:           # behind the last token of a title
                assert ours.item_pos[i - 1] != -1 and ours.item_pos[i] == -1
                assert ours.labels[i] == IGNORE


def test_the_place_of_item_i_holds_its_projected_row(llara, splits):
    batch = batch_of(llara, splits[0], 0, 20)
    size, given = llara.llama.config.vocab_size, []
    llara.llama.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["embeddings"]), with_kwargs=True)
    llara(batch.tokens, batch.item_pos)
    for row, tokens in enumerate(batch.tokens):
        for t, token in enumerate(tokens.tolist()):
            wanted = (llara.project(a_table()[token - size]) if token >= size else
                      llara.llama.embed_tokens.weight[token])
            torch.testing.assert_close(given[0][row, t], wanted)


def test_a_projection_to_the_placeholder_gives_the_text_only_logits(llara, splits):
    batch = batch_of(llara, splits[0], 0, 20)
    hybrid = llara(batch.tokens, batch.item_pos)
    llara.hybrid = False
    text = llara(batch.tokens, batch.item_pos)
    assert not torch.allclose(hybrid, text, atol=1e-3)
    llara.hybrid = True
    llara.project[2].weight.data.zero_()
    llara.project[2].bias.data = llara.placeholder.clone()
    torch.testing.assert_close(llara(batch.tokens, batch.item_pos), text)


def test_the_share_of_hybrid_batches_rises_from_none_to_all(llara, splits, monkeypatch):
    seen = []
    monkeypatch.setattr(cetrec, "cetrec_loss", lambda model, batch, λ: seen.append(model.hybrid))
    llara.train()
    batch = batch_of(llara, splits[0], *range(10))
    llara.rows = 10 * 2_001
    for _ in range(2_001):
        llara_loss(llara, batch, 0.0)
        assert llara.hybrid                 # for whatever is done between the steps
    share = [np.mean(part) for part in np.array_split(seen, 10)]
    assert not seen[0] and share == pytest.approx([0.05 + 0.1 * i for i in range(10)], abs=0.1)
    llara.done = llara.rows
    llara_loss(llara, batch, 0.0)
    assert seen[-1]
    llara.eval()
    llara.done = 0
    llara_loss(llara, batch, 0.0)
    assert seen[-1] and llara.done == 0     # on validation every batch is hybrid


def test_only_a_hybrid_batch_teaches_the_projection_and_none_the_table(llara, splits):
    add_lora(llara.llama)
    llara.train()
    batch = batch_of(llara, splits[0], 0, 20)
    for done, taught in ((0, False), (llara.rows, True)):
        llara.done = done
        llara_loss(llara, batch, 0.0)[0].backward()
        assert (llara.project[0].weight.grad is not None) == taught
        assert not llara.z.requires_grad and llara.llama.embed_tokens.weight.grad is None
    assert {name.split(".")[0] for name, p in llara.named_parameters() if p.requires_grad} == {
        "llama", "project"}


def test_left_out_padding_and_batches_change_nothing(llara, splits):
    together = llara_loss(llara, batch_of(llara, splits[0], 0, 20, 3), 0.0)[0]
    parts, counts = [], []
    for row in (0, 20, 3):
        alone = batch_of(llara, splits[0], row)
        parts.append(llara_loss(llara, alone, 0.0)[0] * len(alone.targets))
        counts.append(len(alone.targets))
    torch.testing.assert_close(together, sum(parts) / sum(counts), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------ E4SRec


@pytest.fixture
def e4srec(plain, splits) -> E4SRec:
    return E4SRec(plain, splits, a_table()).eval()


def test_a_sentence_the_items_and_the_marker(e4srec):
    size = e4srec.llama.config.vocab_size
    example, = e4srec.tokenizer.examples([["Ran", "Heat"]], ["Jumanji (1995)"])
    at = [i for i, t in enumerate(example.tokens) if t >= size]
    assert [TITLES[example.tokens[i] - size] for i in at] == ["Ran", "Heat", "Jumanji (1995)"]
    text = e4srec.tokenizer.decode(example.tokens[:at[0]])
    assert text.startswith("Below is an instruction") and text.endswith("movies before:")
    assert not any(title in text for title in TITLES)
    assert e4srec.tokenizer.decode(example.tokens[at[1] + 1:at[2]]) == "\n \n\n### Response:\n"
    assert e4srec.tokenizer.bos_id not in example.tokens[1:] or e4srec.tokenizer.bos_id is None
    assert example.labels == [IGNORE] * (len(example.tokens) - 1) + [example.tokens[-1]]
    assert e4srec.tokenizer.examples([["Ran", "Heat"]], [None])[0].tokens == example.tokens[:-1]


def test_what_e4srec_trains_and_that_scores_are_for_items(e4srec, splits):
    add_lora(e4srec.llama)
    names = {name for name, p in e4srec.named_parameters() if p.requires_grad}
    assert {name for name in names if not name.startswith("llama.")} == {
        "project.weight", "project.bias", "head.weight"}
    assert all(name.endswith((".A", ".B")) for name in names if name.startswith("llama."))
    batch = batch_of(e4srec, splits[0], 0, 20)
    loss, same, none = item_loss(e4srec, batch, 0.0)
    assert loss is same and none is None
    hidden = e4srec(batch.tokens, batch.item_pos)
    by_hand = []
    for row, i in enumerate((0, 20)):
        last = int((batch.labels[row] != IGNORE).nonzero())
        scores = e4srec.head.weight @ hidden[row, last]
        assert scores.shape == (len(TITLES),)
        by_hand.append(-scores.log_softmax(-1)[splits[0].target(i)])
    torch.testing.assert_close(loss, sum(by_hand) / 2)
    e4srec.head.weight.data.mul_(1e-4)
    assert item_loss(e4srec, batch, 0.0)[0].item() == pytest.approx(math.log(len(TITLES)), abs=1e-2)


def test_e4srecs_scores_do_not_depend_on_the_batch_but_on_order_and_on_the_table(e4srec, splits):
    histories = [[1, 2, 3, 4], [5, 6, 7], [4, 3, 2, 1]]

    def scores(*rows):
        prompts = [(e.tokens, e.item_pos) for e in e4srec.tokenizer.examples(
            [[TITLES[i] for i in histories[row]] for row in rows], [None] * len(rows))]
        return prefill(e4srec, prompts)[1]
    together = scores(0, 1, 2)
    torch.testing.assert_close(scores(1), together[1:2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-4)
    made = LlmItemScores(e4srec, splits[2], True)(histories)
    for row, history in enumerate(histories):
        order = np.argsort(-together[row].detach().numpy(), kind="stable")
        assert made.items[row, :9].tolist() == [i for i in order if i not in history][:9]
    e4srec.z[2] += 1.0
    assert not torch.allclose(scores(0, 1, 2)[0], together[0], atol=1e-4)
    torch.testing.assert_close(scores(1), together[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llara", "e4srec"])
def test_the_maps_round_the_base_are_drawn_from_the_seed(name, tokenizer, splits, tmp_path,
                                                         monkeypatch):
    """The first call trains the table of items, the second finds it."""
    monkeypatch.setattr(llm_baselines, "defaults",
                        lambda *wanted: defaults(*wanted) | {"epochs": 1})

    def drawn(seed: int) -> list[torch.Tensor]:
        method = method_of(name, Options.from_flags({"seed": seed}), tmp_path)
        return [p.clone() for p in method.wrap(a_plain(tokenizer), splits).project.parameters()]
    first, second, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(p, q) for p, q in zip(first, second))
    assert not torch.equal(first[0], other[0])


# ------------------------------------------------------------ All four


@pytest.mark.parametrize("name", ["llara", "p5", "e4srec"])
def test_what_stands_round_the_base_is_saved_and_loaded_with_the_factors(name, splits, tmp_path,
                                                                         tokenizer):
    def build():
        plain = a_plain(tokenizer)
        return {"llara": lambda: LLaRA(plain, splits, a_table(), 100, 0),
                "p5": lambda: P5(plain, splits, 0),
                "e4srec": lambda: E4SRec(plain, splits, a_table())}[name]().eval()
    model, again = build(), build()
    add_lora(model.llama)
    for p in cetrec.tuned_parameters(model):
        p.data += 0.1 * torch.randn_like(p)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    batch = batch_of(model, splits[0], 0, 20)
    ours, theirs = (m.logits(m(batch.tokens, batch.item_pos)) for m in (model, again))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, build().logits(build()(batch.tokens, batch.item_pos)))


@pytest.mark.parametrize("name, steps, lr", [
    ("cft", 120, 0.007), ("llara", 180, 0.007), ("p5", 200, 0.004), ("e4srec", 60, 0.007)])
def test_64_records_are_learned_by_heart(name, steps, lr, tmp_path):
    """HR@1 is 1 after tuning factors beside a frozen base that knows the titles only."""
    world = SyntheticWorld(items=30)
    numbers = [f"{before}item_{1001 + i}" for i in range(30) for before in (" , ", "")]
    tokenizer = tiny_tokenizer([*world.titles, *numbers, *["\nResponse:"] * 9], [SEEN] * 99,
                               "movies", 340)
    records = make_sequences(world.interactions(150))
    sets = [f"{np.sort(records.history(i))}" for i in range(len(records))]
    _, first = np.unique(sets, return_index=True)       # order alone would take long to learn
    records = records.select([i for i in np.sort(first) if len(records.history(i)) == 3][:64])
    assert len(records) == 64
    llama = Llama(small_config(vocab_size=tokenizer.bpe.get_vocab_size(), hidden_size=64,
                               num_hidden_layers=1 + (name == "p5"), num_key_value_heads=4,
                               head_dim=16, intermediate_size=128, tie_word_embeddings=True))
    pretrain(llama, tokenizer, records, 0, TinyBase(batch_size=64, least_steps=40, lr=3e-3),
             tmp_path)
    llama.norm.weight.data *= 4             # so that few steps make probabilities near one
    plain, z = TemporalLlama(llama, "none", tokenizer=tokenizer), torch.randn(30, 16)
    parts = (records, records, records)
    model, loss = {
        "cft": lambda: (plain, lambda *given: cft_loss(*given, "movies")),
        "llara": lambda: (LLaRA(plain, parts, z, steps * 64, 0), llara_loss),
        "p5": lambda: (P5(plain, parts, 0), cetrec_loss),
        "e4srec": lambda: (E4SRec(plain, parts, z), item_loss)}[name]()
    add_lora(model.llama, 32, 64, 0.0, ALL_LINEAR)
    optimizer = torch.optim.AdamW(cetrec.tuned_parameters(model), weight_decay=0.0)
    model.train()
    batch, λ = batch_of(model, records, *range(64)), 0.1 if name == "cft" else 0.0
    for step in range(1, steps + 1):
        rate = cetrec.learning_rate(step, steps, lr, 10)
        cetrec.tuning_step(model, batch, optimizer, rate, λ, 64, loss)
    model.eval()
    histories = [records.history(i) for i in range(64)]
    recommend = (LlmItemScores(model, records, True) if name == "e4srec" else
                 TitleBeams(model, records.titles, "movies", True))
    assert recommend(histories).items[:, 0].tolist() == records.items[records.targets].tolist()


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory):
    """A few steps of each method, and of CETRec, in one small world."""
    root, draw = tmp_path_factory.mktemp("llm"), SyntheticWorld.interactions
    quick = ["--limit-train", "64", "--eval-sequences", "8", "--batch-size", "16", "--max-steps",
             "2", "--out", str(root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticWorld, "interactions", lambda self, seed: draw(self, 120, seed))
        patch.setitem(cetrec.TINY_BASES, "synthetic", cetrec.TinyBase(
            pieces=300, hidden_size=32, intermediate_size=64, max_sequences=64))
        assert cetrec.main(quick) == 0
        for name in ("cft", "llara", "p5", "e4srec"):
            assert llm_baselines.main(["--method", name, *quick]) == 0
    return root


def test_run_folders_of_all_methods_are_compared(run_folders):
    names = ("rope", "cft", "llara", "p5", "e4srec")
    runs = [Run.from_folder(run_folders / f"synthetic-{name}-1") for name in names]
    text = compare(runs)
    for setting in ("rope, λ = 0.1", "cft, λ = 0.1", "llara", "p5", "e4srec"):
        assert re.search(rf"^synthetic-\S+, {setting}  ", text, re.M)
    for name in ("10 beams on titles / 10 beams on numbers / all items scored",
                 "5 beams, grounded / all items scored"):
        assert f"\n{name}\n" in text
    assert len(list(run_folders.glob("sasrec-*/model.safetensors"))) == 1       # made for two


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


def test_bigrec_is_the_commands_own_path_and_no_method_here(capsys):
    with pytest.raises(SystemExit) as stop:
        llm_baselines.main(["--method", "bigrec"])
    assert stop.value.code == 2 and "invalid choice: 'bigrec'" in capsys.readouterr().err
    assert method_of("cft", Options.from_flags({}), None).lists is cetrec.title_lists
