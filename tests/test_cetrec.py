"""cetrec.py: every equation by hand and as a property, the loop, the tiny base, the command
line."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TITLES

import cetrec
from cetrec import (TemporalLlama, TinyBase, batches, cetrec_loss, counterfactual_loss, erase_order,
                    learning_rate, load_adapter, rotary, save_adapter, sinusoidal,
                    temporal_aware_loss, tiny_base, title_labels, train, twin_forward,
                    twin_forward_clear)
from data import (IGNORE, NO_ITEM, SyntheticWorld, collate, encode_example, make_sequences,
                  split_by_time)
from llama import Llama, load_llama
from lora import add_lora, load_lora, lora_parameters

KINDS = ["rope", "rope-attention", "sinpe", "none"]


@pytest.fixture
def batch(tokenizer):
    return collate([encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in (3, 6, 4)])


# ------------------------------------------------------------------ Eq. 3, 4, 5, 6: temporal
# embeddings


def test_eq3_sinusoidal_by_hand():
    p = sinusoidal(torch.tensor([0, 2]), 4, base=100.0)
    torch.testing.assert_close(p, torch.tensor([
        [0.0, 1.0, 0.0, 1.0], [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)]]))


def test_eq3_turns_by_a_fixed_rotation_from_k_to_k_plus_one():
    """p_(k+1) is the same linear map of p_k for every k: relative positions are linear."""
    p = sinusoidal(torch.arange(10), 8).double()
    step = torch.linalg.lstsq(p[:-1], p[1:]).solution
    torch.testing.assert_close(p[:-1] @ step, p[1:], rtol=1e-5, atol=1e-5)
    assert sinusoidal(torch.zeros(2, 3), 6).shape == (2, 3, 6)


def block_diagonal(k: float, dim: int, base: float) -> torch.Tensor:
    """R_k of Eq. 4 written out as a matrix of 2 x 2 blocks."""
    matrix = torch.zeros(dim, dim)
    for t in range(dim // 2):
        a = k / base ** (2 * t / dim)
        matrix[2 * t:2 * t + 2, 2 * t:2 * t + 2] = torch.tensor(
            [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    return matrix


def test_eq4_rotary_equals_the_hand_multiplied_block_diagonal_matrix():
    x = torch.randn(5, 6)
    for k in range(5):
        torch.testing.assert_close(rotary(x[k], torch.tensor(k), 50.0), block_diagonal(k, 6,
                                                                                       50.0) @ x[k])


def test_eq4_keeps_norms_and_composes():
    x, pos = torch.randn(4, 7, 16), torch.randint(10, (4, 7))
    torch.testing.assert_close(rotary(x, pos).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary(rotary(x, pos), pos * 0 + 3), rotary(x, pos + 3), rtol=1e-4,
                               atol=1e-5)
    assert torch.equal(rotary(x, torch.zeros(4, 7)), x)


def test_eq5_rope_attention_rotates_item_tokens_by_t_plus_k(temporal, batch):
    """Turning by t + k equals turning by t, then by k: positions handed to the Llama are t + k."""
    model = temporal("rope-attention")
    k = batch.item_pos.clamp(min=0)
    positions = torch.arange(batch.tokens.shape[1]) + k
    expected = model.llama(batch.tokens, positions=positions)
    torch.testing.assert_close(model(batch.tokens, batch.item_pos), expected)
    x, t = torch.randn(3, 8), torch.tensor([5, 1, 9])
    torch.testing.assert_close(rotary(rotary(x, t), k[0, :3]), rotary(x, t + k[0, :3]), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("kind", ["rope", "sinpe"])
def test_eq6_all_tokens_of_an_item_share_one_temporal_embedding_and_others_have_none(
        temporal, batch, kind, monkeypatch):
    model, seen = temporal(kind, scale=0.7), {}
    monkeypatch.setattr(Llama, "forward", lambda self, tokens, embeddings,
                        **rest: seen.update(x=embeddings)
                        or embeddings)
    model(batch.tokens, batch.item_pos)
    tok_emb, item = model.llama.embed(batch.tokens), batch.item_pos != NO_ITEM
    assert torch.equal(seen["x"][~item], tok_emb[~item])
    # several tokens an item
    assert len(batch.item_pos[1][item[1]].unique()) == 6 and item[1].sum() > 6
    for row, t in item.nonzero().tolist():
        k = batch.item_pos[row, t]
        expected = (block_diagonal(int(k), 24, 10_000.0) @ tok_emb[row, t] if kind == "rope" else
                    tok_emb[row, t] + 0.7 * sinusoidal(k, 24))
        torch.testing.assert_close(seen["x"][row, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_order_reaches_the_output_unless_there_is_no_temporal_embedding(temporal, batch, kind):
    model = temporal(kind)
    same = torch.equal(model(batch.tokens, batch.item_pos), model(batch.tokens,
                                                                  erase_order(batch.item_pos)))
    assert same == (kind == "none")


def test_an_unknown_kind_is_refused(llama):
    with pytest.raises(ValueError,
                       match="'alibi'; wanted one of rope, rope-attention, sinpe, none"):
        TemporalLlama(llama, "alibi")


# ------------------------------------------------------------------ §4.3: the counterfactual world


def test_erase_order_d1_puts_every_item_at_0_and_leaves_the_rest():
    item_pos = torch.tensor([[NO_ITEM, 2, 2, NO_ITEM, 1, NO_ITEM, 0]])
    assert erase_order(item_pos).tolist() == [[NO_ITEM, 0, 0, NO_ITEM, 0, NO_ITEM, 0]]
    assert item_pos[0, 1] == 2          # not in place


@pytest.mark.parametrize("kind", ["rope", "rope-attention"])
def test_d2_the_erased_rotary_world_is_the_plain_llama_bit_for_bit(temporal, batch, kind):
    model = temporal(kind)
    erased = model(batch.tokens, erase_order(batch.item_pos))
    assert torch.equal(erased, model.llama(batch.tokens))


def test_d8_the_erased_sinpe_world_is_not_the_plain_llama(temporal, batch):
    model = temporal("sinpe")
    assert not torch.equal(model(batch.tokens, erase_order(batch.item_pos)),
                           model.llama(batch.tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_twin_forward_equals_the_clear_one_with_gradients(temporal, batch, kind):
    model = temporal(kind)
    targets = batch.labels[batch.labels != IGNORE]
    assert batch.prefix > 0
    results = []
    for forward in (twin_forward, twin_forward_clear):
        logits_f, logits_cf = forward(model, batch)
        assert logits_f.shape == logits_cf.shape == (len(targets), model.llama.config.vocab_size)
        loss = temporal_aware_loss(logits_f, targets) + counterfactual_loss(logits_f, logits_cf,
                                                                            targets)
        results.append((logits_f, logits_cf, *torch.autograd.grad(loss, list(model.parameters()))))
    for fast, clear in zip(*results):
        torch.testing.assert_close(fast, clear, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------ Eq. 1, 7 to 10: losses

F_LOGITS = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
CF_LOGITS = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
Y = torch.tensor([0, 1])


def test_eq8_to_10_numeric_example():
    """CE_f = (.2395, .5514), CE_(f-c) = (.5514, 1.8620); means .39549, 1.20672; L = .51617."""
    for i, (ta, ct) in enumerate([(0.2395, 0.5514), (0.5514, 1.8620)]):     # f - c, not c - f
        f, c, y = F_LOGITS[i:i + 1], CF_LOGITS[i:i + 1], Y[i:i + 1]
        assert temporal_aware_loss(f, y).item() == pytest.approx(ta, abs=1e-4)
        assert counterfactual_loss(f, c, y).item() == pytest.approx(ct, abs=1e-4)
    loss_ta = temporal_aware_loss(F_LOGITS, Y)
    loss_ct = counterfactual_loss(F_LOGITS, CF_LOGITS, Y)
    assert loss_ta.item() == pytest.approx(0.39549, abs=1e-5)
    assert loss_ct.item() == pytest.approx(1.20672, abs=1e-5)
    assert (loss_ta + 0.1 * loss_ct).item() == pytest.approx(0.51617, abs=1e-5)


def test_eq7_adding_a_vector_to_both_worlds_leaves_the_effect_alone():
    shift = torch.tensor([0.3, -2.0, 1.0])
    assert counterfactual_loss(F_LOGITS + shift, CF_LOGITS + shift,
                               Y).item() == pytest.approx(1.20672, abs=1e-5)
    assert temporal_aware_loss(F_LOGITS + shift, Y).item() != pytest.approx(0.39549, abs=1e-2)


def test_eq7_the_effect_distribution_is_the_ratio_of_the_worlds():
    ratio = F_LOGITS.softmax(-1) / CF_LOGITS.softmax(-1)
    by_hand = -(ratio / ratio.sum(-1, keepdim=True))[[0, 1], Y].log().mean()
    torch.testing.assert_close(counterfactual_loss(F_LOGITS, CF_LOGITS, Y), by_hand)


def test_eq8_ct_loss_is_log_vocab_with_zero_gradient_when_both_worlds_agree(temporal, batch):
    model = temporal("none")
    targets = batch.labels[batch.labels != IGNORE]
    loss = counterfactual_loss(*twin_forward_clear(model, batch), targets)
    assert loss.item() == pytest.approx(math.log(model.llama.config.vocab_size), abs=1e-5)
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-6


def test_eq8_gradients_flow_through_both_worlds(temporal, batch):
    f, c = F_LOGITS.clone().requires_grad_(), CF_LOGITS.clone().requires_grad_()
    counterfactual_loss(f, c, Y).backward()
    torch.testing.assert_close(c.grad, -f.grad)
    assert f.grad.abs().max() > 0.01
    model = temporal("rope")
    targets = batch.labels[batch.labels != IGNORE]
    weight = model.llama.layers[0].self_attn.q_proj.weight
    logits_f, logits_cf = twin_forward(model, batch)
    both, = torch.autograd.grad(counterfactual_loss(logits_f, logits_cf, targets), weight,
                                retain_graph=True)
    one, = torch.autograd.grad(counterfactual_loss(logits_f, logits_cf.detach(), targets), weight)
    assert (both - one).norm() > 0.1 * both.norm()


def test_eq1_and_9_the_loss_is_the_answers_log_likelihood_token_by_token(temporal, tokenizer):
    model = temporal("rope")
    example = encode_example(tokenizer, TITLES[:4], TITLES[7])
    total, n = 0.0, sum(label != IGNORE for label in example.labels)
    for t in range(len(example.tokens) - n, len(example.tokens)):
        hidden = model(torch.tensor([example.tokens[:t]]), torch.tensor([example.item_pos[:t]]))
        total -= model.logits(hidden[0, -1]).log_softmax(-1)[example.tokens[t]].item()
    assert cetrec_loss(model, collate([example]), 0.0)[1].item() == pytest.approx(total / n,
                                                                                  abs=1e-4)


def test_eq10_lambda_weighs_the_counterfactual_loss(temporal, batch):
    model = temporal("rope")
    loss, loss_ta, loss_ct = cetrec_loss(model, batch, 0.5)
    assert loss.item() == pytest.approx(loss_ta.item() + 0.5 * loss_ct.item(), abs=1e-5)


def test_eq10_lambda_0_without_temporal_embedding_is_bigrec(temporal, batch):
    """Plain answer cross-entropy of the plain Llama, and its gradient."""
    model = temporal("none")
    loss, loss_ta, loss_ct = cetrec_loss(model, batch, 0.0)
    plain = F.cross_entropy(model.llama.logits(model.llama(batch.tokens)).flatten(0, 1),
                            batch.labels.flatten(), ignore_index=IGNORE)
    assert loss_ct is None and loss is loss_ta
    torch.testing.assert_close(loss, plain)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain,
                                                                                       parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_same_loss_alone_and_beside_longer_ones(temporal, tokenizer, kind):
    model = temporal(kind)
    short, long = (encode_example(tokenizer, TITLES[:n], TITLES[n]) for n in (3, 9))
    alone, = cetrec.world_logits(model, collate([short]), collate([short]).item_pos)
    padded = collate([short, long])
    both, = cetrec.world_logits(model, padded, padded.item_pos)
    torch.testing.assert_close(both[:len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_eq2_tuning_moves_the_factors_and_nothing_else(temporal, batch):
    model = temporal("rope")
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
    for _ in range(2):
        cetrec.backward(model, batch, 0.1)
        cetrec.optimizer_step(optimizer, 0.01)
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]), name
    assert all((m.B.abs().max() > 0) for m in model.modules() if hasattr(m, "B"))


# ------------------------------------------------------------------ batches, rate, loop


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


def test_learning_rate_warms_up_and_decays_linearly():
    rates = [learning_rate(step, 10, 1.0, 2) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_title_labels_supervise_history_titles_and_the_answer(batch):
    labelled = title_labels(batch)
    for row in range(3):
        for t in range(batch.tokens.shape[1] - 1):
            wanted = (batch.tokens[row, t + 1] if batch.item_pos[row, t + 1] != NO_ITEM else
                      batch.labels[row, t])
            assert labelled.labels[row, t] == wanted
    assert (labelled.labels[:, :labelled.prefix] == IGNORE).all()
    assert (labelled.labels[:, labelled.prefix] != IGNORE).any()
    rows = torch.arange(3)[:, None].expand_as(labelled.places).flatten()[labelled.supervised]
    places = labelled.places.flatten()[labelled.supervised]     # from the first column on
    assert torch.equal(torch.stack((rows, places), 1), (labelled.labels != IGNORE).nonzero())


def options(**changes):
    return cetrec.fill_in({"epochs": 2, "batch_size": 16, "lr": 0.01, "warmup": 2, "seed": 0}
                          | changes)


def test_training_lowers_the_loss_keeps_the_best_epoch_and_writes_it(tmp_path, temporal, tokenizer,
                                                                     world_data):
    train_set, valid_set, _ = world_data
    model = temporal("rope")
    add_lora(model, rank=4, targets=("q_proj", "v_proj", "down_proj"))
    result = train(model, train_set, valid_set, options(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    log = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in log] == list(range(1, result["steps"] + 1))
    assert [line["validation_ta"] for line in lines if "validation_ta" in line] == (
        result["validation_ta"])
    assert log[-1]["loss_ta"] < log[0]["loss_ta"] - 0.3
    assert log[0]["loss"] == pytest.approx(log[0]["loss_ta"] + 0.1 * log[0]["loss_ct"], abs=1e-4)
    kept = cetrec.validation_loss(model, valid_set, 16)
    assert kept == pytest.approx(min(result["validation_ta"]), abs=1e-5)
    again = temporal("rope")
    load_lora(again, tmp_path)
    assert cetrec.validation_loss(again, valid_set, 16) == pytest.approx(kept)


def test_training_stops_after_an_epoch_without_a_better_validation_loss(tmp_path, temporal,
                                                                        tokenizer, world_data,
                                                                        monkeypatch):
    train_set, valid_set, _ = world_data
    model, losses = temporal("none"), iter([3.0, 2.0, 2.5, 1.0])
    add_lora(model)
    states = []

    def pretend(model, *rest):
        states.append([p.detach().clone() for p in lora_parameters(model)])
        return next(losses)
    monkeypatch.setattr(cetrec, "validation_loss", pretend)
    result = train(model, train_set, valid_set,
                   options(epochs=9, temporal="none"), tmp_path)
    assert result["validation_ta"] == [3.0, 2.0, 2.5]
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model), states[1]))


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tmp_path, temporal, tokenizer, world_data):
    train_set, valid_set, _ = world_data
    model = temporal("rope")
    add_lora(model)
    model.llama.norm.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="loss is nan at step 1; try a smaller --lr"):
        train(model, train_set, valid_set, options(), tmp_path)


@pytest.mark.parametrize("broken_at", [5, 17])     # in the first epoch; after a validation
def test_an_interrupted_run_goes_on_to_the_same_factors_and_log(tmp_path, temporal, world_data,
                                                                monkeypatch, broken_at):
    train_set, valid_set, _ = world_data
    train_set, settings = train_set.select(slice(0, 120)), options(epochs=2, batch_size=8)
    step, calls = cetrec.optimizer_step, []

    def tuned(folder):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = temporal("rope")
        add_lora(model)
        result = train(model, train_set, valid_set, settings, folder)
        lines = [json.loads(line) for line in open(folder / "log.jsonl")]
        return lora_parameters(model), result, [
            {key: value for key, value in line.items() if key != "ms"} for line in lines]

    def breaks(*inputs):
        calls.append(1)
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        step(*inputs)
    if broken_at > 15:      # a loss that grows with B's norm: the first epoch stays the best
        monkeypatch.setattr(cetrec, "validation_loss", lambda model, *rest: float(
            lora_parameters(model)[1].detach().norm()))
    whole, result, log = tuned(tmp_path / "whole")
    assert (result["validation_ta"][0] < result["validation_ta"][1]) == (broken_at > 15)
    monkeypatch.setattr(cetrec, "optimizer_step", breaks)
    monkeypatch.setattr(cetrec, "save_checkpoint", lambda *rest, save=cetrec.save_checkpoint:
                        rest[-1]["step"] % 3 or save(*rest))        # not after every step
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "broken")
    assert (tmp_path / "broken" / "checkpoint.safetensors").is_file()
    resumed, again, resumed_log = tuned(tmp_path / "broken")
    assert len(calls) > 30      # some steps were done twice
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    assert resumed_log == log and again["validation_ta"] == result["validation_ta"]
    calls.clear()
    done, again, _ = tuned(tmp_path / "broken")             # tuning is over: nothing is left to do
    assert not calls and again["steps"] == 30
    assert all(torch.equal(a, b) for a, b in zip(whole, done))


def test_a_checkpoint_is_written_at_printed_steps_and_when_five_minutes_have_passed(
        tmp_path, temporal, world_data, monkeypatch):
    train_set, valid_set, _ = world_data
    saved = []
    monkeypatch.setattr(cetrec, "save_checkpoint", lambda *rest: saved.append(rest[-1]["step"]))
    for pace, wanted in ((0.001, [1, *range(2, 41, 2)]), (301, list(range(1, 41)))):
        monkeypatch.setattr("time.perf_counter", itertools.count(0, pace).__next__)
        model = temporal("rope")
        add_lora(model)
        train(model, train_set.select(slice(0, 80)), valid_set, options(epochs=1, batch_size=2),
              tmp_path)
        assert saved == wanted
        saved.clear()


def test_a_damaged_checkpoint_or_one_of_other_factors_is_one_clear_error(tmp_path, temporal,
                                                                         world_data):
    train_set, valid_set, _ = world_data
    for rank in (2, 3):
        model = temporal("rope")
        add_lora(model, rank=rank)
        if rank == 2:
            train(model, train_set.select(slice(0, 16)), valid_set, options(), tmp_path)
            continue
        with pytest.raises(ValueError, match="checkpoint.safetensors: damaged, or of other"):
            train(model, train_set, valid_set, options(), tmp_path)
        (tmp_path / "checkpoint.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ValueError, match="Delete it to tune from the first step"):
            train(model, train_set, valid_set, options(), tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_parts_of_a_batch_give_the_gradient_and_losses_of_the_whole(temporal, tokenizer, rows):
    batch = collate([encode_example(tokenizer, TITLES[:n], TITLES[n]) for n in (3, 5, 4, 7, 3)])
    model = temporal("rope")
    factors = add_lora(model, dropout=0.0)
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    losses = cetrec_loss(model, batch, 0.3)
    wanted = torch.autograd.grad(losses[0], factors)
    parts = cetrec.backward(model, batch, 0.3, rows)
    torch.testing.assert_close(parts, [x.detach() for x in losses], rtol=1e-5, atol=1e-6)
    for p, gradient in zip(factors, wanted):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert cetrec.backward(model, batch, 0.0, rows)[2] is None


@pytest.mark.parametrize("kind", ["rope", "rope-attention"])
def test_compiled_blocks_equal_the_others_and_serve_every_batch_shape(temporal, tokenizer, kind):
    """With dropout; the compiler's front end is real, the kernels are PyTorch's own."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = temporal(kind)
        factors = add_lora(model, dropout=0.2)
        model.train()
        for p in factors:
            p.data += 0.1 * torch.randn_like(p)
        if compiled:
            torch.compiler.reset()
            model.llama.compile_blocks(backend)
        outcome = []
        for lengths in ((3, 5, 4, 3, 4), (6, 6), (3, 4, 5), (8, 8, 9)):
            batch = collate([encode_example(tokenizer, TITLES[:n], TITLES[-n]) for n in lengths])
            outcome += cetrec.backward(model, batch, 0.3)
            if len(lengths) == 5:
                first = len(graphs)
        outcomes.append((outcome, [p.grad for p in factors]))
    assert 0 < len(graphs) == first     # the first batch's kernels serve all others
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_the_tiny_base_is_a_checkpoint_made_once_and_named_after_its_sources(tmp_path, world_data):
    train_set, _, _ = world_data
    recipe = TinyBase(vocab_size=400, hidden_size=16, intermediate_size=32,
                      max_sequences=64, batch_size=16)
    cpu = torch.device("cpu")
    folder = tiny_base(tmp_path, train_set, 0, cpu, recipe)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_base(tmp_path, train_set, 0, cpu, recipe) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert tiny_base(tmp_path, train_set, 1, cpu, recipe) != folder
    shorter = train_set.select(slice(5, None))
    assert tiny_base(tmp_path, shorter, 0, cpu, recipe) != folder
    tokenizer = cetrec.Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (1,) and load_llama(folder).config.vocab_size == 400
    text = f'"{train_set.titles[0]}"'
    assert tokenizer.decode(tokenizer.bpe.encode(text).ids) == text


