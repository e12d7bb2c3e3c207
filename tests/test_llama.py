"""llama.py: attention, rotary positions, cache, checkpoint folders."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

import llama as llama_module
from llama import (KVCache, Llama, LlamaConfig, attend_explicit, attend_fused, inverse_frequencies,
                   load_llama, rotate, save_llama)

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3, 60, 8]])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_attention_equals_explicit_softmax(groups, masked):
    q, k, v = torch.randn(3, 4, 6, 8), torch.randn(3, groups, 6, 8), torch.randn(3, groups, 6, 8)
    mask = None
    if masked:
        mask = (torch.rand(3, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(attend_fused(q, k, v, mask), attend_explicit(q, k, v, mask),
                               rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("scaling", [None, {"rope_type": "llama3", "factor": 4.0,
                                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                            "original_max_position_embeddings": 16}])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tmp_path, scaling, tied):
    transformers = pytest.importorskip("transformers")
    model = Llama(small_config(rope_scaling=scaling, tie_word_embeddings=tied)).eval()
    save_llama(model, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(61, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, rtol=2e-5,
                                   atol=2e-5)


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_back_exactly(tmp_path, tied):
    model = Llama(small_config(tie_word_embeddings=tied))
    save_llama(model, tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.config == model.config and not list(tmp_path.glob("*.part"))
    assert torch.equal(loaded.logits(loaded(TOKENS)), model.logits(model(TOKENS)))
    assert load_llama(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def shard(folder: Path) -> None:
    """Split model.safetensors in two with an index, as large checkpoints are published."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, part in halves.items() for name in part}}))


def test_shards_with_an_index_load_like_one_file(tmp_path, llama):
    save_llama(llama, tmp_path)
    shard(tmp_path)
    assert torch.equal(load_llama(tmp_path)(TOKENS), llama(TOKENS))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002.*index.json names it"):
        load_llama(tmp_path)


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(model_type="gpt2"), "model_type is 'gpt2'"),
    (lambda c: c.update(attention_bias=True), "attention_bias"),
    (lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
     "'yarn' is not implemented"),
    (lambda c: c.update(rope_scaling={"type": "llama3", "factor": 4.0}), "lacks low_freq_factor"),
    (lambda c: c.update(hidden_size="wide"), "hidden_size is 'wide'"),
    (lambda c: c.pop("vocab_size"), "vocab_size"),
    (lambda c: c.update(rope_scaling="linear"), "rope_scaling is 'linear'; wanted an object"),
    (lambda c: c.update(head_dim=None, hidden_size="wide"), "config.json: "),
    (lambda c: (c.pop("head_dim"), c.pop("hidden_size")), "'hidden_size' is missing"),
    (lambda c: c.update(num_key_value_heads=3), "cannot share"),
])
def test_a_config_this_forward_does_not_implement_is_refused_by_name(tmp_path, llama, change,
                                                                     message):
    save_llama(llama, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_folder(tmp_path)


def test_newer_and_older_config_layouts_mean_the_same(tmp_path, llama):
    save_llama(llama, tmp_path)
    edit(tmp_path, lambda c: (c.pop("rope_theta"), c.pop("rope_scaling"),
                              c.update(rope_parameters={"rope_type": "default",
                                                        "rope_theta": 500_000.0})))
    assert LlamaConfig.from_folder(tmp_path) == llama.config


def test_weights_that_do_not_fit_are_listed_together(tmp_path, llama):
    save_llama(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing.*norm.weight.*unexpected.*extra.*shape.*lm_head"):
        load_llama(tmp_path)


def test_damaged_weights_are_one_clear_error(tmp_path, llama):
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        load_llama(tmp_path)
    save_llama(llama, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_llama(tmp_path)
    llama.norm.weight.data[3] = float("nan")
    save_llama(llama, tmp_path)
    with pytest.raises(ValueError, match="norm.weight holds values that are not finite"):
        load_llama(tmp_path)


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
