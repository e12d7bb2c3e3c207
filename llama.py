"""Llama 3 in plain PyTorch: the frozen backbone Θ of the paper (§3.2), Eq. 4 and 5 for token
positions.

Read this file first; it imports nothing of ours. Parameters carry the names of published
checkpoints without the leading `model.`, so the module tree below *is* the table of weight names.

Shapes: B batch, T new tokens, S tokens seen so far (cache and new), C width, H query heads,
G key/value heads, D head width, V vocabulary.

Left out: attention or MLP biases, sliding windows, mixtures, quantised weights.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names of a published config.json; sizes have no defaults."""

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

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; wanted a positive integer")
            if field.type is float and (type(value) not in (int, float) or not value > 0):
                raise ValueError(f"{field.name} is {value!r}; wanted a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} query heads cannot share "
                             f"{self.num_key_value_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings want an even width")
        kind = rope_kind(self.rope_scaling)
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope scaling {kind!r} is not implemented; known: default, llama3")
        if kind == "llama3":
            wanted = ("factor", "low_freq_factor", "high_freq_factor",
                      "original_max_position_embeddings")
            if missing := [k for k in wanted if k not in self.rope_scaling]:
                raise ValueError(f"rope scaling 'llama3' lacks {', '.join(missing)}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LlamaConfig":
        """Read config.json. Raises FileNotFoundError or ValueError that name the file."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. A checkpoint folder holds config.json, "
                                    "model.safetensors and tokenizer.json; or use --model tiny")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict) or raw.get("model_type") != "llama":
            kind = raw.get("model_type") if isinstance(raw, dict) else raw
            raise ValueError(f"{path}: model_type is {kind!r}; this code implements 'llama' only")
        for switch in ("attention_bias", "mlp_bias", "quantization_config"):
            if raw.get(switch):
                raise ValueError(f"{path}: {switch} is set; this forward does not implement it")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: hidden_act is {raw['hidden_act']!r}; wanted 'silu'")
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                raise ValueError(f"{path}: {key} is {raw[key]!r}; wanted an object or null")
        rope = raw.get("rope_parameters") or {}         # the layout of newer files
        raw.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
        if rope_kind(rope) != "default":
            raw["rope_scaling"] = rope
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        try:
            if raw.get("head_dim") is None:
                raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
            return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})
        except KeyError as error:
            raise ValueError(f"{path}: {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            what = str(error).removeprefix("LlamaConfig.__init__() ")
            raise ValueError(f"{path}: {what}") from None


def rope_kind(scaling: dict | None) -> str:
    """The kind of rotary scaling a config asks for: "default" when it asks for none."""
    return (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"


def inverse_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Θ of Eq. 4: rope_theta^(-2i/D), i < D/2, slowed for long contexts if "llama3".  -> (D/2,)"""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (half / config.head_dim)
    if rope_kind(config.rope_scaling) == "llama3":
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 1: as trained, 0: slowed by `factor`
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / s["factor"]
    return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pair (i, i + D/2) of each head by its angle, Eq. 4.  (B, H, T, D), (.., T, D/2) twice

    Split halves: i turns with i + D/2, as in published safetensors; Meta's .pth files interleave.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention written out; the reference that `attend_fused` is tested against.

    q (B, H, T, D), k and v (B, G, S, D), mask True where a query may look (B or 1, 1, T, S) or None
    for plain causal attention with T = S.  -> (B, H, T, D)
    """
    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same by PyTorch's fused kernel: no (T, S) matrix is kept for the backward pass."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of the tokens seen so far, one (B, G, S, D) pair per layer.

    A cache of batch 1 serves any number of rows (a prefix common to all of them is then run once),
    and gradients flow back through what it holds. Slots marked in `hidden` are never attended to.
    """

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.hidden: Tensor | None = None       # (B, S) bool

    @property
    def length(self) -> int:
        """Number of slots S."""
        return self.keys[0].shape[2] if self.keys else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of one layer, (B, G, T, D) each; return all of them."""
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            rows = (k.shape[0], -1, -1, -1)
            self.keys[layer] = torch.cat((self.keys[layer].expand(rows), k), dim=2)
            self.values[layer] = torch.cat((self.values[layer].expand(rows), v), dim=2)
        return self.keys[layer], self.values[layer]

    def hide_from(self, lengths: Tensor) -> None:
        """Hide the right padding of a batch of prompts: the slots >= lengths, (B,)."""
        slots = torch.arange(self.length, device=lengths.device)
        self.hidden = slots >= lengths[:, None]

    def select(self, rows: Tensor) -> None:
        """Keep (and repeat) the given rows, in that order: follow beams, drop finished prompts."""
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.hidden = None if self.hidden is None else self.hidden.index_select(0, rows)

    def mask(self, new: int, device) -> Tensor | None:
        """May query t look at slot s? (B or 1, 1, T, S) bool; None means plain causal."""
        if self.length == 0:
            return None
        past = torch.ones(new, self.length + new, dtype=torch.bool, device=device)
        mask = past.tril(self.length)[None, None]
        if self.hidden is not None:
            seen = F.pad(~self.hidden, (0, new + self.length - self.hidden.shape[1]), value=True)
            mask = mask & seen[:, None, None, :]
        return mask


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 whatever the storage."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, mask, cache, layer):
        """x (B, T, C) -> (B, T, C)"""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # -> (B, H or G, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                # -> (B, G, S, D)
        y = attend_fused(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))             # -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, layer):
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. `forward` stops at the final norm, so logits are computed only where wanted."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        """Next-token scores f.  (..., C) -> (..., V)"""
        return self.lm_head(hidden)

    def positions(self, new: int, cache: KVCache | None, device) -> Tensor:
        """Default positions of `new` tokens: counted on from the cache, less its hidden slots.

        -> (T,), or (B, T) when the rows of the cache differ in length
        """
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + new, device=device)
        if past and cache.hidden is not None:
            positions = positions - cache.hidden.sum(dim=1, keepdim=True)
        return positions

    def forward(self, tokens: Tensor | None, *, embeddings: Tensor | None = None,
                positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm.  tokens (B, T) -> (B, T, C)

        embeddings (B, T, C) replace embed(tokens); positions (T,) or (B, T), integer or float,
        default to 0 .. T-1 counted on from the cache; the cache is extended in place.
        """
        x = self.embed(tokens) if embeddings is None else embeddings
        T = x.shape[1]
        if positions is None:
            positions = self.positions(T, cache, x.device)
        angles = positions[..., None].float() * inverse_frequencies(self.config, x.device)
        if positions.dim() == 2:
            angles = angles[:, None]                # (B, T, D/2) -> (B, 1, T, D/2): all heads alike
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = cache.mask(T, x.device) if cache is not None else None
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, mask, cache, layer)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------
# Checkpoint folders: config.json and safetensors, one file or shards with an index


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{single}: not found, nor {index.name}. Weights are read from "
                                "safetensors files only")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a safetensors index (wanted a 'weight_map')") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found, though {index.name} names it")
    return [folder / name for name in names]


