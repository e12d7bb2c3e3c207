"""cetrec.py: the twin forward against two plain ones, the tuning loop, resuming, adapters.

The equations themselves are in test_equations.py, the command is in test_end_to_end.py.
"""

import hashlib
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TITLES

from cetrec import (TemporalLlama, Tuning, answer_log_likelihood, answer_logits, batch_gradient,
                    cetrec_loss, counterfactual_loss, erase_order, learning_rate, rotary,
                    temporal_aware_loss, train, twin_forward, validation_loss)
from data import IGNORE, batches, collate, encode_example, encode_sequences
from llama import Llama, save_llama
from lora import ALL_LINEAR, add_lora, load_lora, lora_parameters
from support.machine import wrap_blocks
from support.runs import load_adapter, save_adapter

KINDS = ["rope", "rope-attention", "sinpe", "none"]
SETTINGS = {"model": "someone/llama", "temporal": "sinpe", "index": "order", "scale": 0.5,
            "base": "a" * 16}
close = torch.testing.assert_close


def examples_of(tokenizer, *lengths, ages=None):
    """A prompt and its answer for each length of a history."""
    return [encode_example(tokenizer, TITLES[:n], TITLES[-n],
                           ages=None if ages is None else ages[:n]) for n in lengths]


def batch_of(tokenizer, *lengths, ages=None):
    """Those prompts as one batch."""
    return collate(examples_of(tokenizer, *lengths, ages=ages))


def targets_of(batch):
    """The answers' tokens, row after row."""
    return batch.answers[batch.answers != IGNORE]


def disturbed_factors(model, **settings):
    """Factors away from their initial values, where B = 0 would hide what A does."""
    factors = add_lora(model, **settings)
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    return factors


def world_of(model, item_pos, **more):
    """Hidden states of four tokens, the two in the middle being two items."""
    return model(torch.tensor([[3, 5, 7, 9]]), torch.tensor([item_pos]), **more)[0]


# ----------------------------------------------------------------------------------------------
# The twin forward


def two_plain_forwards(model, examples):
    """The definition of the twin forward: each sequence alone, whole, without padding, prefix or
    mask of ours; the same model and tokens twice, and only k differs."""
    worlds = []
    for world in (lambda item_pos: item_pos, erase_order):
        rows = []
        for e in examples:
            hidden, _ = model(torch.tensor([e.tokens[:-1]]), world(torch.tensor([e.item_pos[:-1]])))
            rows.append(model.logits(hidden[0, torch.tensor(e.labels[1:]) != IGNORE]))
        worlds.append(torch.cat(rows))
    return worlds


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_forward_equals_two_plain_forwards_with_gradients(temporal, tokenizer, kind,
                                                                   recompute):
    """Answers of unequal length behind a common prefix, and histories of unequal length."""
    model, examples, outcomes = temporal(kind), examples_of(tokenizer, 3, 6, 4), []
    batch = collate(examples)
    targets = targets_of(batch)
    assert len(batch.prefix) > 0 and (batch.answers == IGNORE).any() and (batch.padding > 0).any()
    for forward, x in ((two_plain_forwards, examples), (twin_forward, batch)):
        if forward is twin_forward:
            wrap_blocks(model.llama, recompute=recompute)
        f, f_0 = forward(model, x)
        assert f.shape == f_0.shape == (len(targets), model.llama.config.vocab_size)
        loss = temporal_aware_loss(f, targets) + counterfactual_loss(f, f_0, targets)
        outcomes.append((f, f_0, *torch.autograd.grad(loss, list(model.parameters()))))
    for plain, twin in zip(*outcomes):
        close(twin, plain, rtol=1e-4, atol=2e-5)


def test_recomputed_blocks_run_again_in_the_backward_pass(temporal, tokenizer):
    model, calls = temporal(), []
    for block in model.llama.layers:
        block.mlp.register_forward_pre_hook(lambda *inputs: calls.append(1))
    counts = []
    for recompute in (False, True):
        wrap_blocks(model.llama, recompute=recompute)
        calls.clear()
        loss = cetrec_loss(model, batch_of(tokenizer, 3, 4), 0.1)[0]
        counts.append(len(calls))
        loss.backward()
        counts.append(len(calls))
    assert counts == [4, 4, 4, 8]       # two blocks for the prefix, two for what follows it


