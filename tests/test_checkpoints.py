"""llama.py and support/checkpoints.py on checkpoints as they are published: the numbers of the
reference implementation, strict loading, every refusal, the digest, the Hub.

`python tests/test_checkpoints.py` asks transformers for the numbers in recorded_llama.json again.
"""

import json
import os
import re
import struct
import sys
import threading
from contextlib import contextmanager, redirect_stderr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import published_tensors
from safetensors.torch import load_file, save_file

from cetrec import main
from llama import Llama, LlamaConfig, load_llama, save_llama
from lora import add_lora
from support.checkpoints import check_checkpoint, find_checkpoint

SIZES = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
         "rms_norm_eps": 1e-5}
SLOWED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
KINDS = {       # config.json as each family publishes it, in small
    "Llama 3": SIZES | {"rope_theta": 500_000.0, "rope_scaling": None, "attention_bias": False,
                        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"},
    "Llama 3.1": SIZES | {"rope_theta": 500_000.0, "rope_scaling": SLOWED | {
        "rope_type": "llama3"}, "max_position_embeddings": 131_072, "mlp_bias": False},
    "Llama 3.2": SIZES | {"rope_theta": 500_000.0, "rope_scaling": SLOWED | {
        "type": "llama3", "factor": 32.0}, "tie_word_embeddings": True, "head_dim": 8},
    "Llama 3.2, newer layout": SIZES | {"rope_parameters": SLOWED | {
        "rope_type": "llama3", "rope_theta": 250_000.0}, "tie_word_embeddings": True,
        "head_dim": 8, "dtype": "bfloat16"},
    "SmolLM2": SIZES | {"rope_theta": 100_000, "num_attention_heads": 3, "num_key_value_heads": 1,
                        "tie_word_embeddings": True, "rope_interleaved": False,
                        "is_llama_config": True, "pretraining_tp": 1},
    "TinyLlama": SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "rope_scaling": None,
                          "max_position_embeddings": 2048, "pretraining_tp": 1},
    "Llama 2": {k: v for k, v in SIZES.items() if k not in (
        "rms_norm_eps", "num_key_value_heads", "max_position_embeddings")},
}
TOKENS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 60, 8, 33, 66],
                       [1, 7, 7, 0, 12, 51, 64, 9, 2, 2, 30]])
MODES = {       # positions, and whether the input is embeddings instead of tokens
    "default": (torch.arange(11), False), "embeddings": (torch.arange(11), True),
    "shifted": (torch.arange(11) + 5_000, False), "float": (1.5 * torch.arange(11) + 40.25, False),
    "beyond the original context": (37 * torch.arange(11), False)}
RECORDED = Path(__file__).with_name("recorded_llama.json")


def embeddings() -> torch.Tensor:
    n = 2 * 11 * 24
    return torch.sin(torch.arange(n, dtype=torch.float64) ** 1.5).view(2, 11, 24).float()


