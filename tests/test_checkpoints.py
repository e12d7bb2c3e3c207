"""llama.py on checkpoints as they are published: numbers of the reference implementation, strict
loading, every refusal, the Hub.

`python tests/test_checkpoints.py` asks transformers for the numbers in recorded_llama.json again.
"""

import json
import re
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import published_tensors
from safetensors.torch import load_file, save_file

from cetrec import main
from llama import Llama, LlamaConfig, load_llama, save_llama
from lora import add_lora
from support.checkpoints import find_checkpoint, fingerprint

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
MODES = {       # positions, and whether embeddings are given instead of tokens
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
    positions, given = MODES[mode]
    tokens = {"inputs_embeds": embeddings().to(dtype)} if given else {"input_ids": TOKENS}
    with torch.no_grad():
        out = model(**tokens, position_ids=positions.expand(2, -1), output_hidden_states=True,
                    attention_mask=torch.ones(2, 11))
    return out.hidden_states[-1], out.logits


@torch.no_grad()
def ours(folder: Path, mode: str, dtype=None):
    model = load_llama(folder, dtype=dtype)
    positions, given = MODES[mode]
    hidden = model(None if given else TOKENS, positions=positions,
                   embeddings=embeddings().to(model.norm.weight.dtype) if given else None)
    return hidden, model.logits(hidden)


def relative(got, wanted) -> float:
    """The largest difference over the largest number wanted."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_equal_transformers(tmp_path, kind, mode):
    pytest.importorskip("transformers")
    publish(tmp_path, kind)
    for got, wanted in zip(ours(tmp_path, mode), theirs(tmp_path, mode)):
        assert relative(got, wanted) < 2e-5


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
    for got, wanted in zip(ours(tmp_path, "default"), ours(tmp_path, "default", torch.float32)):
        assert 2**-16 < (got.float() - wanted).norm() / wanted.norm() < 4 * 2**-8
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


def test_the_fingerprint_names_the_values_not_the_files(tmp_path):
    one = fingerprint(publish(tmp_path, "Llama 3", torch.bfloat16))
    assert re.fullmatch("[0-9a-f]{16}", one)
    shard(tmp_path)
    assert fingerprint(tmp_path) == one
    publish(tmp_path, "Llama 3", torch.bfloat16, prefix="")
    assert fingerprint(tmp_path) == one
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != one


PEAK = """
import re, sys, torch
from llama import load_llama
def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
model = load_llama(sys.argv[1])
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((kilobytes("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_loading_a_gigabyte_takes_memory_for_it_and_for_its_largest_tensor(tmp_path):
    """Zeros in bfloat16, as a file with a hole; a quarter is one tensor, which is not the first."""
    config = SIZES | {"vocab_size": 64_128, "hidden_size": 2048, "intermediate_size": 8192,
                      "num_hidden_layers": 5, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        wanted = Llama(LlamaConfig.from_folder(tmp_path)).named_parameters()
    header, end = {}, 0
    for name, p in wanted:
        header[name] = {"dtype": "BF16", "shape": list(p.shape),
                                   "data_offsets": [end, end := end + 2 * p.numel()]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(__file__).parent.parent)
    assert end > 1e9 and 0.9 < float(done.stdout) < 1.35, done


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
    with pytest.raises(FileNotFoundError, match="model-00002.*not found.*index.json"):
        load_llama(tmp_path)


# ----------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"attention_bias": True}, "attention_bias is set"), ({"mlp_bias": True}, "mlp_bias is set"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not implemented"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear' is not implemented"),
    ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "low_freq_factor is None"),
    ({"rope_scaling": SLOWED | {"rope_type": "llama3", "factor": "8"}}, "factor is '8'"),
    ({"rope_scaling": SLOWED | {"rope_type": "llama3", "high_freq_factor": 1.0}}, "not below"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; wanted an object"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; wanted an object"),
    ({"hidden_size": "wide"}, "config.json: "), ({"vocab_size": None}, "vocab_size is None"),
    ({"hidden_size": "wide", "head_dim": 6}, "hidden_size is 'wide'"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"), ({"hidden_size": -24}, "is -24"),
    ({"num_attention_heads": 0}, "config.json: "), ({"vocab_size": True}, "vocab_size is True"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"rope_theta": "big"}, "rope_theta is 'big'"), ({"rms_norm_eps": "1e-5"}, "is '1e-5'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"num_key_value_heads": 3}, "cannot share"),
])
def test_a_config_this_forward_does_not_implement_is_refused_before_weights(tmp_path, change,
                                                                            message):
    publish(tmp_path)
    (tmp_path / "model.safetensors").unlink()           # nobody needs to look at it
    (tmp_path / "config.json").write_text(json.dumps(KINDS["Llama 3"] | change))
    with pytest.raises(ValueError, match=f"config.json: .*{message}|{message}") as error:
        load_llama(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"), ("[]", r"model_type is \[\]"), ("\xff", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"), ('{"model_type": "llama"}', "'hidden_size' is missing")])
def test_a_damaged_config_is_one_clear_error(tmp_path, text, message):
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        load_llama(tmp_path)


def test_tensors_that_do_not_fit_are_listed_together_with_their_file(tmp_path):
    publish(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)    # harmless
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_llama(tmp_path)
    for part in (str(tmp_path), "model.extra.weight in model.safetensors unexpected",
                 "lm_head.weight in model.safetensors of shape (3, 3) as F32, wanted (67, 24) as",
                 "up_proj.weight in model.safetensors of shape (40, 24) as I8, wanted (40, 24)",
                 "norm.weight missing",
                 "embed_tokens.weight in model.safetensors unexpected"):
        assert part in str(error.value), part
    assert "inv_freq" not in str(error.value) and "\n" not in str(error.value)


def test_a_tied_checkpoint_may_store_both_but_not_two_different_ones(tmp_path):
    publish(tmp_path, "SmolLM2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_llama(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="ties lm_head to embed_tokens, but"):
        load_llama(tmp_path)


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
    with pytest.raises(ValueError, match=f"model.safetensors: {message}") as error:
        load_llama(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad, dtype):
    publish(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][23] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="safetensors: model.norm.weight holds values that are"):
        load_llama(tmp_path)


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
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="read from model.safetensors, or from the shards"):
        load_llama(tmp_path)