def test_compiled_blocks_equal_the_others_and_share_their_graphs(temporal, tokenizer, monkeypatch):
    """With dropout. The compiler's front end is real; its kernels are PyTorch's own here. A graph
    may serve prefix or rest, the last block or others, but none is made for a single block, nor
    for a batch of another shape, nor for the evaluation."""
    graphs, outcomes, counts = [], [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for compiled in (False, True):
        torch.manual_seed(1)
        model = temporal("rope")
        model.llama = Llama(replace(model.llama.config, num_hidden_layers=3))
        wrap_blocks(model.llama, compiled=compiled)
        factors, losses = disturbed_factors(model.train(), dropout=0.2), []
        for lengths in ((3, 5, 4, 3, 4), (6, 6), (8, 8, 9)):
            loss = cetrec_loss(model, batch_of(tokenizer, *lengths), 0.3)
            loss[0].backward()
            losses += [x.detach() for x in loss]
            counts.append(len(graphs))
        with torch.no_grad():
            losses.append(cetrec_loss(model.eval(), batch_of(tokenizer, 3), 0.3)[0])
        counts.append(len(graphs))
        outcomes.append((losses, [p.grad for p in factors]))
    assert counts[:4] == [0] * 4 and counts[4:] == [counts[4]] * 4
    assert 0 < counts[4] < 6                                    # six would be one for each block
    close(*outcomes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_same_logits_alone_and_beside_longer_ones(temporal, tokenizer, kind):
    model = temporal(kind)
    short, both = batch_of(tokenizer, 3), batch_of(tokenizer, 3, 9)
    alone = answer_logits(model, short, short.item_pos)
    close(answer_logits(model, both, both.item_pos)[:len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_an_unknown_kind_is_refused(llama):
    with pytest.raises(ValueError,
                       match="'alibi'; wanted one of rope, rope-attention, sinpe, none"):
        TemporalLlama(llama, "alibi")


# The clock: k = log2(1 + days), a real number (--index time, D15)


@pytest.mark.parametrize("kind", ["rope", "rope-attention", "sinpe"])
def test_by_the_clock_equal_steps_of_different_age_are_embedded_differently(temporal, kind):
    model = temporal(kind)
    young, old, whole, steps = (world_of(model, [-1, *ks, -1]) for ks in (
        [2.1, 1.0], [2.9, 1.0], [1.0, 0.0], [1, 0]))
    assert (young - old).abs().max() > 1e-3
    close(whole, steps)                 # ages that are whole steps are as good as steps
    close(world_of(model, [-1, 0.0, 0.0, -1]), world_of(model, [-1, 0, 0, -1]))


def test_by_the_clock_the_twin_forward_equals_two_plain_forwards(temporal, tokenizer):
    model, examples = temporal(), examples_of(tokenizer, 3, 5, ages=torch.tensor(
        [8.25, 8.25, 3.2, 2.0, 0.5]).numpy())
    batch = collate(examples)
    assert batch.item_pos.dtype == torch.float32
    for twin, plain in zip(twin_forward(model, batch), two_plain_forwards(model, examples)):
        close(twin, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", ["order", "time"])
def test_answer_log_likelihoods_are_sums_over_the_plain_forwards_of_each_answer(
        temporal, tokenizer, world_splits, index):
    model, sequences = temporal("rope"), world_splits[2].select(slice(0, 5))
    sequences = replace(sequences, index=index)
    found = answer_log_likelihood(model, tokenizer, sequences, batch_size=2)
    for values, example in zip(found, encode_sequences(tokenizer, sequences), strict=True):
        answer = torch.tensor([label for label in example.labels if label != IGNORE])
        expected = [-F.cross_entropy(logits, answer, reduction="sum").item()
                    for logits in two_plain_forwards(model, [example])]
        assert values.tolist() == pytest.approx(expected, abs=1e-4)
        assert abs(expected[0] - expected[1]) > 1e-3


# ----------------------------------------------------------------------------------------------
# The steps of the loop


def tuning(steps: int, **changes) -> Tuning:
    """Settings of a short run."""
    return Tuning(**({"lambda_ct": 0.1, "lr": 0.01, "batch_size": 16, "steps": steps, "warmup": 2}
                     | changes))


def log_of(folder) -> list[dict]:
    """log.jsonl without the milliseconds."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "ms"} for line in lines]


def adamw(factors, gradients, rates):
    """AdamW without weight decay, written out, with gradients of norm at most 1.

    gradients(t) computes losses and gradients of step t for the factors as they are. Yields the
    losses and the norm."""
    means = [torch.zeros_like(p) for p in factors]
    squares = [torch.zeros_like(p) for p in factors]
    for t, rate in enumerate(rates, start=1):
        loss, found = gradients(t)
        norm = torch.cat([g.flatten() for g in found]).norm()
        for p, g, mean, square in zip(factors, found, means, squares):
            g = g / max(1, norm)
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g * g)
            p.data -= rate * (mean / (1 - 0.9 ** t)) / ((square / (1 - 0.999 ** t)).sqrt() + 1e-8)
        yield loss, norm


@pytest.mark.parametrize("scale, lambda_ct", [(0.02, 0.3), (50.0, 0.3), (0.02, 0.0)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_steps_are_those_of_adamw_on_the_clipped_gradient_of_the_whole_batch(
        tmp_path, temporal, tokenizer, world_splits, rows, scale, lambda_ct):
    """Two steps of one epoch and one of the next, so many rows at a time. A loss of scale 50 is
    clipped in every step and one of 0.02 in none."""
    train_set, valid_set = (part.select(slice(0, n)) for part, n in zip(world_splits, (10, 5)))
    validations = iter([2.0, 1.0])

    def loss(model, batch, lambda_ct):
        if not torch.is_grad_enabled():
            return [torch.tensor(next(validations))] * 3
        return [x if x is None else scale * x for x in cetrec_loss(model, batch, lambda_ct)]
    model, by_hand = temporal("rope"), temporal("rope")
    for m in (model, by_hand):
        torch.manual_seed(2)
        disturbed_factors(m, dropout=0.0)
    factors = lora_parameters(by_hand)
    order = [batch for epoch in (0, 1) for batch in batches(tokenizer, train_set, 5, [8, epoch])]
    assert not torch.equal(order[0].answers, order[2].answers)

    def gradients(step):
        losses = loss(by_hand, order[step - 1], lambda_ct)
        return losses, torch.autograd.grad(losses[0], factors)
    # Three steps, one of them warm-up: the rate is 0.01 twice, and half of it in the last step.
    expected = list(adamw(factors, gradients, [0.01, 0.01, 0.005]))
    train(model, train_set, valid_set, tokenizer, tuning(
        3, lambda_ct=lambda_ct, batch_size=5, warmup=1, micro_batch=rows, seed=8), tmp_path,
        SETTINGS, loss)
    for p, q in zip(lora_parameters(model), factors):
        close(p.detach(), q.detach(), rtol=1e-4, atol=1e-5)
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    for line, (losses, norm) in zip(lines, expected, strict=True):
        assert (norm > 1) == (scale > 1)
        assert [line["loss"], line["loss_ta"], line["loss_ct"]] == [
            x if x is None else pytest.approx(x.item(), rel=1e-4) for x in losses]


def test_the_learning_rate_warms_up_and_decays_linearly():
    rates = [learning_rate(step, 10, 1.0, 2) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_the_validation_loss_is_a_mean_over_tokens_without_dropout(temporal, tokenizer,
                                                                   world_splits):
    model, sequences = temporal("rope"), world_splits[1].select(slice(0, 7))
    disturbed_factors(model.train(), dropout=0.5)
    found = [validation_loss(model, tokenizer, sequences, size) for size in (7, 2)]
    total = answer_log_likelihood(model, tokenizer, sequences)[:, 0].sum()
    tokens = sum(len(tokenizer.bpe.encode(f'"{sequences.titles[sequences.target(i)]}"',
                                          add_special_tokens=False).ids) + 1 for i in range(7))
    assert found == pytest.approx([-total / tokens] * 2, rel=1e-5) and not model.training


# ----------------------------------------------------------------------------------------------
# The epochs of the loop


def test_training_lowers_the_loss_keeps_the_best_epoch_and_writes_it(tmp_path, temporal, tokenizer,
                                                                     world_splits):
    train_set, valid_set = world_splits[0].select(slice(0, 160)), world_splits[1]
    model = temporal("rope")
    add_lora(model, rank=4, targets=("q_proj", "v_proj", "down_proj"))
    result = train(model, train_set, valid_set, tokenizer, tuning(20), tmp_path, SETTINGS)
    lines = log_of(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21)) and result["steps"] == 20
    assert [line["lr"] for line in steps] == pytest.approx(
        [0.005, 0.01, *(0.01 * left / 18 for left in range(18, 0, -1))])
    assert [(line["step"], line["validation_ta"]) for line in lines if "validation_ta" in line] == [
        *zip((10, 20), result["validation_ta"])]
    assert steps[-1]["loss_ta"] < steps[0]["loss_ta"] - 0.3
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_ta"] + 0.1 * line["loss_ct"], abs=1e-5)
    kept = validation_loss(model, tokenizer, valid_set, 16)
    assert kept == pytest.approx(min(result["validation_ta"]), abs=1e-5)
    again = temporal("rope")
    load_lora(again, tmp_path)
    assert validation_loss(again, tokenizer, valid_set, 16) == pytest.approx(kept)


def test_training_stops_after_an_epoch_without_a_better_validation_loss(tmp_path, temporal,
                                                                        tokenizer, world_splits):
    """Epochs of two steps. Validation has one batch, and its losses are the given ones."""
    train_set, valid_set = world_splits[0].select(slice(0, 32)), world_splits[1]
    model, losses, states, modes = temporal("none"), iter([3.0, 2.0, 2.5, 1.0]), [], []
    add_lora(model)

    def loss(model, batch, lambda_ct):
        modes.append((torch.is_grad_enabled(), model.training))
        if torch.is_grad_enabled():
            return cetrec_loss(model, batch, lambda_ct)
        states.append([p.detach().clone() for p in lora_parameters(model)])
        return [torch.tensor(next(losses))] * 3
    result = train(model, train_set, valid_set.select(slice(0, 16)), tokenizer,
                   tuning(18, lambda_ct=0.0), tmp_path, SETTINGS, loss)
    assert result["validation_ta"] == [3.0, 2.0, 2.5] and result["steps"] == 6
    assert modes == [(True, True), (True, True), (False, False)] * 3    # dropout in training only
    for p, best, last in zip(lora_parameters(model), states[1], states[2]):
        assert torch.equal(p, best) and not torch.equal(p, last)
    written = temporal("none")
    assert all(torch.equal(a, b) for a, b in zip(load_lora(written, tmp_path), states[1]))


def test_a_gradient_that_is_not_finite_ends_tuning_and_names_the_sequences(tmp_path, temporal,
                                                                           tokenizer, world_splits):
    """The second step's; what the first one made is kept."""
    train_set, valid_set = (part.select(slice(0, 4)) for part in world_splits[:2])
    model, factors = temporal("rope"), []
    add_lora(model)

    def loss(model, batch, lambda_ct):
        factors.append([p.detach().clone() for p in lora_parameters(model)])
        scale = math.inf if len(factors) == 2 else 1
        return [scale * x for x in cetrec_loss(model, batch, lambda_ct)]
    with pytest.raises(ValueError) as error:
        train(model, train_set, valid_set, tokenizer, tuning(9, batch_size=2), tmp_path, SETTINGS,
              loss)
    message, named = str(error.value), []
    for i in range(4):
        history = ", ".join(train_set.titles_of(train_set.history(i)))
        named.append(f'{history} -> "{train_set.titles[train_set.target(i)]}"' in message)
    assert message.startswith("step 2: the gradient's norm is nan") and sum(named) == 2
    assert "Try a smaller --lr or --lambda-ct" in message and "\n" not in message
    assert all(torch.equal(p, before) for p, before in zip(lora_parameters(model), factors[1]))
    assert [line["step"] for line in log_of(tmp_path)] == [1]
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_parts_that_do_not_fit_the_memory_are_halved_and_nothing_is_lost(temporal, tokenizer,
                                                                         capsys):
    """Parts of more than two rows fail, after a gradient of theirs was already there."""
    batch, model = batch_of(tokenizer, 3, 4, 3, 5, 6), temporal("rope")
    factors = disturbed_factors(model)
    torch.autograd.backward(cetrec_loss(model, batch, 0.1)[0])
    expected = [p.grad for p in factors]

    def loss(model, part, lambda_ct):
        losses = cetrec_loss(model, part, lambda_ct)
        if len(part.tokens) > 2:
            losses[0].backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return losses
    losses, rows = batch_gradient(model, batch, 5, 0.1, loss)
    assert rows == 2 and capsys.readouterr().out == (
        "5 rows at a time do not fit the memory; trying 2 from now on\n")
    for p, gradient in zip(factors, expected, strict=True):
        close(p.grad, gradient, atol=1e-6, rtol=1e-5)
    close(losses, torch.stack(cetrec_loss(model, batch, 0.1)).detach())

    def too_large(model, part, lambda_ct):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(MemoryError, match="Tried to allocate 2 GiB"):
        batch_gradient(model, batch, 5, 0.1, too_large)


def test_rows_that_did_not_fit_once_are_not_tried_again(tmp_path, temporal, tokenizer, world_splits,
                                                        capsys):
    train_set, valid_set = (part.select(slice(0, 8)) for part in world_splits[:2])
    model, sizes = temporal("rope"), []
    add_lora(model)

    def loss(model, part, lambda_ct):
        if torch.is_grad_enabled():
            sizes.append(len(part.tokens))
            if len(part.tokens) > 2:
                raise torch.OutOfMemoryError
        return cetrec_loss(model, part, lambda_ct)
    train(model, train_set, valid_set, tokenizer, tuning(2, batch_size=4), tmp_path, SETTINGS, loss)
    assert sizes == [4, 2, 2, 2, 2] and capsys.readouterr().out.count("do not fit") == 1


def test_a_validation_loss_that_is_not_finite_ends_tuning_with_advice(tmp_path, temporal, tokenizer,
                                                                      world_splits):
    """No step failed, but what they led to did. Its adapter is not the best."""
    train_set, valid_set = (part.select(slice(0, 4)) for part in world_splits[:2])
    model = temporal("rope")
    add_lora(model)

    def loss(model, batch, lambda_ct):
        losses = cetrec_loss(model, batch, lambda_ct)
        return losses if torch.is_grad_enabled() else [math.nan * losses[0]] * 3
    with pytest.raises(ValueError, match="scores are not finite: .* tune with a smaller --lr"):
        train(model, train_set, valid_set, tokenizer, tuning(9, batch_size=2), tmp_path, SETTINGS,
              loss)
    assert not (tmp_path / "adapter_model.safetensors").exists()


# ----------------------------------------------------------------------------------------------
# Resuming


def tuned(temporal, tokenizer, splits, folder, worse=False, break_at=0):
    """Two epochs of ten steps in a folder, with dropout, broken at a call of the loss.

    worse: should the second epoch be worse than the first? -> (steps, factors, validation, log)
    """
    torch.manual_seed(0)
    model, steps, calls = temporal("rope"), [], []
    add_lora(model, dropout=0.1)
    torch.seed()                                # dropout does not depend on what was drawn before
    folder.mkdir(exist_ok=True)

    def loss(model, batch, lambda_ct):
        calls.append(1)
        if len(calls) == break_at:
            raise KeyboardInterrupt
        if torch.is_grad_enabled():
            steps.append(1)
        elif worse:                             # a loss that grows with the norm of B
            return [lora_parameters(model)[1].norm()] * 3
        return cetrec_loss(model, batch, lambda_ct)
    result = train(model, splits[0].select(slice(0, 76)), splits[1].select(slice(0, 8)), tokenizer,
                   tuning(20, batch_size=8), folder, SETTINGS, loss)
    return len(steps), lora_parameters(model), result["validation_ta"], log_of(folder)


@pytest.mark.parametrize("worse, breaks", [(False, {1: 20, 7: 16, 12: 10}),
                                           (True, {11: 12, 16: 8, 22: 0})])
def test_an_interrupted_run_goes_on_to_the_same_factors_and_log(tmp_path, temporal, tokenizer,
                                                                world_splits, worse, breaks):
    """Broken before any checkpoint, in each epoch, after a validation and, as these are the calls
    11 and 22, in each validation. Checkpoints are of steps 1, 4, 8, 10, 12, 16 and 20. Where the
    second epoch is the worse one, the factors of the first come out of the checkpoint."""
    run = partial(tuned, temporal, tokenizer, world_splits, worse=worse)
    steps, factors, validation, log = run(tmp_path / "whole")
    assert steps == 20 and (validation[0] < validation[1]) == worse
    for break_at, left in breaks.items():
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(break_at), break_at=break_at)
        steps, resumed, *curves = run(tmp_path / str(break_at))
        assert steps == left and curves == [validation, log]
        assert all(torch.equal(a, b) for a, b in zip(resumed, factors))
    steps, again, *_ = run(tmp_path / "whole")          # tuning is over: nothing is left to do
    assert steps == 0 and all(torch.equal(a, b) for a, b in zip(again, factors))


def test_a_damaged_checkpoint_or_one_of_other_factors_is_one_clear_error(tmp_path, temporal,
                                                                         tokenizer, world_splits):
    train_set, valid_set = (part.select(slice(0, 8)) for part in world_splits[:2])

    def tune(rank):
        model = temporal("rope")
        add_lora(model, rank=rank)
        train(model, train_set, valid_set, tokenizer, tuning(1), tmp_path, SETTINGS)
    tune(2)
    with pytest.raises(ValueError, match="checkpoint.safetensors: damaged, or of other settings"):
        tune(3)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="Delete it to tune from the first step"):
        tune(2)


# ----------------------------------------------------------------------------------------------
# Adapters: factors and what they were tuned for


def test_an_adapter_goes_back_to_its_base_and_temporal_embedding_only(tmp_path, temporal):
    model = temporal("sinpe", 0.5)
    disturbed_factors(model)
    save_adapter(model, tmp_path, SETTINGS)
    assert json.loads((tmp_path / "temporal.json").read_text()) == SETTINGS | {"sha256":
        hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()}
    assert "someone/llama" in (tmp_path / "adapter_config.json").read_text()
    again = temporal("sinpe", 0.5)
    load_adapter(again, tmp_path, SETTINGS)
    assert torch.equal(world_of(again, [-1, 1, 0, -1]), world_of(model, [-1, 1, 0, -1]))
    for changed, message in (({"base": "b" * 16}, "a{16}.*b{16}"),
                             ({"temporal": "rope"}, "sinpe.*this model has.*rope"),
                             ({"scale": 2.0}, "scale 0.5.*scale 2.0"),
                             ({"index": "time"}, "index order.*index time")):
        other = temporal("sinpe", 0.5)
        with pytest.raises(ValueError, match=message):
            load_adapter(other, tmp_path, SETTINGS | changed)
        assert not lora_parameters(other)


def test_a_flipped_bit_in_an_adapter_is_found(tmp_path, temporal):
    model = temporal("sinpe", 0.5)
    disturbed_factors(model)
    save_adapter(model, tmp_path, SETTINGS)
    path = tmp_path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1                                        # the lowest bit of one factor
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not those that temporal.json was written for"):
        load_adapter(temporal("sinpe", 0.5), tmp_path, SETTINGS)


@pytest.mark.parametrize("text", ["{", "[]", '{"temporal": "sinpe"}'])
def test_damaged_settings_of_an_adapter_are_one_clear_error(tmp_path, temporal, text):
    model = temporal("sinpe", 0.5)
    with pytest.raises(FileNotFoundError, match="temporal.json: not found"):
        load_adapter(model, tmp_path, SETTINGS)
    (tmp_path / "temporal.json").write_text(text)
    with pytest.raises(ValueError, match="temporal.json: not "):
        load_adapter(model, tmp_path, SETTINGS)


def test_peft_computes_our_logits_if_item_tokens_are_turned_before_the_model(tmp_path, temporal,
                                                                             tokenizer):
    """An adapter of ours is an ordinary one, but peft knows nothing of k: without one line of
    the caller's own, the temporal embedding is silently missing."""
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, example = temporal("rope"), encode_example(tokenizer, TITLES[:6], TITLES[6])
    tokens, item_pos = torch.tensor([example.tokens]), torch.tensor([example.item_pos])
    save_llama(model.llama, tmp_path / "base")
    disturbed_factors(model, targets=ALL_LINEAR)
    save_adapter(model, tmp_path / "adapter", SETTINGS | {"model": str(tmp_path / "base")})
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter",
                                                           dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model.logits(model(tokens, item_pos)[0])
        turned = rotary(theirs.get_input_embeddings()(tokens), item_pos.clamp(min=0))
        close(theirs(inputs_embeds=turned).logits, ours, rtol=2e-5, atol=2e-5)
        assert (theirs(tokens).logits - ours).abs().max() > 0.1
        erased = model.logits(model(tokens, erase_order(item_pos))[0])
        close(theirs(tokens).logits, erased, rtol=2e-5, atol=2e-5)
