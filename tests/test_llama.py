"""llama.py: attention, positions, masks, the norm, the MLP, passes behind earlier tokens."""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import small_config

from llama import (MLP, Attention, Llama, causal_mask, inverse_frequencies, load_llama, rotate,
                   token_positions)
from lora import ALL_LINEAR, add_lora
from support.machine import wrap_blocks

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3, 60, 8]])


def close(actual, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def hidden(llama, tokens, *settings, **named):
    """The hidden states of a pass."""
    return llama(llama.embed(tokens), *settings, **named)[0]


# ----------------------------------------------------------------------------------------------
# Attention


def attention_written_out(attention, x, angles, mask, past, last):
    """Eq. 5 and the textbooks: one row, one head and one query after the other.

    angles (B, T, D/2). Neighbouring query heads share a key head.
    """
    B, T, D = len(x), x.shape[1], attention.head_dim
    q, k, v = (projection(x).view(B, T, -1, D) for projection in (
        attention.q_proj, attention.k_proj, attention.v_proj))
    shared = q.shape[2] // k.shape[2]
    rows = []
    for b in range(B):
        for t in range(T - last, T) if last else range(T):
            heads = []
            for h in range(q.shape[2]):
                g = h // shared
                earlier = [] if past is None else [past[0][b % len(past[0]), g]]
                keys = torch.cat([*earlier, rotate(k[b, :, g], angles[b].cos(), angles[b].sin())])
                earlier = [] if past is None else [past[1][b % len(past[1]), g]]
                values = torch.cat([*earlier, v[b, :, g]])
                query = rotate(q[b, t, h], angles[b, t].cos(), angles[b, t].sin())
                weights = torch.exp(keys @ query / math.sqrt(D)) * mask[b % len(mask), 0, t]
                heads.append(weights @ values / weights.sum())
            rows.append(attention.o_proj(torch.cat(heads)))
    return torch.stack(rows).view(B, -1, x.shape[-1])


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("past_rows, mask_rows", [(0, 2), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_softmax_written_out_with_gradients(groups, past_rows, mask_rows,
                                                                 last):
    """Shared key heads, any mask, positions that differ by row, three earlier tokens or none."""
    attention = Attention(small_config(num_key_value_heads=groups))
    x, angles = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 4)
    past = tuple(torch.randn(past_rows, groups, 3, 8, requires_grad=True)
                 for _ in range(2)) if past_rows else None
    mask = torch.rand(mask_rows, 1, 5, 8 if past else 5) < 0.5
    mask[..., -5:] |= torch.eye(5, dtype=torch.bool)
    inputs, grad = [x, *(past or ()), *attention.parameters()], torch.randn(2, last or 5, 24)
    fused, present = attention(x, angles[:, None].cos(), angles[:, None].sin(), mask, past, last)
    explicit = attention_written_out(attention, x, angles, mask, past, last)
    close(fused, explicit)
    for one, other in zip(torch.autograd.grad(fused, inputs, grad),
                          torch.autograd.grad(explicit, inputs, grad)):
        close(one, other)
    assert [tuple(kept.shape) for kept in present] == [(2, groups, mask.shape[-1], 8)] * 2


def test_attention_by_hand():
    """Two tokens 1 and 2, whose queries are they themselves, keys half of them, values ten times.

    The second looks at both with weights softmax(q k / √2).
    """
    attention = Attention(small_config(hidden_size=1, num_attention_heads=1, num_key_value_heads=1,
                                       head_dim=2))
    for name, value in (("q_proj", 1.0), ("k_proj", 0.5), ("v_proj", 10.0)):
        getattr(attention, name).weight.data = torch.tensor([[value], [0.0]])
    attention.o_proj.weight.data = torch.tensor([[1.0, 0.0]])
    x, cos, sin = torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    y, _ = attention(x, cos, sin, torch.ones(2, 2).tril().bool()[None, None], None, 0)
    first, second = math.exp(2 * 0.5 / math.sqrt(2)), math.exp(2 * 1.0 / math.sqrt(2))
    torch.testing.assert_close(y.flatten(), torch.tensor(
        [10.0, (10 * first + 20 * second) / (first + second)]))


# ----------------------------------------------------------------------------------------------
# Rotary positions (Eq. 4 and 5)


def test_eq4_rotation_equals_the_hand_multiplied_block_matrix():
    """Away from position 0, where both layouts would agree: i turns with i + D/2."""
    config = small_config(head_dim=4, rope_theta=100.0)
    x, pos = torch.tensor([1.0, 2.0, 3.0, 4.0]), 3.0
    a, b = pos, pos / 100 ** (2 / 4)
    matrix = torch.tensor([[math.cos(a), 0, -math.sin(a), 0], [0, math.cos(b), 0, -math.sin(b)],
                           [math.sin(a), 0, math.cos(a), 0], [0, math.sin(b), 0, math.cos(b)]])
    angles = pos * inverse_frequencies(config)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), matrix @ x)


