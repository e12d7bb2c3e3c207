"""lora.py: the factors change nothing before training, they alone are trained, and their files are
those of peft."""

import json
import math

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

from llama import Llama, save_llama
from lora import (ALL_LINEAR, LoraLinear, add_lora, load_lora, lora_parameters, merge_lora,
                  save_lora, without_factors)

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3]])


def hidden(llama) -> torch.Tensor:
    """The hidden states of the tokens."""
    return llama(llama.embed(TOKENS))[0]


def logits(llama) -> torch.Tensor:
    """The logits of the tokens."""
    return llama.logits(hidden(llama))


def disturb(model) -> None:
    """Give B values, as training would."""
    for p in lora_parameters(model):
        p.data += 0.1 * torch.randn_like(p)


def test_lora_output_is_unchanged_before_the_first_step(llama):
    before = hidden(llama)
    add_lora(llama, targets=ALL_LINEAR)
    assert torch.equal(hidden(llama), before)
    llama.train()       # dropout acts on the factors' input only, so nothing changes here either
    assert torch.equal(hidden(llama), before)


def test_a_wrapped_map_by_hand():
    """W = I, A = (1 1; 1 -1), B = (2 0; 0 1), α/R = 6/2: y = x + 3 · (2 (x1 + x2), x1 - x2)."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.eye(2)
    model = torch.nn.ModuleDict({"q_proj": linear})
    add_lora(model, rank=2, alpha=6, dropout=0.0, targets=("q_proj",))
    model["q_proj"].A.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    model["q_proj"].B.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(model["q_proj"](torch.tensor([5.0, 7.0])), torch.tensor([77.0, 1.0]))


def test_only_factors_are_trained_in_float32_whatever_the_base(llama):
    llama.bfloat16()
    factors = add_lora(llama)
    trained = [p for p in llama.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in factors} and len(factors) == 2 * 2 * 2
    assert all(p.dtype == torch.float32 for p in factors)
    hidden(llama).float().sum().backward()
    assert llama.embed_tokens.weight.grad is None
    assert any(p.grad.abs().max() > 0 for p in factors)


def test_dropout_acts_in_training_only(llama):
    add_lora(llama, dropout=0.5)
    disturb(llama)
    assert torch.equal(hidden(llama), hidden(llama))
    llama.train()
    assert not torch.equal(hidden(llama), hidden(llama))


def test_dropout_zeroes_inputs_of_the_factors_and_scales_the_rest():
    """W = 0, A = (1 1), B = 1, α/R = 3: y sums over two inputs of 1 that are 0 or 1 / (1 - p)."""
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data.zero_()
    model = torch.nn.ModuleDict({"q_proj": linear}).train()
    for p in add_lora(model, rank=1, alpha=3, dropout=0.2, targets=("q_proj",)):
        p.data.fill_(1.0)
    x = torch.ones(100_000, 2, requires_grad=True)
    y = model["q_proj"](x)
    y.sum().backward()
    torch.testing.assert_close(y.detach().unique(), torch.tensor([0.0, 3.75, 7.5]))
    torch.testing.assert_close(y[:, 0], x.grad.sum(dim=1))      # zeros where y has them
    assert (x.grad == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (y == 0).float().mean().item() == pytest.approx(0.04, abs=0.01)


def test_without_factors_the_model_is_its_base_for_a_while(llama):
    base = hidden(llama)
    add_lora(llama)
    disturb(llama)
    tuned = hidden(llama)
    with pytest.raises(ZeroDivisionError), without_factors(llama) as model:
        assert model is llama and torch.equal(hidden(llama), base)
        raise ZeroDivisionError
    assert torch.equal(hidden(llama), tuned) and not torch.equal(tuned, base)


def test_merging_gives_the_same_logits_and_plain_maps(llama):
    add_lora(llama, targets=ALL_LINEAR)
    disturb(llama)
    before = logits(llama)
    merge_lora(llama)
    assert not any(isinstance(m, LoraLinear) for m in llama.modules())
    torch.testing.assert_close(logits(llama), before, rtol=1e-5, atol=1e-5)


def test_merging_adds_in_float32_before_it_rounds():
    """bfloat16 has 256 and 258 and nothing between: 256 + 1.003 goes to 258, 256 + 1 to 256."""
    linear = torch.nn.Linear(1, 1, bias=False).bfloat16()
    linear.weight.data.fill_(256.0)
    model = torch.nn.ModuleDict({"q_proj": linear})
    for p, value in zip(add_lora(model, rank=1, alpha=1, targets=("q_proj",)), (1.0, 1.003)):
        p.data.fill_(value)
    merge_lora(model)
    weight = model["q_proj"].weight
    assert weight.dtype == torch.bfloat16 and weight.item() == 258.0 and not weight.requires_grad


def test_a_saved_adapter_loads_back_exactly_with_its_settings(tmp_path, llama):
    twin = Llama(small_config()).eval()
    twin.load_state_dict(llama.state_dict())
    add_lora(llama, rank=3, alpha=5.0, dropout=0.1, targets=("k_proj", "down_proj"))
    disturb(llama)
    save_lora(llama, tmp_path)
    load_lora(twin, tmp_path)
    assert torch.equal(hidden(twin), hidden(llama))
    assert twin.layers[0].self_attn.k_proj.config == llama.layers[0].self_attn.k_proj.config
    assert not list(tmp_path.glob("*.part"))


def test_files_have_the_names_peft_reads(tmp_path, llama):
    add_lora(llama, targets=("q_proj",))
    save_lora(llama, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{f}.weight" for n in (0, 1)
        for f in "AB"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 8, ["q_proj"])


def test_peft_computes_the_same_logits(tmp_path, llama):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_llama(llama, tmp_path / "base")
    add_lora(llama, rank=3, alpha=5.0, targets=ALL_LINEAR)
    disturb(llama)
    save_lora(llama, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter",
                                                           dtype=torch.float32).eval()
    assert isinstance(theirs.base_model.model, transformers.LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(logits(llama), theirs(TOKENS).logits, rtol=2e-5,
                                   atol=2e-5)


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"},
    {"target_modules": ["down_proj"], "init_lora_weights": "gaussian"}])
def test_an_adapter_that_peft_writes_computes_the_same_logits_here(tmp_path, llama, settings):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_llama(llama, tmp_path / "base")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.25, task_type="CAUSAL_LM", **settings)).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "adapter")
    plain = logits(llama)
    load_lora(llama, tmp_path / "adapter")
    config = next(m.config for m in llama.modules() if isinstance(m, LoraLinear))
    assert (config.rank, config.alpha, config.dropout) == (3, 7, 0.25)
    with torch.no_grad():
        torch.testing.assert_close(logits(llama), theirs(TOKENS).logits, rtol=2e-5,
                                   atol=2e-5)
    assert (logits(llama) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("settings, message", [
    ({"rank": 0}, "rank is 0"), ({"rank": 8.0}, "rank is 8.0"), ({"alpha": 0.0}, "alpha is 0.0"),
    ({"dropout": 1.0}, "dropout is 1.0"), ({"dropout": float("nan")}, "dropout is nan"),
    ({"targets": ("q_proj", "wq")}, "targets is .*'wq'"),
    ({"targets": ()}, "targets is \\(\\)"), ({"alpha": math.inf}, "alpha is inf"),
])
def test_bad_settings_are_named(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(llama, **settings)


def test_adding_twice_and_saving_nothing_are_refused(tmp_path, llama):
    with pytest.raises(ValueError, match="no LoRA factors"):
        save_lora(llama, tmp_path)
    add_lora(llama)
    with pytest.raises(ValueError, match="has LoRA factors already"):
        add_lora(llama)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias is 'all'"),
    ({"peft_type": "IA3"}, "'IA3'"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"use_rslora": True}, "use_rslora is set"), ({"r": "eight"}, "rank is 'eight'"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"), ({"alpha_pattern": {"q": 4}}, "alpha_pa"),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"fan_in_fan_out": True}, "fan_in"),
    ({"lora_bias": True}, "lora_bias"), ({"a_feature_of_2030": {"x": 1}}, "a_feature_of_2030"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"target_modules": ".*_proj"}, "target_modules is '.*_proj'"),
    ({"target_modules": ["q_proj", "lm_head"]}, "targets is .*lm_head"),
    ({"target_modules": [["q"]]}, "targets is "), ({"target_modules": []}, "targets is \\(\\)"),
])
def test_adapters_with_features_left_out_are_refused_by_name(tmp_path, llama, change, message):
    add_lora(llama)
    save_lora(llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{message}"):
        load_lora(Llama(small_config()), tmp_path)


def test_targets_may_be_full_names_as_peft_writes_for_all_linear(tmp_path, llama):
    add_lora(llama, targets=("q_proj",))
    disturb(llama)
    save_lora(llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    path.write_text(json.dumps(settings))
    twin = Llama(small_config()).eval()
    twin.load_state_dict({name: p for name, p in llama.state_dict().items()
                          if not name.endswith((".A", ".B"))})
    load_lora(twin, tmp_path)
    assert torch.equal(hidden(twin), hidden(llama))
    tensors = load_file(tmp_path / "adapter_model.safetensors")        # of one layer only
    save_file({name: t for name, t in tensors.items() if "layers.0" in name},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="2 tensors missing"):
        load_lora(Llama(small_config()), tmp_path)


@pytest.mark.parametrize("text, message", [
    ("[]", "adapter_config.json: "), ("{", "adapter_config.json: "),
    ('{"peft_type": "LORA"}', "adapter_config.json: 'target_modules' is missing"),
    ('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8, "lora_alpha": "big"}',
     "adapter_config.json: ")])
def test_a_damaged_adapter_config_is_one_clear_error(tmp_path, llama, text, message):
    add_lora(llama)
    save_lora(llama, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_lora(Llama(small_config()), tmp_path)


def test_damaged_factors_are_refused_and_leave_the_model_alone(tmp_path, llama):
    twin = Llama(small_config()).eval()
    before = hidden(twin)
    add_lora(llama)
    lora_parameters(llama)[3].data[0, 0] = float("nan")
    save_lora(llama, tmp_path)
    with pytest.raises(ValueError, match="1 tensors .*not finite, e.g. .*v_proj.lora_B.weight"):
        load_lora(twin, tmp_path)
    assert torch.equal(hidden(twin), before) and not lora_parameters(twin)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="adapter_model.safetensors: damaged or truncated"):
        load_lora(twin, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
                                   torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_factors_of_other_types_are_refused_and_those_of_half_precision_are_not(tmp_path, llama,
                                                                                dtype):
    add_lora(llama)
    save_lora(llama, tmp_path)
    path, twin = tmp_path / "adapter_model.safetensors", Llama(small_config())
    tensors = load_file(path)
    save_file({name: t.to(dtype) if "layers.1" in name else t for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match="4 tensors .*not stored as float32, float16 or bfloat16, "
                                         r".*layers\.1\.self_attn\.q_proj"):
        load_lora(twin, tmp_path)
    assert not lora_parameters(twin)
    save_file({name: t.half() for name, t in tensors.items()}, path)
    assert all(torch.equal(p, t.half().float()) for p, t in zip(
        load_lora(twin, tmp_path), lora_parameters(llama), strict=True))


def test_an_adapter_of_another_base_is_refused_and_leaves_the_model_alone(tmp_path, llama):
    add_lora(llama)
    save_lora(llama, tmp_path)
    wider = Llama(small_config(hidden_size=32))
    before = hidden(wider)
    with pytest.raises(ValueError, match="of another shape"):
        load_lora(wider, tmp_path)
    assert torch.equal(hidden(wider), before)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 tensors missing"):
        load_lora(Llama(small_config()), tmp_path)
    with pytest.raises(FileNotFoundError, match="No such file.*adapter_config.json"):
        load_lora(Llama(small_config()), tmp_path / "nowhere")