def load_llama(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """Read a checkpoint folder strictly, each tensor once. dtype None keeps the stored precision.

    Raises FileNotFoundError or ValueError: file absent or damaged, tensors missing, unexpected,
    of another shape (listed together), or holding a value that is not finite.
    """
    folder = Path(folder)
    config = LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())         # tied weights appear once
    found, unexpected, misshaped = {}, [], []
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for stored in file.keys():
                    name = stored.removeprefix("model.")
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue                    # some tied checkpoints store it twice
                    if name.endswith("rotary_emb.inv_freq"):
                        continue                    # a buffer of older files; computed here
                    if name not in wanted:
                        unexpected.append(stored)
                        continue
                    tensor = file.get_tensor(stored)
                    if tensor.shape != wanted[name].shape:
                        misshaped.append(f"{stored} {tuple(tensor.shape)}, wanted "
                                         f"{tuple(wanted[name].shape)}")
                    elif not tensor.is_floating_point() or not tensor.isfinite().all():
                        raise ValueError(f"{path}: {stored} holds values that are not finite")
                    found[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated ({error}). Fetch it again") from None
    missing = [name for name in wanted if name not in found]
    if missing or unexpected or misshaped:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
        parts = [f"{len(names)} tensors {what}, e.g. {', '.join(names[:3])}"
                 for what, names in lists.items() if names]
        raise ValueError(f"{folder}: {'; '.join(parts)}. "
                         "Do config.json and the weights belong together?")
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["embed_tokens.weight"]
    model.load_state_dict(found, assign=True)
    if config.tie_word_embeddings:                  # one parameter again, not two of one storage
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors under published names; each file appears whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {("" if name.startswith("lm_head") else "model.") + name:
               p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": dtype, **asdict(model.config)}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")