# ----------------------------------------------------------------------------------------------
# Adapters: factors and what they were tuned for


def adapter_model(temporal, kind="sinpe", scale=0.5, fingerprint="a" * 16):
    model = temporal(kind, scale)
    model.llama.fingerprint = fingerprint
    return model


def test_an_adapter_goes_back_to_its_base_and_temporal_embedding_only(tmp_path, temporal):
    model = adapter_model(temporal)
    for p in add_lora(model):
        p.data += 0.1 * torch.randn_like(p)
    save_adapter(model, tmp_path, "someone/llama")
    assert json.loads((tmp_path / "temporal.json").read_text()) == {
        "temporal": "sinpe", "scale": 0.5, "index": "order", "base": "a" * 16}
    assert "someone/llama" in (tmp_path / "adapter_config.json").read_text()
    twin = adapter_model(temporal)
    load_adapter(twin, tmp_path)
    tokens, item_pos = torch.tensor([[3, 5, 7, 9]]), torch.tensor([[-1, 1, 0, -1]])
    assert torch.equal(twin(tokens, item_pos), model(tokens, item_pos))
    for other, message in ((adapter_model(temporal, fingerprint="b" * 16), "a{16}.*b{16}"),
                           (adapter_model(temporal, "rope"), "sinpe.*this model has.*rope"),
                           (adapter_model(temporal, scale=2.0), "scale 0.5.*scale 2.0")):
        with pytest.raises(ValueError, match=message):
            load_adapter(other, tmp_path)
        assert not lora_parameters(other)


