"""llama.py: attention, rotary positions, the norm, the MLP, the cache, recomputation."""

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch.utils.checkpoint import checkpoint

import llama as llama_module
from llama import MLP, KVCache, RMSNorm, attend, inverse_frequencies, load_llama, rotate
from lora import ALL_LINEAR, add_lora

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3, 60, 8]])


def close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------
# Attention


def softmax_written_out(q, k, v, mask):
    """Attention as Eq. 5 and the textbooks state it, one head and one query after the other."""
    B, H, T, D = q.shape
    rows = []
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])          # H/G neighbouring query heads share one key head
            for t in range(T):
                seen = mask[b % len(mask), 0, t] if mask is not None else (
                    torch.arange(k.shape[2]) <= t)
                weights = torch.exp(k[b, g, seen] @ q[b, h, t] / math.sqrt(D))
                rows.append(weights @ v[b, g, seen] / weights.sum())
    return torch.stack(rows).view(B, H, T, D)


@pytest.mark.parametrize("kind", ["causal", "behind a prefix", "one mask for all rows"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_softmax_written_out_with_gradients(groups, kind):
    """Shared key heads, a mask that differs by row, and three tokens of a prefix."""
    before = 0 if kind == "causal" else 3
    inputs = [torch.randn(2, heads, tokens, 8, requires_grad=True) for heads, tokens in (
        (4, 5), (groups, 5 + before), (groups, 5 + before))]
    mask = None
    if kind != "causal":
        mask = torch.rand(2 if kind == "behind a prefix" else 1, 1, 5, 5 + before) < 0.5
        mask[..., before:] |= torch.eye(5, dtype=torch.bool)
    grad = torch.randn(2, 4, 5, 8)
    fused, explicit = ((y := function(*inputs, mask), *torch.autograd.grad(y, inputs, grad))
                       for function in (attend, softmax_written_out))
    for one, other in zip(fused, explicit):
        close(one, other)


def test_attention_by_hand():
    """Two tokens of width 1: the second looks at both with weights softmax(q k)."""
    q = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    k, v = torch.tensor([0.5, 1.0]).view(1, 1, 2, 1), torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
    w = math.exp(2 * 1.0) / (math.exp(2 * 0.5) + math.exp(2 * 1.0))
    wanted = torch.tensor([10.0, 10 * (1 - w) + 20 * w])
    torch.testing.assert_close(attend(q, k, v, None).flatten(), wanted)
    torch.testing.assert_close(softmax_written_out(q, k, v, None).flatten(), wanted)


def test_the_whole_model_is_the_same_with_the_softmax_written_out(llama, monkeypatch):
    """Before and after a prefix, with places wanted: the shapes that the blocks hand over fit."""
    def outcome():
        cache = KVCache()
        return [llama(TOKENS, cache=cache), llama(TOKENS[:, :3], cache=cache),
                llama(TOKENS, wanted=torch.tensor([[6, 1]]))]
    fused = outcome()
    monkeypatch.setattr(llama_module, "attend", softmax_written_out)
    for one, other in zip(fused, outcome()):
        close(one, other)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("positions", [None, torch.arange(18).view(3, 6).sqrt().cumsum(dim=1)])
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
        close(one, other)
    assert (3, 2, 24) in ran and (3, 6, 24) in ran


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


# ----------------------------------------------------------------------------------------------
# Norm, MLP, embeddings, logits


def test_rms_norm_by_hand():
    norm = RMSNorm(2, 0.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    root = math.sqrt((9 + 16) / 2 + 0.5)
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])),
                               torch.tensor([3 / root, 8 / root]))


def test_rms_norm_of_bfloat16_is_rounded_once():
    norm, x = RMSNorm(256, 1e-5), torch.randn(4, 256).bfloat16()
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


def test_embeddings_can_stand_in_for_tokens(llama):
    torch.testing.assert_close(llama(None, embeddings=llama.embed(TOKENS)), llama(TOKENS))
    assert (llama(None, embeddings=2 * llama.embed(TOKENS) + 1) - llama(TOKENS)).abs().max() > 1e-2


def test_logits_are_float32_and_unrounded_in_a_bfloat16_model(llama):
    llama.bfloat16()
    hidden = llama(TOKENS)
    assert hidden.dtype == torch.bfloat16
    logits, exact = llama.logits(hidden), hidden.double() @ llama.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    close(logits.double(), exact)


# ----------------------------------------------------------------------------------------------
# The cache


def test_right_padding_is_never_seen(llama):
    padded = torch.cat((TOKENS, torch.randint(61, (1, 5))), dim=1)
    close(llama(padded)[:, :TOKENS.shape[1]], llama(TOKENS))