# ----------------------------------------------------------------------------------------------
# Out again


@pytest.mark.parametrize("kind", ["Llama 3.1", "Llama 3.2"])
def test_a_saved_folder_loads_back_exactly(tmp_path, kind):
    model = load_llama(publish(tmp_path / "in", kind, torch.bfloat16))
    save_llama(model, tmp_path / "out")
    loaded = load_llama(tmp_path / "out")
    assert loaded.config == model.config and (
        fingerprint(tmp_path / "in") == fingerprint(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.part"))
    assert torch.equal(loaded.logits(loaded(TOKENS)), model.logits(model(TOKENS)))
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
    """The few answers of the Hub's interface that a download needs."""

    root: Path
    fetched: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.reply()

    def reply(self):
        path = self.path.split("?")[0]
        for error, code in (("GatedRepo", 403), ("RepoNotFound", 401)):
            if f"someone/{error}" in path:
                return self.send(code, b"{}", {"X-Error-Code": error})
        if path.startswith("/api/models/someone/llama/revision/"):
            files = [{"rfilename": file.name} for file in self.root.iterdir()]
            return self.send(200, json.dumps({"id": "someone/llama", "sha": self.commit,
                                              "siblings": files}).encode())
        if path.startswith("/api/models/someone/llama/tree/"):
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size,
                      "oid": f"{hash(file.name) % 2**64:040x}"} for file in self.root.iterdir()]
            return self.send(200, json.dumps(files).encode())
        name = path.rpartition("/")[2]
        if "/resolve/" in path and (self.root / name).is_file():
            if self.command == "GET":
                self.fetched.append(name)
            return self.send(200, (self.root / name).read_bytes(), {
                "ETag": f'"{hash(name) % 2**64:040x}"', "X-Repo-Commit": self.commit})
        self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

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


@pytest.fixture
def hub(tmp_path):
    """(folder the fake Hub serves, names of the files it was asked for, a way to run there)"""
    (tmp_path / "served").mkdir()
    handler = type("Handler", (Hub,), {"root": tmp_path / "served", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def run(name: str, **environment):
        """find_checkpoint and load_llama in a process of its own: the library reads the
        environment when it is imported."""
        return subprocess.run(
            [sys.executable, "-c", "import sys; from support.checkpoints import *\n"
             "try: print(fingerprint(find_checkpoint(sys.argv[1])))\n"
             "except ValueError as error: print('refused:', error)", name],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent,
            env={"PATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint,
                 "HF_HUB_DISABLE_XET": "1"} | environment)
    yield tmp_path / "served", handler.fetched, run
    server.shutdown()


def test_a_hub_repository_is_fetched_once_and_only_what_is_needed(hub):
    served, fetched, run = hub
    publish(served)
    shard(served)
    for extra in ("tokenizer.json", "README.md", "consolidated.00.pth", "pytorch_model.bin",
                  "model.onnx"):
        (served / extra).write_text("{}")
    done = run("someone/llama")
    assert done.stdout.strip() == fingerprint(served), done
    assert sorted(fetched) == ["config.json", "model-00001-of-00002.safetensors",
                               "model-00002-of-00002.safetensors", "model.safetensors.index.json",
                               "tokenizer.json"]
    assert "%|" in done.stderr                          # a progress bar
    fetched.clear()
    assert run("someone/llama", HF_HUB_OFFLINE="1").stdout == done.stdout and not fetched


def test_a_model_we_do_not_implement_is_refused_before_its_weights_are_fetched(hub):
    served, fetched, run = hub
    publish(served)
    (served / "config.json").write_text(json.dumps(SIZES | {"model_type": "mistral"}))
    assert "model_type is 'mistral'" in run("someone/llama").stdout
    assert fetched == ["config.json"]


def test_what_the_hub_refuses_is_explained(hub):
    _, _, run = hub
    gated = run("someone/GatedRepo").stdout
    assert "https://huggingface.co/someone/GatedRepo" in gated and "hf auth login" in gated
    assert "neither a folder here nor a repository on the Hub" in run("someone/RepoNotFound").stdout
    offline = run("someone/llama", HF_HUB_OFFLINE="1").stdout
    assert "HF_HUB_OFFLINE" in offline and offline.count("\n") == 1
    away = run("someone/llama", HF_ENDPOINT="http://127.0.0.1:9").stdout
    assert "the Hub cannot be reached" in away and away.count("\n") == 1


def test_a_folder_comes_before_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "llama").mkdir(parents=True)
    for name in ("someone/llama", "nowhere", "/a/b", "../a/b", "./a", "a/b/c", "~/a"):
        assert find_checkpoint(name) == Path(name)


def test_the_command_line_ends_in_one_line_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["--model", "someone/llama", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: someone/llama: no folder here") and error.count("\n") == 1


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
