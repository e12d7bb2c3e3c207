"""llama.py: attention, rotary positions, cache, checkpoint folders."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import small_config

import llama as llama_module
from llama import (FloatLinear, KVCache, attend_explicit, attend_fused, inverse_frequencies,
                   load_llama, rotate)
from lora import ALL_LINEAR, add_lora

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3, 60, 8]])


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_attention_equals_explicit_softmax(groups, masked, before):
    """With and without a prefix, groups and a mask that differs by row; gradients included."""
    inputs = [torch.randn(3, heads, tokens, 8, requires_grad=True) for heads, tokens in (
        (4, 6), (groups, 6 + before), (groups, 6 + before))]
    mask = None
    if masked:
        mask = (torch.rand(3, 1, 6, 6 + before) < 0.5)
        mask[..., before:] |= torch.eye(6, dtype=torch.bool)
    grad = torch.randn(3, 4, 6, 8)
    fused, explicit = ((y := attend(*inputs, mask), *torch.autograd.grad(y, inputs, grad))
                       for attend in (attend_fused, attend_explicit))
    for one, other in zip(fused, explicit):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_explicit_attention_by_hand():
    """Two tokens of width 1: the second looks at both with weights softmax(q k)."""
    q = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    k, v = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1), torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
    w = math.exp(2 * 1.0) / (math.exp(2 * 0.5) + math.exp(2 * 1.0))
    torch.testing.assert_close(attend_explicit(q, k, v, None).flatten(),
                               torch.tensor([10.0, 10 * (1 - w) + 20 * w]))


def test_whole_model_is_the_same_with_explicit_attention(llama, monkeypatch):
    fused = llama(TOKENS)
    monkeypatch.setattr(llama_module, "attend_fused", attend_explicit)
    torch.testing.assert_close(llama(TOKENS), fused, rtol=1e-5, atol=1e-5)


def test_rotation_equals_the_hand_multiplied_block_matrix():
    """Eq. 4 away from position 0, where both layouts would agree: i turns with i + D/2."""
    config = small_config(head_dim=4, rope_theta=100.0)
    x, pos = torch.tensor([1.0, 2.0, 3.0, 4.0]), 3.0
    a, b = pos, pos / 100 ** (2 / 4)
    matrix = torch.tensor([[math.cos(a), 0, -math.sin(a), 0], [0, math.cos(b), 0, -math.sin(b)],
                           [math.sin(a), 0, math.cos(a), 0], [0, math.sin(b), 0, math.cos(b)]])
    angles = pos * inverse_frequencies(config)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), matrix @ x)


@pytest.mark.parametrize("fused, clear, sizes", [
    ("rotate_fused", "rotate", [(2, 4, 6, 8), (6, 4), (6, 4)]),
    ("rotate_fused", "rotate", [(2, 4, 6, 8), (2, 1, 6, 4), (2, 1, 6, 4)]),
    ("swiglu_fused", "swiglu", [(2, 6, 8), (2, 6, 8)]),
    ("rms_norm_fused", "rms_norm", [(2, 6, 8), (8,)])])
def test_fused_operations_and_their_gradients_equal_the_ones_written_out(fused, clear, sizes):
    inputs = [torch.randn(size) for size in sizes]
    grad, results = torch.randn(sizes[0]), []
    for name in (fused, clear):
        copies = [x.clone().requires_grad_(i == 0 or "rotate" not in name)
                  for i, x in enumerate(inputs)]
        y = getattr(llama_module, name)(*copies, *[0.01] * ("rms" in name))
        y.backward(grad)
        results.append([y.detach(), *(x.grad for x in copies if x.requires_grad)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rms_norm_by_hand():
    x, weight = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    root = math.sqrt((9 + 16) / 2 + 0.5)
    torch.testing.assert_close(llama_module.rms_norm(x, weight, 0.5),
                               torch.tensor([3 / root, 8 / root]))


def test_swiglu_by_hand():
    torch.testing.assert_close(llama_module.swiglu(torch.tensor(2.0), torch.tensor(3.0)),
                               torch.tensor(3 * 2 / (1 + math.exp(-2))))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("positions", [None, torch.rand(3, 6).cumsum(dim=1)])
def test_the_last_block_works_for_wanted_places_only_with_the_same_outcome(llama, cached,
                                                                           positions):
    """(B, A) places, another set in each row; gradients included, before and after a prefix."""
    add_lora(llama, targets=ALL_LINEAR)
    tokens, wanted = torch.randint(61, (3, 6)), torch.tensor([[5, 0], [2, 3], [4, 4]])
    grad, results, ran = torch.randn(3, 2, 24), [], []
    llama.layers[-1].mlp.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape))
    for places in (wanted, None):
        cache = KVCache() if cached else None
        if cached:
            llama(torch.tensor([[7, 8]]), cache=cache)
        y = llama(tokens, positions=positions, cache=cache, wanted=places)
        y = y if places is not None else y[torch.arange(3)[:, None], wanted]
        y.backward(grad)
        results.append([y.detach(), *(p.grad for p in llama.parameters() if p.requires_grad)])
        llama.zero_grad()
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (3, 2, 24) in ran and (3, 6, 24) in ran


def test_attention_scores_depend_on_position_differences_only():
    """Eq. 5: <R_m q, R_n k> is a function of m - n, and not a constant one."""
    inv_freq = inverse_frequencies(small_config())
    q, k = torch.randn(2, 8)

    def score(m, n):
        return rotate(q, (m * inv_freq).cos(), (m * inv_freq).sin()) @ rotate(
            k, (n * inv_freq).cos(), (n * inv_freq).sin())
    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_shifting_all_positions_changes_nothing_and_stretching_does(llama):
    here, T = llama(TOKENS), TOKENS.shape[1]
    torch.testing.assert_close(llama(TOKENS, positions=torch.arange(T) + 37), here, rtol=1e-4,
                               atol=1e-4)
    torch.testing.assert_close(llama(TOKENS, positions=torch.arange(T).float()[None]), here)
    assert (llama(TOKENS, positions=torch.arange(T) * 1.5) - here).abs().max() > 1e-2


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


def test_embeddings_can_stand_in_for_tokens(llama):
    torch.testing.assert_close(llama(None, embeddings=llama.embed(TOKENS)), llama(TOKENS))


def test_right_padding_is_never_seen(llama):
    padded = torch.cat((TOKENS, torch.randint(61, (1, 5))), dim=1)
    torch.testing.assert_close(llama(padded)[:, :TOKENS.shape[1]], llama(TOKENS), rtol=1e-5,
                               atol=1e-5)


def test_cached_steps_equal_one_pass(llama):
    cache, pieces = KVCache(), []
    for piece in TOKENS.split([3, 1, 2, 2], dim=1):
        pieces.append(llama(piece, cache=cache))
    assert cache.length == TOKENS.shape[1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), llama(TOKENS), rtol=1e-5, atol=1e-5)


def test_prompts_of_unequal_length_continue_as_each_would_alone(llama):
    prompts, more = [TOKENS[:, :3], TOKENS[:, :7]], torch.tensor([[11, 12]])
    padded = torch.zeros(2, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, :prompt.shape[1]] = prompt
    cache = KVCache()
    llama(padded, cache=cache)
    cache.hide_from(torch.tensor([3, 7]))
    cache.select(torch.tensor([1, 0, 0]))
    first = llama(more[:, :1].expand(3, 1), cache=cache)
    both = torch.cat((first, llama(more[:, 1:].expand(3, 1), cache=cache)), dim=1)
    for row, prompt in zip((0, 1, 2), (prompts[1], prompts[0], prompts[0])):
        alone = llama(torch.cat((prompt, more), dim=1))[0, -2:]
        torch.testing.assert_close(both[row], alone, rtol=1e-5, atol=1e-5)


def test_a_prefix_run_once_serves_all_rows_with_the_same_gradients(llama):
    rows = torch.tensor([[7, 8, 9], [1, 2, 3]])
    whole = llama(torch.cat((TOKENS.expand(2, -1), rows), dim=1))[:, -3:]
    expected = torch.autograd.grad(whole.square().sum(), list(llama.parameters())[:-1])
    cache = KVCache()
    llama(TOKENS, cache=cache)
    shared = llama(rows, cache=cache)
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(shared.square().sum(),
                                                list(llama.parameters())[:-1]),
                            expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def saved_bytes(function) -> tuple[float, int]:
    """Gradient norm of a scalar, and the bytes that forward kept for backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
        loss = function()
    return loss, sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(llama, dropout):
    """Through a shared prefix too, and with the same dropout in both passes."""
    factors, outcomes = add_lora(llama, dropout=dropout, targets=ALL_LINEAR), []
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    llama.train()
    rows = torch.randint(61, (8, 50))
    for llama.recompute in (False, True):
        torch.manual_seed(3)

        def loss():
            cache = KVCache()
            llama(TOKENS, cache=cache)
            cache.read_only = True
            hidden = llama(rows, cache=cache)
            assert cache.length == TOKENS.shape[1]
            return hidden.square().mean()
        value, kept = saved_bytes(loss)
        outcomes.append((value, torch.autograd.grad(value, factors), kept))
    (plain, gradients, much), (again, regradients, little) = outcomes
    assert torch.equal(plain, again) and little < much / 4
    for one, other in zip(gradients, regradients):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_logits_are_float32_and_unrounded_in_a_bfloat16_model(llama):
    llama.bfloat16()
    hidden = llama(TOKENS)
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double() @ llama.lm_head.weight.double().T
    torch.testing.assert_close(llama.logits(hidden).double(), exact, rtol=1e-5, atol=1e-5)