def test_cached_steps_equal_one_pass(llama):
    cache, pieces = KVCache(), []
    for piece in TOKENS.split([3, 1, 2, 2], dim=1):
        pieces.append(llama(piece, cache=cache))
    assert cache.length == TOKENS.shape[1]
    close(torch.cat(pieces, dim=1), llama(TOKENS))


@torch.no_grad()
def test_without_gradients_a_cache_grows_in_place_and_equals_one_pass(llama):
    """One prompt, then three rows of one token at a time: 130 steps, and two copies or three."""
    rows, cache, copies = torch.randint(61, (3, 130)), KVCache(), 0
    whole = llama(torch.cat((TOKENS.expand(3, -1), rows), dim=1))
    pieces, place = [llama(TOKENS, cache=cache).expand(3, -1, -1)], None
    for token in rows.split(1, dim=1):
        pieces.append(llama(token, cache=cache))
        copies += cache.layers[0][0].data_ptr() != place
        place = cache.layers[0][0].data_ptr()
    close(torch.cat(pieces, dim=1), whole)
    assert cache.length == 138 and 2 <= copies <= 3


@torch.no_grad()
def test_without_gradients_a_prompt_run_in_pieces_serves_more_rows(llama):
    """The room that the second piece has made is one row wide; then there are three rows."""
    rows, cache = torch.randint(61, (3, 2)), KVCache()
    for piece in TOKENS.split([5, 3], dim=1):
        llama(piece, cache=cache)
    close(llama(rows, cache=cache), llama(torch.cat((TOKENS.expand(3, -1), rows), dim=1))[:, -2:])


def test_the_room_in_a_cache_is_not_written_while_gradients_are_on(llama):
    """A prompt that ran in pieces without gradients leaves room, one that ran at once does not."""
    weight, ends, gradients = llama.layers[1].self_attn.k_proj.weight, TOKENS.view(4, 1, 2), []
    for pieces in ([8], [5, 3]):
        cache = KVCache()
        with torch.no_grad():
            for piece in TOKENS.split(pieces, dim=1):
                llama(piece, cache=cache)
        loss = sum(llama(end, cache=cache).pow(3).sum() for end in ends)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_prefix_run_once_serves_all_rows_with_the_same_gradients(llama):
    rows = torch.tensor([[7, 8, 9], [1, 2, 3]])
    trained = list(llama.parameters())[:-1]                 # all but lm_head
    whole = llama(torch.cat((TOKENS.expand(2, -1), rows), dim=1))[:, -3:]
    expected = torch.autograd.grad(whole.square().sum(), trained)
    cache = KVCache()
    llama(TOKENS, cache=cache)
    shared = llama(rows, cache=cache)
    close(shared, whole)
    for ours, theirs in zip(torch.autograd.grad(shared.square().sum(), trained), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_read_only_cache_is_looked_at_and_left_alone(llama, gradients):
    """Continuations of one prompt by two rows, three, and one, as if the others had never been."""
    cache, ends = KVCache(), torch.randint(61, (6, 3)).split([2, 3, 1])
    with torch.set_grad_enabled(gradients):
        llama(TOKENS, cache=cache)
        cache.read_only = True
        before = [(k.clone(), v.clone()) for k, v in cache.layers]
        for end in ends:
            close(llama(end, cache=cache),
                  llama(torch.cat((TOKENS.expand(len(end), -1), end), dim=1))[:, -3:])
            assert cache.length == TOKENS.shape[1]
    for pair, old in zip(cache.layers, before, strict=True):
        for x, was in zip(pair, old):
            assert torch.equal(x[:, :, :cache.length], was)


def test_selected_rows_are_kept_repeated_and_in_that_order(llama):
    prompts, more, cache = torch.randint(61, (3, 5)), torch.tensor([[7, 8]]), KVCache()
    llama(prompts, cache=cache)
    chosen = torch.tensor([2, 0, 2])
    cache.select(chosen)
    close(llama(more.expand(3, -1), cache=cache),
          llama(torch.cat((prompts[chosen], more.expand(3, -1)), dim=1))[:, -2:])


PROMPTS = [TOKENS[:, :3], TOKENS[:, :7]]


def padded_prompts(llama) -> KVCache:
    """A cache of two prompts of unequal length; what fills the shorter one up is hidden."""
    cache, tokens = KVCache(), torch.full((2, 7), 60)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, :prompt.shape[1]] = prompt
    llama(tokens, cache=cache)
    cache.hidden = torch.arange(cache.length) >= torch.tensor([[3], [7]])
    return cache


