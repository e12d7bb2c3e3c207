"""cetrec.py: the twin forward against two plain ones, the tuning loop, resuming, adapters.

The equations themselves are in test_equations.py, the command is in test_end_to_end.py.
"""

import itertools
import hashlib
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TITLES

import cetrec
from cetrec import (RECOMPUTE, TemporalLlama, Tuning, answer_log_likelihood, cetrec_loss,
                    counterfactual_loss, erase_order, learning_rate, rotary, temporal_aware_loss,
                    train, tuning_step, twin_forward, validation_loss, world_logits)
from data import IGNORE, collate, encode_example
from llama import Block, Llama, save_llama
from lora import ALL_LINEAR, add_lora, load_lora, lora_parameters
from support.journal import Journal
from support.runs import load_adapter, save_adapter

KINDS = ["rope", "rope-attention", "sinpe", "none"]
close = torch.testing.assert_close


def batch_of(tokenizer, *lengths, ages=None):
    """A prompt and its answer for each length of a history."""
    return collate([encode_example(tokenizer, TITLES[:n], TITLES[-n],
                                   ages=None if ages is None else ages[:n]) for n in lengths])


def disturbed_factors(model, **settings):
    """Factors away from their initial values, where B = 0 would hide what A does."""
    factors = add_lora(model, **settings)
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    return factors


# ----------------------------------------------------------------------------------------------
# The twin forward