@pytest.mark.parametrize("text", ["{", "[]", '{"temporal": "rope"}'])
def test_damaged_settings_of_an_adapter_are_one_clear_error(tmp_path, temporal, text):
    model = adapter_model(temporal)
    with pytest.raises(FileNotFoundError, match="temporal.json: not found"):
        load_adapter(model, tmp_path)
    (tmp_path / "temporal.json").write_text(text)
    with pytest.raises(ValueError, match="temporal.json: not the settings of an adapter"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("recompute", [False, True])
def test_twin_losses_and_gradients_are_the_same_with_recomputation(temporal, tokenizer, recompute,
                                                                   monkeypatch):
    """And the shared prefix stays what it was: the rows' own keys and values are not kept in it."""
    caches, original = [], cetrec.KVCache
    monkeypatch.setattr(cetrec, "KVCache", lambda: caches.append(original()) or caches[-1])
    model, clear = temporal(), temporal()
    batch = collate([encode_example(tokenizer, TITLES[:n], TITLES[n]) for n in (3, 5, 7)])
    model.llama.recompute, outcomes = recompute, []
    for m, forward in ((model, twin_forward), (clear, twin_forward_clear)):
        factors, targets = add_lora(m), batch.labels[batch.labels != IGNORE]
        for p in factors:
            p.data = torch.linspace(-0.3, 0.3, p.numel()).view_as(p)
        logits_f, logits_cf = forward(m, batch)
        loss = temporal_aware_loss(logits_f, targets) + counterfactual_loss(logits_f, logits_cf,
                                                                            targets)
        outcomes.append((loss, torch.autograd.grad(loss, factors)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=1e-6)
    assert batch.prefix > 0 and [cache.length for cache in caches] == [batch.prefix]


# ----------------------------------------------------------------------------------------------
# The clock: k = log2(1 + days), a real number (--index time)


def aged(tokenizer, *ages):
    return collate([encode_example(tokenizer, TITLES[:3], TITLES[3], ages=age) for age in ages])


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_equal_steps_of_different_age_are_embedded_differently(temporal, tokenizer, kind):
    model = temporal(kind)
    young, old = aged(tokenizer, [3.0, 2.0, 1.0]), aged(tokenizer, [9.0, 5.5, 1.0])
    steps = aged(tokenizer, None)
    assert young.item_pos.dtype == torch.float32 and steps.item_pos.dtype == torch.int64
    with torch.no_grad():
        out = {name: model(batch.tokens, batch.item_pos)[0, -1] for name, batch in
               (("young", young), ("old", old), ("steps", steps))}
        erased = [model(batch.tokens, erase_order(batch.item_pos))[0, -1]
                  for batch in (young, old, steps)]
    assert (out["young"] - out["old"]).abs().max() > 1e-3
    torch.testing.assert_close(erased[0], erased[1])        # without order the ages are gone too
    torch.testing.assert_close(erased[0], erased[2])
    whole = aged(tokenizer, [2.0, 1.0, 0.0])                # ages that are whole steps: as by order
    torch.testing.assert_close(model(whole.tokens, whole.item_pos)[0, -1], out["steps"])


def test_twin_forward_equals_the_clear_one_by_the_clock(temporal, tokenizer):
    model, batch = temporal(), aged(tokenizer, [3.2, 2.0, 0.5], [8.25, 8.25, 0.0])
    for fast, clear in zip(twin_forward(model, batch), twin_forward_clear(model, batch)):
        torch.testing.assert_close(fast, clear, rtol=1e-5, atol=1e-5)


def test_batches_carry_the_ages_of_their_sequences(tokenizer):
    sequences = make_sequences(SyntheticWorld(items=40).interactions(60), index="time")
    seen = set()
    for batch in batches(tokenizer, sequences, 16, np.random.default_rng(0)):
        seen |= {round(float(k), 4) for k in batch.item_pos.unique() if k != NO_ITEM}
    wanted = {round(float(np.float32(k)), 4) for i in range(len(sequences))
              for k in sequences.ages(i)}
    assert seen == wanted and any(k % 1 for k in wanted)
