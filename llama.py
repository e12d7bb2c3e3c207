"""Llama 3 in plain PyTorch: the network f_Θ of Eq. 1, with the attention of §3.2 (Eq. 4 and 5).

Read this file first; it imports nothing of ours. A forward pass takes token embeddings, their
positions, a mask, and the keys and values of earlier tokens. It returns hidden states, and the keys
and values of all tokens so far. The model itself remembers nothing between two passes. Parameters
have the names of published checkpoints without the leading `model.`.

Shapes: B rows, T new tokens, P earlier tokens, S = P + T tokens in all, C width, H query heads,
G key/value heads, D head width, V vocabulary.

Left out: attention or MLP biases, sliding windows, mixtures of experts, quantised weights.
"""

import json
import math
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]      # keys and values of one block, (B or 1, G, S, D) each

# ----------------------------------------------------------------------------------------------
# Rotation (Eq. 4)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of coordinates by its angle: R x of Eq. 4.

    x (.., D); cos and sin (.., D/2), one angle for each pair.

    A pair (a, b) becomes (a cos φ - b sin φ, b cos φ + a sin φ). Which two coordinates make a pair
    is a convention. Published safetensors weights pair the two *halves* of a head, (x_i, x_i+D/2),
    and so does this function. Eq. 4 and Meta's own .pth files pair *neighbours*, (x_2i, x_2i+1), as
    `cetrec.rotary` does. The two are the same rotation up to the order of the coordinates.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ----------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama, under the names of a published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0       # Llama 3; Llama 2 and TinyLlama use 10,000
    rope_scaling: dict | None = None    # Llama 3.1 and 3.2: {"rope_type": "llama3", "factor": ...}
    tie_word_embeddings: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LlamaConfig":
        """Read config.json, in the layouts of old and new checkpoints.

        Raises FileNotFoundError, or a ValueError that names what is missing or not implemented.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. A checkpoint folder holds config.json, "
                                    "model.safetensors and tokenizer.json; or use --model tiny")
        raw = json.loads(path.read_text(encoding="utf-8"))

        # Older files keep the rotary settings beside the sizes, newer ones in an object of its own.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        for setting, value, implemented in (
                ("model_type", raw.get("model_type"), ["llama"]),
                ("hidden_act", raw.get("hidden_act", "silu"), ["silu"]),
                ("attention_bias", raw.get("attention_bias"), [None, False]),
                ("mlp_bias", raw.get("mlp_bias"), [None, False]),
                ("quantization_config", raw.get("quantization_config"), [None, {}]),
                ("partial_rotary_factor", part, [None, 1]),
                ("rope_type", kind, ["default", "llama3"])):
            if value not in implemented:
                raise ValueError(f"{path}: {setting} is {value!r}, which is not implemented; "
                                 f"wanted {' or '.join(map(repr, implemented))}")

        # What a file may leave out has the ecosystem's defaults.
        found = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
                 "tie_word_embeddings": False, **raw}
        found["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
        found["rope_scaling"] = None if kind == "default" else {
            "original_max_position_embeddings": found["max_position_embeddings"], **rope,
            "rope_type": kind}
        try:
            heads = found["num_attention_heads"]
            found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
            found["head_dim"] = found.get("head_dim") or found["hidden_size"] // heads
            return cls(**{f.name: found[f.name] for f in fields(cls)})
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from None


# ----------------------------------------------------------------------------------------------
# Attention over rotated positions (Eq. 4 and 5)


def inverse_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """θ_i = rope_theta^(-2i/D) for the pairs i = 0 .. D/2 - 1.  -> (D/2,)

    Eq. 4 calls them Θ, as it does the weights.

    With "llama3" scaling (Llama 3.1 and 3.2), pairs that do not complete a full turn within the
    original context are slowed down, pairs that complete many turns are kept, and those in between
    are interpolated.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 1: as trained, 0: slowed by `factor`
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / s["factor"]
    return inv_freq