def two_plain_forwards(model, batch):
    """The definition of the twin forward: the same model and tokens twice, only k differs."""
    supervised = batch.labels != IGNORE
    return tuple(model.logits(model(batch.tokens, item_pos)[supervised])
                 for item_pos in (batch.item_pos, erase_order(batch.item_pos)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_forward_equals_two_plain_forwards_with_gradients(temporal, tokenizer, kind,
                                                                   recompute, monkeypatch):
    """Answers of unequal length behind a common prefix; the prefix's cache stays what it was."""
    caches, original = [], cetrec.KVCache
    monkeypatch.setattr(cetrec, "KVCache", lambda: caches.append(original()) or caches[-1])
    model, batch, outcomes = temporal(kind), batch_of(tokenizer, 3, 6, 4), []
    targets = batch.labels[batch.labels != IGNORE]
    assert batch.prefix > 0 and len({*(batch.labels != IGNORE).sum(1).tolist()}) > 1
    for forward in (two_plain_forwards, twin_forward):
        if forward is twin_forward:
            caches.clear()
            model.llama.run_block = RECOMPUTE if recompute else model.llama.run_block
        f, f_0 = forward(model, batch)
        assert f.shape == f_0.shape == (len(targets), model.llama.config.vocab_size)
        loss = temporal_aware_loss(f, targets) + counterfactual_loss(f, f_0, targets)
        outcomes.append((f, f_0, *torch.autograd.grad(loss, list(model.parameters()))))
    for plain, twin in zip(*outcomes):
        close(twin, plain, rtol=1e-4, atol=2e-5)
    assert [cache.length for cache in caches] == [batch.prefix]
    assert all(k.shape[:3:2] == v.shape[:3:2] == (1, batch.prefix) for k, v in caches[0].layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_same_logits_alone_and_beside_longer_ones(temporal, tokenizer, kind):
    model = temporal(kind)
    short, both = batch_of(tokenizer, 3), batch_of(tokenizer, 3, 9)
    alone, = world_logits(model, short, short.item_pos)
    padded, = world_logits(model, both, both.item_pos)
    close(padded[:len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_an_unknown_kind_is_refused(llama):
    with pytest.raises(ValueError,
                       match="'alibi'; wanted one of rope, rope-attention, sinpe, none"):
        TemporalLlama(llama, "alibi")


# The clock: k = log2(1 + days), a real number (--index time, D15)


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_by_the_clock_equal_steps_of_different_age_are_embedded_differently(temporal, tokenizer,
                                                                            kind):
    model = temporal(kind)
    young, old, whole = (batch_of(tokenizer, 3, ages=ages)
                         for ages in ([3.0, 2.0, 1.0], [9.0, 5.5, 1.0], [2.0, 1.0, 0.0]))
    steps = batch_of(tokenizer, 3)
    assert young.item_pos.dtype == torch.float32 and steps.item_pos.dtype == torch.int64
    batches = young, old, whole, steps
    out = [model(batch.tokens, batch.item_pos)[0, -1] for batch in batches]
    erased = [model(batch.tokens, erase_order(batch.item_pos))[0, -1] for batch in batches]
    assert (out[0] - out[1]).abs().max() > 1e-3
    close(out[2], out[3])               # ages that are whole steps are as good as steps
    for world in erased[:3]:            # without order the ages are gone too
        close(world, erased[3])


def test_by_the_clock_the_twin_forward_equals_two_plain_forwards(temporal, tokenizer):
    model, batch = temporal(), batch_of(tokenizer, 3, 5, ages=[8.25, 8.25, 3.2, 2.0, 0.5])
    for twin, plain in zip(twin_forward(model, batch), two_plain_forwards(model, batch)):
        close(twin, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"index": "time"}])
def test_answer_log_likelihoods_are_sums_over_the_plain_forwards_of_each_answer(
        temporal, world_splits, settings):
    model, sequences = temporal("rope"), world_splits[2].select(slice(0, 5))
    sequences = replace(sequences, **settings)
    found = answer_log_likelihood(model, sequences, batch_size=2)
    for i, values in enumerate(found):
        batch = collate([encode_example(
            model.tokenizer, sequences.words(sequences.history(i)),
            sequences.titles[sequences.target(i)], ages=sequences.ages(i))])
        wanted = [-F.cross_entropy(logits, batch.targets, reduction="sum").item()
                  for logits in two_plain_forwards(model, batch)]
        assert values.tolist() == pytest.approx(wanted, abs=1e-4)
        assert abs(wanted[0] - wanted[1]) > 1e-3
    assert found.shape == (5, 2)


# ----------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_parts_of_a_batch_give_the_gradient_and_the_losses_of_the_whole(temporal, tokenizer, rows):
    model, batch = temporal("rope"), batch_of(tokenizer, 3, 5, 4, 7, 3)
    factors = disturbed_factors(model, dropout=0.0)
    losses = cetrec_loss(model, batch, 0.3)
    wanted = torch.autograd.grad(losses[0], factors)
    close(cetrec.backward(model, batch, 0.3, rows), [x.detach() for x in losses], rtol=1e-5,
          atol=1e-6)
    for p, gradient in zip(factors, wanted):
        close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    assert cetrec.backward(model, batch, 0.0, rows)[2] is None


def test_a_step_clips_the_gradient_at_norm_1_and_takes_the_rate_it_is_given(temporal, tokenizer):
    """With plain gradient descent the step is rate · gradient / max(1, norm), and done once."""
    model, batch = temporal("rope"), batch_of(tokenizer, 3, 5)
    factors = disturbed_factors(model, dropout=0.0)
    gradient = torch.autograd.grad(9 * cetrec_loss(model, batch, 0.3)[0], factors)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    before = [p.detach().clone() for p in factors]
    optimizer = torch.optim.SGD(factors, lr=123.0)
    (8 * cetrec_loss(model, batch, 0.3)[0]).backward()      # is there already, and is added to
    tuning_step(model, batch, optimizer, 0.5, 0.3, rows=2)
    assert norm > 2 and all(p.grad is None for p in factors)
    for p, old, g in zip(factors, before, gradient):
        close(p.detach(), old - 0.5 * g / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, blocks", [("rope", 3), ("rope-attention", 1)])
def test_compiled_blocks_equal_the_others_and_serve_every_batch_shape(temporal, tokenizer, kind,
                                                                      blocks):
    """With dropout. The compiler's front end is real; its kernels are PyTorch's own here. A graph
    may serve prefix or rest, the last block or others, but none is made for a single block."""
    graphs, outcomes, counts = [], [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    for run_block in (Block.__call__, torch.compile(Block.__call__, dynamic=True, backend=backend)):
        torch.manual_seed(1)
        model = temporal(kind)
        model.llama = Llama(replace(model.llama.config, num_hidden_layers=blocks))
        model.llama.run_block = run_block
        factors, losses = disturbed_factors(model, dropout=0.2), []
        model.train()
        for lengths in ((3, 5, 4, 3, 4), (6, 6), (3, 4, 5), (8, 8, 9)):
            losses += cetrec.backward(model, batch_of(tokenizer, *lengths), 0.3, rows=5)
            counts.append(len(graphs))
        outcomes.append((losses, [p.grad for p in factors]))
    assert counts == [0] * 4 + [{1: 2, 3: 5}[blocks]] * 4       # six would be one for each block
    close(*outcomes, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------
# The loop


def test_the_learning_rate_warms_up_and_decays_linearly():
    rates = [learning_rate(step, 10, 1.0, 2) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_the_validation_loss_is_a_mean_over_tokens_without_dropout(temporal, world_splits):
    model, sequences = temporal("rope"), world_splits[1].select(slice(0, 7))
    disturbed_factors(model.train(), dropout=0.5)
    found = [validation_loss(model, sequences, size) for size in (7, 2)]
    total, tokens = answer_log_likelihood(model, sequences)[:, 0].sum(), sum(
        len(model.tokenizer.bpe.encode(f'"{sequences.titles[sequences.target(i)]}"',
                                       add_special_tokens=False).ids) + 1 for i in range(7))
    assert found == pytest.approx([-total / tokens] * 2, rel=1e-5) and not model.training


def tuning(steps: int, **changes) -> Tuning:
    return Tuning(**({"lambda_ct": 0.1, "lr": 0.01, "batch_size": 16, "steps": steps, "warmup": 2}
                     | changes))


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_keeps_the_best_epoch_and_writes_it(tmp_path, temporal,
                                                                     world_splits):
    train_set, valid_set, _ = world_splits
    train_set = train_set.select(slice(0, 160))
    model = temporal("rope")
    add_lora(model, rank=4, targets=("q_proj", "v_proj", "down_proj"))
    result = train(model, train_set, valid_set, tuning(20), tmp_path, "someone/llama")
    lines = log_of(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21)) and result["steps"] == 20
    assert [line["lr"] for line in steps] == [learning_rate(s, 20, 0.01, 2) for s in range(1, 21)]
    assert [(line["step"], line["validation_ta"]) for line in lines if "validation_ta" in line] == [
        *zip((10, 20), result["validation_ta"])]
    assert steps[-1]["loss_ta"] < steps[0]["loss_ta"] - 0.3
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_ta"] + 0.1 * line["loss_ct"], abs=1e-5)
    kept = validation_loss(model, valid_set, 16)
    assert kept == pytest.approx(min(result["validation_ta"]), abs=1e-5)
    again = temporal("rope")
    load_lora(again, tmp_path)
    assert validation_loss(again, valid_set, 16) == pytest.approx(kept)
    assert "someone/llama" in (tmp_path / "adapter_config.json").read_text()


def test_training_stops_after_an_epoch_without_a_better_validation_loss(tmp_path, temporal,
                                                                        world_splits, monkeypatch):
    train_set, valid_set, _ = world_splits
    model, losses, states, modes = temporal("none"), iter([3.0, 2.0, 2.5, 1.0]), [], []
    add_lora(model)

    def pretend(model, *rest):
        states.append([p.detach().clone() for p in lora_parameters(model)])
        modes.append(model.training)
        model.train(len(modes) == 3)        # the real one turns dropout off
        return next(losses)
    monkeypatch.setattr(cetrec, "validation_loss", pretend)
    result = train(model, train_set.select(slice(0, 32)), valid_set, tuning(18, lambda_ct=0.0),
                   tmp_path)
    assert result["validation_ta"] == [3.0, 2.0, 2.5] and result["steps"] == 6
    assert modes == [True] * 3 and not model.training       # each epoch with dropout, the end not
    for p, best, last in zip(lora_parameters(model), states[1], states[2]):
        assert torch.equal(p, best) and not torch.equal(p, last)
    assert all(line["loss_ct"] is None for line in log_of(tmp_path) if "loss" in line)


def test_a_loss_that_is_not_finite_stops_with_a_remedy(tmp_path, temporal, world_splits):
    train_set, valid_set, _ = world_splits
    model = temporal("rope")
    add_lora(model)
    model.llama.norm.weight.data[0] = math.inf
    with pytest.raises(ValueError, match="step 1: .* norm is nan.*-> .*Try a smaller --lr"):
        train(model, train_set, valid_set, tuning(4), tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("broken_at", [7, 12, 15])      # checkpoints are of steps 4, 10 and 12
def test_an_interrupted_run_goes_on_to_the_same_factors_and_log(tmp_path, temporal, world_splits,
                                                                monkeypatch, broken_at):
    """Broken in the first epoch, after a validation, and in an epoch that is not the best."""
    train_set, valid_set = (part.select(slice(0, 76)) for part in world_splits[:2])
    step, calls = cetrec.tuning_step, []

    def tuned(folder):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)                            # of the factors, not of the checkpoint
        model = temporal("rope")
        add_lora(model, dropout=0.1)
        result = train(model, train_set, valid_set, tuning(20, batch_size=8), folder)
        return lora_parameters(model), result["validation_ta"], [
            {key: value for key, value in line.items() if key != "ms"} for line in log_of(folder)]

    def breaks(*inputs):
        calls.append(1)
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        return step(*inputs)
    if broken_at > 10:      # a loss that grows with the norm of B, so the first epoch is the best
        monkeypatch.setattr(cetrec, "validation_loss", lambda model, *rest: float(
            lora_parameters(model)[1].detach().norm()))
    whole, losses, log = tuned(tmp_path / "whole")
    assert (losses[0] < losses[1]) == (broken_at > 10)
    monkeypatch.setattr(cetrec, "tuning_step", breaks)
    # Two seconds between any two looks at the clock: the log has each step at once, the checkpoint
    # does not, so the log must be cut back.
    monkeypatch.setattr("time.perf_counter", itertools.count(0, 2).__next__)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "broken")
    assert log_of(tmp_path / "broken")[-1]["step"] == broken_at - 1
    resumed, again, resumed_log = tuned(tmp_path / "broken")
    assert len(calls) == broken_at + 20 - {7: 4, 12: 10, 15: 12}[broken_at]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    assert resumed_log == log and again == losses
    calls.clear()
    done, again, _ = tuned(tmp_path / "broken")         # tuning is over: nothing is left to do
    assert not calls and again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole, done))


def test_a_checkpoint_is_written_at_printed_steps_and_when_five_minutes_have_passed(
        tmp_path, temporal, world_splits, monkeypatch):
    train_set, valid_set, _ = world_splits
    saved = []
    monkeypatch.setattr(cetrec, "validation_loss", lambda *rest: 1.0)
    monkeypatch.setattr(Journal, "_save", lambda self: saved.append(self.step))
    for pace, wanted in ((0.001, [1, 4, 8, 12, 16, 20]), (301, [*range(1, 21), 20])):
        monkeypatch.setattr("time.perf_counter", itertools.count(0, pace).__next__)
        model = temporal("rope")
        add_lora(model)
        train(model, train_set.select(slice(0, 40)), valid_set, tuning(20, batch_size=2), tmp_path)
        assert saved == wanted          # the last one is written after the validation
        saved.clear()


def test_a_damaged_checkpoint_or_one_of_other_factors_is_one_clear_error(tmp_path, temporal,
                                                                         world_splits):
    train_set, valid_set, _ = world_splits
    for rank in (2, 3):
        model = temporal("rope")
        add_lora(model, rank=rank)
        tune = partial(train, model, train_set.select(slice(0, 16)), valid_set, tuning(2), tmp_path)
        if rank == 2:
            tune()
            continue
        with pytest.raises(ValueError, match="checkpoint.safetensors: damaged, or of other"):
            tune()
        (tmp_path / "checkpoint.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ValueError, match="Delete it to tune from the first step"):
            tune()


# ----------------------------------------------------------------------------------------------
# Adapters: factors and what they were tuned for


def adapter_model(temporal, kind="sinpe", scale=0.5, base="a" * 16):
    model = temporal(kind, scale)
    model.base = base
    return model


def test_an_adapter_goes_back_to_its_base_and_temporal_embedding_only(tmp_path, temporal):
    model = adapter_model(temporal)
    disturbed_factors(model)
    save_adapter(model, tmp_path, "someone/llama")
    assert json.loads((tmp_path / "temporal.json").read_text()) == {
        "sha256": {"adapter_model.safetensors": hashlib.sha256(
            (tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()},
        "temporal": "sinpe", "scale": 0.5, "index": "order", "base": "a" * 16}
    assert "someone/llama" in (tmp_path / "adapter_config.json").read_text()
    twin = adapter_model(temporal)
    load_adapter(twin, tmp_path)
    tokens, item_pos = torch.tensor([[3, 5, 7, 9]]), torch.tensor([[-1, 1, 0, -1]])
    assert torch.equal(twin(tokens, item_pos), model(tokens, item_pos))
    timed = adapter_model(temporal)
    timed.index = "time"
    for other, message in ((adapter_model(temporal, base="b" * 16), "a{16}.*b{16}"),
                           (adapter_model(temporal, "rope"), "sinpe.*this model has.*rope"),
                           (adapter_model(temporal, scale=2.0), "scale 0.5.*scale 2.0"),
                           (timed, "index order.*index time")):
        with pytest.raises(ValueError, match=message):
            load_adapter(other, tmp_path)
        assert not lora_parameters(other)


def test_a_flipped_bit_in_an_adapter_is_found(tmp_path, temporal):
    model = adapter_model(temporal)
    disturbed_factors(model)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1                                        # the lowest bit of one factor
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not those that temporal.json was written for"):
        load_adapter(adapter_model(temporal), tmp_path)


def test_the_scale_of_p_k_is_a_setting_of_the_sinusoidal_kind_only(temporal):
    assert temporal("rope", scale=0.5).settings() == temporal("rope", scale=2.0).settings()
    assert temporal("sinpe", scale=0.5).settings() != temporal("sinpe", scale=2.0).settings()


@pytest.mark.parametrize("text", ["{", "[]", '{"temporal": "rope"}'])
def test_damaged_settings_of_an_adapter_are_one_clear_error(tmp_path, temporal, text):
    model = adapter_model(temporal)
    with pytest.raises(FileNotFoundError, match="temporal.json: not found"):
        load_adapter(model, tmp_path)
    (tmp_path / "temporal.json").write_text(text)
    with pytest.raises(ValueError, match="temporal.json: not "):
        load_adapter(model, tmp_path)


def test_peft_computes_our_logits_if_item_tokens_are_turned_before_the_model(tmp_path, temporal,
                                                                             tokenizer):
    """An adapter of ours is an ordinary one, but peft knows nothing of k: without one line of
    the caller's own, the temporal embedding is silently missing."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, batch = temporal("rope"), batch_of(tokenizer, 6)
    save_llama(model.llama, tmp_path / "base")
    disturbed_factors(model, targets=ALL_LINEAR)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter",
                                                           dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.logits(model(batch.tokens, batch.item_pos))
        embed = theirs.get_input_embeddings()
        turned = rotary(embed(batch.tokens), batch.item_pos.clamp(min=0))
        close(theirs(inputs_embeds=turned).logits, ours, rtol=2e-5, atol=2e-5)
        assert (theirs(batch.tokens).logits - ours).abs().max() > 0.1
        erased = model.logits(model(batch.tokens, erase_order(batch.item_pos)))
        close(theirs(batch.tokens).logits, erased, rtol=2e-5, atol=2e-5)