def test_eq5_scores_depend_on_position_differences_only():
    """<R_m q, R_n k> is a function of m - n, and not a constant one."""
    inv_freq = inverse_frequencies(small_config())
    q, k = torch.randn(2, 8)

    def score(m, n):
        return rotate(q, (m * inv_freq).cos(), (m * inv_freq).sin()) @ rotate(
            k, (n * inv_freq).cos(), (n * inv_freq).sin())
    close(score(7, 3), score(104, 100), 1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_shifting_all_positions_changes_nothing_and_stretching_does(llama):
    default, T = hidden(llama, TOKENS), TOKENS.shape[1]
    close(hidden(llama, TOKENS, torch.arange(T) + 37), default, 1e-4)
    close(hidden(llama, TOKENS, torch.arange(T).float()[None]), default)
    assert (hidden(llama, TOKENS, torch.arange(T) * 1.5) - default).abs().max() > 1e-2


def test_llama3_scaling_keeps_fast_pairs_slows_slow_ones_and_blends_between():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    plain = inverse_frequencies(small_config(head_dim=64))
    scaled = inverse_frequencies(small_config(head_dim=64, rope_scaling=scaling))
    wavelength = 2 * math.pi / plain
    fast, slow = wavelength < 64 / 4, wavelength > 64 / 1
    torch.testing.assert_close(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    middle = ~fast & ~slow
    assert middle.any() and (scaled[middle] < plain[middle]).all() and (
        scaled[middle] > plain[middle] / 8).all()


# ----------------------------------------------------------------------------------------------
# Norm, MLP, embeddings, logits


def test_rms_norm_by_hand():
    norm = Llama(small_config(hidden_size=2, rms_norm_eps=0.5)).norm
    norm.weight.data = torch.tensor([1.0, 2.0])
    root = math.sqrt((9 + 16) / 2 + 0.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])),
                               torch.tensor([3 / root, 8 / root]))


def test_rms_norm_of_bfloat16_is_rounded_once():
    norm = Llama(small_config(hidden_size=256)).layers[0].input_layernorm
    x = torch.randn(4, 256).bfloat16()
    norm.weight.data = torch.randn(256).bfloat16()
    root = (x.double().square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (x.double() / root * norm.weight.double()).bfloat16())


def test_swiglu_by_hand():
    """One number wide, one inside: gate 2 x, up 3 x, down 5 of it."""
    mlp = MLP(small_config(hidden_size=1, intermediate_size=1))
    for name, value in (("gate_proj", 2.0), ("up_proj", 3.0), ("down_proj", 5.0)):
        getattr(mlp, name).weight.data.fill_(value)
    x = 0.7
    torch.testing.assert_close(mlp(torch.tensor([x])), torch.tensor(
        [5 * (2 * x / (1 + math.exp(-2 * x))) * 3 * x]))


def test_logits_are_float32_and_unrounded_in_a_bfloat16_model(llama):
    llama.bfloat16()
    state = hidden(llama, TOKENS)
    assert state.dtype == torch.bfloat16
    logits, exact = llama.logits(state), state.double() @ llama.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    close(logits.double(), exact)


# ----------------------------------------------------------------------------------------------
# Rows that end together


def test_positions_and_masks_of_right_aligned_rows_by_hand():
    """Two earlier tokens, then four columns; two of them are pads in the second row.

    Its first token follows the earlier ones. A pad looks at the earlier tokens and at itself.
    """
    padding = torch.tensor([0, 2])
    assert token_positions(padding, 4, 2)[0].tolist() == [2, 3, 4, 5]
    assert token_positions(padding, 4, 2)[1, 2:].tolist() == [2, 3]
    mask = causal_mask(padding, 4, 2)
    assert mask.dtype == torch.bool and mask[:, 0].int().tolist() == [
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]]
    assert causal_mask(torch.tensor([1]), 2)[0, 0].int().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("behind_a_prefix", [False, True])