def token_positions(padding: Tensor, T: int, P: int = 0) -> Tensor:
    """Positions of T tokens that follow P earlier ones; pads in front of a row do not count.

    padding (B,): how many pads each row begins with.  -> (B, T)
    """
    return P + torch.arange(T, device=padding.device) - padding[:, None]


def causal_mask(padding: Tensor, T: int, P: int = 0) -> Tensor:
    """Where each of T tokens may look: at all P earlier tokens, itself and what stands before it.

    No token looks at a pad. A pad looks at itself, because a softmax over nothing is not a number.
    padding (B,): how many pads each row begins with.  -> (B, 1, T, P + T) bool
    """
    key = torch.arange(T, device=padding.device)
    query = key[:, None]
    causal = (key <= query) & (key >= padding[:, None, None]) | (key == query)
    return F.pad(causal, (P, 0), value=True)[:, None]


class Attention(nn.Module):
    """Grouped-query attention under rotation (Eq. 5): H query heads share G key/value heads.

    Queries and keys are rotated by their positions m and n. As <R_m q, R_n k> = <q, R_{n-m} k>,
    scores depend on distances only. Values are not rotated.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Split the last dimension into heads.  (B, T, heads · D) -> (B, heads, T, D)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: KeysValues | None,
                last: int) -> tuple[Tensor, KeysValues]:
        """x (B, T, C) -> (B, T or last, C), and the keys and values of all S tokens.

        cos and sin (B or 1, 1, T, D/2); mask (B or 1, 1, T, S). Every token needs a key and a
        value. Queries are needed for the last columns only.
        """
        k = rotate(self.heads(self.k_proj(x)), cos, sin)                        # (B, G, T, D)
        v = self.heads(self.v_proj(x))
        if past is not None:                # one row of past may serve all B;  -> (B, G, S, D)
            k, v = (torch.cat((old.expand(len(x), -1, -1, -1), new), dim=2)
                    for old, new in zip(past, (k, v)))
        x, mask = x[:, -last:], mask[:, :, -last:]          # last = 0 keeps all: [-0:] is [0:]
        cos, sin = cos[..., -last:, :], sin[..., -last:, :]
        q = rotate(self.heads(self.q_proj(x)), cos, sin)                        # (B, H, last, D)

        # A group's queries stand behind one another, as more queries of one head. So there are as
        # many heads of queries as of keys, which PyTorch's fast kernels want where there is a mask.
        T, group = q.shape[2], q.shape[1] // k.shape[1]
        q = q.unflatten(1, (-1, group)).flatten(2, 3)                   # (B, G, H/G · T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, group, 1))
        y = y.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4)           # (B, T, G, H/G, D)
        return self.o_proj(y.flatten(2)), (k, v)


# ----------------------------------------------------------------------------------------------
# The decoder


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), with silu(z) = z σ(z).

    The gate decides, for each inner unit, how much of `up` passes.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a residual connection.

        x = x + attention(norm(x));  x = x + mlp(norm(x))
        norm(x) = x / √(mean(x²) + eps) · weight, the mean being over the last dimension
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: KeysValues | None,
                last: int) -> tuple[Tensor, KeysValues]:
        """x (B, T, C) -> (B, T or last, C), and the keys and values of all S tokens."""
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, last)
        x = x[:, -last:] + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Llama(nn.Module):
    """The decoder. `forward` ends at the final norm, so that logits are made only where needed.

    With the vocabulary of Llama 3, the logits of one token are as large as its hidden states in all
    layers together, and only the few tokens of the answer need them.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings x_t of Eq. 6.  (B, T) -> (B, T, C)"""
        return self.embed_tokens(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token.  (.., C) -> (.., V)

        They are float32 whatever the storage, because Eq. 8 takes small differences of them.
        """
        return F.linear(hidden.float(), self.lm_head.weight.float())

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                past: list[KeysValues] | None = None,
                last: int = 0) -> tuple[Tensor, list[KeysValues]]:
        """Hidden states after the final norm, and the keys and values of all tokens so far.

        x (B, T, C): embeddings. positions (T,) or (B, T), integer or real: by default 0, 1, ..,
        counted on from `past`. mask (B or 1, 1, T, S) bool, True where a token may look: by default
        causal. past: keys and values of earlier tokens, one pair for each block, of B rows or of
        one row that serves all. last: how many of the last columns are needed, 0 for all; the last
        block works for these only.  -> (B, T or last, C), and a pair of (B, G, S, D) for each block
        """
        T, P = x.shape[1], past[0][0].shape[2] if past else 0
        no_padding = torch.zeros(1, dtype=torch.long, device=x.device)
        positions = token_positions(no_padding, T, P) if positions is None else positions
        mask = causal_mask(no_padding, T, P) if mask is None else mask
        angles = positions[..., None].float() * inverse_frequencies(self.config, x.device)
        angles = angles.unsqueeze(-3)                       # (B, 1, T, D/2), for all heads
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        present = []
        for i, block in enumerate(self.layers):
            needed = last if i == len(self.layers) - 1 else 0
            x, keys_values = block(x, cos, sin, mask, past[i] if past else None, needed)
            present.append(keys_values)
        return self.norm(x), present