def test_hidden_slots_by_hand(llama):
    """Row 0 has three tokens and four slots of padding: it goes on at position 3."""
    cache = padded_prompts(llama)
    assert cache.positions(2, "cpu").tolist() == [[3, 4], [7, 8]]
    wanted = [[[1, 1, 1, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1, 1]],
              [[1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]]]
    assert cache.mask(2, "cpu")[:, 0].int().tolist() == wanted
    assert KVCache().mask(2, "cpu") is None and KVCache().positions(2, "cpu").tolist() == [0, 1]


@pytest.mark.parametrize("gradients", [False, True])
def test_prompts_of_unequal_length_continue_as_each_would_alone(llama, gradients):
    more = torch.tensor([[11, 12]])
    with torch.set_grad_enabled(gradients):
        cache = padded_prompts(llama)
        cache.select(torch.tensor([1, 0, 0]))
        both = torch.cat([llama(token.expand(3, 1), cache=cache) for token in more.split(1, dim=1)],
                         dim=1)
        for row, prompt in enumerate((PROMPTS[1], PROMPTS[0], PROMPTS[0])):
            close(both[row], llama(torch.cat((prompt, more), dim=1))[0, -2:])


def test_a_tree_by_hand():
    """The example of KVCache: five slots of a prompt, nodes 0 and 1, then 2 and 3 below 0."""
    cache = KVCache()
    cache.length, cache.tree = 5, torch.tensor([[[1, 0], [0, 1]]]).bool()
    assert cache.positions(2, "cpu").tolist() == [[5, 5]]
    assert cache.mask(2, "cpu").int().tolist() == [[[[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1]]]]
    cache.length, cache.tree = 7, torch.tensor([[[1, 0, 1, 0], [1, 0, 0, 1]]]).bool()
    assert cache.positions(2, "cpu").tolist() == [[6, 6]]
    assert cache.mask(2, "cpu").int().tolist() == [[[[1, 1, 1, 1, 1, 1, 0, 1, 0],
                                                     [1, 1, 1, 1, 1, 1, 0, 0, 1]]]]


@pytest.mark.parametrize("gradients", [False, True])
def test_each_branch_of_a_tree_is_as_if_it_ran_alone(llama, gradients):
    """Two rows with prompts of unequal length, and another tree behind each.

    Nodes 0 and 1 grow behind the prompt, then 2 and 3: both below 0 in row 0; below 1 and below 0
    in row 1.
    """
    nodes = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    branches = [[(0,), (1,), (0, 2), (0, 3)], [(0,), (1,), (1, 2), (0, 3)]]
    own = torch.zeros(2, 4, 4, dtype=torch.bool)
    for row, paths in enumerate(branches):
        for node, path in enumerate(paths):
            own[row, node, list(path)] = True
    with torch.set_grad_enabled(gradients):
        cache, ran = padded_prompts(llama), []
        for step in (slice(0, 2), slice(2, 4)):
            cache.tree = own[:, step, :step.stop]
            ran.append(llama(nodes[:, step], cache=cache))
        ran = torch.cat(ran, dim=1)
        for row, paths in enumerate(branches):
            for node, path in enumerate(paths):
                alone = torch.cat((PROMPTS[row], nodes[row, list(path)][None]), dim=1)
                close(ran[row, node], llama(alone)[0, -1])


# ----------------------------------------------------------------------------------------------
# Recomputation, and a model that was really trained


def kept_bytes(function) -> tuple[torch.Tensor, int]:
    """What the function returns, and the bytes that its forward kept for backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x) is None or x, lambda x: x):
        value = function()
    return value, sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(llama, dropout):
    """Through a shared prefix too, and with the same dropout in both passes."""
    factors, outcomes = add_lora(llama, dropout=dropout, targets=ALL_LINEAR), []
    for p in factors:
        p.data += 0.1 * torch.randn_like(p)
    llama.train()
    rows = torch.randint(61, (8, 50))

    def loss():
        cache = KVCache()
        llama(TOKENS, cache=cache)
        cache.read_only = True
        return llama(rows, cache=cache).square().mean()
    for run_block in (llama.run_block, partial(checkpoint, use_reentrant=False)):
        llama.run_block = run_block
        torch.manual_seed(3)
        value, kept = kept_bytes(loss)
        outcomes.append((value, torch.autograd.grad(value, factors), kept))
    (plain, gradients, much), (again, regradients, little) = outcomes
    assert torch.equal(plain, again) and little < much / 4
    for one, other in zip(gradients, regradients):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_blocks_run_in_the_wrapper_while_gradients_are_on_only(llama):
    ran = []

    def run_block(block, *inputs):
        ran.append(block)
        return block(*inputs)
    llama.run_block = run_block
    llama(TOKENS)
    assert ran == list(llama.layers)
    with torch.no_grad():
        llama(TOKENS)
    assert len(ran) == len(llama.layers)


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