def test_a_padded_row_equals_the_row_alone_with_the_same_gradients(llama, behind_a_prefix):
    """Rows of three, seven and five tokens; what fills them up does not matter."""
    rows = [torch.randint(61, (n,)) for n in (3, 7, 5)]
    padding, P = torch.tensor([4, 0, 2]), TOKENS.shape[1] if behind_a_prefix else 0
    factors, outcomes = add_lora(llama, targets=ALL_LINEAR, dropout=0.0), []
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    for filler in (0, 60):
        tokens = torch.stack([torch.cat((torch.full((7 - len(row),), filler), row))
                              for row in rows])
        past = llama(llama.embed(TOKENS))[1] if P else None
        together = hidden(llama, tokens, token_positions(padding, 7, P),
                          causal_mask(padding, 7, P), past)
        outcomes.append([together[i, 7 - len(row):] for i, row in enumerate(rows)])
    prefix = TOKENS[0, :P]
    outcomes.append([hidden(llama, torch.cat((prefix, row))[None])[0, P:] for row in rows])
    grads = [torch.autograd.grad(sum(x.pow(3).sum() for x in states), factors)
             for states in outcomes]
    for states, grad in zip(outcomes[:2], grads):
        for one, other in zip([*states, *grad], [*outcomes[2], *grads[2]]):
            close(one, other, 1e-4)


# ----------------------------------------------------------------------------------------------
# Passes behind earlier tokens


def test_a_pass_in_pieces_equals_one_pass_with_the_same_gradients(llama):
    """Hidden states, keys and values."""
    whole, present = llama(llama.embed(TOKENS))
    pieces, past = [], None
    for piece in TOKENS.split([3, 1, 2, 2], dim=1):
        state, past = llama(llama.embed(piece), past=past)
        pieces.append(state)
    close(torch.cat(pieces, dim=1), whole)
    for kept, pair in zip(past, present, strict=True):
        for one, other in zip(kept, pair):
            close(one, other)
    parameters = list(llama.parameters())[:-1]              # all but lm_head
    for one, other in zip(*(torch.autograd.grad(state.pow(3).sum(), parameters)
                            for state in (torch.cat(pieces, dim=1), whole))):
        close(one, other, 1e-4)


def test_a_prefix_of_one_row_serves_all_rows_with_the_same_gradients(llama):
    """Several passes behind the same prefix, as if the others had never been."""
    parameters = list(llama.parameters())[:-1]              # all but lm_head
    _, past = llama(llama.embed(TOKENS))
    parts = torch.randint(61, (6, 3)).split([2, 3, 1])
    shared = torch.cat([hidden(llama, rows, past=past) for rows in parts])
    whole = torch.cat([hidden(llama, torch.cat((TOKENS.expand(len(rows), -1), rows), dim=1))[:, -3:]
                       for rows in parts])
    close(shared, whole)
    for one, other in zip(*(torch.autograd.grad(state.pow(3).sum(), parameters)
                            for state in (shared, whole))):
        close(one, other, 1e-4)


def test_behind_an_empty_prefix_a_pass_is_as_without_it(llama):
    _, past = llama(llama.embed(TOKENS[:, :0]))
    close(hidden(llama, TOKENS, past=past), hidden(llama, TOKENS))


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("behind_a_prefix", [False, True])
@pytest.mark.parametrize("positions", [None, torch.arange(18).view(3, 6).sqrt().cumsum(dim=1)])
def test_the_last_columns_alone_equal_those_of_the_whole_with_the_same_gradients(
        llama, positions, behind_a_prefix, last):
    """The last block works for these columns only, and still keeps all keys and values."""
    add_lora(llama, targets=ALL_LINEAR, dropout=0.0)
    tokens, grad, results, ran = torch.randint(61, (3, 6)), torch.randn(3, last, 24), [], []
    llama.layers[-1].mlp.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape))
    for columns in (last, 0):
        past = llama(llama.embed(torch.tensor([[7, 8]])))[1] if behind_a_prefix else None
        state, present = llama(llama.embed(tokens), positions, past=past, last=columns)
        assert state.shape[1] == (columns or 6)
        state = state[:, -last:]
        state.backward(grad)
        results.append([state.detach(), *(x.detach() for pair in present for x in pair),
                        *(p.grad for p in llama.parameters() if p.requires_grad)])
        llama.zero_grad()
    for one, other in zip(*results, strict=True):
        close(one, other)
    assert (3, last, 24) in ran and (3, 6, 24) in ran