def test_logits_in_blocks_of_words_equal_the_product_with_gradients():
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    weight, grad = torch.randn(100_000, 16).bfloat16().requires_grad_(), torch.randn(5, 100_000)
    assert len(FloatLinear.blocks(weight)) == 2
    y, exact = FloatLinear.apply(x, weight), x.double() @ weight.double().T
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(torch.autograd.grad(y, (x, weight), grad),
                            torch.autograd.grad(exact, (x, weight), grad.double())):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, wanted)
    frozen = weight.detach()
    assert torch.equal(torch.autograd.grad(FloatLinear.apply(x, frozen), x, grad)[0],
                       torch.autograd.grad(FloatLinear.apply(x, weight), x, grad)[0])


def test_a_really_trained_llama_says_its_known_text():
    """stories260K (karpathy/tinyllamas as a checkpoint folder): greedy decoding is known to the
    token."""
    folder = Path(os.environ.get("CETREC_STORIES", "stories260K"))
    if not (folder / "greedy.json").is_file():
        pytest.skip("set CETREC_STORIES to a stories260K checkpoint folder with greedy.json")
    wanted = json.loads((folder / "greedy.json").read_text())["ids"]
    model, cache, tokens = load_llama(folder), KVCache(), wanted[:1]
    with torch.no_grad():
        while len(tokens) < len(wanted):
            hidden = model(torch.tensor([tokens[-1:]]), cache=cache)
            tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    assert len(wanted) == 201 and tokens == wanted