# ----------------------------------------------------------------------------------------------
# Checkpoint folders: config.json, and safetensors in one file or in shards with an index


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names. Raises FileNotFoundError."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found. Weights are read from "
                                    f"model.safetensors, or from the shards named in {index.name}")
    return [folder / name for name in names]


def find_tensors(folder: Path, model: Llama) -> dict[str, tuple[Path, str]]:
    """Parameter name -> (file, stored name), from the headers of the files alone.

    Raises FileNotFoundError for absent files, and one ValueError for all tensors that are missing,
    unexpected or of another shape or type.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}     # tied ones once
    found: dict[str, tuple[Path, str]] = {}
    wrong = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():
                name, header = stored.removeprefix("model."), file.get_slice(stored)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if name.endswith("rotary_emb.inv_freq"):
                    continue                            # older files store what we compute
                if name == "lm_head.weight" and model.config.tie_word_embeddings:
                    shapes[name] = shapes["embed_tokens.weight"]        # some files store both
                if name not in shapes or name in found:
                    wrong.append(f"{stored} in {path.name} unexpected")
                elif shape != shapes[name] or dtype not in ("F32", "F16", "BF16"):
                    wrong.append(f"{stored} in {path.name} of shape {shape} as {dtype}, wanted "
                                 f"{shapes[name]} as F32, F16 or BF16")
                found[name] = (path, stored)
    wrong += [f"{name} missing" for name in shapes if name not in found]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit config.json: "
                         f"{'; '.join(wrong[:6])}. Do they belong together?")
    return found


def read_tensor(path: Path, stored: str) -> Tensor:
    """One tensor of a file. The file is opened anew for each, so that memory holds one at a time.
    """
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(stored)


def load_llama(folder: str | Path, device: torch.device | str = "cpu",
               dtype: torch.dtype | None = None) -> Llama:
    """Read a checkpoint folder strictly. dtype None keeps the stored precision.

    Raises what LlamaConfig.from_folder and find_tensors raise, before any weight is read.
    """
    config = LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        model = Llama(config)
    weights = {name: read_tensor(file, stored).to(device, dtype, copy=True)
               for name, (file, stored) in find_tensors(Path(folder), model).items()}
    if config.tie_word_embeddings:                      # load_state_dict wants both names
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:                      # and made two parameters of them
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors under published names.

    Both are written in a new folder first and then moved, so neither is ever half-written, and
    nothing is written through a link. Raises ValueError for a model that carries LoRA factors.
    """
    folder, tensors = Path(folder), {}
    for name, p in model.named_parameters():
        if name.endswith((".A", ".B")):
            raise ValueError(f"{name} has no place in the checkpoint of a plain Llama; "
                             "merge_lora(model) first")
        stored = name if name.startswith("lm_head") else f"model.{name}"
        tensors[stored] = p.detach().contiguous().cpu()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
              **asdict(model.config)}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        Path(new, "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        Path(new, "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):   # a folder that has both is whole
            Path(new, name).replace(folder / name)