def test_beams_as_queries_of_one_row_equal_each_branch_run_alone(llama):
    """Two prompts of unequal length, and behind each two steps of two beams.

    Beams 0 and 1 grow behind the prompt, then 2 and 3: both behind 0 in the first row; behind 1 and
    behind 0 in the second.
    """
    prompts, beams = [TOKENS[:, :3], TOKENS], torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    branches = [[(0,), (1,), (0, 2), (0, 3)], [(0,), (1,), (1, 2), (0, 3)]]
    padding = torch.tensor([5, 0])
    tokens = torch.cat((torch.cat((torch.full((1, 5), 60), prompts[0]), dim=1), prompts[1]))
    mask = causal_mask(padding, 8)
    _, past = llama(llama.embed(tokens), token_positions(padding, 8), mask)
    looks_at, states = torch.zeros(2, 4, 12, dtype=torch.bool), []
    for row, paths in enumerate(branches):
        for beam, path in enumerate(paths):
            looks_at[row, beam, :8] = mask[row, 0, -1]
            looks_at[row, beam, [8 + ancestor for ancestor in path]] = True
    for step in (slice(0, 2), slice(2, 4)):
        seen = looks_at[:, step, :8 + step.stop]
        state, past = llama(llama.embed(beams[:, step]), seen.sum(dim=-1) - 1, seen[:, None], past)
        states.append(state)
    states = torch.cat(states, dim=1)
    for row, paths in enumerate(branches):
        for beam, path in enumerate(paths):
            alone = torch.cat((prompts[row], beams[row, list(path)][None]), dim=1)
            close(states[row, beam], hidden(llama, alone)[0, -1])


# ----------------------------------------------------------------------------------------------
# Blocks that are recomputed or compiled, and a model that was really trained


def kept_bytes(function) -> tuple[torch.Tensor, int]:
    """What the function returns, and the bytes that its forward kept for backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
        value = function()
    return value, sum(x.untyped_storage().nbytes() for x in kept.values())


def tuning_loss(llama, rows):
    """Behind a shared prefix, of the last columns, with the same dropout at each call."""
    torch.manual_seed(3)
    _, past = llama(llama.embed(TOKENS))
    return hidden(llama, rows, past=past, last=40).square().mean()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(llama, dropout):
    factors, outcomes = add_lora(llama, dropout=dropout, targets=ALL_LINEAR), []
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    llama.train()
    rows = torch.randint(61, (8, 50))
    for recompute in (False, True):
        wrap_blocks(llama, recompute=recompute)
        value, kept = kept_bytes(partial(tuning_loss, llama, rows))
        outcomes.append((value, torch.autograd.grad(value, factors), kept))
    (plain, gradients, much), (again, regradients, little) = outcomes
    assert torch.equal(plain, again) and little < much / 4
    for one, other in zip(gradients, regradients):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_compiled_blocks_give_the_same_gradients_and_evaluation_stays_eager(llama, monkeypatch):
    """The backend runs the traced blocks as they are, and counts."""
    ran = []

    def backend(graph, inputs):
        return lambda *arguments: (ran.append(graph), graph(*arguments))[1]
    llama.layers = llama.layers[:1]                         # tracing is slow
    parameters, outcomes = list(llama.parameters())[:-1], []        # all but lm_head
    rows = torch.randint(61, (4, 50))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for compiled in (False, True):
        wrap_blocks(llama, compiled=compiled)
        value = tuning_loss(llama, rows)
        outcomes.append([value, *torch.autograd.grad(value, parameters)])
        assert bool(ran) == compiled
    for one, other in zip(*outcomes):
        close(one, other)
    passes = len(ran)
    with torch.no_grad():
        close(tuning_loss(llama, rows), outcomes[0][0].detach())
    assert len(ran) == passes >= 2


def test_a_really_trained_llama_says_its_known_text():
    """stories260K (karpathy/tinyllamas as a checkpoint folder): greedy decoding is known to the
    token."""
    folder = Path(os.environ.get("CETREC_STORIES", "stories260K"))
    if not (folder / "greedy.json").is_file():
        pytest.skip("set CETREC_STORIES to a stories260K checkpoint folder with greedy.json")
    expected = json.loads((folder / "greedy.json").read_text())["ids"]
    model, past, tokens = load_llama(folder), None, expected[:1]
    with torch.no_grad():
        while len(tokens) < len(expected):
            state, past = model(model.embed(torch.tensor([tokens[-1:]])), past=past)
            tokens.append(int(model.logits(state[0, -1]).argmax()))
    assert len(expected) == 201 and tokens == expected
