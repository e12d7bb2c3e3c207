"""lora.py: the factors change nothing before training, are the only thing trained, and
round-trip."""

import json

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

from llama import Llama
from lora import ALL_LINEAR, LoraLinear, add_lora, load_lora, lora_parameters, merge_lora, save_lora

TOKENS = torch.tensor([[5, 9, 2, 44, 17, 3]])


def disturb(model) -> None:
    """Give B values, as training would."""
    for p in lora_parameters(model):
        p.data += 0.1 * torch.randn_like(p)


def test_lora_output_is_unchanged_before_the_first_step(llama):
    before = llama(TOKENS)
    add_lora(llama, targets=ALL_LINEAR)
    assert torch.equal(llama(TOKENS), before)
    llama.train()       # dropout acts on the factors' input only: still nothing changes
    assert torch.equal(llama(TOKENS), before)


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
    llama(TOKENS).float().sum().backward()
    assert llama.embed_tokens.weight.grad is None
    assert any(p.grad.abs().max() > 0 for p in factors)


def test_dropout_acts_in_training_only(llama):
    add_lora(llama, dropout=0.5)
    disturb(llama)
    assert torch.equal(llama(TOKENS), llama(TOKENS))
    llama.train()
    assert not torch.equal(llama(TOKENS), llama(TOKENS))


def test_merging_gives_the_same_output_and_plain_maps(llama):
    add_lora(llama, targets=ALL_LINEAR)
    disturb(llama)
    before = llama(TOKENS)
    merge_lora(llama)
    assert not any(isinstance(m, LoraLinear) for m in llama.modules())
    torch.testing.assert_close(llama(TOKENS), before, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_loads_back_exactly_with_its_settings(tmp_path, llama):
    twin = Llama(small_config()).eval()
    twin.load_state_dict(llama.state_dict())
    add_lora(llama, rank=3, alpha=5.0, dropout=0.1, targets=("k_proj", "down_proj"))
    disturb(llama)
    save_lora(llama, tmp_path)
    load_lora(twin, tmp_path)
    assert torch.equal(twin(TOKENS), llama(TOKENS))
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
    from llama import save_llama
    save_llama(llama, tmp_path / "base")
    add_lora(llama, rank=3, alpha=5.0, targets=ALL_LINEAR)
    disturb(llama)
    save_lora(llama, tmp_path / "adapter")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(llama.logits(llama(TOKENS)), theirs(TOKENS).logits, rtol=1e-4,
                                   atol=1e-4)


@pytest.mark.parametrize("settings, message", [
    ({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0.0"), ({"dropout": 1.0},
                                                                   "dropout is 1.0"),
    ({"targets": ("q_proj", "wq")}, "targets wq"), ({"targets": ()}, "targets empty"),
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
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias is 'all'"), ({"peft_type": "IA3"},
                                                                           "'IA3'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": "eight"}, "rank is 'eight'"),
])
def test_adapters_with_features_left_out_are_refused_by_name(tmp_path, llama, change, message):
    add_lora(llama)
    save_lora(llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_lora(Llama(small_config()), tmp_path)


def test_an_adapter_of_another_base_is_refused_and_leaves_the_model_alone(tmp_path, llama):
    add_lora(llama)
    save_lora(llama, tmp_path)
    wider = Llama(small_config(hidden_size=32))
    before = wider(TOKENS)
    with pytest.raises(ValueError, match="of another shape"):
        load_lora(wider, tmp_path)
    assert torch.equal(wider(TOKENS), before)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 tensors missing"):
        load_lora(Llama(small_config()), tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config.json: not found"):
        load_lora(Llama(small_config()), tmp_path / "nowhere")