def publish(folder: Path, kind="Llama 3", dtype=torch.float32, prefix="model.") -> Path:
    """A checkpoint folder of that kind with weights of a closed form."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(KINDS[kind]))
    tensors = {(prefix + name if name != "lm_head.weight" else name): tensor.to(dtype)
               for name, tensor in published_tensors(KINDS[kind]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def theirs(folder: Path, mode: str, dtype=torch.float32):
    """Hidden states and logits of transformers."""
    import transformers
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    positions, embedded = MODES[mode]
    tokens = {"inputs_embeds": embeddings().to(dtype)} if embedded else {"input_ids": TOKENS}
    with torch.no_grad():
        out = model(**tokens, position_ids=positions.expand(2, -1), output_hidden_states=True,
                    attention_mask=torch.ones(2, 11))
    return out.hidden_states[-1], out.logits


@torch.no_grad()
def ours(folder: Path, mode: str, dtype=None):
    """Hidden states and logits of this project."""
    model = load_llama(folder, dtype=dtype)
    positions, embedded = MODES[mode]
    x = embeddings().to(model.norm.weight.dtype) if embedded else model.embed(TOKENS)
    hidden, _ = model(x, positions)
    return hidden, model.logits(hidden)


def relative(actual, expected) -> float:
    """The largest difference over the largest expected number."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_equal_transformers(tmp_path, kind, mode):
    pytest.importorskip("transformers")
    publish(tmp_path, kind)
    for actual, expected in zip(ours(tmp_path, mode), theirs(tmp_path, mode)):
        assert relative(actual, expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_equal_recorded_ones(tmp_path, kind):
    """What transformers gave for the last token of the second row; needs nothing installed."""
    publish(tmp_path, kind)
    recorded = json.loads(RECORDED.read_text())[kind]
    for mode in MODES:
        hidden, logits = ours(tmp_path, mode)
        assert relative(hidden[1, -1], torch.tensor(recorded[mode]["hidden"])) < 2e-5, mode
        assert relative(logits[1, -1, ::8], torch.tensor(recorded[mode]["logits"])) < 2e-5, mode


def test_the_recorded_numbers_tell_the_kinds_and_modes_apart():
    recorded = json.loads(RECORDED.read_text())
    seen = [torch.tensor(recorded[kind][mode]["hidden"]) for kind in KINDS for mode in MODES
            if mode != "shifted"]               # which must equal the default
    assert min(relative(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-3


def test_bfloat16_is_within_its_own_rounding_of_float32(tmp_path):
    """Stored in bfloat16, run in it and in float32: the error is of the order of 2^-8."""
    publish(tmp_path, "Llama 3.1", torch.bfloat16)
    for half, full in zip(ours(tmp_path, "default"), ours(tmp_path, "default", torch.float32)):
        assert 2**-16 < (half.float() - full).norm() / full.norm() < 4 * 2**-8
    assert ours(tmp_path, "default")[1].dtype == torch.float32


def test_bfloat16_is_no_further_from_float32_than_transformers(tmp_path):
    pytest.importorskip("transformers")
    publish(tmp_path, "Llama 3.1", torch.bfloat16)
    exact = theirs(tmp_path, "default")[1]
    error = relative(theirs(tmp_path, "default", torch.bfloat16)[1], exact)
    assert relative(ours(tmp_path, "default")[1], exact) < 1.5 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_any_storage_and_prefix_loads_to_the_stored_values(tmp_path, dtype, prefix):
    publish(tmp_path, "TinyLlama", dtype, prefix)
    stored, model = load_file(tmp_path / "model.safetensors"), load_llama(tmp_path)
    for name, parameter in model.named_parameters():
        name = name if name == "lm_head.weight" else prefix + name
        assert parameter.dtype == dtype and torch.equal(parameter, stored[name])
    assert load_llama(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_the_digest_names_the_values_not_the_files(tmp_path):
    one = check_checkpoint(publish(tmp_path, "Llama 3", torch.bfloat16))
    assert re.fullmatch("[0-9a-f]{16}", one)
    shard(tmp_path)
    assert check_checkpoint(tmp_path) == one
    publish(tmp_path, "Llama 3", torch.bfloat16, prefix="")
    assert check_checkpoint(tmp_path) == one
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    two = check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(KINDS["Llama 3"] | {"rope_theta": 10_000.0}))
    assert len({one, two, check_checkpoint(tmp_path)}) == 3


def test_the_digest_covers_the_tokenizer(tmp_path):
    """The same weights read other text where one merge is gone."""
    publish(tmp_path, "Llama 3", torch.float32)
    path, digests = tmp_path / "tokenizer.json", [check_checkpoint(tmp_path)]
    for content in ("{}", "{} ", "{}"):
        path.write_text(content)
        digests.append(check_checkpoint(tmp_path))
    assert digests[1] == digests[3] and len(set(digests)) == 3


def test_the_digest_is_the_same_where_a_tied_matrix_is_stored_twice(tmp_path):
    one, tensors = check_checkpoint(publish(tmp_path, "SmolLM2")), load_file(
        tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path) == one


def kilobytes(what: str) -> int:
    """A line of this process's memory account."""
    return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_loading_takes_memory_for_the_weights_and_for_the_largest_of_them_again(tmp_path):
    """Zeros in bfloat16, as a file with a hole; a quarter is one tensor, which is not the first."""
    config = SIZES | {"vocab_size": 32_064, "hidden_size": 1024, "intermediate_size": 4096,
                      "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_folder(tmp_path))
    header, end = {}, 0
    for name, p in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(p.shape),
                        "data_offsets": [end, end := end + 2 * p.numel()]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    try:
        Path("/proc/self/clear_refs").write_text("5")       # forget the highest account so far
    except OSError:
        pytest.skip("counts resident pages as Linux does")
    before = kilobytes("VmRSS")
    model = load_llama(tmp_path)
    peak = 1024 * (kilobytes("VmHWM") - before)
    assert end == sum(2 * p.numel() for p in model.parameters()) > 250e6
    assert 0.9 < peak / end < 1.3
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def refused(folder: Path, message: str, error=ValueError,
            readers=(load_llama, check_checkpoint)) -> str:
    """What each of the readers says against the folder, in one line that is the same for all."""
    lines = set()
    for read in readers:
        with pytest.raises(error, match=message) as raised:
            read(folder)
        lines.add(str(raised.value))
    (line,) = lines
    assert "\n" not in line
    return line


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


def test_shards_with_an_index_load_like_one_file(tmp_path):
    publish(tmp_path)
    whole = ours(tmp_path, "default")[1]
    shard(tmp_path)
    assert torch.equal(ours(tmp_path, "default")[1], whole)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002.*not found.*index.json", FileNotFoundError)


# ----------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'.*wanted 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
    ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor is 0.5")])
def test_what_this_forward_does_not_implement_is_refused_before_weights(tmp_path, change, message):
    publish(tmp_path)
    (tmp_path / "model.safetensors").unlink()           # nobody needs to look at it
    (tmp_path / "config.json").write_text(json.dumps(KINDS["Llama 3"] | change))
    line = refused(tmp_path, message)
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and "which is not implemented" in line


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "low_freq_factor is None"),
    ({"rope_scaling": SLOWED | {"rope_type": "llama3", "factor": "8"}}, "factor is '8'"),
    ({"rope_scaling": SLOWED | {"rope_type": "llama3", "high_freq_factor": 1.0}}, "not below"),
    ({"rope_scaling": "linear"}, "not the settings of a Llama"),
    ({"rope_parameters": [1]}, "not the settings of a Llama"),
    ({"hidden_size": "wide"}, "not the settings of a Llama"),
    ({"hidden_size": "wide", "head_dim": 6}, "hidden_size is 'wide'"),
    ({"vocab_size": None}, "vocab_size is None"), ({"vocab_size": True}, "vocab_size is True"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"), ({"hidden_size": -24}, "is -24"),
    ({"num_attention_heads": 0}, "not the settings of a Llama"),
    ({"head_dim": 7}, "head_dim is 7"), ({"vocab_size": 10**30}, "wanted a positive integer below"),
    ({"num_hidden_layers": 2_000}, "the deepest Llama has 126"),
    ({"rope_theta": 10**29}, "wanted a positive number"),
    ({"rope_theta": "big"}, "rope_theta is 'big'"), ({"rms_norm_eps": "1e-5"}, "is '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"num_key_value_heads": 3}, "cannot share"),
])
def test_an_absurd_config_is_refused_before_weights(tmp_path, change, message):
    publish(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(KINDS["Llama 3"] | change))
    line = refused(tmp_path, message, readers=[check_checkpoint])
    assert line.startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"), ("[]", "not the settings of a Llama"), ("\xff", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"model_type": "llama"}', "'num_attention_heads' is missing")])
def test_a_damaged_config_is_one_clear_error(tmp_path, text, message):
    refused(tmp_path, "config.json: not found", FileNotFoundError)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(tmp_path, f"config.json: {message}", readers=[check_checkpoint])


def test_tensors_that_do_not_fit_are_listed_together_with_their_file(tmp_path):
    publish(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)    # harmless
    save_file(tensors, tmp_path / "model.safetensors")
    said = refused(tmp_path, "5 tensors do not fit config.json")
    for part in (str(tmp_path), "model.extra.weight in model.safetensors unexpected",
                 "lm_head.weight in model.safetensors of shape (3, 3) as F32, wanted (67, 24) as",
                 "up_proj.weight in model.safetensors of shape (40, 24) as I8, wanted (40, 24) as "
                 "F32, F16 or BF16", "norm.weight missing",
                 "embed_tokens.weight in model.safetensors unexpected"):
        assert part in said, part
    assert "inv_freq" not in said


def test_a_tied_checkpoint_may_store_both_but_not_two_different_ones(tmp_path):
    publish(tmp_path, "SmolLM2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_llama(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "ties lm_head to embed_tokens, but", readers=[check_checkpoint])


@pytest.mark.parametrize("damage, message", [
    (lambda whole: whole[:len(whole) // 2], "damaged or truncated"),
    (lambda whole: b"", "damaged or truncated"), (lambda whole: b"not a tensor", "damaged"),
    (lambda whole: struct.pack("<Q", 2**63 - 1) + whole[8:], "damaged or truncated"),
    (lambda whole: struct.pack("<Q", 2**40) + whole[8:], "damaged or truncated"),
    (lambda whole: whole[:8] + b"}" * 100 + whole[108:], "damaged or truncated"),
    (lambda whole: whole[:8] + whole[8:].replace(b'"F32"', b'"I64"', 1), "damaged or truncated")])
def test_a_damaged_weight_file_is_one_clear_error(tmp_path, damage, message):
    """Truncated, empty, an absurd header length, a header that does not parse or add up."""
    publish(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, f"model.safetensors: {message}", readers=[check_checkpoint])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad, dtype):
    publish(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][23] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "safetensors: model.norm.weight holds values that are not finite",
            readers=[check_checkpoint])


@pytest.mark.parametrize("index, message", [
    ({"weight_map": {"a": "../secret.safetensors"}}, "not an index of files in this folder"),
    ({"weight_map": {"a": "/etc/passwd"}}, "not an index of files in this folder"),
    ({"weight_map": {"a": "sub/x.safetensors"}}, "names other places"),
    ({"weight_map": {"a": 7}}, "not an index of files in this folder"),
    ({"weight_map": [1]}, "not an index of files"), ([], "not an index of files"),
    ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors: not found"),
    ({"weight_map": {}}, "not an index of files in this folder")])
def test_an_index_that_is_wrong_or_leaves_the_folder_is_refused(tmp_path, index, message):
    publish(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "secret.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, message, (ValueError, FileNotFoundError), [check_checkpoint])
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "model.safetensors: not found. Weights are read from", FileNotFoundError)


# ----------------------------------------------------------------------------------------------
# Out again


@pytest.mark.parametrize("kind", ["Llama 3.1", "Llama 3.2"])
def test_a_saved_folder_loads_back_exactly(tmp_path, kind):
    model = load_llama(publish(tmp_path / "in", kind, torch.bfloat16))
    save_llama(model, tmp_path / "out")
    loaded = load_llama(tmp_path / "out")
    assert loaded.config == model.config and (
        check_checkpoint(tmp_path / "in") == check_checkpoint(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.part"))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))
    add_lora(model)
    with pytest.raises(ValueError, match=r"merge_lora\(model\) first"):
        save_llama(model, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_save_llama_writes(tmp_path, kind):
    pytest.importorskip("transformers")
    publish(tmp_path / "in", kind)
    save_llama(load_llama(tmp_path / "in"), tmp_path / "out")
    assert relative(theirs(tmp_path / "out", "shifted")[1], ours(tmp_path / "in", "shifted")[1]
                    ) < 2e-5


# ----------------------------------------------------------------------------------------------
# The Hub: huggingface_hub talks to a server of ours


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub's interface that a download needs, and faults that networks have.

    faults: part of a path -> what happens where it is asked for, if GET or HEAD is in the key too.
    """

    root: Path
    asked: list[tuple[str, str]]
    faults: dict[str, str] = {}
    over: threading.Event               # lets those go who wait for a silent server
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.reply()

    def reply(self):
        path = self.path.split("?")[0].removeprefix("/api/models")
        self.asked.append((self.command, path))
        for place, fault in self.faults.items():
            if place in f"{self.command} {path}":
                return self.fail(fault, path)
        for error, code in (("GatedRepo", 403), ("RepoNotFound", 401)):
            if f"someone/{error}" in path:
                return self.send(code, b"{}", {"X-Error-Code": error})
        name, folder = path.rpartition("/")[2], self.root / "/".join(path.split("/")[1:3])
        if "/revision/" in path:
            files = [{"rfilename": file.name} for file in folder.iterdir()]
            return self.send(200, json.dumps({"id": "someone/it", "sha": self.commit,
                                              "siblings": files}).encode())
        if "/tree/" in path:
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size,
                      "oid": f"{hash(file.name) % 2**64:040x}"} for file in folder.iterdir()]
            return self.send(200, json.dumps(files).encode())
        if "/resolve/" in path and (folder / name).is_file():
            return self.send(200, (folder / name).read_bytes(), {
                "ETag": f'"{hash(name) % 2**64:040x}"', "X-Repo-Commit": self.commit})
        self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def fail(self, fault: str, path: str):
        """Say nothing, stop in the middle, send a log-in page with or without the Hub's headers,
        a status, or an answer of another kind."""
        if fault == "silent":
            self.over.wait()
        elif fault == "dropped":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
        elif fault.startswith("page"):
            self.send(200, b"<!DOCTYPE html><title>Log in</title>", {
                "ETag": '"page"', "X-Repo-Commit": self.commit} if "Hub's" in fault else {})
        elif fault.isdecimal():
            self.send(int(fault), b"{}")
        else:
            self.send(200, fault.encode())

    def send(self, code: int, body: bytes, headers=()):
        self.send_response(code)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        """Quiet."""


@contextmanager
def hub_library(**environment):
    """Here huggingface_hub is imported anew, because it reads the environment at its import."""
    def loaded():
        return [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
    before = {name: sys.modules.pop(name) for name in loaded()}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, str(value))
        try:
            yield
        finally:
            for name in loaded():
                del sys.modules[name]
            sys.modules.update(before)


def found(name: str) -> str:
    """The digest of what find_checkpoint finds, or what it says against it."""
    try:
        return check_checkpoint(find_checkpoint(name))
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What find_checkpoint says of several names, first with a Hub in reach and then offline: its
    lines, progress bars, the files it fetched, the digest of what was served.
    """
    root = tmp_path_factory.mktemp("hub")
    for name in ("llama", "mistral"):
        (root / "someone" / name).mkdir(parents=True)
        publish(root / "someone" / name)
    served = root / "someone" / "llama"
    shard(served)
    for extra in ("tokenizer.json", "README.md", "consolidated.00.pth", "pytorch_model.bin",
                  "model.onnx"):
        (served / extra).write_text("{}")
    (root / "someone" / "mistral" / "config.json").write_text(
        json.dumps(SIZES | {"model_type": "mistral"}))
    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_HOME": root / "cache", "HF_HUB_DISABLE_XET": 1,
                   "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    with hub_library(**environment), redirect_stderr(StringIO()) as bars:
        lines = [found(f"someone/{name}") for name in ("llama", "mistral", "GatedRepo",
                                                       "RepoNotFound")]
    asked = list(handler.asked)
    with hub_library(**environment, HF_HUB_OFFLINE=1):
        lines += [found(f"someone/{name}") for name in ("llama", "other")]
    server.shutdown()
    server.server_close()
    assert handler.asked == asked                       # and nothing while offline
    fetched = [path.split("/") for command, path in asked
               if command == "GET" and "/resolve/" in path]
    return lines, bars.getvalue(), fetched, check_checkpoint(served)


def test_a_hub_repository_is_fetched_once_and_only_what_is_needed(hub):
    lines, bars, fetched, digest = hub
    assert lines[0] == lines[4] == digest               # the second time offline
    assert sorted(path[-1] for path in fetched if path[2] == "llama") == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json"]
    assert "%|" in bars


def test_a_model_we_do_not_implement_is_refused_before_its_weights_are_fetched(hub):
    lines, _, fetched, _ = hub
    assert "model_type is 'mistral'" in lines[1]
    assert [path[-1] for path in fetched if path[2] == "mistral"] == ["config.json"]


def test_what_the_hub_refuses_is_explained(hub):
    lines = hub[0]
    assert "https://huggingface.co/someone/GatedRepo" in lines[2] and "hf auth login" in lines[2]
    assert "neither a folder here nor a repository on the Hub" in lines[3]
    assert "not complete in the Hub's cache" in lines[5] and "unset HF_HUB_OFFLINE" in lines[5]
    assert not any("\n" in line for line in lines)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A Hub that has someone/llama in one file; what is put into its faults happens."""
    folder = tmp_path / "someone" / "llama"
    folder.mkdir(parents=True)
    (publish(folder) / "tokenizer.json").write_text("{}")
    handler = type("Handler", (Hub,), {"root": tmp_path, "asked": [], "faults": {},
                                         "over": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr("time.sleep", lambda seconds: None)         # between the library's tries
    try:
        with hub_library(HF_HOME=tmp_path / "cache", HF_HUB_DISABLE_XET=1, HF_HUB_ETAG_TIMEOUT=1,
                         HF_HUB_DOWNLOAD_TIMEOUT=1,
                         HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}"):
            yield handler
    finally:
        handler.over.set()
        server.shutdown()
        server.server_close()


LISTING, CONFIG, WEIGHTS = "GET /someone/llama/revision", "config.json", "model.safetensors"


@pytest.mark.parametrize("place, fault, asked_for, reason", [
    (LISTING, "silent", "the list of its files", "timed out"),
    (LISTING, "dropped", "the list of its files", "peer closed connection|Expecting|Incomplete"),
    (LISTING, "page", "the list of its files", "something else came, perhaps the page of"),
    (LISTING, "[]", "the list of its files", "list"),
    (LISTING, "{}", "the list of its files", "id"),
    *((LISTING, code, "the list of its files", code) for code in ("401", "404", "500")),
    (f"GET /someone/llama/resolve/main/{CONFIG}", "page", CONFIG, "should be of size 4"),
    (CONFIG, "page", CONFIG, "does not seem to be"), (WEIGHTS, "401", WEIGHTS, "401"),
    (WEIGHTS, "500", WEIGHTS, "500"), (f"/{WEIGHTS}", "404", WEIGHTS, "404")])
def test_a_hub_out_of_reach_is_one_line_that_names_what_was_asked_for(served, place, fault,
                                                                      asked_for, reason):
    served.faults[place] = fault
    line = found("someone/llama")
    assert re.search(f"127.0.0.1:[0-9]+ was asked for {asked_for}: .*({reason})", line)
    assert line.startswith("someone/llama: no folder here") and "\n" not in line


def test_a_file_that_is_not_whole_is_fetched_again_and_the_others_are_not(served, tmp_path):
    served.faults[f"GET /someone/llama/resolve/{Hub.commit}/{WEIGHTS}"] = "dropped"
    assert f"was asked for {WEIGHTS}: " in found("someone/llama")
    served.faults.clear()
    served.asked.clear()
    assert found("someone/llama") == check_checkpoint(tmp_path / "someone" / "llama")
    assert [path.rpartition("/")[2] for command, path in served.asked
            if command == "GET" and "/resolve/" in path] == [WEIGHTS]


def test_a_log_in_page_in_the_place_of_a_file_does_not_stay_in_the_cache(served, tmp_path):
    served.faults[CONFIG] = "page with the Hub's headers"
    assert re.search(f"someone/llama: http.* was asked for {CONFIG}: something else came",
                     found("someone/llama"))
    served.faults.clear()
    assert found("someone/llama") == check_checkpoint(tmp_path / "someone" / "llama")


def test_what_the_cache_holds_is_taken_while_the_hub_is_silent(served, tmp_path, capsys):
    assert found("someone/llama") == check_checkpoint(tmp_path / "someone" / "llama")
    served.faults[""] = "silent"
    assert found("someone/llama") == check_checkpoint(tmp_path / "someone" / "llama")
    assert "does not list its files; taking what its cache has in" in capsys.readouterr().out


def test_a_repository_without_config_is_no_checkpoint(served, tmp_path):
    served.faults[LISTING] = '{"id": "someone/llama"}'
    assert "has no config.json" in found("someone/llama")
    served.faults.clear()
    (tmp_path / "someone" / "llama" / CONFIG).unlink()
    assert found("someone/llama").startswith("someone/llama: has no config.json, so it is not a")


def test_a_folder_comes_before_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "llama").mkdir(parents=True)
    for name in ("someone/llama", "nowhere", "/a/b", "../a/b", "./a", "a/b/c", "~/a"):
        assert find_checkpoint(name) == Path(name)


def test_the_command_line_ends_in_one_line_without_a_network(tmp_path, capsys):
    with hub_library(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=tmp_path):
        assert main(["--model", "someone/llama", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: someone/llama: no folder here") and error.count("\n") == 1
    assert "the Hub cannot be reached" in error


if __name__ == "__main__":
    import tempfile
    record = {}
    for kind in KINDS:
        record[kind] = {}
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                hidden, logits = theirs(publish(Path(folder), kind), mode)
            record[kind][mode] = {"hidden": [float(f"{x:.9g}") for x in hidden[1, -1]],
                                  "logits": [float(f"{x:.9g}") for x in logits[1, -1, ::8]]}
    RECORDED.write_text(json.dumps(record, indent=0) + "\n")
    print(f"wrote {RECORDED}")
